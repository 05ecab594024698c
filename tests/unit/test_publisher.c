/* test_publisher.c - src/events/publisher.c and answer.c over real ZeroMQ sockets: late, slow and dead
 * subscribers, requests for what was missed, errors of set-up. The receiver judges the stream with
 * check.c and must end up with what the source has. Skipped without libzmq. */
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

#include <cmocka.h>

#include "base/clock.h"
#include "events/check.h"
#include "events/history.h"
#include "events/publisher.h"

#define SECOND 1000
#define LONG_MS (20 * SECOND)
#define MAX_BLOCKS 20000u

static const struct fk_zmq *zmq;

#ifdef __SANITIZE_THREAD__
/* libzmq is not built for ThreadSanitizer, so it does not see how memory goes from thread to thread there. */
__attribute__((visibility("default"), used)) const char *__tsan_default_options(void);
const char *__tsan_default_options(void)
{
    return "ignore_noninstrumented_modules=1";
}
#endif

/* ---- a source: blocks 1 .. n in chains of 100, some of them there ---- */

struct source {
    pthread_mutex_t lock;
    int fd;
    uint32_t n;
    bool there[MAX_BLOCKS + 1], told[MAX_BLOCKS + 1];
    uint32_t at;                        /* where to look for the next difference */
    uint32_t tokens[MAX_BLOCKS + 1][16];
    int fail_once, failing;
    uint32_t calls;
};

static void wake(struct source *s)
{
    uint64_t one = 1;

    assert_int_equal(write(s->fd, &one, sizeof(one)), sizeof(one));
}

static void set_blocks(struct source *s, uint32_t from, uint32_t to, bool there)
{
    pthread_mutex_lock(&s->lock);
    for (uint32_t i = from; i <= to; i++)
        s->there[i] = there;
    s->n = fk_max(s->n, to);
    s->at = 0;
    pthread_mutex_unlock(&s->lock);
    wake(s);
}

static flexkv_event event_of(struct source *s, uint32_t i)
{
    s->told[i] = s->there[i];
    if (!s->there[i])
        return (flexkv_event){ .kind = FLEXKV_EVENT_REMOVED, .medium = FLEXKV_MEDIUM_CPU, .hash = i };
    return (flexkv_event){ .kind = FLEXKV_EVENT_STORED, .medium = FLEXKV_MEDIUM_CPU, .hash = i,
                           .parent = i - 1, .root = i % 100 == 1, .n_tokens = 16,
                           .tokens = s->tokens[i] };
}

static int source_take(void *ctx, flexkv_event *out, size_t max)
{
    struct source *s = ctx;
    uint64_t count;
    size_t n = 0;

    pthread_mutex_lock(&s->lock);
    int rc = s->fail_once ? s->fail_once : s->failing;
    s->fail_once = 0;
    s->calls++;
    for (; !rc && s->at <= s->n && n < max; s->at++)
        if (s->there[s->at] != s->told[s->at])
            out[n++] = event_of(s, s->at);
    if (!n && read(s->fd, &count, sizeof(count)) < 0)
        assert_int_equal(errno, EAGAIN);
    pthread_mutex_unlock(&s->lock);
    return rc ? rc : (int)n;
}

static int source_again(void *ctx)
{
    struct source *s = ctx;

    pthread_mutex_lock(&s->lock);
    memset(s->told, 0, sizeof(s->told));
    s->at = 0;
    pthread_mutex_unlock(&s->lock);
    wake(s);
    return 0;
}

static int source_fd(void *ctx)
{
    return ((struct source *)ctx)->fd;
}

static struct source *new_source(void)
{
    struct source *s = calloc(1, sizeof(*s));

    assert_non_null(s);
    pthread_mutex_init(&s->lock, NULL);
    s->fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    for (uint32_t i = 0; i <= MAX_BLOCKS; i++)
        for (uint32_t t = 0; t < 16; t++)
            s->tokens[i][t] = i * 16 + t;
    return s;
}

static void free_source(struct source *s)
{
    close(s->fd);
    free(s);
}

/* ---- the publisher under test ---- */

struct rig {
    char dir[64], endpoint[96], replay[96], error[400];
    struct source *source;
    struct fk_publisher *p;
    void *ctx;
    struct fk_publisher_params params;
};

static int start(struct rig *r)
{
    struct fk_event_source source = { .take = source_take, .again = source_again, .fd = source_fd,
                                      .ctx = r->source };

    return fk_publisher_open(zmq, &r->params, &source, &r->p, r->error, sizeof(r->error));
}

