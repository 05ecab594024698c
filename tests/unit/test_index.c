/*
 * test_index.c - src/index/: the hash table, galloping, pins, holes and sweep, groups and quotas,
 * growth; and a long random run that events and the self-check must explain.
 * Slots and heaps: test_slots.c. The policies: test_policy.c.
 */
#include "index_rig.h"

#include "index/table.h"

/* ---- table ---- */

static void table_finds_what_is_there_and_nothing_else(void **state)
{
    enum { N = 20000 };
    struct fk_index ix;

    open_index(&ix, FK_POLICY_LRU, N, 0);
    for (uint32_t i = 0; i < N; i++)
        assert_int_equal(store(&ix, i, FK_NONE, i), i);
    assert_int_equal(store(&ix, N, FK_NONE, N), FK_NONE);       /* no slot left */
    for (uint32_t i = 0; i < N; i++)
        assert_int_equal(find(&ix, i), i);
    for (uint32_t i = N; i < 2 * N; i++)
        assert_int_equal(find(&ix, i), FK_NONE);
    for (uint32_t i = 0; i < N; i += 2)
        fk_index_drop(&ix, i, CPU, true);
    for (uint32_t i = 0; i < N; i++)
        assert_int_equal(find(&ix, i), i % 2 ? i : FK_NONE);
    expect_sound(&ix);
    fk_index_fini(&ix);
}

static void empty_index_finds_nothing(void **state)
{
    struct fk_index_params params = { .max_spaces = 1 };
    struct fk_key keys[3] = { key_of(1), key_of(2), key_of(3) };
    uint32_t entries[3] = { 0, 0, 0 };
    struct fk_index ix;

    assert_int_equal(fk_index_init(&ix, &params), 0);
    assert_int_equal(fk_index_find(&ix, keys[0]), FK_NONE);
    assert_int_equal(fk_index_match(&ix, keys, 3), 0);
    assert_int_equal(fk_index_match(&ix, keys, 0), 0);
    fk_index_resolve(&ix, keys, 3, entries);
    for (int i = 0; i < 3; i++)
        assert_int_equal(entries[i], FK_NONE);
    fk_index_fini(&ix);
}

/* A key whose home is the table's first bucket: follows key_hash() of table.c backwards. */
static struct fk_key crowding_key(const struct fk_index *ix, uint32_t i)
{
    uint64_t inverse = 0xd6e8feb86659fd93ull, d = inverse;
    struct fk_key k = { .lo = i * 0x1234567ull + 5 };

    for (int n = 0; n < 6; n++)                     /* Newton: 1/d modulo 2^64 */
        inverse *= 2 - d * inverse;
    uint64_t h = (k.lo ^ ix->hash_seed) * 0x9e3779b97f4a7c15ull;
    k.hi = (uint64_t)i * inverse ^ h ^ (h >> 32);   /* hash = i < 2^32: bucket 0 */
    return k;
}

/* All keys in one bucket: each look-up passes through many full ones; the 16-bit count of keys
 * passed on saturates and must never let a key be lost. */
static void crowded_bucket_loses_nothing(void **state)
{
    enum { N = 66000 };
    struct fk_index ix;

    open_index(&ix, FK_POLICY_LRU, N, 0);
    for (uint32_t i = 0; i < N; i++) {
        uint32_t entry = fk_index_add(&ix, crowding_key(&ix, i), FK_NONE, 0, 1);
        assert_int_equal(entry, i);
    }
    for (uint32_t i = 0; i < N; i += 97)
        assert_int_equal(fk_index_find(&ix, crowding_key(&ix, i)), i);
    for (uint32_t i = 0; i < N; i++)
        if (i % 3)
            fk_index_unpin(&ix, i);         /* holds nothing: gone */
    for (uint32_t i = 0; i < N; i += 41)
        assert_int_equal(fk_index_find(&ix, crowding_key(&ix, i)), i % 3 ? FK_NONE : i);
    assert_int_equal(fk_index_find(&ix, crowding_key(&ix, N + 1)), FK_NONE);
    for (uint32_t i = 0; i < N; i += 3)
        fk_index_unpin(&ix, i);
    assert_int_equal(ix.n_live, 0);
    assert_int_equal(fk_index_find(&ix, crowding_key(&ix, 0)), FK_NONE);
    fk_index_fini(&ix);
}

