/*
 * test_api.c - include/flexkv/flexkv.h on a real node in memory: configuration, spaces, namespaces,
 * regions, keys, put and get with their bytes, completions and eventfd, leases, cancel, quotas,
 * reset, statistics, closing. With an SSD: test_api_ssd.c. Many threads: test_api_stress.c.
 */
#include <sys/mman.h>
#include <sys/wait.h>

#include <pthread.h>

#include "api_rig.h"

/* ---- opening ---- */

static void expect_open_error(const char *const *options, int rc, const char *word)
{
    flexkv_node *node = NULL;

    assert_int_equal(try_open(options, &node), rc);
    if (!strstr(flexkv_last_error(), word))
        fail_msg("\"%s\" does not name %s", flexkv_last_error(), word);
}
#define OPTIONS(...) ((const char *const[]){ __VA_ARGS__, NULL })

static void bad_settings_are_named(void **state)
{
    expect_open_error(OPTIONS("evict_ratio", "1.5"), -EINVAL, "evict_ratio");
    expect_open_error(OPTIONS("eviction_policy", "best"), -EINVAL, "eviction_policy");
    expect_open_error(OPTIONS("cpu_cash_gb", "1"), -ENOENT, "cpu_cache_gb");
    expect_open_error(OPTIONS("op_timeout_ms", "-1"), -EINVAL, "op_timeout_ms");
    expect_open_error(OPTIONS("max_spaces", "zero"), -EINVAL, "max_spaces");
}

static void a_config_is_frozen_by_opening(void **state)
{
    flexkv_config *c;
    flexkv_node *a, *b;

    assert_int_equal(flexkv_config_create(&c), 0);
    set(c, "cpu_cache_blocks", "16");
    assert_int_equal(flexkv_node_open(c, &a), 0);
    assert_int_equal(flexkv_config_set(c, "cpu_cache_blocks", "32"), -EBUSY);
    assert_int_equal(flexkv_config_load_env(c), -EBUSY);
    assert_int_equal(flexkv_node_open(c, &b), 0);       /* it may be opened again */
    flexkv_config_destroy(c);                           /* and destroyed before the nodes */
    flexkv_node_close(a);
    flexkv_node_close(b);
    flexkv_node_close(NULL);
    flexkv_config_destroy(NULL);
}

static void what_could_not_be_loaded_is_not_opened(void **state)
{
    flexkv_config *c;
    flexkv_node *node;

    assert_int_equal(flexkv_config_create(&c), 0);
    assert_int_equal(flexkv_config_load_file(c, "/nowhere/flexkv.yaml"), -ENOENT);
    assert_non_null(strstr(flexkv_last_error(), "/nowhere/flexkv.yaml"));
    assert_int_equal(flexkv_node_open(c, &node), -ENOENT);
    flexkv_config_destroy(c);
}

static void what_is_set_counts_whatever_the_order(void **state)
{
    flexkv_config *c;
    struct api a;

    assert_int_equal(flexkv_config_create(&c), 0);
    assert_int_equal(flexkv_config_load_default(c), 0);
    set(c, "cpu_cache_blocks", "24");
    assert_int_equal(flexkv_node_open(c, &a.node), 0);
    flexkv_config_destroy(c);
    for (int r = 0; r < RANKS; r++)
        for (int i = 0; i < REGIONS; i++)
            a.memory[r][i] = calloc(PAGES, region_page_bytes[i] + 24);
    open_space(&a);
    assert_int_equal(stats_of(a.node).cpu.slots, 24);
    close_node(&a);
}

/* ---- spaces and namespaces ---- */

static void spaces_are_told_apart_by_name_and_description(void **state)
{
    flexkv_node *node;
    flexkv_space *s, *same, *other;
    flexkv_space_desc d = desc_of("one");

    assert_int_equal(try_open(OPTIONS("max_spaces", "2"), &node), 0);
    assert_int_equal(flexkv_space_open(node, &d, &s), 0);
    assert_int_equal(flexkv_space_open(node, &d, &same), 0);
    assert_ptr_equal(s, same);
    for (int i = 0; i < 4; i++) {
        flexkv_space_desc changed = d;
        changed.fingerprint = i == 0 ? "test-other" : d.fingerprint;
        changed.tokens_per_block += i == 1;
        changed.ranks += i == 2;
        changed.slice_bytes += i == 3;
        assert_int_equal(flexkv_space_open(node, &changed, &other), -EEXIST);
        assert_non_null(strstr(flexkv_last_error(), "one"));
    }
    d.name = "two";
    assert_int_equal(flexkv_space_open(node, &d, &other), 0);
    assert_ptr_not_equal(other, s);
    d.name = "three";
    assert_int_equal(flexkv_space_open(node, &d, &other), -ENOSPC);
    assert_non_null(strstr(flexkv_last_error(), "max_spaces"));
    assert_int_equal(stats_of(node).cpu.slots, 64);     /* a half for each */
    flexkv_node_close(node);
}

