/* checksum.c - see checksum.h. */
#include "base/checksum.h"

#include <isa-l/crc64.h>

uint64_t fk_checksum(uint64_t seed, const void *data, size_t bytes)
{
    return crc64_ecma_refl(seed, data, bytes);
}
