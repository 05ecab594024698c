/*
 * bench_publish.c - KV events over ZeroMQ: how many blocks a second the publisher tells a real subscriber, from the
 * source's struct to the last byte received, over a unix socket. The limit is a bare ZeroMQ publisher that
 * sends as many messages of the same size, made beforehand. And the encoder alone.
 */
#include <pthread.h>
#include <stdio.h>
#include <sys/eventfd.h>

#include "base/clock.h"
#include "base/util.h"
#include "bench.h"
#include "events/encode.h"
#include "events/publisher.h"

#define BLOCKS 300000u
#define TOKENS 16u
#define CHAIN 128u
#define RUNS 7
#define WAIT_MS 20000

struct run {
    const struct fk_zmq *zmq;
    void *ctx, *sub;
    char endpoint[64];
    int fd;
    _Atomic uint32_t limit;         /* blocks that there are now */
    uint32_t at;
    uint64_t batches, bytes;        /* received */
};

static uint32_t tokens[TOKENS * 1024];

static flexkv_event event_of(uint32_t i)
{
    return (flexkv_event){
        .kind = FLEXKV_EVENT_STORED, .medium = FLEXKV_MEDIUM_CPU, .root = i % CHAIN == 0,
        .hash = i * 0x9e3779b97f4a7c15ull, .parent = (i - 1) * 0x9e3779b97f4a7c15ull,
        .n_tokens = TOKENS, .tokens = tokens + i % 1024 * TOKENS,
    };
}

static int take(void *ctx, flexkv_event *out, size_t max)
{
    struct run *r = ctx;
    uint32_t limit = atomic_load(&r->limit);
    uint64_t count;
    size_t n = 0;

    while (n < max && r->at < limit)
        out[n++] = event_of(r->at++);
    if (!n && read(r->fd, &count, sizeof(count)) < 0 && errno != EAGAIN)
        return -errno;
    return (int)n;
}

static int again(void *ctx)
{
    ((struct run *)ctx)->at = 0;
    return 0;
}

static int fd_of(void *ctx)
{
    return ((struct run *)ctx)->fd;
}

/* ---- the other side ---- */

static bool receive(struct run *r, int timeout_ms)
{
    zmq_item item = { .socket = r->sub, .events = ZMQ_POLLIN };
    bool more = true;

    if (r->zmq->poll(&item, 1, timeout_ms) <= 0)
        return false;
    while (more) {
        zmq_msg m;
        r->zmq->msg_init(&m);
        if (r->zmq->msg_recv(&m, r->sub, 0) < 0)
            return false;
        more = r->zmq->msg_more(&m);
        if (!more)
            r->bytes += r->zmq->msg_size(&m);
        r->zmq->msg_close(&m);
    }
    r->batches++;
    return true;
}

static int subscribe(struct run *r)
{
    r->sub = r->zmq->socket(r->ctx, ZMQ_SUB);
    if (!r->sub)
        return -ENOMEM;
    fk_zmq_set_int(r->zmq, r->sub, ZMQ_LINGER, 0);
    fk_zmq_set_int(r->zmq, r->sub, ZMQ_RCVHWM, 0);
    r->zmq->setsockopt(r->sub, ZMQ_SUBSCRIBE, "", 0);
    return r->zmq->connect(r->sub, r->endpoint) ? -EIO : 0;
}

static uint64_t stored(const struct fk_publisher *p, uint64_t *bytes)
{
    struct fk_publisher_stats st;

    fk_publisher_stats(p, &st);
    *bytes = st.bytes;
    return st.stored;
}

/* The publisher has counted what we got when we came. */
static bool settled(const struct fk_publisher *p)
{
    struct fk_publisher_stats st = { 0 };

    for (int i = 0; i < WAIT_MS && !st.resyncs; i++) {
        usleep(1000);
        fk_publisher_stats(p, &st);
    }
    return st.resyncs > 0;
}

/* Seconds from the first event in the source to the last byte here; < 0: it failed. */
static double publish_all(struct run *r)
{
    struct fk_publisher_params params = {
        .endpoint = r->endpoint, .rank = 0, .hwm = 0, .endpoint_setting = "bench",
    };
    struct fk_event_source source = { .take = take, .again = again, .fd = fd_of, .ctx = r };
    struct fk_publisher *p;
    char error[300];
    uint64_t one = 1, bytes = 0;

    if (fk_publisher_open(r->zmq, &params, &source, &p, error, sizeof(error))) {
        fprintf(stderr, "%s\n", error);
        return -1;
    }
    bool good = !subscribe(r) && receive(r, WAIT_MS) && settled(p);
    stored(p, &bytes);
    uint64_t before = bytes - r->bytes, start = fk_clock_ns();  /* sent when nobody listened */
    r->batches = 0;
    atomic_store(&r->limit, BLOCKS);
    good = good && write(r->fd, &one, sizeof(one)) == sizeof(one);
    while (good && (stored(p, &bytes) < BLOCKS || r->bytes + before < bytes))
        good = receive(r, WAIT_MS);
    double seconds = (double)(fk_clock_ns() - start) / 1e9;
    r->zmq->close(r->sub);
    fk_publisher_close(p);
    return good ? seconds : -1;
}

