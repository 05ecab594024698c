/*
 * sim_check.c - full scans, quiet points, and what a restart must find. Reads everything,
 * changes nothing but the clock (a quiet point lets the node come to rest).
 * Callers: sim.c, sim_node.c.
 */
#include "sim.h"

#include <errno.h>
#include <stdio.h>

#include "tier/ssd_format.h"

bool sim_slot_bytes_ok(struct sim *s, uint32_t space, uint32_t cpu_slot, uint32_t key,
                       uint32_t epoch_min)
{
    const struct sim_space *sp = &s->space[space];
    uint32_t bytes = sp->config->slice_bytes;

    for (uint32_t r = 0; r < sp->config->ranks; r++)
        if (!sim_bytes_ok(s, &s->keys.data[key], r, epoch_min,
                          sp->pool + (uint64_t)cpu_slot * sp->slot_bytes + (uint64_t)r * bytes,
                          bytes))
            return false;
    return true;
}

/* ---- after each step ---------------------------------------------------------------------------- */

void sim_check_cheap(struct sim *s)
{
    struct fk_core_work w = fk_core_work(s->core);

    sim_check_deadlines(s);
    SIM_CHECK(s, !w.completions, "completions appeared out of nothing");
}

/* ---- full scan ------------------------------------------------------------------------------------ */

struct census { uint32_t ready[FK_TIERS][SIM_MAX_NS + 1]; };

static void scan_key(struct sim *s, uint32_t i, struct census *c)
{
    struct sim_key *k = &s->keys.data[i];
    struct sim_space *sp = &s->space[k->space];
    struct fk_core_where w;
    bool known = fk_core_find(s->core, k->key, &w);

    if (!known)
        memset(&w, 0, sizeof(w));
    SIM_CHECK(s, w.cpu_ready == k->there[FK_TIER_CPU] && w.ssd_ready == k->there[FK_TIER_SSD],
              "events and index disagree: key %u is cpu %d ssd %d, events say %d %d", i,
              w.cpu_ready, w.ssd_ready, k->there[FK_TIER_CPU], k->there[FK_TIER_SSD]);
    SIM_CHECK(s, !known || k->parent_index == FK_NONE ||
                     fk_core_find(s->core, k->parent, &(struct fk_core_where){ 0 }),
              "prefix broken: key %u is in the index, its parent is not", i);
    if (w.cpu_ready) {
        SIM_CHECK(s, w.cpu_slot < sp->config->cpu_slots && sp->cpu_mark[w.cpu_slot] != s->scan,
                  "cpu slot %u holds two blocks", w.cpu_slot);
        sp->cpu_mark[w.cpu_slot] = s->scan;
        SIM_CHECK(s, !sp->cpu_use[w.cpu_slot].writers, "cpu slot %u of key %u is being written",
                  w.cpu_slot, i);
        SIM_CHECK(s, sim_slot_bytes_ok(s, k->space, w.cpu_slot, i, sp->epoch_floor),
                  "wrong bytes: key %u in cpu slot %u", i, w.cpu_slot);
        c->ready[FK_TIER_CPU][k->ns]++;
    }
    if (w.ssd_ready) {
        SIM_CHECK(s, w.ssd_slot < sp->config->ssd_slots && sp->ssd_mark[w.ssd_slot] != s->scan,
                  "ssd slot %u holds two blocks", w.ssd_slot);
        sp->ssd_mark[w.ssd_slot] = s->scan;
        SIM_CHECK(s, sp->ssd_slot[w.ssd_slot].key == i,
                  "key %u is said to be in ssd slot %u, where key %u was written last", i,
                  w.ssd_slot, sp->ssd_slot[w.ssd_slot].key);
        c->ready[FK_TIER_SSD][k->ns]++;
    }
}

static void scan_space(struct sim *s, uint32_t space)
{
    const struct sim_space_config *sc = s->space[space].config;
    struct census c = { 0 };

    s->scan++;
    for (uint32_t i = 0; i < s->keys.len; i++)
        if (s->keys.data[i].space == space)
            scan_key(s, i, &c);
    for (uint32_t n = 0; n < sc->n_ns && sc->quotas; n++)
        for (int t = 0; t < FK_TIERS; t++)
            SIM_CHECK(s, c.ready[t][n] <= sc->quota[n].max[t],
                      "quota: namespace %u has %u blocks in tier %d, maximum %u", n,
                      c.ready[t][n], t, sc->quota[n].max[t]);
}

