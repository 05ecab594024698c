/*
 * client.c - a node that a daemon serves: flexkv.h's calls as messages over its socket. The
 * daemon's side is session.c.
 *
 *   up    a call sends its request and waits for the answer; operations are sent and not waited for,
 *         their completions are read whenever anybody reads
 *   down  matches find nothing, operations are refused, what was under way has ended with
 *         -ENOTCONN and PAGES_BUSY; a thread looks for the daemon, then opens all spaces and
 *         namespaces again under their old handles
 *
 * `lock` guards everything; nobody holds it while waiting. Who waits for an answer reads the
 * socket; what it reads for others it hands over and wakes them by `event_fd`.
 */
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>

#include "api/config_impl.h"
#include "api/node_impl.h"
#include "base/clock.h"
#include "base/log.h"
#include "ipc/socket.h"
#include "ipc/wire.h"

#define RETRY_MIN_MS 50
#define RETRY_MAX_MS 500
#define SLOW_CALL_MS 120000u            /* of calls that wait for files: reset */
#define WATCH_MS 1000                   /* how long a daemon with operations under way may be silent */
#define DOWN_FLAGS FLEXKV_COMPLETION_PAGES_BUSY

struct client_op {                  /* under way at the daemon */
    uint64_t id;
    struct client_op *next;
    void *user_data;
    int8_t *results;
    uint32_t kind, n;
};

struct client_call {                /* a request whose answer somebody waits for */
    uint32_t seq;
    struct client_call *next;
    bool done;
    int rc;
    char error[FK_WIRE_TEXT];
    void *body;
    size_t bytes;
};

struct client_space {
    flexkv_space pub;
    struct client_space *next;
    uint32_t remote;                /* the daemon's number */
    double compute_rate;            /* 0: not told */
    flexkv_space_desc desc;
    char name[FK_WIRE_NAME], instance[FK_WIRE_INSTANCE];
    void *fingerprint;
    uint32_t n_workers;
    flexkv_agent **agents;          /* of workers in this process */
};

struct client_namespace {
    flexkv_namespace pub;
    struct client_namespace *next;
    uint32_t remote;
    char *name;                     /* joined parts: to find it again */
    char *parts;                    /* each with its 0 */
    size_t parts_bytes;
    uint32_t n_parts;
};

struct client {
    flexkv_node pub;
    char *address;
    uint64_t timeout_us;
    pthread_mutex_t lock;
    pthread_t thread;
    bool has_thread, stop, up;
    bool heard;                     /* something has arrived since the thread's last look */
    bool reopening;                 /* up, but the spaces are not open again yet */
    int fd, event_fd, epoll_fd;
    int wake_fd;                    /* for the thread: stop, or the connection changed */
    struct fk_msg_reader in;
    uint32_t seq;
    uint64_t op_id;
    struct client_op *ops;
    struct client_call *calls;
    FK_VEC(flexkv_completion) completed;
    size_t taken;                   /* of completed */
    struct client_space *spaces;
    struct client_namespace *namespaces;
};

#define client_of(pub_) ((struct client *)(pub_))
#define space_of(pub_) ((struct client_space *)(pub_))
#define ns_of(pub_) ((struct client_namespace *)(pub_))

/* ---- waking ---- */

static void set_event(const struct client *c)
{
    (void)!write(c->event_fd, &(uint64_t){ 1 }, sizeof(uint64_t));
}

static void clear_event(const struct client *c)
{
    uint64_t count;

    (void)!read(c->event_fd, &count, sizeof(count));
}

