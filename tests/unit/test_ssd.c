/*
 * test_ssd.c - the SSD store at work: bytes, merging, checksums, records, faults, directories
 * out and back. Restart, refusal and fsck: test_ssd_restart.c.
 */
#include "ssd_rig.h"

/* --- bytes --- */

static void round_trip(bool uring, uint32_t n_dirs, uint64_t block_bytes, uint32_t chunk)
{
    enum { N = 24 };
    struct fk_ssd_req reqs[N];
    struct rig r;

    rig_init(&r, n_dirs, N, block_bytes);
    rig_use_engine(&r, any_engine(uring));
    r.engine->ops->register_memory(r.engine, r.mem, N * r.slot_bytes);
    r.params.io_chunk_bytes = chunk;
    rig_open(&r);
    for (uint32_t i = 0; i < N; i++)
        reqs[i] = write_req(&r, i, 100 + i);
    rig_submit(&r, reqs, N);
    rig_drain(&r);
    for (uint32_t i = 0; i < N; i++)
        assert_int_equal(r.status[reqs[i].id], 0);
    for (uint32_t i = 0; i < N; i++)
        reqs[i] = read_req(&r, (i * 5) % N, 100 + (i * 5) % N);
    rig_submit(&r, reqs, N);
    rig_drain(&r);
    for (uint32_t i = 0; i < N; i++) {
        assert_int_equal(r.status[reqs[i].id], 0);
        assert_true(is_block(&r, buf_of(&r, i), 100 + i));
    }
    rig_reopen(&r);
    assert_int_equal(rig_recover(&r), N);
    for (uint32_t i = 0; i < N; i++)
        assert_int_equal(rig_get(&r, i, 100 + i), 0);
    rig_free(&r);
}

static void test_round_trip(void **state)
{
    static const uint64_t sizes[] = { 1, 4096, 5000, 65536, 300000 };

    for (size_t i = 0; i < fk_array_size(sizes); i++) {
        for (uint32_t dirs = 1; dirs <= 3; dirs++) {
            round_trip(true, dirs, sizes[i], 128 * 1024);
            round_trip(false, dirs, sizes[i], 128 * 1024);
        }
    }
    round_trip(true, 2, 100000, 1);     /* chunk rounded up to one page: 25 I/Os a block */
    round_trip(false, 1, 4096, 0);
}

/* Neighbours in slots and memory are one I/O, up to the chunk; their records one write. */
static void test_merging(void **state)
{
    enum { N = 32 };
    struct fk_ssd_req reqs[N];
    struct fk_ssd_stats st;
    struct rig r;

    rig_init(&r, 1, N, 16384);
    r.params.io_chunk_bytes = 8 * 16384;
    rig_open(&r);
    for (uint32_t i = 0; i < N; i++)
        reqs[i] = write_req(&r, i, i);
    sw(r.engine)->data_ios = sw(r.engine)->table_ios = 0;
    rig_submit(&r, reqs, N);
    rig_drain(&r);
    rig_settle(&r);
    fk_ssd_get_stats(r.ssd, &st);
    assert_int_equal(sw(r.engine)->data_ios, 4);
    assert_int_equal(sw(r.engine)->table_ios, 1);
    assert_int_equal(st.writes, 4);
    assert_int_equal(st.table_writes, 1);
    assert_int_equal(st.write_bytes, N * 16384);
    for (uint32_t i = 0; i < N; i++)    /* neighbours in memory, but not in slots */
        reqs[i] = read_req(&r, N - 1 - i, N - 1 - i);
    rig_submit(&r, reqs, N);
    rig_drain(&r);
    fk_ssd_get_stats(r.ssd, &st);
    assert_int_equal(st.reads, N);
    rig_free(&r);
    rig_init(&r, 2, N, 16384);          /* stripes of 4 over two directories */
    rig_open(&r);
    for (uint32_t i = 0; i < N; i++)
        reqs[i] = write_req(&r, i, i);
    rig_submit(&r, reqs, N);
    rig_drain(&r);
    fk_ssd_get_stats(r.ssd, &st);
    assert_int_equal(st.writes, N / 4);
    assert_int_equal(fk_ssd_dir_of(r.ssd, 3), 0);
    assert_int_equal(fk_ssd_dir_of(r.ssd, 4), 1);
    assert_int_equal(fk_ssd_dir_of(r.ssd, 8), 0);
    assert_int_equal(fk_ssd_stripe_slots(r.ssd), 4);
    rig_free(&r);
}

