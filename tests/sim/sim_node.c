/*
 * sim_node.c - the shell around the real core and the real SSD tiers: opens and closes them,
 * kills them, and carries requests and completions between them, late and out of order.
 * It does what src/api does with threads, one small step at a time. Caller: sim.c.
 */
#include "sim.h"

#include <errno.h>
#include <stdio.h>

#define PUMP 16

bool sim_disk_trusted(const struct sim *s)
{
    const struct sim_config *c = &s->config;

    return !c->disk_faults && !c->rot && !c->dirs_go && !c->power_loss;
}

uint32_t sim_slack(const struct sim *s)
{
    return s->config.calm ? 50 : 300;
}

/* ---- spaces: memory ----------------------------------------------------------------------------- */

static void *need(void *p)
{
    if (!p)
        abort();
    return p;
}

static void space_create(struct sim *s, uint32_t i)
{
    struct sim_space *sp = &s->space[i];
    const struct sim_space_config *c = &s->config.space[i];
    char name[32] = "";

    sp->config = c;
    sp->slot_bytes = (uint32_t)fk_round_up((uint64_t)c->ranks * c->slice_bytes, FK_SSD_ALIGN);
    sp->pool = need(aligned_alloc(4096, (size_t)c->cpu_slots * sp->slot_bytes));
    for (uint32_t r = 0; r < c->ranks; r++)
        sp->mem[r] = need(calloc(c->pages, c->slice_bytes));
    sp->page = need(calloc(c->pages, sizeof(*sp->page)));
    sp->free_pages = need(calloc(c->pages, sizeof(uint32_t)));
    for (uint32_t p = 0; p < c->pages; p++) {
        sp->page[p].op = FK_NONE;
        sp->free_pages[sp->n_free_pages++] = p;
    }
    sp->cpu_use = need(calloc(c->cpu_slots, sizeof(*sp->cpu_use)));
    sp->ssd_use = need(calloc(c->ssd_slots + 1, sizeof(*sp->ssd_use)));
    sp->cpu_mark = need(calloc(c->cpu_slots, sizeof(uint32_t)));
    sp->ssd_mark = need(calloc(c->ssd_slots + 1, sizeof(uint32_t)));
    sp->ssd_slot = need(calloc(c->ssd_slots + 1, sizeof(*sp->ssd_slot)));
    for (uint32_t k = 0; k <= c->ssd_slots; k++)
        sp->ssd_slot[k].key = FK_NONE;
    snprintf(name, sizeof(name), "sim-space-%u", i);
    memcpy(sp->fingerprint, name, 16);
    for (uint32_t n = 0; n < c->n_ns; n++) {
        snprintf(name, sizeof(name), "ns%u", n);
        const char *parts[1] = { name };
        sp->ns_seed[n] = fk_key_seed(sp->fingerprint, 16, parts, n ? 1 : 0);
    }
    for (uint32_t r = 0; r < c->ranks; r++)
        sp->agent[r].lag_us = sim_chance(s, 4) ? sim_below(s, 300) : 0;
}

static void space_free(struct sim_space *sp)
{
    for (uint32_t k = 0; k <= sp->config->ssd_slots; k++)
        fk_vec_free(&sp->ssd_slot[k].past);
    for (uint32_t r = 0; r < sp->config->ranks; r++)
        free(sp->mem[r]);
    free(sp->pool);
    free(sp->page);
    free(sp->free_pages);
    free(sp->cpu_use);
    free(sp->ssd_use);
    free(sp->cpu_mark);
    free(sp->ssd_mark);
    free(sp->ssd_slot);
}

/* ---- open ------------------------------------------------------------------------------------------ */

