/*
 * fuzz_mooncake.c - libFuzzer target: what comes from Mooncake's engines and metadata servers, and the configuration file's
 * URLs.
 *
 * Input: byte 0 chooses: 0 a data request, 1 a segment descriptor, 2 a handshake message, 3 an HTTP answer, 4 a URL,
 * 5 a slot's header.
 */
#include "base/util.h"
#include "transport/mooncake_wire.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static const struct fk_window windows[2] = { { 1, 2, 0, 65536, 100 }, { 1, 2, 1, 1000, 7 } };

static void request(const uint8_t *p)
{
    uint64_t bytes, address;
    uint32_t window, slot, offset;
    unsigned opcode;
    bool header;

    if (fk_moon_get_request(p, &bytes, &address, &opcode) ||
        fk_moon_locate(windows, 2, address, bytes, &window, &slot, &offset, &header))
        return;
    const struct fk_window *w = &windows[window];
    if (window >= 2 || slot >= w->slots || offset >= w->slot_bytes ||
        (header ? bytes != FK_MOON_HEADER || offset
                : (uint64_t)slot * w->slot_bytes + offset + bytes > (uint64_t)w->slots * w->slot_bytes))
        __builtin_trap();
}

static void within(const uint8_t *p, size_t n, const char *body, size_t bytes)
{
    if ((const uint8_t *)body < p || (const uint8_t *)body + bytes > p + n)
        __builtin_trap();
}

static void segment(const uint8_t *p, size_t n)
{
    static struct fk_moon_segment s;

    if (fk_moon_parse_segment((const char *)p, n, &s))
        return;
    if (!s.port || s.n_windows > FK_MOON_WINDOWS || strlen(s.host) >= sizeof(s.host))
        __builtin_trap();
    for (uint32_t i = 0; i < s.n_windows; i++)
        if (!s.windows[i].w.slot_bytes || s.windows[i].w.slot_bytes > FK_TRANSPORT_BLOCK_MAX)
            __builtin_trap();
}

static void text(int which, const uint8_t *p, size_t n)
{
    char host[FK_TRANSPORT_ADDRESS_MAX], path[128];
    char *copy = strndup((const char *)p, n);
    const char *body;
    size_t bytes;
    unsigned type;

    if (which == 2 && fk_moon_message(p, n, &type, &body, &bytes) == 1)
        within(p, n, body, bytes);
    if (which == 3)
        for (int ended = 0; ended < 2; ended++)
            if (fk_moon_http(p, n, ended, &body, &bytes) == 1)
                within(p, n, body, bytes);
    if (which == 4 && copy && fk_moon_url(copy, host, path) == 0 && (strlen(host) >= sizeof(host) || path[0] != '/'))
        __builtin_trap();
    free(copy);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const struct fk_block_ref ref = { .key = { 1, 2 }, .generation = 2, .epoch = 3, .bytes = 65536 };
    uint64_t checksum;

    if (size < 2)
        return 0;
    uint8_t *p = malloc(size - 1);
    if (!p)
        return 0;
    memcpy(p, data + 1, size - 1);
    switch (data[0] % 6) {
    case 0: if (size > FK_MOON_REQUEST) request(p); break;
    case 1: segment(p, size - 1); break;
    case 5: if (size > FK_MOON_HEADER) (void)fk_moon_check_header(p, &ref, &checksum); break;
    default: text(data[0] % 6, p, size - 1);
    }
    free(p);
    return 0;
}