static void test_geometry(void **state)
{
    for (uint32_t dirs = 1; dirs <= 5; dirs++) {
        for (uint32_t n = 1; n < 40; n++) {
            struct ssd_geometry g = { .block_bytes = 1, .n_slots = n, .n_dirs = dirs,
                                      .stripe_slots = 3 };
            uint32_t count[5] = { 0 };

            ssd_geometry_derive(&g);
            for (uint32_t s = 0; s < n; s++) {
                uint32_t d = ssd_geometry_dir(&g, s), l = ssd_geometry_local(&g, s);

                assert_int_equal(l, count[d]++);
                assert_int_equal(ssd_geometry_slot(&g, d, l), s);
            }
            for (uint32_t d = 0; d < dirs; d++)
                assert_int_equal(ssd_geometry_dir_slots(&g, d), count[d]);
        }
    }
}

static void test_wrong_reads(void **state)
{
    struct fk_ssd_stats st;
    struct rig r;
    char flip = 0;

    rig_init(&r, 1, 8, 8192);
    rig_open(&r);
    assert_int_equal(rig_get(&r, 0, 5), -EBADMSG);          /* never written */
    assert_int_equal(rig_put(&r, 0, 5), 0);
    assert_int_equal(rig_get(&r, 0, 5), 0);
    assert_int_equal(rig_get(&r, 0, 6), -EBADMSG);          /* another key */
    assert_int_equal(rig_get(&r, 1, 5), -EBADMSG);          /* another slot */
    peek(&r, 0, "data", SSD_DATA_START + 8191, &flip, 1);
    flip ^= 1;
    poke(&r, 0, "data", SSD_DATA_START + 8191, &flip, 1);
    assert_int_equal(rig_get(&r, 0, 5), -EBADMSG);
    assert_int_equal(rig_put(&r, 0, 7), 0);                 /* overwritten: good again */
    assert_int_equal(rig_get(&r, 0, 7), 0);
    assert_int_equal(rig_get(&r, 0, 5), -EBADMSG);
    struct fk_ssd_req bad = { .op = FK_IO_READ, .slot = 8, .buf = r.mem, .key = key_of(1) };
    rig_submit(&r, &bad, 1);
    rig_drain(&r);
    assert_int_equal(r.status[0], -EINVAL);
    fk_ssd_get_stats(r.ssd, &st);
    assert_int_equal(st.checksum_errors, 5);
    rig_free(&r);
}

/* Padding between payload and slot end is not part of the block. */
static void test_padding(void **state)
{
    struct rig r;
    char junk[96];

    memset(junk, 7, sizeof(junk));
    rig_init(&r, 1, 2, 4000);
    rig_open(&r);
    assert_int_equal(rig_put(&r, 1, 9), 0);
    poke(&r, 0, "data", SSD_DATA_START + 4096 + 4000, junk, sizeof(junk));
    assert_int_equal(rig_get(&r, 1, 9), 0);
    rig_free(&r);
}

/* --- the table --- */

