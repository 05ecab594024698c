/*
 * ssd.c - the SSD store's requests: from slots and buffers to few large I/Os and back, with
 * every byte's checksum. Touches the engine and the store's memory. Called by the owner of
 * the store (the node's I/O thread), no lock.
 *
 *   req req req | req        neighbours in slots and in memory become one I/O (a run);
 *   `--- I/O --'  I/O        a block larger than the largest I/O becomes several
 *
 * An I/O that comes back short goes on from where it stopped, here and not in the engine, so
 * that all engines behave alike; short twice at the same place is -EIO. When an I/O fails,
 * the requests wholly in its finished part are good, the others get its error.
 */
#include "tier/ssd_internal.h"

#include "base/plant.h"
#include "base/log.h"

#define MAX_RETRIES 16                  /* of -EAGAIN and -EINTR */
#define SYNC_WAITS 3000                 /* of SYNC_WAIT_US: half a minute */
#define SYNC_WAIT_US 10000
#define SYNC_TRIES 3                    /* one bad moment is no reason to refuse a store */

/* --- slabs --- */

void *ssd_pool_get(struct ssd_pool *pool)
{
    enum { PER_SLAB = 64 };

    if (!pool->free) {
        if (fk_vec_reserve(&pool->slabs, pool->slabs.len + 1) < 0)
            return NULL;
        char *slab = malloc(PER_SLAB * pool->object_bytes);
        if (!slab)
            return NULL;
        pool->slabs.data[pool->slabs.len++] = slab;
        for (int i = 0; i < PER_SLAB; i++)
            ssd_pool_put(pool, slab + (size_t)i * pool->object_bytes);
    }
    void *object = pool->free;
    pool->free = *(void **)object;
    memset(object, 0, pool->object_bytes);
    return object;
}

void ssd_pool_put(struct ssd_pool *pool, void *object)
{
    *(void **)object = pool->free;
    pool->free = object;
}

void ssd_pool_free(struct ssd_pool *pool)
{
    for (size_t i = 0; i < pool->slabs.len; i++)
        free(pool->slabs.data[i]);
    fk_vec_free(&pool->slabs);
    pool->free = NULL;
}

/* --- one I/O --- */

struct ssd_io *ssd_io_new(struct fk_ssd *ssd, enum ssd_io_kind kind, uint32_t dir)
{
    struct ssd_io *x = ssd_pool_get(&ssd->ios);

    if (x) {
        x->ssd = ssd;
        x->kind = kind;
        x->dir = dir;
    }
    return x;
}

static void resume(struct ssd_io *x)
{
    x->io.offset = x->offset + x->done;
    x->io.buf = x->buf + x->done;
    x->io.bytes = x->bytes - x->done;
    x->ssd->engine->ops->submit(x->ssd->engine, &x->io);
}

void ssd_io_start(struct ssd_io *x, uint32_t file, enum fk_io_op op, void *buf,
                  uint64_t offset, uint32_t bytes)
{
    x->io.op = op;
    x->io.file = file;
    x->io.owner = x;
    x->buf = buf;
    x->offset = offset;
    x->bytes = bytes;
    x->short_at = UINT32_MAX;
    x->ssd->dirs[x->dir].inflight++;
    if (x->kind != SSD_IO_DATA)
        x->ssd->others_inflight++;
    resume(x);
}

/* Direct I/O goes on at an aligned place only; table I/O anywhere. */
static uint32_t progress(const struct ssd_io *x)
{
    uint32_t n = (uint32_t)x->io.result;

    return x->bytes % FK_SSD_ALIGN == 0 && x->offset % FK_SSD_ALIGN == 0
               ? n / FK_SSD_ALIGN * FK_SSD_ALIGN : n;
}

/* True when the I/O is at its end, *status its outcome; else it was started again. */
static bool io_ended(struct ssd_io *x, int32_t *status)
{
    int32_t res = x->io.result;

    *status = 0;
    if (res == -EAGAIN || res == -EINTR || res == -ECANCELED) {
        if (++x->retries > MAX_RETRIES) {
            *status = -EIO;
            return true;
        }
    } else if (res < 0) {
        *status = res;
        return true;
    } else if ((uint32_t)res >= x->bytes - x->done) {
        x->done = x->bytes;
        return true;
    } else {
        x->done += progress(x);
        if (x->short_at == x->done) {
            *status = -EIO;
            return true;
        }
        x->short_at = x->done;
    }
    resume(x);
    x->ssd->engine->ops->flush(x->ssd->engine);
    return false;
}

