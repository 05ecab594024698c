/*
 * follow.c - the others: who is a member, and what changed there. One XREAD on all their streams, one
 * at a time; a gap in a stream's numbers leads to a snapshot (sync.c). See cluster.h; under its lock.
 */
#include <inttypes.h>
#include <stdio.h>

#include "cluster/cluster_impl.h"

#define READ_BLOCK_MS 2000u             /* how long XREAD waits when all is well */
#define READ_SOON_MS 50u                /* ... and when a peer will be followed soon */
#define READ_COUNT 32u                  /* batches of each stream in one answer */
#define READ_PAUSE_US 1000u             /* between answers, so that one carries several batches */
/* An XREAD costs Redis about 0.75 us a stream; n nodes read n streams each. Thus a third of a processor. */
#define READ_PAUSE_PAIR_US UINT64_C(2)
#define REFRESH 64u                     /* records read again per poll */
#define REAP_MAX 64u
#define NEAR_US 60u                     /* first guess at a read's cost: same zone, another, from an SSD */
#define FAR_US 200u
#define SSD_US 300u

/* ---- the table of peers, sorted by name ---- */

static uint32_t place_of(const struct fk_cluster *c, const char *name, size_t len, bool *found)
{
    uint32_t lo = 0, hi = c->n_peers;

    *found = false;
    while (lo < hi) {
        uint32_t mid = (lo + hi) / 2;
        const char *other = c->peers[mid]->name;
        int cmp = strncmp(other, name, len);
        cmp = cmp ? cmp : other[len] != '\0';
        if (cmp == 0) {
            *found = true;
            return mid;
        }
        *(cmp < 0 ? &lo : &hi) = cmp < 0 ? mid + 1 : mid;
    }
    return lo;
}

static struct peer *find_peer(const struct fk_cluster *c, const char *name, size_t len)
{
    bool found;
    uint32_t at = len < FK_CLUSTER_NAME_MAX ? place_of(c, name, len, &found) : (found = false);

    return found ? c->peers[at] : NULL;
}

static struct peer *add_peer(struct fk_cluster *c, const char *name, size_t len, uint64_t epoch)
{
    bool found;
    uint32_t at = place_of(c, name, len, &found);
    struct peer *p = calloc(1, sizeof(*p));

    if (!p)
        return NULL;
    if (c->n_peers == c->peers_cap) {
        uint32_t cap = c->peers_cap ? 2 * c->peers_cap : 16;
        void *more = realloc(c->peers, cap * sizeof(p));
        if (!more) {
            free(p);
            return NULL;
        }
        c->peers = more;
        c->peers_cap = cap;
    }
    c->peers_due_us = 0;                /* its lease will end some time */
    p->node = fk_remote_node_add(c->remote);
    if (p->node == FK_REMOTE_NO_NODE) {
        free(p);
        return NULL;
    }
    memcpy(p->name, name, len);
    p->epoch = epoch;
    memmove(c->peers + at + 1, c->peers + at, (c->n_peers - at) * sizeof(p));
    c->peers[at] = p;
    c->n_peers++;
    c->by_node[p->node] = p;
    return p;
}

static bool is_syncing(const struct peer *p)
{
    return p->state == P_WAIT || p->state == P_HEAD || p->state == P_LOAD;
}

static void drop_peer(struct fk_cluster *c, struct peer *p)
{
    bool found;
    uint32_t at = place_of(c, p->name, strlen(p->name), &found);

    c->syncing -= is_syncing(p);
    c->by_node[p->node] = NULL;
    fk_remote_node_drop(c->remote, p->node);
    c->n_peers--;
    memmove(c->peers + at, c->peers + at + 1, (c->n_peers - at) * sizeof(p));
    free(p);
}

void follow_fini(struct fk_cluster *c)
{
    for (uint32_t i = 0; i < c->n_peers; i++)
        free(c->peers[i]);
    free(c->peers);
}

