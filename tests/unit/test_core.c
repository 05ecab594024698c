/*
 * test_core.c - src/node/ without a shell: put, get, leases, cancel in every state, deadlines,
 * full caches, quotas, reset. Each operation must end exactly once (core_rig.h watches).
 * The SSD's part: test_core_ssd.c. Restart: test_core_recover.c.
 */
#include "core_rig.h"

static const struct rig_params plain = { .cpu = 64 }, two_ranks = { .cpu = 64, .ranks = 2 };

/* ---- put and get ---- */

static void what_was_put_is_got(void **state)
{
    struct rig r;
    int8_t results[8] = { 9, 9, 9, 9, 9, 9, 9, 9 };
    int mark;

    rig_open(&r, &plain);
    uint64_t op = put(&r, 1, 8);
    assert_int_equal(matched(&r, 1, 8), 0);         /* rule 1: not before its bytes are there */
    settle(&r);
    expect_end(&r, op, 0, 8);
    assert_int_equal(r.last.kind, FLEXKV_OP_PUT);
    assert_int_equal(r.last.blocks, 8);

    struct flexkv_match_result m = match(&r, 1, 20);
    assert_int_equal(m.blocks, 8);
    assert_int_equal(m.cpu_blocks, 8);
    assert_int_equal(m.ssd_blocks, 0);
    assert_int_not_equal(m.lease, 0);
    struct fk_core_op_args args = args_of(results, &mark);
    assert_int_equal(fk_core_get(r.core, m.lease, 0, 8, &args, r.now, &op), 0);
    struct fk_job *job = fk_core_take_job(r.core, r.instance, 0);
    assert_int_equal(job->n, 8);
    assert_true(job->to_engine);
    for (uint32_t i = 0; i < 8; i++) {
        assert_int_equal(job->pages[i], i);
        assert_int_equal(job->slots[i], where(&r, 1, i).cpu_slot);
        assert_int_equal(results[i], 9);            /* not before the end */
    }
    fk_core_job_done(r.core, job, 8, 0, r.now);
    expect_end(&r, op, 0, 8);
    assert_ptr_equal(r.last.user_data, &mark);
    for (uint32_t i = 0; i < 8; i++)
        assert_int_equal(results[i], 0);
    rig_close(&r);
}

static void a_block_is_there_when_every_rank_has_reported(void **state)
{
    struct rig r;

    rig_open(&r, &two_ranks);
    uint64_t op = put(&r, 1, 4);
    struct fk_job *a = fk_core_take_job(r.core, r.instance, 0);
    fk_core_job_done(r.core, a, 4, 0, r.now);
    assert_false(completed(&r, op));
    assert_int_equal(matched(&r, 1, 4), 0);
    assert_null(fk_core_take_job(r.core, r.instance, 0));
    struct fk_job *b = fk_core_take_job(r.core, r.instance, 1);
    assert_ptr_equal(a, b);
    fk_core_job_done(r.core, b, 4, 0, r.now);
    expect_end(&r, op, 0, 4);
    assert_int_equal(matched(&r, 1, 4), 4);
    rig_close(&r);
}

/* One rank has done three blocks, the other two: two are stored. */
static void a_put_is_as_good_as_its_worst_rank(void **state)
{
    struct rig r;

    rig_open(&r, &two_ranks);
    uint64_t op = put(&r, 1, 6);
    fk_core_job_done(r.core, fk_core_take_job(r.core, r.instance, 0), 3, -EIO, r.now);
    fk_core_job_done(r.core, fk_core_take_job(r.core, r.instance, 1), 2, -EFAULT, r.now);
    expect_end(&r, op, -EFAULT, 2);
    assert_int_equal(matched(&r, 1, 6), 2);
    assert_int_equal(stats_of(&r).cpu.free_slots, 62);
    rig_close(&r);
}

static void a_failed_get_reports_the_rest_as_failed(void **state)
{
    struct rig r;
    int8_t results[6];
    uint64_t op;

    rig_open(&r, &two_ranks);
    put(&r, 1, 6);
    settle(&r);
    struct fk_core_op_args args = args_of(results, NULL);
    assert_int_equal(fk_core_get(r.core, match(&r, 1, 6).lease, 0, 6, &args, r.now, &op), 0);
    fk_core_job_done(r.core, fk_core_take_job(r.core, r.instance, 0), 6, 0, r.now);
    fk_core_job_done(r.core, fk_core_take_job(r.core, r.instance, 1), 4, -EIO, r.now);
    expect_end(&r, op, -EIO, 4);
    for (int i = 0; i < 6; i++)
        assert_int_equal(results[i], i < 4 ? 0 : -EIO);
    assert_int_equal(matched(&r, 1, 6), 6);         /* the cache is none the worse */
    rig_close(&r);
}

