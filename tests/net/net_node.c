/*
 * net_node.c - the shell around one node, as src/api is one: opens and ends it, and carries everything between core,
 * peer tier, cluster, transport, SSD and workers, one round at a time. Caller: net_world.c.
 */
#include <stdio.h>

#include "net.h"
#include "net_fiber.h"
#include "net_place.h"
#include "net_store.h"
#include "transport/endpoint.h"


static void *need(void *p)
{
    if (!p)
        abort();
    return p;
}

struct net_have *net_have(struct net_node *p, uint32_t key)
{
    while (p->have.len <= key)
        if (fk_vec_push(&p->have, (struct net_have){ 0 }))
            abort();
    return &p->have.data[key];
}

void net_soon(struct net_world *w, struct net_node *p)
{
    uint64_t at = w->net.now_us + (net_chance(w, 4) ? net_below(w, 200) : 0);

    p->pump_us = fk_min(p->pump_us, at);
}

/* ---- what comes out of the core ---- */

static void one_event(struct net_world *w, struct net_node *p, const struct fk_core_event *e)
{
    uint32_t k = net_key_find(w, e->key), at = 0;

    while (at < p->n_spaces && p->space[at].id != e->space)
        at++;
    NET_CHECK(w, k != FK_NONE && at < p->n_spaces, "events: unknown key or space");
    struct net_have *h = net_have(p, k);
    const struct net_space *sp = &p->space[at];
    NET_CHECK(w, h->there[e->tier] != e->stored, "events: node %u key %u tier %u %s twice", net_at(w, p), k, e->tier,
              e->stored ? "stored" : "removed");
    h->there[e->tier] = e->stored;
    if (!e->stored)
        return;
    h->slot[e->tier] = e->slot[e->tier];
    h->stay[e->tier]++;
    sp->generation[e->tier][e->slot[e->tier]]++;
    if (e->tier != FK_TIER_CPU)
        return;
    NET_CHECK(w, net_bytes_ok(w, sp->type, k, sp->pool + (size_t)e->slot[FK_TIER_CPU] * sp->slot_bytes),
              "wrong bytes: node %u announces key %u in cpu slot %u, where other bytes are", net_at(w, p), k,
              e->slot[FK_TIER_CPU]);
    w->keys.data[k].complete |= (uint8_t)(1u << sp->type);
}

void net_take_events(struct net_world *w, struct net_node *p)
{
    struct fk_core_event e[64];
    uint32_t n;

    while ((n = fk_core_take_events(p->core, e, 64)) > 0) {
        for (uint32_t i = 0; i < n; i++) {
            one_event(w, p, &e[i]);
            if (fk_vec_push(&p->untold, e[i]))
                abort();
        }
    }
    NET_CHECK(w, !fk_core_events_lost(p->core), "events were lost");
}

void net_after(struct net_world *w, struct net_node *p)
{
    struct flexkv_completion c[16];
    uint32_t n;

    net_take_events(w, p);
    if (p->peers)
        fk_peers_tell(p->peers, p->untold.data, (uint32_t)p->untold.len, net_now(w, p));
    net_store_tell(w, p);
    p->untold.len = 0;
    while ((n = fk_core_take_completions(p->core, c, 16)) > 0)
        for (uint32_t i = 0; i < n; i++)
            net_completion(w, p, &c[i]);
}

/* ---- opening ---- */

static void open_cluster(struct net_world *w, struct net_node *p)
{
    struct cs_client *cl = net_client(w, p);
    char address[64];
    struct fk_cluster_params cp = {
        .cluster = "sim", .name = net_name(p->name), .ttl_us = NET_TTL_US, .flush_us = 1000 + net_below(w, 4000),
        .timeout_us = 500000, .stream_batches = w->stream_cap, .max_pending = NET_MAX_PENDING,
        .piece_changes = 1 + net_below(w, 20), .seed = fk_rng_next(&w->rng), .zone = net_chance(w, 2) ? "z" : "",
    };

    NET_CHECK(w, fk_cluster_create(&cp, net_now(w, p), &cl->c) == 0, "fk_cluster_create");
    snprintf(p->address, sizeof(p->address), "%s/%u", net_name(p->name), w->address_seq++);
    snprintf(address, sizeof(address), "loopback=%s", p->address);
    NET_CHECK(w, fk_cluster_address(cl->c, address) == 0, "fk_cluster_address");
}

