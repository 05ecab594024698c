/*
 * mooncake.c - reads over Mooncake's TCP wire, spoken natively: from FlexKV nodes, whose slots have headers that say
 * what was read, and from Mooncake's own engine (FK_READ_RAW: bytes as they are).
 *
 *   lane   the one connection to a peer: first to whoever knows its segment (its handshake port, or the HTTP
 *          metadata server), then to its data port. Reads go down it one after the other and come back in that order:
 *          status, slot, status, header
 *
 * Bytes are received by this file into the buffer, nobody else: when a read is late the lane is closed and the buffer is
 * free at once. All in the transport's thread; the owner's side is mooncake_serve.c.
 */
#include <stdio.h>

#include "base/log.h"
#include "transport/mooncake_engine.h"
#include "transport/mooncake_impl.h"

enum stage { LANE_ASKING, LANE_CONNECTING, LANE_OPEN };
enum expect { EXPECT_STATUS, EXPECT_SLOT, EXPECT_HEADER_STATUS, EXPECT_HEADER };

struct fk_moon_lane {
    struct fk_mooncake *m;
    struct fk_moon_lane *prev, *next;
    struct fk_peer *peer;
    struct fk_watch watch;
    struct fk_stream stream;
    enum stage stage;
    uint64_t until_us;                  /* of asking and connecting */
    struct fk_moon_segment segment;
    /* of the oldest read */
    enum expect expect;
    bool refused;                       /* its slot: its header still comes */
    uint32_t got;                       /* of the slot, or of the header */
    uint32_t status_got;
    uint8_t status[FK_MOON_STATUS], header[FK_MOON_HEADER];
};

/* ---- opening, closing ---- */

char *fk_moon_own_segment(struct fk_mooncake *m)
{
    pthread_mutex_lock(&m->t->lock);
    char *text = fk_moon_describe(m->name, m->host, m->data_port, m->windows, m->n_windows);
    pthread_mutex_unlock(&m->t->lock);
    return text;
}

static void free_mooncake(struct fk_mooncake *m)
{
    if (m->handshake.fd >= 0)
        close(m->handshake.fd);
    if (m->data.fd >= 0)
        close(m->data.fd);
    free(m);
}

static int set_metadata(struct fk_mooncake *m, const struct fk_transport_params *p, char *error, size_t bytes)
{
    const char *how = p->mooncake_metadata ? p->mooncake_metadata : "P2PHANDSHAKE";
    struct sockaddr_storage a;
    socklen_t len;

    if (strcmp(how, "P2PHANDSHAKE") == 0)
        return 0;
    if (fk_moon_url(how, m->meta_host, m->meta_path) || fk_tcp_parse(m->meta_host, &a, &len))
        return fk_fail(error, bytes, -EINVAL, "transport mooncake: metadata \"%.150s\": P2PHANDSHAKE or "
                       "http://IP:PORT/metadata is expected (mooncake_metadata_server)", how);
    return 0;
}

static int mooncake_open(struct fk_transport *t, const struct fk_transport_params *p, char *error, size_t bytes)
{
    struct fk_mooncake *m = calloc(1, sizeof(*m));

    if (!m)
        return fk_fail(error, bytes, -ENOMEM, "transport mooncake: no memory");
    m->t = t;
    m->handshake.fd = m->data.fd = -1;
    snprintf(m->host, sizeof(m->host), "127.0.0.1");
    int rc = set_metadata(m, p, error, bytes);
    if (!rc && p->listen)
        rc = fk_moon_listen(m, p->listen, error, bytes);
    snprintf(m->name, sizeof(m->name), "%s", p->mooncake_name ? p->mooncake_name
             : p->listen ? t->address : "flexkv-reader");
    if (!rc) {
        rc = fk_moon_publish(m);
        if (rc)
            fk_fail(error, bytes, rc, "transport mooncake: the metadata server at %s does not take this node: "
                    "%s (mooncake_metadata_server)", m->meta_host, strerror(-rc));
    }
    if (!rc && p->mooncake_library && *p->mooncake_library)
        rc = fk_moon_engine_open(m, p, error, bytes);
    else if (!rc && p->mooncake_protocol && strcmp(p->mooncake_protocol, "tcp"))
        rc = fk_fail(error, bytes, -ENOTSUP, "transport mooncake: we speak Mooncake's tcp only; for %.50s its engine "
                     "is needed (mooncake_library, mooncake_protocol)", p->mooncake_protocol);
    if (rc) {
        free_mooncake(m);
        return rc;
    }
    if (m->meta_host[0] && p->listen)
        snprintf(t->address, sizeof(t->address), "%s", m->name);
    t->priv = m;
    return 0;
}

