/*
 * status_json.h - what a daemon says of itself (flexkv_node_status) as structs, for `flexkv status`
 * and `flexkv top`.
 *
 * Text from another process: what is missing, or of another type, is 0 or ""; names are made
 * printable. No node, no output. One thread.
 */
#ifndef FK_CLI_STATUS_JSON_H
#define FK_CLI_STATUS_JSON_H

#include <stdint.h>

#include "base/util.h"
#include "flexkv/flexkv.h"

#define STATUS_NAME_BYTES 64            /* a longer one is cut */

struct status_space {
    char name[STATUS_NAME_BYTES];
    uint64_t tokens_per_block, ranks, slice_bytes;
    uint64_t slot_bytes;                /* what a block takes in a tier */
    uint64_t cpu_slots, ssd_slots, cpu_used, ssd_used;      /* blocks */
    double copy_us, ssd_us, peer_us, compute_us;    /* of a block, as measured; 0: unknown */
};

struct status_agent {
    uint64_t worker, slice, replica, pid, pages;
    uint64_t jobs;                      /* under way */
};

struct status_instance {
    char name[STATUS_NAME_BYTES], space[STATUS_NAME_BYTES];
    uint64_t workers, registered, jobs_out;
    uint64_t client_pid;                /* 0: no client now */
    bool ended;                         /* it goes when its last job is over */
    FK_VEC(struct status_agent) agents;
};

struct status_client {
    uint64_t pid;
    double since_s;
};

/* An agent that is there, while nobody has opened its space. */
struct status_waiting {
    char instance[STATUS_NAME_BYTES], space[STATUS_NAME_BYTES];
    uint64_t worker, pid;
};

/* Nodes that share; name "": in no cluster. */
struct status_peer {
    char name[STATUS_NAME_BYTES];
    uint64_t cpu_blocks, ssd_blocks;
    bool alive, synced;
};

struct status_cluster {
    char name[STATUS_NAME_BYTES], cluster[STATUS_NAME_BYTES], redis[256], transport[STATUS_NAME_BYTES], address[128];
    uint64_t remote_blocks, remote_index_bytes, fetched_bytes, fetched_blocks, failed_blocks, lent_blocks, refused;
    FK_VEC(struct status_peer) peers;
};

struct status {
    char version[STATUS_NAME_BYTES], address[128];
    uint64_t pid;
    double uptime_s;
    struct flexkv_stats stats;
    FK_VEC(struct status_space) spaces;
    FK_VEC(struct status_instance) instances;
    FK_VEC(struct status_client) clients;
    FK_VEC(struct status_waiting) waiting;
    struct status_cluster cluster;
};

/* 0, -EINVAL (not a JSON object), -ENOMEM. Either way to be freed. */
int status_parse(const char *text, struct status *out);
void status_free(struct status *s);
#endif
