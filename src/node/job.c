/* job.c - copy jobs: made for an op, given to every worker, collected again. See core.h. */
#include "base/plant.h"
#include "node/core_impl.h"

#define DIRECT_BLOCKS 32u       /* of a job from SSD: while it is read the next one waits with the worker */
#define job_of(p) ((struct job *)(void *)((char *)(p) - offsetof(struct job, pub)))

static int job_reserve(struct job *j, uint32_t n)
{
    if (n <= j->cap)
        return 0;
    uint32_t *p = realloc(j->blocks, 3ull * n * sizeof(*p));
    if (!p)
        return -ENOMEM;
    j->blocks = p;
    j->slots = p + n;
    j->pages = p + 2 * (size_t)n;
    j->cap = n;
    return 0;
}

void core_job_unused(struct fk_core *core, struct job *j, const struct op *op)
{
    struct core_instance *in = &core->instances.data[op->instance];

    j->next_free = in->free_jobs;
    in->free_jobs = j;
}

struct job *core_job_new(struct fk_core *core, struct op *op, uint32_t n)
{
    struct core_instance *in = &core->instances.data[op->instance];
    struct job *j = in->free_jobs;

    if (j)
        in->free_jobs = j->next_free;
    else
        j = calloc(1, sizeof(*j) + in->workers * sizeof(j->pub.next[0]));
    if (!j)
        return NULL;
    if (job_reserve(j, fk_max(n, 1u))) {
        core_job_unused(core, j, op);
        return NULL;
    }
    j->op = core_op_number(core, op);
    j->workers_left = in->workers;
    j->on_its_way = 0;
    j->status = 0;
    j->pub.id = ++core->job_seq;
    j->pub.instance = op->instance;
    j->pub.tag = op->tag;
    j->pub.to_engine = op->kind == FLEXKV_OP_GET;
    j->pub.layerwise = op->layerwise;
    j->pub.early = op->early;
    j->pub.counter = op->counter;
    j->pub.n = 0;
    j->pub.from_ssd = false;
    j->pub.slots = j->slots;
    j->pub.pages = j->pages;
    atomic_store_explicit(&j->pub.cancelled, false, memory_order_relaxed);
    return j;
}

void core_job_add(struct fk_core *core, struct job *j, struct op *op, uint32_t block)
{
    struct op_block *b = &op->blocks[block];

    j->blocks[j->pub.n] = block;
    j->slots[j->pub.n] = core->ix.entries[b->entry].slot[FK_TIER_CPU];
    j->pages[j->pub.n] = b->page;
    j->pub.n++;
    b->state = BLK_JOB;
}

void core_job_start(struct fk_core *core, struct job *j, struct op *op)
{
    struct core_instance *in = &core->instances.data[op->instance];

    j->ok = j->pub.n;
    j->next_of_op = op->jobs;
    op->jobs = j;
    in->jobs_out++;
    for (uint32_t w = 0; w < in->workers; w++) {
        struct job_queue *q = &in->queue[w];
        j->pub.next[w] = NULL;
        if (q->tail)
            q->tail->next[w] = &j->pub;
        else
            q->head = &j->pub;
        q->tail = &j->pub;
        core->n_jobs_queued++;
    }
}

static int reserve_keys(struct job *j, uint32_t n, uint32_t workers)
{
    if (n <= j->keys_cap)
        return 0;
    struct fk_key *p = realloc(j->keys, n * sizeof(*p) + (size_t)n * workers * sizeof(*j->pub.residues));
    if (!p)
        return -ENOMEM;
    j->keys = p;
    j->keys_cap = n;
    return 0;
}

static void direct_job(struct fk_core *core, struct op *op, const uint32_t *blocks, uint32_t n)
{
    struct core_instance *in = &core->instances.data[op->instance];
    struct job *j = core_job_new(core, op, n);

    if (j && reserve_keys(j, n, in->workers)) {
        core_job_unused(core, j, op);
        j = NULL;
    }
    if (!j) {
        for (uint32_t i = 0; i < n; i++)
            core_op_block_fail(core, op, blocks[i], -ENOMEM);
        return;
    }
    j->pub.from_ssd = true;
    j->pub.keys = j->keys;
    j->pub.residues = (uint64_t *)(void *)(j->keys + n);
    for (uint32_t i = 0; i < n; i++) {
        const struct fk_entry *e = &core->ix.entries[op->blocks[blocks[i]].entry];
        core_job_add(core, j, op, blocks[i]);
        j->slots[i] = e->slot[FK_TIER_SSD];
        j->keys[i] = e->key;
    }
    op->n_direct += n;
    core_job_start(core, j, op);
}

void core_direct_start(struct fk_core *core, struct op *op, const uint32_t *blocks, uint32_t n)
{
    for (uint32_t at = 0; at < n; at += DIRECT_BLOCKS)
        direct_job(core, op, blocks + at, fk_min(DIRECT_BLOCKS, n - at));
}

uint32_t fk_core_job_left(const struct fk_job *job)
{
    return ((const struct job *)(const void *)((const char *)job - offsetof(struct job, pub)))->workers_left;
}

struct fk_job *fk_core_take_job(struct fk_core *core, uint32_t instance, uint32_t worker)
{
    struct job_queue *q = &core->instances.data[instance].queue[worker];
    struct fk_job *job = q->head;

