/*
 * test_transport_later.c - src/transport/grant.c: grants that come later, with every transport: in any order and from
 * any thread, refused, too late, for readers that have gone, while the transport is being closed.
 */
#include "transport_rig.h"

#include "transport/loopback.h"

static const char *kind;
static const struct fk_window window = { .space = SPACE, .ns = NS, .slot_bytes = SLOT_BYTES, .slots = SLOTS };

static bool usable(void)
{
    struct fk_transport_params p = rig_params(kind, NULL, NULL);
    struct fk_transport *t;
    char error[256] = "";
    int rc = fk_transport_open(&p, &t, error, sizeof(error));

    if (rc)
        fprintf(stderr, "skipped: %s\n", error);
    else
        fk_transport_close(t);
    return rc == 0;
}

static struct fk_transport *open_owner(struct owner *o, uint32_t timeout_ms)
{
    struct fk_transport_params p = rig_params(kind, o, "127.0.0.1:0");

    p.timeout_ms = timeout_ms;
    owner_fill(o, NULL);
    o->defer = true;
    struct fk_transport *t = rig_open(&p);
    assert_int_equal(fk_transport_share(t, &window), 0);
    return t;
}

static struct fk_transport *open_reader(struct fk_transport *owner, uint32_t *peer)
{
    struct fk_transport_params q = rig_params(kind, NULL, NULL);
    struct fk_transport *t = rig_open(&q);

    assert_int_equal(fk_transport_peer(t, fk_transport_address(owner), peer), 0);
    return t;
}

/* Until so many were put aside, or given back. */
static void wait_until(struct owner *o, const uint32_t *what, uint32_t n)
{
    uint64_t end = fk_clock_us() + 10000000;

    for (;;) {
        pthread_mutex_lock(&o->lock);
        uint32_t now = *what;
        pthread_mutex_unlock(&o->lock);
        if (now >= n)
            return;
        if (fk_clock_us() > end)
            fail_msg("%u of %u within 10 s", now, n);
        usleep(1000);
    }
}

static void grant_at_once(struct owner *o)
{
    pthread_mutex_lock(&o->lock);
    o->defer = false;
    pthread_mutex_unlock(&o->lock);
}

static uint32_t releases(struct owner *o)
{
    pthread_mutex_lock(&o->lock);
    uint32_t n = o->releases;
    pthread_mutex_unlock(&o->lock);
    return n;
}

static uint32_t pinned(struct owner *o)
{
    uint32_t n = 0;

    for (uint32_t s = 0; s < SLOTS; s++)
        n += o->pins[s];
    return n;
}

/* ---- in any order, from another thread ---- */

struct giver { struct owner *o; struct fk_transport *t; bool stop; };

static void *give_at_random(void *arg)
{
    struct giver *g = arg;
    uint32_t todo[4 * SLOTS], n_todo = 0, seen = 0;
    uint64_t rng = 3;

    while (!__atomic_load_n(&g->stop, __ATOMIC_ACQUIRE) || n_todo) {
        while (seen < owner_put_aside(g->o))
            todo[n_todo++] = seen++;
        if (!n_todo || fk_rng_below(&rng, 4) == 0) {
            usleep(200);
            continue;
        }
        uint32_t at = fk_rng_below(&rng, n_todo);
        assert_int_equal(owner_give(g->o, g->t, todo[at]), 0);
        todo[at] = todo[--n_todo];
    }
    return NULL;
}

