/*
 * net_world.c - one world: drawn from its seed; its keys and their bytes; time, which goes from one thing that is due
 * to the next; what goes wrong with nodes, network and Redis. Caller: net.c.
 */
#include <stdio.h>

#include "net.h"
#include "net_fiber.h"
#include "net_place.h"
#include "net_store.h"

struct net_world *net_current;

static const char *const names[NET_HOMES] = { "a", "b", "node-c", "node-cc", "e", "f" };

const char *net_name(uint32_t name)
{
    return names[name];
}

/* ---- keys and bytes ---- */

static void table_put(struct net_world *w, uint32_t k)
{
    uint32_t h = (uint32_t)w->keys.data[k].key.lo & (w->key_table_size - 1);

    while (w->key_table[h] != FK_NONE)
        h = (h + 1) & (w->key_table_size - 1);
    w->key_table[h] = k;
}

static void table_grow(struct net_world *w)
{
    w->key_table_size = w->key_table_size ? w->key_table_size * 2 : 1024;
    free(w->key_table);
    w->key_table = malloc(w->key_table_size * sizeof(uint32_t));
    if (!w->key_table)
        abort();
    memset(w->key_table, 0xff, w->key_table_size * sizeof(uint32_t));
    for (uint32_t k = 0; k < w->keys.len; k++)
        table_put(w, k);
}

uint32_t net_key_find(struct net_world *w, struct fk_key key)
{
    for (uint32_t h = (uint32_t)key.lo & (w->key_table_size - 1);; h = (h + 1) & (w->key_table_size - 1)) {
        uint32_t k = w->key_table[h];
        if (k == FK_NONE || fk_key_equal(w->keys.data[k].key, key))
            return k;
    }
}

static uint32_t intern(struct net_world *w, struct net_key key)
{
    uint32_t k = net_key_find(w, key.key);

    if (k != FK_NONE)
        return k;
    if (fk_vec_push(&w->keys, key))
        abort();
    if (w->keys.len * 2 > w->key_table_size)
        table_grow(w);
    else
        table_put(w, (uint32_t)w->keys.len - 1);
    return (uint32_t)w->keys.len - 1;
}

/* A fork of an old prompt at a random place, or a new one. */
static void new_prompt(struct net_world *w, uint32_t family)
{
    struct net_family *f = &w->family[family];
    bool full = f->n_prompts == NET_PROMPTS;
    struct net_prompt *p = &f->prompts[full ? net_below(w, NET_PROMPTS) : f->n_prompts];
    struct net_prompt n = { .ns = net_below(w, NET_NS), .n = net_range(w, 1, NET_CHAIN) };
    struct fk_key keys[NET_CHAIN];
    uint32_t keep = 0;

    if (f->n_prompts && !net_chance(w, 5)) {
        const struct net_prompt *old = &f->prompts[net_below(w, f->n_prompts)];
        n.ns = net_chance(w, 10) ? n.ns : old->ns;
        keep = net_below(w, fk_min(old->n, n.n) + 1);
        memcpy(n.tokens, old->tokens, sizeof(n.tokens));
    }
    for (uint32_t i = keep; i < n.n; i++)
        n.tokens[i] = net_below(w, f->alphabet);
    fk_key_chain(FK_KEY_XXH3, f->seed[n.ns], n.tokens, 1, n.n, keys);
    for (uint32_t i = 0; i < n.n; i++) {
        struct net_key k = { .key = keys[i], .parent_index = i ? n.keys[i - 1] : FK_NONE, .family = family,
                             .ns = n.ns };
        k.parent = i ? keys[i - 1] : (struct fk_key){ 0, 0 };
        n.keys[i] = intern(w, k);
    }
    *p = n;
    f->n_prompts += !full;
}

const struct net_prompt *net_pick_prompt(struct net_world *w, uint32_t family)
{
    struct net_family *f = &w->family[family];

    if (!f->n_prompts || (!w->quiet && net_chance(w, 40)))
        new_prompt(w, family);
    return &f->prompts[net_below(w, f->n_prompts)];
}

void net_fill(const struct net_world *w, uint32_t type, uint32_t key, uint32_t rank, void *buf)
{
    const struct fk_key *k = &w->keys.data[key].key;
    uint64_t x = k->lo ^ (k->hi << 17 | k->hi >> 47) ^ (uint64_t)(type * NET_RANKS + rank + 1) << 56, *p = buf;

    for (uint32_t i = 0; i < w->type[type].slice_bytes / 8; i++)
        p[i] = fk_rng_next(&x);
}

