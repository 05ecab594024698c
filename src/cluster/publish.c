/*
 * publish.c - what this node tells: its changes, in batches to its stream; its snapshot, when somebody
 * asks for one. See cluster.h; under its lock.
 *
 * Batches are kept until Redis has confirmed them, and sent again, under the same ID, after a connection was
 * lost. XADD does not create the stream (NOMKSTREAM): when it is not there, Redis has forgotten it, and
 * a script makes it again together with its TTL.
 */
#include <stdio.h>

#include "cluster/cluster_impl.h"

#define MAX_IN_FLIGHT 32u
#define SNAPSHOT_PAUSE_US SECOND
#define FLUSH_PEER_US UINT64_C(100)
#define PIECES_IN_FLIGHT 2u

/* KEYS node, stream. ARGV epoch, cap, ID, batch, ttl ms. 0: we are no member (any more). */
static const char create_script[] =
    "local cur=redis.call('GET',KEYS[1]) if not cur or string.match(cur,'^(%d+)\\n')~=ARGV[1] then "
    "return 0 end redis.call('XADD',KEYS[2],'MAXLEN','~',ARGV[2],ARGV[3],'b',ARGV[4]) "
    "redis.call('PEXPIRE',KEYS[2],ARGV[5]) return 1";

static void free_batch(struct fk_cluster *c, struct batch *b)
{
    c->batch_changes -= b->changes;
    fk_vec_free(&b->data);
    free(b);
}

void publish_drop_all(struct fk_cluster *c)
{
    for (struct batch *b = c->first, *next; b; b = next) {
        next = b->next;
        free_batch(c, b);
    }
    c->first = NULL;
    c->last = &c->first;
    c->pending.len = 0;
    c->snap.scanning = false;
}

/* A number is skipped: who follows sees a gap, and takes a snapshot. */
static void lose_changes(struct fk_cluster *c)
{
    publish_drop_all(c);
    c->lost_changes = true;
}

static void make_batch(struct fk_cluster *c, uint32_t n)
{
    struct batch *b = calloc(1, sizeof(*b));

    if (!b) {
        lose_changes(c);
        return;
    }
    if (c->lost_changes && !FK_BUG(105))
        c->seq++;
    c->lost_changes = false;
    b->seq = ++c->seq;
    b->changes = n;
    struct fk_batch_id id = { c->record.name, c->epoch, b->seq };
    c->batch_changes += n;
    if (fk_batch_write(&b->data, &id, c->pending.data, n)) {
        free_batch(c, b);
        lose_changes(c);
        return;
    }
    c->stats.batches++;
    c->stats.changes += n;
    c->stats.batch_bytes += b->data.len;
    c->pending.len -= n;
    if (n)
        memmove(c->pending.data, c->pending.data + n, c->pending.len * sizeof(*c->pending.data));
    *c->last = b;
    c->last = &b->next;
}

void publish_mark(struct fk_cluster *c)
{
    c->stream_lost = true;
    if (!c->first)
        make_batch(c, 0);
}

void publish_joined(struct fk_cluster *c)
{
    publish_drop_all(c);
    c->seq = c->acked = 0;
    c->stream_lost = true;
    c->snap.wanted = c->snap.scanning = false;
    c->snap.seq = 0;
    make_batch(c, 0);
}

void fk_cluster_change(struct fk_cluster *c, const struct fk_change *list, uint32_t n,
                       uint64_t now_us)
{
    if (FK_BUG(108) && c->snap.scanning)
        return;
    if (!c->epoch) {                    /* nobody listens: a snapshot will tell */
        c->lost_changes = true;
        return;
    }
    if (c->pending.len + c->batch_changes + n > c->p.max_pending) {
        c->stats.overflows++;
        lose_changes(c);
        return;
    }
    if (!c->pending.len)
        c->pending_us = now_us;
    for (uint32_t i = 0; i < n; i++) {
        if (fk_vec_push(&c->pending, list[i])) {
            lose_changes(c);
            return;
        }
    }
    if (now_us >= c->hold_until_us && c->q[FK_CONN_COMMAND].up)
        publish_pump(c, now_us);
}

void fk_cluster_resync(struct fk_cluster *c, uint64_t now_us)
{
    lose_changes(c);
    publish_pump(c, now_us);
}

/* ---- batches ---- */

