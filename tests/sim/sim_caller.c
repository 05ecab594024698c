/*
 * sim_caller.c - the inference engines: prompts with shared prefixes, leases, gets, puts,
 * prefetches, cancels. Checks each answer, and reuses an operation's pages the moment it is
 * over - of a get that is reported early, when its bytes have arrived. Touches pages, the model and the
 * core's calls. Caller: sim.c's step loop.
 */
#include "sim.h"

#include <errno.h>

/* ---- prompts: a fork of an old one at a random place, or a new one ---------------------------- */

void sim_new_prompt(struct sim *s, uint32_t space)
{
    struct sim_space *sp = &s->space[space];
    bool full = sp->n_prompts == SIM_PROMPTS;
    struct sim_prompt *p = &sp->prompts[full ? sim_below(s, SIM_PROMPTS) : sp->n_prompts];
    struct sim_prompt n = { .ns = sim_below(s, sp->config->n_ns),
                            .n = sim_range(s, 1, sp->config->max_chain) };
    uint32_t keep = 0;

    if (sp->n_prompts && !sim_chance(s, 6)) {
        const struct sim_prompt *old = &sp->prompts[sim_below(s, sp->n_prompts)];
        n.ns = sim_chance(s, 10) ? n.ns : old->ns;      /* else: same tokens, other namespace */
        keep = sim_below(s, fk_min(old->n, n.n) + 1);
        memcpy(n.tokens, old->tokens, sizeof(n.tokens));
    }
    for (uint32_t i = keep; i < n.n; i++)
        n.tokens[i] = sim_below(s, sp->config->alphabet);
    struct fk_key keys[SIM_MAX_CHAIN];
    fk_key_chain(FK_KEY_XXH3, sp->ns_seed[n.ns], n.tokens, 1, n.n, keys);
    for (uint32_t i = 0; i < n.n; i++)
        n.keys[i] = sim_key_intern(s, keys[i], i ? n.keys[i - 1] : FK_NONE, space, n.ns);
    *p = n;
    sp->n_prompts += !full;
}

static struct sim_prompt *pick_prompt(struct sim *s, uint32_t *space)
{
    *space = sim_below(s, s->config.n_spaces);
    if (s->space[*space].n_prompts == 0 || sim_chance(s, 24))
        sim_new_prompt(s, *space);
    return &s->space[*space].prompts[sim_below(s, s->space[*space].n_prompts)];
}

static void key_values(const struct sim *s, const uint32_t *keys, uint32_t n, struct fk_key *out)
{
    for (uint32_t i = 0; i < n; i++)
        out[i] = s->keys.data[keys[i]].key;
}

/* ---- pages and operations ----------------------------------------------------------------------- */

static void page_junk(struct sim *s, struct sim_space *sp, uint32_t page)
{
    for (uint32_t r = 0; r < sp->config->ranks; r++)
        sim_junk(s, sp->mem[r] + (uint64_t)page * sp->config->slice_bytes,
                 sp->config->slice_bytes);
}

static void pages_give_back(struct sim *s, struct sim_op *op)
{
    struct sim_space *sp = &s->space[op->space];

    for (uint32_t i = 0; i < op->n && op->kind != FLEXKV_OP_PREFETCH; i++) {
        page_junk(s, sp, op->pages[i]);
        sp->page[op->pages[i]].op = FK_NONE;
        sp->free_pages[sp->n_free_pages++] = op->pages[i];
    }
    op->used = false;
}

static bool pages_take(struct sim *s, struct sim_op *op)
{
    struct sim_space *sp = &s->space[op->space];

    if (sp->n_free_pages < op->n)
        return false;
    for (uint32_t i = 0; i < op->n; i++) {
        uint32_t at = sim_below(s, sp->n_free_pages);
        op->pages[i] = sp->free_pages[at];
        sp->free_pages[at] = sp->free_pages[--sp->n_free_pages];
        sp->page[op->pages[i]] = (struct sim_page){ .op = (uint32_t)(op - s->ops), .block = i };
    }
    return true;
}

