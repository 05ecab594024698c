/*
 * copier.h - what an agent copies with: one per worker, for the memory its regions lie in. Two
 * kinds, chosen by whose memory the regions are: host (copy.h, team.h) and cuda (cuda/).
 *
 *   create(regions) -> attach(pool) -> copy ... copy -> detach -> destroy
 *                      once for each node found          ^ returns when nothing touches the pool
 */
#ifndef FK_COPY_COPIER_H
#define FK_COPY_COPIER_H

#include <stdatomic.h>
#include <stddef.h>

#include "copy/copy.h"

struct fk_copier;

/* What a node's options say about copies between GPU memory and its pool; 0: as measured. */
struct fk_copy_options {
    uint64_t pin_chunk_bytes;           /* page-locked in pieces of so much */
    uint32_t ctas[2];                   /* of every kernel; [to_engine] */
    bool copy_engine[2];                /* no kernels; [to_engine] */
    bool poll_layers;                   /* see fk_copy_progress.placed */
};

/* A pool as this process has mapped it. */
struct fk_copy_pool {
    char *base;
    uint64_t bytes, slot_bytes, slice_offset;
    struct fk_copy_options how;
    struct fk_copy_sums sums;           /* of this slice, in slot 0 */
};

/*
 * What a copy to the engine tells of itself. With `layers` it is one in layers, told of when all pages of the
 * regions before `regions` are on their way, in place when `event` (cuda; NULL: they are in place) has
 * come. Called in order, by the thread that copies.
 */
struct fk_copy_progress {
    void (*layers)(void *arg, uint32_t regions, void *event);
    /* Optional: all pages of the regions before `regions` are in place. In order; by the thread that
     * copies (host; cuda with poll_layers) or one of the driver's, which must not call the driver. */
    void (*placed)(void *arg, uint32_t regions);
    /* Optional, of one not in layers (cuda): all pages are on their way, in place when `event` has come; from
     * here on *cancelled is not looked at. At most once, by the thread that copies. */
    void (*on_its_way)(void *arg, void *event);
    void *arg;
    const uint32_t *layer_ends;     /* regions up to each layer's end */
    uint32_t n_layers;
};

static inline bool fk_copy_in_layers(const struct fk_copy_progress *p)
{
    return p && p->layers;
}

/* A slice in a file, and the page it is to go to. */
struct fk_copy_place { uint64_t offset; uint32_t file, page; };

struct fk_copier_ops {
    const char *name;
    unsigned lanes;                 /* 2: may copy in both directions at once, each in one thread */
    int (*attach)(struct fk_copier *c, const struct fk_copy_pool *pool);
    void (*detach)(struct fk_copier *c);
    uint32_t (*copy)(struct fk_copier *c, const struct fk_copy_blocks *blocks,
                     const struct fk_copy_progress *progress, _Atomic bool *cancelled, int *status);
    int (*wait_event)(struct fk_copier *c, void *event, void *stream);
    /* See cuda/direct.h. Files stay open until the copier is detached. */
    int (*try_direct)(struct fk_copier *c, const int *fds, uint32_t n, char *why, size_t why_bytes);
    int (*open_files)(struct fk_copier *c, const int *fds, uint32_t n, char *why, size_t why_bytes);
    uint32_t (*read_files)(struct fk_copier *c, const struct fk_copy_place *places, uint32_t n,
                           uint64_t *residues, _Atomic bool *cancelled, int *status);
    void (*destroy)(struct fk_copier *c);
};

struct fk_copier {                  /* first member of each kind's struct */
    const struct fk_copier_ops *ops;
    const flexkv_region *regions;   /* the owner's */
    uint32_t n_regions;
    struct fk_copy_pool pool;       /* base NULL: not attached */
};

/*
 * threads: for host memory. -EINVAL: the regions lie in memory of different kinds or devices,
 * -ENODEV: in a device's memory that can't be used; `why` says more.
 */
int fk_copier_create(const flexkv_region *regions, uint32_t n_regions, unsigned threads,
                     struct fk_copier **out, char *why, size_t why_bytes);
static inline void fk_copier_destroy(struct fk_copier *c)
{
    if (c)
        c->ops->destroy(c);
}

static inline int fk_copier_attach(struct fk_copier *c, const struct fk_copy_pool *pool)
{
    return c->ops->attach(c, pool);
}

static inline void fk_copier_detach(struct fk_copier *c)
{
    if (c->pool.base)
        c->ops->detach(c);
}

/*
 * Copies the blocks; returns how many leading ones are in place: all, or fewer when *cancelled
 * became true or the copy failed (*status then has its -errno). Nothing is under way any more when
 * it returns. progress may be NULL; it is for copies to the engine.
 */
static inline uint32_t fk_copier_copy(struct fk_copier *c, const struct fk_copy_blocks *blocks,
                                      const struct fk_copy_progress *progress,
                                      _Atomic bool *cancelled, int *status)
{
    return c->ops->copy(c, blocks, progress, cancelled, status);
}

/* May files (one in each directory) be read straight into the regions' memory? 0, or -errno and why. */
static inline int fk_copier_try_direct(struct fk_copier *c, const int *fds, uint32_t n, char *why,
                                       size_t why_bytes)
{
    return c->ops->try_direct(c, fds, n, why, why_bytes);
}

/* Attached. The files that will be read (one for each directory); 0, or -errno and why. */
static inline int fk_copier_open_files(struct fk_copier *c, const int *fds, uint32_t n, char *why,
                                       size_t why_bytes)
{
    return c->ops->open_files(c, fds, n, why, why_bytes);
}

/*
 * Reads slices from the files into pages, past the pool. As fk_copier_copy; residues: of the bytes of each
 * (base/checksum.h): whether they are the right ones is for the caller to find out. May be called beside
 * fk_copier_copy, by one thread.
 */
static inline uint32_t fk_copier_read_files(struct fk_copier *c, const struct fk_copy_place *places,
                                            uint32_t n, uint64_t *residues, _Atomic bool *cancelled,
                                            int *status)
{
    return c->ops->read_files(c, places, n, residues, cancelled, status);
}

/* Makes the stream of the engine's wait for an event of a progress; 0 or -errno. */
static inline int fk_copier_wait_event(struct fk_copier *c, void *event, void *stream)
{
    return c->ops->wait_event ? c->ops->wait_event(c, event, stream) : 0;
}

#endif
