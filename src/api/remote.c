/*
 * remote.c - a node with a store that nodes share (enable_3rd_remote): the shell round src/store. A thread of its own takes
 * the core's fetches and the store's answers; the store's threads do what can wait.
 *
 *   caller's match -> core -> fk_node_reach -> the store's set, and the cluster's index     (node->lock)
 *   core's fetches -> this thread (with peers: those that no peer can serve) -> store -> this thread -> core
 *   core's events  -> candidates -> this thread: the core's copy is lent -> store
 *
 * With the node's lock but where it says otherwise. A block is lent while it is written; before others can see it the
 * store asks whether the copy is still good. What is written is never waited for.
 */
#include <endian.h>
#include <jansson.h>
#include <math.h>
#include <stdio.h>

#include "api/remote.h"
#include "api/sharing.h"
#include "base/clock.h"
#include "base/log.h"
#include "events/note.h"

#define MAX_SLEEP_US 1000000u
#define BATCH 64u
#define WRITE_BIT (UINT64_C(1) << 63)
#define REACH_TURNS 16                  /* between peers and store, in one look-up */

bool fk_node_has_remote(const struct fk_settings *set)
{
    return set->enable_3rd_remote;
}

/* ---- waking the thread; any lock, or none ---- */

static void wake(void *arg)
{
    struct fk_node_store *r = arg;

    pthread_mutex_lock(&r->wake_lock);
    r->signalled = true;
    pthread_cond_signal(&r->wake);
    pthread_mutex_unlock(&r->wake_lock);
}

void fk_node_remote_wake(struct fk_node *node)
{
    struct fk_node_store *r = node->remote;

    if (!pthread_equal(pthread_self(), r->thread))
        wake(r);
}

/* ---- look-ups ---- */

static uint32_t run_of_bits(const uint64_t *bits, uint32_t from, uint32_t n)
{
    while (from < n && bits[from / 64] >> from % 64 & 1)
        from++;
    return from;
}

static bool make_bits(struct fk_node_store *r, uint32_t n)
{
    uint32_t words = (n + 63) / 64;

    if (words > r->bits_words) {
        uint64_t *bits = realloc(r->bits, words * sizeof(*bits));
        if (!bits)
            return false;
        r->bits = bits;
        r->bits_words = words;
    }
    return true;
}

/* Each block may come from here, a peer or the store; whoever has the next ones takes the reach further. */
uint32_t fk_node_reach(struct fk_node *node, const struct fk_instance *in, const struct fk_key *keys, uint32_t n,
                       uint32_t known, uint64_t now)
{
    struct fk_node_store *r = node->remote;
    uint32_t reach = known;

    if (!r || !fk_store_reads(r->store))
        return node->sharing ? fk_node_share_reach(node, in, keys, n, known, now) : known;
    if (known >= n || !make_bits(r, n))
        return known;
    memset(r->bits, 0, (n + 63) / 64 * sizeof(*r->bits));
    if (fk_core_here(node->core, in->id, keys, n, r->bits) > known)
        return known;                   /* what is here was declined: no more is wanted */
    for (int turn = 0; turn < REACH_TURNS; turn++) {
        uint32_t before = reach;
        reach = run_of_bits(r->bits, reach, n);
        reach += fk_store_has(r->store, in->space->store_id, keys + reach, n - reach);
        if (node->sharing && reach < n)
            reach = fk_node_share_reach(node, in, keys, n, reach, now);
        if (reach == before || reach == n)
            break;
    }
    return reach;
}

/* ---- fetches ---- */

static void *slot_memory(const struct fk_space *s, uint32_t slot)
{
    return (char *)fk_pool_base(s->pool) + (uint64_t)slot * s->slot_bytes;
}

static unsigned char *note_of(const struct fk_node_store *r, bool write, uint32_t at)
{
    return r->notes ? r->notes + ((size_t)at + (write ? REMOTE_FETCHES : 0)) * FK_STORE_NOTE_MAX : NULL;
}