static void wake_thread(const struct client *c)
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
    set_event(c);
    wake_thread(c);
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
static bool drain(struct client *c)
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
        while ((rc = fk_msg_next(&c->in, &msg, &payload)) == 1) {
            if (msg.type == FK_WIRE_COMPLETIONS)
                take_completion(c, payload, msg.bytes);
            else if (msg.type == FK_WIRE_REPLY)
                take_reply(c, payload, msg.bytes);
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

static int not_connected(const struct client *c)
{
    return fk_api_fail(-ENOTCONN, "the node at %s does not answer; it is looked for", c->address);
}

static int send_request(struct client *c, uint32_t type, const struct iovec *iov, int n)
{
    if (!c->up)
        return not_connected(c);
    int rc = fk_msg_send(c->fd, type, iov, n, NULL, 0, fk_clock_us() + c->timeout_us);
    if (!rc)
        return 0;
    go_down(c, rc == -ETIMEDOUT ? "it takes no requests" : strerror(-rc));
    return not_connected(c);
}

/* Reads until the call is answered; without the lock while it waits. */
static void wait_for(struct client *c, struct client_call *call, uint64_t deadline_us)
{
    while (!call->done) {
        if (drain(c) && call->done)
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
        /* Others may have read the answer: their sign is event_fd; if it is set for another reason,
         * a short sleep keeps this from spinning. */
        (void)poll(p, others ? 1 : 2, others ? 1 : (int)fk_min((deadline_us - now + 999) / 1000,
                                                             (uint64_t)1000));
        pthread_mutex_lock(&c->lock);
    }
    if (c->completed.len > c->taken || c->calls)
        set_event(c);
}

/* A request with an answer. With the lock. *body: to be freed. */
static int call(struct client *c, uint32_t type, uint32_t *seq, const struct iovec *iov, int n,
                uint64_t timeout_us, void **body, size_t *bytes)
{
    struct client_call call = { .seq = *seq = ++c->seq };
    int rc = send_request(c, type, iov, n);

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
static int call_for(struct client *c, uint32_t type, uint32_t *seq, const struct iovec *iov, int n,
                    uint64_t timeout_us, void *out, size_t out_bytes)
{
    fk_autofree void *body = NULL;
    size_t bytes = 0;
    int rc = call(c, type, seq, iov, n, timeout_us, &body, &bytes);

    if (rc)
        return rc;
    if (bytes != out_bytes || !body)
        return fk_api_fail(-EPROTO, "the node at %s answers %zu bytes, %zu are expected", c->address,
                           bytes, out_bytes);
    memcpy(out, body, out_bytes);
    return 0;
}

/* ---- connecting ---- */

/* A connection that has been greeted. Without the lock; fills the reader. */
static int greet(const char *address, uint64_t timeout_us, int *fd, struct fk_msg_reader *in)
{
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
    if (rc == 1 && msg.type == FK_WIRE_WELCOME_CLIENT)
        return 0;
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
static int go_up(struct client *c, int fd, struct fk_msg_reader *in)
{
    struct epoll_event e = { .events = EPOLLIN, .data.fd = fd };

    if (epoll_ctl(c->epoll_fd, EPOLL_CTL_ADD, fd, &e) < 0)
        return -errno;
    c->fd = fd;
    c->in = *in;
    c->up = true;
    return 0;
}

static int ask_for_space(struct client *c, struct client_space *s, struct fk_wire_space_reply *r)
{
    struct fk_wire_space w = {
        .tokens_per_block = s->desc.tokens_per_block, .ranks = s->desc.ranks,
        .workers = s->desc.workers, .slice_bytes = s->desc.slice_bytes, .wait_ms = s->desc.wait_ms,
        .fingerprint_bytes = (uint32_t)s->desc.fingerprint_bytes,
    };
    struct iovec v[2] = { { &w, sizeof(w) }, { s->fingerprint, s->desc.fingerprint_bytes } };
    uint64_t wait = fk_max(s->desc.wait_ms, 1000u) * 1000ull + SLOW_CALL_MS * 1000ull;

    memcpy(w.name, s->name, sizeof(w.name));
    memcpy(w.instance, s->instance, sizeof(w.instance));
    return call_for(c, FK_WIRE_SPACE, &w.seq, v, 2, wait, r, sizeof(*r));
}

static int ask_for_namespace(struct client *c, const struct client_namespace *ns, uint32_t *remote)
{
    struct fk_wire_namespace w = { .space = space_of(ns->pub.space)->remote,
                                   .n_parts = ns->n_parts };
    struct iovec v[2] = { { &w, sizeof(w) }, { ns->parts, ns->parts_bytes } };
    struct fk_wire_namespace_reply r;
    int rc = call_for(c, FK_WIRE_NAMESPACE, &w.seq, v, 2, c->timeout_us, &r, sizeof(r));

    if (!rc)
        *remote = r.ns;
    return rc;
}

static int tell_compute_rate(struct client *c, const struct client_space *s)
{
    struct fk_wire_compute_rate w = { .space = s->remote, .tokens_per_second = s->compute_rate };
    struct iovec v = { &w, sizeof(w) };

    return send_request(c, FK_WIRE_COMPUTE_RATE, &v, 1);
}

/* ---- the thread that looks for the daemon ---- */

/* With the lock, which the calls give up while they wait. The handles stay; keys must stay too. */
static int open_again(struct client *c)
{
    int rc = 0;

    for (struct client_space *s = c->spaces; s && !rc; s = s->next) {
        struct fk_wire_space_reply r;
        rc = ask_for_space(c, s, &r);
        if (!rc && (r.scheme != (uint32_t)s->pub.scheme ||
                    memcmp(r.fingerprint, s->pub.fingerprint, sizeof(r.fingerprint))))
            rc = fk_api_fail(-ESTALE, "the node at %s came back with another key_hash or geometry; "
                             "restart the engine", c->address);
        if (!rc)
            s->remote = r.space;
        if (!rc && s->compute_rate > 0)
            rc = tell_compute_rate(c, s);
    }
    for (struct client_namespace *ns = c->namespaces; ns && !rc; ns = ns->next)
        rc = ask_for_namespace(c, ns, &ns->remote);
    return rc;
}

static int reconnect(struct client *c)
{
    struct fk_msg_reader in;
    int fd, rc;

    pthread_mutex_unlock(&c->lock);
    rc = greet(c->address, c->timeout_us, &fd, &in);
    pthread_mutex_lock(&c->lock);
    if (rc)
        return rc;
    rc = go_up(c, fd, &in);
    if (rc) {
        close(fd);
        fk_msg_reader_free(&in);
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
        (void)drain(c);
}

/* Nobody asks while an engine waits for completions, and a daemon that stands still sends none. */
static void watch(struct client *c)
{
    struct fk_wire_call w = { 0 };
    struct iovec v = { &w, sizeof(w) };

    if (c->up && c->ops && !c->heard)
        (void)call(c, FK_WIRE_STATS, &w.seq, &v, 1, c->timeout_us, NULL, NULL);
    c->heard = false;
}

static void *client_main(void *arg)
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

/* ---- spaces and namespaces ---- */

static void free_space(struct client_space *s)
{
    for (uint32_t i = 0; s->agents && i < s->n_workers; i++)
        flexkv_agent_close(s->agents[i]);
    free(s->agents);
    free(s->fingerprint);
    free(s);
}

static struct client_space *new_space(struct client *c, const flexkv_space_desc *d)
{
    struct client_space *s = calloc(1, sizeof(*s));

    if (!s)
        return NULL;
    s->pub.node = &c->pub;
    s->pub.tokens_per_block = d->tokens_per_block;
    s->desc = *d;
    s->n_workers = d->workers ? d->workers : d->ranks;
    s->desc.workers = s->n_workers;
    snprintf(s->name, sizeof(s->name), "%s", d->name);
    snprintf(s->instance, sizeof(s->instance), "%s", d->instance);
    s->agents = calloc(s->n_workers, sizeof(*s->agents));
    s->fingerprint = malloc(d->fingerprint_bytes + 1);
    if (!s->agents || !s->fingerprint) {
        free_space(s);
        return NULL;
    }
    if (d->fingerprint_bytes)
        memcpy(s->fingerprint, d->fingerprint, d->fingerprint_bytes);
    return s;
}

static int client_space_open(flexkv_node *node, const flexkv_space_desc *d, flexkv_space **out)
{
    struct client *c = client_of(node);
    struct client_space *s = new_space(c, d), *seen;
    struct fk_wire_space_reply r;

    if (!s)
        return fk_api_fail(-ENOMEM, "out of memory");
    pthread_mutex_lock(&c->lock);
    int rc = ask_for_space(c, s, &r);
    if (!rc) {
        for (seen = c->spaces; seen && (strcmp(seen->name, s->name) ||
                                        strcmp(seen->instance, s->instance)); seen = seen->next)
            ;
        s->remote = r.space;
        s->pub.scheme = (enum fk_key_scheme)r.scheme;
        memcpy(s->pub.fingerprint, r.fingerprint, sizeof(r.fingerprint));
        *out = seen ? &seen->pub : &s->pub;
        if (!seen) {
            s->next = c->spaces;
            c->spaces = fk_steal(s);
        }
    }
    pthread_mutex_unlock(&c->lock);
    if (s)
        free_space(s);
    return rc;
}

static struct client_namespace *new_namespace(flexkv_space *space, const char *const *parts,
                                              size_t n)
{
    struct client_namespace *ns = calloc(1, sizeof(*ns));
    char *at;

    if (!ns)
        return NULL;
    for (size_t i = 0; i < n; i++)
        ns->parts_bytes += strlen(parts[i]) + 1;
    ns->pub.space = space;
    ns->pub.seed = fk_key_seed(space->fingerprint, sizeof(space->fingerprint), parts, n);
    ns->n_parts = (uint32_t)n;
    ns->name = fk_join_parts(parts, n);
    ns->parts = at = malloc(ns->parts_bytes + 1);
    for (size_t i = 0; at && i < n; i++)
        at = stpcpy(at, parts[i]) + 1;
    return ns;
}

static void free_namespace(struct client_namespace *ns)
{
    free(ns->name);
    free(ns->parts);
    free(ns);
}

static int client_namespace_open(flexkv_space *space, const char *const *parts, size_t n,
                                 flexkv_namespace **out)
{
    struct client *c = client_of(space->node);
    struct client_namespace *ns = new_namespace(space, parts, n), *seen;
    int rc = 0;

    if (!ns || !ns->name || !ns->parts) {
        if (ns)
            free_namespace(ns);
        return fk_api_fail(-ENOMEM, "out of memory");
    }
    pthread_mutex_lock(&c->lock);
    for (seen = c->namespaces; seen && (seen->pub.space != space || strcmp(seen->name, ns->name));
         seen = seen->next)
        ;
    if (!seen)
        rc = ask_for_namespace(c, ns, &ns->remote);
    if (!seen && !rc) {
        ns->next = c->namespaces;
        c->namespaces = seen = fk_steal(ns);
    }
    pthread_mutex_unlock(&c->lock);
    if (ns)
        free_namespace(ns);
    if (!rc)
        *out = &seen->pub;
    return rc;
}

/* ---- memory of workers in this process: agents of their own ---- */

static int client_regions_unregister(flexkv_space *space, uint32_t rank)
{
    struct client_space *s = space_of(space);
    struct client *c = client_of(space->node);
    flexkv_agent *agent = NULL;

    pthread_mutex_lock(&c->lock);
    if (rank < s->n_workers)
        agent = fk_steal(s->agents[rank]);
    pthread_mutex_unlock(&c->lock);
    if (!agent)
        return fk_api_fail(-ENOENT, "rank %u of space %s is not registered", rank, s->name);
    flexkv_agent_close(agent);
    return 0;
}

static int client_regions_register(flexkv_space *space, uint32_t rank, const flexkv_region *regions,
                                   size_t n)
{
    struct client_space *s = space_of(space);
    struct client *c = client_of(space->node);
    flexkv_agent_desc d = { .struct_bytes = sizeof(d), .address = c->address, .space = s->name,
                            .instance = s->instance, .worker = rank, .slice = rank };
    uint64_t bytes, end = fk_clock_us() + c->timeout_us;
    int state;

    if (rank >= s->n_workers)
        return fk_api_fail(-EINVAL, "rank %u: space %s has %u", rank, s->name, s->n_workers);
    flexkv_agent *agent = NULL;
    int rc = fk_check_regions(regions, n, rank, &bytes);
    pthread_mutex_lock(&c->lock);
    if (!rc && s->agents[rank])
        rc = fk_api_fail(-EEXIST, "rank %u of space %s is registered already", rank, s->name);
    if (!rc)
        rc = flexkv_agent_create(&d, regions, n, &agent);
    if (!rc)
        s->agents[rank] = agent;
    pthread_mutex_unlock(&c->lock);
    if (rc)
        return rc;
    while ((state = flexkv_agent_state(agent)) == 0 && fk_clock_us() < end)
        usleep(1000);
    if (state == 1)
        return 0;
    (void)client_regions_unregister(space, rank);
    return state ? state : fk_api_fail(-ETIMEDOUT, "the node at %s does not take the regions",
                                       c->address);
}

/* ---- requests ---- */

static bool ready(const struct client *c)
{
    return c->up && !c->reopening;
}

/* A daemon that is not there now is told when it comes back. */
static int client_set_compute_rate(flexkv_space *space, double tokens_per_second)
{
    struct client *c = client_of(space->node);

    pthread_mutex_lock(&c->lock);
    space_of(space)->compute_rate = tokens_per_second;
    if (ready(c))
        (void)tell_compute_rate(c, space_of(space));
    pthread_mutex_unlock(&c->lock);
    return 0;
}

static int client_match(flexkv_namespace *ns, const struct fk_key *keys, uint32_t n,
                        flexkv_match_result *out)
{
    struct client *c = client_of(ns->space->node);
    struct fk_wire_match w = { .n = n };
    struct iovec v[2] = { { &w, sizeof(w) }, { (void *)(uintptr_t)keys, n * sizeof(*keys) } };
    int rc = 0;

    *out = (flexkv_match_result){ 0 };
    pthread_mutex_lock(&c->lock);
    w.ns = ns_of(ns)->remote;
    if (ready(c))
        rc = call_for(c, FK_WIRE_MATCH, &w.seq, v, 2, c->timeout_us, out, sizeof(*out));
    pthread_mutex_unlock(&c->lock);
    if (rc == -ENOTCONN) {              /* no daemon: nothing is known */
        *out = (flexkv_match_result){ 0 };
        rc = 0;
    }
    return rc;
}

static int client_release(flexkv_node *node, uint64_t lease)
{
    struct client *c = client_of(node);
    struct fk_wire_release w = { lease };
    struct iovec v = { &w, sizeof(w) };

    pthread_mutex_lock(&c->lock);
    int rc = ready(c) ? send_request(c, FK_WIRE_RELEASE, &v, 1) : not_connected(c);
    pthread_mutex_unlock(&c->lock);
    return rc;
}

/* With the lock: sends an operation and remembers it. */
static int start(struct client *c, enum flexkv_op_kind kind, uint32_t type, uint64_t *id, uint32_t n,
                 const struct iovec *iov, int n_iov, const flexkv_op_args *args, uint64_t *out)
{
    struct client_op *op = ready(c) ? calloc(1, sizeof(*op)) : NULL;

    if (!op)
        return ready(c) ? fk_api_fail(-ENOMEM, "out of memory") : not_connected(c);
    *op = (struct client_op){ .id = ++c->op_id, .kind = kind, .n = n,
                              .user_data = args->user_data,
                              .results = kind == FLEXKV_OP_PREFETCH ? NULL : args->results };
    *id = *out = op->id;
    int rc = send_request(c, type, iov, n_iov);
    if (rc) {
        free(op);
        return rc;
    }
    op->next = c->ops;
    c->ops = op;
    return 0;
}

static int client_get(flexkv_node *node, uint64_t lease, uint32_t first, uint32_t n,
                      const flexkv_op_args *args, uint64_t *op)
{
    struct client *c = client_of(node);
    struct fk_wire_get w = { .lease = lease, .first = first, .n = n, .timeout_ms = args->timeout_ms };
    struct iovec v[2] = { { &w, sizeof(w) },
                          { (void *)(uintptr_t)args->pages, n * sizeof(*args->pages) } };

    pthread_mutex_lock(&c->lock);
    int rc = start(c, FLEXKV_OP_GET, FK_WIRE_GET, &w.op, n, v, 2, args, op);
    pthread_mutex_unlock(&c->lock);
    return rc;
}

static int client_put(flexkv_namespace *ns, const struct fk_key *keys, uint32_t n, uint32_t first,
                      const flexkv_op_args *args, uint64_t *op)
{
    struct client *c = client_of(ns->space->node);
    struct fk_wire_put w = { .first = first, .n = n, .timeout_ms = args->timeout_ms };
    uint32_t skip = first ? first - 1 : 0;
    struct iovec v[3] = { { &w, sizeof(w) },
                          { (void *)(uintptr_t)(keys + skip), (n - skip) * sizeof(*keys) },
                          { (void *)(uintptr_t)args->pages, (n - first) * sizeof(*args->pages) } };

    pthread_mutex_lock(&c->lock);
    w.ns = ns_of(ns)->remote;
    int rc = start(c, FLEXKV_OP_PUT, FK_WIRE_PUT, &w.op, n - first, v, 3, args, op);
    pthread_mutex_unlock(&c->lock);
    return rc;
}

static int client_prefetch(flexkv_namespace *ns, const struct fk_key *keys, uint32_t n,
                           const flexkv_op_args *args, uint64_t *op)
{
    struct client *c = client_of(ns->space->node);
    struct fk_wire_prefetch w = { .n = n, .timeout_ms = args->timeout_ms };
    struct iovec v[2] = { { &w, sizeof(w) }, { (void *)(uintptr_t)keys, n * sizeof(*keys) } };

    pthread_mutex_lock(&c->lock);
    w.ns = ns_of(ns)->remote;
    int rc = start(c, FLEXKV_OP_PREFETCH, FK_WIRE_PREFETCH, &w.op, 0, v, 2, args, op);
    pthread_mutex_unlock(&c->lock);
    return rc;
}

static int client_cancel(flexkv_node *node, uint64_t op)
{
    struct client *c = client_of(node);
    struct fk_wire_cancel w = { op };
    struct iovec v = { &w, sizeof(w) };
    const struct client_op *o;

    pthread_mutex_lock(&c->lock);
    for (o = c->ops; o && o->id != op; o = o->next)
        ;
    int rc = !o ? fk_api_fail(-ENOENT, "no such operation: it has ended")
             : ready(c) ? send_request(c, FK_WIRE_CANCEL, &v, 1) : not_connected(c);
    pthread_mutex_unlock(&c->lock);
    return rc;
}

static int take_completed(struct client *c, flexkv_completion *out, int max)
{
    int n = 0;

    while (n < max && c->taken < c->completed.len)
        out[n++] = c->completed.data[c->taken++];
    if (c->taken == c->completed.len) {
        c->taken = c->completed.len = 0;
        if (!c->calls)
            clear_event(c);
    }
    return n;
}

static int client_poll(flexkv_node *node, flexkv_completion *out, int max, int timeout_ms)
{
    struct client *c = client_of(node);
    uint64_t end = fk_clock_us() + (timeout_ms > 0 ? (uint64_t)timeout_ms * 1000 : 0);

    for (;;) {
        pthread_mutex_lock(&c->lock);
        drain(c);
        int n = take_completed(c, out, max);
        struct pollfd p[2] = { { .fd = c->event_fd, .events = POLLIN },
                               { .fd = c->fd, .events = POLLIN } };
        pthread_mutex_unlock(&c->lock);
        uint64_t now = fk_clock_us();
        if (n || timeout_ms == 0 || (timeout_ms > 0 && now >= end))
            return n;
        int left = timeout_ms < 0 ? 1000 : (int)fk_min((end - now + 999) / 1000, (uint64_t)1000);
        if (poll(p, 2, left) < 0 && errno != EINTR)
            return fk_api_fail(-errno, "poll: %s", strerror(errno));
    }
}

static int simple_call(struct client *c, uint32_t type, uint64_t timeout_us, void **body,
                       size_t *bytes)
{
    struct fk_wire_call w = { 0 };
    struct iovec v = { &w, sizeof(w) };

    pthread_mutex_lock(&c->lock);
    int rc = ready(c) ? call(c, type, &w.seq, &v, 1, timeout_us, body, bytes) : not_connected(c);
    pthread_mutex_unlock(&c->lock);
    return rc;
}

static int client_reset(flexkv_node *node)
{
    return simple_call(client_of(node), FK_WIRE_RESET, SLOW_CALL_MS * 1000ull, NULL, NULL);
}

static int client_stats(flexkv_node *node, flexkv_stats *out)
{
    fk_autofree void *body = NULL;
    size_t bytes = 0;
    int rc = simple_call(client_of(node), FK_WIRE_STATS, client_of(node)->timeout_us, &body, &bytes);

    if (!rc && (!body || bytes != sizeof(*out)))
        rc = fk_api_fail(-EPROTO, "the node's statistics are of another version");
    if (!rc)
        memcpy(out, body, bytes);
    return rc;
}

static int client_status(flexkv_node *node, char **json)
{
    void *body = NULL;
    size_t bytes = 0;
    int rc = simple_call(client_of(node), FK_WIRE_STATUS, client_of(node)->timeout_us, &body, &bytes);

    if (!rc && !body)
        rc = fk_api_fail(-EPROTO, "the node's status is empty");
    if (!rc)
        *json = body;
    return rc;
}

static int client_fd(flexkv_node *node)
{
    return client_of(node)->epoll_fd;
}

/* ---- the end ---- */

static void client_close(flexkv_node *node)
{
    struct client *c = client_of(node);

    while (c->spaces) {                 /* agents first: they use the address */
        struct client_space *next = c->spaces->next;
        free_space(c->spaces);
        c->spaces = next;
    }
    pthread_mutex_lock(&c->lock);
    c->stop = true;
    set_event(c);                       /* its thread may be opening spaces again, which takes time */
    pthread_mutex_unlock(&c->lock);
    if (c->has_thread) {
        wake_thread(c);
        pthread_join(c->thread, NULL);
    }
    while (c->namespaces) {
        struct client_namespace *next = c->namespaces->next;
        free_namespace(c->namespaces);
        c->namespaces = next;
    }
    while (c->ops) {
        struct client_op *next = c->ops->next;
        free(c->ops);
        c->ops = next;
    }
    fk_msg_reader_free(&c->in);
    if (c->fd >= 0)
        close(c->fd);
    if (c->event_fd >= 0)
        close(c->event_fd);
    if (c->wake_fd >= 0)
        close(c->wake_fd);
    if (c->epoll_fd >= 0)
        close(c->epoll_fd);
    fk_vec_free(&c->completed);
    free(c->address);
    free(c);
}

static const struct fk_node_vt client_vt = {
    .close = client_close, .fd = client_fd, .status = client_status,
    .space_open = client_space_open, .namespace_open = client_namespace_open,
    .regions_register = client_regions_register, .regions_unregister = client_regions_unregister,
    .set_compute_rate = client_set_compute_rate, .match = client_match,
    .release = client_release, .get = client_get, .put = client_put, .prefetch = client_prefetch,
    .cancel = client_cancel, .poll = client_poll, .reset = client_reset, .stats = client_stats,
};

static int read_config(struct client *c, const flexkv_config *given)
{
    flexkv_config *config;
    int rc = fk_api_config_open(given, &config);

    if (rc)
        return rc;
    c->timeout_us = (uint64_t)config->config->settings.server_timeout_ms * 1000;
    flexkv_config_destroy(config);
    return 0;
}

static int prepare(struct client *c)
{
    struct epoll_event e = { .events = EPOLLIN };

    pthread_mutex_init(&c->lock, NULL);
    c->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    c->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    c->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    e.data.fd = c->event_fd;
    if (!c->address || c->event_fd < 0 || c->wake_fd < 0 || c->epoll_fd < 0 ||
        epoll_ctl(c->epoll_fd, EPOLL_CTL_ADD, c->event_fd, &e) < 0)
        return fk_api_fail(-ENOMEM, "cannot set up a client");
    return 0;
}

FLEXKV_API int flexkv_node_connect(const flexkv_config *config, const char *address,
                                   flexkv_node **out)
{
    struct client *c = calloc(1, sizeof(*c));
    struct fk_msg_reader in;
    int fd;

    if (!c)
        return fk_api_fail(-ENOMEM, "out of memory");
    c->pub.vt = &client_vt;
    c->fd = c->event_fd = c->wake_fd = c->epoll_fd = -1;
    c->op_id = fk_clock_us() << 16;     /* unlike those of a client that was here before */
    c->address = strdup(address);
    int rc = read_config(c, config);
    if (!rc)
        rc = prepare(c);
    if (!rc)
        rc = greet(address, c->timeout_us, &fd, &in);
    if (!rc)
        rc = go_up(c, fd, &in);
    if (!rc && (rc = -pthread_create(&c->thread, NULL, client_main, c)))
        fk_api_fail(rc, "cannot start the client's thread: %s", strerror(-rc));
    c->has_thread = !rc;
    if (rc) {
        client_close(&c->pub);
        return rc;
    }
    *out = &c->pub;
    return 0;
}
