/*
 * net_store.c - a node's part in the store that nodes share, as src/api/remote.c is one: the real depot and the real store, whose
 * threads are fibers (net_fiber.c) and whose files are in net_place.c. Callers: net_node.c, net_caller.c, net_check.c.
 */
#include "net_store.h"

#include "depot/depot.h"
#include "net_fiber.h"
#include "net_place.h"
#include "store/store_impl.h"

/* ---- opening and closing ---- */

static void wake(void *arg)
{
    net_soon(net_current, arg);
}

static bool sure(void *arg, uint64_t user)
{
    return fk_depot_sure(((struct net_node *)arg)->depot, user);
}

static bool is_private(void *ctx, uint32_t group)
{
    const struct net_node *p = ctx;

    for (uint32_t s = 0; s < p->n_spaces; s++)
        for (uint32_t ns = 0; ns < NET_NS; ns++)
            if (p->space[s].group[ns] == group)
                return net_current->home[p->home].private_ns >> ns & 1;
    net_fail(net_current, "a quota group that nobody has");
}

void net_store_open(struct net_world *w, struct net_node *p)
{
    const struct net_home *h = &w->home[p->home];
    char error[256] = "";
    struct fk_store_params sp = {
        .backend = &net_backend, .path = "sim", .capacity_bytes = w->place->capacity_bytes, .threads = h->store_threads,
        .max_queued = NET_OPS * NET_CHAIN * 2, .timeout_us = w->place->timeout_us, .scan_us = w->place->scan_us, .retry_us = 60000,
        .wake = wake, .sure = sure, .arg = p,
    };
    struct fk_depot_params dp = {
        .core = p->core, .peers = p->peers, .on_reuse = h->store_on_reuse, .timeout_us = w->place->timeout_us,
        .max_writes = 2 * h->store_threads, .is_private = is_private, .ctx = p,
    };

    if (!w->place->there || !h->has_store)
        return;
    net_fibers_of(p);
    int rc = fk_store_open(&sp, &p->store, error, sizeof(error));
    net_fibers_of(NULL);
    NET_CHECK(w, rc == 0, "fk_store_open: %d %s", rc, error);
    dp.store = p->store;
    rc = fk_depot_create(&dp, &p->depot);
    NET_CHECK(w, rc == 0, "fk_depot_create: %d", rc);
}

void net_store_space(struct net_world *w, struct net_node *p, uint32_t s)
{
    struct net_space *sp = &p->space[s];
    struct fk_store_space d = { .name = "model", .block_bytes = sp->slot_bytes };
    struct fk_depot_space ds = { .id = sp->id, .slot_bytes = sp->slot_bytes, .pool = sp->pool };
    char error[256] = "";

    if (!p->store)
        return;
    memcpy(d.fingerprint, w->type[sp->type].fingerprint, sizeof(d.fingerprint));
    net_fibers_of(p);
    int rc = fk_store_space(p->store, &d, &sp->store_id, error, sizeof(error));
    net_fibers_of(NULL);
    NET_CHECK(w, rc == 0, "fk_store_space: %d %s", rc, error);
    ds.store_id = sp->store_id;
    rc = fk_depot_space(p->depot, &ds);
    NET_CHECK(w, rc == 0, "fk_depot_space: %d", rc);
}

void net_store_close(struct net_world *w, struct net_node *p)
{
    if (!p->store)
        return;
    if (p->leaving) {
        net_fibers_of(p);
        bool closed = fk_store_close(p->store);
        net_fibers_of(NULL);
        NET_CHECK(w, closed && !p->fibers.len && !p->n_open, "node %u has closed its store and %zu threads go on", net_at(w, p),
                  p->fibers.len);
    } else {
        net_fibers_kill(p);
        while (p->n_open)
            net_file_closed(p, p->open[0]);
        if (w->place->evicts == p)
            w->place->evicts = NULL;    /* its lock is gone with it */
        store_free(p->store);
    }
    p->store = NULL;
}

void net_store_free(struct net_node *p)
{
    fk_depot_destroy(p->depot, false);
    p->depot = NULL;
}

/* ---- what goes on ---- */

void net_store_round(struct net_world *w, struct net_node *p)
{
    if (!p->store)
        return;
    net_fibers_run(w, p);
    (void)fk_depot_pump(p->depot, net_now(w, p));
    net_after(w, p);
}

