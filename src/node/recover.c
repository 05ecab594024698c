/*
 * recover.c - fills the index from what the SSD's slot table held at start. See core.h.
 *
 * Records come in any order. Each is put in after its parent; a block whose ancestors are not
 * all there is dropped, since nothing could ever match it.
 */
#include "base/plant.h"
#include "node/core_impl.h"

enum { NEW, ON_PATH, PLACED, DROPPED };

struct recovery {
    struct fk_core *core;
    const struct fk_core_found *found;
    uint32_t n, space, mask;
    uint32_t *table;                /* key -> record, open addressing */
    uint32_t *entry;                /* of each placed record */
    uint32_t *path;                 /* records from a child up to a placed ancestor */
    uint8_t *state;
    uint64_t first_seq;
    unsigned seq_shift;             /* write order -> ticks that fit 31 bits */
    int64_t placed;
};

static uint32_t *table_place(const struct recovery *r, struct fk_key key)
{
    uint32_t at = (uint32_t)((key.lo ^ (key.hi >> 7)) * 0x9e3779b97f4a7c15ull >> 32) & r->mask;

    while (r->table[at] != FK_NONE && !fk_key_equal(r->found[r->table[at]].key, key))
        at = (at + 1) & r->mask;
    return &r->table[at];
}

static int set_up(struct recovery *r)
{
    uint64_t size = 64, last_seq = 0;

    while (size < 2ull * r->n)
        size *= 2;
    r->mask = (uint32_t)(size - 1);
    r->table = malloc(size * sizeof(*r->table));
    r->entry = malloc((r->n + 1) * sizeof(*r->entry));
    r->path = malloc((r->n + 1) * sizeof(*r->path));
    r->state = calloc(r->n + 1, 1);
    if (!r->table || !r->entry || !r->path || !r->state)
        return -ENOMEM;
    memset(r->table, 0xff, size * sizeof(*r->table));
    r->first_seq = UINT64_MAX;
    for (uint32_t i = 0; i < r->n; i++) {
        uint32_t *at = table_place(r, r->found[i].key);
        if (*at == FK_NONE || (r->found[i].seq > r->found[*at].seq) == !FK_BUG(8))
            *at = i;
        r->first_seq = fk_min(r->first_seq, r->found[i].seq);
        last_seq = fk_max(last_seq, r->found[i].seq);
    }
    while (r->n && (last_seq - r->first_seq) >> r->seq_shift >= 1u << 30)
        r->seq_shift++;
    return 0;
}

static uint32_t group_of_tag(const struct recovery *r, uint32_t tag)
{
    const struct fk_index *ix = &r->core->ix;

    for (uint32_t g = 0; g < ix->n_groups; g++)
        if (ix->groups[g].space == r->space && r->core->group_tags[g] == tag)
            return g;
    return ix->spaces[r->space].default_group;
}

static bool place(struct recovery *r, uint32_t i, uint32_t parent)
{
    const struct fk_core_found *f = &r->found[i];
    struct fk_index *ix = &r->core->ix;
    uint32_t group = group_of_tag(r, f->tag);
    uint32_t tick = (uint32_t)((f->seq - r->first_seq) >> r->seq_shift) + 1;

    if (!fk_slots_take_at(&ix->spaces[r->space].slots[FK_TIER_SSD], f->slot))
        return false;
    ix->groups[group].used[FK_TIER_SSD]++;
    uint32_t entry = fk_index_add(ix, f->key, parent, group, tick);
    if (entry == FK_NONE) {
        fk_index_return_slot(ix, group, FK_TIER_SSD, f->slot);
        return false;
    }
    fk_index_fill(ix, entry, FK_TIER_SSD, f->slot);
    fk_index_ready(ix, entry, FK_TIER_SSD, tick);
    fk_index_unpin(ix, entry);
    r->entry[i] = entry;
    r->placed++;
    r->core->tick = fk_max(r->core->tick, tick);
    return true;
}

/* Is this record the one that stands for its key? */
static bool is_current(const struct recovery *r, uint32_t i)
{
    return *table_place(r, r->found[i].key) == i;
}

/* Goes up to an ancestor that is placed (or to the chain's start), then places downwards. */
static void place_chain(struct recovery *r, uint32_t i)
{
    uint32_t len = 0, parent = FK_NONE;
    bool whole = false;

    while (r->state[i] == NEW) {
        r->state[i] = ON_PATH;
        r->path[len++] = i;
        if (fk_key_is_zero(r->found[i].parent)) {
            whole = true;
            break;
        }
        i = *table_place(r, r->found[i].parent);
        if (i == FK_NONE)
            break;
    }
    if (!whole && i != FK_NONE && r->state[i] == PLACED) {
        whole = true;
        parent = r->entry[i];
    }
    while (len) {
        uint32_t at = r->path[--len];
        whole = whole && place(r, at, parent);
        r->state[at] = whole ? PLACED : DROPPED;
        parent = whole ? r->entry[at] : FK_NONE;
    }
}

/* What was not placed is emptied in the table as well, lest it comes back half known. */
static void forget_rest(struct recovery *r)
{
    for (uint32_t i = 0; i < r->n; i++) {
        if (r->state[i] == PLACED)
            continue;
        struct fk_core_ssd_req req = { .kind = FK_SSD_FORGET, .space = r->space,
                                       .ssd_slot = r->found[i].slot };
        (void)fifo_push(&r->core->writes, req);
    }
}

/* Records of evicted blocks stay until their slot is used again, so more may be found than a
 * namespace may hold. */
static void shrink_to_quotas(struct recovery *r)
{
    struct fk_index *ix = &r->core->ix;

    for (uint32_t g = 0; g < ix->n_groups; g++) {
        struct fk_group *group = &ix->groups[g];
        while (group->space == r->space && group->used[FK_TIER_SSD] > group->max[FK_TIER_SSD]) {
            uint32_t victim = fk_index_victim(ix, g, FK_TIER_SSD, r->core->tick);
            if (victim == FK_NONE)
                break;
            fk_index_drop(ix, victim, FK_TIER_SSD, true);
            r->placed--;
        }
    }
}

int64_t fk_core_recover(struct fk_core *core, uint32_t space, const struct fk_core_found *found,
                        uint32_t n)
{
    struct recovery r = { .core = core, .found = found, .n = n, .space = space };
    int rc = set_up(&r);

    for (uint32_t i = 0; rc == 0 && i < n; i++)
        if (is_current(&r, i) && r.state[i] == NEW)
            place_chain(&r, i);
    if (rc == 0) {
        forget_rest(&r);
        shrink_to_quotas(&r);
    }
    free(r.table);
    free(r.entry);
    free(r.path);
    free(r.state);
    return rc ? rc : r.placed;
}