static void lane_close(struct fk_moon_lane *l, int rc)
{
    struct fk_mooncake *m = l->m;

    fk_watch_remove(m->t, &l->watch);
    fk_stream_close(&l->stream);
    fk_channel_end(m->t, l->peer, l, rc);
    if (l->peer->channel == l) {
        l->peer->channel = NULL;
        fk_peer_end_queued(m->t, l->peer, rc);
    }
    *(l->prev ? &l->prev->next : &m->lanes) = l->next;
    if (l->next)
        l->next->prev = l->prev;
    m->t->delta.connections--;
    fk_bury(m->t, l);
}

static void mooncake_close(struct fk_transport *t)
{
    struct fk_mooncake *m = t->priv;

    while (m->lanes)
        lane_close(m->lanes, -ECANCELED);
    while (m->servers)
        fk_moon_server_close(m, m->servers);
    if (m->engine)
        fk_moon_engine_close(m);
    fk_moon_unpublish(m);
    free_mooncake(m);
}

static int mooncake_region(struct fk_transport *t, void *base, size_t bytes)
{
    struct fk_mooncake *m = t->priv;

    return m->engine ? fk_moon_engine_region(m, base, bytes) : 0;
}

static int mooncake_share(struct fk_transport *t, const struct fk_window *w)
{
    struct fk_mooncake *m = t->priv;

    if (!w->slot_bytes || !w->slots || (uint64_t)w->slots * w->slot_bytes > 1ull << 42)
        return -EINVAL;
    if (m->n_windows == FK_MOON_WINDOWS)
        return -ENOSPC;
    m->windows[m->n_windows++] = *w;
    return 0;
}

static int mooncake_publish(struct fk_transport *t)
{
    return fk_moon_publish(t->priv);
}

/* ---- asking who the peer is ---- */

int fk_moon_put_segment(struct fk_mooncake *m, struct fk_stream *stream)
{
    fk_autofree char *text = fk_moon_own_segment(m);
    size_t n = text ? strlen(text) : 0;
    uint8_t *p = text ? fk_stream_room(stream, FK_MOON_MESSAGE_HEAD + n) : NULL;

    if (!p)
        return -ENOMEM;
    uint64_t le = htole64(n + 1);
    memcpy(p, &le, sizeof(le));
    p[8] = FK_MOON_METADATA;
    memcpy(p + FK_MOON_MESSAGE_HEAD, text, n);
    return 0;
}

static int ask_http(struct fk_moon_lane *l)
{
    char text[1024];
    int n = fk_moon_http_request(text, sizeof(text), "GET", l->m->meta_host, l->m->meta_path, "ram", l->peer->address,
                                 NULL);
    uint8_t *p = n > 0 ? fk_stream_room(&l->stream, (size_t)n) : NULL;

    if (!p)
        return n < 0 ? n : -ENOMEM;
    memcpy(p, text, (size_t)n);
    return 0;
}

static void lane_ready(struct fk_watch *w, uint32_t events);

static int lane_connect(struct fk_moon_lane *l, const char *address, enum stage stage)
{
    int fd, rc = fk_tcp_connect(address, l->m->t->timeout_us, &fd);

    if (rc)
        return rc;
    if (l->stream.fd >= 0) {
        fk_watch_remove(l->m->t, &l->watch);
        fk_stream_close(&l->stream);
    }
    fk_stream_init(&l->stream, fd);
    l->stage = stage;
    l->watch.ready = lane_ready;
    rc = fk_watch_add(l->m->t, &l->watch, fd, EPOLLOUT);
    if (rc)
        l->watch.ready = NULL;
    return rc;
}