static int open_ssd(struct sim *s, uint32_t i, bool recreate, char *error, size_t error_bytes)
{
    struct sim_space *sp = &s->space[i];
    const char *dirs[SIM_DISK_DIRS];
    char name[16];

    snprintf(name, sizeof(name), "space%u", i);
    for (uint32_t d = 0; d < s->config.n_dirs; d++)
        dirs[d] = s->disk.dir_path[d];
    struct fk_ssd_params p = {
        .name = name, .dirs = dirs, .n_dirs = s->config.n_dirs,
        .block_bytes = (uint64_t)sp->config->ranks * sp->config->slice_bytes,
        .n_slots = sp->config->ssd_slots, .recreate = recreate, .direct = true,
        .virtual_dirs = true, .io_chunk_bytes = sp->config->io_chunk,
        .stripe_slots = sp->config->stripe_slots, .device_errors = s->config.device_errors,
        .device_retry_us = s->config.device_retry_us, .engine = sim_engine_base(s->engine),
    };
    memcpy(p.fingerprint, sp->fingerprint, 16);
    return fk_ssd_open(&p, &sp->ssd, error, error_bytes);
}

/* What a crash leaves is never refused; a disk that was replaced, or bad table sectors may be. */
static void open_space_ssd(struct sim *s, uint32_t i)
{
    char error[512] = "";
    int rc = open_ssd(s, i, false, error, sizeof(error));

    if (rc) {
        SIM_TRACE(s, "open of space %u: %d %s", i, rc, error);
        SIM_CHECK(s, rc == -EEXIST && s->tables_damaged,
                  "open of the SSD store refused: %d (%s)", rc, error);
        rc = open_ssd(s, i, true, error, sizeof(error));
        SIM_CHECK(s, rc == 0, "open with recreate refused: %d (%s)", rc, error);
        s->space[i].recreated = true;
    }
}

static void add_space(struct sim *s, uint32_t i)
{
    struct sim_space *sp = &s->space[i];
    struct fk_core_space_params p = { .cpu_slots = sp->config->cpu_slots,
                                      .ssd_slots = sp->config->ssd_slots,
                                      .probe_blocks = sim_below(s, 9) };

    if (p.ssd_slots) {
        open_space_ssd(s, i);
        p.ssd_stripe_slots = fk_ssd_stripe_slots(sp->ssd);
        p.ssd_dirs = s->config.n_dirs;
    }
    int rc = fk_core_space_add(s->core, &p, &sp->id);
    SIM_CHECK(s, rc == 0, "fk_core_space_add: %d", rc);
    sp->n_old = 0;
    sp->costs = sp->ssd_unknown = false;
    rc = fk_core_instance_add(s->core, sp->id, sp->config->ranks, &sp->instance);
    SIM_CHECK(s, rc == 0, "fk_core_instance_add: %d", rc);
    sp->default_group = fk_core_space_default_group(s->core, sp->id);
    sp->dirs_out = 0;
    for (uint32_t n = 0; n < sp->config->n_ns; n++) {
        sp->group[n] = sp->default_group;
        if (!sp->config->quotas)
            continue;
        rc = fk_core_group_add(s->core, sp->id, &sp->config->quota[n], &sp->group[n]);
        SIM_CHECK(s, rc == 0, "fk_core_group_add: %d", rc);
    }
}

/* Old perhaps, but never another one's; the last one after an end that gave time for it. */
static void check_hint(struct sim *s, uint32_t i)
{
    struct sim_space *sp = &s->space[i];
    uint64_t hint[2] = { 0 };
    bool there = fk_ssd_hint(sp->ssd, hint, sizeof(hint));

    SIM_CHECK(s, !there || (hint[0] && hint[0] <= sp->hints && hint[1] == i), "restart: hint %llu of space %llu",
              (unsigned long long)hint[0], (unsigned long long)hint[1]);
    SIM_CHECK(s, !s->must_find || hint[0] == sp->hint, "restart: the hint is lost");
    sp->hint = hint[0];
}

