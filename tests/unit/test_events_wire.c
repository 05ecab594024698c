/* test_events_wire.c - src/events/: the bytes of batches as msgpack-c reads them, batches of others as
 * we read them (each row of what routers take and refuse), the ring of sent batches, requests,
 * recordings. */
#include "wire_rig.h"

#include <stdio.h>

#include "events/claims.h"
#include "events/encode.h"
#include "events/history.h"
#include "events/record.h"

/* ---- encoding ---- */

static const uint32_t tokens[8] = { 1, 127, 128, 65535, 65536, 0, UINT32_MAX, 7 };

static flexkv_event stored(uint64_t hash, uint64_t parent, uint8_t medium)
{
    return (flexkv_event){ .kind = FLEXKV_EVENT_STORED, .medium = medium, .root = parent == 0,
                           .n_tokens = 4, .hash = hash, .parent = parent,
                           .tokens = tokens + hash % 2 * 4 };
}

static flexkv_event removed(uint64_t hash, uint8_t medium)
{
    return (flexkv_event){ .kind = FLEXKV_EVENT_REMOVED, .medium = medium, .hash = hash };
}

static struct fk_batch *encode(const flexkv_event *ev, size_t n, int64_t rank)
{
    struct fk_encoder e;
    struct fk_batch *batch;

    fk_encoder_init(&e, 1 << 20);
    assert_int_equal(fk_encoder_add(&e, ev, n), n);
    assert_int_equal(fk_encoder_batch(&e, 12.25, rank, &batch), 0);
    fk_encoder_reset(&e);
    assert_true(fk_encoder_empty(&e));
    fk_encoder_free(&e);
    return batch;
}

static const msgpack_object *field(const msgpack_object *map, const char *name)
{
    assert_int_equal(map->type, MSGPACK_OBJECT_MAP);
    for (uint32_t i = 0; i < map->via.map.size; i++) {
        const msgpack_object_str *s = &map->via.map.ptr[i].key.via.str;
        if (s->size == strlen(name) && !memcmp(s->ptr, name, s->size))
            return &map->via.map.ptr[i].val;
    }
    return NULL;
}

static void assert_text(const msgpack_object *map, const char *name, const char *wanted)
{
    const msgpack_object *o = field(map, name);

    assert_non_null(o);
    assert_int_equal(o->type, MSGPACK_OBJECT_STR);
    assert_int_equal(o->via.str.size, strlen(wanted));
    assert_memory_equal(o->via.str.ptr, wanted, o->via.str.size);
}

