/*
 * bench.h - what `flexkv bench` runs. Each benchmark measures ours and the limit (or a peer) in
 * alternation in one run, because the machines' speed drifts: only ratios mean anything.
 * Caller: cli/cmd_bench.c, one thread.
 */
#ifndef FK_BENCH_H
#define FK_BENCH_H

#include <stdint.h>

struct bench_result {
    char name[32];
    double ours, limit;         /* medians, in `unit` */
    double ratio;               /* median of the pairs' ratios; 0: there is no limit to compare */
    const char *unit;
    int runs;                   /* pairs */
    double spread;              /* (9th decile - 1st) / median, of the ratios or of ours */
};

/* Each writes up to max results and returns how many, or -errno. */
int bench_index(struct bench_result *out, int max);
int bench_events(struct bench_result *out, int max);
int bench_hash(struct bench_result *out, int max);
int bench_copy(struct bench_result *out, int max);
int bench_gpu(struct bench_result *out, int max);
int bench_publish(struct bench_result *out, int max);
int bench_ssd(const char *dir, struct bench_result *out, int max);
int bench_recover(const char *dir, struct bench_result *out, int max);
int bench_transport(struct bench_result *out, int max);         /* forks: alone in its process */

/* bench.c: one result from n pairs. The ratio is ours / limit: for times, less is
 * better; for rates, more. */
struct bench_result bench_summary(const char *name, const char *unit, double *ours, double *limit,
                                  int n);
double bench_median(double *values, int n);     /* sorts */

#endif
