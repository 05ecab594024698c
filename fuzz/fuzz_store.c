/*
 * fuzz_store.c - libFuzzer target: the header of a space and the record before a block in a shared store. Nothing may
 * crash; a header that is taken must be whole and of our version, a record that is taken must be the asked key's, in that
 * space, with the bytes' own checksum. And the name for KV events that a block's note may hold.
 *
 * Input: byte 0: bit 0 seal the header's crc, bit 1 seal the record's and its note's, bit 2 put a sound magic, order and version into both;
 * then 128 bytes of header, 96 of record, and the note. All of it is tried as a name too.
 */
#include <endian.h>
#include <isa-l/crc.h>
#include <string.h>

#include "base/checksum.h"
#include "base/util.h"
#include "events/note.h"
#include "store/format.h"
#include "store/store.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void seal(void *bytes, size_t n)
{
    uint32_t crc = crc32_iscsi(bytes, (int)(n - 4), ~0u);

    memcpy((char *)bytes + n - 4, &crc, 4);
}

static size_t take(const uint8_t **data, size_t *left, void *out, size_t want)
{
    size_t n = fk_min(*left, want);

    memset(out, 0, want);
    memcpy(out, *data, n);
    *data += n;
    *left -= n;
    return n;
}

/* What is taken for a name says the same when it is written again. */
static void try_note(const uint8_t *data, size_t size)
{
    uint32_t tokens[4], n_tokens = size > 4 ? data[4] % 5u : 0;
    uint8_t again[4096];
    struct fk_note note;

    if (!fk_note_read(data, (uint32_t)fk_min(size, sizeof(again)), n_tokens, &note))
        return;
    for (uint32_t i = 0; i < n_tokens; i++) {
        memcpy(&tokens[i], note.tokens + 4 * i, 4);
        tokens[i] = le32toh(tokens[i]);
    }
    struct fk_label label = { 0, *note.lora ? note.lora : NULL, *note.salt ? note.salt : NULL };
    uint32_t n = fk_note_write(again, sizeof(again), &note.name, tokens, n_tokens, &label);
    if (n != size || memcmp(again, data, n) != 0)
        __builtin_trap();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const uint32_t sound[2] = { 0x01020304, STORE_VERSION };
    struct store_header raw, h;
    struct store_record r;

    if (!size)
        return 0;
    try_note(data, size);
    uint8_t how = *data++;
    size--;
    size_t n = take(&data, &size, &raw, sizeof(raw));
    take(&data, &size, &r, sizeof(r));
    if (how & 4) {
        memcpy(raw.magic, "FlexKVsp", 8);
        memcpy(r.magic, "FlexKVbl", 8);
        memcpy(&raw.byte_order, sound, sizeof(sound));
        memcpy(&r.byte_order, sound, sizeof(sound));
    }
    if (how & 1)
        seal(&raw, sizeof(raw));
    if (how & 2) {
        r.note_bytes %= 2 * FK_STORE_NOTE_MAX;
        uint8_t note[FK_STORE_NOTE_MAX] = { 0 };
        memcpy(note, data, fk_min(size, sizeof(note)));
        r.note_crc = crc32_iscsi(note, (int)fk_min(r.note_bytes, FK_STORE_NOTE_MAX), ~0u);
        seal(&r, sizeof(r));
    }
    enum store_state state = store_header_read(&raw, how & 1 ? sizeof(raw) : n, &h);
    if (state != STORE_OK)
        return 0;
    if (h.version != STORE_VERSION || !h.block_bytes || h.block_bytes > STORE_MAX_BLOCK_BYTES ||
        strnlen(h.name, sizeof(h.name)) == sizeof(h.name))
        __builtin_trap();
    static uint8_t page[STORE_PAGE];
    struct store_record got;
    memset(page, 0, sizeof(page));
    memcpy(page, &r, sizeof(r));
    memcpy(page + STORE_NOTE_AT, data, fk_min(size, (size_t)FK_STORE_NOTE_MAX));
    if (store_page_read(page, &h, r.key, &got) &&
        (got.block_bytes != h.block_bytes || got.version != STORE_VERSION || got.note_bytes > FK_STORE_NOTE_MAX))
        __builtin_trap();
    struct fk_key other = { r.key.lo ^ 1, r.key.hi };
    if (store_page_read(page, &h, other, &got))
        __builtin_trap();
    char name[STORE_KEY_CHARS + 1], text[64] = "";
    struct fk_key parsed;
    store_key_text(r.key, name);
    if (!store_key_parse(name, &parsed) || !fk_key_equal(parsed, r.key))
        __builtin_trap();
    memcpy(text, data, fk_min(size, sizeof(text) - 1));
    if (store_key_parse(text, &parsed)) {
        store_key_text(parsed, name);
        if (strcmp(name, text) != 0)
            __builtin_trap();
    }
    return 0;
}
