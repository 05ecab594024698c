/*
 * encode.c - see encode.h. Writes msgpack (specification: github.com/msgpack/msgpack, spec.md), of which
 * five kinds of values are needed. Room is made for an event as a whole, at its largest; then the bytes are
 * written one behind the other.
 */
#include "events/encode.h"

#include <endian.h>

/* A prompt's salt as an engine behind Dynamo is given it; routers want the part behind. */
#define ROUTER_SALT_PREFIX "dynamo-cache-salt:"

#define HASH_BYTES 9u               /* the most that one takes */
#define TOKEN_BYTES 5u
#define TEXT_BYTES 5u               /* before a text */
#define EVENT_BYTES 192u            /* an event without its hashes, tokens and texts of others */
#define HEAD_BYTES 32u

const char *fk_medium_name(uint8_t medium)
{
    static const char *const names[] = {
        [FK_MEDIUM_DEVICE] = "GPU", [FLEXKV_MEDIUM_CPU] = "CPU", [FLEXKV_MEDIUM_STORAGE] = "STORAGE",
        [FLEXKV_MEDIUM_EXTERNAL] = "EXTERNAL",
    };

    return medium < fk_array_size(names) ? names[medium] : NULL;
}

void fk_encoder_init(struct fk_encoder *e, size_t limit_bytes)
{
    *e = (struct fk_encoder){ .limit = limit_bytes };
}

void fk_encoder_free(struct fk_encoder *e)
{
    fk_vec_free(&e->body);
}

/* ---- msgpack ---- */

static unsigned char *put_be(unsigned char *at, unsigned char tag, uint64_t v, unsigned bytes)
{
    *at++ = tag;
    v = htobe64(v << (64 - 8 * bytes));
    memcpy(at, &v, bytes);
    return at + bytes;
}

static inline unsigned char *put_uint(unsigned char *at, uint64_t v)
{
    if (v < 0x80) {
        *at = (unsigned char)v;
        return at + 1;
    }
    return v <= UINT8_MAX ? put_be(at, 0xcc, v, 1) : v <= UINT16_MAX ? put_be(at, 0xcd, v, 2) :
           v <= UINT32_MAX ? put_be(at, 0xce, v, 4) : put_be(at, 0xcf, v, 8);
}

static unsigned char *put_array(unsigned char *at, size_t n)
{
    if (n < 16) {
        *at = (unsigned char)(0x90 | n);
        return at + 1;
    }
    return n <= UINT16_MAX ? put_be(at, 0xdc, n, 2) : put_be(at, 0xdd, n, 4);
}

static unsigned char *put_map(unsigned char *at, unsigned n)    /* less than 16 */
{
    *at = (unsigned char)(0x80 | n);
    return at + 1;
}

static unsigned char *put_nil(unsigned char *at)
{
    *at = 0xc0;
    return at + 1;
}

static unsigned char *put_text(unsigned char *at, const char *text)
{
    size_t n = strlen(text);

    if (n < 32)
        *at++ = (unsigned char)(0xa0 | n);
    else
        at = n <= UINT8_MAX ? put_be(at, 0xd9, n, 1) : n <= UINT16_MAX ? put_be(at, 0xda, n, 2)
                                                                      : put_be(at, 0xdb, n, 4);
    memcpy(at, text, n);
    return at + n;
}

static unsigned char *put_double(unsigned char *at, double v)
{
    uint64_t bits;

    memcpy(&bits, &v, sizeof(bits));
    return put_be(at, 0xcb, bits, 8);
}

/* ---- events ---- */

static const char *salt_of(const flexkv_event *ev)
{
    const char *salt = ev->cache_salt;

    if (salt && !strncmp(salt, ROUTER_SALT_PREFIX, strlen(ROUTER_SALT_PREFIX)))
        salt += strlen(ROUTER_SALT_PREFIX);
    return salt && *salt ? salt : NULL;
}

static unsigned char *put_hashes(unsigned char *at, const flexkv_event *ev, size_t n)
{
    at = put_text(at, "block_hashes");
    at = put_array(at, n);
    for (size_t i = 0; i < n; i++)
        at = put_uint(at, ev[i].hash);
    return at;
}

static unsigned char *put_tokens(unsigned char *at, const flexkv_event *ev, size_t n)
{
    at = put_text(at, "token_ids");
    at = put_array(at, n * ev->n_tokens);
    for (size_t i = 0; i < n; i++)
        for (uint32_t t = 0; t < ev->n_tokens; t++)
            at = put_uint(at, ev[i].tokens[t]);
    return at;
}

