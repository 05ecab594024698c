/*
 * store.h - the third party's store: blocks in a place that several nodes share, a directory on a network file
 * system first of all. Knows keys, bytes and spaces; nothing of cores, tiers or nodes.
 *
 *     fk_store_has ----> a set of prints in memory: 64 bits a block, no system call
 *     fk_store_submit -> a bounded queue -> threads -> the backend (one vtable: backend.h) -> fk_store_take
 *                                           scanner: what other nodes have written, room, leftovers, resets
 *
 * Nothing here waits for the store but its own threads. A file system that hangs keeps them, and nobody else:
 *  - every request ends by its deadline. If a thread still reads into (or writes from) the buffer then, the request
 *    is reported as *quarantined*, and a second time, as *released*, when the thread has come back. Until then the
 *    buffer must be left alone.
 *  - a store that fails or hangs is out of use for a growing time; the scanner looks whether it is back. Reading and
 *    writing are taken out one by one: a full or read-only store is still read.
 *
 * What is read is what was put under that key, or an error: the checksum is seeded with the key. A file that does not
 * verify is a miss, is counted, and is removed if it is still that file.
 *
 * fk_store_has may be behind: a block that others wrote is seen after scan_us at the latest (plus what the
 * file system itself needs to show it); a block that they removed costs a read in vain. A print of 64 bits may, once
 * in 2^64 / blocks, be another key's: a read in vain too.
 *
 * Room: with a capacity, whoever sees the store above it removes what was used longest ago, under a lock that nodes share.
 *
 * Threads: any thread may call. fk_store_has takes a part's lock for one look-up; the others take the store's lock for
 * microseconds. No call waits, but open, space and close, which are bounded by timeout_us.
 * Format, failures, costs: docs/store.md.
 */
#ifndef FK_STORE_STORE_H
#define FK_STORE_STORE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/key.h"
#include "base/rate.h"

#define FK_STORE_SPACES 64
#define FK_STORE_NOTE_MAX 3968u

struct fk_store;
struct fk_store_backend;

/* Where an object store is; empty: as the library that is used has it. */
struct fk_store_bucket {
    char name[128], endpoint[256], region[64], prefix[256];
    char plugin[32], ca_file[512], library[1024];
    const struct fk_object_client *client;      /* objects.h */
};

struct fk_store_params {
    const struct fk_store_backend *backend;     /* NULL: the directory */
    const char *path;                   /* the directory, made if it is not there (its parent must be); else for people */
    struct fk_store_bucket bucket;      /* for fk_store_objects */
    uint64_t capacity_bytes;            /* of all spaces together; 0: no limit */
    uint32_t threads;                   /* 0: 4. At most half of them write */
    uint32_t max_queued;                /* requests that have not ended; 0: 1024 */
    uint64_t timeout_us;                /* opening, closing, a space; 0: 10 s */
    uint64_t scan_us;                   /* others' writes are seen after that; 0: 10 s */
    uint32_t errors;                    /* in a row that take it out of use; 0: 4 */
    uint64_t retry_us;                  /* then tried again after that, doubling up to 32 times; 0: 1 s */
    uint64_t leftover_us;               /* unfinished files older than that are a dead writer's; 0: 1 h */
    uint64_t touch_us;                  /* a read marks a file as used if its mark is older; 0: 60 s */
    void (*wake)(void *arg);            /* there is something to take; from any of the store's threads, which hold
                                           no lock */
    /* Are the bytes of that write still the block's? Asked by a thread when they are written, before others can see
     * them. NULL: they are. */
    bool (*sure)(void *arg, uint64_t user);
    void *arg;
};

/* 0 or -errno, with a line in error that names the setting. -ETIMEDOUT: the file system does not answer. */
int fk_store_open(const struct fk_store_params *params, struct fk_store **out, char *error, size_t error_bytes);
/* What is queued is dropped, what is under way is waited for up to timeout_us. True: nothing touches any buffer any
 * more. False: a thread hangs; buffers of what was under way must never be unmapped. */
bool fk_store_close(struct fk_store *store);