/* ---- leases, costs, spaces: what look-ups go by ---- */

static void set_lease(struct fk_cluster *c, struct peer *p, uint64_t now_us)
{
    bool usable = p->state != P_RECORD && now_us >= p->refused_us;

    fk_remote_node_lease(c->remote, p->node, usable ? p->lease_us : 0);
}

static void set_cost(struct fk_cluster *c, struct peer *p)
{
    bool near = *c->record.zone && strcmp(c->record.zone, p->record.zone) == 0;
    uint32_t guess = near ? NEAR_US : FAR_US, cost[2];
    uint64_t jitter = (p->node * UINT64_C(0x9e3779b97f4a7c15) ^ c->p.seed) >> 60;

    for (int t = 0; t < 2; t++) {       /* equals are told apart differently by each reader */
        uint64_t us = p->cost[t] ? p->cost[t] : guess + (t ? SSD_US : 0);
        us = us * (1000 + 2 * p->record.load) / 1000 * (64 + jitter) / 64;
        cost[t] = (uint32_t)fk_min(us, (uint64_t)UINT32_MAX);
    }
    fk_remote_node_cost(c->remote, p->node, cost);
}

static void set_spaces(struct fk_cluster *c, struct peer *p)
{
    uint8_t ours[FK_CLUSTER_SPACES];

    memset(ours, 0xff, sizeof(ours));
    for (uint32_t i = 0; i < p->record.n_spaces; i++)
        for (uint32_t k = 0; k < c->record.n_spaces; k++)
            if (memcmp(p->record.space[i].fingerprint, c->record.space[k].fingerprint, 16) == 0 &&
                p->record.space[i].block_bytes == c->record.space[k].block_bytes)
                ours[i] = (uint8_t)k;
    fk_remote_node_spaces(c->remote, p->node, ours);
}

void follow_spaces(struct fk_cluster *c)
{
    for (uint32_t i = 0; i < c->n_peers; i++)
        set_spaces(c, c->peers[i]);
}

/* ---- members ---- */

/* "NAME@EPOCH" */
static bool read_member(const struct fk_reply *r, size_t *name_len, uint64_t *epoch)
{
    const char *at = r->type == FK_REPLY_STRING ? memrchr(r->text, '@', r->bytes) : NULL;

    *name_len = at ? (size_t)(at - r->text) : 0;
    return at && *name_len > 0 && *name_len < FK_CLUSTER_NAME_MAX &&
           fk_number_read(at + 1, r->bytes - *name_len - 1, epoch) && *epoch > 0 &&
           *epoch <= FK_CLUSTER_EPOCH_MAX;
}

/*
 * The lease's end moves only when its score grew: that is a heartbeat. So neither a clock of Redis that
 * jumps nor a replica that lags makes the dead live longer.
 */
static void renew(struct fk_cluster *c, struct peer *p, uint64_t score, uint64_t now_us)
{
    uint64_t left = score > c->redis_ms ? score - c->redis_ms : 0;
    uint64_t ttl = p->record.ttl_ms ? p->record.ttl_ms : c->record.ttl_ms;
    bool grew = score > p->score;

    p->score = score;
    if (FK_BUG(109))
        p->lease_us = c->poll_sent_us + ttl * MS;
    else if (grew)
        p->lease_us = fk_max(p->lease_us, c->poll_sent_us + fk_min(left, ttl) * MS);
    set_lease(c, p, now_us);
}

static void see_member(struct fk_cluster *c, const char *name, size_t len, uint64_t epoch,
                       uint64_t score, uint64_t now_us)
{
    struct peer *p = find_peer(c, name, len);

    if (p && p->epoch < epoch && !FK_BUG(112)) {        /* its former self is gone for good */
        drop_peer(c, p);
        p = NULL;
    }
    if (p && p->epoch > epoch)          /* Redis has forgotten something */
        return;
    if (!p && score > c->redis_ms)
        p = add_peer(c, name, len, epoch);
    if (p)
        renew(c, p, score, now_us);
}

