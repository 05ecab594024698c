/*
 * flexkv.h - the public interface of libflexkv: a cache of KV blocks beyond GPU memory.
 *
 * The model
 *   block      the KV of tokens_per_block consecutive tokens, all layers, all ranks.
 *   key        128 bits; identifies a block together with its whole prefix.
 *   space      one KV geometry (model, tokens per block, bytes per rank).
 *   namespace  an isolation domain inside a space (tenant, LoRA, salt); seeds the keys.
 *   page       the engine's room for one block in one layer on one rank.
 *   region     a run of pages: page p starts at base + p * stride.
 *   node       index + tiers (cpu memory, SSD): opened in this process, or served by a daemon.
 *   instance   one engine: its workers, whose pages a put reads and a get fills.
 *   agent      the thread in a worker process that copies between its pages and the node.
 *
 * The way of a request
 *   keys = flexkv_keys_from_tokens(...)                  once per prompt
 *   flexkv_match(ns, keys, n) -> lease, m leading blocks are known
 *   flexkv_get(lease, pages)  -> their bytes are copied into the engine's pages
 *   ... the engine computes the rest ...
 *   flexkv_put(ns, keys, n, first, pages)                stores what is new
 *   flexkv_poll(node)         -> completions of get, put, prefetch
 *
 * Where things run
 *   in one process    flexkv_node_open, flexkv_space_open, flexkv_regions_register
 *   workers apart     flexkv_node_open + flexkv_node_listen in the scheduler's process;
 *                     flexkv_agent_create in each worker's
 *   shared by engines flexkv serve, or flexkv_node_open + flexkv_node_serve; in each scheduler
 *                     flexkv_node_connect; flexkv_agent_create in each worker
 *   Addresses: ipc://PATH is a unix socket in the file system, ipc://@NAME one in the abstract
 *   namespace, which leaves nothing behind. A process of another user is turned away.
 *
 * Rules for all calls
 *   Errors    0 or a count on success, -errno on failure, nothing changed then.
 *   Threads   any thread may call any function at any time, except that an object must not
 *             be used during or after the call that closes it.
 *   Waiting   flexkv_poll waits as long as its timeout says; opening, connecting and closing a
 *             node, opening a space, unregistering regions and flexkv_reset wait for files,
 *             workers and copies. All others take microseconds; where a daemon serves the node,
 *             server_timeout_ms at most.
 *   Ownership arguments are copied during the call unless said otherwise. Handles belong to
 *             the node: closing the node ends spaces and namespaces too.
 *   Sizes     bytes unless the name says otherwise.
 *   Structs   the caller sets struct_bytes = sizeof; newer libraries accept older structs.
 *   Fork      a node does not survive fork(): the child must not touch it.
 */
#ifndef FLEXKV_H
#define FLEXKV_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define FLEXKV_API __attribute__((visibility("default")))
#else
#define FLEXKV_API
#endif

typedef struct flexkv_config flexkv_config;
typedef struct flexkv_node flexkv_node;
typedef struct flexkv_space flexkv_space;
typedef struct flexkv_namespace flexkv_namespace;

typedef struct flexkv_key {
    uint64_t lo, hi;
} flexkv_key;

/* "MAJOR.MINOR.PATCH" of the library in use. */
FLEXKV_API const char *flexkv_version(void);

/* The reason of the calling thread's last failed call, in words that name the setting, file
 * or argument at fault; valid until its next call. Never NULL. */
FLEXKV_API const char *flexkv_last_error(void);

/* ---- configuration ------------------------------------------------------------------
 * Options, their units and defaults: flexkv.conf(5). Not thread-safe; used before open.
 */
FLEXKV_API int flexkv_config_create(flexkv_config **out);
FLEXKV_API void flexkv_config_destroy(flexkv_config *config);
/* What a node does by itself: the file FLEXKV_CONFIG_PATH names, and the environment. */
FLEXKV_API int flexkv_config_load_default(flexkv_config *config);
FLEXKV_API int flexkv_config_load_file(flexkv_config *config, const char *path);
FLEXKV_API int flexkv_config_load_env(flexkv_config *config);
/* One option by its file key, e.g. ("cpu_cache_gb", "0.5"); wins over file and environment,
 * whatever the order of the calls. -EINVAL, -ENOENT (unknown key), -EBUSY (frozen). */
