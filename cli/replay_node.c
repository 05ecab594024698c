/*
 * replay_node.c - `flexkv replay` with bytes: opens a node through the public API and drives
 * it as an engine would. Each request in flight has its own pages:
 *
 *     start: keys, match -> m       got: bytes checked        put done: request noted
 *        | m > 0: get into pages ------> | blocks missing: put --> |
 *        +--------------- m = 0: put from pages -----------------> |
 *
 * Pages are scribbled over before a get when bytes are verified, so stale ones can't pass.
 * What a failed get left out is put again, as an engine would compute it.
 * Touches memory of its own, the node's SSD directories. One thread. Caller: replay.c.
 */
#include <sys/mman.h>

#include "base/clock.h"
#include "flexkv/flexkv.h"
#include "replay.h"

#define POLL_BATCH 64
#define POLL_MS 100                     /* so that a signal is seen */
#define STUCK_NS (120ull * 1000000000)  /* no completion for so long: the node hangs */
#define BACKLOG_STUCK_NS (30ull * 1000000000)
#define SCRIBBLE 0xa5

enum state { IDLE, GETTING, PUTTING };

struct flight {
    enum state state;
    const struct trace_request *req;
    uint32_t n, cpu_blocks, got;
    struct flexkv_key *keys;
    struct replay_hash *hashes;
    uint32_t *pages;
    unsigned char *bytes;               /* of page pages[0] */
    uint64_t call_ns;
};

struct driver {
    const struct replay_plan *plan;
    struct replay_result *res;
    flexkv_config *config;
    flexkv_node *node;
    flexkv_space *space;
    flexkv_namespace *ns;
    unsigned char *memory;
    size_t memory_bytes;
    struct flight *flights;
    uint32_t in_flight, n_flights;
    size_t next;                        /* request to start */
    struct replay_totals before;        /* of nodes that were closed */
    uint64_t backlog_limit, backlog_blocks, backlog_since_ns, progress_ns;
    bool backlog_given_up;
};

static int failed(const char *what)
{
    fprintf(stderr, "flexkv replay: %s: %s\n", what, flexkv_last_error());
    return 1;
}

static int set_option(void *arg, const char *key, const char *value)
{
    struct driver *d = arg;

    return flexkv_config_set(d->config, key, value) ? failed("configuration") : 0;
}

/* ---- node ---- */

/* warm: what is on SSD must fit; else a store of another geometry is made anew. */
static int make_config(struct driver *d, bool warm)
{
    flexkv_config_destroy(d->config);
    d->config = NULL;
    if (flexkv_config_create(&d->config))
        return failed("configuration");
    int rc = replay_plan_config(d->plan, set_option, d);
    /* The store is named "replay": nobody else's is lost. */
    return rc || warm ? rc : set_option(d, "ssd_recreate", "1");
}

static int node_open(struct driver *d, bool warm)
{
    if (make_config(d, warm))
        return 2;
    const struct replay_options *o = d->plan->options;
    struct flexkv_space_desc desc = {
        .struct_bytes = sizeof(desc), .name = "replay", .fingerprint = "flexkv replay",
        .fingerprint_bytes = 13, .tokens_per_block = (uint32_t)o->tokens_per_block, .ranks = 1,
        .slice_bytes = o->block_bytes,
    };
    struct flexkv_region region = {
        .base = d->memory, .stride = o->block_bytes, .page_bytes = o->block_bytes,
        .pages = (uint64_t)d->n_flights * d->plan->max_blocks,
    };

    if (flexkv_node_open(d->config, &d->node))
        return failed("opening the node");
    if (flexkv_space_open(d->node, &desc, &d->space))
        return failed("opening the space");
    if (flexkv_namespace_open(d->space, NULL, 0, &d->ns))
        return failed("opening the namespace");
    if (flexkv_regions_register(d->space, 0, &region, 1))
        return failed("registering memory");
    return 0;
}

static void node_stats(const struct driver *d, struct flexkv_stats *st)
{
    *st = (struct flexkv_stats){ .struct_bytes = sizeof(*st) };
    flexkv_node_stats(d->node, st);
}

