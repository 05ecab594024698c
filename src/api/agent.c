/*
 * agent.c - flexkv_agent: the thread in an engine's worker process that copies between its pages and
 * the node's cpu tier. The node's side of it is link.c.
 *
 *   look for the node -> hello -> wait -> welcome -> commands and reports, until the node goes
 *        ^_____________________________________________________________________________|
 *
 * Nobody else in the process may touch the node's memory. `lock` guards what is told about the
 * thread (state, running) and what must not be copied any more (revoked).
 */
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <sys/eventfd.h>
#include <sys/mman.h>

#include "api/node_impl.h"
#include "base/clock.h"
#include "base/log.h"
#include "ipc/ring.h"
#include "ipc/socket.h"
#include "ipc/wire.h"

#define RETRY_MIN_MS 20
#define RETRY_MAX_MS 250
#define HELLO_TIMEOUT_US 5000000u
#define REVOKED_KEPT 4096u              /* far more operations than a node has under way */
#define TIMEOUT_MS 60000u
#define POPULATE_BYTES (8 * FK_MIB)
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

struct flexkv_agent {
    struct fk_wire_hello hello;
    char *address;
    uint64_t timeout_us;
    flexkv_region *regions;
    uint32_t n_regions;
    struct fk_team *team;
    const struct fk_copy_backend *backend;
    pthread_t thread;
    int stop_fd;
    _Atomic bool stop;

    pthread_mutex_t lock;
    pthread_cond_t changed;
    int state;
    char error[FK_WIRE_TEXT];
    uint64_t running;                   /* the operation that is being copied; 0: none */
    _Atomic bool *running_cancel;
    uint64_t revoked[REVOKED_KEPT];     /* a ring: the oldest is forgotten first */
    uint32_t n_revoked;

    /* of the connection; the thread's own */
    int fd, command_fd, report_fd;
    struct fk_msg_reader in;
    struct fk_wire_welcome w;
    char *pool;
    size_t pool_bytes, memory_bytes;
    void *memory;
    _Atomic bool *cancel;
    struct fk_ring commands, reports;
    uint32_t *lists;                    /* slots and pages of the job, out of the other's reach */
    uint32_t lists_cap;
    uint64_t populated;
};

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
    a->n_revoked = 0;
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

/* ---- jobs ---- */

static bool is_revoked(const flexkv_agent *a, uint64_t tag)
{
    for (uint32_t i = 0; i < fk_min(a->n_revoked, REVOKED_KEPT); i++)
        if (a->revoked[i] == tag)
            return true;
    return false;
}

/* From here until end_job a revoke waits for it. */
static bool begin_job(flexkv_agent *a, const struct fk_ring_job *job)
{
    pthread_mutex_lock(&a->lock);
    bool go = !is_revoked(a, job->tag);
    if (go) {
        a->running = job->tag;
        a->running_cancel = &a->cancel[job->job];
    }
    pthread_mutex_unlock(&a->lock);
    return go;
}

static void end_job(flexkv_agent *a)
{
    pthread_mutex_lock(&a->lock);
    a->running = 0;
    a->running_cancel = NULL;
    pthread_cond_broadcast(&a->changed);
    pthread_mutex_unlock(&a->lock);
}

/* Of workers with the same slice each stores its share; loading, each takes all. */
static uint32_t my_share(const flexkv_agent *a, const struct fk_ring_job *job, uint32_t *slots,
                         uint32_t *pages)
{
    uint32_t k = 0;

    if (job->to_engine || a->w.replicas == 1)
        return job->n;
    for (uint32_t i = a->w.replica; i < job->n; i += a->w.replicas) {
        slots[k] = slots[i];
        pages[k++] = pages[i];
    }
    return k;
}

/* How many leading blocks of the job are done when k of this worker's share are. */
static uint32_t leading(const flexkv_agent *a, const struct fk_ring_job *job, uint32_t k,
                        uint32_t share)
{
    if (k == share)
        return job->n;
    return job->to_engine || a->w.replicas == 1 ? k : a->w.replica + k * a->w.replicas;
}

static bool lists_ok(const flexkv_agent *a, const struct fk_ring_job *job, const uint32_t *slots,
                     const uint32_t *pages)
{
    for (uint32_t i = 0; i < job->n; i++)
        if (slots[i] >= a->w.n_slots || pages[i] >= a->hello.pages)
            return false;
    return true;
}