static struct sim_op *op_new(struct sim *s, uint32_t kind, uint32_t space, uint32_t ns,
                             const uint32_t *keys, uint32_t n)
{
    for (uint32_t i = 0; i < SIM_MAX_OPS; i++) {
        struct sim_op *op = &s->ops[i];
        if (op->used)
            continue;
        memset(op, 0, sizeof(*op));
        *op = (struct sim_op){ .used = true, .open = true, .kind = kind, .space = space, .ns = ns,
                               .instance = s->space[space].instance,
                               .n = n, .epoch = s->epoch, .started = s->now,
                               .epoch_floor = s->space[space].epoch_floor };
        memcpy(op->keys, keys, n * sizeof(*keys));
        if (kind != FLEXKV_OP_PREFETCH && !pages_take(s, op)) {
            op->used = op->open = false;
            return NULL;
        }
        op->results = malloc(n);
        memset(op->results, 0x55, n);
        return op;
    }
    return NULL;
}

static void op_drop(struct sim *s, struct sim_op *op)
{
    free(op->results);
    op->results = NULL;
    op->open = false;
    pages_give_back(s, op);
}

static struct fk_core_op_args op_args(struct sim *s, struct sim_op *op)
{
    struct fk_core_op_args a = { .pages = op->kind == FLEXKV_OP_PREFETCH ? NULL : op->pages,
                                 .user_data = op, .results = op->results };

    op->deadline = s->now + s->config.core.op_timeout_us;
    if (!s->config.calm && sim_chance(s, 8)) {
        op->deadline = s->now + sim_range(s, 1, (uint32_t)s->config.core.op_timeout_us * 2);
        a.deadline_us = op->deadline;
    }
    s->call_space = op->space;
    s->call_group = op->ns;
    return a;
}

/* These blocks of a get are copied, or given up: it no longer keeps them. */
void sim_op_let_go(struct sim *s, struct sim_op *op, uint32_t blocks)
{
    for (uint32_t i = 0; i < op->n; i++)
        if (op->held & blocks & (1u << i))
            sim_hold(s, &op->keys[i], 1, -1);
    op->held &= ~blocks;
}

/* Gets that wait for the block give it up. */
void sim_read_failed(struct sim *s, uint32_t key)
{
    for (uint32_t i = 0; i < SIM_MAX_OPS; i++)
        for (uint32_t b = 0; b < s->ops[i].n && s->ops[i].held; b++)
            if (s->ops[i].keys[b] == key)
                sim_op_let_go(s, &s->ops[i], 1u << b);
}

/* The first n blocks, on all ranks that live. */
static void check_got_bytes(struct sim *s, const struct sim_op *op, uint32_t n)
{
    const struct sim_space *sp = &s->space[op->space];
    uint32_t bytes = sp->config->slice_bytes;

    for (uint32_t i = 0; i < n; i++)
        for (uint32_t r = 0; r < sp->config->ranks; r++)
            SIM_CHECK(s, (op->dead_ranks >> r & 1) ||
                             sim_bytes_ok(s, &s->keys.data[op->keys[i]], r, op->epoch_floor,
                                          sp->mem[r] + (uint64_t)op->pages[i] * bytes, bytes),
                      "wrong bytes: get of key %u (block %u, rank %u) gave other bytes",
                      op->keys[i], i, r);
}

/* Of a get that was reported early: now the engine's streams go on. */
void sim_op_job_over(struct sim *s, uint32_t i)
{
    struct sim_op *op = &s->ops[i];

    if (--op->jobs_out || !op->arriving)
        return;
    SIM_TRACE(s, "  all of op %u has arrived", i);
    op->arriving = false;
    check_got_bytes(s, op, op->n);
    pages_give_back(s, op);
}

bool sim_op_sure(const struct sim *s, const struct sim_op *op)
{
    uint32_t sure = op->arrived;

    for (size_t k = 0; k < s->job_uses.len; k++) {
        const struct sim_job_use *u = &s->job_uses.data[k];
        bool all = u->sure == s->space[u->space].config->ranks && u->min_ok == u->n;
        for (uint32_t i = 0; i < u->n && all; i++)
            sure |= (uint32_t)(u->ops[i] == (uint32_t)(op - s->ops)) << u->blocks[i];
    }
    return sure == (uint32_t)((1ull << op->n) - 1);
}

