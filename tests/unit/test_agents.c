/* test_agents.c - a node in this process, agents in others: bytes, ranks, replicas, death. */
#include "process_rig.h"

struct rig {
    char address[108];
    struct worker w[3];
    uint32_t n;
    flexkv_node *node;
    flexkv_space *space;
    flexkv_namespace *ns;
};

/* told: the agents say what they hold; else the node works it out. Takes the config. */
static void open_rig_with(struct rig *r, uint32_t ranks, uint32_t workers, bool told,
                          flexkv_config *config)
{

    *r = (struct rig){ .n = workers };
    fresh_address(r->address);
    for (uint32_t i = 0; i < workers; i++)
        worker_fork(&r->w[i]);
    /* As engines do: workers first, the node a little later. */
    for (uint32_t i = 0; i < workers; i++) {
        struct order_msg m = { .order = ORDER_AGENT, .worker = i, .regions = REGIONS };
        if (told) {
            m.slice = i % ranks;
            m.replica = i / ranks;
            m.replicas = workers / ranks;
        }
        strcpy(m.address, r->address);
        assert_int_equal(worker_order(&r->w[i], &m), 0);
        assert_int_equal(worker_simple(&r->w[i], ORDER_STATE), 0);
    }
    assert_int_equal(flexkv_node_open(config, &r->node), 0);
    flexkv_config_destroy(config);
    assert_int_equal(flexkv_node_listen(r->node, r->address), 0);
    flexkv_space_desc d = space_desc(NULL, ranks, workers);
    if (flexkv_space_open(r->node, &d, &r->space))
        fail_msg("%s", flexkv_last_error());
    assert_int_equal(flexkv_namespace_open(r->space, NULL, 0, &r->ns), 0);
}

static void open_rig_of(struct rig *r, uint32_t ranks, uint32_t workers, bool told)
{
    open_rig_with(r, ranks, workers, told, small_config("1M", NULL));
}

static void open_rig(struct rig *r, uint32_t ranks, uint32_t workers)
{
    open_rig_of(r, ranks, workers, true);
}

static void close_rig(struct rig *r)
{
    flexkv_node_close(r->node);
    for (uint32_t i = 0; i < r->n; i++)
        worker_end(&r->w[i]);
}

static uint32_t slots_taken(flexkv_node *node)
{
    flexkv_stats st = { .struct_bytes = sizeof(st) };

    assert_int_equal(flexkv_node_stats(node, &st), 0);
    return (uint32_t)(st.cpu.slots - st.cpu.free_slots);
}

static void bytes_come_back(void **state)
{
    struct rig r;
    uint64_t lease;

    open_rig(&r, 2, 2);
    for (uint32_t w = 0; w < 2; w++)
        fill_pages(&r.w[w], 5, w, 20, 0);
    flexkv_completion c = wait_op(r.node, put_chain(r.ns, 5, 20, 0), 5000);
    assert_int_equal(c.status, 0);
    assert_int_equal(c.blocks_ok, 20);
    for (uint32_t w = 0; w < 2; w++)
        wipe(&r.w[w]);
    assert_int_equal(match_chain(r.ns, 5, 20, &lease), 20);
    c = wait_op(r.node, get_chain(r.node, lease, 20, 30, 0), 5000);
    assert_int_equal(c.status, 0);
    for (uint32_t w = 0; w < 2; w++) {
        assert_int_equal(worker_simple(&r.w[w], ORDER_STATE), 1);
        assert_true(pages_are(&r.w[w], 5, w, 20, 30));
        assert_int_equal(r.w[w].pages[0], 0xee);
    }
    close_rig(&r);
}

/* Three workers with the same slice: each stores a third of the blocks, each loads all. */
static void store_once(bool told)
{
    struct rig r;
    uint64_t lease;

    open_rig_of(&r, 1, 3, told);
    for (uint32_t w = 0; w < 3; w++)
        fill_pages(&r.w[w], 9, 0, 17, 0);
    assert_int_equal(wait_op(r.node, put_chain(r.ns, 9, 17, 0), 5000).blocks_ok, 17);
    flexkv_stats st = { .struct_bytes = sizeof(st) };
    assert_int_equal(flexkv_node_stats(r.node, &st), 0);
    assert_int_equal(st.cpu.slots - st.cpu.free_slots, 17);
    assert_in_range(st.cpu.bytes_written, 15 * SLICE_BYTES, 17 * SLICE_BYTES);
    for (uint32_t w = 0; w < 3; w++)
        wipe(&r.w[w]);
    assert_int_equal(match_chain(r.ns, 9, 17, &lease), 17);
    assert_int_equal(wait_op(r.node, get_chain(r.node, lease, 17, 1, 0), 5000).status, 0);
    for (uint32_t w = 0; w < 3; w++)
        assert_true(pages_are(&r.w[w], 9, 0, 17, 1));
    close_rig(&r);
}

