/*
 * test_store.c - the third party's store, on real directories: what is read is what was written or an error; other
 * nodes' blocks, room, resets; files of all wrong kinds; several processes; the set of what is there. Stores that fail:
 * test_store_faults.c.
 */
#include "store_rig.h"

/* ---- the good case ---- */

static void blocks_come_back(void **state)
{
    struct rig r;

    rig_open(&r, NULL);
    for (uint64_t i = 0; i < 40; i++) {
        assert_int_equal(fk_store_has(r.store, r.space, &(struct fk_key){ i + 1, hi_of(i) }, 1), 0);
        assert_int_equal(write_block(&r, i), 0);
    }
    for (uint64_t i = 0; i < 40; i++) {
        assert_true(knows(&r, i));
        assert_int_equal(read_block(&r, i), 0);
    }
    assert_int_equal(read_block(&r, 99), -ENOENT);
    struct fk_store_stats st = stats_of_store(&r);
    assert_int_equal(st.write_blocks, 40);
    assert_int_equal(st.read_blocks, 40);
    assert_int_equal(st.read_bytes, 40 * BLOCK);
    assert_int_equal(st.missing, 1);
    assert_int_equal(st.blocks, 40);
    assert_int_equal(st.used_bytes, 40 * (4096 + fk_round_up(BLOCK, 4096)));
    assert_int_equal(write_block(&r, 7), 0);
    assert_int_equal(stats_of_store(&r).already, 1);
    assert_true(fk_store_block_rate(r.store, r.space).us > 0);
    rig_close(&r);

    rig_open_at(&r, r.dir, NULL);       /* a restart finds them */
    rig_scan(&r);
    for (uint64_t i = 0; i < 40; i++)
        assert_int_equal(read_block(&r, i), 0);
    rig_close(&r);
    rig_remove(&r);
}

static void has_counts_leading_keys(void **state)
{
    struct fk_key keys[5];
    struct rig r;

    rig_open(&r, NULL);
    for (uint64_t i = 0; i < 5; i++)
        keys[i] = key_of(i);
    write_block(&r, 0);
    write_block(&r, 1);
    write_block(&r, 3);
    assert_int_equal(fk_store_has(r.store, r.space, keys, 5), 2);
    assert_int_equal(fk_store_has(r.store, r.space, keys + 3, 2), 1);
    rig_close(&r);
    rig_remove(&r);
}

static void others_blocks_are_seen(void **state)
{
    struct rig a, b;

    rig_open(&a, NULL);
    rig_open_at(&b, a.dir, NULL);
    rig_scan(&b);
    for (uint64_t i = 0; i < 10; i++)
        write_block(&a, i);
    assert_false(knows(&b, 3));
    rig_scan(&b);
    for (uint64_t i = 0; i < 10; i++)
        assert_int_equal(knows(&b, i) ? read_block(&b, i) : -1, 0);
    uint64_t listed = stats_of_store(&b).listed;
    usleep(3200 * 1000);                /* time stamps have settled: */
    rig_scan(&b);
    rig_scan(&b);
    rig_scan(&b);
    assert_true(stats_of_store(&b).listed <= listed + 10);      /* once more at most, then not again */
    unlink_block(&a, 3);
    assert_int_equal(read_block(&b, 3), -ENOENT);
    assert_false(knows(&b, 3));
    unlink_block(&a, 4);
    rig_scan(&b);
    assert_false(knows(&b, 4));
    rig_close(&a);
    rig_close(&b);
    rig_remove(&a);
}

/* Without being asked, within scan_us. */
static void scans_come_by_themselves(void **state)
{
    struct fk_store_params p = { .scan_us = 20000 };
    struct rig a, b;

    rig_open(&a, NULL);
    rig_open_at(&b, a.dir, &p);
    write_block(&a, 1);
    for (int i = 0; i < 1000 && !knows(&b, 1); i++)
        usleep(10000);
    assert_true(knows(&b, 1));
    rig_close(&a);
    rig_close(&b);
    rig_remove(&a);
}

static void spaces_are_apart(void **state)
{
    struct fk_store_space other = { .name = "other", .fingerprint = { 9 }, .block_bytes = 5000 };
    struct rig r;
    uint32_t id;

    rig_open(&r, NULL);
    assert_int_equal(fk_store_space(r.store, &other, &id, r.error, sizeof(r.error)), 0);
    write_block(&r, 1);
    assert_int_equal(fk_store_has(r.store, id, &(struct fk_key){ key_of(1).lo, key_of(1).hi }, 1), 0);
    rig_close(&r);
    rig_remove(&r);
}

