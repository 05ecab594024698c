/* depot.c - see depot.h. */
#include "depot/depot.h"

#include "base/plant.h"
#include "base/util.h"

#define BATCH 64u
#define WRITE_BIT (UINT64_C(1) << 63)
#define REACH_TURNS 16                  /* between peers and store, in one look-up */
#define CANDIDATES 65536u               /* blocks that wait to be written */

struct candidate { struct fk_key key, parent; uint32_t space; };

struct fetch { uint64_t id; uint32_t space, slot, next; };      /* id: the core's */

struct write { uint32_t loan, next; };

struct fk_depot {
    struct fk_depot_params p;
    FK_VEC(struct fk_depot_space) spaces;       /* by the core's number; pool NULL: none */
    struct candidate *ring;             /* CANDIDATES */
    uint32_t ring_at, ring_n;
    struct fetch fetch[FK_DEPOT_FETCHES];
    struct write write[FK_DEPOT_WRITES_MAX];
    uint32_t free_fetch, free_write, fetches, writes, late;
    unsigned char *notes;               /* FK_STORE_NOTE_MAX for each fetch, then for each write; NULL: none */
    uint64_t overflowed;
    FK_VEC(uint64_t) bits;              /* of a look-up */
};

static const struct fk_depot_space *space_of(const struct fk_depot *d, uint32_t id)
{
    return id < d->spaces.len && d->spaces.data[id].pool ? &d->spaces.data[id] : NULL;
}

/* ---- look-ups ---- */

static uint32_t run_of_bits(const uint64_t *bits, uint32_t from, uint32_t n)
{
    while (from < n && bits[from / 64] >> from % 64 & 1)
        from++;
    return from;
}

static uint32_t peers_reach(struct fk_depot *d, uint32_t instance, uint32_t space, const struct fk_key *keys, uint32_t n,
                            uint32_t known, uint64_t now_us)
{
    return d->p.peers ? fk_peers_reach(d->p.peers, instance, space, keys, n, known, now_us) : known;
}

/* Each block may come from here, a peer or the store; whoever has the next ones takes the reach further. */
uint32_t fk_depot_reach(struct fk_depot *d, uint32_t instance, uint32_t space, const struct fk_key *keys, uint32_t n,
                        uint32_t known, uint64_t now_us)
{
    const struct fk_depot_space *s = space_of(d, space);
    uint32_t reach = known;

    if (!s || !fk_store_reads(d->p.store))
        return peers_reach(d, instance, space, keys, n, known, now_us);
    if (known >= n || fk_vec_reserve(&d->bits, (n + 63) / 64))
        return known;
    memset(d->bits.data, 0, (n + 63) / 64 * sizeof(*d->bits.data));
    if (fk_core_here(d->p.core, instance, keys, n, d->bits.data) > known)
        return known;                   /* what is here was declined: no more is wanted */
    for (int turn = 0; turn < REACH_TURNS; turn++) {
        uint32_t before = reach;
        reach = run_of_bits(d->bits.data, reach, n);
        reach += fk_store_has(d->p.store, s->store_id, keys + reach, n - reach);
        if (reach < n)
            reach = peers_reach(d, instance, space, keys, n, reach, now_us);
        if (reach == before || reach == n)
            break;
    }
    return reach;
}

/* ---- fetches ---- */

static void *slot_memory(const struct fk_depot_space *s, uint32_t slot)
{
    return (char *)s->pool + (uint64_t)slot * s->slot_bytes;
}

static unsigned char *note_of(const struct fk_depot *d, bool write, uint32_t at)
{
    return d->notes ? d->notes + ((size_t)at + (write ? FK_DEPOT_FETCHES : 0)) * FK_STORE_NOTE_MAX : NULL;
}

