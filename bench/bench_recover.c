/*
 * bench_recover.c - how long a store of a million slots takes to be there again after a restart,
 * its table in the page cache: reading and checking the records, and filling the index. The
 * limit is reading the table files' bytes once.
 */
#include <fcntl.h>
#include <stdio.h>
#include <sys/stat.h>

#include "base/clock.h"
#include "base/util.h"
#include "bench.h"
#include "node/core.h"
#include "tier/ssd.h"

#define SLOTS 1000000u
#define CHAIN 500u
#define BATCH 500u
#define RUNS 5

struct list { struct fk_core_found *found; uint32_t n; };

static struct fk_ssd_params store_params(const char *const *dir, struct fk_engine *engine)
{
    return (struct fk_ssd_params){
        .name = "bench-recover", .dirs = dir, .n_dirs = 1, .block_bytes = FK_SSD_ALIGN,
        .n_slots = SLOTS, .fingerprint = "bench", .recreate = true, .direct = true,
        .io_chunk_bytes = 4u << 20, .device_errors = 8, .device_retry_us = 1000000,
        .engine = engine,
    };
}

static struct fk_key key_of(uint32_t slot)
{
    uint64_t s = slot + 1;

    return (struct fk_key){ fk_rng_next(&s), fk_rng_next(&s) };
}

static void pump(struct fk_ssd *ssd, struct fk_engine *engine, unsigned until)
{
    struct fk_io *io[64];
    struct fk_ssd_done done[64];

    fk_ssd_tick(ssd, fk_clock_us());
    while (fk_ssd_inflight(ssd) > until) {
        int n = engine->ops->reap(engine, io, 64, 100000);
        for (int i = 0; i < n; i++)
            fk_ssd_io_done(io[i], fk_clock_us());
        fk_ssd_tick(ssd, fk_clock_us());
        while (fk_ssd_take_done(ssd, done, 64))
            ;
    }
}

static int fill_store(const char *const *dir, struct fk_engine *engine)
{
    struct fk_ssd_params params = store_params(dir, engine);
    struct fk_ssd_req req[BATCH];
    struct fk_ssd *ssd;
    char error[300];
    void *buf;
    int rc = fk_ssd_open(&params, &ssd, error, sizeof(error));

    if (rc) {
        fprintf(stderr, "%s\n", error);
        return rc;
    }
    if (posix_memalign(&buf, FK_SSD_ALIGN, (size_t)BATCH * FK_SSD_ALIGN))
        return -ENOMEM;
    memset(buf, 5, (size_t)BATCH * FK_SSD_ALIGN);
    for (uint32_t slot = 0; slot < SLOTS; slot += BATCH) {
        for (uint32_t i = 0; i < BATCH; i++) {
            uint32_t s = slot + i;
            req[i] = (struct fk_ssd_req){ .op = FK_IO_WRITE, .slot = s, .key = key_of(s), .id = s,
                                          .buf = (char *)buf + (size_t)i * FK_SSD_ALIGN };
            if (s % CHAIN)
                req[i].parent = key_of(s - 1);
        }
        fk_ssd_submit(ssd, req, BATCH, fk_clock_us());
        pump(ssd, engine, 2 * BATCH);
    }
    pump(ssd, engine, 0);
    fk_ssd_close(ssd);
    free(buf);
    return 0;
}

static void remember(void *arg, const struct fk_ssd_found *f)
{
    struct list *l = arg;

    l->found[l->n++] = (struct fk_core_found){ f->key, f->parent, f->seq, f->slot, f->tag };
}

static double recover_ms(const char *const *dir, struct fk_engine *engine, struct list *l)
{
    struct fk_core_params cp = { .max_spaces = 1, .evict_start_threshold = 1, .seed = 1 };
    struct fk_core_space_params sp = { .cpu_slots = 1000, .ssd_slots = SLOTS,
                                       .ssd_dirs = 1 };
    struct fk_ssd_params params = store_params(dir, engine);
    struct fk_core *core;
    struct fk_ssd *ssd;
    uint32_t space;
    char error[300];

    l->n = 0;
    params.recreate = false;
    if (fk_core_create(&cp, &core))
        return -1;
    uint64_t start = fk_clock_ns();
    if (fk_core_space_add(core, &sp, &space) || fk_ssd_open(&params, &ssd, error, sizeof(error)) ||
        fk_ssd_recover(ssd, remember, l) ||
        fk_core_recover(core, space, l->found, l->n) != SLOTS)
        return -1;
    double ms = (double)(fk_clock_ns() - start) / 1e6;
    fk_ssd_close(ssd);
    fk_core_destroy(core);
    return ms;
}

static double read_ms(const char *dir)
{
    fk_autofree char *path = NULL, *buf = malloc(1 << 20);
    uint64_t start = fk_clock_ns();
    ssize_t n;

    if (!buf || asprintf(&path, "%s/bench-recover.table", dir) < 0)
        return -1;
    fk_autoclose int fd = open(path, O_RDONLY | O_CLOEXEC);
    while (fd >= 0 && (n = read(fd, buf, 1 << 20)) > 0)
        ;
    return (double)(fk_clock_ns() - start) / 1e6;
}

static void remove_store(const char *dir)
{
    static const char *const names[] = { "bench-recover.data", "bench-recover.table", "flexkv.lock" };

    for (size_t i = 0; i < fk_array_size(names); i++) {
        fk_autofree char *path = NULL;
        if (asprintf(&path, "%s/%s", dir, names[i]) > 0)
            unlink(path);
    }
    rmdir(dir);
}

int bench_recover(const char *parent, struct bench_result *out, int max)
{
    fk_autofree char *dir = NULL;
    static double ours[RUNS], limit[RUNS];
    struct fk_engine_params ep = { .depth = 64 };
    struct fk_engine *engine;
    struct list l = { .found = calloc(SLOTS, sizeof(*l.found)) };

    if (max < 1 || !l.found || asprintf(&dir, "%s/flexkv-bench-XXXXXX", parent) < 0 || !mkdtemp(dir))
        return -errno;
    const char *dirs[] = { dir };
    int rc = fk_engine_create(&ep, &engine);
    if (!rc)
        rc = fill_store(dirs, engine);
    for (int i = 0; !rc && i < RUNS; i++) {
        ours[i] = recover_ms(dirs, engine, &l);
        limit[i] = read_ms(dir);
        rc = ours[i] < 0 ? -EIO : 0;
    }
    if (engine)
        engine->ops->destroy(engine);
    remove_store(dir);
    free(l.found);
    if (rc)
        return rc;
    out[0] = bench_summary("recover_1m_slots", "ms", ours, limit, RUNS);
    return 1;
}
