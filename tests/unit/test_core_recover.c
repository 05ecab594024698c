/*
 * test_core_recover.c - src/node/recover.c: what a slot table holds after any kind of end. Records in
 * any order, duplicates, orphans, cycles, wrong slots, tags of quota groups; what is not there again
 * must be emptied in the table too.
 */
#include "core_rig.h"

enum { SLOTS = 64 };

struct list { struct fk_core_found v[20000]; uint32_t n; };
static struct list list;

static void add(uint32_t chain, uint32_t i, uint32_t slot, uint64_t seq, uint32_t tag)
{
    struct fk_core_found *f = &list.v[list.n++];

    *f = (struct fk_core_found){ .key = key_of(chain, i), .seq = seq, .slot = slot, .tag = tag };
    if (i)
        f->parent = key_of(chain, i - 1);
}

static void shuffle(uint64_t seed)
{
    for (uint32_t i = list.n; i > 1; i--) {
        uint32_t at = fk_rng_below(&seed, i);
        struct fk_core_found f = list.v[at];
        list.v[at] = list.v[i - 1];
        list.v[i - 1] = f;
    }
}

static void open_empty(struct rig *r)
{
    rig_open(r, &(struct rig_params){ .cpu = 32, .ssd = SLOTS });
    list.n = 0;
}

static int64_t recover(struct rig *r)
{
    int64_t n = fk_core_recover(r->core, r->space, list.v, list.n);

    for (uint32_t i = 0; i < list.n; i++) {         /* the disk's side, for reads */
        if (list.v[i].slot < RIG_SSD_SLOTS && fk_key_is_zero(r->ssd[list.v[i].slot].key)) {
            r->ssd[list.v[i].slot].key = list.v[i].key;
            r->ssd[list.v[i].slot].parent = list.v[i].parent;
        }
    }
    expect_sound(r);
    return n;
}

static void nothing_is_recovered_from_nothing(void **state)
{
    struct rig r;

    open_empty(&r);
    assert_int_equal(recover(&r), 0);
    assert_int_equal(fk_core_recover(r.core, r.space, NULL, 0), 0);
    rig_close(&r);
}

static void chains_in_any_order(void **state)
{
    for (uint64_t seed = 1; seed <= 20; seed++) {
        struct rig r;
        open_empty(&r);
        for (uint32_t i = 0; i < 40; i++)
            add(1 + i / 20, i % 20, i, 100 + i, 0);
        shuffle(seed);
        assert_int_equal(recover(&r), 40);
        settle(&r);
        assert_int_equal(r.forgotten, 0);
        assert_int_equal(matched(&r, 1, 30), 20);
        assert_int_equal(match(&r, 2, 20).ssd_blocks, 20);
        for (uint32_t i = 0; i < 40; i++)
            assert_int_equal(where(&r, 1 + i / 20, i % 20).ssd_slot, i);
        uint64_t op = get_chain(&r, 1, 20);
        settle(&r);
        expect_end(&r, op, 0, 20);
        rig_close(&r);
    }
}

static void orphans_are_dropped_and_emptied(void **state)
{
    struct rig r;

    open_empty(&r);
    for (uint32_t i = 0; i < 20; i++)
        if (i != 7)
            add(1, i, i, 100 + i, 0);
    shuffle(5);
    assert_int_equal(recover(&r), 7);
    assert_int_equal(matched(&r, 1, 20), 7);
    settle(&r);
    assert_int_equal(r.forgotten, 12);
    for (uint32_t i = 8; i < 20; i++)
        assert_true(fk_key_is_zero(r.ssd[i].key));
    assert_int_equal(stats_of(&r).ssd.free_slots, SLOTS - 7);
    rig_close(&r);
}