static unsigned char *put_stored(unsigned char *at, const flexkv_event *ev, size_t n)
{
    const char *salt = salt_of(ev);

    at = put_map(at, salt ? 9 : 8);
    at = put_text(put_text(at, "type"), "BlockStored");
    at = put_hashes(at, ev, n);
    at = put_text(at, "parent_block_hash");
    at = ev->root ? put_nil(at) : put_uint(at, ev->parent);
    at = put_tokens(at, ev, n);
    at = put_uint(put_text(at, "block_size"), ev->n_tokens);
    at = put_nil(put_text(at, "lora_id"));
    at = put_text(at, "lora_name");
    at = ev->lora_name && *ev->lora_name ? put_text(at, ev->lora_name) : put_nil(at);
    at = put_text(put_text(at, "medium"), fk_medium_name(ev->medium));
    return salt ? put_text(put_text(at, "cache_salt"), salt) : at;
}

static unsigned char *put_removed(unsigned char *at, const flexkv_event *ev, size_t n)
{
    at = put_map(at, 3);
    at = put_text(put_text(at, "type"), "BlockRemoved");
    at = put_hashes(at, ev, n);
    return put_text(put_text(at, "medium"), fk_medium_name(ev->medium));
}

static bool same_text(const char *a, const char *b)
{
    return a == b || !strcmp(a ? a : "", b ? b : "");
}

/* May b follow a in one event? */
static bool joins(const flexkv_event *a, const flexkv_event *b)
{
    if (a->kind != b->kind || a->medium != b->medium)
        return false;
    if (a->kind == FLEXKV_EVENT_REMOVED)
        return true;
    return !b->root && b->parent == a->hash && a->n_tokens == b->n_tokens &&
           same_text(a->lora_name, b->lora_name) && same_text(a->cache_salt, b->cache_salt);
}

static size_t block_bytes(const flexkv_event *ev)
{
    return HASH_BYTES + (ev->kind == FLEXKV_EVENT_STORED ? (size_t)TOKEN_BYTES * ev->n_tokens : 0);
}

/* How many of the events are one, and fit. */
static size_t run_of(const flexkv_event *ev, size_t n, size_t room)
{
    size_t each = block_bytes(ev), run = 1;

    while (run < n && (run + 1) * each <= room && joins(&ev[run - 1], &ev[run]))
        run++;
    return run;
}

static size_t text_bytes(const char *text)
{
    return TEXT_BYTES + (text ? strlen(text) : 0);
}

/* Room for so many bytes behind what is there; NULL: none, and the batch is spoilt. */
static unsigned char *make_room(struct fk_encoder *e, size_t bytes)
{
    if (fk_vec_reserve(&e->body, e->body.len + bytes)) {
        e->failed = true;
        return NULL;
    }
    return e->body.data + e->body.len;
}

static void took_room(struct fk_encoder *e, const unsigned char *end, size_t blocks)
{
    e->body.len = (size_t)(end - e->body.data);
    e->events++;
    e->blocks += (uint32_t)blocks;
}

static void add_run(struct fk_encoder *e, const flexkv_event *ev, size_t n)
{
    unsigned char *at = make_room(e, EVENT_BYTES + text_bytes(ev->lora_name) + text_bytes(ev->cache_salt) +
                                         n * block_bytes(ev));

    if (at)
        took_room(e, ev->kind == FLEXKV_EVENT_STORED ? put_stored(at, ev, n) : put_removed(at, ev, n), n);
    else
        e->events++;
}

size_t fk_encoder_add(struct fk_encoder *e, const flexkv_event *events, size_t n)
{
    size_t done = 0;

    while (done < n && e->body.len < e->limit && !e->failed) {
        size_t run = run_of(events + done, n - done, e->limit - e->body.len);
        add_run(e, events + done, run);
        done += run;
    }
    return e->failed ? n : done;
}

void fk_encoder_clear(struct fk_encoder *e)
{
    unsigned char *at = make_room(e, EVENT_BYTES);

    e->clears = true;
    if (at)
        took_room(e, put_text(put_text(put_map(at, 1), "type"), "AllBlocksCleared"), 0);
}

int fk_encoder_batch(const struct fk_encoder *e, double ts, int64_t rank, struct fk_batch **out)
{
    unsigned char head[HEAD_BYTES], tail[HEAD_BYTES];
    unsigned char *head_end = put_array(put_double(put_array(head, 3), ts), e->events);
    unsigned char *tail_end = rank < 0 ? put_nil(tail) : put_uint(tail, (uint64_t)rank);
    size_t before = (size_t)(head_end - head), behind = (size_t)(tail_end - tail);

    *out = e->failed ? NULL : fk_batch_new(before + e->body.len + behind);
    if (!*out)
        return -ENOMEM;
    memcpy((*out)->data, head, before);
    if (e->body.len)
        memcpy((*out)->data + before, e->body.data, e->body.len);
    memcpy((*out)->data + before + e->body.len, tail, behind);
    (*out)->clears = e->clears;
    (*out)->blocks = e->blocks;
    return 0;
}

void fk_encoder_reset(struct fk_encoder *e)
{
    e->body.len = 0;
    e->events = e->blocks = 0;
    e->clears = e->failed = false;
}
