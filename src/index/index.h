/*
 * index.h - keys -> blocks. One entry of 64 bytes per block serves all tiers: where it is,
 * its place in the prefix tree, who holds it, and the eviction policy's words.
 *
 *   bucket (64 bytes)                            entry (64 bytes, one cache line)
 *   +----------------+-----------------------+   +------------------------------------+
 *   | 12 tags, probe | 12 entry numbers      |-->| key, parent, children, slots, ...  |
 *   +----------------+-----------------------+   +------------------------------------+
 *   A look-up reads one bucket and one entry. A full bucket passes keys on to the next
 *   and counts them, so that a look-up knows when to stop; no tombstones.
 *   (The bucket layout follows the published idea of F14 and Swiss tables.)
 *
 * What always holds:
 *   - An entry is in the table only if its parent is. So the known part of a chain is a
 *     leading part, and its length is found by galloping.
 *   - A tier's blocks are dropped leaves first. The last copy of a block with children is
 *     never evicted. If a fault takes it, its entry stays as a "hole" until its descendants
 *     have been swept away or a put fills it again; nothing beyond a hole is ever matched.
 *   - A pinned entry keeps its slots. Dropped while pinned, a slot is LOST: nobody can find it,
 *     and it is free at the last unpin.
 *
 * No I/O, no threads, no clock: `tick` is the caller's logical time (32 bits, grows with
 * every operation, follows milliseconds). Callers: src/node, under the core's lock.
 */
#ifndef FK_INDEX_INDEX_H
#define FK_INDEX_INDEX_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/key.h"
#include "base/util.h"
#include "index/heap.h"
#include "index/policy.h"
#include "index/slots.h"

/* A block's state in one tier. */
enum fk_residency {
    FK_ABSENT = 0,
    FK_FILLING = 1,         /* has a slot, bytes are on their way; not visible */
    FK_READY = 2,           /* all bytes are in place */
    FK_LOST = 3,            /* dropped while pinned: slot kept until the last unpin */
};

enum { FK_ENTRY_DOOMED = 1u << 4,   /* not in the table any more */
       FK_ENTRY_HOLE = 1u << 5,     /* in the table for its children's sake only */
       FK_ENTRY_USED = 1u << 6,
       FK_ENTRY_CLEANED = 1u << 7 };/* written to SSD ahead of eviction, not used since */

struct fk_entry {
    struct fk_key key;
    uint32_t parent;                    /* FK_NONE: first of a chain */
    uint32_t children;                  /* entries whose parent this is */
    uint32_t tier_children[FK_TIERS];   /* of these: FILLING or READY in the tier */
    uint32_t slot[FK_TIERS];
    uint32_t pos[FK_TIERS];             /* place in the lane's heap, or FK_NONE; while FILLING
                                           in cpu from SSD: the number of the fill (node) */
    uint32_t atime;                     /* tick of the last use */
    uint32_t rank;                      /* the policy's word: insertion tick, priority */
    uint16_t freq;                      /* hits, saturating */
    uint16_t pins;
    uint8_t state;                      /* residency of cpu: bits 0-1, ssd: 2-3; flags */
    uint8_t group;
    uint8_t aux[FK_TIERS];              /* the policy's bytes; mostly one per tier */
};
_Static_assert(sizeof(struct fk_entry) == 64, "one cache line");

#define FK_MAX_GROUPS 256u

struct fk_lane {
    struct fk_index *index;
    const struct fk_policy_ops *ops;
    enum fk_tier tier;
    uint32_t group;
    uint32_t capacity;                  /* slots this lane may fill */
    uint32_t resident;                  /* READY blocks */
    struct fk_heap heap[2];
    void *state;                        /* the policy's */
};

struct fk_group {
    uint32_t space;
    uint32_t max[FK_TIERS], guaranteed[FK_TIERS];   /* slots */
    uint32_t used[FK_TIERS];                        /* slots held, in any state */
    struct fk_lane lane[FK_TIERS];
};

struct fk_index_space {
    struct fk_slots slots[FK_TIERS];
    uint32_t default_group;
};

struct fk_index_event {
    struct fk_key key, parent;
    uint32_t slot[FK_TIERS];            /* at that moment, of each tier; FK_NONE: none */
    uint32_t space;
    uint8_t tier, group;
    bool stored;
};

