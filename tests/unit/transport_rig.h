/*
 * transport_rig.h - an owner of blocks with random bytes, and a reader that checks every one of them. For tests and
 * in processes of their own.
 */
#ifndef TEST_TRANSPORT_RIG_H
#define TEST_TRANSPORT_RIG_H

#include <poll.h>
#include <sched.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>

#include <cmocka.h>

#include "base/checksum.h"
#include "base/clock.h"
#include "base/log.h"
#include "base/util.h"
#include "transport/transport.h"

#define SECRET "a secret of the tests"
#define SLOTS 64u
#define SLOT_BYTES (1u << 20)
#define EPOCH 77u
#define SPACE 5u
#define NS 6u

/* The tests of members' transports run with another one than fabric, too: "nixl". */
static inline const char *rig_kind(void)
{
    const char *kind = getenv("FLEXKV_TEST_TRANSPORT");

    return kind ? kind : "fabric";
}

/*
 * What a transport may read from or write to. NIXL wants to know all of it, so there it comes out of one range;
 * for others it is malloc's, which sanitizers watch.
 */
#define RIG_ARENA_BYTES (16ull << 30)   /* of addresses */

static inline unsigned char *rig_arena(void)
{
    static unsigned char *arena;

    if (!arena && strcmp(rig_kind(), "nixl") == 0) {
        arena = mmap(NULL, RIG_ARENA_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        assert_true(arena != MAP_FAILED);
    }
    return arena;
}

static inline void *rig_alloc(size_t bytes)
{
    static size_t used;
    unsigned char *arena = rig_arena();
    size_t whole = (bytes + 8191) & ~(size_t)4095;      /* its size in the page before it */
    void *p = NULL;

    if (!arena) {
        assert_int_equal(posix_memalign(&p, 4096, bytes), 0);
        return memset(p, 0, bytes);
    }
    assert_true(used + whole <= RIG_ARENA_BYTES);
    memcpy(arena + used, &whole, sizeof(whole));
    used += whole;
    return arena + used - whole + 4096;
}

static inline void rig_free(void *p)
{
    size_t whole;

    if (!rig_arena()) {
        free(p);
        return;
    }
    memcpy(&whole, (unsigned char *)p - 4096, sizeof(whole));
    madvise((unsigned char *)p - 4096, whole, MADV_DONTNEED);
}

struct owner {
    pthread_mutex_t lock;
    unsigned char *pool;
    uint64_t generation[SLOTS];
    uint32_t bytes[SLOTS];
    uint32_t pins[SLOTS];
    uint32_t grants, releases;
    uint32_t change_after;              /* the n-th grant's slot changes its generation while it is read */
    bool wrong_checksum;
    /* grants that come later: put aside here */
    bool defer;
    struct fk_block_ref put_aside[4 * SLOTS];
    uint32_t n_put_aside;
};

static inline struct fk_key owner_key(uint32_t slot)
{
    return (struct fk_key){ slot * 0x9e3779b97f4a7c15ull + 1, slot };
}

static inline unsigned char owner_byte(uint32_t slot, uint32_t at)
{
    return (unsigned char)((slot + 1) * 2654435761u + at * 40503u + (at >> 8) * 97u);
}

static inline void owner_fill(struct owner *o, const uint32_t *sizes)
{
    pthread_mutex_init(&o->lock, NULL);
    o->pool = rig_alloc((size_t)SLOTS * SLOT_BYTES);
    for (uint32_t s = 0; s < SLOTS; s++) {
        o->generation[s] = 2 * s + 2;
        o->bytes[s] = sizes ? sizes[s] : SLOT_BYTES;
        for (uint32_t i = 0; i < SLOT_BYTES; i++)
            o->pool[(size_t)s * SLOT_BYTES + i] = owner_byte(s, i);
    }
}

static inline void owner_free(struct owner *o)
{
    rig_free(o->pool);
    pthread_mutex_destroy(&o->lock);
}

static inline int owner_grant_now(struct owner *o, const struct fk_block_ref *r, struct fk_grant *g)
{
    bool by_place = fk_key_is_zero(r->key);
    int rc = -ENOENT;

    if (r->space != SPACE || r->ns != NS)
        return -EACCES;
    pthread_mutex_lock(&o->lock);
    if (r->slot < SLOTS && (by_place || (r->epoch == EPOCH && r->generation == o->generation[r->slot] &&
                                         fk_key_equal(r->key, owner_key(r->slot))))) {
        *g = (struct fk_grant){ .data = o->pool + (size_t)r->slot * SLOT_BYTES, .bytes = o->bytes[r->slot],
                                .key = owner_key(r->slot), .generation = o->generation[r->slot],
                                .epoch = EPOCH };
        if (o->wrong_checksum) {
            g->has_checksum = true;
            g->checksum = 4711;
        }
        o->pins[r->slot]++;
        if (++o->grants == o->change_after)
            o->generation[r->slot] += 2;
        rc = 0;
    }
    pthread_mutex_unlock(&o->lock);
    return rc;
}

static inline int owner_grant(void *ctx, const struct fk_block_ref *r, struct fk_grant *g)
{
    struct owner *o = ctx;

    pthread_mutex_lock(&o->lock);
    bool defer = o->defer;
    int rc = o->n_put_aside < fk_array_size(o->put_aside) ? -EINPROGRESS : -EAGAIN;
    if (defer && rc == -EINPROGRESS) {
        g->later = 1000 + o->n_put_aside;
        o->put_aside[o->n_put_aside++] = *r;
    }
    pthread_mutex_unlock(&o->lock);
    return defer ? rc : owner_grant_now(o, r, g);
}

static inline uint32_t owner_put_aside(struct owner *o)
{
    pthread_mutex_lock(&o->lock);
    uint32_t n = o->n_put_aside;
    pthread_mutex_unlock(&o->lock);
    return n;
}

/* Grants the i-th that was put aside. */
static inline int owner_give(struct owner *o, struct fk_transport *t, uint32_t i)
{
    struct fk_grant g = { 0 };

    pthread_mutex_lock(&o->lock);
    struct fk_block_ref r = o->put_aside[i];
    pthread_mutex_unlock(&o->lock);
    int rc = owner_grant_now(o, &r, &g);
    return fk_transport_granted(t, 1000 + i, rc, &g);
}

static inline int owner_release(void *ctx, const struct fk_block_ref *r, struct fk_grant *g)
{
    struct owner *o = ctx;

    pthread_mutex_lock(&o->lock);
    o->pins[r->slot]--;
    o->releases++;
    int rc = g->generation == o->generation[r->slot] ? 0 : -ENOENT;
    pthread_mutex_unlock(&o->lock);
    return rc;
}

static inline struct fk_transport_params rig_params(const char *transport, struct owner *o, const char *listen)
{
    return (struct fk_transport_params){
        .transport = transport, .listen = listen, .secret = SECRET, .cluster = "tests", .node = 3,
        .epoch = EPOCH, .provider = { owner_grant, owner_release, o }, .max_in_flight = 16,
        .fabric = getenv("FLEXKV_TEST_FABRIC"),     /* a provider other than the default, */
        .source = getenv("FLEXKV_TEST_SOURCE"),     /* and the interface that it is to use */
        .mooncake_library = getenv("FLEXKV_TEST_MOONCAKE_LIBRARY"),
        .timeout_ms = (uint32_t)atoi(getenv("FLEXKV_TEST_TIMEOUT_MS") ?: "0"),      /* of connecting: on slow machines */
        .nixl_library = getenv("FLEXKV_TEST_NIXL"), /* the folder of NIXL's C library */
    };
}

static inline struct fk_transport *rig_open(const struct fk_transport_params *p)
{
    struct fk_transport *t = NULL;
    char error[256] = "";
    int rc = fk_transport_open(p, &t, error, sizeof(error));

    if (rc)
        fprintf(stderr, "%s (%d)\n", error, rc);
    assert_int_equal(rc, 0);
    if (rig_arena())
        assert_int_equal(fk_transport_register(t, rig_arena(), RIG_ARENA_BYTES), 0);
    return t;
}

static inline struct fk_read rig_read(uint32_t slot, uint32_t bytes, void *buffer, uint64_t user)
{
    return (struct fk_read){
        .block = { .key = owner_key(slot), .space = SPACE, .ns = NS, .epoch = EPOCH, .slot = slot,
                   .generation = 2 * slot + 2, .bytes = bytes },
        .buffer = buffer, .user = user,
    };
}

/* Takes n completions; fails when they don't come. */
static inline void rig_take(struct fk_transport *t, struct fk_read_done *out, uint32_t n, int wait_ms)
{
    struct pollfd p = { .fd = fk_transport_fd(t), .events = POLLIN };
    uint64_t end = fk_clock_us() + (uint64_t)wait_ms * 1000;

    for (uint32_t got = 0; got < n;) {
        uint64_t now = fk_clock_us();
        if (now >= end)
            fail_msg("%u of %u completions within %d ms", got, n, wait_ms);
        if (poll(&p, 1, (int)((end - now) / 1000) + 1) > 0)
            got += fk_transport_take(t, out + got, n - got);
    }
}

static inline bool rig_bytes_right(const unsigned char *buffer, uint32_t slot, uint32_t bytes)
{
    for (uint32_t i = 0; i < bytes; i++)
        if (buffer[i] != owner_byte(slot, i))
            return false;
    return true;
}

/* What such a process does; main() calls it for --owner. */
_Noreturn static inline void owner_main(const char *transport, int fd)
{
    static struct owner o;
    char text[FK_TRANSPORT_ADDRESS_MAX] = "";
    struct fk_window w = { .space = SPACE, .ns = NS, .slot_bytes = SLOT_BYTES, .slots = SLOTS };

    prctl(PR_SET_PDEATHSIG, SIGKILL);
    fk_log_set_level(FK_LOG_CRITICAL);
    owner_fill(&o, NULL);
    struct fk_transport_params p = rig_params(transport, &o, "127.0.0.1:0");
    struct fk_transport *t = rig_open(&p);
    if (!rig_arena())
        fk_transport_register(t, o.pool, (size_t)SLOTS * SLOT_BYTES);
    fk_transport_share(t, &w);
    snprintf(text, sizeof(text), "%s", fk_transport_address(t));
    (void)!write(fd, text, sizeof(text));
    for (;;)
        pause();
}

/* An owner in a process of its own; its address comes back. The program is started anew: a fork has no threads. */
static inline pid_t owner_fork(const char *transport, char *address)
{
    int ends[2];
    char fd[16];

    assert_int_equal(pipe(ends), 0);
    snprintf(fd, sizeof(fd), "%d", ends[1]);
    pid_t pid = fork();
    assert_true(pid >= 0);
    if (!pid) {
        execl("/proc/self/exe", "owner", "--owner", transport, fd, (char *)NULL);
        _exit(127);
    }
    close(ends[1]);
    assert_int_equal(read(ends[0], address, FK_TRANSPORT_ADDRESS_MAX), FK_TRANSPORT_ADDRESS_MAX);
    close(ends[0]);
    return pid;
}

/* ---- peers that die, readers that go ---- */

static inline int read_one(struct fk_transport *reader, uint32_t peer, struct fk_read r, uint32_t *flags)
{
    struct fk_read_done done;

    assert_int_equal(fk_transport_read(reader, peer, &r, 1, fk_clock_us() + 10000000), 0);
    rig_take(reader, &done, 1, 12000);
    if (flags)
        *flags = done.flags;
    return done.rc;
}

struct flow {                           /* reads kept under way until the peer is ill */
    struct fk_transport *t;
    uint32_t peer;
    unsigned char *buffers;
    uint32_t ok, bad, quarantined, released;
    uint64_t said_us;                   /* when the last one had ended; quarantine may take longer */
};

static inline void flow_start(struct flow *f, const char *address, uint64_t timeout_us)
{
    struct fk_read r[SLOTS];

    assert_int_equal(fk_transport_peer(f->t, address, &f->peer), 0);
    for (uint32_t i = 0; i < SLOTS; i++)
        r[i] = rig_read(i, SLOT_BYTES, f->buffers + (size_t)i * SLOT_BYTES, i);
    assert_int_equal(fk_transport_read(f->t, f->peer, r, SLOTS, fk_clock_us() + timeout_us), 0);
}

/* Every read must end once; those in quarantine must be let go of. */
static inline void flow_end(struct flow *f, int wait_ms)
{
    struct fk_read_done d;

    while (f->ok + f->bad < SLOTS || f->released < f->quarantined) {
        rig_take(f->t, &d, 1, wait_ms);
        if (d.flags & FK_READ_RELEASED) {
            f->released++;
            continue;
        }
        if (d.rc == 0)
            assert_true(rig_bytes_right(f->buffers + d.user * SLOT_BYTES, (uint32_t)d.user, SLOT_BYTES));
        f->ok += d.rc == 0;
        f->bad += d.rc != 0;
        f->quarantined += (d.flags & FK_READ_QUARANTINED) != 0;
        f->said_us = fk_clock_us();
    }
    assert_int_equal(f->ok + f->bad, SLOTS);
    assert_int_equal(fk_transport_take(f->t, &d, 1), 0);
}

static inline void read_all(struct flow *f, const char *address)
{
    f->ok = f->bad = f->quarantined = f->released = 0;
    flow_start(f, address, 20000000);
    flow_end(f, 25000);
    assert_int_equal(f->ok, SLOTS);
}

/* Mooncake's own engine lets go of a buffer after half a minute. */
#define RIG_QUARANTINE_MS (getenv("FLEXKV_TEST_MOONCAKE_LIBRARY") ? 45000 : 5000)

static inline void ill_peer(const char *kind, int signal, bool before)
{
    char address[FK_TRANSPORT_ADDRESS_MAX];
    pid_t pid = owner_fork(kind, address);
    struct fk_transport_params q = rig_params(kind, NULL, NULL);
    struct flow f = { .t = rig_open(&q), .buffers = rig_alloc((size_t)SLOTS * SLOT_BYTES) };
    struct fk_transport_stats s;

    if (!before)
        read_all(&f, address);
    uint64_t took = 0;
    for (int tries = 0; tries < 20 && !f.bad; tries++) {        /* until it is in the middle of it */
        f.ok = f.quarantined = f.released = 0;
        kill(pid, SIGCONT);
        if (before)
            kill(pid, signal);
        flow_start(&f, address, 1000000);
        if (!before)
            kill(pid, signal);
        uint64_t start = fk_clock_us();
        flow_end(&f, RIG_QUARANTINE_MS);
        took = f.said_us - start;
        if (signal == SIGKILL)
            break;
    }
    if (signal == SIGSTOP) {
        assert_true(f.bad > 0);
        assert_true(took < 4000000);    /* a second was asked for; the machine may be busy */
        memset(f.buffers, 0xee, (size_t)SLOTS * SLOT_BYTES);
        kill(pid, SIGCONT);
        usleep(300000);
        for (size_t i = 0; i < (size_t)SLOTS * SLOT_BYTES; i++)
            if (f.buffers[i] != 0xee)
                fail_msg("a byte was written after the buffer was free again");
        read_all(&f, address);          /* back to health */
    }
    fk_transport_get_stats(f.t, &s);
    assert_int_equal(s.quarantined, 0);
    fk_transport_close(f.t);
    kill(pid, SIGKILL);
    waitpid(pid, NULL, 0);
    rig_free(f.buffers);
}

/* The reader goes away in the middle: the owner gives back what it had pinned. */
static inline void reader_gone(const char *kind)
{
    struct owner o = { 0 };
    owner_fill(&o, NULL);
    struct fk_transport_params p = rig_params(kind, &o, "127.0.0.1:0"), q = rig_params(kind, NULL, NULL);
    struct fk_transport *owner = rig_open(&p);
    struct fk_window w = { .space = SPACE, .ns = NS, .slot_bytes = SLOT_BYTES, .slots = SLOTS };
    fk_transport_share(owner, &w);
    unsigned char *b = rig_alloc((size_t)SLOTS * SLOT_BYTES);

    for (int i = 0; i < 5; i++) {
        struct flow f = { .t = rig_open(&q), .buffers = b };
        flow_start(&f, fk_transport_address(owner), 5000000);
        usleep((useconds_t)i * 3000);
        if (i % 2)
            fk_transport_peer_drop(f.t, f.peer);
        fk_transport_close(f.t);
        memset(b, i, (size_t)SLOTS * SLOT_BYTES);       /* nobody writes there any more */
        for (size_t k = 0; k < (size_t)SLOTS * SLOT_BYTES; k++)
            if (b[k] != i)
                fail_msg("a byte was written after close");
    }
    fk_transport_close(owner);
    for (uint32_t s = 0; s < SLOTS; s++)
        assert_int_equal(o.pins[s], 0);
    rig_free(b);
    owner_free(&o);
}

/* ---- a network that breaks ---- */

/* In a process and a network of its own: from one moment on no packet arrives. Exit status; 77: can't be done here. */
static inline int partition_scenario(const char *kind)
{
    char address[FK_TRANSPORT_ADDRESS_MAX];
    struct fk_read_done d;

    if (unshare(CLONE_NEWNET) || system("ip link set lo up") || system("tc qdisc show dev lo >/dev/null 2>&1"))
        return 77;
    pid_t pid = owner_fork(kind, address);
    struct fk_transport_params q = rig_params(kind, NULL, NULL);
    struct flow f = { .t = rig_open(&q), .buffers = rig_alloc((size_t)SLOTS * SLOT_BYTES) };
    read_all(&f, address);
    f.ok = f.bad = 0;
    flow_start(&f, address, 1500000);
    rig_take(f.t, &d, 1, 5000);
    f.ok = d.rc == 0;
    f.bad = d.rc != 0;
    if (system("tc qdisc add dev lo root tbf rate 8bit burst 10b limit 10b"))
        return 77;
    uint64_t start = fk_clock_us();
    flow_end(&f, RIG_QUARANTINE_MS);
    bool late = f.said_us - start > 4000000;
    flow_start(&f, address, 500000);    /* and again, when nobody can be connected to */
    f.ok = f.bad = f.quarantined = f.released = 0;
    flow_end(&f, RIG_QUARANTINE_MS);
    if (f.bad != SLOTS || late)
        return 1;
    assert_int_equal(system("tc qdisc del dev lo root"), 0);
    read_all(&f, address);              /* healed */
    fk_transport_close(f.t);
    kill(pid, SIGKILL);
    waitpid(pid, NULL, 0);
    rig_free(f.buffers);
    return 0;
}

static inline void partition_test(void)
{
    int status = 0;
    pid_t pid = fork();

    assert_true(pid >= 0);
    if (!pid) {
        execl("/proc/self/exe", "partition", "--partition", (char *)NULL);
        _exit(127);
    }
    assert_int_equal(waitpid(pid, &status, 0), pid);
    if (WIFEXITED(status) && WEXITSTATUS(status) == 77) {
        fprintf(stderr, "skipped: a network namespace with tc is needed (root, iproute2)\n");
        skip();
    }
    assert_int_equal(status, 0);
}

#endif
