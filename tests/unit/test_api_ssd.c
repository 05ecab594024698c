/*
 * test_api_ssd.c - the public API with an SSD tier in private directories: warm after a restart with
 * every byte checked, prefetch, spoilt bytes, a used or foreign directory, reset, faults from outside, a disk's speed.
 */
#include "api_rig.h"

/* Options of a node with a small cpu tier and SSD in n_dirs directories of a; more: pairs. */
static const char **options_for(const struct api *a, int n_dirs, const char *const *more)
{
    static const char *list[32];
    static char dirs[200];
    size_t n = 0;

    snprintf(dirs, sizeof(dirs), n_dirs > 1 ? "%s;%s" : "%s", a->dir[0], a->dir[1]);
    const char *const base[] = { "cpu_cache_blocks", "24", "ssd_cache_blocks", "600",
                                 "ssd_cache_dir", dirs };
    for (size_t i = 0; i < fk_array_size(base); i++)
        list[n++] = base[i];
    while (more && *more)
        list[n++] = *more++;
    list[n] = NULL;
    return list;
}

static void store_chains(struct api *a, uint32_t first, uint32_t n, uint32_t len)
{
    for (uint32_t c = first; c < first + n; c++) {
        assert_int_equal(put_chain(a, c, len).blocks_ok, len);
        wait_written(a->node);
    }
}

static void a_restart_is_warm(void **state)
{
    for (int n_dirs = 1; n_dirs <= 2; n_dirs++) {
        for (int direct = 0; direct <= 1; direct++) {
            struct api a;
            const char *const more[] = { "ssd_direct_io", direct ? "1" : "0", NULL };
            make_dirs(&a);
            open_node(&a, options_for(&a, n_dirs, more));
            store_chains(&a, 0, 30, 12);
            close_node(&a);
            open_node(&a, options_for(&a, n_dirs, more));
            assert_int_equal(stats_of(a.node).blocks, 360);
            for (uint32_t c = 0; c < 30; c++) {
                flexkv_match_result m = match_chain(&a, c, 20);
                assert_int_equal(m.blocks, 12);
                assert_int_equal(flexkv_release(a.node, m.lease), 0);
                assert_int_equal(get_and_check(&a, c, 20), 12);
            }
            assert_int_equal(stats_of(a.node).ssd.errors, 0);
            assert_true(stats_of(a.node).ssd.bytes_read >= 300ull * RANKS * SLICE_BYTES);
            close_node(&a);
            remove_dirs(&a);
        }
    }
}

static void without_io_uring_too(void **state)
{
    struct api a;

    make_dirs(&a);
    open_node(&a, options_for(&a, 2, MORE("iouring_entries", "0")));
    store_chains(&a, 0, 10, 12);
    close_node(&a);
    open_node(&a, options_for(&a, 2, MORE("iouring_entries", "0")));
    for (uint32_t c = 0; c < 10; c++)
        assert_int_equal(get_and_check(&a, c, 12), 12);
    close_node(&a);
    remove_dirs(&a);
}

static void each_write_policy_gives_right_bytes(void **state)
{
    static const char *const policies[] = { "through", "on_reuse", "on_evict" };

    for (size_t p = 0; p < fk_array_size(policies); p++) {
        struct api a;
        uint64_t rng = p + 1;
        uint32_t got = 0;
        make_dirs(&a);
        open_node(&a, options_for(&a, 1, MORE("ssd_write_policy", policies[p])));
        for (int i = 0; i < 300; i++) {
            uint32_t c = fk_rng_below(&rng, 20);
            if (fk_rng_below(&rng, 2))
                put_chain(&a, c, 1 + fk_rng_below(&rng, 16));
            else
                got += get_and_check(&a, c, 16);
            wait_written(a.node);                   /* or the tiny cpu tier is full of writes */
        }
        print_message("%s: %u blocks got, %llu written\n", policies[p], got,
                      (unsigned long long)stats_of(a.node).ssd.stored_blocks);
        assert_true(got > (p == 0 ? 600 : 50));
        assert_true(stats_of(a.node).ssd.stored_blocks > 0);
        assert_int_equal(stats_of(a.node).ssd.errors, 0);
        close_node(&a);
        remove_dirs(&a);
    }
}

