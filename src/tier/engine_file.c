/*
 * engine_file.c - see engine_file.h. Touches the file system; no state, no locks. Called by
 * the engines' open and size.
 */
#include "tier/engine_file.h"

#include <fcntl.h>
#include <sys/stat.h>

#include "base/log.h"
#include "base/util.h"
#include "tier/engine.h"

/* File systems without fallocate (some FUSE, NFS 3) get a sparse file instead. */
static int allocate(int fd, uint64_t bytes)
{
    int rc;

    do {
        rc = fallocate(fd, 0, 0, (off_t)bytes) == 0 ? 0 : -errno;
    } while (rc == -EINTR);
    if (rc == -EOPNOTSUPP || rc == -ENOSYS)
        rc = ftruncate(fd, (off_t)bytes) == 0 ? 0 : -errno;
    return rc;
}

static int open_created(const char *path, int flags, bool *created)
{
    int fd = open(path, flags | O_CREAT | O_EXCL, 0600);

    *created = fd >= 0;
    if (fd >= 0 || errno != EEXIST)
        return fd >= 0 ? fd : -errno;
    fd = open(path, flags);
    return fd >= 0 ? fd : -errno;
}

/* O_DIRECT is switched on afterwards, so that a refusal leaves an ordinary open file. */
static bool make_direct(int fd, const char *path)
{
    int flags = fcntl(fd, F_GETFL);

    if (flags >= 0 && fcntl(fd, F_SETFL, flags | O_DIRECT) == 0)
        return true;
    fk_info("%s: no O_DIRECT here (%s); going through the page cache", path, strerror(errno));
    return false;
}

int fk_file_open(const char *path, uint64_t bytes, unsigned flags, int *fd_out, bool *created,
                 bool *direct)
{
    const int base = O_RDWR | O_CLOEXEC;
    uint64_t have = 0;
    int fd;

    *created = false;
    if (flags & FK_FILE_CREATE)
        fd = open_created(path, base, created);
    else if ((fd = open(path, base)) < 0)
        fd = -errno;
    if (fd < 0)
        return fd;
    int rc = fk_file_size(fd, &have);
    if (rc == 0 && (flags & FK_FILE_PREALLOC) && have < bytes)
        rc = allocate(fd, bytes);
    if (rc < 0) {
        close(fd);
        if (*created)
            unlink(path);
        return rc;
    }
    *direct = (flags & FK_FILE_DIRECT) && make_direct(fd, path);
    *fd_out = fd;
    return 0;
}

int fk_file_size(int fd, uint64_t *bytes)
{
    struct stat st;

    if (fstat(fd, &st) < 0)
        return -errno;
    *bytes = (uint64_t)st.st_size;
    return 0;
}

int fk_file_sync(int fd)
{
    return fdatasync(fd) < 0 ? -errno : 0;
}
