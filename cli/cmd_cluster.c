/*
 * cmd_cluster.c - `flexkv cluster`: who is in a cluster, and what a Redis makes possible. `status` only
 * reads; `bench` plays a cluster of its own, under a name of its own. Called by main, one thread.
 */
#include <getopt.h>
#include <inttypes.h>
#include <jansson.h>
#include <stdio.h>
#include <unistd.h>

#include "base/clock.h"
#include "cluster_options.h"
#include "cmd.h"

#define MAX_PEERS 4096u

static void usage(FILE *out)
{
    fputs("usage: flexkv cluster status [OPTION...]     members: epochs, leases, blocks, addresses\n"
          "       flexkv cluster bench [OPTION...]      staleness and traffic through a Redis\n"
          "\n"
          "  --redis URL       [redis[s]://][USER:PASSWORD@]HOST[:PORT][/DB], or the path of a socket;\n"
          "                    default: the options redis_* of the configuration\n"
          "  --config FILE     configuration file\n"
          "  --set KEY=VALUE   any option, as cluster_name\n"
          "  --json            JSON\n"
          "  --timeout MS      status: how long to wait for Redis (5000)\n"
          "  --nodes N         bench: nodes, all in this process (3)\n"
          "  --rate N          bench: block changes a second over all nodes (10000)\n"
          "  --seconds N       bench: how long (10)\n"
          "\n"
          "status follows no changes and writes nothing. bench plays a cluster named bench-PID in the same\n"
          "Redis and takes its keys away again; it never touches other keys.\n"
          "Exit status: 0; 1 Redis can't be reached or used, 2 bad usage.\n", out);
}

struct status {
    struct fk_cluster *cluster;
    pthread_mutex_t lock;
    struct fk_cluster_peer *peers;
    uint32_t n;
};

static json_t *peer_to_json(const struct fk_cluster_peer *p)
{
    json_t *addresses = json_array();

    for (uint32_t i = 0; i < p->record->n_addresses; i++)
        json_array_append_new(addresses, json_string(p->record->address[i]));
    return json_pack("{s:s, s:I, s:f, s:I, s:I, s:I, s:I, s:I, s:f, s:s, s:i, s:o}", "name",
        p->record->name, "epoch", (json_int_t)p->epoch, "lease_s", (double)p->lease_us / 1e6, "seq",
        (json_int_t)p->record->seq, "cpu_blocks", (json_int_t)p->record->blocks[0], "ssd_blocks",
        (json_int_t)p->record->blocks[1], "cpu_slots", (json_int_t)p->record->slots[0], "ssd_slots",
        (json_int_t)p->record->slots[1], "load", p->record->load / 1000.0, "zone", p->record->zone,
        "spaces", (int)p->record->n_spaces, "addresses", addresses);
}

static void print_json(const struct status *s, const char *name)
{
    json_t *list = json_array();

    for (uint32_t i = 0; i < s->n; i++)
        json_array_append_new(list, peer_to_json(&s->peers[i]));
    json_t *root = json_pack("{s:s, s:o}", "cluster", name, "members", list);
    json_dumpf(root, stdout, JSON_INDENT(2));
    putchar('\n');
    json_decref(root);
}

static void print_table(const struct status *s, const char *name)
{
    printf("cluster %s: %u members\n", name, s->n);
    if (s->n)
        printf("%-24s %16s %8s %10s %12s %12s %5s  %s\n", "node", "epoch", "lease", "batches",
               "cpu blocks", "ssd blocks", "load", "addresses");
    for (uint32_t i = 0; i < s->n; i++) {
        const struct fk_cluster_peer *p = &s->peers[i];
        printf("%-24s %16" PRIu64 " %6.1f s %10" PRIu64 " %12" PRIu64 " %12" PRIu64 " %4u%%  ",
               p->record->name, p->epoch, (double)p->lease_us / 1e6, p->record->seq, p->record->blocks[0],
               p->record->blocks[1], p->record->load / 10);
        for (uint32_t a = 0; a < p->record->n_addresses; a++)
            printf("%s%s", a ? " " : "", p->record->address[a]);
        putchar('\n');
    }
}

/* All members' records are there: the second poll has been answered. */
static bool know_all(struct status *s)
{
    struct fk_cluster_stats stats;
    uint64_t now = fk_clock_us();

    pthread_mutex_lock(&s->lock);
    fk_cluster_get_stats(s->cluster, &stats);
    s->n = fk_cluster_peers(s->cluster, now, s->peers, MAX_PEERS);
    bool all = stats.polls >= 2;
    for (uint32_t i = 0; i < s->n; i++)
        all = all && s->peers[i].record->ttl_ms > 0;
    pthread_mutex_unlock(&s->lock);
    return all;
}

