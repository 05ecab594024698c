/*
 * ssd.h - the SSD tier of one space: slots in preallocated files, striped over directories,
 * and a slot table beside the data that survives restarts. All I/O goes through an engine
 * (engine.h), so the same code runs over io_uring, threads, injected faults and the
 * simulator. Which block is in which slot is the index's business: this room is told a
 * slot and a key, checks bytes, and keeps the table.
 *
 * Owned by one thread (the node's I/O thread); no locks. Time is passed in.
 *
 * Files in each directory, NAME being the space's name:
 *   NAME.data    slots, FK_SSD_ALIGN-aligned, O_DIRECT
 *   NAME.table   4 KiB header, then one 64-byte record per slot of this directory
 *   flexkv.lock  fcntl lock: one node (engine) per directory; a forked child does not hold it
 *
 * The life of a slot: data written -> write completes -> record written (batched, merged
 * with its neighbours, after the data; no fsync: the checksum decides at read time).
 * A read gives the bytes whose checksum, seeded with the key, stands in the record; else
 * -EBADMSG. Memory: 8 bytes (checksum) per slot, plus the records not yet written.
 * Format, and what survives what: docs/ssd.md.
 */
#ifndef FK_TIER_SSD_H
#define FK_TIER_SSD_H

#include "base/key.h"
#include "tier/engine.h"

#define FK_SSD_ALIGN 4096u
#define FK_SSD_MAX_DIRS 32

struct fk_ssd_params {
    const char *name;               /* [A-Za-z0-9_.-]{1,63} */
    const char *const *dirs;
    uint32_t n_dirs;
    uint64_t block_bytes;           /* payload; a slot is this rounded up to FK_SSD_ALIGN */
    uint32_t n_slots;               /* over all directories */
    uint8_t fingerprint[16];        /* of the space, incl. key scheme: must match the store */
    bool recreate;                  /* replace a store that does not match, instead of -EEXIST */
    bool direct;                    /* O_DIRECT for data */
    bool virtual_dirs;              /* the engine's own, not of this machine (simulator): they
                                       are not made, locked or unlinked */
    uint32_t io_chunk_bytes;        /* largest single I/O; runs of slots are merged up to it */
    uint32_t stripe_slots;          /* slots in a row on one directory; 0: as many as 4 MiB hold */
    uint32_t device_errors;         /* consecutive errors that take a directory out */
    uint64_t device_retry_us;       /* then tried again after this long, doubling up to 32x */
    struct fk_engine *engine;       /* borrowed */
};

struct fk_ssd;

/*
 * Opens or creates the store. On failure writes a message that names directory, setting and
 * what to do. -EEXIST: a store of other geometry, version or byte order. -EBUSY: another
 * node has the directory (message names its pid). -ENOSPC, -EACCES, ...
 * A torn or zeroed table, or one left by kill -9, is never refused: bad records are empty ones.
 */
int fk_ssd_open(const struct fk_ssd_params *params, struct fk_ssd **out,
                char *error, size_t error_bytes);
/* Writes what is pending (bounded wait), closes, unlocks. */
void fk_ssd_close(struct fk_ssd *ssd);

/* --- restart --- */
struct fk_ssd_found {
    uint32_t slot;
    struct fk_key key, parent;      /* parent zero: first block of a chain */
    uint64_t seq;                   /* write order over the whole store: larger is newer */
    uint32_t tag;                   /* as given with the write */
};
/* Calls found() for each valid record, in slot order. Reads tables in large pieces. */
int fk_ssd_recover(struct fk_ssd *ssd, void (*found)(void *arg, const struct fk_ssd_found *f),
                   void *arg);

/* --- requests --- */
struct fk_ssd_req {
    enum fk_io_op op;
    uint32_t slot;
    void *buf;                      /* block_bytes readable/writable, FK_SSD_ALIGN-aligned; the
                                       room behind it up to the slot size belongs to it too */
    struct fk_key key, parent;      /* parent, tag: writes only */
    uint32_t tag;
    uint64_t id;                    /* the caller's, comes back */
};
struct fk_ssd_done {
    uint64_t id;
    int32_t status;                 /* 0; -EBADMSG checksum, or nothing stored there; -EIO,
                                       -ENOSPC, ...; -ENODEV: directory out; -ECANCELED: a
                                       write from before fk_ssd_reset */
};
/*
 * Accepts all n (queues inside what does not fit in the engine's depth). Requests of one call
 * that are neighbours both in slots and in memory become one I/O. buf belongs to the tier
 * until the request is done, however long that takes. Flushes the engine.
 */