/* A few hundred keys of one bucket come and go, far below saturation: the counts must fall back
 * to zero, so that a look-up of an absent key stays short; and all are found at each moment. */
static void overflow_comes_and_goes(void **state)
{
    enum { N = 300 };
    struct fk_index ix;
    uint32_t entry[N];
    uint64_t rng = 5;

    open_index(&ix, FK_POLICY_LRU, 4096, 0);
    memset(entry, 0xff, sizeof(entry));
    for (int step = 0; step < 60000; step++) {
        uint32_t i = fk_rng_below(&rng, N);
        if (entry[i] == FK_NONE) {
            entry[i] = fk_index_add(&ix, crowding_key(&ix, i), FK_NONE, 0, 1);
        } else {
            fk_index_unpin(&ix, entry[i]);
            entry[i] = FK_NONE;
        }
        uint32_t j = fk_rng_below(&rng, N);
        assert_int_equal(fk_index_find(&ix, crowding_key(&ix, j)), entry[j]);
    }
    fk_index_fini(&ix);
}

static void entries_end_with_an_answer(void **state)
{
    struct fk_index ix;
    uint32_t n = 0;

    open_index(&ix, FK_POLICY_LRU, 10, 0);
    while (n < 1000 && fk_index_add(&ix, key_of(n), FK_NONE, 0, 1) != FK_NONE)
        n++;
    assert_in_range(n, 10, 999);
    for (uint32_t i = 0; i < n; i++)
        assert_int_equal(find(&ix, i), i);
    assert_int_equal(find(&ix, n), FK_NONE);
    fk_index_unpin(&ix, 3);
    assert_int_equal(fk_index_add(&ix, key_of(n), FK_NONE, 0, 1), 3);
    fk_index_fini(&ix);
}

/* ---- chains ---- */

static uint32_t match_linearly(const struct fk_index *ix, const struct fk_key *keys, uint32_t n)
{
    uint32_t i = 0;

    while (i < n && fk_index_find(ix, keys[i]) != FK_NONE)
        i++;
    return i;
}

static void galloping_equals_walking(void **state)
{
    enum { LEN = 700 };
    static struct fk_key keys[LEN];
    static uint32_t entries[LEN];
    uint64_t rng = 17;

    for (int round = 0; round < 200; round++) {
        struct fk_index ix;
        uint32_t known = round < 20 ? (uint32_t)round : fk_rng_below(&rng, LEN + 1);
        uint32_t parent = FK_NONE;
        open_index(&ix, FK_POLICY_LRU, 2 * LEN, 0);
        for (uint32_t i = 0; i < LEN; i++) {
            keys[i] = key_of(i);
            if (fk_rng_below(&rng, 4) == 0)         /* so that neighbours aren't always in a row */
                store(&ix, 100000 + i, FK_NONE, 1);
            if (i < known)
                parent = store(&ix, i, parent, 1);
        }
        for (uint32_t n = 0; n <= LEN; n += 1 + fk_rng_below(&rng, 60)) {
            uint32_t m = fk_index_match(&ix, keys, n);
            assert_int_equal(m, fk_min(n, known));
            assert_int_equal(m, match_linearly(&ix, keys, n));
            fk_index_resolve(&ix, keys, n, entries);
            for (uint32_t i = 0; i < n; i++)
                assert_int_equal(entries[i], fk_index_find(&ix, keys[i]));
        }
        fk_index_fini(&ix);
    }
}

static void resolve_works_in_any_order(void **state)
{
    enum { N = 500 };
    struct fk_key keys[N];
    uint32_t entries[N], number[N];
    uint64_t rng = 3;
    struct fk_index ix;

    open_index(&ix, FK_POLICY_LRU, N, 0);
    for (uint32_t i = 0; i < N; i++)
        store(&ix, i, FK_NONE, 1);
    for (int round = 0; round < 50; round++) {
        for (uint32_t i = 0; i < N; i++) {
            number[i] = fk_rng_below(&rng, 2 * N);
            if (i && fk_rng_below(&rng, 3))
                number[i] = number[i - 1] + 1;
            keys[i] = key_of(number[i]);
        }
        fk_index_resolve(&ix, keys, N, entries);
        for (uint32_t i = 0; i < N; i++)
            assert_int_equal(entries[i], number[i] < N ? number[i] : FK_NONE);
    }
    fk_index_fini(&ix);
}