static void a_batch_has_the_form_that_routers_read(void **state)
{
    flexkv_event ev[5] = { stored(11, 0, FLEXKV_MEDIUM_CPU), stored(UINT64_MAX, 11, FLEXKV_MEDIUM_CPU),
                           stored(13, 12, FLEXKV_MEDIUM_STORAGE), removed(11, FLEXKV_MEDIUM_CPU),
                           removed(9, FLEXKV_MEDIUM_CPU) };
    msgpack_unpacked u;
    struct fk_batch *b;

    ev[2].cache_salt = "ns1";
    ev[2].lora_name = "adapter";
    b = encode(ev, 5, 3);
    msgpack_unpacked_init(&u);
    assert_int_equal(msgpack_unpack_next(&u, (const char *)b->data, b->bytes, NULL), MSGPACK_UNPACK_SUCCESS);
    const msgpack_object *o = &u.data;
    assert_int_equal(o->type, MSGPACK_OBJECT_ARRAY);
    assert_int_equal(o->via.array.size, 3);
    assert_int_equal(o->via.array.ptr[0].type, MSGPACK_OBJECT_FLOAT64);
    assert_true(o->via.array.ptr[0].via.f64 == 12.25);
    assert_int_equal(o->via.array.ptr[2].type, MSGPACK_OBJECT_POSITIVE_INTEGER);
    assert_int_equal(o->via.array.ptr[2].via.u64, 3);

    const msgpack_object *list = &o->via.array.ptr[1];
    assert_int_equal(list->via.array.size, 3);          /* the chain is one event, the removed are one */
    const msgpack_object *m = &list->via.array.ptr[0];
    assert_text(m, "type", "BlockStored");
    assert_text(m, "medium", "CPU");
    assert_int_equal(m->via.map.size, 8);
    assert_null(field(m, "cache_salt"));
    assert_int_equal(field(m, "parent_block_hash")->type, MSGPACK_OBJECT_NIL);
    assert_int_equal(field(m, "lora_id")->type, MSGPACK_OBJECT_NIL);
    assert_int_equal(field(m, "lora_name")->type, MSGPACK_OBJECT_NIL);
    assert_int_equal(field(m, "block_size")->via.u64, 4);
    const msgpack_object_array *h = &field(m, "block_hashes")->via.array, *t = &field(m, "token_ids")->via.array;
    assert_int_equal(h->size, 2);
    assert_true(h->ptr[0].via.u64 == 11 && h->ptr[1].via.u64 == UINT64_MAX);
    assert_int_equal(h->ptr[1].type, MSGPACK_OBJECT_POSITIVE_INTEGER);
    assert_int_equal(t->size, 8);
    for (int i = 0; i < 8; i++)
        assert_int_equal(t->ptr[i].via.u64, tokens[(i + 4) % 8 % 4 + 4]);

    m = &list->via.array.ptr[1];
    assert_text(m, "medium", "STORAGE");
    assert_text(m, "cache_salt", "ns1");
    assert_text(m, "lora_name", "adapter");
    assert_int_equal(field(m, "parent_block_hash")->via.u64, 12);
    assert_int_equal(m->via.map.size, 9);
    m = &list->via.array.ptr[2];
    assert_text(m, "type", "BlockRemoved");
    assert_int_equal(field(m, "block_hashes")->via.array.size, 2);
    assert_int_equal(m->via.map.size, 3);
    msgpack_unpacked_destroy(&u);
    fk_batch_unref(b);
}

/* Where the form of a number, a text or an array changes. */
static void every_width_is_read_back(void **state)
{
    static const size_t texts[] = { 1, 31, 32, 255, 256, 65535, 65536 };
    static const uint32_t counts[] = { 1, 15, 16, 65535, 65536 };
    static const uint64_t numbers[] = { 0, 127, 128, 255, 256, 65535, 65536, UINT32_MAX, 1ull << 32, UINT64_MAX };
    uint32_t *many = malloc(65536 * sizeof(*many));

    for (uint32_t i = 0; i < 65536; i++)
        many[i] = (uint32_t)numbers[i % 8];
    for (size_t t = 0; t < fk_array_size(texts); t++) {
        for (size_t c = 0; c < fk_array_size(counts); c++) {
            uint64_t n = numbers[(t * 5 + c) % fk_array_size(numbers)];
            char *text = malloc(texts[t] + 1);
            memset(text, 'x', texts[t]);
            text[texts[t]] = 0;
            flexkv_event ev = { .kind = FLEXKV_EVENT_STORED, .medium = FLEXKV_MEDIUM_EXTERNAL, .hash = n,
                                .parent = ~n, .n_tokens = counts[c], .tokens = many, .lora_name = text,
                                .cache_salt = text };
            struct fk_batch *b = encode(&ev, 1, (int64_t)(n >> 1));
            struct fk_stream_batch d = { 0 };
            msgpack_unpacked u;
            msgpack_unpacked_init(&u);
            assert_int_equal(msgpack_unpack_next(&u, (const char *)b->data, b->bytes, NULL), MSGPACK_UNPACK_SUCCESS);
            const msgpack_object *m = &u.data.via.array.ptr[1].via.array.ptr[0];
            assert_text(m, "cache_salt", text);
            assert_true(field(m, "parent_block_hash")->via.u64 == ~n);
            assert_int_equal(field(m, "token_ids")->via.array.size, counts[c]);
            assert_true(u.data.via.array.ptr[2].via.u64 == n >> 1);
            assert_int_equal(fk_stream_decode(b->data, b->bytes, &d), 0);
            assert_true(d.rank == (int64_t)(n >> 1) && d.events.data[0].parent == ~n && d.hashes.data[0] == n);
            assert_memory_equal(d.tokens.data, many, counts[c] * sizeof(*many));
            assert_true(fk_text_is(d.events.data[0].lora_name, text));
            msgpack_unpacked_destroy(&u);
            fk_stream_batch_free(&d);
            fk_batch_unref(b);
            free(text);
        }
    }
    free(many);
}

