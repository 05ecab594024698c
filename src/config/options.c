/*
 * options.c - THE option table. One row per option that we or the reference know; keys,
 * environment, help text, man page, checks and defaults all come from here and only here.
 *
 * To add an option: a field in settings.h, a row here, a line in the changelog; nothing
 * else. A later build that starts to use a planned option changes its PLANNED to ACTIVE.
 * Constant data; read by everything in src/config/.
 */
#include "config/option.h"

#include "base/util.h"

const char *const fk_option_category_names[FK_OPT_CATEGORIES] = {
    [FK_OPT_CAPACITY] = "Capacity",
    [FK_OPT_MEMORY] = "Memory and copying",
    [FK_OPT_CORE] = "Keys, spaces and operations",
    [FK_OPT_EVICTION] = "Eviction",
    [FK_OPT_SSD] = "SSD tier",
    [FK_OPT_LOGGING] = "Log, metrics and trace",
    [FK_OPT_MODEL] = "Model geometry (stand-alone use)",
    [FK_OPT_SERVING] = "Engines and server",
    [FK_OPT_TRANSFER] = "GPU transfers",
    [FK_OPT_DISTRIBUTED] = "Distributed",
};

const char *const fk_option_status_names[] = {
    [FK_OPT_ACTIVE] = "active", [FK_OPT_PLANNED] = "planned", [FK_OPT_IGNORED] = "ignored",
};

/* The field's offset; does not compile when the field has not the C type of the option. */
#define FIELD(f, T) \
    (offsetof(struct fk_settings, f) + 0 * sizeof(char[ \
        __builtin_types_compatible_p(__typeof__(((struct fk_settings *)0)->f), T) ? 1 : -1]))
#define ENUM_FIELD(f) \
    (offsetof(struct fk_settings, f) + 0 * sizeof(char[ \
        sizeof(((struct fk_settings *)0)->f) == sizeof(int) ? 1 : -1]))

#define KIB ((int64_t)FK_KIB)
#define GIB ((int64_t)FK_GIB)
#define SIZE_MAX_BYTES (INT64_C(1) << 60)
#define MS_MAX (INT64_C(1) << 31)
#define COUNT_MAX ((int64_t)UINT32_MAX - 1)

#define BOOL(f, d)   .type = FK_OPT_BOOL, .offset = FIELD(f, bool), .def = (d)
#define INT(f, d, lo, hi, u) \
    .type = FK_OPT_INT, .offset = FIELD(f, int64_t), .def = (d), .unit = (u), \
    .min = (lo), .max = (hi)
#define MS(f, d, lo) INT(f, d, lo, MS_MAX, "ms")
#define PORT(f, d)   INT(f, d, 0, 65535, NULL)
#define FLOAT(f, d, lo, hi) \
    .type = FK_OPT_FLOAT, .offset = FIELD(f, double), .def = (d), .min = (lo), .max = (hi)
#define SIZE(f, d, lo, hi, u) \
    .type = FK_OPT_SIZE, .offset = FIELD(f, uint64_t), .def = (d), .unit = (u), \
    .min = (lo), .max = (hi)
#define STRING(f, d) .type = FK_OPT_STRING, .offset = FIELD(f, char *), .def = (d)
#define LIST(f, d)   .type = FK_OPT_LIST, .offset = FIELD(f, struct fk_string_list), .def = (d)
#define NAMESPACES(f) \
    .type = FK_OPT_NAMESPACES, .offset = FIELD(f, struct fk_namespace_list), .def = ""
#define ENUM(f, d, c) .type = FK_OPT_ENUM, .offset = ENUM_FIELD(f), .def = (d), .choices = (c)
#define IGNORED(t, d, reason) \
    .type = FK_OPT_##t, .status = FK_OPT_IGNORED, .def = (d), .why = (reason)
#define PLANNED .status = FK_OPT_PLANNED
#define BASIC .flags = FK_OPT_BASIC
#define SECRET .flags = FK_OPT_SECRET

#define WHY_MEASURED "the way of copying is chosen by measuring each device at start"
#define WHY_LAYOUT "a block is always stored as one run of bytes, its layers in order"
#define WHY_LEASE "blocks are believed as long as their node is a member: node_ttl_seconds"
#define WHY_CONTROL "nodes need no control address: p2p_listen is where they read from each other"
#define WHY_DELTAS "each node follows the others' changes as they come; nothing is rebuilt"

