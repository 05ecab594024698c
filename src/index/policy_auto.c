/* policy_auto.c - our own policy. (Stands as lru until the real one lands.) */
#include "index/index.h"
#include "index/policies.h"

static uint32_t auto_score(struct fk_lane *lane, const struct fk_entry *e)
{
    return e->atime;
}

const struct fk_policy_ops fk_policy_auto = { .name = "auto", .score = auto_score };
