/*
 * io_thread.c - the node's I/O thread: carries the core's SSD requests to the stores and their
 * answers back, and calls the core's tick when a deadline comes. Sleeps in the engine's reap
 * (or on a condition variable where there is no SSD) until something happens.
 *
 * Locks: io_lock around everything that touches engine or stores; node->lock, taken inside it
 * and never across I/O, around the core.
 */
#include "api/node_impl.h"
#include "base/clock.h"
#include "peer/peer.h"

#define MAX_SLEEP_US 1000000u       /* a lost wake-up costs a second at most, never a hang */
#define REGISTER_CHUNK FK_GIB       /* the kernel takes no larger buffer */

struct batch {
    struct fk_core_ssd_req req[FK_NODE_SSD_BATCH];
    struct fk_names_io names[FK_NODE_SSD_BATCH];    /* of the requests, where events are on */
    struct fk_core_ssd_done done[FK_NODE_SSD_BATCH];
    struct fk_ssd_req out[FK_NODE_SSD_BATCH];
    struct fk_ssd_done tier_done[FK_NODE_SSD_BATCH];
    struct fk_io *io[FK_NODE_SSD_BATCH];
    struct fk_peers_stage stage[FK_NODE_STAGE_BATCH];   /* SSD blocks that other nodes read */
    uint32_t resets;                /* carried out in this turn */
    int reset_status;
};

void fk_node_io_wake(struct fk_node *node)
{
    if (atomic_exchange(&node->io_signalled, true))
        return;
    if (node->engine) {
        node->engine->ops->wake(node->engine);
        return;
    }
    pthread_mutex_lock(&node->wake_lock);
    pthread_cond_signal(&node->io_wake);
    pthread_mutex_unlock(&node->wake_lock);
}

/* ---- requests ---- */

static struct fk_ssd_req to_tier(const struct fk_space *s, const struct fk_core_ssd_req *r)
{
    return (struct fk_ssd_req){
        .op = r->kind == FK_SSD_READ ? FK_IO_READ : FK_IO_WRITE, .slot = r->ssd_slot,
        .buf = (char *)fk_pool_base(s->pool) + r->cpu_slot * s->slot_bytes,
        .key = r->key, .parent = r->parent, .tag = r->tag, .id = r->id,
    };
}

/* The slot gets other bytes; what they sum up to the first load will see. */
static void forget_sums(const struct fk_space *s, const struct fk_core_ssd_req *r)
{
    _Atomic uint64_t *at = fk_space_sums(s, r->cpu_slot, 0);

    for (uint32_t i = 0; at && r->kind == FK_SSD_READ && i < s->ranks; i++)
        atomic_store(&at[i], 0);
}

static bool is_transfer(const struct fk_core_ssd_req *r)
{
    return r->kind == FK_SSD_READ || r->kind == FK_SSD_WRITE;
}

static void carry_out(struct batch *b, struct fk_space *s, const struct fk_core_ssd_req *r,
                      uint64_t now)
{
    if (r->kind == FK_SSD_FORGET) {
        fk_ssd_forget(s->ssd, r->ssd_slot);
        return;
    }
    int rc = fk_ssd_reset(s->ssd, now);
    b->reset_status = rc ? rc : b->reset_status;
    b->resets++;
}

/* With the lock: whoever waits in flexkv_reset hears of it. */
static void report_resets(struct fk_node *node, struct batch *b)
{
    if (!b->resets)
        return;
    node->resets_done += b->resets;
    node->reset_status = b->reset_status ? b->reset_status : node->reset_status;
    b->resets = 0;
    b->reset_status = 0;
    pthread_cond_broadcast(&node->idle);
}

/* Carries out requests in order; transfers that follow each other go together. */
static void submit(struct fk_node *node, struct batch *b, uint32_t n, uint64_t now)
{
    for (uint32_t i = 0; i < n;) {
        struct fk_space *s = fk_node_space(node, b->req[i].space);
        uint32_t k = 0;
        if (!s || !s->ssd) {        /* of a space whose opening failed half-way */
            i++;
            continue;
        }
        for (; i < n && b->req[i].space == s->id && is_transfer(&b->req[i]); i++) {
            forget_sums(s, &b->req[i]);
            b->out[k++] = to_tier(s, &b->req[i]);
        }
        if (k && s->names_file)
            fk_names_carry(s, &b->req[i - k], &b->names[i - k], k);
        if (k)
            fk_ssd_submit(s->ssd, b->out, k, now);
        else
            carry_out(b, s, &b->req[i++], now);
    }
}

