/*
 * names.h - what routers call the blocks in a space's slots: the engine's hash, its parent's, the
 * token ids, the namespace's label.
 *
 *   cpu slot   the whole name, beside the pool: given with a put, or read with the block from SSD
 *   SSD slot   the hash alone (it is what a "removed" needs); the rest is on disk (names_file.h)
 *
 * A name belongs to the block that is in the slot: it is written when the block gets the slot (put), or
 * before its bytes are ready (from SSD), and stays until the next one is written. A hash of 0 is no
 * name: such a block makes no events.
 *
 * Knows base alone. Under node->lock.
 */
#ifndef FK_EVENTS_NAMES_H
#define FK_EVENTS_NAMES_H

#include "base/util.h"

struct fk_name {
    uint64_t hash, parent;
    uint32_t label;
    bool root;                          /* first of its chain: parent means nothing */
};

struct fk_names {
    uint32_t tokens_per_block, cpu_slots, ssd_slots;
    struct fk_name *name;               /* by cpu slot */
    uint32_t *tokens;                   /* by cpu slot, tokens_per_block each */
    uint64_t *ssd_hash;                 /* by SSD slot */
};

/* All memory that names take; -ENOMEM. */
int fk_names_create(uint32_t tokens_per_block, uint32_t cpu_slots, uint32_t ssd_slots,
                    struct fk_names **out);
void fk_names_destroy(struct fk_names *names);

static inline uint32_t *fk_names_tokens(const struct fk_names *n, uint32_t cpu_slot)
{
    return n->tokens + (size_t)cpu_slot * n->tokens_per_block;
}

/* tokens: tokens_per_block of them; unused where the hash is 0. */
static inline void fk_names_set(struct fk_names *n, uint32_t cpu_slot, const struct fk_name *name,
                                const uint32_t *tokens)
{
    n->name[cpu_slot] = *name;
    if (name->hash && tokens)
        memcpy(fk_names_tokens(n, cpu_slot), tokens, n->tokens_per_block * sizeof(*tokens));
}

#endif
