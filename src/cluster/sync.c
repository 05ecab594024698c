/*
 * sync.c - reading a peer's snapshot after a gap: its head, then its pieces, then its stream again
 * from the batch that the snapshot is as of. Who finds none that is new enough asks the owner for one
 * and looks again. A few peers at a time. See cluster.h; under its lock.
 */
#include <inttypes.h>
#include <stdio.h>

#include "cluster/cluster_impl.h"

#define WANT_AGAIN_US (3 * SECOND)
#define WAIT_MIN_US (20 * MS)
#define WAIT_MAX_US (2 * SECOND)

/* KEYS control. ARGV name, ttl ms. Redis may have thrown the stream out. */
static const char want_script[] =
    "redis.call('XADD',KEYS[1],'MAXLEN','~'," CONTROL_CAP ",'*','w',ARGV[1]) "
    "return redis.call('PEXPIRE',KEYS[1],ARGV[2])";

static void ask_head(struct fk_cluster *c, struct peer *p)
{
    struct fk_command *cmd = cluster_command(c, FK_CONN_COMMAND, C_HEAD_GET, p->node);

    cluster_text(cmd, "GET");
    cluster_key(c, cmd, "snap", p->name);
    p->state = P_HEAD;
}

static void ask_piece(struct fk_cluster *c, struct peer *p)
{
    struct fk_command *cmd = cluster_command(c, FK_CONN_COMMAND, C_PIECE_GET, p->node);
    char name[2 * FK_CLUSTER_NAME_MAX];

    snprintf(name, sizeof(name), "%s:%" PRIu64 "-%" PRIu64 ":%u", p->name, p->epoch, p->head.seq,
             p->piece);
    cluster_text(cmd, "GET");
    cluster_key(c, cmd, "piece", name);
}

static void ask_owner(struct fk_cluster *c, struct peer *p, uint64_t now_us)
{
    if (c->p.watch || now_us < p->want_us)
        return;
    struct fk_command *cmd = cluster_command(c, FK_CONN_COMMAND, C_WANT, 0);
    cluster_text(cmd, "EVAL");
    cluster_text(cmd, want_script);
    cluster_text(cmd, "1");
    cluster_key(c, cmd, "control", "");
    cluster_text(cmd, p->name);
    cluster_text(cmd, LONG_TTL_MS);
    p->want_us = now_us + WANT_AGAIN_US;
}

static void wait_for_it(struct fk_cluster *c, struct peer *p, uint64_t now_us)
{
    ask_owner(c, p, now_us);
    p->wait_us = fk_max(fk_min((uint64_t)p->wait_us * 2, WAIT_MAX_US), WAIT_MIN_US);
    p->next_try_us = now_us + p->wait_us;
    p->state = P_WAIT;
    c->peers_due_us = fk_min(c->peers_due_us, p->next_try_us);
}

void sync_step(struct fk_cluster *c, struct peer *p, uint64_t now_us)
{
    if (p->state == P_GAP && c->syncing < SYNCS) {
        c->syncing++;
        ask_head(c, p);
    } else if (p->state == P_WAIT && now_us >= p->next_try_us) {
        ask_head(c, p);
    }
}

static void synced(struct fk_cluster *c, struct peer *p)
{
    p->cursor = FK_BUG(104) ? fk_max(p->record.seq, p->head.seq) : p->head.seq;
    p->state = P_STREAM;
    p->complained = false;
    c->syncing--;
    c->stats.snapshots_read++;
}

void sync_head(struct fk_cluster *c, const struct fk_command *cmd, const struct fk_reply *r,
               uint64_t now_us)
{
    struct peer *p = follow_peer_of(c, cmd);

    if (r->type == FK_REPLY_ERROR)
        cluster_error(c, cmd, r, now_us);
    if (!p || p->state != P_HEAD)
        return;
    /* Usable if the stream still has all that came after it. */
    if (r->type != FK_REPLY_STRING || fk_snapshot_head_read(&p->head, r->text, r->bytes) ||
        p->head.epoch != p->epoch || (p->head.seq + 1 < p->need && !FK_BUG(114))) {
        wait_for_it(c, p, now_us);
        return;
    }
    if (fk_remote_node_blocks(c->remote, p->node, 0) + fk_remote_node_blocks(c->remote, p->node, 1) &&
        !FK_BUG(116) && !follow_forget(c, p, now_us)) {
        wait_for_it(c, p, now_us);      /* the first pieces of one that was broken off would stay */
        return;
    }
    p->piece = 0;
    p->state = P_LOAD;
    if (p->head.pieces == 0)
        synced(c, p);
    else
        ask_piece(c, p);
}

bool sync_piece(struct fk_cluster *c, const struct fk_command *cmd, const struct fk_reply *r,
                uint64_t now_us)
{
    struct reply_place *at = &c->at[FK_CONN_COMMAND];
    struct peer *p = follow_peer_of(c, cmd);
    uint32_t budget = BUDGET;

    if (r->type == FK_REPLY_ERROR)
        cluster_error(c, cmd, r, now_us);
    if (!p || p->state != P_LOAD)
        return true;
    struct fk_batch_id id = { p->name, p->epoch, fk_piece_number(p->head.seq, p->piece) };
    int rc = at->open ? 0 : r->type != FK_REPLY_STRING ? -ENOENT
                          : fk_batch_open(&at->batch, &id, r->text, r->bytes);
    if (rc == 0) {
        at->open = true;
        rc = follow_apply(c, p, &at->batch, &budget);
        if (rc == 0)
            return false;
    }
    at->open = false;
    if (rc < 0) {                       /* gone, or not what the head promised: another one, from the start */
        c->stats.bad_batches += rc != -ENOENT;
        if (rc == -ENOENT && FK_BUG(115)) {
            synced(c, p);
            return true;
        }
        p->need = fk_max(p->need, p->head.seq + 2);
        follow_gap(c, p, p->need, now_us);
        return true;
    }
    p->piece++;
    if (p->piece < p->head.pieces)
        ask_piece(c, p);
    else
        synced(c, p);
    return true;
}
