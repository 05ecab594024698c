/*
 * hello.c - two nodes prove to each other that they know the cluster's secret, without saying it. The reader
 * proves first: a stranger who connects gets no bytes that depend on the secret.
 *
 *   HELLO      magic 8 | version 4 | zero 4 | node 8 | nonce 32 | cluster 64 | transport 16
 *   CHALLENGE  version 4 | zero 4 | nonce 32
 *   PROOF      HMAC("flexkv reader", HELLO, CHALLENGE, rest) 32 | rest: zero 2, bytes 2, endpoint
 *   WELCOME    HMAC("flexkv owner", HELLO, CHALLENGE, PROOF, rest) 32 | rest: node 8, epoch 8, in flight 4, zero 4
 *   REFUSE     why 4
 *
 * Both nonces are in what is signed, so nothing can be replayed; HELLO and CHALLENGE differ in length and the
 * labels differ, so nothing can be sent back. The keys of the frames that follow come from the same exchange.
 */
#define OPENSSL_SUPPRESS_DEPRECATED
#include <openssl/crypto.h>
#include <openssl/rand.h>

#include "base/util.h"
#include "transport/wire_impl.h"

#define HELLO_BYTES 136u
#define CHALLENGE_BYTES 40u
#define PROOF_BYTES 36u                 /* and the endpoint */
#define WELCOME_BYTES 56u
#define CLUSTER_BYTES 64u
#define TRANSPORT_BYTES 16u

static const uint8_t magic[8] = "FLEXKVT";

static void remember(struct fk_session *s, const void *data, size_t bytes)
{
    memcpy(s->transcript + s->transcript_len, data, bytes);     /* at most 136 + 40 + 36 + 256 */
    s->transcript_len += bytes;
}

static void sign(const struct fk_session *s, const char *label, const void *rest, size_t bytes, uint8_t out[32])
{
    struct iovec parts[] = { { (void *)(uintptr_t)label, strlen(label) + 1 },
                             { (void *)(uintptr_t)s->transcript, s->transcript_len },
                             { (void *)(uintptr_t)rest, bytes } };

    fk_mac_of(&s->secret, parts, 3, out);
}

static void make_keys(struct fk_session *s)
{
    uint8_t key[32];

    sign(s, "flexkv from reader", NULL, 0, key);
    fk_mac_init(s->reader ? &s->send : &s->receive, key, sizeof(key));
    sign(s, "flexkv from owner", NULL, 0, key);
    fk_mac_init(s->reader ? &s->receive : &s->send, key, sizeof(key));
    OPENSSL_cleanse(key, sizeof(key));
}

int fk_session_start(struct fk_session *s, const struct fk_hello_params *p, bool reader, struct fk_stream *out)
{
    s->params = p;
    s->reader = reader;
    fk_mac_init(&s->secret, p->secret, strlen(p->secret));
    if (!reader)
        return 0;
    uint8_t *h = fk_frame_begin(s, out, FK_FRAME_HELLO, HELLO_BYTES);
    if (!h)
        return -ENOMEM;
    memset(h, 0, HELLO_BYTES);
    memcpy(h, magic, sizeof(magic));
    fk_put32(h + 8, FK_WIRE_VERSION);
    fk_put64(h + 16, p->node);
    if (RAND_bytes(h + 24, 32) != 1)
        return -EIO;
    memcpy(h + 56, p->cluster, fk_min(strlen(p->cluster), (size_t)CLUSTER_BYTES));
    memcpy(h + 56 + CLUSTER_BYTES, p->transport, fk_min(strlen(p->transport), (size_t)TRANSPORT_BYTES));
    remember(s, h, HELLO_BYTES);
    return 0;
}

int fk_session_refuse(struct fk_session *s, struct fk_stream *out, enum fk_refusal why)
{
    uint8_t *p = fk_frame_begin(s, out, FK_FRAME_REFUSE, 4);

    if (p)
        fk_put32(p, why);
    s->refusal = (int)why;
    return -EACCES;
}

const char *fk_refusal_text(int refusal)
{
    static const char *const text[] = {
        [FK_REFUSED_VERSION] = "it speaks another version of the protocol",
        [FK_REFUSED_CLUSTER] = "it belongs to another cluster: compare the clusters' names",
        [FK_REFUSED_SECRET] = "the shared secrets differ",
        [FK_REFUSED_TRANSPORT] = "it uses another transport",
        [FK_REFUSED_FULL] = "it has too many connections",
    };

    return refusal > 0 && refusal < (int)fk_array_size(text) ? text[refusal] : "for no reason that is known here";
}

static bool name_is(const uint8_t *field, size_t bytes, const char *name)
{
    size_t n = fk_min(strlen(name), bytes);

    for (size_t i = n; i < bytes; i++)
        if (field[i])
            return false;
    return memcmp(field, name, n) == 0;
}

