/*
 * ssd_fsck.c - checks a store off line: headers, records, parents, duplicates, data. Reads
 * and writes the files directly, under the directories' locks. Called by `flexkv fsck`; any
 * thread, one run at a time per directory.
 *
 * Findings: bad headers, bad records, duplicates, orphans, bad data. With repair the header
 * is written anew from its copy (or the other way round) and the records are emptied; blocks
 * whose parent goes thereby go with it. Records of an older epoch are what a reset leaves,
 * no finding.
 */
#include <dirent.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>

#include "tier/engine.h"
#include "tier/engine_file.h"
#include "tier/ssd_internal.h"

#define PIECE_RECORDS 16384u

struct entry {
    struct ssd_record record;
    uint32_t slot;
    bool drop;                          /* a duplicate, or its data are bad */
    uint8_t walk;                       /* enum walk */
};

enum walk { UNKNOWN, ON_PATH, ROOTED, ORPHAN };

struct file_pair {
    int table, data;                    /* -1: not open */
};

struct fsck {
    const char *const *dirs;
    uint32_t n_dirs;
    const char *name;
    bool read_data, repair;
    void (*report)(void *arg, const char *line);
    void *arg;
    struct fk_ssd_fsck *out;
    struct file_pair files[FK_SSD_MAX_DIRS];
    struct ssd_lock *locks[FK_SSD_MAX_DIRS];
    struct ssd_header header;           /* of the store */
    struct ssd_geometry geometry;
    uint32_t seed, epoch;
    FK_VEC(struct entry) entries;       /* valid ones, in slot order */
};

__attribute__((format(printf, 2, 3)))
static void say(const struct fsck *f, const char *fmt, ...)
{
    char line[1024];
    va_list ap;

    va_start(ap, fmt);
    vsnprintf(line, sizeof(line), fmt, ap);
    va_end(ap);
    if (f->report)
        f->report(f->arg, line);
}

/* Reads or writes all of it; -EIO when the file ends before. */
static int transfer(int fd, bool write, void *buf, uint64_t bytes, uint64_t offset)
{
    char *at = buf;

    while (bytes > 0) {
        ssize_t n = write ? pwrite(fd, at, bytes, (off_t)offset)
                          : pread(fd, at, bytes, (off_t)offset);

        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return n < 0 ? -errno : -EIO;
        at += n;
        offset += (uint64_t)n;
        bytes -= (uint64_t)n;
    }
    return 0;
}

/* --- headers --- */

static enum ssd_header_state read_header(int fd, struct ssd_header *h)
{
    char page[SSD_PAGE];

    if (fd < 0 || transfer(fd, false, page, sizeof(page), 0) < 0)
        return SSD_HEADER_BLANK;
    return ssd_header_read(page, h);
}

static int write_header(int fd, const struct ssd_header *h)
{
    char page[SSD_PAGE] = { 0 };

    memcpy(page, h, sizeof(*h));
    return transfer(fd, true, page, sizeof(page), 0);
}

/* One bad copy is mended from the good one, or from a header known to be right (known). */
static int mend_header(struct fsck *f, uint32_t dir, bool of_table, const struct ssd_header *good)
{
    f->out->bad_header++;
    say(f, "%s/%s.%s: header torn or lost", f->dirs[dir], f->name, of_table ? "table" : "data");
    if (!f->repair)
        return 0;
    int rc = write_header(of_table ? f->files[dir].table : f->files[dir].data, good);
    f->out->repaired += rc == 0;
    return rc;
}

static int check_dir_header(struct fsck *f, uint32_t dir)
{
    struct ssd_header table, copy, *good = &table;
    enum ssd_header_state t = read_header(f->files[dir].table, &table);
    enum ssd_header_state c = read_header(f->files[dir].data, &copy);

    if (t != SSD_HEADER_OK && c != SSD_HEADER_OK) {
        bool other = t == SSD_HEADER_BYTE_ORDER || t == SSD_HEADER_VERSION;

        say(f, "%s/%s: %s", f->dirs[dir], f->name,
            other ? "written by another version or on a machine of the other byte order"
                  : "no header is left; the next start makes the store anew");
        return -EEXIST;
    }
    if (t != SSD_HEADER_OK)
        good = &copy;
    if (dir == 0)
        f->header = *good;
    if (good->dir != dir || memcmp(good->uuid, f->header.uuid, 16) != 0 ||
        good->n_dirs != f->header.n_dirs || good->n_slots != f->header.n_slots ||
        good->block_bytes != f->header.block_bytes ||
        good->stripe_slots != f->header.stripe_slots) {
        say(f, "%s: is directory %u of store %s%s; give all directories, in their order",
            f->dirs[dir], good->dir + 1, f->name,
            memcmp(good->uuid, f->header.uuid, 16) ? ", another one" : "");
        return -EINVAL;
    }
    f->epoch = fk_max(f->epoch, good->epoch);
    int rc = t == SSD_HEADER_OK ? 0 : mend_header(f, dir, true, good);
    if (rc == 0 && c != SSD_HEADER_OK)
        rc = mend_header(f, dir, false, good);
    return rc;
}

