/*
 * fabric.c - reads over libfabric. A TCP connection carries who is who, requests and answers (wire.h); the payload goes
 * through libfabric, which the owner tells to write it into the reader's buffer.
 *
 *   channel   one connection and one libfabric endpoint on each side, for reads in one direction. The reader
 *             opens it for his first read. Nobody else shares its endpoint, so when a read is late the reader closes
 *             the channel and knows that nothing writes to his buffers any more; new reads take a new one
 *   request   carries a key to exactly these bytes of the reader's memory, good for this read only
 *   answer    is sent when libfabric is done with the owner's bytes and he has looked at the generation again. A notice
 *             follows the write through libfabric, which keeps that order: when the reader has it, all bytes are in
 *             his memory. The read has ended when both are there: they take different ways, and come in any order
 *
 * A library's timeout is never waited for: the reads' deadlines are endpoint.c's, the owner's patience with a reader
 * is this file's. All in the transport's thread.
 */
#include <openssl/rand.h>
#include <stdio.h>

#include "base/clock.h"
#include "base/log.h"
#include "transport/endpoint.h"
#include "transport/fabric_lib.h"
#include "transport/wire.h"

#define DEFAULT_PROVIDER "tcp;ofi_rxm"
#define MAX_CHANNELS 1024u
#define UNSENT_MAX (1u << 20)           /* answers that a reader does not take */
#define RETRY_US 1000u                  /* the library said "again", or is connecting: its descriptor may stay silent */
#define SAY_EVERY_US 1000000u
#define BATCH 64u

struct job {                            /* owner: a granted block on its way, or one whose grant comes later */
    struct channel *channel;
    struct fk_request request;
    struct fk_grant grant;
    struct fk_parked *parked;
    uint64_t deadline_us;
    bool writing;                       /* libfabric has it */
    bool told;                          /* and the notice */
    bool written;                       /* has it no more */
    struct job *prev, *next;
};

struct job_list { struct job *first, *last; };

struct channel {
    struct fk_transport *t;
    struct channel *prev, *next;
    struct fk_watch sock, cq;
    struct fk_stream stream;
    struct fk_session session;
    struct fk_fabric_ep ep;
    uint64_t hello_until_us;
    bool connecting, open, dead;
    /* reader */
    struct fk_peer *peer;               /* NULL: this is the owner's side */
    bool suspect;                       /* a read was late: no new ones, closed with the last one in time */
    bool answered;
    /* owner */
    struct job_list jobs, parked;       /* oldest first; without a grant yet */
    uint32_t n_jobs, n_waiting;         /* of both; granted ones that libfabric has no room for */
    FK_VEC(struct fk_answer) answers;
};

struct fabric {
    struct fk_fabric lib;
    struct fk_hello_params hello;
    char *secret, *cluster;
    struct fk_transport *t;
    struct fk_watch listener;
    struct channel *channels;
    uint32_t n_channels;
    uint64_t said_us;
    FK_VEC(struct fk_fabric_region) new_regions;        /* under the transport's lock */
};

/* ---- opening, closing ---- */

static void free_fabric(struct fabric *f)
{
    if (f->listener.fd >= 0)
        close(f->listener.fd);
    fk_fabric_close(&f->lib);
    fk_vec_free(&f->new_regions);
    free(f->secret);
    free(f->cluster);
    free(f);
}

static void accepted(struct fk_watch *w, uint32_t events);

static int check_params(const struct fk_transport_params *p, char *error, size_t bytes)
{
    if (!p->secret || strlen(p->secret) < FK_SECRET_MIN)
        return fk_transport_fail(error, bytes, -EINVAL, "transport fabric: a secret of at least %u characters is "
                                 "needed, the same at all nodes", FK_SECRET_MIN);
    if (p->cluster && strlen(p->cluster) > 64)
        return fk_transport_fail(error, bytes, -EINVAL, "transport fabric: the cluster's name is longer than 64 bytes");
    return 0;
}

