/*
 * api_rig.h - what the tests of the public API share: a real node in a private directory, engine
 * memory of several ranks and regions, and blocks whose bytes follow from key and rank, so that every
 * byte got can be checked. Included by test_api*.c.
 */
#ifndef FK_TESTS_API_RIG_H
#define FK_TESTS_API_RIG_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include <cmocka.h>

#include <dirent.h>
#include <fcntl.h>
#include <poll.h>
#include <sys/stat.h>

#include "base/clock.h"
#include "base/log.h"
#include "base/util.h"
#include "flexkv/flexkv.h"

enum { TOKENS_PER_BLOCK = 4, RANKS = 2, REGIONS = 2, PAGES = 256, MAX_CHAIN = 64 };
static const uint64_t region_page_bytes[REGIONS] = { 3072, 1000 };
#define SLICE_BYTES (3072 + 1000)

struct api {
    flexkv_node *node;
    flexkv_space *space;
    flexkv_namespace *ns;
    unsigned char *memory[RANKS][REGIONS];
    char dir[2][80];
};

/* ---- directories ---- */

static char made_dirs[64][80];          /* removed at exit if a failed test has left them */
static unsigned n_made_dirs;

static inline void remove_dir(const char *path)
{
    char file[800];
    DIR *d = opendir(path);

    for (struct dirent *e; d && (e = readdir(d)) != NULL;) {
        snprintf(file, sizeof(file), "%.400s/%s", path, e->d_name);
        if (e->d_name[0] != '.')
            unlink(file);
    }
    if (d)
        closedir(d);
    rmdir(path);
}

static inline void remove_made_dirs(void)
{
    for (unsigned i = 0; i < n_made_dirs; i++)
        remove_dir(made_dirs[i]);
}

static inline void make_dir(char *path, size_t size)
{
    const char *tmp = getenv("TMPDIR");

    snprintf(path, size, "%.50s/flexkv-api-XXXXXX", tmp ? tmp : "/tmp");
    assert_non_null(mkdtemp(path));
    if (!n_made_dirs)
        atexit(remove_made_dirs);
    if (n_made_dirs < fk_array_size(made_dirs))
        snprintf(made_dirs[n_made_dirs++], sizeof(made_dirs[0]), "%.79s", path);
}

/* ---- nodes ---- */

static inline void set(flexkv_config *c, const char *key, const char *value)
{
    if (flexkv_config_set(c, key, value))
        fail_msg("%s=%s: %s", key, value, flexkv_last_error());
}

/* options: key, value, ..., NULL. */
static inline int try_open(const char *const *options, flexkv_node **node)
{
    flexkv_config *c;
    int rc = 0;

    assert_int_equal(flexkv_config_create(&c), 0);
    set(c, "cpu_cache_blocks", "64");
    set(c, "log_level", "CRITICAL");
    for (; options && *options && !rc; options += 2)
        rc = flexkv_config_set(c, options[0], options[1]);
    if (!rc)
        rc = flexkv_node_open(c, node);
    flexkv_config_destroy(c);
    return rc;
}

static inline flexkv_space_desc desc_of(const char *name)
{
    return (flexkv_space_desc){
        .struct_bytes = sizeof(flexkv_space_desc), .name = name, .fingerprint = "test-model",
        .fingerprint_bytes = 10, .tokens_per_block = TOKENS_PER_BLOCK, .ranks = RANKS,
        .slice_bytes = SLICE_BYTES,
    };
}

static inline void register_rank(struct api *a, uint32_t rank)
{
    flexkv_region regions[REGIONS];

    for (int i = 0; i < REGIONS; i++)
        regions[i] = (flexkv_region){ a->memory[rank][i], region_page_bytes[i] + 24,
                                      region_page_bytes[i], PAGES };
    if (flexkv_regions_register(a->space, rank, regions, REGIONS))
        fail_msg("%s", flexkv_last_error());
}

static inline void open_space(struct api *a)
{
    flexkv_space_desc desc = desc_of(NULL);

    if (flexkv_space_open(a->node, &desc, &a->space))
        fail_msg("%s", flexkv_last_error());
    assert_int_equal(flexkv_namespace_open(a->space, NULL, 0, &a->ns), 0);
    for (uint32_t r = 0; r < RANKS; r++)
        register_rank(a, r);
}

static inline void open_node(struct api *a, const char *const *options)
{
    if (try_open(options, &a->node))
        fail_msg("%s", flexkv_last_error());
    for (int r = 0; r < RANKS; r++)
        for (int i = 0; i < REGIONS; i++)
            a->memory[r][i] = calloc(PAGES, region_page_bytes[i] + 24);
    open_space(a);
}

static inline void close_node(struct api *a)
{
    flexkv_node_close(a->node);
    for (int r = 0; r < RANKS; r++)
        for (int i = 0; i < REGIONS; i++)
            free(a->memory[r][i]);
    a->node = NULL;
}

/* ---- blocks ---- */

static inline void chain_of(const struct api *a, uint32_t chain, flexkv_key *keys, uint32_t n)
{
    uint32_t tokens[MAX_CHAIN * TOKENS_PER_BLOCK];

    for (uint32_t i = 0; i < n * TOKENS_PER_BLOCK; i++)
        tokens[i] = chain * 1000003 + i;
    assert_int_equal(flexkv_keys_from_tokens(a->ns, NULL, tokens, n * TOKENS_PER_BLOCK, keys), n);
}

static inline unsigned char *page_at(const struct api *a, uint32_t rank, int region, uint32_t page)
{
    return a->memory[rank][region] + page * (region_page_bytes[region] + 24);
}

