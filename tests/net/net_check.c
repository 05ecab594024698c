/*
 * net_check.c - the rules: whom look-ups name at any time; what holds when all is quiet. See net.h.
 * Callers: net_caller.c, net_world.c.
 */
#include "net.h"
#include "net_place.h"
#include "net_store.h"

static uint8_t number_of(struct net_world *w, struct net_node *p, uint32_t space)
{
    const struct net_space *sp = &p->space[space];
    uint8_t number = 255;

    (void)fk_cluster_space(net_client(w, p)->c, w->type[sp->type].fingerprint, sp->slot_bytes, &number);
    return number;
}

static bool shared(const struct net_world *w, const struct net_node *p, uint32_t key, int tier)
{
    const struct net_home *h = &w->home[p->home];

    return (tier == FK_TIER_CPU ? h->share_cpu : h->share_ssd) && !(h->private_ns >> w->keys.data[key].ns & 1);
}

/* ---- names ---- */

static void check_silent(struct net_world *w, struct net_node *p, uint32_t name, uint64_t since)
{
    NET_CHECK(w, w->net.now_us <= since + NET_TTL_US + NET_TTL_US / 50 + NET_LEASE_SLACK_US,
              "leases: node %u names %s, which is gone since %llu ms", net_at(w, p), net_name(name),
              (unsigned long long)(w->net.now_us - since) / 1000);
}

static void check_hit(struct net_world *w, struct net_node *p, const struct fk_remote_hit *hit)
{
    struct fk_cluster_peer peer;

    NET_CHECK(w, fk_cluster_peer(net_client(w, p)->c, hit->node, net_now(w, p), &peer),
              "names: a node that nobody knows");
    for (uint32_t o = 0; o < NET_NODES; o++) {
        struct net_node *q = &w->node[o];
        if (!net_alive(w, o) || q->epoch != peer.epoch || strcmp(net_name(q->name), peer.record->name) != 0)
            continue;
        if (!net_runs(w, o))
            check_silent(w, p, q->name, q->frozen_us);
        return;
    }
    for (size_t g = w->graves.len; g-- > 0;) {
        const struct net_grave *x = &w->graves.data[g];
        if (x->epoch == peer.epoch && strcmp(net_name(x->name), peer.record->name) == 0) {
            check_silent(w, p, x->name, x->died_us);
            return;
        }
    }
    net_fail(w, "names: an epoch that nobody had");
}

void net_check_names(struct net_world *w, struct net_node *p, uint32_t space, const struct net_prompt *pr)
{
    struct fk_remote_hit hits[NET_CHAIN];
    struct fk_key keys[NET_CHAIN];

    for (uint32_t i = 0; i < pr->n; i++)
        keys[i] = w->keys.data[pr->keys[i]].key;
    uint32_t n = fk_cluster_extend(net_client(w, p)->c, number_of(w, p, space), keys, pr->n, 0, NULL, net_now(w, p),
                                   hits);
    w->n.lookups++;
    for (uint32_t i = 0; i < n; i++)
        check_hit(w, p, &hits[i]);
}

/* ---- now and then ---- */

static void check_node(struct net_world *w, struct net_node *p)
{
    struct fk_cluster_stats c;
    struct fk_peers_stats s = { 0 };
    const char *wrong = w->no_self_check ? NULL : fk_core_check(p->core);

    NET_CHECK(w, !wrong, "fk_core_check of node %u: %s", net_at(w, p), wrong);
    wrong = w->no_self_check || !p->peers ? NULL : fk_peers_check(p->peers);
    NET_CHECK(w, !wrong, "fk_peers_check of node %u: %s", net_at(w, p), wrong);
    fk_cluster_get_stats(net_client(w, p)->c, &c);
    if (p->peers)
        fk_peers_get_stats(p->peers, &s);
    NET_CHECK(w, c.pending <= NET_MAX_PENDING, "bounds: %llu changes pending", (unsigned long long)c.pending);
    uint32_t most = w->home[p->home].max_in_flight;
    NET_CHECK(w, !most || s.in_flight <= most, "bounds: %llu fetches under way, %u allowed",
              (unsigned long long)s.in_flight, most);
    uint32_t late = 0;
    for (size_t i = 0; i < p->fetches.len; i++)
        late += p->fetches.data[i].ended && !p->fetches.data[i].stored;
    NET_CHECK(w, s.quarantined == late, "node %u counts %llu slots in quarantine, there are %u", net_at(w, p),
              (unsigned long long)s.quarantined, late);
    net_store_check(w, p);
}

void net_check_step(struct net_world *w)
{
    const char *wrong = sr_check(w->net.redis, cs_redis_ms(&w->net));

    NET_CHECK(w, !wrong, "%s", wrong);
    for (uint32_t i = 0; i < NET_NODES; i++)
        if (net_alive(w, i))
            check_node(w, &w->node[i]);
}

