/*
 * team.h - a few threads that share one list of blocks to copy. The caller works too; blocks
 * are handed out in order in small portions, so what has been copied when the work is
 * cancelled is always a leading part. One caller at a time.
 */
#ifndef FK_COPY_TEAM_H
#define FK_COPY_TEAM_H

#include <stdatomic.h>

#include "copy/copy.h"

struct fk_team;

/* threads: in all, the caller included; >= 1. */
int fk_team_create(unsigned threads, struct fk_team **out);
void fk_team_destroy(struct fk_team *team);
/* Returns how many leading blocks were copied: all, or fewer when *cancelled became true or
 * the backend failed (*status then has its -errno). */
uint32_t fk_team_copy(struct fk_team *team, const struct fk_copy_backend *backend,
                      const struct fk_copy_target *target, const struct fk_copy_blocks *blocks,
                      _Atomic bool *cancelled, int *status);

#endif
