/* test_daemon_events.c - KV events of a node in a daemon: subscriptions of clients, notes, labels; slow
 * ones; a daemon that is killed and started anew. */
#include "process_rig.h"

enum { TOKENS_PER_BLOCK = TPB, MAX_CHAIN = CHAIN_MAX };
#include "events_rig.h"

struct client {
    struct worker w;
    flexkv_node *node;
    flexkv_space *space;
    flexkv_namespace *ns;
};

static void connect_only(struct client *c, const char *address)
{
    flexkv_config *config = small_config("1M", NULL);

    if (flexkv_node_connect(config, address, &c->node))
        fail_msg("%s", flexkv_last_error());
    flexkv_config_destroy(config);
}

static void connect_client(struct client *c, const char *address, const char *instance)
{
    flexkv_space_desc d = space_desc(instance, 1, 1);

    worker_agent(&c->w, address, instance, 0, 0);
    connect_only(c, address);
    if (flexkv_space_open(c->node, &d, &c->space))
        fail_msg("%s", flexkv_last_error());
    assert_int_equal(flexkv_namespace_open(c->space, NULL, 0, &c->ns), 0);
}

static flexkv_stats stats_of(flexkv_node *node)
{
    flexkv_stats st = { .struct_bytes = sizeof(st) };

    assert_int_equal(flexkv_node_stats(node, &st), 0);
    return st;
}

static void put_named_in(struct client *c, flexkv_namespace *ns, uint32_t chain, uint32_t first,
                         uint32_t n)
{
    uint32_t pages[CHAIN_MAX], tokens[CHAIN_MAX * TPB];
    uint64_t hashes[CHAIN_MAX], op;
    flexkv_key keys[CHAIN_MAX];
    flexkv_op_args a = { .struct_bytes = sizeof(a), .pages = pages, .event_hashes = hashes,
                         .event_tokens = tokens };

    chain_keys(ns, chain, n, keys);
    tokens_of(chain, first, n - first, tokens);
    for (uint32_t i = first; i < n; i++) {
        pages[i - first] = i - first;
        hashes[i - first] = hash_of(chain, i);
    }
    a.event_parent = first ? hash_of(chain, first - 1) : 0;
    fill_pages(&c->w, chain, 0, n - first, 0);
    assert_int_equal(flexkv_put(ns, keys, n, first, &a, &op), 0);
    assert_int_equal(wait_op(c->node, op, 5000).status, 0);
}

static void put_named(struct client *c, uint32_t chain, uint32_t n)
{
    put_named_in(c, c->ns, chain, 0, n);
}

/* Until the router has heard of so many blocks in all; by the descriptor, as a publisher does. */
static void take_until(struct router *r, flexkv_events *ev, uint32_t n)
{
    uint64_t end = fk_clock_us() + 10000000;

    while (r->n != n && fk_clock_us() < end) {
        if (!router_take(r, ev, 50))
            (void)events_wait(ev, 100);
    }
    assert_int_equal(r->n, n);
}

static void clients_hear_what_is_stored(void **state)
{
    static struct router mine, all;
    struct client a = { 0 }, looker = { 0 };
    flexkv_namespace *tenant;
    flexkv_events *ev, *other;
    char address[108];

    mine = all = (struct router){ 0 };
    worker_fork(&a.w);
    pid_t daemon = daemon_fork(fresh_address(address), NULL);
    connect_client(&a, address, "a");
    connect_only(&looker, address);             /* as `flexkv events` does */
    assert_int_equal(flexkv_events_open(looker.node, NULL, &other), 0);
    assert_int_equal(flexkv_events_open(a.node, a.space, &ev), 0);
    assert_int_equal(router_take(&all, other, 64), 0);
    assert_false(events_wait(other, 0));
    put_named(&a, 1, 20);
    assert_true(events_wait(other, 5000));      /* it was told */
    take_until(&all, other, 20);
    take_until(&mine, ev, 20);
    assert_int_equal(flexkv_namespace_open(a.space, (const char *const[]){ "t" }, 1, &tenant), 0);
    assert_int_equal(flexkv_namespace_label(tenant, "lora", "salt"), 0);
    put_named_in(&a, tenant, 2, 0, 10);
    put_named_in(&a, a.ns, 1, 20, 30);
    take_until(&all, other, 40);
    take_until(&mine, ev, 40);
    int at = router_find(&all, hash_of(2, 3), FLEXKV_MEDIUM_CPU);
    assert_string_equal(all.block[at].salt, "salt");
    assert_string_equal(all.block[at].lora, "lora");
    assert_string_equal(all.block[router_find(&all, hash_of(1, 25), FLEXKV_MEDIUM_CPU)].salt, "-");
    assert_int_equal(flexkv_events_again(other), 0);
    all = (struct router){ 0 };
    take_until(&all, other, 40);
    assert_int_equal(flexkv_reset(a.node), 0);
    take_until(&all, other, 0);
    take_until(&mine, ev, 0);
    assert_true(stats_of(a.node).events_taken >= 40 + 40);
    flexkv_events_close(other);
    flexkv_node_close(looker.node);
    flexkv_node_close(a.node);
    flexkv_event e;
    assert_int_equal(flexkv_events_take(ev, &e, 1), -ENOTCONN);
    flexkv_events_close(ev);
    worker_end(&a.w);
    reap(daemon, SIGTERM);
}

