/*
 * ssd_rig.h - what the tests of the SSD store share: a store in temporary directories over an
 * engine whose device can be broken by hand, blocks whose bytes follow from their key, and
 * time that only moves when told. Included by test_ssd*.c, one thread.
 */
#ifndef FK_TESTS_SSD_RIG_H
#define FK_TESTS_SSD_RIG_H

#include <fcntl.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/stat.h>
#include <sys/wait.h>

#include <cmocka.h>

#include "base/clock.h"
#include "base/log.h"
#include "base/util.h"
#include "tier/ssd.h"
#include "tier/ssd_format.h"

#define MAX_DIRS 4
#define MAX_IDS 4096
#define MAX_FILES 16384

static char base_dir[64];

/* --- an engine in between, whose device can be broken --- */

struct switch_engine {
    struct fk_engine base;
    struct fk_engine *inner;
    int32_t broken;                     /* -errno of every I/O; 0: works */
    uint32_t stale_below;               /* files with lower numbers fail (they vanished) */
    bool no_open;                       /* open fails too */
    uint64_t bad_at;                    /* reads over this byte of a data file fail; 0: none */
    uint32_t next_file, to_inner[MAX_FILES];
    bool is_table[MAX_FILES];
    struct fk_io *failed;
    struct fk_io *table_writes[1024];   /* in flight */
    unsigned n_table_writes, overlaps, data_ios, table_ios;
};

static inline struct switch_engine *sw(struct fk_engine *e)
{
    return (struct switch_engine *)e;
}

static int sw_open(struct fk_engine *e, const char *path, uint64_t bytes, unsigned flags,
                   uint32_t *file, bool *created)
{
    struct switch_engine *s = sw(e);
    uint32_t inner;

    if (s->no_open)
        return -EIO;
    int rc = s->inner->ops->open(s->inner, path, bytes, flags, &inner, created);
    if (rc < 0)
        return rc;
    *file = s->next_file++;
    assert_true(*file < MAX_FILES);
    s->to_inner[*file] = inner;
    s->is_table[*file] = strstr(path, ".table") != NULL;
    return 0;
}

static void sw_close(struct fk_engine *e, uint32_t file)
{
    sw(e)->inner->ops->close(sw(e)->inner, sw(e)->to_inner[file]);
}

static int sw_size(struct fk_engine *e, uint32_t file, uint64_t *bytes)
{
    return sw(e)->inner->ops->size(sw(e)->inner, sw(e)->to_inner[file], bytes);
}

static int sw_register(struct fk_engine *e, void *base, uint64_t bytes)
{
    return sw(e)->inner->ops->register_memory(sw(e)->inner, base, bytes);
}

/* No record may be in two writes at once. */
static void note_table_write(struct switch_engine *s, struct fk_io *io)
{
    for (unsigned i = 0; i < s->n_table_writes; i++) {
        struct fk_io *o = s->table_writes[i];

        if (o->file == io->file && io->offset < o->offset + o->bytes &&
            o->offset < io->offset + io->bytes)
            s->overlaps++;
    }
    assert_true(s->n_table_writes < 1024);
    s->table_writes[s->n_table_writes++] = io;
}

static void sw_submit(struct fk_engine *e, struct fk_io *io)
{
    struct switch_engine *s = sw(e);
    bool table = s->is_table[io->file];

    *(table ? &s->table_ios : &s->data_ios) += 1;
    bool bad = s->bad_at && !table && io->op == FK_IO_READ && io->offset <= s->bad_at &&
               s->bad_at < io->offset + io->bytes;

    if (s->broken || bad || io->file < s->stale_below) {
        io->result = s->broken ? s->broken : bad ? -EIO : -EBADF;
        io->next = s->failed;
        s->failed = io;
        return;
    }
    io->file = s->to_inner[io->file];
    if (table && io->op == FK_IO_WRITE)
        note_table_write(s, io);
    s->inner->ops->submit(s->inner, io);
}