static void found_one(void *arg, const struct fk_ssd_found *f)
{
    struct sim *s = arg;
    struct fk_core_found c = { .key = f->key, .parent = f->parent, .seq = f->seq,
                               .slot = f->slot, .tag = f->tag };

    if (fk_vec_push(&s->found, c))
        abort();
}

static void recover_space(struct sim *s, uint32_t i)
{
    struct sim_space *sp = &s->space[i];

    s->found.len = 0;
    int rc = fk_ssd_recover(sp->ssd, found_one, s);
    SIM_CHECK(s, rc == 0, "fk_ssd_recover: %d", rc);
    sim_check_found(s, i);
    check_hint(s, i);
    for (uint32_t k = (uint32_t)s->found.len; k-- > 1;) {       /* order does not matter */
        uint32_t j = sim_below(s, k + 1);
        struct fk_core_found t = s->found.data[k];
        s->found.data[k] = s->found.data[j];
        s->found.data[j] = t;
    }
    sim_events_found(s, i);
    int64_t n = fk_core_recover(s->core, sp->id, s->found.data, (uint32_t)s->found.len);
    SIM_CHECK(s, n >= 0 && n <= (int64_t)s->found.len, "fk_core_recover: %lld", (long long)n);
    sim_after(s, SIM_CALL_RECOVER);
    sim_check_recovered(s, i, (uint64_t)n);
    SIM_TRACE(s, "space %u: %zu records found, %lld blocks", i, s->found.len, (long long)n);
    s->found_blocks += (uint64_t)n;
}

static void node_open(struct sim *s)
{
    struct sim_disk_faults none = { .min_us = 1, .max_us = 20, .slow_us = 1 };
    bool troubled = s->config.disk_faults;

    s->faults_now = none;           /* start-up on a disk that answers */
    s->engine = sim_engine_create(&s->disk, &s->faults_now, &s->now, fk_rng_next(&s->rng));
    int rc = fk_core_create(&s->config.core, &s->core);
    SIM_CHECK(s, rc == 0, "fk_core_create: %d", rc);
    sim_events_open(s);
    for (uint32_t i = 0; i < s->config.n_spaces; i++) {
        add_space(s, i);
        for (uint32_t k = 0; k < s->space[i].config->cpu_slots; k++)
            sim_junk(s, s->space[i].pool + (uint64_t)k * s->space[i].slot_bytes,
                     s->space[i].slot_bytes);
    }
    for (uint32_t i = 0; i < s->config.n_spaces; i++)
        if (s->space[i].ssd)
            recover_space(s, i);
    s->last_tick = 0;
    s->tables_damaged = troubled && s->config.faults.tables;
    s->faults_now = s->config.faults;
}

void sim_node_create(struct sim *s, const char *base)
{
    sim_disk_init(&s->disk, base, s->config.n_dirs, s->config.power_loss);
    for (uint32_t i = 0; i < s->config.n_spaces; i++)
        space_create(s, i);
    sim_events_create(s);
    node_open(s);
}

/* ---- close, crash -------------------------------------------------------------------------------------- */

static void node_gone(struct sim *s)
{
    for (uint32_t i = 0; i < s->config.n_spaces; i++) {
        fk_ssd_close(s->space[i].ssd);
        s->space[i].ssd = NULL;
    }
    struct fk_engine *e = sim_engine_base(s->engine);
    SIM_CHECK(s, e->ops->inflight(e) == 0, "I/O left in flight after close");
    e->ops->destroy(e);
    s->engine = NULL;
}

