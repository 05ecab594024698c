/*
 * test_objects.c - blocks as objects, over a bucket in memory that can fail, hang and lose objects: what is read is what was
 * written or an error; how nodes come to know of each other's blocks; places taken over, by two at once, by mistake; resets,
 * emptied buckets; objects that are damaged. Over NIXL and a real server: test_remote.c with FLEXKV_TEST_S3.
 */
#include <fnmatch.h>
#include <pthread.h>

#include "store_rig.h"
#include "store/logs.h"
#include "store/objects.h"

/* ---- a bucket in memory ---- */

struct object { char name[300]; unsigned char *data; size_t bytes; };

static struct {
    pthread_mutex_t lock;
    FK_VEC(struct object) objects;
    char fail_with[60];                 /* calls for names that hold it end with rc */
    int rc;
    uint64_t gets, puts, asks;
    _Atomic bool hang;                  /* every call ends at its deadline */
    void (*at_exists)(void);            /* called once, in the thread that asks */
} bucket = { .lock = PTHREAD_MUTEX_INITIALIZER };

static void empty_bucket(void)
{
    for (size_t i = 0; i < bucket.objects.len; i++)
        free(bucket.objects.data[i].data);
    fk_vec_free(&bucket.objects);
}

static struct object *find(const char *name)
{
    for (size_t i = 0; i < bucket.objects.len; i++)
        if (strcmp(bucket.objects.data[i].name, name) == 0)
            return &bucket.objects.data[i];
    return NULL;
}

/* The n-th whose name holds all of the text. */
static struct object *nth(const char *text, int n)
{
    for (size_t i = 0; i < bucket.objects.len; i++)
        if (strstr(bucket.objects.data[i].name, text) && n-- == 0)
            return &bucket.objects.data[i];
    return NULL;
}

static int count(const char *text)
{
    int n = 0;

    while (nth(text, n))
        n++;
    return n;
}

/* A pattern of the shell: a text alone may be a piece of a uuid as well. */
static void drop(const char *pattern)
{
    for (size_t i = bucket.objects.len; i-- > 0;) {
        struct object *o = &bucket.objects.data[i];
        if (fnmatch(pattern, o->name, 0) != 0)
            continue;
        free(o->data);
        *o = bucket.objects.data[--bucket.objects.len];
    }
}

static int trouble(const char *name, uint64_t deadline_us)
{
    while (atomic_load(&bucket.hang)) {
        if (fk_clock_us() >= deadline_us)
            return -ETIMEDOUT;
        usleep(1000);
    }
    pthread_mutex_lock(&bucket.lock);
    int rc = *bucket.fail_with && strstr(name, bucket.fail_with) ? bucket.rc : 0;
    pthread_mutex_unlock(&bucket.lock);
    return rc;
}

static void fail_for(const char *text, int rc)
{
    pthread_mutex_lock(&bucket.lock);
    snprintf(bucket.fail_with, sizeof(bucket.fail_with), "%s", text);
    bucket.rc = rc;
    pthread_mutex_unlock(&bucket.lock);
}

static int mem_open(const struct fk_store_params *p, void **client, char *error, size_t n)
{
    *client = &bucket;
    return 0;
}

static void mem_close(void *client) { }

static int mem_get(void *client, const char *name, const struct iovec *to, int n, uint64_t deadline_us)
{
    size_t at = 0;
    int rc = trouble(name, deadline_us);

    if (rc)
        return rc;
    pthread_mutex_lock(&bucket.lock);
    const struct object *o = find(name);
    bucket.gets++;
    for (int i = 0; o && i < n; at += to[i++].iov_len) {
        size_t left = at < o->bytes ? o->bytes - at : 0;
        memset(to[i].iov_base, 0xee, to[i].iov_len);
        memcpy(to[i].iov_base, o->data + at, fk_min(left, to[i].iov_len));
    }
    pthread_mutex_unlock(&bucket.lock);
    return o ? 0 : -ENOENT;
}

