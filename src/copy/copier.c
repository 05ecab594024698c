/* copier.c - the choice of a copier, and the one for host memory: a team on the host backend. */
#include "copy/copier.h"

#include <stdio.h>

#include "base/util.h"
#include "copy/cuda/cuda.h"
#include "copy/host_early.h"
#include "copy/host_files.h"
#include "copy/team.h"

struct host_copier {
    struct fk_copier base;
    struct fk_team *team;
    struct fk_host_files files;
    struct fk_host_early early;
};

static int host_attach(struct fk_copier *c, const struct fk_copy_pool *pool)
{
    c->pool = *pool;
    return 0;
}

static void host_detach(struct fk_copier *c)
{
    fk_host_files_close(&((struct host_copier *)c)->files);
    c->pool.base = NULL;
}

static int host_open_files(struct fk_copier *c, const int *fds, uint32_t n, char *why, size_t why_bytes)
{
    return fk_host_files_open(&((struct host_copier *)c)->files, fds, n, why, why_bytes);
}

static uint32_t host_read_files(struct fk_copier *c, const struct fk_copy_place *places, uint32_t n,
                                uint64_t *residues, _Atomic bool *cancelled, int *status)
{
    return fk_host_files_read(&((struct host_copier *)c)->files, c, places, n, residues, cancelled, status);
}

/* Block by block, also in layers: all of them are there when the last block is. */
static uint32_t host_copy(struct fk_copier *base, const struct fk_copy_blocks *blocks,
                          const struct fk_copy_progress *progress, _Atomic bool *cancelled, int *status)
{
    struct host_copier *c = (struct host_copier *)base;
    struct fk_copy_target target = {
        .regions = base->regions, .n_regions = base->n_regions, .pool = base->pool.base,
        .slot_bytes = base->pool.slot_bytes, .slice_offset = base->pool.slice_offset,
        .sums = base->pool.sums,
    };
    _Atomic bool never = false;
    bool early = fk_host_early_begin(&c->early, progress);
    uint32_t ok = fk_team_copy(c->team, fk_copy_backend("host"), &target, blocks, early ? &never : cancelled, status);

    if (early)
        fk_host_early_end(&c->early);
    if (fk_copy_in_layers(progress) && ok == blocks->n)
        progress->layers(progress->arg, base->n_regions, NULL);
    if (progress && progress->placed && ok == blocks->n)
        progress->placed(progress->arg, base->n_regions);
    return ok;
}

static int host_wait_event(struct fk_copier *c, void *event, void *stream)
{
    return fk_host_early_wait(&((struct host_copier *)c)->early, event);
}

static void host_destroy(struct fk_copier *base)
{
    struct host_copier *c = (struct host_copier *)base;

    fk_host_early_close(&c->early);
    fk_team_destroy(c->team);
    free(c);
}

static const struct fk_copier_ops host_ops = {
    .name = "host", .lanes = 1, .attach = host_attach, .detach = host_detach, .copy = host_copy,
    .try_direct = fk_host_try_direct, .open_files = host_open_files, .read_files = host_read_files,
    .wait_event = host_wait_event, .destroy = host_destroy,
};

static int host_create(const flexkv_region *regions, uint32_t n_regions, unsigned threads,
                       struct fk_copier **out)
{
    struct host_copier *c = calloc(1, sizeof(*c));

    if (!c || fk_team_create(threads, &c->team)) {
        free(c);
        return -ENOMEM;
    }
    c->base = (struct fk_copier){ .ops = &host_ops, .regions = regions, .n_regions = n_regions };
    fk_host_early_open(&c->early);
    *out = &c->base;
    return 0;
}

int fk_copier_create(const flexkv_region *regions, uint32_t n_regions, unsigned threads,
                     struct fk_copier **out, char *why, size_t why_bytes)
{
    const struct fk_cuda *cu = fk_cuda_driver(false);
    int device = cu && n_regions ? fk_cuda_device_of(cu, regions[0].base) : -1;

    for (uint32_t i = 1; cu && i < n_regions; i++) {
        int other = fk_cuda_device_of(cu, regions[i].base);
        if (other == device)
            continue;
        snprintf(why, why_bytes, "region 0 is in memory of %s %d, region %u in memory of %s %d: the "
                 "regions of one worker must be in one place", device < 0 ? "the host" : "GPU",
                 fk_max(device, 0), i, other < 0 ? "the host" : "GPU", fk_max(other, 0));
        return -EINVAL;
    }
    if (device >= 0)
        return fk_cuda_copier_create(cu, device, regions, n_regions, out, why, why_bytes);
    int rc = host_create(regions, n_regions, threads, out);
    if (rc)
        snprintf(why, why_bytes, "out of memory");
    return rc;
}
