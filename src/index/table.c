/*
 * table.c - the flat hash table: key -> entry number. See the picture in index.h.
 * Touches buckets only, and the keys of entries. Callers: the index room.
 */
#include "index/table.h"

#include <sys/mman.h>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23      /* kernels before 5.14 say -EINVAL: faulted in by use */
#endif

#define BUCKET_ENTRIES 12u
#define BATCH 16u                   /* look-ups in flight together */
#define POPULATE_MAX FK_GIB
#define AHEAD 6u                    /* entries: how far eviction is looked ahead of */

struct fk_bucket {
    uint8_t tag[BUCKET_ENTRIES];    /* 0: free */
    uint16_t passed_on;             /* keys that wanted to be here but went further; saturates */
    uint16_t unused;
    uint32_t entry[BUCKET_ENTRIES];
};
_Static_assert(sizeof(struct fk_bucket) == 64, "one cache line");

void *fk_index_map(size_t bytes)
{
    void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

    if (p == MAP_FAILED)
        return NULL;
    madvise(p, bytes, MADV_HUGEPAGE);
    /* Now rather than one fault at a time on the engine's critical path. Of a huge index only a
     * part, so that opening stays short. */
    madvise(p, fk_min(bytes, (size_t)POPULATE_MAX), MADV_POPULATE_WRITE);
    return p;
}

static uint64_t key_hash(const struct fk_index *ix, struct fk_key key)
{
    uint64_t h = (key.lo ^ ix->hash_seed) * 0x9e3779b97f4a7c15ull;

    return (h ^ (h >> 32) ^ key.hi) * 0xd6e8feb86659fd93ull;
}

static uint32_t home_of(const struct fk_index *ix, uint64_t hash)
{
    return (uint32_t)(((hash >> 32) * (uint64_t)ix->n_buckets) >> 32);
}

static uint8_t tag_of(uint64_t hash)
{
    return (uint8_t)(hash & 0xff) | 0x80;
}

/* A bit for each place of the bucket that carries the tag. */
static uint32_t places_with(const struct fk_bucket *b, uint8_t tag)
{
#if defined(__SSE2__)
    __m128i tags = _mm_load_si128((const __m128i *)(const void *)b);
    return (uint32_t)_mm_movemask_epi8(_mm_cmpeq_epi8(tags, _mm_set1_epi8((char)tag))) & 0xfff;
#else
    uint32_t mask = 0;
    for (uint32_t i = 0; i < BUCKET_ENTRIES; i++)
        mask |= (uint32_t)(b->tag[i] == tag) << i;
    return mask;
#endif
}

static uint32_t find_hashed(const struct fk_index *ix, struct fk_key key, uint64_t hash)
{
    uint32_t at = home_of(ix, hash);
    uint8_t tag = tag_of(hash);

    for (uint32_t probes = 0; probes < ix->n_buckets; probes++) {
        const struct fk_bucket *b = &ix->buckets[at];
        for (uint32_t m = places_with(b, tag); m; m &= m - 1) {
            uint32_t entry = b->entry[__builtin_ctz(m)];
            if (fk_key_equal(ix->entries[entry].key, key))
                return entry;
        }
        if (!b->passed_on)
            return FK_NONE;
        at = at + 1 < ix->n_buckets ? at + 1 : 0;
    }
    return FK_NONE;
}

uint32_t fk_index_find(const struct fk_index *ix, struct fk_key key)
{
    return ix->n_buckets ? find_hashed(ix, key, key_hash(ix, key)) : FK_NONE;
}

void fk_table_insert(struct fk_index *ix, uint32_t entry)
{
    uint64_t hash = key_hash(ix, ix->entries[entry].key);
    uint32_t at = home_of(ix, hash);

    for (;;) {
        struct fk_bucket *b = &ix->buckets[at];
        uint32_t unused = places_with(b, 0);
        if (unused) {
            uint32_t i = (uint32_t)__builtin_ctz(unused);
            b->tag[i] = tag_of(hash);
            b->entry[i] = entry;
            return;
        }
        if (b->passed_on < UINT16_MAX)
            b->passed_on++;
        at = at + 1 < ix->n_buckets ? at + 1 : 0;
    }
}

void fk_table_erase(struct fk_index *ix, uint32_t entry)
{
    uint64_t hash = key_hash(ix, ix->entries[entry].key);
    uint32_t at = home_of(ix, hash);

    for (uint32_t probes = 0; probes < ix->n_buckets; probes++) {
        struct fk_bucket *b = &ix->buckets[at];
        for (uint32_t m = places_with(b, tag_of(hash)); m; m &= m - 1) {
            uint32_t i = (uint32_t)__builtin_ctz(m);
            if (b->entry[i] == entry) {
                b->tag[i] = 0;
                return;
            }
        }
        if (b->passed_on < UINT16_MAX)      /* saturated counts stay: look-ups go one further */
            b->passed_on--;
        at = at + 1 < ix->n_buckets ? at + 1 : 0;
    }
}