/* Writes and forgets in quick succession: no record twice in flight, the newest one stays. */
static void test_table_order(void **state)
{
    enum { N = 16, ROUNDS = 300 };
    uint64_t rng = 4, holds[N] = { 0 };
    struct rig r;

    rig_init(&r, 2, N, 4096);
    rig_open(&r);
    for (int round = 0; round < ROUNDS; round++) {
        uint32_t slot = fk_rng_below(&rng, N);

        if (fk_rng_below(&rng, 3) == 0) {
            fk_ssd_forget(r.ssd, slot);
            holds[slot] = 0;
        } else {
            holds[slot] = 1000 + (uint64_t)round;
            assert_int_equal(rig_put(&r, slot, holds[slot]), 0);
        }
        r.now += fk_rng_below(&rng, 10000);
        fk_ssd_tick(r.ssd, r.now);      /* batches overlap with what follows */
    }
    assert_int_equal(sw(r.engine)->overlaps, 0);
    rig_reopen(&r);
    assert_int_equal(sw(r.engine)->overlaps, 0);
    rig_recover(&r);
    uint32_t at = 0;
    for (uint32_t s = 0; s < N; s++) {
        if (!holds[s])
            continue;
        assert_true(at < r.n_found && r.found[at].slot == s);
        assert_true(fk_key_equal(r.found[at].key, key_of(holds[s])));
        assert_int_equal(rig_get(&r, s, holds[s]), 0);
        at++;
    }
    assert_int_equal(at, r.n_found);
    rig_free(&r);
}

static void test_next_wakeup(void **state)
{
    struct rig r;

    rig_init(&r, 1, 4, 4096);
    rig_open(&r);
    assert_true(fk_ssd_next_wakeup(r.ssd) == UINT64_MAX);
    assert_int_equal(rig_put(&r, 0, 1), 0);
    assert_in_range(fk_ssd_next_wakeup(r.ssd), r.now, r.now + 10000);
    r.now = fk_ssd_next_wakeup(r.ssd);
    fk_ssd_tick(r.ssd, r.now);
    assert_true(fk_ssd_inflight(r.ssd) > 0);
    rig_drain(&r);
    assert_true(fk_ssd_next_wakeup(r.ssd) == UINT64_MAX);
    rig_free(&r);
}

static void test_forget_reset(void **state)
{
    struct rig r;

    rig_init(&r, 2, 8, 4096);
    rig_open(&r);
    for (uint32_t i = 0; i < 8; i++)
        assert_int_equal(rig_put(&r, i, i), 0);
    fk_ssd_forget(r.ssd, 3);
    assert_int_equal(rig_get(&r, 3, 3), -EBADMSG);
    rig_reopen(&r);
    assert_int_equal(rig_recover(&r), 7);
    struct fk_ssd_req req = write_req(&r, 3, 33);
    rig_submit(&r, &req, 1);            /* under way during the reset: must not come back */
    assert_int_equal(fk_ssd_reset(r.ssd, r.now), 0);
    rig_drain(&r);
    assert_int_equal(r.status[req.id], -ECANCELED);
    assert_int_equal(rig_get(&r, 3, 33), -EBADMSG);
    assert_int_equal(rig_get(&r, 0, 0), -EBADMSG);
    assert_int_equal(rig_put(&r, 5, 50), 0);
    rig_reopen(&r);
    assert_int_equal(rig_recover(&r), 1);
    assert_int_equal(rig_get(&r, 5, 50), 0);
    rig_free(&r);
}

/* --- faults --- */

/* Random puts, gets and restarts under one kind of fault: an answer of 0 means right bytes. */
static void under_fault(enum fk_fault_kind kind, bool tables, bool uring)
{
    enum { N = 12, OPS = 400 };
    struct fk_fault_params p = { .seed = 11 + (uint64_t)kind, .delay_us = 2000, .tables = tables };
    uint64_t rng = 5, holds[N] = { 0 };
    unsigned good = 0;
    struct rig r;

    p.rate[kind] = kind == FK_FAULT_DELAY ? 0.05 : 0.1;
    rig_init(&r, 2, N, 20000);
    rig_open(&r);                       /* made on a sound disk */
    fk_ssd_close(r.ssd);
    r.ssd = NULL;
    struct fk_engine *faulty;
    assert_int_equal(fk_engine_fault_create(any_engine(uring), &p, &faulty), 0);
    rig_use_engine(&r, faulty);
    rig_open(&r);
    for (int i = 0; i < OPS; i++) {
        uint32_t slot = fk_rng_below(&rng, N);

        r.now += 100000;
        if (fk_rng_below(&rng, 2) || !holds[slot]) {
            holds[slot] = 1 + (uint64_t)i;
            int rc = rig_put(&r, slot, holds[slot]);
            if (rc < 0)
                holds[slot] = 0;
        } else {
            good += rig_get(&r, slot, holds[slot]) == 0;
        }
        fk_ssd_tick(r.ssd, r.now);
        if (i % 100 == 99) {
            rig_reopen(&r);
            rig_recover(&r);
        }
    }
    assert_true(good > 20);
    assert_true(fk_engine_fault_count(r.engine, kind) > 5);
    rig_free(&r);
}