static int ask(struct fk_node_store *r, const struct fk_core_fetch *want, uint64_t now)
{
    struct fk_space *s = fk_node_space(r->node, want->space);
    uint32_t at = r->free_fetch;

    if (!s || s->store_id == FK_NONE || at == FK_NONE)
        return at == FK_NONE ? -EAGAIN : -ENOENT;
    struct fk_store_req q = {
        .op = FK_STORE_READ, .space = s->store_id, .urgent = want->urgent, .key = want->key,
        .buf = slot_memory(s, want->cpu_slot), .user = at, .note = note_of(r, false, at),
    };
    fk_node_slot_filling(r->node, want->space, want->cpu_slot);
    int rc = fk_store_submit(r->store, &q, 1, now + r->timeout_us, now);
    if (rc)
        return rc;
    r->free_fetch = r->fetch[at].next;
    r->fetch[at] = (struct remote_fetch){ .id = want->id, .space = want->space, .slot = want->cpu_slot };
    r->fetches++;
    return 0;
}

bool fk_node_remote_fetch(void *ctx, const struct fk_core_fetch *want)
{
    struct fk_node *node = ctx;
    struct fk_node_store *r = node->remote;

    if (!r || !fk_core_fetch_wanted(node->core, want->id))
        return false;
    struct fk_space *s = fk_node_space(node, want->space);
    return s && s->store_id != FK_NONE && fk_store_has(r->store, s->store_id, &want->key, 1) &&
           ask(r, want, fk_clock_us()) == 0;
}

/* Without peers: the core's fetches are ours. */
static bool take_fetches(struct fk_node_store *r, uint64_t now)
{
    struct fk_core_fetch want[BATCH];
    struct fk_core_fetch_done failed[BATCH];
    uint32_t n = fk_core_take_fetches(r->node->core, want, fk_min(BATCH, REMOTE_FETCHES - r->fetches)), k = 0;

    for (uint32_t i = 0; i < n; i++) {
        int rc = fk_core_fetch_wanted(r->node->core, want[i].id) ? ask(r, &want[i], now) : -ECANCELED;
        if (rc)
            failed[k++] = (struct fk_core_fetch_done){ .id = want[i].id, .status = rc };
    }
    if (k)
        fk_core_fetch_done(r->node->core, failed, k, now);
    return n != 0;
}

/* What routers call the block, if whoever wrote it knew. Before the block is ready. */
static void name_block(struct fk_node_store *r, const struct remote_fetch *f, const struct fk_store_done *d)
{
    struct fk_space *s = fk_node_space(r->node, f->space);
    uint32_t tokens[FK_STORE_NOTE_MAX / 4];
    struct fk_note note;

    if (!r->notes || !s->names ||
        !fk_note_read(note_of(r, false, (uint32_t)(f - r->fetch)), d->note_bytes, s->tokens_per_block, &note))
        return;
    note.name.label = fk_node_events_label_of(r->node, note.lora, note.salt);
    if (note.name.label == FK_NONE)
        return;
    for (uint32_t i = 0; i < s->tokens_per_block; i++) {
        memcpy(&tokens[i], note.tokens + 4 * i, 4);
        tokens[i] = le32toh(tokens[i]);
    }
    fk_names_set(s->names, f->slot, &note.name, tokens);
}

static void fetch_free(struct fk_node_store *r, uint32_t at)
{
    r->fetch[at].next = r->free_fetch;
    r->free_fetch = at;
    r->fetches--;
}

static void fetch_ended(struct fk_node_store *r, const struct fk_store_done *d, uint64_t now)
{
    struct remote_fetch *f = &r->fetch[d->user];
    bool busy = d->flags & FK_STORE_QUARANTINED;

    if (d->flags & FK_STORE_RELEASED) {
        r->late--;
        fk_core_fetch_released(r->node->core, f->id, now);
        fetch_free(r, (uint32_t)d->user);
        return;
    }
    if (!d->status)
        name_block(r, f, d);
    struct fk_core_fetch_done done = { .id = f->id, .status = d->status, .busy = busy };
    fk_core_fetch_done(r->node->core, &done, 1, now);
    r->late += busy;
    if (!busy)
        fetch_free(r, (uint32_t)d->user);
}

