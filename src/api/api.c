/* api.c - flexkv.h's node, space and operation calls: arguments, keys, and on to the kind of node
 * the handle belongs to. See handle.h. */
#include <ctype.h>
#include <stdio.h>

#include "api/handle.h"
#include "events/labels.h"

_Static_assert(sizeof(flexkv_key) == sizeof(struct fk_key), "one key type");
#define internal_keys(k) ((const struct fk_key *)(const void *)(k))

FLEXKV_API void flexkv_node_close(flexkv_node *node)
{
    if (node)
        node->vt->close(node);
}

FLEXKV_API int flexkv_node_fd(flexkv_node *node)
{
    return node->vt->fd(node);
}

FLEXKV_API int flexkv_node_status(flexkv_node *node, char **json)
{
    return node->vt->status(node, json);
}

/* ---- spaces ---- */

static bool name_ok(const char *name)
{
    size_t n = strlen(name);

    if (!n || n >= FK_NAME_MAX || name[0] == '.')
        return false;
    for (; *name; name++)
        if (!isalnum((unsigned char)*name) && !strchr("_.-", *name))
            return false;
    return true;
}

int fk_check_space_desc(const flexkv_space_desc *d)
{
    if (!name_ok(d->name))
        return fk_api_fail(-EINVAL, "space name \"%.80s\": 1 to 63 of A-Z a-z 0-9 _ . - are allowed",
                           d->name);
    if (!d->tokens_per_block || !d->ranks || d->ranks > 4096)
        return fk_api_fail(-EINVAL, "space %s: tokens_per_block and ranks (1 to 4096) must be "
                           "greater than 0", d->name);
    if (!d->slice_bytes && !d->workers)
        return fk_api_fail(-EINVAL, "space %s: slice_bytes must be greater than 0 where no agents "
                           "(workers) are waited for", d->name);
    if (d->workers && (d->workers < d->ranks || d->workers > 4096))
        return fk_api_fail(-EINVAL, "space %s: %u workers can't hold the slices of %u ranks",
                           d->name, d->workers, d->ranks);
    if (d->slice_bytes > UINT32_MAX / d->ranks)
        return fk_api_fail(-EINVAL, "space %s: a block of %u x %llu bytes is larger than 4 GiB",
                           d->name, d->ranks, (unsigned long long)d->slice_bytes);
    if (strlen(d->instance) >= FK_INSTANCE_NAME_MAX)
        return fk_api_fail(-EINVAL, "instance name \"%.40s...\": at most %d bytes are allowed",
                           d->instance, FK_INSTANCE_NAME_MAX - 1);
    return 0;
}

FLEXKV_API int flexkv_space_open(flexkv_node *node, const flexkv_space_desc *desc,
                                 flexkv_space **out)
{
    flexkv_space_desc d = { .struct_bytes = sizeof(d) };

    if (desc->struct_bytes < offsetof(flexkv_space_desc, instance) ||
        desc->struct_bytes > sizeof(d))
        return fk_api_fail(-EINVAL, "flexkv_space_desc: struct_bytes is not set");
    memcpy(&d, desc, desc->struct_bytes);
    d.name = d.name ? d.name : "default";
    d.instance = d.instance ? d.instance : "";
    int rc = fk_check_space_desc(&d);
    return rc ? rc : node->vt->space_open(node, &d, out);
}

char *fk_join_parts(const char *const *parts, size_t n)
{
    size_t bytes = 1;
    char *text, *at;

    for (size_t i = 0; i < n; i++)
        bytes += strlen(parts[i]) + 24;
    at = text = malloc(bytes);
    if (!text)
        return NULL;
    *at = '\0';
    for (size_t i = 0; i < n; i++)
        at += sprintf(at, "%zu:%s,", strlen(parts[i]), parts[i]);
    return text;
}

FLEXKV_API int flexkv_namespace_open(flexkv_space *s, const char *const *parts, size_t n_parts,
                                     flexkv_namespace **out)
{
    return s->node->vt->namespace_open(s, parts, n_parts, out);
}

FLEXKV_API int flexkv_namespace_label(flexkv_namespace *ns, const char *lora_name,
                                      const char *cache_salt)
{
    if ((lora_name && strlen(lora_name) > FK_LABEL_TEXT_MAX) ||
        (cache_salt && strlen(cache_salt) > FK_LABEL_TEXT_MAX))
        return fk_api_fail(-EINVAL, "LoRA name and cache salt may have %d bytes at most",
                           FK_LABEL_TEXT_MAX);
    return ns->space->node->vt->namespace_label(ns, lora_name, cache_salt);
}

FLEXKV_API int flexkv_space_set_compute_rate(flexkv_space *space, double tokens_per_second)
{
    if (!(tokens_per_second >= 0 && tokens_per_second < 1e12))
        return fk_api_fail(-EINVAL, "tokens_per_second must be 0 or greater");
    return space->node->vt->set_compute_rate(space, tokens_per_second);
}

