/* remote.h - private to src/api: a node's part in a store that nodes share. See remote.c. */
#ifndef FK_API_REMOTE_H
#define FK_API_REMOTE_H

#include "api/node_impl.h"
#include "store/store.h"

#define REMOTE_FETCHES 1024u            /* under way; more wait in the core */
#define REMOTE_WRITES_MAX 64u
#define REMOTE_CANDIDATES 65536u        /* blocks that wait to be written */

struct remote_candidate { struct fk_key key, parent; uint32_t space; };

struct remote_fetch { uint64_t id; uint32_t space, slot, next; };       /* id: the core's */

struct remote_write { uint32_t loan, next; };

struct fk_node_store {
    struct fk_node *node;
    struct fk_store *store;
    bool on_reuse;                      /* written when used again, not when stored */
    uint64_t timeout_us;
    uint32_t max_writes;

    /* under node->lock */
    struct remote_candidate *ring;      /* REMOTE_CANDIDATES */
    uint32_t ring_at, ring_n;
    struct remote_fetch fetch[REMOTE_FETCHES];
    struct remote_write write[REMOTE_WRITES_MAX];
    uint32_t free_fetch, free_write, fetches, writes, late;
    unsigned char *notes;               /* FK_STORE_NOTE_MAX for each fetch, then for each write; NULL: no names */
    uint64_t overflowed;                /* candidates for whom there was no room */
    uint64_t *bits;                     /* of a look-up */
    uint32_t bits_words;

    pthread_t thread;
    pthread_mutex_t wake_lock;
    pthread_cond_t wake;
    bool signalled, stop;               /* under wake_lock */
};

#endif
