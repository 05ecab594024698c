/*
 * sim_events.c - KV events in the simulator: the real names, journal, view and subscription around the
 * simulated node, a model of the names files, and a subscriber that believes what it hears.
 *
 * At all times: stored and removed take turns for each block and tier, with the right hash, token, parent
 * and label. At quiet points: what it believes is what the node holds and can name. It is slow at
 * times, and it outlives crashes and restarts.
 *
 * Chance is drawn from a generator of its own, so that worlds are the same with and without. Callers:
 * sim_node.c, sim_caller.c, sim_model.c, sim.c, sim_check.c.
 */
#include "sim.h"

#include <stdio.h>

#include "api/feed.h"
#include "events/announce.h"

struct file_name {                          /* a record of a names file */
    struct fk_key key;
    struct fk_name name;
    uint32_t token;
};

struct sim_events {
    uint64_t rng, boot;
    bool loses_names, leaves_out, remote, starved;
    struct fk_journal journal;
    uint64_t journal_bytes;
    struct fk_names *names[SIM_MAX_SPACES];
    struct file_name *file[SIM_MAX_SPACES];         /* by SSD slot; outlives the node */
    flexkv_events *feed;
    FK_VEC(uint8_t) told;                   /* by key: a bit for each tier */
    uint64_t heard, resyncs;
};

static uint32_t below(struct sim *s, uint32_t n)
{
    return fk_rng_below(&s->events->rng, n);
}

/* Hashes name keys by their number, so that one knows what is meant. */
#define HASH_MIX 0x5eed5eed12345678ull

static uint64_t hash_of(uint32_t key)
{
    return (key + 1ull) ^ HASH_MIX;
}

static uint32_t token_of(const struct sim *s, uint32_t key)
{
    return (uint32_t)s->keys.data[key].key.lo;
}

static struct fk_name name_of(const struct sim *s, uint32_t key)
{
    const struct sim_key *k = &s->keys.data[key];

    return (struct fk_name){
        .hash = hash_of(key), .parent = k->parent_index == FK_NONE ? 0 : hash_of(k->parent_index),
        .label = k->ns, .root = k->parent_index == FK_NONE,
    };
}

static uint32_t space_of(const struct sim *s, uint32_t id)
{
    for (uint32_t i = 0; i < s->config.n_spaces; i++)
        if (s->space[i].id == id)
            return i;
    return 0;
}

/* ---- the node's side ------------------------------------------------------------------------------ */

void sim_events_told(struct sim *s, const struct fk_core_event *e)
{
    fk_announce(&s->events->journal, s->events->names[space_of(s, e->space)], e);
}

/* After the events of the put were told. */
void sim_events_put(struct sim *s, uint32_t space, const uint32_t *keys, const uint32_t *slots,
                    uint32_t n)
{
    for (uint32_t i = 0; i < n; i++) {
        struct fk_name name = { 0 };
        uint32_t token = token_of(s, keys[i]);
        if (slots[i] == FK_NONE)
            continue;
        if (!s->events->leaves_out || below(s, 8))
            name = name_of(s, keys[i]);
        fk_names_set(s->events->names[space], slots[i], &name, &token);
    }
}

/* Names of what is read and written, after the events of before were told. */
void sim_events_io(struct sim *s, uint32_t space, const struct fk_core_ssd_req *r)
{
    struct sim_events *x = s->events;
    struct fk_names *names = x->names[space];
    struct file_name *f = &x->file[space][r->ssd_slot];

    if (r->kind == FK_SSD_WRITE) {
        if (names->name[r->cpu_slot].hash && (!x->loses_names || below(s, 16)))
            *f = (struct file_name){ r->key, names->name[r->cpu_slot],
                                     *fk_names_tokens(names, r->cpu_slot) };
        return;
    }
    struct fk_name none = { 0 };
    bool good = names->ssd_hash[r->ssd_slot] && fk_key_equal(f->key, r->key) &&
                f->name.hash == names->ssd_hash[r->ssd_slot];
    fk_names_set(names, r->cpu_slot, good ? &f->name : &none, &f->token);
}

void sim_events_found(struct sim *s, uint32_t space)
{
    for (uint32_t i = 0; i < s->found.len; i++) {
        const struct fk_core_found *c = &s->found.data[i];
        const struct file_name *f = &s->events->file[space][c->slot];
        if (fk_key_equal(f->key, c->key))
            s->events->names[space]->ssd_hash[c->slot] = f->name.hash;
        else    /* its directory was out when the slot's next block was to be recorded: the name is that one's */
            s->events->loses_names |= !sim_disk_trusted(s);
    }
}

