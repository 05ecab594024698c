/*
 * policy_auto.c - our own policy: lru, or by hit density where that has shown itself better.
 *
 * Density (density.h) knows blocks by class: at a branch, where requests part (how often used),
 * or in a session's tail (how many turns, and whether new in the last turn and how near its
 * end). All of a tail is used again together, so a tail is evicted as a whole, from its leaf
 * up. Victims are looked for among a sample of the evictable leaves; newcomers worth less than
 * the victim they would need are not stored (which is what protects against thrash).
 *
 * Whether the model fits the load can't be known beforehand, and where it does not, it loses.
 * So both are tried: two small shadow caches see a sample of the blocks of every request, one
 * under lru, one under density, both at the tier's capacity scaled down as the sample is
 * (spatial sampling: Waldspurger et al., FAST 2015). The tier follows density only as long as
 * its shadow hits clearly more.
 *
 *   used, admit --> model (one per group)
 *               \-> sampled keys of the request --> shadow lru | shadow density   (per tier)
 *                                                        `---- who leads? ---> victim, admit
 *
 * Entry words: aux[0] class, aux[1] turns; both serve all tiers. Shadows are indexes of their
 * own (index.h) whose lanes have the policy fk_policy_density.
 */
#include "index/density.h"
#include "index/index.h"
#include "index/policies.h"

#define SAMPLE 64u                  /* leaves looked at for a victim */
#define NEAR_END 16u                /* newcomers: blocks that count as near the end */
#define SHADOW_SLOTS 2048u          /* a shadow has at least so many, if the tier has */
#define SHADOW_RATE_MAX 32u
#define LEAD 0.04                  /* of all blocks density must hit so much more to be followed ... */
#define KEEP_LEAD 0.015             /* ... and so much to stay so */
#define EVIDENCE_CAPACITIES 4u      /* blocks compared before it can be, in shadow capacities */
#define MEMORY_CAPACITIES 16u       /* half-life of the comparison, in shadow capacities */

struct shadow {
    struct fk_index index;
    uint32_t space, group;
    double hits;
};

struct duel {
    struct shadow lru, density;
    double blocks, seen;            /* compared: fading, and in all */
    uint32_t rate, slots;
    bool on;                        /* density leads */
};

struct lane_state {
    struct fk_density *model;
    struct duel *duel;              /* NULL: always by density (a shadow's lane) */
    bool refuses;                   /* newcomers that are worth less than what would have to go */
    uint32_t next_victim;           /* parent of the last one: the rest of its tail */
    uint64_t rng;
};

/* The cpu lane's: what the whole group shares. */
struct group_state {
    struct lane_state lane;         /* first */
    struct fk_density *model;
    struct fk_key last_hit;         /* end of the known part of the request being collected */
    uint32_t tick;
    FK_VEC(struct fk_key) request;  /* its keys */
};

/* ---- classes ---- */

static unsigned turn_class(unsigned turns)
{
    return turns < 2 ? 0 : turns < 3 ? 1 : turns < 5 ? 2 : turns < 9 ? 3 : 4;
}

static unsigned class_used(unsigned turns)
{
    return FK_DENSITY_BRANCHES + 4 * turn_class(turns) + 3;
}

static unsigned class_new(unsigned turns, uint32_t left)
{
    return FK_DENSITY_BRANCHES + 4 * turn_class(turns) + (left == 0 ? 0 : left < NEAR_END ? 1 : 2);
}

static bool is_branch(const struct fk_entry *e)
{
    return e->aux[0] < FK_DENSITY_BRANCHES;
}

static unsigned class_branch(const struct fk_entry *e)
{
    return fk_min(31u - (unsigned)__builtin_clz(e->freq + 1u), FK_DENSITY_BRANCHES - 1);
}

static unsigned turns_after(const struct fk_entry *anchor)
{
    return !anchor || is_branch(anchor) ? 1 : anchor->aux[1];
}

/* Marks branches and the tail of a chain that is used now. train: the model learns, too. */
static void label(struct fk_index *ix, const uint32_t *entries, uint32_t n, uint32_t tick,
                  struct fk_density *train)
{
    uint32_t start = 0;

    for (uint32_t i = 0; i < n; i++) {
        struct fk_entry *e = &ix->entries[entries[i]];
        bool last = i + 1 == n;
        if (!last && ix->entries[entries[i + 1]].atime == e->atime)
            continue;
        if (!last || is_branch(e)) {    /* what follows is older: requests part here */
            e->aux[0] = (uint8_t)class_branch(e);
        } else {
            e->aux[1] = (uint8_t)fk_min(e->aux[1] + 1, 255);
            e->aux[0] = (uint8_t)class_used(e->aux[1]);
        }
        for (; train && start <= i; start++)
            fk_density_use(train, ix->entries[entries[start]].key, e->aux[0], tick);
    }
}