uint64_t net_store_next(struct net_world *w, const struct net_node *p)
{
    if (!p->store)
        return UINT64_MAX;
    return fk_min(net_fibers_next(w, p), cs_real(net_client(w, p), fk_store_next_wakeup(p->store)));
}

void net_store_tell(struct net_world *w, struct net_node *p)
{
    if (p->store && fk_depot_tell(p->depot, p->untold.data, (uint32_t)p->untold.len))
        net_soon(w, p);
}

void net_store_used(struct net_world *w, struct net_node *p, uint32_t space, uint32_t ns, const struct fk_key *keys, uint32_t n)
{
    if (p->store && fk_depot_used(p->depot, p->space[space].id, p->space[space].group[ns], keys, n))
        net_soon(w, p);
}

/* From here on nothing is delivered that had its name before. */
void net_store_reset(struct net_world *w, struct net_node *p)
{
    if (!p->store)
        return;
    p->reset_serial = ++w->place->serial;
    w->place->lost++;
    fk_depot_reset(p->depot);
}

uint32_t net_store_reach(struct net_world *w, struct net_node *p, uint32_t space, const struct fk_key *keys, uint32_t n,
                         uint32_t known)
{
    const struct net_space *sp = &p->space[space];

    if (p->store)
        return fk_depot_reach(p->depot, sp->instance, sp->id, keys, n, known, net_now(w, p));
    return p->peers ? fk_peers_reach(p->peers, sp->instance, sp->id, keys, n, known, net_now(w, p)) : known;
}

bool net_store_hand_on(void *ctx, const struct fk_core_fetch *want)
{
    struct net_node *p = ctx;
    struct net_fetch *f = net_fetch_of(p, want->id);

    NET_CHECK(net_current, f && !f->stored, "a fetch is handed on that is none, or a second time");
    if (!p->store)
        return false;
    f->stored = fk_depot_fetch(p->depot, want, net_now(net_current, p));
    net_current->n.store_handed_on += f->stored;
    return f->stored;
}

/* ---- the rules ---- */

bool net_store_at_rest(const struct net_node *p)
{
    struct fk_depot_stats d = { 0 };

    if (p->store)
        fk_depot_get_stats(p->depot, &d);
    return !d.waiting && !d.fetches && !d.writes;
}

void net_store_check(struct net_world *w, struct net_node *p)
{
    const char *wrong = p->store && !w->no_self_check ? fk_depot_check(p->depot) : NULL;
    struct fk_store_stats st;

    NET_CHECK(w, !wrong, "fk_depot_check of node %u: %s", net_at(w, p), wrong);
    if (!p->store)
        return;
    fk_store_get_stats(p->store, &st);
    uint32_t most = w->home[p->home].store_threads;
    NET_CHECK(w, st.running <= most, "bounds: node %u reads and writes %u files, %u allowed", net_at(w, p), st.running, most);
}

/* What the node knows of the store is what is there. */
static void compare(struct net_world *w, struct net_node *p)
{
    struct fk_depot_stats d;

    fk_depot_get_stats(p->depot, &d);
    NET_CHECK(w, !d.late && !d.fetches && !d.writes && !d.waiting, "at rest: node %u has %u fetches and %u writes of the store, %u in "
              "quarantine", net_at(w, p), d.fetches, d.writes, d.late);
    NET_CHECK(w, fk_store_reads(p->store) && fk_store_writes(p->store), "at rest: the store is out of use at node %u", net_at(w, p));
    for (uint32_t k = 0; k < w->keys.len; k++) {
        uint32_t space = p->space_of[w->keys.data[k].family];
        if (space == FK_NONE)
            continue;
        bool there = net_place_has(w, p->space[space].type, w->keys.data[k].key);
        bool known = fk_store_has(p->store, p->space[space].store_id, &w->keys.data[k].key, 1);
        NET_CHECK(w, there == known, "truth: key %u is%s in the store, node %u believes otherwise", k, there ? "" : " not",
                  net_at(w, p));
        w->n.compared += there;
    }
}

void net_store_check_quiet(struct net_world *w)
{
    bool any = false;

    for (uint32_t i = 0; i < NET_NODES; i++)
        if (net_alive(w, i) && w->node[i].store) {
            compare(w, &w->node[i]);
            any = true;
        }
    NET_CHECK(w, !any || !w->place->capacity_bytes || net_place_bytes(w) <= w->place->capacity_bytes,
              "bounds: the store has %llu bytes of %llu", (unsigned long long)net_place_bytes(w),
              (unsigned long long)w->place->capacity_bytes);
}
