/*
 * policy_s3fifo.c - S3-FIFO (Yang et al., SOSP 2023) over leaves, and the ghost list.
 * A small queue (a tenth) for newcomers, a main queue, a ghost list: a newcomer not used again
 * leaves soon; one that returns while it is remembered goes straight to the main queue.
 *
 * aux: bit 0 = in the main queue, bits 1-2 = uses since it came to its queue (at most 3).
 * rank: tick at which it came to its queue.
 */
#include "index/index.h"
#include "index/policies.h"

#define IN_MAIN 1u
#define USES(aux) ((aux) >> 1 & 3u)

struct s3fifo { uint32_t n_small; struct fk_ghost ghost; };

/* ---- ghosts ---- */

int fk_ghost_init(struct fk_ghost *g, uint32_t capacity)
{
    *g = (struct fk_ghost){ .n = fk_max(capacity, 16u) };
    g->words = calloc(g->n, sizeof(*g->words));
    while ((g->n >> g->shift) > 0x3fff)
        g->shift++;             /* 16-bit times then cover four times the capacity */
    return g->words ? 0 : -ENOMEM;
}

void fk_ghost_fini(struct fk_ghost *g)
{
    free(g->words);
    g->words = NULL;
}

static uint32_t *ghost_place(struct fk_ghost *g, const struct fk_entry *e, uint32_t *fingerprint)
{
    uint64_t h = (e->key.lo ^ (e->key.hi << 1)) * 0x9e3779b97f4a7c15ull;

    *fingerprint = ((uint32_t)h & 0xffff) | 1;
    return &g->words[((h >> 32) * (uint64_t)g->n) >> 32];
}

void fk_ghost_add(struct fk_ghost *g, const struct fk_entry *e)
{
    uint32_t fp, *word = ghost_place(g, e, &fp);

    g->clock++;
    *word = fp << 16 | (g->clock >> g->shift & 0xffff);
}

bool fk_ghost_take(struct fk_ghost *g, const struct fk_entry *e, uint32_t span)
{
    uint32_t fp, *word = ghost_place(g, e, &fp);

    if (*word >> 16 != fp)
        return false;
    uint32_t age = ((g->clock >> g->shift) - *word) & 0xffff;
    *word = 0;
    return age <= span >> g->shift;
}

/* ---- s3fifo ---- */

static int s3_init(struct fk_lane *lane, const struct fk_policy_params *params)
{
    struct s3fifo *s = lane->state = calloc(1, sizeof(*s));

    return s ? fk_ghost_init(&s->ghost, lane->capacity) : -ENOMEM;
}

static void s3_fini(struct fk_lane *lane)
{
    if (lane->state)
        fk_ghost_fini(&((struct s3fifo *)lane->state)->ghost);
    fk_policy_free_state(lane);
}

static void s3_insert(struct fk_lane *lane, struct fk_entry *e)
{
    struct s3fifo *s = lane->state;
    bool known = fk_ghost_take(&s->ghost, e, lane->capacity);

    e->aux[lane->tier] = known ? IN_MAIN : 0;
    s->n_small += !known;
}

static void s3_hit(struct fk_lane *lane, struct fk_entry *e, uint32_t tick)
{
    if (USES(e->aux[lane->tier]) < 3)
        e->aux[lane->tier] += 2;
}

static void s3_remove(struct fk_lane *lane, struct fk_entry *e, bool evicted)
{
    struct s3fifo *s = lane->state;

    if (e->aux[lane->tier] & IN_MAIN)
        return;
    s->n_small--;
    if (evicted)
        fk_ghost_add(&s->ghost, e);
}

static uint32_t s3_score(struct fk_lane *lane, const struct fk_entry *e)
{
    return e->rank;
}

static unsigned s3_heap(struct fk_lane *lane, const struct fk_entry *e)
{
    return e->aux[lane->tier] & IN_MAIN;
}

static uint32_t s3_victim(struct fk_lane *lane, uint32_t tick)
{
    struct s3fifo *s = lane->state;

    for (;;) {
        bool small = lane->heap[0].len &&
                     (s->n_small > lane->capacity / 10 || !lane->heap[1].len);
        struct fk_entry *e = &lane->index->entries[lane->heap[!small].items[0].entry];
        uint8_t *aux = &e->aux[lane->tier];
        if (!USES(*aux))
            return fk_entry_number(lane->index, e);
        if (small) {
            *aux = IN_MAIN;         /* used while young: on to the main queue */
            s->n_small--;
        } else {
            *aux = (uint8_t)(*aux - 2);
        }
        e->rank = tick;
        fk_lane_update(lane, e);
    }
}

const struct fk_policy_ops fk_policy_s3fifo = {
    .name = "s3fifo", .init = s3_init, .fini = s3_fini, .insert = s3_insert, .hit = s3_hit,
    .remove = s3_remove, .score = s3_score, .heap = s3_heap, .victim = s3_victim,
};
