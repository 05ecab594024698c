/*
 * objects.c - a store in a bucket: one object for each block, named by its key; get, put and exists are all that is
 * asked of it, so nothing is listed and nothing removed.
 *
 *   PREFIX/flexkv                               says that one may write there
 *   PREFIX/spaces/FINGERPRINT/header            geometry, version, byte order; its uuid is the GENERATION
 *   PREFIX/spaces/FINGERPRINT/GENERATION/nodes  who writes (objects_logs.c)
 *   PREFIX/data/FINGERPRINT/GENERATION/KEY      a page with the record, then the block: as the directory's file
 *   PREFIX/data/FINGERPRINT/GENERATION/log-...  what was written (objects_logs.c)
 *
 * A reset is a header with another uuid. What is not wanted any more goes by the bucket's own rules, for all that begins
 * with PREFIX/data. Runs in the store's threads; what is said to be the scanner's, in that alone.
 */
#include "store/objects.h"

#include <stdarg.h>
#include <stdio.h>

#include <openssl/rand.h>

#include "base/checksum.h"
#include "base/clock.h"
#include "base/fail.h"
#include "base/log.h"
#include "store/objects_impl.h"

#define OPEN_US 20000000u               /* a library is loaded, which looks round for who we are */
#define PENDING_MAX (1u << 20)          /* keys that others are not told of yet, where logs can't be written */
#define NAME_EXTRA 160u                 /* what is added to the prefix */

/* ---- names and small objects ---- */

/* Before the store's own, so that mostly the call ends and the request with it. */
uint64_t object_deadline(const struct object_store *s)
{
    return fk_clock_us() + s->call_us;
}

void object_name(const struct object_store *s, char *out, const char *format, ...)
{
    int n = snprintf(out, OBJECT_NAME, "%s%s", s->bucket.prefix, *s->bucket.prefix ? "/" : "");
    va_list args;

    va_start(args, format);
    vsnprintf(out + n, OBJECT_NAME - (size_t)n, format, args);
    va_end(args);
}

int object_get(const struct object_store *s, const char *name, void *to, size_t bytes)
{
    struct iovec v = { to, bytes };

    return s->client->get(s->priv, name, &v, 1, object_deadline(s));
}

int object_put(const struct object_store *s, const char *name, const void *from, size_t bytes)
{
    struct iovec v = { (void *)(uintptr_t)from, bytes };

    return s->client->put(s->priv, name, &v, 1, NULL, object_deadline(s));
}

/* ---- opening ---- */

static const char *endpoint_of(const struct object_store *s)
{
    return *s->bucket.endpoint ? s->bucket.endpoint : "the default endpoint";
}

/* Is the bucket there, who are we in it? */
static int try_bucket(const struct object_store *s, char *error, size_t bytes)
{
    char name[OBJECT_NAME], text[8] = "FlexKV\n";

    object_name(s, name, "flexkv");
    int seen = object_get(s, name, text, 1);
    if (seen == -ETIMEDOUT)
        return fk_fail(error, bytes, seen, "remote_bucket %s: %s does not answer (remote_endpoint, remote_timeout_ms)",
                       s->bucket.name, endpoint_of(s));
    if (seen && seen != -ENOENT)
        return fk_fail(error, bytes, seen, "remote_bucket %s at %s can't be read: are the credentials (AWS_ACCESS_KEY_ID, "
                       "AWS_SECRET_ACCESS_KEY, ... in the environment) those of somebody who may, are remote_endpoint and "
                       "remote_region right?", s->bucket.name, endpoint_of(s));
    int rc = object_put(s, name, "FlexKV\n", 7);
    if (!rc)
        return 0;
    if (seen)
        return fk_fail(error, bytes, rc, "remote_bucket %s at %s can't be written: is there such a bucket, may these "
                       "credentials (AWS_ACCESS_KEY_ID, ... in the environment) write in it?", s->bucket.name, endpoint_of(s));
    fk_warn("store %s: it can be read, but not be written", s->bucket.name);
    return 0;
}

