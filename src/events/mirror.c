/* mirror.c - see mirror.h. */
#include "events/mirror.h"

#define LEAST_BUCKETS 1024u

void fk_mirror_free(struct fk_mirror *m)
{
    struct fk_mirror_block *b = m->first;

    while (b) {
        struct fk_mirror_block *after = b->after;
        free(b->lora_name);
        free(b->cache_salt);
        free(b);
        b = after;
    }
    free(m->bucket);
    *m = (struct fk_mirror){ 0 };
}

/* Hashes come from others, and may be anything. */
static size_t bucket_of(const struct fk_mirror *m, uint64_t hash)
{
    return fk_rng_next(&hash) & (m->n_buckets - 1);
}

struct fk_mirror_block *fk_mirror_find(const struct fk_mirror *m, uint64_t hash)
{
    struct fk_mirror_block *b = m->n_buckets ? m->bucket[bucket_of(m, hash)] : NULL;

    while (b && b->hash != hash)
        b = b->next_in_bucket;
    return b;
}

static int grow(struct fk_mirror *m)
{
    if (m->blocks < m->n_buckets)
        return 0;
    size_t n = m->n_buckets ? 2 * m->n_buckets : LEAST_BUCKETS;
    struct fk_mirror_block **bucket = calloc(n, sizeof(*bucket));
    if (!bucket)
        return -ENOMEM;
    free(m->bucket);
    m->bucket = bucket;
    m->n_buckets = n;
    for (struct fk_mirror_block *b = m->first; b; b = b->after) {
        size_t i = bucket_of(m, b->hash);
        b->next_in_bucket = bucket[i];
        bucket[i] = b;
    }
    return 0;
}

static void list_add(struct fk_mirror *m, struct fk_mirror_block *b)
{
    b->before = m->last;
    b->after = NULL;
    if (m->last)
        m->last->after = b;
    else
        m->first = b;
    m->last = b;
}

static void list_drop(struct fk_mirror *m, struct fk_mirror_block *b)
{
    if (b->before)
        b->before->after = b->after;
    else
        m->first = b->after;
    if (b->after)
        b->after->before = b->before;
    else
        m->last = b->before;
}

static struct fk_mirror_block *new_block(struct fk_mirror *m, const struct fk_mirror_desc *d)
{
    struct fk_mirror_block *b;

    if (grow(m) || !(b = malloc(sizeof(*b) + (size_t)d->n_tokens * sizeof(*b->tokens))))
        return NULL;
    *b = (struct fk_mirror_block){ .hash = d->hash, .parent = d->parent, .root = d->root,
                                   .n_tokens = d->n_tokens };
    if (d->n_tokens)
        memcpy(b->tokens, d->tokens, (size_t)d->n_tokens * sizeof(*b->tokens));
    b->lora_name = d->lora_len ? strndup(d->lora_name, d->lora_len) : NULL;
    b->cache_salt = d->salt_len ? strndup(d->cache_salt, d->salt_len) : NULL;
    if ((d->lora_len && !b->lora_name) || (d->salt_len && !b->cache_salt)) {
        free(b->lora_name);
        free(b->cache_salt);
        free(b);
        return NULL;
    }
    size_t i = bucket_of(m, b->hash);
    b->next_in_bucket = m->bucket[i];
    m->bucket[i] = b;
    list_add(m, b);
    m->blocks++;
    return b;
}

static bool same_block(const struct fk_mirror_block *b, const struct fk_mirror_desc *d)
{
    return b->root == d->root && (b->root || b->parent == d->parent) && b->n_tokens == d->n_tokens &&
           (!b->n_tokens || !memcmp(b->tokens, d->tokens, (size_t)b->n_tokens * sizeof(*b->tokens)));
}

int fk_mirror_store(struct fk_mirror *m, const struct fk_mirror_desc *desc, enum fk_mirror_tier tier,
                    bool *differs)
{
    struct fk_mirror_block *b = fk_mirror_find(m, desc->hash);

    *differs = b && !same_block(b, desc);
    if (b && b->tiers & 1u << tier)
        return 1;
    if (b) {
        list_drop(m, b);
        list_add(m, b);
    } else if (!(b = new_block(m, desc))) {
        return -ENOMEM;
    }
    b->tiers |= (uint8_t)(1u << tier);
    m->in_tier[tier]++;
    return 0;
}

int fk_mirror_remove(struct fk_mirror *m, uint64_t hash, enum fk_mirror_tier tier)
{
    struct fk_mirror_block *b = fk_mirror_find(m, hash);

    if (!b || !(b->tiers & 1u << tier))
        return 1;
    b->tiers &= (uint8_t)~(1u << tier);
    m->in_tier[tier]--;
    if (b->tiers)
        return 0;
    struct fk_mirror_block **at = &m->bucket[bucket_of(m, hash)];
    while (*at != b)
        at = &(*at)->next_in_bucket;
    *at = b->next_in_bucket;
    list_drop(m, b);
    m->blocks--;
    free(b->lora_name);
    free(b->cache_salt);
    free(b);
    return 0;
}

int fk_mirror_tier_of(const char *medium, size_t len)
{
    static const struct { const char *name; enum fk_mirror_tier tier; } names[] = {
        { "GPU", FK_MIRROR_DEVICE }, { "DEVICE", FK_MIRROR_DEVICE }, { "", FK_MIRROR_DEVICE },
        { "CPU", FK_MIRROR_HOST }, { "CPU_PINNED", FK_MIRROR_HOST }, { "CPU_TIER1", FK_MIRROR_HOST },
        { "CPU_TIER2", FK_MIRROR_DISK }, { "DISK", FK_MIRROR_DISK }, { "NVME", FK_MIRROR_DISK },
        { "STORAGE", FK_MIRROR_DISK }, { "EXTERNAL", FK_MIRROR_EXTERNAL },
        { "NETWORK", FK_MIRROR_EXTERNAL }, { "REMOTE", FK_MIRROR_EXTERNAL },
        { "SHARED", FK_MIRROR_EXTERNAL },
    };

    for (size_t i = 0; i < fk_array_size(names); i++)
        if (strlen(names[i].name) == len && (!len || !memcmp(names[i].name, medium, len)))
            return (int)names[i].tier;
    return -1;
}
