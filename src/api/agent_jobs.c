/*
 * agent_jobs.c - a connected agent at work: jobs out of the command ring, copies, reports. See
 * agent_impl.h.
 *
 *   ring -> queue[lane] -> a hand copies -> report
 *
 * Whichever hand is free takes from the ring what there is and copies the oldest job of a lane that
 * nobody copies for: jobs of one direction stay in order, the directions don't wait for each other.
 */
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>

#include "api/agent_impl.h"
#include "base/clock.h"

#define POPULATE_BYTES (8 * FK_MIB)
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

/* A record of one number. The ring has room for all jobs there can be, and this is no loss. */
static void tell_node(flexkv_agent *a, enum fk_ring_record type, uint64_t number)
{
    pthread_mutex_lock(&a->jobs_lock);
    uint64_t *rec = fk_ring_reserve(&a->reports, type, sizeof(*rec));
    if (rec) {
        *rec = number;
        fk_ring_commit(&a->reports);
    }
    pthread_mutex_unlock(&a->jobs_lock);
    (void)!write(a->report_fd, &(uint64_t){ 1 }, sizeof(uint64_t));
}

void fk_agent_tell_direct(flexkv_agent *a)
{
    tell_node(a, FK_RING_DIRECT, a->direct);
}

/* ---- what other threads may ask ---- */

static bool is_revoked(const flexkv_agent *a, uint64_t tag)
{
    for (uint32_t i = 0; i < fk_min(a->n_revoked, FK_AGENT_REVOKED); i++)
        if (a->revoked[i] == tag)
            return true;
    return false;
}

static struct fk_agent_layered *new_layered(flexkv_agent *a, const struct fk_ring_job *job)
{
    struct fk_agent_layered *y = &a->layered[a->n_layered++ % FK_AGENT_LAYERED];

    y->tag = job->tag;
    y->layers = y->counted = 0;
    y->counter = a->counters ? job->counter : 0;
    y->ended = false;
    y->status = 0;
    return y;
}

/* From here until end_job a revoke waits for it. */
static bool begin_job(flexkv_agent *a, const struct fk_ring_job *job, unsigned lane,
                      struct fk_agent_layered **layered)
{
    pthread_mutex_lock(&a->lock);
    bool go = !is_revoked(a, job->tag);
    if (go) {
        a->running[lane] = job->tag;
        a->running_cancel[lane] = &a->cancel[job->job];
    }
    *layered = job->layerwise ? new_layered(a, job) : NULL;
    pthread_mutex_unlock(&a->lock);
    return go;
}

static void end_job(flexkv_agent *a, unsigned lane, struct fk_agent_layered *layered, int status)
{
    pthread_mutex_lock(&a->lock);
    a->running[lane] = 0;
    a->running_cancel[lane] = NULL;
    if (layered) {
        layered->ended = true;
        layered->status = status;
    }
    bool broken = layered && layered->counter && layered->counted < a->n_layers;
    pthread_cond_broadcast(&a->changed);
    pthread_mutex_unlock(&a->lock);
    if (broken)
        fk_layers_fail(a->counters);
}

void fk_agent_cancel_running(flexkv_agent *a)
{
    pthread_mutex_lock(&a->lock);
    for (int lane = 0; lane < FK_AGENT_LANES; lane++)
        if (a->running_cancel[lane])
            atomic_store(a->running_cancel[lane], true);
    pthread_mutex_unlock(&a->lock);
}

struct telling { flexkv_agent *a; struct fk_agent_layered *layered; const struct fk_ring_job *job; };

static void tell_layers(void *arg, uint32_t regions, void *event)
{
    struct telling *t = arg;
    struct fk_agent_layered *y = t->layered;

    pthread_mutex_lock(&t->a->lock);
    while (y->layers < t->a->n_layers && t->a->layer_ends[y->layers] <= regions)
        y->events[y->layers++] = event;
    pthread_cond_broadcast(&t->a->changed);
    pthread_mutex_unlock(&t->a->lock);
}

/* The job is the only one that touches `counted`, and has not ended. */
static void count_layers(void *arg, uint32_t regions)
{
    struct telling *t = arg;
    struct fk_agent_layered *y = t->layered;
    uint32_t from = y->counted, to = from;

    while (to < t->a->n_layers && t->a->layer_ends[to] <= regions)
        to++;
    fk_layers_signal(t->a->counters, y->counter - 1, from, to);
    y->counted = to;
}

/* What its engine may do with the pages from now on, it does after the event. */
static void tell_on_its_way(void *arg, void *event)
{
    struct telling *t = arg;
    flexkv_agent *a = t->a;

    pthread_mutex_lock(&a->lock);
    a->early[a->n_early++ % FK_AGENT_EARLY] = (struct fk_agent_early){ t->job->tag, event };
    pthread_mutex_unlock(&a->lock);
    tell_node(a, FK_RING_ON_ITS_WAY, t->job->job);
}

/* ---- a job ---- */

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
    uint32_t n_slots = job->from_ssd ? a->w.ssd_slots : a->w.n_slots;

    for (uint32_t i = 0; i < job->n; i++)
        if (slots[i] >= n_slots || pages[i] >= a->hello.pages)
            return false;
    return true;
}

