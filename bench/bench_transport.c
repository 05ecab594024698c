/*
 * bench_transport.c - reads from a peer over loopback TCP, all checks included (grants, keys, generations, checksums on
 * both sides, deadlines), against the same library's loop without our logic, a bare socket loop, Mooncake's engine, NIXL's UCX;
 * all alternating in one run, who goes first drawn by lot.
 */
#include "bench_transport.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <sys/prctl.h>
#include <sys/socket.h>

#include "base/clock.h"
#include "base/log.h"
#include "base/util.h"
#include "bench.h"
#include "transport/transport.h"

#define RUNS 9
#define RUN_US 250000
#define DEADLINE_US 10000000
#define SECRET "a secret for the benchmark"

struct owner { char *pool; uint32_t bytes; };
struct ours {                           /* priv of a bench_loop */
    struct fk_transport *t;
    uint32_t peer[2];                   /* by size: each has an owner of its own */
    char *pool;
    pthread_mutex_t lock;               /* the rest is the run's */
    pthread_cond_t idle;
    uint64_t rng, at, done, now_us, end_us;
    uint32_t in_flight;
    int size, rc;
    bool start;
};

static const uint32_t sizes[2] = { 65536, 1 << 20 };
static const char *const kinds[4] = { "fabric", "mooncake", "tcp", "nixl" };
static int n_kinds = 3;                 /* 4: NIXL is there */
static char addresses[4][2][FK_TRANSPORT_ADDRESS_MAX];

static struct fk_key key_of(uint32_t slot) { return (struct fk_key){ slot + 1, 99 }; }

static int grant(void *ctx, const struct fk_block_ref *r, struct fk_grant *g)
{
    const struct owner *o = ctx;

    if (r->slot >= BENCH_POOL_BYTES / o->bytes)
        return -ENOENT;
    *g = (struct fk_grant){ .data = o->pool + (uint64_t)r->slot * o->bytes, .bytes = o->bytes, .key = key_of(r->slot),
                            .generation = 2, .epoch = 1 };
    return 0;
}

static int release(void *ctx, const struct fk_block_ref *r, struct fk_grant *g) { return 0; }

static uint64_t turn(void *ctx);

static struct fk_transport *open_side(const char *kind, struct owner *o, struct ours *reader)
{
    struct fk_transport_params p = { .transport = kind, .listen = o ? "127.0.0.1:0" : NULL, .secret = SECRET,
                                     .epoch = 1, .provider = { grant, release, o }, .max_in_flight = BENCH_DEPTH,
                                     .turn = reader ? turn : NULL, .turn_ctx = reader,
                                     .nixl_library = getenv("FLEXKV_NIXL_LIBRARY") };
    struct fk_transport *t;
    char error[256];

    if (fk_transport_open(&p, &t, error, sizeof(error)) == 0)
        return t;
    fprintf(stderr, "flexkv bench transport: %s\n", error);
    return NULL;
}

static int fork_owner(const char *kind, uint32_t bytes, char *address)
{
    int sv[2];

    if (socketpair(AF_UNIX, SOCK_STREAM, 0, sv))
        return -errno;
    if (fork() == 0) {
        struct owner o = { aligned_alloc(4096, BENCH_POOL_BYTES), bytes };
        char text[FK_TRANSPORT_ADDRESS_MAX] = "";
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        memset(o.pool, 1, BENCH_POOL_BYTES);
        struct fk_transport *t = open_side(kind, &o, NULL);
        struct fk_window w = { .slot_bytes = bytes, .slots = (uint32_t)(BENCH_POOL_BYTES / bytes) };
        if (!t || fk_transport_register(t, o.pool, BENCH_POOL_BYTES) || fk_transport_share(t, &w))
            _exit(1);
        snprintf(text, sizeof(text), "%s", fk_transport_address(t));
        (void)!write(sv[1], text, sizeof(text));
        for (;;)
            pause();
    }
    close(sv[1]);
    int rc = read(sv[0], address, FK_TRANSPORT_ADDRESS_MAX) == FK_TRANSPORT_ADDRESS_MAX ? 0 : -ENOSYS;
    close(sv[0]);
    return rc;
}

