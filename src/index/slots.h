/*
 * slots.h - which slots of a tier are free: a bitmap with a summary level, searched from a
 * moving cursor so that what is taken together lies together.
 *
 *   summary  1 bit per word that has a free slot
 *   words    1 bit per slot, set = free
 *
 * Caller: index.c, under the core's lock. No I/O.
 */
#ifndef FK_INDEX_SLOTS_H
#define FK_INDEX_SLOTS_H

#include <stdbool.h>
#include <stdint.h>

struct fk_slots {
    uint64_t *words, *summary;
    uint32_t n, n_words, n_free;
    uint32_t cursor;            /* where the next search starts */
    /* Slots of directories that are out are not given out (SSD). */
    uint32_t stripe, dirs, dirs_out;
    uint32_t n_out, n_free_out; /* of n, of n_free: on such directories */
};

int fk_slots_init(struct fk_slots *s, uint32_t n, uint32_t stripe, uint32_t dirs);
void fk_slots_fini(struct fk_slots *s);
/* Takes a run of 1..want neighbouring slots (never across a stripe's end). Returns its
 * length, 0 if nothing is free. */
uint32_t fk_slots_take(struct fk_slots *s, uint32_t want, uint32_t *first);
/* Takes this very slot (recovery). false: it is taken or out of range. */
bool fk_slots_take_at(struct fk_slots *s, uint32_t slot);
void fk_slots_free(struct fk_slots *s, uint32_t slot);
bool fk_slots_is_free(const struct fk_slots *s, uint32_t slot);
/* Which directories are out of use from now on: a bit each. O(slots). */
void fk_slots_set_out(struct fk_slots *s, uint32_t dirs_out);
/* Free slots that can be had. */
static inline uint32_t fk_slots_usable(const struct fk_slots *s)
{
    return s->n_free - s->n_free_out;
}

static inline uint32_t fk_slots_dir(const struct fk_slots *s, uint32_t slot)
{
    return s->dirs > 1 ? slot / s->stripe % s->dirs : 0;
}

static inline bool fk_slots_out(const struct fk_slots *s, uint32_t slot)
{
    return s->dirs_out && (s->dirs_out >> fk_slots_dir(s, slot) & 1);
}

#endif
