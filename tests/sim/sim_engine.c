/* sim_engine.c - see sim_engine.h. One thread, no system calls. */
#include "sim_engine.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/util.h"

#define SECTOR 512u
#define DIRTY_MAX 4096u
#define SLOTS_FROM (1024u * 1024)     /* where the store's slots begin: rot hits only these */

struct pending {
    struct fk_io *io;
    uint64_t due;
    enum sim_fault fault;       /* SIM_FAULTS: none */
};

struct sim_engine {
    struct fk_engine base;
    struct sim_disk *disk;
    const struct sim_disk_faults *faults;
    uint64_t *now_us;
    uint64_t rng;
    uint64_t hits;
    bool dead, woken;
    FK_VEC(struct pending) queue;
};

/* ---- disks ------------------------------------------------------------------------------ */

void sim_disk_init(struct sim_disk *d, const char *base, unsigned n_dirs, bool power_loss)
{
    memset(d, 0, sizeof(*d));
    d->n_dirs = n_dirs;
    d->power_loss = power_loss;
    for (unsigned i = 0; i < n_dirs; i++)
        snprintf(d->dir_path[i], sizeof(d->dir_path[i]), "%s/d%u", base, i);
}

static void file_free(struct sim_file *f)
{
    free(f->image);
    free(f->medium);
    free(f->dirty);
    free(f->dirty_list);
    f->image = f->medium = f->dirty = NULL;
    f->dirty_list = NULL;
    f->bytes = 0;
    f->n_dirty = 0;
    f->exists = false;
}

void sim_disk_free(struct sim_disk *d)
{
    for (uint32_t i = 0; i < d->n_files; i++)
        file_free(&d->files[i]);
    d->n_files = 0;
}

static void *grow(void *p, uint64_t old_bytes, uint64_t bytes)
{
    uint8_t *n = calloc(1, bytes ? bytes : 1);

    if (!n)
        abort();
    if (p)
        memcpy(n, p, fk_min(old_bytes, bytes));
    free(p);
    return n;
}

static void file_resize(struct sim_disk *d, struct sim_file *f, uint64_t bytes)
{
    uint64_t sectors = fk_div_up(bytes, SECTOR);

    if (bytes <= f->bytes)
        return;
    f->image = grow(f->image, f->bytes, bytes);
    if (d->power_loss) {
        f->medium = grow(f->medium, f->bytes, bytes);
        f->dirty = grow(f->dirty, fk_div_up(f->bytes, SECTOR), sectors);
        if (!f->dirty_list)
            f->dirty_list = grow(NULL, 0, DIRTY_MAX * sizeof(uint32_t));
    }
    f->bytes = bytes;
}

static void sector_settle(struct sim_file *f, uint32_t s, bool keep_new)
{
    uint64_t off = (uint64_t)s * SECTOR, n = fk_min((uint64_t)SECTOR, f->bytes - off);

    if (keep_new)
        memcpy(f->medium + off, f->image + off, n);
    else
        memcpy(f->image + off, f->medium + off, n);
    f->dirty[s] = 0;
}

static void file_mark_dirty(struct sim_file *f, uint64_t off, uint64_t n, uint64_t *rng)
{
    if (!f->medium || !n)
        return;
    for (uint64_t s = off / SECTOR; s <= (off + n - 1) / SECTOR; s++) {
        if (f->dirty[s])
            continue;
        if (f->n_dirty == DIRTY_MAX) {      /* the kernel writes some back */
            uint32_t k = fk_rng_below(rng, f->n_dirty);
            sector_settle(f, f->dirty_list[k], true);
            f->dirty_list[k] = f->dirty_list[--f->n_dirty];
        }
        f->dirty[s] = 1;
        f->dirty_list[f->n_dirty++] = (uint32_t)s;
    }
    if (fk_rng_below(rng, 64) == 0) {
        while (f->n_dirty)
            sector_settle(f, f->dirty_list[--f->n_dirty], true);
    }
}

void sim_disk_power_loss(struct sim_disk *d, uint64_t *rng)
{
    for (uint32_t i = 0; i < d->n_files; i++) {
        struct sim_file *f = &d->files[i];
        if (!f->medium)
            continue;
        uint32_t keep = fk_rng_below(rng, 101);     /* per cent of the dirty sectors */
        while (f->n_dirty)
            sector_settle(f, f->dirty_list[--f->n_dirty], fk_rng_below(rng, 100) < keep);
    }
}

