/* publisher.c - see publisher.h. */
#include "events/publisher.h"

#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

#include "base/clock.h"
#include "base/log.h"
#include "base/util.h"
#include "events/encode.h"
#include "events/history.h"
#include "events/publisher_impl.h"

#define TAKE 256                    /* events at a time */
#define TURN_BATCHES 32             /* until sockets are looked at */
#define RESYNC_WAIT_MS 50           /* several subscribers that come together are told once */
#define RESYNC_LEAST_MS 1000
#define RESYNC_MOST_MS 30000
#define PATIENCE_MS 1000            /* that slow subscribers are waited for, at a time */
#define FORCE_MS 2000               /* a new subscriber waits no longer for a stuck one */

uint64_t fk_publisher_now_ms(void)
{
    return fk_clock_us() / 1000;
}

static uint64_t wall_us(void)
{
    struct timespec ts;

    clock_gettime(CLOCK_REALTIME, &ts);
    return (uint64_t)ts.tv_sec * 1000000u + (uint64_t)ts.tv_nsec / 1000;
}

/* ---- sending ---- */

static void unref_batch(void *data, void *hint)
{
    (void)data;
    fk_batch_unref(hint);
}

int fk_publisher_send_bytes(const struct fk_zmq *zmq, void *socket, const void *data, size_t bytes,
                            int flags)
{
    zmq_msg m;

    if (zmq->msg_init_size(&m, bytes))
        return -ENOMEM;
    memcpy(zmq->msg_data(&m), data, bytes);
    if (zmq->msg_send(&m, socket, flags | ZMQ_DONTWAIT) >= 0)
        return 0;
    int rc = -zmq->error();
    zmq->msg_close(&m);
    return rc;
}

/* topic, number, payload; the payload is not copied. */
int fk_publisher_send_batch(struct fk_publisher *p, void *socket, struct fk_batch *batch)
{
    const struct fk_zmq *zmq = p->zmq;
    unsigned char seq[8];
    zmq_msg m;

    fk_put_be64(seq, batch->seq);
    int rc = fk_publisher_send_bytes(zmq, socket, p->topic, strlen(p->topic), ZMQ_SNDMORE);
    if (!rc)
        rc = fk_publisher_send_bytes(zmq, socket, seq, sizeof(seq), ZMQ_SNDMORE);
    if (rc)
        return rc;
    if (zmq->msg_init_data(&m, batch->data, batch->bytes, unref_batch, fk_batch_ref(batch))) {
        fk_batch_unref(batch);
        return -ENOMEM;
    }
    if (zmq->msg_send(&m, socket, ZMQ_DONTWAIT) >= 0)
        return 0;
    rc = -zmq->error();
    zmq->msg_close(&m);
    return rc;
}

static void want_resync(struct fk_publisher *p, unsigned why, uint64_t in_ms)
{
    uint64_t at = fk_max(fk_publisher_now_ms() + in_ms, p->resync_not_before_ms);

    if (!p->resync_why || at < p->resync_at_ms)
        p->resync_at_ms = at;
    if (why & FK_RESYNC_MUST && !(p->resync_why & FK_RESYNC_MUST))
        p->resync_force_ms = at + FORCE_MS;
    p->resync_why |= why;
}

void fk_publisher_want_resync(struct fk_publisher *p, unsigned why)
{
    want_resync(p, why, RESYNC_WAIT_MS);
}

/* While all is told anew, a subscriber may hold up the rest as long as he goes on; else half of the
 * time at most. */
static void regain_patience(struct fk_publisher *p)
{
    uint64_t now = fk_publisher_now_ms(), gained = (now - p->patience_at_ms) / 2;

    if (p->resync_began_ms)
        gained = PATIENCE_MS;
    p->patience_ms = (unsigned)fk_min(p->patience_ms + gained, (uint64_t)PATIENCE_MS);
    if (gained)
        p->patience_at_ms = now;
}

/* Waits a while until every subscriber has room. -EAGAIN: one has none. */
static int send_patiently(struct fk_publisher *p, struct fk_batch *batch)
{
    int rc = fk_publisher_send_batch(p, p->pub, batch);

    while (rc == -EAGAIN && p->patience_ms > 0 && !atomic_load(&p->stop)) {
        usleep(1000);
        p->patience_ms--;
        rc = fk_publisher_send_batch(p, p->pub, batch);
    }
    if (!rc)
        regain_patience(p);
    return rc;
}