FLEXKV_API int flexkv_regions_register(flexkv_space *s, uint32_t rank, const flexkv_region *regions,
                                       size_t n)
{
    return s->node->vt->regions_register(s, rank, regions, n);
}

FLEXKV_API int flexkv_regions_unregister(flexkv_space *s, uint32_t rank)
{
    return s->node->vt->regions_unregister(s, rank);
}

/* ---- keys ---- */

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

/* ---- operations ---- */

/* Programs built with an earlier header have shorter structs; what they lack is 0. */
static int take_args(const flexkv_op_args *a, flexkv_op_args *out)
{
    *out = (flexkv_op_args){ 0 };
    if (!a || a->struct_bytes < offsetof(flexkv_op_args, flags) || a->struct_bytes > sizeof(*out))
        return fk_api_fail(-EINVAL, "flexkv_op_args: struct_bytes is not set");
    memcpy(out, a, a->struct_bytes);
    if (out->flags & ~(uint32_t)(FLEXKV_OP_LAYERWISE | FLEXKV_OP_EARLY))
        return fk_api_fail(-EINVAL, "flexkv_op_args: flags 0x%x are not known", out->flags);
    if (out->counter && !(out->flags & FLEXKV_OP_LAYERWISE))
        return fk_api_fail(-EINVAL, "flexkv_op_args: counter is for gets with FLEXKV_OP_LAYERWISE");
    return 0;
}

FLEXKV_API int flexkv_match(flexkv_namespace *ns, const flexkv_key *keys, size_t n,
                            flexkv_match_result *out)
{
    if (n > UINT32_MAX)
        return fk_api_fail(-EINVAL, "more than 2^32 keys");
    return ns->space->node->vt->match(ns, internal_keys(keys), (uint32_t)n, out);
}

FLEXKV_API int flexkv_release(flexkv_node *node, uint64_t lease)
{
    return node->vt->release(node, lease);
}

FLEXKV_API int flexkv_get(flexkv_node *node, uint64_t lease, uint32_t first, uint32_t n,
                          const flexkv_op_args *args, uint64_t *op)
{
    uint64_t unused;
    flexkv_op_args a;
    int rc = take_args(args, &a);

    if (!rc && n && !a.pages)
        rc = fk_api_fail(-EINVAL, "pages is NULL");
    return rc ? rc : node->vt->get(node, lease, first, n, &a, op ? op : &unused);
}

FLEXKV_API int flexkv_put(flexkv_namespace *ns, const flexkv_key *keys, uint32_t n, uint32_t first,
                          const flexkv_op_args *args, uint64_t *op)
{
    uint64_t unused;
    flexkv_op_args a;
    int rc = take_args(args, &a);

    if (rc)
        return rc;
    if (first > n)
        return fk_api_fail(-EINVAL, "first %u is beyond the %u keys", first, n);
    if (n > first && !a.pages)
        return fk_api_fail(-EINVAL, "pages is NULL");
    if (a.event_hashes && !a.event_tokens)
        return fk_api_fail(-EINVAL, "event_hashes without event_tokens");
    return ns->space->node->vt->put(ns, internal_keys(keys), n, first, &a, op ? op : &unused);
}

FLEXKV_API int flexkv_prefetch(flexkv_namespace *ns, const flexkv_key *keys, uint32_t n,
                               const flexkv_op_args *args, uint64_t *op)
{
    uint64_t unused;
    flexkv_op_args a;
    int rc = take_args(args, &a);

    return rc ? rc : ns->space->node->vt->prefetch(ns, internal_keys(keys), n, &a,
                                                   op ? op : &unused);
}

FLEXKV_API int flexkv_cancel(flexkv_node *node, uint64_t op)
{
    return node->vt->cancel(node, op);
}

FLEXKV_API int flexkv_poll(flexkv_node *node, flexkv_completion *out, int max, int timeout_ms)
{
    if (max <= 0)
        return fk_api_fail(-EINVAL, "max must be greater than 0");
    return node->vt->poll(node, out, max, timeout_ms);
}

FLEXKV_API int flexkv_reset(flexkv_node *node)
{
    return node->vt->reset(node);
}

FLEXKV_API int flexkv_node_stats(flexkv_node *node, flexkv_stats *out)
{
    size_t bytes = out->struct_bytes;
    flexkv_stats st = { .struct_bytes = sizeof(st) };

    if (bytes < sizeof(size_t) || bytes > sizeof(st))
        return fk_api_fail(-EINVAL, "flexkv_stats: struct_bytes is not set");
    int rc = node->vt->stats(node, &st);
    if (rc)
        return rc;
    memcpy(out, &st, bytes);
    out->struct_bytes = bytes;
    return 0;
}
