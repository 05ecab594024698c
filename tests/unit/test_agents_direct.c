/*
 * test_agents_direct.c - workers that read SSD blocks by themselves (GPU direct storage), past the cpu tier: the
 * whole way but for cuFile and the GPU, whose part the host copier plays (copy/host_files.c).
 */
#define REGION_BYTES 32768u              /* so large that blocks lie in both directories */
#include "process_rig.h"

#include <fcntl.h>

#define CHAIN 12u
#define CHAINS 8u                       /* far more than the cpu tier has room for */

struct rig {
    char address[108], dir[2][64];
    struct worker w[3];
    uint32_t ranks, n;
    flexkv_node *node;
    flexkv_space *space;
    flexkv_namespace *ns;
};

static void start_worker(struct rig *r, uint32_t i)
{
    struct order_msg m = { .order = ORDER_AGENT, .worker = i, .slice = i % r->ranks, .replica = i / r->ranks,
                           .replicas = r->n / r->ranks, .regions = REGIONS };

    strcpy(m.address, r->address);
    assert_int_equal(worker_order(&r->w[i], &m), 0);
}

static void open_rig(struct rig *r, uint32_t ranks, uint32_t workers, const char *spoil)
{
    static unsigned number;
    char dirs[140];

    *r = (struct rig){ .ranks = ranks, .n = workers };
    setenv("FKTEST_GDS_THROUGH_CPU", "1", 1);
    if (spoil)
        setenv("FKTEST_GDS_SPOIL", spoil, 1);
    fresh_address(r->address);
    for (int i = 0; i < 2; i++)
        snprintf(r->dir[i], sizeof(r->dir[i]), "flexkv-direct-%d-%u", (int)getpid(), number++);
    snprintf(dirs, sizeof(dirs), "%s;%s", r->dir[0], r->dir[1]);
    for (uint32_t i = 0; i < workers; i++)
        worker_fork(&r->w[i]);
    unsetenv("FKTEST_GDS_SPOIL");
    flexkv_config *config = small_config("1M", dirs);
    assert_int_equal(flexkv_config_set(config, "cpu_cache_blocks", "30"), 0);
    assert_int_equal(flexkv_config_set(config, "ssd_cache_blocks", "200"), 0);
    assert_int_equal(flexkv_config_set(config, "enable_gds", "1"), 0);
    for (uint32_t i = 0; i < workers; i++)
        start_worker(r, i);
    assert_int_equal(flexkv_node_open(config, &r->node), 0);
    flexkv_config_destroy(config);
    assert_int_equal(flexkv_node_listen(r->node, r->address), 0);
    flexkv_space_desc d = space_desc(NULL, ranks, workers);
    if (flexkv_space_open(r->node, &d, &r->space))
        fail_msg("%s", flexkv_last_error());
    assert_int_equal(flexkv_namespace_open(r->space, NULL, 0, &r->ns), 0);
}

static void close_rig(struct rig *r)
{
    char command[200];

    flexkv_node_close(r->node);
    for (uint32_t i = 0; i < r->n; i++)
        worker_end(&r->w[i]);
    snprintf(command, sizeof(command), "rm -rf %s %s", r->dir[0], r->dir[1]);
    assert_int_equal(system(command), 0);
}

static flexkv_stats stats_of(struct rig *r)
{
    flexkv_stats st = { .struct_bytes = sizeof(st) };

    assert_int_equal(flexkv_node_stats(r->node, &st), 0);
    return st;
}

/* Each written to the SSD before the next comes: the first ones then are only there. */
static void store_chains(struct rig *r)
{
    for (uint32_t c = 0; c < CHAINS; c++) {
        for (uint32_t w = 0; w < r->n; w++)
            fill_pages(&r->w[w], c, w % r->ranks, CHAIN, 0);
        assert_int_equal(wait_op(r->node, put_chain(r->ns, c, CHAIN, 0), 5000).blocks_ok, CHAIN);
        for (int i = 0; i < 5000 && stats_of(r).ssd.stored_blocks < (c + 1) * CHAIN; i++)
            usleep(1000);
        assert_int_equal(stats_of(r).ssd.stored_blocks, (c + 1) * CHAIN);
    }
}

static flexkv_match_result match(struct rig *r, uint32_t chain)
{
    flexkv_key keys[CHAIN];
    flexkv_match_result m;

    chain_keys(r->ns, chain, CHAIN, keys);
    assert_int_equal(flexkv_match(r->ns, keys, CHAIN, &m), 0);
    return m;
}

static uint32_t get(struct rig *r, uint32_t chain)
{
    flexkv_match_result m = match(r, chain);

    for (uint32_t w = 0; w < r->n; w++)
        wipe(&r->w[w]);
    assert_int_equal(m.blocks, CHAIN);
    return wait_op(r->node, get_chain(r->node, m.lease, CHAIN, 20, 0), 5000).blocks_ok;
}

static void expect(const struct rig *r, uint32_t chain, uint32_t n)
{
    for (uint32_t w = 0; w < r->n; w++)
        assert_true(pages_are(&r->w[w], chain, w % r->ranks, n, 20));
}

static uint32_t on_ssd_only(struct rig *r, uint32_t chain)
{
    flexkv_match_result m = match(r, chain);

    assert_int_equal(flexkv_release(r->node, m.lease), 0);
    return m.ssd_blocks;
}

