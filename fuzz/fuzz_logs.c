/*
 * fuzz_logs.c - libFuzzer target: heads and logs of nodes that keep blocks in a bucket. Nothing may crash; what is taken must
 * have all that it tells of, within the bytes that there are, and a log must be the asked one.
 *
 * Input: byte 0: bit 0 a log, else a head; bit 1 seal it with a sound magic, order, version and crc; then its bytes.
 */
#include <string.h>

#include "base/util.h"
#include "store/logs.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void try_head(const uint8_t *data, size_t size, bool seal)
{
    static struct store_head_object h;
    size_t n = fk_min(size, sizeof(h));

    memset(&h, 0, sizeof(h));
    memcpy(&h, data, n);
    if (seal) {
        h.head.chapters %= STORE_HEAD_CHAPTERS + 1;
        n = fk_max(n, store_head_seal(&h));
    }
    if (!store_head_sound(&h, n))
        return;
    if (h.head.chapters > STORE_HEAD_CHAPTERS || sizeof(h.head) + h.head.chapters * sizeof(h.chapter[0]) > n ||
        h.head.slots > STORE_HEAD_SLOTS)
        __builtin_trap();
    for (uint32_t i = 0; i < h.head.chapters; i++)
        if (h.chapter[i].first > h.chapter[i].logs || h.chapter[i].keys > STORE_LOG_KEYS)
            __builtin_trap();
}

static void try_log(const uint8_t *data, size_t size, bool seal)
{
    static struct store_log_object l;
    size_t n = fk_min(size, sizeof(l));
    uint8_t other[16];

    memset(&l, 0, sizeof(l));
    memcpy(&l, data, n);
    if (seal) {
        l.log.keys %= STORE_LOG_KEYS + 1;
        n = fk_max(n, store_log_seal(&l));
    }
    uint32_t number = l.log.number;
    memcpy(other, l.log.uuid, sizeof(other));
    other[3] ^= 1;
    if (store_log_sound(&l, n, other, number) || store_log_sound(&l, n, l.log.uuid, number + 1))
        __builtin_trap();
    bool sound = store_log_sound(&l, n, l.log.uuid, number);
    if (seal != sound && seal)
        __builtin_trap();
    if (sound && (l.log.keys > STORE_LOG_KEYS || sizeof(l.log) + l.log.keys * sizeof(l.key[0]) > n))
        __builtin_trap();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (!size)
        return 0;
    if (*data & 1)
        try_log(data + 1, size - 1, *data & 2);
    else
        try_head(data + 1, size - 1, *data & 2);
    return 0;
}