static void unsure_writes_are_not_seen(void **state)
{
    struct fk_store_params p = { .sure = never_sure };
    struct rig a, b;

    rig_open(&a, &p);
    assert_int_equal(write_block(&a, 1), -ECANCELED);
    rig_open_at(&b, a.dir, NULL);
    rig_scan(&b);
    assert_false(knows(&b, 1));
    assert_int_equal(files_in(a.dir), 1);       /* the header */
    rig_close(&a);
    rig_close(&b);
    rig_remove(&a);
}

static void a_reset_is_for_all(void **state)
{
    struct rig a, b;

    rig_open(&a, NULL);
    rig_open_at(&b, a.dir, NULL);
    for (uint64_t i = 0; i < 5; i++)
        write_block(&a, i);
    rig_scan(&b);
    fk_store_reset(a.store, a.space);
    assert_false(knows(&a, 1));
    rig_scan(&a);
    assert_int_equal(read_block(&b, 1), -ENOENT);
    rig_scan(&b);
    assert_false(knows(&b, 2));
    assert_int_equal(write_block(&a, 1), 0);    /* and it goes on */
    assert_int_equal(read_block(&a, 1), 0);
    for (int i = 0; i < 20; i++)        /* what was put aside goes by and by */
        rig_scan(&a);
    assert_int_equal(files_in(a.dir), 2);
    rig_close(&a);
    rig_close(&b);
    rig_remove(&a);
}

/* ---- files that are not what they should be ---- */

static void spoil(const char *path, int how, const char *other)
{
    unsigned char c;
    struct stat st;
    int fd = how < 6 ? open(path, O_RDWR) : -1;

    switch (how) {
    case 0: assert_int_equal(ftruncate(fd, 4096 + BLOCK - 1), 0); break;
    case 1: assert_int_equal(ftruncate(fd, 0), 0); break;
    case 2: assert_int_equal(ftruncate(fd, 4096 + BLOCK + 1), 0); break;
    case 3:                             /* a bit of the block */
    case 4:                             /* of the record */
        assert_int_equal(pread(fd, &c, 1, how == 3 ? 4096 + 777 : 20), 1);
        c ^= 4;
        assert_int_equal(pwrite(fd, &c, 1, how == 3 ? 4096 + 777 : 20), 1);
        break;
    case 5: assert_int_equal(ftruncate(fd, 100), 0); assert_int_equal(ftruncate(fd, 4096 + BLOCK), 0); break;
    case 6: unlink(path); assert_int_equal(link(other, path), 0); break;        /* another key's */
    case 7: unlink(path); assert_int_equal(mkdir(path, 0700), 0); break;
    case 8: unlink(path); assert_int_equal(symlink(other, path), 0); break;
    case 9: unlink(path); assert_int_equal(mkfifo(path, 0600), 0); break;
    }
    if (fd >= 0)
        close(fd);
    assert_true(lstat(path, &st) == 0);
}

static void bad_files_are_misses(void **state)
{
    char path[300], other[300];
    struct rig r;

    rig_open(&r, NULL);
    write_block(&r, 1);
    block_path(&r, 1, other);
    for (int how = 0; how < 10; how++) {
        write_block(&r, 2);
        block_path(&r, 2, path);
        spoil(path, how, other);
        assert_int_equal(read_block(&r, 2), -EBADMSG);
        assert_int_equal(stats_of_store(&r).bad, how + 1);
        assert_false(knows(&r, 2));
        if (how == 0) {                 /* of another size: written over without being read */
            assert_int_equal(write_block(&r, 2), 0);
            spoil(path, 0, other);
            assert_int_equal(write_block(&r, 2), 0);
            assert_int_equal(read_block(&r, 2), 0);
            unlink(path);
            assert_int_equal(read_block(&r, 2), -ENOENT);
        }
        if (how >= 7)                   /* not a file of ours: whoever made it takes it away */
            how == 7 ? rmdir(path) : unlink(path);
        assert_int_equal(access(path, F_OK), -1);
    }
    assert_int_equal(write_block(&r, 2), 0);
    assert_int_equal(read_block(&r, 2), 0);
    assert_int_equal(read_block(&r, 1), 0);
    assert_true(fk_store_reads(r.store));
    rig_close(&r);
    rig_remove(&r);
}

static void set_header(struct rig *r, size_t at, const void *bytes, size_t n)
{
    char path[300];

    snprintf(path, sizeof(path), "%s/%s/header", r->dir, space_dir(r));
    int fd = open(path, O_RDWR);
    assert_int_equal(pwrite(fd, bytes, n, (off_t)at), n);
    close(fd);
}

