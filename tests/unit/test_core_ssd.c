/*
 * test_core_ssd.c - src/node/ with an SSD that the test plays: write policies, reads through a cpu
 * slot, joined fills, priorities, windows, cancel and deadlines with a read out, faults, directories
 * that are out, reset with I/O in flight; and a random run in which every operation must end once.
 */
#include "core_rig.h"

static const struct rig_params through = { .cpu = 32, .ssd = 200 };

/* ---- writing ---- */

static void through_writes_what_is_stored(void **state)
{
    struct rig r;

    rig_open(&r, &through);
    uint64_t op = put(&r, 1, 8);
    assert_false(fk_core_work(r.core).ssd);
    run_jobs(&r);
    expect_end(&r, op, 0, 8);                       /* does not wait for the disk */
    struct fk_core_ssd_req q[16];
    uint32_t n = fk_core_take_ssd(r.core, q, 16);
    assert_int_equal(n, 8);
    for (uint32_t i = 0; i < n; i++) {              /* a run of neighbours, parents first */
        assert_int_equal(q[i].kind, FK_SSD_WRITE);
        assert_int_equal(q[i].ssd_slot, q[0].ssd_slot + i);
        assert_true(fk_key_equal(q[i].key, key_of(1, i)));
        assert_int_equal(q[i].cpu_slot, where(&r, 1, i).cpu_slot);
        assert_true(i ? fk_key_equal(q[i].parent, key_of(1, i - 1)) : fk_key_is_zero(q[i].parent));
    }
    assert_int_equal(stats_of(&r).write_backlog_blocks, 8);
    assert_false(where(&r, 1, 0).ssd_ready);
    for (uint32_t i = n; i-- > 0;)
        ssd_answer(&r, &q[i], ssd_carry_out(&r, &q[i]));
    assert_true(where(&r, 1, 7).ssd_ready);
    rig_close(&r);
}

static void on_reuse_writes_what_is_got(void **state)
{
    struct rig r;

    rig_open(&r, &(struct rig_params){ .cpu = 32, .ssd = 200, .write = FK_WRITE_ON_REUSE });
    put(&r, 1, 8);
    put(&r, 2, 8);
    settle(&r);
    assert_int_equal(r.writes, 0);
    get_chain(&r, 1, 8);
    settle(&r);
    assert_int_equal(r.writes, 8);
    assert_true(where(&r, 1, 0).ssd_ready);
    assert_false(where(&r, 2, 0).ssd_ready);
    rig_close(&r);
}

static void on_evict_writes_what_leaves(void **state)
{
    struct rig r;
    uint32_t found = 0;

    rig_open(&r, &(struct rig_params){ .cpu = 32, .ssd = 200, .write = FK_WRITE_ON_EVICT });
    for (uint32_t c = 1; c <= 3; c++) {
        put(&r, c, 8);
        settle(&r);
    }
    assert_int_equal(r.writes, 0);
    for (uint32_t c = 4; c <= 12; c++) {
        put(&r, c, 8);
        settle(&r);
    }
    assert_true(r.writes > 0);
    for (uint32_t c = 1; c <= 12; c++)
        found += matched(&r, c, 8);
    assert_true(found >= 80);                       /* nearly all of it is somewhere */
    rig_close(&r);
}

static void a_failed_write_leaves_the_cpu_copy(void **state)
{
    struct rig r;
    struct fk_core_ssd_req q;

    rig_open(&r, &through);
    put(&r, 1, 4);
    run_jobs(&r);
    for (int i = 0; i < 4; i++) {
        assert_int_equal(fk_core_take_ssd(r.core, &q, 1), 1);
        ssd_answer(&r, &q, -EIO);
    }
    assert_false(where(&r, 1, 0).ssd_ready);
    assert_int_equal(matched(&r, 1, 4), 4);
    assert_int_equal(stats_of(&r).ssd.free_slots, 200);
    assert_int_equal(stats_of(&r).ssd.errors, 4);
    rig_close(&r);
}

