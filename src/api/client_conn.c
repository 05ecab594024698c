/*
 * client_conn.c - a client's connection to the daemon: requests and answers, what happens when it is
 * lost, and the thread that looks for the daemon again. See client_impl.h, client.c.
 */
#include <poll.h>
#include <sched.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <stdio.h>

#include "api/client_impl.h"
#include "base/clock.h"
#include "base/log.h"

#define RETRY_MIN_MS 50
#define RETRY_MAX_MS 500
#define ANSWER_SPIN_US 60u               /* an answer is waited for awake for so long, */
#define AWAKE_US 1000u                  /* if the daemon was heard of within that time: it is awake too */
#define WATCH_MS 1000                   /* how long a daemon with operations under way may be silent */
#define DOWN_FLAGS FLEXKV_COMPLETION_PAGES_BUSY

/* ---- waking ---- */

void fk_client_set_event(const struct client *c)
{
    (void)!write(c->event_fd, &(uint64_t){ 1 }, sizeof(uint64_t));
}

void fk_client_clear_event(const struct client *c)
{
    uint64_t count;

    (void)!read(c->event_fd, &count, sizeof(count));
}

void fk_client_wake_thread(const struct client *c)
{
    (void)!write(c->wake_fd, &(uint64_t){ 1 }, sizeof(uint64_t));
}

/* ---- operations under way ---- */

static struct client_op *take_op(struct client *c, uint64_t id)
{
    struct client_op **at = &c->ops, *op;

    while ((op = *at) && op->id != id)
        at = &op->next;
    if (op)
        *at = op->next;
    return op;
}

static void finish_op(struct client *c, struct client_op *op, int status, uint32_t ok,
                      uint32_t blocks, uint32_t flags)
{
    flexkv_completion done = { .op = op->id, .user_data = op->user_data, .kind = op->kind,
                               .status = status, .blocks = blocks, .blocks_ok = ok, .flags = flags };

    for (uint32_t i = 0; op->results && i < op->n; i++)
        op->results[i] = i < ok ? 0 : (int8_t)(status < -127 ? -EIO : status);
    (void)fk_vec_push(&c->completed, done);
    free(op);
}

/* ---- going down ---- */

/* With the lock: the connection is no good. */
static void go_down(struct client *c, const char *why)
{
    if (!c->up)
        return;
    if (!c->stop)
        fk_warn("the node at %s is lost: %s; requests go on as misses until it is back", c->address,
                why);
    c->up = false;
    epoll_ctl(c->epoll_fd, EPOLL_CTL_DEL, c->fd, NULL);
    fk_client_events_down(c);
    shutdown(c->fd, SHUT_RDWR);         /* a fork may have the descriptor too; before anything ends */
    close(c->fd);
    c->fd = -1;
    fk_msg_reader_free(&c->in);
    while (c->ops) {
        struct client_op *op = c->ops;
        c->ops = op->next;
        finish_op(c, op, -ENOTCONN, 0, op->n, op->kind == FLEXKV_OP_PREFETCH ? 0 : DOWN_FLAGS);
    }
    for (struct client_call *call = c->calls; call; call = call->next) {
        call->done = true;
        call->rc = -ENOTCONN;
        snprintf(call->error, sizeof(call->error), "the node at %s is lost: %s", c->address, why);
    }
    c->calls = NULL;
    fk_client_set_event(c);
    fk_client_wake_thread(c);
}

/* ---- reading, with the lock ---- */

static void take_completion(struct client *c, const uint8_t *payload, size_t bytes)
{
    struct fk_wire_completion w;

    if (bytes < sizeof(w))
        return;
    memcpy(&w, payload, sizeof(w));
    struct client_op *op = take_op(c, w.op);
    if (op)
        finish_op(c, op, w.status, fk_min(w.blocks_ok, op->kind == FLEXKV_OP_PREFETCH ? UINT32_MAX
                                                                                     : op->n),
                  op->kind == FLEXKV_OP_PREFETCH ? w.blocks : op->n, w.flags);
}

static void take_reply(struct client *c, const uint8_t *payload, size_t bytes)
{
    struct fk_wire_reply r;
    struct client_call **at = &c->calls, *call;

    if (bytes < sizeof(r))
        return;
    memcpy(&r, payload, sizeof(r));
    while ((call = *at) && call->seq != r.seq)
        at = &call->next;
    if (!call)
        return;
    *at = call->next;
    call->rc = r.rc;
    call->bytes = bytes - sizeof(r);
    if (r.rc < 0) {
        snprintf(call->error, sizeof(call->error), "%.*s", (int)call->bytes,
                 (const char *)payload + sizeof(r));
    } else if (call->bytes && (call->body = malloc(call->bytes + 1))) {
        memcpy(call->body, payload + sizeof(r), call->bytes);
        ((char *)call->body)[call->bytes] = '\0';
    }
    call->done = true;
}