/* The interface of the fabric's own sockets: as configured, or where we listen. */
static int source_of(const struct fk_transport_params *p, char *out, size_t bytes)
{
    const char *colon = p->listen ? strrchr(p->listen, ':') : NULL;

    if (p->source || !colon) {
        snprintf(out, bytes, "%s", p->source ? p->source : "127.0.0.1");
        return 0;
    }
    bool six = p->listen[0] == '[';
    snprintf(out, bytes, "%.*s", (int)(colon - p->listen) - 2 * six, p->listen + six);
    return strcmp(out, "0.0.0.0") == 0 || strcmp(out, "::") == 0 ? -EINVAL : 0;
}

static int listen_at(struct fk_transport *t, struct fabric *f, const char *address, char *error, size_t bytes)
{
    if (!address)
        return 0;
    int rc = fk_tcp_listen(address, &f->listener.fd, t->address, sizeof(t->address), error, bytes);
    if (rc)
        return rc;
    f->listener.ready = accepted;
    return fk_watch_add(t, &f->listener, f->listener.fd, EPOLLIN);
}

static int fabric_open(struct fk_transport *t, const struct fk_transport_params *p, char *error, size_t bytes)
{
    char source[64];
    int rc = check_params(p, error, bytes);

    if (rc)
        return rc;
    if (source_of(p, source, sizeof(source)))
        return fk_transport_fail(error, bytes, -EINVAL, "transport fabric: \"%s\" names no interface; say which one "
                                 "others reach this node at (source)", p->listen);
    struct fabric *f = calloc(1, sizeof(*f));
    if (!f)
        return fk_transport_fail(error, bytes, -ENOMEM, "transport fabric: no memory");
    f->listener.fd = -1;
    f->t = t;
    f->secret = strdup(p->secret);
    f->cluster = strdup(p->cluster ? p->cluster : "");
    f->hello = (struct fk_hello_params){ f->secret, f->cluster, "fabric", p->node, p->epoch, t->max_in_flight };
    rc = f->secret && f->cluster ? fk_fabric_open(&f->lib, p->fabric ? p->fabric : DEFAULT_PROVIDER, source, error,
                                                  bytes) : -ENOMEM;
    if (!rc)
        rc = listen_at(t, f, p->listen, error, bytes);
    if (rc) {
        free_fabric(f);
        return rc;
    }
    t->priv = f;
    return 0;
}

static struct channel *channel_new(struct fk_transport *t, int fd, struct fk_peer *peer)
{
    struct fabric *f = t->priv;
    struct channel *c = f->n_channels < MAX_CHANNELS ? calloc(1, sizeof(*c)) : NULL;

    if (!c)
        return NULL;
    c->t = t;
    c->peer = peer;
    c->ep.cq_fd = -1;
    c->hello_until_us = t->now_us + t->timeout_us;
    fk_stream_init(&c->stream, fd);
    c->next = f->channels;
    if (c->next)
        c->next->prev = c;
    f->channels = c;
    f->n_channels++;
    t->delta.connections++;
    return c;
}

static void job_link(struct job_list *l, struct job *j)
{
    j->next = NULL;
    j->prev = l->last;
    *(l->last ? &l->last->next : &l->first) = j;
    l->last = j;
}

static void job_unlink(struct job_list *l, struct job *j)
{
    *(j->prev ? &j->prev->next : &l->first) = j->next;
    *(j->next ? &j->next->prev : &l->last) = j->prev;
}

static void job_free(struct channel *c, struct job *j)
{
    job_unlink(&c->jobs, j);
    c->n_jobs--;
    c->n_waiting -= !j->told;
    free(j);
}

static void parked_free(struct channel *c, struct job *j)
{
    job_unlink(&c->parked, j);
    c->n_jobs--;
    free(j);
}

static void unexpose(struct fk_op *op)
{
    struct fid_mr *mr = op->priv;

    op->priv = NULL;
    if (mr)
        fi_close(&mr->fid);
}

static void unexpose_all(struct fk_op_list *l, const struct channel *c)
{
    for (struct fk_op *op = l->head; op; op = op->next)
        if (op->channel == c)
            unexpose(op);
}

