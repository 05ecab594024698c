/*
 * peer.c - what this node tells others of its blocks, and how far they reach with their own: spaces, generations of
 * slots, changes, snapshots, look-ups. See peer.h.
 */
#include "base/plant.h"
#include "peer/peer_impl.h"

#define REPORT_US 1000000u
#define SCAN_ENTRIES 4096u           /* of the index, looked at in one call */

int fk_peers_create(const struct fk_peers_params *params, struct fk_peers **out)
{
    struct fk_peers *p = calloc(1, sizeof(*p));

    if (!p)
        return -ENOMEM;
    p->params = *params;
    p->params.timeout_us = params->timeout_us ? params->timeout_us : PEERS_TIMEOUT_US;
    p->params.max_in_flight = params->max_in_flight ? params->max_in_flight : PEERS_MAX_IN_FLIGHT;
    p->params.staging_buffers = fk_min(params->staging_buffers ? params->staging_buffers : PEERS_STAGING, 64u);
    p->transport = fk_transport_name(params->transport);
    p->fetch = calloc(p->params.max_in_flight, sizeof(*p->fetch));
    if (!p->fetch || fk_vec_reserve(&p->todo, 2 * p->params.max_in_flight) ||
        fk_vec_reserve(&p->done, p->params.max_in_flight) || fk_vec_reserve(&p->stage_queue, PEERS_STAGES)) {
        fk_peers_destroy(p);
        return -ENOMEM;
    }
    for (uint32_t i = 0; i < p->params.max_in_flight; i++)
        p->fetch[i].next = i + 1;
    p->retry_us = UINT64_MAX;
    *out = p;
    return 0;
}

static void space_free(struct peers_space *s)
{
    if (!s)
        return;
    for (int t = 0; t < FK_TIERS; t++) {
        free(s->generation[t]);
        free(s->key[t]);
    }
    free(s->checksum);
    free(s->staging);
    free(s);
}

void fk_peers_destroy(struct fk_peers *p)
{
    if (!p)
        return;
    for (size_t i = 0; i < p->spaces.len; i++)
        space_free(p->spaces.data[i]);
    fk_vec_free(&p->spaces);
    fk_vec_free(&p->todo);
    fk_vec_free(&p->done);
    fk_vec_free(&p->hits);
    fk_vec_free(&p->bits);
    fk_vec_free(&p->answered);
    fk_vec_free(&p->stage_queue);
    free(p->fetch);
    free(p);
}

/* ---- spaces ---- */

static int space_memory(struct fk_peers *p, struct peers_space *s)
{
    bool by_place = strcmp(p->transport, "mooncake") == 0;

    for (int t = 0; t < FK_TIERS; t++) {
        s->generation[t] = calloc(fk_max(s->d.slots[t], 1u), sizeof(*s->generation[t]));
        s->key[t] = by_place ? calloc(fk_max(s->d.slots[t], 1u), sizeof(*s->key[t])) : NULL;
        if (!s->generation[t] || (by_place && !s->key[t]))
            return -ENOMEM;
    }
    s->checksum = calloc(fk_max(s->d.slots[FK_TIER_CPU], 1u), sizeof(*s->checksum));
    if (!s->checksum)
        return -ENOMEM;
    if (!p->params.share_ssd || !s->d.slots[FK_TIER_SSD])
        return 0;
    uint64_t fit = fk_max(PEERS_STAGING_BYTES / s->d.slot_bytes, (uint64_t)2);
    s->n_buffers = (uint32_t)fk_min(fit, (uint64_t)p->params.staging_buffers);
    size_t bytes = s->n_buffers * fk_round_up(s->d.slot_bytes, 4096);
    s->staging = aligned_alloc(4096, bytes);
    if (!s->staging)
        return -ENOMEM;
    memset(s->staging, 0, bytes);
    return fk_transport_register(p->params.transport, s->staging, bytes);
}