static void refused(struct rig *r, const char *why)
{
    assert_int_equal(rig_try(r, r->dir, NULL), -EEXIST);
    if (!strstr(r->error, why) || !strstr(r->error, "remote_cache_dir"))
        fail_msg("message: %s", r->error);
}

static void other_formats_are_refused(void **state)
{
    struct rig r;

    rig_open(&r, NULL);
    rig_close(&r);
    set_header(&r, offsetof(struct store_header, version), &(uint32_t){ 7 }, 4);
    refused(&r, "version 7");
    set_header(&r, offsetof(struct store_header, version), &(uint32_t){ STORE_VERSION }, 4);
    set_header(&r, offsetof(struct store_header, byte_order), &(uint32_t){ 0x04030201 }, 4);
    refused(&r, "byte order");
    set_header(&r, offsetof(struct store_header, byte_order), &(uint32_t){ 0x01020304 }, 4);
    assert_int_equal(rig_try(&r, r.dir, NULL), 0);
    rig_close(&r);
    set_header(&r, offsetof(struct store_header, block_bytes), &(uint64_t){ 123 }, 8);
    refused(&r, "damaged");
    set_header(&r, 0, "GIF89a", 6);
    refused(&r, "not of FlexKV");
    rig_remove(&r);
}

static void another_block_size_is_refused(void **state)
{
    struct fk_store_space d = { .name = "x", .fingerprint = { 1 }, .block_bytes = BLOCK + 1 };
    struct rig r;
    uint32_t id;

    rig_open(&r, NULL);
    assert_int_equal(fk_store_space(r.store, &d, &id, r.error, sizeof(r.error)), -EEXIST);
    assert_non_null(strstr(r.error, "remote_cache_dir"));
    rig_close(&r);
    rig_remove(&r);
}

static void a_place_that_cannot_be(void **state)
{
    struct fk_store_params p = { .path = "/proc/nothing/here" };
    struct fk_store *s;
    char error[600];

    assert_true(fk_store_open(&p, &s, error, sizeof(error)) < 0);
    assert_non_null(strstr(error, "remote_cache_dir /proc/nothing/here"));
    p.path = "/etc/hostname";
    assert_true(fk_store_open(&p, &s, error, sizeof(error)) < 0);
    p.path = "";
    assert_int_equal(fk_store_open(&p, &s, error, sizeof(error)), -EINVAL);
    char *longer = malloc(5000);
    memset(longer, 'a', 4999);
    longer[4999] = '\0';
    p.path = longer;
    assert_int_equal(fk_store_open(&p, &s, error, sizeof(error)), -ENAMETOOLONG);
    free(longer);
}

/* ---- room ---- */

static void the_oldest_go_first(void **state)
{
    uint64_t file = 4096 + fk_round_up(BLOCK, 4096);
    struct fk_store_params p = { .capacity_bytes = 40 * file };
    struct rig r, b;

    rig_open(&r, &p);
    for (uint64_t i = 0; i < 40; i++) {
        write_block(&r, i);
        age_block(&r, i, 1000 - (long)i * 10);
    }
    assert_int_equal(read_block(&r, 0), 0);     /* used: now it is the youngest */
    assert_int_equal(write_block(&r, 4), 0);    /* and that one, as it is stored again */
    write_block(&r, 100);
    rig_scan(&r);
    struct fk_store_stats st = stats_of_store(&r);
    assert_true(st.used_bytes <= 38 * file);    /* a 20th beyond need */
    assert_int_equal(st.evicted, 3);
    assert_true(knows(&r, 0) && knows(&r, 100) && knows(&r, 4) && knows(&r, 5));
    assert_false(knows(&r, 1) || knows(&r, 2) || knows(&r, 3));
    assert_int_equal(read_block(&r, 1), -ENOENT);

    /* What other spaces take counts, and goes as well. */
    struct fk_store_space d = { .name = "second", .fingerprint = { 2 }, .block_bytes = BLOCK };
    struct fk_store_params q = p;
    rig_prepare(&b, r.dir, &q);
    assert_int_equal(fk_store_space(b.store, &d, &b.space, b.error, sizeof(b.error)), 0);
    for (uint64_t i = 0; i < 10; i++)
        write_block(&b, i);
    rig_scan(&b);
    rig_scan(&r);
    assert_true(stats_of_store(&b).used_bytes <= 40 * file);
    assert_true(stats_of_store(&b).evicted + stats_of_store(&r).evicted >= 11);
    rig_close(&b);
    rig_close(&r);
    rig_remove(&r);
}

