/*
 * bench_ssd.c - the SSD tier against the device: fk_ssd over the uring engine, checksums and
 * table included, and a bare io_uring loop without any cache logic, on the same file, with the
 * same depth, sizes, order, O_DIRECT, registered file and registered memory. Short runs in
 * alternation, whichever goes first drawn by lot, because the device's speed drifts.
 *
 * Both go round a pool of many buffers, as a cache does: with as many buffers as I/Os in flight
 * the bare loop, which never looks at the bytes, keeps them in the cache of whoever fills
 * them, and one measures that cache instead (seen here: a quarter).
 */
#include <fcntl.h>
#include <liburing.h>
#include <stdio.h>

#include "base/clock.h"
#include "base/log.h"
#include "base/util.h"
#include "bench.h"
#include "tier/ssd.h"
#include "tier/ssd_format.h"

#define DEPTH 32u                       /* at the device, for both */
#define REQUESTS (2 * DEPTH)            /* of ours: what exceeds the depth waits in the engine */
#define FILE_BYTES (1ull << 30)
#define REAP 8                          /* few at a time: each reap refills the device's queue */
#define POOL_BYTES (256ull << 20)
#define PAIRS 15
#define RUN_US 300000
#define MIN_OPS 64u
#define NAME "bench-ssd"

struct rig {
    const char *dir;
    uint64_t block_bytes;
    uint32_t n_slots;
    char *mem;                          /* the pool */
    uint32_t n_buffers;
    uint32_t *ring_of_free;             /* buffers; the one free for longest comes next */
    uint32_t free_head, free_tail;
    uint32_t *order;                    /* a permutation of the slots */
    struct fk_engine *engine;
    struct fk_ssd *ssd;
    int fd;
    struct io_uring ring;
};

static struct fk_key key_of(uint32_t slot)
{
    return (struct fk_key){ .lo = slot * 0x9e3779b97f4a7c15ull + 1, .hi = slot };
}

static uint32_t take_buffer(struct rig *r)
{
    return r->ring_of_free[r->free_head++ % r->n_buffers];
}

static void free_buffer(struct rig *r, uint32_t buffer)
{
    r->ring_of_free[r->free_tail++ % r->n_buffers] = buffer;
}

/* --- ours --- */

static void ours_submit(struct rig *r, enum fk_io_op op, uint32_t place, uint32_t n)
{
    struct fk_ssd_req reqs[REQUESTS];

    for (uint32_t i = 0; i < n; i++) {
        uint32_t slot = r->order[(place + i) % r->n_slots], buffer = take_buffer(r);

        reqs[i] = (struct fk_ssd_req){
            .op = op, .slot = slot, .key = key_of(slot), .id = buffer,
            .buf = r->mem + buffer * r->block_bytes,
        };
    }
    fk_ssd_submit(r->ssd, reqs, n, fk_clock_us());
}

/* Does ops I/Os from the order's place `first` on; returns bytes per second, or < 0. */
static double ours(struct rig *r, enum fk_io_op op, uint32_t first, uint32_t ops)
{
    uint32_t sent = fk_min(ops, REQUESTS), ended = 0;
    struct fk_ssd_done done[REQUESTS];
    struct fk_io *ios[REAP];
    uint64_t start = fk_clock_us();

    ours_submit(r, op, first, sent);
    while (ended < ops) {
        int got = r->engine->ops->reap(r->engine, ios, REAP, 1000000);

        for (int i = 0; i < got; i++)
            fk_ssd_io_done(ios[i], fk_clock_us());
        uint32_t m = fk_ssd_take_done(r->ssd, done, REQUESTS), n = fk_min(m, ops - sent);
        for (uint32_t i = 0; i < m; i++) {
            if (done[i].status < 0)
                return done[i].status;
            free_buffer(r, (uint32_t)done[i].id);
        }
        ended += m;
        if (n > 0)
            ours_submit(r, op, first + sent, n);
        sent += n;
        fk_ssd_tick(r->ssd, fk_clock_us());
    }
    return (double)ops * (double)r->block_bytes / (double)(fk_clock_us() - start) * 1e6;
}

