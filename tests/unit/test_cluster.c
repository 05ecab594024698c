/*
 * test_cluster.c - src/cluster without Redis: what is written is read back and nothing else, the remote index
 * against a plain array, its memory per block, and the state machine's manners with a Redis that talks nonsense.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>

#include <cmocka.h>

#include "base/log.h"
#include "cluster/cluster.h"

static struct fk_key key_of(uint64_t n)
{
    struct fk_key k;

    k.lo = fk_rng_next(&n);
    k.hi = fk_rng_next(&n);
    return k;
}

/* ---- format ---- */

static void a_batch_is_read_as_it_was_written(void **state)
{
    struct fk_change list[FK_BATCH_CHANGES], got;
    struct fk_batch_id id = { "n", 7, 9 };
    struct fk_batch_reader r;
    fk_bytes data = { 0 };
    uint64_t rng = 5;

    for (uint32_t i = 0; i < FK_BATCH_CHANGES; i++) {
        bool next = i > 0 && fk_rng_below(&rng, 2);
        list[i] = (struct fk_change){ .key = key_of(i), .tier = (uint8_t)fk_rng_below(&rng, 2),
                                      .space = (uint8_t)fk_rng_below(&rng, 64) };
        list[i].removed = fk_rng_below(&rng, 4) == 0;
        if (!list[i].removed) {
            list[i].slot = next ? list[i - 1].slot + 1 : (uint32_t)fk_rng_next(&rng);
            list[i].generation = next ? list[i - 1].generation : (uint32_t)fk_rng_next(&rng);
        }
    }
    assert_int_equal(fk_batch_write(&data, &id, list, FK_BATCH_CHANGES), 0);
    assert_int_equal(fk_batch_open(&r, &id, data.data, data.len), 0);
    for (uint32_t i = 0; i < FK_BATCH_CHANGES; i++) {
        assert_int_equal(fk_batch_next(&r, &got), 1);
        assert_true(fk_key_equal(got.key, list[i].key));
        assert_int_equal(got.removed, list[i].removed);
        assert_int_equal(got.tier, list[i].tier);
        assert_int_equal(got.space, list[i].space);
        if (!got.removed) {
            assert_int_equal(got.slot, list[i].slot);
            assert_int_equal(got.generation, list[i].generation);
        }
    }
    assert_int_equal(fk_batch_next(&r, &got), 0);
    fk_vec_free(&data);
}

static void a_batch_is_only_good_where_it_belongs(void **state)
{
    struct fk_change c = { .key = key_of(1), .slot = 2, .generation = 4 };
    struct fk_batch_id id = { "node", 7, 9 };
    const struct fk_batch_id others[] = { { "nodf", 7, 9 }, { "node", 8, 9 }, { "node", 7, 10 },
                                          { "node", 7, fk_piece_number(9, 0) } };
    struct fk_batch_reader r;
    fk_bytes data = { 0 };

    assert_int_equal(fk_batch_write(&data, &id, &c, 1), 0);
    for (size_t i = 0; i < fk_array_size(others); i++)
        assert_int_equal(fk_batch_open(&r, &others[i], data.data, data.len), -EBADMSG);
    for (size_t n = 0; n < data.len; n++)       /* cut short, and each bit turned */
        assert_int_equal(fk_batch_open(&r, &id, data.data, n), -EBADMSG);
    for (size_t bit = 0; bit < 8 * data.len; bit++) {
        data.data[bit / 8] = (char)(data.data[bit / 8] ^ 1 << bit % 8);
        int rc = fk_batch_open(&r, &id, data.data, data.len);
        assert_true(rc == -EBADMSG || rc == -EPROTO);
        assert_int_equal(rc == -EPROTO, bit / 8 == 1);
        data.data[bit / 8] = (char)(data.data[bit / 8] ^ 1 << bit % 8);
    }
    assert_int_equal(fk_batch_open(&r, &id, data.data, data.len), 0);
    fk_vec_free(&data);
}

static void neighbours_take_seventeen_bytes(void **state)
{
    struct fk_change list[100];
    struct fk_batch_id id = { "n", 1, 1 };
    fk_bytes data = { 0 };

    for (uint32_t i = 0; i < 100; i++)
        list[i] = (struct fk_change){ .key = key_of(i), .slot = 1000 + i, .generation = 6 };
    assert_int_equal(fk_batch_write(&data, &id, list, 100), 0);
    assert_int_equal(data.len, 16 + 100 * 17 + 3);
    fk_vec_free(&data);
}

