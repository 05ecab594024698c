/*
 * test_pool.c - src/tier/pool.c: kinds of memory, population in the background, and sizes that no
 * machine has: an error with a message that names the setting.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include <cmocka.h>

#include <errno.h>
#include <stdatomic.h>
#include <sys/mman.h>

#include "base/clock.h"
#include "base/util.h"
#include "tier/pool.h"

static _Atomic unsigned told;

static void count_call(void *arg)
{
    assert_ptr_equal(arg, &told);
    atomic_fetch_add(&told, 1);
}

static struct fk_pool *open_pool(enum fk_pool_pages pages, uint64_t bytes, bool shared)
{
    struct fk_pool_params params = { .bytes = bytes, .pages = pages, .shared = shared,
                                     .numa_nodes = "auto", .populated = count_call, .arg = &told };
    struct fk_pool *pool;
    char error[300] = "";

    atomic_store(&told, 0);
    if (fk_pool_create(&params, &pool, error, sizeof(error)))
        fail_msg("%s", error);
    return pool;
}

static void wait_populated(const struct fk_pool *pool, uint64_t bytes)
{
    uint64_t deadline = fk_clock_us() + 20000000;

    while (fk_pool_populated(pool) < bytes && fk_clock_us() < deadline)
        usleep(1000);
    assert_true(fk_pool_populated(pool) >= bytes);
}

static void each_kind_gives_zeroed_writable_memory(void **state)
{
    static const enum fk_pool_pages kinds[] = { FK_POOL_AUTO, FK_POOL_THP, FK_POOL_PLAIN };
    enum { BYTES = 5 * 1024 * 1024 };

    for (size_t k = 0; k < fk_array_size(kinds); k++) {
        struct fk_pool *pool = open_pool(kinds[k], BYTES, false);
        unsigned char *base = fk_pool_base(pool);
        for (size_t i = 0; i < BYTES; i += 997)
            assert_int_equal(base[i], 0);
        base[BYTES - 1] = 7;                    /* used before all of it is there */
        wait_populated(pool, BYTES);
        assert_int_equal(base[BYTES - 1], 7);
        assert_true(atomic_load(&told) >= 1);
        if (kinds[k] == FK_POOL_PLAIN)
            assert_string_equal(fk_pool_kind(pool), "plain");
        fk_pool_destroy(pool);
    }
}

static void shared_memory_can_be_mapped_again(void **state)
{
    struct fk_pool *pool = open_pool(FK_POOL_THP, 3 << 20, true);
    int fd = fk_pool_fd(pool);

    assert_true(fd >= 0);
    ((char *)fk_pool_base(pool))[12345] = 'x';
    char *again = mmap(NULL, 3 << 20, PROT_READ, MAP_SHARED, fd, 0);
    assert_ptr_not_equal(again, MAP_FAILED);
    assert_int_equal(again[12345], 'x');
    munmap(again, 3 << 20);
    fk_pool_destroy(pool);
}

static void closing_does_not_wait_for_population(void **state)
{
    for (int i = 0; i < 20; i++) {
        struct fk_pool *pool = open_pool(FK_POOL_PLAIN, 256 << 20, false);
        fk_pool_destroy(pool);
    }
    fk_pool_destroy(NULL);
}

static void population_does_not_touch_what_was_written(void **state)
{
    enum { BYTES = 64 << 20 };
    struct fk_pool *pool = open_pool(FK_POOL_PLAIN, BYTES, false);
    volatile unsigned char *base = fk_pool_base(pool);

    for (size_t i = 0; i < BYTES; i += 4096)
        base[i] = (unsigned char)(i >> 12);
    wait_populated(pool, BYTES);
    for (size_t i = 0; i < BYTES; i += 4096)
        assert_int_equal(base[i], (unsigned char)(i >> 12));
    fk_pool_destroy(pool);
}

static void expect_refused(enum fk_pool_pages pages, uint64_t bytes)
{
    struct fk_pool_params params = { .bytes = bytes, .pages = pages };
    struct fk_pool *pool = NULL;
    char error[300] = "";

    assert_int_equal(fk_pool_create(&params, &pool, error, sizeof(error)), -ENOMEM);
    assert_null(pool);
    assert_non_null(strstr(error, "cpu_cache_gb"));
}

static void impossible_sizes_are_refused_with_a_reason(void **state)
{
    static const enum fk_pool_pages kinds[] = { FK_POOL_AUTO, FK_POOL_HUGETLB, FK_POOL_THP,
                                                FK_POOL_PLAIN };

    for (size_t k = 0; k < fk_array_size(kinds); k++) {
        expect_refused(kinds[k], 1ull << 60);
        expect_refused(kinds[k], UINT64_MAX);
        /* Ten times what the machine has: it would be granted, and kill us when touched. */
        expect_refused(kinds[k], 10ull * (uint64_t)sysconf(_SC_PHYS_PAGES) *
                                 (uint64_t)sysconf(_SC_PAGESIZE));
    }
}

static void nodes_that_are_none_are_named(void **state)
{
    static const char *const lists[] = { "x", "0,", "3-1", "999999", "-1" };

    for (size_t i = 0; i < fk_array_size(lists); i++) {
        struct fk_pool_params params = { .bytes = 1 << 20, .numa_nodes = lists[i] };
        struct fk_pool *pool = NULL;
        char error[300] = "";
        assert_true(fk_pool_create(&params, &pool, error, sizeof(error)) < 0);
        assert_null(pool);
        assert_non_null(strstr(error, "numa_nodes"));
    }
}

static void huge_pages_by_name_or_not_at_all(void **state)
{
    struct fk_pool_params params = { .bytes = 4 << 20, .pages = FK_POOL_HUGETLB };
    struct fk_pool *pool = NULL;
    char error[300] = "";
    int rc = fk_pool_create(&params, &pool, error, sizeof(error));

    if (rc) {
        assert_int_equal(rc, -ENOMEM);
        assert_non_null(strstr(error, "nr_hugepages"));
    } else {
        assert_string_equal(fk_pool_kind(pool), "hugetlb");
        memset(fk_pool_base(pool), 1, 4 << 20);
        fk_pool_destroy(pool);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(each_kind_gives_zeroed_writable_memory),
        cmocka_unit_test(shared_memory_can_be_mapped_again),
        cmocka_unit_test(closing_does_not_wait_for_population),
        cmocka_unit_test(population_does_not_touch_what_was_written),
        cmocka_unit_test(impossible_sizes_are_refused_with_a_reason),
        cmocka_unit_test(nodes_that_are_none_are_named),
        cmocka_unit_test(huge_pages_by_name_or_not_at_all),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