/* Hung workers have let go at last: pages that were left busy can be used again. */
static void reclaim_busy_pages(struct sim *s)
{
    for (uint32_t i = 0; i < SIM_MAX_OPS; i++) {
        struct sim_op *op = &s->ops[i];
        if (op->used && !op->open && op->jobs_out == 0 &&
            fk_core_instance_idle(s->core, op->instance))
            pages_give_back(s, op);
    }
}

uint32_t sim_open_ops(const struct sim *s)
{
    uint32_t n = 0;

    for (uint32_t i = 0; i < SIM_MAX_OPS; i++)
        n += s->ops[i].used && s->ops[i].open;
    return n;
}

/* ---- completions ----------------------------------------------------------------------------------- */

static void check_results(struct sim *s, struct sim_op *op, const struct flexkv_completion *c)
{
    if (op->kind == FLEXKV_OP_PREFETCH && c->blocks <= op->n)
        op->n = c->blocks;              /* of a prefetch: the known prefix */
    SIM_CHECK(s, c->kind == op->kind && c->blocks == op->n, "completion: kind or blocks differ");
    SIM_CHECK(s, c->blocks_ok <= op->n, "completion: %u of %u blocks ok", c->blocks_ok, op->n);
    SIM_CHECK(s, (c->status == 0) == (c->blocks_ok == op->n),
              "completion: status %d with %u of %u blocks ok", c->status, c->blocks_ok, op->n);
    for (uint32_t i = 0; i < op->n; i++) {
        if (i < c->blocks_ok)
            SIM_CHECK(s, op->results[i] == 0, "results: block %u is %d, %u are ok", i,
                      op->results[i], c->blocks_ok);
        else if (i == c->blocks_ok)
            SIM_CHECK(s, op->results[i] == c->status, "results: first failed block is %d, status %d",
                      op->results[i], c->status);
        else if (op->kind == FLEXKV_OP_GET)
            SIM_CHECK(s, op->results[i] < 0, "results: block %u of a get is ok after a failed one",
                      i);
    }
}

static void check_status_lawful(struct sim *s, const struct sim_op *op,
                                const struct flexkv_completion *c)
{
    bool reset = op->epoch != s->epoch;

    switch (c->status) {
    case 0:
        SIM_CHECK(s, !reset, "an operation from before a reset ended well after it");
        break;
    case -ECANCELED:
        SIM_CHECK(s, op->cancelled || reset || !s->config.calm, "cancelled, but nobody asked");
        break;
    case -ETIMEDOUT:
        SIM_CHECK(s, s->now >= op->deadline, "timed out %llu us before its deadline",
                  (unsigned long long)(op->deadline - s->now));
        SIM_CHECK(s, !s->config.calm, "timed out although nothing was slow: it hung");
        break;
    case -ENOSPC: case -ENOENT:
        break;
    default:
        SIM_CHECK(s, !s->config.calm, "status %d although nothing went wrong", c->status);
    }
    if (s->config.calm && op->kind == FLEXKV_OP_GET && !op->cancelled && !reset)
        SIM_CHECK(s, c->status == 0 || (c->status == -ENOSPC && !op->was_all_cpu),
                  "get of leased blocks failed (%d) although nothing went wrong", c->status);
}

/* Stored means: a whole put of it was seen, or another one was under way when this began. */
static void check_put(struct sim *s, const struct sim_op *op, const struct flexkv_completion *c)
{
    for (uint32_t i = 0; i < c->blocks_ok && op->epoch == s->epoch; i++) {
        const struct sim_key *k = &s->keys.data[op->keys[i]];
        SIM_CHECK(s, k->complete_epoch > s->space[op->space].epoch_floor ||
                         (op->under_way >> i & 1),
                  "put says key %u is stored; not every rank has copied it", op->keys[i]);
    }
    s->put_blocks += c->blocks_ok;
}

