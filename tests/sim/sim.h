/*
 * sim.h - the simulated node: everything of one world, and who does what to it.
 *
 *   sim.c          options, seeds, the step loop, the replay line
 *   sim_config.c   seed -> configuration
 *   sim_node.c     the shell around the real core and SSD tiers: open, crash, close, pump
 *   sim_engine.c   disks          sim_agent.c   copy engines, one per space and rank
 *   sim_caller.c   the engine that asks: match get put prefetch cancel ...
 *   sim_model.c    the reference: keys, their bytes, events, leases, slots in use
 *   sim_events.c   KV events: names, journal, a subscriber
 *   sim_check.c    full scans, quiet points, what a restart must find
 *
 * One process, one thread, one seed: no real clock, no I/O but the directories that hold
 * the lock files. Any check that fails calls sim_fail, which prints the line that replays it.
 */
#ifndef SIM_H
#define SIM_H

#include "base/key.h"
#include "base/util.h"
#include "node/core.h"
#include "sim_engine.h"
#include "tier/ssd.h"

#define SIM_MAX_SPACES 3
#define SIM_MAX_NS 3
#define SIM_MAX_RANKS 3
#define SIM_MAX_CHAIN 32
#define SIM_MAX_OPS 40
#define SIM_MAX_LEASES 24
#define SIM_PROMPTS 24
#define SIM_AGENT_JOBS 4
#define SIM_OLD_INSTANCES 4
#define SIM_DONES 256

struct sim_space_config {
    uint32_t slice_bytes, ranks, cpu_slots, ssd_slots, stripe_slots, io_chunk, n_ns, pages;
    uint32_t max_chain, alphabet;
    bool quotas;
    struct fk_core_quota quota[SIM_MAX_NS];
};

struct sim_config {
    struct fk_core_params core;
    uint32_t n_spaces, n_dirs;
    struct sim_space_config space[SIM_MAX_SPACES];
    struct sim_disk_faults faults;          /* when faults are on */
    bool disk_faults, rot, agent_faults, stalls, crashes, reopens, resets, dirs_go, power_loss;
    bool calm;                              /* nothing goes wrong: nothing may fail */
    uint32_t agent_us, device_errors;
    uint64_t device_retry_us;
    uint32_t quiet_every, scan_every;
    uint32_t early;                         /* gets may be reported early: of so many steps of a job one says so; 0: none */
};

struct sim_key {
    struct fk_key key, parent;
    uint32_t parent_index;                  /* FK_NONE: first of a chain */
    uint8_t space, ns;
    bool there[FK_TIERS];                   /* by the events so far */
    uint32_t children_there[FK_TIERS];
    uint32_t leased;                        /* leases and gets under way that hold it */
    bool hold_broken;                       /* a fault took it from under them: put again, it is
                                               a block that they do not hold */
    uint32_t complete_epoch;                /* epoch + 1 of the last whole put; 0: never */
    bool was_on_ssd, expected;              /* before and after a restart (sim_check.c) */
    uint32_t found_slot;
    uint64_t found_seq;
};

struct sim_prompt { uint32_t ns, n; uint32_t keys[SIM_MAX_CHAIN], tokens[SIM_MAX_CHAIN]; };

struct sim_op {
    bool used, open;                        /* used and not open: its pages are still busy */
    uint64_t id, deadline, started, late_us; /* late: the shell was held up so long */
    uint32_t kind, space, instance, ns, n, epoch;
    bool cancelled, was_all_cpu;
    uint32_t held;                          /* blocks (bits) that the get keeps from eviction */
    uint32_t under_way;                     /* blocks (bits) that another put was storing */
    uint32_t epoch_floor;
    uint32_t jobs_out;                      /* jobs under way on its pages */
    bool early, arriving;                   /* it may be reported early; it was, and bytes are still to come */
    uint32_t arrived;                       /* blocks (bits) that are in place on all ranks */
    uint32_t dead_ranks;                    /* bits: their bytes will not come */
    uint32_t keys[SIM_MAX_CHAIN], pages[SIM_MAX_CHAIN];
    int8_t *results;
};

