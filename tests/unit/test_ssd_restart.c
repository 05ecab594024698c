/*
 * test_ssd_restart.c - what an SSD store makes of what it finds: restarts, crashes, torn and
 * rotten tables, refusals, locks, fsck.
 */
#include "ssd_rig.h"

#include <signal.h>

/* TSan does not follow threads that a forked child starts. */
#if defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define UNDER_TSAN 1
#endif
#elif defined(__SANITIZE_THREAD__)
#define UNDER_TSAN 1
#endif

static void skip_under_tsan(void)
{
#ifdef UNDER_TSAN
    skip();
#endif
}

/* --- restart --- */

static void test_found(void **state)
{
    enum { N = 40 };
    struct rig r;

    rig_init(&r, 3, N, 4096);
    rig_open(&r);
    for (uint32_t i = 0; i < N; i += 2)
        assert_int_equal(rig_put(&r, N - 2 - i, i), 0);
    rig_reopen(&r);
    assert_int_equal(rig_recover(&r), N / 2);
    for (uint32_t i = 0; i < N / 2; i++) {
        const struct fk_ssd_found *f = &r.found[i];
        uint64_t n = N - 2 - 2 * i;

        assert_int_equal(f->slot, 2 * i);
        assert_true(fk_key_equal(f->key, key_of(n)));
        assert_true(fk_key_equal(f->parent, n ? key_of(n - 1) : (struct fk_key){ 0, 0 }));
        assert_int_equal(f->tag, n ^ 0x55);
        assert_true(i == 0 || f->seq < r.found[i - 1].seq);     /* written the other way round */
        assert_int_equal(rig_get(&r, f->slot, n), 0);
    }
    uint64_t newest = r.found[0].seq;
    assert_int_equal(rig_put(&r, 1, 100), 0);
    rig_reopen(&r);
    rig_recover(&r);
    assert_int_equal(r.found[1].slot, 1);
    assert_true(r.found[1].seq > newest);
    rig_free(&r);
}

static void forget_duplicate(void *arg, const struct fk_ssd_found *f)
{
    struct rig *r = arg;

    if (f->slot == 2)
        fk_ssd_forget(r->ssd, 2);       /* as the index does with the older of two */
}

static void test_forget_in_recovery(void **state)
{
    struct rig r;

    rig_init(&r, 1, 4, 4096);
    rig_open(&r);
    for (uint32_t i = 0; i < 4; i++)
        assert_int_equal(rig_put(&r, i, i), 0);
    rig_reopen(&r);
    assert_int_equal(fk_ssd_recover(r.ssd, forget_duplicate, &r), 0);
    assert_int_equal(rig_recover(&r), 3);
    rig_reopen(&r);
    assert_int_equal(rig_recover(&r), 3);
    rig_free(&r);
}

/* A child writes, says which records are on disk, goes on writing, and is killed. */
static void child_writes(struct rig *r, int say, bool uring)
{
    enum { N = 64 };
    struct fk_ssd_req reqs[N];

    r->engine = any_engine(uring);      /* the parent's threads are not ours */
    rig_open(r);
    for (uint32_t i = 0; i < N / 2; i++)
        reqs[i] = write_req(r, i, 1000 + i);
    rig_submit(r, reqs, N / 2);
    rig_drain(r);
    rig_settle(r);
    if (write(say, "x", 1) != 1)
        _exit(1);
    for (uint64_t n = 2000;; n++) {     /* over the second half again and again */
        uint32_t slot = N / 2 + (uint32_t)(n % (N / 2));

        struct fk_ssd_req req = write_req(r, slot, n);
        rig_submit(r, &req, 1);
        rig_drain(r);
        r->now += 3000;
        fk_ssd_tick(r->ssd, r->now);
    }
}

static void test_kill(void **state)
{
    skip_under_tsan();
    for (int round = 0; round < 12; round++) {
        struct rig r;
        int pipe_fds[2], status;
        char c;

        rig_init(&r, 2, 64, 12288);
        assert_int_equal(pipe(pipe_fds), 0);
        pid_t pid = fork();
        if (pid == 0)
            child_writes(&r, pipe_fds[1], round % 2);
        close(pipe_fds[1]);
        assert_int_equal(read(pipe_fds[0], &c, 1), 1);
        usleep((useconds_t)(round * 3000));
        kill(pid, SIGKILL);
        waitpid(pid, &status, 0);
        close(pipe_fds[0]);
        rig_open(&r);
        rig_recover(&r);
        for (uint32_t i = 0; i < 32; i++) {     /* whose record was written is found */
            assert_int_equal(r.found[i].slot, i);
            assert_int_equal(rig_get(&r, i, 1000 + i), 0);
        }
        for (uint32_t i = 32; i < r.n_found; i++) {     /* the rest: right, or a miss */
            uint64_t n = r.found[i].key.hi - 1;
            int rc = rig_get(&r, r.found[i].slot, n);

            assert_true(rc == 0 || rc == -EBADMSG);
        }
        rig_free(&r);
    }
}

