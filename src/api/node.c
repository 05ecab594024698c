/* node.c - opening and closing a node, and what every call ends with: telling whom the core's
 * queues concern. */
#include <fcntl.h>
#include <stdio.h>
#include <sys/eventfd.h>

#include "api/config_impl.h"
#include "api/node_impl.h"
#include "base/clock.h"

#define CANCEL_GRACE_US 1000000u

void fk_node_unlock(struct fk_node *node)
{
    struct fk_core_work work = fk_core_work(node->core);

    if (work.events)
        fk_node_events_drain(node);
    bool post = work.completions && !node->event_set;
    bool wake_io = work.ssd || fk_core_next_wakeup(node->core) < node->io_sleeps_until ||
                   fk_node_stage_wanted(node);

    if (work.jobs && fk_links_push(node))
        pthread_cond_signal(&node->agent_wake);
    if (work.fetches && node->sharing)
        fk_node_share_wake(node);
    else if (work.fetches && node->remote)
        fk_node_remote_wake(node);
    if (work.cancels != node->cancels_told) {
        node->cancels_told = work.cancels;
        fk_links_cancel(node);
    }
    if (post) {
        uint64_t one = 1;
        node->event_set = write(node->event_fd, &one, sizeof(one)) == sizeof(one);
    }
    pthread_mutex_unlock(&node->lock);
    /* The I/O thread itself looks again before it sleeps. */
    if (wake_io && node->has_io_thread && !pthread_equal(pthread_self(), node->io_thread))
        fk_node_io_wake(node);
}

/* ---- opening ---- */

static struct fk_core_params core_params(const struct fk_settings *set)
{
    return (struct fk_core_params){
        .max_spaces = (uint32_t)set->max_spaces,
        .policy = {
            .kind = (enum fk_policy_kind)set->eviction_policy,
            .hit_reward_ticks = (uint32_t)fk_min(set->hit_reward_seconds * 1000,
                                                 (int64_t)UINT32_MAX),
            .slru_protected_threshold = (uint32_t)set->slru_protected_threshold,
        },
        .evict_start_threshold = set->evict_start_threshold,
        .evict_ratio = set->evict_ratio,
        .write_policy = (enum fk_write_policy)set->ssd_write_policy,
        .op_timeout_us = (uint64_t)set->op_timeout_ms * 1000,
        .lease_timeout_us = (uint64_t)set->lease_timeout_ms * 1000,
        .cancel_grace_us = CANCEL_GRACE_US,
        .copies_go_first = set->peer_copies == FK_PEER_COPIES_EVICT_FIRST,
        .events = set->enable_kv_events || fk_node_shares(set) || fk_node_has_remote(set),
        .seed = fk_clock_ns() | 1,
    };
}
/* Both rooms keep these lists; the node is where they meet. */
_Static_assert((int)FK_EVICT_LRU == (int)FK_POLICY_LRU, "policies in one order");
_Static_assert((int)FK_EVICT_AUTO == (int)FK_POLICY_AUTO, "policies in one order");
_Static_assert((int)FK_SSD_WRITE_ON_EVICT == (int)FK_WRITE_ON_EVICT, "write policies in one order");

/* For tests and trials: FK_TEST_FAULT="read_error=0.001,..." wraps the engine in a fault filter. */
static int wrap_in_faults(struct fk_engine **engine)
{
    const char *spec = getenv("FK_TEST_FAULT"), *bad;
    struct fk_fault_params params;

    if (!spec || !*spec)
        return 0;
    if (fk_fault_parse(spec, &params, &bad))
        return fk_api_fail(-EINVAL, "FK_TEST_FAULT: cannot understand \"%s\"", bad);
    fk_warn("FK_TEST_FAULT is set: SSD faults are injected on purpose (%s)", spec);
    struct fk_engine *inner = *engine;
    int rc = fk_engine_fault_create(inner, &params, engine);
    return rc ? fk_api_fail(rc, "cannot create the fault filter: %s", strerror(-rc)) : 0;
}

static int open_engine(struct fk_node *node)
{
    const struct fk_settings *set = node->set;
    struct fk_engine_params params = {
        .depth = (unsigned)fk_min(set->iouring_entries > 0 ? set->iouring_entries : 512,
                                  set->ssd_io_depth * (int64_t)fk_max(set->ssd_cache_dir.count, 1u)),
        .no_uring = set->iouring_entries == 0,
    };

    if (!set->ssd_cache_bytes && !set->ssd_cache_blocks)
        return 0;
    int rc = fk_engine_create(&params, &node->engine);
    if (rc)
        return fk_api_fail(rc, "cannot set up disk I/O: %s", strerror(-rc));
    return wrap_in_faults(&node->engine);
}

static int init_locks(struct fk_node *node)
{
    pthread_condattr_t mono;

    pthread_condattr_init(&mono);
    pthread_condattr_setclock(&mono, CLOCK_MONOTONIC);
    pthread_mutex_init(&node->lock, NULL);
    pthread_mutex_init(&node->io_lock, NULL);
    pthread_mutex_init(&node->wake_lock, NULL);
    pthread_cond_init(&node->agent_wake, NULL);
    pthread_cond_init(&node->idle, &mono);
    pthread_cond_init(&node->io_wake, &mono);
    pthread_condattr_destroy(&mono);
    node->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    return node->event_fd < 0 ? fk_api_fail(-errno, "eventfd: %s", strerror(errno)) : 0;
}

