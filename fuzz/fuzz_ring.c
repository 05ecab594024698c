/*
 * fuzz_ring.c - libFuzzer target: the memory that a node and an agent share, as if the other side had
 * gone mad. The reader must stay within the ring, end, and never believe a number it has not checked;
 * the writer must never write outside.
 *
 * Input: bytes 0-7 head, 8-15 tail, the rest the ring's data.
 */
#include <errno.h>

#include "base/util.h"
#include "ipc/ring.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define CAPACITY 1024u

static void fill(struct fk_ring_shared *s, const uint8_t *data, size_t size)
{
    uint64_t word[2] = { 0 };

    memcpy(word, data, fk_min(size, sizeof(word)));
    atomic_store(&s->head, word[0]);
    atomic_store(&s->tail, word[1]);
    if (size > sizeof(word))
        memcpy(s->data, data + sizeof(word), fk_min(size - sizeof(word), (size_t)CAPACITY));
}

static void read_all(struct fk_ring_shared *s)
{
    struct fk_ring r;
    const void *payload;
    uint32_t type, bytes;
    uint64_t sum = 0;

    fk_ring_init(&r, s, CAPACITY);
    for (unsigned i = 0; fk_ring_next(&r, &type, &payload, &bytes) == 1; i++) {
        const unsigned char *p = payload;
        if (p < s->data || p + bytes > s->data + CAPACITY || i > CAPACITY / 8)
            __builtin_trap();
        for (uint32_t b = 0; b < bytes; b++)
            sum += p[b];
        fk_ring_pop(&r);
    }
    volatile uint64_t used = sum;
    (void)used;
}

static void write_some(struct fk_ring_shared *s)
{
    struct fk_ring w;

    fk_ring_init(&w, s, CAPACITY);
    for (uint32_t n = 0; n < 700; n += 37) {
        unsigned char *p = fk_ring_reserve(&w, 1, n);
        if (!p)
            continue;
        if (p < s->data || p + n > s->data + CAPACITY)
            __builtin_trap();
        memset(p, 0x5a, n);
        fk_ring_commit(&w);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct fk_ring_shared *s = aligned_alloc(64, fk_round_up(fk_ring_bytes(CAPACITY), 64));

    if (!s)
        return 0;
    memset(s, 0, fk_ring_bytes(CAPACITY));
    fill(s, data, size);
    read_all(s);
    fill(s, data, size);
    write_some(s);
    free(s);
    return 0;
}
