/* space.c - spaces: geometry, quotas, memory and store; what is found on SSD. */
#include <ctype.h>
#include <stdio.h>
#include <sys/stat.h>

#include <openssl/sha.h>

#include "api/node_impl.h"
#include "base/clock.h"

#define SLOT_ALIGN 64u

/* ---- geometry ---- */

/* What makes blocks of two spaces different, in 16 bytes: the model's identity as the engine
 * gives it, the geometry, and how keys are made. */
static void make_fingerprint(struct fk_space *s, const flexkv_space_desc *d)
{
    static const char tag[] = "flexkv-space-1";
    unsigned char digest[SHA256_DIGEST_LENGTH];
    uint64_t words[4] = { d->tokens_per_block, d->ranks, d->slice_bytes, s->scheme };
    size_t at = sizeof(tag) + sizeof(words);
    unsigned char *all = malloc(at + d->fingerprint_bytes);

    if (!all)
        return;
    memcpy(all, tag, sizeof(tag));
    memcpy(all + sizeof(tag), words, sizeof(words));
    if (d->fingerprint_bytes)
        memcpy(all + at, d->fingerprint, d->fingerprint_bytes);
    SHA256(all, at + d->fingerprint_bytes, digest);
    memcpy(s->fingerprint, digest, sizeof(s->fingerprint));
    free(all);
}

static uint64_t slots_for(const struct fk_node *node, uint64_t bytes, int64_t blocks,
                          const struct fk_space *s)
{
    uint64_t n = blocks ? (uint64_t)blocks : bytes / s->slot_bytes;

    return n / (uint64_t)node->set->max_spaces;
}

/* ---- quotas ---- */

static uint32_t quota_blocks(const struct fk_quota *q, uint32_t slots, uint64_t slot_bytes,
                             uint32_t otherwise)
{
    switch (q->kind) {
    case FK_QUOTA_BYTES: return (uint32_t)fk_min(q->bytes / slot_bytes, (uint64_t)slots);
    case FK_QUOTA_FRACTION: return (uint32_t)(q->fraction * slots);
    default: return otherwise;
    }
}

static uint32_t tag_of_name(const char *name)
{
    unsigned char digest[SHA256_DIGEST_LENGTH];
    uint32_t tag;

    SHA256((const unsigned char *)name, strlen(name), digest);
    memcpy(&tag, digest, sizeof(tag));
    return tag | 1;                 /* 0: no namespace of its own */
}

static struct fk_core_quota quota_of(const struct fk_space *s, const struct fk_namespace_quota *ns,
                                     const uint32_t slots[FK_TIERS])
{
    struct fk_core_quota quota = { .tag = tag_of_name(ns->name) };

    for (int t = 0; t < FK_TIERS; t++) {
        quota.max[t] = quota_blocks(&ns->max, slots[t], s->slot_bytes, UINT32_MAX);
        quota.guaranteed[t] = quota_blocks(&ns->guaranteed, slots[t], s->slot_bytes, 0);
    }
    return quota;
}

/* Before anything is built: do the quotas fit the tiers? */
static int check_quotas(const struct fk_space *s, const uint32_t slots[FK_TIERS])
{
    const struct fk_namespace_list *list = &s->node->set->namespaces;
    uint64_t promised[FK_TIERS] = { 0 };

    for (size_t i = 0; i < list->count; i++) {
        struct fk_core_quota q = quota_of(s, &list->item[i], slots);
        for (int t = 0; t < FK_TIERS; t++) {
            promised[t] += q.guaranteed[t];
            if (promised[t] > slots[t] || q.guaranteed[t] > q.max[t])
                return fk_api_fail(-EINVAL, "namespaces: what is guaranteed to %s and those before "
                                   "it is more than the %s tier has, or more than its maximum",
                                   list->item[i].name, t == FK_TIER_CPU ? "cpu" : "SSD");
        }
    }
    return 0;
}

static int add_groups(struct fk_space *s, const uint32_t slots[FK_TIERS])
{
    struct fk_node *node = s->node;

    for (size_t i = 0; i < node->set->namespaces.count; i++) {
        const struct fk_namespace_quota *ns = &node->set->namespaces.item[i];
        struct fk_core_quota quota = quota_of(s, ns, slots);
        struct fk_group_name g = { .space = s->id, .name = ns->name, .unshared = ns->unshared };
        int rc = fk_core_group_add(node->core, s->id, &quota, &g.group);
        if (rc || fk_vec_push(&node->groups, g))
            return fk_api_fail(rc ? rc : -ENOMEM, "namespaces: no room for the quota of %s",
                               ns->name);
    }
    return 0;
}

uint32_t fk_space_group_of(const struct fk_space *s, const char *namespace_name)
{
    for (size_t i = 0; i < s->node->groups.len; i++) {
        const struct fk_group_name *g = &s->node->groups.data[i];
        if (g->space == s->id && strcmp(g->name, namespace_name) == 0)
            return g->group;
    }
    return fk_core_space_default_group(s->node->core, s->id);
}