static void prefetch_brings_what_is_on_ssd(void **state)
{
    struct api a;
    flexkv_key keys[12];
    flexkv_op_args args = { .struct_bytes = sizeof(args), .user_data = &a };
    uint64_t op;

    make_dirs(&a);
    open_node(&a, options_for(&a, 2, NULL));
    store_chains(&a, 0, 10, 12);
    assert_int_equal(match_chain(&a, 0, 12).ssd_blocks, 12);
    assert_int_equal(flexkv_reset(a.node), 0);
    assert_int_equal(matched(&a, 0, 12), 0);
    store_chains(&a, 0, 10, 12);
    chain_of(&a, 0, keys, 12);
    assert_int_equal(flexkv_prefetch(a.ns, keys, 12, &args, &op), 0);
    flexkv_completion c = wait_for(&a, op);
    assert_int_equal(c.status, 0);
    assert_int_equal(c.blocks_ok, 12);
    assert_int_equal(c.kind, FLEXKV_OP_PREFETCH);
    assert_ptr_equal(c.user_data, &a);
    flexkv_match_result m = match_chain(&a, 0, 12);
    assert_int_equal(m.cpu_blocks, 12);
    assert_int_equal(flexkv_release(a.node, m.lease), 0);
    assert_int_equal(get_and_check(&a, 0, 12), 12);
    close_node(&a);
    remove_dirs(&a);
}

static void nothing_is_left_after_a_reset_and_a_restart(void **state)
{
    struct api a;

    make_dirs(&a);
    open_node(&a, options_for(&a, 2, NULL));
    store_chains(&a, 0, 10, 12);
    assert_int_equal(flexkv_reset(a.node), 0);
    store_chains(&a, 50, 1, 8);                     /* written after the reset was carried out */
    close_node(&a);
    open_node(&a, options_for(&a, 2, NULL));
    for (uint32_t c = 0; c < 10; c++)
        assert_int_equal(matched(&a, c, 12), 0);
    assert_int_equal(get_and_check(&a, 50, 8), 8);
    close_node(&a);
    remove_dirs(&a);
}

/* Rule 3: bytes that are not those of the key are never delivered. */
static void spoilt_bytes_are_a_miss(void **state)
{
    struct api a;
    char path[200];
    uint32_t failed = 0, got = 0;

    make_dirs(&a);
    open_node(&a, options_for(&a, 1, NULL));
    store_chains(&a, 0, 20, 12);
    close_node(&a);
    snprintf(path, sizeof(path), "%s/default.data", a.dir[0]);
    int fd = open(path, O_RDWR);
    assert_true(fd >= 0);
    uint64_t slot = fk_round_up(RANKS * SLICE_BYTES, 4096);
    for (uint64_t i = 0; i < 240; i += 5) {         /* one byte in every fifth slot */
        unsigned char b;
        off_t at = (off_t)((1 << 20) + i * slot + i * 13 % 8000);
        assert_int_equal(pread(fd, &b, 1, at), 1);
        b ^= 0x10;
        assert_int_equal(pwrite(fd, &b, 1, at), 1);
    }
    close(fd);
    open_node(&a, options_for(&a, 1, NULL));
    for (uint32_t c = 0; c < 20; c++) {
        uint32_t ok = get_and_check(&a, c, 12);
        failed += ok < 12;
        got += ok;
        assert_int_equal(matched(&a, c, 12), ok);   /* it is not offered again */
        for (int i = 0; ok < 12 && i < 4; i++) {    /* but can be stored anew; each round may */
            wait_written(a.node);
            assert_int_equal(put_chain(&a, c, 12).blocks_ok, 12);   /* find one more that is bad */
            ok = get_and_check(&a, c, 12);
        }
        assert_int_equal(ok, 12);
    }
    assert_int_equal(failed, 20);                   /* each chain has a spoilt block */
    assert_true(got > 0);
    assert_true(stats_of(a.node).ssd.errors >= 20);
    close_node(&a);
    remove_dirs(&a);
}

static void a_directory_has_one_node(void **state)
{
    struct api a;
    flexkv_node *other;
    flexkv_space *s;
    flexkv_space_desc d = desc_of(NULL);

    make_dirs(&a);
    open_node(&a, options_for(&a, 1, NULL));
    int rc = try_open(options_for(&a, 1, NULL), &other);
    if (!rc) {
        assert_int_equal(flexkv_space_open(other, &d, &s), -EBUSY);
        flexkv_node_close(other);
    } else {
        assert_int_equal(rc, -EBUSY);
    }
    assert_non_null(strstr(flexkv_last_error(), a.dir[0]));
    store_chains(&a, 1, 1, 8);                      /* the first one is none the worse */
    assert_int_equal(get_and_check(&a, 1, 8), 8);
    close_node(&a);
    remove_dirs(&a);
}