/* --- torn and rotten tables --- */

/* New record over an old one, cut at every byte: whole, or as if it never was. */
static void torn_record(bool over_old)
{
    struct ssd_record old = { .tag = 0 }, new, mix, now;
    struct rig r;

    rig_init(&r, 1, 4, 4096);
    rig_open(&r);
    if (over_old) {
        assert_int_equal(rig_put(&r, 1, 1), 0);
        rig_settle(&r);
        peek(&r, 0, "table", ssd_table_offset(1), &old, sizeof(old));
    }
    assert_int_equal(rig_put(&r, 1, 2), 0);
    rig_settle(&r);
    peek(&r, 0, "table", ssd_table_offset(1), &new, sizeof(new));
    for (size_t cut = 0; cut <= sizeof(new); cut++) {
        fk_ssd_close(r.ssd);
        mix = old;
        memcpy(&mix, &new, cut);
        poke(&r, 0, "table", ssd_table_offset(1), &mix, sizeof(mix));
        rig_open(&r);
        bool is_new = memcmp(&mix, &new, sizeof(mix)) == 0;
        bool is_old = over_old && memcmp(&mix, &old, sizeof(mix)) == 0;
        assert_int_equal(rig_recover(&r), is_new || is_old);
        assert_int_equal(rig_get(&r, 1, 2), is_new ? 0 : -EBADMSG);
        assert_int_equal(rig_get(&r, 1, 1), -EBADMSG);      /* data are of block 2 */
    }
    fk_ssd_close(r.ssd);
    for (unsigned bit = 0; bit < sizeof(new) * 8; bit++) {
        mix = new;
        ((uint8_t *)&mix)[bit / 8] ^= (uint8_t)(1u << bit % 8);
        poke(&r, 0, "table", ssd_table_offset(1), &mix, sizeof(mix));
        rig_open(&r);
        assert_int_equal(rig_recover(&r), 0);
        fk_ssd_close(r.ssd);
    }
    poke(&r, 0, "table", ssd_table_offset(1), &new, sizeof(new));   /* a misdirected write */
    poke(&r, 0, "table", ssd_table_offset(3), &new, sizeof(new));
    rig_open(&r);
    assert_int_equal(rig_recover(&r), 1);
    peek(&r, 0, "table", ssd_table_offset(1), &now, sizeof(now));
    assert_memory_equal(&now, &new, sizeof(new));
    rig_free(&r);
}

static void test_torn_record(void **state)
{
    torn_record(false);
    torn_record(true);
}

/* The header cut anywhere, or with any bit flipped: mended from its copy. */
static void test_torn_header(void **state)
{
    struct ssd_header h, mix;
    char zeros[SSD_PAGE] = { 0 };
    struct rig r;

    rig_init(&r, 1, 4, 4096);
    rig_open(&r);
    assert_int_equal(rig_put(&r, 1, 1), 0);
    fk_ssd_close(r.ssd);
    peek(&r, 0, "table", 0, &h, sizeof(h));
    for (unsigned i = 0; i < sizeof(h) + sizeof(h) * 8; i++) {
        const char *where = i % 2 ? "table" : "data";

        mix = h;
        if (i < sizeof(h))
            memset((char *)&mix + i, 0, sizeof(h) - i);
        else
            ((uint8_t *)&mix)[(i - sizeof(h)) / 8] ^= (uint8_t)(1u << i % 8);
        poke(&r, 0, where, 0, &mix, sizeof(mix));
        rig_open(&r);
        assert_int_equal(rig_recover(&r), 1);
        fk_ssd_close(r.ssd);
        peek(&r, 0, where, 0, &mix, sizeof(mix));
        assert_memory_equal(&mix, &h, sizeof(h));
    }
    for (int garbage = 0; garbage < 2; garbage++) {     /* both gone: empty, not refused */
        memset(zeros, garbage ? 0x5a : 0, sizeof(zeros));
        poke(&r, 0, "data", 0, zeros, SSD_PAGE);
        memcpy(zeros, garbage ? "FlexKVsd" : zeros, 8);
        poke(&r, 0, "table", 0, zeros, SSD_PAGE);
        rig_open(&r);
        assert_int_equal(rig_recover(&r), 0);
        assert_int_equal(rig_put(&r, 1, 1), 0);
        fk_ssd_close(r.ssd);
    }
    r.ssd = NULL;
    rig_free(&r);
}

