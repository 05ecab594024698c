/*
 * server.c - the thread at a node's socket: takes connections, gives agents to their instances,
 * carries clients' requests out, and notices when a process dies. See peer.h.
 *
 * A process is gone when its connection ends or its pid does: with the last thread of a
 * process its descriptors close, so nobody copies any more then; a child that inherited the socket
 * would keep it open, that is what the pid is for.
 */
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>

#include "api/peer.h"
#include "base/clock.h"
#include "base/log.h"
#include "base/thread.h"

#define EVENTS 64
#define HELLO_TIMEOUT_US 5000000u       /* who says nothing for so long is sent away */
#define TURN_MS 1000                    /* the longest sleep */
#define ERROR_TIMEOUT_US 100000u
#define FIRST_CLIENT_US 60000000u       /* until then nobody's absence counts */

int fk_server_watch(struct fk_server *sv, int fd, struct fk_watch *source, bool writable)
{
    struct epoll_event e = { .events = EPOLLIN | (writable ? (uint32_t)EPOLLOUT : 0u),
                             .data.ptr = source };

    return epoll_ctl(sv->epoll_fd, EPOLL_CTL_ADD, fd, &e) < 0 ? -errno : 0;
}

void fk_server_rewatch(struct fk_server *sv, int fd, struct fk_watch *source, bool writable)
{
    struct epoll_event e = { .events = EPOLLIN | (writable ? (uint32_t)EPOLLOUT : 0u),
                             .data.ptr = source };

    epoll_ctl(sv->epoll_fd, EPOLL_CTL_MOD, fd, &e);
}

void fk_server_unwatch(struct fk_server *sv, int fd)
{
    epoll_ctl(sv->epoll_fd, EPOLL_CTL_DEL, fd, NULL);
}

/* ---- peers ---- */

static void peer_gone(struct fk_watch *source)
{
    ((struct fk_peer *)source->owner)->gone = true;
}

/* With a reason, so that the other side can tell its user. */
static void turn_away(struct fk_peer *p, int rc)
{
    struct fk_wire_error e = { .rc = rc };
    struct iovec v = { &e, sizeof(e) };

    snprintf(e.text, sizeof(e.text), "%s", flexkv_last_error());
    fk_warn("process %d is turned away: %s", (int)p->pid, e.text);
    (void)fk_msg_send(p->fd, FK_WIRE_ERROR, &v, 1, NULL, 0, fk_clock_us() + ERROR_TIMEOUT_US);
    p->gone = true;
}

static int greet_client(struct fk_peer *p)
{
    struct fk_wire_welcome_client w = { FK_WIRE_VERSION, (uint32_t)getpid(),
                                        p->server->node->events != NULL, 0 };
    struct iovec v = { &w, sizeof(w) };

    p->session = fk_session_create(p);
    if (!p->session)
        return fk_api_fail(-ENOMEM, "out of memory");
    return fk_msg_send(p->fd, FK_WIRE_WELCOME_CLIENT, &v, 1, NULL, 0,
                       fk_clock_us() + ERROR_TIMEOUT_US);
}

static int greet_agent(struct fk_peer *p, const struct fk_wire_hello *hello)
{
    int rc = fk_link_create(p, hello);

    if (rc)
        return rc;
    rc = fk_msg_send(p->fd, FK_WIRE_WAIT, NULL, 0, NULL, 0, fk_clock_us() + ERROR_TIMEOUT_US);
    return rc ? fk_api_fail(rc, "the agent does not listen") : 0;
}

static int handle_hello(struct fk_peer *p, const struct fk_msg *msg, const uint8_t *payload)
{
    struct fk_wire_hello h;

    if (msg->type != FK_WIRE_HELLO || msg->bytes != sizeof(h))
        return fk_api_fail(-EPROTO, "it does not speak FlexKV's protocol");
    memcpy(&h, payload, sizeof(h));
    if (h.magic != FK_WIRE_MAGIC || h.version != FK_WIRE_VERSION)
        return fk_api_fail(-EPROTO, "it speaks version %u of FlexKV's protocol, this one (%s) %u: "
                           "install the same version on both sides", h.version, flexkv_version(),
                           FK_WIRE_VERSION);
    if (h.role == FK_WIRE_AGENT)
        return greet_agent(p, &h);
    if (h.role == FK_WIRE_CLIENT && p->server->clients)
        return greet_client(p);
    return fk_api_fail(-ENOTSUP, "at %s an engine's own node listens, which serves no others: start a "
                       "daemon (flexkv serve) at an address of its own (server_recv_port)",
                       p->server->address);
}

