/* lease.c - match, and the leases it gives out. See core.h. */
#include "base/plant.h"
#include "node/core_impl.h"

static int lease_reserve(struct lease *l, uint32_t cap)
{
    if (cap <= l->cap)
        return 0;
    uint32_t *p = realloc(l->entries, cap * sizeof(*p));
    if (!p)
        return -ENOMEM;
    l->entries = p;
    l->cap = cap;
    return 0;
}

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
    if (lease_reserve(l, cap)) {
        core->free_leases.data[core->free_leases.len++] = (uint32_t)(l - core->leases.data);
        return NULL;
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

static void count_place(struct flexkv_match_result *out, enum core_place at, uint32_t by)
{
    uint32_t *of[] = { &out->cpu_blocks, &out->ssd_blocks, &out->peer_blocks };

    *of[at] += by;
    out->blocks += by;
}

/* Pins the leading blocks whose bytes can be had. */
static void pin_visible(struct fk_core *core, struct lease *l, uint32_t space, uint32_t n,
                        struct flexkv_match_result *out)
{
    struct fk_index *ix = &core->ix;

    for (uint32_t i = 0; i < n && l->entries[i] != FK_NONE; i++) {
        struct fk_entry *e = &ix->entries[l->entries[i]];
        if (ix->groups[e->group].space != space || e->pins >= CORE_PINS_MAX)
            break;
        if (!fk_entry_visible(ix, e))
            break;
        count_place(out, core_place_of(core, l->entries[i]), 1);
        fk_index_pin(ix, l->entries[i]);
        l->n++;
    }
}

static void decline(struct fk_core *core, struct lease *l, uint32_t n,
                    struct flexkv_match_result *out)
{
    struct flexkv_match_result before = *out;

    core->stats.declined_blocks += l->n - n;
    while (l->n > n) {
        count_place(out, core_place_of(core, l->entries[--l->n]), -1u);
        fk_index_unpin(&core->ix, l->entries[l->n]);
    }
    if (FK_BUG(13))
        out->blocks = before.blocks;
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

/* Cuts the lease to what is worth loading. */
static void judge(struct fk_core *core, struct lease *l, uint32_t first, uint64_t now_us,
                  struct flexkv_match_result *out)
{
    uint32_t worth = core_worth(core, l, first);

    if (worth == l->n)
        return;
    core_probe_declined(core, l, worth, now_us);
    decline(core, l, worth, out);
}

static void give_out(struct fk_core *core, struct lease *l, uint64_t now_us, struct flexkv_match_result *out)
{
    if (!l->n) {
        core_lease_free(core, l);
        return;
    }
    l->deadline_us = now_us + core->params.lease_timeout_us;
    core_note_deadline(core, l->deadline_us);
    out->lease = (uint64_t)l->gen << 32 | (uint32_t)(l - core->leases.data + 1);
}

static void count_hits(struct fk_core *core, const struct flexkv_match_result *before,
                       const struct flexkv_match_result *now)
{
    core->stats.miss_blocks -= now->blocks - before->blocks;
    core->stats.match_blocks += now->blocks - before->blocks;
    core->stats.cpu.hit_blocks += now->cpu_blocks - before->cpu_blocks;
    core->stats.ssd.hit_blocks += now->ssd_blocks - before->ssd_blocks;
    core->stats.peer.hit_blocks += now->peer_blocks - before->peer_blocks;
}

static bool visible_at(struct fk_core *core, struct fk_key key)
{
    uint32_t entry = fk_index_find(&core->ix, key);

    return entry != FK_NONE && fk_entry_visible(&core->ix, &core->ix.entries[entry]);
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
    judge(core, l, 0, now_us, out);
    give_out(core, l, now_us, out);
    count_hits(core, &(struct flexkv_match_result){ 0 }, out);
}

/* ---- blocks that others have ---- */

uint32_t core_lease_claim(struct fk_core *core, struct fk_key key, uint32_t parent, uint32_t space, uint32_t group)
{
    struct fk_index *ix = &core->ix;
    uint32_t entry = fk_index_find(ix, key);

    if (entry == FK_NONE)
        return fk_index_add(ix, key, parent, group, core->tick);
    const struct fk_entry *e = &ix->entries[entry];
    enum fk_residency cpu = fk_entry_in(e, FK_TIER_CPU);
    /* LOST, or being written by a put: its place in cpu is not to be had now. */
    if (e->parent != parent || ix->groups[e->group].space != space || e->pins >= CORE_PINS_MAX ||
        (!fk_entry_visible(ix, e) && cpu != FK_ABSENT &&
         !(cpu == FK_FILLING && e->pos[FK_TIER_CPU] != FK_NONE)))
        return FK_NONE;
    fk_index_pin(ix, entry);
    return entry;
}

void core_lease_extend(struct fk_core *core, struct lease **lease, uint32_t instance, uint32_t group,
                       const struct fk_key *keys, uint32_t reach)
{
    uint32_t space = core->instances.data[instance].space;
    struct lease *l = *lease;

    if (!core->spaces[space].elsewhere || reach <= (l ? l->n : 0))
        return;
    if (!l && !(l = lease_new(core, reach)))
        return;
    if (!*lease) {
        l->space = space;
        l->instance = instance;
    } else if (lease_reserve(l, reach)) {
        return;
    }
    while (l->n < reach) {
        uint32_t parent = l->n ? l->entries[l->n - 1] : FK_NONE;
        uint32_t entry = core_lease_claim(core, keys[l->n], parent, space, group);
        if (entry == FK_NONE)
            break;
        l->entries[l->n++] = entry;
    }
    *lease = l;
    if (!l->n) {
        core_lease_free(core, l);
        *lease = NULL;
    }
}

void fk_core_match_extend(struct fk_core *core, uint32_t instance, uint32_t group,
                          const struct fk_key *keys, uint32_t reach, uint64_t now_us,
                          struct flexkv_match_result *out)
{
    struct lease *l = core_lease_find(core, out->lease);
    struct flexkv_match_result before = *out;
    uint32_t n = out->blocks;

    core_tick_now(core, now_us);
    if (reach > n && visible_at(core, keys[n]))
        return;                 /* it is here, and was declined: what is behind it is no better */
    core_lease_extend(core, &l, instance, group, keys, reach);
    if (!l || l->n == n)
        return;
    for (uint32_t i = n; i < l->n; i++)
        count_place(out, core_place_of(core, l->entries[i]), 1);
    judge(core, l, n, now_us, out);
    give_out(core, l, now_us, out);
    count_hits(core, &before, out);
}

void fk_core_cpu_slots(const struct fk_core *core, uint32_t instance, const struct fk_key *keys, uint32_t n,
                       uint32_t *slots)
{
    uint32_t space = core->instances.data[instance].space;

    fk_index_resolve(&core->ix, keys, n, slots);
    for (uint32_t i = 0; i < n; i++) {
        const struct fk_entry *e = slots[i] == FK_NONE ? NULL : &core->ix.entries[slots[i]];
        slots[i] = e && core->ix.groups[e->group].space == space && fk_entry_in(e, FK_TIER_CPU) == FK_READY ?
                   e->slot[FK_TIER_CPU] : FK_NONE;
    }
}

uint32_t fk_core_here(struct fk_core *core, uint32_t instance, const struct fk_key *keys, uint32_t n,
                      uint64_t *bits)
{
    uint32_t space = core->instances.data[instance].space, lead = 0;
    uint32_t known = fk_index_match(&core->ix, keys, n);

    if (bits)
        memset(bits, 0, (n + 63) / 64 * sizeof(*bits));
    if (fk_vec_reserve(&core->scratch, known))
        return 0;
    fk_index_resolve(&core->ix, keys, known, core->scratch.data);
    for (uint32_t i = 0; i < known && (bits || lead == i); i++) {
        uint32_t entry = core->scratch.data[i];
        bool here = entry != FK_NONE && fk_entry_visible(&core->ix, &core->ix.entries[entry]) &&
                    core->ix.groups[core->ix.entries[entry].group].space == space;
        lead += here && lead == i;
        if (here && bits)
            bits[i / 64] |= UINT64_C(1) << i % 64;
    }
    return lead;
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
