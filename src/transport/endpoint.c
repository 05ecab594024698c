/*
 * endpoint.c - what every transport shares: reads, their deadlines, the thread. See endpoint.h.
 */
#include "transport/endpoint.h"

#include <stdio.h>
#include <sys/eventfd.h>

#include "base/checksum.h"
#include "base/clock.h"
#include "base/log.h"
#include "base/plant.h"

#define MAX_EVENTS 64
#define DEFAULT_IN_FLIGHT 32u
#define DEFAULT_QUEUED 65536u
#define DEFAULT_TIMEOUT_MS 2000u
#define MARGIN_MAX_US 20000u            /* reads are given up so much before their deadline: the caller shall
                                           know by then */

static const struct fk_transport_ops *const transports[] = {
#ifdef FK_HAVE_FABRIC
    &fk_transport_fabric,
#endif
    &fk_transport_nixl,
    &fk_transport_tcp, &fk_transport_mooncake,
    &fk_transport_loopback,
};
#ifdef FK_HAVE_FABRIC
#define WITHOUT ""
#else
#define WITHOUT " (and fabric, if built with libfabric's headers)"
#endif

/* ---- lists ---- */

static void list_add(struct fk_op_list *l, struct fk_op *op)
{
    op->next = NULL;
    op->prev = l->tail;
    *(l->tail ? &l->tail->next : &l->head) = op;
    l->tail = op;
    l->n++;
}

static void list_remove(struct fk_op_list *l, struct fk_op *op)
{
    *(op->prev ? &op->prev->next : &l->head) = op->next;
    *(op->next ? &op->next->prev : &l->tail) = op->prev;
    l->n--;
}

static struct fk_op_list *list_of(struct fk_op *op)
{
    return op->state == FK_OP_QUEUED ? &op->peer->queued
         : op->state == FK_OP_SENT ? &op->peer->sent : &op->peer->late;
}

static void move_to(struct fk_op *op, enum fk_op_state state)
{
    list_remove(list_of(op), op);
    op->state = state;
    list_add(list_of(op), op);
}

/* ---- reads ---- */

/* The low half of an id is its place in the table, the high half tells its uses apart. */
static struct fk_op *op_new(struct fk_transport *t)
{
    struct fk_op *op = t->ops_free;

    if (op) {
        t->ops_free = op->next;
        op->id += 1ull << 32;
        return op;
    }
    op = calloc(1, sizeof(*op));
    if (!op || fk_vec_push(&t->ops_all, op)) {
        free(op);
        return NULL;
    }
    op->id = (1ull << 32) | (t->ops_all.len - 1);
    return op;
}

static void report(struct fk_transport *t, const struct fk_op *op, int rc, uint32_t flags)
{
    struct fk_read_done d = { op->r.user, op->peer->index, rc, flags };

    (void)fk_vec_push(&t->done, d);     /* room was made when the read was taken */
}

struct fk_op *fk_op_next(struct fk_transport *t, struct fk_peer *p, void *channel)
{
    struct fk_op *op = p->queued.head;

    if (!op || p->sent.n >= t->max_in_flight)
        return NULL;
    move_to(op, FK_OP_SENT);
    op->channel = channel;
    return op;
}

struct fk_op *fk_op_find(struct fk_transport *t, uint64_t id)
{
    uint32_t at = (uint32_t)id;

    if (at >= t->ops_all.len || t->ops_all.data[at]->id != id || !t->ops_all.data[at]->peer)
        return NULL;
    return t->ops_all.data[at];
}

void fk_op_end(struct fk_transport *t, struct fk_op *op, int rc)
{
    if (op->state == FK_OP_LATE) {
        report(t, op, 0, FK_READ_RELEASED);
        t->delta.quarantined--;
    } else {
        report(t, op, rc, 0);
        t->delta.read_blocks += rc == 0;
        t->delta.read_bytes += rc ? 0 : op->r.block.bytes;
        t->delta.failed += rc != 0;
        t->delta.late += rc == -ETIMEDOUT;
    }
    list_remove(list_of(op), op);
    op->peer = NULL;
    op->channel = op->priv = NULL;
    op->next = t->ops_free;
    t->ops_free = op;
}

void fk_op_arrived(struct fk_transport *t, struct fk_op *op, uint64_t checksum)
{
    const struct fk_block_ref *b = &op->r.block;
    bool late = op->state == FK_OP_LATE;        /* nobody will look at those bytes */

    fk_op_summed(t, op, checksum, late ? checksum : fk_block_checksum(b->key, op->r.buffer, b->bytes));
}