static void a_record_is_read_as_it_was_written(void **state)
{
    struct fk_node_record rec = { .name = "a:1", .zone = "rack-2", .n_addresses = 2, .n_spaces = 2,
                                  .ttl_ms = 30000, .blocks = { 5, 6 }, .slots = { 7, 8 }, .load = 250,
                                  .seq = 99 }, got;
    fk_bytes data = { 0 };
    uint64_t epoch;

    strcpy(rec.address[0], "fabric=10.0.0.1:7");
    strcpy(rec.address[1], "mooncake=\"odd\"");
    memset(rec.space[1].fingerprint, 0xab, 16);
    rec.space[1].block_bytes = 1 << 20;
    assert_int_equal(fk_bytes_add(&data, "123\n", 4), 0);
    assert_int_equal(fk_node_record_write(&data, &rec), 0);
    assert_int_equal(fk_node_record_read(&got, &epoch, data.data, data.len), 0);
    assert_int_equal(epoch, 123);
    assert_memory_equal(&got, &rec, sizeof(rec));
    for (size_t n = 0; n < data.len; n++)
        assert_int_not_equal(fk_node_record_read(&got, &epoch, data.data, n), 0);
    fk_vec_free(&data);
}

static void bad_records_and_heads_are_refused(void **state)
{
    static const char *const records[] = {
        "", "\n{}", "0\n{}", "x\n{}", "1\n", "1\n{}", "1\n[]", "1\n{\"version\":1}",
        "1\n{\"version\":1,\"name\":\"a b\",\"ttl_ms\":1,\"addresses\":[],\"spaces\":[]}",
        "1\n{\"version\":1,\"name\":\"a\",\"ttl_ms\":-1,\"addresses\":[],\"spaces\":[]}",
        "1\n{\"version\":1,\"name\":\"a\",\"ttl_ms\":1,\"addresses\":[7],\"spaces\":[]}",
        "1\n{\"version\":1,\"name\":\"a\",\"ttl_ms\":1,\"addresses\":[],\"spaces\":[{}]}",
        "1\n{\"version\":1,\"name\":\"a\",\"ttl_ms\":1,\"addresses\":[\"\\u001b[2J\"],\"spaces\":[]}",
        "99999999999999999\n{\"version\":1,\"name\":\"a\",\"ttl_ms\":1,\"addresses\":[],\"spaces\":[]}",
    };
    static const char *const heads[] = { "", "1", "1 2 3 4", "1 2 3 4 5 6", "1 0 3 4 5", "1 2 x 4 5", "1 2 3 4 ",
                                         "1 2 3 9999999 5", " 1 2 3 4 5" };
    const char *newer = "1\n{\"version\":2}", *good = "1\n{\"version\":1,\"name\":\"a\",\"ttl_ms\":1,"
                                                      "\"addresses\":[],\"spaces\":[],\"more\":{}}";
    struct fk_node_record rec;
    struct fk_snapshot_head h;
    uint64_t epoch;

    for (size_t i = 0; i < fk_array_size(records); i++)
        assert_int_equal(fk_node_record_read(&rec, &epoch, records[i], strlen(records[i])), -EBADMSG);
    for (size_t i = 0; i < fk_array_size(heads); i++)
        assert_int_equal(fk_snapshot_head_read(&h, heads[i], strlen(heads[i])), -EBADMSG);
    assert_int_equal(fk_node_record_read(&rec, &epoch, newer, strlen(newer)), -EPROTO);
    assert_int_equal(fk_node_record_read(&rec, &epoch, good, strlen(good)), 0);
    assert_int_equal(fk_snapshot_head_read(&h, "2 2 3 4 5", 9), -EPROTO);
    assert_int_equal(fk_snapshot_head_read(&h, "1 2 3 4 5", 9), 0);
    assert_true(h.epoch == 2 && h.seq == 3 && h.pieces == 4 && h.blocks == 5);
}

/* ---- the remote index ---- */

enum { NODES = 6, KEYS = 500 };

struct model { bool used; uint32_t slot, generation; };

