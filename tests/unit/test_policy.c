/*
 * test_policy.c - src/index/policy*.c: the order in which each policy evicts, on cases small
 * enough to follow by hand; leaves first; what sets lfu, slru, s3fifo and arc apart; long random
 * runs of every policy under the self-check.
 */
#include "index_rig.h"

enum { NUMBERS = 100 };

static uint32_t out(struct fk_index *ix, uint32_t tick)
{
    return evict(ix, CPU, tick, NUMBERS);
}

static void expect_order(struct fk_index *ix, const uint32_t *want, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++) {
        assert_int_equal(out(ix, 1000 + i), want[i]);
        expect_sound(ix);
    }
    assert_int_equal(out(ix, 2000), FK_NONE);
}
#define expect_evictions(ix, ...) \
    expect_order(ix, (const uint32_t[]){ __VA_ARGS__ }, \
                 sizeof((const uint32_t[]){ __VA_ARGS__ }) / sizeof(uint32_t))

static void touch(struct fk_index *ix, uint32_t number, uint32_t tick)
{
    fk_index_touch(ix, find(ix, number), tick);
}

/* Blocks 0, 1, 2 stored at ticks 1, 2, 3. */
static void open_with_three(struct fk_index *ix, enum fk_policy_kind kind)
{
    open_index(ix, kind, 10, 0);
    for (uint32_t i = 0; i < 3; i++)
        store(ix, i, FK_NONE, i + 1);
}

/* ---- names ---- */

static void names_are_read_back(void **state)
{
    static const char *const names[] = { "lru", "lfu", "slru", "fifo", "mru", "filo", "s3fifo",
                                         "arc", "auto" };
    enum fk_policy_kind kind;

    assert_int_equal(fk_array_size(names), FK_POLICY_KINDS);
    for (int i = 0; i < FK_POLICY_KINDS; i++) {
        assert_int_equal(fk_policy_parse(names[i], &kind), 0);
        assert_int_equal(kind, i);
        assert_string_equal(fk_policy_name(kind), names[i]);
    }
    assert_int_equal(fk_policy_parse("clock", &kind), -EINVAL);
    assert_int_equal(fk_policy_parse("", &kind), -EINVAL);
}

/* ---- by time ---- */

static void lru_goes_by_last_use(void **state)
{
    struct fk_index ix;

    open_with_three(&ix, FK_POLICY_LRU);
    touch(&ix, 0, 10);
    expect_evictions(&ix, 1, 2, 0);
    fk_index_fini(&ix);
}

static void lru_rewards_hits_if_told_so(void **state)
{
    struct fk_index ix;

    open_with_three(&ix, FK_POLICY_LRU);
    ix.policy.hit_reward_ticks = 100;
    touch(&ix, 0, 4);           /* counts as used at 104 */
    touch(&ix, 1, 5);
    touch(&ix, 1, 6);           /* at 206 */
    touch(&ix, 2, 50);          /* at 150 */
    expect_evictions(&ix, 0, 2, 1);
    fk_index_fini(&ix);
}

static void fifo_goes_by_insertion(void **state)
{
    struct fk_index ix;

    open_with_three(&ix, FK_POLICY_FIFO);
    touch(&ix, 0, 10);
    expect_evictions(&ix, 0, 1, 2);
    fk_index_fini(&ix);
}

static void mru_takes_the_latest_used(void **state)
{
    struct fk_index ix;

    open_with_three(&ix, FK_POLICY_MRU);
    touch(&ix, 1, 10);
    expect_evictions(&ix, 1, 2, 0);
    fk_index_fini(&ix);
}

static void filo_takes_the_latest_stored(void **state)
{
    struct fk_index ix;

    open_with_three(&ix, FK_POLICY_FILO);
    touch(&ix, 0, 10);
    expect_evictions(&ix, 2, 1, 0);
    fk_index_fini(&ix);
}

/* ---- leaves first, whatever the policy ---- */

/*  0 - 1 - 2      a chain with a branch, and a single block that is
 *    \ 3          by each policy's measure the last to go or the first  */