/* --- requests --- */

static void request_done(struct fk_ssd *ssd, struct ssd_request *r)
{
    r->next = NULL;
    *ssd->done_tail = r;
    ssd->done_tail = &r->next;
    ssd->requests_inflight--;
}

static void read_ended(struct fk_ssd *ssd, struct ssd_request *r)
{
    if (r->status < 0) {
        ssd->stats.read_errors++;
    } else if (ssd_data_checksum(r->req.key, r->req.buf, ssd->geometry.block_bytes) !=
               r->checksum && !FK_BUG(3)) {
        ssd->stats.checksum_errors++;
        r->status = -EBADMSG;
    } else {
        ssd->stats.read_bytes += ssd->geometry.block_bytes;
    }
}

/*
 * The record follows the data. A write from before a reset must not come back to life under
 * the new epoch; after a failed one nobody knows what the slot holds.
 */
static void write_ended(struct fk_ssd *ssd, struct ssd_request *r)
{
    if (r->status < 0)
        ssd->stats.write_errors++;
    if (r->epoch != ssd->epoch && !FK_BUG(12)) {
        if (r->status == 0)
            r->status = -ECANCELED;
        return;
    }
    if (r->status == 0) {
        /*
         * Now and not before: the device has just read the bytes, so they are in the cache, and a
         * second trip to memory is saved. Memory and disk are the same then, or a read will tell:
         * the slot is pinned, and whoever wrote to it nevertheless spoils the checksum.
         */
        r->checksum = ssd_data_checksum(r->req.key, r->req.buf, ssd->geometry.block_bytes);
        ssd->stats.write_bytes += ssd->geometry.block_bytes;
        ssd->checksums[r->req.slot] = r->checksum;
        ssd_table_put(ssd, r->req.slot, r);
    } else {
        ssd->checksums[r->req.slot] = 0;
        ssd_table_put(ssd, r->req.slot, NULL);
    }
}

struct run {
    struct ssd_request *first, *last;
    uint32_t count;
};

static void start_run(struct fk_ssd *ssd, struct run *run);

/* One bad sector fails a read of many blocks: those that it did not bring are read one by one. */
static bool read_alone(struct ssd_io *x, struct ssd_request *r, uint64_t end, int32_t status)
{
    struct fk_ssd *ssd = x->ssd;
    struct run alone = { r, r, 1 };

    if (status != -EIO || x->bytes <= ssd->geometry.slot_bytes || end <= x->done ||
        r->req.op != FK_IO_READ || ssd->dirs[x->dir].out)
        return false;
    r->alone = true;
    start_run(ssd, &alone);
    return true;
}

static void data_io_done(struct ssd_io *x, int32_t status)
{
    struct fk_ssd *ssd = x->ssd;
    uint64_t slot_bytes = ssd->geometry.slot_bytes, end = 0;
    struct ssd_request *r = x->first;

    if (status >= 0 || !r->alone)       /* the same fault is not counted twice */
        ssd_device_result(ssd, x->dir, false, status);
    while (end < x->bytes) {
        struct ssd_request *next = r->next;

        end = fk_min(end + slot_bytes, (uint64_t)x->bytes);
        if (read_alone(x, r, end, status)) {
            r = next;
            continue;
        }
        if (status < 0 && end > x->done && r->status == 0)
            r->status = status;
        if (--r->parts == 0) {
            if (r->req.op == FK_IO_READ)
                read_ended(ssd, r);
            else
                write_ended(ssd, r);
            request_done(ssd, r);
        }
        r = next;
    }
}

/* --- building runs --- */

static bool extends(const struct fk_ssd *ssd, const struct run *run,
                    const struct fk_ssd_req *req)
{
    const struct fk_ssd_req *last = &run->last->req;
    uint64_t slot_bytes = ssd->geometry.slot_bytes;

    return req->op == last->op && req->slot == last->slot + 1 &&
           (char *)req->buf == (char *)last->buf + slot_bytes &&
           (run->count + 1) * slot_bytes <= ssd->io_chunk_bytes &&
           (req->slot % ssd->geometry.stripe_slots != 0 || ssd->geometry.n_dirs == 1);
}

