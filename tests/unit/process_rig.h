/*
 * process_rig.h - for tests with several processes: workers with an agent each, and a daemon. They
 * are forked before the test's own process has any thread, get their orders over a socket, and their
 * pages lie in memory shared with the test, so that it sees every byte.
 */
#ifndef TEST_PROCESS_RIG_H
#define TEST_PROCESS_RIG_H

#include <poll.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>

#include <cmocka.h>

#include "base/clock.h"
#include "base/log.h"
#include "base/util.h"
#include "flexkv/flexkv.h"

#define TPB 4u
#define PAGES 64u
#ifndef REGION_BYTES
#define REGION_BYTES 512u               /* a page of one region */
#endif
#define REGIONS 3u
#define SLICE_BYTES (REGION_BYTES * REGIONS)
#define CHAIN_MAX 48u

enum order { ORDER_QUIT, ORDER_AGENT, ORDER_CLOSE, ORDER_STATE, ORDER_REVOKE,
             ORDER_LAYER, ORDER_LOADED };

struct order_msg {
    enum order order;
    char address[108], instance[64];
    uint32_t worker, slice, replica, replicas, regions;
    uint32_t layer;
    uint64_t op;
};

struct worker {
    pid_t pid;
    int fd;
    unsigned char *pages;               /* [region][page][REGION_BYTES] */
};

static inline int worker_obey(struct worker *w, flexkv_agent **agent, const struct order_msg *m)
{
    flexkv_region r[REGIONS];
    flexkv_agent_desc d = { .struct_bytes = sizeof(d), .address = m->address,
                            .instance = m->instance, .worker = m->worker, .slice = m->slice,
                            .replica = m->replica, .replicas = m->replicas, .timeout_ms = 1000 };
    uint32_t layers[2] = { 1, m->regions - 1 };

    switch (m->order) {
    case ORDER_AGENT:
        for (uint32_t i = 0; i < m->regions; i++)
            r[i] = (flexkv_region){ w->pages + (size_t)i * PAGES * REGION_BYTES, REGION_BYTES,
                                    REGION_BYTES, PAGES };
        d.layer_regions = layers;
        d.n_layers = m->regions > 1 ? 2 : 0;
        return flexkv_agent_create(&d, r, m->regions, agent);
    case ORDER_CLOSE:
        flexkv_agent_close(*agent);
        *agent = NULL;
        return 0;
    case ORDER_STATE: return flexkv_agent_state(*agent);
    case ORDER_REVOKE: return flexkv_agent_revoke(*agent, &m->op, 1, 2000);
    case ORDER_LAYER: return flexkv_agent_wait_layer(*agent, &m->op, 1, m->layer, NULL, 1000);
    case ORDER_LOADED: return flexkv_agent_wait_loaded(*agent, &m->op, 1, NULL);
    default: _exit(0);
    }
}

static inline void worker_main(struct worker *w)
{
    flexkv_agent *agent = NULL;
    struct order_msg m;

    prctl(PR_SET_PDEATHSIG, SIGKILL);
    fk_log_set_level(FK_LOG_CRITICAL);
    while (recv(w->fd, &m, sizeof(m), MSG_WAITALL) == sizeof(m)) {
        int rc = worker_obey(w, &agent, &m);
        if (send(w->fd, &rc, sizeof(rc), 0) != sizeof(rc))
            break;
    }
    _exit(0);
}

static inline void worker_fork(struct worker *w)
{
    int sv[2];

    w->pages = mmap(NULL, (size_t)REGIONS * PAGES * REGION_BYTES, PROT_READ | PROT_WRITE,
                    MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    assert_ptr_not_equal(w->pages, MAP_FAILED);
    assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, sv), 0);
    w->pid = fork();
    assert_true(w->pid >= 0);
    w->fd = w->pid ? sv[0] : sv[1];
    close(w->pid ? sv[1] : sv[0]);
    if (!w->pid)
        worker_main(w);
}

