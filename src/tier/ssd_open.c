/*
 * ssd_open.c - opening a store: lock, look at what is there, decide, make or mend, load the
 * table. Touches the directories through the engine, and directly only to make a directory,
 * lock it and remove a store that is replaced. Called by the opener's thread, no lock.
 *
 *   no complete header anywhere       -> nothing can be in it: make a new store
 *   complete, all as asked            -> use it; headers that a crash tore are mended
 *   complete, but other geometry, version, byte order, order of directories, or a
 *   directory is missing or another store's -> -EEXIST, or replaced if recreate
 *
 * A new store's headers are written twice: "being made" in all directories, then "complete";
 * so a crash in between leaves what the next start makes anew without asking.
 */
#include "tier/ssd_internal.h"

#include <stdarg.h>
#include <stdio.h>
#include <sys/random.h>
#include <sys/stat.h>

#include "base/log.h"

#define CLOSE_TRIES 500                 /* waits of 10 ms */

struct opening {
    const struct fk_ssd_params *params;
    struct fk_ssd *ssd;
    char *error;
    size_t error_bytes;
};

/* What a directory holds before anything is changed. */
struct look {
    bool has_table, has_data, sound;
    bool agree;                         /* header and copy are sound and the same */
    enum ssd_header_state table, copy;
    struct ssd_header header;           /* if sound: the table's, else the copy */
    uint32_t epoch;
};

__attribute__((format(printf, 3, 4)))
static int fail(const struct opening *o, int rc, const char *fmt, ...)
{
    va_list ap;

    va_start(ap, fmt);
    if (o->error && o->error_bytes)
        vsnprintf(o->error, o->error_bytes, fmt, ap);
    va_end(ap);
    return rc;
}

/* --- headers --- */

void ssd_header_of(const struct fk_ssd *ssd, uint32_t dir, bool complete, struct ssd_header *h)
{
    ssd_header_make(h, &ssd->geometry, dir, ssd->name, ssd->fingerprint, ssd->uuid, ssd->epoch,
                    complete);
}

/* The one place that waits for the medium: a reset must not come undone in a power loss. */
int ssd_header_write(struct fk_ssd *ssd, uint32_t dir, bool complete)
{
    struct ssd_dir *d = &ssd->dirs[dir];

    if (ssd->stuck)
        return -EIO;                    /* the page may still be read by the device */
    memset(ssd->page, 0, SSD_PAGE);
    ssd_header_of(ssd, dir, complete, (struct ssd_header *)ssd->page);
    int rc = ssd_io_sync(ssd, dir, d->data_file, FK_IO_WRITE, ssd->page, 0, SSD_PAGE);
    if (rc < 0)                         /* it serves only when the header is torn */
        fk_warn("ssd %s: %s: copy of the header not written (%s)", ssd->name, d->data_path,
                strerror(-rc));
    if (ssd->stuck)
        return rc;
    rc = ssd_io_sync(ssd, dir, d->table_file, FK_IO_WRITE, ssd->page, 0, SSD_PAGE);
    if (rc == 0 && ssd->engine->ops->sync)
        rc = ssd->engine->ops->sync(ssd->engine, d->table_file);
    return rc;
}

/* --- looking --- */

/* Reads page 0; a page that can't be read counts as torn, a short file as blank. */
static int look_at_file(struct opening *o, uint32_t dir, const char *path, unsigned flags,
                        bool *has, enum ssd_header_state *state, struct ssd_header *h)
{
    struct fk_ssd *ssd = o->ssd;
    const struct fk_engine_ops *ops = ssd->engine->ops;
    uint64_t bytes = 0;
    uint32_t file;
    bool created;
    int rc = ops->open(ssd->engine, path, 0, flags, &file, &created);

    *has = rc == 0;
    *state = SSD_HEADER_BLANK;
    if (rc == -ENOENT)
        return 0;
    if (rc < 0)
        return fail(o, rc, "can't open %s: %s; check ssd_cache_dir", path, strerror(-rc));
    rc = ops->size(ssd->engine, file, &bytes);
    if (rc == 0 && bytes >= SSD_PAGE) {
        memset(ssd->page, 0, SSD_PAGE);
        rc = ssd_io_sync(ssd, dir, file, FK_IO_READ, ssd->page, 0, SSD_PAGE);
        *state = rc == 0 ? ssd_header_read(ssd->page, h) : SSD_HEADER_TORN;
    }
    if (!ssd->stuck)
        ops->close(ssd->engine, file);
    return ssd->stuck ? fail(o, rc, "%s does not answer; check the device", path) : 0;
}

