/*
 * worth.c - what of a match is worth loading, and probes: background reads that show how fast a tier is. See core.h,
 * core_impl.h.
 *
 * Declining costs what having no cache costs; loading what is computed sooner costs more. So a block is taken from the SSD
 * if that at its slowest is faster than computing, and not before it has been measured. Networks are mostly faster than
 * computing, and a prompt that another node has is to be found by the first who asks: elsewhere means decide,
 * and who was not measured is taken for fast.
 *
 *   a match leaves blocks out, or the first blocks leave the cpu tier for the SSD alone
 *        -> a few of them are noted -> when the tier is idle, or after half a second, they are prefetched
 *        -> the shell measures, as it does with any read -> fk_core_set_costs
 *
 * One probe a tier and a space at a time, of probe_blocks, with two seconds of rest; it ends after a tenth of a second,
 * has no completion, and otherwise is a prefetch: behind every get, within quotas, verified.
 */
#include "base/plant.h"
#include "node/core_impl.h"

#define COMPUTE_SURE 0.9                /* an engine tells its speed anew when it is a tenth off */
#define PROBE_REST_US 2000000u
#define PROBE_LOOK_US 5000u             /* is the tier idle now? */
#define PROBE_LATEST_US 500000u         /* a tier that is never idle is measured as it is */
#define PROBE_TIMEOUT_US 100000u
#define PROBE_WALK_MAX 4096u            /* up a chain */

enum core_place core_place_of(struct fk_core *core, uint32_t entry)
{
    const struct fk_entry *e = &core->ix.entries[entry];

    if (fk_entry_in(e, FK_TIER_CPU) == FK_READY)
        return CORE_IN_CPU;
    return fk_entry_on_ssd(&core->ix, e) ? CORE_ON_SSD : CORE_ELSEWHERE;
}

static bool is_coming(const struct fk_core *core, uint32_t entry)
{
    const struct fk_entry *e = &core->ix.entries[entry];

    return fk_entry_in(e, FK_TIER_CPU) == FK_FILLING && e->pos[FK_TIER_CPU] != FK_NONE;
}

/* ---- deciding ---- */

uint32_t core_worth(struct fk_core *core, const struct lease *l, uint32_t first)
{
    const struct core_space *sp = &core->spaces[l->space];
    const struct fk_core_costs *c = &sp->costs;
    double read[] = { 0, fk_rate_slow(&c->ssd), c->fetch.us };
    double wait[] = { 0, c->load_us + (sp->n_fills[FILL_SSD] + sp->n_writes) * read[CORE_ON_SSD], c->load_us };
    double gain = 0, best = 0;
    uint32_t n = first;

    if (!c->compute_us)
        return l->n;
    for (uint32_t i = first; i < l->n; i++) {
        enum core_place at = core_place_of(core, l->entries[i]);
        if (at == CORE_ON_SSD && !read[at] && !FK_BUG(16))
            break;
        gain += at == CORE_ON_SSD ? COMPUTE_SURE * c->compute_us - fk_rate_slow(&c->copy) : c->compute_us - c->copy.us;
        gain -= wait[at];
        if (!is_coming(core, l->entries[i]))        /* else it is in the SSD's wait; what others send is not counted at all */
            gain -= read[at];
        wait[at] = 0;
        if (gain > best) {
            best = gain;
            n = i + 1;
        }
    }
    return n;
}

/* ---- probes ---- */

static struct core_probe *probe_to_note(struct fk_core *core, uint32_t space, enum fill_source from, uint64_t now_us)
{
    struct core_space *sp = &core->spaces[space];
    struct core_probe *p = &sp->probe[from];

    if (!sp->probe_blocks || !sp->costs.compute_us || p->due_us || now_us < p->not_before_us)
        return NULL;
    if (!p->keys && !(p->keys = malloc(sp->probe_blocks * sizeof(*p->keys))))
        return NULL;
    p->n = 0;
    p->due_us = now_us + PROBE_LOOK_US;
    p->latest_us = now_us + PROBE_LATEST_US;
    core_note_deadline(core, p->due_us);
    return p;
}

void core_probe_declined(struct fk_core *core, const struct lease *l, uint32_t first, uint64_t now_us)
{
    const struct fk_entry *entries = core->ix.entries;
    enum core_place at = CORE_IN_CPU;
    uint32_t i = first;

    while (i < l->n && (at = core_place_of(core, l->entries[i])) == CORE_IN_CPU)
        i++;
    if (at == CORE_IN_CPU || is_coming(core, l->entries[i]))
        return;
    struct core_probe *p = probe_to_note(core, l->space, at == CORE_ON_SSD ? FILL_SSD : FILL_ELSEWHERE, now_us);
    if (!p)
        return;
    uint32_t parent = entries[l->entries[i]].parent;
    p->parent = parent == FK_NONE ? (struct fk_key){ 0 } : entries[parent].key;
    p->group = entries[l->entries[i]].group;
    for (; i < l->n && p->n < core->spaces[l->space].probe_blocks && core_place_of(core, l->entries[i]) == at; i++)
        p->keys[p->n++] = entries[l->entries[i]].key;
}