static void test_lost_files(void **state)
{
    char path[200];
    struct rig r;

    for (int what = 0; what < 3; what++) {
        rig_init(&r, 2, 16, 4096);
        rig_open(&r);
        for (uint32_t i = 0; i < 16; i++)
            assert_int_equal(rig_put(&r, i, i), 0);
        fk_ssd_close(r.ssd);
        file_path(&r, 1, what == 0 ? "data" : "table", path, sizeof(path));
        assert_int_equal(what == 2 ? truncate(path, 100) : unlink(path), 0);
        rig_open(&r);                   /* one file of a pair: made anew, empty */
        assert_int_equal(rig_recover(&r), 8);
        for (uint32_t i = 0; i < 8; i++)
            assert_int_equal(rig_get(&r, r.found[i].slot, r.found[i].slot), 0);
        rig_free(&r);
    }
}

/* Killed while the store was made: made anew, without asking. */
static void test_half_made(void **state)
{
    struct ssd_header h;
    char path[200];

    for (int what = 0; what < 4; what++) {
        struct rig r;

        rig_init(&r, 2, 16, 4096);
        rig_open(&r);
        fk_ssd_close(r.ssd);
        for (uint32_t d = 0; d < 2; d++) {
            peek(&r, d, "table", 0, &h, sizeof(h));
            h.complete = what == 3 && d == 0;           /* 3: between the two */
            ssd_header_seal(&h);
            poke(&r, d, "table", 0, &h, sizeof(h));
            poke(&r, d, "data", 0, &h, sizeof(h));
        }
        file_path(&r, 1, "table", path, sizeof(path));
        if (what == 1)
            assert_int_equal(unlink(path), 0);
        if (what == 2)
            dirs_clear(&r);
        if (what == 0)
            r.params.n_slots = 12;                      /* even with another geometry */
        rig_open(&r);
        assert_int_equal(rig_put(&r, 5, 5), 0);
        rig_reopen(&r);
        assert_int_equal(rig_recover(&r), 1);
        rig_free(&r);
    }
}

/* --- refusals --- */

static void refused(struct rig *r, int rc, const char *word)
{
    assert_int_equal(rig_try_open(r), rc);
    if (!strstr(r->error, word))
        fail_msg("'%s' not in '%s'", word, r->error);
}

static void test_mismatch(void **state)
{
    struct rig r;

    rig_init(&r, 2, 16, 4096);
    rig_open(&r);
    assert_int_equal(rig_put(&r, 0, 0), 0);
    fk_ssd_close(r.ssd);
    struct fk_ssd_params good = r.params;
    r.params.block_bytes = 4000;
    refused(&r, -EEXIST, "blocks of 4096 bytes, not 4000");
    r.params = good;
    r.params.n_slots = 15;
    refused(&r, -EEXIST, "ssd_cache_gb");
    r.params = good;
    r.params.stripe_slots = 8;
    refused(&r, -EEXIST, "stripes");
    r.params = good;
    r.params.fingerprint[15] ^= 1;
    refused(&r, -EEXIST, "another model");
    r.params = good;
    r.params.n_dirs = 1;
    refused(&r, -EEXIST, "spans 2 directories");
    r.params = good;
    r.params.n_dirs = 3;
    refused(&r, -EEXIST, "spans 2 directories");
    r.params = good;
    const char *swapped[2] = { r.dirs[1], r.dirs[0] };
    r.params.dirs = swapped;
    refused(&r, -EEXIST, "old order");
    r.params = good;
    rig_open(&r);                       /* no attempt did harm */
    assert_int_equal(rig_recover(&r), 1);
    assert_int_equal(rig_get(&r, 0, 0), 0);
    fk_ssd_close(r.ssd);
    r.params.n_slots = 12;
    r.params.recreate = true;
    rig_open(&r);                       /* smaller files, nothing left of the old ones */
    assert_int_equal(rig_recover(&r), 0);
    char path[200];
    struct stat st;
    file_path(&r, 0, "data", path, sizeof(path));
    assert_int_equal(stat(path, &st), 0);
    assert_int_equal(st.st_size, SSD_DATA_START + 8 * 4096);
    assert_int_equal(rig_put(&r, 3, 3), 0);
    rig_reopen(&r);                     /* recreate leaves a store that matches alone */
    assert_int_equal(rig_recover(&r), 1);
    rig_free(&r);
}

