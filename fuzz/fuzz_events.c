/*
 * fuzz_events.c - libFuzzer target: any bytes as the batches of a KV event stream, as a router's or an
 * engine's network gives them. Beside the sanitizers' checks: what was accepted lies within its arrays,
 * what was refused has a reason, and the judge goes on whatever it is told.
 *
 * Input: batches, each behind a length of two bytes (the first one's number is its first byte).
 */
#include "events/check.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void check_batch(const struct fk_stream_batch *b, const uint8_t *payload, size_t bytes)
{
    uint64_t sum = 0;

    for (size_t i = 0; i < b->events.len; i++) {
        const struct fk_stream_event *ev = &b->events.data[i];
        const struct fk_text texts[] = { ev->medium, ev->lora_name, ev->cache_salt, ev->spec_kind,
                                         ev->locality };
        if (ev->hash_at + ev->n_hashes > b->hashes.len || ev->token_at + ev->n_tokens > b->tokens.len ||
            ev->type < FK_STREAM_STORED || ev->type > FK_STREAM_CLEARED ||
            (ev->type == FK_STREAM_STORED && ev->block_size == 0))
            __builtin_trap();
        for (size_t k = 0; k < fk_array_size(texts); k++)
            if (texts[k].data && ((const uint8_t *)texts[k].data < payload ||
                                  (const uint8_t *)texts[k].data + texts[k].len > payload + bytes))
                __builtin_trap();
        for (size_t k = 0; k < ev->n_hashes; k++)
            sum += fk_stream_hashes(b, ev)[k];
        for (size_t k = 0; k < ev->n_tokens; k++)
            sum += fk_stream_tokens(b, ev)[k];
    }
    volatile uint64_t used = sum;
    (void)used;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct fk_stream_batch decoded = { 0 };
    struct fk_check check;
    uint64_t seq = size ? data[0] : 0;

    fk_check_init(&check, NULL, NULL);
    while (size >= 2) {
        size_t n = fk_min((size_t)(data[0] | data[1] << 8), size - 2);
        unsigned char number[8];
        data += 2;
        size -= 2;
        fk_put_be64(number, seq++);
        struct fk_frame frames[3] = { { "", 0 }, { number, 8 }, { data, n } };
        int rc = fk_check_message(&check, frames, 3, &decoded);
        if (rc == 0)
            check_batch(&decoded, data, n);
        else if (rc == -EBADMSG && !decoded.why[0])
            __builtin_trap();
        data += n;
        size -= n;
    }
    fk_check_free(&check);
    fk_stream_batch_free(&decoded);
    return 0;
}
