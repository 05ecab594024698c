/*
 * members.c - see members.h.
 */
#include "transport/members.h"

#include <stdio.h>

#include "base/clock.h"
#include "base/log.h"

#define MAX_CHANNELS 1024u
#define UNSENT_MAX (1u << 20)           /* answers that a reader does not take */
#define RETRY_US 1000u                  /* a library said "again", or is connecting: its descriptor may stay silent */
#define SAY_EVERY_US 1000000u
#define BATCH 64u

/* ---- opening, closing ---- */

static void accepted(struct fk_watch *w, uint32_t events);

int fk_members_open(struct fk_members *m, struct fk_transport *t, const struct fk_transport_params *p,
                    const struct fk_mover *mover, const char *kind, char *error, size_t bytes)
{
    const char *name = t->ops->name;

    m->t = t;
    m->mover = mover;
    m->listener.fd = -1;
    snprintf(m->kind, sizeof(m->kind), "%s", kind);
    if (!p->secret || strlen(p->secret) < FK_SECRET_MIN)
        return fk_fail(error, bytes, -EINVAL, "transport %s: a secret of at least %u characters is "
                       "needed, the same at all nodes", name, FK_SECRET_MIN);
    if (p->cluster && strlen(p->cluster) > 64)
        return fk_fail(error, bytes, -EINVAL, "transport %s: the cluster's name is longer than 64 bytes", name);
    m->secret = strdup(p->secret);
    m->cluster = strdup(p->cluster ? p->cluster : "");
    m->hello = (struct fk_hello_params){ m->secret, m->cluster, m->kind, p->node, p->epoch, t->max_in_flight };
    return m->secret && m->cluster ? 0 : fk_fail(error, bytes, -ENOMEM, "transport %s: no memory", name);
}

int fk_members_source(const struct fk_transport_params *p, char *out, size_t out_bytes, char *error, size_t bytes)
{
    const char *colon = p->listen ? strrchr(p->listen, ':') : NULL;

    if (p->source || !colon) {
        snprintf(out, out_bytes, "%s", p->source ? p->source : "127.0.0.1");
        return 0;
    }
    bool six = p->listen[0] == '[';
    snprintf(out, out_bytes, "%.*s", (int)(colon - p->listen) - 2 * six, p->listen + six);
    return strcmp(out, "0.0.0.0") && strcmp(out, "::") ? 0
           : fk_fail(error, bytes, -EINVAL, "transport %s: \"%s\" names no interface; say which one others reach "
                     "this node at (source)", p->transport, p->listen);
}

int fk_members_listen(struct fk_members *m, const char *address, char *error, size_t bytes)
{
    if (!address)
        return 0;
    int rc = fk_tcp_listen(address, &m->listener.fd, m->t->address, sizeof(m->t->address), error, bytes);
    if (rc)
        return rc;
    m->listener.ready = accepted;
    return fk_watch_add(m->t, &m->listener, m->listener.fd, EPOLLIN);
}

static struct fk_channel *channel_new(struct fk_members *m, int fd, struct fk_peer *peer)
{
    struct fk_channel *c = m->n_channels < MAX_CHANNELS ? calloc(1, m->mover->channel_bytes) : NULL;

    if (!c)
        return NULL;
    c->m = m;
    c->peer = peer;
    c->hello_until_us = m->t->now_us + m->t->timeout_us;
    fk_stream_init(&c->stream, fd);
    c->next = m->channels;
    if (c->next)
        c->next->prev = c;
    m->channels = c;
    m->n_channels++;
    m->t->delta.connections++;
    return c;
}

static void job_link(struct fk_job_list *l, struct fk_job *j)
{
    j->next = NULL;
    j->prev = l->last;
    *(l->last ? &l->last->next : &l->first) = j;
    l->last = j;
}

static void job_unlink(struct fk_job_list *l, struct fk_job *j)
{
    *(j->prev ? &j->prev->next : &l->first) = j->next;
    *(j->next ? &j->next->prev : &l->last) = j->prev;
}