/* The bytes are looked at when the last job is over: sim_op_job_over. */
static void check_early(struct sim *s, const struct sim_op *op, const struct flexkv_completion *c)
{
    SIM_CHECK(s, op->early, "reported early, and nobody asked");
    SIM_CHECK(s, !op->cancelled, "reported early, and it was cancelled");
    SIM_CHECK(s, c->flags == FLEXKV_COMPLETION_EARLY && c->status == 0,
              "reported early: status %d, flags %x", c->status, c->flags);
    SIM_CHECK(s, op->jobs_out, "reported early, and no job is under way");
    SIM_CHECK(s, sim_op_sure(s, op), "reported early, and not all of it is on its way");
}

static void count_got(struct sim *s, const struct flexkv_completion *c)
{
    if (c->kind != FLEXKV_OP_GET)
        return;
    s->got_blocks += c->blocks_ok;
    s->failed_blocks += c->blocks - c->blocks_ok;
}

void sim_completion(struct sim *s, const struct flexkv_completion *c)
{
    struct sim_op *op = c->user_data;
    bool busy = c->flags & FLEXKV_COMPLETION_PAGES_BUSY, early = c->flags & FLEXKV_COMPLETION_EARLY;

    SIM_CHECK(s, op >= s->ops && op < s->ops + SIM_MAX_OPS, "completion: wrong user_data");
    SIM_TRACE(s, "  completion op %u kind %u status %d ok %u/%u flags %x", (unsigned)(op - s->ops),
              c->kind, c->status, c->blocks_ok, c->blocks, c->flags);
    SIM_CHECK(s, op->used && op->open && op->id == c->op, "an operation completed twice");
    sim_mix(s, c->kind * 65536u + c->blocks_ok * 256u + (uint32_t)-c->status);
    check_results(s, op, c);
    check_status_lawful(s, op, c);
    if (early)
        check_early(s, op, c);
    else if (op->kind == FLEXKV_OP_GET)
        check_got_bytes(s, op, c->blocks_ok);
    count_got(s, c);
    if (op->kind == FLEXKV_OP_PUT)
        check_put(s, op, c);
    SIM_CHECK(s, busy || early || op->jobs_out == 0,
              "operation over, its pages called free, and a rank still has its job");
    if (!early)                             /* else as long as slots are read */
        sim_op_let_go(s, op, ~0u);
    free(op->results);
    op->results = NULL;
    op->open = false;
    s->done_ops++;
    s->busy_pages += busy;
    s->early_ops += early;
    op->arriving = early;
    if (!busy && !early)
        pages_give_back(s, op);
}

void sim_check_deadlines(struct sim *s)
{
    reclaim_busy_pages(s);
    for (uint32_t i = 0; i < SIM_MAX_OPS; i++) {
        const struct sim_op *op = &s->ops[i];
        uint64_t end = op->deadline + op->late_us + s->config.core.cancel_grace_us +
                       2 * sim_slack(s);
        SIM_CHECK(s, !op->used || !op->open || s->now <= end,
                  "operation %u (kind %u) lives %llu us after deadline and grace", i, op->kind,
                  (unsigned long long)(s->now - end));
    }
}

/* ---- leases -------------------------------------------------------------------------------------------- */

static void lease_remove(struct sim *s, uint32_t i)
{
    sim_hold(s, s->leases[i].keys, s->leases[i].n, -1);
    s->leases[i] = s->leases[--s->n_leases];
}

/* From its deadline on a lease protects nothing; it may live on until the next tick. */
void sim_expire_leases(struct sim *s)
{
    for (uint32_t i = 0; i < s->n_leases;) {
        if (s->leases[i].expires <= s->now)
            lease_remove(s, i);
        else
            i++;
    }
    for (uint32_t i = 0; i < SIM_MAX_OPS; i++)
        if (s->ops[i].held && s->ops[i].deadline <= s->now && !s->ops[i].arriving)
            sim_op_let_go(s, &s->ops[i], ~0u);
}