void follow_members(struct fk_cluster *c, const struct fk_reply *r, uint64_t now_us)
{
    const struct fk_reply *dead[REAP_MAX];
    uint32_t n_dead = 0;
    size_t len, own = strlen(c->record.name);

    for (size_t i = 0; i + 1 < r->n; i += 2) {
        const struct fk_reply *member = &r->item[i], *when = &r->item[i + 1];
        uint64_t epoch, score;
        if (!read_member(member, &len, &epoch) || when->type != FK_REPLY_STRING ||
            !fk_number_read(when->text, when->bytes, &score))
            continue;                   /* not of this protocol */
        c->epoch_floor = fk_max(c->epoch_floor, epoch);
        if (score + c->record.ttl_ms < c->redis_ms && n_dead < REAP_MAX)
            dead[n_dead++] = member;
        if (c->p.watch || len != own || memcmp(member->text, c->record.name, len) != 0)
            see_member(c, member->text, len, epoch, score, now_us);
    }
    if (n_dead && !c->p.watch)
        cluster_reap(c, dead, n_dead);
    follow_ask_records(c, now_us);
}

/* New ones, and a few of the others by turns: their load changes. */
void follow_ask_records(struct fk_cluster *c, uint64_t now_us)
{
    struct fk_command *cmd = NULL;
    uint32_t n = 0, first = c->n_peers ? c->refresh_at % c->n_peers : 0;

    for (uint32_t k = 0; k < c->n_peers && n < 2 * REFRESH; k++) {
        struct peer *p = c->peers[(first + k) % c->n_peers];
        if (p->state != P_RECORD && k >= REFRESH)
            continue;
        if (!cmd) {
            cmd = cluster_command(c, FK_CONN_COMMAND, C_RECORDS, 0);
            cluster_text(cmd, "MGET");
        }
        cluster_key(c, cmd, "node", p->name);
        n++;
    }
    c->refresh_at = first + REFRESH;
}

static const char *word(const struct fk_command *cmd, size_t i, size_t *len)
{
    uint32_t start = i ? cmd->ends.data[i - 1] : 0;

    *len = cmd->ends.data[i] - start;
    return cmd->bytes.data + start;
}

/* The peer whose record, head or piece the command's word i is about. */
static struct peer *peer_of_word(const struct fk_cluster *c, const struct fk_command *cmd, size_t i,
                                 const char *kind)
{
    size_t len, skip = strlen(c->prefix) + strlen(kind) + 1;
    const char *key = word(cmd, i, &len);

    return len > skip ? find_peer(c, key + skip, len - skip) : NULL;
}

struct peer *follow_peer_of(const struct fk_cluster *c, const struct fk_command *cmd)
{
    return cmd->arg < FK_REMOTE_NODES ? c->by_node[cmd->arg] : NULL;
}

static void see_record(struct fk_cluster *c, struct peer *p, const struct fk_reply *r, uint64_t now_us)
{
    struct fk_node_record rec;
    uint64_t epoch;
    int rc = fk_node_record_read(&rec, &epoch, r->text, r->bytes);

    if (rc || strcmp(rec.name, p->name) != 0) {
        if (!p->complained)
            fk_warn("cluster %s: the record of node \"%s\" %s; its blocks are not used", c->cluster,
                    p->name, rc == -EPROTO ? "is of another version" : "is damaged");
        p->complained = true;
        return;
    }
    if (epoch != p->epoch) {
        c->poll_due_us = epoch > p->epoch ? now_us : c->poll_due_us;
        return;
    }
    p->record = rec;
    if (p->state == P_RECORD)
        p->state = P_STREAM;
    p->lease_us = fk_min(p->lease_us, now_us + rec.ttl_ms * MS);
    set_spaces(c, p);
    set_cost(c, p);
    set_lease(c, p, now_us);
}