static void what_does_not_belong_together_is_not_joined(void **state)
{
    flexkv_event ev[6] = { stored(1, 0, 1), stored(2, 1, 2), stored(3, 2, 2), stored(4, 3, 2),
                           stored(5, 3, 2), stored(6, 0, 2) };
    struct fk_stream_batch d = { 0 };

    ev[2].cache_salt = "a";
    ev[3].cache_salt = "a";
    struct fk_batch *b = encode(ev, 6, -1);
    assert_int_equal(fk_stream_decode(b->data, b->bytes, &d), 0);
    assert_false(d.has_rank);
    assert_int_equal(d.events.len, 5);              /* 1 | 2 | 3 4 | 5 | 6 */
    assert_int_equal(d.events.data[2].n_hashes, 2);
    assert_true(fk_text_is(d.events.data[2].cache_salt, "a"));
    fk_batch_unref(b);
    fk_stream_batch_free(&d);
}

/* Dynamo gives the engine its salt with a word before it. */
static void a_salt_that_the_router_made_goes_back_as_he_knows_it(void **state)
{
    flexkv_event ev = stored(1, 0, 1);
    struct fk_stream_batch d = { 0 };

    ev.cache_salt = "dynamo-cache-salt:ns1";
    struct fk_batch *b = encode(&ev, 1, 0);
    assert_int_equal(fk_stream_decode(b->data, b->bytes, &d), 0);
    assert_true(fk_text_is(d.events.data[0].cache_salt, "ns1"));
    fk_batch_unref(b);
    fk_stream_batch_free(&d);
}

static void a_batch_is_bounded(void **state)
{
    enum { N = 1000, LIMIT = 1024 };
    static flexkv_event ev[N];
    struct fk_stream_batch d = { 0 };
    struct fk_encoder e;
    size_t done = 0, batches = 0, blocks = 0;

    for (unsigned i = 0; i < N; i++)
        ev[i] = stored(i + 1, i, 1);
    fk_encoder_init(&e, LIMIT);
    while (done < N) {
        struct fk_batch *b;
        size_t n = fk_encoder_add(&e, ev + done, N - done);
        assert_true(n > 0);
        done += n;
        assert_int_equal(fk_encoder_batch(&e, 0, 0, &b), 0);
        fk_encoder_reset(&e);
        assert_true(b->bytes < 2 * LIMIT);
        assert_int_equal(fk_stream_decode(b->data, b->bytes, &d), 0);
        for (size_t i = 0; i < d.events.len; i++)
            for (size_t k = 0; k < d.events.data[i].n_hashes; k++)
                assert_int_equal(fk_stream_hashes(&d, &d.events.data[i])[k], ++blocks);
        fk_batch_unref(b);
        batches++;
    }
    assert_int_equal(blocks, N);
    assert_true(batches > 4);
    fk_stream_batch_free(&d);
    fk_encoder_free(&e);
}

/* ---- decoding ---- */

/* The payload stays until the next one: texts point into it. */
static msgpack_sbuffer payload;

static int decode(struct wire *w, struct fk_stream_batch *d)
{
    msgpack_sbuffer_destroy(&payload);
    payload = w->buf;
    int rc = fk_stream_decode(w->buf.data, w->buf.size, d);

    for (size_t n = 0; !rc && n < w->buf.size; n++)     /* cut off anywhere: refused, never read past */
        assert_int_equal(fk_stream_decode(w->buf.data, n, d), -EBADMSG);
    if (!rc)
        rc = fk_stream_decode(w->buf.data, w->buf.size, d);
    assert_true(rc == 0 || d->why[0]);
    return rc;
}