static void open_peers(struct net_world *w, struct net_node *p)
{
    const struct net_home *h = &w->home[p->home];
    char error[256] = "";
    struct fk_transport_params tp = {
        .transport = "loopback", .listen = p->address, .cluster = "sim", .node = p->name, .hub = w->hub,
        .provider = { net_grant, net_release, p }, .max_in_flight = 1 + net_below(w, 12),
    };
    int rc = fk_transport_open(&tp, &p->transport, error, sizeof(error));

    NET_CHECK(w, rc == 0, "fk_transport_open: %d %s", rc, error);
    w->stepping = p;
    p->transport_next = fk_transport_step(p->transport, net_now(w, p));
    struct fk_peers_params pp = {
        .core = p->core, .cluster = net_client(w, p)->c, .transport = p->transport, .share_cpu = h->share_cpu,
        .share_ssd = h->share_ssd, .timeout_us = h->fetch_us, .max_in_flight = h->max_in_flight,
        .staging_buffers = h->staging, .hand_on = net_store_hand_on, .ctx = p,
    };
    if (h->alone)
        return;
    rc = fk_peers_create(&pp, &p->peers);
    NET_CHECK(w, rc == 0, "fk_peers_create: %d", rc);
}

static void space_memory(struct net_world *w, struct net_node *p, uint32_t s)
{
    const struct net_home *h = &w->home[p->home];
    struct net_space *sp = &p->space[s];
    const struct net_type *t = &w->type[h->type[s]];

    *sp = (struct net_space){ .type = h->type[s], .cpu_slots = h->cpu_slots[s], .ssd_slots = h->ssd_slots[s],
                              .slot_bytes = t->slice_bytes * t->ranks, .n_pages = h->pages[s] };
    sp->pool = need(malloc((size_t)sp->cpu_slots * sp->slot_bytes));
    memset(sp->pool, 0xee, (size_t)sp->cpu_slots * sp->slot_bytes);
    for (uint32_t r = 0; r < t->ranks; r++)
        sp->mem[r] = need(calloc(sp->n_pages, t->slice_bytes));
    sp->page_busy = need(calloc(sp->n_pages, 1));
    sp->free_pages = need(calloc(sp->n_pages, sizeof(uint32_t)));
    for (uint32_t i = 0; i < sp->n_pages; i++)
        sp->free_pages[sp->n_free++] = i;
    sp->cpu_use = need(calloc(sp->cpu_slots, sizeof(*sp->cpu_use)));
    sp->ssd_use = need(calloc(sp->ssd_slots + 1, sizeof(*sp->ssd_use)));
    sp->generation[FK_TIER_CPU] = need(calloc(sp->cpu_slots, sizeof(uint32_t)));
    sp->generation[FK_TIER_SSD] = need(calloc(sp->ssd_slots + 1, sizeof(uint32_t)));
    sp->ssd = p->twin ? need(calloc(sp->ssd_slots + 1, sizeof(*sp->ssd))) : w->disk[p->home][s];
}

static void space_groups(struct net_world *w, struct net_node *p, uint32_t s)
{
    const struct net_home *h = &w->home[p->home];
    struct net_space *sp = &p->space[s];

    for (uint32_t ns = 0; ns < NET_NS; ns++) {
        struct fk_core_quota q = { .max = { UINT32_MAX, UINT32_MAX }, .tag = ns + 1 };
        if (h->quotas && ns)
            q.max[FK_TIER_CPU] = fk_max(sp->cpu_slots / 2, 1u);
        NET_CHECK(w, fk_core_group_add(p->core, sp->id, &q, &sp->group[ns]) == 0, "fk_core_group_add");
        if (p->peers && h->private_ns >> ns & 1)
            fk_peers_group_private(p->peers, sp->group[ns]);
    }
}

static void open_space(struct net_world *w, struct net_node *p, uint32_t s)
{
    struct net_space *sp = &p->space[s];
    const struct net_type *t = &w->type[w->home[p->home].type[s]];

    space_memory(w, p, s);
    struct fk_core_space_params cp = { .cpu_slots = sp->cpu_slots, .ssd_slots = sp->ssd_slots,
                                       .ssd_stripe_slots = sp->ssd_slots ? 4 : 0, .ssd_dirs = sp->ssd_slots ? 1 : 0 };
    int rc = fk_core_space_add(p->core, &cp, &sp->id);
    NET_CHECK(w, rc == 0, "fk_core_space_add: %d", rc);
    rc = fk_core_instance_add(p->core, sp->id, t->ranks, &sp->instance);
    NET_CHECK(w, rc == 0, "fk_core_instance_add: %d", rc);
    space_groups(w, p, s);
    fk_autofree struct fk_core_found *found = need(calloc(sp->ssd_slots + 1, sizeof(*found)));
    uint32_t n = net_ssd_found(p, s, found);
    int64_t back = n ? fk_core_recover(p->core, sp->id, found, n) : 0;
    NET_CHECK(w, back >= 0 && back <= n, "fk_core_recover: %lld", (long long)back);
    rc = fk_core_space_elsewhere(p->core, sp->id);
    NET_CHECK(w, rc == 0, "fk_core_space_elsewhere: %d", rc);
    struct fk_peers_space ps = { .id = sp->id, .block_bytes = sp->slot_bytes, .slot_bytes = sp->slot_bytes,
                                 .pool = sp->pool, .slots = { sp->cpu_slots, sp->ssd_slots } };
    memcpy(ps.fingerprint, t->fingerprint, 16);
    rc = p->peers ? fk_peers_space(p->peers, &ps) : 0;
    NET_CHECK(w, rc == 0, "fk_peers_space: %d", rc);
    p->space_of[t->family] = s;
    net_store_space(w, p, s);
    net_after(w, p);
}