static int handle_message(struct fk_peer *p, const struct fk_msg *msg, const uint8_t *payload)
{
    if (p->session)
        return fk_session_handle(p->session, msg, payload);
    if (p->link)                        /* its shared memory is where it speaks */
        return fk_api_fail(-EPROTO, "unexpected message");
    return handle_hello(p, msg, payload);
}

static void handle_messages(struct fk_peer *p)
{
    struct fk_msg msg;
    const uint8_t *payload;
    int rc;

    while (!p->gone && (rc = fk_msg_next(&p->in, &msg, &payload)) != 0) {
        if (rc > 0)
            rc = handle_message(p, &msg, payload);
        else
            fk_api_fail(rc, "it sends a message that is too long");
        if (rc)
            turn_away(p, rc);
    }
}

static void peer_ready(struct fk_watch *source)
{
    struct fk_peer *p = source->owner;
    int rc = fk_msg_read(p->fd, &p->in);

    if (rc == 0)
        handle_messages(p);
    else if (rc != -EAGAIN)
        p->gone = true;
    if (!p->gone && p->session && fk_session_flush(p->session))
        p->gone = true;
}

static void take_connection(struct fk_watch *source)
{
    struct fk_server *sv = source->owner;
    int fd;
    pid_t pid;

    while (fk_listener_accept(&sv->listener, &fd, &pid) == 0) {
        struct fk_peer *p = calloc(1, sizeof(*p));
        if (!p) {
            close(fd);
            return;
        }
        p->server = sv;
        p->fd = fd;
        p->pid = pid;
        p->pid_fd = pid > 0 ? (int)syscall(SYS_pidfd_open, pid, 0) : -1;
        p->since_us = fk_clock_us();
        p->socket = (struct fk_watch){ peer_ready, p };
        p->process = (struct fk_watch){ peer_gone, p };
        fk_msg_reader_init(&p->in, FK_MSG_MAX);
        p->gone = fk_server_watch(sv, fd, &p->socket, false) != 0;
        if (p->pid_fd >= 0)
            (void)fk_server_watch(sv, p->pid_fd, &p->process, false);
        pthread_mutex_lock(&sv->node->lock);
        p->next = sv->peers;
        sv->peers = p;
        pthread_mutex_unlock(&sv->node->lock);
    }
}

void fk_server_note_user(struct fk_server *sv)
{
    pthread_mutex_lock(&sv->node->lock);
    sv->n_users++;
    sv->idle_since_us = 0;
    pthread_mutex_unlock(&sv->node->lock);
}

static void note_session_end(struct fk_server *sv, bool user)
{
    if (user && --sv->n_users == 0)
        sv->idle_since_us = fk_clock_us();
    pthread_cond_broadcast(&sv->node->idle);
}

static void free_peer(struct fk_peer *p)
{
    struct fk_node *node = p->server->node;

    if (p->session) {
        bool user = fk_session_destroy(p->session);
        pthread_mutex_lock(&node->lock);
        p->session = NULL;
        note_session_end(p->server, user);
        pthread_mutex_unlock(&node->lock);
    }
    if (p->link)
        fk_link_destroy(p->link);
    fk_msg_reader_free(&p->in);
    close(p->fd);
    if (p->pid_fd >= 0)
        close(p->pid_fd);
    free(p);
}

/* A broken agent's process must be gone itself: nobody knows what it does to its slots. */
static bool may_go(const struct fk_peer *p)
{
    return p->gone && !(p->link && p->link->broken && p->pid > 0 &&
                        syscall(SYS_kill, p->pid, 0) == 0);
}

static void reap(struct fk_server *sv)
{
    struct fk_peer **at = &sv->peers, *p;
    uint64_t now = fk_clock_us();

    while ((p = *at)) {
        if (!p->session && !p->link && now - p->since_us > HELLO_TIMEOUT_US)
            p->gone = true;
        if (!may_go(p)) {
            at = &p->next;
            continue;
        }
        pthread_mutex_lock(&sv->node->lock);
        *at = p->next;
        pthread_mutex_unlock(&sv->node->lock);
        free_peer(p);
    }
}

/* ---- instances ---- */

static void attach_agents(struct fk_server *sv)
{
    struct fk_node *node = sv->node;

    for (struct fk_link *l = node->links; l; l = l->next) {
        if (l->in || l->peer->gone)
            continue;
        pthread_mutex_lock(&node->lock);
        struct fk_instance *in = fk_instance_find(node, l->hello.space, l->hello.instance);
        bool taken = in && l->hello.worker < in->n_workers && in->worker[l->hello.worker].link;
        pthread_mutex_unlock(&node->lock);
        int rc = in && !taken ? fk_link_attach(l, in) : 0;
        if (rc)
            turn_away(l->peer, rc);
    }
}

