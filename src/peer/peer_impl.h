/* peer_impl.h - private to src/peer: the tier's objects. See peer.h. */
#ifndef FK_PEER_PEER_IMPL_H
#define FK_PEER_PEER_IMPL_H

#include "base/util.h"
#include "peer/peer.h"

#define PEERS_MAX_IN_FLIGHT 1024u
#define PEERS_TIMEOUT_US 2000000u
#define PEERS_BATCH 64u
#define PEERS_TRIES 4u                  /* holders asked for one block */
#define PEERS_STAGES 256u               /* SSD blocks that others wait for, at most */
#define PEERS_STAGING 16u
#define PEERS_STAGING_BYTES (UINT64_C(64) << 20)    /* of all buffers of a space, if that makes two */

struct peers_space {
    struct fk_peers_space d;
    uint64_t hash;                      /* what requests name it by */
    uint8_t number;                     /* the cluster's */
    uint32_t *generation[FK_TIERS];     /* per slot: how many blocks have been READY in it */
    uint64_t *checksum;                 /* per cpu slot, once it was lent; 0: not known */
    struct fk_key *key[FK_TIERS];       /* per slot, of transports that name places; else NULL */
    char *staging;                      /* n_buffers slots */
    uint32_t n_buffers;
    uint64_t buffers_used;              /* a bit each */
};

enum fetch_state { FETCH_FREE, FETCH_TODO, FETCH_SENT, FETCH_LATE };

struct fetch {                          /* a block that the core wants */
    uint64_t id;                        /* the core's */
    uint64_t deadline_us, sent_us;
    uint64_t not_before_us;             /* TODO: the holder was busy */
    struct fk_key key;
    struct fk_remote_hit hit;           /* SENT: who was asked for what */
    uint64_t epoch;
    uint32_t space, cpu_slot, gen, share;     /* share: reads sent with it */
    bool urgent;
    uint16_t tried[PEERS_TRIES];
    uint8_t n_tried, state;
    uint32_t next;                      /* free */
};

enum stage_state { STAGE_FREE, STAGE_QUEUED, STAGE_READING, STAGE_LENT };

struct stage {                          /* an SSD block that a peer wants */
    struct fk_key key;
    uint64_t generation, later;         /* later: what the transport knows it by */
    uint32_t space, slot, loan, buffer;
    uint8_t state;
};

struct fk_peers {
    struct fk_peers_params params;
    const char *transport;              /* its name, as in addresses */
    FK_VEC(struct peers_space *) spaces;            /* by the core's number; NULL: none */
    uint64_t private_groups[4];
    uint64_t blocks[FK_TIERS];          /* announced */
    uint64_t told_us;                   /* load and blocks, last reported */

    struct fetch *fetch;                /* max_in_flight */
    uint32_t free_fetch;
    FK_VEC(uint32_t) todo;
    FK_VEC(struct fk_core_fetch_done) done;
    FK_VEC(struct fk_remote_hit) hits;
    FK_VEC(uint64_t) bits;
    uint64_t retry_us, warned_us;

    struct stage stage[PEERS_STAGES];
    FK_VEC(uint32_t) stage_queue;
    uint64_t stages;                    /* ever made */

    uint64_t busy_since_us, busy_bytes, busy_blocks;    /* a window of fetching */
    bool busy_connecting;
    FK_VEC(uint64_t) answered;          /* by the cluster's number of a node: its epoch, once it has */
    struct fk_rate byte;                /* what one takes */
    struct fk_peers_stats stats;
};

/* What the fields of a request are compared with. */
static inline struct peers_space *peers_space(const struct fk_peers *p, uint32_t id)
{
    return id < p->spaces.len ? p->spaces.data[id] : NULL;
}

static inline bool peers_private(const struct fk_peers *p, uint32_t group)
{
    return p->private_groups[group / 64 % 4] >> group % 64 & 1;
}

static inline void peers_cluster_lock(const struct fk_peers *p)
{
    if (p->params.cluster_lock)
        pthread_mutex_lock(p->params.cluster_lock);
}

static inline void peers_cluster_unlock(const struct fk_peers *p)
{
    if (p->params.cluster_lock)
        pthread_mutex_unlock(p->params.cluster_lock);
}

/* peer.c */
void peers_report(struct fk_peers *p, uint64_t now_us);

#endif
