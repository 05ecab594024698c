/*
 * replay_plan.c - from options and trace to what is replayed: tiers in blocks, settings of
 * the node, hashes and bytes of blocks. No I/O. Callers: the modes of replay.
 */
#include "replay.h"

#include <math.h>

/* Whole blocks, rounded down, at least one (a tier that was asked for). */
static int size_in_blocks(const struct replay_plan *p, const char *option,
                          const struct replay_size *size, uint32_t *out)
{
    double v = size->value;

    *out = 0;
    if (size->kind == REPLAY_SIZE_NONE || v == 0)
        return 0;
    if (size->kind == REPLAY_SIZE_PERCENT)
        v = floor((double)p->unique_blocks * v / 100 + 1e-9);
    else if (size->kind == REPLAY_SIZE_BYTES)
        v = floor(v / (double)p->options->block_bytes);
    v = fk_max(v, 1.0);
    if (v > (double)(UINT32_MAX / 4)) {
        fprintf(stderr, "flexkv replay: --%s %s: %.0f blocks are too many (at most %u)\n", option,
                size->text, v, UINT32_MAX / 4);
        return 2;
    }
    *out = (uint32_t)v;
    return 0;
}

int replay_plan_make(struct replay_plan *p, const struct replay_options *o, const struct trace *t)
{
    *p = (struct replay_plan){ .options = o, .trace = t };
    p->subs = (uint32_t)(TRACE_TOKENS_PER_ID / o->tokens_per_block);
    p->unique_blocks = (uint64_t)t->unique * p->subs;
    p->blocks = t->ids.len * p->subs;
    uint64_t max_blocks = (uint64_t)t->max_ids * p->subs;
    if (max_blocks > 1u << 24) {
        fprintf(stderr, "flexkv replay: a request of %llu blocks: more than %u; use larger "
                "--tokens-per-block\n", (unsigned long long)max_blocks, 1u << 24);
        return 2;
    }
    p->max_blocks = (uint32_t)max_blocks;
    for (size_t i = 0; i < t->requests.len; i++)
        p->ceiling_blocks += (uint64_t)(t->requests.data[i].n_ids - t->requests.data[i].new_ids) * p->subs;
    if (!o->cpu.kind || o->cpu.value == 0) {
        fprintf(stderr, "flexkv replay: --cpu %s: the CPU tier can't be empty\n", o->cpu.text);
        return 2;
    }
    int rc = size_in_blocks(p, "cpu", &o->cpu, &p->cpu_slots);
    return rc ? rc : size_in_blocks(p, "ssd", &o->ssd, &p->ssd_slots);
}

static int set_extra(const char *text, int (*set)(void *arg, const char *key, const char *value),
                     void *arg)
{
    const char *eq = strchr(text, '=');
    fk_autofree char *key = strndup(text, (size_t)(eq - text));

    return key ? set(arg, key, eq + 1) : 2;
}

int replay_plan_config(const struct replay_plan *p,
                       int (*set)(void *arg, const char *key, const char *value), void *arg)
{
    const struct replay_options *o = p->options;
    char cpu[16], ssd[16];

    snprintf(cpu, sizeof(cpu), "%u", p->cpu_slots);
    snprintf(ssd, sizeof(ssd), "%u", p->ssd_slots);
    const char *pairs[][2] = {
        { "cpu_cache_blocks", cpu },
        { "ssd_cache_blocks", ssd },
        { "ssd_cache_dir", o->ssd_dir && p->ssd_slots ? o->ssd_dir : NULL },
        { "eviction_policy", o->policy },
        { "ssd_write_policy", o->write_policy },
        { "log_level", "WARNING" },
    };
    for (size_t i = 0; i < fk_array_size(pairs); i++) {
        int rc = pairs[i][1] ? set(arg, pairs[i][0], pairs[i][1]) : 0;
        if (rc)
            return rc;
    }
    for (size_t i = 0; i < o->n_sets; i++) {
        int rc = set_extra(o->sets[i], set, arg);
        if (rc)
            return rc;
    }
    return 0;
}

/* ---- hashes: a bijection of (id, part) in each half, so no two blocks share one ---- */

static inline uint64_t mix(uint64_t z)
{
    z = (z ^ (z >> 32)) * 0xd6e8feb86659fd93ull;
    z = (z ^ (z >> 32)) * 0xd6e8feb86659fd93ull;
    return z ^ (z >> 32);
}

static inline struct replay_hash hash_of(uint64_t block)
{
    return (struct replay_hash){
        mix(block + 0x9e3779b97f4a7c15ull), mix(~block ^ 0x2545f4914f6cdd1dull),
    };
}

void replay_hashes(const struct replay_plan *p, const struct trace_request *r, uint32_t first,
                   uint32_t n, struct replay_hash *out)
{
    const uint32_t *ids = trace_ids(p->trace, r) + first / p->subs;
    uint32_t sub = first % p->subs;

    for (uint32_t done = 0; done < n; sub = 0, ids++) {
        uint64_t base = (uint64_t)*ids * p->subs + sub;
        uint32_t run = fk_min(p->subs - sub, n - done);
        for (uint32_t i = 0; i < run; i++)
            out[done + i] = hash_of(base + i);
        done += run;
    }
}

/*
 * ---- bytes: word i of a block is (lo + i * A) ^ (hi + i * B). Any two blocks differ in
 * nearly every word, and so do a block and itself shifted; it vectorises, so that making
 * and checking bytes costs less than copying them.
 */
#define STEP_A 0x9e3779b97f4a7c15ull
#define STEP_B 0xc2b2ae3d27d4eb4full
#define CHECK_WORDS 512u

void replay_fill(void *page, uint64_t bytes, struct replay_hash h)
{
    uint64_t *w = page;
    uint64_t a = h.lo, b = h.hi;

    for (uint64_t i = 0; i < bytes / 8; i += 8, a += 8 * STEP_A, b += 8 * STEP_B)
        for (uint64_t j = 0; j < 8; j++)
            w[i + j] = (a + j * STEP_A) ^ (b + j * STEP_B);
}

bool replay_same(const void *page, uint64_t bytes, struct replay_hash h)
{
    const uint64_t *w = page;

    for (uint64_t i = 0; i < bytes / 8; i += CHECK_WORDS) {
        uint64_t n = fk_min((uint64_t)CHECK_WORDS, bytes / 8 - i), diff = 0;
        uint64_t a = h.lo + i * STEP_A, b = h.hi + i * STEP_B;
        for (uint64_t k = 0; k < n; k += 8, a += 8 * STEP_A, b += 8 * STEP_B)
            for (uint64_t j = 0; j < 8; j++)
                diff |= w[i + k + j] ^ (a + j * STEP_A) ^ (b + j * STEP_B);
        if (diff)
            return false;
    }
    return true;
}