static void sw_flush(struct fk_engine *e)
{
    sw(e)->inner->ops->flush(sw(e)->inner);
}

static uint32_t from_inner(const struct switch_engine *s, uint32_t inner)
{
    for (uint32_t i = s->next_file; i-- > 0;) {
        if (s->to_inner[i] == inner)
            return i;
    }
    return FK_NONE;
}

static int sw_reap(struct fk_engine *e, struct fk_io **out, int max, uint64_t timeout_us)
{
    struct switch_engine *s = sw(e);
    int n = 0;

    while (s->failed && n < max) {
        out[n++] = s->failed;
        s->failed = s->failed->next;
    }
    if (n > 0)
        return n;
    n = s->inner->ops->reap(s->inner, out, max, timeout_us);
    for (int i = 0; i < n; i++) {
        for (unsigned t = 0; t < s->n_table_writes; t++) {
            if (s->table_writes[t] == out[i])
                s->table_writes[t--] = s->table_writes[--s->n_table_writes];
        }
        out[i]->file = from_inner(s, out[i]->file);
    }
    return n;
}

static void sw_wake(struct fk_engine *e)
{
    sw(e)->inner->ops->wake(sw(e)->inner);
}

static unsigned sw_inflight(struct fk_engine *e)
{
    return sw(e)->inner->ops->inflight(sw(e)->inner);
}

static void sw_destroy(struct fk_engine *e)
{
    sw(e)->inner->ops->destroy(sw(e)->inner);
    free(e);
}

static const struct fk_engine_ops sw_ops = {
    .name = "switch", .open = sw_open, .close = sw_close, .size = sw_size,
    .register_memory = sw_register, .submit = sw_submit, .flush = sw_flush, .reap = sw_reap,
    .wake = sw_wake, .inflight = sw_inflight, .destroy = sw_destroy,
};

static inline struct fk_engine *switch_over(struct fk_engine *inner)
{
    struct switch_engine *s = calloc(1, sizeof(*s));

    assert_non_null(s);
    s->base.ops = &sw_ops;
    s->inner = inner;
    return &s->base;
}

static inline struct fk_engine *any_engine(bool uring)
{
    struct fk_engine_params p = { .depth = 16, .threads = 4, .no_uring = !uring };
    struct fk_engine *e;

    assert_int_equal(fk_engine_create(&p, &e), 0);
    return e;
}

/* --- the rig --- */

struct rig {
    struct fk_engine *engine;
    struct fk_ssd *ssd;
    struct fk_ssd_params params;
    char dir_names[MAX_DIRS][100];
    const char *dirs[MAX_DIRS];
    char error[512];
    char *mem;                          /* a buffer per slot */
    uint64_t slot_bytes, now;
    uint64_t next_id;
    int32_t status[MAX_IDS];            /* by id; 1: not done */
    /* recovered */
    struct fk_ssd_found *found;
    uint32_t n_found;
};

static inline void dirs_clear(const struct rig *r)
{
    char command[256];

    for (uint32_t i = 0; i < MAX_DIRS; i++) {
        snprintf(command, sizeof(command), "rm -rf '%s'", r->dir_names[i]);
        assert_int_equal(system(command), 0);
    }
}

static inline void rig_init(struct rig *r, uint32_t n_dirs, uint32_t n_slots,
                            uint64_t block_bytes)
{
    memset(r, 0, sizeof(*r));
    for (int i = 0; i < MAX_DIRS; i++) {
        snprintf(r->dir_names[i], sizeof(r->dir_names[i]), "%s/d%d", base_dir, i);
        r->dirs[i] = r->dir_names[i];
    }
    dirs_clear(r);
    r->engine = switch_over(any_engine(false));
    r->params = (struct fk_ssd_params){
        .name = "space", .dirs = r->dirs, .n_dirs = n_dirs, .block_bytes = block_bytes,
        .n_slots = n_slots, .fingerprint = { 1, 2, 3 }, .direct = true,
        .io_chunk_bytes = 256 * 1024, .stripe_slots = 4, .device_errors = 3,
        .device_retry_us = 1000000, .engine = r->engine,
    };
    r->now = 1000000;
    r->slot_bytes = fk_round_up(block_bytes, FK_SSD_ALIGN);
    r->mem = aligned_alloc(FK_SSD_ALIGN, n_slots * r->slot_bytes);
    r->found = calloc(n_slots, sizeof(*r->found));
    assert_true(r->mem && r->found);
    memset(r->mem, 0, n_slots * r->slot_bytes);
}

