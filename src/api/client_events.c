/*
 * client_events.c - KV events of a node that a daemon serves: labels of namespaces, and subscriptions. The
 * view is here (feed.h); the daemon is asked for portions of its journal, and of what it holds. A daemon
 * that is lost leaves the view as it is: the next one's journal is another one, so the walk that follows
 * gives the difference.
 */
#include <sys/epoll.h>

#include "api/client_impl.h"
#include "api/feed.h"

/* ---- labels ---- */

int fk_client_tell_label(struct client *c, const struct client_namespace *ns)
{
    struct fk_wire_label w = { .ns = ns->remote, .lora_bytes = (uint32_t)strlen(ns->lora),
                               .salt_bytes = (uint32_t)strlen(ns->salt) };
    struct iovec v[3] = { { &w, sizeof(w) }, { (void *)(uintptr_t)ns->lora, w.lora_bytes },
                          { (void *)(uintptr_t)ns->salt, w.salt_bytes } };

    return fk_client_send_request(c, FK_WIRE_LABEL, v, 3);
}

/* A daemon that is not there now is told when it comes back. */
int fk_client_namespace_label(flexkv_namespace *pub, const char *lora_name, const char *cache_salt)
{
    struct client *c = client_of(pub->space->node);
    struct client_namespace *ns = ns_of(pub);

    pthread_mutex_lock(&c->lock);
    snprintf(ns->lora, sizeof(ns->lora), "%s", lora_name ? lora_name : "");
    snprintf(ns->salt, sizeof(ns->salt), "%s", cache_salt ? cache_salt : "");
    ns->labelled = true;
    if (c->up && !c->reopening)
        (void)fk_client_tell_label(c, ns);
    pthread_mutex_unlock(&c->lock);
    return 0;
}

/* ---- one request; with ev->lock ---- */

#define node_of(ev) client_of((ev)->node)

/* The daemon's numbers of labels, and ours. */
struct label_map {
    FK_VEC(uint32_t) theirs, ours;
};

static int read_labels(flexkv_events *ev, const uint8_t *data, const struct fk_wire_events_reply *r,
                       struct label_map *map)
{
    char lora[FK_LABEL_TEXT_MAX + 1], salt[FK_LABEL_TEXT_MAX + 1];
    struct fk_wire_event_label w;
    size_t at = 0;

    for (uint32_t i = 0; i < r->n_labels; i++) {
        if (r->label_bytes - at < sizeof(w))
            return -EPROTO;
        memcpy(&w, data + at, sizeof(w));
        size_t texts = (size_t)w.lora + w.salt, all = sizeof(w) + fk_round_up(texts, 8);
        if (w.lora > FK_LABEL_TEXT_MAX || w.salt > FK_LABEL_TEXT_MAX || r->label_bytes - at < all)
            return -EPROTO;
        memcpy(lora, data + at + sizeof(w), w.lora);
        memcpy(salt, data + at + sizeof(w) + w.lora, w.salt);
        lora[w.lora] = salt[w.salt] = '\0';
        if (fk_vec_push(&map->theirs, w.number) ||
            fk_vec_push(&map->ours, fk_labels_get(&ev->labels, lora, salt)))
            return -ENOMEM;
        at += all;
    }
    return at == r->label_bytes ? 0 : -EPROTO;
}

static uint32_t our_number(const struct label_map *map, uint32_t theirs)
{
    for (size_t i = map->theirs.len; theirs && i > 0; i--)
        if (map->theirs.data[i - 1] == theirs)
            return map->ours.data[i - 1];
    return theirs ? FK_NONE : 0;
}

static int read_events(flexkv_events *ev, const uint8_t *data, size_t bytes,
                       const struct fk_wire_events_reply *r)
{
    struct label_map map = { 0 };
    size_t at = ev->list.bytes.len;
    struct fk_event *e;
    int rc = r->label_bytes <= bytes ? read_labels(ev, data, r, &map) : -EPROTO;

    if (!rc)
        rc = fk_event_list_load(&ev->list, data + r->label_bytes, bytes - r->label_bytes,
                                r->n_events);
    while (!rc && (e = fk_event_list_next(&ev->list, &at)) != NULL)
        e->label = our_number(&map, e->label);
    fk_vec_free(&map.theirs);
    fk_vec_free(&map.ours);
    return rc;
}

/* The space's number at the daemon may be another one each time. */
static int ask(flexkv_events *ev, struct fk_wire_events *w, struct fk_wire_events_reply *r)
{
    struct client *c = node_of(ev);
    struct iovec v = { w, sizeof(*w) };
    fk_autofree uint8_t *body = NULL;
    size_t bytes = 0;

    pthread_mutex_lock(&c->lock);
    w->space = ev->of_space ? ((const struct client_space *)ev->of_space)->remote : FK_NONE;
    w->taken = ev->taken;
    uint64_t wait = w->what == FK_WIRE_EVENTS_WALK ? FK_CLIENT_SLOW_CALL_MS * 1000ull : c->timeout_us;
    int rc = c->up && !c->reopening
             ? fk_client_call(c, FK_WIRE_EVENTS, &w->seq, &v, 1, wait, (void **)&body, &bytes) : -EAGAIN;
    pthread_mutex_unlock(&c->lock);
    if (rc == -EBUSY)
        (void)fk_feed_poke(ev);         /* no note will come of that */
    if (rc)
        return rc == -ENOTCONN || rc == -EBUSY ? -EAGAIN : rc;
    ev->taken = 0;
    if (bytes < sizeof(*r))
        return fk_api_fail(-EPROTO, "the node at %s answers nonsense", c->address);
    memcpy(r, body, sizeof(*r));
    rc = read_events(ev, body + sizeof(*r), bytes - sizeof(*r), r);
    return rc == -EPROTO ? fk_api_fail(rc, "the node at %s answers nonsense", c->address) : rc;
}

