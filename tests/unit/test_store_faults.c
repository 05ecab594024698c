/*
 * test_store_faults.c - the third party's store when what is below it fails: backends with errors, full or hanging; real
 * file systems that are full, read-only, go and come back, or never answer.
 */
#include "store_rig.h"

/* ---- stores that fail ---- */

static void errors_take_it_out_and_it_comes_back(void **state)
{
    struct fk_store_params p = { .backend = &faulty, .errors = 3, .retry_us = 30000 };
    struct rig r;

    rig_open(&r, &p);
    write_block(&r, 1);
    atomic_store(&fault.get_rc, -EIO);
    atomic_store(&fault.probe_rc, -EIO);
    for (int i = 0; i < 3; i++) {
        assert_true(fk_store_reads(r.store));
        assert_int_equal(read_block(&r, 1), -EIO);
    }
    assert_false(fk_store_reads(r.store));
    assert_false(fk_store_writes(r.store));
    assert_false(knows(&r, 1));
    assert_int_equal(submit_read(&r, 1, 1000000), -ENODEV);
    usleep(200000);
    assert_false(fk_store_reads(r.store));
    atomic_store(&fault.get_rc, 0);
    atomic_store(&fault.probe_rc, 0);
    wait_until(fk_store_reads(r.store));
    assert_true(knows(&r, 1));
    assert_int_equal(read_block(&r, 1), 0);
    struct fk_store_stats st = stats_of_store(&r);
    assert_int_equal(st.outs, 1);
    assert_int_equal(st.returns, 1);
    assert_int_equal(st.read_errors, 3);
    rig_close(&r);
    rig_remove(&r);
}

static void only_writing_is_out(void **state)
{
    static const int why[] = { -ENOSPC, -EDQUOT, -EROFS, -ESTALE };
    struct fk_store_params p = { .backend = &faulty, .retry_us = 30000 };
    struct rig r;

    rig_open(&r, &p);
    write_block(&r, 1);
    for (size_t i = 0; i < fk_array_size(why); i++) {
        atomic_store(&fault.put_rc, why[i]);
        atomic_store(&fault.write_probe_rc, why[i]);
        assert_int_equal(write_block(&r, 2), why[i]);
        assert_false(fk_store_writes(r.store));
        assert_int_equal(read_block(&r, 1), 0);
        atomic_store(&fault.put_rc, 0);
        atomic_store(&fault.write_probe_rc, 0);
        wait_until(fk_store_writes(r.store));
    }
    assert_int_equal(stats_of_store(&r).full, 2);
    assert_int_equal(write_block(&r, 2), 0);
    rig_close(&r);
    rig_remove(&r);
}

static void a_hang_keeps_only_the_buffer(void **state)
{
    struct fk_store_params p = { .backend = &faulty, .threads = 2, .retry_us = 20000 };
    struct fk_store_done d[8];
    struct rig r;

    rig_open(&r, &p);
    write_block(&r, 1);
    write_block(&r, 2);
    atomic_store(&fault.hang, true);
    for (int i = 0; i < 5; i++)         /* two hang, three wait for a thread */
        assert_int_equal(submit_read(&r, 1 + i % 2, 100000), 0);
    wait_until(stats_of_store(&r).running == 2);
    wait_until(fk_store_next_wakeup(r.store) <= fk_clock_us());
    assert_int_equal(fk_store_take(r.store, d, 8, fk_clock_us()), 5);
    int quarantined = 0;
    for (int i = 0; i < 5; i++) {
        assert_int_equal(d[i].status, -ETIMEDOUT);
        quarantined += d[i].flags == FK_STORE_QUARANTINED;
    }
    assert_int_equal(quarantined, 2);
    assert_int_equal(stats_of_store(&r).quarantined, 2);
    assert_false(fk_store_reads(r.store));
    usleep(200000);                     /* it would answer a probe, but no thread is left */
    assert_false(fk_store_reads(r.store));
    atomic_store(&fault.hang, false);
    for (int got = 0; got < 2;) {
        uint32_t n = fk_store_take(r.store, d, 8, fk_clock_us());
        for (uint32_t i = 0; i < n; i++)
            assert_int_equal(d[i].flags, FK_STORE_RELEASED);
        got += (int)n;
        usleep(1000);
    }
    wait_until(fk_store_reads(r.store));
    assert_int_equal(read_block(&r, 1), 0);
    assert_int_equal(stats_of_store(&r).quarantined, 0);
    rig_close(&r);
    rig_remove(&r);
}

