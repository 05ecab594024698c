/* slots.c - see slots.h. */
#include "index/slots.h"

#include <stdlib.h>

#include "base/util.h"

int fk_slots_init(struct fk_slots *s, uint32_t n, uint32_t stripe, uint32_t dirs)
{
    *s = (struct fk_slots){ .n = n, .stripe = stripe ? stripe : UINT32_MAX, .dirs = dirs };
    s->n_words = (uint32_t)fk_div_up(n, 64);
    s->words = calloc(s->n_words + 1, sizeof(*s->words));
    s->summary = calloc(s->n_words / 64 + 1, sizeof(*s->summary));
    if (!s->words || !s->summary) {
        fk_slots_fini(s);
        return -ENOMEM;
    }
    for (uint32_t i = 0; i < n; i++)
        fk_slots_free(s, i);
    return 0;
}

void fk_slots_fini(struct fk_slots *s)
{
    free(s->words);
    free(s->summary);
    s->words = s->summary = NULL;
}

void fk_slots_free(struct fk_slots *s, uint32_t slot)
{
    s->words[slot / 64] |= 1ull << (slot % 64);
    s->summary[slot / 4096] |= 1ull << (slot / 64 % 64);
    s->n_free++;
    s->n_free_out += fk_slots_out(s, slot);
}

bool fk_slots_is_free(const struct fk_slots *s, uint32_t slot)
{
    return s->words[slot / 64] >> (slot % 64) & 1;
}

static void slot_take(struct fk_slots *s, uint32_t slot)
{
    uint32_t w = slot / 64;

    s->words[w] &= ~(1ull << (slot % 64));
    if (!s->words[w])
        s->summary[w / 64] &= ~(1ull << (w % 64));
    s->n_free--;
    s->n_free_out -= fk_slots_out(s, slot);
}

void fk_slots_set_out(struct fk_slots *s, uint32_t dirs_out)
{
    s->dirs_out = dirs_out;
    s->n_out = s->n_free_out = 0;
    for (uint32_t slot = 0; dirs_out && slot < s->n; slot++) {
        bool out = fk_slots_out(s, slot);
        s->n_out += out;
        s->n_free_out += out && fk_slots_is_free(s, slot);
    }
}

bool fk_slots_take_at(struct fk_slots *s, uint32_t slot)
{
    if (slot >= s->n || !fk_slots_is_free(s, slot))
        return false;
    slot_take(s, slot);
    return true;
}

/* First free slot at or after `from`, FK_NONE if there is none up to the end. */
static uint32_t find_from(const struct fk_slots *s, uint32_t from)
{
    if (from >= s->n)
        return FK_NONE;
    uint32_t w = from / 64;
    uint64_t bits = s->words[w] & (~0ull << (from % 64));
    if (bits)
        return w * 64 + (uint32_t)__builtin_ctzll(bits);
    uint32_t sw = (w + 1) / 64, n_summary = s->n_words / 64 + 1;
    uint64_t sum = sw < n_summary ? s->summary[sw] & (~0ull << ((w + 1) % 64)) : 0;
    while (!sum) {
        if (++sw >= n_summary)
            return FK_NONE;
        sum = s->summary[sw];
    }
    w = sw * 64 + (uint32_t)__builtin_ctzll(sum);
    return w * 64 + (uint32_t)__builtin_ctzll(s->words[w]);
}

/* As find_from, over directories that are in use only. */
static uint32_t find_usable(const struct fk_slots *s, uint32_t from)
{
    uint32_t slot = find_from(s, from);

    while (slot != FK_NONE && fk_slots_out(s, slot)) {
        uint64_t next = ((uint64_t)slot / s->stripe + 1) * s->stripe;
        slot = next < s->n ? find_from(s, (uint32_t)next) : FK_NONE;
    }
    return slot;
}

uint32_t fk_slots_take(struct fk_slots *s, uint32_t want, uint32_t *first)
{
    if (!s->n_free || !want)
        return 0;
    uint32_t slot = find_usable(s, s->cursor);
    if (slot == FK_NONE)
        slot = find_usable(s, 0);
    if (slot == FK_NONE)
        return 0;

    uint64_t end64 = fk_min((uint64_t)slot + want,
                            ((uint64_t)slot / s->stripe + 1) * s->stripe);
    uint32_t end = (uint32_t)fk_min(end64, (uint64_t)s->n);
    *first = slot;
    do {
        slot_take(s, slot);
        slot++;
    } while (slot < end && fk_slots_is_free(s, slot));
    s->cursor = slot < s->n ? slot : 0;
    return slot - *first;
}