static int look_at_dir(struct opening *o, uint32_t dir, struct look *l)
{
    const struct ssd_dir *d = &o->ssd->dirs[dir];
    struct ssd_header copy;
    int rc = look_at_file(o, dir, d->table_path, 0, &l->has_table, &l->table, &l->header);

    if (rc == 0)
        rc = look_at_file(o, dir, d->data_path, o->ssd->direct ? FK_FILE_DIRECT : 0,
                          &l->has_data, &l->copy, &copy);
    if (rc < 0)
        return rc;
    l->sound = l->table == SSD_HEADER_OK || l->copy == SSD_HEADER_OK;
    if (l->table != SSD_HEADER_OK && l->copy == SSD_HEADER_OK)
        l->header = copy;
    l->epoch = l->header.epoch;
    if (l->table == SSD_HEADER_OK && l->copy == SSD_HEADER_OK &&
        memcmp(copy.uuid, l->header.uuid, 16) == 0)
        l->epoch = fk_max(l->epoch, copy.epoch);
    l->agree = l->table == SSD_HEADER_OK && l->copy == SSD_HEADER_OK &&
               memcmp(&copy, &l->header, sizeof(copy)) == 0;
    return 0;
}

/* --- deciding --- */

#define ADVICE "; use another ssd_cache_dir, or set ssd_recreate to replace it (its blocks are lost)"

/*
 * A directory whose header can't be used: is it ours to write on? The table tells; the copy
 * may have been hit by a misdirected write, so it is asked only where there is no table.
 */
static int check_unsound(struct opening *o, uint32_t dir, const struct look *l)
{
    const struct ssd_dir *d = &o->ssd->dirs[dir];
    const char *path = l->has_table ? d->table_path : d->data_path;

    switch (l->has_table ? l->table : l->copy) {
    case SSD_HEADER_FOREIGN:
        return fail(o, -EEXIST, "%s is not a file of an SSD store" ADVICE, path);
    case SSD_HEADER_BYTE_ORDER:
        return fail(o, -EEXIST, "%s was written on a machine of the other byte order" ADVICE,
                    path);
    case SSD_HEADER_VERSION:
        return fail(o, -EEXIST, "%s is of a format version other than %u" ADVICE, path,
                    SSD_VERSION);
    default:
        return 0;
    }
}

static int check_geometry(struct opening *o, uint32_t dir, const struct ssd_header *h)
{
    const struct ssd_geometry *g = &o->ssd->geometry;
    const char *path = o->ssd->dirs[dir].path;

    if (memcmp(h->fingerprint, o->ssd->fingerprint, 16) != 0)
        return fail(o, -EEXIST, "%s: store %s belongs to another model or key scheme" ADVICE,
                    path, o->ssd->name);
    if (h->block_bytes != g->block_bytes)
        return fail(o, -EEXIST, "%s: store %s has blocks of %llu bytes, not %llu" ADVICE, path,
                    o->ssd->name, (unsigned long long)h->block_bytes,
                    (unsigned long long)g->block_bytes);
    if (h->n_dirs != g->n_dirs)
        return fail(o, -EEXIST, "%s: store %s spans %u directories, but ssd_cache_dir names %u"
                    ADVICE, path, o->ssd->name, h->n_dirs, g->n_dirs);
    if (h->n_slots != g->n_slots)
        return fail(o, -EEXIST, "%s: store %s has %u slots, but ssd_cache_gb asks for %u" ADVICE,
                    path, o->ssd->name, h->n_slots, g->n_slots);
    if (h->stripe_slots != g->stripe_slots)
        return fail(o, -EEXIST, "%s: store %s has stripes of %u slots, not %u" ADVICE, path,
                    o->ssd->name, h->stripe_slots, g->stripe_slots);
    return 0;
}