/* Rule 2: while the disk reads from a cpu slot, the slot isn't reused, whatever happens. */
static void a_slot_being_written_is_not_reused(void **state)
{
    struct rig r;
    struct fk_core_ssd_req q[8];

    rig_open(&r, &(struct rig_params){ .cpu = 8, .ssd = 64 });
    put(&r, 1, 4);
    run_jobs(&r);
    assert_int_equal(fk_core_take_ssd(r.core, q, 4), 4);
    put(&r, 2, 8);
    run_jobs(&r);
    take_completions(&r);
    assert_true(r.last.blocks_ok <= 4);
    for (uint32_t i = 0; i < r.last.blocks_ok; i++)
        for (uint32_t k = 0; k < 4; k++)
            assert_int_not_equal(where(&r, 2, i).cpu_slot, q[k].cpu_slot);
    fk_core_reset(r.core, r.now);
    put(&r, 3, 8);
    for (struct fk_job *j; (j = fk_core_take_job(r.core, r.instance, 0)) != NULL;) {
        for (uint32_t i = 0; i < j->n; i++)
            for (uint32_t k = 0; k < 4; k++)
                assert_int_not_equal(j->slots[i], q[k].cpu_slot);
        fk_core_job_done(r.core, j, j->n, 0, r.now);
    }
    for (uint32_t i = 0; i < 4; i++)
        ssd_answer(&r, &q[i], 0);
    assert_int_equal(matched(&r, 1, 4), 0);
    rig_close(&r);
}

/* ---- reading ---- */

static void a_get_reads_through_a_cpu_slot(void **state)
{
    struct rig r;

    rig_open(&r, &through);
    store_on_ssd_only(&r, 1, 8, 32);
    struct flexkv_match_result m = match(&r, 1, 8);
    assert_int_equal(m.blocks, 8);
    assert_int_equal(m.ssd_blocks, 8);
    uint64_t op = get(&r, m.lease, 0, 8);
    assert_false(fk_core_work(r.core).jobs);
    settle(&r);
    expect_end(&r, op, 0, 8);
    assert_int_equal(r.reads, 8);
    assert_true(where(&r, 1, 7).cpu_ready);         /* and is in cpu from now on */
    rig_close(&r);
}

/* ---- workers that read the SSD themselves ---- */

static void workers_read_what_is_on_ssd_only(void **state)
{
    struct rig r;

    rig_open(&r, &through);
    fk_core_instance_direct(r.core, r.instance, true);
    store_on_ssd_only(&r, 1, 8, 32);
    uint64_t op = get(&r, match(&r, 1, 8).lease, 0, 8);
    assert_false(fk_core_work(r.core).ssd);
    struct fk_job *job = fk_core_take_job(r.core, r.instance, 0);
    assert_true(job->from_ssd && job->to_engine);
    assert_int_equal(job->n, 8);
    for (uint32_t i = 0; i < 8; i++) {
        assert_true(fk_key_equal(job->keys[i], key_of(1, i)));
        assert_true(fk_key_equal(r.ssd[job->slots[i]].key, job->keys[i]));
        assert_int_equal(job->pages[i], i);
        job->residues[i] = i;           /* there is room */
    }
    assert_int_equal(fk_core_job_left(job), 1);
    fk_core_job_done(r.core, job, 8, 0, r.now);
    settle(&r);
    expect_end(&r, op, 0, 8);
    assert_int_equal(r.reads, 0);
    assert_false(where(&r, 1, 0).cpu_ready);
    prefetch(&r, 1, 8);
    settle(&r);
    assert_int_equal(r.reads, 0);
    rig_close(&r);
}

