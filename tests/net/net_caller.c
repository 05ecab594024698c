/*
 * net_caller.c - a node's engine: prompts that all nodes share, leases, gets, puts, prefetches, cancels, and the
 * workers that copy. Checks each answer, byte by byte, and reuses an operation's pages the moment it is over.
 * Callers: net_world.c's steps, net_node.c's rounds.
 */
#include "net.h"
#include "net_place.h"
#include "net_store.h"

/* ---- pages and operations ---- */

static uint8_t *page_at(const struct net_world *w, const struct net_space *sp, uint32_t rank, uint32_t page)
{
    return sp->mem[rank] + (size_t)page * w->type[sp->type].slice_bytes;
}

static void pages_give_back(struct net_world *w, struct net_node *p, struct net_op *op)
{
    struct net_space *sp = &p->space[op->space];
    const struct net_type *t = &w->type[sp->type];

    for (uint32_t i = 0; i < op->n_pages; i++) {
        for (uint32_t r = 0; r < t->ranks; r++)
            memset(page_at(w, sp, r, op->pages[i]), 0xdd, t->slice_bytes);
        sp->page_busy[op->pages[i]] = false;
        sp->free_pages[sp->n_free++] = op->pages[i];
    }
    op->used = false;
}

static struct net_op *op_new(struct net_world *w, struct net_node *p, uint32_t kind, uint32_t space,
                             const uint32_t *keys, uint32_t n)
{
    struct net_space *sp = &p->space[space];
    struct net_op *op = p->ops;

    while (op < p->ops + NET_OPS && op->used)
        op++;
    if (op == p->ops + NET_OPS || (kind != FLEXKV_OP_PREFETCH && sp->n_free < n))
        return NULL;
    *op = (struct net_op){ .used = true, .open = true, .kind = kind, .space = space, .n = n, .resets = p->resets,
                           .torn = w->n.torn + w->place->lost };
    memcpy(op->keys, keys, n * sizeof(*keys));
    memset(op->results, 0x55, sizeof(op->results));
    for (; kind != FLEXKV_OP_PREFETCH && op->n_pages < n; op->n_pages++) {
        uint32_t at = net_below(w, sp->n_free), page = sp->free_pages[at];
        sp->free_pages[at] = sp->free_pages[--sp->n_free];
        sp->page_busy[page] = true;
        op->pages[op->n_pages] = page;
    }
    return op;
}

static struct fk_core_op_args op_args(struct net_world *w, struct net_node *p, struct net_op *op)
{
    struct fk_core_op_args a = { .pages = op->pages, .user_data = op, .results = op->results };
    uint64_t usual = w->home[p->home].core.op_timeout_us;

    op->deadline = net_now(w, p) + usual;
    if (!w->calm && !w->quiet && net_chance(w, 8)) {
        op->deadline = net_now(w, p) + 1 + net_below(w, (uint32_t)usual * 2);
        a.deadline_us = op->deadline;
    }
    return a;
}

static void key_values(const struct net_world *w, const uint32_t *keys, uint32_t n, struct fk_key *out)
{
    for (uint32_t i = 0; i < n; i++)
        out[i] = w->keys.data[keys[i]].key;
}

uint32_t net_open_ops(const struct net_node *p)
{
    uint32_t n = 0;

    for (uint32_t i = 0; i < NET_OPS; i++)
        n += p->ops[i].used;
    return n;
}

/* ---- completions ---- */

static void check_results(struct net_world *w, const struct net_op *op, const struct flexkv_completion *c)
{
    NET_CHECK(w, c->kind == op->kind && c->blocks == op->n && c->blocks_ok <= op->n,
              "completion: kind %u of %u, %u of %u blocks, %u ok", c->kind, op->kind, c->blocks, op->n, c->blocks_ok);
    NET_CHECK(w, (c->status == 0) == (c->blocks_ok == op->n), "completion: status %d with %u of %u blocks ok",
              c->status, c->blocks_ok, op->n);
    for (uint32_t i = 0; i < op->n; i++) {
        if (i < c->blocks_ok)
            NET_CHECK(w, op->results[i] == 0, "results: block %u is %d, %u are ok", i, op->results[i], c->blocks_ok);
        else
            NET_CHECK(w, op->kind == FLEXKV_OP_PUT || op->results[i] < 0,
                      "results: block %u is %d behind a failed one", i, op->results[i]);
    }
}