static void the_index_knows_what_an_array_knows(void **state)
{
    static struct model model[NODES][2][KEYS];
    struct fk_remote_params params = { .seed = 77 };
    uint8_t ours[FK_CLUSTER_SPACES] = { 0 };
    struct fk_remote *r;
    uint16_t node[NODES];
    uint64_t rng = 3;

    memset(model, 0, sizeof(model));
    assert_int_equal(fk_remote_create(&params, &r), 0);
    for (int i = 0; i < NODES; i++) {
        node[i] = fk_remote_node_add(r);
        fk_remote_node_spaces(r, node[i], ours);
        fk_remote_node_lease(r, node[i], 1000);
        fk_remote_node_cost(r, node[i], (uint32_t[]){ (uint32_t)(10 + i), (uint32_t)(50 + i) });
    }
    for (uint32_t step = 0; step < 60000; step++) {
        uint32_t i = fk_rng_below(&rng, NODES), t = fk_rng_below(&rng, 2), k = fk_rng_below(&rng, KEYS);
        struct model *m = &model[i][t][k];
        struct fk_change c = { .key = key_of(k), .tier = (uint8_t)t, .removed = fk_rng_below(&rng, 3) == 0,
                               .slot = step, .generation = step + 1 };
        assert_int_equal(fk_remote_apply(r, node[i], &c), 0);
        *m = (struct model){ !c.removed, c.slot, c.generation };
        if (step % 20000 == 19999) {        /* a node goes and comes back with nothing */
            fk_remote_node_drop(r, node[i]);
            node[i] = fk_remote_node_add(r);
            fk_remote_node_spaces(r, node[i], ours);
            fk_remote_node_lease(r, node[i], 1000);
            fk_remote_node_cost(r, node[i], (uint32_t[]){ 10 + i, 50 + i });
            memset(model[i], 0, sizeof(model[i]));
        }
        if (step % 1000 == 0)
            fk_remote_sweep(r, 500);
    }
    for (uint32_t k = 0; k < KEYS; k++) {
        struct fk_remote_hit hit;
        int best = -1;
        for (int i = 0; i < 2 * NODES && best < 0; i++)     /* cpu of all nodes first: cheaper */
            best = model[i % NODES][i / NODES][k].used ? i : -1;
        assert_int_equal(fk_remote_find(r, 0, key_of(k), FK_REMOTE_NO_NODE, 999, &hit), best >= 0);
        if (best >= 0) {
            const struct model *m = &model[best % NODES][best / NODES][k];
            assert_true(hit.node == node[best % NODES] && hit.tier == best / NODES);
            assert_true(hit.slot == m->slot && hit.generation == m->generation);
        }
        assert_false(fk_remote_find(r, 1, key_of(k), FK_REMOTE_NO_NODE, 999, &hit));
        assert_false(fk_remote_find(r, 0, key_of(k), FK_REMOTE_NO_NODE, 1000, &hit));   /* leases are over */
    }
    assert_null(fk_remote_check(r));
    for (int i = 0; i < NODES; i++)
        fk_remote_node_drop(r, node[i]);
    while (fk_remote_sweep(r, 100))
        ;
    struct fk_remote_stats s;
    fk_remote_get_stats(r, &s);
    assert_true(s.holders == 0 && s.dead == 0 && s.nodes == 0);
    assert_null(fk_remote_check(r));
    fk_remote_destroy(r);
}

static void a_million_blocks_take_little_memory(void **state)
{
    struct fk_remote_params params = { .seed = 1 };
    struct fk_remote_stats s;
    struct fk_remote *r;

    assert_int_equal(fk_remote_create(&params, &r), 0);
    uint16_t a = fk_remote_node_add(r), b = fk_remote_node_add(r);
    for (uint32_t i = 0; i < 1000000; i++) {
        struct fk_change c = { .key = key_of(i), .slot = i, .generation = 2 };
        assert_int_equal(fk_remote_apply(r, i % 2 ? a : b, &c), 0);
    }
    fk_remote_get_stats(r, &s);
    print_message("%.1f bytes per remote block\n", (double)s.bytes / 1e6);
    assert_int_equal(s.holders, 1000000);
    assert_true(s.bytes < 40 * 1000000);
    fk_remote_destroy(r);
}

