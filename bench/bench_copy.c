/*
 * bench_copy.c - the host copy backend under its team, pages to slots and back in random order,
 * against plain memcpy of the same pages and slots by one thread each.
 */
#include <stdio.h>
#include <sys/mman.h>

#include "base/clock.h"
#include "base/util.h"
#include "bench.h"
#include "copy/team.h"

#define BYTES (256 * FK_MIB)
#define RUNS 15

struct arena {
    char *pages, *pool;
    uint32_t *slots, *order;
    uint32_t n;
    uint64_t block_bytes;
};

static double plain_gbs(const struct arena *a, bool to_engine)
{
    uint64_t start = fk_clock_ns();

    for (uint32_t i = 0; i < a->n; i++) {
        char *page = a->pages + a->order[i] * a->block_bytes;
        char *slot = a->pool + a->slots[i] * a->block_bytes;
        memcpy(to_engine ? page : slot, to_engine ? slot : page, a->block_bytes);
    }
    return (double)(a->n * a->block_bytes) / (double)(fk_clock_ns() - start);
}

static double ours_gbs(const struct arena *a, struct fk_team *team, bool to_engine)
{
    flexkv_region region = { .base = a->pages, .stride = a->block_bytes,
                             .page_bytes = a->block_bytes, .pages = a->n };
    struct fk_copy_target target = { .regions = &region, .n_regions = 1, .pool = a->pool,
                                     .slot_bytes = a->block_bytes };
    struct fk_copy_blocks blocks = { .slots = a->slots, .pages = a->order, .n = a->n,
                                     .to_engine = to_engine };
    _Atomic bool cancelled = false;
    int status;
    uint64_t start = fk_clock_ns();

    fk_team_copy(team, fk_copy_backend("host"), &target, &blocks, &cancelled, &status);
    return (double)(a->n * a->block_bytes) / (double)(fk_clock_ns() - start);
}

static struct bench_result one(const char *name, struct arena *a, uint64_t block_bytes,
                               struct fk_team *team)
{
    static double ours[RUNS], limit[RUNS];
    uint64_t rng = block_bytes;

    a->block_bytes = block_bytes;
    a->n = (uint32_t)(BYTES / block_bytes);
    fk_rng_permutation(a->slots, a->n, &rng);
    fk_rng_permutation(a->order, a->n, &rng);
    plain_gbs(a, false);
    for (int i = 0; i < RUNS; i++) {
        ours[i] = ours_gbs(a, team, i & 1);
        limit[i] = plain_gbs(a, i & 1);
    }
    return bench_summary(name, "GB/s", ours, limit, RUNS);
}

static char *map(void)
{
    char *p = mmap(NULL, BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    if (p == MAP_FAILED)
        return NULL;
    madvise(p, BYTES, MADV_HUGEPAGE);
    memset(p, 3, BYTES);
    return p;
}

int bench_copy(struct bench_result *out, int max)
{
    struct arena a = { .pages = map(), .pool = map() };
    struct fk_team *team = NULL;
    uint32_t n = BYTES / 4096;

    a.slots = malloc(n * sizeof(*a.slots));
    a.order = malloc(n * sizeof(*a.order));
    if (max < 4 || !a.pages || !a.pool || !a.slots || !a.order || fk_team_create(1, &team))
        return -ENOMEM;
    out[0] = one("copy_4k", &a, 4096, team);
    out[1] = one("copy_16k", &a, 16384, team);
    out[2] = one("copy_64k", &a, 65536, team);
    out[3] = one("copy_1m", &a, 1 << 20, team);
    fk_team_destroy(team);
    munmap(a.pages, BYTES);
    munmap(a.pool, BYTES);
    free(a.slots);
    free(a.order);
    return 4;
}
