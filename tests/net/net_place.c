/* net_place.c - see net_place.h. The backend's functions run in the fibers of net_fiber.c. */
#include "net_place.h"

#include "base/checksum.h"
#include "net_fiber.h"
#include "net_store.h"
#include "store/format.h"

#define NET_PLACE_SEED 217u              /* so that the seeds kept in seeds.txt from before have none */
#define LEFTOVER_US 3000000u
#define TORN_US 1000000u                /* what was written so shortly before a machine failed may be torn */

/* What the backend calls a space. */
struct shelf_of { struct net_node *node; uint32_t space, type; };

static struct net_place *place(struct net_world *w)
{
    return w->place;
}

/* ---- time and trouble ---- */

static bool rough(const struct net_world *w)
{
    return !w->calm && !w->quiet;
}

static void pass(struct net_world *w, struct net_node *p)
{
    struct net_place *x = place(w);
    uint64_t us = net_below(w, w->quiet ? 200 : (uint32_t)x->slow_us);

    if (rough(w) && net_chance(w, 150))
        us += net_below(w, (uint32_t)w->place->timeout_us * 3);
    if (rough(w) && x->hangs_until_us[p->home] > w->net.now_us)
        us += x->hangs_until_us[p->home] - w->net.now_us;
    net_fiber_sleep(us);
}

/* Takes its time, and may fail. */
static int call(struct net_world *w, struct net_node *p)
{
    pass(w, p);
    if (rough(w) && place(w)->gone_until_us[p->home] > w->net.now_us)
        return net_chance(w, 2) ? -ESTALE : -EIO;
    return rough(w) && net_below(w, 1024) < place(w)->fault_ppk ? -EIO : 0;
}

/* ---- files ---- */

static void unref(struct net_file *f)
{
    if (--f->refs == 0)
        free(f);
}

static struct net_file **find(struct net_shelf *s, struct fk_key key)
{
    for (size_t i = 0; i < s->files.len; i++)
        if (fk_key_equal(s->files.data[i]->key, key))
            return &s->files.data[i];
    return NULL;
}

static void remove_name(struct net_shelf *s, struct net_file **at)
{
    struct net_file *f = *at;

    s->changed[store_key_part(f->key)]++;
    *at = s->files.data[--s->files.len];
    unref(f);
}

bool net_place_has(const struct net_world *w, uint32_t type, struct fk_key key)
{
    return find(&w->place->shelf[type], key) != NULL;
}

static uint64_t file_bytes(const struct net_world *w, uint32_t type)
{
    return w->type[type].slice_bytes * w->type[type].ranks;
}

uint64_t net_place_bytes(const struct net_world *w)
{
    uint64_t bytes = 0;

    for (uint32_t t = 0; t < NET_TYPES; t++)
        bytes += w->place->shelf[t].files.len * file_bytes(w, t);
    return bytes;
}

/* ---- the backend: opening ---- */

static int place_open(const struct fk_store_params *p, void **store, char *error, size_t error_bytes)
{
    (void)error, (void)error_bytes;
    *store = p->arg;
    return 0;
}

static void place_close(void *store)
{
    struct net_node *p = store;

    for (uint32_t s = 0; s < p->n_spaces; s++) {
        free(p->space[s].shelf);
        p->space[s].shelf = NULL;
    }
}

static int place_space(void *store, const struct fk_store_space *d, void **space, char *error, size_t error_bytes)
{
    struct net_node *p = store;
    struct net_world *w = net_current;
    uint32_t s = 0;

    (void)error, (void)error_bytes;
    while (s < p->n_spaces && memcmp(w->type[p->space[s].type].fingerprint, d->fingerprint, 16))
        s++;
    NET_CHECK(w, s < p->n_spaces && d->block_bytes == p->space[s].slot_bytes, "store: a space that nobody has");
    struct shelf_of *of = malloc(sizeof(*of));
    if (!of)
        abort();
    *of = (struct shelf_of){ p, s, p->space[s].type };
    *space = p->space[s].shelf = of;
    return 0;
}

/* ---- reading ---- */

/* The bytes go where a fetch still waits for them, or at least keeps the slot. */
static void deliver(struct net_world *w, const struct shelf_of *of, const struct net_file *f, void *buf)
{
    struct net_space *sp = &of->node->space[of->space];
    struct net_fetch *to = net_fetch_into(of->node, buf);

    NET_CHECK(w, to && to->stored, "store: node %u reads key %u into a slot that nobody fetches into, or another", net_at(w, of->node),
              f->index);
    memcpy(buf, f->bytes, sp->slot_bytes);
    if (!to->ended)
        to->born = f->born;
}

