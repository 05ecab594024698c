/* op.c - the life of an operation: blocks, deadlines, completion. See core.h, core_impl.h. */
#include "base/plant.h"
#include "node/core_impl.h"

uint32_t core_op_number(const struct fk_core *core, const struct op *op)
{
    return (uint32_t)(op - core->ops.data);
}

struct op *core_op_find(struct fk_core *core, uint64_t id)
{
    uint32_t at = (uint32_t)id - 1, gen = (uint32_t)(id >> 32);

    if (!id || at >= core->ops.len || core->ops.data[at].gen != gen || !(gen & 1))
        return NULL;
    return &core->ops.data[at];
}

static struct op *op_slot(struct fk_core *core)
{
    if (core->free_ops.len)
        return &core->ops.data[core->free_ops.data[--core->free_ops.len]];
    if (fk_vec_reserve(&core->free_ops, core->ops.len + 1) ||
        fk_vec_push(&core->ops, (struct op){ 0 }))
        return NULL;
    return &core->ops.data[core->ops.len - 1];
}

struct op *core_op_new(struct fk_core *core, enum flexkv_op_kind kind, uint32_t instance, uint32_t n,
                       const struct fk_core_op_args *args, uint64_t now_us, uint64_t *id)
{
    struct op *op = op_slot(core);

    if (!op)
        return NULL;
    if (n > op->cap) {
        struct op_block *p = realloc(op->blocks, n * sizeof(*p));
        if (!p) {
            core->free_ops.data[core->free_ops.len++] = core_op_number(core, op);
            return NULL;
        }
        op->blocks = p;
        op->cap = n;
    }
    *op = (struct op){
        .gen = op->gen + 1, .kind = (uint8_t)kind, .instance = instance,
        .space = core->instances.data[instance].space, .n = n, .limit = n,
        .cap = op->cap, .blocks = op->blocks, .user_data = args->user_data,
        .results = args->results,
        .deadline_us = args->deadline_us ? args->deadline_us : now_us + core->params.op_timeout_us,
    };
    core->n_ops++;
    core_note_deadline(core, op->deadline_us);
    *id = (uint64_t)op->gen << 32 | (core_op_number(core, op) + 1);
    op->tag = args->tag ? args->tag : *id;
    return op;
}

/* ---- blocks ---- */

static void block_let_go(struct fk_core *core, struct op_block *b)
{
    if (b->entry == FK_NONE)
        return;
    fk_index_unpin(&core->ix, b->entry);
    b->entry = FK_NONE;
    core->room_changed = true;
}

void core_op_block_done(struct fk_core *core, struct op *op, uint32_t block)
{
    if (op->status) {       /* it ended before: late bytes are not reported as there */
        core_op_block_fail(core, op, block, op->status);
        return;
    }
    op->blocks[block].state = BLK_DONE;
    /* A prefetch holds what it has brought until it ends, lest it pushes out its own prefix. */
    if (op->kind != FLEXKV_OP_PREFETCH)
        block_let_go(core, &op->blocks[block]);
}

void core_op_block_fail(struct fk_core *core, struct op *op, uint32_t block, int status)
{
    op->blocks[block].state = BLK_FAIL;
    op->blocks[block].status = (int8_t)(status < -127 ? -EIO : status);
    op->limit = fk_min(op->limit, block);
    block_let_go(core, &op->blocks[block]);
}

/* ---- the end ---- */

static uint32_t leading_done(const struct op *op)
{
    uint32_t i = 0;

    while (i < op->n && op->blocks[i].state == BLK_DONE)
        i++;
    return i;
}

static void count_end(struct fk_core *core, const struct op *op, uint32_t ok, int status)
{
    core->stats.timeouts += status == -ETIMEDOUT;
    core->stats.cancelled += status == -ECANCELED;
    if (op->kind == FLEXKV_OP_GET) {
        core->stats.get_blocks += ok;
        core->stats.get_failed_blocks += op->n - ok;
    } else if (op->kind == FLEXKV_OP_PUT) {
        core->stats.put_blocks += ok;
        core->stats.put_dropped_blocks += op->n - ok;
    }
}