struct sim_lease {
    uint64_t id, expires;
    uint32_t space, ns, n, cpu_blocks, epoch;
    uint32_t keys[SIM_MAX_CHAIN];
};

struct sim_slot_use { uint16_t readers, writers; };

struct sim_ssd_slot {
    uint32_t key;                           /* of the last write that ended well, or FK_NONE */
    uint32_t epoch;
    bool forgotten;                         /* told to forget since */
    bool torn;                              /* its record and its bytes may differ: written, or
                                               being written, when the process died */
    FK_VEC(uint32_t) past;                  /* every key ever sent to it */
};

/* A job as the agents see it, from the first rank's take to the last rank's done. */
struct sim_job_use {
    struct fk_job *job;
    uint32_t space, n, ranks_done, min_ok;
    bool to_engine, bad;                    /* bad: a rank found wrong bytes in memory */
    uint32_t sure;                          /* ranks that have said that it is on its way */
    uint32_t slots[SIM_MAX_CHAIN * 8], ops[SIM_MAX_CHAIN * 8], blocks[SIM_MAX_CHAIN * 8];
    uint32_t epoch;
};

struct sim_agent_job { struct fk_job *job; uint32_t pos, fail_at; uint64_t next; int status; bool sure; };
struct sim_agent {
    uint32_t n, lag_us;
    uint64_t stalled_until;
    struct sim_agent_job jobs[SIM_AGENT_JOBS];
};

struct sim_page { uint32_t op, block; };    /* op FK_NONE: free */

struct sim_space {
    const struct sim_space_config *config;
    uint32_t id, instance, slot_bytes, default_group, group[SIM_MAX_NS];
    uint32_t old[SIM_OLD_INSTANCES], n_old; /* whose client is gone, and whose jobs are not over */
    bool costs;                             /* matches may be cut */
    bool ssd_unknown;                       /* nothing may be loaded from there */
    uint8_t fingerprint[16];
    uint8_t *pool;
    uint8_t *mem[SIM_MAX_RANKS];            /* pages */
    struct sim_page *page;
    uint32_t *free_pages, n_free_pages;
    struct sim_slot_use *cpu_use, *ssd_use;
    uint32_t *cpu_mark, *ssd_mark;          /* of the last scan that saw a block there */
    struct sim_ssd_slot *ssd_slot;
    struct fk_ssd *ssd;
    uint32_t dirs_out;                      /* as the core was told */
    struct sim_agent agent[SIM_MAX_RANKS];
    struct fk_key ns_seed[SIM_MAX_NS];
    struct sim_prompt prompts[SIM_PROMPTS];
    uint32_t n_prompts;
    uint32_t epoch_floor;                   /* the oldest epoch whose bytes may be seen */
    uint64_t hints, hint;                   /* given to the store, ever; the last one since it was opened, or
                                               what it had then; 0: none */
    uint32_t disk_epoch;                    /* the last reset that reached the disk */
    bool recreated;                         /* the store was replaced at the last open */
};

struct sim_req { uint64_t id; bool read; uint32_t space, ssd_slot, cpu_slot, key, epoch; };
struct sim_done { uint32_t space; struct fk_core_ssd_done done; };

/* What the core was last called for: says which removals are lawful. */
enum sim_call { SIM_CALL_MATCH, SIM_CALL_GET, SIM_CALL_PUT, SIM_CALL_PREFETCH, SIM_CALL_CANCEL,
                SIM_CALL_RESET, SIM_CALL_TICK, SIM_CALL_JOB, SIM_CALL_SSD, SIM_CALL_SSD_BAD,
                SIM_CALL_DIRS, SIM_CALL_RECOVER, SIM_CALL_RELEASE, SIM_CALL_TAKE, SIM_CALL_JOB_BAD };

