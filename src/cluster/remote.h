/*
 * remote.h - the local snapshot of the other nodes' blocks: key -> who holds it, where. Look-ups never
 * leave the process.
 *
 *   bucket (64 bytes, one cache line)
 *   +--------------------------+--------------------------+--------------------------+------+
 *   | print, slot, gen, node.. | print, slot, gen, node.. | print, slot, gen, node.. | past |
 *   +--------------------------+--------------------------+--------------------------+------+
 *   One element of 20 bytes per (block, node, tier): no pointers, no lists. A full bucket passes an
 *   element on to the next and counts it, as in src/index. A block that several nodes hold has
 *   several elements with the same print, at most FK_REMOTE_HOLDERS: who has what everybody has
 *   needs not all be remembered.
 *
 * The print is 64 bits of a hash of the key under a secret of this process. With 1e8 elements, one look-up
 * in 1e11 of what is not there finds a wrong holder, and nobody can aim at it. It costs a read in vain:
 * a read names the whole key, which the owner compares.
 *
 * The table is cut into shards that grow one by one, so no call moves more than a small part of it.
 * A node that goes is invisible at once (its number is dead); its elements are cleared by
 * fk_remote_sweep, a bounded number of buckets a call, and then the number can be used again.
 *
 * Holders are chosen by cost (microseconds, told by who knows: nearness, load, measured reads). A node
 * whose lease is over at `now` is not named. No I/O, no clock, no threads; the caller serialises.
 */
#ifndef FK_CLUSTER_REMOTE_H
#define FK_CLUSTER_REMOTE_H

#include "cluster/format.h"

#define FK_REMOTE_NODES 4096u           /* alive or being swept */
#define FK_REMOTE_HOLDERS 16u           /* remembered of one block */
#define FK_REMOTE_NO_NODE UINT16_MAX

struct fk_remote;

struct fk_remote_params {
    uint64_t max_holders;               /* elements in all; 0: 2^32. More are not remembered */
    uint64_t seed;                      /* secret and random */
};

/* Where a block can be had. */
struct fk_remote_hit {
    uint16_t node;
    uint8_t tier, space;                /* the holder's number for the space */
    uint32_t slot, generation;
};

int fk_remote_create(const struct fk_remote_params *params, struct fk_remote **out);
void fk_remote_destroy(struct fk_remote *r);

/* ---- nodes ---- */
/* FK_REMOTE_NO_NODE: none free (yet: sweep). */
uint16_t fk_remote_node_add(struct fk_remote *r);
/* Invisible now; sweep clears what it left. */
void fk_remote_node_drop(struct fk_remote *r, uint16_t node);
/* It is named in look-ups whose now is before until_us; cost_us[tier] of reading a block from it. */
void fk_remote_node_lease(struct fk_remote *r, uint16_t node, uint64_t until_us);
void fk_remote_node_cost(struct fk_remote *r, uint16_t node, const uint32_t cost_us[2]);
/* Which spaces its numbers mean: ours[i] is the caller's number for its space i; 255: not ours. */
void fk_remote_node_spaces(struct fk_remote *r, uint16_t node, const uint8_t ours[FK_CLUSTER_SPACES]);
uint64_t fk_remote_node_blocks(const struct fk_remote *r, uint16_t node, unsigned tier);

/* ---- changes: each says how things are now, so it may come twice ---- */
/* 0; -ENOSPC: not remembered (limit); -ENOMEM, the same. */
int fk_remote_apply(struct fk_remote *r, uint16_t node, const struct fk_change *c);
/* A hint before fk_remote_apply. */
void fk_remote_prefetch(const struct fk_remote *r, const struct fk_change *c);
/* Clears dead nodes' elements in up to n buckets. true: there is more to do. */
bool fk_remote_sweep(struct fk_remote *r, uint32_t n);

/* ---- look-ups ---- */
/* The cheapest holder of the block in the caller's space. prev: a node preferred where it costs
 * little more (the block before came from it); FK_REMOTE_NO_NODE: none. */
bool fk_remote_find(const struct fk_remote *r, uint8_t space, struct fk_key key, uint16_t prev,
                    uint64_t now_us, struct fk_remote_hit *out);
/*
 * How far the chain reaches when blocks here and at peers are put together: the first `known` keys are
 * here; beyond, bit i of local (may be NULL) says that keys[i] is here too. hits[i] is filled where keys[i]
 * is not here; node FK_REMOTE_NO_NODE where it is. Returns the length, known <= length <= n.
 */
uint32_t fk_remote_extend(const struct fk_remote *r, uint8_t space, const struct fk_key *keys,
                          uint32_t n, uint32_t known, const uint64_t *local, uint64_t now_us,
                          struct fk_remote_hit *hits);

/* ---- what it takes ---- */
struct fk_remote_stats {
    uint64_t holders;                   /* elements of nodes that count */
    uint64_t dead;                      /* to be swept */
    uint64_t bytes;                     /* all memory */
    uint64_t refused;                   /* not remembered: limit, memory */
    uint64_t crowded;                   /* not remembered: enough other holders */
    uint32_t nodes;
};
void fk_remote_get_stats(const struct fk_remote *r, struct fk_remote_stats *out);
/* Whether the node holds the block in the tier, as far as is known; for tests and tools. */
bool fk_remote_holds(const struct fk_remote *r, uint16_t node, uint8_t node_space, struct fk_key key,
                     unsigned tier, uint32_t *slot, uint32_t *generation);
/* Checks counts and probe paths; NULL or what is wrong. */
const char *fk_remote_check(const struct fk_remote *r);

#endif