/* Owner: HELLO -> CHALLENGE. */
static int on_hello(struct fk_session *s, const uint8_t *h, uint32_t bytes, struct fk_stream *out)
{
    if (bytes != HELLO_BYTES || memcmp(h, magic, sizeof(magic)))
        return -EPROTO;
    if (fk_get32(h + 8) != FK_WIRE_VERSION)
        return fk_session_refuse(s, out, FK_REFUSED_VERSION);
    if (!name_is(h + 56, CLUSTER_BYTES, s->params->cluster))
        return fk_session_refuse(s, out, FK_REFUSED_CLUSTER);
    if (!name_is(h + 56 + CLUSTER_BYTES, TRANSPORT_BYTES, s->params->transport))
        return fk_session_refuse(s, out, FK_REFUSED_TRANSPORT);
    s->peer_node = fk_get64(h + 16);
    remember(s, h, HELLO_BYTES);
    uint8_t *c = fk_frame_begin(s, out, FK_FRAME_CHALLENGE, CHALLENGE_BYTES);
    if (!c)
        return -ENOMEM;
    fk_put32(c, FK_WIRE_VERSION);
    fk_put32(c + 4, 0);
    if (RAND_bytes(c + 8, 32) != 1)
        return -EIO;
    remember(s, c, CHALLENGE_BYTES);
    s->step = 1;
    return 0;
}

/* Reader: CHALLENGE -> PROOF. */
static int on_challenge(struct fk_session *s, const uint8_t *c, uint32_t bytes, struct fk_stream *out)
{
    if (bytes != CHALLENGE_BYTES || fk_get32(c) != FK_WIRE_VERSION)
        return -EPROTO;
    remember(s, c, CHALLENGE_BYTES);
    uint8_t *p = fk_frame_begin(s, out, FK_FRAME_PROOF, PROOF_BYTES + s->endpoint_len);
    if (!p)
        return -ENOMEM;
    fk_put16(p + 32, 0);
    fk_put16(p + 34, (uint16_t)s->endpoint_len);
    memcpy(p + PROOF_BYTES, s->endpoint, s->endpoint_len);
    sign(s, "flexkv reader", p + 32, 4 + s->endpoint_len, p);
    remember(s, p, PROOF_BYTES + s->endpoint_len);
    s->step = 1;
    return 0;
}

/* Owner: PROOF -> WELCOME. */
static int on_proof(struct fk_session *s, const uint8_t *p, uint32_t bytes, struct fk_stream *out)
{
    uint8_t mac[32];

    if (bytes < PROOF_BYTES || bytes - PROOF_BYTES > FK_ENDPOINT_MAX || fk_get16(p + 32) ||
        fk_get16(p + 34) != bytes - PROOF_BYTES)
        return -EPROTO;
    sign(s, "flexkv reader", p + 32, bytes - 32, mac);
    if (CRYPTO_memcmp(mac, p, sizeof(mac)))
        return fk_session_refuse(s, out, FK_REFUSED_SECRET);
    s->endpoint_len = bytes - PROOF_BYTES;
    memcpy(s->endpoint, p + PROOF_BYTES, s->endpoint_len);
    remember(s, p, bytes);
    uint8_t *w = fk_frame_begin(s, out, FK_FRAME_WELCOME, WELCOME_BYTES);
    if (!w)
        return -ENOMEM;
    fk_put64(w + 32, s->params->node);
    fk_put64(w + 40, s->params->epoch);
    fk_put32(w + 48, s->params->max_in_flight);
    fk_put32(w + 52, 0);
    sign(s, "flexkv owner", w + 32, WELCOME_BYTES - 32, w);
    make_keys(s);
    s->done = true;
    return 1;
}

/* Reader: WELCOME. */
static int on_welcome(struct fk_session *s, const uint8_t *w, uint32_t bytes)
{
    uint8_t mac[32];

    if (bytes != WELCOME_BYTES)
        return -EPROTO;
    sign(s, "flexkv owner", w + 32, WELCOME_BYTES - 32, mac);
    if (CRYPTO_memcmp(mac, w, sizeof(mac))) {
        s->refusal = FK_REFUSED_SECRET;
        return -EACCES;
    }
    s->peer_node = fk_get64(w + 32);
    s->peer_epoch = fk_get64(w + 40);
    s->peer_in_flight = fk_get32(w + 48);
    if (!s->peer_in_flight)
        return -EPROTO;
    make_keys(s);
    s->done = true;
    return 1;
}

int fk_session_hello(struct fk_session *s, unsigned type, const uint8_t *payload, uint32_t bytes,
                     struct fk_stream *out)
{
    if (type == FK_FRAME_REFUSE && s->reader && bytes == 4) {
        s->refusal = (int)fk_min(fk_get32(payload), 1000u);
        return -EACCES;
    }
    if (!s->reader && s->step == 0 && type == FK_FRAME_HELLO)
        return on_hello(s, payload, bytes, out);
    if (!s->reader && s->step == 1 && type == FK_FRAME_PROOF)
        return on_proof(s, payload, bytes, out);
    if (s->reader && s->step == 0 && type == FK_FRAME_CHALLENGE)
        return on_challenge(s, payload, bytes, out);
    if (s->reader && s->step == 1 && type == FK_FRAME_WELCOME)
        return on_welcome(s, payload, bytes);
    return -EPROTO;
}