void net_node_start(struct net_world *w, uint32_t i, uint32_t home, uint32_t name, bool twin)
{
    struct net_node *p = &w->node[i];
    struct cs_client *cl = &w->net.client[i];

    *p = (struct net_node){ .home = home, .name = name, .twin = twin, .pump_us = w->net.now_us };
    for (uint32_t f = 0; f < NET_FAMILIES; f++)
        p->space_of[f] = FK_NONE;
    cl->alive = true;
    cl->paused = false;
    cl->cut_until_us = &w->cut_redis_us[twin ? NET_HOMES : home];
    cl->drift_ppm = (int64_t)net_below(w, 10000) - 5000;
    cl->offset_us = (int64_t)net_below(w, 1000000) * 1000;
    cs_client_start(&w->net, i);
    int rc = fk_core_create(&w->home[home].core, &p->core);
    NET_CHECK(w, rc == 0, "fk_core_create: %d", rc);
    open_cluster(w, p);
    open_peers(w, p);
    net_store_open(w, p);
    p->n_spaces = w->home[home].n_spaces;
    for (uint32_t s = 0; s < p->n_spaces; s++)
        open_space(w, p, s);
    w->n.starts++;
    NET_TRACE(w, "node %u starts: home %u name %s address %s%s", i, home, net_name(name), p->address,
              twin ? " (a twin)" : "");
}

/* ---- the end ---- */

void net_totals(struct net_world *w, struct net_node *p)
{
    struct fk_peers_stats s = { 0 };
    struct fk_cluster_stats c;

    if (p->peers)
        fk_peers_get_stats(p->peers, &s);
    fk_cluster_get_stats(net_client(w, p)->c, &c);
    w->n.fetched += s.fetched_blocks;
    w->n.failed += s.failed_blocks;
    w->n.retried += s.retried;
    w->n.not_there += s.not_there;
    w->n.lent += s.lent_blocks;
    w->n.refused += s.refused;
    w->n.fenced += c.fenced;
    w->n.snapshots += c.snapshots_read;
    w->n.gaps += c.gaps;
    w->n.overflows += c.overflows;
    net_mix(w, s.fetched_blocks * 31 + c.commands);
}

static void free_space(struct net_node *p, struct net_space *sp)
{
    for (uint32_t r = 0; r < NET_RANKS; r++) {
        free(sp->mem[r]);
        fk_vec_free(&sp->jobs[r]);
    }
    if (p->twin)
        free(sp->ssd);
    free(sp->pool);
    free(sp->page_busy);
    free(sp->free_pages);
    free(sp->cpu_use);
    free(sp->ssd_use);
    free(sp->generation[FK_TIER_CPU]);
    free(sp->generation[FK_TIER_SSD]);
    fk_vec_free(&sp->job_uses);
}

void net_node_end(struct net_world *w, struct net_node *p)
{
    struct cs_client *cl = net_client(w, p);
    struct net_grave g = { p->name, p->epoch, cl->paused ? p->frozen_us : w->net.now_us };

    NET_TRACE(w, "node %u ends", net_at(w, p));
    if (p->epoch)
        (void)fk_vec_push(&w->graves, g);
    net_totals(w, p);
    p->ending = true;
    fk_transport_close(p->transport);
    NET_CHECK(w, !p->grants.len, "the transport is closed and has not given back %zu grants", p->grants.len);
    net_store_close(w, p);
    if (p->peers)
        fk_peers_destroy(p->peers);
    net_store_free(p);
    fk_cluster_destroy(cl->c);
    fk_core_destroy(p->core);
    cl->c = NULL;
    cl->alive = cl->paused = false;
    cs_client_gone(&w->net, net_at(w, p));
    if (!p->twin)
        w->occupied[p->home] = false;
    for (uint32_t s = 0; s < p->n_spaces; s++)
        free_space(p, &p->space[s]);
    fk_vec_free(&p->have);
    fk_vec_free(&p->ios);
    fk_vec_free(&p->fetches);
    fk_vec_free(&p->grants);
    fk_vec_free(&p->later);
    fk_vec_free(&p->untold);
    fk_vec_free(&p->fibers);
}

