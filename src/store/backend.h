/*
 * backend.h - what a kind of store has to do. Every function but close may wait for as long as the file system
 * likes, is called by one of the store's threads without a lock, and by several at once.
 * 0 or -errno. Included by src/store, and by tests that put faults in between.
 */
#ifndef FK_STORE_BACKEND_H
#define FK_STORE_BACKEND_H

#include "store/store.h"

#define FK_STORE_PARTS 256              /* of a space, by the first byte of the key */

/* What one listing of a part saw; zeroed at first. The backend's own. */
struct fk_store_part {
    int64_t changed_s, changed_ns;      /* the directory's time stamp */
    uint64_t since_us, listed_us;       /* when that was first seen; when it was listed last */
    bool there, leftovers;
};

struct fk_store_note { void *data; uint32_t bytes; };   /* data NULL: none, or it is not wanted */

struct fk_store_sure {
    bool (*sure)(void *arg, uint64_t user);     /* NULL: it is */
    void *arg;
    uint64_t user;
};

/* What has come to be known of a space. */
struct fk_store_news {
    void (*found)(void *arg, struct fk_key key);
    void (*forget)(void *arg);          /* all that was known is not there any more */
    void (*lost)(void *arg, struct fk_key key, struct fk_key parent);   /* after forget: put had said that it is there */
    void *arg;
    const bool *stop;                   /* looked at between objects: -ECANCELED */
};

struct fk_store_backend {
    const char *name;
    const char *setting;                /* that says where it is */
    uint64_t open_us;                   /* opening may take as long, if that is more than the store's deadline */
    int (*open)(const struct fk_store_params *p, void **store, char *error, size_t error_bytes);
    void (*close)(void *store);         /* and its spaces */
    int (*space)(void *store, const struct fk_store_space *s, void **space, char *error, size_t error_bytes);

    /* 0: the block's bytes are in buf. -ENOENT; -EBADMSG: not sound, and removed. */
    int (*get)(void *space, struct fk_key key, void *buf, struct fk_store_note *note);
    /* 0; 1: it was there. -ECANCELED: not sure, or what it was written into is gone by then. */
    int (*put)(void *space, struct fk_key key, struct fk_key parent, const void *buf,
               const struct fk_store_note *note, const struct fk_store_sure *sure);
    /* Is the place there, is it still this store's, can it be written? */
    int (*probe)(void *space, bool write);
    int (*reset)(void *space);          /* all is gone at once; the rest is done by tidy */
    /* One of the two: */
    /* found() for each block of the part. 1: nothing has changed since *part. */
    int (*list)(void *space, uint32_t part, struct fk_store_part *state, void (*found)(void *arg, struct fk_key key),
                void *arg);
    /* What others have written since the last call; and tells them what this node has. How much was read, or -errno: the
     * rest the next time. */
    int (*follow)(void *space, const struct fk_store_news *news);
    void (*settle)(void *space);        /* before closing: others are told the last news; NULL: they know */
    uint64_t (*file_bytes)(void *space);        /* what a block takes */
    /* Bytes of other spaces than those opened. */
    int (*other_bytes)(void *store, uint64_t *bytes);   /* this, evict, tidy: NULL, where it has no capacity */
    /* Removes what was used longest ago until so many bytes are gone: removed() for each block, space NULL: of no space
     * opened. -EAGAIN: another node is at it. */
    int (*evict)(void *store, uint64_t bytes, const bool *stop,
                 void (*removed)(void *arg, void *space, struct fk_key key, uint64_t bytes), void *arg);
    uint64_t (*tidy)(void *store);      /* leftovers removed since the last call; and what resets left */
};

extern const struct fk_store_backend fk_store_dir;

#endif
