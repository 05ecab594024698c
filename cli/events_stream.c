/* events_stream.c - see events_stream.h. */
#include "events_stream.h"

#include <inttypes.h>
#include <stdio.h>

#include "base/clock.h"
#include "base/log.h"

#define REPLAY_WAIT_MS 5000         /* for each message of an answer */
#define MAX_MESSAGE_BYTES (64 << 20)
#define RECEIVE_HWM 100000

static void *open_socket(struct stream *s, int type, const char *command, const char *endpoint)
{
    int64_t most = MAX_MESSAGE_BYTES;
    void *socket = s->zmq->socket(s->ctx, type);

    if (!socket)
        return NULL;
    fk_zmq_set_int(s->zmq, socket, ZMQ_LINGER, 0);
    fk_zmq_set_int(s->zmq, socket, ZMQ_RCVHWM, RECEIVE_HWM);
    fk_zmq_set_int(s->zmq, socket, ZMQ_TCP_KEEPALIVE, 1);
    fk_zmq_set_int(s->zmq, socket, ZMQ_RECONNECT_IVL, 100);
    fk_zmq_set_int(s->zmq, socket, ZMQ_RECONNECT_IVL_MAX, 2000);
    s->zmq->setsockopt(socket, ZMQ_MAXMSGSIZE, &most, sizeof(most));
    if (!s->zmq->connect(socket, endpoint))
        return socket;
    fprintf(stderr, "%s: %s: %s (tcp://HOST:PORT or ipc://PATH is wanted)\n", command, endpoint,
            s->zmq->strerror(s->zmq->error()));
    s->zmq->close(socket);
    return NULL;
}

int stream_open(struct stream *s, const struct fk_zmq *zmq, const char *command, const char *endpoint,
                const char *replay_endpoint, const char *topic)
{
    *s = (struct stream){ .zmq = zmq, .ctx = zmq->ctx_new(), .name = endpoint };
    if (s->ctx)
        s->sub = open_socket(s, ZMQ_SUB, command, endpoint);
    if (s->sub && replay_endpoint)
        s->dealer = open_socket(s, ZMQ_DEALER, command, replay_endpoint);
    if (!s->sub || (replay_endpoint && !s->dealer)) {
        stream_close(s);
        return -EINVAL;
    }
    s->begun = s->dealer != NULL;       /* number 0 is expected first */
    zmq->setsockopt(s->sub, ZMQ_SUBSCRIBE, topic, strlen(topic));
    return 0;
}

void stream_done(struct stream *s, struct stream_message *m)
{
    for (size_t i = 0; i < fk_min(m->n, (size_t)STREAM_MAX_FRAMES); i++)
        s->zmq->msg_close(&m->msg[i]);
    m->n = 0;
}

void stream_close(struct stream *s)
{
    while (s->queue_at < s->queue.len)
        stream_done(s, &s->queue.data[s->queue_at++]);
    fk_vec_free(&s->queue);
    if (s->sub)
        s->zmq->close(s->sub);
    if (s->dealer)
        s->zmq->close(s->dealer);
    if (s->ctx)
        s->zmq->ctx_term(s->ctx);
    *s = (struct stream){ 0 };
}

int stream_fd(const struct stream *s)
{
    int fd = -1;
    size_t bytes = sizeof(fd);

    return s->zmq->getsockopt(s->sub, ZMQ_FD, &fd, &bytes) ? -1 : fd;
}

bool stream_seq(const struct stream_message *m, uint64_t *seq)
{
    if (m->n != 3 || m->frame[1].bytes != 8)
        return false;
    *seq = fk_get_be64(m->frame[1].data);
    return true;
}

/* Small frames are kept inside a zmq_msg, which may be copied and forgotten, as libzmq's own queues do. */
static void point_frames(struct stream *s, struct stream_message *m)
{
    for (size_t i = 0; i < fk_min(m->n, (size_t)STREAM_MAX_FRAMES); i++)
        m->frame[i] = (struct fk_frame){ s->zmq->msg_data(&m->msg[i]), s->zmq->msg_size(&m->msg[i]) };
}

static bool receive(struct stream *s, void *socket, struct stream_message *m)
{
    const struct fk_zmq *zmq = s->zmq;
    bool more = true;

    m->n = 0;
    while (more) {
        zmq_msg part;
        zmq->msg_init(&part);
        if (zmq->msg_recv(&part, socket, ZMQ_DONTWAIT) < 0) {
            zmq->msg_close(&part);
            break;
        }
        more = zmq->msg_more(&part) != 0;
        if (m->n < STREAM_MAX_FRAMES)
            m->msg[m->n] = part;
        else
            zmq->msg_close(&part);
        m->n++;
    }
    point_frames(s, m);
    return m->n > 0;
}