/* To those who have room; the others lose it, which is counted. */
static int send_anyway(struct fk_publisher *p, struct fk_batch *batch)
{
    fk_zmq_set_int(p->zmq, p->pub, ZMQ_XPUB_NODROP, 0);
    int rc = fk_publisher_send_batch(p, p->pub, batch);
    fk_zmq_set_int(p->zmq, p->pub, ZMQ_XPUB_NODROP, 1);
    fk_stat_add(&p->stats.dropped, 1);
    if (!p->behind)
        fk_warn("KV events: a subscriber of %s does not keep up and loses batches; it is told all "
                "again when it has room", p->endpoint);
    p->behind = true;
    want_resync(p, FK_RESYNC_BEHIND, RESYNC_LEAST_MS);
    return rc;
}

/* must: false: -EAGAIN, and nothing was sent, when a subscriber has no room. */
static int publish(struct fk_publisher *p, struct fk_batch *batch, bool must)
{
    batch->seq = atomic_load_explicit(&p->next_seq, memory_order_relaxed);
    int rc = send_patiently(p, batch);
    if (rc == -EAGAIN && !must)
        return rc;
    if (rc == -EAGAIN)
        rc = send_anyway(p, batch);
    if (rc)
        fk_stat_add(&p->stats.dropped, 1);
    atomic_store_explicit(&p->next_seq, batch->seq + 1, memory_order_relaxed);
    fk_history_push(&p->history, batch);
    fk_stat_add(&p->stats.batches, 1);
    fk_stat_add(&p->stats.bytes, batch->bytes);
    return 0;
}

/* What the encoder holds, to each rank. must: as for publish, of the first rank's batch. */
static int send_encoded(struct fk_publisher *p, bool must)
{
    double now = (double)wall_us() / 1e6;
    int rc = 0;

    for (uint32_t i = 0; i < p->n_ranks && !rc; i++) {
        struct fk_batch *batch;
        rc = fk_encoder_batch(&p->encoder, now, p->rank < 0 ? -1 : p->rank + i, &batch);
        if (rc)
            break;
        batch->clears = batch->clears && i == 0;    /* the others' must not empty the ring of it */
        rc = publish(p, batch, must || i > 0);
        fk_batch_unref(batch);
    }
    fk_encoder_reset(&p->encoder);
    return rc;
}

/* Without memory for a batch the state of receivers is wrong from here on. */
static void flush(struct fk_publisher *p)
{
    if (fk_encoder_empty(&p->encoder) || !send_encoded(p, true))
        return;
    fk_stat_add(&p->stats.dropped, 1);
    want_resync(p, FK_RESYNC_MUST, RESYNC_LEAST_MS);
}

/* ---- from the start ---- */

static int send_clear(struct fk_publisher *p, bool must)
{
    fk_encoder_clear(&p->encoder);
    return send_encoded(p, must);
}

/* The source is tried again later and later. */
static void note_failure(struct fk_publisher *p, int rc)
{
    p->failed = true;
    p->fail_pause_ms = fk_min(fk_max(2 * p->fail_pause_ms, (uint64_t)RESYNC_LEAST_MS),
                              (uint64_t)RESYNC_MOST_MS);
    fk_stat_add(&p->stats.source_errors, 1);
    fk_error("KV events: the source failed: %s; all is told again in %u s", strerror(-rc),
             (unsigned)(p->fail_pause_ms / 1000));
    want_resync(p, FK_RESYNC_MUST, p->fail_pause_ms);
}

/* A stuck subscriber is tried again later and later; one that just came does not wait for it. */
static void resync(struct fk_publisher *p)
{
    uint64_t now = fk_publisher_now_ms();
    bool must = p->resync_why & FK_RESYNC_MUST && now >= p->resync_force_ms;
    uint64_t dropped = atomic_load_explicit(&p->stats.dropped, memory_order_relaxed);

    if (p->behind)
        p->patience_ms = 0;
    if (send_clear(p, must)) {
        p->resync_pause_ms = fk_min(p->resync_pause_ms * 2, (uint64_t)RESYNC_MOST_MS);
        p->resync_at_ms = now + (p->resync_why & FK_RESYNC_MUST ? 20 : p->resync_pause_ms);
        return;
    }
    p->behind = atomic_load_explicit(&p->stats.dropped, memory_order_relaxed) != dropped;
    if (!p->behind)
        p->patience_ms = PATIENCE_MS;
    p->resync_why = p->behind ? FK_RESYNC_BEHIND : 0;
    p->resync_pause_ms = RESYNC_LEAST_MS;
    p->resync_at_ms = p->resync_not_before_ms = now + RESYNC_LEAST_MS;
    p->resync_began_ms = now;
    p->failed = false;
    fk_claims_free(&p->claims);
    fk_stat_add(&p->stats.resyncs, 1);
    int rc = p->source.again(p->source.ctx);
    if (rc)
        note_failure(p, rc);
}

