/*
 * pool.h - the cpu tier's memory: one mapping of slots, in huge pages where there are any,
 * spread over the NUMA nodes, and faulted in by a thread of its own so that start-up does
 * not wait. Usable at once: a page not there yet is faulted in by its first use.
 *
 * Which slot holds what is the index's business. Caller: src/api. create and destroy by one
 * thread; populated() by any.
 */
#ifndef FK_TIER_POOL_H
#define FK_TIER_POOL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum fk_pool_pages { FK_POOL_AUTO, FK_POOL_HUGETLB, FK_POOL_THP, FK_POOL_PLAIN };

struct fk_pool_params {
    uint64_t bytes;
    enum fk_pool_pages pages;
    uint64_t hugepage_bytes;        /* of hugetlb; a power of two; 0: 2 MiB */
    bool shared;                    /* other processes will map it: a memfd is a must */
    const char *numa_nodes;         /* "auto": all this process may use; a list, as "0,2-3"; NULL: as
                                       the kernel does by itself */
    void (*populated)(void *arg);   /* called by the pool's thread after each chunk; or NULL */
    void *arg;
};

struct fk_pool;

/* -ENOMEM, -EINVAL with a message that names the setting; also when huge pages or nodes were
 * asked for by name and are not there. */
int fk_pool_create(const struct fk_pool_params *params, struct fk_pool **out, char *error,
                   size_t error_bytes);
void fk_pool_destroy(struct fk_pool *pool);
/* Instead: all ends but the memory, as something may still write to it. */
void fk_pool_leave(struct fk_pool *pool);
void *fk_pool_base(const struct fk_pool *pool);
uint64_t fk_pool_bytes(const struct fk_pool *pool);     /* mapped: what was asked for, or more */
int fk_pool_fd(const struct fk_pool *pool);             /* -1: not shareable */
const char *fk_pool_kind(const struct fk_pool *pool);   /* "hugetlb", "thp", "plain" */
/* Bytes from the base that are faulted in. */
uint64_t fk_pool_populated(const struct fk_pool *pool);

#endif
