/*
 * agent_thread.c - the in-process agent: one thread that takes the core's copy jobs for all
 * ranks whose memory this process has registered, copies with the help of a team, and
 * reports. It holds the node's lock only to take a job and to report one.
 */
#include <stdio.h>

#include "api/node_impl.h"
#include "base/clock.h"

/* With the lock: a job of any space and rank. */
static struct fk_job *next_job(flexkv_node *node, flexkv_space **space, uint32_t *rank)
{
    for (flexkv_space *s = node->spaces; s; s = s->next) {
        for (uint32_t r = 0; r < s->ranks; r++) {
            struct fk_job *job = fk_core_take_job(node->core, s->id, r);
            if (job) {
                *space = s;
                *rank = r;
                return job;
            }
        }
    }
    return NULL;
}

static uint32_t copy_job(flexkv_node *node, flexkv_space *s, uint32_t rank, struct fk_job *job,
                         int *status)
{
    struct fk_copy_target target = {
        .regions = s->rank[rank].regions, .n_regions = s->rank[rank].n_regions,
        .pool = fk_pool_base(s->pool), .slot_bytes = s->slot_bytes,
        .slice_offset = rank * s->slice_bytes,
    };
    struct fk_copy_blocks blocks = { .slots = job->slots, .pages = job->pages, .n = job->n,
                                     .to_engine = job->to_engine };
    uint32_t ok = fk_team_copy(node->team, node->backend, &target, &blocks, &job->cancelled, status);

    atomic_fetch_add(job->to_engine ? &node->bytes_to_engine : &node->bytes_from_engine,
                     ok * s->slice_bytes);
    return ok;
}

static void *agent_main(void *arg)
{
    flexkv_node *node = arg;

    pthread_mutex_lock(&node->lock);
    for (;;) {
        flexkv_space *space;
        uint32_t rank;
        struct fk_job *job = next_job(node, &space, &rank);
        if (!job) {
            if (node->closing)
                break;
            pthread_cond_wait(&node->agent_wake, &node->lock);
            continue;
        }
        bool registered = space->rank[rank].regions != NULL;
        pthread_mutex_unlock(&node->lock);

        int status = registered ? 0 : -ENOTCONN;
        uint32_t ok = registered ? copy_job(node, space, rank, job, &status) : 0;

        pthread_mutex_lock(&node->lock);
        fk_core_job_done(node->core, job, ok, status ? status : -ECANCELED, fk_clock_us());
        pthread_cond_broadcast(&node->idle);
        fk_node_unlock(node);
        pthread_mutex_lock(&node->lock);
    }
    pthread_mutex_unlock(&node->lock);
    return NULL;
}

static unsigned default_threads(void)
{
    long cpus = sysconf(_SC_NPROCESSORS_ONLN);

    /* Two to four threads fill a memory bus; an engine needs the others. */
    return cpus >= 16 ? 4 : cpus >= 8 ? 2 : 1;
}

int fk_node_agent_start(flexkv_node *node)
{
    unsigned threads = node->set->copy_threads ? (unsigned)node->set->copy_threads
                                               : default_threads();

    node->backend = fk_copy_backend("host");
    int rc = fk_team_create(threads, &node->team);
    if (!rc && pthread_create(&node->agent_thread, NULL, agent_main, node))
        rc = -EAGAIN;
    if (rc)
        return fk_api_fail(rc, "cannot start the copy threads: %s", strerror(-rc));
    node->has_agent = true;
    return 0;
}

void fk_node_agent_stop(flexkv_node *node)
{
    if (node->has_agent)
        pthread_join(node->agent_thread, NULL);
    fk_team_destroy(node->team);
}
