/* feed.c - flexkv.h's subscriptions: from lists of events and the view to what the subscriber gets. See
 * feed.h. */
#include "api/feed.h"

#include <sys/eventfd.h>

#include "base/plant.h"
#include "flexkv/flexkv.h"

_Static_assert((int)FK_EVENT_STORED == (int)FLEXKV_EVENT_STORED, "one enum");
_Static_assert((int)FK_EVENT_REMOVED == (int)FLEXKV_EVENT_REMOVED, "one enum");
_Static_assert((int)FK_MEDIUM_CPU == (int)FLEXKV_MEDIUM_CPU, "one enum");
_Static_assert((int)FK_MEDIUM_STORAGE == (int)FLEXKV_MEDIUM_STORAGE, "one enum");

/* ---- a subscription ---- */

bool fk_feed_poke(flexkv_events *ev)
{
    uint64_t one = 1;

    return write(ev->fd, &one, sizeof(one)) == sizeof(one);
}

void fk_feed_wake(flexkv_events *ev)
{
    ev->armed = !fk_feed_poke(ev);
}

void fk_feed_quiet(flexkv_events *ev)
{
    uint64_t count;

    if (read(ev->fd, &count, sizeof(count)) == sizeof(count) || errno == EAGAIN)
        ev->armed = true;
}

flexkv_events *fk_feed_create(flexkv_node *node, const struct fk_feed_ops *ops, uint32_t space)
{
    flexkv_events *ev = calloc(1, sizeof(*ev));

    if (!ev)
        return NULL;
    ev->fd = eventfd(1, EFD_CLOEXEC | EFD_NONBLOCK);
    if (ev->fd < 0) {
        free(ev);
        return NULL;
    }
    pthread_mutex_init(&ev->lock, NULL);
    ev->ops = ops;
    ev->node = node;
    ev->space = space;
    ev->epoll_fd = -1;              /* no cursor yet: the first take begins a walk */
    return ev;
}

void fk_feed_free(flexkv_events *ev)
{
    close(ev->fd);
    if (ev->epoll_fd >= 0)
        close(ev->epoll_fd);
    fk_view_fini(&ev->view);
    fk_event_list_free(&ev->list);
    fk_labels_fini(&ev->labels);
    pthread_mutex_destroy(&ev->lock);
    free(ev);
}

void fk_feed_orphan(flexkv_events *ev)
{
    pthread_mutex_lock(&ev->lock);
    ev->node = NULL;
    (void)fk_feed_poke(ev);
    pthread_mutex_unlock(&ev->lock);
}

/* ---- giving out ---- */

static void fill_texts(flexkv_events *ev, flexkv_event *out, uint32_t label)
{
    struct fk_label l = ev->ops->label(ev, label);

    out->lora_name = l.lora;
    out->cache_salt = l.salt;
}

static void give_removed(flexkv_events *ev, flexkv_event *out, const struct fk_view_item *item)
{
    *out = (flexkv_event){ .kind = FLEXKV_EVENT_REMOVED, .medium = item->medium,
                           .hash = item->hash };
    fill_texts(ev, out, item->label);
}

static int give_stored(flexkv_events *ev, flexkv_event *out, const struct fk_event *e)
{
    struct fk_view_item item = { .id = e->id, .hash = e->hash, .label = e->label,
                                 .medium = e->medium };

    if (e->nameless) {
        fk_view_see(&ev->view, e->id, e->medium);
        return 0;
    }
    int rc = fk_view_add(&ev->view, &item);
    if (rc <= 0)
        return rc;
    *out = (flexkv_event){
        .kind = FLEXKV_EVENT_STORED, .medium = e->medium, .root = e->root, .n_tokens = e->n_tokens,
        .hash = e->hash, .parent = e->root ? 0 : e->parent, .tokens = fk_event_tokens(e),
    };
    fill_texts(ev, out, e->label);
    return 1;
}

/* Of the list, up to max; what is left stays for the next time. -ENOMEM. */
static int give(flexkv_events *ev, flexkv_event *out, size_t max)
{
    struct fk_view_item item;
    struct fk_event *e;
    size_t n = 0, at;

    while (n < max && (at = ev->list_at, e = fk_event_list_next(&ev->list, &at)) != NULL) {
        if (e->kind == FK_EVENT_STORED) {
            int rc = give_stored(ev, &out[n], e);
            if (rc < 0)
                return n ? (int)n : fk_api_fail(rc, "no memory for what a subscriber was told");
            n += (size_t)rc;
        } else if (fk_view_remove(&ev->view, e->id, e->medium, &item)) {
            give_removed(ev, &out[n++], &item);
        }
        ev->list_at = at;
    }
    return (int)n;
}

