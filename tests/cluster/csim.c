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
 * Options and seeds: tests/simulator.
 */
#include <inttypes.h>

#include "csim_net.h"
#include "driver.h"

#define MAX_PROCS CS_CLIENTS
#define NAMES 5u
#define KEYS 96u
#define SLOTS 24u
#define SPACES 2u
#define TTL_US UINT64_C(3000000)
#define SLACK_US UINT64_C(1000000)
#define MAX_PENDING 300u
#define QUIET_US UINT64_C(20000000)

static const char *const names[NAMES] = { "a", "b", "node-c", "node-cc", "e" };

struct block { bool used; uint32_t key; uint8_t space; uint32_t generation; };

struct proc {                           /* with the client of the same number in net */
    uint32_t name;
    uint64_t paused_us, epoch;          /* epoch: last seen */
    struct block block[2][SLOTS];
    uint8_t space[SPACES];              /* its numbers */
};

struct grave { uint32_t name; uint64_t epoch, died_us; };

struct world {
    struct proc p[MAX_PROCS];
    struct cs_net net;
    uint64_t cut_until_us[NAMES];
    FK_VEC(struct grave) graves;
    uint64_t rng, generation;
    uint32_t stream_cap;
    uint64_t step, lookups, hits, snapshots, gaps, overflows, fenced, changes, digest;
};

static uint32_t roll(struct world *w, uint32_t n)
{
    return fk_rng_below(&w->rng, n);
}

static void __attribute__((noreturn)) fail(struct world *w, const char *rule, uint32_t a, uint32_t b, uint64_t x)
{
    char text[512];

    snprintf(text, sizeof(text), "%s (procs %u, %u, value %" PRIu64 " at %.3f s)", rule, a, b, x,
             (double)w->net.now_us / 1e6);
    driver_fail(text);
}

static struct cs_client *client(struct world *w, const struct proc *p)
{
    return &w->net.client[p - w->p];
}

static struct fk_cluster *cluster(struct world *w, const struct proc *p)
{
    return client(w, p)->c;
}

static uint64_t local(struct world *w, const struct proc *p)
{
    return cs_local(client(w, p), w->net.now_us);
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
    fk_cluster_change(cluster(w, p), &c, 1, local(w, p));
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
    fk_cluster_change(cluster(w, p), &c, 1, local(w, p));
}

static void give_scan(struct world *w, struct proc *p)
{
    struct fk_change list[8];
    uint64_t cursor;
    uint32_t max, n = 0;

    if (!fk_cluster_scan_wanted(cluster(w, p), &cursor, &max))
        return;
    for (uint32_t looked = 0; looked < 8 && cursor < 2 * SLOTS && n < fk_min(max, 8u); looked++, cursor++)
        if (p->block[cursor / SLOTS][cursor % SLOTS].used)
            list[n++] = change_of(p, (unsigned)(cursor / SLOTS), (uint32_t)(cursor % SLOTS), false);
    fk_cluster_scan_give(cluster(w, p), list, n, cursor, cursor >= 2 * SLOTS, local(w, p));
}

/* Whatever the process wants to do now. */
static void serve(void *ctx, uint32_t i)
{
    struct world *w = ctx;
    struct proc *p = &w->p[i];

    give_scan(w, p);
    cs_send(&w->net, i);
    uint64_t epoch = fk_cluster_epoch(cluster(w, p));
    if (epoch != p->epoch) {
        struct grave g = { p->name, p->epoch, w->net.now_us };
        if (p->epoch)
            (void)fk_vec_push(&w->graves, g);
        p->epoch = epoch;
    }
}

/* ---- processes ---- */

