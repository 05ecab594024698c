/* ring.c - see ring.h. */
#include "ipc/ring.h"

#include <errno.h>
#include <string.h>

#include "base/util.h"

struct record { uint32_t bytes, type; };

void fk_ring_init(struct fk_ring *r, void *shared, uint32_t capacity)
{
    *r = (struct fk_ring){ .shared = shared, .capacity = capacity };
}

static unsigned char *at(const struct fk_ring *r, uint64_t position)
{
    return r->shared->data + (position & (r->capacity - 1));
}

static void put_header(const struct fk_ring *r, uint64_t position, uint32_t bytes, uint32_t type)
{
    struct record rec = { bytes, type };

    memcpy(at(r, position), &rec, sizeof(rec));
}

void *fk_ring_reserve(struct fk_ring *r, uint32_t type, uint32_t payload_bytes)
{
    uint64_t need = fk_round_up((uint64_t)payload_bytes + sizeof(struct record), 8);
    uint64_t tail = atomic_load_explicit(&r->shared->tail, memory_order_acquire);
    uint64_t used = r->mine - tail, to_end = r->capacity - (r->mine & (r->capacity - 1));
    uint64_t pad = to_end < need ? to_end : 0;

    if (need > r->capacity / 2 || used > r->capacity || r->capacity - used < need + pad)
        return NULL;
    if (pad)
        put_header(r, r->mine, (uint32_t)pad, FK_RING_PAD);
    put_header(r, r->mine + pad, (uint32_t)need, type);
    r->pending = r->mine + pad + need;
    return at(r, r->mine + pad) + sizeof(struct record);
}

void fk_ring_commit(struct fk_ring *r)
{
    r->mine = r->pending;
    atomic_store_explicit(&r->shared->head, r->mine, memory_order_release);
}

int fk_ring_next(struct fk_ring *r, uint32_t *type, const void **payload, uint32_t *payload_bytes)
{
    for (;;) {
        uint64_t head = atomic_load_explicit(&r->shared->head, memory_order_acquire);
        uint64_t there = head - r->mine, to_end = r->capacity - (r->mine & (r->capacity - 1));
        struct record rec;
        if (!there)
            return 0;
        if (there > r->capacity || there < sizeof(rec))
            return -EPROTO;
        memcpy(&rec, at(r, r->mine), sizeof(rec));
        if (rec.bytes < sizeof(rec) || rec.bytes % 8 || rec.bytes > there || rec.bytes > to_end)
            return -EPROTO;
        r->pending = r->mine + rec.bytes;
        if (rec.type == FK_RING_PAD) {
            fk_ring_pop(r);
            continue;
        }
        *type = rec.type;
        *payload = at(r, r->mine) + sizeof(rec);
        *payload_bytes = rec.bytes - (uint32_t)sizeof(rec);
        return 1;
    }
}

void fk_ring_pop(struct fk_ring *r)
{
    r->mine = r->pending;
    atomic_store_explicit(&r->shared->tail, r->mine, memory_order_release);
}
