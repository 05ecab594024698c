/*
 * lane.c - which blocks may be evicted now, in which order, and room for new ones: heaps,
 * victims, slots and quotas. Callers: the index room, and the node for room.
 */
#include "base/plant.h"
#include "index/lane.h"

int fk_lane_init(struct fk_lane *lane, struct fk_index *ix, enum fk_tier tier, uint32_t group,
                 uint32_t capacity)
{
    *lane = (struct fk_lane){ .index = ix, .ops = fk_policy_ops(ix->policy.kind), .tier = tier,
                              .group = group, .capacity = capacity };
    for (int i = 0; i < 2; i++) {
        lane->heap[i].tier = tier;
        lane->heap[i].entries = ix->entries;
        lane->heap[i].pos_bit = i ? FK_HEAP_SECOND : 0;
    }
    return lane->ops->init ? lane->ops->init(lane, &ix->policy) : 0;
}

void fk_lane_fini(struct fk_lane *lane)
{
    if (lane->ops && lane->ops->fini)
        lane->ops->fini(lane);
    fk_heap_fini(&lane->heap[0]);
    fk_heap_fini(&lane->heap[1]);
}

void fk_lane_set_entries(struct fk_lane *lane, struct fk_entry *entries)
{
    lane->heap[0].entries = lane->heap[1].entries = entries;
}

uint64_t fk_lane_bytes(const struct fk_lane *lane)
{
    return ((uint64_t)lane->heap[0].cap + lane->heap[1].cap) * sizeof(struct fk_heap_item) +
           (lane->ops->bytes ? lane->ops->bytes(lane) : 0);
}

static struct fk_heap *heap_of(struct fk_lane *lane, const struct fk_entry *e)
{
    return &lane->heap[e->pos[lane->tier] & FK_HEAP_SECOND ? 1 : 0];
}

static uint32_t place_of(struct fk_lane *lane, const struct fk_entry *e)
{
    return e->pos[lane->tier] & ~FK_HEAP_SECOND;
}

static unsigned wanted_heap(struct fk_lane *lane, const struct fk_entry *e)
{
    return lane->ops->heap ? lane->ops->heap(lane, e) : 0;
}

/* A copy may be evicted if nothing in the tier hangs on it and nobody holds it. Whether it is
 * the last copy of a block with children is asked later (fk_index_droppable). */
static bool evictable(const struct fk_entry *e, enum fk_tier tier)
{
    return fk_entry_in(e, tier) == FK_READY && (!e->tier_children[tier] || FK_BUG(5)) &&
           (!e->pins || FK_BUG(10));
}

static void enter(struct fk_lane *lane, struct fk_entry *e)
{
    struct fk_heap *h = &lane->heap[wanted_heap(lane, e)];

    /* Without memory the block just can't be evicted for now; it is offered again later. */
    if (fk_heap_reserve(h, h->len + 1) == 0)
        fk_heap_push(h, lane->ops->score(lane, e), fk_entry_number(lane->index, e));
}

void fk_lane_refresh(struct fk_index *ix, uint32_t entry)
{
    struct fk_entry *e = &ix->entries[entry];

    for (int t = 0; t < FK_TIERS; t++) {
        if (fk_entry_in(e, (enum fk_tier)t) != FK_READY)
            continue;
        struct fk_lane *lane = fk_index_lane(ix, e, (enum fk_tier)t);
        bool want = evictable(e, (enum fk_tier)t), in = e->pos[t] != FK_NONE;
        if (want && !in)
            enter(lane, e);
        else if (!want && in)
            fk_heap_remove(heap_of(lane, e), place_of(lane, e));
    }
}

void fk_lane_leave(struct fk_lane *lane, struct fk_entry *e, uint32_t parent)
{
    struct fk_heap *h = heap_of(lane, e);
    uint32_t at = place_of(lane, e);

    if (parent != FK_NONE) {
        struct fk_entry *p = &lane->index->entries[parent];
        if (p->group == e->group && p->pos[lane->tier] == FK_NONE && evictable(p, lane->tier) &&
            &lane->heap[wanted_heap(lane, p)] == h) {
            fk_heap_replace(h, at, lane->ops->score(lane, p), parent);
            return;
        }
    }
    fk_heap_remove(h, at);
}

void fk_lane_update(struct fk_lane *lane, struct fk_entry *e)
{
    struct fk_heap *h = heap_of(lane, e);

    if (h == &lane->heap[wanted_heap(lane, e)]) {
        fk_heap_update(h, place_of(lane, e), lane->ops->score(lane, e));
    } else {
        fk_heap_remove(h, place_of(lane, e));
        enter(lane, e);
    }
}

/* ---- room ---- */

static uint32_t quota_left(const struct fk_group *g, enum fk_tier tier)
{
    return FK_BUG(9) ? UINT32_MAX : g->max[tier] > g->used[tier] ? g->max[tier] - g->used[tier] : 0;
}

/* Free slots that others have been promised and have not taken yet. With directories out, a
 * promise is kept in part: all of them may be more than what is left. */
