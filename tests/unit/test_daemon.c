/* test_daemon.c - a node in a daemon, clients and agents in other processes: sharing, isolation, life
 * and death. */
#include "process_rig.h"

struct client {
    struct worker w;
    char instance[32];
    flexkv_node *node;
    flexkv_space *space;
    flexkv_namespace *ns;
};

static void connect_client(struct client *c, const char *address, const char *instance)
{
    flexkv_config *config = small_config("1M", NULL);
    flexkv_space_desc d = space_desc(instance, 1, 1);

    strcpy(c->instance, instance);
    worker_agent(&c->w, address, instance, 0, 0);
    if (flexkv_node_connect(config, address, &c->node))
        fail_msg("%s", flexkv_last_error());
    flexkv_config_destroy(config);
    if (flexkv_space_open(c->node, &d, &c->space))
        fail_msg("%s", flexkv_last_error());
    assert_int_equal(flexkv_namespace_open(c->space, NULL, 0, &c->ns), 0);
}

static void close_client(struct client *c)
{
    flexkv_node_close(c->node);
    worker_end(&c->w);
}

static flexkv_stats stats_of(flexkv_node *node)
{
    flexkv_stats st = { .struct_bytes = sizeof(st) };

    assert_int_equal(flexkv_node_stats(node, &st), 0);
    return st;
}

/* Two engines, one node: what one has stored the other loads. */
static void engines_share(void **state)
{
    struct client a = { 0 }, b = { 0 };
    char address[108];
    uint64_t lease;

    worker_fork(&a.w);
    worker_fork(&b.w);
    pid_t daemon = daemon_fork(fresh_address(address), NULL);
    connect_client(&a, address, "a");
    connect_client(&b, address, "b");
    fill_pages(&a.w, 11, 0, 30, 2);
    wipe(&b.w);
    flexkv_completion c = wait_op(a.node, put_chain(a.ns, 11, 30, 2), 5000);
    assert_int_equal(c.status, 0);
    assert_int_equal(c.kind, FLEXKV_OP_PUT);
    assert_int_equal(match_chain(b.ns, 11, 40, &lease), 30);
    c = wait_op(b.node, get_chain(b.node, lease, 30, 7, 0), 5000);
    assert_int_equal(c.status, 0);
    assert_int_equal(c.blocks_ok, 30);
    assert_true(pages_are(&b.w, 11, 0, 30, 7));
    assert_int_equal(stats_of(b.node).put_blocks, 30);
    char *json;
    assert_int_equal(flexkv_node_status(b.node, &json), 0);
    assert_non_null(strstr(json, "\"instances\""));
    free(json);
    close_client(&a);
    close_client(&b);
    reap(daemon, SIGTERM);
}

/* A lease is its owner's; namespaces stay apart; another model is refused. */
static void clients_are_apart(void **state)
{
    struct client a = { 0 }, b = { 0 };
    char address[108];
    uint64_t lease, op;
    uint32_t page = 0;
    flexkv_op_args args = { .struct_bytes = sizeof(args), .pages = &page };

    worker_fork(&a.w);
    worker_fork(&b.w);
    pid_t daemon = daemon_fork(fresh_address(address), NULL);
    connect_client(&a, address, "a");
    connect_client(&b, address, "b");
    assert_int_equal(wait_op(a.node, put_chain(a.ns, 1, 4, 0), 5000).status, 0);
    assert_int_equal(match_chain(a.ns, 1, 4, &lease), 4);
    assert_int_equal(flexkv_get(b.node, lease, 0, 1, &args, &op), 0);
    assert_int_equal(wait_op(b.node, op, 5000).status, -ENOENT);
    assert_int_equal(flexkv_release(b.node, lease), 0);         /* says nothing, does nothing */
    assert_int_equal(wait_op(a.node, get_chain(a.node, lease, 4, 0, 0), 5000).status, 0);

    const char *parts[] = { "tenant", "x" };
    flexkv_namespace *ns;
    assert_int_equal(flexkv_namespace_open(b.space, parts, 2, &ns), 0);
    assert_int_equal(match_chain(ns, 1, 4, &lease), 0);

    flexkv_space *other;
    flexkv_space_desc d = space_desc("b", 1, 1);
    d.fingerprint = "another model";
    d.fingerprint_bytes = 13;
    d.slice_bytes = SLICE_BYTES;
    assert_int_equal(flexkv_space_open(b.node, &d, &other), -EEXIST);
    assert_non_null(strstr(flexkv_last_error(), "another geometry"));
    d.name = "second";
    assert_int_equal(flexkv_space_open(b.node, &d, &other), -ENOSPC);
    assert_non_null(strstr(flexkv_last_error(), "max_spaces"));
    d = space_desc("a", 1, 1);          /* an instance that is in use */
    assert_int_equal(flexkv_space_open(b.node, &d, &other), -EEXIST);
    assert_non_null(strstr(flexkv_last_error(), "instance_id"));
    close_client(&a);
    close_client(&b);
    reap(daemon, SIGTERM);
}

