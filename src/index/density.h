/*
 * density.h - what the past says about when blocks are used again: the model behind `auto`.
 *
 * Each use of a block starts a wait; the wait ends with the next use, or is given up. Waits
 * are counted by class (what kind of block, see policy_auto.c) and by age in half octaves:
 * how many reached the bucket, how many ended in it. From these follows the hit density of a
 * block of some class and age: over the best horizon ahead, the chance of a use per time that
 * its slot is held. (Hit density: Beckmann, Chen, Cidon, NSDI 2018; choosing the best horizon
 * is the Gittins index.) It does not matter whether the block was resident, so that the model
 * also learns what keeping longer would have brought.
 *
 * Only a sample of the keys is followed; ages are in ticks; old counts fade, so it has no
 * constants that a particular load would have to fit. Callers: policy_auto.c, core's lock.
 */
#ifndef FK_INDEX_DENSITY_H
#define FK_INDEX_DENSITY_H

#include <stdint.h>

#include "base/key.h"

/* Classes: 0 to 15 a block at which requests part, by log2 of its uses; then four for each
 * count of turns: the end of a newcomer chain, near its end, further up, and blocks used again. */
#define FK_DENSITY_BRANCHES 16u
#define FK_DENSITY_TURNS 5u
#define FK_DENSITY_CLASSES (FK_DENSITY_BRANCHES + 4 * FK_DENSITY_TURNS)

struct fk_density;

/* capacity: blocks of the tier whose evictions are to be judged. NULL: no memory. */
struct fk_density *fk_density_create(uint32_t capacity);
void fk_density_destroy(struct fk_density *d);
uint64_t fk_density_bytes(const struct fk_density *d);
/* The key was used now; a wait for its next use begins. */
void fk_density_use(struct fk_density *d, struct fk_key key, unsigned class_, uint32_t tick);
/* A request ended: time to fade and to work out the densities, now and then. lru_age: how long an
 * unused block would last under lru now, in ticks; what is shorter than that hardly matters. */
void fk_density_request(struct fk_density *d, uint32_t tick, uint32_t lru_age);
/* Larger: worth more. */
float fk_density_of(const struct fk_density *d, unsigned class_, uint32_t age);
void fk_density_rebase(struct fk_density *d, uint32_t by);

#endif