/* From the first that they could not read on: by way of the cpu tier, which sees what is wrong with it. */
static void what_workers_cannot_read_is_read_for_them(void **state)
{
    struct rig r;

    rig_open(&r, &through);
    fk_core_instance_direct(r.core, r.instance, true);
    store_on_ssd_only(&r, 1, 8, 32);
    uint64_t op = get(&r, match(&r, 1, 8).lease, 0, 8);
    fk_core_job_done(r.core, fk_core_take_job(r.core, r.instance, 0), 3, -EBADMSG, r.now);
    settle(&r);
    expect_end(&r, op, 0, 8);
    assert_int_equal(r.reads, 5);
    assert_false(where(&r, 1, 2).cpu_ready);
    assert_true(where(&r, 1, 3).cpu_ready);
    rig_close(&r);
}

static void a_slot_that_workers_read_is_not_reused(void **state)
{
    struct rig r;

    rig_open(&r, &through);
    fk_core_instance_direct(r.core, r.instance, true);
    store_on_ssd_only(&r, 1, 8, 32);
    uint64_t op = get(&r, match(&r, 1, 8).lease, 0, 8);
    struct fk_job *job = fk_core_take_job(r.core, r.instance, 0);
    uint32_t slot = job->slots[0];
    assert_int_equal(fk_core_cancel(r.core, op, r.now), 0);
    assert_true(atomic_load(&job->cancelled));
    fk_core_reset(r.core, r.now);
    for (uint32_t chain = 10; chain < 40; chain++) {
        put(&r, chain, 8);
        run_ssd(&r);
        for (struct fk_job *j; (j = fk_core_take_job(r.core, r.instance, 0)) != NULL;)
            fk_core_job_done(r.core, j, j->n, 0, r.now);
        run_ssd(&r);
        assert_true(fk_key_equal(r.ssd[slot].key, (struct fk_key){ 0 }));   /* as the reset left it */
    }
    fk_core_job_done(r.core, job, 8, 0, r.now);
    settle(&r);
    assert_int_equal(r.last.blocks_ok == 8, false);
    rig_close(&r);
}

static void in_layers_workers_do_not_read(void **state)
{
    struct rig r;
    struct fk_core_op_args args = args_of(NULL, NULL);
    uint64_t op;

    rig_open(&r, &through);
    fk_core_instance_direct(r.core, r.instance, true);
    store_on_ssd_only(&r, 1, 8, 32);
    args.layerwise = true;
    assert_int_equal(fk_core_get(r.core, match(&r, 1, 8).lease, 0, 8, &args, r.now, &op), 0);
    settle(&r);
    expect_end(&r, op, 0, 8);
    assert_int_equal(r.reads, 8);
    store_on_ssd_only(&r, 2, 8, 32);
    prefetch(&r, 2, 8);
    settle(&r);
    assert_int_equal(r.reads, 16);
    rig_close(&r);
}

static void no_more_reads_than_the_window(void **state)
{
    struct rig r;
    struct fk_core_ssd_req q[64];

    rig_open(&r, &(struct rig_params){ .cpu = 32, .ssd = 200, .window = 4 });
    store_on_ssd_only(&r, 1, 16, 32);
    uint64_t op = get_chain(&r, 1, 16);
    for (uint32_t done = 0; done < 16; done += 4) {
        assert_int_equal(fk_core_take_ssd(r.core, q, 64), 4);
        for (int i = 0; i < 4; i++)
            ssd_answer(&r, &q[i], ssd_carry_out(&r, &q[i]));
        assert_true(fk_core_work(r.core).jobs);     /* copied while the next are read */
    }
    settle(&r);
    expect_end(&r, op, 0, 16);
    rig_close(&r);
}

static void two_gets_share_one_fill(void **state)
{
    struct rig r;

    rig_open(&r, &through);
    store_on_ssd_only(&r, 1, 8, 32);
    uint64_t a = get_chain(&r, 1, 8), b = get_chain(&r, 1, 8);
    settle(&r);
    assert_true(completed(&r, a) && completed(&r, b));
    assert_int_equal(r.last.blocks_ok, 8);
    assert_int_equal(r.reads, 8);
    rig_close(&r);
}