FLEXKV_API int flexkv_config_set(flexkv_config *config, const char *key, const char *value);
/* The effective value of an option as text (as flexkv_config_set would take it; "" when empty), cut
 * to bytes. Returns its length, or -ENOENT. Defaults that follow from others count as soon as a
 * node is opened with the config, or this function is called: nothing can be set afterwards. */
FLEXKV_API int flexkv_config_get(flexkv_config *config, const char *key, char *text, size_t bytes);

/* ---- node ---------------------------------------------------------------------------
 * Opens a node in this process; config NULL: as flexkv_config_load_default. The config is
 * frozen from then on: it may be opened again or destroyed, not changed. -EINVAL, -ENOMEM, -EBUSY (a directory is in use), -ENOSPC, -EACCES, ...
 */
FLEXKV_API int flexkv_node_open(const flexkv_config *config, flexkv_node **out);
/*
 * Ends all operations (their completions are lost), waits until nothing is copied or
 * written any more (a stuck device is given up after the operation timeout), keeps what is on
 * SSD. Accepts NULL.
 */
FLEXKV_API void flexkv_node_close(flexkv_node *node);

/* A file descriptor that is readable while completions wait; for poll/epoll. Belongs to the
 * node; never read or close it. */
FLEXKV_API int flexkv_node_fd(flexkv_node *node);

/*
 * Lets agents of other processes register at the address, from a thread of the node's own.
 * Before the first space is opened. -EADDRINUSE: somebody answers there (last_error says who);
 * -EINVAL: no such kind of address; -EACCES, ...
 */
FLEXKV_API int flexkv_node_listen(flexkv_node *node, const char *address);
/* The same for clients (flexkv_node_connect) too: what a daemon does. The node's own process
 * must not open spaces then. */
FLEXKV_API int flexkv_node_serve(flexkv_node *node, const char *address);
/* Waits until the served node has had no client for idle_ms (the first minute of its life does not
 * count, unless a client has come and gone; who opens no space is none), or until timeout_ms (-1: no limit) are over: 1 idle,
 * 0 not. */
FLEXKV_API int flexkv_node_wait_idle(flexkv_node *node, int idle_ms, int timeout_ms);
/*
 * A node that a daemon serves. When the daemon goes, operations end with -ENOTCONN and matches find
 * nothing until it is back: the node reconnects by itself and opens its spaces again. config: only
 * server_timeout_ms and logging are used. -ECONNREFUSED, -ENOENT: nobody answers;
 * -EPROTO: another version or program; -ETIMEDOUT.
 */
FLEXKV_API int flexkv_node_connect(const flexkv_config *config, const char *address,
                                   flexkv_node **out);
/* What `flexkv status --json` prints: one JSON object. To be freed with free(). */
FLEXKV_API int flexkv_node_status(flexkv_node *node, char **json);

/* ---- spaces and namespaces ----------------------------------------------------------- */
typedef struct flexkv_space_desc {
    size_t struct_bytes;
    const char *name;             /* files on SSD carry it: [A-Za-z0-9_.-]{1,63}; NULL "default" */
    const void *fingerprint;      /* identity of model, dtype and layout: any bytes */
    size_t fingerprint_bytes;
    uint32_t tokens_per_block;    /* > 0 */
    uint32_t ranks;               /* > 0: slices of a block; tensor x pipeline parallel ranks */
    uint64_t slice_bytes;         /* one block's bytes on one rank, all its layers; 0: as the agents
                                     of the instance say; the call waits for them then */
    const char *instance;         /* name that its agents give too; NULL: "" */
    uint32_t workers;             /* agents of the instance; more than ranks where several workers hold
                                     the same slice; 0: ranks, or none: regions_register */
    uint32_t wait_ms;             /* for the agents; 0: worker_timeout_ms */
} flexkv_space_desc;

/*
 * Defines a space and takes its share of the tiers; blocks that its SSD store kept from an
 * earlier run are found again. -EEXIST: the store on SSD has another geometry (see
 * ssd_recreate); -ENOSPC: max_spaces are defined; -ETIMEDOUT: agents are missing; -EINVAL. Asking
 * again with the same name, instance and description gives the same handle; with another instance a
 * handle of its own on the same blocks; with another description -EEXIST.
 */
FLEXKV_API int flexkv_space_open(flexkv_node *node, const flexkv_space_desc *desc,
                                 flexkv_space **out);

