/* density.c - see density.h. */
#include "index/density.h"

#include <math.h>

#include "base/util.h"

#define BUCKETS 64u                 /* two per octave of a 32-bit age */
#define WAITS 32768u                /* waits followed at once */
#define WAYS 4u                     /* places a key may have in their table */
#define HORIZON 8u                  /* capacities: how far back waits are followed */
#define FADE_REQUESTS 2000u         /* half-life of what was counted */
#define PRIOR 4.0                   /* waits' worth of the prior, in requests */
#define POOL 16.0                   /* the same, of all classes taken together */
#define PRIOR_EXPONENT 0.15         /* without knowledge, waits have a heavy tail of this kind */

struct wait { uint16_t fingerprint; uint8_t class_, bucket; uint32_t since; };

struct fk_density {
    uint32_t rate;                  /* one key in so many is followed */
    uint32_t requests, uses;        /* since the last fading, fading */
    uint32_t until_update, update_every;
    float ended[FK_DENSITY_CLASSES][BUCKETS];
    float reached[FK_DENSITY_CLASSES][BUCKETS];
    float density[FK_DENSITY_CLASSES][BUCKETS];
    struct wait waits[WAITS];
};

static unsigned bucket_of(uint32_t age)
{
    unsigned octave = 31 - (unsigned)__builtin_clz(age | 1);

    return 2 * octave + (octave ? age >> (octave - 1) & 1 : 0);
}

static double bucket_start(unsigned b)
{
    return ldexp(b & 1 ? 1.5 : 1.0, (int)(b / 2));
}

struct fk_density *fk_density_create(uint32_t capacity)
{
    struct fk_density *d = calloc(1, sizeof(*d));

    if (!d)
        return NULL;
    d->rate = 1;
    while ((uint64_t)WAITS * d->rate < (uint64_t)capacity * HORIZON)
        d->rate *= 2;
    d->update_every = 64;
    return d;
}

void fk_density_destroy(struct fk_density *d)
{
    free(d);
}

uint64_t fk_density_bytes(const struct fk_density *d)
{
    return sizeof(*d);
}

/* ---- counting ---- */

static void reach(struct fk_density *d, struct wait *w, unsigned bucket)
{
    while (w->bucket < bucket)
        d->reached[w->class_][++w->bucket]++;
}

static void end_wait(struct fk_density *d, struct wait *w, uint32_t tick, bool used)
{
    unsigned bucket = bucket_of(tick - w->since);

    reach(d, w, bucket);
    if (used)
        d->ended[w->class_][bucket]++;
    w->since = 0;
}

void fk_density_use(struct fk_density *d, struct fk_key key, unsigned class_, uint32_t tick)
{
    uint64_t h = (key.lo + key.hi) * 0x9e3779b97f4a7c15ull;

    if (h >> 24 & (d->rate - 1))
        return;
    uint16_t fingerprint = (uint16_t)(h >> 8);
    struct wait *set = &d->waits[(h >> 48) % (WAITS / WAYS) * WAYS], *at = NULL;
    for (unsigned i = 0; i < WAYS; i++) {
        if (set[i].since && set[i].fingerprint == fingerprint) {
            end_wait(d, &set[i], tick, true);
            at = &set[i];
        }
    }
    for (unsigned i = 0; !at && i < WAYS; i++)
        if (!set[i].since)
            at = &set[i];
    if (!at) {              /* all taken: the longest wait is given up */
        at = set;
        for (unsigned i = 1; i < WAYS; i++)
            if (set[i].since < at->since)
                at = &set[i];
        end_wait(d, at, tick, false);
    }
    *at = (struct wait){ .fingerprint = fingerprint, .class_ = (uint8_t)class_, .since = tick };
    d->reached[class_][0]++;
    d->uses++;
}

static void fade(struct fk_density *d)
{
    for (unsigned c = 0; c < FK_DENSITY_CLASSES; c++) {
        for (unsigned b = 0; b < BUCKETS; b++) {
            d->ended[c][b] /= 2;
            d->reached[c][b] /= 2;
        }
    }
    d->requests /= 2;
    d->uses /= 2;
}

/* ---- densities ---- */

/*
 * For each bucket the best, over all horizons ahead, of chance of use per time held. Half an lru
 * age is added to the time: a slot changes hands at about that pace anyway, and without it the
 * noise of the shortest waits would rule.
 */
static void best_horizons(const double *chance, unsigned top, double half_age, float *density)
{
    for (unsigned b = 0; b <= top; b++) {
        double alive = 1, used = 0, held = 0, best = 0;
        for (unsigned j = b; j <= top; j++) {
            double width = bucket_start(j + 1) - bucket_start(j);
            used += alive * chance[j];
            held += alive * width * (1 - chance[j] / 2);
            alive *= 1 - chance[j];
            best = fk_max(best, used / (held + half_age));
        }
        density[b] = (float)best;
    }
    for (unsigned b = top + 1; b < BUCKETS; b++)
        density[b] = density[top];
}

static unsigned pool_classes(const struct fk_density *d, double *chance, double per_request)
{
    double ended[BUCKETS] = { 0 }, reached[BUCKETS] = { 0 };
    unsigned top = 0;

    for (unsigned c = 0; c < FK_DENSITY_CLASSES; c++) {
        for (unsigned b = 0; b < BUCKETS; b++) {
            ended[b] += d->ended[c][b];
            reached[b] += d->reached[c][b];
            top = d->reached[c][b] > 0 ? fk_max(top, b) : top;
        }
    }
    top = fk_min(top + 6, BUCKETS - 2);
    for (unsigned b = 0; b <= top; b++) {
        double prior = 1 - pow(bucket_start(b) / bucket_start(b + 1), PRIOR_EXPONENT);
        chance[b] = (ended[b] + PRIOR * per_request * prior) / (reached[b] + PRIOR * per_request);
    }
    return top;
}

static void update(struct fk_density *d, uint32_t tick, uint32_t lru_age)
{
    double pooled[BUCKETS], chance[BUCKETS];
    double per_request = d->requests ? fk_max((double)d->uses / d->requests, 1.0) : 1.0;

    for (unsigned i = 0; i < WAITS; i++)
        if (d->waits[i].since)
            reach(d, &d->waits[i], bucket_of(tick - d->waits[i].since));
    unsigned top = pool_classes(d, pooled, per_request);
    for (unsigned c = 0; c < FK_DENSITY_CLASSES; c++) {
        for (unsigned b = 0; b <= top; b++)
            chance[b] = (d->ended[c][b] + POOL * per_request * pooled[b]) /
                        (d->reached[c][b] + POOL * per_request);
        best_horizons(chance, top, lru_age / 2.0, d->density[c]);
    }
}

void fk_density_request(struct fk_density *d, uint32_t tick, uint32_t lru_age)
{
    if (++d->requests > FADE_REQUESTS)
        fade(d);
    if (d->until_update-- == 0) {
        update(d, tick, lru_age);
        d->until_update = d->update_every;
    }
}

float fk_density_of(const struct fk_density *d, unsigned class_, uint32_t age)
{
    return d->density[class_][bucket_of(age)];
}

void fk_density_rebase(struct fk_density *d, uint32_t by)
{
    for (unsigned i = 0; i < WAITS; i++)
        d->waits[i].since = d->waits[i].since > by ? d->waits[i].since - by : 0;
}
