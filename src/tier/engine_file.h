/* engine_file.h - opening real files, shared by the uring and threads engines. Any thread. */
#ifndef FK_TIER_ENGINE_FILE_H
#define FK_TIER_ENGINE_FILE_H

#include <stdbool.h>
#include <stdint.h>

/*
 * Opens PATH with FK_FILE_* flags, close-on-exec, mode 0600. With FK_FILE_PREALLOC a file
 * shorter than bytes is allocated up to it, also one that a crash left half made. A file
 * made now that can't be allocated is removed again. *direct tells whether O_DIRECT is on.
 */
int fk_file_open(const char *path, uint64_t bytes, unsigned flags, int *fd, bool *created,
                 bool *direct);
int fk_file_size(int fd, uint64_t *bytes);
int fk_file_sync(int fd);

#endif