static struct replay_totals totals_of(const struct driver *d, const struct flexkv_stats *st)
{
    return (struct replay_totals){
        .cpu_copy_bytes = d->before.cpu_copy_bytes + st->cpu.bytes_read + st->cpu.bytes_written,
        .ssd_read_bytes = d->before.ssd_read_bytes + st->ssd.bytes_read,
        .ssd_write_bytes = d->before.ssd_write_bytes + st->ssd.bytes_written,
        .evicted_blocks = d->before.evicted_blocks + st->cpu.evicted_blocks + st->ssd.evicted_blocks,
        .used = { st->cpu.slots - st->cpu.free_slots, st->ssd.slots - st->ssd.free_slots },
    };
}

static int driver_open(struct driver *d)
{
    const struct replay_plan *p = d->plan;
    const struct replay_options *o = p->options;

    if (o->fault && setenv("FK_TEST_FAULT", o->fault, 1))
        return failed("--fault");
    d->n_flights = (uint32_t)o->queue;
    d->memory_bytes = fk_max((size_t)d->n_flights * p->max_blocks * o->block_bytes, (size_t)4096);
    d->memory = mmap(NULL, d->memory_bytes, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (d->memory == MAP_FAILED) {
        d->memory = NULL;
        fprintf(stderr, "flexkv replay: no memory for %u requests of %u blocks\n", d->n_flights, p->max_blocks);
        return 1;
    }
    d->flights = calloc(d->n_flights, sizeof(*d->flights));
    for (uint32_t i = 0; d->flights && i < d->n_flights; i++) {
        struct flight *f = &d->flights[i];
        f->keys = malloc(((size_t)p->max_blocks + 1) * sizeof(*f->keys));
        f->hashes = malloc(((size_t)p->max_blocks + 1) * sizeof(*f->hashes));
        f->pages = malloc(((size_t)p->max_blocks + 1) * sizeof(*f->pages));
        f->bytes = d->memory + (size_t)i * p->max_blocks * o->block_bytes;
        for (uint32_t k = 0; f->pages && k < p->max_blocks; k++)
            f->pages[k] = i * p->max_blocks + k;
        if (!f->keys || !f->hashes || !f->pages)
            return failed("memory for keys");
    }
    d->backlog_limit = o->backlog != FK_NONE ? o->backlog : p->cpu_slots / 8;
    int rc = d->flights ? node_open(d, o->warm) : failed("memory for requests");
    if (!rc && !o->warm && flexkv_reset(d->node))
        return failed("emptying the cache");
    return rc;
}

static void driver_close(struct driver *d)
{
    flexkv_node_close(d->node);
    flexkv_config_destroy(d->config);
    for (uint32_t i = 0; d->flights && i < d->n_flights; i++) {
        free(d->flights[i].keys);
        free(d->flights[i].hashes);
        free(d->flights[i].pages);
    }
    free(d->flights);
    if (d->memory)
        munmap(d->memory, d->memory_bytes);
}

/* ---- the way of a request ---- */

static void request_done(struct driver *d, struct flight *f)
{
    struct flexkv_stats st;
    uint32_t cpu = fk_min(f->cpu_blocks, f->got);

    node_stats(d, &st);
    d->backlog_blocks = st.write_backlog_blocks;
    d->res->index_bytes = st.index_bytes;
    f->state = IDLE;
    d->in_flight--;
    if (replay_note_request(d->res, f->req, cpu, f->got - cpu)) {
        struct replay_totals totals = totals_of(d, &st);
        replay_sample(d->res, &totals);
    }
    replay_progress(d->res);
}

static int start_put(struct driver *d, struct flight *f)
{
    uint64_t bytes = d->plan->options->block_bytes, op;

    if (f->got == f->n) {
        request_done(d, f);
        return 0;
    }
    struct flexkv_op_args args = {
        .struct_bytes = sizeof(args), .pages = f->pages + f->got, .user_data = f,
    };
    for (uint32_t i = f->got; i < f->n; i++)
        replay_fill(f->bytes + i * bytes, bytes, f->hashes[i]);
    f->state = PUTTING;
    f->call_ns = fk_clock_ns();
    return flexkv_put(d->ns, f->keys, f->n, f->got, &args, &op) ? failed("put") : 0;
}

static int start_get(struct driver *d, struct flight *f, const struct flexkv_match_result *m)
{
    struct flexkv_op_args args = { .struct_bytes = sizeof(args), .pages = f->pages, .user_data = f };
    uint64_t op;

    if (d->plan->options->verify)
        memset(f->bytes, SCRIBBLE, m->blocks * d->plan->options->block_bytes);
    f->state = GETTING;
    f->call_ns = fk_clock_ns();
    int rc = flexkv_get(d->node, m->lease, 0, m->blocks, &args, &op);
    if (rc == -ENOENT) {                /* the lease ran out: a miss, but not a silent one */
        d->res->failed += m->blocks;
        return start_put(d, f);
    }
    return rc ? failed("get") : 0;
}

static int start_request(struct driver *d, struct flight *f, const struct trace_request *r)
{
    struct flexkv_match_result m;

    *f = (struct flight){ .req = r, .n = replay_blocks(d->plan, r), .keys = f->keys,
                          .hashes = f->hashes, .pages = f->pages, .bytes = f->bytes };
    d->in_flight++;
    replay_hashes(d->plan, r, 0, f->n, f->hashes);
    flexkv_keys_from_hashes(d->ns, f->hashes, sizeof(*f->hashes), sizeof(*f->hashes), f->n, f->keys);
    uint64_t begin = fk_clock_ns();
    if (flexkv_match(d->ns, f->keys, f->n, &m))
        return failed("match");
    replay_note_latency(d->res, REPLAY_MATCH, fk_clock_ns() - begin);
    f->cpu_blocks = m.cpu_blocks;
    return m.blocks ? start_get(d, f, &m) : start_put(d, f);
}

static void verify(struct driver *d, const struct flight *f)
{
    uint64_t bytes = d->plan->options->block_bytes;

    for (uint32_t i = 0; i < f->got; i++) {
        d->res->verified++;
        if (replay_same(f->bytes + i * bytes, bytes, f->hashes[i]))
            continue;
        if (!d->res->wrong++)
            fprintf(stderr, "flexkv replay: WRONG BYTES in block %u of request %zu\n", i,
                    (size_t)(f->req - d->plan->trace->requests.data) + 1);
    }
}

static int completed(struct driver *d, const struct flexkv_completion *c)
{
    struct flight *f = c->user_data;
    uint64_t ns = fk_clock_ns() - f->call_ns;

    d->progress_ns = f->call_ns + ns;
    if (f->state == PUTTING) {
        replay_note_latency(d->res, REPLAY_PUT, ns);
        if (c->status && c->status != -ENOSPC)
            d->res->put_failed += c->blocks - c->blocks_ok;
        request_done(d, f);
        return 0;
    }
    replay_note_latency(d->res, REPLAY_GET, ns);
    if (c->flags & FLEXKV_COMPLETION_PAGES_BUSY) {
        fprintf(stderr, "flexkv replay: a copy did not stop\n");
        return 1;
    }
    f->got = c->blocks_ok;
    d->res->failed += c->blocks - c->blocks_ok;
    if (d->plan->options->verify)
        verify(d, f);
    return start_put(d, f);
}

/* Waits up to timeout_ms for completions and handles them. */
static int poll_node(struct driver *d, int timeout_ms)
{
    struct flexkv_completion c[POLL_BATCH];
    int n = flexkv_poll(d->node, c, POLL_BATCH, timeout_ms);

    if (n < 0 && n != -EINTR)
        return failed("poll");
    for (int i = 0; i < n; i++) {
        int rc = completed(d, &c[i]);
        if (rc)
            return rc;
    }
    if (d->in_flight && fk_clock_ns() - d->progress_ns > STUCK_NS) {
        fprintf(stderr, "flexkv replay: no completion for %llu s\n", STUCK_NS / 1000000000);
        return 1;
    }
    return 0;
}

static int drain(struct driver *d)
{
    int rc = 0;

    while (d->in_flight && !rc)
        rc = poll_node(d, POLL_MS);
    return rc;
}

/* ---- when the next request may start ---- */

/* Waits until at most limit blocks are to be written; gives up when nothing moves. */
static int wait_backlog(struct driver *d, uint64_t limit)
{
    int rc = 0;
    struct flexkv_stats st;
    uint64_t begin = fk_clock_ns(), moved = begin, last = UINT64_MAX;

    while (!rc && !d->backlog_given_up && !replay_stopped()) {
        node_stats(d, &st);
        d->backlog_blocks = st.write_backlog_blocks;
        uint64_t now = fk_clock_ns();
        if (d->backlog_blocks <= limit)
            break;
        if (d->backlog_blocks < last) {
            last = d->backlog_blocks;
            moved = now;
        } else if (now - moved > BACKLOG_STUCK_NS) {
            fprintf(stderr, "flexkv replay: %llu blocks are not getting written; going on\n",
                    (unsigned long long)d->backlog_blocks);
            d->backlog_given_up = true;
        }
        if (d->in_flight)
            rc = poll_node(d, 1);
        else
            usleep(200);
    }
    d->res->backlog_seconds += (double)(fk_clock_ns() - begin) / 1e9;
    return rc;
}

/* How long until the request's time has come, at the speed asked for; 0: now. */
static uint64_t wait_ns(const struct driver *d, const struct trace_request *r)
{
    const struct replay_options *o = d->plan->options;

    if (o->speed <= 0)
        return 0;
    uint64_t begin_us = d->plan->trace->requests.data[0].time_us;
    uint64_t due = d->res->start_ns + (uint64_t)((double)(r->time_us - begin_us) * 1000 / o->speed);
    uint64_t now = fk_clock_ns();
    return due > now ? due - now : 0;
}

static struct flight *free_flight(struct driver *d)
{
    for (uint32_t i = 0; i < d->n_flights; i++)
        if (d->flights[i].state == IDLE)
            return &d->flights[i];
    return NULL;
}

static int warm_restart(struct driver *d)
{
    struct flexkv_stats st;
    int rc = drain(d);

    if (!rc)
        rc = wait_backlog(d, 0);
    if (rc)
        return rc;
    uint64_t begin = fk_clock_ns();
    node_stats(d, &st);
    d->before = totals_of(d, &st);
    flexkv_node_close(d->node);
    d->node = NULL;
    rc = node_open(d, true);
    if (rc)
        return rc;
    node_stats(d, &st);
    d->res->restart_seconds = (double)(fk_clock_ns() - begin) / 1e9;
    d->res->restart_found_blocks = st.blocks;
    d->res->restart_request = d->next;
    return 0;
}

/* One step: start the next request, or wait for what is under way. */
static int step(struct driver *d)
{
    const struct replay_options *o = d->plan->options;
    const struct trace *t = d->plan->trace;
    struct flight *f = free_flight(d);      /* stays free: only this function fills it */

    if (!f || d->next >= t->requests.len)
        return poll_node(d, POLL_MS);
    if (o->warm_restart_at && d->next == o->warm_restart_at && !d->res->restart_request) {
        int rc = warm_restart(d);
        if (rc)
            return rc;
    }
    if (o->speed <= 0 && d->backlog_blocks > d->backlog_limit && !d->backlog_given_up) {
        int rc = wait_backlog(d, d->backlog_limit);
        if (rc)
            return rc;
    }
    uint64_t ns = wait_ns(d, &t->requests.data[d->next]);
    if (ns)
        return poll_node(d, (int)fk_min(ns / 1000000 + 1, (uint64_t)POLL_MS));
    if (!d->in_flight)
        d->progress_ns = fk_clock_ns();
    return start_request(d, f, &t->requests.data[d->next++]);
}

static int run(struct driver *d)
{
    int rc = 0;

    while (!rc && !replay_stopped() && (d->next < d->plan->trace->requests.len || d->in_flight))
        rc = step(d);
    if (!rc)
        rc = drain(d);
    return rc;
}

int replay_run_node(const struct replay_plan *p, struct replay_result *res)
{
    struct driver d = { .plan = p, .res = res };
    struct flexkv_stats st;
    int rc = driver_open(&d);

    if (!rc) {
        replay_result_start(res);
        rc = run(&d);
        if (!rc && p->ssd_slots)
            rc = wait_backlog(&d, 0);   /* the disk's part of the work counts too */
        replay_result_stop(res);
        if (d.node) {
            node_stats(&d, &st);
            res->totals = totals_of(&d, &st);
        }
    }
    driver_close(&d);
    return rc;
}
