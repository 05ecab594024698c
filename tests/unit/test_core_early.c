/* test_core_early.c - gets that are over for the engine when all their copies are on their way. */
#include "core_rig.h"

/* Of the first n blocks of the chain. */
static uint64_t early_get(struct rig *r, uint32_t chain, uint32_t n)
{
    struct fk_core_op_args args = args_of(NULL, NULL);
    struct flexkv_match_result m = match(r, chain, n);
    uint64_t op;

    args.early = true;
    assert_int_equal(m.blocks, n);
    assert_int_equal(fk_core_get(r->core, m.lease, 0, n, &args, r->now, &op), 0);
    return op;
}

static struct fk_job *take(struct rig *r, uint32_t rank)
{
    struct fk_job *job = fk_core_take_job(r->core, r->instance, rank);

    assert_non_null(job);
    return job;
}

static void expect_early(struct rig *r, uint64_t op, uint32_t n)
{
    expect_end(r, op, 0, n);
    assert_int_equal(r->last.flags, FLEXKV_COMPLETION_EARLY);
}

static void over_when_all_ranks_are_sure(void **state)
{
    struct rig r;

    rig_open(&r, &(struct rig_params){ .cpu = 8, .ranks = 2 });
    put(&r, 1, 8);
    settle(&r);
    uint64_t op = early_get(&r, 1, 8);
    struct fk_job *a = take(&r, 0), *b = take(&r, 1);
    assert_true(a->early && b->early);
    fk_core_job_on_its_way(r.core, a);
    assert_false(completed(&r, op));
    fk_core_job_on_its_way(r.core, b);
    expect_early(&r, op, 8);
    expect_sound(&r);
    assert_int_equal(fk_core_cancel(r.core, op, r.now), -ENOENT);
    assert_false(a->cancelled);

    /* Its slots are nobody else's until the bytes are out of them. */
    uint64_t other = put(&r, 2, 1);
    expect_end(&r, other, -ENOSPC, 0);
    pass_time(&r, 60000000);                        /* no deadline counts any more */
    assert_false(a->cancelled);
    fk_core_job_done(r.core, a, 8, 0, r.now);
    assert_false(fk_core_instance_idle(r.core, r.instance));
    fk_core_job_done(r.core, b, 8, 0, r.now);
    settle(&r);                                     /* checks that it does not complete twice */
    assert_true(fk_core_instance_idle(r.core, r.instance));
    assert_int_equal(stats_of(&r).get_blocks, 8);
    put(&r, 2, 8);
    settle(&r);
    assert_int_equal(matched(&r, 2, 8), 8);
    rig_close(&r);
}

/* Who has failed before is not waited for. Who fails afterwards is a worker that has died. */
static void not_over_when_one_has_failed(void **state)
{
    struct rig r;

    rig_open(&r, &(struct rig_params){ .cpu = 64, .ranks = 2 });
    put(&r, 1, 8);
    settle(&r);
    uint64_t op = early_get(&r, 1, 8);
    struct fk_job *a = take(&r, 0), *b = take(&r, 1);
    fk_core_job_on_its_way(r.core, a);
    fk_core_job_done(r.core, a, 5, -EIO, r.now);
    fk_core_job_on_its_way(r.core, b);
    assert_false(completed(&r, op));
    fk_core_job_done(r.core, b, 8, 0, r.now);
    expect_end(&r, op, -EIO, 5);
    assert_int_equal(r.last.flags, 0);

    op = early_get(&r, 1, 8);
    a = take(&r, 0);
    b = take(&r, 1);
    fk_core_job_on_its_way(r.core, a);
    fk_core_job_on_its_way(r.core, b);
    expect_early(&r, op, 8);
    fk_core_job_done(r.core, a, 0, -ENOTCONN, r.now);
    fk_core_job_done(r.core, b, 8, 0, r.now);
    settle(&r);
    assert_true(fk_core_instance_idle(r.core, r.instance));
    assert_int_equal(matched(&r, 1, 8), 8);
    rig_close(&r);
}

/* One that was stopped is not over early, though its bytes may come. */
static void not_over_when_it_was_stopped(void **state)
{
    struct rig r;

    rig_open(&r, &(struct rig_params){ .cpu = 64 });
    put(&r, 1, 8);
    settle(&r);
    uint64_t op = early_get(&r, 1, 8);
    struct fk_job *job = take(&r, 0);
    assert_int_equal(fk_core_cancel(r.core, op, r.now), 0);
    fk_core_job_on_its_way(r.core, job);
    assert_false(completed(&r, op));
    fk_core_job_done(r.core, job, 8, 0, r.now);
    expect_end(&r, op, -ECANCELED, 0);
    rig_close(&r);
}

/* Half of it comes from SSD, in a job of its own: only the last one makes it sure. */
static void over_with_its_last_job(void **state)
{
    struct rig r;
    struct fk_job *job;
    uint32_t blocks = 0;

    rig_open(&r, &(struct rig_params){ .cpu = 32, .ssd = 64, .window = 4 });
    put(&r, 1, 12);
    settle(&r);
    put(&r, 2, 26);                                 /* the tail of chain 1 leaves the cpu tier */
    settle(&r);
    uint64_t op = early_get(&r, 1, 12);
    while (!completed(&r, op)) {
        run_ssd(&r);
        while ((job = fk_core_take_job(r.core, r.instance, 0))) {
            assert_false(completed(&r, op));
            blocks += job->n;
            fk_core_job_on_its_way(r.core, job);
            assert_int_equal(completed(&r, op), blocks == 12);
            fk_core_job_done(r.core, job, job->n, 0, r.now);
        }
    }
    expect_early(&r, op, 12);
    assert_int_equal(blocks, 12);
    settle(&r);
    rig_close(&r);
}

/* Where workers read from SSD themselves copies are in no order: pages may be written late by another's. */
static void not_with_direct_reads(void **state)
{
    struct rig r;

    rig_open(&r, &(struct rig_params){ .cpu = 64, .ssd = 64 });
    fk_core_instance_direct(r.core, r.instance, true);
    put(&r, 1, 8);
    settle(&r);
    uint64_t op = early_get(&r, 1, 8);
    struct fk_job *job = take(&r, 0);
    fk_core_job_on_its_way(r.core, job);
    assert_false(completed(&r, op));
    fk_core_job_done(r.core, job, 8, 0, r.now);
    expect_end(&r, op, 0, 8);
    rig_close(&r);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(over_when_all_ranks_are_sure),
        cmocka_unit_test(not_over_when_one_has_failed),
        cmocka_unit_test(not_over_when_it_was_stopped),
        cmocka_unit_test(over_with_its_last_job),
        cmocka_unit_test(not_with_direct_reads),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
