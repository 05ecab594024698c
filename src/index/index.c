/*
 * index.c - set-up, spaces, groups, and the life of entries. See index.h.
 * Callers: src/node, under the core's lock.
 */
#include "index/index.h"

#include <sys/mman.h>

#include "base/plant.h"
#include "index/lane.h"
#include "index/table.h"

/* ---- set-up ---- */

int fk_index_init(struct fk_index *ix, const struct fk_index_params *params)
{
    memset(ix, 0, sizeof(*ix));
    ix->free_entry = FK_NONE;
    ix->sweep_step = 1;
    ix->hash_seed = params->seed;
    ix->policy = params->policy;
    ix->events_on = params->events;
    ix->max_spaces = params->max_spaces;
    ix->groups = calloc(FK_MAX_GROUPS, sizeof(*ix->groups));
    ix->spaces = calloc(params->max_spaces, sizeof(*ix->spaces));
    if (!ix->groups || !ix->spaces) {
        fk_index_fini(ix);
        return -ENOMEM;
    }
    return 0;
}

void fk_index_fini(struct fk_index *ix)
{
    for (uint32_t g = 0; g < ix->n_groups; g++)
        for (int t = 0; t < FK_TIERS; t++)
            fk_lane_fini(&ix->groups[g].lane[t]);
    for (uint32_t s = 0; s < ix->n_spaces; s++)
        for (int t = 0; t < FK_TIERS; t++)
            fk_slots_fini(&ix->spaces[s].slots[t]);
    if (ix->entries)
        munmap(ix->entries, ix->entries_bytes);
    if (ix->buckets)
        munmap(ix->buckets, ix->buckets_bytes);
    fk_vec_free(&ix->events);
    free(ix->groups);
    free(ix->spaces);
    memset(ix, 0, sizeof(*ix));
}

/* Room for n more entries: a block needs one as long as any tier holds it; holes and entries
 * that are dropped while pinned need a few more. */
static int grow(struct fk_index *ix, uint64_t n)
{
    uint64_t total = ix->n_entries_max + n + n / 64 + 64;
    size_t bytes = (size_t)total * sizeof(struct fk_entry);

    if (total >= FK_HEAP_SECOND)
        return -EOVERFLOW;
    struct fk_entry *entries = fk_index_map(bytes);
    if (!entries)
        return -ENOMEM;
    if (ix->entries) {
        memcpy(entries, ix->entries, (size_t)ix->n_entries_used * sizeof(*entries));
        munmap(ix->entries, ix->entries_bytes);
    }
    ix->entries = entries;
    ix->entries_bytes = bytes;
    ix->n_entries_max = (uint32_t)total;
    for (uint32_t g = 0; g < ix->n_groups; g++)
        for (int t = 0; t < FK_TIERS; t++)
            fk_lane_set_entries(&ix->groups[g].lane[t], entries);
    return fk_table_resize(ix, (uint32_t)total);
}

int fk_index_reserve(struct fk_index *ix, uint32_t n)
{
    return grow(ix, n);
}

int fk_index_space_add(struct fk_index *ix, const uint32_t slots[FK_TIERS], uint32_t stripe,
                       uint32_t dirs, uint32_t *space)
{
    uint32_t no_limit[FK_TIERS] = { UINT32_MAX, UINT32_MAX }, none[FK_TIERS] = { 0, 0 };

    if (ix->n_spaces >= ix->max_spaces || ix->n_groups >= FK_MAX_GROUPS)
        return -ENOSPC;
    struct fk_index_space *sp = &ix->spaces[ix->n_spaces];
    int rc = fk_slots_init(&sp->slots[FK_TIER_CPU], slots[FK_TIER_CPU], 0, 1);
    if (!rc)
        rc = fk_slots_init(&sp->slots[FK_TIER_SSD], slots[FK_TIER_SSD], stripe, fk_max(dirs, 1u));
    if (!rc)
        rc = grow(ix, (uint64_t)slots[FK_TIER_CPU] + slots[FK_TIER_SSD]);
    if (!rc) {
        *space = ix->n_spaces++;
        rc = fk_index_group_add(ix, *space, no_limit, none, &sp->default_group);
        if (rc)
            ix->n_spaces--;
    }
    if (rc) {
        fk_slots_fini(&sp->slots[FK_TIER_CPU]);
        fk_slots_fini(&sp->slots[FK_TIER_SSD]);
    }
    return rc;
}

