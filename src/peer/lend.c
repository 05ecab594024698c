/*
 * lend.c - the owner's side: what others may read, from the cpu slots at once, from SSD through staging buffers.
 * See peer.h.
 *
 *   SSD:  grant -> QUEUED -> (a buffer is free) READING -> LENT -> release -> FREE
 */
#include "base/plant.h"
#include "peer/peer_impl.h"

/* g->pin: a loan of the core, or a stage. */
static void *loan_pin(uint32_t loan)
{
    return (void *)((uintptr_t)loan << 1 | 1);
}

static void *stage_pin(uint32_t stage)
{
    return (void *)(((uintptr_t)stage + 1) << 1);
}

static struct peers_space *space_by_hash(const struct fk_peers *p, uint64_t hash)
{
    for (size_t i = 0; i < p->spaces.len; i++)
        if (p->spaces.data[i] && p->spaces.data[i]->hash == hash)
            return p->spaces.data[i];
    return NULL;
}

static uint64_t own_epoch(const struct fk_peers *p)
{
    peers_cluster_lock(p);
    uint64_t epoch = fk_cluster_epoch(p->params.cluster);
    peers_cluster_unlock(p);
    return epoch;
}

/* Whether the request is of this node, this space, this slot as it is now; *key: the block's. */
static int check_request(const struct fk_peers *p, const struct peers_space *s, const struct fk_block_ref *r,
                         struct fk_key *key)
{
    if (!s || r->tier >= FK_TIERS || !(r->tier == FK_TIER_CPU ? p->params.share_cpu : p->params.share_ssd))
        return -EACCES;
    if (r->slot >= s->d.slots[r->tier])
        return -ENOENT;
    bool by_place = fk_key_is_zero(r->key);
    *key = by_place && s->key[r->tier] ? s->key[r->tier][r->slot] : r->key;
    if (fk_key_is_zero(*key))
        return -ENOENT;
    if (by_place)
        return 0;
    if ((r->epoch != own_epoch(p) && !FK_BUG(205)) || r->bytes != s->d.block_bytes)
        return -ENOENT;
    return r->generation == s->generation[r->tier][r->slot] || FK_BUG(206) ? 0 : -ENOENT;
}

static int lend_from_ssd(struct fk_peers *p, struct peers_space *s, const struct fk_block_ref *r,
                         uint32_t loan, struct fk_key key, struct fk_grant *g)
{
    uint32_t at = 0;

    while (at < PEERS_STAGES && p->stage[at].state != STAGE_FREE)
        at++;
    if (at == PEERS_STAGES)
        return -EAGAIN;
    p->stage[at] = (struct stage){ .key = key, .generation = s->generation[FK_TIER_SSD][r->slot],
                                   .space = s->d.id, .slot = r->slot, .loan = loan, .buffer = FK_NONE,
                                   .state = STAGE_QUEUED };
    p->stage_queue.data[p->stage_queue.len++] = at;
    g->later = p->stage[at].later = ++p->stages << 8 | at;
    return -EINPROGRESS;
}

int fk_peers_grant(struct fk_peers *p, const struct fk_block_ref *r, struct fk_grant *g)
{
    struct peers_space *s = space_by_hash(p, r->space);
    struct fk_key key;
    uint32_t slot, loan;
    int rc = check_request(p, s, r, &key);

    if (!rc)
        rc = fk_core_lend(p->params.core, s->d.id, key, (enum fk_tier)r->tier, &slot, &loan);
    if (rc) {
        p->stats.refused++;
        return rc;
    }
    if (peers_private(p, fk_core_loan_group(p->params.core, loan)) && !FK_BUG(207))
        rc = -EACCES;
    else if (slot != r->slot)
        rc = -ENOENT;
    else if (r->tier == FK_TIER_SSD)
        rc = lend_from_ssd(p, s, r, loan, key, g);
    if (rc && rc != -EINPROGRESS) {
        fk_core_loan_end(p->params.core, loan);
        p->stats.refused++;
        return rc;
    }
    p->stats.lent_now++;
    if (rc)
        return rc;
    g->data = (char *)s->d.pool + (uint64_t)slot * s->d.slot_bytes;
    g->bytes = (uint32_t)s->d.block_bytes;
    g->checksum = s->checksum[slot];    /* what many want is summed up once */
    g->has_checksum = g->checksum != 0;
    g->key = key;
    g->generation = s->generation[r->tier][slot];
    g->epoch = own_epoch(p);
    g->pin = loan_pin(loan);
    return 0;
}