/* Starts one I/O of the run, or marks its requests as failed. */
static void start_part(struct fk_ssd *ssd, const struct run *run, uint32_t at, uint32_t bytes)
{
    const struct fk_ssd_req *req = &run->first->req;
    uint32_t dir = ssd_geometry_dir(&ssd->geometry, req->slot);
    uint32_t local = ssd_geometry_local(&ssd->geometry, req->slot);
    struct ssd_io *x = ssd_io_new(ssd, SSD_IO_DATA, dir);

    if (!x) {
        struct ssd_io failed = { .ssd = ssd, .dir = dir, .first = run->first, .bytes = bytes };

        data_io_done(&failed, -ENOMEM);
        return;
    }
    x->first = run->first;
    if (req->op == FK_IO_READ)
        ssd->stats.reads++;
    else
        ssd->stats.writes++;
    ssd_io_start(x, ssd->dirs[dir].data_file, req->op, (char *)req->buf + at,
                 ssd_data_offset(&ssd->geometry, local) + at, bytes);
}

static void start_run(struct fk_ssd *ssd, struct run *run)
{
    uint64_t bytes = run->count * ssd->geometry.slot_bytes;

    if (run->count == 0)
        return;
    run->last->next = NULL;
    if (run->count == 1)
        run->first->parts = (uint32_t)fk_div_up(bytes, ssd->io_chunk_bytes);
    for (uint64_t at = 0; at < bytes; at += ssd->io_chunk_bytes)
        start_part(ssd, run, (uint32_t)at,
                   (uint32_t)fk_min(bytes - at, (uint64_t)ssd->io_chunk_bytes));
    run->count = 0;
}

static void run_add(struct run *run, struct ssd_request *r)
{
    if (run->count++ == 0)
        run->first = r;
    else
        run->last->next = r;
    run->last = r;
}

/* Why this request can't even be started, or 0. */
static int32_t refuse(struct fk_ssd *ssd, const struct ssd_request *r)
{
    if (r->req.slot >= ssd->geometry.n_slots || fk_key_is_zero(r->req.key))
        return -EINVAL;
    if (ssd->dirs[ssd_geometry_dir(&ssd->geometry, r->req.slot)].out)
        return -ENODEV;
    if (r->req.op == FK_IO_READ && r->checksum == 0)
        return -EBADMSG;                /* nothing was ever stored, or it was forgotten */
    return 0;
}

static void refused(struct fk_ssd *ssd, struct ssd_request *r)
{
    if (r->status == -EBADMSG)
        ssd->stats.checksum_errors++;
    else if (r->req.op == FK_IO_READ)
        ssd->stats.read_errors++;
    else
        ssd->stats.write_errors++;
    request_done(ssd, r);
}

/* A request must end exactly once; without memory for its 120 bytes that can't be kept. */
static struct ssd_request *new_request(struct fk_ssd *ssd, const struct fk_ssd_req *req)
{
    struct ssd_request *r = ssd_pool_get(&ssd->requests);

    if (!r) {
        fk_error("ssd %s: no memory for a request", ssd->name);
        abort();
    }
    r->req = *req;
    r->epoch = ssd->epoch;
    r->parts = 1;
    if (req->op == FK_IO_READ && req->slot < ssd->geometry.n_slots)
        r->checksum = ssd->checksums[req->slot];
    return r;
}

void fk_ssd_submit(struct fk_ssd *ssd, const struct fk_ssd_req *reqs, uint32_t n,
                   uint64_t now_us)
{
    struct run run = { 0 };

    ssd->now_us = now_us;
    for (uint32_t i = 0; i < n; i++) {
        struct ssd_request *r = new_request(ssd, &reqs[i]);

        ssd->requests_inflight++;
        r->status = refuse(ssd, r);
        if (r->status < 0) {
            refused(ssd, r);
            continue;
        }
        if (r->req.op == FK_IO_WRITE)
            ssd->checksums[r->req.slot] = 0;
        if (run.count > 0 && !extends(ssd, &run, &r->req))
            start_run(ssd, &run);
        run_add(&run, r);
    }
    start_run(ssd, &run);
    ssd->engine->ops->flush(ssd->engine);
}

/* --- completions --- */

