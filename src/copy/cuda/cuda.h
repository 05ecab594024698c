/*
 * cuda.h - inside the cuda copier: blocks between KV tensors in GPU memory and the pool.
 *
 *   direct   kernel:  pages <-> pinned slots                                     small jobs, and the
 *            first chunk of large ones from the engine
 *   staged   kernel:  pages <-> ring (GPU)         : gather, scatter      large jobs
 *            DMA:              ring <-> pinned slots, one batched call
 *   pieces   DMA:     pages <-> pinned slots, a batched call of single pieces: no kernel, so it does not
 *            wait for an engine that computes on all of the device
 *   slow     DMA block by block, the pool not page-locked
 *
 * A lane is one direction: two streams (DMA, kernel), a ring on the device, chunks under way. Files: cuda.c (make, attach, end), cuda_copy.c (a job), cuda_tune.c (what is
 * measured), pin.c, driver.c.
 */
#ifndef FK_COPY_CUDA_CUDA_H
#define FK_COPY_CUDA_CUDA_H

#include "copy/copier.h"
#include "copy/cuda/driver.h"
#include "copy/cuda/pin.h"

#define FK_CUDA_TILE 4096u              /* UNROLL * 512 in kernels.cu */
#define FK_CUDA_RING_CHUNKS 4u          /* of the largest size: what a lane's ring holds */
#define FK_CUDA_FLIGHTS 128u            /* chunks under way in a lane, at most */
#define FK_CUDA_CHUNK_MAX (16ull << 20)
#define FK_CUDA_FEW 64u                 /* FEW in kernels.cu: blocks whose numbers go with a launch */
#define FK_CUDA_LAYER_EVENTS 256u

struct fk_cuda_tile {                   /* struct tile in kernels.cu */
    uint64_t base, stride, offset;
    uint32_t bytes, align;
};

enum fk_cuda_form { FK_CUDA_DIRECT, FK_CUDA_RING };     /* of the kernel: what the linear side is */

struct fk_cuda_job {                    /* struct job in kernels.cu */
    cu_ptr tiles, pages, slots, linear; /* pages and slots: 0: those of `few` */
    uint64_t linear_stride, offset;
    uint32_t n_blocks, n_tiles, to_pages, reserved;
    uint32_t few[2][FK_CUDA_FEW];       /* pages, slots */
    cu_ptr sums;                        /* of each block; the forms that take them add to it */
};

/* Measured once for each kind of device (cuda_tune.c). */
struct fk_cuda_tuning {
    uint64_t direct_bytes;              /* jobs up to here go by the direct kernel */
    uint64_t chunk_bytes;
    uint32_t direct_ctas;
    uint32_t bytes_per_us;              /* of a large job, with nothing else on the device, most likely */
};

struct fk_cuda_lane {
    bool to_engine;
    cu_stream dma, kernel;
    cu_stream notify;                   /* of the driver's calls when a layer is in place; made at need */
    cu_event dma_done[FK_CUDA_FLIGHTS], kernel_done[FK_CUDA_FLIGHTS];
    cu_event order;                     /* one stream after the other */
    cu_event layer[FK_CUDA_LAYER_EVENTS];       /* made as they are needed, used in turn */
    uint32_t next_layer;
    cu_ptr ring, lists;                 /* lists: pages, then slots, of the job, then checksums */
    uint32_t *host_lists;               /* pinned */
    uint32_t lists_cap;                 /* blocks */
    cu_ptr *dst, *src;                  /* descriptors of a batch */
    size_t *sizes;
    uint32_t batch_cap;
    double bytes_per_us;                /* lately: how long to sleep */
    double best_bytes_per_us;           /* of a large job */
    double wake_us;                     /* how much longer a sleep takes than asked for */
    uint32_t slow_chunks;               /* in a row */
    uint64_t crowded_at;                /* when kernels were last seen to wait for the engine's */
};

struct fk_cuda_copier {
    struct fk_copier base;
    const struct fk_cuda *cu;
    int device;
    cu_context context;
    cu_module module;
    struct fk_direct *direct;           /* reads the SSD's files; NULL: doesn't */
    cu_function residue;
    cu_function copy[2], sum[2];        /* [enum fk_cuda_form]: see kernels.cu; sum: take checksums too */
    bool sum_units;                     /* every tile is whole 16-byte units: they can be taken */
    bool dead;                          /* the driver has failed us: nothing goes any more */
    struct fk_cuda_tuning tuning;
    struct fk_cuda_tile *tiles;         /* of a slice, in its order */
    cu_ptr device_tiles;
    uint32_t n_tiles;
    uint32_t *region_tiles;             /* [n_regions + 1]: the first tile of each */
    uint64_t slice_bytes;
    struct fk_pin *pin;
    struct fk_cuda_lane lane[2];        /* [to_engine] */
};

int fk_cuda_copier_create(const struct fk_cuda *cu, int device, const flexkv_region *regions,
                          uint32_t n_regions, struct fk_copier **out, char *why, size_t why_bytes);

/* cuda_copy.c */
uint32_t fk_cuda_copy(struct fk_copier *base, const struct fk_copy_blocks *blocks,
                      const struct fk_copy_progress *progress, _Atomic bool *cancelled, int *status);
/* cuda_tune.c: measures, or takes what was measured before. Not attached. */
void fk_cuda_tune(struct fk_cuda_copier *c);

/* Logs the first failure of the driver; true if there is one. */
bool fk_cuda_failed(struct fk_cuda_copier *c, cu_result r, const char *what);

extern const char fk_cuda_ptx[];

#endif
