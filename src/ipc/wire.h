/*
 * wire.h - what FlexKV's processes say to each other over a unix socket (socket.h) and in the shared
 * memory of an agent (ring.h). Both ends are on one machine: native byte order and alignment.
 *
 *   agent   HELLO(agent) -> WAIT ... WELCOME + 4 descriptors | ERROR, and the connection ends
 *           from then on: commands and reports in shared memory; the socket only tells of death
 *   client  HELLO(client) -> WELCOME_CLIENT | ERROR
 *           requests with a number that the answer (REPLY) carries; operations are
 *           numbered by the client and answered by COMPLETIONS when they end
 *
 * A version differs: the connection is refused with a message that names both.
 */
#ifndef FK_IPC_WIRE_H
#define FK_IPC_WIRE_H

#include <stdint.h>

#include "base/key.h"
#include "flexkv/flexkv.h"

#define FK_WIRE_MAGIC 0x464b5631u       /* "FKV1" */
#define FK_WIRE_VERSION 7u              /* raised with every change here */
#define FK_WIRE_NAME 64
#define FK_WIRE_INSTANCE 128
#define FK_WIRE_TEXT 480

enum fk_wire_type {
    FK_WIRE_HELLO = 1, FK_WIRE_ERROR, FK_WIRE_WAIT, FK_WIRE_WELCOME, FK_WIRE_WELCOME_CLIENT,
    FK_WIRE_REPLY, FK_WIRE_COMPLETIONS,
    FK_WIRE_SPACE, FK_WIRE_NAMESPACE, FK_WIRE_MATCH, FK_WIRE_RELEASE, FK_WIRE_GET, FK_WIRE_PUT,
    FK_WIRE_PREFETCH, FK_WIRE_CANCEL, FK_WIRE_RESET, FK_WIRE_STATS, FK_WIRE_STATUS,
    FK_WIRE_COMPUTE_RATE, FK_WIRE_LABEL, FK_WIRE_EVENTS,
    FK_WIRE_LAST,                   /* of a client's requests */
    FK_WIRE_EVENTS_NOTE,            /* to a client: there are events again, where there were none */
};

enum fk_wire_role { FK_WIRE_AGENT = 1, FK_WIRE_CLIENT = 2 };

struct fk_wire_hello {
    uint32_t magic, version, role, pid;
    /* of an agent: */
    uint32_t worker, slice, replica, replicas;
    uint64_t slice_bytes, pages;
    char space[FK_WIRE_NAME], instance[FK_WIRE_INSTANCE];
};

struct fk_wire_error { int32_t rc; char text[FK_WIRE_TEXT]; };

/* To an agent; with the descriptors: pool, shared memory, commands' and reports' eventfd; files. */
struct fk_wire_welcome {
    uint64_t pool_bytes, slot_bytes, slice_offset;
    uint32_t n_slots, n_jobs, command_bytes, report_bytes;
    uint32_t replica, replicas;
    /* how to copy (struct fk_copy_options): */
    uint64_t pin_chunk_bytes, sums_offset;
    uint32_t sums_stride, reserved;
    uint32_t ctas[2], copy_engine[2];   /* from, to the engine */
    uint32_t poll_layers;
    uint32_t direct;                    /* enable_gds: 1 + how many files to try it with are passed too */
    /* then the SSD tier's data files, one for each of its directories, and where slots lie in them: */
    uint64_t ssd_slot_bytes;
    uint32_t ssd_slots, ssd_stripe_slots, ssd_dirs, reserved2;
};
struct fk_wire_welcome_client {
    uint32_t version, pid;
    uint32_t events, reserved;          /* the node keeps KV events: puts shall name their blocks */
};

/* ---- an agent's shared memory: cancel flags, commands, reports ---- */
#define FK_AGENT_JOBS 256               /* under way at a time */

/* From an agent. DIRECT: a uint64_t, 1: it can read SSD slots by itself. ON_ITS_WAY: a uint64_t, the job, whose `early` was
 * set: its report will say that all is done. */
