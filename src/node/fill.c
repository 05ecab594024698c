/*
 * fill.c - fills: blocks on their way into cpu slots, from SSD or from elsewhere (peers, a shared store), and those
 * who wait for them; and what is lent to others. See core.h, core_impl.h.
 *
 *   begun (slot, FILLING) -> queued -> taken by the shell -> done: READY, or failed
 *                              '-> nobody waits any more: abandoned
 *   A fetch that failed while something may still write to its slot is *late*: its waiters are told at once, the
 *   slot is LOST until the shell says that it is left alone.
 */
#include "base/plant.h"
#include "node/core_impl.h"

#define FETCH_ENTRIES_MIN 4096u         /* entries for blocks that are nowhere here yet */
#define LOAN_PINS_MAX (UINT16_MAX - 32)

static uint32_t fill_new(struct fk_core *core, uint32_t entry, uint32_t space, enum fill_source from)
{
    uint32_t at;

    if (core->free_fills.len) {
        at = core->free_fills.data[--core->free_fills.len];
    } else {
        if (fk_vec_reserve(&core->free_fills, core->fills.len + 1) ||
            fk_vec_push(&core->fills, (struct fill){ 0 }))
            return FK_NONE;
        at = (uint32_t)core->fills.len - 1;
    }
    struct fill *f = &core->fills.data[at];
    core->spaces[space].n_fills[from]++;
    *f = (struct fill){ .gen = f->gen + 1, .entry = entry, .space = space, .from = (uint8_t)from,
                        .head_op = FK_NONE };
    return at;
}

static void fill_free(struct fk_core *core, uint32_t at)
{
    struct fill *f = &core->fills.data[at];

    core->spaces[f->space].n_fills[f->from]--;
    f->gen++;
    core->free_fills.data[core->free_fills.len++] = at;
}

uint64_t core_fill_id(const struct fk_core *core, uint32_t at)
{
    return (uint64_t)(core->fills.data[at].gen & INT32_MAX) << 32 | (at + 1);
}

static struct fill *fill_find(const struct fk_core *core, uint64_t id)
{
    uint32_t at = (uint32_t)id - 1;

    if (!id || at >= core->fills.len || !(core->fills.data[at].gen & 1) || core_fill_id(core, at) != id)
        return NULL;
    return &core->fills.data[at];
}

/* ---- beginning ---- */

static void queue_fill(struct fk_core *core, uint32_t at)
{
    const struct fill *f = &core->fills.data[at];

    (void)fifo_push(&core->fill_queue[f->from][f->high], at);
}

void core_fill_join(struct fk_core *core, struct op *op, uint32_t block)
{
    struct op_block *b = &op->blocks[block];
    uint32_t at = core->ix.entries[b->entry].pos[FK_TIER_CPU];
    struct fill *f = &core->fills.data[at];

    b->next_op = f->head_op;
    b->next_block = f->head_block;
    f->head_op = core_op_number(core, op);
    f->head_block = block;
    b->state = BLK_WAIT;
    op->n_wait++;
    if (op->kind == FLEXKV_OP_GET && !f->high) {    /* a get does not wait behind prefetches */
        f->high = true;
        if (!f->issued)
            queue_fill(core, at);
    }
}

/* One block: its slot, its fill, its place in the queue. */
static bool fill_begin(struct fk_core *core, struct op *op, uint32_t block, uint32_t slot)
{
    uint32_t entry = op->blocks[block].entry;
    bool on_ssd = fk_entry_on_ssd(&core->ix, &core->ix.entries[entry]);
    uint32_t at = fill_new(core, entry, op->space, on_ssd ? FILL_SSD : FILL_ELSEWHERE);

    if (at == FK_NONE)
        return false;
    fk_index_pin(&core->ix, entry);
    fk_index_fill(&core->ix, entry, FK_TIER_CPU, slot);
    core->ix.entries[entry].pos[FK_TIER_CPU] = at;
    if (op->kind != FLEXKV_OP_GET)
        queue_fill(core, at);
    core_fill_join(core, op, block);
    return true;
}

uint32_t core_fill_start(struct fk_core *core, struct op *op, const uint32_t *blocks, uint32_t n)
{
    struct core_space *sp = &core->spaces[op->space];
    uint32_t reserve = op->kind == FLEXKV_OP_GET ? 0 : sp->reserve, i = 0;

    while (i < n) {
        uint32_t group = core->ix.entries[op->blocks[blocks[i]].entry].group, slot;
        uint32_t room = core_make_room(core, group, FK_TIER_CPU, n - i, reserve);
        uint32_t got = room ? fk_index_take_slots(&core->ix, group, FK_TIER_CPU, room, &slot) : 0;
        uint32_t before = i;
        for (; got; got--, slot++) {
            if (i < n && core->ix.entries[op->blocks[blocks[i]].entry].group == group &&
                fill_begin(core, op, blocks[i], slot))
                i++;
            else
                fk_index_return_slot(&core->ix, group, FK_TIER_CPU, slot);
        }
        if (i == before)
            break;
    }
    return i;
}