static void job_free(struct fk_channel *c, struct fk_job *j)
{
    job_unlink(&c->jobs, j);
    c->n_jobs--;
    c->n_waiting -= !j->told;
    if (c->m->mover->forget)
        c->m->mover->forget(j);
    free(j);
}

static void parked_free(struct fk_channel *c, struct fk_job *j)
{
    job_unlink(&c->parked, j);
    c->n_jobs--;
    free(j);
}

static void unexpose_all(struct fk_op_list *l, const struct fk_channel *c)
{
    for (struct fk_op *op = l->head; op; op = op->next)
        if (op->channel == c)
            c->m->mover->unexpose(op);
}

/* After this nothing reads from granted blocks or writes to buffers for this channel's sake. */
static void channel_close(struct fk_channel *c, int rc)
{
    struct fk_members *m = c->m;
    struct fk_transport *t = m->t;

    fk_watch_remove(t, &c->sock);
    m->mover->close(c);
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
    *(c->prev ? &c->prev->next : &m->channels) = c->next;
    if (c->next)
        c->next->prev = c->prev;
    m->n_channels--;
    t->delta.connections--;
    fk_bury(t, c);
}

void fk_members_close(struct fk_members *m)
{
    while (m->channels)
        channel_close(m->channels, -ECANCELED);
    if (m->listener.fd >= 0)
        close(m->listener.fd);
    free(m->secret);
    free(m->cluster);
}

/* Strangers shall not fill the log. */
static bool may_say(struct fk_members *m)
{
    uint64_t now = m->t->now_us;

    if (m->said_us && now < m->said_us + SAY_EVERY_US)
        return false;
    m->said_us = now;
    return true;
}

static void hello_failed(struct fk_channel *c, int rc)
{
    struct fk_members *m = c->m;
    char who[FK_TRANSPORT_ADDRESS_MAX] = "?";
    struct sockaddr_storage a;
    socklen_t n = sizeof(a);

    c->m->t->delta.turned_away += !c->peer;
    if (getpeername(c->stream.fd, (struct sockaddr *)&a, &n) == 0)
        fk_tcp_format(&a, who, sizeof(who));
    if (may_say(m))
        fk_warn("transport %s: %s %s %s: %s", m->t->ops->name, c->peer ? "node" : "a connection from", who,
                c->peer ? "will not talk to us" : "was turned away",
                rc == -EACCES ? fk_refusal_text(c->session.refusal)
                : rc == -ETIMEDOUT ? "no hello in time" : "it does not speak the protocol of FlexKV nodes");
}

/* Sends what goes; the rest when the socket has room. */
int fk_channel_flush(struct fk_channel *c)
{
    int rc = c->mid_payload ? -EAGAIN : fk_stream_flush(&c->stream);

    if (rc == -EAGAIN)
        rc = fk_stream_unsent(&c->stream) > UNSENT_MAX ? -ETIMEDOUT : 0;
    if (!rc)
        fk_watch_change(c->m->t, &c->sock, EPOLLIN | (fk_stream_unsent(&c->stream) || c->mid_payload ?
                                                      (uint32_t)EPOLLOUT : 0));
    return rc;
}

/* ---- the owner ---- */

/* bytes: that were written; the reader waits for them even if they are of no use. */
static void answer(struct fk_channel *c, const struct fk_request *r, int rc, uint32_t bytes, uint64_t checksum)
{
    struct fk_answer a = { r->id, rc, bytes, rc ? 0 : checksum };

    if (fk_vec_push(&c->answers, a))
        c->dead = true;                 /* an answer that can't be given: the reader sees the connection end */
}

int fk_channel_put_answers(struct fk_channel *c)
{
    for (size_t i = 0; i < c->answers.len; i += FK_FRAME_REQUESTS) {
        uint32_t n = (uint32_t)fk_min(c->answers.len - i, (size_t)FK_FRAME_REQUESTS);
        int rc = fk_put_answers(&c->session, &c->stream, c->answers.data + i, n);
        if (rc)
            return rc;
    }
    c->answers.len = 0;
    return 0;
}