/* After this nothing reads from granted blocks or writes to buffers for this channel's sake. */
static void channel_close(struct channel *c, int rc)
{
    struct fk_transport *t = c->t;
    struct fabric *f = t->priv;

    fk_watch_remove(t, &c->sock);
    fk_watch_remove(t, &c->cq);
    fk_fabric_ep_close(&c->ep);
    fk_stream_close(&c->stream);
    while (c->jobs.first) {
        fk_grant_release(t, &c->jobs.first->request.block, &c->jobs.first->grant);
        job_free(c, c->jobs.first);
    }
    while (c->parked.first) {
        fk_grant_forget(c->parked.first->parked);
        parked_free(c, c->parked.first);
    }
    if (c->peer) {
        unexpose_all(&c->peer->sent, c);
        unexpose_all(&c->peer->late, c);
        fk_channel_end(t, c->peer, c, rc);
        if (c->peer->channel == c) {
            c->peer->channel = NULL;
            fk_peer_end_queued(t, c->peer, rc);
        }
    }
    fk_vec_free(&c->answers);
    *(c->prev ? &c->prev->next : &f->channels) = c->next;
    if (c->next)
        c->next->prev = c->prev;
    f->n_channels--;
    t->delta.connections--;
    fk_bury(t, c);
}

static void fabric_close(struct fk_transport *t)
{
    struct fabric *f = t->priv;

    while (f->channels)
        channel_close(f->channels, -ECANCELED);
    free_fabric(f);
}

/* Strangers shall not fill the log. */
static bool may_say(struct fabric *f)
{
    uint64_t now = f->t->now_us;

    if (f->said_us && now < f->said_us + SAY_EVERY_US)
        return false;
    f->said_us = now;
    return true;
}

static void hello_failed(struct channel *c, int rc)
{
    struct fabric *f = c->t->priv;
    char who[FK_TRANSPORT_ADDRESS_MAX] = "?";
    struct sockaddr_storage a;
    socklen_t n = sizeof(a);

    c->t->delta.turned_away += !c->peer;
    if (getpeername(c->stream.fd, (struct sockaddr *)&a, &n) == 0)
        fk_tcp_format(&a, who, sizeof(who));
    if (may_say(f))
        fk_warn("transport fabric: %s %s %s: %s", c->peer ? "node" : "a connection from", who,
                c->peer ? "will not talk to us" : "was turned away",
                rc == -EACCES ? fk_refusal_text(c->session.refusal)
                : rc == -ETIMEDOUT ? "no hello in time" : "it does not speak the protocol of FlexKV nodes");
}

/* Sends what goes; the rest when the socket has room. */
static int flush(struct channel *c)
{
    int rc = fk_stream_flush(&c->stream);

    if (rc == -EAGAIN)
        rc = fk_stream_unsent(&c->stream) > UNSENT_MAX ? -ETIMEDOUT : 0;
    if (!rc)
        fk_watch_change(c->t, &c->sock, EPOLLIN | (fk_stream_unsent(&c->stream) ? (uint32_t)EPOLLOUT : 0));
    return rc;
}

/* ---- the owner ---- */

/* bytes: that were written; the reader waits for them even if they are of no use. */
static void answer(struct channel *c, const struct fk_request *r, int rc, uint32_t bytes, uint64_t checksum)
{
    struct fk_answer a = { r->id, rc, bytes, rc ? 0 : checksum };

    if (fk_vec_push(&c->answers, a))
        c->dead = true;                 /* an answer that can't be given: the reader sees the connection end */
}

static int send_answers(struct channel *c)
{
    for (size_t i = 0; i < c->answers.len; i += FK_FRAME_REQUESTS) {
        uint32_t n = (uint32_t)fk_min(c->answers.len - i, (size_t)FK_FRAME_REQUESTS);
        int rc = fk_put_answers(&c->session, &c->stream, c->answers.data + i, n);
        if (rc)
            return rc;
    }
    c->answers.len = 0;
    return flush(c);
}

static void job_end(struct channel *c, struct job *j)
{
    int same = fk_grant_release(c->t, &j->request.block, &j->grant);

    answer(c, &j->request, same, j->grant.bytes, j->grant.checksum);
    job_free(c, j);
}

