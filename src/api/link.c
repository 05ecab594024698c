/* link.c - an agent of another process: its shared memory, the jobs it has, its reports. See peer.h;
 * the agent's side is agent.c. */
#include <fcntl.h>
#include <sys/eventfd.h>
#include <sys/mman.h>

#include "api/peer.h"
#include "base/clock.h"
#include "base/log.h"

#define REPORT_BYTES 65536u             /* far more than FK_AGENT_JOBS reports */
#define COMMAND_BYTES_MIN 65536u
#define COMMAND_BYTES_MAX (64u << 20)
#define WELCOME_TIMEOUT_US 200000u      /* an agent that just said hello has room in its socket */

/* ---- coming ---- */

static int check_hello(const struct fk_wire_hello *h)
{
    if (!memchr(h->space, 0, sizeof(h->space)) || !memchr(h->instance, 0, sizeof(h->instance)) ||
        !h->slice_bytes || h->slice_bytes > UINT32_MAX || !h->pages || h->pages > UINT32_MAX ||
        (h->replicas && h->replica >= h->replicas))
        return -EPROTO;
    return 0;
}

static bool same_place(const struct fk_link *l, const char *space, const char *instance,
                       uint32_t worker)
{
    return l->hello.worker == worker && !strcmp(l->hello.space, space) &&
           !strcmp(l->hello.instance, instance);
}

int fk_link_create(struct fk_peer *peer, const struct fk_wire_hello *hello)
{
    struct fk_node *node = peer->server->node;
    struct fk_link *l;
    int rc = check_hello(hello);

    if (rc)
        return fk_api_fail(rc, "the agent's description makes no sense");
    for (l = node->links; l; l = l->next)
        if (same_place(l, hello->space, hello->instance, hello->worker) && !l->peer->gone)
            return fk_api_fail(-EEXIST, "worker %u of instance \"%s\" (space %s) is process %d already; "
                               "each engine needs a name of its own (instance_id, engine_id)",
                               hello->worker, hello->instance, hello->space, (int)l->peer->pid);
    l = calloc(1, sizeof(*l));
    if (!l)
        return fk_api_fail(-ENOMEM, "out of memory");
    l->node = node;
    l->peer = peer;
    l->hello = *hello;
    l->memory_fd = l->command_fd = l->report_fd = -1;
    peer->link = l;
    pthread_mutex_lock(&node->lock);
    l->next = node->links;
    node->links = l;
    pthread_cond_broadcast(&node->idle);
    pthread_mutex_unlock(&node->lock);
    return 0;
}

struct fk_link *fk_link_waiting(const struct fk_node *node, const char *space, const char *instance,
                                uint32_t worker)
{
    struct fk_link *l = node->links;

    while (l && (l->in || l->peer->gone || !same_place(l, space, instance, worker)))
        l = l->next;
    return l;
}

uint64_t fk_link_slice_bytes(const struct fk_link *l)
{
    return l->hello.slice_bytes;
}

/* ---- attaching ---- */

/* Workers that share a slice are neighbours, as tensor-parallel ranks are. */
static void find_place(struct fk_wire_hello *h, const struct fk_instance *in)
{
    uint32_t share = in->n_workers / in->space->ranks;

    if (h->replicas)
        return;
    h->replicas = fk_max(share, 1u);
    h->slice = h->worker / h->replicas;
    h->replica = h->worker % h->replicas;
}

static int check_place(struct fk_link *l, const struct fk_instance *in)
{
    const struct fk_wire_hello *h = &l->hello;
    const struct fk_space *s = in->space;

    if (!in->remote)
        return fk_api_fail(-EINVAL, "instance \"%s\" of space %s has its workers in process %d itself",
                           in->name, s->name, (int)getpid());
    find_place(&l->hello, in);
    if (h->worker >= in->n_workers || h->slice >= s->ranks)
        return fk_api_fail(-EINVAL, "worker %u with slice %u: instance \"%s\" has %u workers, space %s "
                           "%u slices", h->worker, h->slice, in->name, in->n_workers, s->name,
                           s->ranks);
    if (h->slice_bytes > s->slice_bytes)
        return fk_api_fail(-EINVAL, "worker %u: its regions' pages add up to %llu bytes, a slice of "
                           "space %s has %llu", h->worker, (unsigned long long)h->slice_bytes,
                           s->name, (unsigned long long)s->slice_bytes);
    return 0;
}