static void another_geometry_is_refused_or_made_anew(void **state)
{
    struct api a;
    flexkv_space *s;
    flexkv_space_desc d = desc_of(NULL);

    make_dirs(&a);
    open_node(&a, options_for(&a, 1, NULL));
    store_chains(&a, 1, 1, 8);
    close_node(&a);
    d.slice_bytes += 4096;
    assert_int_equal(try_open(options_for(&a, 1, NULL), &a.node), 0);
    assert_int_equal(flexkv_space_open(a.node, &d, &s), -EEXIST);
    assert_non_null(strstr(flexkv_last_error(), "ssd_recreate"));
    flexkv_node_close(a.node);
    open_node(&a, options_for(&a, 1, NULL));        /* refused means untouched */
    assert_int_equal(get_and_check(&a, 1, 8), 8);
    close_node(&a);
    assert_int_equal(try_open(options_for(&a, 1, MORE("ssd_recreate", "1")), &a.node), 0);
    assert_int_equal(flexkv_space_open(a.node, &d, &s), 0);
    assert_int_equal(stats_of(a.node).blocks, 0);
    flexkv_node_close(a.node);
    remove_dirs(&a);
}

/* A space that could not be opened for its quotas leaves nothing that a later call trips over. */
static void a_failed_opening_leaves_the_node_usable(void **state)
{
    struct api a;
    flexkv_space *s;
    flexkv_space_desc d = desc_of(NULL);
    flexkv_completion c;

    make_dirs(&a);
    assert_int_equal(try_open(options_for(&a, 1, MORE("namespaces", "a:guaranteed=4M;b:guaranteed=4M")),
                              &a.node), 0);
    int rc = flexkv_space_open(a.node, &d, &s);
    assert_int_equal(rc, -EINVAL);
    assert_non_null(strstr(flexkv_last_error(), "namespaces"));
    assert_int_equal(flexkv_reset(a.node), 0);
    assert_int_equal(flexkv_poll(a.node, &c, 1, 50), 0);
    flexkv_node_close(a.node);
    remove_dirs(&a);
}

static void a_directory_that_cannot_be_made_is_named(void **state)
{
    struct api a;
    flexkv_space *s;
    flexkv_space_desc d = desc_of(NULL);

    make_dirs(&a);
    remove_dir(a.dir[0]);
    snprintf(a.dir[0], sizeof(a.dir[0]), "/proc/flexkv-no-such");
    assert_int_equal(try_open(options_for(&a, 1, NULL), &a.node), 0);
    assert_true(flexkv_space_open(a.node, &d, &s) < 0);
    assert_non_null(strstr(flexkv_last_error(), "/proc/flexkv-no-such"));
    flexkv_node_close(a.node);
    remove_dir(a.dir[1]);
}

/* Rule 6: the disk fails in every way at once; what is delivered is right all the same. */
static void injected_faults_never_give_wrong_bytes(void **state)
{
    struct api a;
    uint64_t rng = 5;
    uint32_t got = 0;

    make_dirs(&a);
    setenv("FK_TEST_FAULT", "read_error=0.02,read_flip=0.05,read_short=0.1,write_torn=0.02,"
           "write_lost=0.02,write_misdirect=0.01,read_misdirect=0.02,write_error=0.01,seed=3", 1);
    for (int round = 0; round < 3; round++) {
        open_node(&a, options_for(&a, 2, MORE("ssd_device_retry_ms", "5", "ssd_device_errors", "4")));
        for (int i = 0; i < 300; i++) {
            uint32_t c = fk_rng_below(&rng, 30);
            if (fk_rng_below(&rng, 2))
                put_chain(&a, c, 1 + fk_rng_below(&rng, 16));
            else
                got += get_and_check(&a, c, 16);
        }
        close_node(&a);
    }
    unsetenv("FK_TEST_FAULT");
    assert_true(got > 100);
    remove_dirs(&a);
}

static void closing_with_reads_and_writes_in_flight(void **state)
{
    struct api a;

    make_dirs(&a);
    for (uint32_t round = 0; round < 15; round++) {
        uint32_t pages[MAX_CHAIN];
        flexkv_op_args args = args_from(0, pages);
        flexkv_key keys[MAX_CHAIN];
        open_node(&a, options_for(&a, 2, NULL));
        for (uint32_t c = 0; c < 8; c++) {
            flexkv_match_result m = match_chain(&a, round + c, 12);
            if (m.blocks)
                assert_int_equal(flexkv_get(a.node, m.lease, 0, m.blocks, &args, NULL), 0);
            chain_of(&a, round + c + 5, keys, 12);
            for (uint32_t i = 0; i < 12; i++)
                fill_page(&a, 100 + i, keys[i]);
            flexkv_op_args put_args = args_from(100, pages);
            if (c == 7)         /* pages are not changed while a put reads them */
                assert_int_equal(flexkv_put(a.ns, keys, 12, 0, &put_args, NULL), 0);
            args = args_from(0, pages);
        }
        usleep(round * 200);
        uint64_t start = fk_clock_us();
        close_node(&a);
        assert_true(fk_clock_us() - start < 20000000);
    }
    open_node(&a, options_for(&a, 2, NULL));
    uint32_t got = 0;
    for (uint32_t c = 0; c < 40; c++)
        got += get_and_check(&a, c, 12);
    assert_true(got >= 12);
    close_node(&a);
    remove_dirs(&a);
}