/* The windows that readers by place may see. */
static int share_places(struct fk_peers *p, const struct peers_space *s)
{
    bool shared[FK_TIERS] = { p->params.share_cpu, p->params.share_ssd };

    for (uint32_t t = 0; t < FK_TIERS; t++) {
        struct fk_window w = { .space = s->hash, .tier = t, .slot_bytes = (uint32_t)s->d.block_bytes,
                               .slots = s->d.slots[t] };
        int rc = shared[t] && w.slots ? fk_transport_share(p->params.transport, &w) : 0;
        if (rc)
            return rc;
    }
    return 0;
}

int fk_peers_space(struct fk_peers *p, const struct fk_peers_space *d)
{
    struct peers_space *s = calloc(1, sizeof(*s));
    int rc = s && fk_core_space_elsewhere(p->params.core, d->id) == 0 ? 0 : -ENOMEM;

    while (!rc && p->spaces.len <= d->id)
        rc = fk_vec_push(&p->spaces, NULL) ? -ENOMEM : 0;
    if (!rc) {
        s->d = *d;
        memcpy(&s->hash, d->fingerprint, sizeof(s->hash));
        rc = space_memory(p, s);
    }
    if (!rc) {
        peers_cluster_lock(p);
        rc = fk_cluster_space(p->params.cluster, d->fingerprint, d->block_bytes, &s->number);
        peers_cluster_unlock(p);
    }
    if (!rc)
        rc = fk_transport_register(p->params.transport, d->pool, d->slots[FK_TIER_CPU] * d->slot_bytes);
    rc = rc ? rc : share_places(p, s);
    if (rc) {
        space_free(s);
        return rc;
    }
    p->spaces.data[d->id] = s;
    return 0;
}

void fk_peers_group_private(struct fk_peers *p, uint32_t group)
{
    p->private_groups[group / 64 % 4] |= UINT64_C(1) << group % 64;
}

/* ---- telling ---- */

static bool shared(const struct fk_peers *p, unsigned tier, uint32_t group)
{
    return (tier == FK_TIER_CPU ? p->params.share_cpu : p->params.share_ssd) && (!peers_private(p, group) || FK_BUG(213));
}

static void tell_cluster(struct fk_peers *p, const struct fk_change *list, uint32_t n, uint64_t now_us)
{
    if (!n)
        return;
    peers_cluster_lock(p);
    fk_cluster_change(p->params.cluster, list, n, now_us);
    peers_cluster_unlock(p);
}

void fk_peers_tell(struct fk_peers *p, const struct fk_core_event *events, uint32_t n, uint64_t now_us)
{
    struct fk_change list[PEERS_BATCH];
    uint32_t k = 0;

    for (uint32_t i = 0; i < n; i++) {
        const struct fk_core_event *e = &events[i];
        struct peers_space *s = peers_space(p, e->space);
        uint32_t slot = e->slot[e->tier];
        if (!s || slot >= s->d.slots[e->tier])
            continue;
        if (e->stored && !FK_BUG(202))
            s->generation[e->tier][slot]++;
        if (e->tier == FK_TIER_CPU)
            s->checksum[slot] = 0;
        if (s->key[e->tier])
            s->key[e->tier][slot] = e->stored ? e->key : (struct fk_key){ 0 };
        if (!shared(p, e->tier, e->group))
            continue;
        p->blocks[e->tier] += e->stored ? 1 : -UINT64_C(1);
        list[k++] = (struct fk_change){ .key = e->key, .slot = slot, .generation = s->generation[e->tier][slot],
                                        .tier = e->tier, .space = s->number, .removed = !e->stored };
        if (k == PEERS_BATCH) {
            tell_cluster(p, list, k, now_us);
            k = 0;
        }
    }
    tell_cluster(p, list, k, now_us);
}

void fk_peers_events_lost(struct fk_peers *p, uint64_t now_us)
{
    /* What was said of any slot may be wrong now: nobody's old reference is good any more. */
    for (size_t i = 0; i < p->spaces.len; i++)
        for (int t = 0; p->spaces.data[i] && t < FK_TIERS; t++)
            for (uint32_t k = 0; k < p->spaces.data[i]->d.slots[t]; k++)
                p->spaces.data[i]->generation[t][k]++;
    for (size_t i = 0; i < p->spaces.len; i++)
        if (p->spaces.data[i])
            memset(p->spaces.data[i]->checksum, 0,
                   p->spaces.data[i]->d.slots[FK_TIER_CPU] * sizeof(*p->spaces.data[i]->checksum));
    peers_cluster_lock(p);
    fk_cluster_resync(p->params.cluster, now_us);
    peers_cluster_unlock(p);
}

