/*
 * rates.c - how fast the tiers are, as seen lately, and what computing costs the engine: the core declines hits that
 * would take longer than computing. Kept with the SSD's files over restarts, as a hint. With the node's lock but where
 * it says otherwise.
 */
#include <math.h>
#include <time.h>

#include "api/node_impl.h"

#define COPY_BLOCKS_MIN 4u              /* fewer measure the wake-up, not the copy */
#define READ_WINDOW_US 20000u
#define READ_BYTES_MIN (1u << 20)       /* fewer say less */
#define LOAD_US 500.0                   /* of a load from SSD or elsewhere: threads that wake up, the first read's way */
#define PROBE_BYTES (32 * FK_MIB)
#define PROBE_OF_CPU 8u                 /* at most an eighth of the cpu tier's slots */

#define HINT_VERSION 1u
#define HINT_AGE_MAX_S (7 * 24 * 3600)  /* what a disk did last week is not what it does */
#define HINT_SPREAD 0.25                /* at least: it was another time */
#define HINT_EVERY_US 10000000u

struct hint {
    uint32_t version, reserved;
    int64_t saved_s;                    /* of the wall clock */
    double us[3], spread_us[3];         /* copy, ssd, elsewhere */
    double compute_us;
};
_Static_assert(sizeof(struct hint) <= FK_SSD_HINT_BYTES, "the hint fits its place");

static void tell_core(struct fk_space *s)
{
    struct fk_core_costs costs = { .copy = s->rates.copy, .ssd = s->rates.ssd, .fetch = s->rates.fetch,
                                   .load_us = LOAD_US, .compute_us = s->rates.compute_us };

    fk_core_set_costs(s->node->core, s->id, &costs);
    s->rates.changed = true;
}

/* A small cpu tier has better things to hold. */
uint32_t fk_rates_probe_blocks(const struct fk_space *s, uint32_t cpu_slots)
{
    uint64_t n = fk_min(PROBE_BYTES / s->block_bytes, (unsigned long long)FK_CORE_PROBE_MAX);

    return (uint32_t)fk_max(fk_min(n, (uint64_t)(cpu_slots / PROBE_OF_CPU)), 1ull);
}

void fk_rates_copied(struct fk_space *s, uint32_t blocks, uint64_t us, uint64_t now_us)
{
    if (blocks < COPY_BLOCKS_MIN)
        return;
    fk_rate_note(&s->rates.copy, (double)us / blocks, 1, now_us);
    tell_core(s);
}

void fk_rates_read_direct(struct fk_space *s, uint32_t blocks, uint64_t us, uint64_t now_us)
{
    if (blocks < COPY_BLOCKS_MIN)
        return;
    fk_rate_note(&s->rates.ssd, (double)us / blocks, 1, now_us);
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
    if (n) {
        double share = us >= READ_WINDOW_US ? 1 : fk_min((double)n / READ_BYTES_MIN, 1.0);
        fk_rate_note(&r->ssd, (double)us * (double)s->block_bytes / (double)n, share, now_us);
        tell_core(s);
    }
    if (n || !busy) {                   /* nothing in a whole window: a slow disk goes on counting */
        r->ssd_busy_since = busy ? now_us : 0;
        r->ssd_bytes = bytes;
    }
}

/* As peers and store have measured it; us 0: not yet. */
void fk_rates_fetched(struct fk_space *s, const struct fk_rate *block)
{
    if (block->us == s->rates.fetch.us || !(block->us > 0))
        return;                         /* not yet: what was known from before stands */
    s->rates.fetch = *block;
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

/* ---- over a restart ---- */

static bool sound(double us)
{
    return isfinite(us) && us >= 0 && us < 1e12;
}

static struct fk_rate from_hint(const struct hint *h, int i)
{
    double spread = fk_max(h->spread_us[i], HINT_SPREAD * h->us[i]);

    return h->us[i] > 0 ? (struct fk_rate){ h->us[i], spread, 0 } : (struct fk_rate){ 0 };
}

/* As long as nothing newer is known. With both locks. */
void fk_rates_recall(struct fk_space *s)
{
    struct hint h;
    int64_t now = time(NULL);

    if (!s->ssd || !fk_ssd_hint(s->ssd, &h, sizeof(h)) || h.version != HINT_VERSION || h.saved_s > now ||
        now - h.saved_s > HINT_AGE_MAX_S || !sound(h.compute_us))
        return;
    for (int i = 0; i < 3; i++)
        if (!sound(h.us[i]) || !sound(h.spread_us[i]))
            return;
    s->rates.copy = from_hint(&h, 0);
    s->rates.ssd = from_hint(&h, 1);
    s->rates.fetch = from_hint(&h, 2);
    s->rates.compute_us = h.compute_us;
    tell_core(s);
    s->rates.changed = false;
}

/* With both locks; now and then, and at the end. The store writes it when it can. */
void fk_rates_save(struct fk_space *s, uint64_t now_us, bool end)
{
    struct fk_rates *r = &s->rates;

    if (!s->ssd || !r->changed || (r->saved_us && !end && now_us - r->saved_us < HINT_EVERY_US))
        return;
    struct hint h = { .version = HINT_VERSION, .saved_s = time(NULL), .compute_us = r->compute_us,
                      .us = { r->copy.us, r->ssd.us, r->fetch.us },
                      .spread_us = { r->copy.spread_us, r->ssd.spread_us, r->fetch.spread_us } };
    fk_ssd_set_hint(s->ssd, &h, sizeof(h));
    r->changed = false;
    r->saved_us = now_us;
}
