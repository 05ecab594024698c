/*
 * net.h - the simulator of whole clusters: nodes with the real core, peer tier, cluster state machine and loopback
 * transport; simulated are Redis (tests/cluster), SSDs, copy engines, callers, clocks and what goes wrong.
 *
 *   net.c          the program: a world, totals (tests/simulator: options, seeds, the line that replays a failure)
 *   net_world.c    seed -> a world; time; who dies, hangs, leaves, comes back; quiet points
 *   net_node.c     the shell around one node: open, crash, close, one round of everything
 *   net_ssd.c      its SSD: slots that keep bytes, late
 *   net_store.c    its part in the store that nodes share: the real depot and the real store, with fibers for threads
 *   net_fiber.c    those; net_place.c: the store's files, and what goes wrong with them
 *   net_caller.c   its engine: match get put prefetch cancel reset, and the workers that copy
 *   net_watch.c    stands between the peer tier and core and transport: each fetch, each grant, each slot in use
 *   net_check.c    names in look-ups; at quiet points: the truth, hits, nothing left over
 *
 * One process, one thread, one seed. The world's clock is real; each node has its own, which drifts.
 */
#ifndef NET_H
#define NET_H

#include "csim_net.h"
#include "node/core.h"
#include "peer/peer.h"
#include "transport/loopback.h"

#define NET_NODES 8u            /* processes at a time, of NET_HOMES homes and a few twins */
#define NET_HOMES 6u
#define NET_TYPES 4u            /* models; 0 and 1 have the same keys and other bytes */
#define NET_FAMILIES 3u         /* of keys */
#define NET_SPACES 3u           /* of a node: of each family one at most */
#define NET_NS 3u
#define NET_RANKS 2u
#define NET_CHAIN 20u
#define NET_PROMPTS 24u
#define NET_OPS 16u
#define NET_LEASES 10u
#define NET_OPEN 8u              /* files of the store that a node reads at a time */
#define NET_BYTES 256u          /* of a slot at most */

#define NET_TTL_US UINT64_C(3000000)
#define NET_LEASE_SLACK_US UINT64_C(1000000)    /* beyond the TTL: a command of that age may still count */
#define NET_SLACK_US UINT64_C(4000)             /* how late a node's own things may be noticed */
#define NET_MAX_PENDING 300u

struct net_type {
    uint32_t family, slice_bytes, ranks;
    uint8_t fingerprint[16];
};

struct net_key {
    struct fk_key key, parent;
    uint32_t parent_index;              /* FK_NONE: first of a chain */
    uint32_t family, ns;
    uint8_t complete;                   /* bit of each type: somebody has put it whole */
};

struct net_prompt { uint32_t ns, n, keys[NET_CHAIN], tokens[NET_CHAIN]; };

struct net_family {
    struct fk_key seed[NET_NS];
    struct net_prompt prompts[NET_PROMPTS];
    uint32_t n_prompts, alphabet;
};

/* What a node is each time it starts. */
struct net_home {
    struct fk_core_params core;
    uint32_t n_spaces, type[NET_SPACES], cpu_slots[NET_SPACES], ssd_slots[NET_SPACES], pages[NET_SPACES];
    uint32_t private_ns;                /* a bit for each */
    bool quotas, share_cpu, share_ssd;
    uint32_t staging, max_in_flight;
    uint64_t fetch_us;                  /* timeout */
    bool alone;                         /* a store, and no peers */
    bool has_store, store_on_reuse;
    uint32_t store_threads;
};

struct net_ssd_slot {
    bool used, torn;
    struct fk_key key, parent;
    uint32_t tag;
    uint64_t seq;
    uint8_t bytes[NET_BYTES];
};

enum net_io_kind { NET_IO_READ, NET_IO_WRITE, NET_IO_STAGE };
struct net_io {
    enum net_io_kind kind;
    uint64_t due_us, id;                /* due: real */
    uint32_t space, ssd_slot, cpu_slot, tag, resets;
    struct fk_key key, parent;
    void *buffer;
};

