/*
 * csim.c - the world of the cluster simulator, its faults, and the rules that it checks:
 *
 *   names       a look-up never names (node, epoch, slot, generation) that the owner would accept with other
 *               bytes in the slot, nor a block of another space
 *   leases      nobody names a node more than TTL + 1 s after it died, hung or was replaced
 *   one self    of two processes with one name, one at most is a member once all is quiet
 *   truth       once all is quiet, everybody knows exactly what everybody else holds
 *   bounds      pending changes, streams; every key of ours has a TTL, keys of others are never touched
 *
 * usage: csim [--seeds A..B] [--steps N] [--twice]
 */
#include <inttypes.h>

#include "base/log.h"
#include "csim.h"

#define MAX_PROCS 12u
#define NAMES 5u
#define KEYS 96u
#define SLOTS 24u
#define SPACES 2u
#define TTL_US UINT64_C(3000000)
#define SLACK_US UINT64_C(1000000)
#define MAX_PENDING 300u
#define QUIET_US UINT64_C(20000000)
#define BASE_MS INT64_C(1700000000000)

static const char *const names[NAMES] = { "a", "b", "node-c", "node-cc", "e" };

struct conn {
    bool up;
    uint64_t gen, retry_us, last_us[2];
};

struct block { bool used; uint32_t key; uint8_t space; uint32_t generation; };

struct proc {
    struct fk_cluster *c;
    uint32_t name;
    bool alive, paused;
    uint64_t paused_us, epoch;          /* epoch: last seen */
    int64_t drift_ppm, offset_us;
    struct conn conn[FK_CONNS];
    struct block block[2][SLOTS];
    uint8_t space[SPACES];              /* its numbers */
};

struct msg {
    uint64_t at_us, seq, gen, until_us, seen;
    uint32_t proc, conn;
    struct fk_command *cmd;             /* to Redis */
    struct fk_reply *reply;             /* or back */
    bool blocked;
};

struct grave { uint32_t name; uint64_t epoch, died_us; };

struct world {
    struct proc p[MAX_PROCS];
    struct sr *redis;
    bool redis_down, quiet;
    uint64_t frozen_until_us, cut_until_us[NAMES];
    int64_t redis_offset_ms, redis_ppm;
    FK_VEC(struct msg) net;
    FK_VEC(struct grave) graves;
    uint64_t now_us, rng, seq, generation;
    uint32_t stream_cap;
    const char *broken;
    char detail[256];
    uint64_t lookups, hits, snapshots, gaps, overflows, fenced, changes, digest;
};

static uint32_t roll(struct world *w, uint32_t n)
{
    return fk_rng_below(&w->rng, n);
}

static void fail(struct world *w, const char *rule, uint32_t a, uint32_t b, uint64_t x)
{
    if (!w->broken)
        snprintf(w->detail, sizeof(w->detail), "procs %u, %u, value %" PRIu64 " at %.3f s", a, b, x,
                 (double)w->now_us / 1e6);
    if (!w->broken)
        w->broken = rule;
}

/* ---- clocks ---- */

static uint64_t local(const struct proc *p, uint64_t us)
{
    return us + (uint64_t)((int64_t)us * p->drift_ppm / 1000000 + p->offset_us);
}

static uint64_t real(const struct proc *p, uint64_t us)
{
    int64_t x = (int64_t)us - p->offset_us;

    return us >= UINT64_MAX / 2 ? UINT64_MAX : x < 0 ? 0 : (uint64_t)(x - x * p->drift_ppm / 1000000 + 1);
}

static int64_t redis_ms(const struct world *w)
{
    int64_t us = (int64_t)w->now_us;

    return BASE_MS + (us + us * w->redis_ppm / 1000000) / 1000 + w->redis_offset_ms;
}

/* ---- blocks ---- */

static struct fk_key key_of(uint32_t n)
{
    uint64_t seed = n + 1;
    struct fk_key k;

    k.lo = fk_rng_next(&seed);
    k.hi = fk_rng_next(&seed);
    return k;
}

static struct fk_change change_of(const struct proc *p, unsigned tier, uint32_t slot, bool removed)
{
    const struct block *b = &p->block[tier][slot];

    return (struct fk_change){ .key = key_of(b->key), .slot = slot, .generation = b->generation,
                               .tier = (uint8_t)tier, .space = p->space[b->space], .removed = removed };
}