static void one_of_two_that_share_a_fill_is_cancelled(void **state)
{
    for (int which = 0; which < 2; which++) {
        struct rig r;
        rig_open(&r, &through);
        store_on_ssd_only(&r, 1, 8, 32);
        uint64_t op[2] = { get_chain(&r, 1, 8), get_chain(&r, 1, 8) };
        assert_int_equal(fk_core_cancel(r.core, op[which], r.now), 0);
        expect_end(&r, op[which], -ECANCELED, 0);
        settle(&r);
        expect_end(&r, op[!which], 0, 8);
        rig_close(&r);
    }
}

/* A fill that nobody waits for, and that the disk has not been asked for, is not read at all. */
static void an_unwanted_fill_is_not_read(void **state)
{
    struct rig r;

    rig_open(&r, &through);
    store_on_ssd_only(&r, 1, 8, 32);
    uint64_t op = get_chain(&r, 1, 8);
    fk_core_cancel(r.core, op, r.now);
    expect_end(&r, op, -ECANCELED, 0);
    settle(&r);
    assert_int_equal(r.reads, 0);
    assert_int_equal(matched(&r, 1, 8), 8);
    rig_close(&r);
}

static void a_read_in_flight_outlives_its_operation(void **state)
{
    struct rig r;
    struct fk_core_ssd_req q[16];

    rig_open(&r, &through);
    store_on_ssd_only(&r, 1, 8, 32);
    uint64_t op = get_chain(&r, 1, 8);
    uint32_t n = fk_core_take_ssd(r.core, q, 16);
    pass_time(&r, 1000000);
    expect_end(&r, op, -ETIMEDOUT, 0);              /* nothing of the engine's is at stake */
    expect_sound(&r);
    uint64_t again = get_chain(&r, 1, 8);           /* joins the fills that are out */
    assert_int_equal(fk_core_take_ssd(r.core, q + n, 16 - n), 0);
    for (uint32_t i = 0; i < n; i++)
        ssd_answer(&r, &q[i], ssd_carry_out(&r, &q[i]));
    settle(&r);
    expect_end(&r, again, 0, 8);
    rig_close(&r);
}

static void gets_come_before_prefetches(void **state)
{
    struct rig r;
    struct fk_core_ssd_req q[64];

    rig_open(&r, &(struct rig_params){ .cpu = 64, .ssd = 400 });
    store_on_ssd_only(&r, 1, 8, 64);
    store_on_ssd_only(&r, 2, 8, 64);
    uint64_t pre = prefetch(&r, 1, 8), op = get_chain(&r, 2, 8);
    uint32_t n = fk_core_take_ssd(r.core, q, 64);
    assert_int_equal(n, 16);
    for (uint32_t i = 0; i < 8; i++)
        assert_true(fk_key_equal(q[i].key, key_of(2, i)) || fk_key_equal(q[i].key, key_of(2, 7 - i)));
    for (uint32_t i = 0; i < n; i++)
        ssd_answer(&r, &q[i], ssd_carry_out(&r, &q[i]));
    settle(&r);
    assert_true(completed(&r, op) && completed(&r, pre));
    rig_close(&r);
}

/* A get that needs what a prefetch has queued pulls it to the front. */
static void a_get_hurries_a_prefetch(void **state)
{
    struct rig r;
    struct fk_core_ssd_req q;

    rig_open(&r, &(struct rig_params){ .cpu = 64, .ssd = 400 });
    store_on_ssd_only(&r, 1, 8, 64);
    store_on_ssd_only(&r, 2, 4, 64);
    uint64_t other = prefetch(&r, 1, 8), pre = prefetch(&r, 2, 4), op = get_chain(&r, 2, 4);
    for (int i = 0; i < 4; i++) {
        uint32_t reads = r.reads;
        assert_int_equal(fk_core_take_ssd(r.core, &q, 1), 1);
        bool wanted = false;
        for (uint32_t k = 0; k < 4; k++)
            wanted = wanted || fk_key_equal(q.key, key_of(2, k));
        assert_true(wanted);
        ssd_answer(&r, &q, ssd_carry_out(&r, &q));
        assert_int_equal(r.reads, reads + 1);
    }
    settle(&r);
    assert_true(completed(&r, other) && completed(&r, pre) && completed(&r, op));
    assert_int_equal(r.reads, 12);                  /* none was read twice */
    rig_close(&r);
}