static int post(struct ours *o, uint32_t n)
{
    struct fk_read r[2 * BENCH_DEPTH];
    uint32_t bytes = sizes[o->size];

    for (uint32_t i = 0; i < n; i++) {
        uint32_t slot = fk_rng_below(&o->rng, (uint32_t)(BENCH_POOL_BYTES / bytes));
        r[i] = (struct fk_read){ .block = { .key = key_of(slot), .epoch = 1, .generation = 2, .slot = slot,
                                            .bytes = bytes }, .buffer = o->pool + o->at };
        o->at = (o->at + bytes) % BENCH_POOL_BYTES;
    }
    o->in_flight += n;
    return fk_transport_read(o->t, o->peer[o->size], r, n, fk_clock_us() + DEADLINE_US);
}

/* In the transport's thread, as in a node. Twice the depth is asked of the transport, so that it always has the next
 * read at hand; the peer sees the depth. */
static uint64_t turn(void *ctx)
{
    struct ours *o = ctx;
    struct fk_read_done d[2 * BENCH_DEPTH];
    uint32_t n;

    pthread_mutex_lock(&o->lock);
    while ((n = fk_transport_take(o->t, d, fk_array_size(d))) > 0) {
        for (uint32_t i = 0; i < n && !o->rc; i++)
            o->rc = d[i].rc;
        o->done += (uint64_t)n * sizes[o->size];
        o->in_flight -= n;
        o->now_us = fk_clock_us();
        if (!o->rc && o->now_us < o->end_us)
            o->rc = post(o, n);
    }
    if (o->start && !o->rc) {
        o->start = false;
        o->rc = post(o, 2 * BENCH_DEPTH);
    }
    if (!o->in_flight)
        pthread_cond_signal(&o->idle);
    pthread_mutex_unlock(&o->lock);
    return UINT64_MAX;
}

static double ours_run(struct bench_loop *l, uint32_t bytes, uint64_t run_us)
{
    struct ours *o = l->priv;
    uint64_t start = fk_clock_us();

    pthread_mutex_lock(&o->lock);
    o->size = bytes != sizes[0];
    o->at = o->done = 0;
    o->end_us = start + run_us;
    o->start = true;
    fk_transport_wake(o->t);
    while (o->start || o->in_flight)
        pthread_cond_wait(&o->idle, &o->lock);
    double rate = o->rc ? o->rc : (double)o->done * 1e6 / (double)(o->now_us - start);
    pthread_mutex_unlock(&o->lock);
    return rate;
}

static int ours_open(struct bench_loop *l, int kind)
{
    struct ours *o = calloc(1, sizeof(*o));

    if (!o)
        return -ENOMEM;
    pthread_mutex_init(&o->lock, NULL);
    pthread_cond_init(&o->idle, NULL);
    pthread_mutex_lock(&o->lock);       /* a first turn waits until all is there */
    o->t = open_side(kinds[kind], NULL, o);
    o->pool = aligned_alloc(4096, BENCH_POOL_BYTES);
    int rc = o->t && o->pool ? 0 : -ENOSYS;
    if (!rc)
        rc = fk_transport_register(o->t, o->pool, BENCH_POOL_BYTES);
    for (int i = 0; i < 2 && !rc; i++)
        rc = fk_transport_peer(o->t, addresses[kind][i], &o->peer[i]) ? -ENOMEM : 0;
    if (!rc)
        memset(o->pool, 1, BENCH_POOL_BYTES);
    pthread_mutex_unlock(&o->lock);
    *l = (struct bench_loop){ ours_run, o };
    return rc;
}

enum { OURS_FABRIC, OURS_MOONCAKE, OURS_TCP, OURS_NIXL, BARE_FABRIC, BARE_SOCKET, MOONCAKE, UCX, LOOPS };

