/*
 * node_impl.h - private to src/api: the embedded node, the shell around the core.
 *
 *   caller threads --lock--> core            queues --> agent thread (copies, core/job_done)
 *                                                   --> I/O thread   (SSD, deadlines, ticks)
 *                                                   --> completions + eventfd --> poll
 *
 * `lock` guards the core and the tables of namespaces and regions. Nobody holds it across a
 * system call that can wait. Engine and stores are used under `io_lock`, which the I/O thread
 * holds all the time but when someone who opens a space asks for it; files are opened and
 * tables read under it alone. The list of spaces grows under both locks, so either is enough
 * to walk it. Order: io_lock, lock.
 */
#ifndef FK_API_NODE_IMPL_H
#define FK_API_NODE_IMPL_H

#include <pthread.h>
#include <stdatomic.h>

#include "base/util.h"
#include "config/config.h"
#include "copy/team.h"
#include "flexkv/flexkv.h"
#include "node/core.h"
#include "tier/pool.h"
#include "tier/ssd.h"

#define FK_NODE_SSD_BATCH 128

struct fk_rank {
    flexkv_region *regions;         /* NULL: not registered */
    bool leaving;                   /* unregistering: waits for the last copy */
    uint32_t n_regions;
    uint64_t pages;
};

struct flexkv_space {
    flexkv_node *node;
    flexkv_space *next;
    char name[64];
    uint8_t fingerprint[16];
    uint32_t tokens_per_block, ranks;
    uint64_t slice_bytes, slot_bytes, block_bytes;
    uint32_t id;                    /* the core's */
    enum fk_key_scheme scheme;
    struct fk_pool *pool;
    uint64_t pool_bytes;
    uint64_t pool_registered;       /* bytes that the engine knows; under io_lock */
    struct fk_ssd *ssd;             /* NULL: none */
    uint32_t dirs_out;              /* as last told to the core */
    struct fk_rank *rank;
    uint32_t n_ranks_registered;
    uint64_t min_pages;             /* of the registered ranks */
    flexkv_namespace *namespaces;
};

struct flexkv_namespace {
    flexkv_space *space;
    flexkv_namespace *next;
    char *name;                     /* all parts, length-prefixed */
    uint32_t group;
    struct fk_key seed;
};

/* A quota group of a space, and the namespace it was configured for. */
struct fk_group_name { uint32_t space, group; const char *name; };

struct flexkv_node {
    flexkv_config *config;          /* a reference */
    const struct fk_settings *set;
    pthread_mutex_t lock;
    struct fk_core *core;
    flexkv_space *spaces;
    FK_VEC(struct fk_group_name) groups;
    bool closing;

    int event_fd;
    bool event_set;                 /* the eventfd is readable; under lock */

    pthread_mutex_t io_lock;        /* who may touch engine and ssd; I/O thread holds it while busy */
    struct fk_engine *engine;       /* NULL: no SSD configured */
    pthread_t io_thread;
    _Atomic bool has_io_thread;     /* the pools' threads ask too */
    pthread_mutex_t wake_lock;      /* without an engine: what the I/O thread sleeps on */
    pthread_cond_t io_wake;
    uint64_t io_sleeps_until;       /* under lock: a deadline before that must wake it */
    _Atomic bool io_signalled, io_stop;
    _Atomic unsigned io_yield;      /* how many wait for the I/O thread to step aside */
    _Atomic uint64_t bytes_read, bytes_written;

    struct fk_team *team;
    const struct fk_copy_backend *backend;
    pthread_t agent_thread;
    bool has_agent;
    pthread_cond_t agent_wake;
    pthread_cond_t idle;            /* a job ended, or stores were reset */
    uint64_t resets_asked, resets_done;     /* of stores; under lock */
    int reset_status;               /* of the last that failed */
    _Atomic uint64_t bytes_to_engine, bytes_from_engine;
};

/* error.c: the calling thread's message; returns rc. */
int fk_api_fail(int rc, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

/* node.c: with the lock held; tells whoever the queues concern. Then gives up the lock. */
void fk_node_unlock(flexkv_node *node);

/* io_thread.c */
int fk_node_io_start(flexkv_node *node);
void fk_node_io_stop(flexkv_node *node);
void fk_node_io_wake(flexkv_node *node);
/* The engine and the stores for a while; the I/O thread steps aside. */
void fk_node_io_acquire(flexkv_node *node);
void fk_node_io_release(flexkv_node *node);

/* agent_thread.c */
int fk_node_agent_start(flexkv_node *node);
void fk_node_agent_stop(flexkv_node *node);

/* space.c */
/* The space with the core's number; NULL: not (yet) in the list. With either lock. */
flexkv_space *fk_node_space(const flexkv_node *node, uint32_t id);
void fk_space_close_store(flexkv_space *space);
/* keep_memory: I/O that never ended may still write to the pool, so it is never unmapped. */
void fk_space_free(flexkv_space *space, bool keep_memory);

#endif