/* ---- pins, LOST, holes ---- */

static void pinned_blocks_are_not_evicted(void **state)
{
    struct fk_index ix;

    open_index(&ix, FK_POLICY_LRU, 4, 0);
    uint32_t a = store(&ix, 0, FK_NONE, 1), b = store(&ix, 1, FK_NONE, 2);
    fk_index_pin(&ix, a);
    assert_int_equal(fk_index_victim(&ix, 0, CPU, 9), b);
    fk_index_pin(&ix, b);
    fk_index_pin(&ix, b);
    assert_int_equal(fk_index_victim(&ix, 0, CPU, 9), FK_NONE);
    fk_index_unpin(&ix, b);
    assert_int_equal(fk_index_victim(&ix, 0, CPU, 9), FK_NONE);
    fk_index_unpin(&ix, b);
    assert_int_equal(fk_index_victim(&ix, 0, CPU, 9), b);
    fk_index_unpin(&ix, a);
    assert_int_equal(fk_index_victim(&ix, 0, CPU, 9), a);
    expect_sound(&ix);
    fk_index_fini(&ix);
}

/* Rule 2: a slot that somebody still reads is not given out again. */
static void lost_slot_is_kept_until_the_last_unpin(void **state)
{
    struct fk_index ix;

    open_index(&ix, FK_POLICY_LRU, 1, 0);
    uint32_t a = store(&ix, 0, FK_NONE, 1);
    fk_index_pin(&ix, a);
    fk_index_pin(&ix, a);
    fk_index_drop(&ix, a, CPU, false);
    assert_int_equal(fk_entry_in(&ix.entries[a], CPU), FK_LOST);
    assert_false(fk_entry_visible(&ix, &ix.entries[a]));
    assert_int_equal(fk_index_room(&ix, 0, CPU, 1, 0), 0);
    expect_sound(&ix);
    fk_index_unpin(&ix, a);
    assert_int_equal(fk_index_room(&ix, 0, CPU, 1, 0), 0);
    fk_index_unpin(&ix, a);
    assert_int_equal(fk_index_room(&ix, 0, CPU, 1, 0), 1);
    assert_int_equal(find(&ix, 0), FK_NONE);
    expect_sound(&ix);
    fk_index_fini(&ix);
}

static void last_copy_with_children_is_not_droppable(void **state)
{
    struct fk_index ix;

    open_index(&ix, FK_POLICY_LRU, 4, 4);
    uint32_t a = store(&ix, 0, FK_NONE, 1), b = store(&ix, 1, a, 1);
    assert_false(fk_index_droppable(&ix, a, CPU));
    assert_true(fk_index_droppable(&ix, b, CPU));
    copy_to(&ix, a, SSD, 2);
    assert_true(fk_index_droppable(&ix, a, CPU));
    assert_int_equal(fk_index_victim(&ix, 0, SSD, 9), a);       /* a leaf of its tier ... */
    assert_true(fk_index_droppable(&ix, a, SSD));               /* ... cpu has it too */
    fk_index_fini(&ix);
}

/* A chain of n blocks that loses its root to a fault, stored so that parents have lower (or
 * higher) numbers than their children: all of it must go, in either order. */
static void sweep_clears_behind_a_hole(bool upwards)
{
    enum { N = 200 };
    struct fk_index ix;
    uint32_t entry[N], order[N], parent = FK_NONE;

    open_index(&ix, FK_POLICY_LRU, 2 * N, 0);
    for (uint32_t i = 0; i < N; i++) {      /* frees entries so that the free list gives them */
        entry[i] = store(&ix, 1000 + i, FK_NONE, 1);
        order[i] = i;
    }
    for (uint32_t i = 0; i < N; i++)        /* the last freed comes out first */
        fk_index_drop(&ix, entry[order[upwards ? N - 1 - i : i]], CPU, true);
    for (uint32_t i = 0; i < N; i++)
        parent = entry[i] = store(&ix, i, parent, 1);
    assert_true(upwards ? entry[0] < entry[N - 1] : entry[0] > entry[N - 1]);
    store(&ix, 5000, FK_NONE, 1);           /* a bystander */

    fk_index_drop(&ix, entry[0], CPU, false);
    assert_int_equal(ix.holes, 1);
    assert_int_equal(find(&ix, 0), entry[0]);           /* stays for its children's sake */
    assert_false(fk_entry_visible(&ix, &ix.entries[entry[0]]));
    expect_sound(&ix);
    int rounds = 0;
    while (fk_index_sweep(&ix, 64) && rounds < 100) {
        expect_sound(&ix);
        rounds++;
    }
    assert_true(rounds < 100);
    assert_int_equal(ix.n_live, 1);
    assert_int_not_equal(find(&ix, 5000), FK_NONE);
    expect_sound(&ix);
    fk_index_fini(&ix);
}