void sim_disk_wipe_dir(struct sim_disk *d, unsigned dir, uint64_t *rng)
{
    bool zero = fk_rng_below(rng, 2);       /* or gone altogether */

    for (uint32_t i = 0; i < d->n_files; i++) {
        struct sim_file *f = &d->files[i];
        if (f->dir != dir || !f->exists)
            continue;
        memset(f->image, 0, f->bytes);
        file_mark_dirty(f, 0, f->bytes, rng);
        if (!zero)
            file_free(f);
    }
}

bool sim_disk_rot(struct sim_disk *d, bool tables, uint64_t *rng)
{
    if (!d->n_files)
        return false;
    struct sim_file *f = &d->files[fk_rng_below(rng, d->n_files)];
    if (!f->exists || !f->bytes || (f->table && !tables))
        return false;
    uint64_t skip = !f->table && f->bytes > SLOTS_FROM ? SLOTS_FROM : 0;
    uint64_t off = skip + fk_rng_below(rng, (uint32_t)(f->bytes - skip));
    f->image[off] ^= (uint8_t)(1u << fk_rng_below(rng, 8));
    file_mark_dirty(f, off, 1, rng);
    return true;
}

struct sim_file *sim_disk_find(struct sim_disk *d, const char *path)
{
    for (uint32_t i = 0; i < d->n_files; i++)
        if (strcmp(d->files[i].path, path) == 0)
            return &d->files[i];
    return NULL;
}

/* ---- the vtable ---------------------------------------------------------------------------- */

static int dir_of_path(const struct sim_disk *d, const char *path)
{
    for (unsigned i = 0; i < d->n_dirs; i++) {
        size_t n = strlen(d->dir_path[i]);
        if (strncmp(path, d->dir_path[i], n) == 0 && path[n] == '/')
            return (int)i;
    }
    return -1;
}

static int eng_open(struct fk_engine *base, const char *path, uint64_t bytes, unsigned flags,
                    uint32_t *file, bool *created)
{
    struct sim_engine *e = (struct sim_engine *)base;
    struct sim_disk *d = e->disk;
    int dir = dir_of_path(d, path);
    struct sim_file *f = sim_disk_find(d, path);

    if (dir < 0 || e->dead || d->dir_gone[dir])
        return -EIO;
    if (created)
        *created = false;
    if (!f || !f->exists) {
        if (!(flags & FK_FILE_CREATE))
            return -ENOENT;
        if (!f) {
            if (d->n_files == SIM_DISK_FILES)
                return -ENFILE;
            f = &d->files[d->n_files++];
            memset(f, 0, sizeof(*f));
            snprintf(f->path, sizeof(f->path), "%s", path);
            f->dir = (unsigned)dir;
            f->table = strstr(path, ".data") == NULL;
        }
        f->exists = true;
        if (created)
            *created = true;
    }
    if (flags & FK_FILE_PREALLOC)
        file_resize(d, f, bytes);
    *file = (uint32_t)(f - d->files);
    return 0;
}

static void eng_close(struct fk_engine *base, uint32_t file)
{
}

static int eng_size(struct fk_engine *base, uint32_t file, uint64_t *bytes)
{
    struct sim_engine *e = (struct sim_engine *)base;

    if (e->dead || e->disk->dir_gone[e->disk->files[file].dir])
        return -EIO;
    *bytes = e->disk->files[file].bytes;
    return 0;
}

static int eng_register_memory(struct fk_engine *base, void *mem, uint64_t bytes)
{
    return 0;
}

static bool fault_fits(enum sim_fault fault, enum fk_io_op op)
{
    switch (fault) {
    case SIM_READ_ERROR: case SIM_READ_SHORT: case SIM_READ_FLIP: case SIM_READ_MISDIRECT:
        return op == FK_IO_READ;
    case SIM_DELAY: case SIM_FAULTS:
        return true;
    default:
        return op == FK_IO_WRITE;
    }
}

static enum sim_fault draw_fault(struct sim_engine *e, const struct fk_io *io)
{
    if (e->disk->files[io->file].table && !e->faults->tables)
        return SIM_FAULTS;
    for (unsigned i = 0; i < SIM_FAULTS; i++) {
        if (e->faults->ppm[i] && fault_fits((enum sim_fault)i, io->op) &&
            fk_rng_below(&e->rng, 1000000) < e->faults->ppm[i]) {
            e->hits++;
            return (enum sim_fault)i;
        }
    }
    return SIM_FAULTS;
}

