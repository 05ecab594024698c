/*
 * policy_arc.c - ARC (Megiddo, Modha, FAST 2003) over leaves: T1 holds blocks used once, T2
 * those used more often, both by last use; ghosts of each say which of them should be larger.
 *
 * aux: bit 0 = in T2. The ghost lists are approximate (policies.h), which moves the target
 * a little less exactly than the original.
 */
#include "index/index.h"
#include "index/policies.h"

#define IN_T2 1u

struct arc {
    uint32_t n_t1;              /* resident blocks of T1, leaves or not */
    uint32_t target;            /* how many T1 should have */
    uint32_t b1, b2;            /* ghosts in each list, about */
    struct fk_ghost ghost[2];
};

static int arc_init(struct fk_lane *lane, const struct fk_policy_params *params)
{
    struct arc *a = lane->state = calloc(1, sizeof(*a));

    if (!a)
        return -ENOMEM;
    int rc = fk_ghost_init(&a->ghost[0], lane->capacity);
    return rc ? rc : fk_ghost_init(&a->ghost[1], lane->capacity);
}

static void arc_fini(struct fk_lane *lane)
{
    struct arc *a = lane->state;

    if (a) {
        fk_ghost_fini(&a->ghost[0]);
        fk_ghost_fini(&a->ghost[1]);
    }
    fk_policy_free_state(lane);
}

static void arc_insert(struct fk_lane *lane, struct fk_entry *e)
{
    struct arc *a = lane->state;
    uint32_t c = lane->capacity;

    if (fk_ghost_take(&a->ghost[0], e, c)) {
        uint32_t step = fk_max(a->b1 ? a->b2 / a->b1 : 1u, 1u);
        a->target = fk_min(a->target + step, c);
        a->b1 -= a->b1 > 0;
        e->aux[lane->tier] = IN_T2;
    } else if (fk_ghost_take(&a->ghost[1], e, c)) {
        uint32_t step = fk_max(a->b2 ? a->b1 / a->b2 : 1u, 1u);
        a->target -= fk_min(a->target, step);
        a->b2 -= a->b2 > 0;
        e->aux[lane->tier] = IN_T2;
    } else {
        e->aux[lane->tier] = 0;
        a->n_t1++;
    }
}

static void arc_hit(struct fk_lane *lane, struct fk_entry *e, uint32_t tick)
{
    struct arc *a = lane->state;

    if (!(e->aux[lane->tier] & IN_T2)) {
        e->aux[lane->tier] |= IN_T2;
        a->n_t1--;
    }
}

static void arc_remove(struct fk_lane *lane, struct fk_entry *e, bool evicted)
{
    struct arc *a = lane->state;
    bool t2 = e->aux[lane->tier] & IN_T2;
    uint32_t *n = t2 ? &a->b2 : &a->b1;

    a->n_t1 -= !t2;
    if (!evicted)
        return;
    fk_ghost_add(&a->ghost[t2], e);
    if (*n < lane->capacity)
        ++*n;
}

static uint32_t arc_score(struct fk_lane *lane, const struct fk_entry *e)
{
    return e->atime;
}

static unsigned arc_heap(struct fk_lane *lane, const struct fk_entry *e)
{
    return e->aux[lane->tier] & IN_T2;
}

static uint32_t arc_victim(struct fk_lane *lane, uint32_t tick)
{
    struct arc *a = lane->state;
    bool from_t1 = lane->heap[0].len && (a->n_t1 > a->target || !lane->heap[1].len);

    return lane->heap[from_t1 ? 0 : 1].items[0].entry;
}

const struct fk_policy_ops fk_policy_arc = {
    .name = "arc", .init = arc_init, .fini = arc_fini, .insert = arc_insert, .hit = arc_hit,
    .remove = arc_remove, .score = arc_score, .heap = arc_heap, .victim = arc_victim,
};
