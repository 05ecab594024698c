/*
 * cluster_bench.c - `flexkv cluster bench`: nodes of one process, each with its own connections, put and
 * remove blocks at a given rate and look for each other's. Measures how long a put takes until a peer's look-up
 * sees it, and what it costs in Redis. Its own cluster, whose keys it takes away.
 */
#include <inttypes.h>
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <unistd.h>

#include "base/clock.h"
#include "cluster_options.h"

#define MAX_NODES 256u
#define PROBES 65536u
#define HELD 4096u                      /* blocks of a node; then each put removes an older one */
#define CHAIN 16u                       /* blocks a put */
#define PROBE_PATIENCE_US 5000000u

struct bench_node {
    struct fk_cluster *cluster;
    struct fk_redis *redis;
    pthread_mutex_t lock;
    uint8_t space;
    uint64_t next;                      /* blocks ever put */
    uint32_t id;
};

struct probe { struct fk_key key; uint64_t put_us; uint32_t from, to; };

struct bench {
    struct bench_node node[MAX_NODES];
    uint32_t n, rate;
    struct probe waiting[256];
    uint32_t n_waiting, n_seen, missed;
    double *seen_ms;
    uint64_t rng;
};

static struct fk_key block_key(uint32_t node, uint64_t n)
{
    uint64_t seed = (uint64_t)node << 48 ^ n;
    struct fk_key key;

    key.lo = fk_rng_next(&seed);
    key.hi = fk_rng_next(&seed);
    return key;
}

static struct fk_change block_change(const struct bench_node *node, uint64_t n)
{
    return (struct fk_change){ .key = block_key(node->id, n), .slot = (uint32_t)(n % HELD),
                               .generation = (uint32_t)(n / HELD * 2), .space = node->space };
}

static uint32_t scan(void *arg, uint64_t cursor, struct fk_change *out, uint32_t max, uint64_t *next,
                     bool *end)
{
    struct bench_node *node = arg;
    uint32_t n = 0;

    pthread_mutex_lock(&node->lock);
    uint64_t first = node->next > HELD ? node->next - HELD : 0;
    for (cursor = cursor > first ? cursor : first; cursor < node->next && n < max; cursor++)
        out[n++] = block_change(node, cursor);
    *next = cursor;
    *end = cursor >= node->next;
    pthread_mutex_unlock(&node->lock);
    return n;
}

static int start_node(struct bench *b, const struct fk_redis_params *params, const char *cluster,
                      uint32_t i)
{
    struct bench_node *node = &b->node[i];
    struct fk_redis_params rp = *params;
    char name[32], error[256];
    uint8_t fingerprint[16] = { 'b', 'e', 'n', 'c', 'h' };

    snprintf(name, sizeof(name), "bench-%u", i);
    struct fk_cluster_params cp = { .cluster = cluster, .name = name, .ttl_us = 10000000, .transient = true,
                                    .timeout_us = params->timeout_us, .seed = fk_rng_next(&b->rng) };
    node->id = i;
    pthread_mutex_init(&node->lock, NULL);
    int rc = fk_cluster_create(&cp, fk_clock_us(), &node->cluster);
    if (rc)
        return rc;
    fk_cluster_space(node->cluster, fingerprint, 1 << 20, &node->space);
    rp.cluster = node->cluster;
    rp.lock = &node->lock;
    rp.scan = scan;
    rp.arg = node;
    rc = fk_redis_start(&rp, &node->redis, error, sizeof(error));
    if (rc)
        fprintf(stderr, "flexkv cluster bench: %s\n", *error ? error : strerror(-rc));
    return rc;
}

static bool all_joined(struct bench *b)
{
    bool all = true;

    for (uint32_t i = 0; i < b->n; i++) {
        struct fk_cluster_stats s;
        pthread_mutex_lock(&b->node[i].lock);
        fk_cluster_get_stats(b->node[i].cluster, &s);
        pthread_mutex_unlock(&b->node[i].lock);
        all = all && s.peers_synced == b->n - 1;
    }
    return all;
}

