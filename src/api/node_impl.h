/*
 * node_impl.h - private to src/api: the local node, the shell around the core.
 *
 *   caller threads --lock--> core       queues --> agent thread  (copies of workers in this process)
 *                                              --> links         (agents of other processes)
 *                                              --> I/O thread    (SSD, deadlines, ticks)
 *                                              --> completions + eventfd --> poll, or the clients
 *
 * `lock` guards the core and the tables of spaces, instances, links and namespaces. Nobody holds it
 * across a system call that can wait. SSD engine and stores are used under `io_lock`, which the I/O
 * thread holds all the time but when someone who opens a space asks for it; files are opened and
 * tables read under it alone. The list of spaces grows under both locks, so either is enough
 * to walk it. Order: io_lock, lock.
 */
#ifndef FK_API_NODE_IMPL_H
#define FK_API_NODE_IMPL_H

#include <pthread.h>
#include <stdatomic.h>

#include "api/handle.h"
#include "config/config.h"
#include "copy/copier.h"
#include "events/labels.h"
#include "node/core.h"
#include "tier/pool.h"
#include "tier/ssd.h"

#define FK_NODE_SSD_BATCH 128
#define FK_NODE_STAGE_BATCH 16

struct fk_node;
struct fk_link;
struct fk_server;
struct fk_sharing;
struct fk_node_store;
struct fk_peers_stage;

struct fk_space {                   /* one KV geometry and its share of the tiers */
    struct fk_node *node;
    struct fk_space *next;
    char name[FK_NAME_MAX];
    uint8_t fingerprint[16];
    uint32_t tokens_per_block, ranks;
    uint64_t slice_bytes, slot_bytes, block_bytes;
    uint32_t id;                    /* the core's */
    uint32_t store_id;              /* the shared store's; FK_NONE: none */
    enum fk_key_scheme scheme;
    struct fk_pool *pool;
    uint64_t pool_bytes;            /* slots, then checksums */
    uint64_t sums_offset;           /* [cpu slot][rank], in the pool; 0: none */
    uint32_t cpu_slots, ssd_slots;
    uint64_t pool_registered;       /* bytes that the engine knows; under io_lock */
    struct fk_ssd *ssd;             /* NULL: none */
    struct fk_names *names;         /* what routers call the blocks; NULL: events are off */
    struct fk_names_file *names_file;   /* the same on SSD; NULL: no SSD, or events are off */
    uint32_t dirs_out;              /* as last told to the core */
    struct fk_rates {               /* what moving and computing take; see rates.c */
        struct fk_rate copy, ssd, fetch;    /* of a block */
        double compute_us;              /* 0: not known */
        uint64_t ssd_busy_since, ssd_bytes, saved_us;
        bool changed;                   /* since it was saved */
    } rates;
};

struct fk_worker {                  /* one of an instance's */
    struct fk_copier *copier;       /* of regions in this process; or */
    flexkv_region *regions;         /* the copier's */
    struct fk_link *link;           /* in another one */
    uint32_t slice, replica, replicas;
    uint64_t pages;                 /* 0: not registered */
    bool leaving;                   /* unregistering: waits for the last copy */
};

/* One engine's view of a space: what flexkv_space is on a local node. */
struct fk_instance {
    flexkv_space pub;
    struct fk_space *space;
    struct fk_instance *next;
    char name[FK_INSTANCE_NAME_MAX];
    uint32_t id;                    /* the core's */
    bool remote;                    /* its workers are agents of other processes */
    bool ended;                     /* its client is gone; waits for the last copy */
    uint32_t n_workers, n_registered;
    uint64_t min_pages;             /* of the registered workers */
    uint32_t bad_reads;             /* jobs in a row that workers could not read from the SSD themselves */
    struct fk_worker *worker;
    struct fk_namespace *namespaces;
    uint64_t owner;                 /* the client's session; 0: the node's own process */
};

struct fk_namespace {
    flexkv_namespace pub;
    struct fk_instance *instance;
    struct fk_namespace *next;
    char *name;                     /* all parts, length-prefixed */
    uint32_t group;
    uint32_t label;                 /* number, for its blocks' events; under the node's lock */
};

/* A quota group of a space, and the namespace it was configured for. */
struct fk_group_name { uint32_t space, group; const char *name; bool unshared; };