static void maps_are_read_in_any_order_with_unknown_fields(void **state)
{
    struct fk_stream_batch d = { 0 };
    uint64_t hash[2] = { 5, 6 };
    struct wire w;

    wire_begin(&w, 1);
    msgpack_pack_map(&w.p, 7);
    wire_str(&w, "new"), msgpack_pack_array(&w.p, 1), msgpack_pack_map(&w.p, 1), wire_str(&w, "x"), wire_str(&w, "y");
    wire_str(&w, "block_size"), msgpack_pack_int(&w.p, 4);
    wire_str(&w, "token_ids"), wire_tokens(&w, 8);
    wire_str(&w, "group_idx"), msgpack_pack_int(&w.p, 0);
    wire_str(&w, "block_hashes"), wire_hashes(&w, hash, 2);
    wire_str(&w, "type"), wire_str(&w, "BlockStored");
    wire_str(&w, "lora_name"), msgpack_pack_nil(&w.p);
    msgpack_pack_int(&w.p, 2);
    assert_int_equal(decode(&w, &d), 0);
    assert_true(d.has_rank && d.rank == 2 && d.ts == 1.5);
    struct fk_stream_event *ev = d.events.data;
    assert_true(ev->type == FK_STREAM_STORED && !ev->array && !ev->has_parent);
    assert_int_equal(ev->n_hashes, 2);
    assert_int_equal(fk_stream_hashes(&d, ev)[1], 6);
    assert_int_equal(fk_stream_tokens(&d, ev)[7], 7);
    fk_stream_batch_free(&d);
}

static void array_of(struct wire *w, unsigned elements)
{
    msgpack_pack_array(&w->p, elements);
    wire_str(w, "BlockStored");
    msgpack_pack_array(&w->p, 1);
    msgpack_pack_int64(&w->p, -5);
    msgpack_pack_int64(&w->p, -6);
    wire_tokens(w, 4);
    msgpack_pack_int(&w->p, 4);
    if (elements > 5)
        msgpack_pack_nil(&w->p);
    if (elements > 6)
        wire_str(w, "GPU");
    if (elements > 7)
        wire_str(w, "A");
    if (elements > 8)
        msgpack_pack_nil(&w->p);
}

static void arrays_with_the_tag_first_are_read(void **state)
{
    struct fk_stream_batch d = { 0 };

    for (unsigned elements = 5; elements <= 9; elements++) {
        struct wire w;
        wire_begin(&w, 3);
        array_of(&w, elements);
        msgpack_pack_array(&w.p, 2), wire_str(&w, "BlockRemoved"), wire_hashes(&w, (uint64_t[]){ 1 }, 1);
        msgpack_pack_array(&w.p, 1), wire_str(&w, "AllBlocksCleared");
        wire_end(&w);
        assert_int_equal(decode(&w, &d), 0);
        assert_int_equal(d.events.len, 3);
        const struct fk_stream_event *ev = &d.events.data[0];
        assert_true(ev->array && ev->has_parent && ev->parent == (uint64_t)-6);
        assert_true(fk_stream_hashes(&d, ev)[0] == (uint64_t)-5);
        assert_true(elements < 7 || fk_text_is(ev->medium, "GPU"));
        assert_true(elements < 8 || fk_text_is(ev->lora_name, "A"));
        assert_int_equal(d.events.data[2].type, FK_STREAM_CLEARED);
    }
    fk_stream_batch_free(&d);
}

static void a_salt_is_found_in_extra_keys(void **state)
{
    struct fk_stream_batch d = { 0 };
    struct wire w;

    for (int plain = 0; plain < 2; plain++) {
        wire_begin(&w, 1);
        wire_stored(&w, (uint64_t[]){ 1, 2 }, 2, WIRE_ROOT, 4, "GPU", 1);
        wire_str(&w, "extra_keys"), msgpack_pack_array(&w.p, 2);
        msgpack_pack_array(&w.p, 2), msgpack_pack_int(&w.p, 3);
        wire_str(&w, plain ? "ns1" : "dynamo-cache-salt:ns1");
        msgpack_pack_nil(&w.p);
        wire_end(&w);
        assert_int_equal(decode(&w, &d), 0);
        assert_true(plain ? !d.events.data[0].cache_salt.data : fk_text_is(d.events.data[0].cache_salt, "ns1"));
    }
    fk_stream_batch_free(&d);
}

