/*
 * remote.c - a node with a store that nodes share (enable_3rd_remote): the shell round src/depot and src/store. A thread of
 * its own takes the core's fetches and the store's answers; the store's threads do what can wait.
 *
 *   caller's match -> core -> fk_node_reach -> depot: the store's set, and the cluster's index     (node->lock)
 *   core's fetches -> this thread (with peers: those that no peer can serve) -> depot -> store -> this thread -> core
 *   core's events  -> depot: candidates -> this thread: the core's copy is lent -> store
 *
 * With the node's lock but where it says otherwise.
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
#include "store/backend.h"
#include "store/objects.h"

#define MAX_SLEEP_US 1000000u

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

/* ---- what the core asks for, what it tells ---- */

uint32_t fk_node_reach(struct fk_node *node, const struct fk_instance *in, const struct fk_key *keys, uint32_t n,
                       uint32_t known, uint64_t now)
{
    if (node->remote)
        return fk_depot_reach(node->remote->depot, in->id, in->space->id, keys, n, known, now);
    return node->sharing ? fk_node_share_reach(node, in, keys, n, known, now) : known;
}

bool fk_node_remote_fetch(void *ctx, const struct fk_core_fetch *want)
{
    struct fk_node *node = ctx;

    return node->remote && fk_depot_fetch(node->remote->depot, want, fk_clock_us());
}

void fk_node_remote_tell(struct fk_node *node, const struct fk_core_event *ev, uint32_t n)
{
    if (fk_depot_tell(node->remote->depot, ev, n))
        fk_node_remote_wake(node);
}

/* The match has hit the first n in memory: they are used again. */
void fk_node_remote_used(struct fk_node *node, const struct fk_instance *in, uint32_t group,
                         const struct fk_key *keys, uint32_t n)
{
    if (fk_depot_used(node->remote->depot, in->space->id, group, keys, n))
        fk_node_remote_wake(node);
}

static bool is_private(void *ctx, uint32_t group)
{
    const struct fk_node *node = ctx;

    for (size_t i = 0; i < node->groups.len; i++)
        if (node->groups.data[i].group == group && node->groups.data[i].unshared)
            return true;
    return false;
}

/* ---- what routers call a block goes with it ---- */

static uint32_t write_note(void *ctx, uint32_t space, uint32_t slot, void *note)
{
    struct fk_node *node = ctx;
    struct fk_space *s = fk_node_space(node, space);

    if (!s || !s->names || !s->names->name[slot].hash)
        return 0;
    struct fk_label label = fk_node_label_at(node, s->names->name[slot].label);
    return fk_note_write(note, FK_STORE_NOTE_MAX, &s->names->name[slot], fk_names_tokens(s->names, slot),
                         s->tokens_per_block, &label);
}

/* If whoever wrote the block knew. */
static void read_note(void *ctx, uint32_t space, uint32_t slot, const void *data, uint32_t bytes)
{
    struct fk_node *node = ctx;
    struct fk_space *s = fk_node_space(node, space);
    uint32_t tokens[FK_STORE_NOTE_MAX / 4];
    struct fk_note note;

    if (!s || !s->names || !fk_note_read(data, bytes, s->tokens_per_block, &note))
        return;
    note.name.label = fk_node_events_label_of(node, note.lora, note.salt);
    if (note.name.label == FK_NONE)
        return;
    for (uint32_t i = 0; i < s->tokens_per_block; i++) {
        memcpy(&tokens[i], note.tokens + 4 * i, 4);
        tokens[i] = le32toh(tokens[i]);
    }
    fk_names_set(s->names, slot, &note.name, tokens);
}

/* The store's thread, without a lock: are the bytes that it has written still the block's? */
static bool sure(void *arg, uint64_t user)
{
    struct fk_node_store *r = arg;

    pthread_mutex_lock(&r->node->lock);
    bool good = fk_depot_sure(r->depot, user);
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
    struct fk_node *node = r->node;

    pthread_mutex_lock(&node->lock);
    if (fk_depot_pump(r->depot, fk_clock_us()))
        tell_rates(node);
    fk_node_unlock(node);
    uint64_t next = fk_store_next_wakeup(r->store), now = fk_clock_us();
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
    r->node = node;
    r->timeout_us = (uint64_t)node->set->remote_timeout_ms * 1000;
    return r;
}