static void sweep_upwards(void **state) { sweep_clears_behind_a_hole(true); }
static void sweep_downwards(void **state) { sweep_clears_behind_a_hole(false); }

static void hole_is_filled_again(void **state)
{
    struct fk_index ix;
    uint32_t slot;

    open_index(&ix, FK_POLICY_LRU, 8, 0);
    uint32_t a = store(&ix, 0, FK_NONE, 1), b = store(&ix, 1, a, 1);
    fk_index_drop(&ix, a, CPU, false);
    assert_int_equal(ix.holes, 1);
    assert_int_equal(fk_index_take_slots(&ix, 0, CPU, 1, &slot), 1);
    fk_index_pin(&ix, a);
    fk_index_fill(&ix, a, CPU, slot);
    assert_int_equal(ix.holes, 0);
    fk_index_ready(&ix, a, CPU, 2);
    fk_index_unpin(&ix, a);
    assert_false(fk_index_sweep(&ix, 100));
    assert_int_equal(find(&ix, 1), b);
    expect_sound(&ix);
    fk_index_fini(&ix);
}

static void sweep_leaves_pinned_blocks_until_they_are_let_go(void **state)
{
    struct fk_index ix;

    open_index(&ix, FK_POLICY_LRU, 8, 0);
    uint32_t a = store(&ix, 0, FK_NONE, 1), b = store(&ix, 1, a, 1);
    fk_index_pin(&ix, b);
    fk_index_drop(&ix, a, CPU, false);
    assert_true(fk_index_sweep(&ix, 100));
    assert_int_equal(fk_entry_in(&ix.entries[b], CPU), FK_READY);
    fk_index_unpin(&ix, b);
    assert_false(fk_index_sweep(&ix, 100));
    assert_int_equal(ix.n_live, 0);
    expect_sound(&ix);
    fk_index_fini(&ix);
}

static void doomed_blocks_are_not_found_but_keep_what_is_pinned(void **state)
{
    struct fk_index ix;

    open_index(&ix, FK_POLICY_LRU, 4, 4);
    uint32_t a = store(&ix, 0, FK_NONE, 1), b = store(&ix, 1, a, 1);
    copy_to(&ix, a, SSD, 2);
    fk_index_pin(&ix, b);
    for (uint32_t i = 0; i < 2; i++)
        fk_index_doom(&ix, i ? b : a);
    fk_index_doom(&ix, b);                              /* twice does no harm */
    assert_int_equal(find(&ix, 0), FK_NONE);
    assert_int_equal(find(&ix, 1), FK_NONE);
    assert_int_equal(fk_index_room(&ix, 0, CPU, 9, 0), 3);
    assert_int_equal(fk_index_room(&ix, 0, SSD, 9, 0), 4);
    expect_sound(&ix);
    uint32_t again = store(&ix, 1, FK_NONE, 3);         /* the key may come back meanwhile */
    assert_int_equal(find(&ix, 1), again);
    fk_index_unpin(&ix, b);
    assert_int_equal(find(&ix, 1), again);
    assert_int_equal(ix.n_live, 1);
    expect_sound(&ix);
    fk_index_fini(&ix);
}

/* ---- groups ---- */