static void known_blocks_cost_nothing(void **state)
{
    struct rig r;

    rig_open(&r, &plain);
    put(&r, 1, 4);
    uint64_t again = put(&r, 1, 4);                 /* under way */
    expect_end(&r, again, 0, 4);
    settle(&r);
    again = put(&r, 1, 4);                          /* there */
    expect_end(&r, again, 0, 4);
    assert_false(fk_core_work(r.core).jobs);
    uint64_t longer = put(&r, 1, 6);                /* the new ones only */
    struct fk_job *job = fk_core_take_job(r.core, r.instance, 0);
    assert_int_equal(job->n, 2);
    assert_int_equal(job->pages[0], 4);
    fk_core_job_done(r.core, job, 2, 0, r.now);
    expect_end(&r, longer, 0, 6);
    rig_close(&r);
}

static void a_put_may_begin_within_the_prompt(void **state)
{
    struct rig r;

    rig_open(&r, &plain);
    uint64_t op = put_from(&r, 1, 3, 6);            /* its parent is not known */
    expect_end(&r, op, -ENOENT, 0);
    put(&r, 1, 3);
    settle(&r);
    op = put_from(&r, 1, 3, 6);
    struct fk_job *job = fk_core_take_job(r.core, r.instance, 0);
    assert_int_equal(job->n, 3);
    assert_int_equal(job->pages[0], 0);             /* pages count from first */
    fk_core_job_done(r.core, job, 3, 0, r.now);
    expect_end(&r, op, 0, 3);
    assert_int_equal(matched(&r, 1, 6), 6);
    op = put_from(&r, 1, 6, 6);                     /* nothing at all */
    expect_end(&r, op, 0, 0);
    struct fk_core_op_args args = args_of(NULL, NULL);
    assert_int_equal(fk_core_put(r.core, r.instance, r.group, chain_keys(1), 2, 3, &args, r.now, &op),
                     -EINVAL);
    rig_close(&r);
}

/* Keys that are no chain (a caller's mistake): the known ones around an unknown one must not
 * lead the core astray. */
static void keys_that_are_no_chain_do_no_harm(void **state)
{
    struct rig r;
    struct fk_key keys[8];
    struct fk_core_op_args args = args_of(NULL, NULL);
    uint64_t op;

    rig_open(&r, &plain);
    put(&r, 1, 8);
    settle(&r);
    for (uint32_t hole = 0; hole < 8; hole++) {
        for (uint32_t i = 0; i < 8; i++)
            keys[i] = i == hole ? key_of(50 + hole, i) : key_of(1, i);
        struct flexkv_match_result m;
        fk_core_match(r.core, r.instance, keys, 8, r.now, &m);
        assert_int_equal(m.blocks, hole);
        if (m.lease)
            fk_core_release(r.core, m.lease);
        assert_int_equal(fk_core_put(r.core, r.instance, r.group, keys, 8, 0, &args, r.now, &op), 0);
        settle(&r);
        assert_true(completed(&r, op));
        assert_int_equal(matched(&r, 1, 8), 8);
    }
    rig_close(&r);
}

/* A key of another space is not one's own, whatever a caller thinks. */
static void spaces_do_not_see_each_other(void **state)
{
    struct rig r;
    struct fk_core_space_params sp = { .cpu_slots = 16 };
    struct fk_core_op_args args = args_of(NULL, NULL);
    struct flexkv_match_result m;
    uint32_t other, there;
    uint64_t op;

    rig_open(&r, &plain);
    assert_int_equal(fk_core_space_add(r.core, &sp, &other), 0);
    assert_int_equal(fk_core_instance_add(r.core, other, 1, &there), 0);
    put(&r, 1, 4);
    settle(&r);
    fk_core_match(r.core, there, chain_keys(1), 4, r.now, &m);
    assert_int_equal(m.blocks, 0);
    assert_int_equal(m.lease, 0);
    uint32_t group = fk_core_space_default_group(r.core, other);
    assert_int_equal(fk_core_put(r.core, there, group, chain_keys(1), 6, 0, &args, r.now, &op), 0);
    assert_null(fk_core_take_job(r.core, r.instance, 0));
    settle(&r);
    assert_true(completed(&r, op));
    assert_int_not_equal(r.last.status, 0);
    assert_int_equal(fk_core_put(r.core, there, group, chain_keys(1), 6, 2, &args, r.now, &op), 0);
    assert_true(completed(&r, op));
    assert_int_equal(r.last.status, -ENOENT);
    assert_int_equal(fk_core_space_add(r.core, &sp, &other), -ENOSPC);
    assert_int_equal(stats_of(&r).cpu.slots, 80);
    rig_close(&r);
}

