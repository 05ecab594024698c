/*
 * fuzz_event_request.c - libFuzzer target: requests for batches that were missed, as the network gives
 * them, and the ring that answers them.
 *
 * Input: [frames][bytes of each ...][the frames' bytes]; then one byte for each batch of the ring: its
 * size, and with the highest bit, that it clears all.
 */
#include "base/util.h"
#include "events/history.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void try_ring(const uint8_t *data, size_t size, uint64_t start)
{
    struct fk_history h;
    uint64_t seq = 1000;

    if (fk_history_init(&h, 5, 300))
        return;
    for (size_t i = 0; i < size; i++) {
        struct fk_batch *b = fk_batch_new(data[i]);
        if (!b)
            break;
        b->seq = seq++;
        b->clears = data[i] >> 7;
        fk_history_push(&h, b);
        fk_batch_unref(b);
        if (h.count > 5 || h.bytes > 300)
            __builtin_trap();
    }
    uint64_t next = start;
    const struct fk_batch *b;
    for (unsigned n = 0; (b = fk_history_at(&h, next)); n++) {
        if (b->seq < next || n > 5)
            __builtin_trap();
        next = b->seq + 1;
    }
    fk_history_covers(&h, start);
    fk_history_free(&h);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct fk_frame frame[4];
    uint64_t start = 0;
    size_t n = size ? data[0] % 5 : 0, at = 1 + n;

    if (size < at)
        return 0;
    for (size_t i = 0; i < n; i++) {
        size_t bytes = fk_min((size_t)data[1 + i], size - at);
        frame[i] = (struct fk_frame){ data + at, bytes };
        at += bytes;
    }
    if (!fk_history_parse_request(frame, n, &start) && n != 1 && n != 2)
        __builtin_trap();
    try_ring(data + at, size - at, start);
    return 0;
}
