/* prints.c - see prints.h. Linear probing; removal moves the ones behind forward, so there are no tombstones. */
#include "store/prints.h"

#include <pthread.h>
#include <stdatomic.h>

#include "base/util.h"
#include "store/backend.h"
#include "store/format.h"

#define FIRST_SLOTS 16u

struct change { uint64_t print; bool add; };

struct table { uint64_t *slot; uint32_t mask, n; };     /* slot NULL: empty; print 0: a free slot */

struct part {
    pthread_mutex_t lock;
    struct table table;
    bool listing, lost;                 /* lost: a change could not be noted; the listing is void */
    FK_VEC(struct change) changes;      /* while listing */
};

struct fk_prints {
    _Atomic uint64_t count, bytes;
    struct part part[FK_STORE_PARTS];
};

static uint64_t print_of(struct fk_key key)
{
    return key.lo ? key.lo : 1;         /* keys are hashes: any 64 bits of them will do */
}

static uint32_t home(const struct table *t, uint64_t print)
{
    return (uint32_t)(print ^ print >> 32) & t->mask;
}

static uint32_t find(const struct table *t, uint64_t print)
{
    uint32_t i = home(t, print);

    while (t->slot[i] && t->slot[i] != print)
        i = (i + 1) & t->mask;
    return i;
}

static int table_alloc(struct table *t, uint64_t n)
{
    uint64_t slots = FIRST_SLOTS;

    while (slots * 3 / 4 <= n)
        slots *= 2;
    *t = (struct table){ .mask = (uint32_t)(slots - 1) };
    t->slot = slots > UINT32_MAX ? NULL : calloc(slots, sizeof(*t->slot));
    return t->slot ? 0 : -ENOMEM;
}

static int table_add(struct table *t, uint64_t print)
{
    if (!t->slot || t->n + 1 > (t->mask + 1ull) * 3 / 4) {
        struct table more;
        int rc = table_alloc(&more, t->n + 1ull);
        if (rc)
            return rc;
        for (uint32_t i = 0; t->slot && i <= t->mask; i++)
            if (t->slot[i])
                more.slot[find(&more, t->slot[i])] = t->slot[i];
        more.n = t->n;
        free(t->slot);
        *t = more;
    }
    uint32_t i = find(t, print);
    if (t->slot[i])
        return 1;
    t->slot[i] = print;
    t->n++;
    return 0;
}

static int table_remove(struct table *t, uint64_t print)
{
    uint32_t i = t->slot ? find(t, print) : 0, k = i;

    if (!t->slot || !t->slot[i])
        return 1;
    t->n--;
    for (;;) {
        t->slot[i] = 0;
        do {                            /* the next one that may stand at i: its home is not in (i, k] */
            k = (k + 1) & t->mask;
            if (!t->slot[k])
                return 0;
        } while (((k - home(t, t->slot[k])) & t->mask) < ((k - i) & t->mask));
        t->slot[i] = t->slot[k];
        i = k;
    }
}

static uint64_t table_bytes(const struct table *t)
{
    return t->slot ? (t->mask + 1ull) * sizeof(*t->slot) : 0;
}

int fk_prints_create(struct fk_prints **out)
{
    struct fk_prints *p = calloc(1, sizeof(*p));

    if (!p)
        return -ENOMEM;
    for (uint32_t i = 0; i < FK_STORE_PARTS; i++)
        pthread_mutex_init(&p->part[i].lock, NULL);
    atomic_store(&p->bytes, sizeof(*p));
    *out = p;
    return 0;
}

void fk_prints_destroy(struct fk_prints *p)
{
    for (uint32_t i = 0; p && i < FK_STORE_PARTS; i++) {
        free(p->part[i].table.slot);
        fk_vec_free(&p->part[i].changes);
        pthread_mutex_destroy(&p->part[i].lock);
    }
    free(p);
}

/* With the part's lock, after its table has changed from that. */
static void account(struct fk_prints *p, const struct part *part, const struct table *was, uint64_t was_bytes)
{
    atomic_fetch_add(&p->count, (uint64_t)part->table.n - was->n);
    atomic_fetch_add(&p->bytes, table_bytes(&part->table) - was_bytes);
}

bool fk_prints_has(const struct fk_prints *p, struct fk_key key)
{
    struct part *part = (struct part *)(uintptr_t)&p->part[store_key_part(key)];

    pthread_mutex_lock(&part->lock);
    bool has = part->table.slot && part->table.slot[find(&part->table, print_of(key))];
    pthread_mutex_unlock(&part->lock);
    return has;
}

static int change(struct fk_prints *p, struct fk_key key, bool add)
{
    struct part *part = &p->part[store_key_part(key)];
    struct change c = { print_of(key), add };

    pthread_mutex_lock(&part->lock);
    struct table was = part->table;
    uint64_t was_bytes = table_bytes(&was);
    int rc = add ? table_add(&part->table, c.print) : table_remove(&part->table, c.print);
    if (part->listing && fk_vec_push(&part->changes, c))
        part->lost = true;
    account(p, part, &was, was_bytes);
    pthread_mutex_unlock(&part->lock);
    return rc;
}

int fk_prints_add(struct fk_prints *p, struct fk_key key)
{
    return change(p, key, true);
}

int fk_prints_remove(struct fk_prints *p, struct fk_key key)
{
    return change(p, key, false);
}

void fk_prints_clear(struct fk_prints *p)
{
    for (uint32_t i = 0; i < FK_STORE_PARTS; i++) {
        struct part *part = &p->part[i];
        pthread_mutex_lock(&part->lock);
        struct table was = part->table;
        uint64_t was_bytes = table_bytes(&was);
        part->table = (struct table){ 0 };
        part->lost = part->listing;     /* what it lists is from before */
        account(p, part, &was, was_bytes);
        pthread_mutex_unlock(&part->lock);
        free(was.slot);
    }
}

void fk_prints_begin(struct fk_prints *p, uint32_t part)
{
    struct part *at = &p->part[part];

    pthread_mutex_lock(&at->lock);
    at->listing = true;
    at->lost = false;
    at->changes.len = 0;
    pthread_mutex_unlock(&at->lock);
}

int fk_prints_end(struct fk_prints *p, uint32_t part, const struct fk_key *keys, size_t n)
{
    struct part *at = &p->part[part];
    struct table fresh = { 0 };
    int rc = keys && n ? table_alloc(&fresh, n) : 0;

    for (size_t i = 0; !rc && keys && i < n; i++)
        if (table_add(&fresh, print_of(keys[i])) < 0)
            rc = -ENOMEM;
    pthread_mutex_lock(&at->lock);
    for (size_t i = 0; !rc && keys && i < at->changes.len; i++) {
        const struct change *c = &at->changes.data[i];
        if ((c->add ? table_add(&fresh, c->print) : table_remove(&fresh, c->print)) < 0)
            rc = -ENOMEM;
    }
    if (at->lost)
        rc = -EAGAIN;
    struct table was = at->table;
    uint64_t was_bytes = table_bytes(&was);
    if (!rc && keys) {
        at->table = fresh;
        fresh = was;
        account(p, at, &was, was_bytes);
    }
    at->listing = false;
    pthread_mutex_unlock(&at->lock);
    free(fresh.slot);
    return rc;
}

uint64_t fk_prints_count(const struct fk_prints *p)
{
    return atomic_load(&p->count);
}

uint64_t fk_prints_bytes(const struct fk_prints *p)
{
    return atomic_load(&p->bytes);
}