static void forget_process(struct sim *s, enum sim_end end)
{
    for (uint32_t i = 0; i < s->config.n_spaces && s->config.faults.tables; i++)
        s->space[i].epoch_floor = 0;    /* the header of a reset may have been lost */
    sim_events_forget(s, end);
    fk_core_destroy(s->core);
    s->core = NULL;
    sim_agents_forget(s);
    sim_forget_callers(s);
    s->reqs.len = 0;
    s->n_dones = 0;
    for (uint32_t i = 0; i < s->config.n_spaces; i++) {
        struct sim_space *sp = &s->space[i];
        memset(sp->cpu_use, 0, sp->config->cpu_slots * sizeof(*sp->cpu_use));
        memset(sp->ssd_use, 0, sp->config->ssd_slots * sizeof(*sp->ssd_use));
    }
    for (uint32_t i = 0; i < s->keys.len; i++)
        for (int t = 0; t < FK_TIERS; t++)
            sim_set_there(s, &s->keys.data[i], (enum fk_tier)t, false);
}

/* kill -9, or the power goes: I/O under way is done in part; nothing else is. */
void sim_crash(struct sim *s, bool power)
{
    SIM_TRACE(s, "%s", power ? "power loss" : "crash");
    bool settled = sim_ssd_settled(s);
    sim_note_ready(s, settled && !power);
    for (uint32_t i = 0; i < s->reqs.len; i++)
        if (!s->reqs.data[i].read)
            s->space[s->reqs.data[i].space].ssd_slot[s->reqs.data[i].ssd_slot].torn = true;
    sim_engine_kill(s->engine);
    node_gone(s);
    if (power)
        sim_disk_power_loss(&s->disk, &s->rng);
    for (uint32_t i = 0; i < s->config.n_spaces; i++) {
        struct sim_space *sp = &s->space[i];
        if (power)                  /* with a header that was not on the medium a reset is undone */
            sp->disk_epoch = 0;
        sp->epoch_floor = fk_min(sp->epoch_floor, sp->disk_epoch);
    }
    s->tables_damaged |= power;     /* headers are not synced: a new store's may be lost in part */
    s->crashes++;
    forget_process(s, power ? SIM_END_POWER : SIM_END_CRASH);
    sim_dirs_back(s);
    node_open(s);
}

/* A clean end and a new start. */
void sim_reopen(struct sim *s)
{
    bool quiet = sim_chance(s, 2);

    if (quiet)
        sim_quiesce(s);
    SIM_TRACE(s, "close and open");
    sim_dirs_back(s);
    sim_note_ready(s, quiet && sim_ssd_settled(s));
    node_gone(s);
    for (uint32_t i = 0; i < s->config.n_spaces; i++)
        s->space[i].epoch_floor = fk_min(s->space[i].epoch_floor, s->space[i].disk_epoch);
    forget_process(s, SIM_END_CLEAN);
    node_open(s);
}

void sim_node_destroy(struct sim *s)
{
    node_gone(s);
    forget_process(s, SIM_END_CLEAN);
    sim_events_destroy(s);
    for (uint32_t i = 0; i < s->config.n_spaces; i++)
        space_free(&s->space[i]);
    sim_disk_free(&s->disk);
}

/* ---- directories that go and come back ----------------------------------------------------------------- */

void sim_dirs_step(struct sim *s)
{
    uint32_t d = sim_below(s, s->config.n_dirs);

    if (!s->disk.dir_gone[d]) {
        if (sim_chance(s, 3))
            s->disk.dir_gone[d] = true;
    } else {
        s->disk.dir_gone[d] = false;
        if (sim_chance(s, 5)) {
            sim_disk_wipe_dir(&s->disk, d, &s->rng);
            s->tables_damaged = true;
        }
    }
    SIM_TRACE(s, "directory %u is %s", d, s->disk.dir_gone[d] ? "gone" : "there");
    s->dirs_out_seen++;
    s->rough_since_quiet = true;
}

void sim_dirs_back(struct sim *s)
{
    for (uint32_t d = 0; d < s->config.n_dirs; d++)
        s->disk.dir_gone[d] = false;
}

/* ---- SSD requests ------------------------------------------------------------------------------------------ */

