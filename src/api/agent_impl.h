/*
 * agent_impl.h - what agent.c (life, connection, public calls) and agent_jobs.c (jobs) share of a
 * flexkv_agent.
 *
 * Threads: the agent's own, which connects and, connected, is the first hand; a second hand while
 * it serves a node with a copier that goes both ways at once, a third where it reads the SSD itself. `lock` guards what other threads are
 * told and what was revoked, `jobs_lock` the rings and the queues. Never both.
 */
#ifndef FK_API_AGENT_IMPL_H
#define FK_API_AGENT_IMPL_H

#include <pthread.h>

#include "api/node_impl.h"
#include "copy/copier.h"
#include "api/layers.h"
#include "ipc/ring.h"
#include "ipc/socket.h"
#include "ipc/wire.h"
#include "tier/ssd_format.h"

#define FK_AGENT_REVOKED 4096u          /* far more operations than a node has under way */
#define FK_AGENT_LANES 3                /* from the engine, to it, and to it from the SSD's files */
#define FK_AGENT_LAYERED 512u           /* operations in layers that are remembered */
#define FK_AGENT_EARLY 64u              /* jobs on their way that are */

/* A job, out of the node's reach. */
struct fk_agent_job {
    struct fk_agent_job *next;
    struct fk_ring_job job;
    uint32_t lists[];                   /* slots, pages */
};

/* A job that was said to be on its way, and what comes when it is in place. Copies to the engine are made one after the other,
 * so one that was forgotten is. */
struct fk_agent_early { uint64_t tag; void *event; };

/* How far an operation in layers is. */
struct fk_agent_layered {
    uint64_t tag;
    uint32_t layers;                    /* on their way, or in place */
    uint32_t counter, counted;          /* 0: none; layers that it was told of */
    bool ended;
    int status;
    void **events;                      /* [n_layers]: NULL: in place */
};

struct flexkv_agent {
    struct fk_wire_hello hello;
    char *address;
    uint64_t timeout_us;
    flexkv_region *regions;
    uint32_t n_regions;
    uint32_t *layer_ends;               /* regions up to each layer's end */
    uint32_t n_layers;
    struct fk_copier *copier;
    struct fk_layers *_Atomic counters; /* NULL: flexkv_agent_serve_layers was not called */
    pthread_t thread;
    int stop_fd;
    _Atomic bool stop;

    pthread_mutex_t lock;
    pthread_cond_t changed;
    int state;
    char error[FK_WIRE_TEXT];
    uint64_t running[FK_AGENT_LANES];   /* the operation copied by each lane; 0: none */
    _Atomic bool *running_cancel[FK_AGENT_LANES];
    uint64_t revoked[FK_AGENT_REVOKED]; /* a ring: the oldest is forgotten first */
    uint32_t n_revoked;
    struct fk_agent_layered layered[FK_AGENT_LAYERED];  /* likewise */
    uint32_t n_layered;
    struct fk_agent_early early[FK_AGENT_EARLY];        /* likewise */
    uint32_t n_early;
    bool ended;                         /* the thread is about to return */

    /* of the connection; the thread's own */
    int fd, command_fd, report_fd;
    struct fk_msg_reader in;
    struct fk_wire_welcome w;
    char *pool;
    size_t pool_bytes, memory_bytes;
    void *memory;
    _Atomic bool *cancel;
    uint64_t populated;
    bool direct_tried, direct_works;    /* GPU direct storage */
    bool direct;                        /* it is used with this node */

    pthread_mutex_t jobs_lock;
    struct fk_ring commands, reports;
    struct fk_agent_job *queue[FK_AGENT_LANES], **queue_end[FK_AGENT_LANES];    /* by lane, oldest first */
    bool busy[FK_AGENT_LANES];
    int hand_fd;                        /* tells the other hands to end */
};

/* Serves the node that is connected, until it goes, talks nonsense (-EPROTO) or the agent is closed. */
int fk_agent_serve(flexkv_agent *a);
/* Tells the node, before jobs come, whether this worker reads the SSD's files itself. */
void fk_agent_tell_direct(flexkv_agent *a);
/* Tells the copies that are under way to stop. */
void fk_agent_cancel_running(flexkv_agent *a);

#endif
