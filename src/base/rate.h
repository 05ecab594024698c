/*
 * rate.h - what something takes, as measured lately, and how much that varies: a mean and a mean deviation, both of
 * which forget. The time is told; no lock, it belongs to whoever holds it.
 *
 * Decisions are made with what it takes at worst (fk_rate_slow), so what was measured once, or varies, must be better
 * than what it is compared with by more.
 */
#ifndef FK_BASE_RATE_H
#define FK_BASE_RATE_H

#include <stdint.h>

#define FK_RATE_WEIGHT 0.2              /* of a new measurement */
#define FK_RATE_WEIGHT_OLD 0.5          /* where the last one is old: what was, matters less */
#define FK_RATE_OLD_US 1000000u
#define FK_RATE_FIRST_SPREAD 0.25       /* of a first measurement nobody knows how much it varies */
#define FK_RATE_SPREADS 2.0             /* so many above the mean is about the slowest of twenty */

struct fk_rate {
    double us, spread_us;               /* us 0: not known */
    uint64_t at_us;                     /* when it was measured last */
};

/* share: 1, or less for what says less. */
static inline void fk_rate_note(struct fk_rate *r, double seen_us, double share, uint64_t now_us)
{
    if (!(seen_us > 0))
        return;
    if (!(r->us > 0)) {
        *r = (struct fk_rate){ seen_us, FK_RATE_FIRST_SPREAD * seen_us, now_us };
        return;
    }
    double weight = share * (now_us - r->at_us > FK_RATE_OLD_US ? FK_RATE_WEIGHT_OLD : FK_RATE_WEIGHT);
    double off = seen_us - r->us;
    r->us += weight * off;
    r->spread_us += weight * ((off < 0 ? -off : off) - r->spread_us);
    r->at_us = now_us;
}

/* 0: not known. */
static inline double fk_rate_slow(const struct fk_rate *r)
{
    return r->us > 0 ? r->us + FK_RATE_SPREADS * r->spread_us : 0;
}

/* Of a byte -> of n bytes. */
static inline struct fk_rate fk_rate_of(const struct fk_rate *r, double n)
{
    return (struct fk_rate){ r->us * n, r->spread_us * n, r->at_us };
}

#endif
