/*
 * test_sharing.c - nodes of one cluster in one process, with a real Redis of their own: a block put into one is got from
 * another with every byte checked; from cpu and from SSD; prefixes joined; namespaces that stay at home; restarts,
 * lost nodes, a Redis that goes away; settings that can't be. FLEXKV_TEST_TRANSPORT: over another transport than tcp.
 */
#include "api_rig.h"
#include "events_rig.h"
#include "redis_rig.h"

static const char *transport(void)
{
    return getenv("FLEXKV_TEST_TRANSPORT") ? getenv("FLEXKV_TEST_TRANSPORT") : "tcp";
}

#define CLUSTER "redis_host", redis_path, "node_ttl_seconds", "3", "peer_timeout_ms", "1000", \
    "p2p_transport", transport(), "nixl_library", getenv("FLEXKV_TEST_NIXL") ? getenv("FLEXKV_TEST_NIXL") : ""
#define SHARES_CPU CLUSTER, "enable_p2p_cpu", "1"

static bool reaches(struct api *a, uint32_t chain, uint32_t n)
{
    uint64_t deadline = fk_clock_us() + 15000000;

    while (matched(a, chain, n) < n) {
        if (fk_clock_us() > deadline)
            return false;
        usleep(2000);
    }
    return true;
}

static uint32_t never_reaches(struct api *a, uint32_t chain, uint32_t n)
{
    uint32_t most = 0;

    for (int i = 0; i < 100; i++) {
        most = fk_max(most, matched(a, chain, n));
        usleep(2000);
    }
    return most;
}

static void what_one_puts_the_other_gets(void **state)
{
    struct api a = { 0 }, b = { 0 }, third = { 0 };

    open_node(&a, MORE(SHARES_CPU));
    open_node(&b, MORE(CLUSTER, "enable_p2p_ssd", "1"));       /* reads, and shares nothing of its cpu tier */
    open_node(&third, MORE(SHARES_CPU));
    for (uint32_t c = 0; c < 4; c++)
        assert_int_equal(put_chain(&a, c, 12).blocks_ok, 12);
    for (uint32_t c = 0; c < 4; c++) {
        assert_true(reaches(&b, c, 12));
        flexkv_match_result m = match_chain(&b, c, 20);
        assert_int_equal(m.blocks, 12);
        assert_int_equal(m.peer_blocks, 12);
        assert_int_equal(m.cpu_blocks + m.ssd_blocks, 0);
        assert_int_equal(flexkv_release(b.node, m.lease), 0);
        assert_int_equal(get_and_check(&b, c, 20), 12);
        m = match_chain(&b, c, 20);             /* kept */
        assert_int_equal(m.cpu_blocks, 12);
        assert_int_equal(flexkv_release(b.node, m.lease), 0);
    }
    flexkv_stats st = stats_of(b.node);
    assert_int_equal(st.peer.stored_blocks, 48);
    assert_int_equal(st.peer.bytes_read, 48ull * RANKS * SLICE_BYTES);
    assert_int_equal(st.peer.errors, 0);
    for (int i = 0; i < 5000 && stats_of(a.node).peer.bytes_written < st.peer.bytes_read; i++)
        usleep(1000);                   /* the owner counts when it has answered */
    assert_int_equal(stats_of(a.node).peer.bytes_written, 48ull * RANKS * SLICE_BYTES);
    for (uint32_t c = 0; c < 4; c++) {          /* once more, with the checksums that are known by now */
        assert_true(reaches(&third, c, 12));
        assert_int_equal(get_and_check(&third, c, 20), 12);
    }
    assert_int_equal(stats_of(third.node).peer.errors, 0);
    assert_int_equal(stats_of(b.node).peer.bytes_written, 0);
    close_node(&third);
    close_node(&b);
    close_node(&a);
}