static int check_headers(struct fsck *f)
{
    int rc = 0;

    for (uint32_t i = 0; i < f->n_dirs && rc == 0; i++)
        rc = check_dir_header(f, i);
    if (rc == 0 && f->header.n_dirs != f->n_dirs) {
        say(f, "store %s spans %u directories, %u given; give all, in their order", f->name,
            f->header.n_dirs, f->n_dirs);
        rc = -EINVAL;
    }
    ssd_header_geometry(&f->header, &f->geometry);
    f->seed = ssd_record_seed(f->header.uuid);
    return rc;
}

/* --- records --- */

static int empty_record(struct fsck *f, uint32_t slot)
{
    static const struct ssd_record none;
    uint32_t dir = ssd_geometry_dir(&f->geometry, slot);

    if (!f->repair)
        return 0;
    int rc = transfer(f->files[dir].table, true, (void *)(uintptr_t)&none, sizeof(none),
                      ssd_table_offset(ssd_geometry_local(&f->geometry, slot)));
    f->out->repaired += rc == 0;
    return rc;
}

static int take_record(struct fsck *f, uint32_t slot, const struct ssd_record *r)
{
    struct entry e = { .record = *r, .slot = slot };

    f->out->slots++;
    switch (ssd_record_check(r, f->seed, slot, f->geometry.block_bytes)) {
    case SSD_RECORD_EMPTY:
        f->out->empty++;
        return 0;
    case SSD_RECORD_BAD:
        f->out->bad_record++;
        say(f, "slot %u: record torn", slot);
        return empty_record(f, slot);
    case SSD_RECORD_OK:
        break;
    }
    f->epoch = fk_max(f->epoch, r->epoch);
    return fk_vec_push(&f->entries, e);
}

static int read_table(struct fsck *f, uint32_t dir)
{
    uint32_t slots = ssd_geometry_dir_slots(&f->geometry, dir);
    fk_autofree struct ssd_record *piece = malloc(PIECE_RECORDS * sizeof(*piece));
    int rc = piece ? 0 : -ENOMEM;

    for (uint32_t at = 0; rc == 0 && at < slots; at += PIECE_RECORDS) {
        uint32_t n = fk_min(PIECE_RECORDS, slots - at);

        rc = transfer(f->files[dir].table, false, piece, n * sizeof(*piece),
                      ssd_table_offset(at));
        if (rc < 0)
            say(f, "%s/%s.table: %s", f->dirs[dir], f->name,
                rc == -EIO ? "too short or not readable" : strerror(-rc));
        for (uint32_t i = 0; rc == 0 && i < n; i++)
            rc = take_record(f, (uint32_t)ssd_geometry_slot(&f->geometry, dir, at + i),
                             &piece[i]);
    }
    return rc;
}

/* Entries of older epochs are set aside: a reset left them. */
static void drop_old(struct fsck *f)
{
    size_t n = 0;

    for (size_t i = 0; i < f->entries.len; i++) {
        if (f->entries.data[i].record.epoch == f->epoch)
            f->entries.data[n++] = f->entries.data[i];
        else
            f->out->old_epoch++;
    }
    f->entries.len = n;
}

/* --- relations: entries sorted by key, the newest of equal keys first --- */

static int by_key(const void *a, const void *b)
{
    const struct ssd_record *x = &((const struct entry *)a)->record;
    const struct ssd_record *y = &((const struct entry *)b)->record;

    if (x->key.hi != y->key.hi)
        return x->key.hi < y->key.hi ? -1 : 1;
    if (x->key.lo != y->key.lo)
        return x->key.lo < y->key.lo ? -1 : 1;
    return x->seq > y->seq ? -1 : x->seq < y->seq;
}

