/*
 * replay_belady.c - the offline bound: what a cache of the given size could hit at best when
 * it knows the future, and may leave a block out (bypass).
 *
 * First pass, backwards: for each place of the trace, at which request its id comes next.
 * Second pass, forwards: a heap holds what is cached, the latest next use on top (of one
 * request's, the deepest). A request's ids enter with their new next use; while there is too
 * much, the top leaves. An id never used again does not enter.
 *
 *     request      r0: a b c     r1: a b d     r2: a b c
 *     next use     1 1 2         2 2 -         - - -          capacity 3: c stays, d is bypassed
 *
 * A block is used whenever its descendants are, so its next use is never later than theirs:
 * the cache stays prefix-closed by itself. An id's blocks (512/N) leave from the back.
 * No I/O but the clock. Caller: replay.c.
 */
#include "replay.h"

#include "base/clock.h"

#define NEVER UINT32_MAX

struct item { uint64_t rank; uint32_t id; };       /* rank: next use << 32 | depth */

struct bound {
    const struct replay_plan *plan;
    uint32_t *next_use;             /* of each place of the trace */
    uint64_t *rank;                 /* of each id now; items of the heap with another are stale */
    uint32_t *held;                 /* blocks of each id that are cached */
    FK_VEC(struct item) heap;
    uint64_t used, evicted;
};

static int find_next_uses(struct bound *b)
{
    const struct trace *t = b->plan->trace;
    fk_autofree uint32_t *last = malloc(((size_t)t->unique + 1) * sizeof(*last));

    if (!last)
        return -ENOMEM;
    memset(last, 0xff, (size_t)t->unique * sizeof(*last));
    for (size_t r = t->requests.len; r-- > 0;) {
        const struct trace_request *req = &t->requests.data[r];
        for (uint64_t i = req->first_id; i < req->first_id + req->n_ids; i++) {
            b->next_use[i] = last[t->ids.data[i]];
            last[t->ids.data[i]] = (uint32_t)r;
        }
    }
    return 0;
}

static int heap_push(struct bound *b, struct item item)
{
    if (fk_vec_reserve(&b->heap, b->heap.len + 1))
        return -ENOMEM;
    struct item *h = b->heap.data;
    size_t i = b->heap.len++;
    for (; i && h[(i - 1) / 2].rank < item.rank; i = (i - 1) / 2)
        h[i] = h[(i - 1) / 2];
    h[i] = item;
    return 0;
}

static void heap_pop(struct bound *b)
{
    struct item *h = b->heap.data;
    size_t n = --b->heap.len, i = 0;

    for (size_t child; (child = 2 * i + 1) < n; i = child) {
        if (child + 1 < n && h[child + 1].rank > h[child].rank)
            child++;
        if (h[child].rank <= h[n].rank)
            break;
        h[i] = h[child];
    }
    h[i] = h[n];
}

/* Items that say what is no longer so pile up: now and then only the true ones are kept. */
static void heap_compact(struct bound *b)
{
    size_t n = b->heap.len;

    b->heap.len = 0;
    for (size_t i = 0; i < n; i++) {
        struct item item = b->heap.data[i];
        if (b->held[item.id] && b->rank[item.id] == item.rank)
            (void)heap_push(b, item);       /* never grows: what is there moves to the front */
    }
}

static uint32_t count_hits(const struct bound *b, const struct trace_request *r)
{
    const uint32_t *ids = trace_ids(b->plan->trace, r);
    uint32_t hits = 0;

    for (uint32_t i = 0; i < r->n_ids; i++) {
        hits += b->held[ids[i]];
        if (b->held[ids[i]] < b->plan->subs)
            break;
    }
    return hits;
}

static void leave(struct bound *b, uint32_t id, uint32_t blocks)
{
    b->held[id] -= blocks;
    b->used -= blocks;
}

static void make_room(struct bound *b)
{
    while (b->used > b->plan->cpu_slots) {
        struct item top = b->heap.data[0];
        if (!b->held[top.id] || b->rank[top.id] != top.rank) {
            heap_pop(b);
            continue;
        }
        uint32_t over = (uint32_t)fk_min(b->used - b->plan->cpu_slots, (uint64_t)b->held[top.id]);
        leave(b, top.id, over);
        b->evicted += over;
        if (!b->held[top.id])
            heap_pop(b);
    }
}

static int use_request(struct bound *b, const struct trace_request *r)
{
    const uint32_t *ids = trace_ids(b->plan->trace, r);

    for (uint32_t i = 0; i < r->n_ids; i++) {
        uint32_t id = ids[i], next = b->next_use[r->first_id + i];
        if (next == NEVER) {
            leave(b, id, b->held[id]);
            continue;
        }
        b->used += b->plan->subs - b->held[id];
        b->held[id] = b->plan->subs;
        b->rank[id] = (uint64_t)next << 32 | i;
        if (heap_push(b, (struct item){ b->rank[id], id }))
            return -ENOMEM;
    }
    make_room(b);
    if (b->heap.len > 4ull * b->plan->cpu_slots + 65536)
        heap_compact(b);
    return 0;
}

static int run(struct bound *b, struct replay_result *res)
{
    const struct trace *t = b->plan->trace;

    for (size_t i = 0; i < t->requests.len && !replay_stopped(); i++) {
        const struct trace_request *r = &t->requests.data[i];
        uint32_t hits = count_hits(b, r);
        int rc = use_request(b, r);
        if (rc)
            return rc;
        if (replay_note_request(res, r, hits, 0))
            replay_sample(res, &(struct replay_totals){ .evicted_blocks = b->evicted, .used = { b->used, 0 } });
        if (i % 256 == 0)
            replay_progress(res);
    }
    res->totals.evicted_blocks = b->evicted;
    return 0;
}

int replay_run_belady(const struct replay_plan *p, struct replay_result *res)
{
    const struct trace *t = p->trace;
    struct bound b = {
        .plan = p,
        .next_use = malloc((t->ids.len + 1) * sizeof(*b.next_use)),
        .rank = calloc((size_t)t->unique + 1, sizeof(*b.rank)),
        .held = calloc((size_t)t->unique + 1, sizeof(*b.held)),
    };
    int rc = b.next_use && b.rank && b.held ? find_next_uses(&b) : -ENOMEM;

    if (!rc) {
        replay_result_start(res);
        rc = run(&b, res);
        replay_result_stop(res);
    }
    if (rc)
        fprintf(stderr, "flexkv replay: out of memory\n");
    free(b.next_use);
    free(b.rank);
    free(b.held);
    fk_vec_free(&b.heap);
    return rc ? 1 : 0;
}
