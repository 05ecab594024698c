/*
 * test_core_engines.c - src/node/ with several engines on one space: whose workers get a job, what a
 * dead engine leaves, hits that are declined because computing is faster, and how that becomes known.
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
    struct fk_core_costs c = { .copy.us = copy_us, .ssd.us = ssd_us, .compute_us = compute_us };

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

/* Stored, and pushed out of the cpu tier in part. Returns how many leading blocks are still there. */
static uint32_t half_on_ssd(struct rig *r, uint32_t chain)
{
    uint32_t in_cpu = 0;

    put(r, chain, 12);
    settle(r);
    put(r, chain + 1000, 26);
    settle(r);
    while (in_cpu < 12 && where(r, chain, in_cpu).cpu_ready)
        in_cpu++;
    assert_in_range(in_cpu, 1, 11);
    return in_cpu;
}

/* Blocks of a tier that nobody has measured are not loaded, whatever they may take. */
static void an_unknown_disk_is_declined(void **state)
{
    struct rig r;

    rig_open(&r, &with_ssd);
    uint32_t in_cpu = half_on_ssd(&r, 1);
    set_costs(&r, 1, 0, 0);                 /* nor is what computing takes: there is nothing to compare with */
    assert_int_equal(matched(&r, 1, 12), 12);
    set_costs(&r, 1, 0, 100);
    assert_int_equal(matched(&r, 1, 12), in_cpu);
    set_costs(&r, 1, 40, 100);
    assert_int_equal(matched(&r, 1, 12), 12);
    rig_close(&r);
}

static uint32_t matched_at(struct rig *r, const struct fk_core_costs *c)
{
    fk_core_set_costs(r->core, r->space, c);
    return matched(r, 1, 12);
}

/* What varies, what a load takes besides, and how sure the engine is of its own speed. */
static void near_break_even_is_declined(void **state)
{
    struct fk_core_costs c = { .copy = { 1, 0, 0 }, .ssd = { 80, 0, 0 }, .compute_us = 100 };
    struct rig r;

    rig_open(&r, &with_ssd);
    uint32_t in_cpu = half_on_ssd(&r, 1);
    assert_int_equal(matched_at(&r, &c), 12);
    c.ssd.spread_us = 8;                    /* 96 is not rare */
    assert_int_equal(matched_at(&r, &c), in_cpu);
    c.ssd.spread_us = 0;
    c.ssd.us = 95;                          /* the engine may be a tenth faster than it has told */
    assert_int_equal(matched_at(&r, &c), in_cpu);
    c.ssd.us = 80;
    c.load_us = 9 * 11;                     /* at most eleven blocks win nine each */
    assert_int_equal(matched_at(&r, &c), in_cpu);
    c.load_us = 9 * (12 - in_cpu) - 1;
    assert_int_equal(matched_at(&r, &c), 12);
    rig_close(&r);
}

/* Reads that are under way come first, writes too. */
static void who_is_before_us_counts(void **state)
{
    struct fk_core_costs c = { .copy = { 1, 0, 0 }, .ssd = { 50, 0, 0 }, .compute_us = 100 };
    struct fk_core_ssd_req q[64];
    struct rig r;

    rig_open(&r, &with_ssd);
    uint32_t in_cpu = half_on_ssd(&r, 1);
    assert_int_equal(matched_at(&r, &c), 12);
    put(&r, 3, 11);
    assert_true(run_jobs(&r));
    assert_int_equal(matched_at(&r, &c), 12);           /* queued writes let reads go first */
    uint32_t n = fk_core_take_ssd(r.core, q, 64);
    assert_int_equal(n, 11);
    uint32_t left = 0;
    while (left < 12 && where(&r, 1, left).cpu_ready)
        left++;
    assert_true(left <= in_cpu);
    assert_int_equal(matched_at(&r, &c), left);         /* 11 x 50 before anything comes, 39 won by a block */
    for (uint32_t i = 0; i < n; i++)
        ssd_answer(&r, &q[i], ssd_carry_out(&r, &q[i]));
    assert_int_equal(matched_at(&r, &c), 12);
    rig_close(&r);
}