/* By the events, and in a directory that the core was told is in use. */
static bool on_ssd(const struct sim *s, uint32_t key)
{
    const struct sim_key *k = &s->keys.data[key];
    const struct sim_space *sp = &s->space[k->space];
    struct fk_core_where w;

    return k->there[FK_TIER_SSD] && fk_core_find(s->core, k->key, &w) &&
           !(sp->ssd && sp->dirs_out >> fk_ssd_dir_of(sp->ssd, w.ssd_slot) & 1);
}

/* Directories went out: gets give up the blocks that were there only. */
void sim_dirs_changed(struct sim *s)
{
    for (uint32_t i = 0; i < SIM_MAX_OPS; i++)
        for (uint32_t b = 0; b < s->ops[i].n && s->ops[i].held; b++)
            if (!s->keys.data[s->ops[i].keys[b]].there[FK_TIER_CPU] && !on_ssd(s, s->ops[i].keys[b]))
                sim_op_let_go(s, &s->ops[i], 1u << b);
}

static void check_match(struct sim *s, const uint32_t *keys, uint32_t n, uint32_t space,
                        const struct flexkv_match_result *r)
{
    uint32_t m = 0, cpu = 0;

    for (; m < n; m++) {
        const struct sim_key *k = &s->keys.data[keys[m]];
        bool ssd = on_ssd(s, keys[m]);
        if (!k->there[FK_TIER_CPU] && !ssd)
            break;
        cpu += k->there[FK_TIER_CPU];
    }
    if (s->space[space].costs && r->blocks < m)     /* cut to what is worth loading */
        for (; m > r->blocks; m--)
            cpu -= s->keys.data[keys[m - 1]].there[FK_TIER_CPU];
    SIM_CHECK(s, r->blocks == m && r->cpu_blocks == cpu && r->ssd_blocks == m - cpu,
              "match: %u blocks (%u cpu, %u ssd); by the events %u (%u, %u)", r->blocks,
              r->cpu_blocks, r->ssd_blocks, m, cpu, m - cpu);
    SIM_CHECK(s, !s->space[space].ssd_unknown || !r->ssd_blocks,
              "match: %u blocks of a tier whose speed is not known", r->ssd_blocks);
    SIM_CHECK(s, (r->lease != 0) == (m != 0), "match: lease %llu for %u blocks",
              (unsigned long long)r->lease, m);
    for (uint32_t i = 0; i < r->blocks; i++)
        SIM_CHECK(s, s->keys.data[keys[i]].complete_epoch > s->space[space].epoch_floor,
                  "match: key %u was never put whole", keys[i]);
}

static bool act_match(struct sim *s, uint32_t space, const struct sim_prompt *p)
{
    struct fk_key keys[SIM_MAX_CHAIN];
    struct flexkv_match_result r;
    uint32_t n = sim_chance(s, 3) ? sim_range(s, 1, p->n) : p->n;

    if (s->n_leases == SIM_MAX_LEASES)
        return false;
    key_values(s, p->keys, n, keys);
    sim_expire_leases(s);
    fk_core_match(s->core, s->space[space].instance, keys, n, s->now, &r);
    SIM_TRACE(s, "match space %u n=%u -> %u blocks, %u cpu, lease %llx", space, n, r.blocks,
              r.cpu_blocks, (unsigned long long)r.lease);
    sim_mix(s, r.blocks * 64 + r.cpu_blocks);
    sim_after(s, SIM_CALL_MATCH);
    check_match(s, p->keys, n, space, &r);
    if (!r.blocks)
        return true;
    struct sim_lease *l = &s->leases[s->n_leases];
    *l = (struct sim_lease){ .id = r.lease, .space = space, .ns = p->ns, .n = r.blocks,
                             .cpu_blocks = r.cpu_blocks, .epoch = s->epoch,
                             .expires = s->now + s->config.core.lease_timeout_us };
    memcpy(l->keys, p->keys, r.blocks * sizeof(uint32_t));
    sim_hold(s, l->keys, l->n, 1);
    s->n_leases++;
    return true;
}