static void test_faults(void **state)
{
    for (int k = 0; k < FK_FAULT_KINDS; k++) {
        under_fault(k, false, false);
        under_fault(k, true, false);
        under_fault(k, false, true);
    }
}

/* What a failed write left in the slot is nobody's: the old record goes. */
static void test_failed_write_empties_record(void **state)
{
    struct rig r;

    rig_init(&r, 1, 4, 4096);
    rig_open(&r);
    assert_int_equal(rig_put(&r, 2, 1), 0);
    rig_settle(&r);
    sw(r.engine)->broken = -EIO;
    assert_int_equal(rig_put(&r, 2, 2), -EIO);
    sw(r.engine)->broken = 0;
    assert_int_equal(rig_get(&r, 2, 1), -EBADMSG);
    assert_int_equal(rig_get(&r, 2, 2), -EBADMSG);
    rig_reopen(&r);
    assert_int_equal(rig_recover(&r), 0);
    rig_free(&r);
}

/* Of a merged run that fails in the middle, what was read before is good. */
static void test_partial_run(void **state)
{
    enum { N = 8 };
    struct fk_ssd_req reqs[N];
    struct rig r;
    char path[200];

    rig_init(&r, 1, N, 4096);
    rig_open(&r);
    for (uint32_t i = 0; i < N; i++)
        assert_int_equal(rig_put(&r, i, i), 0);
    file_path(&r, 0, "data", path, sizeof(path));
    assert_int_equal(truncate(path, SSD_DATA_START + 5 * 4096 + 100), 0);
    for (uint32_t i = 0; i < N; i++)
        reqs[i] = read_req(&r, i, i);
    rig_submit(&r, reqs, N);
    rig_drain(&r);
    for (uint32_t i = 0; i < N; i++) {
        assert_int_equal(r.status[reqs[i].id], i < 5 ? 0 : -EIO);
        if (i < 5)
            assert_true(is_block(&r, buf_of(&r, i), i));
    }
    rig_reopen(&r);                     /* the file is made whole again, zeros are no blocks */
    for (uint32_t i = 0; i < N; i++)
        assert_int_equal(rig_get(&r, i, i), i < 5 ? 0 : -EBADMSG);
    rig_free(&r);
}

/* One bad sector costs one block, not all that were read together. */
static void test_bad_sector(void **state)
{
    enum { N = 8 };
    struct fk_ssd_req reqs[N];
    struct rig r;

    rig_init(&r, 1, N, 4096);
    rig_open(&r);
    for (uint32_t i = 0; i < N; i++)
        assert_int_equal(rig_put(&r, i, i), 0);
    sw(r.engine)->bad_at = SSD_DATA_START + 3 * 4096 + 5;
    for (uint32_t i = 0; i < N; i++)
        reqs[i] = read_req(&r, i, i);
    rig_submit(&r, reqs, N);
    rig_drain(&r);
    for (uint32_t i = 0; i < N; i++) {
        assert_int_equal(r.status[reqs[i].id], i == 3 ? -EIO : 0);
        if (i != 3)
            assert_true(is_block(&r, buf_of(&r, i), i));
    }
    sw(r.engine)->bad_at = 0;
    rig_free(&r);
}

/* --- directories out and back --- */

static uint32_t slot_in(struct rig *r, uint32_t dir)
{
    uint32_t s = 0;

    while (fk_ssd_dir_of(r->ssd, s) != dir)
        s++;
    return s;
}

