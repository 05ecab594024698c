/*
 * mirror.h - what a receiver of one rank's stream knows: block hash -> what it is, and in which tiers.
 *
 * Used to judge a stream (check.h), and to tell all of it again (`flexkv events --merge`). The tiers
 * are a router's: what it calls device, host, disk and external. Blocks are in a list in the order
 * in which they came, or came back, so parents mostly stand before their children.
 *
 * Memory only, one thread. Part of the program, not of the library.
 */
#ifndef FK_EVENTS_MIRROR_H
#define FK_EVENTS_MIRROR_H

#include "base/util.h"

enum fk_mirror_tier {
    FK_MIRROR_DEVICE, FK_MIRROR_HOST, FK_MIRROR_DISK, FK_MIRROR_EXTERNAL, FK_MIRROR_TIERS
};

struct fk_mirror_block {
    struct fk_mirror_block *before, *after, *next_in_bucket;
    uint64_t hash, parent;
    char *lora_name, *cache_salt;   /* its own, NULL: none */
    uint32_t n_tokens;
    uint8_t tiers;                  /* bits */
    bool root;
    uint32_t tokens[];
};

struct fk_mirror {
    struct fk_mirror_block **bucket;
    size_t n_buckets, blocks;
    size_t in_tier[FK_MIRROR_TIERS];
    struct fk_mirror_block *first, *last;
};

struct fk_mirror_desc {
    uint64_t hash, parent;
    bool root;
    const uint32_t *tokens;
    uint32_t n_tokens;
    const char *lora_name, *cache_salt;
    size_t lora_len, salt_len;
};

void fk_mirror_free(struct fk_mirror *m);           /* and empty, to be used again */
struct fk_mirror_block *fk_mirror_find(const struct fk_mirror *m, uint64_t hash);
/* 0; 1: it is in that tier already; -ENOMEM. *differs: the block is known with other tokens or
 * another parent; the first ones stay. */
int fk_mirror_store(struct fk_mirror *m, const struct fk_mirror_desc *desc, enum fk_mirror_tier tier,
                    bool *differs);
/* 0; 1: it is not in that tier. */
int fk_mirror_remove(struct fk_mirror *m, uint64_t hash, enum fk_mirror_tier tier);
/* Which tier a router means by the name, -1: it passes over such events. Not given: device. */
int fk_mirror_tier_of(const char *medium, size_t len);

#endif