struct fk_store_space {
    const char *name;                   /* for people */
    uint8_t fingerprint[16];            /* of geometry, model and key scheme: spaces with another one never meet */
    uint64_t block_bytes;
};
/* One caller at a time. A space that is open already has the same number. -EEXIST: there is a store of another version, byte order or block size; -ENOSPC: too many spaces. */
int fk_store_space(struct fk_store *store, const struct fk_store_space *space, uint32_t *id, char *error,
                   size_t error_bytes);

/* How many leading keys it has, as far as is known. */
uint32_t fk_store_has(const struct fk_store *store, uint32_t space, const struct fk_key *keys, uint32_t n);

enum fk_store_op { FK_STORE_READ, FK_STORE_WRITE };

struct fk_store_req {
    enum fk_store_op op;
    uint32_t space;
    bool urgent;                        /* reads: before those that are not */
    struct fk_key key, parent;          /* parent: writes only */
    void *buf;                          /* block_bytes; the store's until the request ends (or is released) */
    /* Bytes kept with the block, which mean nothing to the store. NULL: none. Reading: room for FK_STORE_NOTE_MAX; its
     * memory like buf. */
    void *note;
    uint32_t note_bytes;                /* writes */
    uint64_t user;                      /* comes back */
};
enum { FK_STORE_QUARANTINED = 1, FK_STORE_RELEASED = 2 };

/*
 * status: 0; -ENOENT: not there (any more); -EBADMSG: it was, but not that block's bytes; -ETIMEDOUT; -ENODEV: out of
 * use; -ECANCELED: a reset came in between, or the write was not sure; -ENOSPC, -EDQUOT, -EROFS, -EIO, ...
 */
struct fk_store_done {
    uint64_t user;
    int32_t status;
    uint32_t flags, note_bytes;
};

/* All n are taken (0) or none: -EAGAIN: too many have not ended; -ENODEV: out of use; -EINVAL. deadline_us: fk_clock_us(). */
int fk_store_submit(struct fk_store *store, const struct fk_store_req *req, uint32_t n, uint64_t deadline_us,
                    uint64_t now_us);
/* Ends what is past its deadline, too: to be called at next_wakeup. */
uint32_t fk_store_take(struct fk_store *store, struct fk_store_done *out, uint32_t max, uint64_t now_us);
uint64_t fk_store_next_wakeup(struct fk_store *store);  /* UINT64_MAX: none */

/*
 * Blocks that were written, and that nobody will find: the place was emptied, or reset by another node, at that time.
 * Who still has one may write it again. Others than these are forgotten without a word when that happens.
 */
struct fk_store_lost { uint32_t space; struct fk_key key, parent; };
uint32_t fk_store_take_lost(struct fk_store *store, struct fk_store_lost *out, uint32_t max);

/*
 * All blocks of the space are forgotten, by all nodes: from now on nothing is read that was written before. It is
 * carried out in the background; until then the space is neither read nor written.
 */
void fk_store_reset(struct fk_store *store, uint32_t space);
/* Waits until all that were asked for have been carried out; -ETIMEDOUT. */
int fk_store_reset_wait(struct fk_store *store, uint64_t timeout_us);

/* The scanner looks now, and all that it finds is known on return. For tests and tools: waits. -ETIMEDOUT. */
int fk_store_scan(struct fk_store *store, uint64_t timeout_us);

bool fk_store_reads(const struct fk_store *store);      /* is it in use? */
bool fk_store_writes(const struct fk_store *store);

struct fk_store_stats {
    uint64_t read_blocks, read_bytes, write_blocks, write_bytes;        /* sound ones */
    uint64_t already;                   /* writes of what was there */
    uint64_t missing;                   /* reads in vain: it was not there any more */
    uint64_t bad;                       /* files that did not verify */
    uint64_t read_errors, write_errors, timeouts;
    uint64_t full;                      /* writes refused or failed for want of room */
    uint64_t evicted, leftovers, scans, listed; /* listed: directories read */
    uint64_t outs, returns;
    uint64_t blocks, set_bytes;         /* known now, and the memory for that */
    uint64_t used_bytes;                /* of the whole store, as far as is known */
    uint32_t queued, running, quarantined;      /* now */
};
void fk_store_get_stats(struct fk_store *store, struct fk_store_stats *out);
/* What a block takes lately, with as many at a time as there were. */
struct fk_rate fk_store_block_rate(const struct fk_store *store, uint32_t space);

#endif