void fk_op_summed(struct fk_transport *t, struct fk_op *op, uint64_t checksum, uint64_t seen)
{
    const struct fk_block_ref *b = &op->r.block;
    bool same = checksum == seen || op->state == FK_OP_LATE;

    if (!same) {
        t->delta.mismatched++;
        fk_warn("transport %s: a block from %s arrived with a wrong checksum (slot %u, generation %llu, %u "
                "bytes)", t->ops->name, op->peer->address, b->slot, (unsigned long long)b->generation,
                b->bytes);
    }
    fk_op_end(t, op, same ? 0 : -EBADMSG);
}

void fk_op_quarantine(struct fk_transport *t, struct fk_op *op, int rc)
{
    report(t, op, rc, FK_BUG(209) ? 0 : FK_READ_QUARANTINED);
    t->delta.quarantined++;
    t->delta.failed++;
    t->delta.late += rc == -ETIMEDOUT;
    move_to(op, FK_OP_LATE);
}

void fk_op_late(struct fk_transport *t, struct fk_op *op)
{
    fk_op_quarantine(t, op, -ETIMEDOUT);
}

void fk_peer_end_queued(struct fk_transport *t, struct fk_peer *p, int rc)
{
    while (p->queued.head)
        fk_op_end(t, p->queued.head, rc);
}

static void end_of_channel(struct fk_transport *t, struct fk_op_list *l, const void *channel, int rc)
{
    for (struct fk_op *op = l->head, *next; op; op = next) {
        next = op->next;
        if (op->channel == channel)
            fk_op_end(t, op, rc);
    }
}

void fk_channel_end(struct fk_transport *t, struct fk_peer *p, void *channel, int rc)
{
    end_of_channel(t, &p->late, channel, rc);
    end_of_channel(t, &p->sent, channel, rc);
}

bool fk_channel_idle(const struct fk_peer *p, const void *channel, bool count_late)
{
    for (const struct fk_op *op = p->sent.head; op; op = op->next)
        if (op->channel == channel)
            return false;
    for (const struct fk_op *op = count_late ? p->late.head : NULL; op; op = op->next)
        if (op->channel == channel)
            return false;
    return true;
}

/* ---- watches ---- */

int fk_watch_add(struct fk_transport *t, struct fk_watch *w, int fd, uint32_t events)
{
    struct epoll_event e = { .events = events, .data.ptr = w };

    w->fd = fd;
    w->events = events;
    return epoll_ctl(t->epoll_fd, EPOLL_CTL_ADD, fd, &e) < 0 ? -errno : 0;
}

void fk_watch_change(struct fk_transport *t, struct fk_watch *w, uint32_t events)
{
    struct epoll_event e = { .events = events, .data.ptr = w };

    if (w->events == events || !w->ready)
        return;
    w->events = events;
    epoll_ctl(t->epoll_fd, EPOLL_CTL_MOD, w->fd, &e);
}

void fk_watch_remove(struct fk_transport *t, struct fk_watch *w)
{
    if (w->ready)
        epoll_ctl(t->epoll_fd, EPOLL_CTL_DEL, w->fd, NULL);
    w->ready = NULL;                /* an event that is already in our hands is passed over */
}

void fk_bury(struct fk_transport *t, void *memory)
{
    (void)fk_vec_push(&t->buried, memory);      /* without memory: a leak, which beats a crash */
}

static void empty_graves(struct fk_transport *t)
{
    for (size_t i = 0; i < t->buried.len; i++)
        free(t->buried.data[i]);
    t->buried.len = 0;
}

/* ---- a round of the thread ---- */

static struct fk_peer *peer_at(struct fk_transport *t, size_t i)
{
    pthread_mutex_lock(&t->lock);
    struct fk_peer *p = i < t->peers.len ? t->peers.data[i] : NULL;
    pthread_mutex_unlock(&t->lock);
    return p;
}

void fk_peer_gone(struct fk_transport *t, struct fk_peer *p)
{
    pthread_mutex_lock(&t->lock);
    p->in_use = p->going = false;
    pthread_mutex_unlock(&t->lock);
}

