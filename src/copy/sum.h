/*
 * sum.h - checksums of slices in memory (option gpu_checksums): taken when a block is stored, compared
 * when it is loaded. Cheap enough for a kernel to take in the pass that copies, and the same on a CPU:
 * the sum (mod 2^64) over the slice's 16-byte units of a product that depends on the unit's bytes and
 * its place, so the order in which parts are summed does not matter.
 *
 * What it is for: memory that has changed, a copy that was torn or went astray. A change goes unseen in
 * about one of 2^64 cases; it is no defence against somebody who makes collisions on purpose. The same
 * arithmetic stands in cuda/kernels.cu.
 *
 * Sums lie behind the slots of a pool, shared by the node and all agents; 0: not known. Any thread.
 */
#ifndef FK_COPY_SUM_H
#define FK_COPY_SUM_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

/* Of one rank: sums + slot * stride. sums NULL: none are kept. */
struct fk_copy_sums {
    _Atomic uint64_t *sums;
    uint32_t stride;
};

static inline uint64_t fk_sum_unit(uint64_t unit, uint64_t lo, uint64_t hi)
{
    uint64_t s = (unit + 1) * 0x9e3779b97f4a7c15ull;
    unsigned __int128 p = (unsigned __int128)(lo ^ s) *
                          (hi ^ ((s << 32 | s >> 32) + 0xd1b54a32d192ed03ull));

    return (uint64_t)p ^ (uint64_t)(p >> 64);
}

/* Never 0. A rest of less than 16 bytes counts as if zeros followed. */
static inline uint64_t fk_sum_finish(uint64_t sum)
{
    return sum ? sum : 1;
}

static inline uint64_t fk_sum(const void *data, uint64_t bytes)
{
    const char *p = data;
    uint64_t sum = 0, w[2], u;

    for (u = 0; u < bytes / 16; u++) {
        memcpy(w, p + u * 16, 16);
        sum += fk_sum_unit(u, w[0], w[1]);
    }
    if (bytes % 16) {
        w[0] = w[1] = 0;
        memcpy(w, p + u * 16, bytes % 16);
        sum += fk_sum_unit(u, w[0], w[1]);
    }
    return fk_sum_finish(sum);
}

/* Stored: kept. Loaded: is it what was kept? One that nobody had taken yet (the slot was filled from
 * SSD, and checked then) is kept from now on. */
static inline bool fk_sum_settle(const struct fk_copy_sums *s, uint32_t slot, uint64_t sum,
                                 bool to_engine)
{
    _Atomic uint64_t *at = s->sums + (uint64_t)slot * s->stride;
    uint64_t none = 0;

    if (to_engine)
        return atomic_compare_exchange_strong(at, &none, sum) || none == sum;
    atomic_store(at, sum);
    return true;
}

#endif
