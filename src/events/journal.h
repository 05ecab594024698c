/*
 * journal.h - the last events in the order in which they happened, and lists of events. A bounded
 * ring of bytes; who reads it keeps a cursor and may fall off its end:
 *
 *        tail          cursor               head            places grow for ever; place % bytes is
 *   ......|event|event|event|event|event|event|.......      where the event stands. None is cut in
 *                                                           two: the rest of the ring is skipped
 *
 * Whoever fell off (fk_journal_has) looks at what is there now and goes on from the head.
 *
 * Knows base alone. Under node->lock.
 */
#ifndef FK_EVENTS_JOURNAL_H
#define FK_EVENTS_JOURNAL_H

#include "base/key.h"
#include "base/util.h"

enum { FK_EVENT_SKIP = 0, FK_EVENT_STORED = 1, FK_EVENT_REMOVED = 2 };    /* as in flexkv.h */
enum { FK_MEDIUM_CPU = 1, FK_MEDIUM_STORAGE = 2 };

/* One event, followed by its tokens. */
struct fk_event {
    uint64_t id;                        /* of the block, whatever it is called */
    uint64_t hash, parent;
    uint32_t space, label;
    uint32_t n_tokens;                  /* that follow; SKIP: bytes in all */
    uint8_t kind, medium, root;
    uint8_t nameless;                   /* it is there, but its tokens could not be read */
};
_Static_assert(sizeof(struct fk_event) == 40, "no gaps: it goes over sockets");

static inline uint32_t *fk_event_tokens(const struct fk_event *e)
{
    return (uint32_t *)(uintptr_t)(e + 1);
}

static inline size_t fk_event_bytes(const struct fk_event *e)
{
    return e->kind == FK_EVENT_SKIP
               ? e->n_tokens
               : fk_round_up(sizeof(*e) + (size_t)e->n_tokens * sizeof(uint32_t), 8);
}

static inline uint64_t fk_event_id(struct fk_key key)
{
    return key.lo ^ (key.hi << 32 | key.hi >> 32);
}

struct fk_journal {
    uint8_t *ring;
    uint64_t bytes;                     /* a power of two */
    uint64_t head, tail;                /* next place; first event that is there */
    uint64_t made;                      /* events so far */
};

/* bytes is rounded up to a power of two. -ENOMEM. */
int fk_journal_init(struct fk_journal *j, uint64_t bytes);
void fk_journal_fini(struct fk_journal *j);
/* Room for an event with so many tokens, at the head; older ones go. The caller fills all but
 * n_tokens in. NULL: larger than the ring (everyone has to look anew). */
struct fk_event *fk_journal_add(struct fk_journal *j, uint32_t n_tokens);
/* Something happened that is not in the journal: every cursor falls off. */
void fk_journal_gap(struct fk_journal *j);

static inline bool fk_journal_has(const struct fk_journal *j, uint64_t cursor)
{
    return cursor >= j->tail && cursor <= j->head;
}
/* The event at the cursor, which moves on; NULL: none yet. The cursor must be in the journal. */
const struct fk_event *fk_journal_next(const struct fk_journal *j, uint64_t *cursor);

/* ---- a list of events, taken out of the journal or made otherwise ---- */

struct fk_event_list {
    FK_VEC(uint8_t) bytes;
    uint32_t n;
};

void fk_event_list_clear(struct fk_event_list *list);
void fk_event_list_free(struct fk_event_list *list);
/* A copy of the event with these tokens (e->n_tokens of them). -ENOMEM. */
int fk_event_list_add(struct fk_event_list *list, const struct fk_event *e, const uint32_t *tokens);
/* Bytes from elsewhere: are they this many whole events that make sense? Then they are the list. */
int fk_event_list_load(struct fk_event_list *list, const void *data, size_t bytes, uint32_t n);
/* The event at *at bytes, which moves on; NULL: the end. */
static inline struct fk_event *fk_event_list_next(const struct fk_event_list *list, size_t *at)
{
    if (*at >= list->bytes.len)
        return NULL;
    struct fk_event *e = (struct fk_event *)(void *)(list->bytes.data + *at);
    *at += fk_event_bytes(e);
    return e;
}

#endif
