/* cluster.c - commands and replies, heartbeats, polls; see cluster.h and docs/cluster.md. */
#include <inttypes.h>
#include <stdio.h>

#include "cluster/cluster_impl.h"

#define SAY_AGAIN_US (60 * SECOND)
#define BEAT_LATE_MS 500u               /* a heartbeat carried out later than this is void */

/*
 * A heartbeat, which also joins, in one step: nothing of ours is ever there without a TTL, and nobody
 * writes under a name that a newer epoch has.
 * KEYS node, members, stream, epoch counter, control. ARGV epoch (0: give me one), floor, name, ttl ms,
 * record, polite (1: only if nobody has the name), long ttl, latest ms. Reply: epoch that holds the name, how
 * it was (0 nobody had it, 1 we, 2 somebody else has it, 3 too late), last ID of the stream.
 * Too late: a Redis that hung carries out what lay in its sockets, also of those who died meanwhile.
 */
static const char beat_script[] =
    "local e=tonumber(ARGV[1]) local t=redis.call('TIME') local now=t[1]*1000+math.floor(t[2]/1000) "
    "if now>tonumber(ARGV[8]) then return {'0',3,''} end "
    "local ttl=tonumber(ARGV[4]) local cur=redis.call('GET',KEYS[1]) "
    "local had=cur and tonumber(string.match(cur,'^(%d+)\\n')) or 0 "
    "local s=function(n) return string.format('%.0f',n) end "
    "if (e~=0 and had>e) or (ARGV[6]=='1' and had~=0) then return {s(had),2,''} end "
    "if e==0 then e=math.max(tonumber(redis.call('GET',KEYS[4]) or 0) or 0,tonumber(ARGV[2]),now,had)+1 "
    "redis.call('SET',KEYS[4],s(e),'PX',ARGV[7]) end "
    "if had~=0 and had~=e then redis.call('ZREM',KEYS[2],ARGV[3]..'@'..s(had)) end "
    "redis.call('SET',KEYS[1],s(e)..'\\n'..ARGV[5],'PX',ttl) "
    "redis.call('ZADD',KEYS[2],s(now+ttl),ARGV[3]..'@'..s(e)) redis.call('PEXPIRE',KEYS[2],ARGV[7]) "
    "if had~=e then redis.call('XADD',KEYS[5],'MAXLEN','~'," CONTROL_CAP ",'*','j',ARGV[3]) "
    "redis.call('PEXPIRE',KEYS[5],ARGV[7]) end "
    "redis.call('PEXPIRE',KEYS[3],ttl) local l=redis.call('XREVRANGE',KEYS[3],'+','-','COUNT',1) "
    "return {s(e),had==e and 1 or 0,l[1] and l[1][1] or ''}";

/* KEYS node, members, stream, snapshot head, control, epoch counter. ARGV epoch, name, transient: the
 * last one takes everything with it. */
static const char leave_script[] =
    "local cur=redis.call('GET',KEYS[1]) if not cur or string.match(cur,'^(%d+)\\n')~=ARGV[1] then "
    "return 0 end redis.call('DEL',KEYS[1],KEYS[3],KEYS[4]) "
    "redis.call('ZREM',KEYS[2],ARGV[2]..'@'..ARGV[1]) "
    "redis.call('XADD',KEYS[5],'NOMKSTREAM','MAXLEN','~'," CONTROL_CAP ",'*','l',ARGV[2]..'@'..ARGV[1]) "
    "if ARGV[3]=='1' and redis.call('ZCARD',KEYS[2])==0 then redis.call('DEL',KEYS[5],KEYS[6]) end "
    "return 1";

/* KEYS members. ARGV members that look dead: out, if they still do. */
static const char reap_script[] =
    "local t=redis.call('TIME') local now=t[1]*1000+math.floor(t[2]/1000) local n=0 "
    "for i=1,#ARGV do local s=redis.call('ZSCORE',KEYS[1],ARGV[i]) "
    "if s and tonumber(s)<now then n=n+redis.call('ZREM',KEYS[1],ARGV[i]) end end return n";