static void test_any_order(void **state)
{
    struct owner o = { 0 };
    struct fk_transport *owner = open_owner(&o, 0);
    struct fk_transport_params q = rig_params(kind, NULL, NULL);
    struct flow f = { .t = rig_open(&q), .buffers = rig_alloc((size_t)SLOTS * SLOT_BYTES) };
    struct giver g = { .o = &o, .t = owner };
    struct fk_transport_stats s;
    pthread_t thread;

    assert_int_equal(pthread_create(&thread, NULL, give_at_random, &g), 0);
    read_all(&f, fk_transport_address(owner));
    __atomic_store_n(&g.stop, true, __ATOMIC_RELEASE);
    pthread_join(thread, NULL);
    grant_at_once(&o);                  /* and one: the same connection */
    assert_int_equal(read_one(f.t, f.peer, rig_read(5, SLOT_BYTES, f.buffers, 5), NULL), 0);
    assert_true(rig_bytes_right(f.buffers, 5, SLOT_BYTES));
    fk_transport_close(f.t);
    fk_transport_get_stats(owner, &s);
    fk_transport_close(owner);
    assert_true(o.n_put_aside >= SLOTS);
    assert_int_equal(o.grants, o.releases);
    /* Mooncake's wire asks for a block's header as well. */
    assert_int_equal(s.served_blocks * (strcmp(kind, "mooncake") ? 1 : 2), o.grants);
    rig_free(f.buffers);
    owner_free(&o);
}

/* ---- not granted, after all ---- */

static int read_and_say(struct owner *o, struct fk_transport *owner, struct fk_transport *reader, uint32_t peer, void *b,
                        int rc, uint32_t bytes)
{
    struct fk_read r = rig_read(7, SLOT_BYTES, b, 7);
    struct fk_grant g = { .data = o->pool, .bytes = bytes };
    struct fk_read_done d;
    uint32_t n = owner_put_aside(o);

    if (rc == 0) {
        pthread_mutex_lock(&o->lock);
        o->pins[7]++;
        pthread_mutex_unlock(&o->lock);
    }
    assert_int_equal(fk_transport_read(reader, peer, &r, 1, fk_clock_us() + 10000000), 0);
    wait_until(o, &o->n_put_aside, n + 1);
    assert_int_equal(fk_transport_granted(owner, 1000 + n, rc, &g), 0);
    if (strcmp(kind, "mooncake") == 0) {        /* the header is asked for all the same */
        wait_until(o, &o->n_put_aside, n + 2);
        assert_int_equal(fk_transport_granted(owner, 1000 + n + 1, -ENOENT, NULL), 0);
    }
    rig_take(reader, &d, 1, 10000);
    return d.rc;
}

static void test_refused(void **state)
{
    bool moon = strcmp(kind, "mooncake") == 0;
    struct owner o = { 0 };
    struct fk_transport *owner = open_owner(&o, 0);
    unsigned char *b = rig_alloc(SLOT_BYTES);
    uint32_t peer;
    struct fk_transport *reader = open_reader(owner, &peer);

    assert_int_equal(read_and_say(&o, owner, reader, peer, b, -ENOENT, 0), -ENOENT);
    assert_int_equal(read_and_say(&o, owner, reader, peer, b, -EACCES, 0), moon ? -ENOENT : -EACCES);
    assert_int_equal(read_and_say(&o, owner, reader, peer, b, -EAGAIN, 0), moon ? -ENOENT : -EAGAIN);
    assert_int_equal(read_and_say(&o, owner, reader, peer, b, -EINPROGRESS, 0), moon ? -ENOENT : -EIO);
    assert_int_equal(releases(&o), 0);
    assert_int_equal(read_and_say(&o, owner, reader, peer, b, 0, SLOT_BYTES - 1), -ENOENT);    /* not what was asked for */
    assert_int_equal(releases(&o), 1);
    for (uint32_t i = 0; i < SLOT_BYTES; i++)
        assert_int_equal(b[i], 0);
    struct fk_grant g = { .data = o.pool, .bytes = SLOT_BYTES };
    assert_int_equal(fk_transport_granted(owner, 1, 5, &g), -EINVAL);
    assert_int_equal(fk_transport_granted(owner, 1, 0, NULL), -EINVAL);
    assert_int_equal(fk_transport_granted(owner, 4711, 0, &g), 0);      /* nobody waits for it: said in the log */
    grant_at_once(&o);
    assert_int_equal(read_one(reader, peer, rig_read(9, SLOT_BYTES, b, 1), NULL), 0);
    fk_transport_close(reader);
    fk_transport_close(owner);
    rig_free(b);
    owner_free(&o);
}

/* ---- too late ---- */

