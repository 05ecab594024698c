/* policies.h - private to src/index: the policies that have a file of their own. */
#ifndef FK_INDEX_POLICIES_H
#define FK_INDEX_POLICIES_H

#include "index/policy.h"

extern const struct fk_policy_ops fk_policy_s3fifo, fk_policy_arc, fk_policy_auto, fk_policy_density;

void fk_policy_free_state(struct fk_lane *lane);

/*
 * A ghost list: a memory of keys lately evicted, without their entries. One 32-bit word per
 * slot of the lane, found by hash: 16 bits of fingerprint, 16 bits of time. A newer ghost
 * overwrites an older one in the same place. The clock is the number of evictions, so a ghost
 * older than `span` evictions is forgotten.
 */
struct fk_ghost { uint32_t *words; uint32_t n, clock, shift; };

int fk_ghost_init(struct fk_ghost *g, uint32_t capacity);
void fk_ghost_fini(struct fk_ghost *g);
void fk_ghost_add(struct fk_ghost *g, const struct fk_entry *e);
/* Was it evicted within the last `span` evictions? It is forgotten then. */
bool fk_ghost_take(struct fk_ghost *g, const struct fk_entry *e, uint32_t span);

#endif
