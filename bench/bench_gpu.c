/*
 * bench_gpu.c - the cuda copier against one large pinned copy of the same bytes, in the same run:
 * random pages, random slots. Needs a GPU; the rows are missing where there is none.
 */
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/resource.h>

#include "base/clock.h"
#include "base/util.h"
#include "bench.h"
#include "copy/cuda/cuda.h"

#define RUNS 7
#define MAX_BYTES (1024 * FK_MIB)       /* pool and pages: twice the largest job */

struct gpu {
    const struct fk_cuda *cu;
    cu_context context;
    cu_ptr pages, flat;                 /* flat: the limit's device side */
    char *pool, *pinned;
    cu_stream stream[2];
};

struct shape { uint64_t piece, slot, job; };

struct bench_job {
    struct fk_copier *copier;
    flexkv_region *regions;
    uint32_t n, n_regions, *slots, *pages;
};

/* ---- set up ---- */

static int open_gpu(struct gpu *g)
{
    g->cu = fk_cuda_driver(true);
    if (!g->cu || g->cu->DevicePrimaryCtxRetain(&g->context, 0) || g->cu->CtxSetCurrent(g->context))
        return -ENODEV;
    g->pool = mmap(NULL, MAX_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (g->pool == MAP_FAILED || g->cu->MemAlloc(&g->pages, MAX_BYTES) ||
        g->cu->MemAlloc(&g->flat, MAX_BYTES / 2) ||
        g->cu->MemHostAlloc((void **)&g->pinned, MAX_BYTES / 2, 0))
        return -ENOMEM;
    for (int i = 0; i < 2; i++)
        if (g->cu->StreamCreateWithPriority(&g->stream[i], CU_STREAM_NON_BLOCKING_FLAG, 0))
            return -EIO;
    memset(g->pinned, 1, MAX_BYTES / 2);
    return 0;
}

static int open_job(const struct gpu *g, const struct shape *s, struct bench_job *j)
{
    uint32_t all = (uint32_t)(MAX_BYTES / s->slot);
    char why[200];

    *j = (struct bench_job){ .n = (uint32_t)(s->job / s->slot), .n_regions = (uint32_t)(s->slot / s->piece) };
    j->regions = calloc(j->n_regions, sizeof(*j->regions));
    j->slots = malloc(2ull * all * sizeof(*j->slots));
    j->pages = j->slots + all;
    for (uint32_t r = 0; r < j->n_regions; r++)
        j->regions[r] = (flexkv_region){ .base = (char *)(uintptr_t)g->pages + r * (MAX_BYTES / j->n_regions),
                                         .stride = s->piece, .page_bytes = s->piece, .pages = all };
    fk_rng_permutation(j->slots, all, &(uint64_t){ 1 });
    fk_rng_permutation(j->pages, all, &(uint64_t){ 2 });
    struct fk_copy_pool pool = { .base = g->pool, .bytes = MAX_BYTES, .slot_bytes = s->slot };
    int rc = fk_copier_create(j->regions, j->n_regions, 1, &j->copier, why, sizeof(why));
    if (!rc)
        rc = fk_copier_attach(j->copier, &pool);
    for (uint64_t at = 0; !rc && at < MAX_BYTES; at += s->slot)     /* all of it pinned */
        if (!fk_pin_ensure(((struct fk_cuda_copier *)j->copier)->pin, g->pool + at, s->slot))
            rc = -ENOMEM;
    return rc;
}

static void close_job(struct bench_job *j)
{
    if (j->copier)
        fk_copier_detach(j->copier);
    fk_copier_destroy(j->copier);
    free(j->regions);
    free(j->slots);
}

/* ---- the two sides ---- */

static double gbs(uint64_t bytes, uint64_t us)
{
    return (double)bytes / 1e3 / (double)fk_max(us, 1ull);
}

/* No finer clock is needed: the shortest job measured takes a millisecond. */
static uint64_t limit_us(const struct gpu *g, uint64_t bytes, bool to, bool from)
{
    uint64_t start = fk_clock_us();

    if (to)
        g->cu->MemcpyHtoDAsync(g->flat, g->pinned, bytes, g->stream[0]);
    if (from)
        g->cu->MemcpyDtoHAsync(g->pinned + (to ? bytes : 0), g->flat + (to ? bytes : 0), bytes, g->stream[1]);
    g->cu->StreamSynchronize(g->stream[0]);
    g->cu->StreamSynchronize(g->stream[1]);
    return fk_clock_us() - start;
}

static uint64_t ours_us(struct bench_job *j, bool to_engine, const struct fk_copy_progress *progress)
{
    _Atomic bool never = false;
    struct fk_copy_blocks b = { .slots = j->slots, .pages = j->pages, .n = j->n, .to_engine = to_engine };
    uint64_t start = fk_clock_us();
    int status;

    return fk_copier_copy(j->copier, &b, progress, &never, &status) == j->n ? fk_clock_us() - start : 0;
}

struct half { struct bench_job *j; bool to_engine; uint64_t us; };

static void *run_half(void *arg)
{
    struct half *h = arg;
    h->us = ours_us(h->j, h->to_engine, NULL);
    return NULL;
}

static uint64_t ours_both_us(struct bench_job *to, struct bench_job *from)
{
    struct half h = { from, false, 0 };
    pthread_t t;
    uint64_t start = fk_clock_us();

    if (pthread_create(&t, NULL, run_half, &h))
        return 0;
    uint64_t us = ours_us(to, true, NULL);
    pthread_join(t, NULL);
    return us && h.us ? fk_clock_us() - start : 0;
}

/* ---- rows ---- */

/* sums: with checksums of the blocks (gpu_checksums). */
static int one_way(const struct gpu *g, const struct shape *s, bool to_engine, bool sums,
                   struct bench_result *out)
{
    double ours[RUNS], limit[RUNS];
    struct bench_job j;
    char name[64];
    int rc = open_job(g, s, &j);
    _Atomic uint64_t *room = sums ? calloc(MAX_BYTES / s->slot, sizeof(*room)) : NULL;

    if (!rc)
        j.copier->pool.sums = (struct fk_copy_sums){ room, 1 };

    for (int i = -1; !rc && i < RUNS; i++) {
        uint64_t l = limit_us(g, s->job, to_engine, !to_engine), o = ours_us(&j, to_engine, NULL);
        if (!o)
            rc = -EIO;
        else if (i >= 0) {
            ours[i] = gbs(s->job, o);
            limit[i] = gbs(s->job, l);
        }
    }
    close_job(&j);
    free((void *)room);
    snprintf(name, sizeof(name), "%s_%lluk_s%lluk_%llum%s", to_engine ? "h2d" : "d2h",
             (unsigned long long)(s->piece >> 10), (unsigned long long)(s->slot >> 10),
             (unsigned long long)(s->job >> 20), sums ? "_sums" : "");
    if (!rc)
        *out = bench_summary(name, "GB/s", ours, limit, RUNS);
    return rc;
}

static int both_ways(const struct gpu *g, const struct shape *s, struct bench_result *out)
{
    double ours[RUNS], limit[RUNS];
    struct bench_job a, b;
    int rc = open_job(g, s, &a);

    b = a;                              /* the same copier; other slots and pages */
    b.slots = a.slots + a.n;
    b.pages = a.pages + a.n;
    for (int i = -1; !rc && i < RUNS; i++) {
        uint64_t l = limit_us(g, s->job / 2, true, true), o = ours_both_us(&a, &b);
        if (!o)
            rc = -EIO;
        else if (i >= 0) {
            ours[i] = gbs(2 * s->job, o);
            limit[i] = gbs(s->job, l);
        }
    }
    close_job(&a);
    if (!rc)
        *out = bench_summary("both_16k_s2m_512m", "GB/s", ours, limit, RUNS);
    return rc;
}

struct first { uint64_t start, us; struct fk_copier *c; void *event; };

static void note_first(void *arg, uint32_t regions, void *event)
{
    struct first *f = arg;

    (void)regions;
    if (!f->event)
        f->event = event;
    struct fk_cuda_copier *c = (struct fk_cuda_copier *)f->c;
    if (!f->us && c->cu->EventQuery(f->event) == CU_OK)
        f->us = fk_clock_us() - f->start;
}

/* Both against the same job in bulk: the whole of it, and the first of its layers. */
static int layerwise(const struct gpu *g, const struct shape *s, struct bench_result *out)
{
    double whole[RUNS], bulk[RUNS], first[RUNS];
    struct bench_job j;
    int rc = open_job(g, s, &j);
    uint32_t *ends = calloc(j.n_regions, sizeof(*ends));

    for (uint32_t i = 0; i < j.n_regions; i++)
        ends[i] = i + 1;
    for (int i = -1; !rc && i < RUNS; i++) {
        struct first f = { .start = fk_clock_us(), .c = j.copier };
        struct fk_copy_progress p = { .layers = note_first, .arg = &f, .layer_ends = ends,
                                      .n_layers = j.n_regions };
        uint64_t w = ours_us(&j, true, &p), b = ours_us(&j, true, NULL);
        if (!w || !b)
            rc = -EIO;
        else if (i >= 0) {
            whole[i] = (double)w;
            bulk[i] = (double)b;
            first[i] = (double)f.us;
        }
    }
    close_job(&j);
    free(ends);
    if (rc)
        return rc;
    double share[RUNS];
    for (int i = 0; i < RUNS; i++)
        share[i] = bulk[i] / 32 + 1000;
    out[0] = bench_summary("layers_all_64k_s2m", "us", whole, bulk, RUNS);
    out[1] = bench_summary("layers_first_64k_s2m", "us", first, share, RUNS);
    return 0;
}

/* Seconds of CPU for each second of copying. */
static int cpu_use(const struct gpu *g, const struct shape *s, struct bench_result *out)
{
    double use[RUNS], bar[RUNS];
    struct bench_job j;
    int rc = open_job(g, s, &j);

    for (int i = 0; !rc && i < RUNS; i++) {
        struct rusage a, b;
        uint64_t start = fk_clock_us();
        getrusage(RUSAGE_THREAD, &a);
        for (int k = 0; k < 8 && !rc; k++)
            rc = ours_us(&j, k % 2, NULL) ? 0 : -EIO;
        getrusage(RUSAGE_THREAD, &b);
        use[i] = ((double)(b.ru_utime.tv_sec - a.ru_utime.tv_sec + b.ru_stime.tv_sec - a.ru_stime.tv_sec) * 1e6 +
                  (double)(b.ru_utime.tv_usec - a.ru_utime.tv_usec + b.ru_stime.tv_usec - a.ru_stime.tv_usec)) /
                 (double)(fk_clock_us() - start);
        bar[i] = 0.3;
    }
    close_job(&j);
    if (!rc)
        *out = bench_summary("agent_cpu", "cores", use, bar, RUNS);
    return rc;
}

static int one_block(const struct gpu *g, struct bench_result *out)
{
    static const struct shape s = { 32 * FK_KIB, 2 * FK_MIB, 2 * FK_MIB };
    double ours[101];
    struct bench_job j;
    int rc = open_job(g, &s, &j);

    for (int i = -5; !rc && i < 101; i++) {
        uint64_t us = ours_us(&j, i & 1, NULL);
        if (!us)
            rc = -EIO;
        else if (i >= 0)
            ours[i] = (double)us;
    }
    close_job(&j);
    if (!rc)
        *out = bench_summary("block_2m_64_pieces", "us", ours, NULL, 101);
    return rc;
}

int bench_gpu(struct bench_result *out, int max)
{
    static const struct shape shapes[] = {
        { 4 * FK_KIB, FK_MIB, 512 * FK_MIB }, { 16 * FK_KIB, FK_MIB, 512 * FK_MIB },
        { 16 * FK_KIB, 2 * FK_MIB, 512 * FK_MIB }, { 64 * FK_KIB, 2 * FK_MIB, 512 * FK_MIB },
        { 256 * FK_KIB, 8 * FK_MIB, 512 * FK_MIB }, { 4 * FK_KIB, 2 * FK_MIB, 64 * FK_MIB },
        { 16 * FK_KIB, 2 * FK_MIB, 64 * FK_MIB }, { 64 * FK_KIB, 2 * FK_MIB, 64 * FK_MIB },
        { 16 * FK_KIB, 256 * FK_KIB, 64 * FK_MIB },
    };
    struct gpu g = { 0 };
    int n = 0, rc = open_gpu(&g);

    if (rc == -ENODEV) {
        printf("gpu: no CUDA driver here\n");
        return 0;
    }
    for (size_t i = 0; !rc && i < fk_array_size(shapes) && n + 2 <= max; i++)
        for (int to = 1; !rc && to >= 0; to--)
            rc = one_way(&g, &shapes[i], to, false, &out[n++]);
    for (int to = 1; !rc && to >= 0 && n + 1 <= max; to--)
        rc = one_way(&g, &shapes[2], to, true, &out[n++]);
    if (!rc && n + 5 <= max) {
        rc = both_ways(&g, &shapes[2], &out[n++]);
        if (!rc)
            rc = layerwise(&g, &shapes[3], &out[n]);
        n += 2;
        if (!rc)
            rc = cpu_use(&g, &shapes[2], &out[n++]);
        if (!rc)
            rc = one_block(&g, &out[n++]);
    }
    return rc ? rc : n;
}
