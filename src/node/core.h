/*
 * core.h - the node's core: plans and tracks operations, places and evicts blocks.
 *
 * It does no I/O, starts no thread and reads no clock. It is called with the time and with
 * completions, and leaves what it wants in queues that a shell empties:
 *
 *      match get put prefetch cancel reset          (callers, with `now`)
 *                     |
 *               +-----v------+   copy jobs  --> agents (one per worker)--> fk_core_job_done
 *               |    core    |   ssd requests -> ssd tier              --> fk_core_ssd_done
 *               |            |   fetches      -> peers, shared store   --> fk_core_fetch_done
 *               +-----+------+   completions -> the caller's poll
 *                     |          events      -> publisher
 *                  tick(now)     deadlines, leases, watermarks, sweeps
 *
 * Shells: src/api (threads, io_uring), tests/sim (simulated), cli replay --hit-only (at once).
 * Lock: the shell serialises all calls (one mutex). Each takes microseconds; no call of the
 * core's calls back.
 *
 * Who holds what: a block that a lease, copy job or SSD write uses is pinned; a pinned block
 * keeps its slots, even when it is dropped meanwhile (reset, fault): they are freed at the
 * last unpin. So no slot is reused while anything may still read or write it.
 */
#ifndef FK_NODE_CORE_H
#define FK_NODE_CORE_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "base/key.h"
#include "base/rate.h"
#include "flexkv/flexkv.h"
#include "index/policy.h"

struct fk_core;

enum fk_write_policy { FK_WRITE_THROUGH, FK_WRITE_ON_REUSE, FK_WRITE_ON_EVICT };

struct fk_core_params {
    uint32_t max_spaces;            /* >= 1 */
    struct fk_policy_params policy; /* which one, and its parameters */
    double evict_start_threshold;   /* used/slots from which eviction runs ahead; 1: on demand */
    double evict_ratio;             /* share of the slots freed beyond need each time */
    enum fk_write_policy write_policy;
    uint64_t op_timeout_us;         /* default deadline of an operation */
    uint64_t lease_timeout_us;
    uint64_t cancel_grace_us;       /* how long an agent may take to confirm a cancelled job */
    uint32_t read_window_blocks;    /* SSD reads in flight per get; 0: 64 */
    bool copies_go_first;           /* what was fetched elsewhere is evicted first, until it is used again */
    bool events;                    /* keep an event queue (fk_core_take_events) */
    uint64_t seed;                  /* of the policies' sampling */
};

#define FK_CORE_PROBE_MAX 256u
struct fk_core_space_params {
    uint32_t cpu_slots;             /* >= 1 */
    uint32_t ssd_slots;             /* 0: no SSD tier */
    uint32_t ssd_stripe_slots;      /* slots in a row on one directory, from the tier */
    uint32_t ssd_dirs;              /* 1..32 when ssd_slots > 0 */
    uint32_t probe_blocks;          /* read in the background to see how fast a tier is, at most
                                       FK_CORE_PROBE_MAX; 0: never */
};

int fk_core_create(const struct fk_core_params *params, struct fk_core **out);
void fk_core_destroy(struct fk_core *core);

/* A space, and its default quota group (no limits). -ENOSPC: max_spaces reached. */
int fk_core_space_add(struct fk_core *core, const struct fk_core_space_params *params,
                      uint32_t *space);

/*
 * An engine that uses the space: its workers, each of which copies its part of a block. A space may
 * have several, whose blocks are each other's hits. -ENOMEM.
 */
int fk_core_instance_add(struct fk_core *core, uint32_t space, uint32_t workers,
                         uint32_t *instance);
/* Its leases go; its operations end with the status. */
void fk_core_instance_end(struct fk_core *core, uint32_t instance, int status, uint64_t now_us);
uint32_t fk_core_instance_jobs(const struct fk_core *core, uint32_t instance);
/* No copy job of it is with a worker. */
bool fk_core_instance_idle(const struct fk_core *core, uint32_t instance);
/* It has ended, and is idle: the number may be given out again. */
void fk_core_instance_remove(struct fk_core *core, uint32_t instance);

/*
 * A quota group for namespaces of the space, in blocks per tier (index: enum fk_tier).
 * max: never more than that; guaranteed: others never push it below. -EINVAL: the guarantees
 * exceed the tier; -ENOSPC: too many groups.
 */
