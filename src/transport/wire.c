/* wire.c - frames, requests and answers. See wire.h. */
#define OPENSSL_SUPPRESS_DEPRECATED
#include "transport/wire.h"

#include <endian.h>
#include <openssl/crypto.h>

#include "base/util.h"
#include "transport/wire_impl.h"

/* ---- HMAC-SHA-256 (RFC 2104); the one-shot functions of OpenSSL 3 fetch the algorithm each time ---- */

void fk_mac_init(struct fk_mac *m, const void *key, size_t bytes)
{
    uint8_t pad[SHA256_CBLOCK] = { 0 };

    if (bytes > sizeof(pad))
        SHA256(key, bytes, pad);
    else
        memcpy(pad, key, bytes);
    for (size_t i = 0; i < sizeof(pad); i++)
        pad[i] ^= 0x36;
    SHA256_Init(&m->inner);
    SHA256_Update(&m->inner, pad, sizeof(pad));
    for (size_t i = 0; i < sizeof(pad); i++)
        pad[i] ^= 0x36 ^ 0x5c;
    SHA256_Init(&m->outer);
    SHA256_Update(&m->outer, pad, sizeof(pad));
    OPENSSL_cleanse(pad, sizeof(pad));
}

void fk_mac_of(const struct fk_mac *m, const struct iovec *parts, int n, uint8_t out[32])
{
    SHA256_CTX c = m->inner;

    for (int i = 0; i < n; i++)
        SHA256_Update(&c, parts[i].iov_base, parts[i].iov_len);
    SHA256_Final(out, &c);
    c = m->outer;
    SHA256_Update(&c, out, 32);
    SHA256_Final(out, &c);
}

/* ---- frames ---- */

/* The number of the frame is in the MAC: none can be left out, repeated or sent back. */
static void frame_mac(const struct fk_mac *m, uint64_t number, const uint8_t *frame, size_t bytes,
                      uint8_t out[32])
{
    uint64_t le = htole64(number);
    struct iovec parts[] = { { &le, sizeof(le) }, { (void *)(uintptr_t)frame, bytes } };

    fk_mac_of(m, parts, 2, out);
}

uint8_t *fk_frame_begin(struct fk_session *s, struct fk_stream *out, unsigned type, uint32_t bytes)
{
    uint8_t *p = fk_stream_room(out, FK_FRAME_HEAD + bytes + (s->done ? FK_FRAME_MAC : 0));

    if (!p)
        return NULL;
    fk_put32(p, bytes);
    fk_put16(p + 4, (uint16_t)type);
    fk_put16(p + 6, 0);
    return p + FK_FRAME_HEAD;
}

void fk_frame_end(struct fk_session *s, uint8_t *payload, uint32_t bytes)
{
    uint8_t mac[32];

    if (!s->done)
        return;
    frame_mac(&s->send, s->sent++, payload - FK_FRAME_HEAD, FK_FRAME_HEAD + bytes, mac);
    memcpy(payload + bytes, mac, FK_FRAME_MAC);
}

int fk_frame_next(struct fk_session *s, struct fk_stream *in, unsigned *type, const uint8_t **payload,
                  uint32_t *bytes)
{
    const uint8_t *p = fk_stream_data(in);
    size_t have = fk_stream_unread(in), mac_bytes = s->done ? FK_FRAME_MAC : 0;
    uint8_t mac[32];

    if (have < FK_FRAME_HEAD)
        return 0;
    *bytes = fk_get32(p);
    *type = fk_get16(p + 4);
    if (*bytes > (s->done ? FK_FRAME_MAX : FK_HELLO_MAX) || fk_get16(p + 6))
        return -EPROTO;
    if (have < FK_FRAME_HEAD + *bytes + mac_bytes)
        return 0;
    if (s->done) {
        frame_mac(&s->receive, s->received++, p, FK_FRAME_HEAD + *bytes, mac);
        if (CRYPTO_memcmp(mac, p + FK_FRAME_HEAD + *bytes, FK_FRAME_MAC))
            return -EBADMSG;
    }
    *payload = p + FK_FRAME_HEAD;
    fk_stream_used(in, FK_FRAME_HEAD + *bytes + mac_bytes);
    return 1;
}

/* ---- requests and answers ---- */

static void put_request(uint8_t *p, const struct fk_request *r)
{
    const struct fk_block_ref *b = &r->block;

    fk_put64(p, r->id);
    fk_put64(p + 8, b->key.lo);
    fk_put64(p + 16, b->key.hi);
    fk_put64(p + 24, b->space);
    fk_put64(p + 32, b->ns);
    fk_put64(p + 40, b->epoch);
    fk_put64(p + 48, b->generation);
    fk_put32(p + 56, b->slot);
    fk_put32(p + 60, b->tier);
    fk_put32(p + 64, b->bytes);
    fk_put32(p + 68, 0);
    fk_put64(p + 72, r->rkey);
    fk_put64(p + 80, r->raddr);
}

