/* objects_impl.h - private to objects.c (blocks, spaces) and objects_logs.c (who has written what). */
#ifndef FK_STORE_OBJECTS_IMPL_H
#define FK_STORE_OBJECTS_IMPL_H

#include <pthread.h>

#include "base/util.h"
#include "store/format.h"
#include "store/logs.h"
#include "store/objects.h"

#define OBJECT_NAME 512                 /* the longest name; checked when the store is opened */

struct object_store {
    struct fk_store_bucket bucket;
    const struct fk_object_client *client;
    void *priv;                         /* the client's */
    uint64_t call_us;                   /* a call's deadline */
    pthread_mutex_t lock;               /* spaces */
    struct object_space *spaces[FK_STORE_SPACES];
    uint32_t n_spaces;
};

/* What was seen of a place for a head. */
struct object_slot {
    bool there, sound, again;           /* again: not all that it told of has been read */
    uint32_t crc;
    bool closed;
    uint64_t beat_s;
};

/* How far a chapter has been read: all before log, and keys of that one. */
struct object_reader { uint8_t uuid[16]; uint32_t log, keys; };

struct object_written { struct fk_key key, parent; };

struct object_space {
    struct object_store *store;
    char print[2 * 16 + 1];             /* the fingerprint */
    pthread_mutex_t lock;               /* header, pending */
    struct store_header header;         /* its uuid: the generation */
    FK_VEC(struct object_written) pending;      /* the scanner has not taken them yet */

    /* the scanner's alone */
    char generation[2 * 16 + 1];
    FK_VEC(struct object_slot) slots;
    FK_VEC(struct object_reader) readers;
    size_t sure;                        /* so many of pending were written before the header was seen */
    FK_VEC(struct fk_key) queue;        /* to go into logs; those before queue_at have gone */
    size_t queue_at;
    uint8_t uuid[16];                   /* of our chapter */
    uint32_t slot;                      /* our head's place; FK_NONE: none yet */
    uint32_t first, full;               /* logs [first, full) are full; the one that grows is next */
    bool log_news, head_news;           /* there is something to be written */
    uint64_t beat_us;                   /* when the head was written */
    FK_VEC(struct store_chapter) taken; /* of those whose place we have */
    struct store_log_object *log;       /* that grows */
    struct store_log_object *read;      /* room for one */
    struct store_head_object *head;     /* room for one */
};

uint64_t object_deadline(const struct object_store *s);
/* bytes of out: OBJECT_NAME */
void object_name(const struct object_store *s, char *out, const char *format, ...) __attribute__((format(printf, 3, 4)));
int object_get(const struct object_store *s, const char *name, void *to, size_t bytes);
int object_put(const struct object_store *s, const char *name, const void *from, size_t bytes);

/* objects_logs.c; the scanner, or nobody else has the space. */
int object_logs_begin(struct object_space *sp);         /* a generation: nothing known, nothing told */
int object_logs_read(struct object_space *sp, const struct fk_store_news *news);        /* logs read, or -errno */
int object_logs_tell(struct object_space *sp, bool closing);
void object_logs_free(struct object_space *sp);

#endif
