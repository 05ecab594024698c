/*
 * test_api_events_ssd.c - KV events of a node with an SSD tier: both tiers, the way there and back,
 * restarts, names that are damaged or can't be written.
 */
#include <pthread.h>

#include "api_rig.h"
#include "events_rig.h"

static const char **options_for(const struct api *a, const char *const *more)
{
    static const char *list[32];
    static char dirs[200];
    size_t n = 0;

    snprintf(dirs, sizeof(dirs), "%s;%s", a->dir[0], a->dir[1]);
    const char *const base[] = { "cpu_cache_blocks", "24", "ssd_cache_blocks", "600",
                                 "ssd_cache_dir", dirs, "enable_kv_events", "1" };
    for (size_t i = 0; i < fk_array_size(base); i++)
        list[n++] = base[i];
    while (more && *more)
        list[n++] = *more++;
    list[n] = NULL;
    return list;
}

static flexkv_events *subscribe(struct api *a)
{
    flexkv_events *ev;

    if (flexkv_events_open(a->node, NULL, &ev))
        fail_msg("%s", flexkv_last_error());
    return ev;
}

static void store_named(struct api *a, uint32_t first, uint32_t n, uint32_t len)
{
    for (uint32_t c = first; c < first + n; c++) {
        assert_int_equal(put_named(a, c, len).blocks_ok, len);
        wait_written(a->node);
    }
}

/* Someone who asks now hears what the router believes. */
static void expect_the_truth(struct api *a, const struct router *r)
{
    static struct router fresh;
    flexkv_events *ev = subscribe(a);

    fresh = (struct router){ 0 };
    router_take(&fresh, ev, 64);
    assert_int_equal(fresh.removed, 0);
    assert_int_equal(fresh.n, r->n);
    for (uint32_t i = 0; i < fresh.n; i++)
        assert_true(router_find(r, fresh.block[i].hash, fresh.block[i].medium) >= 0);
    flexkv_events_close(ev);
}

static void both_tiers_are_told(void **state)
{
    static struct router r;
    struct api a;

    r = (struct router){ 0 };
    make_dirs(&a);
    open_node(&a, options_for(&a, NULL));
    flexkv_events *ev = subscribe(&a);
    store_named(&a, 1, 1, 12);
    router_take(&r, ev, 64);
    assert_int_equal(router_count(&r, 1, FLEXKV_MEDIUM_CPU), 12);
    assert_int_equal(router_count(&r, 1, FLEXKV_MEDIUM_STORAGE), 12);
    store_named(&a, 2, 3, 12);                  /* 24 slots: the first goes to SSD alone */
    router_take(&r, ev, 64);
    assert_int_equal(router_count(&r, 1, FLEXKV_MEDIUM_CPU), 0);
    assert_int_equal(router_count(&r, 1, FLEXKV_MEDIUM_STORAGE), 12);
    assert_int_equal(get_and_check(&a, 1, 12), 12);         /* and comes back */
    router_take(&r, ev, 64);
    assert_int_equal(router_count(&r, 1, FLEXKV_MEDIUM_CPU), 12);
    assert_int_equal(router_count(&r, 1, FLEXKV_MEDIUM_STORAGE), 12);
    expect_the_truth(&a, &r);
    assert_int_equal(flexkv_reset(a.node), 0);
    router_take(&r, ev, 64);
    assert_int_equal(r.n, 0);
    flexkv_events_close(ev);
    close_node(&a);
    remove_dirs(&a);
}