static void a_limit_holds_and_a_crowd_is_not_remembered(void **state)
{
    struct fk_remote_params params = { .seed = 1, .max_holders = 100 };
    struct fk_remote_stats s;
    struct fk_remote *r;

    assert_int_equal(fk_remote_create(&params, &r), 0);
    for (uint32_t i = 0; i < 40; i++) {
        struct fk_change c = { .key = key_of(1), .slot = i };
        assert_int_equal(fk_remote_apply(r, fk_remote_node_add(r), &c), 0);
    }
    fk_remote_get_stats(r, &s);
    assert_int_equal(s.holders, FK_REMOTE_HOLDERS);
    assert_int_equal(s.crowded, 40 - FK_REMOTE_HOLDERS);
    int rc = 0;
    for (uint32_t i = 0; i < 200; i++) {
        struct fk_change c = { .key = key_of(2 + i), .slot = i };
        rc = fk_remote_apply(r, 0, &c);
    }
    fk_remote_get_stats(r, &s);
    assert_int_equal(rc, -ENOSPC);
    assert_int_equal(s.holders, 100);
    assert_int_equal(s.refused, 200 - (100 - FK_REMOTE_HOLDERS));
    assert_null(fk_remote_check(r));
    fk_remote_destroy(r);
}

static void here_and_there_make_one_prefix(void **state)
{
    struct fk_remote_params params = { .seed = 1 };
    uint8_t ours[FK_CLUSTER_SPACES] = { 0 };
    struct fk_remote_hit hits[64];
    struct fk_key keys[64];
    struct fk_remote *r;

    assert_int_equal(fk_remote_create(&params, &r), 0);
    uint16_t a = fk_remote_node_add(r), b = fk_remote_node_add(r);
    for (uint16_t n = a; n <= b; n++) {
        fk_remote_node_spaces(r, n, ours);
        fk_remote_node_lease(r, n, UINT64_MAX);
        fk_remote_node_cost(r, n, (uint32_t[]){ n == a ? 100u : 95u, 500 });
    }
    for (uint32_t i = 0; i < 64; i++) {
        struct fk_change c = { .key = keys[i] = key_of(i), .slot = i };
        if (i >= 10 && i < 40)
            fk_remote_apply(r, a, &c);
        if (i >= 30 && i < 60)
            fk_remote_apply(r, b, &c);
    }
    uint64_t local = 0x3ff | UINT64_C(1) << 60 | UINT64_C(1) << 61;   /* here: 0..9, 60, 61 */
    assert_int_equal(fk_remote_extend(r, 0, keys, 64, 0, &local, 0, hits), 62);
    assert_int_equal(hits[9].node, FK_REMOTE_NO_NODE);
    assert_int_equal(hits[10].node, a);
    assert_int_equal(hits[39].node, a);         /* b costs a little less; a run is not broken for that */
    assert_int_equal(hits[40].node, b);
    assert_int_equal(hits[61].node, FK_REMOTE_NO_NODE);
    assert_int_equal(fk_remote_extend(r, 0, keys, 64, 10, NULL, 0, hits), 60);
    assert_int_equal(fk_remote_extend(r, 0, keys, 64, 0, NULL, 0, hits), 0);
    fk_remote_node_cost(r, b, (uint32_t[]){ 20, 500 });
    assert_int_equal(fk_remote_extend(r, 0, keys, 35, 10, NULL, 0, hits), 35);
    assert_int_equal(hits[29].node, a);
    assert_int_equal(hits[30].node, b);         /* now it is worth it */
    fk_remote_destroy(r);
}

/* ---- the state machine ---- */

static void names_that_cannot_be_are_refused(void **state)
{
    static const char *const bad[] = { "", "a b", "a@b", "a{b", ("0123456789012345678901234567890123456789"
                                                                 "012345678901234567890123") };
    struct fk_cluster *c;

    fk_log_set_level(FK_LOG_OFF);
    for (size_t i = 0; i < fk_array_size(bad); i++) {
        struct fk_cluster_params p = { .cluster = "x", .name = bad[i], .ttl_us = 1000000 };
        assert_int_equal(fk_cluster_create(&p, 0, &c), -EINVAL);
        p = (struct fk_cluster_params){ .cluster = bad[i], .name = "x", .ttl_us = 1000000 };
        assert_int_equal(fk_cluster_create(&p, 0, &c), -EINVAL);
    }
}

static struct fk_reply nonsense(uint64_t *rng, int depth)
{
    static const char *const texts[] = { "", "1-1", "flexkv:{x}:delta:b", "flexkv:{x}:control", "b@5", "1700000000",
                                         "5\n{}", "w", "1 5 0 1 1", "ERR no", "b" };
    struct fk_reply r = { .type = (enum fk_reply_type)fk_rng_below(rng, 5) };
    uint32_t t = fk_rng_below(rng, fk_array_size(texts));

