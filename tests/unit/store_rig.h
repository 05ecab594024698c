/*
 * store_rig.h - what the tests of the shared store have in common: a store in a directory of its own, blocks whose
 * bytes follow from their number, a backend that fails or hangs when told, file systems to be mounted. One thread.
 */
#ifndef FK_TESTS_STORE_RIG_H
#define FK_TESTS_STORE_RIG_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include <cmocka.h>

#include <fcntl.h>
#include <ftw.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/file.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/wait.h>

#include "base/clock.h"
#include "base/log.h"
#include "base/util.h"
#include "store/backend.h"
#include "store/format.h"
#include "store/prints.h"
#include "store/store.h"

#define BLOCK 20000u
#define WAIT_US 20000000u

struct rig {
    struct fk_store *store;
    uint32_t space;
    char dir[80], error[1500];
    unsigned char note[FK_STORE_NOTE_MAX];
    unsigned char *buf;                 /* one block, and eight for requests that are left to themselves */
    uint64_t user;
};

/* Waits for what must come. */
#define wait_until(condition) do { \
        uint64_t until_ = fk_clock_us() + WAIT_US; \
        while (!(condition) && fk_clock_us() < until_) \
            usleep(2000); \
        assert_true(condition); \
    } while (0)

/* ---- a backend in between ---- */

static struct {
    _Atomic int get_rc, put_rc, probe_rc, write_probe_rc;
    _Atomic bool hang, hang_open, closed;
} fault;

static void hang_while(_Atomic bool *flag)
{
    while (atomic_load(flag))
        usleep(1000);
}

static inline int faulty_open(const struct fk_store_params *p, void **store, char *error, size_t n)
{
    hang_while(&fault.hang_open);
    return fk_store_dir.open(p, store, error, n);
}

static inline void faulty_close(void *store)
{
    fk_store_dir.close(store);
    atomic_store(&fault.closed, true);
}

static inline int faulty_space(void *store, const struct fk_store_space *s, void **space, char *error, size_t n)
{
    return fk_store_dir.space(store, s, space, error, n);
}

static inline int faulty_get(void *space, struct fk_key key, void *buf, struct fk_store_note *note)
{
    hang_while(&fault.hang);
    int rc = atomic_load(&fault.get_rc);
    return rc ? rc : fk_store_dir.get(space, key, buf, note);
}

static inline int faulty_put(void *space, struct fk_key key, struct fk_key parent, const void *buf,
                             const struct fk_store_note *note, const struct fk_store_sure *sure)
{
    hang_while(&fault.hang);
    int rc = atomic_load(&fault.put_rc);
    return rc ? rc : fk_store_dir.put(space, key, parent, buf, note, sure);
}

static inline int faulty_probe(void *space, bool write)
{
    int rc = atomic_load(write ? &fault.write_probe_rc : &fault.probe_rc);
    return rc ? rc : fk_store_dir.probe(space, write);
}

static inline int faulty_reset(void *s) { return fk_store_dir.reset(s); }
static inline uint64_t faulty_file_bytes(void *s) { return fk_store_dir.file_bytes(s); }
static inline int faulty_other(void *s, uint64_t *b) { return fk_store_dir.other_bytes(s, b); }
static inline uint64_t faulty_tidy(void *s) { return fk_store_dir.tidy(s); }
static inline int faulty_list(void *s, uint32_t part, struct fk_store_part *state, void (*found)(void *, struct fk_key),
                              void *arg)
{
    return fk_store_dir.list(s, part, state, found, arg);
}
static inline int faulty_evict(void *s, uint64_t b, const bool *stop,
                               void (*removed)(void *, void *, struct fk_key, uint64_t), void *arg)
{
    return fk_store_dir.evict(s, b, stop, removed, arg);
}

static const struct fk_store_backend faulty = {
    .name = "faulty", .setting = "remote_cache_dir", .open = faulty_open, .close = faulty_close, .space = faulty_space, .get = faulty_get,
    .put = faulty_put, .probe = faulty_probe, .reset = faulty_reset, .list = faulty_list,
    .file_bytes = faulty_file_bytes, .other_bytes = faulty_other, .evict = faulty_evict, .tidy = faulty_tidy,
};

static inline bool never_sure(void *arg, uint64_t user) { return false; }

/* ---- directories ---- */

static int remove_one(const char *path, const struct stat *st, int kind, struct FTW *ftw)
{
    return remove(path);
}

static char seen_prefix[16];
static int seen;