/* ---- probes ---- */

static const struct rig_params probed = { .cpu = 32, .ssd = 200, .probe = 4 };

static uint32_t reads_at(struct rig *r, uint64_t after_us)
{
    uint32_t before = r->reads;

    pass_time(r, after_us);
    settle(r);
    return r->reads - before;
}

/* What was left out is read in the background, a few blocks of it, so that its speed is known the next time. */
static void what_was_declined_is_measured(void **state)
{
    struct rig r;

    rig_open(&r, &probed);
    uint32_t in_cpu = half_on_ssd(&r, 1);
    assert_in_range(in_cpu, 1, 7);
    set_costs(&r, 1, 4000, 100);
    assert_int_equal(reads_at(&r, 10000000), 0);        /* nobody asks, nobody measures */
    assert_int_equal(matched(&r, 1, 12), in_cpu);
    assert_int_equal(reads_at(&r, 0), 0);               /* not at once: a get may come */
    assert_int_equal(reads_at(&r, 5000), 4);
    for (uint32_t i = 0; i < 4; i++)
        assert_true(where(&r, 1, in_cpu + i).cpu_ready);
    in_cpu = matched(&r, 1, 12);
    assert_in_range(in_cpu, 4, 11);
    assert_int_equal(reads_at(&r, 1900000), 0);         /* it rests */
    matched(&r, 1, 12);
    assert_int_equal(reads_at(&r, 5000), 0);
    pass_time(&r, 200000);
    assert_int_equal(matched(&r, 1, 12), in_cpu);
    assert_in_range(reads_at(&r, 5000), 1, 4);          /* and does it again */
    assert_int_equal(stats_of(&r).prefetches, 0);
    assert_int_equal(stats_of(&r).timeouts, 0);
    rig_close(&r);
}

/* The first blocks that only the SSD has are read before anybody asks for them. */
static void an_unknown_disk_is_measured(void **state)
{
    struct rig r;

    rig_open(&r, &probed);
    set_costs(&r, 1, 0, 100);
    half_on_ssd(&r, 1);
    assert_int_equal(reads_at(&r, 5000), 4);
    assert_int_equal(stats_of(&r).matches, 0);
    set_costs(&r, 1, 40, 100);
    assert_int_equal(reads_at(&r, 10000000), 0);        /* known: that was all */
    half_on_ssd(&r, 2);
    assert_int_equal(reads_at(&r, 10000000), 0);
    rig_close(&r);
}

/* Requests first; but a disk that is never idle is measured all the same. */
static void probes_wait_for_an_idle_disk(void **state)
{
    struct fk_core_ssd_req q[64];
    struct rig r;

    rig_open(&r, &probed);
    half_on_ssd(&r, 1);
    set_costs(&r, 1, 4000, 100);
    matched(&r, 1, 12);
    put(&r, 2, 4);
    assert_true(run_jobs(&r));
    uint32_t n = fk_core_take_ssd(r.core, q, 64);       /* writes that take half a second */
    assert_int_equal(n, 4);
    for (int i = 0; i < 99; i++) {
        pass_time(&r, 5000);
        assert_false(fk_core_work(r.core).ssd);
    }
    pass_time(&r, 10000);
    assert_true(fk_core_work(r.core).ssd);
    struct fk_core_ssd_req p[64];
    assert_int_equal(fk_core_take_ssd(r.core, p, 64), 4);
    pass_time(&r, 100000);                              /* it ends, though the disk hangs */
    assert_int_equal(stats_of(&r).operations, 0);
    for (uint32_t i = 0; i < 4; i++) {
        ssd_answer(&r, &p[i], ssd_carry_out(&r, &p[i]));
        ssd_answer(&r, &q[i], ssd_carry_out(&r, &q[i]));
    }
    rig_close(&r);
}

