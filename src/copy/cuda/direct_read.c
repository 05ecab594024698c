/*
 * direct_read.c - blocks out of the SSD tier's files straight into pages; see direct.h.
 *
 *   file --cuFile--> buffer on the device --kernels--> pages, and the residue of its bytes
 *
 * A block's buffer, stream and reader are one of a few; each does one block after the other, waiting for all
 * of it, so that reads of some overlap with kernels of others.
 */
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/checksum.h"
#include "base/log.h"
#include "base/util.h"
#include "copy/cuda/cuda.h"
#include "copy/cuda/cufile.h"
#include "copy/cuda/direct.h"
#include "copy/team.h"

#define READERS 8u
#define BUFFERS_BYTES (64 * FK_MIB)     /* of GPU memory, for all of them */
#define SECTOR 4096u
#define PIECE 1024u                     /* as in kernels.cu */
#define RESIDUE_THREADS 128u
#define SCATTER_CTAS 256u

struct residue_job {                    /* struct residue_job in kernels.cu */
    cu_ptr data;
    uint64_t bytes;
    cu_ptr tables, powers, residue;
};

struct reader {
    struct reader *next;                /* free ones */
    cu_stream stream;
    uint64_t offset;                    /* of its buffer */
    cu_ptr residue;
    uint64_t *host;                     /* pinned: a zero, the residue */
};

struct fk_direct {
    struct fk_cuda_copier *c;
    struct fk_cufile cf;
    uint32_t n_files, n_readers;
    int fds[FK_DIRECT_FILES];
    void *handles[FK_DIRECT_FILES];
    uint64_t read_bytes;                /* a slice, in whole sectors */
    cu_ptr buffers, constants;          /* constants: tables, powers, a residue for each reader */
    bool registered;
    uint64_t *pinned;
    struct reader readers[READERS], *free;
    pthread_mutex_t lock;
    struct fk_team *team;
    bool complained;
};

struct reading {                        /* a job: what the team's threads are given */
    struct fk_copy_target target;       /* first */
    struct fk_direct *d;
    const struct fk_copy_place *places;
    uint64_t *residues;
};

/* ---- a block ---- */

static int complain(struct fk_direct *d, ssize_t got)
{
    pthread_mutex_lock(&d->lock);
    bool first = !d->complained;
    d->complained = true;
    pthread_mutex_unlock(&d->lock);
    if (first)
        fk_warn("GPU %d: cuFileRead gave %zd of %llu bytes (%s); such blocks are read through the CPU tier",
                d->c->device, got, (unsigned long long)d->read_bytes, got == -1 ? strerror(errno) : "cuFile");
    return -EIO;
}

static cu_result start_kernels(struct fk_direct *d, const struct reader *r, uint32_t page)
{
    struct fk_cuda_copier *c = d->c;
    cu_ptr data = d->buffers + r->offset;
    struct residue_job residue = { .data = data, .bytes = c->slice_bytes, .tables = d->constants,
                                   .powers = d->constants + sizeof(uint64_t) * FK_CRC_TABLES * 256,
                                   .residue = r->residue };
    struct fk_cuda_job scatter = { .tiles = c->device_tiles, .linear = data, .linear_stride = c->slice_bytes,
                                   .n_blocks = 1, .n_tiles = c->n_tiles, .to_pages = 1, .few = { { page } } };
    uint64_t pieces = fk_div_up(c->slice_bytes, PIECE);
    void *residue_args[] = { &residue }, *scatter_args[] = { &scatter };
    cu_result e = c->cu->MemcpyHtoDAsync(r->residue, &r->host[0], sizeof(uint64_t), r->stream);

    if (!e)
        e = c->cu->LaunchKernel(c->residue, (unsigned)fk_div_up(pieces, RESIDUE_THREADS), 1, 1, RESIDUE_THREADS,
                                1, 1, 0, r->stream, residue_args, NULL);
    if (!e)
        e = c->cu->LaunchKernel(c->copy[FK_CUDA_RING], (unsigned)fk_min(c->n_tiles, SCATTER_CTAS), 1, 1, 32, 1, 1,
                                0, r->stream, scatter_args, NULL);
    return e ? e : c->cu->MemcpyDtoHAsync(&r->host[1], r->residue, sizeof(uint64_t), r->stream);
}

