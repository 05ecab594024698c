/*
 * replay_result.c - what a replay found: counters, latencies, and a row of intervals over the
 * trace's time for the charts; printed as a table or as JSON. Knows nothing of nodes.
 * Callers: the modes (notes) and replay.c (printing). One thread.
 */
#include "replay.h"

#include <math.h>

#include "base/clock.h"

#define PROGRESS_NS 200000000ull

static const char *const call_names[REPLAY_CALLS] = { "match", "get", "put" };

double replay_ratio(uint64_t a, uint64_t b)
{
    return b ? (double)a / (double)b : 0;
}

uint64_t replay_hits(const struct replay_result *res)
{
    return res->hit[FK_TIER_CPU] + res->hit[FK_TIER_SSD];
}

void replay_result_init(struct replay_result *res, const struct replay_plan *p)
{
    *res = (struct replay_result){ .plan = p };
    size_t n = p->trace->requests.len;
    res->intervals = (uint32_t)fk_max(fk_min(n, (size_t)REPLAY_INTERVALS), (size_t)1);
    for (int i = 0; i < REPLAY_CALLS; i++)
        (void)fk_vec_reserve(&res->samples[i], n + 1);
}

void replay_result_free(struct replay_result *res)
{
    for (int i = 0; i < REPLAY_CALLS; i++)
        fk_vec_free(&res->samples[i]);
}

void replay_result_start(struct replay_result *res)
{
    res->start_cpu_ns = fk_clock_process_cpu_ns();
    res->start_ns = res->progress_ns = fk_clock_ns();
}

static int by_value(const void *a, const void *b)
{
    float x = *(const float *)a, y = *(const float *)b;

    return (x > y) - (x < y);
}

/* The smallest value that is not below the share q of all. */
static double percentile(const float *sorted, size_t n, double q)
{
    size_t rank = (size_t)ceil(q * (double)n);

    return n ? (double)sorted[rank ? rank - 1 : 0] : 0;
}

void replay_result_stop(struct replay_result *res)
{
    res->seconds = (double)(fk_clock_ns() - res->start_ns) / 1e9;
    res->cpu_seconds = (double)(fk_clock_process_cpu_ns() - res->start_cpu_ns) / 1e9;
    for (int i = 0; i < REPLAY_CALLS; i++) {
        float *v = res->samples[i].data;
        size_t n = res->samples[i].len;
        qsort(v, n, sizeof(*v), by_value);
        res->latency[i] = (struct replay_latency){
            percentile(v, n, .5), percentile(v, n, .99), percentile(v, n, 1), n
        };
    }
}

void replay_note_latency(struct replay_result *res, enum replay_call call, uint64_t ns)
{
    /* Room was reserved at the start: this fails only if that failed. */
    (void)fk_vec_push(&res->samples[call], (float)((double)ns / 1e3));
}

/* Interval of a request: by its time; by its number where the trace has no time. */
static uint32_t interval_of(const struct replay_result *res, const struct trace_request *r)
{
    const struct trace *t = res->plan->trace;
    size_t n = t->requests.len;
    uint64_t begin = t->requests.data[0].time_us;
    uint64_t span = t->requests.data[n - 1].time_us - begin + 1;
    double x = span > 1 ? (double)(r->time_us - begin) / (double)span
                        : (double)(r - t->requests.data) / (double)n;

    return fk_min((uint32_t)(x * res->intervals), res->intervals - 1);
}

bool replay_note_request(struct replay_result *res, const struct trace_request *r,
                         uint32_t cpu_blocks, uint32_t ssd_blocks)
{
    uint32_t index = interval_of(res, r);
    struct replay_interval *iv = &res->interval[index];
    uint64_t blocks = replay_blocks(res->plan, r);
    uint64_t ceiling = (uint64_t)(r->n_ids - r->new_ids) * res->plan->subs;

    res->requests++;
    res->blocks += blocks;
    res->ceiling += ceiling;
    res->hit[FK_TIER_CPU] += cpu_blocks;
    res->hit[FK_TIER_SSD] += ssd_blocks;
    iv->requests++;
    iv->blocks += blocks;
    iv->ceiling += ceiling;
    iv->hit[FK_TIER_CPU] += cpu_blocks;
    iv->hit[FK_TIER_SSD] += ssd_blocks;
    return index > res->sampled || res->requests == res->plan->trace->requests.len;
}

