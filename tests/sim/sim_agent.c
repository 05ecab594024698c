/*
 * sim_agent.c - simulated copy engines: one per space and rank. An agent takes jobs, copies
 * block by block with random pauses, sees a cancel between blocks, may fail part of a job,
 * lag behind the other ranks, or hang past every deadline. Of a job of an early get it may say that
 * it is on its way: then it copies all of it, whatever is cancelled, but as late as it likes.
 * Touches simulated pages and pools, and the core's job calls. Caller: sim.c's step loop.
 */
#include "sim.h"

#include <errno.h>

static struct sim_job_use *use_find(struct sim *s, const struct fk_job *job)
{
    for (uint32_t i = 0; i < s->job_uses.len; i++)
        if (s->job_uses.data[i].job == job)
            return &s->job_uses.data[i];
    return NULL;
}

/* The first rank takes the job: its slots and pages are in use from here. */
static void use_begin(struct sim *s, struct sim_space *sp, struct fk_job *job)
{
    struct sim_job_use u = { .job = job, .space = (uint32_t)(sp - s->space), .n = job->n,
                             .min_ok = job->n, .to_engine = job->to_engine, .epoch = s->epoch };

    SIM_CHECK(s, (job->n || job->layerwise) && job->n <= fk_array_size(u.slots),
              "job of %u blocks", job->n);
    for (uint32_t i = 0; i < job->n; i++) {
        uint32_t slot = job->slots[i], page = job->pages[i];
        SIM_CHECK(s, slot < sp->config->cpu_slots && page < sp->config->pages,
                  "job: slot %u or page %u out of range", slot, page);
        sim_use(s, &sp->cpu_use[slot], !job->to_engine, "cpu", slot);
        if (!job->to_engine)
            sim_check_unowned(s, u.space, FK_TIER_CPU, slot);
        u.slots[i] = slot;
        u.ops[i] = sp->page[page].op;
        u.blocks[i] = sp->page[page].block;
        bool cancelled = atomic_load(&job->cancelled);
        SIM_CHECK(s, u.ops[i] != FK_NONE || cancelled, "job on a page of no operation");
        if (u.ops[i] != FK_NONE && (i == 0 || u.ops[i] != u.ops[i - 1]))
            s->ops[u.ops[i]].jobs_out++;
    }
    if (fk_vec_push(&s->job_uses, u))
        abort();
}

static void use_end(struct sim *s, struct sim_job_use *u)
{
    struct sim_space *sp = &s->space[u->space];

    for (uint32_t i = 0; i < u->n; i++)
        sim_unuse(&sp->cpu_use[u->slots[i]], !u->to_engine);
    for (uint32_t i = 0; i < u->n; i++) {
        if (u->ops[i] == FK_NONE)
            continue;
        sim_op_let_go(s, &s->ops[u->ops[i]], 1u << u->blocks[i]);
        s->ops[u->ops[i]].arrived |= (uint32_t)(i < u->min_ok) << u->blocks[i];
    }
    for (uint32_t i = 0; i < u->n; i++)
        if (u->ops[i] != FK_NONE && (i == 0 || u->ops[i] != u->ops[i - 1]))
            sim_op_job_over(s, u->ops[i]);
    *u = s->job_uses.data[--s->job_uses.len];
}

/* All ranks have reported: the leading blocks that every rank copied are whole. */
static void note_whole_puts(struct sim *s, const struct sim_job_use *u)
{
    for (uint32_t i = 0; !u->to_engine && i < u->min_ok; i++) {
        if (u->ops[i] == FK_NONE || u->epoch != s->epoch)
            continue;
        const struct sim_op *op = &s->ops[u->ops[i]];
        s->keys.data[op->keys[u->blocks[i]]].complete_epoch = s->epoch + 1;
    }
}

static void job_over(struct sim *s, struct sim_agent *a, uint32_t i, uint32_t ok, int status)
{
    struct fk_job *job = a->jobs[i].job;
    struct sim_job_use *u = use_find(s, job);
    bool last;

    SIM_CHECK(s, u, "sim: job without use");
    struct sim_space *sp = &s->space[u->space];
    SIM_TRACE(s, "agent space %u rank %u job %u done ok=%u/%u status=%d", u->space,
              (unsigned)(a - s->space[u->space].agent), job->id, ok, job->n, status);
    a->jobs[i] = a->jobs[--a->n];
    u->min_ok = fk_min(u->min_ok, ok);
    u->bad |= status == -EBADMSG;
    bool bad = u->bad;
    last = ++u->ranks_done == s->space[u->space].config->ranks;
    if (last) {
        note_whole_puts(s, u);
        use_end(s, u);
    }
    sim_mix(s, ok * 1000 + (uint32_t)-status);
    sim_expire_leases(s);
    s->rough_since_quiet |= bad;
    fk_core_job_done(s->core, job, ok, status, s->now);
    sim_old_instances(s, sp);
    sim_after(s, bad ? SIM_CALL_JOB_BAD : SIM_CALL_JOB);
}

