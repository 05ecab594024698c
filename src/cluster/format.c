/* format.c - see format.h. */
#include "cluster/format.h"

#include <inttypes.h>
#include <jansson.h>
#include <stdio.h>

#include "base/checksum.h"

enum { VERSION = 1, HEADER_BYTES = 16, MAGIC = 0xfb };
enum { REMOVED = 1, SSD = 2, SPACE = 4, NEXT = 8, KNOWN_FLAGS = 15 };

int fk_bytes_add(fk_bytes *b, const void *data, size_t bytes)
{
    if (fk_vec_reserve(b, b->len + bytes))
        return -ENOMEM;
    memcpy(b->data + b->len, data, bytes);
    b->len += bytes;
    return 0;
}

static void put_le(uint8_t *to, uint64_t v, unsigned bytes)
{
    for (unsigned i = 0; i < bytes; i++)
        to[i] = (uint8_t)(v >> (8 * i));
}

static uint64_t get_le(const uint8_t *from, unsigned bytes)
{
    uint64_t v = 0;

    for (unsigned i = 0; i < bytes; i++)
        v |= (uint64_t)from[i] << (8 * i);
    return v;
}

/* Over what the batch is bound to, the first half of its header, and its changes. */
static uint64_t batch_checksum(const struct fk_batch_id *id, const uint8_t *header,
                               const void *body, size_t bytes)
{
    uint8_t place[16];

    put_le(place, id->epoch, 8);
    put_le(place + 8, id->number, 8);
    uint64_t crc = fk_checksum(0, id->name, strlen(id->name));
    crc = fk_checksum(crc, place, sizeof(place));
    crc = fk_checksum(crc, header, 8);
    return fk_checksum(crc, body, bytes);
}

static uint8_t *put_varint(uint8_t *at, uint32_t v)
{
    for (; v >= 0x80; v >>= 7)
        *at++ = (uint8_t)(v | 0x80);
    *at++ = (uint8_t)v;
    return at;
}

struct batch_state { uint8_t space; uint32_t slot, generation; };

/* Blocks of one put mostly lie in neighbouring slots: those take 17 bytes each. */
static size_t put_change(uint8_t *to, const struct fk_change *c, struct batch_state *s)
{
    bool next = !c->removed && c->slot == s->slot + 1 && c->generation == s->generation;
    uint8_t *at = to + 1;

    to[0] = (uint8_t)((c->removed ? REMOVED : 0) | (c->tier ? SSD : 0) |
                      (c->space != s->space ? SPACE : 0) | (next ? NEXT : 0));
    if (c->space != s->space)
        *at++ = s->space = c->space;
    put_le(at, c->key.lo, 8);
    put_le(at + 8, c->key.hi, 8);
    at += 16;
    if (c->removed)
        return (size_t)(at - to);
    if (!next) {
        at = put_varint(at, c->slot);
        at = put_varint(at, c->generation);
    }
    s->slot = c->slot;
    s->generation = c->generation;
    return (size_t)(at - to);
}

int fk_batch_write(fk_bytes *out, const struct fk_batch_id *id, const struct fk_change *list,
                   uint32_t n)
{
    struct batch_state s = { 0, UINT32_MAX - 1, 0 };
    size_t start = out->len;

    if (fk_vec_reserve(out, start + HEADER_BYTES + n * 32u))
        return -ENOMEM;
    uint8_t *header = (uint8_t *)out->data + start, *body = header + HEADER_BYTES, *at = body;
    for (uint32_t i = 0; i < n; i++)
        at += put_change(at, &list[i], &s);
    header[0] = MAGIC;
    header[1] = VERSION;
    put_le(header + 2, n, 2);
    put_le(header + 4, (uint64_t)(at - body), 4);
    put_le(header + 8, batch_checksum(id, header, body, (size_t)(at - body)), 8);
    out->len = start + HEADER_BYTES + (size_t)(at - body);
    return 0;
}

int fk_batch_open(struct fk_batch_reader *r, const struct fk_batch_id *id, const void *data,
                  size_t bytes)
{
    const uint8_t *header = data;

    if (bytes < HEADER_BYTES || header[0] != MAGIC)
        return -EBADMSG;
    if (header[1] != VERSION)
        return -EPROTO;
    if (get_le(header + 4, 4) != bytes - HEADER_BYTES ||
        get_le(header + 8, 8) != batch_checksum(id, header, header + HEADER_BYTES,
                                                bytes - HEADER_BYTES))
        return -EBADMSG;
    *r = (struct fk_batch_reader){ .at = header + HEADER_BYTES, .end = header + bytes,
                                   .left = (uint32_t)get_le(header + 2, 2),
                                   .slot = UINT32_MAX - 1 };
    return 0;
}