static void evict(struct world *w, struct proc *p, unsigned tier, uint32_t slot)
{
    struct fk_change c = change_of(p, tier, slot, true);

    if (!p->block[tier][slot].used)
        return;
    p->block[tier][slot].used = false;
    w->changes++;
    fk_cluster_change(p->c, &c, 1, local(p, w->now_us));
}

static void put(struct world *w, struct proc *p)
{
    unsigned tier = roll(w, 2);
    uint32_t slot = roll(w, SLOTS), key = roll(w, KEYS);
    uint8_t space = (uint8_t)roll(w, SPACES);

    for (uint32_t i = 0; i < SLOTS; i++) {
        const struct block *b = &p->block[tier][i];
        if (b->used && b->key == key && b->space == space && roll(w, 4) == 0)
            evict(w, p, tier, i);       /* or it moves to another slot: only the new place is told */
        else if (b->used && b->key == key && b->space == space)
            p->block[tier][i].used = false;
    }
    evict(w, p, tier, slot);
    p->block[tier][slot] = (struct block){ true, key, space, (uint32_t)(w->generation += 2) };
    struct fk_change c = change_of(p, tier, slot, false);
    w->changes++;
    fk_cluster_change(p->c, &c, 1, local(p, w->now_us));
}

static void give_scan(struct world *w, struct proc *p)
{
    struct fk_change list[8];
    uint64_t cursor;
    uint32_t max, n = 0;

    if (!fk_cluster_scan_wanted(p->c, &cursor, &max))
        return;
    for (uint32_t looked = 0; looked < 8 && cursor < 2 * SLOTS && n < fk_min(max, 8u); looked++, cursor++)
        if (p->block[cursor / SLOTS][cursor % SLOTS].used)
            list[n++] = change_of(p, (unsigned)(cursor / SLOTS), (uint32_t)(cursor % SLOTS), false);
    fk_cluster_scan_give(p->c, list, n, cursor, cursor >= 2 * SLOTS, local(p, w->now_us));
}

/* ---- network ---- */

static void free_cmd(struct fk_command *cmd)
{
    if (cmd) {
        fk_vec_free(&cmd->bytes);
        fk_vec_free(&cmd->ends);
        free(cmd);
    }
}

static struct fk_command *copy_cmd(const struct fk_command *from)
{
    struct fk_command *c = calloc(1, sizeof(*c));

    if (!c)
        abort();
    fk_bytes_add(&c->bytes, from->bytes.data, from->bytes.len);
    for (size_t i = 0; i < from->ends.len; i++)
        (void)fk_vec_push(&c->ends, from->ends.data[i]);
    return c;
}

static uint64_t latency(struct world *w)
{
    return w->quiet || roll(w, 50) ? 100 + roll(w, 2000) : 20000 + roll(w, 200000);
}

/* Later than whatever went the same way before. */
static void post(struct world *w, uint32_t i, uint32_t k, struct fk_command *cmd, struct fk_reply *reply)
{
    struct conn *c = &w->p[i].conn[k];
    int way = reply != NULL;
    uint64_t at = fk_max(w->now_us + latency(w), w->cut_until_us[w->p[i].name]);

    at = fk_max(at, c->last_us[way]);
    c->last_us[way] = at;
    struct msg m = { .at_us = at, .seq = w->seq++, .gen = c->gen, .proc = i, .conn = k, .cmd = cmd,
                     .reply = reply };
    (void)fk_vec_push(&w->net, m);
}

static void close_conn(struct world *w, uint32_t i, uint32_t k)
{
    struct proc *p = &w->p[i];
    struct conn *c = &p->conn[k];

    for (size_t m = 0; m < w->net.len; m++)     /* what is under way may arrive, or not */
        if (w->net.data[m].proc == i && w->net.data[m].conn == k && w->net.data[m].cmd && roll(w, 2))
            w->net.data[m].at_us = UINT64_MAX;
    c->up = false;
    c->gen++;
    c->last_us[0] = c->last_us[1] = 0;
    c->retry_us = w->now_us + 50000 + roll(w, 300000);
    fk_cluster_connected(p->c, (enum fk_conn)k, false, local(p, w->now_us));
}

