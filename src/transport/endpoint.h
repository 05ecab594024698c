/*
 * endpoint.h - what every transport shares, and the vtable that each fills in: reads and their deadlines,
 * peers and how many blocks are asked of one at a time, the thread and what wakes it.
 *
 *   callers            | the transport's thread
 *   read --> inbox ----|--> peer->queued --next--> peer->sent --end--> outbox --> take
 *                      |         '---- deadline ----'  '--late--> peer->late --end (released)--^
 *
 *
 *   providers          |
 *   granted -----------|--> parked->resume: the owner's side of the transport goes on
 *
 * The lock guards the boxes, the table of peers and the statistics; all else belongs to the thread
 * (loopback: to who steps it). Included by src/transport only.
 */
#ifndef FK_TRANSPORT_ENDPOINT_H
#define FK_TRANSPORT_ENDPOINT_H

#include <pthread.h>
#include <sys/epoll.h>

#include "base/fail.h"
#include "base/util.h"
#include "transport/transport.h"

enum fk_op_state { FK_OP_QUEUED, FK_OP_SENT, FK_OP_LATE };

struct fk_op {                      /* one read */
    struct fk_read r;
    struct fk_peer *peer;
    uint64_t id, deadline_us;
    uint64_t started_us;
    void *channel;                  /* the transport's: over which it was asked */
    void *priv;                     /* the transport's */
    uint64_t word[2], key;
    struct fk_op *prev, *next;
    enum fk_op_state state;
};

struct fk_op_list { struct fk_op *head, *tail; uint32_t n; };

struct fk_peer {
    char address[FK_TRANSPORT_ADDRESS_MAX];
    uint32_t index;
    bool in_use, going;             /* under the lock; going: dropped, and asked for again it is another */
    struct fk_op_list queued, sent, late;
    void *channel;                  /* the transport's: the connection that new reads take */
    void *priv;
};

struct fk_transport_ops {
    const char *name, *help;
    bool stepped;                   /* no thread: fk_transport_step */
    int (*open)(struct fk_transport *t, const struct fk_transport_params *p, char *error, size_t bytes);
    void (*close)(struct fk_transport *t);              /* the thread has ended */
    int (*region)(struct fk_transport *t, void *base, size_t bytes);     /* may be NULL; under the lock */
    int (*share)(struct fk_transport *t, const struct fk_window *w);     /* may be NULL; under the lock */
    int (*publish)(struct fk_transport *t);             /* may be NULL; after share, in its thread, may block */
    /* Reads are queued for this peer: ask for what may be asked for now (fk_op_next). */
    void (*pump)(struct fk_transport *t, struct fk_peer *p);
    /* A read that was asked for is out of time: fk_op_end if nothing can write to its buffer, else fk_op_late. */
    void (*expire)(struct fk_transport *t, struct fk_op *op);
    /* The peer goes: true: everything of it has ended, late ones too; false: it will, then fk_peer_gone. */
    bool (*drop)(struct fk_transport *t, struct fk_peer *p);
    /* Before sleeping: does what is due; returns when it wants to be called again. */
    uint64_t (*tick)(struct fk_transport *t, uint64_t now_us);
    /* Right before sleeping: false: there is something to do. May be NULL. */
    bool (*may_sleep)(struct fk_transport *t);
};

struct fk_watch {                   /* a descriptor in the thread's epoll */
    void (*ready)(struct fk_watch *w, uint32_t events);
    int fd;
    uint32_t events;
};

struct fk_note {                    /* in the inbox */
    enum { FK_NOTE_READ, FK_NOTE_DROP } kind;
    uint32_t peer;
    uint64_t deadline_us, started_us;
    struct fk_read read;
};

/* Owner: a read whose grant comes later. Lives until it comes, or the transport is closed; who waits for it may go. */
struct fk_parked {
    struct fk_parked *prev, *next;
    struct fk_block_ref ref;
    uint64_t later, until_us;
    /* In the thread, once: 0: *g is whose it is now, to be released; else the answer. Set by who waits; NULL: nobody. */
    void (*resume)(struct fk_transport *t, struct fk_parked *k, int rc, const struct fk_grant *g);
    void *who;                      /* whose it is: the transport's own */
    uint64_t word[2];
};

struct fk_granted {                 /* told by the provider */
    uint64_t later;
    int rc;
    struct fk_grant grant;
};

struct fk_transport {
    const struct fk_transport_ops *ops;
    void *priv;
    struct fk_provider provider;
    char address[FK_TRANSPORT_ADDRESS_MAX];
    uint32_t max_in_flight, max_queued;
    uint64_t timeout_us;
    uint64_t now_us;                /* of this round */