/* ---- leases ---- */

static void a_lease_is_good_once(void **state)
{
    struct rig r;
    struct fk_core_op_args args = args_of(NULL, NULL);
    uint64_t op;
    uint32_t instance = 77;

    rig_open(&r, &plain);
    put(&r, 1, 4);
    settle(&r);
    struct flexkv_match_result m = match(&r, 1, 4);
    assert_int_equal(fk_core_lease_instance(r.core, m.lease, &instance), 0);
    assert_int_equal(instance, r.instance);
    assert_int_equal(fk_core_get(r.core, m.lease, 2, 3, &args, r.now, &op), -EINVAL);
    assert_int_equal(fk_core_get(r.core, m.lease, 5, 0, &args, r.now, &op), -EINVAL);
    assert_int_equal(fk_core_get(r.core, m.lease, 1, UINT32_MAX, &args, r.now, &op), -EINVAL);
    op = get(&r, m.lease, 1, 2);
    uint64_t second;
    assert_int_equal(fk_core_get(r.core, m.lease, 0, 1, &args, r.now, &second), -ENOENT);
    assert_int_equal(fk_core_release(r.core, m.lease), -ENOENT);
    assert_int_equal(fk_core_lease_instance(r.core, m.lease, &instance), -ENOENT);
    assert_int_equal(fk_core_release(r.core, 0), -ENOENT);
    assert_int_equal(fk_core_release(r.core, UINT64_MAX), -ENOENT);
    struct fk_job *job = fk_core_take_job(r.core, r.instance, 0);
    assert_int_equal(job->n, 2);
    assert_int_equal(job->slots[0], where(&r, 1, 1).cpu_slot);
    fk_core_job_done(r.core, job, 2, 0, r.now);
    expect_end(&r, op, 0, 2);
    m = match(&r, 1, 4);
    expect_end(&r, get(&r, m.lease, 4, 0), 0, 0);   /* a get of nothing ends at once */
    rig_close(&r);
}

static void leased_blocks_stay_until_the_lease_runs_out(void **state)
{
    struct rig r;

    rig_open(&r, &plain);
    put(&r, 1, 64);
    settle(&r);
    struct flexkv_match_result m = match(&r, 1, 64);
    uint64_t op = put(&r, 2, 10);
    settle(&r);
    expect_end(&r, op, -ENOSPC, 0);                 /* rule 9: a full cache means misses */
    assert_true(fk_core_next_wakeup(r.core) <= r.now + 500000);
    pass_time(&r, 499999);
    assert_int_equal(stats_of(&r).leases, 1);
    pass_time(&r, 1);
    assert_int_equal(stats_of(&r).leases, 0);
    assert_int_equal(fk_core_release(r.core, m.lease), -ENOENT);
    op = put(&r, 2, 10);
    settle(&r);
    expect_end(&r, op, 0, 10);
    assert_int_equal(matched(&r, 1, 64), 54);       /* the leaves went */
    rig_close(&r);
}

static void pins_have_room_for_any_number_of_leases(void **state)
{
    enum { N = 66000 };
    static uint64_t lease[N];
    struct rig r;
    uint32_t got = 0;

    rig_open(&r, &plain);
    put(&r, 1, 1);
    settle(&r);
    for (uint32_t i = 0; i < N; i++) {
        lease[i] = match(&r, 1, 1).lease;
        got += lease[i] != 0;
    }
    assert_in_range(got, 60000, UINT16_MAX);
    uint64_t op = put(&r, 1, 3);                    /* pins the last known block */
    settle(&r);
    expect_end(&r, op, 0, 3);
    assert_true(where(&r, 1, 0).pins >= 60000);
    for (uint32_t i = 0; i < N; i++)
        if (lease[i])
            assert_int_equal(fk_core_release(r.core, lease[i]), 0);
    assert_int_equal(where(&r, 1, 0).pins, 0);
    rig_close(&r);
}