static void check_status(struct net_world *w, struct net_node *p, const struct net_op *op,
                         const struct flexkv_completion *c)
{
    uint64_t now = net_now(w, p);

    NET_CHECK(w, c->status || op->resets == p->resets, "an operation from before a reset ended well after it");
    NET_CHECK(w, c->status != -ECANCELED || op->cancelled || op->resets != p->resets || !w->calm,
              "cancelled, but nobody asked");
    NET_CHECK(w, c->status != -ETIMEDOUT || now >= op->deadline || !w->calm, "timed out before the deadline");
    NET_CHECK(w, c->status != -ETIMEDOUT || !w->calm, "timed out although nothing was slow: it hung");
    NET_CHECK(w, !w->calm || c->status == 0 || c->status == -ENOSPC || c->status == -ENOENT || op->cancelled ||
                     op->resets != p->resets,
              "status %d although nothing went wrong", c->status);
    NET_CHECK(w, c->blocks_ok >= op->must || c->status == -ENOSPC || op->torn != w->n.torn + w->place->lost,
              "hits: blocks that others have are not had: %d at node %u", c->status, net_at(w, p));
    w->n.timeouts += c->status == -ETIMEDOUT;
}

static void check_bytes(struct net_world *w, struct net_node *p, const struct net_op *op, uint32_t ok)
{
    const struct net_space *sp = &p->space[op->space];
    const struct net_type *t = &w->type[sp->type];
    uint8_t want[NET_BYTES];

    for (uint32_t i = 0; i < ok; i++) {
        for (uint32_t r = 0; r < t->ranks; r++) {
            net_fill(w, sp->type, op->keys[i], r, want);
            NET_CHECK(w, memcmp(want, page_at(w, sp, r, op->pages[i]), t->slice_bytes) == 0,
                      "wrong bytes: get of key %u (block %u, rank %u) at node %u gave other bytes", op->keys[i], i, r,
                      net_at(w, p));
        }
    }
}

void net_completion(struct net_world *w, struct net_node *p, const struct flexkv_completion *c)
{
    struct net_op *op = c->user_data;

    NET_CHECK(w, op >= p->ops && op < p->ops + NET_OPS, "completion: wrong user_data");
    NET_CHECK(w, op->used && op->open && op->id == c->op, "an operation completed twice");
    NET_TRACE(w, "  node %u op %u kind %u: status %d, %u of %u%s", net_at(w, p), (unsigned)(op - p->ops), c->kind,
              c->status, c->blocks_ok, c->blocks, c->flags ? ", pages busy" : "");
    net_mix(w, c->kind * 65536u + c->blocks_ok * 256u + (uint32_t)-c->status);
    if (op->kind == FLEXKV_OP_PREFETCH && c->blocks <= op->n)
        op->n = c->blocks;              /* of a prefetch: what can be had */
    check_results(w, op, c);
    check_status(w, p, op, c);
    if (op->kind == FLEXKV_OP_GET) {
        check_bytes(w, p, op, c->blocks_ok);
        w->n.got += c->blocks_ok;
        w->n.lost += op->n - c->blocks_ok;
    }
    op->open = false;
    if (!(c->flags & FLEXKV_COMPLETION_PAGES_BUSY))
        pages_give_back(w, p, op);
}