static void leaves_go_first(void **state)
{
    for (int kind = 0; kind < FK_POLICY_KINDS; kind++) {
        struct fk_index ix;
        uint32_t gone[4], n = 0, number;
        open_index(&ix, (enum fk_policy_kind)kind, 10, 0);
        uint32_t a = store(&ix, 0, FK_NONE, 1), b = store(&ix, 1, a, 2);
        store(&ix, 2, b, 3);
        store(&ix, 3, a, 4);
        touch(&ix, 2, 5);
        while ((number = out(&ix, 10 + n)) != FK_NONE) {
            expect_sound(&ix);
            gone[n++] = number;
        }
        assert_int_equal(n, 4);
        assert_int_equal(gone[3], 0);               /* the root last */
        for (uint32_t i = 0; i < 4; i++)
            if (gone[i] == 1)
                assert_true(i && (gone[0] == 2 || gone[1] == 2));
        fk_index_fini(&ix);
    }
}

static void a_chain_takes_its_place_by_its_last_block(void **state)
{
    struct fk_index ix;

    open_index(&ix, FK_POLICY_LRU, 10, 0);
    uint32_t a = store(&ix, 0, FK_NONE, 1), b = store(&ix, 1, a, 1);
    store(&ix, 2, b, 1);
    store(&ix, 3, FK_NONE, 2);
    expect_evictions(&ix, 2, 1, 0, 3);
    fk_index_fini(&ix);
}

/* ---- lfu ---- */

static void lfu_goes_by_hits(void **state)
{
    struct fk_index ix;

    open_with_three(&ix, FK_POLICY_LFU);
    touch(&ix, 0, 10);
    touch(&ix, 0, 11);
    touch(&ix, 1, 12);
    expect_evictions(&ix, 2, 1, 0);
    fk_index_fini(&ix);
}

/* Old fame is overtaken: a block with many hits long ago goes before the newcomers of a time in
 * which much has been evicted. */
static void lfu_ages(void **state)
{
    struct fk_index ix;
    uint32_t went = FK_NONE;

    open_index(&ix, FK_POLICY_LFU, 4, 0);
    store(&ix, 0, FK_NONE, 1);
    for (uint32_t t = 2; t < 8; t++)
        touch(&ix, 0, t);
    uint32_t i = 1;
    for (; i < NUMBERS && went != 0; i++) {
        went = i >= 4 ? out(&ix, 10 * i) : FK_NONE;
        store(&ix, i, FK_NONE, 10 * i + 1);
        touch(&ix, i, 10 * i + 2);
    }
    assert_int_equal(went, 0);
    assert_in_range(i, 8, 40);                  /* not at once, not never */
    fk_index_fini(&ix);
}

/* The rank is one word for both tiers; the arrival of an SSD copy must not overwrite what the
 * cpu tier goes by. */
static void lfu_keeps_its_rank_when_a_copy_reaches_the_ssd(void **state)
{
    struct fk_index ix;

    open_index(&ix, FK_POLICY_LFU, 4, 50);
    for (uint32_t i = 10; i < 30; i++) {            /* the cpu lane ages, the SSD's does not */
        store(&ix, i, FK_NONE, i);
        touch(&ix, i, i);
        assert_int_equal(out(&ix, i), i);
    }
    store(&ix, 0, FK_NONE, 100);
    uint32_t was = ix.entries[find(&ix, 0)].rank;
    copy_to(&ix, find(&ix, 0), SSD, 101);
    assert_int_equal(ix.entries[find(&ix, 0)].rank, was);
    fk_index_fini(&ix);
}

/* ---- slru ---- */

static void slru_protects_from_the_second_hit_on(void **state)
{
    struct fk_index ix;

    open_with_three(&ix, FK_POLICY_SLRU);
    touch(&ix, 0, 10);
    touch(&ix, 0, 11);          /* protected */
    touch(&ix, 1, 12);          /* one hit: still on probation, but younger */
    expect_evictions(&ix, 2, 1, 0);
    fk_index_fini(&ix);
}

