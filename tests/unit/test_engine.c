/* test_engine.c - the I/O engines: uring, threads, and the fault filter around each. */
#include <fcntl.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <cmocka.h>

#include "base/clock.h"
#include "base/log.h"
#include "base/util.h"
#include "tier/engine.h"

#define PAGE 4096u

struct backend {
    const char *name;
    int (*create)(const struct fk_engine_params *p, struct fk_engine **out);
    bool filtered;                      /* behind a fault filter with all rates 0 */
};

static const struct backend backends[] = {
    { "uring", fk_engine_uring_create, false },
    { "threads", fk_engine_threads_create, false },
    { "fault over uring", fk_engine_uring_create, true },
    { "fault over threads", fk_engine_threads_create, true },
};

static char dir[64];

static struct fk_engine *make(const struct backend *b, unsigned depth)
{
    struct fk_engine_params p = { .depth = depth };
    struct fk_fault_params none = { .seed = 1 };
    struct fk_engine *e;

    if (b->create(&p, &e) < 0)
        return NULL;
    if (b->filtered)
        assert_int_equal(fk_engine_fault_create(e, &none, &e), 0);
    return e;
}

/* Runs the test on each backend that this machine grants. */
static void on_each(void (*test)(struct fk_engine *e))
{
    for (size_t i = 0; i < fk_array_size(backends); i++) {
        struct fk_engine *e = make(&backends[i], 8);

        if (!e) {
            print_message("%s: not granted here, left out\n", backends[i].name);
            continue;
        }
        test(e);
        assert_int_equal(e->ops->inflight(e), 0);
        e->ops->destroy(e);
    }
}

static const char *path_of(const char *name)
{
    static char path[128];

    snprintf(path, sizeof(path), "%s/%s", dir, name);
    return path;
}

static uint32_t open_new(struct fk_engine *e, const char *name, uint64_t bytes, unsigned flags)
{
    uint32_t file;
    bool created;

    unlink(path_of(name));
    assert_int_equal(e->ops->open(e, path_of(name), bytes, flags | FK_FILE_CREATE, &file,
                                  &created), 0);
    assert_true(created);
    return file;
}

static void *pages(size_t bytes)
{
    void *p = aligned_alloc(PAGE, bytes);

    assert_non_null(p);
    memset(p, 0, bytes);
    return p;
}

static void fill(void *buf, size_t bytes, uint64_t seed)
{
    for (size_t i = 0; i < bytes / 8; i++)
        ((uint64_t *)buf)[i] = fk_rng_next(&seed);
}

static void run_all(struct fk_engine *e, struct fk_io *ios, int n)
{
    struct fk_io *out[16];
    int left = n;

    for (int i = 0; i < n; i++)
        e->ops->submit(e, &ios[i]);
    assert_int_equal(e->ops->inflight(e), n);
    e->ops->flush(e);
    for (int tries = 0; left > 0 && tries < 1000; tries++) {
        int got = e->ops->reap(e, out, 16, 1000000);

        for (int i = 0; i < got; i++) {
            assert_true(out[i] >= ios && out[i] < ios + n);
            assert_ptr_equal(out[i]->owner, &ios[out[i] - ios]);
        }
        left -= got;
    }
    assert_int_equal(left, 0);
}

static int32_t one(struct fk_engine *e, enum fk_io_op op, uint32_t file, uint64_t offset,
                   void *buf, uint32_t bytes)
{
    struct fk_io io = { .op = op, .file = file, .offset = offset, .buf = buf, .bytes = bytes };

    io.owner = &io;
    run_all(e, &io, 1);
    assert_int_equal(io.bytes, bytes);
    assert_int_equal(io.offset, offset);
    return io.result;
}

/* --- tests of every backend --- */

static void bytes_come_back(struct fk_engine *e)
{
    enum { N = 100, BYTES = 3 * PAGE };
    uint32_t file = open_new(e, "bytes", N * BYTES, FK_FILE_DIRECT | FK_FILE_PREALLOC);
    char *a = pages(N * BYTES), *b = pages(N * BYTES);
    struct fk_io ios[N];

    fill(a, N * BYTES, 1);
    e->ops->register_memory(e, b, N * BYTES / 2);       /* half of the reads are fixed ones */
    for (int pass = 0; pass < 2; pass++) {
        for (int i = 0; i < N; i++) {
            int at = (i * 37) % N;

            ios[i] = (struct fk_io){ .op = pass ? FK_IO_READ : FK_IO_WRITE, .file = file,
                                     .offset = (uint64_t)at * BYTES,
                                     .buf = (pass ? b : a) + at * BYTES, .bytes = BYTES,
                                     .owner = &ios[i] };
        }
        run_all(e, ios, N);             /* far more than the depth of 8 */
        for (int i = 0; i < N; i++)
            assert_int_equal(ios[i].result, BYTES);
    }
    assert_memory_equal(a, b, N * BYTES);
    e->ops->close(e, file);
    free(a);
    free(b);
}
static void test_bytes(void **state) { on_each(bytes_come_back); }