static void maximum_is_paid_by_its_own_blocks(void **state)
{
    struct fk_index ix;
    uint32_t max[FK_TIERS] = { 3, 0 }, none[FK_TIERS] = { 0, 0 }, g;

    open_index(&ix, FK_POLICY_LRU, 10, 0);
    assert_int_equal(fk_index_group_add(&ix, 0, max, none, &g), 0);
    uint32_t older = store(&ix, 0, FK_NONE, 1);
    for (uint32_t i = 1; i <= 3; i++)
        assert_int_not_equal(store_in(&ix, i, FK_NONE, g, i + 1), FK_NONE);
    assert_int_equal(store_in(&ix, 4, FK_NONE, g, 9), FK_NONE);
    assert_int_equal(fk_index_room(&ix, 0, CPU, 10, 0), 6);
    assert_int_equal(fk_index_victim(&ix, g, CPU, 10), find(&ix, 1));
    assert_int_equal(fk_index_victim(&ix, 0, CPU, 10), older);
    expect_sound(&ix);
    fk_index_fini(&ix);
}

static void guarantee_is_never_taken(void **state)
{
    struct fk_index ix;
    uint32_t no_limit[FK_TIERS] = { UINT32_MAX, UINT32_MAX }, kept[FK_TIERS] = { 4, 0 }, g;

    open_index(&ix, FK_POLICY_LRU, 10, 0);
    assert_int_equal(fk_index_group_add(&ix, 0, no_limit, kept, &g), 0);
    for (uint32_t i = 0; i < 6; i++)
        assert_int_not_equal(store(&ix, i, FK_NONE, 100 + i), FK_NONE);
    assert_int_equal(store(&ix, 6, FK_NONE, 200), FK_NONE);     /* four are promised */
    for (uint32_t i = 10; i < 14; i++)
        assert_int_not_equal(store_in(&ix, i, FK_NONE, g, 1), FK_NONE);
    /* The group's blocks are older, but it is not over its guarantee. */
    assert_int_equal(fk_index_victim(&ix, 0, CPU, 300), find(&ix, 0));
    /* Over it, it pays with the others: here it has the oldest. */
    fk_index_drop(&ix, find(&ix, 0), CPU, true);
    assert_int_not_equal(store_in(&ix, 14, FK_NONE, g, 1), FK_NONE);
    assert_int_equal(ix.entries[fk_index_victim(&ix, 0, CPU, 300)].group, g);
    expect_sound(&ix);
    fk_index_fini(&ix);
}

/* With a directory out, what is promised is more than what is left. */
static void guarantees_share_what_is_left(void **state)
{
    struct fk_index ix;
    struct fk_index_params params = { .max_spaces = 1, .seed = 99, .policy = { .kind = FK_POLICY_LRU } };
    uint32_t slots[FK_TIERS] = { 16, 32 }, space, a, b;
    uint32_t no_limit[FK_TIERS] = { UINT32_MAX, UINT32_MAX };
    uint32_t much[FK_TIERS] = { 0, 24 }, little[FK_TIERS] = { 0, 8 };

    assert_int_equal(fk_index_init(&ix, &params), 0);
    assert_int_equal(fk_index_space_add(&ix, slots, 8, 2, &space), 0);
    assert_int_equal(fk_index_group_add(&ix, 0, no_limit, much, &a), 0);
    assert_int_equal(fk_index_group_add(&ix, 0, no_limit, little, &b), 0);
    assert_int_equal(fk_index_room(&ix, b, SSD, 32, 0), 8);
    assert_int_equal(fk_index_room(&ix, 0, SSD, 32, 0), 0);
    fk_slots_set_out(&ix.spaces[0].slots[SSD], 1);      /* 16 are left, of 32 */
    assert_int_equal(fk_index_room(&ix, b, SSD, 32, 0), 8);
    uint32_t first, got = 0;
    while (got < 8)
        got += fk_index_take_slots(&ix, b, SSD, 8 - got, &first);
    assert_int_equal(fk_index_room(&ix, b, SSD, 32, 0), 0);
    assert_int_equal(fk_index_room(&ix, a, SSD, 32, 0), 8);
    fk_slots_set_out(&ix.spaces[0].slots[SSD], 0);
    assert_int_equal(fk_index_room(&ix, a, SSD, 32, 0), 24);
    fk_index_fini(&ix);
}