static int read_block(struct fk_direct *d, const struct reader *r, const struct fk_copy_place *p,
                      uint64_t *residue)
{
    struct fk_cuda_copier *c = d->c;
    ssize_t got = d->cf.Read(d->handles[p->file], (void *)(uintptr_t)d->buffers, d->read_bytes,
                             (off_t)p->offset, (off_t)r->offset);

    if (got < (ssize_t)c->slice_bytes)
        return complain(d, got);
    cu_result e = start_kernels(d, r, p->page);
    cu_result ended = c->cu->StreamSynchronize(r->stream);      /* in any case: what runs must be over */
    if (fk_cuda_failed(c, e ? e : ended, "a block from SSD"))
        return -EIO;
    *residue = r->host[1];
    return 0;
}

static struct reader *take_reader(struct fk_direct *d)
{
    pthread_mutex_lock(&d->lock);
    struct reader *r = d->free;         /* there is one for each thread of the team */
    d->free = r->next;
    pthread_mutex_unlock(&d->lock);
    return r;
}

static void give_reader(struct fk_direct *d, struct reader *r)
{
    pthread_mutex_lock(&d->lock);
    r->next = d->free;
    d->free = r;
    pthread_mutex_unlock(&d->lock);
}

/* As a copying backend; slots are places. */
static int read_blocks(const struct fk_copy_target *target, const struct fk_copy_blocks *b, uint32_t *done)
{
    const struct reading *g = (const struct reading *)target;
    const struct fk_cuda *cu = g->d->c->cu;
    int rc = 0, relaxed = CU_CAPTURE_RELAXED;

    if (cu->CtxSetCurrent(g->d->c->context) != CU_OK || cu->ThreadExchangeStreamCaptureMode(&relaxed) != CU_OK)
        return -EIO;
    struct reader *r = take_reader(g->d);
    for (*done = 0; *done < b->n; (*done)++) {
        uint32_t i = b->slots[*done];
        rc = read_block(g->d, r, &g->places[i], &g->residues[i]);
        if (rc)
            break;
    }
    give_reader(g->d, r);
    return rc;
}

uint32_t fk_direct_read(struct fk_copier *base, const struct fk_copy_place *places, uint32_t n,
                        uint64_t *residues, _Atomic bool *cancelled, int *status)
{
    static const struct fk_copy_backend backend = { "files", read_blocks };
    struct fk_cuda_copier *c = (struct fk_cuda_copier *)base;
    struct fk_direct *d = c->direct;
    uint32_t *lists = malloc(2ull * n * sizeof(*lists)), ok = 0;

    *status = !lists ? -ENOMEM : !d || c->dead ? -EIO : 0;
    for (uint32_t i = 0; !*status && i < n; i++) {
        lists[i] = i;
        lists[n + i] = places[i].page;
        if (places[i].file >= d->n_files)
            *status = -EFAULT;
    }
    if (!*status) {
        struct reading g = { .target = { .regions = base->regions, .n_regions = base->n_regions }, .d = d,
                             .places = places, .residues = residues };
        struct fk_copy_blocks blocks = { .slots = lists, .pages = lists + n, .n = n, .to_engine = true };
        ok = fk_team_copy(d->team, &backend, &g.target, &blocks, cancelled, status);
    }
    free(lists);
    return ok;
}

/* ---- open and close ---- */

static cu_result write_constants(struct fk_direct *d)
{
    uint64_t pieces = fk_div_up(d->c->slice_bytes, PIECE), words = FK_CRC_TABLES * 256 + pieces;
    uint64_t *p = malloc(words * sizeof(*p)), step = fk_crc_power(PIECE);
    const struct fk_cuda *cu = d->c->cu;

    if (!p)
        return CU_ERROR_OUT_OF_MEMORY;
    fk_crc_tables((uint64_t (*)[256])p);
    p[FK_CRC_TABLES * 256] = fk_crc_power(0);
    for (uint64_t i = FK_CRC_TABLES * 256 + 1; i < words; i++)
        p[i] = fk_crc_times(p[i - 1], step);
    cu_result e = cu->MemAlloc(&d->constants, (words + READERS) * sizeof(*p));
    if (!e)
        e = cu->MemcpyHtoD(d->constants, p, words * sizeof(*p));
    for (uint32_t i = 0; i < d->n_readers; i++)
        d->readers[i].residue = d->constants + (words + i) * sizeof(*p);
    free(p);
    return e;
}

