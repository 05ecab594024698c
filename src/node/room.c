/* room.c - making room in a tier: eviction on demand, and ahead of need. See core.h. */
#include "node/core_impl.h"

/* The last copy of a block whose children are on SSD can't just go: it is written first. If
 * that is impossible it is given up, and its descendants will be swept. */
static void save_or_lose(struct fk_core *core, uint32_t victim)
{
    core_write_blocks(core, &victim, 1);
    if (fk_entry_in(&core->ix.entries[victim], FK_TIER_SSD) == FK_ABSENT)
        fk_index_drop(&core->ix, victim, FK_TIER_CPU, true);
}

/* Its slot lies on a directory that is out: nothing to gain, and it may come back with it. */
static bool is_out(struct fk_core *core, uint32_t victim, enum fk_tier tier)
{
    const struct fk_entry *e = &core->ix.entries[victim];

    return fk_slots_out(&fk_entry_space(&core->ix, e)->slots[tier], e->slot[tier]);
}

/* Evicts the block, or puts it off if it can't go. */
static void evict(struct fk_core *core, uint32_t victim, enum fk_tier tier)
{
    fk_index_prefetch_before(&core->ix, victim);
    if (tier == FK_TIER_CPU)
        core_probe_left_cpu(core, victim);
    if (fk_unlikely(is_out(core, victim, tier)))
        fk_index_defer(&core->ix, victim, tier, core->tick);
    else if (fk_likely(fk_index_droppable(&core->ix, victim, tier)))
        fk_index_drop(&core->ix, victim, tier, true);
    else if (tier == FK_TIER_CPU)
        save_or_lose(core, victim);
    else
        fk_index_defer(&core->ix, victim, tier, core->tick);
}

static bool evict_one(struct fk_core *core, uint32_t group, enum fk_tier tier)
{
    uint32_t victim = fk_index_victim(&core->ix, group, tier, core->tick);

    if (victim != FK_NONE)
        evict(core, victim, tier);
    return victim != FK_NONE;
}

/* The same beyond need: not at the cost of what is guaranteed, to the group itself neither. */
static bool evict_spare(struct fk_core *core, uint32_t victim, enum fk_tier tier)
{
    if (victim == FK_NONE)
        return false;
    const struct fk_group *g = &core->ix.groups[core->ix.entries[victim].group];
    if (g->used[tier] <= g->guaranteed[tier])
        return false;
    evict(core, victim, tier);
    return true;
}

static bool all_out(const struct fk_core *core, uint32_t space, enum fk_tier tier)
{
    const struct core_space *sp = &core->spaces[space];

    return tier == FK_TIER_SSD && sp->dirs_out == (uint32_t)((1ull << sp->ssd_dirs) - 1);
}

uint32_t core_make_room(struct fk_core *core, uint32_t group, enum fk_tier tier, uint32_t want,
                        uint32_t reserve)
{
    struct fk_index *ix = &core->ix;
    uint32_t room = fk_index_room(ix, group, tier, want, reserve);

    if (room >= want || all_out(core, ix->groups[group].space, tier))
        return room;
    uint32_t slots = ix->spaces[ix->groups[group].space].slots[tier].n;
    const struct fk_group *g = &ix->groups[group];
    /* At its maximum a group pays for itself: more than it needs would only cost itself. */
    bool own_limit = g->max[tier] - fk_min(g->used[tier], g->max[tier]) < want;
    uint32_t extra = own_limit ? 0 : (uint32_t)(core->params.evict_ratio * slots);
    /* Victims that must be written first give no room now: bound the tries. */
    for (uint64_t tries = (uint64_t)(want - room) + CORE_CLEAN_BATCH; room < want && tries; tries--) {
        if (!evict_one(core, group, tier))
            break;
        room = fk_index_room(ix, group, tier, want, reserve);
    }
    for (; extra && room >= want; extra--)
        if (!evict_spare(core, fk_index_victim(ix, group, tier, core->tick), tier))
            break;
    return room;
}

/* ---- ahead of need ---- */

