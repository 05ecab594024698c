/*
 * ssd.c - blocks on their way from and to the SSD: fills, write-back, the requests the tier
 * takes and the answers it gives. See core.h, core_impl.h.
 */
#include "base/plant.h"
#include "node/core_impl.h"

#define WRITE_ID (1ull << 63)

/* ---- fills ---- */

static uint32_t fill_new(struct fk_core *core, uint32_t entry, uint32_t space)
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
    core->spaces[space].n_fills++;
    *f = (struct fill){ .gen = f->gen + 1, .entry = entry, .space = space, .head_op = FK_NONE };
    return at;
}

static void fill_free(struct fk_core *core, uint32_t at)
{
    core->spaces[core->fills.data[at].space].n_fills--;
    core->fills.data[at].gen++;
    core->free_fills.data[core->free_fills.len++] = at;
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
            (void)fifo_push(&core->reads_high, at);
    }
}

/* One block: its slot, its fill, its place in the queue. */
static bool fill_begin(struct fk_core *core, struct op *op, uint32_t block, uint32_t slot)
{
    uint32_t entry = op->blocks[block].entry;
    uint32_t at = fill_new(core, entry, op->space);

    if (at == FK_NONE)
        return false;
    fk_index_pin(&core->ix, entry);
    fk_index_fill(&core->ix, entry, FK_TIER_CPU, slot);
    core->ix.entries[entry].pos[FK_TIER_CPU] = at;
    if (op->kind != FLEXKV_OP_GET)
        (void)fifo_push(&core->reads_low, at);
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

/* Nobody waits any more and nothing has been asked of the disk yet. */
static void fill_abandon(struct fk_core *core, uint32_t at)
{
    uint32_t entry = core->fills.data[at].entry;

    fill_free(core, at);
    if (fk_entry_in(&core->ix.entries[entry], FK_TIER_CPU) == FK_FILLING)
        fk_index_unfill(&core->ix, entry, FK_TIER_CPU);
    fk_index_unpin(&core->ix, entry);
    core->room_changed = true;
}

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

static void fill_done(struct fk_core *core, uint64_t id, int status)
{
    uint32_t at = (uint32_t)id - 1;
    struct fill f = core->fills.data[at];
    struct fk_entry *e = &core->ix.entries[f.entry];

    if (fk_entry_in(e, FK_TIER_CPU) != FK_FILLING) {
        status = status ? status : -ECANCELED;          /* a reset came in between */
    } else if (status == 0) {
        fk_index_ready(&core->ix, f.entry, FK_TIER_CPU, core->tick);
        core->stats.cpu.stored_blocks++;
    } else {
        fk_index_unfill(&core->ix, f.entry, FK_TIER_CPU);
        /* A directory that is out may come back with its blocks. */
        if (status != -ENODEV && fk_entry_in(e, FK_TIER_SSD) == FK_READY)
            lose_ssd_copy(core, e, f.space);
    }
    fill_free(core, at);
    wake_waiters(core, &f, status);
    fk_index_unpin(&core->ix, f.entry);
}

/* ---- writes ---- */

static bool wants_write(struct fk_core *core, uint32_t entry)
{
    const struct fk_entry *e = &core->ix.entries[entry];

    return fk_entry_in(e, FK_TIER_CPU) == FK_READY && fk_entry_in(e, FK_TIER_SSD) == FK_ABSENT &&
           !(e->state & FK_ENTRY_DOOMED) && e->pins < UINT16_MAX;
}

static void write_begin(struct fk_core *core, struct core_space *sp, uint32_t space,
                        uint32_t entry, uint32_t slot)
{
    struct fk_core_ssd_req req = { .kind = FK_SSD_WRITE, .space = space,
                                   .id = WRITE_ID | entry };

    fk_index_pin(&core->ix, entry);
    fk_index_fill(&core->ix, entry, FK_TIER_SSD, slot);
    if (fifo_push(&core->writes, req)) {
        fk_index_unfill(&core->ix, entry, FK_TIER_SSD);
        fk_index_unpin(&core->ix, entry);
        return;
    }
    sp->backlog++;
}

/* A run of blocks of one group, all wanted. Returns how many were taken. */
static uint32_t write_run(struct fk_core *core, uint32_t group, const uint32_t *entries, uint32_t n)
{
    struct fk_index *ix = &core->ix;
    uint32_t space = ix->groups[group].space, i = 0;
    struct core_space *sp = &core->spaces[space];
    uint32_t anchor = ix->entries[entries[0]].parent;

    n = fk_min(n, sp->backlog_max - fk_min(sp->backlog, sp->backlog_max));
    uint32_t room = fk_index_room(ix, group, FK_TIER_SSD, n, 0);
    struct fk_newcomers nc = { .n = n, .room = room };
    if (room < n)
        n = fk_index_admit(ix, group, FK_TIER_SSD, &nc, core->tick);
    if (!n)
        return 0;
    /* The run may not push its own parent, or itself, out. */
    for (uint32_t k = 0; k < n; k++)
        fk_index_pin(ix, entries[k]);
    if (anchor != FK_NONE)
        fk_index_pin(ix, anchor);
    room = core_make_room(core, group, FK_TIER_SSD, n, 0);
    while (i < room) {
        uint32_t slot, got = fk_index_take_slots(ix, group, FK_TIER_SSD, room - i, &slot);
        if (!got)
            break;
        for (; got; got--, i++)
            write_begin(core, sp, space, entries[i], slot++);
    }
    if (anchor != FK_NONE)
        fk_index_unpin(ix, anchor);
    for (uint32_t k = n; k-- > 0;)
        fk_index_unpin(ix, entries[k]);
    return i;
}

void core_write_blocks(struct fk_core *core, const uint32_t *entries, uint32_t n)
{
    uint32_t i = 0;

    while (i < n) {
        if (!wants_write(core, entries[i])) {
            i++;
            continue;
        }
        uint32_t group = core->ix.entries[entries[i]].group, run = 1;
        if (!core->spaces[core->ix.groups[group].space].ssd_slots)
            return;
        while (i + run < n && core->ix.entries[entries[i + run]].group == group &&
               wants_write(core, entries[i + run]))
            run++;
        uint32_t taken = write_run(core, group, entries + i, run);
        if (taken < run)        /* no room: children without their parents are of no use */
            return;
        i += run;
    }
}

static void write_done(struct fk_core *core, uint64_t id, int status)
{
    uint32_t entry = (uint32_t)id;
    struct fk_entry *e = &core->ix.entries[entry];
    bool stored = false;

    core->spaces[core->ix.groups[e->group].space].backlog--;
    if (fk_entry_in(e, FK_TIER_SSD) == FK_FILLING) {
        stored = status == 0;
        if (stored) {
            fk_index_ready(&core->ix, entry, FK_TIER_SSD, core->tick);
            core->stats.ssd.stored_blocks++;
        } else {
            fk_index_unfill(&core->ix, entry, FK_TIER_SSD);
            core->stats.ssd.errors++;
        }
    }
    fk_index_unpin(&core->ix, entry);
    if (stored)             /* else the entry may be gone */
        core_evict_cleaned(core, entry);
}

/* ---- the queues ---- */

static bool take_read(struct fk_core *core, uint32_t at, struct fk_core_ssd_req *out)
{
    struct fill *f = &core->fills.data[at];

    if (!(f->gen & 1) || f->issued)
        return false;           /* it went through the other queue */
    if (f->head_op == FK_NONE) {
        fill_abandon(core, at);
        return false;
    }
    const struct fk_entry *e = &core->ix.entries[f->entry];
    f->issued = true;
    *out = (struct fk_core_ssd_req){
        .kind = FK_SSD_READ, .space = f->space, .ssd_slot = e->slot[FK_TIER_SSD],
        .cpu_slot = e->slot[FK_TIER_CPU], .key = e->key, .id = (uint64_t)f->gen << 32 | (at + 1),
    };
    out->id &= ~WRITE_ID;
    return true;
}

static bool take_write(struct fk_core *core, struct fk_core_ssd_req *req)
{
    if (req->kind != FK_SSD_WRITE)
        return true;
    uint32_t entry = (uint32_t)req->id;
    const struct fk_entry *e = &core->ix.entries[entry];
    if (fk_entry_in(e, FK_TIER_SSD) != FK_FILLING) {
        write_done(core, req->id, -ECANCELED);
        return false;
    }
    req->ssd_slot = e->slot[FK_TIER_SSD];
    req->cpu_slot = e->slot[FK_TIER_CPU];
    req->key = e->key;
    req->tag = core->group_tags[e->group];
    if (e->parent != FK_NONE)
        req->parent = core->ix.entries[e->parent].key;
    return true;
}

uint32_t fk_core_take_ssd(struct fk_core *core, struct fk_core_ssd_req *out, uint32_t max)
{
    uint32_t n = 0;

    while (n < max && !fifo_empty(&core->reads_high)) {
        uint32_t at = *fifo_front(&core->reads_high);
        fifo_pop(&core->reads_high);
        n += take_read(core, at, &out[n]);
    }
    while (n < max && !fifo_empty(&core->reads_low)) {
        uint32_t at = *fifo_front(&core->reads_low);
        fifo_pop(&core->reads_low);
        n += take_read(core, at, &out[n]);
    }
    while (n < max && !fifo_empty(&core->writes)) {
        out[n] = *fifo_front(&core->writes);
        fifo_pop(&core->writes);
        n += take_write(core, &out[n]);
    }
    core_retry_starved(core);
    return n;
}

void fk_core_ssd_done(struct fk_core *core, const struct fk_core_ssd_done *done, uint32_t n,
                      uint64_t now_us)
{
    core_tick_now(core, now_us);
    core->touched.len = 0;
    for (uint32_t i = 0; i < n; i++) {
        if (done[i].id & WRITE_ID)
            write_done(core, done[i].id, done[i].status);
        else
            fill_done(core, done[i].id, done[i].status);
    }
    core->room_changed = true;
    for (size_t i = 0; i < core->touched.len; i++) {
        struct op *op = &core->ops.data[core->touched.data[i]];
        op->touched = false;
        core_op_pump(core, op);
    }
    core->touched.len = 0;
    core_evict_ahead(core);
    core_retry_starved(core);
}
