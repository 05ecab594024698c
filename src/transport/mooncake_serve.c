/*
 * mooncake_serve.c - the owner's side of Mooncake's wire: handshake connections get our segment's descriptor, data
 * connections get slots and their headers. Mooncake knows no authentication: whoever reaches the port may read what the
 * provider grants for its windows, and nothing else. Writes are refused. See mooncake_wire.h, mooncake_impl.h.
 */
#include <stdio.h>

#include "base/log.h"
#include "transport/mooncake_impl.h"

#define MAX_SERVERS 512u
#define SEND_CHUNK (1u << 20)

struct fk_moon_server {
    struct fk_mooncake *m;
    struct fk_moon_server *prev, *next;
    struct fk_watch watch;
    struct fk_stream stream;
    bool handshake, ending;             /* ending: closed when all is sent */
    uint64_t until_us;                  /* progress is expected by then; UINT64_MAX: it may idle */
    /* a read under way */
    uint64_t address, left;
    unsigned opcode;
    bool header, begun;                 /* begun: its status has been given */
    bool granted;
    struct fk_parked *parked;           /* the slot comes later: until then nothing else is done */
    uint32_t offset;                    /* in the granted slot: next byte to send */
    uint32_t end;
    struct fk_block_ref ref;
    struct fk_grant grant;
};

void fk_moon_server_close(struct fk_mooncake *m, struct fk_moon_server *s)
{
    fk_watch_remove(m->t, &s->watch);
    fk_stream_close(&s->stream);
    if (s->granted)
        fk_grant_release(m->t, &s->ref, &s->grant);
    if (s->parked)
        fk_grant_forget(s->parked);
    *(s->prev ? &s->prev->next : &m->servers) = s->next;
    if (s->next)
        s->next->prev = s->prev;
    m->n_servers--;
    m->t->delta.connections--;
    fk_bury(m->t, s);
}

static void progress(struct fk_moon_server *s)
{
    bool busy = s->left || s->granted || s->handshake || fk_stream_unsent(&s->stream) || fk_stream_unread(&s->stream);

    s->until_us = busy ? s->m->t->now_us + 2 * s->m->t->timeout_us : UINT64_MAX;
}

/* ---- data ---- */

static int locate(struct fk_moon_server *s)
{
    struct fk_mooncake *m = s->m;
    uint32_t window, slot = 0;

    pthread_mutex_lock(&m->t->lock);
    int rc = fk_moon_locate(m->windows, m->n_windows, s->address, s->left, &window, &slot, &s->offset, &s->header);
    struct fk_window w = rc ? (struct fk_window){ 0 } : m->windows[window];
    pthread_mutex_unlock(&m->t->lock);
    s->ref = (struct fk_block_ref){ .space = w.space, .ns = w.ns, .tier = w.tier, .slot = slot,
                                    .bytes = w.slot_bytes };
    return rc;
}

static void granted(struct fk_moon_server *s)
{
    s->granted = true;
    s->end = s->header ? s->grant.bytes : (uint32_t)fk_min(s->offset + s->left, (uint64_t)s->grant.bytes);
}

static void slot_resume(struct fk_transport *t, struct fk_parked *k, int rc, const struct fk_grant *g);

/* Pins the slot in which the rest of the read begins. -EINPROGRESS: slot_resume() goes on. */
static int grant_next(struct fk_moon_server *s)
{
    int rc = locate(s);

    if (!rc)
        rc = fk_grant_take(s->m->t, &s->ref, &s->grant, &s->parked);
    if (rc == -EINPROGRESS) {
        s->parked->resume = slot_resume;
        s->parked->who = s;
    }
    if (!rc)
        granted(s);
    return rc;
}

static int release(struct fk_moon_server *s)
{
    s->granted = false;
    int rc = fk_grant_release(s->m->t, &s->ref, &s->grant);
    if (!rc && s->header) {             /* the slot itself was counted */
        s->m->t->delta.served_blocks--;
        s->m->t->delta.served_bytes -= s->grant.bytes;
    }
    return rc;
}

static int put_status(struct fk_moon_server *s, uint64_t status)
{
    uint8_t *p = fk_stream_room(&s->stream, FK_MOON_STATUS);

    if (!p)
        return -ENOMEM;
    fk_moon_put_status(p, status);
    return 0;
}