    pthread_mutex_t lock;
    FK_VEC(struct fk_note) inbox;
    FK_VEC(struct fk_read_done) outbox;
    size_t out_at;                  /* outbox: taken up to here */
    uint32_t outstanding;
    FK_VEC(struct fk_peer *) peers;
    FK_VEC(struct fk_granted) granted;
    struct fk_transport_stats stats;
    int done_fd, kick_fd;

    uint64_t (*turn)(void *ctx);    /* and when it wants to be called next, if not before */
    void *turn_ctx;
    uint64_t turn_us;
    pthread_t thread;
    bool running, stop;             /* stop: under the lock */
    int epoll_fd;
    struct fk_watch kick;
    FK_VEC(struct fk_note) notes;   /* the inbox, taken */
    FK_VEC(struct fk_read_done) done;           /* for the outbox, this round */
    FK_VEC(void *) buried;          /* freed at the end of the round */
    FK_VEC(struct fk_op *) ops_all; /* by the low half of their ids */
    struct fk_op *ops_free;
    struct fk_parked *parked, *last_parked;     /* oldest first */
    struct fk_parked *spare;        /* made before it is needed: a deferred grant can't be lost */
    FK_VEC(struct fk_granted) resuming;         /* granted, taken */
    uint64_t first_deadline;        /* no read's is earlier */
    struct fk_transport_stats delta;
};

extern const struct fk_transport_ops fk_transport_tcp, fk_transport_loopback, fk_transport_fabric, fk_transport_nixl,
                                     fk_transport_mooncake;

/* ---- reads: the transport's thread ---- */
struct fk_op *fk_op_next(struct fk_transport *t, struct fk_peer *p, void *channel);
struct fk_op *fk_op_find(struct fk_transport *t, uint64_t id);
/* The bytes are there: verified against the checksum, then ended with 0 or -EBADMSG. */
void fk_op_arrived(struct fk_transport *t, struct fk_op *op, uint64_t checksum);
/* The same of one whose bytes' checksum has been taken. */
void fk_op_summed(struct fk_transport *t, struct fk_op *op, uint64_t checksum, uint64_t seen);
void fk_op_end(struct fk_transport *t, struct fk_op *op, int rc);   /* late: released */
void fk_op_late(struct fk_transport *t, struct fk_op *op);
void fk_op_quarantine(struct fk_transport *t, struct fk_op *op, int rc);        /* for another reason than its deadline */
void fk_peer_gone(struct fk_transport *t, struct fk_peer *p);
void fk_peer_end_queued(struct fk_transport *t, struct fk_peer *p, int rc);
/* Everything asked for over this channel, late ones too. */
void fk_channel_end(struct fk_transport *t, struct fk_peer *p, void *channel, int rc);
bool fk_channel_idle(const struct fk_peer *p, const void *channel, bool count_late);

void fk_reads_hand_out(struct fk_transport *t);         /* what has ended, to who takes; each round does it */

/* ---- the owner's side: grant.c, in the transport's thread ---- */
/* grant(), with its answer checked against the request. -EINPROGRESS: *later is to be filled in (resume). */
int fk_grant_take(struct fk_transport *t, const struct fk_block_ref *r, struct fk_grant *g,
                  struct fk_parked **later);
void fk_grant_forget(struct fk_parked *k);              /* who waited goes; the grant is given back when it comes */
void fk_grant_checksum(struct fk_grant *g, struct fk_key key);      /* computed, unless the provider knew it */
int fk_grant_release(struct fk_transport *t, const struct fk_block_ref *r, struct fk_grant *g);

/* Under the lock: what has been granted since is to be resumed (it may bring new ones). */
void fk_grants_take(struct fk_transport *t);
/* That, and those whom nothing was granted in time. */
void fk_grants_resume(struct fk_transport *t);
uint64_t fk_grants_due(const struct fk_transport *t);   /* when somebody's patience ends */
/* Closing: what was taken is given back, the rest forgotten. */
void fk_grants_close(struct fk_transport *t);

/* ---- the thread ---- */
int fk_watch_add(struct fk_transport *t, struct fk_watch *w, int fd, uint32_t events);
void fk_watch_change(struct fk_transport *t, struct fk_watch *w, uint32_t events);
void fk_watch_remove(struct fk_transport *t, struct fk_watch *w);   /* the descriptor stays open */
void fk_bury(struct fk_transport *t, void *memory);     /* freed when no event can name it any more */

#endif