static int count_one_file(const char *path, const struct stat *st, int kind, struct FTW *ftw)
{
    seen += kind == FTW_F && strncmp(path + ftw->base, seen_prefix, strlen(seen_prefix)) == 0;
    return 0;
}

static inline int files_named(const char *dir, const char *prefix)
{
    snprintf(seen_prefix, sizeof(seen_prefix), "%s", prefix);
    seen = 0;
    assert_int_equal(nftw(dir, count_one_file, 8, FTW_PHYS), 0);
    return seen;
}

static inline int files_in(const char *dir)
{
    return files_named(dir, "");
}

static inline void rig_dir(struct rig *r)
{
    const char *tmp = getenv("TMPDIR");

    memset(r, 0, sizeof(*r));
    snprintf(r->dir, sizeof(r->dir), "%.50s/flexkv-store-XXXXXX", tmp ? tmp : "/tmp");
    assert_non_null(mkdtemp(r->dir));
}

static inline void rig_remove(struct rig *r)
{
    nftw(r->dir, remove_one, 8, FTW_DEPTH | FTW_PHYS);
}

/* False: it may not be mounted here. */
static inline bool rig_mount(struct rig *r, const char *type, const char *options)
{
    rig_dir(r);
    if (mount("none", r->dir, type, 0, options) == 0)
        return true;
    print_message("%s can't be mounted here: %s\n", type, strerror(errno));
    rig_remove(r);
    return false;
}

static inline void rig_unmount(struct rig *r)
{
    umount2(r->dir, MNT_DETACH);
    rig_remove(r);
}

/* Over the directory, a mount whose requests nobody answers; its descriptor, or < 0. */
static inline int mount_dead_fuse(const char *dir)
{
    char options[80];
    int fd = open("/dev/fuse", O_RDWR | O_CLOEXEC);

    if (fd < 0)
        return -1;
    snprintf(options, sizeof(options), "fd=%d,rootmode=40000,user_id=%u,group_id=%u", fd, getuid(), getgid());
    if (mount("dead", dir, "fuse", MS_NODEV | MS_NOSUID, options) == 0)
        return fd;
    print_message("FUSE can't be mounted here: %s\n", strerror(errno));
    close(fd);
    return -1;
}

/* ---- stores ---- */

static inline int rig_prepare(struct rig *r, const char *dir, const struct fk_store_params *p)
{
    struct fk_store_params q = p ? *p : (struct fk_store_params){ 0 };
    char path[80];

    snprintf(path, sizeof(path), "%s", dir);
    memset(r, 0, sizeof(*r));
    snprintf(r->dir, sizeof(r->dir), "%s", path);
    q.path = r->dir;
    q.scan_us = q.scan_us ? q.scan_us : 1000000000;     /* when asked */
    int rc = fk_store_open(&q, &r->store, r->error, sizeof(r->error));
    if (!rc) {
        r->buf = malloc(9 * BLOCK);
        memset(r->buf, 0, 9 * BLOCK);
    }
    return rc;
}

static inline int rig_try(struct rig *r, const char *dir, const struct fk_store_params *p)
{
    struct fk_store_space d = { .name = "test", .fingerprint = { 1 }, .block_bytes = BLOCK };
    int rc = rig_prepare(r, dir, p);

    if (rc)
        return rc;
    rc = fk_store_space(r->store, &d, &r->space, r->error, sizeof(r->error));
    if (rc) {
        fk_store_close(r->store);
        free(r->buf);
    }
    return rc;
}

static inline void rig_open_at(struct rig *r, const char *dir, const struct fk_store_params *p)
{
    if (rig_try(r, dir, p))
        fail_msg("%s", r->error);
}

static inline void rig_scan(struct rig *r)
{
    assert_int_equal(fk_store_scan(r->store, WAIT_US), 0);
}

static inline void rig_open(struct rig *r, const struct fk_store_params *p)
{
    memset(&fault, 0, sizeof(fault));
    rig_dir(r);
    rig_open_at(r, r->dir, p);
    rig_scan(r);                        /* the first one, which nobody asked for, is over */
}

static inline void rig_close(struct rig *r)
{
    assert_true(fk_store_close(r->store));
    free(r->buf);
    r->store = NULL;
}

static inline struct fk_store_stats stats_of_store(const struct rig *r)
{
    struct fk_store_stats st;

    fk_store_get_stats(r->store, &st);
    return st;
}

/* ---- blocks ---- */