static void replicas_store_once(void **state)
{
    store_once(true);
    store_once(false);
}

/* A block of which only some slices were stored is never seen. */
static void a_dead_worker_is_a_miss(void **state)
{
    struct rig r;
    uint64_t lease;

    open_rig(&r, 2, 2);
    assert_int_equal(wait_op(r.node, put_chain(r.ns, 1, 8, 0), 5000).status, 0);
    stop(r.w[1].pid);          /* so that its half is not done when it dies */
    uint64_t op = put_chain(r.ns, 2, 8, 8);
    usleep(50000);
    worker_kill(&r.w[1]);
    flexkv_completion c = wait_op(r.node, op, 3000);
    assert_int_equal(c.status, -ENOTCONN);
    assert_int_equal(c.blocks_ok, 0);
    assert_int_equal(match_chain(r.ns, 1, 8, &lease), 0);       /* nobody could load it */
    flexkv_key keys[8];
    uint32_t pages[8] = { 0 };
    flexkv_op_args a = { .struct_bytes = sizeof(a), .pages = pages };
    chain_keys(r.ns, 3, 8, keys);
    assert_int_equal(flexkv_put(r.ns, keys, 8, 0, &a, &op), -ENOTCONN);
    assert_int_equal(slots_taken(r.node), 8);
    close_rig(&r);
}

/* A new worker takes the place of the dead one. */
static void a_worker_comes_back(void **state)
{
    struct rig r;
    struct worker spare;
    uint64_t lease, end;

    worker_fork(&spare);
    open_rig(&r, 1, 1);
    fill_pages(&r.w[0], 4, 0, 6, 0);
    assert_int_equal(wait_op(r.node, put_chain(r.ns, 4, 6, 0), 5000).status, 0);
    worker_kill(&r.w[0]);
    end = fk_clock_us() + 5000000;
    while (match_chain(r.ns, 4, 6, &lease) && fk_clock_us() < end)
        usleep(2000);                   /* until its death is noticed */
    worker_agent(&spare, r.address, "", 0, 0);
    while (match_chain(r.ns, 4, 6, &lease) == 0 && fk_clock_us() < end)
        usleep(2000);
    assert_int_equal(wait_op(r.node, get_chain(r.node, lease, 6, 9, 0), 5000).status, 0);
    assert_true(pages_are(&spare, 4, 0, 6, 9));
    worker_end(&spare);
    close_rig(&r);
}

/* What a stopped worker may still touch is not given out again; it is when the worker goes on, or dies. */
static void a_stopped_worker_keeps_its_slots(void **state)
{
    struct rig r;

    open_rig(&r, 1, 1);
    stop(r.w[0].pid);
    flexkv_key keys[8];
    uint32_t pages[8] = { 0, 1, 2, 3, 4, 5, 6, 7 };
    uint64_t op;
    flexkv_op_args a = { .struct_bytes = sizeof(a), .pages = pages, .timeout_ms = 100 };
    chain_keys(r.ns, 7, 8, keys);
    assert_int_equal(flexkv_put(r.ns, keys, 8, 0, &a, &op), 0);
    flexkv_completion c = wait_op(r.node, op, 5000);
    assert_int_equal(c.status, -ETIMEDOUT);
    assert_true(c.flags & FLEXKV_COMPLETION_PAGES_BUSY);
    assert_int_equal(slots_taken(r.node), 8);
    kill(r.w[0].pid, SIGCONT);
    uint64_t end = fk_clock_us() + 5000000;
    while (slots_taken(r.node) && fk_clock_us() < end)
        usleep(2000);
    assert_int_equal(slots_taken(r.node), 0);

    stop(r.w[0].pid);
    assert_int_equal(flexkv_put(r.ns, keys, 8, 0, &a, &op), 0);
    assert_int_equal(wait_op(r.node, op, 5000).status, -ETIMEDOUT);
    worker_kill(&r.w[0]);
    end = fk_clock_us() + 5000000;
    while (slots_taken(r.node) && fk_clock_us() < end)
        usleep(2000);
    assert_int_equal(slots_taken(r.node), 0);
    close_rig(&r);
}