int fk_request_get(const uint8_t *payload, uint32_t i, struct fk_request *r)
{
    const uint8_t *p = payload + (size_t)i * FK_REQUEST_BYTES;
    struct fk_block_ref *b = &r->block;

    r->id = fk_get64(p);
    b->key = (struct fk_key){ fk_get64(p + 8), fk_get64(p + 16) };
    b->space = fk_get64(p + 24);
    b->ns = fk_get64(p + 32);
    b->epoch = fk_get64(p + 40);
    b->generation = fk_get64(p + 48);
    b->slot = fk_get32(p + 56);
    b->tier = fk_get32(p + 60);
    b->bytes = fk_get32(p + 64);
    r->rkey = fk_get64(p + 72);
    r->raddr = fk_get64(p + 80);
    /* Without a key it would name a place: members must name blocks. */
    return fk_key_is_zero(b->key) || !b->bytes || b->bytes > FK_TRANSPORT_BLOCK_MAX || fk_get32(p + 68)
           ? -EPROTO : 0;
}

static const struct { int rc; uint32_t code; } codes[] = {
    { 0, 0 }, { -ENOENT, 1 }, { -EACCES, 2 }, { -EAGAIN, 3 }, { -EIO, 4 },
};

static uint32_t code_of(int rc)
{
    for (size_t i = 0; i < fk_array_size(codes); i++)
        if (codes[i].rc == rc)
            return codes[i].code;
    return 4;
}

int fk_answer_get(const uint8_t *payload, uint32_t i, struct fk_answer *a)
{
    const uint8_t *p = payload + (size_t)i * FK_ANSWER_BYTES;
    uint32_t code = fk_get32(p + 8);

    if (code >= fk_array_size(codes))
        return -EPROTO;
    a->id = fk_get64(p);
    a->rc = codes[code].rc;
    a->bytes = fk_get32(p + 12);
    a->checksum = fk_get64(p + 16);
    return 0;
}

static int count_of(uint32_t bytes, uint32_t each)
{
    uint32_t n = bytes / each;

    return n && n * each == bytes && n <= FK_FRAME_REQUESTS ? (int)n : -EPROTO;
}

int fk_request_count(uint32_t bytes) { return count_of(bytes, FK_REQUEST_BYTES); }
int fk_answer_count(uint32_t bytes) { return count_of(bytes, FK_ANSWER_BYTES); }

int fk_put_requests(struct fk_session *s, struct fk_stream *out, const struct fk_request *r, uint32_t n)
{
    uint8_t *p = fk_frame_begin(s, out, FK_FRAME_READ, n * FK_REQUEST_BYTES);

    if (!p)
        return -ENOMEM;
    for (uint32_t i = 0; i < n; i++)
        put_request(p + (size_t)i * FK_REQUEST_BYTES, &r[i]);
    fk_frame_end(s, p, n * FK_REQUEST_BYTES);
    return 0;
}

int fk_put_answers(struct fk_session *s, struct fk_stream *out, const struct fk_answer *a, uint32_t n)
{
    uint8_t *p = fk_frame_begin(s, out, FK_FRAME_ANSWER, n * FK_ANSWER_BYTES);

    if (!p)
        return -ENOMEM;
    for (uint32_t i = 0; i < n; i++) {
        uint8_t *q = p + (size_t)i * FK_ANSWER_BYTES;
        fk_put64(q, a[i].id);
        fk_put32(q + 8, code_of(a[i].rc));
        fk_put32(q + 12, a[i].bytes);
        fk_put64(q + 16, a[i].checksum);
    }
    fk_frame_end(s, p, n * FK_ANSWER_BYTES);
    return 0;
}

int fk_put_memory(struct fk_session *s, struct fk_stream *out, const void *data, size_t bytes)
{
    uint8_t *p = bytes <= FK_FRAME_MAX ? fk_frame_begin(s, out, FK_FRAME_MEMORY, (uint32_t)bytes) : NULL;

    if (!p)
        return bytes <= FK_FRAME_MAX ? -ENOMEM : -EMSGSIZE;
    memcpy(p, data, bytes);
    fk_frame_end(s, p, (uint32_t)bytes);
    return 0;
}

int fk_put_data(struct fk_session *s, struct fk_stream *out, uint64_t id, uint32_t bytes)
{
    uint8_t *p = fk_frame_begin(s, out, FK_FRAME_DATA, FK_DATA_BYTES);

    if (!p)
        return -ENOMEM;
    fk_put64(p, id);
    fk_put32(p + 8, bytes);
    fk_put32(p + 12, 0);
    fk_frame_end(s, p, FK_DATA_BYTES);
    return 0;
}

int fk_data_get(const uint8_t *payload, uint32_t payload_bytes, uint64_t *id, uint32_t *bytes)
{
    if (payload_bytes != FK_DATA_BYTES || fk_get32(payload + 12))
        return -EPROTO;
    *id = fk_get64(payload);
    *bytes = fk_get32(payload + 8);
    return 0;
}