bool net_bytes_ok(const struct net_world *w, uint32_t type, uint32_t key, const void *slot)
{
    const struct net_type *t = &w->type[type];
    uint8_t want[NET_BYTES];

    for (uint32_t r = 0; r < t->ranks; r++) {
        net_fill(w, type, key, r, want);
        if (memcmp(want, (const uint8_t *)slot + (size_t)r * t->slice_bytes, t->slice_bytes))
            return false;
    }
    return true;
}

/* ---- a world from its seed ---- */

static void draw_types(struct net_world *w)
{
    static const uint32_t family_of[NET_TYPES] = { 0, 0, 1, 2 }, slices[] = { 32, 64, 64, 128 };

    w->n_types = net_range(w, 1, NET_TYPES);
    for (uint32_t t = 0; t < NET_TYPES; t++) {
        struct net_type *x = &w->type[t];
        *x = (struct net_type){ .family = family_of[t], .slice_bytes = slices[net_below(w, 4)],
                                .ranks = net_range(w, 1, NET_RANKS) };
        snprintf((char *)x->fingerprint, sizeof(x->fingerprint), "model-%u", t);
    }
    if (net_chance(w, 2)) {             /* blocks of the same size: only the fingerprint tells them apart */
        w->type[1].slice_bytes = w->type[0].slice_bytes;
        w->type[1].ranks = w->type[0].ranks;
    }
    for (uint32_t f = 0; f < NET_FAMILIES; f++) {
        char name[16] = "", family[16] = "";
        const char *parts[1] = { name };
        w->family[f].alphabet = net_range(w, 2, 3);
        snprintf(family, sizeof(family), "family-%u", f);
        for (uint32_t ns = 0; ns < NET_NS; ns++) {
            snprintf(name, sizeof(name), "ns%u", ns);
            w->family[f].seed[ns] = fk_key_seed(family, 16, parts, ns ? 1 : 0);
        }
    }
}

static void draw_core(struct net_world *w, struct fk_core_params *p)
{
    static const double thresholds[] = { 1.0, 1.0, 0.9, 0.7 };

    *p = (struct fk_core_params){ .max_spaces = NET_SPACES, .events = true };
    p->policy.kind = (enum fk_policy_kind)net_below(w, FK_POLICY_KINDS);
    p->policy.slru_protected_threshold = net_range(w, 1, 4);
    p->policy.seed = fk_rng_next(&w->rng);
    p->seed = fk_rng_next(&w->rng);
    p->evict_start_threshold = thresholds[net_below(w, 4)];
    p->evict_ratio = net_chance(w, 2) ? 0.05 : 0;
    p->write_policy = (enum fk_write_policy)net_below(w, 3);
    p->op_timeout_us = w->calm ? 30000000 : net_range(w, 20000, 800000);
    p->lease_timeout_us = net_range(w, 5000, 1000000);
    p->cancel_grace_us = net_range(w, 500, 50000);
    p->read_window_blocks = net_chance(w, 2) ? 0 : net_range(w, 1, 8);
    p->copies_go_first = net_chance(w, 2);
}

static void draw_home(struct net_world *w, uint32_t i)
{
    struct net_home *h = &w->home[i];
    bool taken[NET_FAMILIES] = { false };
    uint32_t first = net_below(w, w->n_types);

    for (uint32_t k = 0; k < w->n_types; k++) {
        uint32_t t = (first + k) % w->n_types, family = w->type[t].family;
        if (taken[family] || (h->n_spaces && net_chance(w, 4)))
            continue;
        taken[family] = true;
        h->type[h->n_spaces] = t;
        h->cpu_slots[h->n_spaces] = net_chance(w, 3) ? net_range(w, 4, 12) : net_range(w, 10, 80);
        h->ssd_slots[h->n_spaces] = net_chance(w, 3) ? 0 : net_range(w, 4, 120);
        h->pages[h->n_spaces] = net_range(w, 24, 100);
        w->disk[i][h->n_spaces] = calloc(h->ssd_slots[h->n_spaces] + 1, sizeof(struct net_ssd_slot));
        if (!w->disk[i][h->n_spaces++])
            abort();
    }
    draw_core(w, &h->core);
    h->private_ns = net_chance(w, 2) ? 0 : net_below(w, 1u << NET_NS);
    h->quotas = net_chance(w, 4);
    h->share_cpu = !net_chance(w, 8);
    h->share_ssd = net_chance(w, 2);
    h->staging = net_chance(w, 2) ? 0 : net_range(w, 1, 4);
    h->max_in_flight = net_chance(w, 2) ? 0 : net_range(w, 1, 16);
    h->fetch_us = w->calm ? 5000000 : net_range(w, 60000, 300000);
}