/* Of the space's instance, or of one whose client is gone. */
static struct fk_job *next_job(struct sim *s, struct sim_space *sp, uint32_t rank)
{
    struct fk_job *job = NULL;

    for (uint32_t i = 0; !job && i < sp->n_old; i++) {
        job = fk_core_take_job(s->core, sp->old[i], rank);
        SIM_CHECK(s, !job || job->instance == sp->old[i], "job of another instance");
    }
    if (job)
        return job;
    job = fk_core_take_job(s->core, sp->instance, rank);
    SIM_CHECK(s, !job || job->instance == sp->instance, "job of another instance");
    return job;
}

static bool agent_take(struct sim *s, struct sim_space *sp, uint32_t rank)
{
    struct sim_agent *a = &sp->agent[rank];
    struct fk_job *job = next_job(s, sp, rank);

    if (!job)
        return false;
    SIM_TRACE(s, "agent space %u rank %u takes job %u: %s %u blocks%s%s", (unsigned)(sp - s->space),
              rank, job->id, job->to_engine ? "get" : "put", job->n, job->early ? " early" : "",
              atomic_load(&job->cancelled) ? " (cancelled)" : "");
    SIM_CHECK(s, !job->early || (job->to_engine && !job->layerwise), "job %u may not be early", job->id);
    for (uint32_t i = 0; i < a->n; i++)
        SIM_CHECK(s, a->jobs[i].job != job, "job %u given twice to rank %u", job->id, rank);
    if (!use_find(s, job))
        use_begin(s, sp, job);
    struct sim_agent_job *j = &a->jobs[a->n++];
    *j = (struct sim_agent_job){ .job = job, .fail_at = FK_NONE, .status = -ECANCELED };
    j->next = s->now + sim_below(s, s->config.agent_us + 1);
    if (!job->n) {                      /* says that a get in layers won't come */
        j->fail_at = 0;
    } else if (s->config.agent_faults && sim_chance(s, 12)) {
        j->fail_at = sim_below(s, job->n);
        /* -EBADMSG: the block's checksum in memory; the core drops that copy. */
        j->status = sim_chance(s, 2) ? -EIO : job->to_engine ? -EBADMSG : -EFAULT;
    }
    if (s->config.stalls && sim_chance(s, 60))      /* past the deadline, past the grace */
        a->stalled_until = s->now + sim_range(s, 1, (uint32_t)(s->config.core.op_timeout_us +
                                                               s->config.core.cancel_grace_us) * 2);
    return true;
}

static void copy_block(struct sim *s, struct sim_space *sp, uint32_t rank,
                       const struct fk_job *job, uint32_t i)
{
    uint32_t bytes = sp->config->slice_bytes, page = job->pages[i];
    uint8_t *slice = sp->pool + (uint64_t)job->slots[i] * sp->slot_bytes + (uint64_t)rank * bytes;
    uint8_t *mem = sp->mem[rank] + (uint64_t)page * bytes;
    const struct sim_job_use *u = use_find(s, job);

    SIM_CHECK(s, u->slots[i] == job->slots[i], "job %u changed under way", job->id);
    SIM_CHECK(s, sp->page[page].op != FK_NONE, "page %u of space %u copied after its operation "
              "ended", page, u->space);
    SIM_CHECK(s, sp->page[page].op == u->ops[i], "page %u copied for another operation", page);
    SIM_CHECK(s, !s->ops[u->ops[i]].arriving || !atomic_load(&job->cancelled),
              "job %u is cancelled, and its get was reported", job->id);
    if (job->to_engine)
        memcpy(mem, slice, bytes);
    else
        memcpy(slice, mem, bytes);
}

/* From here on nothing but its death keeps the rank from copying all of the job. */
static void say_on_its_way(struct sim *s, struct sim_space *sp, uint32_t rank, struct sim_agent_job *j)
{
    struct sim_job_use *u = use_find(s, j->job);
    struct sim_op *op = &s->ops[u->ops[0]];
    uint64_t late = s->config.core.op_timeout_us + s->config.core.cancel_grace_us;

    SIM_TRACE(s, "agent space %u rank %u job %u is on its way after %u/%u", u->space, rank, j->job->id,
              j->pos, j->job->n);
    j->sure = true;
    u->sure++;
    sim_expire_leases(s);
    fk_core_job_on_its_way(s->core, j->job);
    sim_after(s, SIM_CALL_JOB);
    SIM_CHECK(s, !op->open || atomic_load(&j->job->cancelled) || !sim_op_sure(s, op),
              "all of an early get is on its way, and nobody is told");
    j->next = s->now + fk_rng_below(&s->early_rng, sim_early_chance(s, 3) ? 1000 : 2);
    if (s->config.stalls && sim_early_chance(s, 12))
        sp->agent[rank].stalled_until = s->now + 1 + fk_rng_below(&s->early_rng, (uint32_t)late * 2);
}