/* The first blocks are here, the others elsewhere; and a prefetch brings them. */
static void prefixes_are_joined(void **state)
{
    struct api a = { 0 }, b = { 0 };
    flexkv_key keys[MAX_CHAIN];
    flexkv_op_args args = { .struct_bytes = sizeof(args) };
    uint64_t op;

    open_node(&a, MORE(SHARES_CPU));
    open_node(&b, MORE(SHARES_CPU));
    assert_int_equal(put_chain(&b, 7, 5).blocks_ok, 5);
    assert_int_equal(put_chain(&a, 7, 20).blocks_ok, 20);
    assert_true(reaches(&b, 7, 20));
    flexkv_match_result m = match_chain(&b, 7, 20);
    assert_int_equal(m.cpu_blocks, 5);
    assert_int_equal(m.peer_blocks, 15);
    assert_int_equal(flexkv_release(b.node, m.lease), 0);
    assert_int_equal(get_and_check(&b, 7, 20), 20);

    assert_int_equal(put_chain(&a, 8, 20).blocks_ok, 20);
    assert_true(reaches(&b, 8, 20));
    chain_of(&b, 8, keys, 20);
    assert_int_equal(flexkv_prefetch(b.ns, keys, 20, &args, &op), 0);
    assert_int_equal(wait_for(&b, op).blocks_ok, 20);
    m = match_chain(&b, 8, 20);
    assert_int_equal(m.cpu_blocks, 20);
    assert_int_equal(flexkv_release(b.node, m.lease), 0);
    assert_int_equal(get_and_check(&b, 8, 20), 20);
    close_node(&b);
    close_node(&a);
}

/* More than its cpu tier holds is got from the owner's SSD, through its staging buffers. */
static void from_the_ssd_of_another(void **state)
{
    struct api a, b = { 0 };

    make_dirs(&a);
    open_node(&a, MORE(CLUSTER, "enable_p2p_cpu", "1", "enable_p2p_ssd", "1", "cpu_cache_blocks", "24",
                       "ssd_cache_blocks", "600", "ssd_cache_dir", a.dir[0]));
    open_node(&b, MORE(SHARES_CPU, "cpu_cache_blocks", "400"));
    for (uint32_t c = 0; c < 25; c++) {
        assert_int_equal(put_chain(&a, c, 12).blocks_ok, 12);
        wait_written(a.node);
    }
    for (uint32_t c = 0; c < 25; c++) {
        assert_true(reaches(&b, c, 12));
        assert_int_equal(get_and_check(&b, c, 12), 12);
    }
    assert_true(stats_of(a.node).ssd.bytes_read >= 100ull * RANKS * SLICE_BYTES);

    close_node(&b);
    close_node(&a);                     /* and after a restart, from what was found on SSD */
    open_node(&a, MORE(CLUSTER, "enable_p2p_ssd", "1", "cpu_cache_blocks", "24", "ssd_cache_blocks", "600",
                       "ssd_cache_dir", a.dir[0]));
    open_node(&b, MORE(SHARES_CPU, "cpu_cache_blocks", "400"));
    for (uint32_t c = 0; c < 25; c++) {
        assert_true(reaches(&b, c, 12));
        assert_int_equal(get_and_check(&b, c, 12), 12);
    }
    close_node(&b);
    close_node(&a);
    remove_dirs(&a);
}

static void namespaces_stay_apart_and_at_home(void **state)
{
    struct api a = { 0 }, b = { 0 };
    const char *tenant = "tenant", *secret = "secret";

    open_node(&a, MORE(SHARES_CPU, "namespaces", "secret:shared=no"));
    open_node(&b, MORE(SHARES_CPU));
    assert_int_equal(put_chain(&a, 1, 8).blocks_ok, 8);
    assert_int_equal(flexkv_namespace_open(a.space, &secret, 1, &a.ns), 0);
    assert_int_equal(put_chain(&a, 1, 8).blocks_ok, 8);
    assert_int_equal(flexkv_namespace_open(a.space, &tenant, 1, &a.ns), 0);
    assert_int_equal(put_chain(&a, 1, 6).blocks_ok, 6);

    assert_true(reaches(&b, 1, 8));                     /* the default one's */
    assert_int_equal(flexkv_namespace_open(b.space, &tenant, 1, &b.ns), 0);
    assert_true(reaches(&b, 1, 6));
    assert_int_equal(get_and_check(&b, 1, 10), 6);      /* keys differ, so the bytes would */
    assert_int_equal(flexkv_namespace_open(b.space, &secret, 1, &b.ns), 0);
    assert_int_equal(never_reaches(&b, 1, 8), 0);
    close_node(&b);
    close_node(&a);
}