static void take_note(struct fk_transport *t, const struct fk_note *n)
{
    struct fk_peer *p = peer_at(t, n->peer);

    if (n->kind == FK_NOTE_DROP) {
        fk_peer_end_queued(t, p, -ECANCELED);
        if (t->ops->drop(t, p))
            fk_peer_gone(t, p);
        return;
    }
    struct fk_op *op = op_new(t);
    if (!op) {
        struct fk_read_done d = { n->read.user, n->peer, -ENOMEM, 0 };
        (void)fk_vec_push(&t->done, d);
        return;
    }
    op->r = n->read;
    op->peer = p;
    op->deadline_us = n->deadline_us;
    op->started_us = n->started_us;
    op->state = FK_OP_QUEUED;
    op->word[0] = op->word[1] = 0;
    list_add(&p->queued, op);
    t->first_deadline = fk_min(t->first_deadline, op->deadline_us);
}

static bool take_inbox(struct fk_transport *t)
{
    pthread_mutex_lock(&t->lock);
    __typeof__(t->inbox) was = t->inbox;
    memcpy(&t->inbox, &t->notes, sizeof(was));
    memcpy(&t->notes, &was, sizeof(was));
    t->inbox.len = 0;
    fk_grants_take(t);
    bool stop = t->stop;
    pthread_mutex_unlock(&t->lock);
    (void)fk_vec_reserve(&t->done, 2 * (t->ops_all.len + t->notes.len));
    for (size_t i = 0; i < t->notes.len; i++)
        take_note(t, &t->notes.data[i]);
    t->notes.len = 0;
    fk_grants_resume(t);
    return !stop;
}

static void expire_list(struct fk_transport *t, struct fk_op_list *l, uint64_t now, uint64_t *next)
{
    for (struct fk_op *op = l->head; op;) {
        struct fk_op *after = op->next;
        if (op->deadline_us > now) {
            *next = fk_min(*next, op->deadline_us);
        } else if (op->state == FK_OP_QUEUED) {
            fk_op_end(t, op, -ETIMEDOUT);
        } else {
            t->ops->expire(t, op);
            after = l->head;        /* it may have ended others too */
            if (after == op)
                after = op->next;
        }
        op = after;
    }
}

static void expire(struct fk_transport *t, uint64_t now)
{
    uint64_t next = UINT64_MAX;
    struct fk_peer *p;

    if (now < t->first_deadline)
        return;
    for (size_t i = 0; (p = peer_at(t, i)); i++) {
        expire_list(t, &p->queued, now, &next);
        expire_list(t, &p->sent, now, &next);
    }
    t->first_deadline = next;
}

static void pump(struct fk_transport *t)
{
    struct fk_peer *p;

    for (size_t i = 0; (p = peer_at(t, i)); i++)
        if (p->queued.head && p->sent.n < t->max_in_flight)
            t->ops->pump(t, p);
}

static void add_stats(struct fk_transport_stats *to, struct fk_transport_stats *from)
{
    uint64_t *a = (uint64_t *)to, *b = (uint64_t *)from;

    for (size_t i = 0; i < sizeof(*to) / sizeof(uint64_t); i++)
        a[i] += b[i];               /* differences: below zero wraps, and wraps back */
    memset(from, 0, sizeof(*from));
}

void fk_reads_hand_out(struct fk_transport *t)
{
    uint64_t one = 1;

    pthread_mutex_lock(&t->lock);
    add_stats(&t->stats, &t->delta);
    bool was_empty = t->out_at == t->outbox.len;
    if (t->done.len && fk_vec_reserve(&t->outbox, t->outbox.len + t->done.len) == 0) {
        memcpy(t->outbox.data + t->outbox.len, t->done.data, t->done.len * sizeof(*t->done.data));
        t->outbox.len += t->done.len;
        t->done.len = 0;
    }
    bool wake = was_empty && t->outbox.len;
    pthread_mutex_unlock(&t->lock);
    if (wake && t->turn)
        t->turn_us = 0;
    else if (wake)
        (void)!write(t->done_fd, &one, sizeof(one));
}

/* What every round does, whatever woke it. Returns when the next one is due. */
static uint64_t do_round(struct fk_transport *t)
{
    uint64_t next;

    expire(t, t->now_us);
    pump(t);
    next = t->ops->tick(t, t->now_us);
    pump(t);
    if (t->done.len || t->delta.served_blocks || t->delta.refused || t->delta.connections ||
        t->delta.turned_away)
        fk_reads_hand_out(t);
    return fk_min(fk_min(next, t->first_deadline), fk_grants_due(t));
}

