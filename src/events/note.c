/* note.c - see note.h. */
#include "events/note.h"

#include <endian.h>

#define VERSION 1u

struct head {
    uint8_t version, root, lora_bytes, salt_bytes;
    uint32_t tokens;
    uint64_t hash, parent;
};
_Static_assert(sizeof(struct head) == 24, "no holes");

uint32_t fk_note_write(void *out, uint32_t max, const struct fk_name *name, const uint32_t *tokens,
                       uint32_t n_tokens, const struct fk_label *label)
{
    size_t lora = label->lora ? strlen(label->lora) : 0, salt = label->salt ? strlen(label->salt) : 0;
    uint64_t bytes = sizeof(struct head) + (uint64_t)n_tokens * 4 + lora + salt;
    unsigned char *at = out;

    if (!name->hash || lora > FK_LABEL_TEXT_MAX || salt > FK_LABEL_TEXT_MAX || bytes > max)
        return 0;
    struct head h = { VERSION, name->root, (uint8_t)lora, (uint8_t)salt, htole32(n_tokens), htole64(name->hash),
                      htole64(name->parent) };
    memcpy(at, &h, sizeof(h));
    at += sizeof(h);
    for (uint32_t i = 0; i < n_tokens; i++, at += 4) {
        uint32_t token = htole32(tokens[i]);
        memcpy(at, &token, 4);
    }
    if (lora)
        memcpy(at, label->lora, lora);
    if (salt)
        memcpy(at + lora, label->salt, salt);
    return (uint32_t)bytes;
}

bool fk_note_read(const void *data, uint32_t bytes, uint32_t n_tokens, struct fk_note *out)
{
    const unsigned char *at = data;
    struct head h;

    if (bytes < sizeof(h))
        return false;
    memcpy(&h, at, sizeof(h));
    if (h.version != VERSION || h.root > 1 || le32toh(h.tokens) != n_tokens || !h.hash ||
        bytes != sizeof(h) + (uint64_t)n_tokens * 4 + h.lora_bytes + h.salt_bytes)
        return false;
    *out = (struct fk_note){ .name = { .hash = le64toh(h.hash), .parent = le64toh(h.parent), .root = h.root },
                             .tokens = at + sizeof(h) };
    at += sizeof(h) + (size_t)n_tokens * 4;
    memcpy(out->lora, at, h.lora_bytes);
    memcpy(out->salt, at + h.lora_bytes, h.salt_bytes);
    return strlen(out->lora) == h.lora_bytes && strlen(out->salt) == h.salt_bytes;
}
