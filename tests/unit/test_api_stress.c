/*
 * test_api_stress.c - four threads on one node, in memory and with an SSD: match, get, put, prefetch,
 * cancel and release at random over shared chains, every byte got checked by its thread; any thread
 * takes any completion. Meant for ThreadSanitizer and AddressSanitizer as well. STRESS_SECONDS (1).
 */
#include <pthread.h>
#include <stdatomic.h>

#include "api_rig.h"

enum { THREADS = 4, CHAINS = 24, LEN = 12, PAGES_EACH = PAGES / THREADS, GOT_MIN = 50, PATIENCE_S = 30 };

struct request { _Atomic int ended; flexkv_completion c; };

struct worker {
    struct api *a;
    pthread_t thread;
    uint32_t number, first_page;
    uint64_t rng, until_us, ops, resets_seen;
    const char *wrong;
};

static _Atomic uint64_t begun, ended, got, resets_begun, resets_ended;

/* Gives completions to whom they belong, until the own one is there. */
static bool wait_request(struct worker *w, struct request *own)
{
    uint64_t deadline = fk_clock_us() + 60000000;
    flexkv_completion c[4];

    while (!atomic_load(&own->ended)) {
        int n = flexkv_poll(w->a->node, c, 4, 5);
        for (int i = 0; i < n; i++) {
            struct request *r = c[i].user_data;
            r->c = c[i];
            atomic_fetch_add(&ended, 1);
            if (atomic_fetch_add(&r->ended, 1))
                w->wrong = "an operation ended twice";
        }
        if (n < 0 || fk_clock_us() > deadline) {
            w->wrong = "no completion in time";
            return false;
        }
    }
    return true;
}

/* A lease may be gone if anybody was resetting the node, or has since. */
static bool excused(const struct worker *w, int rc)
{
    return rc == -ENOENT && atomic_load(&resets_begun) != w->resets_seen;
}

static bool follow(struct worker *w, int rc, struct request *r, const uint64_t *op)
{
    if (excused(w, rc))
        return false;
    if (rc) {
        w->wrong = "a call failed";
        return false;
    }
    atomic_fetch_add(&begun, 1);
    w->ops++;
    if (fk_rng_below(&w->rng, 8) == 0) {
        if (fk_rng_below(&w->rng, 2))
            usleep(fk_rng_below(&w->rng, 50));
        (void)flexkv_cancel(w->a->node, *op);
    }
    return wait_request(w, r);
}

static void do_put(struct worker *w, const flexkv_key *keys, uint32_t n, flexkv_op_args *args)
{
    struct request r = { 0 };
    uint64_t op = 0;

    args->user_data = &r;
    for (uint32_t i = 0; i < n; i++)
        fill_page(w->a, args->pages[i], keys[i]);
    follow(w, flexkv_put(w->a->ns, keys, n, 0, args, &op), &r, &op);
}

static void do_get(struct worker *w, const flexkv_key *keys, uint32_t n, flexkv_op_args *args)
{
    struct request r = { 0 };
    flexkv_match_result m;
    int8_t results[LEN];
    uint64_t op = 0;

    if (flexkv_match(w->a->ns, keys, n, &m) || !m.blocks)
        return;
    if (fk_rng_below(&w->rng, 6) == 0) {
        int rc = flexkv_release(w->a->node, m.lease);
        if (rc && !excused(w, rc))
            w->wrong = "a lease was gone";
        return;
    }
    args->user_data = &r;
    args->results = results;
    for (uint32_t i = 0; i < m.blocks; i++)
        spoil_page(w->a, args->pages[i]);
    if (!follow(w, flexkv_get(w->a->node, m.lease, 0, m.blocks, args, &op), &r, &op))
        return;
    for (uint32_t i = 0; i < m.blocks; i++) {
        if ((results[i] == 0) != (i < r.c.blocks_ok))
            w->wrong = "results do not agree with the completion";
        if (i < r.c.blocks_ok && !page_holds(w->a, args->pages[i], keys[i]))
            w->wrong = "wrong bytes";
    }
    atomic_fetch_add(&got, r.c.blocks_ok);
}

static void do_prefetch(struct worker *w, const flexkv_key *keys, uint32_t n, flexkv_op_args *args)
{
    struct request r = { 0 };
    uint64_t op = 0;

    args->user_data = &r;
    follow(w, flexkv_prefetch(w->a->ns, keys, n, args, &op), &r, &op);
}