static struct entry *find_key(struct fsck *f, struct fk_key key)
{
    size_t lo = 0, hi = f->entries.len;

    while (lo < hi) {
        size_t mid = (lo + hi) / 2;
        struct fk_key k = f->entries.data[mid].record.key;

        if (k.hi < key.hi || (k.hi == key.hi && k.lo < key.lo))
            lo = mid + 1;
        else
            hi = mid;
    }
    if (lo == f->entries.len || !fk_key_equal(f->entries.data[lo].record.key, key))
        return NULL;
    return &f->entries.data[lo];        /* the newest */
}

static int drop(struct fsck *f, struct entry *e)
{
    e->drop = true;
    return empty_record(f, e->slot);
}

static int check_duplicates(struct fsck *f)
{
    int rc = 0;

    for (size_t i = 1; i < f->entries.len && rc == 0; i++) {
        struct entry *e = &f->entries.data[i], *newer = e - 1;

        if (!fk_key_equal(e->record.key, newer->record.key))
            continue;
        f->out->duplicate++;
        say(f, "slot %u: same block as in slot %u, which is newer", e->slot, newer->slot);
        rc = drop(f, e);
    }
    return rc;
}

static int check_data(struct fsck *f)
{
    fk_autofree char *buf = malloc(f->geometry.block_bytes);
    int rc = buf ? 0 : -ENOMEM;

    for (size_t i = 0; i < f->entries.len && rc == 0; i++) {
        struct entry *e = &f->entries.data[i];
        uint32_t dir = ssd_geometry_dir(&f->geometry, e->slot);
        uint32_t local = ssd_geometry_local(&f->geometry, e->slot);

        if (e->drop)
            continue;
        int err = transfer(f->files[dir].data, false, buf, f->geometry.block_bytes,
                           ssd_data_offset(&f->geometry, local));
        if (err == 0 && ssd_data_checksum(e->record.key, buf, f->geometry.block_bytes) ==
                            e->record.checksum)
            continue;
        f->out->bad_data++;
        say(f, "slot %u: %s", e->slot, err ? strerror(-err) : "data do not match the checksum");
        rc = drop(f, e);
    }
    return rc;
}

/* The parent's entry; NULL: a dropped or missing one, or itself. */
static struct entry *parent_of(struct fsck *f, const struct entry *e)
{
    struct entry *p = find_key(f, e->record.parent);

    return p && !p->drop && p != e ? p : NULL;
}

/*
 * Follows one chain up to where it is known to be rooted or not, then marks all of it. Each
 * entry is walked once. A ring of parents, which no put makes, has no root either.
 */
static int walk_chain(struct fsck *f, struct entry *e, uint32_t *path)
{
    bool rooted = true;
    uint32_t n = 0;
    int rc = 0;

    for (; e->walk == UNKNOWN; n++) {
        e->walk = ON_PATH;
        path[n] = (uint32_t)(e - f->entries.data);
        if (fk_key_is_zero(e->record.parent)) {
            e->walk = ROOTED;
            continue;
        }
        struct entry *parent = parent_of(f, e);
        if (!parent) {
            rooted = false;
            n++;
            break;
        }
        e = parent;
    }
    rooted = rooted && e->walk == ROOTED;
    for (uint32_t i = 0; i < n && rc == 0; i++) {
        e = &f->entries.data[path[i]];
        e->walk = rooted ? ROOTED : ORPHAN;
        if (rooted)
            continue;
        f->out->orphan++;
        say(f, "slot %u: its chain of parents is not in the store", e->slot);
        rc = empty_record(f, e->slot);
    }
    return rc;
}

static int check_orphans(struct fsck *f)
{
    fk_autofree uint32_t *path = malloc((f->entries.len + 1) * sizeof(*path));
    int rc = path ? 0 : -ENOMEM;

    for (size_t i = 0; i < f->entries.len && rc == 0; i++) {
        if (!f->entries.data[i].drop)
            rc = walk_chain(f, &f->entries.data[i], path);
    }
    return rc;
}

/* --- the run --- */