static void one_evicts_at_a_time(void **state)
{
    uint64_t file = 4096 + fk_round_up(BLOCK, 4096);
    struct fk_store_params p = { .capacity_bytes = 4 * file };
    char path[300];
    struct rig r;

    rig_open(&r, &p);
    snprintf(path, sizeof(path), "%s/evict.lock", r.dir);
    int fd = open(path, O_RDWR | O_CREAT, 0600);
    assert_int_equal(flock(fd, LOCK_EX), 0);
    for (uint64_t i = 0; i < 6; i++)
        write_block(&r, i);
    rig_scan(&r);
    assert_int_equal(stats_of_store(&r).evicted, 0);
    close(fd);
    rig_scan(&r);
    assert_true(stats_of_store(&r).evicted >= 2);
    rig_close(&r);
    rig_remove(&r);
}

static void leftovers_go_when_they_are_old(void **state)
{
    struct timespec old[2] = { { .tv_sec = 1000 }, { .tv_sec = 1000 } };
    char young[400], dead[400];
    struct rig r;

    rig_open(&r, NULL);
    write_block(&r, 1);
    snprintf(dead, sizeof(dead), "%s/%s/data/%02x/.tmp-dead", r.dir, space_dir(&r), store_key_part(key_of(1)));
    snprintf(young, sizeof(young), "%s/%s/data/%02x/.tmp-young", r.dir, space_dir(&r), store_key_part(key_of(1)));
    close(open(dead, O_CREAT | O_WRONLY, 0600));
    close(open(young, O_CREAT | O_WRONLY, 0600));
    assert_int_equal(utimensat(AT_FDCWD, dead, old, 0), 0);
    for (int i = 0; i < 17; i++)
        rig_scan(&r);
    assert_int_equal(access(dead, F_OK), -1);
    assert_int_equal(access(young, F_OK), 0);
    assert_int_equal(stats_of_store(&r).leftovers, 1);
    rig_close(&r);
    rig_remove(&r);
}

/* ---- several processes ---- */

enum { SHARED_KEYS = 60 };

static void hammer(const char *dir, uint64_t seed, unsigned ms)
{
    struct fk_store_params p = { .capacity_bytes = 40ull * (4096 + fk_round_up(BLOCK, 4096)), .scan_us = 5000 };
    uint64_t end = fk_clock_us() + ms * 1000, read = 0;
    struct rig r;

    rig_open_at(&r, dir, &p);
    while (fk_clock_us() < end) {
        uint64_t i = fk_rng_below(&seed, SHARED_KEYS);
        int rc = fk_rng_below(&seed, 2) ? read_block(&r, i) : write_block(&r, i);
        if (rc != 0 && rc != -ENOENT)
            _exit(10);
        read++;
    }
    if (stats_of_store(&r).bad || !read)
        _exit(11);
    rig_close(&r);
}

static void processes_share_it(void **state)
{
    pid_t pid[3];
    struct rig r;

    rig_dir(&r);
    for (int i = 0; i < 3; i++) {
        pid[i] = fork();
        if (!pid[i]) {
            hammer(r.dir, 77 + (uint64_t)i, 1500);
            _exit(0);
        }
    }
    for (int i = 0; i < 3; i++) {
        int status = -1;
        waitpid(pid[i], &status, 0);
        assert_int_equal(status, 0);
    }
    rig_open_at(&r, r.dir, NULL);
    rig_scan(&r);
    assert_true(stats_of_store(&r).blocks > 0);
    for (uint64_t i = 0; i < SHARED_KEYS; i++)
        if (knows(&r, i))
            assert_int_equal(read_block(&r, i), 0);
    assert_int_equal(files_named(r.dir, ".tmp-"), 0);
    rig_close(&r);
    rig_remove(&r);
}

