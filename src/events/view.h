/*
 * view.h - what one subscriber believes to be there: a compact hash set of (block, medium), 24 bytes
 * each. It makes events exact: a block that is in the view is not announced again, one that is not is
 * never taken back; and after the journal was lost, what is there and the view give the difference.
 *
 * A round finds out what has gone: fk_view_round_begin, then everything that is seen (announced or known
 * already) is marked, then fk_view_round_gone takes out what has no mark.
 *
 * Knows base alone. Under its subscription's lock.
 */
#ifndef FK_EVENTS_VIEW_H
#define FK_EVENTS_VIEW_H

#include "base/util.h"

struct fk_view_item {
    uint64_t id, hash;
    uint32_t label;
    uint8_t medium;                     /* 0: a free place */
    uint8_t round;                      /* the last one in which it was seen */
    uint16_t space;
};
_Static_assert(sizeof(struct fk_view_item) == 24, "what a subscriber costs for each block");

struct fk_view {
    struct fk_view_item *items;
    uint64_t mask, n;
    uint8_t round;
    uint64_t sweep_at;
};

void fk_view_fini(struct fk_view *v);
void fk_view_clear(struct fk_view *v);
/* Marks it; 1: it was not there and is now; 0: it was; -ENOMEM. */
int fk_view_add(struct fk_view *v, const struct fk_view_item *item);
/* Is it there? Marks it if so. */
bool fk_view_see(struct fk_view *v, uint64_t id, uint8_t medium);
/* Takes it out; false: it was not there. *out: what it was. */
bool fk_view_remove(struct fk_view *v, uint64_t id, uint8_t medium, struct fk_view_item *out);
void fk_view_round_begin(struct fk_view *v);
/* Takes out up to max items that were not seen in this round; fewer: that was all. */
uint32_t fk_view_round_gone(struct fk_view *v, struct fk_view_item *out, uint32_t max);

#endif
