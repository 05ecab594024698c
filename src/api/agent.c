/*
 * agent.c - flexkv_agent: the thread in an engine's worker process that copies between its pages and
 * the node's cpu tier. Its work is in agent_jobs.c; the node's side of it is link.c.
 *
 *   look for the node -> hello -> wait -> welcome -> commands and reports, until the node goes
 *        ^_____________________________________________________________________________|
 */
#include <poll.h>
#include <stdio.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <time.h>

#include "api/agent_impl.h"
#include "base/clock.h"
#include "base/log.h"
#include "base/thread.h"
#include "copy/cuda/cufile.h"

#define RETRY_MIN_MS 20
#define RETRY_MAX_MS 250
#define HELLO_TIMEOUT_US 5000000u
#define TIMEOUT_MS 60000u
#define STUCK_S 30                      /* a copy that has not stopped by then never will */

/* ---- state ---- */

static void set_state(flexkv_agent *a, int state, const char *error)
{
    pthread_mutex_lock(&a->lock);
    bool news = error && strcmp(a->error, error) != 0;
    a->state = state;
    snprintf(a->error, sizeof(a->error), "%s", error ? error : "");
    pthread_cond_broadcast(&a->changed);
    pthread_mutex_unlock(&a->lock);
    if (news)
        fk_error("worker %u at %s: %s", a->hello.worker, a->address, error);
}

/* What was revoked was another node's, or came over another connection: neither comes again. */
static void begin_service(flexkv_agent *a)
{
    pthread_mutex_lock(&a->lock);
    a->n_revoked = a->n_layered = a->n_early = 0;
    memset(a->early, 0, sizeof(a->early));
    for (uint32_t i = 0; i < FK_AGENT_LAYERED; i++)
        a->layered[i].tag = 0;
    pthread_mutex_unlock(&a->lock);
    set_state(a, 1, NULL);
}

/* Sleeps, but for a stop. */
static void pause_ms(flexkv_agent *a, int ms)
{
    struct pollfd p = { .fd = a->stop_fd, .events = POLLIN };

    (void)poll(&p, 1, ms);
}

/* ---- the connection ---- */

static void disconnect(flexkv_agent *a)
{
    fk_copier_detach(a->copier);
    if (a->pool)
        munmap(a->pool, a->pool_bytes);
    if (a->memory)
        munmap(a->memory, a->memory_bytes);
    if (a->command_fd >= 0)
        close(a->command_fd);
    if (a->report_fd >= 0)
        close(a->report_fd);
    fk_msg_reader_free(&a->in);
    if (a->fd >= 0)                     /* last: the node takes it for the end of all copies */
        close(a->fd);
    a->pool = NULL;
    a->memory = NULL;
    a->fd = a->command_fd = a->report_fd = -1;
}

static int map_fd(int fd, size_t bytes, void **out)
{
    if (fd < 0)
        return -EPROTO;
    void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (p == MAP_FAILED)
        return -errno;
    *out = p;
    return 0;
}

static bool power_of_2(uint64_t n)
{
    return n && !(n & (n - 1));
}

static int check_welcome(const struct fk_wire_welcome *w, const struct fk_wire_hello *h)
{
    if (!power_of_2(w->command_bytes) || !power_of_2(w->report_bytes) || !w->n_jobs ||
        w->n_jobs > FK_AGENT_JOBS || w->replica >= w->replicas || w->slice_offset + h->slice_bytes > w->slot_bytes ||
        (unsigned __int128)w->slot_bytes * w->n_slots > w->pool_bytes)
        return -EPROTO;
    if (w->sums_offset && (w->sums_offset % sizeof(uint64_t) || !w->sums_stride ||
                           w->sums_offset < w->slot_bytes * w->n_slots || w->sums_offset > w->pool_bytes ||
                           ((uint64_t)(w->n_slots - 1) * w->sums_stride + 1) * sizeof(uint64_t) >
                               w->pool_bytes - w->sums_offset))
        return -EPROTO;
    if (w->ssd_dirs && (w->ssd_dirs > FK_SSD_MAX_DIRS || !w->ssd_stripe_slots || !w->ssd_slots ||
                        w->ssd_slot_bytes % FK_SSD_ALIGN || w->slice_offset % FK_SSD_ALIGN ||
                        w->slice_offset + h->slice_bytes > w->ssd_slot_bytes))
        return -EPROTO;
    return 0;
}

