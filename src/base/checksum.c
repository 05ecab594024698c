/* checksum.c - see checksum.h. */
#include "base/checksum.h"

#include <isa-l/crc64.h>

uint64_t fk_checksum(uint64_t seed, const void *data, size_t bytes)
{
    return crc64_ecma_refl(seed, data, bytes);
}

uint64_t fk_block_checksum_begin(struct fk_key key)
{
    return key.lo ^ (key.hi << 32 | key.hi >> 32);
}

uint64_t fk_block_checksum(struct fk_key key, const void *data, size_t bytes)
{
    return fk_block_checksum_end(fk_checksum(fk_block_checksum_begin(key), data, bytes));
}
