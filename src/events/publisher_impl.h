/*
 * publisher_impl.h - private to src/events: the publisher, shared by publisher.c (what goes out) and
 * answer.c (what comes in from the network). All of it belongs to the publisher's thread but the
 * statistics and the stop flag.
 */
#ifndef FK_EVENTS_PUBLISHER_IMPL_H
#define FK_EVENTS_PUBLISHER_IMPL_H

#include <pthread.h>

#include "events/claims.h"
#include "events/encode.h"
#include "events/history.h"
#include "events/publisher.h"

#define FK_REQUEST_MAX_BYTES 4096   /* of a frame from the network */
#define FK_MAX_ANSWERS 64           /* under way at once */
#define FK_PEER_ANSWERS 4           /* of these for one peer */
#define FK_ANSWER_RETRY_MS 10
#define FK_ANSWER_STUCK_MS 10000    /* a receiver that takes nothing for so long is given up */

enum { FK_RESYNC_BEHIND = 1, FK_RESYNC_MUST = 2 };

/* Batches that somebody asked for, sent as fast as he takes them. */
struct fk_answer {
    void *peer;                     /* his identity */
    size_t peer_bytes;
    uint64_t next;                  /* batch to be sent */
    uint64_t end;                   /* what comes from here on he gets as a subscriber */
    uint64_t moved_ms;              /* when he last took something */
};

struct fk_publisher {
    const struct fk_zmq *zmq;
    void *zmq_ctx, *pub, *router;
    struct fk_event_source source;
    char *topic, *endpoint;
    int64_t rank;
    uint32_t n_ranks;
    struct fk_encoder encoder;
    struct fk_history history;
    struct fk_claims claims;
    _Atomic uint64_t next_seq;

    unsigned resync_why;            /* 0: none is due */
    uint64_t resync_at_ms, resync_force_ms, resync_not_before_ms, resync_began_ms, resync_pause_ms;
    bool failed;                    /* the source did; it is left alone until all is told again */
    uint64_t fail_pause_ms;
    bool behind;                    /* a subscriber lost something since all was told */
    unsigned patience_ms;           /* how long slow subscribers are waited for, from now on */
    uint64_t patience_at_ms;

    struct fk_answer answer[FK_MAX_ANSWERS];
    size_t n_answers;

    pthread_t thread;
    bool has_thread;
    _Atomic bool stop;
    int stop_fd;
    struct {                        /* written by the thread, read by all */
        _Atomic uint64_t batches, bytes, stored, removed, dropped, resyncs, subscriptions, requests,
                         bad_requests, replayed, source_errors;
    } stats;
};

static inline void fk_stat_add(_Atomic uint64_t *counter, uint64_t n)
{
    atomic_fetch_add_explicit(counter, n, memory_order_relaxed);
}

uint64_t fk_publisher_now_ms(void);
int fk_publisher_send_bytes(const struct fk_zmq *zmq, void *socket, const void *data, size_t bytes,
                            int flags);
int fk_publisher_send_batch(struct fk_publisher *p, void *socket, struct fk_batch *batch);
/* All is told from the start, soon. */
void fk_publisher_want_resync(struct fk_publisher *p, unsigned why);

/* answer.c */
void fk_publisher_read_subscriptions(struct fk_publisher *p);
/* Takes requests, goes on with the answers under way. */
void fk_publisher_answer(struct fk_publisher *p);

#endif