/* ---- staging ---- */

static void free_stage(struct fk_peers *p, uint32_t at)
{
    struct stage *st = &p->stage[at];
    struct peers_space *s = p->spaces.data[st->space];

    if (st->buffer != FK_NONE)
        s->buffers_used &= ~(UINT64_C(1) << st->buffer);
    fk_core_loan_end(p->params.core, st->loan);
    p->stats.lent_now--;
    st->state = STAGE_FREE;
}

static char *buffer_of(const struct fk_peers *p, const struct stage *st)
{
    const struct peers_space *s = p->spaces.data[st->space];

    return s->staging + st->buffer * fk_round_up(s->d.slot_bytes, 4096);
}

static bool take_buffer(struct peers_space *s, uint32_t *buffer)
{
    uint64_t all = s->n_buffers == 64 ? UINT64_MAX : (UINT64_C(1) << s->n_buffers) - 1;
    uint64_t unused = all & ~s->buffers_used;

    if (!unused)
        return false;
    *buffer = (uint32_t)__builtin_ctzll(unused);
    s->buffers_used |= UINT64_C(1) << *buffer;
    return true;
}

uint32_t fk_peers_take_stage(struct fk_peers *p, struct fk_peers_stage *out, uint32_t max)
{
    size_t kept = 0;
    uint32_t n = 0;

    for (size_t i = 0; i < p->stage_queue.len; i++) {
        uint32_t at = p->stage_queue.data[i];
        struct stage *st = &p->stage[at];
        if (n == max || !take_buffer(p->spaces.data[st->space], &st->buffer)) {
            p->stage_queue.data[kept++] = at;
            continue;
        }
        st->state = STAGE_READING;
        out[n++] = (struct fk_peers_stage){ .id = at, .space = st->space, .ssd_slot = st->slot, .key = st->key,
                                            .buffer = buffer_of(p, st) };
    }
    p->stage_queue.len = kept;
    return n;
}

bool fk_peers_wants_stage(const struct fk_peers *p)
{
    for (size_t i = 0; i < p->stage_queue.len; i++) {
        const struct peers_space *s = p->spaces.data[p->stage[p->stage_queue.data[i]].space];
        if (__builtin_popcountll(s->buffers_used) < (int)s->n_buffers)
            return true;
    }
    return false;
}

void fk_peers_staged(struct fk_peers *p, uint32_t id, int status)
{
    struct stage *st = &p->stage[id];
    struct peers_space *s = p->spaces.data[st->space];

    if (status) {
        uint64_t later = st->later;
        if (status == -EBADMSG)
            fk_core_loan_bad(p->params.core, st->loan);
        free_stage(p, id);
        (void)fk_transport_granted(p->params.transport, later, status == -EIO ? -EIO : -ENOENT, NULL);
        return;
    }
    st->state = STAGE_LENT;
    if (FK_BUG(211))
        s->buffers_used &= ~(UINT64_C(1) << st->buffer);
    struct fk_grant g = { .data = buffer_of(p, st), .bytes = (uint32_t)s->d.block_bytes, .key = st->key,
                          .generation = st->generation, .epoch = own_epoch(p), .pin = stage_pin(id) };
    /* Who asked may have gone: the transport releases it then. */
    if (fk_transport_granted(p->params.transport, st->later, 0, &g))
        free_stage(p, id);
}

int fk_peers_release(struct fk_peers *p, const struct fk_block_ref *r, struct fk_grant *g)
{
    uintptr_t pin = (uintptr_t)g->pin;
    int rc = 0;

    if (pin & 1) {
        uint32_t loan = (uint32_t)(pin >> 1);
        const struct peers_space *s = space_by_hash(p, r->space);
        bool same = s && g->generation == s->generation[r->tier][r->slot];
        if (same && g->has_checksum)
            s->checksum[r->slot] = g->checksum;
        rc = (same && fk_core_loan_good(p->params.core, loan, (enum fk_tier)r->tier)) || FK_BUG(208) ? 0 : -ENOENT;
        if (!FK_BUG(219))
            fk_core_loan_end(p->params.core, loan);
        p->stats.lent_now--;
    } else {
        free_stage(p, (uint32_t)(pin >> 1) - 1);    /* verified when it was read: it is that block whatever came since */
    }
    p->stats.lent_blocks += rc == 0;
    return rc;
}
