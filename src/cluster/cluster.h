/*
 * cluster.h - a node's part in the cluster: membership, telling the others what changed here, and
 * following what changed there. A state machine: no I/O, no thread, no clock.
 *
 *      changes of local blocks ----->+---------+---- commands ----> Redis (redis.c, or simulated)
 *      scans (for a snapshot) <----->| cluster |<--- replies -----
 *      look-ups -------------------->+---------+
 *                                    | remote.h: who else holds what
 *
 * Two connections: COMMAND for everything that is answered at once, READER for XREAD that blocks. Commands of a
 * connection are answered in the order taken. Protocol, keys and scripts: docs/cluster.md.
 *
 * What always holds:
 *   - A node is (name, epoch). Epochs of a name only grow, whatever Redis forgets. Who finds a newer
 *     epoch under its name is *fenced*: it says nothing more, and its reads are refused by its epoch.
 *   - Batches of an epoch are numbered without gaps; the number is the stream entry's ID, so sending one
 *     twice does no harm, and a reader that misses one knows. It drops what it knew and takes a snapshot.
 *   - A look-up names a node only while its lease, as last seen in Redis, lasts.
 *   - Pending changes, commands and memory are bounded; when something overflows, others take a snapshot.
 *   - Every command has a deadline: a connection that passes one is bad, and is to be dropped.
 *
 * Lock: the shell serialises all calls (one mutex); each takes microseconds. Look-ups take the same lock.
 */
#ifndef FK_CLUSTER_CLUSTER_H
#define FK_CLUSTER_CLUSTER_H

#include "cluster/format.h"
#include "cluster/remote.h"

struct fk_cluster;

struct fk_cluster_params {
    const char *cluster;                /* its name: part of each key */
    const char *name;                   /* this node's, unlike any other's */
    const char *zone;                   /* nodes of one zone are near; NULL: none */
    uint64_t ttl_us;                    /* of the membership; renewed every third of it */
    uint64_t flush_us;                  /* how long changes wait for others; 0: 4 ms */
    uint64_t timeout_us;                /* of a command; 0: 2 s */
    uint32_t stream_batches;            /* cap of our stream; 0: 512 */
    uint32_t piece_changes;             /* blocks in a piece of our snapshot; 0: 8192 */
    uint32_t max_pending;               /* changes not yet in Redis; 0: 65536 */
    uint64_t max_holders;               /* of the remote index; 0: 2^32 */
    uint64_t seed;                      /* secret and random */
    bool watch;                         /* only look: no membership, nothing told */
    bool transient;                     /* the cluster ends with its last member: nothing is kept */
};

/* 0; -EINVAL and a log line: a name that can't be; -ENOMEM. */
int fk_cluster_create(const struct fk_cluster_params *params, uint64_t now_us,
                      struct fk_cluster **out);
void fk_cluster_destroy(struct fk_cluster *c);

/* ---- this node ---- */
/* Makes a space known to the others; its number here, in changes and look-ups. -ENOSPC. */
int fk_cluster_space(struct fk_cluster *c, const uint8_t fingerprint[16], uint64_t block_bytes,
                     uint8_t *number);
/* "transport=where": how others read from us. -ENOSPC. */
int fk_cluster_address(struct fk_cluster *c, const char *address);
/* For the record, at the next heartbeat; load: 0 idle .. 1000. */
void fk_cluster_report(struct fk_cluster *c, uint32_t load, const uint64_t blocks[2],
                       const uint64_t slots[2]);
/* In the order of events; a block that moved to another slot or generation is added anew. */
void fk_cluster_change(struct fk_cluster *c, const struct fk_change *list, uint32_t n,
                       uint64_t now_us);
/* What was told is not all: others take a snapshot. */
void fk_cluster_resync(struct fk_cluster *c, uint64_t now_us);
/*
 * A snapshot is being written: the shell gives up to *max blocks from *cursor on (0: from the start),
 * and where to go on. What is there during the whole scan must be given; the rest may be.
 */
bool fk_cluster_scan_wanted(const struct fk_cluster *c, uint64_t *cursor, uint32_t *max);
void fk_cluster_scan_give(struct fk_cluster *c, const struct fk_change *list, uint32_t n,
                          uint64_t next, bool end, uint64_t now_us);