static void act_release(struct sim *s)
{
    if (!s->n_leases)
        return;
    uint32_t i = sim_below(s, s->n_leases);
    struct sim_lease l = s->leases[i];
    bool alive = l.expires > s->now && l.epoch == s->epoch;
    lease_remove(s, i);
    int rc = fk_core_release(s->core, l.id);
    SIM_TRACE(s, "release %llx -> %d", (unsigned long long)l.id, rc);
    SIM_CHECK(s, rc == 0 || (rc == -ENOENT && !alive), "release of a live lease: %d", rc);
    sim_after(s, SIM_CALL_RELEASE);
    rc = fk_core_release(s->core, l.id);
    SIM_CHECK(s, rc == -ENOENT, "second release of a lease: %d", rc);
}

/* ---- requests ----------------------------------------------------------------------------------------------- */

static void act_get(struct sim *s)
{
    uint64_t id = 0;

    if (!s->n_leases)
        return;
    uint32_t at = sim_below(s, s->n_leases);
    struct sim_lease l = s->leases[at];
    uint32_t first = sim_chance(s, 3) ? sim_below(s, l.n) : 0;
    uint32_t n = sim_chance(s, 3) ? sim_range(s, 1, l.n - first) : l.n - first;
    struct sim_op *op = op_new(s, FLEXKV_OP_GET, l.space, l.ns, l.keys + first, n);
    if (!op)
        return;
    struct fk_core_op_args args = op_args(s, op);
    args.layerwise = sim_chance(s, 8);
    args.early = s->config.early && !sim_early_chance(s, 3);
    op->early = args.early && !args.layerwise;      /* in layers it has no effect */
    bool alive = l.expires > s->now && l.epoch == s->epoch;
    op->was_all_cpu = l.cpu_blocks == l.n;
    sim_hold(s, op->keys, n, 1);            /* the get takes over before the lease ends */
    op->held = (uint32_t)((1ull << n) - 1);
    lease_remove(s, at);
    int rc = fk_core_get(s->core, l.id, first, n, &args, s->now, &id);
    SIM_TRACE(s, "get lease %llx [%u,+%u) -> %d op %u%s", (unsigned long long)l.id, first, n, rc,
              (unsigned)(op - s->ops), args.early ? " early" : "");
    op->id = id;
    SIM_CHECK(s, rc == 0 || (rc == -ENOENT && !alive), "get on a live lease: %d", rc);
    SIM_CHECK(s, rc != 0 || s->last_tick < l.expires, "get on a lease that ran out is accepted");
    /* A returned copy behind a put's is given up, a block whose read failed is let go, and all of a
     * get in layers with it: no claim. */
    if (s->config.dirs_go || !s->config.calm || args.layerwise)
        sim_op_let_go(s, op, ~0u);
    if (rc) {
        sim_op_let_go(s, op, ~0u);
        op_drop(s, op);
    }
    sim_after(s, SIM_CALL_GET);
}

static void fill_pages(struct sim *s, const struct sim_op *op)
{
    struct sim_space *sp = &s->space[op->space];
    uint32_t bytes = sp->config->slice_bytes;

    for (uint32_t i = 0; i < op->n; i++)
        for (uint32_t r = 0; r < sp->config->ranks; r++)
            sim_fill(&s->keys.data[op->keys[i]], r, s->epoch,
                     sp->mem[r] + (uint64_t)op->pages[i] * bytes, bytes);
}

/* By the core's own account; and then an event will tell. */
static bool is_under_way(const struct sim *s, uint32_t key)
{
    struct fk_core_where w;

    return fk_core_find(s->core, s->keys.data[key].key, &w) && !w.cpu_ready && !w.ssd_ready;
}