static int place_get(void *space, struct fk_key key, void *buf, struct fk_store_note *note)
{
    const struct shelf_of *of = space;
    struct net_world *w = net_current;
    struct net_shelf *s = &place(w)->shelf[of->type];
    int rc = call(w, of->node);

    note->bytes = 0;
    struct net_file **at = rc ? NULL : find(s, key);
    if (!at)
        return rc ? rc : -ENOENT;
    struct net_file *f = *at;
    f->refs++;
    if (of->node->n_open < NET_OPEN)    /* for kill -9 */
        of->node->open[of->node->n_open++] = f;
    else
        net_fail(w, "sim: too many files are open");
    rc = call(w, of->node);
    if (!rc) {
        deliver(w, of, f, buf);
        pass(w, of->node);
        rc = f->checksum == fk_block_checksum(key, buf, file_bytes(w, of->type)) ? 0 : -EBADMSG;
    }
    at = find(s, key);
    if (rc == -EBADMSG) {
        place(w)->lost++;
        if (at && *at == f)
            remove_name(s, at);
    } else if (!rc) {
        f->used_us = w->net.now_us;
        w->n.store_reads++;
    }
    net_file_closed(of->node, f);
    return rc;
}

void net_file_closed(struct net_node *p, struct net_file *f)
{
    uint32_t i = 0;

    while (p->open[i] != f)
        i++;
    p->open[i] = p->open[--p->n_open];
    unref(f);
}

/* ---- writing ---- */

static struct net_temp *temp_of(struct net_place *x, uint64_t id)
{
    for (size_t i = 0; i < x->temps.len; i++)
        if (x->temps.data[i].id == id)
            return &x->temps.data[i];
    return NULL;
}

static void unlink_temp(struct net_place *x, uint64_t id)
{
    struct net_temp *t = temp_of(x, id);

    if (t)
        *t = x->temps.data[--x->temps.len];
}

static void give_name(struct net_world *w, const struct shelf_of *of, struct fk_key key, uint32_t index, const uint8_t *bytes)
{
    struct net_shelf *s = &place(w)->shelf[of->type];
    struct net_file *f = calloc(1, sizeof(*f)), **old = find(s, key);

    if (!f)
        abort();
    NET_CHECK(w, net_bytes_ok(w, of->type, index, bytes), "wrong bytes: node %u gives a file of other bytes the name of key %u",
              net_at(w, of->node), index);
    *f = (struct net_file){ .key = key, .index = index, .refs = 1, .born = ++place(w)->serial, .written_us = w->net.now_us,
                            .used_us = w->net.now_us, .home = of->node->home };
    memcpy(f->bytes, bytes, file_bytes(w, of->type));
    f->checksum = fk_block_checksum(key, bytes, file_bytes(w, of->type));
    s->changed[store_key_part(key)]++;
    w->n.store_writes++;
    if (old) {
        unref(*old);
        *old = f;
    } else if (fk_vec_push(&s->files, f)) {
        abort();
    }
}

static int write_temp(struct net_world *w, const struct shelf_of *of, uint64_t id, const void *buf, uint8_t *to)
{
    size_t bytes = file_bytes(w, of->type), half = net_below(w, (uint32_t)bytes);
    int rc;

    memcpy(to, buf, half);
    rc = call(w, of->node);
    memcpy(to + half, (const uint8_t *)buf + half, bytes - half);
    if (!rc && rough(w) && place(w)->full_until_us > w->net.now_us)
        rc = -ENOSPC;
    if (!rc && !temp_of(place(w), id))
        rc = -ECANCELED;                /* somebody took it for a dead writer's */
    return rc;
}

static int place_put(void *space, struct fk_key key, struct fk_key parent, const void *buf,
                     const struct fk_store_note *note, const struct fk_store_sure *sure)
{
    const struct shelf_of *of = space;
    struct net_world *w = net_current;
    struct net_node *p = of->node;
    struct net_space *sp = &p->space[of->space];
    uint32_t index = net_key_find(w, key), slot = (uint32_t)((size_t)((const uint8_t *)buf - sp->pool) / sp->slot_bytes);
    uint8_t bytes[NET_BYTES];

    (void)parent, (void)note;
    NET_CHECK(w, index != FK_NONE && slot < sp->cpu_slots, "store: a write of no key or slot");
    NET_CHECK(w, !(w->home[p->home].private_ns >> w->keys.data[index].ns & 1),
              "private: node %u writes key %u of namespace %u to the store", net_at(w, p), index, w->keys.data[index].ns);
    int rc = call(w, p);
    struct net_file **old = find(&place(w)->shelf[of->type], key);
    if (rc || old) {
        if (!rc)
            (*old)->used_us = w->net.now_us;
        return rc ? rc : 1;
    }
    struct net_temp t = { .id = ++place(w)->temp_serial, .begun_us = w->net.now_us, .type = of->type,
                          .generation = place(w)->shelf[of->type].generation };
    if (fk_vec_push(&place(w)->temps, t))
        abort();
    net_use(w, p, &sp->cpu_use[slot], false, "cpu", slot);
    rc = write_temp(w, of, t.id, buf, bytes);
    net_unuse(&sp->cpu_use[slot], false);
    if (!rc && !sure->sure(sure->arg, sure->user))
        rc = -ECANCELED;
    if (!rc) {
        pass(w, p);                     /* a writer may be killed here */
        if (!temp_of(place(w), t.id) || place(w)->shelf[of->type].generation != t.generation)
            rc = -ECANCELED;            /* a reset has put it aside */
        else
            give_name(w, of, key, index, bytes);
    }
    unlink_temp(place(w), t.id);
    return rc;
}