/* The node's memory and ours: [ cancel flags | commands | reports ]. */
static int take_welcome(flexkv_agent *a, const struct fk_msg *msg, const uint8_t *payload)
{
    size_t flags = fk_round_up(FK_AGENT_JOBS * sizeof(*a->cancel), 64);
    void *pool = NULL;

    if (msg->bytes != sizeof(a->w))
        return -EPROTO;
    memcpy(&a->w, payload, sizeof(a->w));
    int rc = check_welcome(&a->w, &a->hello);
    if (rc)
        return rc;
    a->memory_bytes = flags + fk_ring_bytes(a->w.command_bytes) + fk_ring_bytes(a->w.report_bytes);
    a->pool_bytes = a->w.pool_bytes;
    rc = map_fd(fk_msg_take_fd(&a->in), a->pool_bytes, &pool);
    a->pool = pool;
    if (!rc)
        rc = map_fd(fk_msg_take_fd(&a->in), a->memory_bytes, &a->memory);
    if (rc)
        return rc;
    a->command_fd = fk_msg_take_fd(&a->in);
    a->report_fd = fk_msg_take_fd(&a->in);
    if (a->command_fd < 0 || a->report_fd < 0)
        return -EPROTO;
    a->cancel = a->memory;
    fk_ring_init(&a->commands, (char *)a->memory + flags, a->w.command_bytes);
    fk_ring_init(&a->reports, (char *)a->memory + flags + fk_ring_bytes(a->w.command_bytes),
                 a->w.report_bytes);
    a->populated = 0;
    return 0;
}

/* 1: welcome; 0: another message; -EAGAIN: none; -errno: turned away. */
static int handle_message(flexkv_agent *a)
{
    struct fk_msg msg;
    const uint8_t *payload;
    int rc = fk_msg_next(&a->in, &msg, &payload);

    if (rc <= 0)
        return rc ? rc : -EAGAIN;
    if (msg.type == FK_WIRE_WELCOME) {
        rc = take_welcome(a, &msg, payload);
        return rc ? rc : 1;
    }
    if (msg.type == FK_WIRE_ERROR && msg.bytes == sizeof(struct fk_wire_error)) {
        struct fk_wire_error e;
        memcpy(&e, payload, sizeof(e));
        e.text[sizeof(e.text) - 1] = '\0';
        rc = e.rc < 0 ? e.rc : -EPROTO;
        set_state(a, rc, e.text);
        return rc;
    }
    return msg.type == FK_WIRE_WAIT ? 0 : -EPROTO;
}

/* Waits for the welcome as long as the node wants: its space may not be open yet. */
static int wait_for_welcome(flexkv_agent *a)
{
    struct pollfd p[2] = { { .fd = a->fd, .events = POLLIN }, { .fd = a->stop_fd, .events = POLLIN } };

    for (;;) {
        int rc;
        while ((rc = handle_message(a)) == 0)
            ;
        if (rc != -EAGAIN)
            return rc;
        if (poll(p, 2, -1) < 0 && errno != EINTR)
            return -errno;
        if (atomic_load(&a->stop))
            return -ECANCELED;
        rc = fk_msg_read(a->fd, &a->in);
        if (rc && rc != -EAGAIN)
            return rc;
    }
}

static int connect_node(flexkv_agent *a)
{
    struct iovec v = { &a->hello, sizeof(a->hello) };
    char error[400];
    int rc = fk_socket_connect(a->address, &a->fd, error, sizeof(error));

    if (rc)
        return rc;
    fk_msg_reader_init(&a->in, 4096);
    rc = fk_msg_send(a->fd, FK_WIRE_HELLO, &v, 1, NULL, 0, fk_clock_us() + HELLO_TIMEOUT_US);
    return rc ? rc : wait_for_welcome(a);
}

/* ---- the thread ---- */