/* Ends all intervals before the last one that has a request; all when the trace is through. */
void replay_sample(struct replay_result *res, const struct replay_totals *totals)
{
    bool all = res->requests == res->plan->trace->requests.len;
    uint32_t upto = res->intervals;

    res->totals = *totals;
    while (!all && upto > res->sampled && !res->interval[upto - 1].requests)
        upto--;
    if (!all && upto > res->sampled)
        upto--;
    for (; res->sampled < upto; res->sampled++)
        res->interval[res->sampled].end = *totals;
}

void replay_progress_clear(const struct replay_result *res)
{
    if (!res->plan->options->quiet && isatty(STDERR_FILENO))
        fputs("\r\033[K", stderr);
}

void replay_progress(struct replay_result *res)
{
    if (res->plan->options->quiet || !isatty(STDERR_FILENO))
        return;
    uint64_t now = fk_clock_ns();
    if (now - res->progress_ns < PROGRESS_NS)
        return;
    res->progress_ns = now;
    double seconds = (double)(now - res->start_ns) / 1e9;
    size_t n = res->plan->trace->requests.len;
    fprintf(stderr, "\r%3.0f%%  %llu of %zu requests  %.0f/s  hit ratio %.3f  wrong %llu  failed %llu\033[K",
            100 * replay_ratio(res->requests, n), (unsigned long long)res->requests, n,
            (double)res->requests / seconds, replay_ratio(replay_hits(res), res->blocks),
            (unsigned long long)res->wrong, (unsigned long long)res->failed);
    fflush(stderr);
}

/* ---- printing ---- */

typedef unsigned long long ull;

void replay_print_json(const struct replay_result *res, FILE *out)
{
    const struct replay_totals *t = &res->totals;

    fprintf(out, "{\"requests\": %llu, \"blocks\": %llu, \"hit_blocks\": {\"cpu\": %llu, \"ssd\": %llu},\n"
            " \"hit_ratio\": %.6f, \"ceiling_ratio\": %.6f,\n"
            " \"verified_blocks\": %llu, \"wrong_blocks\": %llu, \"failed_blocks\": %llu, "
            "\"evicted_blocks\": %llu,\n"
            " \"seconds\": %.6f, \"cpu_seconds\": %.6f, \"requests_per_cpu_second\": %.1f",
            (ull)res->requests, (ull)res->blocks, (ull)res->hit[FK_TIER_CPU],
            (ull)res->hit[FK_TIER_SSD], replay_ratio(replay_hits(res), res->blocks),
            replay_ratio(res->ceiling, res->blocks), (ull)res->verified, (ull)res->wrong,
            (ull)res->failed, (ull)t->evicted_blocks, res->seconds, res->cpu_seconds,
            res->cpu_seconds > 0 ? (double)res->requests / res->cpu_seconds : 0);
    for (int i = 0; i < REPLAY_CALLS; i++)
        fprintf(out, ",\n \"%s_us\": {\"p50\": %.3f, \"p99\": %.3f, \"max\": %.3f}", call_names[i],
                res->latency[i].p50, res->latency[i].p99, res->latency[i].max);
    fprintf(out, ",\n \"bytes\": {\"cpu_copy\": %llu, \"ssd_read\": %llu, \"ssd_write\": %llu}}\n",
            (ull)t->cpu_copy_bytes, (ull)t->ssd_read_bytes, (ull)t->ssd_write_bytes);
}

const char *replay_grouped(uint64_t v, char buf[32])
{
    char digits[24];
    int n = snprintf(digits, sizeof(digits), "%llu", (ull)v), k = 0;

    for (int i = 0; i < n; i++) {
        if (i && (n - i) % 3 == 0)
            buf[k++] = ',';
        buf[k++] = digits[i];
    }
    buf[k] = 0;
    return buf;
}

