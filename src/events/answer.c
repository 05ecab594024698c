/*
 * answer.c - what comes to a publisher from the network: subscriptions, and requests for batches that
 * somebody missed. Nothing of it is believed before it is checked, and each request gets its end
 * marker, also when nothing is kept: listeners wait for it without a deadline.
 *
 *   request  [identity]["" maybe][first number wanted, u64 big endian]
 *   answer   [identity][""][topic][number][payload] each, then [identity][""][""][-1][""]
 *
 * Called by the publisher's thread.
 */
#include "base/log.h"
#include "base/util.h"
#include "events/publisher_impl.h"

#define READ_AT_ONCE 64
#define MAX_FRAMES 4

/* One message's frames. How many there were: those beyond MAX_FRAMES are thrown away; 0: no message. */
static size_t read_message(const struct fk_publisher *p, void *socket, zmq_msg msg[MAX_FRAMES])
{
    const struct fk_zmq *zmq = p->zmq;
    size_t n = 0;
    bool more = true;

    while (more) {
        zmq_msg m;
        zmq->msg_init(&m);
        if (zmq->msg_recv(&m, socket, ZMQ_DONTWAIT) < 0) {
            zmq->msg_close(&m);
            break;
        }
        more = zmq->msg_more(&m) != 0;
        if (n < MAX_FRAMES)
            msg[n] = m;
        else
            zmq->msg_close(&m);
        n++;
    }
    return n;
}

static void close_message(const struct fk_publisher *p, zmq_msg *msg, size_t n)
{
    for (size_t i = 0; i < fk_min(n, (size_t)MAX_FRAMES); i++)
        p->zmq->msg_close(&msg[i]);
}

/* 1 and the leading bytes of the topics that are wanted. */
static bool wants_us(const struct fk_publisher *p, const unsigned char *data, size_t bytes)
{
    return bytes >= 1 && data[0] == 1 && bytes - 1 <= strlen(p->topic) &&
           !memcmp(data + 1, p->topic, bytes - 1);
}

void fk_publisher_read_subscriptions(struct fk_publisher *p)
{
    zmq_msg msg[MAX_FRAMES];
    size_t n;

    for (int i = 0; i < READ_AT_ONCE && (n = read_message(p, p->pub, msg)); i++) {
        if (n == 1 && wants_us(p, p->zmq->msg_data(&msg[0]), p->zmq->msg_size(&msg[0]))) {
            fk_stat_add(&p->stats.subscriptions, 1);
            fk_publisher_want_resync(p, FK_RESYNC_MUST);
        }
        close_message(p, msg, n);
    }
}

/* ---- requests ---- */

static void drop_answer(struct fk_publisher *p, size_t i)
{
    free(p->answer[i].peer);
    memmove(&p->answer[i], &p->answer[i + 1], (--p->n_answers - i) * sizeof(p->answer[i]));
}

/* Who asks without taking answers loses his oldest one, not somebody else his. */
static void make_room(struct fk_publisher *p, const void *peer, size_t bytes)
{
    size_t oldest = 0, own = 0, own_oldest = 0;

    for (size_t i = p->n_answers; i-- > 0;) {
        const struct fk_answer *a = &p->answer[i];
        if (a->peer_bytes == bytes && !memcmp(a->peer, peer, bytes)) {
            own++;
            own_oldest = i;
        }
        if (a->moved_ms <= p->answer[oldest].moved_ms)
            oldest = i;
    }
    if (own >= FK_PEER_ANSWERS)
        drop_answer(p, own_oldest);
    else if (p->n_answers == FK_MAX_ANSWERS)
        drop_answer(p, oldest);
}

static int begin_answer(struct fk_publisher *p, zmq_msg *identity, uint64_t start)
{
    uint64_t next_seq = atomic_load_explicit(&p->next_seq, memory_order_relaxed);
    size_t bytes = p->zmq->msg_size(identity);
    void *peer = malloc(bytes + 1);

    if (!peer)
        return -ENOMEM;
    memcpy(peer, p->zmq->msg_data(identity), bytes);
    make_room(p, peer, bytes);
    p->answer[p->n_answers++] = (struct fk_answer){
        .peer = peer, .peer_bytes = bytes, .next = start, .end = next_seq,
        .moved_ms = fk_publisher_now_ms(),
    };
    if (start < next_seq && !fk_history_covers(&p->history, start))
        fk_publisher_want_resync(p, FK_RESYNC_MUST);
    return 0;
}

static void read_requests(struct fk_publisher *p)
{
    zmq_msg msg[MAX_FRAMES];
    size_t n;

    for (int i = 0; i < READ_AT_ONCE && (n = read_message(p, p->router, msg)); i++) {
        struct fk_frame frame[MAX_FRAMES];
        uint64_t start;
        for (size_t k = 0; k < fk_min(n, (size_t)MAX_FRAMES); k++)
            frame[k] = (struct fk_frame){ p->zmq->msg_data(&msg[k]), p->zmq->msg_size(&msg[k]) };
        fk_stat_add(&p->stats.requests, 1);
        if (n < 2 || n > MAX_FRAMES || fk_history_parse_request(frame + 1, n - 1, &start) ||
            begin_answer(p, &msg[0], start))
            fk_stat_add(&p->stats.bad_requests, 1);
        close_message(p, msg, n);
    }
}

/* ---- answers ---- */

static int send_head(struct fk_publisher *p, const struct fk_answer *a)
{
    int rc = fk_publisher_send_bytes(p->zmq, p->router, a->peer, a->peer_bytes, ZMQ_SNDMORE);

    return rc ? rc : fk_publisher_send_bytes(p->zmq, p->router, "", 0, ZMQ_SNDMORE);
}

static int send_end(struct fk_publisher *p, const struct fk_answer *a)
{
    static const unsigned char minus_one[8] = { 255, 255, 255, 255, 255, 255, 255, 255 };
    int rc = send_head(p, a);

    if (!rc)
        rc = fk_publisher_send_bytes(p->zmq, p->router, "", 0, ZMQ_SNDMORE);
    if (!rc)
        rc = fk_publisher_send_bytes(p->zmq, p->router, minus_one, sizeof(minus_one), ZMQ_SNDMORE);
    return rc ? rc : fk_publisher_send_bytes(p->zmq, p->router, "", 0, 0);
}

/* 0: the answer is complete. -EAGAIN: the peer's queue is full; other -errno: he is gone. */
static int go_on(struct fk_publisher *p, struct fk_answer *a)
{
    struct fk_batch *batch;
    int rc = 0;

    while (!rc && (batch = fk_history_at(&p->history, a->next)) && batch->seq < a->end) {
        rc = send_head(p, a);
        if (!rc)
            rc = fk_publisher_send_batch(p, p->router, batch);
        if (rc)
            return rc;
        a->next = batch->seq + 1;
        a->moved_ms = fk_publisher_now_ms();
        fk_stat_add(&p->stats.replayed, 1);
    }
    return rc ? rc : send_end(p, a);
}

void fk_publisher_answer(struct fk_publisher *p)
{
    if (!p->router)
        return;
    read_requests(p);
    for (size_t i = 0; i < p->n_answers;) {
        struct fk_answer *a = &p->answer[i];
        int rc = go_on(p, a);
        if (rc == -EAGAIN && fk_publisher_now_ms() - a->moved_ms < FK_ANSWER_STUCK_MS) {
            i++;
            continue;
        }
        drop_answer(p, i);
    }
}
