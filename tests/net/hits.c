/*
 * hits.c - what peers are worth: a trace over N nodes that read from each other, against the same memory in one node. Real
 * cores; copies and reads are done at once, and everybody knows at once what the others hold, so this is what the
 * placing of blocks makes of it, not the network.
 *
 * usage: net_hits TRACE BLOCKS NODES...     BLOCKS: of all nodes together; 64 nodes at most
 */
#include <stdio.h>

#include "base/log.h"
#include "node/core.h"
#include "trace.h"

#define MAX_NODES 64u

struct node { struct fk_core *core; uint32_t space, instance, group; };

struct world {
    struct node node[MAX_NODES];
    uint32_t n;
    const struct trace *trace;
    struct fk_key *key;                 /* of each id */
    uint64_t *held;                     /* of each id: a bit for each node */
    FK_VEC(struct fk_key) keys;         /* of the request */
    FK_VEC(uint32_t) pages;
    uint32_t *id_of, mask;              /* key -> id */
    uint64_t now, blocks, local, remote, fetches;
};

static uint32_t id_find(const struct world *w, struct fk_key k)
{
    uint32_t h = (uint32_t)k.lo & w->mask;

    while (w->key[w->id_of[h]].lo != k.lo)
        h = (h + 1) & w->mask;
    return w->id_of[h];
}

static void note_events(struct world *w, uint32_t i)
{
    struct fk_core_event e[256];
    uint32_t n;

    while ((n = fk_core_take_events(w->node[i].core, e, 256)) > 0) {
        for (uint32_t k = 0; k < n; k++) {
            uint64_t *held = &w->held[id_find(w, e[k].key)], bit = UINT64_C(1) << i;
            *held = e[k].stored ? *held | bit : *held & ~bit;
        }
    }
}

/* Read from whoever has it (the first of them); he sees that. */
static int32_t fetch(struct world *w, struct fk_key key)
{
    uint64_t held = w->held[id_find(w, key)];
    uint32_t slot, loan;

    if (!held)
        return -ENOENT;
    const struct node *p = &w->node[__builtin_ctzll(held)];
    if (fk_core_lend(p->core, p->space, key, FK_TIER_CPU, &slot, &loan))
        return -ENOENT;
    fk_core_loan_end(p->core, loan);
    return 0;
}

/* All that the core asks for is done; returns the blocks of the operation that are there. */
static uint32_t finish(struct world *w, uint32_t i)
{
    struct fk_core *core = w->node[i].core;
    struct flexkv_completion c;
    struct fk_core_fetch f[64];
    struct fk_core_fetch_done d[64];
    struct fk_job *job;

    while (!fk_core_take_completions(core, &c, 1)) {
        while ((job = fk_core_take_job(core, w->node[i].instance, 0)))
            fk_core_job_done(core, job, job->n, 0, w->now);
        uint32_t n = fk_core_take_fetches(core, f, 64);
        for (uint32_t k = 0; k < n; k++)
            d[k] = (struct fk_core_fetch_done){ .id = f[k].id, .status = fetch(w, f[k].key) };
        if (n)
            fk_core_fetch_done(core, d, n, w->now);
        w->fetches += n;
        if (fk_core_next_wakeup(core) <= w->now)
            fk_core_tick(core, w->now);
    }
    note_events(w, i);
    return c.blocks_ok;
}

static void request(struct world *w, uint32_t i, const struct trace_request *r)
{
    const struct node *p = &w->node[i];
    const uint32_t *ids = trace_ids(w->trace, r);
    struct fk_core_op_args args = { .pages = w->pages.data };
    struct flexkv_match_result m;
    uint32_t got = 0, reach;
    uint64_t op;

    for (uint32_t k = 0; k < r->n_ids; k++)
        w->keys.data[k] = w->key[ids[k]];
    fk_core_match(p->core, p->instance, w->keys.data, r->n_ids, w->now, &m);
    for (reach = m.blocks; reach < r->n_ids && w->held[ids[reach]]; reach++)
        ;
    uint32_t here = m.blocks;
    if (reach > here)
        fk_core_match_extend(p->core, p->instance, p->group, w->keys.data, reach, w->now, &m);
    if (m.lease && fk_core_get(p->core, m.lease, 0, m.blocks, &args, w->now, &op) == 0)
        got = finish(w, i);
    w->blocks += r->n_ids;
    w->local += fk_min(got, here);
    w->remote += got - fk_min(got, here);
    if (got < r->n_ids && fk_core_put(p->core, p->instance, p->group, w->keys.data, r->n_ids, got, &args, w->now, &op) == 0)
        (void)finish(w, i);
}

