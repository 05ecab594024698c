/*
 * ssd_device.c - a directory whose device fails is taken out of use and tried again later.
 * Called by ssd.c on the store's thread, no lock.
 *
 *   in use --device_errors in a row--> out --retry time--> WRITE -> READ -> TABLE --> in use
 *                                       ^                    | fails
 *                                       |   fails again      v
 *                                       `---- REOPENED <- files opened anew by path
 *
 * The trial writes page 0 of the data file (the header's copy, with a number that changes)
 * and reads it back; no slot is touched. Then the header is written, since its epoch may be
 * behind, and the records that waited follow. Files are opened anew only where the ones we
 * have fail, never made anew: an unmounted disk must not fill the root file system. What is
 * opened must be the same store's; checksums in memory then decide about each block.
 */
#include "tier/ssd_internal.h"

#include "base/log.h"

#define MAX_BACKOFF 32

void ssd_device_take_out(struct fk_ssd *ssd, uint32_t dir, int32_t status)
{
    struct ssd_dir *d = &ssd->dirs[dir];

    if (d->out)
        return;
    d->out = true;
    d->retry_us = fk_max(ssd->device_retry_us, (uint64_t)1);
    d->retry_at_us = ssd->now_us + d->retry_us;
    ssd->stats.device_outs++;
    fk_warn("ssd %s: %s taken out of use (%s); tried again in %llu ms", ssd->name, d->path,
            strerror(-status), (unsigned long long)(d->retry_us / 1000));
}

void ssd_device_result(struct fk_ssd *ssd, uint32_t dir, bool table, int32_t status)
{
    struct ssd_dir *d = &ssd->dirs[dir];
    unsigned *errors = table ? &d->table_errors : &d->data_errors;

    if (status == -ENOMEM)
        return;                         /* ours, not the device's */
    *errors = status < 0 ? *errors + 1 : 0;
    if (*errors >= ssd->device_errors)
        ssd_device_take_out(ssd, dir, status);
}

/* --- the trial --- */

static void *header_page(struct ssd_dir *d)
{
    return d->probe_pages;
}

static void *other_page(struct ssd_dir *d)
{
    return d->probe_pages + SSD_PAGE;
}

static void drop_new_files(struct fk_ssd *ssd, struct ssd_dir *d)
{
    if (d->new_data_file != FK_NONE)
        ssd->engine->ops->close(ssd->engine, d->new_data_file);
    if (d->new_table_file != FK_NONE)
        ssd->engine->ops->close(ssd->engine, d->new_table_file);
    d->new_data_file = d->new_table_file = FK_NONE;
}

static void give_up(struct fk_ssd *ssd, uint32_t dir, int32_t status)
{
    struct ssd_dir *d = &ssd->dirs[dir];

    drop_new_files(ssd, d);
    d->probe = SSD_PROBE_NONE;
    d->retry_us = fk_min(d->retry_us * 2, ssd->device_retry_us * MAX_BACKOFF);
    d->retry_us = fk_max(d->retry_us, (uint64_t)1);
    d->retry_at_us = ssd->now_us + d->retry_us;
    fk_debug("ssd %s: %s still fails (%s); tried again in %llu ms", ssd->name, d->path,
             strerror(-status), (unsigned long long)(d->retry_us / 1000));
}

/* Returns -ENOMEM or 0; the outcome comes to ssd_device_probe_done. */
static int start(struct fk_ssd *ssd, uint32_t dir, enum ssd_probe_stage stage, uint32_t file,
                 enum fk_io_op op, void *page)
{
    struct ssd_io *x = ssd_io_new(ssd, SSD_IO_PROBE, dir);

    if (!x)
        return -ENOMEM;
    ssd->dirs[dir].probe = stage;
    ssd_io_start(x, file, op, page, 0, SSD_PAGE);
    ssd->engine->ops->flush(ssd->engine);
    return 0;
}

static int start_write(struct fk_ssd *ssd, uint32_t dir)
{
    struct ssd_dir *d = &ssd->dirs[dir];
    char *page = header_page(d);

    memset(page, 0, SSD_PAGE);
    ssd_header_of(ssd, dir, true, (struct ssd_header *)page);
    uint64_t trial = ++ssd->order;      /* so that a lost write does not look like this one */
    memcpy(page + SSD_PAGE - sizeof(trial), &trial, sizeof(trial));
    return start(ssd, dir, SSD_PROBE_WRITE, d->data_file, FK_IO_WRITE, page);
}