static void impossible_quotas_are_refused(void **state)
{
    struct fk_index ix;
    uint32_t no_limit[FK_TIERS] = { UINT32_MAX, UINT32_MAX }, g;
    uint32_t six[FK_TIERS] = { 6, 0 }, two[FK_TIERS] = { 2, 0 };

    open_index(&ix, FK_POLICY_LRU, 10, 0);
    assert_int_equal(fk_index_group_add(&ix, 0, no_limit, six, &g), 0);
    assert_int_equal(fk_index_group_add(&ix, 0, no_limit, six, &g), -EINVAL);
    assert_int_equal(fk_index_group_add(&ix, 0, two, six, &g), -EINVAL);
    uint32_t none[FK_TIERS] = { 0, 0 };
    while (ix.n_groups < FK_MAX_GROUPS)
        assert_int_equal(fk_index_group_add(&ix, 0, no_limit, none, &g), 0);
    assert_int_equal(fk_index_group_add(&ix, 0, no_limit, none, &g), -ENOSPC);
    fk_index_fini(&ix);
}

/* ---- ticks, growth ---- */

static void rebase_keeps_the_order(void **state)
{
    struct fk_index ix;

    open_index(&ix, FK_POLICY_LRU, 64, 0);
    for (uint32_t i = 0; i < 32; i++)
        store(&ix, i, FK_NONE, 0xf0000000u + (i * 7) % 32);
    fk_index_rebase(&ix, 0x80000000u);
    expect_sound(&ix);
    for (uint32_t tick = 0; tick < 32; tick++) {
        uint32_t v = fk_index_victim(&ix, 0, CPU, 0);
        assert_int_equal(ix.entries[v].atime, 0x70000000u + tick);
        fk_index_drop(&ix, v, CPU, true);
    }
    fk_index_fini(&ix);
}

static void second_space_grows_and_keeps_all(void **state)
{
    struct fk_index ix;
    uint32_t slots[FK_TIERS] = { 5000, 100 }, space, parent = FK_NONE;

    open_index(&ix, FK_POLICY_LRU, 100, 0);
    for (uint32_t i = 0; i < 100; i++)
        parent = store(&ix, i, i % 10 ? parent : FK_NONE, i);
    assert_int_equal(fk_index_space_add(&ix, slots, 8, 1, &space), 0);
    assert_int_equal(space, 1);
    expect_sound(&ix);
    for (uint32_t i = 0; i < 100; i++)
        assert_int_not_equal(find(&ix, i), FK_NONE);
    uint32_t group = ix.spaces[1].default_group;
    for (uint32_t i = 1000; i < 6000; i++)
        assert_int_not_equal(store_in(&ix, i, FK_NONE, group, i), FK_NONE);
    assert_int_equal(store_in(&ix, 6000, FK_NONE, group, 1), FK_NONE);
    expect_sound(&ix);
    /* Spaces do not evict each other's blocks. */
    uint32_t victim = fk_index_victim(&ix, group, CPU, 7000);
    assert_int_equal(ix.entries[victim].group, group);
    assert_int_equal(fk_index_space_add(&ix, slots, 8, 1, &space), -ENOSPC);
    fk_index_fini(&ix);
}

static void index_memory_is_what_was_promised(void **state)
{
    enum { N = 100000 };
    struct fk_index ix;
    uint32_t parent = FK_NONE;

    open_index(&ix, FK_POLICY_LRU, N, 0);
    for (uint32_t i = 0; i < N; i++)
        parent = store(&ix, i, i % 50 ? parent : FK_NONE, i);
    assert_true(fk_index_bytes(&ix) <= 80ull * N);
    fk_index_fini(&ix);
}

/* ---- a long random run ---- */

enum { NUMBERS = 600, STEPS = 60000 };
struct model {
    bool ready[NUMBERS][FK_TIERS];          /* by the events alone */
    uint32_t parent[NUMBERS];               /* number; FK_NONE: first of a chain */
    uint32_t pinned[64], n_pinned;
};

static uint32_t number_of(struct fk_key key)
{
    for (uint32_t i = 0; i < NUMBERS; i++)
        if (fk_key_equal(key, key_of(i)))
            return i;
    fail_msg("an event for a key nobody stored");
    return 0;
}

