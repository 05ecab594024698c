/*
 * session.c - a client of the node: its requests, carried out by the server's thread as if by the
 * node's own process, and its operations' completions. See peer.h, wire.h.
 *
 * Opening a space and reset wait for files and workers: threads of their own do that. They own a copy
 * of the request and come back through `done`, under the node's lock.
 */
#include <stdio.h>
#include <sys/socket.h>

#include "api/peer.h"
#include "base/clock.h"
#include "base/log.h"

#define OUT_MAX (64u << 20)             /* a client that reads nothing for so long is dropped */
#define SLOW_MAX 64u
#define COMPLETIONS_AT_ONCE 64u

struct session_op {                 /* the user_data of a client's operation */
    struct session_op *next, **link;
    struct fk_session *session;     /* NULL: it ended meanwhile */
    uint64_t client_op, core_op;
};

struct slow {                       /* a request with a thread of its own */
    struct slow *next;
    struct fk_session *session;     /* NULL: it ended meanwhile */
    struct fk_node *node;
    uint64_t session_id;
    uint32_t type, seq;
    flexkv_space_desc desc;
    char name[FK_WIRE_NAME], instance[FK_WIRE_INSTANCE];
    void *fingerprint;
    bool over;
    int rc;
    char error[FK_WIRE_TEXT];
    struct fk_instance *in;
    struct fk_session_events events;
};

struct fk_session {
    struct fk_peer *peer;
    struct fk_node *node;
    uint64_t id;
    FK_VEC(struct fk_instance *) spaces;
    FK_VEC(struct fk_namespace *) namespaces;
    FK_VEC(uint8_t) out;
    size_t out_at;                  /* sent so far */
    bool watching_write, user;
    bool wants_note;                /* when there are events */
    struct session_op *ops;
    struct slow *slow;              /* under node->lock */
};

struct fk_session *fk_session_create(struct fk_peer *peer)
{
    struct fk_session *s = calloc(1, sizeof(*s));

    if (!s)
        return NULL;
    s->peer = peer;
    s->node = peer->server->node;
    s->id = ++peer->server->next_session;
    return s;
}

uint64_t fk_session_id(const struct fk_session *s)
{
    return s->id;
}

/* ---- answers ---- */

static int append(struct fk_session *s, const void *data, size_t bytes)
{
    if (s->out.len + bytes > OUT_MAX || fk_vec_reserve(&s->out, s->out.len + bytes + 8))
        return -ENOBUFS;
    memcpy(s->out.data + s->out.len, data, bytes);
    s->out.len += bytes;
    return 0;
}

static int answer(struct fk_session *s, uint32_t type, const void *head, size_t head_bytes,
                  const void *body, size_t body_bytes)
{
    struct fk_msg msg = { (uint32_t)(head_bytes + body_bytes), type };
    static const uint8_t zero[8];
    int rc = append(s, &msg, sizeof(msg));

    if (!rc)
        rc = append(s, head, head_bytes);
    if (!rc && body_bytes)
        rc = append(s, body, body_bytes);
    return rc ? rc : append(s, zero, fk_msg_padding(msg.bytes));
}

static int reply(struct fk_session *s, uint32_t seq, int rc, const void *body, size_t bytes)
{
    struct fk_wire_reply r = { seq, rc };

    if (rc < 0) {
        body = flexkv_last_error();
        bytes = strlen(body) + 1;
    }
    return answer(s, FK_WIRE_REPLY, &r, sizeof(r), body, bytes);
}

int fk_session_flush(struct fk_session *s)
{
    while (s->out_at < s->out.len) {
        ssize_t n = send(s->peer->fd, s->out.data + s->out_at, s->out.len - s->out_at,
                         MSG_NOSIGNAL | MSG_DONTWAIT);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0 && errno != EAGAIN)
            return -errno;
        if (n < 0)
            break;
        s->out_at += (size_t)n;
    }
    bool left = s->out_at < s->out.len;
    if (!left)
        s->out.len = s->out_at = 0;
    if (left != s->watching_write) {
        s->watching_write = left;
        fk_server_rewatch(s->peer->server, s->peer->fd, &s->peer->socket, left);
    }
    return 0;
}

/* ---- what a client may name ---- */

static struct fk_instance *space_of(const struct fk_session *s, uint32_t at)
{
    return at < s->spaces.len ? s->spaces.data[at] : NULL;
}