static void send_batch(struct fk_cluster *c, struct batch *b)
{
    bool create = c->stream_lost && !FK_BUG(106);
    struct fk_command *cmd = cluster_command(c, FK_CONN_COMMAND, create ? C_CREATE : C_PUBLISH, b->seq);
    char id[48];
    int len = snprintf(id, sizeof(id), "%llu-%llu", (unsigned long long)c->epoch,
                       (unsigned long long)b->seq);

    if (create) {
        cluster_text(cmd, "EVAL");
        cluster_text(cmd, create_script);
        cluster_text(cmd, "2");
        cluster_key(c, cmd, "node", c->record.name);
        cluster_key(c, cmd, "delta", c->record.name);
        cluster_number(cmd, c->epoch);
        cluster_number(cmd, c->p.stream_batches);
        cluster_word(cmd, id, (size_t)len);
        cluster_word(cmd, b->data.data, b->data.len);
        cluster_number(cmd, c->record.ttl_ms);
    } else {
        cluster_text(cmd, "XADD");
        cluster_key(c, cmd, "delta", c->record.name);
        if (!FK_BUG(106))
            cluster_text(cmd, "NOMKSTREAM");
        cluster_text(cmd, "MAXLEN");
        cluster_text(cmd, "~");
        cluster_number(cmd, c->p.stream_batches);
        cluster_word(cmd, id, (size_t)len);
        cluster_text(cmd, "b");
        cluster_word(cmd, b->data.data, b->data.len);
    }
    b->sent = true;
    c->in_flight++;
    c->stats.publish_commands++;
}

static void snapshot_pump(struct fk_cluster *c, uint64_t now_us);

/* The more nodes, the longer changes wait for company: Redis has to take all nodes' batches. */
static uint64_t flush_us(const struct fk_cluster *c)
{
    return fk_max(c->p.flush_us, c->n_peers * FLUSH_PEER_US);
}

void publish_pump(struct fk_cluster *c, uint64_t now_us)
{
    if (!c->epoch || c->leaving)
        return;
    while (c->pending.len && (c->pending.len >= FK_BATCH_CHANGES || now_us >= c->pending_us + flush_us(c))) {
        make_batch(c, (uint32_t)fk_min(c->pending.len, (size_t)FK_BATCH_CHANGES));
        c->pending_us = now_us;
    }
    if (c->lost_changes && !c->pending.len)
        make_batch(c, 0);
    if (!c->q[FK_CONN_COMMAND].up || now_us < c->hold_until_us)
        return;
    for (struct batch *b = c->first; b && c->in_flight < MAX_IN_FLIGHT; b = b->next) {
        if (b->sent)
            continue;
        if (c->stream_lost && c->in_flight)
            break;                      /* first it is made, then filled */
        send_batch(c, b);
    }
    snapshot_pump(c, now_us);
}

uint64_t publish_wakeup(const struct fk_cluster *c)
{
    uint64_t at = UINT64_MAX;

    if (!c->epoch || c->leaving)
        return at;
    if (c->pending.len)
        at = c->pending_us + flush_us(c);
    if (c->snap.wanted && !c->snap.scanning)
        at = fk_min(at, c->snap.next_us);
    if (c->first && !c->first->sent && !c->in_flight)
        at = fk_min(at, c->hold_until_us);
    return at;
}

static void unsend(struct fk_cluster *c, uint64_t from)
{
    for (struct batch *b = c->first; b; b = b->next)
        if (b->seq >= from)
            b->sent = false;
}

static void confirm(struct fk_cluster *c, uint64_t seq)
{
    while (c->first && c->first->seq <= seq) {
        struct batch *b = c->first;
        c->first = b->next;
        if (!c->first)
            c->last = &c->first;
        free_batch(c, b);
    }
    c->acked = fk_max(c->acked, seq);
}

void publish_down(struct fk_cluster *c)
{
    c->in_flight = 0;
    unsend(c, 0);
    if (c->snap.scanning) {             /* pieces may be missing: once more, from the start */
        c->snap.scanning = false;
        c->snap.wanted = true;
    }
}

static void batch_reply(struct fk_cluster *c, const struct fk_command *cmd, const struct fk_reply *r,
                        uint64_t now_us)
{
    bool mine = c->first && cmd->arg >= c->first->seq && cmd->arg <= c->seq;

    c->in_flight -= c->in_flight > 0;
    if (!mine)
        return;                         /* of before an overflow, or of another epoch */
    if (reply_is(r, "equal or smaller")) {
        confirm(c, cmd->arg);           /* sent twice: it was there already. Or somebody else's is: the */
        c->stream_lost = false;         /* heartbeat will tell */
        c->beat_due_us = fk_min(c->beat_due_us, now_us);
    } else if (cmd->kind == C_CREATE && r->type == FK_REPLY_INTEGER) {
        if (r->integer == 1) {
            c->stream_lost = false;
            confirm(c, cmd->arg);
        } else {
            unsend(c, cmd->arg);
            c->beat_due_us = fk_min(c->beat_due_us, now_us);
            c->hold_until_us = now_us + 50 * MS;
        }
    } else if (cmd->kind == C_PUBLISH && r->type == FK_REPLY_STRING) {
        confirm(c, cmd->arg);
    } else if (cmd->kind == C_PUBLISH && r->type == FK_REPLY_NIL) {
        c->stream_lost = true;
        unsend(c, cmd->arg);
    } else {
        unsend(c, cmd->arg);
        cluster_error(c, cmd, r, now_us);
    }
}

/* ---- our snapshot ---- */

void publish_wanted(struct fk_cluster *c)
{
    c->snap.wanted = true;
}