static int check_member(struct opening *o, uint32_t dir, const struct look *l,
                        const struct ssd_header *ref)
{
    const char *path = o->ssd->dirs[dir].path;

    if (!l->has_table && !l->has_data)
        return fail(o, -EEXIST, "store %s spans %u directories, but the files of directory %u "
                    "are missing in %s; mount or restore it" ADVICE, o->ssd->name, ref->n_dirs,
                    dir + 1, path);
    if (!l->sound)
        return check_unsound(o, dir, l);
    if (memcmp(l->header.uuid, ref->uuid, 16) != 0)
        return fail(o, -EEXIST, "%s holds a part of another store %s" ADVICE, path,
                    o->ssd->name);
    if (l->header.dir != dir)
        return fail(o, -EEXIST, "%s is directory %u of store %s, but number %u in ssd_cache_dir;"
                    " list them in the old order" ADVICE, path, l->header.dir + 1, o->ssd->name,
                    dir + 1);
    return 0;
}

/* *ref: the store to use, or NULL: make a new one. -EEXIST: neither. */
static int decide(struct opening *o, struct look *looks, const struct ssd_header **ref)
{
    uint32_t n = o->ssd->geometry.n_dirs, first = FK_NONE;
    int rc = 0;

    *ref = NULL;
    for (uint32_t i = 0; i < n; i++) {
        if (looks[i].sound && looks[i].header.complete && first == FK_NONE)
            first = i;
    }
    if (first == FK_NONE) {
        for (uint32_t i = 0; i < n && rc == 0; i++)
            rc = looks[i].sound ? 0 : check_unsound(o, i, &looks[i]);
        return rc;
    }
    rc = check_geometry(o, first, &looks[first].header);
    for (uint32_t i = 0; i < n && rc == 0; i++)
        rc = check_member(o, i, &looks[i], &looks[first].header);
    if (rc == 0)
        *ref = &looks[first].header;
    return rc;
}

/* --- making and mending --- */

static void remove_files(struct fk_ssd *ssd)
{
    for (uint32_t i = 0; i < ssd->geometry.n_dirs && !ssd->virtual_dirs; i++) {
        char path[4096];
        static const char *const beside[] = { "names", "labels" };     /* src/events */
        unlink(ssd->dirs[i].data_path);
        unlink(ssd->dirs[i].table_path);
        for (size_t k = 0; k < fk_array_size(beside); k++) {
            snprintf(path, sizeof(path), "%s/%s.%s", ssd->dirs[i].path, ssd->name, beside[k]);
            unlink(path);
        }
    }
}

static int open_file(struct opening *o, const char *path, uint64_t bytes, unsigned flags,
                     uint32_t *file)
{
    struct fk_ssd *ssd = o->ssd;
    uint64_t have = 0;
    bool created;
    int rc = ssd->engine->ops->open(ssd->engine, path, bytes,
                                    flags | FK_FILE_CREATE | FK_FILE_PREALLOC, file, &created);

    if (rc < 0) {
        *file = FK_NONE;
        return fail(o, rc, "can't allocate %llu MiB for %s: %s; free space or lower ssd_cache_gb",
                    (unsigned long long)fk_div_up(bytes, FK_MIB), path, strerror(-rc));
    }
    rc = ssd->engine->ops->size(ssd->engine, *file, &have);
    if (rc == 0 && have < bytes)
        rc = -EIO;
    return rc < 0 ? fail(o, rc, "%s is shorter than it must be; check the file system", path) : 0;
}

static int open_files(struct opening *o)
{
    struct fk_ssd *ssd = o->ssd;

    for (uint32_t i = 0; i < ssd->geometry.n_dirs; i++) {
        struct ssd_dir *d = &ssd->dirs[i];
        int rc = open_file(o, d->data_path, ssd_data_offset(&ssd->geometry, d->slots),
                           ssd->direct ? FK_FILE_DIRECT : 0, &d->data_file);

        if (rc == 0)
            rc = open_file(o, d->table_path, ssd_table_offset(d->slots), 0, &d->table_file);
        if (rc < 0)
            return rc;
    }
    return 0;
}

