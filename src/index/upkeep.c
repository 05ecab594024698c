/*
 * upkeep.c - sweeping behind holes, the 32-bit tick's far-away wrap, and the self-check.
 * Callers: src/node's tick, tests.
 */
#include <stdio.h>

#include "index/lane.h"

/* ---- sweep ---- */

/* Drops what the entry holds if its parent is a hole: it then is one too, or gone. */
static void sweep_entry(struct fk_index *ix, uint32_t entry)
{
    struct fk_entry *e = &ix->entries[entry];

    if ((e->state & (FK_ENTRY_USED | FK_ENTRY_DOOMED | FK_ENTRY_HOLE)) != FK_ENTRY_USED ||
        e->pins || e->parent == FK_NONE || !(ix->entries[e->parent].state & FK_ENTRY_HOLE))
        return;
    e->pins++;      /* lasts while both tiers are dropped */
    for (int t = 0; t < FK_TIERS; t++)
        if (fk_entry_in(e, (enum fk_tier)t) == FK_READY)
            fk_index_drop(ix, entry, (enum fk_tier)t, false);
    fk_index_unpin(ix, entry);
}

bool fk_index_sweep(struct fk_index *ix, uint32_t n)
{
    /* A parent mostly has a lower number than its child, so one pass upwards clears most; the
     * next one goes down, for those that lie the other way round. */
    for (; n && ix->holes; n--) {
        if (ix->sweep_at >= ix->n_entries_used) {
            ix->sweep_step = -ix->sweep_step;
            ix->sweep_at = ix->sweep_step > 0 ? 0 : ix->n_entries_used - 1;
        }
        sweep_entry(ix, ix->sweep_at);
        ix->sweep_at += (uint32_t)ix->sweep_step;
    }
    return ix->holes != 0;
}

/* ---- ticks ---- */

static uint32_t less(uint32_t tick, uint32_t by)
{
    return tick > by ? tick - by : 0;
}

static void rebuild(struct fk_lane *lane, struct fk_heap *h)
{
    uint32_t n = h->len;

    h->len = 0;
    for (uint32_t i = 0; i < n; i++) {      /* a push writes at most to where we have read */
        uint32_t entry = h->items[i].entry;
        fk_heap_push(h, lane->ops->score(lane, &lane->index->entries[entry]), entry);
    }
}

void fk_index_rebase(struct fk_index *ix, uint32_t by)
{
    bool rank_is_tick = !fk_policy_ops(ix->policy.kind)->rank_counts;

    for (uint32_t i = 0; i < ix->n_entries_used; i++) {
        ix->entries[i].atime = less(ix->entries[i].atime, by);
        if (rank_is_tick)
            ix->entries[i].rank = less(ix->entries[i].rank, by);
    }
    for (uint32_t g = 0; g < ix->n_groups; g++) {
        for (int t = 0; t < FK_TIERS; t++) {
            struct fk_lane *lane = &ix->groups[g].lane[t];
            if (lane->ops->rebase)
                lane->ops->rebase(lane, by);
            rebuild(lane, &lane->heap[0]);
            rebuild(lane, &lane->heap[1]);
        }
    }
}

/* ---- self-check ---- */

static _Thread_local char wrong[200];
#define WRONG(...) (snprintf(wrong, sizeof(wrong), __VA_ARGS__), wrong)

struct check_counts {
    uint32_t children, tier_children[FK_TIERS];
};

static const char *check_residency(const struct fk_index *ix, const struct fk_entry *e,
                                   uint32_t i, enum fk_tier t)
{
    const struct fk_slots *slots = &ix->spaces[ix->groups[e->group].space].slots[t];
    enum fk_residency r = fk_entry_in(e, t);

    if (r == FK_ABSENT)
        return e->slot[t] == FK_NONE ? NULL : WRONG("entry %u tier %d: absent with slot", i, t);
    if (e->slot[t] >= slots->n)
        return WRONG("entry %u tier %d: slot %u out of range", i, t, e->slot[t]);
    if (fk_slots_is_free(slots, e->slot[t]))
        return WRONG("entry %u tier %d: holds slot %u, which is free", i, t, e->slot[t]);
    if (r != FK_READY && !e->pins)
        return WRONG("entry %u tier %d: filling or lost, but not pinned", i, t);
    bool want = r == FK_READY && !e->tier_children[t] && !e->pins;
    bool in = r == FK_READY && e->pos[t] != FK_NONE;
    if (want != in)
        return WRONG("entry %u tier %d: evictable %d, in heap %d", i, t, want, in);
    return NULL;
}