static void free_node(struct fk_node *node)
{
    for (struct fk_space *s = node->spaces; s; s = s->next)
        fk_space_close_store(s);
    unsigned stuck = node->engine ? node->engine->ops->inflight(node->engine) : 0;
    if (stuck)
        fk_error("close: %u I/Os never ended; the cpu tier's memory and the I/O engine are left "
                 "behind, because the disk may still write to it", stuck);
    while (node->instances) {
        struct fk_instance *in = node->instances;
        node->instances = in->next;
        fk_instance_free(in);
    }
    while (node->spaces) {
        struct fk_space *next = node->spaces->next;
        fk_space_free(node->spaces, stuck != 0 || node->memory_busy);
        node->spaces = next;
    }
    if (!stuck)                     /* the disk may still write to what is lent from it */
        fk_node_share_free(node);
    fk_core_destroy(node->core);
    if (node->engine && !stuck)
        node->engine->ops->destroy(node->engine);
    if (node->event_fd >= 0)
        close(node->event_fd);
    fk_vec_free(&node->groups);
    if (node->events)
        fk_node_events_destroy(node);
    flexkv_config_destroy(node->config);
    free(node);
}

FLEXKV_API int flexkv_node_open(const flexkv_config *config, flexkv_node **out)
{
    struct fk_node *node = calloc(1, sizeof(*node));

    if (!node)
        return fk_api_fail(-ENOMEM, "out of memory");
    node->pub.vt = &fk_local_vt;
    node->event_fd = -1;
    node->started_us = fk_clock_us();
    int rc = fk_api_config_open(config, &node->config);
    if (!rc)
        node->set = &node->config->config->settings;
    if (!rc)
        rc = init_locks(node);
    if (!rc) {
        struct fk_core_params params = core_params(node->set);
        rc = fk_core_create(&params, &node->core);
        if (rc)
            fk_api_fail(rc, "out of memory");
    }
    if (!rc && node->set->enable_kv_events)
        rc = fk_node_events_create(node);
    if (!rc)
        rc = open_engine(node);
    if (!rc)
        rc = fk_node_agent_start(node);
    if (!rc)
        rc = fk_node_io_start(node);
    if (!rc && *node->set->kv_events_endpoint)
        rc = fk_node_publish_start(node);
    if (!rc && fk_node_shares(node->set))
        rc = fk_node_share_start(node);
    if (!rc && fk_node_has_remote(node->set) && (rc = fk_node_remote_start(node)) != 0)
        fk_node_share_stop(node);
    if (rc) {
        fk_node_publish_stop(node);
        fk_node_io_stop(node);
        pthread_mutex_lock(&node->lock);
        node->closing = true;
        pthread_cond_signal(&node->agent_wake);
        pthread_mutex_unlock(&node->lock);
        fk_node_agent_stop(node);
        free_node(node);
        return rc;
    }
    *out = &node->pub;
    return 0;
}

/* ---- closing ---- */

/* Of workers in this process. Others have a mapping of their own: what they still copy harms nobody. */
static bool copies_idle(struct fk_node *node)
{
    for (const struct fk_instance *in = node->instances; in; in = in->next)
        if (!in->remote && !fk_core_instance_idle(node->core, in->id))
            return false;
    return true;
}

static bool writes_idle(struct fk_node *node)
{
    struct flexkv_stats st;

    fk_core_get_stats(node->core, &st);
    return st.write_backlog_blocks == 0;
}

int fk_node_wait(struct fk_node *node, uint64_t deadline_us)
{
    struct timespec ts = { .tv_sec = (time_t)(deadline_us / 1000000),
                           .tv_nsec = (long)(deadline_us % 1000000) * 1000 };

    return pthread_cond_timedwait(&node->idle, &node->lock, &ts) == ETIMEDOUT ? -ETIMEDOUT : 0;
}

/* Waits for a condition of the core, at most as long as an operation may take. */
static void wait_until(struct fk_node *node, bool (*idle)(struct fk_node *node), uint64_t deadline_us)
{
    pthread_mutex_lock(&node->lock);
    while (!idle(node) && fk_clock_us() < deadline_us) {
        fk_node_unlock(node);
        usleep(500);
        pthread_mutex_lock(&node->lock);
    }
    pthread_mutex_unlock(&node->lock);
}

void fk_local_close(flexkv_node *pub)
{
    struct fk_node *node = fk_local_node(pub);
    uint64_t deadline = fk_clock_us() + (uint64_t)node->set->op_timeout_ms * 1000;

    pthread_mutex_lock(&node->lock);
    for (const struct fk_instance *in = node->instances; in; in = in->next)
        fk_core_fail_ops(node->core, in->id, -ECANCELED, fk_clock_us());
    fk_node_unlock(node);
    wait_until(node, copies_idle, deadline);
    wait_until(node, writes_idle, deadline);
    wait_until(node, fk_node_remote_idle, deadline);

    fk_node_publish_stop(node);
    fk_server_stop(node);
    fk_node_io_stop(node);
    fk_node_share_stop(node);       /* what the I/O thread reads for others it hands to the transport */
    fk_node_remote_stop(node);
    pthread_mutex_lock(&node->lock);
    node->closing = true;
    pthread_cond_broadcast(&node->agent_wake);
    pthread_mutex_unlock(&node->lock);
    fk_node_agent_stop(node);
    free_node(node);
}
