/*
 * format.h - what stands in the files of a store in a directory, and the checks before any of it is believed. Pure
 * functions over bytes: used by the directory and the fuzzer. Any thread.
 *
 *   SPACE/header          struct store_header
 *   SPACE/data/ab/KEY     a page: struct store_record, the note at STORE_NOTE_AT; then the block
 *
 * Native byte order; the header carries a mark, a store of the other order is refused. docs/store.md
 */
#ifndef FK_STORE_FORMAT_H
#define FK_STORE_FORMAT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/key.h"

#define STORE_VERSION 1u
#define STORE_PAGE 4096u                /* the block begins on a page of its own: fit for direct I/O */
#define STORE_NOTE_AT 128u              /* in the page */
#define STORE_MAX_BLOCK_BYTES (1024ull * 1024 * 1024)
#define STORE_NAME_BYTES 64

struct store_header {
    char magic[8];
    uint32_t byte_order, version;
    uint64_t block_bytes;
    uint8_t fingerprint[16];
    uint8_t uuid[16];                   /* of the space: another mount in its place has another one */
    char name[STORE_NAME_BYTES];        /* for people */
    uint32_t reserved, crc;             /* crc32c of all before it */
};
_Static_assert(sizeof(struct store_header) == 128, "the header's layout is the file format");

struct store_record {
    char magic[8];
    uint32_t byte_order, version;
    struct fk_key key, parent;
    uint64_t block_bytes;
    uint64_t checksum;                  /* fk_block_checksum of the block */
    uint8_t fingerprint[16];
    uint32_t note_bytes, note_crc;      /* what the writer wanted to be kept with the block */
    uint32_t reserved, crc;             /* crc32c of all before it */
};
_Static_assert(sizeof(struct store_record) == 96, "the record's layout is the file format");

enum store_state {
    STORE_OK,
    STORE_TORN,                         /* ours, but not whole */
    STORE_FOREIGN,                      /* not ours */
    STORE_BYTE_ORDER,
    STORE_VERSION_OTHER,
};

void store_header_make(struct store_header *h, const char *name, const uint8_t fingerprint[16],
                       const uint8_t uuid[16], uint64_t block_bytes);
/* *h is only to be used after STORE_OK; h->version after STORE_VERSION_OTHER too. */
enum store_state store_header_read(const void *bytes, size_t n, struct store_header *h);

/* The page before the block; note_bytes <= FK_STORE_NOTE_MAX. */
void store_page_make(void *page, const struct store_header *h, struct fk_key key, struct fk_key parent,
                     const void *block, const void *note, uint32_t note_bytes);
/* Is it the page of that key in that space? Then *r is its record, whose note is sound. */
bool store_page_read(const void *page, const struct store_header *h, struct fk_key key, struct store_record *r);

#define STORE_KEY_CHARS 32
void store_key_text(struct fk_key key, char out[STORE_KEY_CHARS + 1]);
/* False: not a key's name. */
bool store_key_parse(const char *name, struct fk_key *key);
/* Which of the 256 parts: the first two characters of the name. */
static inline uint32_t store_key_part(struct fk_key key) { return (uint32_t)(key.hi >> 56); }

#endif