/* Telling all took so long: the next time must not come before a few times that. */
static void note_quiet(struct fk_publisher *p)
{
    if (!p->resync_began_ms)
        return;
    uint64_t now = fk_publisher_now_ms();
    p->resync_not_before_ms = now + fk_max(4 * (now - p->resync_began_ms), (uint64_t)RESYNC_LEAST_MS);
    p->resync_began_ms = 0;
    if (p->resync_why)
        p->resync_at_ms = fk_max(p->resync_at_ms, p->resync_not_before_ms);
}

/* ---- the source ---- */

/* Leaves what changes a receiver's picture: see claims.h. */
static size_t settle_claims(struct fk_publisher *p, flexkv_event *ev, size_t n)
{
    size_t kept = 0;

    for (size_t i = 0; i < n; i++) {
        bool stored = ev[i].kind == FLEXKV_EVENT_STORED;
        int rc = stored ? fk_claims_add(&p->claims, ev[i].hash, ev[i].medium)
                        : fk_claims_drop(&p->claims, ev[i].hash, ev[i].medium);
        if (rc < 0)
            want_resync(p, FK_RESYNC_MUST, RESYNC_LEAST_MS);
        else if (rc)
            ev[kept++] = ev[i];
    }
    return kept;
}

static void count_events(struct fk_publisher *p, const flexkv_event *ev, size_t n)
{
    uint64_t stored = 0;

    for (size_t i = 0; i < n; i++)
        stored += ev[i].kind == FLEXKV_EVENT_STORED;
    fk_stat_add(&p->stats.stored, stored);
    fk_stat_add(&p->stats.removed, n - stored);
}

static void encode(struct fk_publisher *p, const flexkv_event *ev, size_t n)
{
    size_t done = 0;

    count_events(p, ev, n);
    while (done < n) {
        done += fk_encoder_add(&p->encoder, ev + done, n - done);
        if (done < n || p->encoder.body.len >= p->encoder.limit)
            flush(p);
    }
}

/* Others' batches, if there are any: how many, or -errno. */
static int pass_on(struct fk_publisher *p)
{
    struct fk_raw_batch raw;
    int n = 0, rc = 0;

    if (!p->source.raw)
        return 0;
    flush(p);
    while (n < TURN_BATCHES && (rc = p->source.raw(p->source.ctx, &raw)) > 0) {
        struct fk_batch *batch = fk_batch_new(raw.bytes);
        if (!batch)
            return -ENOMEM;
        memcpy(batch->data, raw.payload, raw.bytes);
        batch->clears = raw.clears;
        if (raw.clears)
            fk_claims_free(&p->claims);
        publish(p, batch, true);
        fk_batch_unref(batch);
        n++;
    }
    return rc < 0 ? rc : n;
}

static int take_events(struct fk_publisher *p)
{
    flexkv_event ev[TAKE];
    int n = p->source.take(p->source.ctx, ev, TAKE);

    if (n > 0)
        encode(p, ev, settle_claims(p, ev, (size_t)n));
    if (n >= 0)
        p->fail_pause_ms = 0;
    return n;
}

/* Some turns of events; false: there are none left. */
static bool pump_source(struct fk_publisher *p)
{
    uint64_t end = atomic_load_explicit(&p->stats.batches, memory_order_relaxed) + TURN_BATCHES;
    int n = !p->failed, passed = 0;

    while (n > 0 && atomic_load_explicit(&p->stats.batches, memory_order_relaxed) < end &&
           !atomic_load(&p->stop)) {
        passed = pass_on(p);
        n = passed < 0 ? passed : take_events(p);
        if (n == 0)
            n = passed;
    }
    flush(p);
    if (n < 0)
        note_failure(p, n);
    return n > 0;
}

/* ---- the thread ---- */

static long wait_ms(const struct fk_publisher *p, bool more)
{
    uint64_t now = fk_publisher_now_ms(), until = UINT64_MAX;

    if (more)
        return 0;
    if (p->resync_why)
        until = p->resync_at_ms;
    if (p->n_answers)
        until = fk_min(until, now + FK_ANSWER_RETRY_MS);
    return until == UINT64_MAX ? -1 : until > now ? (long)(until - now) : 0;
}

