/* test_events_check.c - src/events/check.c: each rule is broken once, and a clean stream breaks none;
 * src/events/mirror.c under many blocks. */
#include "wire_rig.h"

#include <stdio.h>

#include "events/check.h"

static struct fk_check check;
static struct fk_stream_batch decoded;
static uint64_t next_seq;

static int setup(void **state)
{
    fk_check_init(&check, NULL, NULL);
    next_seq = 0;
    return 0;
}

static int teardown(void **state)
{
    fk_check_free(&check);
    fk_stream_batch_free(&decoded);
    decoded = (struct fk_stream_batch){ 0 };
    return 0;
}

static int feed_as(struct wire *w, uint64_t seq)
{
    unsigned char number[8];

    fk_put_be64(number, seq);
    struct fk_frame f[3] = { { "", 0 }, { number, 8 }, { w->buf.data, w->buf.size } };
    int rc = fk_check_message(&check, f, 3, &decoded);
    msgpack_sbuffer_destroy(&w->buf);
    return rc;
}

static int feed(struct wire *w)
{
    wire_end(w);
    return feed_as(w, next_seq++);
}

static void store(const uint64_t *hash, size_t n, uint64_t parent, const char *medium)
{
    struct wire w;

    wire_begin(&w, 1);
    wire_stored(&w, hash, n, parent, 4, medium, 0);
    assert_int_equal(feed(&w), 0);
}

static void take_away(uint64_t hash, const char *medium)
{
    struct wire w;

    wire_begin(&w, 1);
    wire_removed(&w, &hash, 1, medium);
    assert_int_equal(feed(&w), 0);
}

static void clear(void)
{
    struct wire w;

    wire_begin(&w, 1);
    wire_cleared(&w);
    assert_int_equal(feed(&w), 0);
}

#define H(...) (const uint64_t[]){ __VA_ARGS__ }, sizeof((const uint64_t[]){ __VA_ARGS__ }) / 8

static void assert_only(enum fk_rule rule, uint64_t times)
{
    for (int i = 0; i < FK_RULES; i++)
        if (check.found[i] != (i == (int)rule ? times : 0))
            fail_msg("%s was found %d times", fk_rule_names[i], (int)check.found[i]);
}

static void a_good_stream_breaks_no_rule(void **state)
{
    store(H(11, 12), WIRE_ROOT, NULL);
    store(H(13, 14), 12, "CPU");
    store(H(15), 14, "STORAGE");
    store(H(11, 12), WIRE_ROOT, "CPU");                 /* another tier, the same block */
    store(H(99), 98, "CPU");                            /* a lower tier may come before the device */
    take_away(11, "CPU");
    store(H(11), WIRE_ROOT, "CPU");
    take_away(15, "STORAGE");
    clear();
    store(H(11, 12), WIRE_ROOT, "CPU");
    assert_int_equal(fk_check_findings(&check), 0);
    assert_int_equal(check.stored, 11);
    assert_int_equal(check.removed, 2);
}

static void blocks_must_come_and_go_in_turns(void **state)
{
    store(H(1, 2), WIRE_ROOT, "CPU");
    store(H(1, 2), WIRE_ROOT, "CPU");
    assert_only(FK_RULE_TWICE, 2);
    clear();
    check.found[FK_RULE_TWICE] = 0;
    take_away(2, "CPU");
    store(H(2), 1, "CPU");
    take_away(2, "STORAGE");                            /* where it is not */
    assert_only(FK_RULE_UNKNOWN, 2);
}

static void device_blocks_need_their_parents(void **state)
{
    store(H(1), WIRE_ROOT, "CPU");
    store(H(2), 1, "GPU");                              /* the parent is there, but not on the device */
    assert_only(FK_RULE_ORPHAN, 1);
}

static void what_is_wrong_within_an_event_is_found(void **state)
{
    struct wire w;

    store(H(1, 2, 1), WIRE_ROOT, "CPU");
    store(H(3), 3, "CPU");
    assert_only(FK_RULE_CHAIN, 2);
    check.found[FK_RULE_CHAIN] = 0;
    store(H(4), WIRE_ROOT, "SSD");
    store(H(4), WIRE_ROOT, "cpu");
    assert_only(FK_RULE_MEDIUM, 2);
    check.found[FK_RULE_MEDIUM] = 0;
    wire_begin(&w, 1);
    wire_stored(&w, H(5), WIRE_ROOT, 4, "CPU", 1);
    wire_str(&w, "token_ids"), wire_tokens(&w, 0);      /* the last of two counts */
    assert_int_equal(feed(&w), 0);
    assert_only(FK_RULE_TOKENS, 1);
    check.found[FK_RULE_TOKENS] = 0;
    wire_begin(&w, 1);
    wire_stored(&w, H(6), WIRE_ROOT, 8, "CPU", 0);
    assert_int_equal(feed(&w), 0);
    assert_only(FK_RULE_BLOCK_SIZE, 1);
}

static void one_hash_is_one_block(void **state)
{
    store(H(1, 2), WIRE_ROOT, "CPU");
    store(H(2), 7, "STORAGE");
    assert_only(FK_RULE_DIFFERENT, 1);
}

