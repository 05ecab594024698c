/*
 * tcp.c - reads over the members' own TCP connection (members.h): a DATA frame, then the block's bytes, then, when the
 * owner has looked at the generation again, its answer. Nothing but sockets: for networks without anything better, where
 * it costs less than libfabric does over TCP, because one connection carries all and both checksums are taken piece by piece,
 * of bytes that are in the processor's cache: the owner's before they are sent, the reader's after they have come.
 *
 *   owner    write() sends as much as the socket takes; in the middle of a block nothing else is sent (mid_payload)
 *   reader   a DATA frame says whose bytes follow; they are received straight into the buffer. Of a read that is late
 *            too: it keeps its buffer until the channel is closed
 *
 * All in the transport's thread.
 */
#include <errno.h>
#include <sys/uio.h>

#include "base/checksum.h"
#include "transport/members.h"

#define PIECE (1u << 20)                /* summed up, then sent or after it was received: within a processor's caches */
#define TURN_BYTES (8u << 20)           /* received before others have their turn */
#define WAKE_BYTES PIECE                /* of a payload, that must be there before the thread is woken up */
#define HEADS_BYTES 512u                /* read at a time while no payload is expected: it costs a copy */

struct tcp_channel {
    struct fk_channel c;
    struct fk_job *sending;             /* owner: in the middle of this one's bytes */
    uint32_t sent, summed;
    uint64_t sum;
    uint64_t id;                        /* reader: whose bytes come */
    uint32_t left, at;
    uint64_t got_sum;
    int low_water;                      /* as last set: bytes that must be there before the thread is woken up */
};

struct tcp { struct fk_members m; };

static struct tcp_channel *its(struct fk_channel *c) { return (struct tcp_channel *)c; }

static int reader_open(struct fk_channel *c)
{
    c->session.endpoint_len = 0;
    return 0;
}

static int session_open(struct fk_channel *c)
{
    c->moving = true;
    return 0;
}

static void channel_close(struct fk_channel *c)
{
    its(c)->sending = NULL;
    its(c)->left = 0;
}

/* Nobody writes but through the connection: there is no place to name. */
static int expose(struct fk_channel *c, struct fk_op *op, struct fk_request *r)
{
    r->rkey = 1;
    r->raddr = 0;
    return 0;
}

static void unexpose(struct fk_op *op)
{
}

/* ---- the owner ---- */

static int begin(struct fk_channel *c, struct fk_job *j)
{
    struct tcp_channel *x = its(c);
    int rc = fk_channel_put_answers(c);     /* of those before: they go out with it */

    if (!rc)
        rc = fk_put_data(&c->session, &c->stream, j->request.id, j->grant.bytes);
    if (rc)
        return rc;
    x->sending = j;
    x->sent = x->summed = 0;
    x->sum = fk_block_checksum_begin(j->request.block.key);
    c->mid_payload = true;
    return 0;
}

static void sum_next_piece(struct tcp_channel *x)
{
    const struct fk_grant *g = &x->sending->grant;
    uint32_t n = fk_min(g->bytes - x->summed, PIECE);

    if (!g->has_checksum)
        x->sum = fk_checksum(x->sum, (const char *)g->data + x->summed, n);
    x->summed += n;
}

/* What waits in the stream, and the summed part of the block, in one call. */
static ssize_t send_some(struct tcp_channel *x)
{
    const struct fk_grant *g = &x->sending->grant;
    struct fk_stream *s = &x->c.stream;
    struct iovec v[2] = {
        { s->out + s->out_at, fk_stream_unsent(s) },
        { (char *)(uintptr_t)g->data + x->sent, x->summed - x->sent },
    };
    struct msghdr m = { .msg_iov = v, .msg_iovlen = 2 };
    ssize_t n = sendmsg(s->fd, &m, MSG_NOSIGNAL);

    if (n < 0)
        return errno == EAGAIN || errno == EINTR ? -EAGAIN : -ECONNRESET;
    size_t heads = fk_min((size_t)n, v[0].iov_len);
    s->out_at += heads;
    x->sent += (uint32_t)((size_t)n - heads);
    return n;
}

static int write_job(struct fk_channel *c, struct fk_job *j)
{
    struct tcp_channel *x = its(c);

    if (!x->sending && begin(c, j)) {
        c->dead = true;
        return 0;
    }
    while (x->sent < j->grant.bytes) {
        if (x->sent == x->summed)
            sum_next_piece(x);
        ssize_t n = send_some(x);
        if (n == -EAGAIN) {
            fk_watch_change(c->m->t, &c->sock, EPOLLIN | EPOLLOUT);
            return -EAGAIN;
        }
        if (n < 0) {
            c->dead = true;
            return 0;
        }
    }
    x->sending = NULL;
    c->mid_payload = false;
    if (!j->grant.has_checksum) {
        j->grant.checksum = fk_block_checksum_end(x->sum);
        j->grant.has_checksum = true;
    }
    j->written = true;
    return 0;
}

