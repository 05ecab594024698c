/*
 * core.c - set-up, time, queues out, statistics, self-check. See core.h.
 */
#include "node/core_impl.h"

#define REBASE_AT 0xf0000000u
#define REBASE_BY 0x80000000u

int fk_core_create(const struct fk_core_params *params, struct fk_core **out)
{
    struct fk_core *core = calloc(1, sizeof(*core));
    struct fk_index_params ip = { .max_spaces = params->max_spaces, .policy = params->policy,
                                  .events = params->events, .seed = params->seed };

    if (!core)
        return -ENOMEM;
    core->params = *params;
    if (!core->params.read_window_blocks)
        core->params.read_window_blocks = CORE_READ_WINDOW;
    core->params.read_window_blocks =
        fk_min(core->params.read_window_blocks, CORE_READ_WINDOW_MAX);
    core->next_deadline_us = UINT64_MAX;
    core->spaces = calloc(params->max_spaces, sizeof(*core->spaces));
    core->group_tags = calloc(FK_MAX_GROUPS, sizeof(*core->group_tags));
    if (!core->spaces || !core->group_tags || fk_index_init(&core->ix, &ip)) {
        free(core->spaces);
        free(core->group_tags);
        free(core);
        return -ENOMEM;
    }
    *out = core;
    return 0;
}

void fk_core_destroy(struct fk_core *core)
{
    if (!core)
        return;
    for (size_t i = 0; i < core->ops.len; i++) {
        struct op *op = &core->ops.data[i];
        for (struct job *j = op->jobs, *next; j; j = next) {
            next = j->next_of_op;
            core_job_unused(core, j, op);
        }
        free(op->blocks);
    }
    for (size_t i = 0; i < core->leases.len; i++)
        free(core->leases.data[i].entries);
    for (size_t i = 0; i < core->instances.len; i++)
        core_jobs_fini(&core->instances.data[i]);
    fk_vec_free(&core->instances);
    fk_vec_free(&core->ops);
    fk_vec_free(&core->free_ops);
    fk_vec_free(&core->leases);
    fk_vec_free(&core->free_leases);
    fk_vec_free(&core->fills);
    fk_vec_free(&core->free_fills);
    fk_vec_free(&core->touched);
    fk_vec_free(&core->scratch);
    fk_vec_free(&core->to_write);
    for (int from = 0; from < FILL_SOURCES; from++)
        for (int high = 0; high < 2; high++)
            fk_vec_free(&core->fill_queue[from][high].v);
    for (uint32_t s = 0; s < core->ix.n_spaces; s++)
        for (int from = 0; from < FILL_SOURCES; from++)
            free(core->spaces[s].probe[from].keys);
    fk_vec_free(&core->writes.v);
    fk_vec_free(&core->completions.v);
    fk_index_fini(&core->ix);
    free(core->spaces);
    free(core->group_tags);
    free(core);
}

int fk_core_space_add(struct fk_core *core, const struct fk_core_space_params *p, uint32_t *space)
{
    uint32_t slots[FK_TIERS] = { p->cpu_slots, p->ssd_slots };

    if (!p->cpu_slots || p->ssd_dirs > 32)
        return -EINVAL;
    int rc = fk_index_space_add(&core->ix, slots, p->ssd_stripe_slots, p->ssd_dirs, space);
    if (rc)
        return rc;
    core->spaces[*space] = (struct core_space){
        .cpu_slots = p->cpu_slots, .ssd_slots = p->ssd_slots,
        .ssd_dirs = p->ssd_dirs, .probe_blocks = fk_min(p->probe_blocks, FK_CORE_PROBE_MAX), .backlog_max = fk_max(p->cpu_slots / 2, 1u),
    };
    if (p->ssd_slots)
        core->spaces[*space].reserve = fk_min(fk_max(p->cpu_slots / 64, 2u),
                                              fk_min(p->cpu_slots / 4, 256u));
    return 0;
}

int fk_core_group_add(struct fk_core *core, uint32_t space, const struct fk_core_quota *quota,
                      uint32_t *group)
{
    int rc = fk_index_group_add(&core->ix, space, quota->max, quota->guaranteed, group);

    if (!rc)
        core->group_tags[*group] = quota->tag;
    return rc;
}

uint32_t fk_core_space_default_group(const struct fk_core *core, uint32_t space)
{
    return core->ix.spaces[space].default_group;
}

/* ---- time ---- */

/* The logical clock: grows with every operation, follows milliseconds. */
uint32_t core_tick_now(struct fk_core *core, uint64_t now_us)
{
    uint64_t now_ms = now_us / 1000;

    core->now_us = now_us;
    if (core->tick >= REBASE_AT) {
        fk_index_rebase(&core->ix, REBASE_BY);
        core->tick -= REBASE_BY;
        core->tick_base_ms += REBASE_BY;
    }
    if (!core->tick_base_ms || now_ms < core->tick_base_ms)
        core->tick_base_ms = now_ms > core->tick ? now_ms - core->tick : 0;
    uint64_t ms = now_ms - fk_min(now_ms, core->tick_base_ms);
    core->tick = (uint32_t)fk_min(fk_max(ms, core->tick + 1ull), (uint64_t)UINT32_MAX - 1);
    return core->tick;
}