struct sim {
    uint64_t seed, rng, step, now, trace;
    uint64_t early_rng;                     /* of its own: worlds without early gets are the same as ever */
    bool verbose;
    bool no_self_check;                     /* leave out the core's own opinion of itself */
    bool tables_damaged;                    /* an open may refuse the store */
    bool rough_since_quiet;                 /* errors or directories out: blocks may be lost */
    bool must_find;                         /* all that was on SSD is found by the next start */
    struct sim_config config;
    struct sim_disk_faults faults_now;
    struct sim_disk disk;
    struct sim_engine *engine;
    struct fk_core *core;
    struct sim_events *events;
    struct sim_space space[SIM_MAX_SPACES];
    uint32_t epoch;                         /* resets so far: bytes carry it */
    uint32_t quiet_epoch;                   /* at the last quiet point */
    FK_VEC(struct sim_key) keys;
    uint32_t *key_table, key_table_size;
    struct sim_op ops[SIM_MAX_OPS];
    struct sim_lease leases[SIM_MAX_LEASES];
    uint32_t n_leases;
    FK_VEC(struct sim_job_use) job_uses;
    FK_VEC(struct sim_req) reqs;
    struct sim_done dones[SIM_DONES];
    uint32_t n_dones;
    uint64_t last_tick;
    bool busy;                              /* the core asks for ticks without pause, ... */
    uint64_t busy_since;
    uint32_t scan;
    uint32_t call_group, call_space;        /* who caused the current call: for guarantees */
    FK_VEC(struct fk_core_found) found;
    uint64_t done_ops, got_blocks, put_blocks, failed_blocks, crashes, found_blocks;
    uint64_t dirs_out_seen, faults_hit, busy_pages, evictions, ssd_reads, early_ops;
};