struct fk_core_quota {
    uint32_t max[FK_TIERS], guaranteed[FK_TIERS];
    uint32_t tag;                   /* kept with each block on SSD: the group is found again by it */
};
int fk_core_group_add(struct fk_core *core, uint32_t space, const struct fk_core_quota *quota,
                      uint32_t *group);
uint32_t fk_core_space_default_group(const struct fk_core *core, uint32_t space);

/* ---- restart: before the first operation on the space. Order does not matter; of two
 * records with one key the larger seq stays. Blocks without their parents are dropped, and
 * their slots come out as FK_SSD_FORGET requests. Returns how many blocks are there. -ENOMEM */
struct fk_core_found { struct fk_key key, parent; uint64_t seq; uint32_t slot, tag; };
int64_t fk_core_recover(struct fk_core *core, uint32_t space, const struct fk_core_found *found,
                        uint32_t n);

/* ---- operations: semantics as in flexkv.h. deadline 0: now + the default. A lease or operation is
 * known to its instance only. ---- */
void fk_core_match(struct fk_core *core, uint32_t instance, const struct fk_key *keys, uint32_t n,
                   uint64_t now_us, struct flexkv_match_result *out);
int fk_core_release(struct fk_core *core, uint64_t lease);
/* Which instance the lease belongs to; -ENOENT. */
int fk_core_lease_instance(const struct fk_core *core, uint64_t lease, uint32_t *instance);

struct fk_core_op_args {
    const uint32_t *pages;
    uint64_t deadline_us;
    void *user_data;
    int8_t *results;
    uint64_t tag;                   /* what agents know the operation by; 0: its number */
    bool layerwise;                 /* of a get: one job, once all blocks are in the cpu tier */
    bool early;                     /* of a get: over for the engine when all its copies are on their way */
    uint32_t counter;               /* handed on to the agents */
    uint32_t *slots;                /* of a put, optional, one per block: the cpu slot that it was
                                       given, FK_NONE: none. Written by the call */
    uint32_t reach, group;          /* of a prefetch: so many leading keys can be had, here or elsewhere; new
                                       blocks count to the group */
};
int fk_core_get(struct fk_core *core, uint64_t lease, uint32_t first, uint32_t n,
                const struct fk_core_op_args *args, uint64_t now_us, uint64_t *op);
int fk_core_put(struct fk_core *core, uint32_t instance, uint32_t group, const struct fk_key *keys,
                uint32_t n, uint32_t first, const struct fk_core_op_args *args, uint64_t now_us,
                uint64_t *op);
int fk_core_prefetch(struct fk_core *core, uint32_t instance, const struct fk_key *keys, uint32_t n,
                     const struct fk_core_op_args *args, uint64_t now_us, uint64_t *op);
int fk_core_cancel(struct fk_core *core, uint64_t op, uint64_t now_us);
void fk_core_reset(struct fk_core *core, uint64_t now_us);
/* Its workers can read SSD slots by themselves, past the cpu tier: what only the SSD has of a get is then
 * copied from there, but for gets in layers; and prefetches leave it there, unless the instance gets in layers. */
void fk_core_instance_direct(struct fk_core *core, uint32_t instance, bool direct);
/* A worker's memory goes: jobs of the instance are cancelled, its operations fail. */
void fk_core_fail_ops(struct fk_core *core, uint32_t instance, int status, uint64_t now_us);

/* ---- copy jobs: each job goes to every worker of its instance ---- */
struct fk_job {
    uint32_t id, instance;
    uint64_t tag;                   /* the operation's */
    bool to_engine;                 /* true: slot -> page (get); false: page -> slot (put) */
    bool layerwise;                 /* the first layers of all blocks first */
    bool early;                     /* fk_core_job_on_its_way is wanted */
    uint32_t counter;
    uint32_t n;
    const uint32_t *slots, *pages;  /* valid and unchanging until the last worker's job_done */
    bool from_ssd;                  /* slots are those of the SSD tier */
    const struct fk_key *keys;      /* from_ssd: of each block */
    uint64_t *residues;             /* from_ssd: room for the shell: n of each worker */
    _Atomic bool cancelled;         /* the agent looks between blocks and stops early */
    struct fk_job *next[];          /* private to the core: queue link of each worker */
};
/* Takes the next job for the worker; NULL: none. */
struct fk_job *fk_core_take_job(struct fk_core *core, uint32_t instance, uint32_t worker);
/* The worker can say that nothing but its device or its death keeps the job's bytes from arriving, whatever is
 * cancelled: once, before job_done. When all workers have, for all that an early get still lacks, it is reported. */