int fk_index_group_add(struct fk_index *ix, uint32_t space, const uint32_t max[FK_TIERS],
                       const uint32_t guaranteed[FK_TIERS], uint32_t *group)
{
    if (ix->n_groups >= FK_MAX_GROUPS)
        return -ENOSPC;
    for (int t = 0; t < FK_TIERS; t++) {
        uint64_t promised = guaranteed[t];
        for (uint32_t g = 0; g < ix->n_groups; g++)
            promised += ix->groups[g].space == space ? ix->groups[g].guaranteed[t] : 0;
        if (promised > ix->spaces[space].slots[t].n || guaranteed[t] > max[t])
            return -EINVAL;
    }
    struct fk_group *g = &ix->groups[ix->n_groups];
    memset(g, 0, sizeof(*g));
    g->space = space;
    for (int t = 0; t < FK_TIERS; t++) {
        uint32_t capacity = fk_min(max[t], ix->spaces[space].slots[t].n);
        g->max[t] = max[t];
        g->guaranteed[t] = guaranteed[t];
        int rc = fk_lane_init(&g->lane[t], ix, (enum fk_tier)t, ix->n_groups, capacity);
        if (rc) {
            if (t)
                fk_lane_fini(&g->lane[0]);
            return rc;
        }
    }
    *group = ix->n_groups++;
    return 0;
}

uint64_t fk_index_bytes(const struct fk_index *ix)
{
    uint64_t bytes = ix->entries_bytes + ix->buckets_bytes;

    for (uint32_t g = 0; g < ix->n_groups; g++)
        for (int t = 0; t < FK_TIERS; t++)
            bytes += fk_lane_bytes(&ix->groups[g].lane[t]);
    return bytes;
}

/* ---- entries ---- */

static void set_in(struct fk_entry *e, enum fk_tier t, enum fk_residency r)
{
    e->state = (uint8_t)((e->state & ~(3u << (2 * t))) | ((unsigned)r << (2 * t)));
}

static void set_hole(struct fk_index *ix, struct fk_entry *e, bool hole)
{
    if (hole == !!(e->state & FK_ENTRY_HOLE))
        return;
    e->state ^= FK_ENTRY_HOLE;
    ix->holes += hole ? 1 : -1u;
}

static void event(struct fk_index *ix, const struct fk_entry *e, enum fk_tier tier, bool stored)
{
    if (!ix->events_on)
        return;
    struct fk_index_event ev = { .key = e->key, .space = ix->groups[e->group].space,
                                 .slot = { e->slot[FK_TIER_CPU], e->slot[FK_TIER_SSD] },
                                 .tier = (uint8_t)tier, .group = e->group, .stored = stored };
    if (e->parent != FK_NONE)
        ev.parent = ix->entries[e->parent].key;
    if (fk_vec_push(&ix->events, ev))
        ix->events_lost = true;
}

/* Frees the entry if nothing needs it, then its parents likewise; or makes it a hole. */
static void settle(struct fk_index *ix, uint32_t entry)
{
    while (entry != FK_NONE) {
        struct fk_entry *e = &ix->entries[entry];
        bool empty = fk_entry_in(e, FK_TIER_CPU) == FK_ABSENT &&
                     fk_entry_in(e, FK_TIER_SSD) == FK_ABSENT;
        if (!(e->state & FK_ENTRY_DOOMED))
            set_hole(ix, e, empty && !e->pins && e->children);
        if (!empty || e->pins || e->children)
            return;
        if (!(e->state & FK_ENTRY_DOOMED))
            fk_table_erase(ix, entry);
        uint32_t parent = e->parent;
        e->state = 0;
        e->parent = ix->free_entry;
        ix->free_entry = entry;
        ix->n_live--;
        if (parent == FK_NONE)
            return;
        ix->entries[parent].children--;
        fk_lane_refresh(ix, parent);
        entry = parent;
    }
}