static int mem_put(void *client, const char *name, const struct iovec *from, int n, const struct fk_store_sure *sure,
                   uint64_t deadline_us)
{
    struct object fresh = { .bytes = 0 };
    int rc = trouble(name, deadline_us);

    for (int i = 0; i < n; i++)
        fresh.bytes += from[i].iov_len;
    if (!rc && sure && sure->sure && !sure->sure(sure->arg, sure->user))
        rc = -ECANCELED;
    if (rc)
        return rc;
    snprintf(fresh.name, sizeof(fresh.name), "%s", name);
    fresh.data = malloc(fresh.bytes);
    for (size_t i = 0, at = 0; i < (size_t)n; at += from[i++].iov_len)
        memcpy(fresh.data + at, from[i].iov_base, from[i].iov_len);
    pthread_mutex_lock(&bucket.lock);
    struct object *o = find(name);
    bucket.puts++;
    if (o) {
        free(o->data);
        *o = fresh;
    } else {
        (void)fk_vec_push(&bucket.objects, fresh);
    }
    pthread_mutex_unlock(&bucket.lock);
    return 0;
}

static int mem_exists(void *client, const char *name, uint64_t deadline_us)
{
    int rc = trouble(name, deadline_us);
    void (*hook)(void) = bucket.at_exists;

    bucket.at_exists = NULL;
    if (hook)
        hook();
    pthread_mutex_lock(&bucket.lock);
    bool there = find(name) != NULL;
    bucket.asks++;
    pthread_mutex_unlock(&bucket.lock);
    return rc ? rc : there;
}

static const struct fk_object_client memory = {
    .open = mem_open, .close = mem_close, .get = mem_get, .put = mem_put, .exists = mem_exists,
};

static struct fk_store_params bucket_params(void)
{
    return (struct fk_store_params){ .backend = &fk_store_objects, .timeout_us = 800000, .retry_us = 20000,
                                     .bucket = { .name = "bucket", .prefix = "kv", .client = &memory } };
}

static void open_one(struct rig *r)
{
    struct fk_store_params p = bucket_params();

    rig_open_at(r, "bucket", &p);
    rig_scan(r);
}

static int begin(void **state)
{
    empty_bucket();
    fail_for("", 0);
    bucket.hang = false;
    return 0;
}

/* ---- the good case ---- */

static void blocks_come_back(void **state)
{
    struct rig r;

    open_one(&r);
    for (uint64_t i = 0; i < 20; i++)
        assert_int_equal(write_block(&r, i), 0);
    for (uint64_t i = 0; i < 20; i++)
        assert_int_equal(knows(&r, i) ? read_block(&r, i) : -1, 0);
    assert_int_equal(read_block(&r, 99), -ENOENT);
    assert_int_equal(stats_of_store(&r).used_bytes, 20 * (4096 + BLOCK));
    rig_close(&r);                      /* which tells of what was written last */

    open_one(&r);
    for (uint64_t i = 0; i < 20; i++)
        assert_int_equal(knows(&r, i) ? read_block(&r, i) : -1, 0);
    rig_close(&r);
    assert_int_equal(count("/nodes/"), 1);      /* who only reads takes no place */
}

static void others_blocks_are_seen(void **state)
{
    struct rig a, b;

    open_one(&a);
    open_one(&b);
    for (uint64_t i = 0; i < 10; i++) {
        write_block(i & 1 ? &a : &b, i);
        rig_scan(&a);
        rig_scan(&b);
    }
    rig_scan(&a);
    for (uint64_t i = 0; i < 10; i++) {
        assert_int_equal(knows(&a, i) ? read_block(&a, i) : -1, 0);
        assert_int_equal(knows(&b, i) ? read_block(&b, i) : -1, 0);
    }
    assert_int_equal(count("/nodes/"), 2);
    assert_int_equal(count("/log-"), 2);        /* they grow, and are written again */
    uint64_t gets = bucket.gets, puts = bucket.puts;
    rig_scan(&b);
    assert_int_equal(bucket.gets - gets, 1 + 1 + 2);    /* the header, twice; two heads: no log */
    assert_int_equal(bucket.puts, puts);
    rig_close(&a);
    rig_close(&b);
}

/* More than a log holds. */
static void logs_fill(void **state)
{
    struct rig a, b;
    uint32_t n = STORE_LOG_KEYS + 100;

    open_one(&a);
    open_one(&b);
    for (uint64_t i = 0; i < n; i++) {
        assert_int_equal(one_request(&a, FK_STORE_WRITE, i), 0);
        if (i == 3000 || i == STORE_LOG_KEYS - 1) {
            rig_scan(&a);
            rig_scan(&b);
            assert_true(knows(&b, i));
        }
    }
    rig_scan(&a);
    rig_scan(&b);
    assert_int_equal(stats_of_store(&b).blocks, n);
    assert_int_equal(count("/log-"), 2);
    rig_close(&a);
    drop("*/log-*-0");                  /* the first log has expired */
    struct rig c;
    open_one(&c);
    assert_int_equal(stats_of_store(&c).blocks, 100);
    rig_close(&c);
    rig_close(&b);
}

