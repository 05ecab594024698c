/* link.c - an agent of another process: its shared memory, the jobs it has, its reports. See peer.h;
 * the agent's side is agent.c. */
#include <fcntl.h>
#include <sys/eventfd.h>
#include <sys/mman.h>

#include "api/peer.h"
#include "base/checksum.h"
#include "base/clock.h"
#include "base/log.h"
#include "tier/ssd_format.h"

#define REPORT_BYTES 262144u            /* far more than FK_AGENT_JOBS reports */
#define COMMAND_BYTES_MIN 65536u
#define BAD_READS 8u
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

/* A file in each SSD directory for an agent to try GPU direct storage with, until it has told what came of it. It has
 * a name, as cuFile opens files again by their names. */
static const char *trial_path(const struct fk_link *l, const struct fk_space *s, size_t dir, uint32_t instance,
                              char *buf, size_t bytes)
{
    snprintf(buf, bytes, "%s/%s.gds-%u-%u", s->node->set->ssd_cache_dir.item[dir], s->name, instance,
             l->hello.worker);
    return buf;
}

static void remove_direct_files(struct fk_link *l)
{
    char path[4200];

    for (; l->n_trials; l->n_trials--)
        (void)unlink(trial_path(l, l->trial_space, l->n_trials - 1, l->trial_instance, path, sizeof(path)));
}

/* Fewer: a directory is full or gone; the agent says that it was not tried. */
static uint32_t make_direct_files(struct fk_link *l, const struct fk_instance *in, int *fds)
{
    const struct fk_string_list *dirs = &l->node->set->ssd_cache_dir;
    char path[4200];

    l->trial_space = in->space;
    l->trial_instance = in->id;
    for (l->n_trials = 0; l->n_trials < fk_min(dirs->count, (size_t)FK_SSD_MAX_DIRS); l->n_trials++) {
        int flags = O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC;
        trial_path(l, in->space, l->n_trials, in->id, path, sizeof(path));
        int fd = open(path, flags | O_DIRECT, 0600);
        if (fd < 0)
            fd = open(path, flags, 0600);
        if (fd < 0) {
            fk_warn("enable_gds: no file for a trial: %s: %s", path, strerror(errno));
            break;
        }
        fds[l->n_trials] = fd;
    }
    return l->n_trials;
}

/* Reads go from a file to pages, in whole sectors: why the space's slices can't be read so; NULL: they can. */
static const char *why_not_direct(const struct fk_link *l, const struct fk_space *s)
{
    if (!s->ssd)
        return "there is no SSD tier (ssd_cache_gb)";
    if (!l->node->set->ssd_direct_io)
        return "ssd_direct_io is 0";
    if (l->hello.slice_bytes != s->slice_bytes)
        return "the workers' slices of a block differ in size";
    if (s->ranks > 1 && s->slice_bytes % FK_SSD_ALIGN)
        return "the workers' slices of a block are no multiples of 4 KiB";
    return NULL;
}

static int open_data_files(const struct fk_space *s, int *fds)
{
    uint32_t n = fk_ssd_geometry(s->ssd)->n_dirs;

    for (uint32_t i = 0; i < n; i++) {
        fds[i] = open(fk_ssd_data_path(s->ssd, i), O_RDONLY | O_DIRECT | O_CLOEXEC);
        if (fds[i] >= 0)
            continue;
        fk_warn("enable_gds: %s: %s", fk_ssd_data_path(s->ssd, i), strerror(errno));
        while (i > 0)
            close(fds[--i]);
        return 0;
    }
    return (int)n;
}

/* Returns how many descriptors go with it. */
static int offer_direct(struct fk_link *l, const struct fk_instance *in, struct fk_wire_welcome *w, int *fds)
{
    const struct fk_space *s = in->space;
    const char *why = why_not_direct(l, s);

    if (!l->node->set->enable_gds)
        return 0;
    if (why) {
        fk_warn("space %s, worker %u: no GPU direct storage (enable_gds): %s", s->name, l->hello.worker, why);
        return 0;
    }
    int trial = (int)make_direct_files(l, in, fds), data = open_data_files(s, fds + trial);
    const struct ssd_geometry *g = fk_ssd_geometry(s->ssd);
    w->direct = 1 + (uint32_t)trial;
    w->ssd_dirs = (uint32_t)data;
    w->ssd_slot_bytes = g->slot_bytes;
    w->ssd_slots = g->n_slots;
    w->ssd_stripe_slots = g->stripe_slots;
    l->crc_after = fk_crc_power((s->ranks - 1 - l->hello.slice) * s->slice_bytes);
    return trial + data;
}

static int send_welcome(struct fk_link *l, const struct fk_instance *in)
{
    const struct fk_space *s = in->space;
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

    files = offer_direct(l, in, &w, fds + 4);
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
        rc = send_welcome(l, in);
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
                                 .counter = job->counter, .from_ssd = job->from_ssd, .early = job->early };
    uint32_t *lists = (uint32_t *)(rec + 1);
    memcpy(lists, job->slots, job->n * sizeof(uint32_t));
    memcpy(lists + job->n, job->pages, job->n * sizeof(uint32_t));
    atomic_store(&l->cancel[at], atomic_load(&job->cancelled));
    l->jobs[at] = job;
    l->may_say[at] = job->early;
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

/* The block's residue out of those of its slices; false: a worker is gone, or two of the same slice differ. */
static bool block_residue(const struct fk_instance *in, const struct fk_job *job, uint32_t block, uint64_t *out)
{
    *out = 0;
    for (uint32_t w = 0; w < in->n_workers; w++) {
        uint64_t r = job->residues[(uint64_t)w * job->n + block];
        uint32_t same = 0;
        if (!in->worker[w].link)
            return false;
        while (in->worker[same].slice != in->worker[w].slice)
            same++;
        if (same == w)
            *out ^= fk_crc_times(r, in->worker[w].link->crc_after);
        else if (job->residues[(uint64_t)same * job->n + block] != r)
            return false;
    }
    return true;
}