/* ---- ending early ---- */

static void cancel_before_the_copy_begins(void **state)
{
    struct rig r;

    rig_open(&r, &plain);
    uint64_t op = put(&r, 1, 4);
    assert_int_equal(fk_core_cancel(r.core, op, r.now), 0);
    assert_false(completed(&r, op));                /* the agents may be at it */
    struct fk_job *job = fk_core_take_job(r.core, r.instance, 0);
    assert_true(job->cancelled);
    fk_core_job_done(r.core, job, 0, -ECANCELED, r.now);
    expect_end(&r, op, -ECANCELED, 0);
    assert_int_equal(matched(&r, 1, 4), 0);
    assert_int_equal(stats_of(&r).cpu.free_slots, 64);
    assert_int_equal(fk_core_cancel(r.core, op, r.now), -ENOENT);
    rig_close(&r);
}

static void cancel_of_a_copied_get_is_still_a_cancel(void **state)
{
    struct rig r;

    rig_open(&r, &two_ranks);
    put(&r, 1, 4);
    settle(&r);
    uint64_t op = get_chain(&r, 1, 4);
    fk_core_job_done(r.core, fk_core_take_job(r.core, r.instance, 0), 4, 0, r.now);
    assert_int_equal(fk_core_cancel(r.core, op, r.now), 0);
    assert_int_equal(fk_core_cancel(r.core, op, r.now), 0);         /* again: nothing new */
    fk_core_job_done(r.core, fk_core_take_job(r.core, r.instance, 1), 4, 0, r.now);
    expect_end(&r, op, -ECANCELED, 0);
    rig_close(&r);
}

static void cancel_of_what_has_ended_is_refused(void **state)
{
    struct rig r;

    rig_open(&r, &plain);
    uint64_t op = put(&r, 1, 4);
    settle(&r);
    assert_int_equal(fk_core_cancel(r.core, op, r.now), -ENOENT);
    assert_int_equal(fk_core_cancel(r.core, 0, r.now), -ENOENT);
    assert_int_equal(fk_core_cancel(r.core, 12345, r.now), -ENOENT);
    assert_int_equal(fk_core_cancel(r.core, UINT64_MAX, r.now), -ENOENT);
    rig_close(&r);
}

/* A cancelled put of blocks that others wait for under "already under way". */
static void cancelled_parents_take_their_children_with_them(void **state)
{
    struct rig r;

    rig_open(&r, &plain);
    uint64_t first = put(&r, 1, 4), second = put(&r, 1, 8);
    struct fk_job *a = fk_core_take_job(r.core, r.instance, 0), *b = fk_core_take_job(r.core, r.instance, 0);
    assert_int_equal(b->n, 4);
    fk_core_job_done(r.core, b, 4, 0, r.now);
    expect_end(&r, second, 0, 8);
    assert_int_equal(matched(&r, 1, 8), 0);
    fk_core_job_done(r.core, a, 2, -EIO, r.now);
    expect_end(&r, first, -EIO, 2);
    assert_int_equal(matched(&r, 1, 8), 2);         /* nothing beyond the hole is matched */
    settle(&r);
    assert_int_equal(stats_of(&r).blocks, 2);       /* and it is swept away */
    assert_int_equal(stats_of(&r).cpu.free_slots, 62);
    rig_close(&r);
}

static void a_late_operation_times_out(void **state)
{
    struct rig r;

    rig_open(&r, &plain);
    uint64_t op = put(&r, 1, 4);
    struct fk_job *job = fk_core_take_job(r.core, r.instance, 0);
    assert_true(fk_core_next_wakeup(r.core) <= r.now + 1000000);
    pass_time(&r, 999999);
    assert_false(job->cancelled);
    pass_time(&r, 1);
    assert_true(job->cancelled);
    assert_false(completed(&r, op));                /* the agent has its grace */
    fk_core_job_done(r.core, job, 3, -ECANCELED, r.now + 50000);
    expect_end(&r, op, -ETIMEDOUT, 0);              /* rule 4: late is not loaded */
    assert_int_equal(r.last.flags, 0);
    assert_int_equal(stats_of(&r).timeouts, 1);
    assert_int_equal(matched(&r, 1, 4), 3);         /* but their bytes are good */
    rig_close(&r);
}