/* The client dies with leases and operations: all of it is free again, the other goes on. */
static void a_dead_client_leaves_nothing(void **state)
{
    struct client a = { 0 }, b = { 0 };
    char address[108];
    uint64_t lease;

    worker_fork(&a.w);
    worker_fork(&b.w);
    pid_t daemon = daemon_fork(fresh_address(address), NULL);
    connect_client(&b, address, "b");
    pid_t client = fork();
    if (!client) {
        connect_client(&a, address, "a");
        wait_op(a.node, put_chain(a.ns, 1, 20, 0), 5000);
        assert_int_equal(match_chain(a.ns, 1, 20, &lease), 20);
        kill(a.w.pid, SIGSTOP);
        usleep(20000);
        put_chain(a.ns, 2, 20, 20);
        kill(getppid(), SIGCONT);
        usleep(100000);
        kill(getpid(), SIGKILL);
    }
    waitpid(client, NULL, 0);
    uint64_t end = fk_clock_us() + 5000000;
    while (stats_of(b.node).leases && fk_clock_us() < end)
        usleep(2000);
    assert_int_equal(stats_of(b.node).leases, 0);
    worker_kill(&a.w);                  /* until then its job's slots are held */
    while (stats_of(b.node).operations && fk_clock_us() < end)
        usleep(2000);
    flexkv_stats st = stats_of(b.node);
    assert_int_equal(st.operations, 0);
    assert_int_equal(st.cpu.slots - st.cpu.free_slots, 20);
    assert_int_equal(match_chain(b.ns, 1, 20, &lease), 20);
    close_client(&b);
    munmap(a.w.pages, (size_t)REGIONS * PAGES * REGION_BYTES);
    reap(daemon, SIGTERM);
}

/* The daemon dies, and comes back: misses meanwhile, then everything as before. */
static void a_daemon_comes_back(void **state)
{
    struct client a = { 0 };
    char address[108], path[] = "/tmp/flexkv-test-ssd-XXXXXX", clean[80];
    uint64_t lease, op;

    assert_non_null(mkdtemp(path));
    worker_fork(&a.w);
    pid_t daemon = daemon_fork(fresh_address(address), path);
    connect_client(&a, address, "a");
    fill_pages(&a.w, 6, 0, 25, 0);
    assert_int_equal(wait_op(a.node, put_chain(a.ns, 6, 25, 0), 5000).status, 0);
    while (stats_of(a.node).write_backlog_blocks)
        usleep(1000);
    usleep(50000);                      /* the records follow the data */
    assert_int_equal(match_chain(a.ns, 6, 25, &lease), 25);
    stop(daemon);
    op = get_chain(a.node, lease, 25, 30, 0);
    reap(daemon, SIGKILL);
    flexkv_completion c = wait_op(a.node, op, 2000);
    assert_int_equal(c.status, -ENOTCONN);
    assert_true(c.flags & FLEXKV_COMPLETION_PAGES_BUSY);
    assert_int_equal(match_chain(a.ns, 6, 25, &lease), 0);
    flexkv_key keys[4];
    uint32_t pages[4] = { 0 };
    flexkv_op_args args = { .struct_bytes = sizeof(args), .pages = pages };
    chain_keys(a.ns, 8, 4, keys);
    assert_int_equal(flexkv_put(a.ns, keys, 4, 0, &args, &op), -ENOTCONN);

    wipe(&a.w);
    /* A fork of a process with threads: the child only opens a node of its own. */
    daemon = daemon_fork(address, path);
    uint64_t end = fk_clock_us() + 10000000;
    while (match_chain(a.ns, 6, 25, &lease) == 0 && fk_clock_us() < end)
        usleep(5000);
    assert_int_equal(wait_op(a.node, get_chain(a.node, lease, 25, 30, 0), 5000).status, 0);
    assert_true(pages_are(&a.w, 6, 0, 25, 30));
    close_client(&a);
    reap(daemon, SIGTERM);
    sprintf(clean, "rm -rf %s", path);
    assert_int_equal(system(clean), 0);
}

