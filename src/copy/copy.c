/* copy.c - the table of copy backends, and the host backend: plain memcpy. See copy.h. */
#include "copy/copy.h"

#include <string.h>

#include "base/util.h"

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

static int host_run(const struct fk_copy_target *target, const struct fk_copy_blocks *blocks)
{
    for (uint32_t i = 0; i < blocks->n; i++)
        copy_block(target, blocks->slots[i], blocks->pages[i], blocks->to_engine);
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