/* The tiers from *tier on in which an entry is, as far as there is room for them; *tier: where to go on. */
static uint32_t scan_entry(const struct fk_peers *p, const struct fk_core_present *e, uint32_t *tier,
                           struct fk_change *out, uint32_t max)
{
    const struct peers_space *s = peers_space(p, e->space);
    uint32_t n = 0;

    for (; s && *tier < FK_TIERS; ++*tier) {
        uint32_t t = *tier;
        if (e->slot[t] == FK_NONE || !shared(p, t, e->group) || (FK_BUG(214) && t))
            continue;
        if (n == max)
            return n;
        out[n++] = (struct fk_change){ .key = e->key, .slot = e->slot[t], .tier = (uint8_t)t,
                                       .generation = s->generation[t][e->slot[t]], .space = s->number };
    }
    *tier = FK_TIERS;
    return n;
}

/* The cursor: FK_TIERS times the core's, and the tier to go on with: there may be room for one change only. */
uint32_t fk_peers_scan(struct fk_peers *p, uint64_t cursor, struct fk_change *out, uint32_t max,
                       uint64_t *next, bool *end)
{
    struct fk_core_present here;
    uint32_t at = (uint32_t)(cursor / FK_TIERS), tier = cursor % FK_TIERS, n = 0;

    *end = false;
    for (uint32_t looked = 0; !*end && n < max && looked < SCAN_ENTRIES; looked++) {
        uint32_t before = at;
        if (fk_core_present(p->params.core, &at, &here, 1))
            n += scan_entry(p, &here, &tier, out + n, max - n);
        else
            tier = FK_TIERS;
        if (tier < FK_TIERS && !FK_BUG(218)) {
            *next = FK_TIERS * (uint64_t)before + tier;
            return n;
        }
        tier = 0;
        *end = at == FK_NONE;
    }
    *next = FK_TIERS * (uint64_t)at;
    return n;
}

/* What others choose holders by. With every pump; cheap. */
void peers_report(struct fk_peers *p, uint64_t now_us)
{
    uint64_t slots[FK_TIERS] = { 0 };

    if (now_us - p->told_us < REPORT_US && p->told_us)
        return;
    p->told_us = now_us;
    for (size_t i = 0; i < p->spaces.len; i++)
        for (int t = 0; p->spaces.data[i] && t < FK_TIERS; t++)
            slots[t] += p->spaces.data[i]->d.slots[t];
    peers_cluster_lock(p);
    fk_cluster_report(p->params.cluster, (uint32_t)fk_min(p->stats.lent_now * 8, (uint64_t)1000), p->blocks, slots);
    peers_cluster_unlock(p);
}

/* ---- look-ups ---- */

uint32_t fk_peers_reach(struct fk_peers *p, uint32_t instance, uint32_t space, const struct fk_key *keys,
                        uint32_t n, uint32_t known, uint64_t now_us)
{
    const struct peers_space *s = peers_space(p, space);

    if (!s || known >= n || fk_vec_reserve(&p->hits, n) || fk_vec_reserve(&p->bits, (n + 63) / 64))
        return known;
    uint32_t here = fk_core_here(p->params.core, instance, keys, n, p->bits.data);
    if (here > known)                   /* what is here was declined: no more is wanted */
        return known;
    peers_cluster_lock(p);
    uint32_t reach = fk_cluster_extend(p->params.cluster, s->number, keys, n, known, p->bits.data, now_us,
                                       p->hits.data);
    peers_cluster_unlock(p);
    return reach;
}

void fk_peers_get_stats(const struct fk_peers *p, struct fk_peers_stats *out)
{
    *out = p->stats;
}

struct fk_rate fk_peers_block_rate(const struct fk_peers *p, uint32_t space)
{
    const struct peers_space *s = peers_space(p, space);

    return s ? fk_rate_of(&p->byte, (double)s->d.block_bytes) : (struct fk_rate){ 0 };
}