static int connect_data(struct fk_moon_lane *l)
{
    char address[FK_TRANSPORT_ADDRESS_MAX];
    const char *host = l->segment.host, *colon = strrchr(l->peer->address, ':');

    if (l->segment.version < 2) {
        fk_warn("transport mooncake: %s speaks wire %d; Mooncake 0.3.12 or later is needed there", l->peer->address,
                l->segment.version);
        return -EPROTO;
    }
    if (!*host && colon)                /* 0.3.12 does not say: where it was asked */
        snprintf(address, sizeof(address), "%.*s:%u", (int)fk_min(colon - l->peer->address, (ptrdiff_t)100),
                 l->peer->address, l->segment.port);
    else
        snprintf(address, sizeof(address), strchr(host, ':') ? "[%s]:%u" : "%s:%u", host, l->segment.port);
    return lane_connect(l, address, LANE_CONNECTING);
}

static int on_segment(struct fk_moon_lane *l, bool ended)
{
    const uint8_t *data = fk_stream_data(&l->stream);
    const char *body;
    size_t n, bytes = fk_stream_unread(&l->stream);
    unsigned type = FK_MOON_METADATA;
    int rc = l->m->meta_host[0] ? fk_moon_http(data, bytes, ended, &body, &n)
                                : fk_moon_message(data, bytes, &type, &body, &n);

    if (rc == 0)
        return ended ? -ECONNRESET : 0;
    if (rc < 0)
        return rc == -ENOENT ? -EHOSTUNREACH : rc;
    if (type != FK_MOON_METADATA || fk_moon_parse_segment(body, n, &l->segment))
        return -EPROTO;
    return connect_data(l);
}

static int asking(struct fk_moon_lane *l, uint32_t events)
{
    int rc = fk_tcp_connected(l->stream.fd);

    if (!rc)
        rc = fk_stream_flush(&l->stream);
    if (rc && rc != -EAGAIN)
        return rc;
    fk_watch_change(l->m->t, &l->watch, rc ? EPOLLOUT : EPOLLIN);
    if (rc || !(events & ~(uint32_t)EPOLLOUT))
        return 0;
    rc = fk_stream_read(&l->stream, FK_MOON_MESSAGE_MAX + FK_MOON_MESSAGE_HEAD);
    return rc == -EAGAIN ? 0 : on_segment(l, rc != 0);
}

/* ---- reads ---- */

static const struct fk_moon_window *window_of(const struct fk_moon_lane *l, const struct fk_block_ref *b)
{
    for (uint32_t i = 0; i < l->segment.n_windows; i++) {
        const struct fk_moon_window *w = &l->segment.windows[i];
        if (w->w.space == b->space && w->w.ns == b->ns && w->w.tier == b->tier && w->w.slot_bytes == b->bytes &&
            b->slot < w->w.slots && w->slots_at && w->headers_at)
            return w;
    }
    return NULL;
}

static int ask(struct fk_moon_lane *l, struct fk_op *op)
{
    bool raw = op->r.flags & FK_READ_RAW;
    const struct fk_block_ref *b = &op->r.block;
    const struct fk_moon_window *w = raw ? NULL : window_of(l, b);

    if (!raw && !w)
        return -ENOENT;
    uint8_t *p = fk_stream_room(&l->stream, FK_MOON_REQUEST * (raw ? 1 : 2));
    if (!p)
        return -ENOMEM;
    fk_moon_put_request(p, b->bytes, raw ? op->r.address : w->slots_at + (uint64_t)b->slot * b->bytes,
                        FK_MOON_READ | FK_MOON_V2);
    if (!raw)
        fk_moon_put_request(p + FK_MOON_REQUEST, FK_MOON_HEADER, w->headers_at + (uint64_t)b->slot * FK_MOON_HEADER,
                            FK_MOON_READ | FK_MOON_V2);
    return 0;
}

