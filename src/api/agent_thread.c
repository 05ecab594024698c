/*
 * agent_thread.c - the in-process agent: one thread that takes the core's copy jobs for all
 * workers whose memory the node's own process has registered, copies, and reports. It holds the node's lock only to take a job and to report one.
 */
#include <stdio.h>

#include "api/node_impl.h"
#include "base/clock.h"
#include "base/thread.h"

/* With the lock: a job of any worker in this process. */
static struct fk_job *next_job(struct fk_node *node, struct fk_instance **instance, uint32_t *worker)
{
    for (struct fk_instance *in = node->instances; in; in = in->next) {
        for (uint32_t w = 0; !in->remote && w < in->n_workers; w++) {
            struct fk_job *job = fk_core_take_job(node->core, in->id, w);
            if (job) {
                *instance = in;
                *worker = w;
                return job;
            }
        }
    }
    return NULL;
}

static uint32_t copy_job(struct fk_node *node, const struct fk_instance *in, uint32_t worker,
                         struct fk_job *job, int *status)
{
    struct fk_copy_blocks blocks = { .slots = job->slots, .pages = job->pages, .n = job->n,
                                     .to_engine = job->to_engine };
    uint32_t ok = fk_copier_copy(in->worker[worker].copier, &blocks, NULL, &job->cancelled, status);

    atomic_fetch_add(job->to_engine ? &node->bytes_to_engine : &node->bytes_from_engine,
                     ok * in->space->slice_bytes);
    return ok;
}

static void *agent_main(void *arg)
{
    struct fk_node *node = arg;

    fk_thread_stand_back();
    pthread_mutex_lock(&node->lock);
    for (;;) {
        struct fk_instance *in;
        uint32_t worker;
        struct fk_job *job = next_job(node, &in, &worker);
        if (!job) {
            if (node->closing)
                break;
            pthread_cond_wait(&node->agent_wake, &node->lock);
            continue;
        }
        bool registered = in->worker[worker].copier != NULL;
        pthread_mutex_unlock(&node->lock);

        int status = registered ? 0 : -ENOTCONN;
        uint64_t start = fk_clock_us();
        uint32_t ok = registered ? copy_job(node, in, worker, job, &status) : 0;
        uint64_t end = fk_clock_us();

        pthread_mutex_lock(&node->lock);
        if (job->to_engine)
            fk_rates_copied(in->space, ok, end - start, end);
        fk_core_job_done(node->core, job, ok, status ? status : -ECANCELED, end);
        pthread_cond_broadcast(&node->idle);
        fk_node_unlock(node);
        pthread_mutex_lock(&node->lock);
    }
    pthread_mutex_unlock(&node->lock);
    return NULL;
}

unsigned fk_default_copy_threads(void)
{
    long cpus = sysconf(_SC_NPROCESSORS_ONLN);

    /* Two to four threads fill a memory bus; an engine needs the others. */
    return cpus >= 16 ? 4 : cpus >= 8 ? 2 : 1;
}

unsigned fk_node_copy_threads(const struct fk_node *node)
{
    return node->set->copy_threads ? (unsigned)node->set->copy_threads : fk_default_copy_threads();
}

struct fk_copy_options fk_node_copy_options(const struct fk_node *node)
{
    const struct fk_settings *s = node->set;

    return (struct fk_copy_options){
        .pin_chunk_bytes = s->cudahost_chunk_bytes,
        .ctas = { (uint32_t)s->transfer_num_cta_d2h, (uint32_t)s->transfer_num_cta_h2d },
        .copy_engine = { s->use_ce_transfer_d2h, s->use_ce_transfer_h2d },
        .poll_layers = s->layerwise_notify_mode == FK_LAYERWISE_POLLING,
    };
}

int fk_node_agent_start(struct fk_node *node)
{
    if (pthread_create(&node->agent_thread, NULL, agent_main, node))
        return fk_api_fail(-EAGAIN, "cannot start the copy thread");
    node->has_agent = true;
    return 0;
}

void fk_node_agent_stop(struct fk_node *node)
{
    if (node->has_agent)
        pthread_join(node->agent_thread, NULL);
}
