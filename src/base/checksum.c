/* checksum.c - see checksum.h. */
#include "base/checksum.h"

#include <isa-l/crc.h>
#include <isa-l/crc64.h>

uint64_t fk_checksum(uint64_t seed, const void *data, size_t bytes)
{
    return crc64_ecma_refl(seed, data, bytes);
}

uint32_t fk_crc32c(uint32_t seed, const void *data, size_t bytes)
{
    return crc32_iscsi((unsigned char *)(uintptr_t)data, (int)bytes, seed);
}

uint64_t fk_block_checksum_begin(struct fk_key key)
{
    return key.lo ^ (key.hi << 32 | key.hi >> 32);
}

uint64_t fk_block_checksum(struct fk_key key, const void *data, size_t bytes)
{
    return fk_block_checksum_end(fk_checksum(fk_block_checksum_begin(key), data, bytes));
}

/* ---- polynomials over one bit, the highest power in the lowest bit, modulo ECMA-182's ---- */

#define POLYNOMIAL 0xc96c5795d7870f42ull
#define ONE (1ull << 63)

static uint64_t times_x(uint64_t a)
{
    return a >> 1 ^ (a & 1 ? POLYNOMIAL : 0);
}

uint64_t fk_crc_times(uint64_t a, uint64_t b)
{
    uint64_t product = 0;

    for (; a; a <<= 1, b = times_x(b))
        product ^= a & ONE ? b : 0;
    return product;
}

uint64_t fk_crc_power(uint64_t bytes)
{
    uint64_t result = ONE, square = ONE >> 8;       /* x to the 8th */

    for (; bytes; bytes >>= 1, square = fk_crc_times(square, square))
        if (bytes & 1)
            result = fk_crc_times(result, square);
    return result;
}

void fk_crc_tables(uint64_t tables[FK_CRC_TABLES][256])
{
    for (uint32_t i = 0; i < 256; i++) {
        uint64_t r = i;
        for (int k = 0; k < 8; k++)
            r = times_x(r);
        tables[0][i] = r;
    }
    for (uint32_t t = 1; t < FK_CRC_TABLES; t++)
        for (uint32_t i = 0; i < 256; i++)
            tables[t][i] = tables[t - 1][i] >> 8 ^ tables[0][tables[t - 1][i] & 255];
}

uint64_t fk_crc_residue(const void *data, size_t bytes)
{
    return ~fk_checksum(~0ull, data, bytes);        /* isa-l turns the register over before and after */
}

uint64_t fk_block_checksum_of(struct fk_key key, uint64_t residue, uint64_t power)
{
    return fk_block_checksum_end(~(residue ^ fk_crc_times(~fk_block_checksum_begin(key), power)));
}