static uint32_t promised_to_others(const struct fk_index *ix, const struct fk_group *own,
                                   enum fk_tier tier)
{
    const struct fk_slots *s = &ix->spaces[own->space].slots[tier];
    uint32_t promised = 0;

    for (uint32_t i = 0; i < ix->n_groups; i++) {
        const struct fk_group *g = &ix->groups[i];
        uint32_t guaranteed = g->guaranteed[tier];
        if (fk_unlikely(s->n_out))
            guaranteed = (uint32_t)((uint64_t)guaranteed * (s->n - s->n_out) / s->n);
        if (g != own && g->space == own->space && guaranteed > g->used[tier])
            promised += guaranteed - g->used[tier];
    }
    return promised;
}

/* What is promised to others binds nobody who takes what was promised to himself. */
uint32_t fk_index_room(const struct fk_index *ix, uint32_t group, enum fk_tier tier,
                       uint32_t want, uint32_t reserve)
{
    const struct fk_group *g = &ix->groups[group];
    uint32_t usable = fk_slots_usable(&ix->spaces[g->space].slots[tier]);
    uint32_t n_free = usable > reserve ? usable - reserve : 0;
    uint32_t own = g->guaranteed[tier] > g->used[tier] ? g->guaranteed[tier] - g->used[tier] : 0;
    uint32_t promised = promised_to_others(ix, g, tier);

    n_free = fk_max(n_free > promised ? n_free - promised : 0, fk_min(own, n_free));
    return fk_min(fk_min(want, n_free), quota_left(g, tier));
}

uint32_t fk_index_take_slots(struct fk_index *ix, uint32_t group, enum fk_tier tier,
                             uint32_t want, uint32_t *first)
{
    struct fk_group *g = &ix->groups[group];
    uint32_t n = fk_slots_take(&ix->spaces[g->space].slots[tier], want, first);

    g->used[tier] += n;
    return n;
}

void fk_index_return_slot(struct fk_index *ix, uint32_t group, enum fk_tier tier, uint32_t slot)
{
    struct fk_group *g = &ix->groups[group];

    g->used[tier]--;
    fk_slots_free(&ix->spaces[g->space].slots[tier], slot);
}

static uint32_t lane_victim(struct fk_lane *lane, uint32_t tick)
{
    if (!lane->heap[0].len && !lane->heap[1].len)
        return FK_NONE;
    if (lane->ops->victim)
        return lane->ops->victim(lane, tick);
    return lane->heap[0].items[0].entry;
}

uint32_t fk_index_victim(struct fk_index *ix, uint32_t group, enum fk_tier tier, uint32_t tick)
{
    struct fk_group *own = &ix->groups[group];
    uint32_t best = FK_NONE;

    if (!quota_left(own, tier))
        return lane_victim(&own->lane[tier], tick);
    for (uint32_t i = 0; i < ix->n_groups; i++) {
        struct fk_group *g = &ix->groups[i];
        if (g->space != own->space || (g != own && g->used[tier] <= g->guaranteed[tier]))
            continue;
        uint32_t v = lane_victim(&g->lane[tier], tick);
        if (v == FK_NONE)
            continue;
        if (best == FK_NONE || ix->entries[v].atime < ix->entries[best].atime)
            best = v;
    }
    return best;
}

bool fk_index_droppable(struct fk_index *ix, uint32_t entry, enum fk_tier tier)
{
    const struct fk_entry *e = &ix->entries[entry];

    if (!e->children)
        return true;
    return tier == FK_TIER_CPU ? fk_entry_in(e, FK_TIER_SSD) == FK_READY
                               : fk_entry_in(e, FK_TIER_CPU) == FK_READY;
}

void fk_index_defer(struct fk_index *ix, uint32_t entry, enum fk_tier tier, uint32_t tick)
{
    struct fk_entry *e = &ix->entries[entry];
    struct fk_lane *lane = fk_index_lane(ix, e, tier);

    e->atime = tick;
    if (!lane->ops->rank_counts)
        e->rank = tick;
    fk_lane_update(lane, e);
}

uint32_t fk_index_admit(struct fk_index *ix, uint32_t group, enum fk_tier tier,
                        const struct fk_newcomers *nc, uint32_t tick)
{
    struct fk_lane *lane = &ix->groups[group].lane[tier];

    return lane->ops->admit ? lane->ops->admit(lane, nc, tick) : nc->n;
}

void fk_index_used(struct fk_index *ix, const uint32_t *entries, uint32_t n, uint32_t tick)
{
    if (!n)
        return;
    struct fk_lane *lane = fk_index_lane(ix, &ix->entries[entries[0]], FK_TIER_CPU);
    if (lane->ops->used)
        lane->ops->used(lane, entries, n, tick);
}

void fk_index_placed(struct fk_index *ix, uint32_t entry, uint32_t anchor, uint32_t left)
{
    struct fk_entry *e = &ix->entries[entry];
    struct fk_lane *lane = fk_index_lane(ix, e, FK_TIER_CPU);

    if (lane->ops->placed)
        lane->ops->placed(lane, e, anchor == FK_NONE ? NULL : &ix->entries[anchor], left);
}