const struct fk_option fk_options[] = {
#undef CATEGORY
#define CATEGORY .category = FK_OPT_CAPACITY
{ "config_path", CATEGORY, STRING(config_path, ""), .flags = FK_OPT_ENV_ONLY,
  .help = "Configuration file (JSON or YAML). Once set, it counts before the environment, "
          "and the basic options are not read from the environment at all" },
{ "cpu_cache_gb", CATEGORY, SIZE(cpu_cache_bytes, "16", 4 * KIB, SIZE_MAX_BYTES, "GiB"), BASIC,
  .help = "Size of the CPU tier" },
{ "cpu_cache_blocks|num_cpu_blocks", CATEGORY, INT(cpu_cache_blocks, "0", 0, COUNT_MAX, "blocks"),
  .help = "Size of the CPU tier in blocks, instead of cpu_cache_gb; 0: not given" },
{ "enable_cpu", CATEGORY,
  IGNORED(BOOL, "1", "the CPU tier is always there: SSD and peers are read through it"),
  .help = "Use of the CPU tier, in the legacy form" },
{ "ssd_cache_gb", CATEGORY, SIZE(ssd_cache_bytes, "0", 0, SIZE_MAX_BYTES, "GiB"), BASIC,
  .help = "Size of the SSD tier; 0: none. It need not be larger than the CPU tier" },
{ "ssd_cache_blocks|num_ssd_blocks", CATEGORY, INT(ssd_cache_blocks, "0", 0, COUNT_MAX, "blocks"),
  .help = "Size of the SSD tier in blocks, instead of ssd_cache_gb; 0: not given" },
{ "ssd_cache_dir", CATEGORY, LIST(ssd_cache_dir, "./flexkv_ssd"), .file_def = "./ssd_cache", BASIC,
  .help = "Directories of the SSD tier, one per device; blocks are striped over them" },
{ "enable_ssd", CATEGORY, BOOL(enable_ssd, "1"),
  .help = "0: no SSD tier, whatever its size says" },

#undef CATEGORY
#define CATEGORY .category = FK_OPT_MEMORY
{ "cpu_memory", CATEGORY, ENUM(cpu_memory, "auto", "auto|hugetlb|thp|plain"),
  .help = "Pages of the CPU tier: hugetlb pages, transparent huge pages or plain ones; "
          "auto takes the first of these that the machine grants" },
{ "use_hugepage_cpu_buffer", CATEGORY, BOOL(use_hugepage_cpu_buffer, "0"), BASIC,
  .help = "1 means cpu_memory: hugetlb, unless cpu_memory is given" },
{ "use_hugepage_tmp_buffer", CATEGORY,
  IGNORED(BOOL, "0", "there is no temporary buffer: transfers are staged in the CPU tier"), BASIC,
  .help = "Huge pages for temporary buffers" },
{ "hugepage_size_bytes", CATEGORY, SIZE(hugepage_size_bytes, "2M", 64 * KIB, 16 * GIB, "bytes"),
  .flags = FK_OPT_BASIC | FK_OPT_POWER_OF_2, .help = "Size of a hugetlb page" },
{ "hugetlbfs_dir", CATEGORY, IGNORED(STRING, "", "huge pages come from memfd; no mount is needed"),
  .help = "Mount of hugetlbfs" },
{ "numa_nodes", CATEGORY, STRING(numa_nodes, "auto"),
  .help = "NUMA nodes that give the CPU tier's memory, as in 0,2-3; auto: all" },
{ "copy_threads", CATEGORY, INT(copy_threads, "0", 0, 64, "threads"),
  .help = "Threads that copy between engine memory and the CPU tier; 0: chosen by the node" },

#undef CATEGORY
#define CATEGORY .category = FK_OPT_CORE
{ "max_spaces", CATEGORY, INT(max_spaces, "1", 1, 64, NULL),
  .help = "KV geometries that may be open at once; each gets an equal part of every tier" },
{ "key_hash", CATEGORY, ENUM(key_hash, "sha256", "sha256|xxh3"),
  .help = "Hash that makes keys of token ids. xxh3 is faster, but who can choose prompts "
          "can make two of them collide: for trusted single-tenant use only" },
{ "namespaces", CATEGORY, NAMESPACES(namespaces),
  .help = "Quotas of namespaces: the most a namespace may take of each tier, and what is kept "
          "for it even when others need room. shared=no: its blocks stay on this node" },
{ "op_timeout_ms", CATEGORY, MS(op_timeout_ms, "20000", 1),
  .help = "Deadline of an operation that states none" },
{ "lease_timeout_ms", CATEGORY, MS(lease_timeout_ms, "30000", 1),
  .help = "How long matched blocks are kept from eviction when their get never comes" },
{ "index_accel", CATEGORY, IGNORED(BOOL, "1", "there is one index, and it is the fast one"),
  .help = "Choice of the reference's C++ index" },
{ "reset_barrier_timeout_ms", CATEGORY, PLANNED, MS(reset_barrier_timeout_ms, "60000", 1),
  .help = "How long a reset waits for operations under way" },
{ "reset_barrier_poll_ms", CATEGORY, IGNORED(INT, "50", "a reset is woken up; it does not poll"),
  .unit = "ms", .help = "Pause between two looks of a waiting reset" },

#undef CATEGORY
#define CATEGORY .category = FK_OPT_EVICTION
{ "eviction_policy", CATEGORY,
  ENUM(eviction_policy, "lru", "lru|lfu|slru|fifo|mru|filo|s3fifo|arc|auto"),
  .help = "Which blocks go first; auto learns from how prompts return" },
{ "evict_start_threshold", CATEGORY, FLOAT(evict_start_threshold, "1.0", 0, 1),
  .help = "Used share of a tier from which blocks are evicted ahead of need; 1: only at need" },
{ "evict_ratio", CATEGORY, FLOAT(evict_ratio, "0", 0, 1),
  .help = "Share of a tier that one eviction frees beyond the need" },
{ "hit_reward_seconds", CATEGORY, INT(hit_reward_seconds, "0", 0, MS_MAX, "s"),
  .help = "lru: how much younger each hit makes a block" },
{ "slru_protected_threshold", CATEGORY, INT(slru_protected_threshold, "2", 1, MS_MAX, "hits"),
  .help = "slru: hits after which a block is protected" },

#undef CATEGORY
#define CATEGORY .category = FK_OPT_SSD
{ "ssd_write_policy", CATEGORY, ENUM(ssd_write_policy, "through", "through|on_reuse|on_evict"),
  .help = "When a block is written to the SSD: as soon as it is stored, when it is used again, "
          "or when the CPU tier evicts it" },
{ "ssd_recreate", CATEGORY, BOOL(ssd_recreate, "0"),
  .help = "1: a store of another geometry or version is deleted and made anew; 0: it is refused" },
{ "ssd_direct_io", CATEGORY, BOOL(ssd_direct_io, "1"),
  .help = "O_DIRECT: past the page cache" },
{ "ssd_io_depth", CATEGORY, INT(ssd_io_depth, "64", 1, 4096, NULL),
  .help = "Reads and writes in flight per device" },
{ "ssd_io_chunk", CATEGORY, SIZE(ssd_io_chunk_bytes, "4M", 4 * KIB, GIB, "bytes"),
  .help = "Largest single read or write; a multiple of 4K" },
{ "ssd_device_errors", CATEGORY, INT(ssd_device_errors, "8", 1, 1000000, NULL),
  .help = "Consecutive errors after which a device is taken out of use" },
{ "ssd_device_retry_ms", CATEGORY, MS(ssd_device_retry_ms, "10000", 1),
  .help = "How long until a device that was taken out is tried again" },
{ "max_file_size_gb", CATEGORY, PLANNED,
  SIZE(ssd_max_file_bytes, "-1", 64 * KIB, SIZE_MAX_BYTES, "GiB"), .flags = FK_OPT_UNLIMITED,
  .help = "Largest file of the SSD tier; -1: no limit" },
{ "iouring_entries|ioring_entries", CATEGORY, INT(iouring_entries, "512", 0, 32768, NULL),
  .help = "Entries of the io_uring; 0: no io_uring, threads instead" },
{ "iouring_flags|ioring_flags", CATEGORY,
  IGNORED(INT, "0", "the kernel's features are probed, the best ones used"),
  .help = "Flags of the io_uring" },
{ "ssd_io_opt", CATEGORY, IGNORED(BOOL, "1", "neighbouring blocks always go in one I/O"),
  .help = "Joining of I/Os" },

#undef CATEGORY
#define CATEGORY .category = FK_OPT_LOGGING
{ "logging_prefix", CATEGORY, STRING(logging_prefix, "FLEXKV"),
  .help = "First word of each line in the log; at most 31 bytes" },
{ "log_level", CATEGORY,
  ENUM(log_level, "INFO", "DEBUG|INFO|WARNING=WARN|ERROR|CRITICAL=FATAL|OFF"),
  .help = "The least important lines that are logged" },
{ "num_log_interval_requests", CATEGORY, PLANNED,
  INT(num_log_interval_requests, "200", 0, MS_MAX, "requests"),
  .help = "A summary is logged every so many requests; 0: never" },
{ "enable_metrics", CATEGORY, PLANNED, BOOL(enable_metrics, "0"),
  .help = "Prometheus metrics over HTTP" },
{ "metrics_port|py_metrics_port|cpp_metrics_port", CATEGORY, PLANNED,
  PORT(metrics_port, "8080"),
  .help = "Port for the metrics; one serves all: of several names the first one here counts" },
{ "http_listen", CATEGORY, PLANNED, STRING(http_listen, ""),
  .help = "HOST:PORT for /metrics, /health and /status; empty: none" },
{ "enable_trace", CATEGORY, PLANNED, BOOL(enable_trace, "0"), .help = "Record of all requests" },
{ "trace_file_path", CATEGORY, PLANNED, STRING(trace_file_path, "./flexkv_trace.log"),
  .help = "File of that record" },
{ "trace_max_file_size_mb", CATEGORY, PLANNED,
  SIZE(trace_max_file_bytes, "100", 4 * KIB, SIZE_MAX_BYTES, "MiB"),
  .help = "Size at which that file is rotated" },
{ "trace_max_files", CATEGORY, PLANNED, INT(trace_max_files, "5", 1, 100000, "files"),
  .help = "Rotated files that are kept" },
{ "trace_flush_interval_ms", CATEGORY, PLANNED, MS(trace_flush_interval_ms, "1000", 1),
  .help = "How often that file is flushed" },

#undef CATEGORY
#define CATEGORY .category = FK_OPT_MODEL, PLANNED
{ "tokens_per_block", CATEGORY, INT(tokens_per_block, "0", 0, 65536, "tokens"),
  .help = "Tokens in a block; 0: the engine says" },
{ "num_layers", CATEGORY, INT(num_layers, "0", 0, 65536, NULL),
  .help = "Layers; 0: the engine says" },
{ "num_kv_heads", CATEGORY, INT(num_kv_heads, "0", 0, 65536, NULL),
  .help = "KV heads; 0: the engine says" },
{ "head_size", CATEGORY, INT(head_size, "0", 0, 65536, NULL),
  .help = "Elements of a head; 0: the engine says" },
{ "kv_dim", CATEGORY, INT(kv_dim, "2", 1, 2, NULL), .help = "2: K and V; 1: one latent (MLA)" },
{ "dtype", CATEGORY, STRING(dtype, ""),
  .help = "Element type, as bfloat16; empty: the engine says" },
{ "tp_size", CATEGORY, INT(tp_size, "1", 1, 65536, "ranks"), .help = "Tensor-parallel ranks" },
{ "dp_size", CATEGORY, INT(dp_size, "1", 1, 65536, "ranks"), .help = "Data-parallel ranks" },

#undef CATEGORY
#define CATEGORY .category = FK_OPT_SERVING
{ "enable_flexkv", "ENABLE_FLEXKV", CATEGORY, BOOL(enable_flexkv, "1"),
  .help = "0: the engine's connector does nothing" },
{ "server_client_mode", CATEGORY, BOOL(server_client_mode, "0"),
  .help = "1: a daemon of its own always; else only where several engines or ranks share a node" },
{ "server_launch_mode", CATEGORY, ENUM(server_launch_mode, "embedded", "embedded|external"),
  .help = "embedded: the first client starts the daemon; external: someone else did, as with "
          "flexkv serve" },
{ "server_recv_port", CATEGORY, STRING(server_recv_port, "ipc:///tmp/flexkv_server"),
  .help = "Address of the daemon: ipc://PATH is the unix socket PATH, ipc://@NAME one in the "
          "abstract namespace" },
{ "instance_num", CATEGORY, INT(instance_num, "1", 1, 4096, "engines"),
  .help = "Engines that share one daemon" },
{ "instance_id", CATEGORY, INT(instance_id, "0", 0, 4095, NULL),
  .help = "Which of them this one is; less than instance_num" },
{ "server_timeout_ms", CATEGORY, MS(server_timeout_ms, "1000", 1),
  .help = "How long a call waits for the daemon's answer" },
{ "worker_timeout_ms", CATEGORY, MS(worker_timeout_ms, "60000", 1),
  .help = "How long a space waits for the engine's workers, and after which a worker that finds "
          "no node says so in the log" },
{ "master_host", CATEGORY, PLANNED, STRING(master_host, "localhost"),
  .help = "First node of a tensor-parallel group that spans nodes" },
{ "master_ports", CATEGORY, PLANNED, STRING(master_ports, "5556,5557,5558"),
  .help = "Its ports" },
{ "enable_kv_events", CATEGORY, BOOL(enable_kv_events, "0"),
  .help = "1: keeps what routers call each block (hash, tokens, LoRA name, salt) and tells "
          "subscribers which blocks come and go" },
{ "kv_events_buffer_mb", CATEGORY, SIZE(kv_events_buffer_bytes, "16", 4 * KIB, GIB, "MiB"),
  .help = "Memory for events that a subscriber has not fetched yet; one that falls behind looks "
          "at what is there and loses nothing" },
{ "kv_events_endpoint", CATEGORY, STRING(kv_events_endpoint, ""),
  .help = "Where routers subscribe to KV events (ZeroMQ PUB): tcp://HOST:PORT, tcp://*:PORT or "
          "ipc://PATH; means enable_kv_events: 1. Empty: nothing is published" },
{ "kv_events_replay_endpoint", CATEGORY, STRING(kv_events_replay_endpoint, ""),
  .help = "Where they ask for batches that they missed (ZeroMQ ROUTER); empty: nowhere" },
{ "kv_events_topic", CATEGORY, STRING(kv_events_topic, ""), .help = "First frame of each batch" },
{ "kv_events_rank", CATEGORY, INT(kv_events_rank, "-1", -1, 65535, NULL),
  .help = "Data parallel rank that the batches are for; -1: none is stated, the router takes the one "
          "it knows the endpoint by" },
{ "kv_events_ranks", CATEGORY, INT(kv_events_ranks, "1", 1, 1024, "ranks"),
  .help = "Ranks from kv_events_rank on that share the node: each is told the same" },
{ "kv_events_hwm", CATEGORY, INT(kv_events_hwm, "10000", 0, 10000000, "batches"),
  .help = "Batches of up to 64 KiB that may wait for a slow subscriber; then it loses some, and is "
          "told all again when it has room. 0: no limit" },
{ "kv_events_replay_batches|kv_events_buffer_steps", CATEGORY,
  INT(kv_events_replay_batches, "10000", 0, 10000000, "batches"),
  .help = "The last batches that are kept for who missed some" },
{ "kv_events_replay_mb", CATEGORY, SIZE(kv_events_replay_bytes, "64", 0, 64 * GIB, "MiB"),
  .help = "Most memory for them" },
{ "kv_events_zmq_library", CATEGORY, STRING(kv_events_zmq_library, ""),
  .help = "Path of the ZeroMQ library that publishes; empty: libzmq.so.5, where the system has it" },
{ "dynamo_use_flexkv", "DYNAMO_USE_FLEXKV", CATEGORY, BOOL(dynamo_use_flexkv, "0"),
  .help = "KV events for Dynamo's router: 1 means enable_kv_events: 1" },
{ "sync_get", CATEGORY, BOOL(sync_get, "0"),
  .help = "1: the connector waits for loads in the engine's step" },
{ "maybe_skip_put", CATEGORY, PLANNED, BOOL(maybe_skip_put, "0"),
  .help = "1: the connector may leave out puts under load" },
{ "kv_cache_dtype", CATEGORY, PLANNED, STRING(kv_cache_dtype, ""), BASIC,
  .help = "Element type where the engine only says auto; empty: no override" },
{ "swa_multi_group", CATEGORY, PLANNED,
  ENUM(swa_multi_group, "auto", "auto|off=0=false=no|on=1=true=yes"), BASIC,
  .help = "Sliding-window side data in a group of its own (DeepSeek-V4)" },
{ "worker_shutdown_timeout_s", CATEGORY,
  IGNORED(INT, "600", "there are no worker processes to wait for"),
  .unit = "s", .help = "How long the reference waits for its workers to end" },
{ "transfer_manager_shutdown_timeout_s", CATEGORY,
  IGNORED(INT, "900", "there is no transfer manager process to wait for"),
  .unit = "s", .help = "How long the reference waits for its transfer manager to end" },

#undef CATEGORY
#define CATEGORY .category = FK_OPT_TRANSFER
{ "enable_gds", CATEGORY, BOOL(enable_gds, "0"), BASIC,
  .help = "1: workers try at start whether GPU direct storage (cuFile) works with the directories of "
          "the SSD tier, and log the answer. Where it does, blocks that only the SSD has are read straight "
          "into GPU memory" },
{ "enable_nixl", CATEGORY, PLANNED, BOOL(enable_nixl, "0"), BASIC,
  .help = "GPU direct storage through NIXL" },
{ "nixl_backend_plugin", CATEGORY, PLANNED, STRING(nixl_backend_plugin, ""),
  .help = "Plugin of NIXL; empty: the first that works of HF3FS, POSIX, GDS_MT" },
{ "cudahost_chunk_size_gb", CATEGORY,
  SIZE(cudahost_chunk_bytes, "0", 0, SIZE_MAX_BYTES, "GiB"),
  .help = "Piece in which the CPU tier is page-locked for the GPU, in the background and ahead of "
          "copies; 0: 64 MiB" },
{ "gpu_checksums", CATEGORY, BOOL(gpu_checksums, "0"),
  .help = "1: a checksum of each block in the CPU tier is taken while it is stored, on the GPU if its "
          "pages are there, and compared while it is loaded; what has changed is not delivered" },
{ "use_ce_transfer_h2d", CATEGORY, BOOL(use_ce_transfer_h2d, "0"),
  .help = "1: each piece of a page is a copy of its own to the GPU, without a kernel: slow for pieces "
          "below 32 KiB; 0: the fastest of the measured ways" },
{ "use_ce_transfer_d2h", CATEGORY, BOOL(use_ce_transfer_d2h, "0"),
  .help = "1: the same from the GPU" },
{ "transfer_num_cta_h2d|transfer_sms_h2d", CATEGORY,
  INT(transfer_num_cta_h2d, "0", 0, 1024, "CTAs"),
  .help = "Size of the copy kernels to the GPU; 0: as measured for each device" },
{ "transfer_num_cta_d2h|transfer_sms_d2h", CATEGORY,
  INT(transfer_num_cta_d2h, "0", 0, 1024, "CTAs"),
  .help = "Size of the copy kernels from the GPU; 0: as measured for each device" },
{ "mla_d2h_mode|kv_shared_across_ranks_mode", CATEGORY, PLANNED,
  ENUM(mla_d2h_mode, "sharded", "sharded|rank_rotate|all_write|rank0_only|layer_parallel"),
  .help = "Who stores KV that all ranks hold alike. sharded is what is done, whatever is said "
          "here: each rank stores a part of the blocks" },
{ "enable_layerwise_transfer", CATEGORY, BOOL(enable_layerwise_transfer, "0"),
  .help = "Load layer by layer, so that compute starts before the last one has come" },
{ "layerwise_eventfd_socket", CATEGORY, STRING(layerwise_eventfd_socket, ""),
  .help = "Socket over which SGLang hands its layers' eventfds to the worker's agent; one for each "
          "worker is named after it. Empty: /tmp/flexkv_layerwise_eventfd.sock" },
{ "layerwise_notify_mode", CATEGORY,
  ENUM(layerwise_notify_mode, "hostfunc", "hostfunc|polling"),
  .help = "Who tells an eventfd that a layer is in place: the driver (hostfunc), or the thread that "
          "copies, when it sees the copies done (polling)" },
{ "ce_path_opt", CATEGORY, IGNORED(BOOL, "1", WHY_MEASURED), .help = "Choice of copy calls" },
{ "ce_segment_threshold", CATEGORY, IGNORED(INT, "8", WHY_MEASURED),
  .help = "Segments from which the reference gathers" },
{ "enable_ce_memcpy2d", CATEGORY, IGNORED(BOOL, "1", WHY_MEASURED), .help = "Use of 2D copies" },
{ "ce_gather_threads", CATEGORY, IGNORED(INT, "4", WHY_MEASURED ", and copy_threads sets ours"),
  .help = "Threads that gather for the copy engine" },
{ "ce_gather_nt", CATEGORY, IGNORED(BOOL, "1", WHY_MEASURED),
  .help = "Non-temporal stores while gathering" },
{ "enable_mps", CATEGORY, IGNORED(BOOL, "1", "no second process uses the GPU"),
  .help = "CUDA MPS between engine and transfer processes" },
{ "cpu_layout|cpu_layout_type", CATEGORY, IGNORED(STRING, "BLOCKFIRST", WHY_LAYOUT),
  .help = "Layout of the CPU tier: BLOCKFIRST or LAYERFIRST" },
{ "ssd_layout|ssd_layout_type", CATEGORY, IGNORED(STRING, "BLOCKFIRST", WHY_LAYOUT),
  .help = "Layout of the SSD tier" },
{ "remote_layout|remote_layout_type", CATEGORY, IGNORED(STRING, "BLOCKFIRST", WHY_LAYOUT),
  .help = "Layout of the remote tier" },
{ "gds_layout|gds_layout_type", CATEGORY, IGNORED(STRING, "BLOCKFIRST", WHY_LAYOUT),
  .help = "Layout of files for GPU direct storage" },
{ "enable_nvcomp", CATEGORY, IGNORED(BOOL, "0", "blocks are stored as they are, not compressed"),
  .help = "Compression on the GPU" },
{ "nvcomp_batch_size", CATEGORY, IGNORED(INT, "", "blocks are stored as they are, not compressed"),
  .help = "Batch of that compression" },

#undef CATEGORY
#define CATEGORY .category = FK_OPT_DISTRIBUTED
{ "enable_p2p_cpu", CATEGORY, BOOL(enable_p2p_cpu, "0"),
  .help = "1: other nodes of the cluster read blocks of the CPU tier, and this one reads theirs" },
{ "enable_p2p_ssd", CATEGORY, BOOL(enable_p2p_ssd, "0"),
  .help = "1: the same of the SSD tier" },
{ "p2p_transport", CATEGORY, STRING(p2p_transport, "tcp"),
  .help = "How nodes read from each other, the same on all of them: tcp, fabric (libfabric: RDMA, EFA), nixl, mooncake" },
{ "p2p_listen", CATEGORY, STRING(p2p_listen, ""),
  .help = "IP or IP:PORT that other nodes read at; empty: any free port of local_ip" },
{ "fabric_provider", CATEGORY, STRING(fabric_provider, ""),
  .help = "Provider of libfabric, such as verbs;ofi_rxm or efa; empty: tcp;ofi_rxm" },
{ "nixl_library", CATEGORY, STRING(nixl_library, ""),
  .help = "NIXL's libnixl_capi.so, or the folder that has it, as .nixl_cu12.mesonpy.libs of the wheel nixl_cu12; empty: as the "
          "system finds it" },
{ "nixl_transport_plugin", CATEGORY, STRING(nixl_transport_plugin, ""),
  .help = "Plugin of NIXL through which nodes read from each other, the same on all of them; empty: UCX" },
{ "cluster_secret", CATEGORY, STRING(cluster_secret, ""), SECRET,
  .help = "What nodes prove to each other that they belong to the cluster by, at least 16 characters; empty: made "
          "of redis_password" },
{ "peer_timeout_ms", CATEGORY, MS(peer_timeout_ms, "2000", 1),
  .help = "How long a block may take from other nodes; then it counts as not there" },
{ "peer_copies", CATEGORY, ENUM(peer_copies, "keep", "keep|evict_first"),
  .help = "Blocks read from other nodes in the CPU tier: keep: like all others; evict_first: until they "
          "are used again they go first, so nodes keep fewer copies of the same" },
{ "enable_3rd_remote", CATEGORY, BOOL(enable_3rd_remote, "0"),
  .help = "1: blocks are also kept in a place that nodes share, a directory or an object store, and had from there" },
{ "remote_backend", CATEGORY, ENUM(remote_backend, "directory", "directory|nixl"),
  .help = "What that place is: a directory, remote_cache_dir; or a bucket of an object store, remote_bucket, through NIXL "
          "(nixl_library)" },
{ "remote_bucket", CATEGORY, STRING(remote_bucket, ""),
  .help = "That bucket (S3) or container (Azure), the same on all nodes; it must be there. Who may use it is in the environment: "
          "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_PROFILE, ..." },
{ "remote_endpoint", CATEGORY, STRING(remote_endpoint, ""),
  .help = "URL of the object store, as https://s3.example.org:9000; empty: that of AWS. Of Azure: the account's" },
{ "remote_region", CATEGORY, STRING(remote_region, ""), .help = "Its region; empty: as the environment says, or us-east-1" },
{ "remote_prefix", CATEGORY, STRING(remote_prefix, "flexkv"),
  .help = "What the names of all objects begin with, the same on all nodes" },
{ "remote_nixl_plugin", CATEGORY, STRING(remote_nixl_plugin, ""),
  .help = "Plugin of NIXL for it: OBJ (S3 and what speaks it) or AZURE_BLOB; empty: OBJ" },
{ "remote_ca_file", CATEGORY, STRING(remote_ca_file, ""),
  .help = "Certificates that the object store's is verified with (PEM); empty: the system's" },
{ "remote_cache_dir|remote_cache_path", CATEGORY, STRING(remote_cache_dir, ""),
  .help = "That directory, the same on all nodes: on a network file system, or any other" },
{ "remote_cache_gb", CATEGORY, SIZE(remote_cache_bytes, "0", 0, SIZE_MAX_BYTES, "GiB"),
  .help = "How much the blocks of all nodes and models in it may take; whoever sees more removes what was used "
          "longest ago. 0: no limit; in a bucket only that, its own rules let objects expire" },
{ "remote_write_policy", CATEGORY, ENUM(remote_write_policy, "through", "through|on_reuse"),
  .help = "Which blocks are written there: each that is stored, or those that are used again" },
{ "remote_threads", CATEGORY, INT(remote_threads, "8", 1, 64, "threads"),
  .help = "Blocks read and written there at a time; at most half of them written" },
{ "remote_timeout_ms", CATEGORY, MS(remote_timeout_ms, "5000", 1),
  .help = "How long it may take to answer, before a block counts as not there" },
{ "remote_scan_ms", CATEGORY, MS(remote_scan_ms, "10000", 10),
  .help = "How often it is looked through for what other nodes have written and removed" },
{ "remote_retry_ms", CATEGORY, MS(remote_retry_ms, "1000", 1),
  .help = "How long it is left alone after failing several times; doubles up to 32 times" },
{ "redis_host", CATEGORY, STRING(redis_host, "127.0.0.1"),
  .help = "Redis that holds membership and the index; a path, as /run/redis.sock, is a unix socket" },
{ "redis_port", CATEGORY, PORT(redis_port, "6379"), .help = "Its port" },
{ "redis_user", CATEGORY, STRING(redis_user, ""), .help = "User for its ACL; empty: the default user" },
{ "redis_password", CATEGORY, STRING(redis_password, ""), SECRET,
  .help = "Its password; empty: none" },
{ "redis_db", CATEGORY, INT(redis_db, "0", 0, 65535, NULL), .help = "Database in it" },
{ "redis_tls", CATEGORY, BOOL(redis_tls, "0"), .help = "1: TLS, and its certificate is checked" },
{ "redis_tls_ca", CATEGORY, STRING(redis_tls_ca, ""),
  .help = "PEM file of the CAs that vouch for it; empty: the system's" },
{ "redis_tls_cert", CATEGORY, STRING(redis_tls_cert, ""),
  .help = "PEM file of this node's certificate; empty: none" },
{ "redis_tls_key", CATEGORY, STRING(redis_tls_key, ""),
  .help = "PEM file of its key; empty: in the same file" },
{ "redis_timeout_ms", CATEGORY, MS(redis_timeout_ms, "2000", 1),
  .help = "How long Redis may take to answer before it is connected to anew" },
{ "cluster_name", CATEGORY, STRING(cluster_name, "default"),
  .help = "Name of the cluster, a part of each of its keys: clusters can share a Redis" },
{ "node_name", CATEGORY, STRING(node_name, ""),
  .help = "Name of this node, unlike any other's in the cluster; empty: local_ip and a port" },
{ "node_zone", CATEGORY, STRING(node_zone, ""),
  .help = "Nodes of one zone (rack, switch) are near each other, and read from each other first" },
{ "local_ip", CATEGORY, STRING(local_ip, "127.0.0.1"),
  .help = "Address at which other nodes reach this one" },
{ "node_ttl_seconds", CATEGORY, INT(node_ttl_seconds, "30", 1, 86400, "s"),
  .help = "How long a silent node counts as a member" },
{ "local_zmq_ip", CATEGORY, IGNORED(STRING, "127.0.0.1", WHY_CONTROL),
  .help = "Control address of this node" },
{ "local_zmq_port", CATEGORY, IGNORED(INT, "5555", WHY_CONTROL), .help = "Its port" },
{ "lease_ttl_ms", CATEGORY, IGNORED(INT, "30000", WHY_LEASE), .unit = "ms",
  .help = "How long the reference believes an entry of another node's index" },
{ "renew_lease_ms", CATEGORY, IGNORED(INT, "4000", WHY_LEASE), .unit = "ms",
  .help = "How often the reference renews entries" },
{ "safety_ttl_ms", CATEGORY, IGNORED(INT, "100", WHY_LEASE), .unit = "ms",
  .help = "The reference does not use entries that end within this time" },
{ "rebuild_interval_ms", CATEGORY, IGNORED(INT, "2000", WHY_DELTAS), .unit = "ms",
  .help = "How often the index of all nodes is rebuilt" },
{ "refresh_batch_size", CATEGORY, IGNORED(INT, "256", WHY_DELTAS),
  .help = "Entries read at once in a rebuild" },
{ "idle_sleep_ms", CATEGORY, IGNORED(INT, "10", "idle threads sleep until they are woken up"),
  .unit = "ms", .help = "Pause of idle threads" },
{ "lt_pool_initial_capacity", CATEGORY,
  IGNORED(INT, "10000000", "the index grows with its content"),
  .help = "Entries for which the reference allocates memory at start" },
{ "mooncake_config_path", "MOONCAKE_CONFIG_PATH", CATEGORY,
  STRING(mooncake_config_path, ""),
  .help = "JSON file with engine_ip, engine_port, metadata_backend, metadata_server, "
          "metadata_server_auth, protocol and device_name of Mooncake" },
{ "mooncake_engine_ip", CATEGORY, STRING(mooncake_engine_ip, ""),
  .help = "Address of this node's Mooncake engine" },
{ "mooncake_engine_port", CATEGORY, PORT(mooncake_engine_port, "0"), .help = "Its port" },
{ "mooncake_metadata_backend", CATEGORY, PLANNED, STRING(mooncake_metadata_backend, "redis"),
  .help = "Kind of Mooncake's metadata server" },
{ "mooncake_metadata_server", CATEGORY, STRING(mooncake_metadata_server, ""),
  .help = "Mooncake's metadata server, as redis://HOST:PORT" },
{ "mooncake_metadata_server_auth", CATEGORY, PLANNED, STRING(mooncake_metadata_server_auth, ""),
  SECRET, .help = "Its password" },
{ "mooncake_protocol", CATEGORY, PLANNED, ENUM(mooncake_protocol, "tcp", "tcp|rdma"),
  .help = "Mooncake's transport" },
{ "mooncake_device_name", CATEGORY, PLANNED, STRING(mooncake_device_name, ""),
  .help = "Network device for Mooncake; empty: it chooses" },
{ "mc_redis_password", "MC_REDIS_PASSWORD", CATEGORY, PLANNED, STRING(mc_redis_password, ""),
  SECRET, .help = "Password of Mooncake's Redis" },
{ "mc_legacy_rpc_port_binding", "MC_LEGACY_RPC_PORT_BINDING", CATEGORY, PLANNED,
  BOOL(mc_legacy_rpc_port_binding, "0"),
  .help = "1: Mooncake binds exactly the port that is given" },
{ "use_mooncake_store_backend", CATEGORY, PLANNED, BOOL(use_mooncake_store_backend, "0"),
  .help = "Mooncake Store as the last tier" },
{ "mooncake_store_config_path", CATEGORY, PLANNED, STRING(mooncake_store_config_path, ""),
  .help = "Configuration file of Mooncake Store" },
};

const size_t fk_option_count = fk_array_size(fk_options);