static const char *check_entry(const struct fk_index *ix, uint32_t i, const struct check_counts *c)
{
    const struct fk_entry *e = &ix->entries[i];
    bool doomed = e->state & FK_ENTRY_DOOMED;

    if (e->children != c->children)
        return WRONG("entry %u: %u children, %u counted", i, e->children, c->children);
    for (int t = 0; t < FK_TIERS; t++) {
        if (e->tier_children[t] != c->tier_children[t])
            return WRONG("entry %u tier %d: %u children, %u counted", i, t,
                         e->tier_children[t], c->tier_children[t]);
        const char *w = check_residency(ix, e, i, (enum fk_tier)t);
        if (w)
            return w;
    }
    if (!doomed && fk_index_find(ix, e->key) != i)
        return WRONG("entry %u: not found by its key", i);
    bool empty = fk_entry_in(e, FK_TIER_CPU) == FK_ABSENT &&
                 fk_entry_in(e, FK_TIER_SSD) == FK_ABSENT;
    if (empty && !e->pins && !e->children)
        return WRONG("entry %u: holds nothing, but is there", i);
    if (!doomed && !e->pins && empty != !!(e->state & FK_ENTRY_HOLE))
        return WRONG("entry %u: hole flag wrong", i);
    return NULL;
}

static const char *check_groups(const struct fk_index *ix, const uint32_t (*used)[FK_TIERS],
                                const uint32_t (*resident)[FK_TIERS])
{
    for (uint32_t s = 0; s < ix->n_spaces; s++) {
        for (int t = 0; t < FK_TIERS; t++) {
            uint32_t held = 0;
            for (uint32_t g = 0; g < ix->n_groups; g++)
                held += ix->groups[g].space == s ? ix->groups[g].used[t] : 0;
            if (held + ix->spaces[s].slots[t].n_free != ix->spaces[s].slots[t].n)
                return WRONG("space %u tier %d: %u held + %u free != %u", s, t, held,
                             ix->spaces[s].slots[t].n_free, ix->spaces[s].slots[t].n);
        }
    }
    for (uint32_t g = 0; g < ix->n_groups; g++) {
        for (int t = 0; t < FK_TIERS; t++) {
            if (ix->groups[g].used[t] != used[g][t])
                return WRONG("group %u tier %d: %u slots used, %u counted", g, t,
                             ix->groups[g].used[t], used[g][t]);
            if (ix->groups[g].lane[t].resident != resident[g][t])
                return WRONG("group %u tier %d: resident count wrong", g, t);
        }
    }
    return NULL;
}

static const char *check_heaps(const struct fk_index *ix)
{
    for (uint32_t g = 0; g < ix->n_groups; g++) {
        for (int t = 0; t < FK_TIERS; t++) {
            for (int k = 0; k < 2; k++) {
                const struct fk_heap *h = &ix->groups[g].lane[t].heap[k];
                for (uint32_t i = 0; i < h->len; i++) {
                    if (i && h->items[(i - 1) / 2].score > h->items[i].score)
                        return WRONG("group %u tier %d: heap %d out of order", g, t, k);
                    if (ix->entries[h->items[i].entry].pos[t] != (i | h->pos_bit))
                        return WRONG("group %u tier %d: heap %d place wrong", g, t, k);
                }
            }
        }
    }
    return NULL;
}

const char *fk_index_check(const struct fk_index *ix)
{
    struct check_counts *counts = calloc(ix->n_entries_used + 1, sizeof(*counts));
    uint32_t (*used)[FK_TIERS] = calloc(FK_MAX_GROUPS, sizeof(*used));
    uint32_t (*resident)[FK_TIERS] = calloc(FK_MAX_GROUPS, sizeof(*resident));
    const char *w = NULL;
    uint32_t live = 0, holes = 0;

    if (!counts || !used || !resident)
        goto out;
    for (uint32_t i = 0; i < ix->n_entries_used && !w; i++) {
        const struct fk_entry *e = &ix->entries[i];
        if (!(e->state & FK_ENTRY_USED))
            continue;
        live++;
        holes += !!(e->state & FK_ENTRY_HOLE);
        for (int t = 0; t < FK_TIERS; t++) {
            enum fk_residency r = fk_entry_in(e, (enum fk_tier)t);
            used[e->group][t] += r != FK_ABSENT;
            resident[e->group][t] += r == FK_READY;
            if (e->parent != FK_NONE)
                counts[e->parent].tier_children[t] += r == FK_READY || r == FK_FILLING;
        }
        if (e->parent == FK_NONE)
            continue;
        const struct fk_entry *p = &ix->entries[e->parent];
        counts[e->parent].children++;
        if (!(p->state & FK_ENTRY_USED) ||
            ((p->state & FK_ENTRY_DOOMED) && !(e->state & FK_ENTRY_DOOMED)))
            w = WRONG("entry %u: its parent %u is not in the table", i, e->parent);
    }
    for (uint32_t i = 0; i < ix->n_entries_used && !w; i++)
        if (ix->entries[i].state & FK_ENTRY_USED)
            w = check_entry(ix, i, &counts[i]);
    if (!w)
        w = check_groups(ix, (const uint32_t (*)[FK_TIERS])used,
                         (const uint32_t (*)[FK_TIERS])resident);
    if (!w)
        w = check_heaps(ix);
    if (!w && (live != ix->n_live || holes != ix->holes))
        w = WRONG("%u live, %u counted; %u holes, %u counted", ix->n_live, live, ix->holes, holes);
out:
    free(counts);
    free(used);
    free(resident);
    return w;
}
