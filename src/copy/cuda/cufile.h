/*
 * cufile.h - the part of NVIDIA's cuFile that FlexKV uses, found at run time. Names, signatures and numbers
 * as in NVIDIA's "cuFile API Reference Guide"; nothing of cuFile is needed to build.
 *
 * Callers: direct.c (does it work here?), direct_read.c (blocks). Any thread; cuFile locks by itself.
 */
#ifndef FK_COPY_CUDA_CUFILE_H
#define FK_COPY_CUDA_CUFILE_H

#include <stdbool.h>
#include <stddef.h>
#include <sys/types.h>

#define FK_CUFILE_LIBRARY "libcufile.so.0"

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

enum { CF_HANDLE_FD = 1 };

struct fk_cufile {
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

/* library NULL: FK_CUFILE_LIBRARY. 0, or -ENOTSUP and why. It is never unloaded: it has threads. */
int fk_cufile_load(const char *library, struct fk_cufile *cf, char *why, size_t why_bytes);
/* Opens its driver in a mode in which it does not copy through the CPU, or says why that can't be had. */
int fk_cufile_open(const struct fk_cufile *cf, char *why, size_t why_bytes);
/*
 * For tests of the way on machines that lack nvidia-fs: FKTEST_GDS_THROUGH_CPU=1 in a worker's environment
 * has cuFile copy through the CPU, and is no GPU direct storage. No option leads here.
 */
bool fk_cufile_through_cpu(void);

#endif
