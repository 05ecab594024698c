/*
 * ssd_internal.h - what the files of the SSD store share: ssd.c (requests), ssd_device.c
 * (directories out and back), ssd_table.c (records), ssd_open.c, ssd_lock.c. All under the
 * rule of ssd.h: one thread, no locks.
 */
#ifndef FK_TIER_SSD_INTERNAL_H
#define FK_TIER_SSD_INTERNAL_H

#include <stdatomic.h>

#include "base/util.h"
#include "tier/ssd.h"
#include "tier/ssd_format.h"

#define SSD_TABLE_DELAY_US 5000         /* a record waits at most this long for company */
#define SSD_TABLE_BATCH 256             /* or until so many have gathered in a directory */

/* --- objects from slabs, never given back before close --- */

struct ssd_pool {
    size_t object_bytes;
    void *free;                         /* linked through the objects' first word */
    FK_VEC(void *) slabs;
};
void *ssd_pool_get(struct ssd_pool *pool);              /* zeroed; NULL: no memory */
void ssd_pool_put(struct ssd_pool *pool, void *object);
void ssd_pool_free(struct ssd_pool *pool);

/* --- requests and their I/Os --- */

struct ssd_request {
    struct ssd_request *next;           /* in a run, then in the done list */
    struct fk_ssd_req req;
    uint64_t checksum;                  /* read: expected; write: of buf */
    uint32_t epoch;
    uint32_t parts;                     /* I/Os not done */
    int32_t status;
    bool alone;                         /* second try, after a read of many failed */
};

enum ssd_io_kind { SSD_IO_DATA, SSD_IO_TABLE, SSD_IO_PROBE, SSD_IO_SYNC, SSD_IO_HINT };

/* One span of bytes of one file; continued here when the engine comes back short. */
struct ssd_io {
    struct fk_io io;                    /* first member */
    struct fk_ssd *ssd;
    enum ssd_io_kind kind;
    uint32_t dir;
    char *buf;
    uint64_t offset;
    uint32_t bytes, done, short_at;
    unsigned retries;
    struct ssd_request *first;          /* DATA: the requests it serves */
    uint32_t part_offset;               /* DATA: where in its (single) request it starts */
    uint32_t batch_first, batch_len;    /* TABLE */
    bool finished;                      /* SYNC */
    int32_t status;                     /* SYNC */
};

/* --- directories --- */

struct ssd_pending {
    uint32_t local;
    uint64_t order;                     /* the larger replaces the smaller */
    struct ssd_record record;           /* all zero: empty */
};

enum ssd_probe_stage {
    SSD_PROBE_NONE, SSD_PROBE_WRITE, SSD_PROBE_READ, SSD_PROBE_TABLE, SSD_PROBE_REOPENED
};

struct ssd_dir {
    char *path, *data_path, *table_path;
    uint32_t data_file, table_file;     /* FK_NONE: not open */
    uint32_t slots;
    struct ssd_lock *lock;
    unsigned inflight;                  /* I/Os of all kinds */
    /* device */
    unsigned data_errors, table_errors; /* in a row */
    bool out;
    uint64_t retry_at_us, retry_us;
    enum ssd_probe_stage probe;
    bool reopen_tried;
    char *probe_pages;                  /* two: written, read back */
    uint32_t new_data_file, new_table_file;
    /* table */
    FK_VEC(struct ssd_pending) pending;
    uint64_t pending_since_us;
    FK_VEC(struct ssd_record) batch;    /* being written; sorted by local, one per slot */
    FK_VEC(struct ssd_pending) batch_of; /* the same with places, for another try */
    unsigned batch_left;                /* I/Os of it not done */
};

struct fk_ssd {
    struct ssd_geometry geometry;
    char name[SSD_NAME_MAX + 1];
    uint8_t fingerprint[16], uuid[16];
    uint32_t record_seed, epoch;
    struct fk_engine *engine;
    bool direct, virtual_dirs;
    uint32_t io_chunk_bytes;
    unsigned device_errors;
    uint64_t device_retry_us;
    uint64_t now_us;                    /* last told */
    uint64_t seq, order;
    _Atomic uint64_t *checksums;        /* by slot; 0: holds nothing that could be read. Others read them too */
    struct ssd_dir dirs[FK_SSD_MAX_DIRS];
    struct ssd_pool requests, ios;
    struct ssd_request *done, **done_tail;
    unsigned requests_inflight, others_inflight;
    char *page, *hint_page;             /* for headers; for the hint; FK_SSD_ALIGN-aligned */
    struct ssd_hint hint;               /* found at open, or set since */
    bool hint_left, hint_busy;          /* to be written; being written, from hint_page */
    bool stuck;                         /* an I/O never came back: memory must stay */
    struct fk_ssd_stats stats;
};

/* --- ssd.c --- */

struct ssd_io *ssd_io_new(struct fk_ssd *ssd, enum ssd_io_kind kind, uint32_t dir);
/* Starts it (after flush). file, op, buf, offset, bytes describe the span. */
void ssd_io_start(struct ssd_io *x, uint32_t file, enum fk_io_op op, void *buf,
                  uint64_t offset, uint32_t bytes);
/* Does one I/O and waits for it, bounded. 0 or -errno. Handles other stores' completions. */
int ssd_io_sync(struct fk_ssd *ssd, uint32_t dir, uint32_t file, enum fk_io_op op, void *buf,
                uint64_t offset, uint32_t bytes);
/* Handles what the engine has finished, whoever's it is; returns how many. */
int ssd_reap(struct fk_ssd *ssd, uint64_t timeout_us);

/* The hint is written, if there is a new one and the device is in use. */
void ssd_hint_tick(struct fk_ssd *ssd);
/* Can it be, now? */
bool ssd_hint_due(const struct fk_ssd *ssd);

/* --- ssd_device.c --- */

/* Counts the outcome of an I/O; takes the directory out after too many errors in a row. */
void ssd_device_result(struct fk_ssd *ssd, uint32_t dir, bool table, int32_t status);
void ssd_device_take_out(struct fk_ssd *ssd, uint32_t dir, int32_t status);
void ssd_device_tick(struct fk_ssd *ssd, uint32_t dir);
void ssd_device_probe_done(struct ssd_io *x, int32_t status);

/* --- ssd_table.c --- */

/* Queues the slot's record: of req with its checksum, or an empty one (req NULL). */
void ssd_table_put(struct fk_ssd *ssd, uint32_t slot, const struct ssd_request *req);
void ssd_table_tick(struct fk_ssd *ssd, uint32_t dir, bool force);
void ssd_table_io_done(struct ssd_io *x, int32_t status);
/* Fills checksums, seq and epoch from the tables. */
int ssd_table_load(struct fk_ssd *ssd);
/* Empties the whole table of one directory. */
int ssd_table_clear(struct fk_ssd *ssd, uint32_t dir);

/* --- ssd_open.c --- */

void ssd_header_of(const struct fk_ssd *ssd, uint32_t dir, bool complete,
                   struct ssd_header *h);
/* Writes the copy, then the header. 0 if the header is in place. */
int ssd_header_write(struct fk_ssd *ssd, uint32_t dir, bool complete);

/* --- ssd_lock.c --- */

/*
 * One node per directory. Spaces of one node (same owner, other name) share the lock; in
 * other processes and for other owners: -EBUSY, *pid the holder's or 0 if unknown.
 */
int ssd_lock_acquire(const char *dir, const void *owner, const char *name,
                     struct ssd_lock **out, int *pid);
void ssd_lock_release(struct ssd_lock *lock);

#endif
