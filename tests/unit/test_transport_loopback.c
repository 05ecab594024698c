/*
 * test_transport_loopback.c - src/transport/: the loopback's simulated time and faults; what all transports share:
 * deadlines, quarantine, bounds; the hello and the frames byte by byte.
 */
#include "transport_rig.h"

#include "transport/loopback.h"
#include "transport/wire.h"

#define BYTES 4096u

struct world {
    struct fk_loopback_hub *hub;
    struct owner owner;
    struct fk_transport *from, *to;
    uint32_t peer;
    unsigned char *b;
    struct fk_loopback_fault fault[SLOTS];
    uint64_t now;
};

static void fault_of(void *ctx, const char *to, const struct fk_read *r, struct fk_loopback_fault *out)
{
    struct world *w = ctx;

    *out = w->fault[r->user];
}

static struct world *world_new(void)
{
    struct world *w = calloc(1, sizeof(*w));
    uint32_t sizes[SLOTS];

    for (uint32_t i = 0; i < SLOTS; i++)
        sizes[i] = BYTES;
    owner_fill(&w->owner, sizes);
    w->hub = fk_loopback_hub_create(100, fault_of, w);
    struct fk_transport_params p = rig_params("loopback", &w->owner, "a"), q = rig_params("loopback", NULL, NULL);
    p.hub = q.hub = w->hub;
    w->from = rig_open(&p);
    w->to = rig_open(&q);
    w->b = calloc(SLOTS, BYTES);
    w->now = 1000000;
    fk_transport_step(w->to, w->now);
    assert_int_equal(fk_transport_peer(w->to, "a", &w->peer), 0);
    return w;
}

static void world_free(struct world *w)
{
    fk_transport_close(w->to);
    fk_transport_close(w->from);
    fk_loopback_hub_destroy(w->hub);
    owner_free(&w->owner);
    free(w->b);
    free(w);
}

static void ask(struct world *w, uint32_t slot, uint64_t timeout_us)
{
    struct fk_read r = rig_read(slot, BYTES, w->b + (size_t)slot * BYTES, slot);

    assert_int_equal(fk_transport_read(w->to, w->peer, &r, 1, w->now + timeout_us), 0);
}

/* Goes on to the next moment at which something happens. */
static bool step(struct world *w)
{
    uint64_t next = fk_transport_step(w->to, w->now);

    if (next == UINT64_MAX)
        return false;
    assert_true(next >= w->now);
    w->now = fk_max(next, w->now + 1);
    fk_transport_step(w->to, w->now);
    return true;
}

static struct fk_read_done next_done(struct world *w)
{
    struct fk_read_done d;

    while (fk_transport_take(w->to, &d, 1) == 0)
        assert_true(step(w));
    return d;
}

static void test_order_and_faults(void **state)
{
    struct world *w = world_new();

    w->fault[1].delay_us = 500;
    w->fault[2].corrupt = true;
    w->fault[3].refuse = true;
    for (uint32_t i = 0; i < 5; i++)
        ask(w, i, 1000000);
    static const struct { uint64_t user; int rc; } expect[] = { { 0, 0 }, { 2, -EBADMSG }, { 3, -ECONNRESET },
                                                                { 4, 0 }, { 1, 0 } };
    struct fk_read_done d;
    for (uint32_t i = 0; i < 5; i++) {
        d = next_done(w);
        assert_int_equal(d.user, expect[i].user);
        assert_int_equal(d.rc, expect[i].rc);
        if (!d.rc)
            assert_true(rig_bytes_right(w->b + d.user * BYTES, (uint32_t)d.user, BYTES));
    }
    while (step(w))
        ;
    assert_int_equal(fk_transport_take(w->to, &d, 1), 0);
    world_free(w);
}