static struct rig *new_rig(void)
{
    struct rig *r = calloc(1, sizeof(*r));

    snprintf(r->dir, sizeof(r->dir), "/tmp/flexkv-publisher-XXXXXX");
    assert_non_null(mkdtemp(r->dir));
    snprintf(r->endpoint, sizeof(r->endpoint), "ipc://%s/pub", r->dir);
    snprintf(r->replay, sizeof(r->replay), "ipc://%s/replay", r->dir);
    r->source = new_source();
    r->ctx = zmq->ctx_new();
    r->params = (struct fk_publisher_params){
        .endpoint = r->endpoint, .replay_endpoint = r->replay, .topic = "kv", .rank = 0, .hwm = 1000,
        .history_batches = 1000, .history_bytes = 16 << 20,
        .endpoint_setting = "kv_events_endpoint", .replay_setting = "kv_events_replay_endpoint",
    };
    return r;
}

static void free_rig(struct rig *r)
{
    fk_publisher_close(r->p);
    free_source(r->source);
    zmq->ctx_term(r->ctx);
    unlink(r->endpoint + 6);
    unlink(r->replay + 6);
    rmdir(r->dir);
    free(r);
}

static struct fk_publisher_stats stats_of(struct rig *r)
{
    struct fk_publisher_stats st;

    fk_publisher_stats(r->p, &st);
    return st;
}

/* ---- a receiver ---- */

struct receiver {
    void *socket;
    struct fk_check check;
    struct fk_stream_batch decoded;
    uint64_t first_seq, last_seq;
    uint32_t messages;
};

static void *open_socket(struct rig *r, int type, const char *endpoint, int hwm)
{
    void *socket = zmq->socket(r->ctx, type);

    assert_non_null(socket);
    fk_zmq_set_int(zmq, socket, ZMQ_LINGER, 0);
    fk_zmq_set_int(zmq, socket, ZMQ_RCVHWM, hwm);
    if (type == ZMQ_SUB)
        assert_int_equal(zmq->setsockopt(socket, ZMQ_SUBSCRIBE, "", 0), 0);
    assert_int_equal(zmq->connect(socket, endpoint), 0);
    return socket;
}

static struct receiver *subscribe(struct rig *r, int hwm)
{
    struct receiver *rec = calloc(1, sizeof(*rec));

    fk_check_init(&rec->check, NULL, NULL);
    rec->socket = open_socket(r, ZMQ_SUB, r->endpoint, hwm);
    return rec;
}

static void leave(struct receiver *rec)
{
    zmq->close(rec->socket);
    fk_check_free(&rec->check);
    fk_stream_batch_free(&rec->decoded);
    free(rec);
}

/* A message's frames, or 0 after timeout_ms. */
static size_t take_message(void *socket, zmq_msg msg[6], struct fk_frame frame[6], int timeout_ms)
{
    zmq_item item = { .socket = socket, .events = ZMQ_POLLIN };
    size_t n = 0;
    bool more = true;

    if (zmq->poll(&item, 1, timeout_ms) <= 0)
        return 0;
    while (more) {
        assert_true(n < 6);
        zmq->msg_init(&msg[n]);
        assert_true(zmq->msg_recv(&msg[n], socket, 0) >= 0);
        frame[n] = (struct fk_frame){ zmq->msg_data(&msg[n]), zmq->msg_size(&msg[n]) };
        more = zmq->msg_more(&msg[n++]);
    }
    return n;
}

static void close_message(zmq_msg *msg, size_t n)
{
    for (size_t i = 0; i < n; i++)
        zmq->msg_close(&msg[i]);
}

static bool receive(struct receiver *rec, int timeout_ms)
{
    zmq_msg msg[6];
    struct fk_frame frame[6];
    size_t n = take_message(rec->socket, msg, frame, timeout_ms);

    if (!n)
        return false;
    assert_int_equal(n, 3);
    assert_memory_equal(frame[0].data, "kv", 2);
    assert_int_equal(fk_check_message(&rec->check, frame, n, &rec->decoded), 0);
    rec->last_seq = fk_get_be64(frame[1].data);
    if (!rec->messages++)
        rec->first_seq = rec->last_seq;
    close_message(msg, n);
    return true;
}

