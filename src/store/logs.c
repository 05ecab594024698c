/* logs.c - see logs.h. Pure functions. */
#include "store/logs.h"

#include <string.h>

#include "base/checksum.h"

static const char head_magic[8] = { 'F', 'l', 'e', 'x', 'K', 'V', 'h', 'd' };
static const char log_magic[8] = { 'F', 'l', 'e', 'x', 'K', 'V', 'l', 'g' };
#define BYTE_ORDER_MARK 0x01020304u
#define VERSION 1u

/* Of the bytes with four zero bytes in place of the crc. */
static uint32_t crc_of(const void *bytes, size_t n, size_t crc_at)
{
    static const uint32_t zero;
    uint32_t crc = fk_crc32c(fk_crc32c(~0u, bytes, crc_at), &zero, sizeof(zero));

    return fk_crc32c(crc, (const char *)bytes + crc_at + sizeof(zero), n - crc_at - sizeof(zero));
}

static size_t head_bytes(const struct store_head *h)
{
    return sizeof(*h) + h->chapters * sizeof(struct store_chapter);
}

static size_t log_bytes(const struct store_log *l)
{
    return sizeof(*l) + l->keys * sizeof(struct fk_key);
}

size_t store_head_seal(struct store_head_object *o)
{
    struct store_head *h = &o->head;

    memcpy(h->magic, head_magic, sizeof(h->magic));
    h->byte_order = BYTE_ORDER_MARK;
    h->version = VERSION;
    h->crc = crc_of(o, head_bytes(h), offsetof(struct store_head, crc));
    return head_bytes(h);
}

size_t store_log_seal(struct store_log_object *o)
{
    struct store_log *l = &o->log;

    memcpy(l->magic, log_magic, sizeof(l->magic));
    l->byte_order = BYTE_ORDER_MARK;
    l->version = VERSION;
    l->reserved = 0;
    l->crc = crc_of(o, log_bytes(l), offsetof(struct store_log, crc));
    return log_bytes(l);
}

static bool chapter_sound(const struct store_chapter *c)
{
    return c->first <= c->logs && c->logs <= STORE_CHAPTER_LOGS && c->keys <= STORE_LOG_KEYS && (c->logs || !c->keys);
}

bool store_head_sound(const struct store_head_object *o, size_t n)
{
    const struct store_head *h = &o->head;

    if (n < sizeof(*h) || memcmp(h->magic, head_magic, sizeof(h->magic)) != 0 || h->byte_order != BYTE_ORDER_MARK ||
        h->version != VERSION || h->chapters > STORE_HEAD_CHAPTERS || n < head_bytes(h) || h->slots > STORE_HEAD_SLOTS ||
        h->crc != crc_of(o, head_bytes(h), offsetof(struct store_head, crc)))
        return false;
    for (uint32_t i = 0; i < h->chapters; i++)
        if (!chapter_sound(&o->chapter[i]))
            return false;
    return true;
}

bool store_log_sound(const struct store_log_object *o, size_t n, const uint8_t uuid[16], uint32_t number)
{
    const struct store_log *l = &o->log;

    return n >= sizeof(*l) && memcmp(l->magic, log_magic, sizeof(l->magic)) == 0 && l->byte_order == BYTE_ORDER_MARK &&
           l->version == VERSION && l->keys <= STORE_LOG_KEYS && n >= log_bytes(l) &&
           l->crc == crc_of(o, log_bytes(l), offsetof(struct store_log, crc)) &&
           memcmp(l->uuid, uuid, sizeof(l->uuid)) == 0 && l->number == number;
}