void core_note_deadline(struct fk_core *core, uint64_t at_us)
{
    if (at_us < core->next_deadline_us)
        core->next_deadline_us = at_us;
}

static void expire(struct fk_core *core, uint64_t now_us)
{
    core->next_deadline_us = UINT64_MAX;
    for (size_t i = 0; i < core->leases.len; i++) {
        struct lease *l = &core->leases.data[i];
        if (!(l->gen & 1))
            continue;
        if (l->deadline_us <= now_us)
            core_lease_drop(core, l);
        else
            core_note_deadline(core, l->deadline_us);
    }
    for (size_t i = 0; i < core->ops.len; i++)
        if ((core->ops.data[i].gen & 1) && !core->ops.data[i].reported)
            core_op_check_deadline(core, &core->ops.data[i], now_us);
    core_probes_run(core, now_us);
}

void fk_core_tick(struct fk_core *core, uint64_t now_us)
{
    if (now_us >= core->next_deadline_us)
        expire(core, now_us);
    core->sweep_noted = core->ix.holes && fk_index_sweep(&core->ix, CORE_SWEEP_ENTRIES);
    if (core->sweep_noted)
        core_note_deadline(core, now_us + CORE_SWEEP_PAUSE_US);
    core_go_on(core);
}

uint64_t fk_core_next_wakeup(const struct fk_core *core)
{
    return core->ix.holes && !core->sweep_noted ? 0 : core->next_deadline_us;
}

/* ---- what comes out ---- */

uint32_t fk_core_take_completions(struct fk_core *core, struct flexkv_completion *out, uint32_t max)
{
    uint32_t n = 0;

    for (; n < max && !fifo_empty(&core->completions); n++) {
        out[n] = *fifo_front(&core->completions);
        fifo_pop(&core->completions);
    }
    return n;
}

#define EVENTS_KEPT 65536u          /* a reset makes many at once: that memory is given back */

uint32_t fk_core_take_events(struct fk_core *core, struct fk_core_event *out, uint32_t max)
{
    uint32_t n = (uint32_t)fk_min(core->ix.events.len - core->events_taken, (size_t)max);
    const struct fk_index_event *ev = n ? core->ix.events.data + core->events_taken : NULL;

    for (uint32_t i = 0; i < n; i++)
        out[i] = (struct fk_core_event){ .key = ev[i].key, .parent = ev[i].parent,
                                         .slot = { ev[i].slot[0], ev[i].slot[1] },
                                         .space = ev[i].space, .tier = ev[i].tier, .group = ev[i].group,
                                         .stored = ev[i].stored };
    core->events_taken += n;
    if (n && core->events_taken == core->ix.events.len) {
        core->events_taken = core->ix.events.len = 0;
        if (core->ix.events.cap > EVENTS_KEPT)
            fk_vec_free(&core->ix.events);
    }
    return n;
}

bool fk_core_events_lost(struct fk_core *core)
{
    bool lost = core->ix.events_lost;

    core->ix.events_lost = false;
    return lost;
}

uint32_t fk_core_present(const struct fk_core *core, uint32_t *at, struct fk_core_present *out,
                         uint32_t max)
{
    const struct fk_index *ix = &core->ix;
    uint32_t n = 0, end = fk_min(ix->n_entries_used, *at + fk_min(max, UINT32_MAX - *at));

    for (uint32_t i = *at; i < end; i++) {
        const struct fk_entry *e = &ix->entries[i];
        struct fk_core_present p = { .key = e->key, .slot = { FK_NONE, FK_NONE } };
        if (!(e->state & FK_ENTRY_USED) || (e->state & FK_ENTRY_DOOMED))
            continue;
        for (int t = 0; t < FK_TIERS; t++)
            if (fk_entry_in(e, (enum fk_tier)t) == FK_READY)
                p.slot[t] = e->slot[t];
        if (p.slot[FK_TIER_CPU] == FK_NONE && p.slot[FK_TIER_SSD] == FK_NONE)
            continue;
        p.space = ix->groups[e->group].space;
        p.group = e->group;
        out[n++] = p;
    }
    *at = end == ix->n_entries_used ? FK_NONE : end;
    return n;
}

struct fk_core_work fk_core_work(const struct fk_core *core)
{
    return (struct fk_core_work){
        .jobs = core->n_jobs_queued != 0,
        .ssd = core_fills_queued(core, FILL_SSD) || !fifo_empty(&core->writes),
        .fetches = core_fills_queued(core, FILL_ELSEWHERE),
        .completions = !fifo_empty(&core->completions),
        .events = core->ix.events.len != 0 || core->ix.events_lost,
        .cancels = core->n_cancels,
    };
}