/* With the lock: agents of an ended instance are let go as soon as they copy nothing; they look for
 * a new one by themselves. */
static bool let_agents_go(struct fk_node *node, const struct fk_instance *in)
{
    bool any = false;

    for (struct fk_link *l = node->links; l; l = l->next) {
        if (l->in != in)
            continue;
        any = true;
        if (!l->n_jobs && !l->held)
            l->peer->gone = true;
    }
    return !any;
}

static void end_instances(struct fk_server *sv)
{
    struct fk_node *node = sv->node;

    pthread_mutex_lock(&node->lock);
    for (struct fk_instance **at = &node->instances, *in; (in = *at);) {
        if (!in->ended || !let_agents_go(node, in) || !fk_core_instance_idle(node->core, in->id)) {
            at = &in->next;
            continue;
        }
        *at = in->next;
        fk_core_instance_remove(node->core, in->id);
        fk_instance_free(in);
    }
    fk_node_unlock(node);
}

static bool instance_ended(struct fk_node *node)
{
    pthread_mutex_lock(&node->lock);
    const struct fk_instance *in = node->instances;
    while (in && !in->ended)
        in = in->next;
    pthread_mutex_unlock(&node->lock);
    return in;
}

/* ---- completions of clients' operations ---- */

static void take_completions(struct fk_watch *source)
{
    struct fk_server *sv = source->owner;
    flexkv_completion c[EVENTS];
    int n;

    while ((n = fk_node_take_completions(sv->node, c, EVENTS)) > 0)
        for (int i = 0; i < n; i++)
            fk_session_complete(&c[i]);
    for (struct fk_peer *p = sv->peers; p; p = p->next)
        if (p->session && !p->gone && fk_session_flush(p->session))
            p->gone = true;
}

static void finish_slow(struct fk_server *sv)
{
    for (struct fk_peer *p = sv->peers; p; p = p->next)
        if (p->session && !p->gone && fk_session_finish_slow(p->session))
            p->gone = true;
}

static void tell_of_events(struct fk_server *sv)
{
    pthread_mutex_lock(&sv->node->lock);
    bool news = fk_node_events_news(sv->node);
    pthread_mutex_unlock(&sv->node->lock);
    for (struct fk_peer *p = sv->peers; p && news; p = p->next)
        if (p->session && !p->gone && fk_session_tell_of_events(p->session))
            p->gone = true;
}

/* ---- the thread ---- */

static void take_wake(struct fk_watch *source)
{
    struct fk_server *sv = source->owner;
    uint64_t count;

    (void)!read(sv->wake_fd, &count, sizeof(count));
}

void fk_server_wake(struct fk_node *node)
{
    if (node->server)
        (void)!write(node->server->wake_fd, &(uint64_t){ 1 }, sizeof(uint64_t));
}

static void *server_main(void *arg)
{
    struct fk_server *sv = arg;
    struct epoll_event events[EVENTS];

    if (!sv->clients)       /* clients wait for an answer; an engine's own scheduler goes on */
        fk_thread_stand_back();
    while (!atomic_load(&sv->stop)) {
        int n = epoll_wait(sv->epoll_fd, events, EVENTS, TURN_MS);
        for (int i = 0; i < n; i++) {
            struct fk_watch *source = events[i].data.ptr;
            source->ready(source);
        }
        finish_slow(sv);
        if (sv->node->events)
            tell_of_events(sv);
        attach_agents(sv);
        reap(sv);
        /* Letting agents go marks their peers, whose end lets the instance go. */
        for (int i = 0; i < 2 && instance_ended(sv->node); i++) {
            end_instances(sv);
            reap(sv);
        }
    }
    return NULL;
}

static void free_server(struct fk_server *sv)
{
    while (sv->peers) {
        struct fk_peer *next = sv->peers->next;
        free_peer(sv->peers);
        sv->peers = next;
    }
    fk_listener_close(&sv->listener);
    if (sv->epoll_fd >= 0)
        close(sv->epoll_fd);
    if (sv->wake_fd >= 0)
        close(sv->wake_fd);
    free(sv->address);
    free(sv);
}