static void report(struct fk_core *core, struct op *op, uint32_t flags)
{
    uint32_t ok = flags & FLEXKV_COMPLETION_EARLY ? op->n : leading_done(op);
    int status = 0;

    op->reported = true;
    if (op->silent && !FK_BUG(17))
        return;
    if (ok < op->n)
        status = op->status ? op->status : op->blocks[ok].status;
    for (uint32_t i = 0; op->results && i < op->n; i++)
        op->results[i] = i < ok ? 0 : (int8_t)(status < -127 ? -EIO : status);
    count_end(core, op, ok, status);
    struct flexkv_completion c = {
        .op = (uint64_t)op->gen << 32 | (core_op_number(core, op) + 1),
        .user_data = op->user_data, .kind = op->kind, .status = status, .blocks = op->n,
        .blocks_ok = ok, .flags = flags,
    };
    (void)fifo_push(&core->completions, c);
}

/* What is on its way will be there whatever happens to the operation; pins last until it is. Reads from SSD by the workers
 * are in no order with other copies: pages that come early could be theirs next. */
void core_op_early(struct fk_core *core, struct op *op)
{
    const struct core_instance *in = &core->instances.data[op->instance];

    if (!op->early || in->direct || op->reported || op->status || op->n_wait || op->n_ready || op->next < op->n ||
        op->limit < op->n)
        return;
    for (const struct job *j = op->jobs; j; j = j->next_of_op)
        if ((j->on_its_way < in->workers && !FK_BUG(18) && !FK_BUG(19)) || j->ok < j->pub.n)
            return;
    report(core, op, FLEXKV_COMPLETION_EARLY);
    for (uint32_t i = 0; FK_BUG(20) && i < op->n; i++)
        block_let_go(core, &op->blocks[i]);
}

static void finish(struct fk_core *core, struct op *op)
{
    if (!op->reported || FK_BUG(6))
        report(core, op, 0);
    for (uint32_t i = op->n; i-- > 0;)
        block_let_go(core, &op->blocks[i]);
    core->n_starved -= op->starved;
    op->starved = false;
    op->gen++;
    core->n_ops--;
    core->free_ops.data[core->free_ops.len++] = core_op_number(core, op);
}

/* ---- going on ---- */

/* Blocks that are not in the cpu tier. */
struct starting {
    uint32_t reads[CORE_READ_WINDOW_MAX], n_reads;      /* to be brought there */
    uint32_t direct[CORE_READ_WINDOW_MAX], n_direct;    /* for the workers to read */
};

/* It is on SSD only, and workers read that themselves. false: enough of it is under way. */
static bool start_direct(struct fk_core *core, struct op *op, uint32_t i, struct starting *s)
{
    if (op->kind == FLEXKV_OP_PREFETCH) {
        core_op_block_done(core, op, i);
        return true;
    }
    if (op->n_direct + s->n_direct >= core->params.read_window_blocks)
        return false;
    s->direct[s->n_direct++] = i;
    return true;
}