static void prefetch_brings_blocks_and_reports(void **state)
{
    struct rig r;

    rig_open(&r, &through);
    uint64_t op = prefetch(&r, 9, 8);               /* nothing known */
    expect_end(&r, op, 0, 0);
    store_on_ssd_only(&r, 1, 8, 32);
    op = prefetch(&r, 1, 12);
    settle(&r);
    expect_end(&r, op, 0, 8);
    assert_int_equal(r.last.kind, FLEXKV_OP_PREFETCH);
    assert_int_equal(match(&r, 1, 8).cpu_blocks, 8);
    op = prefetch(&r, 1, 8);                        /* there already */
    expect_end(&r, op, 0, 8);
    rig_close(&r);
}

static void a_cancelled_prefetch_ends(void **state)
{
    struct rig r;
    struct fk_core_ssd_req q[4];

    rig_open(&r, &through);
    store_on_ssd_only(&r, 1, 8, 32);
    uint64_t op = prefetch(&r, 1, 8);
    assert_int_equal(fk_core_take_ssd(r.core, q, 4), 4);
    assert_int_equal(fk_core_cancel(r.core, op, r.now), 0);
    expect_end(&r, op, -ECANCELED, 0);
    for (int i = 0; i < 4; i++)
        ssd_answer(&r, &q[i], ssd_carry_out(&r, &q[i]));
    settle(&r);
    assert_int_equal(r.reads, 4);
    rig_close(&r);
}

/* ---- faults ---- */

static void bad_bytes_are_a_miss_from_then_on(void **state)
{
    struct rig r;
    int8_t results[8];
    struct fk_core_op_args args = args_of(results, NULL);
    uint64_t op;

    rig_open(&r, &through);
    store_on_ssd_only(&r, 1, 8, 32);
    memset(&r.ssd[where(&r, 1, 5).ssd_slot], 0xee, sizeof(r.ssd[0]));
    uint32_t bad_slot = where(&r, 1, 5).ssd_slot;
    assert_int_equal(fk_core_get(r.core, match(&r, 1, 8).lease, 0, 8, &args, r.now, &op), 0);
    settle(&r);
    expect_end(&r, op, -EBADMSG, 5);
    for (int i = 0; i < 8; i++)
        assert_int_equal(results[i], i < 5 ? 0 : -EBADMSG);
    assert_int_equal(matched(&r, 1, 8), 5);
    assert_true(fk_key_is_zero(r.ssd[bad_slot].key));       /* its record was emptied */
    assert_int_equal(stats_of(&r).ssd.errors, 1);
    op = put(&r, 1, 8);                             /* computed and stored anew */
    settle(&r);
    expect_end(&r, op, 0, 8);
    assert_int_equal(matched(&r, 1, 8), 8);
    rig_close(&r);
}

/* Nothing is new, only a hole is to be filled, and the cpu tier is full of others' blocks. */
static void a_hole_is_filled_in_a_full_cache(void **state)
{
    static const enum fk_policy_kind kinds[] = { FK_POLICY_LRU, FK_POLICY_FIFO, FK_POLICY_AUTO };

    for (size_t k = 0; k < fk_array_size(kinds); k++) {
        struct rig r;
        rig_open(&r, &(struct rig_params){ .cpu = 32, .ssd = 200, .policy = kinds[k] });
        store_on_ssd_only(&r, 1, 8, 32);
        memset(&r.ssd[where(&r, 1, 0).ssd_slot], 0xee, sizeof(r.ssd[0]));
        uint64_t op = get_chain(&r, 1, 2);
        run_ssd(&r);                                /* no sweep yet */
        run_jobs(&r);
        expect_end(&r, op, -EBADMSG, 0);
        for (uint32_t c = 2; stats_of(&r).cpu.free_slots > 2 && c < 40; c++) {
            put(&r, c, 8);
            run_jobs(&r);
            run_ssd(&r);
        }
        op = put(&r, 1, 8);
        run_jobs(&r);
        assert_true(completed(&r, op));
        assert_int_equal(r.last.blocks_ok, 8);
        assert_int_equal(matched(&r, 1, 8), 8);
        rig_close(&r);
    }
}

