/*
 * crash_node.c - the program that test_crash.py kills: a node with a small cpu tier and an SSD tier,
 * used by several threads at random, every byte got checked. Public API only.
 *
 *   crash_node run  DIRS SEED     works until it is killed; prints "open BLOCKS" once it is open
 *   crash_node list DIRS          prints "open BLOCKS"; "named BLOCKS" that were announced as KV events; for
 *                                 each chain "chain KNOWN KEY KEY ..."; then gets it all: "checked GOT FAILED"
 *
 * Exit status: 1 the node refused (the reason on stderr), 3 wrong bytes or events, 4 no completion in time.
 */
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>

#include "base/util.h"
#include "flexkv/flexkv.h"

enum { CHAINS = 120, LEN = 16, SHARED = 6, RANKS = 2, SLICE = 16384, TOKENS_PER_BLOCK = 4,
       THREADS = 3, PAGES_EACH = 2 * LEN, PAGES = THREADS * PAGES_EACH, CPU_BLOCKS = 56,
       SSD_BLOCKS = 500, WAIT_MS = 60000 };

static flexkv_node *node;
static flexkv_space *space;
static flexkv_namespace *ns;
static unsigned char *memory[RANKS];

static void must(int rc, const char *what)
{
    if (rc < 0) {
        fprintf(stderr, "%s: %s\n", what, flexkv_last_error());
        exit(1);
    }
}

static void set(flexkv_config *c, const char *key, const char *value)
{
    must(flexkv_config_set(c, key, value), key);
}

static void open_node(const char *dirs)
{
    char cpu[16], ssd[16];
    flexkv_config *c;
    flexkv_space_desc d = { .struct_bytes = sizeof(d), .fingerprint = "crash", .fingerprint_bytes = 5,
                            .tokens_per_block = TOKENS_PER_BLOCK, .ranks = RANKS,
                            .slice_bytes = SLICE };
    flexkv_stats st = { .struct_bytes = sizeof(st) };

    snprintf(cpu, sizeof(cpu), "%d", CPU_BLOCKS);
    snprintf(ssd, sizeof(ssd), "%d", SSD_BLOCKS);
    must(flexkv_config_create(&c), "config");
    set(c, "cpu_cache_blocks", cpu);
    set(c, "ssd_cache_blocks", ssd);
    set(c, "ssd_cache_dir", dirs);
    set(c, "log_level", "WARNING");
    set(c, "enable_kv_events", "1");
    must(flexkv_node_open(c, &node), "open");
    flexkv_config_destroy(c);
    must(flexkv_space_open(node, &d, &space), "space");
    must(flexkv_namespace_open(space, NULL, 0, &ns), "namespace");
    must(flexkv_namespace_label(ns, "lora", "salt"), "label");
    for (uint32_t r = 0; r < RANKS; r++) {
        memory[r] = malloc((size_t)PAGES * SLICE);
        flexkv_region region = { memory[r], SLICE, SLICE, PAGES };
        must(flexkv_regions_register(space, r, &region, 1), "register");
    }
    must(flexkv_node_stats(node, &st), "stats");
    printf("open %llu\n", (unsigned long long)st.blocks);
    fflush(stdout);
}

/* Four chains each have their first blocks in common. */
static void tokens_of(uint32_t chain, uint32_t *tokens)
{
    for (uint32_t i = 0; i < LEN * TOKENS_PER_BLOCK; i++)
        tokens[i] = i + 1000 * (i < SHARED * TOKENS_PER_BLOCK ? chain / 4 : 1000 + chain);
}

static void keys_of(uint32_t chain, flexkv_key *keys)
{
    uint32_t tokens[LEN * TOKENS_PER_BLOCK];

    tokens_of(chain, tokens);
    flexkv_keys_from_tokens(ns, NULL, tokens, LEN * TOKENS_PER_BLOCK, keys);
}

static uint64_t *words_of(uint32_t rank, uint32_t page)
{
    return (uint64_t *)(void *)(memory[rank] + (size_t)page * SLICE);
}

