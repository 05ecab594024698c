/*
 * redis.h - the shell around cluster.h: one thread, two connections to Redis, nothing else. It looks
 * for Redis as long as it runs, ever more seldom; a Redis that is slow or gone costs the node nothing.
 *
 * The thread takes *lock for microseconds around calls of the state machine, never across a system
 * call. Whoever calls the state machine otherwise holds the same lock, and calls fk_redis_wake after
 * changes. `scan` is called by the thread without the lock.
 */
#ifndef FK_CLUSTER_REDIS_H
#define FK_CLUSTER_REDIS_H

#include <pthread.h>

#include "cluster/cluster.h"

struct fk_redis;

/* Up to max blocks of this node from cursor on (0: the start); *next: where to go on, *end: no more. */
typedef uint32_t fk_redis_scan_fn(void *arg, uint64_t cursor, struct fk_change *out, uint32_t max,
                                  uint64_t *next, bool *end);

struct fk_redis_params {
    const char *host;                   /* name, address, or /PATH of a unix socket */
    uint16_t port;
    const char *user, *password;        /* "": none */
    uint32_t db;
    bool tls;
    const char *tls_ca, *tls_cert, *tls_key;    /* files; "": the system's CAs, no certificate of ours */
    uint64_t timeout_us;                /* connecting and login */
    struct fk_cluster *cluster;
    pthread_mutex_t *lock;
    fk_redis_scan_fn *scan;             /* NULL: this node has no blocks */
    void *arg;
};

/* 0; -EINVAL and *error: TLS files that can't be used; -errno. Strings are copied. */
int fk_redis_start(const struct fk_redis_params *params, struct fk_redis **out, char *error, size_t size);
/* Leaves the cluster (waits up to leave_us for that) and ends the thread. */
void fk_redis_stop(struct fk_redis *r, uint64_t leave_us);
/* Any thread; cheap. */
void fk_redis_wake(struct fk_redis *r);
/* 0: connected and logged in; else the last trouble in *error. */
int fk_redis_state(struct fk_redis *r, char *error, size_t size);

#endif
