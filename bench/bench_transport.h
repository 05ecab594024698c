/*
 * bench_transport.h - the bare loops that the transports are measured against: the same reads of random blocks, as many in
 * flight, a server in a process of its own, sleeping when there is nothing to do, and no logic of ours at all: no keys,
 * pins, checksums or deadlines. Caller: bench_transport.c.
 */
#ifndef FK_BENCH_TRANSPORT_H
#define FK_BENCH_TRANSPORT_H

#include <stddef.h>
#include <stdint.h>

#define BENCH_POOL_BYTES (64ull << 20)      /* each side's; beyond the caches */
#define BENCH_DEPTH 16u

struct bench_loop {                         /* a reader; the server is its child */
    /* Reads blocks of this size for run_us; returns bytes per second, or -errno. */
    double (*run)(struct bench_loop *l, uint32_t bytes, uint64_t run_us);
    void *priv;
};

/* Each forks its server, which ends with this process. 0 or -errno. */
int bench_socket_open(struct bench_loop *l);
int bench_fabric_open(struct bench_loop *l);    /* fork: bench_fabric_fork, before any thread is there */
int bench_fabric_fork(void);
int bench_mooncake_open(struct bench_loop *l);  /* -ENOENT: FLEXKV_MOONCAKE_PYTHON is not set */
int bench_nixl_fork(void);                      /* before any thread; -ENOENT: FLEXKV_NIXL_LIBRARY is not set */
int bench_nixl_open(struct bench_loop *l);

#endif
