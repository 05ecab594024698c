/*
 * fake_driver.h - a CUDA driver for gpu_copy.c where there is none: "device memory" is memory, streams
 * are queues, and what is in them is carried out late, a few steps at each question after an event,
 * from a stream chosen at random. So a copy that does not wait for what it must wait for is
 * found. It says nothing about the real driver, or about speed.
 */
#ifndef FK_TESTS_FAKE_DRIVER_H
#define FK_TESTS_FAKE_DRIVER_H

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/checksum.h"
#include "base/util.h"
#include "copy/cuda/cuda.h"

enum fake_kind { FAKE_COPY, FAKE_KERNEL, FAKE_RESIDUE, FAKE_RECORD, FAKE_WAIT, FAKE_CALL };

/* struct residue_job of kernels.cu */
struct fake_residue { cu_ptr data; uint64_t bytes; cu_ptr tables, powers, residue; };

struct cu_event_s { uint64_t asked, done; };

struct fake_op {
    struct fake_op *next;
    enum fake_kind kind;
    cu_ptr to, from;
    size_t bytes;
    struct fk_cuda_job job;
    struct fake_residue residue;
    bool ring;                          /* which form of the kernel */
    cu_event event;
    uint64_t number;
    void (*call)(void *);
    void *arg;
};

struct cu_stream_s { struct fake_op *head, **end; };

#define FAKE_STREAMS 64
static struct {
    pthread_mutex_t lock;
    cu_stream streams[FAKE_STREAMS];
    uint32_t n_streams;
    uint64_t rng;
} fake = { .lock = PTHREAD_MUTEX_INITIALIZER, .rng = 99 };

static inline void *fake_memory(cu_ptr p)
{
    return (void *)(uintptr_t)p;
}

static inline void fake_kernel(const struct fk_cuda_job *j, bool ring)
{
    const struct fk_cuda_tile *tiles = fake_memory(j->tiles);
    const uint32_t *pages = j->pages ? fake_memory(j->pages) : j->few[0];
    const uint32_t *slots = j->slots ? fake_memory(j->slots) : j->few[1];

    for (uint32_t b = 0; b < j->n_blocks; b++) {
        for (uint32_t i = 0; i < j->n_tiles; i++) {
            const struct fk_cuda_tile *t = &tiles[i];
            char *page = fake_memory(t->base + pages[b] * t->stride);
            char *linear = fake_memory(j->linear + (ring ? b : slots[b]) * j->linear_stride +
                                       (t->offset - j->offset));
            if ((uintptr_t)page % t->align || (uintptr_t)linear % t->align || t->bytes % t->align) {
                fprintf(stderr, "a tile is not aligned to %u\n", t->align);
                abort();
            }
            memcpy(j->to_pages ? page : linear, j->to_pages ? linear : page, t->bytes);
            for (uint64_t u = 0; j->sums && u < t->bytes / 16; u++) {
                uint64_t w[2];
                memcpy(w, page + u * 16, 16);
                ((uint64_t *)fake_memory(j->sums))[b] += fk_sum_unit(t->offset / 16 + u, w[0], w[1]);
            }
        }
    }
}

/* As the kernel: pieces, counted from the end, each with its power; so that wrong tables or powers show. */
static inline void fake_residue(const struct fake_residue *j)
{
    const uint64_t (*t)[256] = fake_memory(j->tables), *powers = fake_memory(j->powers);
    const unsigned char *data = fake_memory(j->data);
    uint64_t pieces = fk_div_up(j->bytes, 1024), at = 0;

    for (uint64_t p = 0; p < pieces; p++) {
        uint64_t end = j->bytes - (pieces - 1 - p) * 1024, r = 0;
        for (; at + 8 <= end; at += 8) {
            uint64_t v, sum = 0;
            memcpy(&v, data + at, 8);
            v ^= r;
            for (int k = 0; k < 8; k++)
                sum ^= t[7 - k][v >> 8 * k & 255];
            r = sum;
        }
        for (; at < end; at++)
            r = t[0][(r ^ data[at]) & 255] ^ r >> 8;
        *(uint64_t *)fake_memory(j->residue) ^= fk_crc_times(r, powers[pieces - 1 - p]);
    }
}

/* With the lock: the head of the stream, if it needn't wait. */
static inline bool fake_step(cu_stream s)
{
    struct fake_op *op = s->head;

    if (!op || (op->kind == FAKE_WAIT && op->event->done < op->number))
        return false;
    if (op->kind == FAKE_COPY)
        memcpy(fake_memory(op->to), fake_memory(op->from), op->bytes);
    else if (op->kind == FAKE_KERNEL)
        fake_kernel(&op->job, op->ring);
    else if (op->kind == FAKE_RESIDUE)
        fake_residue(&op->residue);
    else if (op->kind == FAKE_RECORD)
        op->event->done = op->number;
    else if (op->kind == FAKE_CALL)
        op->call(op->arg);
    s->head = op->next;
    if (!s->head)
        s->end = &s->head;
    free(op);
    return true;
}