static void open_conn(struct world *w, uint32_t i, uint32_t k)
{
    struct proc *p = &w->p[i];
    struct conn *c = &p->conn[k];

    c->retry_us = w->now_us + 50000 + roll(w, 300000);
    if (w->redis_down || w->frozen_until_us > w->now_us || w->cut_until_us[p->name] > w->now_us)
        return;
    c->up = true;
    c->gen++;
    fk_cluster_connected(p->c, (enum fk_conn)k, true, local(p, w->now_us));
}

/* Whatever the process wants to do now. */
static void serve(struct world *w, uint32_t i)
{
    struct proc *p = &w->p[i];
    const struct fk_command *cmd;

    give_scan(w, p);
    for (uint32_t k = 0; k < FK_CONNS; k++) {
        while (p->conn[k].up && (cmd = fk_cluster_take(p->c, (enum fk_conn)k, local(p, w->now_us))))
            post(w, i, k, copy_cmd(cmd), NULL);
        if (p->conn[k].up && fk_cluster_conn_bad(p->c, (enum fk_conn)k))
            close_conn(w, i, k);
    }
    uint64_t epoch = fk_cluster_epoch(p->c);
    if (epoch != p->epoch) {
        struct grave g = { p->name, p->epoch, w->now_us };
        if (p->epoch)
            (void)fk_vec_push(&w->graves, g);
        p->epoch = epoch;
    }
}

static void arrive(struct world *w, struct msg *m)
{
    struct proc *p = &w->p[m->proc];
    bool last = m->blocked && w->now_us >= m->until_us;

    if (w->redis_down) {
        free_cmd(m->cmd);
        if (p->alive && p->conn[m->conn].up && p->conn[m->conn].gen == m->gen)
            close_conn(w, m->proc, m->conn);
        return;
    }
    struct fk_reply *reply = sr_do(w->redis, m->cmd, redis_ms(w), last);
    if (!reply) {
        struct msg again = *m;
        again.until_us = m->blocked ? m->until_us : w->now_us + sr_block_ms(m->cmd) * UINT64_C(1000);
        again.blocked = true;
        again.seen = sr_changes(w->redis);
        again.at_us = again.until_us;
        (void)fk_vec_push(&w->net, again);
        return;
    }
    free_cmd(m->cmd);
    if (p->alive && p->conn[m->conn].up && p->conn[m->conn].gen == m->gen)
        post(w, m->proc, m->conn, NULL, reply);
    else
        sr_reply_free(reply);
}

static void deliver(struct world *w, struct msg *m)
{
    struct proc *p = &w->p[m->proc];

    if (m->cmd) {
        arrive(w, m);
        return;
    }
    if (p->alive && p->conn[m->conn].up && p->conn[m->conn].gen == m->gen)
        while (!fk_cluster_reply(p->c, (enum fk_conn)m->conn, m->reply, local(p, w->now_us)))
            ;
    sr_reply_free(m->reply);
    if (p->alive)
        serve(w, m->proc);
}

/* ---- processes ---- */

static void start(struct world *w, uint32_t name)
{
    uint8_t fingerprint[SPACES][16] = { { 1 }, { 2 } };
    uint32_t i = 0;

    while (i < MAX_PROCS && w->p[i].alive)
        i++;
    if (i == MAX_PROCS)
        return;
    struct proc *p = &w->p[i];
    uint64_t gen = p->conn[0].gen + p->conn[1].gen + 100;
    *p = (struct proc){ .name = name, .alive = true, .drift_ppm = (int64_t)roll(w, 10000) - 5000,
                        .offset_us = (int64_t)roll(w, 1000000) * 1000 };
    struct fk_cluster_params cp = {
        .cluster = "sim", .name = names[name], .ttl_us = TTL_US, .flush_us = 1000 + roll(w, 4000),
        .timeout_us = 500000, .stream_batches = w->stream_cap, .max_pending = MAX_PENDING,
        .piece_changes = 1 + roll(w, 20),
        .seed = fk_rng_next(&w->rng), .zone = roll(w, 2) ? "z" : "",
    };
    if (fk_cluster_create(&cp, local(p, w->now_us), &p->c))
        abort();
    uint32_t first = roll(w, SPACES);
    for (uint32_t s = 0; s < SPACES; s++) {
        uint32_t which = (first + s) % SPACES;
        fk_cluster_space(p->c, fingerprint[which], 4096, &p->space[which]);
    }
    for (uint32_t k = 0; k < FK_CONNS; k++)
        p->conn[k] = (struct conn){ .gen = gen, .retry_us = w->now_us + roll(w, 20000) };
    for (uint32_t n = roll(w, 30); n > 0; n--)      /* what it finds on its SSDs */
        put(w, p);
}