/* Everything that has arrived. Returns whether anything did. */
bool fk_client_drain(struct client *c)
{
    struct fk_msg msg;
    const uint8_t *payload;
    bool any = false;
    int rc;

    while (c->up && (rc = fk_msg_read(c->fd, &c->in)) != -EAGAIN) {
        if (rc) {
            go_down(c, rc == -ECONNRESET ? "its process has ended" : strerror(-rc));
            return true;
        }
        any = c->heard = true;
        c->heard_us = fk_clock_us();
        while ((rc = fk_msg_next(&c->in, &msg, &payload)) == 1) {
            if (msg.type == FK_WIRE_COMPLETIONS)
                take_completion(c, payload, msg.bytes);
            else if (msg.type == FK_WIRE_REPLY)
                take_reply(c, payload, msg.bytes);
            else if (msg.type == FK_WIRE_EVENTS_NOTE)
                fk_client_events_note(c);
            else if (msg.type == FK_WIRE_ERROR && msg.bytes == sizeof(struct fk_wire_error))
                fk_error("the node at %s: %.*s", c->address, FK_WIRE_TEXT,
                         ((const struct fk_wire_error *)(const void *)payload)->text);
        }
        if (rc < 0) {
            go_down(c, "it sends nonsense");
            return true;
        }
    }
    return any;
}

/* ---- sending, with the lock ---- */

int fk_client_not_connected(const struct client *c)
{
    return fk_api_fail(-ENOTCONN, "the node at %s does not answer; it is looked for", c->address);
}

int fk_client_send_request(struct client *c, uint32_t type, const struct iovec *iov, int n)
{
    if (!c->up)
        return fk_client_not_connected(c);
    int rc = fk_msg_send(c->fd, type, iov, n, NULL, 0, fk_clock_us() + c->timeout_us);
    if (!rc)
        return 0;
    go_down(c, rc == -ETIMEDOUT ? "it takes no requests" : strerror(-rc));
    return fk_client_not_connected(c);
}

/* Reads until the call is answered; without the lock while it waits. In a burst of calls the answer comes
 * sooner than this thread falls asleep and wakes up. After a pause it is the daemon that must wake up,
 * which it does sooner on a processor that sleeps. */
static void wait_for(struct client *c, struct client_call *call, uint64_t deadline_us)
{
    uint64_t start = fk_clock_us();
    uint64_t spin_until = start + (start - c->heard_us < AWAKE_US ? ANSWER_SPIN_US : 0);

    while (!call->done) {
        if (fk_client_drain(c) && call->done)
            break;
        struct pollfd p[2] = { { .fd = c->fd, .events = POLLIN },
                               { .fd = c->event_fd, .events = POLLIN } };
        uint64_t now = fk_clock_us();
        if (now >= deadline_us || c->stop) {
            go_down(c, "it has not answered in time (server_timeout_ms)");
            break;
        }
        bool others = c->calls != call || call->next || c->completed.len > c->taken;
        pthread_mutex_unlock(&c->lock);
        if (now < spin_until) {
            sched_yield();      /* the daemon may have been woken up on this very processor */
            pthread_mutex_lock(&c->lock);
            continue;
        }
        /* Others may have read the answer: their sign is event_fd; if it is set for another reason,
         * a short sleep keeps this from spinning. */
        (void)poll(p, others ? 1 : 2, others ? 1 : (int)fk_min((deadline_us - now + 999) / 1000,
                                                             (uint64_t)1000));
        pthread_mutex_lock(&c->lock);
    }
    if (c->completed.len > c->taken || c->calls)
        fk_client_set_event(c);
}

/* A request with an answer. With the lock. *body: to be freed. */
int fk_client_call(struct client *c, uint32_t type, uint32_t *seq, const struct iovec *iov, int n,
                   uint64_t timeout_us, void **body, size_t *bytes)
{
    struct client_call call = { .seq = *seq = ++c->seq };
    int rc = fk_client_send_request(c, type, iov, n);

    if (rc)
        return rc;
    call.next = c->calls;
    c->calls = &call;
    wait_for(c, &call, fk_clock_us() + timeout_us);
    if (call.rc < 0) {
        free(call.body);
        return fk_api_fail(call.rc, "%s", call.error);
    }
    if (body) {
        *body = call.body;
        *bytes = call.bytes;
    } else {
        free(call.body);
    }
    return 0;
}

