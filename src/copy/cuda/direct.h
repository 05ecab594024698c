/*
 * direct.h - GPU direct storage: may bytes go between the SSD tier's files and this GPU's memory
 * without passing through the CPU's? NVIDIA's cuFile, loaded at run time, says yes too easily: where it
 * can't, it copies through host memory without a word. So it is believed only what a probe has seen:
 * bytes written through the file system and read by cuFile into GPU memory, and the other way round,
 * compared, with cuFile forbidden to fall back.
 *
 * Where the answer is yes, blocks are read so (direct_read.c), and each is still believed only when its checksum
 * has been compared.
 *
 * Callers: an agent's threads. The one that registers waits for the probe for a bounded time.
 */
#ifndef FK_COPY_CUDA_DIRECT_H
#define FK_COPY_CUDA_DIRECT_H

#include "copy/copier.h"
#include "copy/cuda/cufile.h"
#include "copy/cuda/driver.h"

#define FK_DIRECT_PROBE_BYTES (2u << 20)        /* what a probe's file may grow to */
#define FK_DIRECT_TIMEOUT_MS 5000
#define FK_DIRECT_FILES 32

struct fk_direct_params {
    const struct fk_cuda *cu;
    cu_context context;
    const char *library;            /* NULL: FK_CUFILE_LIBRARY */
    const int *fds;                 /* one empty file in each directory, readable, writable, O_DIRECT */
    uint32_t n_fds;
    int timeout_ms;
};

/* 0: every directory passed; else -errno, and why says what stood in the way. The descriptors stay
 * the caller's, but one may be in use until the process ends after -ETIMEDOUT (they are duplicated). */
int fk_direct_probe(const struct fk_direct_params *params, char *why, size_t why_bytes);

/* The copier is attached. library NULL: FK_CUFILE_LIBRARY. Descriptors stay the caller's. 0, or -errno and why. */
struct fk_cuda_copier;
int fk_direct_open(struct fk_cuda_copier *c, const char *library, const int *fds, uint32_t n, char *why,
                   size_t why_bytes);
/* See fk_copier_read_files. */
uint32_t fk_direct_read(struct fk_copier *c, const struct fk_copy_place *places, uint32_t n,
                        uint64_t *residues, _Atomic bool *cancelled, int *status);
/* Nothing is being read. */
void fk_direct_close(struct fk_cuda_copier *c);

#endif