static struct fk_namespace *namespace_of(const struct fk_session *s, uint32_t at)
{
    return at < s->namespaces.len ? s->namespaces.data[at] : NULL;
}

/* ---- slow requests ---- */

static void free_slow(struct slow *job)
{
    free(job->fingerprint);
    fk_vec_free(&job->events.body);
    free(job);
}

static int run_slow(struct fk_node *node, struct slow *job)
{
    bool armed;

    switch (job->type) {
    case FK_WIRE_RESET: return fk_local_reset(&node->pub);
    case FK_WIRE_EVENTS: return fk_session_events_run(node, &job->events, &armed);
    default: return fk_instance_open(node, &job->desc, job->session_id, &job->in);
    }
}

static void *slow_main(void *arg)
{
    struct slow *job = arg;
    struct fk_node *node = job->node;
    struct fk_server *sv = node->server;

    job->rc = run_slow(node, job);
    snprintf(job->error, sizeof(job->error), "%s", job->rc ? flexkv_last_error() : "");
    pthread_mutex_lock(&node->lock);
    job->over = true;
    bool orphan = !job->session;
    if (orphan)                         /* what it has opened is nobody's */
        for (struct fk_instance *in = node->instances; in; in = in->next)
            if (in->owner == job->session_id && !in->ended)
                fk_instance_end(in);
    fk_node_unlock(node);
    if (orphan)
        free_slow(job);
    else
        fk_server_wake(node);
    atomic_fetch_sub(&sv->n_slow, 1);
    return NULL;
}

static int start_slow(struct fk_session *s, struct slow *job)
{
    pthread_attr_t detached;
    pthread_t thread;

    job->session = s;
    job->node = s->node;
    job->session_id = s->id;
    if (atomic_fetch_add(&s->peer->server->n_slow, 1) >= SLOW_MAX) {
        atomic_fetch_sub(&s->peer->server->n_slow, 1);
        return fk_api_fail(-EBUSY, "the daemon has %u slow requests under way already", SLOW_MAX);
    }
    pthread_mutex_lock(&s->node->lock);
    job->next = s->slow;
    s->slow = job;
    pthread_mutex_unlock(&s->node->lock);
    pthread_attr_init(&detached);
    pthread_attr_setdetachstate(&detached, PTHREAD_CREATE_DETACHED);
    int rc = pthread_create(&thread, &detached, slow_main, job);
    pthread_attr_destroy(&detached);
    if (!rc)
        return 0;
    atomic_fetch_sub(&s->peer->server->n_slow, 1);
    pthread_mutex_lock(&s->node->lock);
    s->slow = job->next;
    pthread_mutex_unlock(&s->node->lock);
    return fk_api_fail(-rc, "cannot start a thread: %s", strerror(rc));
}

static int answer_space(struct fk_session *s, const struct slow *job)
{
    struct fk_wire_space_reply r = { .scheme = job->in->pub.scheme };
    uint32_t at = 0;

    while (at < s->spaces.len && s->spaces.data[at] != job->in)
        at++;
    if (at == s->spaces.len && fk_vec_push(&s->spaces, job->in))
        return -ENOMEM;
    r.space = at;
    memcpy(r.fingerprint, job->in->pub.fingerprint, sizeof(r.fingerprint));
    return reply(s, job->seq, 0, &r, sizeof(r));
}

static int answer_events(struct fk_session *s, const struct fk_session_events *x)
{
    struct { struct fk_wire_reply r; struct fk_wire_events_reply e; } head = {
        { x->request.seq, 0 }, x->reply };

    return answer(s, FK_WIRE_REPLY, &head, sizeof(head), x->body.data, x->body.len);
}

static int answer_slow(struct fk_session *s, const struct slow *job)
{
    if (job->rc)
        return reply(s, job->seq, fk_api_fail(job->rc, "%s", job->error), NULL, 0);
    if (job->type == FK_WIRE_SPACE)
        return answer_space(s, job);
    if (job->type == FK_WIRE_EVENTS)
        return answer_events(s, &job->events);
    return reply(s, job->seq, 0, NULL, 0);
}

int fk_session_finish_slow(struct fk_session *s)
{
    int rc = 0;

    for (;;) {
        pthread_mutex_lock(&s->node->lock);
        struct slow **at = &s->slow, *job;
        while ((job = *at) && !job->over)
            at = &job->next;
        if (job)
            *at = job->next;
        pthread_mutex_unlock(&s->node->lock);
        if (!job)
            return rc ? rc : fk_session_flush(s);
        rc = rc ? rc : answer_slow(s, job);
        free_slow(job);
    }
}

