/*
 * ring.h - a ring of records in memory that two processes share: one writes, one reads.
 *
 *   shared  [ head | tail | data ...................... ]     head, tail: bytes ever written, read
 *   record  [ bytes (with this header, a multiple of 8) | type | payload ]     never wraps around:
 *           a record of type 0 fills the end where the next one doesn't fit
 *
 * The other side's numbers are checked before they are used; what is in the ring may change under
 * the reader's hands, so it copies a record before it looks at it. Waking the other side is the
 * caller's business (an eventfd). Each side is used by one thread at a time.
 */
#ifndef FK_IPC_RING_H
#define FK_IPC_RING_H

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

#define FK_RING_PAD 0u

struct fk_ring_shared {
    _Alignas(64) _Atomic uint64_t head;
    _Alignas(64) _Atomic uint64_t tail;
    _Alignas(64) unsigned char data[];
};

struct fk_ring {
    struct fk_ring_shared *shared;
    uint32_t capacity;              /* of data; a power of two */
    uint64_t mine;                  /* head of the writer, tail of the reader */
    uint64_t pending;               /* writer: where commit moves the head; reader: pop the tail */
};

/* The shared memory that a ring of this capacity takes. */
static inline size_t fk_ring_bytes(uint32_t capacity)
{
    return sizeof(struct fk_ring_shared) + capacity;
}

/* The shared part must be zeroed before either side starts. */
void fk_ring_init(struct fk_ring *r, void *shared, uint32_t capacity);

/* Writer: room for a record's payload; NULL: full, for now (or for ever: larger than half the
 * capacity), or the reader's number makes no sense. Nothing is seen until commit. */
void *fk_ring_reserve(struct fk_ring *r, uint32_t type, uint32_t payload_bytes);
void fk_ring_commit(struct fk_ring *r);

/* Reader: 1 and the next record, 0: none, -EPROTO: the ring makes no sense. The payload is shared
 * memory. */
int fk_ring_next(struct fk_ring *r, uint32_t *type, const void **payload, uint32_t *payload_bytes);
void fk_ring_pop(struct fk_ring *r);

#endif