static void test_quarantine(void **state)
{
    struct world *w = world_new();

    w->fault[0].drop = true;
    w->fault[0].delay_us = 7000;
    w->fault[1].delay_us = 20000;
    ask(w, 0, 10000);
    ask(w, 1, 10000);
    uint64_t asked = w->now;
    struct fk_read_done d = next_done(w);
    assert_true(w->now <= asked + 10000);           /* never after the deadline */
    assert_int_equal(d.rc, -ETIMEDOUT);
    assert_int_equal(d.flags, FK_READ_QUARANTINED);
    d = next_done(w);
    assert_int_equal(d.user, 1);
    assert_int_equal(d.rc, -ETIMEDOUT);
    assert_int_equal(d.flags, FK_READ_QUARANTINED);
    assert_int_equal(w->b[BYTES], 0);
    d = next_done(w);
    assert_int_equal(d.user, 0);
    assert_int_equal(d.flags, FK_READ_RELEASED);
    d = next_done(w);
    assert_int_equal(d.user, 1);
    assert_int_equal(d.flags, FK_READ_RELEASED);
    assert_true(rig_bytes_right(w->b + BYTES, 1, BYTES));       /* so it was written to, late */
    while (step(w))
        ;
    assert_int_equal(fk_transport_take(w->to, &d, 1), 0);
    assert_int_equal(w->owner.grants, w->owner.releases);
    world_free(w);
}

/* An owner who takes his time holds the block meanwhile; one who hangs answers when he is back. */
static void test_slow_owner(void **state)
{
    struct world *w = world_new();
    struct fk_read_done d;

    w->fault[0].serve_us = w->fault[2].serve_us = w->fault[3].serve_us = 5000;
    ask(w, 0, 100000);
    while (!w->owner.grants)
        assert_true(step(w));
    assert_int_equal(w->owner.releases, 0);
    assert_int_equal(next_done(w).rc, 0);
    assert_int_equal(w->owner.releases, 1);
    fk_loopback_away(w->from, true);
    ask(w, 1, 10000);
    assert_int_equal(next_done(w).flags, FK_READ_QUARANTINED);
    fk_loopback_away(w->from, false);
    assert_int_equal(next_done(w).flags, FK_READ_RELEASED);
    ask(w, 2, 100000);
    while (w->owner.grants < 3)
        assert_true(step(w));
    fk_transport_peer_drop(w->to, w->peer);             /* the reader gives up what he asked for */
    assert_int_equal(next_done(w).rc, -ECANCELED);
    assert_int_equal(w->owner.releases, 3);
    assert_int_equal(fk_transport_peer(w->to, "a", &w->peer), 0);
    ask(w, 3, 100000);
    while (w->owner.grants < 4)
        assert_true(step(w));
    fk_transport_close(w->from);                        /* the owner goes */
    w->from = NULL;
    assert_int_equal(fk_transport_take(w->to, &d, 1), 1);
    assert_int_equal(d.rc, -ECONNRESET);
    assert_int_equal(w->owner.releases, 4);
    world_free(w);
}

static void test_bounds(void **state)
{
    struct world *w = world_new();
    struct fk_read_done d;

    for (uint32_t i = 0; i < SLOTS; i++)
        ask(w, i, 10000);               /* 16 at a time, 100 us each: all in time */
    for (uint32_t i = 0; i < SLOTS; i++)
        assert_int_equal(next_done(w).rc, 0);
    assert_true(w->now >= 1000000 + 400);
    ask(w, 0, 10000);
    fk_transport_peer_drop(w->to, w->peer);
    d = next_done(w);
    assert_int_equal(d.rc, -ECANCELED);
    struct fk_read r = rig_read(0, BYTES, w->b, 0);
    assert_int_equal(fk_transport_read(w->to, w->peer, &r, 1, w->now + 1000), -EINVAL);
    assert_int_equal(fk_transport_peer(w->to, "nobody", &w->peer), 0);
    ask(w, 0, 10000);
    assert_int_equal(next_done(w).rc, -ECONNREFUSED);
    world_free(w);
}

static void test_too_many(void **state)
{
    struct world *w = world_new();
    struct fk_transport_params q = rig_params("loopback", NULL, NULL);
    struct fk_read r[3];
    struct fk_read_done d;
    uint32_t peer;

    q.hub = w->hub;
    q.max_queued = 4;
    struct fk_transport *t = rig_open(&q);
    assert_int_equal(fk_transport_peer(t, "a", &peer), 0);
    for (uint32_t i = 0; i < 3; i++)
        r[i] = rig_read(i, BYTES, w->b + (size_t)i * BYTES, i);
    assert_int_equal(fk_transport_read(t, peer, r, 3, 1000000), 0);
    assert_int_equal(fk_transport_read(t, peer, r, 2, 1000000), -EAGAIN);
    fk_transport_step(t, 1);
    fk_transport_step(t, 1000);
    assert_int_equal(fk_transport_take(t, &d, 1), 1);
    assert_int_equal(fk_transport_read(t, peer, r, 2, 1000000), 0);
    fk_transport_close(t);
    world_free(w);
}

