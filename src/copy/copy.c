/* copy.c - the table of copy backends, and the host backend: plain memcpy. See copy.h. */
#include "copy/copy.h"

#include <errno.h>
#include <string.h>

#include "base/util.h"

static bool settle_sum(const struct fk_copy_target *t, uint32_t slot, bool to_engine)
{
    uint64_t bytes = 0;

    if (!t->sums.sums)
        return true;
    for (uint32_t r = 0; r < t->n_regions; r++)
        bytes += t->regions[r].page_bytes;
    return fk_sum_settle(&t->sums, slot,
                         fk_sum(t->pool + slot * t->slot_bytes + t->slice_offset, bytes), to_engine);
}

static void copy_block(const struct fk_copy_target *t, uint32_t slot, uint32_t page, bool to_engine)
{
    char *slice = t->pool + slot * t->slot_bytes + t->slice_offset;

    for (uint32_t r = 0; r < t->n_regions; r++) {
        const flexkv_region *region = &t->regions[r];
        char *p = (char *)region->base + page * region->stride;
        if (to_engine)
            memcpy(p, slice, region->page_bytes);
        else
            memcpy(slice, p, region->page_bytes);
        slice += region->page_bytes;
    }
}

static int host_run(const struct fk_copy_target *target, const struct fk_copy_blocks *blocks,
                    uint32_t *done)
{
    for (uint32_t i = 0; i < blocks->n; i++) {
        *done = i;
        if (blocks->to_engine && !settle_sum(target, blocks->slots[i], true))
            return -EBADMSG;
        copy_block(target, blocks->slots[i], blocks->pages[i], blocks->to_engine);
        if (!blocks->to_engine)
            (void)settle_sum(target, blocks->slots[i], false);
    }
    return 0;
}

static const struct fk_copy_backend backends[] = {
    { "host", host_run },
};

const struct fk_copy_backend *fk_copy_backend(const char *name)
{
    for (size_t i = 0; i < fk_array_size(backends); i++)
        if (strcmp(backends[i].name, name) == 0)
            return &backends[i];
    return NULL;
}
