/*
 * events_rig.h - what the tests of KV events share: puts that name their blocks, and a subscriber that
 * believes every event and checks that it makes sense. Included after api_rig.h or process_rig.h, with
 * TOKENS_PER_BLOCK and MAX_CHAIN.
 */
#ifndef FK_TESTS_EVENTS_RIG_H
#define FK_TESTS_EVENTS_RIG_H

/* A block's engine hash and tokens, by chain and position. */
static inline uint64_t hash_of(uint32_t chain, uint32_t i)
{
    uint64_t rng = (uint64_t)chain << 32 | (i + 1);

    return fk_rng_next(&rng);
}

static inline void tokens_of(uint32_t chain, uint32_t first, uint32_t n, uint32_t *tokens)
{
    for (uint32_t i = 0; i < n * TOKENS_PER_BLOCK; i++)
        tokens[i] = chain * 1000003 + first * TOKENS_PER_BLOCK + i;
}

#ifdef FK_TESTS_API_RIG_H
/* Puts blocks [first, n) of the chain, with their names, into ns. */
static inline flexkv_completion put_named_in(struct api *a, flexkv_namespace *ns, uint32_t chain,
                                             uint32_t first, uint32_t n)
{
    struct api other = { .ns = ns };
    flexkv_key keys[MAX_CHAIN];
    uint32_t pages[MAX_CHAIN], tokens[MAX_CHAIN * TOKENS_PER_BLOCK];
    uint64_t hashes[MAX_CHAIN], op;
    flexkv_op_args args = args_from(0, pages);

    chain_of(&other, chain, keys, n);
    tokens_of(chain, first, n - first, tokens);
    for (uint32_t i = first; i < n; i++) {
        fill_page(a, pages[i - first], keys[i]);
        hashes[i - first] = hash_of(chain, i);
    }
    args.event_hashes = hashes;
    args.event_tokens = tokens;
    args.event_parent = first ? hash_of(chain, first - 1) : 0;
    if (flexkv_put(ns, keys, n, first, &args, &op))
        fail_msg("%s", flexkv_last_error());
    return wait_for(a, op);
}

static inline flexkv_completion put_named(struct api *a, uint32_t chain, uint32_t n)
{
    return put_named_in(a, a->ns, chain, 0, n);
}
#endif

/* ---- a router that believes what it is told ---- */

enum { ROUTER_MAX = 4096 };
struct router {
    struct { uint64_t hash; uint8_t medium; char salt[32], lora[32]; } block[ROUTER_MAX];
    uint32_t n, stored, removed;
};

static inline int router_find(const struct router *r, uint64_t hash, uint8_t medium)
{
    for (uint32_t i = 0; i < r->n; i++)
        if (r->block[i].hash == hash && r->block[i].medium == medium)
            return (int)i;
    return -1;
}

/* Is it the block that its hash says, tokens and parent too? */
static inline void check_content(const flexkv_event *e)
{
    assert_int_equal(e->n_tokens, TOKENS_PER_BLOCK);
    for (uint32_t chain = 0; chain < 64; chain++) {
        for (uint32_t i = 0; i < MAX_CHAIN; i++) {
            uint32_t tokens[TOKENS_PER_BLOCK];
            if (hash_of(chain, i) != e->hash)
                continue;
            tokens_of(chain, i, 1, tokens);
            assert_memory_equal(tokens, e->tokens, sizeof(tokens));
            assert_int_equal(e->root, i == 0);
            if (i)
                assert_int_equal(e->parent, hash_of(chain, i - 1));
            return;
        }
    }
    fail_msg("a hash that nobody gave");
}

static inline void router_believe(struct router *r, const flexkv_event *e)
{
    int at = router_find(r, e->hash, e->medium);

    if (e->kind == FLEXKV_EVENT_STORED) {
        check_content(e);
        assert_true(at < 0);                    /* once for each residency */
        assert_true(r->n < ROUTER_MAX);
        r->block[r->n].hash = e->hash;
        r->block[r->n].medium = e->medium;
        snprintf(r->block[r->n].salt, 32, "%s", e->cache_salt ? e->cache_salt : "-");
        snprintf(r->block[r->n].lora, 32, "%s", e->lora_name ? e->lora_name : "-");
        r->n++;
        r->stored++;
    } else {
        assert_int_equal(e->kind, FLEXKV_EVENT_REMOVED);
        assert_true(at >= 0);
        r->block[at] = r->block[--r->n];
        r->removed++;
    }
}

/* All there is; portions of `max`. */
static inline uint32_t router_take(struct router *r, flexkv_events *ev, size_t max)
{
    flexkv_event e[64];
    uint32_t all = 0;
    int n;

    while ((n = flexkv_events_take(ev, e, max)) > 0) {
        for (int i = 0; i < n; i++)
            router_believe(r, &e[i]);
        all += (uint32_t)n;
    }
    if (n < 0)
        fail_msg("%s", flexkv_last_error());
    return all;
}

static inline uint32_t router_count(const struct router *r, uint32_t chain, uint8_t medium)
{
    uint32_t n = 0;

    while (n < MAX_CHAIN && router_find(r, hash_of(chain, n), medium) >= 0)
        n++;
    return n;
}

static inline bool events_wait(flexkv_events *ev, int timeout_ms)
{
    struct pollfd p = { .fd = flexkv_events_fd(ev), .events = POLLIN };

    return poll(&p, 1, timeout_ms) == 1;
}

#endif
