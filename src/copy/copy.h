/*
 * copy.h - moving blocks between an engine's pages and slots of the cpu pool. A backend
 * knows one kind of engine memory; "host" (memcpy) is the first. A new one is one file and
 * one line in the table of copy.c.
 *
 *   slot  [ rank 0: layer 0 | layer 1 | ... ][ rank 1: ... ]      slice = one rank's part
 *   page p of region r: base_r + p * stride_r, page_bytes_r long
 *
 * Called by agents without any lock; a backend keeps no state that two calls share.
 */
#ifndef FK_COPY_COPY_H
#define FK_COPY_COPY_H

#include <stdbool.h>
#include <stdint.h>

#include "copy/sum.h"
#include "flexkv/flexkv.h"

struct fk_copy_target {             /* one rank of one space */
    const flexkv_region *regions;
    uint32_t n_regions;
    char *pool;                     /* slot 0 */
    uint64_t slot_bytes;
    uint64_t slice_offset;          /* of the rank within a slot */
    struct fk_copy_sums sums;
};

struct fk_copy_blocks {
    const uint32_t *slots, *pages;
    uint32_t n;
    bool to_engine;                 /* slot -> page, else page -> slot */
};

struct fk_copy_backend {
    const char *name;
    /* Copies all n blocks; 0 or -errno, with *done leading ones copied. -EBADMSG: the next one's slot is
     * not what its checksum says. */
    int (*run)(const struct fk_copy_target *target, const struct fk_copy_blocks *blocks, uint32_t *done);
};

const struct fk_copy_backend *fk_copy_backend(const char *name);    /* NULL: unknown */

#endif