static uint32_t copy(flexkv_agent *a, struct fk_agent_job *j, struct fk_agent_layered *layered,
                     int *status)
{
    uint32_t *slots = j->lists, *pages = j->lists + j->job.n;
    struct telling telling = { a, layered, &j->job };
    struct fk_copy_progress progress = { .layers = layered ? tell_layers : NULL, .arg = &telling,
                                         .placed = layered && layered->counter ? count_layers : NULL,
                                         .on_its_way = j->job.early ? tell_on_its_way : NULL,
                                         .layer_ends = a->layer_ends, .n_layers = a->n_layers };

    if (!lists_ok(a, &j->job, slots, pages)) {
        *status = -EFAULT;
        return 0;
    }
    uint32_t share = my_share(a, &j->job, slots, pages);
    struct fk_copy_blocks blocks = { .slots = slots, .pages = pages, .n = share,
                                     .to_engine = j->job.to_engine };
    uint32_t ok = fk_copier_copy(a->copier, &blocks, (layered || j->job.early) && share ? &progress : NULL,
                                 &a->cancel[j->job.job], status);
    return leading(a, &j->job, ok, share);
}

/* From the files that have them, into the pages. */
static uint32_t read_files(flexkv_agent *a, const struct fk_agent_job *j, uint64_t *residues, int *status)
{
    const struct ssd_geometry g = { .slot_bytes = a->w.ssd_slot_bytes, .n_slots = a->w.ssd_slots,
                                    .stripe_slots = a->w.ssd_stripe_slots, .n_dirs = a->w.ssd_dirs };
    const uint32_t *slots = j->lists, *pages = j->lists + j->job.n;
    struct fk_copy_place *places = malloc(j->job.n * sizeof(*places));
    uint32_t ok = 0;

    if (!places)
        *status = -ENOMEM;
    else if (!a->direct || !lists_ok(a, &j->job, slots, pages))
        *status = -EFAULT;
    for (uint32_t i = 0; !*status && i < j->job.n; i++)
        places[i] = (struct fk_copy_place){
            .offset = ssd_data_offset(&g, ssd_geometry_local(&g, slots[i])) + a->w.slice_offset,
            .file = ssd_geometry_dir(&g, slots[i]), .page = pages[i] };
    if (!*status)
        ok = fk_copier_read_files(a->copier, places, j->job.n, residues, &a->cancel[j->job.job], status);
    free(places);
    return ok;
}

/* With n residues behind it. */
static int report(flexkv_agent *a, const struct fk_ring_report *r, const uint64_t *residues, uint32_t n)
{
    pthread_mutex_lock(&a->jobs_lock);
    struct fk_ring_report *rec = fk_ring_reserve(&a->reports, FK_RING_REPORT,
                                                 (uint32_t)(sizeof(*rec) + n * sizeof(*residues)));
    if (rec) {
        *rec = *r;
        if (n)
            memcpy(rec + 1, residues, n * sizeof(*residues));
        fk_ring_commit(&a->reports);
    }
    pthread_mutex_unlock(&a->jobs_lock);
    if (!rec)                           /* it has room for all jobs there can be */
        return -EPROTO;
    (void)!write(a->report_fd, &(uint64_t){ 1 }, sizeof(uint64_t));
    return 0;
}

static int do_job(flexkv_agent *a, struct fk_agent_job *j, unsigned lane)
{
    struct fk_ring_report r = { .job = j->job.job, .status = -ECANCELED };
    struct fk_agent_layered *layered;
    bool go = begin_job(a, &j->job, lane, &layered);
    uint32_t n = j->job.from_ssd ? j->job.n : 0;
    uint64_t *residues = calloc(fk_max(n, 1u), sizeof(*residues));

    if (go) {
        uint64_t start = fk_clock_us();
        int status = 0;
        if (!residues)
            status = -ENOMEM;
        else
            r.ok = n ? read_files(a, j, residues, &status) : copy(a, j, layered, &status);
        r.status = status ? status : r.ok < j->job.n || !j->job.n ? -ECANCELED : 0;
        r.us = (uint32_t)(fk_clock_us() - start);
    }
    end_job(a, lane, layered, r.status);
    int rc = residues ? report(a, &r, residues, n) : -ENOMEM;
    free(residues);
    return rc;
}

/* ---- the ring and the queues ---- */

static unsigned lane_of(const flexkv_agent *a, const struct fk_ring_job *job)
{
    if (job->from_ssd)
        return 2;
    return a->copier->ops->lanes > 1 && job->to_engine ? 1 : 0;
}

