/*
 * feed.h - private to src/api: a subscription to KV events, whatever kind of node it is of.
 *
 *   source (events.c: this process; client_events.c: a daemon)        feed.c
 *     fetch   journal, from the cursor on                 --list-->   view  --> flexkv_event
 *     walk    what is there, a portion at a time          --list-->
 *
 * LIVE: the cursor is in the journal; each event is looked up in the view, what is news is given out.
 * WALK: at the start, and after the cursor fell off the journal. The cursor is set to the journal's
 *   head, then all that is there is walked; what the view does not have is announced. Journal and walk
 *   may be read in any order and alternate: a walk shows a state that is never older than the
 *   cursor, events behind the cursor lead from there to the present, and the view makes what is
 *   told twice a thing that is told once.
 * SWEEP: after the walk: what the view has and nobody has seen in this round is gone.
 *
 * Lock: ev->lock; node->lock (client->lock) inside it. `armed` is under node->lock.
 */
#ifndef FK_API_FEED_H
#define FK_API_FEED_H

#include <pthread.h>

#include "api/handle.h"
#include "events/journal.h"
#include "events/labels.h"
#include "events/view.h"

#define FK_FEED_PORTION 256u            /* events fetched at once */
#define FK_FEED_BYTES (1u << 20)        /* of such a portion, about */

struct fk_event_cursor { uint64_t boot, place; };       /* boot: which journal; 0: none */

enum fk_feed_state { FK_FEED_LIVE, FK_FEED_WALK, FK_FEED_SWEEP };

struct fk_feed_ops {
    /* Sets the cursor to now; counts a resync if again. */
    int (*start)(flexkv_events *ev, bool resync);
    /* Appends events behind the cursor to ev->list. -ESTALE: fell off; -EAGAIN: the daemon is not there
     * now. If there are none and `idle`, the eventfd is made unreadable until there are. */
    int (*fetch)(flexkv_events *ev, uint32_t max, bool idle);
    /* Appends what is there from ev->walk_at on; FK_NONE: that was all. */
    int (*walk)(flexkv_events *ev);
    void (*count)(flexkv_events *ev, uint32_t n);       /* events given out */
    void (*leave)(flexkv_events *ev);
    struct fk_label (*label)(flexkv_events *ev, uint32_t number);
};

struct flexkv_events {
    const struct fk_feed_ops *ops;
    flexkv_node *node;                  /* NULL: it was closed */
    pthread_mutex_t lock;
    flexkv_events *next;                /* in the node's list, under its lock */
    int fd;                             /* eventfd */
    int epoll_fd;                       /* a client's: eventfd and connection; -1 */
    bool armed;                         /* nobody was told since the last time there was nothing */
    uint32_t space;                     /* FK_NONE: all */
    enum fk_feed_state state;
    bool live_turn;                     /* while walking: journal and walk take turns */
    struct fk_event_cursor cursor;
    uint32_t walk_at;
    struct fk_view view;
    struct fk_event_list list;
    size_t list_at;                     /* given out up to here */
    struct fk_labels labels;            /* a client's own */
    uint64_t taken;                     /* a client's: given out, and not told yet */
    const flexkv_space *of_space;       /* a client's; NULL: all */
};

flexkv_events *fk_feed_create(flexkv_node *node, const struct fk_feed_ops *ops, uint32_t space);
void fk_feed_free(flexkv_events *ev);
bool fk_feed_poke(flexkv_events *ev);   /* makes the eventfd readable */
/* Under the lock of `armed`: there is something; there is nothing, so tell of the next. */
void fk_feed_wake(flexkv_events *ev);
void fk_feed_quiet(flexkv_events *ev);
/* The node goes; the handle stays until its owner closes it. */
void fk_feed_orphan(flexkv_events *ev);

/* ---- events.c: what subscriptions ask a local node for; without its lock ---- */
struct fk_node;
enum fk_when_idle { FK_IDLE_NOT, FK_IDLE_LOCAL, FK_IDLE_REMOTE };       /* whom to tell of the next */
void fk_node_events_start(struct fk_node *node, bool resync, struct fk_event_cursor *at);
int fk_node_events_fetch(struct fk_node *node, uint32_t space, struct fk_event_cursor *at,
                         struct fk_event_list *list, uint32_t max, enum fk_when_idle idle,
                         flexkv_events *ev);
int fk_node_events_walk(struct fk_node *node, uint32_t space, struct fk_view *view, uint32_t *at,
                        struct fk_event_list *list);
void fk_node_events_count(struct fk_node *node, uint64_t taken);

#endif