/* ---- the rest ---- */

static int place_probe(void *space, bool write)
{
    const struct shelf_of *of = space;
    struct net_world *w = net_current;
    int rc = call(w, of->node);

    return !rc && write && rough(w) && place(w)->full_until_us > w->net.now_us ? -ENOSPC : rc;
}

static int place_reset(void *space)
{
    const struct shelf_of *of = space;
    struct net_world *w = net_current;
    struct net_shelf *s = &place(w)->shelf[of->type];
    int rc = call(w, of->node);

    if (rc)
        return rc;
    while (s->files.len)
        remove_name(s, &s->files.data[s->files.len - 1]);
    s->generation++;
    place(w)->lost++;
    for (uint32_t i = 0; i < FK_STORE_PARTS; i++)
        s->changed[i]++;
    w->n.store_resets++;
    NET_TRACE(w, "  node %u has reset model %u in the store", net_at(w, of->node), of->type);
    return 0;
}

static int place_list(void *space, uint32_t part, struct fk_store_part *state, void (*found)(void *, struct fk_key), void *arg)
{
    const struct shelf_of *of = space;
    struct net_world *w = net_current;
    struct net_shelf *s = &place(w)->shelf[of->type];

    if (part % 64 == 0) {
        int rc = call(w, of->node);
        if (rc)
            return rc;
    }
    if (state->there && state->changed_s == (int64_t)s->changed[part])
        return 1;
    for (size_t i = 0; i < s->files.len; i++)
        if (store_key_part(s->files.data[i]->key) == part)
            found(arg, s->files.data[i]->key);
    state->there = true;
    state->changed_s = (int64_t)s->changed[part];
    return 0;
}

static uint64_t place_file_bytes(void *space)
{
    return file_bytes(net_current, ((const struct shelf_of *)space)->type);
}

static struct shelf_of *opened(struct net_node *p, uint32_t type)
{
    for (uint32_t s = 0; s < p->n_spaces; s++)
        if (p->space[s].shelf && p->space[s].type == type)
            return p->space[s].shelf;
    return NULL;
}

static int place_other_bytes(void *store, uint64_t *bytes)
{
    struct net_world *w = net_current;
    int rc = call(w, store);

    *bytes = 0;
    for (uint32_t t = 0; !rc && t < NET_TYPES; t++)
        *bytes += opened(store, t) ? 0 : place(w)->shelf[t].files.len * file_bytes(w, t);
    return rc;
}

/* The file used longest ago; UINT32_MAX: there is none. */
static uint32_t oldest(struct net_place *x, uint32_t *at)
{
    uint32_t type = UINT32_MAX;

    for (uint32_t t = 0; t < NET_TYPES; t++)
        for (uint32_t i = 0; i < x->shelf[t].files.len; i++)
            if (type == UINT32_MAX || x->shelf[t].files.data[i]->used_us < x->shelf[type].files.data[*at]->used_us) {
                type = t;
                *at = i;
            }
    return type;
}

static int place_evict(void *store, uint64_t bytes, const bool *stop,
                       void (*removed)(void *, void *, struct fk_key, uint64_t), void *arg)
{
    struct net_world *w = net_current;
    struct net_place *x = place(w);
    uint32_t type, at = 0;
    uint64_t gone = 0;

    if (x->evicts)
        return -EAGAIN;
    x->evicts = store;
    int rc = call(w, store);
    while (!rc && !*stop && gone < bytes && (type = oldest(x, &at)) != UINT32_MAX) {
        struct fk_key key = x->shelf[type].files.data[at]->key;
        remove_name(&x->shelf[type], &x->shelf[type].files.data[at]);
        gone += file_bytes(w, type);
        x->lost++;
        w->n.store_evicted++;
        removed(arg, opened(store, type), key, file_bytes(w, type));
        if (net_chance(w, 4))
            rc = call(w, store);
    }
    x->evicts = NULL;
    return rc;
}