static void row_blocks(FILE *out, const char *name, uint64_t v, uint64_t of)
{
    char buf[32];

    fprintf(out, "  %-16s %15s", name, replay_grouped(v, buf));
    if (of)
        fprintf(out, "   %.4f of all blocks", replay_ratio(v, of));
    fputc('\n', out);
}

static void row_bytes(FILE *out, const char *name, uint64_t bytes, double seconds)
{
    double gib = (double)bytes / (double)FK_GIB;

    fprintf(out, "  %-16s %11.3f GiB", name, gib);
    if (seconds > 0)
        fprintf(out, "   %.2f GiB/s", gib / seconds);
    fputc('\n', out);
}

static void print_latency(const struct replay_result *res, FILE *out)
{
    fprintf(out, "\n  %-10s %10s %12s %12s %12s\n", "", "calls", "p50 us", "p99 us", "max us");
    for (int i = 0; i < REPLAY_CALLS; i++)
        fprintf(out, "  %-10s %10llu %12.1f %12.1f %12.1f\n", call_names[i],
                (ull)res->latency[i].count, res->latency[i].p50, res->latency[i].p99,
                res->latency[i].max);
}

static void print_setting(const struct replay_result *res, FILE *out)
{
    const struct replay_plan *p = res->plan;
    const struct replay_options *o = p->options;

    fprintf(out, "%s", o->n_traces > 1 ? "traces" : "trace");
    for (size_t i = 0; i < o->n_traces; i++)
        fprintf(out, " %s", o->traces[i]);
    fprintf(out, "\ncpu %u blocks, ssd %u blocks of %llu bytes (%llu tokens), policy %s, %s%s\n\n",
            p->cpu_slots, p->ssd_slots, (ull)o->block_bytes, (ull)o->tokens_per_block, o->policy,
            o->hit_only ? "index only" : "write ", o->hit_only ? "" : o->write_policy);
}

void replay_print_table(const struct replay_result *res, FILE *out)
{
    const struct replay_options *o = res->plan->options;
    char buf[32];

    print_setting(res, out);
    fprintf(out, "  %-16s %15s%s\n", "requests", replay_grouped(res->requests, buf),
            res->interrupted ? "   (interrupted)" : "");
    row_blocks(out, "blocks", res->blocks, 0);
    row_blocks(out, "hit in cpu", res->hit[FK_TIER_CPU], res->blocks);
    row_blocks(out, "hit on ssd", res->hit[FK_TIER_SSD], res->blocks);
    row_blocks(out, "hit", replay_hits(res), res->blocks);
    row_blocks(out, "infinite cache", res->ceiling, res->blocks);
    row_blocks(out, "evicted", res->totals.evicted_blocks, 0);
    row_blocks(out, "failed", res->failed, 0);
    if (o->verify) {
        row_blocks(out, "verified", res->verified, 0);
        row_blocks(out, "wrong", res->wrong, 0);
    }
    double seconds = o->hit_only ? 0 : res->seconds;
    row_bytes(out, "copied", res->totals.cpu_copy_bytes, seconds);
    row_bytes(out, "ssd read", res->totals.ssd_read_bytes, seconds);
    row_bytes(out, "ssd written", res->totals.ssd_write_bytes, seconds);
    print_latency(res, out);
    fprintf(out, "\n  %.3f s, %.3f CPU s, %.0f requests per CPU second\n", res->seconds,
            res->cpu_seconds, res->cpu_seconds > 0 ? (double)res->requests / res->cpu_seconds : 0);
    if (res->restart_request)
        fprintf(out, "  restarted after request %llu in %.3f s, %llu blocks found again\n",
                (ull)res->restart_request, res->restart_seconds, (ull)res->restart_found_blocks);
    if (res->backlog_seconds > 0.0005)
        fprintf(out, "  %.3f s of these waiting for SSD writes (--backlog)\n", res->backlog_seconds);
    if (o->verify)
        fprintf(out, "  %s\n", res->wrong ? "WRONG BYTES WERE DELIVERED" : "every byte was right");
}