static void fill(uint32_t page, flexkv_key key)
{
    for (uint32_t r = 0; r < RANKS; r++) {
        uint64_t rng = key.lo + key.hi * 3 + r;
        for (uint32_t i = 0; i < SLICE / 8; i++)
            words_of(r, page)[i] = fk_rng_next(&rng);
    }
}

static void check(uint32_t page, flexkv_key key)
{
    for (uint32_t r = 0; r < RANKS; r++) {
        uint64_t rng = key.lo + key.hi * 3 + r;
        for (uint32_t i = 0; i < SLICE / 8; i++) {
            if (words_of(r, page)[i] != fk_rng_next(&rng)) {
                fprintf(stderr, "WRONG BYTES: rank %u, word %u of key %016llx\n", r, i,
                        (unsigned long long)key.lo);
                _exit(3);
            }
        }
    }
}

/* ---- operations: any thread takes any completion ---- */

struct request { _Atomic bool ended; flexkv_completion c; };

static flexkv_completion wait_request(struct request *own)
{
    for (int waited = 0; !atomic_load(&own->ended); waited++) {
        flexkv_completion c[4];
        int n = flexkv_poll(node, c, 4, 10);
        for (int i = 0; i < n; i++) {
            struct request *r = c[i].user_data;
            r->c = c[i];
            atomic_store(&r->ended, true);
        }
        if (waited > WAIT_MS / 10 && n == 0) {
            fprintf(stderr, "no completion in time\n");
            _exit(4);
        }
    }
    return own->c;
}

static uint32_t get_chain(const flexkv_key *keys, uint32_t n, uint32_t first_page, bool give_back,
                          uint32_t *known)
{
    struct request r = { 0 };
    uint32_t pages[LEN];
    flexkv_op_args args = { .struct_bytes = sizeof(args), .pages = pages, .user_data = &r };
    flexkv_match_result m;

    must(flexkv_match(ns, keys, n, &m), "match");
    *known = m.blocks;
    if (!m.blocks || give_back) {
        if (m.lease)
            must(flexkv_release(node, m.lease), "release");
        return 0;
    }
    for (uint32_t i = 0; i < LEN; i++)
        pages[i] = first_page + i;
    must(flexkv_get(node, m.lease, 0, m.blocks, &args, NULL), "get");
    flexkv_completion c = wait_request(&r);
    for (uint32_t i = 0; i < c.blocks_ok; i++)
        check(pages[i], keys[i]);
    return c.blocks_ok;
}

/* What the engine calls a block: half of its key. */
static uint64_t hash_of(flexkv_key key)
{
    return key.lo ^ key.hi;
}

static void put_chain(uint32_t chain, const flexkv_key *keys, uint32_t n, uint32_t first_page)
{
    struct request r = { 0 };
    uint32_t pages[LEN], tokens[LEN * TOKENS_PER_BLOCK];
    uint64_t hashes[LEN];
    flexkv_op_args args = { .struct_bytes = sizeof(args), .pages = pages, .user_data = &r,
                            .event_hashes = hashes, .event_tokens = tokens };

    tokens_of(chain, tokens);
    for (uint32_t i = 0; i < n; i++) {
        pages[i] = first_page + i;
        hashes[i] = hash_of(keys[i]);
        fill(pages[i], keys[i]);
    }
    must(flexkv_put(ns, keys, n, 0, &args, NULL), "put");
    wait_request(&r);
}

static void prefetch_chain(const flexkv_key *keys, uint32_t n)
{
    struct request r = { 0 };
    flexkv_op_args args = { .struct_bytes = sizeof(args), .user_data = &r };

    must(flexkv_prefetch(ns, keys, n, &args, NULL), "prefetch");
    wait_request(&r);
}

/* ---- modes ---- */

struct worker { pthread_t thread; uint32_t first_page; uint64_t rng; };

