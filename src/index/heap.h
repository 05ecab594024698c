/*
 * heap.h - an indexed binary heap of entries: smallest score first, removal and change of any
 * element by its position. 8 bytes per element; the entry knows its place in pos[tier]:
 * bit 31 says which of the lane's two heaps, the rest where.
 * Caller: the index room, under the core's lock.
 */
#ifndef FK_INDEX_HEAP_H
#define FK_INDEX_HEAP_H

#include <stdint.h>

struct fk_entry;

struct fk_heap_item { uint32_t score, entry; };

struct fk_heap {
    struct fk_heap_item *items;
    uint32_t len, cap;
    struct fk_entry *entries;       /* the index's entries */
    uint32_t pos_bit;               /* 0, or 1u << 31 for the lane's second heap */
    unsigned tier;                  /* which pos[] */
};

#define FK_HEAP_SECOND (1u << 31)

int fk_heap_reserve(struct fk_heap *h, uint32_t n);
void fk_heap_fini(struct fk_heap *h);
/* Room must have been reserved. */
void fk_heap_push(struct fk_heap *h, uint32_t score, uint32_t entry);
void fk_heap_remove(struct fk_heap *h, uint32_t at);
void fk_heap_update(struct fk_heap *h, uint32_t at, uint32_t score);
/* The element at this place makes room for another one: cheaper than remove and push. */
void fk_heap_replace(struct fk_heap *h, uint32_t at, uint32_t score, uint32_t entry);

#endif