/* ---- hello and frames ---- */

struct pair {
    struct fk_hello_params p[2];
    struct fk_session s[2];             /* reader, owner */
    struct fk_stream out[2];
};

static void pair_init(struct pair *x, const char *secret)
{
    memset(x, 0, sizeof(*x));
    for (int i = 0; i < 2; i++) {
        x->p[i] = (struct fk_hello_params){ i ? SECRET : secret, "c", "fabric", (uint64_t)i + 8, 99, 32 };
        fk_stream_init(&x->out[i], -1);
    }
    memcpy(x->s[0].endpoint, "endpoint", 8);
    x->s[0].endpoint_len = 8;
    assert_int_equal(fk_session_start(&x->s[0], &x->p[0], true, &x->out[0]), 0);
    assert_int_equal(fk_session_start(&x->s[1], &x->p[1], false, &x->out[1]), 0);
}

static void pair_free(struct pair *x)
{
    for (int i = 0; i < 2; i++) {
        fk_stream_close(&x->out[i]);
    }
}

/* What one has queued becomes the other's input. */
static void cross(struct pair *x, int from, struct fk_stream *in)
{
    *in = (struct fk_stream){ .fd = -1, .in = malloc(4096) };
    in->in_len = x->out[from].out_len - x->out[from].out_at;
    memcpy(in->in, x->out[from].out + x->out[from].out_at, in->in_len);
    x->out[from].out_at = x->out[from].out_len;
}

/* One turn of the hello, with a bit turned over (or -1). */
static int turn(struct pair *x, int from, int bit)
{
    struct fk_stream in;
    const uint8_t *payload;
    uint32_t bytes;
    unsigned type;

    cross(x, from, &in);
    if (bit >= 0)
        in.in[(size_t)bit / 8 % in.in_len] ^= (uint8_t)(1 << bit % 8);
    int rc = fk_frame_next(&x->s[!from], &in, &type, &payload, &bytes);
    if (rc == 1)
        rc = fk_session_hello(&x->s[!from], type, payload, bytes, &x->out[!from]);
    fk_stream_close(&in);
    return rc;
}

static void test_hello(void **state)
{
    struct pair x;

    pair_init(&x, SECRET);
    assert_int_equal(turn(&x, 0, -1), 0);
    assert_int_equal(turn(&x, 1, -1), 0);
    assert_int_equal(turn(&x, 0, -1), 1);
    assert_int_equal(turn(&x, 1, -1), 1);
    assert_true(x.s[0].done && x.s[1].done);
    assert_int_equal(x.s[0].peer_epoch, 99);
    assert_int_equal(x.s[1].peer_node, 8);
    assert_memory_equal(x.s[1].endpoint, "endpoint", 8);
    pair_free(&x);
    pair_init(&x, "another secret");
    assert_int_equal(turn(&x, 0, -1), 0);
    assert_int_equal(turn(&x, 1, -1), 0);
    assert_int_equal(turn(&x, 0, -1), -EACCES);
    assert_int_equal(x.s[1].refusal, FK_REFUSED_SECRET);
    assert_int_equal(turn(&x, 1, -1), -EACCES);
    assert_int_equal(x.s[0].refusal, FK_REFUSED_SECRET);
    pair_free(&x);
}

/* Whatever bit of the hello is turned over, the two do not come together. */
static void test_hello_bits(void **state)
{
    for (int step = 0; step < 4; step++) {
        for (int bit = 0; bit < 200 * 8; bit += 5) {
            struct pair x;
            int ends = 0;
            pair_init(&x, SECRET);
            for (int i = 0; i < 4 && x.out[i % 2].out_len > x.out[i % 2].out_at; i++)
                ends += turn(&x, i % 2, i == step ? bit : -1) == 1;
            assert_true(ends < 2);
            pair_free(&x);
        }
    }
}

static void hello(struct pair *x)
{
    pair_init(x, SECRET);
    for (int i = 0; i < 4; i++)
        turn(x, i % 2, -1);
    assert_true(x->s[0].done && x->s[1].done);
}