/* Others' blocks: given while it is not known what they take; left out when they are slow, and measured again. */
static void slow_peers_are_measured_again(void **state)
{
    struct fk_core_costs c = { .copy = { 1, 0, 0 }, .compute_us = 100 };
    struct fk_core_fetch f[16];
    struct flexkv_match_result m;
    struct rig r;

    rig_open(&r, &probed);
    assert_int_equal(fk_core_space_elsewhere(r.core, r.space), 0);
    fk_core_set_costs(r.core, r.space, &c);
    m = match(&r, 1, 12);
    fk_core_match_extend(r.core, r.instance, r.group, chain_keys(1), 12, r.now, &m);
    assert_int_equal(m.blocks, 12);
    assert_int_equal(fk_core_release(r.core, m.lease), 0);
    c.fetch = (struct fk_rate){ 80, 30, 0 };            /* the mean decides */
    fk_core_set_costs(r.core, r.space, &c);
    m = match(&r, 1, 12);
    fk_core_match_extend(r.core, r.instance, r.group, chain_keys(1), 12, r.now, &m);
    assert_int_equal(m.blocks, 12);
    assert_int_equal(fk_core_release(r.core, m.lease), 0);
    c.fetch = (struct fk_rate){ 120, 5, 0 };
    fk_core_set_costs(r.core, r.space, &c);
    m = match(&r, 1, 12);
    fk_core_match_extend(r.core, r.instance, r.group, chain_keys(1), 12, r.now, &m);
    assert_int_equal(m.blocks, 0);
    assert_int_equal(m.lease, 0);
    assert_int_equal(stats_of(&r).declined_blocks, 12);
    pass_time(&r, 5000);
    uint32_t n = fk_core_take_fetches(r.core, f, 16);
    assert_int_equal(n, 4);
    for (uint32_t i = 0; i < n; i++) {
        assert_true(fk_key_equal(f[i].key, key_of(1, i)));
        assert_false(f[i].urgent);
        struct fk_core_fetch_done d = { .id = f[i].id };
        fk_core_fetch_done(r.core, &d, 1, r.now);
    }
    c.fetch = (struct fk_rate){ 20, 5, 0 };
    fk_core_set_costs(r.core, r.space, &c);
    m = match(&r, 1, 12);
    assert_int_equal(m.blocks, 4);
    fk_core_match_extend(r.core, r.instance, r.group, chain_keys(1), 12, r.now, &m);
    assert_int_equal(m.blocks, 12);
    assert_int_equal(fk_core_release(r.core, m.lease), 0);
    rig_close(&r);
}

/* Means and spreads forget, and are sure only after a while. */
static void rates_of_what_is_measured(void **state)
{
    struct fk_rate r = { 0 };
    uint64_t now = 0;

    assert_true(fk_rate_slow(&r) == 0);
    fk_rate_note(&r, 100, 1, now);
    assert_true(fk_rate_slow(&r) == 150);
    for (int i = 0; i < 20; i++)
        fk_rate_note(&r, 100, 1, now += 20000);
    assert_true(r.us == 100 && fk_rate_slow(&r) < 102);
    for (int i = 0; i < 20; i++)
        fk_rate_note(&r, i % 2 ? 140 : 60, 1, now += 20000);
    assert_true(r.us > 85 && r.us < 115 && fk_rate_slow(&r) > 160);
    for (int i = 0; i < 10; i++)            /* was slow, and is not: seen every two seconds */
        fk_rate_note(&r, 10, 1, now += 2000000);
    assert_true(fk_rate_slow(&r) < 20);
    fk_rate_note(&r, 1000, 0.01, now += 20000);
    assert_true(r.us < 13);
}

/* A prefetch never minds. */
static void a_prefetch_is_not_declined(void **state)
{
    struct rig r;

    rig_open(&r, &with_ssd);
    half_on_ssd(&r, 1);
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
        cmocka_unit_test(an_unknown_disk_is_declined),
        cmocka_unit_test(near_break_even_is_declined),
        cmocka_unit_test(who_is_before_us_counts),
        cmocka_unit_test(what_was_declined_is_measured),
        cmocka_unit_test(an_unknown_disk_is_measured),
        cmocka_unit_test(probes_wait_for_an_idle_disk),
        cmocka_unit_test(slow_peers_are_measured_again),
        cmocka_unit_test(rates_of_what_is_measured),
        cmocka_unit_test(a_prefetch_is_not_declined),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