static void a_directory_that_is_out_hides_its_blocks(void **state)
{
    struct rig r;

    rig_open(&r, &(struct rig_params){ .cpu = 32, .ssd = 200, .dirs = 2, .stripe = 4 });
    store_on_ssd_only(&r, 1, 8, 32);                /* slots 0-3 on one, 4-7 on the other */
    uint32_t second = where(&r, 1, 4).ssd_slot / 4 % 2;
    assert_int_not_equal(where(&r, 1, 0).ssd_slot / 4 % 2, second);
    fk_core_ssd_dirs_out(r.core, r.space, 1u << second);
    assert_int_equal(matched(&r, 1, 8), 4);
    fk_core_ssd_dirs_out(r.core, r.space, 3);
    assert_int_equal(matched(&r, 1, 8), 0);
    put(&r, 2, 8);                                  /* stored in cpu, not written */
    uint32_t writes = r.writes;
    settle(&r);
    assert_int_equal(r.writes, writes);
    fk_core_ssd_dirs_out(r.core, r.space, 0);
    assert_int_equal(matched(&r, 1, 8), 8);         /* it came back with its blocks */
    uint64_t op = get_chain(&r, 1, 8);
    fk_core_ssd_dirs_out(r.core, r.space, 1u << second);
    struct fk_core_ssd_req q;
    while (fk_core_take_ssd(r.core, &q, 1))
        ssd_answer(&r, &q, q.kind == FK_SSD_READ && q.ssd_slot / 4 % 2 == second
                           ? -ENODEV : ssd_carry_out(&r, &q));
    settle(&r);
    expect_end(&r, op, -ENODEV, 4);
    fk_core_ssd_dirs_out(r.core, r.space, 0);
    assert_int_equal(matched(&r, 1, 8), 8);         /* nothing was forgotten */
    rig_close(&r);
}

/* A put of blocks that are on a directory which is out fills them in cpu. */
static void a_put_covers_for_a_directory_that_is_out(void **state)
{
    struct rig r;

    rig_open(&r, &(struct rig_params){ .cpu = 32, .ssd = 200, .dirs = 2, .stripe = 4 });
    store_on_ssd_only(&r, 1, 8, 32);
    fk_core_ssd_dirs_out(r.core, r.space, 3);
    uint64_t op = put(&r, 1, 8);
    settle(&r);
    expect_end(&r, op, 0, 8);
    assert_int_equal(match(&r, 1, 8).cpu_blocks, 8);
    fk_core_ssd_dirs_out(r.core, r.space, 0);
    settle(&r);
    assert_int_equal(matched(&r, 1, 8), 8);
    rig_close(&r);
}

static void reset_with_reads_and_writes_in_flight(void **state)
{
    struct rig r;
    struct fk_core_ssd_req q[64];

    rig_open(&r, &through);
    store_on_ssd_only(&r, 1, 8, 32);
    uint64_t op = get_chain(&r, 1, 8);
    put(&r, 2, 4);
    run_jobs(&r);
    uint32_t n = fk_core_take_ssd(r.core, q, 64), queued;
    assert_int_equal(n, 12);
    put(&r, 3, 4);
    run_jobs(&r);                                   /* its writes wait in the queue */
    fk_core_reset(r.core, r.now);
    expect_end(&r, op, -ECANCELED, 0);
    expect_sound(&r);
    uint64_t fresh = put(&r, 1, 4);
    for (uint32_t i = 0; i < n; i++)                /* answers from before the reset */
        ssd_answer(&r, &q[i], 0);
    expect_sound(&r);
    queued = r.writes;
    settle(&r);
    expect_end(&r, fresh, 0, 4);
    assert_int_equal(r.resets, 1);
    assert_int_equal(r.writes, queued + 4);         /* of the new put only */
    assert_int_equal(matched(&r, 1, 8), 4);
    assert_int_equal(matched(&r, 2, 4) + matched(&r, 3, 4), 0);
    assert_int_equal(stats_of(&r).ssd.free_slots, 196);
    rig_close(&r);
}

