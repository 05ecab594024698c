/*
 * sim_model.c - the reference model: which keys there are, what bytes belong to them, where
 * events say they are, who holds them, which slots are in use. Plain tables, no cleverness.
 * Touches the model only (and reads the core's outputs). Callers: all of tests/sim.
 */
#include "sim.h"

#include <errno.h>

/* ---- keys ---------------------------------------------------------------------------------- */

static void key_table_grow(struct sim *s)
{
    uint32_t size = s->key_table_size ? s->key_table_size * 2 : 1024;

    free(s->key_table);
    s->key_table = malloc(size * sizeof(uint32_t));
    memset(s->key_table, 0xff, size * sizeof(uint32_t));
    s->key_table_size = size;
    for (uint32_t i = 0; i < s->keys.len; i++) {
        uint32_t h = (uint32_t)s->keys.data[i].key.lo & (size - 1);
        while (s->key_table[h] != FK_NONE)
            h = (h + 1) & (size - 1);
        s->key_table[h] = i;
    }
}

uint32_t sim_key_find(struct sim *s, struct fk_key key)
{
    if (!s->key_table_size)
        return FK_NONE;
    for (uint32_t h = (uint32_t)key.lo & (s->key_table_size - 1);;
         h = (h + 1) & (s->key_table_size - 1)) {
        uint32_t i = s->key_table[h];
        if (i == FK_NONE || fk_key_equal(s->keys.data[i].key, key))
            return i;
    }
}

uint32_t sim_key_intern(struct sim *s, struct fk_key key, uint32_t parent, uint32_t space,
                        uint32_t ns)
{
    struct sim_key k = { .key = key, .parent_index = parent, .space = (uint8_t)space,
                         .ns = (uint8_t)ns };
    uint32_t i = sim_key_find(s, key);

    if (i != FK_NONE)
        return i;
    if (parent != FK_NONE)
        k.parent = s->keys.data[parent].key;
    if (fk_vec_push(&s->keys, k))
        abort();
    if (s->keys.len * 2 > s->key_table_size) {
        key_table_grow(s);
    } else {
        uint32_t h = (uint32_t)key.lo & (s->key_table_size - 1);
        while (s->key_table[h] != FK_NONE)
            h = (h + 1) & (s->key_table_size - 1);
        s->key_table[h] = (uint32_t)s->keys.len - 1;
    }
    return (uint32_t)s->keys.len - 1;
}

/* ---- bytes: a function of key, rank and epoch (the number of resets before the put) ---------- */

static uint64_t bytes_seed(const struct sim_key *k, uint32_t rank, uint32_t epoch)
{
    uint64_t x = k->key.lo ^ (k->key.hi << 17 | k->key.hi >> 47);

    x += (rank + 1) * 0x9e3779b97f4a7c15ull;
    return fk_rng_next(&x) + epoch * 0xd6e8feb86659fd93ull;
}

static inline uint64_t next_word(uint64_t *x)
{
    *x ^= *x << 13;
    *x ^= *x >> 7;
    *x ^= *x << 17;
    return *x;
}

void sim_fill(const struct sim_key *k, uint32_t rank, uint32_t epoch, void *buf, uint32_t bytes)
{
    uint64_t x = bytes_seed(k, rank, epoch) | 1, *p = buf;

    for (uint32_t i = 0; i < bytes / 8; i++)
        p[i] = next_word(&x);
}

static bool bytes_equal(uint64_t x, const uint64_t *p, uint32_t words)
{
    for (uint32_t i = 0; i < words; i++)
        if (p[i] != next_word(&x))
            return false;
    return true;
}

bool sim_bytes_ok(const struct sim *s, const struct sim_key *k, uint32_t rank, uint32_t epoch_min,
                  const void *buf, uint32_t bytes)
{
    for (uint32_t e = s->epoch + 1; e-- > epoch_min;)
        if (bytes_equal(bytes_seed(k, rank, e) | 1, buf, bytes / 8))
            return true;
    return false;
}

void sim_junk(struct sim *s, void *buf, uint32_t bytes)
{
    uint64_t x = fk_rng_next(&s->rng) | 1, *p = buf;

    for (uint32_t i = 0; i < bytes / 8; i++)
        p[i] = next_word(&x);
}

