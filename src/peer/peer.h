/*
 * peer.h - the peer tier: what joins a core, the cluster's index and a transport. A state machine: no thread, no
 * clock, no I/O of its own.
 *
 *     core's events ----------- fk_peers_tell ----> changes of the cluster
 *     match, prefetch --------- fk_peers_reach ---> the cluster's remote index: how far others reach
 *     core's fetches ---------- fk_peers_pump ----> a holder chosen, fk_transport_read into the cpu slot
 *     transport's completions - fk_peers_pump ----> the core's, or another holder
 *     others' reads ----------- fk_peers_grant ---> epoch, generation and key compared; the core's copy lent
 *
 * A slot's generation is counted here: it grows each time a block becomes READY in the slot. A read names (epoch,
 * slot, generation, key), the owner compares all of them, and lends the copy, so it stays what it is while it is read.
 *
 * From the SSD tier blocks are lent through a bounded number of staging buffers: the shell reads them
 * (fk_peers_take_stage, fk_peers_staged), the transport is told when they are there.
 *
 * Every fetch ends within timeout_us of its being taken, whatever holders were tried. Failed holders are left alone
 * by the cluster's choice; a holder that says "not there" is forgotten for that block.
 *
 * Lock: all calls under the core's. The cluster's lock is taken inside it, and given up before return; the
 * transport's thread calls grant and release, which take the core's lock in the shell. Callers: src/api, tests/net.
 */
#ifndef FK_PEER_PEER_H
#define FK_PEER_PEER_H

#include <pthread.h>

#include "cluster/cluster.h"
#include "node/core.h"
#include "transport/transport.h"

struct fk_peers;

struct fk_peers_params {
    struct fk_core *core;
    struct fk_cluster *cluster;
    pthread_mutex_t *cluster_lock;      /* NULL: nobody else calls the cluster */
    struct fk_transport *transport;
    bool share_cpu, share_ssd;          /* which tiers' blocks are announced and lent */
    uint64_t timeout_us;                /* of a fetch; 0: 2 s */
    uint32_t max_in_flight;             /* fetches under way; 0: 1024 */
    uint32_t staging_buffers;           /* for share_ssd; 0: 16 */
    /* A cpu slot is about to get other bytes; may be NULL. */
    void (*filling)(void *ctx, uint32_t space, uint32_t slot);
    /* No peer can give that block: is it had from somebody else, who answers the core himself? May be NULL: no. */
    bool (*hand_on)(void *ctx, const struct fk_core_fetch *want);
    void *ctx;
};

/* -ENOMEM. The core, the cluster and the transport must outlive it. */
int fk_peers_create(const struct fk_peers_params *params, struct fk_peers **out);
/* The transport has been closed: nothing is under way any more. */
void fk_peers_destroy(struct fk_peers *p);

struct fk_peers_space {
    uint32_t id;                        /* the core's */
    uint8_t fingerprint[16];            /* of geometry and model: spaces with another one never meet */
    uint64_t block_bytes, slot_bytes;
    void *pool;                         /* the cpu slots */
    uint32_t slots[FK_TIERS];
};
/* A space that was just added to the core, before its first operation. What it holds already (found
 * again on SSD) is told as well. -ENOSPC: more spaces than a cluster's node can have; -ENOMEM. */
int fk_peers_space(struct fk_peers *p, const struct fk_peers_space *space);
/* Blocks of this quota group are neither announced nor lent. */
void fk_peers_group_private(struct fk_peers *p, uint32_t group);

/* All of the core's events, in order. */
void fk_peers_tell(struct fk_peers *p, const struct fk_core_event *events, uint32_t n, uint64_t now_us);
/* Some were lost: others take a snapshot. */
void fk_peers_events_lost(struct fk_peers *p, uint64_t now_us);
/* For the snapshot: see fk_cluster_scan_wanted. */
uint32_t fk_peers_scan(struct fk_peers *p, uint64_t cursor, struct fk_change *out, uint32_t max,
                       uint64_t *next, bool *end);

/* How many leading keys can be had, of which `known` can here: >= known. */
uint32_t fk_peers_reach(struct fk_peers *p, uint32_t instance, uint32_t space, const struct fk_key *keys,
                        uint32_t n, uint32_t known, uint64_t now_us);

/* Takes the core's fetches and the transport's completions, and goes on with what is under way. Call when either
 * has something, and at next_wakeup. */
void fk_peers_pump(struct fk_peers *p, uint64_t now_us);
uint64_t fk_peers_next_wakeup(const struct fk_peers *p);

/* The provider's two functions (transport.h). */
int fk_peers_grant(struct fk_peers *p, const struct fk_block_ref *r, struct fk_grant *g);
int fk_peers_release(struct fk_peers *p, const struct fk_block_ref *r, struct fk_grant *g);

/* SSD blocks that others want: to be read into the buffer and verified, like a fill. */
struct fk_peers_stage { uint32_t id, space, ssd_slot; struct fk_key key; void *buffer; };
uint32_t fk_peers_take_stage(struct fk_peers *p, struct fk_peers_stage *out, uint32_t max);
bool fk_peers_wants_stage(const struct fk_peers *p);
void fk_peers_staged(struct fk_peers *p, uint32_t id, int status);

struct fk_peers_stats {
    uint64_t fetched_blocks, fetched_bytes, failed_blocks, retried;     /* from others */
    uint64_t not_there;                 /* "not there": the index was behind */
    uint64_t lent_blocks, refused;      /* to others */
    uint64_t in_flight, lent_now, quarantined;
};
void fk_peers_get_stats(const struct fk_peers *p, struct fk_peers_stats *out);
/* What a block takes lately. */
struct fk_rate fk_peers_block_rate(const struct fk_peers *p, uint32_t space);
/* Invariants; NULL or what is wrong. */
const char *fk_peers_check(const struct fk_peers *p);

#endif