/* A stopped daemon costs one timeout, not a hang; it is used again when it goes on. */
static void a_stopped_daemon_is_a_miss(void **state)
{
    struct client a = { 0 };
    char address[108];
    uint64_t lease;

    worker_fork(&a.w);
    pid_t daemon = daemon_fork(fresh_address(address), NULL);
    connect_client(&a, address, "a");
    fill_pages(&a.w, 2, 0, 9, 0);
    assert_int_equal(wait_op(a.node, put_chain(a.ns, 2, 9, 0), 5000).status, 0);
    stop(daemon);
    uint64_t start = fk_clock_us();
    assert_int_equal(match_chain(a.ns, 2, 9, &lease), 0);
    assert_int_equal(match_chain(a.ns, 2, 9, &lease), 0);       /* at once now */
    assert_true(fk_clock_us() - start < 3000000);
    kill(daemon, SIGCONT);
    uint64_t end = fk_clock_us() + 10000000;
    while (match_chain(a.ns, 2, 9, &lease) == 0 && fk_clock_us() < end)
        usleep(5000);
    wipe(&a.w);
    assert_int_equal(wait_op(a.node, get_chain(a.node, lease, 9, 40, 0), 5000).status, 0);
    assert_true(pages_are(&a.w, 2, 0, 9, 40));
    close_client(&a);
    reap(daemon, SIGTERM);
}

/* Memory registered by the client's own process: an agent of its own. */
static void regions_of_the_client(void **state)
{
    char address[108];
    flexkv_node *node;
    flexkv_space *space;
    flexkv_namespace *ns;
    uint64_t lease;
    struct worker w = { 0 };
    flexkv_region r[REGIONS];
    flexkv_config *config = small_config("1M", NULL);
    flexkv_space_desc d = space_desc("c", 1, 0);

    w.pages = calloc(REGIONS, PAGES * REGION_BYTES);
    pid_t daemon = daemon_fork(fresh_address(address), NULL);
    for (uint32_t i = 0; i < REGIONS; i++)
        r[i] = (flexkv_region){ w.pages + (size_t)i * PAGES * REGION_BYTES, REGION_BYTES,
                                REGION_BYTES, PAGES };
    assert_int_equal(flexkv_node_connect(config, address, &node), 0);
    d.slice_bytes = SLICE_BYTES;
    assert_int_equal(flexkv_space_open(node, &d, &space), 0);
    assert_int_equal(flexkv_regions_register(space, 0, r, REGIONS), 0);
    assert_int_equal(flexkv_regions_register(space, 0, r, REGIONS), -EEXIST);
    assert_int_equal(flexkv_namespace_open(space, NULL, 0, &ns), 0);
    fill_pages(&w, 1, 0, 12, 0);
    assert_int_equal(wait_op(node, put_chain(ns, 1, 12, 0), 5000).status, 0);
    assert_int_equal(match_chain(ns, 1, 12, &lease), 12);
    assert_int_equal(wait_op(node, get_chain(node, lease, 12, 20, 0), 5000).status, 0);
    assert_int_equal(flexkv_reset(node), 0);
    assert_int_equal(match_chain(ns, 1, 12, &lease), 0);
    /* The agent's thread has ended then; a completion orders its writes only by way of the daemon,
     * which thread sanitizers can't see. */
    assert_int_equal(flexkv_regions_unregister(space, 0), 0);
    assert_true(pages_are(&w, 1, 0, 12, 20));
    flexkv_node_close(node);
    flexkv_config_destroy(config);
    reap(daemon, SIGTERM);
    free(w.pages);
}

static void nobody_there(void **state)
{
    char address[108];
    flexkv_node *node;

    assert_int_equal(flexkv_node_connect(NULL, fresh_address(address), &node), -ECONNREFUSED);
    assert_non_null(strstr(flexkv_last_error(), "server_recv_port"));
    assert_int_equal(flexkv_node_connect(NULL, "ipc:///nonexistent/x", &node), -ENOENT);
}

int main(void)
{
    fk_log_set_level(FK_LOG_CRITICAL);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(engines_share),
        cmocka_unit_test(clients_are_apart),
        cmocka_unit_test(a_dead_client_leaves_nothing),
        cmocka_unit_test(a_daemon_comes_back),
        cmocka_unit_test(a_stopped_daemon_is_a_miss),
        cmocka_unit_test(regions_of_the_client),
        cmocka_unit_test(nobody_there),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