static int send_answers(struct fk_channel *c)
{
    int rc = c->mid_payload ? 0 : fk_channel_put_answers(c);

    return rc ? rc : fk_channel_flush(c);
}

static void job_end(struct fk_channel *c, struct fk_job *j)
{
    int same = fk_grant_release(c->m->t, &j->request.block, &j->grant);

    answer(c, &j->request, same, j->grant.bytes, j->grant.checksum);
    job_free(c, j);
}

static void job_refused(struct fk_channel *c, struct fk_job *j, int rc)
{
    struct fk_members *m = c->m;

    fk_warn("transport %s: a write of %u bytes was refused: %s", m->t->ops->name, j->grant.bytes,
            m->mover->strerror(rc));
    fk_grant_release(c->m->t, &j->request.block, &j->grant);
    answer(c, &j->request, -EIO, 0, 0);
    job_free(c, j);
}

/* Whatever the mover has no room for is tried again. */
static void job_start(struct fk_channel *c, struct fk_job *j)
{
    int rc = c->m->mover->write(c, j);

    if (rc == -EAGAIN)
        return;
    if (rc) {
        job_refused(c, j, rc);
        return;
    }
    j->told = true;
    c->n_waiting--;
    if (j->written)
        job_end(c, j);
}

static void job_granted(struct fk_channel *c, struct fk_job *j)
{
    if (!c->m->mover->sums)
        fk_grant_checksum(&j->grant, j->request.block.key);
    j->deadline_us = c->m->t->now_us + 2 * c->m->t->timeout_us;
    job_link(&c->jobs, j);
    if (c->n_waiting++ == 0)            /* else those that wait come first */
        job_start(c, j);
}