static void *publisher_main(void *arg)
{
    struct fk_publisher *p = arg;
    zmq_item items[] = {
        { .fd = p->stop_fd, .events = ZMQ_POLLIN },
        { .fd = p->source.fd(p->source.ctx), .events = ZMQ_POLLIN },
        { .socket = p->pub, .events = ZMQ_POLLIN },
        { .socket = p->router, .events = ZMQ_POLLIN },
    };
    bool more = true;

    while (!atomic_load(&p->stop)) {
        if (p->resync_why && fk_publisher_now_ms() >= p->resync_at_ms)
            resync(p);
        more = pump_source(p);
        if (!more)
            note_quiet(p);
        fk_publisher_read_subscriptions(p);
        fk_publisher_answer(p);
        items[1].events = p->failed ? 0 : ZMQ_POLLIN;
        if (p->zmq->poll(items, p->router ? 4 : 3, wait_ms(p, more)) < 0 && p->zmq->error() != EINTR) {
            fk_error("KV events: %s: no more are published: zmq_poll: %s", p->endpoint,
                     p->zmq->strerror(p->zmq->error()));
            break;
        }
    }
    send_clear(p, true);
    return NULL;
}

/* ---- open, close ---- */

static int bind_error(const struct fk_publisher *p, const char *setting, const char *endpoint,
                      char *error, size_t error_bytes)
{
    int code = p->zmq->error();

    snprintf(error, error_bytes, "%s: cannot listen at \"%s\": %s%s", setting, endpoint,
             p->zmq->strerror(code),
             code == EADDRINUSE ? " (does another engine or node publish there?)" :
             code == EINVAL || code == EPROTONOSUPPORT
                 ? " (tcp://HOST:PORT, tcp://*:PORT or ipc://PATH is wanted)" : "");
    return code > 0 && code < 4096 ? -code : -EINVAL;
}

/* libzmq takes a port beyond 65535 for a smaller one. */
static bool endpoint_good(const char *endpoint)
{
    const char *port = strrchr(endpoint, ':');
    char *end;

    if (!strncmp(endpoint, "ipc://", 6))
        return endpoint[6] != 0;
    if (strncmp(endpoint, "tcp://", 6) || port < endpoint + 7)
        return false;
    long n = strtol(port + 1, &end, 10);
    return end != port + 1 && !*end && n >= 1 && n <= 65535;
}

static const char *ipc_path(const char *endpoint)
{
    return !strncmp(endpoint, "ipc:///", 7) ? endpoint + 6 : NULL;
}

/* libzmq removes whatever is at the path and listens there: somebody who lives would be cut off. */
static bool somebody_listens(const char *endpoint)
{
    struct sockaddr_un to = { .sun_family = AF_UNIX };
    const char *path = ipc_path(endpoint);
    fk_autoclose int fd = path ? socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0) : -1;

    if (fd < 0 || strlen(path) >= sizeof(to.sun_path))
        return false;
    strcpy(to.sun_path, path);
    return !connect(fd, (struct sockaddr *)&to, sizeof(to)) || errno == EAGAIN;
}

static int bind_socket(struct fk_publisher *p, void *socket, const char *setting,
                       const char *endpoint, char *error, size_t error_bytes)
{
    if (!socket) {
        snprintf(error, error_bytes, "%s: no socket: %s", setting, p->zmq->strerror(p->zmq->error()));
        return -ENOMEM;
    }
    if (!endpoint_good(endpoint)) {
        snprintf(error, error_bytes, "%s: \"%s\": tcp://HOST:PORT, tcp://*:PORT or ipc://PATH is "
                 "wanted", setting, endpoint);
        return -EINVAL;
    }
    fk_zmq_set_int(p->zmq, socket, ZMQ_LINGER, FK_PUBLISHER_LINGER_MS);
    fk_zmq_set_int(p->zmq, socket, ZMQ_TCP_KEEPALIVE, 1);
    fk_zmq_set_int(p->zmq, socket, ZMQ_IPV6, strchr(endpoint, '[') != NULL);
    int64_t most = FK_REQUEST_MAX_BYTES;
    p->zmq->setsockopt(socket, ZMQ_MAXMSGSIZE, &most, sizeof(most));
    if (somebody_listens(endpoint)) {
        snprintf(error, error_bytes, "%s: cannot listen at \"%s\": somebody does", setting, endpoint);
        return -EADDRINUSE;
    }
    if (p->zmq->bind(socket, endpoint))
        return bind_error(p, setting, endpoint, error, error_bytes);
    if (ipc_path(endpoint))
        chmod(ipc_path(endpoint), 0600);
    return 0;
}

