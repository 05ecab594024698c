/*
 * events_stream.h - receives a stream of KV events: a ZeroMQ subscription, and with a replay endpoint
 * the batches that were missed, in order, before the one that showed the gap. Nothing is judged here.
 *
 * One thread at a time. Used by `flexkv events`.
 */
#ifndef FK_CLI_EVENTS_STREAM_H
#define FK_CLI_EVENTS_STREAM_H

#include "base/util.h"
#include "events/history.h"
#include "events/zmq_api.h"

#define STREAM_MAX_FRAMES 8

struct stream_message {
    size_t n;                       /* frames; more than STREAM_MAX_FRAMES were thrown away */
    zmq_msg msg[STREAM_MAX_FRAMES];
    struct fk_frame frame[STREAM_MAX_FRAMES];
};

struct stream {
    const struct fk_zmq *zmq;
    void *ctx, *sub, *dealer;       /* dealer NULL: no replay endpoint */
    const char *name;               /* for the log: the endpoint */
    bool begun;
    uint64_t next_seq;
    FK_VEC(struct stream_message) queue;        /* what comes before anything new */
    size_t queue_at;
    uint64_t recovered, lost, restarts;         /* batches, batches, times */
};

/* 0, or -errno with a complaint on stderr in the command's name. With a replay endpoint, what was sent
 * before comes first, as far as it is still kept. */
int stream_open(struct stream *s, const struct fk_zmq *zmq, const char *command, const char *endpoint,
                const char *replay_endpoint, const char *topic);
void stream_close(struct stream *s);
/* Readable when there may be a message, once stream_next has returned 0. */
int stream_fd(const struct stream *s);
/* 1: a message, to be given to stream_done; 0: none there. Waits for what is replayed only. */
int stream_next(struct stream *s, struct stream_message *out);
void stream_done(struct stream *s, struct stream_message *m);
/* The message's number; false: it has none. */
bool stream_seq(const struct stream_message *m, uint64_t *seq);

#endif
