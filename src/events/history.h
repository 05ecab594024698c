/*
 * history.h - batches as they were sent, and a bounded ring of the last of them, from which a
 * receiver that missed some gets them again.
 *
 *      first                      first + count - 1
 *      | seq s | s + 1 | s + 2 | ... | s + count - 1 |      without a gap
 *
 * What lies before a batch that clears everything says nothing about the state after it, so such a
 * batch empties the ring: as long as it is the first, the ring alone makes up the whole state.
 *
 * A batch's bytes are counted references: the ring, and each queue of ZeroMQ that it is in. No
 * sockets here. Called by the publisher's thread; references are given back from ZeroMQ's.
 */
#ifndef FK_EVENTS_HISTORY_H
#define FK_EVENTS_HISTORY_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct fk_batch {
    _Atomic unsigned refs;
    bool clears;                    /* its first event makes receivers forget all */
    uint32_t blocks;                /* stored and removed */
    uint64_t seq;
    size_t bytes;
    unsigned char data[];           /* msgpack */
};

/* One reference; the bytes are to be written by the caller. NULL: no memory. */
struct fk_batch *fk_batch_new(size_t bytes);
struct fk_batch *fk_batch_ref(struct fk_batch *batch);
void fk_batch_unref(struct fk_batch *batch);

struct fk_history {
    struct fk_batch **slot;
    size_t cap, first, count;
    uint64_t bytes, max_bytes;
};

/* max_batches 0: nothing is kept. */
int fk_history_init(struct fk_history *h, size_t max_batches, uint64_t max_bytes);
void fk_history_free(struct fk_history *h);
/* Takes a reference of its own. Batches come in the order of their numbers, each one more than the
 * last; the oldest ones make room. */
void fk_history_push(struct fk_history *h, struct fk_batch *batch);
/* The batch of that number, or the first one after it; NULL: none. It is the ring's. */
struct fk_batch *fk_history_at(const struct fk_history *h, uint64_t seq);
/* Does a receiver that has all before seq know everything once it got what is kept? */
bool fk_history_covers(const struct fk_history *h, uint64_t seq);

/*
 * A request for batches: the frames behind the sender's identity, as [start u64 big endian] or
 * ["", start]. 0, or -EBADMSG.
 */
struct fk_frame { const void *data; size_t bytes; };
int fk_history_parse_request(const struct fk_frame *frames, size_t n, uint64_t *start);

static inline void fk_put_be64(unsigned char out[8], uint64_t v)
{
    for (int i = 0; i < 8; i++)
        out[i] = (unsigned char)(v >> (56 - 8 * i));
}

static inline uint64_t fk_get_be64(const unsigned char *p)
{
    uint64_t v = 0;

    for (int i = 0; i < 8; i++)
        v = v << 8 | p[i];
    return v;
}

#endif