static int write_headers(struct opening *o, bool complete)
{
    struct fk_ssd *ssd = o->ssd;

    for (uint32_t i = 0; i < ssd->geometry.n_dirs; i++) {
        int rc = ssd_header_write(ssd, i, complete);

        if (rc < 0)
            return fail(o, rc, "can't write %s: %s", ssd->dirs[i].table_path, strerror(-rc));
    }
    return 0;
}

static int make_store(struct opening *o)
{
    struct fk_ssd *ssd = o->ssd;

    remove_files(ssd);
    if (getrandom(ssd->uuid, sizeof(ssd->uuid), 0) != sizeof(ssd->uuid))
        return fail(o, -EIO, "no random numbers from the kernel");
    ssd->record_seed = ssd_record_seed(ssd->uuid);
    ssd->epoch = 1;
    int rc = open_files(o);
    if (rc == 0)
        rc = write_headers(o, false);
    if (rc == 0)
        rc = write_headers(o, true);
    if (rc < 0)
        remove_files(ssd);
    return rc;
}

/* Where a header is not as it must be. A directory that refuses is out, the others serve. */
static void mend_headers(struct fk_ssd *ssd, const struct look *looks)
{
    for (uint32_t i = 0; i < ssd->geometry.n_dirs; i++) {
        const struct look *l = &looks[i];

        if (l->agree && l->header.complete && l->header.epoch == ssd->epoch)
            continue;
        int rc = ssd_header_write(ssd, i, true);
        if (rc < 0)
            ssd_device_take_out(ssd, i, rc);
    }
}

/* One that can't be read is none. */
static int load_hint(struct fk_ssd *ssd)
{
    int rc = ssd_io_sync(ssd, 0, ssd->dirs[0].data_file, FK_IO_READ, ssd->hint_page, SSD_HINT_AT, SSD_PAGE);

    if (ssd->stuck)
        return rc;
    if (rc == 0)
        memcpy(&ssd->hint, ssd->hint_page, sizeof(ssd->hint));
    return 0;
}

static int use_store(struct opening *o, const struct look *looks, const struct ssd_header *ref)
{
    struct fk_ssd *ssd = o->ssd;

    memcpy(ssd->uuid, ref->uuid, 16);
    ssd->record_seed = ssd_record_seed(ssd->uuid);
    for (uint32_t i = 0; i < ssd->geometry.n_dirs; i++) {
        if (looks[i].sound)
            ssd->epoch = fk_max(ssd->epoch, looks[i].epoch);
        if (looks[i].table != SSD_HEADER_OK)
            fk_warn("ssd %s: %s: header torn or lost; mended", ssd->name,
                    ssd->dirs[i].table_path);
    }
    int rc = open_files(o);
    for (uint32_t i = 0; i < ssd->geometry.n_dirs && rc == 0; i++) {
        if (looks[i].has_data)
            continue;
        fk_warn("ssd %s: %s was lost; made anew, empty", ssd->name, ssd->dirs[i].data_path);
        rc = ssd_table_clear(ssd, i);
        if (rc < 0)
            fail(o, rc, "can't write %s: %s", ssd->dirs[i].table_path, strerror(-rc));
    }
    if (rc < 0)
        return rc;
    rc = ssd_table_load(ssd);
    if (rc < 0)
        return fail(o, rc, "can't read store %s: %s", ssd->name, strerror(-rc));
    rc = load_hint(ssd);
    if (rc < 0)
        return fail(o, rc, "%s does not answer; check the device", ssd->dirs[0].data_path);
    mend_headers(ssd, looks);
    return 0;
}

static int open_store(struct opening *o)
{
    struct look *looks = calloc(FK_SSD_MAX_DIRS, sizeof(*looks));
    const struct ssd_header *ref = NULL;
    int rc = looks ? 0 : -ENOMEM;

    for (uint32_t i = 0; i < o->ssd->geometry.n_dirs && rc == 0; i++)
        rc = look_at_dir(o, i, &looks[i]);
    if (rc == 0)
        rc = decide(o, looks, &ref);
    if (rc == -EEXIST && o->params->recreate) {
        fk_warn("ssd %s: replaced, as ssd_recreate asks: %s", o->ssd->name,
                o->error_bytes ? o->error : "it does not match");
        rc = 0;
        ref = NULL;
    }
    if (rc == 0)
        rc = ref ? use_store(o, looks, ref) : make_store(o);
    free(looks);
    return rc;
}

