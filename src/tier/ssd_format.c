/* ssd_format.c - see ssd_format.h. Pure functions. */
#include "tier/ssd_format.h"

#include "base/checksum.h"
#include "base/util.h"

static const char magic[8] = { 'F', 'l', 'e', 'x', 'K', 'V', 's', 'd' };
#define BYTE_ORDER_MARK 0x01020304u
#define BYTE_ORDER_SWAPPED 0x04030201u
#define DEFAULT_STRIPE_BYTES (4 * FK_MIB)

/* --- geometry --- */

void ssd_geometry_derive(struct ssd_geometry *g)
{
    g->slot_bytes = fk_round_up(g->block_bytes, SSD_PAGE);
    if (g->stripe_slots == 0)
        g->stripe_slots = (uint32_t)fk_max(DEFAULT_STRIPE_BYTES / g->slot_bytes, 1ull);
}

uint32_t ssd_geometry_dir(const struct ssd_geometry *g, uint32_t slot)
{
    return slot / g->stripe_slots % g->n_dirs;
}

uint32_t ssd_geometry_local(const struct ssd_geometry *g, uint32_t slot)
{
    uint32_t stripe = slot / g->stripe_slots;

    return stripe / g->n_dirs * g->stripe_slots + slot % g->stripe_slots;
}

uint64_t ssd_geometry_slot(const struct ssd_geometry *g, uint32_t dir, uint32_t local)
{
    uint64_t stripe = (uint64_t)(local / g->stripe_slots) * g->n_dirs + dir;

    return stripe * g->stripe_slots + local % g->stripe_slots;
}

uint32_t ssd_geometry_dir_slots(const struct ssd_geometry *g, uint32_t dir)
{
    uint32_t full = g->n_slots / g->stripe_slots;
    uint32_t slots = (full / g->n_dirs + (dir < full % g->n_dirs)) * g->stripe_slots;

    return dir == full % g->n_dirs ? slots + g->n_slots % g->stripe_slots : slots;
}

/* --- header --- */

void ssd_header_make(struct ssd_header *h, const struct ssd_geometry *g, uint32_t dir,
                     const char *name, const uint8_t fingerprint[16], const uint8_t uuid[16],
                     uint32_t epoch, bool complete)
{
    memset(h, 0, sizeof(*h));
    memcpy(h->magic, magic, sizeof(magic));
    h->byte_order = BYTE_ORDER_MARK;
    h->version = SSD_VERSION;
    h->block_bytes = g->block_bytes;
    h->slot_bytes = g->slot_bytes;
    h->n_slots = g->n_slots;
    h->stripe_slots = g->stripe_slots;
    h->n_dirs = g->n_dirs;
    h->dir = dir;
    memcpy(h->fingerprint, fingerprint, 16);
    memcpy(h->uuid, uuid, 16);
    h->epoch = epoch;
    h->complete = complete;
    memcpy(h->name, name, strnlen(name, SSD_NAME_MAX));
    ssd_header_seal(h);
}

void ssd_header_seal(struct ssd_header *h)
{
    h->crc = fk_crc32c(~0u, h, offsetof(struct ssd_header, crc));
}

static bool geometry_sound(const struct ssd_header *h)
{
    return h->block_bytes > 0 && h->block_bytes <= SSD_MAX_BLOCK_BYTES &&
           h->slot_bytes == fk_round_up(h->block_bytes, SSD_PAGE) && h->n_slots > 0 &&
           h->n_slots < FK_NONE && h->stripe_slots > 0 && h->n_dirs > 0 && h->n_dirs <= 32 &&
           h->dir < h->n_dirs && memchr(h->name, 0, sizeof(h->name));
}

/* Ours, though torn or with a flipped bit? Blank if nothing was ever written. */
static enum ssd_header_state unknown_page(const unsigned char *page)
{
    size_t same = 0, zeros = 0;