static int check_params(const struct fk_store_params *p, char *error, size_t bytes)
{
    const struct fk_store_bucket *b = &p->bucket;

    if (!*b->name)
        return fk_fail(error, bytes, -EINVAL, "remote_bucket is not given: which bucket do the nodes share?");
    if (p->capacity_bytes)
        return fk_fail(error, bytes, -EINVAL, "remote_cache_gb can't be kept in a bucket: leave it 0, and give the bucket a rule "
                       "by which objects under %s%sdata/ expire", b->prefix, *b->prefix ? "/" : "");
    if (strlen(b->prefix) + NAME_EXTRA > OBJECT_NAME || *b->prefix == '/' ||
        (*b->prefix && b->prefix[strlen(b->prefix) - 1] == '/'))
        return fk_fail(error, bytes, -EINVAL, "remote_prefix %s: without / at its ends, and of at most %u characters", b->prefix,
                       OBJECT_NAME - NAME_EXTRA);
    return 0;
}

static int objects_open(const struct fk_store_params *p, void **out, char *error, size_t bytes)
{
    int rc = check_params(p, error, bytes);

    if (rc)
        return rc;
    struct object_store *s = calloc(1, sizeof(*s));
    if (!s)
        return fk_fail(error, bytes, -ENOMEM, "no memory");
    pthread_mutex_init(&s->lock, NULL);
    s->bucket = p->bucket;
    s->client = p->bucket.client;
    s->call_us = p->timeout_us / 8 * 7 + 1;
    rc = s->client->open(p, &s->priv, error, bytes);
    if (!rc && (rc = try_bucket(s, error, bytes)) != 0)
        s->client->close(s->priv);
    if (rc) {
        pthread_mutex_destroy(&s->lock);
        free(s);
        return rc;
    }
    *out = s;
    return 0;
}

static void space_free(struct object_space *sp)
{
    object_logs_free(sp);
    fk_vec_free(&sp->pending);
    pthread_mutex_destroy(&sp->lock);
    free(sp);
}

static void objects_close(void *store)
{
    struct object_store *s = store;

    for (uint32_t i = 0; i < s->n_spaces; i++)
        space_free(s->spaces[i]);
    s->client->close(s->priv);
    pthread_mutex_destroy(&s->lock);
    free(s);
}

/* ---- spaces ---- */

static int header_get(const struct object_space *sp, struct store_header *h, enum store_state *state)
{
    char name[OBJECT_NAME], page[sizeof(*h)];

    object_name(sp->store, name, "spaces/%s/header", sp->print);
    int rc = object_get(sp->store, name, page, sizeof(page));
    if (rc)
        return rc;
    *state = store_header_read(page, sizeof(page), h);
    return *state == STORE_OK ? 0 : -EBADMSG;
}

static int header_put(const struct object_space *sp, const char *who, const uint8_t fingerprint[16], uint64_t block_bytes,
                      struct store_header *h)
{
    char name[OBJECT_NAME];
    uint8_t uuid[16];

    if (RAND_bytes(uuid, sizeof(uuid)) != 1)
        return -EIO;
    store_header_make(h, who, fingerprint, uuid, block_bytes);
    object_name(sp->store, name, "spaces/%s/header", sp->print);
    return object_put(sp->store, name, h, sizeof(*h));
}

static int refuse(const struct object_space *sp, const struct fk_store_space *d, int rc, enum store_state state,
                  const struct store_header *h, char *error, size_t bytes)
{
    char name[OBJECT_NAME];

    object_name(sp->store, name, "spaces/%s/header", sp->print);
    if (rc == -EBADMSG && state == STORE_VERSION_OTHER)
        return fk_fail(error, bytes, -EEXIST, "object %s is of version %u of the format, this program writes version %u: give another "
                       "remote_prefix, or remove it", name, h->version, STORE_VERSION);
    if (rc == -EBADMSG)
        return fk_fail(error, bytes, -EEXIST, "object %s is %s: give another remote_prefix, or remove it", name,
                       state == STORE_FOREIGN ? "not of FlexKV" : state == STORE_BYTE_ORDER
                       ? "of machines of the other byte order" : "damaged");
    if (rc)
        return fk_fail(error, bytes, rc, "remote_bucket %s: object %s: %s", sp->store->bucket.name, name, strerror(-rc));
    return fk_fail(error, bytes, -EEXIST, "object %s says that blocks have %llu bytes, these have %llu: the same name for another "
                   "model; give another remote_prefix", name, (unsigned long long)h->block_bytes,
                   (unsigned long long)d->block_bytes);
}