static void act_put(struct sim *s, uint32_t space, const struct sim_prompt *p)
{
    struct fk_key keys[SIM_MAX_CHAIN];
    uint64_t id = 0;
    uint32_t n = sim_chance(s, 4) ? sim_range(s, 1, p->n) : p->n, first = 0;
    uint32_t slots[SIM_MAX_CHAIN];

    while (first < n - 1 && (s->keys.data[p->keys[first]].there[0] ||
                             s->keys.data[p->keys[first]].there[1]))
        first++;                            /* what a match would have said */
    if (sim_chance(s, 6))
        first = sim_below(s, n);
    struct sim_op *op = op_new(s, FLEXKV_OP_PUT, space, p->ns, p->keys + first, n - first);
    if (!op)
        return;
    struct fk_core_op_args args = op_args(s, op);
    for (uint32_t i = 0; i < op->n; i++)
        op->under_way |= (uint32_t)is_under_way(s, op->keys[i]) << i;
    key_values(s, p->keys, n, keys);
    fill_pages(s, op);
    sim_expire_leases(s);
    args.slots = slots;
    int rc = fk_core_put(s->core, s->space[space].instance, s->space[space].group[p->ns], keys, n, first,
                         &args, s->now, &id);
    SIM_TRACE(s, "put space %u ns %u [%u,%u) last key %u -> %d op %u", space, p->ns, first, n,
              p->keys[n - 1], rc, (unsigned)(op - s->ops));
    SIM_CHECK(s, rc == 0, "put refused: %d", rc);
    op->id = id;
    sim_after(s, SIM_CALL_PUT);
    sim_events_put(s, space, p->keys + first, slots, n - first);
}

static void act_prefetch(struct sim *s, uint32_t space, const struct sim_prompt *p)
{
    struct fk_key keys[SIM_MAX_CHAIN];
    uint64_t id = 0;
    struct sim_op *op = op_new(s, FLEXKV_OP_PREFETCH, space, p->ns, p->keys, p->n);

    if (!op)
        return;
    struct fk_core_op_args args = op_args(s, op);
    key_values(s, p->keys, p->n, keys);
    sim_expire_leases(s);
    int rc = fk_core_prefetch(s->core, s->space[space].instance, keys, p->n, &args, s->now, &id);
    SIM_TRACE(s, "prefetch space %u n=%u -> %d op %u", space, p->n, rc, (unsigned)(op - s->ops));
    SIM_CHECK(s, rc == 0, "prefetch refused: %d", rc);
    op->id = id;
    sim_after(s, SIM_CALL_PREFETCH);
}

static void act_cancel(struct sim *s)
{
    struct sim_op *op = &s->ops[sim_below(s, SIM_MAX_OPS)];

    if (op->used && op->arriving) {
        int rc = fk_core_cancel(s->core, op->id, s->now);
        SIM_CHECK(s, rc == -ENOENT, "cancel of a get that was reported early: %d", rc);
        return;
    }
    if (!op->used || !op->open) {
        int rc = fk_core_cancel(s->core, fk_rng_next(&s->rng) | 1ull << 63, s->now);
        SIM_CHECK(s, rc == -ENOENT, "cancel of no operation: %d", rc);
        return;
    }
    op->cancelled = true;
    sim_op_let_go(s, op, ~0u);
    sim_expire_leases(s);
    int rc = fk_core_cancel(s->core, op->id, s->now);
    SIM_TRACE(s, "cancel op %u -> %d", (unsigned)(op - s->ops), rc);
    SIM_CHECK(s, rc == 0, "cancel of an open operation: %d", rc);
    sim_after(s, SIM_CALL_CANCEL);
}

void sim_do_reset(struct sim *s)
{
    SIM_TRACE(s, "reset");
    s->epoch++;
    for (uint32_t i = 0; i < s->config.n_spaces; i++)
        s->space[i].epoch_floor = s->epoch;
    while (s->n_leases)
        lease_remove(s, 0);
    for (uint32_t i = 0; i < SIM_MAX_OPS; i++)
        sim_op_let_go(s, &s->ops[i], ~0u);
    fk_core_reset(s->core, s->now);
    sim_after(s, SIM_CALL_RESET);
    for (uint32_t i = 0; i < s->keys.len; i++)
        SIM_CHECK(s, !s->keys.data[i].there[0] && !s->keys.data[i].there[1],
                  "key %u survived a reset", i);
}

