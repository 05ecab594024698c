/* bench.c - medians, ratios, spread. See bench.h. */
#include "bench.h"

#include <stdio.h>
#include <stdlib.h>

static int compare(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;

    return (x > y) - (x < y);
}

double bench_median(double *values, int n)
{
    qsort(values, (size_t)n, sizeof(*values), compare);
    return n % 2 ? values[n / 2] : (values[n / 2 - 1] + values[n / 2]) / 2;
}

struct bench_result bench_summary(const char *name, const char *unit, double *ours, double *limit,
                                  int n)
{
    struct bench_result r = { .unit = unit, .runs = n };
    double *ratio = calloc((size_t)n, sizeof(*ratio));

    snprintf(r.name, sizeof(r.name), "%s", name);
    for (int i = 0; ratio && i < n; i++)
        ratio[i] = limit ? ours[i] / limit[i] : ours[i];
    if (ratio) {
        double median = bench_median(ratio, n);
        r.ratio = limit ? median : 0;
        r.spread = median ? (ratio[n - 1 - n / 10] - ratio[n / 10]) / median : 0;
    }
    r.ours = bench_median(ours, n);
    r.limit = limit ? bench_median(limit, n) : 0;
    free(ratio);
    return r;
}
