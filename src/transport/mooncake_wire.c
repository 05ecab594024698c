/* mooncake_wire.c - see mooncake_wire.h. */
#include "transport/mooncake_wire.h"

#include <ctype.h>
#include <inttypes.h>
#include <jansson.h>
#include <stdio.h>
#include <time.h>

#include "base/util.h"
#include "transport/wire_impl.h"

#define WINDOW_SHIFT 44                 /* a window's addresses: its number + 1, and 44 bits */
#define HEADERS_BIT (1ull << 43)
#define HEADER_MAGIC 0x314b4c42564b4c46ull      /* "FLKVBLK1" */

/* ---- data ---- */

void fk_moon_put_request(uint8_t *p, uint64_t bytes, uint64_t address, unsigned opcode)
{
    memset(p, 0, FK_MOON_REQUEST);
    fk_put64(p, bytes);
    fk_put64(p + 8, address);
    p[16] = (uint8_t)opcode;
}

int fk_moon_get_request(const uint8_t *p, uint64_t *bytes, uint64_t *address, unsigned *opcode)
{
    *bytes = fk_get64(p);
    *address = fk_get64(p + 8);
    *opcode = p[16];                    /* what follows is padding of a struct: anything */
    return (*opcode & ~FK_MOON_V2) > FK_MOON_WRITE ? -EPROTO : 0;
}

void fk_moon_put_status(uint8_t *p, uint64_t status) { fk_put64(p, status); }
uint64_t fk_moon_get_status(const uint8_t *p) { return fk_get64(p); }

void fk_moon_put_header(uint8_t *p, const struct fk_grant *g)
{
    memset(p, 0, FK_MOON_HEADER);
    fk_put64(p, HEADER_MAGIC);
    fk_put64(p + 8, g->key.lo);
    fk_put64(p + 16, g->key.hi);
    fk_put64(p + 24, g->generation);
    fk_put64(p + 32, g->epoch);
    fk_put64(p + 40, g->checksum);
    fk_put32(p + 48, g->bytes);
}

int fk_moon_check_header(const uint8_t *p, const struct fk_block_ref *r, uint64_t *checksum)
{
    struct fk_key key = { fk_get64(p + 8), fk_get64(p + 16) };

    if (fk_get64(p) != HEADER_MAGIC)
        return -EPROTO;
    *checksum = fk_get64(p + 40);
    return fk_key_equal(key, r->key) && fk_get64(p + 24) == r->generation && fk_get64(p + 32) == r->epoch &&
           fk_get32(p + 48) == r->bytes ? 0 : -ENOENT;
}

uint64_t fk_moon_slot_address(uint32_t window, const struct fk_window *w, uint32_t slot)
{
    return ((uint64_t)window + 1) << WINDOW_SHIFT | (uint64_t)slot * w->slot_bytes;
}

uint64_t fk_moon_header_address(uint32_t window, uint32_t slot)
{
    return ((uint64_t)window + 1) << WINDOW_SHIFT | HEADERS_BIT | (uint64_t)slot * FK_MOON_HEADER;
}

int fk_moon_locate(const struct fk_window *w, uint32_t n, uint64_t address, uint64_t bytes, uint32_t *window,
                   uint32_t *slot, uint32_t *offset, bool *header)
{
    uint64_t number = address >> WINDOW_SHIFT, at = address & (HEADERS_BIT - 1);

    if (number < 1 || number > n || !bytes)
        return -EACCES;
    *window = (uint32_t)number - 1;
    *header = (address & HEADERS_BIT) != 0;
    uint64_t each = *header ? FK_MOON_HEADER : w[*window].slot_bytes, size = each * w[*window].slots;
    if (at >= size || bytes > size - at || (*header && (at % each || bytes != each)))
        return -EACCES;
    *slot = (uint32_t)(at / each);
    *offset = (uint32_t)(at % each);
    return 0;
}

/* ---- segment descriptors ---- */

static json_t *buffer_json(uint64_t address, uint64_t bytes, const char *what, const struct fk_window *w)
{
    char name[FK_MOON_NAME];

    snprintf(name, sizeof(name), "flexkv1:%s:%016" PRIx64 ":%016" PRIx64 ":%u:%u", what, w->space, w->ns, w->tier,
             w->slot_bytes);
    return json_pack("{s:I, s:I, s:s}", "addr", (json_int_t)address, "length", (json_int_t)bytes, "name", name);
}