/* ---- a lane by density ---- */

static float worth(const struct lane_state *s, const struct fk_entry *e, uint32_t tick)
{
    return fk_density_of(s->model, e->aux[0], tick - e->atime);
}

static bool evictable_now(const struct fk_lane *lane, uint32_t entry)
{
    return entry != FK_NONE &&
           fk_entry_in(&lane->index->entries[entry], lane->tier) == FK_READY &&
           lane->index->entries[entry].pos[lane->tier] != FK_NONE;
}

static uint32_t density_victim(struct fk_lane *lane, uint32_t tick)
{
    struct lane_state *s = lane->state;
    const struct fk_heap *h = &lane->heap[0];
    const struct fk_entry *entries = lane->index->entries;

    if (evictable_now(lane, s->next_victim))
        return s->next_victim;
    uint32_t n = fk_min(h->len, SAMPLE), best = h->items[0].entry;   /* the oldest is always one */
    float least = worth(s, &entries[best], tick);
    for (uint32_t i = 0; i < n; i++) {
        uint32_t at = h->len <= SAMPLE ? i : fk_rng_below(&s->rng, h->len);
        uint32_t entry = h->items[at].entry;
        float w = worth(s, &entries[entry], tick);
        if (w < least || (w == least && entries[entry].atime < entries[best].atime)) {
            least = w;
            best = entry;
        }
    }
    s->next_victim = best;
    return best;
}

static void density_remove(struct fk_lane *lane, struct fk_entry *e, bool evicted)
{
    struct lane_state *s = lane->state;

    s->next_victim = FK_NONE;
    if (!evicted || e->parent == FK_NONE)
        return;
    struct fk_entry *p = &lane->index->entries[e->parent];
    if (p->atime != e->atime)
        return;
    if (p->freq && e->freq && !is_branch(p)) {      /* it is the tail's end now */
        p->aux[0] = e->aux[0];
        p->aux[1] = e->aux[1];
    }
    if (!p->tier_children[lane->tier])
        s->next_victim = e->parent;
}

static uint32_t density_admit(struct fk_lane *lane, const struct fk_newcomers *nc, uint32_t tick)
{
    struct lane_state *s = lane->state;

    if (!s->refuses || nc->room >= nc->n || !lane->heap[0].len)
        return nc->n;
    const struct fk_entry *victim = &lane->index->entries[density_victim(lane, tick)];
    unsigned class_ = class_new(turns_after(nc->anchor), nc->n - 1 - nc->room);
    return fk_density_of(s->model, class_, 0) < worth(s, victim, tick) ? nc->room : nc->n;
}

static void auto_placed(struct fk_lane *lane, struct fk_entry *e, const struct fk_entry *anchor,
                        uint32_t left)
{
    e->aux[1] = (uint8_t)turns_after(anchor);
    e->aux[0] = (uint8_t)class_new(e->aux[1], left);
}

static void density_used(struct fk_lane *lane, const uint32_t *entries, uint32_t n, uint32_t tick)
{
    label(lane->index, entries, n, tick, NULL);
}

static uint32_t by_age(struct fk_lane *lane, const struct fk_entry *e)
{
    return e->atime;
}

static int density_init(struct fk_lane *lane, const struct fk_policy_params *params)
{
    struct lane_state *s = lane->state = calloc(1, sizeof(*s));

    if (!s)
        return -ENOMEM;
    *s = (struct lane_state){ .model = params->density, .refuses = params->refuses,
                              .next_victim = FK_NONE, .rng = params->seed };
    return 0;
}

const struct fk_policy_ops fk_policy_density = {
    .name = "density", .rank_counts = true, .init = density_init, .fini = fk_policy_free_state,
    .remove = density_remove, .score = by_age, .victim = density_victim, .used = density_used,
    .admit = density_admit, .placed = auto_placed,
};

/* ---- shadows ---- */

static int shadow_init(struct shadow *sh, enum fk_policy_kind kind, const struct lane_state *of,
                       uint32_t slots, uint64_t seed)
{
    struct fk_index_params params = {
        .max_spaces = 1, .seed = seed,
        .policy = { .kind = kind, .seed = seed, .density = of->model, .refuses = of->refuses },
    };
    uint32_t n[FK_TIERS] = { slots, 0 };
    int rc = fk_index_init(&sh->index, &params);

    if (!rc)
        rc = fk_index_space_add(&sh->index, n, 0, 1, &sh->space);
    if (!rc)
        sh->group = sh->index.spaces[sh->space].default_group;
    return rc;
}