struct net_use { uint16_t readers, writers; };
struct net_have { bool there[FK_TIERS]; uint32_t slot[FK_TIERS], stay[FK_TIERS]; };    /* by the events */

struct net_job { struct fk_job *job; uint64_t due_us; };        /* with a worker */
struct net_job_use { struct fk_job *job; uint32_t left; };

struct net_space {
    uint32_t type, id, instance, group[NET_NS], cpu_slots, ssd_slots, slot_bytes, n_pages, n_free;
    uint8_t *pool, *mem[NET_RANKS];
    uint32_t *free_pages;
    bool *page_busy;
    struct net_use *cpu_use, *ssd_use;
    uint32_t *generation[FK_TIERS];     /* of each slot: blocks that were READY in it */
    FK_VEC(struct net_job) jobs[NET_RANKS];
    FK_VEC(struct net_job_use) job_uses;
    struct net_ssd_slot *ssd;           /* outlives the process */
    uint32_t store_id;
    void *shelf;                        /* net_place.c */
};

struct net_op {
    bool used, open;                    /* used and not open: a worker still has its pages */
    uint64_t torn;                      /* bad blocks on SSDs so far */
    uint64_t id, deadline;              /* the node's clock */
    uint32_t kind, space, n, n_pages, resets, keys[NET_CHAIN], pages[NET_CHAIN];
    bool cancelled;
    uint32_t must;                      /* so many leading blocks: nothing stands in their way */
    int8_t results[NET_CHAIN];
};

struct net_lease { uint64_t id, expires; uint32_t space, n, resets, keys[NET_CHAIN]; };

struct net_fetch {                      /* from its taking to its end, or to the release of its slot */
    uint64_t id, taken;
    uint32_t space, cpu_slot, key;
    bool ended;
    bool stored;                        /* from the store; born: what was read, and the place's serial when it was taken */
    uint64_t born, serial;
};

struct net_grant {
    struct fk_block_ref ref;
    void *pin;
    const void *data;
    uint32_t space, key, slot, stay;    /* slot: of the cpu tier; FK_NONE: a staging buffer */
};

struct net_later { uint64_t later; struct fk_block_ref ref; };   /* asked for, being read from SSD */

struct net_node {                       /* of the client with the same number in world.net */
    uint32_t home, name, space_of[NET_FAMILIES];
    char address[32];
    uint64_t frozen_us, thawed_us, epoch;       /* real; epoch: last seen */
    bool leaving, ending;
    uint32_t fast;                      /* rounds at one moment */
    uint64_t round_us;
    uint64_t leave_until_us;
    struct fk_core *core;
    struct fk_peers *peers;             /* NULL: alone */
    struct fk_store *store;             /* NULL: none */
    struct fk_depot *depot;
    FK_VEC(struct net_fiber *) fibers;
    struct net_file *open[NET_OPEN];
    uint32_t n_open;
    uint64_t reset_serial;              /* of the place, when it was reset last */
    struct fk_transport *transport;
    uint64_t transport_next;            /* its clock */
    uint64_t pump_us;                   /* real: a round is due */
    uint32_t n_spaces, resets;
    struct net_space space[NET_SPACES];
    FK_VEC(struct net_have) have;
    FK_VEC(struct fk_core_event) untold;        /* to the peer tier */
    struct net_op ops[NET_OPS];
    struct net_lease leases[NET_LEASES];
    uint32_t n_leases;
    FK_VEC(struct net_io) ios;
    FK_VEC(struct net_fetch) fetches;
    FK_VEC(struct net_grant) grants;
    FK_VEC(struct net_later) later;
    uint64_t ssd_seq;
    uint32_t ssd_resets;
    bool twin;                          /* with the name of another one, and an SSD of its own */
};

