/*
 * objects_logs.c - how nodes know what others have written to a bucket that can't be listed. See logs.h, docs/store.md.
 *
 *   spaces/F/G/nodes/0   head of A: A's logs are 0 to 2; X's (who is no more) 0 to 7      each head is written
 *   spaces/F/G/nodes/1   head of B: B's logs are 0 to 0                                   by one node alone
 *   data/F/G/log-A-0 ... 4096 keys each; the last one grows, and is written again
 *
 * A node that has something to tell takes a place: that of one that has ended or not been heard of for long, whose chapters it
 * goes on telling of, or the first free one. Two may take the same: the last who wrote it has it, and the other sees
 * that at its next look and takes another one. So nothing is lost but for that time: an object is written by one, no list
 * is shared.
 *
 * The store's scanner alone, or who opens the space.
 */
#include <stdio.h>
#include <time.h>

#include <openssl/rand.h>

#include "base/clock.h"
#include "base/log.h"
#include "store/objects_impl.h"

#define BEAT_US 3600000000ull           /* a head is written again after that, if there is no other reason */
#define DEAD_S (3 * 3600u)              /* then its node is taken for dead */
#define PRUNED 1000u                    /* logs looked at in one go, whether they have expired */

/* ---- beginning, ending ---- */

static void forget_all(struct object_space *sp)
{
    sp->slots.len = sp->readers.len = sp->queue.len = sp->taken.len = 0;
    sp->queue_at = 0;
    sp->slot = FK_NONE;
    sp->first = sp->full = 0;
    sp->log_news = sp->head_news = false;
    sp->beat_us = 0;
}

int object_logs_begin(struct object_space *sp)
{
    forget_all(sp);
    sp->log = sp->log ? sp->log : calloc(1, sizeof(*sp->log));
    sp->read = sp->read ? sp->read : calloc(1, sizeof(*sp->read));
    sp->head = sp->head ? sp->head : calloc(1, sizeof(*sp->head));
    if (!sp->log || !sp->read || !sp->head)
        return -ENOMEM;
    if (RAND_bytes(sp->uuid, sizeof(sp->uuid)) != 1)
        return -EIO;
    sp->log->log.keys = 0;
    fk_hex(sp->generation, sp->header.uuid, sizeof(sp->header.uuid));
    return 0;
}

void object_logs_free(struct object_space *sp)
{
    fk_vec_free(&sp->slots);
    fk_vec_free(&sp->readers);
    fk_vec_free(&sp->queue);
    fk_vec_free(&sp->taken);
    free(sp->log);
    free(sp->read);
    free(sp->head);
}

static void head_name(const struct object_space *sp, uint32_t slot, char *out)
{
    object_name(sp->store, out, "spaces/%s/%s/nodes/%u", sp->print, sp->generation, slot);
}

static void log_name(const struct object_space *sp, const uint8_t uuid[16], uint32_t number, char *out)
{
    char text[33];

    fk_hex(text, uuid, 16);
    object_name(sp->store, out, "data/%s/%s/log-%s-%u", sp->print, sp->generation, text, number);
}

static bool is_own(const struct object_space *sp, const uint8_t uuid[16])
{
    return memcmp(uuid, sp->uuid, sizeof(sp->uuid)) == 0;
}

/* ---- reading others' ---- */

static struct object_reader *reader_of(struct object_space *sp, const uint8_t uuid[16])
{
    struct object_reader r = { .log = 0 };

    for (size_t i = 0; i < sp->readers.len; i++)
        if (memcmp(sp->readers.data[i].uuid, uuid, 16) == 0)
            return &sp->readers.data[i];
    memcpy(r.uuid, uuid, sizeof(r.uuid));
    return fk_vec_push(&sp->readers, r) ? NULL : &sp->readers.data[sp->readers.len - 1];
}