static unsigned stores_inflight(struct fk_node *node)
{
    unsigned n = 0;

    for (struct fk_space *s = node->spaces; s; s = s->next)
        n += s->ssd ? fk_ssd_inflight(s->ssd) : 0;
    return n;
}

/* More than twice the device's depth only hides later, more urgent reads behind writes. */
static uint32_t take_requests(struct fk_node *node, struct batch *b)
{
    uint32_t cap = (uint32_t)node->set->ssd_io_depth * 2, busy = stores_inflight(node);

    if (!node->engine || busy >= cap)
        return 0;
    return fk_core_take_ssd(node->core, b->req, fk_min(cap - busy, (uint32_t)FK_NODE_SSD_BATCH));
}

/* ---- answers ---- */

static uint32_t collect(struct fk_node *node, struct batch *b, uint64_t now)
{
    uint32_t n = 0;

    for (struct fk_space *s = node->spaces; s; s = s->next) {
        if (!s->ssd)
            continue;
        fk_ssd_tick(s->ssd, now);
        uint32_t k = fk_ssd_take_done(s->ssd, b->tier_done, FK_NODE_SSD_BATCH - n);
        for (uint32_t i = 0; i < k; i++)
            b->done[n++] = (struct fk_core_ssd_done){ b->tier_done[i].id, b->tier_done[i].status };
    }
    return n;
}

static void tell_dirs_out(struct fk_node *node)
{
    for (struct fk_space *s = node->spaces; s; s = s->next) {
        uint32_t out = s->ssd ? fk_ssd_dirs_out(s->ssd) : 0;
        if (out != s->dirs_out) {
            if (node->events && (s->dirs_out & ~out))
                fk_node_events_look_anew(node);     /* names there could not be read */
            s->dirs_out = out;
            fk_core_ssd_dirs_out(node->core, s->id, out);
        }
    }
}

static void add_up_bytes(struct fk_node *node)
{
    uint64_t read = 0, written = 0;

    for (struct fk_space *s = node->spaces; s; s = s->next) {
        struct fk_ssd_stats st = { 0 };
        if (s->ssd)
            fk_ssd_get_stats(s->ssd, &st);
        read += st.read_bytes;
        written += st.write_bytes;
    }
    atomic_store(&node->bytes_read, read);
    atomic_store(&node->bytes_written, written);
}

/* Memory that has been faulted in since the last time is made known to the engine, in chunks
 * that end between slots. */
static void register_pools(struct fk_node *node)
{
    for (struct fk_space *s = node->spaces; s; s = s->next) {
        uint64_t chunk = fk_max(REGISTER_CHUNK / s->slot_bytes, (uint64_t)1) * s->slot_bytes;
        uint64_t there = fk_pool_populated(s->pool);
        while (s->ssd && s->pool_registered < s->pool_bytes) {
            uint64_t n = fk_min(chunk, s->pool_bytes - s->pool_registered);
            if (there < s->pool_registered + n)
                break;
            (void)node->engine->ops->register_memory(
                node->engine, (char *)fk_pool_base(s->pool) + s->pool_registered, n);
            s->pool_registered += n;
        }
    }
}

/* With both locks. */
static void note_read_rates(struct fk_node *node, uint64_t now)
{
    for (struct fk_space *s = node->spaces; s; s = s->next) {
        struct fk_ssd_stats st = { 0 };
        if (!s->ssd)
            continue;
        fk_ssd_get_stats(s->ssd, &st);
        fk_rates_read(s, st.read_bytes, now, fk_core_reads(node->core, s->id) != 0);
        fk_rates_save(s, now, false);
    }
}

static uint64_t sleep_us(struct fk_node *node, uint64_t core_wakeup, uint64_t now)
{
    uint64_t at = core_wakeup;

    for (struct fk_space *s = node->spaces; s; s = s->next)
        if (s->ssd)
            at = fk_min(at, fk_ssd_next_wakeup(s->ssd));
    return at <= now ? 0 : fk_min(at - now, (uint64_t)MAX_SLEEP_US);
}

/* ---- the loop ---- */

static void wait_without_engine(struct fk_node *node, uint64_t us)
{
    struct timespec ts;

    clock_gettime(CLOCK_MONOTONIC, &ts);
    uint64_t ns = (uint64_t)ts.tv_nsec + us * 1000;
    ts.tv_sec += (time_t)(ns / 1000000000u);
    ts.tv_nsec = (long)(ns % 1000000000u);
    pthread_mutex_lock(&node->wake_lock);
    while (us && !atomic_load(&node->io_signalled))
        if (pthread_cond_timedwait(&node->io_wake, &node->wake_lock, &ts))
            break;
    pthread_mutex_unlock(&node->wake_lock);
}