static void a_restart_announces_what_is_left(void **state)
{
    static struct router r;
    struct api a;
    flexkv_namespace *one;

    make_dirs(&a);
    open_node(&a, options_for(&a, NULL));
    assert_int_equal(flexkv_namespace_open(a.space, (const char *const[]){ "one" }, 1, &one), 0);
    assert_int_equal(flexkv_namespace_label(one, "lora-1", "salt-1"), 0);
    store_named(&a, 1, 10, 12);
    put_named_in(&a, one, 20, 0, 12);
    wait_written(a.node);
    put_chain(&a, 40, 12);                      /* without names */
    wait_written(a.node);
    close_node(&a);
    for (int round = 0; round < 2; round++) {
        r = (struct router){ 0 };
        open_node(&a, options_for(&a, NULL));
        assert_int_equal(stats_of(a.node).blocks, 144);
        flexkv_events *ev = subscribe(&a);
        assert_int_equal(router_take(&r, ev, 17), 132);
        for (uint32_t c = 1; c <= 10; c++)
            assert_int_equal(router_count(&r, c, FLEXKV_MEDIUM_STORAGE), 12);
        for (uint32_t i = 0; i < 12; i++) {
            int at = router_find(&r, hash_of(20, i), FLEXKV_MEDIUM_STORAGE);
            assert_string_equal(r.block[at].salt, "salt-1");
            assert_string_equal(r.block[at].lora, "lora-1");
        }
        assert_int_equal(get_and_check(&a, 3, 12), 12);
        router_take(&r, ev, 64);
        assert_int_equal(router_count(&r, 3, FLEXKV_MEDIUM_CPU), 12);
        expect_the_truth(&a, &r);
        flexkv_events_close(ev);
        close_node(&a);
    }
    remove_dirs(&a);
}

static void random_traffic_keeps_the_router_right(void **state)
{
    static const char *const policies[] = { "through", "on_reuse", "on_evict" };
    static struct router r;

    for (size_t p = 0; p < fk_array_size(policies); p++) {
        struct api a;
        uint64_t rng = p + 1;
        make_dirs(&a);
        for (int life = 0; life < 3; life++) {
            open_node(&a, options_for(&a, MORE("ssd_write_policy", policies[p], "ssd_cache_blocks", "100",
                                               "kv_events_buffer_mb", "4K")));
            flexkv_events *ev = subscribe(&a);
            r = (struct router){ 0 };
            for (int i = 0; i < 150; i++) {
                uint32_t c = fk_rng_below(&rng, 30);
                if (fk_rng_below(&rng, 2))
                    put_named(&a, c, 1 + fk_rng_below(&rng, 16));
                else
                    get_and_check(&a, c, 16);
                if (fk_rng_below(&rng, 4))
                    router_take(&r, ev, 1 + fk_rng_below(&rng, 20));
                if (i % 50 == 49) {
                    wait_written(a.node);
                    router_take(&r, ev, 64);
                    expect_the_truth(&a, &r);
                }
            }
            print_message("%s: %u stored, %u removed, %llu resyncs\n", policies[p], r.stored, r.removed,
                          (unsigned long long)stats_of(a.node).event_resyncs);
            assert_true(r.removed > 50);
            flexkv_events_close(ev);
            close_node(&a);
        }
        remove_dirs(&a);
    }
}

struct taker {
    flexkv_events *ev;
    struct router r;
    _Atomic bool stop;
    uint32_t portion;
    bool naps;
};

/* Asserts of cmocka belong to the test's own thread: what does not make sense is counted. */
static void *taker_main(void *arg)
{
    struct taker *t = arg;
    flexkv_event e[64];

    while (!t->stop) {
        int n = flexkv_events_take(t->ev, e, t->portion);
        for (int i = 0; i < n; i++) {
            int at = router_find(&t->r, e[i].hash, e[i].medium);
            bool stored = e[i].kind == FLEXKV_EVENT_STORED;
            if (stored != (at < 0) || (stored && e[i].tokens[0] == 0xffffffff))
                abort();
            if (stored) {
                t->r.block[t->r.n].hash = e[i].hash;
                t->r.block[t->r.n++].medium = e[i].medium;
            } else {
                t->r.block[at] = t->r.block[--t->r.n];
            }
        }
        if (!n || t->naps)
            usleep(t->naps ? 3000 : 100);
    }
    return NULL;
}