static void job_refused(struct channel *c, struct job *j, int rc)
{
    struct fabric *f = c->t->priv;

    fk_warn("transport fabric: a write of %u bytes was refused: %s", j->grant.bytes, f->lib.lib->strerror(-rc));
    fk_grant_release(c->t, &j->request.block, &j->grant);
    answer(c, &j->request, -EIO, 0, 0);
    job_free(c, j);
}

/* The write, then the notice; whatever libfabric has no room for is tried again. */
static void job_start(struct channel *c, struct job *j)
{
    struct fabric *f = c->t->priv;
    const struct fk_request *r = &j->request;
    struct fk_fabric_notice n = { r->id, r->rkey };
    int rc = 0;

    if (!j->writing) {
        rc = fk_fabric_write(&f->lib, &c->ep, j->grant.data, j->grant.bytes, r->rkey, r->raddr, j);
        j->writing = rc == 0;
        if (rc && rc != -EAGAIN) {
            job_refused(c, j, rc);
            return;
        }
    }
    if (rc == 0)
        rc = fk_fabric_notify(&c->ep, &n);
    if (rc == -EAGAIN)
        return;
    c->dead |= rc != 0;
    j->told = true;
    c->n_waiting--;
    if (j->written)
        job_end(c, j);
}

static void job_granted(struct channel *c, struct job *j)
{
    fk_grant_checksum(&j->grant, j->request.block.key);
    j->deadline_us = c->t->now_us + 2 * c->t->timeout_us;
    job_link(&c->jobs, j);
    if (c->n_waiting++ == 0)            /* else those that wait come first */
        job_start(c, j);
}

/* Later. What it leads to is sent in this round: tick() looks at every channel. */
static void job_resume(struct fk_transport *t, struct fk_parked *k, int rc, const struct fk_grant *g)
{
    struct job *j = k->who;
    struct channel *c = j->channel;

    if (rc) {
        answer(c, &j->request, rc, 0, 0);
        parked_free(c, j);
        return;
    }
    job_unlink(&c->parked, j);
    j->grant = *g;
    j->parked = NULL;
    job_granted(c, j);
}

static int serve(struct channel *c, const struct fk_request *r)
{
    if (c->n_jobs >= c->t->max_in_flight)       /* it was told how many */
        return -EPROTO;
    struct job *j = calloc(1, sizeof(*j));
    if (!j) {
        answer(c, r, -EAGAIN, 0, 0);
        return 0;
    }
    *j = (struct job){ .channel = c, .request = *r };
    int rc = fk_grant_take(c->t, &r->block, &j->grant, &j->parked);
    if (rc && rc != -EINPROGRESS) {
        answer(c, r, rc, 0, 0);
        free(j);
        return 0;
    }
    c->n_jobs++;
    if (!rc) {
        job_granted(c, j);
        return 0;
    }
    j->parked->resume = job_resume;
    j->parked->who = j;
    job_link(&c->parked, j);
    return 0;
}

static int on_read(struct channel *c, const uint8_t *payload, uint32_t bytes)
{
    int n = fk_request_count(bytes), rc = n < 0 ? n : 0;
    struct fk_request r;

    for (int i = 0; i < n && !rc; i++) {
        rc = fk_request_get(payload, (uint32_t)i, &r);
        if (!rc)
            rc = serve(c, &r);
    }
    return rc;
}

static void job_done(struct channel *c, struct job *j, int rc)
{
    j->written = true;
    if (rc) {                           /* the endpoint is of no use any more */
        fk_debug("transport fabric: a write failed: %d", rc);
        c->dead = true;
    } else if (j->told) {
        job_end(c, j);
    }
}

static void retry_waiting(struct channel *c)
{
    for (struct job *j = c->jobs.first, *next; j && c->n_waiting; j = next) {
        uint32_t before = c->n_waiting;
        next = j->next;
        if (j->told)
            continue;
        job_start(c, j);
        if (c->n_waiting == before)
            return;
    }
}

/* ---- the reader ---- */