static void impossible_spaces_are_refused(void **state)
{
    static const char *const names[] = { "", ".hidden", "a/b", "a b", "\xc3\xa4" };
    flexkv_node *node;
    flexkv_space *s;

    assert_int_equal(try_open(NULL, &node), 0);
    for (size_t i = 0; i < fk_array_size(names); i++) {
        flexkv_space_desc d = desc_of(names[i]);
        assert_int_equal(flexkv_space_open(node, &d, &s), -EINVAL);
    }
    for (int i = 0; i < 6; i++) {
        flexkv_space_desc d = desc_of("x");
        if (i == 0)
            d.struct_bytes = 0;
        else if (i == 1)
            d.tokens_per_block = 0;
        else if (i == 2)
            d.ranks = 0;
        else if (i == 3)
            d.slice_bytes = 0;
        else if (i == 4)
            d.ranks = UINT32_MAX;
        else
            d.slice_bytes = UINT64_MAX;
        assert_int_equal(flexkv_space_open(node, &d, &s), -EINVAL);
        assert_true(*flexkv_last_error());
    }
    flexkv_node_close(node);

    assert_int_equal(try_open(OPTIONS("cpu_cache_blocks", "0", "cpu_cache_gb", "4K"), &node), 0);
    flexkv_space_desc d = desc_of("x");
    assert_int_equal(flexkv_space_open(node, &d, &s), -EINVAL);     /* not room for one block */
    assert_non_null(strstr(flexkv_last_error(), "cpu_cache_gb"));
    flexkv_node_close(node);
}

static void namespaces_do_not_see_each_other(void **state)
{
    static const char *const ab_c[] = { "ab", "c" }, *const a_bc[] = { "a", "bc" };
    flexkv_namespace *ns[3], *again, *def;
    struct api a;
    uint32_t tokens[TOKENS_PER_BLOCK] = { 1, 2, 3, 4 };
    flexkv_key k[3];
    flexkv_match_result m;

    open_node(&a, NULL);
    def = ns[0] = a.ns;
    assert_int_equal(flexkv_namespace_open(a.space, ab_c, 2, &ns[1]), 0);
    assert_int_equal(flexkv_namespace_open(a.space, a_bc, 2, &ns[2]), 0);
    assert_int_equal(flexkv_namespace_open(a.space, ab_c, 2, &again), 0);
    assert_ptr_equal(again, ns[1]);
    assert_int_equal(flexkv_namespace_open(a.space, NULL, 0, &again), 0);
    assert_ptr_equal(again, def);
    for (int i = 0; i < 3; i++)
        assert_int_equal(flexkv_keys_from_tokens(ns[i], NULL, tokens, TOKENS_PER_BLOCK, &k[i]), 1);
    for (int i = 0; i < 3; i++)
        for (int j = 0; j < i; j++)
            assert_memory_not_equal(&k[i], &k[j], sizeof(k[0]));
    a.ns = ns[1];
    assert_int_equal(put_chain(&a, 1, 4).blocks_ok, 4);
    assert_int_equal(get_and_check(&a, 1, 4), 4);
    a.ns = ns[2];
    assert_int_equal(matched(&a, 1, 4), 0);
    a.ns = def;
    assert_int_equal(matched(&a, 1, 4), 0);
    assert_int_equal(flexkv_match(ns[1], &k[1], 0, &m), 0);
    assert_int_equal(m.lease, 0);
    close_node(&a);
}

/* ---- keys ---- */