/* The victim and its ancestors of the same age that are not on SSD, parents first. */
static void clean_tail(struct fk_core *core, uint32_t victim)
{
    uint32_t tail[CORE_CLEAN_BATCH], n = 0;
    const struct fk_entry *entries = core->ix.entries;
    uint32_t age = entries[victim].atime;

    for (uint32_t i = victim; i != FK_NONE && n < CORE_CLEAN_BATCH; i = entries[i].parent) {
        const struct fk_entry *e = &entries[i];
        if (fk_entry_in(e, FK_TIER_CPU) != FK_READY || e->atime != age ||
            fk_entry_in(e, FK_TIER_SSD) != FK_ABSENT || (e->state & FK_ENTRY_CLEANED))
            break;
        tail[CORE_CLEAN_BATCH - ++n] = i;
    }
    core_write_blocks(core, tail + CORE_CLEAN_BATCH - n, n);
    for (uint32_t i = CORE_CLEAN_BATCH - n; i < CORE_CLEAN_BATCH; i++)
        if (fk_entry_in(&entries[tail[i]], FK_TIER_SSD) != FK_ABSENT)
            core->ix.entries[tail[i]].state |= FK_ENTRY_CLEANED;
}

/* Written ahead of its eviction, the block goes at once: by the next round another one may be
 * the victim and push it off the SSD again, and so on without end. */
void core_evict_cleaned(struct fk_core *core, uint32_t entry)
{
    const struct fk_entry *e = &core->ix.entries[entry];
    const struct fk_slots *slots = &fk_entry_space(&core->ix, e)->slots[FK_TIER_CPU];
    double start = fk_min(core->params.evict_start_threshold, 0.95);
    double down_to = fk_max(start - core->params.evict_ratio, 0.0) * slots->n;

    if (core->params.write_policy != FK_WRITE_ON_EVICT || slots->n - slots->n_free <= down_to)
        return;
    if (fk_entry_in(e, FK_TIER_CPU) == FK_READY && fk_entry_on_ssd(&core->ix, e) && !e->pins &&
        !e->tier_children[FK_TIER_CPU])
        fk_index_drop(&core->ix, entry, FK_TIER_CPU, true);
}

static void evict_ahead_in(struct fk_core *core, uint32_t space, enum fk_tier tier)
{
    struct fk_index *ix = &core->ix;
    const struct fk_slots *slots = &ix->spaces[space].slots[tier];
    double start = core->params.evict_start_threshold;
    bool on_evict = core->params.write_policy == FK_WRITE_ON_EVICT && tier == FK_TIER_CPU &&
                    core->spaces[space].ssd_slots;

    if (!slots->n)
        return;
    if (on_evict)       /* writing takes time: it must begin before the end that puts can reach */
        start = fk_min(start, 0.95 - (double)core->spaces[space].reserve / slots->n);
    if (start >= 1.0 || slots->n - slots->n_free <= start * slots->n)
        return;
    double down_to = fk_max(start - core->params.evict_ratio, 0.0) * slots->n;
    uint32_t group = ix->spaces[space].default_group;
    for (uint32_t i = 0; i < 1024 && slots->n - slots->n_free > down_to; i++) {
        uint32_t victim = fk_index_victim(ix, group, tier, core->tick);
        if (victim == FK_NONE)
            return;
        /* Cleaned, and about to leave the cpu tier: dropped here it would be written again. */
        if (tier == FK_TIER_SSD && core->params.write_policy == FK_WRITE_ON_EVICT &&
            fk_entry_in(&ix->entries[victim], FK_TIER_CPU) == FK_READY)
            return;
        /* Once written and pushed off the SSD before it was used again: it is not worth another
         * write (two such blocks would push each other off for ever). */
        if (on_evict && fk_entry_in(&ix->entries[victim], FK_TIER_SSD) == FK_ABSENT &&
            !(ix->entries[victim].state & FK_ENTRY_CLEANED)) {
            if (core->spaces[space].backlog >= core->spaces[space].backlog_max)
                return;
            clean_tail(core, victim);
            if (fk_entry_in(&ix->entries[victim], FK_TIER_SSD) == FK_ABSENT)
                return;         /* SSD takes nothing now: dropped when the room is needed */
        } else if (!evict_spare(core, victim, tier)) {
            return;
        }
    }
}

void core_evict_ahead(struct fk_core *core)
{
    for (uint32_t s = 0; s < core->ix.n_spaces; s++)
        for (int t = 0; t < FK_TIERS; t++)
            evict_ahead_in(core, s, (enum fk_tier)t);
}