static bool knows_all(const struct receiver *rec, struct source *s)
{
    const struct fk_mirror *m = rec->check.ranks.len ? &rec->check.ranks.data[0].mirror : NULL;
    size_t wanted = 0;
    bool same = true;

    pthread_mutex_lock(&s->lock);
    for (uint32_t i = 1; i <= s->n; i++) {
        const struct fk_mirror_block *b = m ? fk_mirror_find(m, i) : NULL;
        wanted += s->there[i];
        same = same && s->there[i] == (b != NULL) &&
               (!b || !memcmp(b->tokens, s->tokens[i], sizeof(s->tokens[i])));
    }
    pthread_mutex_unlock(&s->lock);
    return same && (m ? m->blocks : 0) == wanted;
}

/* Until the receiver knows what is there, and nothing more comes. */
static void settle(struct receiver *rec, struct source *s)
{
    uint64_t end = fk_clock_us() + LONG_MS * 1000;

    do
        while (receive(rec, 100))
            ;
    while (!knows_all(rec, s) && fk_clock_us() < end);
    assert_true(knows_all(rec, s));
}

/* ---- tests ---- */

static void a_missing_library_is_named(void **state)
{
    const struct fk_zmq *none = NULL;
    char error[400] = "";

    if (zmq)
        skip();
    assert_int_equal(fk_zmq_load("/nowhere/libzmq.so.5", "kv_events_zmq_library", &none, error,
                                 sizeof(error)), -ENOENT);
    assert_non_null(strstr(error, "/nowhere/libzmq.so.5"));
    assert_non_null(strstr(error, "kv_events_zmq_library"));
    assert_non_null(strstr(error, "libzmq5"));
    assert_null(none);
}

static void a_subscriber_learns_all_and_what_changes(void **state)
{
    struct rig *r = new_rig();
    struct timespec ts;

    set_blocks(r->source, 1, 3000, true);
    assert_int_equal(start(r), 0);
    struct receiver *a = subscribe(r, 0);
    settle(a, r->source);
    assert_int_equal(a->check.cleared, 1);
    clock_gettime(CLOCK_REALTIME, &ts);
    assert_true(a->first_seq / 1000000 - (uint64_t)ts.tv_sec + 100 < 200);      /* by the wall clock */
    set_blocks(r->source, 2500, 3000, false);
    set_blocks(r->source, 3001, 3500, true);
    settle(a, r->source);
    assert_int_equal(fk_check_findings(&a->check), 0);
    assert_int_equal(a->last_seq - a->first_seq + 1, a->messages);
    assert_int_equal(a->last_seq + 1, stats_of(r).next_seq);

    struct receiver *late = subscribe(r, 0);            /* and the first one stays right */
    settle(late, r->source);
    settle(a, r->source);
    assert_int_equal(fk_check_findings(&a->check) + fk_check_findings(&late->check), 0);
    assert_int_equal(a->check.cleared, 2);
    assert_int_equal(stats_of(r).subscriptions, 2);

    struct fk_publisher *before = r->p;                 /* restarted: numbers go on */
    uint64_t old_next = stats_of(r).next_seq;
    fk_publisher_close(before);
    source_again(r->source);
    assert_int_equal(start(r), 0);
    set_blocks(r->source, 1, 10, false);                /* while nobody told them */
    settle(a, r->source);
    assert_true(a->last_seq >= old_next);
    assert_int_equal(a->check.found[FK_RULE_ORDER], 0);
    leave(a);
    leave(late);
    free_rig(r);
}

static void another_topic_is_no_reason_to_tell_all(void **state)
{
    struct rig *r = new_rig();

    assert_int_equal(start(r), 0);
    void *other = zmq->socket(r->ctx, ZMQ_SUB);
    fk_zmq_set_int(zmq, other, ZMQ_LINGER, 0);
    assert_int_equal(zmq->setsockopt(other, ZMQ_SUBSCRIBE, "kvx", 3), 0);
    assert_int_equal(zmq->connect(other, r->endpoint), 0);
    struct receiver *a = subscribe(r, 0);
    settle(a, r->source);
    assert_int_equal(stats_of(r).subscriptions, 1);
    zmq->close(other);
    leave(a);
    free_rig(r);
}

/* ---- batches that were missed ---- */

static void ask(void *dealer, const void *data, size_t bytes, bool delimiter)
{
    zmq_msg m;

    if (delimiter) {
        zmq->msg_init_size(&m, 0);
        assert_true(zmq->msg_send(&m, dealer, ZMQ_SNDMORE) >= 0);
    }
    zmq->msg_init_size(&m, bytes);
    memcpy(zmq->msg_data(&m), data, bytes);
    assert_true(zmq->msg_send(&m, dealer, 0) >= 0);
}