struct net_grave { uint32_t name; uint64_t epoch, died_us; };

struct net_counts {
    uint64_t steps, puts, gets, got, lost, peer_blocks, wrong_place, lookups;
    uint64_t fetched, failed, retried, not_there, quarantined, lent, refused, staged;
    uint64_t dropped, delayed, corrupted, reset_reads, cut_reads;
    uint64_t crashes, freezes, leaves, starts, twins, fenced, snapshots, gaps, overflows, resets, timeouts;
    uint64_t torn, compared, hits_checked;
    uint64_t store_reads, store_writes, store_late, store_evicted, store_resets, store_leftovers, store_handed_on;
};

struct net_world {
    uint64_t seed, rng, step, trace;
    bool calm, quiet, verbose, no_self_check;
    struct cs_net net;                  /* Redis, clients, the world's clock */
    struct fk_loopback_hub *hub;
    struct net_place *place;            /* where the nodes' store is */
    struct net_node *stepping;          /* whose transport is being stepped */
    struct net_node node[NET_NODES];
    struct net_home home[NET_HOMES];
    struct net_ssd_slot *disk[NET_HOMES][NET_SPACES];
    uint32_t n_homes, n_types;
    uint32_t fault_ppk, slow_us;        /* of 1024 reads so many go wrong; on the way for so long */
    bool occupied[NET_HOMES];           /* a process runs there, or hangs */
    bool host_lost[NET_HOMES];          /* nobody says that nobody is there */
    uint64_t cut_redis_us[NET_HOMES + 1], cut_us[NET_NODES][NET_NODES];
    struct net_type type[NET_TYPES];
    struct net_family family[NET_FAMILIES];
    FK_VEC(struct net_key) keys;
    uint32_t *key_table, key_table_size;
    FK_VEC(struct net_grave) graves;
    uint32_t stream_cap, address_seq;
    struct net_counts n;
};