static void test_missing_dir(void **state)
{
    char command[400], page[SSD_PAGE];
    struct ssd_header h;
    struct rig r;

    rig_init(&r, 2, 16, 4096);
    rig_open(&r);
    assert_int_equal(rig_put(&r, 0, 0), 0);
    fk_ssd_close(r.ssd);
    snprintf(command, sizeof(command), "mv '%s' '%s'", r.dirs[1], r.dirs[2]);
    assert_int_equal(system(command), 0);
    refused(&r, -EEXIST, "directory 2 are missing");
    snprintf(command, sizeof(command), "rm -r '%s'; mv '%s' '%s'", r.dirs[1], r.dirs[2],
             r.dirs[1]);
    assert_int_equal(system(command), 0);
    peek(&r, 1, "table", 0, &h, sizeof(h));
    h.uuid[3] ^= 1;                     /* as if copied from elsewhere */
    ssd_header_seal(&h);
    poke(&r, 1, "table", 0, &h, sizeof(h));
    refused(&r, -EEXIST, "another store");
    h.uuid[3] ^= 1;
    h.version++;
    ssd_header_seal(&h);
    poke(&r, 1, "table", 0, &h, sizeof(h));
    rig_open(&r);                       /* the copy is sound: mended */
    fk_ssd_close(r.ssd);
    poke(&r, 1, "table", 0, &h, sizeof(h));
    poke(&r, 1, "data", 0, &h, sizeof(h));
    refused(&r, -EEXIST, "version");
    h.version--;
    ssd_header_seal(&h);
    h.byte_order = __builtin_bswap32(h.byte_order);
    ssd_header_seal(&h);
    h.crc = __builtin_bswap32(h.crc);
    poke(&r, 1, "table", 0, &h, sizeof(h));
    refused(&r, -EEXIST, "byte order");
    memset(page, 'x', sizeof(page));
    poke(&r, 1, "table", 0, page, sizeof(page));
    refused(&r, -EEXIST, "not a file of an SSD store");
    r.params.recreate = true;
    rig_open(&r);
    assert_int_equal(rig_recover(&r), 0);
    rig_free(&r);
}

static void test_bad_params(void **state)
{
    static const char *const names[] = { "", "a/b", "..", ".x", "a b", "a;b",
        "0123456789012345678901234567890123456789012345678901234567890123" };
    struct rig r;

    rig_init(&r, 1, 4, 4096);
    for (size_t i = 0; i < fk_array_size(names); i++) {
        r.params.name = names[i];
        refused(&r, -EINVAL, "name");
    }
    r.params.name = "space";
    r.params.n_slots = 0;
    refused(&r, -EINVAL, "slots");
    r.params.n_slots = 4;
    r.params.n_dirs = 33;
    refused(&r, -EINVAL, "ssd_cache_dir");
    r.params.n_dirs = 1;
    r.dirs[0] = "/nonexistent/deep/dir";
    refused(&r, -ENOENT, "ssd_cache_dir");
    rig_free(&r);
}

/* --- locks --- */

/* For children: a failed assertion there would go on with the parent's tests. */
static void child_is_refused(struct rig *r, const char *word)
{
    r->engine = any_engine(false);
    _exit(rig_try_open(r) == -EBUSY && strstr(r->error, word) ? 0 : 1);
}

static void test_lock(void **state)
{
    struct rig r, other;
    int status;

    skip_under_tsan();
    rig_init(&r, 2, 16, 4096);
    rig_open(&r);
    other = r;
    refused(&other, -EBUSY, "in use by this very process");     /* the same store again */
    other.engine = any_engine(false);
    refused(&other, -EBUSY, "in use by this very process");     /* another node */
    other.params.name = "second";
    refused(&other, -EBUSY, "in use by this very process");
    other.engine->ops->destroy(other.engine);
    pid_t pid = fork();
    if (pid == 0) {
        char word[32];

        snprintf(word, sizeof(word), "in use by process %d", (int)getppid());
        child_is_refused(&other, word);
    }
    waitpid(pid, &status, 0);
    assert_int_equal(status, 0);
    other.engine = r.engine;            /* another space of the same node */
    rig_open(&other);
    fk_ssd_close(r.ssd);
    r.ssd = NULL;
    pid = fork();
    if (pid == 0)                       /* still held for the other space */
        child_is_refused(&other, "in use by process");
    waitpid(pid, &status, 0);
    assert_int_equal(status, 0);
    fk_ssd_close(other.ssd);
    rig_open(&r);
    rig_free(&r);
}