/* ---- a random run ---- */

struct random_run { struct rig *r; uint64_t rng, leases[8]; struct fk_core_ssd_req out[256];
                    struct fk_job *jobs[256]; uint32_t n_out, n_jobs; uint64_t begun, ended; };

static void take_all(struct random_run *t)
{
    struct flexkv_completion c[64];
    uint32_t n;

    while ((n = fk_core_take_completions(t->r->core, c, 64)) != 0)
        t->ended += n;
}

static void random_answer(struct random_run *t)
{
    if (t->n_out && fk_rng_below(&t->rng, 3)) {
        uint32_t at = fk_rng_below(&t->rng, t->n_out);
        struct fk_core_ssd_req q = t->out[at];
        t->out[at] = t->out[--t->n_out];
        uint32_t luck = fk_rng_below(&t->rng, 50);
        ssd_answer(t->r, &q, luck == 0 ? -EIO : luck == 1 ? -ENODEV : ssd_carry_out(t->r, &q));
    } else if (t->n_jobs) {
        uint32_t at = fk_rng_below(&t->rng, t->n_jobs);
        struct fk_job *j = t->jobs[at];
        t->jobs[at] = t->jobs[--t->n_jobs];
        uint32_t luck = fk_rng_below(&t->rng, 20);
        for (uint32_t i = 0; j->from_ssd && i < j->n; i++)      /* nobody else has got the slot meanwhile */
            assert_true(fk_key_equal(t->r->ssd[j->slots[i]].key, j->keys[i]) ||
                        fk_key_equal(t->r->ssd[j->slots[i]].key, (struct fk_key){ 0 }));
        fk_core_job_done(t->r->core, j, luck ? j->n : fk_rng_below(&t->rng, j->n), -EIO, t->r->now);
    }
}

static void random_take(struct random_run *t)
{
    uint32_t n = fk_core_take_ssd(t->r->core, t->out + t->n_out,
                                  fk_min(fk_rng_below(&t->rng, 16), 256 - t->n_out));

    for (uint32_t i = t->n_out, end = t->n_out + n; i < end; i++) {
        if (t->out[i].kind == FK_SSD_READ || t->out[i].kind == FK_SSD_WRITE)
            t->out[t->n_out++] = t->out[i];
        else
            ssd_carry_out(t->r, &t->out[i]);        /* in the order taken */
    }
    for (uint32_t rank = 0; rank < t->r->ranks && t->n_jobs < 256; rank++) {
        struct fk_job *j = fk_core_take_job(t->r->core, t->r->instance, rank);
        if (j)
            t->jobs[t->n_jobs++] = j;
    }
}

static void random_call(struct random_run *t)
{
    struct rig *r = t->r;
    uint32_t chain = 1 + fk_rng_below(&t->rng, 12), n = 1 + fk_rng_below(&t->rng, 24);
    uint64_t *lease = &t->leases[fk_rng_below(&t->rng, 8)];
    struct fk_core_op_args args = args_of(NULL, NULL);
    uint64_t op;

    if (fk_rng_below(&t->rng, 50) == 0)
        fk_core_instance_direct(r->core, r->instance, fk_rng_below(&t->rng, 2));
    switch (fk_rng_below(&t->rng, 12)) {
    case 0: case 1: case 2:
        put(r, chain, n);
        t->begun++;
        break;
    case 3: case 4: case 5:
        *lease = match(r, chain, n).lease;
        break;
    case 6: case 7: case 8:
        t->begun += fk_core_get(r->core, *lease, 0, 1 + fk_rng_below(&t->rng, 4), &args, r->now, &op) == 0;
        break;
    case 9:
        prefetch(r, chain, n);
        t->begun++;
        break;
    case 10:
        (void)fk_core_release(r->core, *lease);
        break;
    default:
        (void)fk_core_cancel(r->core, (uint64_t)(2 * fk_rng_below(&t->rng, 200) + 1) << 32 |
                             (1 + fk_rng_below(&t->rng, 8)), r->now);
    }
}

