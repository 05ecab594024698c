/* ops.c - match, get, put, prefetch, completions, statistics of a local node: the core's calls,
 * under the node's lock. See handle.h, node_impl.h. */
#include <poll.h>

#include "api/peer.h"
#include "base/clock.h"

/* ---- match ---- */

int fk_local_match(flexkv_namespace *pub, const struct fk_key *keys, uint32_t n,
                   flexkv_match_result *out)
{
    const struct fk_instance *in = fk_local_namespace(pub)->instance;
    struct fk_node *node = in->space->node;

    *out = (flexkv_match_result){ 0 };
    pthread_mutex_lock(&node->lock);
    /* What could not be delivered is no hit. */
    if (!in->remote || in->n_registered == in->n_workers) {
        uint64_t now = fk_clock_us();
        fk_core_match(node->core, in->id, keys, n, now, out);
        if (node->remote)
            fk_node_remote_used(node, in, fk_local_namespace(pub)->group, keys, out->blocks);
        if ((node->sharing || node->remote) && out->blocks < n)
            fk_core_match_extend(node->core, in->id, fk_local_namespace(pub)->group, keys,
                                 fk_node_reach(node, in, keys, n, out->blocks, now), now, out);
    }
    fk_node_unlock(node);
    return 0;
}

int fk_local_release(flexkv_node *pub, uint64_t lease)
{
    struct fk_node *node = fk_local_node(pub);

    pthread_mutex_lock(&node->lock);
    int rc = fk_core_release(node->core, lease);
    fk_node_unlock(node);
    return rc ? fk_api_fail(rc, "no such lease: it ran out or was used") : 0;
}

/* ---- operations ---- */

static struct fk_core_op_args core_args(const flexkv_op_args *a, uint64_t tag, uint64_t now)
{
    return (struct fk_core_op_args){
        .pages = a->pages, .user_data = a->user_data, .results = a->results, .tag = tag,
        .layerwise = a->flags & FLEXKV_OP_LAYERWISE, .early = a->flags & FLEXKV_OP_EARLY, .counter = a->counter,
        .deadline_us = a->timeout_ms ? now + a->timeout_ms * 1000ull : 0,
    };
}

/* With the lock: can every worker reach these pages? */
static int check_pages(const struct fk_instance *in, const uint32_t *pages, uint32_t n)
{
    if (in->n_registered < in->n_workers)
        return fk_api_fail(-ENOTCONN, "space %s: %u of %u ranks have registered their memory",
                           in->space->name, in->n_registered, in->n_workers);
    if (in->remote && n > in->min_pages)
        return fk_api_fail(-EINVAL, "%u blocks, but the regions have %llu pages", n,
                           (unsigned long long)in->min_pages);
    for (uint32_t i = 0; i < n; i++)
        if (pages[i] >= in->min_pages)
            return fk_api_fail(-EINVAL, "block %u: page %u, but the regions have %llu pages", i,
                               pages[i], (unsigned long long)in->min_pages);
    return 0;
}

static int lease_gone(int rc)
{
    return fk_api_fail(rc, rc == -ENOENT ? "no such lease: it ran out or was used"
                         : rc == -EINVAL ? "the range is not within the lease" : "out of memory");
}

/* in NULL: the lease may be of any instance. */
int fk_node_get(struct fk_node *node, const struct fk_instance *in, uint64_t lease, uint32_t first,
                uint32_t n, const flexkv_op_args *args, uint64_t tag, uint64_t *op)
{
    uint64_t now = fk_clock_us();
    struct fk_core_op_args a = core_args(args, tag, now);
    uint32_t instance;

    pthread_mutex_lock(&node->lock);
    int rc = fk_core_lease_instance(node->core, lease, &instance);
    if (!rc && in && in->id != instance)
        rc = -ENOENT;
    if (rc) {
        lease_gone(rc);
    } else {
        rc = check_pages(fk_instance_by_id(node, instance), args->pages, n);
        if (!rc && (rc = fk_core_get(node->core, lease, first, n, &a, now, op)))
            lease_gone(rc);
    }
    fk_node_unlock(node);
    return rc;
}

