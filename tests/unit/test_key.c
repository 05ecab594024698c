/*
 * test_key.c - src/base/key.c: the vectors of docs/keys.md (computed with Python's hashlib, not
 * with this code), chaining in steps, separation of namespaces, the key that is never given.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "base/key.h"
#include "base/util.h"

static void expect_key(struct fk_key k, uint64_t lo, uint64_t hi)
{
    assert_int_equal(k.lo, lo);
    assert_int_equal(k.hi, hi);
}

/* The fingerprint of the vectors: bytes 0, 1, ... 15. */
static struct fk_key seed_of(const char *const *parts, size_t n)
{
    unsigned char fingerprint[16];

    for (unsigned i = 0; i < sizeof(fingerprint); i++)
        fingerprint[i] = (unsigned char)i;
    return fk_key_seed(fingerprint, sizeof(fingerprint), parts, n);
}

/* Token i of the vectors. */
static void vector_tokens(uint32_t *tokens, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++)
        tokens[i] = i * 7919 + 1;
}

static void seeds_are_the_documented_ones(void **state)
{
    static const char *const ab_c[] = { "ab", "c" }, *const a_bc[] = { "a", "bc" };
    static const char *const empty[] = { "" };

    expect_key(seed_of(NULL, 0), 0x2b40229e7c3efd36, 0x57fdd58174dec7c0);
    expect_key(seed_of(ab_c, 2), 0xf7cfa84ab6f7f644, 0xffef747f447d3d61);
    expect_key(seed_of(a_bc, 2), 0x2405132495cf0976, 0x434b92f34497e943);
    expect_key(seed_of(empty, 1), 0xc33db83c5c8382a1, 0x691f44dd32e9cf94);
}

static void another_fingerprint_gives_another_seed(void **state)
{
    unsigned char a[16] = { 0 }, b[16] = { 0 };

    b[15] = 1;
    assert_false(fk_key_equal(fk_key_seed(a, 16, NULL, 0), fk_key_seed(b, 16, NULL, 0)));
}

static void sha256_chain_is_the_documented_one(void **state)
{
    uint32_t tokens[48];
    struct fk_key keys[3];

    vector_tokens(tokens, 48);
    fk_key_chain(FK_KEY_SHA256, seed_of(NULL, 0), tokens, 4, 3, keys);
    expect_key(keys[0], 0x2bbfb535a7f9c641, 0x33d19065973c9dc9);
    expect_key(keys[1], 0x6cc454b2fb9898c9, 0x64d4c490a0cdc6f5);
    expect_key(keys[2], 0x74dd1f7d9612d038, 0x9756cfc701065f3d);
    fk_key_chain(FK_KEY_SHA256, seed_of(NULL, 0), tokens, 16, 3, keys);
    expect_key(keys[0], 0x12d90aecb330c32d, 0x4355f035c1b9bf4c);
    expect_key(keys[1], 0x9ee29bef7287590c, 0x406ef1c18ea4da45);
    expect_key(keys[2], 0x53edc4ff8ffc2d39, 0x5e32b70c060484fa);
}

static void xxh3_chain_is_the_documented_one(void **state)
{
    uint32_t tokens[48];
    struct fk_key keys[3];

    vector_tokens(tokens, 48);
    fk_key_chain(FK_KEY_XXH3, seed_of(NULL, 0), tokens, 4, 3, keys);
    expect_key(keys[0], 0x739b932539c04942, 0x90a0dbdd0d61a41f);
    expect_key(keys[1], 0x362e682bd62069a3, 0x7ebacce9e99ff561);
    expect_key(keys[2], 0xb330e0a2004b0fe6, 0xcda1a51413a05037);
    fk_key_chain(FK_KEY_XXH3, seed_of(NULL, 0), tokens, 16, 3, keys);
    expect_key(keys[0], 0x7a49dcbb78f51ce7, 0x58c8765dc75908fe);
    expect_key(keys[1], 0xc4b895e06876bd2d, 0x17e3a1dc9406f319);
    expect_key(keys[2], 0x6c0a48c5d812751e, 0xd1cb4d768d594df6);
}