    for (size_t i = 0; i < sizeof(magic); i++)
        same += page[i] == (unsigned char)magic[i];
    while (zeros < SSD_PAGE && page[SSD_PAGE - 1 - zeros] == 0)
        zeros++;
    if (zeros == SSD_PAGE)
        return SSD_HEADER_BLANK;
    size_t front = 0;
    while (page[front] == 0)
        front++;
    if (front >= SSD_PAGE - sizeof(uint64_t))   /* only the trial's number (ssd_device.c) outlived */
        return SSD_HEADER_TORN;                 /* a power loss */
    if (same + 1 >= sizeof(magic) || (zeros >= SSD_PAGE - sizeof(magic) && page[0] == 'F'))
        return SSD_HEADER_TORN;
    return SSD_HEADER_FOREIGN;
}

/* In every version the crc stands in this place, so other versions can be told from rot. */
enum ssd_header_state ssd_header_read(const void *page, struct ssd_header *h)
{
    memcpy(h, page, sizeof(*h));
    if (memcmp(h->magic, magic, sizeof(magic)) != 0)
        return unknown_page(page);
    uint32_t crc = fk_crc32c(~0u, h, offsetof(struct ssd_header, crc));
    if (h->byte_order == BYTE_ORDER_SWAPPED && h->crc == __builtin_bswap32(crc))
        return SSD_HEADER_BYTE_ORDER;
    if (h->crc != crc || h->byte_order != BYTE_ORDER_MARK)
        return SSD_HEADER_TORN;
    if (h->version != SSD_VERSION)
        return SSD_HEADER_VERSION;
    return geometry_sound(h) ? SSD_HEADER_OK : SSD_HEADER_TORN;
}

void ssd_header_geometry(const struct ssd_header *h, struct ssd_geometry *g)
{
    *g = (struct ssd_geometry){
        .block_bytes = h->block_bytes, .slot_bytes = h->slot_bytes, .n_slots = h->n_slots,
        .stripe_slots = h->stripe_slots, .n_dirs = h->n_dirs,
    };
}

/* --- hint --- */

static const char hint_magic[8] = "FKHINT1";

static uint32_t hint_crc(struct ssd_hint h, uint32_t seed)
{
    h.crc = 0;
    return fk_crc32c(seed, &h, sizeof(h));
}

void ssd_hint_make(struct ssd_hint *h, uint32_t seed, const void *data, uint32_t bytes)
{
    memset(h, 0, sizeof(*h));
    memcpy(h->magic, hint_magic, sizeof(hint_magic));
    h->bytes = fk_min(bytes, (uint32_t)sizeof(h->data));
    memcpy(h->data, data, h->bytes);
    h->crc = hint_crc(*h, seed);
}

bool ssd_hint_check(const struct ssd_hint *h, uint32_t seed)
{
    return memcmp(h->magic, hint_magic, sizeof(hint_magic)) == 0 && h->bytes <= sizeof(h->data) &&
           h->crc == hint_crc(*h, seed);
}

/* --- records --- */

uint32_t ssd_record_seed(const uint8_t uuid[16])
{
    return fk_crc32c(~0u, uuid, 16);
}

static uint32_t record_crc(const struct ssd_record *r, uint32_t seed, uint32_t slot)
{
    return fk_crc32c(seed ^ (slot * 0x9e3779b1u), r, offsetof(struct ssd_record, crc));
}

void ssd_record_seal(struct ssd_record *r, uint32_t seed, uint32_t slot)
{
    r->crc = record_crc(r, seed, slot);
}

enum ssd_record_state ssd_record_check(const struct ssd_record *r, uint32_t seed,
                                       uint32_t slot, uint64_t block_bytes)
{
    static const struct ssd_record empty;

    if (memcmp(r, &empty, sizeof(empty)) == 0)
        return SSD_RECORD_EMPTY;
    if (r->crc != record_crc(r, seed, slot) || fk_key_is_zero(r->key) || r->checksum == 0 ||
        r->length != block_bytes)
        return SSD_RECORD_BAD;
    return SSD_RECORD_OK;
}

uint64_t ssd_data_checksum(struct fk_key key, const void *data, uint64_t bytes)
{
    return fk_block_checksum(key, data, bytes);
}