/* ---- commands ---- */

struct fk_command *cluster_command(struct fk_cluster *c, enum fk_conn conn, enum command_kind kind,
                                   uint64_t arg)
{
    struct command_queue *q = &c->q[conn];
    struct fk_command *cmd = c->spare ? c->spare : calloc(1, sizeof(*cmd));

    if (!cmd)
        abort();        /* a few hundred bytes; nothing sensible is left to do */
    c->spare = NULL;
    cmd->bytes.len = cmd->ends.len = 0;
    cmd->next = NULL;
    cmd->kind = (uint8_t)kind;
    cmd->arg = arg;
    *q->todo_end = cmd;
    q->todo_end = &cmd->next;
    return cmd;
}

void cluster_word(struct fk_command *cmd, const void *data, size_t bytes)
{
    if (fk_bytes_add(&cmd->bytes, data, bytes) || fk_vec_push(&cmd->ends, (uint32_t)cmd->bytes.len))
        abort();
}

void cluster_text(struct fk_command *cmd, const char *text)
{
    cluster_word(cmd, text, strlen(text));
}

void cluster_number(struct fk_command *cmd, uint64_t n)
{
    char text[24];

    cluster_word(cmd, text, (size_t)snprintf(text, sizeof(text), "%" PRIu64, n));
}

void cluster_key(struct fk_cluster *c, struct fk_command *cmd, const char *kind, const char *name)
{
    char key[3 * FK_CLUSTER_NAME_MAX];

    cluster_word(cmd, key, (size_t)snprintf(key, sizeof(key), "%s%s%s%s", c->prefix, kind,
                                            *name ? ":" : "", name));
}

static void free_command(struct fk_cluster *c, struct fk_command *cmd)
{
    if (!c->spare && cmd->bytes.cap < 65536) {
        c->spare = cmd;
        return;
    }
    fk_vec_free(&cmd->bytes);
    fk_vec_free(&cmd->ends);
    free(cmd);
}

static void free_list(struct fk_cluster *c, struct fk_command *list)
{
    for (struct fk_command *next; list; list = next) {
        next = list->next;
        free_command(c, list);
    }
}

static void clear_queue(struct fk_cluster *c, struct command_queue *q)
{
    free_list(c, q->todo);
    free_list(c, q->flight);
    q->todo = q->flight = NULL;
    q->todo_end = &q->todo;
    q->flight_end = &q->flight;
}

/* ---- life ---- */

int fk_cluster_create(const struct fk_cluster_params *params, uint64_t now_us,
                      struct fk_cluster **out)
{
    if (!fk_cluster_name_valid(params->cluster) || !fk_cluster_name_valid(params->name) ||
        (params->zone && *params->zone && !fk_cluster_name_valid(params->zone))) {
        fk_error("cluster: cluster_name \"%s\", node_name \"%s\", node_zone \"%s\": 1 to 63 letters, "
                 "digits and . _ : - are wanted", params->cluster, params->name,
                 params->zone ? params->zone : "");
        return -EINVAL;
    }
    struct fk_cluster *c = calloc(1, sizeof(*c));
    if (!c)
        return -ENOMEM;
    c->p = *params;
    c->p.flush_us = c->p.flush_us ? c->p.flush_us : 4 * MS;
    c->p.timeout_us = c->p.timeout_us ? c->p.timeout_us : 2 * SECOND;
    c->p.stream_batches = c->p.stream_batches ? c->p.stream_batches : 512;
    c->p.piece_changes = c->p.piece_changes ? fk_min(c->p.piece_changes, FK_PIECE_CHANGES) : FK_PIECE_CHANGES;
    c->p.max_pending = c->p.max_pending ? c->p.max_pending : 65536;
    snprintf(c->cluster, sizeof(c->cluster), "%s", params->cluster);
    snprintf(c->prefix, sizeof(c->prefix), "flexkv:{%s}:", params->cluster);
    snprintf(c->record.name, sizeof(c->record.name), "%s", params->name);
    snprintf(c->record.zone, sizeof(c->record.zone), "%s", params->zone ? params->zone : "");
    c->record.ttl_ms = params->ttl_us / 1000;
    c->p.cluster = c->cluster;
    c->p.name = c->record.name;
    c->p.zone = c->record.zone;
    c->last = &c->first;
    for (int i = 0; i < FK_CONNS; i++)
        clear_queue(c, &c->q[i]);
    struct fk_remote_params rp = { .max_holders = params->max_holders, .seed = params->seed };
    int rc = fk_remote_create(&rp, &c->remote);
    if (rc) {
        free(c);
        return rc;
    }
    c->beat_due_us = c->poll_due_us = now_us;
    *out = c;
    return 0;
}

