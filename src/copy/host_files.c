/*
 * host_files.c - for tests alone (fk_cufile_through_cpu): the host copier's way to read files into pages, so that
 * what is around GPU direct storage runs where there is no GPU. No faster than going through the CPU tier.
 * FKTEST_GDS_SPOIL=N spoils what is read of every Nth block.
 */
#include "copy/host_files.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/checksum.h"
#include "base/util.h"
#include "copy/cuda/cufile.h"

#define SECTOR 4096u

int fk_host_try_direct(struct fk_copier *c, const int *fds, uint32_t n, char *why, size_t why_bytes)
{
    bool fit = true;
    struct stat st;

    for (uint32_t i = 0; i < n; i++)    /* as cuFile, which opens it by its name */
        fit &= fstat(fds[i], &st) == 0 && st.st_nlink;
    if (fk_cufile_through_cpu() && fit)
        return 0;
    snprintf(why, why_bytes, "the engine's pages are not in a GPU's memory");
    return -ENOTSUP;
}

int fk_host_files_open(struct fk_host_files *f, const int *fds, uint32_t n, char *why, size_t why_bytes)
{
    f->fds = calloc(n, sizeof(*f->fds));
    for (; f->fds && f->n < n; f->n++)
        if ((f->fds[f->n] = dup(fds[f->n])) < 0)
            break;
    if (f->n == n)
        return 0;
    fk_host_files_close(f);
    snprintf(why, why_bytes, "out of memory or descriptors");
    return -ENOMEM;
}

void fk_host_files_close(struct fk_host_files *f)
{
    while (f->n > 0)
        close(f->fds[--f->n]);
    free(f->fds);
    f->fds = NULL;
}

static void scatter(const struct fk_copier *c, const char *from, uint32_t page)
{
    for (uint32_t i = 0; i < c->n_regions; i++) {
        const flexkv_region *r = &c->regions[i];
        memcpy((char *)r->base + page * r->stride, from, r->page_bytes);
        from += r->page_bytes;
    }
}

static void spoil(char *buffer)
{
    const char *every = getenv("FKTEST_GDS_SPOIL");
    static unsigned n;

    if (every && ++n % (unsigned)atoi(every) == 0)
        buffer[n % SECTOR] ^= 4;
}

uint32_t fk_host_files_read(const struct fk_host_files *f, const struct fk_copier *c,
                            const struct fk_copy_place *places, uint32_t n, uint64_t *residues,
                            _Atomic bool *cancelled, int *status)
{
    uint64_t bytes = 0;
    uint32_t i = 0;

    for (uint32_t r = 0; r < c->n_regions; r++)
        bytes += c->regions[r].page_bytes;
    char *buffer = aligned_alloc(SECTOR, fk_round_up(bytes, SECTOR));
    *status = buffer ? 0 : -ENOMEM;
    for (; !*status && i < n && !atomic_load(cancelled); i++) {
        if (places[i].file >= f->n || pread(f->fds[places[i].file], buffer, fk_round_up(bytes, SECTOR),
                                            (off_t)places[i].offset) < (ssize_t)bytes) {
            *status = -EIO;
            break;
        }
        spoil(buffer);
        scatter(c, buffer, places[i].page);
        residues[i] = fk_crc_residue(buffer, bytes);
    }
    free(buffer);
    return i;
}
