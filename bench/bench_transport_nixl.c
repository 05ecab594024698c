/*
 * bench_transport_nixl.c - NIXL's UCX over TCP, without any logic of ours: blocks are written into a pool of another process,
 * whose NIXL has a thread that sleeps until something arrives. See bench_transport.h.
 */
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/util.h"
#include "bench_transport.h"
#include "nixl/nixl_lib.h"

#define REST_US 20                      /* NIXL has nothing to wait for */

struct card { uint64_t base; uint32_t bytes; char data[8192]; };    /* what the child says of itself */

struct nixl_loop { struct fk_nixl_agent agent; char *pool; uint64_t base, rng, at; };

static int link_to_child = -1;

static int side_open(struct fk_nixl_agent *a, const char *name, bool progress, char **pool)
{
    char error[512];
    int rc = fk_nixl_load(getenv("FLEXKV_NIXL_LIBRARY"), error, sizeof(error));

    if (rc) {
        fprintf(stderr, "flexkv bench transport: %s\n", error);
        return rc;
    }
    *pool = aligned_alloc(4096, BENCH_POOL_BYTES);
    if (!*pool)
        return -ENOMEM;
    memset(*pool, 1, BENCH_POOL_BYTES);
    rc = fk_nixl_open(a, name, "UCX", "lo", progress);
    return rc ? rc : fk_nixl_register(a, *pool, BENCH_POOL_BYTES);
}

_Noreturn static void child(int fd)
{
    static struct card c;
    struct fk_nixl_agent a;
    char *pool;
    void *data;
    size_t bytes;

    if (side_open(&a, "bench-target", true, &pool) || fk_nixl_metadata(&a, &data, &bytes) || bytes > sizeof(c.data))
        _exit(1);
    c.base = (uintptr_t)pool;
    c.bytes = (uint32_t)bytes;
    memcpy(c.data, data, bytes);
    (void)!write(fd, &c, sizeof(c));
    for (;;)
        pause();
}

int bench_nixl_fork(void)
{
    int sv[2];

    if (!getenv("FLEXKV_NIXL_LIBRARY"))
        return -ENOENT;
    setenv("UCX_TLS", "tcp,self", 0);
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, sv))
        return -errno;
    if (fork() == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        child(sv[1]);
    }
    close(sv[1]);
    link_to_child = sv[0];
    return 0;
}

static int post(struct nixl_loop *x, uint32_t bytes, void **transfer)
{
    uint64_t from = (uint64_t)fk_rng_below(&x->rng, (uint32_t)(BENCH_POOL_BYTES / bytes)) * bytes;
    int rc = fk_nixl_write(&x->agent, x->pool + from, bytes, x->base + x->at, transfer);

    x->at = (x->at + bytes) % BENCH_POOL_BYTES;
    return rc;
}

/* One of those under way; > 0: has ended. */
static int look(struct nixl_loop *x, void **transfer)
{
    int rc = fk_nixl_done(&x->agent, *transfer);

    if (rc == -EINPROGRESS)
        return 0;
    fk_nixl_forget(&x->agent, *transfer);
    *transfer = NULL;
    return rc ? rc : 1;
}

static double nixl_run(struct bench_loop *l, uint32_t bytes, uint64_t run_us)
{
    struct nixl_loop *x = l->priv;
    uint64_t start = fk_clock_us(), now = start, done = 0;
    void *transfers[BENCH_DEPTH] = { 0 };
    uint32_t in_flight = 0;

    x->at = 0;
    do {
        uint64_t before = done;
        for (uint32_t i = 0; i < BENCH_DEPTH; i++) {
            int rc = 0;
            if (!transfers[i] && now - start < run_us) {
                rc = post(x, bytes, &transfers[i]);
                in_flight += rc == 0;
            }
            if (!rc && transfers[i])
                rc = look(x, &transfers[i]);
            if (rc < 0)
                return rc;
            done += rc ? bytes : 0;
            in_flight -= (uint32_t)rc;
        }
        if (done == before)
            usleep(REST_US);
        now = fk_clock_us();
    } while (in_flight || now - start < run_us);
    return (double)done * 1e6 / (double)(now - start);
}

int bench_nixl_open(struct bench_loop *l)
{
    struct nixl_loop *x = calloc(1, sizeof(*x));
    struct card c;
    size_t got = 0;
    ssize_t n;

    if (!x)
        return -ENOMEM;
    while (got < sizeof(c) && (n = read(link_to_child, (char *)&c + got, sizeof(c) - got)) > 0)
        got += (size_t)n;
    int rc = got == sizeof(c) ? side_open(&x->agent, "bench-source", false, &x->pool) : -EIO;
    if (!rc)
        rc = fk_nixl_peer(&x->agent, c.data, c.bytes);
    x->base = c.base;
    if (!rc)
        *l = (struct bench_loop){ nixl_run, x };
    return rc;
}