/* Each of these is one row of what a router throws away as a whole. */
static int bad_event(struct wire *w, int row)
{
    switch (row) {
    case 0: msgpack_pack_map(&w->p, 1), wire_str(w, "type"), wire_str(w, "BlockMoved"); break;
    case 1: wire_str(w, "AllBlocksCleared"); break;             /* a bare string */
    case 2: msgpack_pack_map(&w->p, 1), wire_str(w, "block_hashes"), wire_tokens(w, 1); break;
    case 3: msgpack_pack_map(&w->p, 1), wire_str(w, "type"), wire_str(w, "BlockRemoved"); break;
    case 4: msgpack_pack_array(&w->p, 3), wire_str(w, "BlockStored"), wire_tokens(w, 1), msgpack_pack_nil(&w->p); break;
    case 5: msgpack_pack_array(&w->p, 0); break;
    case 6: wire_stored(w, (uint64_t[]){ 1 }, 1, WIRE_ROOT, 4, NULL, 1), wire_str(w, "medium"), msgpack_pack_int(&w->p, 1); break;
    case 7: wire_stored(w, (uint64_t[]){ 1 }, 1, WIRE_ROOT, 4, NULL, 1), wire_str(w, "extra_keys"), wire_str(w, "ns1"); break;
    case 8: wire_stored(w, (uint64_t[]){ 1 }, 1, WIRE_ROOT, 4, NULL, 1), wire_str(w, "block_size"), msgpack_pack_int(&w->p, 0); break;
    case 9: wire_stored(w, (uint64_t[]){ 1 }, 1, WIRE_ROOT, 4, NULL, 1), wire_str(w, "token_ids"), msgpack_pack_array(&w->p, 1), msgpack_pack_int(&w->p, -1); break;
    case 10: wire_stored(w, (uint64_t[]){ 1 }, 1, WIRE_ROOT, 4, NULL, 1), wire_str(w, "token_ids"), msgpack_pack_array(&w->p, 1), msgpack_pack_uint64(&w->p, 1ull << 32); break;
    case 11: wire_stored(w, (uint64_t[]){ 1 }, 1, WIRE_ROOT, 4, NULL, 1), wire_str(w, "block_hashes"), msgpack_pack_array(&w->p, 1), msgpack_pack_bin(&w->p, 8), msgpack_pack_bin_body(&w->p, "12345678", 8); break;
    case 12: wire_stored(w, (uint64_t[]){ 1 }, 1, WIRE_ROOT, 4, NULL, 1), wire_str(w, "parent_block_hash"), wire_str(w, "x"); break;
    case 13: wire_stored(w, (uint64_t[]){ 1 }, 1, WIRE_ROOT, 4, NULL, 1), msgpack_pack_int(&w->p, 1), msgpack_pack_int(&w->p, 1); break;
    case 14: wire_stored(w, (uint64_t[]){ 1 }, 1, WIRE_ROOT, 4, NULL, 1), wire_str(w, "x"), msgpack_pack_array(&w->p, 1u << 31); break;
    case 15: msgpack_pack_double(&w->p, 1); break;
    default: return -1;
    }
    return 0;
}

static void malformed_batches_are_refused(void **state)
{
    struct fk_stream_batch d = { 0 };
    struct wire w;

    for (int row = 0;; row++) {
        wire_begin(&w, 1);
        if (bad_event(&w, row))
            break;
        wire_end(&w);
        if (decode(&w, &d) != -EBADMSG)
            fail_msg("row %d was taken", row);
    }
    msgpack_sbuffer_destroy(&w.buf);
    fk_stream_batch_free(&d);
}

static void batches_of_another_shape_are_refused(void **state)
{
    struct fk_stream_batch d = { 0 };
    struct wire w;

    for (unsigned n = 0; n <= 4; n++) {                 /* elements; the third is a rank */
        wire_init(&w);
        msgpack_pack_array(&w.p, n);
        for (unsigned i = 0; i < n; i++)
            if (i == 1)
                msgpack_pack_array(&w.p, 0);
            else
                msgpack_pack_int(&w.p, 1);
        assert_int_equal(decode(&w, &d), n == 3 ? 0 : -EBADMSG);
    }
    wire_init(&w), msgpack_pack_map(&w.p, 1), wire_str(&w, "a"), wire_str(&w, "b");
    assert_int_equal(decode(&w, &d), -EBADMSG);
    wire_begin(&w, 0), wire_str(&w, "0");               /* a rank that is text */
    assert_int_equal(decode(&w, &d), -EBADMSG);
    wire_begin(&w, 0), wire_end(&w), wire_end(&w);      /* something behind it */
    assert_int_equal(decode(&w, &d), -EBADMSG);
    fk_stream_batch_free(&d);
}