static void subscribers_of_other_threads(void **state)
{
    static struct taker taker[3];
    pthread_t thread[3];
    uint64_t rng = 77;
    struct api a;

    make_dirs(&a);
    open_node(&a, options_for(&a, MORE("ssd_cache_blocks", "100", "kv_events_buffer_mb", "4K")));
    for (int i = 0; i < 3; i++) {
        taker[i] = (struct taker){ .ev = subscribe(&a), .portion = i == 2 ? 2 : 64, .naps = i == 2 };
        assert_int_equal(pthread_create(&thread[i], NULL, taker_main, &taker[i]), 0);
    }
    for (int i = 0; i < 400; i++) {
        uint32_t c = fk_rng_below(&rng, 30);
        if (fk_rng_below(&rng, 3))
            put_named(&a, c, 1 + fk_rng_below(&rng, 16));
        else
            get_and_check(&a, c, 16);
        if (i == 200)
            assert_int_equal(flexkv_reset(a.node), 0);
    }
    wait_written(a.node);
    for (int i = 0; i < 3; i++) {
        taker[i].stop = true;
        pthread_join(thread[i], NULL);
        router_take(&taker[i].r, taker[i].ev, 64);
        expect_the_truth(&a, &taker[i].r);
        flexkv_events_close(taker[i].ev);
    }
    print_message("%llu resyncs\n", (unsigned long long)stats_of(a.node).event_resyncs);
    close_node(&a);
    remove_dirs(&a);
}

/* ---- damage ---- */

static void damage_file(const char *dir, const char *ending, uint64_t *rng, uint32_t flips)
{
    char path[200];
    struct stat st;

    snprintf(path, sizeof(path), "%s/default.%s", dir, ending);
    int fd = open(path, O_RDWR);
    assert_true(fd >= 0);
    assert_int_equal(fstat(fd, &st), 0);
    for (uint32_t i = 0; i < flips; i++) {
        off_t at = (off_t)(fk_rng_next(rng) % (uint64_t)st.st_size);
        uint8_t byte;
        if (st.st_size >= 8192 && fk_rng_below(rng, 2))     /* where something stands */
            at = (off_t)(4096 + fk_rng_next(rng) % (uint64_t)(st.st_size - 4096) / 8);
        assert_int_equal(pread(fd, &byte, 1, at), 1);
        byte ^= (uint8_t)(1u << fk_rng_below(rng, 8));
        assert_int_equal(pwrite(fd, &byte, 1, at), 1);
    }
    close(fd);
}

static void damaged_names_make_no_wrong_events(void **state)
{
    static struct router r;
    uint32_t least = UINT32_MAX, most = 0;
    uint64_t rng = 99;
    struct api a;
    flexkv_namespace *one;

    make_dirs(&a);
    for (int round = 0; round < 40; round++) {
        open_node(&a, options_for(&a, NULL));
        flexkv_events *ev = subscribe(&a);
        r = (struct router){ 0 };
        router_take(&r, ev, 64);                /* checks tokens and parents */
        for (uint32_t i = 0; i < r.n; i++) {
            bool labelled = false;
            for (uint32_t k = 0; k < 12; k++)
                labelled |= r.block[i].hash == hash_of(20, k);
            assert_string_equal(r.block[i].salt, labelled ? "salt-1" : "-");
        }
        if (round) {
            least = fk_min(least, r.n);
            most = fk_max(most, r.n);
        }
        expect_the_truth(&a, &r);
        for (uint32_t c = 1; c <= 10 && round; c++)
            assert_int_equal(get_and_check(&a, c, 12), 12);     /* the blocks themselves are sound */
        assert_int_equal(flexkv_reset(a.node), 0);
        assert_int_equal(flexkv_namespace_open(a.space, (const char *const[]){ "one" }, 1, &one), 0);
        assert_int_equal(flexkv_namespace_label(one, NULL, "salt-1"), 0);
        store_named(&a, 1, 10, 12);
        put_named_in(&a, one, 20, 0, 12);
        wait_written(a.node);
        flexkv_events_close(ev);
        close_node(&a);
        for (int d = 0; d < 2; d++) {
            damage_file(a.dir[d], "names", &rng, 1 + fk_rng_below(&rng, 60));
            damage_file(a.dir[d], "labels", &rng, fk_rng_below(&rng, 2));
        }
    }
    print_message("%u to %u of 132 names\n", least, most);
    assert_true(least < 132 && most > 60);
    remove_dirs(&a);
}

