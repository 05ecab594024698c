/*
 * loopback.h - transports of one process and one thread that read from each other by memcpy, in simulated time,
 * with faults: for the simulator and tests. The same seed and the same steps give the same outcome.
 *
 * A hub joins the transports that were opened with it; an address is a name in it (listen). Each transport is
 * stepped by its owner (fk_transport_step); a read is served in the step of the reader that is due, one whose grant comes
 * later in the next step of who grants: then the reader has something to take, and wants a step.
 */
#ifndef FK_TRANSPORT_LOOPBACK_H
#define FK_TRANSPORT_LOOPBACK_H

#include "transport/transport.h"

struct fk_loopback_fault {          /* of one read; all zero: none */
    uint64_t delay_us;              /* reads that are due earlier overtake it; beyond the deadline the bytes come
                                       all the same, into a buffer that is in quarantine */
    uint64_t serve_us;              /* the owner holds the block so long before the bytes have gone */
    bool drop;                      /* never answered; the buffer is let go of at the deadline and delay_us */
    bool corrupt;                   /* one wrong bit in the payload */
    bool refuse;                    /* connection reset */
};

typedef void fk_loopback_fault_fn(void *ctx, const char *to, const struct fk_read *r,
                                  struct fk_loopback_fault *out);

struct fk_loopback_hub *fk_loopback_hub_create(uint64_t latency_us, fk_loopback_fault_fn *fault, void *ctx);
/* The process hangs: what is asked of it waits until it is back. (Its owner does not step it meanwhile.) */
void fk_loopback_away(struct fk_transport *t, bool away);
void fk_loopback_hub_destroy(struct fk_loopback_hub *h);        /* after its transports */

#endif