/* Rule 2: the agent hangs. The caller hears of it; slots stay taken until the agent answers. */
static void a_hanging_agent_keeps_its_slots(void **state)
{
    struct rig r;

    rig_open(&r, &(struct rig_params){ .cpu = 4 });
    uint64_t op = put(&r, 1, 4);
    struct fk_job *job = fk_core_take_job(r.core, r.instance, 0);
    pass_time(&r, 1000000);
    assert_false(completed(&r, op));
    pass_time(&r, 100000);
    expect_end(&r, op, -ETIMEDOUT, 0);
    assert_int_equal(r.last.flags, FLEXKV_COMPLETION_PAGES_BUSY);
    assert_int_equal(fk_core_cancel(r.core, op, r.now), -ENOENT);
    assert_false(fk_core_instance_idle(r.core, r.instance));
    uint64_t other = put(&r, 2, 1);
    expect_end(&r, other, -ENOSPC, 0);
    expect_sound(&r);
    fk_core_reset(r.core, r.now);                   /* not even a reset gives them away */
    expect_sound(&r);
    other = put(&r, 2, 1);
    expect_end(&r, other, -ENOSPC, 0);
    pass_time(&r, 60000000);
    fk_core_job_done(r.core, job, 0, -EIO, r.now);
    assert_true(fk_core_instance_idle(r.core, r.instance));
    assert_int_equal(stats_of(&r).cpu.free_slots, 4);
    rig_close(&r);
}

static void a_shorter_deadline_counts(void **state)
{
    struct rig r;
    struct fk_core_op_args args = args_of(NULL, NULL);
    uint64_t op;

    rig_open(&r, &plain);
    args.deadline_us = r.now + 5000;
    assert_int_equal(fk_core_put(r.core, r.instance, r.group, chain_keys(1), 2, 0, &args, r.now, &op), 0);
    assert_true(fk_core_next_wakeup(r.core) <= r.now + 5000);
    pass_time(&r, 5000);
    assert_true(fk_core_take_job(r.core, r.instance, 0)->cancelled);
    pass_time(&r, 100000);
    expect_end(&r, op, -ETIMEDOUT, 0);
    fk_core_destroy(r.core);                        /* with a job out */
}

static void a_rank_that_leaves_fails_what_is_under_way(void **state)
{
    struct rig r;

    rig_open(&r, &two_ranks);
    put(&r, 1, 4);
    settle(&r);
    uint64_t a = get_chain(&r, 1, 4), b = put(&r, 2, 4);
    fk_core_fail_ops(r.core, r.instance, -ENOTCONN, r.now);
    assert_false(fk_core_instance_idle(r.core, r.instance));
    for (int rank = 0; rank < 2; rank++)
        for (struct fk_job *j; (j = fk_core_take_job(r.core, r.instance, (uint32_t)rank)) != NULL;) {
            assert_true(j->cancelled);
            fk_core_job_done(r.core, j, 0, -ECANCELED, r.now);
        }
    assert_true(fk_core_instance_idle(r.core, r.instance));
    assert_true(completed(&r, a) && completed(&r, b));
    assert_int_equal(r.last.status, -ENOTCONN);
    rig_close(&r);
}

/* ---- room ---- */

static void a_full_cache_stores_a_leading_part(void **state)
{
    struct rig r;
    int8_t results[100];
    struct fk_core_op_args args = args_of(results, NULL);
    uint64_t op;

    rig_open(&r, &plain);
    assert_int_equal(fk_core_put(r.core, r.instance, r.group, chain_keys(1), 100, 0, &args, r.now, &op), 0);
    settle(&r);
    expect_end(&r, op, -ENOSPC, 64);
    for (int i = 0; i < 100; i++)
        assert_int_equal(results[i], i < 64 ? 0 : -ENOSPC);
    assert_int_equal(matched(&r, 1, 100), 64);
    assert_int_equal(stats_of(&r).put_dropped_blocks, 36);
    rig_close(&r);
}

static void a_longer_prompt_never_evicts_its_own_prefix(void **state)
{
    struct rig r;

    rig_open(&r, &plain);
    put(&r, 1, 60);
    settle(&r);
    uint64_t op = put(&r, 1, 80);
    settle(&r);
    expect_end(&r, op, -ENOSPC, 64);
    assert_int_equal(matched(&r, 1, 80), 64);
    rig_close(&r);
}

