/*
 * test_api_events.c - KV events of a real node through flexkv.h: what is announced when, under which
 * names; slow subscribers; several subscribers; namespaces; off costs nothing.
 */
#include "api_rig.h"
#include "events_rig.h"

#define OPTIONS(...) ((const char *const[]){ __VA_ARGS__, NULL })
#define EVENTS "enable_kv_events", "1"

static flexkv_events *subscribe(struct api *a)
{
    flexkv_events *ev;

    if (flexkv_events_open(a->node, NULL, &ev))
        fail_msg("%s", flexkv_last_error());
    return ev;
}

static void stored_is_announced_when_it_is_there(void **state)
{
    static struct router r;
    struct api a;

    r = (struct router){ 0 };
    open_node(&a, OPTIONS(EVENTS));
    flexkv_events *ev = subscribe(&a);
    assert_int_equal(router_take(&r, ev, 64), 0);
    assert_false(events_wait(ev, 0));
    assert_int_equal(put_named(&a, 1, 8).blocks_ok, 8);
    assert_true(events_wait(ev, 5000));
    assert_int_equal(router_take(&r, ev, 3), 8);
    assert_int_equal(router_count(&r, 1, FLEXKV_MEDIUM_CPU), 8);
    assert_false(events_wait(ev, 0));
    put_named(&a, 1, 8);                        /* known: nothing new */
    assert_int_equal(router_take(&r, ev, 64), 0);
    assert_int_equal(put_named_in(&a, a.ns, 1, 8, 12).blocks_ok, 4);    /* the chain goes on */
    assert_int_equal(router_take(&r, ev, 64), 4);
    assert_int_equal(router_count(&r, 1, FLEXKV_MEDIUM_CPU), 12);
    assert_int_equal(stats_of(a.node).events_taken, 12);
    flexkv_events_close(ev);
    close_node(&a);
}

static void evicted_is_removed_and_reset_removes_all(void **state)
{
    static struct router r;
    struct api a;

    r = (struct router){ 0 };
    open_node(&a, OPTIONS(EVENTS));
    flexkv_events *ev = subscribe(&a);
    for (uint32_t c = 1; c <= 30; c++) {        /* 64 slots */
        assert_int_equal(put_named(&a, c, 8).blocks_ok, 8);
        if (c % 3 == 0)
            router_take(&r, ev, 7);
    }
    router_take(&r, ev, 64);
    assert_int_equal(r.n, 64);
    for (uint32_t c = 1; c <= 30; c++)
        assert_int_equal(router_count(&r, c, FLEXKV_MEDIUM_CPU), matched(&a, c, 8));
    assert_int_equal(stats_of(a.node).event_resyncs, 0);
    assert_int_equal(flexkv_reset(a.node), 0);
    assert_int_equal(router_take(&r, ev, 64), 64);
    assert_int_equal(r.n, 0);
    flexkv_events_close(ev);
    close_node(&a);
}

static void what_has_no_name_makes_no_events(void **state)
{
    static struct router r;
    struct api a;

    r = (struct router){ 0 };
    open_node(&a, OPTIONS(EVENTS));
    flexkv_events *ev = subscribe(&a);
    router_take(&r, ev, 64);
    put_named(&a, 1, 8);
    for (uint32_t c = 2; c <= 10; c++)          /* pushes named ones out and takes their slots */
        put_chain(&a, c, 8);
    router_take(&r, ev, 64);
    assert_int_equal(r.stored, 8);
    assert_int_equal(r.removed, 8);
    for (uint32_t c = 11; c <= 18; c++)
        put_named(&a, c, 8);
    router_take(&r, ev, 64);
    assert_int_equal(r.n, 64);
    flexkv_events_close(ev);
    close_node(&a);
}

static void who_comes_late_hears_what_is_there(void **state)
{
    static struct router one, two;
    struct api a;

    one = two = (struct router){ 0 };
    open_node(&a, OPTIONS(EVENTS));
    flexkv_events *first = subscribe(&a);
    put_named(&a, 1, 8);
    router_take(&one, first, 64);
    flexkv_events *second = subscribe(&a);
    put_named(&a, 2, 8);
    assert_int_equal(router_take(&two, second, 5), 16);
    assert_int_equal(router_take(&one, first, 64), 8);
    assert_int_equal(flexkv_events_again(second), 0);
    assert_true(events_wait(second, 0));
    two = (struct router){ 0 };                 /* it has forgotten */
    assert_int_equal(router_take(&two, second, 64), 16);
    assert_int_equal(two.removed, 0);
    assert_int_equal(stats_of(a.node).event_resyncs, 0);
    flexkv_events_close(first);
    flexkv_events_close(second);
    close_node(&a);
}

