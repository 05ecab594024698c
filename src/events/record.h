/*
 * record.h - a stream of messages in a file, as `flexkv events --record` writes and --play reads it.
 *
 *   header   "FLEXKVEV" | version u32 | 0 u32
 *   message  bytes u32 | frames u32 | checksum u64 | time_us u64 | frames x (bytes u32 | data)
 *
 * Little endian. bytes counts what follows the checksum, which is of those bytes, seeded with the
 * message's place among the others: none can be missing, doubled or moved unnoticed. A file that ends
 * within a message was cut off; what is before it is good.
 *
 * Reads and writes stdio streams; one thread. Part of the program, not of the library.
 */
#ifndef FK_EVENTS_RECORD_H
#define FK_EVENTS_RECORD_H

#include <stdio.h>

#include "base/util.h"
#include "events/history.h"

#define FK_RECORD_MAX_FRAMES 8
#define FK_RECORD_MAX_BYTES (64u << 20)

struct fk_record {
    uint64_t number;                /* of the next message, from 0 */
    uint64_t time_us;               /* since the recording began */
    size_t n_frames;
    struct fk_frame frame[FK_RECORD_MAX_FRAMES];    /* valid until the next message */
    FK_VEC(unsigned char) body;
};

int fk_record_begin(FILE *out);
int fk_record_write(FILE *out, struct fk_record *r, uint64_t time_us, const struct fk_frame *frames,
                    size_t n);
/* 0, or -EPROTO and why: no such file, or another version. */
int fk_record_check_header(FILE *in, char *why, size_t why_bytes);
/* 1: a message; 0: the end; -EBADMSG, -EIO, -ENOMEM and why. */
int fk_record_read(FILE *in, struct fk_record *r, char *why, size_t why_bytes);
void fk_record_free(struct fk_record *r);

#endif