static void test_frames(void **state)
{
    struct fk_request r[2] = { { .id = 7, .block = rig_read(3, 100, NULL, 0).block, .rkey = 8, .raddr = 9 },
                               { .id = 8, .block = rig_read(4, 200, NULL, 0).block, .rkey = 18, .raddr = 19 } }, got;
    struct pair x;
    struct fk_stream in;
    const uint8_t *payload;
    uint32_t bytes;
    unsigned type;

    for (int bit = -1; bit < 100 * 8; bit++) {
        hello(&x);
        assert_int_equal(fk_put_requests(&x.s[0], &x.out[0], r, 2), 0);
        cross(&x, 0, &in);
        if (bit >= 0)
            in.in[bit / 8] ^= (uint8_t)(1 << bit % 8);
        int rc = fk_frame_next(&x.s[1], &in, &type, &payload, &bytes);
        if (bit >= 0) {
            assert_true(rc <= 0);
        } else {
            assert_int_equal(rc, 1);
            assert_int_equal(fk_request_count(bytes), 2);
            assert_int_equal(fk_request_get(payload, 1, &got), 0);
            assert_memory_equal(&got.block, &r[1].block, offsetof(struct fk_block_ref, bytes) + 4);      /* padding follows */
            assert_int_equal(got.raddr, 19);
            in.in_at = 0;               /* the same frame again */
            assert_int_equal(fk_frame_next(&x.s[1], &in, &type, &payload, &bytes), -EBADMSG);
        }
        fk_stream_close(&in);
        pair_free(&x);
    }
}

/* RFC 4231, test cases 1 and 6. */
static void test_hmac(void **state)
{
    static const uint8_t one[32] = "\xb0\x34\x4c\x61\xd8\xdb\x38\x53\x5c\xa8\xaf\xce\xaf\x0b\xf1\x2b\x88\x1d\xc2\x00"
                                   "\xc9\x83\x3d\xa7\x26\xe9\x37\x6c\x2e\x32\xcf\xf7";
    static const uint8_t six[32] = "\x60\xe4\x31\x59\x1e\xe0\xb6\x7f\x0d\x8a\x26\xaa\xcb\xf5\xb7\x7f\x8e\x0b\xc6\x21"
                                   "\x37\x28\xc5\x14\x05\x46\x04\x0f\x0e\xe3\x7f\x54";
    char text[] = "Test Using Larger Than Block-Size Key - Hash Key First", hi[] = "Hi There";
    uint8_t key[131], out[32];
    struct fk_mac m;

    memset(key, 0x0b, 20);
    fk_mac_init(&m, key, 20);
    fk_mac_of(&m, &(struct iovec){ hi, 8 }, 1, out);
    assert_memory_equal(out, one, 32);
    memset(key, 0xaa, sizeof(key));
    fk_mac_init(&m, key, sizeof(key));
    fk_mac_of(&m, &(struct iovec){ text, sizeof(text) - 1 }, 1, out);
    assert_memory_equal(out, six, 32);
}

static void test_addresses(void **state)
{
    static const char *const bad[] = { "", ":", "1.2.3.4", "1.2.3.4:", "1.2.3.4:65536", "1.2.3.4:1x", "host:1",
                                       "[::1:5", "::1:5", "[]:1", "[1.2.3.4]:5", "1.2.3.4: 5", "1.2.3.4:-5" };
    static const char *const good[] = { "1.2.3.4:0", "127.0.0.1:65535", "[::1]:80" };
    struct sockaddr_storage a;
    socklen_t len;
    char text[128];

    for (size_t i = 0; i < fk_array_size(bad); i++)
        assert_int_equal(fk_tcp_parse(bad[i], &a, &len), -EINVAL);
    for (size_t i = 0; i < fk_array_size(good); i++) {
        assert_int_equal(fk_tcp_parse(good[i], &a, &len), 0);
        fk_tcp_format(&a, text, sizeof(text));
        assert_string_equal(text, good[i]);
    }
}

static int set_up(void **state)
{
    fk_log_set_level(FK_LOG_CRITICAL);
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_order_and_faults),
        cmocka_unit_test(test_quarantine),
        cmocka_unit_test(test_slow_owner), cmocka_unit_test(test_bounds),
        cmocka_unit_test(test_too_many),
        cmocka_unit_test(test_hello),
        cmocka_unit_test(test_hello_bits),
        cmocka_unit_test(test_frames),
        cmocka_unit_test(test_hmac),
        cmocka_unit_test(test_addresses),
    };

    return cmocka_run_group_tests(tests, set_up, NULL);
}
