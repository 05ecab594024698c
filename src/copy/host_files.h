/* host_files.h - see host_files.c: for tests. Used by the host copier; one thread at a time. */
#ifndef FK_COPY_HOST_FILES_H
#define FK_COPY_HOST_FILES_H

#include "copy/copier.h"

struct fk_host_files { int *fds; uint32_t n; };

int fk_host_try_direct(struct fk_copier *c, const int *fds, uint32_t n, char *why, size_t why_bytes);
int fk_host_files_open(struct fk_host_files *f, const int *fds, uint32_t n, char *why, size_t why_bytes);
void fk_host_files_close(struct fk_host_files *f);
uint32_t fk_host_files_read(const struct fk_host_files *f, const struct fk_copier *c,
                            const struct fk_copy_place *places, uint32_t n, uint64_t *residues,
                            _Atomic bool *cancelled, int *status);

#endif