/* What a read's words hold: how far it is, and the checksum. */
enum { ARRIVED = 1, ANSWERED = 2 };

static void read_end(struct channel *c, struct fk_op *op, int rc)
{
    unexpose(op);
    if (rc)
        fk_op_end(c->t, op, rc);
    else
        fk_op_arrived(c->t, op, op->word[1]);
}

static struct fk_op *read_of(struct channel *c, uint64_t id, uint64_t already)
{
    struct fk_op *op = fk_op_find(c->t, id);

    return op && op->channel == c && op->state != FK_OP_QUEUED && !(op->word[0] & already) ? op : NULL;
}

static int on_answer(struct channel *c, const uint8_t *payload, uint32_t bytes)
{
    int n = fk_answer_count(bytes);
    struct fk_answer a;

    for (int i = 0; i < n; i++) {
        if (fk_answer_get(payload, (uint32_t)i, &a))
            return -EPROTO;
        struct fk_op *op = read_of(c, a.id, ANSWERED);
        if (!op || (a.bytes ? a.bytes != op->r.block.bytes : a.rc == 0))
            return -EPROTO;
        c->answered = true;
        if (!a.bytes || op->word[0] & ARRIVED) {
            op->word[1] = a.checksum;
            read_end(c, op, a.rc);
        } else {
            op->word[0] |= ANSWERED | (uint64_t)(uint32_t)-a.rc << 8;
            op->word[1] = a.checksum;
        }
    }
    return n < 0 ? n : 0;
}

/* All bytes of a read are there. Anybody may send to a libfabric endpoint, but nobody else knows the key. */
static void on_arrival(struct channel *c, const struct fk_fabric_notice *n)
{
    struct fk_op *op = read_of(c, n->id, ARRIVED);

    if (!op || n->key != op->key)
        return;
    c->answered = true;
    if (op->word[0] & ANSWERED)
        read_end(c, op, -(int)(op->word[0] >> 8));
    else
        op->word[0] |= ARRIVED;
}

static int send_batch(struct channel *c)
{
    struct fabric *f = c->t->priv;
    struct fk_request r[BATCH];
    uint32_t n = 0;
    struct fk_op *op;

    while (n < BATCH && c->peer->sent.n < c->session.peer_in_flight && (op = fk_op_next(c->t, c->peer, c))) {
        struct fid_mr *mr = NULL;
        int rc = fk_fabric_expose(&f->lib, op->r.buffer, op->r.block.bytes, &mr, &r[n].rkey, &r[n].raddr);
        if (rc) {
            fk_warn("transport fabric: %u bytes can't be registered: %s", op->r.block.bytes,
                    f->lib.lib->strerror(-rc));
            fk_op_end(c->t, op, -EIO);
            continue;
        }
        op->priv = mr;
        op->key = r[n].rkey;
        r[n].id = op->id;
        r[n++].block = op->r.block;
    }
    int rc = n ? fk_put_requests(&c->session, &c->stream, r, n) : 0;
    return rc ? rc : n == BATCH;
}

static void sock_ready(struct fk_watch *w, uint32_t events);

static void connect_to(struct fk_transport *t, struct fk_peer *p)
{
    int fd, rc = fk_tcp_connect(p->address, t->timeout_us, &fd);

    if (rc) {
        fk_peer_end_queued(t, p, rc);
        return;
    }
    struct channel *c = channel_new(t, fd, p);
    if (!c) {
        close(fd);
        fk_peer_end_queued(t, p, -ENOMEM);
        return;
    }
    p->channel = c;
    c->connecting = true;
    c->sock.ready = sock_ready;
    if (fk_watch_add(t, &c->sock, fd, EPOLLOUT))
        channel_close(c, -ENOMEM);
}

static void fabric_pump(struct fk_transport *t, struct fk_peer *p)
{
    struct channel *c = p->channel;
    int rc;

    if (!c) {
        connect_to(t, p);
        return;
    }
    if (!c->open)
        return;
    do
        rc = send_batch(c);
    while (rc == 1);
    if (!rc)
        rc = flush(c);
    if (rc)
        channel_close(c, -ECONNRESET);
}

