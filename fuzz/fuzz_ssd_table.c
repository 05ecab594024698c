/*
 * fuzz_ssd_table.c - libFuzzer target: an SSD store is opened, recovered and used over files
 * whose contents are the fuzzer's. Nothing may crash, no slot out of range may be found, and a
 * read must never give bytes that do not match the checksum of its record.
 *
 * Input: byte 0: bits 0-1 directories - 1, bit 2 seal the headers' crc, bit 3 seal the
 * records' crc, bit 4 take the geometry asked for from the header, bit 5 recreate, bit 6 seal the hint; byte 1:
 * slots - 1; then for each directory 160 bytes of header, 160 of its copy and 64 a record; then 256 of the hint.
 * What is missing is zero.
 */
#include <stdio.h>

#include "base/log.h"
#include "base/util.h"
#include "tier/ssd.h"
#include "tier/ssd_format.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* --- an engine whose files are memory --- */

#define MAX_FILES 8
#define MAX_BYTES (4u << 20)

struct mem_engine {
    struct fk_engine base;
    uint8_t *bytes[MAX_FILES];
    uint64_t size[MAX_FILES];
    struct fk_io *done;
    unsigned inflight;
};

static struct mem_engine *self(struct fk_engine *e)
{
    return (struct mem_engine *)e;
}

static int mem_resize(struct mem_engine *m, uint32_t file, uint64_t bytes)
{
    if (bytes > MAX_BYTES)
        return -ENOSPC;
    uint8_t *p = realloc(m->bytes[file], bytes);
    if (!p)
        abort();
    memset(p + m->size[file], 0, bytes - m->size[file]);
    m->bytes[file] = p;
    m->size[file] = bytes;
    return 0;
}

/* "/0/x.data" is file 0, "/0/x.table" 1, "/1/x.data" 2, ... */
static int mem_open(struct fk_engine *e, const char *path, uint64_t bytes, unsigned flags,
                    uint32_t *file, bool *created)
{
    struct mem_engine *m = self(e);

    *file = (uint32_t)(path[1] - '0') * 2 + (strstr(path, ".table") != NULL);
    *created = false;
    if (!m->bytes[*file] && !(flags & FK_FILE_CREATE))
        return -ENOENT;
    return m->size[*file] < bytes && (flags & FK_FILE_PREALLOC) ? mem_resize(m, *file, bytes) : 0;
}

static void mem_close(struct fk_engine *e, uint32_t file)
{
}

static int mem_size(struct fk_engine *e, uint32_t file, uint64_t *bytes)
{
    *bytes = self(e)->size[file];
    return 0;
}

static int mem_register(struct fk_engine *e, void *base, uint64_t bytes)
{
    return 0;
}

static void mem_submit(struct fk_engine *e, struct fk_io *io)
{
    struct mem_engine *m = self(e);
    uint64_t size = m->size[io->file];
    uint64_t n = io->offset < size ? fk_min((uint64_t)io->bytes, size - io->offset) : 0;

    if (n > 0 && io->op == FK_IO_READ)
        memcpy(io->buf, m->bytes[io->file] + io->offset, n);
    else if (n > 0)
        memcpy(m->bytes[io->file] + io->offset, io->buf, n);
    io->result = (int32_t)n;
    io->next = m->done;
    m->done = io;
    m->inflight++;
}

static void mem_flush(struct fk_engine *e)
{
}

static int mem_reap(struct fk_engine *e, struct fk_io **out, int max, uint64_t timeout_us)
{
    struct mem_engine *m = self(e);
    int n = 0;

    for (; m->done && n < max; n++) {
        out[n] = m->done;
        m->done = m->done->next;
        m->inflight--;
    }
    return n;
}

static unsigned mem_inflight(struct fk_engine *e)
{
    return self(e)->inflight;
}

static const struct fk_engine_ops mem_ops = {
    .name = "mem", .open = mem_open, .close = mem_close, .size = mem_size,
    .register_memory = mem_register, .submit = mem_submit, .flush = mem_flush, .reap = mem_reap,
    .wake = mem_flush, .inflight = mem_inflight, .destroy = mem_flush,
};

/* --- the store --- */

struct input {
    const uint8_t *at;
    size_t left;
};

static void take(struct input *in, void *to, size_t bytes)
{
    size_t n = fk_min(bytes, in->left);

    memset(to, 0, bytes);
    if (n > 0)
        memcpy(to, in->at, n);
    in->at += n;
    in->left -= n;
}

struct use {
    struct fk_ssd *ssd;
    const struct fk_ssd_params *params;
    uint32_t n;
    struct fk_ssd_found found[256];
};

static void note(void *arg, const struct fk_ssd_found *f)
{
    struct use *u = arg;

    if (f->slot >= u->params->n_slots || fk_key_is_zero(f->key) || u->n >= u->params->n_slots)
        abort();
    u->found[u->n++] = *f;
}

static int32_t run(struct use *u, const struct fk_ssd_req *req)
{
    struct fk_engine *e = u->params->engine;
    struct fk_ssd_done done;
    struct fk_io *ios[16];
    int n;

    fk_ssd_submit(u->ssd, req, 1, 1);
    while ((n = mem_reap(e, ios, 16, 0)) > 0) {
        for (int i = 0; i < n; i++)
            fk_ssd_io_done(ios[i], 1);
    }
    if (fk_ssd_take_done(u->ssd, &done, 1) != 1 || done.id != req->id)
        abort();
    return done.status;
}