void sim_check_full(struct sim *s)
{
    const char *wrong = s->no_self_check ? NULL : fk_core_check(s->core);

    SIM_CHECK(s, !wrong, "fk_core_check: %s", wrong);
    for (uint32_t i = 0; i < s->config.n_spaces; i++)
        scan_space(s, i);
}

/* ---- a quiet point: no more requests, no more faults; everything must come to rest --------------- */

/* A disk that was replaced while its store was open stays out: nobody makes files anew then. */
static bool ssd_at_rest(const struct sim *s, const struct fk_ssd *ssd, uint32_t dirs_out)
{
    uint32_t replaced = 0;

    for (uint32_t i = 0; i < s->disk.n_files; i++)
        if (!s->disk.files[i].exists)
            replaced |= 1u << s->disk.files[i].dir;
    if (dirs_out)
        return !(dirs_out & ~replaced);
    return !fk_ssd_inflight(ssd) && fk_ssd_next_wakeup(ssd) == UINT64_MAX;
}

static bool at_rest(const struct sim *s)
{
    struct fk_core_work w = fk_core_work(s->core);
    struct fk_engine *e = sim_engine_base(s->engine);

    if (sim_open_ops(s) || sim_agent_jobs(s) || s->reqs.len || s->n_dones || s->n_leases ||
        w.jobs || w.ssd || w.completions || e->ops->inflight(e))
        return false;
    for (uint32_t i = 0; i < s->config.n_spaces; i++)
        if (s->space[i].ssd && !ssd_at_rest(s, s->space[i].ssd, s->space[i].dirs_out))
            return false;
    return fk_core_next_wakeup(s->core) > s->now;   /* deadlines of what is over may be left */
}

static void come_to_rest(struct sim *s)
{
    uint64_t start = s->now, idle = 0;

    for (uint32_t round = 0; !at_rest(s); round++) {
        bool any = sim_pump_step(s, true);
        any |= sim_agent_step(s);
        if (fk_core_next_wakeup(s->core) <= s->now)
            sim_tick(s);
        sim_expire_leases(s);
        sim_check_deadlines(s);
        struct fk_core_work w = fk_core_work(s->core);
        if (!any && !w.ssd && !w.jobs) {
            uint64_t next = sim_next_time(s);
            s->now = next == UINT64_MAX ? s->now + 1000 : fk_max(next, s->now + (++idle % 8 == 0));
        } else if (!any) {
            s->now++;           /* agents may be busy or hang */
        }
        SIM_CHECK(s, round < 2000000 && s->now - start < 30000000,
                  "the node does not come to rest: %u operations, %u jobs, %zu ssd requests, "
                  "next wakeup %lld us from now", sim_open_ops(s), sim_agent_jobs(s), s->reqs.len,
                  (long long)(fk_core_next_wakeup(s->core) - s->now));
    }
}

static void check_rest(struct sim *s)
{
    struct flexkv_stats st;
    uint64_t cpu = 0, ssd = 0, cpu_slots = 0, ssd_slots = 0;

    fk_core_get_stats(s->core, &st);
    SIM_CHECK(s, !st.leases && !st.operations, "at rest: %llu leases, %llu operations open",
              (unsigned long long)st.leases, (unsigned long long)st.operations);
    for (uint32_t i = 0; i < s->keys.len; i++) {
        struct fk_core_where w;
        if (!fk_core_find(s->core, s->keys.data[i].key, &w))
            continue;
        SIM_CHECK(s, !w.pins, "at rest: key %u has %u pins", i, w.pins);
        cpu += w.cpu_ready;
        ssd += w.ssd_ready;
    }
    for (uint32_t i = 0; i < s->config.n_spaces; i++) {
        struct sim_space *sp = &s->space[i];
        cpu_slots += sp->config->cpu_slots;
        ssd_slots += sp->config->ssd_slots;
        SIM_CHECK(s, fk_core_instance_idle(s->core, sp->instance), "at rest: space %u is not idle", i);
        SIM_CHECK(s, sp->n_free_pages == sp->config->pages, "at rest: %u of %u pages free",
                  sp->n_free_pages, sp->config->pages);
    }
    SIM_CHECK(s, st.cpu.slots == cpu_slots && st.ssd.slots == ssd_slots, "stats: slots differ");
    SIM_CHECK(s, st.cpu.free_slots + cpu == cpu_slots,
              "cpu slots leaked: %llu free + %llu blocks, %llu slots",
              (unsigned long long)st.cpu.free_slots, (unsigned long long)cpu,
              (unsigned long long)cpu_slots);
    SIM_CHECK(s, st.ssd.free_slots + ssd == ssd_slots,
              "ssd slots leaked: %llu free + %llu blocks, %llu slots",
              (unsigned long long)st.ssd.free_slots, (unsigned long long)ssd,
              (unsigned long long)ssd_slots);
}