/* What can be done for an IDLE block of a get or prefetch. false: stop here for now. */
static bool start_block(struct fk_core *core, struct op *op, uint32_t i, struct starting *s)
{
    struct fk_entry *e = &core->ix.entries[op->blocks[i].entry];
    enum fk_residency cpu = fk_entry_in(e, FK_TIER_CPU);

    if (cpu == FK_READY) {
        if (op->kind == FLEXKV_OP_PREFETCH) {
            core_op_block_done(core, op, i);
            if (s->n_reads)     /* behind a gap: it may have to make room for what fills the gap */
                block_let_go(core, &op->blocks[i]);
        } else {
            op->blocks[i].state = BLK_READY;
            op->n_ready++;
        }
    } else if (cpu == FK_FILLING && e->pos[FK_TIER_CPU] != FK_NONE) {
        core_fill_join(core, op, i);
    } else if (cpu == FK_ABSENT && op->direct && fk_entry_on_ssd(&core->ix, e)) {
        return start_direct(core, op, i, s);
    } else if (cpu == FK_ABSENT && (fk_entry_on_ssd(&core->ix, e) || core->spaces[op->space].elsewhere)) {
        if (op->n_wait + s->n_reads >= core->params.read_window_blocks)
            return false;
        s->reads[s->n_reads++] = i;
    } else {
        core_op_block_fail(core, op, i, -ENOENT);
        return false;
    }
    return true;
}

static void set_starved(struct fk_core *core, struct op *op, bool starved)
{
    core->n_starved += (uint32_t)starved - (uint32_t)op->starved;
    op->starved = starved;
}

static void start_blocks(struct fk_core *core, struct op *op)
{
    struct starting s;

    s.n_reads = s.n_direct = 0;
    set_starved(core, op, false);
    for (; op->next < op->limit; op->next++)
        if (op->blocks[op->next].state == BLK_IDLE &&
            !start_block(core, op, op->next, &s))
            break;
    if (s.n_direct)
        core_direct_start(core, op, s.direct, s.n_direct);
    uint32_t started = s.n_reads ? core_fill_start(core, op, s.reads, s.n_reads) : 0;
    if (started < s.n_reads) {
        op->next = s.reads[started];
        set_starved(core, op, true);
    }
}

/* One job of all blocks whose bytes wait in the cpu tier. */
static void copy_ready(struct fk_core *core, struct op *op)
{
    struct job *j = core_job_new(core, op, op->n_ready);
    uint32_t left = op->n_ready;

    op->n_ready = 0;
    for (uint32_t i = 0; left; i++) {
        if (op->blocks[i].state != BLK_READY)
            continue;
        left--;
        if (j)
            core_job_add(core, j, op, i);
        else
            core_op_block_fail(core, op, i, -ENOMEM);
    }
    if (j)
        core_job_start(core, j, op);
}

/* Will anything in the op's space let go of a cpu slot without a new request? */
static bool others_move(const struct fk_core *core, const struct op *op)
{
    if (core->spaces[op->space].backlog)
        return true;
    for (size_t i = 0; i < core->leases.len; i++)
        if ((core->leases.data[i].gen & 1) && core->leases.data[i].space == op->space)
            return true;
    for (size_t i = 0; i < core->ops.len; i++) {
        const struct op *o = &core->ops.data[i];
        if ((o->gen & 1) && o->space == op->space && (o->jobs || o->n_wait))
            return true;
    }
    return false;
}

/* It waits for room, has nothing under way, and its blocks behind hold slots that others need: a
 * prefetch gives up, and so does a get when nobody moves (several could wait for each other). */
static void give_up_starved(struct fk_core *core, struct op *op)
{
    if (op->n_wait || op->jobs || (op->kind == FLEXKV_OP_GET && others_move(core, op)))
        return;
    for (uint32_t i = op->limit; i-- > op->next;)
        if (op->blocks[i].state == BLK_IDLE)
            core_op_block_fail(core, op, i, -ENOSPC);
    set_starved(core, op, false);
}

/* In layers it is all blocks at once, as the engine follows one copy. If some can't be had nothing is
 * copied: a job without blocks tells the agents, for whom the engine may wait already. */
static bool may_copy(struct fk_core *core, struct op *op)
{
    if (!op->layerwise)
        return op->n_ready;
    if (op->n_wait || op->next < op->limit || op->told)
        return false;
    if (op->limit < op->n) {
        int why = op->blocks[op->limit].status;
        for (uint32_t i = op->n; i-- > 0;)
            if (op->blocks[i].state == BLK_READY)
                core_op_block_fail(core, op, i, why);
        op->n_ready = 0;
    }
    return op->told = op->n > 0;
}

