/*
 * policy.c - the table of policies, and the six of the reference: lru lfu slru fifo mru filo.
 * Where the reference's lfu and slru never age (and so end far below lru on long traces), ours do:
 * lfu by LFU with dynamic ageing (Arlitt et al., 2000), slru by demotion from a bounded
 * protected part (Karedla, Love, Wherry, 1994).
 */
#include "index/policy.h"

#include <strings.h>

#include "index/index.h"
#include "index/policies.h"

/* ---- lru, mru: by last use ---- */

static uint32_t lru_score(struct fk_lane *lane, const struct fk_entry *e)
{
    uint64_t t = e->atime + (uint64_t)e->freq * lane->index->policy.hit_reward_ticks;

    return t < UINT32_MAX ? (uint32_t)t : UINT32_MAX;
}

static uint32_t mru_score(struct fk_lane *lane, const struct fk_entry *e)
{
    return ~e->atime;
}

static const struct fk_policy_ops lru = { .name = "lru", .score = lru_score };
static const struct fk_policy_ops mru = { .name = "mru", .score = mru_score };

/* ---- fifo, filo: by insertion; rank is the tick of the insertion ---- */

static uint32_t fifo_score(struct fk_lane *lane, const struct fk_entry *e)
{
    return e->rank;
}

static uint32_t filo_score(struct fk_lane *lane, const struct fk_entry *e)
{
    return ~e->rank;
}

static const struct fk_policy_ops fifo = { .name = "fifo", .score = fifo_score };
static const struct fk_policy_ops filo = { .name = "filo", .score = filo_score };

/* ---- lfu: rank = the lane's age at the last use + hits; the age is the rank last evicted, so
 * old fame is overtaken ---- */

struct lfu { uint32_t age; };

static int lfu_init(struct fk_lane *lane, const struct fk_policy_params *params)
{
    lane->state = calloc(1, sizeof(struct lfu));
    return lane->state ? 0 : -ENOMEM;
}

void fk_policy_free_state(struct fk_lane *lane)
{
    free(lane->state);
    lane->state = NULL;
}

/* One word serves both tiers: the faster one keeps it. */
static bool lfu_owns_rank(const struct fk_lane *lane, const struct fk_entry *e)
{
    return lane->tier == FK_TIER_CPU || fk_entry_in(e, FK_TIER_CPU) != FK_READY;
}

static void lfu_insert(struct fk_lane *lane, struct fk_entry *e)
{
    if (lfu_owns_rank(lane, e))
        e->rank = ((struct lfu *)lane->state)->age + 1 + e->freq;
}

static void lfu_hit(struct fk_lane *lane, struct fk_entry *e, uint32_t tick)
{
    if (lfu_owns_rank(lane, e))
        e->rank = ((struct lfu *)lane->state)->age + 2 + e->freq;
}

static void lfu_remove(struct fk_lane *lane, struct fk_entry *e, bool evicted)
{
    struct lfu *s = lane->state;

    if (evicted && e->rank > s->age)
        s->age = e->rank;
}

static const struct fk_policy_ops lfu = {
    .name = "lfu", .rank_counts = true, .init = lfu_init, .fini = fk_policy_free_state, .insert = lfu_insert,
    .hit = lfu_hit, .remove = lfu_remove, .score = fifo_score,
};

/* ---- slru: heap 0 on probation, heap 1 protected; both by last use ---- */

#define SLRU_PROTECTED 1u           /* aux */

struct slru { uint32_t n_protected, threshold; };

static int slru_init(struct fk_lane *lane, const struct fk_policy_params *params)
{
    struct slru *s = lane->state = calloc(1, sizeof(*s));

    if (!s)
        return -ENOMEM;
    s->threshold = fk_max(params->slru_protected_threshold, 1u);
    return 0;
}

static void slru_insert(struct fk_lane *lane, struct fk_entry *e)
{
    e->aux[lane->tier] = 0;
}

static void slru_hit(struct fk_lane *lane, struct fk_entry *e, uint32_t tick)
{
    struct slru *s = lane->state;

    e->rank = tick;
    if (!(e->aux[lane->tier] & SLRU_PROTECTED) && e->freq + 1u >= s->threshold) {
        e->aux[lane->tier] |= SLRU_PROTECTED;
        s->n_protected++;
    }
}

static void slru_unprotect(struct fk_lane *lane, struct fk_entry *e)
{
    struct slru *s = lane->state;

    if (e->aux[lane->tier] & SLRU_PROTECTED) {
        e->aux[lane->tier] &= (uint8_t)~SLRU_PROTECTED;
        s->n_protected--;
    }
}

static void slru_remove(struct fk_lane *lane, struct fk_entry *e, bool evicted)
{
    slru_unprotect(lane, e);
}

static unsigned slru_heap(struct fk_lane *lane, const struct fk_entry *e)
{
    return e->aux[lane->tier] & SLRU_PROTECTED;
}

static uint32_t slru_victim(struct fk_lane *lane, uint32_t tick)
{
    struct slru *s = lane->state;

    while (lane->heap[1].len && s->n_protected > lane->capacity / 2) {
        struct fk_entry *e = &lane->index->entries[lane->heap[1].items[0].entry];
        slru_unprotect(lane, e);
        e->freq = 0;
        e->rank = tick;         /* the newest on probation: it gets another round */
        fk_lane_update(lane, e);
    }
    struct fk_heap *h = &lane->heap[lane->heap[0].len ? 0 : 1];
    return h->items[0].entry;
}

static const struct fk_policy_ops slru = {
    .name = "slru", .init = slru_init, .fini = fk_policy_free_state, .insert = slru_insert,
    .hit = slru_hit, .remove = slru_remove, .score = fifo_score, .heap = slru_heap,
    .victim = slru_victim,
};

/* ---- the table ---- */

static const struct fk_policy_ops *const table[FK_POLICY_KINDS + 1] = {
    [FK_POLICY_LRU] = &lru, [FK_POLICY_LFU] = &lfu, [FK_POLICY_SLRU] = &slru,
    [FK_POLICY_FIFO] = &fifo, [FK_POLICY_MRU] = &mru, [FK_POLICY_FILO] = &filo,
    [FK_POLICY_S3FIFO] = &fk_policy_s3fifo, [FK_POLICY_ARC] = &fk_policy_arc,
    [FK_POLICY_AUTO] = &fk_policy_auto, [FK_POLICY_DENSITY] = &fk_policy_density,
};

const struct fk_policy_ops *fk_policy_ops(enum fk_policy_kind kind)
{
    return table[kind];
}

const char *fk_policy_name(enum fk_policy_kind kind)
{
    return table[kind]->name;
}

int fk_policy_parse(const char *name, enum fk_policy_kind *kind)
{
    for (int i = 0; i < FK_POLICY_KINDS; i++) {
        if (strcasecmp(name, table[i]->name) == 0) {
            *kind = (enum fk_policy_kind)i;
            return 0;
        }
    }
    return -EINVAL;
}
