/* cuda.c - the cuda copier made, attached to a pool, and taken apart. See cuda.h. */
#include "copy/cuda/cuda.h"
#include "copy/cuda/direct.h"

#include <stdio.h>

#include "base/log.h"
#include "base/util.h"

bool fk_cuda_failed(struct fk_cuda_copier *c, cu_result r, const char *what)
{
    if (fk_likely(r == CU_OK))
        return false;
    if (!c->dead)
        fk_error("GPU %d: %s: %s; nothing is copied from or to it any more", c->device, what,
                 fk_cuda_error(c->cu, r));
    c->dead = true;
    return true;
}

/* ---- tiles ---- */

static uint32_t alignment_of(uint64_t all)
{
    return all % 16 == 0 ? 16 : all % 4 == 0 ? 4 : 1;
}

static int make_tiles(struct fk_cuda_copier *c)
{
    uint64_t n = 0, offset = 0;

    for (uint32_t r = 0; r < c->base.n_regions; r++)
        n += fk_div_up(c->base.regions[r].page_bytes, FK_CUDA_TILE);
    c->tiles = calloc(n, sizeof(*c->tiles));
    c->region_tiles = calloc(c->base.n_regions + 1, sizeof(*c->region_tiles));
    if (!c->tiles || !c->region_tiles || n > UINT32_MAX)
        return -ENOMEM;
    for (uint32_t r = 0; r < c->base.n_regions; r++) {
        const flexkv_region *g = &c->base.regions[r];
        uint64_t base = (uint64_t)(uintptr_t)g->base;
        c->region_tiles[r] = c->n_tiles;
        for (uint64_t at = 0; at < g->page_bytes; at += FK_CUDA_TILE) {
            uint32_t bytes = (uint32_t)fk_min(g->page_bytes - at, (uint64_t)FK_CUDA_TILE);
            c->tiles[c->n_tiles++] = (struct fk_cuda_tile){
                .base = base + at, .stride = g->stride, .offset = offset + at, .bytes = bytes };
        }
        offset += g->page_bytes;
    }
    c->region_tiles[c->base.n_regions] = c->n_tiles;
    c->slice_bytes = offset;
    return 0;
}

/* On the linear side a tile begins where the geometry of the space says; or, in the ring, where the
 * pieces of the same part end. */
static cu_result write_tiles(struct fk_cuda_copier *c, const struct fk_copy_pool *pool)
{
    uint64_t linear = (uint64_t)(uintptr_t)pool->base | pool->slot_bytes | pool->slice_offset;

    for (uint32_t i = 0; i < c->base.n_regions; i++)
        linear |= c->base.regions[i].page_bytes;
    c->sum_units = true;
    for (uint32_t i = 0; i < c->n_tiles; i++) {
        struct fk_cuda_tile *t = &c->tiles[i];
        t->align = alignment_of(linear | t->base | t->stride | t->offset | t->bytes);
        c->sum_units &= t->align == 16;
    }
    return c->cu->MemcpyHtoD(c->device_tiles, c->tiles, c->n_tiles * sizeof(*c->tiles));
}

/* ---- lanes ---- */

static cu_result lane_open(struct fk_cuda_copier *c, struct fk_cuda_lane *l, bool to_engine)
{
    const struct fk_cuda *cu = c->cu;
    int least = 0, greatest = 0;
    cu_result r = cu->CtxGetStreamPriorityRange(&least, &greatest);

    l->to_engine = to_engine;
    l->bytes_per_us = 40000;
    if (!r)
        r = cu->StreamCreateWithPriority(&l->dma, CU_STREAM_NON_BLOCKING_FLAG, least);
    if (!r)
        r = cu->StreamCreateWithPriority(&l->kernel, CU_STREAM_NON_BLOCKING_FLAG, least);
    for (uint32_t i = 0; !r && i < FK_CUDA_FLIGHTS; i++) {
        r = cu->EventCreate(&l->dma_done[i], CU_EVENT_NO_TIMING);
        if (!r)
            r = cu->EventCreate(&l->kernel_done[i], CU_EVENT_NO_TIMING);
    }
    return r ? r : cu->EventCreate(&l->order, CU_EVENT_NO_TIMING);
}