static int handle_space(struct fk_session *s, const uint8_t *payload, size_t bytes)
{
    struct fk_wire_space r;

    if (bytes < sizeof(r))
        return -EPROTO;
    memcpy(&r, payload, sizeof(r));
    if (bytes - sizeof(r) != r.fingerprint_bytes || !memchr(r.name, 0, sizeof(r.name)) ||
        !memchr(r.instance, 0, sizeof(r.instance)))
        return -EPROTO;
    if (!s->user)
        fk_server_note_user(s->peer->server);
    s->user = true;
    struct slow *job = calloc(1, sizeof(*job));
    if (!job || !(job->fingerprint = malloc(r.fingerprint_bytes + 1u))) {
        free(job);
        return -ENOMEM;
    }
    memcpy(job->fingerprint, payload + sizeof(r), r.fingerprint_bytes);
    memcpy(job->name, r.name, sizeof(job->name));
    memcpy(job->instance, r.instance, sizeof(job->instance));
    job->type = FK_WIRE_SPACE;
    job->seq = r.seq;
    job->desc = (flexkv_space_desc){
        .struct_bytes = sizeof(job->desc), .name = job->name, .fingerprint = job->fingerprint,
        .fingerprint_bytes = r.fingerprint_bytes, .tokens_per_block = r.tokens_per_block,
        .ranks = r.ranks, .slice_bytes = r.slice_bytes, .instance = job->instance,
        .workers = r.workers, .wait_ms = r.wait_ms,
    };
    int rc = fk_check_space_desc(&job->desc);
    if (!rc && !job->desc.workers)
        rc = fk_api_fail(-EINVAL, "space %s: workers is not set", job->name);
    if (!rc)
        rc = start_slow(s, job);
    if (!rc)
        return 0;
    free_slow(job);
    return reply(s, r.seq, rc, NULL, 0);
}

/* ---- quick requests ---- */

#define PARTS_MAX 64u

static int handle_namespace(struct fk_session *s, const uint8_t *payload, size_t bytes)
{
    struct fk_wire_namespace r;
    struct fk_wire_namespace_reply answered = { 0 };
    const char *parts[PARTS_MAX], *at = (const char *)payload + sizeof(r);
    const char *end = (const char *)payload + bytes;
    flexkv_namespace *ns;

    if (bytes < sizeof(r))
        return -EPROTO;
    memcpy(&r, payload, sizeof(r));
    struct fk_instance *in = space_of(s, r.space);
    if (!in || r.n_parts > PARTS_MAX)
        return reply(s, r.seq, fk_api_fail(-EINVAL, "no such space, or more than %u parts of a "
                                           "namespace", PARTS_MAX), NULL, 0);
    for (uint32_t i = 0; i < r.n_parts; i++) {
        const char *zero = memchr(at, 0, (size_t)(end - at));
        if (!zero)
            return -EPROTO;
        parts[i] = at;
        at = zero + 1;
    }
    int rc = fk_local_namespace_open(&in->pub, parts, r.n_parts, &ns);
    answered.ns = (uint32_t)s->namespaces.len;
    if (!rc && fk_vec_push(&s->namespaces, fk_local_namespace(ns)))
        rc = fk_api_fail(-ENOMEM, "out of memory");
    return reply(s, r.seq, rc, &answered, sizeof(answered));
}

static int handle_match(struct fk_session *s, const uint8_t *payload, size_t bytes)
{
    struct fk_wire_match r;
    flexkv_match_result m = { 0 };

    if (bytes < sizeof(r))
        return -EPROTO;
    memcpy(&r, payload, sizeof(r));
    struct fk_namespace *ns = namespace_of(s, r.ns);
    if (!ns || (bytes - sizeof(r)) / sizeof(struct fk_key) < r.n)
        return -EPROTO;
    int rc = fk_local_match(&ns->pub, (const struct fk_key *)(const void *)(payload + sizeof(r)), r.n,
                            &m);
    return reply(s, r.seq, rc, &m, sizeof(m));
}

/* Is the lease of one of this client's instances? */
static bool owns_lease(const struct fk_session *s, uint64_t lease)
{
    uint32_t instance;
    bool owns = false;

    pthread_mutex_lock(&s->node->lock);
    if (fk_core_lease_instance(s->node->core, lease, &instance) == 0) {
        const struct fk_instance *in = fk_instance_by_id(s->node, instance);
        owns = in && in->owner == s->id;
    }
    pthread_mutex_unlock(&s->node->lock);
    return owns;
}