static void stop(struct world *w, uint32_t i)
{
    struct proc *p = &w->p[i];
    struct fk_cluster_stats s;

    fk_cluster_get_stats(p->c, &s);
    w->gaps += s.gaps;
    w->snapshots += s.snapshots_read;
    w->overflows += s.overflows;
    w->fenced += s.fenced;
    w->digest = w->digest * 31 + s.changes_seen + s.commands;
    struct grave g = { p->name, p->epoch, p->paused ? p->paused_us : w->now_us };
    if (p->epoch)
        (void)fk_vec_push(&w->graves, g);
    fk_cluster_destroy(p->c);
    p->c = NULL;
    p->alive = false;
    for (uint32_t k = 0; k < FK_CONNS; k++)
        p->conn[k].gen++;
}

/* ---- the rules ---- */

static void check_silent(struct world *w, uint32_t i, uint32_t owner, uint64_t since)
{
    if (w->now_us > since + TTL_US + TTL_US / 50 + SLACK_US)
        fail(w, "leases: a node that is gone is named", i, owner, since);
}

static void check_hit(struct world *w, uint32_t i, uint32_t key, uint8_t space,
                      const struct fk_remote_hit *hit)
{
    struct fk_cluster_peer peer;

    if (!fk_cluster_peer(w->p[i].c, hit->node, local(&w->p[i], w->now_us), &peer)) {
        fail(w, "names: a node that nobody knows", i, 0, hit->node);
        return;
    }
    for (uint32_t o = 0; o < MAX_PROCS; o++) {
        struct proc *p = &w->p[o];
        if (!p->alive || p->epoch != peer.epoch || strcmp(names[p->name], peer.record->name) != 0)
            continue;
        const struct block *b = &p->block[hit->tier][hit->slot % SLOTS];
        bool accepts = b->used && b->generation == hit->generation;
        if (accepts && (b->key != key || b->space != space || p->space[b->space] != hit->space))
            fail(w, "names: the owner would hand over another block", i, o, key);
        if (hit->space != p->space[space])
            fail(w, "names: another space", i, o, key);
        if (p->paused)
            check_silent(w, i, o, p->paused_us);
        return;
    }
    for (size_t g = 0; g < w->graves.len; g++) {
        const struct grave *x = &w->graves.data[g];
        if (x->epoch == peer.epoch && strcmp(names[x->name], peer.record->name) == 0) {
            check_silent(w, i, 99, x->died_us);
            return;
        }
    }
    fail(w, "names: an epoch that nobody had", i, 0, peer.epoch);
}

static void look(struct world *w, uint32_t i)
{
    struct proc *p = &w->p[i];
    uint8_t space = (uint8_t)roll(w, SPACES);
    struct fk_remote_hit hits[8];
    struct fk_key keys[8];
    uint32_t first = roll(w, KEYS);

    for (uint32_t k = 0; k < 8; k++)
        keys[k] = key_of((first + k) % KEYS);
    uint32_t n = fk_cluster_extend(p->c, p->space[space], keys, 8, 0, NULL, local(p, w->now_us), hits);
    w->lookups++;
    w->hits += n;
    for (uint32_t k = 0; k < n; k++)
        check_hit(w, i, (first + k) % KEYS, space, &hits[k]);
}

static void check_bounds(struct world *w)
{
    const char *wrong = sr_check(w->redis, redis_ms(w));

    if (wrong)
        fail(w, wrong, 0, 0, 0);
    for (uint32_t i = 0; i < MAX_PROCS; i++) {
        struct fk_cluster_stats s;
        if (!w->p[i].alive)
            continue;
        fk_cluster_get_stats(w->p[i].c, &s);
        if (s.pending > MAX_PENDING)
            fail(w, "bounds: pending changes", i, 0, s.pending);
        if (s.remote.holders > NAMES * 2 * SLOTS + 100)
            fail(w, "bounds: remote index", i, 0, s.remote.holders);
    }
}