/* ---- what was missed ---- */

static int ask(struct stream *s, uint64_t start)
{
    zmq_msg empty, number;

    s->zmq->msg_init(&empty);
    if (s->zmq->msg_send(&empty, s->dealer, ZMQ_SNDMORE | ZMQ_DONTWAIT) < 0) {
        s->zmq->msg_close(&empty);
        return -EAGAIN;
    }
    if (s->zmq->msg_init_size(&number, 8))
        return -ENOMEM;
    fk_put_be64(s->zmq->msg_data(&number), start);
    if (s->zmq->msg_send(&number, s->dealer, ZMQ_DONTWAIT) >= 0)
        return 0;
    s->zmq->msg_close(&number);
    return -EAGAIN;
}

static void drop_frames(struct stream *s, struct stream_message *m, size_t first)
{
    for (size_t i = 0; i < first; i++)
        s->zmq->msg_close(&m->msg[i]);
    m->n -= first;
    memmove(m->msg, m->msg + first, m->n * sizeof(m->msg[0]));
    point_frames(s, m);
}

/* ["", topic, number, payload], without the topic, or without the "": as a message of three. The
 * number is what has 8 bytes before the last frame. */
static bool normalise(struct stream *s, struct stream_message *m, uint64_t *seq)
{
    if (m->n == 4 && m->frame[0].bytes == 0)
        drop_frames(s, m, 1);
    if (m->n < 2 || m->n > 3 || m->frame[m->n - 2].bytes != 8)
        return false;
    *seq = fk_get_be64(m->frame[m->n - 2].data);
    if (m->n == 2) {                    /* ["number", payload]: the topic is not said */
        m->msg[2] = m->msg[1];
        m->msg[1] = m->msg[0];
        s->zmq->msg_init(&m->msg[0]);
        m->n = 3;
        point_frames(s, m);
    }
    return true;
}

static bool wait_readable(struct stream *s, void *socket, int timeout_ms)
{
    zmq_item item = { .socket = socket, .events = ZMQ_POLLIN };
    uint64_t end = fk_clock_us() + (uint64_t)timeout_ms * 1000, now;
    int rc = -1;

    while (rc < 0 && (now = fk_clock_us()) < end)
        rc = s->zmq->poll(&item, 1, (long)((end - now) / 1000 + 1));
    return rc > 0;
}

/* The batches [from, before) into the queue; returns where they end. */
static uint64_t recover(struct stream *s, uint64_t from, uint64_t before)
{
    uint64_t seq, next = from;

    if (ask(s, from)) {
        fk_warn("%s: what was missed cannot be asked for", s->name);
        return next;
    }
    for (;;) {
        struct stream_message m;
        if (!wait_readable(s, s->dealer, REPLAY_WAIT_MS) || !receive(s, s->dealer, &m)) {
            fk_warn("%s: the replay endpoint does not answer, or has no end", s->name);
            return next;
        }
        bool good = normalise(s, &m, &seq);
        bool end = good && seq == UINT64_MAX;
        if (!good || end || seq < next || seq >= before || fk_vec_push(&s->queue, m)) {
            stream_done(s, &m);
            if (end)
                return next;
            continue;
        }
        s->recovered++;
        next = seq + 1;
    }
}

/* Before a message of that number; it may have come from a publisher that began anew. */
static void bridge_gap(struct stream *s, uint64_t seq)
{
    if (s->begun && seq < s->next_seq) {
        s->restarts++;
        s->next_seq = s->dealer ? 0 : seq;
    }
    if (!s->begun || seq == s->next_seq) {
        s->begun = true;
        return;
    }
    uint64_t from = s->next_seq, missing = seq - from;
    uint64_t got = s->recovered;
    if (s->dealer)
        recover(s, from, seq);
    got = s->recovered - got;
    if (from)
        s->lost += missing - fk_min(got, missing);
}

static int from_queue(struct stream *s, struct stream_message *out)
{
    *out = s->queue.data[s->queue_at++];
    point_frames(s, out);
    if (s->queue_at == s->queue.len)
        s->queue.len = s->queue_at = 0;
    return 1;
}

int stream_next(struct stream *s, struct stream_message *out)
{
    struct stream_message m;
    uint64_t seq;

    if (s->queue_at < s->queue.len)
        return from_queue(s, out);
    if (!receive(s, s->sub, &m))
        return 0;
    if (stream_seq(&m, &seq)) {
        bridge_gap(s, seq);
        s->next_seq = seq + 1;
    }
    if (fk_vec_push(&s->queue, m)) {
        stream_done(s, &m);
        return 0;
    }
    return from_queue(s, out);
}
