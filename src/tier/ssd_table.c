/*
 * ssd_table.c - the slot table: records that wait to be written, and reading them back at
 * start. Called by ssd.c and ssd_open.c on the store's thread, no lock.
 *
 *   put -> pending (any order, newest of a slot counts)
 *              | every SSD_TABLE_DELAY_US, or SSD_TABLE_BATCH of them
 *              v
 *          batch (sorted, one per slot; neighbours are one write)
 *
 * A directory has one batch in flight at a time, so two writes of one record never are: were
 * they reordered, an older record would come back to life. No shadow of the table is kept in
 * memory; a record is written alone, 64 bytes into the page cache, if it has no neighbour.
 */
#include "tier/ssd_internal.h"

#include "base/log.h"

#define PIECE_RECORDS 16384u            /* 1 MiB of table at a time */

/* --- pending --- */

static int by_place(const void *a, const void *b)
{
    const struct ssd_pending *x = a, *y = b;

    if (x->local != y->local)
        return x->local < y->local ? -1 : 1;
    return x->order < y->order ? -1 : x->order > y->order;
}

/* Sorts, and keeps the newest of each slot. */
static void compact(struct ssd_dir *d)
{
    struct ssd_pending *p = d->pending.data;
    size_t n = 0;

    qsort(p, d->pending.len, sizeof(*p), by_place);
    for (size_t i = 0; i < d->pending.len; i++) {
        if (i + 1 < d->pending.len && p[i + 1].local == p[i].local)
            continue;
        p[n++] = p[i];
    }
    d->pending.len = n;
}

/* A directory that is out gathers records for long: one for each slot is enough. */
static void make_room(struct ssd_dir *d)
{
    compact(d);
    if (d->pending.len > d->pending.cap / 4 * 3)
        (void)fk_vec_reserve(&d->pending, d->pending.cap + 1);
}

static void pend(struct fk_ssd *ssd, struct ssd_dir *d, const struct ssd_pending *p)
{
    if (d->pending.len == d->pending.cap && d->pending.len >= SSD_TABLE_BATCH)
        make_room(d);
    if (d->pending.len == 0)
        d->pending_since_us = ssd->now_us;
    if (fk_vec_push(&d->pending, *p) < 0)
        fk_error("ssd %s: no memory for a table record; slot is lost at restart", ssd->name);
}

void ssd_table_put(struct fk_ssd *ssd, uint32_t slot, const struct ssd_request *r)
{
    const struct ssd_geometry *g = &ssd->geometry;
    struct ssd_pending p = { .local = ssd_geometry_local(g, slot), .order = ++ssd->order };

    if (r) {
        p.record = (struct ssd_record){
            .key = r->req.key, .parent = r->req.parent, .checksum = r->checksum,
            .seq = ++ssd->seq, .tag = r->req.tag, .length = (uint32_t)g->block_bytes,
            .epoch = ssd->epoch,
        };
        ssd_record_seal(&p.record, ssd->record_seed, slot);
    }
    pend(ssd, &ssd->dirs[ssd_geometry_dir(g, slot)], &p);
}

/* --- batches --- */

/* Records first .. first + n of the batch go back to where they waited. */
static void put_back(struct fk_ssd *ssd, struct ssd_dir *d, uint32_t first, uint32_t n)
{
    for (uint32_t i = first; i < first + n; i++) {
        const struct ssd_pending *p = &d->batch_of.data[i];

        if (p->record.epoch == ssd->epoch || p->record.epoch == 0)
            pend(ssd, d, p);
    }
}

static void start_run(struct fk_ssd *ssd, uint32_t dir, uint32_t first, uint32_t n)
{
    struct ssd_dir *d = &ssd->dirs[dir];
    struct ssd_io *x = ssd_io_new(ssd, SSD_IO_TABLE, dir);

    if (!x) {
        put_back(ssd, d, first, n);
        return;
    }
    x->batch_first = first;
    x->batch_len = n;
    d->batch_left++;
    ssd->stats.table_writes++;
    ssd_io_start(x, d->table_file, FK_IO_WRITE, &d->batch.data[first],
                 ssd_table_offset(d->batch_of.data[first].local),
                 n * (uint32_t)sizeof(struct ssd_record));
}