void sim_quiesce(struct sim *s)
{
    struct sim_disk_faults none = { .min_us = 5, .max_us = 50, .slow_us = 1 };
    struct sim_config c = s->config;

    SIM_TRACE(s, "quiet point");
    s->faults_now = none;
    s->config.agent_faults = s->config.stalls = false;
    sim_dirs_back(s);
    come_to_rest(s);
    sim_check_full(s);
    check_rest(s);
    sim_events_check(s);
    s->config = c;
    s->faults_now = c.faults;
    s->rough_since_quiet = false;
    s->quiet_epoch = s->epoch;
}

/* ---- restart: what is found again ------------------------------------------------------------------- */

bool sim_ssd_settled(struct sim *s)
{
    if (!sim_disk_trusted(s))
        return false;
    for (uint32_t i = 0; i < s->config.n_spaces; i++)
        if (s->space[i].ssd && (fk_ssd_inflight(s->space[i].ssd) || s->space[i].dirs_out ||
                                fk_ssd_next_wakeup(s->space[i].ssd) != UINT64_MAX))
            return false;
    return s->reqs.len == 0;
}

void sim_note_ready(struct sim *s, bool must_find)
{
    s->must_find = must_find;
    for (uint32_t i = 0; i < s->keys.len; i++)
        s->keys.data[i].was_on_ssd = s->keys.data[i].there[FK_TIER_SSD];
}

/* The record of a slot, read by hand from the table's image; NULL: not sound. */
static const struct ssd_record *image_record(struct sim *s, uint32_t space, uint32_t slot,
                                             uint32_t *epoch)
{
    const struct sim_space_config *c = s->space[space].config;
    uint32_t stripe = slot / c->stripe_slots, dir = stripe % s->config.n_dirs;
    uint32_t local = stripe / s->config.n_dirs * c->stripe_slots + slot % c->stripe_slots;
    char path[200];

    snprintf(path, sizeof(path), "%s/space%u.table", s->disk.dir_path[dir], space);
    const struct sim_file *f = sim_disk_find(&s->disk, path);
    if (!f || !f->exists || f->bytes < SSD_PAGE + (local + 1) * 64ull)
        return NULL;
    const struct ssd_header *h = (const void *)f->image;
    const struct ssd_record *r = (const void *)(f->image + SSD_PAGE + local * 64ull);
    *epoch = h->epoch;
    if (ssd_record_check(r, ssd_record_seed(h->uuid), slot,
                         (uint64_t)c->ranks * c->slice_bytes) != SSD_RECORD_OK)
        return NULL;
    return r;
}

static bool sent_to_slot(const struct sim_ssd_slot *slot, uint32_t key)
{
    for (size_t i = 0; i < slot->past.len; i++)
        if (slot->past.data[i] == key)
            return true;
    return false;
}

/* The best record of each key, and no record that is not on disk or was never written. */
static void check_each_found(struct sim *s, uint32_t space)
{
    struct sim_space *sp = &s->space[space];

    for (uint32_t i = 0; i < s->found.len; i++) {
        const struct fk_core_found *f = &s->found.data[i];
        uint32_t k = sim_key_find(s, f->key), epoch;
        SIM_CHECK(s, k != FK_NONE, "restart: unknown key found in slot %u", f->slot);
        struct sim_key *key = &s->keys.data[k];
        SIM_CHECK(s, key->space == space && f->slot < sp->config->ssd_slots &&
                         fk_key_equal(key->parent, f->parent) &&
                         sent_to_slot(&sp->ssd_slot[f->slot], k),
                  "restart: key %u found in slot %u, where it was never written", k, f->slot);
        const struct ssd_record *r = image_record(s, space, f->slot, &epoch);
        SIM_CHECK(s, r && fk_key_equal(r->key, f->key) && r->epoch == epoch && r->seq == f->seq,
                  "restart: key %u found in slot %u without a sound record there", k, f->slot);
        SIM_CHECK(s, key->complete_epoch > sp->epoch_floor,
                  "restart: key %u comes back after a reset", k);
        if (key->found_slot == FK_NONE || f->seq > key->found_seq) {
            key->found_slot = f->slot;
            key->found_seq = f->seq;
        }
    }
}