/* ---- not slower than computing ---- */

/* What a block takes from the SSD, as far as the node knows. */
static double ssd_us(const struct api *a)
{
    char *json;

    assert_int_equal(flexkv_node_status(a->node, &json), 0);
    const char *at = strstr(json, "\"ssd_us_per_block\":");
    assert_non_null(at);
    double us = strtod(at + 19, NULL);
    free(json);
    return us;
}

static void wait_until_measured(const struct api *a)
{
    for (int i = 0; ssd_us(a) == 0; i++) {
        assert_true(i < 3000);
        usleep(10000);
    }
}

static uint32_t matched_on_ssd(struct api *a, uint32_t chain)
{
    flexkv_match_result m = match_chain(a, chain, 12);

    if (m.lease)
        assert_int_equal(flexkv_release(a->node, m.lease), 0);
    return m.ssd_blocks;
}

/* Known before the first of its blocks is loaded, and after a restart from the first moment on. */
static void a_disk_is_measured_before_it_is_used(void **state)
{
    struct api a;

    make_dirs(&a);
    open_node(&a, options_for(&a, 2, NULL));
    assert_int_equal(flexkv_space_set_compute_rate(a.space, 10), 0);     /* a block in 0.4 s */
    store_chains(&a, 0, 3, 12);
    wait_until_measured(&a);
    assert_int_equal(stats_of(a.node).gets, 0);
    store_chains(&a, 10, 3, 12);
    assert_int_equal(matched_on_ssd(&a, 0), 12);
    assert_int_equal(get_and_check(&a, 0, 12), 12);
    close_node(&a);
    open_node(&a, options_for(&a, 2, NULL));
    assert_true(ssd_us(&a) > 0);
    assert_int_equal(matched_on_ssd(&a, 0), 12);
    assert_int_equal(flexkv_space_set_compute_rate(a.space, 1e9), 0);
    assert_int_equal(matched_on_ssd(&a, 0), 0);
    close_node(&a);
    remove_dirs(&a);
}

/* Each read takes a fifth of a second, and computing what it brings nothing: not even once. */
static void a_slow_disk_is_never_waited_for(void **state)
{
    struct api a;

    setenv("FK_TEST_FAULT", "delay=1,delay_us=200000", 1);
    make_dirs(&a);
    open_node(&a, options_for(&a, 1, NULL));
    assert_int_equal(flexkv_space_set_compute_rate(a.space, 1e6), 0);
    store_chains(&a, 0, 4, 12);
    assert_int_equal(matched_on_ssd(&a, 0), 0);     /* measured or not */
    wait_until_measured(&a);
    assert_int_equal(matched_on_ssd(&a, 1), 0);
    assert_true(stats_of(a.node).declined_blocks > 0);
    close_node(&a);
    open_node(&a, options_for(&a, 1, NULL));
    assert_true(ssd_us(&a) > 1000);
    assert_int_equal(matched_on_ssd(&a, 0), 0);     /* what computing takes is known from before, too */
    close_node(&a);
    remove_dirs(&a);
    unsetenv("FK_TEST_FAULT");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_restart_is_warm),
        cmocka_unit_test(without_io_uring_too),
        cmocka_unit_test(each_write_policy_gives_right_bytes),
        cmocka_unit_test(prefetch_brings_what_is_on_ssd),
        cmocka_unit_test(nothing_is_left_after_a_reset_and_a_restart),
        cmocka_unit_test(spoilt_bytes_are_a_miss),
        cmocka_unit_test(a_directory_has_one_node),
        cmocka_unit_test(another_geometry_is_refused_or_made_anew),
        cmocka_unit_test(a_failed_opening_leaves_the_node_usable),
        cmocka_unit_test(a_directory_that_cannot_be_made_is_named),
        cmocka_unit_test(injected_faults_never_give_wrong_bytes),
        cmocka_unit_test(closing_with_reads_and_writes_in_flight),
        cmocka_unit_test(a_disk_is_measured_before_it_is_used),
        cmocka_unit_test(a_slow_disk_is_never_waited_for),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
