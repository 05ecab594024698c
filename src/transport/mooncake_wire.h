/*
 * mooncake_wire.h - what Mooncake's engines say to each other over TCP (its wire 2, as its 0.3.12 and 0.3.13 speak it):
 * data requests, the handshake's messages, segment descriptors, and answers of an HTTP metadata server. Bytes in, bytes
 * out; fuzzed (fuzz/fuzz_mooncake.c).
 *
 *   data       request u64 bytes | u64 address | u8 opcode | 7 zero      opcode READ 0, WRITE 1; + 0x80: wire 2
 *              answer  u64 status (magic in the upper half: 0 ok, 1 refused), then the bytes
 *   handshake  u64 bytes, with the type | u8 type (1: metadata) | JSON
 *
 * A FlexKV node's segment has two buffers for each of its windows: the slots, and a header of FK_MOON_HEADER bytes for
 * each slot. Addresses are no pointers: they say which window and slot. A reader takes the slot, then its header,
 * and knows by key, generation, epoch and checksum what it got.
 */
#ifndef FK_TRANSPORT_MOONCAKE_WIRE_H
#define FK_TRANSPORT_MOONCAKE_WIRE_H

#include "transport/transport.h"

#define FK_MOON_REQUEST 24u
#define FK_MOON_STATUS 8u
#define FK_MOON_READ 0u
#define FK_MOON_WRITE 1u
#define FK_MOON_V2 0x80u
#define FK_MOON_OK 0x4d43545600000000ull
#define FK_MOON_REFUSED (FK_MOON_OK | 1)
#define FK_MOON_METADATA 1u             /* type of a handshake message */
#define FK_MOON_MESSAGE_HEAD 9u
#define FK_MOON_MESSAGE_MAX (1u << 20)
#define FK_MOON_HEADER 64u
#define FK_MOON_WINDOWS 256u
#define FK_MOON_NAME 96u

void fk_moon_put_request(uint8_t *p, uint64_t bytes, uint64_t address, unsigned opcode);
/* 0, or -EPROTO: no such opcode, or not zero what should be. */
int fk_moon_get_request(const uint8_t *p, uint64_t *bytes, uint64_t *address, unsigned *opcode);
void fk_moon_put_status(uint8_t *p, uint64_t status);
uint64_t fk_moon_get_status(const uint8_t *p);

/* A slot's header, after the slot. */
void fk_moon_put_header(uint8_t *p, const struct fk_grant *g);
/* 0; -ENOENT: another block is in the slot, or none; -EPROTO: no header. */
int fk_moon_check_header(const uint8_t *p, const struct fk_block_ref *r, uint64_t *checksum);

/* Where in its segment a window lies, by its number; and back. */
uint64_t fk_moon_slot_address(uint32_t window, const struct fk_window *w, uint32_t slot);
uint64_t fk_moon_header_address(uint32_t window, uint32_t slot);
/* What a peer asks for: slots [*slot, *offset) on, or one header. 0 or -EACCES: not within a window. */
int fk_moon_locate(const struct fk_window *w, uint32_t n, uint64_t address, uint64_t bytes, uint32_t *window,
                   uint32_t *slot, uint32_t *offset, bool *header);

/* ---- segment descriptors ---- */
struct fk_moon_window { struct fk_window w; uint64_t slots_at, headers_at; };

struct fk_moon_segment {
    char host[64];                      /* "": not said */
    uint16_t port;
    int version;
    uint32_t n_windows;                 /* of a FlexKV node; a foreign engine has none */
    struct fk_moon_window windows[FK_MOON_WINDOWS];
};

/* malloc'd, or NULL. */
char *fk_moon_describe(const char *name, const char *host, uint16_t port, const struct fk_window *w, uint32_t n);
/* 0 or -EPROTO. */
int fk_moon_parse_segment(const char *json, size_t bytes, struct fk_moon_segment *out);
/* 1: a whole message, its body; 0: not yet; -EPROTO. */
int fk_moon_message(const uint8_t *data, size_t bytes, unsigned *type, const char **body, size_t *body_bytes);
/* 1: the whole answer, its body; 0: not yet; -ENOENT: 404; -EPROTO. ended: no more will come. */
int fk_moon_http(const uint8_t *data, size_t bytes, bool ended, const char **body, size_t *body_bytes);
/* "http://IP:PORT/path" -> its parts; 0 or -EINVAL. */
int fk_moon_url(const char *url, char host_port[FK_TRANSPORT_ADDRESS_MAX], char path[128]);
/* A request for the key mooncake/KIND/NAME; how long it is, or -ENAMETOOLONG. */
int fk_moon_http_request(char *out, size_t bytes, const char *method, const char *host_port, const char *path,
                         const char *kind, const char *name, const char *body);

#endif