/* Redis goes: local work and what is known of others goes on; it comes back empty: the cluster heals. */
static void without_redis_for_a_while(void **state)
{
    struct api a = { 0 }, b = { 0 };

    open_node(&a, MORE(SHARES_CPU));
    open_node(&b, MORE(SHARES_CPU));
    assert_int_equal(put_chain(&a, 1, 10).blocks_ok, 10);
    assert_true(reaches(&b, 1, 10));
    stop_redis();
    assert_int_equal(put_chain(&a, 2, 10).blocks_ok, 10);
    assert_int_equal(get_and_check(&a, 2, 10), 10);
    assert_int_equal(get_and_check(&b, 1, 10), 10);
    start_redis();
    assert_true(reaches(&b, 2, 10));
    assert_int_equal(get_and_check(&b, 2, 10), 10);
    close_node(&b);
    close_node(&a);
}

/* The owner goes while its blocks are leased: the get ends, with what is there, and no wrong byte. */
static void the_owner_goes(void **state)
{
    struct api a = { 0 }, b = { 0 };
    uint32_t pages[MAX_CHAIN];
    flexkv_op_args args = args_from(100, pages);
    uint64_t op;

    open_node(&a, MORE(SHARES_CPU));
    open_node(&b, MORE(SHARES_CPU));
    assert_int_equal(put_chain(&b, 1, 3).blocks_ok, 3);
    assert_int_equal(put_chain(&a, 1, 10).blocks_ok, 10);
    assert_true(reaches(&b, 1, 10));
    flexkv_match_result m = match_chain(&b, 1, 10);
    assert_int_equal(m.blocks, 10);
    close_node(&a);
    assert_int_equal(flexkv_get(b.node, m.lease, 0, m.blocks, &args, &op), 0);
    flexkv_completion c = wait_for(&b, op);
    assert_int_equal(c.blocks_ok, 3);
    assert_true(c.status < 0);
    assert_int_equal(get_and_check(&b, 1, 10), 3);      /* the index knows by now */
    open_node(&a, MORE(SHARES_CPU));                    /* it is back, and has nothing */
    assert_int_equal(never_reaches(&b, 1, 10), 3);
    close_node(&b);
    close_node(&a);
}

/* What came from others has no name at first; a put that copies nothing of it brings the names. */
static void routers_hear_of_what_was_fetched(void **state)
{
    struct api a = { 0 }, b = { 0 };
    struct router *ra = calloc(1, sizeof(*ra)), *rb = calloc(1, sizeof(*rb));
    flexkv_events *ea, *eb;

    open_node(&a, MORE(SHARES_CPU, "enable_kv_events", "1"));
    open_node(&b, MORE(SHARES_CPU, "enable_kv_events", "1"));
    assert_int_equal(flexkv_events_open(a.node, a.space, &ea), 0);
    assert_int_equal(flexkv_events_open(b.node, b.space, &eb), 0);
    assert_int_equal(put_named(&a, 3, 10).blocks_ok, 10);
    router_take(ra, ea, 64);
    assert_int_equal(router_count(ra, 3, FLEXKV_MEDIUM_CPU), 10);
    assert_true(reaches(&b, 3, 10));
    assert_int_equal(get_and_check(&b, 3, 10), 10);
    router_take(rb, eb, 64);
    assert_int_equal(rb->n, 0);
    assert_int_equal(put_named(&b, 3, 12).blocks_ok, 12);
    router_take(rb, eb, 64);
    assert_int_equal(router_count(rb, 3, FLEXKV_MEDIUM_CPU), 12);
    for (uint32_t c = 20; c < 30; c++)          /* evicted: taken back, once */
        assert_int_equal(put_named(&b, c, 12).blocks_ok, 12);
    router_take(rb, eb, 64);
    assert_int_equal(router_count(rb, 3, FLEXKV_MEDIUM_CPU), 0);
    assert_int_equal(rb->n, stats_of(b.node).cpu.slots - stats_of(b.node).cpu.free_slots);
    flexkv_events_close(ea);
    flexkv_events_close(eb);
    close_node(&b);
    close_node(&a);
    free(ra);
    free(rb);
}