/* Once per absence of the node, after it has lasted too long. */
static void note_absence(flexkv_agent *a, uint64_t *since, int rc)
{
    if (*since == UINT64_MAX || fk_clock_us() - *since < a->timeout_us)
        return;
    fk_warn("worker %u of instance \"%s\" has found no node at %s for %llu s (%s); it goes on looking. "
            "Does the engine's scheduler, or flexkv serve, run with this address "
            "(server_recv_port)?", a->hello.worker, a->hello.instance, a->address,
            (unsigned long long)(a->timeout_us / 1000000), strerror(-rc));
    *since = UINT64_MAX;
}

static int attach(flexkv_agent *a)
{
    struct fk_copy_pool pool = { .base = a->pool, .bytes = a->pool_bytes,
                                 .slot_bytes = a->w.slot_bytes, .slice_offset = a->w.slice_offset,
                                 .how = { .pin_chunk_bytes = a->w.pin_chunk_bytes,
                                          .poll_layers = a->w.poll_layers } };

    if (a->w.sums_offset)
        pool.sums = (struct fk_copy_sums){ (_Atomic uint64_t *)(void *)(a->pool + a->w.sums_offset),
                                           a->w.sums_stride };
    for (int i = 0; i < 2; i++) {
        pool.how.ctas[i] = a->w.ctas[i];
        pool.how.copy_engine[i] = a->w.copy_engine[i];
    }
    int rc = fk_copier_attach(a->copier, &pool);

    if (rc)
        set_state(a, rc, "the node's memory can't be used for copies");
    return rc;
}

static uint32_t take_files(flexkv_agent *a, uint32_t want, int *fds)
{
    uint32_t n = 0;

    while (n < want && n < FK_MSG_FDS && (fds[n] = fk_msg_take_fd(&a->in)) >= 0)
        n++;
    return n;
}

static void close_files(const int *fds, uint32_t n)
{
    while (n > 0)
        close(fds[--n]);
}

static int open_direct(flexkv_agent *a, const int *fds, uint32_t n, char *why, size_t why_bytes)
{
    if (n != a->w.ssd_dirs || !n) {
        snprintf(why, why_bytes, "the SSD tier's files can't be opened");
        return -ENOTSUP;
    }
    return fk_copier_open_files(a->copier, fds, n, why, why_bytes);
}

/* May this worker read the SSD's files straight into its pages? Tried once: the answer is the machine's,
 * not the node's. */
static void begin_direct(flexkv_agent *a)
{
    int trial[FK_MSG_FDS], data[FK_MSG_FDS];
    char why[400] = "";

    a->direct = false;
    if (!a->w.direct)
        return;
    uint32_t n = take_files(a, a->w.direct - 1, trial), files = take_files(a, a->w.ssd_dirs, data);
    if (!a->direct_tried)
        a->direct_works = fk_copier_try_direct(a->copier, trial, n, why, sizeof(why)) == 0;
    if (a->direct_works)
        a->direct = open_direct(a, data, files, why, sizeof(why)) == 0;
    if (a->direct && !a->direct_tried)
        fk_info("worker %u: blocks on SSD are read by GPU direct storage (enable_gds), from %u directories%s",
                a->hello.worker, n, fk_cufile_through_cpu() ? "; A TEST: it goes through the CPU" : "");
    else if (!a->direct && *why)
        fk_warn("worker %u: GPU direct storage (enable_gds) is not used: %s. Blocks on SSD are read "
                "through the CPU tier", a->hello.worker, why);
    a->direct_tried = true;
    close_files(trial, n);
    close_files(data, files);
    fk_agent_tell_direct(a);
}

static void *agent_main(void *arg)
{
    flexkv_agent *a = arg;
    int pause = RETRY_MIN_MS;
    uint64_t since = fk_clock_us();

    fk_thread_stand_back();
    while (!atomic_load(&a->stop)) {
        int rc = connect_node(a);
        if (rc == 1) {
            rc = attach(a);
            if (!rc) {
                begin_direct(a);
                begin_service(a);
                rc = fk_agent_serve(a);
                set_state(a, 0, NULL);
            }
            if (rc == -EPROTO)
                fk_error("worker %u: the node at %s sends nonsense", a->hello.worker, a->address);
            pause = RETRY_MIN_MS;
            since = fk_clock_us();
        } else {
            note_absence(a, &since, rc);
        }
        disconnect(a);
        pause_ms(a, pause);
        pause = fk_min(pause * 2, RETRY_MAX_MS);
    }
    pthread_mutex_lock(&a->lock);
    a->ended = true;
    pthread_cond_broadcast(&a->changed);
    pthread_mutex_unlock(&a->lock);
    return NULL;
}