/* Nobody waits any more and nothing has been asked for yet. */
static void fill_abandon(struct fk_core *core, uint32_t at)
{
    uint32_t entry = core->fills.data[at].entry;

    fill_free(core, at);
    if (fk_entry_in(&core->ix.entries[entry], FK_TIER_CPU) == FK_FILLING)
        fk_index_unfill(&core->ix, entry, FK_TIER_CPU);
    fk_index_unpin(&core->ix, entry);
    core->room_changed = true;
}

static bool take(struct fk_core *core, uint32_t at, enum fill_source from)
{
    struct fill *f = &core->fills.data[at];

    if (!(f->gen & 1) || f->issued || f->from != from)
        return false;           /* it went through the other queue */
    if (f->head_op == FK_NONE) {
        fill_abandon(core, at);
        return false;
    }
    f->issued = true;
    return true;
}

uint32_t core_fill_take(struct fk_core *core, enum fill_source from)
{
    for (int high = 1; high >= 0; high--) {
        while (!fifo_empty(&core->fill_queue[from][high])) {
            uint32_t at = *fifo_front(&core->fill_queue[from][high]);
            fifo_pop(&core->fill_queue[from][high]);
            if (take(core, at, from))
                return at;
        }
    }
    return FK_NONE;
}

bool core_fills_queued(const struct fk_core *core, enum fill_source from)
{
    return !fifo_empty(&core->fill_queue[from][0]) || !fifo_empty(&core->fill_queue[from][1]);
}

/* ---- ending ---- */

/* The SSD copy is no good: it is not offered again, also not after a restart. */
static void lose_ssd_copy(struct fk_core *core, struct fk_entry *e, uint32_t space)
{
    struct fk_core_ssd_req req = { .kind = FK_SSD_FORGET, .space = space,
                                   .ssd_slot = e->slot[FK_TIER_SSD] };

    core->stats.ssd.errors++;
    (void)fifo_push(&core->writes, req);
    fk_index_drop(&core->ix, fk_entry_number(&core->ix, e), FK_TIER_SSD, false);
}

static void mark_touched(struct fk_core *core, uint32_t op_number)
{
    struct op *op = &core->ops.data[op_number];

    if (!op->touched && fk_vec_push(&core->touched, op_number) == 0)
        op->touched = true;
}

static void wake_waiters(struct fk_core *core, const struct fill *f, int status)
{
    uint32_t op_number = f->head_op, block = f->head_block;

    while (op_number != FK_NONE) {
        struct op *op = &core->ops.data[op_number];
        struct op_block *b = &op->blocks[block];
        uint32_t next_op = b->next_op, next_block = b->next_block;
        op->n_wait--;
        mark_touched(core, op_number);
        if (status && !FK_BUG(7)) {
            core_op_block_fail(core, op, block, status);
        } else if (op->kind == FLEXKV_OP_GET) {
            b->state = BLK_READY;
            op->n_ready++;
        } else {
            core_op_block_done(core, op, block);
        }
        op_number = next_op;
        block = next_block;
    }
}

/* A bad copy on SSD need not be the end: somebody else may have the block. */
static bool try_elsewhere(struct fk_core *core, uint32_t at)
{
    struct fill *f = &core->fills.data[at];

    if (f->from != FILL_SSD || !core->spaces[f->space].elsewhere || f->head_op == FK_NONE)
        return false;
    core->spaces[f->space].n_fills[FILL_SSD]--;
    core->spaces[f->space].n_fills[FILL_ELSEWHERE]++;
    f->from = FILL_ELSEWHERE;
    f->issued = false;
    queue_fill(core, at);
    return true;
}

static void fill_arrived(struct fk_core *core, const struct fill *f)
{
    struct fk_entry *e = &core->ix.entries[f->entry];

    /* Others have it: as long as it is not used again it goes first. */
    if (f->from == FILL_ELSEWHERE && core->params.copies_go_first) {
        e->atime = e->rank = 0;
        e->freq = 0;
    }
    fk_index_ready(&core->ix, f->entry, FK_TIER_CPU, core->tick);
    core->stats.cpu.stored_blocks++;
    if (f->from == FILL_ELSEWHERE)
        core->stats.peer.stored_blocks++;
}

void core_fill_done(struct fk_core *core, uint32_t at, int status, bool busy)
{
    struct fill f = core->fills.data[at];
    struct fk_entry *e = &core->ix.entries[f.entry];

    if (f.from == FILL_ELSEWHERE && status && status != -ECANCELED)
        core->stats.peer.errors++;
    if (fk_entry_in(e, FK_TIER_CPU) != FK_FILLING) {
        status = status ? status : -ECANCELED;          /* a reset came in between */
    } else if (status == 0) {
        fill_arrived(core, &f);
    } else {
        /* A directory that is out may come back with its blocks. */
        if (f.from == FILL_SSD && status != -ENODEV && fk_entry_in(e, FK_TIER_SSD) == FK_READY)
            lose_ssd_copy(core, e, f.space);
        if (try_elsewhere(core, at))
            return;
        if (busy && !FK_BUG(201))
            fk_index_drop(&core->ix, f.entry, FK_TIER_CPU, false);  /* LOST: the fill's pin keeps the slot */
        else
            fk_index_unfill(&core->ix, f.entry, FK_TIER_CPU);
    }
    wake_waiters(core, &f, status);
    if (busy && !FK_BUG(201)) {
        core->fills.data[at].head_op = FK_NONE;
        core->fills.data[at].late = true;
        return;
    }
    fill_free(core, at);
    fk_index_unpin(&core->ix, f.entry);
}