static void buffered_any_place(struct fk_engine *e)
{
    uint32_t file = open_new(e, "buffered", 1000, FK_FILE_PREALLOC);
    char out[64] = "sixty-four bytes at an odd place", in[64] = { 0 };

    assert_int_equal(one(e, FK_IO_WRITE, file, 321, out, 64), 64);
    assert_int_equal(one(e, FK_IO_READ, file, 321, in, 64), 64);
    assert_memory_equal(in, out, 64);
    e->ops->close(e, file);
}
static void test_buffered(void **state) { on_each(buffered_any_place); }

static void files(struct fk_engine *e)
{
    uint32_t a, b;
    uint64_t bytes;
    bool created;
    struct stat st;

    unlink(path_of("f"));
    assert_int_equal(e->ops->open(e, path_of("f"), 0, 0, &a, &created), -ENOENT);
    a = open_new(e, "f", 1 << 20, FK_FILE_DIRECT | FK_FILE_PREALLOC);
    assert_int_equal(e->ops->size(e, a, &bytes), 0);
    assert_int_equal(bytes, 1 << 20);
    assert_int_equal(stat(path_of("f"), &st), 0);
    assert_int_equal(st.st_blocks, (1 << 20) / 512);
    assert_int_equal(st.st_mode & 0777, 0600);
    assert_int_equal(e->ops->open(e, path_of("f"), 2 << 20, FK_FILE_CREATE | FK_FILE_PREALLOC,
                                  &b, &created), 0);
    assert_false(created);
    assert_int_not_equal(a, b);
    assert_int_equal(e->ops->size(e, a, &bytes), 0);
    assert_int_equal(bytes, 2 << 20);   /* what a crash left short is made whole */
    if (e->ops->sync)
        assert_int_equal(e->ops->sync(e, a), 0);
    e->ops->close(e, a);
    e->ops->close(e, b);
    a = open_new(e, "g", PAGE, 0);
    assert_int_equal(e->ops->size(e, a, &bytes), 0);
    assert_int_equal(bytes, 0);
    e->ops->close(e, a);
}
static void test_files(void **state) { on_each(files); }

static void errors_are_results(struct fk_engine *e)
{
    uint32_t file = open_new(e, "short", 2 * PAGE, FK_FILE_DIRECT | FK_FILE_PREALLOC);
    char *buf = pages(4 * PAGE);

    assert_int_equal(one(e, FK_IO_READ, file, 0, buf, 4 * PAGE), 2 * PAGE);
    assert_int_equal(one(e, FK_IO_READ, file, 8 * PAGE, buf, PAGE), 0);
    assert_int_equal(one(e, FK_IO_READ, file, 0, (void *)8, PAGE), -EFAULT);
    e->ops->close(e, file);
    free(buf);
}
static void test_errors(void **state) { on_each(errors_are_results); }

static _Atomic bool said;

static void *wake_later(void *arg)
{
    struct fk_engine *e = arg;

    usleep(50000);
    said = true;
    e->ops->wake(e);
    return NULL;
}

/* False if a wait was not ended by wake(), or ended for nothing too often. */
static bool wakes_ok(struct fk_engine *e)
{
    struct fk_io *out[4];
    pthread_t t;
    bool ok = true;

    for (int i = 0; i < 3; i++) {
        uint64_t start = fk_clock_us();
        int waits = 0;

        said = false;
        pthread_create(&t, NULL, wake_later, e);
        while (!said) {
            ok = ok && e->ops->reap(e, out, 4, 10000000) == 0;
            waits++;
        }
        ok = ok && waits <= 5 && fk_clock_us() - start < 5000000;
        pthread_join(t, NULL);
    }
    e->ops->wake(e);                    /* before the wait: not lost */
    uint64_t start = fk_clock_us();
    e->ops->reap(e, out, 4, 10000000);
    return ok && fk_clock_us() - start < 5000000;
}

static void wakes(struct fk_engine *e)
{
    assert_true(wakes_ok(e));
}
static void test_wake(void **state) { on_each(wakes); }

/* The store is opened by one thread and served by another. */
static void *wait_here(void *arg)
{
    return wakes_ok(arg) ? arg : NULL;
}