static void test_device_out(void **state)
{
    static const int errors[] = { -EIO, -ENOSPC, -EROFS, -ENODEV, -EAGAIN };

    for (size_t i = 0; i < fk_array_size(errors); i++) {
        struct fk_ssd_stats st;
        struct rig r;

        rig_init(&r, 1, 8, 4096);
        rig_open(&r);
        for (uint32_t s = 0; s < 4; s++)
            assert_int_equal(rig_put(&r, s, s), 0);
        rig_settle(&r);
        sw(r.engine)->broken = errors[i];
        for (int k = 0; k < 3; k++) {
            assert_int_equal(fk_ssd_dirs_out(r.ssd), 0);
            assert_int_equal(rig_get(&r, 0, 0), errors[i] == -EAGAIN ? -EIO : errors[i]);
        }
        assert_int_equal(fk_ssd_dirs_out(r.ssd), 1);
        unsigned before = sw(r.engine)->data_ios;
        assert_int_equal(rig_get(&r, 0, 0), -ENODEV);
        assert_int_equal(rig_put(&r, 5, 5), -ENODEV);
        assert_int_equal(sw(r.engine)->data_ios, before);   /* at once */
        fk_ssd_forget(r.ssd, 1);
        uint64_t wait = 1000000;
        for (int k = 0; k < 8; k++) {   /* retried, doubling up to 32 times */
            uint64_t at = fk_ssd_next_wakeup(r.ssd);

            assert_int_equal(at - r.now, wait);
            wait = fk_min(wait * 2, (uint64_t)32000000);
            r.now = at - 1;
            fk_ssd_tick(r.ssd, r.now);
            assert_int_equal(fk_ssd_inflight(r.ssd), 0);
            r.now = at;
            fk_ssd_tick(r.ssd, r.now);
            rig_drain(&r);
            assert_int_equal(fk_ssd_dirs_out(r.ssd), 1);
        }
        sw(r.engine)->broken = 0;
        r.now = fk_ssd_next_wakeup(r.ssd);
        fk_ssd_tick(r.ssd, r.now);
        rig_drain(&r);
        assert_int_equal(fk_ssd_dirs_out(r.ssd), 0);
        fk_ssd_get_stats(r.ssd, &st);
        assert_int_equal(st.device_outs, 1);
        assert_int_equal(st.device_returns, 1);
        assert_int_equal(rig_get(&r, 0, 0), 0);             /* nothing was lost */
        assert_int_equal(rig_put(&r, 5, 5), 0);
        rig_reopen(&r);
        assert_int_equal(rig_recover(&r), 4);               /* 0 2 3 5; 1 was forgotten */
        for (uint32_t s = 2; s < 4; s++)
            assert_int_equal(rig_get(&r, s, s), 0);
        rig_free(&r);
    }
}

/* One of two directories fails by its files; the other serves, then new files are found. */
static void test_vanished_files(void **state)
{
    struct rig r;

    rig_init(&r, 2, 16, 4096);
    rig_open(&r);
    uint32_t a = slot_in(&r, 0), b = slot_in(&r, 1);
    assert_int_equal(rig_put(&r, a, 1), 0);
    assert_int_equal(rig_put(&r, b, 2), 0);
    rig_settle(&r);
    sw(r.engine)->stale_below = sw(r.engine)->next_file - 2;    /* those of directory 0 */
    for (int k = 0; k < 3; k++)
        assert_int_equal(rig_get(&r, a, 1), -EBADF);
    assert_int_equal(fk_ssd_dirs_out(r.ssd), 1);
    assert_int_equal(rig_get(&r, b, 2), 0);
    sw(r.engine)->no_open = true;
    r.now = fk_ssd_next_wakeup(r.ssd);
    fk_ssd_tick(r.ssd, r.now);
    rig_drain(&r);
    assert_int_equal(fk_ssd_dirs_out(r.ssd), 1);
    sw(r.engine)->no_open = false;
    struct ssd_header h, other;         /* another store was mounted there: hands off */
    peek(&r, 0, "table", 0, &h, sizeof(h));
    other = h;
    other.uuid[0] ^= 1;
    ssd_header_seal(&other);
    poke(&r, 0, "table", 0, &other, sizeof(other));
    r.now = fk_ssd_next_wakeup(r.ssd);
    fk_ssd_tick(r.ssd, r.now);
    rig_drain(&r);
    assert_int_equal(fk_ssd_dirs_out(r.ssd), 1);
    poke(&r, 0, "table", 0, &h, sizeof(h));
    r.now = fk_ssd_next_wakeup(r.ssd);
    fk_ssd_tick(r.ssd, r.now);
    rig_drain(&r);
    assert_int_equal(fk_ssd_dirs_out(r.ssd), 0);
    assert_int_equal(rig_get(&r, a, 1), 0);
    assert_int_equal(rig_put(&r, a, 3), 0);
    sw(r.engine)->stale_below = 0;
    rig_reopen(&r);
    assert_int_equal(rig_recover(&r), 2);
    assert_int_equal(rig_get(&r, a, 3), 0);
    rig_free(&r);
}