/* ---- the public calls ---- */

static void free_agent(flexkv_agent *a)
{
    fk_copier_destroy(a->copier);
    fk_layers_close(a->counters);
    if (a->stop_fd >= 0)
        close(a->stop_fd);
    if (a->hand_fd >= 0)
        close(a->hand_fd);
    for (uint32_t i = 0; i < FK_AGENT_LAYERED; i++)
        free(a->layered[i].events);
    free(a->layer_ends);
    free(a->regions);
    free(a->address);
    pthread_mutex_destroy(&a->lock);
    pthread_mutex_destroy(&a->jobs_lock);
    pthread_cond_destroy(&a->changed);
    free(a);
}

static int fill_hello(struct fk_wire_hello *h, const flexkv_agent_desc *d,
                      const flexkv_region *regions, size_t n)
{
    const char *space = d->space ? d->space : "default", *instance = d->instance ? d->instance : "";

    if (strlen(space) >= sizeof(h->space) || strlen(instance) >= sizeof(h->instance))
        return fk_api_fail(-EINVAL, "the space's or the instance's name is too long");
    if (d->replicas && d->replica >= d->replicas)
        return fk_api_fail(-EINVAL, "replica %u of %u", d->replica, d->replicas);
    if (!n)
        return fk_api_fail(-EINVAL, "an agent needs at least one region");
    *h = (struct fk_wire_hello){
        .magic = FK_WIRE_MAGIC, .version = FK_WIRE_VERSION, .role = FK_WIRE_AGENT,
        .pid = (uint32_t)getpid(), .worker = d->worker, .slice = d->slice, .replica = d->replica,
        .replicas = d->replicas, .pages = regions[0].pages,
    };
    snprintf(h->space, sizeof(h->space), "%s", space);
    snprintf(h->instance, sizeof(h->instance), "%s", instance);
    return fk_check_regions(regions, n, d->worker, &h->slice_bytes);
}

/* A layer that has no region of its own came with the one before it. */
static int fill_layers(flexkv_agent *a, const flexkv_agent_desc *d)
{
    uint64_t end = 0;

    a->n_layers = d->n_layers;
    if (!d->n_layers)
        return 0;
    a->layer_ends = calloc(d->n_layers, sizeof(*a->layer_ends));
    if (!a->layer_ends)
        return fk_api_fail(-ENOMEM, "out of memory");
    for (uint32_t i = 0; i < d->n_layers; i++) {
        end += d->layer_regions[i];
        a->layer_ends[i] = (uint32_t)end;
    }
    if (end != a->n_regions || !d->layer_regions[0])
        return fk_api_fail(-EINVAL, "the layers have %llu regions together, the first one %u; %u were "
                           "given", (unsigned long long)end, d->layer_regions[0], a->n_regions);
    for (uint32_t i = 0; i < FK_AGENT_LAYERED; i++)
        if (!(a->layered[i].events = calloc(d->n_layers, sizeof(void *))))
            return fk_api_fail(-ENOMEM, "out of memory");
    return 0;
}

static void init_agent(flexkv_agent *a, const flexkv_agent_desc *d)
{
    pthread_condattr_t mono;

    a->fd = a->command_fd = a->report_fd = -1;
    pthread_condattr_init(&mono);
    pthread_condattr_setclock(&mono, CLOCK_MONOTONIC);
    pthread_mutex_init(&a->lock, NULL);
    pthread_mutex_init(&a->jobs_lock, NULL);
    pthread_cond_init(&a->changed, &mono);
    pthread_condattr_destroy(&mono);
    a->timeout_us = (d->timeout_ms ? d->timeout_ms : TIMEOUT_MS) * 1000ull;
    a->stop_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    a->hand_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
}

