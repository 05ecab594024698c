/*
 * core_impl.h - private to src/node: the core's objects. See core.h for the whole picture.
 *
 *   lease   pinned entries that a match found
 *   op      a get, put or prefetch; its blocks each have a state
 *   fill    one block on its way to a cpu slot, from SSD or elsewhere; gets and prefetches wait for it
 *   job     blocks that agents copy; goes to every rank; belongs to one op
 *
 *   get:  IDLE -> (cpu ready) JOB -> DONE
 *              -> (not in cpu) WAIT -> READY -> JOB -> DONE          any state -> FAIL
 *              -> (on SSD, direct) JOB -> DONE, or IDLE again and then by the way above
 *   put:  JOB -> DONE            prefetch: IDLE -> WAIT -> DONE
 *
 * Every op block that names an entry holds one pin on it: in IDLE, WAIT, READY, JOB; and in DONE
 * of a prefetch, until it ends. Fills, SSD writes and loans hold one pin of their own.
 */
#ifndef FK_NODE_CORE_IMPL_H
#define FK_NODE_CORE_IMPL_H

#include "base/util.h"
#include "index/index.h"
#include "node/core.h"

#define CORE_READ_WINDOW 64u
#define CORE_READ_WINDOW_MAX 256u
#define CORE_SWEEP_ENTRIES 4096u
#define CORE_SWEEP_PAUSE_US 1000u
#define CORE_CLEAN_BATCH 64u
/* Leases and probes leave room for the pins of operations, fills and writes: the count never wraps. */
#define CORE_PINS_MAX (UINT16_MAX - 64)

enum blk_state { BLK_IDLE, BLK_WAIT, BLK_READY, BLK_JOB, BLK_DONE, BLK_FAIL };

struct op_block {
    uint32_t entry;                 /* FK_NONE: nothing to do for this block */
    uint32_t page;
    uint32_t next_op, next_block;   /* chain of those who wait for the same fill */
    uint8_t state;
    int8_t status;
};

struct op {
    uint32_t gen;                   /* odd while in use */
    uint8_t kind;                   /* enum flexkv_op_kind */
    bool reported;                  /* its completion has been posted */
    bool starved;                   /* waits for a free cpu slot */
    bool layerwise, told;           /* one job, of all its blocks; it has been made */
    bool early;                     /* reported when all that is missing is on its way */
    bool direct;                    /* workers read from SSD what is only there; a prefetch leaves it */
    bool silent;                    /* a probe: nobody hears of its end */
    uint32_t counter;
    bool touched;                   /* scratch mark of a batch of SSD completions */
    int status;                     /* why it is ending early, 0: it isn't */
    uint32_t space, instance, group;
    uint32_t n, cap;
    uint32_t limit;                 /* blocks from here on are not worth starting */
    uint32_t next;                  /* first block not started */
    uint32_t n_wait, n_ready;       /* blocks in these states */
    uint32_t n_direct;              /* blocks in jobs from SSD */
    uint64_t deadline_us, grace_us;
    uint64_t tag;
    struct op_block *blocks;
    struct job *jobs;
    void *user_data;
    int8_t *results;
};

struct lease {
    uint32_t gen;                   /* odd while in use */
    uint32_t space, instance, n, cap;
    uint64_t deadline_us;
    uint32_t *entries;
};

enum fill_source { FILL_SSD, FILL_ELSEWHERE, FILL_SOURCES };

/* Where a block's bytes would come from. */
enum core_place { CORE_IN_CPU, CORE_ON_SSD, CORE_ELSEWHERE };

struct core_probe {                 /* see worth.c */
    uint64_t due_us, latest_us;     /* due 0: nothing is noted */
    uint64_t not_before_us;         /* the next one */
    struct fk_key *keys, parent;    /* of a run of blocks; parent: of the first, zero: none */
    uint32_t n, group;
};

struct fill {
    uint32_t gen;                   /* odd while in use */
    uint32_t entry, space;
    uint32_t head_op, head_block;   /* waiters */
    uint8_t from;                   /* enum fill_source */
    bool high, issued;
    bool late;                      /* it failed, but something may still write to the slot */
};