/*
 * The namespace named by n_parts strings (none: the default one). The first part is the name
 * that quotas in the configuration are given for.
 */
FLEXKV_API int flexkv_namespace_open(flexkv_space *space, const char *const *parts,
                                     size_t n_parts, flexkv_namespace **out);
/*
 * How routers know the namespace: what its blocks' events carry (NULL or "": none; 255 bytes each at
 * most). For blocks put from now on. -EINVAL.
 */
FLEXKV_API int flexkv_namespace_label(flexkv_namespace *ns, const char *lora_name,
                                      const char *cache_salt);

/* ---- engine memory --------------------------------------------------------------------- */
typedef struct flexkv_region {
    void *base;
    uint64_t stride;              /* bytes from page to page, >= page_bytes */
    uint64_t page_bytes;
    uint64_t pages;
} flexkv_region;

/*
 * Registers the pages of one rank: its layers in order (K and V apart are two regions). The
 * regions' page_bytes add up to slice_bytes; all have as many pages. The memory must stay
 * valid until it is unregistered. -EEXIST: the rank is registered; -EINVAL.
 * Gets and puts need all ranks registered (-ENOTCONN else).
 */
FLEXKV_API int flexkv_regions_register(flexkv_space *space, uint32_t rank,
                                       const flexkv_region *regions, size_t n_regions);
/* Waits until no copy touches the memory any more; operations under way fail. */
FLEXKV_API int flexkv_regions_unregister(flexkv_space *space, uint32_t rank);

/* ---- agents: the memory of a worker in a process of its own ------------------------------- */
typedef struct flexkv_agent flexkv_agent;
typedef struct flexkv_agent_desc {
    size_t struct_bytes;
    const char *address;          /* of the node */
    const char *space;            /* as in flexkv_space_desc; NULL "default" */
    const char *instance;         /* NULL: "" */
    uint32_t worker;              /* which of the instance's workers this is */
    uint32_t slice;               /* which slice of a block its pages hold; < ranks */
    uint32_t replica, replicas;   /* this is one of so many workers with the same slice (MLA): each
                                     block is stored by one of them and loaded by all; 0, 1 where
                                     each has its own. replicas 0: slice and replica follow from the
                                     worker's number, where workers with one slice are neighbours */
    uint32_t timeout_ms;          /* without a node for so long: one line in the log; 0:
                                     worker_timeout_ms. It goes on looking */
    const uint32_t *layer_regions;/* how many of the regions each layer has, in order; for copies in
                                     layers. NULL: none of those. Read by the call only */
    uint32_t n_layers;
} flexkv_agent_desc;

/*
 * Starts a thread that finds the node, registers the regions, and copies when told. Returns at
 * once; the node may start later, go and come back. regions: as in flexkv_regions_register, of
 * slice_bytes at most. The memory must stay valid until the agent is closed.
 */
FLEXKV_API int flexkv_agent_create(const flexkv_agent_desc *desc, const flexkv_region *regions,
                                   size_t n_regions, flexkv_agent **out);
/* 1: registered at a node; 0: looking for it; -errno: turned away (flexkv_last_error says why; it
 * goes on trying). */
FLEXKV_API int flexkv_agent_state(flexkv_agent *agent);
/*
 * After this call no copy of these operations touches the pages any more, now or later, whatever
 * the node says: what an engine needs before it gives the pages to another request. Waits
 * for a copy under way to stop, a block at most; -ETIMEDOUT after timeout_ms.
 */
FLEXKV_API int flexkv_agent_revoke(flexkv_agent *agent, const uint64_t *ops, size_t n,
                                   int timeout_ms);
/*
 * For gets with FLEXKV_OP_LAYERWISE: makes the CUDA stream wait until the layer's pages of these
 * operations are in place; what is launched on it afterwards may read them. Returns as soon as the
 * copies are on their way; in host memory, when they are in place (stream: NULL). -ETIMEDOUT: the
 * agent has not been told of an operation, or is not so far, after timeout_ms; other -errno: the
 * copy failed. The operation's completion says whether all of it arrived.
 */
FLEXKV_API int flexkv_agent_wait_layer(flexkv_agent *agent, const uint64_t *ops, size_t n,
                                       uint32_t layer, void *stream, int timeout_ms);
/*
 * For gets that were reported with FLEXKV_COMPLETION_EARLY: makes the CUDA stream wait until the pages of these
 * operations are in place; returns at once. Operations that this agent does not know, or that have ended, are none to
 * wait for. -EIO: the driver has failed; the pages must not be used.
 */