static void unsure_writes_are_not_there(void **state)
{
    struct fk_store_params p = bucket_params();
    struct rig a;

    p.sure = never_sure;
    rig_open_at(&a, "bucket", &p);
    assert_int_equal(write_block(&a, 1), -ECANCELED);
    assert_int_equal(count("/data/"), 0);
    rig_close(&a);
}

/* ---- places ---- */

static void a_place_is_taken_over(void **state)
{
    struct rig r;

    for (uint64_t i = 0; i < 6; i++) {
        open_one(&r);
        for (uint64_t k = 0; k < i; k++)
            assert_int_equal(knows(&r, k) ? read_block(&r, k) : -1, 0);
        assert_int_equal(write_block(&r, i), 0);
        rig_close(&r);
    }
    assert_int_equal(count("/nodes/"), 1);      /* restarts do not add up */
    drop("*/log-*");                    /* all has expired: a head tells of it until it is looked at again */
    open_one(&r);
    assert_int_equal(stats_of_store(&r).blocks, 0);
    rig_close(&r);
}

/* Two write at once for the first time: the one who was overwritten takes another place. */
static void two_take_the_same(void **state)
{
    struct rig a, b;

    open_one(&a);
    open_one(&b);
    write_block(&a, 1);
    write_block(&b, 2);
    rig_scan(&a);
    struct object *o = nth("/nodes/0", 0);
    struct store_head_object copy = { 0 };
    assert_non_null(o);
    memcpy(&copy, o->data, o->bytes);
    drop("*/nodes/0*");                 /* as b saw it before a's write */
    rig_scan(&b);
    assert_int_equal(count("/nodes/"), 1);
    rig_scan(&a);                       /* sees that it is b's */
    assert_int_equal(count("/nodes/"), 2);
    rig_scan(&b);
    assert_true(knows(&a, 2) && knows(&b, 1));
    rig_close(&a);
    rig_close(&b);
    open_one(&a);
    assert_int_equal(stats_of_store(&a).blocks, 2);
    rig_close(&a);
}

/* A node that has stood still for hours finds another one in its place. */
static void taken_for_dead_by_mistake(void **state)
{
    struct rig a, b;

    open_one(&a);
    write_block(&a, 1);
    rig_scan(&a);
    struct object *o = nth("/nodes/0", 0);
    struct store_head_object *h = calloc(1, sizeof(*h));
    memcpy(h, o->data, o->bytes);
    h->head.beat_s -= 4 * 3600;
    assert_int_equal(store_head_seal(h), o->bytes);
    memcpy(o->data, h, o->bytes);
    free(h);
    open_one(&b);
    write_block(&b, 2);
    rig_scan(&b);
    assert_int_equal(count("/nodes/"), 1);      /* b has the place, and tells of a's block */
    write_block(&a, 3);
    rig_scan(&a);
    assert_int_equal(count("/nodes/"), 2);
    rig_scan(&b);
    assert_true(knows(&b, 1) && knows(&b, 3) && knows(&a, 2));
    rig_close(&a);
    rig_close(&b);
    open_one(&a);
    assert_int_equal(stats_of_store(&a).blocks, 3);
    rig_close(&a);
}

/* ---- resets ---- */

static void a_reset_is_for_all(void **state)
{
    struct rig a, b;

    open_one(&a);
    open_one(&b);
    for (uint64_t i = 0; i < 5; i++)
        write_block(&a, i);
    rig_scan(&a);
    rig_scan(&b);
    assert_true(knows(&b, 1));
    fk_store_reset(a.store, a.space);
    assert_int_equal(fk_store_reset_wait(a.store, WAIT_US), 0);
    assert_false(knows(&a, 1));
    assert_int_equal(read_block(&a, 1), -ENOENT);
    rig_scan(&b);
    assert_false(knows(&b, 1));
    assert_int_equal(read_block(&b, 1), -ENOENT);
    write_block(&b, 7);                 /* and it goes on */
    rig_scan(&b);
    rig_scan(&a);
    assert_int_equal(knows(&a, 7) ? read_block(&a, 7) : -1, 0);
    rig_close(&a);
    rig_close(&b);
    open_one(&a);
    assert_int_equal(stats_of_store(&a).blocks, 1);
    rig_close(&a);
}