void core_op_pump(struct fk_core *core, struct op *op)
{
    if (op->kind != FLEXKV_OP_PUT && !op->status) {
        start_blocks(core, op);
        if (may_copy(core, op))
            copy_ready(core, op);
        if (fk_unlikely(op->starved)) {
            give_up_starved(core, op);
            if (may_copy(core, op))
                copy_ready(core, op);
        }
    }
    if (!op->jobs && !op->n_wait && !op->n_ready && (op->status || op->next >= op->limit))
        finish(core, op);
}

void core_retry_starved(struct fk_core *core)
{
    while (core->n_starved && core->room_changed) {
        core->room_changed = false;
        for (uint32_t i = 0; i < core->ops.len; i++)
            if ((core->ops.data[i].gen & 1) && core->ops.data[i].starved)
                core_op_pump(core, &core->ops.data[i]);
    }
}

/* Those who wait come first: what was written to SSD so that its cpu slot could be had would be evicted there ahead of
 * need, and written again, and so on without end. */
void core_go_on(struct fk_core *core)
{
    core_retry_starved(core);
    core_evict_ahead(core);
    core->room_changed = true;
    core_retry_starved(core);
}

/* ---- ending early ---- */

/* Takes the block out of the chain of those that wait for its fill. */
static void unlink_waiter(struct fk_core *core, struct op *op, uint32_t block)
{
    const struct fk_entry *e = &core->ix.entries[op->blocks[block].entry];
    struct fill *f = &core->fills.data[e->pos[FK_TIER_CPU]];
    uint32_t *at_op = &f->head_op, *at_block = &f->head_block;

    while (*at_op != core_op_number(core, op) || *at_block != block) {
        struct op_block *b = &core->ops.data[*at_op].blocks[*at_block];
        at_op = &b->next_op;
        at_block = &b->next_block;
    }
    *at_op = op->blocks[block].next_op;
    *at_block = op->blocks[block].next_block;
    op->n_wait--;
}

void core_op_end_early(struct fk_core *core, struct op *op, int status, uint64_t now_us)
{
    if (op->status)
        return;
    op->status = status;
    for (uint32_t i = op->n; i-- > 0;) {
        uint8_t state = op->blocks[i].state;
        if (state == BLK_WAIT)
            unlink_waiter(core, op, i);
        if (state == BLK_WAIT || state == BLK_IDLE || state == BLK_READY ||
            (FK_BUG(2) && op->kind == FLEXKV_OP_GET && state == BLK_JOB))
            core_op_block_fail(core, op, i, status);
    }
    op->n_ready = 0;
    for (struct job *j = op->jobs; j; j = j->next_of_op)
        atomic_store_explicit(&j->pub.cancelled, true, memory_order_relaxed);
    op->grace_us = now_us + core->params.cancel_grace_us;
    if (op->jobs) {
        core->n_cancels++;
        core_note_deadline(core, op->grace_us);
    } else {
        finish(core, op);
    }
}

void core_op_check_deadline(struct fk_core *core, struct op *op, uint64_t now_us)
{
    if (!op->status) {
        if (op->deadline_us > now_us)
            core_note_deadline(core, op->deadline_us);
        else
            core_op_end_early(core, op, -ETIMEDOUT, now_us);
    } else if (op->grace_us > now_us) {
        core_note_deadline(core, op->grace_us);
    } else {
        report(core, op, FLEXKV_COMPLETION_PAGES_BUSY);
    }
}

int fk_core_cancel(struct fk_core *core, uint64_t id, uint64_t now_us)
{
    struct op *op = core_op_find(core, id);

    if (!op || op->reported)
        return -ENOENT;
    core_op_end_early(core, op, -ECANCELED, now_us);
    core_retry_starved(core);
    return 0;
}