void fk_cluster_destroy(struct fk_cluster *c)
{
    if (!c)
        return;
    for (int i = 0; i < FK_CONNS; i++)
        clear_queue(c, &c->q[i]);
    publish_drop_all(c);
    fk_vec_free(&c->pending);
    fk_vec_free(&c->snap.list);
    follow_fini(c);
    fk_remote_destroy(c->remote);
    if (c->spare) {
        fk_vec_free(&c->spare->bytes);
        fk_vec_free(&c->spare->ends);
        free(c->spare);
    }
    free(c);
}

int fk_cluster_space(struct fk_cluster *c, const uint8_t fingerprint[16], uint64_t block_bytes,
                     uint8_t *number)
{
    struct fk_node_record *r = &c->record;

    for (uint32_t i = 0; i < r->n_spaces; i++) {
        if (memcmp(r->space[i].fingerprint, fingerprint, 16) == 0 &&
            r->space[i].block_bytes == block_bytes) {
            *number = (uint8_t)i;
            return 0;
        }
    }
    if (r->n_spaces == FK_CLUSTER_SPACES)
        return -ENOSPC;
    memcpy(r->space[r->n_spaces].fingerprint, fingerprint, 16);
    r->space[r->n_spaces].block_bytes = block_bytes;
    *number = (uint8_t)r->n_spaces++;
    c->beat_due_us = 0;                 /* the others should know before the first block comes */
    follow_spaces(c);
    return 0;
}

int fk_cluster_address(struct fk_cluster *c, const char *address)
{
    struct fk_node_record *r = &c->record;

    if (r->n_addresses == FK_CLUSTER_ADDRESSES || strlen(address) >= FK_CLUSTER_ADDRESS_MAX)
        return -ENOSPC;
    strcpy(r->address[r->n_addresses++], address);
    c->beat_due_us = 0;
    return 0;
}

void fk_cluster_report(struct fk_cluster *c, uint32_t load, const uint64_t blocks[2],
                       const uint64_t slots[2])
{
    c->record.load = fk_min(load, 1000u);
    memcpy(c->record.blocks, blocks, sizeof(c->record.blocks));
    memcpy(c->record.slots, slots, sizeof(c->record.slots));
}

void fk_cluster_leave(struct fk_cluster *c, uint64_t now_us)
{
    c->leaving = true;
    if (!c->epoch || !c->q[FK_CONN_COMMAND].up) {
        c->left = true;
        return;
    }
    struct fk_command *cmd = cluster_command(c, FK_CONN_COMMAND, C_LEAVE, 0);
    cluster_text(cmd, "EVAL");
    cluster_text(cmd, leave_script);
    cluster_text(cmd, "6");
    cluster_key(c, cmd, "node", c->record.name);
    cluster_key(c, cmd, "members", "");
    cluster_key(c, cmd, "delta", c->record.name);
    cluster_key(c, cmd, "snap", c->record.name);
    cluster_key(c, cmd, "control", "");
    cluster_key(c, cmd, "epoch", "");
    cluster_number(cmd, c->epoch);
    cluster_text(cmd, c->record.name);
    cluster_text(cmd, c->p.transient ? "1" : "0");
}

