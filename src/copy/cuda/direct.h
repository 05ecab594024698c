/*
 * direct.h - GPU direct storage: may bytes go between the SSD tier's files and this GPU's memory
 * without passing through the CPU's? NVIDIA's cuFile, loaded at run time, says yes too easily: where it
 * can't, it copies through host memory without a word. So it is believed only what a probe has seen:
 * bytes written through the file system and read by cuFile into GPU memory, and the other way round,
 * compared, with cuFile forbidden to fall back.
 *
 * Caller: an agent's thread, at the registration; it waits for the probe for a bounded time.
 */
#ifndef FK_COPY_CUDA_DIRECT_H
#define FK_COPY_CUDA_DIRECT_H

#include "copy/cuda/driver.h"

#define FK_DIRECT_LIBRARY "libcufile.so.0"
#define FK_DIRECT_PROBE_BYTES (2u << 20)        /* what a probe's file may grow to */
#define FK_DIRECT_TIMEOUT_MS 5000

struct fk_direct_params {
    const struct fk_cuda *cu;
    cu_context context;
    const char *library;            /* NULL: FK_DIRECT_LIBRARY */
    const int *fds;                 /* one empty file in each directory, readable, writable, O_DIRECT */
    uint32_t n_fds;
    int timeout_ms;
};

/* 0: every directory passed; else -errno, and why says what stood in the way. The descriptors stay
 * the caller's, but one may be in use until the process ends after -ETIMEDOUT (they are duplicated). */
int fk_direct_probe(const struct fk_direct_params *params, char *why, size_t why_bytes);

#endif