static int refuse(struct fk_moon_server *s)
{
    s->left = 0;
    /* The old wire has no word for it but the connection's end. */
    return s->opcode & FK_MOON_V2 ? put_status(s, FK_MOON_REFUSED) : -EACCES;
}

static int put_header(struct fk_moon_server *s)
{
    uint8_t header[FK_MOON_HEADER];

    fk_grant_checksum(&s->grant, s->grant.key);
    fk_moon_put_header(header, &s->grant);
    if (release(s))
        return put_status(s, FK_MOON_REFUSED);
    uint8_t *p = fk_stream_room(&s->stream, FK_MOON_STATUS + FK_MOON_HEADER);
    if (!p)
        return -ENOMEM;
    fk_moon_put_status(p, FK_MOON_OK);
    memcpy(p + FK_MOON_STATUS, header, FK_MOON_HEADER);
    return 0;
}

/* The read's first slot, or its header, was granted or not: the status. */
static int begin(struct fk_moon_server *s, int rc)
{
    s->begun = true;
    if (rc)
        return refuse(s);
    if (s->header) {
        s->left = 0;
        return put_header(s);
    }
    return s->opcode & FK_MOON_V2 ? put_status(s, FK_MOON_OK) : 0;
}

static int on_request(struct fk_moon_server *s)
{
    const uint8_t *p = fk_stream_data(&s->stream);
    int rc = fk_moon_get_request(p, &s->left, &s->address, &s->opcode);

    fk_stream_used(&s->stream, FK_MOON_REQUEST);
    if (rc)
        return rc;
    if ((s->opcode & ~FK_MOON_V2) == FK_MOON_WRITE) {   /* its bytes would follow: the end after the refusal */
        s->ending = true;
        s->m->t->delta.refused++;
        return refuse(s);
    }
    s->begun = false;
    rc = grant_next(s);
    return rc == -EINPROGRESS ? 0 : begin(s, rc);
}

/* Sends of the granted slots what goes; -EAGAIN: the socket is full, or the slot comes later. */
static int send_slots(struct fk_moon_server *s)
{
    while (s->left) {
        int rc = s->parked ? -EAGAIN : s->granted ? 0 : grant_next(s);
        if (rc)
            return rc == -EINPROGRESS ? -EAGAIN : rc;
        size_t n = fk_min(s->end - s->offset, SEND_CHUNK);
        ssize_t sent = send(s->stream.fd, (const char *)s->grant.data + s->offset, n, MSG_NOSIGNAL);
        if (sent < 0)
            return errno == EAGAIN || errno == EINTR ? -EAGAIN : -ECONNRESET;
        s->offset += (uint32_t)sent;
        s->address += (uint64_t)sent;
        s->left -= (uint64_t)sent;
        progress(s);
        if (s->offset == s->end && release(s))
            return -ENOENT;             /* what was sent may be wrong, and the wire can't say so: it ends */
    }
    return 0;
}

static int data_turn(struct fk_moon_server *s)
{
    int rc;

    for (;;) {
        rc = fk_stream_flush(&s->stream);
        if (!rc)
            rc = send_slots(s);
        if (rc || s->ending)
            return rc ? rc : -ESHUTDOWN;
        while (fk_stream_unread(&s->stream) < FK_MOON_REQUEST) {
            rc = fk_stream_read(&s->stream, 64 * FK_MOON_REQUEST);
            if (rc)
                return rc;
        }
        /* Small answers go out together. */
        while (!rc && !s->left && !s->ending && fk_stream_unread(&s->stream) >= FK_MOON_REQUEST)
            rc = on_request(s);
        if (rc)
            return rc;
    }
}

/* ---- handshake ---- */

static int handshake_turn(struct fk_moon_server *s)
{
    const char *body;
    size_t n;
    unsigned type;
    int rc = fk_stream_flush(&s->stream);

    if (rc || s->ending)
        return rc ? rc : -ESHUTDOWN;
    do
        rc = fk_stream_read(&s->stream, FK_MOON_MESSAGE_MAX + FK_MOON_MESSAGE_HEAD);
    while (!rc);
    int whole = fk_moon_message(fk_stream_data(&s->stream), fk_stream_unread(&s->stream), &type, &body, &n);
    if (whole != 1)
        return whole < 0 ? whole : rc;
    if (type != FK_MOON_METADATA)       /* RDMA's connecting, notifications, probes: not with us */
        return -EPROTO;
    rc = fk_moon_put_segment(s->m, &s->stream);
    if (rc)
        return rc;
    s->ending = true;
    rc = fk_stream_flush(&s->stream);
    return rc ? rc : -ESHUTDOWN;
}

