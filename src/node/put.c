/*
 * put.c - a put: which blocks are new, room for them, entries, one copy job. See core.h.
 *
 * Known blocks of a chain are a leading part (index.h), so a put looks like
 *      [known ... known] [new ... new]         first known holes are filled as well
 * and the last known one is pinned while room is made, which keeps its ancestors too.
 */
#include "node/core_impl.h"

#define PUT_PORTION 16u             /* blocks that room is made for at a time */
#define PUT_AHEAD 8u                /* blocks whose place in the table is fetched ahead */

/* Is this known block's place in the cpu tier to be filled by a put? */
static bool wants_bytes(struct fk_core *core, const struct fk_entry *e)
{
    return fk_entry_in(e, FK_TIER_CPU) == FK_ABSENT && !fk_entry_visible(&core->ix, e);
}

struct plan {
    uint32_t group;
    const struct fk_key *keys;      /* of the put's blocks, from its first on */
    uint32_t *entries;              /* of the same; FK_NONE: new */
    uint32_t n, n_known, n_wanted;
    uint32_t parent;                /* entry before the first block, or FK_NONE */
    uint32_t anchor;                /* the last known entry: pinned while the plan is used */
    uint32_t first;                 /* position of the first block in its chain */
    uint32_t *slots;                /* the caller's, or NULL */
};

/* The put ends before a key of another space. */
static void cut_known(struct fk_core *core, uint32_t space, struct plan *p)
{
    uint32_t i = 0;

    while (i < p->n_known &&
           core->ix.groups[core->ix.entries[p->entries[i]].group].space == space)
        i++;
    if (i < p->n_known)
        p->n = p->n_known = i;
}

static int make_plan(struct fk_core *core, uint32_t space, struct plan *p)
{
    if (fk_vec_reserve(&core->scratch, p->n))
        return -ENOMEM;
    p->entries = core->scratch.data;
    p->parent = FK_NONE;
    if (p->first) {
        p->parent = fk_index_find(&core->ix, p->keys[-1]);
        if (p->parent == FK_NONE ||
            core->ix.groups[core->ix.entries[p->parent].group].space != space)
            return -ENOENT;
    }
    p->n_known = fk_index_known(&core->ix, p->keys, p->n, p->entries);
    cut_known(core, space, p);
    p->n_wanted = p->n - p->n_known;
    for (uint32_t i = 0; i < p->n_known; i++)
        p->n_wanted += wants_bytes(core, &core->ix.entries[p->entries[i]]);
    p->anchor = p->n_known ? p->entries[p->n_known - 1] : p->parent;
    if (p->anchor != FK_NONE)
        fk_index_pin(&core->ix, p->anchor);
    return 0;
}

/*
 * How many of the wanted blocks get a place. Room is made for a portion at a time, because what
 * the policy would give up for the next portion gets more valuable with each.
 */
static uint32_t room_for(struct fk_core *core, const struct plan *p)
{
    struct fk_index *ix = &core->ix;
    uint32_t reserve = core->spaces[ix->groups[p->group].space].reserve;
    uint32_t room = fk_index_room(ix, p->group, FK_TIER_CPU, p->n_wanted, reserve);
    struct fk_newcomers nc = {
        .keys = p->keys + p->n_known, .n = p->n - p->n_known, .room = fk_min(room, p->n - p->n_known),
        .anchor = p->anchor == FK_NONE ? NULL : &ix->entries[p->anchor],
    };
    uint32_t admitted = fk_index_admit(ix, p->group, FK_TIER_CPU, &nc, core->tick);
    bool picky = ix->groups[p->group].lane[FK_TIER_CPU].ops->admit != NULL;

    uint32_t refills = p->n_wanted - (p->n - p->n_known);   /* of holes: nobody asks if they may */
    while (room < p->n_wanted && admitted + refills > nc.room) {
        uint32_t want = picky ? fk_min(room + PUT_PORTION, p->n_wanted) : p->n_wanted;
        room = core_make_room(core, p->group, FK_TIER_CPU, want, reserve);
        if (room < want)
            break;
        nc = (struct fk_newcomers){ .n = p->n_wanted, .room = room, .anchor = nc.anchor };
        if (room < p->n_wanted)
            admitted = fk_index_admit(ix, p->group, FK_TIER_CPU, &nc, core->tick);
    }
    return room;
}

/* Hands out slots in runs. */
struct slot_source { uint32_t next, left; };

static uint32_t next_slot(struct fk_core *core, uint32_t group, struct slot_source *s,
                          uint32_t want)
{
    if (!s->left)
        s->left = fk_index_take_slots(&core->ix, group, FK_TIER_CPU, want, &s->next);
    if (!s->left)
        return FK_NONE;
    s->left--;
    return s->next++;
}