/* Once revoked, an operation writes no page, though its job still comes. */
static void revoked_is_not_copied(void **state)
{
    struct rig r;
    uint64_t lease;

    open_rig(&r, 1, 1);
    fill_pages(&r.w[0], 3, 0, 10, 0);
    assert_int_equal(wait_op(r.node, put_chain(r.ns, 3, 10, 0), 5000).status, 0);
    wipe(&r.w[0]);
    struct order_msg m = { .order = ORDER_REVOKE };
    assert_int_equal(match_chain(r.ns, 3, 10, &lease), 10);
    stop(r.w[0].pid);
    m.op = get_chain(r.node, lease, 10, 0, 3000);
    assert_int_equal(send(r.w[0].fd, &m, sizeof(m), 0), sizeof(m));
    kill(r.w[0].pid, SIGCONT);
    int rc;
    assert_int_equal(recv(r.w[0].fd, &rc, sizeof(rc), MSG_WAITALL), sizeof(rc));
    assert_int_equal(rc, 0);
    flexkv_completion c = wait_op(r.node, m.op, 5000);
    /* It was faster, or it was stopped: never in between without saying so. */
    assert_true(pages_are(&r.w[0], 3, 0, c.blocks_ok, 0));
    m.op += 1ull << 32 | 1;             /* one that has not come yet */
    assert_int_equal(worker_order(&r.w[0], &m), 0);
    close_rig(&r);
}

static int wait_layer(struct worker *w, uint64_t op, uint32_t layer)
{
    struct order_msg m = { .order = ORDER_LAYER, .op = op, .layer = layer };

    return worker_order(w, &m);
}

/* The caller gets the layer when it is there; an operation that nobody has begun is waited for, and
 * one that was stopped before it began has no layers. */
static void layers_are_waited_for(void **state)
{
    uint32_t pages[20];
    flexkv_op_args a = { .struct_bytes = sizeof(a), .pages = pages, .flags = FLEXKV_OP_LAYERWISE };
    uint64_t lease, op;
    struct rig r;

    open_rig(&r, 1, 1);
    fill_pages(&r.w[0], 3, 0, 20, 0);
    assert_int_equal(wait_op(r.node, put_chain(r.ns, 3, 20, 0), 5000).status, 0);
    wipe(&r.w[0]);
    assert_int_equal(match_chain(r.ns, 3, 20, &lease), 20);
    for (uint32_t i = 0; i < 20; i++)
        pages[i] = 40 + i;
    assert_int_equal(flexkv_get(r.node, lease, 0, 20, &a, &op), 0);
    for (uint32_t layer = 0; layer < 2; layer++)
        assert_int_equal(wait_layer(&r.w[0], op, layer), 0);
    assert_true(pages_are(&r.w[0], 3, 0, 20, 40));
    assert_int_equal(wait_layer(&r.w[0], op, 2), -EINVAL);
    assert_int_equal(wait_op(r.node, op, 5000).blocks_ok, 20);
    assert_int_equal(wait_layer(&r.w[0], 12345, 0), -ETIMEDOUT);

    assert_int_equal(match_chain(r.ns, 3, 20, &lease), 20);
    stop(r.w[0].pid);
    assert_int_equal(flexkv_get(r.node, lease, 0, 20, &a, &op), 0);
    assert_int_equal(flexkv_cancel(r.node, op), 0);
    kill(r.w[0].pid, SIGCONT);
    flexkv_completion c = wait_op(r.node, op, 5000);
    assert_true(c.status == -ECANCELED || c.blocks_ok == 20);
    assert_int_equal(wait_layer(&r.w[0], op, 1), c.blocks_ok == 20 ? 0 : -ECANCELED);
    close_rig(&r);
}