static void an_emptied_bucket_is_begun_anew(void **state)
{
    struct rig a, b;

    open_one(&a);
    open_one(&b);
    write_block(&a, 1);
    rig_scan(&a);
    rig_scan(&b);
    empty_bucket();
    assert_int_equal(read_block(&b, 1), -ENOENT);
    rig_scan(&a);
    assert_false(knows(&a, 1));
    write_block(&a, 2);
    rig_scan(&a);
    rig_scan(&b);
    assert_true(!knows(&b, 1) && knows(&b, 2));
    rig_close(&a);
    rig_close(&b);
}

/* Takes what was lost: so many blocks, from that number on. */
static void expect_lost(struct rig *r, uint64_t from, uint32_t n)
{
    struct fk_store_lost lost[16];

    assert_int_equal(fk_store_take_lost(r->store, lost, 16), n);
    for (uint32_t i = 0; i < n; i++) {
        assert_int_equal(lost[i].space, r->space);
        assert_true(fk_key_equal(lost[i].key, key_of(from + i)));
        assert_false(knows(r, from + i));
    }
    assert_int_equal(fk_store_take_lost(r->store, lost, 16), 0);
}

/* It is not used before the new generation is there, so what waited for it is told to others. */
static void a_bucket_that_comes_back_empty(void **state)
{
    struct rig a, b;

    for (int writes_first = 0; writes_first < 2; writes_first++) {
        open_one(&a);
        write_block(&a, 1);
        fail_for("kv/", -EIO);
        for (uint64_t i = 2; i < 6; i++)
            assert_int_equal(writes_first ? write_block(&a, i) : read_block(&a, 1), -EIO);
        assert_false(writes_first ? fk_store_writes(a.store) : fk_store_reads(a.store));
        empty_bucket();
        fail_for("", 0);
        wait_until(fk_store_reads(a.store) && fk_store_writes(a.store));    /* without a scan */
        assert_int_equal(count("/header"), 1);
        assert_false(knows(&a, 1));
        for (uint64_t i = 2; i < 6; i++)
            assert_int_equal(write_block(&a, i), 0);
        rig_scan(&a);
        open_one(&b);
        assert_int_equal(stats_of_store(&a).blocks, 4);
        assert_int_equal(stats_of_store(&b).blocks, 4);
        rig_close(&a);
        rig_close(&b);
        empty_bucket();
    }
}

/* Written when the bucket had been emptied already, or reset by another: it is in nobody's log. */
static void what_is_written_into_nothing_is_lost(void **state)
{
    struct rig a, b;

    open_one(&a);
    open_one(&b);
    write_block(&a, 1);
    rig_scan(&a);
    empty_bucket();
    assert_int_equal(write_block(&a, 2), 0);
    assert_int_equal(write_block(&a, 3), 0);
    rig_scan(&a);
    expect_lost(&a, 2, 2);
    rig_scan(&b);
    fk_store_reset(b.store, b.space);
    assert_int_equal(fk_store_reset_wait(b.store, WAIT_US), 0);
    assert_int_equal(write_block(&a, 2), 0);
    rig_scan(&a);
    expect_lost(&a, 2, 1);
    assert_int_equal(write_block(&a, 2), 0);
    rig_scan(&a);
    rig_scan(&b);
    expect_lost(&a, 2, 0);
    assert_int_equal(knows(&b, 2) ? read_block(&b, 2) : -1, 0);
    empty_bucket();
    assert_int_equal(write_block(&a, 4), 0);
    fk_store_reset(a.store, a.space);   /* what one's own reset takes away is not lost */
    assert_int_equal(fk_store_reset_wait(a.store, WAIT_US), 0);
    rig_scan(&a);
    expect_lost(&a, 4, 0);
    rig_close(&a);
    rig_close(&b);
}

static struct rig *shared_rig;
static _Atomic int scan_rc;