/* Both evict all the time while they read from each other. */
static void crowded(void **state)
{
    struct api a = { 0 }, b = { 0 };
    uint64_t got = 0, fetched = 0;

    open_node(&a, MORE(SHARES_CPU, "cpu_cache_blocks", "40"));
    open_node(&b, MORE(SHARES_CPU, "cpu_cache_blocks", "30", "peer_copies", "evict_first"));
    for (uint32_t i = 0; i < 300 || (fetched < 20 && i < 5000); i++) {
        struct api *put = i % 3 ? &a : &b, *get = i % 2 ? &a : &b;
        (void)put_chain(put, i % 17, 4 + i % 9);
        if (i % 5 == 0)
            usleep(5000);
        got += get_and_check(get, (i * 7) % 17, 12);
        fetched = stats_of(a.node).peer.stored_blocks + stats_of(b.node).peer.stored_blocks;
    }
    assert_true(got > 300);
    assert_true(fetched >= 20);
    close_node(&b);
    close_node(&a);
}

static void settings_that_cant_be(void **state)
{
    flexkv_node *node;

    assert_int_equal(try_open(MORE(SHARES_CPU, "local_ip", "10.1.2.3"), &node), -EINVAL);
    assert_non_null(strstr(flexkv_last_error(), "cluster_secret"));
    assert_int_equal(try_open(MORE(SHARES_CPU, "cluster_secret", "short"), &node), -EINVAL);
    assert_non_null(strstr(flexkv_last_error(), "cluster_secret"));
    assert_int_equal(try_open(MORE(SHARES_CPU, "node_name", "a b"), &node), -EINVAL);
    assert_non_null(strstr(flexkv_last_error(), "node_name"));
    assert_int_equal(try_open(MORE(SHARES_CPU, "p2p_transport", "pigeons"), &node), -EINVAL);
    assert_non_null(strstr(flexkv_last_error(), "p2p_transport"));
    assert_true(try_open(MORE(SHARES_CPU, "p2p_listen", "192.0.2.1:5"), &node) < 0);
    assert_non_null(strstr(flexkv_last_error(), "192.0.2.1"));
}

static int before_all(void **state)
{
    make_dir(redis_dir, sizeof(redis_dir));
    start_redis();
    return 0;
}

static int after_all(void **state)
{
    stop_redis();
    remove_dir(redis_dir);
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(settings_that_cant_be),
        cmocka_unit_test(what_one_puts_the_other_gets),
        cmocka_unit_test(prefixes_are_joined),
        cmocka_unit_test(namespaces_stay_apart_and_at_home),
        cmocka_unit_test(the_owner_goes),
        cmocka_unit_test(routers_hear_of_what_was_fetched),
        cmocka_unit_test(crowded),
        cmocka_unit_test(from_the_ssd_of_another),
        cmocka_unit_test(without_redis_for_a_while),
    };

    if (system("redis-server --version > /dev/null 2>&1")) {
        puts("redis-server is not installed (tools/install-deps --test)");
        return 77;
    }
    return cmocka_run_group_tests(tests, before_all, after_all);
}