static void eng_submit(struct fk_engine *base, struct fk_io *io)
{
    struct sim_engine *e = (struct sim_engine *)base;
    const struct sim_disk_faults *f = e->faults;
    struct pending p = { .io = io, .fault = draw_fault(e, io), .due = *e->now_us };

    if (!e->dead) {
        p.due += f->min_us + fk_rng_below(&e->rng, (uint32_t)(f->max_us - f->min_us + 1));
        if (p.fault == SIM_DELAY)
            p.due += fk_rng_below(&e->rng, (uint32_t)f->slow_us + 1);
    }
    if (fk_vec_push(&e->queue, p))
        abort();
}

static void eng_flush(struct fk_engine *base)
{
}

/* Writes some of the sectors of an I/O: a leading part, or any subset. */
static void apply_torn(struct sim_engine *e, struct sim_file *f, const struct fk_io *io)
{
    uint32_t grain = fk_rng_below(&e->rng, 2) ? SECTOR : 4096;
    bool leading = fk_rng_below(&e->rng, 2);
    uint32_t pieces = (uint32_t)fk_div_up(io->bytes, grain);
    uint32_t cut = fk_rng_below(&e->rng, pieces + 1);

    for (uint32_t i = 0; i < pieces; i++) {
        uint32_t off = i * grain, n = fk_min(grain, io->bytes - off);
        if (leading ? i >= cut : fk_rng_below(&e->rng, 2))
            continue;
        memcpy(f->image + io->offset + off, (char *)io->buf + off, n);
        file_mark_dirty(f, io->offset + off, n, &e->rng);
    }
}

static void apply_write_at(struct sim_engine *e, struct sim_file *f, const struct fk_io *io,
                           uint64_t offset, uint32_t n)
{
    memcpy(f->image + offset, io->buf, n);
    file_mark_dirty(f, offset, n, &e->rng);
}

static uint64_t wrong_offset(struct sim_engine *e, const struct sim_file *f,
                             const struct fk_io *io)
{
    uint64_t room = f->bytes > io->bytes ? (f->bytes - io->bytes) / 4096 : 0;
    uint64_t near = io->offset / 4096 + 1 + fk_rng_below(&e->rng, 4);

    if (near <= room && fk_rng_below(&e->rng, 2))
        return near * 4096;
    return fk_rng_below(&e->rng, (uint32_t)room + 1) * 4096ull;
}

/* A part that ends at a sector, or anywhere. */
static uint32_t short_bytes(struct sim_engine *e, uint32_t bytes)
{
    uint32_t n = fk_rng_below(&e->rng, bytes);

    return fk_rng_below(&e->rng, 2) ? n : n / SECTOR * SECTOR;
}

static int32_t do_write(struct sim_engine *e, struct sim_file *f, const struct fk_io *io,
                        enum sim_fault fault)
{
    uint32_t n = io->bytes;

    switch (fault) {
    case SIM_WRITE_ERROR: case SIM_ENOSPC:
        if (fk_rng_below(&e->rng, 2))
            apply_torn(e, f, io);
        return fault == SIM_ENOSPC ? -ENOSPC : -EIO;
    case SIM_WRITE_TORN:
        apply_torn(e, f, io);
        return (int32_t)n;
    case SIM_WRITE_LOST:
        return (int32_t)n;
    case SIM_WRITE_MISDIRECT:
        apply_write_at(e, f, io, wrong_offset(e, f, io), n);
        return (int32_t)n;
    case SIM_WRITE_SHORT:
        n = short_bytes(e, n);
        break;
    default:
        break;
    }
    apply_write_at(e, f, io, io->offset, n);
    return (int32_t)n;
}

static int32_t do_read(struct sim_engine *e, struct sim_file *f, const struct fk_io *io,
                       enum sim_fault fault)
{
    uint64_t offset = io->offset;
    uint32_t n = offset < f->bytes ? (uint32_t)fk_min((uint64_t)io->bytes, f->bytes - offset) : 0;