static int open_again(struct fk_ssd *ssd, struct ssd_dir *d)
{
    const struct fk_engine_ops *ops = ssd->engine->ops;
    uint64_t data_bytes = ssd_data_offset(&ssd->geometry, d->slots), bytes = 0;
    uint64_t table_bytes = ssd_table_offset(d->slots);
    bool created;

    int rc = ops->open(ssd->engine, d->data_path, data_bytes,
                       ssd->direct ? FK_FILE_DIRECT : 0, &d->new_data_file, &created);
    if (rc < 0)
        d->new_data_file = FK_NONE;
    if (rc == 0) {
        rc = ops->open(ssd->engine, d->table_path, table_bytes, 0, &d->new_table_file, &created);
        if (rc < 0)
            d->new_table_file = FK_NONE;
    }
    if (rc == 0)
        rc = ops->size(ssd->engine, d->new_data_file, &bytes);
    if (rc == 0 && bytes < data_bytes)
        rc = -ENODEV;
    if (rc == 0)
        rc = ops->size(ssd->engine, d->new_table_file, &bytes);
    return rc == 0 && bytes < table_bytes ? -ENODEV : rc;
}

/* The files we hold fail. With nothing else in flight on them, try what the paths lead to. */
static void reopen(struct fk_ssd *ssd, uint32_t dir, int32_t status)
{
    struct ssd_dir *d = &ssd->dirs[dir];

    if (d->reopen_tried || d->inflight > 0) {
        give_up(ssd, dir, status);
        return;
    }
    d->reopen_tried = true;
    int rc = open_again(ssd, d);
    if (rc == 0)
        rc = start(ssd, dir, SSD_PROBE_REOPENED, d->new_table_file, FK_IO_READ, other_page(d));
    if (rc < 0)
        give_up(ssd, dir, rc);
}

/* The header read from the new files: ours? Then they take the old ones' place. */
static int adopt(struct fk_ssd *ssd, uint32_t dir)
{
    struct ssd_dir *d = &ssd->dirs[dir];
    struct ssd_header h;

    if (ssd_header_read(other_page(d), &h) != SSD_HEADER_OK || h.dir != dir ||
        memcmp(h.uuid, ssd->uuid, 16) != 0)
        return -ENODEV;
    ssd->engine->ops->close(ssd->engine, d->data_file);
    ssd->engine->ops->close(ssd->engine, d->table_file);
    d->data_file = d->new_data_file;
    d->table_file = d->new_table_file;
    d->new_data_file = d->new_table_file = FK_NONE;
    return start_write(ssd, dir);
}

static void come_back(struct fk_ssd *ssd, uint32_t dir)
{
    struct ssd_dir *d = &ssd->dirs[dir];

    d->probe = SSD_PROBE_NONE;
    d->out = false;
    d->data_errors = d->table_errors = 0;
    d->pending_since_us = ssd->now_us;
    ssd->stats.device_returns++;
    fk_info("ssd %s: %s is back in use", ssd->name, d->path);
}

void ssd_device_probe_done(struct ssd_io *x, int32_t status)
{
    struct fk_ssd *ssd = x->ssd;
    struct ssd_dir *d = &ssd->dirs[x->dir];
    int rc = 0;

    if (status == 0 && d->probe == SSD_PROBE_READ &&
        memcmp(header_page(d), other_page(d), SSD_PAGE) != 0)
        status = -EIO;                  /* said to be written, but it was not */
    if (status < 0) {
        reopen(ssd, x->dir, status);
        return;
    }
    switch (d->probe) {
    case SSD_PROBE_WRITE:
        rc = start(ssd, x->dir, SSD_PROBE_READ, d->data_file, FK_IO_READ, other_page(d));
        break;
    case SSD_PROBE_READ:
        rc = start(ssd, x->dir, SSD_PROBE_TABLE, d->table_file, FK_IO_WRITE, header_page(d));
        break;
    case SSD_PROBE_TABLE:
        if (((struct ssd_header *)header_page(d))->epoch == ssd->epoch)
            come_back(ssd, x->dir);
        else                            /* a reset came in between */
            rc = start_write(ssd, x->dir);
        break;
    case SSD_PROBE_REOPENED:
        rc = adopt(ssd, x->dir);
        break;
    case SSD_PROBE_NONE:
        break;
    }
    if (rc < 0)
        give_up(ssd, x->dir, rc);
}

void ssd_device_tick(struct fk_ssd *ssd, uint32_t dir)
{
    struct ssd_dir *d = &ssd->dirs[dir];

    if (!d->out || d->probe != SSD_PROBE_NONE || ssd->now_us < d->retry_at_us)
        return;
    d->reopen_tried = false;
    int rc = start_write(ssd, dir);
    if (rc < 0)
        give_up(ssd, dir, rc);
}