/* ---- opening ---- */

void fk_space_close_store(struct fk_space *s)
{
    if (s->ssd) {
        fk_rates_save(s, 0, true);
        fk_ssd_close(s->ssd);
    }
    s->ssd = NULL;
}

void fk_space_free(struct fk_space *s, bool keep_memory)
{
    fk_space_close_store(s);
    if (!keep_memory)
        fk_pool_destroy(s->pool);
    else
        fk_pool_leave(s->pool);
    fk_names_close(s);
    free(s);
}

static void pool_populated(void *arg)
{
    struct fk_space *s = arg;

    if (s->node->has_io_thread)
        fk_node_io_wake(s->node);
}

static int open_pool(struct fk_space *s, uint32_t cpu_slots)
{
    const struct fk_settings *set = s->node->set;
    struct fk_pool_params params = {
        .bytes = (uint64_t)cpu_slots * s->slot_bytes,
        .pages = (enum fk_pool_pages)set->cpu_memory,
        .hugepage_bytes = set->hugepage_size_bytes,
        .numa_nodes = set->numa_nodes,
        .shared = s->node->server != NULL,
        .populated = pool_populated, .arg = s,
    };
    char error[400];

    if (set->gpu_checksums) {
        s->sums_offset = fk_round_up(params.bytes, 4096);
        params.bytes = s->sums_offset + (uint64_t)cpu_slots * s->ranks * sizeof(uint64_t);
    }
    s->pool_bytes = params.bytes;
    int rc = fk_pool_create(&params, &s->pool, error, sizeof(error));
    return rc ? fk_api_fail(rc, "space %s: %s", s->name, error) : 0;
}
_Static_assert((int)FK_CPU_MEMORY_PLAIN == (int)FK_POOL_PLAIN, "kinds of memory in one order");

static int open_store(struct fk_space *s, uint32_t ssd_slots)
{
    const struct fk_settings *set = s->node->set;
    struct fk_ssd_params params = {
        .name = s->name, .dirs = (const char *const *)set->ssd_cache_dir.item,
        .n_dirs = (uint32_t)set->ssd_cache_dir.count, .block_bytes = s->block_bytes,
        .n_slots = ssd_slots, .recreate = set->ssd_recreate, .direct = set->ssd_direct_io,
        .io_chunk_bytes = (uint32_t)fk_min(set->ssd_io_chunk_bytes, (uint64_t)FK_GIB),
        .device_errors = (uint32_t)set->ssd_device_errors,
        .device_retry_us = (uint64_t)set->ssd_device_retry_ms * 1000,
        .engine = s->node->engine,
    };
    char error[500];

    if (!ssd_slots)
        return 0;
    memcpy(params.fingerprint, s->fingerprint, sizeof(params.fingerprint));
    int rc = fk_ssd_open(&params, &s->ssd, error, sizeof(error));
    return rc ? fk_api_fail(rc, "%s", error) : 0;
}

struct found_list { FK_VEC(struct fk_core_found) v; int rc; };

static void remember_found(void *arg, const struct fk_ssd_found *f)
{
    struct found_list *list = arg;
    struct fk_core_found c = { .key = f->key, .parent = f->parent, .seq = f->seq,
                               .slot = f->slot, .tag = f->tag };

    if (fk_vec_push(&list->v, c))
        list->rc = -ENOMEM;
}

static int read_table(struct fk_space *s, struct found_list *list)
{
    int rc = s->ssd ? fk_ssd_recover(s->ssd, remember_found, list) : 0;

    rc = rc ? rc : list->rc;
    return rc ? fk_api_fail(rc, "space %s: reading the slot table: %s", s->name, strerror(-rc)) : 0;
}

static int recover(struct fk_space *s, const struct found_list *list)
{
    int64_t placed = fk_core_recover(s->node->core, s->id, list->v.data, (uint32_t)list->v.len);

    if (placed < 0)
        return fk_api_fail((int)placed, "space %s: recovery: %s", s->name, strerror((int)-placed));
    if (list->v.len)
        fk_info("space %s: %lld of %zu blocks on SSD are there again", s->name, (long long)placed,
                list->v.len);
    return 0;
}

/* With the lock: the core's space, its groups, what was on SSD. */
static int add_to_core(struct fk_space *s, const uint32_t slots[FK_TIERS],
                       const struct found_list *list)
{
    struct fk_core_space_params params = {
        .cpu_slots = slots[FK_TIER_CPU], .ssd_slots = slots[FK_TIER_SSD],
        .ssd_dirs = s->ssd ? (uint32_t)s->node->set->ssd_cache_dir.count : 0,
        .ssd_stripe_slots = s->ssd ? fk_ssd_stripe_slots(s->ssd) : 0,
        .probe_blocks = fk_rates_probe_blocks(s, slots[FK_TIER_CPU]),
    };
    int rc = fk_core_space_add(s->node->core, &params, &s->id);

    if (rc)
        return fk_api_fail(rc, "space %s: no memory for an index of %u + %u blocks", s->name,
                           slots[FK_TIER_CPU], slots[FK_TIER_SSD]);
    rc = add_groups(s, slots);
    if (!rc && s->node->sharing)
        rc = fk_node_share_space(s);
    else if (!rc && s->node->remote)
        rc = fk_core_space_elsewhere(s->node->core, s->id);
    if (rc)
        return rc;
    fk_rates_recall(s);
    return s->ssd ? recover(s, list) : 0;
}

