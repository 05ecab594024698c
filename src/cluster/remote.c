/* remote.c - see remote.h. */
#include "cluster/remote.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

#include "base/plant.h"

#define SHARDS 4096u
#define BUCKET_ELEMENTS 3u
#define BATCH 16u                       /* look-ups in flight together */
#define MAX_LOAD_PERCENT 85u

struct element {
    uint32_t print_lo, print_hi;
    uint32_t slot, generation;
    uint16_t node;
    uint8_t space;
    uint8_t state;                      /* USED, and the tier */
};
enum { TIER = 1, USED = 0x80 };

struct bucket {
    struct element e[BUCKET_ELEMENTS];
    uint16_t past;                      /* elements that wanted to be here but went further; saturates */
    uint16_t unused;
};
_Static_assert(sizeof(struct bucket) == 64, "one cache line");

struct shard {
    struct bucket *buckets;
    uint32_t n_buckets, n_elements;     /* elements: dead ones too */
};

struct node {
    bool used, dead;
    uint64_t until_us;
    uint32_t cost_us[2];
    uint64_t blocks[2];
    uint8_t ours[FK_CLUSTER_SPACES];
};

struct fk_remote {
    struct shard shards[SHARDS];
    struct node nodes[FK_REMOTE_NODES];
    uint64_t max_holders, seed;
    uint64_t holders, dead, bytes, refused, crowded;
    uint32_t n_nodes, sweep_shard, sweep_bucket;
};

int fk_remote_create(const struct fk_remote_params *params, struct fk_remote **out)
{
    struct fk_remote *r = calloc(1, sizeof(*r));

    if (!r)
        return -ENOMEM;
    r->max_holders = params->max_holders ? params->max_holders : UINT64_C(1) << 32;
    r->seed = params->seed;
    r->bytes = sizeof(*r);
    *out = r;
    return 0;
}

void fk_remote_destroy(struct fk_remote *r)
{
    if (!r)
        return;
    for (uint32_t i = 0; i < SHARDS; i++)
        free(r->shards[i].buckets);
    free(r);
}

/* ---- places ---- */

static uint64_t print_of(const struct fk_remote *r, struct fk_key key)
{
    return XXH3_64bits_withSeed(&key, sizeof(key), r->seed);
}

static uint64_t element_print(const struct element *e)
{
    return (uint64_t)e->print_hi << 32 | e->print_lo;
}

static uint32_t shard_of(uint64_t print)
{
    return (uint32_t)(print >> 52);
}

static uint32_t home_in(const struct shard *s, uint64_t print)
{
    return (uint32_t)((uint64_t)(uint32_t)(print >> 20) * s->n_buckets >> 32);
}

static uint32_t next_bucket(const struct shard *s, uint32_t at)
{
    return at + 1 < s->n_buckets ? at + 1 : 0;
}

static bool has_print(const struct element *e, uint64_t print)
{
    return e->print_lo == (uint32_t)print && e->print_hi == (uint32_t)(print >> 32) &&
           (e->state & USED);
}

static void place(struct shard *s, const struct element *e)
{
    uint32_t at = home_in(s, element_print(e));

    for (;;) {
        struct bucket *b = &s->buckets[at];
        for (uint32_t i = 0; i < BUCKET_ELEMENTS; i++) {
            if (!(b->e[i].state & USED)) {
                b->e[i] = *e;
                s->n_elements++;
                return;
            }
        }
        if (b->past < UINT16_MAX)
            b->past++;
        at = next_bucket(s, at);
    }
}

/* The element leaves: those on its way forget that it passed. */
static void erase(struct fk_remote *r, struct shard *s, uint32_t bucket, uint32_t i)
{
    struct element *e = &s->buckets[bucket].e[i];
    struct node *node = &r->nodes[e->node];

    for (uint32_t at = home_in(s, element_print(e)); at != bucket; at = next_bucket(s, at))
        if (s->buckets[at].past < UINT16_MAX)
            s->buckets[at].past--;
    node->blocks[e->state & TIER]--;
    if (node->dead)
        r->dead--;
    else
        r->holders--;
    if (node->dead && node->blocks[0] + node->blocks[1] == 0)
        node->used = false;
    e->state = 0;
    s->n_elements--;
}

