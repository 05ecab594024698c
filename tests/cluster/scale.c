/*
 * scale.c - one real node in a cluster of a thousand that are made up: it joins, reads all their snapshots,
 * follows their changes, looks blocks up. Measures its memory, its processor time, and its traffic with Redis; all
 * nodes being alike, Redis' is that times the number of nodes. Then what the index is good for: hit ratios with
 * an index as stale as that, in a model of caches. Numbers for docs/cluster.md; not a test.
 *
 * usage: csim_scale [NODES [BLOCKS_PER_NODE [CHANGES_PER_NODE_AND_S [SECONDS]]]]
 */
#include <inttypes.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>

#include "base/clock.h"
#include "base/log.h"
#include "cluster/cluster.h"

#define EPOCH UINT64_C(1700000000000)
#define FIRST_SEQ 4u

static uint32_t nodes = 1000, blocks = 100000, seconds = 10;
static double churn = 100;
static uint64_t now_us = 1000000;           /* simulated */
static uint64_t bytes_in, bytes_out, commands;

struct maker { uint64_t seq, made; double due; };
static struct maker *makers;

static struct fk_key key_of(uint32_t node, uint64_t n)
{
    uint64_t seed = (uint64_t)node << 40 ^ n;
    struct fk_key k;

    k.lo = fk_rng_next(&seed);
    k.hi = fk_rng_next(&seed);
    return k;
}

/* ---- answers ---- */

static void *need(void *p)
{
    if (!p)
        abort();
    return p;
}

static void text(struct fk_reply *r, const void *data, size_t n)
{
    *r = (struct fk_reply){ .type = FK_REPLY_STRING, .text = need(malloc(n + 1)), .bytes = n };
    memcpy((char *)r->text, data, n);
    bytes_in += n + 6;
}