/* A buffer of 4 KiB holds some 70 events. */
static void a_slow_subscriber_gets_the_difference(void **state)
{
    static struct router r;
    struct api a;

    r = (struct router){ 0 };
    open_node(&a, OPTIONS(EVENTS, "kv_events_buffer_mb", "4K"));
    flexkv_events *ev = subscribe(&a);
    put_named(&a, 1, 8);
    put_named(&a, 2, 8);
    assert_int_equal(router_take(&r, ev, 64), 16);
    for (uint32_t c = 3; c <= 40; c++)
        put_named(&a, c, 8);
    put_named(&a, 2, 8);                        /* gone, and there again */
    router_take(&r, ev, 5);
    assert_int_equal(r.n, 64);
    assert_int_equal(stats_of(a.node).event_resyncs, 1);
    for (uint32_t c = 1; c <= 40; c++)
        assert_int_equal(router_count(&r, c, FLEXKV_MEDIUM_CPU), matched(&a, c, 8));
    put_named(&a, 50, 8);
    router_take(&r, ev, 64);
    assert_int_equal(router_count(&r, 50, FLEXKV_MEDIUM_CPU), 8);
    assert_int_equal(stats_of(a.node).event_resyncs, 1);
    flexkv_events_close(ev);
    close_node(&a);
}

/* Changes while a subscriber is half way through what is there. */
static void changes_during_a_walk_come_out_right(void **state)
{
    static struct router r;
    struct api a;
    flexkv_event e[2];
    uint64_t rng = 4711;

    r = (struct router){ 0 };
    open_node(&a, OPTIONS(EVENTS, "kv_events_buffer_mb", "4K"));
    flexkv_events *ev = subscribe(&a);
    for (int round = 0; round < 300; round++) {
        put_named(&a, 1 + fk_rng_below(&rng, 40), 1 + fk_rng_below(&rng, 12));
        uint32_t takes = fk_rng_below(&rng, 6);
        for (uint32_t k = 0; k < takes; k++) {
            int n = flexkv_events_take(ev, e, 2);
            for (int i = 0; i < n; i++)
                router_believe(&r, &e[i]);
        }
        if (round % 30 != 29)
            continue;
        router_take(&r, ev, 64);
        uint32_t there = 0;
        for (uint32_t c = 1; c <= 40; c++) {
            uint32_t n = matched(&a, c, 12);
            assert_int_equal(router_count(&r, c, FLEXKV_MEDIUM_CPU), n);
            there += n;
        }
        assert_int_equal(r.n, there);
    }
    assert_true(stats_of(a.node).event_resyncs > 0);
    flexkv_events_close(ev);
    close_node(&a);
}

static void namespaces_have_their_labels(void **state)
{
    static struct router r;
    struct api a;
    flexkv_namespace *one, *two;
    char long_name[300];

    r = (struct router){ 0 };
    open_node(&a, OPTIONS(EVENTS));
    flexkv_events *ev = subscribe(&a);
    assert_int_equal(flexkv_namespace_open(a.space, (const char *const[]){ "one" }, 1, &one), 0);
    assert_int_equal(flexkv_namespace_open(a.space, (const char *const[]){ "two" }, 1, &two), 0);
    assert_int_equal(flexkv_namespace_label(one, NULL, "salt-1"), 0);
    assert_int_equal(flexkv_namespace_label(two, "lora-2", ""), 0);
    memset(long_name, 'x', sizeof(long_name));
    long_name[256] = 0;
    assert_int_equal(flexkv_namespace_label(one, long_name, NULL), -EINVAL);
    put_named_in(&a, one, 1, 0, 4);
    put_named_in(&a, two, 2, 0, 4);
    put_named(&a, 3, 4);
    assert_int_equal(router_take(&r, ev, 64), 12);
    for (uint32_t i = 0; i < 4; i++) {
        int at = router_find(&r, hash_of(1, i), FLEXKV_MEDIUM_CPU);
        assert_string_equal(r.block[at].salt, "salt-1");
        assert_string_equal(r.block[at].lora, "-");
        at = router_find(&r, hash_of(2, i), FLEXKV_MEDIUM_CPU);
        assert_string_equal(r.block[at].salt, "-");
        assert_string_equal(r.block[at].lora, "lora-2");
        at = router_find(&r, hash_of(3, i), FLEXKV_MEDIUM_CPU);
        assert_string_equal(r.block[at].salt, "-");
    }
    flexkv_events_close(ev);
    close_node(&a);
}