static void of_two_records_the_newer_stays(void **state)
{
    for (uint64_t seed = 1; seed <= 10; seed++) {
        struct rig r;
        open_empty(&r);
        for (uint32_t i = 0; i < 5; i++)
            add(1, i, i, 100 + i, 0);
        add(1, 2, 40, 500, 0);                      /* block 2 was written again later */
        add(1, 3, 41, 3, 0);                        /* an old record of block 3 */
        shuffle(seed);
        assert_int_equal(recover(&r), 5);
        assert_int_equal(where(&r, 1, 2).ssd_slot, 40);
        assert_int_equal(where(&r, 1, 3).ssd_slot, 3);
        assert_int_equal(matched(&r, 1, 5), 5);
        struct fk_core_ssd_req q[8];
        assert_int_equal(fk_core_take_ssd(r.core, q, 8), 2);
        for (int i = 0; i < 2; i++) {
            assert_int_equal(q[i].kind, FK_SSD_FORGET);
            assert_true(q[i].ssd_slot == 2 || q[i].ssd_slot == 41);
        }
        rig_close(&r);
    }
}

static void cycles_are_dropped(void **state)
{
    struct rig r;

    open_empty(&r);
    for (uint32_t i = 0; i < 6; i++)
        add(1, i, i, 100 + i, 0);
    list.v[0].parent = key_of(1, 5);                /* a ring of six */
    add(2, 0, 10, 200, 0);
    list.v[6].parent = key_of(2, 0);                /* its own parent */
    add(2, 1, 11, 201, 0);                          /* hangs on that */
    add(3, 0, 20, 300, 0);
    shuffle(9);
    assert_int_equal(recover(&r), 1);
    assert_int_equal(matched(&r, 1, 6), 0);
    assert_int_equal(matched(&r, 2, 2), 0);
    assert_int_equal(matched(&r, 3, 1), 1);
    settle(&r);
    assert_int_equal(r.forgotten, 8);
    rig_close(&r);
}

static void wrong_slots_are_dropped(void **state)
{
    struct rig r;

    open_empty(&r);
    add(1, 0, 0, 1, 0);
    add(1, 1, SLOTS, 2, 0);                         /* beyond the end */
    add(2, 0, 5, 3, 0);
    add(3, 0, 5, 4, 0);                             /* two blocks in one slot */
    add(4, 0, SLOTS + 1, 5, 0);
    assert_int_equal(recover(&r), 2);
    assert_int_equal(matched(&r, 1, 2), 1);
    assert_int_equal(matched(&r, 2, 1) + matched(&r, 3, 1), 1);
    rig_close(&r);
}

/* The slot of a dropped record is free at once, and may be written before the record is emptied:
 * the order of the requests has to make that safe. */
static void a_forgotten_slot_is_emptied_before_it_is_written(void **state)
{
    struct rig r;

    open_empty(&r);
    for (uint32_t i = 0; i < SLOTS; i++)
        add(1, i + 1, i, i + 1, 0);                 /* all orphans */
    assert_int_equal(recover(&r), 0);
    put(&r, 2, 16);
    settle(&r);
    assert_int_equal(r.forgotten, SLOTS);
    for (uint32_t i = 0; i < 16; i++) {
        assert_true(where(&r, 2, i).ssd_ready);
        assert_true(fk_key_equal(r.ssd[where(&r, 2, i).ssd_slot].key, key_of(2, i)));
    }
    rig_close(&r);
}

static void groups_are_found_again_by_their_tags(void **state)
{
    struct rig r;
    struct fk_core_quota quota = { .max = { 32, 6 }, .tag = 77 };
    uint32_t group;

    open_empty(&r);
    assert_int_equal(fk_core_group_add(r.core, r.space, &quota, &group), 0);
    for (uint32_t i = 0; i < 10; i++)
        add(1, i, i, 100 + i, 77);                  /* four more than it may hold now */
    for (uint32_t i = 0; i < 10; i++)
        add(2, i, 10 + i, 200 + i, 12345);          /* a group that is no more: the default one */
    assert_int_equal(recover(&r), 16);
    assert_int_equal(matched(&r, 1, 10), 6);
    assert_int_equal(matched(&r, 2, 10), 10);
    struct fk_core_op_args args = args_of(NULL, NULL);
    uint64_t op;
    assert_int_equal(fk_core_put(r.core, r.instance, group, chain_keys(3), 3, 0, &args, r.now, &op), 0);
    settle(&r);
    assert_true(where(&r, 3, 2).ssd_ready);
    assert_int_equal(r.ssd[where(&r, 3, 0).ssd_slot].tag, 77);
    assert_int_equal(matched(&r, 1, 10), 3);        /* its own blocks paid */
    rig_close(&r);
}