static void start(struct world *w, uint32_t name)
{
    uint8_t fingerprint[SPACES][16] = { { 1 }, { 2 } };
    uint32_t i = 0;

    while (i < MAX_PROCS && w->net.client[i].alive)
        i++;
    if (i == MAX_PROCS)
        return;
    struct proc *p = &w->p[i];
    struct cs_client *cl = &w->net.client[i];
    *p = (struct proc){ .name = name };
    cl->alive = true;
    cl->paused = false;
    cl->cut_until_us = &w->cut_until_us[name];
    cl->drift_ppm = (int64_t)roll(w, 10000) - 5000;
    cl->offset_us = (int64_t)roll(w, 1000000) * 1000;
    struct fk_cluster_params cp = {
        .cluster = "sim", .name = names[name], .ttl_us = TTL_US, .flush_us = 1000 + roll(w, 4000),
        .timeout_us = 500000, .stream_batches = w->stream_cap, .max_pending = MAX_PENDING,
        .piece_changes = 1 + roll(w, 20),
        .seed = fk_rng_next(&w->rng), .zone = roll(w, 2) ? "z" : "",
    };
    if (fk_cluster_create(&cp, local(w, p), &cl->c))
        abort();
    uint32_t first = roll(w, SPACES);
    for (uint32_t s = 0; s < SPACES; s++) {
        uint32_t which = (first + s) % SPACES;
        fk_cluster_space(cluster(w, p), fingerprint[which], 4096, &p->space[which]);
    }
    cs_client_start(&w->net, i);
    for (uint32_t n = roll(w, 30); n > 0; n--)      /* what it finds on its SSDs */
        put(w, p);
}

static void stop(struct world *w, uint32_t i)
{
    struct proc *p = &w->p[i];
    struct fk_cluster_stats s;

    fk_cluster_get_stats(cluster(w, p), &s);
    w->gaps += s.gaps;
    w->snapshots += s.snapshots_read;
    w->overflows += s.overflows;
    w->fenced += s.fenced;
    w->digest = w->digest * 31 + s.changes_seen + s.commands;
    struct grave g = { p->name, p->epoch, client(w, p)->paused ? p->paused_us : w->net.now_us };
    if (p->epoch)
        (void)fk_vec_push(&w->graves, g);
    fk_cluster_destroy(cluster(w, p));
    client(w, p)->c = NULL;
    client(w, p)->alive = false;
    cs_client_gone(&w->net, i);
}

/* ---- the rules ---- */

static void check_silent(struct world *w, uint32_t i, uint32_t owner, uint64_t since)
{
    if (w->net.now_us > since + TTL_US + TTL_US / 50 + SLACK_US)
        fail(w, "leases: a node that is gone is named", i, owner, since);
}

