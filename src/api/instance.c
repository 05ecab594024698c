/* instance.c - engines that use a space: their workers (in this process, or agents of others), their
 * namespaces, how they come and go. */
#include <stdio.h>

#include "api/node_impl.h"
#include "api/peer.h"
#include "base/clock.h"
#include "base/log.h"

/* ---- with the lock ---- */

struct fk_instance *fk_instance_find(const struct fk_node *node, const char *space,
                                     const char *name)
{
    struct fk_instance *in = node->instances;

    while (in && (in->ended || strcmp(in->space->name, space) || strcmp(in->name, name)))
        in = in->next;
    return in;
}

struct fk_instance *fk_instance_by_id(const struct fk_node *node, uint32_t id)
{
    struct fk_instance *in = node->instances;

    while (in && in->id != id)
        in = in->next;
    return in;
}

static void find_min_pages(struct fk_instance *in)
{
    in->min_pages = UINT64_MAX;
    for (uint32_t w = 0; w < in->n_workers; w++)
        if (in->worker[w].pages && !in->worker[w].leaving)
            in->min_pages = fk_min(in->min_pages, in->worker[w].pages);
}

void fk_worker_added(struct fk_instance *in, uint32_t worker, uint64_t pages)
{
    in->worker[worker].pages = pages;
    in->n_registered++;
    find_min_pages(in);
    pthread_cond_broadcast(&in->space->node->idle);
}

void fk_worker_removed(struct fk_instance *in, uint32_t worker)
{
    in->worker[worker].leaving = true;
    in->n_registered--;             /* no new operation from here on */
    fk_core_instance_direct(in->space->node->core, in->id, false);
    find_min_pages(in);
    fk_core_fail_ops(in->space->node->core, in->id, -ENOTCONN, fk_clock_us());
}

void fk_instance_end(struct fk_instance *in)
{
    in->ended = true;
    fk_core_instance_end(in->space->node->core, in->id, -ECANCELED, fk_clock_us());
}

/* Nothing copies for it any more. */
static void free_worker(struct fk_worker *w)
{
    if (w->copier)
        fk_copier_detach(w->copier);
    fk_copier_destroy(w->copier);
    free(w->regions);
    *w = (struct fk_worker){ 0 };
}

void fk_instance_free(struct fk_instance *in)
{
    for (uint32_t w = 0; in->worker && w < in->n_workers; w++)
        free_worker(&in->worker[w]);
    while (in->namespaces) {
        struct fk_namespace *next = in->namespaces->next;
        free(in->namespaces->name);
        free(in->namespaces);
        in->namespaces = next;
    }
    free(in->worker);
    free(in);
}

/* ---- opening ---- */

static struct fk_instance *new_instance(struct fk_node *node, const flexkv_space_desc *desc,
                                        uint64_t owner)
{
    struct fk_instance *in = calloc(1, sizeof(*in));

    if (!in)
        return NULL;
    in->remote = desc->workers != 0;
    in->n_workers = desc->workers ? desc->workers : desc->ranks;
    in->worker = calloc(in->n_workers, sizeof(*in->worker));
    if (!in->worker) {
        free(in);
        return NULL;
    }
    snprintf(in->name, sizeof(in->name), "%s", desc->instance);
    in->owner = owner;
    in->min_pages = UINT64_MAX;
    in->pub.node = &node->pub;
    return in;
}

/* The agents that have come for the instance: how many, and the largest of their slices. */
static uint32_t agents_here(const struct fk_node *node, const flexkv_space_desc *desc,
                            uint64_t *slice_bytes, char *missing, size_t missing_bytes)
{
    uint32_t n = 0;
    size_t len = 0;

    *slice_bytes = 0;
    *missing = '\0';
    for (uint32_t w = 0; w < desc->workers; w++) {
        const struct fk_link *l = fk_link_waiting(node, desc->name, desc->instance, w);
        if (l) {
            n++;
            *slice_bytes = fk_max(*slice_bytes, fk_link_slice_bytes(l));
        } else if (len + 12 < missing_bytes) {
            len += (size_t)snprintf(missing + len, missing_bytes - len, "%s%u", len ? ", " : "", w);
        }
    }
    return n;
}