static inline void fake_put(cu_stream s, struct fake_op op)
{
    struct fake_op *p = malloc(sizeof(*p));

    *p = op;
    p->next = NULL;
    *s->end = p;
    s->end = &p->next;
}

static inline void fake_run_some(void)
{
    for (uint32_t n = fk_rng_below(&fake.rng, 6); n; n--)
        fake_step(fake.streams[fk_rng_below(&fake.rng, fake.n_streams)]);
}

static inline void fake_run_all(void)
{
    bool any = true;

    while (any) {
        any = false;
        for (uint32_t i = 0; i < fake.n_streams; i++)
            any |= fake_step(fake.streams[i]);
    }
}

#define LOCKED(what) do { pthread_mutex_lock(&fake.lock); what; pthread_mutex_unlock(&fake.lock); } while (0)

static inline cu_result fake_error_name(cu_result r, const char **out) { *out = "fake"; return CU_OK; }
static inline cu_result fake_uuid(void *out, cu_device d) { return 1; }       /* nothing is kept of it */
static inline cu_result fake_attribute(int *out, int what, cu_device d)
{
    *out = what == CU_DEVICE_CC_MAJOR ? 9 : what == CU_DEVICE_HOST_POINTERS ? 1 : 0;
    return CU_OK;
}
static inline cu_result fake_retain(cu_context *out, cu_device d) { *out = (cu_context)&fake; return CU_OK; }
static inline cu_result fake_device(cu_device d) { return CU_OK; }
static inline cu_result fake_current(cu_context c) { return CU_OK; }
static inline cu_result fake_priorities(int *least, int *greatest) { *least = 0; *greatest = -1; return CU_OK; }
static inline cu_result fake_synchronize(void) { LOCKED(fake_run_all()); return CU_OK; }
static inline cu_result fake_load(cu_module *m, const void *ptx) { *m = (cu_module)&fake; return CU_OK; }
static inline cu_result fake_unload(cu_module m) { return CU_OK; }
static inline cu_result fake_function(cu_function *f, cu_module m, const char *name)
{
    static const char *const names[] = { "fk_copy_direct", "fk_copy_ring", "fk_sum_direct", "fk_sum_ring",
                                         "fk_residue" };

    for (uintptr_t i = 0; i < fk_array_size(names); i++) {
        *f = (cu_function)(i + 1);
        if (strcmp(name, names[i]) == 0)
            return CU_OK;
    }
    return 500;
}
static inline cu_result fake_launch(cu_function f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                                    unsigned bz, unsigned shared, cu_stream s, void **args, void **extra)
{
    uintptr_t form = (uintptr_t)f - 1;

    if (form == 4) {
        LOCKED(fake_put(s, (struct fake_op){ .kind = FAKE_RESIDUE, .residue = *(struct fake_residue *)args[0] }));
        return CU_OK;
    }
    struct fk_cuda_job job = *(struct fk_cuda_job *)args[0];

    if (form < 2)
        job.sums = 0;
    LOCKED(fake_put(s, (struct fake_op){ .kind = FAKE_KERNEL, .ring = form % 2, .job = job }));
    return gx && bx ? CU_OK : 1;
}
static inline cu_result fake_stream(cu_stream *out, unsigned flags, int priority)
{
    *out = calloc(1, sizeof(**out));
    (*out)->end = &(*out)->head;
    LOCKED(fake.streams[fake.n_streams++] = *out);
    return fake.n_streams < FAKE_STREAMS ? CU_OK : CU_ERROR_OUT_OF_MEMORY;
}
static inline void fake_forget(cu_stream s)
{
    for (uint32_t i = 0; i < fake.n_streams; i++)
        if (fake.streams[i] == s)
            fake.streams[i] = fake.streams[--fake.n_streams];
}
static inline cu_result fake_stream_destroy(cu_stream s)
{
    LOCKED(fake_run_all(); fake_forget(s));
    free(s);
    return CU_OK;
}
static inline cu_result fake_stream_wait(cu_stream s, cu_event e, unsigned flags)
{
    LOCKED(fake_put(s, (struct fake_op){ .kind = FAKE_WAIT, .event = e, .number = e->asked }));
    return CU_OK;
}
static inline cu_result fake_stream_synchronize(cu_stream s) { return fake_synchronize(); }
static inline cu_result fake_event(cu_event *e, unsigned flags) { *e = calloc(1, sizeof(**e)); return CU_OK; }
static inline cu_result fake_event_destroy(cu_event e) { LOCKED(fake_run_all()); free(e); return CU_OK; }
static inline cu_result fake_record(cu_event e, cu_stream s)
{
    LOCKED(fake_put(s, (struct fake_op){ .kind = FAKE_RECORD, .event = e, .number = ++e->asked }));
    return CU_OK;
}
static inline cu_result fake_query(cu_event e)
{
    bool done;

    LOCKED(fake_run_some(); done = e->done == e->asked);
    return done ? CU_OK : CU_ERROR_NOT_READY;
}
static inline cu_result fake_alloc(cu_ptr *out, size_t n)
{
    *out = (cu_ptr)(uintptr_t)aligned_alloc(256, fk_round_up(n, 256));
    return *out ? CU_OK : CU_ERROR_OUT_OF_MEMORY;
}
static inline cu_result fake_free(cu_ptr p) { LOCKED(fake_run_all()); free(fake_memory(p)); return CU_OK; }
static inline cu_result fake_host_alloc(void **out, size_t n, unsigned flags)
{
    *out = malloc(n);
    return *out ? CU_OK : CU_ERROR_OUT_OF_MEMORY;
}
static inline cu_result fake_host_free(void *p) { LOCKED(fake_run_all()); free(p); return CU_OK; }
static inline cu_result fake_register(void *p, size_t n, unsigned flags) { return CU_OK; }
static inline cu_result fake_unregister(void *p) { return CU_OK; }
static inline cu_result fake_copy_async(cu_ptr to, cu_ptr from, size_t n, cu_stream s)
{
    LOCKED(fake_put(s, (struct fake_op){ .kind = FAKE_COPY, .to = to, .from = from, .bytes = n }));
    return CU_OK;
}
static inline cu_result fake_to_device_async(cu_ptr to, const void *from, size_t n, cu_stream s)
{
    return fake_copy_async(to, (cu_ptr)(uintptr_t)from, n, s);
}
static inline cu_result fake_to_host_async(void *to, cu_ptr from, size_t n, cu_stream s)
{
    return fake_copy_async((cu_ptr)(uintptr_t)to, from, n, s);
}
static inline cu_result fake_to_device(cu_ptr to, const void *from, size_t n)
{
    memcpy(fake_memory(to), from, n);
    return CU_OK;
}
static inline cu_result fake_to_host(void *to, cu_ptr from, size_t n)
{
    memcpy(to, fake_memory(from), n);
    return CU_OK;
}
static inline cu_result fake_host_func(cu_stream s, void (*call)(void *), void *arg)
{
    LOCKED(fake_put(s, (struct fake_op){ .kind = FAKE_CALL, .call = call, .arg = arg }));
    return CU_OK;
}
static inline cu_result fake_capture_mode(int *mode) { return CU_OK; }
static inline cu_result fake_batch(cu_ptr *to, cu_ptr *from, size_t *sizes, size_t n, struct cu_batch_attrs *attrs,
                                   size_t *which, size_t n_attrs, cu_stream s)
{
    for (size_t i = 0; i < n; i++)
        fake_copy_async(to[i], from[i], sizes[i], s);
    return attrs->order == CU_BATCH_ORDER_STREAM && !*which && n_attrs == 1 ? CU_OK : 1;
}