static bool get_varint(struct fk_batch_reader *r, uint32_t *out)
{
    uint64_t v = 0;

    for (unsigned shift = 0; shift < 35 && r->at < r->end; shift += 7) {
        uint8_t byte = *r->at++;
        v |= (uint64_t)(byte & 0x7f) << shift;
        if (!(byte & 0x80)) {
            *out = (uint32_t)v;
            return v <= UINT32_MAX;
        }
    }
    return false;
}

int fk_batch_next(struct fk_batch_reader *r, struct fk_change *out)
{
    if (r->left == 0)
        return r->at == r->end ? 0 : -EBADMSG;
    if (r->end - r->at < 1)
        return -EBADMSG;
    uint8_t flags = *r->at++;
    size_t need = 16 + (flags & SPACE ? 1 : 0);
    if (flags & ~KNOWN_FLAGS || (size_t)(r->end - r->at) < need ||
        ((flags & REMOVED) && (flags & NEXT)))
        return -EBADMSG;
    if (flags & SPACE)
        r->space = *r->at++;
    if (r->space >= FK_CLUSTER_SPACES)
        return -EBADMSG;
    *out = (struct fk_change){ .key = { get_le(r->at, 8), get_le(r->at + 8, 8) },
                               .tier = flags & SSD ? 1 : 0, .space = r->space,
                               .removed = flags & REMOVED };
    r->at += 16;
    r->left--;
    if (flags & REMOVED)
        return 1;
    if (flags & NEXT)
        r->slot++;
    else if (!get_varint(r, &r->slot) || !get_varint(r, &r->generation))
        return -EBADMSG;
    out->slot = r->slot;
    out->generation = r->generation;
    return 1;
}

/* ---- heads, records, names ---- */

bool fk_number_read(const char *text, size_t bytes, uint64_t *out)
{
    uint64_t v = 0;

    if (bytes == 0 || bytes > 19)
        return false;
    for (size_t i = 0; i < bytes; i++) {
        if (text[i] < '0' || text[i] > '9')
            return false;
        v = v * 10 + (uint64_t)(text[i] - '0');
    }
    *out = v;
    return true;
}

bool fk_id_read(const char *text, size_t bytes, uint64_t *major, uint64_t *minor)
{
    const char *dash = memchr(text, '-', bytes);

    return dash && fk_number_read(text, (size_t)(dash - text), major) &&
           fk_number_read(dash + 1, bytes - (size_t)(dash + 1 - text), minor);
}

