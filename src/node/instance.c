/* instance.c - the engines that use a space: each has its workers, with a queue of copy jobs for
 * each of them. See core.h, core_impl.h. */
#include "node/core_impl.h"

static uint32_t free_number(struct fk_core *core)
{
    for (uint32_t i = 0; i < core->instances.len; i++)
        if (!core->instances.data[i].queue)
            return i;
    if (fk_vec_push(&core->instances, (struct core_instance){ 0 }))
        return FK_NONE;
    return (uint32_t)core->instances.len - 1;
}

int fk_core_instance_add(struct fk_core *core, uint32_t space, uint32_t workers,
                         uint32_t *instance)
{
    struct job_queue *queue = calloc(fk_max(workers, 1u), sizeof(*queue));
    uint32_t at = queue ? free_number(core) : FK_NONE;

    if (at == FK_NONE) {
        free(queue);
        return -ENOMEM;
    }
    core->instances.data[at] = (struct core_instance){ .space = space, .workers = workers,
                                                       .queue = queue };
    *instance = at;
    return 0;
}

void fk_core_instance_direct(struct fk_core *core, uint32_t instance, bool direct)
{
    core->instances.data[instance].direct = direct;
}

bool fk_core_instance_idle(const struct fk_core *core, uint32_t instance)
{
    return core->instances.data[instance].jobs_out == 0;
}

void fk_core_fail_ops(struct fk_core *core, uint32_t instance, int status, uint64_t now_us)
{
    for (size_t i = 0; i < core->ops.len; i++) {
        struct op *op = &core->ops.data[i];
        if ((op->gen & 1) && !op->reported && op->instance == instance)
            core_op_end_early(core, op, status, now_us);
    }
}

void fk_core_instance_end(struct fk_core *core, uint32_t instance, int status, uint64_t now_us)
{
    for (size_t i = 0; i < core->leases.len; i++) {
        struct lease *l = &core->leases.data[i];
        if ((l->gen & 1) && l->instance == instance)
            core_lease_drop(core, l);
    }
    fk_core_fail_ops(core, instance, status, now_us);
    core_retry_starved(core);
}

void fk_core_instance_remove(struct fk_core *core, uint32_t instance)
{
    struct core_instance *in = &core->instances.data[instance];

    core_jobs_fini(in);
    *in = (struct core_instance){ 0 };
}

uint32_t fk_core_instance_jobs(const struct fk_core *core, uint32_t instance)
{
    return core->instances.data[instance].jobs_out;
}
