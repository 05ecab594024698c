/*
 * nixl_lib.h - NIXL's C library (libnixl_capi.so, of NVIDIA's wheel or a build of one's own), loaded at run time. There is
 * no header of it in the wheel: what is used is declared here, as NIXL 1.4 and 1.5 have it (Apache-2.0).
 *
 * Here: loading it, and agents that write into other processes' memory, for the transport. Objects: objects.h.
 *
 * An *agent* owns connections and registered memory. Each channel has one of its own on both sides, so that destroying
 * it makes sure that nothing reads or writes our memory any more for that peer. The thread of its transport; the
 * reader's agents have a thread of NIXL's besides, which sleeps unless something arrives.
 */
#ifndef FK_NIXL_LIB_H
#define FK_NIXL_LIB_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct fk_nixl_agent {
    void *agent;
    void *backend;
    char *remote;                       /* whom it writes to; malloc'd by NIXL */
};

struct fk_nixl_param { const char *name, *value; };     /* for a plugin; one with an empty value is left out */

/* Loads the library once in a process: `path` names it or its folder, NULL: as the system finds it. 0, or -errno and a line
 * in error. */
int fk_nixl_load(const char *path, char *error, size_t bytes);

/* plugin: "UCX". device: UCX's network device. progress: with a thread that takes what arrives. 0 or -EIO (said in the log). */
int fk_nixl_open(struct fk_nixl_agent *a, const char *name, const char *plugin, const char *device, bool progress);
void fk_nixl_close(struct fk_nixl_agent *a);
int fk_nixl_register(struct fk_nixl_agent *a, void *base, size_t bytes);     /* 0 or -EIO (said in the log) */

/* Reader: who it is and what may be written to; malloc'd. */
int fk_nixl_metadata(struct fk_nixl_agent *a, void **data, size_t *bytes);
/* Owner: whom it writes to from now on. */
int fk_nixl_peer(struct fk_nixl_agent *a, const void *data, size_t bytes);

/* 0: *transfer is under way; -errno: not begun. Both ends must lie in registered memory. */
int fk_nixl_write(struct fk_nixl_agent *a, const void *data, size_t bytes, uint64_t to, void **transfer);
/* 0: all bytes are in the peer's memory; -EINPROGRESS; -EIO: the peer is lost. */
int fk_nixl_done(struct fk_nixl_agent *a, void *transfer);
/* Ended or not: the agent is destroyed before its memory is used again. */
void fk_nixl_forget(struct fk_nixl_agent *a, void *transfer);

#endif
