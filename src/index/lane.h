/* lane.h - private to src/index: lanes, the sets of blocks that may be evicted now (lane.c). */
#ifndef FK_INDEX_LANE_H
#define FK_INDEX_LANE_H

#include "index/index.h"

int fk_lane_init(struct fk_lane *lane, struct fk_index *ix, enum fk_tier tier, uint32_t group,
                 uint32_t capacity);
void fk_lane_fini(struct fk_lane *lane);
void fk_lane_set_entries(struct fk_lane *lane, struct fk_entry *entries);
uint64_t fk_lane_bytes(const struct fk_lane *lane);
/* Puts the entry into its lanes' heaps, or takes it out, as its state now demands. */
void fk_lane_refresh(struct fk_index *ix, uint32_t entry);
/* The entry leaves its heap; its parent takes the place if it has become evictable. */
void fk_lane_leave(struct fk_lane *lane, struct fk_entry *e, uint32_t parent);

#endif
