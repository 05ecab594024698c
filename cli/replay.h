/*
 * replay.h - what the parts of `flexkv replay` share.
 *
 *   replay.c          the command: load the trace, choose the mode, print
 *   replay_options.c  command line -> replay_options
 *   replay_plan.c     sizes in blocks, keys of a request, settings of the node
 *   replay_node.c     with bytes: a real node through the public API
 *   replay_index.c    --hit-only: the core alone, no bytes, time from the trace
 *   replay_belady.c   --policy belady: the offline bound
 *   replay_result.c   counters, latencies, intervals -> table and JSON
 *   report_html.c     the same as a page with charts
 *
 * One thread. Caller of everything: replay.c.
 */
#ifndef FK_CLI_REPLAY_H
#define FK_CLI_REPLAY_H

#include <stdio.h>

#include "base/key.h"
#include "base/util.h"
#include "config/config.h"
#include "index/policy.h"
#include "trace.h"

struct flexkv_stats;

/* ---- options ---- */

struct replay_size {
    enum { REPLAY_SIZE_NONE, REPLAY_SIZE_BYTES, REPLAY_SIZE_BLOCKS, REPLAY_SIZE_PERCENT } kind;
    double value;
    const char *text;               /* as given */
};

struct replay_options {
    const char **traces;
    size_t n_traces;
    struct replay_size cpu, ssd;
    const char *ssd_dir, *policy, *write_policy, *fault, *report;
    const char **sets;              /* "key=value" */
    size_t n_sets;
    uint64_t block_bytes, tokens_per_block, limit, warm_restart_at, queue;
    uint64_t backlog;               /* FK_NONE: chosen from the size of the cpu tier */
    double speed;                   /* times real time; 0: as fast as it goes */
    bool hit_only, verify, warm, join, json, quiet, help;
    bool belady;                    /* from policy */
};

/* 0; or 2 (usage) after a message on stderr. */
int replay_options_parse(struct replay_options *o, int argc, char **argv);
void replay_options_free(struct replay_options *o);
void replay_print_help(FILE *out);

/* ---- plan ---- */

struct replay_plan {
    const struct replay_options *options;
    const struct trace *trace;
    uint32_t subs;                  /* blocks per id */
    uint32_t cpu_slots, ssd_slots;
    uint32_t max_blocks;            /* of one request */
    uint64_t blocks, unique_blocks, ceiling_blocks;
};

/* 0, or 2 after a message on stderr. */
int replay_plan_make(struct replay_plan *p, const struct replay_options *o, const struct trace *t);
/* The settings of the node that the options ask for. 0, or 2 after a message on stderr. */
int replay_plan_config(const struct replay_plan *p,
                       int (*set)(void *arg, const char *key, const char *value), void *arg);

static inline uint32_t replay_blocks(const struct replay_plan *p, const struct trace_request *r)
{
    return r->n_ids * p->subs;
}

struct replay_hash { uint64_t lo, hi; };
/* Hashes, as an engine would supply them, of the request's blocks [first, first + n). */
void replay_hashes(const struct replay_plan *p, const struct trace_request *r, uint32_t first,
                   uint32_t n, struct replay_hash *out);

/* Bytes of a block, from its hash; bytes a multiple of 64. */
void replay_fill(void *page, uint64_t bytes, struct replay_hash h);
bool replay_same(const void *page, uint64_t bytes, struct replay_hash h);

/* ---- results ---- */

#define REPLAY_INTERVALS 120u

enum replay_call { REPLAY_MATCH, REPLAY_GET, REPLAY_PUT, REPLAY_CALLS };

/* What has been moved and stored so far: since the start, over restarts. */
struct replay_totals {
    uint64_t cpu_copy_bytes, ssd_read_bytes, ssd_write_bytes, evicted_blocks;
    uint64_t used[FK_TIERS];        /* blocks there now */
};

struct replay_interval {
    uint64_t requests, blocks, hit[FK_TIERS], ceiling;
    struct replay_totals end;       /* at its end */
};

struct replay_latency { double p50, p99, max; uint64_t count; };

struct replay_result {
    const struct replay_plan *plan;
    uint64_t requests, blocks, hit[FK_TIERS], ceiling;
    uint64_t verified, wrong, failed, put_failed;
    struct replay_totals totals;
    double seconds, cpu_seconds;
    FK_VEC(float) samples[REPLAY_CALLS];    /* us; in order of time until summed up */
    struct replay_latency latency[REPLAY_CALLS];
    struct replay_interval interval[REPLAY_INTERVALS];
    uint32_t intervals;             /* in use */
    uint32_t sampled;               /* intervals whose end is known */
    uint64_t index_bytes;
    /* restart; 0 when there was none */
    double restart_seconds;
    uint64_t restart_request, restart_found_blocks;
    double backlog_seconds;         /* waited for the disk */
    bool interrupted;
    uint64_t start_ns, start_cpu_ns, progress_ns;
};

void replay_result_init(struct replay_result *res, const struct replay_plan *p);
void replay_result_free(struct replay_result *res);
void replay_result_start(struct replay_result *res);
void replay_result_stop(struct replay_result *res);     /* times, percentiles */

void replay_note_latency(struct replay_result *res, enum replay_call call, uint64_t ns);
/* The request is done: this many of its blocks came from each tier. True: an interval has
 * ended, call replay_sample. */
bool replay_note_request(struct replay_result *res, const struct trace_request *r,
                         uint32_t cpu_blocks, uint32_t ssd_blocks);
void replay_sample(struct replay_result *res, const struct replay_totals *totals);
void replay_progress(struct replay_result *res);        /* on a terminal, a few times a second */
void replay_progress_clear(const struct replay_result *res);

double replay_ratio(uint64_t a, uint64_t b);            /* 0 if b is 0 */
uint64_t replay_hits(const struct replay_result *res);
const char *replay_grouped(uint64_t v, char buf[32]);   /* 1234567 -> "1,234,567" */
void replay_print_json(const struct replay_result *res, FILE *out);
void replay_print_table(const struct replay_result *res, FILE *out);

/* Set by SIGINT and SIGTERM: end with what is there. */
bool replay_stopped(void);

/* ---- modes: 0, or 1 after a message on stderr ---- */
int replay_run_node(const struct replay_plan *p, struct replay_result *res);
int replay_run_index(const struct replay_plan *p, struct replay_result *res);
int replay_run_belady(const struct replay_plan *p, struct replay_result *res);

#endif