void net_check_deadlines(struct net_world *w, struct net_node *p)
{
    uint64_t now = net_now(w, p), thawed = cs_local(net_client(w, p), p->thawed_us);
    uint64_t grace = w->home[p->home].core.cancel_grace_us;

    for (uint32_t i = 0; i < NET_OPS; i++) {
        struct net_op *op = &p->ops[i];
        if (op->used && !op->open && fk_core_instance_idle(p->core, p->space[op->space].instance))
            pages_give_back(w, p, op);  /* hung workers have let go at last */
        uint64_t end = fk_max(op->deadline, p->thawed_us ? thawed : 0) + grace + NET_SLACK_US;
        NET_CHECK(w, !op->used || !op->open || now <= end, "operation %u (kind %u) of node %u lives %llu us after "
                  "deadline and grace", i, op->kind, net_at(w, p), (unsigned long long)(now - end));
    }
    for (size_t i = 0; i < p->fetches.len; i++) {
        const struct net_fetch *f = &p->fetches.data[i];
        uint64_t time = (p->peers ? w->home[p->home].fetch_us : 0) + (f->stored ? w->place->timeout_us : 0);
        uint64_t end = fk_max(f->taken + time, p->thawed_us ? thawed + (f->stored ? w->place->timeout_us : 0) : 0) + NET_SLACK_US;
        NET_CHECK(w, f->ended || now <= end, "fetch of key %u at node %u lives %llu us after its time", f->key,
                  net_at(w, p), (unsigned long long)(now - end));
    }
}

/* ---- requests ---- */

static bool here(struct net_node *p, uint32_t key)
{
    const struct net_have *h = net_have(p, key);

    return h->there[FK_TIER_CPU] || h->there[FK_TIER_SSD];
}

uint32_t net_reach(struct net_world *w, struct net_node *p, uint32_t space, const struct net_prompt *pr, uint32_t n,
                   struct flexkv_match_result *out)
{
    struct net_space *sp = &p->space[space];
    struct fk_key keys[NET_CHAIN];
    uint32_t m = 0;

    key_values(w, pr->keys, n, keys);
    while (m < n && here(p, pr->keys[m]))
        m++;
    fk_core_match(p->core, sp->instance, keys, n, net_now(w, p), out);
    NET_CHECK(w, out->blocks == m, "match at node %u: %u blocks, by the events %u", net_at(w, p), out->blocks, m);
    net_store_used(w, p, space, pr->ns, keys, out->blocks);
    uint32_t reach = net_store_reach(w, p, space, keys, n, out->blocks);
    NET_CHECK(w, reach >= m && reach <= n, "reach of %u, known are %u of %u", reach, m, n);
    for (uint32_t i = m; i < reach; i++)
        NET_CHECK(w, w->keys.data[pr->keys[i]].complete >> sp->type & 1,
                  "reach: key %u was never put whole by anybody in that space", pr->keys[i]);
    if (reach > m)
        fk_core_match_extend(p->core, sp->instance, sp->group[pr->ns], keys, reach, net_now(w, p), out);
    net_after(w, p);
    NET_CHECK(w, out->blocks >= m && out->blocks <= reach &&
                     out->cpu_blocks + out->ssd_blocks + out->peer_blocks == out->blocks,
              "match: %u blocks (%u cpu, %u ssd, %u peer), reach %u", out->blocks, out->cpu_blocks, out->ssd_blocks,
              out->peer_blocks, reach);
    w->n.peer_blocks += out->peer_blocks;
    return reach;
}

static void act_match(struct net_world *w, struct net_node *p, uint32_t space, const struct net_prompt *pr)
{
    uint32_t n = net_chance(w, 3) ? net_range(w, 1, pr->n) : pr->n;
    struct flexkv_match_result r;

    if (p->n_leases == NET_LEASES)
        return;
    uint32_t reach = net_reach(w, p, space, pr, n, &r);
    NET_TRACE(w, "node %u match %u: reach %u, %u cpu %u ssd %u peer", net_at(w, p), n, reach, r.cpu_blocks,
              r.ssd_blocks, r.peer_blocks);
    net_check_names(w, p, space, pr);
    if (!r.blocks)
        return;
    struct net_lease *l = &p->leases[p->n_leases++];
    *l = (struct net_lease){ .id = r.lease, .space = space, .n = r.blocks, .resets = p->resets,
                             .expires = net_now(w, p) + w->home[p->home].core.lease_timeout_us };
    memcpy(l->keys, pr->keys, r.blocks * sizeof(uint32_t));
}

