/*
 * depot.h - what joins a core and a store that nodes share. A state machine: no thread, no clock, no I/O of its own.
 *
 *     core's events ----- fk_depot_tell ---> candidates ---> fk_depot_pump: the core's copy is lent -> the store
 *     match, prefetch --- fk_depot_reach --> the store's set, and the peers in turn
 *     core's fetches ---- fk_depot_pump ---> the store, into the cpu slot   (with peers: fk_depot_fetch, for those that no
 *                                            peer can serve)
 *     the store's answers fk_depot_pump ---> the core's
 *
 * A block is lent while it is written; before others can see it the store asks (fk_depot_sure) whether the copy is still
 * good. What is written is never waited for. A fetch ends by timeout_us; if the store still reads into its slot then, the core
 * is told so, and once more when it has let go.
 *
 * Lock: all calls under the core's. Callers: src/api/remote.c, tests/net.
 */
#ifndef FK_DEPOT_DEPOT_H
#define FK_DEPOT_DEPOT_H

#include "node/core.h"
#include "peer/peer.h"
#include "store/store.h"

#define FK_DEPOT_FETCHES 1024u          /* under way; more wait in the core */
#define FK_DEPOT_WRITES_MAX 64u

struct fk_depot;

struct fk_depot_params {
    struct fk_core *core;
    struct fk_store *store;             /* with room for FK_DEPOT_REQUESTS, and fk_depot_sure for its writes */
    struct fk_peers *peers;             /* asked first; NULL: there are none */
    bool on_reuse;                      /* written when used again, not when stored */
    uint64_t timeout_us;                /* of a fetch or write */
    uint32_t max_writes;                /* at a time */
    /* Are blocks of this quota group kept from others? */
    bool (*is_private)(void *ctx, uint32_t group);
    /* A cpu slot is about to get other bytes; may be NULL. */
    void (*filling)(void *ctx, uint32_t space, uint32_t slot);
    /* Bytes that go with the block (FK_STORE_NOTE_MAX at most): made for what is lent, read of what has come, before it is
     * READY. Both NULL: none. */
    uint32_t (*write_note)(void *ctx, uint32_t space, uint32_t slot, void *note);
    void (*read_note)(void *ctx, uint32_t space, uint32_t slot, const void *note, uint32_t bytes);
    void *ctx;
};
#define FK_DEPOT_REQUESTS (2 * (FK_DEPOT_FETCHES + FK_DEPOT_WRITES_MAX))

/* -ENOMEM. Core and store must outlive it. */
int fk_depot_create(const struct fk_depot_params *params, struct fk_depot **out);
/* keep_notes: a thread of the store hangs and may still write to one. */
void fk_depot_destroy(struct fk_depot *d, bool keep_notes);

struct fk_depot_space {
    uint32_t id, store_id;              /* the core's and the store's */
    uint64_t slot_bytes;
    void *pool;                         /* the cpu slots */
};
int fk_depot_space(struct fk_depot *d, const struct fk_depot_space *space);     /* -ENOMEM */

/* All of the core's events; the first `n` blocks of a match, which were in memory. True: the pump has something to do that it
 * had not before. */
bool fk_depot_tell(struct fk_depot *d, const struct fk_core_event *events, uint32_t n);
bool fk_depot_used(struct fk_depot *d, uint32_t space, uint32_t group, const struct fk_key *keys, uint32_t n);

/* How many leading keys can be had, of which `known` can here: >= known. */
uint32_t fk_depot_reach(struct fk_depot *d, uint32_t instance, uint32_t space, const struct fk_key *keys, uint32_t n,
                        uint32_t known, uint64_t now_us);

/* A block that no peer can give. False: the store hasn't it either. */
bool fk_depot_fetch(struct fk_depot *d, const struct fk_core_fetch *want, uint64_t now_us);

/* Takes the store's answers and, where there are no peers, the core's fetches. Call when either has something, when tell or used
 * said so, and at the store's next wake-up. How many answers there were. */
uint32_t fk_depot_pump(struct fk_depot *d, uint64_t now_us);

/* fk_store_params.sure: are the bytes that were written still the block's? */
bool fk_depot_sure(const struct fk_depot *d, uint64_t user);

/* The core was reset: what it had goes from the store, too. */
void fk_depot_reset(struct fk_depot *d);

/* Nothing that is to be written waits, or can be written. */
bool fk_depot_idle(const struct fk_depot *d);

struct fk_depot_stats {
    uint64_t waiting;                   /* candidates */
    uint64_t overflowed;                /* for whom there was no room */
    uint32_t fetches, writes, late;     /* under way; late: in quarantine, of both */
};
void fk_depot_get_stats(const struct fk_depot *d, struct fk_depot_stats *out);
/* Invariants; NULL or what is wrong. */
const char *fk_depot_check(const struct fk_depot *d);

#endif
