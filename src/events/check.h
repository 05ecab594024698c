/*
 * check.h - judges a stream of KV events by what a router makes of it: what would be thrown away,
 * passed over, or leave it with a wrong picture. Each finding names the rule that was broken.
 *
 * A stream that is joined in its middle, or has a gap, is judged only by what can be known: a block
 * that was never seen stored may well be there. "All blocks are cleared", or the number 0, is a
 * fresh start. Memory only, one thread. Part of the program, not of the library.
 */
#ifndef FK_EVENTS_CHECK_H
#define FK_EVENTS_CHECK_H

#include "events/decode.h"
#include "events/history.h"
#include "events/mirror.h"

enum fk_rule {
    FK_RULE_FRAMES,                 /* three frames, a number of 8 bytes */
    FK_RULE_BATCH,                  /* the payload cannot be read: it is lost as a whole */
    FK_RULE_GAP,                    /* numbers are missing */
    FK_RULE_ORDER,                  /* a number came again, or runs backwards: passed over */
    FK_RULE_RANK,                   /* negative */
    FK_RULE_MEDIUM,                 /* no tier that a router knows */
    FK_RULE_TOKENS,                 /* not block_size for each hash */
    FK_RULE_BLOCK_SIZE,             /* changes within the stream */
    FK_RULE_CHAIN,                  /* a hash twice in an event, or its own parent */
    FK_RULE_TWICE,                  /* stored where it is */
    FK_RULE_UNKNOWN,                /* removed where it is not */
    FK_RULE_ORPHAN,                 /* on the device without its parent */
    FK_RULE_DIFFERENT,              /* a known hash with other tokens or another parent */
    FK_RULE_PASSED_OVER,            /* locality, ownership, group or kind that routers pass over */
    FK_RULES
};

extern const char *const fk_rule_names[FK_RULES];

typedef void fk_finding_fn(void *arg, enum fk_rule rule, const char *text);

struct fk_check_rank { bool has_rank; int64_t rank; struct fk_mirror mirror; };

struct fk_check {
    FK_VEC(struct fk_check_rank) ranks;
    bool begun, whole;              /* all since a fresh start was seen */
    uint64_t next_seq;
    uint32_t block_size;
    uint64_t found[FK_RULES];
    uint64_t batches, stored, removed, cleared;     /* blocks; times */
    uint64_t missed;                /* batches */
    fk_finding_fn *finding;         /* may be NULL */
    void *arg;
};

void fk_check_init(struct fk_check *c, fk_finding_fn *finding, void *arg);
void fk_check_free(struct fk_check *c);
/* One message's frames. decoded: filled, to be shown, where the answer is 0; -EBADMSG: nothing in it
 * counts (a broken frame or batch, an old number), -ENOMEM. */
int fk_check_message(struct fk_check *c, const struct fk_frame *frames, size_t n,
                     struct fk_stream_batch *decoded);
uint64_t fk_check_findings(const struct fk_check *c);

#endif