void fk_core_job_on_its_way(struct fk_core *core, struct fk_job *job);
/* How many workers have not finished with the job. */
uint32_t fk_core_job_left(const struct fk_job *job);
/* The worker has finished with the job: the first ok blocks are done, the others failed with
 * status (-errno; ignored if ok == n). After this call the worker touches nothing of the job.
 * Blocks that were not read from SSD are had through the cpu tier. */
void fk_core_job_done(struct fk_core *core, struct fk_job *job, uint32_t ok, int status,
                      uint64_t now_us);

/* ---- SSD requests ---- */
enum fk_ssd_kind { FK_SSD_READ, FK_SSD_WRITE, FK_SSD_FORGET, FK_SSD_RESET };
struct fk_core_ssd_req {
    enum fk_ssd_kind kind;
    uint32_t space, ssd_slot, cpu_slot, tag;
    struct fk_key key, parent;
    uint64_t id;                    /* READ and WRITE: to be answered by fk_core_ssd_done */
};
/* Takes requests: reads of gets first, then of prefetches, then writes/forgets in order.
 * FORGET and RESET need no answer but must be carried out in the order taken. Writes come in
 * runs of neighbouring slots. */
uint32_t fk_core_take_ssd(struct fk_core *core, struct fk_core_ssd_req *out, uint32_t max);
struct fk_core_ssd_done { uint64_t id; int32_t status; };
void fk_core_ssd_done(struct fk_core *core, const struct fk_core_ssd_done *done, uint32_t n,
                      uint64_t now_us);
/* Directories that are out of use: their blocks are not seen, their slots not given out. */
void fk_core_ssd_dirs_out(struct fk_core *core, uint32_t space, uint32_t mask);

/* ---- elsewhere: blocks that others have (peers, a shared store). The core knows how many can be had,
 * not where: the shell finds that out when it carries a fetch out, so it is never stale. ---- */
/* From now on a block that is not here may be asked for elsewhere. Before the space's first operation. -ENOMEM. */
int fk_core_space_elsewhere(struct fk_core *core, uint32_t space);
/* How many leading keys can be had here. bits (may be NULL; (n + 63) / 64 words): bit i, beyond them, says
 * that keys[i] can. */
uint32_t fk_core_here(struct fk_core *core, uint32_t instance, const struct fk_key *keys, uint32_t n,
                      uint64_t *bits);
/* Right after fk_core_match of the same keys: `reach` leading ones can be had, if others are asked for
 * those that are not here. *out and its lease grow by as many as are worth it; new blocks count to the group. */
void fk_core_match_extend(struct fk_core *core, uint32_t instance, uint32_t group,
                          const struct fk_key *keys, uint32_t reach, uint64_t now_us,
                          struct flexkv_match_result *out);
/* The cpu slot of each block that is READY there, else FK_NONE. */
void fk_core_cpu_slots(const struct fk_core *core, uint32_t instance, const struct fk_key *keys, uint32_t n,
                       uint32_t *slots);
struct fk_core_fetch {
    uint64_t id;                    /* to be answered by fk_core_fetch_done */
    uint32_t space, cpu_slot;       /* where the bytes are to go */
    struct fk_key key;
    bool urgent;                    /* a get waits for it, not only a prefetch */
};
uint32_t fk_core_take_fetches(struct fk_core *core, struct fk_core_fetch *out, uint32_t max);
/* 0: the bytes are in place, and are that block's. busy: failed, but something may still write to the
 * slot: fk_core_fetch_released follows. */
struct fk_core_fetch_done { uint64_t id; int32_t status; bool busy; };
void fk_core_fetch_done(struct fk_core *core, const struct fk_core_fetch_done *done, uint32_t n,
                        uint64_t now_us);