/* Asked in the midst of a write. */
static bool emptied_meanwhile(void *arg, uint64_t user)
{
    if (arg == &scan_rc && atomic_exchange(&scan_rc, 0) == 1) {
        empty_bucket();
        atomic_store(&scan_rc, fk_store_scan(shared_rig->store, WAIT_US));
    }
    return true;
}

static void what_is_being_written_when_it_is_emptied(void **state)
{
    struct fk_store_params p = bucket_params();
    struct rig a;

    p.sure = emptied_meanwhile;
    p.arg = &scan_rc;
    shared_rig = &a;
    rig_open_at(&a, "bucket", &p);
    rig_scan(&a);
    atomic_store(&scan_rc, 1);
    assert_int_equal(write_block(&a, 1), -ECANCELED);
    assert_int_equal(scan_rc, 0);
    assert_int_equal(stats_of_store(&a).write_blocks, 0);
    expect_lost(&a, 1, 1);
    assert_int_equal(write_block(&a, 1), 0);
    rig_scan(&a);
    expect_lost(&a, 1, 0);
    assert_int_equal(read_block(&a, 1), 0);
    rig_close(&a);
}

static void empty_and_write(void)
{
    empty_bucket();
    (void)write_block(shared_rig, 2);
}

/* After the scan has seen the header, before it tells others what was written. */
static void emptied_in_the_midst_of_a_scan(void **state)
{
    struct rig a;

    open_one(&a);
    write_block(&a, 1);
    shared_rig = &a;
    bucket.at_exists = empty_and_write;
    rig_scan(&a);
    assert_null(bucket.at_exists);
    assert_true(knows(&a, 2));
    rig_scan(&a);
    expect_lost(&a, 2, 1);
    rig_close(&a);
}

/* ---- what is not good ---- */

static void bad_objects_are_misses(void **state)
{
    char text[STORE_KEY_CHARS + 1];
    struct rig r;

    open_one(&r);
    for (int how = 0; how < 5; how++) {
        write_block(&r, 2);
        write_block(&r, 3);
        store_key_text(key_of(2), text);
        struct object *o = nth(text, 0), *other;
        store_key_text(key_of(3), text);
        other = nth(text, 0);
        switch (how) {
        case 0: o->data[4096 + 777] ^= 4; break;
        case 1: o->data[20] ^= 4; break;
        case 2: o->bytes--; break;
        case 3: o->bytes = 0; break;
        case 4: memcpy(o->data, other->data, o->bytes); break;
        }
        assert_int_equal(read_block(&r, 2), -EBADMSG);
        assert_false(knows(&r, 2));
        assert_int_equal(read_block(&r, 3), 0);
    }
    assert_int_equal(stats_of_store(&r).bad, 5);
    write_block(&r, 2);
    assert_int_equal(read_block(&r, 2), 0);
    rig_close(&r);
}

static void damaged_logs_and_heads(void **state)
{
    struct rig a, b;

    open_one(&a);
    for (uint64_t i = 0; i < 5; i++)
        write_block(&a, i);
    rig_close(&a);
    struct object *o = nth("/log-", 0);
    o->data[60] ^= 1;
    open_one(&b);                       /* nothing that it tells of is known, and it is not believed */
    assert_int_equal(stats_of_store(&b).blocks, 0);
    rig_close(&b);
    o = nth("/log-", 0);
    o->data[60] ^= 1;
    o = nth("/nodes/", 0);
    o->data[30] ^= 1;
    open_one(&b);
    assert_int_equal(stats_of_store(&b).blocks, 0);
    write_block(&b, 7);                 /* takes the next place */
    rig_scan(&b);
    assert_int_equal(count("/nodes/"), 2);
    o = nth("/nodes/0", 0);
    o->data[30] ^= 1;
    rig_scan(&b);
    assert_int_equal(stats_of_store(&b).blocks, 6);
    rig_close(&b);
}

static void trouble_with_a_log_is_not_the_end_of_it(void **state)
{
    struct rig a, b;

    open_one(&a);
    open_one(&b);
    fail_for("/log-", -EIO);
    for (uint64_t i = 0; i < 5; i++)
        assert_int_equal(write_block(&a, i), 0);
    rig_scan(&a);
    assert_int_equal(count("/log-"), 0);
    fail_for("/nodes/", -EIO);
    rig_scan(&a);
    fail_for("", 0);
    wait_until(fk_store_reads(a.store));
    rig_scan(&a);
    fail_for("/log-", -EIO);
    rig_scan(&b);
    assert_false(knows(&b, 1));
    fail_for("", 0);
    wait_until(fk_store_reads(b.store));
    rig_scan(&b);
    assert_int_equal(stats_of_store(&b).blocks, 5);
    rig_close(&a);
    rig_close(&b);
}

