/*
 * cluster_impl.h - what the files of the cluster's state machine share: cluster.c (membership, commands),
 * publish.c (our changes and snapshots), follow.c (those of others). Not for anybody else.
 */
#ifndef FK_CLUSTER_IMPL_H
#define FK_CLUSTER_IMPL_H

#include "base/log.h"
#include "base/plant.h"
#include "cluster/cluster.h"

#define MS UINT64_C(1000)
#define SECOND UINT64_C(1000000)
#define SNAPSHOT_TTL_MS "60000"
#define CONTROL_CAP "256"
#define LONG_TTL_MS "86400000"
#define BUDGET 1024u                    /* changes applied in one call */
#define SYNCS 4u                        /* snapshots of others read at a time */

enum command_kind {
    C_BEAT, C_PUBLISH, C_CREATE, C_TIME, C_MEMBERS, C_RECORDS, C_REAP, C_PIECE_SET, C_HEAD_SET, C_WANT,
    C_HEAD_GET, C_PIECE_GET, C_LEAVE, C_READ
};

enum peer_state {
    P_RECORD,                           /* its record is not known */
    P_STREAM,                           /* following */
    P_GAP,                              /* has to be taken anew; waits for its turn */
    P_WAIT,                             /* the owner was asked for a snapshot; looks again at next_try */
    P_HEAD, P_LOAD,                     /* reading the snapshot's head, its pieces */
};

struct peer {
    char name[FK_CLUSTER_NAME_MAX];
    uint64_t epoch, cursor;             /* cursor: last batch applied */
    uint64_t need;                      /* after a gap: the oldest batch that is still there */
    uint64_t score;                     /* the lease's end by Redis' clock, as last seen */
    uint64_t lease_us, refused_us;      /* end of the lease; not named before (reads failed) */
    uint64_t next_try_us, want_us;
    uint32_t wait_us, refusals;
    uint32_t piece, cost[2];            /* cost: measured, 0: never */
    uint16_t node;
    enum peer_state state;
    bool complained;
    struct fk_snapshot_head head;
    struct fk_node_record record;
};

struct batch {
    struct batch *next;
    uint64_t seq;
    uint32_t changes;
    bool sent;
    fk_bytes data;
};

struct command_queue {
    struct fk_command *todo, **todo_end;        /* made, not taken */
    struct fk_command *flight, **flight_end;    /* taken, not answered */
    bool up, bad;
};

struct fk_cluster {
    struct fk_cluster_params p;
    char cluster[FK_CLUSTER_NAME_MAX], prefix[FK_CLUSTER_NAME_MAX + 16];
    struct fk_node_record record;       /* ours */
    uint64_t epoch, epoch_floor;        /* floor: a new epoch is above it */
    bool fenced, leaving, left;
    struct command_queue q[FK_CONNS];
    struct fk_command *spare;
    uint64_t beat_due_us, poll_due_us, hold_until_us;   /* hold: Redis said it can't now */
    bool beating, polling;
    uint64_t polled_us, redis_ms, poll_sent_us, poll_seen_us;    /* Redis' clock at the poll */
    char last_error[24];                /* in the log at last_error_us */
    uint64_t last_error_us;

    /* publish.c */
    FK_VEC(struct fk_change) pending;
    uint64_t pending_us;                /* since when the oldest waits */
    struct batch *first, **last;        /* made, not confirmed */
    uint32_t in_flight;
    uint64_t seq, acked, batch_changes; /* last batch made, confirmed; changes in batches */
    bool stream_lost, lost_changes;     /* the stream is to be created; not all was told */
    struct {
        bool wanted, scanning, ended, head_sent;
        uint64_t cursor, seq, blocks, next_us;
        uint32_t pieces, confirmed;
        FK_VEC(struct fk_change) list;
    } snap;

    /* follow.c */
    struct peer **peers;                /* by name */
    uint32_t n_peers, peers_cap, refresh_at, syncing;
    struct peer *by_node[FK_REMOTE_NODES];
    struct fk_remote *remote;
    uint64_t control_ms, control_seq;   /* cursor in the control stream */
    uint64_t next_read_us, peers_due_us;
    struct reply_place {                /* in a reply that is being applied */
        size_t stream, entry;
        bool open, full;                /* full: a stream had as much as was asked for */
        uint16_t node;                  /* whose the open batch is */
        struct fk_batch_reader batch;
    } at[FK_CONNS];

    struct fk_cluster_stats stats;
};

/* ---- cluster.c ---- */
struct fk_command *cluster_command(struct fk_cluster *c, enum fk_conn conn, enum command_kind kind,
                                   uint64_t arg);
void cluster_word(struct fk_command *cmd, const void *data, size_t bytes);
void cluster_text(struct fk_command *cmd, const char *text);
void cluster_number(struct fk_command *cmd, uint64_t n);
/* A key of ours: prefix, kind, name. */
void cluster_key(struct fk_cluster *c, struct fk_command *cmd, const char *kind, const char *name);
bool reply_is(const struct fk_reply *r, const char *error);
/* Says it once per kind of error, and holds off for a while. */
void cluster_error(struct fk_cluster *c, const struct fk_command *cmd, const struct fk_reply *r,
                   uint64_t now_us);

void cluster_reap(struct fk_cluster *c, const struct fk_reply *const *members, uint32_t n);

/* ---- publish.c ---- */
void publish_pump(struct fk_cluster *c, uint64_t now_us);
void publish_joined(struct fk_cluster *c);
void publish_down(struct fk_cluster *c);
void publish_mark(struct fk_cluster *c);
void publish_drop_all(struct fk_cluster *c);
void publish_reply(struct fk_cluster *c, const struct fk_command *cmd, const struct fk_reply *r,
                   uint64_t now_us);
void publish_wanted(struct fk_cluster *c);
uint64_t publish_wakeup(const struct fk_cluster *c);

/* ---- follow.c ---- */
void follow_members(struct fk_cluster *c, const struct fk_reply *r, uint64_t now_us);
void follow_records(struct fk_cluster *c, const struct fk_command *cmd, const struct fk_reply *r,
                    uint64_t now_us);
void follow_spaces(struct fk_cluster *c);
void follow_ask_records(struct fk_cluster *c, uint64_t now_us);
/* ---- sync.c ---- */
bool sync_piece(struct fk_cluster *c, const struct fk_command *cmd, const struct fk_reply *r,
                uint64_t now_us);
void sync_head(struct fk_cluster *c, const struct fk_command *cmd, const struct fk_reply *r,
               uint64_t now_us);
void sync_step(struct fk_cluster *c, struct peer *p, uint64_t now_us);
struct peer *follow_peer_of(const struct fk_cluster *c, const struct fk_command *cmd);
bool follow_forget(struct fk_cluster *c, struct peer *p, uint64_t now_us);
void follow_gap(struct fk_cluster *c, struct peer *p, uint64_t need, uint64_t now_us);
/* Applies what is left of the open batch: 1 done, 0 the budget is used up, -EBADMSG. */
int follow_apply(struct fk_cluster *c, struct peer *p, struct fk_batch_reader *batch, uint32_t *budget);

bool follow_read(struct fk_cluster *c, const struct fk_reply *r, uint64_t now_us);
void follow_pump(struct fk_cluster *c, uint64_t now_us);
void follow_down(struct fk_cluster *c, enum fk_conn conn);
void follow_peers_tick(struct fk_cluster *c, uint64_t now_us);
void follow_fini(struct fk_cluster *c);

#endif
