/*
 * wire.h - what FlexKV nodes say to each other on the control connection of a transport: frames, hello with proof
 * of membership, requests and answers. Bytes in, bytes out: no sockets, no clock. docs/transport.md describes it
 * for other implementations; every parser here is fuzzed (fuzz/fuzz_peer.c).
 *
 *   frame    u32 bytes of the payload | u16 type | u16 zero | payload | 16 bytes of MAC, after the hello
 *   hello    reader: HELLO    owner: CHALLENGE    reader: PROOF    owner: WELCOME, or REFUSE at any step
 *
 * All numbers little-endian. One thread at a time.
 */
#ifndef FK_TRANSPORT_WIRE_H
#define FK_TRANSPORT_WIRE_H

#include <openssl/sha.h>

#include "transport/stream.h"
#include "transport/transport.h"

#define FK_WIRE_VERSION 1u
#define FK_FRAME_HEAD 8u
#define FK_FRAME_MAC 16u
#define FK_FRAME_MAX (256u << 10)       /* of a payload */
#define FK_ENDPOINT_MAX 256u            /* the name of a libfabric endpoint */
#define FK_REQUEST_BYTES 88u
#define FK_ANSWER_BYTES 24u
#define FK_DATA_BYTES 16u
#define FK_FRAME_REQUESTS 1024u         /* at most in a frame */
#define FK_SECRET_MIN 8u

enum fk_frame_type {
    FK_FRAME_HELLO = 1, FK_FRAME_CHALLENGE, FK_FRAME_PROOF, FK_FRAME_WELCOME, FK_FRAME_REFUSE, FK_FRAME_READ,
    FK_FRAME_ANSWER, FK_FRAME_MEMORY, FK_FRAME_DATA
};

enum fk_refusal { FK_REFUSED_VERSION = 1, FK_REFUSED_CLUSTER, FK_REFUSED_SECRET, FK_REFUSED_TRANSPORT,
                  FK_REFUSED_FULL };

struct fk_mac { SHA256_CTX inner, outer; };     /* HMAC-SHA-256 with its key worked in */
void fk_mac_init(struct fk_mac *m, const void *key, size_t bytes);
/* Over the parts one after the other. */
void fk_mac_of(const struct fk_mac *m, const struct iovec *parts, int n, uint8_t out[32]);

struct fk_request {
    uint64_t id;
    struct fk_block_ref block;
    uint64_t rkey, raddr;           /* where the payload goes: the reader's memory as libfabric names it */
};

struct fk_answer {
    uint64_t id;
    int32_t rc;
    uint32_t bytes;
    uint64_t checksum;
};

struct fk_hello_params {            /* the caller's, alive as long as the session */
    const char *secret, *cluster, *transport;
    uint64_t node, epoch;
    uint32_t max_in_flight;
};

struct fk_session {
    const struct fk_hello_params *params;
    bool reader, done;
    int step;
    struct fk_mac secret, send, receive;
    uint64_t sent, received;        /* frames with a MAC */
    uint8_t transcript[1024];       /* HELLO, CHALLENGE, PROOF */
    size_t transcript_len;
    uint8_t endpoint[FK_ENDPOINT_MAX];  /* reader: mine, set before it starts; owner: the reader's */
    uint32_t endpoint_len;
    uint64_t peer_node, peer_epoch; /* reader: the owner's */
    uint32_t peer_in_flight;
    int refusal;                    /* enum fk_refusal, after -EACCES */
};

/* Reader: queues HELLO. Owner: nothing yet. */
int fk_session_start(struct fk_session *s, const struct fk_hello_params *p, bool reader, struct fk_stream *out);
/*
 * Takes the next whole frame out of the stream. 1: type and payload (valid until the stream is read again);
 * 0: none yet; -EPROTO: no frame; -EBADMSG: its MAC is wrong.
 */
int fk_frame_next(struct fk_session *s, struct fk_stream *in, unsigned *type, const uint8_t **payload,
                  uint32_t *bytes);
/* A frame of the hello. 1: both know each other; 0: goes on; -EPROTO, -EACCES (refusal). */
int fk_session_hello(struct fk_session *s, unsigned type, const uint8_t *payload, uint32_t bytes,
                     struct fk_stream *out);
const char *fk_refusal_text(int refusal);
int fk_session_refuse(struct fk_session *s, struct fk_stream *out, enum fk_refusal why);

/* Frames of n requests or answers (n > 0, at most FK_FRAME_REQUESTS). */
int fk_put_requests(struct fk_session *s, struct fk_stream *out, const struct fk_request *r, uint32_t n);
int fk_put_answers(struct fk_session *s, struct fk_stream *out, const struct fk_answer *a, uint32_t n);
/* What a mover has to say of the reader's memory, as it is. */
int fk_put_memory(struct fk_session *s, struct fk_stream *out, const void *data, size_t bytes);
/* The bytes of a read follow the frame, without a MAC: the answer has their checksum. */
int fk_put_data(struct fk_session *s, struct fk_stream *out, uint64_t id, uint32_t bytes);
int fk_data_get(const uint8_t *payload, uint32_t payload_bytes, uint64_t *id, uint32_t *bytes);     /* 0 or -EPROTO */
/* How many are in the payload, or -EPROTO. */
int fk_request_count(uint32_t bytes);
int fk_request_get(const uint8_t *payload, uint32_t i, struct fk_request *r);       /* 0 or -EPROTO */
int fk_answer_count(uint32_t bytes);
int fk_answer_get(const uint8_t *payload, uint32_t i, struct fk_answer *a);

#endif