static int flush(struct fk_moon_lane *l)
{
    int rc = fk_stream_flush(&l->stream);

    fk_watch_change(l->m->t, &l->watch, EPOLLIN | (rc == -EAGAIN ? (uint32_t)EPOLLOUT : 0));
    return rc == -EAGAIN ? 0 : rc;
}

static int send_reads(struct fk_moon_lane *l)
{
    struct fk_op *op;

    while ((op = fk_op_next(l->m->t, l->peer, l))) {
        int rc = ask(l, op);
        if (rc)
            fk_op_end(l->m->t, op, rc);
    }
    return flush(l);
}

static void end_read(struct fk_moon_lane *l, struct fk_op *op, int rc, bool verify, uint64_t checksum)
{
    if (verify && !rc)
        fk_op_arrived(l->m->t, op, checksum);
    else
        fk_op_end(l->m->t, op, rc);
    l->expect = EXPECT_STATUS;
    l->refused = false;
}

/* The slot, or the header, is there as a whole. */
static int on_body(struct fk_moon_lane *l, struct fk_op *op)
{
    uint64_t checksum = 0;

    l->got = 0;
    if (l->expect == EXPECT_SLOT) {
        if (op->r.flags & FK_READ_RAW)
            end_read(l, op, 0, false, 0);
        else
            l->expect = EXPECT_HEADER_STATUS;
        return 0;
    }
    int rc = l->refused ? -ENOENT : fk_moon_check_header(l->header, &op->r.block, &checksum);
    if (rc == -EPROTO)
        return rc;
    end_read(l, op, rc, true, checksum);
    return 0;
}

static int on_status(struct fk_moon_lane *l, struct fk_op *op)
{
    uint64_t status = fk_moon_get_status(l->status);

    l->status_got = 0;
    if (status != FK_MOON_OK && status != FK_MOON_REFUSED)
        return -EPROTO;
    bool ok = status == FK_MOON_OK;
    if (l->expect == EXPECT_STATUS && ok) {
        l->expect = EXPECT_SLOT;
    } else if (l->expect == EXPECT_STATUS && op->r.flags & FK_READ_RAW) {
        end_read(l, op, -ENOENT, false, 0);
    } else if (l->expect == EXPECT_STATUS) {
        l->refused = true;
        l->expect = EXPECT_HEADER_STATUS;
    } else if (ok) {
        l->expect = EXPECT_HEADER;
    } else {
        end_read(l, op, -ENOENT, false, 0);
    }
    return 0;
}

/* What is expected next, and the status that follows it, in one call. */
static int receive(struct fk_moon_lane *l, struct fk_op *op)
{
    bool body = l->expect == EXPECT_SLOT || l->expect == EXPECT_HEADER;
    uint32_t size = l->expect == EXPECT_SLOT ? op->r.block.bytes : FK_MOON_HEADER;
    uint8_t *to = l->expect == EXPECT_SLOT ? op->r.buffer : l->header;
    bool header_follows = l->expect == EXPECT_SLOT && !(op->r.flags & FK_READ_RAW);
    bool status = !body || header_follows || op->next;
    struct iovec v[2] = { { to + l->got, body ? size - l->got : 0 },
                          { l->status + l->status_got, status ? FK_MOON_STATUS - l->status_got : 0 } };
    struct msghdr msg = { .msg_iov = v, .msg_iovlen = 2 };
    ssize_t n = recvmsg(l->stream.fd, &msg, 0);

    if (n <= 0)
        return n < 0 && (errno == EAGAIN || errno == EINTR) ? -EAGAIN : -ECONNRESET;
    size_t in_body = fk_min((size_t)n, v[0].iov_len);
    l->got += (uint32_t)in_body;
    l->status_got += (uint32_t)((size_t)n - in_body);
    struct fk_op *status_of = header_follows || !body ? op : op->next;
    int rc = body && l->got == size ? on_body(l, op) : 0;
    if (!rc && l->status_got == FK_MOON_STATUS)
        rc = on_status(l, status_of);
    return rc;
}