static void print(struct fk_reply *r, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
static void print(struct fk_reply *r, const char *fmt, ...)
{
    char buf[512];
    va_list ap;

    va_start(ap, fmt);
    text(r, buf, (size_t)vsnprintf(buf, sizeof(buf), fmt, ap));
    va_end(ap);
}

static void array(struct fk_reply *r, size_t n)
{
    *r = (struct fk_reply){ .type = FK_REPLY_ARRAY, .item = need(calloc(n + 1, sizeof(*r))), .n = n };
    bytes_in += 5;
}

static void clear(struct fk_reply *r)
{
    for (size_t i = 0; i < r->n; i++)
        clear(&r->item[i]);
    free(r->item);
    free((void *)r->text);
}

static const char *word(const struct fk_command *cmd, size_t i, size_t *n)
{
    size_t start = i ? cmd->ends.data[i - 1] : 0;

    *n = cmd->ends.data[i] - start;
    return cmd->bytes.data + start;
}

static bool is(const struct fk_command *cmd, const char *what)
{
    size_t n;
    const char *w = word(cmd, 0, &n);

    return n == strlen(what) && memcmp(w, what, n) == 0;
}

/* The node's number in a key "...:node-0042..." */
static uint32_t node_of(const struct fk_command *cmd, size_t i)
{
    char buf[256];
    size_t n;
    const char *w = word(cmd, i, &n);

    snprintf(buf, sizeof(buf), "%.*s", (int)n, w);
    const char *at = strstr(buf, ":n-");
    return at ? (uint32_t)strtoul(at + 3, NULL, 10) : UINT32_MAX;
}

static void put_record(struct fk_reply *r, uint32_t node)
{
    struct fk_node_record rec = { .n_addresses = 1, .n_spaces = 1, .ttl_ms = 30000 };
    fk_bytes data = { 0 };
    char head[64];

    snprintf(rec.name, sizeof(rec.name), "n-%05u", node);
    snprintf(rec.address[0], sizeof(rec.address[0]), "fabric=10.0.%u.%u:7000", node / 256, node % 256);
    rec.space[0].fingerprint[0] = 1;
    rec.space[0].block_bytes = 1 << 20;
    fk_bytes_add(&data, head, (size_t)snprintf(head, sizeof(head), "%" PRIu64 "\n", EPOCH));
    fk_node_record_write(&data, &rec);
    text(r, data.data, data.len);
    fk_vec_free(&data);
}

static void put_piece(struct fk_reply *r, const struct fk_command *cmd)
{
    static struct fk_change list[FK_PIECE_CHANGES];
    uint32_t node = node_of(cmd, 1), n = 0;
    size_t len;
    const char *w = word(cmd, 1, &len), *colon = memrchr(w, ':', len);
    uint64_t piece = 0;
    char name[32];
    fk_bytes data = { 0 };

    fk_number_read(colon + 1, len - (size_t)(colon + 1 - w), &piece);
    snprintf(name, sizeof(name), "n-%05u", node);
    for (uint32_t i = (uint32_t)piece * FK_PIECE_CHANGES; i < blocks && n < FK_PIECE_CHANGES; i++)
        list[n++] = (struct fk_change){ .key = key_of(node, i), .slot = i, .generation = 2 };
    struct fk_batch_id id = { name, EPOCH, fk_piece_number(FIRST_SEQ, (uint32_t)piece) };
    fk_batch_write(&data, &id, list, n);
    text(r, data.data, data.len);
    fk_vec_free(&data);
}

/* What the node told since it was last read: batches as its flush interval makes them. */
static void put_stream(struct fk_reply *r, uint32_t node, uint64_t n)
{
    struct fk_change list[FK_BATCH_CHANGES];
    struct maker *m = &makers[node];
    double per_batch = fmax(1, churn * fmax(0.004, nodes * 0.0001));
    uint32_t batches = (uint32_t)fmin(16, ceil((double)n / per_batch)), done = 0;
    char name[32];

    array(r, 2);
    snprintf(name, sizeof(name), "n-%05u", node);
    print(&r->item[0], "flexkv:{scale}:delta:%s", name);
    array(&r->item[1], batches);
    for (uint32_t b = 0; b < batches; b++) {
        uint32_t count = (uint32_t)fk_min((n - done) / (batches - b), (uint64_t)FK_BATCH_CHANGES);
        fk_bytes data = { 0 };
        for (uint32_t i = 0; i < count; i++, m->made++)
            list[i] = (struct fk_change){ .key = key_of(node, m->made / 2 + (m->made % 2 ? blocks : 0)),
                .slot = (uint32_t)(m->made / 2 % blocks), .generation = 4, .removed = m->made % 2 == 0 };
        done += count;
        struct fk_batch_id id = { name, EPOCH, ++m->seq };
        fk_batch_write(&data, &id, list, count);
        struct fk_reply *e = &r->item[1].item[b];
        array(e, 2);
        print(&e->item[0], "%" PRIu64 "-%" PRIu64, EPOCH, m->seq);
        array(&e->item[1], 2);
        text(&e->item[1].item[0], "b", 1);
        text(&e->item[1].item[1], data.data, data.len);
        fk_vec_free(&data);
    }
}

static void put_streams(struct fk_reply *r, const struct fk_command *cmd, bool fill)
{
    size_t n = (cmd->ends.len - 6) / 2, got = 0;

    array(r, n);
    for (size_t i = 1; i < n; i++) {
        uint32_t node = node_of(cmd, 6 + i);
        struct maker *m = &makers[node];
        if (fill && m->seq == 0) {      /* a gap: its snapshot is to be read */
            m->seq = FIRST_SEQ;
            put_stream(&r->item[got++], node, 1);
            m->seq = FIRST_SEQ;
            m->made = 0;
        } else if (!fill && (uint64_t)m->due > 0) {
            put_stream(&r->item[got++], node, (uint64_t)m->due);
            m->due -= (double)(uint64_t)m->due;
        }
    }
    r->n = got;
    if (!got)
        r->type = FK_REPLY_NIL;
}

static void answer(struct fk_reply *r, const struct fk_command *cmd, bool fill)
{
    *r = (struct fk_reply){ .type = FK_REPLY_NIL };
    if (is(cmd, "TIME")) {
        array(r, 2);
        print(&r->item[0], "%" PRIu64, EPOCH / 1000 + now_us / 1000000);
        print(&r->item[1], "%" PRIu64, now_us % 1000000);
    } else if (is(cmd, "ZRANGE")) {
        array(r, 2 * (nodes - 1));
        for (uint32_t i = 0; i + 1 < nodes; i++) {
            print(&r->item[2 * i], "n-%05u@%" PRIu64, i, EPOCH);
            print(&r->item[2 * i + 1], "%" PRIu64, EPOCH + now_us / 1000 + 25000);
        }
    } else if (is(cmd, "MGET")) {
        array(r, cmd->ends.len - 1);
        for (size_t i = 1; i < cmd->ends.len; i++)
            put_record(&r->item[i - 1], node_of(cmd, i));
    } else if (is(cmd, "XREAD")) {
        put_streams(r, cmd, fill);
    } else if (is(cmd, "GET")) {
        size_t n;
        const char *w = word(cmd, 1, &n);
        if (memmem(w, n, ":piece:", 7))
            put_piece(r, cmd);
        else
            print(r, "1 %" PRIu64 " %u %u %u", EPOCH, FIRST_SEQ, (blocks + FK_PIECE_CHANGES - 1) / FK_PIECE_CHANGES,
                  blocks);
    } else if (is(cmd, "EVAL") && cmd->ends.len < 15) {
        *r = (struct fk_reply){ .type = FK_REPLY_INTEGER, .integer = 1 };
    } else if (is(cmd, "EVAL")) {
        array(r, 3);
        print(&r->item[0], "%" PRIu64, EPOCH + 1);
        r->item[1] = (struct fk_reply){ .type = FK_REPLY_INTEGER, .integer = 1 };
        print(&r->item[2], "%" PRIu64 "-1", EPOCH + 1);
    } else if (is(cmd, "XADD")) {
        print(r, "1-1");
    }
}

/* Processor time that the state machine takes, without what making the answers takes. */
static uint64_t busy_ns;

static void step(struct fk_cluster *c, bool fill)
{
    for (int k = 0; k < FK_CONNS; k++) {
        const struct fk_command *cmd;
        while ((cmd = fk_cluster_take(c, (enum fk_conn)k, now_us))) {
            struct fk_reply r;
            commands++;
            bytes_out += cmd->bytes.len + 6 * cmd->ends.len;
            answer(&r, cmd, fill);
            uint64_t start = fk_clock_process_cpu_ns();
            while (!fk_cluster_reply(c, (enum fk_conn)k, &r, now_us))
                ;
            busy_ns += fk_clock_process_cpu_ns() - start;
            clear(&r);
            if (k == FK_CONN_READER)
                break;                  /* one a millisecond at most */
        }
    }
    uint64_t start = fk_clock_process_cpu_ns();
    fk_cluster_tick(c, now_us);
    busy_ns += fk_clock_process_cpu_ns() - start;
}

static void join_all(struct fk_cluster *c)
{
    struct fk_cluster_stats s;

    do {
        step(c, true);
        now_us += 1000;
        fk_cluster_get_stats(c, &s);
    } while (s.snapshots_read < nodes - 1);
    printf("joined: %u nodes' snapshots, %" PRIu64 " blocks; %.1f MB read, %.1f s processor time\n", s.peers,
           s.remote.holders, (double)bytes_in / 1e6, (double)busy_ns / 1e9);
    printf("memory: %.0f MB, %.1f bytes a block\n", (double)s.remote.bytes / 1e6,
           (double)s.remote.bytes / (double)s.remote.holders);
}

static void follow(struct fk_cluster *c)
{
    struct fk_cluster_stats before, after;
    uint64_t end = now_us + seconds * UINT64_C(1000000), last = now_us;

    fk_cluster_get_stats(c, &before);
    bytes_in = bytes_out = commands = busy_ns = 0;
    while (now_us < end) {
        now_us += 1000;
        for (uint32_t i = 0; i + 1 < nodes; i++)
            makers[i].due += churn * (double)(now_us - last) / 1e6;
        last = now_us;
        step(c, false);
    }
    fk_cluster_get_stats(c, &after);
    double s = seconds, changes = (double)(after.changes_seen - before.changes_seen);
    printf("following: %.0f changes/s; %.2f MB/s in, %.2f MB/s out, %.1f commands/s; %.1f bytes and %.3f us "
           "processor time a change; %" PRIu64 " reads in %u s; %" PRIu64 " gaps\n", changes / s,
           (double)bytes_in / s / 1e6, (double)bytes_out / s / 1e6, (double)commands / s,
           (double)bytes_in / changes, (double)busy_ns / 1e3 / changes, after.reads - before.reads, seconds,
           after.gaps - before.gaps);
}

static void look(struct fk_cluster *c)
{
    static struct fk_key keys[512];
    static struct fk_remote_hit hits[512];
    uint64_t rng = 9, ns = 0, found = 0, rounds = 2000;

    for (uint64_t k = 0; k < rounds; k++) {
        uint32_t node = fk_rng_below(&rng, nodes - 1), first = blocks / 2 + fk_rng_below(&rng, blocks / 4);
        for (uint32_t i = 0; i < 512; i++)
            keys[i] = key_of(node, first + i);
        uint64_t start = fk_clock_process_cpu_ns();
        found += fk_cluster_extend(c, 0, keys, 512, 0, NULL, now_us, hits);
        ns += fk_clock_process_cpu_ns() - start;
    }
    printf("look-up: %.1f us for 512 blocks, %.0f found\n", (double)ns / 1e3 / (double)rounds,
           (double)found / (double)rounds);
}

/* ---- hit ratios ---- */

/*
 * Caches of `room` prefixes each, LRU; requests for prefixes of a Zipf distribution come to random nodes. A
 * node sees another's change `stale` requests later (of the whole cluster).
 */
static uint32_t zipf(uint64_t *rng, const double *cumulative, uint32_t n)
{
    double x = (double)(fk_rng_next(rng) >> 11) / (double)(UINT64_C(1) << 53) * cumulative[n - 1];
    uint32_t lo = 0, hi = n - 1;

    while (lo < hi) {
        uint32_t mid = (lo + hi) / 2;
        if (cumulative[mid] < x)
            lo = mid + 1;
        else
            hi = mid;
    }
    return lo;
}

static void hit_ratio(uint32_t n_nodes, uint32_t room, uint32_t prefixes, double skew, uint64_t stale)
{
    uint32_t n = n_nodes * room;
    uint64_t *used = need(calloc(n, 8)), *gone = need(calloc(prefixes, 8));
    uint32_t *what = need(malloc(n * 4ul)), *holders = need(calloc(prefixes, 4));
    uint64_t *since = need(calloc(prefixes, 8));
    double *cumulative = need(malloc(prefixes * sizeof(double))), sum = 0;
    uint64_t rng = 4, local = 0, peer = 0, late = 0, vain = 0, total = 0, steps = n * UINT64_C(6);

    memset(what, 0xff, n * 4ul);
    for (uint32_t i = 0; i < prefixes; i++)
        cumulative[i] = sum += pow(i + 1.0, -skew);
    for (uint64_t t = 1; t <= steps; t++) {
        uint32_t node = fk_rng_below(&rng, n_nodes), p = zipf(&rng, cumulative, prefixes);
        uint32_t *mine = what + (size_t)node * room, oldest = 0, at = room;
        uint64_t *when = used + (size_t)node * room;
        bool count = t > steps / 2;
        for (uint32_t i = 0; i < room; i++) {
            if (mine[i] == p)
                at = i;
            if (when[i] < when[oldest])
                oldest = i;
        }
        total += count;
        if (at < room) {
            local += count;
            when[at] = t;
            continue;
        }
        if (holders[p] && t - since[p] > stale)
            peer += count;              /* somebody has had it for long enough */
        else if (holders[p])
            late += count;
        else if (gone[p] && t - gone[p] <= stale)
            vain += count;              /* asked for in vain: nobody has it any more */
        if (mine[oldest] != UINT32_MAX && --holders[mine[oldest]] == 0)
            gone[mine[oldest]] = t;
        if (holders[p]++ == 0)
            since[p] = t;
        mine[oldest] = p;
        when[oldest] = t;
    }
    printf("hit ratio: %u nodes of %u, %u prefixes, Zipf %.1f, staleness %" PRIu64 " requests: local %.3f, with peers %.3f; "
           "missed for staleness %.4f, read in vain %.4f\n", n_nodes, room, prefixes, skew, stale,
           (double)local / (double)total, (double)(local + peer) / (double)total, (double)late / (double)total,
           (double)vain / (double)total);
    free(used);
    free(gone);
    free(what);
    free(holders);
    free(since);
    free(cumulative);
}

int main(int argc, char **argv)
{
    struct fk_cluster_params p = { .cluster = "scale", .name = "me", .ttl_us = 30000000 };
    uint8_t fingerprint[16] = { 1 }, space;
    struct fk_cluster *c;

    nodes = argc > 1 ? (uint32_t)strtoul(argv[1], NULL, 10) : nodes;
    blocks = argc > 2 ? (uint32_t)strtoul(argv[2], NULL, 10) : blocks;
    churn = argc > 3 ? strtod(argv[3], NULL) : churn;
    seconds = argc > 4 ? (uint32_t)strtoul(argv[4], NULL, 10) : seconds;
    makers = need(calloc(nodes, sizeof(*makers)));
    fk_log_set_level(FK_LOG_WARNING);
    if (fk_cluster_create(&p, now_us, &c) || fk_cluster_space(c, fingerprint, 1 << 20, &space))
        return 1;
    for (int k = 0; k < FK_CONNS; k++)
        fk_cluster_connected(c, (enum fk_conn)k, true, now_us);
    join_all(c);
    follow(c);
    look(c);
    fk_cluster_destroy(c);
    free(makers);
    for (int i = 0; i < 3; i++)
        hit_ratio(fk_min(nodes, 1000u), 64, 200000, 0.9, (uint64_t[]){ 0, 1000, 10000 }[i]);
    return 0;
}