    if (!job)
        return NULL;
    q->head = job->next[worker];
    if (!q->head)
        q->tail = NULL;
    core->n_jobs_queued--;
    return job;
}

/* The pages' bytes are in the slot: the block is there for all to see. */
static void put_block_ready(struct fk_core *core, struct op *op, uint32_t block)
{
    uint32_t entry = op->blocks[block].entry;
    struct fk_entry *e = &core->ix.entries[entry];

    if (fk_entry_in(e, FK_TIER_CPU) != FK_FILLING) {    /* reset came in between */
        core_op_block_fail(core, op, block, -ECANCELED);
        return;
    }
    fk_index_ready(&core->ix, entry, FK_TIER_CPU, core->tick);
    core->stats.cpu.stored_blocks++;
    if (core->params.write_policy == FK_WRITE_THROUGH)
        (void)fk_vec_push(&core->to_write, entry);
}

static void put_block_lost(struct fk_core *core, struct op *op, uint32_t block)
{
    uint32_t entry = op->blocks[block].entry;

    if (fk_entry_in(&core->ix.entries[entry], FK_TIER_CPU) == FK_FILLING)
        fk_index_unfill(&core->ix, entry, FK_TIER_CPU);
}

static void finish_put(struct fk_core *core, struct op *op, struct job *j)
{
    if (op->reported)       /* its pages may have been other ones' when they were read */
        j->ok = 0;
    core->to_write.len = 0;
    for (uint32_t i = 0; i < j->ok; i++)
        put_block_ready(core, op, j->blocks[i]);
    for (uint32_t i = j->pub.n; i-- > j->ok;) {     /* children before parents */
        put_block_lost(core, op, j->blocks[i]);
        core_op_block_fail(core, op, j->blocks[i], j->status);
    }
    core_write_blocks(core, core->to_write.data, (uint32_t)core->to_write.len);
    for (uint32_t i = 0; i < j->ok; i++)
        if (op->blocks[j->blocks[i]].state == BLK_JOB)
            core_op_block_done(core, op, j->blocks[i]);
}

/* Its bytes in memory are not those that were stored: nobody gets them again. */
static void lose_cpu_copy(struct fk_core *core, const struct op_block *b)
{
    if (b->state != BLK_JOB || fk_entry_in(&core->ix.entries[b->entry], FK_TIER_CPU) != FK_READY)
        return;
    core->stats.cpu.errors++;
    fk_index_drop(&core->ix, b->entry, FK_TIER_CPU, false);
}

static void finish_get(struct fk_core *core, struct op *op, struct job *j)
{
    if (j->status == -EBADMSG && j->ok < j->pub.n)
        lose_cpu_copy(core, &op->blocks[j->blocks[j->ok]]);
    for (uint32_t i = 0; i < j->ok; i++)
        core_op_block_done(core, op, j->blocks[i]);
    for (uint32_t i = j->ok; i < j->pub.n; i++)
        core_op_block_fail(core, op, j->blocks[i], j->status);
}

/* What the workers could not read, or read wrong bytes of, goes through the cpu tier: if it is the SSD's
 * fault that will be seen there. */
static void finish_direct(struct fk_core *core, struct op *op, struct job *j)
{
    op->n_direct -= j->pub.n;
    for (uint32_t i = 0; i < j->ok; i++)
        core_op_block_done(core, op, j->blocks[i]);
    for (uint32_t i = j->ok; i < j->pub.n; i++) {
        if (op->status) {
            core_op_block_fail(core, op, j->blocks[i], j->status);
            continue;
        }
        op->blocks[j->blocks[i]].state = BLK_IDLE;
        op->next = fk_min(op->next, j->blocks[i]);
        op->direct = false;
    }
}

static void job_unlink(struct op *op, struct job *j)
{
    struct job **at = &op->jobs;

    while (*at != j)
        at = &(*at)->next_of_op;
    *at = j->next_of_op;
}

void fk_core_job_on_its_way(struct fk_core *core, struct fk_job *job)
{
    struct job *j = job_of(job);

    if (++j->on_its_way == core->instances.data[job->instance].workers || FK_BUG(18))
        core_op_early(core, &core->ops.data[j->op]);
}

void fk_core_job_done(struct fk_core *core, struct fk_job *job, uint32_t ok, int status,
                      uint64_t now_us)
{
    struct job *j = job_of(job);
    struct op *op = &core->ops.data[j->op];
    struct core_instance *in = &core->instances.data[op->instance];

    if (ok < j->ok && !(FK_BUG(1) && j->workers_left > 1)) {
        j->ok = ok;
        j->status = status ? status : -EIO;
    }
    if (--j->workers_left)
        return;
    job_unlink(op, j);
    in->jobs_out--;
    core_tick_now(core, now_us);
    /* What was copied after the operation ended early is not reported as done. */
    if (op->kind == FLEXKV_OP_PUT)
        finish_put(core, op, j);
    else if (j->pub.from_ssd)
        finish_direct(core, op, j);
    else
        finish_get(core, op, j);
    core_job_unused(core, j, op);
    core->room_changed = true;
    core_op_pump(core, op);
    core_go_on(core);
}

void core_jobs_fini(struct core_instance *in)
{
    while (in->free_jobs) {
        struct job *j = in->free_jobs;
        in->free_jobs = j->next_free;
        free(j->blocks);
        free(j->keys);
        free(j);
    }
    free(in->queue);
}