/* 1: there was something in it; 0: nothing that could be believed; -ENOENT: it has expired. */
static int read_log(struct object_space *sp, struct object_reader *r, uint32_t number, const struct fk_store_news *news)
{
    char name[OBJECT_NAME];

    log_name(sp, r->uuid, number, name);
    int rc = object_get(sp->store, name, sp->read, sizeof(*sp->read));
    if (rc)
        return rc;
    if (__atomic_load_n(news->stop, __ATOMIC_RELAXED))
        return -ECANCELED;
    if (!store_log_sound(sp->read, sizeof(*sp->read), r->uuid, number)) {
        fk_warn("store %s: object %s is damaged; the blocks that it tells of are not used", sp->store->bucket.name, name);
        return 0;
    }
    for (uint32_t i = r->log == number ? r->keys : 0; i < sp->read->log.keys; i++)
        news->found(news->arg, sp->read->key[i]);
    r->log = number;
    r->keys = sp->read->log.keys;
    return 1;
}

/* Logs read, or -errno. The last log is looked at again when it has grown; those before it never. */
static int read_chapter(struct object_space *sp, const struct store_chapter *c, const struct fk_store_news *news)
{
    struct object_reader *r = is_own(sp, c->uuid) ? NULL : reader_of(sp, c->uuid);
    int n = 0;

    if (!r)
        return is_own(sp, c->uuid) ? 0 : -ENOMEM;
    for (uint32_t i = fk_max(r->log, c->first); i < c->logs; i++) {
        bool last = i + 1 == c->logs;
        uint32_t had = i == r->log ? r->keys : 0;
        int rc = had >= (last ? c->keys : STORE_LOG_KEYS) ? 0 : read_log(sp, r, i, news);
        if (rc < 0 && rc != -ENOENT)
            return rc;
        n += rc > 0;
        if (!last) {
            r->log = i + 1;
            r->keys = 0;
        }
    }
    return n;
}

/* Another node has our place: we tell of ourselves elsewhere, and it of all others. */
static void lose_place(struct object_space *sp)
{
    fk_debug("store %s: place %u has gone to another node", sp->store->bucket.name, sp->slot);
    sp->slot = FK_NONE;
    sp->taken.len = 0;
    sp->head_news = true;
}

static int grow_slots(struct object_space *sp, uint32_t n)
{
    struct object_slot none = { 0 };

    while (sp->slots.len < n)
        if (fk_vec_push(&sp->slots, none))
            return -ENOMEM;
    return 0;
}

static int read_head(struct object_space *sp, uint32_t at, const struct fk_store_news *news)
{
    struct object_slot *slot = &sp->slots.data[at];
    struct store_head *h = &sp->head->head;
    char name[OBJECT_NAME];
    int n = 0;

    head_name(sp, at, name);
    int rc = object_get(sp->store, name, sp->head, sizeof(*sp->head));
    slot->there = rc != -ENOENT;
    if (rc)
        return rc == -ENOENT ? 0 : rc;
    bool was = slot->sound;
    slot->sound = store_head_sound(sp->head, sizeof(*sp->head));
    if (!slot->sound && was)
        fk_warn("store %s: object %s is damaged; what it tells of is not used", sp->store->bucket.name, name);
    if (at == sp->slot && (!slot->sound || !is_own(sp, h->owner)))
        lose_place(sp);
    if (!slot->sound || (slot->crc == h->crc && !slot->again))
        return 0;
    slot->closed = h->closed;
    slot->beat_s = h->beat_s;
    slot->crc = h->crc;
    slot->again = true;
    for (uint32_t i = 0; i < h->chapters; i++) {
        rc = read_chapter(sp, &sp->head->chapter[i], news);
        if (rc < 0)
            return rc;
        n += rc;
    }
    slot->again = false;
    rc = grow_slots(sp, h->slots);      /* last: `slot` may move */
    return rc ? rc : n;
}