static inline int worker_order(struct worker *w, const struct order_msg *m)
{
    int rc;

    assert_int_equal(send(w->fd, m, sizeof(*m), 0), sizeof(*m));
    assert_int_equal(recv(w->fd, &rc, sizeof(rc), MSG_WAITALL), sizeof(rc));
    return rc;
}

static inline int worker_simple(struct worker *w, enum order order)
{
    struct order_msg m = { .order = order };

    return worker_order(w, &m);
}

static inline void worker_agent(struct worker *w, const char *address, const char *instance,
                                uint32_t worker, uint32_t slice)
{
    struct order_msg m = { .order = ORDER_AGENT, .worker = worker, .slice = slice, .replicas = 1,
                           .regions = REGIONS };

    snprintf(m.address, sizeof(m.address), "%s", address);
    snprintf(m.instance, sizeof(m.instance), "%s", instance);
    assert_int_equal(worker_order(w, &m), 0);
}

static inline void worker_kill(struct worker *w)
{
    if (w->pid > 0) {
        kill(w->pid, SIGKILL);
        waitpid(w->pid, NULL, 0);
    }
    if (w->fd >= 0)
        close(w->fd);
    w->pid = w->fd = -1;
}

static inline void worker_end(struct worker *w)
{
    worker_kill(w);
    munmap(w->pages, (size_t)REGIONS * PAGES * REGION_BYTES);
}

/* ---- a daemon ---- */

static bool rig_events;                 /* nodes opened from now on keep KV events */

static inline flexkv_config *small_config(const char *cpu, const char *ssd_dir)
{
    flexkv_config *c;

    assert_int_equal(flexkv_config_create(&c), 0);
    assert_int_equal(flexkv_config_set(c, "cpu_cache_gb", cpu), 0);
    assert_int_equal(flexkv_config_set(c, "worker_timeout_ms", "5000"), 0);
    assert_int_equal(flexkv_config_set(c, "server_timeout_ms", "600"), 0);
    assert_int_equal(flexkv_config_set(c, "op_timeout_ms", "4000"), 0);
    assert_int_equal(flexkv_config_set(c, "enable_kv_events", rig_events ? "1" : "0"), 0);
    assert_int_equal(flexkv_config_set(c, "kv_events_buffer_mb", "8K"), 0);
    if (ssd_dir) {
        assert_int_equal(flexkv_config_set(c, "ssd_cache_gb", "4M"), 0);
        assert_int_equal(flexkv_config_set(c, "ssd_cache_dir", ssd_dir), 0);
    }
    return c;
}

/* Returns when it serves. */
static inline pid_t daemon_fork(const char *address, const char *ssd_dir)
{
    int ready[2];
    char c;

    assert_int_equal(pipe(ready), 0);
    pid_t pid = fork();
    assert_true(pid >= 0);
    if (!pid) {
        flexkv_node *node;
        flexkv_config *config = small_config("1M", ssd_dir);
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        fk_log_set_level(FK_LOG_CRITICAL);
        if (flexkv_node_open(config, &node) || flexkv_node_serve(node, address)) {
            fprintf(stderr, "daemon: %s\n", flexkv_last_error());
            _exit(1);
        }
        (void)!write(ready[1], "", 1);
        for (;;)
            pause();
    }
    close(ready[1]);
    assert_int_equal(read(ready[0], &c, 1), 1);
    close(ready[0]);
    return pid;
}

/* Returns when it stands still. */
static inline void stop(pid_t pid)
{
    int status;

    kill(pid, SIGSTOP);
    waitpid(pid, &status, WUNTRACED);
}

static inline void reap(pid_t pid, int signal)
{
    kill(pid, signal);
    waitpid(pid, NULL, 0);
}

/* ---- blocks ---- */

static inline void chain_keys(flexkv_namespace *ns, uint32_t chain, uint32_t n, flexkv_key *keys)
{
    uint32_t tokens[CHAIN_MAX * TPB];

    for (uint32_t i = 0; i < n * TPB; i++)
        tokens[i] = chain * 1000 + i;
    assert_int_equal(flexkv_keys_from_tokens(ns, NULL, tokens, n * TPB, keys), n);
}