/* Starts a get of 20 blocks into pages 40 to 59 that is told of early, and waits until it is. */
static uint64_t get_early(struct rig *r, uint64_t lease)
{
    uint32_t pages[20];
    flexkv_op_args a = { .struct_bytes = sizeof(a), .pages = pages, .flags = FLEXKV_OP_EARLY };
    uint64_t op;

    for (uint32_t i = 0; i < 20; i++)
        pages[i] = 40 + i;
    assert_int_equal(flexkv_get(r->node, lease, 0, 20, &a, &op), 0);
    flexkv_completion c = wait_op(r->node, op, 5000);
    assert_int_equal(c.status, 0);
    assert_int_equal(c.blocks_ok, 20);
    assert_int_equal(c.flags, FLEXKV_COMPLETION_EARLY);
    return op;
}

/* The workers' copies are made 300 ms after they were said to be on their way. */
static void what_is_on_its_way_is_waited_for(void **state)
{
    struct rig r;
    uint64_t lease;

    setenv("FKTEST_EARLY_MS", "300", 1);
    open_rig(&r, 2, 2);
    unsetenv("FKTEST_EARLY_MS");
    for (uint32_t w = 0; w < 2; w++)
        fill_pages(&r.w[w], 4, w, 20, 0);
    assert_int_equal(wait_op(r.node, put_chain(r.ns, 4, 20, 0), 5000).status, 0);
    for (uint32_t w = 0; w < 2; w++)
        wipe(&r.w[w]);
    assert_int_equal(match_chain(r.ns, 4, 20, &lease), 20);
    struct order_msg m = { .order = ORDER_LOADED, .op = get_early(&r, lease) };
    assert_int_equal(flexkv_cancel(r.node, m.op), -ENOENT);
    for (uint32_t w = 0; w < 2; w++) {
        assert_int_equal(worker_order(&r.w[w], &m), 0);
        assert_true(pages_are(&r.w[w], 4, w, 20, 40));
    }

    /* Revoked, it is over as well, and not cut short. */
    for (uint32_t w = 0; w < 2; w++)
        wipe(&r.w[w]);
    assert_int_equal(match_chain(r.ns, 4, 20, &lease), 20);
    m = (struct order_msg){ .order = ORDER_REVOKE, .op = get_early(&r, lease) };
    for (uint32_t w = 0; w < 2; w++) {
        assert_int_equal(worker_order(&r.w[w], &m), 0);
        assert_true(pages_are(&r.w[w], 4, w, 20, 40));
    }

    /* A worker that dies now takes nothing with it but its own pages. */
    assert_int_equal(match_chain(r.ns, 4, 20, &lease), 20);
    m = (struct order_msg){ .order = ORDER_LOADED, .op = get_early(&r, lease) };
    worker_kill(&r.w[1]);
    assert_int_equal(worker_order(&r.w[0], &m), 0);
    assert_true(pages_are(&r.w[0], 4, 0, 20, 40));
    m.op = 12345;                           /* nothing to wait for */
    assert_int_equal(worker_order(&r.w[0], &m), 0);
    close_rig(&r);
}

/* Host memory says nothing of the kind: a get is over when it is over. */
static void host_copies_are_not_early(void **state)
{
    uint32_t pages[8] = { 40, 41, 42, 43, 44, 45, 46, 47 };
    flexkv_op_args a = { .struct_bytes = sizeof(a), .pages = pages, .flags = FLEXKV_OP_EARLY };
    struct rig r;
    uint64_t lease, op;

    open_rig(&r, 1, 1);
    fill_pages(&r.w[0], 5, 0, 8, 0);
    assert_int_equal(wait_op(r.node, put_chain(r.ns, 5, 8, 0), 5000).status, 0);
    assert_int_equal(match_chain(r.ns, 5, 8, &lease), 8);
    assert_int_equal(flexkv_get(r.node, lease, 0, 8, &a, &op), 0);
    flexkv_completion c = wait_op(r.node, op, 5000);
    assert_int_equal(c.flags, 0);
    assert_true(pages_are(&r.w[0], 5, 0, 8, 40));
    close_rig(&r);
}

/* Files to try it with come with the welcome, one for each directory; pages in host memory, and no
 * cuFile: blocks go the normal way. */