static void open_nodes(struct world *w, uint32_t n, uint32_t blocks, bool copies_go_first)
{
    struct fk_core_params p = { .max_spaces = 1, .events = true, .policy = { .kind = FK_POLICY_LRU, .seed = 1 },
                                .evict_start_threshold = 1, .op_timeout_us = UINT64_C(3600000000),
                                .lease_timeout_us = 1000000, .copies_go_first = copies_go_first, .seed = 1 };
    struct fk_core_space_params s = { .cpu_slots = blocks / n };

    w->n = n;
    for (uint32_t i = 0; i < n; i++) {
        struct node *x = &w->node[i];
        if (fk_core_create(&p, &x->core) || fk_core_space_add(x->core, &s, &x->space) ||
            fk_core_instance_add(x->core, x->space, 1, &x->instance) || fk_core_space_elsewhere(x->core, x->space))
            abort();
        x->group = fk_core_space_default_group(x->core, x->space);
    }
}

static double run(struct world *w, uint32_t n, uint32_t blocks, bool copies_go_first, double one)
{
    uint64_t rng = 1;

    memset(w->held, 0, w->trace->unique * sizeof(*w->held));
    w->blocks = w->local = w->remote = w->fetches = 0;
    open_nodes(w, n, blocks, copies_go_first);
    for (size_t i = 0; i < w->trace->requests.len; i++) {
        w->now = 1000000 + w->trace->requests.data[i].time_us;
        request(w, fk_rng_below(&rng, n), &w->trace->requests.data[i]);
    }
    for (uint32_t i = 0; i < n; i++)
        fk_core_destroy(w->node[i].core);
    double ratio = (double)(w->local + w->remote) / (double)w->blocks;
    printf("%5u nodes of %7u blocks, copies %s: hit ratio %.4f (here %.4f, at peers %.4f)", n, blocks / n,
           copies_go_first ? "go first" : "as all  ", ratio, (double)w->local / (double)w->blocks,
           (double)w->remote / (double)w->blocks);
    printf(n > 1 ? ", %.4f of one big node's; %llu blocks read from peers\n" : "\n", ratio / one,
           (unsigned long long)w->fetches);
    return ratio;
}

static void make_keys(struct world *w)
{
    uint32_t slots = 1024;
    uint64_t rng = 7;

    while (slots < 2 * w->trace->unique)
        slots *= 2;
    w->mask = slots - 1;
    w->key = calloc(w->trace->unique + 1, sizeof(*w->key));     /* the last: of empty places */
    w->held = calloc(w->trace->unique, sizeof(*w->held));
    w->id_of = malloc(slots * sizeof(*w->id_of));
    if (!w->key || !w->held || !w->id_of || fk_vec_reserve(&w->keys, w->trace->max_ids) ||
        fk_vec_reserve(&w->pages, w->trace->max_ids))
        abort();
    memset(w->pages.data, 0, w->trace->max_ids * sizeof(uint32_t));
    for (uint32_t h = 0; h < slots; h++)
        w->id_of[h] = w->trace->unique;
    for (uint32_t id = 0; id < w->trace->unique; id++) {
        w->key[id] = (struct fk_key){ fk_rng_next(&rng) | 1, fk_rng_next(&rng) };
        uint32_t h = (uint32_t)w->key[id].lo & w->mask;
        while (w->id_of[h] != w->trace->unique)
            h = (h + 1) & w->mask;
        w->id_of[h] = id;
    }
}

int main(int argc, char **argv)
{
    struct trace trace = { 0 };
    struct world w = { .trace = &trace };
    char error[256];

    if (argc < 4 || trace_load(&trace, (const char *const *)&argv[1], 1, 0, 0, error, sizeof(error))) {
        fprintf(stderr, "net_hits: %s\n", argc < 4 ? "usage: net_hits TRACE BLOCKS NODES..." : error);
        return 2;
    }
    fk_log_set_level(FK_LOG_OFF);
    make_keys(&w);
    uint32_t blocks = (uint32_t)strtoul(argv[2], NULL, 10);
    double one = run(&w, 1, blocks, false, 1);
    for (int i = 3; i < argc; i++) {
        uint32_t n = (uint32_t)strtoul(argv[i], NULL, 10);
        if (n < 2 || n > MAX_NODES || blocks / n == 0)
            continue;
        run(&w, n, blocks, false, one);
        run(&w, n, blocks, true, one);
    }
    free(w.key);
    free(w.held);
    free(w.id_of);
    fk_vec_free(&w.keys);
    fk_vec_free(&w.pages);
    trace_free(&trace);
    return 0;
}
