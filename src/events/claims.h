/*
 * claims.h - how many blocks stand behind a hash that receivers were told of. Blocks of several
 * namespaces or spaces may have one hash; a receiver that hears "stored" twice forgets it at the first
 * "removed", so it is told of the first one's coming and of the last one's going.
 *
 * A hash table of 16 bytes an entry, at most three quarters full. Memory only; the publisher's thread.
 */
#ifndef FK_EVENTS_CLAIMS_H
#define FK_EVENTS_CLAIMS_H

#include "base/util.h"

struct fk_claim {
    uint64_t hash;
    uint32_t count;                 /* 0: a free place */
    uint32_t medium;
};

struct fk_claims {
    struct fk_claim *place;
    size_t places, used;            /* places: a power of two, or 0 */
};

/* 1: the first one; 0: there were others; -ENOMEM. */
int fk_claims_add(struct fk_claims *c, uint64_t hash, uint8_t medium);
/* 1: the last one, or it was never added; 0: others remain. */
int fk_claims_drop(struct fk_claims *c, uint64_t hash, uint8_t medium);
/* Forgets all, gives the memory back. */
void fk_claims_free(struct fk_claims *c);

#endif