static int status(const struct fk_redis_params *params, const char *name, bool json, uint64_t timeout_us)
{
    struct fk_cluster_params cp = { .cluster = name, .name = "flexkv-status", .ttl_us = 1000000,
                                    .watch = true, .timeout_us = params->timeout_us };
    struct status s = { .lock = PTHREAD_MUTEX_INITIALIZER };
    struct fk_redis_params rp = *params;
    struct fk_redis *redis = NULL;
    char error[256] = "";
    uint64_t end = fk_clock_us() + timeout_us;

    s.peers = calloc(MAX_PEERS, sizeof(*s.peers));
    if (!s.peers || fk_cluster_create(&cp, fk_clock_us(), &s.cluster)) {
        free(s.peers);
        return 1;
    }
    rp.cluster = s.cluster;
    rp.lock = &s.lock;
    fk_log_set_level(FK_LOG_ERROR);     /* what matters is said below */
    int rc = fk_redis_start(&rp, &redis, error, sizeof(error));
    bool done = false;
    while (rc == 0 && !(done = know_all(&s)) && fk_clock_us() < end) {
        if (fk_redis_state(redis, error, sizeof(error)) && strstr(error, "redis_"))
            break;                      /* a setting is wrong: waiting does not help */
        usleep(5000);
    }
    if (done && json)
        print_json(&s, name);
    else if (done)
        print_table(&s, name);
    else
        fprintf(stderr, "flexkv cluster: Redis at %s port %u: %s\n", params->host, params->port,
                *error ? error : "no answer");
    fk_redis_stop(redis, 0);
    fk_cluster_destroy(s.cluster);
    free(s.peers);
    return done ? 0 : 1;
}

static bool number(const char *text, uint32_t min, uint32_t max, uint32_t *out)
{
    uint64_t n;

    if (!fk_number_read(text, strlen(text), &n) || n < min || n > max) {
        fprintf(stderr, "flexkv cluster: %s: a number from %u to %u is wanted\n", text, min, max);
        return false;
    }
    *out = (uint32_t)n;
    return true;
}

int cmd_cluster(int argc, char **argv)
{
    static const struct option options[] = {
        { "redis", required_argument, NULL, 'r' }, { "config", required_argument, NULL, 'c' },
        { "set", required_argument, NULL, 's' }, { "json", no_argument, NULL, 'j' },
        { "timeout", required_argument, NULL, 't' }, { "nodes", required_argument, NULL, 'n' },
        { "rate", required_argument, NULL, 'q' }, { "seconds", required_argument, NULL, 'd' },
        { "help", no_argument, NULL, 'h' }, { 0 },
    };
    struct cluster_options o = { 0 };
    uint32_t timeout_ms = 5000, nodes = 3, rate = 10000, seconds = 10;
    bool json = false, ok = true;
    int c;

    optind = 0;
    while (ok && (c = getopt_long(argc, argv, "h", options, NULL)) != -1) {
        switch (c) {
        case 'r': o.redis = optarg; break;
        case 'c': o.file = optarg; break;
        case 's': ok = o.n_sets < (int)fk_array_size(o.sets); if (ok) o.sets[o.n_sets++] = optarg; break;
        case 'j': json = true; break;
        case 't': ok = number(optarg, 1, 3600000, &timeout_ms); break;
        case 'n': ok = number(optarg, 2, 256, &nodes); break;
        case 'q': ok = number(optarg, 1, 1000000, &rate); break;
        case 'd': ok = number(optarg, 1, 86400, &seconds); break;
        case 'h': usage(stdout); return 0;
        default: ok = false;
        }
    }
    bool is_status = ok && optind + 1 == argc && strcmp(argv[optind], "status") == 0;
    bool is_bench = ok && optind + 1 == argc && strcmp(argv[optind], "bench") == 0;
    if (!is_status && !is_bench) {
        usage(stderr);
        return 2;
    }
    struct fk_config *config = NULL;
    struct fk_redis_params redis;
    int rc = cluster_options_load(&o, &config, &redis);
    if (rc == 0)
        rc = is_status ? status(&redis, config->settings.cluster_name, json, timeout_ms * UINT64_C(1000))
                       : cluster_bench(&redis, nodes, rate, seconds, json);
    if (config)
        fk_config_destroy(config);
    return rc;
}