/* With the io_lock: everything that may wait for files and memory is done before the core's
 * lock is taken. */
static int build(struct fk_space *s)
{
    struct fk_node *node = s->node;
    const struct fk_settings *set = node->set;
    uint64_t cpu = slots_for(node, set->cpu_cache_bytes, set->cpu_cache_blocks, s);
    uint64_t ssd = node->engine ? slots_for(node, set->ssd_cache_bytes, set->ssd_cache_blocks, s) : 0;
    uint32_t n_spaces = 0;

    for (struct fk_space *o = node->spaces; o; o = o->next)
        n_spaces++;
    if (n_spaces >= (uint32_t)set->max_spaces)
        return fk_api_fail(-ENOSPC, "space %s: the node has its %u spaces already; raise max_spaces",
                           s->name, n_spaces);
    if (!cpu)
        return fk_api_fail(-EINVAL, "space %s: cpu_cache_gb has no room for one block of %llu bytes",
                           s->name, (unsigned long long)s->slot_bytes);
    if (cpu > 1u << 30 || ssd > 1u << 30)
        return fk_api_fail(-EINVAL, "space %s: more than 2^30 blocks in a tier; lower %s", s->name,
                           cpu > 1u << 30 ? "cpu_cache_gb" : "ssd_cache_gb");
    uint32_t slots[FK_TIERS] = { (uint32_t)cpu, (uint32_t)ssd };
    s->cpu_slots = slots[FK_TIER_CPU];
    s->ssd_slots = slots[FK_TIER_SSD];
    struct found_list list = { 0 };
    int rc = check_quotas(s, slots);
    if (!rc)
        rc = open_pool(s, slots[FK_TIER_CPU]);
    if (!rc)
        rc = open_store(s, slots[FK_TIER_SSD]);
    if (!rc && node->remote)
        rc = fk_node_remote_space(s);
    if (!rc && node->events)
        rc = fk_names_open(s);
    if (!rc)
        rc = read_table(s, &list);
    if (!rc && s->names_file)
        fk_names_recover(s, list.v.data, list.v.len);
    if (!rc) {
        pthread_mutex_lock(&node->lock);
        rc = add_to_core(s, slots, &list);
        if (!rc && node->remote)
            rc = fk_node_remote_added(s);
        if (!rc) {
            s->next = node->spaces;
            node->spaces = s;
        }
        fk_node_unlock(node);
    }
    fk_vec_free(&list.v);
    return rc;
}

struct fk_space *fk_node_space(const struct fk_node *node, uint32_t id)
{
    struct fk_space *s = node->spaces;

    while (s && s->id != id)
        s = s->next;
    return s;
}

static struct fk_space *find_space(struct fk_node *node, const char *name)
{
    struct fk_space *s = node->spaces;

    while (s && strcmp(s->name, name))
        s = s->next;
    return s;
}

static struct fk_space *new_space(struct fk_node *node, const flexkv_space_desc *desc)
{
    struct fk_space *s = calloc(1, sizeof(*s));

    if (!s)
        return NULL;
    s->node = node;
    s->store_id = FK_NONE;
    snprintf(s->name, sizeof(s->name), "%s", desc->name);
    s->tokens_per_block = desc->tokens_per_block;
    s->ranks = desc->ranks;
    s->slice_bytes = desc->slice_bytes;
    s->block_bytes = desc->slice_bytes * desc->ranks;
    s->slot_bytes = fk_round_up(s->block_bytes, node->engine ? FK_SSD_ALIGN : SLOT_ALIGN);
    s->scheme = (enum fk_key_scheme)node->set->key_hash;
    make_fingerprint(s, desc);
    return s;
}
_Static_assert((int)FK_KEY_HASH_XXH3 == (int)FK_KEY_XXH3, "key schemes in one order");

int fk_space_get(struct fk_node *node, const flexkv_space_desc *desc, struct fk_space **out)
{
    struct fk_space *s = new_space(node, desc), *seen = find_space(node, desc->name);
    int rc = 0;

    if (!s)
        return fk_api_fail(-ENOMEM, "out of memory");
    if (!seen)
        rc = build(s);
    else if (memcmp(seen->fingerprint, s->fingerprint, sizeof(s->fingerprint)) != 0)
        rc = fk_api_fail(-EEXIST, "space %s is open with another geometry or fingerprint (another "
                         "model, dtype, block size or parallel layout); give this one another name, "
                         "or another server_recv_port", s->name);
    if (!rc)
        *out = seen ? seen : s;
    if (rc || seen)
        fk_space_free(s, false);
    return rc;
}