static int fill_agent(flexkv_agent *a, const flexkv_agent_desc *d, const flexkv_region *regions,
                      size_t n)
{
    char why[300];

    init_agent(a, d);
    a->n_regions = (uint32_t)n;
    a->address = strdup(d->address);
    a->regions = malloc(n * sizeof(*regions));
    if (!a->address || !a->regions || a->stop_fd < 0 || a->hand_fd < 0)
        return fk_api_fail(-ENOMEM, "out of memory");
    memcpy(a->regions, regions, n * sizeof(*regions));
    int rc = fk_copier_create(a->regions, a->n_regions, fk_default_copy_threads(), &a->copier, why,
                              sizeof(why));
    return rc ? fk_api_fail(rc, "%s", why) : fill_layers(a, d);
}

FLEXKV_API int flexkv_agent_create(const flexkv_agent_desc *desc, const flexkv_region *regions,
                                   size_t n, flexkv_agent **out)
{
    flexkv_agent_desc copy = { 0 }, *d = &copy;

    if (desc->struct_bytes < offsetof(flexkv_agent_desc, layer_regions) ||
        desc->struct_bytes > sizeof(copy) || !desc->address)
        return fk_api_fail(-EINVAL, "flexkv_agent_desc: struct_bytes or address is not set");
    memcpy(d, desc, desc->struct_bytes);
    flexkv_agent *a = calloc(1, sizeof(*a));
    if (!a)
        return fk_api_fail(-ENOMEM, "out of memory");
    int rc = fill_hello(&a->hello, d, regions, n);
    if (rc) {
        free(a);
        return rc;
    }
    rc = fill_agent(a, d, regions, n);
    if (!rc && (rc = -pthread_create(&a->thread, NULL, agent_main, a)))
        fk_api_fail(rc, "cannot start the agent's thread: %s", strerror(-rc));
    if (rc) {
        free_agent(a);
        return rc;
    }
    *out = a;
    return 0;
}

FLEXKV_API int flexkv_agent_state(flexkv_agent *a)
{
    pthread_mutex_lock(&a->lock);
    int state = a->state;
    if (state < 0)
        fk_api_fail(state, "%s", a->error);
    pthread_mutex_unlock(&a->lock);
    return state;
}

static struct timespec after_ms(int ms)
{
    uint64_t end = fk_clock_us() + (uint64_t)fk_max(ms, 0) * 1000;

    return (struct timespec){ .tv_sec = (time_t)(end / 1000000), .tv_nsec = (long)(end % 1000000) * 1000 };
}

/* With the lock: tells the copies of these operations to stop; true if there are any. */
static bool stop_copies(flexkv_agent *a, const uint64_t *ops, size_t n)
{
    bool any = false;

    for (int lane = 0; lane < FK_AGENT_LANES; lane++) {
        for (size_t i = 0; a->running[lane] && i < n; i++) {
            if (a->running[lane] != ops[i])
                continue;
            atomic_store(a->running_cancel[lane], true);
            any = true;
        }
    }
    return any;
}

FLEXKV_API int flexkv_agent_revoke(flexkv_agent *a, const uint64_t *ops, size_t n, int timeout_ms)
{
    struct timespec ts = after_ms(timeout_ms);
    int rc = 0;

    pthread_mutex_lock(&a->lock);
    for (size_t i = 0; i < n; i++)
        a->revoked[a->n_revoked++ % FK_AGENT_REVOKED] = ops[i];
    while (rc == 0 && stop_copies(a, ops, n))
        if (pthread_cond_timedwait(&a->changed, &a->lock, &ts) == ETIMEDOUT)
            rc = stop_copies(a, ops, n) ? -ETIMEDOUT : 0;
    pthread_mutex_unlock(&a->lock);
    return rc ? fk_api_fail(rc, "a copy did not stop within %d ms", timeout_ms) : 0;
}

/* With the lock: NULL if the agent has not begun it, or has forgotten it. */
static const struct fk_agent_layered *find_layered(const flexkv_agent *a, uint64_t op)
{
    for (uint32_t i = 0; i < FK_AGENT_LAYERED; i++)
        if (a->layered[i].tag == op)
            return &a->layered[i];
    return NULL;
}