/* With the lock: until the slice's size is known, which the agents bring along. */
static int wait_for_agents(struct fk_node *node, flexkv_space_desc *desc, uint64_t owner,
                           uint64_t deadline_us)
{
    char missing[100];
    uint64_t bytes;

    for (;;) {
        uint32_t n = agents_here(node, desc, &bytes, missing, sizeof(missing));
        if (n == desc->workers) {
            desc->slice_bytes = bytes;
            return 0;
        }
        if (node->closing || (owner && !fk_server_has_session(node, owner)))
            return fk_api_fail(-ECONNRESET, "the client is gone");
        if (fk_node_wait(node, deadline_us) == -ETIMEDOUT && fk_clock_us() >= deadline_us)
            return fk_api_fail(-ETIMEDOUT, "space %s, instance \"%s\": %u of %u workers have come; "
                               "missing: %s. Do they run, with the same address and instance? "
                               "(worker_timeout_ms)", desc->name, desc->instance, n, desc->workers,
                               missing);
    }
}

/* With the lock: until every agent is attached. */
static int wait_for_workers(struct fk_node *node, const struct fk_instance *in, uint64_t owner,
                            uint64_t deadline_us)
{
    for (;;) {
        /* First: with its client an instance that was open before may be gone. */
        if (node->closing || (owner && !fk_server_has_session(node, owner)))
            return fk_api_fail(-ECONNRESET, "the client is gone");
        if (in->n_registered == in->n_workers)
            return 0;
        if (fk_node_wait(node, deadline_us) == -ETIMEDOUT && fk_clock_us() >= deadline_us)
            return fk_api_fail(-ETIMEDOUT, "instance \"%s\": %u of %u workers are attached "
                               "(worker_timeout_ms)", in->name, in->n_registered, in->n_workers);
    }
}

/* With the lock: one name, one user. */
static int check_free(const struct fk_node *node, const flexkv_space_desc *desc, uint64_t owner,
                      struct fk_instance **seen)
{
    *seen = fk_instance_find(node, desc->name, desc->instance);
    if (!*seen)
        return 0;
    if ((*seen)->owner != owner)
        return fk_api_fail(-EEXIST, "instance \"%s\" of space %s belongs to process %d; each engine "
                           "needs a name of its own (instance_id, engine_id)", desc->instance,
                           desc->name, fk_server_session_pid(node, (*seen)->owner));
    if ((*seen)->remote != (desc->workers != 0) ||
        ((*seen)->remote && (*seen)->n_workers != desc->workers))
        return fk_api_fail(-EEXIST, "space %s is open with %u workers", desc->name,
                           (*seen)->n_workers);
    return 0;
}

/* With the lock: the instance becomes a part of the node. */
static int join(struct fk_node *node, struct fk_instance *in, struct fk_space *space)
{
    int rc = fk_core_instance_add(node->core, space->id, in->n_workers, &in->id);

    if (rc)
        return fk_api_fail(rc, "out of memory");
    in->space = space;
    in->pub.tokens_per_block = space->tokens_per_block;
    in->pub.scheme = space->scheme;
    memcpy(in->pub.fingerprint, space->fingerprint, sizeof(in->pub.fingerprint));
    in->next = node->instances;
    node->instances = in;
    return 0;
}

/* The space, opened if need be, and the instance in it; fresh: it was not open before. */
static int build(struct fk_node *node, const flexkv_space_desc *desc, uint64_t owner,
                 struct fk_instance **out, bool *fresh)
{
    struct fk_instance *in = new_instance(node, desc, owner), *seen = NULL;
    struct fk_space *space;

    *fresh = false;
    if (!in)
        return fk_api_fail(-ENOMEM, "out of memory");
    fk_node_io_acquire(node);       /* the list of spaces does not change under it */
    int rc = fk_space_get(node, desc, &space);
    if (!rc) {
        pthread_mutex_lock(&node->lock);
        rc = check_free(node, desc, owner, &seen);
        if (!rc && !seen)
            rc = join(node, in, space);
        pthread_mutex_unlock(&node->lock);
    }
    fk_node_io_release(node);
    if (rc || seen)
        fk_instance_free(in);
    *fresh = !seen;
    *out = seen ? seen : in;
    return rc;
}

