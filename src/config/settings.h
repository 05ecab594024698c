/*
 * settings.h - the value of every option that has a meaning for us, as plain fields.
 *
 * Filled by config.c from the table in options.c; read by whoever builds a node, a
 * client or a tool. Read only for them: strings and lists belong to the fk_config
 * that this struct is a part of, and live as long as it. No code, no locks.
 *
 * Every option type has one C type, checked against the table at compile time:
 * bool -> bool, int -> int64_t, float -> double, size -> uint64_t (bytes),
 * string -> char *, list -> struct fk_string_list, enum -> one of the enums below.
 */
#ifndef FK_CONFIG_SETTINGS_H
#define FK_CONFIG_SETTINGS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/log.h"

/* The order of each enum is the order of the choices in options.c. */
enum fk_ssd_write_policy { FK_SSD_WRITE_THROUGH, FK_SSD_WRITE_ON_REUSE, FK_SSD_WRITE_ON_EVICT };
enum fk_key_hash { FK_KEY_HASH_SHA256, FK_KEY_HASH_XXH3 };
enum fk_cpu_memory {
    FK_CPU_MEMORY_AUTO, FK_CPU_MEMORY_HUGETLB, FK_CPU_MEMORY_THP, FK_CPU_MEMORY_PLAIN
};
enum fk_eviction_policy {
    FK_EVICT_LRU, FK_EVICT_LFU, FK_EVICT_SLRU, FK_EVICT_FIFO, FK_EVICT_MRU, FK_EVICT_FILO,
    FK_EVICT_S3FIFO, FK_EVICT_ARC, FK_EVICT_AUTO
};
enum fk_switch { FK_SWITCH_AUTO, FK_SWITCH_OFF, FK_SWITCH_ON };
enum fk_server_launch { FK_SERVER_EMBEDDED, FK_SERVER_EXTERNAL };
enum fk_shared_kv_mode {
    FK_SHARED_KV_SHARDED, FK_SHARED_KV_RANK_ROTATE, FK_SHARED_KV_ALL_WRITE,
    FK_SHARED_KV_RANK0_ONLY, FK_SHARED_KV_LAYER_PARALLEL
};
enum fk_layerwise_notify { FK_LAYERWISE_HOSTFUNC, FK_LAYERWISE_POLLING };
enum fk_remote_backend { FK_REMOTE_DIRECTORY, FK_REMOTE_NIXL };
enum fk_remote_write_policy { FK_REMOTE_WRITE_THROUGH, FK_REMOTE_WRITE_ON_REUSE };
enum fk_peer_copies { FK_PEER_COPIES_KEEP, FK_PEER_COPIES_EVICT_FIRST };
enum fk_mooncake_protocol { FK_MOONCAKE_TCP, FK_MOONCAKE_RDMA };

struct fk_string_list {
    char **item;
    size_t count;
};

/* A part of each tier: nothing said, so many bytes, or a fraction (0..1) of the tier. */
struct fk_quota {
    enum { FK_QUOTA_NONE, FK_QUOTA_BYTES, FK_QUOTA_FRACTION } kind;
    uint64_t bytes;
    double fraction;
};

struct fk_namespace_quota {
    char *name;
    struct fk_quota max;         /* NONE: the whole tier */
    struct fk_quota guaranteed;  /* NONE: nothing is kept for it */
    bool unshared;               /* its blocks stay on this node */
};

struct fk_namespace_list {
    struct fk_namespace_quota *item;
    size_t count;
};

struct fk_settings {
    /* capacity. Where *_blocks is not 0 it counts instead of *_bytes: the node multiplies
     * it by the block size of the space when that is defined. */
    char *config_path;
    uint64_t cpu_cache_bytes;
    int64_t cpu_cache_blocks;
    uint64_t ssd_cache_bytes;
    int64_t ssd_cache_blocks;
    struct fk_string_list ssd_cache_dir;
    bool enable_ssd;             /* already applied to ssd_cache_* by fk_config_finish */

    /* memory and copying */
    enum fk_cpu_memory cpu_memory;
    bool use_hugepage_cpu_buffer; /* already applied to cpu_memory by fk_config_finish */
    uint64_t hugepage_size_bytes; /* a power of two */
    char *numa_nodes;            /* "auto", or a list as "0,2-3" */
    int64_t copy_threads;        /* 0: chosen by the node */

    /* spaces, keys, operations */
    int64_t max_spaces;
    enum fk_key_hash key_hash;
    struct fk_namespace_list namespaces;
    int64_t op_timeout_ms;
    int64_t lease_timeout_ms;

    /* eviction */
    enum fk_eviction_policy eviction_policy;
    double evict_start_threshold; /* 0..1: used share of a tier from which eviction runs ahead */
    double evict_ratio;          /* 0..1: share of a tier evicted at once beyond the need */
    int64_t hit_reward_seconds;
    int64_t slru_protected_threshold; /* hits */