static int grow(struct fk_remote *r, struct shard *s)
{
    uint32_t n = s->n_buckets + s->n_buckets / 4 + 2, old_n = s->n_buckets;
    struct bucket *old = s->buckets;
    void *fresh;

    if (posix_memalign(&fresh, sizeof(struct bucket), n * sizeof(struct bucket)))
        return -ENOMEM;
    memset(fresh, 0, n * sizeof(struct bucket));
    s->buckets = fresh;
    s->n_buckets = n;
    s->n_elements = 0;
    for (uint32_t b = 0; b < old_n; b++)
        for (uint32_t i = 0; i < BUCKET_ELEMENTS; i++)
            if (old[b].e[i].state & USED)
                place(s, &old[b].e[i]);
    free(old);
    r->bytes += (n - old_n) * sizeof(struct bucket);
    return 0;
}

/* ---- nodes ---- */

uint16_t fk_remote_node_add(struct fk_remote *r)
{
    for (uint16_t i = 0; i < FK_REMOTE_NODES; i++) {
        struct node *node = &r->nodes[i];
        if (!node->used) {
            memset(node, 0, sizeof(*node));
            memset(node->ours, 0xff, sizeof(node->ours));
            node->used = true;
            r->n_nodes++;
            return i;
        }
    }
    return FK_REMOTE_NO_NODE;
}

void fk_remote_node_drop(struct fk_remote *r, uint16_t number)
{
    struct node *node = &r->nodes[number];
    uint64_t blocks = node->blocks[0] + node->blocks[1];

    node->dead = true;
    node->until_us = 0;
    node->used = blocks > 0;
    r->holders -= blocks;
    r->dead += blocks;
    r->n_nodes--;
}

void fk_remote_node_lease(struct fk_remote *r, uint16_t node, uint64_t until_us)
{
    r->nodes[node].until_us = until_us;
}

void fk_remote_node_cost(struct fk_remote *r, uint16_t node, const uint32_t cost_us[2])
{
    memcpy(r->nodes[node].cost_us, cost_us, sizeof(r->nodes[node].cost_us));
}

void fk_remote_node_spaces(struct fk_remote *r, uint16_t node, const uint8_t ours[FK_CLUSTER_SPACES])
{
    memcpy(r->nodes[node].ours, ours, FK_CLUSTER_SPACES);
}

uint64_t fk_remote_node_blocks(const struct fk_remote *r, uint16_t node, unsigned tier)
{
    return r->nodes[node].blocks[tier];
}

/* ---- changes ---- */

/* The node's element for the block, in *bucket and *place; and how many others hold it. */
static bool locate(const struct fk_remote *r, const struct shard *s, uint64_t print, uint16_t node,
                   uint8_t space, unsigned tier, uint32_t *bucket, uint32_t *where, uint32_t *others)
{
    uint32_t at = s->n_buckets ? home_in(s, print) : 0;

    *others = 0;
    for (uint32_t probes = 0; probes < s->n_buckets; probes++) {
        const struct bucket *b = &s->buckets[at];
        for (uint32_t i = 0; i < BUCKET_ELEMENTS; i++) {
            const struct element *e = &b->e[i];
            if (!has_print(e, print))
                continue;
            if (e->node == node && e->space == space && (e->state & TIER) == tier) {
                *bucket = at;
                *where = i;
                return true;
            }
            *others += !r->nodes[e->node].dead;
        }
        if (!b->past)
            return false;
        at = next_bucket(s, at);
    }
    return false;
}

static int insert(struct fk_remote *r, struct shard *s, const struct element *e, uint32_t others)
{
    int rc = 0;

    if (others >= FK_REMOTE_HOLDERS) {
        r->crowded++;
        return 0;
    }
    if (r->holders + r->dead >= r->max_holders)
        rc = -ENOSPC;
    else if ((s->n_elements + 1) * 100u > s->n_buckets * BUCKET_ELEMENTS * MAX_LOAD_PERCENT)
        rc = grow(r, s);
    if (rc) {
        r->refused++;
        return rc;
    }
    place(s, e);
    r->holders++;
    r->nodes[e->node].blocks[e->state & TIER]++;
    return 0;
}