static bool lease_lives(struct net_world *w, struct net_node *p, const struct net_lease *l)
{
    return l->expires > net_now(w, p) && l->resets == p->resets;
}

static void act_release(struct net_world *w, struct net_node *p)
{
    if (!p->n_leases)
        return;
    uint32_t at = net_below(w, p->n_leases);
    struct net_lease l = p->leases[at];
    p->leases[at] = p->leases[--p->n_leases];
    int rc = fk_core_release(p->core, l.id);
    NET_CHECK(w, rc == 0 || (rc == -ENOENT && !lease_lives(w, p, &l)), "release of a live lease: %d", rc);
    net_after(w, p);
}

static void act_get(struct net_world *w, struct net_node *p)
{
    uint64_t id = 0;

    if (!p->n_leases)
        return;
    uint32_t at = net_chance(w, 2) ? p->n_leases - 1 : net_below(w, p->n_leases);
    struct net_lease l = p->leases[at];
    uint32_t first = net_chance(w, 4) ? net_below(w, l.n) : 0;
    uint32_t n = net_chance(w, 4) ? net_range(w, 1, l.n - first) : l.n - first;
    struct net_op *op = op_new(w, p, FLEXKV_OP_GET, l.space, l.keys + first, n);
    if (!op)
        return;
    p->leases[at] = p->leases[--p->n_leases];
    struct fk_core_op_args args = op_args(w, p, op);
    args.layerwise = net_chance(w, 8);
    int rc = fk_core_get(p->core, l.id, first, n, &args, net_now(w, p), &id);
    NET_TRACE(w, "node %u get [%u,+%u) -> %d op %u", net_at(w, p), first, n, rc, (unsigned)(op - p->ops));
    NET_CHECK(w, rc == 0 || (rc == -ENOENT && !lease_lives(w, p, &l)), "get on a live lease: %d", rc);
    op->id = id;
    w->n.gets++;
    if (rc)
        pages_give_back(w, p, op);
    net_after(w, p);
}

void net_get_now(struct net_world *w, struct net_node *p, uint32_t space, const struct net_prompt *pr,
                 const struct flexkv_match_result *r, uint32_t must)
{
    struct net_op *op = op_new(w, p, FLEXKV_OP_GET, space, pr->keys, r->blocks);
    uint64_t id = 0;

    NET_CHECK(w, op, "at rest: no pages");
    struct fk_core_op_args args = { .pages = op->pages, .user_data = op, .results = op->results };
    op->must = must;
    op->deadline = args.deadline_us = net_now(w, p) + 20000000;
    int rc = fk_core_get(p->core, r->lease, 0, r->blocks, &args, net_now(w, p), &id);
    NET_CHECK(w, rc == 0, "get on a live lease: %d", rc);
    op->id = id;
    net_after(w, p);
    net_soon(w, p);
}

static void act_put(struct net_world *w, struct net_node *p, uint32_t space, const struct net_prompt *pr)
{
    struct net_space *sp = &p->space[space];
    uint32_t n = net_chance(w, 4) ? net_range(w, 1, pr->n) : pr->n, first = 0;
    struct fk_key keys[NET_CHAIN];
    uint64_t id = 0;

    while (first < n - 1 && here(p, pr->keys[first]))
        first++;
    struct net_op *op = op_new(w, p, FLEXKV_OP_PUT, space, pr->keys + first, n - first);
    if (!op)
        return;
    struct fk_core_op_args args = op_args(w, p, op);
    for (uint32_t i = 0; i < op->n; i++)
        for (uint32_t r = 0; r < w->type[sp->type].ranks; r++)
            net_fill(w, sp->type, op->keys[i], r, page_at(w, sp, r, op->pages[i]));
    key_values(w, pr->keys, n, keys);
    int rc = fk_core_put(p->core, sp->instance, sp->group[pr->ns], keys, n, first, &args, net_now(w, p), &id);
    NET_TRACE(w, "node %u put type %u ns %u [%u,%u) -> %d op %u", net_at(w, p), sp->type, pr->ns, first, n, rc,
              (unsigned)(op - p->ops));
    NET_CHECK(w, rc == 0, "put refused: %d", rc);
    op->id = id;
    w->n.puts++;
    net_after(w, p);
}