static void fabric_expire(struct fk_transport *t, struct fk_op *op)
{
    struct channel *c = op->channel;

    unexpose(op);                       /* what begins to arrive from now on is refused */
    fk_op_late(t, op);
    c->suspect = true;
    if (c->peer->channel == c)
        c->peer->channel = NULL;
}

static void fabric_drop(struct fk_transport *t, struct fk_peer *p)
{
    struct fabric *f = t->priv;

    for (struct channel *c = f->channels, *next; c; c = next) {
        next = c->next;
        if (c->peer == p)
            channel_close(c, -ECANCELED);
    }
}

/* ---- both ---- */

static void cq_ready(struct fk_watch *w, uint32_t events)
{
    /* tick() looks at all completion queues: making progress on one may complete work of another. */
}

static int open_endpoint(struct channel *c)
{
    struct fabric *f = c->t->priv;
    int rc = fk_fabric_ep_open(&f->lib, &c->ep);

    if (!rc) {
        c->cq.ready = cq_ready;
        rc = fk_watch_add(c->t, &c->cq, c->ep.cq_fd, EPOLLIN);
        if (rc)
            c->cq.ready = NULL;
    }
    return rc;
}

static int reader_connected(struct channel *c)
{
    struct fabric *f = c->t->priv;
    int rc = fk_tcp_connected(c->stream.fd);

    c->connecting = false;
    if (!rc)
        rc = open_endpoint(c);
    if (!rc)
        rc = fk_fabric_ep_listen(&c->ep);
    c->session.endpoint_len = sizeof(c->session.endpoint);
    if (!rc)
        rc = fk_fabric_ep_name(&c->ep, c->session.endpoint, &c->session.endpoint_len);
    if (!rc)
        rc = fk_session_start(&c->session, &f->hello, true, &c->stream);
    return rc ? rc : flush(c);
}

/* The session is there. */
static int session_open(struct channel *c)
{
    struct fabric *f = c->t->priv;
    int rc = 0;

    if (!c->peer) {
        rc = open_endpoint(c);
        if (!rc)
            rc = fk_fabric_ep_peer(&f->lib, &c->ep, c->session.endpoint, c->session.endpoint_len);
    }
    c->open = rc == 0;
    return rc;
}

static int on_frame(struct channel *c, unsigned type, const uint8_t *payload, uint32_t bytes)
{
    if (c->open)
        return c->peer && type == FK_FRAME_ANSWER ? on_answer(c, payload, bytes)
             : !c->peer && type == FK_FRAME_READ ? on_read(c, payload, bytes) : -EPROTO;
    int rc = fk_session_hello(&c->session, type, payload, bytes, &c->stream);
    if (rc == 1)
        rc = session_open(c);
    (void)flush(c);                     /* a refusal too */
    return rc;
}

static int read_frames(struct channel *c)
{
    const uint8_t *payload;
    uint32_t bytes;
    unsigned type;
    int rc = fk_stream_read(&c->stream, FK_FRAME_HEAD + FK_FRAME_MAX + FK_FRAME_MAC);

    if (rc)
        return rc == -EAGAIN ? 0 : rc;
    while ((rc = fk_frame_next(&c->session, &c->stream, &type, &payload, &bytes)) == 1) {
        rc = on_frame(c, type, payload, bytes);
        if (rc)
            return rc;
    }
    return rc;
}

static void sock_ready(struct fk_watch *w, uint32_t events)
{
    struct channel *c = (struct channel *)((char *)w - offsetof(struct channel, sock));
    bool was_open = c->open;
    int rc = 0;

    if (c->connecting)
        rc = reader_connected(c);
    else if (events & EPOLLOUT)
        rc = flush(c);
    if (!rc && events & (EPOLLIN | EPOLLHUP | EPOLLERR) && !(events == EPOLLOUT))
        rc = read_frames(c);
    if (!rc && c->answers.len)
        rc = send_answers(c);
    if (!rc)
        return;
    if (!was_open && (rc == -EPROTO || rc == -EACCES))
        hello_failed(c, rc);
    channel_close(c, rc == -EBADMSG ? -EPROTO : rc);
}