static void compare(struct world *w, uint32_t i, uint32_t o)
{
    struct fk_cluster_peer peers[NAMES + 2];
    struct proc *a = &w->p[i], *b = &w->p[o];
    uint32_t n = fk_cluster_peers(a->c, local(a, w->now_us), peers, NAMES + 2), k = 0, count[2] = { 0 };

    while (k < n && strcmp(peers[k].record->name, names[b->name]) != 0)
        k++;
    if (k == n || peers[k].epoch != b->epoch || peers[k].lease_us <= 0) {
        fail(w, "truth: a member is not known", i, o, k < n ? peers[k].epoch : 0);
        return;
    }
    for (unsigned t = 0; t < 2; t++) {
        for (uint32_t s = 0; s < SLOTS; s++) {
            const struct block *x = &b->block[t][s];
            uint32_t slot, generation;
            count[t] += x->used;
            if (x->used && (!fk_remote_holds(fk_cluster_remote(a->c), peers[k].node, b->space[x->space],
                                             key_of(x->key), t, &slot, &generation) ||
                            slot != s || generation != x->generation))
                fail(w, "truth: a block is not known as it is", i, o, x->key);
        }
        if (peers[k].blocks[t] != count[t])
            fail(w, "truth: blocks are known that are not there", i, o, peers[k].blocks[t]);
    }
}

static void check_quiet(struct world *w)
{
    uint32_t selves[NAMES] = { 0 };

    for (uint32_t i = 0; i < MAX_PROCS; i++)
        if (w->p[i].alive)
            selves[w->p[i].name] += w->p[i].epoch != 0;
    for (uint32_t i = 0; i < MAX_PROCS; i++) {
        struct proc *a = &w->p[i];
        if (!a->alive)
            continue;
        if (selves[a->name] != 1)
            fail(w, "one self: not one member of a name", i, 0, selves[a->name]);
        const char *wrong = fk_remote_check(fk_cluster_remote(a->c));
        if (wrong)
            fail(w, wrong, i, 0, 0);
        for (uint32_t o = 0; o < MAX_PROCS && a->epoch; o++)
            if (w->p[o].alive && w->p[o].epoch && w->p[o].name != a->name)
                compare(w, i, o);
    }
}

/* ---- time ---- */

static uint64_t due(struct world *w, const struct msg *m)
{
    if (m->cmd && w->frozen_until_us > m->at_us)
        return m->at_us == UINT64_MAX ? UINT64_MAX : w->frozen_until_us;
    return m->blocked && sr_changes(w->redis) != m->seen ? w->now_us : m->at_us;
}

static size_t first_msg(struct world *w, uint64_t *at)
{
    size_t best = SIZE_MAX;

    *at = UINT64_MAX;
    for (size_t i = 0; i < w->net.len; i++) {
        const struct msg *m = &w->net.data[i];
        uint64_t when = due(w, m);
        if (m->at_us == UINT64_MAX && !m->blocked) {        /* lost */
            free_cmd(m->cmd);
            sr_reply_free(m->reply);
            w->net.data[i--] = w->net.data[--w->net.len];
            best = SIZE_MAX;
            *at = UINT64_MAX;
            i = SIZE_MAX;
            continue;
        }
        if (best == SIZE_MAX || when < *at || (when == *at && m->seq < w->net.data[best].seq)) {
            best = i;
            *at = when;
        }
    }
    return best;
}

static uint64_t first_wakeup(struct world *w, uint32_t *who)
{
    uint64_t at = UINT64_MAX;

    for (uint32_t i = 0; i < MAX_PROCS; i++) {
        struct proc *p = &w->p[i];
        if (!p->alive || p->paused)
            continue;
        uint64_t t = real(p, fk_cluster_next_wakeup(p->c));
        for (uint32_t k = 0; k < FK_CONNS; k++)
            if (!p->conn[k].up)
                t = fk_min(t, p->conn[k].retry_us);
        if (t < at) {
            at = t;
            *who = i;
        }
    }
    return at;
}

static void run_until(struct world *w, uint64_t end)
{
    while (!w->broken) {
        uint64_t at_msg, at_proc;
        uint32_t who = 0;
        size_t m = first_msg(w, &at_msg);
        at_proc = first_wakeup(w, &who);
        uint64_t at = fk_min(at_msg, at_proc);
        if (at > end)
            break;
        w->now_us = fk_max(w->now_us, at);
        if (at_msg <= at_proc) {
            struct msg msg = w->net.data[m];
            w->net.data[m] = w->net.data[--w->net.len];
            if (!msg.cmd && w->p[msg.proc].paused && w->p[msg.proc].conn[msg.conn].gen == msg.gen) {
                msg.at_us = w->now_us + 50000;          /* waits in its socket */
                (void)fk_vec_push(&w->net, msg);
            } else {
                deliver(w, &msg);
            }
            continue;
        }
        w->now_us++;
        for (uint32_t k = 0; k < FK_CONNS; k++)
            if (!w->p[who].conn[k].up && w->p[who].conn[k].retry_us <= w->now_us)
                open_conn(w, who, k);
        fk_cluster_tick(w->p[who].c, local(&w->p[who], w->now_us));
        serve(w, who);
    }
    w->now_us = fk_max(w->now_us, end);
}