static void track_request(struct sim *s, const struct fk_core_ssd_req *r, uint32_t space)
{
    struct sim_space *sp = &s->space[space];
    bool read = r->kind == FK_SSD_READ;
    struct sim_req q = { .id = r->id, .read = read, .space = space, .ssd_slot = r->ssd_slot,
                         .cpu_slot = r->cpu_slot, .key = sim_key_find(s, r->key),
                         .epoch = s->epoch };

    SIM_CHECK(s, q.key != FK_NONE && s->keys.data[q.key].space == space,
              "ssd request for a key of another space");
    SIM_CHECK(s, r->ssd_slot < sp->config->ssd_slots && r->cpu_slot < sp->config->cpu_slots,
              "ssd request: slots %u, %u out of range", r->ssd_slot, r->cpu_slot);
    SIM_TRACE(s, "ssd %s space %u key %u cpu %u ssd %u", read ? "read" : "write", space, q.key,
              r->cpu_slot, r->ssd_slot);
    sim_use(s, &sp->ssd_use[r->ssd_slot], !read, "ssd", r->ssd_slot);
    sim_use(s, &sp->cpu_use[r->cpu_slot], read, "cpu", r->cpu_slot);
    sim_check_unowned(s, space, read ? FK_TIER_CPU : FK_TIER_SSD,
                      read ? r->cpu_slot : r->ssd_slot);
    if (read) {
        uint32_t at = sp->ssd_slot[r->ssd_slot].key;
        SIM_CHECK(s, at == q.key, "ssd read of key %u from slot %u, where key %u is", q.key,
                  r->ssd_slot, at);
        s->ssd_reads++;
    } else {
        const struct sim_key *k = &s->keys.data[q.key];
        SIM_CHECK(s, fk_key_equal(r->parent, k->parent), "ssd write of key %u: wrong parent", q.key);
        SIM_CHECK(s, sim_slot_bytes_ok(s, space, r->cpu_slot, q.key, 0),
                  "ssd write of key %u: cpu slot %u holds other bytes", q.key, r->cpu_slot);
        sp->ssd_slot[r->ssd_slot].key = FK_NONE;
        if (fk_vec_push(&sp->ssd_slot[r->ssd_slot].past, q.key))
            abort();
    }
    if (fk_vec_push(&s->reqs, q))
        abort();
}

static struct fk_ssd_req ssd_req(const struct sim_space *sp, const struct fk_core_ssd_req *r)
{
    return (struct fk_ssd_req){
        .op = r->kind == FK_SSD_READ ? FK_IO_READ : FK_IO_WRITE, .slot = r->ssd_slot,
        .buf = sp->pool + (uint64_t)r->cpu_slot * sp->slot_bytes, .key = r->key,
        .parent = r->parent, .tag = r->tag, .id = r->id,
    };
}

static void do_forget_or_reset(struct sim *s, uint32_t space, const struct fk_core_ssd_req *r)
{
    struct sim_space *sp = &s->space[space];

    SIM_TRACE(s, "ssd %s space %u slot %u", r->kind == FK_SSD_FORGET ? "forget" : "reset", space,
              r->ssd_slot);
    if (r->kind == FK_SSD_FORGET) {
        SIM_CHECK(s, r->ssd_slot < sp->config->ssd_slots, "forget of slot %u", r->ssd_slot);
        fk_ssd_forget(sp->ssd, r->ssd_slot);
        sp->ssd_slot[r->ssd_slot].forgotten = true;
    } else {
        uint32_t epoch = s->epoch;
        uint64_t start = s->now;
        if (fk_ssd_reset(sp->ssd, s->now) == 0)
            sp->disk_epoch = fk_max(sp->disk_epoch, epoch);
        for (uint32_t i = 0; i < SIM_MAX_OPS; i++)      /* it waits for the device */
            s->ops[i].late_us += s->now - start;
    }
}

static uint32_t space_of(const struct sim *s, uint32_t id)
{
    for (uint32_t i = 0; i < s->config.n_spaces; i++)
        if (s->space[i].id == id)
            return i;
    return 0;
}

