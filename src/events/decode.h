/*
 * decode.h - the msgpack bytes of one batch -> events, of our streams and of other publishers': maps
 * (vLLM, ours) and arrays with the tag first (SGLang), hashes signed or not.
 *
 * Bytes from outside: everything is checked, nothing is allocated on the word of a length. What a
 * router throws away as a whole (an unknown type of event, a field of the wrong type, a hash that is
 * bytes) is refused here as well, with the reason; what it takes but does not understand is left to
 * check.h. Memory only, one thread. Part of the program, not of the library.
 */
#ifndef FK_EVENTS_DECODE_H
#define FK_EVENTS_DECODE_H

#include "base/util.h"

enum fk_stream_type { FK_STREAM_STORED = 1, FK_STREAM_REMOVED, FK_STREAM_CLEARED };

/* Bytes of the payload; not terminated. data NULL: not given, or nil. */
struct fk_text { const char *data; size_t len; };

struct fk_stream_event {
    uint8_t type;                   /* enum fk_stream_type */
    bool array;                     /* the form with the tag first */
    bool has_parent, has_group, has_ownership;
    uint32_t block_size;
    size_t hash_at, n_hashes;       /* in the batch's hashes */
    size_t token_at, n_tokens;      /* in its tokens */
    uint64_t parent;
    int64_t group;
    struct fk_text medium, lora_name, cache_salt, spec_kind, locality;
};

struct fk_stream_batch {
    double ts;
    bool has_rank;
    int64_t rank;
    FK_VEC(struct fk_stream_event) events;
    FK_VEC(uint64_t) hashes;
    FK_VEC(uint32_t) tokens;
    char why[160];                  /* of a refused one */
};

/* Over a zeroed or used batch, whose memory is used again; texts point into the payload. 0, -ENOMEM,
 * or -EBADMSG and why: nothing of the batch is to be used then. */
int fk_stream_decode(const void *payload, size_t bytes, struct fk_stream_batch *out);
void fk_stream_batch_free(struct fk_stream_batch *b);

static inline const uint64_t *fk_stream_hashes(const struct fk_stream_batch *b,
                                               const struct fk_stream_event *ev)
{
    return b->hashes.data + ev->hash_at;
}

static inline const uint32_t *fk_stream_tokens(const struct fk_stream_batch *b,
                                               const struct fk_stream_event *ev)
{
    return b->tokens.data + ev->token_at;
}

static inline bool fk_text_is(struct fk_text t, const char *s)
{
    return t.data && t.len == strlen(s) && !memcmp(t.data, s, t.len);
}

#endif