void core_fills_settle(struct fk_core *core)
{
    core->room_changed = true;
    for (size_t i = 0; i < core->touched.len; i++) {
        struct op *op = &core->ops.data[core->touched.data[i]];
        op->touched = false;
        core_op_pump(core, op);
    }
    core->touched.len = 0;
    core_go_on(core);
}

/* ---- elsewhere ---- */

int fk_core_space_elsewhere(struct fk_core *core, uint32_t space)
{
    struct core_space *sp = &core->spaces[space];

    if (sp->elsewhere)
        return 0;
    int rc = fk_index_reserve(&core->ix, FETCH_ENTRIES_MIN + sp->cpu_slots / 4);
    if (rc)
        return rc;
    sp->elsewhere = true;
    sp->reserve = fk_max(sp->reserve, fk_min(fk_max(sp->cpu_slots / 64, 2u), fk_min(sp->cpu_slots / 4, 256u)));
    return 0;
}

uint32_t fk_core_take_fetches(struct fk_core *core, struct fk_core_fetch *out, uint32_t max)
{
    uint32_t n = 0;

    for (uint32_t at; n < max && (at = core_fill_take(core, FILL_ELSEWHERE)) != FK_NONE; n++) {
        const struct fill *f = &core->fills.data[at];
        const struct fk_entry *e = &core->ix.entries[f->entry];
        out[n] = (struct fk_core_fetch){ .id = core_fill_id(core, at), .space = f->space,
                                         .cpu_slot = e->slot[FK_TIER_CPU], .key = e->key,
                                         .urgent = f->high };
    }
    core_retry_starved(core);
    return n;
}

void fk_core_fetch_done(struct fk_core *core, const struct fk_core_fetch_done *done, uint32_t n,
                        uint64_t now_us)
{
    core_tick_now(core, now_us);
    for (uint32_t i = 0; i < n; i++)
        core_fill_done(core, (uint32_t)done[i].id - 1, done[i].status, done[i].busy);
    core_fills_settle(core);
}

void fk_core_fetch_released(struct fk_core *core, uint64_t id, uint64_t now_us)
{
    struct fill *f = fill_find(core, id);

    if (!f || !f->late)
        return;
    uint32_t entry = f->entry;
    core_tick_now(core, now_us);
    fill_free(core, (uint32_t)id - 1);
    fk_index_unpin(&core->ix, entry);
    core_fills_settle(core);
}

bool fk_core_fetch_wanted(const struct fk_core *core, uint64_t id)
{
    const struct fill *f = fill_find(core, id);

    return f && f->head_op != FK_NONE &&
           fk_entry_in(&core->ix.entries[f->entry], FK_TIER_CPU) == FK_FILLING;
}

/* ---- lending ---- */

int fk_core_lend(struct fk_core *core, uint32_t space, struct fk_key key, enum fk_tier tier, uint32_t *slot,
                 uint32_t *loan)
{
    uint32_t entry = fk_index_find(&core->ix, key);
    struct fk_entry *e = entry == FK_NONE ? NULL : &core->ix.entries[entry];

    if (!e || core->ix.groups[e->group].space != space || fk_entry_in(e, tier) != FK_READY ||
        (tier == FK_TIER_SSD && !fk_entry_on_ssd(&core->ix, e)))
        return -ENOENT;
    if (e->pins >= LOAN_PINS_MAX)
        return -EAGAIN;
    if (!FK_BUG(212))
        fk_index_pin(&core->ix, entry);
    core->n_loans++;
    *slot = e->slot[tier];
    *loan = entry;
    return 0;
}

bool fk_core_loan_good(const struct fk_core *core, uint32_t loan, enum fk_tier tier)
{
    const struct fk_entry *e = &core->ix.entries[loan];

    return !(e->state & FK_ENTRY_DOOMED) && fk_entry_in(e, tier) == FK_READY;
}

uint32_t fk_core_loan_group(const struct fk_core *core, uint32_t loan)
{
    return core->ix.entries[loan].group;
}

void fk_core_loan_bad(struct fk_core *core, uint32_t loan)
{
    struct fk_entry *e = &core->ix.entries[loan];

    if (fk_core_loan_good(core, loan, FK_TIER_SSD))
        lose_ssd_copy(core, e, core->ix.groups[e->group].space);
}

void fk_core_loan_end(struct fk_core *core, uint32_t loan)
{
    core->n_loans--;
    if (!FK_BUG(212))
        fk_index_unpin(&core->ix, loan);
    core->room_changed = true;
    core_retry_starved(core);
}
