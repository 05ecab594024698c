/* lease.c - match, and the leases it gives out. See core.h. */
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

struct lease *core_lease_find(struct fk_core *core, uint64_t id)
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

void fk_core_match(struct fk_core *core, uint32_t space, const struct fk_key *keys, uint32_t n,
                   uint64_t now_us, struct flexkv_match_result *out)
{
    *out = (struct flexkv_match_result){ 0 };
    core->stats.matches++;
    core->stats.miss_blocks += n;
    uint32_t known = fk_index_match(&core->ix, keys, n);
    struct lease *l = known ? lease_new(core, known) : NULL;
    if (!l)
        return;
    fk_index_resolve(&core->ix, keys, known, l->entries);
    pin_visible(core, l, space, known, out);
    if (!l->n) {
        core_lease_free(core, l);
        return;
    }
    l->space = space;
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

int fk_core_lease_space(struct fk_core *core, uint64_t lease, uint32_t *space)
{
    const struct lease *l = core_lease_find(core, lease);

    if (!l)
        return -ENOENT;
    *space = l->space;
    return 0;
}