static void lane_close(struct fk_cuda_copier *c, struct fk_cuda_lane *l)
{
    const struct fk_cuda *cu = c->cu;

    for (uint32_t i = 0; i < FK_CUDA_LAYER_EVENTS; i++)
        if (l->layer[i])
            cu->EventDestroy(l->layer[i]);
    for (uint32_t i = 0; i < FK_CUDA_FLIGHTS; i++) {
        if (l->dma_done[i])
            cu->EventDestroy(l->dma_done[i]);
        if (l->kernel_done[i])
            cu->EventDestroy(l->kernel_done[i]);
    }
    if (l->order)
        cu->EventDestroy(l->order);
    if (l->dma)
        cu->StreamDestroy(l->dma);
    if (l->kernel)
        cu->StreamDestroy(l->kernel);
    if (l->notify)
        cu->StreamDestroy(l->notify);
    if (l->ring)
        cu->MemFree(l->ring);
    if (l->lists)
        cu->MemFree(l->lists);
    if (l->host_lists)
        cu->MemFreeHost(l->host_lists);
    free(l->dst);
    free(l->src);
    free(l->sizes);
}

/* ---- the copier ---- */

static void cuda_destroy(struct fk_copier *base)
{
    struct fk_cuda_copier *c = (struct fk_cuda_copier *)base;

    if (c->context) {
        c->cu->CtxSetCurrent(c->context);
        for (int i = 0; i < 2; i++)
            lane_close(c, &c->lane[i]);
        if (c->device_tiles)
            c->cu->MemFree(c->device_tiles);
        if (c->module)
            c->cu->ModuleUnload(c->module);
        c->cu->DevicePrimaryCtxRelease(c->device);
    }
    free(c->tiles);
    free(c->region_tiles);
    free(c);
}

/* Without the rings copies go by the direct kernel alone. */
static void make_rings(struct fk_cuda_copier *c)
{
    for (int i = 0; i < 2; i++) {
        struct fk_cuda_lane *l = &c->lane[i];
        if (!l->ring && c->cu->MemAlloc(&l->ring, FK_CUDA_RING_CHUNKS * c->tuning.chunk_bytes) != CU_OK) {
            fk_warn("GPU %d has no %llu MiB left for staging: large copies are slower", c->device,
                    (unsigned long long)(FK_CUDA_RING_CHUNKS * c->tuning.chunk_bytes / FK_MIB));
            l->ring = 0;
        }
    }
}

static int cuda_attach(struct fk_copier *base, const struct fk_copy_pool *pool)
{
    struct fk_cuda_copier *c = (struct fk_cuda_copier *)base;
    struct fk_pin_params pin = { .cu = c->cu, .context = c->context, .device = c->device,
                                 .base = pool->base, .bytes = pool->bytes,
                                 .unit_bytes = pool->slot_bytes,
                                 .chunk_bytes = pool->how.pin_chunk_bytes };
    int relaxed = CU_CAPTURE_RELAXED;

    c->cu->CtxSetCurrent(c->context);
    c->cu->ThreadExchangeStreamCaptureMode(&relaxed);
    if (!c->tuning.chunk_bytes)
        fk_cuda_tune(c);
    make_rings(c);
    if (fk_cuda_failed(c, write_tiles(c, pool), "the page table can't be written"))
        return -EIO;
    int rc = fk_pin_open(&pin, &c->pin);
    if (rc)
        return rc;
    base->pool = *pool;
    return 0;
}

static void cuda_detach(struct fk_copier *base)
{
    struct fk_cuda_copier *c = (struct fk_cuda_copier *)base;

    c->cu->CtxSetCurrent(c->context);
    for (int i = 0; i < 2; i++) {
        c->cu->StreamSynchronize(c->lane[i].dma);
        c->cu->StreamSynchronize(c->lane[i].kernel);
    }
    fk_direct_close(c);
    fk_pin_close(fk_steal(c->pin));
    base->pool.base = NULL;
}

static int cuda_wait_event(struct fk_copier *base, void *event, void *stream)
{
    struct fk_cuda_copier *c = (struct fk_cuda_copier *)base;

    return c->cu->StreamWaitEvent(stream, event, 0) == CU_OK ? 0 : -EIO;
}