/* Every loop runs once in each round, in an order drawn by lot. */
static int measure(struct bench_loop *loops, uint32_t bytes, double rate[LOOPS][RUNS])
{
    uint64_t rng = fk_clock_ns();
    uint32_t order[LOOPS];

    for (int run = -1; run < RUNS; run++) {     /* the first is for warming up */
        fk_rng_permutation(order, LOOPS, &rng);
        for (int i = 0; i < LOOPS; i++) {
            struct bench_loop *l = &loops[order[i]];
            double r = l->run ? l->run(l, bytes, run < 0 ? RUN_US / 5 : RUN_US) : 0;
            if (r < 0)
                return fprintf(stderr, "flexkv bench transport: loop %u, %u bytes: %s\n", order[i], bytes,
                               strerror((int)-r)), (int)r;
            if (run >= 0)
                rate[order[i]][run] = r / 1e9;
        }
    }
    return 0;
}

static const struct { int ours, other; const char *name; } pairs[] = {
    { OURS_FABRIC, BARE_FABRIC, "fabric/library" }, { OURS_FABRIC, BARE_SOCKET, "fabric/socket" },
    { OURS_FABRIC, MOONCAKE, "fabric/mooncake" }, { OURS_MOONCAKE, BARE_SOCKET, "mooncake wire/socket" },
    { OURS_MOONCAKE, MOONCAKE, "mooncake wire/its engine" }, { OURS_FABRIC, UCX, "fabric/UCX tcp" },
    { OURS_NIXL, UCX, "nixl/UCX tcp" }, { OURS_TCP, BARE_SOCKET, "tcp/socket" }, { OURS_TCP, MOONCAKE, "tcp/mooncake" },
    { OURS_TCP, UCX, "tcp/UCX tcp" }, { OURS_TCP, BARE_FABRIC, "tcp/libfabric" },
};

static int report(struct bench_loop *loops, int size, struct bench_result *out, int max)
{
    double rate[LOOPS][RUNS], a[RUNS], b[RUNS];
    int n = 0, rc = measure(loops, sizes[size], rate);

    for (size_t i = 0; i < fk_array_size(pairs) && !rc && n < max; i++) {
        char name[64];
        if (!loops[pairs[i].other].run || !loops[pairs[i].ours].run)
            continue;
        memcpy(a, rate[pairs[i].ours], sizeof(a));
        memcpy(b, rate[pairs[i].other], sizeof(b));
        snprintf(name, sizeof(name), "%s %s", pairs[i].name, size ? "1M" : "64K");
        out[n++] = bench_summary(name, "GB/s", a, b, RUNS);
    }
    return rc ? rc : n;
}

int bench_transport(struct bench_result *out, int max)
{
    struct bench_loop loops[LOOPS] = { 0 };
    int rc = 0, n = 0;

    fk_log_set_level(FK_LOG_ERROR);
    if (bench_nixl_fork() == 0)
        n_kinds = 4;
    else
        fprintf(stderr, "flexkv bench transport: without NIXL; FLEXKV_NIXL_LIBRARY=$(tools/nixl-env) brings it in\n");
    for (int kind = 0; kind < n_kinds && !rc; kind++)   /* before there is a thread */
        for (int i = 0; i < 2 && !rc; i++)
            rc = fork_owner(kinds[kind], sizes[i], addresses[kind][i]);
    if (!rc)
        rc = bench_fabric_fork();
    if (!rc)
        rc = bench_socket_open(&loops[BARE_SOCKET]);
    if (!rc && bench_mooncake_open(&loops[MOONCAKE])) {
        loops[MOONCAKE].run = NULL;
        fprintf(stderr, "flexkv bench transport: without Mooncake's engine; FLEXKV_MOONCAKE_PYTHON=$(tools/mooncake-env) "
                "brings it in\n");
    }
    if (!rc)
        rc = bench_fabric_open(&loops[BARE_FABRIC]);
    if (!rc && n_kinds == 4)
        rc = bench_nixl_open(&loops[UCX]);
    for (int kind = 0; kind < n_kinds && !rc; kind++)
        rc = ours_open(&loops[kind], kind);
    for (int i = 0; i < 2 && !rc; i++) {
        int got = report(loops, i, out + n, max - n);
        rc = got < 0 ? got : 0;
        n += got < 0 ? 0 : got;
    }
    return rc ? rc : n;
}