struct fk_node {
    flexkv_node pub;
    flexkv_config *config;          /* a reference */
    const struct fk_settings *set;
    uint64_t started_us;
    pthread_mutex_t lock;
    struct fk_core *core;
    struct fk_space *spaces;
    struct fk_instance *instances;
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

    pthread_t agent_thread;
    bool has_agent;
    pthread_cond_t agent_wake;
    pthread_cond_t idle;            /* a job ended, an agent came, or stores were reset */
    uint64_t resets_asked, resets_done;     /* of stores; under lock */
    int reset_status;               /* of the last that failed */
    _Atomic uint64_t bytes_to_engine, bytes_from_engine;

    struct fk_publisher *publisher; /* of KV events; NULL: none is configured */
    flexkv_events *published;       /* what it reads */

    struct fk_server *server;       /* NULL: does not listen */
    struct fk_link *links;          /* agents of other processes */
    uint32_t cancels_told;          /* see fk_core_work */
    struct fk_node_events *events;  /* NULL: off */
    struct fk_sharing *sharing;     /* NULL: in no cluster */
    struct fk_node_store *remote;       /* NULL: no shared store */
    bool memory_busy;               /* closed, but a hung store may still use the cpu tier's memory */
};

#define fk_local_node(pub_) ((struct fk_node *)(pub_))
#define fk_local_instance(pub_) ((struct fk_instance *)(pub_))
#define fk_local_namespace(pub_) ((struct fk_namespace *)(pub_))

/* node.c: with the lock held; tells whoever the queues concern. Then gives up the lock. */
void fk_node_unlock(struct fk_node *node);
/* Waits on `idle`, with the lock, until woken or the time; -ETIMEDOUT. */
int fk_node_wait(struct fk_node *node, uint64_t deadline_us);
void fk_local_close(flexkv_node *node);

/* io_thread.c */
int fk_node_io_start(struct fk_node *node);
void fk_node_io_stop(struct fk_node *node);
void fk_node_io_wake(struct fk_node *node);
/* The engine and the stores for a while; the I/O thread steps aside. */
void fk_node_io_acquire(struct fk_node *node);
void fk_node_io_release(struct fk_node *node);

/* agent_thread.c */
int fk_node_agent_start(struct fk_node *node);
void fk_node_agent_stop(struct fk_node *node);
unsigned fk_default_copy_threads(void);
unsigned fk_node_copy_threads(const struct fk_node *node);
struct fk_copy_options fk_node_copy_options(const struct fk_node *node);
/* NULL: the space keeps none. */
static inline _Atomic uint64_t *fk_space_sums(const struct fk_space *s, uint32_t slot, uint32_t rank)
{
    if (!s->sums_offset)
        return NULL;
    return (_Atomic uint64_t *)(void *)((char *)fk_pool_base(s->pool) + s->sums_offset) +
           (uint64_t)slot * s->ranks + rank;
}

/* space.c */
/* The space with the core's number; NULL: not (yet) in the list. With either lock. */
struct fk_space *fk_node_space(const struct fk_node *node, uint32_t id);
/* With the io_lock: the space of that name, or a new one of that description (-errno, with message). */
int fk_space_get(struct fk_node *node, const flexkv_space_desc *desc, struct fk_space **out);
void fk_space_close_store(struct fk_space *space);
/* keep_memory: I/O that never ended may still write to the pool, so it is never unmapped. */
void fk_space_free(struct fk_space *space, bool keep_memory);
uint32_t fk_space_group_of(const struct fk_space *space, const char *namespace_name);

/* instance.c; with the lock: */
struct fk_instance *fk_instance_find(const struct fk_node *node, const char *space,
                                     const char *name);
struct fk_instance *fk_instance_by_id(const struct fk_node *node, uint32_t id);
void fk_worker_added(struct fk_instance *in, uint32_t worker, uint64_t pages);
/* Operations fail; call when its jobs are over, or on their way out. */
void fk_worker_removed(struct fk_instance *in, uint32_t worker);
/* The instance's user is gone. Freed when no worker holds a job of it. */
void fk_instance_end(struct fk_instance *in);
void fk_instance_free(struct fk_instance *in);
int fk_instance_open(struct fk_node *node, const flexkv_space_desc *desc, uint64_t owner,
                     struct fk_instance **out);
int fk_local_regions_register(flexkv_space *space, uint32_t rank, const flexkv_region *regions,
                              size_t n);
int fk_local_regions_unregister(flexkv_space *space, uint32_t rank);
int fk_local_namespace_open(flexkv_space *space, const char *const *parts, size_t n_parts,
                            flexkv_namespace **out);
