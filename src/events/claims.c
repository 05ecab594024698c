/* claims.c - see claims.h. Linear probing; who goes is replaced by those behind him, so that there are no
 * gaps to be remembered. */
#include "events/claims.h"

#define LEAST_PLACES 1024u

static size_t home_of(const struct fk_claims *c, uint64_t hash, uint32_t medium)
{
    uint64_t seed = hash + medium;

    return fk_rng_next(&seed) & (c->places - 1);
}

/* The entry's place, or the free one where it belongs. */
static size_t find(const struct fk_claims *c, uint64_t hash, uint32_t medium)
{
    size_t i = home_of(c, hash, medium);

    while (c->place[i].count && (c->place[i].hash != hash || c->place[i].medium != medium))
        i = (i + 1) & (c->places - 1);
    return i;
}

static int grow(struct fk_claims *c)
{
    struct fk_claims bigger = { .places = c->places ? 2 * c->places : LEAST_PLACES, .used = c->used };

    if (c->places && 4 * (c->used + 1) <= 3 * c->places)
        return 0;
    bigger.place = calloc(bigger.places, sizeof(*bigger.place));
    if (!bigger.place)
        return -ENOMEM;
    for (size_t i = 0; i < c->places; i++)
        if (c->place[i].count)
            bigger.place[find(&bigger, c->place[i].hash, c->place[i].medium)] = c->place[i];
    free(c->place);
    *c = bigger;
    return 0;
}

int fk_claims_add(struct fk_claims *c, uint64_t hash, uint8_t medium)
{
    if (grow(c))
        return -ENOMEM;
    struct fk_claim *p = &c->place[find(c, hash, medium)];
    if (p->count++)
        return 0;
    p->hash = hash;
    p->medium = medium;
    c->used++;
    return 1;
}

/* Those behind the free place move up, unless they would come before their home. */
static void close_gap(struct fk_claims *c, size_t gap)
{
    size_t mask = c->places - 1;

    for (size_t i = (gap + 1) & mask; c->place[i].count; i = (i + 1) & mask) {
        size_t home = home_of(c, c->place[i].hash, c->place[i].medium);
        if (((i - home) & mask) < ((i - gap) & mask))
            continue;
        c->place[gap] = c->place[i];
        c->place[i].count = 0;
        gap = i;
    }
}

int fk_claims_drop(struct fk_claims *c, uint64_t hash, uint8_t medium)
{
    size_t i = c->places ? find(c, hash, medium) : 0;

    if (!c->places || !c->place[i].count)
        return 1;
    if (--c->place[i].count)
        return 0;
    c->used--;
    close_gap(c, i);
    return 1;
}

void fk_claims_free(struct fk_claims *c)
{
    free(c->place);
    *c = (struct fk_claims){ 0 };
}