static uint64_t place_tidy(void *store)
{
    struct net_world *w = net_current;
    struct net_place *x = place(w);
    uint64_t n = 0;

    pass(w, store);
    for (size_t i = x->temps.len; i-- > 0;)
        if (x->temps.data[i].begun_us + LEFTOVER_US < w->net.now_us) {
            x->temps.data[i] = x->temps.data[--x->temps.len];
            n++;
        }
    w->n.store_leftovers += n;
    return n;
}

const struct fk_store_backend net_backend = {
    .name = "sim", .open = place_open, .close = place_close, .space = place_space, .get = place_get, .put = place_put,
    .probe = place_probe, .reset = place_reset, .list = place_list, .file_bytes = place_file_bytes,
    .other_bytes = place_other_bytes, .evict = place_evict, .tidy = place_tidy,
};

/* ---- the world's part ---- */

static void draw_home(struct net_home *h, uint64_t *rng)
{
    h->has_store = fk_rng_below(rng, 6);
    h->alone = h->has_store && !fk_rng_below(rng, 4);
    h->share_cpu &= !h->alone;
    h->share_ssd &= !h->alone;
    h->store_on_reuse = !fk_rng_below(rng, 3);
    h->store_threads = 1 + fk_rng_below(rng, 4);
}

/* From a generator of its own: worlds without a store are what they were before there was one. */
void net_place_draw(struct net_world *w)
{
    struct net_place *x = w->place = calloc(1, sizeof(*w->place));
    uint64_t rng = w->seed + NET_PLACE_SEED;

    if (!x)
        abort();
    x->there = fk_rng_below(&rng, 2);
    x->capacity_bytes = fk_rng_below(&rng, 2) ? 0 : (20 + fk_rng_below(&rng, 180)) * 128u;
    x->scan_us = 500000 + fk_rng_below(&rng, 1000000);
    x->timeout_us = w->calm ? 5000000 : 150000;
    x->slow_us = w->calm || fk_rng_below(&rng, 4) ? 400 : 400 + fk_rng_below(&rng, 50000);
    x->fault_ppk = w->calm || fk_rng_below(&rng, 2) ? 0 : fk_rng_below(&rng, 40);
    for (uint32_t h = 0; x->there && h < w->n_homes; h++)
        draw_home(&w->home[h], &rng);
}

void net_place_free(struct net_world *w)
{
    for (uint32_t t = 0; t < NET_TYPES; t++) {
        struct net_shelf *s = &w->place->shelf[t];
        while (s->files.len)
            remove_name(s, &s->files.data[s->files.len - 1]);
        fk_vec_free(&s->files);
    }
    fk_vec_free(&w->place->temps);
    free(w->place);
}

/* Some bit of some file is another one. */
static void rot(struct net_world *w)
{
    struct net_shelf *s = &place(w)->shelf[net_below(w, NET_TYPES)];

    if (!s->files.len)
        return;
    struct net_file *f = s->files.data[net_below(w, (uint32_t)s->files.len)];
    f->bytes[net_below(w, (uint32_t)file_bytes(w, (uint32_t)(s - place(w)->shelf)))] ^= (uint8_t)(1u << net_below(w, 8));
}

/* A quarter of what its machine wrote last is as it was before: there was no fsync. */
void net_place_power_loss(struct net_world *w, uint32_t home)
{
    for (uint32_t t = 0; t < NET_TYPES; t++) {
        struct net_shelf *s = &place(w)->shelf[t];
        for (size_t i = 0; i < s->files.len; i++) {
            struct net_file *f = s->files.data[i];
            uint32_t bytes = (uint32_t)file_bytes(w, t), from = net_below(w, bytes);
            if (f->home != home || f->written_us + TORN_US < w->net.now_us || !net_chance(w, 4))
                continue;
            memset(f->bytes + from, 0, bytes - from);
        }
    }
}

void net_place_fault(struct net_world *w)
{
    struct net_place *x = place(w);
    uint32_t home = net_below(w, w->n_homes);

    switch (net_below(w, 6)) {
    case 0: x->gone_until_us[home] = w->net.now_us + net_below(w, 2000000); break;
    case 1: x->hangs_until_us[home] = w->net.now_us + net_below(w, 3000000); break;
    case 2: x->full_until_us = w->net.now_us + net_below(w, 2000000); break;
    default: rot(w);
    }
}

void net_place_quiet(struct net_world *w)
{
    struct net_place *x = place(w);

    x->full_until_us = 0;
    memset(x->gone_until_us, 0, sizeof(x->gone_until_us));
    memset(x->hangs_until_us, 0, sizeof(x->hangs_until_us));
}
