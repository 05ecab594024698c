/*
 * fuzz_cluster.c - libFuzzer target: what other nodes wrote into Redis, and what Redis answers. Nothing may
 * crash; a batch that is accepted is in range, ends where it says, and comes out the same when written again.
 *
 * Input: byte 0 chooses: 0 a batch as it is, 1 the body of a batch that is sealed here, 2 a snapshot's head,
 * 3 a node's record, 4 a state machine that gets answers made of the rest.
 */
#include <stdio.h>

#include "base/checksum.h"
#include "base/log.h"
#include "cluster/cluster.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static const struct fk_batch_id batch_id = { "n", 5, 1 };

static void read_batch(const void *data, size_t size)
{
    struct fk_change list[FK_BATCH_CHANGES];
    struct fk_batch_reader r;
    struct fk_change c;
    uint32_t n = 0;
    int rc;

    if (fk_batch_open(&r, &batch_id, data, size) != 0)
        return;
    while ((rc = fk_batch_next(&r, &c)) == 1) {
        if (c.tier > 1 || c.space >= FK_CLUSTER_SPACES)
            abort();
        if (n < FK_BATCH_CHANGES)
            list[n++] = c;
    }
    if (rc != 0)
        return;
    fk_bytes again = { 0 };
    if (fk_batch_write(&again, &batch_id, list, n) || fk_batch_open(&r, &batch_id, again.data, again.len))
        abort();
    for (uint32_t i = 0; i < n; i++)
        if (fk_batch_next(&r, &c) != 1 || !fk_key_equal(c.key, list[i].key) || c.slot != list[i].slot ||
            c.generation != list[i].generation || c.removed != list[i].removed)
            abort();
    fk_vec_free(&again);
}

/* As docs/cluster.md says: so what it says is checked too. */
static void read_sealed(const uint8_t *data, size_t size)
{
    uint8_t place[16] = { 5, [8] = 1 }, *batch = malloc(16 + size);
    uint32_t body = (uint32_t)size;

    if (!batch || size < 2)
        abort();
    batch[0] = 0xfb;
    batch[1] = 1;
    memcpy(batch + 2, data, 2);
    body -= 2;
    memcpy(batch + 4, &body, 4);
    memcpy(batch + 16, data + 2, body);
    uint64_t crc = fk_checksum(0, "n", 1);
    crc = fk_checksum(crc, place, 16);
    crc = fk_checksum(crc, batch, 8);
    crc = fk_checksum(crc, batch + 16, body);
    memcpy(batch + 8, &crc, 8);
    struct fk_batch_reader r;
    if (fk_batch_open(&r, &batch_id, batch, 16 + body) != 0)
        abort();
    read_batch(batch, 16 + body);
    free(batch);
}

static void read_record(const char *data, size_t size)
{
    struct fk_node_record rec, again;
    fk_bytes text = { 0 };
    uint64_t epoch;
    char head[32];

    if (fk_node_record_read(&rec, &epoch, data, size) != 0)
        return;
    if (!fk_cluster_name_valid(rec.name) || epoch == 0)
        abort();
    fk_bytes_add(&text, head, (size_t)snprintf(head, sizeof(head), "%llu\n", (unsigned long long)epoch));
    if (fk_node_record_write(&text, &rec) == 0 &&
        (fk_node_record_read(&again, &epoch, text.data, text.len) != 0 || memcmp(&rec, &again, sizeof(rec))))
        abort();
    fk_vec_free(&text);
}

/* ---- answers ---- */

struct input { const uint8_t *at, *end; };

static uint8_t take(struct input *in)
{
    return in->at < in->end ? *in->at++ : 0;
}

static struct fk_reply answer(struct input *in, int depth)
{
    uint8_t what = take(in);
    struct fk_reply r = { .type = (enum fk_reply_type)(what % 5), .integer = what >> 4 };

    if (r.type == FK_REPLY_STRING || r.type == FK_REPLY_ERROR) {
        r.bytes = fk_min((size_t)take(in), (size_t)(in->end - in->at));
        r.text = (const char *)in->at;
        in->at += r.bytes;
    } else if (r.type == FK_REPLY_ARRAY) {
        r.n = depth ? what >> 4 : 0;
        r.item = calloc(r.n + 1, sizeof(r));
        for (size_t i = 0; i < r.n; i++)
            r.item[i] = answer(in, depth - 1);
    }
    return r;
}

static void free_answer(struct fk_reply *r)
{
    for (size_t i = 0; i < r->n; i++)
        free_answer(&r->item[i]);
    free(r->item);
}

static void converse(const uint8_t *data, size_t size)
{
    struct fk_cluster_params p = { .cluster = "x", .name = "a", .ttl_us = 1000000 };
    struct fk_change change = { .key = { 1, 2 } };
    struct input in = { data, data + size };
    struct fk_cluster *c;
    uint64_t now = 1000;

    if (fk_cluster_create(&p, now, &c))
        abort();
    for (int k = 0; k < FK_CONNS; k++)
        fk_cluster_connected(c, (enum fk_conn)k, true, now);
    while (in.at < in.end) {
        enum fk_conn conn = (enum fk_conn)(take(&in) & 1);
        now += take(&in) * UINT64_C(5000);
        fk_cluster_change(c, &change, 1, now);
        fk_cluster_tick(c, now);
        if (fk_cluster_conn_bad(c, conn)) {
            fk_cluster_connected(c, conn, false, now);
            fk_cluster_connected(c, conn, true, now);
        }
        while (fk_cluster_take(c, conn, now))
            ;
        struct fk_reply r = answer(&in, 5);
        while (!fk_cluster_reply(c, conn, &r, now))
            ;
        free_answer(&r);
    }
    if (fk_remote_check(fk_cluster_remote(c)))
        abort();
    fk_cluster_destroy(c);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct fk_snapshot_head h;

    if (size < 3)
        return 0;
    fk_log_set_level(FK_LOG_OFF);
    switch (data[0]) {
    case 0: read_batch(data + 1, size - 1); break;
    case 1: read_sealed(data + 1, size - 1); break;
    case 2: fk_snapshot_head_read(&h, (const char *)data + 1, size - 1); break;
    case 3: read_record((const char *)data + 1, size - 1); break;
    case 4: converse(data + 1, size - 1); break;
    }
    return 0;
}