static void shadow_store(struct shadow *sh, struct fk_key key, uint32_t *parent, uint32_t anchor,
                         uint32_t left, uint32_t tick)
{
    struct fk_index *ix = &sh->index;
    uint32_t slot, entry = fk_index_add(ix, key, *parent, sh->group, tick);

    if (entry == FK_NONE)
        return;
    fk_index_take_slots(ix, sh->group, FK_TIER_CPU, 1, &slot);
    fk_index_fill(ix, entry, FK_TIER_CPU, slot);
    fk_index_placed(ix, entry, anchor, left);
    fk_index_ready(ix, entry, FK_TIER_CPU, tick);
    if (*parent != FK_NONE)
        fk_index_unpin(ix, *parent);
    *parent = entry;                /* stays pinned until its child is there */
}

static bool shadow_make_room(struct shadow *sh, uint32_t tick)
{
    struct fk_index *ix = &sh->index;

    if (fk_index_room(ix, sh->group, FK_TIER_CPU, 1, 0))
        return true;
    uint32_t victim = fk_index_victim(ix, sh->group, FK_TIER_CPU, tick);
    if (victim == FK_NONE)
        return false;
    fk_index_drop(ix, victim, FK_TIER_CPU, true);
    return true;
}

/* One request, as the node would serve it. `scratch` has room for n entries. */
static void shadow_request(struct shadow *sh, const struct fk_key *keys, uint32_t n, uint32_t tick,
                           uint32_t *scratch)
{
    struct fk_index *ix = &sh->index;
    uint32_t hits = fk_index_known(ix, keys, n, scratch), parent = FK_NONE;

    sh->hits += hits;
    fk_index_used(ix, scratch, hits, tick);
    for (uint32_t i = 0; i < hits; i++)
        fk_index_touch(ix, scratch[i], tick);
    if (hits) {
        parent = scratch[hits - 1];
        fk_index_pin(ix, parent);
    }
    uint32_t anchor = parent;
    for (uint32_t i = hits; i < n; i++) {
        struct fk_newcomers nc = {
            .n = n - i, .room = fk_index_room(ix, sh->group, FK_TIER_CPU, n - i, 0),
            .anchor = anchor == FK_NONE ? NULL : &ix->entries[anchor],
        };
        /* A request seen in part only (its start was no get) leaves a chain without its start. */
        if (fk_index_find(ix, keys[i]) != FK_NONE ||
            !fk_index_admit(ix, sh->group, FK_TIER_CPU, &nc, tick) || !shadow_make_room(sh, tick))
            break;
        shadow_store(sh, keys[i], &parent, anchor, n - 1 - i, tick);
    }
    if (parent != FK_NONE)
        fk_index_unpin(ix, parent);
}

/* ---- duels ---- */

static void duel_free(struct duel *d)
{
    if (!d)
        return;
    fk_index_fini(&d->lru.index);
    fk_index_fini(&d->density.index);
    free(d);
}

static struct duel *duel_new(const struct lane_state *of, uint32_t capacity, uint64_t seed)
{
    struct duel *d = calloc(1, sizeof(*d));

    if (!d)
        return NULL;
    d->rate = 1;
    while (d->rate < SHADOW_RATE_MAX && capacity / (2 * d->rate) >= SHADOW_SLOTS)
        d->rate *= 2;
    d->slots = fk_max(capacity / d->rate, 1u);
    if (shadow_init(&d->lru, FK_POLICY_LRU, of, d->slots, seed) ||
        shadow_init(&d->density, FK_POLICY_DENSITY, of, d->slots, seed)) {
        duel_free(d);
        return NULL;
    }
    return d;
}

static void duel_request(struct duel *d, const struct fk_key *keys, uint32_t n, uint32_t tick)
{
    struct fk_key sample[512];
    uint32_t scratch[512], k = 0;

    for (uint32_t i = 0; i < n && k < fk_array_size(sample); i++)
        if (!((keys[i].lo ^ keys[i].hi) >> 32 & (d->rate - 1)))
            sample[k++] = keys[i];
    if (!k)
        return;
    shadow_request(&d->lru, sample, k, tick, scratch);
    shadow_request(&d->density, sample, k, tick, scratch);
    d->blocks += k;
    d->seen += k;
    if (d->blocks > (double)d->slots * MEMORY_CAPACITIES * 2) {
        d->blocks /= 2;
        d->lru.hits /= 2;
        d->density.hits /= 2;
    }
    double lead = (d->density.hits - d->lru.hits) / d->blocks;
    d->on = lead > (d->on ? KEEP_LEAD : LEAD) && d->seen >= (double)d->slots * EVIDENCE_CAPACITIES;
}

/* ---- auto ---- */

static struct group_state *group_state(struct fk_lane *lane)
{
    return lane->index->groups[lane->group].lane[FK_TIER_CPU].state;
}

/* How long a block lasts in the shadow that goes by lru. */
static uint32_t oldest_age(const struct shadow *sh, uint32_t tick)
{
    const struct fk_heap *h = &sh->index.groups[sh->group].lane[FK_TIER_CPU].heap[0];

    return h->len ? tick - sh->index.entries[h->items[0].entry].atime : 0;
}