static void keys_cover_whole_blocks_and_chain(void **state)
{
    struct api a;
    uint32_t tokens[19];
    flexkv_key whole[4], part[4];
    unsigned char hashes[64];

    open_node(&a, NULL);
    for (uint32_t i = 0; i < 19; i++)
        tokens[i] = i;
    assert_int_equal(flexkv_keys_from_tokens(a.ns, NULL, tokens, 3, whole), 0);
    assert_int_equal(flexkv_keys_from_tokens(a.ns, NULL, tokens, 19, whole), 4);
    assert_int_equal(flexkv_keys_from_tokens(a.ns, NULL, tokens, 8, part), 2);
    assert_int_equal(flexkv_keys_from_tokens(a.ns, &part[1], tokens + 8, 8, part + 2), 2);
    assert_memory_equal(whole, part, sizeof(whole));
    for (unsigned i = 0; i < sizeof(hashes); i++)
        hashes[i] = (unsigned char)i;
    assert_int_equal(flexkv_keys_from_hashes(a.ns, hashes, 32, 32, 2, part), 2);
    assert_int_equal(flexkv_keys_from_hashes(a.ns, hashes, 7, 8, 2, part), 0);
    close_node(&a);
}

/* ---- regions ---- */

static void impossible_regions_are_refused(void **state)
{
    struct api a;
    flexkv_region r[REGIONS];

    open_node(&a, NULL);
    assert_int_equal(flexkv_regions_unregister(a.space, 0), 0);
    assert_int_equal(flexkv_regions_unregister(a.space, 0), -ENOENT);
    assert_int_equal(flexkv_regions_unregister(a.space, RANKS), -EINVAL);
    for (int i = 0; i < 7; i++) {
        for (int k = 0; k < REGIONS; k++)
            r[k] = (flexkv_region){ a.memory[0][k], region_page_bytes[k], region_page_bytes[k], PAGES };
        if (i == 0)
            r[0].base = NULL;
        else if (i == 1)
            r[1].stride--;
        else if (i == 2)
            r[1].pages--;
        else if (i == 3)
            r[0].page_bytes--;
        else if (i == 4)
            r[0].page_bytes = r[0].stride = UINT64_MAX;
        size_t n = i == 5 ? 1 : i == 6 ? 0 : REGIONS;
        assert_int_equal(flexkv_regions_register(a.space, 0, r, n), -EINVAL);
        assert_true(*flexkv_last_error());
    }
    register_rank(&a, 0);
    for (int k = 0; k < REGIONS; k++)
        r[k] = (flexkv_region){ a.memory[0][k], region_page_bytes[k], region_page_bytes[k], PAGES };
    assert_int_equal(flexkv_regions_register(a.space, 0, r, REGIONS), -EEXIST);
    assert_int_equal(flexkv_regions_register(a.space, RANKS, r, REGIONS), -EINVAL);
    close_node(&a);
}

static void all_ranks_are_needed(void **state)
{
    struct api a;
    uint32_t pages[MAX_CHAIN];
    flexkv_op_args args = args_from(0, pages);
    flexkv_key keys[4];
    uint64_t op = 0;

    open_node(&a, NULL);
    chain_of(&a, 1, keys, 4);
    assert_int_equal(flexkv_regions_unregister(a.space, 1), 0);
    assert_int_equal(flexkv_put(a.ns, keys, 4, 0, &args, &op), -ENOTCONN);
    register_rank(&a, 1);
    assert_int_equal(put_chain(&a, 1, 4).blocks_ok, 4);
    flexkv_match_result m = match_chain(&a, 1, 4);
    assert_int_equal(flexkv_regions_unregister(a.space, 0), 0);
    assert_int_equal(flexkv_get(a.node, m.lease, 0, 4, &args, &op), -ENOTCONN);
    register_rank(&a, 0);
    assert_int_equal(get_and_check(&a, 1, 4), 4);
    close_node(&a);
}