/* ---- a source ---- */

static int remote_start(flexkv_events *ev, bool resync)
{
    struct fk_wire_events w = { .what = FK_WIRE_EVENTS_START, .flag = resync };
    struct fk_wire_events_reply r;
    int rc = ask(ev, &w, &r);

    if (!rc)
        ev->cursor = (struct fk_event_cursor){ r.boot, r.place };
    return rc;
}

/* The note that comes while an answer is read must not be lost: the eventfd is emptied before. */
static int remote_fetch(flexkv_events *ev, uint32_t max, bool idle)
{
    struct fk_wire_events w = { .what = FK_WIRE_EVENTS_FETCH, .flag = idle,
                                .boot = ev->cursor.boot, .place = ev->cursor.place };
    struct fk_wire_events_reply r;
    struct client *c = node_of(ev);

    if (!ev->cursor.boot)
        return -ESTALE;
    pthread_mutex_lock(&c->lock);
    fk_client_drain(c);
    if (c->calls || c->completed.len > c->taken)
        fk_client_set_event(c);         /* what was read for others */
    fk_feed_quiet(ev);
    pthread_mutex_unlock(&c->lock);
    int rc = ask(ev, &w, &r);
    if (!rc)
        ev->cursor = (struct fk_event_cursor){ r.boot, r.place };
    if (rc != -EAGAIN && (rc || !idle || ev->list.n))
        (void)fk_feed_poke(ev);         /* there may be more */
    return rc;
}

static int remote_walk(flexkv_events *ev)
{
    struct fk_wire_events w = { .what = FK_WIRE_EVENTS_WALK, .boot = ev->cursor.boot,
                                .place = ev->cursor.place, .walk_at = ev->walk_at };
    struct fk_wire_events_reply r;
    int rc = ask(ev, &w, &r);

    if (!rc)
        ev->walk_at = r.walk_at;
    return rc;
}

static void remote_count(flexkv_events *ev, uint32_t n)
{
    ev->taken += n;
}

static void remote_leave(flexkv_events *ev)
{
    struct client *c = node_of(ev);
    flexkv_events **at;

    pthread_mutex_lock(&c->lock);
    for (at = &c->feeds; *at != ev; at = &(*at)->next)
        ;
    *at = ev->next;
    pthread_mutex_unlock(&c->lock);
}

static struct fk_label remote_label(flexkv_events *ev, uint32_t number)
{
    return *fk_labels_at(&ev->labels, number);
}

static const struct fk_feed_ops remote_ops = {
    .start = remote_start, .fetch = remote_fetch, .walk = remote_walk, .count = remote_count,
    .leave = remote_leave, .label = remote_label,
};

/* ---- opening, and what the connection tells; with c->lock ---- */

static int watch_connection(flexkv_events *ev, int fd)
{
    struct epoll_event e = { .events = EPOLLIN, .data.fd = fd };

    return epoll_ctl(ev->epoll_fd, EPOLL_CTL_ADD, fd, &e) < 0 ? -errno : 0;
}

void fk_client_events_up(struct client *c)
{
    for (flexkv_events *ev = c->feeds; ev; ev = ev->next)
        (void)watch_connection(ev, c->fd);
}

void fk_client_events_down(struct client *c)
{
    for (flexkv_events *ev = c->feeds; ev; ev = ev->next)
        epoll_ctl(ev->epoll_fd, EPOLL_CTL_DEL, c->fd, NULL);
}

void fk_client_events_note(struct client *c)
{
    for (flexkv_events *ev = c->feeds; ev; ev = ev->next)
        (void)fk_feed_poke(ev);
}

void fk_client_events_orphan(struct client *c)
{
    for (;;) {
        pthread_mutex_lock(&c->lock);
        flexkv_events *ev = c->feeds;
        if (ev)
            c->feeds = ev->next;
        pthread_mutex_unlock(&c->lock);
        if (!ev)
            return;
        fk_feed_orphan(ev);
    }
}

static int join(struct client *c, flexkv_events *ev)
{
    ev->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    int rc = ev->epoll_fd < 0 ? -errno : watch_connection(ev, ev->fd);

    pthread_mutex_lock(&c->lock);
    if (!rc && c->up && !c->events_on)
        rc = -EOPNOTSUPP;
    if (!rc && c->up)
        rc = watch_connection(ev, c->fd);
    if (!rc) {
        ev->next = c->feeds;
        c->feeds = ev;
    }
    pthread_mutex_unlock(&c->lock);
    return rc;
}

int fk_client_events_open(flexkv_node *node, flexkv_space *space, flexkv_events **out)
{
    struct client *c = client_of(node);
    flexkv_events *ev = fk_feed_create(node, &remote_ops, FK_NONE);

    if (!ev)
        return fk_api_fail(-ENOMEM, "no memory or file descriptor for a subscription");
    ev->of_space = space;
    int rc = join(c, ev);
    if (!rc) {
        *out = ev;
        return 0;
    }
    fk_feed_free(ev);
    if (rc == -EOPNOTSUPP)
        return fk_api_fail(rc, "the node at %s keeps no KV events: start it with enable_kv_events (or "
                           "DYNAMO_USE_FLEXKV) set to 1", c->address);
    return fk_api_fail(rc, "no file descriptor for a subscription: %s", strerror(-rc));
}