/* --- the object --- */

static int check_params(struct opening *o)
{
    const struct fk_ssd_params *p = o->params;
    size_t len = p->name ? strlen(p->name) : 0;

    if (len == 0 || len > SSD_NAME_MAX || p->name[0] == '.' ||
        p->name[strspn(p->name, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
                                "0123456789_.-")])
        return fail(o, -EINVAL, "a store's name is 1 to %d of A-Z a-z 0-9 _ . -", SSD_NAME_MAX);
    if (p->n_dirs == 0 || p->n_dirs > FK_SSD_MAX_DIRS)
        return fail(o, -EINVAL, "ssd_cache_dir must name 1 to %d directories, not %u",
                    FK_SSD_MAX_DIRS, p->n_dirs);
    if (p->block_bytes == 0 || p->block_bytes > SSD_MAX_BLOCK_BYTES || p->n_slots == 0 ||
        p->n_slots == FK_NONE)
        return fail(o, -EINVAL, "store %s: %u slots of %llu bytes can't be", p->name, p->n_slots,
                    (unsigned long long)p->block_bytes);
    return 0;
}

static int init_dir(struct fk_ssd *ssd, uint32_t i, const char *path)
{
    struct ssd_dir *d = &ssd->dirs[i];

    d->data_file = d->table_file = d->new_data_file = d->new_table_file = FK_NONE;
    d->slots = ssd_geometry_dir_slots(&ssd->geometry, i);
    d->path = strdup(path);
    if (!d->path || asprintf(&d->data_path, "%s/%s.data", path, ssd->name) < 0)
        return -ENOMEM;
    if (asprintf(&d->table_path, "%s/%s.table", path, ssd->name) < 0)
        return -ENOMEM;
    d->probe_pages = aligned_alloc(SSD_PAGE, 2 * SSD_PAGE);
    return d->probe_pages ? 0 : -ENOMEM;
}

static int init(struct fk_ssd *ssd, const struct fk_ssd_params *p)
{
    ssd->geometry = (struct ssd_geometry){
        .block_bytes = p->block_bytes, .n_slots = p->n_slots, .n_dirs = p->n_dirs,
        .stripe_slots = p->stripe_slots,
    };
    ssd_geometry_derive(&ssd->geometry);
    snprintf(ssd->name, sizeof(ssd->name), "%s", p->name);
    memcpy(ssd->fingerprint, p->fingerprint, 16);
    ssd->engine = p->engine;
    ssd->direct = p->direct;
    ssd->virtual_dirs = p->virtual_dirs;
    ssd->io_chunk_bytes = p->io_chunk_bytes ? p->io_chunk_bytes : 1024 * 1024;
    ssd->io_chunk_bytes = fk_max(fk_min(ssd->io_chunk_bytes, 1u << 30) / SSD_PAGE, 1u) * SSD_PAGE;
    ssd->device_errors = fk_max(p->device_errors, 1u);
    ssd->device_retry_us = p->device_retry_us;
    ssd->requests.object_bytes = sizeof(struct ssd_request);
    ssd->ios.object_bytes = sizeof(struct ssd_io);
    ssd->done_tail = &ssd->done;
    ssd->page = aligned_alloc(SSD_PAGE, SSD_PAGE);
    ssd->hint_page = aligned_alloc(SSD_PAGE, SSD_PAGE);
    ssd->checksums = calloc(p->n_slots, sizeof(*ssd->checksums));
    if (!ssd->page || !ssd->hint_page || !ssd->checksums)
        return -ENOMEM;
    for (uint32_t i = 0; i < p->n_dirs; i++) {
        if (init_dir(ssd, i, p->dirs[i]) < 0)
            return -ENOMEM;
    }
    return 0;
}