uint32_t fk_index_add(struct fk_index *ix, struct fk_key key, uint32_t parent, uint32_t group,
                      uint32_t tick)
{
    uint32_t entry = ix->free_entry;

    if (entry != FK_NONE)
        ix->free_entry = ix->entries[entry].parent;
    else if (ix->n_entries_used < ix->n_entries_max)
        entry = ix->n_entries_used++;
    else
        return FK_NONE;
    ix->entries[entry] = (struct fk_entry){
        .key = key, .parent = parent, .group = (uint8_t)group, .atime = tick, .rank = tick,
        .slot = { FK_NONE, FK_NONE }, .pos = { FK_NONE, FK_NONE }, .pins = 1,
        .state = FK_ENTRY_USED,
    };
    ix->n_live++;
    if (parent != FK_NONE) {
        ix->entries[parent].children++;
        fk_lane_refresh(ix, parent);
    }
    fk_table_insert(ix, entry);
    return entry;
}

void fk_index_fill(struct fk_index *ix, uint32_t entry, enum fk_tier tier, uint32_t slot)
{
    struct fk_entry *e = &ix->entries[entry];

    set_hole(ix, e, false);
    set_in(e, tier, FK_FILLING);
    e->slot[tier] = slot;
    e->pos[tier] = FK_NONE;
    if (e->parent != FK_NONE) {
        ix->entries[e->parent].tier_children[tier]++;
        fk_lane_refresh(ix, e->parent);
    }
}

void fk_index_ready(struct fk_index *ix, uint32_t entry, enum fk_tier tier, uint32_t tick)
{
    struct fk_entry *e = &ix->entries[entry];
    struct fk_lane *lane = fk_index_lane(ix, e, tier);

    e->pos[tier] = FK_NONE;
    set_in(e, tier, FK_READY);
    lane->resident++;
    if (lane->ops->insert)
        lane->ops->insert(lane, e);
    event(ix, e, tier, true);
    fk_lane_refresh(ix, entry);
}

/* Takes the READY or FILLING copy out of sight: heap, counts, policy, event. */
static void withdraw(struct fk_index *ix, uint32_t entry, enum fk_tier tier, bool evicted)
{
    struct fk_entry *e = &ix->entries[entry];

    if (e->parent != FK_NONE)
        ix->entries[e->parent].tier_children[tier]--;
    if (fk_entry_in(e, tier) == FK_READY) {
        struct fk_lane *lane = fk_index_lane(ix, e, tier);
        lane->resident--;
        if (lane->ops->remove)
            lane->ops->remove(lane, e, evicted);
        event(ix, e, tier, false);
        ix->evicted[tier] += evicted;
        set_in(e, tier, FK_ABSENT);
        if (e->pos[tier] != FK_NONE)
            fk_lane_leave(lane, e, e->parent);
    } else {
        set_in(e, tier, FK_ABSENT);
    }
    e->pos[tier] = FK_NONE;
}

static void free_slot(struct fk_index *ix, struct fk_entry *e, enum fk_tier tier)
{
    fk_index_return_slot(ix, e->group, tier, e->slot[tier]);
    e->slot[tier] = FK_NONE;
}