FLEXKV_API int flexkv_agent_wait_loaded(flexkv_agent *agent, const uint64_t *ops, size_t n, void *stream);
/*
 * For engines that wait for layers by eventfds (SGLang): listens at a unix socket (ipc://PATH), where
 * the worker's own process hands over one eventfd for each layer and counter. From then on a get with
 * `counter` adds 1 to the eventfd of a layer when that layer's pages are in place, layer by layer.
 * When such a get fails after it began, the process's own descriptors of all these eventfds are
 * made unreadable (EIO) before their waiters are let go: nobody takes them for loaded.
 * -EINVAL: no layers were told of, or more than 253; -EADDRINUSE; -EBUSY: called before.
 */
FLEXKV_API int flexkv_agent_serve_layers(flexkv_agent *agent, const char *address);
/* Stops copying, leaves the node. Accepts NULL. A copy that a hanging device does not end keeps what
 * it touches until the process ends. */
FLEXKV_API void flexkv_agent_close(flexkv_agent *agent);

/* ---- keys ------------------------------------------------------------------------------
 * Keys of the n_tokens / tokens_per_block whole blocks of a prompt; a rest is ignored.
 * Returns how many keys were written. prev: key of the block before these tokens, NULL at
 * the start of a prompt. Keys are stable across runs and machines (docs/keys.md).
 */
FLEXKV_API size_t flexkv_keys_from_tokens(const flexkv_namespace *ns, const flexkv_key *prev,
                                          const uint32_t *tokens, size_t n_tokens,
                                          flexkv_key *keys);
/*
 * Keys from the engine's own block hashes (each of which covers its whole prefix): n hashes of
 * hash_bytes (>= 8), one every stride bytes. As safe against engineered collisions as the
 * engine's hash is.
 */
FLEXKV_API size_t flexkv_keys_from_hashes(const flexkv_namespace *ns, const void *hashes,
                                          size_t hash_bytes, size_t stride, size_t n,
                                          flexkv_key *keys);

/* ---- match ------------------------------------------------------------------------------ */
typedef struct flexkv_match_result {
    uint64_t lease;               /* 0 if blocks is 0 */
    uint32_t blocks;              /* leading blocks that are known */
    uint32_t cpu_blocks;          /* of these: in the cpu tier */
    uint32_t ssd_blocks;          /* of these: on SSD only */
    uint32_t peer_blocks;         /* of these: on other nodes, or in a shared store, only */
} flexkv_match_result;

/*
 * The longest known prefix of the n keys. The matched blocks stay until the lease is used by
 * a get, released, or runs out (lease_timeout_ms). Returns 0.
 */
FLEXKV_API int flexkv_match(flexkv_namespace *ns, const flexkv_key *keys, size_t n,
                            flexkv_match_result *out);
/* Gives a lease back unused. -ENOENT: it ran out or was used. */
FLEXKV_API int flexkv_release(flexkv_node *node, uint64_t lease);
/*
 * What computing costs: tokens per second of prefill. With it known, a match is cut to what
 * surely is loaded sooner than computed, by the measured speed of the tiers; the blocks that
 * are left out count as declined. An SSD that was not measured yet gives nothing; it is
 * measured in the background. 0: unknown, every hit is given. Told before a restart it is
 * known after it, where the space has an SSD tier.
 */
FLEXKV_API int flexkv_space_set_compute_rate(flexkv_space *space, double tokens_per_second);

/* ---- operations ------------------------------------------------------------------------- */
typedef struct flexkv_op_args {
    size_t struct_bytes;
    const uint32_t *pages;        /* page of each block, the same on every rank; not for prefetch */
    uint32_t timeout_ms;          /* 0: op_timeout_ms */
    void *user_data;              /* comes back in the completion */
    int8_t *results;              /* optional, one per block: 0 or -errno; written before the
                                     completion is returned; the caller's until then */
    uint32_t flags;               /* enum flexkv_op_flags */
    /* Of a put, for KV events: what the engine and its router call the blocks first .. n-1. NULL: the
     * blocks make no events. Not looked at where enable_kv_events is off. */
    const uint64_t *event_hashes; /* one per block; 0: no events of this one */
    const uint32_t *event_tokens; /* tokens_per_block per block */
    uint64_t event_parent;        /* hash of block first-1; means nothing if first is 0 */
    uint32_t counter;             /* with FLEXKV_OP_LAYERWISE: 1 + the layer counter that every worker's
                                     agent moves (flexkv_agent_serve_layers); 0: none */
} flexkv_op_args;