static void kicked(struct fk_watch *w, uint32_t events)
{
    struct fk_transport *t = (struct fk_transport *)(void *)((char *)w - offsetof(struct fk_transport, kick));
    uint64_t n;

    (void)!read(w->fd, &n, sizeof(n));
    t->turn_us = 0;
}

/* What has ended is taken, and more asked for, before this thread sleeps. */
static bool take_turns(struct fk_transport *t, uint64_t *next)
{
    while (t->turn && t->turn_us <= t->now_us) {
        t->turn_us = t->turn(t->turn_ctx);
        if (!take_inbox(t))
            return false;
        *next = do_round(t);
    }
    *next = fk_min(*next, t->turn_us);
    return true;
}

static int timeout_ms(uint64_t now, uint64_t at)
{
    return at <= now ? 0 : at == UINT64_MAX ? -1 : (int)fk_min((at - now + 999) / 1000, (uint64_t)60000);
}

/* Milliseconds are too coarse for what has no descriptor to wait for. */
static int wait_events(struct fk_transport *t, struct epoll_event *events, uint64_t next)
{
    uint64_t now = fk_clock_us();

    if (next > now && next - now < 1000) {
        struct timespec left = { .tv_nsec = (long)(next - now) * 1000 };
        int n = epoll_pwait2(t->epoll_fd, events, MAX_EVENTS, &left, NULL);
        if (n >= 0 || errno != ENOSYS)
            return n;
    }
    return epoll_wait(t->epoll_fd, events, MAX_EVENTS, timeout_ms(now, next));
}

static void *thread_main(void *arg)
{
    struct fk_transport *t = arg;
    struct epoll_event events[MAX_EVENTS];

    /* It does not stand back (thread.h): the network wakes it, once for each way of the bytes, and where processors are
     * short every turn that it waits for would come on top of them: a tenth of the speed. */
    for (;;) {
        t->now_us = fk_clock_us();
        if (!take_inbox(t))
            return NULL;
        uint64_t next = do_round(t);
        if (!take_turns(t, &next))
            return NULL;
        empty_graves(t);
        bool sleep = !t->ops->may_sleep || t->ops->may_sleep(t);
        int n = wait_events(t, events, sleep ? next : 0);
        t->now_us = fk_clock_us();
        for (int i = 0; i < n; i++) {
            struct fk_watch *w = events[i].data.ptr;
            if (w->ready)
                w->ready(w, events[i].events);
        }
    }
}

uint64_t fk_transport_step(struct fk_transport *t, uint64_t now_us)
{
    t->now_us = now_us;
    take_inbox(t);
    uint64_t next = do_round(t);
    empty_graves(t);
    return next;
}

/* ---- open, close ---- */

static void destroy(struct fk_transport *t)
{
    for (size_t i = 0; i < t->peers.len; i++)
        free(t->peers.data[i]);
    for (size_t i = 0; i < t->ops_all.len; i++)
        free(t->ops_all.data[i]);
    empty_graves(t);
    fk_vec_free(&t->peers);
    fk_vec_free(&t->ops_all);
    fk_vec_free(&t->buried);
    fk_vec_free(&t->inbox);
    fk_vec_free(&t->notes);
    fk_vec_free(&t->outbox);
    fk_vec_free(&t->done);
    fk_vec_free(&t->granted);
    fk_vec_free(&t->resuming);
    int fds[] = { t->done_fd, t->kick_fd, t->epoll_fd };
    for (size_t i = 0; i < fk_array_size(fds); i++)
        if (fds[i] >= 0)
            close(fds[i]);
    pthread_mutex_destroy(&t->lock);
    free(t);
}

static const struct fk_transport_ops *find(const char *name)
{
    for (size_t i = 0; name && i < fk_array_size(transports); i++)
        if (strcmp(transports[i]->name, name) == 0)
            return transports[i];
    return NULL;
}

static int no_such(const char *name, char *error, size_t bytes)
{
    char names[200] = "";
    size_t at = 0;

    for (size_t i = 0; i < fk_array_size(transports) && at < sizeof(names); i++)
        at += (size_t)snprintf(names + at, sizeof(names) - at, "%s%s", i ? ", " : "", transports[i]->name);
    return fk_fail(error, bytes, -EINVAL, "there is no transport \"%s\"; there are %s" WITHOUT, name ? name : "", names);
}