/* ---- a round ---- */

static bool transport_has(const struct net_node *p)
{
    const struct fk_transport *t = p->transport;

    return t->out_at != t->outbox.len || t->inbox.len || t->granted.len;
}

/* Whoever steps his transport may bring others' reads to their end: their descriptors would wake them. */
static void wake_others(struct net_world *w)
{
    for (uint32_t i = 0; i < NET_NODES; i++)
        if (net_runs(w, i) && transport_has(&w->node[i]))
            net_soon(w, &w->node[i]);
}

static void step_transport(struct net_world *w, struct net_node *p)
{
    struct net_node *was = w->stepping;

    w->stepping = p;
    p->transport_next = fk_transport_step(p->transport, net_now(w, p));
    w->stepping = was;
}

static void give_scan(struct net_world *w, struct net_node *p)
{
    struct fk_cluster *c = net_client(w, p)->c;
    struct fk_change list[8];
    uint64_t cursor, next = 0;
    uint32_t max;
    bool end = false;

    if (!fk_cluster_scan_wanted(c, &cursor, &max))
        return;
    end = !p->peers;
    uint32_t n = end ? 0 : fk_peers_scan(p->peers, cursor, list, fk_min(max, 8u), &next, &end);
    NET_CHECK(w, n <= fk_min(max, 8u), "fk_peers_scan gives %u", n);
    fk_cluster_scan_give(c, list, n, next, end, net_now(w, p));
}

void net_epoch_seen(struct net_world *w, struct net_node *p)
{
    uint64_t epoch = fk_cluster_epoch(net_client(w, p)->c);
    struct net_grave g = { p->name, p->epoch, w->net.now_us };

    if (epoch == p->epoch)
        return;
    if (p->epoch)
        (void)fk_vec_push(&w->graves, g);
    p->epoch = epoch;
}

/* Redis has said something, or somebody has something to say there. */
void net_node_cluster(struct net_world *w, struct net_node *p)
{
    give_scan(w, p);
    cs_send(&w->net, net_at(w, p));
    net_epoch_seen(w, p);
}

static bool has_work(struct net_node *p)
{
    struct fk_core_work work = fk_core_work(p->core);
    uint64_t cursor;
    uint32_t max;

    return work.ssd || work.fetches || work.completions || transport_has(p) ||
           fk_cluster_scan_wanted(net_current->net.client[p - net_current->node].c, &cursor, &max);
}

void net_node_round(struct net_world *w, struct net_node *p)
{
    uint64_t now = net_now(w, p);

    p->fast = p->round_us == w->net.now_us ? p->fast + 1 : 0;
    NET_CHECK(w, p->fast < 200, "node %u asks for rounds without pause: core %lld, store %lld, transport %lld, "
              "cluster %lld us from now", net_at(w, p), (long long)(fk_core_next_wakeup(p->core) - now),
              (long long)(net_store_next(w, p) - w->net.now_us), (long long)(p->transport_next - now),
              (long long)(cs_wakeup(&w->net, net_at(w, p)) - w->net.now_us));
    p->round_us = w->net.now_us;
    p->pump_us = UINT64_MAX;
    if (fk_core_next_wakeup(p->core) <= now)
        fk_core_tick(p->core, now);
    net_after(w, p);
    (void)net_workers(w, p);
    (void)net_ssd_done(w, p);
    (void)net_ssd_take(w, p);
    step_transport(w, p);
    if (p->peers)
        fk_peers_pump(p->peers, now);
    net_after(w, p);
    net_store_round(w, p);
    (void)net_workers(w, p);
    step_transport(w, p);
    cs_open(&w->net, net_at(w, p));
    fk_cluster_tick(net_client(w, p)->c, now);
    net_node_cluster(w, p);
    wake_others(w);
    if (has_work(p))
        p->pump_us = w->net.now_us + 1 + net_below(w, 20);
}

uint64_t net_node_next(struct net_world *w, struct net_node *p)
{
    const struct cs_client *cl = net_client(w, p);
    uint64_t mine = fk_min(fk_core_next_wakeup(p->core), p->peers ? fk_peers_next_wakeup(p->peers) : UINT64_MAX);
    uint64_t at = fk_min(cs_real(cl, fk_min(mine, p->transport_next)), p->pump_us);

    at = fk_min(at, fk_min(net_ssd_next(p), net_workers_next(p)));
    at = fk_min(at, net_store_next(w, p));
    return fk_min(at, cs_wakeup(&w->net, net_at(w, p)));
}