void fk_remote_prefetch(const struct fk_remote *r, const struct fk_change *c)
{
    uint64_t print = print_of(r, c->key);
    const struct shard *s = &r->shards[shard_of(print)];

    if (s->n_buckets)
        __builtin_prefetch(&s->buckets[home_in(s, print)], 1);
}

int fk_remote_apply(struct fk_remote *r, uint16_t node, const struct fk_change *c)
{
    uint64_t print = print_of(r, c->key);
    struct shard *s = &r->shards[shard_of(print)];
    uint32_t bucket, where, others;
    bool found = locate(r, s, print, node, c->space, c->tier, &bucket, &where, &others);

    if (c->removed) {
        if (found)
            erase(r, s, bucket, where);
        return 0;
    }
    if (found) {
        if (FK_BUG(110))
            return 0;
        s->buckets[bucket].e[where].slot = c->slot;
        s->buckets[bucket].e[where].generation = c->generation;
        return 0;
    }
    struct element e = { .print_lo = (uint32_t)print, .print_hi = (uint32_t)(print >> 32),
                         .slot = c->slot, .generation = c->generation, .node = node,
                         .space = c->space, .state = (uint8_t)(USED | c->tier) };
    return insert(r, s, &e, others);
}

bool fk_remote_sweep(struct fk_remote *r, uint32_t n)
{
    while (r->dead > 0 && n > 0) {
        struct shard *s = &r->shards[r->sweep_shard];
        if (r->sweep_bucket >= s->n_buckets) {
            r->sweep_bucket = 0;
            r->sweep_shard = (r->sweep_shard + 1) % SHARDS;
            n--;
            continue;
        }
        for (uint32_t i = 0; i < BUCKET_ELEMENTS; i++) {
            const struct element *e = &s->buckets[r->sweep_bucket].e[i];
            if ((e->state & USED) && r->nodes[e->node].dead)
                erase(r, s, r->sweep_bucket, i);
        }
        r->sweep_bucket++;
        n--;
    }
    return r->dead > 0;
}

/* ---- look-ups ---- */

struct choice { const struct element *best, *prev; uint32_t cost, prev_cost; };

static void consider(const struct fk_remote *r, const struct element *e, uint8_t space, uint16_t prev,
                     uint64_t now_us, struct choice *c)
{
    const struct node *node = &r->nodes[e->node];
    unsigned tier = e->state & TIER;

    if ((!FK_BUG(101) && node->until_us <= now_us) || node->dead ||
        (!FK_BUG(111) && node->ours[e->space] != space))
        return;
    uint32_t cost = node->cost_us[tier];
    if (!c->best || cost < c->cost) {
        c->best = e;
        c->cost = cost;
    }
    if (e->node == prev && (!c->prev || cost < c->prev_cost)) {
        c->prev = e;
        c->prev_cost = cost;
    }
}

static bool find_print(const struct fk_remote *r, uint8_t space, uint64_t print, uint16_t prev,
                       uint64_t now_us, struct fk_remote_hit *out)
{
    const struct shard *s = &r->shards[shard_of(print)];
    uint32_t at = s->n_buckets ? home_in(s, print) : 0;
    struct choice c = { 0 };

    for (uint32_t probes = 0; probes < s->n_buckets; probes++) {
        const struct bucket *b = &s->buckets[at];
        for (uint32_t i = 0; i < BUCKET_ELEMENTS; i++)
            if (has_print(&b->e[i], print))
                consider(r, &b->e[i], space, prev, now_us, &c);
        if (!b->past)
            break;
        at = next_bucket(s, at);
    }
    const struct element *e = c.prev && c.prev_cost <= c.cost + c.cost / 8 ? c.prev : c.best;
    if (!e)
        return false;
    *out = (struct fk_remote_hit){ .node = e->node, .tier = e->state & TIER, .space = e->space,
                                   .slot = e->slot, .generation = e->generation };
    return true;
}

bool fk_remote_find(const struct fk_remote *r, uint8_t space, struct fk_key key, uint16_t prev,
                    uint64_t now_us, struct fk_remote_hit *out)
{
    return find_print(r, space, print_of(r, key), prev, now_us, out);
}