static void errors_take_it_out_and_it_comes_back(void **state)
{
    struct rig r;

    open_one(&r);
    write_block(&r, 1);
    fail_for("kv/", -EIO);
    for (int i = 0; i < 4; i++)
        assert_int_equal(read_block(&r, 1), -EIO);
    assert_false(fk_store_reads(r.store));
    assert_int_equal(read_block(&r, 1), -ENODEV);
    fail_for("", 0);
    wait_until(fk_store_reads(r.store));
    assert_true(knows(&r, 1));          /* trouble is not "not there" */
    assert_int_equal(read_block(&r, 1), 0);
    rig_close(&r);
}

static void a_hang_is_over_at_the_deadline(void **state)
{
    struct rig r;

    open_one(&r);
    write_block(&r, 1);
    bucket.hang = true;
    for (int i = 0; i < 4; i++)
        assert_int_equal(submit_read(&r, 1, 5000000), 0);
    wait_until(!fk_store_reads(r.store));
    assert_int_equal(stats_of_store(&r).quarantined, 0);
    bucket.hang = false;
    wait_until(fk_store_reads(r.store));
    assert_true(knows(&r, 1));
    bucket.hang = true;
    uint64_t from = fk_clock_us();
    assert_true(fk_store_close(r.store));       /* nobody touches any buffer */
    assert_true(fk_clock_us() - from < WAIT_US);
    bucket.hang = false;
    free(r.buf);
    usleep(300000);                     /* a scanner that was left behind finds that it may go */
}

static void what_cannot_be(void **state)
{
    struct fk_store_params p = bucket_params();
    struct rig r;

    fail_for("kv/flexkv", -EIO);
    assert_int_equal(rig_try(&r, "bucket", &p), -EIO);
    assert_non_null(strstr(r.error, "AWS_ACCESS_KEY_ID"));
    fail_for("", 0);
    p.capacity_bytes = 1;
    assert_int_equal(rig_try(&r, "bucket", &p), -EINVAL);
    assert_non_null(strstr(r.error, "remote_cache_gb"));
    p = bucket_params();
    p.bucket.name[0] = '\0';
    assert_int_equal(rig_try(&r, "bucket", &p), -EINVAL);
    assert_non_null(strstr(r.error, "remote_bucket"));
    p = bucket_params();
    memset(p.bucket.prefix, 'x', 150);
    assert_int_equal(rig_try(&r, "bucket", &p), 0);
    write_block(&r, 1);
    assert_int_equal(read_block(&r, 1), 0);
    rig_close(&r);
    open_one(&r);
    rig_close(&r);
    struct object *o = nth("kv/spaces", 0);
    o->data[100] ^= 1;
    p = bucket_params();
    assert_int_equal(rig_try(&r, "bucket", &p), -EEXIST);
    assert_non_null(strstr(r.error, "remote_prefix"));
}

int main(void)
{
#define test(f) cmocka_unit_test_setup(f, begin)
    const struct CMUnitTest tests[] = {
        test(blocks_come_back),
        test(others_blocks_are_seen),
        test(logs_fill),
        test(unsure_writes_are_not_there),
        test(a_place_is_taken_over),
        test(two_take_the_same),
        test(taken_for_dead_by_mistake),
        test(a_reset_is_for_all),
        test(an_emptied_bucket_is_begun_anew),
        test(a_bucket_that_comes_back_empty),
        test(what_is_written_into_nothing_is_lost),
        test(what_is_being_written_when_it_is_emptied),
        test(emptied_in_the_midst_of_a_scan),
        test(bad_objects_are_misses),
        test(damaged_logs_and_heads),
        test(trouble_with_a_log_is_not_the_end_of_it),
        test(errors_take_it_out_and_it_comes_back),
        test(a_hang_is_over_at_the_deadline),
        test(what_cannot_be),
    };

    fk_log_set_level(FK_LOG_OFF);
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    empty_bucket();
    return failed;
}
