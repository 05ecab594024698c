/*
 * decode.c - see decode.h. Reads msgpack in place (specification: github.com/msgpack/msgpack,
 * spec.md): a general unpacker would build a tree, 24 bytes for each token.
 */
#include "events/decode.h"

#include <stdarg.h>
#include <stdio.h>

#define ROUTER_SALT_PREFIX "dynamo-cache-salt:"

enum kind { NIL, BOOLEAN, INTEGER, REAL, TEXT, BYTES, ARRAY, MAP, EXTENSION, NONE };

/* One value's head. The elements of arrays and maps follow it. */
struct value {
    enum kind kind;
    bool negative;
    uint64_t n;                     /* integer (two's complement), length, or count */
    double real;
    struct fk_text text;
};

struct reader {
    const unsigned char *at, *end;
    struct fk_stream_batch *out;
    size_t event;                   /* for messages */
};

static int fail(struct reader *r, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
static int fail(struct reader *r, const char *fmt, ...)
{
    va_list args;

    va_start(args, fmt);
    vsnprintf(r->out->why, sizeof(r->out->why), fmt, args);
    va_end(args);
    return -EBADMSG;
}

static int cut_short(struct reader *r)
{
    return fail(r, "the payload is cut short, or no msgpack");
}

/* ---- msgpack ---- */

static bool read_be(struct reader *r, unsigned bytes, uint64_t *v)
{
    if ((size_t)(r->end - r->at) < bytes)
        return false;
    *v = 0;
    for (unsigned i = 0; i < bytes; i++)
        *v = *v << 8 | *r->at++;
    return true;
}

static bool read_integer(struct reader *r, unsigned char tag, struct value *v)
{
    unsigned bytes = 1u << (tag & 3);

    v->kind = INTEGER;
    if (!read_be(r, bytes, &v->n))
        return false;
    if (tag >= 0xd0) {              /* signed */
        unsigned shift = 64 - 8 * bytes;
        v->n = (uint64_t)((int64_t)(v->n << shift) >> shift);
        v->negative = (int64_t)v->n < 0;
    }
    return true;
}

static bool read_real(struct reader *r, unsigned char tag, struct value *v)
{
    uint64_t bits;

    v->kind = REAL;
    if (!read_be(r, tag == 0xca ? 4 : 8, &bits))
        return false;
    if (tag == 0xca) {
        uint32_t half = (uint32_t)bits;
        float f;
        memcpy(&f, &half, sizeof(f));
        v->real = (double)f;
    } else {
        memcpy(&v->real, &bits, sizeof(bits));
    }
    return true;
}

static bool take_bytes(struct reader *r, struct value *v, enum kind kind, uint64_t n)
{
    if (n > (uint64_t)(r->end - r->at))
        return false;
    *v = (struct value){ .kind = kind, .n = n, .text = { (const char *)r->at, (size_t)n } };
    r->at += n;
    return true;
}

/* Each element takes a byte at least: a count beyond that is a lie. */
static bool take_count(struct reader *r, struct value *v, enum kind kind, uint64_t n)
{
    *v = (struct value){ .kind = kind, .n = n };
    return (kind == MAP ? 2 : 1) * n <= (uint64_t)(r->end - r->at);
}

static bool read_long(struct reader *r, unsigned char tag, struct value *v)
{
    uint64_t n = 0;

    switch (tag) {
    case 0xc0: v->kind = NIL; return true;
    case 0xc2: case 0xc3: *v = (struct value){ .kind = BOOLEAN, .n = tag & 1 }; return true;
    case 0xc4: case 0xc5: case 0xc6:
        return read_be(r, 1u << (tag - 0xc4), &n) && take_bytes(r, v, BYTES, n);
    case 0xc7: case 0xc8: case 0xc9:
        return read_be(r, 1u << (tag - 0xc7), &n) && take_bytes(r, v, EXTENSION, n + 1);
    case 0xca: case 0xcb: return read_real(r, tag, v);
    case 0xcc: case 0xcd: case 0xce: case 0xcf:
    case 0xd0: case 0xd1: case 0xd2: case 0xd3: return read_integer(r, tag, v);
    case 0xd4: case 0xd5: case 0xd6: case 0xd7: case 0xd8:
        return take_bytes(r, v, EXTENSION, (1u << (tag - 0xd4)) + 1);
    case 0xd9: case 0xda: case 0xdb:
        return read_be(r, 1u << (tag - 0xd9), &n) && take_bytes(r, v, TEXT, n);
    case 0xdc: case 0xdd: return read_be(r, tag == 0xdc ? 2 : 4, &n) && take_count(r, v, ARRAY, n);
    case 0xde: case 0xdf: return read_be(r, tag == 0xde ? 2 : 4, &n) && take_count(r, v, MAP, n);
    default: return false;
    }
}

static bool read_value(struct reader *r, struct value *v)
{
    *v = (struct value){ .kind = NONE };
    if (r->at == r->end)
        return false;
    unsigned char tag = *r->at++;
    if (tag < 0x80 || tag >= 0xe0) {
        *v = (struct value){ .kind = INTEGER, .negative = tag >= 0xe0,
                             .n = (uint64_t)(int64_t)(signed char)tag };
        return true;
    }
    if (tag < 0x90)
        return take_count(r, v, MAP, tag & 15);
    if (tag < 0xa0)
        return take_count(r, v, ARRAY, tag & 15);
    if (tag < 0xc0)
        return take_bytes(r, v, TEXT, tag & 31);
    return read_long(r, tag, v);
}

/* The elements of a value whose head was read; however deep, without recursion. */
static bool skip_elements(struct reader *r, const struct value *head)
{
    uint64_t todo = head->kind == ARRAY ? head->n : head->kind == MAP ? 2 * head->n : 0;
    struct value v;

    while (todo--) {
        if (!read_value(r, &v))
            return false;
        todo += v.kind == ARRAY ? v.n : v.kind == MAP ? 2 * v.n : 0;
    }
    return true;
}

/* ---- fields ---- */

static const char *const kind_names[] = {
    [NIL] = "nil", [BOOLEAN] = "boolean", [INTEGER] = "integer", [REAL] = "float", [TEXT] = "string",
    [BYTES] = "bytes", [ARRAY] = "array", [MAP] = "map", [EXTENSION] = "extension", [NONE] = "nothing",
};

static int wrong_type(struct reader *r, const char *field, const char *wanted, const struct value *v)
{
    return fail(r, "event %zu: %s is %s, %s is wanted", r->event, field, kind_names[v->kind], wanted);
}

static int read_hash(struct reader *r, const char *field, uint64_t *hash)
{
    struct value v;

    if (!read_value(r, &v))
        return cut_short(r);
    if (v.kind != INTEGER)
        return wrong_type(r, field, "a 64 bit integer", &v);
    *hash = v.n;
    return 0;
}

static int read_hashes(struct reader *r, struct fk_stream_event *ev)
{
    struct fk_stream_batch *b = r->out;
    struct value v;

    if (!read_value(r, &v))
        return cut_short(r);
    if (v.kind != ARRAY)
        return wrong_type(r, "block_hashes", "an array", &v);
    ev->hash_at = b->hashes.len;
    ev->n_hashes = v.n;
    if (fk_vec_reserve(&b->hashes, b->hashes.len + v.n))
        return -ENOMEM;
    int rc = 0;
    for (uint64_t i = 0; i < v.n && !rc; i++)
        rc = read_hash(r, "a block hash", &b->hashes.data[b->hashes.len++]);
    return rc;
}

static int read_parent(struct reader *r, struct fk_stream_event *ev)
{
    ev->has_parent = r->at < r->end && *r->at != 0xc0;
    if (ev->has_parent)
        return read_hash(r, "parent_block_hash", &ev->parent);
    r->at += r->at < r->end;
    return 0;
}

static int read_tokens(struct reader *r, struct fk_stream_event *ev)
{
    struct fk_stream_batch *b = r->out;
    struct value v, token;

    if (!read_value(r, &v))
        return cut_short(r);
    if (v.kind != ARRAY)
        return wrong_type(r, "token_ids", "an array", &v);
    ev->token_at = b->tokens.len;
    ev->n_tokens = v.n;
    if (fk_vec_reserve(&b->tokens, b->tokens.len + v.n))
        return -ENOMEM;
    for (uint64_t i = 0; i < v.n; i++) {
        if (!read_value(r, &token))
            return cut_short(r);
        if (token.kind != INTEGER || token.negative || token.n > UINT32_MAX)
            return wrong_type(r, "a token id", "an integer of 32 bits without sign", &token);
        b->tokens.data[b->tokens.len++] = (uint32_t)token.n;
    }
    return 0;
}

static int read_block_size(struct reader *r, struct fk_stream_event *ev)
{
    struct value v;

    if (!read_value(r, &v))
        return cut_short(r);
    if (v.kind != INTEGER || v.negative || v.n == 0 || v.n > UINT32_MAX)
        return wrong_type(r, "block_size", "a positive integer", &v);
    ev->block_size = (uint32_t)v.n;
    return 0;
}

static int read_text(struct reader *r, const char *field, struct fk_text *text)
{
    struct value v;

    if (!read_value(r, &v))
        return cut_short(r);
    if (v.kind != TEXT && v.kind != NIL)
        return wrong_type(r, field, "a string or nil", &v);
    *text = v.text;
    return 0;
}

static int read_int_or_nil(struct reader *r, const char *field, bool *has, int64_t *n)
{
    struct value v;

    if (!read_value(r, &v))
        return cut_short(r);
    if (v.kind != INTEGER && v.kind != NIL)
        return wrong_type(r, field, "an integer or nil", &v);
    *has = v.kind == INTEGER;
    *n = (int64_t)v.n;
    return 0;
}

static void take_salt(struct fk_stream_event *ev, struct fk_text t)
{
    size_t n = strlen(ROUTER_SALT_PREFIX);

    if (!ev->cache_salt.data && t.data && t.len > n && !memcmp(t.data, ROUTER_SALT_PREFIX, n))
        ev->cache_salt = (struct fk_text){ t.data + n, t.len - n };
}

/* nil, or for each block nil or an array of keys, of which a router knows one kind: its salt. */
static int read_extra_keys(struct reader *r, struct fk_stream_event *ev)
{
    struct value list, keys, key;

    if (!read_value(r, &list))
        return cut_short(r);
    if (list.kind != ARRAY && list.kind != NIL)
        return wrong_type(r, "extra_keys", "an array or nil", &list);
    for (uint64_t i = 0; list.kind == ARRAY && i < list.n; i++) {
        if (!read_value(r, &keys))
            return cut_short(r);
        if (keys.kind != ARRAY && keys.kind != NIL)
            return wrong_type(r, "a block's extra_keys", "an array or nil", &keys);
        for (uint64_t k = 0; keys.kind == ARRAY && k < keys.n; k++) {
            if (!read_value(r, &key) || !skip_elements(r, &key))
                return cut_short(r);
            if (key.kind == TEXT)
                take_salt(ev, key.text);
        }
    }
    return 0;
}

static int skip_value(struct reader *r)
{
    struct value v;

    return read_value(r, &v) && skip_elements(r, &v) ? 0 : cut_short(r);
}

static int read_ownership(struct reader *r, struct fk_stream_event *ev)
{
    ev->has_ownership = r->at < r->end && *r->at != 0xc0;
    return skip_value(r);
}

/* ---- events ---- */

enum { HAS_TYPE = 1, HAS_HASHES = 2, HAS_TOKENS = 4, HAS_BLOCK_SIZE = 8 };

static int read_type(struct reader *r, struct fk_stream_event *ev)
{
    struct fk_text t = { 0 };
    int rc = read_text(r, "type", &t);

    if (rc)
        return rc;
    if (fk_text_is(t, "BlockStored"))
        ev->type = FK_STREAM_STORED;
    else if (fk_text_is(t, "BlockRemoved"))
        ev->type = FK_STREAM_REMOVED;
    else if (fk_text_is(t, "AllBlocksCleared"))
        ev->type = FK_STREAM_CLEARED;
    else
        return fail(r, "event %zu: there is no type \"%.*s\"", r->event, (int)fk_min(t.len, (size_t)40),
                    t.data ? t.data : "");
    return 0;
}

static int read_salt(struct reader *r, struct fk_stream_event *ev)
{
    struct fk_text t = { 0 };
    int rc = read_text(r, "cache_salt", &t);

    if (t.data)
        ev->cache_salt = t;
    return rc;
}

/* Any order, unknown names are passed over. */
static int read_field(struct reader *r, struct fk_stream_event *ev, struct fk_text name, unsigned *has)
{
    bool ignored;

    if (fk_text_is(name, "type"))
        return *has |= HAS_TYPE, read_type(r, ev);
    if (fk_text_is(name, "block_hashes"))
        return *has |= HAS_HASHES, read_hashes(r, ev);
    if (fk_text_is(name, "token_ids"))
        return *has |= HAS_TOKENS, read_tokens(r, ev);
    if (fk_text_is(name, "block_size"))
        return *has |= HAS_BLOCK_SIZE, read_block_size(r, ev);
    if (fk_text_is(name, "parent_block_hash"))
        return read_parent(r, ev);
    if (fk_text_is(name, "medium"))
        return read_text(r, "medium", &ev->medium);
    if (fk_text_is(name, "lora_name"))
        return read_text(r, "lora_name", &ev->lora_name);
    if (fk_text_is(name, "lora_id"))
        return read_int_or_nil(r, "lora_id", &ignored, &(int64_t){ 0 });
    if (fk_text_is(name, "cache_salt"))
        return read_salt(r, ev);
    if (fk_text_is(name, "extra_keys"))
        return read_extra_keys(r, ev);
    if (fk_text_is(name, "group_idx"))
        return read_int_or_nil(r, "group_idx", &ev->has_group, &ev->group);
    if (fk_text_is(name, "kv_cache_spec_kind"))
        return read_text(r, "kv_cache_spec_kind", &ev->spec_kind);
    if (fk_text_is(name, "locality"))
        return read_text(r, "locality", &ev->locality);
    if (fk_text_is(name, "ownership"))
        return read_ownership(r, ev);
    return skip_value(r);
}

static int read_map(struct reader *r, uint64_t n, struct fk_stream_event *ev, unsigned *has)
{
    struct value name;
    int rc = 0;

    for (uint64_t i = 0; i < n && !rc; i++) {
        if (!read_value(r, &name))
            return cut_short(r);
        if (name.kind != TEXT)
            return wrong_type(r, "a field's name", "a string", &name);
        rc = read_field(r, ev, name.text, has);
    }
    return rc;
}

/* Fields of a stored event by place, behind the tag. */
static int read_stored_element(struct reader *r, uint64_t i, struct fk_stream_event *ev, unsigned *has)
{
    bool ignored;

    switch (i) {
    case 1: *has |= HAS_HASHES; return read_hashes(r, ev);
    case 2: return read_parent(r, ev);
    case 3: *has |= HAS_TOKENS; return read_tokens(r, ev);
    case 4: *has |= HAS_BLOCK_SIZE; return read_block_size(r, ev);
    case 5: return read_int_or_nil(r, "lora_id", &ignored, &(int64_t){ 0 });
    case 6: return read_text(r, "medium", &ev->medium);
    case 7: return read_text(r, "lora_name", &ev->lora_name);
    case 8: return read_extra_keys(r, ev);
    default: return skip_value(r);
    }
}

static int read_array(struct reader *r, uint64_t n, struct fk_stream_event *ev, unsigned *has)
{
    ev->array = true;
    if (n == 0)
        return fail(r, "event %zu: an empty array", r->event);
    *has |= HAS_TYPE;
    int rc = read_type(r, ev);
    for (uint64_t i = 1; i < n && !rc; i++) {
        if (ev->type == FK_STREAM_STORED)
            rc = read_stored_element(r, i, ev, has);
        else if (ev->type == FK_STREAM_REMOVED && i == 1)
            *has |= HAS_HASHES, rc = read_hashes(r, ev);
        else if (ev->type == FK_STREAM_REMOVED && i == 2)
            rc = read_text(r, "medium", &ev->medium);
        else
            rc = skip_value(r);
    }
    return rc;
}

static int check_complete(struct reader *r, const struct fk_stream_event *ev, unsigned has)
{
    if (!(has & HAS_TYPE))
        return fail(r, "event %zu: it has no type", r->event);
    if (ev->type != FK_STREAM_CLEARED && !(has & HAS_HASHES))
        return fail(r, "event %zu: it has no block_hashes", r->event);
    if (ev->type == FK_STREAM_STORED && !(has & HAS_TOKENS))
        return fail(r, "event %zu: it has no token_ids", r->event);
    if (ev->type == FK_STREAM_STORED && !(has & HAS_BLOCK_SIZE))
        return fail(r, "event %zu: it has no block_size", r->event);
    return 0;
}

static int read_event(struct reader *r)
{
    struct fk_stream_event ev = { 0 };
    struct value v;
    unsigned has = 0;
    int rc;

    if (!read_value(r, &v))
        return cut_short(r);
    if (v.kind == MAP)
        rc = read_map(r, v.n, &ev, &has);
    else if (v.kind == ARRAY)
        rc = read_array(r, v.n, &ev, &has);
    else
        return fail(r, "event %zu is %s, a map or an array is wanted", r->event, kind_names[v.kind]);
    if (!rc)
        rc = check_complete(r, &ev, has);
    return rc ? rc : fk_vec_push(&r->out->events, ev);
}

static int read_batch(struct reader *r)
{
    struct fk_stream_batch *b = r->out;
    struct value v;
    int rc = 0;

    if (!read_value(r, &v))
        return cut_short(r);
    if (v.kind != ARRAY || v.n != 3)
        return fail(r, "a batch is an array of three: time, events, rank; this is %s of %llu",
                    kind_names[v.kind], (unsigned long long)v.n);
    if (!read_value(r, &v))
        return cut_short(r);
    if (v.kind != REAL && v.kind != INTEGER)
        return fail(r, "the batch's time is %s", kind_names[v.kind]);
    b->ts = v.kind == REAL ? v.real : v.negative ? (double)(int64_t)v.n : (double)v.n;
    if (!read_value(r, &v))
        return cut_short(r);
    if (v.kind != ARRAY)
        return fail(r, "the batch's events are %s, an array is wanted", kind_names[v.kind]);
    uint64_t n = v.n;
    for (r->event = 0; r->event < n && !rc; r->event++)
        rc = read_event(r);
    if (!rc)
        rc = read_int_or_nil(r, "data_parallel_rank", &b->has_rank, &b->rank);
    if (!rc && r->at != r->end)
        rc = fail(r, "%zu bytes too many behind the batch", (size_t)(r->end - r->at));
    return rc;
}

int fk_stream_decode(const void *payload, size_t bytes, struct fk_stream_batch *out)
{
    struct reader r = { .at = payload, .end = (const unsigned char *)payload + bytes, .out = out };

    out->events.len = out->hashes.len = out->tokens.len = 0;
    out->has_rank = false;
    out->rank = 0;
    out->why[0] = 0;
    return read_batch(&r);
}

void fk_stream_batch_free(struct fk_stream_batch *b)
{
    fk_vec_free(&b->events);
    fk_vec_free(&b->hashes);
    fk_vec_free(&b->tokens);
}