/* ---- at quiet points: nothing is left over ---- */

static void check_rest(struct net_world *w, struct net_node *p)
{
    uint64_t ready[FK_TIERS] = { 0 }, slots[FK_TIERS] = { 0 };
    struct fk_peers_stats s = { 0 };
    struct flexkv_stats st;

    fk_core_get_stats(p->core, &st);
    if (p->peers)
        fk_peers_get_stats(p->peers, &s);
    NET_CHECK(w, !st.leases && !st.operations, "at rest: %llu leases, %llu operations", (unsigned long long)st.leases,
              (unsigned long long)st.operations);
    NET_CHECK(w, !s.in_flight && !s.lent_now && !s.quarantined, "at rest: %llu fetches, %llu loans, %llu in quarantine",
              (unsigned long long)s.in_flight, (unsigned long long)s.lent_now, (unsigned long long)s.quarantined);
    for (uint32_t k = 0; k < w->keys.len; k++) {
        const struct net_have *h = net_have(p, k);
        struct fk_core_where x = { 0 };
        bool known = fk_core_find(p->core, w->keys.data[k].key, &x);
        NET_CHECK(w, x.cpu_ready == h->there[FK_TIER_CPU] && x.ssd_ready == h->there[FK_TIER_SSD],
                  "events and index disagree: key %u at node %u", k, net_at(w, p));
        NET_CHECK(w, !known || !x.pins, "at rest: key %u has %u pins at node %u", k, x.pins, net_at(w, p));
        ready[FK_TIER_CPU] += x.cpu_ready;
        ready[FK_TIER_SSD] += x.ssd_ready;
    }
    for (uint32_t i = 0; i < p->n_spaces; i++) {
        const struct net_space *sp = &p->space[i];
        slots[FK_TIER_CPU] += sp->cpu_slots;
        slots[FK_TIER_SSD] += sp->ssd_slots;
        NET_CHECK(w, sp->n_free == sp->n_pages, "at rest: %u of %u pages free", sp->n_free, sp->n_pages);
        for (uint32_t c = 0; c < sp->cpu_slots; c++)
            NET_CHECK(w, !sp->cpu_use[c].readers && !sp->cpu_use[c].writers, "at rest: cpu slot %u is in use", c);
    }
    NET_CHECK(w, st.cpu.free_slots + ready[FK_TIER_CPU] == slots[FK_TIER_CPU] &&
                     st.ssd.free_slots + ready[FK_TIER_SSD] == slots[FK_TIER_SSD],
              "slots leaked at node %u: cpu %llu free + %llu blocks of %llu, ssd %llu + %llu of %llu", net_at(w, p),
              (unsigned long long)st.cpu.free_slots, (unsigned long long)ready[FK_TIER_CPU],
              (unsigned long long)slots[FK_TIER_CPU], (unsigned long long)st.ssd.free_slots,
              (unsigned long long)ready[FK_TIER_SSD], (unsigned long long)slots[FK_TIER_SSD]);
}

/* ---- the truth: what a knows of b is what b holds and shares ---- */

static void compare_tier(struct net_world *w, struct net_node *a, struct net_node *b,
                         const struct fk_cluster_peer *peer, int tier)
{
    const struct fk_remote *r = fk_cluster_remote(net_client(w, a)->c);
    uint64_t count = 0;

    for (uint32_t k = 0; k < w->keys.len; k++) {
        const struct net_have *h = net_have(b, k);
        uint32_t space = b->space_of[w->keys.data[k].family], slot = 0, generation;
        if (space == FK_NONE)
            continue;
        bool there = h->there[tier] && shared(w, b, k, tier);
        bool known = fk_remote_holds(r, peer->node, number_of(w, b, space), w->keys.data[k].key, (unsigned)tier,
                                     &slot, &generation);
        NET_CHECK(w, known == there, "truth: key %u is%s in tier %d of node %u; node %u believes otherwise", k,
                  there ? "" : " not", tier, net_at(w, b), net_at(w, a));
        NET_CHECK(w, !there || slot == h->slot[tier], "truth: key %u is in slot %u of tier %d of node %u; node %u knows "
                  "slot %u", k, h->slot[tier], tier, net_at(w, b), net_at(w, a), slot);
        count += there;
    }
    NET_CHECK(w, count == peer->blocks[tier], "truth: node %u has %llu blocks in tier %d, node %u knows %llu",
              net_at(w, b), (unsigned long long)count, tier, net_at(w, a), (unsigned long long)peer->blocks[tier]);
    w->n.compared += count;
}