static void changes_hands(struct fk_engine *e)
{
    pthread_t t;
    void *ok;

    wakes(e);
    pthread_create(&t, NULL, wait_here, e);
    pthread_join(t, &ok);
    assert_non_null(ok);
    wakes(e);                           /* the thread that armed the last wait is gone */
}
static void test_hands(void **state) { on_each(changes_hands); }

static void waits_asleep(struct fk_engine *e)
{
    struct fk_io *out[4];
    uint64_t start = fk_clock_us(), cpu = fk_clock_process_cpu_ns();

    while (fk_clock_us() - start < 200000)
        assert_int_equal(e->ops->reap(e, out, 4, 200000), 0);
    assert_in_range(fk_clock_us() - start, 200000, 2000000);
    assert_in_range(fk_clock_process_cpu_ns() - cpu, 0, 50000000);
    assert_int_equal(e->ops->reap(e, out, 4, 0), 0);
}
static void test_asleep(void **state) { on_each(waits_asleep); }

/* Registered in several pieces; I/O across a border must still be right. */
static void borders(struct fk_engine *e)
{
    enum { N = 16 };
    uint32_t file = open_new(e, "borders", N * PAGE, FK_FILE_DIRECT | FK_FILE_PREALLOC);
    char *mem = mmap(NULL, 2 * N * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS,
                     -1, 0);
    char *in = mem + N * PAGE;

    assert_true(mem != MAP_FAILED);
    for (int i = 0; i < 2 * N; i += 4)  /* last piece first */
        e->ops->register_memory(e, mem + (2 * N - 4 - i) * PAGE, 4 * PAGE);
    fill(mem, N * PAGE, 5);
    assert_int_equal(one(e, FK_IO_WRITE, file, 0, mem, N * PAGE), N * PAGE);
    for (int i = 0; i < N; i += 2)
        assert_int_equal(one(e, FK_IO_READ, file, (uint64_t)i * PAGE, in + i * PAGE, 2 * PAGE),
                         2 * PAGE);
    assert_memory_equal(mem, in, N * PAGE);
    assert_int_equal(one(e, FK_IO_READ, file, 3 * PAGE, in + 3 * PAGE, 2 * PAGE), 2 * PAGE);
    assert_memory_equal(mem, in, N * PAGE);
    e->ops->close(e, file);
    munmap(mem, 2 * N * PAGE);
}
static void test_borders(void **state) { on_each(borders); }

static void test_choice(void **state)
{
    struct fk_engine_params p = { .depth = 4, .no_uring = true };
    struct fk_engine *e;

    assert_int_equal(fk_engine_create(&p, &e), 0);
    assert_string_equal(e->ops->name, "threads");
    e->ops->destroy(e);
    p.no_uring = false;
    assert_int_equal(fk_engine_create(&p, &e), 0);
    e->ops->destroy(e);
}

static void test_no_space(void **state)
{
    struct fk_engine *e = make(&backends[1], 4);
    uint32_t file;
    bool created;

    unlink(path_of("huge"));
    int rc = e->ops->open(e, path_of("huge"), 1ull << 50, FK_FILE_CREATE | FK_FILE_PREALLOC,
                          &file, &created);
    assert_true(rc == -ENOSPC || rc == -EFBIG);
    assert_int_equal(access(path_of("huge"), F_OK), -1);
    e->ops->destroy(e);
}

/* --- the fault filter --- */

struct fault_rig {
    struct fk_engine *e;
    uint32_t file;
    char *old, *new, *in;               /* file's content, what is written, what is read */
};
#define RIG_PAGES 8
#define RIG_BYTES (RIG_PAGES * PAGE)
#define FILE_BYTES (4 * RIG_BYTES)

static void rig_make(struct fault_rig *r, enum fk_fault_kind kind, double rate)
{
    struct fk_engine *inner = make(&backends[1], 8);
    struct fk_fault_params p = { .seed = 3, .delay_us = 100000 };

    r->file = open_new(inner, "fault", FILE_BYTES, FK_FILE_DIRECT | FK_FILE_PREALLOC);
    r->old = pages(FILE_BYTES);
    r->new = pages(RIG_BYTES);
    r->in = pages(FILE_BYTES);
    fill(r->old, FILE_BYTES, 1);
    fill(r->new, RIG_BYTES, 2);
    assert_int_equal(one(inner, FK_IO_WRITE, r->file, 0, r->old, FILE_BYTES), FILE_BYTES);
    inner->ops->close(inner, r->file);
    p.rate[kind] = rate;
    assert_int_equal(fk_engine_fault_create(inner, &p, &r->e), 0);
    bool created;
    assert_int_equal(r->e->ops->open(r->e, path_of("fault"), FILE_BYTES, FK_FILE_DIRECT,
                                     &r->file, &created), 0);
}