/* After unregister nobody touches the memory: it is taken away at once. */
static void unregistered_memory_is_not_touched(void **state)
{
    enum { BYTES = PAGES * 4096 };
    struct api a;
    uint32_t pages[MAX_CHAIN];
    flexkv_op_args args = args_from(0, pages);
    flexkv_key keys[MAX_CHAIN];
    flexkv_completion c[64];

    open_node(&a, NULL);
    assert_int_equal(flexkv_regions_unregister(a.space, 0), 0);
    for (uint32_t round = 0; round < 60; round++) {
        char *p = mmap(NULL, BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        flexkv_region r[2] = { { p, 4096, 4072, PAGES } };
        assert_int_equal(flexkv_regions_register(a.space, 0, r, 1), 0);
        for (uint32_t chain = 0; chain < 4; chain++) {
            chain_of(&a, round * 4 + chain + 10, keys, 32);
            assert_int_equal(flexkv_put(a.ns, keys, 32, 0, &args, NULL), 0);
        }
        usleep(round * 20);
        assert_int_equal(flexkv_regions_unregister(a.space, 0), 0);
        munmap(p, BYTES);
        int n = 0;
        while (n < 4) {
            int k = flexkv_poll(a.node, c, 64, 20000);
            assert_true(k > 0);
            n += k;
        }
        assert_int_equal(n, 4);
    }
    close_node(&a);
}

/* ---- put and get ---- */

static void bytes_come_back_on_every_rank(void **state)
{
    struct api a;

    open_node(&a, NULL);
    for (uint32_t chain = 1; chain <= 5; chain++) {
        flexkv_completion c = put_chain(&a, chain, 12);
        assert_int_equal(c.status, 0);
        assert_int_equal(c.blocks, 12);
        assert_int_equal(c.blocks_ok, 12);
        assert_int_equal(c.kind, FLEXKV_OP_PUT);
        assert_int_equal(c.flags, 0);
    }
    for (uint32_t chain = 1; chain <= 5; chain++)
        assert_int_equal(get_and_check(&a, chain, 20), 12);
    assert_int_equal(stats_of(a.node).cpu.bytes_written, 5 * 12 * RANKS * SLICE_BYTES);
    assert_int_equal(stats_of(a.node).cpu.bytes_read, 5 * 12 * RANKS * SLICE_BYTES);
    close_node(&a);
}

static void results_and_user_data_come_back(void **state)
{
    struct api a;
    uint32_t pages[MAX_CHAIN];
    flexkv_op_args args = args_from(0, pages);
    flexkv_key keys[4];
    int8_t results[4] = { 77, 77, 77, 77 };
    uint64_t op;

    open_node(&a, NULL);
    chain_of(&a, 1, keys, 4);
    args.user_data = &a;
    args.results = results;
    assert_int_equal(flexkv_put(a.ns, keys, 4, 0, &args, &op), 0);
    flexkv_completion c = wait_for(&a, op);
    assert_ptr_equal(c.user_data, &a);
    for (int i = 0; i < 4; i++)
        assert_int_equal(results[i], 0);
    close_node(&a);
}

static void bad_arguments_change_nothing(void **state)
{
    struct api a;
    uint32_t pages[MAX_CHAIN];
    flexkv_op_args args = args_from(0, pages), unset = { .struct_bytes = 0 };
    flexkv_key keys[8];
    uint64_t op = 0;
    flexkv_completion c;

    open_node(&a, NULL);
    put_chain(&a, 1, 4);
    chain_of(&a, 2, keys, 8);
    flexkv_match_result m = match_chain(&a, 1, 4);
    pages[2] = PAGES;
    assert_int_equal(flexkv_put(a.ns, keys, 8, 0, &args, &op), -EINVAL);
    assert_non_null(strstr(flexkv_last_error(), "256"));
    assert_int_equal(flexkv_get(a.node, m.lease, 0, 4, &args, &op), -EINVAL);
    pages[2] = 2;
    assert_int_equal(flexkv_put(a.ns, keys, 3, 4, &args, &op), -EINVAL);
    assert_int_equal(flexkv_put(a.ns, keys, 8, 0, &unset, &op), -EINVAL);
    assert_int_equal(flexkv_put(a.ns, keys, 8, 0, NULL, &op), -EINVAL);
    assert_int_equal(flexkv_get(a.node, m.lease, 0, 4, NULL, &op), -EINVAL);
    assert_int_equal(flexkv_get(a.node, m.lease, 3, 2, &args, &op), -EINVAL);
    assert_int_equal(flexkv_prefetch(a.ns, keys, 8, NULL, &op), -EINVAL);
    args.pages = NULL;
    assert_int_equal(flexkv_put(a.ns, keys, 8, 0, &args, &op), -EINVAL);
    assert_int_equal(flexkv_poll(a.node, &c, 1, 0), 0);
    assert_int_equal(flexkv_poll(a.node, &c, 0, 0), -EINVAL);
    assert_int_equal(matched(&a, 2, 8), 0);
    args = args_from(0, pages);
    assert_int_equal(flexkv_get(a.node, m.lease, 0, 4, &args, &op), 0);     /* still good */
    wait_for(&a, op);
    assert_int_equal(flexkv_get(a.node, m.lease, 0, 4, &args, &op), -ENOENT);
    assert_int_equal(flexkv_release(a.node, m.lease), -ENOENT);
    m = match_chain(&a, 1, 4);
    assert_int_equal(flexkv_release(a.node, m.lease), 0);
    assert_int_equal(flexkv_release(a.node, m.lease), -ENOENT);
    assert_int_equal(flexkv_cancel(a.node, op), -ENOENT);
    close_node(&a);
}

static void a_lease_runs_out(void **state)
{
    struct api a;

    open_node(&a, OPTIONS("lease_timeout_ms", "30"));
    put_chain(&a, 1, 4);
    flexkv_match_result m = match_chain(&a, 1, 4);
    uint64_t deadline = fk_clock_us() + 10000000;
    while (stats_of(a.node).leases && fk_clock_us() < deadline)
        usleep(1000);
    assert_int_equal(stats_of(a.node).leases, 0);
    assert_int_equal(flexkv_release(a.node, m.lease), -ENOENT);
    close_node(&a);
}

static void a_cancelled_operation_ends_once(void **state)
{
    struct api a;
    uint32_t pages[MAX_CHAIN], cancelled = 0;
    flexkv_op_args args = args_from(0, pages);
    flexkv_key keys[MAX_CHAIN];
    flexkv_completion c;
    uint64_t op;

    open_node(&a, NULL);
    for (uint32_t i = 0; i < 200; i++) {
        chain_of(&a, 1000 + i, keys, 40);
        assert_int_equal(flexkv_put(a.ns, keys, 40, 0, &args, &op), 0);
        int rc = flexkv_cancel(a.node, op);
        assert_true(rc == 0 || rc == -ENOENT);
        c = wait_for(&a, op);
        assert_true(c.status == 0 || (c.status == -ECANCELED && rc == 0));
        cancelled += c.status == -ECANCELED;
        assert_int_equal(flexkv_cancel(a.node, op), -ENOENT);
        assert_int_equal(flexkv_poll(a.node, &c, 1, 0), 0);
    }
    assert_int_equal(stats_of(a.node).cancelled, cancelled);
    close_node(&a);
}

static void quotas_come_from_the_config(void **state)
{
    static const char *const tenant[] = { "tenant", "lora7" };
    struct api a;

    open_node(&a, OPTIONS("namespaces", "tenant:max=25%"));
    assert_int_equal(flexkv_namespace_open(a.space, tenant, 2, &a.ns), 0);
    flexkv_completion c = put_chain(&a, 1, 40);
    assert_int_equal(c.blocks_ok, 16);
    assert_int_equal(c.status, -ENOSPC);
    assert_int_equal(flexkv_namespace_open(a.space, NULL, 0, &a.ns), 0);
    assert_int_equal(put_chain(&a, 1, 40).blocks_ok, 40);
    close_node(&a);
}

/* ---- completions ---- */

static void fd_is_readable_while_completions_wait(void **state)
{
    struct api a;
    uint32_t pages[MAX_CHAIN];
    flexkv_op_args args = args_from(0, pages);
    flexkv_key keys[4];
    flexkv_completion c[2];

    open_node(&a, NULL);
    for (uint32_t round = 0; round < 50; round++) {
        assert_false(fd_readable(a.node, 0));
        for (uint32_t i = 0; i < 2; i++) {
            chain_of(&a, 2 * round + i, keys, 4);
            assert_int_equal(flexkv_put(a.ns, keys, 4, 0, &args, NULL), 0);
        }
        assert_true(fd_readable(a.node, 20000));
        while (stats_of(a.node).operations)
            usleep(100);
        assert_int_equal(flexkv_poll(a.node, c, 1, 0), 1);
        assert_true(fd_readable(a.node, 0));            /* one is left */
        assert_int_equal(flexkv_poll(a.node, c, 2, 0), 1);
        assert_false(fd_readable(a.node, 0));
    }
    close_node(&a);
}

static void poll_waits_no_longer_than_told(void **state)
{
    struct api a;
    flexkv_completion c;

    open_node(&a, NULL);
    uint64_t start = fk_clock_us();
    assert_int_equal(flexkv_poll(a.node, &c, 1, 0), 0);
    assert_int_equal(flexkv_poll(a.node, &c, 1, 40), 0);
    uint64_t took = fk_clock_us() - start;
    assert_in_range(took, 39000, 5000000);
    close_node(&a);
}

struct poller { flexkv_node *node; _Atomic uint32_t *left; pthread_t thread; };

static void *poll_until_done(void *arg)
{
    struct poller *p = arg;
    flexkv_completion c[3];

    while (*p->left) {
        int n = flexkv_poll(p->node, c, 3, 20);
        if (n < 0)
            break;
        *p->left -= (uint32_t)n;
    }
    return NULL;
}

static void several_pollers_share_the_completions(void **state)
{
    enum { OPS = 400, POLLERS = 4 };
    struct api a;
    uint32_t pages[MAX_CHAIN];
    flexkv_op_args args = args_from(0, pages);
    flexkv_key keys[4];
    _Atomic uint32_t left = OPS;
    struct poller p[POLLERS];
    uint64_t start = fk_clock_us();

    open_node(&a, NULL);
    for (int i = 0; i < POLLERS; i++) {
        p[i] = (struct poller){ .node = a.node, .left = &left };
        pthread_create(&p[i].thread, NULL, poll_until_done, &p[i]);
    }
    for (uint32_t i = 0; i < OPS; i++) {
        chain_of(&a, i, keys, 2);
        assert_int_equal(flexkv_put(a.ns, keys, 2, 0, &args, NULL), 0);
    }
    for (int i = 0; i < POLLERS; i++)
        pthread_join(p[i].thread, NULL);
    assert_int_equal(left, 0);
    assert_true(fk_clock_us() - start < 60000000);
    assert_false(fd_readable(a.node, 0));
    close_node(&a);
}

/* ---- reset, statistics, closing ---- */

static void reset_forgets_all(void **state)
{
    struct api a;

    open_node(&a, NULL);
    put_chain(&a, 1, 20);
    flexkv_match_result m = match_chain(&a, 1, 20);
    assert_int_equal(flexkv_reset(a.node), 0);
    assert_int_equal(matched(&a, 1, 20), 0);
    assert_int_equal(flexkv_release(a.node, m.lease), -ENOENT);
    assert_int_equal(stats_of(a.node).cpu.free_slots, 64);
    assert_int_equal(put_chain(&a, 1, 20).blocks_ok, 20);
    assert_int_equal(get_and_check(&a, 1, 20), 20);
    close_node(&a);
}

static void statistics_add_up(void **state)
{
    struct api a;
    flexkv_stats before, now, bad = { .struct_bytes = 0 };
    uint64_t old[3] = { sizeof(size_t) + 8, 0, 0x1122334455667788 };

    open_node(&a, NULL);
    before = stats_of(a.node);
    for (uint32_t i = 0; i < 30; i++) {
        put_chain(&a, i, 8);
        get_and_check(&a, i % 7, 8);
        now = stats_of(a.node);
        assert_true(now.puts == before.puts + 1 && now.gets >= before.gets);
        assert_true(now.put_blocks == before.put_blocks + 8);
        assert_true(now.cpu.stored_blocks >= before.cpu.stored_blocks);
        assert_true(now.cpu.evicted_blocks >= before.cpu.evicted_blocks);
        assert_int_equal(now.match_blocks + now.miss_blocks, (i + 1) * 8);
        assert_int_equal(now.blocks, 64 - now.cpu.free_slots);
        assert_int_equal(now.operations + now.leases, 0);
        before = now;
    }
    assert_int_equal(flexkv_node_stats(a.node, &bad), -EINVAL);
    assert_int_equal(flexkv_node_stats(a.node, (flexkv_stats *)(void *)old), 0);
    assert_int_equal(old[1], now.matches);              /* an older struct gets what it has */
    assert_true(old[2] == 0x1122334455667788);
    close_node(&a);
}

static void closing_ends_what_is_under_way(void **state)
{
    for (uint32_t round = 0; round < 40; round++) {
        struct api a;
        uint32_t pages[MAX_CHAIN];
        flexkv_op_args args = args_from(0, pages);
        flexkv_key keys[MAX_CHAIN];
        open_node(&a, NULL);
        for (uint32_t i = 0; i < 20; i++) {
            chain_of(&a, i, keys, 30);
            assert_int_equal(flexkv_put(a.ns, keys, 30, 0, &args, NULL), 0);
        }
        (void)match_chain(&a, 1, 20);
        usleep(round * 10);
        uint64_t start = fk_clock_us();
        close_node(&a);
        assert_true(fk_clock_us() - start < 10000000);
    }
}

struct opener { flexkv_node *node; flexkv_space *space; int rc; pthread_t thread; char name[8]; };

static void *open_one(void *arg)
{
    struct opener *o = arg;
    flexkv_space_desc d = desc_of(o->name);

    o->rc = flexkv_space_open(o->node, &d, &o->space);
    return NULL;
}

static void spaces_may_be_opened_by_many_threads(void **state)
{
    struct opener o[8];
    flexkv_node *node;

    for (int round = 0; round < 5; round++) {
        assert_int_equal(try_open(OPTIONS("max_spaces", "4"), &node), 0);
        for (int i = 0; i < 8; i++) {
            o[i] = (struct opener){ .node = node };
            snprintf(o[i].name, sizeof(o[i].name), "s%d", i % 4);
            pthread_create(&o[i].thread, NULL, open_one, &o[i]);
        }
        for (int i = 0; i < 8; i++) {
            pthread_join(o[i].thread, NULL);
            assert_int_equal(o[i].rc, 0);
        }
        for (int i = 0; i < 4; i++)
            assert_ptr_equal(o[i].space, o[i + 4].space);
        flexkv_node_close(node);
    }
}

/* A child must not touch the node; that it is born and ends does the parent no harm. */
static void a_child_does_no_harm(void **state)
{
    struct api a;
    int status;

    open_node(&a, NULL);
    put_chain(&a, 1, 8);
    pid_t pid = fork();
    assert_true(pid >= 0);
    if (pid == 0)
        _exit(0);
    assert_int_equal(waitpid(pid, &status, 0), pid);
    assert_int_equal(get_and_check(&a, 1, 8), 8);
    assert_int_equal(put_chain(&a, 2, 8).blocks_ok, 8);
    close_node(&a);
}

static void the_last_error_belongs_to_its_thread(void **state)
{
    flexkv_node *node = NULL;

    assert_non_null(flexkv_last_error());
    assert_int_equal(try_open(OPTIONS("evict_ratio", "x"), &node), -EINVAL);
    assert_non_null(strstr(flexkv_last_error(), "evict_ratio"));
    assert_true(*flexkv_version());
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(bad_settings_are_named),
        cmocka_unit_test(a_config_is_frozen_by_opening),
        cmocka_unit_test(what_could_not_be_loaded_is_not_opened),
        cmocka_unit_test(what_is_set_counts_whatever_the_order),
        cmocka_unit_test(spaces_are_told_apart_by_name_and_description),
        cmocka_unit_test(impossible_spaces_are_refused),
        cmocka_unit_test(namespaces_do_not_see_each_other),
        cmocka_unit_test(keys_cover_whole_blocks_and_chain),
        cmocka_unit_test(impossible_regions_are_refused),
        cmocka_unit_test(all_ranks_are_needed),
        cmocka_unit_test(unregistered_memory_is_not_touched),
        cmocka_unit_test(bytes_come_back_on_every_rank),
        cmocka_unit_test(results_and_user_data_come_back),
        cmocka_unit_test(bad_arguments_change_nothing),
        cmocka_unit_test(a_lease_runs_out),
        cmocka_unit_test(a_cancelled_operation_ends_once),
        cmocka_unit_test(quotas_come_from_the_config),
        cmocka_unit_test(fd_is_readable_while_completions_wait),
        cmocka_unit_test(poll_waits_no_longer_than_told),
        cmocka_unit_test(several_pollers_share_the_completions),
        cmocka_unit_test(reset_forgets_all),
        cmocka_unit_test(statistics_add_up),
        cmocka_unit_test(closing_ends_what_is_under_way),
        cmocka_unit_test(spaces_may_be_opened_by_many_threads),
        cmocka_unit_test(a_child_does_no_harm),
        cmocka_unit_test(the_last_error_belongs_to_its_thread),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