static uint32_t copy(flexkv_agent *a, const struct fk_ring_job *job, int *status)
{
    uint32_t *slots = a->lists, *pages = a->lists + job->n;
    struct fk_copy_target target = {
        .regions = a->regions, .n_regions = a->n_regions, .pool = a->pool,
        .slot_bytes = a->w.slot_bytes, .slice_offset = a->w.slice_offset,
    };

    if (!lists_ok(a, job, slots, pages)) {
        *status = -EFAULT;
        return 0;
    }
    uint32_t share = my_share(a, job, slots, pages);
    struct fk_copy_blocks blocks = { .slots = slots, .pages = pages, .n = share,
                                     .to_engine = job->to_engine };
    uint32_t ok = fk_team_copy(a->team, a->backend, &target, &blocks, &a->cancel[job->job], status);
    return leading(a, job, ok, share);
}

static int take_job(flexkv_agent *a, const void *payload, uint32_t bytes, struct fk_ring_job *job)
{
    if (bytes < sizeof(*job))
        return -EPROTO;
    memcpy(job, payload, sizeof(*job));
    if (job->job >= a->w.n_jobs || (bytes - sizeof(*job)) / 8 < job->n)
        return -EPROTO;
    if (job->n > a->lists_cap) {
        uint32_t *p = realloc(a->lists, 8ull * job->n);
        if (!p)
            return -ENOMEM;
        a->lists = p;
        a->lists_cap = job->n;
    }
    memcpy(a->lists, (const char *)payload + sizeof(*job), 8ull * job->n);
    return 0;
}

static int report(flexkv_agent *a, const struct fk_ring_report *r)
{
    struct fk_ring_report *rec = fk_ring_reserve(&a->reports, FK_RING_REPORT, sizeof(*rec));

    if (!rec)                           /* it has room for all jobs there can be */
        return -EPROTO;
    *rec = *r;
    fk_ring_commit(&a->reports);
    (void)!write(a->report_fd, &(uint64_t){ 1 }, sizeof(uint64_t));
    return 0;
}

static int do_job(flexkv_agent *a, const struct fk_ring_job *job)
{
    struct fk_ring_report r = { .job = job->job, .status = -ECANCELED };

    if (begin_job(a, job)) {
        uint64_t start = fk_clock_us();
        int status = 0;
        r.ok = copy(a, job, &status);
        r.status = status ? status : r.ok < job->n ? -ECANCELED : 0;
        r.us = (uint32_t)(fk_clock_us() - start);
        end_job(a);
    }
    return report(a, &r);
}

static bool node_gone(const flexkv_agent *a)
{
    struct pollfd p = { .fd = a->fd, .events = POLLIN };

    return poll(&p, 1, 0) > 0;          /* it has nothing more to say but its end */
}

static int do_jobs(flexkv_agent *a)
{
    struct fk_ring_job job;
    const void *payload;
    uint32_t type, bytes;
    int rc;

    while (!atomic_load(&a->stop) && !node_gone(a)) {
        rc = fk_ring_next(&a->commands, &type, &payload, &bytes);
        if (rc <= 0)
            return rc;
        if (type != FK_RING_JOB)
            return -EPROTO;
        rc = take_job(a, payload, bytes, &job);
        if (rc)
            return rc;
        fk_ring_pop(&a->commands);
        rc = do_job(a, &job);
        if (rc)
            return rc;
    }
    return -ECONNRESET;
}

/* While there is nothing to do: the node's memory is mapped page by page, so that copies need not. */
static bool populate(flexkv_agent *a)
{
    uint64_t n = fk_min(POPULATE_BYTES, a->pool_bytes - a->populated);

    if (!n || madvise(a->pool + a->populated, n, MADV_POPULATE_WRITE) < 0)
        return false;
    a->populated += n;
    return a->populated < a->pool_bytes;
}