bool fk_cluster_left(const struct fk_cluster *c)
{
    return c->left;
}

uint64_t fk_cluster_epoch(const struct fk_cluster *c)
{
    return c->epoch;
}

/* ---- errors ---- */

bool reply_is(const struct fk_reply *r, const char *error)
{
    return r->type == FK_REPLY_ERROR && memmem(r->text, r->bytes, error, strlen(error));
}

static const struct { const char *error, *hint; bool drop; } known_errors[] = {
    { "NOAUTH", "it wants a password: set redis_password (and redis_user)", true },
    { "NOPERM", "the user redis_user may not do this; docs/cluster.md lists what it needs", false },
    { "READONLY", "this is a replica; looking for the master again", true },
    { "LOADING", "it is reading its data; waiting", false },
    { "MASTERDOWN", "a replica without its master; waiting", true },
    { "OOM", "it is full: raise its maxmemory", false },
    { "MISCONF", "it can't write to its disk", false },
    { "WRONGTYPE", "somebody else uses a key of ours: choose another cluster_name", false },
    { "MOVED", "it is a Redis Cluster, which is not supported", false },
    { "unknown command", "Redis 6.2 or later is needed", false },
};

void cluster_error(struct fk_cluster *c, const struct fk_command *cmd, const struct fk_reply *r,
                   uint64_t now_us)
{
    const char *hint = r->type == FK_REPLY_ERROR ? "" : "an answer of another form than expected";
    const char *kind = r->type == FK_REPLY_ERROR ? "other" : "form";
    bool drop = false;

    for (size_t i = 0; i < fk_array_size(known_errors); i++) {
        if (reply_is(r, known_errors[i].error)) {
            kind = known_errors[i].error;
            hint = known_errors[i].hint;
            drop = known_errors[i].drop;
            break;
        }
    }
    c->stats.errors++;
    c->hold_until_us = now_us + SECOND;
    if (drop)
        c->q[FK_CONN_COMMAND].bad = c->q[FK_CONN_READER].bad = true;
    bool said = strcmp(c->last_error, kind) == 0 && now_us < c->last_error_us + SAY_AGAIN_US;
    c->last_error_us = said ? c->last_error_us : now_us;
    if (!said)
        fk_warn("cluster %s: Redis: %.*s%s%s; peers' blocks may be missing until this is over", c->cluster,
                r->type == FK_REPLY_ERROR ? (int)fk_min(r->bytes, (size_t)160) : 0,
                r->type == FK_REPLY_ERROR ? r->text : "", *hint ? ": " : "", hint);
    snprintf(c->last_error, sizeof(c->last_error), "%s", kind);
}

/* ---- heartbeat ---- */

static void send_beat(struct fk_cluster *c, uint64_t now_us)
{
    fk_bytes record = { 0 };

    c->record.seq = c->acked;
    if (fk_node_record_write(&record, &c->record)) {
        fk_vec_free(&record);
        c->beat_due_us = now_us + SECOND;
        return;
    }
    struct fk_command *cmd = cluster_command(c, FK_CONN_COMMAND, C_BEAT, c->acked);
    cluster_text(cmd, "EVAL");
    cluster_text(cmd, beat_script);
    cluster_text(cmd, "5");
    cluster_key(c, cmd, "node", c->record.name);
    cluster_key(c, cmd, "members", "");
    cluster_key(c, cmd, "delta", c->record.name);
    cluster_key(c, cmd, "epoch", "");
    cluster_key(c, cmd, "control", "");
    cluster_number(cmd, c->epoch);
    cluster_number(cmd, c->epoch_floor);
    cluster_text(cmd, c->record.name);
    cluster_number(cmd, c->record.ttl_ms);
    cluster_word(cmd, record.data, record.len);
    cluster_text(cmd, c->fenced ? "1" : "0");
    cluster_text(cmd, LONG_TTL_MS);
    cluster_number(cmd, FK_BUG(117) ? UINT64_C(1) << 50
                                    : c->redis_ms + (now_us - c->poll_seen_us) / MS + BEAT_LATE_MS);
    fk_vec_free(&record);
    c->beating = true;
    c->stats.beats++;
}