int fk_instance_open(struct fk_node *node, const flexkv_space_desc *desc, uint64_t owner,
                     struct fk_instance **out)
{
    flexkv_space_desc d = *desc;
    uint64_t wait_ms = d.wait_ms ? d.wait_ms : (uint64_t)node->set->worker_timeout_ms;
    uint64_t deadline = fk_clock_us() + wait_ms * 1000;
    bool wait = !d.slice_bytes, fresh;
    struct fk_instance *in;

    if (d.workers && !node->server)
        return fk_api_fail(-EINVAL, "space %s: workers of other processes are expected, but the node "
                           "does not listen (flexkv_node_listen)", d.name);
    pthread_mutex_lock(&node->lock);
    int rc = check_free(node, &d, owner, &in);
    if (!rc && in && wait)
        d.slice_bytes = in->space->slice_bytes;
    else if (!rc && wait)
        rc = wait_for_agents(node, &d, owner, deadline);
    pthread_mutex_unlock(&node->lock);
    if (rc)
        return rc;
    rc = build(node, &d, owner, &in, &fresh);
    if (rc)
        return rc;
    fk_server_wake(node);           /* it attaches the agents */
    if (wait) {
        pthread_mutex_lock(&node->lock);
        rc = wait_for_workers(node, in, owner, deadline);
        if (rc && fresh)
            fk_instance_end(in);
        fk_node_unlock(node);
    }
    *out = in;
    return rc;
}

int fk_local_space_open(flexkv_node *pub, const flexkv_space_desc *desc, flexkv_space **out)
{
    struct fk_instance *in;
    int rc = fk_instance_open(fk_local_node(pub), desc, 0, &in);

    if (!rc)
        *out = &in->pub;
    return rc;
}

/* ---- namespaces ---- */

int fk_local_namespace_open(flexkv_space *pub, const char *const *parts, size_t n_parts,
                            flexkv_namespace **out)
{
    struct fk_instance *in = fk_local_instance(pub);
    struct fk_node *node = in->space->node;
    fk_autofree char *name = fk_join_parts(parts, n_parts);
    struct fk_namespace *ns = calloc(1, sizeof(*ns)), *seen;

    if (!name || !ns) {
        free(ns);
        return fk_api_fail(-ENOMEM, "out of memory");
    }
    ns->pub.space = pub;
    ns->instance = in;
    ns->pub.seed = fk_key_seed(pub->fingerprint, sizeof(pub->fingerprint), parts, n_parts);
    pthread_mutex_lock(&node->lock);
    for (seen = in->namespaces; seen && strcmp(seen->name, name); seen = seen->next)
        ;
    if (!seen) {
        ns->group = fk_space_group_of(in->space, n_parts ? parts[0] : "");
        ns->name = fk_steal(name);
        ns->next = in->namespaces;
        in->namespaces = seen = ns;
        ns = NULL;
    }
    pthread_mutex_unlock(&node->lock);
    free(ns);
    *out = &seen->pub;
    return 0;
}

/* ---- memory of workers in this process ---- */

int fk_check_regions(const flexkv_region *r, size_t n, uint32_t rank, uint64_t *slice_bytes)
{
    uint64_t bytes = 0;

    for (size_t i = 0; i < n; i++) {
        if (!r[i].base || !r[i].page_bytes || !r[i].pages || r[i].stride < r[i].page_bytes)
            return fk_api_fail(-EINVAL, "rank %u, region %zu: base, page_bytes and pages must be "
                               "set, and stride be at least page_bytes", rank, i);
        if (r[i].pages != r[0].pages)
            return fk_api_fail(-EINVAL, "rank %u: region %zu has %llu pages, region 0 has %llu",
                               rank, i, (unsigned long long)r[i].pages,
                               (unsigned long long)r[0].pages);
        if (__builtin_add_overflow(bytes, r[i].page_bytes, &bytes))
            return fk_api_fail(-EINVAL, "rank %u: sizes overflow", rank);
    }
    *slice_bytes = bytes;
    return 0;
}