/* A killed node's forked child lives on: the directory is free nevertheless. */
static void test_lock_fork(void **state)
{
    struct rig r;
    int pipe_fds[2], status;
    pid_t grandchild;

    skip_under_tsan();
    rig_init(&r, 1, 4, 4096);
    assert_int_equal(pipe(pipe_fds), 0);
    pid_t pid = fork();
    if (pid == 0) {
        r.engine = any_engine(false);
        rig_open(&r);
        grandchild = fork();
        if (grandchild == 0) {
            pause();
            _exit(0);
        }
        if (write(pipe_fds[1], &grandchild, sizeof(grandchild)) < 0)
            _exit(1);
        pause();
    }
    assert_int_equal(read(pipe_fds[0], &grandchild, sizeof(grandchild)), sizeof(grandchild));
    refused(&r, -EBUSY, "in use by process");
    kill(pid, SIGKILL);
    waitpid(pid, &status, 0);
    rig_open(&r);
    kill(grandchild, SIGKILL);
    close(pipe_fds[0]);
    close(pipe_fds[1]);
    rig_free(&r);
}

/* --- fsck --- */

static char said[8192];

static void hear(void *arg, const char *line)
{
    size_t n = strlen(said);

    snprintf(said + n, sizeof(said) - n, "%s\n", line);
}

static int fsck(struct rig *r, bool data, bool repair, struct fk_ssd_fsck *out)
{
    said[0] = '\0';
    return fk_ssd_fsck_run(r->dirs, r->params.n_dirs, data ? NULL : "space", data, repair, hear,
                           NULL, out);
}

static uint64_t findings(const struct fk_ssd_fsck *f)
{
    return f->bad_header + f->bad_record + f->duplicate + f->orphan + f->bad_data;
}

static void test_fsck(void **state)
{
    struct fk_ssd_fsck f;
    struct ssd_header h;
    struct rig r;

    rig_init(&r, 2, 32, 4096);
    rig_open(&r);
    assert_int_equal(rig_put(&r, 31, 70), 0);
    rig_settle(&r);
    assert_int_equal(fk_ssd_reset(r.ssd, r.now), 0);    /* slot 31: of an old epoch */
    for (uint32_t i = 0; i < 20; i++)
        assert_int_equal(rig_put(&r, i, i), 0);         /* a chain 0 .. 19 */
    assert_int_equal(fsck(&r, true, false, &f), -EBUSY);
    fk_ssd_close(r.ssd);
    r.ssd = NULL;
    assert_int_equal(fsck(&r, true, false, &f), 0);
    assert_int_equal(findings(&f), 0);
    assert_true(f.slots == 32 && f.valid == 20 && f.empty == 11 && f.old_epoch == 1);

    rig_open(&r);
    assert_int_equal(rig_put(&r, 25, 3), 0);            /* block 3 twice */
    fk_ssd_close(r.ssd);
    r.ssd = NULL;
    poke(&r, 1, "table", ssd_table_offset(0) + 9, "torn", 4);           /* slot 4 */
    poke(&r, 0, "data", SSD_DATA_START + 4 * 4096 + 77, "rot", 3);      /* slot 8 */
    peek(&r, 0, "table", 0, &h, sizeof(h));
    poke(&r, 0, "table", 0, "xxxxxxxx", 8);
    assert_int_equal(fsck(&r, true, false, &f), 0);
    assert_true(f.bad_header == 1 && f.bad_record == 1 && f.duplicate == 1 && f.bad_data == 1);
    assert_int_equal(f.orphan, 14);                     /* 5..7, 9..19: 4 and 8 are gone */
    assert_int_equal(f.valid, 4);                       /* 0..3, 3 in slot 25 */
    assert_int_equal(f.repaired, 0);
    assert_non_null(strstr(said, "slot 4: record torn"));
    assert_int_equal(fsck(&r, true, true, &f), 0);
    assert_int_equal(f.repaired, 18);
    assert_int_equal(findings(&f), 18);
    assert_int_equal(fsck(&r, true, false, &f), 0);
    assert_int_equal(findings(&f), 0);
    assert_int_equal(f.valid, 4);
    rig_open(&r);
    assert_int_equal(rig_recover(&r), 4);
    assert_int_equal(rig_get(&r, 25, 3), 0);
    rig_free(&r);
}