static void every_operation_ends_once_in_a_random_run(void **state)
{
    static struct rig r;
    static struct random_run t;

    for (uint64_t seed = 1; seed <= 30; seed++) {
        struct rig_params p = { .cpu = 8 + (uint32_t)seed * 2, .ssd = seed % 5 ? 60 : 0, .dirs = 2,
                                .stripe = 4, .ranks = 1 + seed % 2, .window = 1 + (uint32_t)seed % 9,
                                .write = (enum fk_write_policy)(seed % 3),
                                .policy = (enum fk_policy_kind)(seed % FK_POLICY_KINDS),
                                .start = seed % 4 ? 1.0 : 0.7, .ratio = seed % 4 ? 0 : 0.1 };
        rig_open(&r, &p);
        memset(&t, 0, sizeof(t));
        t.r = &r;
        t.rng = seed;
        for (int step = 0; step < 6000; step++) {
            uint32_t what = fk_rng_below(&t.rng, 1000);
            if (what < 300)
                random_call(&t);
            else if (what < 600)
                random_take(&t);
            else if (what < 950)
                random_answer(&t);
            else if (what < 990)
                pass_time(&r, fk_rng_below(&t.rng, 200000));
            else if (what < 998 && p.ssd)
                fk_core_ssd_dirs_out(r.core, r.space, fk_rng_below(&t.rng, 4));
            else if (what == 999)
                fk_core_reset(r.core, r.now);
            take_all(&t);
            if (step % 16 == 0)
                expect_sound(&r);
        }
        while (t.n_out || t.n_jobs)
            random_answer(&t);
        settle(&r);
        pass_time(&r, 10000000);
        settle(&r);
        take_all(&t);
        assert_int_equal(t.ended + r.n_seen, t.begun);
        rig_close(&r);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(through_writes_what_is_stored),
        cmocka_unit_test(on_reuse_writes_what_is_got),
        cmocka_unit_test(on_evict_writes_what_leaves),
        cmocka_unit_test(a_failed_write_leaves_the_cpu_copy),
        cmocka_unit_test(a_slot_being_written_is_not_reused),
        cmocka_unit_test(a_get_reads_through_a_cpu_slot),
        cmocka_unit_test(workers_read_what_is_on_ssd_only),
        cmocka_unit_test(what_workers_cannot_read_is_read_for_them),
        cmocka_unit_test(a_slot_that_workers_read_is_not_reused),
        cmocka_unit_test(in_layers_workers_do_not_read),
        cmocka_unit_test(no_more_reads_than_the_window),
        cmocka_unit_test(two_gets_share_one_fill),
        cmocka_unit_test(one_of_two_that_share_a_fill_is_cancelled),
        cmocka_unit_test(an_unwanted_fill_is_not_read),
        cmocka_unit_test(a_read_in_flight_outlives_its_operation),
        cmocka_unit_test(gets_come_before_prefetches),
        cmocka_unit_test(a_get_hurries_a_prefetch),
        cmocka_unit_test(prefetch_brings_blocks_and_reports),
        cmocka_unit_test(a_cancelled_prefetch_ends),
        cmocka_unit_test(bad_bytes_are_a_miss_from_then_on),
        cmocka_unit_test(a_hole_is_filled_in_a_full_cache),
        cmocka_unit_test(a_directory_that_is_out_hides_its_blocks),
        cmocka_unit_test(a_put_covers_for_a_directory_that_is_out),
        cmocka_unit_test(reset_with_reads_and_writes_in_flight),
        cmocka_unit_test(every_operation_ends_once_in_a_random_run),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