/* A get that agents carry out layer by layer, of all blocks each, so that the engine can begin with
 * the first (flexkv_agent_wait_layer). It begins when all blocks are in the cpu tier. */
/* EARLY, of a get into the memory of CUDA devices: it may be reported some milliseconds before its end, when all its
 * copies are queued there and nothing but a device or a worker that dies keeps them from arriving. Its completion then
 * has FLEXKV_COMPLETION_EARLY, and a stream that is to use the pages for anything must wait first
 * (flexkv_agent_wait_loaded, in each worker). Elsewhere, with LAYERWISE, and where checksums are taken by the copies, no effect. */
enum flexkv_op_flags { FLEXKV_OP_LAYERWISE = 1, FLEXKV_OP_EARLY = 2 };

/*
 * Copies blocks [first, first + n) of the lease into the engine's pages. Once the call succeeds
 * the lease is used up, whatever becomes of the get. n 0 is allowed: it just counts as a use. A block that can't be had fails, and with it all after it: the
 * engine computes them. -ENOENT: no such lease; -EINVAL: range or page out of bounds.
 */
FLEXKV_API int flexkv_get(flexkv_node *node, uint64_t lease, uint32_t first, uint32_t n,
                          const flexkv_op_args *args, uint64_t *op);
/*
 * Stores blocks [first, n) of a prompt from the engine's pages (pages[0] belongs to keys[first]).
 * Blocks already there or under way cost nothing and count as stored. If there is no room, a leading part is
 * stored (status -ENOSPC); without the block before the first one, nothing is (-ENOENT). The pages must not change until the put completes.
 */
FLEXKV_API int flexkv_put(flexkv_namespace *ns, const flexkv_key *keys, uint32_t n,
                          uint32_t first, const flexkv_op_args *args, uint64_t *op);
/* Brings the known prefix of the keys into the cpu tier, behind gets in priority; but for what workers read
 * from SSD themselves (GPU direct storage). The completion counts the blocks that were known; args->pages and results are not used. */
FLEXKV_API int flexkv_prefetch(flexkv_namespace *ns, const flexkv_key *keys, uint32_t n,
                               const flexkv_op_args *args, uint64_t *op);
/* Asks an operation to end; it completes with -ECANCELED, or as it did if it was faster.
 * -ENOENT: no such operation. */
FLEXKV_API int flexkv_cancel(flexkv_node *node, uint64_t op);

enum flexkv_op_kind { FLEXKV_OP_GET = 1, FLEXKV_OP_PUT = 2, FLEXKV_OP_PREFETCH = 3 };

/* The copy engine did not confirm that it stopped: pages of this operation may still be
 * read or written, until flexkv_regions_unregister has returned. Seen only when a worker
 * hangs. */
#define FLEXKV_COMPLETION_PAGES_BUSY 1u
/* A get with FLEXKV_OP_EARLY: all its blocks are on their way. */
#define FLEXKV_COMPLETION_EARLY 2u

typedef struct flexkv_completion {
    uint64_t op;
    void *user_data;
    uint32_t kind;                /* enum flexkv_op_kind */
    int32_t status;               /* 0: all blocks; else the first block's -errno:
                                     -ETIMEDOUT, -ECANCELED, -EIO, -EBADMSG, -ENOSPC, -ENOENT,
                                     -ENODEV (SSD out of use), -ENOTCONN (unregistered),
                                     -EINVAL (keys that are no chain) */
    uint32_t blocks;              /* asked for */
    uint32_t blocks_ok;           /* leading blocks that were got / are stored / are in cpu */
    uint32_t flags;               /* FLEXKV_COMPLETION_* */
    uint32_t reserved;
} flexkv_completion;

/*
 * Takes up to max completions; waits up to timeout_ms for the first (0: not at all, -1: no
 * limit). Each operation is reported exactly once. Returns how many.
 */
FLEXKV_API int flexkv_poll(flexkv_node *node, flexkv_completion *out, int max, int timeout_ms);

