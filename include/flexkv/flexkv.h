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
 *   node       index + tiers (cpu memory, SSD), opened in this process.
 *
 * The way of a request
 *   keys = flexkv_keys_from_tokens(...)                  once per prompt
 *   flexkv_match(ns, keys, n) -> lease, m leading blocks are known
 *   flexkv_get(lease, pages)  -> their bytes are copied into the engine's pages
 *   ... the engine computes the rest ...
 *   flexkv_put(ns, keys, n, first, pages)                stores what is new
 *   flexkv_poll(node)         -> completions of get, put, prefetch
 *
 * Rules for all calls
 *   Errors    0 or a count on success, -errno on failure, nothing changed then.
 *   Threads   any thread may call any function at any time, except that an object must not
 *             be used during or after the call that closes it.
 *   Waiting   flexkv_poll waits as long as its timeout says; opening and closing a node,
 *             opening a space, unregistering regions and flexkv_reset wait for files and
 *             copies. All others take microseconds.
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

/* ---- spaces and namespaces ----------------------------------------------------------- */
typedef struct flexkv_space_desc {
    size_t struct_bytes;
    const char *name;             /* files on SSD carry it: [A-Za-z0-9_.-]{1,63}; NULL "default" */
    const void *fingerprint;      /* identity of model, dtype and layout: any bytes */
    size_t fingerprint_bytes;
    uint32_t tokens_per_block;    /* > 0 */
    uint32_t ranks;               /* > 0: tensor x pipeline parallel workers */
    uint64_t slice_bytes;         /* > 0: one block's bytes on one rank, all its layers */
} flexkv_space_desc;

/*
 * Defines a space and takes its share of the tiers; blocks that its SSD store kept from an
 * earlier run are found again. -EEXIST: the store on SSD has another geometry (see
 * ssd_recreate); -ENOSPC: max_spaces are defined; -EINVAL. Asking again with the same name
 * and description gives the same space; with another description -EEXIST.
 */
FLEXKV_API int flexkv_space_open(flexkv_node *node, const flexkv_space_desc *desc,
                                 flexkv_space **out);

/*
 * The namespace named by n_parts strings (none: the default one). The first part is the name
 * that quotas in the configuration are given for.
 */
FLEXKV_API int flexkv_namespace_open(flexkv_space *space, const char *const *parts,
                                     size_t n_parts, flexkv_namespace **out);

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
} flexkv_match_result;

/*
 * The longest known prefix of the n keys. The matched blocks stay until the lease is used by
 * a get, released, or runs out (lease_timeout_ms). Returns 0.
 */
FLEXKV_API int flexkv_match(flexkv_namespace *ns, const flexkv_key *keys, size_t n,
                            flexkv_match_result *out);
/* Gives a lease back unused. -ENOENT: it ran out or was used. */
FLEXKV_API int flexkv_release(flexkv_node *node, uint64_t lease);

/* ---- operations ------------------------------------------------------------------------- */
typedef struct flexkv_op_args {
    size_t struct_bytes;
    const uint32_t *pages;        /* page of each block, the same on every rank; not for prefetch */
    uint32_t timeout_ms;          /* 0: op_timeout_ms */
    void *user_data;              /* comes back in the completion */
    int8_t *results;              /* optional, one per block: 0 or -errno; written before the
                                     completion is returned; the caller's until then */
} flexkv_op_args;

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
/* Brings the known prefix of the keys into the cpu tier, behind gets in priority. The completion
 * counts the blocks that were known; args->pages and results are not used. */
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

/* Drops every block of every tier, of all spaces. Operations under way end with -ECANCELED.
 * Returns when the stores on SSD are marked, so that no restart brings old blocks back; -EIO,
 * -ETIMEDOUT: they could not be marked in time, here all is dropped nevertheless. */
FLEXKV_API int flexkv_reset(flexkv_node *node);

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
} flexkv_stats;

/* Counters since open. Sums over all spaces. */
FLEXKV_API int flexkv_node_stats(flexkv_node *node, flexkv_stats *out);

#ifdef __cplusplus
}
#endif
#endif