static int handle_release(struct fk_session *s, const uint8_t *payload, size_t bytes)
{
    struct fk_wire_release r;

    if (bytes != sizeof(r))
        return -EPROTO;
    memcpy(&r, payload, sizeof(r));
    if (owns_lease(s, r.lease))
        (void)fk_local_release(&s->node->pub, r.lease);
    return 0;
}

/* ---- operations ---- */

static int complete(struct fk_session *s, uint64_t op, int status, const flexkv_completion *c)
{
    struct fk_wire_completion w = { .op = op, .status = status };

    if (c) {
        w.blocks = c->blocks;
        w.blocks_ok = c->blocks_ok;
        w.flags = c->flags;
    }
    return answer(s, FK_WIRE_COMPLETIONS, &w, sizeof(w), NULL, 0);
}

static struct session_op *new_op(struct fk_session *s, uint64_t client_op)
{
    struct session_op *op = calloc(1, sizeof(*op));

    if (!op)
        return NULL;
    op->session = s;
    op->client_op = client_op;
    op->next = s->ops;
    op->link = &s->ops;
    if (s->ops)
        s->ops->link = &op->next;
    s->ops = op;
    return op;
}

static void free_op(struct session_op *op)
{
    if (op->session) {
        *op->link = op->next;
        if (op->next)
            op->next->link = op->link;
    }
    free(op);
}

static flexkv_op_args args_of(struct session_op *op, const void *pages, uint32_t timeout_ms)
{
    return (flexkv_op_args){ .struct_bytes = sizeof(flexkv_op_args), .pages = pages,
                             .timeout_ms = timeout_ms, .user_data = op };
}

/* Started, or over at once. */
static int started(struct fk_session *s, struct session_op *op, int rc)
{
    if (rc == 0)
        return 0;
    uint64_t id = op->client_op;
    free_op(op);
    return complete(s, id, rc, NULL);
}

static int handle_get(struct fk_session *s, const uint8_t *payload, size_t bytes)
{
    struct fk_wire_get r;

    if (bytes < sizeof(r))
        return -EPROTO;
    memcpy(&r, payload, sizeof(r));
    if ((bytes - sizeof(r)) / sizeof(uint32_t) < r.n)
        return -EPROTO;
    if (!owns_lease(s, r.lease))
        return complete(s, r.op, -ENOENT, NULL);
    struct session_op *op = new_op(s, r.op);
    if (!op)
        return -ENOMEM;
    flexkv_op_args args = args_of(op, payload + sizeof(r), r.timeout_ms);
    args.flags = r.flags;
    args.counter = r.flags & FLEXKV_OP_LAYERWISE ? r.counter : 0;
    return started(s, op, fk_node_get(s->node, NULL, r.lease, r.first, r.n, &args, r.op,
                                      &op->core_op));
}

/* What lies where in a put: keys, hashes, pages, tokens. */
struct put_layout { uint64_t hashes, pages, tokens, end; };

static struct put_layout layout_of(const struct fk_wire_put *r, uint32_t skipped, uint32_t per_block)
{
    uint64_t blocks = r->n - r->first;
    struct put_layout l = { .hashes = sizeof(*r) + (uint64_t)(r->n - skipped) * sizeof(struct fk_key) };

    l.pages = l.hashes + (r->named ? blocks * sizeof(uint64_t) : 0);
    l.tokens = l.pages + blocks * sizeof(uint32_t);
    l.end = l.tokens + (r->named ? blocks * per_block * sizeof(uint32_t) : 0);
    return l;
}

static int handle_put(struct fk_session *s, const uint8_t *payload, size_t bytes)
{
    struct fk_wire_put r;

    if (bytes < sizeof(r))
        return -EPROTO;
    memcpy(&r, payload, sizeof(r));
    struct fk_namespace *ns = namespace_of(s, r.ns);
    if (!ns || r.first > r.n || r.named > 1)
        return -EPROTO;
    uint32_t skipped = r.first ? r.first - 1 : 0;       /* keys that are not sent */
    struct put_layout at = layout_of(&r, skipped, ns->instance->space->tokens_per_block);
    if (bytes < at.end)
        return -EPROTO;
    const struct fk_key *keys = (const struct fk_key *)(const void *)(payload + sizeof(r));
    struct session_op *op = new_op(s, r.op);
    if (!op)
        return -ENOMEM;
    flexkv_op_args args = args_of(op, payload + at.pages, r.timeout_ms);
    if (r.named) {
        args.event_hashes = (const uint64_t *)(const void *)(payload + at.hashes);
        args.event_tokens = (const uint32_t *)(const void *)(payload + at.tokens);
        args.event_parent = r.event_parent;
    }
    return started(s, op, fk_node_put(ns, keys, r.n - skipped, r.first - skipped, &args, r.op,
                                      &op->core_op));
}