static int open_pub(struct fk_publisher *p, const struct fk_publisher_params *params, char *error,
                    size_t error_bytes)
{
    p->pub = p->zmq->socket(p->zmq_ctx, ZMQ_XPUB);
    if (p->pub) {
        /* before bind: it counts for connections that are made afterwards only */
        fk_zmq_set_int(p->zmq, p->pub, ZMQ_SNDHWM, params->hwm);
        fk_zmq_set_int(p->zmq, p->pub, ZMQ_XPUB_VERBOSE, 1);
        fk_zmq_set_int(p->zmq, p->pub, ZMQ_XPUB_NODROP, 1);
    }
    return bind_socket(p, p->pub, params->endpoint_setting, params->endpoint, error, error_bytes);
}

static int open_router(struct fk_publisher *p, const struct fk_publisher_params *params,
                       char *error, size_t error_bytes)
{
    if (!params->replay_endpoint || !*params->replay_endpoint)
        return 0;
    p->router = p->zmq->socket(p->zmq_ctx, ZMQ_ROUTER);
    if (p->router) {
        fk_zmq_set_int(p->zmq, p->router, ZMQ_ROUTER_MANDATORY, 1);
        fk_zmq_set_int(p->zmq, p->router, ZMQ_RCVHWM, 64);
    }
    return bind_socket(p, p->router, params->replay_setting, params->replay_endpoint, error,
                       error_bytes);
}

static int start_thread(struct fk_publisher *p)
{
    sigset_t all, before;

    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int rc = -pthread_create(&p->thread, NULL, publisher_main, p);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    p->has_thread = !rc;
    return rc;
}

static int init(struct fk_publisher *p, const struct fk_publisher_params *params)
{
    p->rank = params->rank;
    p->n_ranks = params->n_ranks ? params->n_ranks : 1;
    p->patience_ms = PATIENCE_MS;
    p->patience_at_ms = fk_publisher_now_ms();
    p->resync_pause_ms = RESYNC_LEAST_MS;
    p->next_seq = wall_us();
    p->stop_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    p->topic = strdup(params->topic ? params->topic : "");
    p->endpoint = strdup(params->endpoint);
    fk_encoder_init(&p->encoder, FK_PUBLISHER_BATCH_BYTES);
    int rc = fk_history_init(&p->history, params->history_batches, params->history_bytes);
    p->zmq_ctx = p->zmq->ctx_new();
    return p->stop_fd < 0 ? -errno : rc || !p->topic || !p->endpoint || !p->zmq_ctx ? -ENOMEM : 0;
}

int fk_publisher_open(const struct fk_zmq *zmq, const struct fk_publisher_params *params,
                      const struct fk_event_source *source, struct fk_publisher **out, char *error,
                      size_t error_bytes)
{
    struct fk_publisher *p = calloc(1, sizeof(*p));

    snprintf(error, error_bytes, "out of memory");
    if (!p)
        return -ENOMEM;
    p->zmq = zmq;
    p->source = *source;
    int rc = init(p, params);
    if (!rc)
        rc = open_pub(p, params, error, error_bytes);
    if (!rc)
        rc = open_router(p, params, error, error_bytes);
    if (!rc)
        rc = send_clear(p, true);
    if (!rc)
        rc = start_thread(p);
    if (rc) {
        fk_publisher_close(p);
        return rc;
    }
    *out = p;
    return 0;
}

void fk_publisher_stats(const struct fk_publisher *p, struct fk_publisher_stats *out)
{
#define GET(field) .field = atomic_load_explicit(&p->stats.field, memory_order_relaxed)
    *out = (struct fk_publisher_stats){
        GET(batches), GET(bytes), GET(stored), GET(removed), GET(dropped), GET(resyncs),
        GET(subscriptions), GET(requests), GET(bad_requests), GET(replayed), GET(source_errors),
        .next_seq = atomic_load_explicit(&p->next_seq, memory_order_relaxed),
    };
#undef GET
}

void fk_publisher_close(struct fk_publisher *p)
{
    uint64_t one = 1;

    if (!p)
        return;
    atomic_store(&p->stop, true);
    if (p->has_thread && write(p->stop_fd, &one, sizeof(one)) == sizeof(one))
        pthread_join(p->thread, NULL);
    if (p->pub)
        p->zmq->close(p->pub);
    if (p->router)
        p->zmq->close(p->router);
    if (p->zmq_ctx)
        p->zmq->ctx_term(p->zmq_ctx);
    for (size_t i = 0; i < p->n_answers; i++)
        free(p->answer[i].peer);
    fk_history_free(&p->history);
    fk_encoder_free(&p->encoder);
    fk_claims_free(&p->claims);
    if (p->stop_fd >= 0)
        close(p->stop_fd);
    free(p->topic);
    free(p->endpoint);
    free(p);
}