/* --- the bare loop --- */

static void bare_prepare(struct rig *r, enum fk_io_op op, uint32_t place)
{
    struct io_uring_sqe *sqe = io_uring_get_sqe(&r->ring);
    uint32_t slot = r->order[place % r->n_slots], buffer = take_buffer(r);
    uint64_t offset = SSD_DATA_START + slot * r->block_bytes;
    char *buf = r->mem + buffer * r->block_bytes;

    if (op == FK_IO_READ)
        io_uring_prep_read_fixed(sqe, 0, buf, (unsigned)r->block_bytes, offset, 0);
    else
        io_uring_prep_write_fixed(sqe, 0, buf, (unsigned)r->block_bytes, offset, 0);
    sqe->flags |= IOSQE_FIXED_FILE;
    sqe->user_data = buffer;
}

static double bare(struct rig *r, enum fk_io_op op, uint32_t first, uint32_t ops)
{
    uint32_t sent = 0, ended = 0;
    struct io_uring_cqe *cqes[DEPTH];
    uint64_t start = fk_clock_us();

    for (; sent < fk_min(ops, DEPTH); sent++)
        bare_prepare(r, op, first + sent);
    while (ended < ops) {
        int rc = io_uring_submit_and_wait(&r->ring, 1);

        if (rc < 0 && rc != -EINTR)
            return rc;
        unsigned got = io_uring_peek_batch_cqe(&r->ring, cqes, DEPTH);
        for (unsigned i = 0; i < got; i++) {
            free_buffer(r, (uint32_t)cqes[i]->user_data);
            if (cqes[i]->res != (int)r->block_bytes)
                return -EIO;
            if (sent < ops)
                bare_prepare(r, op, first + sent++);
        }
        io_uring_cq_advance(&r->ring, got);
        ended += got;
    }
    return (double)ops * (double)r->block_bytes / (double)(fk_clock_us() - start) * 1e6;
}

/* --- the rig --- */

static int bare_open(struct rig *r)
{
    struct iovec iov = { .iov_base = r->mem, .iov_len = POOL_BYTES };
    fk_autofree char *path = NULL;

    if (asprintf(&path, "%s/" NAME ".data", r->dir) < 0)
        return -ENOMEM;
    r->fd = open(path, O_RDWR | O_DIRECT | O_CLOEXEC);
    if (r->fd < 0)
        return -errno;
    int rc = io_uring_queue_init(DEPTH, &r->ring,
                                 IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN);
    if (rc == -EINVAL)
        rc = io_uring_queue_init(DEPTH, &r->ring, 0);
    if (rc < 0) {
        close(r->fd);
        r->fd = -1;
        return rc;
    }
    rc = io_uring_register_files(&r->ring, &r->fd, 1);
    return rc < 0 ? rc : io_uring_register_buffers(&r->ring, &iov, 1);
}

static int ours_open(struct rig *r)
{
    const char *dirs[] = { r->dir };
    struct fk_engine_params ep = { .depth = DEPTH };
    struct fk_ssd_params params = {
        .name = NAME, .dirs = dirs, .n_dirs = 1, .block_bytes = r->block_bytes,
        .n_slots = r->n_slots, .fingerprint = "bench", .recreate = true, .direct = true,
        .io_chunk_bytes = 4u << 20, .device_errors = 8, .device_retry_us = 1000000,
    };
    char error[512];
    int rc = fk_engine_uring_create(&ep, &r->engine);

    if (rc < 0)
        return rc;
    r->engine->ops->register_memory(r->engine, r->mem, POOL_BYTES);
    params.engine = r->engine;
    rc = fk_ssd_open(&params, &r->ssd, error, sizeof(error));
    if (rc < 0)
        fk_error("%s", error);
    return rc;
}

static void rig_close(struct rig *r)
{
    static const char *const files[] = { NAME ".data", NAME ".table", "flexkv.lock" };

    if (r->fd >= 0) {
        io_uring_queue_exit(&r->ring);
        close(r->fd);
    }
    fk_ssd_close(r->ssd);
    if (r->engine)
        r->engine->ops->destroy(r->engine);
    for (size_t i = 0; i < fk_array_size(files); i++) {
        fk_autofree char *path = NULL;

        if (asprintf(&path, "%s/%s", r->dir, files[i]) >= 0)
            unlink(path);
    }
    free(r->mem);
    free(r->order);
    free(r->ring_of_free);
}