/* ---- the limit: a bare publisher ---- */

struct bare { struct run *r; void *pub; uint64_t batches, bytes; char *payload; };

static void send_frame(struct bare *b, const void *data, size_t bytes, int flags)
{
    zmq_msg m;

    b->r->zmq->msg_init_size(&m, bytes);
    memcpy(b->r->zmq->msg_data(&m), data, bytes);
    b->r->zmq->msg_send(&m, b->pub, flags);
}

static void *send_bare(void *arg)
{
    struct bare *b = arg;
    char seq[8] = { 0 };

    for (uint64_t i = 0; i < b->batches; i++) {
        zmq_msg m;
        send_frame(b, "", 0, ZMQ_SNDMORE);
        send_frame(b, seq, sizeof(seq), ZMQ_SNDMORE);
        b->r->zmq->msg_init_data(&m, b->payload, b->bytes / b->batches, NULL, NULL);
        b->r->zmq->msg_send(&m, b->pub, 0);
    }
    return NULL;
}

static double bare_all(struct run *r, uint64_t batches, uint64_t bytes)
{
    struct bare b = { .r = r, .batches = batches, .bytes = bytes,
                      .payload = calloc(1, bytes / batches + 1) };
    double seconds = -1;
    char subscription[2];
    pthread_t thread;

    b.pub = r->zmq->socket(r->ctx, ZMQ_XPUB);
    if (!b.pub || !b.payload)
        return -1;
    fk_zmq_set_int(r->zmq, b.pub, ZMQ_LINGER, 0);
    fk_zmq_set_int(r->zmq, b.pub, ZMQ_SNDHWM, 0);
    zmq_msg m;
    r->zmq->msg_init(&m);
    if (!r->zmq->bind(b.pub, r->endpoint) && !subscribe(r) && r->zmq->msg_recv(&m, b.pub, 0) > 0) {
        memcpy(subscription, r->zmq->msg_data(&m), 1);
        uint64_t start = fk_clock_ns();
        r->batches = 0;
        pthread_create(&thread, NULL, send_bare, &b);
        while (r->batches < batches && receive(r, WAIT_MS))
            ;
        seconds = r->batches == batches ? (double)(fk_clock_ns() - start) / 1e9 : -1;
        pthread_join(thread, NULL);
    }
    r->zmq->msg_close(&m);
    r->zmq->close(r->sub);
    r->zmq->close(b.pub);
    free(b.payload);
    return seconds;
}

/* ---- the encoder alone ---- */

static double encode_all(void)
{
    struct fk_encoder e;
    flexkv_event ev[256];
    uint64_t start = fk_clock_ns();

    fk_encoder_init(&e, FK_PUBLISHER_BATCH_BYTES);
    for (uint32_t at = 0; at < BLOCKS;) {
        size_t n = 0, done = 0;
        while (n < fk_array_size(ev) && at < BLOCKS)
            ev[n++] = event_of(at++);
        while (done < n) {
            struct fk_batch *b;
            done += fk_encoder_add(&e, ev + done, n - done);
            if (done < n && !fk_encoder_batch(&e, 0, 0, &b)) {
                fk_batch_unref(b);
                fk_encoder_reset(&e);
            }
        }
    }
    fk_encoder_free(&e);
    return (double)(fk_clock_ns() - start) / 1e9;
}

static void fresh(struct run *r, const char *what)
{
    static unsigned number;

    snprintf(r->endpoint, sizeof(r->endpoint), "ipc://@flexkv-bench-%d-%s-%u", (int)getpid(), what, number++);
    atomic_store(&r->limit, 0);
    r->at = 0;
    r->batches = r->bytes = 0;
}

int bench_publish(struct bench_result *out, int max)
{
    static double ours[RUNS], limit[RUNS], encode[RUNS];
    struct run r = { .fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK) };
    uint64_t seed = 1;
    char error[512];
    int rc = 0;

    if (max < 2 || r.fd < 0)
        return -EINVAL;
    if (fk_zmq_load(NULL, "kv_events_zmq_library", &r.zmq, error, sizeof(error))) {
        fprintf(stderr, "%s\n", error);
        return -ENOENT;
    }
    r.ctx = r.zmq->ctx_new();
    for (size_t i = 0; i < fk_array_size(tokens); i++)
        tokens[i] = fk_rng_below(&seed, 150000);
    for (int i = 0; i < RUNS && !rc; i++) {
        fresh(&r, "ours");
        double a = publish_all(&r), b = -1;
        uint64_t batches = r.batches, bytes = r.bytes;
        if (a > 0 && batches) {
            fresh(&r, "bare");
            b = bare_all(&r, batches, bytes);
        }
        rc = a <= 0 || b <= 0 ? -EIO : 0;
        ours[i] = BLOCKS / a / 1e6;
        limit[i] = BLOCKS / b / 1e6;
        encode[i] = BLOCKS / encode_all() / 1e6;
    }
    r.zmq->ctx_term(r.ctx);
    close(r.fd);
    if (rc)
        return rc;
    out[0] = bench_summary("publish_blocks", "M blk/s", ours, limit, RUNS);
    out[1] = bench_summary("encode_blocks", "M blk/s", encode, NULL, RUNS);
    return 2;
}
