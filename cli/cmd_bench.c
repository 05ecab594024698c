/* cmd_bench.c - `flexkv bench`: runs the benchmarks of bench/, prints a table or JSON. */
#include <getopt.h>
#include <jansson.h>
#include <stdio.h>
#include <string.h>

#include "base/util.h"
#include "bench.h"
#include "cmd.h"

#define MAX_RESULTS 32

static const char *ssd_dir = ".";

static int run_ssd(struct bench_result *out, int max)
{
    return bench_ssd(ssd_dir, out, max);
}

static int run_recover(struct bench_result *out, int max)
{
    return bench_recover(ssd_dir, out, max);
}

/* What they cost the node, and how fast they leave it. */
static int run_events(struct bench_result *out, int max)
{
    int n = bench_events(out, max);
    int more = n < 0 ? n : bench_publish(out + n, max - n);

    return more < 0 ? more : n + more;
}

static const struct {
    const char *name;
    int (*run)(struct bench_result *out, int max);
    const char *help;
} groups[] = {
    { "index", bench_index, "match and put of 512 blocks at an index of a million" },
    { "events", run_events, "what KV events add to a put; publishing them, against bare ZeroMQ" },
    { "hash", bench_hash, "deriving keys, and the checksum" },
    { "copy", bench_copy, "engine pages <-> cpu slots in host memory" },
    { "gpu", bench_gpu, "engine pages in GPU memory <-> cpu slots; needs a GPU" },
    { "ssd", run_ssd, "the SSD tier against a bare io_uring loop on the same files" },
    { "recover", run_recover, "a store of a million slots after a restart" },
#ifdef FK_HAVE_FABRIC
    { "transport", bench_transport, "reads from a peer over loopback TCP, against the bare library and socket" },
#endif
};

static void usage(FILE *out)
{
    fprintf(out, "usage: flexkv bench [--json] [--ssd-dir DIR] GROUP...\n\ngroups:\n");
    for (size_t i = 0; i < fk_array_size(groups); i++)
        fprintf(out, "  %-9s  %s\n", groups[i].name, groups[i].help);
    fprintf(out, "  all        all of them\n\n"
            "Ours and the limit are measured in alternation; the ratio is the median of the\n"
            "pairs' ratios, spread is (9th decile - 1st) / median of them. us, ns: less is better;\n"
            "GB/s, M blk/s: more. --ssd-dir names where the files are put (default: here; 4 GiB).\n");
}

static void print_row(const struct bench_result *r)
{
    if (r->ratio > 0)
        printf("%-22s %10.2f %10.2f %8.3f  %-9s %5d %8.2f\n", r->name, r->ours, r->limit, r->ratio,
               r->unit, r->runs, r->spread);
    else
        printf("%-22s %10.2f %10s %8s  %-9s %5d %8.2f\n", r->name, r->ours, "-", "-", r->unit,
               r->runs, r->spread);
}

static json_t *to_json(const struct bench_result *r)
{
    return json_pack("{s:s, s:f, s:f, s:f, s:s, s:i, s:f}", "name", r->name, "ours", r->ours, "limit",
                     r->limit, "ratio", r->ratio, "unit", r->unit, "runs", r->runs, "spread",
                     r->spread);
}

static int run_group(size_t g, json_t *list)
{
    struct bench_result results[MAX_RESULTS];
    int n = groups[g].run(results, MAX_RESULTS);

    if (n < 0) {
        fprintf(stderr, "flexkv bench %s: %s\n", groups[g].name, strerror(-n));
        return 1;
    }
    for (int i = 0; i < n; i++) {
        if (list)
            json_array_append_new(list, to_json(&results[i]));
        else
            print_row(&results[i]);
    }
    fflush(stdout);
    return 0;
}

static int find_group(const char *name)
{
    for (size_t g = 0; g < fk_array_size(groups); g++)
        if (strcmp(groups[g].name, name) == 0)
            return (int)g;
    return strcmp(name, "all") == 0 ? (int)fk_array_size(groups) : -1;
}

int cmd_bench(int argc, char **argv)
{
    static const struct option options[] = {
        { "json", no_argument, NULL, 'j' }, { "ssd-dir", required_argument, NULL, 'd' },
        { "help", no_argument, NULL, 'h' }, { 0 },
    };
    bool json = false;
    int c, rc = 0;

    while ((c = getopt_long(argc, argv, "h", options, NULL)) != -1) {
        switch (c) {
        case 'j': json = true; break;
        case 'd': ssd_dir = optarg; break;
        case 'h': usage(stdout); return 0;
        default: usage(stderr); return 2;
        }
    }
    for (int i = optind; i < argc; i++) {
        if (find_group(argv[i]) < 0) {
            fprintf(stderr, "flexkv bench: unknown group \"%s\"\n", argv[i]);
            optind = argc;
        }
    }
    if (optind >= argc) {
        usage(stderr);
        return 2;
    }
    json_t *list = json ? json_array() : NULL;
    if (!json)
        printf("%-22s %10s %10s %8s  %-9s %5s %8s\n", "name", "ours", "limit", "ratio", "unit",
               "runs", "spread");
    for (int i = optind; i < argc; i++) {
        int g = find_group(argv[i]);
        for (size_t k = 0; k < fk_array_size(groups); k++)
            if ((size_t)g == k || g == (int)fk_array_size(groups))
                rc |= run_group(k, list);
    }
    if (list) {
        json_dumpf(list, stdout, JSON_INDENT(2));
        putchar('\n');
        json_decref(list);
    }
    return rc;
}