/* ---- the reader ---- */

static int frame(struct fk_channel *c, unsigned type, const uint8_t *payload, uint32_t bytes)
{
    struct tcp_channel *x = its(c);
    uint64_t id;
    uint32_t n;

    if (type != FK_FRAME_DATA || !c->peer || fk_data_get(payload, bytes, &id, &n))
        return -EPROTO;
    const struct fk_op *op = fk_channel_read(c, id);
    if (!op || n != op->r.block.bytes)
        return -EPROTO;
    x->id = id;
    x->left = n;
    x->at = 0;
    x->got_sum = fk_block_checksum_begin(op->r.block.key);
    return 0;
}

static void got(struct tcp_channel *x, struct fk_op *op, uint32_t n)
{
    x->got_sum = fk_checksum(x->got_sum, (const char *)op->r.buffer + x->at, n);
    x->at += n;
    x->left -= n;
    if (!x->left)
        fk_read_summed(&x->c, op, fk_block_checksum_end(x->got_sum));
}

/* A wake-up for each packet of a large block costs more than the bytes. */
static void wake_at(struct tcp_channel *x, uint32_t bytes)
{
    int low = (int)fk_max(fk_min(bytes, WAKE_BYTES), 1u);

    if (low != x->low_water && setsockopt(x->c.stream.fd, SOL_SOCKET, SO_RCVLOWAT, &low, sizeof(low)) == 0)
        x->low_water = low;
}

/* The bytes that follow a DATA frame. 1: all are there; 0: more will come. */
static int payload(struct fk_channel *c, uint32_t *budget)
{
    struct tcp_channel *x = its(c);

    while (x->left) {
        struct fk_op *op = fk_channel_read(c, x->id);
        uint32_t want = fk_min(x->left, PIECE), have = (uint32_t)fk_min(fk_stream_unread(&c->stream), (size_t)want);
        if (!op)
            return -EPROTO;
        if (have) {
            memcpy((char *)op->r.buffer + x->at, fk_stream_data(&c->stream), have);
            fk_stream_used(&c->stream, have);
            got(x, op, have);
            continue;
        }
        if (!*budget)
            return 0;
        ssize_t n = recv(c->stream.fd, (char *)op->r.buffer + x->at, want, 0);
        if (n <= 0) {
            wake_at(x, x->left);
            return n < 0 && (errno == EAGAIN || errno == EINTR) ? 0 : -ECONNRESET;
        }
        *budget -= fk_min((uint32_t)n, *budget);
        got(x, op, (uint32_t)n);
    }
    if (x->low_water > 1)
        wake_at(x, 1);
    return 1;
}

static int poll_channel(struct fk_channel *c, uint64_t now, uint64_t *next)
{
    return 0;
}

static const char *text_of(int rc)
{
    return strerror(-rc);
}

static const struct fk_mover mover = {
    .channel_bytes = sizeof(struct tcp_channel), .sums = true, .reader_open = reader_open, .session_open = session_open,
    .close = channel_close, .expose = expose, .unexpose = unexpose, .write = write_job, .poll = poll_channel,
    .frame = frame, .payload = payload, .heads_bytes = HEADS_BYTES, .turn_bytes = TURN_BYTES, .strerror = text_of,
};

/* ---- the transport ---- */

static void tcp_close(struct fk_transport *t)
{
    struct tcp *x = t->priv;

    fk_members_close(&x->m);
    free(x);
}

static int tcp_open(struct fk_transport *t, const struct fk_transport_params *p, char *error, size_t bytes)
{
    struct tcp *x = calloc(1, sizeof(*x));

    if (!x)
        return fk_fail(error, bytes, -ENOMEM, "transport tcp: no memory");
    t->priv = x;
    int rc = fk_members_open(&x->m, t, p, &mover, "tcp", error, bytes);
    if (!rc)
        rc = fk_members_listen(&x->m, p->listen, error, bytes);
    if (rc)
        tcp_close(t);
    return rc;
}

const struct fk_transport_ops fk_transport_tcp = {
    .name = "tcp", .help = "plain TCP", .open = tcp_open, .close = tcp_close, .pump = fk_members_pump,
    .expire = fk_members_expire, .drop = fk_members_drop, .tick = fk_members_tick,
};
