/* ops.c - keys, match, get, put, prefetch, completions, statistics: the core's calls, under the
 * node's lock. */
#include <poll.h>

#include "api/node_impl.h"
#include "base/clock.h"

_Static_assert(sizeof(flexkv_key) == sizeof(struct fk_key), "one key type");
#define internal_keys(k) ((const struct fk_key *)(const void *)(k))

FLEXKV_API size_t flexkv_keys_from_tokens(const flexkv_namespace *ns, const flexkv_key *prev,
                                          const uint32_t *tokens, size_t n_tokens, flexkv_key *keys)
{
    const flexkv_space *s = ns->space;
    size_t n = n_tokens / s->tokens_per_block;

    fk_key_chain(s->scheme, prev ? *internal_keys(prev) : ns->seed, tokens, s->tokens_per_block, n,
                 (struct fk_key *)keys);
    return n;
}

FLEXKV_API size_t flexkv_keys_from_hashes(const flexkv_namespace *ns, const void *hashes,
                                          size_t hash_bytes, size_t stride, size_t n,
                                          flexkv_key *keys)
{
    if (hash_bytes < 8)             /* too few bits to tell blocks apart */
        return 0;
    fk_key_from_hashes(ns->seed, hashes, hash_bytes, stride, n, (struct fk_key *)keys);
    return n;
}

/* ---- match ---- */

FLEXKV_API int flexkv_match(flexkv_namespace *ns, const flexkv_key *keys, size_t n,
                            flexkv_match_result *out)
{
    flexkv_node *node = ns->space->node;

    if (n > UINT32_MAX)
        return fk_api_fail(-EINVAL, "more than 2^32 keys");
    pthread_mutex_lock(&node->lock);
    fk_core_match(node->core, ns->space->id, internal_keys(keys), (uint32_t)n, fk_clock_us(), out);
    fk_node_unlock(node);
    return 0;
}

FLEXKV_API int flexkv_release(flexkv_node *node, uint64_t lease)
{
    pthread_mutex_lock(&node->lock);
    int rc = fk_core_release(node->core, lease);
    fk_node_unlock(node);
    return rc ? fk_api_fail(rc, "no such lease: it ran out or was used") : 0;
}

/* ---- operations ---- */

static struct fk_core_op_args core_args(const flexkv_op_args *a, uint64_t now)
{
    return (struct fk_core_op_args){
        .pages = a->pages, .user_data = a->user_data, .results = a->results,
        .deadline_us = a->timeout_ms ? now + a->timeout_ms * 1000ull : 0,
    };
}

static int check_args(const flexkv_op_args *a)
{
    return a && a->struct_bytes >= sizeof(*a) ? 0
           : fk_api_fail(-EINVAL, "flexkv_op_args: struct_bytes is not set");
}

/* With the lock: can every rank reach these pages? */
static int check_pages(const flexkv_space *s, const uint32_t *pages, uint32_t n)
{
    if (s->n_ranks_registered < s->ranks)
        return fk_api_fail(-ENOTCONN, "space %s: %u of %u ranks have registered their memory",
                           s->name, s->n_ranks_registered, s->ranks);
    if (n && !pages)
        return fk_api_fail(-EINVAL, "pages is NULL");
    for (uint32_t i = 0; i < n; i++)
        if (pages[i] >= s->min_pages)
            return fk_api_fail(-EINVAL, "block %u: page %u, but the regions have %llu pages", i,
                               pages[i], (unsigned long long)s->min_pages);
    return 0;
}

static int lease_gone(int rc)
{
    return fk_api_fail(rc, rc == -ENOENT ? "no such lease: it ran out or was used"
                         : rc == -EINVAL ? "the range is not within the lease" : "out of memory");
}

FLEXKV_API int flexkv_get(flexkv_node *node, uint64_t lease, uint32_t first, uint32_t n,
                          const flexkv_op_args *args, uint64_t *op)
{
    int rc = check_args(args);
    uint64_t now = fk_clock_us(), id;
    uint32_t space;

    if (rc)
        return rc;
    struct fk_core_op_args a = core_args(args, now);
    pthread_mutex_lock(&node->lock);
    rc = fk_core_lease_space(node->core, lease, &space);
    if (rc) {
        lease_gone(rc);
    } else {
        rc = check_pages(fk_node_space(node, space), args->pages, n);
        if (!rc && (rc = fk_core_get(node->core, lease, first, n, &a, now, op ? op : &id)))
            lease_gone(rc);
    }
    fk_node_unlock(node);
    return rc;
}

FLEXKV_API int flexkv_put(flexkv_namespace *ns, const flexkv_key *keys, uint32_t n, uint32_t first,
                          const flexkv_op_args *args, uint64_t *op)
{
    flexkv_node *node = ns->space->node;
    int rc = check_args(args);
    uint64_t now = fk_clock_us(), id;

    if (rc)
        return rc;
    if (first > n)
        return fk_api_fail(-EINVAL, "first %u is beyond the %u keys", first, n);
    struct fk_core_op_args a = core_args(args, now);
    pthread_mutex_lock(&node->lock);
    rc = check_pages(ns->space, args->pages, n - first);
    if (!rc && (rc = fk_core_put(node->core, ns->space->id, ns->group, internal_keys(keys), n, first,
                                 &a, now, op ? op : &id)))
        fk_api_fail(rc, "out of memory");
    fk_node_unlock(node);
    return rc;
}