static inline int rig_try_open(struct rig *r)
{
    r->params.engine = r->engine;
    r->error[0] = '\0';
    return fk_ssd_open(&r->params, &r->ssd, r->error, sizeof(r->error));
}

static inline void rig_open(struct rig *r)
{
    int rc = rig_try_open(r);

    if (rc < 0)
        fail_msg("open: %d %s", rc, r->error);
}

static inline void rig_use_engine(struct rig *r, struct fk_engine *e)
{
    r->engine->ops->destroy(r->engine);
    r->engine = e;
}

static inline void rig_free(struct rig *r)
{
    fk_ssd_close(r->ssd);
    r->engine->ops->destroy(r->engine);
    free(r->mem);
    free(r->found);
}

/* Takes completions; true while there is something under way. */
static inline bool rig_step(struct rig *r)
{
    struct fk_io *ios[16];
    struct fk_ssd_done done[16];
    uint32_t m;

    int n = r->engine->ops->reap(r->engine, ios, 16, fk_ssd_inflight(r->ssd) ? 10000 : 0);
    for (int i = 0; i < n; i++)
        fk_ssd_io_done(ios[i], r->now);
    while ((m = fk_ssd_take_done(r->ssd, done, 16)) > 0) {
        for (uint32_t i = 0; i < m; i++) {
            assert_int_equal(r->status[done[i].id % MAX_IDS], 1);   /* exactly once */
            r->status[done[i].id % MAX_IDS] = done[i].status;
        }
    }
    return fk_ssd_inflight(r->ssd) > 0;
}

static inline void rig_drain(struct rig *r)
{
    for (int i = 0; rig_step(r) && i < 3000; i++)
        ;
    assert_int_equal(fk_ssd_inflight(r->ssd), 0);
    rig_step(r);
}

/* All records that wait are written. */
static inline void rig_settle(struct rig *r)
{
    for (int i = 0; i < 3; i++) {
        r->now += 10000;
        fk_ssd_tick(r->ssd, r->now);
        rig_drain(r);
    }
}

static inline struct fk_key key_of(uint64_t n)
{
    uint64_t seed = n + 1, lo = fk_rng_next(&seed);

    return (struct fk_key){ .lo = lo, .hi = n + 1 };
}

static inline char *buf_of(struct rig *r, uint32_t slot)
{
    return r->mem + slot * r->slot_bytes;
}

static inline void fill_block(struct rig *r, char *buf, uint64_t n)
{
    uint64_t seed = n * 7 + 3;

    for (uint64_t i = 0; i < r->params.block_bytes; i += 8) {
        uint64_t word = fk_rng_next(&seed);

        memcpy(buf + i, &word, fk_min((uint64_t)8, r->params.block_bytes - i));
    }
}

static inline bool is_block(struct rig *r, const char *buf, uint64_t n)
{
    uint64_t seed = n * 7 + 3;

    for (uint64_t i = 0; i < r->params.block_bytes; i += 8) {
        uint64_t word = fk_rng_next(&seed);

        if (memcmp(buf + i, &word, fk_min((uint64_t)8, r->params.block_bytes - i)) != 0)
            return false;
    }
    return true;
}