static void compare(struct net_world *w, struct net_node *a, struct net_node *b)
{
    struct fk_cluster_peer peers[NET_NODES + 2];
    uint32_t n = fk_cluster_peers(net_client(w, a)->c, net_now(w, a), peers, NET_NODES + 2), k = 0;

    while (k < n && strcmp(peers[k].record->name, net_name(b->name)) != 0)
        k++;
    NET_CHECK(w, k < n && peers[k].epoch == b->epoch && peers[k].lease_us > 0,
              "truth: node %u does not know node %u as a member", net_at(w, a), net_at(w, b));
    for (int t = 0; t < FK_TIERS; t++)
        compare_tier(w, a, b, &peers[k], t);
}

void net_check_quiet(struct net_world *w)
{
    uint32_t selves[NET_HOMES] = { 0 }, alive[NET_HOMES] = { 0 };

    net_check_step(w);
    for (uint32_t i = 0; i < NET_NODES; i++) {
        if (!net_alive(w, i))
            continue;
        alive[w->node[i].name]++;
        selves[w->node[i].name] += w->node[i].epoch != 0;
        check_rest(w, &w->node[i]);
        const char *wrong = fk_remote_check(fk_cluster_remote(w->net.client[i].c));
        NET_CHECK(w, !wrong, "fk_remote_check of node %u: %s", i, wrong);
    }
    net_store_check_quiet(w);
    for (uint32_t h = 0; h < w->n_homes; h++)
        NET_CHECK(w, !alive[h] || selves[h] == 1, "one self: %u members named %s", selves[h], net_name(h));
    for (uint32_t i = 0; i < NET_NODES; i++)
        for (uint32_t o = 0; o < NET_NODES; o++)
            if (net_alive(w, i) && net_alive(w, o) && w->node[i].epoch && w->node[o].epoch && i != o)
                compare(w, &w->node[i], &w->node[o]);
}

/* ---- hits: what can be had is what one big node would have ---- */

static bool here(struct net_node *p, uint32_t key)
{
    const struct net_have *h = net_have(p, key);

    return h->there[FK_TIER_CPU] || h->there[FK_TIER_SSD];
}

static bool somewhere(struct net_world *w, struct net_node *p, uint32_t type, uint32_t key)
{
    bool had = here(p, key) || (p->store && net_place_has(w, type, w->keys.data[key].key));

    for (uint32_t o = 0; o < NET_NODES && p->epoch && p->peers; o++) {
        struct net_node *q = &w->node[o];
        if (!net_alive(w, o) || !q->epoch || q == p)
            continue;
        uint32_t space = q->space_of[w->keys.data[key].family];
        if (space == FK_NONE || q->space[space].type != type)
            continue;
        for (int t = 0; t < FK_TIERS; t++)
            had |= net_have(q, key)->there[t] && shared(w, q, key, t);
    }
    return had;
}

void net_check_hits(struct net_world *w, struct net_node *p)
{
    uint32_t space = net_below(w, p->n_spaces), type = p->space[space].type, reach = 0;
    const struct net_prompt *pr = net_pick_prompt(w, w->type[type].family);
    struct flexkv_match_result r;

    if (!p->epoch)
        return;
    while (reach < pr->n && somewhere(w, p, type, pr->keys[reach]))
        reach++;
    uint32_t said = net_reach(w, p, space, pr, pr->n, &r);
    NET_CHECK(w, said == reach, "hits: node %u reaches %u of %u blocks, one big node would have %u", net_at(w, p), said,
              pr->n, reach);
    NET_TRACE(w, "node %u gets %u blocks: %u cpu %u ssd %u peer", net_at(w, p), r.blocks, r.cpu_blocks, r.ssd_blocks,
              r.peer_blocks);
    w->n.hits_checked += reach;
    if (r.lease)
        net_get_now(w, p, space, pr, &r, r.blocks);
}

/* Peers are still believed to have what they had. What they do not give the store has to. */
void net_check_left(struct net_world *w, struct net_node *p, bool silent)
{
    uint32_t space = net_below(w, p->n_spaces), type = p->space[space].type, left = 0;
    const struct net_prompt *pr = net_pick_prompt(w, w->type[type].family);
    struct flexkv_match_result r;

    while (left < pr->n && (here(p, pr->keys[left]) || net_place_has(w, type, w->keys.data[pr->keys[left]].key)))
        left++;
    uint32_t said = net_reach(w, p, space, pr, pr->n, &r);
    NET_CHECK(w, said >= left, "hits: node %u, which is left, reaches %u of %u blocks, with the store it would be %u", net_at(w, p),
              said, pr->n, left);
    w->n.hits_checked += left;
    if (r.lease)
        net_get_now(w, p, space, pr, &r, silent ? 0 : fk_min(left, r.blocks));
}