/* ---- what happens ---- */

static uint32_t any_proc(struct world *w)
{
    uint32_t i = roll(w, MAX_PROCS);

    for (uint32_t k = 0; k < MAX_PROCS; k++, i = (i + 1) % MAX_PROCS)
        if (w->p[i].alive)
            return i;
    return MAX_PROCS;
}

static bool has_runner(const struct world *w, uint32_t name)
{
    for (uint32_t i = 0; i < MAX_PROCS; i++)
        if (w->p[i].alive && !w->p[i].paused && w->p[i].name == name)
            return true;
    return false;
}

static void redis_fault(struct world *w)
{
    switch (roll(w, 8)) {
    case 0: w->redis_down = !w->redis_down; break;
    case 1: sr_flush(w->redis); break;
    case 2: sr_copy(w->redis); break;
    case 3:                             /* a replica takes over; its clock is another */
        sr_become_copy(w->redis);
        w->redis_offset_ms = (int64_t)roll(w, 600) - 300;
        break;
    case 4: w->frozen_until_us = w->now_us + roll(w, 3000000); break;
    case 5:
    case 6:
        for (uint32_t n = 1 + roll(w, 3); n > 0; n--)
            sr_evict(w->redis, fk_rng_next(&w->rng));
        return;
    default:
        if (w->redis_down && roll(w, 2))
            sr_flush(w->redis);
        w->redis_down = false;
    }
    for (uint32_t i = 0; i < MAX_PROCS; i++)    /* whoever fails over breaks connections */
        for (uint32_t k = 0; k < FK_CONNS; k++)
            if (w->p[i].alive && !w->p[i].paused && w->p[i].conn[k].up && roll(w, 2))
                close_conn(w, i, k);
}

/* It hangs, another one takes its place and dies, nothing of that one is left but the stream; it goes on. */
static void usurp(struct world *w, uint32_t i)
{
    uint32_t name = w->p[i].name;

    w->p[i].paused = true;
    w->p[i].paused_us = w->now_us;
    if (!has_runner(w, name))
        start(w, name);
    run_until(w, w->now_us + 100000 + roll(w, 1000000));
    for (uint32_t k = 0; k < MAX_PROCS; k++)
        if (w->p[k].alive && !w->p[k].paused && w->p[k].name == name)
            stop(w, k);
    sr_lose_record(w->redis, names[name]);
    w->p[i].paused = false;
}

static void node_fault(struct world *w)
{
    uint32_t i = any_proc(w), name = roll(w, NAMES);

    if (i == MAX_PROCS)
        return;
    struct proc *p = &w->p[i];
    switch (roll(w, 8)) {
    case 0: stop(w, i); break;
    case 6: if (!p->paused) usurp(w, i); break;
    case 1: p->paused_us = p->paused ? p->paused_us : w->now_us; p->paused = true; break;
    case 2: p->paused = false; break;
    case 3: w->cut_until_us[p->name] = w->now_us + roll(w, 6000000); break;
    case 4: if (!p->paused) close_conn(w, i, roll(w, FK_CONNS)); break;
    case 5:
        if (!p->paused) {
            for (uint32_t n = 0; n < MAX_PENDING + 50; n++)
                put(w, p);
            serve(w, i);
        }
        break;
    default:
        if (!has_runner(w, name))
            start(w, name);
    }
}

static void action(struct world *w)
{
    uint32_t i = any_proc(w), what = roll(w, 1000);

    if (what < 4)
        redis_fault(w);
    else if (what < 24)
        node_fault(w);
    if (i == MAX_PROCS || (i = any_proc(w)) == MAX_PROCS) {
        start(w, roll(w, NAMES));
        return;
    }
    struct proc *p = &w->p[i];
    if (p->paused)
        return;
    if (what % 2)
        for (uint32_t n = 1 + roll(w, 4); n > 0; n--)
            put(w, p);
    else if (what % 3 == 0)
        evict(w, p, roll(w, 2), roll(w, SLOTS));
    look(w, i);
    serve(w, i);
}