/* No member any more; the next epoch is above `by`. */
static void lose_epoch(struct fk_cluster *c, uint64_t by)
{
    c->epoch_floor = fk_max(c->epoch_floor, by);
    c->epoch = 0;
    publish_drop_all(c);
    c->lost_changes = true;
}

static void fenced(struct fk_cluster *c, uint64_t by, uint64_t now_us)
{
    if (!c->fenced)
        fk_error("cluster %s: another node goes by the name \"%s\" (epoch %" PRIu64 ", ours was %" PRIu64
                 "): this one tells nothing until that one is gone; give each its own node_name",
                 c->cluster, c->record.name, by, c->epoch);
    c->fenced = true;
    c->stats.fenced++;
    lose_epoch(c, by);
    c->beat_due_us = now_us + c->p.ttl_us / 3;
}

static void beat_reply(struct fk_cluster *c, const struct fk_command *cmd, const struct fk_reply *r,
                       uint64_t now_us)
{
    uint64_t epoch, last_epoch = 0, last = 0;

    if (r->type != FK_REPLY_ARRAY || r->n != 3 || r->item[0].type != FK_REPLY_STRING ||
        !fk_number_read(r->item[0].text, r->item[0].bytes, &epoch) || epoch > FK_CLUSTER_EPOCH_MAX ||
        r->item[1].type != FK_REPLY_INTEGER || r->item[2].type != FK_REPLY_STRING) {
        cluster_error(c, cmd, r, now_us);
        c->beat_due_us = now_us + fk_min(SECOND, c->p.ttl_us / 6);
        return;
    }
    if (r->item[1].integer == 3) {      /* or its clock is another now: ask */
        c->poll_due_us = now_us;
        c->beat_due_us = now_us + 20 * MS;
        return;
    }
    if (r->item[1].integer == 2 && !FK_BUG(102)) {
        fenced(c, epoch, now_us);
        return;
    }
    c->beat_due_us = now_us + c->p.ttl_us / 3;
    fk_id_read(r->item[2].text, r->item[2].bytes, &last_epoch, &last);
    if (!c->epoch) {
        c->epoch = c->epoch_floor = epoch;
        c->fenced = false;
        publish_joined(c);
        fk_info("cluster %s: node \"%s\" is a member, epoch %" PRIu64, c->cluster, c->record.name, epoch);
    } else if (last_epoch > c->epoch && !FK_BUG(118)) {
        lose_epoch(c, last_epoch);      /* somebody had our name meanwhile, and is gone: begin anew */
        c->beat_due_us = now_us;
    } else if ((last_epoch != c->epoch || last < cmd->arg) && cmd->arg > 0 && !FK_BUG(103)) {
        publish_mark(c);                /* Redis has forgotten something: whoever missed it will see */
    }
}

/* ---- polls ---- */

static void send_poll(struct fk_cluster *c)
{
    struct fk_command *cmd = cluster_command(c, FK_CONN_COMMAND, C_TIME, 0);

    cluster_text(cmd, "TIME");
    cmd = cluster_command(c, FK_CONN_COMMAND, C_MEMBERS, 0);
    cluster_text(cmd, "ZRANGE");
    cluster_key(c, cmd, "members", "");
    cluster_text(cmd, "0");
    cluster_text(cmd, "-1");
    cluster_text(cmd, "WITHSCORES");
    c->polling = true;
    c->stats.polls++;
}