struct fk_bucket;
struct fk_index {
    struct fk_entry *entries;
    struct fk_bucket *buckets;
    uint32_t n_buckets, n_entries_max, n_entries_used;  /* used: ever taken (bump) */
    uint32_t free_entry;                /* list through parent */
    uint32_t n_live;                    /* entries in use */
    uint32_t holes;
    uint32_t sweep_at;                  /* next entry the sweep looks at */
    int sweep_step;
    uint64_t hash_seed;
    struct fk_policy_params policy;
    uint32_t n_groups, n_spaces, max_spaces;
    struct fk_group *groups;
    struct fk_index_space *spaces;
    bool events_on;
    bool events_lost;                   /* no memory for one: who follows them must look anew */
    FK_VEC(struct fk_index_event) events;
    uint64_t evicted[FK_TIERS];
    size_t entries_bytes, buckets_bytes;
};

struct fk_index_params {
    uint32_t max_spaces;
    struct fk_policy_params policy;
    bool events;
    uint64_t seed;
};

int fk_index_init(struct fk_index *ix, const struct fk_index_params *params);
void fk_index_fini(struct fk_index *ix);
/* Adds room for the space's slots. Moves memory: pointers to entries end here. */
int fk_index_space_add(struct fk_index *ix, const uint32_t slots[FK_TIERS], uint32_t stripe,
                       uint32_t dirs, uint32_t *space);
/* Room for n more entries than there are slots: of blocks that are yet to come. Moves memory, too. */
int fk_index_reserve(struct fk_index *ix, uint32_t n);
int fk_index_group_add(struct fk_index *ix, uint32_t space, const uint32_t max[FK_TIERS],
                       const uint32_t guaranteed[FK_TIERS], uint32_t *group);

static inline enum fk_residency fk_entry_in(const struct fk_entry *e, enum fk_tier t)
{
    return (enum fk_residency)(e->state >> (2 * t) & 3);
}

static inline struct fk_index_space *fk_entry_space(struct fk_index *ix, const struct fk_entry *e)
{
    return &ix->spaces[ix->groups[e->group].space];
}

/* READY on SSD, and its directory is in use. */
static inline bool fk_entry_on_ssd(struct fk_index *ix, const struct fk_entry *e)
{
    return fk_entry_in(e, FK_TIER_SSD) == FK_READY &&
           !fk_slots_out(&fk_entry_space(ix, e)->slots[FK_TIER_SSD], e->slot[FK_TIER_SSD]);
}

/* Its bytes can be had from some tier. */
static inline bool fk_entry_visible(struct fk_index *ix, const struct fk_entry *e)
{
    return fk_entry_in(e, FK_TIER_CPU) == FK_READY || fk_entry_on_ssd(ix, e);
}

/* ---- look-up ---- */
uint32_t fk_index_find(const struct fk_index *ix, struct fk_key key);
/* How many leading keys are in the table (visible or not): galloping, log2(n) look-ups. Of keys
 * that contradict what was stored (a block under another parent than before) it may be any
 * number up to the last known one: fk_index_known is for whoever can't be sure. */
uint32_t fk_index_match(const struct fk_index *ix, const struct fk_key *keys, uint32_t n);
/* Entry of each key, FK_NONE where there is none; batched. Neighbours in a chain are tried
 * first: blocks stored together have neighbouring entries. */
void fk_index_resolve(const struct fk_index *ix, const struct fk_key *keys, uint32_t n,
                      uint32_t *entries);
/* Both: the entries of the leading keys that are in the table; returns how many. */
uint32_t fk_index_known(const struct fk_index *ix, const struct fk_key *keys, uint32_t n,
                        uint32_t *entries);

/* Fetches what an insertion of the key, or the eviction of the entries that are likely to come
 * after this one (its ancestors), will touch. A hint; has no effect on what is there. */
void fk_index_prefetch_key(const struct fk_index *ix, struct fk_key key);
void fk_index_prefetch_before(const struct fk_index *ix, uint32_t entry);

/* ---- life of an entry ---- */
/* A new entry without residency, pinned once (so that it lasts until it is filled). The parent
 * must be in the table, or FK_NONE. FK_NONE: no room. */
