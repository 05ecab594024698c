/* record.c - see record.h. */
#include "events/record.h"

#include <endian.h>

#include "base/checksum.h"

#define MAGIC "FLEXKVEV"
#define VERSION 1u

struct header { char magic[8]; uint32_t version, zero; };
struct head { uint32_t bytes, frames; uint64_t checksum; };

_Static_assert(sizeof(struct header) == 16 && sizeof(struct head) == 16, "no holes");

static int put(FILE *out, const void *data, size_t n)
{
    return fwrite(data, 1, n, out) == n ? 0 : errno ? -errno : -EIO;
}

int fk_record_begin(FILE *out)
{
    struct header h = { .version = htole32(VERSION) };

    memcpy(h.magic, MAGIC, sizeof(h.magic));
    return put(out, &h, sizeof(h));
}

static int append(struct fk_record *r, const void *data, size_t n)
{
    if (fk_vec_reserve(&r->body, r->body.len + n))
        return -ENOMEM;
    if (n)
        memcpy(r->body.data + r->body.len, data, n);
    r->body.len += n;
    return 0;
}

int fk_record_write(FILE *out, struct fk_record *r, uint64_t time_us, const struct fk_frame *frames,
                    size_t n)
{
    uint64_t time = htole64(time_us);

    r->body.len = 0;
    int rc = n > FK_RECORD_MAX_FRAMES ? -E2BIG : append(r, &time, sizeof(time));
    for (size_t i = 0; i < n && !rc; i++) {
        uint32_t bytes = htole32((uint32_t)frames[i].bytes);
        rc = append(r, &bytes, sizeof(bytes));
        if (!rc)
            rc = append(r, frames[i].data, frames[i].bytes);
    }
    if (!rc && r->body.len > FK_RECORD_MAX_BYTES)
        rc = -E2BIG;
    if (rc)
        return rc;
    struct head h = { .bytes = htole32((uint32_t)r->body.len), .frames = htole32((uint32_t)n),
                      .checksum = htole64(fk_checksum(r->number++, r->body.data, r->body.len)) };
    rc = put(out, &h, sizeof(h));
    return rc ? rc : put(out, r->body.data, r->body.len);
}

int fk_record_check_header(FILE *in, char *why, size_t why_bytes)
{
    struct header h;

    if (fread(&h, 1, sizeof(h), in) != sizeof(h) || memcmp(h.magic, MAGIC, sizeof(h.magic))) {
        snprintf(why, why_bytes, "this is no recording of KV events");
        return -EPROTO;
    }
    if (le32toh(h.version) != VERSION) {
        snprintf(why, why_bytes, "the recording has version %u; this program reads %u",
                 le32toh(h.version), VERSION);
        return -EPROTO;
    }
    return 0;
}

static int bad(const struct fk_record *r, const char *what, char *why, size_t why_bytes)
{
    snprintf(why, why_bytes, "message %llu: %s", (unsigned long long)r->number, what);
    return -EBADMSG;
}

/* The body's frames; false: they don't add up to it. */
static bool split(struct fk_record *r, size_t n)
{
    const unsigned char *at = r->body.data, *end = at + r->body.len;
    uint64_t time;

    if ((size_t)(end - at) < sizeof(time))
        return false;
    memcpy(&time, at, sizeof(time));
    at += sizeof(time);
    r->time_us = le64toh(time);
    for (size_t i = 0; i < n; i++) {
        uint32_t bytes;
        if ((size_t)(end - at) < sizeof(bytes))
            return false;
        memcpy(&bytes, at, sizeof(bytes));
        at += sizeof(bytes);
        bytes = le32toh(bytes);
        if ((size_t)(end - at) < bytes)
            return false;
        r->frame[i] = (struct fk_frame){ at, bytes };
        at += bytes;
    }
    r->n_frames = n;
    return at == end;
}

/* In pieces: a length that lies costs no more memory than there are bytes. */
static int read_body(FILE *in, struct fk_record *r, size_t bytes)
{
    r->body.len = 0;
    while (r->body.len < bytes) {
        size_t n = fk_min(bytes - r->body.len, (size_t)65536);
        if (fk_vec_reserve(&r->body, r->body.len + n))
            return -ENOMEM;
        size_t got = fread(r->body.data + r->body.len, 1, n, in);
        r->body.len += got;
        if (got < n)
            return ferror(in) ? -EIO : -EBADMSG;
    }
    return 0;
}

int fk_record_read(FILE *in, struct fk_record *r, char *why, size_t why_bytes)
{
    struct head h;
    size_t got = fread(&h, 1, sizeof(h), in);

    if (got == 0 && !ferror(in))
        return 0;
    if (ferror(in)) {
        snprintf(why, why_bytes, "%s", strerror(errno));
        return -EIO;
    }
    if (got < sizeof(h))
        return bad(r, "the file ends within it", why, why_bytes);
    if (le32toh(h.bytes) > FK_RECORD_MAX_BYTES || le32toh(h.frames) > FK_RECORD_MAX_FRAMES)
        return bad(r, "its size cannot be", why, why_bytes);
    int rc = read_body(in, r, le32toh(h.bytes));
    if (rc == -EBADMSG)
        return bad(r, "the file ends within it", why, why_bytes);
    if (rc) {
        snprintf(why, why_bytes, "%s", strerror(-rc));
        return rc;
    }
    if (fk_checksum(r->number, r->body.data, r->body.len) != le64toh(h.checksum))
        return bad(r, "its checksum is wrong", why, why_bytes);
    if (!split(r, le32toh(h.frames)))
        return bad(r, "its frames do not fit", why, why_bytes);
    r->number++;
    return 1;
}

void fk_record_free(struct fk_record *r)
{
    fk_vec_free(&r->body);
}