/* Age goes by the order of writing: after a restart the oldest is evicted first. */
static void the_order_of_writing_is_the_age(void **state)
{
    struct rig r;

    open_empty(&r);
    for (uint32_t i = 0; i < SLOTS; i++)            /* seq far apart, and in no order of slots */
        add(1000 + i, 0, i, 1 + (uint64_t)(i * 37 % SLOTS) * 1000000007ull, 0);
    shuffle(3);
    assert_int_equal(recover(&r), SLOTS);
    put(&r, 5, 8);
    settle(&r);
    for (uint32_t i = 0; i < SLOTS; i++)
        assert_int_equal(matched(&r, 1000 + i, 1), i * 37 % SLOTS >= 8);
    rig_close(&r);
}

static void random_tables_are_survived(void **state)
{
    uint64_t rng = 1;

    for (int round = 0; round < 300; round++) {
        struct rig r;
        open_empty(&r);
        uint32_t n = fk_rng_below(&rng, 100);
        for (uint32_t i = 0; i < n; i++) {
            add(fk_rng_below(&rng, 5), fk_rng_below(&rng, 6), fk_rng_below(&rng, SLOTS + 4),
                fk_rng_below(&rng, 50), fk_rng_below(&rng, 2));
            if (fk_rng_below(&rng, 4) == 0)
                list.v[i].parent = key_of(fk_rng_below(&rng, 5), fk_rng_below(&rng, 6));
        }
        int64_t got = recover(&r);
        assert_int_equal(stats_of(&r).blocks, got);
        assert_int_equal(stats_of(&r).ssd.free_slots, SLOTS - got);
        settle(&r);
        for (uint32_t c = 0; c < 5; c++) {
            put(&r, c, 6);
            settle(&r);
        }
        rig_close(&r);
    }
}

static void a_long_chain_is_no_matter(void **state)
{
    struct rig r;

    rig_open(&r, &(struct rig_params){ .cpu = 32, .ssd = 20000 });
    list.n = 0;
    for (uint32_t i = 0; i < 20000; i++)
        add(1, i, 19999 - i, i + 1, 0);
    assert_int_equal(recover(&r), 20000);
    assert_int_equal(matched(&r, 1, MAX_BLOCKS), MAX_BLOCKS);
    fk_core_destroy(r.core);
}

/* The chain is longer than the cpu tier: what has been copied makes room for what follows. */
static void a_get_larger_than_the_cpu_tier(void **state)
{
    struct rig r;

    rig_open(&r, &(struct rig_params){ .cpu = 16, .ssd = SLOTS });
    list.n = 0;
    for (uint32_t i = 0; i < 60; i++)
        add(1, i, i, i + 1, 0);
    assert_int_equal(recover(&r), 60);
    uint64_t op = get_chain(&r, 1, 60);
    settle(&r);
    expect_end(&r, op, 0, 60);
    op = prefetch(&r, 1, 60);                       /* this can't all be in cpu: it ends anyhow */
    settle(&r);
    assert_true(completed(&r, op));
    assert_in_range(r.last.blocks_ok, 8, 16);
    uint64_t a = get_chain(&r, 1, 60), b = get_chain(&r, 1, 60);    /* both need all of the room */
    settle(&r);
    assert_true(completed(&r, a) && completed(&r, b));
    rig_close(&r);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(nothing_is_recovered_from_nothing),
        cmocka_unit_test(chains_in_any_order),
        cmocka_unit_test(orphans_are_dropped_and_emptied),
        cmocka_unit_test(of_two_records_the_newer_stays),
        cmocka_unit_test(cycles_are_dropped),
        cmocka_unit_test(wrong_slots_are_dropped),
        cmocka_unit_test(a_forgotten_slot_is_emptied_before_it_is_written),
        cmocka_unit_test(groups_are_found_again_by_their_tags),
        cmocka_unit_test(the_order_of_writing_is_the_age),
        cmocka_unit_test(random_tables_are_survived),
        cmocka_unit_test(a_long_chain_is_no_matter),
        cmocka_unit_test(a_get_larger_than_the_cpu_tier),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