/* ---- history ---- */

static void push(struct fk_history *h, uint64_t seq, size_t bytes, bool clears)
{
    struct fk_batch *b = fk_batch_new(bytes);

    b->seq = seq;
    b->clears = clears;
    fk_history_push(h, b);
    fk_batch_unref(b);
}

static void the_ring_keeps_the_last_batches(void **state)
{
    struct fk_history h;

    assert_int_equal(fk_history_init(&h, 4, 1000), 0);
    assert_null(fk_history_at(&h, 0));
    assert_false(fk_history_covers(&h, 0));
    for (uint64_t seq = 100; seq < 110; seq++) {
        push(&h, seq, 10, false);
        assert_int_equal(fk_history_at(&h, 0)->seq, seq < 104 ? 100 : seq - 3);     /* wraps twice */
        assert_int_equal(fk_history_at(&h, seq)->seq, seq);
        assert_null(fk_history_at(&h, seq + 1));
    }
    assert_int_equal(fk_history_at(&h, 108)->seq, 108);
    assert_true(fk_history_covers(&h, 106));
    assert_false(fk_history_covers(&h, 105));
    push(&h, 110, 985, false);                          /* bytes count too */
    assert_int_equal(h.count, 2);
    assert_int_equal(h.bytes, 995);
    push(&h, 111, 1001, false);                         /* too large for any ring */
    assert_int_equal(h.count, 0);
    push(&h, 112, 1, true);
    push(&h, 113, 1, false);
    assert_true(fk_history_covers(&h, 0));              /* it tells all from the start */
    push(&h, 114, 1, true);
    assert_int_equal(h.count, 1);
    fk_history_free(&h);

    assert_int_equal(fk_history_init(&h, 0, 1000), 0);  /* no ring at all */
    push(&h, 1, 1, true);
    assert_null(fk_history_at(&h, 0));
    fk_history_free(&h);
}

static void requests_are_checked(void **state)
{
    static const unsigned char eight[9] = { 0, 0, 0, 0, 0, 0, 1, 2, 3 };
    struct fk_frame f[4] = { { "", 0 }, { eight, 8 }, { "", 0 }, { "", 0 } };
    uint64_t start = 0;

    assert_int_equal(fk_history_parse_request(f, 2, &start), 0);
    assert_int_equal(start, 0x102);
    assert_int_equal(fk_history_parse_request(f + 1, 1, &start), 0);
    assert_int_equal(fk_history_parse_request(f, 1, &start), -EBADMSG);
    assert_int_equal(fk_history_parse_request(f, 0, &start), -EBADMSG);
    assert_int_equal(fk_history_parse_request(f, 3, &start), -EBADMSG);
    f[1].bytes = 7;
    assert_int_equal(fk_history_parse_request(f, 2, &start), -EBADMSG);
    f[1].bytes = 9;
    assert_int_equal(fk_history_parse_request(f, 2, &start), -EBADMSG);
    f[0] = (struct fk_frame){ "x", 1 }, f[1].bytes = 8;
    assert_int_equal(fk_history_parse_request(f, 2, &start), -EBADMSG);
}