/* ---- writes ---- */

static bool is_private(const struct fk_node *node, uint32_t group)
{
    for (size_t i = 0; i < node->groups.len; i++)
        if (node->groups.data[i].group == group && node->groups.data[i].unshared)
            return true;
    return false;
}

static void remember(struct fk_node_store *r, struct fk_key key, struct fk_key parent, uint32_t space)
{
    if (r->ring_n == REMOTE_CANDIDATES) {
        r->overflowed++;
        return;
    }
    r->ring[(r->ring_at + r->ring_n++) % REMOTE_CANDIDATES] = (struct remote_candidate){ key, parent, space };
}

void fk_node_remote_tell(struct fk_node *node, const struct fk_core_event *ev, uint32_t n)
{
    struct fk_node_store *r = node->remote;
    uint32_t before = r->ring_n;

    for (uint32_t i = 0; i < n && !r->on_reuse; i++)
        if (ev[i].stored && ev[i].tier == FK_TIER_CPU && !is_private(node, ev[i].group))
            remember(r, ev[i].key, ev[i].parent, ev[i].space);
    if (!before && r->ring_n)
        fk_node_remote_wake(node);
}

/* The match has hit the first n in memory: they are used again. */
void fk_node_remote_used(struct fk_node *node, const struct fk_instance *in, uint32_t group,
                         const struct fk_key *keys, uint32_t n)
{
    struct fk_node_store *r = node->remote;
    uint32_t before = r->ring_n;

    if (!r->on_reuse || is_private(node, group))
        return;
    for (uint32_t i = 0; i < n && r->ring_n < REMOTE_CANDIDATES; i++)
        remember(r, keys[i], i ? keys[i - 1] : (struct fk_key){ 0 }, in->space->id);
    if (!before && r->ring_n)
        fk_node_remote_wake(node);
}

static uint32_t write_note(struct fk_node_store *r, const struct fk_space *s, uint32_t slot, uint32_t at)
{
    if (!r->notes || !s->names || !s->names->name[slot].hash)
        return 0;
    struct fk_label label = fk_node_label_at(r->node, s->names->name[slot].label);
    return fk_note_write(note_of(r, true, at), FK_STORE_NOTE_MAX, &s->names->name[slot], fk_names_tokens(s->names, slot),
                         s->tokens_per_block, &label);
}

/* False: there is no room for another request. */
static bool write_one(struct fk_node_store *r, const struct remote_candidate *c, uint64_t now)
{
    struct fk_space *s = fk_node_space(r->node, c->space);
    uint32_t at = r->free_write, slot, loan;

    if (!s || s->store_id == FK_NONE || fk_store_has(r->store, s->store_id, &c->key, 1) ||
        fk_core_lend(r->node->core, s->id, c->key, FK_TIER_CPU, &slot, &loan))
        return true;
    uint32_t note_bytes = write_note(r, s, slot, at);
    struct fk_store_req q = {
        .op = FK_STORE_WRITE, .space = s->store_id, .key = c->key, .parent = c->parent, .buf = slot_memory(s, slot),
        .user = WRITE_BIT | at, .note = note_bytes ? note_of(r, true, at) : NULL, .note_bytes = note_bytes,
    };
    uint32_t next = r->write[at].next;
    r->write[at].loan = loan;           /* before the store may ask for it */
    int rc = fk_store_submit(r->store, &q, 1, now + r->timeout_us, now);
    if (rc) {
        fk_core_loan_end(r->node->core, loan);
        return rc != -EAGAIN;
    }
    r->free_write = next;
    r->writes++;
    return true;
}