static void take_turn(struct fk_moon_server *s)
{
    int rc = s->handshake ? handshake_turn(s) : data_turn(s);

    if (rc != -EAGAIN) {
        fk_moon_server_close(s->m, s);
        return;
    }
    bool full = fk_stream_unsent(&s->stream) || (s->left && !s->parked);
    fk_watch_change(s->m->t, &s->watch, full ? EPOLLOUT : s->parked ? EPOLLRDHUP : EPOLLIN);
    if (!full || s->until_us == UINT64_MAX)
        progress(s);
}

static void server_ready(struct fk_watch *w, uint32_t events)
{
    struct fk_moon_server *s = (struct fk_moon_server *)((char *)w - offsetof(struct fk_moon_server, watch));

    if (s->parked && !(events & EPOLLOUT))      /* the reader has gone */
        fk_moon_server_close(s->m, s);
    else
        take_turn(s);
}

static void slot_resume(struct fk_transport *t, struct fk_parked *k, int rc, const struct fk_grant *g)
{
    struct fk_moon_server *s = k->who;

    s->parked = NULL;
    if (!rc) {
        s->grant = *g;
        granted(s);
    }
    if (!s->begun)
        rc = begin(s, rc);
    if (rc)
        fk_moon_server_close(s->m, s);
    else
        take_turn(s);
}

static void accept_one(struct fk_mooncake *m, int listener, bool handshake)
{
    int fd;

    if (fk_tcp_accept(listener, m->t->timeout_us, &fd))
        return;
    struct fk_moon_server *s = m->n_servers < MAX_SERVERS ? calloc(1, sizeof(*s)) : NULL;
    if (!s) {
        close(fd);
        m->t->delta.turned_away++;
        return;
    }
    s->m = m;
    s->handshake = handshake;
    fk_stream_init(&s->stream, fd);
    s->next = m->servers;
    if (s->next)
        s->next->prev = s;
    m->servers = s;
    m->n_servers++;
    m->t->delta.connections++;
    progress(s);
    s->watch.ready = server_ready;
    if (fk_watch_add(m->t, &s->watch, fd, EPOLLIN))
        fk_moon_server_close(m, s);
}

static void handshake_accepted(struct fk_watch *w, uint32_t events)
{
    accept_one((struct fk_mooncake *)((char *)w - offsetof(struct fk_mooncake, handshake)), w->fd, true);
}

static void data_accepted(struct fk_watch *w, uint32_t events)
{
    accept_one((struct fk_mooncake *)((char *)w - offsetof(struct fk_mooncake, data)), w->fd, false);
}

int fk_moon_listen(struct fk_mooncake *m, const char *address, char *error, size_t bytes)
{
    char data[FK_TRANSPORT_ADDRESS_MAX], any[FK_TRANSPORT_ADDRESS_MAX];
    const char *colon = strrchr(address, ':');
    int rc = fk_tcp_listen(address, &m->handshake.fd, m->t->address, sizeof(m->t->address), error, bytes);

    if (rc)
        return rc;
    snprintf(any, sizeof(any), "%.*s:0", (int)(colon - address), address);
    rc = fk_tcp_listen(any, &m->data.fd, data, sizeof(data), error, bytes);
    if (rc)
        return rc;
    bool six = address[0] == '[';
    snprintf(m->host, sizeof(m->host), "%.*s", (int)(colon - address) - 2 * six, address + six);
    m->data_port = (uint16_t)atoi(strrchr(data, ':') + 1);
    m->handshake.ready = handshake_accepted;
    m->data.ready = data_accepted;
    rc = fk_watch_add(m->t, &m->handshake, m->handshake.fd, EPOLLIN);
    return rc ? rc : fk_watch_add(m->t, &m->data, m->data.fd, EPOLLIN);
}

uint64_t fk_moon_serve_tick(struct fk_mooncake *m, uint64_t now)
{
    uint64_t next_us = UINT64_MAX;

    for (struct fk_moon_server *s = m->servers, *next; s; s = next) {
        next = s->next;
        if (now >= s->until_us)
            fk_moon_server_close(m, s);
        else
            next_us = fk_min(next_us, s->until_us);
    }
    return next_us;
}