void fk_ssd_submit(struct fk_ssd *ssd, const struct fk_ssd_req *reqs, uint32_t n,
                   uint64_t now_us);
/* Hands an engine's finished I/O to the store that owns it (io->owner leads there). */
void fk_ssd_io_done(struct fk_io *io, uint64_t now_us);
/* Takes finished requests; never waits. */
uint32_t fk_ssd_take_done(struct fk_ssd *ssd, struct fk_ssd_done *out, uint32_t max);
/* Writes pending table records, retries devices. Call after a batch and at next_wakeup. */
void fk_ssd_tick(struct fk_ssd *ssd, uint64_t now_us);
uint64_t fk_ssd_next_wakeup(const struct fk_ssd *ssd);   /* UINT64_MAX: none */
unsigned fk_ssd_inflight(const struct fk_ssd *ssd);      /* requests and table writes not done */

/* The slot holds nothing any more (bad bytes, removed): its record is emptied, batched. */
void fk_ssd_forget(struct fk_ssd *ssd, uint32_t slot);
/*
 * Everything is forgotten at once: a new epoch in the headers makes old records invalid.
 * Waits for the headers to be written. -EIO: forgotten in memory, but not one directory took
 * the header, so a restart may find the old blocks again.
 */
int fk_ssd_reset(struct fk_ssd *ssd, uint64_t now_us);

/*
 * Some bytes of the owner's that are kept with the store, as a help: in place of what they were, when the device takes
 * them, and not waited for; they may be lost. What was there when it was opened, if it is sound and at least so long.
 */
#define FK_SSD_HINT_BYTES 240u
void fk_ssd_set_hint(struct fk_ssd *ssd, const void *data, uint32_t bytes);
bool fk_ssd_hint(const struct fk_ssd *ssd, void *out, uint32_t bytes);

/* Directories: slot -> directory, and which are in use. The mask has a bit per directory. */
uint32_t fk_ssd_dir_of(const struct fk_ssd *ssd, uint32_t slot);
uint32_t fk_ssd_dirs_out(const struct fk_ssd *ssd);
uint32_t fk_ssd_stripe_slots(const struct fk_ssd *ssd);
/* 16 bytes; a store that is made anew has another one. */
const uint8_t *fk_ssd_uuid(const struct fk_ssd *ssd);

/* For those who read slots by themselves; any thread. What the block in the slot sums up to (fk_block_checksum);
 * 0: there is none. Where slots lie; the data file of a directory. */
uint64_t fk_ssd_checksum(const struct fk_ssd *ssd, uint32_t slot);
struct ssd_geometry;
const struct ssd_geometry *fk_ssd_geometry(const struct fk_ssd *ssd);
const char *fk_ssd_data_path(const struct fk_ssd *ssd, uint32_t dir);

/* reads, writes, table_writes count I/Os (after merging); bytes those of sound blocks. */
struct fk_ssd_stats {
    uint64_t read_bytes, write_bytes, reads, writes, table_writes;
    uint64_t read_errors, write_errors, checksum_errors, device_outs, device_returns;
};
void fk_ssd_get_stats(const struct fk_ssd *ssd, struct fk_ssd_stats *out);

/* --- off line: flexkv fsck --- */
struct fk_ssd_fsck {
    uint64_t slots, valid, empty, bad_record, old_epoch, duplicate, orphan, bad_data, repaired;
    uint64_t bad_header;            /* torn or lost, while its copy is good; or the copy is */
};
/*
 * Checks the store(s) NAME found in the directories: headers, records, parents, duplicates;
 * with read_data also every block's checksum. With repair, bad records are emptied.
 * report() gets one line per finding. 0 or -errno.
 */
int fk_ssd_fsck_run(const char *const *dirs, uint32_t n_dirs, const char *name, bool read_data,
                    bool repair, void (*report)(void *arg, const char *line), void *arg,
                    struct fk_ssd_fsck *out);

#endif