static inline unsigned char byte_of(uint32_t chain, uint32_t block, uint32_t slice, uint32_t region)
{
    return (unsigned char)(chain * 31 + block * 7 + slice * 101 + region * 13 + 1);
}

static inline void fill_pages(struct worker *w, uint32_t chain, uint32_t slice, uint32_t n,
                              uint32_t first_page)
{
    for (uint32_t r = 0; r < REGIONS; r++)
        for (uint32_t i = 0; i < n; i++)
            memset(w->pages + ((size_t)r * PAGES + first_page + i) * REGION_BYTES,
                   byte_of(chain, i, slice, r), REGION_BYTES);
}

static inline bool pages_are(const struct worker *w, uint32_t chain, uint32_t slice, uint32_t n,
                             uint32_t first_page)
{
    for (uint32_t r = 0; r < REGIONS; r++)
        for (uint32_t i = 0; i < n; i++)
            for (uint32_t b = 0; b < REGION_BYTES; b++)
                if (w->pages[((size_t)r * PAGES + first_page + i) * REGION_BYTES + b] !=
                    byte_of(chain, i, slice, r))
                    return false;
    return true;
}

static inline void wipe(struct worker *w)
{
    memset(w->pages, 0xee, (size_t)REGIONS * PAGES * REGION_BYTES);
}

static inline flexkv_completion wait_op(flexkv_node *node, uint64_t op, int timeout_ms)
{
    flexkv_completion c = { 0 };

    while (flexkv_poll(node, &c, 1, timeout_ms) == 1)
        if (c.op == op)
            return c;
    fail_msg("operation %llu has not ended within %d ms", (unsigned long long)op, timeout_ms);
    return c;
}

static inline uint64_t put_chain(flexkv_namespace *ns, uint32_t chain, uint32_t n,
                                 uint32_t first_page)
{
    flexkv_key keys[CHAIN_MAX];
    uint32_t pages[CHAIN_MAX];
    uint64_t op;
    flexkv_op_args a = { .struct_bytes = sizeof(a), .pages = pages };

    chain_keys(ns, chain, n, keys);
    for (uint32_t i = 0; i < n; i++)
        pages[i] = first_page + i;
    assert_int_equal(flexkv_put(ns, keys, n, 0, &a, &op), 0);
    return op;
}

static inline uint32_t match_chain(flexkv_namespace *ns, uint32_t chain, uint32_t n,
                                   uint64_t *lease)
{
    flexkv_key keys[CHAIN_MAX];
    flexkv_match_result m;

    chain_keys(ns, chain, n, keys);
    assert_int_equal(flexkv_match(ns, keys, n, &m), 0);
    *lease = m.lease;
    return m.blocks;
}

static inline uint64_t get_chain(flexkv_node *node, uint64_t lease, uint32_t n, uint32_t first_page,
                                 uint32_t timeout_ms)
{
    uint32_t pages[CHAIN_MAX];
    uint64_t op;
    flexkv_op_args a = { .struct_bytes = sizeof(a), .pages = pages, .timeout_ms = timeout_ms };

    for (uint32_t i = 0; i < n; i++)
        pages[i] = first_page + i;
    assert_int_equal(flexkv_get(node, lease, 0, n, &a, &op), 0);
    return op;
}

static inline flexkv_space_desc space_desc(const char *instance, uint32_t ranks, uint32_t workers)
{
    return (flexkv_space_desc){ .struct_bytes = sizeof(flexkv_space_desc), .fingerprint = "model",
                                .fingerprint_bytes = 5, .tokens_per_block = TPB, .ranks = ranks,
                                .instance = instance, .workers = workers };
}

/* An address nobody else has. */
static inline const char *fresh_address(char *buf)
{
    static unsigned n;

    sprintf(buf, "ipc://@flexkv-test-%d-%u", (int)getpid(), n++);
    return buf;
}

#endif