static void accepted(struct fk_watch *w, uint32_t events)
{
    struct fabric *f = (struct fabric *)((char *)w - offsetof(struct fabric, listener));
    struct fk_transport *t = f->t;
    int fd;

    if (fk_tcp_accept(w->fd, t->timeout_us, &fd))
        return;
    struct channel *c = channel_new(t, fd, NULL);
    if (!c) {
        close(fd);
        t->delta.turned_away++;
        return;
    }
    c->sock.ready = sock_ready;
    if (fk_session_start(&c->session, &f->hello, false, &c->stream) ||
        fk_watch_add(t, &c->sock, fd, EPOLLIN))
        channel_close(c, -ENOMEM);
}

static int poll_endpoint(struct channel *c)
{
    struct fk_fabric_event e;
    int rc;

    while ((rc = fk_fabric_poll(&c->ep, &e)) == 1) {
        if (e.arrived)
            on_arrival(c, &e.notice);
        else if (e.context && !c->peer)
            job_done(c, e.context, e.rc);
    }
    if (rc < 0)
        return rc;
    retry_waiting(c);
    return c->dead ? -ECONNRESET : c->answers.len ? send_answers(c) : 0;
}

static int check_times(struct channel *c, uint64_t now, uint64_t *next)
{
    if (!c->open) {
        *next = fk_min(*next, c->hello_until_us);
        if (now >= c->hello_until_us)
            hello_failed(c, -ETIMEDOUT);
        return now >= c->hello_until_us ? -ETIMEDOUT : 0;
    }
    if (c->suspect && fk_channel_idle(c->peer, c, false))
        return -ETIMEDOUT;
    if (c->jobs.first) {
        *next = fk_min(*next, c->jobs.first->deadline_us);
        if (now >= c->jobs.first->deadline_us)
            return -ETIMEDOUT;
    }
    if (c->n_waiting || (c->peer && !c->answered && !fk_channel_idle(c->peer, c, false)))
        *next = fk_min(*next, now + RETRY_US);
    return 0;
}

static void take_regions(struct fk_transport *t, struct fabric *f)
{
    pthread_mutex_lock(&t->lock);
    for (size_t i = 0; i < f->new_regions.len; i++) {
        int rc = fk_fabric_region(&f->lib, f->new_regions.data[i].base, f->new_regions.data[i].bytes);
        if (rc)
            fk_warn("transport fabric: %zu bytes can't be registered: %s", f->new_regions.data[i].bytes,
                    f->lib.lib->strerror(-rc));
    }
    f->new_regions.len = 0;
    pthread_mutex_unlock(&t->lock);
}

static int fabric_region(struct fk_transport *t, void *base, size_t bytes)
{
    struct fabric *f = t->priv;
    struct fk_fabric_region r = { .base = base, .bytes = bytes };

    return fk_vec_push(&f->new_regions, r);
}

static uint64_t fabric_tick(struct fk_transport *t, uint64_t now)
{
    struct fabric *f = t->priv;
    uint64_t next_us = UINT64_MAX;

    take_regions(t, f);
    for (struct channel *c = f->channels, *next; c; c = next) {
        next = c->next;
        int rc = c->ep.cq ? poll_endpoint(c) : 0;
        if (!rc)
            rc = check_times(c, now, &next_us);
        if (rc)
            channel_close(c, rc);
    }
    return next_us;
}

static bool fabric_may_sleep(struct fk_transport *t)
{
    struct fabric *f = t->priv;

    for (struct channel *c = f->channels; c; c = c->next)
        if (c->ep.cq && !fk_fabric_may_sleep(&f->lib, &c->ep))
            return false;
    return true;
}

const struct fk_transport_ops fk_transport_fabric = {
    .name = "fabric", .help = "libfabric: tcp, verbs, shm, EFA",
    .open = fabric_open, .close = fabric_close, .region = fabric_region, .pump = fabric_pump,
    .expire = fabric_expire, .drop = fabric_drop, .tick = fabric_tick, .may_sleep = fabric_may_sleep,
};
