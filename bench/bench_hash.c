/*
 * bench_hash.c - deriving keys, per block of 16 and of 64 tokens, and the checksum of a block,
 * against the bare hash function over as many bytes that lie ready.
 */
#define OPENSSL_SUPPRESS_DEPRECATED
#include <openssl/sha.h>
#include <stdio.h>
#include <string.h>
#define XXH_INLINE_ALL
#include <xxhash.h>

#include "base/checksum.h"
#include "base/clock.h"
#include "base/key.h"
#include "base/util.h"
#include "bench.h"

#define BLOCKS 4096u
#define RUNS 101

static uint32_t tokens[BLOCKS * 64];
static struct fk_key keys[BLOCKS];
static volatile uint64_t sink;

static double chain_ns(enum fk_key_scheme scheme, uint32_t tokens_per_block)
{
    uint64_t start = fk_clock_ns();

    fk_key_chain(scheme, (struct fk_key){ 1, 2 }, tokens, tokens_per_block, BLOCKS, keys);
    sink = keys[BLOCKS - 1].lo;
    return (double)(fk_clock_ns() - start) / BLOCKS;
}

static double bare_ns(enum fk_key_scheme scheme, uint32_t tokens_per_block)
{
    size_t bytes = 16 + tokens_per_block * 4;
    unsigned char buf[16 + 64 * 4], digest[SHA256_DIGEST_LENGTH];
    uint64_t start = fk_clock_ns();

    memset(buf, 7, sizeof(buf));
    for (uint32_t i = 0; i < BLOCKS; i++) {
        memcpy(buf, &i, sizeof(i));
        if (scheme == FK_KEY_SHA256) {
            SHA256_CTX ctx;
            SHA256_Init(&ctx);
            SHA256_Update(&ctx, buf, bytes);
            SHA256_Final(digest, &ctx);
            memcpy(buf + 4, digest, 12);        /* one waits for the other, as in a chain */
        } else {
            sink = XXH3_128bits_withSeed(buf, bytes, i).low64;
        }
    }
    sink = buf[8];
    return (double)(fk_clock_ns() - start) / BLOCKS;
}

static struct bench_result chain_bench(const char *name, enum fk_key_scheme scheme, uint32_t tpb)
{
    static double ours[RUNS], limit[RUNS];

    for (int i = 0; i < RUNS; i++) {
        ours[i] = chain_ns(scheme, tpb);
        limit[i] = bare_ns(scheme, tpb);
    }
    return bench_summary(name, "ns/block", ours, limit, RUNS);
}

/* GB/s over a buffer larger than the caches, in blocks of 64 KiB; the peer is copying it. */
static struct bench_result checksum_bench(void)
{
    enum { BYTES = 64 << 20, BLOCK = 1 << 16, N = 15 };
    static double ours[N], limit[N];
    char *buf = malloc(BYTES), *to = malloc(BYTES);

    for (int i = 0; buf && to && i < N; i++) {
        if (!i) {
            memset(buf, 1, BYTES);
            memset(to, 1, BYTES);
        }
        uint64_t start = fk_clock_ns(), sum = 0;
        for (size_t at = 0; at < BYTES; at += BLOCK)
            sum ^= fk_checksum(at, buf + at, BLOCK);
        ours[i] = (double)BYTES / (double)(fk_clock_ns() - start);
        start = fk_clock_ns();
        for (size_t at = 0; at < BYTES; at += BLOCK)
            memcpy(to + at, buf + at, BLOCK);
        limit[i] = (double)BYTES / (double)(fk_clock_ns() - start);
        sink = sum + (uint64_t)to[sum % BYTES];
    }
    free(buf);
    free(to);
    return bench_summary("checksum_64k", "GB/s", ours, limit, N);
}

int bench_hash(struct bench_result *out, int max)
{
    if (max < 4)
        return -EINVAL;
    for (size_t i = 0; i < fk_array_size(tokens); i++)
        tokens[i] = (uint32_t)i * 2654435761u;
    out[0] = chain_bench("hash_sha256_block", FK_KEY_SHA256, 16);
    out[1] = chain_bench("hash_sha256_block_64", FK_KEY_SHA256, 64);
    out[2] = chain_bench("hash_xxh3_block", FK_KEY_XXH3, 16);
    out[3] = checksum_bench();
    return 4;
}
