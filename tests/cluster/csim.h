/*
 * csim.h - the cluster simulator: whole clusters in one thread, from a seed. The real state machines
 * (src/cluster), a simulated Redis (csim_redis.c), the way there and back (csim_net.c), and nodes that put, evict, die,
 * hang and come back (csim.c). Clocks of nodes and Redis drift. What is checked: see csim.c.
 */
#ifndef CSIM_H
#define CSIM_H

#include <stdio.h>

#include "cluster/cluster.h"

struct sr;                              /* a simulated Redis */

struct sr *sr_new(void);
void sr_free(struct sr *r);
/* Forgets everything, but for keys that are not ours. */
void sr_flush(struct sr *r);
/* It is full, and throws some key of ours out (maxmemory-policy volatile-*). */
void sr_evict(struct sr *r, uint64_t random);
void sr_lose_record(struct sr *r, const char *node);
/* A replica lags behind: keep a copy now, become the copy later. */
void sr_copy(struct sr *r);
void sr_become_copy(struct sr *r);
/*
 * Carries out a command at the time now_ms of its own clock. NULL: it blocks (XREAD), ask again after
 * something has changed, or with last = true when its time is up.
 */
struct fk_reply *sr_do(struct sr *r, const struct fk_command *cmd, int64_t now_ms, bool last);
void sr_reply_free(struct fk_reply *reply);
/* How long an XREAD may block, ms. */
uint32_t sr_block_ms(const struct fk_command *cmd);
/* NULL, or which rule its keys break: ours without a TTL, others' touched, a stream too long. */
const char *sr_check(struct sr *r, int64_t now_ms);
uint64_t sr_commands(const struct sr *r);
uint64_t sr_changes(const struct sr *r);    /* grows with each write */

#endif