/* Stored and removed alternate for each block and tier (rule 7). */
static void take_events(struct fk_index *ix, struct model *m)
{
    for (size_t i = 0; i < ix->events.len; i++) {
        const struct fk_index_event *ev = &ix->events.data[i];
        uint32_t n = number_of(ev->key);
        assert_int_equal(m->ready[n][ev->tier], !ev->stored);
        m->ready[n][ev->tier] = ev->stored;
        if (m->parent[n] == FK_NONE)
            assert_true(fk_key_is_zero(ev->parent));
        else
            assert_true(fk_key_equal(ev->parent, key_of(m->parent[n])));
    }
    ix->events.len = 0;
}

static void compare(struct fk_index *ix, struct model *m)
{
    expect_sound(ix);
    for (uint32_t i = 0; i < NUMBERS; i++) {
        uint32_t e = find(ix, i);
        for (int t = 0; t < FK_TIERS; t++)
            assert_int_equal(m->ready[i][t],
                             e != FK_NONE && fk_entry_in(&ix->entries[e], (enum fk_tier)t) == FK_READY);
        if (e == FK_NONE)
            continue;
        uint32_t chain = 0, parent = m->parent[i];          /* prefix-closed */
        for (; parent != FK_NONE; parent = m->parent[parent], chain++)
            assert_int_not_equal(find(ix, parent), FK_NONE);
    }
}

static void random_store(struct fk_index *ix, struct model *m, uint64_t *rng, uint32_t tick)
{
    uint32_t n = fk_rng_below(rng, NUMBERS), entry = find(ix, n), slot;
    uint32_t group = fk_rng_below(rng, ix->n_groups);
    uint32_t parent = m->parent[n] == FK_NONE ? FK_NONE : find(ix, m->parent[n]);

    if (entry != FK_NONE || (m->parent[n] != FK_NONE && parent == FK_NONE))
        return;
    if (parent != FK_NONE)
        fk_index_pin(ix, parent);           /* as a put does while it makes room */
    while (!fk_index_room(ix, group, CPU, 1, 0)) {
        uint32_t v = fk_index_victim(ix, group, CPU, tick);
        if (v == FK_NONE || !fk_index_droppable(ix, v, CPU))
            break;
        fk_index_drop(ix, v, CPU, true);
    }
    if (fk_index_room(ix, group, CPU, 1, 0) && fk_index_take_slots(ix, group, CPU, 1, &slot)) {
        entry = fk_index_add(ix, key_of(n), parent, group, tick);
        assert_int_not_equal(entry, FK_NONE);
        fk_index_fill(ix, entry, CPU, slot);
        if (fk_rng_below(rng, 10))
            fk_index_ready(ix, entry, CPU, tick);
        else
            fk_index_drop(ix, entry, CPU, false);
        fk_index_unpin(ix, entry);
    }
    if (parent != FK_NONE)
        fk_index_unpin(ix, parent);
}

static void random_copy(struct fk_index *ix, uint32_t entry, uint64_t *rng, uint32_t tick)
{
    enum fk_tier to = fk_rng_below(rng, 2) ? SSD : CPU;
    const struct fk_entry *e = &ix->entries[entry];
    uint32_t slot;

    if (fk_entry_in(e, to) != FK_ABSENT || !fk_entry_visible(ix, e) ||
        !fk_index_room(ix, e->group, to, 1, 0) || !fk_index_take_slots(ix, e->group, to, 1, &slot))
        return;
    fk_index_pin(ix, entry);
    fk_index_fill(ix, entry, to, slot);
    if (fk_rng_below(rng, 10))
        fk_index_ready(ix, entry, to, tick);
    else
        fk_index_drop(ix, entry, to, false);
    fk_index_unpin(ix, entry);
}

static void random_pin(struct fk_index *ix, struct model *m, uint32_t entry, uint64_t *rng)
{
    if (m->n_pinned == fk_array_size(m->pinned) || (m->n_pinned && fk_rng_below(rng, 2))) {
        uint32_t at = fk_rng_below(rng, m->n_pinned), e = m->pinned[at];
        m->pinned[at] = m->pinned[--m->n_pinned];
        fk_index_unpin(ix, e);
    } else if (entry != FK_NONE) {
        fk_index_pin(ix, entry);
        m->pinned[m->n_pinned++] = entry;
    }
}