/* Block n goes to slot; the parent is block n - 1. */
static inline struct fk_ssd_req write_req(struct rig *r, uint32_t slot, uint64_t n)
{
    fill_block(r, buf_of(r, slot), n);
    return (struct fk_ssd_req){
        .op = FK_IO_WRITE, .slot = slot, .buf = buf_of(r, slot), .key = key_of(n),
        .parent = n ? key_of(n - 1) : (struct fk_key){ 0, 0 }, .tag = (uint32_t)n ^ 0x55,
        .id = r->next_id++,
    };
}

static inline struct fk_ssd_req read_req(struct rig *r, uint32_t slot, uint64_t n)
{
    memset(buf_of(r, slot), 0xa5, r->slot_bytes);
    return (struct fk_ssd_req){
        .op = FK_IO_READ, .slot = slot, .buf = buf_of(r, slot), .key = key_of(n),
        .id = r->next_id++,
    };
}

static inline void rig_submit(struct rig *r, const struct fk_ssd_req *reqs, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++)
        r->status[reqs[i].id % MAX_IDS] = 1;
    fk_ssd_submit(r->ssd, reqs, n, r->now);
}

static inline int32_t rig_put(struct rig *r, uint32_t slot, uint64_t n)
{
    struct fk_ssd_req req = write_req(r, slot, n);

    rig_submit(r, &req, 1);
    rig_drain(r);
    return r->status[req.id % MAX_IDS];
}

/* A read that says 0 must have brought the bytes. */
static inline int32_t rig_get(struct rig *r, uint32_t slot, uint64_t n)
{
    struct fk_ssd_req req = read_req(r, slot, n);

    rig_submit(r, &req, 1);
    rig_drain(r);
    if (r->status[req.id % MAX_IDS] == 0)
        assert_true(is_block(r, buf_of(r, slot), n));
    return r->status[req.id % MAX_IDS];
}

static inline void note_found(void *arg, const struct fk_ssd_found *f)
{
    struct rig *r = arg;

    assert_true(f->slot < r->params.n_slots);
    assert_true(r->n_found == 0 || r->found[r->n_found - 1].slot < f->slot);
    r->found[r->n_found++] = *f;
}

static inline uint32_t rig_recover(struct rig *r)
{
    r->n_found = 0;
    assert_int_equal(fk_ssd_recover(r->ssd, note_found, r), 0);
    return r->n_found;
}

static inline void rig_reopen(struct rig *r)
{
    fk_ssd_close(r->ssd);
    r->ssd = NULL;
    rig_open(r);
}

/* --- files behind the store's back --- */

static inline void file_path(struct rig *r, uint32_t dir, const char *ext, char *path, size_t n)
{
    snprintf(path, n, "%s/%s.%s", r->dirs[dir], r->params.name, ext);
}

static inline void poke(struct rig *r, uint32_t dir, const char *ext, uint64_t offset,
                        const void *bytes, size_t n)
{
    char path[200];

    file_path(r, dir, ext, path, sizeof(path));
    int fd = open(path, O_WRONLY);
    assert_true(fd >= 0);
    assert_int_equal(pwrite(fd, bytes, n, (off_t)offset), n);
    close(fd);
}

static inline void peek(struct rig *r, uint32_t dir, const char *ext, uint64_t offset,
                        void *bytes, size_t n)
{
    char path[200];

    file_path(r, dir, ext, path, sizeof(path));
    int fd = open(path, O_RDONLY);
    assert_true(fd >= 0);
    assert_int_equal(pread(fd, bytes, n, (off_t)offset), n);
    close(fd);
}

static inline int rig_group_setup(void **state)
{
    const char *tmp = getenv("TMPDIR");

    fk_log_set_level(FK_LOG_OFF);
    snprintf(base_dir, sizeof(base_dir), "%.40s/fk_ssd_XXXXXX", tmp ? tmp : "/tmp");
    return mkdtemp(base_dir) ? 0 : -1;
}

static inline int rig_group_teardown(void **state)
{
    char command[128];

    snprintf(command, sizeof(command), "rm -rf '%s'", base_dir);
    return system(command);
}

#endif