int fk_node_put(struct fk_namespace *ns, const struct fk_key *keys, uint32_t n, uint32_t first,
                const flexkv_op_args *args, uint64_t tag, uint64_t *op)
{
    const struct fk_instance *in = ns->instance;
    struct fk_node *node = in->space->node;
    uint64_t now = fk_clock_us();
    struct fk_core_op_args a = core_args(args, tag, now);

    pthread_mutex_lock(&node->lock);
    int rc = check_pages(in, args->pages, n - first);
    if (!rc && node->events && !(a.slots = fk_node_events_slots(node, n - first)))
        rc = fk_api_fail(-ENOMEM, "out of memory");
    if (!rc && (rc = fk_core_put(node->core, in->id, ns->group, keys, n, first, &a, now, op)))
        fk_api_fail(rc, "out of memory");
    if (!rc && node->events)
        fk_node_events_name(ns, args, first, a.slots, n - first);
    if (!rc && node->events && (node->sharing || node->remote))
        fk_node_events_name_known(ns, args, keys + first, first, n - first);
    fk_node_unlock(node);
    return rc;
}

int fk_node_prefetch(struct fk_namespace *ns, const struct fk_key *keys, uint32_t n,
                     const flexkv_op_args *args, uint64_t *op)
{
    struct fk_node *node = ns->instance->space->node;
    uint64_t now = fk_clock_us();
    struct fk_core_op_args a = core_args(args, 0, now);

    a.results = NULL;       /* how many blocks there are is known only at the end */
    pthread_mutex_lock(&node->lock);
    if (node->sharing || node->remote) {
        uint32_t here = fk_core_here(node->core, ns->instance->id, keys, n, NULL);
        a.group = ns->group;
        a.reach = fk_node_reach(node, ns->instance, keys, n, here, now);
    }
    int rc = fk_core_prefetch(node->core, ns->instance->id, keys, n, &a, now, op);
    fk_node_unlock(node);
    return rc ? fk_api_fail(rc, "out of memory") : 0;
}

int fk_local_cancel(flexkv_node *pub, uint64_t op)
{
    struct fk_node *node = fk_local_node(pub);

    pthread_mutex_lock(&node->lock);
    int rc = fk_core_cancel(node->core, op, fk_clock_us());
    fk_node_unlock(node);
    return rc ? fk_api_fail(rc, "no such operation: it has ended") : 0;
}

/* With the lock: until the stores' headers are written, so that not even kill -9 brings old
 * blocks back. */
static int wait_for_stores(struct fk_node *node, uint64_t target)
{
    uint64_t end = fk_clock_us() + (uint64_t)node->set->op_timeout_ms * 1000;

    while (node->resets_done < target)
        if (fk_node_wait(node, end))
            return -ETIMEDOUT;
    int rc = node->reset_status;
    node->reset_status = 0;
    return rc;
}

int fk_local_reset(flexkv_node *pub)
{
    struct fk_node *node = fk_local_node(pub);

    pthread_mutex_lock(&node->lock);
    fk_core_reset(node->core, fk_clock_us());
    for (struct fk_space *s = node->spaces; s; s = s->next)
        node->resets_asked += s->ssd != NULL;
    if (node->remote)
        fk_node_remote_reset(node);
    uint64_t target = node->resets_asked;
    fk_node_unlock(node);
    pthread_mutex_lock(&node->lock);
    int rc = wait_for_stores(node, target);
    pthread_mutex_unlock(&node->lock);
    if (rc)
        return fk_api_fail(rc, "everything is dropped here, but ssd_cache_dir could not be marked "
                           "(%s): a restart may find old blocks", strerror(-rc));
    return fk_node_remote_reset_wait(node);
}

/* ---- completions ---- */