/* Before the first of them is asked for its speed is known. */
void core_probe_left_cpu(struct fk_core *core, uint32_t entry)
{
    const struct fk_entry *e = &core->ix.entries[entry];
    uint32_t space = core->ix.groups[e->group].space;

    if (core->spaces[space].costs.ssd.us > 0 || !fk_entry_on_ssd(&core->ix, e))
        return;
    struct core_probe *p = probe_to_note(core, space, FILL_SSD, core->now_us);
    if (p)
        p->keys[p->n++] = e->key;
}

static uint32_t any_instance(const struct fk_core *core, uint32_t space)
{
    for (uint32_t i = 0; i < core->instances.len; i++)
        if (core->instances.data[i].queue && core->instances.data[i].space == space)
            return i;
    return FK_NONE;
}

/* The op holds the entry, which is pinned for it, and lets go of it when it ends. */
static void hold(struct op *op, uint32_t entry, enum blk_state state)
{
    op->blocks[op->n++] = (struct op_block){ .entry = entry, .state = (uint8_t)state };
}

static void pin_and_hold(struct fk_core *core, struct op *op, uint32_t entry, enum blk_state state)
{
    fk_index_pin(&core->ix, entry);
    hold(op, entry, state);
}

/* Can it be read? If not it may be where the cpu tier's part of the chain ends. */
static bool only_on_ssd(struct fk_core *core, uint32_t entry)
{
    const struct fk_entry *e = &core->ix.entries[entry];

    return fk_entry_on_ssd(&core->ix, e) && fk_entry_in(e, FK_TIER_CPU) == FK_ABSENT && e->pins < CORE_PINS_MAX;
}

/*
 * Up from the last block noted: a run that continues what the cpu tier has of the chain, so that prefixes there stay
 * whole. What it continues is held as well, lest making room pushes it out.
 */
static void take_from_ssd(struct fk_core *core, const struct core_probe *p, uint32_t max, struct op *op)
{
    const struct fk_entry *entries = core->ix.entries;
    uint32_t last = fk_index_find(&core->ix, p->keys[p->n - 1]), top = last, n = 0, run[FK_CORE_PROBE_MAX];

    while (top != FK_NONE && n < PROBE_WALK_MAX && only_on_ssd(core, top)) {
        run[n++ % max] = top;
        top = entries[top].parent;
    }
    if (!n || (top != FK_NONE && (n == PROBE_WALK_MAX || fk_entry_in(&entries[top], FK_TIER_CPU) != FK_READY ||
                                  entries[top].pins >= CORE_PINS_MAX)))
        return;
    if (top != FK_NONE)
        pin_and_hold(core, op, top, BLK_DONE);
    for (uint32_t i = 0; i < fk_min(n, max); i++)
        pin_and_hold(core, op, run[(n - 1 - i) % max], BLK_IDLE);
}

static void take_elsewhere(struct fk_core *core, uint32_t space, const struct core_probe *p, struct op *op)
{
    uint32_t parent = fk_key_is_zero(p->parent) ? FK_NONE : fk_index_find(&core->ix, p->parent);

    if (parent == FK_NONE ? !fk_key_is_zero(p->parent) : core->ix.entries[parent].pins >= CORE_PINS_MAX)
        return;
    if (parent != FK_NONE)
        pin_and_hold(core, op, parent, BLK_DONE);
    for (uint32_t i = 0; i < p->n; i++) {
        uint32_t entry = core_lease_claim(core, p->keys[i], parent, space, p->group);
        if (entry == FK_NONE)
            break;
        hold(op, entry, BLK_IDLE);
        parent = entry;
    }
}

static void probe_start(struct fk_core *core, uint32_t space, enum fill_source from, uint64_t now_us)
{
    struct core_probe *p = &core->spaces[space].probe[from];
    struct fk_core_op_args args = { .deadline_us = now_us + PROBE_TIMEOUT_US };
    uint32_t instance = any_instance(core, space);
    uint64_t id;

    p->due_us = 0;
    p->not_before_us = now_us + PROBE_REST_US;
    if (instance == FK_NONE || !p->n)
        return;
    core_tick_now(core, now_us);
    uint32_t max = core->spaces[space].probe_blocks;
    struct op *op = core_op_new(core, FLEXKV_OP_PREFETCH, instance, max + 1, &args, now_us, &id);
    if (!op)
        return;
    op->silent = true;
    op->n = 0;
    if (from == FILL_SSD)
        take_from_ssd(core, p, max, op);
    else
        take_elsewhere(core, space, p, op);
    op->limit = op->n;
    core_op_pump(core, op);
}

void core_probes_run(struct fk_core *core, uint64_t now_us)
{
    for (uint32_t s = 0; s < core->ix.n_spaces; s++) {
        struct core_space *sp = &core->spaces[s];
        for (int from = 0; from < FILL_SOURCES; from++) {
            struct core_probe *p = &sp->probe[from];
            bool busy = sp->n_fills[from] || (from == FILL_SSD && sp->backlog);
            if (!p->due_us)
                continue;
            if (p->due_us <= now_us && busy && now_us < p->latest_us)
                p->due_us = now_us + PROBE_LOOK_US;
            if (p->due_us <= now_us)
                probe_start(core, s, (enum fill_source)from, now_us);
            else
                core_note_deadline(core, p->due_us);
        }
    }
}