/* Of several nodes that begin a space the last one counts; the others see its header at their next scan. */
static int find_or_make(struct object_space *sp, const struct fk_store_space *d, char *error, size_t bytes)
{
    enum store_state state = STORE_OK;
    struct store_header h;
    int rc = header_get(sp, &h, &state);

    if (rc == -ENOENT && (rc = header_put(sp, d->name ? d->name : "", d->fingerprint, d->block_bytes, &h)) == 0)
        rc = header_get(sp, &h, &state);
    if (rc || h.block_bytes != d->block_bytes || memcmp(h.fingerprint, d->fingerprint, 16) != 0)
        return refuse(sp, d, rc, state, &h, error, bytes);
    sp->header = h;
    rc = object_logs_begin(sp);
    return rc ? fk_fail(error, bytes, rc, "%s", strerror(-rc)) : 0;
}

static int objects_space(void *store, const struct fk_store_space *d, void **out, char *error, size_t bytes)
{
    struct object_store *s = store;
    struct object_space *sp = calloc(1, sizeof(*sp));

    if (!sp)
        return fk_fail(error, bytes, -ENOMEM, "no memory");
    pthread_mutex_init(&sp->lock, NULL);
    sp->store = s;
    fk_hex(sp->print, d->fingerprint, sizeof(d->fingerprint));
    int rc = find_or_make(sp, d, error, bytes);
    pthread_mutex_lock(&s->lock);
    if (!rc && s->n_spaces == FK_STORE_SPACES)
        rc = fk_fail(error, bytes, -ENOSPC, "remote_bucket %s: too many spaces", s->bucket.name);
    if (!rc)
        s->spaces[s->n_spaces++] = sp;
    pthread_mutex_unlock(&s->lock);
    if (rc) {
        space_free(sp);
        return rc;
    }
    *out = sp;
    return 0;
}

static uint64_t objects_file_bytes(void *space)
{
    return STORE_PAGE + ((struct object_space *)space)->header.block_bytes;
}

static struct store_header header_now(struct object_space *sp)
{
    pthread_mutex_lock(&sp->lock);
    struct store_header h = sp->header;
    pthread_mutex_unlock(&sp->lock);
    return h;
}

static void block_name(const struct object_space *sp, const struct store_header *h, struct fk_key key, char *out)
{
    char text[STORE_KEY_CHARS + 1], generation[33];

    store_key_text(key, text);
    fk_hex(generation, h->uuid, sizeof(h->uuid));
    object_name(sp->store, out, "data/%s/%s/%s", sp->print, generation, text);
}

/* ---- blocks ---- */

static int objects_get(void *space, struct fk_key key, void *buf, struct fk_store_note *note)
{
    struct object_space *sp = space;
    struct store_header h = header_now(sp);
    _Alignas(8) unsigned char page[STORE_PAGE];
    struct iovec v[2] = { { page, sizeof(page) }, { buf, h.block_bytes } };
    char name[OBJECT_NAME];
    struct store_record r;

    block_name(sp, &h, key, name);
    int rc = sp->store->client->get(sp->store->priv, name, v, 2, object_deadline(sp->store));
    if (!rc && (!store_page_read(page, &h, key, &r) || r.checksum != fk_block_checksum(key, buf, h.block_bytes)))
        rc = -EBADMSG;
    note->bytes = rc || !note->data ? 0 : r.note_bytes;
    if (note->bytes)
        memcpy(note->data, page + STORE_NOTE_AT, note->bytes);
    return rc;
}

/* Who has written it twice has written the same. */
static int objects_put(void *space, struct fk_key key, struct fk_key parent, const void *buf,
                       const struct fk_store_note *note, const struct fk_store_sure *sure)
{
    struct object_space *sp = space;
    struct store_header h = header_now(sp);
    _Alignas(8) unsigned char page[STORE_PAGE];
    struct iovec v[2] = { { page, sizeof(page) }, { (void *)(uintptr_t)buf, h.block_bytes } };
    char name[OBJECT_NAME];

    block_name(sp, &h, key, name);
    store_page_make(page, &h, key, parent, buf, note->data, note->bytes);
    int rc = sp->store->client->put(sp->store->priv, name, v, 2, sure, object_deadline(sp->store));
    if (rc)
        return rc;
    pthread_mutex_lock(&sp->lock);
    bool same = memcmp(sp->header.uuid, h.uuid, sizeof(h.uuid)) == 0;
    if (same && (sp->pending.len == PENDING_MAX || fk_vec_push(&sp->pending, ((struct object_written){ key, parent }))))
        fk_debug("store %s: no room to tell others of a block", sp->store->bucket.name);
    pthread_mutex_unlock(&sp->lock);
    return same ? 0 : -ECANCELED;       /* into a generation that is no more */
}