static int check_rank(const struct fk_instance *in, uint32_t rank)
{
    if (in->remote)
        return fk_api_fail(-EINVAL, "space %s was opened for agents of other processes (workers); it "
                           "takes no regions of this one", in->space->name);
    if (rank >= in->n_workers)
        return fk_api_fail(-EINVAL, "rank %u: space %s has %u", rank, in->space->name,
                           in->n_workers);
    return 0;
}

static int make_worker(struct fk_worker *w, const struct fk_space *space, const flexkv_region *regions,
                       size_t n)
{
    struct fk_copy_pool pool = { .base = fk_pool_base(space->pool), .bytes = fk_pool_bytes(space->pool),
                                 .slot_bytes = space->slot_bytes,
                                 .slice_offset = w->slice * space->slice_bytes,
                                 .how = fk_node_copy_options(space->node),
                                 .sums = { fk_space_sums(space, 0, w->slice), space->ranks } };
    char why[300];

    w->regions = malloc(n * sizeof(*regions));
    if (!w->regions)
        return fk_api_fail(-ENOMEM, "out of memory");
    memcpy(w->regions, regions, n * sizeof(*regions));
    int rc = fk_copier_create(w->regions, (uint32_t)n, fk_node_copy_threads(space->node), &w->copier, why,
                              sizeof(why));
    if (rc)
        fk_api_fail(rc, "rank %u of space %s: %s", w->slice, space->name, why);
    else if ((rc = fk_copier_attach(w->copier, &pool)))
        fk_api_fail(rc, "rank %u of space %s: the cpu tier can't be used for copies", w->slice, space->name);
    if (rc)
        free_worker(w);
    return rc;
}

int fk_local_regions_register(flexkv_space *pub, uint32_t rank, const flexkv_region *regions,
                              size_t n)
{
    struct fk_instance *in = fk_local_instance(pub);
    struct fk_node *node = in->space->node;
    uint64_t bytes;
    int rc = check_rank(in, rank);

    if (!rc)
        rc = fk_check_regions(regions, n, rank, &bytes);
    if (rc)
        return rc;
    if (bytes != in->space->slice_bytes)
        return fk_api_fail(-EINVAL, "rank %u: the regions' pages add up to %llu bytes, a slice of "
                           "space %s has %llu", rank, (unsigned long long)bytes, in->space->name,
                           (unsigned long long)in->space->slice_bytes);
    struct fk_worker w = { .slice = rank, .replicas = 1 };
    rc = make_worker(&w, in->space, regions, n);
    if (rc)
        return rc;
    pthread_mutex_lock(&node->lock);
    if (in->worker[rank].copier) {
        rc = fk_api_fail(-EEXIST, "rank %u of space %s is registered already", rank,
                         in->space->name);
    } else {
        in->worker[rank] = w;
        fk_worker_added(in, rank, regions[0].pages);
    }
    pthread_mutex_unlock(&node->lock);
    if (rc)
        free_worker(&w);
    return rc;
}

int fk_local_regions_unregister(flexkv_space *pub, uint32_t rank)
{
    struct fk_instance *in = fk_local_instance(pub);
    struct fk_node *node = in->space->node;
    int rc = check_rank(in, rank);

    if (rc)
        return rc;
    pthread_mutex_lock(&node->lock);
    if (!in->worker[rank].copier || in->worker[rank].leaving) {
        pthread_mutex_unlock(&node->lock);
        return fk_api_fail(-ENOENT, "rank %u of space %s is not registered", rank,
                           in->space->name);
    }
    fk_worker_removed(in, rank);
    fk_node_unlock(node);
    pthread_mutex_lock(&node->lock);
    while (!fk_core_instance_idle(node->core, in->id))
        pthread_cond_wait(&node->idle, &node->lock);    /* the agent in this process always ends */
    struct fk_worker gone = in->worker[rank];
    in->worker[rank] = (struct fk_worker){ 0 };
    find_min_pages(in);
    pthread_mutex_unlock(&node->lock);
    free_worker(&gone);
    return 0;
}