/* The longest job is one block for each page. */
static uint32_t command_bytes(uint64_t pages)
{
    uint64_t want = 2 * (sizeof(struct fk_ring_job) + 64 + 8 * pages);
    uint32_t bytes = COMMAND_BYTES_MIN;

    while (bytes < want && bytes < COMMAND_BYTES_MAX)
        bytes *= 2;
    return bytes;
}

/* [ cancel flags | commands | reports ] */
static int make_memory(struct fk_link *l, uint32_t commands)
{
    size_t flags = fk_round_up(FK_AGENT_JOBS * sizeof(*l->cancel), 64);

    l->memory_bytes = flags + fk_ring_bytes(commands) + fk_ring_bytes(REPORT_BYTES);
    l->memory_fd = memfd_create("flexkv-agent", MFD_CLOEXEC);
    l->command_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    l->report_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (l->memory_fd < 0 || l->command_fd < 0 || l->report_fd < 0 ||
        ftruncate(l->memory_fd, (off_t)l->memory_bytes) < 0)
        return -errno;
    l->memory = mmap(NULL, l->memory_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, l->memory_fd, 0);
    if (l->memory == MAP_FAILED) {
        l->memory = NULL;
        return -errno;
    }
    l->cancel = l->memory;
    fk_ring_init(&l->commands, (char *)l->memory + flags, commands);
    fk_ring_init(&l->reports, (char *)l->memory + flags + fk_ring_bytes(commands), REPORT_BYTES);
    return 0;
}

/* An empty file without a name in each SSD directory, for an agent to try GPU direct storage with.
 * Fewer: a directory is full or gone; the agent says that it was not tried. */