bool fk_cluster_name_valid(const char *name)
{
    size_t len = strspn(name, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._:-");

    return len > 0 && len < FK_CLUSTER_NAME_MAX && name[len] == '\0';
}

int fk_snapshot_head_write(const struct fk_snapshot_head *h, char out[FK_SNAPSHOT_HEAD_BYTES])
{
    return snprintf(out, FK_SNAPSHOT_HEAD_BYTES, "%d %" PRIu64 " %" PRIu64 " %" PRIu32 " %" PRIu64,
                    VERSION, h->epoch, h->seq, h->pieces, h->blocks);
}

int fk_snapshot_head_read(struct fk_snapshot_head *h, const char *data, size_t bytes)
{
    uint64_t v[5];

    for (int i = 0; i < 5; i++) {
        const char *space = i < 4 ? memchr(data, ' ', bytes) : data + bytes;
        if (!space || !fk_number_read(data, (size_t)(space - data), &v[i]))
            return -EBADMSG;
        bytes -= i < 4 ? (size_t)(space + 1 - data) : 0;
        data = space + 1;
    }
    if (v[0] != VERSION)
        return -EPROTO;
    if (v[1] == 0 || v[1] > FK_CLUSTER_EPOCH_MAX || v[3] >= 1u << 20)
        return -EBADMSG;
    *h = (struct fk_snapshot_head){ .epoch = v[1], .seq = v[2], .pieces = (uint32_t)v[3],
                                    .blocks = v[4] };
    return 0;
}

static json_t *spaces_to_json(const struct fk_node_record *rec)
{
    json_t *list = json_array();

    for (uint32_t i = 0; i < rec->n_spaces; i++) {
        char hex[33];
        fk_hex(hex, rec->space[i].fingerprint, 16);
        json_array_append_new(list, json_pack("{s:s, s:I}", "fingerprint", hex, "block_bytes",
                                              (json_int_t)rec->space[i].block_bytes));
    }
    return list;
}

int fk_node_record_write(fk_bytes *out, const struct fk_node_record *rec)
{
    json_t *addresses = json_array();

    for (uint32_t i = 0; i < rec->n_addresses; i++)
        json_array_append_new(addresses, json_string(rec->address[i]));
    json_t *root = json_pack("{s:i, s:s, s:s, s:o, s:o, s:I, s:[I,I], s:[I,I], s:i, s:I}", "version",
        VERSION, "name", rec->name, "zone", rec->zone, "addresses", addresses, "spaces",
        spaces_to_json(rec), "ttl_ms", (json_int_t)rec->ttl_ms, "blocks", (json_int_t)rec->blocks[0],
        (json_int_t)rec->blocks[1], "slots", (json_int_t)rec->slots[0], (json_int_t)rec->slots[1],
        "load", (int)rec->load, "seq", (json_int_t)rec->seq);
    fk_autofree char *text = root ? json_dumps(root, JSON_COMPACT) : NULL;
    json_decref(root);
    if (!text)
        return -ENOMEM;
    return strlen(text) + 32 > FK_RECORD_BYTES ? -E2BIG : fk_bytes_add(out, text, strlen(text));
}

static bool get_text(const json_t *from, char *to, size_t size)
{
    const char *text = json_string_value(from);

    if (!text || json_string_length(from) != strlen(text) || strlen(text) >= size)
        return false;
    for (size_t i = 0; text[i]; i++)
        if ((unsigned char)text[i] < ' ' || text[i] == 0x7f)
            return false;               /* it will be printed */
    memcpy(to, text, strlen(text) + 1);
    return true;
}

static bool get_count(const json_t *from, uint64_t max, uint64_t *out)
{
    if (!json_is_integer(from) || json_integer_value(from) < 0 ||
        (uint64_t)json_integer_value(from) > max)
        return false;
    *out = (uint64_t)json_integer_value(from);
    return true;
}

static bool get_fingerprint(const json_t *from, uint8_t out[16])
{
    const char *text = json_string_value(from);

    if (!text || strlen(text) != 32 || strspn(text, "0123456789abcdef") != 32)
        return false;
    for (int i = 0; i < 16; i++) {
        unsigned byte;
        sscanf(text + 2 * i, "%2x", &byte);
        out[i] = (uint8_t)byte;
    }
    return true;
}

static bool get_lists(const json_t *root, struct fk_node_record *rec)
{
    const json_t *addresses = json_object_get(root, "addresses");
    const json_t *spaces = json_object_get(root, "spaces");
    size_t n = json_array_size(addresses), m = json_array_size(spaces);

    if (!json_is_array(addresses) || !json_is_array(spaces) || n > FK_CLUSTER_ADDRESSES ||
        m > FK_CLUSTER_SPACES)
        return false;
    for (size_t i = 0; i < n; i++)
        if (!get_text(json_array_get(addresses, i), rec->address[i], FK_CLUSTER_ADDRESS_MAX))
            return false;
    for (size_t i = 0; i < m; i++) {
        const json_t *s = json_array_get(spaces, i);
        if (!get_fingerprint(json_object_get(s, "fingerprint"), rec->space[i].fingerprint) ||
            !get_count(json_object_get(s, "block_bytes"), INT64_MAX, &rec->space[i].block_bytes))
            return false;
    }
    rec->n_addresses = (uint32_t)n;
    rec->n_spaces = (uint32_t)m;
    return true;
}

/* What only informs may be missing: others may write less. */
static bool get_fields(const json_t *root, struct fk_node_record *rec)
{
    uint64_t load = 0;

    for (size_t i = 0; i < 2; i++) {
        get_count(json_array_get(json_object_get(root, "blocks"), i), INT64_MAX, &rec->blocks[i]);
        get_count(json_array_get(json_object_get(root, "slots"), i), INT64_MAX, &rec->slots[i]);
    }
    if (get_count(json_object_get(root, "load"), 1000, &load))
        rec->load = (uint32_t)load;
    get_count(json_object_get(root, "seq"), INT64_MAX, &rec->seq);
    get_text(json_object_get(root, "zone"), rec->zone, sizeof(rec->zone));
    return get_text(json_object_get(root, "name"), rec->name, sizeof(rec->name)) &&
           fk_cluster_name_valid(rec->name) &&
           get_count(json_object_get(root, "ttl_ms"), UINT32_MAX, &rec->ttl_ms) &&
           get_lists(root, rec);
}

int fk_node_record_read(struct fk_node_record *rec, uint64_t *epoch, const char *data, size_t bytes)
{
    const char *line = bytes <= FK_RECORD_BYTES ? memchr(data, '\n', bytes) : NULL;
    uint64_t version = 0;

    memset(rec, 0, sizeof(*rec));
    if (!line || !fk_number_read(data, (size_t)(line - data), epoch) || *epoch == 0 ||
        *epoch > FK_CLUSTER_EPOCH_MAX)
        return -EBADMSG;
    json_t *root = json_loadb(line + 1, bytes - (size_t)(line + 1 - data), 0, NULL);
    if (!root)
        return -EBADMSG;
    int rc = 0;
    if (!get_count(json_object_get(root, "version"), INT64_MAX, &version))
        rc = -EBADMSG;
    else if (version != VERSION)
        rc = -EPROTO;
    else if (!get_fields(root, rec))
        rc = -EBADMSG;
    json_decref(root);
    return rc;
}