static int fill_batch(struct ssd_dir *d)
{
    compact(d);
    if (fk_vec_reserve(&d->batch, d->pending.len) < 0 ||
        fk_vec_reserve(&d->batch_of, d->pending.len) < 0)
        return -ENOMEM;
    memcpy(d->batch_of.data, d->pending.data, d->pending.len * sizeof(*d->pending.data));
    for (size_t i = 0; i < d->pending.len; i++)
        d->batch.data[i] = d->pending.data[i].record;
    d->batch.len = d->batch_of.len = d->pending.len;
    d->pending.len = 0;
    return 0;
}

void ssd_table_tick(struct fk_ssd *ssd, uint32_t dir, bool force)
{
    struct ssd_dir *d = &ssd->dirs[dir];
    bool due = force || d->pending.len >= SSD_TABLE_BATCH ||
               ssd->now_us >= d->pending_since_us + SSD_TABLE_DELAY_US;

    if (d->out || d->batch_left > 0 || d->pending.len == 0 || !due || fill_batch(d) < 0)
        return;
    uint32_t most = fk_max(ssd->io_chunk_bytes / (uint32_t)sizeof(struct ssd_record), 1u);
    for (uint32_t first = 0, i = 1; i <= d->batch.len; i++) {
        bool joined = i < d->batch.len && i - first < most &&
                      d->batch_of.data[i].local == d->batch_of.data[i - 1].local + 1;

        if (joined)
            continue;
        start_run(ssd, dir, first, i - first);
        first = i;
    }
}

void ssd_table_io_done(struct ssd_io *x, int32_t status)
{
    struct fk_ssd *ssd = x->ssd;
    struct ssd_dir *d = &ssd->dirs[x->dir];

    ssd_device_result(ssd, x->dir, true, status);
    if (status < 0) {
        ssd->stats.write_errors++;
        put_back(ssd, d, x->batch_first, x->batch_len);
    }
    d->batch_left--;
}

/* --- reading --- */

struct window {
    struct ssd_record *records;
    uint32_t first, count;
};

struct reader {
    struct fk_ssd *ssd;
    struct window windows[FK_SSD_MAX_DIRS];
};

/* A piece that can't be read is empty. */
static void fill_window(struct reader *r, uint32_t dir, uint32_t local)
{
    struct fk_ssd *ssd = r->ssd;
    struct window *w = &r->windows[dir];
    uint32_t n = fk_min(PIECE_RECORDS, ssd->dirs[dir].slots - local);
    uint32_t bytes = n * (uint32_t)sizeof(*w->records);
    int rc = ssd_io_sync(ssd, dir, ssd->dirs[dir].table_file, FK_IO_READ, w->records,
                         ssd_table_offset(local), bytes);

    w->first = local;
    w->count = n;
    if (ssd->stuck) {                   /* the buffer is the kernel's for ever */
        w->records = calloc(PIECE_RECORDS, sizeof(*w->records));
        if (!w->records)
            w->count = 0;
    } else if (rc < 0) {
        memset(w->records, 0, bytes);
    }
    if (rc < 0)
        fk_warn("ssd %s: %s: %u records not readable (%s), taken as empty", ssd->name,
                ssd->dirs[dir].table_path, n, strerror(-rc));
}

static const struct ssd_record *reader_get(struct reader *r, uint32_t dir, uint32_t local)
{
    struct window *w = &r->windows[dir];

    if (local - w->first >= w->count)
        fill_window(r, dir, local);
    return w->count ? &w->records[local - w->first] : NULL;
}

