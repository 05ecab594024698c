/* lease.c - match, and the leases it gives out. See core.h. */
#include "base/plant.h"
#include "node/core_impl.h"

static struct lease *lease_new(struct fk_core *core, uint32_t cap)
{
    struct lease *l;

    if (core->free_leases.len) {
        l = &core->leases.data[core->free_leases.data[--core->free_leases.len]];
    } else {
        if (fk_vec_reserve(&core->free_leases, core->leases.len + 1) ||
            fk_vec_push(&core->leases, (struct lease){ 0 }))
            return NULL;
        l = &core->leases.data[core->leases.len - 1];
    }
    if (cap > l->cap) {
        uint32_t *p = realloc(l->entries, cap * sizeof(*p));
        if (!p) {
            core->free_leases.data[core->free_leases.len++] =
                (uint32_t)(l - core->leases.data);
            return NULL;
        }
        l->entries = p;
        l->cap = cap;
    }
    l->gen++;
    l->n = 0;
    core->n_leases++;
    return l;
}

void core_lease_free(struct fk_core *core, struct lease *l)
{
    l->gen++;
    core->n_leases--;
    core->free_leases.data[core->free_leases.len++] = (uint32_t)(l - core->leases.data);
}

void core_lease_drop(struct fk_core *core, struct lease *l)
{
    /* From the end: children go before their parents. */
    for (uint32_t i = l->n; i-- > 0;)
        fk_index_unpin(&core->ix, l->entries[i]);
    core->room_changed = true;
    core_lease_free(core, l);
}

struct lease *core_lease_find(const struct fk_core *core, uint64_t id)
{
    uint32_t at = (uint32_t)id - 1, gen = (uint32_t)(id >> 32);

    if (!id || at >= core->leases.len || core->leases.data[at].gen != gen || !(gen & 1))
        return NULL;
    return &core->leases.data[at];
}

/* Leases leave room for the pins of operations, fills and writes: the count never wraps. */
#define LEASE_PINS_MAX (UINT16_MAX - 64)

/* Pins the leading blocks whose bytes can be had. */
static void pin_visible(struct fk_core *core, struct lease *l, uint32_t space, uint32_t n,
                        struct flexkv_match_result *out)
{
    struct fk_index *ix = &core->ix;

    for (uint32_t i = 0; i < n && l->entries[i] != FK_NONE; i++) {
        struct fk_entry *e = &ix->entries[l->entries[i]];
        if (ix->groups[e->group].space != space || e->pins >= LEASE_PINS_MAX)
            break;
        if (fk_entry_in(e, FK_TIER_CPU) == FK_READY)
            out->cpu_blocks++;
        else if (fk_entry_on_ssd(ix, e))
            out->ssd_blocks++;
        else
            break;
        fk_index_pin(ix, l->entries[i]);
        l->n++;
    }
    out->blocks = l->n;
}

/* What was slow may have become fast: each time it is declined it looks a little better, until it is
 * tried, and measured, again. */
#define FORGET 0.98

/*
 * How many of the leased blocks are worth loading: the number that saves the most time, where each
 * block costs its copy, and its read if it is on SSD only, and saves its computing. The reads already
 * under way come first.
 */
static uint32_t worth_loading(const struct fk_core *core, const struct lease *l)
{
    const struct core_space *sp = &core->spaces[l->space];
    const struct fk_core_costs *c = &sp->costs;
    double gain = 0, best = 0, wait = sp->n_fills * c->ssd_us;
    uint32_t n = 0;

    if (!c->compute_us)
        return l->n;
    for (uint32_t i = 0; i < l->n; i++) {
        bool cpu = fk_entry_in(&core->ix.entries[l->entries[i]], FK_TIER_CPU) == FK_READY;
        gain += c->compute_us - c->copy_us;
        if (!cpu) {
            gain -= c->ssd_us + wait;
            wait = 0;
        }
        if (gain > best) {
            best = gain;
            n = i + 1;
        }
    }
    return n;
}

static void decline(struct fk_core *core, struct lease *l, uint32_t n,
                    struct flexkv_match_result *out)
{
    core->stats.declined_blocks += l->n - n;
    core->spaces[l->space].costs.ssd_us *= FORGET;
    while (l->n > n) {
        const struct fk_entry *e = &core->ix.entries[l->entries[--l->n]];
        if (fk_entry_in(e, FK_TIER_CPU) == FK_READY)
            out->cpu_blocks--;
        else
            out->ssd_blocks--;
        fk_index_unpin(&core->ix, l->entries[l->n]);
    }
    if (!FK_BUG(13))
        out->blocks = n;
}

/* A lease on the known leading blocks; NULL: there are none. */
static struct lease *lease_known(struct fk_core *core, uint32_t instance, const struct fk_key *keys,
                                 uint32_t n, struct flexkv_match_result *out)
{
    uint32_t space = core->instances.data[instance].space;
    uint32_t known = fk_index_match(&core->ix, keys, n);
    struct lease *l = known ? lease_new(core, known) : NULL;

    if (!l)
        return NULL;
    l->space = space;
    l->instance = instance;
    fk_index_resolve(&core->ix, keys, known, l->entries);
    pin_visible(core, l, space, known, out);
    return l;
}

struct lease *core_lease_known(struct fk_core *core, uint32_t instance, const struct fk_key *keys,
                               uint32_t n)
{
    struct flexkv_match_result unused = { 0 };

    return lease_known(core, instance, keys, n, &unused);
}

void fk_core_match(struct fk_core *core, uint32_t instance, const struct fk_key *keys, uint32_t n,
                   uint64_t now_us, struct flexkv_match_result *out)
{
    *out = (struct flexkv_match_result){ 0 };
    core->stats.matches++;
    core->stats.miss_blocks += n;
    struct lease *l = lease_known(core, instance, keys, n, out);
    if (!l)
        return;
    uint32_t worth = worth_loading(core, l);
    if (worth < l->n)
        decline(core, l, worth, out);
    if (!l->n) {
        core_lease_free(core, l);
        return;
    }
    l->deadline_us = now_us + core->params.lease_timeout_us;
    core_note_deadline(core, l->deadline_us);
    out->lease = (uint64_t)l->gen << 32 | (uint32_t)(l - core->leases.data + 1);
    core->stats.miss_blocks -= out->blocks;
    core->stats.match_blocks += out->blocks;
    core->stats.cpu.hit_blocks += out->cpu_blocks;
    core->stats.ssd.hit_blocks += out->ssd_blocks;
}

int fk_core_release(struct fk_core *core, uint64_t lease)
{
    struct lease *l = core_lease_find(core, lease);

    if (!l)
        return -ENOENT;
    core_lease_drop(core, l);
    core_retry_starved(core);
    return 0;
}

int fk_core_lease_instance(const struct fk_core *core, uint64_t lease, uint32_t *instance)
{
    const struct lease *l = core_lease_find(core, lease);

    if (!l)
        return -ENOENT;
    *instance = l->instance;
    return 0;
}