/* busy: agents are at work. */
static int take_completions(struct fk_node *node, flexkv_completion *out, int max, bool *busy)
{
    pthread_mutex_lock(&node->lock);
    *busy = fk_links_read(node);
    int n = (int)fk_core_take_completions(node->core, out, (uint32_t)max);
    if (node->event_set && !fk_core_work(node->core).completions) {
        uint64_t count;
        node->event_set = read(node->event_fd, &count, sizeof(count)) != sizeof(count);
    }
    fk_node_unlock(node);
    return n;
}

int fk_node_take_completions(struct fk_node *node, flexkv_completion *out, int max)
{
    bool busy;

    return take_completions(node, out, max, &busy);
}

/* A small copy takes less time than two threads' waking up: who waits looks on for a while. */
static int local_poll(flexkv_node *pub, flexkv_completion *out, int max, int timeout_ms)
{
    struct fk_node *node = fk_local_node(pub);
    uint64_t start = fk_clock_us(), end = start + (timeout_ms > 0 ? (uint64_t)timeout_ms * 1000 : 0);
    bool busy;

    for (;;) {
        int n = take_completions(node, out, max, &busy);
        uint64_t now = fk_clock_us();
        if (n || timeout_ms == 0 || (timeout_ms > 0 && now >= end))
            return n;
        if (busy && now - start < FK_SPIN_US) {
            fk_pause_us(FK_SPIN_PAUSE_US);
            continue;
        }
        struct pollfd p = { .fd = node->event_fd, .events = POLLIN };
        int left = timeout_ms < 0 ? -1 : (int)((end - now + 999) / 1000);
        if (poll(&p, 1, left) < 0 && errno != EINTR)
            return fk_api_fail(-errno, "poll: %s", strerror(errno));
    }
}

int fk_local_stats(flexkv_node *pub, flexkv_stats *out)
{
    struct fk_node *node = fk_local_node(pub);

    pthread_mutex_lock(&node->lock);
    fk_core_get_stats(node->core, out);
    if (node->events)
        fk_node_events_stats(node, out);
    if (node->sharing)
        fk_node_share_stats(node, out);
    if (node->remote)
        fk_node_remote_stats(node, out);
    fk_node_unlock(node);
    out->cpu.bytes_read = atomic_load(&node->bytes_to_engine);
    out->cpu.bytes_written = atomic_load(&node->bytes_from_engine);
    out->ssd.bytes_read = atomic_load(&node->bytes_read);
    out->ssd.bytes_written = atomic_load(&node->bytes_written);
    return 0;
}

/* ---- as a kind of node ---- */

static int node_fd(flexkv_node *node)
{
    return fk_local_node(node)->event_fd;
}

static int local_status(flexkv_node *node, char **json)
{
    return fk_node_status_json(fk_local_node(node), json);
}

static int local_get(flexkv_node *node, uint64_t lease, uint32_t first, uint32_t n,
                     const flexkv_op_args *args, uint64_t *op)
{
    return fk_node_get(fk_local_node(node), NULL, lease, first, n, args, 0, op);
}

static int local_put(flexkv_namespace *ns, const struct fk_key *keys, uint32_t n, uint32_t first,
                     const flexkv_op_args *args, uint64_t *op)
{
    return fk_node_put(fk_local_namespace(ns), keys, n, first, args, 0, op);
}

static int local_prefetch(flexkv_namespace *ns, const struct fk_key *keys, uint32_t n,
                          const flexkv_op_args *args, uint64_t *op)
{
    return fk_node_prefetch(fk_local_namespace(ns), keys, n, args, op);
}

const struct fk_node_vt fk_local_vt = {
    .close = fk_local_close, .fd = node_fd, .status = local_status,
    .space_open = fk_local_space_open, .namespace_open = fk_local_namespace_open,
    .regions_register = fk_local_regions_register,
    .regions_unregister = fk_local_regions_unregister,
    .set_compute_rate = fk_local_set_compute_rate, .match = fk_local_match,
    .release = fk_local_release, .get = local_get, .put = local_put, .prefetch = local_prefetch,
    .cancel = fk_local_cancel, .poll = local_poll, .reset = fk_local_reset,
    .stats = fk_local_stats, .namespace_label = fk_local_namespace_label,
    .events_open = fk_local_events_open,
};