enum fk_ring_record { FK_RING_JOB = 1, FK_RING_REPORT, FK_RING_DIRECT, FK_RING_ON_ITS_WAY };

struct fk_ring_job {
    uint64_t tag;                       /* the operation's */
    uint32_t job, n, to_engine, layerwise;
    uint32_t counter, from_ssd;         /* counter: 1 + the one that is told of layers; 0: none */
    uint32_t early, reserved;
    /* n slots (from_ssd: of the SSD tier), n pages */
};
/* Of a job from SSD followed by n residues (base/checksum.h) of what this worker has read. */
struct fk_ring_report { uint32_t job, ok; int32_t status; uint32_t us; };

/* ---- client requests ---- */
struct fk_wire_space {
    uint32_t seq, tokens_per_block, ranks, workers;
    uint64_t slice_bytes;
    uint32_t wait_ms, fingerprint_bytes;
    char name[FK_WIRE_NAME], instance[FK_WIRE_INSTANCE];
    /* fingerprint */
};
struct fk_wire_namespace { uint32_t seq, space, n_parts, reserved; /* parts, each with its 0 */ };
struct fk_wire_match { uint32_t seq, ns, n, reserved; /* keys */ };
struct fk_wire_release { uint64_t lease; };
struct fk_wire_get {
    uint64_t op, lease;
    uint32_t first, n, timeout_ms, flags;       /* enum flexkv_op_flags */
    uint32_t counter, reserved;
    /* pages */
};
struct fk_wire_put {
    uint64_t op;
    uint32_t ns, first, n, timeout_ms;
    uint64_t event_parent;
    uint32_t named, reserved;           /* 1: with hashes and tokens */
    /* keys from first - 1 (from 0 if first is 0); hashes (named); pages; tokens (named) */
};
struct fk_wire_prefetch { uint64_t op; uint32_t ns, n, timeout_ms, reserved; /* keys */ };
struct fk_wire_cancel { uint64_t op; };
struct fk_wire_call { uint32_t seq, reserved; };        /* RESET, STATS, STATUS */
/* How routers know a namespace; both texts without 0. */
struct fk_wire_label { uint32_t ns, lora_bytes, salt_bytes, reserved; };

enum fk_wire_events_what { FK_WIRE_EVENTS_START = 1, FK_WIRE_EVENTS_FETCH, FK_WIRE_EVENTS_WALK };
struct fk_wire_events {
    uint32_t seq, what;
    uint32_t space;                     /* FK_NONE: all */
    uint32_t flag;                      /* START: it is a resync. FETCH: a note is wanted if there is nothing */
    uint64_t boot, place;               /* FETCH: the cursor */
    uint64_t taken;                     /* events given out since the last request */
    uint32_t walk_at, reserved;         /* WALK */
};
struct fk_wire_compute_rate { uint32_t space, reserved; double tokens_per_second; };

/* ---- answers ---- */
struct fk_wire_reply { uint32_t seq; int32_t rc; /* error text if rc < 0, else: */ };
struct fk_wire_space_reply { uint32_t space, scheme; uint8_t fingerprint[16]; };
struct fk_wire_namespace_reply { uint32_t ns, reserved; };
/* EVENTS: this, then labels, then events (struct fk_event, each with its tokens, multiples of 8). FETCH of
 * a cursor that fell off: -ESTALE. */
struct fk_wire_events_reply {
    uint64_t boot, place;
    uint32_t walk_at;                   /* FK_NONE: the walk is over */
    uint32_t n_labels, label_bytes;
    uint32_t n_events;
};
struct fk_wire_event_label { uint32_t number; uint16_t lora, salt; /* both texts, zeros to 8 */ };
/* MATCH: flexkv_match_result; STATS: flexkv_stats; STATUS: the JSON text */
struct fk_wire_completion {
    uint64_t op;
    int32_t status;
    uint32_t blocks, blocks_ok, flags;
};

#endif