static void act_prefetch(struct net_world *w, struct net_node *p, uint32_t space, const struct net_prompt *pr)
{
    struct net_space *sp = &p->space[space];
    struct fk_key keys[NET_CHAIN];
    uint64_t id = 0;
    struct net_op *op = op_new(w, p, FLEXKV_OP_PREFETCH, space, pr->keys, pr->n);

    if (!op)
        return;
    struct fk_core_op_args args = op_args(w, p, op);
    key_values(w, pr->keys, pr->n, keys);
    uint32_t known = fk_core_here(p->core, sp->instance, keys, pr->n, NULL);
    args.reach = net_store_reach(w, p, space, keys, pr->n, known);
    args.group = sp->group[pr->ns];
    int rc = fk_core_prefetch(p->core, sp->instance, keys, pr->n, &args, net_now(w, p), &id);
    NET_TRACE(w, "node %u prefetch %u of %u -> %d op %u", net_at(w, p), args.reach, pr->n, rc, (unsigned)(op - p->ops));
    NET_CHECK(w, rc == 0, "prefetch refused: %d", rc);
    op->id = id;
    net_after(w, p);
}

static void act_cancel(struct net_world *w, struct net_node *p)
{
    struct net_op *op = &p->ops[net_below(w, NET_OPS)];

    if (!op->used || !op->open)
        return;
    op->cancelled = true;
    int rc = fk_core_cancel(p->core, op->id, net_now(w, p));
    NET_CHECK(w, rc == 0, "cancel of an open operation: %d", rc);
    net_after(w, p);
}

void net_reset(struct net_world *w, struct net_node *p)
{
    NET_TRACE(w, "node %u reset", net_at(w, p));
    p->resets++;
    w->n.resets++;
    p->n_leases = 0;
    fk_core_reset(p->core, net_now(w, p));
    net_store_reset(w, p);
    net_after(w, p);
    for (size_t k = 0; k < p->have.len; k++)
        NET_CHECK(w, !here(p, (uint32_t)k), "key %zu survived a reset", k);
    net_soon(w, p);
}

void net_caller_step(struct net_world *w, struct net_node *p)
{
    uint32_t space = net_below(w, p->n_spaces), what = net_below(w, 100);
    const struct net_prompt *pr = net_pick_prompt(w, w->type[p->space[space].type].family);

    if (what < 28)
        act_put(w, p, space, pr);
    else if (what < 62)
        act_match(w, p, space, pr);
    else if (what < 84)
        act_get(w, p);
    else if (what < 88)
        act_release(w, p);
    else if (what < 96)
        act_prefetch(w, p, space, pr);
    else
        act_cancel(w, p);
    net_soon(w, p);
}

/* ---- workers ---- */

static struct net_job_use *use_of(struct net_space *sp, const struct fk_job *job)
{
    for (size_t i = 0; i < sp->job_uses.len; i++)
        if (sp->job_uses.data[i].job == job)
            return &sp->job_uses.data[i];
    return NULL;
}

/* The first worker takes the job: its slots are in use from here. */
static void use_begin(struct net_world *w, struct net_node *p, uint32_t space, struct fk_job *job)
{
    struct net_space *sp = &p->space[space];
    struct net_job_use u = { job, w->type[sp->type].ranks };

    for (uint32_t i = 0; i < job->n; i++) {
        NET_CHECK(w, job->slots[i] < sp->cpu_slots && job->pages[i] < sp->n_pages, "job: slot %u, page %u",
                  job->slots[i], job->pages[i]);
        net_use(w, p, &sp->cpu_use[job->slots[i]], !job->to_engine, "cpu", job->slots[i]);
        if (!job->to_engine)
            net_check_unowned(w, p, space, job->slots[i]);
    }
    if (fk_vec_push(&sp->job_uses, u))
        abort();
}