void follow_records(struct fk_cluster *c, const struct fk_command *cmd, const struct fk_reply *r,
                    uint64_t now_us)
{
    if (r->type != FK_REPLY_ARRAY || r->n + 1 != cmd->ends.len) {
        cluster_error(c, cmd, r, now_us);
        return;
    }
    for (size_t i = 0; i < r->n; i++) {
        struct peer *p = peer_of_word(c, cmd, i + 1, "node");
        if (p && r->item[i].type == FK_REPLY_STRING)
            see_record(c, p, &r->item[i], now_us);
    }
}

/* Now and then: leases that ended long ago, snapshots that wait. */
void follow_peers_tick(struct fk_cluster *c, uint64_t now_us)
{
    uint64_t next = now_us + 10 * SECOND;
    uint64_t hold = c->p.ttl_us;        /* Redis may be back soon, with the same epoch */

    for (uint32_t i = c->n_peers; i-- > 0;) {
        struct peer *p = c->peers[i];
        if (p->lease_us + hold <= now_us) {
            drop_peer(c, p);
            continue;
        }
        if (p->refused_us && now_us >= p->refused_us) {
            p->refused_us = 0;
            set_lease(c, p, now_us);
        }
        if (p->state >= P_GAP && c->q[FK_CONN_COMMAND].up && now_us >= c->hold_until_us)
            sync_step(c, p, now_us);
        next = fk_min(next, p->lease_us + hold);
        if (p->state == P_GAP && c->q[FK_CONN_COMMAND].up)
            next = fk_min(next, now_us + 20 * MS);      /* until it is its turn */
        if (p->state == P_WAIT && c->q[FK_CONN_COMMAND].up)
            next = fk_min(next, fk_max(p->next_try_us, c->hold_until_us));
        if (p->refused_us)
            next = fk_min(next, p->refused_us);
    }
    c->peers_due_us = next;
}

/* All that is known of it is invisible at once. false: not possible now, thousands are being swept. */
bool follow_forget(struct fk_cluster *c, struct peer *p, uint64_t now_us)
{
    uint16_t fresh = fk_remote_node_add(c->remote);

    if (fresh == FK_REMOTE_NO_NODE)
        return false;
    c->by_node[p->node] = NULL;
    fk_remote_node_drop(c->remote, p->node);
    p->node = fresh;
    c->by_node[fresh] = p;
    set_spaces(c, p);
    set_cost(c, p);
    set_lease(c, p, now_us);
    return true;
}

void follow_gap(struct fk_cluster *c, struct peer *p, uint64_t need, uint64_t now_us)
{
    c->stats.gaps++;
    c->syncing -= is_syncing(p);
    p->need = need;
    p->state = P_GAP;
    p->next_try_us = now_us;
    p->wait_us = 0;
    follow_forget(c, p, now_us);
    c->peers_due_us = fk_min(c->peers_due_us, now_us);
}

/* ---- streams ---- */

int follow_apply(struct fk_cluster *c, struct peer *p, struct fk_batch_reader *batch, uint32_t *budget)
{
    struct fk_change list[16];

    while (*budget > 0) {
        uint32_t n = 0;
        int rc = 1;
        while (n < fk_array_size(list) && (rc = fk_batch_next(batch, &list[n])) == 1)
            fk_remote_prefetch(c->remote, &list[n++]);
        for (uint32_t i = 0; i < n; i++)
            fk_remote_apply(c->remote, p->node, &list[i]);
        c->stats.changes_seen += n;
        *budget -= fk_min(*budget, n);
        if (rc != 1)
            return rc < 0 ? rc : 1;
    }
    return 0;
}