static void remote_free(struct fk_node_store *r)
{
    fk_depot_destroy(r->depot, r->node->memory_busy);
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

static int copy_text(char *out, size_t bytes, const char *text, const char *option)
{
    if ((size_t)snprintf(out, bytes, "%s", text) < bytes)
        return 0;
    return fk_api_fail(-ENAMETOOLONG, "%s: at most %zu characters", option, bytes - 1);
}

static int set_bucket(struct fk_store_bucket *b, const struct fk_settings *set)
{
    int rc = copy_text(b->name, sizeof(b->name), set->remote_bucket, "remote_bucket");

    rc = rc ? rc : copy_text(b->endpoint, sizeof(b->endpoint), set->remote_endpoint, "remote_endpoint");
    rc = rc ? rc : copy_text(b->region, sizeof(b->region), set->remote_region, "remote_region");
    rc = rc ? rc : copy_text(b->prefix, sizeof(b->prefix), set->remote_prefix, "remote_prefix");
    rc = rc ? rc : copy_text(b->plugin, sizeof(b->plugin), set->remote_nixl_plugin, "remote_nixl_plugin");
    rc = rc ? rc : copy_text(b->ca_file, sizeof(b->ca_file), set->remote_ca_file, "remote_ca_file");
    rc = rc ? rc : copy_text(b->library, sizeof(b->library), set->nixl_library, "nixl_library");
    b->client = &fk_objects_nixl;
    return rc;
}

static const char *place_of(const struct fk_settings *set)
{
    return set->remote_backend == FK_REMOTE_NIXL ? set->remote_bucket : set->remote_cache_dir;
}

static const struct fk_store_backend *backend_of(const struct fk_settings *set)
{
    return set->remote_backend == FK_REMOTE_NIXL ? &fk_store_objects : &fk_store_dir;
}

static int open_store(struct fk_node_store *r, const struct fk_settings *set)
{
    struct fk_store_params p = {
        .backend = backend_of(set), .path = place_of(set), .capacity_bytes = set->remote_cache_bytes,
        .threads = (uint32_t)set->remote_threads, .max_queued = FK_DEPOT_REQUESTS,
        .timeout_us = r->timeout_us, .scan_us = (uint64_t)set->remote_scan_ms * 1000,
        .retry_us = (uint64_t)set->remote_retry_ms * 1000, .wake = wake, .sure = sure, .arg = r,
    };
    char error[1500];
    int rc = set_bucket(&p.bucket, set);

    if (rc)
        return rc;
    rc = fk_store_open(&p, &r->store, error, sizeof(error));
    return rc ? fk_api_fail(rc, "%s", error) : 0;
}

static int make_depot(struct fk_node_store *r, struct fk_node *node)
{
    struct fk_depot_params p = {
        .core = node->core, .store = r->store, .peers = node->sharing ? node->sharing->peers : NULL,
        .on_reuse = node->set->remote_write_policy == FK_REMOTE_WRITE_ON_REUSE, .timeout_us = r->timeout_us,
        .max_writes = (uint32_t)node->set->remote_threads * 2, .is_private = is_private,
        .filling = fk_node_slot_filling, .write_note = node->events ? write_note : NULL,
        .read_note = node->events ? read_note : NULL, .ctx = node,
    };

    return fk_depot_create(&p, &r->depot) ? fk_api_fail(-ENOMEM, "out of memory") : 0;
}

int fk_node_remote_start(struct fk_node *node)
{
    struct fk_node_store *r = remote_new(node);

    if (!r)
        return fk_api_fail(-ENOMEM, "out of memory");
    int rc = open_store(r, node->set);
    if (!rc) {
        rc = make_depot(r, node);
        if (!rc && (rc = -pthread_create(&r->thread, NULL, remote_main, r)) != 0)
            fk_api_fail(rc, "cannot start a thread: %s", strerror(-rc));
        if (rc)
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

int fk_node_remote_added(struct fk_space *s)
{
    struct fk_depot_space d = { .id = s->id, .store_id = s->store_id, .slot_bytes = s->slot_bytes,
                                .pool = fk_pool_base(s->pool) };

    return fk_depot_space(s->node->remote->depot, &d) ? fk_api_fail(-ENOMEM, "out of memory") : 0;
}

bool fk_node_remote_idle(struct fk_node *node)
{
    return !node->remote || fk_depot_idle(node->remote->depot);
}

void fk_node_remote_reset(struct fk_node *node)
{
    fk_depot_reset(node->remote->depot);
}

int fk_node_remote_reset_wait(struct fk_node *node)
{
    int rc = node->remote ? fk_store_reset_wait(node->remote->store, node->remote->timeout_us) : 0;

    return rc ? fk_api_fail(rc, "everything is dropped here, but %s could not be reset yet (%s): it is not used until it can be; "
                            "other nodes, and a restart before that, find old blocks",
                            backend_of(node->set)->setting, strerror(-rc)) : 0;
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
    struct fk_depot_stats d;
    json_t *o = json_object();

    fk_store_get_stats(r->store, &st);
    fk_depot_get_stats(r->depot, &d);
    json_object_set_new(o, "kind", json_string(node->set->remote_backend == FK_REMOTE_NIXL ? "nixl" : "directory"));
    json_object_set_new(o, "path", json_string(place_of(node->set)));
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
        { "running", st.running }, { "quarantined", st.quarantined }, { "waiting_writes", d.waiting },
        { "overflowed", d.overflowed },
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