void fk_core_fetch_released(struct fk_core *core, uint64_t id, uint64_t now_us);
/* Does anybody still wait for it? A fetch that failed at one place may be tried at another. */
bool fk_core_fetch_wanted(const struct fk_core *core, uint64_t id);
/* The block's copy in the tier, for somebody else to read: pinned until fk_core_loan_end. -ENOENT: not READY
 * there; -EAGAIN: too many hold it. */
int fk_core_lend(struct fk_core *core, uint32_t space, struct fk_key key, enum fk_tier tier,
                 uint32_t *slot, uint32_t *loan);
/* Is the copy what it was when it was lent? (A reset or fault may have come in between.) */
bool fk_core_loan_good(const struct fk_core *core, uint32_t loan, enum fk_tier tier);
uint32_t fk_core_loan_group(const struct fk_core *core, uint32_t loan);
/* Its bytes on SSD were read and are not what they should be: that copy goes. Before fk_core_loan_end. */
void fk_core_loan_bad(struct fk_core *core, uint32_t loan);
void fk_core_loan_end(struct fk_core *core, uint32_t loan);

/* ---- what comes out ---- */
uint32_t fk_core_take_completions(struct fk_core *core, struct flexkv_completion *out, uint32_t max);
/* Per block and tier stored and removed alternate; stored comes after the bytes are in place,
 * removed before the slot is reused. */
struct fk_core_event {
    struct fk_key key, parent;
    uint32_t slot[FK_TIERS];        /* at that moment; FK_NONE: none */
    uint32_t space;
    uint8_t tier, group;            /* group: the index's number, as of fk_core_group_add */
    bool stored;
};
uint32_t fk_core_take_events(struct fk_core *core, struct fk_core_event *out, uint32_t max);
/* Were events lost (no memory) since the last call? What is present tells the rest. */
bool fk_core_events_lost(struct fk_core *core);
/* What the tiers hold: entries from *at on, READY in some tier; *at is moved on, FK_NONE: the end.
 * Looks at max entries and returns how many of them there are. A block that is there all the time
 * of a walk is found by it. */
struct fk_core_present {
    struct fk_key key;
    uint32_t space, group;
    uint32_t slot[FK_TIERS];        /* FK_NONE: not READY there */
};
uint32_t fk_core_present(const struct fk_core *core, uint32_t *at, struct fk_core_present *out,
                         uint32_t max);

/* Deadlines, expired leases, eviction ahead of need, sweeps. Call at next_wakeup or later. */
void fk_core_tick(struct fk_core *core, uint64_t now_us);
uint64_t fk_core_next_wakeup(const struct fk_core *core);       /* UINT64_MAX: none */

/*
 * What a block takes to copy, to read from SSD, to fetch from elsewhere, and to compute; load_us: what a load from SSD or
 * elsewhere takes besides. With compute_us known (not 0) a match is cut to what surely is loaded sooner than computed:
 * nothing from SSD or elsewhere while that rate is not known. Probes (worth.c) see to it that it becomes known, and is
 * looked at again while matches are cut.
 */
struct fk_core_costs { struct fk_rate copy, ssd, fetch; double load_us, compute_us; };
void fk_core_set_costs(struct fk_core *core, uint32_t space, const struct fk_core_costs *costs);
/* Blocks of the space on their way from SSD. */
uint32_t fk_core_reads(const struct fk_core *core, uint32_t space);

/* What waits in the queues: lets a shell decide whom to wake. */
struct fk_core_work {
    bool jobs, ssd, fetches, completions, events;
    uint32_t cancels;               /* how many jobs were cancelled so far: has it grown? */
};
struct fk_core_work fk_core_work(const struct fk_core *core);

void fk_core_space_free(const struct fk_core *core, uint32_t space, uint32_t free_slots[FK_TIERS]);
void fk_core_get_stats(const struct fk_core *core, struct flexkv_stats *out);
/* Checks every internal invariant (slots, pins, links, counts); O(blocks). NULL or what is wrong. */
const char *fk_core_check(const struct fk_core *core);
/* For invariant checks of the simulator: is the block there, and where. */
struct fk_core_where { bool cpu_ready, ssd_ready; uint32_t cpu_slot, ssd_slot, pins; };
bool fk_core_find(const struct fk_core *core, struct fk_key key, struct fk_core_where *out);

#endif
