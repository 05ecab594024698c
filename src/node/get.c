/* get.c - get and prefetch: from a lease, or a match of its own, to an op. See core.h. */
#include "node/core_impl.h"

/* Blocks that were used again and are not on SSD yet: written now, if the policy says so. */
static void write_reused(struct fk_core *core, const struct lease *l)
{
    struct fk_index *ix = &core->ix;

    if (core->params.write_policy == FK_WRITE_ON_EVICT || !core->spaces[l->space].ssd_slots)
        return;
    core->to_write.len = 0;
    for (uint32_t i = 0; i < l->n; i++)
        if (fk_entry_in(&ix->entries[l->entries[i]], FK_TIER_SSD) == FK_ABSENT)
            (void)fk_vec_push(&core->to_write, l->entries[i]);
    core_write_blocks(core, core->to_write.data, (uint32_t)core->to_write.len);
}

/* The lease's pins on [first, first + n) go over to the op; the others end. */
static void take_over(struct fk_core *core, struct op *op, struct lease *l, uint32_t first)
{
    for (uint32_t i = l->n; i-- > first + op->n;)
        fk_index_unpin(&core->ix, l->entries[i]);
    for (uint32_t i = first; i-- > 0;)
        fk_index_unpin(&core->ix, l->entries[i]);
    for (uint32_t i = 0; i < op->n; i++)
        op->blocks[i] = (struct op_block){ .entry = l->entries[first + i], .state = BLK_IDLE };
    core_lease_free(core, l);
}

int fk_core_get(struct fk_core *core, uint64_t lease, uint32_t first, uint32_t n,
                const struct fk_core_op_args *args, uint64_t now_us, uint64_t *id)
{
    struct lease *l = core_lease_find(core, lease);

    if (!l)
        return -ENOENT;
    if (first > l->n || n > l->n - first)
        return -EINVAL;
    struct op *op = core_op_new(core, FLEXKV_OP_GET, l->instance, n, args, now_us, id);
    if (!op)
        return -ENOMEM;
    op->layerwise = args->layerwise;
    op->counter = args->counter;
    op->direct = core->instances.data[op->instance].direct && !op->layerwise;
    op->early = args->early && !op->layerwise;
    core->instances.data[op->instance].layered |= op->layerwise;
    uint32_t tick = core_tick_now(core, now_us);
    fk_index_used(&core->ix, l->entries, l->n, tick);
    for (uint32_t i = 0; i < l->n; i++)
        fk_index_touch(&core->ix, l->entries[i], tick);
    write_reused(core, l);
    take_over(core, op, l, first);
    for (uint32_t i = 0; i < n; i++)
        op->blocks[i].page = args->pages[i];
    core->stats.gets++;
    core_op_pump(core, op);
    return 0;
}

int fk_core_prefetch(struct fk_core *core, uint32_t instance, const struct fk_key *keys, uint32_t n,
                     const struct fk_core_op_args *args, uint64_t now_us, uint64_t *id)
{
    struct lease *l = core_lease_known(core, instance, keys, n);
    core_lease_extend(core, &l, instance, args->group, keys, fk_min(args->reach, n));
    struct op *op = core_op_new(core, FLEXKV_OP_PREFETCH, instance, l ? l->n : 0, args, now_us, id);
    if (!op) {
        if (l)
            core_lease_drop(core, l);
        return -ENOMEM;
    }
    uint32_t tick = core_tick_now(core, now_us);
    core->stats.prefetches++;
    op->direct = core->instances.data[instance].direct && !core->instances.data[instance].layered;
    if (l) {
        /* Not a use, but they will be used soon. Pinned blocks are in no heap. */
        for (uint32_t i = 0; i < l->n; i++)
            core->ix.entries[l->entries[i]].atime = tick;
        take_over(core, op, l, 0);
    }
    core_op_pump(core, op);
    return 0;
}