static void rig_free(struct fault_rig *r)
{
    r->e->ops->destroy(r->e);
    free(r->old);
    free(r->new);
    free(r->in);
}

/* What really is in the file. */
static void rig_look(struct fault_rig *r)
{
    int fd = open(path_of("fault"), O_RDONLY);

    assert_int_equal(pread(fd, r->in, FILE_BYTES, 0), FILE_BYTES);
    close(fd);
}

static unsigned pages_like(const char *a, const char *b, unsigned n)
{
    unsigned same = 0;

    for (unsigned i = 0; i < n; i++)
        same += memcmp(a + i * PAGE, b + i * PAGE, PAGE) == 0;
    return same;
}

static void test_fault_errors(void **state)
{
    static const struct { enum fk_fault_kind kind; enum fk_io_op op; int result; } cases[] = {
        { FK_FAULT_READ_ERROR, FK_IO_READ, -EIO }, { FK_FAULT_WRITE_ERROR, FK_IO_WRITE, -EIO },
        { FK_FAULT_ENOSPC, FK_IO_WRITE, -ENOSPC },
    };

    for (size_t i = 0; i < fk_array_size(cases); i++) {
        struct fault_rig r;

        rig_make(&r, cases[i].kind, 1);
        assert_int_equal(one(r.e, cases[i].op, r.file, 0, r.new, RIG_BYTES), cases[i].result);
        assert_int_equal(fk_engine_fault_count(r.e, cases[i].kind), 1);
        rig_look(&r);
        assert_memory_equal(r.in, r.old, FILE_BYTES);
        rig_free(&r);
    }
}

static void test_fault_short(void **state)
{
    struct fault_rig r;

    rig_make(&r, FK_FAULT_READ_SHORT, 1);
    int32_t n = one(r.e, FK_IO_READ, r.file, 0, r.in, RIG_BYTES);
    assert_true(n >= 0 && n < (int)RIG_BYTES && n % PAGE == 0);
    assert_memory_equal(r.in, r.old, n);
    rig_free(&r);
    rig_make(&r, FK_FAULT_WRITE_SHORT, 1);
    n = one(r.e, FK_IO_WRITE, r.file, 0, r.new, RIG_BYTES);
    assert_true(n >= 0 && n < (int)RIG_BYTES && n % PAGE == 0);
    rig_look(&r);
    assert_memory_equal(r.in, r.new, n);
    assert_memory_equal(r.in + n, r.old + n, FILE_BYTES - (size_t)n);
    rig_free(&r);
}

static void test_fault_flip(void **state)
{
    struct fault_rig r;
    unsigned bits = 0;

    rig_make(&r, FK_FAULT_READ_FLIP, 1);
    assert_int_equal(one(r.e, FK_IO_READ, r.file, 0, r.in, RIG_BYTES), RIG_BYTES);
    for (unsigned i = 0; i < RIG_BYTES; i++)
        bits += (unsigned)__builtin_popcount((unsigned char)(r.in[i] ^ r.old[i]));
    assert_int_equal(bits, 1);
    rig_free(&r);
}

static void test_fault_torn_lost(void **state)
{
    struct fault_rig r;

    rig_make(&r, FK_FAULT_WRITE_TORN, 1);
    assert_int_equal(one(r.e, FK_IO_WRITE, r.file, 0, r.new, RIG_BYTES), RIG_BYTES);
    rig_look(&r);
    unsigned new = pages_like(r.in, r.new, RIG_PAGES);
    assert_true(new < RIG_PAGES);
    assert_memory_equal(r.in, r.new, new * PAGE);
    assert_memory_equal(r.in + new * PAGE, r.old + new * PAGE, FILE_BYTES - new * PAGE);
    rig_free(&r);
    rig_make(&r, FK_FAULT_WRITE_LOST, 1);
    assert_int_equal(one(r.e, FK_IO_WRITE, r.file, 0, r.new, RIG_BYTES), RIG_BYTES);
    rig_look(&r);
    assert_memory_equal(r.in, r.old, FILE_BYTES);
    rig_free(&r);
}