/* With jobs_lock: 1: a job more in the queues, 0: the ring is empty. */
static int read_command(flexkv_agent *a)
{
    const void *payload;
    uint32_t type, bytes;
    struct fk_ring_job head;
    int rc = fk_ring_next(&a->commands, &type, &payload, &bytes);

    if (rc <= 0)
        return rc;
    if (type != FK_RING_JOB || bytes < sizeof(head))
        return -EPROTO;
    memcpy(&head, payload, sizeof(head));
    if (head.job >= a->w.n_jobs || (bytes - sizeof(head)) / 8 < head.n)
        return -EPROTO;
    struct fk_agent_job *j = malloc(sizeof(*j) + 8ull * head.n);
    if (!j)
        return -ENOMEM;
    j->next = NULL;
    j->job = head;
    memcpy(j->lists, (const char *)payload + sizeof(head), 8ull * head.n);
    fk_ring_pop(&a->commands);
    unsigned lane = lane_of(a, &head);
    *a->queue_end[lane] = j;
    a->queue_end[lane] = &j->next;
    return 1;
}

static struct fk_agent_job *take_queued(flexkv_agent *a, unsigned *lane)
{
    for (unsigned i = 0; i < FK_AGENT_LANES; i++) {
        struct fk_agent_job *j = a->queue[i];
        if (!j || a->busy[i])
            continue;
        a->queue[i] = j->next;
        if (!j->next)
            a->queue_end[i] = &a->queue[i];
        a->busy[i] = true;
        *lane = i;
        return j;
    }
    return NULL;
}

static int next_job(flexkv_agent *a, struct fk_agent_job **job, unsigned *lane)
{
    int rc = 1;

    pthread_mutex_lock(&a->jobs_lock);
    while (!(*job = take_queued(a, lane)) && rc == 1)
        rc = read_command(a);
    pthread_mutex_unlock(&a->jobs_lock);
    return fk_min(rc, 0);
}

static void lane_free(flexkv_agent *a, unsigned lane)
{
    pthread_mutex_lock(&a->jobs_lock);
    a->busy[lane] = false;
    pthread_mutex_unlock(&a->jobs_lock);
}

static bool has_come(int fd)
{
    struct pollfd p = { .fd = fd, .events = POLLIN };

    return poll(&p, 1, 0) > 0;
}

/* until: what makes the hand stop. 0: nothing left that it could do. */
static int do_jobs(flexkv_agent *a, int until)
{
    struct fk_agent_job *job;
    unsigned lane;

    for (;;) {
        if (atomic_load(&a->stop) || has_come(until))
            return -ECONNRESET;
        int rc = next_job(a, &job, &lane);
        if (rc || !job)
            return rc;
        rc = do_job(a, job, lane);
        lane_free(a, lane);
        free(job);
        if (rc)
            return rc;
    }
}

/* ---- hands ---- */

static void *other_hand(void *arg)
{
    flexkv_agent *a = arg;
    struct pollfd p[2] = { { .fd = a->command_fd, .events = POLLIN },
                           { .fd = a->hand_fd, .events = POLLIN } };
    uint64_t count;

    while (do_jobs(a, a->hand_fd) == 0) {
        if (poll(p, 2, -1) < 0 && errno != EINTR)
            break;
        (void)!read(a->command_fd, &count, sizeof(count));
    }
    return NULL;
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

static int first_hand(flexkv_agent *a)
{
    struct pollfd p[3] = { { .fd = a->command_fd, .events = POLLIN },
                           { .fd = a->fd, .events = POLLIN }, { .fd = a->stop_fd, .events = POLLIN } };
    bool more = a->copier->ops->lanes == 1;     /* what a device's copier pins it also populates */
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
        rc = do_jobs(a, a->fd);         /* the node has nothing more to say but its end */
        if (rc)
            return rc;
    }
}

static void stop_other_hands(flexkv_agent *a, const pthread_t *threads, unsigned n)
{
    uint64_t count;

    fk_agent_cancel_running(a);         /* nobody wants the rest of their copies */
    (void)!write(a->hand_fd, &(uint64_t){ 1 }, sizeof(uint64_t));
    while (n > 0)
        pthread_join(threads[--n], NULL);
    (void)!read(a->hand_fd, &count, sizeof(count));
}

static void begin_queues(flexkv_agent *a)
{
    for (int i = 0; i < FK_AGENT_LANES; i++) {
        a->queue[i] = NULL;
        a->queue_end[i] = &a->queue[i];
        a->busy[i] = false;
    }
}

/* Nobody does these jobs any more; an engine may wait for their layers. */
static void end_queues(flexkv_agent *a)
{
    bool counted = false;

    while (read_command(a) == 1)
        ;
    for (int i = 0; i < FK_AGENT_LANES; i++) {
        for (struct fk_agent_job *j = a->queue[i], *next; j; j = next) {
            next = j->next;
            counted |= j->job.counter != 0;
            free(j);
        }
    }
    begin_queues(a);
    if (counted && a->counters)
        fk_layers_fail(a->counters);
}

int fk_agent_serve(flexkv_agent *a)
{
    pthread_t others[FK_AGENT_LANES];
    unsigned want = (a->copier->ops->lanes > 1) + a->direct, n = 0;

    begin_queues(a);
    while (n < want && pthread_create(&others[n], NULL, other_hand, a) == 0)
        n++;                            /* fewer: one after the other */
    int rc = first_hand(a);
    if (n)
        stop_other_hands(a, others, n);
    end_queues(a);
    return rc;
}
