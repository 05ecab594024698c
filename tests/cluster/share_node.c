/*
 * share_node.c - a node in a cluster under load, for tests/e2e/test_sharing.py: matches, gets and puts random prompts of
 * a population that all nodes share, without a pause; every byte got is checked, every wait has a deadline.
 *
 *     share_node SEED CHAINS CPU_BLOCKS OPTION=VALUE...
 *
 * Each line on standard input is answered with one: "stats": counts; "status": the node's JSON on one line; "pause",
 * "go"; "has CHAIN BLOCKS": how many of the chain match; "put CHAIN BLOCKS". End of input: closes and exits with 0.
 * Exit 3: something took too long, 4: a wrong byte; standard error says what.
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/util.h"
#include "flexkv/flexkv.h"

enum { TPB = 4, PAGE = 8192, BLOCKS = 24, TENANTS = 2 };
#define OP_MS 4000u
#define PATIENCE_US 8000000u            /* an operation's deadline, and what a crowded machine adds */

static flexkv_node *node;
static flexkv_namespace *tenants[TENANTS];
static unsigned char *pages;
static uint64_t rng, n_gets, n_puts, got_blocks, failed_gets;
static uint32_t chains;
static pthread_mutex_t turn = PTHREAD_MUTEX_INITIALIZER;        /* one operation at a time */
static bool paused;

static void die(int code, const char *what)
{
    fprintf(stderr, "share_node: %s: %s\n", what, flexkv_last_error());
    fflush(stderr);
    _exit(code);
}

static void keys_of(uint32_t tenant, uint32_t chain, flexkv_key *keys)
{
    uint32_t tokens[BLOCKS * TPB];

    for (uint32_t i = 0; i < BLOCKS * TPB; i++)
        tokens[i] = chain * 1000003u + i;
    if (flexkv_keys_from_tokens(tenants[tenant], NULL, tokens, BLOCKS * TPB, keys) != BLOCKS)
        die(2, "keys");
}

static void fill(unsigned char *page, flexkv_key key)
{
    uint64_t r = key.lo ^ key.hi * 3;

    for (size_t i = 0; i < PAGE / 8; i++)
        ((uint64_t *)(void *)page)[i] = fk_rng_next(&r);
}

static bool holds(const unsigned char *page, flexkv_key key)
{
    uint64_t r = key.lo ^ key.hi * 3;

    for (size_t i = 0; i < PAGE / 8; i++)
        if (((const uint64_t *)(const void *)page)[i] != fk_rng_next(&r))
            return false;
    return true;
}

static flexkv_completion wait_for(uint64_t op)
{
    uint64_t until = fk_clock_us() + PATIENCE_US;
    flexkv_completion c;

    while (fk_clock_us() < until)
        if (flexkv_poll(node, &c, 1, 100) == 1 && c.op == op)
            return c;
    die(3, "an operation did not end by its deadline");
    return c;
}

static void get(uint32_t tenant, const flexkv_key *keys, uint32_t n)
{
    uint32_t page[BLOCKS];
    flexkv_op_args args = { .struct_bytes = sizeof(args), .pages = page, .timeout_ms = OP_MS };
    flexkv_match_result m;
    uint64_t op, began = fk_clock_us();

    if (flexkv_match(tenants[tenant], keys, n, &m))
        die(2, "match");
    if (fk_clock_us() - began > PATIENCE_US)
        die(3, "a match took too long");
    if (!m.blocks)
        return;
    for (uint32_t i = 0; i < m.blocks; i++) {
        page[i] = i;
        memset(pages + (size_t)i * PAGE, 0x5a, PAGE);
    }
    if (flexkv_get(node, m.lease, 0, m.blocks, &args, &op))
        die(2, "get");
    flexkv_completion c = wait_for(op);
    for (uint32_t i = 0; i < c.blocks_ok; i++)
        if (!holds(pages + (size_t)i * PAGE, keys[i]))
            die(4, "a block has wrong bytes");
    n_gets++;
    got_blocks += c.blocks_ok;
    failed_gets += c.blocks_ok < m.blocks;
}

static void put(uint32_t tenant, const flexkv_key *keys, uint32_t n)
{
    uint32_t page[BLOCKS];
    flexkv_op_args args = { .struct_bytes = sizeof(args), .pages = page, .timeout_ms = OP_MS };
    uint64_t op;

    for (uint32_t i = 0; i < n; i++) {
        page[i] = i;
        fill(pages + (size_t)i * PAGE, keys[i]);
    }
    if (flexkv_put(tenants[tenant], keys, n, 0, &args, &op))
        die(2, "put");
    (void)wait_for(op);
    n_puts++;
}