char *fk_moon_describe(const char *name, const char *host, uint16_t port, const struct fk_window *w, uint32_t n)
{
    char when[64];
    time_t now = time(NULL);
    struct tm tm;
    json_t *list = json_array();

    strftime(when, sizeof(when), "%Y-%m-%d %H:%M:%S.000000", gmtime_r(&now, &tm));
    for (uint32_t i = 0; i < n; i++) {
        json_array_append_new(list, buffer_json(fk_moon_slot_address(i, &w[i], 0),
                                                (uint64_t)w[i].slots * w[i].slot_bytes, "slots", &w[i]));
        json_array_append_new(list, buffer_json(fk_moon_header_address(i, 0), (uint64_t)w[i].slots * FK_MOON_HEADER,
                                                "headers", &w[i]));
    }
    json_t *o = json_pack("{s:o, s:s, s:s, s:s, s:s, s:i, s:i, s:s}", "buffers", list, "name", name, "protocol", "tcp",
                          "rdma_server_name", "", "tcp_data_host", host, "tcp_data_port", (int)port,
                          "tcp_proto_version", 2, "timestamp", when);
    char *text = o ? json_dumps(o, JSON_COMPACT) : NULL;
    json_decref(o);
    return text;
}

static struct fk_moon_window *window_of(struct fk_moon_segment *s, const struct fk_window *w)
{
    for (uint32_t i = 0; i < s->n_windows; i++) {
        struct fk_window *x = &s->windows[i].w;
        if (x->space == w->space && x->ns == w->ns && x->tier == w->tier && x->slot_bytes == w->slot_bytes)
            return &s->windows[i];
    }
    if (s->n_windows == FK_MOON_WINDOWS)
        return NULL;
    s->windows[s->n_windows] = (struct fk_moon_window){ .w = *w };
    return &s->windows[s->n_windows++];
}

static void parse_buffer(struct fk_moon_segment *s, json_t *b)
{
    const char *name = json_string_value(json_object_get(b, "name"));
    uint64_t address = (uint64_t)json_integer_value(json_object_get(b, "addr"));
    uint64_t bytes = (uint64_t)json_integer_value(json_object_get(b, "length"));
    struct fk_window w = { 0 };
    char what[16];
    int end = 0;

    if (!name || sscanf(name, "flexkv1:%15[a-z]:%16" SCNx64 ":%16" SCNx64 ":%9u:%10u%n", what, &w.space, &w.ns,
                        &w.tier, &w.slot_bytes, &end) != 5 || name[end])
        return;                         /* a foreign engine's */
    if (!w.slot_bytes || w.slot_bytes > FK_TRANSPORT_BLOCK_MAX)
        return;
    struct fk_moon_window *x = window_of(s, &w);
    if (!x)
        return;
    if (strcmp(what, "slots") == 0) {
        x->slots_at = address;
        x->w.slots = (uint32_t)fk_min(bytes / w.slot_bytes, (uint64_t)UINT32_MAX);
    } else if (strcmp(what, "headers") == 0) {
        x->headers_at = address;
    }
}

int fk_moon_parse_segment(const char *json, size_t bytes, struct fk_moon_segment *s)
{
    json_t *o = json_loadb(json, bytes, JSON_REJECT_DUPLICATES, NULL), *b;
    const char *protocol = json_string_value(json_object_get(o, "protocol"));
    const char *host = json_string_value(json_object_get(o, "tcp_data_host"));
    json_int_t port = json_integer_value(json_object_get(o, "tcp_data_port"));
    size_t i;

    memset(s, 0, sizeof(*s));
    if (!protocol || strcmp(protocol, "tcp") || port < 1 || port > 65535) {
        json_decref(o);
        return -EPROTO;
    }
    if (host && strlen(host) < sizeof(s->host))
        snprintf(s->host, sizeof(s->host), "%s", host);
    s->port = (uint16_t)port;
    s->version = (int)fk_min(json_integer_value(json_object_get(o, "tcp_proto_version")), (json_int_t)INT32_MAX);
    json_array_foreach(json_object_get(o, "buffers"), i, b)
        parse_buffer(s, b);
    json_decref(o);
    return 0;
}

/* ---- handshake and HTTP ---- */