static void test_fault_misdirect(void **state)
{
    struct fault_rig r;

    rig_make(&r, FK_FAULT_WRITE_MISDIRECT, 1);
    assert_int_equal(one(r.e, FK_IO_WRITE, r.file, PAGE, r.new, RIG_BYTES), RIG_BYTES);
    rig_look(&r);
    assert_memory_not_equal(r.in + PAGE, r.new, RIG_BYTES);
    assert_int_equal(pages_like(r.in, r.old, 4 * RIG_PAGES), 3 * RIG_PAGES);
    rig_free(&r);
    rig_make(&r, FK_FAULT_READ_MISDIRECT, 1);
    assert_int_equal(one(r.e, FK_IO_READ, r.file, PAGE, r.in, RIG_BYTES), RIG_BYTES);
    assert_memory_not_equal(r.in, r.old + PAGE, RIG_BYTES);
    rig_free(&r);
}

static void test_fault_delay(void **state)
{
    struct fault_rig r;
    uint64_t start = fk_clock_us();

    rig_make(&r, FK_FAULT_DELAY, 1);
    assert_int_equal(one(r.e, FK_IO_READ, r.file, 0, r.in, RIG_BYTES), RIG_BYTES);
    assert_true(fk_clock_us() - start >= 100000);
    assert_memory_equal(r.in, r.old, RIG_BYTES);
    rig_free(&r);
}

/* The same seed gives the same faults; tables are spared unless asked for. */
static void test_fault_seed(void **state)
{
    char seen[2][200];

    for (int pass = 0; pass < 2; pass++) {
        struct fault_rig r;

        rig_make(&r, FK_FAULT_READ_ERROR, 0.3);
        for (int i = 0; i < 200; i++)
            seen[pass][i] = one(r.e, FK_IO_READ, r.file, 0, r.in, PAGE) < 0;
        assert_in_range(fk_engine_fault_count(r.e, FK_FAULT_READ_ERROR), 30, 90);
        uint32_t table = open_new(r.e, "table", PAGE, FK_FILE_PREALLOC);
        for (int i = 0; i < 50; i++)
            assert_int_equal(one(r.e, FK_IO_READ, table, 0, r.in, 64), 64);
        rig_free(&r);
    }
    assert_memory_equal(seen[0], seen[1], 200);
}

static void test_fault_parse(void **state)
{
    struct fk_fault_params p;
    const char *bad;

    assert_int_equal(fk_fault_parse("read_error=0.001,read_flip=1,seed=7,delay_us=5,tables=1",
                                    &p, &bad), 0);
    assert_true(p.rate[FK_FAULT_READ_ERROR] == 0.001 && p.rate[FK_FAULT_READ_FLIP] == 1);
    assert_true(p.seed == 7 && p.delay_us == 5 && p.tables);
    assert_int_equal(fk_fault_parse("", &p, &bad), 0);
    static const char *const wrong[] = { "read_error", "read_error=", "read_error=2", "seed=x",
                                         "read_error=-1", "blah=1", "seed=-1", "tables=2",
                                         "read_error=nan", "read_flip=0.1x" };
    for (size_t i = 0; i < fk_array_size(wrong); i++) {
        char spec[64];

        snprintf(spec, sizeof(spec), "delay=0.5,%s", wrong[i]);
        assert_int_equal(fk_fault_parse(spec, &p, &bad), -EINVAL);
        assert_ptr_equal(bad, spec + strlen("delay=0.5,"));
    }
}

static int group_setup(void **state)
{
    const char *tmp = getenv("TMPDIR");

    fk_log_set_level(FK_LOG_ERROR);
    snprintf(dir, sizeof(dir), "%.40s/fk_engine_XXXXXX", tmp ? tmp : "/tmp");
    return mkdtemp(dir) ? 0 : -1;
}

static int group_teardown(void **state)
{
    char command[128];

    snprintf(command, sizeof(command), "rm -rf '%s'", dir);
    return system(command);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_bytes), cmocka_unit_test(test_buffered),
        cmocka_unit_test(test_files), cmocka_unit_test(test_errors),
        cmocka_unit_test(test_wake), cmocka_unit_test(test_hands),
        cmocka_unit_test(test_asleep), cmocka_unit_test(test_borders),
        cmocka_unit_test(test_choice), cmocka_unit_test(test_no_space),
        cmocka_unit_test(test_fault_errors), cmocka_unit_test(test_fault_short),
        cmocka_unit_test(test_fault_flip), cmocka_unit_test(test_fault_torn_lost),
        cmocka_unit_test(test_fault_misdirect), cmocka_unit_test(test_fault_delay),
        cmocka_unit_test(test_fault_seed), cmocka_unit_test(test_fault_parse),
    };

    return cmocka_run_group_tests(tests, group_setup, group_teardown);
}