static void time_reply(struct fk_cluster *c, const struct fk_command *cmd, const struct fk_reply *r,
                       uint64_t now_us)
{
    uint64_t s, us;

    c->redis_ms = 0;
    if (r->type != FK_REPLY_ARRAY || r->n != 2 || r->item[0].type != FK_REPLY_STRING ||
        r->item[1].type != FK_REPLY_STRING ||
        !fk_number_read(r->item[0].text, r->item[0].bytes, &s) ||
        !fk_number_read(r->item[1].text, r->item[1].bytes, &us)) {
        cluster_error(c, cmd, r, now_us);
        return;
    }
    c->redis_ms = s * 1000 + us / 1000;
    c->poll_sent_us = cmd->sent_us;
    c->poll_seen_us = now_us;
    if (!c->control_ms || c->control_ms > c->redis_ms) {        /* first, or its clock went back */
        c->control_ms = c->redis_ms - 1;
        c->control_seq = 0;
    }
}

static void members_reply(struct fk_cluster *c, const struct fk_command *cmd,
                          const struct fk_reply *r, uint64_t now_us)
{
    c->polling = false;
    c->poll_due_us = now_us + c->p.ttl_us / 6;
    if (!c->redis_ms)
        c->poll_due_us = now_us + SECOND;
    else if (r->type != FK_REPLY_ARRAY || r->n % 2)
        cluster_error(c, cmd, r, now_us);
    else
        follow_members(c, r, now_us);
}

void cluster_reap(struct fk_cluster *c, const struct fk_reply *const *members, uint32_t n)
{
    struct fk_command *cmd = cluster_command(c, FK_CONN_COMMAND, C_REAP, 0);

    cluster_text(cmd, "EVAL");
    cluster_text(cmd, reap_script);
    cluster_text(cmd, "1");
    cluster_key(c, cmd, "members", "");
    for (uint32_t i = 0; i < n; i++)
        cluster_word(cmd, members[i]->text, members[i]->bytes);
}

/* ---- the pump: makes commands as far as they are due ---- */

static void pump(struct fk_cluster *c, uint64_t now_us)
{
    if (c->left)
        return;
    if (c->q[FK_CONN_COMMAND].up) {
        bool held = now_us < c->hold_until_us;
        if (!c->beating && !c->leaving && !c->p.watch && c->redis_ms && now_us >= c->beat_due_us)
            send_beat(c, now_us);
        if (!c->polling && !held && now_us >= c->poll_due_us) {
            c->polled_us = now_us;
            send_poll(c);
        }
        if (!held)
            publish_pump(c, now_us);
    }
    follow_pump(c, now_us);
}

void fk_cluster_connected(struct fk_cluster *c, enum fk_conn conn, bool up, uint64_t now_us)
{
    struct command_queue *q = &c->q[conn];

    clear_queue(c, q);
    q->up = up;
    q->bad = false;
    memset(&c->at[conn], 0, sizeof(c->at[conn]));
    if (conn == FK_CONN_COMMAND) {
        c->beating = c->polling = false;
        c->redis_ms = 0;                /* another Redis may have another clock */
        c->hold_until_us = 0;
        c->beat_due_us = fk_min(c->beat_due_us, now_us);    /* it may have forgotten us */
        c->poll_due_us = now_us;
        publish_down(c);
    }
    follow_down(c, conn);
    if (c->leaving)
        c->left = true;
    if (up)
        pump(c, now_us);
}

const struct fk_command *fk_cluster_take(struct fk_cluster *c, enum fk_conn conn, uint64_t now_us)
{
    struct command_queue *q = &c->q[conn];

    if (!q->up || q->bad)
        return NULL;
    struct fk_command *cmd = q->todo;
    if (!cmd)
        return NULL;
    q->todo = cmd->next;
    if (!q->todo)
        q->todo_end = &q->todo;
    cmd->next = NULL;
    cmd->sent_us = now_us;
    cmd->deadline_us = now_us + c->p.timeout_us + (cmd->kind == C_READ ? cmd->arg : 0);
    *q->flight_end = cmd;
    q->flight_end = &cmd->next;
    c->stats.commands++;
    c->stats.command_bytes += cmd->bytes.len;
    return cmd;
}

