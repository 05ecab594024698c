/* node.c - opening and closing a node, and what every call ends with: telling whom the core's
 * queues concern. */
#include <fcntl.h>
#include <stdio.h>
#include <sys/eventfd.h>

#include "api/config_impl.h"
#include "api/node_impl.h"
#include "base/clock.h"

#define CANCEL_GRACE_US 1000000u

void fk_node_unlock(flexkv_node *node)
{
    struct fk_core_work work = fk_core_work(node->core);
    bool post = work.completions && !node->event_set;
    bool wake_io = work.ssd || fk_core_next_wakeup(node->core) < node->io_sleeps_until;

    if (work.jobs)
        pthread_cond_signal(&node->agent_wake);
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

static int open_engine(flexkv_node *node)
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

static int init_locks(flexkv_node *node)
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

static int take_config(flexkv_node *node, const flexkv_config *given)
{
    flexkv_config *own = NULL;
    int rc;

    if (!given) {
        rc = flexkv_config_create(&own);
        if (!rc)
            rc = flexkv_config_load_default(own);
    } else {
        own = (flexkv_config *)(uintptr_t)given;
        rc = 0;
    }
    if (!rc)
        rc = fk_api_config_take(own);
    if (!rc) {
        node->config = own;
        node->set = &own->config->settings;
    }
    if (!given)
        flexkv_config_destroy(own);
    return rc;
}

static void free_node(flexkv_node *node)
{
    for (flexkv_space *s = node->spaces; s; s = s->next)
        fk_space_close_store(s);
    unsigned stuck = node->engine ? node->engine->ops->inflight(node->engine) : 0;
    if (stuck)
        fk_error("close: %u I/Os never ended; the cpu tier's memory and the I/O engine are left "
                 "behind, because the disk may still write to it", stuck);
    while (node->spaces) {
        flexkv_space *next = node->spaces->next;
        fk_space_free(node->spaces, stuck != 0);
        node->spaces = next;
    }
    fk_core_destroy(node->core);
    if (node->engine && !stuck)
        node->engine->ops->destroy(node->engine);
    if (node->event_fd >= 0)
        close(node->event_fd);
    fk_vec_free(&node->groups);
    flexkv_config_destroy(node->config);
    free(node);
}

FLEXKV_API int flexkv_node_open(const flexkv_config *config, flexkv_node **out)
{
    flexkv_node *node = calloc(1, sizeof(*node));

    if (!node)
        return fk_api_fail(-ENOMEM, "out of memory");
    node->event_fd = -1;
    int rc = take_config(node, config);
    if (!rc)
        rc = init_locks(node);
    if (!rc) {
        struct fk_core_params params = core_params(node->set);
        rc = fk_core_create(&params, &node->core);
        if (rc)
            fk_api_fail(rc, "out of memory");
    }
    if (!rc)
        rc = open_engine(node);
    if (!rc)
        rc = fk_node_agent_start(node);
    if (!rc)
        rc = fk_node_io_start(node);
    if (rc) {
        node->closing = true;
        if (node->has_agent)
            pthread_cond_signal(&node->agent_wake);
        fk_node_agent_stop(node);
        free_node(node);
        return rc;
    }
    *out = node;
    return 0;
}

/* ---- closing ---- */

static bool copies_idle(flexkv_node *node)
{
    for (flexkv_space *s = node->spaces; s; s = s->next)
        if (!fk_core_space_idle(node->core, s->id))
            return false;
    return true;
}

static bool writes_idle(flexkv_node *node)
{
    struct flexkv_stats st;

    fk_core_get_stats(node->core, &st);
    return st.write_backlog_blocks == 0;
}

/* Waits for a condition of the core, at most as long as an operation may take. */
static void wait_until(flexkv_node *node, bool (*idle)(flexkv_node *node), uint64_t deadline_us)
{
    pthread_mutex_lock(&node->lock);
    while (!idle(node) && fk_clock_us() < deadline_us) {
        fk_node_unlock(node);
        usleep(500);
        pthread_mutex_lock(&node->lock);
    }
    pthread_mutex_unlock(&node->lock);
}

FLEXKV_API void flexkv_node_close(flexkv_node *node)
{
    if (!node)
        return;
    uint64_t deadline = fk_clock_us() + (uint64_t)node->set->op_timeout_ms * 1000;

    pthread_mutex_lock(&node->lock);
    for (flexkv_space *s = node->spaces; s; s = s->next)
        fk_core_fail_space_ops(node->core, s->id, -ECANCELED, fk_clock_us());
    fk_node_unlock(node);
    wait_until(node, copies_idle, deadline);
    wait_until(node, writes_idle, deadline);

    fk_node_io_stop(node);
    pthread_mutex_lock(&node->lock);
    node->closing = true;
    pthread_cond_broadcast(&node->agent_wake);
    pthread_mutex_unlock(&node->lock);
    fk_node_agent_stop(node);
    free_node(node);
}

FLEXKV_API int flexkv_node_fd(flexkv_node *node)
{
    return node->event_fd;
}
