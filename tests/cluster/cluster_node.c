/*
 * cluster_node.c - a node of a cluster without a cache behind it, for the tests with a real Redis: told by
 * lines on its standard input what it holds, and asked what it knows. One answer line to each:
 *
 *   add FIRST N        blocks FIRST.. FIRST+N-1 have come (again: in another slot's generation)
 *   remove FIRST N
 *   find FIRST N       how many of the chain FIRST.. are at peers, and the first one's holder
 *   wait FIRST N MS    the same, until all N are found or MS are over; answers how long it took
 *   peers              name:epoch:blocks:synced ...
 *   stats              counters
 *   epoch, redis, quit
 *
 * usage: cluster_node HOST PORT CLUSTER NAME TTL_MS STREAM_BATCHES [KEY=VALUE...]: user password db tls ca
 */
#include <inttypes.h>
#include <stdio.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/log.h"
#include "cluster/redis.h"

#define BLOCKS (1u << 20)

static struct fk_cluster *cluster;
static struct fk_redis *redis;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static uint32_t generation[BLOCKS];         /* 0: not here */
static uint32_t last_generation;
static uint8_t space;

static struct fk_key key_of(uint64_t n)
{
    struct fk_key k;

    k.lo = fk_rng_next(&n);
    k.hi = fk_rng_next(&n);
    return k;
}

static struct fk_change change_of(uint32_t n)
{
    return (struct fk_change){ .key = key_of(n), .slot = n, .generation = generation[n], .space = space,
                               .removed = !generation[n] };
}

static uint32_t scan(void *arg, uint64_t cursor, struct fk_change *out, uint32_t max, uint64_t *next,
                     bool *end)
{
    uint32_t n = 0;

    pthread_mutex_lock(&lock);
    for (; cursor < BLOCKS && n < max; cursor++)
        if (generation[cursor])
            out[n++] = change_of((uint32_t)cursor);
    pthread_mutex_unlock(&lock);
    *next = cursor;
    *end = cursor >= BLOCKS;
    return n;
}

static void change(uint32_t first, uint32_t n, bool removed)
{
    struct fk_change list[64];
    uint32_t k = 0;

    for (uint32_t i = 0; i < n && first + i < BLOCKS; i++) {
        pthread_mutex_lock(&lock);
        generation[first + i] = removed ? 0 : ++last_generation;
        list[k++] = change_of(first + i);
        if (k == 64 || i + 1 == n) {
            fk_cluster_change(cluster, list, k, fk_clock_us());
            k = 0;
        }
        pthread_mutex_unlock(&lock);
    }
    fk_redis_wake(redis);
    printf("ok\n");
}

static uint32_t find(uint32_t first, uint32_t n, char *holder, size_t size)
{
    fk_autofree struct fk_key *keys = calloc(n + 1, sizeof(*keys));
    fk_autofree struct fk_remote_hit *hits = calloc(n + 1, sizeof(*hits));
    struct fk_cluster_peer peer;

    for (uint32_t i = 0; i < n; i++)
        keys[i] = key_of(first + i);
    pthread_mutex_lock(&lock);
    uint64_t now = fk_clock_us();
    uint32_t found = fk_cluster_extend(cluster, space, keys, n, 0, NULL, now, hits);
    snprintf(holder, size, "-");
    if (found && fk_cluster_peer(cluster, hits[0].node, now, &peer))
        snprintf(holder, size, "%s:%" PRIu64, peer.record->name, peer.epoch);
    pthread_mutex_unlock(&lock);
    return found;
}

static void wait_for(uint32_t first, uint32_t n, uint32_t ms)
{
    uint64_t start = fk_clock_us(), end = start + ms * UINT64_C(1000);
    char holder[128];
    uint32_t found;

    while ((found = find(first, n, holder, sizeof(holder))) < n && fk_clock_us() < end)
        usleep(500);
    printf("%u %s %.3f\n", found, holder, (double)(fk_clock_us() - start) / 1000);
}

static void peers(void)
{
    struct fk_cluster_peer list[64];

    pthread_mutex_lock(&lock);
    uint64_t now = fk_clock_us();
    uint32_t n = fk_cluster_peers(cluster, now, list, 64);
    for (uint32_t i = 0; i < n; i++)
        if (list[i].lease_us > 0)
            printf("%s:%" PRIu64 ":%" PRIu64 ":%d ", list[i].record->name, list[i].epoch,
                   list[i].blocks[0] + list[i].blocks[1], list[i].synced);
    pthread_mutex_unlock(&lock);
    printf("\n");
}