static void io_done(struct fk_io *io)
{
    struct ssd_io *x = (struct ssd_io *)io;
    struct fk_ssd *ssd = x->ssd;
    int32_t status;

    if (!io_ended(x, &status))
        return;
    ssd->dirs[x->dir].inflight--;
    if (x->kind != SSD_IO_DATA)
        ssd->others_inflight--;
    switch (x->kind) {
    case SSD_IO_DATA:
        data_io_done(x, status);
        break;
    case SSD_IO_TABLE:
        ssd_table_io_done(x, status);
        break;
    case SSD_IO_PROBE:
        ssd_device_probe_done(x, status);
        break;
    case SSD_IO_HINT:                   /* lost is lost: the next one is on its way */
        ssd->hint_busy = false;
        break;
    case SSD_IO_SYNC:                   /* freed by who waits for it */
        x->status = status;
        x->finished = true;
        return;
    }
    ssd_pool_put(&ssd->ios, x);
}

void fk_ssd_io_done(struct fk_io *io, uint64_t now_us)
{
    ((struct ssd_io *)io)->ssd->now_us = now_us;
    io_done(io);
}

int ssd_reap(struct fk_ssd *ssd, uint64_t timeout_us)
{
    struct fk_io *ios[64];
    int n = ssd->engine->ops->reap(ssd->engine, ios, (int)fk_array_size(ios), timeout_us);

    for (int i = 0; i < n; i++)
        io_done(ios[i]);
    return n;
}

static int io_sync_once(struct fk_ssd *ssd, uint32_t dir, uint32_t file, enum fk_io_op op,
                        void *buf, uint64_t offset, uint32_t bytes)
{
    struct ssd_io *x = ssd_io_new(ssd, SSD_IO_SYNC, dir);

    if (!x)
        return -ENOMEM;
    ssd_io_start(x, file, op, buf, offset, bytes);
    ssd->engine->ops->flush(ssd->engine);
    for (int tries = 0; !x->finished && tries < SYNC_WAITS;) {
        if (ssd_reap(ssd, SYNC_WAIT_US) == 0)
            tries++;
    }
    if (!x->finished) {
        ssd->stuck = true;
        fk_error("%s: no answer from the device", ssd->dirs[dir].path);
        return -ETIMEDOUT;
    }
    int status = x->status;
    ssd_pool_put(&ssd->ios, x);
    return status;
}

int ssd_io_sync(struct fk_ssd *ssd, uint32_t dir, uint32_t file, enum fk_io_op op, void *buf,
                uint64_t offset, uint32_t bytes)
{
    int rc = -EIO;

    for (int tries = 0; tries < SYNC_TRIES && rc < 0 && !ssd->stuck; tries++)
        rc = io_sync_once(ssd, dir, file, op, buf, offset, bytes);
    return rc;
}

uint32_t fk_ssd_take_done(struct fk_ssd *ssd, struct fk_ssd_done *out, uint32_t max)
{
    uint32_t n = 0;

    while (n < max && ssd->done) {
        struct ssd_request *r = ssd->done;

        ssd->done = r->next;
        if (!ssd->done)
            ssd->done_tail = &ssd->done;
        out[n++] = (struct fk_ssd_done){ .id = r->req.id, .status = r->status };
        ssd_pool_put(&ssd->requests, r);
    }
    return n;
}

/* --- the hint --- */

_Static_assert(sizeof((struct ssd_hint){ 0 }.data) == FK_SSD_HINT_BYTES, "the hint's place is as large as its owner is told");

bool ssd_hint_due(const struct fk_ssd *ssd)
{
    return ssd->hint_left && !ssd->hint_busy && !ssd->dirs[0].out;
}

void ssd_hint_tick(struct fk_ssd *ssd)
{
    struct ssd_io *x = ssd_hint_due(ssd) ? ssd_io_new(ssd, SSD_IO_HINT, 0) : NULL;

    if (!x)
        return;
    ssd->hint_left = false;
    ssd->hint_busy = true;
    memset(ssd->hint_page, 0, SSD_PAGE);
    memcpy(ssd->hint_page, &ssd->hint, sizeof(ssd->hint));
    ssd_io_start(x, ssd->dirs[0].data_file, FK_IO_WRITE, ssd->hint_page, SSD_HINT_AT, SSD_PAGE);
}

void fk_ssd_set_hint(struct fk_ssd *ssd, const void *data, uint32_t bytes)
{
    ssd_hint_make(&ssd->hint, ssd->record_seed, data, bytes);
    ssd->hint_left = true;
}