static bool is_local(const uint64_t *local, uint32_t i)
{
    return local && (local[i / 64] >> (i % 64) & 1);
}

uint32_t fk_remote_extend(const struct fk_remote *r, uint8_t space, const struct fk_key *keys,
                          uint32_t n, uint32_t known, const uint64_t *local, uint64_t now_us,
                          struct fk_remote_hit *hits)
{
    uint64_t print[BATCH];
    uint16_t prev = FK_REMOTE_NO_NODE;

    for (uint32_t i = 0; i < known; i++)
        hits[i].node = FK_REMOTE_NO_NODE;
    for (uint32_t i = known; i < n; i += BATCH) {
        uint32_t batch = fk_min(n - i, BATCH);
        for (uint32_t k = 0; k < batch; k++) {      /* their cache misses overlap */
            print[k] = print_of(r, keys[i + k]);
            const struct shard *s = &r->shards[shard_of(print[k])];
            if (s->n_buckets)
                __builtin_prefetch(&s->buckets[home_in(s, print[k])]);
        }
        for (uint32_t k = 0; k < batch; k++) {
            struct fk_remote_hit *hit = &hits[i + k];
            hit->node = FK_REMOTE_NO_NODE;
            if (is_local(local, i + k))
                continue;
            if (!find_print(r, space, print[k], prev, now_us, hit))
                return i + k;
            prev = hit->node;
        }
    }
    return n;
}

/* ---- what it takes ---- */

void fk_remote_get_stats(const struct fk_remote *r, struct fk_remote_stats *out)
{
    *out = (struct fk_remote_stats){ .holders = r->holders, .dead = r->dead, .bytes = r->bytes,
                                     .refused = r->refused, .crowded = r->crowded,
                                     .nodes = r->n_nodes };
}

bool fk_remote_holds(const struct fk_remote *r, uint16_t node, uint8_t node_space, struct fk_key key,
                     unsigned tier, uint32_t *slot, uint32_t *generation)
{
    uint64_t print = print_of(r, key);
    const struct shard *s = &r->shards[shard_of(print)];
    uint32_t bucket, where, others;

    if (!locate(r, s, print, node, node_space, tier, &bucket, &where, &others))
        return false;
    *slot = s->buckets[bucket].e[where].slot;
    *generation = s->buckets[bucket].e[where].generation;
    return true;
}

/* Counts what passed each bucket anew. */
static const char *check_shard(const struct shard *s, uint32_t number)
{
    fk_autofree uint32_t *past = calloc(s->n_buckets + 1, sizeof(*past));
    uint32_t n = 0;

    if (!past)
        return "no memory to check";
    for (uint32_t b = 0; b < s->n_buckets; b++) {
        for (uint32_t i = 0; i < BUCKET_ELEMENTS; i++) {
            const struct element *e = &s->buckets[b].e[i];
            if (!(e->state & USED))
                continue;
            n++;
            if (shard_of(element_print(e)) != number)
                return "an element is in a wrong shard";
            for (uint32_t at = home_in(s, element_print(e)); at != b; at = next_bucket(s, at))
                past[at]++;
        }
    }
    for (uint32_t b = 0; b < s->n_buckets; b++)
        if (s->buckets[b].past != past[b] && s->buckets[b].past != UINT16_MAX)
            return "a bucket's count of elements that passed it is wrong";
    return n == s->n_elements ? NULL : "a shard's count of elements is wrong";
}

const char *fk_remote_check(const struct fk_remote *r)
{
    uint64_t alive = 0, dead = 0, elements = 0;

    for (uint32_t i = 0; i < SHARDS; i++) {
        const char *wrong = check_shard(&r->shards[i], i);
        if (wrong)
            return wrong;
        elements += r->shards[i].n_elements;
    }
    for (uint32_t i = 0; i < FK_REMOTE_NODES; i++) {
        const struct node *node = &r->nodes[i];
        if (node->used)
            *(node->dead ? &dead : &alive) += node->blocks[0] + node->blocks[1];
    }
    if (alive != r->holders || dead != r->dead || elements != alive + dead)
        return "the nodes' blocks do not add up";
    return NULL;
}