/* ---- starting and ending ---- */

static void start(struct net_world *w, uint32_t home, uint32_t name, bool twin)
{
    uint32_t i = 0;

    while (i < NET_NODES && net_alive(w, i))
        i++;
    if (i == NET_NODES)
        return;
    w->occupied[home] |= !twin;
    net_node_start(w, i, home, name, twin);
}

/* Something has come from Redis. */
static void serve(void *ctx, uint32_t i)
{
    struct net_world *w = ctx;

    net_node_cluster(w, &w->node[i]);
    net_soon(w, &w->node[i]);
}

struct net_world *net_world_new(uint64_t seed, bool verbose, bool no_self_check)
{
    static const uint32_t caps[] = { 3, 8, 40, 200 };
    struct net_world *w = calloc(1, sizeof(*w));

    if (!w)
        abort();
    net_current = w;
    w->seed = seed;
    w->rng = seed;
    w->rng = fk_rng_next(&w->rng);      /* neighbours must not share their streams */
    w->verbose = verbose;
    w->no_self_check = no_self_check;
    w->calm = net_chance(w, 5);
    w->fault_ppk = w->calm ? 0 : net_chance(w, 3) ? 0 : net_below(w, 150);
    w->slow_us = net_chance(w, 4) ? net_range(w, 400, 50000) : 400;
    w->net = (struct cs_net){ .redis = sr_new(), .rng = &w->rng, .serve = serve, .ctx = w, .now_us = 1000000 };
    w->net.ppm = (int64_t)net_below(w, 10000) - 5000;
    w->hub = fk_loopback_hub_create(net_range(w, 20, 400), net_read_fault, w);
    w->stream_cap = caps[net_below(w, 4)];
    table_grow(w);
    draw_types(w);
    w->n_homes = net_range(w, 2, NET_HOMES);
    for (uint32_t h = 0; h < w->n_homes; h++)
        draw_home(w, h);
    net_place_draw(w);
    for (uint32_t h = 0; h < w->n_homes; h++)
        start(w, h, h, false);
    return w;
}

static void add_counts(struct net_counts *to, const struct net_counts *from)
{
    for (size_t i = 0; i < sizeof(*to) / sizeof(uint64_t); i++)
        ((uint64_t *)to)[i] += ((const uint64_t *)from)[i];
}

void net_world_free(struct net_world *w, struct net_counts *total)
{
    for (uint32_t i = 0; i < NET_NODES; i++)
        if (net_alive(w, i))
            net_node_end(w, &w->node[i]);
    w->n.steps = w->step;
    add_counts(total, &w->n);
    net_place_free(w);
    cs_free(&w->net);
    fk_loopback_hub_destroy(w->hub);
    for (uint32_t h = 0; h < w->n_homes; h++)
        for (uint32_t s = 0; s < NET_SPACES; s++)
            free(w->disk[h][s]);
    fk_vec_free(&w->keys);
    fk_vec_free(&w->graves);
    free(w->key_table);
    free(w);
    net_current = NULL;
}

/* ---- time ---- */

static uint64_t first_node(struct net_world *w, uint32_t *who)
{
    uint64_t at = UINT64_MAX;

    for (uint32_t i = 0; i < NET_NODES; i++) {
        uint64_t t = net_runs(w, i) ? net_node_next(w, &w->node[i]) : UINT64_MAX;
        if (t < at) {
            at = t;
            *who = i;
        }
    }
    return at;
}

static void run_until(struct net_world *w, uint64_t end)
{
    for (;;) {
        uint64_t at_msg, at_node;
        uint32_t who = 0;
        size_t m = cs_first(&w->net, &at_msg);
        at_node = first_node(w, &who);
        if (fk_min(at_msg, at_node) > end)
            break;
        w->net.now_us = fk_max(w->net.now_us, fk_min(at_msg, at_node));
        if (at_msg <= at_node) {
            cs_deliver(&w->net, m);
            continue;
        }
        struct net_node *p = &w->node[who];
        net_node_round(w, p);
        net_check_deadlines(w, p);
        if (p->leaving && (fk_cluster_left(net_client(w, p)->c) || w->net.now_us >= p->leave_until_us))
            net_node_end(w, p);
    }
    w->net.now_us = fk_max(w->net.now_us, end);
}

/* ---- what goes wrong ---- */

static uint32_t any_node(struct net_world *w)
{
    uint32_t i = net_below(w, NET_NODES);

    for (uint32_t k = 0; k < NET_NODES; k++, i = (i + 1) % NET_NODES)
        if (net_alive(w, i))
            return i;
    return NET_NODES;
}