static void what_routers_pass_over_is_said(void **state)
{
    struct wire w;

    wire_begin(&w, 1);
    wire_stored(&w, H(1), WIRE_ROOT, 4, "CPU", 4);
    wire_str(&w, "locality"), wire_str(&w, "REMOTE");
    wire_str(&w, "ownership"), wire_str(&w, "x");
    wire_str(&w, "group_idx"), msgpack_pack_int(&w.p, 1);
    wire_str(&w, "lora_id"), msgpack_pack_int(&w.p, 1);
    assert_int_equal(feed(&w), 0);
    wire_begin(&w, 1);
    wire_stored(&w, H(2), WIRE_ROOT, 4, "CPU", 1);
    wire_str(&w, "kv_cache_spec_kind"), wire_str(&w, "mamba");
    assert_int_equal(feed(&w), 0);
    assert_only(FK_RULE_PASSED_OVER, 4);
}

static void a_negative_rank_is_found(void **state)
{
    struct wire w;

    wire_begin(&w, 0);
    msgpack_pack_int(&w.p, -1);
    assert_int_equal(feed_as(&w, 0), 0);
    assert_only(FK_RULE_RANK, 1);
}

static void numbers_must_follow_each_other(void **state)
{
    struct wire w;

    next_seq = 1000;
    clear();
    assert_int_equal(fk_check_findings(&check), 0);     /* it may begin anywhere */
    next_seq = 1000;
    wire_begin(&w, 0);
    assert_int_equal(feed(&w), -EBADMSG);
    assert_only(FK_RULE_ORDER, 1);
    check.found[FK_RULE_ORDER] = 0;
    next_seq = 1003;
    take_away(5, "CPU");
    assert_only(FK_RULE_GAP, 1);                        /* and the removed one is not judged */
    assert_int_equal(check.missed, 2);
    check.found[FK_RULE_GAP] = 0;
    clear();
    take_away(5, "CPU");
    assert_only(FK_RULE_UNKNOWN, 1);
}

static void ranks_are_apart(void **state)
{
    for (int rank = 0; rank < 2; rank++) {
        struct wire w;
        wire_begin(&w, 1);
        wire_stored(&w, H(1), WIRE_ROOT, 4, "CPU", 0);
        msgpack_pack_int(&w.p, rank);
        assert_int_equal(feed_as(&w, (uint64_t)rank), 0);
    }
    assert_int_equal(fk_check_findings(&check), 0);
}

static void broken_messages_are_found(void **state)
{
    struct fk_frame f[4] = { { "", 0 }, { "12345678", 8 }, { "\xc0", 1 }, { "", 0 } };

    assert_int_equal(fk_check_message(&check, f, 2, &decoded), -EBADMSG);
    assert_int_equal(fk_check_message(&check, f, 4, &decoded), -EBADMSG);
    f[1].bytes = 4;
    assert_int_equal(fk_check_message(&check, f, 3, &decoded), -EBADMSG);
    assert_only(FK_RULE_FRAMES, 3);
    check.found[FK_RULE_FRAMES] = 0;
    f[1].bytes = 8;
    assert_int_equal(fk_check_message(&check, f, 3, &decoded), -EBADMSG);
    assert_only(FK_RULE_BATCH, 1);
}

static void the_mirror_is_right_under_many_blocks(void **state)
{
    enum { KEYS = 5000, STEPS = 60000 };
    static uint8_t model[KEYS];
    struct fk_mirror m = { 0 };
    uint64_t seed = 7;
    size_t known = 0;

    for (int i = 0; i < STEPS; i++) {
        uint32_t k = fk_rng_below(&seed, KEYS), tier = fk_rng_below(&seed, FK_MIRROR_TIERS);
        uint32_t token = k;
        bool differs;
        struct fk_mirror_desc d = { .hash = k * 0x9e3779b97f4a7c15ull, .root = true, .tokens = &token, .n_tokens = 1 };
        if (fk_rng_below(&seed, 2)) {
            assert_int_equal(fk_mirror_store(&m, &d, tier, &differs), model[k] >> tier & 1);
            assert_false(differs);
            model[k] |= (uint8_t)(1u << tier);
        } else {
            assert_int_equal(fk_mirror_remove(&m, d.hash, tier), !(model[k] >> tier & 1));
            model[k] &= (uint8_t)~(1u << tier);
        }
    }
    for (const struct fk_mirror_block *b = m.first; b; b = b->after, known++)
        assert_int_equal(b->tiers, model[b->tokens[0]]);
    assert_int_equal(known, m.blocks);
    for (uint32_t k = 0; k < KEYS; k++)
        known -= model[k] != 0;
    assert_int_equal(known, 0);
    fk_mirror_free(&m);
}

#define T(f) cmocka_unit_test_setup_teardown(f, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        T(a_good_stream_breaks_no_rule), T(blocks_must_come_and_go_in_turns),
        T(device_blocks_need_their_parents), T(what_is_wrong_within_an_event_is_found),
        T(one_hash_is_one_block), T(what_routers_pass_over_is_said), T(a_negative_rank_is_found),
        T(numbers_must_follow_each_other), T(ranks_are_apart), T(broken_messages_are_found),
        T(the_mirror_is_right_under_many_blocks),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
