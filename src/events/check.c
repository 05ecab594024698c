/* check.c - see check.h. */
#include "events/check.h"

#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>

const char *const fk_rule_names[FK_RULES] = {
    [FK_RULE_FRAMES] = "frames", [FK_RULE_BATCH] = "batch", [FK_RULE_GAP] = "gap",
    [FK_RULE_ORDER] = "order", [FK_RULE_RANK] = "rank", [FK_RULE_MEDIUM] = "medium",
    [FK_RULE_TOKENS] = "tokens", [FK_RULE_BLOCK_SIZE] = "block-size", [FK_RULE_CHAIN] = "chain",
    [FK_RULE_TWICE] = "twice", [FK_RULE_UNKNOWN] = "unknown", [FK_RULE_ORPHAN] = "orphan",
    [FK_RULE_DIFFERENT] = "different", [FK_RULE_PASSED_OVER] = "passed-over",
};

static void found(struct fk_check *c, enum fk_rule rule, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));
static void found(struct fk_check *c, enum fk_rule rule, const char *fmt, ...)
{
    char text[256];
    va_list args;

    c->found[rule]++;
    if (!c->finding)
        return;
    va_start(args, fmt);
    vsnprintf(text, sizeof(text), fmt, args);
    va_end(args);
    c->finding(c->arg, rule, text);
}

void fk_check_init(struct fk_check *c, fk_finding_fn *finding, void *arg)
{
    *c = (struct fk_check){ .finding = finding, .arg = arg };
}

static void forget_all(struct fk_check *c)
{
    for (size_t i = 0; i < c->ranks.len; i++)
        fk_mirror_free(&c->ranks.data[i].mirror);
    c->ranks.len = 0;
}

void fk_check_free(struct fk_check *c)
{
    forget_all(c);
    fk_vec_free(&c->ranks);
}

uint64_t fk_check_findings(const struct fk_check *c)
{
    uint64_t sum = 0;

    for (int i = 0; i < FK_RULES; i++)
        sum += c->found[i];
    return sum;
}

static struct fk_mirror *mirror_of(struct fk_check *c, const struct fk_stream_batch *b)
{
    for (size_t i = 0; i < c->ranks.len; i++)
        if (c->ranks.data[i].has_rank == b->has_rank && c->ranks.data[i].rank == b->rank)
            return &c->ranks.data[i].mirror;
    struct fk_check_rank rank = { .has_rank = b->has_rank, .rank = b->rank };
    return fk_vec_push(&c->ranks, rank) ? NULL : &c->ranks.data[c->ranks.len - 1].mirror;
}

/* ---- numbers ---- */

static int check_seq(struct fk_check *c, uint64_t seq)
{
    if (!c->begun) {
        c->begun = true;
        c->whole = seq == 0;
    } else if (seq < c->next_seq) {
        found(c, FK_RULE_ORDER, "number %" PRIu64 " after %" PRIu64 ": routers pass over it", seq,
              c->next_seq - 1);
        return -EBADMSG;
    } else if (seq > c->next_seq) {
        found(c, FK_RULE_GAP, "%" PRIu64 " batches are missing before %" PRIu64, seq - c->next_seq,
              seq);
        c->missed += seq - c->next_seq;
        c->whole = false;
    }
    c->next_seq = seq + 1;
    return 0;
}

/* ---- events ---- */

static void check_attributes(struct fk_check *c, const struct fk_stream_event *ev)
{
    bool kind_ok = !ev->spec_kind.data || fk_text_is(ev->spec_kind, "full_attention") ||
                   fk_text_is(ev->spec_kind, "mla_attention");

    if (!kind_ok)
        found(c, FK_RULE_PASSED_OVER, "kv_cache_spec_kind %.*s", (int)fk_min(ev->spec_kind.len, 40u),
              ev->spec_kind.data);
    if (ev->has_group && ev->group != 0 && !ev->spec_kind.data)
        found(c, FK_RULE_PASSED_OVER, "group_idx %" PRId64 " without kv_cache_spec_kind", ev->group);
    if (ev->locality.data && !fk_text_is(ev->locality, "LOCAL"))
        found(c, FK_RULE_PASSED_OVER, "locality %.*s", (int)fk_min(ev->locality.len, 40u),
              ev->locality.data);
    if (ev->has_ownership)
        found(c, FK_RULE_PASSED_OVER, "an ownership");
}

static bool twice_in_event(const uint64_t *hash, size_t n, uint64_t *which)
{
    struct fk_mirror seen = { 0 };
    bool twice = false, differs;

    for (size_t i = 0; i < n && !twice; i++) {
        struct fk_mirror_desc d = { .hash = hash[i], .root = true };
        twice = fk_mirror_store(&seen, &d, FK_MIRROR_DEVICE, &differs) == 1;
        *which = hash[i];
    }
    fk_mirror_free(&seen);
    return twice;
}

static bool check_chain(struct fk_check *c, const uint64_t *hash, const struct fk_stream_event *ev)
{
    uint64_t which;

    if (ev->n_hashes > 1 && twice_in_event(hash, ev->n_hashes, &which)) {
        found(c, FK_RULE_CHAIN, "hash %016" PRIx64 " stands twice in one event: routers drop it", which);
        return false;
    }
    if (ev->has_parent && ev->n_hashes && hash[0] == ev->parent) {
        found(c, FK_RULE_CHAIN, "hash %016" PRIx64 " is its own parent: routers drop it", hash[0]);
        return false;
    }
    return true;
}