static void copy(struct net_world *w, struct net_space *sp, uint32_t rank, const struct fk_job *job, uint32_t n)
{
    uint32_t bytes = w->type[sp->type].slice_bytes;

    for (uint32_t i = 0; i < n; i++) {
        uint8_t *slice = sp->pool + (size_t)job->slots[i] * sp->slot_bytes + (size_t)rank * bytes;
        uint8_t *page = page_at(w, sp, rank, job->pages[i]);
        NET_CHECK(w, sp->page_busy[job->pages[i]], "a page is copied after its operation ended");
        memcpy(job->to_engine ? page : slice, job->to_engine ? slice : page, bytes);
    }
}

static void job_over(struct net_world *w, struct net_node *p, struct net_space *sp, uint32_t rank,
                     struct fk_job *job)
{
    bool cancelled = atomic_load(&job->cancelled), fails = !w->calm && !w->quiet && net_chance(w, 80);
    uint32_t ok = cancelled ? 0 : fails && job->n ? net_below(w, job->n) : job->n;
    int status = cancelled || !job->n ? -ECANCELED : ok < job->n ? -EIO : 0;
    struct net_job_use *u = use_of(sp, job);

    NET_TRACE(w, "  node %u job %u of worker %u: %u of %u, %d", net_at(w, p), job->id, rank, ok, job->n, status);
    copy(w, sp, rank, job, ok);
    if (--u->left == 0) {
        for (uint32_t i = 0; i < job->n; i++)
            net_unuse(&sp->cpu_use[job->slots[i]], !job->to_engine);
        *u = sp->job_uses.data[--sp->job_uses.len];
    }
    fk_core_job_done(p->core, job, ok, status, net_now(w, p));
    net_after(w, p);
}

static bool worker(struct net_world *w, struct net_node *p, uint32_t space, uint32_t rank)
{
    struct net_space *sp = &p->space[space];
    struct fk_job *job;
    bool any = false;

    for (size_t i = 0; i < sp->jobs[rank].len;) {
        struct net_job j = sp->jobs[rank].data[i];
        if (j.due_us > w->net.now_us) {
            i++;
            continue;
        }
        sp->jobs[rank].data[i] = sp->jobs[rank].data[--sp->jobs[rank].len];
        job_over(w, p, sp, rank, j.job);
        any = true;
    }
    while (sp->jobs[rank].len < 4 && (job = fk_core_take_job(p->core, sp->instance, rank))) {
        bool hangs = !w->calm && !w->quiet && net_chance(w, 200);
        uint64_t longest = w->home[p->home].core.op_timeout_us + w->home[p->home].core.cancel_grace_us;
        struct net_job j = { job, w->net.now_us + net_below(w, 300) };
        j.due_us += hangs ? net_below(w, (uint32_t)longest * 2) : 0;
        if (!use_of(sp, job))
            use_begin(w, p, space, job);
        if (fk_vec_push(&sp->jobs[rank], j))
            abort();
        any = true;
    }
    return any;
}

bool net_workers(struct net_world *w, struct net_node *p)
{
    bool any = false;

    for (uint32_t s = 0; s < p->n_spaces; s++)
        for (uint32_t r = 0; r < w->type[p->space[s].type].ranks; r++)
            any |= worker(w, p, s, r);
    return any;
}

uint64_t net_workers_next(const struct net_node *p)
{
    uint64_t next = UINT64_MAX;

    for (uint32_t s = 0; s < p->n_spaces; s++)
        for (uint32_t r = 0; r < NET_RANKS; r++)
            for (size_t i = 0; i < p->space[s].jobs[r].len; i++)
                next = fk_min(next, p->space[s].jobs[r].data[i].due_us);
    return next;
}
