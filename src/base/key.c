/* key.c - see key.h. Uses libcrypto's low-level SHA-256 (the one-shot call of OpenSSL 3
 * looks the algorithm up each time and costs four times as much) and libxxhash. */
#define OPENSSL_SUPPRESS_DEPRECATED
#include "base/key.h"

#include <openssl/sha.h>
#include <string.h>
#define XXH_INLINE_ALL
#include <xxhash.h>

static struct fk_key key_nonzero(struct fk_key k)
{
    if (fk_key_is_zero(k))
        k.lo = 1;
    return k;
}

static struct fk_key key_from_digest(const unsigned char *digest)
{
    struct fk_key k;

    memcpy(&k, digest, sizeof(k));
    return key_nonzero(k);
}

struct fk_key fk_key_seed(const void *fingerprint, size_t fingerprint_bytes,
                          const char *const *parts, size_t n_parts)
{
    static const char tag[] = "flexkv-seed-1";
    unsigned char digest[SHA256_DIGEST_LENGTH];
    SHA256_CTX ctx;

    SHA256_Init(&ctx);
    SHA256_Update(&ctx, tag, sizeof(tag));
    SHA256_Update(&ctx, fingerprint, fingerprint_bytes);
    for (size_t i = 0; i < n_parts; i++) {
        uint64_t len = strlen(parts[i]);
        SHA256_Update(&ctx, &len, sizeof(len));
        SHA256_Update(&ctx, parts[i], len);
    }
    SHA256_Final(digest, &ctx);
    return key_from_digest(digest);
}

static void chain_sha256(struct fk_key prev, const unsigned char *tokens, size_t bytes,
                         size_t n, struct fk_key *keys)
{
    unsigned char digest[SHA256_DIGEST_LENGTH];
    SHA256_CTX ctx;

    for (size_t i = 0; i < n; i++, tokens += bytes) {
        SHA256_Init(&ctx);
        SHA256_Update(&ctx, &prev, sizeof(prev));
        SHA256_Update(&ctx, tokens, bytes);
        SHA256_Final(digest, &ctx);
        keys[i] = prev = key_from_digest(digest);
    }
}

static struct fk_key xxh3_keyed(struct fk_key seed, const void *data, size_t bytes)
{
    XXH128_hash_t h = XXH3_128bits_withSeed(data, bytes, seed.lo);
    struct fk_key k = { .lo = h.low64 ^ seed.hi, .hi = h.high64 + seed.lo };

    return key_nonzero(k);
}

static void chain_xxh3(struct fk_key prev, const unsigned char *tokens, size_t bytes,
                       size_t n, struct fk_key *keys)
{
    for (size_t i = 0; i < n; i++, tokens += bytes)
        keys[i] = prev = xxh3_keyed(prev, tokens, bytes);
}

void fk_key_chain(enum fk_key_scheme scheme, struct fk_key prev, const uint32_t *tokens,
                  uint32_t tokens_per_block, size_t n, struct fk_key *keys)
{
    size_t bytes = (size_t)tokens_per_block * sizeof(*tokens);

    if (scheme == FK_KEY_XXH3)
        chain_xxh3(prev, (const unsigned char *)tokens, bytes, n, keys);
    else
        chain_sha256(prev, (const unsigned char *)tokens, bytes, n, keys);
}

void fk_key_from_hashes(struct fk_key seed, const void *hashes, size_t hash_bytes,
                        size_t stride, size_t n, struct fk_key *keys)
{
    const unsigned char *p = hashes;

    for (size_t i = 0; i < n; i++, p += stride) {
        if (hash_bytes >= sizeof(struct fk_key)) {
            memcpy(&keys[i], p, sizeof(keys[i]));
            keys[i].lo ^= seed.lo;
            keys[i].hi ^= seed.hi;
            keys[i] = key_nonzero(keys[i]);
        } else {
            keys[i] = xxh3_keyed(seed, p, hash_bytes);
        }
    }
}