static void direct_storage_is_tried(void **state)
{
    char dirs[200];
    struct rig r;
    uint64_t lease;

    snprintf(dirs, sizeof(dirs), "flexkv-gds-%d-a;flexkv-gds-%d-b", (int)getpid(), (int)getpid());
    flexkv_config *config = small_config("1M", dirs);
    assert_int_equal(flexkv_config_set(config, "enable_gds", "1"), 0);
    open_rig_with(&r, 2, 2, true, config);
    for (uint32_t i = 0; i < 2; i++)
        fill_pages(&r.w[i], 3, i, 10, 0);
    assert_int_equal(wait_op(r.node, put_chain(r.ns, 3, 10, 0), 5000).status, 0);
    for (uint32_t i = 0; i < 2; i++)
        wipe(&r.w[i]);
    assert_int_equal(match_chain(r.ns, 3, 10, &lease), 10);
    assert_int_equal(wait_op(r.node, get_chain(r.node, lease, 10, 20, 0), 5000).blocks_ok, 10);
    for (uint32_t i = 0; i < 2; i++)
        assert_true(pages_are(&r.w[i], 3, i, 10, 20));
    close_rig(&r);
    snprintf(dirs, sizeof(dirs), "rm -rf flexkv-gds-%d-a flexkv-gds-%d-b", (int)getpid(), (int)getpid());
    assert_int_equal(system(dirs), 0);
}

static void missing_workers_are_named(void **state)
{
    char address[108];
    struct worker w;
    flexkv_node *node;
    flexkv_space *space;
    flexkv_config *config = small_config("1M", NULL);
    flexkv_space_desc d = space_desc("engine-7", 2, 2);

    worker_fork(&w);
    fresh_address(address);
    worker_agent(&w, address, "engine-7", 1, 1);
    assert_int_equal(flexkv_node_open(config, &node), 0);
    flexkv_config_destroy(config);
    assert_int_equal(flexkv_space_open(node, &d, &space), -EINVAL);     /* it does not listen */
    assert_int_equal(flexkv_node_listen(node, address), 0);
    assert_int_equal(flexkv_node_listen(node, address), -EBUSY);
    d.wait_ms = 400;
    assert_int_equal(flexkv_space_open(node, &d, &space), -ETIMEDOUT);
    assert_non_null(strstr(flexkv_last_error(), "1 of 2"));
    assert_non_null(strstr(flexkv_last_error(), "missing: 0"));
    assert_non_null(strstr(flexkv_last_error(), "engine-7"));
    flexkv_node_close(node);
    worker_end(&w);
}

static void one_address_one_node(void **state)
{
    char address[108], path[108], text[40];
    flexkv_node *a, *b;
    flexkv_config *config = small_config("1M", NULL);

    sprintf(path, "ipc:///tmp/flexkv-test-%d.sock", (int)getpid());
    fresh_address(address);
    assert_int_equal(flexkv_node_open(config, &a), 0);
    assert_int_equal(flexkv_node_open(config, &b), 0);
    assert_int_equal(flexkv_node_listen(b, "tcp://127.0.0.1:5"), -EINVAL);
    assert_int_equal(flexkv_node_listen(b, "ipc://"), -EINVAL);
    assert_int_equal(flexkv_node_listen(a, address), 0);
    assert_int_equal(flexkv_node_listen(b, address), -EADDRINUSE);
    sprintf(text, "process %d", (int)getpid());
    assert_non_null(strstr(flexkv_last_error(), text));
    assert_int_equal(flexkv_node_listen(b, path), 0);
    flexkv_node_close(a);
    assert_int_equal(flexkv_node_open(config, &a), 0);
    assert_int_equal(flexkv_node_listen(a, path), -EADDRINUSE);
    assert_non_null(strstr(flexkv_last_error(), "server_recv_port"));
    flexkv_node_close(b);
    assert_int_equal(access(path + 6, F_OK), -1);
    assert_int_equal(flexkv_node_listen(a, path), 0);
    flexkv_node_close(a);
    flexkv_config_destroy(config);
}

int main(void)
{
    fk_log_set_level(FK_LOG_CRITICAL);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(bytes_come_back),
        cmocka_unit_test(replicas_store_once),
        cmocka_unit_test(a_dead_worker_is_a_miss),
        cmocka_unit_test(a_worker_comes_back),
        cmocka_unit_test(a_stopped_worker_keeps_its_slots),
        cmocka_unit_test(revoked_is_not_copied),
        cmocka_unit_test(layers_are_waited_for),
        cmocka_unit_test(what_is_on_its_way_is_waited_for),
        cmocka_unit_test(host_copies_are_not_early),
        cmocka_unit_test(direct_storage_is_tried),
        cmocka_unit_test(missing_workers_are_named),
        cmocka_unit_test(one_address_one_node),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