static void see_control(struct fk_cluster *c, const struct fk_reply *fields, uint64_t now_us)
{
    if (fields->type != FK_REPLY_ARRAY || fields->n != 2 || fields->item[0].type != FK_REPLY_STRING ||
        fields->item[1].type != FK_REPLY_STRING || fields->item[0].bytes != 1)
        return;
    const struct fk_reply *who = &fields->item[1];
    char what = fields->item[0].text[0];
    uint64_t epoch;
    size_t len;

    if (what == 'w') {
        if (who->bytes == strlen(c->record.name) && memcmp(who->text, c->record.name, who->bytes) == 0)
            publish_wanted(c);
    } else if (what == 'j') {           /* many may join at once: not a poll for each */
        c->poll_due_us = fk_min(c->poll_due_us, fk_max(now_us, c->polled_us + 20 * MS + c->n_peers * MS));
    } else if (what == 'l' && read_member(who, &len, &epoch)) {
        struct peer *p = find_peer(c, who->text, len);
        if (p && p->epoch == epoch)
            drop_peer(c, p);
    }
}

/* One entry of a peer's stream. 1: next; 0: budget used up; -1: no more of this stream. */
static int see_entry(struct fk_cluster *c, struct peer *p, const struct fk_reply *entry,
                     uint32_t *budget, uint64_t now_us)
{
    struct reply_place *at = &c->at[FK_CONN_READER];
    const struct fk_reply *id = &entry->item[0], *fields = &entry->item[1];
    uint64_t epoch, seq;

    if (!at->open) {
        if (!fk_id_read(id->text, id->bytes, &epoch, &seq))
            return -1;
        if (epoch > p->epoch)           /* a new self that is not known yet */
            c->poll_due_us = fk_min(c->poll_due_us, fk_max(now_us, c->polled_us + 20 * MS));
        if (epoch > p->epoch && !FK_BUG(112))
            return -1;
        if (epoch < p->epoch || seq <= p->cursor)
            return 1;
        if (seq != p->cursor + 1 && !FK_BUG(113)) {
            follow_gap(c, p, seq, now_us);
            return -1;
        }
        struct fk_batch_id bid = { p->name, FK_BUG(112) ? epoch : p->epoch, seq };
        int rc = fields->n == 2 && fields->item[1].type == FK_REPLY_STRING
            ? fk_batch_open(&at->batch, &bid, fields->item[1].text, fields->item[1].bytes) : -EBADMSG;
        if (rc) {
            c->stats.bad_batches++;
            if (!p->complained)
                fk_warn("cluster %s: a batch of node \"%s\" %s; taking its snapshot instead", c->cluster,
                        p->name, rc == -EPROTO ? "is of another version" : "is damaged");
            p->complained = true;
            follow_gap(c, p, seq + 1, now_us);
            return -1;
        }
        at->open = true;
        at->node = p->node;
    }
    if (at->node != p->node)            /* another one by now */
        return -1;
    int rc = follow_apply(c, p, &at->batch, budget);
    if (rc == 0)
        return 0;
    at->open = false;
    p->cursor++;
    if (FK_BUG(113))
        fk_id_read(id->text, id->bytes, &epoch, &p->cursor);
    c->stats.batches_seen++;
    if (rc < 0) {
        c->stats.bad_batches++;
        follow_gap(c, p, p->cursor + 1, now_us);
        return -1;
    }
    return 1;
}

static bool well_formed(const struct fk_reply *entry)
{
    return entry->type == FK_REPLY_ARRAY && entry->n == 2 && entry->item[0].type == FK_REPLY_STRING &&
           entry->item[1].type == FK_REPLY_ARRAY;
}

