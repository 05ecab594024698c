/*
 * fake_cufile.c - a libcufile for test_direct.c, where "GPU memory" is memory. FAKE_CUFILE says how it
 * behaves: good, or one of the ways in which the real one fails, or lies.
 */
#define EXPORT __attribute__((visibility("default")))
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <linux/aio_abi.h>

struct error { int err, cu_err; };
struct descr { int type; union { int fd; void *handle; } handle; const void *ops; };
struct props { unsigned major, minor; size_t a, b; unsigned status, control, features; };

static bool compat = true;

static bool is(const char *what)
{
    const char *how = getenv("FAKE_CUFILE");

    return how && !strcmp(how, what);
}

EXPORT struct error cuFileDriverOpen(void);
EXPORT struct error cuFileDriverOpen(void)
{
    if (is("hang"))
        sleep(2);
    return (struct error){ is("no-driver") ? 5001 : 0, 0 };
}

EXPORT struct error cuFileDriverGetProperties(struct props *p);
EXPORT struct error cuFileDriverGetProperties(struct props *p)
{
    *p = (struct props){ .major = is("no-nvfs") ? 0 : 2, .minor = 24, .control = compat ? 2 : 0 };
    return (struct error){ 0, 0 };
}

EXPORT struct error cuFileSetParameterBool(int what, bool on);
EXPORT struct error cuFileSetParameterBool(int what, bool on)
{
    if (what == 1 && !is("compat"))
        compat = on;
    return (struct error){ is("compat") ? 5025 : 0, 0 };
}

EXPORT struct error cuFileGetParameterBool(int what, bool *on);
EXPORT struct error cuFileGetParameterBool(int what, bool *on)
{
    *on = what == 1 ? compat : what == 2 && is("forced");
    return (struct error){ 0, 0 };
}

EXPORT struct error cuFileHandleRegister(void **handle, struct descr *d);
EXPORT struct error cuFileHandleRegister(void **handle, struct descr *d)
{
    *handle = (void *)(long)(d->handle.fd + 1);
    return (struct error){ is("overlayfs") ? 5027 : d->type == 1 ? 0 : 5022, 0 };
}

EXPORT void cuFileHandleDeregister(void *handle);
EXPORT void cuFileHandleDeregister(void *handle) { }

EXPORT struct error cuFileBufRegister(const void *p, size_t n, int flags);
EXPORT struct error cuFileBufRegister(const void *p, size_t n, int flags)
{
    return (struct error){ is("no-bar") ? 5017 : 0, 0 };
}

EXPORT struct error cuFileBufDeregister(const void *p);
EXPORT struct error cuFileBufDeregister(const void *p) { return (struct error){ 0, 0 }; }

/* Through the kernel's aio, which does not count as the process's reading. */
static ssize_t transfer(int fd, void *buf, size_t n, off_t at, int op)
{
    aio_context_t context = 0;
    char *aligned = aligned_alloc(4096, (n + 4095) / 4096 * 4096);
    struct iocb cb = { .aio_fildes = (unsigned)fd, .aio_lio_opcode = (unsigned short)op,
                       .aio_buf = (unsigned long)aligned, .aio_nbytes = n, .aio_offset = at };
    struct iocb *list[1] = { &cb };
    struct io_event event = { 0 };

    if (!aligned || syscall(SYS_io_setup, 1, &context) < 0)
        abort();
    if (op == IOCB_CMD_PWRITE)
        memcpy(aligned, buf, n);
    long rc = syscall(SYS_io_submit, context, 1, list);
    if (rc == 1)
        rc = syscall(SYS_io_getevents, context, 1, 1, &event, NULL);
    syscall(SYS_io_destroy, context);
    if (rc == 1 && event.res > 0 && op == IOCB_CMD_PREAD)
        memcpy(buf, aligned, (size_t)event.res);
    free(aligned);
    return rc == 1 ? event.res : -1;
}

/* What the compatibility mode does. */
static ssize_t copy_read(int fd, char *to, size_t n, off_t at)
{
    char *aligned = aligned_alloc(4096, n);
    ssize_t got = pread(fd, aligned, n, at);

    if (got > 0)
        memcpy(to, aligned, (size_t)got);
    free(aligned);
    return got;
}

EXPORT ssize_t cuFileRead(void *handle, void *base, size_t n, off_t at, off_t offset);
EXPORT ssize_t cuFileRead(void *handle, void *base, size_t n, off_t at, off_t offset)
{
    int fd = (int)(long)handle - 1;
    char *to = (char *)base + (is("offset") ? 0 : offset);

    if (is("nothing"))                  /* it says that it has read */
        return (ssize_t)n;
    if (is("short"))
        n -= 4096;
    ssize_t got = is("bounce") ? copy_read(fd, to, n, at) : transfer(fd, to, n, at, IOCB_CMD_PREAD);
    if (is("flip") && got > 0)
        to[got / 2] ^= 1;
    return got;
}

EXPORT ssize_t cuFileWrite(void *handle, const void *base, size_t n, off_t at, off_t offset);
EXPORT ssize_t cuFileWrite(void *handle, const void *base, size_t n, off_t at, off_t offset)
{
    if (is("no-write"))
        return (ssize_t)n;
    return transfer((int)(long)handle - 1, (char *)(unsigned long)base + offset, n, at, IOCB_CMD_PWRITE);
}
