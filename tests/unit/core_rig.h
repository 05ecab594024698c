/*
 * core_rig.h - what the tests of the core share: a core with one space and no shell. The test is
 * the agents, the SSD and the clock; settle() plays all of them until nothing moves. Included by
 * test_core.c, test_core_ssd.c, test_core_recover.c.
 */
#ifndef FK_TESTS_CORE_RIG_H
#define FK_TESTS_CORE_RIG_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include <cmocka.h>

#include "base/util.h"
#include "node/core.h"

enum { MAX_BLOCKS = 4096, RIG_SSD_SLOTS = 4096, MAX_OPS = 512 };

struct rig {
    struct fk_core *core;
    uint64_t now;
    uint32_t space, instance, group, ranks;
    struct { struct fk_key key, parent; uint32_t tag; } ssd[RIG_SSD_SLOTS];
    uint32_t forgotten, resets, reads, writes;
    uint64_t seen[MAX_OPS];             /* operations whose completion came */
    uint32_t n_seen;
    struct flexkv_completion last;
};

struct rig_params {
    uint32_t cpu, ssd, ranks, dirs, stripe, window, probe;
    enum fk_write_policy write;
    enum fk_policy_kind policy;
    double start, ratio;
};

static inline void rig_open(struct rig *r, const struct rig_params *p)
{
    struct fk_core_params params = {
        .max_spaces = 2, .policy = { .kind = p->policy }, .write_policy = p->write,
        .evict_start_threshold = p->start ? p->start : 1.0, .evict_ratio = p->ratio,
        .op_timeout_us = 1000000, .lease_timeout_us = 500000, .cancel_grace_us = 100000,
        .read_window_blocks = p->window, .events = true, .seed = 1,
    };
    struct fk_core_space_params sp = {
        .cpu_slots = p->cpu, .ssd_slots = p->ssd, .ssd_stripe_slots = p->stripe ? p->stripe : 8,
        .ssd_dirs = p->ssd ? fk_max(p->dirs, 1u) : 0, .probe_blocks = p->probe,
    };

    memset(r, 0, sizeof(*r));
    r->now = 1000000000;
    r->ranks = fk_max(p->ranks, 1u);
    assert_int_equal(fk_core_create(&params, &r->core), 0);
    assert_int_equal(fk_core_space_add(r->core, &sp, &r->space), 0);
    assert_int_equal(fk_core_instance_add(r->core, r->space, r->ranks, &r->instance), 0);
    r->group = fk_core_space_default_group(r->core, r->space);
}

static inline void expect_sound(struct rig *r)
{
    const char *wrong = fk_core_check(r->core);

    if (wrong)
        fail_msg("%s", wrong);
}

/* Keys of chain c: the same number gives the same key. */
static inline struct fk_key key_of(uint32_t chain, uint32_t i)
{
    uint64_t s = ((uint64_t)chain << 32 | i) + 1;
    struct fk_key k = { .lo = fk_rng_next(&s) };

    k.hi = fk_rng_next(&s);
    return k;
}

static inline const struct fk_key *chain_keys(uint32_t chain)
{
    static struct fk_key keys[MAX_BLOCKS];

    for (uint32_t i = 0; i < MAX_BLOCKS; i++)
        keys[i] = key_of(chain, i);
    return keys;
}

/* ---- the shell's part ---- */

static inline void take_completions(struct rig *r)
{
    struct flexkv_completion c;

    while (fk_core_take_completions(r->core, &c, 1)) {
        for (uint32_t i = 0; i < r->n_seen; i++)
            if (r->seen[i] == c.op)
                fail_msg("operation %llx completed twice", (unsigned long long)c.op);
        assert_true(r->n_seen < MAX_OPS);
        r->seen[r->n_seen++] = c.op;
        r->last = c;
    }
}

static inline bool completed(struct rig *r, uint64_t op)
{
    take_completions(r);
    for (uint32_t i = 0; i < r->n_seen; i++)
        if (r->seen[i] == op)
            return true;
    return false;
}

static inline bool run_jobs(struct rig *r)
{
    bool any = false;

    for (uint32_t rank = 0; rank < r->ranks; rank++) {
        struct fk_job *job;
        while ((job = fk_core_take_job(r->core, r->instance, rank)) != NULL) {
            fk_core_job_done(r->core, job, job->n, 0, r->now);
            any = true;
        }
    }
    return any;
}

/* Carries a request out at once; the status to answer it with. */
static inline int32_t ssd_carry_out(struct rig *r, const struct fk_core_ssd_req *q)
{
    assert_true(q->ssd_slot < RIG_SSD_SLOTS);
    switch (q->kind) {
    case FK_SSD_FORGET:
        memset(&r->ssd[q->ssd_slot], 0, sizeof(r->ssd[0]));
        r->forgotten++;
        return 0;
    case FK_SSD_RESET:
        memset(r->ssd, 0, sizeof(r->ssd));
        r->resets++;
        return 0;
    case FK_SSD_WRITE:
        r->ssd[q->ssd_slot].key = q->key;
        r->ssd[q->ssd_slot].parent = q->parent;
        r->ssd[q->ssd_slot].tag = q->tag;
        r->writes++;
        return 0;
    default:
        r->reads++;
        return fk_key_equal(r->ssd[q->ssd_slot].key, q->key) ? 0 : -EBADMSG;
    }
}