/* How many of the event's blocks a router takes. */
static size_t usable_blocks(struct fk_check *c, const struct fk_stream_event *ev)
{
    if (ev->n_tokens != (uint64_t)ev->n_hashes * ev->block_size)
        found(c, FK_RULE_TOKENS, "%zu token ids for %zu blocks of %u", ev->n_tokens, ev->n_hashes,
              ev->block_size);
    return fk_min(ev->n_hashes, ev->n_tokens / ev->block_size);
}

static int store_one(struct fk_check *c, struct fk_mirror *m, const struct fk_mirror_desc *d,
                     enum fk_mirror_tier tier)
{
    bool differs;

    if (tier == FK_MIRROR_DEVICE && !d->root) {
        const struct fk_mirror_block *parent = fk_mirror_find(m, d->parent);
        if (c->whole && (!parent || !(parent->tiers & 1u << FK_MIRROR_DEVICE)))
            found(c, FK_RULE_ORPHAN, "hash %016" PRIx64 " on the device without its parent %016" PRIx64
                  ": routers drop it", d->hash, d->parent);
    }
    int rc = fk_mirror_store(m, d, tier, &differs);
    if (rc == 1)
        found(c, FK_RULE_TWICE, "hash %016" PRIx64 " stored where it is already", d->hash);
    if (differs)
        found(c, FK_RULE_DIFFERENT, "hash %016" PRIx64 " has other tokens or another parent than before",
              d->hash);
    return rc < 0 ? rc : 0;
}

static int check_stored(struct fk_check *c, struct fk_mirror *m, const struct fk_stream_batch *b,
                        const struct fk_stream_event *ev, enum fk_mirror_tier tier)
{
    const uint64_t *hash = fk_stream_hashes(b, ev);
    struct fk_mirror_desc d = {
        .root = !ev->has_parent, .parent = ev->parent, .n_tokens = ev->block_size,
        .lora_name = ev->lora_name.data, .lora_len = ev->lora_name.len,
        .cache_salt = ev->cache_salt.data, .salt_len = ev->cache_salt.len,
    };
    int rc = 0;

    if (c->block_size && ev->block_size != c->block_size)
        found(c, FK_RULE_BLOCK_SIZE, "block_size %u, it was %u", ev->block_size, c->block_size);
    c->block_size = ev->block_size;
    size_t n = usable_blocks(c, ev);
    if (!check_chain(c, hash, ev))
        return 0;
    for (size_t i = 0; i < n && !rc; i++) {
        d.hash = hash[i];
        d.tokens = fk_stream_tokens(b, ev) + i * ev->block_size;
        rc = store_one(c, m, &d, tier);
        d.parent = hash[i];
        d.root = false;
    }
    c->stored += n;
    return rc;
}

static void check_removed(struct fk_check *c, struct fk_mirror *m, const struct fk_stream_batch *b,
                          const struct fk_stream_event *ev, enum fk_mirror_tier tier)
{
    const uint64_t *hash = fk_stream_hashes(b, ev);

    for (size_t i = 0; i < ev->n_hashes; i++)
        if (fk_mirror_remove(m, hash[i], tier) && c->whole)
            found(c, FK_RULE_UNKNOWN, "hash %016" PRIx64 " removed where it is not", hash[i]);
    c->removed += ev->n_hashes;
}

static int check_event(struct fk_check *c, struct fk_mirror *m, const struct fk_stream_batch *b,
                       const struct fk_stream_event *ev)
{
    if (ev->type == FK_STREAM_CLEARED) {
        fk_mirror_free(m);
        c->cleared++;
        c->whole = true;
        return 0;
    }
    check_attributes(c, ev);
    int tier = fk_mirror_tier_of(ev->medium.data, ev->medium.len);
    if (tier < 0) {
        found(c, FK_RULE_MEDIUM, "medium \"%.*s\" of %zu blocks: routers pass over them",
              (int)fk_min(ev->medium.len, 40u), ev->medium.data, ev->n_hashes);
        return 0;
    }
    if (ev->type == FK_STREAM_STORED)
        return check_stored(c, m, b, ev, (enum fk_mirror_tier)tier);
    check_removed(c, m, b, ev, (enum fk_mirror_tier)tier);
    return 0;
}

static int check_batch(struct fk_check *c, const struct fk_stream_batch *b)
{
    struct fk_mirror *m = mirror_of(c, b);
    int rc = m ? 0 : -ENOMEM;

    if (b->has_rank && b->rank < 0)
        found(c, FK_RULE_RANK, "data_parallel_rank %" PRId64 ": routers take it for another worker's",
              b->rank);
    for (size_t i = 0; i < b->events.len && !rc; i++)
        rc = check_event(c, m, b, &b->events.data[i]);
    c->batches++;
    return rc;
}

int fk_check_message(struct fk_check *c, const struct fk_frame *frames, size_t n,
                     struct fk_stream_batch *decoded)
{
    if (n != 3) {
        found(c, FK_RULE_FRAMES, "a message of %zu frames; topic, number and payload are wanted", n);
        return -EBADMSG;
    }
    if (frames[1].bytes != 8) {
        found(c, FK_RULE_FRAMES, "a number of %zu bytes; 8 are wanted", frames[1].bytes);
        return -EBADMSG;
    }
    int rc = check_seq(c, fk_get_be64(frames[1].data));
    if (rc)
        return rc;
    rc = fk_stream_decode(frames[2].data, frames[2].bytes, decoded);
    if (rc == -EBADMSG) {
        found(c, FK_RULE_BATCH, "%s: the batch is lost", decoded->why);
        c->whole = false;
    }
    return rc ? rc : check_batch(c, decoded);
}