void fk_core_set_costs(struct fk_core *core, uint32_t space, const struct fk_core_costs *costs)
{
    core->spaces[space].costs = *costs;
}

uint32_t fk_core_reads(const struct fk_core *core, uint32_t space)
{
    return core->spaces[space].n_fills[FILL_SSD];
}

void fk_core_ssd_dirs_out(struct fk_core *core, uint32_t space, uint32_t mask)
{
    core->spaces[space].dirs_out = mask;
    fk_slots_set_out(&core->ix.spaces[space].slots[FK_TIER_SSD], mask);
}

void fk_core_reset(struct fk_core *core, uint64_t now_us)
{
    for (size_t i = 0; i < core->ops.len; i++)
        if ((core->ops.data[i].gen & 1) && !core->ops.data[i].reported)
            core_op_end_early(core, &core->ops.data[i], -ECANCELED, now_us);
    for (size_t i = 0; i < core->leases.len; i++)
        if (core->leases.data[i].gen & 1)
            core_lease_drop(core, &core->leases.data[i]);
    for (uint32_t i = 0; i < core->ix.n_entries_used; i++)
        if (core->ix.entries[i].state & FK_ENTRY_USED)
            fk_index_doom(&core->ix, i);
    for (uint32_t s = 0; s < core->ix.n_spaces; s++) {
        if (!core->spaces[s].ssd_slots)
            continue;
        struct fk_core_ssd_req req = { .kind = FK_SSD_RESET, .space = s };
        (void)fifo_push(&core->writes, req);
    }
}

void fk_core_get_stats(const struct fk_core *core, struct flexkv_stats *out)
{
    const struct fk_index *ix = &core->ix;

    *out = core->stats;
    out->struct_bytes = sizeof(*out);
    out->blocks = ix->n_live;
    out->index_bytes = fk_index_bytes(ix);
    out->leases = core->n_leases;
    out->operations = core->n_ops;
    out->cpu.evicted_blocks = ix->evicted[FK_TIER_CPU];
    out->ssd.evicted_blocks = ix->evicted[FK_TIER_SSD];
    for (uint32_t s = 0; s < ix->n_spaces; s++) {
        out->cpu.slots += ix->spaces[s].slots[FK_TIER_CPU].n;
        out->cpu.free_slots += ix->spaces[s].slots[FK_TIER_CPU].n_free;
        out->ssd.slots += ix->spaces[s].slots[FK_TIER_SSD].n;
        out->ssd.free_slots += ix->spaces[s].slots[FK_TIER_SSD].n_free;
        out->write_backlog_blocks += core->spaces[s].backlog;
    }
}

void fk_core_space_free(const struct fk_core *core, uint32_t space, uint32_t free_slots[FK_TIERS])
{
    for (int t = 0; t < FK_TIERS; t++)
        free_slots[t] = core->ix.spaces[space].slots[t].n_free;
}

bool fk_core_find(const struct fk_core *core, struct fk_key key, struct fk_core_where *out)
{
    uint32_t entry = fk_index_find(&core->ix, key);

    if (entry == FK_NONE)
        return false;
    const struct fk_entry *e = &core->ix.entries[entry];
    *out = (struct fk_core_where){
        .cpu_ready = fk_entry_in(e, FK_TIER_CPU) == FK_READY,
        .ssd_ready = fk_entry_in(e, FK_TIER_SSD) == FK_READY,
        .cpu_slot = e->slot[FK_TIER_CPU], .ssd_slot = e->slot[FK_TIER_SSD], .pins = e->pins,
    };
    return true;
}

const char *fk_core_check(const struct fk_core *core)
{
    const char *w = fk_index_check(&core->ix);

    if (w)
        return w;
    uint64_t pins = 0, held = core->n_loans;
    for (uint32_t i = 0; i < core->ix.n_entries_used; i++)
        if (core->ix.entries[i].state & FK_ENTRY_USED)
            pins += core->ix.entries[i].pins;
    for (size_t i = 0; i < core->leases.len; i++)
        if (core->leases.data[i].gen & 1)
            held += core->leases.data[i].n;
    for (size_t i = 0; i < core->ops.len; i++) {
        const struct op *op = &core->ops.data[i];
        for (uint32_t b = 0; (op->gen & 1) && b < op->n; b++)
            held += op->blocks[b].entry != FK_NONE;
    }
    for (size_t i = 0; i < core->fills.len; i++)
        held += core->fills.data[i].gen & 1;
    for (uint32_t s = 0; s < core->ix.n_spaces; s++)
        held += core->spaces[s].backlog;
    return pins == held ? NULL : "pins do not add up to what leases, operations and I/O hold";
}
