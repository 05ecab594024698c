/*
 * key.h - block keys. A key is the 128-bit identity of a block *with its whole prefix*:
 *
 *   key[0] = H(seed  || tokens of block 0)
 *   key[i] = H(key[i-1] || tokens of block i)
 *
 * The seed comes from the space's fingerprint and the namespace, so keys of two spaces
 * or namespaces never meet. Two schemes:
 *   sha256  default: nobody who can send prompts can make two prompts share a key
 *   xxh3    about 5 times faster, for trusted single-tenant use only
 * Keys from hashes that the engine supplies are derived without hashing the tokens again.
 * Test vectors: docs/keys.md. Any thread, no state.
 */
#ifndef FK_BASE_KEY_H
#define FK_BASE_KEY_H

#include <stddef.h>
#include <stdint.h>

struct fk_key {
    uint64_t lo, hi;
};

enum fk_key_scheme { FK_KEY_SHA256 = 0, FK_KEY_XXH3 = 1 };

static inline int fk_key_equal(struct fk_key a, struct fk_key b)
{
    return ((a.lo ^ b.lo) | (a.hi ^ b.hi)) == 0;
}

/* The all-zero key is "no key" (parent of a first block); derivation never yields it. */
static inline int fk_key_is_zero(struct fk_key k)
{
    return (k.lo | k.hi) == 0;
}

/*
 * Seed of a chain: space fingerprint (16 bytes) and the namespace's name parts. The parts
 * are length-prefixed, so ("ab","c") and ("a","bc") differ. Always SHA-256.
 */
struct fk_key fk_key_seed(const void *fingerprint, size_t fingerprint_bytes,
                          const char *const *parts, size_t n_parts);

/*
 * Chain n keys from n * tokens_per_block 32-bit token ids. prev is the seed or the key of
 * the block before. Tokens are hashed as little-endian 32-bit words.
 */
void fk_key_chain(enum fk_key_scheme scheme, struct fk_key prev, const uint32_t *tokens,
                  uint32_t tokens_per_block, size_t n, struct fk_key *keys);

/*
 * Keys from engine hashes, each hash_bytes long at a distance of stride bytes. A hash already
 * covers its whole prefix. Of 16 bytes or more the first 16 are taken and combined with the
 * seed (as strong as the engine's hash, truncated to 128 bits); shorter ones are widened
 * with XXH3-128 under the seed (as strong as the engine's hash).
 */
void fk_key_from_hashes(struct fk_key seed, const void *hashes, size_t hash_bytes,
                        size_t stride, size_t n, struct fk_key *keys);

#endif
