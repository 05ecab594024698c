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
#include <stdio.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>

#include "api/client_impl.h"
#include "api/config_impl.h"
#include "base/clock.h"

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
    int rc = fk_client_ask_for_space(c, s, &r);
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
        rc = fk_client_ask_for_namespace(c, ns, &ns->remote);
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
        (void)fk_client_tell_compute_rate(c, space_of(space));
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
        rc = fk_client_call_for(c, FK_WIRE_MATCH, &w.seq, v, 2, c->timeout_us, out, sizeof(*out));
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
    int rc = ready(c) ? fk_client_send_request(c, FK_WIRE_RELEASE, &v, 1)
                      : fk_client_not_connected(c);
    pthread_mutex_unlock(&c->lock);
    return rc;
}

/* With the lock: sends an operation and remembers it. */
static int start(struct client *c, enum flexkv_op_kind kind, uint32_t type, uint64_t *id, uint32_t n,
                 const struct iovec *iov, int n_iov, const flexkv_op_args *args, uint64_t *out)
{
    struct client_op *op = ready(c) ? calloc(1, sizeof(*op)) : NULL;

    if (!op)
        return ready(c) ? fk_api_fail(-ENOMEM, "out of memory") : fk_client_not_connected(c);
    *op = (struct client_op){ .id = ++c->op_id, .kind = kind, .n = n,
                              .user_data = args->user_data,
                              .results = kind == FLEXKV_OP_PREFETCH ? NULL : args->results };
    *id = *out = op->id;
    int rc = fk_client_send_request(c, type, iov, n_iov);
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
    struct fk_wire_get w = { .lease = lease, .first = first, .n = n,
                             .timeout_ms = args->timeout_ms, .flags = args->flags,
                             .counter = args->counter };
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
    struct fk_wire_put w = { .first = first, .n = n, .timeout_ms = args->timeout_ms,
                             .event_parent = args->event_parent };
    uint32_t skip = first ? first - 1 : 0, blocks = n - first;
    size_t token_bytes = (size_t)blocks * ns->space->tokens_per_block * sizeof(uint32_t);
    struct iovec v[5] = { { &w, sizeof(w) },
                          { (void *)(uintptr_t)(keys + skip), (n - skip) * sizeof(*keys) },
                          { (void *)(uintptr_t)args->event_hashes, 0 },
                          { (void *)(uintptr_t)args->pages, blocks * sizeof(*args->pages) },
                          { (void *)(uintptr_t)args->event_tokens, 0 } };

    pthread_mutex_lock(&c->lock);
    w.ns = ns_of(ns)->remote;
    w.named = args->event_hashes && c->events_on;       /* else nobody there wants to know */
    if (w.named) {
        v[2].iov_len = blocks * sizeof(*args->event_hashes);
        v[4].iov_len = token_bytes;
    }
    int rc = start(c, FLEXKV_OP_PUT, FK_WIRE_PUT, &w.op, blocks, v, 5, args, op);
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
             : ready(c) ? fk_client_send_request(c, FK_WIRE_CANCEL, &v, 1)
                        : fk_client_not_connected(c);
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
            fk_client_clear_event(c);
    }
    return n;
}

static int client_poll(flexkv_node *node, flexkv_completion *out, int max, int timeout_ms)
{
    struct client *c = client_of(node);
    uint64_t end = fk_clock_us() + (timeout_ms > 0 ? (uint64_t)timeout_ms * 1000 : 0);

    for (;;) {
        pthread_mutex_lock(&c->lock);
        fk_client_drain(c);
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
    int rc = ready(c) ? fk_client_call(c, type, &w.seq, &v, 1, timeout_us, body, bytes)
                      : fk_client_not_connected(c);
    pthread_mutex_unlock(&c->lock);
    return rc;
}

static int client_reset(flexkv_node *node)
{
    return simple_call(client_of(node), FK_WIRE_RESET, FK_CLIENT_SLOW_CALL_MS * 1000ull, NULL, NULL);
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

    fk_client_events_orphan(c);
    while (c->spaces) {                 /* agents first: they use the address */
        struct client_space *next = c->spaces->next;
        free_space(c->spaces);
        c->spaces = next;
    }
    pthread_mutex_lock(&c->lock);
    c->stop = true;
    fk_client_set_event(c);             /* its thread may be opening spaces again, which takes time */
    pthread_mutex_unlock(&c->lock);
    if (c->has_thread) {
        fk_client_wake_thread(c);
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
    .namespace_label = fk_client_namespace_label, .events_open = fk_client_events_open,
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
    struct client_greeting with;

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
        rc = fk_client_greet(address, c->timeout_us, &with);
    if (!rc)
        rc = fk_client_go_up(c, &with);
    if (!rc && (rc = -pthread_create(&c->thread, NULL, fk_client_main, c)))
        fk_api_fail(rc, "cannot start the client's thread: %s", strerror(-rc));
    c->has_thread = !rc;
    if (rc) {
        client_close(&c->pub);
        return rc;
    }
    *out = &c->pub;
    return 0;
}