static void start_scan(struct fk_cluster *c, uint64_t now_us)
{
    c->snap.wanted = false;
    /* No two snapshots have one number: pieces of both would be taken for one, and who misses a piece of the last
     * one could not tell whether this is another. */
    if (c->snap.seq == c->seq)
        make_batch(c, 0);
    c->snap.scanning = true;
    c->snap.ended = c->snap.head_sent = false;
    c->snap.cursor = c->snap.blocks = 0;
    c->snap.pieces = c->snap.confirmed = 0;
    c->snap.seq = FK_BUG(107) ? c->seq + 1 : c->seq;
    c->snap.list.len = 0;
    c->snap.next_us = now_us + SNAPSHOT_PAUSE_US;
}

bool fk_cluster_scan_wanted(const struct fk_cluster *c, uint64_t *cursor, uint32_t *max)
{
    if (!c->snap.scanning || c->snap.ended || c->snap.pieces >= c->snap.confirmed + PIECES_IN_FLIGHT ||
        !c->q[FK_CONN_COMMAND].up)
        return false;
    *cursor = c->snap.cursor;
    *max = fk_min(c->p.piece_changes - (uint32_t)c->snap.list.len, BUDGET);
    return true;
}

static void piece_key(struct fk_cluster *c, struct fk_command *cmd, uint32_t piece)
{
    char name[2 * FK_CLUSTER_NAME_MAX];

    snprintf(name, sizeof(name), "%s:%llu-%llu:%u", c->record.name, (unsigned long long)c->epoch,
             (unsigned long long)c->snap.seq, piece);
    cluster_key(c, cmd, "piece", name);
}

static void write_piece(struct fk_cluster *c)
{
    struct fk_batch_id id = { c->record.name, c->epoch, fk_piece_number(c->snap.seq, c->snap.pieces) };
    fk_bytes data = { 0 };

    if (fk_batch_write(&data, &id, c->snap.list.data, (uint32_t)c->snap.list.len)) {
        c->snap.scanning = false;
        return;
    }
    struct fk_command *cmd = cluster_command(c, FK_CONN_COMMAND, C_PIECE_SET, c->snap.pieces);
    cluster_text(cmd, "SET");
    piece_key(c, cmd, c->snap.pieces);
    cluster_word(cmd, data.data, data.len);
    cluster_text(cmd, "PX");
    cluster_text(cmd, SNAPSHOT_TTL_MS);
    fk_vec_free(&data);
    c->snap.pieces++;
    c->snap.blocks += c->snap.list.len;
    c->stats.snapshot_blocks += c->snap.list.len;
    c->snap.list.len = 0;
}

void fk_cluster_scan_give(struct fk_cluster *c, const struct fk_change *list, uint32_t n,
                          uint64_t next, bool end, uint64_t now_us)
{
    if (!c->snap.scanning)
        return;
    for (uint32_t i = 0; i < n; i++) {
        if (fk_vec_push(&c->snap.list, list[i])) {
            c->snap.scanning = false;
            return;
        }
    }
    c->snap.cursor = next;
    c->snap.ended = end;
    if (c->snap.list.len && (end || c->snap.list.len == c->p.piece_changes))
        write_piece(c);
    publish_pump(c, now_us);
}

/* Starts a snapshot that is wanted; ends one whose pieces are all there. */
static void snapshot_pump(struct fk_cluster *c, uint64_t now_us)
{
    char head[FK_SNAPSHOT_HEAD_BYTES];

    if (c->snap.wanted && !c->snap.scanning && now_us >= c->snap.next_us)
        start_scan(c, now_us);
    if (!c->snap.scanning || !c->snap.ended || c->snap.head_sent ||
        c->snap.confirmed < c->snap.pieces)
        return;
    struct fk_snapshot_head h = { .epoch = c->epoch, .seq = c->snap.seq, .blocks = c->snap.blocks,
                                  .pieces = c->snap.pieces };
    int len = fk_snapshot_head_write(&h, head);
    struct fk_command *cmd = cluster_command(c, FK_CONN_COMMAND, C_HEAD_SET, c->snap.seq);
    cluster_text(cmd, "SET");
    cluster_key(c, cmd, "snap", c->record.name);
    cluster_word(cmd, head, (size_t)len);
    cluster_text(cmd, "PX");
    cluster_text(cmd, SNAPSHOT_TTL_MS);
    c->snap.head_sent = true;
}

static void snapshot_reply(struct fk_cluster *c, const struct fk_command *cmd,
                           const struct fk_reply *r, uint64_t now_us)
{
    if (r->type == FK_REPLY_ERROR) {
        cluster_error(c, cmd, r, now_us);
        c->snap.scanning = false;
        c->snap.wanted = true;
    } else if (cmd->kind == C_PIECE_SET) {
        c->snap.confirmed++;
    } else {
        c->snap.scanning = false;
        c->stats.snapshots_written++;
    }
}

void publish_reply(struct fk_cluster *c, const struct fk_command *cmd, const struct fk_reply *r,
                   uint64_t now_us)
{
    if (cmd->kind == C_PUBLISH || cmd->kind == C_CREATE)
        batch_reply(c, cmd, r, now_us);
    else if (c->snap.scanning)
        snapshot_reply(c, cmd, r, now_us);
}