static void ask_from(void *dealer, uint64_t start)
{
    unsigned char be[8];

    fk_put_be64(be, start);
    ask(dealer, be, sizeof(be), true);
}

/* How many batches came before the end marker; -1: none came. */
static int take_answer(void *dealer, uint64_t *first)
{
    zmq_msg msg[6];
    struct fk_frame f[6];
    uint64_t expected = 0;

    for (int n = 0;; n++) {
        size_t frames = take_message(dealer, msg, f, LONG_MS);
        if (!frames)
            return -1;
        assert_int_equal(frames, 4);                    /* "", topic, number, payload */
        assert_int_equal(f[0].bytes, 0);
        assert_int_equal(f[2].bytes, 8);
        uint64_t seq = fk_get_be64(f[2].data);
        if (seq == UINT64_MAX) {
            assert_int_equal(f[1].bytes + f[3].bytes, 0);
            close_message(msg, frames);
            return n;
        }
        assert_true(n == 0 || seq == expected);
        if (n == 0)
            *first = seq;
        expected = seq + 1;
        close_message(msg, frames);
    }
}

static void what_was_missed_is_sent_again(void **state)
{
    struct rig *r = new_rig();
    uint64_t first = 0;

    r->params.history_batches = 8;
    assert_int_equal(start(r), 0);
    struct receiver *a = subscribe(r, 0);
    void *dealer = open_socket(r, ZMQ_DEALER, r->replay, 0);

    settle(a, r->source);
    ask_from(dealer, UINT64_MAX);                       /* of a future: only the end */
    assert_int_equal(take_answer(dealer, &first), 0);
    ask_from(dealer, 0);                                /* the clearing batch begins it all */
    assert_int_equal(take_answer(dealer, &first), 1);
    uint64_t resyncs = stats_of(r).resyncs;
    for (uint32_t i = 1; i <= 5; i++) {
        set_blocks(r->source, i, i, true);
        settle(a, r->source);
    }
    ask_from(dealer, 0);
    assert_int_equal(take_answer(dealer, &first), 6);
    ask_from(dealer, a->last_seq - 1);
    assert_int_equal(take_answer(dealer, &first), 2);
    assert_int_equal(first, a->last_seq - 1);
    assert_int_equal(stats_of(r).resyncs, resyncs);
    for (uint32_t i = 6; i <= 12; i++) {
        set_blocks(r->source, i, i, true);
        settle(a, r->source);
    }
    ask_from(dealer, a->last_seq - 9);                  /* older than what is kept */
    assert_int_equal(take_answer(dealer, &first), 8);
    assert_int_equal(first, a->last_seq - 7);
    uint64_t end = fk_clock_us() + LONG_MS * 1000;      /* so everyone is told all again */
    while (stats_of(r).resyncs == resyncs && fk_clock_us() < end)
        usleep(1000);
    assert_int_equal(stats_of(r).resyncs, resyncs + 1);
    settle(a, r->source);
    assert_int_equal(fk_check_findings(&a->check), 0);
    zmq->close(dealer);
    leave(a);
    free_rig(r);
}

static void without_a_ring_there_is_an_end_marker_too(void **state)
{
    struct rig *r = new_rig();
    uint64_t first;

    r->params.history_batches = 0;
    assert_int_equal(start(r), 0);
    void *dealer = open_socket(r, ZMQ_DEALER, r->replay, 0);
    for (int i = 0; i < 3; i++) {
        ask_from(dealer, 0);
        assert_int_equal(take_answer(dealer, &first), 0);
    }
    zmq->close(dealer);
    free_rig(r);
}