struct job {
    struct job *next_of_op, *next_free;
    uint32_t op, workers_left, ok;
    uint32_t on_its_way;            /* so many workers say so */
    int status;
    uint32_t cap;
    uint32_t *blocks, *slots, *pages;
    uint32_t keys_cap;
    struct fk_key *keys;            /* and the residues behind them; from SSD only */
    struct fk_job pub;              /* last: ends in an array */
};

struct job_queue { struct fk_job *head, *tail; };

struct core_instance {
    uint32_t space, workers;
    bool direct;                    /* see fk_core_instance_direct */
    bool layered;                   /* it gets in layers: then prefetches bring to cpu what is on SSD */
    uint32_t jobs_out;
    struct job_queue *queue;        /* per worker; NULL: the number is free */
    struct job *free_jobs;
};

struct core_space {
    uint32_t cpu_slots, ssd_slots, ssd_dirs;
    uint32_t reserve;               /* cpu slots kept for blocks on their way to the engine */
    uint32_t backlog, backlog_max;  /* SSD writes queued or in flight */
    uint32_t dirs_out;
    uint32_t n_fills[FILL_SOURCES];
    uint32_t n_writes;              /* of the backlog: with the shell */
    bool elsewhere;                 /* what is not here may be asked for elsewhere */
    struct fk_core_costs costs;
    uint32_t probe_blocks;
    struct core_probe probe[FILL_SOURCES];
};

/* A first-in first-out queue on a growable array. */
#define CORE_FIFO(type) struct { FK_VEC(type) v; size_t head; }
#define fifo_empty(q) ((q)->head == (q)->v.len)
#define fifo_push(q, x) fk_vec_push(&(q)->v, x)
#define fifo_front(q) (&(q)->v.data[(q)->head])
#define fifo_pop(q) \
    do { if (++(q)->head == (q)->v.len) (q)->head = (q)->v.len = 0; \
         else if ((q)->head >= 1024 && (q)->head * 2 > (q)->v.len) { \
             memmove((q)->v.data, (q)->v.data + (q)->head, \
                     ((q)->v.len - (q)->head) * sizeof(*(q)->v.data)); \
             (q)->v.len -= (q)->head; (q)->head = 0; } } while (0)

struct fk_core {
    struct fk_core_params params;
    struct fk_index ix;
    struct core_space *spaces;
    FK_VEC(struct core_instance) instances;
    uint32_t *group_tags;           /* of each index group */
    uint32_t tick;
    uint64_t tick_base_ms;
    uint64_t now_us;                /* when the tick was last moved */
    uint64_t next_deadline_us;      /* no op or lease ends before */

    FK_VEC(struct op) ops;
    FK_VEC(uint32_t) free_ops;
    FK_VEC(struct lease) leases;
    FK_VEC(uint32_t) free_leases;
    FK_VEC(struct fill) fills;
    FK_VEC(uint32_t) free_fills;
    FK_VEC(uint32_t) touched;       /* ops that a batch of completions has changed */
    FK_VEC(uint32_t) scratch;
    FK_VEC(uint32_t) to_write;
    CORE_FIFO(uint32_t) fill_queue[FILL_SOURCES][2];    /* [1]: of gets */
    CORE_FIFO(struct fk_core_ssd_req) writes;
    CORE_FIFO(struct flexkv_completion) completions;
    uint32_t n_jobs_queued, n_starved, n_ops, n_leases, n_loans;
    uint32_t job_seq;
    uint32_t n_cancels;
    size_t events_taken;            /* of the index's */
    bool sweep_noted;               /* the next sweep has its deadline */
    bool room_changed;              /* slots or pins were let go: starved ops may try again */
    struct flexkv_stats stats;
};

/* core.c */
uint32_t core_tick_now(struct fk_core *core, uint64_t now_us);
void core_note_deadline(struct fk_core *core, uint64_t at_us);

/* lease.c */
/* For a prefetch: counts as no match; the caller ends it at once. NULL: nothing is known. */
struct lease *core_lease_known(struct fk_core *core, uint32_t instance, const struct fk_key *keys,
                               uint32_t n);
struct lease *core_lease_find(const struct fk_core *core, uint64_t id);
/* Up to `reach` keys in all, though some are not here: as far as the index has room. */
void core_lease_extend(struct fk_core *core, struct lease **l, uint32_t instance, uint32_t group,
                       const struct fk_key *keys, uint32_t reach);