static void eviction_runs_ahead_of_need(void **state)
{
    struct rig r;

    rig_open(&r, &(struct rig_params){ .cpu = 100, .start = 0.8, .ratio = 0.1 });
    for (uint32_t c = 1; c <= 16; c++) {
        put(&r, c, 5);
        settle(&r);
    }
    assert_int_equal(stats_of(&r).cpu.free_slots, 20);      /* 80 of 100: not above */
    put(&r, 50, 1);
    settle(&r);
    assert_int_equal(stats_of(&r).cpu.free_slots, 30);      /* down to .8 - .1 */
    assert_int_equal(matched(&r, 1, 5), 0);                 /* the oldest went */
    assert_int_equal(matched(&r, 50, 1), 1);
    rig_close(&r);
}

static void one_eviction_frees_beyond_the_need(void **state)
{
    struct rig r;

    rig_open(&r, &(struct rig_params){ .cpu = 100, .ratio = 0.2 });
    for (uint32_t c = 1; c <= 20; c++)
        put(&r, c, 5);
    settle(&r);
    put(&r, 50, 1);
    settle(&r);
    assert_int_equal(stats_of(&r).cpu.free_slots, 20);
    rig_close(&r);
}

static void quotas_hold(void **state)
{
    struct rig r;
    struct fk_core_quota small = { .max = { 8, 8 } }, kept = { .max = { 64, 64 }, .guaranteed = { 20, 0 } };
    struct fk_core_op_args args = args_of(NULL, NULL);
    uint32_t g_small, g_kept;
    uint64_t op;

    rig_open(&r, &plain);
    assert_int_equal(fk_core_group_add(r.core, r.space, &small, &g_small), 0);
    assert_int_equal(fk_core_group_add(r.core, r.space, &kept, &g_kept), 0);
    kept.guaranteed[0] = 45;
    assert_int_equal(fk_core_group_add(r.core, r.space, &kept, &g_kept), -EINVAL);

    assert_int_equal(fk_core_put(r.core, r.instance, g_small, chain_keys(1), 12, 0, &args, r.now, &op), 0);
    settle(&r);
    expect_end(&r, op, -ENOSPC, 8);
    assert_int_equal(fk_core_put(r.core, r.instance, g_small, chain_keys(2), 5, 0, &args, r.now, &op), 0);
    settle(&r);
    expect_end(&r, op, 0, 5);                       /* its own older blocks made room */
    assert_int_equal(matched(&r, 1, 12), 3);
    op = put(&r, 3, 64);
    settle(&r);
    assert_true(r.last.blocks_ok <= 44);            /* twenty are promised */
    assert_int_equal(fk_core_put(r.core, r.instance, g_kept, chain_keys(4), 20, 0, &args, r.now, &op), 0);
    settle(&r);
    expect_end(&r, op, 0, 20);
    for (uint32_t c = 5; c < 15; c++) {
        put(&r, c, 30);
        settle(&r);
    }
    assert_int_equal(matched(&r, 4, 20), 20);
    rig_close(&r);
}

/* ---- reset, events ---- */

static void reset_drops_all_and_ends_all(void **state)
{
    struct rig r;

    rig_open(&r, &plain);
    put(&r, 1, 8);
    settle(&r);
    struct flexkv_match_result m = match(&r, 1, 8);
    uint64_t get_op = get_chain(&r, 1, 8), put_op = put(&r, 2, 8);
    struct fk_job *g = fk_core_take_job(r.core, r.instance, 0);
    fk_core_reset(r.core, r.now);
    expect_sound(&r);
    assert_int_equal(fk_core_release(r.core, m.lease), -ENOENT);
    assert_int_equal(matched(&r, 1, 8), 0);
    assert_int_equal(stats_of(&r).cpu.free_slots, 48);      /* two jobs still hold theirs */
    fk_core_job_done(r.core, g, 8, 0, r.now);
    expect_end(&r, get_op, -ECANCELED, 0);
    struct fk_job *p = fk_core_take_job(r.core, r.instance, 0);
    fk_core_job_done(r.core, p, 8, 0, r.now);
    expect_end(&r, put_op, -ECANCELED, 0);
    assert_int_equal(matched(&r, 2, 8), 0);         /* its bytes came after the reset */
    assert_int_equal(stats_of(&r).cpu.free_slots, 64);
    assert_int_equal(stats_of(&r).blocks, 0);
    uint64_t op = put(&r, 1, 8);
    settle(&r);
    expect_end(&r, op, 0, 8);
    rig_close(&r);
}