/* ---- the scanner's ---- */

static int objects_probe(void *space, bool write)
{
    const struct object_space *sp = space;
    char name[OBJECT_NAME];
    enum store_state state;
    struct store_header h;

    if (write) {
        object_name(sp->store, name, "flexkv");
        return object_put(sp->store, name, "FlexKV\n", 7);
    }
    int rc = header_get(sp, &h, &state);
    return rc == -ENOENT ? 0 : rc;      /* somebody has emptied the bucket: follow, which comes next, makes another one */
}

static int begin_generation(struct object_space *sp, const struct store_header *h)
{
    pthread_mutex_lock(&sp->lock);
    sp->header = *h;
    sp->pending.len = sp->sure = 0;
    pthread_mutex_unlock(&sp->lock);
    return object_logs_begin(sp);
}

/*
 * Another generation has come without our doing. What was written since the last look, maybe after the old one had gone,
 * stands in nobody's log: who wrote it is told.
 */
static int change_generation(struct object_space *sp, const struct store_header *h, const struct fk_store_news *news)
{
    __typeof__(sp->pending) lost;

    pthread_mutex_lock(&sp->lock);
    sp->header = *h;                    /* from here on none is added to those */
    lost = sp->pending;
    memset(&sp->pending, 0, sizeof(sp->pending));
    sp->sure = 0;
    news->forget(news->arg);            /* before anything is written into the new one */
    pthread_mutex_unlock(&sp->lock);
    for (size_t i = 0; i < lost.len; i++)
        news->lost(news->arg, lost.data[i].key, lost.data[i].parent);
    fk_vec_free(&lost);
    return object_logs_begin(sp);
}

static void note_sure(struct object_space *sp)
{
    pthread_mutex_lock(&sp->lock);
    sp->sure = sp->pending.len;
    pthread_mutex_unlock(&sp->lock);
}

static int objects_reset(void *space)
{
    struct object_space *sp = space;
    struct store_header h, was = header_now(sp);
    int rc = header_put(sp, was.name, was.fingerprint, was.block_bytes, &h);

    return rc ? rc : begin_generation(sp, &h);
}

/* Is it still the generation that we know? */
static int look_at_header(struct object_space *sp, const struct fk_store_news *news)
{
    struct store_header h, was = header_now(sp);
    enum store_state state;

    note_sure(sp);
    int rc = header_get(sp, &h, &state);
    if (rc == -ENOENT) {
        fk_warn("store %s: space %s is not there any more; it is begun anew", sp->store->bucket.name, was.name);
        rc = header_put(sp, was.name, was.fingerprint, was.block_bytes, &h);
    }
    if (rc || h.block_bytes != was.block_bytes)
        return rc ? rc : -ESTALE;
    if (memcmp(h.uuid, was.uuid, sizeof(h.uuid)) == 0)
        return 0;
    return change_generation(sp, &h, news);
}

static int objects_follow(void *space, const struct fk_store_news *news)
{
    struct object_space *sp = space;
    int rc = look_at_header(sp, news), read = rc ? rc : object_logs_read(sp, news);

    if (read >= 0 && (rc = object_logs_tell(sp, false)) != 0)
        fk_debug("store %s: others can't be told what was written: %s", sp->store->bucket.name, strerror(-rc));
    return read;
}

static void objects_settle(void *space)
{
    struct object_space *sp = space;

    note_sure(sp);                      /* nobody is left to write it again */
    int rc = object_logs_tell(sp, true);
    if (rc)
        fk_warn("store %s: the last blocks that were written are not known to others: %s", sp->store->bucket.name,
                strerror(-rc));
}

const struct fk_store_backend fk_store_objects = {
    .name = "objects", .setting = "remote_bucket", .open_us = OPEN_US, .open = objects_open, .close = objects_close,
    .space = objects_space,
    .get = objects_get, .put = objects_put, .probe = objects_probe, .reset = objects_reset, .follow = objects_follow,
    .settle = objects_settle, .file_bytes = objects_file_bytes,
};