/* Reads all that was found; writes one and reads it back. */
static void use_store(struct use *u)
{
    static _Alignas(4096) uint8_t buf[8192], want[8192];
    uint64_t size = u->params->block_bytes;

    if (fk_ssd_recover(u->ssd, note, u) < 0)
        abort();
    (void)fk_ssd_hint(u->ssd, buf, FK_SSD_HINT_BYTES);
    fk_ssd_set_hint(u->ssd, "fast", 5);
    if (!fk_ssd_hint(u->ssd, buf, 5) || fk_ssd_hint(u->ssd, buf, 6))
        abort();
    for (uint32_t i = 0; i < u->n; i++) {
        struct fk_ssd_req req = { .op = FK_IO_READ, .slot = u->found[i].slot, .buf = buf,
                                  .key = u->found[i].key, .id = i };
        int32_t rc = run(u, &req);

        if (rc != 0 && rc != -EBADMSG && rc != -EIO && rc != -ENODEV)
            abort();
    }
    struct fk_ssd_req req = { .op = FK_IO_WRITE, .slot = u->params->n_slots - 1, .buf = buf,
                              .key = { 1, 2 } };
    memset(buf, 0x77, sizeof(buf));
    memcpy(want, buf, sizeof(buf));
    if (run(u, &req) != 0)
        return;
    memset(buf, 0, sizeof(buf));
    req.op = FK_IO_READ;
    if (run(u, &req) != 0 || memcmp(buf, want, size) != 0)
        abort();
}

static void fill_hint(struct mem_engine *m, struct input *in, const struct ssd_header *first, bool seal)
{
    struct ssd_hint raw, h;

    if (in->left == 0)
        return;
    take(in, &raw, sizeof(raw));
    h = raw;
    if (seal)
        ssd_hint_make(&h, ssd_record_seed(first->uuid), raw.data, raw.bytes);
    mem_resize(m, 0, SSD_HINT_AT + SSD_PAGE);
    memcpy(m->bytes[0] + SSD_HINT_AT, &h, sizeof(h));
}

static void fill_files(struct mem_engine *m, struct input *in, uint32_t n_dirs, uint32_t n_slots,
                       uint8_t flags, struct ssd_header *first)
{
    for (uint32_t d = 0; d < n_dirs; d++) {
        struct ssd_header h[2];

        take(in, &h[0], sizeof(h[0]));
        take(in, &h[1], sizeof(h[1]));
        for (int i = 0; i < 2 && (flags & 4); i++)
            ssd_header_seal(&h[i]);
        if (d == 0)
            *first = h[0];
        mem_resize(m, 2 * d, SSD_PAGE);
        mem_resize(m, 2 * d + 1, ssd_table_offset(n_slots));
        memcpy(m->bytes[2 * d], &h[1], sizeof(h[1]));
        memcpy(m->bytes[2 * d + 1], &h[0], sizeof(h[0]));
        struct ssd_geometry g = { .block_bytes = first->block_bytes, .n_slots = n_slots,
                                  .n_dirs = n_dirs, .stripe_slots = 4 };
        for (uint32_t i = 0; i < n_slots && in->left > 0; i++) {
            struct ssd_record r;

            take(in, &r, sizeof(r));
            if (flags & 8)
                ssd_record_seal(&r, ssd_record_seed(h[0].uuid),
                                (uint32_t)ssd_geometry_slot(&g, d, i));
            memcpy(m->bytes[2 * d + 1] + ssd_table_offset(i), &r, sizeof(r));
        }
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const char *const dirs[] = { "/0", "/1", "/2", "/3" };
    struct mem_engine m = { .base = { .ops = &mem_ops } };
    struct input in = { data, size };
    struct ssd_header first;
    uint8_t head[2];
    char error[512];

    fk_log_set_level(FK_LOG_OFF);
    take(&in, head, sizeof(head));
    struct fk_ssd_params p = {
        .name = "x", .dirs = dirs, .n_dirs = (head[0] & 3u) + 1, .block_bytes = 4096,
        .n_slots = head[1] % 64u + 1, .stripe_slots = 4, .io_chunk_bytes = 65536,
        .recreate = head[0] & 32, .virtual_dirs = true, .device_errors = 3, .engine = &m.base,
    };
    fill_files(&m, &in, p.n_dirs, p.n_slots, head[0], &first);
    fill_hint(&m, &in, &first, head[0] & 64);
    if (head[0] & 16) {
        p.block_bytes = fk_min(first.block_bytes, (uint64_t)8192);
        memcpy(p.fingerprint, first.fingerprint, 16);
    }
    struct use u = { .params = &p };
    int rc = fk_ssd_open(&p, &u.ssd, error, sizeof(error));
    if (rc == 0) {
        use_store(&u);
        fk_ssd_close(u.ssd);
    } else if (rc == -EEXIST && p.recreate) {
        abort();
    }
    for (int i = 0; i < MAX_FILES; i++)
        free(m.bytes[i]);
    return 0;
}