static void write_candidates(struct fk_node_store *r, uint64_t now)
{
    while (r->ring_n && r->writes < r->max_writes && fk_store_writes(r->store)) {
        if (!write_one(r, &r->ring[r->ring_at], now))
            break;
        r->ring_at = (r->ring_at + 1) % REMOTE_CANDIDATES;
        r->ring_n--;
    }
}

static void write_ended(struct fk_node_store *r, const struct fk_store_done *d)
{
    uint32_t at = (uint32_t)d->user;

    if (d->flags & FK_STORE_QUARANTINED) {      /* still being read from: it stays lent */
        r->late++;
        return;
    }
    r->late -= d->flags & FK_STORE_RELEASED ? 1 : 0;
    fk_core_loan_end(r->node->core, r->write[at].loan);
    r->write[at].next = r->free_write;
    r->free_write = at;
    r->writes--;
}

/* The store's thread, without a lock: are the bytes that it has written still the block's? */
static bool sure(void *arg, uint64_t user)
{
    struct fk_node_store *r = arg;

    pthread_mutex_lock(&r->node->lock);
    bool good = fk_core_loan_good(r->node->core, r->write[(uint32_t)user].loan, FK_TIER_CPU);
    fk_node_unlock(r->node);
    return good;
}

/* ---- the thread ---- */

/* A block is had from one or the other, and the core is not told from whom. */
static void mix(struct fk_rate *r, const struct fk_rate *other, double share)
{
    double apart = fabs(other->us - r->us);

    r->us += share * (other->us - r->us);
    r->spread_us += share * (other->spread_us - r->spread_us) + 2 * share * (1 - share) * apart;
}

/* What a block takes from elsewhere: of peers and store, as each has served lately. */
static void tell_rates(struct fk_node *node)
{
    struct fk_store_stats st;
    struct fk_peers_stats ps = { 0 };

    fk_store_get_stats(node->remote->store, &st);
    if (node->sharing)
        fk_peers_get_stats(node->sharing->peers, &ps);
    for (struct fk_space *s = node->spaces; s; s = s->next) {
        struct fk_rate r = { 0 }, peer = { 0 };
        if (s->store_id != FK_NONE)
            r = fk_store_block_rate(node->remote->store, s->store_id);
        if (node->sharing)
            peer = fk_peers_block_rate(node->sharing->peers, s->id);
        if (r.us > 0 && peer.us > 0)
            mix(&r, &peer, (double)ps.fetched_blocks / (double)(ps.fetched_blocks + st.read_blocks));
        fk_rates_fetched(s, r.us > 0 ? &r : &peer);
    }
}

static uint64_t pump(struct fk_node_store *r)
{
    struct fk_store_done d[BATCH];
    struct fk_node *node = r->node;
    uint64_t now = fk_clock_us();
    uint32_t n;

    pthread_mutex_lock(&node->lock);
    do {        /* what has ended lets operations go on, which want more */
        n = fk_store_take(r->store, d, BATCH, now);
        for (uint32_t i = 0; i < n; i++)
            if (d[i].user & WRITE_BIT)
                write_ended(r, &d[i]);
            else
                fetch_ended(r, &d[i], now);
    } while ((!node->sharing && take_fetches(r, now)) || n == BATCH);
    write_candidates(r, now);
    if (n)
        tell_rates(node);
    fk_node_unlock(node);
    uint64_t next = fk_store_next_wakeup(r->store);
    now = fk_clock_us();
    return next > now ? fk_min(next - now, (uint64_t)MAX_SLEEP_US) : 0;
}

static void *remote_main(void *arg)
{
    struct fk_node_store *r = arg;
    bool stop = false;

    while (!stop) {
        uint64_t at = fk_clock_us() + pump(r);
        struct timespec ts = { (time_t)(at / 1000000), (long)(at % 1000000) * 1000 };
        pthread_mutex_lock(&r->wake_lock);
        while (!r->signalled && !r->stop && !pthread_cond_timedwait(&r->wake, &r->wake_lock, &ts))
            ;
        r->signalled = false;
        stop = r->stop;
        pthread_mutex_unlock(&r->wake_lock);
    }
    return NULL;
}