static struct fk_transport *new_transport(const struct fk_transport_params *p)
{
    struct fk_transport *t = calloc(1, sizeof(*t));

    if (!t)
        return NULL;
    pthread_mutex_init(&t->lock, NULL);
    t->provider = p->provider;
    t->turn = p->turn;
    t->turn_ctx = p->turn_ctx;
    t->turn_us = p->turn ? 0 : UINT64_MAX;
    t->max_in_flight = p->max_in_flight ? p->max_in_flight : DEFAULT_IN_FLIGHT;
    t->max_queued = p->max_queued ? p->max_queued : DEFAULT_QUEUED;
    t->timeout_us = (p->timeout_ms ? p->timeout_ms : DEFAULT_TIMEOUT_MS) * 1000ull;
    t->first_deadline = UINT64_MAX;
    t->done_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    t->kick_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    t->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    t->kick.ready = kicked;
    if (t->done_fd >= 0 && t->kick_fd >= 0 && t->epoll_fd >= 0 &&
        fk_watch_add(t, &t->kick, t->kick_fd, EPOLLIN) == 0)
        return t;
    destroy(t);
    return NULL;
}

int fk_transport_open(const struct fk_transport_params *p, struct fk_transport **out, char *error, size_t bytes)
{
    const struct fk_transport_ops *ops = find(p->transport);

    if (!ops)
        return no_such(p->transport, error, bytes);
    if (p->listen && (!p->provider.grant || !p->provider.release))
        return fk_fail(error, bytes, -EINVAL, "transport %s: to listen it needs a provider", ops->name);
    struct fk_transport *t = new_transport(p);
    if (!t)
        return fk_fail(error, bytes, -ENOMEM, "transport %s: no memory, or no descriptors left",
                       ops->name);
    t->ops = ops;
    int rc = ops->open(t, p, error, bytes);
    if (rc) {
        destroy(t);
        return rc;
    }
    if (!ops->stepped) {
        rc = -pthread_create(&t->thread, NULL, thread_main, t);
        if (rc) {
            ops->close(t);
            destroy(t);
            return fk_fail(error, bytes, rc, "transport %s: no thread: %s", ops->name, strerror(-rc));
        }
        t->running = true;
    }
    *out = t;
    return 0;
}

void fk_transport_wake(struct fk_transport *t)
{
    uint64_t one = 1;

    (void)!write(t->kick_fd, &one, sizeof(one));
}

void fk_transport_close(struct fk_transport *t)
{
    if (!t)
        return;
    pthread_mutex_lock(&t->lock);
    t->stop = true;
    pthread_mutex_unlock(&t->lock);
    fk_transport_wake(t);
    if (t->running)
        pthread_join(t->thread, NULL);
    t->ops->close(t);
    fk_grants_close(t);
    destroy(t);
}

/* ---- callers ---- */

const char *fk_transport_name(const struct fk_transport *t) { return t->ops->name; }
const char *fk_transport_address(const struct fk_transport *t) { return t->address; }
int fk_transport_fd(const struct fk_transport *t) { return t->done_fd; }

int fk_transport_register(struct fk_transport *t, void *base, size_t bytes)
{
    pthread_mutex_lock(&t->lock);
    int rc = t->ops->region ? t->ops->region(t, base, bytes) : 0;
    pthread_mutex_unlock(&t->lock);
    return rc;
}

int fk_transport_share(struct fk_transport *t, const struct fk_window *w)
{
    pthread_mutex_lock(&t->lock);
    int rc = t->ops->share ? t->ops->share(t, w) : 0;
    pthread_mutex_unlock(&t->lock);
    return rc || !t->ops->publish ? rc : t->ops->publish(t);
}

static int find_or_add(struct fk_transport *t, const char *address, uint32_t *peer)
{
    struct fk_peer *unused = NULL, *p;

    for (size_t i = 0; i < t->peers.len; i++) {
        p = t->peers.data[i];
        if (p->in_use && !p->going && strcmp(p->address, address) == 0) {
            *peer = p->index;
            return 0;
        }
        if (!p->in_use)
            unused = p;
    }
    p = unused ? unused : calloc(1, sizeof(*p));
    if (!p || (!unused && fk_vec_push(&t->peers, p))) {
        free(p);
        return -ENOMEM;
    }
    if (!unused)
        p->index = (uint32_t)t->peers.len - 1;
    p->in_use = true;
    snprintf(p->address, sizeof(p->address), "%s", address);
    *peer = p->index;
    return 0;
}