int fk_local_space_open(flexkv_node *node, const flexkv_space_desc *desc, flexkv_space **out);
int fk_check_regions(const flexkv_region *regions, size_t n, uint32_t rank, uint64_t *slice_bytes);

/* ops.c; tag: what agents know the operation by, 0: its number. */
int fk_local_match(flexkv_namespace *ns, const struct fk_key *keys, uint32_t n,
                   flexkv_match_result *out);
int fk_local_release(flexkv_node *node, uint64_t lease);
int fk_node_get(struct fk_node *node, const struct fk_instance *in, uint64_t lease, uint32_t first,
                uint32_t n, const flexkv_op_args *args, uint64_t tag, uint64_t *op);
int fk_node_put(struct fk_namespace *ns, const struct fk_key *keys, uint32_t n, uint32_t first,
                const flexkv_op_args *args, uint64_t tag, uint64_t *op);
int fk_node_prefetch(struct fk_namespace *ns, const struct fk_key *keys, uint32_t n,
                     const flexkv_op_args *args, uint64_t *op);
int fk_local_cancel(flexkv_node *node, uint64_t op);
int fk_local_reset(flexkv_node *node);
int fk_local_stats(flexkv_node *node, flexkv_stats *out);
int fk_node_take_completions(struct fk_node *node, flexkv_completion *out, int max);
extern const struct fk_node_vt fk_local_vt;

/* rates.c, with the lock: what the tiers have shown lately goes to the core. */
void fk_rates_copied(struct fk_space *space, uint32_t blocks, uint64_t us, uint64_t now_us);
void fk_rates_fetched(struct fk_space *space, const struct fk_rate *block);
/* By a worker, straight from the SSD to its pages. */
void fk_rates_read_direct(struct fk_space *space, uint32_t blocks, uint64_t us, uint64_t now_us);
void fk_rates_read(struct fk_space *space, uint64_t bytes, uint64_t now_us, bool busy);
int fk_local_set_compute_rate(flexkv_space *space, double tokens_per_second);
uint32_t fk_rates_probe_blocks(const struct fk_space *space, uint32_t cpu_slots);
/* With both locks: what was known when the SSD's files were used last; and to those who come after. */
void fk_rates_recall(struct fk_space *space);
void fk_rates_save(struct fk_space *space, uint64_t now_us, bool end);

/* link.c: agents of other processes. With the lock: */
/* Jobs go to their rings; returns whether workers of this process may have some too. */
bool fk_links_push(struct fk_node *node);
void fk_links_cancel(struct fk_node *node);

/* server.c */
void fk_server_stop(struct fk_node *node);
/* Something for the server's thread to do: an instance waits for its agents, or has ended. */
void fk_server_wake(struct fk_node *node);

/* events.c; with the lock, and only where node->events is there: */
int fk_node_events_create(struct fk_node *node);
void fk_node_events_destroy(struct fk_node *node);
/* What the core has told goes into the journal, under the names that the slots have now, and to the cluster. Also
 * without node->events. */
void fk_node_events_drain(struct fk_node *node);
/* Every subscriber compares what it knows with what is there. */
void fk_node_events_look_anew(struct fk_node *node);
/* Room for the slots that a put of n blocks gets; NULL: no memory. */
uint32_t *fk_node_events_slots(struct fk_node *node, uint32_t n);
/* The put's blocks have got these slots: they get their names. */
void fk_node_events_name(struct fk_namespace *ns, const flexkv_op_args *args, uint32_t first,
                         const uint32_t *slots, uint32_t n);
/* Blocks of a put that were there, and have no names, as they came from other nodes: they get them, and are announced. */
void fk_node_events_name_known(struct fk_namespace *ns, const flexkv_op_args *args, const struct fk_key *keys,
                               uint32_t first, uint32_t n);
/* Has something happened that a session waits for? Once. */
bool fk_node_events_news(struct fk_node *node);
/* Labels by number (with the lock), of an id, of texts (both without it); FK_NONE: none. */
struct fk_label fk_node_label_at(struct fk_node *node, uint32_t number);
uint32_t fk_node_events_label(struct fk_node *node, uint64_t id);
uint32_t fk_node_label_get(struct fk_node *node, const struct fk_label *label);
uint32_t fk_node_events_label_of(struct fk_node *node, const char *lora, const char *salt);     /* with the lock */
void fk_node_events_stats(struct fk_node *node, flexkv_stats *out);
int fk_local_namespace_label(flexkv_namespace *ns, const char *lora_name, const char *cache_salt);
int fk_local_events_open(flexkv_node *node, flexkv_space *space, flexkv_events **out);

