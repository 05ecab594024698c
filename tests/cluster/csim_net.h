/*
 * csim_net.h - between the cluster's state machines and the simulated Redis: connections that break and come back,
 * commands and answers that take their time, a Redis that is gone, hung, or whose clock is another. Used by the
 * cluster simulator (csim.c) and by that of whole nodes (tests/net).
 *
 * A client is a process with its two connections and its clock, which drifts. The owner fills what is said to be
 * his and steps: the earliest of cs_first and cs_wakeup is what happens next. Random numbers come from his
 * generator, in the order of what happens.
 */
#ifndef CSIM_NET_H
#define CSIM_NET_H

#include "csim.h"

#define CS_CLIENTS 12u

struct cs_conn {
    bool up;
    uint64_t gen, retry_us, last_us[2];
};

struct cs_client {                      /* the owner's, but for conn */
    struct fk_cluster *c;
    bool alive, paused;                 /* paused: as by SIGSTOP */
    int64_t drift_ppm, offset_us;
    const uint64_t *cut_until_us;       /* its machine's way to Redis */
    struct cs_conn conn[FK_CONNS];
};

struct cs_msg {
    uint64_t at_us, seq, gen, until_us, seen;
    uint32_t client, conn;
    struct fk_command *cmd;             /* to Redis */
    struct fk_reply *reply;             /* or back */
    bool blocked;
};

struct cs_net {
    struct sr *redis;
    bool down, quiet;                   /* quiet: no latency out of the ordinary */
    uint64_t frozen_until_us;
    int64_t offset_ms, ppm;             /* Redis' clock */
    uint64_t now_us, seq, *rng;
    FK_VEC(struct cs_msg) msgs;
    struct cs_client client[CS_CLIENTS];
    void (*serve)(void *ctx, uint32_t client);  /* something has come from Redis: it may go on */
    void *ctx;
};

/* A process' clock at the time us; and when its clock says us. */
uint64_t cs_local(const struct cs_client *p, uint64_t us);
uint64_t cs_real(const struct cs_client *p, uint64_t us);
int64_t cs_redis_ms(const struct cs_net *n);

void cs_client_start(struct cs_net *n, uint32_t i);     /* its connections open in a moment */
void cs_client_gone(struct cs_net *n, uint32_t i);      /* what comes for it is lost */
void cs_send(struct cs_net *n, uint32_t i);             /* whatever it wants to say now */
void cs_open(struct cs_net *n, uint32_t i);             /* connections that are due again */
void cs_close(struct cs_net *n, uint32_t i, uint32_t conn);
uint64_t cs_wakeup(const struct cs_net *n, uint32_t i); /* its state machine's, and of its connections */

/* The next message and when it is due; SIZE_MAX: none. */
size_t cs_first(struct cs_net *n, uint64_t *at_us);
void cs_deliver(struct cs_net *n, size_t msg);
void cs_free(struct cs_net *n);

#endif