/* A reset while a directory is out: its old blocks must not come back with it. */
static void test_reset_while_out(void **state)
{
    for (int restart = 0; restart < 2; restart++) {
        struct rig r;

        rig_init(&r, 2, 16, 4096);
        rig_open(&r);
        uint32_t a = slot_in(&r, 0), b = slot_in(&r, 1);
        assert_int_equal(rig_put(&r, a, 1), 0);
        assert_int_equal(rig_put(&r, b, 2), 0);
        rig_settle(&r);
        sw(r.engine)->stale_below = sw(r.engine)->next_file - 2;
        for (int k = 0; k < 3; k++)
            rig_get(&r, a, 1);
        assert_int_equal(fk_ssd_dirs_out(r.ssd), 1);
        assert_int_equal(fk_ssd_reset(r.ssd, r.now), 0);
        if (!restart) {
            sw(r.engine)->stale_below = 0;
            r.now = fk_ssd_next_wakeup(r.ssd);
            fk_ssd_tick(r.ssd, r.now);
            rig_drain(&r);
            assert_int_equal(fk_ssd_dirs_out(r.ssd), 0);
        }
        sw(r.engine)->stale_below = 0;
        rig_reopen(&r);
        assert_int_equal(rig_recover(&r), 0);
        rig_free(&r);
    }
}

/* A real full file system, and one made read-only under way; needs mount. */
static void test_real_full(void **state)
{
    struct rig r;
    char command[300];

    rig_init(&r, 1, 512, 4096);
    snprintf(command, sizeof(command), "mkdir '%s' && mount -t tmpfs -o size=2m none '%s' "
             "2>/dev/null", r.dirs[0], r.dirs[0]);
    if (system(command) != 0) {
        rig_free(&r);
        print_message("no right to mount here\n");
        skip();
    }
    assert_int_equal(rig_try_open(&r), -ENOSPC);
    assert_non_null(strstr(r.error, r.dirs[0]));
    assert_non_null(strstr(r.error, "ssd_cache_gb"));
    r.params.n_slots = 128;             /* what was made before the failure is gone again */
    rig_open(&r);
    assert_int_equal(rig_put(&r, 0, 1), 0);
    assert_int_equal(rig_get(&r, 0, 1), 0);
    rig_free(&r);
    snprintf(command, sizeof(command), "umount '%s'", r.dir_names[0]);
    assert_int_equal(system(command), 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_geometry), cmocka_unit_test(test_round_trip),
        cmocka_unit_test(test_merging), cmocka_unit_test(test_wrong_reads),
        cmocka_unit_test(test_padding), cmocka_unit_test(test_table_order),
        cmocka_unit_test(test_next_wakeup), cmocka_unit_test(test_forget_reset),
        cmocka_unit_test(test_faults), cmocka_unit_test(test_failed_write_empties_record),
        cmocka_unit_test(test_partial_run),
        cmocka_unit_test(test_bad_sector), cmocka_unit_test(test_device_out),
        cmocka_unit_test(test_vanished_files), cmocka_unit_test(test_reset_while_out),
        cmocka_unit_test(test_real_full),
    };

    return cmocka_run_group_tests(tests, rig_group_setup, rig_group_teardown);
}
