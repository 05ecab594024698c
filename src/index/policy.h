/*
 * policy.h - eviction policies: names, parameters, and the vtable a policy fills in.
 *
 * Every (quota group, tier) has a lane. A lane holds the blocks that may be evicted now
 * (resident, no child in the tier, not pinned) in one or two indexed heaps, smallest score
 * first. Only leaves are in the heaps, so a chain of 500 blocks costs one heap entry, and
 * touching it costs one heap update:
 *
 *     root - a - b - c*        heap: c (score), z (score)      * evictable leaf
 *              \ y - z*        evict c -> b becomes a leaf and takes c's place at the top
 *
 * A policy decides the score, the heap, and (optionally) the victim and the admission.
 * A new policy is one file plus one line in the table of policy.c.
 * Caller: index.c only, under the core's lock.
 */
#ifndef FK_INDEX_POLICY_H
#define FK_INDEX_POLICY_H

#include <stdbool.h>
#include <stdint.h>

#include "base/key.h"

enum fk_tier { FK_TIER_CPU = 0, FK_TIER_SSD = 1, FK_TIERS = 2 };

enum fk_policy_kind {
    FK_POLICY_LRU, FK_POLICY_LFU, FK_POLICY_SLRU, FK_POLICY_FIFO, FK_POLICY_MRU,
    FK_POLICY_FILO, FK_POLICY_S3FIFO, FK_POLICY_ARC, FK_POLICY_AUTO, FK_POLICY_KINDS,
    FK_POLICY_DENSITY = FK_POLICY_KINDS     /* within `auto` only: what it weighs against lru */
};

struct fk_policy_params {
    enum fk_policy_kind kind;
    uint32_t hit_reward_ticks;      /* lru: each hit counts as being used this much later (ms) */
    uint32_t slru_protected_threshold;  /* hits from which a block is protected; >= 1 */
    uint64_t seed;
    /* For a shadow of `auto` only: the model it shares, and whether newcomers may be refused. */
    struct fk_density *density;
    bool refuses;
};

const char *fk_policy_name(enum fk_policy_kind kind);
int fk_policy_parse(const char *name, enum fk_policy_kind *kind);    /* 0 or -EINVAL */

struct fk_index;
struct fk_entry;
struct fk_lane;

/* New blocks that are to be stored. */
struct fk_newcomers {
    const struct fk_key *keys;      /* in chain order; NULL: nothing to learn from, just a question */
    uint32_t n;
    uint32_t room;                  /* so many fit without an eviction; < n asks for admission */
    const struct fk_entry *anchor;  /* the block before the first one, or NULL */
};

struct fk_policy_ops {
    const char *name;
    bool rank_counts;               /* entries' rank is a count, not a tick */
    /* All but score may be NULL. */
    int (*init)(struct fk_lane *lane, const struct fk_policy_params *params);   /* lane->state */
    void (*fini)(struct fk_lane *lane);
    /* The block became resident (put, promotion, write to SSD, recovery). */
    void (*insert)(struct fk_lane *lane, struct fk_entry *e);
    /* The block was got; e->atime is still the previous use. */
    void (*hit)(struct fk_lane *lane, struct fk_entry *e, uint32_t tick);
    /* The block leaves the tier; evicted: by need, else lost, reset or dropped. */
    void (*remove)(struct fk_lane *lane, struct fk_entry *e, bool evicted);
    /* Heap key of a block that is or becomes evictable; and which heap (0 or 1). */
    uint32_t (*score)(struct fk_lane *lane, const struct fk_entry *e);
    unsigned (*heap)(struct fk_lane *lane, const struct fk_entry *e);
    /* The block to evict: an index of an entry in a heap, or FK_NONE. Default: heap 0's top. */
    uint32_t (*victim)(struct fk_lane *lane, uint32_t tick);
    /* A get uses these entries, a leading part of a chain; atimes are still those of the use
     * before. Called on the cpu lane of their group. */
    void (*used)(struct fk_lane *lane, const uint32_t *entries, uint32_t n, uint32_t tick);
    /* How many of the newcomers may be stored; at least min(room, n). Default: all. */
    uint32_t (*admit)(struct fk_lane *lane, const struct fk_newcomers *nc, uint32_t tick);
    /* A newcomer has its entry; `left` more of its put follow. */
    void (*placed)(struct fk_lane *lane, struct fk_entry *e, const struct fk_entry *anchor,
                   uint32_t left);
    uint64_t (*bytes)(const struct fk_lane *lane);      /* of lane->state */
    /* All ticks become smaller by this much. Needed if state holds ticks. */
    void (*rebase)(struct fk_lane *lane, uint32_t by);
};

const struct fk_policy_ops *fk_policy_ops(enum fk_policy_kind kind);

#endif