static int lock_dirs(struct opening *o)
{
    struct fk_ssd *ssd = o->ssd;
    int pid = 0;

    for (uint32_t i = 0; i < ssd->geometry.n_dirs && !ssd->virtual_dirs; i++) {
        const char *path = ssd->dirs[i].path;

        if (mkdir(path, 0700) < 0 && errno != EEXIST)
            return fail(o, -errno, "can't make directory %s: %s; check ssd_cache_dir", path,
                        strerror(errno));
        int rc = ssd_lock_acquire(path, ssd->engine, ssd->name, &ssd->dirs[i].lock, &pid);
        if (rc == -EBUSY)
            return fail(o, rc, "%s is in use by %s %d; give each node its own ssd_cache_dir",
                        path, pid == (int)getpid() ? "this very process," : "process", pid);
        if (rc < 0)
            return fail(o, rc, "can't lock %s/flexkv.lock: %s; check ssd_cache_dir", path,
                        strerror(-rc));
    }
    return 0;
}

static void close_dir(struct fk_ssd *ssd, struct ssd_dir *d)
{
    const uint32_t files[] = { d->data_file, d->table_file, d->new_data_file, d->new_table_file };

    for (size_t i = 0; i < fk_array_size(files); i++) {
        if (files[i] != FK_NONE)
            ssd->engine->ops->close(ssd->engine, files[i]);
    }
    ssd_lock_release(d->lock);
    free(d->path);
    free(d->data_path);
    free(d->table_path);
    free(d->probe_pages);
    fk_vec_free(&d->pending);
    fk_vec_free(&d->batch);
    fk_vec_free(&d->batch_of);
}

static void destroy(struct fk_ssd *ssd)
{
    for (uint32_t i = 0; i < ssd->geometry.n_dirs; i++)
        close_dir(ssd, &ssd->dirs[i]);
    ssd_pool_free(&ssd->requests);
    ssd_pool_free(&ssd->ios);
    free(ssd->checksums);
    free(ssd->page);
    free(ssd->hint_page);
    free(ssd);
}

int fk_ssd_open(const struct fk_ssd_params *params, struct fk_ssd **out,
                char *error, size_t error_bytes)
{
    struct opening o = { .params = params, .error = error, .error_bytes = error_bytes };
    int rc = check_params(&o);

    if (rc < 0)
        return rc;
    o.ssd = calloc(1, sizeof(*o.ssd));
    if (!o.ssd)
        return fail(&o, -ENOMEM, "no memory");
    rc = init(o.ssd, params);
    if (rc < 0)
        fail(&o, rc, "no memory for the checksums of %u slots; lower ssd_cache_gb",
             params->n_slots);
    if (rc == 0)
        rc = lock_dirs(&o);
    if (rc == 0)
        rc = open_store(&o);
    if (rc == 0) {
        *out = o.ssd;
        return 0;
    }
    if (!o.ssd->stuck)                  /* else the device may still write into it: leaked */
        destroy(o.ssd);
    return rc;
}

/* True while a directory in use has records, or the hint, to write. */
static bool records_left(const struct fk_ssd *ssd)
{
    for (uint32_t i = 0; i < ssd->geometry.n_dirs; i++) {
        if (!ssd->dirs[i].out && ssd->dirs[i].pending.len > 0)
            return true;
    }
    return ssd_hint_due(ssd);
}

void fk_ssd_close(struct fk_ssd *ssd)
{
    if (!ssd)
        return;
    for (int tries = 0; tries < CLOSE_TRIES && !ssd->stuck;) {
        for (uint32_t i = 0; i < ssd->geometry.n_dirs; i++)
            ssd_table_tick(ssd, i, true);
        ssd_hint_tick(ssd);
        ssd->engine->ops->flush(ssd->engine);
        if (fk_ssd_inflight(ssd) == 0 && !records_left(ssd))
            break;
        if (ssd_reap(ssd, 10000) == 0)
            tries++;
    }
    if (fk_ssd_inflight(ssd) > 0) {
        fk_warn("ssd %s: %u I/Os did not end; files and lock stay until the process ends",
                ssd->name, fk_ssd_inflight(ssd));
        return;
    }
    destroy(ssd);
}