static int rig_open(struct rig *r, const char *dir, uint64_t block_bytes)
{
    uint64_t rng = 42;

    *r = (struct rig){ .dir = dir, .block_bytes = block_bytes, .fd = -1,
                       .n_slots = (uint32_t)(FILE_BYTES / block_bytes),
                       .n_buffers = (uint32_t)(POOL_BYTES / block_bytes) };
    r->mem = aligned_alloc(2 * FK_MIB, POOL_BYTES);
    r->order = malloc(r->n_slots * sizeof(*r->order));
    r->ring_of_free = malloc(r->n_buffers * sizeof(*r->ring_of_free));
    if (!r->mem || !r->order || !r->ring_of_free)
        return -ENOMEM;
    for (uint32_t i = 0; i < r->n_buffers; i++)
        free_buffer(r, i);
    for (uint64_t i = 0; i < POOL_BYTES / 8; i++)
        ((uint64_t *)r->mem)[i] = fk_rng_next(&rng);
    for (uint32_t i = 0; i < r->n_slots; i++) {
        uint32_t j = fk_rng_below(&rng, i + 1);

        r->order[i] = r->order[j];
        r->order[j] = i;
    }
    int rc = ours_open(r);
    if (rc == 0)
        rc = bare_open(r);
    if (rc == 0 && ours(r, FK_IO_WRITE, 0, r->n_slots) < 0)
        rc = -EIO;
    return rc;
}

/* --- measuring --- */

static int measure(struct rig *r, enum fk_io_op op, const char *name, struct bench_result *out)
{
    double a[PAIRS], b[PAIRS];
    uint64_t rng = 7;
    uint32_t first = 0;
    double speed = bare(r, op, 0, fk_min(r->n_slots, 256u));

    for (int i = 0; i < PAIRS && speed > 0; i++) {
        uint64_t want = (uint64_t)(speed * RUN_US / 1e6 / (double)r->block_bytes);
        uint32_t ops = (uint32_t)fk_min(fk_max(want, (uint64_t)MIN_OPS), (uint64_t)r->n_slots);
        bool we_first = fk_rng_below(&rng, 2);

        for (int k = 0; k < 2 && speed > 0; k++) {
            bool we = we_first == (k == 0);

            speed = we ? ours(r, op, first, ops) : bare(r, op, first, ops);
            *(we ? &a[i] : &b[i]) = speed / 1e6;
        }
        first = (first + ops) % r->n_slots;
    }
    if (speed <= 0)
        return (int)speed;
    *out = bench_summary(name, "MB/s", a, b, PAIRS);
    return 0;
}

/* Reads first: the bare writes leave blocks that no longer match their checksums. */
int bench_ssd(const char *parent, struct bench_result *out, int max)
{
    static const struct { const char *read, *write; uint64_t bytes; } sizes[] = {
        { "ssd_read_64k", "ssd_write_64k", 64 * 1024 },
        { "ssd_read_1m", "ssd_write_1m", 1024 * 1024 },
    };
    fk_autofree char *dir = NULL;
    int n = 0, rc = 0;

    if (asprintf(&dir, "%s/flexkv-bench-XXXXXX", parent) < 0)
        return -ENOMEM;
    if (!mkdtemp(dir))
        return -errno;
    for (size_t i = 0; i < fk_array_size(sizes) && rc == 0 && n + 2 <= max; i++) {
        struct rig r;

        rc = rig_open(&r, dir, sizes[i].bytes);
        if (rc == 0)
            rc = measure(&r, FK_IO_READ, sizes[i].read, &out[n]);
        if (rc == 0)
            rc = measure(&r, FK_IO_WRITE, sizes[i].write, &out[n + 1]);
        rig_close(&r);
        n += 2;
    }
    rmdir(dir);
    return rc < 0 ? rc : n;
}