/* All heads that are known, and whether there is one more. */
int object_logs_read(struct object_space *sp, const struct fk_store_news *news)
{
    char name[OBJECT_NAME];
    int n = 0;

    for (uint32_t at = 0; at < STORE_HEAD_SLOTS; at++) {
        if (at >= sp->slots.len) {
            head_name(sp, at, name);
            int there = sp->store->client->exists(sp->store->priv, name, object_deadline(sp->store));
            if (there <= 0)
                return there < 0 ? there : n;
            if (grow_slots(sp, at + 1))
                return -ENOMEM;
            sp->slots.data[at].sound = true;
        }
        int rc = read_head(sp, at, news);
        if (rc < 0)
            return rc;
        n += rc;
    }
    return n;
}

/* ---- telling ---- */

static uint64_t wall_s(void)
{
    return (uint64_t)time(NULL);
}

static int put_log(struct object_space *sp)
{
    struct store_log_object *l = sp->log;
    char name[OBJECT_NAME];

    memcpy(l->log.uuid, sp->uuid, sizeof(l->log.uuid));
    l->log.number = sp->full;
    log_name(sp, sp->uuid, sp->full, name);
    int rc = object_put(sp->store, name, l, store_log_seal(l));
    if (rc)
        return rc;
    sp->log_news = false;
    sp->head_news = true;
    if (l->log.keys == STORE_LOG_KEYS) {
        sp->full++;
        l->log.keys = 0;
    }
    return 0;
}

/* Not those written since the header was seen: if it has gone since, nobody would find them. */
static void take_pending(struct object_space *sp)
{
    if (sp->queue_at < sp->queue.len)
        return;                         /* the last ones are not told of yet */
    sp->queue_at = sp->queue.len = 0;
    pthread_mutex_lock(&sp->lock);
    for (size_t i = 0; i < sp->sure; i++)
        if (fk_vec_push(&sp->queue, sp->pending.data[i].key))
            break;                      /* no memory: others will not know of these */
    sp->pending.len -= sp->sure;
    if (sp->sure && sp->pending.len)
        memmove(sp->pending.data, sp->pending.data + sp->sure, sp->pending.len * sizeof(*sp->pending.data));
    sp->sure = 0;
    pthread_mutex_unlock(&sp->lock);
}

static int put_logs(struct object_space *sp)
{
    struct store_log *l = &sp->log->log;

    take_pending(sp);
    for (;;) {
        while (l->keys < STORE_LOG_KEYS && sp->queue_at < sp->queue.len) {
            sp->log->key[l->keys++] = sp->queue.data[sp->queue_at++];
            sp->log_news = true;
        }
        if (!sp->log_news)
            return 0;
        int rc = put_log(sp);
        if (rc)
            return rc;
    }
}

static bool may_take(const struct object_slot *slot)
{
    return slot->there && slot->sound && (slot->closed || slot->beat_s + DEAD_S < wall_s());
}

/* The place of one that is no more: its chapters are ours to tell of. False: not, after all. */
static bool take_place(struct object_space *sp, uint32_t at)
{
    struct store_head_object *o = sp->head;
    char name[OBJECT_NAME];

    head_name(sp, at, name);
    if (object_get(sp->store, name, o, sizeof(*o)) || !store_head_sound(o, sizeof(*o)) ||
        !(o->head.closed || o->head.beat_s + DEAD_S < wall_s()) || o->head.chapters >= STORE_HEAD_CHAPTERS)
        return false;
    sp->taken.len = 0;
    for (uint32_t i = 0; i < o->head.chapters; i++)
        if (o->chapter[i].first < o->chapter[i].logs && !is_own(sp, o->chapter[i].uuid) &&
            fk_vec_push(&sp->taken, o->chapter[i]))
            return false;
    sp->slot = at;
    return true;
}