static void claims_count_who_stands_behind_a_hash(void **state)
{
    enum { KEYS = 3000, STEPS = 200000 };
    static uint8_t model[KEYS][4];
    struct fk_claims c = { 0 };
    uint64_t seed = 5;
    size_t used = 0;

    assert_int_equal(fk_claims_drop(&c, 1, 1), 1);      /* of nothing */
    for (int i = 0; i < STEPS; i++) {
        uint32_t k = fk_rng_below(&seed, KEYS), medium = fk_rng_below(&seed, 4);
        uint64_t hash = k % 2 ? k : (uint64_t)k << 40;  /* whose lower bits are all alike, too */
        uint8_t *count = &model[k][medium];
        if (fk_rng_below(&seed, 2) && *count < 3) {
            assert_int_equal(fk_claims_add(&c, hash, (uint8_t)medium), *count == 0);
            used += (*count)++ == 0;
        } else if (*count) {
            assert_int_equal(fk_claims_drop(&c, hash, (uint8_t)medium), *count == 1);
            used -= --(*count) == 0;
        } else {
            assert_int_equal(fk_claims_drop(&c, hash, (uint8_t)medium), 1);
        }
        assert_int_equal(c.used, used);
    }
    fk_claims_free(&c);
}

/* ---- recordings ---- */

static char *record(size_t *bytes)
{
    struct fk_frame f[3] = { { "topic", 5 }, { "12345678", 8 }, { "payload", 7 } };
    struct fk_record r = { 0 };
    char *text = NULL;
    FILE *out = open_memstream(&text, bytes);

    assert_int_equal(fk_record_begin(out), 0);
    for (uint64_t i = 0; i < 3; i++)
        assert_int_equal(fk_record_write(out, &r, i * 1000, f, 3 - i), 0);
    fclose(out);
    fk_record_free(&r);
    return text;
}

/* How many messages were read; *rc: what the reading ended with. */
static int read_all(const char *text, size_t bytes, int *rc)
{
    struct fk_record r = { 0 };
    FILE *in = fmemopen((void *)(uintptr_t)text, bytes, "r");
    char why[128] = "";
    int n = 0;

    *rc = fk_record_check_header(in, why, sizeof(why));
    while (!*rc && (*rc = fk_record_read(in, &r, why, sizeof(why))) == 1) {
        assert_int_equal(r.time_us, n * 1000);
        assert_int_equal(r.n_frames, 3 - n);
        assert_memory_equal(r.frame[0].data, "topic", 5);
        n++;
        *rc = 0;
    }
    assert_true(*rc == 0 || why[0]);
    fk_record_free(&r);
    fclose(in);
    return n;
}

static void a_recording_is_read_back(void **state)
{
    size_t bytes;
    fk_autofree char *text = record(&bytes);
    int rc;

    assert_int_equal(read_all(text, bytes, &rc), 3);
    assert_int_equal(rc, 0);
    for (size_t n = 17; n < bytes; n++) {               /* cut off: what is whole is read */
        int whole = read_all(text, n, &rc);
        assert_true(whole < 3);
        assert_true(rc == -EBADMSG || rc == 0);
    }
    for (size_t i = 16; i < bytes; i++) {               /* any byte */
        text[i] ^= 4;
        assert_true(read_all(text, bytes, &rc) < 3);
        assert_int_equal(rc, -EBADMSG);
        text[i] ^= 4;
    }
    for (size_t i = 0; i < 12; i++) {
        text[i] ^= 4;
        assert_int_equal(read_all(text, bytes, &rc), 0);
        assert_int_equal(rc, -EPROTO);
        text[i] ^= 4;
    }
}

static int forget_payload(void **state)
{
    msgpack_sbuffer_destroy(&payload);
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_batch_has_the_form_that_routers_read),
        cmocka_unit_test(every_width_is_read_back),
        cmocka_unit_test(what_does_not_belong_together_is_not_joined),
        cmocka_unit_test(a_salt_that_the_router_made_goes_back_as_he_knows_it),
        cmocka_unit_test(a_batch_is_bounded),
        cmocka_unit_test(maps_are_read_in_any_order_with_unknown_fields),
        cmocka_unit_test(arrays_with_the_tag_first_are_read),
        cmocka_unit_test(a_salt_is_found_in_extra_keys),
        cmocka_unit_test(malformed_batches_are_refused),
        cmocka_unit_test(batches_of_another_shape_are_refused),
        cmocka_unit_test(the_ring_keeps_the_last_batches),
        cmocka_unit_test(requests_are_checked),
        cmocka_unit_test(claims_count_who_stands_behind_a_hash),
        cmocka_unit_test(a_recording_is_read_back),
    };
    return cmocka_run_group_tests(tests, NULL, forget_payload);
}