static int cuda_try_direct(struct fk_copier *base, const int *fds, uint32_t n, char *why, size_t why_bytes)
{
    struct fk_cuda_copier *c = (struct fk_cuda_copier *)base;
    struct fk_direct_params p = { .cu = c->cu, .context = c->context, .fds = fds, .n_fds = n,
                                  .timeout_ms = FK_DIRECT_TIMEOUT_MS };

    return fk_direct_probe(&p, why, why_bytes);
}

static int cuda_open_files(struct fk_copier *base, const int *fds, uint32_t n, char *why, size_t why_bytes)
{
    struct fk_cuda_copier *c = (struct fk_cuda_copier *)base;

    c->cu->CtxSetCurrent(c->context);
    return fk_direct_open(c, NULL, fds, n, why, why_bytes);
}

static const struct fk_copier_ops cuda_ops = {
    .name = "cuda", .lanes = 2, .attach = cuda_attach, .detach = cuda_detach, .copy = fk_cuda_copy,
    .wait_event = cuda_wait_event, .try_direct = cuda_try_direct, .open_files = cuda_open_files,
    .read_files = fk_direct_read, .destroy = cuda_destroy,
};

static bool device_fits(struct fk_cuda_copier *c, char *why, size_t why_bytes)
{
    int major = 0, minor = 0, same = 0;

    c->cu->DeviceGetAttribute(&major, CU_DEVICE_CC_MAJOR, c->device);
    c->cu->DeviceGetAttribute(&minor, CU_DEVICE_CC_MINOR, c->device);
    c->cu->DeviceGetAttribute(&same, CU_DEVICE_HOST_POINTERS, c->device);
    if (major < 8 || !same)
        snprintf(why, why_bytes, "GPU %d has compute capability %d.%d%s; 8.0 or later is needed",
                 c->device, major, minor, same ? "" : " and no common addresses with the host");
    return major >= 8 && same;
}

static cu_result open_device(struct fk_cuda_copier *c)
{
    const struct fk_cuda *cu = c->cu;
    cu_result r = cu->DevicePrimaryCtxRetain(&c->context, c->device);

    if (!r)
        r = cu->CtxSetCurrent(c->context);
    if (!r)
        r = cu->ModuleLoadData(&c->module, fk_cuda_ptx);
    if (!r)
        r = cu->ModuleGetFunction(&c->copy[FK_CUDA_DIRECT], c->module, "fk_copy_direct");
    if (!r)
        r = cu->ModuleGetFunction(&c->copy[FK_CUDA_RING], c->module, "fk_copy_ring");
    if (!r)
        r = cu->ModuleGetFunction(&c->sum[FK_CUDA_DIRECT], c->module, "fk_sum_direct");
    if (!r)
        r = cu->ModuleGetFunction(&c->sum[FK_CUDA_RING], c->module, "fk_sum_ring");
    if (!r)
        r = cu->ModuleGetFunction(&c->residue, c->module, "fk_residue");
    for (int i = 0; !r && i < 2; i++)
        r = lane_open(c, &c->lane[i], i == 1);
    return r ? r : c->cu->MemAlloc(&c->device_tiles, c->n_tiles * sizeof(*c->tiles));
}

int fk_cuda_copier_create(const struct fk_cuda *cu, int device, const flexkv_region *regions,
                          uint32_t n_regions, struct fk_copier **out, char *why, size_t why_bytes)
{
    struct fk_cuda_copier *c = calloc(1, sizeof(*c));
    int relaxed = CU_CAPTURE_RELAXED;

    if (!c)
        return -ENOMEM;
    c->base = (struct fk_copier){ .ops = &cuda_ops, .regions = regions, .n_regions = n_regions };
    c->cu = cu;
    c->device = device;
    int rc = device_fits(c, why, why_bytes) ? make_tiles(c) : -ENODEV;
    if (!rc) {
        cu->ThreadExchangeStreamCaptureMode(&relaxed);
        cu_result r = open_device(c);
        cu->ThreadExchangeStreamCaptureMode(&relaxed);
        if (r) {
            snprintf(why, why_bytes, "GPU %d: %s", device, fk_cuda_error(cu, r));
            rc = -ENODEV;
        }
    }
    if (rc) {
        cuda_destroy(&c->base);
        return rc;
    }
    *out = &c->base;
    return 0;
}