/* Ten slots: at most five may be protected. With ten, the oldest five go back on probation. */
static void slru_demotes_when_too_much_is_protected(void **state)
{
    struct fk_index ix;

    open_index(&ix, FK_POLICY_SLRU, 10, 0);
    for (uint32_t i = 0; i < 10; i++) {
        store(&ix, i, FK_NONE, 1 + i);
        touch(&ix, i, 20 + i);
        touch(&ix, i, 40 + i);
    }
    for (uint32_t i = 0; i < 5; i++) {
        assert_in_range(out(&ix, 100), 0, 4);
        expect_sound(&ix);
    }
    store(&ix, 50, FK_NONE, 102);               /* a newcomer is worth less than the protected */
    assert_int_equal(out(&ix, 103), 50);
    expect_evictions(&ix, 5, 6, 7, 8, 9);       /* nobody is left on probation */
    fk_index_fini(&ix);
}

/* ---- s3fifo ---- */

static void s3fifo_keeps_what_was_used_while_young(void **state)
{
    struct fk_index ix;

    open_with_three(&ix, FK_POLICY_S3FIFO);
    touch(&ix, 0, 10);
    /* 0 is the oldest newcomer, but was used: it goes on to the main queue and 1 leaves. One
     * newcomer is a tenth of the slots: that one is spared, the main queue pays. */
    expect_evictions(&ix, 1, 0, 2);
    fk_index_fini(&ix);
}

static void s3fifo_ghost_goes_straight_to_the_main_queue(void **state)
{
    struct fk_index ix;

    open_index(&ix, FK_POLICY_S3FIFO, 20, 0);
    for (uint32_t i = 0; i < 10; i++)
        store(&ix, i, FK_NONE, 1 + i);
    assert_int_equal(out(&ix, 100), 0);
    store(&ix, 0, FK_NONE, 101);                /* remembered */
    store(&ix, 20, FK_NONE, 102);               /* not known: a newcomer */
    for (uint32_t i = 1; i < 9; i++)
        assert_int_equal(out(&ix, 110 + i), i);
    /* Two newcomers are a tenth: from here on the main queue pays. */
    assert_int_equal(out(&ix, 130), 0);
    assert_int_equal(out(&ix, 131), 9);
    fk_index_fini(&ix);
}

static void s3fifo_gives_the_used_another_round(void **state)
{
    struct fk_index ix;

    open_index(&ix, FK_POLICY_S3FIFO, 20, 0);
    for (uint32_t i = 0; i < 4; i++) {
        store(&ix, i, FK_NONE, 1 + i);
        touch(&ix, i, 10 + i);
    }
    store(&ix, 4, FK_NONE, 20);
    store(&ix, 5, FK_NONE, 21);
    store(&ix, 6, FK_NONE, 22);
    assert_int_equal(out(&ix, 30), 4);          /* 0 to 3 are in the main queue now */
    touch(&ix, 0, 40);
    for (int n = 0; n < 3; n++)                 /* 0 was used: round again; 5, 6 are a tenth */
        assert_in_range(out(&ix, 50), 1, 3);
    assert_int_equal(out(&ix, 51), 0);
    expect_sound(&ix);
    fk_index_fini(&ix);
}

/* ---- arc ---- */

static void arc_keeps_what_was_used_twice(void **state)
{
    struct fk_index ix;

    open_with_three(&ix, FK_POLICY_ARC);
    touch(&ix, 0, 10);
    expect_evictions(&ix, 1, 2, 0);
    fk_index_fini(&ix);
}

/* Hits in the ghosts of T1 make T1 larger, so that T2 pays; hits in those of T2 do the reverse. */
static void arc_adapts_to_its_ghosts(void **state)
{
    struct fk_index ix;

    open_index(&ix, FK_POLICY_ARC, 8, 0);
    for (uint32_t i = 0; i < 4; i++) {          /* T2: 0 to 3 */
        store(&ix, i, FK_NONE, 1 + i);
        touch(&ix, i, 10 + i);
    }
    for (uint32_t i = 4; i < 8; i++)            /* T1: 4 to 7 */
        store(&ix, i, FK_NONE, 20 + i);
    assert_int_equal(out(&ix, 40), 4);          /* target 0: T1 pays */
    assert_int_equal(out(&ix, 41), 5);
    for (uint32_t i = 4; i < 6; i++)            /* both come back: two hits in T1's ghosts */
        store(&ix, i, FK_NONE, 50 + i);         /* T1: 6 7, T2: 0 1 2 3 4 5, target 2 */
    assert_int_equal(out(&ix, 60), 0);          /* T1 is not over its target: T2 pays */
    store(&ix, 0, FK_NONE, 70);                 /* a hit in T2's ghosts: target 1 */
    assert_int_equal(out(&ix, 80), 6);          /* T1 has two */
    assert_int_equal(out(&ix, 81), 1);          /* T1 has one: T2 pays */
    expect_sound(&ix);
    fk_index_fini(&ix);
}

