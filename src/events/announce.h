/*
 * announce.h - from what the core tells (which block, which slot) to what a subscriber hears (which
 * name): the core's events go into the journal; what the index holds becomes a list.
 *
 * Knows the core's structs (node/core.h), no core. Under node->lock. Callers: src/api/events.c, and the
 * simulator.
 */
#ifndef FK_EVENTS_ANNOUNCE_H
#define FK_EVENTS_ANNOUNCE_H

#include "events/journal.h"
#include "events/names.h"
#include "events/view.h"
#include "node/core.h"

/*
 * One event of a space, in order. The names at its slots must be those of the time of the event: whoever
 * is about to write a name has let all events through before.
 */
void fk_announce(struct fk_journal *journal, struct fk_names *names, const struct fk_core_event *c);

/* A block on SSD that is news; its name is on disk, but for the hash. */
struct fk_absent_name {
    struct fk_key key;
    uint64_t hash;
    uint32_t space, slot;
};

/*
 * One block that is there: what the view (NULL: none) does not have is appended to the list, as stored. If
 * its name is not in memory, *absent is filled in (hash not 0) for the caller to find. -ENOMEM.
 */
int fk_announce_present(struct fk_event_list *list, struct fk_view *view,
                        const struct fk_names *names, const struct fk_core_present *p,
                        struct fk_absent_name *absent);

#endif
