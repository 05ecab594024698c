/*
 * publisher.h - sends the events of a source to whoever subscribes: ZeroMQ PUB, three frames
 * [topic][number u64 big endian][msgpack], and a second socket (ROUTER) where batches can be asked
 * for again. The protocol is the one of vLLM's ZmqEventPublisher, as routers such as Dynamo's read it.
 *
 *   source --take--> encoder --batch--> PUB  --> subscribers
 *     ^ fd                      |-----> history <-- ROUTER <-- "from number n on"
 *     '---- again <-- a new subscriber, or one that lost batches that the history no longer has
 *
 * The stream is ours alone, so it begins with "all blocks are cleared" and then tells all that is
 * there. It begins so again (at most once in RESYNC_LEAST_MS) when somebody subscribes, when batches
 * that nobody can get any more are asked for, and after a receiver was too slow and lost some: everyone forgets
 * and learns anew, and what all of them hold in the end is right.
 *
 * It ends with the same: a node that is closed has no blocks to offer.
 *
 * Numbers start at the wall clock's microseconds, so they grow over restarts.
 *
 * One thread of its own; it sleeps in zmq_poll until the source, a subscriber or a request wakes it.
 * Called by src/api and by `flexkv events` and `flexkv bench`. Touches no node: the source does.
 */
#ifndef FK_EVENTS_PUBLISHER_H
#define FK_EVENTS_PUBLISHER_H

#include <stdbool.h>

#include "flexkv/flexkv.h"
#include "events/zmq_api.h"

/* A batch that goes out as it is, under a number of ours. */
struct fk_raw_batch {
    const void *payload;            /* valid until the next call */
    size_t bytes;
    bool clears;                    /* it makes receivers forget all */
};

struct fk_event_source {
    /* Up to max events, or 0: nothing now, and fd is not readable until there is; or -errno. The
     * tokens and names are valid until the next call. */
    int (*take)(void *ctx, flexkv_event *out, size_t max);
    /* All that is there comes anew, without removed events for what was told before. */
    int (*again)(void *ctx);
    int (*fd)(void *ctx);
    void *ctx;
    /* NULL, or the next batch that others have made, before anything that take gives afterwards: 1, 0
     * (none), -errno. Told again by `again` too, as events. */
    int (*raw)(void *ctx, struct fk_raw_batch *out);
};

struct fk_publisher_params {
    const char *endpoint;           /* tcp://HOST:PORT (HOST may be a star), ipc://PATH */
    const char *replay_endpoint;    /* NULL or "": none */
    const char *topic;              /* NULL: "" */
    int64_t rank;                   /* the first data parallel rank; < 0: none is stated */
    uint32_t n_ranks;               /* all of them are told the same; 0: 1 */
    int hwm;                        /* batches that may wait for a slow subscriber */
    size_t history_batches;
    uint64_t history_bytes;
    /* for messages: which setting gave what */
    const char *endpoint_setting, *replay_setting;
};

struct fk_publisher_stats {
    uint64_t batches, bytes, stored, removed;       /* sent; events count blocks */
    uint64_t dropped;               /* batches that some subscriber lost because it was slow */
    uint64_t resyncs;               /* times that all was told from the start */
    uint64_t subscriptions;         /* that came, also of those that have gone */
    uint64_t requests, bad_requests, replayed;      /* asked for again; batches that were */
    uint64_t source_errors;
    uint64_t next_seq;
};

struct fk_publisher;

/* Binds and starts; the source must stay until close. -EADDRINUSE, -EACCES, -EINVAL, ... with a
 * message that names setting and endpoint. */
int fk_publisher_open(const struct fk_zmq *zmq, const struct fk_publisher_params *params,
                      const struct fk_event_source *source, struct fk_publisher **out, char *error,
                      size_t error_bytes);
void fk_publisher_stats(const struct fk_publisher *p, struct fk_publisher_stats *out);
/* Stops within FK_PUBLISHER_LINGER_MS and a bit; what is sent by then is sent. Accepts NULL. */
void fk_publisher_close(struct fk_publisher *p);

#define FK_PUBLISHER_LINGER_MS 300
#define FK_PUBLISHER_BATCH_BYTES 65536u     /* a batch is hardly longer */

#endif