static void list_clear(flexkv_events *ev)
{
    fk_event_list_clear(&ev->list);
    ev->list_at = 0;
}

/* ---- taking ---- */

static int begin(flexkv_events *ev, bool resync)
{
    int rc = ev->ops->start(ev, resync);

    if (rc)
        return rc;
    if (!FK_BUG(14))
        fk_view_round_begin(&ev->view);
    list_clear(ev);
    ev->walk_at = 0;
    ev->state = FK_FEED_WALK;
    return 0;
}

static int sweep(flexkv_events *ev, flexkv_event *out, size_t max)
{
    struct fk_view_item gone[FK_FEED_PORTION];
    uint32_t want = (uint32_t)fk_min(max, (size_t)FK_FEED_PORTION);
    uint32_t n = fk_view_round_gone(&ev->view, gone, want);

    for (uint32_t i = 0; i < n; i++)
        give_removed(ev, &out[i], &gone[i]);
    if (n < want)
        ev->state = FK_FEED_LIVE;
    return (int)n;
}

/* One portion of what was not read from the journal; 0: nothing came of it. */
static int look_on(flexkv_events *ev, flexkv_event *out, size_t max)
{
    if (ev->state == FK_FEED_SWEEP)
        return sweep(ev, out, max);
    int rc = ev->ops->walk(ev);
    if (rc == -ENOMEM)
        fk_api_fail(rc, "no memory for KV events");
    if (rc < 0)
        return rc;
    if (ev->walk_at == FK_NONE)
        ev->state = FK_FEED_SWEEP;
    return give(ev, out, max);
}

/* How many; MORE: nothing this time, but there is more to look at; 0: nothing at all. */
#define MORE INT32_MIN

static int take_some(flexkv_events *ev, flexkv_event *out, size_t max)
{
    int n = give(ev, out, max);

    if (n)
        return n;
    list_clear(ev);
    ev->live_turn = !ev->live_turn || ev->state == FK_FEED_LIVE;
    if (!ev->live_turn) {
        n = look_on(ev, out, max);
        return n ? n : MORE;
    }
    n = ev->ops->fetch(ev, FK_FEED_PORTION, ev->state == FK_FEED_LIVE);
    if (n == -ESTALE) {
        n = begin(ev, ev->cursor.boot);
        return n ? n : MORE;
    }
    if (n == -ENOMEM)
        fk_api_fail(n, "no memory for KV events");
    if (n < 0 || (!ev->list.n && ev->state == FK_FEED_LIVE))
        return n;
    n = give(ev, out, max);
    return n ? n : MORE;
}

FLEXKV_API int flexkv_events_take(flexkv_events *ev, flexkv_event *out, size_t max)
{
    int n = 0;

    if (!max || max > INT32_MAX)
        return fk_api_fail(-EINVAL, "max must be greater than 0");
    pthread_mutex_lock(&ev->lock);
    do
        n = ev->node ? take_some(ev, out, max) : -ENOTCONN;
    while (n == MORE);
    if (n > 0)
        ev->ops->count(ev, (uint32_t)n);
    if (n == -EAGAIN)
        n = 0;
    if (n == -ENOMEM)
        ev->cursor.boot = 0;        /* what could not be taken up is found by a walk */
    pthread_mutex_unlock(&ev->lock);
    if (n == -ENOTCONN)
        return fk_api_fail(n, "the node is closed");
    return n;
}

FLEXKV_API int flexkv_events_fd(flexkv_events *ev)
{
    return ev->epoll_fd >= 0 ? ev->epoll_fd : ev->fd;
}

FLEXKV_API int flexkv_events_again(flexkv_events *ev)
{
    pthread_mutex_lock(&ev->lock);
    fk_view_clear(&ev->view);
    list_clear(ev);
    ev->cursor.boot = 0;
    ev->state = FK_FEED_LIVE;
    (void)fk_feed_poke(ev);
    pthread_mutex_unlock(&ev->lock);
    return 0;
}

FLEXKV_API int flexkv_events_open(flexkv_node *node, flexkv_space *space, flexkv_events **out)
{
    return node->vt->events_open(node, space, out);
}

FLEXKV_API void flexkv_events_close(flexkv_events *ev)
{
    if (!ev)
        return;
    pthread_mutex_lock(&ev->lock);
    if (ev->node)
        ev->ops->leave(ev);
    pthread_mutex_unlock(&ev->lock);
    fk_feed_free(ev);
}