static int handle_prefetch(struct fk_session *s, const uint8_t *payload, size_t bytes)
{
    struct fk_wire_prefetch r;

    if (bytes < sizeof(r))
        return -EPROTO;
    memcpy(&r, payload, sizeof(r));
    struct fk_namespace *ns = namespace_of(s, r.ns);
    if (!ns || (bytes - sizeof(r)) / sizeof(struct fk_key) < r.n)
        return -EPROTO;
    struct session_op *op = new_op(s, r.op);
    if (!op)
        return -ENOMEM;
    flexkv_op_args args = args_of(op, NULL, r.timeout_ms);
    return started(s, op, fk_node_prefetch(ns, (const struct fk_key *)(const void *)
                                           (payload + sizeof(r)), r.n, &args, &op->core_op));
}

static int handle_cancel(struct fk_session *s, const uint8_t *payload, size_t bytes)
{
    struct fk_wire_cancel r;
    struct session_op *op = s->ops;

    if (bytes != sizeof(r))
        return -EPROTO;
    memcpy(&r, payload, sizeof(r));
    while (op && op->client_op != r.op)
        op = op->next;
    if (op)
        (void)fk_local_cancel(&s->node->pub, op->core_op);
    return 0;
}

void fk_session_complete(const flexkv_completion *c)
{
    struct session_op *op = c->user_data;

    if (op->session && complete(op->session, op->client_op, c->status, c))
        op->session->peer->gone = true;
    free_op(op);
}

/* ---- the rest ---- */

static int handle_call(struct fk_session *s, uint32_t type, const uint8_t *payload, size_t bytes)
{
    struct fk_wire_call r;
    flexkv_stats st = { .struct_bytes = sizeof(st) };
    fk_autofree char *json = NULL;

    if (bytes != sizeof(r))
        return -EPROTO;
    memcpy(&r, payload, sizeof(r));
    if (type == FK_WIRE_STATS)
        return reply(s, r.seq, fk_local_stats(&s->node->pub, &st), &st, sizeof(st));
    if (type == FK_WIRE_STATUS) {
        int rc = fk_node_status_json(s->node, &json);
        return reply(s, r.seq, rc, json, rc ? 0 : strlen(json) + 1);
    }
    struct slow *job = calloc(1, sizeof(*job));
    if (!job)
        return -ENOMEM;
    job->type = FK_WIRE_RESET;
    job->seq = r.seq;
    int rc = start_slow(s, job);
    if (!rc)
        return 0;
    free_slow(job);
    return reply(s, r.seq, rc, NULL, 0);
}

static int handle_compute_rate(struct fk_session *s, const uint8_t *payload, size_t bytes)
{
    struct fk_wire_compute_rate r;

    if (bytes != sizeof(r))
        return -EPROTO;
    memcpy(&r, payload, sizeof(r));
    struct fk_instance *in = space_of(s, r.space);
    if (in && r.tokens_per_second >= 0 && r.tokens_per_second < 1e12)
        (void)fk_local_set_compute_rate(&in->pub, r.tokens_per_second);
    return 0;
}

static int handle_label(struct fk_session *s, const uint8_t *payload, size_t bytes)
{
    char lora[FK_LABEL_TEXT_MAX + 1] = "", salt[FK_LABEL_TEXT_MAX + 1] = "";
    struct fk_wire_label r;

    if (bytes < sizeof(r))
        return -EPROTO;
    memcpy(&r, payload, sizeof(r));
    struct fk_namespace *ns = namespace_of(s, r.ns);
    if (!ns || r.lora_bytes > FK_LABEL_TEXT_MAX || r.salt_bytes > FK_LABEL_TEXT_MAX ||
        bytes - sizeof(r) < (size_t)r.lora_bytes + r.salt_bytes)
        return -EPROTO;
    memcpy(lora, payload + sizeof(r), r.lora_bytes);
    memcpy(salt, payload + sizeof(r) + r.lora_bytes, r.salt_bytes);
    (void)fk_local_namespace_label(&ns->pub, lora, salt);
    return 0;
}