/* sharing.c: where node->sharing is there; all but start, stop, free and stage_submit with the lock. */
bool fk_node_shares(const struct fk_settings *set);
int fk_node_share_start(struct fk_node *node);
void fk_node_share_stop(struct fk_node *node);
void fk_node_share_free(struct fk_node *node);
void fk_node_share_wake(struct fk_node *node);
void fk_node_share_tell(struct fk_node *node, const struct fk_core_event *ev, uint32_t n);
void fk_node_share_lost(struct fk_node *node);
int fk_node_share_space(struct fk_space *s);
/* How far others reach with what is here. */
uint32_t fk_node_share_reach(struct fk_node *node, const struct fk_instance *in, const struct fk_key *keys,
                             uint32_t n, uint32_t known, uint64_t now);
/* The slot gets other bytes: what they sum up to, and what routers call them, is not known. Also without sharing. */
void fk_node_slot_filling(void *node, uint32_t space, uint32_t slot);
/* SSD blocks that others want; also without node->sharing. */
bool fk_node_stage_wanted(const struct fk_node *node);
uint32_t fk_node_stage_take(struct fk_node *node, struct fk_peers_stage *out, uint32_t max);
void fk_node_stage_submit(struct fk_node *node, const struct fk_peers_stage *stage, uint32_t n, uint64_t now);
/* false: it is the core's. */
bool fk_node_stage_done(struct fk_node *node, const struct fk_core_ssd_done *done);
struct json_t *fk_node_share_json(const struct fk_node *node);
void fk_node_share_stats(struct fk_node *node, flexkv_stats *out);

/* remote.c: where node->remote is there; all but start, space and stop with the lock. */
bool fk_node_has_remote(const struct fk_settings *set);
int fk_node_remote_start(struct fk_node *node);
int fk_node_remote_space(struct fk_space *s);
int fk_node_remote_added(struct fk_space *s);         /* it is in the core */
void fk_node_remote_stop(struct fk_node *node);
void fk_node_remote_wake(struct fk_node *node);
void fk_node_remote_tell(struct fk_node *node, const struct fk_core_event *ev, uint32_t n);
void fk_node_remote_used(struct fk_node *node, const struct fk_instance *in, uint32_t group,
                         const struct fk_key *keys, uint32_t n);
/* A block that no peer can give, for the store to be asked for; false: it hasn't it either. Also without remote. */
bool fk_node_remote_fetch(void *node, const struct fk_core_fetch *want);
/* Nothing that is to be written waits, or can be written. Also without remote. */
bool fk_node_remote_idle(struct fk_node *node);
void fk_node_remote_reset(struct fk_node *node);
int fk_node_remote_reset_wait(struct fk_node *node);   /* without the lock; also without remote */
struct json_t *fk_node_remote_json(const struct fk_node *node);
void fk_node_remote_stats(struct fk_node *node, flexkv_stats *out);
/* How far peers and the store reach with what is here; with either of them. */
uint32_t fk_node_reach(struct fk_node *node, const struct fk_instance *in, const struct fk_key *keys,
                       uint32_t n, uint32_t known, uint64_t now);

/* names_io.c */
struct fk_names_io {                /* what a request's name needs, taken under the lock */
    uint64_t hash;                  /* READ */
    struct fk_label label;          /* WRITE */
};
void fk_names_prepare(struct fk_node *node, const struct fk_core_ssd_req *req, uint32_t n,
                      struct fk_names_io *io);
/* The I/O thread: transfers of one space. Names of what is written are written, of what is read, read. */
void fk_names_carry(struct fk_space *s, const struct fk_core_ssd_req *req,
                    const struct fk_names_io *io, uint32_t n);
int fk_names_open(struct fk_space *s);
void fk_names_close(struct fk_space *s);
void fk_names_recover(struct fk_space *s, const struct fk_core_found *found, size_t n);

/* publish.c: with kv_events_endpoint set, what the node holds is told over ZeroMQ. */
int fk_node_publish_start(struct fk_node *node);
void fk_node_publish_stop(struct fk_node *node);
struct json_t *fk_node_publish_json(const struct fk_node *node);

/* status.c */
int fk_node_status_json(struct fk_node *node, char **json);

#endif