/* A buffer of 8 KiB: some 140 events. */
static void a_slow_client_gets_the_difference(void **state)
{
    static struct router r;
    struct client a = { 0 };
    flexkv_events *ev;
    char address[108];

    r = (struct router){ 0 };
    worker_fork(&a.w);
    pid_t daemon = daemon_fork(fresh_address(address), NULL);
    connect_client(&a, address, "a");
    assert_int_equal(flexkv_events_open(a.node, NULL, &ev), 0);
    put_named(&a, 0, 40);
    take_until(&r, ev, 40);
    for (uint32_t c = 1; c < 40; c++)
        put_named(&a, c, 40);
    uint32_t there = (uint32_t)stats_of(a.node).blocks;
    take_until(&r, ev, there);
    assert_true(r.removed >= 40);
    assert_true(stats_of(a.node).event_resyncs > 0);
    for (uint32_t c = 0; c < 40; c++) {
        uint64_t lease;
        uint32_t n = match_chain(a.ns, c, 40, &lease);
        assert_int_equal(router_count(&r, c, FLEXKV_MEDIUM_CPU), n);
        if (lease)
            assert_int_equal(flexkv_release(a.node, lease), 0);
    }
    flexkv_events_close(ev);
    flexkv_node_close(a.node);
    worker_end(&a.w);
    reap(daemon, SIGTERM);
}

static void wait_written(flexkv_node *node)
{
    uint64_t end = fk_clock_us() + 10000000;

    while (stats_of(node).write_backlog_blocks && fk_clock_us() < end)
        usleep(1000);
    usleep(50000);                      /* the records follow the data */
}

static void a_new_daemon_means_the_difference(void **state)
{
    static struct router r, space;
    struct client a = { 0 }, looker = { 0 };
    flexkv_events *ev, *of_space;
    char address[108], path[] = "/tmp/flexkv-test-ssd-XXXXXX", clean[80];
    uint64_t lease;

    r = space = (struct router){ 0 };
    assert_non_null(mkdtemp(path));
    worker_fork(&a.w);
    pid_t daemon = daemon_fork(fresh_address(address), path);
    connect_client(&a, address, "a");
    connect_only(&looker, address);
    assert_int_equal(flexkv_namespace_label(a.ns, NULL, "pepper"), 0);
    assert_int_equal(flexkv_events_open(looker.node, NULL, &ev), 0);
    assert_int_equal(flexkv_events_open(a.node, a.space, &of_space), 0);
    put_named(&a, 1, 25);
    put_named(&a, 2, 25);
    wait_written(a.node);
    take_until(&r, ev, 100);
    take_until(&space, of_space, 100);
    reap(daemon, SIGKILL);
    assert_int_equal(router_take(&r, ev, 64), 0);               /* nobody is there: nothing for now */
    usleep(100000);
    assert_int_equal(router_take(&r, ev, 64), 0);
    daemon = daemon_fork(address, path);
    take_until(&space, of_space, 50);                           /* its space is open again */
    assert_int_equal(space.stored, 100);                        /* what SSD held all the time stays */
    assert_int_equal(space.removed, 50);
    take_until(&r, ev, 50);
    assert_int_equal(router_count(&r, 1, FLEXKV_MEDIUM_STORAGE), 25);
    assert_int_equal(router_count(&r, 2, FLEXKV_MEDIUM_STORAGE), 25);
    uint64_t end = fk_clock_us() + 10000000;
    while (match_chain(a.ns, 1, 25, &lease) == 0 && fk_clock_us() < end)
        usleep(5000);
    assert_int_equal(wait_op(a.node, get_chain(a.node, lease, 25, 30, 0), 5000).status, 0);
    put_named(&a, 3, 5);                                        /* labels were told again */
    wait_written(a.node);
    take_until(&r, ev, 50 + 25 + 10);
    take_until(&space, of_space, 50 + 25 + 10);
    assert_string_equal(r.block[router_find(&r, hash_of(3, 1), FLEXKV_MEDIUM_CPU)].salt, "pepper");
    assert_string_equal(r.block[router_find(&r, hash_of(1, 1), FLEXKV_MEDIUM_CPU)].salt, "pepper");
    flexkv_events_close(ev);
    flexkv_events_close(of_space);
    flexkv_node_close(looker.node);
    flexkv_node_close(a.node);
    worker_end(&a.w);
    reap(daemon, SIGTERM);
    sprintf(clean, "rm -rf %s", path);
    assert_int_equal(system(clean), 0);
}

static void a_daemon_without_events_says_so(void **state)
{
    struct client a = { 0 };
    flexkv_events *ev;
    char address[108];

    worker_fork(&a.w);
    rig_events = false;
    pid_t daemon = daemon_fork(fresh_address(address), NULL);
    rig_events = true;
    connect_client(&a, address, "a");
    assert_int_equal(flexkv_events_open(a.node, NULL, &ev), -EOPNOTSUPP);
    assert_non_null(strstr(flexkv_last_error(), "enable_kv_events"));
    put_named(&a, 1, 20);
    assert_int_equal(stats_of(a.node).events, 0);
    flexkv_node_close(a.node);
    worker_end(&a.w);
    reap(daemon, SIGTERM);
}

int main(void)
{
    fk_log_set_level(FK_LOG_CRITICAL);
    rig_events = true;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(clients_hear_what_is_stored),
        cmocka_unit_test(a_slow_client_gets_the_difference),
        cmocka_unit_test(a_new_daemon_means_the_difference),
        cmocka_unit_test(a_daemon_without_events_says_so),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