static int serve(flexkv_agent *a)
{
    struct pollfd p[3] = { { .fd = a->command_fd, .events = POLLIN },
                           { .fd = a->fd, .events = POLLIN }, { .fd = a->stop_fd, .events = POLLIN } };
    bool more = true;
    uint64_t count;

    for (;;) {
        int rc = poll(p, 3, more ? 0 : -1);
        if (rc < 0 && errno != EINTR)
            return -errno;
        if (rc == 0) {
            more = populate(a);
            continue;
        }
        (void)!read(a->command_fd, &count, sizeof(count));
        rc = do_jobs(a);
        if (rc)
            return rc;
    }
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

static void *agent_main(void *arg)
{
    flexkv_agent *a = arg;
    int pause = RETRY_MIN_MS;
    uint64_t since = fk_clock_us();

    while (!atomic_load(&a->stop)) {
        int rc = connect_node(a);
        if (rc == 1) {
            begin_service(a);
            rc = serve(a);
            if (rc == -EPROTO)
                fk_error("worker %u: the node at %s sends nonsense", a->hello.worker, a->address);
            set_state(a, 0, NULL);
            pause = RETRY_MIN_MS;
            since = fk_clock_us();
        } else {
            note_absence(a, &since, rc);
        }
        disconnect(a);
        pause_ms(a, pause);
        pause = fk_min(pause * 2, RETRY_MAX_MS);
    }
    return NULL;
}

/* ---- the public calls ---- */

static void free_agent(flexkv_agent *a)
{
    fk_team_destroy(a->team);
    if (a->stop_fd >= 0)
        close(a->stop_fd);
    free(a->lists);
    free(a->regions);
    free(a->address);
    pthread_mutex_destroy(&a->lock);
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

static int fill_agent(flexkv_agent *a, const flexkv_agent_desc *d, const flexkv_region *regions,
                      size_t n)
{
    pthread_condattr_t mono;

    a->fd = a->command_fd = a->report_fd = -1;
    pthread_condattr_init(&mono);
    pthread_condattr_setclock(&mono, CLOCK_MONOTONIC);
    pthread_mutex_init(&a->lock, NULL);
    pthread_cond_init(&a->changed, &mono);
    pthread_condattr_destroy(&mono);
    a->timeout_us = (d->timeout_ms ? d->timeout_ms : TIMEOUT_MS) * 1000ull;
    a->n_regions = (uint32_t)n;
    a->backend = fk_copy_backend("host");
    a->address = strdup(d->address);
    a->regions = malloc(n * sizeof(*regions));
    a->stop_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (!a->address || !a->regions || a->stop_fd < 0 ||
        fk_team_create(fk_default_copy_threads(), &a->team))
        return fk_api_fail(-ENOMEM, "out of memory");
    memcpy(a->regions, regions, n * sizeof(*regions));
    return 0;
}

FLEXKV_API int flexkv_agent_create(const flexkv_agent_desc *d, const flexkv_region *regions,
                                   size_t n, flexkv_agent **out)
{
    if (d->struct_bytes < sizeof(*d) || !d->address)
        return fk_api_fail(-EINVAL, "flexkv_agent_desc: struct_bytes or address is not set");
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

static bool runs_one_of(const flexkv_agent *a, const uint64_t *ops, size_t n)
{
    for (size_t i = 0; a->running && i < n; i++)
        if (a->running == ops[i])
            return true;
    return false;
}

FLEXKV_API int flexkv_agent_revoke(flexkv_agent *a, const uint64_t *ops, size_t n, int timeout_ms)
{
    uint64_t end = fk_clock_us() + (uint64_t)fk_max(timeout_ms, 0) * 1000;
    struct timespec ts = { .tv_sec = (time_t)(end / 1000000),
                           .tv_nsec = (long)(end % 1000000) * 1000 };
    int rc = 0;

    pthread_mutex_lock(&a->lock);
    for (size_t i = 0; i < n; i++)
        a->revoked[a->n_revoked++ % REVOKED_KEPT] = ops[i];
    while (rc == 0 && runs_one_of(a, ops, n)) {
        atomic_store(a->running_cancel, true);
        if (pthread_cond_timedwait(&a->changed, &a->lock, &ts) == ETIMEDOUT)
            rc = runs_one_of(a, ops, n) ? -ETIMEDOUT : 0;
    }
    pthread_mutex_unlock(&a->lock);
    return rc ? fk_api_fail(rc, "a copy did not stop within %d ms", timeout_ms) : 0;
}

FLEXKV_API void flexkv_agent_close(flexkv_agent *a)
{
    if (!a)
        return;
    pthread_mutex_lock(&a->lock);
    if (a->running_cancel)
        atomic_store(a->running_cancel, true);
    pthread_mutex_unlock(&a->lock);
    atomic_store(&a->stop, true);
    (void)!write(a->stop_fd, &(uint64_t){ 1 }, sizeof(uint64_t));
    pthread_join(a->thread, NULL);
    free_agent(a);
}
