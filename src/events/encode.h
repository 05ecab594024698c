/*
 * encode.h - events -> the msgpack bytes of one batch, as routers read them:
 *
 *   [ts float64, [event...], data_parallel_rank int|nil]                    three, never more
 *   {"type": "BlockStored", "block_hashes": [u64...], "parent_block_hash": u64|nil,
 *    "token_ids": [u32...], "block_size": n, "lora_id": nil, "lora_name": str|nil,
 *    "medium": "CPU"|"STORAGE"|"EXTERNAL", "cache_salt": str (only where there is one)}
 *   {"type": "BlockRemoved", "block_hashes": [u64...], "medium": ...}
 *   {"type": "AllBlocksCleared"}
 *
 * Neighbouring blocks go into one event: stored ones that are a chain in one medium, removed ones of
 * one medium. Memory only; used by one thread. Called by the publisher, `flexkv events` and tests.
 */
#ifndef FK_EVENTS_ENCODE_H
#define FK_EVENTS_ENCODE_H

#include "base/util.h"
#include "flexkv/flexkv.h"
#include "events/history.h"

struct fk_encoder {
    FK_VEC(unsigned char) body;             /* the batch's events, one behind the other */
    size_t limit;                   /* bytes of body from which the batch is full */
    uint32_t events, blocks;
    bool clears;
    bool failed;                    /* no memory: the batch is not whole */
};

void fk_encoder_init(struct fk_encoder *e, size_t limit_bytes);
void fk_encoder_free(struct fk_encoder *e);
/* Appends events until the batch is full; returns how many it took. At least one fits an empty one. */
size_t fk_encoder_add(struct fk_encoder *e, const flexkv_event *events, size_t n);
/* Receivers forget all: the first event of a batch. */
void fk_encoder_clear(struct fk_encoder *e);
static inline bool fk_encoder_empty(const struct fk_encoder *e) { return e->events == 0; }
/* The batch, without its number, for a rank; < 0: nil. -ENOMEM. */
int fk_encoder_batch(const struct fk_encoder *e, double ts, int64_t rank, struct fk_batch **out);
/* Begins the next batch. */
void fk_encoder_reset(struct fk_encoder *e);

/* An engine's own blocks, which only `flexkv events --merge` tells of. */
#define FK_MEDIUM_DEVICE 0

/* "GPU", "CPU", "STORAGE" or "EXTERNAL"; NULL: no such medium. */
const char *fk_medium_name(uint8_t medium);

#endif