static void *work(void *arg)
{
    struct worker *w = arg;
    flexkv_key keys[LEN];
    uint32_t known;

    for (;;) {
        uint32_t n = 1 + fk_rng_below(&w->rng, LEN), what = fk_rng_below(&w->rng, 200);
        uint32_t chain = fk_rng_below(&w->rng, CHAINS);
        keys_of(chain, keys);
        if (what < 100)
            put_chain(chain, keys, n, w->first_page);
        else if (what < 180)
            get_chain(keys, n, w->first_page + LEN, what % 8 == 0, &known);
        else if (what < 199 || fk_rng_below(&w->rng, 20))
            prefetch_chain(keys, n);
        else
            must(flexkv_reset(node), "reset");
    }
    return NULL;
}

static void run(uint64_t seed)
{
    static struct worker w[THREADS];

    for (uint32_t i = 0; i < THREADS; i++) {
        w[i].first_page = i * PAGES_EACH;
        w[i].rng = seed * THREADS + i;
        if (pthread_create(&w[i].thread, NULL, work, &w[i]))
            exit(1);
    }
    for (uint32_t i = 0; i < THREADS; i++)
        pthread_join(w[i].thread, NULL);
}

/* Is this what was said of the block when it was put? */
static bool event_is_right(const flexkv_event *e)
{
    uint32_t tokens[LEN * TOKENS_PER_BLOCK];
    flexkv_key keys[LEN];

    for (uint32_t c = 0; c < CHAINS; c++) {
        keys_of(c, keys);
        for (uint32_t i = 0; i < LEN; i++) {
            if (hash_of(keys[i]) != e->hash)
                continue;
            tokens_of(c, tokens);
            return e->kind == FLEXKV_EVENT_STORED && e->medium == FLEXKV_MEDIUM_STORAGE &&
                   e->root == (i == 0) && (!i || e->parent == hash_of(keys[i - 1])) &&
                   memcmp(e->tokens, tokens + i * TOKENS_PER_BLOCK, TOKENS_PER_BLOCK * 4) == 0 &&
                   e->lora_name && !strcmp(e->lora_name, "lora") && e->cache_salt &&
                   !strcmp(e->cache_salt, "salt");
        }
    }
    return false;
}

static void list_events(void)
{
    flexkv_event e[64];
    flexkv_events *ev;
    uint32_t all = 0;
    int n;

    must(flexkv_events_open(node, space, &ev), "events");
    while ((n = flexkv_events_take(ev, e, 64)) > 0) {
        for (int i = 0; i < n; i++) {
            if (!event_is_right(&e[i])) {
                fprintf(stderr, "WRONG EVENT: hash %016llx\n", (unsigned long long)e[i].hash);
                _exit(3);
            }
        }
        all += (uint32_t)n;
    }
    must(n, "take");
    flexkv_events_close(ev);
    printf("named %u\n", all);
}

static void list(void)
{
    flexkv_key keys[LEN];
    uint32_t known, got = 0, failed = 0;

    for (uint32_t c = 0; c < CHAINS; c++) {
        keys_of(c, keys);
        get_chain(keys, LEN, 0, true, &known);
        printf("chain %u", known);
        for (uint32_t i = 0; i < LEN; i++) {
            printf(" ");
            for (uint32_t b = 0; b < sizeof(keys[i]); b++)
                printf("%02x", ((unsigned char *)&keys[i])[b]);
        }
        printf("\n");
    }
    for (uint32_t c = 0; c < CHAINS; c++) {
        keys_of(c, keys);
        uint32_t ok = get_chain(keys, LEN, 0, false, &known);
        got += ok;
        failed += known - ok;
    }
    printf("checked %u %u\n", got, failed);
}

int main(int argc, char **argv)
{
    if (argc < 3) {
        fprintf(stderr, "usage: crash_node run|list DIRS [SEED]\n");
        return 2;
    }
    open_node(argv[2]);
    if (strcmp(argv[1], "run") == 0) {
        run(argc > 3 ? strtoull(argv[3], NULL, 10) : 1);
    } else {
        list_events();
        list();
    }
    flexkv_node_close(node);
    for (uint32_t r = 0; r < RANKS; r++)
        free(memory[r]);
    return 0;
}