    if (fault == SIM_READ_ERROR)
        return -EIO;
    if (fault == SIM_READ_SHORT && n)
        n = short_bytes(e, n);
    if (fault == SIM_READ_MISDIRECT) {
        offset = wrong_offset(e, f, io);
        n = (uint32_t)fk_min((uint64_t)n, f->bytes - offset);
    }
    memcpy(io->buf, f->image + offset, n);
    if (fault == SIM_READ_FLIP && n)
        ((uint8_t *)io->buf)[fk_rng_below(&e->rng, n)] ^= (uint8_t)(1u << fk_rng_below(&e->rng, 8));
    return (int32_t)n;
}

/* Takes effect now, and sets the result. */
static void perform(struct sim_engine *e, struct pending *p)
{
    struct fk_io *io = p->io;
    struct sim_file *f = &e->disk->files[io->file];

    if (e->dead || e->disk->dir_gone[f->dir] || !f->exists) {
        io->result = -EIO;
        return;
    }
    if (io->op == FK_IO_WRITE) {
        file_resize(e->disk, f, io->offset + io->bytes);
        io->result = do_write(e, f, io, p->fault);
    } else {
        io->result = do_read(e, f, io, p->fault);
    }
}

uint64_t sim_engine_next_due(const struct sim_engine *e)
{
    uint64_t due = UINT64_MAX;

    for (size_t i = 0; i < e->queue.len; i++)
        due = fk_min(due, e->queue.data[i].due);
    return due;
}

static int eng_reap(struct fk_engine *base, struct fk_io **out, int max, uint64_t timeout_us)
{
    struct sim_engine *e = (struct sim_engine *)base;
    uint64_t next = timeout_us ? sim_engine_next_due(e) : 0;
    int n = 0;

    if (timeout_us && next > *e->now_us && !e->woken)
        *e->now_us = fk_min(next, *e->now_us + timeout_us);
    e->woken = false;
    size_t start = e->queue.len ? fk_rng_below(&e->rng, (uint32_t)e->queue.len) : 0;
    for (size_t seen = 0, len = e->queue.len; seen < len && n < max && e->queue.len; seen++) {
        size_t i = (start + seen) % e->queue.len;
        if (e->queue.data[i].due > *e->now_us)
            continue;
        struct pending p = e->queue.data[i];
        e->queue.data[i] = e->queue.data[--e->queue.len];
        perform(e, &p);
        out[n++] = p.io;
    }
    return n;
}

static void eng_wake(struct fk_engine *base)
{
    ((struct sim_engine *)base)->woken = true;
}

static unsigned eng_inflight(struct fk_engine *base)
{
    return (unsigned)((struct sim_engine *)base)->queue.len;
}

static void eng_destroy(struct fk_engine *base)
{
    struct sim_engine *e = (struct sim_engine *)base;

    fk_vec_free(&e->queue);
    free(e);
}

static const struct fk_engine_ops sim_ops = {
    .name = "sim", .open = eng_open, .close = eng_close, .size = eng_size,
    .register_memory = eng_register_memory, .submit = eng_submit, .flush = eng_flush,
    .reap = eng_reap, .wake = eng_wake, .inflight = eng_inflight, .destroy = eng_destroy,
};

struct sim_engine *sim_engine_create(struct sim_disk *d, const struct sim_disk_faults *faults,
                                     uint64_t *now_us, uint64_t seed)
{
    struct sim_engine *e = calloc(1, sizeof(*e));

    if (!e)
        abort();
    e->base.ops = &sim_ops;
    e->disk = d;
    e->faults = faults;
    e->now_us = now_us;
    e->rng = seed;
    return e;
}

struct fk_engine *sim_engine_base(struct sim_engine *e)
{
    return &e->base;
}

uint64_t sim_engine_faults_hit(const struct sim_engine *e)
{
    return e->hits;
}

void sim_engine_kill(struct sim_engine *e)
{
    for (size_t i = 0; i < e->queue.len; i++) {
        struct pending *p = &e->queue.data[i];
        struct sim_file *f = &e->disk->files[p->io->file];
        if (p->io->op == FK_IO_WRITE && f->exists && !e->disk->dir_gone[f->dir]) {
            uint32_t fate = fk_rng_below(&e->rng, 3);
            file_resize(e->disk, f, p->io->offset + p->io->bytes);
            if (fate == 0)
                apply_torn(e, f, p->io);
            else if (fate == 1)
                do_write(e, f, p->io, p->fault);
        }
        p->due = 0;
    }
    e->dead = true;
}