static int reader_init(struct reader *r, struct fk_ssd *ssd)
{
    *r = (struct reader){ .ssd = ssd };
    for (uint32_t d = 0; d < ssd->geometry.n_dirs; d++) {
        size_t n = fk_max(fk_min(PIECE_RECORDS, ssd->dirs[d].slots), 1u);

        r->windows[d].records = malloc(n * sizeof(struct ssd_record));
        if (!r->windows[d].records)
            return -ENOMEM;
    }
    return 0;
}

static void reader_free(struct reader *r)
{
    for (uint32_t d = 0; d < r->ssd->geometry.n_dirs; d++)
        free(r->windows[d].records);
}

typedef void record_fn(struct fk_ssd *ssd, uint32_t slot, const struct ssd_record *r, void *arg);

/* Calls fn for each sound record, of any epoch, in slot order. */
static int for_each_record(struct fk_ssd *ssd, record_fn *fn, void *arg)
{
    const struct ssd_geometry *g = &ssd->geometry;
    struct reader r;
    int rc = reader_init(&r, ssd);

    for (uint32_t slot = 0; rc == 0 && slot < g->n_slots;) {
        uint32_t dir = ssd_geometry_dir(g, slot), local = ssd_geometry_local(g, slot);
        uint32_t n = fk_min(g->stripe_slots, g->n_slots - slot);

        for (uint32_t i = 0; i < n; i++, slot++) {
            const struct ssd_record *rec = reader_get(&r, dir, local + i);

            if (!rec) {
                reader_free(&r);
                return -ENOMEM;
            }
            if (ssd_record_check(rec, ssd->record_seed, slot, g->block_bytes) == SSD_RECORD_OK)
                fn(ssd, slot, rec, arg);
        }
    }
    reader_free(&r);
    return rc;
}

/* A header lost in a crash may be older than the records: the newest epoch counts. */
static void load_record(struct fk_ssd *ssd, uint32_t slot, const struct ssd_record *r, void *arg)
{
    if (r->epoch > ssd->epoch) {
        ssd->epoch = r->epoch;
        memset(ssd->checksums, 0, ssd->geometry.n_slots * sizeof(*ssd->checksums));
    }
    if (r->epoch == ssd->epoch)
        ssd->checksums[slot] = r->checksum;
    ssd->seq = fk_max(ssd->seq, r->seq);
}

int ssd_table_load(struct fk_ssd *ssd)
{
    return for_each_record(ssd, load_record, NULL);
}

struct found_arg {
    void (*found)(void *arg, const struct fk_ssd_found *f);
    void *arg;
};

static void found_record(struct fk_ssd *ssd, uint32_t slot, const struct ssd_record *r, void *arg)
{
    const struct found_arg *to = arg;

    if (r->epoch != ssd->epoch || r->checksum != ssd->checksums[slot])
        return;                         /* of before a reset; or forgotten since the load */
    to->found(to->arg, &(struct fk_ssd_found){
        .slot = slot, .key = r->key, .parent = r->parent, .seq = r->seq, .tag = r->tag,
    });
}

int fk_ssd_recover(struct fk_ssd *ssd, void (*found)(void *arg, const struct fk_ssd_found *f),
                   void *arg)
{
    struct found_arg to = { .found = found, .arg = arg };

    return for_each_record(ssd, found_record, &to);
}

int ssd_table_clear(struct fk_ssd *ssd, uint32_t dir)
{
    uint32_t slots = ssd->dirs[dir].slots;
    void *zeros = calloc(PIECE_RECORDS, sizeof(struct ssd_record));
    int rc = zeros ? 0 : -ENOMEM;

    for (uint32_t at = 0; rc == 0 && at < slots; at += PIECE_RECORDS) {
        uint32_t n = fk_min(PIECE_RECORDS, slots - at);

        rc = ssd_io_sync(ssd, dir, ssd->dirs[dir].table_file, FK_IO_WRITE, zeros,
                         ssd_table_offset(at), n * (uint32_t)sizeof(struct ssd_record));
    }
    if (!ssd->stuck)
        free(zeros);
    return rc;
}