/* Later. What it leads to is sent in this round: tick() looks at every channel. */
static void job_resume(struct fk_transport *t, struct fk_parked *k, int rc, const struct fk_grant *g)
{
    struct fk_job *j = k->who;
    struct fk_channel *c = j->channel;

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

static int serve(struct fk_channel *c, const struct fk_request *r)
{
    if (c->dead)
        return -ECONNRESET;
    if (c->n_jobs >= c->m->t->max_in_flight)       /* it was told how many */
        return -EPROTO;
    struct fk_job *j = calloc(1, sizeof(*j));
    if (!j) {
        answer(c, r, -EAGAIN, 0, 0);
        return 0;
    }
    *j = (struct fk_job){ .channel = c, .request = *r };
    int rc = fk_grant_take(c->m->t, &r->block, &j->grant, &j->parked);
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

static int on_read(struct fk_channel *c, const uint8_t *payload, uint32_t bytes)
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

void fk_job_done(struct fk_channel *c, struct fk_job *j, int rc)
{
    j->written = true;
    if (rc) {                           /* the endpoint is of no use any more */
        fk_debug("transport %s: a write failed: %s", c->m->t->ops->name, c->m->mover->strerror(rc));
        c->dead = true;
    } else if (j->told) {
        job_end(c, j);
    }
}

static void retry_waiting(struct fk_channel *c)
{
    for (struct fk_job *j = c->jobs.first, *next; j && c->n_waiting; j = next) {
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
enum { ARRIVED = 1, ANSWERED = 2, SUMMED = 4 };

static void read_end(struct fk_channel *c, struct fk_op *op, int rc)
{
    c->m->mover->unexpose(op);
    if (rc)
        fk_op_end(c->m->t, op, rc);
    else if (op->word[0] & SUMMED)
        fk_op_summed(c->m->t, op, op->word[1], op->key);
    else
        fk_op_arrived(c->m->t, op, op->word[1]);
}

static struct fk_op *read_of(struct fk_channel *c, uint64_t id, uint64_t already)
{
    struct fk_op *op = fk_op_find(c->m->t, id);

    return op && op->channel == c && op->state != FK_OP_QUEUED && !(op->word[0] & already) ? op : NULL;
}

struct fk_op *fk_channel_read(struct fk_channel *c, uint64_t id)
{
    return read_of(c, id, ANSWERED | SUMMED);
}

/* The key, which nobody else needs any more, gives its place to the sum. */
void fk_read_summed(struct fk_channel *c, struct fk_op *op, uint64_t sum)
{
    op->word[0] |= SUMMED;
    op->key = sum;
    c->answered = true;
}

static int on_answer(struct fk_channel *c, const uint8_t *payload, uint32_t bytes)
{
    int n = fk_answer_count(bytes);
    struct fk_answer a;

    for (int i = 0; i < n; i++) {
        if (fk_answer_get(payload, (uint32_t)i, &a))
            return -EPROTO;
        struct fk_op *op = read_of(c, a.id, ANSWERED);
        if (!op || (a.bytes ? a.bytes != op->r.block.bytes : a.rc == 0) ||
            (c->m->mover->sums && !!a.bytes != !!(op->word[0] & SUMMED)))
            return -EPROTO;
        c->answered = true;
        if (!a.bytes || op->word[0] & ARRIVED || !c->m->mover->notices) {
            op->word[1] = a.checksum;
            read_end(c, op, a.rc);
        } else {
            op->word[0] |= ANSWERED | (uint64_t)(uint32_t)-a.rc << 8;
            op->word[1] = a.checksum;
        }
    }
    return n < 0 ? n : 0;
}

/* Anybody may send to a mover's endpoint, but nobody else knows the key. */
void fk_read_noticed(struct fk_channel *c, uint64_t id, uint64_t key)
{
    struct fk_op *op = read_of(c, id, ARRIVED);

    if (!op || key != op->key)
        return;
    c->answered = true;
    if (op->word[0] & ANSWERED)
        read_end(c, op, -(int)(op->word[0] >> 8));
    else
        op->word[0] |= ARRIVED;
}

static int send_batch(struct fk_channel *c)
{
    struct fk_request r[BATCH];
    uint32_t n = 0;
    struct fk_op *op;

    while (n < BATCH && c->peer->sent.n < c->session.peer_in_flight && (op = fk_op_next(c->m->t, c->peer, c))) {
        int rc = c->m->mover->expose(c, op, &r[n]);
        if (rc) {
            fk_warn("transport %s: %u bytes can't be written to: %s", c->m->t->ops->name, op->r.block.bytes,
                    c->m->mover->strerror(rc));
            fk_op_end(c->m->t, op, -EIO);
            continue;
        }
        op->key = r[n].rkey;
        r[n].id = op->id;
        r[n++].block = op->r.block;
    }
    int rc = n ? fk_put_requests(&c->session, &c->stream, r, n) : 0;
    return rc ? rc : n == BATCH;
}

static void sock_ready(struct fk_watch *w, uint32_t events);

static void connect_to(struct fk_members *m, struct fk_peer *p)
{
    struct fk_transport *t = m->t;
    int fd, rc = fk_tcp_connect(p->address, t->timeout_us, &fd);

    if (rc) {
        fk_peer_end_queued(t, p, rc);
        return;
    }
    struct fk_channel *c = channel_new(m, fd, p);
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

void fk_members_pump(struct fk_transport *t, struct fk_peer *p)
{
    struct fk_channel *c = p->channel;
    int rc;

    if (!c) {
        connect_to(t->priv, p);
        return;
    }
    if (!c->open)
        return;
    do
        rc = send_batch(c);
    while (rc == 1);
    if (!rc)
        rc = fk_channel_flush(c);
    if (rc)
        channel_close(c, -ECONNRESET);
}

void fk_members_expire(struct fk_transport *t, struct fk_op *op)
{
    struct fk_channel *c = op->channel;

    c->m->mover->unexpose(op);          /* what begins to arrive from now on is refused */
    fk_op_late(t, op);
    c->suspect = true;
    if (c->peer->channel == c)
        c->peer->channel = NULL;
}

bool fk_members_drop(struct fk_transport *t, struct fk_peer *p)
{
    struct fk_members *m = t->priv;

    for (struct fk_channel *c = m->channels, *next; c; c = next) {
        next = c->next;
        if (c->peer == p)
            channel_close(c, -ECANCELED);
    }
    return true;
}

/* ---- both ---- */

static int reader_connected(struct fk_channel *c)
{
    int rc = fk_tcp_connected(c->stream.fd);

    c->connecting = false;
    if (!rc)
        rc = c->m->mover->reader_open(c);
    if (!rc)
        rc = fk_session_start(&c->session, &c->m->hello, true, &c->stream);
    return rc ? rc : fk_channel_flush(c);
}

static int on_frame(struct fk_channel *c, unsigned type, const uint8_t *payload, uint32_t bytes)
{
    if (c->open)
        return c->peer && type == FK_FRAME_ANSWER ? on_answer(c, payload, bytes)
             : !c->peer && type == FK_FRAME_READ ? on_read(c, payload, bytes)
             : c->m->mover->frame ? c->m->mover->frame(c, type, payload, bytes) : -EPROTO;
    int rc = fk_session_hello(&c->session, type, payload, bytes, &c->stream);
    if (rc == 1) {
        rc = c->m->mover->session_open(c);
        c->open = rc == 0;
    }
    (void)fk_channel_flush(c);                     /* a refusal too */
    return rc;
}

static int read_frames(struct fk_channel *c)
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

/* The same where payloads come between the frames. */
static int read_mixed(struct fk_channel *c)
{
    const struct fk_mover *mover = c->m->mover;
    uint32_t budget = mover->turn_bytes, bytes;
    const uint8_t *payload;
    unsigned type;

    for (;;) {
        int rc = mover->payload(c, &budget);
        if (rc == 1)
            rc = fk_frame_next(&c->session, &c->stream, &type, &payload, &bytes);
        else
            return rc;
        if (rc == 1)
            rc = on_frame(c, type, payload, bytes);
        else if (rc == 0 && !budget)
            return 0;
        else if (rc == 0) {
            rc = fk_stream_read(&c->stream, fk_stream_unread(&c->stream) + mover->heads_bytes);
            if (rc == -EAGAIN)
                return 0;
        }
        if (rc)
            return rc;
    }
}

static void sock_ready(struct fk_watch *w, uint32_t events)
{
    struct fk_channel *c = (struct fk_channel *)((char *)w - offsetof(struct fk_channel, sock));
    bool was_open = c->open;
    int rc = 0;

    if (c->connecting)
        rc = reader_connected(c);
    else if (events & EPOLLOUT)
        rc = fk_channel_flush(c);
    if (!rc && events & (EPOLLIN | EPOLLHUP | EPOLLERR) && !(events == EPOLLOUT))
        rc = c->m->mover->payload && c->peer && c->open ? read_mixed(c) : read_frames(c);
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
    struct fk_members *m = (struct fk_members *)((char *)w - offsetof(struct fk_members, listener));
    struct fk_transport *t = m->t;
    int fd;

    if (fk_tcp_accept(w->fd, t->timeout_us, &fd))
        return;
    struct fk_channel *c = channel_new(m, fd, NULL);
    if (!c) {
        close(fd);
        t->delta.turned_away++;
        return;
    }
    c->sock.ready = sock_ready;
    if (fk_session_start(&c->session, &m->hello, false, &c->stream) ||
        fk_watch_add(t, &c->sock, fd, EPOLLIN))
        channel_close(c, -ENOMEM);
}

static int move(struct fk_channel *c, uint64_t now, uint64_t *next)
{
    int rc = c->m->mover->poll(c, now, next);

    if (rc)
        return rc;
    retry_waiting(c);
    return c->dead ? -ECONNRESET : c->answers.len ? send_answers(c) : 0;
}

static int check_times(struct fk_channel *c, uint64_t now, uint64_t *next)
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

uint64_t fk_members_tick(struct fk_transport *t, uint64_t now)
{
    struct fk_members *m = t->priv;
    uint64_t next_us = UINT64_MAX;

    for (struct fk_channel *c = m->channels, *next; c; c = next) {
        next = c->next;
        int rc = c->moving ? move(c, now, &next_us) : 0;
        if (!rc)
            rc = check_times(c, now, &next_us);
        if (rc)
            channel_close(c, rc);
    }
    return next_us;
}