static void test_reader_gone(void **state)
{
    struct owner o = { 0 };
    struct fk_transport *owner = open_owner(&o, 0);
    struct fk_transport_stats s;
    unsigned char *b = rig_alloc((size_t)4 * SLOT_BYTES);
    uint32_t peer;

    for (uint32_t i = 0; i < 4; i++) {
        struct fk_transport *reader = open_reader(owner, &peer);
        struct fk_read r = rig_read(i, SLOT_BYTES, b + (size_t)i * SLOT_BYTES, i);
        assert_int_equal(fk_transport_read(reader, peer, &r, 1, fk_clock_us() + 10000000), 0);
        wait_until(&o, &o.n_put_aside, i + 1);
        if (i % 2)
            fk_transport_peer_drop(reader, peer);
        fk_transport_close(reader);
    }
    uint64_t end = fk_clock_us() + 10000000;
    do {
        assert_true(fk_clock_us() < end);
        usleep(1000);
        fk_transport_get_stats(owner, &s);
    } while (s.connections);
    assert_int_equal(releases(&o), 0);
    for (uint32_t i = 0; i < 4; i++)
        assert_int_equal(owner_give(&o, owner, 3 - i), 0);
    wait_until(&o, &o.releases, 4);
    fk_transport_get_stats(owner, &s);
    fk_transport_close(owner);
    assert_int_equal(s.served_blocks, 0);
    assert_int_equal(o.releases, 4);
    assert_int_equal(pinned(&o), 0);
    for (uint32_t i = 0; i < 4 * SLOT_BYTES; i++)
        assert_int_equal(b[i], 0);
    rig_free(b);
    owner_free(&o);
}

static void test_read_is_late(void **state)
{
    struct owner o = { 0 };
    struct fk_transport *owner = open_owner(&o, 0);
    unsigned char *b = rig_alloc(SLOT_BYTES);
    struct fk_read_done d[2];
    uint32_t peer;
    struct fk_transport *reader = open_reader(owner, &peer);
    struct fk_read r = rig_read(3, SLOT_BYTES, b, 3);

    assert_int_equal(fk_transport_read(reader, peer, &r, 1, fk_clock_us() + 300000), 0);
    wait_until(&o, &o.n_put_aside, 1);
    rig_take(reader, d, 1, 10000);
    assert_int_equal(d[0].rc, -ETIMEDOUT);
    if (d[0].flags & FK_READ_QUARANTINED) {
        rig_take(reader, d, 1, 10000);
        assert_int_equal(d[0].flags, FK_READ_RELEASED);
    }
    memset(b, 0xaa, SLOT_BYTES);        /* ours again */
    assert_int_equal(owner_give(&o, owner, 0), 0);
    wait_until(&o, &o.releases, 1);
    grant_at_once(&o);
    unsigned char *other = rig_alloc(SLOT_BYTES);
    assert_int_equal(read_one(reader, peer, rig_read(9, SLOT_BYTES, other, 1), NULL), 0);
    for (uint32_t i = 0; i < SLOT_BYTES; i++)
        assert_int_equal(b[i], 0xaa);
    fk_transport_close(reader);
    fk_transport_close(owner);
    assert_int_equal(o.grants, o.releases);
    rig_free(other);
    rig_free(b);
    owner_free(&o);
}

/* The provider takes too long: readers are told, and are served again. What comes then is given back. */
static void test_patience(void **state)
{
    struct owner o = { 0 };
    struct fk_transport *owner = open_owner(&o, 200);
    unsigned char *b = rig_alloc(SLOT_BYTES);
    uint32_t peer, n;
    struct fk_transport *reader = open_reader(owner, &peer);

    assert_int_equal(read_one(reader, peer, rig_read(3, SLOT_BYTES, b, 3), NULL),
                     strcmp(kind, "mooncake") ? -EAGAIN : -ENOENT);
    grant_at_once(&o);
    assert_int_equal(read_one(reader, peer, rig_read(4, SLOT_BYTES, b, 3), NULL), 0);
    assert_true(rig_bytes_right(b, 4, SLOT_BYTES));
    uint32_t before = releases(&o);
    n = owner_put_aside(&o);
    for (uint32_t i = 0; i < n; i++)
        assert_int_equal(owner_give(&o, owner, i), 0);
    wait_until(&o, &o.releases, before + n);
    assert_true(rig_bytes_right(b, 4, SLOT_BYTES));
    fk_transport_close(reader);
    fk_transport_close(owner);
    assert_int_equal(o.grants, o.releases);
    rig_free(b);
    owner_free(&o);
}