static void stats(void)
{
    struct fk_cluster_stats s;

    pthread_mutex_lock(&lock);
    fk_cluster_get_stats(cluster, &s);
    pthread_mutex_unlock(&lock);
    printf("commands=%" PRIu64 " publish=%" PRIu64 " gaps=%" PRIu64 " snapshots_read=%" PRIu64
           " snapshots_written=%" PRIu64 " errors=%" PRIu64 " bad=%" PRIu64 " fenced=%" PRIu64
           " holders=%" PRIu64 " pending=%" PRIu64 " overflows=%" PRIu64 "\n", s.commands, s.publish_commands,
           s.gaps, s.snapshots_read, s.snapshots_written, s.errors, s.bad_batches, s.fenced, s.remote.holders,
           s.pending, s.overflows);
}

static bool obey(const char *line)
{
    uint32_t first = 0, n = 0, ms = 0;
    char what[16] = "", text[256];

    sscanf(line, "%15s %u %u %u", what, &first, &n, &ms);
    if (strcmp(what, "add") == 0 || strcmp(what, "remove") == 0)
        change(first, n, *what == 'r');
    else if (strcmp(what, "find") == 0)
        printf("%u %s\n", find(first, n, text, sizeof(text)), text);
    else if (strcmp(what, "wait") == 0)
        wait_for(first, n, ms);
    else if (strcmp(what, "peers") == 0)
        peers();
    else if (strcmp(what, "stats") == 0)
        stats();
    else if (strcmp(what, "epoch") == 0) {
        pthread_mutex_lock(&lock);
        printf("%" PRIu64 "\n", fk_cluster_epoch(cluster));
        pthread_mutex_unlock(&lock);
    } else if (strcmp(what, "redis") == 0)
        printf("%d %s\n", fk_redis_state(redis, text, sizeof(text)), text);
    else
        return false;
    fflush(stdout);
    return true;
}

int main(int argc, char **argv)
{
    uint8_t fingerprint[16] = { 't', 'e', 's', 't' };
    struct fk_redis_params rp = { .lock = &lock, .scan = scan, .timeout_us = 1000000, .user = "",
                                  .password = "", .tls_ca = "", .tls_cert = "", .tls_key = "" };
    char line[256], error[256];

    if (argc < 7)
        return 2;
    struct fk_cluster_params cp = {
        .cluster = argv[3], .name = argv[4], .ttl_us = strtoull(argv[5], NULL, 10) * 1000,
        .stream_batches = (uint32_t)strtoul(argv[6], NULL, 10), .timeout_us = 1000000,
        .seed = fk_clock_ns() ^ (uint64_t)getpid() << 32,
    };
    rp.host = argv[1];
    rp.port = (uint16_t)strtoul(argv[2], NULL, 10);
    for (int i = 7; i < argc; i++) {
        char *value = strchr(argv[i], '=');
        if (!value++)
            return 2;
        if (strncmp(argv[i], "user=", 5) == 0)
            rp.user = value;
        else if (strncmp(argv[i], "password=", 9) == 0)
            rp.password = value;
        else if (strncmp(argv[i], "db=", 3) == 0)
            rp.db = (uint32_t)strtoul(value, NULL, 10);
        else if (strncmp(argv[i], "ca=", 3) == 0)
            rp.tls_ca = value;
        else if (strncmp(argv[i], "tls=", 4) == 0)
            rp.tls = *value == '1';
        else
            return 2;
    }
    if (fk_cluster_create(&cp, fk_clock_us(), &cluster) ||
        fk_cluster_space(cluster, fingerprint, 4096, &space) ||
        fk_cluster_address(cluster, "test=nowhere"))
        return 1;
    rp.cluster = cluster;
    if (fk_redis_start(&rp, &redis, error, sizeof(error))) {
        fprintf(stderr, "%s\n", error);
        return 1;
    }
    while (fgets(line, sizeof(line), stdin) && obey(line))
        ;
    fk_redis_stop(redis, 1000000);
    fk_cluster_destroy(cluster);
    return 0;
}
