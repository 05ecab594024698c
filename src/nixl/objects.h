/*
 * objects.h - objects through NIXL's plugins for object stores (OBJ: S3 and what speaks it, AZURE_BLOB): read, written, looked
 * for, by name. Knows bytes and names; nothing of blocks. Used by src/store.
 *
 * A call waits until its deadline and not longer. NIXL can't take a transfer back, so bytes go through buffers of ours:
 * one whose transfer is late stays with it until NIXL has done with it, the caller's memory is never touched
 * after the call. So many late ones at a time, then calls are refused until some of them have ended.
 *
 * Any thread; several at once. NIXL's agent is called under a lock, for as long as a call takes that waits for nothing.
 */
#ifndef FK_NIXL_OBJECTS_H
#define FK_NIXL_OBJECTS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

#include "nixl/nixl_lib.h"

struct fk_nixl_objects_params {
    const char *library;                /* as for fk_nixl_load */
    const char *plugin;
    const struct fk_nixl_param *param;
    uint32_t n_params;
    uint32_t max_late;
};

struct fk_nixl_objects;

/* 0, or -errno and a line in error. May take long: the plugin may ask the machine who it is. */
int fk_nixl_objects_open(const struct fk_nixl_objects_params *p, struct fk_nixl_objects **out, char *error, size_t bytes);
/* True: all is given back. False: late transfers are under way, they and the agent are left behind. Does not wait. */
bool fk_nixl_objects_close(struct fk_nixl_objects *o);

/* deadline_us: fk_clock_us(). 0; -ENOENT: there is no such object; -ETIMEDOUT; -EBUSY: too many late ones; -EIO; -ENOMEM.
 * Of an object that is shorter the rest of `to` is filled with anything, of a longer one the first bytes come. */
int fk_nixl_object_get(struct fk_nixl_objects *o, const char *name, const struct iovec *to, int n, uint64_t deadline_us);
/* go: asked when all bytes are copied and none is sent yet; false: -ECANCELED. NULL: go on. */
int fk_nixl_object_put(struct fk_nixl_objects *o, const char *name, const struct iovec *from, int n,
                       bool (*go)(void *arg), void *arg, uint64_t deadline_us);

/* 1: it is there; 0: it is not; -errno: nobody says so. May be late by NIXL's own deadline of half a minute. */
int fk_nixl_object_exists(struct fk_nixl_objects *o, const char *name, uint64_t deadline_us);

uint32_t fk_nixl_objects_late(struct fk_nixl_objects *o);       /* transfers that nobody waits for any more */

#endif