/* All workers have read: how many leading blocks are what was stored. */
static uint32_t sound_blocks(const struct fk_link *l, const struct fk_job *job)
{
    const struct fk_space *s = l->in->space;
    uint64_t power = fk_crc_power(s->ranks * s->slice_bytes), residue;

    for (uint32_t i = 0; i < job->n; i++) {
        uint64_t want = fk_ssd_checksum(s->ssd, job->slots[i]);
        if (!want || !block_residue(l->in, job, i, &residue) ||
            fk_block_checksum_of(job->keys[i], residue, power) != want)
            return i;
    }
    return job->n;
}

/* It costs time, and would go on doing so: after some in a row all goes through the cpu tier again. */
static void note_bad_read(struct fk_instance *in, int status)
{
    if (++in->bad_reads == 1)
        fk_warn("space %s: blocks on SSD were not read, or read wrong, by GPU direct storage (%s); they are read "
                "through the CPU tier", in->space->name, strerror(-status));
    if (in->bad_reads < BAD_READS)
        return;
    fk_error("space %s: GPU direct storage has failed %u times in a row: instance \"%s\" does without it",
             in->space->name, in->bad_reads, in->name);
    fk_core_instance_direct(in->space->node->core, in->id, false);
}

static void direct_done(struct fk_link *l, struct fk_job *job, const struct fk_ring_report *r,
                        const uint64_t *residues)
{
    bool last = fk_core_job_left(job) == 1;
    uint32_t ok = r->ok, n = job->n, sound = n;
    int status = r->status ? r->status : -ECANCELED;

    memcpy(job->residues + (uint64_t)l->hello.worker * n, residues, n * sizeof(*residues));
    fk_rates_read_direct(l->in->space, r->ok, r->us, fk_clock_us());
    if (last)
        sound = sound_blocks(l, job);
    if (sound < ok) {                   /* or another worker has read less than this one */
        ok = sound;
        status = -EBADMSG;
    }
    if (ok < n && status != -ECANCELED)
        note_bad_read(l->in, status);
    else if (last && ok == n)
        l->in->bad_reads = 0;
    fk_core_job_done(l->node->core, job, ok, status, fk_clock_us());
}

/* With the lock: gets may count on it when all workers can. */
static void note_direct(struct fk_link *l)
{
    struct fk_instance *in = l->in;
    bool all = true;

    l->direct = true;
    for (uint32_t w = 0; w < in->n_workers; w++)
        all &= in->worker[w].link && in->worker[w].link->direct && !in->worker[w].leaving;
    fk_core_instance_direct(l->node->core, in->id, all);
    if (all)
        fk_info("space %s: blocks on SSD go to the GPUs of instance \"%s\" by GPU direct storage",
                in->space->name, in->name);
}

static int take_report(struct fk_link *l, const struct fk_ring_report *r, const void *more, uint32_t bytes)
{
    struct fk_job *job = r->job < FK_AGENT_JOBS ? l->jobs[r->job] : NULL;

    if (!job || r->ok > job->n || r->status > 0 || (job->from_ssd && bytes < 8ull * job->n))
        return -EPROTO;
    uint32_t ok = job->to_engine || pages_were_kept(l, job) ? r->ok : 0;
    l->jobs[r->job] = NULL;
    l->n_jobs--;
    atomic_fetch_add(job->to_engine ? &l->node->bytes_to_engine : &l->node->bytes_from_engine,
                     r->ok * l->hello.slice_bytes / (job->to_engine ? 1 : l->hello.replicas));
    if (job->from_ssd) {
        direct_done(l, job, r, more);
        return 0;
    }
    if (job->to_engine)
        fk_rates_copied(l->in->space, r->ok, r->us, fk_clock_us());
    fk_core_job_done(l->node->core, job, ok, r->status ? r->status : -ECANCELED, fk_clock_us());
    return 0;
}

static int take_on_its_way(struct fk_link *l, uint64_t job)
{
    if (job >= FK_AGENT_JOBS || !l->jobs[job] || !l->may_say[job])
        return -EPROTO;
    l->may_say[job] = false;
    fk_core_job_on_its_way(l->node->core, l->jobs[job]);
    return 0;
}

static void take_direct(struct fk_link *l, bool works)
{
    remove_direct_files(l);
    if (works)
        note_direct(l);
}

static int take_record(struct fk_link *l, uint32_t type, const void *payload, uint32_t bytes)
{
    struct fk_ring_report report;
    uint64_t number;

    if (type == FK_RING_REPORT && bytes >= sizeof(report)) {
        memcpy(&report, payload, sizeof(report));
        return take_report(l, &report, (const char *)payload + sizeof(report), bytes - (uint32_t)sizeof(report));
    }
    if ((type != FK_RING_ON_ITS_WAY && type != FK_RING_DIRECT) || bytes < sizeof(number))
        return -EPROTO;
    memcpy(&number, payload, sizeof(number));
    if (type == FK_RING_ON_ITS_WAY)
        return take_on_its_way(l, number);
    take_direct(l, number);
    return 0;
}

/* With the lock. */
static void read_reports(struct fk_link *l)
{
    const void *payload;
    uint32_t type, bytes;
    int rc = 0;

    while (!l->broken && (rc = fk_ring_next(&l->reports, &type, &payload, &bytes)) == 1) {
        rc = take_record(l, type, payload, bytes);
        fk_ring_pop(&l->reports);
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
    remove_direct_files(l);
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