void fk_index_drop(struct fk_index *ix, uint32_t entry, enum fk_tier tier, bool evicted)
{
    struct fk_entry *e = &ix->entries[entry];
    uint32_t parent = e->parent;

    withdraw(ix, entry, tier, evicted);
    if (e->pins && !FK_BUG(11))
        set_in(e, tier, FK_LOST);
    else
        free_slot(ix, e, tier);
    fk_lane_refresh(ix, entry);
    if (parent != FK_NONE)
        fk_lane_refresh(ix, parent);
    settle(ix, entry);
}

void fk_index_unfill(struct fk_index *ix, uint32_t entry, enum fk_tier tier)
{
    struct fk_entry *e = &ix->entries[entry];
    uint32_t parent = e->parent;

    withdraw(ix, entry, tier, false);
    free_slot(ix, e, tier);
    fk_lane_refresh(ix, entry);
    if (parent != FK_NONE)
        fk_lane_refresh(ix, parent);
    settle(ix, entry);
}

void fk_index_doom(struct fk_index *ix, uint32_t entry)
{
    struct fk_entry *e = &ix->entries[entry];

    if (e->state & FK_ENTRY_DOOMED)
        return;
    set_hole(ix, e, false);
    fk_table_erase(ix, entry);
    e->state |= FK_ENTRY_DOOMED;
    fk_index_pin(ix, entry);
    for (int t = 0; t < FK_TIERS; t++) {
        enum fk_residency r = fk_entry_in(e, (enum fk_tier)t);
        if (r == FK_READY || r == FK_FILLING)
            fk_index_drop(ix, entry, (enum fk_tier)t, false);
    }
    fk_index_unpin(ix, entry);
}

void fk_index_pin(struct fk_index *ix, uint32_t entry)
{
    struct fk_entry *e = &ix->entries[entry];

    if (e->pins++ == 0)
        fk_lane_refresh(ix, entry);
}

/* A cpu copy that lies behind a gap in the cpu tier is worth nothing there: routers and layer
 * pipelines count leading blocks. It came through on its way to the engine; SSD has it. */
static bool useless_in_cpu(struct fk_index *ix, const struct fk_entry *e)
{
    if (fk_entry_in(e, FK_TIER_CPU) != FK_READY || e->parent == FK_NONE ||
        !fk_entry_on_ssd(ix, e))
        return false;
    enum fk_residency parent = fk_entry_in(&ix->entries[e->parent], FK_TIER_CPU);
    return parent != FK_READY && parent != FK_FILLING;
}

void fk_index_unpin(struct fk_index *ix, uint32_t entry)
{
    struct fk_entry *e = &ix->entries[entry];

    if (--e->pins)
        return;
    for (int t = 0; t < FK_TIERS; t++) {
        if (fk_entry_in(e, (enum fk_tier)t) == FK_LOST) {
            set_in(e, (enum fk_tier)t, FK_ABSENT);
            free_slot(ix, e, (enum fk_tier)t);
        }
    }
    if (fk_unlikely(useless_in_cpu(ix, e)) && !e->tier_children[FK_TIER_CPU]) {
        fk_index_drop(ix, entry, FK_TIER_CPU, true);
        return;
    }
    fk_lane_refresh(ix, entry);
    settle(ix, entry);
}

void fk_index_touch(struct fk_index *ix, uint32_t entry, uint32_t tick)
{
    struct fk_entry *e = &ix->entries[entry];

    for (int t = 0; t < FK_TIERS; t++) {
        struct fk_lane *lane = fk_index_lane(ix, e, (enum fk_tier)t);
        if (lane->ops->hit && fk_entry_in(e, (enum fk_tier)t) == FK_READY)
            lane->ops->hit(lane, e, tick);
    }
    e->atime = tick;
    e->state &= (uint8_t)~FK_ENTRY_CLEANED;
    if (e->freq < UINT16_MAX)
        e->freq++;
    for (int t = 0; t < FK_TIERS; t++)
        if (fk_entry_in(e, (enum fk_tier)t) == FK_READY && e->pos[t] != FK_NONE)
            fk_lane_update(fk_index_lane(ix, e, (enum fk_tier)t), e);
}