/* ---- all, for long ---- */

static void random_step(struct fk_index *ix, uint64_t *rng, uint32_t tick)
{
    enum { MANY = 2000 };
    /* Some are asked for often, most seldom. */
    uint32_t n = fk_rng_below(rng, fk_rng_below(rng, 3) ? 100 : MANY), chain = n % 8;
    uint32_t e = find(ix, n), parent = chain ? find(ix, n - 1) : FK_NONE, victim;

    if (e != FK_NONE) {
        fk_index_touch(ix, e, tick);
        enum fk_tier to = fk_entry_in(&ix->entries[e], SSD) == FK_ABSENT ? SSD : CPU;
        if (fk_entry_in(&ix->entries[e], to) != FK_ABSENT)
            return;
        while (!fk_index_room(ix, 0, to, 1, 0)) {
            fk_index_pin(ix, e);
            victim = fk_index_victim(ix, 0, to, tick);
            bool ok = victim != FK_NONE && fk_index_droppable(ix, victim, to);
            if (ok)
                fk_index_drop(ix, victim, to, true);
            fk_index_unpin(ix, e);
            if (!ok)
                return;
        }
        if (find(ix, n) == e)
            copy_to(ix, e, to, tick);
        return;
    }
    if (chain && parent == FK_NONE)
        return;
    if (parent != FK_NONE)
        fk_index_pin(ix, parent);
    while (!fk_index_room(ix, 0, CPU, 1, 0) &&
           (victim = fk_index_victim(ix, 0, CPU, tick)) != FK_NONE &&
           fk_index_droppable(ix, victim, CPU))
        fk_index_drop(ix, victim, CPU, true);
    store(ix, n, parent, tick);
    if (parent != FK_NONE)
        fk_index_unpin(ix, parent);
    ix->events.len = 0;
}

static void every_policy_runs_for_long(void **state)
{
    for (int kind = 0; kind < FK_POLICY_KINDS; kind++) {
        struct fk_index ix;
        uint64_t rng = (uint64_t)kind + 1;
        open_index(&ix, (enum fk_policy_kind)kind, 64, 200);
        for (uint32_t step = 1; step <= 60000; step++) {
            random_step(&ix, &rng, step);
            if (step % 200 == 0)
                expect_sound(&ix);
            if (step % 20000 == 0)
                fk_index_rebase(&ix, 5000);
        }
        assert_true(ix.evicted[CPU] > 1000);
        fk_index_fini(&ix);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(names_are_read_back),
        cmocka_unit_test(lru_goes_by_last_use),
        cmocka_unit_test(lru_rewards_hits_if_told_so),
        cmocka_unit_test(fifo_goes_by_insertion),
        cmocka_unit_test(mru_takes_the_latest_used),
        cmocka_unit_test(filo_takes_the_latest_stored),
        cmocka_unit_test(leaves_go_first),
        cmocka_unit_test(a_chain_takes_its_place_by_its_last_block),
        cmocka_unit_test(lfu_goes_by_hits),
        cmocka_unit_test(lfu_ages),
        cmocka_unit_test(lfu_keeps_its_rank_when_a_copy_reaches_the_ssd),
        cmocka_unit_test(slru_protects_from_the_second_hit_on),
        cmocka_unit_test(slru_demotes_when_too_much_is_protected),
        cmocka_unit_test(s3fifo_keeps_what_was_used_while_young),
        cmocka_unit_test(s3fifo_ghost_goes_straight_to_the_main_queue),
        cmocka_unit_test(s3fifo_gives_the_used_another_round),
        cmocka_unit_test(arc_keeps_what_was_used_twice),
        cmocka_unit_test(arc_adapts_to_its_ghosts),
        cmocka_unit_test(every_policy_runs_for_long),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