static int start(struct fk_server *sv)
{
    struct fk_node *node = sv->node;

    sv->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    sv->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (sv->epoll_fd < 0 || sv->wake_fd < 0)
        return fk_api_fail(-errno, "epoll: %s", strerror(errno));
    sv->listening = (struct fk_watch){ take_connection, sv };
    sv->woken = (struct fk_watch){ take_wake, sv };
    sv->completed = (struct fk_watch){ take_completions, sv };
    int rc = fk_server_watch(sv, sv->listener.fd, &sv->listening, false);
    if (!rc)
        rc = fk_server_watch(sv, sv->wake_fd, &sv->woken, false);
    if (!rc && sv->clients)
        rc = fk_server_watch(sv, node->event_fd, &sv->completed, false);
    if (!rc)
        rc = -pthread_create(&sv->thread, NULL, server_main, sv);
    sv->has_thread = !rc;
    return rc ? fk_api_fail(rc, "cannot start the server's thread: %s", strerror(-rc)) : 0;
}

static int listen_at(flexkv_node *pub, const char *address, bool clients)
{
    struct fk_node *node = fk_local_node(pub);
    char error[400];

    if (pub->vt != &fk_local_vt)
        return fk_api_fail(-EINVAL, "a client of another node can't listen");
    if (node->server)
        return fk_api_fail(-EBUSY, "the node listens at %s already", node->server->address);
    if (node->spaces)
        return fk_api_fail(-EBUSY, "the node must listen before its first space is opened");
    struct fk_server *sv = calloc(1, sizeof(*sv));
    if (!sv || !(sv->address = strdup(address))) {
        free(sv);
        return fk_api_fail(-ENOMEM, "out of memory");
    }
    sv->node = node;
    sv->clients = clients;
    sv->epoll_fd = sv->wake_fd = -1;
    sv->idle_since_us = fk_clock_us() + FIRST_CLIENT_US;
    int rc = fk_listener_open(address, &sv->listener, error, sizeof(error));
    if (rc)
        fk_api_fail(rc, "%s", error);
    node->server = rc ? NULL : sv;
    if (!rc)
        rc = start(sv);
    if (rc) {
        node->server = NULL;
        free_server(sv);
    }
    return rc;
}

FLEXKV_API int flexkv_node_listen(flexkv_node *node, const char *address)
{
    return listen_at(node, address, false);
}

FLEXKV_API int flexkv_node_serve(flexkv_node *node, const char *address)
{
    return listen_at(node, address, true);
}

void fk_server_stop(struct fk_node *node)
{
    struct fk_server *sv = node->server;

    if (!sv)
        return;
    pthread_mutex_lock(&node->lock);
    node->closing = true;               /* slow requests give up */
    pthread_cond_broadcast(&node->idle);
    pthread_mutex_unlock(&node->lock);
    while (atomic_load(&sv->n_slow))
        usleep(1000);
    atomic_store(&sv->stop, true);
    fk_server_wake(node);
    if (sv->has_thread)
        pthread_join(sv->thread, NULL);
    free_server(sv);
    node->server = NULL;
}

/* ---- who is there, with the lock ---- */

static const struct fk_peer *session_peer(const struct fk_node *node, uint64_t id)
{
    const struct fk_peer *p = node->server ? node->server->peers : NULL;

    while (p && !(p->session && !p->gone && fk_session_id(p->session) == id))
        p = p->next;
    return p;
}

bool fk_server_has_session(const struct fk_node *node, uint64_t id)
{
    return session_peer(node, id);
}

bool fk_server_is_there(const struct fk_node *node, uint64_t id)
{
    const struct fk_peer *peer = id ? session_peer(node, id) : NULL;
    struct pollfd p = { .fd = peer ? peer->fd : -1, .events = POLLRDHUP };

    return !id || (peer && poll(&p, 1, 0) == 0);
}

int fk_server_session_pid(const struct fk_node *node, uint64_t id)
{
    const struct fk_peer *p = id ? session_peer(node, id) : NULL;

    return p ? (int)p->pid : (int)getpid();
}

FLEXKV_API int flexkv_node_wait_idle(flexkv_node *pub, int idle_ms, int timeout_ms)
{
    struct fk_node *node = fk_local_node(pub);
    uint64_t end = timeout_ms < 0 ? UINT64_MAX : fk_clock_us() + (uint64_t)timeout_ms * 1000;
    int idle = 0;

    if (pub->vt != &fk_local_vt || !node->server)
        return fk_api_fail(-EINVAL, "the node does not serve anybody");
    pthread_mutex_lock(&node->lock);
    for (;;) {
        uint64_t now = fk_clock_us();
        uint64_t since = node->server->idle_since_us;
        uint64_t ready = since ? since + (uint64_t)idle_ms * 1000 : UINT64_MAX;
        idle = ready <= now;
        if (idle || now >= end)
            break;
        (void)fk_node_wait(node, fk_min(fk_min(ready, end), now + 1000000));
    }
    pthread_mutex_unlock(&node->lock);
    return idle;
}