static bool handle(struct fk_cluster *c, const struct fk_command *cmd, const struct fk_reply *r,
                   uint64_t now_us)
{
    switch ((enum command_kind)cmd->kind) {
    case C_BEAT:
        c->beating = false;
        beat_reply(c, cmd, r, now_us);
        return true;
    case C_TIME:
        time_reply(c, cmd, r, now_us);
        return true;
    case C_MEMBERS:
        members_reply(c, cmd, r, now_us);
        return true;
    case C_LEAVE:
        c->left = true;
        return true;
    case C_REAP:
    case C_WANT:
        if (r->type == FK_REPLY_ERROR)
            cluster_error(c, cmd, r, now_us);
        return true;
    case C_RECORDS:
        follow_records(c, cmd, r, now_us);
        return true;
    case C_HEAD_GET:
        sync_head(c, cmd, r, now_us);
        return true;
    case C_PIECE_GET:
        return sync_piece(c, cmd, r, now_us);
    case C_READ:
        return follow_read(c, r, now_us);
    default:
        publish_reply(c, cmd, r, now_us);
        return true;
    }
}

bool fk_cluster_reply(struct fk_cluster *c, enum fk_conn conn, const struct fk_reply *reply,
                      uint64_t now_us)
{
    struct command_queue *q = &c->q[conn];
    struct fk_command *cmd = q->flight;

    if (!cmd)                           /* an answer that nobody asked for */
        return q->bad = true;
    if (!handle(c, cmd, reply, now_us)) {
        cmd->deadline_us = now_us + c->p.timeout_us;
        return false;
    }
    memset(&c->at[conn], 0, sizeof(c->at[conn]));
    q->flight = cmd->next;
    if (!q->flight)
        q->flight_end = &q->flight;
    free_command(c, cmd);
    pump(c, now_us);
    return true;
}

bool fk_cluster_conn_bad(const struct fk_cluster *c, enum fk_conn conn)
{
    return c->q[conn].bad;
}

void fk_cluster_tick(struct fk_cluster *c, uint64_t now_us)
{
    for (int i = 0; i < FK_CONNS; i++) {
        struct command_queue *q = &c->q[i];
        if (q->flight && now_us >= q->flight->deadline_us)
            q->bad = true;
    }
    if (now_us >= c->peers_due_us)
        follow_peers_tick(c, now_us);
    if (fk_remote_sweep(c->remote, 4096))
        c->peers_due_us = fk_min(c->peers_due_us, now_us + MS);
    pump(c, now_us);
}

uint64_t fk_cluster_next_wakeup(const struct fk_cluster *c)
{
    uint64_t at = c->peers_due_us;

    for (int i = 0; i < FK_CONNS; i++)
        if (c->q[i].flight)
            at = fk_min(at, c->q[i].flight->deadline_us);
    if (c->q[FK_CONN_COMMAND].up) {
        if (!c->beating && !c->p.watch && !c->leaving && c->redis_ms)
            at = fk_min(at, c->beat_due_us);
        if (!c->polling)
            at = fk_min(at, fk_max(c->poll_due_us, c->hold_until_us));
        at = fk_min(at, fk_max(publish_wakeup(c), c->hold_until_us));
    }
    const struct command_queue *reader = &c->q[FK_CONN_READER];
    if (reader->up && c->control_ms && !reader->flight && !reader->todo)
        at = fk_min(at, fk_max(c->next_read_us, c->hold_until_us));
    return at;
}

void fk_cluster_get_stats(const struct fk_cluster *c, struct fk_cluster_stats *out)
{
    *out = c->stats;
    out->pending = c->pending.len + c->batch_changes;
    out->peers = c->n_peers;
    for (uint32_t i = 0; i < c->n_peers; i++)
        out->peers_synced += c->peers[i]->state == P_STREAM;
    fk_remote_get_stats(c->remote, &out->remote);
}

const struct fk_remote *fk_cluster_remote(const struct fk_cluster *c)
{
    return c->remote;
}