static void *load(void *arg)
{
    flexkv_key keys[BLOCKS];

    for (;;) {
        pthread_mutex_lock(&turn);
        if (!paused) {
            uint32_t tenant = fk_rng_below(&rng, TENANTS), n = 1 + fk_rng_below(&rng, BLOCKS);
            keys_of(tenant, fk_rng_below(&rng, chains), keys);
            get(tenant, keys, n);
            if (fk_rng_below(&rng, 3) == 0)
                put(tenant, keys, n);
        }
        pthread_mutex_unlock(&turn);
        usleep(paused ? 2000 : 300);
    }
    return arg;
}

static void answer(char *line)
{
    flexkv_stats st = { .struct_bytes = sizeof(st) };
    flexkv_key keys[BLOCKS];
    flexkv_match_result m;
    char *json;
    unsigned chain, n;

    pthread_mutex_lock(&turn);
    if (sscanf(line, "has %u %u", &chain, &n) == 2) {
        keys_of(0, chain, keys);
        if (flexkv_match(tenants[0], keys, n, &m))
            die(2, "match");
        if (m.lease)
            flexkv_release(node, m.lease);
        printf("%u %u\n", m.blocks, m.peer_blocks);
    } else if (sscanf(line, "put %u %u", &chain, &n) == 2) {
        keys_of(0, chain, keys);
        put(0, keys, n);
        puts("ok");
    } else if (strncmp(line, "status", 6) == 0 && flexkv_node_status(node, &json) == 0) {
        for (char *p = json; *p; p++)
            *p = *p == '\n' ? ' ' : *p;
        puts(json);
        free(json);
    } else if (strncmp(line, "stats", 5) == 0 && flexkv_node_stats(node, &st) == 0) {
        printf("gets=%llu puts=%llu blocks=%llu failed=%llu fetched=%llu errors=%llu\n", (unsigned long long)n_gets,
               (unsigned long long)n_puts, (unsigned long long)got_blocks, (unsigned long long)failed_gets,
               (unsigned long long)st.peer.stored_blocks, (unsigned long long)st.peer.errors);
    } else {
        paused = strncmp(line, "pause", 5) == 0;
        puts("ok");
    }
    fflush(stdout);
    pthread_mutex_unlock(&turn);
}

static void open_node(int argc, char **argv)
{
    flexkv_space_desc desc = { .struct_bytes = sizeof(desc), .name = "share", .fingerprint = "m", .fingerprint_bytes = 1,
                               .tokens_per_block = TPB, .ranks = 1, .slice_bytes = PAGE };
    flexkv_region region;
    flexkv_config *config;
    flexkv_space *space;

    if (flexkv_config_create(&config) || flexkv_config_set(config, "cpu_cache_blocks", argv[3]))
        die(2, "config");
    for (int i = 4; i < argc; i++) {
        char *value = strchr(argv[i], '=');
        *value = '\0';
        if (flexkv_config_set(config, argv[i], value + 1))
            die(2, "config");
    }
    if (flexkv_node_open(config, &node) || flexkv_space_open(node, &desc, &space))
        die(2, "open");
    flexkv_config_destroy(config);
    for (uint32_t i = 0; i < TENANTS; i++) {
        const char *name[] = { "tenant", i ? "b" : "a" };
        if (flexkv_namespace_open(space, name, 2, &tenants[i]))
            die(2, "namespace");
    }
    pages = aligned_alloc(4096, (size_t)BLOCKS * PAGE);
    region = (flexkv_region){ pages, PAGE, PAGE, BLOCKS };
    if (!pages || flexkv_regions_register(space, 0, &region, 1))
        die(2, "regions");
}

int main(int argc, char **argv)
{
    pthread_t thread;
    char line[200];

    if (argc < 4)
        return 2;
    rng = strtoull(argv[1], NULL, 10);
    chains = (uint32_t)strtoul(argv[2], NULL, 10);
    open_node(argc, argv);
    puts("ready");
    fflush(stdout);
    if (pthread_create(&thread, NULL, load, NULL))
        return 2;
    while (fgets(line, sizeof(line), stdin))
        answer(line);
    pthread_mutex_lock(&turn);          /* no operation is under way any more */
    flexkv_node_close(node);
    return 0;
}