uint32_t fk_index_add(struct fk_index *ix, struct fk_key key, uint32_t parent, uint32_t group,
                      uint32_t tick);
/* ABSENT -> FILLING, with a slot taken by the caller and counted to the entry's group. */
void fk_index_fill(struct fk_index *ix, uint32_t entry, enum fk_tier tier, uint32_t slot);
/* FILLING -> READY: visible now. */
void fk_index_ready(struct fk_index *ix, uint32_t entry, enum fk_tier tier, uint32_t tick);
/* FILLING or READY -> ABSENT (LOST while pinned). The entry may be gone afterwards. */
void fk_index_drop(struct fk_index *ix, uint32_t entry, enum fk_tier tier, bool evicted);
/* FILLING -> ABSENT by who was to fill it, when nothing writes to the slot any more: the slot is
 * free at once, also of a pinned entry. The entry may be gone afterwards. */
void fk_index_unfill(struct fk_index *ix, uint32_t entry, enum fk_tier tier);
/* Out of the table at once, with all it holds; for reset. */
void fk_index_doom(struct fk_index *ix, uint32_t entry);
void fk_index_pin(struct fk_index *ix, uint32_t entry);
/* The entry may be gone afterwards. */
void fk_index_unpin(struct fk_index *ix, uint32_t entry);
/* A use by a get. */
void fk_index_touch(struct fk_index *ix, uint32_t entry, uint32_t tick);

/* ---- room ---- */
/* Slots the group could take now without an eviction, up to want. */
uint32_t fk_index_room(const struct fk_index *ix, uint32_t group, enum fk_tier tier,
                       uint32_t want, uint32_t reserve);
/* A run of at most want slots, counted to the group. 0: none. */
uint32_t fk_index_take_slots(struct fk_index *ix, uint32_t group, enum fk_tier tier,
                             uint32_t want, uint32_t *first);
void fk_index_return_slot(struct fk_index *ix, uint32_t group, enum fk_tier tier, uint32_t slot);
/*
 * Picks what to evict so that `group` gets room in the tier: an entry in a heap, or FK_NONE.
 * Groups at or under their guarantee are spared, a group at its maximum pays itself.
 */
uint32_t fk_index_victim(struct fk_index *ix, uint32_t group, enum fk_tier tier, uint32_t tick);
/* May the victim's copy be dropped, or is it the last one of a block with children? */
bool fk_index_droppable(struct fk_index *ix, uint32_t entry, enum fk_tier tier);
/* The victim can't go now: others come first until it is the oldest again. */
void fk_index_defer(struct fk_index *ix, uint32_t entry, enum fk_tier tier, uint32_t tick);
/* How many of the newcomers the policy admits; it learns from those with keys. */
uint32_t fk_index_admit(struct fk_index *ix, uint32_t group, enum fk_tier tier,
                        const struct fk_newcomers *nc, uint32_t tick);
/* Tells the policy of a use of a chain's leading part, before its entries are touched. */
void fk_index_used(struct fk_index *ix, const uint32_t *entries, uint32_t n, uint32_t tick);
/* Tells it that a newcomer has its entry. */
void fk_index_placed(struct fk_index *ix, uint32_t entry, uint32_t anchor, uint32_t left);

/* ---- upkeep ---- */
/* Looks at up to n entries for descendants of holes and drops them. true: holes are left. */
bool fk_index_sweep(struct fk_index *ix, uint32_t n);
/* Takes `by` off all ticks (32-bit wrap, far away but certain). */
void fk_index_rebase(struct fk_index *ix, uint32_t by);
uint64_t fk_index_bytes(const struct fk_index *ix);
/* Checks all invariants above; NULL or what is wrong. O(entries). */
const char *fk_index_check(const struct fk_index *ix);

/* ---- for policies ---- */
static inline struct fk_lane *fk_index_lane(struct fk_index *ix, const struct fk_entry *e,
                                            enum fk_tier tier)
{
    return &ix->groups[e->group].lane[tier];
}

static inline uint32_t fk_entry_number(const struct fk_index *ix, const struct fk_entry *e)
{
    return (uint32_t)(e - ix->entries);
}
/* The score or heap of an entry in a heap has changed. */
void fk_lane_update(struct fk_lane *lane, struct fk_entry *e);

#endif