/* ---- slots in use ------------------------------------------------------------------------------ */

void sim_use(struct sim *s, struct sim_slot_use *u, bool write, const char *what, uint32_t slot)
{
    SIM_CHECK(s, !u->writers, "slot in use: %s slot %u is being written, and now %s", what, slot,
              write ? "written again" : "read");
    SIM_CHECK(s, !write || !u->readers, "slot in use: %s slot %u is being read, and now written",
              what, slot);
    if (write)
        u->writers++;
    else
        u->readers++;
}

void sim_unuse(struct sim_slot_use *u, bool write)
{
    if (write)
        u->writers--;
    else
        u->readers--;
}

void sim_check_unowned(struct sim *s, uint32_t space, enum fk_tier tier, uint32_t slot)
{
    for (uint32_t i = 0; i < s->keys.len; i++) {
        const struct sim_key *k = &s->keys.data[i];
        struct fk_core_where w;
        if (k->space != space || !k->there[tier] || !fk_core_find(s->core, k->key, &w))
            continue;
        uint32_t at = tier == FK_TIER_CPU ? w.cpu_slot : w.ssd_slot;
        SIM_CHECK(s, at != slot, "slot reuse: %s slot %u of space %u is written while key %u is "
                  "announced there", tier == FK_TIER_CPU ? "cpu" : "ssd", slot, space, i);
    }
}

/* ---- holds and events ---------------------------------------------------------------------------- */

void sim_hold(struct sim *s, const uint32_t *keys, uint32_t n, int by)
{
    for (uint32_t i = 0; i < n; i++) {
        struct sim_key *k = &s->keys.data[keys[i]];
        k->leased += (uint32_t)by;
        k->hold_broken = k->hold_broken && k->leased;
    }
}

void sim_set_there(struct sim *s, struct sim_key *k, enum fk_tier tier, bool there)
{
    if (k->there[tier] != there && k->parent_index != FK_NONE)
        s->keys.data[k->parent_index].children_there[tier] += there ? 1 : -1u;
    k->there[tier] = there;
}

static void check_stored(struct sim *s, uint32_t i, enum fk_tier tier)
{
    struct sim_key *k = &s->keys.data[i];

    SIM_CHECK(s, !k->there[tier], "events: key %u stored twice in tier %d", i, tier);
    SIM_CHECK(s, k->complete_epoch > s->space[k->space].epoch_floor,
              "visible too early: key %u announced in tier %d before a whole put of it", i, tier);
    sim_set_there(s, k, tier, true);
}

/* A fault may take a block from under a lease, at once or in a later sweep. */
static bool removal_may_hit_held(const struct sim *s, enum sim_call call)
{
    return (s->rough_since_quiet && call == SIM_CALL_TICK) || call == SIM_CALL_RESET ||
           call == SIM_CALL_SSD_BAD || call == SIM_CALL_JOB_BAD || call == SIM_CALL_DIRS || call == SIM_CALL_RECOVER;
}

/* Slots that the namespace holds in the tier, in whatever state: by the index now, by the events
 * up to the one looked at, and by jobs and I/O left from before a reset. */
static uint32_t group_slots(struct sim *s, uint32_t space, uint32_t ns, enum fk_tier tier)
{
    uint32_t n = 0;

    for (uint32_t i = 0; i < s->keys.len; i++) {
        const struct sim_key *k = &s->keys.data[i];
        struct fk_core_where w;
        if (k->space != space || k->ns != ns)
            continue;
        bool held = fk_core_find(s->core, k->key, &w) &&
                    (tier == FK_TIER_CPU ? w.cpu_slot : w.ssd_slot) != FK_NONE;
        n += k->there[tier] || held;
    }
    for (uint32_t i = 0; i < SIM_MAX_OPS; i++)
        n += s->ops[i].used && s->ops[i].epoch != s->epoch ? s->ops[i].n : 0;
    if (s->epoch != s->quiet_epoch) {       /* a reset: I/O from before it may still be about */
        struct flexkv_stats st;
        fk_core_get_stats(s->core, &st);
        n += (uint32_t)(st.write_backlog_blocks + s->reqs.len);
    }
    return n;
}