static void nonsense_is_no_request(void **state)
{
    static char large[8192];
    struct rig *r = new_rig();
    uint64_t first;

    assert_int_equal(start(r), 0);
    void *dealer = open_socket(r, ZMQ_DEALER, r->replay, 0);
    ask(dealer, "", 0, false);
    ask(dealer, "1234567", 7, true);
    ask(dealer, "123456789", 9, false);
    zmq_msg m;
    for (int i = 0; i < 20; i++) {
        zmq->msg_init_size(&m, 8);
        assert_true(zmq->msg_send(&m, dealer, i < 19 ? ZMQ_SNDMORE : 0) >= 0);
    }
    ask(dealer, "\0\0\0\0\0\0\0\0", 8, false);          /* this is one, without the empty frame */
    assert_int_equal(take_answer(dealer, &first), 1);
    struct fk_publisher_stats st = stats_of(r);
    assert_int_equal(st.requests, 5);
    assert_int_equal(st.bad_requests, 4);
    ask(dealer, large, sizeof(large), true);            /* its connection is closed */
    void *other = open_socket(r, ZMQ_DEALER, r->replay, 0);
    ask_from(other, 0);
    assert_int_equal(take_answer(other, &first), 1);
    zmq->close(dealer);
    zmq->close(other);
    free_rig(r);
}

/* Who asks again and again and takes nothing costs bounded memory, and nobody else anything. */
static void who_never_takes_answers_is_given_up(void **state)
{
    struct rig *r = new_rig();
    uint64_t first;

    set_blocks(r->source, 1, MAX_BLOCKS, true);
    assert_int_equal(start(r), 0);
    struct receiver *a = subscribe(r, 0);
    settle(a, r->source);
    void *stuck = open_socket(r, ZMQ_DEALER, r->replay, 1);
    for (int i = 0; i < 300; i++)
        ask_from(stuck, 0);
    void *dealer = open_socket(r, ZMQ_DEALER, r->replay, 0);
    ask_from(dealer, a->last_seq);
    assert_int_equal(take_answer(dealer, &first), 1);
    for (int i = 0; i < 2000 && stats_of(r).requests <= 64; i++)
        usleep(5000);               /* another connection's requests may come later */
    assert_true(stats_of(r).requests > 64);
    zmq->close(stuck);
    zmq->close(dealer);
    leave(a);
    uint64_t before = fk_clock_us();
    free_rig(r);
    assert_true(fk_clock_us() - before < 5000000);
}

/* ---- slow subscribers ---- */

static void a_slow_subscriber_loses_batches_and_learns_all_later(void **state)
{
    struct rig *r = new_rig();

    r->params.hwm = 2;
    set_blocks(r->source, 1, 100, true);
    assert_int_equal(start(r), 0);
    struct receiver *slow = subscribe(r, 2), *quick = subscribe(r, 0);
    settle(slow, r->source);
    settle(quick, r->source);
    uint64_t end = fk_clock_us() + LONG_MS * 1000;
    for (int i = 0; !stats_of(r).dropped && fk_clock_us() < end; i++) {
        set_blocks(r->source, 101, MAX_BLOCKS, i % 2 == 0);
        while (receive(quick, 50))
            ;
    }
    assert_true(stats_of(r).dropped > 0);
    settle(slow, r->source);
    settle(quick, r->source);
    assert_int_equal(fk_check_findings(&quick->check), quick->check.found[FK_RULE_GAP]);
    assert_true(slow->check.found[FK_RULE_GAP] > 0);
    leave(slow);
    leave(quick);
    free_rig(r);
}

static void a_source_that_fails_is_asked_for_all_again(void **state)
{
    struct rig *r = new_rig();

    set_blocks(r->source, 1, 500, true);
    assert_int_equal(start(r), 0);
    struct receiver *a = subscribe(r, 0);
    settle(a, r->source);
    r->source->fail_once = -EIO;
    set_blocks(r->source, 100, 200, false);
    settle(a, r->source);
    assert_int_equal(stats_of(r).source_errors, 1);
    leave(a);
    free_rig(r);
}

/* Its descriptor stays readable: it must not be asked again and again. */
static void a_source_that_goes_on_failing_is_left_alone(void **state)
{
    struct rig *r = new_rig();

    set_blocks(r->source, 1, 500, true);
    assert_int_equal(start(r), 0);
    struct receiver *a = subscribe(r, 0);
    settle(a, r->source);
    pthread_mutex_lock(&r->source->lock);
    r->source->failing = -ENOMEM;
    r->source->calls = 0;
    pthread_mutex_unlock(&r->source->lock);
    set_blocks(r->source, 100, 200, false);
    uint64_t end = fk_clock_us() + LONG_MS * 1000;
    while (stats_of(r).source_errors < 2 && fk_clock_us() < end)
        receive(a, 100);
    pthread_mutex_lock(&r->source->lock);
    assert_true(r->source->calls < 10);
    r->source->failing = 0;
    pthread_mutex_unlock(&r->source->lock);
    settle(a, r->source);
    leave(a);
    free_rig(r);
}

