/* dir_impl.h - private to dir.c (blocks) and dir_evict.c (room, leftovers, other spaces). */
#ifndef FK_STORE_DIR_IMPL_H
#define FK_STORE_DIR_IMPL_H

#include <dirent.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/stat.h>

#include "base/util.h"
#include "store/backend.h"
#include "store/format.h"

#define DIR_PATH 1024                   /* longest path of a file; checked when the store is opened */
#define DIR_PATH_EXTRA 128u             /* what the store itself adds to its path */

struct dir_space {
    struct dir_store *store;
    struct store_header header;
    char path[DIR_PATH];
};

/* A space that others use, for the bytes it takes. */
struct dir_other {
    char name[STORE_KEY_CHARS + 1];
    uint64_t file_bytes;
    struct fk_store_part part[FK_STORE_PARTS];
    uint32_t blocks[FK_STORE_PARTS];
};

struct dir_store {
    char path[DIR_PATH - DIR_PATH_EXTRA];
    uint64_t leftover_us, touch_us;
    uint64_t token;                     /* of this opening: temporary names are nobody else's */
    _Atomic uint64_t serial, leftovers;
    pthread_mutex_t lock;               /* spaces, which only grow while the store is open */
    struct dir_space *spaces[FK_STORE_SPACES];
    uint32_t n_spaces;
    /* the scanner's alone */
    FK_VEC(struct dir_other *) others;
    uint32_t evict_part;                /* where the next eviction begins */
};

/* Each writes at most bytes; paths were checked for length. */
void dir_path_block(char *out, size_t bytes, const char *space, struct fk_key key);
void dir_path_part(char *out, size_t bytes, const char *space, uint32_t part);
/* A name that nobody else has, hidden from listings. */
void dir_temp_name(struct dir_store *s, char *out, size_t bytes, const char *dir);
/* Reads and checks SPACE/header. -ENOENT, -EBADMSG (not ours, torn), -EPROTO (another version or byte order). */
int dir_header_read(const char *space, struct store_header *h, enum store_state *state);
uint64_t dir_block_file_bytes(const struct store_header *h);
/* Removes the file if it is still that one. */
void dir_remove_if_same(struct dir_store *s, const char *dir, const char *path, const struct stat *st);
/* The blocks in a part; unfinished files that are too old go. */
int dir_list_part(struct dir_store *s, const char *space, uint32_t part, struct fk_store_part *state,
                  void (*found)(void *arg, struct fk_key key), void *arg);
bool dir_is_dots(const char *name);
struct dir_space *dir_space_named(struct dir_store *s, const char *name);

/* dir_evict.c */
int dir_other_bytes(void *store, uint64_t *bytes);
int dir_evict(void *store, uint64_t bytes, const bool *stop,
              void (*removed)(void *, void *, struct fk_key, uint64_t), void *arg);
uint64_t dir_tidy(void *store);

#endif