bool fk_ssd_hint(const struct fk_ssd *ssd, void *out, uint32_t bytes)
{
    if (!ssd_hint_check(&ssd->hint, ssd->record_seed) || ssd->hint.bytes < bytes)
        return false;
    memcpy(out, ssd->hint.data, bytes);
    return true;
}

/* --- the rest of the interface --- */

void fk_ssd_tick(struct fk_ssd *ssd, uint64_t now_us)
{
    ssd->now_us = now_us;
    for (uint32_t d = 0; d < ssd->geometry.n_dirs; d++) {
        ssd_device_tick(ssd, d);
        ssd_table_tick(ssd, d, false);
    }
    ssd_hint_tick(ssd);
    ssd->engine->ops->flush(ssd->engine);
}

uint64_t fk_ssd_next_wakeup(const struct fk_ssd *ssd)
{
    uint64_t at = ssd_hint_due(ssd) ? ssd->now_us : UINT64_MAX;

    for (uint32_t i = 0; i < ssd->geometry.n_dirs; i++) {
        const struct ssd_dir *d = &ssd->dirs[i];

        if (d->out && d->probe == SSD_PROBE_NONE)
            at = fk_min(at, d->retry_at_us);
        else if (!d->out && d->pending.len > 0 && d->batch_left == 0)
            at = fk_min(at, d->pending.len >= SSD_TABLE_BATCH
                                ? ssd->now_us : d->pending_since_us + SSD_TABLE_DELAY_US);
    }
    return at;
}

unsigned fk_ssd_inflight(const struct fk_ssd *ssd)
{
    return ssd->requests_inflight + ssd->others_inflight;
}

void fk_ssd_forget(struct fk_ssd *ssd, uint32_t slot)
{
    if (slot >= ssd->geometry.n_slots)
        return;
    ssd->checksums[slot] = 0;
    ssd_table_put(ssd, slot, NULL);
}

int fk_ssd_reset(struct fk_ssd *ssd, uint64_t now_us)
{
    bool written = false;

    ssd->now_us = now_us;
    ssd->epoch++;
    memset(ssd->checksums, 0, ssd->geometry.n_slots * sizeof(*ssd->checksums));
    for (uint32_t d = 0; d < ssd->geometry.n_dirs; d++)
        ssd->dirs[d].pending.len = 0;
    for (uint32_t d = 0; d < ssd->geometry.n_dirs; d++) {
        if (ssd->dirs[d].out)
            continue;                   /* gets its header when it comes back */
        int rc = FK_BUG(4) ? 0 : ssd_header_write(ssd, d, true);

        if (rc < 0)
            ssd_device_take_out(ssd, d, rc);
        else
            written = true;             /* the largest epoch of all directories counts */
    }
    if (!written)
        fk_error("ssd %s: reset reached no directory; a restart may find the old blocks again",
                 ssd->name);
    return written ? 0 : -EIO;
}

uint32_t fk_ssd_dir_of(const struct fk_ssd *ssd, uint32_t slot)
{
    return ssd_geometry_dir(&ssd->geometry, slot);
}

uint32_t fk_ssd_dirs_out(const struct fk_ssd *ssd)
{
    uint32_t mask = 0;

    for (uint32_t d = 0; d < ssd->geometry.n_dirs; d++)
        mask |= (uint32_t)ssd->dirs[d].out << d;
    return mask;
}

uint32_t fk_ssd_stripe_slots(const struct fk_ssd *ssd)
{
    return ssd->geometry.stripe_slots;
}

const uint8_t *fk_ssd_uuid(const struct fk_ssd *ssd)
{
    return ssd->uuid;
}

uint64_t fk_ssd_checksum(const struct fk_ssd *ssd, uint32_t slot)
{
    return slot < ssd->geometry.n_slots ? atomic_load_explicit(&ssd->checksums[slot], memory_order_relaxed) : 0;
}

const struct ssd_geometry *fk_ssd_geometry(const struct fk_ssd *ssd)
{
    return &ssd->geometry;
}

const char *fk_ssd_data_path(const struct fk_ssd *ssd, uint32_t dir)
{
    return ssd->dirs[dir].data_path;
}

void fk_ssd_get_stats(const struct fk_ssd *ssd, struct fk_ssd_stats *out)
{
    *out = ssd->stats;
}