static int ask(struct fk_depot *d, const struct fk_core_fetch *want, uint64_t now_us)
{
    const struct fk_depot_space *s = space_of(d, want->space);
    uint32_t at = d->free_fetch;

    if (!s || at == FK_NONE)
        return at == FK_NONE ? -EAGAIN : -ENOENT;
    struct fk_store_req q = {
        .op = FK_STORE_READ, .space = s->store_id, .urgent = want->urgent, .key = want->key,
        .buf = slot_memory(s, want->cpu_slot), .user = at, .note = note_of(d, false, at),
    };
    if (d->p.filling)
        d->p.filling(d->p.ctx, want->space, want->cpu_slot);
    int rc = fk_store_submit(d->p.store, &q, 1, now_us + d->p.timeout_us, now_us);
    if (rc)
        return rc;
    d->free_fetch = d->fetch[at].next;
    d->fetch[at] = (struct fetch){ .id = want->id, .space = want->space, .slot = want->cpu_slot };
    d->fetches++;
    return 0;
}

bool fk_depot_fetch(struct fk_depot *d, const struct fk_core_fetch *want, uint64_t now_us)
{
    const struct fk_depot_space *s = space_of(d, want->space);

    if (FK_BUG(305) || !s || !fk_core_fetch_wanted(d->p.core, want->id))
        return false;
    return fk_store_has(d->p.store, s->store_id, &want->key, 1) && ask(d, want, now_us) == 0;
}

/* Without peers: the core's fetches are ours. */
static bool take_fetches(struct fk_depot *d, uint64_t now_us)
{
    struct fk_core_fetch want[BATCH];
    struct fk_core_fetch_done failed[BATCH];
    uint32_t n = fk_core_take_fetches(d->p.core, want, fk_min(BATCH, FK_DEPOT_FETCHES - d->fetches)), k = 0;

    for (uint32_t i = 0; i < n; i++) {
        int rc = fk_core_fetch_wanted(d->p.core, want[i].id) ? ask(d, &want[i], now_us) : -ECANCELED;
        if (rc)
            failed[k++] = (struct fk_core_fetch_done){ .id = want[i].id, .status = rc };
    }
    if (k)
        fk_core_fetch_done(d->p.core, failed, k, now_us);
    return n != 0;
}

static void fetch_free(struct fk_depot *d, uint32_t at)
{
    d->fetch[at].next = d->free_fetch;
    d->free_fetch = at;
    d->fetches--;
}

static void fetch_ended(struct fk_depot *d, const struct fk_store_done *e, uint64_t now_us)
{
    struct fetch *f = &d->fetch[e->user];
    bool busy = e->flags & FK_STORE_QUARANTINED;

    if (e->flags & FK_STORE_RELEASED) {
        d->late--;
        if (!FK_BUG(302))
            fk_core_fetch_released(d->p.core, f->id, now_us);
        fetch_free(d, (uint32_t)e->user);
        return;
    }
    if (!e->status && d->notes)
        d->p.read_note(d->p.ctx, f->space, f->slot, note_of(d, false, (uint32_t)e->user), e->note_bytes);
    struct fk_core_fetch_done done = { .id = f->id, .status = e->status, .busy = busy && !FK_BUG(301) };
    fk_core_fetch_done(d->p.core, &done, 1, now_us);
    d->late += busy;
    if (!busy)
        fetch_free(d, (uint32_t)e->user);
}

/* ---- writes ---- */

static void remember(struct fk_depot *d, struct fk_key key, struct fk_key parent, uint32_t space)
{
    if (d->ring_n == CANDIDATES) {
        d->overflowed++;
        return;
    }
    d->ring[(d->ring_at + d->ring_n++) % CANDIDATES] = (struct candidate){ key, parent, space };
}

bool fk_depot_tell(struct fk_depot *d, const struct fk_core_event *ev, uint32_t n)
{
    uint32_t before = d->ring_n;

    for (uint32_t i = 0; i < n && !d->p.on_reuse; i++)
        if (ev[i].stored && ev[i].tier == FK_TIER_CPU && (!d->p.is_private(d->p.ctx, ev[i].group) || FK_BUG(303)))
            remember(d, ev[i].key, ev[i].parent, ev[i].space);
    return !before && d->ring_n;
}