/* ---- opening and closing; without a lock ---- */

static void make_lists(struct fk_node_store *r)
{
    for (uint32_t i = 0; i < REMOTE_FETCHES; i++)
        r->fetch[i].next = i + 1 < REMOTE_FETCHES ? i + 1 : FK_NONE;
    for (uint32_t i = 0; i < REMOTE_WRITES_MAX; i++)
        r->write[i].next = i + 1 < REMOTE_WRITES_MAX ? i + 1 : FK_NONE;
}

static struct fk_node_store *remote_new(struct fk_node *node)
{
    struct fk_node_store *r = calloc(1, sizeof(*r));
    pthread_condattr_t mono;

    if (!r)
        return NULL;
    pthread_condattr_init(&mono);
    pthread_condattr_setclock(&mono, CLOCK_MONOTONIC);
    pthread_mutex_init(&r->wake_lock, NULL);
    pthread_cond_init(&r->wake, &mono);
    pthread_condattr_destroy(&mono);
    make_lists(r);
    r->node = node;
    r->on_reuse = node->set->remote_write_policy == FK_REMOTE_WRITE_ON_REUSE;
    r->timeout_us = (uint64_t)node->set->remote_timeout_ms * 1000;
    r->max_writes = fk_min((uint32_t)node->set->remote_threads * 2, REMOTE_WRITES_MAX);
    r->ring = calloc(REMOTE_CANDIDATES, sizeof(*r->ring));
    if (node->events)
        r->notes = calloc(REMOTE_FETCHES + REMOTE_WRITES_MAX, FK_STORE_NOTE_MAX);
    return r;
}

static void remote_free(struct fk_node_store *r)
{
    if (!r->node->memory_busy)          /* else a note may still be written to */
        free(r->notes);
    free(r->ring);
    free(r->bits);
    pthread_mutex_destroy(&r->wake_lock);
    pthread_cond_destroy(&r->wake);
    free(r);
}

static void set_remote(struct fk_node *node, struct fk_node_store *r)
{
    pthread_mutex_lock(&node->lock);
    node->remote = r;
    pthread_mutex_unlock(&node->lock);
}

static int open_store(struct fk_node_store *r, const struct fk_settings *set)
{
    struct fk_store_params p = {
        .path = set->remote_cache_dir, .capacity_bytes = set->remote_cache_bytes,
        .threads = (uint32_t)set->remote_threads, .max_queued = 2 * (REMOTE_FETCHES + REMOTE_WRITES_MAX),
        .timeout_us = r->timeout_us, .scan_us = (uint64_t)set->remote_scan_ms * 1000,
        .retry_us = (uint64_t)set->remote_retry_ms * 1000, .wake = wake, .sure = sure, .arg = r,
    };
    char error[1500];
    int rc = fk_store_open(&p, &r->store, error, sizeof(error));

    return rc ? fk_api_fail(rc, "%s", error) : 0;
}

int fk_node_remote_start(struct fk_node *node)
{
    struct fk_node_store *r = remote_new(node);

    if (!r)
        return fk_api_fail(-ENOMEM, "out of memory");
    int rc = !r->ring || (node->events && !r->notes) ? fk_api_fail(-ENOMEM, "out of memory")
                                                     : open_store(r, node->set);
    if (!rc && (rc = -pthread_create(&r->thread, NULL, remote_main, r)) != 0) {
        fk_api_fail(rc, "cannot start a thread: %s", strerror(-rc));
        fk_store_close(r->store);
    }
    if (rc) {
        remote_free(r);
        return rc;
    }
    set_remote(node, r);
    return 0;
}

