/*
 * objects.h - blocks as objects of an object store: what such a store has to be able to do (get, put, exists), and where
 * it is. Included by src/store, by who opens a store, and by tests with a client of their own.
 */
#ifndef FK_STORE_OBJECTS_H
#define FK_STORE_OBJECTS_H

#include <sys/uio.h>

#include "store/backend.h"

/*
 * A client of an object store. Several threads at once. Each call ends by its deadline (fk_clock_us()) as well as it
 * can; what it leaves behind then never touches the caller's memory.
 */
struct fk_object_client {
    int (*open)(const struct fk_store_params *p, void **client, char *error, size_t error_bytes);
    void (*close)(void *client);        /* waits for nothing */
    /* The object's first bytes, up to the room there is. 0; -ENOENT: it is sure that there is no such object; others:
     * trouble. Of a shorter one the rest is anything. */
    int (*get)(void *client, const char *name, const struct iovec *to, int n, uint64_t deadline_us);
    /* Whole or not at all. sure: asked when the bytes are copied, before they can be seen by others. */
    int (*put)(void *client, const char *name, const struct iovec *from, int n, const struct fk_store_sure *sure,
               uint64_t deadline_us);
    int (*exists)(void *client, const char *name, uint64_t deadline_us);        /* 1, 0; -errno: trouble */
};

extern const struct fk_object_client fk_objects_nixl;
extern const struct fk_store_backend fk_store_objects;

#endif