static int open_pair(struct fsck *f, uint32_t dir)
{
    const int flags = (f->repair ? O_RDWR : O_RDONLY) | O_CLOEXEC;
    fk_autofree char *table = NULL, *data = NULL;

    if (asprintf(&table, "%s/%s.table", f->dirs[dir], f->name) < 0)
        return -ENOMEM;
    if (asprintf(&data, "%s/%s.data", f->dirs[dir], f->name) < 0)
        return -ENOMEM;
    f->files[dir].table = open(table, flags);
    if (f->files[dir].table < 0) {
        int rc = -errno;

        say(f, "%s: %s", table, strerror(errno));
        return rc;
    }
    f->files[dir].data = open(data, flags);
    if (f->files[dir].data < 0) {
        int rc = -errno;

        say(f, "%s: %s", data, strerror(errno));
        return rc;
    }
    return 0;
}

static int check_store(struct fsck *f)
{
    int rc = 0;

    for (uint32_t i = 0; i < FK_SSD_MAX_DIRS; i++)
        f->files[i] = (struct file_pair){ -1, -1 };
    for (uint32_t i = 0; i < f->n_dirs && rc == 0; i++)
        rc = open_pair(f, i);
    if (rc == 0)
        rc = check_headers(f);
    for (uint32_t i = 0; i < f->n_dirs && rc == 0; i++)
        rc = read_table(f, i);
    if (rc == 0) {
        drop_old(f);
        qsort(f->entries.data, f->entries.len, sizeof(*f->entries.data), by_key);
        rc = check_duplicates(f);
    }
    if (rc == 0 && f->read_data)
        rc = check_data(f);
    if (rc == 0)
        rc = check_orphans(f);
    for (size_t i = 0; i < f->entries.len; i++)
        f->out->valid += f->entries.data[i].walk == ROOTED;
    for (uint32_t i = 0; i < f->n_dirs; i++) {
        if (f->files[i].table >= 0)
            close(f->files[i].table);
        if (f->files[i].data >= 0)
            close(f->files[i].data);
    }
    fk_vec_free(&f->entries);
    return rc;
}

static int lock_all(struct fsck *f)
{
    int rc = 0, pid = 0;

    for (uint32_t i = 0; i < f->n_dirs && rc == 0; i++) {
        rc = ssd_lock_acquire(f->dirs[i], f, "fsck", &f->locks[i], &pid);
        if (rc == -EBUSY)
            say(f, "%s is in use by process %d; stop it first", f->dirs[i], pid);
        else if (rc < 0)
            say(f, "%s: %s", f->dirs[i], strerror(-rc));
    }
    return rc;
}

/* All names of which there is a table in the first directory. */
static int check_all(struct fsck *f)
{
    DIR *dir = opendir(f->dirs[0]);
    struct dirent *d;
    int rc = 0, stores = 0;

    if (!dir)
        return -errno;
    while (rc == 0 && (d = readdir(dir))) {
        size_t len = strlen(d->d_name);
        char name[256];

        if (len <= 6 || strcmp(d->d_name + len - 6, ".table") != 0)
            continue;
        snprintf(name, sizeof(name), "%.*s", (int)(len - 6), d->d_name);
        f->name = name;
        f->epoch = 0;
        say(f, "store %s", name);
        rc = check_store(f);
        stores++;
    }
    closedir(dir);
    if (stores == 0) {
        say(f, "%s: no store here", f->dirs[0]);
        return -ENOENT;
    }
    return rc;
}

int fk_ssd_fsck_run(const char *const *dirs, uint32_t n_dirs, const char *name, bool read_data,
                    bool repair, void (*report)(void *arg, const char *line), void *arg,
                    struct fk_ssd_fsck *out)
{
    struct fsck *f = calloc(1, sizeof(*f));

    memset(out, 0, sizeof(*out));
    if (!f)
        return -ENOMEM;
    *f = (struct fsck){ .dirs = dirs, .n_dirs = n_dirs, .name = name, .read_data = read_data,
                        .repair = repair, .report = report, .arg = arg, .out = out };
    int rc = n_dirs == 0 || n_dirs > FK_SSD_MAX_DIRS ? -EINVAL : lock_all(f);
    if (rc == 0)
        rc = name ? check_store(f) : check_all(f);
    for (uint32_t i = 0; i < n_dirs && i < FK_SSD_MAX_DIRS; i++)
        ssd_lock_release(f->locks[i]);
    free(f);
    return rc;
}