FLEXKV_API int flexkv_prefetch(flexkv_namespace *ns, const flexkv_key *keys, uint32_t n,
                               const flexkv_op_args *args, uint64_t *op)
{
    flexkv_node *node = ns->space->node;
    int rc = check_args(args);
    uint64_t now = fk_clock_us(), id;

    if (rc)
        return rc;
    struct fk_core_op_args a = core_args(args, now);
    a.results = NULL;       /* how many blocks there are is known only at the end */
    pthread_mutex_lock(&node->lock);
    rc = fk_core_prefetch(node->core, ns->space->id, internal_keys(keys), n, &a, now, op ? op : &id);
    fk_node_unlock(node);
    return rc ? fk_api_fail(rc, "out of memory") : 0;
}

FLEXKV_API int flexkv_cancel(flexkv_node *node, uint64_t op)
{
    pthread_mutex_lock(&node->lock);
    int rc = fk_core_cancel(node->core, op, fk_clock_us());
    fk_node_unlock(node);
    return rc ? fk_api_fail(rc, "no such operation: it has ended") : 0;
}

/* With the lock: until the stores' headers are written, so that not even kill -9 brings old
 * blocks back. */
static int wait_for_stores(flexkv_node *node, uint64_t target)
{
    uint64_t end = fk_clock_us() + (uint64_t)node->set->op_timeout_ms * 1000;
    struct timespec ts = { .tv_sec = (time_t)(end / 1000000),
                           .tv_nsec = (long)(end % 1000000) * 1000 };

    while (node->resets_done < target)
        if (pthread_cond_timedwait(&node->idle, &node->lock, &ts) == ETIMEDOUT)
            return -ETIMEDOUT;
    int rc = node->reset_status;
    node->reset_status = 0;
    return rc;
}

FLEXKV_API int flexkv_reset(flexkv_node *node)
{
    pthread_mutex_lock(&node->lock);
    fk_core_reset(node->core, fk_clock_us());
    for (flexkv_space *s = node->spaces; s; s = s->next)
        node->resets_asked += s->ssd != NULL;
    uint64_t target = node->resets_asked;
    fk_node_unlock(node);
    pthread_mutex_lock(&node->lock);
    int rc = wait_for_stores(node, target);
    pthread_mutex_unlock(&node->lock);
    return rc ? fk_api_fail(rc, "everything is dropped here, but ssd_cache_dir could not be marked "
                            "(%s): a restart may find old blocks", strerror(-rc)) : 0;
}

/* ---- completions ---- */

static int take(flexkv_node *node, flexkv_completion *out, int max)
{
    pthread_mutex_lock(&node->lock);
    int n = (int)fk_core_take_completions(node->core, out, (uint32_t)max);
    if (node->event_set && !fk_core_work(node->core).completions) {
        uint64_t count;
        node->event_set = read(node->event_fd, &count, sizeof(count)) != sizeof(count);
    }
    fk_node_unlock(node);
    return n;
}

FLEXKV_API int flexkv_poll(flexkv_node *node, flexkv_completion *out, int max, int timeout_ms)
{
    uint64_t end = fk_clock_us() + (timeout_ms > 0 ? (uint64_t)timeout_ms * 1000 : 0);

    if (max <= 0)
        return fk_api_fail(-EINVAL, "max must be greater than 0");
    for (;;) {
        int n = take(node, out, max);
        uint64_t now = fk_clock_us();
        if (n || timeout_ms == 0 || (timeout_ms > 0 && now >= end))
            return n;
        struct pollfd p = { .fd = node->event_fd, .events = POLLIN };
        int left = timeout_ms < 0 ? -1 : (int)((end - now + 999) / 1000);
        if (poll(&p, 1, left) < 0 && errno != EINTR)
            return fk_api_fail(-errno, "poll: %s", strerror(errno));
    }
}

FLEXKV_API int flexkv_node_stats(flexkv_node *node, flexkv_stats *out)
{
    size_t bytes = out->struct_bytes;
    flexkv_stats st;

    if (bytes < sizeof(size_t) || bytes > sizeof(st))
        return fk_api_fail(-EINVAL, "flexkv_stats: struct_bytes is not set");
    pthread_mutex_lock(&node->lock);
    fk_core_get_stats(node->core, &st);
    fk_node_unlock(node);
    st.cpu.bytes_read = atomic_load(&node->bytes_to_engine);
    st.cpu.bytes_written = atomic_load(&node->bytes_from_engine);
    st.ssd.bytes_read = atomic_load(&node->bytes_read);
    st.ssd.bytes_written = atomic_load(&node->bytes_written);
    memcpy(out, &st, bytes);
    out->struct_bytes = bytes;
    return 0;
}