static int make_direct_files(const struct fk_space *s, int *fds)
{
    const struct fk_string_list *dirs = &s->node->set->ssd_cache_dir;
    int n = 0;

    for (size_t i = 0; s->ssd && i < dirs->count && n < (int)FK_SSD_MAX_DIRS; i++) {
        int fd = open(dirs->item[i], O_TMPFILE | O_RDWR | O_DIRECT | O_CLOEXEC, 0600);
        if (fd < 0)
            fd = open(dirs->item[i], O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
        if (fd < 0)
            fk_warn("enable_gds: no file for a trial in %s: %s", dirs->item[i], strerror(errno));
        else
            fds[n++] = fd;
    }
    return n;
}

static int send_welcome(const struct fk_link *l, const struct fk_space *s)
{
    struct fk_copy_options how = fk_node_copy_options(l->node);
    struct fk_wire_welcome w = {
        .pool_bytes = s->pool_bytes, .slot_bytes = s->slot_bytes,
        .slice_offset = l->hello.slice * s->slice_bytes, .n_slots = s->cpu_slots,
        .n_jobs = FK_AGENT_JOBS, .command_bytes = l->commands.capacity,
        .report_bytes = l->reports.capacity, .replica = l->hello.replica,
        .replicas = l->hello.replicas,
        .sums_offset = s->sums_offset ? s->sums_offset + l->hello.slice * sizeof(uint64_t) : 0,
        .sums_stride = s->ranks, .pin_chunk_bytes = how.pin_chunk_bytes, .ctas = { how.ctas[0], how.ctas[1] },
        .copy_engine = { how.copy_engine[0], how.copy_engine[1] }, .poll_layers = how.poll_layers,
    };
    int fds[FK_MSG_FDS] = { fk_pool_fd(s->pool), l->memory_fd, l->command_fd, l->report_fd }, files = 0;
    struct iovec v = { &w, sizeof(w) };

    if (l->node->set->enable_gds) {
        files = make_direct_files(s, fds + 4);
        w.direct = 1 + (uint32_t)files;
    }
    int rc = fk_msg_send(l->peer->fd, FK_WIRE_WELCOME, &v, 1, fds, 4 + files,
                         fk_clock_us() + WELCOME_TIMEOUT_US);
    while (files > 0)
        close(fds[4 + --files]);
    return rc;
}

static void reports_ready(struct fk_watch *source)
{
    fk_link_read_reports(source->owner);
}

int fk_link_attach(struct fk_link *l, struct fk_instance *in)
{
    struct fk_worker *w = &in->worker[l->hello.worker];
    int rc = check_place(l, in);

    if (rc)
        return rc;
    rc = make_memory(l, command_bytes(l->hello.pages));
    if (!rc)
        rc = send_welcome(l, in->space);
    if (!rc) {
        l->report = (struct fk_watch){ reports_ready, l };
        rc = fk_server_watch(l->peer->server, l->report_fd, &l->report, false);
    }
    if (rc)
        return fk_api_fail(rc, "the agent's shared memory: %s", strerror(-rc));
    pthread_mutex_lock(&l->node->lock);
    *w = (struct fk_worker){ .link = l, .slice = l->hello.slice, .replica = l->hello.replica,
                             .replicas = l->hello.replicas };
    l->in = in;
    fk_worker_added(in, l->hello.worker, l->hello.pages);
    pthread_mutex_unlock(&l->node->lock);
    fk_info("space %s: worker %u of instance \"%s\" is process %d", in->space->name, l->hello.worker,
            in->name, (int)l->peer->pid);
    return 0;
}

/* ---- jobs, with the lock ---- */

static uint32_t free_job(const struct fk_link *l)
{
    for (uint32_t i = 0; i < FK_AGENT_JOBS; i++)
        if (!l->jobs[i])
            return i;
    return FK_NONE;
}

static bool send_job(struct fk_link *l, struct fk_job *job)
{
    uint32_t at = free_job(l);
    struct fk_ring_job *rec =
        at == FK_NONE ? NULL
        : fk_ring_reserve(&l->commands, FK_RING_JOB, (uint32_t)(sizeof(*rec) + 8ull * job->n));

    if (!rec)
        return false;
    *rec = (struct fk_ring_job){ .tag = job->tag, .job = at, .n = job->n,
                                 .to_engine = job->to_engine, .layerwise = job->layerwise,
                                 .counter = job->counter };
    uint32_t *lists = (uint32_t *)(rec + 1);
    memcpy(lists, job->slots, job->n * sizeof(uint32_t));
    memcpy(lists + job->n, job->pages, job->n * sizeof(uint32_t));
    atomic_store(&l->cancel[at], atomic_load(&job->cancelled));
    l->jobs[at] = job;
    l->n_jobs++;
    fk_ring_commit(&l->commands);
    return true;
}

static void push(struct fk_link *l)
{
    bool sent = false;

    while (!l->broken) {
        if (!l->held)
            l->held = fk_core_take_job(l->node->core, l->in->id, l->hello.worker);
        if (!l->held || !send_job(l, l->held))
            break;
        l->held = NULL;
        sent = true;
    }
    if (sent)
        (void)!write(l->command_fd, &(uint64_t){ 1 }, sizeof(uint64_t));
}

bool fk_links_push(struct fk_node *node)
{
    bool local = false;

    for (struct fk_link *l = node->links; l; l = l->next)
        if (l->in)
            push(l);
    for (const struct fk_instance *in = node->instances; in && !local; in = in->next)
        local = !in->remote;
    return local;
}

void fk_links_cancel(struct fk_node *node)
{
    for (struct fk_link *l = node->links; l; l = l->next)
        for (uint32_t i = 0; l->n_jobs && i < FK_AGENT_JOBS; i++)
            if (l->jobs[i] && atomic_load(&l->jobs[i]->cancelled))
                atomic_store(&l->cancel[i], true);
}

/* What was read for a put counts only if its pages were still the put's: once the operation has ended
 * for the engine, it writes to them again. A client that gives the node up takes its operations for
 * ended too, and closes its connection first. */
static bool pages_were_kept(const struct fk_link *l, const struct fk_job *job)
{
    return !atomic_load(&job->cancelled) && fk_server_is_there(l->node, l->in->owner);
}

static int take_report(struct fk_link *l, const struct fk_ring_report *r)
{
    struct fk_job *job = r->job < FK_AGENT_JOBS ? l->jobs[r->job] : NULL;

    if (!job || r->ok > job->n || r->status > 0)
        return -EPROTO;
    uint32_t ok = job->to_engine || pages_were_kept(l, job) ? r->ok : 0;
    l->jobs[r->job] = NULL;
    l->n_jobs--;
    atomic_fetch_add(job->to_engine ? &l->node->bytes_to_engine : &l->node->bytes_from_engine,
                     r->ok * l->hello.slice_bytes / (job->to_engine ? 1 : l->hello.replicas));
    if (job->to_engine)
        fk_rates_copied(l->in->space, r->ok, r->us);
    fk_core_job_done(l->node->core, job, ok, r->status ? r->status : -ECANCELED, fk_clock_us());
    return 0;
}

/* With the lock. */
static void read_reports(struct fk_link *l)
{
    struct fk_ring_report report;
    const void *payload;
    uint32_t type, bytes;
    int rc = 0;

    while (!l->broken && (rc = fk_ring_next(&l->reports, &type, &payload, &bytes)) == 1) {
        if (type != FK_RING_REPORT || bytes < sizeof(report)) {
            rc = -EPROTO;
            break;
        }
        memcpy(&report, payload, sizeof(report));
        fk_ring_pop(&l->reports);
        rc = take_report(l, &report);
        if (rc)
            break;
    }
    if (rc < 0 && !l->broken) {
        /* Its slots stay taken until the process is gone. */
        fk_error("worker %u of instance \"%s\" (process %d) reports nonsense; it is not used any more",
                 l->hello.worker, l->in->name, (int)l->peer->pid);
        l->broken = true;
        fk_worker_removed(l->in, l->hello.worker);
    }
    if (l->held)
        push(l);
}

void fk_link_read_reports(struct fk_link *l)
{
    uint64_t count;

    (void)!read(l->report_fd, &count, sizeof(count));
    pthread_mutex_lock(&l->node->lock);
    read_reports(l);
    pthread_cond_broadcast(&l->node->idle);
    fk_node_unlock(l->node);
}

bool fk_links_read(struct fk_node *node)
{
    bool any = false;

    for (struct fk_link *l = node->links; l; l = l->next) {
        if (!l->in || !l->n_jobs)
            continue;
        read_reports(l);
        any |= l->n_jobs && !l->broken;
    }
    return any;
}

/* ---- going ---- */

/* What the agent had or was about to get has failed. */
static void end_jobs(struct fk_link *l)
{
    struct fk_core *core = l->node->core;
    uint64_t now = fk_clock_us();

    for (uint32_t i = 0; i < FK_AGENT_JOBS; i++)
        if (l->jobs[i])
            fk_core_job_done(core, l->jobs[i], 0, -ENOTCONN, now);
    if (l->held)
        fk_core_job_done(core, l->held, 0, -ENOTCONN, now);
    for (struct fk_job *job; (job = fk_core_take_job(core, l->in->id, l->hello.worker));)
        fk_core_job_done(core, job, 0, -ENOTCONN, now);
}

static void unlink_link(struct fk_link *l)
{
    struct fk_link **at = &l->node->links;

    while (*at != l)
        at = &(*at)->next;
    *at = l->next;
}

void fk_link_destroy(struct fk_link *l)
{
    struct fk_node *node = l->node;

    if (l->in)
        fk_link_read_reports(l);        /* what it had finished, it has finished */
    if (l->report_fd >= 0)
        fk_server_unwatch(l->peer->server, l->report_fd);
    pthread_mutex_lock(&node->lock);
    unlink_link(l);
    if (l->in) {
        if (!l->broken)
            fk_worker_removed(l->in, l->hello.worker);
        end_jobs(l);
        l->in->worker[l->hello.worker] = (struct fk_worker){ 0 };
        fk_info("space %s: worker %u of instance \"%s\" (process %d) has left", l->in->space->name,
                l->hello.worker, l->in->name, (int)l->peer->pid);
    }
    pthread_cond_broadcast(&node->idle);
    fk_node_unlock(node);
    if (l->memory)
        munmap(l->memory, l->memory_bytes);
    if (l->memory_fd >= 0)
        close(l->memory_fd);
    if (l->command_fd >= 0)
        close(l->command_fd);
    if (l->report_fd >= 0)
        close(l->report_fd);
    free(l);
}
