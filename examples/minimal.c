/*
 * minimal.c - stores the KV blocks of one prompt and gets them back.
 *   cc minimal.c $(pkg-config --cflags --libs flexkv) -o minimal && ./minimal
 */
#include <flexkv/flexkv.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { TOKENS = 64, TOKENS_PER_BLOCK = 16, BLOCKS = TOKENS / TOKENS_PER_BLOCK, PAGE = 4096 };

static void check(int rc, const char *what)
{
    if (rc < 0) {
        fprintf(stderr, "%s: %s\n", what, flexkv_last_error());
        exit(1);
    }
}

static flexkv_completion wait_for_one(flexkv_node *node)
{
    flexkv_completion c;

    check(flexkv_poll(node, &c, 1, 10000) == 1 ? 0 : -1, "no completion in time");
    return c;
}

int main(void)
{
    flexkv_config *config;
    flexkv_node *node;
    flexkv_space *space;
    flexkv_namespace *ns;

    check(flexkv_config_create(&config), "config");
    check(flexkv_config_set(config, "cpu_cache_gb", "16M"), "cpu_cache_gb");
    check(flexkv_node_open(config, &node), "open");

    /* One layer on one rank: a block is one page of PAGE bytes. */
    flexkv_space_desc desc = { .struct_bytes = sizeof(desc), .fingerprint = "my-model-fp16",
                               .fingerprint_bytes = 13, .tokens_per_block = TOKENS_PER_BLOCK,
                               .ranks = 1, .slice_bytes = PAGE };
    check(flexkv_space_open(node, &desc, &space), "space");
    check(flexkv_namespace_open(space, NULL, 0, &ns), "namespace");

    char *pages = malloc(2 * BLOCKS * PAGE);        /* the engine's KV memory */
    flexkv_region region = { .base = pages, .stride = PAGE, .page_bytes = PAGE, .pages = 2 * BLOCKS };
    check(flexkv_regions_register(space, 0, &region, 1), "register");

    uint32_t tokens[TOKENS], from[BLOCKS], to[BLOCKS];
    flexkv_key keys[BLOCKS];
    for (uint32_t i = 0; i < TOKENS; i++)
        tokens[i] = i;
    for (uint32_t i = 0; i < BLOCKS; i++) {
        from[i] = i;
        to[i] = BLOCKS + i;
        memset(pages + i * PAGE, 'a' + (int)i, PAGE);
    }
    flexkv_keys_from_tokens(ns, NULL, tokens, TOKENS, keys);

    flexkv_op_args put = { .struct_bytes = sizeof(put), .pages = from };
    check(flexkv_put(ns, keys, BLOCKS, 0, &put, NULL), "put");
    printf("stored %u blocks\n", wait_for_one(node).blocks_ok);

    flexkv_match_result m;
    check(flexkv_match(ns, keys, BLOCKS, &m), "match");
    flexkv_op_args get = { .struct_bytes = sizeof(get), .pages = to };
    check(flexkv_get(node, m.lease, 0, m.blocks, &get, NULL), "get");
    printf("got %u of %u blocks\n", wait_for_one(node).blocks_ok, m.blocks);

    int same = memcmp(pages, pages + BLOCKS * PAGE, BLOCKS * PAGE) == 0;
    puts(same ? "bytes are equal" : "bytes are WRONG");
    flexkv_node_close(node);
    flexkv_config_destroy(config);
    free(pages);
    return same ? 0 : 1;
}