    /* SSD tier */
    enum fk_ssd_write_policy ssd_write_policy;
    bool ssd_recreate;
    bool ssd_direct_io;
    int64_t ssd_io_depth;        /* I/Os in flight per device */
    uint64_t ssd_io_chunk_bytes; /* largest single I/O */
    int64_t ssd_device_retry_ms;
    int64_t ssd_device_errors;   /* consecutive errors that take a device out */
    uint64_t ssd_max_file_bytes; /* 0: no limit */
    int64_t iouring_entries;     /* 0: no io_uring */

    /* log, metrics, trace */
    char *logging_prefix;
    enum fk_log_level log_level;
    int64_t num_log_interval_requests;
    bool enable_metrics;
    int64_t metrics_port;
    char *http_listen;           /* "": no HTTP */
    bool enable_trace;
    char *trace_file_path;
    uint64_t trace_max_file_bytes;
    int64_t trace_max_files;
    int64_t trace_flush_interval_ms;

    /* the model's geometry, for stand-alone use; 0 or "": not given */
    int64_t tokens_per_block;
    int64_t num_layers;
    int64_t num_kv_heads;
    int64_t head_size;
    int64_t kv_dim;
    char *dtype;
    int64_t tp_size;
    int64_t dp_size;

    /* engines and the server */
    bool enable_flexkv;
    bool server_client_mode;
    enum fk_server_launch server_launch_mode;
    char *server_recv_port;
    int64_t instance_num;
    int64_t instance_id;
    int64_t server_timeout_ms;   /* of one call to the daemon */
    int64_t worker_timeout_ms;   /* of a space that waits for its workers */
    char *master_host;
    char *master_ports;
    bool enable_kv_events;       /* dynamo_use_flexkv is already applied by fk_config_finish */
    uint64_t kv_events_buffer_bytes;
    char *kv_events_endpoint;    /* "": nothing is published */
    char *kv_events_replay_endpoint;
    char *kv_events_topic;
    int64_t kv_events_rank;      /* -1: none is stated */
    int64_t kv_events_ranks;
    int64_t kv_events_hwm;
    int64_t kv_events_replay_batches;
    uint64_t kv_events_replay_bytes;
    char *kv_events_zmq_library;
    bool dynamo_use_flexkv;
    bool sync_get;
    bool maybe_skip_put;
    char *kv_cache_dtype;
    enum fk_switch swa_multi_group;
    int64_t reset_barrier_timeout_ms;

    /* GPU transfers */
    bool enable_gds;
    bool enable_nixl;
    char *nixl_backend_plugin;
    uint64_t cudahost_chunk_bytes; /* 0: the whole pool at once */
    bool gpu_checksums;
    bool use_ce_transfer_h2d;
    bool use_ce_transfer_d2h;
    int64_t transfer_num_cta_h2d;
    int64_t transfer_num_cta_d2h;
    enum fk_shared_kv_mode mla_d2h_mode;
    bool enable_layerwise_transfer;
    char *layerwise_eventfd_socket;
    enum fk_layerwise_notify layerwise_notify_mode;

    /* distributed */
    bool enable_p2p_cpu;
    bool enable_p2p_ssd;
    bool enable_3rd_remote;
    enum fk_remote_backend remote_backend;
    char *remote_cache_dir;
    char *remote_bucket;
    char *remote_endpoint;
    char *remote_region;
    char *remote_prefix;
    char *remote_nixl_plugin;
    char *remote_ca_file;
    uint64_t remote_cache_bytes;
    enum fk_remote_write_policy remote_write_policy;
    int64_t remote_threads;
    int64_t remote_timeout_ms;
    int64_t remote_scan_ms;
    int64_t remote_retry_ms;
    char *p2p_transport;
    char *p2p_listen;
    char *fabric_provider;
    char *nixl_library;
    char *nixl_transport_plugin;
    int64_t peer_timeout_ms;
    enum fk_peer_copies peer_copies;
    char *cluster_secret;
    char *redis_host;
    int64_t redis_port;
    char *redis_user;
    char *redis_password;
    int64_t redis_db;
    bool redis_tls;
    char *redis_tls_ca;
    char *redis_tls_cert;
    char *redis_tls_key;
    int64_t redis_timeout_ms;
    char *cluster_name;
    char *node_name;
    char *node_zone;
    char *local_ip;
    int64_t node_ttl_seconds;
    char *mooncake_config_path;
    char *mooncake_engine_ip;
    int64_t mooncake_engine_port;
    char *mooncake_metadata_backend;
    char *mooncake_metadata_server;
    char *mooncake_metadata_server_auth;
    enum fk_mooncake_protocol mooncake_protocol;
    char *mooncake_device_name;
    char *mc_redis_password;
    bool mc_legacy_rpc_port_binding;
    bool use_mooncake_store_backend;
    char *mooncake_store_config_path;
};

#endif