static bool take_requests(struct sim *s, uint32_t max)
{
    struct fk_core_ssd_req reqs[PUMP];
    struct fk_ssd_req batch[PUMP];
    uint32_t n, len = 0;

    sim_expire_leases(s);
    n = fk_core_take_ssd(s->core, reqs, fk_min(max, (uint32_t)PUMP));
    sim_after(s, SIM_CALL_TAKE);        /* it may go on with what waited for room */
    for (uint32_t i = 0; i < n; i++) {
        uint32_t space = space_of(s, reqs[i].space);
        bool io = reqs[i].kind == FK_SSD_READ || reqs[i].kind == FK_SSD_WRITE;
        if (io) {
            track_request(s, &reqs[i], space);
            sim_events_io(s, space, &reqs[i]);
            batch[len++] = ssd_req(&s->space[space], &reqs[i]);
        }
        if (len && (!io || i + 1 == n || reqs[i + 1].space != reqs[i].space)) {
            uint32_t of = io ? space : space_of(s, reqs[i - 1].space);
            fk_ssd_submit(s->space[of].ssd, batch, len, s->now);
            len = 0;
        }
        if (!io)
            do_forget_or_reset(s, space, &reqs[i]);
    }
    return n > 0;
}

/* ---- completions --------------------------------------------------------------------------------------------- */

static bool reap(struct sim *s)
{
    struct fk_engine *e = sim_engine_base(s->engine);
    struct fk_io *ios[PUMP];
    int n = e->ops->reap(e, ios, (int)sim_range(s, 1, PUMP), 0);

    for (int i = 0; i < n; i++)
        fk_ssd_io_done(ios[i], s->now);
    return n > 0;
}

static bool collect(struct sim *s)
{
    bool any = false;

    for (uint32_t i = 0; i < s->config.n_spaces; i++) {
        struct fk_ssd_done d[PUMP];
        if (!s->space[i].ssd || s->n_dones + PUMP > SIM_DONES)
            continue;
        uint32_t n = fk_ssd_take_done(s->space[i].ssd, d, PUMP);
        for (uint32_t k = 0; k < n; k++)
            s->dones[s->n_dones++] = (struct sim_done){ i, { d[k].id, d[k].status } };
        any |= n > 0;
    }
    return any;
}

static void untrack(struct sim *s, const struct sim_done *d)
{
    for (uint32_t i = 0; i < s->reqs.len; i++) {
        struct sim_req q = s->reqs.data[i];
        if (q.id != d->done.id || q.space != d->space)
            continue;
        struct sim_space *sp = &s->space[q.space];
        sim_unuse(&sp->ssd_use[q.ssd_slot], !q.read);
        sim_unuse(&sp->cpu_use[q.cpu_slot], q.read);
        SIM_TRACE(s, "ssd %s key %u slot %u done: %d", q.read ? "read" : "write", q.key,
                  q.ssd_slot, d->done.status);
        if (d->done.status == 0 && q.read)
            SIM_CHECK(s, sim_slot_bytes_ok(s, q.space, q.cpu_slot, q.key, sp->epoch_floor) ||
                             q.epoch != s->epoch,
                      "wrong bytes: ssd read of key %u from slot %u gave other bytes", q.key,
                      q.ssd_slot);
        if (d->done.status == 0 && !q.read) {
            struct sim_ssd_slot *slot = &sp->ssd_slot[q.ssd_slot];
            slot->key = q.key;
            slot->epoch = q.epoch;
            slot->forgotten = slot->torn = false;
        }
        SIM_CHECK(s, d->done.status == 0 || !sim_disk_trusted(s) || q.epoch != s->epoch ||
                         (q.read && sp->ssd_slot[q.ssd_slot].torn),
                  "ssd %s of key %u failed (%d) although nothing went wrong",
                  q.read ? "read" : "write", q.key, d->done.status);
        if (d->done.status && q.read)
            sim_read_failed(s, q.key);
        s->reqs.data[i] = s->reqs.data[--s->reqs.len];
        return;
    }
    sim_fail(s, "ssd completion of no request, or twice");
}

