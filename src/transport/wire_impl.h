/* wire_impl.h - numbers and frames, for wire.c, hello.c and mooncake_wire.c. */
#ifndef FK_TRANSPORT_WIRE_IMPL_H
#define FK_TRANSPORT_WIRE_IMPL_H

#include <endian.h>
#include <string.h>

#include "transport/wire.h"

#define FK_HELLO_MAX 512u               /* a payload before the peer is known */

static inline void fk_put16(uint8_t *p, uint16_t v) { v = htole16(v); memcpy(p, &v, 2); }
static inline void fk_put32(uint8_t *p, uint32_t v) { v = htole32(v); memcpy(p, &v, 4); }
static inline void fk_put64(uint8_t *p, uint64_t v) { v = htole64(v); memcpy(p, &v, 8); }
static inline uint16_t fk_get16(const uint8_t *p) { uint16_t v; memcpy(&v, p, 2); return le16toh(v); }
static inline uint32_t fk_get32(const uint8_t *p) { uint32_t v; memcpy(&v, p, 4); return le32toh(v); }
static inline uint64_t fk_get64(const uint8_t *p) { uint64_t v; memcpy(&v, p, 8); return le64toh(v); }

/* Room for a payload in a queued frame, then its MAC once it is filled. */
uint8_t *fk_frame_begin(struct fk_session *s, struct fk_stream *out, unsigned type, uint32_t bytes);
void fk_frame_end(struct fk_session *s, uint8_t *payload, uint32_t bytes);

#endif