/* The same, where the answer is a struct of a known size. */
int fk_client_call_for(struct client *c, uint32_t type, uint32_t *seq, const struct iovec *iov, int n,
                       uint64_t timeout_us, void *out, size_t out_bytes)
{
    fk_autofree void *body = NULL;
    size_t bytes = 0;
    int rc = fk_client_call(c, type, seq, iov, n, timeout_us, &body, &bytes);

    if (rc)
        return rc;
    if (bytes != out_bytes || !body)
        return fk_api_fail(-EPROTO, "the node at %s answers %zu bytes, %zu are expected", c->address,
                           bytes, out_bytes);
    memcpy(out, body, out_bytes);
    return 0;
}

/* ---- connecting ---- */

/* A connection that has been greeted. Without the lock. */
int fk_client_greet(const char *address, uint64_t timeout_us, struct client_greeting *out)
{
    int *fd = &out->fd;
    struct fk_msg_reader *in = &out->in;
    struct fk_wire_hello hello = { .magic = FK_WIRE_MAGIC, .version = FK_WIRE_VERSION,
                                   .role = FK_WIRE_CLIENT, .pid = (uint32_t)getpid() };
    struct iovec v = { &hello, sizeof(hello) };
    uint64_t deadline = fk_clock_us() + timeout_us;
    struct fk_msg msg;
    const uint8_t *payload;
    char error[400];
    int rc = fk_socket_connect(address, fd, error, sizeof(error));

    if (rc)
        return fk_api_fail(rc, "%s (server_recv_port; flexkv serve)", error);
    fk_msg_reader_init(in, FK_MSG_MAX);
    rc = fk_msg_send(*fd, FK_WIRE_HELLO, &v, 1, NULL, 0, deadline);
    while (!rc && (rc = fk_msg_next(in, &msg, &payload)) == 0) {
        rc = fk_msg_read(*fd, in);
        if (rc == -EAGAIN)
            rc = fk_fd_wait(*fd, false, deadline);
    }
    if (rc == 1 && msg.type == FK_WIRE_WELCOME_CLIENT &&
        msg.bytes == sizeof(struct fk_wire_welcome_client)) {
        out->events_on = ((const struct fk_wire_welcome_client *)(const void *)payload)->events;
        return 0;
    }
    if (rc == 1 && msg.type == FK_WIRE_ERROR && msg.bytes == sizeof(struct fk_wire_error)) {
        const struct fk_wire_error *e = (const void *)payload;
        rc = fk_api_fail(e->rc < 0 ? e->rc : -EPROTO, "%s: %.*s", address, FK_WIRE_TEXT, e->text);
    } else {
        rc = fk_api_fail(rc < 0 && rc != -ECONNRESET ? rc : -EPROTO, "%s: %s", address,
                         rc == -ETIMEDOUT ? "the node there does not answer (server_timeout_ms)"
                                          : "what answers there is no FlexKV node");
    }
    close(*fd);
    fk_msg_reader_free(in);
    return rc;
}

/* With the lock. */
int fk_client_go_up(struct client *c, const struct client_greeting *with)
{
    struct epoll_event e = { .events = EPOLLIN, .data.fd = with->fd };

    if (epoll_ctl(c->epoll_fd, EPOLL_CTL_ADD, with->fd, &e) < 0)
        return -errno;
    c->fd = with->fd;
    c->in = with->in;
    c->events_on = with->events_on;
    c->up = true;
    fk_client_events_up(c);
    return 0;
}

int fk_client_ask_for_space(struct client *c, struct client_space *s, struct fk_wire_space_reply *r)
{
    struct fk_wire_space w = {
        .tokens_per_block = s->desc.tokens_per_block, .ranks = s->desc.ranks,
        .workers = s->desc.workers, .slice_bytes = s->desc.slice_bytes, .wait_ms = s->desc.wait_ms,
        .fingerprint_bytes = (uint32_t)s->desc.fingerprint_bytes,
    };
    struct iovec v[2] = { { &w, sizeof(w) }, { s->fingerprint, s->desc.fingerprint_bytes } };
    uint64_t wait = fk_max(s->desc.wait_ms, 1000u) * 1000ull + FK_CLIENT_SLOW_CALL_MS * 1000ull;

    memcpy(w.name, s->name, sizeof(w.name));
    memcpy(w.instance, s->instance, sizeof(w.instance));
    return fk_client_call_for(c, FK_WIRE_SPACE, &w.seq, v, 2, wait, r, sizeof(*r));
}

