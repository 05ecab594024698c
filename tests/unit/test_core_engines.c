/*
 * test_core_engines.c - src/node/ with several engines on one space: whose workers get a job, what a
 * dead engine leaves, and hits that are declined because computing is faster.
 */
#include "core_rig.h"

static const struct rig_params plain = { .cpu = 64 }, with_ssd = { .cpu = 32, .ssd = 200 };

/* A second engine on the rig's space. */
static uint32_t second_engine(struct rig *r, uint32_t workers)
{
    uint32_t instance;

    assert_int_equal(fk_core_instance_add(r->core, r->space, workers, &instance), 0);
    return instance;
}

static struct flexkv_match_result match_from(struct rig *r, uint32_t instance, uint32_t chain,
                                             uint32_t n)
{
    struct flexkv_match_result m;

    fk_core_match(r->core, instance, chain_keys(chain), n, r->now, &m);
    return m;
}

static void one_stores_the_other_loads(void **state)
{
    struct rig r;
    struct fk_core_op_args args = args_of(NULL, NULL);
    uint64_t op;

    rig_open(&r, &plain);
    uint32_t other = second_engine(&r, 2);
    put(&r, 1, 8);
    settle(&r);
    struct flexkv_match_result m = match_from(&r, other, 1, 8);
    assert_int_equal(m.blocks, 8);
    args.tag = 4711;
    assert_int_equal(fk_core_get(r.core, m.lease, 0, 8, &args, r.now, &op), 0);
    assert_null(fk_core_take_job(r.core, r.instance, 0));
    struct fk_job *a = fk_core_take_job(r.core, other, 0), *b = fk_core_take_job(r.core, other, 1);
    assert_ptr_equal(a, b);
    assert_int_equal(a->tag, 4711);
    assert_int_equal(a->instance, other);
    assert_false(fk_core_instance_idle(r.core, other));
    assert_true(fk_core_instance_idle(r.core, r.instance));
    fk_core_job_done(r.core, a, 8, 0, r.now);
    fk_core_job_done(r.core, b, 5, -ENOTCONN, r.now);
    expect_end(&r, op, -ENOTCONN, 5);
    rig_close(&r);
}

/* Its leases are free at once, its slots when its workers have let go; the other's stay. */
static void an_engine_ends(void **state)
{
    struct rig r;
    struct fk_core_op_args args = args_of(NULL, NULL);
    uint64_t op, queued;

    rig_open(&r, &plain);
    uint32_t other = second_engine(&r, 1);
    put(&r, 1, 8);
    settle(&r);
    struct flexkv_match_result mine = match(&r, 1, 8), theirs = match_from(&r, other, 1, 8);
    assert_int_equal(fk_core_put(r.core, other, r.group, chain_keys(2), 4, 0, &args, r.now, &op), 0);
    struct fk_job *job = fk_core_take_job(r.core, other, 0);
    assert_int_equal(fk_core_put(r.core, other, r.group, chain_keys(3), 4, 0, &args, r.now, &queued),
                     0);
    uint32_t cancels = fk_core_work(r.core).cancels;
    fk_core_instance_end(r.core, other, -ECANCELED, r.now);
    assert_int_not_equal(fk_core_work(r.core).cancels, cancels);
    assert_true(job->cancelled);
    assert_int_equal(fk_core_release(r.core, theirs.lease), -ENOENT);
    assert_int_equal(stats_of(&r).leases, 1);
    assert_int_equal(stats_of(&r).cpu.free_slots, 64 - 16);
    assert_false(fk_core_instance_idle(r.core, other));
    fk_core_job_done(r.core, job, 0, -ECANCELED, r.now);
    job = fk_core_take_job(r.core, other, 0);
    assert_true(job->cancelled);
    fk_core_job_done(r.core, job, 0, -ECANCELED, r.now);
    assert_true(fk_core_instance_idle(r.core, other));
    fk_core_instance_remove(r.core, other);
    assert_int_equal(second_engine(&r, 3), other);
    assert_int_equal(stats_of(&r).cpu.free_slots, 64 - 8);
    assert_int_equal(fk_core_release(r.core, mine.lease), 0);
    flexkv_completion c[4];
    assert_int_equal(fk_core_take_completions(r.core, c, 4), 2);
    assert_int_equal(c[0].status, -ECANCELED);
    assert_int_equal(c[1].status, -ECANCELED);
    rig_close(&r);
}

