/* util.h - small arithmetic, scoped cleanup and growable arrays. No knowledge of KV. */
#ifndef FK_BASE_UTIL_H
#define FK_BASE_UTIL_H

#include <errno.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define FK_NONE UINT32_MAX               /* "no entry", "no slot", "no object" */
#define FK_KIB 1024ull
#define FK_MIB (1024ull * 1024)
#define FK_GIB (1024ull * 1024 * 1024)

#define fk_likely(x)   __builtin_expect(!!(x), 1)
#define fk_unlikely(x) __builtin_expect(!!(x), 0)
#define FK_PASTE2(a, b) a##b
#define FK_PASTE(a, b) FK_PASTE2(a, b)
/* Each use has names of its own, so that uses nest without shadowing. */
#define FK_PICK(op, a, b, x, y) \
    ({ __typeof__(a) x = (a); __typeof__(b) y = (b); x op y ? x : y; })
#define fk_min(a, b) FK_PICK(<, a, b, FK_PASTE(a_, __COUNTER__), FK_PASTE(b_, __COUNTER__))
#define fk_max(a, b) FK_PICK(>, a, b, FK_PASTE(a_, __COUNTER__), FK_PASTE(b_, __COUNTER__))
#define fk_array_size(a) (sizeof(a) / sizeof((a)[0]))

static inline uint64_t fk_div_up(uint64_t a, uint64_t b) { return (a + b - 1) / b; }
static inline uint64_t fk_round_up(uint64_t a, uint64_t b) { return fk_div_up(a, b) * b; }

/* 2 * n hexadecimal digits, and the end. */
static inline void fk_hex(char *out, const uint8_t *bytes, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        *out++ = "0123456789abcdef"[bytes[i] >> 4];
        *out++ = "0123456789abcdef"[bytes[i] & 15];
    }
    *out = 0;
}

/* Scoped cleanup: `fk_autofree char *p = NULL;`, `fk_autoclose int fd = -1;` */
static inline void fk_cleanup_free(void *p) { free(*(void **)p); }
static inline void fk_cleanup_close(int *fd) { if (*fd >= 0) close(*fd); }
#define fk_autofree  __attribute__((cleanup(fk_cleanup_free)))
#define fk_autoclose __attribute__((cleanup(fk_cleanup_close)))

/* Takes the value out of a scoped variable, so that its cleanup does nothing. */
#define fk_steal(p) ({ __typeof__(p) _p = (p); (p) = NULL; _p; })

/*
 * A growable array: FK_VEC(uint32_t) v = {0}; fk_vec_push(&v, 7) -> 0 or -ENOMEM.
 * Freed with fk_vec_free; v.len elements at v.data.
 */
#define FK_VEC(type) struct { type *data; size_t len, cap; }

static inline int fk_vec_grow_bytes(void **data, size_t *cap, size_t want, size_t elem)
{
    if (want <= *cap)
        return 0;
    size_t ncap = *cap ? *cap : 16;
    while (ncap < want)
        ncap *= 2;
    void *p = realloc(*data, ncap * elem);
    if (!p)
        return -ENOMEM;
    *data = p;
    *cap = ncap;
    return 0;
}
#define fk_vec_reserve(v, n) \
    fk_vec_grow_bytes((void **)&(v)->data, &(v)->cap, (n), sizeof(*(v)->data))
#define fk_vec_push(v, x) \
    (fk_vec_reserve((v), (v)->len + 1) ? -ENOMEM : ((v)->data[(v)->len++] = (x), 0))
#define fk_vec_free(v) (free((v)->data), memset((v), 0, sizeof(*(v))))

/* SplitMix64 (Steele, Lea, Flood 2014): the one small random generator; seedable, not secret. */
static inline uint64_t fk_rng_next(uint64_t *state)
{
    uint64_t z = (*state += 0x9e3779b97f4a7c15ull);

    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

/* Uniform in [0, n), n > 0 (Lemire's multiply; the bias is below n / 2^32). */
static inline uint32_t fk_rng_below(uint64_t *state, uint32_t n)
{
    return (uint32_t)(((fk_rng_next(state) >> 32) * (uint64_t)n) >> 32);
}

/* 0 .. n - 1 in random order (Fisher-Yates). */
static inline void fk_rng_permutation(uint32_t *list, uint32_t n, uint64_t *state)
{
    for (uint32_t i = 0; i < n; i++)
        list[i] = i;
    for (uint32_t i = n; i > 1; i--) {
        uint32_t k = fk_rng_below(state, i), t = list[i - 1];
        list[i - 1] = list[k];
        list[k] = t;
    }
}

#endif
