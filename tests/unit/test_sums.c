/*
 * test_sums.c - option gpu_checksums with host memory: a byte of the cpu tier changes, and is not
 * delivered. Engine, agent and node in one process, or the node's own copier. The cuda copier's part is in
 * tests/device/gpu_copy.c.
 */
#include "api/node_impl.h"
#include "copy/sum.h"
#include "process_rig.h"

/* ---- the sum itself ---- */

/* Any bit counts, and where a unit stands. */
static void every_bit_counts(void **state)
{
    static unsigned char data[4100], swap[16];
    uint64_t rng = 5;

    for (size_t i = 0; i < sizeof(data); i++)
        data[i] = (unsigned char)fk_rng_next(&rng);
    uint64_t whole = fk_sum(data, sizeof(data));
    for (size_t bit = 0; bit < sizeof(data) * 8; bit++) {
        data[bit / 8] ^= (unsigned char)(1 << bit % 8);
        assert_int_not_equal(fk_sum(data, sizeof(data)), whole);
        data[bit / 8] ^= (unsigned char)(1 << bit % 8);
    }
    for (size_t u = 16; u + 16 <= 4096; u += 16) {
        memcpy(swap, data, 16);
        memcpy(data, data + u, 16);
        memcpy(data + u, swap, 16);
        assert_int_not_equal(fk_sum(data, sizeof(data)), whole);
        memcpy(swap, data, 16);
        memcpy(data, data + u, 16);
        memcpy(data + u, swap, 16);
    }
    assert_int_equal(fk_sum(data, sizeof(data)), whole);
    memset(data, 0, sizeof(data));
    assert_int_not_equal(fk_sum(data, 64), fk_sum(data, 80));
    assert_int_not_equal(fk_sum(data, 0), 0);
}

/* Nobody's numbers change by accident: engines of several versions share a daemon. */
static void it_stays_what_it_is(void **state)
{
    unsigned char data[40];

    for (unsigned i = 0; i < sizeof(data); i++)
        data[i] = (unsigned char)(i * 7 + 1);
    assert_int_equal(fk_sum(data, sizeof(data)), 0x578a0b328d8b691eull);
}

/* ---- with a node ---- */

/* Agent and node of one process see the same memory at two addresses; ThreadSanitizer can't know that what
 * they say to each other there orders what they do. */
static void need_no_tsan(void)
{
#ifdef __SANITIZE_THREAD__
    skip();
#endif
}

struct rig {
    char address[108];
    unsigned char pages[REGIONS][PAGES][REGION_BYTES];
    flexkv_node *node;
    flexkv_space *space;
    flexkv_namespace *ns;
    flexkv_agent *agent;                /* NULL: the node's process has registered the pages itself */
};

static void rig_open(struct rig *r, bool agent, const char *cpu, const char *ssd)
{
    flexkv_region regions[REGIONS];
    flexkv_config *config = small_config(cpu, ssd);
    flexkv_space_desc d = space_desc(agent ? "engine" : NULL, 1, 1);
    uint32_t layers[REGIONS] = { 1, 1, 1 };

    memset(r, 0, sizeof(*r));
    assert_int_equal(flexkv_config_set(config, "gpu_checksums", "1"), 0);
    assert_int_equal(flexkv_node_open(config, &r->node), 0);
    flexkv_config_destroy(config);
    for (uint32_t i = 0; i < REGIONS; i++)
        regions[i] = (flexkv_region){ r->pages[i], REGION_BYTES, REGION_BYTES, PAGES };
    if (agent) {
        flexkv_agent_desc a = { .struct_bytes = sizeof(a), .instance = "engine", .replicas = 1,
                                .address = fresh_address(r->address), .layer_regions = layers,
                                .n_layers = REGIONS };
        assert_int_equal(flexkv_node_listen(r->node, r->address), 0);
        assert_int_equal(flexkv_agent_create(&a, regions, REGIONS, &r->agent), 0);
        d.wait_ms = 5000;
    } else {
        d.slice_bytes = SLICE_BYTES;
        d.workers = 0;
    }
    assert_int_equal(flexkv_space_open(r->node, &d, &r->space), 0);
    if (!agent)
        assert_int_equal(flexkv_regions_register(r->space, 0, regions, REGIONS), 0);
    assert_int_equal(flexkv_namespace_open(r->space, NULL, 0, &r->ns), 0);
}

static void rig_close(struct rig *r)
{
    flexkv_agent_close(r->agent);
    flexkv_node_close(r->node);
}

static void store(struct rig *r, uint32_t chain, uint32_t n)
{
    for (uint32_t i = 0; i < REGIONS; i++)
        for (uint32_t p = 0; p < n; p++)
            memset(r->pages[i][p], byte_of(chain, p, 0, i), REGION_BYTES);
    assert_int_equal(wait_op(r->node, put_chain(r->ns, chain, n, 0), 5000).status, 0);
}

static bool in_place(const struct rig *r, uint32_t chain, uint32_t n, uint32_t first_page)
{
    for (uint32_t i = 0; i < REGIONS; i++)
        for (uint32_t p = 0; p < n; p++)
            for (uint32_t b = 0; b < REGION_BYTES; b++)
                if (r->pages[i][first_page + p][b] != byte_of(chain, p, 0, i))
                    return false;
    return true;
}

