/*
 * bench_events.c - what KV events add to a put: the core's calls as the API makes them under its lock, with
 * and without names and journal, in alternation. The index is full, so that each new block pushes one out:
 * two events a block.
 *
 *   put_512_events      the call (names are written), and its share of what it pushed out
 *   done_512_events     the end of its copies: 512 blocks are announced
 *   events_ns_per_block both, beyond the same without events, for each block
 *   take_ns_per_event   a subscription takes them (its view, the copy of tokens)
 */
#include <stdio.h>

#include "api/feed.h"
#include "base/clock.h"
#include "base/util.h"
#include "bench.h"
#include "events/announce.h"
#include "node/core.h"

#define CHAIN 512u
#define SLOTS (64u * CHAIN)
#define TOKENS_PER_BLOCK 16u
#define RUNS 401

struct world {
    struct fk_core *core;
    struct fk_names *names;             /* NULL: events are off */
    struct fk_journal journal;
    struct fk_key keys[CHAIN];
    uint64_t hashes[CHAIN];
    uint32_t pages[CHAIN], slots[CHAIN], tokens[CHAIN * TOKENS_PER_BLOCK];
    uint64_t rng;
};

static int make_world(struct world *w, bool events)
{
    struct fk_core_params params = {
        .max_spaces = 1, .policy = { .kind = FK_POLICY_LRU }, .evict_start_threshold = 1,
        .op_timeout_us = 1u << 30, .lease_timeout_us = 1u << 30, .seed = 1, .events = events,
    };
    struct fk_core_space_params space = { .cpu_slots = SLOTS };
    uint32_t id, instance;

    w->rng = 42;
    for (uint32_t i = 0; i < CHAIN * TOKENS_PER_BLOCK; i++)
        w->tokens[i] = i * 7919;
    if (fk_core_create(&params, &w->core) || fk_core_space_add(w->core, &space, &id) ||
        fk_core_instance_add(w->core, id, 1, &instance))
        return -ENOMEM;
    if (events && (fk_journal_init(&w->journal, 16 * FK_MIB) ||
                   fk_names_create(TOKENS_PER_BLOCK, SLOTS, 0, &w->names)))
        return -ENOMEM;
    return 0;
}

static void free_world(struct world *w)
{
    fk_core_destroy(w->core);
    fk_names_destroy(w->names);
    fk_journal_fini(&w->journal);
    free(w);
}

/* As fk_node_events_drain and fk_node_events_name do. */
static void drain(struct world *w)
{
    struct fk_core_event e[64];
    uint32_t n;

    while ((n = fk_core_take_events(w->core, e, fk_array_size(e))) > 0)
        for (uint32_t i = 0; i < n; i++)
            fk_announce(&w->journal, w->names, &e[i]);
}

static void name_blocks(struct world *w)
{
    for (uint32_t i = 0; i < CHAIN; i++) {
        struct fk_name name = { .hash = w->hashes[i], .parent = i ? w->hashes[i - 1] : 0, .root = !i };
        if (w->slots[i] != FK_NONE)
            fk_names_set(w->names, w->slots[i], &name, w->tokens + i * TOKENS_PER_BLOCK);
    }
}

static void one_put(struct world *w, double *put_us, double *done_us)
{
    struct fk_core_op_args args = { .pages = w->pages, .slots = w->names ? w->slots : NULL };
    struct flexkv_completion c;
    struct fk_job *job;
    uint64_t op;

    for (uint32_t i = 0; i < CHAIN; i++) {
        w->keys[i] = (struct fk_key){ fk_rng_next(&w->rng), fk_rng_next(&w->rng) };
        w->hashes[i] = w->keys[i].lo;
    }
    uint64_t t0 = fk_clock_ns();
    fk_core_put(w->core, 0, fk_core_space_default_group(w->core, 0), w->keys, CHAIN, 0, &args, 0, &op);
    if (w->names) {
        drain(w);
        name_blocks(w);
    }
    uint64_t t1 = fk_clock_ns();
    while ((job = fk_core_take_job(w->core, 0, 0)))
        fk_core_job_done(w->core, job, job->n, 0, 0);
    if (w->names)
        drain(w);
    uint64_t t2 = fk_clock_ns();
    while (fk_core_take_completions(w->core, &c, 1))
        ;
    *put_us = (double)(t1 - t0) / 1000;
    *done_us = (double)(t2 - t1) / 1000;
}