static const struct fk_cuda fake_driver = {
    .version = 13000, .GetErrorName = fake_error_name, .DeviceGetUuid = fake_uuid,
    .DeviceGetAttribute = fake_attribute, .DevicePrimaryCtxRetain = fake_retain,
    .DevicePrimaryCtxRelease = fake_device, .CtxSetCurrent = fake_current,
    .CtxGetStreamPriorityRange = fake_priorities, .CtxSynchronize = fake_synchronize,
    .ModuleLoadData = fake_load, .ModuleUnload = fake_unload, .ModuleGetFunction = fake_function,
    .LaunchKernel = fake_launch, .StreamCreateWithPriority = fake_stream,
    .StreamDestroy = fake_stream_destroy, .StreamWaitEvent = fake_stream_wait,
    .StreamSynchronize = fake_stream_synchronize, .EventCreate = fake_event,
    .EventDestroy = fake_event_destroy, .EventRecord = fake_record, .EventQuery = fake_query,
    .MemAlloc = fake_alloc, .MemFree = fake_free, .MemHostAlloc = fake_host_alloc,
    .MemFreeHost = fake_host_free, .MemHostRegister = fake_register,
    .MemHostUnregister = fake_unregister, .MemcpyHtoDAsync = fake_to_device_async,
    .MemcpyDtoHAsync = fake_to_host_async, .MemcpyHtoD = fake_to_device, .MemcpyDtoH = fake_to_host,
    .ThreadExchangeStreamCaptureMode = fake_capture_mode, .MemcpyBatch130 = fake_batch,
    .LaunchHostFunc = fake_host_func,
};

#endif