int fk_transport_peer(struct fk_transport *t, const char *address, uint32_t *peer)
{
    if (!address || !*address || strlen(address) >= FK_TRANSPORT_ADDRESS_MAX)
        return -EINVAL;
    pthread_mutex_lock(&t->lock);
    int rc = find_or_add(t, address, peer);
    pthread_mutex_unlock(&t->lock);
    return rc;
}

static bool known(const struct fk_transport *t, uint32_t peer)
{
    return peer < t->peers.len && t->peers.data[peer]->in_use && !t->peers.data[peer]->going;
}

void fk_transport_peer_drop(struct fk_transport *t, uint32_t peer)
{
    struct fk_note n = { .kind = FK_NOTE_DROP, .peer = peer };

    pthread_mutex_lock(&t->lock);
    if (known(t, peer) && fk_vec_push(&t->inbox, n) == 0)
        t->peers.data[peer]->going = true;
    pthread_mutex_unlock(&t->lock);
    fk_transport_wake(t);
}

static int check_reads(const struct fk_read *r, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++)
        if (!r[i].buffer || !r[i].block.bytes || r[i].block.bytes > FK_TRANSPORT_BLOCK_MAX)
            return -EINVAL;
    return 0;
}

static int put_reads(struct fk_transport *t, uint32_t peer, const struct fk_read *r, uint32_t n,
                     uint64_t deadline_us, uint64_t now)
{
    uint64_t left = deadline_us > now ? deadline_us - now : 0;
    uint64_t at = deadline_us - fk_min(left / 32, (uint64_t)MARGIN_MAX_US);

    if (!known(t, peer))
        return -EINVAL;
    if (t->outstanding + n > t->max_queued)
        return -EAGAIN;
    /* A read may be reported twice: room for both, so that reporting cannot fail. */
    if (fk_vec_reserve(&t->inbox, t->inbox.len + n) ||
        fk_vec_reserve(&t->outbox, t->outbox.len + 2 * ((size_t)t->outstanding + n)))
        return -ENOMEM;
    for (uint32_t i = 0; i < n; i++)
        t->inbox.data[t->inbox.len++] = (struct fk_note){ FK_NOTE_READ, peer, at, now, r[i] };
    t->outstanding += n;
    return 0;
}

int fk_transport_read(struct fk_transport *t, uint32_t peer, const struct fk_read *r, uint32_t n,
                      uint64_t deadline_us)
{
    int rc = check_reads(r, n);

    if (rc || !n)
        return rc;
    uint64_t now = t->ops->stepped ? t->now_us : fk_clock_us();
    pthread_mutex_lock(&t->lock);
    bool first = t->inbox.len == 0;
    rc = put_reads(t, peer, r, n, deadline_us, now);
    pthread_mutex_unlock(&t->lock);
    if (!rc && first && !(t->turn && pthread_equal(pthread_self(), t->thread)))
        fk_transport_wake(t);
    return rc;
}

uint32_t fk_transport_take(struct fk_transport *t, struct fk_read_done *out, uint32_t max)
{
    uint64_t n_events;

    pthread_mutex_lock(&t->lock);
    uint32_t n = (uint32_t)fk_min((size_t)max, t->outbox.len - t->out_at);
    if (n)                              /* else there may be no box yet */
        memcpy(out, t->outbox.data + t->out_at, n * sizeof(*out));
    t->out_at += n;
    for (uint32_t i = 0; i < n; i++)
        t->outstanding -= !(out[i].flags & FK_READ_QUARANTINED);    /* those come again */
    if (t->out_at == t->outbox.len) {
        t->out_at = t->outbox.len = 0;
        (void)!read(t->done_fd, &n_events, sizeof(n_events));
    } else if (t->out_at > t->outbox.len / 2) {
        t->outbox.len -= t->out_at;
        memmove(t->outbox.data, t->outbox.data + t->out_at, t->outbox.len * sizeof(*t->outbox.data));
        t->out_at = 0;
    }
    pthread_mutex_unlock(&t->lock);
    return n;
}

void fk_transport_get_stats(struct fk_transport *t, struct fk_transport_stats *out)
{
    pthread_mutex_lock(&t->lock);
    *out = t->stats;
    pthread_mutex_unlock(&t->lock);
}
