/*
 * direct.c - the probe of GPU direct storage; see direct.h.
 *
 * What keeps cuFile from bouncing through the CPU unseen, each enough to refuse it:
 *   - its compatibility mode is switched off before its driver opens; where that can't be said (it is
 *     open already, or older than the call), its properties must say that it is off
 *   - no driver below it (nvidia-fs, or PCI peer-to-peer)
 *   - the kernel counts the bytes that this process reads with read calls: a read by cuFile that makes
 *     the count grow by its size was one
 */
#include "copy/cuda/direct.h"

#include <errno.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

#include "base/util.h"

#define PIECE (1u << 20)
#define PIECE_AT 65536                  /* in the file */
#define ALIGN 4096u
#define BUFFER_OFFSET 8192              /* in the registered memory: a slot is seldom at its start */

struct probe {                          /* the thread's own; freed by whoever is last */
    struct fk_direct_params p;
    char library[400];
    int *fds;
    char why[400];
    int rc;
    _Atomic int users;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    bool done;
};

__attribute__((format(printf, 2, 3)))
static int refuse(struct probe *b, const char *format, ...)
{
    va_list args;

    va_start(args, format);
    vsnprintf(b->why, sizeof(b->why), format, args);
    va_end(args);
    return -ENOTSUP;
}

/* ---- the probe of one directory ---- */

struct trial {
    struct probe *b;
    const struct fk_cufile *cf;
    const struct fk_cuda *cu;
    int fd;
    void *handle;
    cu_ptr memory;                      /* on the device, registered */
    unsigned char *host, *want;
};

static void pattern(unsigned char *p, uint64_t seed)
{
    for (uint32_t i = 0; i < PIECE; i += 8) {
        uint64_t v = fk_rng_next(&seed);
        memcpy(p + i, &v, sizeof(v));
    }
}

/* Bytes that this process has read with read calls; 0: not known. */
static unsigned long long bytes_read(void)
{
    unsigned long long n = 0;
    FILE *f = fopen("/proc/self/io", "re");

    if (f && fscanf(f, "rchar: %llu", &n) != 1)
        n = 0;
    if (f)
        fclose(f);
    return n;
}

static int file_to_gpu(struct trial *t, uint64_t seed)
{
    cu_ptr at = t->memory + BUFFER_OFFSET;

    pattern(t->want, seed);
    if (pwrite(t->fd, t->want, PIECE, PIECE_AT) != PIECE || fdatasync(t->fd) < 0)
        return refuse(t->b, "writing a file for the probe: %s", strerror(errno));
    memset(t->host, 0x5a, PIECE);
    if (t->cu->MemcpyHtoD(at, t->host, PIECE))
        return refuse(t->b, "the GPU can't be written to");
    unsigned long long before = bytes_read();
    ssize_t n = t->cf->Read(t->handle, (void *)(uintptr_t)t->memory, PIECE, PIECE_AT, BUFFER_OFFSET);
    unsigned long long after = bytes_read();
    if (n != PIECE)
        return refuse(t->b, "cuFileRead gave %zd of %u bytes", n, PIECE);
    if (t->cu->MemcpyDtoH(t->host, at, PIECE))
        return refuse(t->b, "the GPU can't be read");
    if (memcmp(t->host, t->want, PIECE))
        return refuse(t->b, "WRONG BYTES: what cuFileRead put into GPU memory is not what the file holds");
    if (before && after >= before + PIECE && !fk_cufile_through_cpu())
        return refuse(t->b, "cuFile read with the CPU (compatibility mode), though it was told not to");
    return 0;
}

static int gpu_to_file(struct trial *t, uint64_t seed)
{
    pattern(t->want, seed);
    if (t->cu->MemcpyHtoD(t->memory + BUFFER_OFFSET, t->want, PIECE))
        return refuse(t->b, "the GPU can't be written to");
    ssize_t n = t->cf->Write(t->handle, (void *)(uintptr_t)t->memory, PIECE, PIECE_AT, BUFFER_OFFSET);
    if (n != PIECE)
        return refuse(t->b, "cuFileWrite took %zd of %u bytes", n, PIECE);
    memset(t->host, 0x5a, PIECE);
    if (fdatasync(t->fd) < 0 || pread(t->fd, t->host, PIECE, PIECE_AT) != PIECE)
        return refuse(t->b, "reading the probe's file: %s", strerror(errno));
    if (memcmp(t->host, t->want, PIECE))
        return refuse(t->b, "WRONG BYTES: what cuFileWrite put into the file is not what GPU memory holds");
    return 0;
}

static int try_directory(struct trial *t)
{
    struct cf_descr d = { .type = CF_HANDLE_FD, .handle.fd = t->fd };
    uint64_t seed = (uint64_t)time(NULL) * 1000003u + (uint64_t)t->fd;
    struct cf_error e = t->cf->HandleRegister(&t->handle, &d);

    if (e.err)
        return refuse(t->b, "this file system is not one that cuFile reads directly (error %d)", e.err);
    int rc = file_to_gpu(t, seed);
    if (!rc)
        rc = gpu_to_file(t, seed + 1);
    t->cf->HandleDeregister(t->handle);
    return rc;
}

