/*
 * store_impl.h - private to store.c (opening, asking), work.c (threads, deadlines, who is out) and scan.c (the scanner).
 *
 *   submit --> queue[urgent, reads, writes] --> thread: item->running --end--> done ring --> take
 *                         '------ deadline ------'  '--late (quarantined)--end (released)--^
 *
 * `lock` guards all but what is said to be someone's own; no system call but condition waits is made under it.
 */
#ifndef FK_STORE_IMPL_H
#define FK_STORE_IMPL_H

#include <pthread.h>
#include <stdatomic.h>

#include "base/util.h"
#include "store/backend.h"
#include "store/prints.h"

enum { QUEUE_URGENT, QUEUE_READS, QUEUE_WRITES, QUEUES };

enum item_state { ITEM_FREE, ITEM_QUEUED, ITEM_RUNNING, ITEM_LATE };

struct store_item {
    struct fk_store_req req;
    uint64_t deadline_us, started_us;
    enum item_state state;
    uint32_t queue, epoch;              /* epoch: the space's when it was asked for */
    struct store_item *next;
};

struct item_queue { struct store_item *head, **tail; uint32_t n; };

struct store_space {
    char name[64];
    uint8_t fingerprint[16];
    uint64_t block_bytes, file_bytes;
    void *priv;                         /* the backend's */
    struct fk_prints *prints;
    struct fk_store_part part[FK_STORE_PARTS];  /* the scanner's */
    _Atomic uint32_t epoch;             /* resets asked for */
    uint32_t reset_done;                /* epoch that the backend has carried out; under lock */
    _Atomic bool resetting;
    _Atomic uint32_t forgotten;         /* how often all was forgotten that was known */
};

/* Reading or writing: in use, or out until a time. Under lock; out is read without. */
struct store_side {
    _Atomic bool out;
    uint32_t errors;                    /* in a row */
    uint64_t retry_at_us, backoff_us;
};

struct fk_store {
    struct fk_store_params p;
    char path[1024];
    const struct fk_store_backend *be;
    void *priv;
    uint32_t max_writers;

    pthread_mutex_t lock;
    pthread_cond_t work, scan_wake, changed;    /* changed: a scan ended, a thread has gone */
    bool stop;                          /* under lock; the backend looks without */
    uint32_t alive;                     /* threads */
    bool abandoned;                     /* closed while threads hung: the last one frees all */
    bool freeing;

    struct store_item *items, *free_items;
    struct item_queue queue[QUEUES];
    uint32_t queued, running, running_reads, running_writes, late, late_writes;
    uint64_t first_deadline_us;         /* no item's is earlier */

    struct fk_store_done *done;         /* a ring of 2 * max_queued */
    uint32_t done_at, done_n, done_cap;

    FK_VEC(struct fk_store_lost) lost;  /* those before lost_at have been taken */
    size_t lost_at;
    _Atomic bool any_lost;              /* read without the lock */

    uint32_t reads_in;                  /* that have not been reported */
    uint64_t busy_since_us, busy_bytes; /* a window in which there were some */
    struct fk_rate byte;                /* what one takes */

    struct store_side reads, writes;
    struct fk_store_stats stats;
    uint64_t other_bytes;
    bool want_room, scanned_once;
    uint64_t scans_begun, scan_asked;   /* scans: how many have begun; the one that must have ended */

    struct store_space *spaces[FK_STORE_SPACES];
    _Atomic uint32_t n_spaces;
};

static inline bool store_is_read(const struct store_item *i) { return i->req.op == FK_STORE_READ; }

/* store.c */
void store_free(struct fk_store *s);
uint64_t store_used_bytes(const struct fk_store *s);    /* with the lock */

/* work.c */
void *store_worker(void *arg);
void store_expire(struct fk_store *s, uint64_t now_us);         /* with the lock */
void store_enqueue(struct fk_store *s, struct store_item *item);        /* with the lock */
void store_drop_queued(struct fk_store *s);             /* with the lock */
void store_lose(struct fk_store *s, struct store_space *sp, struct fk_key key, struct fk_key parent);   /* without */
void store_thread_gone(struct fk_store *s);             /* the thread's last act */
/* What the side's request or probe came to; with the lock. */
void store_side_note(struct fk_store *s, struct store_side *side, int rc, uint64_t now_us);
void store_side_back(struct fk_store *s, struct store_side *side, uint64_t now_us);

/* scan.c */
void *store_scanner(void *arg);

#endif