static void put(struct bench *b, uint32_t from)
{
    struct bench_node *node = &b->node[from];
    struct fk_change list[2 * CHAIN];
    uint32_t n = 0;
    uint64_t now;

    pthread_mutex_lock(&node->lock);
    for (uint32_t i = 0; i < CHAIN / 2; i++, node->next++) {
        if (node->next >= HELD) {
            list[n] = block_change(node, node->next - HELD);
            list[n++].removed = true;
        }
        list[n++] = block_change(node, node->next);
    }
    now = fk_clock_us();
    fk_cluster_change(node->cluster, list, n, now);
    pthread_mutex_unlock(&node->lock);
    fk_redis_wake(node->redis);
    if (b->n_waiting < fk_array_size(b->waiting)) {
        uint32_t to = (from + 1 + fk_rng_below(&b->rng, b->n - 1)) % b->n;
        b->waiting[b->n_waiting++] = (struct probe){ list[n - 1].key, now, from, to };
    }
}

static void look(struct bench *b)
{
    for (uint32_t i = 0; i < b->n_waiting;) {
        struct probe *p = &b->waiting[i];
        struct bench_node *node = &b->node[p->to];
        struct fk_remote_hit hit;
        pthread_mutex_lock(&node->lock);
        uint64_t now = fk_clock_us();
        bool seen = fk_cluster_extend(node->cluster, node->space, &p->key, 1, 0, NULL, now, &hit) == 1;
        pthread_mutex_unlock(&node->lock);
        if (!seen && now < p->put_us + PROBE_PATIENCE_US) {
            i++;
            continue;
        }
        if (!seen)
            b->missed++;
        else if (b->n_seen < PROBES)
            b->seen_ms[b->n_seen++] = (double)(now - p->put_us) / 1000;
        *p = b->waiting[--b->n_waiting];
    }
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;

    return (x > y) - (x < y);
}

static double share(const struct bench *b, double p)
{
    return b->n_seen ? b->seen_ms[(uint32_t)fmin(b->n_seen - 1, b->n_seen * p)] : 0;
}

static void sum_stats(struct bench *b, struct fk_cluster_stats *sum)
{
    memset(sum, 0, sizeof(*sum));
    for (uint32_t i = 0; i < b->n; i++) {
        struct fk_cluster_stats s;
        pthread_mutex_lock(&b->node[i].lock);
        fk_cluster_get_stats(b->node[i].cluster, &s);
        pthread_mutex_unlock(&b->node[i].lock);
        sum->changes += s.changes;
        sum->changes_seen += s.changes_seen;
        sum->batches += s.batches;
        sum->batch_bytes += s.batch_bytes;
        sum->commands += s.commands;
        sum->command_bytes += s.command_bytes;
        sum->publish_commands += s.publish_commands;
        sum->reads += s.reads;
        sum->gaps += s.gaps;
        sum->overflows += s.overflows;
        sum->remote.holders += s.remote.holders;
        sum->remote.bytes += s.remote.bytes;
    }
}

