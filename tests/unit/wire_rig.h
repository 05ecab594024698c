/* wire_rig.h - for tests of src/events: batches packed by hand with msgpack-c, right and wrong ones. */
#ifndef FK_TESTS_WIRE_RIG_H
#define FK_TESTS_WIRE_RIG_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <msgpack.h>

#include "base/util.h"
#include "events/decode.h"

struct wire {
    msgpack_sbuffer buf;
    msgpack_packer p;
};

static inline void wire_init(struct wire *w)
{
    msgpack_sbuffer_init(&w->buf);
    msgpack_packer_init(&w->p, &w->buf, msgpack_sbuffer_write);
}

static inline void wire_str(struct wire *w, const char *s)
{
    msgpack_pack_str(&w->p, strlen(s));
    msgpack_pack_str_body(&w->p, s, strlen(s));
}

/* [1.5, [ and then n events, and wire_end */
static inline void wire_begin(struct wire *w, size_t n)
{
    wire_init(w);
    msgpack_pack_array(&w->p, 3);
    msgpack_pack_double(&w->p, 1.5);
    msgpack_pack_array(&w->p, n);
}

static inline void wire_end(struct wire *w)
{
    msgpack_pack_nil(&w->p);
}

static inline void wire_hashes(struct wire *w, const uint64_t *hash, size_t n)
{
    msgpack_pack_array(&w->p, n);
    for (size_t i = 0; i < n; i++)
        msgpack_pack_uint64(&w->p, hash[i]);
}

static inline void wire_tokens(struct wire *w, size_t n)
{
    msgpack_pack_array(&w->p, n);
    for (size_t i = 0; i < n; i++)
        msgpack_pack_uint32(&w->p, (uint32_t)i);
}

#define WIRE_ROOT UINT64_MAX
/* A stored event as a map; medium NULL: without the field. more: fields that the caller adds. */
static inline void wire_stored(struct wire *w, const uint64_t *hash, size_t n, uint64_t parent,
                               uint32_t block_size, const char *medium, unsigned more)
{
    msgpack_pack_map(&w->p, 5 + (medium != NULL) + more);
    wire_str(w, "type"), wire_str(w, "BlockStored");
    wire_str(w, "block_hashes"), wire_hashes(w, hash, n);
    wire_str(w, "parent_block_hash");
    if (parent == WIRE_ROOT)
        msgpack_pack_nil(&w->p);
    else
        msgpack_pack_uint64(&w->p, parent);
    wire_str(w, "token_ids"), wire_tokens(w, n * block_size);
    wire_str(w, "block_size"), msgpack_pack_uint32(&w->p, block_size);
    if (medium)
        wire_str(w, "medium"), wire_str(w, medium);
}

static inline void wire_removed(struct wire *w, const uint64_t *hash, size_t n, const char *medium)
{
    msgpack_pack_map(&w->p, 2 + (medium != NULL));
    wire_str(w, "type"), wire_str(w, "BlockRemoved");
    wire_str(w, "block_hashes"), wire_hashes(w, hash, n);
    if (medium)
        wire_str(w, "medium"), wire_str(w, medium);
}

static inline void wire_cleared(struct wire *w)
{
    msgpack_pack_map(&w->p, 1);
    wire_str(w, "type"), wire_str(w, "AllBlocksCleared");
}

#endif