static void past_the_cpu_tier(void **state)
{
    static const struct { uint32_t ranks, workers; } shapes[] = { { 1, 1 }, { 2, 2 }, { 3, 3 }, { 1, 2 } };

    for (size_t i = 0; i < fk_array_size(shapes); i++) {
        struct rig r;
        open_rig(&r, shapes[i].ranks, shapes[i].workers, NULL);
        store_chains(&r);
        uint64_t from_ssd = stats_of(&r).ssd.bytes_read;
        for (uint32_t c = 0; c < 4; c++) {
            uint32_t before = on_ssd_only(&r, c);
            assert_true(before > 0);
            assert_int_equal(get(&r, c), CHAIN);
            expect(&r, c, CHAIN);
            assert_int_equal(on_ssd_only(&r, c), before);       /* nothing was brought to the cpu tier */
        }
        assert_int_equal(stats_of(&r).ssd.bytes_read, from_ssd);
        close_rig(&r);
    }
}

/* The file is sound, what a worker reads of it is not: the block comes by the other way. */
static void what_is_read_wrong_comes_through_the_cpu_tier(void **state)
{
    struct rig r;

    open_rig(&r, 2, 2, "5");
    store_chains(&r);
    for (uint32_t c = 0; c < 4; c++) {
        assert_int_equal(get(&r, c), CHAIN);
        expect(&r, c, CHAIN);
    }
    assert_true(stats_of(&r).ssd.bytes_read > 0);
    assert_int_equal(stats_of(&r).ssd.errors, 0);
    close_rig(&r);
}

/* After some failures in a row it is not tried any more. */
static void where_all_is_wrong_it_ends(void **state)
{
    struct rig r;

    open_rig(&r, 1, 1, "1");
    store_chains(&r);
    for (uint32_t round = 0; round < 4; round++)
        for (uint32_t c = 0; c < CHAINS; c++) {
            assert_int_equal(get(&r, c), CHAIN);
            expect(&r, c, CHAIN);
        }
    assert_int_equal(stats_of(&r).ssd.errors, 0);
    close_rig(&r);
}

/* The block on the SSD is no good: neither way gives it. */
static void spoilt_on_the_ssd_is_a_miss(void **state)
{
    struct rig r;
    char path[120];
    unsigned char *page = aligned_alloc(4096, 4096);

    open_rig(&r, 1, 1, NULL);
    store_chains(&r);
    assert_true(on_ssd_only(&r, 0) == CHAIN);
    snprintf(path, sizeof(path), "%s/default.data", r.dir[0]);
    int fd = open(path, O_RDWR | O_DIRECT);
    assert_true(fd >= 0);
    off_t at = (1 << 20) + 4 * REGIONS * REGION_BYTES + 4096;   /* chain 0 has the first slots */
    assert_int_equal(pread(fd, page, 4096, at), 4096);
    page[77] ^= 1;
    assert_int_equal(pwrite(fd, page, 4096, at), 4096);
    close(fd);
    uint32_t ok = get(&r, 0);
    assert_true(ok < CHAIN);
    expect(&r, 0, ok);
    assert_int_equal(stats_of(&r).ssd.errors, 1);
    assert_int_equal(get(&r, 1), CHAIN);
    expect(&r, 1, CHAIN);
    free(page);
    close_rig(&r);
}

static void a_worker_comes_back(void **state)
{
    struct rig r;
    flexkv_match_result m;

    open_rig(&r, 2, 2, NULL);
    store_chains(&r);
    assert_int_equal(get(&r, 0), CHAIN);
    worker_simple(&r.w[1], ORDER_CLOSE);
    start_worker(&r, 1);
    for (int i = 0; i < 5000; i++) {    /* it registers by itself */
        uint64_t op;
        uint32_t pages[CHAIN];
        flexkv_op_args a = { .struct_bytes = sizeof(a), .pages = pages };
        m = match(&r, 1);
        for (uint32_t k = 0; k < CHAIN; k++)
            pages[k] = 20 + k;
        int rc = flexkv_get(r.node, m.lease, 0, CHAIN, &a, &op);
        if (!rc && wait_op(r.node, op, 5000).blocks_ok == CHAIN)
            break;
        if (rc)
            (void)flexkv_release(r.node, m.lease);
        usleep(1000);
    }
    expect(&r, 1, CHAIN);
    assert_int_equal(get(&r, 2), CHAIN);
    expect(&r, 2, CHAIN);
    close_rig(&r);
}

/* It is on the SSD, and that is where workers read it. */
static void a_prefetch_has_nothing_to_do(void **state)
{
    struct rig r;
    flexkv_key keys[CHAIN];
    uint64_t op;
    flexkv_op_args a = { .struct_bytes = sizeof(a) };

    open_rig(&r, 1, 1, NULL);
    store_chains(&r);
    uint32_t before = on_ssd_only(&r, 0);
    chain_keys(r.ns, 0, CHAIN, keys);
    assert_int_equal(flexkv_prefetch(r.ns, keys, CHAIN, &a, &op), 0);
    assert_int_equal(wait_op(r.node, op, 5000).status, 0);
    assert_int_equal(on_ssd_only(&r, 0), before);
    close_rig(&r);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(past_the_cpu_tier),
        cmocka_unit_test(what_is_read_wrong_comes_through_the_cpu_tier),
        cmocka_unit_test(where_all_is_wrong_it_ends),
        cmocka_unit_test(spoilt_on_the_ssd_is_a_miss),
        cmocka_unit_test(a_worker_comes_back),
        cmocka_unit_test(a_prefetch_has_nothing_to_do),
    };

    fk_log_set_level(FK_LOG_CRITICAL);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