static int find_place(struct object_space *sp)
{
    uint32_t free_place = FK_NONE;

    for (uint32_t i = 0; i < sp->slots.len && sp->slot == FK_NONE; i++) {
        if (!sp->slots.data[i].there && free_place == FK_NONE)
            free_place = i;
        if (may_take(&sp->slots.data[i]))
            (void)take_place(sp, i);
    }
    if (sp->slot != FK_NONE)
        return 0;
    sp->taken.len = 0;
    sp->slot = free_place != FK_NONE ? free_place : (uint32_t)sp->slots.len;
    return grow_slots(sp, sp->slot + 1);
}

/* Logs that the bucket's rule has removed are not told of any more. */
static void prune(struct object_space *sp, struct store_chapter *c, uint32_t *budget)
{
    char name[OBJECT_NAME];

    for (; c->first < c->logs && *budget; c->first++, --*budget) {
        log_name(sp, c->uuid, c->first, name);
        if (sp->store->client->exists(sp->store->priv, name, object_deadline(sp->store)) != 0)
            return;
    }
}

static struct store_chapter own_chapter(const struct object_space *sp)
{
    uint32_t keys = sp->log->log.keys;
    struct store_chapter c = { .first = sp->first, .logs = sp->full + (keys > 0),
                               .keys = keys ? keys : sp->full ? STORE_LOG_KEYS : 0 };

    memcpy(c.uuid, sp->uuid, sizeof(c.uuid));
    return c;
}

static void prune_all(struct object_space *sp)
{
    struct store_chapter own = own_chapter(sp);
    uint32_t budget = PRUNED;
    size_t kept = 0;

    own.logs = sp->full;
    prune(sp, &own, &budget);
    sp->first = own.first;
    for (size_t i = 0; i < sp->taken.len; i++) {
        prune(sp, &sp->taken.data[i], &budget);
        if (sp->taken.data[i].first < sp->taken.data[i].logs)
            sp->taken.data[kept++] = sp->taken.data[i];
    }
    sp->taken.len = kept;
}

static int put_head(struct object_space *sp, bool closing)
{
    struct store_head_object *o = sp->head;
    char name[OBJECT_NAME];

    memset(o, 0, sizeof(*o));
    memcpy(o->head.owner, sp->uuid, sizeof(o->head.owner));
    o->head.beat_s = wall_s();
    o->head.slots = (uint32_t)sp->slots.len;
    o->head.closed = closing;
    o->chapter[o->head.chapters++] = own_chapter(sp);
    for (size_t i = 0; i < sp->taken.len; i++)
        o->chapter[o->head.chapters++] = sp->taken.data[i];
    head_name(sp, sp->slot, name);
    int rc = object_put(sp->store, name, o, store_head_seal(o));
    if (rc)
        return rc;
    sp->slots.data[sp->slot].there = sp->slots.data[sp->slot].sound = true;
    sp->head_news = false;
    sp->beat_us = fk_clock_us();
    return 0;
}

/* It may have been taken since our last look: we were taken for dead. */
static int look_at_place(struct object_space *sp)
{
    char name[OBJECT_NAME];

    if (sp->slot == FK_NONE || !sp->beat_us)
        return 0;
    head_name(sp, sp->slot, name);
    int rc = object_get(sp->store, name, sp->head, sizeof(*sp->head));
    if (rc && rc != -ENOENT)
        return rc;
    if (!rc && store_head_sound(sp->head, sizeof(*sp->head)) && !is_own(sp, sp->head->head.owner))
        lose_place(sp);
    return 0;
}

int object_logs_tell(struct object_space *sp, bool closing)
{
    bool beat = sp->slot != FK_NONE && fk_clock_us() - sp->beat_us >= BEAT_US;
    int rc = put_logs(sp);

    if (rc || (!sp->head_news && !beat && !(closing && sp->slot != FK_NONE)))
        return rc;
    rc = look_at_place(sp);
    if (!rc && sp->slot == FK_NONE)
        rc = find_place(sp);
    if (!rc && beat)
        prune_all(sp);
    return rc ? rc : put_head(sp, closing);
}