void sim_events_open(struct sim *s)
{
    struct sim_events *x = s->events;

    x->boot++;
    if (fk_journal_init(&x->journal, x->journal_bytes))
        abort();
    for (uint32_t i = 0; i < s->config.n_spaces; i++)
        if (fk_names_create(1, s->space[i].config->cpu_slots, s->space[i].config->ssd_slots,
                            &x->names[i]))
            abort();
}

/* In a crash a slot's name may be that of the block that was being written, while its record is still the
 * old one's. */
void sim_events_forget(struct sim *s, enum sim_end end)
{
    fk_journal_fini(&s->events->journal);
    for (uint32_t i = 0; i < s->config.n_spaces; i++) {
        fk_names_destroy(s->events->names[i]);
        s->events->names[i] = NULL;
        for (uint32_t k = 0; end == SIM_END_POWER && k < s->space[i].config->ssd_slots; k++)
            if (below(s, 2))
                s->events->file[i][k] = (struct file_name){ 0 };
    }
    s->events->loses_names |= end != SIM_END_CLEAN;
}

/* ---- the subscription's source ---------------------------------------------------------------------- */

#define sim_of(ev) ((struct sim *)(void *)(ev)->node)

static int feed_start(flexkv_events *ev, bool resync)
{
    struct sim_events *x = sim_of(ev)->events;

    x->resyncs += resync;
    ev->cursor = (struct fk_event_cursor){ x->boot, x->journal.head };
    return 0;
}

static int feed_fetch(flexkv_events *ev, uint32_t max, bool idle)
{
    struct sim_events *x = sim_of(ev)->events;
    uint32_t n = 1 + below(sim_of(ev), 24);
    const struct fk_event *e;

    if (ev->cursor.boot != x->boot || !fk_journal_has(&x->journal, ev->cursor.place))
        return -ESTALE;
    while (ev->list.n < n && (e = fk_journal_next(&x->journal, &ev->cursor.place)) != NULL)
        if (fk_event_list_add(&ev->list, e, fk_event_tokens(e)))
            abort();
    return 0;
}

static void walk_absent(flexkv_events *ev, const struct fk_absent_name *a)
{
    struct sim *s = sim_of(ev);
    const struct file_name *f = &s->events->file[space_of(s, a->space)][a->slot];
    struct fk_event e = { .id = fk_event_id(a->key), .hash = a->hash, .space = a->space,
                          .kind = FK_EVENT_STORED, .medium = FK_MEDIUM_STORAGE, .nameless = 1 };

    if (fk_key_equal(f->key, a->key) && f->name.hash == a->hash) {
        e.nameless = 0;
        e.n_tokens = 1;
        e.parent = f->name.parent;
        e.label = f->name.label;
        e.root = f->name.root;
    }
    if (fk_event_list_add(&ev->list, &e, &f->token))
        abort();
}

static int feed_walk(flexkv_events *ev)
{
    struct sim *s = sim_of(ev);
    struct fk_core_present there[8];
    uint32_t n = fk_core_present(s->core, &ev->walk_at, there, 1 + below(s, 8));

    for (uint32_t i = 0; i < n; i++) {
        struct fk_absent_name absent;
        if (fk_announce_present(&ev->list, s->events->remote ? NULL : &ev->view,
                                s->events->names[space_of(s, there[i].space)], &there[i], &absent))
            abort();
        if (absent.hash)
            walk_absent(ev, &absent);
    }
    return 0;
}

static void feed_count(flexkv_events *ev, uint32_t n)
{
    sim_of(ev)->events->heard += n;
}

static void feed_leave(flexkv_events *ev)
{
}

static struct fk_label feed_label(flexkv_events *ev, uint32_t number)
{
    static const char *const salt[SIM_MAX_NS] = { NULL, "1", "2" };

    return (struct fk_label){ .salt = salt[number] };
}

static const struct fk_feed_ops feed_ops = {
    .start = feed_start, .fetch = feed_fetch, .walk = feed_walk, .count = feed_count,
    .leave = feed_leave, .label = feed_label,
};

/* ---- the subscriber ----------------------------------------------------------------------------------- */