static cu_result open_readers(struct fk_direct *d)
{
    const struct fk_cuda *cu = d->c->cu;
    int least = 0, greatest = 0;
    cu_result e = cu->CtxGetStreamPriorityRange(&least, &greatest);

    if (!e)
        e = cu->MemAlloc(&d->buffers, d->n_readers * d->read_bytes);
    if (!e)
        e = cu->MemHostAlloc((void **)&d->pinned, 2 * READERS * sizeof(*d->pinned), CU_HOST_ALLOC_PORTABLE);
    if (!e)
        e = write_constants(d);
    for (uint32_t i = 0; !e && i < d->n_readers; i++) {
        struct reader *r = &d->readers[i];
        r->offset = i * d->read_bytes;
        r->host = d->pinned + 2 * i;
        r->host[0] = 0;
        r->next = d->free;
        d->free = r;
        e = cu->StreamCreateWithPriority(&r->stream, CU_STREAM_NON_BLOCKING_FLAG, least);
    }
    return e;
}

static int open_files(struct fk_direct *d, const int *fds, uint32_t n, char *why, size_t why_bytes)
{
    struct cf_error e = d->cf.BufRegister((void *)(uintptr_t)d->buffers, d->n_readers * d->read_bytes, 0);

    d->registered = !e.err;
    for (; !e.err && d->n_files < n; d->n_files++) {
        struct cf_descr descr = { .type = CF_HANDLE_FD, .handle.fd = dup(fds[d->n_files]) };
        d->fds[d->n_files] = descr.handle.fd;
        e = d->cf.HandleRegister(&d->handles[d->n_files], &descr);
        if (e.err)
            close(descr.handle.fd);
    }
    if (e.err)
        snprintf(why, why_bytes, "cuFile can't use the SSD tier's files or GPU memory (error %d)", e.err);
    return e.err ? -ENOTSUP : 0;
}

void fk_direct_close(struct fk_cuda_copier *c)
{
    struct fk_direct *d = fk_steal(c->direct);

    if (!d)
        return;
    fk_team_destroy(d->team);
    for (uint32_t i = 0; i < d->n_files; i++) {
        d->cf.HandleDeregister(d->handles[i]);
        close(d->fds[i]);
    }
    if (d->registered)
        d->cf.BufDeregister((void *)(uintptr_t)d->buffers);
    for (uint32_t i = 0; i < d->n_readers; i++)
        if (d->readers[i].stream)
            c->cu->StreamDestroy(d->readers[i].stream);
    if (d->buffers)
        c->cu->MemFree(d->buffers);
    if (d->constants)
        c->cu->MemFree(d->constants);
    if (d->pinned)
        c->cu->MemFreeHost(d->pinned);
    pthread_mutex_destroy(&d->lock);
    free(d);
}

int fk_direct_open(struct fk_cuda_copier *c, const char *library, const int *fds, uint32_t n, char *why,
                   size_t why_bytes)
{
    struct fk_direct *d = calloc(1, sizeof(*d));

    if (!d)
        return -ENOMEM;
    pthread_mutex_init(&d->lock, NULL);
    c->direct = d;
    d->c = c;
    d->read_bytes = fk_round_up(c->slice_bytes, SECTOR);
    d->n_readers = (uint32_t)fk_min(BUFFERS_BYTES / d->read_bytes, (uint64_t)READERS);
    int rc = fk_cufile_load(library, &d->cf, why, why_bytes);
    if (!rc && (!d->n_readers || n > FK_DIRECT_FILES)) {
        snprintf(why, why_bytes, "a worker's part of a block has %llu MiB; at most %llu fit",
                 (unsigned long long)(d->read_bytes / FK_MIB), (unsigned long long)(BUFFERS_BYTES / FK_MIB));
        rc = -ENOTSUP;
    }
    if (!rc && open_readers(d)) {
        snprintf(why, why_bytes, "GPU %d has no %llu MiB left for it", c->device,
                 (unsigned long long)(d->n_readers * d->read_bytes / FK_MIB));
        rc = -ENOMEM;
    }
    if (!rc)
        rc = open_files(d, fds, n, why, why_bytes);
    if (!rc)
        rc = fk_team_create(d->n_readers, &d->team);
    if (rc)
        fk_direct_close(c);
    return rc;
}