int fk_moon_message(const uint8_t *data, size_t bytes, unsigned *type, const char **body, size_t *body_bytes)
{
    if (bytes < FK_MOON_MESSAGE_HEAD)
        return 0;
    uint64_t n = fk_get64(data);
    if (n < 1 || n > FK_MOON_MESSAGE_MAX)
        return -EPROTO;
    *type = data[8];
    *body = (const char *)data + FK_MOON_MESSAGE_HEAD;
    *body_bytes = n - 1;
    return bytes - 8 >= n;
}

static const char *find_end(const char *p, size_t bytes)
{
    const char *end = memmem(p, bytes, "\r\n\r\n", 4);

    return end ? end + 4 : NULL;
}

/* -1: not said; -2: nonsense. */
static long long content_length(const char *p, const char *end)
{
    static const char name[] = "content-length:";

    for (; p < end; p++) {
        if (p[-1] != '\n' || (size_t)(end - p) < sizeof(name) || strncasecmp(p, name, sizeof(name) - 1))
            continue;
        long long n = 0;
        for (p += sizeof(name) - 1; p < end && *p == ' '; p++)
            ;
        if (p == end || !isdigit((unsigned char)*p))
            return -2;
        for (; p < end && isdigit((unsigned char)*p); p++) {
            n = n * 10 + (*p - '0');
            if (n > FK_MOON_MESSAGE_MAX)
                return -2;
        }
        return n;
    }
    return -1;
}

int fk_moon_http(const uint8_t *data, size_t bytes, bool ended, const char **body, size_t *body_bytes)
{
    const char *p = (const char *)data, *head_end = find_end(p, bytes);

    if (!head_end)
        return ended || bytes > FK_MOON_MESSAGE_MAX ? -EPROTO : 0;
    if ((size_t)(head_end - p) < 13 || strncmp(p, "HTTP/1.", 7) || p[8] != ' ')
        return -EPROTO;
    long long n = content_length(p + 1, head_end);
    size_t have = bytes - (size_t)(head_end - p);
    if (n == -2 || have > FK_MOON_MESSAGE_MAX)
        return -EPROTO;
    if (n >= 0 ? have < (size_t)n : !ended)
        return ended ? -EPROTO : 0;
    *body = head_end;
    *body_bytes = n >= 0 ? (size_t)n : have;
    return strncmp(p + 9, "200", 3) == 0 ? 1 : strncmp(p + 9, "404", 3) == 0 ? -ENOENT : -EPROTO;
}

int fk_moon_url(const char *url, char host_port[FK_TRANSPORT_ADDRESS_MAX], char path[128])
{
    const char *p = strncmp(url, "http://", 7) == 0 ? url + 7 : NULL, *slash = p ? strchr(p, '/') : NULL;
    size_t n = slash ? (size_t)(slash - p) : 0;

    if (!n || n >= FK_TRANSPORT_ADDRESS_MAX || strlen(slash) >= 128)
        return -EINVAL;
    for (const char *c = slash; *c; c++)
        if (*c <= ' ' || *c == '?' || *c == '#' || (unsigned char)*c >= 127)
            return -EINVAL;
    memcpy(host_port, p, n);
    host_port[n] = '\0';
    memcpy(path, slash, strlen(slash) + 1);
    return 0;
}

int fk_moon_http_request(char *out, size_t bytes, const char *method, const char *host_port, const char *path,
                         const char *kind, const char *name, const char *body)
{
    char escaped[3 * FK_TRANSPORT_ADDRESS_MAX];
    size_t at = 0;

    for (const char *p = name; *p; p++) {
        if (at + 4 > sizeof(escaped))
            return -ENAMETOOLONG;
        at += (size_t)snprintf(escaped + at, 4, isalnum((unsigned char)*p) || strchr("-._~", *p) ? "%c" : "%%%02X",
                               (unsigned char)*p);
    }
    escaped[at] = '\0';
    int n = snprintf(out, bytes, "%s %s?key=mooncake%%2F%s%%2F%s HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n"
                     "Content-Type: application/json\r\nContent-Length: %zu\r\n\r\n%s", method, path, kind, escaped,
                     host_port, body ? strlen(body) : 0, body ? body : "");
    return n < 0 || (size_t)n >= bytes ? -ENAMETOOLONG : n;
}