/* true: done with it; false: the budget is used up. */
static bool see_stream(struct fk_cluster *c, const struct fk_reply *s, uint32_t *budget, uint64_t now_us)
{
    struct reply_place *at = &c->at[FK_CONN_READER];
    size_t skip = strlen(c->prefix);

    if (s->type != FK_REPLY_ARRAY || s->n != 2 || s->item[0].type != FK_REPLY_STRING ||
        s->item[1].type != FK_REPLY_ARRAY || s->item[0].bytes <= skip)
        return true;
    const char *key = s->item[0].text + skip;
    size_t len = s->item[0].bytes - skip;
    bool control = len == 7 && memcmp(key, "control", 7) == 0;
    struct peer *p = !control && len > 6 ? find_peer(c, key + 6, len - 6) : NULL;   /* "delta:" */

    for (; at->entry < s->item[1].n; at->entry++) {
        const struct fk_reply *entry = &s->item[1].item[at->entry];
        if (!well_formed(entry))
            continue;
        if (control) {
            fk_id_read(entry->item[0].text, entry->item[0].bytes, &c->control_ms, &c->control_seq);
            see_control(c, &entry->item[1], now_us);
        } else {
            if (!p || p->state != P_STREAM)
                break;
            int rc = see_entry(c, p, entry, budget, now_us);
            if (rc == 0)
                return false;
            if (rc < 0)
                break;
        }
    }
    at->full = at->full || s->item[1].n >= READ_COUNT;
    at->entry = 0;
    at->open = false;
    return true;
}

bool follow_read(struct fk_cluster *c, const struct fk_reply *r, uint64_t now_us)
{
    struct reply_place *at = &c->at[FK_CONN_READER];
    uint64_t pause = READ_PAUSE_US + READ_PAUSE_PAIR_US * c->n_peers * c->n_peers;
    uint32_t budget = BUDGET;

    if (r->type == FK_REPLY_ERROR) {
        cluster_error(c, c->q[FK_CONN_READER].flight, r, now_us);
        c->next_read_us = now_us + SECOND;
        return true;
    }
    for (; r->type == FK_REPLY_ARRAY && at->stream < r->n; at->stream++)
        if (!see_stream(c, &r->item[at->stream], &budget, now_us))
            return false;
    c->next_read_us = now_us + (r->type == FK_REPLY_NIL || at->full ? 0 : pause);   /* full: there is more */
    return true;
}

static void read_id(struct fk_command *cmd, uint64_t major, uint64_t minor)
{
    char id[48];

    cluster_word(cmd, id, (size_t)snprintf(id, sizeof(id), "%" PRIu64 "-%" PRIu64, major, minor));
}

void follow_pump(struct fk_cluster *c, uint64_t now_us)
{
    struct command_queue *q = &c->q[FK_CONN_READER];
    bool soon = false;

    if (!q->up || q->flight || q->todo || !c->control_ms || now_us < c->next_read_us ||
        now_us < c->hold_until_us)
        return;
    for (uint32_t i = 0; i < c->n_peers; i++)
        soon = soon || c->peers[i]->state != P_STREAM;
    uint32_t block = soon || c->polling ? READ_SOON_MS : READ_BLOCK_MS;
    char text[16];
    struct fk_command *cmd = cluster_command(c, FK_CONN_READER, C_READ, block * MS);
    cluster_text(cmd, "XREAD");
    cluster_text(cmd, "COUNT");
    cluster_number(cmd, READ_COUNT);
    cluster_text(cmd, "BLOCK");
    snprintf(text, sizeof(text), "%u", block);
    cluster_text(cmd, text);
    cluster_text(cmd, "STREAMS");
    cluster_key(c, cmd, "control", "");
    for (uint32_t i = 0; i < c->n_peers; i++)
        if (c->peers[i]->state == P_STREAM)
            cluster_key(c, cmd, "delta", c->peers[i]->name);
    read_id(cmd, c->control_ms, c->control_seq);
    for (uint32_t i = 0; i < c->n_peers; i++)
        if (c->peers[i]->state == P_STREAM)
            read_id(cmd, c->peers[i]->epoch, c->peers[i]->cursor);
    c->stats.reads++;
}