int fk_table_resize(struct fk_index *ix, uint32_t n)
{
    /* Three quarters full on average: one bucket in ten passes keys on. */
    uint32_t n_buckets = (uint32_t)fk_div_up((uint64_t)n * 4, BUCKET_ENTRIES * 3) + 1;
    size_t bytes = (size_t)n_buckets * sizeof(struct fk_bucket);
    struct fk_bucket *buckets = fk_index_map(bytes);

    if (!buckets)
        return -ENOMEM;
    if (ix->buckets)
        munmap(ix->buckets, ix->buckets_bytes);
    ix->buckets = buckets;
    ix->n_buckets = n_buckets;
    ix->buckets_bytes = bytes;
    for (uint32_t i = 0; i < ix->n_entries_used; i++)
        if ((ix->entries[i].state & (FK_ENTRY_USED | FK_ENTRY_DOOMED)) == FK_ENTRY_USED)
            fk_table_insert(ix, i);
    return 0;
}

void fk_index_prefetch_key(const struct fk_index *ix, struct fk_key key)
{
    __builtin_prefetch(&ix->buckets[home_of(ix, key_hash(ix, key))], 1);
}

void fk_index_prefetch_before(const struct fk_index *ix, uint32_t entry)
{
    /* A chain's entries mostly lie in a row. */
    if (entry >= 2 * AHEAD) {
        __builtin_prefetch(&ix->entries[entry - 2 * AHEAD], 1);
        fk_index_prefetch_key(ix, ix->entries[entry - AHEAD].key);
    }
}

/* ---- chains ---- */

static bool is_at(const struct fk_index *ix, uint32_t entry, struct fk_key key)
{
    return entry < ix->n_entries_used && fk_key_equal(ix->entries[entry].key, key) &&
           (ix->entries[entry].state & (FK_ENTRY_USED | FK_ENTRY_DOOMED)) == FK_ENTRY_USED;
}

/* Entry of keys[i], given that keys[j] has the entry `base`: a guess first. */
static uint32_t find_near(const struct fk_index *ix, const struct fk_key *keys, uint32_t i,
                          uint32_t j, uint32_t base)
{
    uint32_t guess = base + (i - j);

    return is_at(ix, guess, keys[i]) ? guess : fk_index_find(ix, keys[i]);
}

uint32_t fk_index_match(const struct fk_index *ix, const struct fk_key *keys, uint32_t n)
{
    if (!n)
        return 0;
    uint32_t entry = fk_index_find(ix, keys[0]);
    if (entry == FK_NONE)
        return 0;

    uint32_t lo = 0, step = 1, hi = n;      /* keys[lo] is known; keys[hi] is not, or hi == n */
    while (lo + step < hi) {
        uint32_t e = find_near(ix, keys, lo + step, lo, entry);
        if (e == FK_NONE) {
            hi = lo + step;
            break;
        }
        entry = e;
        lo += step;
        step *= 2;
    }
    while (hi - lo > 1) {
        uint32_t mid = lo + (hi - lo) / 2;
        uint32_t e = find_near(ix, keys, mid, lo, entry);
        if (e == FK_NONE) {
            hi = mid;
        } else {
            entry = e;
            lo = mid;
        }
    }
    return lo + 1;
}

/* One batch whose neighbours were guessed wrong: all buckets, then all entries, are fetched
 * before the first is looked at, so that their cache misses overlap. */
static void resolve_batch(const struct fk_index *ix, const struct fk_key *keys, uint32_t n,
                          uint32_t *entries)
{
    uint64_t hash[BATCH];

    for (uint32_t i = 0; i < n; i++) {
        hash[i] = key_hash(ix, keys[i]);
        __builtin_prefetch(&ix->buckets[home_of(ix, hash[i])]);
    }
    for (uint32_t i = 0; i < n; i++) {
        const struct fk_bucket *b = &ix->buckets[home_of(ix, hash[i])];
        uint32_t m = places_with(b, tag_of(hash[i]));
        if (m)
            __builtin_prefetch(&ix->entries[b->entry[__builtin_ctz(m)]], 1);
    }
    for (uint32_t i = 0; i < n; i++)
        entries[i] = find_hashed(ix, keys[i], hash[i]);
}

void fk_index_resolve(const struct fk_index *ix, const struct fk_key *keys, uint32_t n,
                      uint32_t *entries)
{
    uint32_t i = 0;

    if (!n)
        return;
    if (!ix->n_buckets) {
        memset(entries, 0xff, n * sizeof(*entries));
        return;
    }
    entries[i] = fk_index_find(ix, keys[i]);
    i++;
    while (i < n) {
        while (i < n && entries[i - 1] != FK_NONE && is_at(ix, entries[i - 1] + 1, keys[i])) {
            entries[i] = entries[i - 1] + 1;
            i++;
        }
        uint32_t batch = fk_min(n - i, BATCH);
        resolve_batch(ix, keys + i, batch, entries + i);
        i += batch;
    }
}

uint32_t fk_index_known(const struct fk_index *ix, const struct fk_key *keys, uint32_t n,
                        uint32_t *entries)
{
    uint32_t known = fk_index_match(ix, keys, n), i = 0;

    fk_index_resolve(ix, keys, known, entries);
    while (i < known && entries[i] != FK_NONE)
        i++;
    return i;
}