static void names_that_cannot_be_written_harm_no_block(void **state)
{
    static struct router r;
    struct api a;
    char path[200];

    r = (struct router){ 0 };
    make_dirs(&a);
    for (int d = 0; d < 2; d++) {
        snprintf(path, sizeof(path), "%s/default.names", a.dir[d]);
        assert_int_equal(mkdir(path, 0700), 0);
    }
    open_node(&a, options_for(&a, NULL));
    flexkv_events *ev = subscribe(&a);
    router_take(&r, ev, 64);
    store_named(&a, 1, 4, 12);
    router_take(&r, ev, 64);
    assert_int_equal(router_count(&r, 1, FLEXKV_MEDIUM_STORAGE), 12);
    for (uint32_t c = 1; c <= 4; c++)
        assert_int_equal(get_and_check(&a, c, 12), 12);
    flexkv_events_close(ev);
    close_node(&a);
    open_node(&a, options_for(&a, NULL));
    ev = subscribe(&a);
    r = (struct router){ 0 };
    router_take(&r, ev, 64);
    assert_int_equal(r.n, 0);
    for (uint32_t c = 1; c <= 4; c++)
        assert_int_equal(get_and_check(&a, c, 12), 12);
    flexkv_events_close(ev);
    close_node(&a);
    for (int d = 0; d < 2; d++) {
        snprintf(path, sizeof(path), "%s/default.names", a.dir[d]);
        assert_int_equal(rmdir(path), 0);
    }
    remove_dirs(&a);
}

/* Names of a store that was replaced, of another version, or of the wrong length. */
static void foreign_names_are_made_anew(void **state)
{
    static struct router r;
    struct api a;
    char path[200];

    make_dirs(&a);
    open_node(&a, options_for(&a, NULL));
    store_named(&a, 1, 4, 12);
    close_node(&a);
    snprintf(path, sizeof(path), "%s/default.names", a.dir[0]);
    assert_int_equal(truncate(path, 5000), 0);
    open_node(&a, options_for(&a, NULL));
    flexkv_events *ev = subscribe(&a);
    r = (struct router){ 0 };
    router_take(&r, ev, 64);                    /* the other directory's are there; all are right */
    flexkv_events_close(ev);
    close_node(&a);
    open_node(&a, options_for(&a, MORE("ssd_cache_blocks", "500", "ssd_recreate", "1")));
    ev = subscribe(&a);
    r = (struct router){ 0 };
    assert_int_equal(router_take(&r, ev, 64), 0);
    store_named(&a, 1, 4, 12);
    router_take(&r, ev, 64);
    assert_int_equal(router_count(&r, 4, FLEXKV_MEDIUM_STORAGE), 12);
    flexkv_events_close(ev);
    close_node(&a);
    remove_dirs(&a);
}

/* On for a while, off for a while: names of then must not be taken for those of now. */
static void a_life_without_events_in_between(void **state)
{
    static struct router r;
    struct api a;

    make_dirs(&a);
    open_node(&a, options_for(&a, MORE("ssd_cache_blocks", "60")));
    store_named(&a, 1, 5, 12);
    close_node(&a);
    open_node(&a, options_for(&a, MORE("ssd_cache_blocks", "60", "enable_kv_events", "0")));
    for (uint32_t c = 11; c <= 13; c++) {
        put_chain(&a, c, 12);
        wait_written(a.node);
    }
    close_node(&a);
    open_node(&a, options_for(&a, MORE("ssd_cache_blocks", "60")));
    flexkv_events *ev = subscribe(&a);
    r = (struct router){ 0 };
    router_take(&r, ev, 64);
    assert_int_equal(r.n, stats_of(a.node).blocks - 36);
    flexkv_events_close(ev);
    close_node(&a);
    remove_dirs(&a);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(both_tiers_are_told),
        cmocka_unit_test(a_restart_announces_what_is_left),
        cmocka_unit_test(random_traffic_keeps_the_router_right),
        cmocka_unit_test(subscribers_of_other_threads),
        cmocka_unit_test(damaged_names_make_no_wrong_events),
        cmocka_unit_test(names_that_cannot_be_written_harm_no_block),
        cmocka_unit_test(foreign_names_are_made_anew),
        cmocka_unit_test(a_life_without_events_in_between),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