/* The same hashes in two namespaces: two blocks each, announced twice, removed twice. */
static void blocks_of_two_namespaces_are_two_blocks(void **state)
{
    struct api a;
    flexkv_namespace *one;
    flexkv_event e[64];

    open_node(&a, OPTIONS(EVENTS));
    flexkv_events *ev = subscribe(&a);
    assert_int_equal(flexkv_namespace_open(a.space, (const char *const[]){ "one" }, 1, &one), 0);
    put_named_in(&a, one, 1, 0, 4);
    put_named_in(&a, a.ns, 1, 0, 4);
    assert_int_equal(flexkv_events_take(ev, e, 64), 8);
    assert_int_equal(flexkv_reset(a.node), 0);
    int n = flexkv_events_take(ev, e, 64);
    assert_int_equal(n, 8);
    for (int i = 0; i < n; i++)
        assert_int_equal(e[i].kind, FLEXKV_EVENT_REMOVED);
    flexkv_events_close(ev);
    close_node(&a);
}

static void a_space_can_be_followed_alone(void **state)
{
    static struct router r;
    struct api a, b;
    flexkv_space_desc d = desc_of("other");
    flexkv_events *ev;

    r = (struct router){ 0 };
    open_node(&a, OPTIONS(EVENTS, "max_spaces", "2", "cpu_cache_blocks", "128"));
    b = a;
    assert_int_equal(flexkv_space_open(a.node, &d, &b.space), 0);
    assert_int_equal(flexkv_namespace_open(b.space, NULL, 0, &b.ns), 0);
    for (uint32_t rank = 0; rank < RANKS; rank++)
        register_rank(&b, rank);
    assert_int_equal(flexkv_events_open(a.node, b.space, &ev), 0);
    put_named(&a, 1, 4);
    put_named(&b, 2, 4);
    assert_int_equal(router_take(&r, ev, 64), 4);
    assert_int_equal(router_count(&r, 2, FLEXKV_MEDIUM_CPU), 4);
    put_named(&a, 3, 4);
    put_named(&b, 4, 4);
    assert_int_equal(router_take(&r, ev, 64), 4);
    assert_int_equal(router_count(&r, 4, FLEXKV_MEDIUM_CPU), 4);
    flexkv_events_close(ev);
    close_node(&a);
}

static void off_means_off(void **state)
{
    struct api a;
    flexkv_events *ev;

    open_node(&a, NULL);
    assert_int_equal(flexkv_events_open(a.node, NULL, &ev), -EOPNOTSUPP);
    assert_non_null(strstr(flexkv_last_error(), "enable_kv_events"));
    assert_int_equal(flexkv_namespace_label(a.ns, "lora", "salt"), 0);
    assert_int_equal(put_named(&a, 1, 8).blocks_ok, 8);
    assert_int_equal(stats_of(a.node).events, 0);
    close_node(&a);
    open_node(&a, OPTIONS("dynamo_use_flexkv", "1"));
    assert_int_equal(flexkv_events_open(a.node, NULL, &ev), 0);
    flexkv_events_close(ev);
    close_node(&a);
}

static void a_closed_node_ends_its_subscriptions(void **state)
{
    struct api a;
    flexkv_event e;

    open_node(&a, OPTIONS(EVENTS));
    flexkv_events *ev = subscribe(&a);
    assert_int_equal(flexkv_events_take(ev, &e, 0), -EINVAL);
    close_node(&a);
    assert_true(events_wait(ev, 0));
    assert_int_equal(flexkv_events_take(ev, &e, 1), -ENOTCONN);
    flexkv_events_close(ev);
    flexkv_events_close(NULL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(stored_is_announced_when_it_is_there),
        cmocka_unit_test(evicted_is_removed_and_reset_removes_all),
        cmocka_unit_test(what_has_no_name_makes_no_events),
        cmocka_unit_test(who_comes_late_hears_what_is_there),
        cmocka_unit_test(a_slow_subscriber_gets_the_difference),
        cmocka_unit_test(changes_during_a_walk_come_out_right),
        cmocka_unit_test(namespaces_have_their_labels),
        cmocka_unit_test(blocks_of_two_namespaces_are_two_blocks),
        cmocka_unit_test(a_space_can_be_followed_alone),
        cmocka_unit_test(off_means_off),
        cmocka_unit_test(a_closed_node_ends_its_subscriptions),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