/* Before the space is in the core: the store's directory for it. */
int fk_node_remote_space(struct fk_space *s)
{
    struct fk_store_space d = { .name = s->name, .block_bytes = s->block_bytes };
    char error[1500];

    memcpy(d.fingerprint, s->fingerprint, sizeof(d.fingerprint));
    int rc = fk_store_space(s->node->remote->store, &d, &s->store_id, error, sizeof(error));
    return rc ? fk_api_fail(rc, "space %s: %s", s->name, error) : 0;
}

bool fk_node_remote_idle(struct fk_node *node)
{
    struct fk_node_store *r = node->remote;

    return !r || !fk_store_writes(r->store) || (!r->ring_n && !r->writes);
}

void fk_node_remote_reset(struct fk_node *node)
{
    struct fk_node_store *r = node->remote;

    r->ring_n = 0;
    for (struct fk_space *s = node->spaces; s; s = s->next)
        if (s->store_id != FK_NONE)
            fk_store_reset(r->store, s->store_id);
}

int fk_node_remote_reset_wait(struct fk_node *node)
{
    int rc = node->remote ? fk_store_reset_wait(node->remote->store, node->remote->timeout_us) : 0;

    return rc ? fk_api_fail(rc, "everything is dropped here, but remote_cache_dir could not be reset yet (%s): it is not "
                            "used until it can be; other nodes, and a restart before that, find old blocks",
                            strerror(-rc)) : 0;
}

/* What is under way to or from the slots is waited for, as long as it may take. */
void fk_node_remote_stop(struct fk_node *node)
{
    struct fk_node_store *r = node->remote;

    if (!r)
        return;
    pthread_mutex_lock(&r->wake_lock);
    r->stop = true;
    pthread_cond_signal(&r->wake);
    pthread_mutex_unlock(&r->wake_lock);
    pthread_join(r->thread, NULL);
    set_remote(node, NULL);
    if (!fk_store_close(r->store)) {
        node->memory_busy = true;
        fk_error("close: the shared store still reads into, or writes from, the cpu tier's memory, which is left behind");
    }
    remote_free(r);
}

/* ---- for status ---- */

json_t *fk_node_remote_json(const struct fk_node *node)
{
    struct fk_node_store *r = node->remote;
    struct fk_store_stats st;
    json_t *o = json_object();

    fk_store_get_stats(r->store, &st);
    json_object_set_new(o, "path", json_string(node->set->remote_cache_dir));
    json_object_set_new(o, "reads", json_boolean(fk_store_reads(r->store)));
    json_object_set_new(o, "writes", json_boolean(fk_store_writes(r->store)));
    const struct { const char *name; uint64_t value; } numbers[] = {
        { "capacity_bytes", node->set->remote_cache_bytes }, { "used_bytes", st.used_bytes },
        { "blocks", st.blocks }, { "set_bytes", st.set_bytes }, { "read_blocks", st.read_blocks },
        { "read_bytes", st.read_bytes }, { "written_blocks", st.write_blocks }, { "written_bytes", st.write_bytes },
        { "already_there", st.already }, { "missing", st.missing }, { "bad", st.bad },
        { "read_errors", st.read_errors }, { "write_errors", st.write_errors }, { "timeouts", st.timeouts },
        { "full", st.full }, { "evicted", st.evicted }, { "leftovers", st.leftovers }, { "scans", st.scans },
        { "listed", st.listed }, { "outs", st.outs }, { "returns", st.returns }, { "queued", st.queued },
        { "running", st.running }, { "quarantined", st.quarantined }, { "waiting_writes", r->ring_n },
        { "overflowed", r->overflowed },
    };
    for (size_t i = 0; i < fk_array_size(numbers); i++)
        json_object_set_new(o, numbers[i].name, json_integer((json_int_t)numbers[i].value));
    return o;
}

void fk_node_remote_stats(struct fk_node *node, flexkv_stats *out)
{
    struct fk_store_stats st;

    fk_store_get_stats(node->remote->store, &st);
    out->peer.bytes_read += st.read_bytes;
}