/* The byte of a block in the cpu tier. */
static unsigned char *byte_in_pool(const struct rig *r, uint32_t chain, uint32_t block, uint32_t at)
{
    const struct fk_space *s = fk_local_node(r->node)->spaces;

    for (uint32_t slot = 0; slot < s->cpu_slots; slot++) {
        unsigned char *p = (unsigned char *)fk_pool_base(s->pool) + slot * s->slot_bytes;
        bool same = true;
        for (uint32_t i = 0; i < REGIONS; i++)
            for (uint32_t b = 0; b < REGION_BYTES; b++)
                same &= p[i * REGION_BYTES + b] == byte_of(chain, block, 0, i);
        if (same)
            return p + at;
    }
    fail_msg("block %u of chain %u is not in the pool", block, chain);
    return NULL;
}

static flexkv_completion load(struct rig *r, uint32_t chain, uint32_t n)
{
    uint64_t lease;

    memset(r->pages, 0xee, sizeof(r->pages));
    assert_int_equal(match_chain(r->ns, chain, n, &lease), n);
    return wait_op(r->node, get_chain(r->node, lease, n, 30, 0), 5000);
}

static void one_byte(struct rig *r)
{
    uint64_t lease;
    flexkv_stats st = { .struct_bytes = sizeof(st) };

    store(r, 3, 20);
    assert_int_equal(load(r, 3, 20).blocks_ok, 20);
    assert_true(in_place(r, 3, 20, 30));
    *byte_in_pool(r, 3, 7, SLICE_BYTES - 1) ^= 0x10;
    flexkv_completion c = load(r, 3, 20);
    assert_int_equal(c.status, -EBADMSG);
    assert_true(c.blocks_ok <= 7 && in_place(r, 3, c.blocks_ok, 30));
    assert_int_equal(flexkv_node_stats(r->node, &st), 0);
    assert_int_equal(st.cpu.errors, 1);
    assert_true(match_chain(r->ns, 3, 20, &lease) <= 7);        /* it is not offered again */
    if (lease)
        assert_int_equal(flexkv_release(r->node, lease), 0);
    store(r, 3, 20);
    assert_int_equal(load(r, 3, 20).blocks_ok, 20);
    assert_true(in_place(r, 3, 20, 30));
}

static void a_changed_byte_is_not_delivered(void **state)
{
    static struct rig r;

    for (int agent = 0; agent < 2; agent++) {
        if (agent)
            need_no_tsan();
        rig_open(&r, agent, "1M", NULL);
        one_byte(&r);
        rig_close(&r);
    }
}

/* The engine follows layers before the copy is over: nothing of such a load is. */
static void nor_by_layers(void **state)
{
    static struct rig r;
    uint32_t pages[20];
    uint64_t lease, op;
    flexkv_op_args a = { .struct_bytes = sizeof(a), .pages = pages, .flags = FLEXKV_OP_LAYERWISE };

    need_no_tsan();
    rig_open(&r, true, "1M", NULL);
    store(&r, 3, 20);
    *byte_in_pool(&r, 3, 19, 0) ^= 1;
    for (uint32_t i = 0; i < 20; i++)
        pages[i] = 30 + i;
    assert_int_equal(match_chain(r.ns, 3, 20, &lease), 20);
    assert_int_equal(flexkv_get(r.node, lease, 0, 20, &a, &op), 0);
    assert_int_equal(wait_op(r.node, op, 5000).status, -EBADMSG);
    for (uint32_t layer = 0; layer < REGIONS; layer++)
        assert_int_equal(flexkv_agent_wait_layer(r.agent, &op, 1, layer, NULL, 1000), -EBADMSG);
    rig_close(&r);
}

static void wait_written(const struct rig *r)
{
    flexkv_stats st = { .struct_bytes = sizeof(st) };
    uint64_t end = fk_clock_us() + 10000000;

    do {
        usleep(2000);
        assert_int_equal(flexkv_node_stats(r->node, &st), 0);
    } while (st.write_backlog_blocks && fk_clock_us() < end);
    assert_int_equal(st.write_backlog_blocks, 0);
}

/* A slot that gets other bytes from SSD is not measured by its old ones; and the SSD's copy takes the
 * place of one that has changed. */
static void blocks_from_ssd(void **state)
{
    static struct rig r;
    char dir[64], command[100];

    sprintf(dir, "flexkv-sums-%d", (int)getpid());
    rig_open(&r, false, "160K", dir);
    for (uint32_t chain = 1; chain < 6; chain++) {      /* 40 slots; 20 blocks each */
        store(&r, chain, 20);
        wait_written(&r);
    }
    for (uint32_t round = 0; round < 3; round++)
        for (uint32_t chain = 1; chain < 6; chain++) {
            flexkv_completion c = load(&r, chain, 20);
            assert_int_equal(c.status, 0);
            assert_true(in_place(&r, chain, 20, 30));
        }
    *byte_in_pool(&r, 5, 4, 700) ^= 0x80;
    assert_int_equal(load(&r, 5, 20).status, -EBADMSG);
    assert_int_equal(load(&r, 5, 20).blocks_ok, 20);
    assert_true(in_place(&r, 5, 20, 30));
    rig_close(&r);
    sprintf(command, "rm -rf %s", dir);
    assert_int_equal(system(command), 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_bit_counts),
        cmocka_unit_test(it_stays_what_it_is),
        cmocka_unit_test(a_changed_byte_is_not_delivered),
        cmocka_unit_test(nor_by_layers),
        cmocka_unit_test(blocks_from_ssd),
    };

    fk_log_set_level(FK_LOG_CRITICAL);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