static void check_hit(struct world *w, uint32_t i, uint32_t key, uint8_t space,
                      const struct fk_remote_hit *hit)
{
    struct fk_cluster_peer peer;

    if (!fk_cluster_peer(w->net.client[i].c, hit->node, local(w, &w->p[i]), &peer)) {
        fail(w, "names: a node that nobody knows", i, 0, hit->node);
        return;
    }
    for (uint32_t o = 0; o < MAX_PROCS; o++) {
        struct proc *p = &w->p[o];
        if (!client(w, p)->alive || p->epoch != peer.epoch || strcmp(names[p->name], peer.record->name) != 0)
            continue;
        const struct block *b = &p->block[hit->tier][hit->slot % SLOTS];
        bool accepts = b->used && b->generation == hit->generation;
        if (accepts && (b->key != key || b->space != space || p->space[b->space] != hit->space))
            fail(w, "names: the owner would hand over another block", i, o, key);
        if (hit->space != p->space[space])
            fail(w, "names: another space", i, o, key);
        if (client(w, p)->paused)
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
    uint32_t n = fk_cluster_extend(cluster(w, p), p->space[space], keys, 8, 0, NULL, local(w, p), hits);
    w->lookups++;
    w->hits += n;
    for (uint32_t k = 0; k < n; k++)
        check_hit(w, i, (first + k) % KEYS, space, &hits[k]);
}

static void check_bounds(struct world *w)
{
    const char *wrong = sr_check(w->net.redis, cs_redis_ms(&w->net));

    if (wrong)
        fail(w, wrong, 0, 0, 0);
    for (uint32_t i = 0; i < MAX_PROCS; i++) {
        struct fk_cluster_stats s;
        if (!w->net.client[i].alive)
            continue;
        fk_cluster_get_stats(w->net.client[i].c, &s);
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
    uint32_t n = fk_cluster_peers(cluster(w, a), local(w, a), peers, NAMES + 2), k = 0, count[2] = { 0 };

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
            if (x->used && (!fk_remote_holds(fk_cluster_remote(cluster(w, a)), peers[k].node, b->space[x->space],
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
        if (w->net.client[i].alive)
            selves[w->p[i].name] += w->p[i].epoch != 0;
    for (uint32_t i = 0; i < MAX_PROCS; i++) {
        struct proc *a = &w->p[i];
        if (!client(w, a)->alive)
            continue;
        if (selves[a->name] != 1)
            fail(w, "one self: not one member of a name", i, 0, selves[a->name]);
        const char *wrong = fk_remote_check(fk_cluster_remote(cluster(w, a)));
        if (wrong)
            fail(w, wrong, i, 0, 0);
        for (uint32_t o = 0; o < MAX_PROCS && a->epoch; o++)
            if (w->net.client[o].alive && w->p[o].epoch && w->p[o].name != a->name)
                compare(w, i, o);
    }
}

/* ---- time ---- */

static uint64_t first_wakeup(struct world *w, uint32_t *who)
{
    uint64_t at = UINT64_MAX;

    for (uint32_t i = 0; i < MAX_PROCS; i++) {
        if (!w->net.client[i].alive || w->net.client[i].paused)
            continue;
        uint64_t t = cs_wakeup(&w->net, i);
        if (t < at) {
            at = t;
            *who = i;
        }
    }
    return at;
}

static void run_until(struct world *w, uint64_t end)
{
    struct cs_net *n = &w->net;

    for (;;) {
        uint64_t at_msg, at_proc;
        uint32_t who = 0;
        size_t m = cs_first(n, &at_msg);
        at_proc = first_wakeup(w, &who);
        uint64_t at = fk_min(at_msg, at_proc);
        if (at > end)
            break;
        n->now_us = fk_max(n->now_us, at);
        if (at_msg <= at_proc) {
            cs_deliver(n, m);
            continue;
        }
        n->now_us++;
        cs_open(n, who);
        fk_cluster_tick(n->client[who].c, local(w, &w->p[who]));
        serve(w, who);
    }
    n->now_us = fk_max(n->now_us, end);
}

/* ---- what happens ---- */

static uint32_t any_proc(struct world *w)
{
    uint32_t i = roll(w, MAX_PROCS);

    for (uint32_t k = 0; k < MAX_PROCS; k++, i = (i + 1) % MAX_PROCS)
        if (w->net.client[i].alive)
            return i;
    return MAX_PROCS;
}

static bool has_runner(const struct world *w, uint32_t name)
{
    for (uint32_t i = 0; i < MAX_PROCS; i++)
        if (w->net.client[i].alive && !w->net.client[i].paused && w->p[i].name == name)
            return true;
    return false;
}

static void redis_fault(struct world *w)
{
    switch (roll(w, 8)) {
    case 0: w->net.down = !w->net.down; break;
    case 1: sr_flush(w->net.redis); break;
    case 2: sr_copy(w->net.redis); break;
    case 3:                             /* a replica takes over; its clock is another */
        sr_become_copy(w->net.redis);
        w->net.offset_ms = (int64_t)roll(w, 600) - 300;
        break;
    case 4: w->net.frozen_until_us = w->net.now_us + roll(w, 3000000); break;
    case 5:
    case 6:
        for (uint32_t n = 1 + roll(w, 3); n > 0; n--)
            sr_evict(w->net.redis, fk_rng_next(&w->rng));
        return;
    default:
        if (w->net.down && roll(w, 2))
            sr_flush(w->net.redis);
        w->net.down = false;
    }
    for (uint32_t i = 0; i < MAX_PROCS; i++)    /* whoever fails over breaks connections */
        for (uint32_t k = 0; k < FK_CONNS; k++)
            if (w->net.client[i].alive && !w->net.client[i].paused && w->net.client[i].conn[k].up && roll(w, 2))
                cs_close(&w->net, i, k);
}

/* It hangs, another one takes its place and dies, nothing of that one is left but the stream; it goes on. */
static void usurp(struct world *w, uint32_t i)
{
    uint32_t name = w->p[i].name;

    w->net.client[i].paused = true;
    w->p[i].paused_us = w->net.now_us;
    if (!has_runner(w, name))
        start(w, name);
    run_until(w, w->net.now_us + 100000 + roll(w, 1000000));
    for (uint32_t k = 0; k < MAX_PROCS; k++)
        if (w->net.client[k].alive && !w->net.client[k].paused && w->p[k].name == name)
            stop(w, k);
    sr_lose_record(w->net.redis, names[name]);
    w->net.client[i].paused = false;
}

static void node_fault(struct world *w)
{
    uint32_t i = any_proc(w), name = roll(w, NAMES);

    if (i == MAX_PROCS)
        return;
    struct proc *p = &w->p[i];
    switch (roll(w, 8)) {
    case 0: stop(w, i); break;
    case 6: if (!client(w, p)->paused) usurp(w, i); break;
    case 1: p->paused_us = client(w, p)->paused ? p->paused_us : w->net.now_us; client(w, p)->paused = true; break;
    case 2: client(w, p)->paused = false; break;
    case 3: w->cut_until_us[p->name] = w->net.now_us + roll(w, 6000000); break;
    case 4: if (!client(w, p)->paused) cs_close(&w->net, i, roll(w, FK_CONNS)); break;
    case 5:
        if (!client(w, p)->paused) {
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
    if (client(w, p)->paused)
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
    w->net.quiet = true;
    w->net.down = false;
    w->net.frozen_until_us = 0;
    memset(w->cut_until_us, 0, sizeof(w->cut_until_us));
    for (uint32_t i = 0; i < MAX_PROCS; i++)
        w->net.client[i].paused = false;
    for (uint64_t end = w->net.now_us + QUIET_US; w->net.now_us < end;) {
        run_until(w, w->net.now_us + 100000);
        uint32_t i = any_proc(w);
        if (i < MAX_PROCS)
            look(w, i);
        check_bounds(w);
    }
    check_quiet(w);
    w->net.quiet = false;
}

static void end(struct world *w)
{
    cs_free(&w->net);
    fk_vec_free(&w->graves);
    free(w);
}

/* ---- the program ---- */

static struct { uint64_t steps, changes, lookups, hits, gaps, snapshots, overflows, fenced; } total;

static void add_counts(const struct world *w)
{
    total.steps += w->step;
    total.changes += w->changes;
    total.lookups += w->lookups;
    total.hits += w->hits;
    total.gaps += w->gaps;
    total.snapshots += w->snapshots;
    total.overflows += w->overflows;
    total.fenced += w->fenced;
}

static struct world *new_world(uint64_t seed)
{
    static const uint32_t caps[] = { 3, 8, 40, 200 };
    struct world *w = calloc(1, sizeof(*w));

    if (!w)
        abort();
    w->rng = seed;
    w->rng = fk_rng_next(&w->rng);      /* neighbours must not share their streams */
    w->net = (struct cs_net){ .redis = sr_new(), .rng = &w->rng, .serve = serve, .ctx = w };
    w->net.ppm = (int64_t)roll(w, 10000) - 5000;
    w->stream_cap = caps[roll(w, 4)];
    return w;
}

static uint64_t play(uint64_t seed, uint64_t steps, bool verbose)
{
    struct world *w = new_world(seed);

    (void)verbose;
    driver_plays(seed, &w->step, 300);
    for (uint32_t n = 2 + roll(w, NAMES - 1), i = 0; i < n; i++)
        start(w, i);
    for (; w->step < steps; w->step++) {
        run_until(w, w->net.now_us + 1 + roll(w, 20000));
        action(w);
        if (w->step % 16 == 0)
            check_bounds(w);
        if (w->step % 1000 == 999 || w->step + 1 == steps)
            calm(w);
    }
    for (uint32_t i = 0; i < MAX_PROCS; i++)
        if (w->net.client[i].alive)
            stop(w, i);
    uint64_t digest = (w->digest * 31 + w->net.now_us) * 31 + w->hits;
    driver_plays(seed, NULL, 0);
    add_counts(w);
    end(w);
    return digest;
}

static void print_totals(double seconds)
{
    (void)seconds;
    printf("csim: %" PRIu64 " steps, %" PRIu64 " changes, %" PRIu64 " look-ups with %" PRIu64 " hits, %" PRIu64
           " gaps, %" PRIu64 " snapshots, %" PRIu64 " overflows, %" PRIu64 " times fenced\n", total.steps, total.changes,
           total.lookups, total.hits, total.gaps, total.snapshots, total.overflows, total.fenced);
}

int main(int argc, char **argv)
{
    static const struct driver driver = { .name = "csim", .last = 20, .steps = 2000, .play = play,
                                          .totals = print_totals };

    return driver_main(&driver, argc, argv);
}