static int try_all(struct probe *b, const struct fk_cufile *cf)
{
    struct trial t = { .b = b, .cf = cf, .cu = b->p.cu };
    int rc = 0;

    t.host = aligned_alloc(ALIGN, PIECE);
    t.want = aligned_alloc(ALIGN, PIECE);
    if (!t.host || !t.want || b->p.cu->MemAlloc(&t.memory, PIECE + BUFFER_OFFSET))
        rc = refuse(b, "no memory for the probe");
    struct cf_error e = { 0, 0 };
    if (!rc && (e = cf->BufRegister((void *)(uintptr_t)t.memory, PIECE + BUFFER_OFFSET, 0)).err)
        rc = refuse(b, "cuFile can't use GPU memory (error %d)", e.err);
    bool registered = !rc;
    for (uint32_t i = 0; i < b->p.n_fds && !rc; i++) {
        t.fd = b->fds[i];
        rc = try_directory(&t);
    }
    if (registered)
        cf->BufDeregister((void *)(uintptr_t)t.memory);
    if (t.memory)
        b->p.cu->MemFree(t.memory);
    free(t.host);
    free(t.want);
    return rc;
}

/* ---- the thread ---- */

static void release(struct probe *b)
{
    if (atomic_fetch_sub(&b->users, 1) > 1)
        return;
    for (uint32_t i = 0; b->fds && i < b->p.n_fds; i++)
        if (b->fds[i] >= 0)
            close(b->fds[i]);
    free(b->fds);
    pthread_mutex_destroy(&b->lock);
    pthread_cond_destroy(&b->changed);
    free(b);
}

static void *probe_main(void *arg)
{
    struct probe *b = arg;
    struct fk_cufile cf = { 0 };
    int rc = b->p.cu->CtxSetCurrent(b->p.context) ? refuse(b, "the GPU can't be used")
           : fk_cufile_load(b->library, &cf, b->why, sizeof(b->why));

    if (!rc)
        rc = fk_cufile_open(&cf, b->why, sizeof(b->why));
    if (!rc)
        rc = try_all(b, &cf);
    pthread_mutex_lock(&b->lock);
    b->rc = rc;
    b->done = true;
    pthread_cond_signal(&b->changed);
    pthread_mutex_unlock(&b->lock);
    release(b);
    return NULL;
}

static struct probe *make_probe(const struct fk_direct_params *p)
{
    struct probe *b = calloc(1, sizeof(*b));
    pthread_condattr_t mono;

    if (!b)
        return NULL;
    b->p = *p;
    b->users = 1;
    snprintf(b->library, sizeof(b->library), "%s", p->library ? p->library : FK_CUFILE_LIBRARY);
    pthread_condattr_init(&mono);
    pthread_condattr_setclock(&mono, CLOCK_MONOTONIC);
    pthread_mutex_init(&b->lock, NULL);
    pthread_cond_init(&b->changed, &mono);
    pthread_condattr_destroy(&mono);
    b->fds = calloc(p->n_fds + 1, sizeof(*b->fds));
    for (uint32_t i = 0; b->fds && i < p->n_fds; i++)
        b->fds[i] = dup(p->fds[i]);
    if (b->fds)
        return b;
    release(b);
    return NULL;
}

/* -ETIMEDOUT: it goes on, and frees what it has when it ends. */
static int wait_for(struct probe *b, int timeout_ms)
{
    struct timespec end;
    int rc = 0;

    clock_gettime(CLOCK_MONOTONIC, &end);
    end.tv_sec += timeout_ms / 1000;
    end.tv_nsec += timeout_ms % 1000 * 1000000L;
    if (end.tv_nsec >= 1000000000L) {
        end.tv_sec++;
        end.tv_nsec -= 1000000000L;
    }
    pthread_mutex_lock(&b->lock);
    while (!b->done && rc != ETIMEDOUT)
        rc = pthread_cond_timedwait(&b->changed, &b->lock, &end);
    rc = b->done ? b->rc : -ETIMEDOUT;
    pthread_mutex_unlock(&b->lock);
    return rc;
}

int fk_direct_probe(const struct fk_direct_params *p, char *why, size_t why_bytes)
{
    struct probe *b;
    pthread_t thread;

    if (!p->n_fds) {
        snprintf(why, why_bytes, "there is no SSD tier (ssd_cache_gb)");
        return -ENOTSUP;
    }
    b = make_probe(p);
    if (!b) {
        snprintf(why, why_bytes, "out of memory");
        return -ENOMEM;
    }
    atomic_fetch_add(&b->users, 1);
    int rc = -pthread_create(&thread, NULL, probe_main, b);
    if (rc) {
        release(b);
        snprintf(why, why_bytes, "no thread for the probe: %s", strerror(-rc));
    } else {
        pthread_detach(thread);
        rc = wait_for(b, p->timeout_ms);
        if (rc == -ETIMEDOUT)
            snprintf(why, why_bytes, "cuFile did not finish the probe in %d ms", p->timeout_ms);
        else if (rc)
            snprintf(why, why_bytes, "%s", b->why);
    }
    release(b);
    return rc;
}