    r.integer = (int64_t)fk_rng_below(rng, 4);
    r.text = texts[t];
    r.bytes = strlen(texts[t]);
    if (r.type == FK_REPLY_ARRAY) {
        r.n = depth ? fk_rng_below(rng, 4) : 0;
        r.item = calloc(r.n + 1, sizeof(r));
        for (size_t i = 0; i < r.n; i++)
            r.item[i] = nonsense(rng, depth - 1);
    }
    return r;
}

static void free_reply(struct fk_reply *r)
{
    for (size_t i = 0; r->type == FK_REPLY_ARRAY && i < r->n; i++)
        free_reply(&r->item[i]);
    if (r->type == FK_REPLY_ARRAY)
        free(r->item);
}

static void a_redis_that_talks_nonsense_does_no_harm(void **state)
{
    uint64_t rng = 11, now = 1000;

    fk_log_set_level(FK_LOG_OFF);
    for (int round = 0; round < 300; round++) {
        struct fk_cluster_params p = { .cluster = "x", .name = "a", .ttl_us = 1000000, .seed = 1 };
        struct fk_change change = { .key = key_of(1) };
        struct fk_cluster *c;
        assert_int_equal(fk_cluster_create(&p, now, &c), 0);
        for (int k = 0; k < FK_CONNS; k++)
            fk_cluster_connected(c, (enum fk_conn)k, true, now);
        for (int step = 0; step < 100; step++, now += fk_rng_below(&rng, 200000)) {
            enum fk_conn conn = (enum fk_conn)fk_rng_below(&rng, 2);
            fk_cluster_tick(c, now);
            fk_cluster_change(c, &change, 1, now);
            if (fk_cluster_conn_bad(c, conn)) {
                fk_cluster_connected(c, conn, false, now);
                fk_cluster_connected(c, conn, true, now);
            }
            if (!fk_cluster_take(c, conn, now))
                continue;
            struct fk_reply r = nonsense(&rng, 5);
            while (!fk_cluster_reply(c, conn, &r, now))
                ;
            free_reply(&r);
        }
        assert_null(fk_remote_check(fk_cluster_remote(c)));
        fk_cluster_destroy(c);
    }
}

static void nobody_waits_for_a_redis_that_does_not_answer(void **state)
{
    struct fk_cluster_params p = { .cluster = "x", .name = "a", .ttl_us = 3000000, .timeout_us = 500000,
                                   .max_pending = 1000 };
    struct fk_change change = { .key = key_of(1) };
    struct fk_cluster_stats s;
    struct fk_cluster *c;

    assert_int_equal(fk_cluster_create(&p, 0, &c), 0);
    fk_cluster_connected(c, FK_CONN_COMMAND, true, 0);
    assert_non_null(fk_cluster_take(c, FK_CONN_COMMAND, 0));
    assert_true(fk_cluster_next_wakeup(c) <= 500000);
    fk_cluster_tick(c, 499999);
    assert_false(fk_cluster_conn_bad(c, FK_CONN_COMMAND));
    fk_cluster_tick(c, 500000);
    assert_true(fk_cluster_conn_bad(c, FK_CONN_COMMAND));
    fk_cluster_connected(c, FK_CONN_COMMAND, false, 500000);
    for (int i = 0; i < 5000; i++)
        fk_cluster_change(c, &change, 1, 500000);
    fk_cluster_get_stats(c, &s);
    assert_true(s.pending <= 1000);
    fk_cluster_leave(c, 500000);
    assert_true(fk_cluster_left(c));
    fk_cluster_destroy(c);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_batch_is_read_as_it_was_written),
        cmocka_unit_test(a_batch_is_only_good_where_it_belongs),
        cmocka_unit_test(neighbours_take_seventeen_bytes),
        cmocka_unit_test(a_record_is_read_as_it_was_written),
        cmocka_unit_test(bad_records_and_heads_are_refused),
        cmocka_unit_test(the_index_knows_what_an_array_knows),
        cmocka_unit_test(a_million_blocks_take_little_memory),
        cmocka_unit_test(a_limit_holds_and_a_crowd_is_not_remembered),
        cmocka_unit_test(here_and_there_make_one_prefix),
        cmocka_unit_test(names_that_cannot_be_are_refused),
        cmocka_unit_test(a_redis_that_talks_nonsense_does_no_harm),
        cmocka_unit_test(nobody_waits_for_a_redis_that_does_not_answer),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