/* With directories out a promise is kept in part: groups then live from what is left, where room for a
 * block of one's own is made by giving up another one, whoever's request it is. */
static uint32_t promise(const struct sim *s, uint32_t space, uint32_t ns, enum fk_tier tier)
{
    const struct sim_space_config *c = s->space[space].config;
    uint32_t out = 0;

    for (uint32_t slot = 0; tier == FK_TIER_SSD && slot < c->ssd_slots; slot++)
        out += s->space[space].dirs_out >> slot / c->stripe_slots % s->config.n_dirs & 1;
    return out ? (uint32_t)((uint64_t)c->quota[ns].guaranteed[tier] * (c->ssd_slots - out) / c->ssd_slots)
               : c->quota[ns].guaranteed[tier];
}

/* A group with a guarantee does not lose a block to another one's request. */
static void check_guarantee(struct sim *s, const struct sim_key *k, enum fk_tier tier,
                            enum sim_call call)
{
    const struct sim_space_config *c = s->space[k->space].config;

    if (!c->quotas || (call != SIM_CALL_PUT && call != SIM_CALL_GET && call != SIM_CALL_PREFETCH))
        return;
    if (s->call_space == k->space && s->call_group == k->ns)
        return;
    uint32_t have = group_slots(s, k->space, k->ns, tier);
    uint32_t due = promise(s, k->space, k->ns, tier);
    SIM_CHECK(s, have >= due,
              "guarantee: namespace %u of space %u has at most %u blocks in tier %d, guaranteed "
              "%u, and lost one to namespace %u", k->ns, k->space, have, tier, due, s->call_group);
}

static void check_removed(struct sim *s, uint32_t i, enum fk_tier tier, enum sim_call call)
{
    struct sim_key *k = &s->keys.data[i];

    SIM_CHECK(s, k->there[tier], "events: key %u removed from tier %d where it is not", i, tier);
    SIM_CHECK(s, !k->leased || k->hold_broken || removal_may_hit_held(s, call),
              "held block lost: key %u left tier %d under a lease (call %d)", i, tier, call);
    SIM_CHECK(s, !k->children_there[tier] || removal_may_hit_held(s, call) || call == SIM_CALL_TICK,
              "prefix broken: key %u is evicted from tier %d before its %u children (call %d)", i,
              tier, k->children_there[tier], call);
    k->hold_broken = k->leased != 0;
    sim_set_there(s, k, tier, false);
    s->evictions++;
    check_guarantee(s, k, tier, call);
}

static void take_events(struct sim *s, enum sim_call call)
{
    struct fk_core_event ev[64];
    uint32_t n;

    while ((n = fk_core_take_events(s->core, ev, 64)) > 0) {
        for (uint32_t i = 0; i < n; i++) {
            uint32_t k = sim_key_find(s, ev[i].key);
            SIM_CHECK(s, k != FK_NONE, "events: unknown key announced");
            SIM_CHECK(s, ev[i].tier < FK_TIERS, "events: tier %u", ev[i].tier);
            SIM_CHECK(s, s->space[s->keys.data[k].space].id == ev[i].space,
                      "events: key %u announced for another space", k);
            SIM_CHECK(s, fk_key_equal(ev[i].parent, s->keys.data[k].parent) || !ev[i].stored,
                      "events: key %u announced with a wrong parent", k);
            SIM_TRACE(s, "  event key %u tier %u %s", k, ev[i].tier,
                      ev[i].stored ? "stored" : "removed");
            sim_mix(s, k * 4 + ev[i].tier * 2 + ev[i].stored);
            sim_events_told(s, &ev[i]);
            if (ev[i].stored)
                check_stored(s, k, ev[i].tier);
            else
                check_removed(s, k, ev[i].tier, call);
        }
    }
}

void sim_after(struct sim *s, enum sim_call call)
{
    struct flexkv_completion c[16];
    uint32_t n;

    while ((n = fk_core_take_completions(s->core, c, 16)) > 0)
        for (uint32_t i = 0; i < n; i++)
            sim_completion(s, &c[i]);
    take_events(s, call);
}