static void closing_does_not_wait_for_a_hang(void **state)
{
    struct fk_store_params p = { .backend = &faulty, .timeout_us = 50000 };
    struct rig r;

    rig_open(&r, &p);
    write_block(&r, 1);
    atomic_store(&fault.hang, true);
    assert_int_equal(submit_read(&r, 1, 10000000), 0);
    wait_until(stats_of_store(&r).running == 1);
    assert_false(fk_store_close(r.store));
    atomic_store(&fault.hang, false);
    wait_until(atomic_load(&fault.closed));     /* the last thread has freed it */
    free(r.buf);
    rig_remove(&r);
}

static void opening_does_not_wait_for_a_hang(void **state)
{
    struct fk_store_params p = { .backend = &faulty, .timeout_us = 50000 };
    struct rig r;

    rig_dir(&r);
    memset(&fault, 0, sizeof(fault));
    atomic_store(&fault.hang_open, true);
    assert_int_equal(rig_try(&r, r.dir, &p), -ETIMEDOUT);
    assert_non_null(strstr(r.error, "remote_cache_dir"));
    atomic_store(&fault.hang_open, false);
    wait_until(atomic_load(&fault.closed));
    rig_remove(&r);
}

static void queues_are_bounded(void **state)
{
    struct fk_store_params p = { .backend = &faulty, .threads = 2, .max_queued = 4 };
    struct fk_store_done d[8];
    struct rig r;

    rig_open(&r, &p);
    atomic_store(&fault.hang, true);
    for (int i = 0; i < 4; i++)
        assert_int_equal(submit_write(&r, (uint64_t)i), 0);
    assert_int_equal(submit_write(&r, 5), -EAGAIN);
    assert_int_equal(submit_read(&r, 5, 1000000), -EAGAIN);
    wait_until(stats_of_store(&r).running == 1);
    usleep(20000);
    assert_int_equal(stats_of_store(&r).running, 1);    /* one of two threads is left to readers */
    atomic_store(&fault.hang, false);
    for (int got = 0; got < 4; usleep(1000))
        got += (int)fk_store_take(r.store, d, 8, fk_clock_us());
    rig_close(&r);
    rig_remove(&r);
}

/* ---- real file systems that misbehave ---- */

static void a_full_file_system(void **state)
{
    struct fk_store_params p = { .retry_us = 30000 };
    struct rig r;
    int rc = 0;
    uint64_t i = 0;

    if (!rig_mount(&r, "tmpfs", "size=1m"))
        skip();
    rig_open_at(&r, r.dir, &p);
    for (; i < 100 && !rc; i++)
        rc = write_block(&r, i);
    assert_int_equal(rc, -ENOSPC);
    assert_false(fk_store_writes(r.store));
    assert_int_equal(read_block(&r, 0), 0);
    for (uint64_t k = 0; k < i / 2; k++)
        unlink_block(&r, k);
    wait_until(fk_store_writes(r.store));
    assert_int_equal(write_block(&r, 500), 0);
    assert_int_equal(read_block(&r, 500), 0);
    assert_int_equal(files_named(r.dir, ".tmp-"), 0);
    rig_close(&r);
    rig_unmount(&r);
}

/* With a capacity above what is there, a full file system makes room all the same. */
static void a_full_file_system_makes_room(void **state)
{
    struct fk_store_params p = { .retry_us = 30000, .capacity_bytes = 600 << 10 };
    struct rig r;

    if (!rig_mount(&r, "tmpfs", "size=1m"))
        skip();
    rig_open_at(&r, r.dir, &p);
    for (uint64_t i = 0; i < 100; i++) {
        int rc = write_block(&r, i);
        if (rc == -ENODEV || rc == -ENOSPC)
            wait_until(fk_store_writes(r.store));
    }
    rig_scan(&r);
    assert_true(stats_of_store(&r).used_bytes <= 600 << 10);
    assert_true(stats_of_store(&r).evicted > 0);
    rig_close(&r);
    rig_unmount(&r);
}

static void a_read_only_file_system(void **state)
{
    struct fk_store_params p = { .retry_us = 30000 };
    struct rig r;

    if (!rig_mount(&r, "tmpfs", "size=2m"))
        skip();
    rig_open_at(&r, r.dir, &p);
    write_block(&r, 1);
    assert_int_equal(mount(NULL, r.dir, NULL, MS_REMOUNT | MS_RDONLY, NULL), 0);
    assert_int_equal(write_block(&r, 2), -EROFS);
    assert_false(fk_store_writes(r.store));
    assert_int_equal(read_block(&r, 1), 0);
    rig_close(&r);
    rig_open_at(&r, r.dir, &p);         /* opens, and is read */
    rig_scan(&r);
    assert_int_equal(read_block(&r, 1), 0);
    assert_int_equal(mount(NULL, r.dir, NULL, MS_REMOUNT, NULL), 0);
    rig_close(&r);
    rig_unmount(&r);
}