static inline void ssd_answer(struct rig *r, const struct fk_core_ssd_req *q, int32_t status)
{
    struct fk_core_ssd_done done = { q->id, status };

    if (q->kind == FK_SSD_READ || q->kind == FK_SSD_WRITE)
        fk_core_ssd_done(r->core, &done, 1, r->now);
}

static inline bool run_ssd(struct rig *r)
{
    struct fk_core_ssd_req q;
    bool any = false;

    while (fk_core_take_ssd(r->core, &q, 1)) {
        ssd_answer(r, &q, ssd_carry_out(r, &q));
        any = true;
    }
    return any;
}

static inline void settle(struct rig *r)
{
    for (bool any = true; any;) {
        any = run_ssd(r);
        any = run_jobs(r) || any;
        if (fk_core_next_wakeup(r->core) <= r->now)
            fk_core_tick(r->core, r->now);
    }
    take_completions(r);
    expect_sound(r);
}

static inline void pass_time(struct rig *r, uint64_t us)
{
    r->now += us;
    fk_core_tick(r->core, r->now);
}

/* Every operation that was begun must have ended; nothing may be held any more. */
static inline void rig_close(struct rig *r)
{
    struct flexkv_stats st;

    settle(r);
    pass_time(r, 10000000);
    settle(r);
    fk_core_get_stats(r->core, &st);
    assert_int_equal(st.operations, 0);
    assert_int_equal(st.leases, 0);
    assert_int_equal(st.write_backlog_blocks, 0);
    fk_core_destroy(r->core);
}

/* ---- what callers do ---- */

static inline struct fk_core_op_args args_of(int8_t *results, void *user_data)
{
    static uint32_t pages[MAX_BLOCKS];

    for (uint32_t i = 0; i < MAX_BLOCKS; i++)
        pages[i] = i;
    return (struct fk_core_op_args){ .pages = pages, .results = results, .user_data = user_data };
}

static inline uint64_t put_from(struct rig *r, uint32_t chain, uint32_t first, uint32_t n)
{
    struct fk_core_op_args args = args_of(NULL, NULL);
    uint64_t op = 0;

    assert_int_equal(fk_core_put(r->core, r->instance, r->group, chain_keys(chain), n, first, &args, r->now,
                                 &op), 0);
    return op;
}

static inline uint64_t put(struct rig *r, uint32_t chain, uint32_t n)
{
    return put_from(r, chain, 0, n);
}

static inline struct flexkv_match_result match(struct rig *r, uint32_t chain, uint32_t n)
{
    struct flexkv_match_result m;

    fk_core_match(r->core, r->instance, chain_keys(chain), n, r->now, &m);
    return m;
}

static inline uint32_t matched(struct rig *r, uint32_t chain, uint32_t n)
{
    struct flexkv_match_result m = match(r, chain, n);

    if (m.lease)
        assert_int_equal(fk_core_release(r->core, m.lease), 0);
    return m.blocks;
}

static inline uint64_t get(struct rig *r, uint64_t lease, uint32_t first, uint32_t n)
{
    struct fk_core_op_args args = args_of(NULL, NULL);
    uint64_t op = 0;

    assert_int_equal(fk_core_get(r->core, lease, first, n, &args, r->now, &op), 0);
    return op;
}

/* A match of n blocks and a get of all that is there. */
static inline uint64_t get_chain(struct rig *r, uint32_t chain, uint32_t n)
{
    struct flexkv_match_result m = match(r, chain, n);

    assert_int_equal(m.blocks, n);
    return get(r, m.lease, 0, n);
}

static inline uint64_t prefetch(struct rig *r, uint32_t chain, uint32_t n)
{
    struct fk_core_op_args args = args_of(NULL, NULL);
    uint64_t op = 0;

    args.pages = NULL;
    assert_int_equal(fk_core_prefetch(r->core, r->instance, chain_keys(chain), n, &args, r->now, &op), 0);
    return op;
}

static inline void expect_end(struct rig *r, uint64_t op, int status, uint32_t ok)
{
    assert_true(completed(r, op));
    assert_int_equal(r->last.op, op);
    assert_int_equal(r->last.status, status);
    assert_int_equal(r->last.blocks_ok, ok);
}

static inline struct flexkv_stats stats_of(struct rig *r)
{
    struct flexkv_stats st;

    fk_core_get_stats(r->core, &st);
    return st;
}

static inline struct fk_core_where where(struct rig *r, uint32_t chain, uint32_t i)
{
    struct fk_core_where w = { 0 };

    fk_core_find(r->core, key_of(chain, i), &w);
    return w;
}

/* Stores a chain and has it on SSD only: written through, then pushed out of cpu by others. */
static inline void store_on_ssd_only(struct rig *r, uint32_t chain, uint32_t n, uint32_t cpu_slots)
{
    put(r, chain, n);
    settle(r);
    for (uint32_t i = 0; where(r, chain, 0).cpu_ready && i < 50; i++) {
        put(r, 100000 + 100 * chain + i, fk_max(cpu_slots / 2, 1u));
        settle(r);
    }
    assert_false(where(r, chain, 0).cpu_ready);
    for (uint32_t i = 0; i < n; i++)
        assert_true(where(r, chain, i).ssd_ready);
}

#endif
