/*
 * test_slots.c - src/index/slots.c and heap.c: runs, stripes, directories that are out, and a heap
 * whose elements know their places; each against a plain array.
 */
#include "index_rig.h"

/* ---- slots ---- */

static void slots_come_in_runs_and_stay_in_stripes(void **state)
{
    struct fk_slots s;
    uint32_t first;

    assert_int_equal(fk_slots_init(&s, 100, 8, 1), 0);
    assert_int_equal(fk_slots_take(&s, 5, &first), 5);
    assert_int_equal(first, 0);
    assert_int_equal(fk_slots_take(&s, 5, &first), 3);      /* up to the stripe's end */
    assert_int_equal(first, 5);
    assert_int_equal(fk_slots_take(&s, 100, &first), 8);
    assert_int_equal(first, 8);
    assert_int_equal(s.n_free, 84);
    assert_int_equal(fk_slots_take(&s, 0, &first), 0);
    fk_slots_fini(&s);
}

static void slots_run_out_and_come_back(void **state)
{
    static const uint32_t sizes[] = { 1, 63, 64, 65, 4095, 4096, 4097, 10000 };

    for (size_t k = 0; k < fk_array_size(sizes); k++) {
        struct fk_slots s;
        uint32_t n = sizes[k], got = 0, first, run;
        assert_int_equal(fk_slots_init(&s, n, 0, 1), 0);
        while ((run = fk_slots_take(&s, 1000, &first)) != 0) {
            assert_int_equal(first, got);
            got += run;
        }
        assert_int_equal(got, n);
        assert_int_equal(s.n_free, 0);
        fk_slots_free(&s, n - 1);
        assert_true(fk_slots_is_free(&s, n - 1));
        assert_int_equal(fk_slots_take(&s, 10, &first), 1);
        assert_int_equal(first, n - 1);
        fk_slots_free(&s, n / 2);
        assert_int_equal(fk_slots_take(&s, 10, &first), 1);
        assert_int_equal(first, n / 2);
        fk_slots_fini(&s);
    }
}

static void take_at_takes_each_slot_once(void **state)
{
    struct fk_slots s;

    assert_int_equal(fk_slots_init(&s, 70, 8, 2), 0);
    assert_true(fk_slots_take_at(&s, 69));
    assert_false(fk_slots_take_at(&s, 69));
    assert_false(fk_slots_take_at(&s, 70));
    assert_false(fk_slots_take_at(&s, UINT32_MAX));
    assert_int_equal(s.n_free, 69);
    fk_slots_fini(&s);
}

static void directories_that_are_out_give_nothing(void **state)
{
    struct fk_slots s;
    uint32_t first, run, got = 0;

    assert_int_equal(fk_slots_init(&s, 50, 4, 3), 0);
    assert_int_equal(fk_slots_dir(&s, 3), 0);
    assert_int_equal(fk_slots_dir(&s, 4), 1);
    assert_int_equal(fk_slots_dir(&s, 12), 0);
    s.dirs_out = 1u << 1;
    while ((run = fk_slots_take(&s, 64, &first)) != 0) {
        for (uint32_t i = first; i < first + run; i++)
            assert_int_not_equal(fk_slots_dir(&s, i), 1);
        got += run;
    }
    assert_int_equal(got, 50 - 16);
    s.dirs_out = 7;
    fk_slots_free(&s, 0);
    assert_int_equal(fk_slots_take(&s, 1, &first), 0);
    s.dirs_out = 0;
    while ((run = fk_slots_take(&s, 64, &first)) != 0)
        got += run;
    assert_int_equal(got, 51);
    fk_slots_fini(&s);
}

static void slots_agree_with_an_array(void **state)
{
    enum { N = 5000 };
    static bool taken[N];
    struct fk_slots s;
    uint64_t rng = 11;
    uint32_t n_free = N;

    memset(taken, 0, sizeof(taken));
    assert_int_equal(fk_slots_init(&s, N, 16, 3), 0);
    for (int step = 0; step < 200000; step++) {
        uint32_t at = fk_rng_below(&rng, N), first;
        if (step % 5000 == 0)
            s.dirs_out = step % 3 ? fk_rng_below(&rng, 8) : 0;
        if (fk_rng_below(&rng, 3)) {
            if (taken[at])
                fk_slots_free(&s, at), taken[at] = false, n_free++;
            continue;
        }
        uint32_t want = 1 + fk_rng_below(&rng, 20), run = fk_slots_take(&s, want, &first);
        assert_true(run <= want);
        for (uint32_t i = 0; i < run; i++) {
            assert_false(taken[first + i]);
            assert_false(fk_slots_out(&s, first + i));
            assert_int_equal(first / 16, (first + i) / 16);
            taken[first + i] = true;
        }
        n_free -= run;
        assert_int_equal(s.n_free, n_free);
    }
    for (uint32_t i = 0; i < N; i++)
        assert_int_equal(fk_slots_is_free(&s, i), !taken[i]);
    fk_slots_fini(&s);
}

/* ---- heap ---- */

static void heap_gives_the_smallest_after_any_change(void **state)
{
    enum { N = 400 };
    static struct fk_entry entries[N];
    static uint32_t score[N];
    struct fk_heap h = { .entries = entries, .tier = CPU };
    uint64_t rng = 23;

    memset(entries, 0xff, sizeof(entries));
    assert_int_equal(fk_heap_reserve(&h, N), 0);
    for (int step = 0; step < 100000; step++) {
        uint32_t e = fk_rng_below(&rng, N), at = entries[e].pos[CPU];
        uint32_t s = fk_rng_below(&rng, 1000);
        if (at == FK_NONE) {
            if (h.len && fk_rng_below(&rng, 4) == 0) {
                uint32_t place = fk_rng_below(&rng, h.len);
                uint32_t old = h.items[place].entry;
                fk_heap_replace(&h, place, s, e);
                assert_int_equal(entries[old].pos[CPU], FK_NONE);
            } else {
                fk_heap_push(&h, s, e);
            }
            score[e] = s;
        } else if (fk_rng_below(&rng, 2)) {
            fk_heap_update(&h, at, s);
            score[e] = s;
        } else {
            fk_heap_remove(&h, at);
        }
        uint32_t least = UINT32_MAX, n = 0;
        for (uint32_t i = 0; i < N; i++) {
            if (entries[i].pos[CPU] == FK_NONE)
                continue;
            n++;
            least = fk_min(least, score[i]);
            assert_int_equal(h.items[entries[i].pos[CPU]].entry, i);
        }
        assert_int_equal(h.len, n);
        if (n)
            assert_int_equal(h.items[0].score, least);
    }
    fk_heap_fini(&h);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(slots_come_in_runs_and_stay_in_stripes),
        cmocka_unit_test(slots_run_out_and_come_back),
        cmocka_unit_test(take_at_takes_each_slot_once),
        cmocka_unit_test(directories_that_are_out_give_nothing),
        cmocka_unit_test(slots_agree_with_an_array),
        cmocka_unit_test(heap_gives_the_smallest_after_any_change),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