/* Some of what is done, in any order. */
static bool deliver(struct sim *s, bool all)
{
    struct fk_core_ssd_done batch[PUMP];
    uint32_t n = 0, want = all ? PUMP : sim_range(s, 1, PUMP);
    bool bad = false;

    while (s->n_dones && n < want) {
        uint32_t i = sim_below(s, s->n_dones);
        struct sim_done d = s->dones[i];
        s->dones[i] = s->dones[--s->n_dones];
        untrack(s, &d);
        bad |= d.done.status != 0;
        batch[n++] = d.done;
    }
    if (!n)
        return false;
    s->rough_since_quiet |= bad;
    sim_expire_leases(s);
    fk_core_ssd_done(s->core, batch, n, s->now);
    sim_after(s, bad ? SIM_CALL_SSD_BAD : SIM_CALL_SSD);
    return true;
}

static void tell_dirs(struct sim *s)
{
    for (uint32_t i = 0; i < s->config.n_spaces; i++) {
        struct sim_space *sp = &s->space[i];
        uint32_t mask = sp->ssd ? fk_ssd_dirs_out(sp->ssd) : 0;
        if (mask == sp->dirs_out)
            continue;
        SIM_TRACE(s, "space %u: directories out %x", i, mask);
        sp->dirs_out = mask;
        s->rough_since_quiet = true;
        sim_dirs_changed(s);
        fk_core_ssd_dirs_out(s->core, sp->id, mask);
        sim_after(s, SIM_CALL_DIRS);
    }
}

static bool tick_ssd(struct sim *s)
{
    bool any = false;

    for (uint32_t i = 0; i < s->config.n_spaces; i++) {
        if (!s->space[i].ssd || fk_ssd_next_wakeup(s->space[i].ssd) > s->now)
            continue;
        fk_ssd_tick(s->space[i].ssd, s->now);
        any = true;
    }
    return any;
}

bool sim_pump_step(struct sim *s, bool all)
{
    bool any = false;

    if (all || sim_chance(s, 2))
        any |= take_requests(s, all ? PUMP : sim_range(s, 1, PUMP));
    if (all || sim_chance(s, 2))
        any |= reap(s);
    if (all || sim_chance(s, 2))
        any |= collect(s);
    if (all || sim_chance(s, 2))
        any |= deliver(s, all);
    if (all || sim_chance(s, 4))
        any |= tick_ssd(s);
    tell_dirs(s);
    return any;
}

/* ---- time ---------------------------------------------------------------------------------------------------------- */

void sim_tick(struct sim *s)
{
    sim_expire_leases(s);
    s->last_tick = s->now;
    fk_core_tick(s->core, s->now);
    sim_after(s, SIM_CALL_TICK);
    if (!s->busy)
        s->busy_since = s->now;
    s->busy = fk_core_next_wakeup(s->core) <= s->now;
    SIM_CHECK(s, !s->busy || s->now - s->busy_since < 500, "the core asks for ticks without pause");
}

bool sim_ssd_waiting(const struct sim *s)
{
    struct fk_engine *e = sim_engine_base(s->engine);

    return s->reqs.len && !e->ops->inflight(e);
}

uint64_t sim_next_time(const struct sim *s)
{
    uint64_t next = fk_min(sim_agent_next(s), sim_engine_next_due(s->engine));

    next = fk_min(next, fk_core_next_wakeup(s->core));
    for (uint32_t i = 0; i < s->config.n_spaces; i++)
        if (s->space[i].ssd)
            next = fk_min(next, fk_ssd_next_wakeup(s->space[i].ssd));
    return next;
}