static int wait_layer_of(flexkv_agent *a, uint64_t op, uint32_t layer, const struct timespec *ts,
                         void **event)
{
    const struct fk_agent_layered *y;
    int rc = 0;

    pthread_mutex_lock(&a->lock);
    while (!(y = find_layered(a, op)) || (y->layers <= layer && !y->ended)) {
        if (a->stop || pthread_cond_timedwait(&a->changed, &a->lock, ts) == ETIMEDOUT) {
            rc = -ETIMEDOUT;
            break;
        }
    }
    if (!rc && y->layers <= layer)
        rc = y->status ? y->status : -ECANCELED;
    *event = rc ? NULL : y->events[layer];
    pthread_mutex_unlock(&a->lock);
    return rc;
}

FLEXKV_API int flexkv_agent_wait_layer(flexkv_agent *a, const uint64_t *ops, size_t n, uint32_t layer,
                                       void *stream, int timeout_ms)
{
    struct timespec ts = after_ms(timeout_ms);

    if (layer >= a->n_layers)
        return fk_api_fail(-EINVAL, "layer %u: the agent was told of %u layers", layer, a->n_layers);
    for (size_t i = 0; i < n; i++) {
        void *event;
        int rc = wait_layer_of(a, ops[i], layer, &ts, &event);
        if (!rc && event)
            rc = fk_copier_wait_event(a->copier, event, stream);
        if (rc)
            return fk_api_fail(rc, "layer %u of operation %llu was not loaded: %s", layer,
                               (unsigned long long)ops[i], strerror(-rc));
    }
    return 0;
}

/* The event of the next job of the operation that was on its way, from *at on; NULL: there is none. */
static void *next_early(flexkv_agent *a, uint64_t op, uint32_t *at)
{
    void *event = NULL;

    pthread_mutex_lock(&a->lock);
    for (; !event && *at < FK_AGENT_EARLY; ++*at)
        if (a->early[*at].tag == op)
            event = a->early[*at].event;
    pthread_mutex_unlock(&a->lock);
    return event;
}

FLEXKV_API int flexkv_agent_wait_loaded(flexkv_agent *a, const uint64_t *ops, size_t n, void *stream)
{
    for (size_t i = 0; i < n; i++) {
        uint32_t at = 0;
        for (void *event; (event = next_early(a, ops[i], &at));) {
            int rc = fk_copier_wait_event(a->copier, event, stream);
            if (rc)
                return fk_api_fail(rc, "operation %llu was not loaded: %s", (unsigned long long)ops[i],
                                   strerror(-rc));
        }
    }
    return 0;
}

FLEXKV_API int flexkv_agent_serve_layers(flexkv_agent *a, const char *address)
{
    struct fk_layers *layers;
    char error[400] = "";

    if (!a->n_layers || a->n_layers > FK_LAYERS_MAX)
        return fk_api_fail(-EINVAL, "the agent was told of %u layers: 1 to %u can be counted", a->n_layers,
                           FK_LAYERS_MAX);
    if (a->counters)
        return fk_api_fail(-EBUSY, "the agent serves its layers already");
    int rc = fk_layers_open(address, a->n_layers, a->hello.worker, &layers, error, sizeof(error));
    if (rc)
        return fk_api_fail(rc, "layerwise_eventfd_socket: %s", error);
    a->counters = layers;
    return 0;
}

/* A copy that does not end, on a device that hangs: the thread, and what it may still write to,
 * stay until the process ends. */
static bool has_ended(flexkv_agent *a)
{
    struct timespec ts = after_ms(STUCK_S * 1000);
    int rc = 0;

    pthread_mutex_lock(&a->lock);
    while (!a->ended && rc == 0)
        rc = pthread_cond_timedwait(&a->changed, &a->lock, &ts);
    bool ended = a->ended;
    pthread_mutex_unlock(&a->lock);
    return ended;
}

FLEXKV_API void flexkv_agent_close(flexkv_agent *a)
{
    if (!a)
        return;
    fk_agent_cancel_running(a);
    atomic_store(&a->stop, true);
    (void)!write(a->stop_fd, &(uint64_t){ 1 }, sizeof(uint64_t));
    if (!has_ended(a)) {
        fk_error("worker %u: a copy has not ended in %d s; its memory stays mapped until this process "
                 "ends", a->hello.worker, STUCK_S);
        return;
    }
    pthread_join(a->thread, NULL);
    free_agent(a);
}