/* Drops every block of every tier, of all spaces; in a directory that nodes share those of the
 * node's spaces, for all nodes. Operations under way end with -ECANCELED.
 * Returns when the stores on SSD, and that directory, are marked, so that no restart brings old blocks back; -EIO,
 * -ETIMEDOUT: they could not be marked in time, here all is dropped nevertheless. */
FLEXKV_API int flexkv_reset(flexkv_node *node);

/* ---- KV events --------------------------------------------------------------------------
 * What a router that knows blocks by the engine's hashes has to be told: which blocks are where. With
 * the option enable_kv_events, for blocks whose put named them (flexkv_op_args).
 *
 * A subscription first announces all that is there, then what changes: a block is STORED in a medium
 * after its bytes are in place and REMOVED before its room is used again, in turns, each exactly once
 * per subscription, also when the subscriber was too slow or the daemon was started anew in between.
 */
typedef struct flexkv_events flexkv_events;
enum flexkv_medium { FLEXKV_MEDIUM_CPU = 1, FLEXKV_MEDIUM_STORAGE = 2, FLEXKV_MEDIUM_EXTERNAL = 3 };
enum flexkv_event_kind { FLEXKV_EVENT_STORED = 1, FLEXKV_EVENT_REMOVED = 2 };

typedef struct flexkv_event {
    uint8_t kind, medium;         /* the enums above */
    uint8_t root;                 /* no parent: the first block of a prompt. STORED only */
    uint32_t n_tokens;            /* tokens_per_block; REMOVED: 0 */
    uint64_t hash, parent;        /* parent: STORED only */
    const uint32_t *tokens;       /* STORED only; like the texts valid until the next call on the
                                     subscription */
    const char *lora_name, *cache_salt;     /* NULL: none */
} flexkv_event;

/* space NULL: all spaces of the node, those too that are opened later. To be closed before the node.
 * -EOPNOTSUPP: enable_kv_events is off. */
FLEXKV_API int flexkv_events_open(flexkv_node *node, flexkv_space *space, flexkv_events **out);
/* The next events, max at most; returns how many, 0: nothing for now, also while a daemon is not there. Does
 * not wait, but for a daemon's answer. -ENOTCONN: the node is closed; -ENOMEM: nothing is lost, what is there
 * is looked at anew the next time; -EOPNOTSUPP: a daemon came back without KV events. */
FLEXKV_API int flexkv_events_take(flexkv_events *events, flexkv_event *out, size_t max);
/* Readable when there may be something to take; until take has returned 0. Belongs to the
 * subscription. */
FLEXKV_API int flexkv_events_fd(flexkv_events *events);
/* The receiver has forgotten everything: what is there is announced anew; nothing is taken back. */
FLEXKV_API int flexkv_events_again(flexkv_events *events);
/* Accepts NULL. */
FLEXKV_API void flexkv_events_close(flexkv_events *events);

/* ---- statistics --------------------------------------------------------------------------- */
typedef struct flexkv_tier_stats {
    uint64_t slots, free_slots;   /* blocks */
    uint64_t hit_blocks;          /* matched in this tier */
    uint64_t stored_blocks, evicted_blocks;
    uint64_t bytes_read, bytes_written;
    uint64_t errors;              /* blocks that failed: I/O error, checksum */
} flexkv_tier_stats;

typedef struct flexkv_stats {
    size_t struct_bytes;
    uint64_t matches, match_blocks, miss_blocks;
    uint64_t gets, puts, prefetches, cancelled, timeouts;
    uint64_t get_blocks, get_failed_blocks, put_blocks, put_dropped_blocks;
    uint64_t blocks;              /* in the index now */
    uint64_t index_bytes;
    uint64_t leases, operations;  /* open now */
    uint64_t write_backlog_blocks; /* waiting for, or being written to, SSD now */
    flexkv_tier_stats cpu, ssd;
    uint64_t declined_blocks;     /* known, but computing them is faster */
    uint64_t events, events_taken; /* KV events that happened; that all subscribers took */
    uint64_t event_resyncs;       /* subscribers that had fallen behind and looked anew */
    flexkv_tier_stats peer;       /* other nodes and shared stores; slots: 0; stored: fetched from there; bytes_read
                                     from others, bytes_written by others */
} flexkv_stats;

/* Counters since open. Sums over all spaces. */
FLEXKV_API int flexkv_node_stats(flexkv_node *node, flexkv_stats *out);

#ifdef __cplusplus
}
#endif
#endif