/* It may be stopped already, which a worker in another process does not see at once. */
static bool may_be_sure(struct sim *s, const struct sim_agent_job *j)
{
    const struct sim_job_use *u = use_find(s, j->job);
    bool whole = true;

    if (!j->job->early || j->sure || j->fail_at != FK_NONE)
        return false;
    for (uint32_t i = 0; i < u->n; i++)
        whole &= u->ops[i] != FK_NONE;
    return whole && sim_early_chance(s, s->config.early);
}

/* The GPU is lost, with the copies that were queued there. */
static void device_fails(struct sim *s, struct sim_agent *a, uint32_t rank, uint32_t i)
{
    struct sim_op *op = &s->ops[use_find(s, a->jobs[i].job)->ops[0]];

    op->dead_ranks |= (uint32_t)op->arriving << rank;
    job_over(s, a, i, a->jobs[i].pos, -EIO);
}

static void job_step(struct sim *s, struct sim_space *sp, uint32_t rank, uint32_t i)
{
    struct sim_agent *a = &sp->agent[rank];
    struct sim_agent_job *j = &a->jobs[i];

    if (may_be_sure(s, j)) {
        say_on_its_way(s, sp, rank, j);
        return;
    }
    if (j->sure && s->config.agent_faults && sim_early_chance(s, 40)) {
        device_fails(s, a, rank, i);
        return;
    }
    bool cancelled = !j->sure && atomic_load(&j->job->cancelled);
    if (cancelled && !sim_chance(s, 8)) {
        job_over(s, a, i, j->pos, -ECANCELED);
    } else if (j->pos == j->fail_at) {
        job_over(s, a, i, j->pos, j->status);
    } else if (cancelled && sp->page[j->job->pages[j->pos]].op == FK_NONE) {
        job_over(s, a, i, j->pos, -ECANCELED);
    } else {
        copy_block(s, sp, rank, j->job, j->pos++);
        j->next = s->now + sim_below(s, s->config.agent_us + 1) + sim_below(s, a->lag_us + 1);
        if (j->pos == j->job->n && j->fail_at == FK_NONE)
            job_over(s, a, i, j->pos, 0);
    }
}

/* A worker is killed: what it had, and was about to get, has failed; a new one is there at once. */
void sim_agent_dies(struct sim *s)
{
    uint32_t at = sim_below(s, s->config.n_spaces);
    struct sim_space *sp = &s->space[at];
    uint32_t rank = sim_below(s, sp->config->ranks);
    struct sim_agent *a = &sp->agent[rank];

    SIM_TRACE(s, "agent space %u rank %u dies", at, rank);
    for (uint32_t i = 0; i < SIM_MAX_OPS; i++)
        if (s->ops[i].space == at) {
            sim_op_let_go(s, &s->ops[i], ~0u);
            s->ops[i].dead_ranks |= (uint32_t)s->ops[i].arriving << rank;
        }
    sim_expire_leases(s);
    fk_core_fail_ops(s->core, sp->instance, -ENOTCONN, s->now);
    sim_after(s, SIM_CALL_CANCEL);
    do {
        while (a->n)
            job_over(s, a, 0, 0, -ENOTCONN);
    } while (agent_take(s, sp, rank));
    a->stalled_until = 0;
}

bool sim_agent_step(struct sim *s)
{
    uint32_t pick = sim_below(s, s->config.n_spaces * SIM_MAX_RANKS);

    for (uint32_t k = 0; k < s->config.n_spaces * SIM_MAX_RANKS; k++, pick++) {
        struct sim_space *sp = &s->space[pick / SIM_MAX_RANKS % s->config.n_spaces];
        uint32_t rank = pick % SIM_MAX_RANKS;
        struct sim_agent *a = &sp->agent[rank];
        if (rank >= sp->config->ranks || a->stalled_until > s->now)
            continue;
        if (a->n < SIM_AGENT_JOBS && (a->n == 0 || sim_chance(s, 2)))
            (void)agent_take(s, sp, rank);
        if (!a->n || a->stalled_until > s->now)
            continue;
        uint32_t i = sim_below(s, a->n);
        if (a->jobs[i].next > s->now)
            continue;
        job_step(s, sp, rank, i);
        return true;
    }
    return false;
}

uint64_t sim_agent_next(const struct sim *s)
{
    uint64_t next = UINT64_MAX;

    for (uint32_t i = 0; i < s->config.n_spaces; i++) {
        for (uint32_t r = 0; r < s->space[i].config->ranks; r++) {
            const struct sim_agent *a = &s->space[i].agent[r];
            if (a->stalled_until > s->now)
                next = fk_min(next, a->stalled_until);
            for (uint32_t j = 0; j < a->n && a->stalled_until <= s->now; j++)
                next = fk_min(next, a->jobs[j].next);
        }
    }
    return next;
}

uint32_t sim_agent_jobs(const struct sim *s)
{
    return (uint32_t)s->job_uses.len;
}

void sim_agents_forget(struct sim *s)
{
    for (uint32_t i = 0; i < s->config.n_spaces; i++)
        for (uint32_t r = 0; r < SIM_MAX_RANKS; r++) {
            s->space[i].agent[r].n = 0;
            s->space[i].agent[r].stalled_until = 0;
        }
    s->job_uses.len = 0;
}