/* A put that was reported while a worker still held its pages: they may have been written to since. */
static void late_bytes_of_a_put_are_not_stored(void **state)
{
    struct rig r;
    uint64_t op;

    rig_open(&r, &plain);
    op = put(&r, 1, 8);
    struct fk_job *job = fk_core_take_job(r.core, r.instance, 0);
    pass_time(&r, 100000000);               /* past the deadline */
    pass_time(&r, 100000000);               /* past the grace */
    assert_true(completed(&r, op));
    assert_int_equal(r.last.status, -ETIMEDOUT);
    assert_true(r.last.flags & FLEXKV_COMPLETION_PAGES_BUSY);
    fk_core_job_done(r.core, job, 8, 0, r.now);
    assert_int_equal(matched(&r, 1, 8), 0);
    assert_int_equal(stats_of(&r).cpu.free_slots, 64);
    rig_close(&r);
}

/* ---- declining ---- */

static void set_costs(struct rig *r, double copy_us, double ssd_us, double compute_us)
{
    struct fk_core_costs c = { .copy_us = copy_us, .ssd_us = ssd_us, .compute_us = compute_us };

    fk_core_set_costs(r->core, r->space, &c);
}

static void slow_copies_are_declined(void **state)
{
    struct rig r;

    rig_open(&r, &plain);
    put(&r, 1, 8);
    settle(&r);
    set_costs(&r, 50, 0, 0);                /* what computing costs is not known */
    assert_int_equal(matched(&r, 1, 8), 8);
    set_costs(&r, 50, 0, 100);
    assert_int_equal(matched(&r, 1, 8), 8);
    assert_int_equal(stats_of(&r).declined_blocks, 0);
    set_costs(&r, 150, 0, 100);
    struct flexkv_match_result m = match(&r, 1, 8);
    assert_int_equal(m.blocks, 0);
    assert_int_equal(m.cpu_blocks, 0);
    assert_int_equal(m.lease, 0);
    assert_int_equal(stats_of(&r).declined_blocks, 8);
    assert_int_equal(stats_of(&r).leases, 0);
    expect_sound(&r);
    rig_close(&r);
}

/* Blocks that are on SSD only: cut off where reading takes longer than computing. */
static void a_slow_disk_is_declined(void **state)
{
    struct rig r;
    uint32_t in_cpu = 0;

    rig_open(&r, &with_ssd);
    put(&r, 1, 12);
    settle(&r);
    put(&r, 2, 26);                         /* pushes the first chain's end out of the cpu tier */
    settle(&r);
    while (in_cpu < 12 && where(&r, 1, in_cpu).cpu_ready)
        in_cpu++;
    assert_in_range(in_cpu, 1, 11);
    set_costs(&r, 1, 40, 100);
    assert_int_equal(matched(&r, 1, 12), 12);
    set_costs(&r, 1, 4000, 100);
    struct flexkv_match_result m = match(&r, 1, 12);
    assert_int_equal(m.blocks, in_cpu);
    assert_int_equal(m.cpu_blocks, in_cpu);
    assert_int_equal(m.ssd_blocks, 0);
    assert_int_equal(fk_core_release(r.core, m.lease), 0);
    assert_int_equal(stats_of(&r).declined_blocks, 12 - in_cpu);
    rig_close(&r);
}

/* A disk that was slow once is tried again some day; a prefetch never minds. */
static void a_slow_disk_is_tried_again(void **state)
{
    struct rig r;
    unsigned declined = 0;

    rig_open(&r, &with_ssd);
    put(&r, 1, 12);
    settle(&r);
    put(&r, 2, 26);
    settle(&r);
    set_costs(&r, 1, 1000, 100);
    while (matched(&r, 1, 12) < 12)
        assert_in_range(++declined, 1, 1000);
    assert_in_range(declined, 20, 1000);
    set_costs(&r, 1, 1000000, 100);
    uint64_t op = prefetch(&r, 1, 12);
    settle(&r);
    expect_end(&r, op, 0, 12);
    rig_close(&r);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(one_stores_the_other_loads),
        cmocka_unit_test(an_engine_ends),
        cmocka_unit_test(late_bytes_of_a_put_are_not_stored),
        cmocka_unit_test(slow_copies_are_declined),
        cmocka_unit_test(a_slow_disk_is_declined),
        cmocka_unit_test(a_slow_disk_is_tried_again),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