/* A walk may read names from disk: a thread of its own does it. */
static int handle_events(struct fk_session *s, const uint8_t *payload, size_t bytes)
{
    struct fk_session_events x = { .space = FK_NONE };
    bool armed = false;

    if (bytes != sizeof(x.request))
        return -EPROTO;
    memcpy(&x.request, payload, sizeof(x.request));
    const struct fk_instance *in = space_of(s, x.request.space);
    if (x.request.space != FK_NONE && !in)
        return reply(s, x.request.seq, fk_api_fail(-EINVAL, "no such space"), NULL, 0);
    x.space = in ? in->space->id : FK_NONE;
    if (x.request.what == FK_WIRE_EVENTS_WALK) {
        struct slow *job = calloc(1, sizeof(*job));
        if (!job)
            return -ENOMEM;
        job->type = FK_WIRE_EVENTS;
        job->seq = x.request.seq;
        job->events = x;
        int rc = start_slow(s, job);
        if (!rc)
            return 0;
        free_slow(job);
        return reply(s, x.request.seq, rc, NULL, 0);
    }
    int rc = fk_session_events_run(s->node, &x, &armed);
    s->wants_note |= armed;
    rc = rc ? reply(s, x.request.seq, rc, NULL, 0) : answer_events(s, &x);
    fk_vec_free(&x.body);
    return rc;
}

int fk_session_tell_of_events(struct fk_session *s)
{
    static const uint64_t nothing;

    if (!s->wants_note)
        return 0;
    s->wants_note = false;
    int rc = answer(s, FK_WIRE_EVENTS_NOTE, &nothing, sizeof(nothing), NULL, 0);
    return rc ? rc : fk_session_flush(s);
}

int fk_session_handle(struct fk_session *s, const struct fk_msg *msg, const uint8_t *payload)
{
    int rc;

    switch (msg->type) {
    case FK_WIRE_MATCH: rc = handle_match(s, payload, msg->bytes); break;
    case FK_WIRE_GET: rc = handle_get(s, payload, msg->bytes); break;
    case FK_WIRE_PUT: rc = handle_put(s, payload, msg->bytes); break;
    case FK_WIRE_PREFETCH: rc = handle_prefetch(s, payload, msg->bytes); break;
    case FK_WIRE_RELEASE: rc = handle_release(s, payload, msg->bytes); break;
    case FK_WIRE_CANCEL: rc = handle_cancel(s, payload, msg->bytes); break;
    case FK_WIRE_SPACE: rc = handle_space(s, payload, msg->bytes); break;
    case FK_WIRE_NAMESPACE: rc = handle_namespace(s, payload, msg->bytes); break;
    case FK_WIRE_COMPUTE_RATE: rc = handle_compute_rate(s, payload, msg->bytes); break;
    case FK_WIRE_LABEL: rc = handle_label(s, payload, msg->bytes); break;
    case FK_WIRE_EVENTS: rc = handle_events(s, payload, msg->bytes); break;
    case FK_WIRE_RESET:
    case FK_WIRE_STATS:
    case FK_WIRE_STATUS: rc = handle_call(s, msg->type, payload, msg->bytes); break;
    default: rc = -EPROTO;
    }
    if (rc == -EPROTO)
        fk_api_fail(rc, "request %u makes no sense", msg->type);
    else if (rc)
        fk_api_fail(rc, "request %u: %s", msg->type, strerror(-rc));
    return rc;
}

/* ---- the end ---- */

bool fk_session_destroy(struct fk_session *s)
{
    struct fk_node *node = s->node;
    bool user = s->user;

    for (struct session_op *op = s->ops; op; op = op->next)
        op->session = NULL;             /* they come back as completions */
    pthread_mutex_lock(&node->lock);
    while (s->slow) {
        struct slow *job = s->slow;
        s->slow = job->next;
        job->session = NULL;
        if (job->over) {
            if (!job->rc && job->in)
                fk_instance_end(job->in);
            free_slow(job);
        }
    }
    for (size_t i = 0; i < s->spaces.len; i++)
        fk_instance_end(s->spaces.data[i]);
    fk_node_unlock(node);
    fk_vec_free(&s->spaces);
    fk_vec_free(&s->namespaces);
    fk_vec_free(&s->out);
    free(s);
    return user;
}
