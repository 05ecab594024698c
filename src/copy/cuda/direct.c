/*
 * direct.c - see direct.h. Names, signatures and numbers as in NVIDIA's "cuFile API Reference Guide";
 * nothing of cuFile is needed to build.
 *
 * What keeps cuFile from bouncing through the CPU unseen, each enough to refuse it:
 *   - its compatibility mode is switched off before its driver opens; where that can't be said (it is
 *     open already, or older than the call), its properties must say that it is off
 *   - no driver below it (nvidia-fs, or PCI peer-to-peer)
 *   - the kernel counts the bytes that this process reads with read calls: a read by cuFile that makes
 *     the count grow by its size was one
 */
#include "copy/cuda/direct.h"

#include <dlfcn.h>
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

struct cf_error { int err, cu_err; };
struct cf_descr {
    int type;
    union { int fd; void *handle; } handle;
    const void *fs_ops;
};
struct cf_props {
    struct {
        unsigned major, minor;
        size_t poll_bytes, max_direct_bytes;
        unsigned status, control;
    } nvfs;
    unsigned features;
    unsigned char room[1024];           /* what newer versions may add */
};

enum {
    CF_HANDLE_FD = 1,
    CF_CONTROL_COMPAT = 1 << 1, CF_CONTROL_POSIX = 1 << 2, CF_CONTROL_FALLBACK = 1 << 4,
    CF_FEATURE_P2P = 1 << 4,
    CF_PARAM_ALLOW_COMPAT = 1, CF_PARAM_FORCE_COMPAT = 2,
};

struct cufile {
    struct cf_error (*DriverOpen)(void);
    struct cf_error (*DriverGetProperties)(struct cf_props *);
    struct cf_error (*HandleRegister)(void **, struct cf_descr *);
    void (*HandleDeregister)(void *);
    struct cf_error (*BufRegister)(const void *, size_t, int);
    struct cf_error (*BufDeregister)(const void *);
    ssize_t (*Read)(void *, void *, size_t, off_t, off_t);
    ssize_t (*Write)(void *, const void *, size_t, off_t, off_t);
    struct cf_error (*SetParameterBool)(int, bool);     /* NULL: an older one */
    struct cf_error (*GetParameterBool)(int, bool *);
};

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

/* ---- the library ---- */

static int load(struct probe *b, struct cufile *cf)
{
    static const struct { const char *name; size_t at; bool optional; } symbols[] = {
        { "cuFileDriverOpen", offsetof(struct cufile, DriverOpen), false },
        { "cuFileDriverGetProperties", offsetof(struct cufile, DriverGetProperties), false },
        { "cuFileHandleRegister", offsetof(struct cufile, HandleRegister), false },
        { "cuFileHandleDeregister", offsetof(struct cufile, HandleDeregister), false },
        { "cuFileBufRegister", offsetof(struct cufile, BufRegister), false },
        { "cuFileBufDeregister", offsetof(struct cufile, BufDeregister), false },
        { "cuFileRead", offsetof(struct cufile, Read), false },
        { "cuFileWrite", offsetof(struct cufile, Write), false },
        { "cuFileSetParameterBool", offsetof(struct cufile, SetParameterBool), true },
        { "cuFileGetParameterBool", offsetof(struct cufile, GetParameterBool), true },
    };
    void *library = dlopen(b->library, RTLD_NOW | RTLD_LOCAL);  /* it is never unloaded: it has threads */

    if (!library)
        return refuse(b, "%s can't be loaded: %s", b->library, dlerror());
    for (size_t i = 0; i < fk_array_size(symbols); i++) {
        void *s = dlsym(library, symbols[i].name);
        if (!s && !symbols[i].optional)
            return refuse(b, "%s has no %s", b->library, symbols[i].name);
        memcpy((char *)cf + symbols[i].at, &s, sizeof(s));
    }
    return 0;
}

static int no_fallback(struct probe *b, const struct cufile *cf)
{
    struct cf_props props = { 0 };
    bool forced = false, allowed = true;
    struct cf_error e = cf->DriverGetProperties(&props);

    if (e.err)
        return refuse(b, "cuFile does not say what it can do (error %d)", e.err);
    if (cf->GetParameterBool && !cf->GetParameterBool(CF_PARAM_ALLOW_COMPAT, &allowed).err)
        props.nvfs.control = (props.nvfs.control & ~(unsigned)CF_CONTROL_COMPAT) |
                             (allowed ? CF_CONTROL_COMPAT : 0);
    if (cf->GetParameterBool)
        (void)cf->GetParameterBool(CF_PARAM_FORCE_COMPAT, &forced);
    if (forced)
        return refuse(b, "cuFile is told to copy through the CPU (force_compat_mode in cufile.json)");
    if (props.nvfs.control & (CF_CONTROL_COMPAT | CF_CONTROL_POSIX | CF_CONTROL_FALLBACK))
        return refuse(b, "cuFile may copy through the CPU and not say so (compatibility mode): set "
                      "properties.allow_compat_mode to false in cufile.json");
    if (!props.nvfs.major && !(props.features & CF_FEATURE_P2P))
        return refuse(b, "neither the nvidia-fs driver nor PCI peer-to-peer is there: cuFile could only "
                      "copy through the CPU (compatibility mode)");
    return 0;
}

static int open_driver(struct probe *b, const struct cufile *cf)
{
    if (cf->SetParameterBool)           /* refused when it is open already */
        (void)cf->SetParameterBool(CF_PARAM_ALLOW_COMPAT, false);
    struct cf_error e = cf->DriverOpen();
    if (e.err)
        return refuse(b, "cuFile does not start (error %d%s)", e.err,
                      e.err == 5001 ? ": the nvidia-fs driver is not loaded" : "");
    return no_fallback(b, cf);
}

/* ---- the probe of one directory ---- */

struct trial {
    struct probe *b;
    const struct cufile *cf;
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
    if (before && after >= before + PIECE)
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

static int try_all(struct probe *b, const struct cufile *cf)
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
    struct cufile cf = { 0 };
    int rc = b->p.cu->CtxSetCurrent(b->p.context) ? refuse(b, "the GPU can't be used") : load(b, &cf);

    if (!rc)
        rc = open_driver(b, &cf);
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
    snprintf(b->library, sizeof(b->library), "%s", p->library ? p->library : FK_DIRECT_LIBRARY);
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
