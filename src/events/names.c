/* names.c - see names.h. */
#include "events/names.h"

int fk_names_create(uint32_t tokens_per_block, uint32_t cpu_slots, uint32_t ssd_slots,
                    struct fk_names **out)
{
    struct fk_names *n = calloc(1, sizeof(*n));

    if (!n)
        return -ENOMEM;
    n->tokens_per_block = tokens_per_block;
    n->cpu_slots = cpu_slots;
    n->ssd_slots = ssd_slots;
    n->name = calloc(cpu_slots, sizeof(*n->name));
    n->tokens = calloc((size_t)cpu_slots * tokens_per_block, sizeof(*n->tokens));
    n->ssd_hash = calloc(fk_max(ssd_slots, 1u), sizeof(*n->ssd_hash));
    if (!n->name || !n->tokens || !n->ssd_hash) {
        fk_names_destroy(n);
        return -ENOMEM;
    }
    *out = n;
    return 0;
}

void fk_names_destroy(struct fk_names *n)
{
    if (!n)
        return;
    free(n->name);
    free(n->tokens);
    free(n->ssd_hash);
    free(n);
}