void sim_check_found(struct sim *s, uint32_t space)
{
    struct sim_space *sp = &s->space[space];
    uint32_t found = 0, epoch;

    for (uint32_t i = 0; i < s->keys.len; i++)
        if (s->keys.data[i].space == space)
            s->keys.data[i].found_slot = FK_NONE;
    check_each_found(s, space);
    for (uint32_t slot = 0; slot < sp->config->ssd_slots; slot++) {
        const struct ssd_record *r = image_record(s, space, slot, &epoch);
        found += r && r->epoch == epoch;
        sp->ssd_slot[slot].key = FK_NONE;
        sp->ssd_slot[slot].forgotten = false;
    }
    SIM_CHECK(s, found == s->found.len, "restart: %u sound records in the table, %zu found", found,
              s->found.len);
    for (uint32_t i = 0; i < s->found.len; i++) {
        struct sim_ssd_slot *at = &sp->ssd_slot[s->found.data[i].slot];
        at->key = sim_key_find(s, s->found.data[i].key);
        if (at->past.data[at->past.len - 1] != at->key)
            at->torn = true;            /* written over; the new record did not make it */
    }
    for (uint32_t i = 0; i < s->keys.len && s->must_find; i++) {
        const struct sim_key *k = &s->keys.data[i];
        SIM_CHECK(s, k->space != space || !k->was_on_ssd || k->found_slot != FK_NONE,
                  "restart: key %u was on SSD, its record written, and is not found", i);
    }
    SIM_CHECK(s, !sp->recreated || s->found.len == 0, "restart: a new store is not empty");
    sp->recreated = false;
}

static bool sim_at_quota(const struct sim *s, uint32_t space, uint32_t ns)
{
    const struct sim_space_config *c = s->space[space].config;
    uint32_t n = 0;

    for (uint32_t i = 0; c->quotas && i < s->keys.len; i++) {
        const struct sim_key *k = &s->keys.data[i];
        n += k->space == space && k->ns == ns && k->there[FK_TIER_SSD];
    }
    return c->quotas && n == c->quota[ns].max[FK_TIER_SSD];
}

/* Exactly the found blocks with all their ancestors are there, in the slot of the newest record. */
void sim_check_recovered(struct sim *s, uint32_t space, uint64_t blocks)
{
    uint64_t expected = 0;

    for (uint32_t i = 0; i < s->keys.len; i++) {
        struct sim_key *k = &s->keys.data[i];
        struct fk_core_where w = { 0 };
        if (k->space != space)
            continue;
        k->expected = k->found_slot != FK_NONE &&
                      (k->parent_index == FK_NONE || s->keys.data[k->parent_index].expected);
        bool there = fk_core_find(s->core, k->key, &w) && w.ssd_ready;
        if (!there && sim_at_quota(s, space, k->ns))    /* found more than it may have */
            k->expected = false;
        SIM_CHECK(s, there == k->expected, "restart: key %u %s", i,
                  there ? "is there without its ancestors" : "was found with all its ancestors "
                  "and is not there");
        expected += k->expected;
        /* A loss of power may bring an emptied record back, and with it a number given twice. */
        SIM_CHECK(s, !there || w.ssd_slot == k->found_slot || s->config.power_loss,
                  "restart: key %u is in slot %u, its newest record is of slot %u", i, w.ssd_slot,
                  k->found_slot);
        SIM_CHECK(s, !there || !w.pins, "restart: key %u has %u pins", i, w.pins);
    }
    SIM_CHECK(s, blocks == expected, "fk_core_recover says %llu blocks, %llu are there",
              (unsigned long long)blocks, (unsigned long long)expected);
}