/* A rank's memory is taken away: jobs of the space are cancelled, its operations fail. */
void sim_do_fail_space(struct sim *s)
{
    uint32_t space = sim_below(s, s->config.n_spaces);

    SIM_TRACE(s, "rank of space %u unregistered", space);
    for (uint32_t i = 0; i < SIM_MAX_OPS; i++)
        if (s->ops[i].space == space)
            sim_op_let_go(s, &s->ops[i], ~0u);
    sim_expire_leases(s);
    fk_core_fail_ops(s->core, s->space[space].instance, -ENOTCONN, s->now);
    sim_after(s, SIM_CALL_CANCEL);
}

/* A client dies with all its leases and operations; another takes its place at once. */
void sim_do_client_dies(struct sim *s)
{
    uint32_t at = sim_below(s, s->config.n_spaces);
    struct sim_space *sp = &s->space[at];

    if (sp->n_old == SIM_OLD_INSTANCES)
        return;
    SIM_TRACE(s, "client of space %u dies", at);
    for (uint32_t i = s->n_leases; i-- > 0;)
        if (s->leases[i].space == at)
            lease_remove(s, i);
    for (uint32_t i = 0; i < SIM_MAX_OPS; i++)
        if (s->ops[i].space == at)
            sim_op_let_go(s, &s->ops[i], ~0u);
    sim_expire_leases(s);
    fk_core_instance_end(s->core, sp->instance, -ECANCELED, s->now);
    sp->old[sp->n_old++] = sp->instance;
    int rc = fk_core_instance_add(s->core, sp->id, sp->config->ranks, &sp->instance);
    SIM_CHECK(s, rc == 0, "fk_core_instance_add: %d", rc);
    sim_old_instances(s, sp);
    sim_after(s, SIM_CALL_CANCEL);
}

void sim_old_instances(struct sim *s, struct sim_space *sp)
{
    for (uint32_t i = sp->n_old; i-- > 0;) {
        if (!fk_core_instance_idle(s->core, sp->old[i]))
            continue;
        fk_core_instance_remove(s->core, sp->old[i]);
        sp->old[i] = sp->old[--sp->n_old];
    }
}

/* Tiers get faster or slower than computing, or nothing is known of them. */
void sim_do_costs(struct sim *s)
{
    struct sim_space *sp = &s->space[sim_below(s, s->config.n_spaces)];
    struct fk_core_costs costs = { 0 };

    if (sim_chance(s, 2)) {
        costs.copy.us = sim_below(s, 100);
        if (!sim_chance(s, 3))
            costs.ssd = (struct fk_rate){ 1 + sim_below(s, 400), sim_below(s, 50), s->now };
        costs.load_us = sim_below(s, 200);
        costs.compute_us = 1 + sim_below(s, 400);
    }
    sp->costs = costs.compute_us != 0;
    sp->ssd_unknown = sp->costs && !(costs.ssd.us > 0);
    fk_core_set_costs(s->core, sp->id, &costs);
    if (sp->ssd) {
        uint64_t hint[2] = { sp->hint = ++sp->hints, (uint64_t)(sp - s->space) };
        fk_ssd_set_hint(sp->ssd, hint, sizeof(hint));
    }
}

void sim_forget_callers(struct sim *s)
{
    while (s->n_leases)
        lease_remove(s, 0);
    for (uint32_t i = 0; i < SIM_MAX_OPS; i++) {
        struct sim_op *op = &s->ops[i];
        if (!op->used)
            continue;
        sim_op_let_go(s, op, ~0u);
        op->jobs_out = 0;
        op_drop(s, op);
    }
}

void sim_caller_step(struct sim *s)
{
    uint32_t space, what = sim_below(s, 100);
    const struct sim_prompt *p = pick_prompt(s, &space);

    if (what < 34)
        act_put(s, space, p);
    else if (what < 62)
        act_match(s, space, p);
    else if (what < 82)
        act_get(s);
    else if (what < 88)
        act_release(s);
    else if (what < 95)
        act_prefetch(s, space, p);
    else
        act_cancel(s);
}