/* Waits for the stores (or just waits), takes what is finished. */
static uint32_t wait_and_collect(struct fk_node *node, struct batch *b, uint64_t us)
{
    if (!node->engine) {
        wait_without_engine(node, us);
        return 0;
    }
    register_pools(node);
    int k = node->engine->ops->reap(node->engine, b->io, FK_NODE_SSD_BATCH, us);
    uint64_t now = fk_clock_us();
    for (int i = 0; i < k; i++)
        fk_ssd_io_done(b->io[i], now);
    uint32_t n = collect(node, b, now);
    add_up_bytes(node);
    return n;
}

/* One turn; n_before: how much the last one brought (a full batch: there may be more). */
static uint32_t take_turn(struct fk_node *node, struct batch *b, uint32_t n_before)
{
    uint64_t now = fk_clock_us();

    atomic_store(&node->io_signalled, false);
    pthread_mutex_lock(&node->lock);
    uint32_t n = take_requests(node, b);
    uint32_t n_stage = node->engine ? fk_node_stage_take(node, b->stage, FK_NODE_STAGE_BATCH) : 0;
    bool left = fk_core_work(node->core).ssd || fk_node_stage_wanted(node);
    uint64_t wakeup = fk_core_next_wakeup(node->core);
    note_read_rates(node, now);
    node->io_sleeps_until = fk_min(wakeup, now + MAX_SLEEP_US);
    if (node->events) {
        fk_names_prepare(node, b->req, n, b->names);
        fk_node_events_drain(node);     /* the slots that are read into get other names */
    }
    pthread_mutex_unlock(&node->lock);

    submit(node, b, n, now);
    fk_node_stage_submit(node, b->stage, n_stage, now);
    /* With nothing in flight no completion would come to fetch what is left. */
    bool more = n_before == FK_NODE_SSD_BATCH || (left && !stores_inflight(node));
    /* A reset is reported at once; it waits in the engine itself and may have taken a wake-up that
     * was meant for us. */
    more = more || b->resets || atomic_load(&node->io_signalled) || atomic_load(&node->io_stop) ||
           atomic_load(&node->io_yield);
    n = wait_and_collect(node, b, more ? 0 : sleep_us(node, wakeup, now));

    now = fk_clock_us();
    pthread_mutex_lock(&node->lock);
    tell_dirs_out(node);
    report_resets(node, b);
    uint32_t core_done = 0;
    for (uint32_t i = 0; i < n; i++)
        if (!fk_node_stage_done(node, &b->done[i]))
            b->done[core_done++] = b->done[i];
    if (core_done)
        fk_core_ssd_done(node->core, b->done, core_done, now);
    if (now >= fk_core_next_wakeup(node->core))
        fk_core_tick(node->core, now);
    fk_node_unlock(node);
    return n;
}

static void *io_main(void *arg)
{
    struct fk_node *node = arg;
    struct batch *b = calloc(1, sizeof(*b));

    uint32_t n = 0;

    pthread_mutex_lock(&node->io_lock);
    while (b && !atomic_load(&node->io_stop)) {
        if (atomic_load(&node->io_yield)) {     /* a space is being opened */
            pthread_mutex_unlock(&node->io_lock);
            while (atomic_load(&node->io_yield))
                usleep(200);
            pthread_mutex_lock(&node->io_lock);
        }
        n = take_turn(node, b, n);
    }
    pthread_mutex_unlock(&node->io_lock);
    free(b);
    return NULL;
}

void fk_node_io_acquire(struct fk_node *node)
{
    atomic_fetch_add(&node->io_yield, 1);
    if (node->has_io_thread)
        fk_node_io_wake(node);
    pthread_mutex_lock(&node->io_lock);
}

void fk_node_io_release(struct fk_node *node)
{
    atomic_fetch_sub(&node->io_yield, 1);
    pthread_mutex_unlock(&node->io_lock);
}

int fk_node_io_start(struct fk_node *node)
{
    int rc = pthread_create(&node->io_thread, NULL, io_main, node);

    if (rc)
        return fk_api_fail(-rc, "cannot start the I/O thread: %s", strerror(rc));
    node->has_io_thread = true;
    return 0;
}

void fk_node_io_stop(struct fk_node *node)
{
    if (!node->has_io_thread)
        return;
    atomic_store(&node->io_stop, true);
    fk_node_io_wake(node);
    pthread_join(node->io_thread, NULL);
    node->has_io_thread = false;
}