static void report(struct bench *b, const struct fk_cluster_stats *before, double seconds, bool json)
{
    struct fk_cluster_stats s;

    sum_stats(b, &s);
    qsort(b->seen_ms, b->n_seen, sizeof(double), by_value);
    double changes = fmax(1, (double)(s.changes - before->changes));
    const struct { const char *name; double value; const char *unit; } rows[] = {
        { "changes_per_s", changes / seconds, "over all nodes" },
        { "staleness_p50_ms", share(b, .5), "put until a peer's look-up sees it" },
        { "staleness_p99_ms", share(b, .99), "" },
        { "staleness_max_ms", share(b, 1), "" },
        { "probes", b->n_seen, "" },
        { "never_seen", b->missed, "" },
        { "changes_per_batch", changes / fmax(1, (double)(s.batches - before->batches)), "" },
        { "publish_commands_per_change", (double)(s.publish_commands - before->publish_commands) / changes, "" },
        { "commands_per_change", (double)(s.commands - before->commands) / changes,
          "all: publishing, reading, heartbeats" },
        { "bytes_per_change", (double)(s.batch_bytes - before->batch_bytes) / changes, "in streams" },
        { "command_bytes_per_change", (double)(s.command_bytes - before->command_bytes) / changes,
          "all words of all commands" },
        { "gaps", (double)(s.gaps - before->gaps), "" },
        { "overflows", (double)(s.overflows - before->overflows), "" },
    };
    json_t *root = json ? json_object() : NULL;
    for (size_t i = 0; i < fk_array_size(rows); i++) {
        if (json)
            json_object_set_new(root, rows[i].name, json_real(rows[i].value));
        else
            printf("%-30s %12.3f  %s\n", rows[i].name, rows[i].value, rows[i].unit);
    }
    if (json) {
        json_dumpf(root, stdout, JSON_INDENT(2));
        putchar('\n');
        json_decref(root);
    }
}

static void play(struct bench *b, double seconds)
{
    uint64_t start = fk_clock_us(), end = start + (uint64_t)(seconds * 1e6), done = 0;

    for (uint64_t now = start; now < end; now = fk_clock_us()) {
        uint64_t due = (uint64_t)((double)(now - start) * b->rate / 1e6);
        for (; done < due; done += CHAIN)
            put(b, (uint32_t)(done / CHAIN % b->n));
        look(b);
        usleep(500);
    }
    for (uint64_t until = fk_clock_us() + PROBE_PATIENCE_US; b->n_waiting && fk_clock_us() < until;) {
        look(b);
        usleep(500);
    }
}

static int run(struct bench *b, const struct fk_redis_params *redis, uint32_t seconds, bool json)
{
    struct fk_cluster_stats before;
    char cluster[32], error[256];
    int rc = 0;

    snprintf(cluster, sizeof(cluster), "bench-%d", (int)getpid());
    for (uint32_t i = 0; i < b->n && !rc; i++)
        rc = start_node(b, redis, cluster, i);
    uint64_t until = fk_clock_us() + 10000000;
    while (!rc && !all_joined(b)) {
        if (fk_clock_us() > until) {
            fk_redis_state(b->node[0].redis, error, sizeof(error));
            fprintf(stderr, "flexkv cluster bench: the nodes have not found each other within 10 s: %s\n",
                    error);
            return 1;
        }
        usleep(2000);
    }
    if (rc)
        return 1;
    for (uint32_t i = 0; i < b->n * HELD / CHAIN * 2; i++) {    /* full, so that each put removes as much */
        put(b, i % b->n);
        usleep(200);
    }
    play(b, 0.5);
    b->n_seen = b->missed = 0;
    sum_stats(b, &before);
    play(b, seconds);
    report(b, &before, seconds, json);
    return b->missed ? 1 : 0;
}

int cluster_bench(const struct fk_redis_params *redis, uint32_t nodes, uint32_t rate, uint32_t seconds,
                  bool json)
{
    struct bench *b = calloc(1, sizeof(*b));
    int rc = 1;

    if (!b)
        return 1;
    b->n = nodes;
    b->rate = rate;
    b->rng = fk_clock_ns();
    b->seen_ms = calloc(PROBES, sizeof(double));
    fk_log_set_level(FK_LOG_WARNING);
    if (b->seen_ms)
        rc = run(b, redis, seconds, json);
    for (uint32_t i = 0; i < nodes; i++) {
        fk_redis_stop(b->node[i].redis, 1000000);
        fk_cluster_destroy(b->node[i].cluster);
    }
    free(b->seen_ms);
    free(b);
    return rc;
}
