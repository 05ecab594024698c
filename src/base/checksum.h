/* checksum.h - the one checksum of bytes that leave memory. Any thread, no state. */
#ifndef FK_BASE_CHECKSUM_H
#define FK_BASE_CHECKSUM_H

#include <stddef.h>
#include <stdint.h>

#include "base/key.h"

/*
 * CRC-64 (ECMA-182, reflected; isa-l, carry-less multiply) of bytes, chained from seed.
 * 64 bits for the price of 32: measured the same as CRC32C on the machines we know.
 * The seed binds bytes to the key they were stored under: bytes of another block, however
 * intact, do not verify.
 */
uint64_t fk_checksum(uint64_t seed, const void *data, size_t bytes);

/* Of a block, bound to its key; never 0. In SSD records, and between nodes. */
uint64_t fk_block_checksum(struct fk_key key, const void *data, size_t bytes);
/* The same piece by piece: fk_checksum from begin on, then end. */
uint64_t fk_block_checksum_begin(struct fk_key key);
static inline uint64_t fk_block_checksum_end(uint64_t sum) { return sum ? sum : 1; }

/*
 * The same in parts: a CRC is linear. The residue of bytes is what they add to it (the CRC's register, begun at
 * zero); that of A and B side by side is times(residue(A), power(bytes of B)) ^ residue(B).
 */
#define FK_CRC_TABLES 8
void fk_crc_tables(uint64_t tables[FK_CRC_TABLES][256]);    /* for eight bytes at a time */
uint64_t fk_crc_residue(const void *data, size_t bytes);
uint64_t fk_crc_power(uint64_t bytes);
uint64_t fk_crc_times(uint64_t a, uint64_t b);
/* fk_block_checksum of a block with that residue, whose bytes have that power. */
uint64_t fk_block_checksum_of(struct fk_key key, uint64_t residue, uint64_t power);

/* CRC-32C, chained from seed (~0 to begin): of our own small records, where four bytes are room enough. */
uint32_t fk_crc32c(uint32_t seed, const void *data, size_t bytes);

#endif