static void keys_from_hashes_are_the_documented_ones(void **state)
{
    unsigned char hash[64];
    struct fk_key seed = seed_of(NULL, 0), k[2];

    for (unsigned i = 0; i < 64; i++)
        hash[i] = (unsigned char)(0x40 + i % 32);
    fk_key_from_hashes(seed, hash, 32, 32, 2, k);
    expect_key(k[0], 0x6c0667da3f7cbc76, 0x18b398cd3f948e88);
    assert_true(fk_key_equal(k[0], k[1]));
    fk_key_from_hashes(seed, hash, 16, 16, 2, k);
    expect_key(k[0], 0x6c0667da3f7cbc76, 0x18b398cd3f948e88);
    assert_false(fk_key_equal(k[0], k[1]));
    fk_key_from_hashes(seed, hash, 8, 32, 2, k);
    expect_key(k[0], 0x5f3825204b086d75, 0xaac7fcc9ef532741);
    assert_true(fk_key_equal(k[0], k[1]));
    fk_key_from_hashes(seed, hash, 12, 12, 1, k);
    expect_key(k[0], 0xfd1f41631b0b9a23, 0xc47dd18dfb629df4);
}

static void chaining_in_steps_equals_chaining_at_once(void **state)
{
    uint32_t tokens[16 * 9];
    struct fk_key whole[9], steps[9], seed = seed_of(NULL, 0);

    vector_tokens(tokens, fk_array_size(tokens));
    for (int scheme = FK_KEY_SHA256; scheme <= FK_KEY_XXH3; scheme++) {
        fk_key_chain((enum fk_key_scheme)scheme, seed, tokens, 16, 9, whole);
        for (size_t cut = 1; cut < 9; cut++) {
            fk_key_chain((enum fk_key_scheme)scheme, seed, tokens, 16, cut, steps);
            fk_key_chain((enum fk_key_scheme)scheme, steps[cut - 1], tokens + 16 * cut, 16,
                         9 - cut, steps + cut);
            assert_memory_equal(whole, steps, sizeof(whole));
        }
    }
}

/* A key covers its whole prefix: a change of any token changes its block's key and all after. */
static void every_token_counts(void **state)
{
    uint32_t tokens[4 * 5];
    struct fk_key was[5], is[5], seed = seed_of(NULL, 0);

    for (int scheme = FK_KEY_SHA256; scheme <= FK_KEY_XXH3; scheme++) {
        vector_tokens(tokens, 20);
        fk_key_chain((enum fk_key_scheme)scheme, seed, tokens, 4, 5, was);
        for (size_t i = 0; i < 20; i++) {
            tokens[i] ^= 0x80000000;
            fk_key_chain((enum fk_key_scheme)scheme, seed, tokens, 4, 5, is);
            for (size_t b = 0; b < 5; b++)
                assert_int_equal(fk_key_equal(was[b], is[b]), b < i / 4);
            tokens[i] ^= 0x80000000;
        }
    }
}

static void schemes_differ(void **state)
{
    uint32_t tokens[4] = { 1, 2, 3, 4 };
    struct fk_key a, b;

    fk_key_chain(FK_KEY_SHA256, seed_of(NULL, 0), tokens, 4, 1, &a);
    fk_key_chain(FK_KEY_XXH3, seed_of(NULL, 0), tokens, 4, 1, &b);
    assert_false(fk_key_equal(a, b));
}

/* An engine's hash that equals the seed would give the zero key; it must not. */
static void zero_key_is_never_given(void **state)
{
    struct fk_key seed = seed_of(NULL, 0), k;

    fk_key_from_hashes(seed, &seed, sizeof(seed), sizeof(seed), 1, &k);
    assert_false(fk_key_is_zero(k));
    expect_key(k, 1, 0);
}

static void stride_skips_what_lies_between(void **state)
{
    unsigned char packed[3 * 16], wide[3 * 40];
    struct fk_key a[3], b[3], seed = seed_of(NULL, 0);

    for (unsigned i = 0; i < sizeof(packed); i++)
        packed[i] = (unsigned char)(i * 37);
    memset(wide, 0xee, sizeof(wide));
    for (unsigned i = 0; i < 3; i++)
        memcpy(wide + 40 * i, packed + 16 * i, 16);
    fk_key_from_hashes(seed, packed, 16, 16, 3, a);
    fk_key_from_hashes(seed, wide, 16, 40, 3, b);
    assert_memory_equal(a, b, sizeof(a));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(seeds_are_the_documented_ones),
        cmocka_unit_test(another_fingerprint_gives_another_seed),
        cmocka_unit_test(sha256_chain_is_the_documented_one),
        cmocka_unit_test(xxh3_chain_is_the_documented_one),
        cmocka_unit_test(keys_from_hashes_are_the_documented_ones),
        cmocka_unit_test(chaining_in_steps_equals_chaining_at_once),
        cmocka_unit_test(every_token_counts),
        cmocka_unit_test(schemes_differ),
        cmocka_unit_test(zero_key_is_never_given),
        cmocka_unit_test(stride_skips_what_lies_between),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
