/*
 * bench_index.c - match and put at an index of a million blocks, through the core's calls as
 * the API makes them (without its lock). 512 blocks are a prompt of 8k tokens.
 *
 * The limit of a hit is the memory itself: touching the 512 entries' cache lines once. A put's
 * peer is writing as many fresh lines.
 */
#include <stdio.h>

#include "base/clock.h"
#include "base/util.h"
#include "bench.h"
#include "node/core.h"

#define CHAIN 512u
#define CHAINS 2048u                    /* 1,048,576 blocks */
#define RUNS 401
#define TOKENS_PER_BLOCK 16u

struct world {
    struct fk_core *core;
    struct fk_key *keys;                /* 2 * CHAINS chains: the second half is new */
    uint32_t *tokens;
    uint32_t pages[CHAIN];
    char *lines;                        /* for the limit: 64 bytes per block */
    uint64_t rng;
};

/* Copies are done at once: only the core is measured. */
static void finish_copies(struct world *w)
{
    struct flexkv_completion c[16];
    struct fk_job *job;

    while ((job = fk_core_take_job(w->core, 0, 0)))
        fk_core_job_done(w->core, job, job->n, 0, 0);
    while (fk_core_take_completions(w->core, c, 16))
        ;
}

static double put_us(struct world *w, uint32_t chain)
{
    struct fk_core_op_args args = { .pages = w->pages };
    uint64_t op, start = fk_clock_ns();

    fk_core_put(w->core, 0, fk_core_space_default_group(w->core, 0), w->keys + chain * CHAIN, CHAIN,
                0, &args, 0, &op);
    double us = (double)(fk_clock_ns() - start) / 1000;
    finish_copies(w);
    return us;
}

static double get_us(struct world *w, uint32_t chain, bool from_tokens)
{
    struct fk_core_op_args args = { .pages = w->pages };
    struct flexkv_match_result m;
    struct fk_key fresh[CHAIN], *keys = w->keys + chain * CHAIN;
    uint64_t op, start = fk_clock_ns();

    if (from_tokens) {
        fk_key_chain(FK_KEY_SHA256, (struct fk_key){ 1, chain }, w->tokens, TOKENS_PER_BLOCK, CHAIN,
                     fresh);
        keys = fresh;
    }
    fk_core_match(w->core, 0, keys, CHAIN, 0, &m);
    if (m.blocks)
        fk_core_get(w->core, m.lease, 0, m.blocks, &args, 0, &op);
    double us = (double)(fk_clock_ns() - start) / 1000;
    finish_copies(w);
    return us;
}

/* The same number of lines, in the same order, read and written once. */
static double touch_us(struct world *w, uint32_t chain)
{
    uint64_t start = fk_clock_ns();
    char *p = w->lines + (uint64_t)chain * CHAIN * 64;

    for (uint32_t i = 0; i < CHAIN; i++, p += 64)
        *(volatile uint64_t *)(void *)p += 1;
    return (double)(fk_clock_ns() - start) / 1000;
}

static uint32_t random_chain(struct world *w)
{
    return fk_rng_below(&w->rng, CHAINS);
}

static int make_world(struct world *w, uint32_t cpu_slots)
{
    struct fk_core_params params = {
        .max_spaces = 1, .policy = { .kind = FK_POLICY_LRU }, .evict_start_threshold = 1,
        .op_timeout_us = 1u << 30, .lease_timeout_us = 1u << 30, .seed = 1,
    };
    struct fk_core_space_params space = { .cpu_slots = cpu_slots };
    uint32_t id, instance;

    w->rng = 42;
    w->keys = malloc(sizeof(*w->keys) * CHAIN * CHAINS * 2);
    w->tokens = calloc(CHAIN * TOKENS_PER_BLOCK, sizeof(*w->tokens));
    w->lines = calloc(CHAINS, (size_t)CHAIN * 64);
    if (!w->keys || !w->tokens || !w->lines || fk_core_create(&params, &w->core) ||
        fk_core_space_add(w->core, &space, &id) || fk_core_instance_add(w->core, id, 1, &instance))
        return -ENOMEM;
    for (uint32_t i = 0; i < CHAIN * TOKENS_PER_BLOCK; i++)
        w->tokens[i] = i * 7919;
    for (uint32_t c = 0; c < CHAINS; c++)       /* keys that get_us(from_tokens) finds again */
        fk_key_chain(FK_KEY_SHA256, (struct fk_key){ 1, c }, w->tokens, TOKENS_PER_BLOCK, CHAIN,
                     w->keys + c * CHAIN);
    for (uint32_t i = CHAIN * CHAINS; i < CHAIN * CHAINS * 2; i++)
        w->keys[i] = (struct fk_key){ fk_rng_next(&w->rng), fk_rng_next(&w->rng) };
    memset(w->lines, 1, (size_t)CHAINS * CHAIN * 64);
    return 0;
}

static void free_world(struct world *w)
{
    fk_core_destroy(w->core);
    free(w->keys);
    free(w->tokens);
    free(w->lines);
}

static int bench_world(struct world *w, struct bench_result *out)
{
    static double hit[RUNS], miss[RUNS], tokens[RUNS], put[RUNS], full[RUNS], limit[RUNS],
                  put_limit[RUNS], limit2[RUNS];
    int n = 0;

    for (uint32_t c = 0; c < CHAINS; c++) {
        double us = put_us(w, c);
        if (c >= CHAINS - RUNS) {
            put[c - (CHAINS - RUNS)] = us;
            put_limit[c - (CHAINS - RUNS)] = touch_us(w, random_chain(w));
        }
    }
    struct flexkv_stats st;
    fk_core_get_stats(w->core, &st);
    double bytes = (double)st.index_bytes / (double)st.blocks;
    for (int i = 0; i < RUNS; i++) {
        hit[i] = get_us(w, random_chain(w), false);
        limit[i] = touch_us(w, random_chain(w));
        miss[i] = get_us(w, CHAINS + random_chain(w), false);
        tokens[i] = get_us(w, random_chain(w), true);
        limit2[i] = touch_us(w, random_chain(w));
    }
    for (int i = 0; i < RUNS; i++) {        /* the index is full: each put evicts as many */
        full[i] = put_us(w, CHAINS + (uint32_t)i);
    }
    out[n++] = bench_summary("match_hit_512", "us", hit, limit, RUNS);
    out[n++] = bench_summary("match_miss_512", "us", miss, NULL, RUNS);
    out[n++] = bench_summary("match_tokens_512", "us", tokens, limit2, RUNS);
    out[n++] = bench_summary("put_512", "us", put, put_limit, RUNS);
    out[n++] = bench_summary("put_512_full", "us", full, NULL, RUNS);
    out[n++] = bench_summary("index_bytes_per_block", "bytes", &bytes, NULL, 1);
    return n;
}

int bench_index(struct bench_result *out, int max)
{
    struct world w = { 0 };
    int rc = max < 6 ? -EINVAL : make_world(&w, CHAIN * CHAINS);

    if (!rc)
        rc = bench_world(&w, out);
    free_world(&w);
    return rc;
}