static void end_request(struct fk_lane *cpu_lane)
{
    struct group_state *g = cpu_lane->state;
    struct fk_group *group = &cpu_lane->index->groups[cpu_lane->group];

    for (int t = 0; g->request.len && t < FK_TIERS; t++) {
        struct lane_state *s = group->lane[t].state;
        if (s && s->duel)
            duel_request(s->duel, g->request.data, (uint32_t)g->request.len, g->tick);
    }
    if (g->request.len)
        fk_density_request(g->model, g->tick, oldest_age(&g->lane.duel->lru, g->tick));
    g->request.len = 0;
    g->last_hit = (struct fk_key){ 0, 0 };
}

static void auto_used(struct fk_lane *lane, const uint32_t *entries, uint32_t n, uint32_t tick)
{
    struct group_state *g = lane->state;
    const struct fk_entry *all = lane->index->entries;

    end_request(lane);
    label(lane->index, entries, n, tick, g->model);
    for (uint32_t i = 0; i < n; i++)
        (void)fk_vec_push(&g->request, all[entries[i]].key);
    g->last_hit = all[entries[n - 1]].key;
    g->tick = tick;
}

/* Newcomers belong to the request whose known part they continue. */
static void learn_newcomers(struct fk_lane *lane, const struct fk_newcomers *nc, uint32_t tick)
{
    struct group_state *g = lane->state;
    unsigned turns = turns_after(nc->anchor);

    if (!nc->anchor || !fk_key_equal(nc->anchor->key, g->last_hit))
        end_request(lane);
    for (uint32_t i = 0; i < nc->n; i++) {
        fk_density_use(g->model, nc->keys[i], class_new(turns, nc->n - 1 - i), tick);
        (void)fk_vec_push(&g->request, nc->keys[i]);
    }
    if (nc->n)
        g->last_hit = nc->keys[nc->n - 1];
    g->tick = tick;
}

static uint32_t auto_admit(struct fk_lane *lane, const struct fk_newcomers *nc, uint32_t tick)
{
    struct lane_state *s = lane->state;

    if (nc->keys)
        learn_newcomers(lane, nc, tick);
    return s->duel->on ? density_admit(lane, nc, tick) : nc->n;
}

static uint32_t auto_victim(struct fk_lane *lane, uint32_t tick)
{
    struct lane_state *s = lane->state;

    return s->duel->on ? density_victim(lane, tick) : lane->heap[0].items[0].entry;
}

static void auto_fini(struct fk_lane *lane)
{
    struct group_state *g = group_state(lane);
    struct lane_state *s = lane->state;

    if (s)
        duel_free(s->duel);
    if (lane->tier == FK_TIER_CPU && g) {
        fk_density_destroy(g->model);
        fk_vec_free(&g->request);
    }
    fk_policy_free_state(lane);
}

static int auto_init(struct fk_lane *lane, const struct fk_policy_params *params)
{
    bool cpu = lane->tier == FK_TIER_CPU;
    struct lane_state *s = lane->state = calloc(1, cpu ? sizeof(struct group_state) : sizeof(*s));

    if (!s)
        return -ENOMEM;
    if (cpu)
        group_state(lane)->model = fk_density_create(lane->capacity);
    s->model = group_state(lane)->model;
    s->next_victim = FK_NONE;
    s->rng = params->seed + lane->tier;
    if (!s->model)
        return -ENOMEM;
    /* What the cpu tier refuses would not reach the SSD behind it either. */
    uint32_t space = lane->index->groups[lane->group].space;
    s->refuses = !cpu || !lane->index->spaces[space].slots[FK_TIER_SSD].n;
    s->duel = duel_new(s, lane->capacity, params->seed);
    return s->duel ? 0 : -ENOMEM;
}

static void auto_rebase(struct fk_lane *lane, uint32_t by)
{
    struct lane_state *s = lane->state;

    fk_index_rebase(&s->duel->lru.index, by);
    fk_index_rebase(&s->duel->density.index, by);
    if (lane->tier == FK_TIER_CPU)
        fk_density_rebase(s->model, by);
}

static uint64_t auto_bytes(const struct fk_lane *lane)
{
    const struct lane_state *s = lane->state;

    return fk_index_bytes(&s->duel->lru.index) + fk_index_bytes(&s->duel->density.index) +
           (lane->tier == FK_TIER_CPU ? fk_density_bytes(s->model) : 0);
}

const struct fk_policy_ops fk_policy_auto = {
    .name = "auto", .rank_counts = true, .init = auto_init, .fini = auto_fini,
    .remove = density_remove, .score = by_age, .victim = auto_victim, .used = auto_used,
    .admit = auto_admit, .placed = auto_placed, .rebase = auto_rebase, .bytes = auto_bytes,
};