static void test_fsck_trouble(void **state)
{
    struct fk_ssd_fsck f;
    struct rig r;

    rig_init(&r, 2, 16, 4096);
    assert_int_equal(fsck(&r, true, false, &f), -ENOENT);
    rig_open(&r);
    fk_ssd_close(r.ssd);
    r.ssd = NULL;
    assert_int_equal(fk_ssd_fsck_run(r.dirs, 1, "space", false, false, hear, NULL, &f), -EINVAL);
    assert_non_null(strstr(said, "spans 2 directories"));
    const char *swapped[2] = { r.dirs[1], r.dirs[0] };
    assert_int_equal(fk_ssd_fsck_run(swapped, 2, "space", false, false, hear, NULL, &f), -EINVAL);
    assert_int_equal(fk_ssd_fsck_run(r.dirs, 2, "other", false, false, hear, NULL, &f), -ENOENT);
    char zeros[SSD_PAGE] = { 0 };
    poke(&r, 0, "table", 0, zeros, SSD_PAGE);
    poke(&r, 0, "data", 0, zeros, SSD_PAGE);
    assert_int_equal(fsck(&r, false, true, &f), -EEXIST);
    rig_free(&r);
}

/* --- speed --- */

/* A table of a million records, from the page cache: the bar is one second. */
static void test_million(void **state)
{
    enum { N = 1000000 };
    struct ssd_record *table = calloc(N, sizeof(*table));
    struct ssd_header h;
    char path[200];
    struct rig r;

    rig_init(&r, 1, 64, 4096);
    r.params.n_slots = N;
    free(r.found);
    r.found = calloc(N, sizeof(*r.found));
    assert_int_equal(mkdir(r.dirs[0], 0700), 0);
    file_path(&r, 0, "data", path, sizeof(path));       /* sparse: 4 GiB that cost nothing */
    int fd = open(path, O_WRONLY | O_CREAT, 0600);
    assert_int_equal(ftruncate(fd, SSD_DATA_START + (off_t)N * 4096), 0);
    close(fd);
    r.params.stripe_slots = 0;
    r.params.virtual_dirs = true;       /* so that it is not unlinked */
    rig_open(&r);
    fk_ssd_close(r.ssd);
    peek(&r, 0, "table", 0, &h, sizeof(h));
    for (uint32_t i = 0; i < N; i++) {
        table[i] = (struct ssd_record){
            .key = key_of(i), .parent = key_of(i ? i - 1 : 0), .checksum = i + 1, .seq = i + 1,
            .length = 4096, .epoch = h.epoch,
        };
        ssd_record_seal(&table[i], ssd_record_seed(h.uuid), i);
    }
    poke(&r, 0, "table", SSD_PAGE, table, N * sizeof(*table));
    rig_use_engine(&r, any_engine(true));
    uint64_t start = fk_clock_us();
    rig_open(&r);
    uint64_t opened = fk_clock_us();
    assert_int_equal(rig_recover(&r), N);
    uint64_t end = fk_clock_us();
    print_message("1,000,000 records: open %llu ms, recover %llu ms\n",
                  (unsigned long long)(opened - start) / 1000,
                  (unsigned long long)(end - opened) / 1000);
#if !defined(__SANITIZE_THREAD__) && !defined(__SANITIZE_ADDRESS__)
    assert_in_range(end - start, 0, 1000000);
#endif
    free(table);
    rig_free(&r);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_found), cmocka_unit_test(test_forget_in_recovery),
        cmocka_unit_test(test_kill), cmocka_unit_test(test_torn_record),
        cmocka_unit_test(test_torn_header), cmocka_unit_test(test_lost_files),
        cmocka_unit_test(test_half_made), cmocka_unit_test(test_mismatch),
        cmocka_unit_test(test_missing_dir), cmocka_unit_test(test_bad_params),
        cmocka_unit_test(test_lock), cmocka_unit_test(test_lock_fork),
        cmocka_unit_test(test_fsck), cmocka_unit_test(test_fsck_trouble),
        cmocka_unit_test(test_million),
    };

    return cmocka_run_group_tests(tests, rig_group_setup, rig_group_teardown);
}