/* ---- a subscription on the journal alone ---- */

static struct world *world_of(flexkv_events *ev)
{
    return (struct world *)(void *)ev->node;
}

static int feed_start(flexkv_events *ev, bool resync)
{
    ev->cursor = (struct fk_event_cursor){ 1, world_of(ev)->journal.head };
    return 0;
}

static int feed_fetch(flexkv_events *ev, uint32_t max, bool idle)
{
    const struct fk_journal *j = &world_of(ev)->journal;
    const struct fk_event *e;

    if (!ev->cursor.boot || !fk_journal_has(j, ev->cursor.place))
        return -ESTALE;
    while (ev->list.n < max && (e = fk_journal_next(j, &ev->cursor.place)) != NULL)
        if (fk_event_list_add(&ev->list, e, fk_event_tokens(e)))
            return -ENOMEM;
    return 0;
}

static int feed_walk(flexkv_events *ev)
{
    ev->walk_at = FK_NONE;
    return 0;
}

static void feed_count(flexkv_events *ev, uint32_t n)
{
}

static void feed_leave(flexkv_events *ev)
{
}

static struct fk_label feed_label(flexkv_events *ev, uint32_t number)
{
    return (struct fk_label){ 0 };
}

static const struct fk_feed_ops feed_ops = {
    .start = feed_start, .fetch = feed_fetch, .walk = feed_walk, .count = feed_count,
    .leave = feed_leave, .label = feed_label,
};

static double take_ns(flexkv_events *feed)
{
    flexkv_event e[256];
    uint64_t start = fk_clock_ns(), all = 0;
    int n;

    while ((n = flexkv_events_take(feed, e, fk_array_size(e))) > 0)
        all += (uint64_t)n;
    return all ? (double)(fk_clock_ns() - start) / (double)all : 0;
}

static int measure(struct world *with, struct world *without, flexkv_events *feed,
                   struct bench_result *out)
{
    static double put[RUNS], done[RUNS], plain_put[RUNS], plain_done[RUNS], extra[RUNS], take[RUNS];
    double unused;

    for (uint32_t i = 0; i < SLOTS / CHAIN + 8; i++) {      /* full, and warm */
        one_put(with, &unused, &unused);
        one_put(without, &unused, &unused);
    }
    (void)take_ns(feed);
    for (int i = 0; i < RUNS; i++) {
        one_put(with, &put[i], &done[i]);
        one_put(without, &plain_put[i], &plain_done[i]);
        extra[i] = (put[i] + done[i] - plain_put[i] - plain_done[i]) * 1000 / CHAIN;
        take[i] = take_ns(feed);
    }
    out[0] = bench_summary("put_512_events", "us", put, plain_put, RUNS);
    out[1] = bench_summary("done_512_events", "us", done, plain_done, RUNS);
    out[2] = bench_summary("events_ns_per_block", "ns", extra, NULL, RUNS);
    out[3] = bench_summary("take_ns_per_event", "ns", take, NULL, RUNS);
    return 4;
}

int bench_events(struct bench_result *out, int max)
{
    struct world *with = calloc(1, sizeof(*with)), *without = calloc(1, sizeof(*without));
    flexkv_events *feed = NULL;
    int rc = with && without && max >= 4 ? 0 : -EINVAL;

    if (!rc)
        rc = make_world(with, true);
    if (!rc)
        rc = make_world(without, false);
    if (!rc && !(feed = fk_feed_create((flexkv_node *)(void *)with, &feed_ops, FK_NONE)))
        rc = -ENOMEM;
    if (!rc)
        rc = measure(with, without, feed, out);
    if (feed)
        flexkv_events_close(feed);
    if (with)
        free_world(with);
    if (without)
        free_world(without);
    return rc;
}
