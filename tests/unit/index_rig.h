/* index_rig.h - what the tests of the index room share: an index of one space, numbered keys,
 * and the steps that the node makes of the index's calls. Included by test_index.c, test_policy.c. */
#ifndef FK_TESTS_INDEX_RIG_H
#define FK_TESTS_INDEX_RIG_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include <cmocka.h>

#include "index/index.h"

#define CPU FK_TIER_CPU
#define SSD FK_TIER_SSD

/* Keys as good as random, and known again by their number. */
static inline struct fk_key key_of(uint32_t number)
{
    uint64_t s = number;
    struct fk_key k = { .lo = fk_rng_next(&s) };

    k.hi = fk_rng_next(&s);
    return k;
}

static inline void open_index(struct fk_index *ix, enum fk_policy_kind kind, uint32_t cpu, uint32_t ssd)
{
    struct fk_index_params params = {
        .max_spaces = 2, .seed = 99, .events = true,
        .policy = { .kind = kind, .slru_protected_threshold = 2 },
    };
    uint32_t slots[FK_TIERS] = { cpu, ssd }, space;

    assert_int_equal(fk_index_init(ix, &params), 0);
    assert_int_equal(fk_index_space_add(ix, slots, 8, 1, &space), 0);
    assert_int_equal(space, 0);
}

static inline void expect_sound(const struct fk_index *ix)
{
    const char *wrong = fk_index_check(ix);

    if (wrong)
        fail_msg("%s", wrong);
}

/* A slot, an entry, its bytes: READY in the cpu tier and not pinned. FK_NONE: no free slot. */
static inline uint32_t store_in(struct fk_index *ix, uint32_t number, uint32_t parent, uint32_t group,
                                uint32_t tick)
{
    uint32_t slot, entry;

    if (!fk_index_room(ix, group, CPU, 1, 0) || !fk_index_take_slots(ix, group, CPU, 1, &slot))
        return FK_NONE;
    entry = fk_index_add(ix, key_of(number), parent, group, tick);
    assert_int_not_equal(entry, FK_NONE);
    fk_index_fill(ix, entry, CPU, slot);
    fk_index_ready(ix, entry, CPU, tick);
    fk_index_unpin(ix, entry);
    return entry;
}

static inline uint32_t store(struct fk_index *ix, uint32_t number, uint32_t parent, uint32_t tick)
{
    return store_in(ix, number, parent, 0, tick);
}

/* A copy more, in the given tier. */
static inline void copy_to(struct fk_index *ix, uint32_t entry, enum fk_tier tier, uint32_t tick)
{
    uint32_t slot;

    assert_int_equal(fk_index_take_slots(ix, ix->entries[entry].group, tier, 1, &slot), 1);
    fk_index_pin(ix, entry);
    fk_index_fill(ix, entry, tier, slot);
    fk_index_ready(ix, entry, tier, tick);
    fk_index_unpin(ix, entry);
}

/* Evicts what the policy chooses and returns its key's number (searched below `numbers`). */
static inline uint32_t evict(struct fk_index *ix, enum fk_tier tier, uint32_t tick, uint32_t numbers)
{
    uint32_t victim = fk_index_victim(ix, 0, tier, tick);

    if (victim == FK_NONE)
        return FK_NONE;
    struct fk_key key = ix->entries[victim].key;
    assert_true(fk_index_droppable(ix, victim, tier));
    fk_index_drop(ix, victim, tier, true);
    for (uint32_t i = 0; i < numbers; i++)
        if (fk_key_equal(key_of(i), key))
            return i;
    fail_msg("a victim nobody stored");
    return FK_NONE;
}

static inline uint32_t find(const struct fk_index *ix, uint32_t number)
{
    return fk_index_find(ix, key_of(number));
}

#endif