static void a_storm_of_subscribers_is_no_storm_of_batches(void **state)
{
    struct rig *r = new_rig();

    set_blocks(r->source, 1, 2000, true);
    assert_int_equal(start(r), 0);
    struct receiver *a = subscribe(r, 0);
    uint64_t start_us = fk_clock_us();
    for (int i = 0; i < 40; i++) {
        struct receiver *other = subscribe(r, 0);
        receive(a, 50);
        leave(other);
    }
    settle(a, r->source);
    struct fk_publisher_stats st = stats_of(r);
    assert_true(st.subscriptions > 10);
    assert_true(st.resyncs <= (fk_clock_us() - start_us) / 1000000 + 2);
    leave(a);
    free_rig(r);
}

/* ---- set-up ---- */

static void an_endpoint_in_use_is_named(void **state)
{
    struct rig *r = new_rig(), *other = new_rig();

    assert_int_equal(start(r), 0);
    other->params.endpoint = r->endpoint;
    assert_int_equal(start(other), -EADDRINUSE);
    assert_non_null(strstr(other->error, "kv_events_endpoint"));
    assert_non_null(strstr(other->error, r->endpoint));
    other->params.endpoint = other->endpoint;
    other->params.replay_endpoint = r->replay;
    assert_int_equal(start(other), -EADDRINUSE);
    assert_non_null(strstr(other->error, "kv_events_replay_endpoint"));
    static const char *const bad[] = { "tcp://127.0.0.1:http", "tcp://127.0.0.1:99999", "tcp://127.0.0.1",
                                       "tcp://:5557", "tcp://127.0.0.1:", "ipc://", "inproc://x" };
    for (size_t i = 0; i < fk_array_size(bad); i++) {
        other->params.replay_endpoint = bad[i];
        assert_int_equal(start(other), -EINVAL);
        assert_non_null(strstr(other->error, "tcp://HOST:PORT"));
    }
    other->params.endpoint = "udp://127.0.0.1:5557";
    assert_int_equal(start(other), -EINVAL);
    assert_non_null(strstr(other->error, "tcp://"));
    other->params.endpoint = "ipc:///no/such/folder/x";
    assert_true(start(other) < 0);
    assert_non_null(strstr(other->error, "/no/such/folder"));

    struct stat st;
    assert_int_equal(stat(r->endpoint + 6, &st), 0);
    assert_int_equal(st.st_mode & 0777, 0600);
    free_rig(other);
    free_rig(r);
}

static void two_publishers_cannot_share_a_port(void **state)
{
    struct rig *r = new_rig(), *other = new_rig();

    for (int port = 21000; port < 21100 && !r->p; port++) {
        snprintf(r->endpoint, sizeof(r->endpoint), "tcp://127.0.0.1:%d", port);
        start(r);
    }
    assert_non_null(r->p);
    other->params.endpoint = r->endpoint;
    assert_int_equal(start(other), -EADDRINUSE);
    assert_non_null(strstr(other->error, r->endpoint));
    free_rig(other);
    free_rig(r);
}

int main(void)
{
    const struct CMUnitTest missing[] = { cmocka_unit_test(a_missing_library_is_named) };
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_subscriber_learns_all_and_what_changes),
        cmocka_unit_test(another_topic_is_no_reason_to_tell_all),
        cmocka_unit_test(what_was_missed_is_sent_again),
        cmocka_unit_test(without_a_ring_there_is_an_end_marker_too),
        cmocka_unit_test(nonsense_is_no_request),
        cmocka_unit_test(who_never_takes_answers_is_given_up),
        cmocka_unit_test(a_slow_subscriber_loses_batches_and_learns_all_later),
        cmocka_unit_test(a_source_that_fails_is_asked_for_all_again),
        cmocka_unit_test(a_source_that_goes_on_failing_is_left_alone),
        cmocka_unit_test(a_storm_of_subscribers_is_no_storm_of_batches),
        cmocka_unit_test(an_endpoint_in_use_is_named),
        cmocka_unit_test(two_publishers_cannot_share_a_port),
    };
    char error[400];
    int failed = cmocka_run_group_tests(missing, NULL, NULL);

    if (fk_zmq_load(NULL, "kv_events_zmq_library", &zmq, error, sizeof(error))) {
        fprintf(stderr, "skipped: %s\n", error);
        return failed ? failed : 77;
    }
    return failed + cmocka_run_group_tests(tests, NULL, NULL);
}