/* What was under way is asked again. A batch half applied is applied again from its start. */
void follow_down(struct fk_cluster *c, enum fk_conn conn)
{
    if (conn == FK_CONN_READER) {
        c->next_read_us = 0;
        return;
    }
    for (uint32_t i = 0; i < c->n_peers; i++) {
        struct peer *p = c->peers[i];
        if (p->state == P_HEAD || p->state == P_LOAD) {
            p->state = P_WAIT;
            p->next_try_us = 0;
        }
    }
    c->peers_due_us = 0;
}

/* ---- for the node ---- */

uint32_t fk_cluster_extend(const struct fk_cluster *c, uint8_t space, const struct fk_key *keys,
                           uint32_t n, uint32_t known, const uint64_t *local, uint64_t now_us,
                           struct fk_remote_hit *hits)
{
    return fk_remote_extend(c->remote, space, keys, n, known, local, now_us, hits);
}

bool fk_cluster_find(const struct fk_cluster *c, uint8_t space, struct fk_key key, uint16_t prev,
                     uint64_t now_us, struct fk_remote_hit *out)
{
    return fk_remote_find(c->remote, space, key, prev, now_us, out);
}

void fk_cluster_not_there(struct fk_cluster *c, uint16_t node, uint64_t epoch, struct fk_key key,
                          const struct fk_remote_hit *hit)
{
    const struct peer *p = node < FK_REMOTE_NODES ? c->by_node[node] : NULL;
    struct fk_change gone = { .key = key, .tier = hit->tier, .space = hit->space, .removed = true };
    uint32_t slot, generation;

    if (p && p->epoch == epoch &&
        fk_remote_holds(c->remote, node, hit->space, key, hit->tier, &slot, &generation) &&
        ((slot == hit->slot && generation == hit->generation) || FK_BUG(216)))
        (void)fk_remote_apply(c->remote, node, &gone);
}

static void describe(const struct fk_cluster *c, const struct peer *p, uint64_t now_us,
                     struct fk_cluster_peer *out)
{
    *out = (struct fk_cluster_peer){
        .record = &p->record, .epoch = p->epoch, .lease_us = (int64_t)(p->lease_us - now_us),
        .node = p->node, .synced = p->state == P_STREAM, .cursor = p->cursor,
        .blocks = { fk_remote_node_blocks(c->remote, p->node, 0),
                    fk_remote_node_blocks(c->remote, p->node, 1) },
    };
}

bool fk_cluster_peer(const struct fk_cluster *c, uint16_t node, uint64_t now_us,
                     struct fk_cluster_peer *out)
{
    const struct peer *p = node < FK_REMOTE_NODES ? c->by_node[node] : NULL;

    if (!p)
        return false;
    describe(c, p, now_us, out);
    return true;
}

uint32_t fk_cluster_peers(const struct fk_cluster *c, uint64_t now_us, struct fk_cluster_peer *out,
                          uint32_t max)
{
    uint32_t n = 0;

    for (uint32_t i = 0; i < c->n_peers && n < max; i++)
        describe(c, c->peers[i], now_us, &out[n++]);
    return n;
}

void fk_cluster_read_done(struct fk_cluster *c, uint16_t node, unsigned tier, bool ok,
                          uint32_t us_per_block, uint64_t now_us)
{
    struct peer *p = node < FK_REMOTE_NODES ? c->by_node[node] : NULL;

    if (!p)
        return;
    if (ok) {
        p->refusals = 0;
        p->cost[tier] = p->cost[tier] ? (7 * p->cost[tier] + us_per_block) / 8 + 1 : us_per_block + 1;
        set_cost(c, p);
        return;
    }
    p->refusals = fk_min(p->refusals + 1, 6u);  /* 250 ms, 500 ms ... 8 s */
    p->refused_us = now_us + ((SECOND / 8) << p->refusals);
    set_lease(c, p, now_us);
    c->peers_due_us = fk_min(c->peers_due_us, p->refused_us);
}