/* Writers that are killed leave whole files, or unfinished ones that nobody sees. */
static void killed_writers(void **state)
{
    struct fk_store_params p = { .leftover_us = 1 };
    struct rig r;

    rig_dir(&r);
    for (int round = 0; round < 12; round++) {
        pid_t pid = fork();
        if (!pid) {
            rig_open_at(&r, r.dir, NULL);
            for (uint64_t i = 0; i < 2000; i++)
                write_block(&r, (uint64_t)round * 2000 + i);
            _exit(0);
        }
        usleep(20000u + (unsigned)round * 3000u);
        kill(pid, SIGKILL);
        waitpid(pid, NULL, 0);
    }
    rig_open_at(&r, r.dir, &p);
    rig_scan(&r);
    assert_true(stats_of_store(&r).blocks > 12);
    for (uint64_t i = 0; i < 12 * 2000; i++)
        if (knows(&r, i))
            assert_int_equal(read_block(&r, i), 0);
    usleep(1100000);
    for (int i = 0; i < 17; i++)
        rig_scan(&r);
    assert_int_equal(files_named(r.dir, ".tmp-"), 0);
    rig_close(&r);
    rig_remove(&r);
}

/* ---- the set ---- */

static void the_set_against_a_model(void **state)
{
    enum { N = 3000, TURNS = 60000 };
    static bool model[N];
    struct fk_key listed[N];
    struct fk_prints *set;
    uint64_t rng = 5, count = 0;

    assert_int_equal(fk_prints_create(&set), 0);
    memset(model, 0, sizeof(model));
    for (int t = 0; t < TURNS; t++) {
        uint32_t i = fk_rng_below(&rng, N);
        struct fk_key k = { fk_rng_next(&(uint64_t){ i }) | (i % 7 == 0 ? 0 : 1), (uint64_t)(i % 3) << 56 };
        bool add = fk_rng_below(&rng, 2);
        assert_int_equal(add ? fk_prints_add(set, k) : fk_prints_remove(set, k), model[i] == add);
        count += add && !model[i];
        count -= !add && model[i];
        model[i] = add;
        assert_int_equal(fk_prints_has(set, k), add);
        if (t % 5000 == 0) {            /* a listing of part 0, with changes meanwhile */
            uint32_t n = 0, other = fk_rng_below(&rng, N / 3) * 3;
            fk_prints_begin(set, 0);
            for (uint32_t j = 0; j < N; j += 3)
                if (model[j])
                    listed[n++] = (struct fk_key){ fk_rng_next(&(uint64_t){ j }) | (j % 7 == 0 ? 0 : 1), 0 };
            struct fk_key o = { fk_rng_next(&(uint64_t){ other }) | (other % 7 == 0 ? 0 : 1), 0 };
            model[other] ? fk_prints_remove(set, o) : fk_prints_add(set, o);
            count += model[other] ? -1ull : 1;
            model[other] = !model[other];
            assert_int_equal(fk_prints_end(set, 0, listed, n), 0);
        }
        assert_int_equal(fk_prints_count(set), count);
    }
    for (uint32_t i = 0; i < N; i++) {
        struct fk_key k = { fk_rng_next(&(uint64_t){ i }) | (i % 7 == 0 ? 0 : 1), (uint64_t)(i % 3) << 56 };
        assert_int_equal(fk_prints_has(set, k), model[i]);
    }
    fk_prints_destroy(set);
}

static void the_set_is_small(void **state)
{
    struct fk_prints *set;
    uint64_t rng = 1, n = 1000000;

    assert_int_equal(fk_prints_create(&set), 0);
    for (uint64_t i = 0; i < n; i++)
        assert_int_equal(fk_prints_add(set, (struct fk_key){ fk_rng_next(&rng), fk_rng_next(&rng) }), 0);
    double each = (double)fk_prints_bytes(set) / (double)n;
    print_message("%.1f bytes a block\n", each);
    assert_true(each < 22);
    fk_prints_clear(set);
    assert_int_equal(fk_prints_count(set), 0);
    fk_prints_destroy(set);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(blocks_come_back),
        cmocka_unit_test(has_counts_leading_keys),
        cmocka_unit_test(others_blocks_are_seen),
        cmocka_unit_test(scans_come_by_themselves),
        cmocka_unit_test(spaces_are_apart),
        cmocka_unit_test(unsure_writes_are_not_seen),
        cmocka_unit_test(a_reset_is_for_all),
        cmocka_unit_test(bad_files_are_misses),
        cmocka_unit_test(other_formats_are_refused),
        cmocka_unit_test(another_block_size_is_refused),
        cmocka_unit_test(a_place_that_cannot_be),
        cmocka_unit_test(the_oldest_go_first),
        cmocka_unit_test(one_evicts_at_a_time),
        cmocka_unit_test(leftovers_go_when_they_are_old),
        cmocka_unit_test(processes_share_it),
        cmocka_unit_test(killed_writers),
        cmocka_unit_test(the_set_against_a_model),
        cmocka_unit_test(the_set_is_small),
    };

    fk_log_set_level(FK_LOG_OFF);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