/* Takes our keys out of Redis; over when fk_cluster_left, or when the caller is tired of waiting. */
void fk_cluster_leave(struct fk_cluster *c, uint64_t now_us);
bool fk_cluster_left(const struct fk_cluster *c);
/* 0: not a member (yet, or fenced). Who reads from us must name it. */
uint64_t fk_cluster_epoch(const struct fk_cluster *c);

/* ---- Redis ---- */
enum fk_conn { FK_CONN_COMMAND, FK_CONN_READER, FK_CONNS };

struct fk_command {
    struct fk_command *next;
    uint64_t arg, sent_us, deadline_us;
    uint8_t kind;
    fk_bytes bytes;                     /* the words, one after the other */
    FK_VEC(uint32_t) ends;              /* where each ends */
};

enum fk_reply_type { FK_REPLY_NIL, FK_REPLY_STRING, FK_REPLY_INTEGER, FK_REPLY_ARRAY, FK_REPLY_ERROR };
struct fk_reply {
    enum fk_reply_type type;
    int64_t integer;
    const char *text;                   /* STRING, ERROR; not terminated */
    size_t bytes;
    struct fk_reply *item;              /* ARRAY */
    size_t n;
};

/* Up: logged in, and nothing is under way on it. */
void fk_cluster_connected(struct fk_cluster *c, enum fk_conn conn, bool up, uint64_t now_us);
/* The next command to send, or NULL; valid until its reply or until the connection is down. */
const struct fk_command *fk_cluster_take(struct fk_cluster *c, enum fk_conn conn, uint64_t now_us);
/* The reply of the oldest command taken. false: a bounded part was done, call again with the same. */
bool fk_cluster_reply(struct fk_cluster *c, enum fk_conn conn, const struct fk_reply *reply,
                      uint64_t now_us);
/* The connection is to be dropped: a deadline has passed, or it is no use (a replica). */
bool fk_cluster_conn_bad(const struct fk_cluster *c, enum fk_conn conn);
void fk_cluster_tick(struct fk_cluster *c, uint64_t now_us);
uint64_t fk_cluster_next_wakeup(const struct fk_cluster *c);

/* ---- the others ---- */
uint32_t fk_cluster_extend(const struct fk_cluster *c, uint8_t space, const struct fk_key *keys,
                           uint32_t n, uint32_t known, const uint64_t *local, uint64_t now_us,
                           struct fk_remote_hit *hits);
/* The holder of one block to ask now; see fk_remote_find. */
bool fk_cluster_find(const struct fk_cluster *c, uint8_t space, struct fk_key key, uint16_t prev,
                     uint64_t now_us, struct fk_remote_hit *out);
/* The holder said that it has not what `hit` says: forgotten, unless it has told us something newer. */
void fk_cluster_not_there(struct fk_cluster *c, uint16_t node, uint64_t epoch, struct fk_key key,
                          const struct fk_remote_hit *hit);
struct fk_cluster_peer {
    const struct fk_node_record *record;/* until the next call that is not const */
    uint64_t epoch, blocks[2];
    int64_t lease_us;                   /* what is left of it */
    uint16_t node;
    bool synced;                        /* all of its blocks are known, up to what is on its way */
    uint64_t cursor;                    /* last batch applied */
};
bool fk_cluster_peer(const struct fk_cluster *c, uint16_t node, uint64_t now_us,
                     struct fk_cluster_peer *out);
uint32_t fk_cluster_peers(const struct fk_cluster *c, uint64_t now_us, struct fk_cluster_peer *out,
                          uint32_t max);
/* How a read went: microseconds a block took, or that it failed; the choice of holders learns. */
void fk_cluster_read_done(struct fk_cluster *c, uint16_t node, unsigned tier, bool ok,
                          uint32_t us_per_block, uint64_t now_us);

struct fk_cluster_stats {
    uint64_t changes, batches, batch_bytes;     /* told */
    uint64_t changes_seen, batches_seen;        /* of others */
    uint64_t commands, command_bytes;           /* to Redis, payload of all words */
    uint64_t publish_commands, beats, polls, reads;
    uint64_t gaps, snapshots_read, snapshots_written, snapshot_blocks, overflows, fenced;
    uint64_t bad_batches, errors;
    uint64_t pending;                           /* changes that Redis has not confirmed */
    uint32_t peers, peers_synced;
    struct fk_remote_stats remote;
};
void fk_cluster_get_stats(const struct fk_cluster *c, struct fk_cluster_stats *out);
/* For tests and tools. */
const struct fk_remote *fk_cluster_remote(const struct fk_cluster *c);

#endif