static inline uint64_t hi_of(uint64_t i) { return fk_rng_next(&(uint64_t){ i * 3 + 1 }); }

static inline struct fk_key key_of(uint64_t i)
{
    return (struct fk_key){ i + 1, hi_of(i) };
}

static inline void fill_block(unsigned char *buf, uint64_t i)
{
    for (uint32_t k = 0; k < BLOCK / 8; k++)
        ((uint64_t *)(void *)buf)[k] = i * 0x9e3779b97f4a7c15ull + k;
}

static inline bool holds_block(const unsigned char *buf, uint64_t i)
{
    for (uint32_t k = 0; k < BLOCK / 8; k++)
        if (((const uint64_t *)(const void *)buf)[k] != i * 0x9e3779b97f4a7c15ull + k)
            return false;
    return true;
}

static inline const char *space_dir(const struct rig *r)
{
    return "01000000000000000000000000000000";
}

static inline void block_path(const struct rig *r, uint64_t i, char out[300])
{
    char name[STORE_KEY_CHARS + 1];

    store_key_text(key_of(i), name);
    snprintf(out, 300, "%s/%s/data/%.2s/%s", r->dir, space_dir(r), name, name);
}

static inline void unlink_block(const struct rig *r, uint64_t i)
{
    char path[300];

    block_path(r, i, path);
    assert_int_equal(unlink(path), 0);
}

static inline void age_block(const struct rig *r, uint64_t i, long seconds)
{
    struct timespec now, t[2];
    char path[300];

    block_path(r, i, path);
    clock_gettime(CLOCK_REALTIME, &now);
    now.tv_sec -= seconds;
    t[0] = t[1] = now;
    assert_int_equal(utimensat(AT_FDCWD, path, t, 0), 0);
}

static inline int submit(struct rig *r, enum fk_store_op op, uint64_t i, void *buf, uint64_t timeout_us)
{
    uint64_t now = fk_clock_us();
    struct fk_store_req q = { .op = op, .space = r->space, .key = key_of(i), .buf = buf, .user = ++r->user,
                              .note = buf == r->buf ? r->note : NULL, .note_bytes = op == FK_STORE_WRITE ? (uint32_t)(i * 37 % 4000) : 0 };

    q.note_bytes = q.note ? fk_min(q.note_bytes, FK_STORE_NOTE_MAX) : 0;
    for (uint32_t k = 0; k < q.note_bytes; k++)
        r->note[k] = (unsigned char)(i + k * 7);

    return fk_store_submit(r->store, &q, 1, now + timeout_us, now);
}

static inline int submit_read(struct rig *r, uint64_t i, uint64_t timeout_us)
{
    return submit(r, FK_STORE_READ, i, r->buf + (1 + r->user % 8) * BLOCK, timeout_us);
}

static inline int submit_write(struct rig *r, uint64_t i)
{
    return submit(r, FK_STORE_WRITE, i, r->buf, 10000000);
}

static inline int one_request(struct rig *r, enum fk_store_op op, uint64_t i)
{
    struct fk_store_done d;
    int rc = submit(r, op, i, r->buf, WAIT_US);

    if (rc)
        return rc;
    uint64_t until = fk_clock_us() + 2 * WAIT_US;
    while (!fk_store_take(r->store, &d, 1, fk_clock_us()) && fk_clock_us() < until)
        usleep(50);
    assert_int_equal(d.user, r->user);
    assert_int_equal(d.flags, 0);
    if (op == FK_STORE_READ && !d.status) {
        assert_int_equal(d.note_bytes, fk_min(i * 37 % 4000, (uint64_t)FK_STORE_NOTE_MAX));
        for (uint32_t k = 0; k < d.note_bytes; k++)
            assert_int_equal(r->note[k], (unsigned char)(i + k * 7));
    }
    return d.status;
}

static inline int write_block(struct rig *r, uint64_t i)
{
    fill_block(r->buf, i);
    return one_request(r, FK_STORE_WRITE, i);
}

/* What comes back must be the block. */
static inline int read_block(struct rig *r, uint64_t i)
{
    memset(r->buf, 0x5a, BLOCK);
    int rc = one_request(r, FK_STORE_READ, i);
    if (!rc && !holds_block(r->buf, i))
        fail_msg("wrong bytes of block %llu", (unsigned long long)i);
    return rc;
}

static inline bool knows(const struct rig *r, uint64_t i)
{
    struct fk_key k = key_of(i);

    return fk_store_has(r->store, r->space, &k, 1) == 1;
}

#endif