/* ---- sim.c ---- */
void sim_fail(struct sim *s, const char *fmt, ...) __attribute__((noreturn, format(printf, 2, 3)));
void sim_trace(struct sim *s, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
#define SIM_CHECK(s, cond, ...) do { if (!(cond)) sim_fail((s), __VA_ARGS__); } while (0)
#define SIM_TRACE(s, ...) do { if ((s)->verbose) sim_trace((s), __VA_ARGS__); } while (0)
static inline uint32_t sim_below(struct sim *s, uint32_t n) { return fk_rng_below(&s->rng, n); }
static inline bool sim_chance(struct sim *s, uint32_t one_in) { return sim_below(s, one_in) == 0; }
static inline uint32_t sim_range(struct sim *s, uint32_t a, uint32_t b)
{
    return a + sim_below(s, b - a + 1);
}
static inline bool sim_early_chance(struct sim *s, uint32_t one_in)
{
    return fk_rng_below(&s->early_rng, one_in) == 0;
}
static inline void sim_mix(struct sim *s, uint64_t v)
{
    s->trace = (s->trace ^ v) * 0x9e3779b97f4a7c15ull;
    s->trace ^= s->trace >> 29;
}

/* ---- sim_config.c ---- */
void sim_config_draw(struct sim *s);
void sim_config_print(const struct sim *s);

/* ---- sim_model.c ---- */
uint32_t sim_key_intern(struct sim *s, struct fk_key key, uint32_t parent, uint32_t space,
                        uint32_t ns);
uint32_t sim_key_find(struct sim *s, struct fk_key key);     /* FK_NONE: unknown */
void sim_fill(const struct sim_key *k, uint32_t rank, uint32_t epoch, void *buf, uint32_t bytes);
bool sim_bytes_ok(const struct sim *s, const struct sim_key *k, uint32_t rank, uint32_t epoch_min,
                  const void *buf, uint32_t bytes);
void sim_junk(struct sim *s, void *buf, uint32_t bytes);
/* After each call into the core: completions, then events. */
void sim_after(struct sim *s, enum sim_call call);
void sim_set_there(struct sim *s, struct sim_key *k, enum fk_tier tier, bool there);
void sim_hold(struct sim *s, const uint32_t *keys, uint32_t n, int by);
/* A slot comes into / goes out of use by one I/O or job; ends the run on a conflict. */
void sim_use(struct sim *s, struct sim_slot_use *u, bool write, const char *what, uint32_t slot);
void sim_unuse(struct sim_slot_use *u, bool write);
/* The slot is about to be written: no block may still be announced as being in it. */
void sim_check_unowned(struct sim *s, uint32_t space, enum fk_tier tier, uint32_t slot);

/* ---- sim_caller.c ---- */
void sim_new_prompt(struct sim *s, uint32_t space);
void sim_caller_step(struct sim *s);            /* one random request */
void sim_completion(struct sim *s, const struct flexkv_completion *c);
void sim_op_job_over(struct sim *s, uint32_t op);
/* What of it is not in place yet, all ranks have said is on its way, and none has failed since. */
bool sim_op_sure(const struct sim *s, const struct sim_op *op);
void sim_op_let_go(struct sim *s, struct sim_op *op, uint32_t blocks);
void sim_expire_leases(struct sim *s);
void sim_read_failed(struct sim *s, uint32_t key);
void sim_dirs_changed(struct sim *s);
void sim_check_deadlines(struct sim *s);
void sim_forget_callers(struct sim *s);         /* the process died: ops and leases are gone */
uint32_t sim_open_ops(const struct sim *s);
void sim_do_reset(struct sim *s);
void sim_do_fail_space(struct sim *s);
void sim_do_client_dies(struct sim *s);
void sim_do_costs(struct sim *s);
void sim_agent_dies(struct sim *s);
void sim_old_instances(struct sim *s, struct sim_space *sp);

/* ---- sim_agent.c ---- */
bool sim_agent_step(struct sim *s);             /* false: no agent had anything due */
uint64_t sim_agent_next(const struct sim *s);
void sim_agents_forget(struct sim *s);
uint32_t sim_agent_jobs(const struct sim *s);

/* ---- sim_node.c ---- */
void sim_node_create(struct sim *s, const char *base);
void sim_node_destroy(struct sim *s);
bool sim_pump_step(struct sim *s, bool all);    /* SSD requests and completions */
void sim_tick(struct sim *s);
bool sim_ssd_waiting(const struct sim *s);      /* requests done that nobody has collected */
uint64_t sim_next_time(const struct sim *s);
void sim_crash(struct sim *s, bool power);
void sim_reopen(struct sim *s);
void sim_dirs_step(struct sim *s);
void sim_dirs_back(struct sim *s);
bool sim_disk_trusted(const struct sim *s);     /* no faults but crashes of the process */
uint32_t sim_slack(const struct sim *s);        /* how late a tick may come */

/* ---- sim_events.c ---- */
void sim_events_create(struct sim *s);
void sim_events_destroy(struct sim *s);
void sim_events_open(struct sim *s);            /* a node's life begins, and ends */
enum sim_end { SIM_END_CLEAN, SIM_END_CRASH, SIM_END_POWER };
void sim_events_forget(struct sim *s, enum sim_end end);
void sim_events_found(struct sim *s, uint32_t space);   /* s->found: what a restart found */
void sim_events_told(struct sim *s, const struct fk_core_event *e);
void sim_events_put(struct sim *s, uint32_t space, const uint32_t *keys, const uint32_t *slots,
                    uint32_t n);
void sim_events_io(struct sim *s, uint32_t space, const struct fk_core_ssd_req *r);
void sim_events_step(struct sim *s);
void sim_events_check(struct sim *s);           /* at rest */

/* ---- sim_check.c ---- */
void sim_check_cheap(struct sim *s);
void sim_check_full(struct sim *s);
void sim_quiesce(struct sim *s);
bool sim_slot_bytes_ok(struct sim *s, uint32_t space, uint32_t cpu_slot, uint32_t key,
                       uint32_t epoch_min);
bool sim_ssd_settled(struct sim *s);            /* every record is written, nothing failed */
/* Before a restart: notes what is on SSD; must_find: all of it has to be there again. */
void sim_note_ready(struct sim *s, bool must_find);
void sim_check_found(struct sim *s, uint32_t space);    /* s->found: what the tier found */
void sim_check_recovered(struct sim *s, uint32_t space, uint64_t blocks);   /* and the core */

#endif