/* ---- the owner closes ---- */

static void test_close(void **state)
{
    unsigned char *b = rig_alloc((size_t)8 * SLOT_BYTES);

    for (int round = 0; round < 10; round++) {
        struct owner o = { 0 };
        struct fk_transport *owner = open_owner(&o, 0);
        struct fk_read r[8];
        struct fk_read_done d[8];
        uint32_t peer;
        struct fk_transport *reader = open_reader(owner, &peer);

        for (uint32_t i = 0; i < 8; i++)
            r[i] = rig_read(i, SLOT_BYTES, b + (size_t)i * SLOT_BYTES, i);
        assert_int_equal(fk_transport_read(reader, peer, r, 8, fk_clock_us() + 10000000), 0);
        wait_until(&o, &o.n_put_aside, strcmp(kind, "mooncake") ? 8 : 1);      /* one after the other there */
        if (round % 2)
            assert_int_equal(owner_give(&o, owner, 0), 0);
        fk_transport_close(owner);
        assert_int_equal(o.grants, o.releases);         /* what was taken was given back */
        assert_int_equal(pinned(&o), 0);
        rig_take(reader, d, 8, 12000);
        for (uint32_t i = 0; i < 8; i++)
            if (d[i].rc == 0)
                assert_true(rig_bytes_right(b + d[i].user * SLOT_BYTES, (uint32_t)d[i].user, SLOT_BYTES));
        fk_transport_close(reader);
        owner_free(&o);
    }
    rig_free(b);
}

/* ---- simulated: step by step ---- */

struct closing { struct owner o; struct fk_transport *t; int refused; };

static int grant_of_closing(void *ctx, const struct fk_block_ref *r, struct fk_grant *g)
{
    return owner_grant(&((struct closing *)ctx)->o, r, g);
}

static int release_of_closing(void *ctx, const struct fk_block_ref *r, struct fk_grant *g)
{
    struct closing *c = ctx;
    struct fk_grant none = { 0 };

    if (c->refused == 1)
        c->refused = fk_transport_granted(c->t, 1001, 0, &none);
    return owner_release(&c->o, r, g);
}

