/* rates.c - how fast the tiers are, as seen lately, and what computing costs the engine: the core
 * declines hits that would take longer than computing. With the node's lock. */
#include "api/node_impl.h"

#define WEIGHT 0.2                      /* of a new measurement */
#define COPY_BLOCKS_MIN 4u              /* fewer measure the wake-up, not the copy */
#define READ_WINDOW_US 20000u
#define READ_BYTES_MIN (1u << 20)

static void blend(double *rate, double seen)
{
    *rate = *rate ? *rate + WEIGHT * (seen - *rate) : seen;
}

static void tell_core(struct fk_space *s)
{
    struct fk_core_costs costs = { .copy_us = s->rates.copy_us, .ssd_us = s->rates.ssd_us,
                                   .fetch_us = s->rates.fetch_us,
                                   .compute_us = s->rates.compute_us };

    fk_core_set_costs(s->node->core, s->id, &costs);
}

void fk_rates_copied(struct fk_space *s, uint32_t blocks, uint64_t us)
{
    if (blocks < COPY_BLOCKS_MIN)
        return;
    blend(&s->rates.copy_us, (double)us / blocks);
    tell_core(s);
}

void fk_rates_read_direct(struct fk_space *s, uint32_t blocks, uint64_t us)
{
    if (blocks < COPY_BLOCKS_MIN)
        return;
    blend(&s->rates.ssd_us, (double)us / blocks);
    tell_core(s);
}

/* bytes: read since open; busy: reads are under way. Only busy time counts. */
void fk_rates_read(struct fk_space *s, uint64_t bytes, uint64_t now_us, bool busy)
{
    struct fk_rates *r = &s->rates;

    if (!r->ssd_busy_since) {
        r->ssd_busy_since = busy ? now_us : 0;
        r->ssd_bytes = bytes;
        return;
    }
    uint64_t us = now_us - r->ssd_busy_since, n = bytes - r->ssd_bytes;
    if (busy && us < READ_WINDOW_US)
        return;
    if (n >= READ_BYTES_MIN || (n && us >= READ_WINDOW_US)) {
        blend(&r->ssd_us, (double)us * (double)s->block_bytes / (double)n);
        tell_core(s);
    }
    if (n || !busy) {                   /* nothing in a whole window: a slow disk goes on counting */
        r->ssd_busy_since = busy ? now_us : 0;
        r->ssd_bytes = bytes;
    }
}

/* As the peer tier has measured it; 0: not yet. */
void fk_rates_fetched(struct fk_space *s, double us_per_block)
{
    if (us_per_block == s->rates.fetch_us)
        return;
    s->rates.fetch_us = us_per_block;
    tell_core(s);
}

int fk_local_set_compute_rate(flexkv_space *pub, double tokens_per_second)
{
    struct fk_space *s = fk_local_instance(pub)->space;

    pthread_mutex_lock(&s->node->lock);
    s->rates.compute_us = tokens_per_second > 0 ? s->tokens_per_block * 1e6 / tokens_per_second : 0;
    tell_core(s);
    pthread_mutex_unlock(&s->node->lock);
    return 0;
}