bool fk_depot_used(struct fk_depot *d, uint32_t space, uint32_t group, const struct fk_key *keys, uint32_t n)
{
    uint32_t before = d->ring_n;

    if (!d->p.on_reuse || d->p.is_private(d->p.ctx, group))
        return false;
    for (uint32_t i = 0; i < n && d->ring_n < CANDIDATES; i++)
        remember(d, keys[i], i ? keys[i - 1] : (struct fk_key){ 0 }, space);
    return !before && d->ring_n;
}

/* False: there is no room for another request. */
static bool write_one(struct fk_depot *d, const struct candidate *c, uint64_t now_us)
{
    const struct fk_depot_space *s = space_of(d, c->space);
    uint32_t at = d->free_write, slot, loan;

    if (!s || fk_store_has(d->p.store, s->store_id, &c->key, 1) ||
        fk_core_lend(d->p.core, s->id, c->key, FK_TIER_CPU, &slot, &loan))
        return true;
    uint32_t note_bytes = d->notes ? d->p.write_note(d->p.ctx, s->id, slot, note_of(d, true, at)) : 0;
    struct fk_store_req q = {
        .op = FK_STORE_WRITE, .space = s->store_id, .key = c->key, .parent = c->parent, .buf = slot_memory(s, slot),
        .user = WRITE_BIT | at, .note = note_bytes ? note_of(d, true, at) : NULL, .note_bytes = note_bytes,
    };
    uint32_t next = d->write[at].next;
    d->write[at].loan = loan;           /* before the store may ask for it */
    int rc = fk_store_submit(d->p.store, &q, 1, now_us + d->p.timeout_us, now_us);
    if (rc) {
        fk_core_loan_end(d->p.core, loan);
        return rc != -EAGAIN;
    }
    d->free_write = next;
    d->writes++;
    return true;
}

/* What the store has lost is written again, if it is still here. */
static void remember_lost(struct fk_depot *d)
{
    struct fk_store_lost lost[BATCH];
    uint32_t n;

    while ((n = fk_store_take_lost(d->p.store, lost, BATCH)) != 0)
        for (uint32_t i = 0; i < n; i++)
            for (size_t k = 0; k < d->spaces.len; k++)
                if (d->spaces.data[k].pool && d->spaces.data[k].store_id == lost[i].space)
                    remember(d, lost[i].key, lost[i].parent, d->spaces.data[k].id);
}

static void write_candidates(struct fk_depot *d, uint64_t now_us)
{
    remember_lost(d);
    while (d->ring_n && d->writes < d->p.max_writes && fk_store_writes(d->p.store)) {
        if (!write_one(d, &d->ring[d->ring_at], now_us))
            break;
        d->ring_at = (d->ring_at + 1) % CANDIDATES;
        d->ring_n--;
    }
}

static void write_ended(struct fk_depot *d, const struct fk_store_done *e)
{
    uint32_t at = (uint32_t)e->user;

    if (e->flags & FK_STORE_QUARANTINED) {      /* still being read from: it stays lent */
        d->late++;
        if (FK_BUG(304))
            fk_core_loan_end(d->p.core, d->write[at].loan);
        return;
    }
    d->late -= e->flags & FK_STORE_RELEASED ? 1 : 0;
    if (!FK_BUG(304) || !(e->flags & FK_STORE_RELEASED))
        fk_core_loan_end(d->p.core, d->write[at].loan);
    d->write[at].next = d->free_write;
    d->free_write = at;
    d->writes--;
}

bool fk_depot_sure(const struct fk_depot *d, uint64_t user)
{
    return fk_core_loan_good(d->p.core, d->write[(uint32_t)user].loan, FK_TIER_CPU);
}

/* ---- what comes of it ---- */