/* The entry, pinned, of a block that is to be asked for elsewhere, or is here behind such; FK_NONE: it can't be had so. */
uint32_t core_lease_claim(struct fk_core *core, struct fk_key key, uint32_t parent, uint32_t space, uint32_t group);
void core_lease_free(struct fk_core *core, struct lease *l);
void core_lease_drop(struct fk_core *core, struct lease *l);

/* worth.c */
enum core_place core_place_of(struct fk_core *core, uint32_t entry);
/* How many of the leased blocks to load: the number that surely saves the most time, where each block costs its copy, and its
 * read if it is not in cpu, and saves its computing. What the SSD has under way comes first. Those before `first` have been
 * judged. */
uint32_t core_worth(struct fk_core *core, const struct lease *l, uint32_t first);
/* The lease's blocks from `first` on are left out: their tier is looked at in the background. */
void core_probe_declined(struct fk_core *core, const struct lease *l, uint32_t first, uint64_t now_us);
/* The block's copy in cpu goes now. */
void core_probe_left_cpu(struct fk_core *core, uint32_t entry);
/* Begins those whose time has come, notes when the others' comes. */
void core_probes_run(struct fk_core *core, uint64_t now_us);

/* op.c */
struct op *core_op_new(struct fk_core *core, enum flexkv_op_kind kind, uint32_t instance, uint32_t n,
                       const struct fk_core_op_args *args, uint64_t now_us, uint64_t *id);
struct op *core_op_find(struct fk_core *core, uint64_t id);
uint32_t core_op_number(const struct fk_core *core, const struct op *op);
void core_op_block_done(struct fk_core *core, struct op *op, uint32_t block);
void core_op_block_fail(struct fk_core *core, struct op *op, uint32_t block, int status);
/* Reports an early get if only what is on its way is missing. */
void core_op_early(struct fk_core *core, struct op *op);
/* Starts what can be started; reports and frees the op when nothing is left to do. */
void core_op_pump(struct fk_core *core, struct op *op);
void core_op_end_early(struct fk_core *core, struct op *op, int status, uint64_t now_us);
void core_op_check_deadline(struct fk_core *core, struct op *op, uint64_t now_us);
void core_retry_starved(struct fk_core *core);
void core_go_on(struct fk_core *core);  /* room may have come: for those who wait, then ahead of need */

/* job.c */
struct job *core_job_new(struct fk_core *core, struct op *op, uint32_t n);
/* A job that was not started, or is over. */
void core_job_unused(struct fk_core *core, struct job *j, const struct op *op);
void core_job_add(struct fk_core *core, struct job *j, struct op *op, uint32_t block);
void core_job_start(struct fk_core *core, struct job *j, struct op *op);
/* Jobs of blocks that the workers are to read from SSD themselves. */
void core_direct_start(struct fk_core *core, struct op *op, const uint32_t *blocks, uint32_t n);
void core_jobs_fini(struct core_instance *in);

/* fill.c */
/* The block waits for the fill that is under way. */
void core_fill_join(struct fk_core *core, struct op *op, uint32_t block);
/* Begins fills of blocks of the op, as far as slots can be had. Returns how many. */
uint32_t core_fill_start(struct fk_core *core, struct op *op, const uint32_t *blocks, uint32_t n);
/* The next to be carried out, those of gets first; FK_NONE: none. */
uint32_t core_fill_take(struct fk_core *core, enum fill_source from);
bool core_fills_queued(const struct fk_core *core, enum fill_source from);
uint64_t core_fill_id(const struct fk_core *core, uint32_t at);
/* busy: something may still write to the slot. After a batch of them: core_fills_settle. */
void core_fill_done(struct fk_core *core, uint32_t at, int status, bool busy);
void core_fills_settle(struct fk_core *core);

/* ssd.c */
/* Queues the blocks (parents first) for the SSD, as far as there is room and backlog. */
void core_write_blocks(struct fk_core *core, const uint32_t *entries, uint32_t n);

/* room.c */
uint32_t core_make_room(struct fk_core *core, uint32_t group, enum fk_tier tier, uint32_t want,
                        uint32_t reserve);
void core_evict_ahead(struct fk_core *core);
void core_evict_cleaned(struct fk_core *core, uint32_t entry);

#endif