static void events_alternate_and_follow_readiness(void **state)
{
    struct rig r;
    struct fk_core_event ev[64];

    rig_open(&r, &(struct rig_params){ .cpu = 8 });
    put(&r, 1, 8);
    assert_int_equal(fk_core_take_events(r.core, ev, 64), 0);
    settle(&r);
    assert_int_equal(fk_core_take_events(r.core, ev, 5), 5);
    assert_int_equal(fk_core_take_events(r.core, ev + 5, 59), 3);
    for (uint32_t i = 0; i < 8; i++) {
        assert_true(ev[i].stored);
        assert_int_equal(ev[i].tier, FK_TIER_CPU);
        assert_true(fk_key_equal(ev[i].key, key_of(1, i)));
        if (i)
            assert_true(fk_key_equal(ev[i].parent, key_of(1, i - 1)));
        else
            assert_true(fk_key_is_zero(ev[i].parent));
    }
    put(&r, 2, 3);                                  /* removed comes before the slot's reuse */
    assert_int_equal(fk_core_take_events(r.core, ev, 64), 3);
    for (uint32_t i = 0; i < 3; i++) {
        assert_false(ev[i].stored);
        assert_true(fk_key_equal(ev[i].key, key_of(1, 7 - i)));
    }
    rig_close(&r);
}

/* 49 days of milliseconds do not fit 32 bits for ever. */
static void the_clock_may_run_for_years(void **state)
{
    struct rig r;

    rig_open(&r, &plain);
    for (uint32_t c = 1; c <= 200; c++) {
        uint64_t op = put(&r, c, 8);
        settle(&r);
        expect_end(&r, op, 0, 8);
        assert_int_equal(matched(&r, c, 8), 8);
        if (c > 8)
            assert_int_equal(matched(&r, c - 8, 8), 0);     /* lru goes on in the right order */
        if (c > 4)
            assert_int_equal(matched(&r, c - 4, 8), 8);
        pass_time(&r, c % 3 ? 2ull * 24 * 3600 * 1000000 : 1000);
    }
    rig_close(&r);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(what_was_put_is_got),
        cmocka_unit_test(a_block_is_there_when_every_rank_has_reported),
        cmocka_unit_test(a_put_is_as_good_as_its_worst_rank),
        cmocka_unit_test(a_failed_get_reports_the_rest_as_failed),
        cmocka_unit_test(known_blocks_cost_nothing),
        cmocka_unit_test(a_put_may_begin_within_the_prompt),
        cmocka_unit_test(keys_that_are_no_chain_do_no_harm),
        cmocka_unit_test(spaces_do_not_see_each_other),
        cmocka_unit_test(a_lease_is_good_once),
        cmocka_unit_test(leased_blocks_stay_until_the_lease_runs_out),
        cmocka_unit_test(pins_have_room_for_any_number_of_leases),
        cmocka_unit_test(cancel_before_the_copy_begins),
        cmocka_unit_test(cancel_of_a_copied_get_is_still_a_cancel),
        cmocka_unit_test(cancel_of_what_has_ended_is_refused),
        cmocka_unit_test(cancelled_parents_take_their_children_with_them),
        cmocka_unit_test(a_late_operation_times_out),
        cmocka_unit_test(a_hanging_agent_keeps_its_slots),
        cmocka_unit_test(a_shorter_deadline_counts),
        cmocka_unit_test(a_rank_that_leaves_fails_what_is_under_way),
        cmocka_unit_test(a_full_cache_stores_a_leading_part),
        cmocka_unit_test(a_longer_prompt_never_evicts_its_own_prefix),
        cmocka_unit_test(eviction_runs_ahead_of_need),
        cmocka_unit_test(one_eviction_frees_beyond_the_need),
        cmocka_unit_test(quotas_hold),
        cmocka_unit_test(reset_drops_all_and_ends_all),
        cmocka_unit_test(events_alternate_and_follow_readiness),
        cmocka_unit_test(the_clock_may_run_for_years),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