static void random_step(struct fk_index *ix, struct model *m, uint64_t *rng, uint32_t tick)
{
    uint32_t entry = find(ix, fk_rng_below(rng, NUMBERS)), what = fk_rng_below(rng, 1000);

    if (what < 400) {
        random_store(ix, m, rng, tick);
    } else if (what < 500) {
        random_pin(ix, m, entry, rng);
    } else if (what < 560) {
        fk_index_sweep(ix, 1 + fk_rng_below(rng, 200));
    } else if (what < 600) {
        enum fk_tier tier = what & 1 ? CPU : SSD;
        uint32_t v = fk_index_victim(ix, fk_rng_below(rng, ix->n_groups), tier, tick);
        if (v != FK_NONE && fk_index_droppable(ix, v, tier))
            fk_index_drop(ix, v, tier, true);
    } else if (what == 999 && fk_rng_below(rng, 20) == 0) {
        for (uint32_t i = 0; i < ix->n_entries_used; i++)
            if (ix->entries[i].state & FK_ENTRY_USED)
                fk_index_doom(ix, i);
    } else if (entry == FK_NONE) {
        return;
    } else if (what < 750) {
        random_copy(ix, entry, rng, tick);
    } else if (what < 960) {
        fk_index_touch(ix, entry, tick);
    } else {
        enum fk_tier tier = what & 1 ? CPU : SSD;       /* a fault */
        if (fk_entry_in(&ix->entries[entry], tier) == FK_READY)
            fk_index_drop(ix, entry, tier, false);
    }
}

static void random_run_stays_sound(void **state)
{
    static struct model m;
    uint32_t max[FK_TIERS] = { 20, 30 }, kept[FK_TIERS] = { 10, 10 }, g;
    uint32_t no_limit[FK_TIERS] = { UINT32_MAX, UINT32_MAX }, none[FK_TIERS] = { 0, 0 };

    for (uint64_t seed = 1; seed <= 4; seed++) {
        struct fk_index ix;
        uint64_t rng = seed;
        memset(&m, 0, sizeof(m));
        for (uint32_t i = 0; i < NUMBERS; i++)          /* trees: each block hangs on a lower one */
            m.parent[i] = i < 20 ? FK_NONE : fk_rng_below(&rng, i);
        open_index(&ix, FK_POLICY_LRU, 60, 100);
        assert_int_equal(fk_index_group_add(&ix, 0, max, none, &g), 0);
        assert_int_equal(fk_index_group_add(&ix, 0, no_limit, kept, &g), 0);
        for (uint32_t step = 0; step < STEPS; step++) {
            random_step(&ix, &m, &rng, step + 1);
            take_events(&ix, &m);
            if (step % 50 == 0)
                compare(&ix, &m);
            if (step == STEPS / 2)
                fk_index_rebase(&ix, 100);
        }
        while (m.n_pinned)
            fk_index_unpin(&ix, m.pinned[--m.n_pinned]);
        take_events(&ix, &m);
        compare(&ix, &m);
        fk_index_fini(&ix);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(table_finds_what_is_there_and_nothing_else),
        cmocka_unit_test(empty_index_finds_nothing),
        cmocka_unit_test(crowded_bucket_loses_nothing),
        cmocka_unit_test(overflow_comes_and_goes),
        cmocka_unit_test(entries_end_with_an_answer),
        cmocka_unit_test(galloping_equals_walking),
        cmocka_unit_test(resolve_works_in_any_order),
        cmocka_unit_test(pinned_blocks_are_not_evicted),
        cmocka_unit_test(lost_slot_is_kept_until_the_last_unpin),
        cmocka_unit_test(last_copy_with_children_is_not_droppable),
        cmocka_unit_test(sweep_upwards),
        cmocka_unit_test(sweep_downwards),
        cmocka_unit_test(hole_is_filled_again),
        cmocka_unit_test(sweep_leaves_pinned_blocks_until_they_are_let_go),
        cmocka_unit_test(doomed_blocks_are_not_found_but_keep_what_is_pinned),
        cmocka_unit_test(maximum_is_paid_by_its_own_blocks),
        cmocka_unit_test(guarantee_is_never_taken),
        cmocka_unit_test(guarantees_share_what_is_left),
        cmocka_unit_test(impossible_quotas_are_refused),
        cmocka_unit_test(rebase_keeps_the_order),
        cmocka_unit_test(second_space_grows_and_keeps_all),
        cmocka_unit_test(index_memory_is_what_was_promised),
        cmocka_unit_test(random_run_stays_sound),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