/* The mount has gone: nothing is written below it, and when it comes back it is used again. */
static void a_file_system_that_goes_and_comes_back(void **state)
{
    struct fk_store_params p = { .retry_us = 30000, .scan_us = 30000 };
    char there[96], tmp[110];
    struct rig r;

    if (!rig_mount(&r, "tmpfs", "size=2m"))
        skip();
    rig_open_at(&r, r.dir, &p);
    write_block(&r, 1);
    snprintf(there, sizeof(there), "%s-b", r.dir);
    assert_int_equal(mkdir(there, 0700), 0);
    assert_int_equal(mount(r.dir, there, NULL, MS_BIND, NULL), 0);
    assert_int_equal(umount2(r.dir, MNT_DETACH), 0);
    wait_until(!fk_store_reads(r.store));
    assert_int_equal(submit_write(&r, 2), -ENODEV);
    assert_int_equal(files_in(r.dir), 0);
    assert_int_equal(mount(there, r.dir, NULL, MS_BIND, NULL), 0);
    wait_until(fk_store_reads(r.store) && fk_store_writes(r.store));
    rig_scan(&r);
    assert_int_equal(read_block(&r, 1), 0);
    rig_close(&r);
    umount2(there, MNT_DETACH);
    snprintf(tmp, sizeof(tmp), "%s", there);
    rmdir(tmp);
    rig_unmount(&r);
}

/* A FUSE mount that nobody answers: what a dead NFS server looks like. */
static void a_file_system_that_hangs(void **state)
{
    struct fk_store_params p = { .threads = 2, .retry_us = 50000, .errors = 2, .timeout_us = 500000 };
    struct fk_store_done d[8];
    struct rig r;

    rig_open(&r, &p);
    write_block(&r, 1);
    write_block(&r, 2);
    int fuse = mount_dead_fuse(r.dir);
    if (fuse < 0) {
        rig_close(&r);
        rig_remove(&r);
        skip();
    }
    for (int i = 0; i < 4; i++)
        assert_int_equal(submit_read(&r, 1 + (uint64_t)i % 2, 50000), 0);
    int ended = 0, busy = 0, released = 0;
    for (uint64_t until = fk_clock_us() + 10000000; ended < 4 && fk_clock_us() < until; usleep(1000)) {
        uint32_t n = fk_store_take(r.store, d, 8, fk_clock_us());
        for (uint32_t i = 0; i < n; i++, ended++) {
            assert_int_equal(d[i].status, -ETIMEDOUT);
            busy += d[i].flags == FK_STORE_QUARANTINED;
        }
    }
    assert_int_equal(ended, 4);
    assert_int_equal(busy, 2);
    assert_false(fk_store_reads(r.store));
    struct rig other;
    memset(&other, 0, sizeof(other));
    assert_int_equal(rig_try(&other, r.dir, &p), -ETIMEDOUT);
    assert_int_equal(umount2(r.dir, MNT_DETACH), 0);
    close(fuse);                        /* now all who wait get ENOTCONN */
    for (uint64_t until = fk_clock_us() + 10000000; released < 2 && fk_clock_us() < until; usleep(1000)) {
        uint32_t n = fk_store_take(r.store, d, 8, fk_clock_us());
        for (uint32_t i = 0; i < n; i++)
            released += d[i].flags == FK_STORE_RELEASED;
    }
    assert_int_equal(released, 2);
    wait_until(fk_store_reads(r.store) && fk_store_writes(r.store));
    assert_int_equal(read_block(&r, 1), 0);
    rig_close(&r);
    rig_remove(&r);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(errors_take_it_out_and_it_comes_back),
        cmocka_unit_test(only_writing_is_out),
        cmocka_unit_test(a_hang_keeps_only_the_buffer),
        cmocka_unit_test(closing_does_not_wait_for_a_hang),
        cmocka_unit_test(opening_does_not_wait_for_a_hang),
        cmocka_unit_test(queues_are_bounded),
        cmocka_unit_test(a_full_file_system),
        cmocka_unit_test(a_full_file_system_makes_room),
        cmocka_unit_test(a_read_only_file_system),
        cmocka_unit_test(a_file_system_that_goes_and_comes_back),
        cmocka_unit_test(a_file_system_that_hangs),
    };

    fk_log_set_level(FK_LOG_OFF);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