static void redis_fault(struct net_world *w)
{
    struct cs_net *n = &w->net;

    switch (net_below(w, 8)) {
    case 0: n->down = !n->down; break;
    case 1: sr_flush(n->redis); break;
    case 2: sr_copy(n->redis); break;
    case 3:                             /* a replica takes over; its clock is another */
        sr_become_copy(n->redis);
        n->offset_ms = (int64_t)net_below(w, 600) - 300;
        break;
    case 4: n->frozen_until_us = n->now_us + net_below(w, 3000000); break;
    case 5: case 6:
        for (uint32_t k = 1 + net_below(w, 3); k > 0; k--)
            sr_evict(n->redis, fk_rng_next(&w->rng));
        return;
    default: n->down = false;
    }
    for (uint32_t i = 0; i < NET_NODES; i++)    /* whoever fails over breaks connections */
        for (uint32_t k = 0; k < FK_CONNS; k++)
            if (net_runs(w, i) && n->client[i].conn[k].up && net_chance(w, 2))
                cs_close(n, i, k);
}

static void freeze(struct net_world *w, struct net_node *p)
{
    struct cs_client *cl = net_client(w, p);

    if (!cl->paused) {
        p->frozen_us = w->net.now_us;
        w->n.freezes++;
    }
    cl->paused = true;
    fk_loopback_away(p->transport, true);
    NET_TRACE(w, "node %u hangs", net_at(w, p));
}

static void thaw(struct net_world *w, struct net_node *p)
{
    struct cs_client *cl = net_client(w, p);

    if (!cl->paused)
        return;
    cl->paused = false;
    fk_loopback_away(p->transport, false);
    p->thawed_us = p->pump_us = w->net.now_us;
    p->transport_next = 0;
    NET_TRACE(w, "node %u goes on", net_at(w, p));
}

static void come_back(struct net_world *w)
{
    uint32_t h = net_below(w, w->n_homes);

    if (w->occupied[h])
        return;
    w->host_lost[h] = false;
    for (uint32_t s = 0; s < w->home[h].n_spaces && net_chance(w, 4); s++)      /* another machine */
        memset(w->disk[h][s], 0, (w->home[h].ssd_slots[s] + 1) * sizeof(struct net_ssd_slot));
    start(w, h, h, false);
}

/* Another process takes the name, while the first one runs or hangs. */
static void twin(struct net_world *w, struct net_node *p)
{
    uint32_t n = 0;

    for (uint32_t i = 0; i < NET_NODES; i++)
        n += net_alive(w, i) && w->node[i].name == p->name;
    if (n > 1)
        return;
    w->n.twins++;
    if (net_chance(w, 2))
        freeze(w, p);
    start(w, p->home, p->name, true);
}

static void kill_node(struct net_world *w, struct net_node *p)
{
    w->n.crashes++;
    p->leaving = false;
    w->host_lost[p->home] |= !p->twin && net_chance(w, 2);
    if (w->place->there && w->host_lost[p->home])
        net_place_power_loss(w, p->home);
    net_node_end(w, p);
}

static void leave(struct net_world *w, struct net_node *p)
{
    if (net_client(w, p)->paused || p->leaving)
        return;
    w->n.leaves++;
    p->leaving = true;
    p->leave_until_us = w->net.now_us + 300000;
    fk_cluster_leave(net_client(w, p)->c, net_now(w, p));
    net_soon(w, p);
}

/* Reads from one to the other are lost, one way or both. */
static void cut(struct net_world *w)
{
    uint32_t a = net_below(w, NET_NODES), b = net_below(w, NET_NODES);
    uint64_t until = w->net.now_us + net_below(w, 4000000);

    w->cut_us[a][b] = until;
    if (net_chance(w, 2))
        w->cut_us[b][a] = until;
}

static void node_fault(struct net_world *w)
{
    uint32_t i = any_node(w);

    if (i == NET_NODES) {
        come_back(w);
        return;
    }
    struct net_node *p = &w->node[i];
    switch (net_below(w, 12)) {
    case 0: case 1: kill_node(w, p); break;
    case 2: freeze(w, p); break;
    case 3: case 4: thaw(w, p); break;
    case 5: cut(w); break;
    case 6: w->cut_redis_us[p->twin ? NET_HOMES : p->home] = w->net.now_us + net_below(w, 6000000); break;
    case 7: leave(w, p); break;
    case 8: if (net_chance(w, 2)) twin(w, p); break;
    case 9: if (net_runs(w, i)) net_reset(w, p); break;
    default: come_back(w);
    }
}