/* Entry and slot for block i; false: no memory for more entries, no slot, or no such chain. */
static bool place_block(struct fk_core *core, struct plan *p, struct op *op, uint32_t i,
                        struct slot_source *slots, uint32_t want)
{
    struct fk_index *ix = &core->ix;
    uint32_t parent = i ? p->entries[i - 1] : p->parent, slot;

    if (i >= p->n_known && fk_unlikely(fk_index_find(ix, p->keys[i]) != FK_NONE))
        return false;               /* known under another parent: no chain */
    /* A refilled block keeps its group: its slot is counted there. */
    uint32_t group = i < p->n_known ? ix->entries[p->entries[i]].group : p->group;
    if (group != p->group) {
        if (!fk_index_room(ix, group, FK_TIER_CPU, 1, 0) ||
            !fk_index_take_slots(ix, group, FK_TIER_CPU, 1, &slot))
            return false;
    } else if ((slot = next_slot(core, group, slots, want)) == FK_NONE) {
        return false;
    }
    if (i < p->n_known) {
        fk_index_pin(ix, p->entries[i]);
    } else {
        p->entries[i] = fk_index_add(ix, p->keys[i], parent, group, core->tick);
        if (p->entries[i] == FK_NONE) {
            fk_index_return_slot(ix, group, FK_TIER_CPU, slot);
            return false;
        }
    }
    fk_index_fill(ix, p->entries[i], FK_TIER_CPU, slot);
    fk_index_placed(ix, p->entries[i], p->anchor, p->n - 1 - i);
    op->blocks[i].entry = p->entries[i];
    return true;
}

static void place_blocks(struct fk_core *core, struct plan *p, struct op *op, struct job *j,
                         uint32_t room)
{
    struct slot_source slots = { 0, 0 };
    uint32_t i;

    for (i = 0; i < p->n; i++) {
        bool wanted = i >= p->n_known || wants_bytes(core, &core->ix.entries[p->entries[i]]);
        op->blocks[i].state = BLK_DONE;
        if (i + PUT_AHEAD < p->n)
            fk_index_prefetch_key(&core->ix, p->keys[i + PUT_AHEAD]);
        if (!wanted)
            continue;
        if (!room || !place_block(core, p, op, i, &slots, room))
            break;
        room--;
        if (p->slots)
            p->slots[i] = core->ix.entries[p->entries[i]].slot[FK_TIER_CPU];
        core_job_add(core, j, op, i);
    }
    for (; slots.left; slots.left--)
        fk_index_return_slot(&core->ix, p->group, FK_TIER_CPU, slots.next++);
    for (; i < p->n; i++)
        core_op_block_fail(core, op, i, -ENOSPC);
    for (; i < op->n; i++)
        core_op_block_fail(core, op, i, -EINVAL);
}

static void fail_all(struct fk_core *core, struct op *op, int status)
{
    for (uint32_t i = 0; i < op->n; i++)
        core_op_block_fail(core, op, i, status);
}

int fk_core_put(struct fk_core *core, uint32_t instance, uint32_t group, const struct fk_key *keys,
                uint32_t n, uint32_t first, const struct fk_core_op_args *args, uint64_t now_us,
                uint64_t *id)
{
    if (first > n)
        return -EINVAL;
    struct plan p = { .group = group, .keys = keys + first, .n = n - first, .first = first,
                      .anchor = FK_NONE, .slots = args->slots };
    struct op *op = core_op_new(core, FLEXKV_OP_PUT, instance, p.n, args, now_us, id);
    if (!op)
        return -ENOMEM;
    op->group = group;
    op->next = p.n;         /* a put has nothing to start later */
    for (uint32_t i = 0; i < p.n; i++)
        op->blocks[i] = (struct op_block){ .entry = FK_NONE, .page = args->pages[i] };
    if (p.slots && p.n)
        memset(p.slots, 0xff, p.n * sizeof(*p.slots));
    core_tick_now(core, now_us);
    core->stats.puts++;

    int rc = make_plan(core, op->space, &p);
    struct job *j = NULL;
    if (rc == 0 && p.n_wanted && !(j = core_job_new(core, op, p.n_wanted)))
        rc = -ENOMEM;
    if (rc)
        fail_all(core, op, rc);
    else
        place_blocks(core, &p, op, j, p.n_wanted ? room_for(core, &p) : 0);
    if (p.anchor != FK_NONE)
        fk_index_unpin(&core->ix, p.anchor);
    if (j && j->pub.n) {
        core_job_start(core, j, op);
    } else if (j) {
        core_job_unused(core, j, op);
    }
    core_op_pump(core, op);
    core_evict_ahead(core);
    return 0;
}