/* ---- net.c ---- */
void net_fail(struct net_world *w, const char *fmt, ...) __attribute__((noreturn, format(printf, 2, 3)));
void net_trace(struct net_world *w, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
#define NET_CHECK(w, cond, ...) do { if (!(cond)) net_fail((w), __VA_ARGS__); } while (0)
#define NET_TRACE(w, ...) do { if ((w)->verbose) net_trace((w), __VA_ARGS__); } while (0)
static inline uint32_t net_below(struct net_world *w, uint32_t n) { return fk_rng_below(&w->rng, n); }
static inline bool net_chance(struct net_world *w, uint32_t one_in) { return net_below(w, one_in) == 0; }
static inline uint32_t net_range(struct net_world *w, uint32_t a, uint32_t b) { return a + net_below(w, b - a + 1); }
static inline void net_mix(struct net_world *w, uint64_t v)
{
    w->trace = (w->trace ^ v) * 0x9e3779b97f4a7c15ull;
    w->trace ^= w->trace >> 29;
}

/* ---- net_world.c ---- */
struct net_world *net_world_new(uint64_t seed, bool verbose, bool no_self_check);
void net_world_step(struct net_world *w);
void net_world_quiet(struct net_world *w);
void net_world_free(struct net_world *w, struct net_counts *total);
extern struct net_world *net_current;   /* for those whom nobody tells which world it is */

static inline uint32_t net_at(const struct net_world *w, const struct net_node *p) { return (uint32_t)(p - w->node); }
static inline struct cs_client *net_client(struct net_world *w, const struct net_node *p)
{
    return &w->net.client[p - w->node];
}
static inline bool net_alive(const struct net_world *w, uint32_t i) { return w->net.client[i].alive; }
static inline bool net_runs(const struct net_world *w, uint32_t i)
{
    return w->net.client[i].alive && !w->net.client[i].paused;
}
static inline uint64_t net_now(struct net_world *w, const struct net_node *p)
{
    return cs_local(net_client(w, p), w->net.now_us);
}
void net_epoch_seen(struct net_world *w, struct net_node *p);
const char *net_name(uint32_t name);
void net_totals(struct net_world *w, struct net_node *p);       /* what it counted, before it goes */

/* ---- keys, bytes: net_world.c ---- */
uint32_t net_key_find(struct net_world *w, struct fk_key key);  /* FK_NONE: unknown */
const struct net_prompt *net_pick_prompt(struct net_world *w, uint32_t family);
void net_fill(const struct net_world *w, uint32_t type, uint32_t key, uint32_t rank, void *buf);
bool net_bytes_ok(const struct net_world *w, uint32_t type, uint32_t key, const void *slot);

/* ---- net_node.c ---- */
void net_node_start(struct net_world *w, uint32_t i, uint32_t home, uint32_t name, bool twin);
void net_node_end(struct net_world *w, struct net_node *p);
void net_node_cluster(struct net_world *w, struct net_node *p);
void net_node_round(struct net_world *w, struct net_node *p);
uint64_t net_node_next(struct net_world *w, struct net_node *p);        /* real */
void net_after(struct net_world *w, struct net_node *p);        /* after each call into the core */
void net_take_events(struct net_world *w, struct net_node *p);
void net_soon(struct net_world *w, struct net_node *p);         /* a round is due */
struct net_have *net_have(struct net_node *p, uint32_t key);

/* ---- net_ssd.c ---- */
bool net_ssd_take(struct net_world *w, struct net_node *p);
bool net_ssd_done(struct net_world *w, struct net_node *p);
uint64_t net_ssd_next(const struct net_node *p);
uint32_t net_ssd_found(struct net_node *p, uint32_t space, struct fk_core_found *out);

/* ---- net_caller.c ---- */
void net_caller_step(struct net_world *w, struct net_node *p);
void net_completion(struct net_world *w, struct net_node *p, const struct flexkv_completion *c);
bool net_workers(struct net_world *w, struct net_node *p);
uint64_t net_workers_next(const struct net_node *p);
void net_check_deadlines(struct net_world *w, struct net_node *p);
void net_reset(struct net_world *w, struct net_node *p);
/* Gets all that was matched; without faults, so the first `must` blocks must come. */
void net_get_now(struct net_world *w, struct net_node *p, uint32_t space, const struct net_prompt *pr,
                 const struct flexkv_match_result *r, uint32_t must);
uint32_t net_open_ops(const struct net_node *p);
uint32_t net_reach(struct net_world *w, struct net_node *p, uint32_t space, const struct net_prompt *pr, uint32_t n,
                   struct flexkv_match_result *out);

/* ---- net_watch.c ---- */
void net_use(struct net_world *w, struct net_node *p, struct net_use *u, bool write, const char *what, uint32_t slot);
void net_unuse(struct net_use *u, bool write);
void net_check_unowned(struct net_world *w, struct net_node *p, uint32_t space, uint32_t slot);
bool net_transport_holds(struct net_node *p, const void *buffer);
int net_grant(void *ctx, const struct fk_block_ref *r, struct fk_grant *g);
int net_release(void *ctx, const struct fk_block_ref *r, struct fk_grant *g);
/* Node p is asked for what it must refuse: any member may say anything. */
void net_spy(struct net_world *w, struct net_node *p);
void net_read_fault(void *ctx, const char *to, const struct fk_read *r, struct fk_loopback_fault *out);

/* ---- net_check.c ---- */
void net_check_names(struct net_world *w, struct net_node *p, uint32_t space, const struct net_prompt *pr);
void net_check_step(struct net_world *w);
void net_check_quiet(struct net_world *w);
void net_check_hits(struct net_world *w, struct net_node *p);   /* asks for a prompt, and gets it */
/* The same, right after all others have died. Silent: reads from them run out of time, so their slots are in quarantine. */
void net_check_left(struct net_world *w, struct net_node *p, bool silent);

#endif
