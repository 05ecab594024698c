/*
 * ssd_format.h - what stands in the files of an SSD store, and the checks before any of it is
 * believed. Pure functions over bytes: used by the store, fsck and the fuzzer. Any thread.
 *
 *   NAME.table   page 0: header; then 64 bytes per slot of this directory, in local order
 *   NAME.data    page 0: copy of the header (and the place a failing device is tried at); page 1, of the first
 *                directory: the owner's hint;
 *                slots from SSD_DATA_START on
 *
 *   slot  0 1 2 3 | 4 5 6 7 | 8 9 ..    stripe_slots = 4, two directories:
 *   dir   0 0 0 0 | 1 1 1 1 | 0 0 ..
 *   local 0 1 2 3 | 0 1 2 3 | 4 5 ..
 *
 * Native byte order; the header carries a mark, a store of the other order is refused.
 */
#ifndef FK_TIER_SSD_FORMAT_H
#define FK_TIER_SSD_FORMAT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/key.h"

#define SSD_PAGE 4096u
#define SSD_DATA_START (1024u * 1024)   /* keeps slots aligned to what RAIDs and flash like */
#define SSD_VERSION 1u
#define SSD_NAME_MAX 63
#define SSD_MAX_BLOCK_BYTES (1024ull * 1024 * 1024)

struct ssd_geometry {
    uint64_t block_bytes, slot_bytes;
    uint32_t n_slots, stripe_slots, n_dirs;
};

/* Fills the rest from block_bytes, n_slots, n_dirs and stripe_slots (0: default). */
void ssd_geometry_derive(struct ssd_geometry *g);
uint32_t ssd_geometry_dir(const struct ssd_geometry *g, uint32_t slot);
uint32_t ssd_geometry_local(const struct ssd_geometry *g, uint32_t slot);
/* n_slots or more if there is no such slot. */
uint64_t ssd_geometry_slot(const struct ssd_geometry *g, uint32_t dir, uint32_t local);
uint32_t ssd_geometry_dir_slots(const struct ssd_geometry *g, uint32_t dir);

static inline uint64_t ssd_table_offset(uint32_t local)
{
    return SSD_PAGE + (uint64_t)local * 64;
}

static inline uint64_t ssd_data_offset(const struct ssd_geometry *g, uint32_t local)
{
    return SSD_DATA_START + (uint64_t)local * g->slot_bytes;
}

/* --- header --- */

struct ssd_header {
    char magic[8];
    uint32_t byte_order, version;
    uint64_t block_bytes, slot_bytes;
    uint32_t n_slots, stripe_slots, n_dirs, dir;
    uint8_t fingerprint[16];
    uint8_t uuid[16];                   /* of the store; the same in all its directories */
    uint32_t epoch;                     /* records of another epoch are empty */
    uint32_t complete;                  /* 0: the store was still being made */
    char name[SSD_NAME_MAX + 1];
    uint32_t reserved, crc;             /* crc32c of all before it */
};
_Static_assert(sizeof(struct ssd_header) == 160, "the header's layout is the file format");

enum ssd_header_state {
    SSD_HEADER_OK,
    SSD_HEADER_BLANK,                   /* never written */
    SSD_HEADER_TORN,                    /* ours, but not whole */
    SSD_HEADER_FOREIGN,                 /* not ours */
    SSD_HEADER_BYTE_ORDER,
    SSD_HEADER_VERSION,
};

void ssd_header_make(struct ssd_header *h, const struct ssd_geometry *g, uint32_t dir,
                     const char *name, const uint8_t fingerprint[16], const uint8_t uuid[16],
                     uint32_t epoch, bool complete);
void ssd_header_seal(struct ssd_header *h);
/* Reads a page; *h is only to be used after SSD_HEADER_OK, when its geometry is sound. */
enum ssd_header_state ssd_header_read(const void *page, struct ssd_header *h);
void ssd_header_geometry(const struct ssd_header *h, struct ssd_geometry *g);

/* --- hint --- */

#define SSD_HINT_AT SSD_PAGE            /* in the data file */

struct ssd_hint {
    char magic[8];
    uint32_t bytes, crc;                /* crc32c of all else, seeded with the store */
    uint8_t data[240];
};
_Static_assert(sizeof(struct ssd_hint) == 256, "the hint's layout is the file format");

void ssd_hint_make(struct ssd_hint *h, uint32_t seed, const void *data, uint32_t bytes);
/* Is it one, of this store? */
bool ssd_hint_check(const struct ssd_hint *h, uint32_t seed);

/* --- records --- */

struct ssd_record {
    struct fk_key key, parent;
    uint64_t checksum;                  /* ssd_data_checksum of the payload */
    uint64_t seq;
    uint32_t tag;
    uint32_t length;                    /* block_bytes */
    uint32_t epoch;
    uint32_t crc;                       /* crc32c, seeded with store and slot */
};
_Static_assert(sizeof(struct ssd_record) == 64, "the record's layout is the file format");

enum ssd_record_state { SSD_RECORD_OK, SSD_RECORD_EMPTY, SSD_RECORD_BAD };

/* The store's part of the seed; with the slot it binds a record to its place. */
uint32_t ssd_record_seed(const uint8_t uuid[16]);
void ssd_record_seal(struct ssd_record *r, uint32_t seed, uint32_t slot);
enum ssd_record_state ssd_record_check(const struct ssd_record *r, uint32_t seed,
                                       uint32_t slot, uint64_t block_bytes);

/* Never 0: that stands for "no block" in memory. */
uint64_t ssd_data_checksum(struct fk_key key, const void *data, uint64_t bytes);

#endif