static void do_reset(struct worker *w)
{
    atomic_fetch_add(&resets_begun, 1);
    flexkv_reset(w->a->node);
    atomic_fetch_add(&resets_ended, 1);
}

/* A busy machine may take longer for enough to be seen. */
static bool go_on(const struct worker *w)
{
    uint64_t now = fk_clock_us();

    return !w->wrong && (now < w->until_us || (atomic_load(&got) <= GOT_MIN && now < w->until_us + PATIENCE_S * 1000000ull));
}

static void *work(void *arg)
{
    struct worker *w = arg;
    uint32_t pages[MAX_CHAIN];

    while (go_on(w)) {
        flexkv_key keys[LEN];
        uint32_t n = 1 + fk_rng_below(&w->rng, LEN), what = fk_rng_below(&w->rng, 100);
        flexkv_op_args args = args_from(w->first_page + fk_rng_below(&w->rng, PAGES_EACH - LEN), pages);
        chain_of(w->a, fk_rng_below(&w->rng, CHAINS), keys, LEN);
        w->resets_seen = atomic_load(&resets_ended);
        if (what < 35)
            do_put(w, keys, n, &args);
        else if (what < 85)
            do_get(w, keys, n, &args);
        else if (what < 98)
            do_prefetch(w, keys, n, &args);
        else if (what == 98 && fk_rng_below(&w->rng, 10) == 0)
            do_reset(w);
        else
            (void)stats_of(w->a->node);
    }
    return NULL;
}

static void stress(const char *const *options)
{
    struct worker w[THREADS];
    struct api a;
    const char *seconds = getenv("STRESS_SECONDS");
    uint64_t until = fk_clock_us() + (uint64_t)(1e6 * (seconds ? atof(seconds) : 1.0));

    open_node(&a, options);
    atomic_store(&begun, 0);
    atomic_store(&ended, 0);
    atomic_store(&got, 0);
    for (uint32_t i = 0; i < THREADS; i++) {
        w[i] = (struct worker){ .a = &a, .number = i, .first_page = i * PAGES_EACH, .rng = i + 1,
                                .until_us = until };
        assert_int_equal(pthread_create(&w[i].thread, NULL, work, &w[i]), 0);
    }
    for (uint32_t i = 0; i < THREADS; i++)
        pthread_join(w[i].thread, NULL);
    for (uint32_t i = 0; i < THREADS; i++)
        if (w[i].wrong)
            fail_msg("thread %u: %s", i, w[i].wrong);
    assert_int_equal(begun, ended);
    assert_true(got > GOT_MIN);
    assert_int_equal(stats_of(a.node).operations, 0);
    assert_int_equal(stats_of(a.node).leases, 0);
    assert_false(fd_readable(a.node, 0));
    close_node(&a);
}

static void in_memory(void **state)
{
    stress((const char *const[]){ "cpu_cache_blocks", "100", NULL });
}

static void in_memory_with_several_copy_threads(void **state)
{
    stress((const char *const[]){ "cpu_cache_blocks", "100", "copy_threads", "3", "eviction_policy",
                                  "s3fifo", "evict_start_threshold", "0.8", "evict_ratio", "0.1", NULL });
}

static void with_ssd(const char *uring, const char *write_policy)
{
    char dir[2][80], dirs[200];

    for (int i = 0; i < 2; i++)
        make_dir(dir[i], sizeof(dir[i]));
    snprintf(dirs, sizeof(dirs), "%s;%s", dir[0], dir[1]);
    stress((const char *const[]){ "cpu_cache_blocks", "60", "ssd_cache_blocks", "220", "ssd_cache_dir",
                                  dirs, "iouring_entries", uring, "ssd_write_policy", write_policy,
                                  NULL });
    for (int i = 0; i < 2; i++)
        remove_dir(dir[i]);
}

static void through_to_ssd(void **state) { with_ssd("512", "through"); }
static void evicted_to_ssd(void **state) { with_ssd("512", "on_evict"); }
static void to_ssd_without_io_uring(void **state) { with_ssd("0", "through"); }

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(in_memory),
        cmocka_unit_test(in_memory_with_several_copy_threads),
        cmocka_unit_test(through_to_ssd),
        cmocka_unit_test(evicted_to_ssd),
        cmocka_unit_test(to_ssd_without_io_uring),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