static inline uint64_t seed_of(flexkv_key key, uint32_t rank, int region)
{
    return key.lo ^ (key.hi * 3) ^ (rank * 0x1234567ull) ^ ((uint64_t)region << 60);
}

static inline void fill_page(struct api *a, uint32_t page, flexkv_key key)
{
    for (uint32_t r = 0; r < RANKS; r++) {
        for (int i = 0; i < REGIONS; i++) {
            uint64_t rng = seed_of(key, r, i), *p = (uint64_t *)(void *)page_at(a, r, i, page);
            for (uint64_t k = 0; k < region_page_bytes[i] / 8; k++)
                p[k] = fk_rng_next(&rng);
        }
    }
}

static inline void spoil_page(struct api *a, uint32_t page)
{
    for (uint32_t r = 0; r < RANKS; r++)
        for (int i = 0; i < REGIONS; i++)
            memset(page_at(a, r, i, page), 0x5a, region_page_bytes[i]);
}

static inline bool page_holds(const struct api *a, uint32_t page, flexkv_key key)
{
    for (uint32_t r = 0; r < RANKS; r++) {
        for (int i = 0; i < REGIONS; i++) {
            uint64_t rng = seed_of(key, r, i);
            const uint64_t *p = (const uint64_t *)(const void *)page_at(a, r, i, page);
            for (uint64_t k = 0; k < region_page_bytes[i] / 8; k++)
                if (p[k] != fk_rng_next(&rng))
                    return false;
        }
    }
    return true;
}

/* ---- operations, one at a time ---- */

static inline flexkv_op_args args_from(uint32_t first_page, uint32_t *pages)
{
    for (uint32_t i = 0; i < MAX_CHAIN; i++)
        pages[i] = first_page + i;
    return (flexkv_op_args){ .struct_bytes = sizeof(flexkv_op_args), .pages = pages };
}

static inline flexkv_completion wait_for(struct api *a, uint64_t op)
{
    flexkv_completion c;

    assert_int_equal(flexkv_poll(a->node, &c, 1, 20000), 1);
    assert_int_equal(c.op, op);
    return c;
}

static inline flexkv_completion put_chain(struct api *a, uint32_t chain, uint32_t n)
{
    flexkv_key keys[MAX_CHAIN];
    uint32_t pages[MAX_CHAIN];
    flexkv_op_args args = args_from(0, pages);
    uint64_t op;

    chain_of(a, chain, keys, n);
    for (uint32_t i = 0; i < n; i++)
        fill_page(a, pages[i], keys[i]);
    if (flexkv_put(a->ns, keys, n, 0, &args, &op))
        fail_msg("%s", flexkv_last_error());
    return wait_for(a, op);
}

static inline flexkv_match_result match_chain(struct api *a, uint32_t chain, uint32_t n)
{
    flexkv_key keys[MAX_CHAIN];
    flexkv_match_result m;

    chain_of(a, chain, keys, n);
    assert_int_equal(flexkv_match(a->ns, keys, n, &m), 0);
    return m;
}

static inline uint32_t matched(struct api *a, uint32_t chain, uint32_t n)
{
    flexkv_match_result m = match_chain(a, chain, n);

    if (m.lease)
        assert_int_equal(flexkv_release(a->node, m.lease), 0);
    return m.blocks;
}

/* Gets what is known of the chain and checks every byte; the leading blocks got. */
static inline uint32_t get_and_check(struct api *a, uint32_t chain, uint32_t n)
{
    flexkv_key keys[MAX_CHAIN];
    uint32_t pages[MAX_CHAIN];
    flexkv_op_args args = args_from(100, pages);
    uint64_t op;
    flexkv_match_result m = match_chain(a, chain, n);

    if (!m.blocks)
        return 0;
    chain_of(a, chain, keys, n);
    for (uint32_t i = 0; i < n; i++)
        spoil_page(a, pages[i]);
    if (flexkv_get(a->node, m.lease, 0, m.blocks, &args, &op))
        fail_msg("%s", flexkv_last_error());
    flexkv_completion c = wait_for(a, op);
    for (uint32_t i = 0; i < c.blocks_ok; i++)
        assert_true(page_holds(a, pages[i], keys[i]));
    return c.blocks_ok;
}

static inline flexkv_stats stats_of(flexkv_node *node)
{
    flexkv_stats st = { .struct_bytes = sizeof(st) };

    assert_int_equal(flexkv_node_stats(node, &st), 0);
    return st;
}

static inline bool fd_readable(flexkv_node *node, int timeout_ms)
{
    struct pollfd p = { .fd = flexkv_node_fd(node), .events = POLLIN };

    return poll(&p, 1, timeout_ms) == 1;
}

static inline void wait_written(flexkv_node *node)
{
    uint64_t deadline = fk_clock_us() + 20000000;

    while (stats_of(node).write_backlog_blocks && fk_clock_us() < deadline)
        usleep(1000);
    assert_int_equal(stats_of(node).write_backlog_blocks, 0);
}

/* Of tests that keep blocks on SSD: two directories, and options beside the usual ones. */
#define MORE(...) ((const char *const[]){ __VA_ARGS__, NULL })

static inline void make_dirs(struct api *a)
{
    memset(a, 0, sizeof(*a));
    for (int i = 0; i < 2; i++)
        make_dir(a->dir[i], sizeof(a->dir[i]));
}

static inline void remove_dirs(struct api *a)
{
    for (int i = 0; i < 2; i++)
        remove_dir(a->dir[i]);
}

#endif