static void test_loopback(void **state)
{
    struct closing c = { .refused = 0 };
    uint32_t sizes[SLOTS], peer;
    for (uint32_t i = 0; i < SLOTS; i++)
        sizes[i] = 4096;
    owner_fill(&c.o, sizes);
    c.o.defer = true;
    struct fk_loopback_hub *hub = fk_loopback_hub_create(100, NULL, NULL);
    struct fk_transport_params p = rig_params("loopback", &c.o, "a"), q = rig_params("loopback", NULL, NULL);
    p.provider = (struct fk_provider){ grant_of_closing, release_of_closing, &c };
    p.hub = q.hub = hub;
    struct fk_transport *reader = rig_open(&q);
    c.t = rig_open(&p);
    unsigned char b[6][4096] = { 0 };
    struct fk_read_done d[6];
    assert_int_equal(fk_transport_peer(reader, "a", &peer), 0);
    for (uint32_t i = 0; i < 5; i++) {
        struct fk_read r = rig_read(i, 4096, b[i], i);
        assert_int_equal(fk_transport_read(reader, peer, &r, 1, i == 2 ? 1000 : 10000000), 0);
    }
    fk_transport_step(reader, 0);
    fk_transport_step(reader, 100);
    assert_int_equal(c.o.n_put_aside, 5);
    assert_int_equal(fk_transport_take(reader, d, 6), 0);
    assert_int_equal(fk_transport_step(c.t, 200), 2000100);     /* its patience */
    /* the fourth, then the first: before they are stepped nothing happens */
    assert_int_equal(owner_give(&c.o, c.t, 3), 0);
    assert_int_equal(owner_give(&c.o, c.t, 0), 0);
    fk_transport_step(reader, 300);
    assert_int_equal(fk_transport_take(reader, d, 6), 0);
    fk_transport_step(c.t, 300);
    assert_int_equal(fk_transport_take(reader, d, 6), 2);
    assert_int_equal(d[0].user, 3);
    assert_int_equal(d[1].user, 0);
    assert_true(d[0].rc == 0 && d[1].rc == 0);
    assert_true(rig_bytes_right(b[3], 3, 4096) && rig_bytes_right(b[0], 0, 4096));
    /* late: free at once, and what comes for it is given back */
    fk_transport_step(reader, 1000);
    assert_int_equal(fk_transport_take(reader, d, 6), 1);
    assert_true(d[0].user == 2 && d[0].rc == -ETIMEDOUT && d[0].flags == 0);
    assert_int_equal(owner_give(&c.o, c.t, 2), 0);
    fk_transport_step(c.t, 1100);
    assert_int_equal(c.o.releases, 3);
    assert_int_equal(b[2][7], 0);
    /* closing: one was given and is taken back, while that happens another is refused, and nobody waits for ever */
    assert_int_equal(owner_give(&c.o, c.t, 4), 0);
    c.refused = 1;
    fk_transport_close(c.t);
    assert_int_equal(c.refused, -ESHUTDOWN);
    assert_int_equal(c.o.grants, c.o.releases);
    fk_transport_step(reader, 1200);
    assert_int_equal(fk_transport_take(reader, d, 6), 2);
    assert_true(d[0].rc == -ECONNRESET && d[1].rc == -ECONNRESET);
    /* a reader that goes, and one at the same place in memory perhaps */
    c.t = rig_open(&p);
    struct fk_read r = rig_read(5, 4096, b[5], 5);
    assert_int_equal(fk_transport_read(reader, peer, &r, 1, 10000000), 0);
    fk_transport_step(reader, 2000);
    fk_transport_step(reader, 2100);
    fk_transport_close(reader);
    reader = rig_open(&q);
    assert_int_equal(fk_transport_peer(reader, "a", &peer), 0);
    memset(b, 0, sizeof(b));
    assert_int_equal(fk_transport_read(reader, peer, &r, 1, 10000000), 0);
    assert_int_equal(owner_give(&c.o, c.t, 5), 0);
    fk_transport_step(c.t, 2200);
    assert_int_equal(b[5][7], 0);
    assert_int_equal(c.o.grants, c.o.releases);
    fk_transport_close(reader);
    fk_transport_close(c.t);
    fk_loopback_hub_destroy(hub);
    owner_free(&c.o);
}

#define NEEDS(name) do { kind = name; if (!usable()) skip(); } while (0)
#define WITH(test) \
    static void test##_members(void **state) { NEEDS(rig_kind()); test(state); } \
    static void test##_mooncake(void **state) { NEEDS("mooncake"); test(state); }
WITH(test_any_order)
WITH(test_refused)
WITH(test_reader_gone)
WITH(test_read_is_late)
WITH(test_patience)
WITH(test_close)

/* libfabric's own: see test_transport.c */
const char *__lsan_default_suppressions(void);
__attribute__((visibility("default"))) const char *__lsan_default_suppressions(void)
{
    return "leak:libfabric.so\n";
}

int main(int argc, char **argv)
{
    if (argc == 2)
        cmocka_set_test_filter(argv[1]);
    fk_log_set_level(FK_LOG_CRITICAL);
#define BOTH(test) cmocka_unit_test(test##_members), cmocka_unit_test(test##_mooncake)
    const struct CMUnitTest tests[] = {
        BOTH(test_any_order),
        BOTH(test_refused),
        BOTH(test_reader_gone),
        BOTH(test_read_is_late),
        BOTH(test_patience),
        BOTH(test_close),
        cmocka_unit_test(test_loopback),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