static int receive_all(struct fk_moon_lane *l)
{
    char nothing;
    int rc = 0;

    while (!rc && l->peer->sent.head)
        rc = receive(l, l->peer->sent.head);
    if (rc)
        return rc == -EAGAIN ? 0 : rc;
    ssize_t n = recv(l->stream.fd, &nothing, 1, 0);     /* nothing was asked for */
    return n < 0 && (errno == EAGAIN || errno == EINTR) ? 0 : n > 0 ? -EPROTO : -ECONNRESET;
}

static void lane_ready(struct fk_watch *w, uint32_t events)
{
    struct fk_moon_lane *l = (struct fk_moon_lane *)((char *)w - offsetof(struct fk_moon_lane, watch));
    int rc = 0;

    if (l->stage == LANE_ASKING) {
        rc = asking(l, events);
    } else if (l->stage == LANE_CONNECTING) {
        rc = fk_tcp_connected(l->stream.fd);
        l->stage = LANE_OPEN;
        if (!rc)
            rc = send_reads(l);
    } else {
        if (events & EPOLLOUT)
            rc = flush(l);
        if (!rc && events & ~(uint32_t)EPOLLOUT)
            rc = receive_all(l);
    }
    if (rc)
        lane_close(l, rc);
}

static void mooncake_pump(struct fk_transport *t, struct fk_peer *p)
{
    struct fk_mooncake *m = t->priv;
    struct fk_moon_lane *l = p->channel;
    int rc = 0;

    if (m->engine) {
        fk_moon_engine_pump(m, p);
        return;
    }
    if (!l) {
        l = calloc(1, sizeof(*l));
        if (!l) {
            fk_peer_end_queued(t, p, -ENOMEM);
            return;
        }
        *l = (struct fk_moon_lane){ .m = m, .peer = p, .stream.fd = -1, .next = m->lanes,
                                    .until_us = t->now_us + t->timeout_us };
        if (l->next)
            l->next->prev = l;
        m->lanes = l;
        p->channel = l;
        t->delta.connections++;
        rc = lane_connect(l, m->meta_host[0] ? m->meta_host : p->address, LANE_ASKING);
        if (!rc)
            rc = m->meta_host[0] ? ask_http(l) : fk_moon_put_segment(l->m, &l->stream);
    } else if (l->stage == LANE_OPEN) {
        rc = send_reads(l);
    }
    if (rc)
        lane_close(l, rc);
}

static void mooncake_expire(struct fk_transport *t, struct fk_op *op)
{
    struct fk_moon_lane *l = op->channel;

    if (((struct fk_mooncake *)t->priv)->engine) {
        fk_op_late(t, op);
        return;
    }
    l->peer->channel = NULL;            /* those that are queued take a new lane */
    fk_op_end(t, op, -ETIMEDOUT);
    lane_close(l, -ECONNRESET);         /* what comes after a late answer can't come before it */
}

static bool mooncake_drop(struct fk_transport *t, struct fk_peer *p)
{
    struct fk_mooncake *m = t->priv;

    if (m->engine)
        return fk_moon_engine_drop(m, p);
    if (p->channel)
        lane_close(p->channel, -ECANCELED);
    return true;
}

static uint64_t mooncake_tick(struct fk_transport *t, uint64_t now)
{
    struct fk_mooncake *m = t->priv;
    uint64_t next_us = fk_moon_serve_tick(m, now);

    if (m->engine)
        fk_moon_engine_tick(m);
    for (struct fk_moon_lane *l = m->lanes, *next; l; l = next) {
        next = l->next;
        if (l->stage == LANE_OPEN)
            continue;
        if (now >= l->until_us)
            lane_close(l, -ETIMEDOUT);
        else
            next_us = fk_min(next_us, l->until_us);
    }
    return next_us;
}

const struct fk_transport_ops fk_transport_mooncake = {
    .name = "mooncake", .help = "Mooncake's TCP wire",
    .open = mooncake_open, .close = mooncake_close, .region = mooncake_region, .share = mooncake_share, .publish = mooncake_publish,
    .pump = mooncake_pump, .expire = mooncake_expire, .drop = mooncake_drop, .tick = mooncake_tick,
};