/* Everything is well again, and nobody changes anything. */
static void calm(struct world *w)
{
    w->quiet = true;
    w->redis_down = false;
    w->frozen_until_us = 0;
    memset(w->cut_until_us, 0, sizeof(w->cut_until_us));
    for (uint32_t i = 0; i < MAX_PROCS; i++)
        w->p[i].paused = false;
    for (uint64_t end = w->now_us + QUIET_US; w->now_us < end && !w->broken;) {
        run_until(w, w->now_us + 100000);
        uint32_t i = any_proc(w);
        if (i < MAX_PROCS)
            look(w, i);
        check_bounds(w);
    }
    if (!w->broken)
        check_quiet(w);
    w->quiet = false;
}

static struct world *play(uint64_t seed, uint32_t steps)
{
    static const uint32_t caps[] = { 3, 8, 40, 200 };
    struct world *w = calloc(1, sizeof(*w));

    if (!w)
        abort();
    w->rng = seed * 0x9e3779b97f4a7c15u + 1;
    w->redis = sr_new();
    w->redis_ppm = (int64_t)roll(w, 10000) - 5000;
    w->stream_cap = caps[roll(w, 4)];
    for (uint32_t n = 2 + roll(w, NAMES - 1), i = 0; i < n; i++)
        start(w, i);
    for (uint32_t s = 0; s < steps && !w->broken; s++) {
        run_until(w, w->now_us + 1 + roll(w, 20000));
        action(w);
        if (s % 16 == 0)
            check_bounds(w);
        if (s % 1000 == 999 || s + 1 == steps)
            calm(w);
    }
    return w;
}

static void end(struct world *w)
{
    for (uint32_t i = 0; i < MAX_PROCS; i++)
        if (w->p[i].alive)
            stop(w, i);
    for (size_t i = 0; i < w->net.len; i++) {
        free_cmd(w->net.data[i].cmd);
        sr_reply_free(w->net.data[i].reply);
    }
    fk_vec_free(&w->net);
    fk_vec_free(&w->graves);
    sr_free(w->redis);
    free(w);
}

int main(int argc, char **argv)
{
    uint64_t first = 1, last = 20, total = 0, lookups = 0, hits = 0, gaps = 0, snapshots = 0, fences = 0,
             overflows = 0, changes = 0;
    uint32_t steps = 2000, rc = 0;
    bool twice = false;

    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--seeds") == 0 && i + 1 < argc)
            sscanf(argv[++i], "%" SCNu64 "..%" SCNu64, &first, &last);
        else if (strcmp(argv[i], "--steps") == 0 && i + 1 < argc)
            steps = (uint32_t)strtoul(argv[++i], NULL, 10);
        else if (strcmp(argv[i], "--twice") == 0)
            twice = true;
    }
    fk_log_set_level(getenv("CSIM_LOG") ? FK_LOG_INFO : FK_LOG_OFF);
    for (uint64_t seed = first; seed <= last && !rc; seed++) {
        struct world *w = play(seed, steps), *again = twice ? play(seed, steps) : NULL;
        if (w->broken) {
            printf("csim: FAIL seed %" PRIu64 ": %s (%s)\n", seed, w->broken, w->detail);
            rc = 1;
        }
        if (again && (again->digest != w->digest || again->now_us != w->now_us ||
                      again->hits != w->hits)) {
            printf("csim: FAIL seed %" PRIu64 ": two runs differ\n", seed);
            rc = 1;
        }
        if (again)
            end(again);
        for (uint32_t i = 0; i < MAX_PROCS; i++)
            if (w->p[i].alive)
                stop(w, i);
        total += steps;
        lookups += w->lookups;
        hits += w->hits;
        gaps += w->gaps;
        snapshots += w->snapshots;
        fences += w->fenced;
        overflows += w->overflows;
        changes += w->changes;
        end(w);
    }
    printf("csim: %" PRIu64 " steps, %" PRIu64 " changes, %" PRIu64 " look-ups with %" PRIu64 " hits, %" PRIu64
           " gaps, %" PRIu64 " snapshots, %" PRIu64 " overflows, %" PRIu64 " times fenced\n", total, changes,
           lookups, hits, gaps, snapshots, overflows, fences);
    return (int)rc;
}
