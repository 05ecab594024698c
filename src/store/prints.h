/*
 * prints.h - which blocks a space of a store has: a set of 64-bit prints in FK_STORE_PARTS parts, each an open
 * table under a lock of its own. A part is the unit of a listing: it is replaced as a whole, and what has changed while
 * the listing was under way is applied to the new one.
 *
 *   part 0x3f   [ . | p | p | . | . | p | . | p ]   at most three quarters full: 11 to 21 bytes a block
 *
 * Any thread.
 */
#ifndef FK_STORE_PRINTS_H
#define FK_STORE_PRINTS_H

#include <stdbool.h>
#include <stdint.h>

#include "base/key.h"

struct fk_prints;

int fk_prints_create(struct fk_prints **out);           /* -ENOMEM */
void fk_prints_destroy(struct fk_prints *p);

bool fk_prints_has(const struct fk_prints *p, struct fk_key key);
/* 1: it was in (add), or out (remove). -ENOMEM: not noted, so the block is not seen. */
int fk_prints_add(struct fk_prints *p, struct fk_key key);
int fk_prints_remove(struct fk_prints *p, struct fk_key key);
void fk_prints_clear(struct fk_prints *p);

/* One listing of a part at a time. What is added or removed between these two calls counts. */
void fk_prints_begin(struct fk_prints *p, uint32_t part);
/* keys NULL: the listing came to nothing, all stays. -ENOMEM: as that. */
int fk_prints_end(struct fk_prints *p, uint32_t part, const struct fk_key *keys, size_t n);

uint64_t fk_prints_count(const struct fk_prints *p);
uint64_t fk_prints_bytes(const struct fk_prints *p);

#endif
