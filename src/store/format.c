/* format.c - see format.h. Pure functions. */
#include "store/format.h"

#include <stdio.h>
#include <string.h>

#include "base/checksum.h"
#include "store/store.h"

_Static_assert(STORE_NOTE_AT + FK_STORE_NOTE_MAX == STORE_PAGE, "notes fill the page");

static const char header_magic[8] = { 'F', 'l', 'e', 'x', 'K', 'V', 's', 'p' };
static const char record_magic[8] = { 'F', 'l', 'e', 'x', 'K', 'V', 'b', 'l' };
#define BYTE_ORDER_MARK 0x01020304u
#define BYTE_ORDER_SWAPPED 0x04030201u

void store_header_make(struct store_header *h, const char *name, const uint8_t fingerprint[16],
                       const uint8_t uuid[16], uint64_t block_bytes)
{
    memset(h, 0, sizeof(*h));
    memcpy(h->magic, header_magic, sizeof(h->magic));
    h->byte_order = BYTE_ORDER_MARK;
    h->version = STORE_VERSION;
    h->block_bytes = block_bytes;
    memcpy(h->fingerprint, fingerprint, sizeof(h->fingerprint));
    memcpy(h->uuid, uuid, sizeof(h->uuid));
    memcpy(h->name, name, strnlen(name, sizeof(h->name) - 1));
    h->crc = fk_crc32c(~0u, h, offsetof(struct store_header, crc));
}

enum store_state store_header_read(const void *bytes, size_t n, struct store_header *h)
{
    memset(h, 0, sizeof(*h));
    memcpy(h, bytes, n < sizeof(*h) ? n : sizeof(*h));
    if (memcmp(h->magic, header_magic, sizeof(h->magic)) != 0)
        return STORE_FOREIGN;
    if (h->byte_order == BYTE_ORDER_SWAPPED)
        return STORE_BYTE_ORDER;
    if (h->byte_order == BYTE_ORDER_MARK && h->version && h->version != STORE_VERSION)
        return STORE_VERSION_OTHER;
    if (n != sizeof(*h) || h->crc != fk_crc32c(~0u, h, offsetof(struct store_header, crc)) ||
        h->byte_order != BYTE_ORDER_MARK || h->version != STORE_VERSION || h->block_bytes == 0 || h->block_bytes > STORE_MAX_BLOCK_BYTES ||
        !memchr(h->name, 0, sizeof(h->name)))
        return STORE_TORN;
    return STORE_OK;
}

void store_page_make(void *page, const struct store_header *h, struct fk_key key, struct fk_key parent,
                     const void *block, const void *note, uint32_t note_bytes)
{
    struct store_record r = { .byte_order = BYTE_ORDER_MARK, .version = STORE_VERSION, .key = key, .parent = parent,
                              .block_bytes = h->block_bytes, .note_bytes = note_bytes };

    memcpy(r.magic, record_magic, sizeof(r.magic));
    r.checksum = fk_block_checksum(key, block, h->block_bytes);
    memcpy(r.fingerprint, h->fingerprint, sizeof(r.fingerprint));
    r.note_crc = fk_crc32c(~0u, note, note_bytes);
    r.crc = fk_crc32c(~0u, &r, offsetof(struct store_record, crc));
    memset(page, 0, STORE_PAGE);
    memcpy(page, &r, sizeof(r));
    if (note_bytes)
        memcpy((char *)page + STORE_NOTE_AT, note, note_bytes);
}

bool store_page_read(const void *page, const struct store_header *h, struct fk_key key, struct store_record *r)
{
    memcpy(r, page, sizeof(*r));
    return memcmp(r->magic, record_magic, sizeof(r->magic)) == 0 &&
           r->crc == fk_crc32c(~0u, r, offsetof(struct store_record, crc)) && r->byte_order == BYTE_ORDER_MARK &&
           r->version == STORE_VERSION && fk_key_equal(r->key, key) && r->block_bytes == h->block_bytes &&
           memcmp(r->fingerprint, h->fingerprint, sizeof(r->fingerprint)) == 0 &&
           r->note_bytes <= FK_STORE_NOTE_MAX &&
           r->note_crc == fk_crc32c(~0u, (const char *)page + STORE_NOTE_AT, r->note_bytes);
}

void store_key_text(struct fk_key key, char out[STORE_KEY_CHARS + 1])
{
    snprintf(out, STORE_KEY_CHARS + 1, "%016llx%016llx", (unsigned long long)key.hi, (unsigned long long)key.lo);
}

static bool parse_word(const char *text, uint64_t *word)
{
    *word = 0;
    for (int i = 0; i < 16; i++) {
        char c = text[i];
        if (!((c >= '0' && c <= '9') || (c >= 'a' && c <= 'f')))
            return false;
        *word = *word << 4 | (uint64_t)(c <= '9' ? c - '0' : c - 'a' + 10);
    }
    return true;
}

bool store_key_parse(const char *name, struct fk_key *key)
{
    return strnlen(name, STORE_KEY_CHARS + 1) == STORE_KEY_CHARS && parse_word(name, &key->hi) &&
           parse_word(name + 16, &key->lo);
}