/* Mostly little time goes by, sometimes much, so that leases run out. */
static uint64_t idle_us(struct net_world *w)
{
    uint32_t what = net_below(w, 100);

    return 1 + (what < 80 ? net_below(w, 300) : what < 97 ? net_below(w, 10000) : net_below(w, 400000));
}

void net_world_step(struct net_world *w)
{
    uint32_t what = net_below(w, 1000), i;

    run_until(w, w->net.now_us + idle_us(w));
    if (what < 3 && !w->calm)
        redis_fault(w);
    else if (what < 15 && !w->calm)
        node_fault(w);
    else if (what < 18 && !w->calm)
        sr_evict(w->net.redis, fk_rng_next(&w->rng));
    else if (what == 18 && net_chance(w, 4) && net_runs(w, i = net_below(w, NET_NODES)))
        net_reset(w, &w->node[i]);
    if (w->place->there && !w->calm && what >= 20 && what < 24)
        net_place_fault(w);
    i = any_node(w);
    if (i == NET_NODES)
        come_back(w);
    else if (net_runs(w, i) && !w->node[i].leaving)
        net_caller_step(w, &w->node[i]);
    if (net_runs(w, i = net_below(w, NET_NODES)) && net_chance(w, 4))
        net_spy(w, &w->node[i]);
    net_mix(w, w->net.now_us);
    if (w->step % 16 == 0)
        net_check_step(w);
}

/* ---- everything is well again ---- */

static bool at_rest(struct net_world *w)
{
    for (uint32_t i = 0; i < NET_NODES; i++) {
        const struct net_node *p = &w->node[i];
        struct fk_core_work work;
        if (!net_alive(w, i))
            continue;
        work = fk_core_work(p->core);
        if (net_open_ops(p) || p->ios.len || p->fetches.len || p->grants.len || work.jobs || work.ssd || work.fetches ||
            !net_store_at_rest(p))
            return false;
    }
    return true;
}

static void settle(struct net_world *w, uint64_t at_least_us)
{
    uint64_t start = w->net.now_us;

    do {
        run_until(w, w->net.now_us + 50000);
        NET_CHECK(w, w->net.now_us < start + at_least_us + 60000000, "the nodes do not come to rest");
    } while (w->net.now_us < start + at_least_us || !at_rest(w));
}

/* What others are said to have is had: the best test of what they were told. */
static void ask_all(struct net_world *w)
{
    for (uint32_t i = 0; i < NET_NODES; i++) {
        for (uint32_t k = 0; net_runs(w, i) && k < 3; k++) {
            net_check_hits(w, &w->node[i]);
            settle(w, 3000000);
        }
    }
}

/* All but one die, and it has what it had, and what is in the store. */
static void one_is_left(struct net_world *w, uint32_t who)
{
    struct net_node *p = &w->node[who];
    bool silent = net_chance(w, 2);

    NET_TRACE(w, "node %u is left", who);
    for (uint32_t i = 0; i < NET_NODES; i++) {
        if (i == who || !net_alive(w, i))
            continue;
        w->n.crashes++;
        net_node_end(w, &w->node[i]);
    }
    for (uint32_t h = 0; h < w->n_homes; h++)
        w->host_lost[h] = silent;
    for (int k = 0; k < 3; k++) {
        net_check_left(w, p, silent);
        settle(w, 100);
    }
    settle(w, 2 * NET_TTL_US);
    for (int k = 0; k < 3; k++) {
        net_check_hits(w, p);
        settle(w, 3000000);
    }
    for (uint32_t h = 0; h < w->n_homes; h++) {
        w->host_lost[h] = false;
        if (!w->occupied[h])
            start(w, h, h, false);
    }
}

void net_world_quiet(struct net_world *w)
{
    NET_TRACE(w, "quiet");
    w->quiet = w->net.quiet = true;
    w->net.down = false;
    w->net.frozen_until_us = 0;
    memset(w->cut_redis_us, 0, sizeof(w->cut_redis_us));
    memset(w->cut_us, 0, sizeof(w->cut_us));
    net_place_quiet(w);
    for (uint32_t i = 0; i < NET_NODES; i++) {
        if (!net_alive(w, i))
            continue;
        thaw(w, &w->node[i]);
        net_fibers_hurry(w, &w->node[i], 1000);
    }
    settle(w, 20000000);
    net_check_quiet(w);
    ask_all(w);
    net_check_quiet(w);
    uint32_t left = w->place->there && !w->calm && net_chance(w, 3) ? any_node(w) : NET_NODES;
    if (left < NET_NODES && w->node[left].store)
        one_is_left(w, left);
    w->quiet = w->net.quiet = false;
}