static void believe(struct sim *s, const flexkv_event *e)
{
    struct sim_events *x = s->events;
    uint32_t key = (uint32_t)((e->hash ^ HASH_MIX) - 1);
    enum fk_tier tier = e->medium == FLEXKV_MEDIUM_CPU ? FK_TIER_CPU : FK_TIER_SSD;
    bool stored = e->kind == FLEXKV_EVENT_STORED;

    SIM_CHECK(s, key < s->keys.len, "kv event: a hash that nobody gave");
    while (x->told.len < s->keys.len)
        if (fk_vec_push(&x->told, 0))
            abort();
    SIM_TRACE(s, "  heard: key %u tier %d %s", key, tier, stored ? "stored" : "removed");
    SIM_CHECK(s, !(x->told.data[key] >> tier & 1) == stored, "kv event: key %u %s tier %d twice", key,
              stored ? "stored in" : "removed from", tier);
    x->told.data[key] ^= (uint8_t)(1u << tier);
    sim_mix(s, key * 4 + tier * 2 + stored);
    if (!stored)
        return;
    struct fk_name name = name_of(s, key);
    SIM_CHECK(s, e->root == name.root && e->parent == name.parent && e->n_tokens == 1 &&
                     e->tokens[0] == token_of(s, key),
              "kv event: key %u has another block's parent or tokens", key);
    SIM_CHECK(s, (e->cache_salt ? (uint32_t)(e->cache_salt[0] - '0') : 0) == s->keys.data[key].ns,
              "kv event: key %u is announced for another namespace", key);
}

static int take(struct sim *s, uint32_t max)
{
    flexkv_event e[16];
    int n = flexkv_events_take(s->events->feed, e, fk_min(max, (uint32_t)fk_array_size(e)));

    SIM_CHECK(s, n >= 0, "kv events: take failed: %d", n);
    for (int i = 0; i < n; i++)
        believe(s, &e[i]);
    return n;
}

void sim_events_step(struct sim *s)
{
    struct sim_events *x = s->events;

    if (!below(s, 200))
        x->starved = !x->starved;
    if (!below(s, 3000)) {
        (void)flexkv_events_again(x->feed);
        if (x->told.len)
            memset(x->told.data, 0, x->told.len);
    }
    if (!below(s, x->starved ? 100 : 4))
        (void)take(s, 1 + below(s, 16));
}

/* Does the node hold the key there under a name? found: it is known where. */
static bool named(struct sim *s, uint32_t key, enum fk_tier tier, bool *in_file)
{
    const struct sim_key *k = &s->keys.data[key];
    const struct fk_names *names = s->events->names[k->space];
    struct fk_core_where w;

    *in_file = true;
    if (!fk_core_find(s->core, k->key, &w) || !(tier == FK_TIER_CPU ? w.cpu_ready : w.ssd_ready))
        return false;
    uint64_t hash = tier == FK_TIER_CPU ? names->name[w.cpu_slot].hash : names->ssd_hash[w.ssd_slot];
    SIM_CHECK(s, !hash || hash == hash_of(key), "names: key %u has another block's in tier %d", key,
              tier);
    SIM_CHECK(s, hash || s->events->leaves_out || s->events->loses_names,
              "names: key %u has lost its name in tier %d", key, tier);
    if (tier == FK_TIER_SSD)
        *in_file = fk_key_equal(s->events->file[k->space][w.ssd_slot].key, k->key);
    return hash;
}

void sim_events_check(struct sim *s)
{
    while (take(s, 16) > 0)
        ;
    for (uint32_t i = 0; i < s->events->told.len; i++) {
        for (int t = 0; t < FK_TIERS; t++) {
            bool in_file, there = named(s, i, (enum fk_tier)t, &in_file);
            bool told = s->events->told.data[i] >> t & 1;
            SIM_CHECK(s, told == there || (!told && !in_file),
                      "kv events: key %u is %s in tier %d, the subscriber believes otherwise", i,
                      there ? "there" : "not there", t);
        }
    }
}

/* ---- life ---------------------------------------------------------------------------------------- */

void sim_events_create(struct sim *s)
{
    struct sim_events *x = calloc(1, sizeof(*x));

    if (!x)
        abort();
    s->events = x;
    x->rng = s->seed * 0x9e3779b97f4a7c15ull + 1;
    x->journal_bytes = 4096u << below(s, 6);
    x->leaves_out = !below(s, 2);
    x->loses_names = !below(s, 3);
    x->remote = !below(s, 3);
    for (uint32_t i = 0; i < s->config.n_spaces; i++)
        x->file[i] = calloc(s->space[i].config->ssd_slots + 1, sizeof(*x->file[i]));
    x->feed = fk_feed_create((flexkv_node *)(void *)s, &feed_ops, FK_NONE);
    if (!x->feed)
        abort();
}

void sim_events_destroy(struct sim *s)
{
    flexkv_events_close(s->events->feed);
    for (uint32_t i = 0; i < s->config.n_spaces; i++)
        free(s->events->file[i]);
    fk_vec_free(&s->events->told);
    free(s->events);
}