uint32_t fk_depot_pump(struct fk_depot *d, uint64_t now_us)
{
    struct fk_store_done e[BATCH];
    uint32_t n, sum = 0;

    do {        /* what has ended lets operations go on, which want more */
        n = fk_store_take(d->p.store, e, BATCH, now_us);
        for (uint32_t i = 0; i < n; i++)
            if (e[i].user & WRITE_BIT)
                write_ended(d, &e[i]);
            else
                fetch_ended(d, &e[i], now_us);
        sum += n;
    } while ((!d->p.peers && take_fetches(d, now_us)) || n == BATCH);
    write_candidates(d, now_us);
    return sum;
}

void fk_depot_reset(struct fk_depot *d)
{
    d->ring_n = 0;
    for (size_t i = 0; i < d->spaces.len; i++)
        if (d->spaces.data[i].pool && !FK_BUG(306))
            fk_store_reset(d->p.store, d->spaces.data[i].store_id);
}

bool fk_depot_idle(const struct fk_depot *d)
{
    return !fk_store_writes(d->p.store) || (!d->ring_n && !d->writes);
}

/* ---- opening ---- */

static void make_lists(struct fk_depot *d)
{
    for (uint32_t i = 0; i < FK_DEPOT_FETCHES; i++)
        d->fetch[i].next = i + 1 < FK_DEPOT_FETCHES ? i + 1 : FK_NONE;
    for (uint32_t i = 0; i < FK_DEPOT_WRITES_MAX; i++)
        d->write[i].next = i + 1 < FK_DEPOT_WRITES_MAX ? i + 1 : FK_NONE;
}

int fk_depot_create(const struct fk_depot_params *params, struct fk_depot **out)
{
    struct fk_depot *d = calloc(1, sizeof(*d));

    if (!d)
        return -ENOMEM;
    make_lists(d);
    d->p = *params;
    d->p.max_writes = fk_min(d->p.max_writes, FK_DEPOT_WRITES_MAX);
    d->ring = calloc(CANDIDATES, sizeof(*d->ring));
    if (d->p.write_note)
        d->notes = calloc(FK_DEPOT_FETCHES + FK_DEPOT_WRITES_MAX, FK_STORE_NOTE_MAX);
    if (!d->ring || (d->p.write_note && !d->notes)) {
        fk_depot_destroy(d, false);
        return -ENOMEM;
    }
    *out = d;
    return 0;
}

void fk_depot_destroy(struct fk_depot *d, bool keep_notes)
{
    if (!d)
        return;
    if (!keep_notes)
        free(d->notes);
    free(d->ring);
    fk_vec_free(&d->spaces);
    fk_vec_free(&d->bits);
    free(d);
}

int fk_depot_space(struct fk_depot *d, const struct fk_depot_space *space)
{
    while (d->spaces.len <= space->id)
        if (fk_vec_push(&d->spaces, (struct fk_depot_space){ 0 }))
            return -ENOMEM;
    d->spaces.data[space->id] = *space;
    return 0;
}

/* ---- for status and tests ---- */

void fk_depot_get_stats(const struct fk_depot *d, struct fk_depot_stats *out)
{
    *out = (struct fk_depot_stats){ .waiting = d->ring_n, .overflowed = d->overflowed, .fetches = d->fetches,
                                    .writes = d->writes, .late = d->late };
}

const char *fk_depot_check(const struct fk_depot *d)
{
    uint32_t free_fetches = 0, free_writes = 0;

    for (uint32_t i = d->free_fetch; i != FK_NONE && free_fetches <= FK_DEPOT_FETCHES; i = d->fetch[i].next)
        free_fetches++;
    for (uint32_t i = d->free_write; i != FK_NONE && free_writes <= FK_DEPOT_WRITES_MAX; i = d->write[i].next)
        free_writes++;
    if (free_fetches + d->fetches != FK_DEPOT_FETCHES || free_writes + d->writes != FK_DEPOT_WRITES_MAX)
        return "the depot's fetches or writes do not add up";
    return d->late <= d->fetches + d->writes ? NULL : "the depot counts more in quarantine than is under way";
}