int fk_client_ask_for_namespace(struct client *c, const struct client_namespace *ns,
                                uint32_t *remote)
{
    struct fk_wire_namespace w = { .space = space_of(ns->pub.space)->remote,
                                   .n_parts = ns->n_parts };
    struct iovec v[2] = { { &w, sizeof(w) }, { ns->parts, ns->parts_bytes } };
    struct fk_wire_namespace_reply r;
    int rc = fk_client_call_for(c, FK_WIRE_NAMESPACE, &w.seq, v, 2, c->timeout_us, &r, sizeof(r));

    if (!rc)
        *remote = r.ns;
    return rc;
}

int fk_client_tell_compute_rate(struct client *c, const struct client_space *s)
{
    struct fk_wire_compute_rate w = { .space = s->remote, .tokens_per_second = s->compute_rate };
    struct iovec v = { &w, sizeof(w) };

    return fk_client_send_request(c, FK_WIRE_COMPUTE_RATE, &v, 1);
}

/* ---- the thread that looks for the daemon ---- */

/* With the lock, which the calls give up while they wait. The handles stay; keys must stay too. */
static int open_again(struct client *c)
{
    int rc = 0;

    for (struct client_space *s = c->spaces; s && !rc; s = s->next) {
        struct fk_wire_space_reply r;
        rc = fk_client_ask_for_space(c, s, &r);
        if (!rc && (r.scheme != (uint32_t)s->pub.scheme ||
                    memcmp(r.fingerprint, s->pub.fingerprint, sizeof(r.fingerprint))))
            rc = fk_api_fail(-ESTALE, "the node at %s came back with another key_hash or geometry; "
                             "restart the engine", c->address);
        if (!rc)
            s->remote = r.space;
        if (!rc && s->compute_rate > 0)
            rc = fk_client_tell_compute_rate(c, s);
    }
    for (struct client_namespace *ns = c->namespaces; ns && !rc; ns = ns->next) {
        rc = fk_client_ask_for_namespace(c, ns, &ns->remote);
        if (!rc && ns->labelled)
            rc = fk_client_tell_label(c, ns);
    }
    return rc;
}

static int reconnect(struct client *c)
{
    struct client_greeting with;
    int rc;

    pthread_mutex_unlock(&c->lock);
    rc = fk_client_greet(c->address, c->timeout_us, &with);
    pthread_mutex_lock(&c->lock);
    if (rc)
        return rc;
    rc = fk_client_go_up(c, &with);
    if (rc) {
        close(with.fd);
        fk_msg_reader_free(&with.in);
        return rc;
    }
    c->reopening = true;
    rc = open_again(c);
    c->reopening = false;
    if (rc && c->stop)
        return rc;
    if (rc) {
        fk_warn("the node at %s is back, but: %s", c->address, flexkv_last_error());
        go_down(c, "its spaces can't be opened again");
        return rc;
    }
    fk_info("the node at %s is back", c->address);
    fk_client_events_note(c);
    return 0;
}

/* Without the lock while it sleeps: until the time is over, somebody wakes it, or the connection ends,
 * which an engine that asks nothing would not notice. */
static void sleep_ms(struct client *c, int ms)
{
    struct pollfd p[2] = { { .fd = c->wake_fd, .events = POLLIN },
                           { .fd = c->fd, .events = POLLRDHUP } };
    uint64_t count;

    pthread_mutex_unlock(&c->lock);
    (void)poll(p, 2, ms);
    (void)!read(c->wake_fd, &count, sizeof(count));
    pthread_mutex_lock(&c->lock);
    if (c->up && c->fd == p[1].fd && p[1].revents)
        (void)fk_client_drain(c);
}

/* Nobody asks while an engine waits for completions, and a daemon that stands still sends none. */
static void watch(struct client *c)
{
    struct fk_wire_call w = { 0 };
    struct iovec v = { &w, sizeof(w) };

    if (c->up && c->ops && !c->heard)
        (void)fk_client_call(c, FK_WIRE_STATS, &w.seq, &v, 1, c->timeout_us, NULL, NULL);
    c->heard = false;
}

void *fk_client_main(void *arg)
{
    struct client *c = arg;
    int pause = RETRY_MIN_MS;

    pthread_mutex_lock(&c->lock);
    while (!c->stop) {
        if (c->up) {
            sleep_ms(c, WATCH_MS);
            watch(c);
            pause = RETRY_MIN_MS;
        } else if (reconnect(c)) {
            sleep_ms(c, pause);
            pause = fk_min(pause * 2, RETRY_MAX_MS);
        }
    }
    pthread_mutex_unlock(&c->lock);
    return NULL;
}
