/*
 * ssd_lock.c - one node per directory: a lock on DIR/flexkv.lock. Any thread; `lock` guards
 * the list.
 *
 * A record lock (fcntl), not flock: a forked child of an engine process inherits the latter,
 * and would keep a dead node's directory locked. Record locks don't tell two nodes of one
 * process apart and fall with the first close of the file, so this list does the former, and
 * the file is opened once per process while any store holds it.
 */
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <sys/stat.h>

#include "tier/ssd_internal.h"

struct ssd_lock {
    struct ssd_lock *next;
    const void *owner;
    dev_t device;
    ino_t inode;
    pid_t pid;                          /* a forked child inherits the list, not the locks */
    int fd;                             /* shared by all with this device and inode */
    char name[SSD_NAME_MAX + 1];
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct ssd_lock *held;

static struct ssd_lock *find(dev_t device, ino_t inode, const struct ssd_lock *not_this)
{
    for (struct ssd_lock *l = held; l; l = l->next) {
        if (l->device == device && l->inode == inode && l != not_this && l->pid == getpid())
            return l;
    }
    return NULL;
}

/* May this owner have the directory besides those of this process who have it already? */
static int share(const struct ssd_lock *first, const void *owner, const char *name)
{
    for (const struct ssd_lock *l = first; l; l = l->next) {
        if (l->device != first->device || l->inode != first->inode || l->pid != first->pid)
            continue;
        if (l->owner != owner || strcmp(l->name, name) == 0)
            return -EBUSY;
    }
    return 0;
}

static int lock_file(const char *path, int *pid)
{
    struct flock fl = { .l_type = F_WRLCK, .l_whence = SEEK_SET };
    char text[24];
    int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);

    if (fd < 0)
        return -errno;
    if (fcntl(fd, F_SETLK, &fl) < 0) {
        int rc = errno == EAGAIN || errno == EACCES ? -EBUSY : -errno;

        if (rc == -EBUSY && fcntl(fd, F_GETLK, &fl) == 0 && fl.l_type != F_UNLCK)
            *pid = (int)fl.l_pid;
        close(fd);
        return rc;
    }
    int len = snprintf(text, sizeof(text), "%d\n", (int)getpid());
    if (ftruncate(fd, 0) < 0 || pwrite(fd, text, (size_t)len, 0) < 0)
        (void)0;                        /* for people only */
    return fd;
}

static int acquire(const char *path, struct ssd_lock *l, int *pid)
{
    struct stat st;

    if (stat(path, &st) == 0) {
        struct ssd_lock *first = find(st.st_dev, st.st_ino, NULL);

        if (first) {
            *pid = (int)getpid();
            l->device = st.st_dev;
            l->inode = st.st_ino;
            l->fd = first->fd;
            return share(first, l->owner, l->name);
        }
    }
    l->fd = lock_file(path, pid);
    if (l->fd < 0)
        return l->fd;
    if (fstat(l->fd, &st) < 0) {
        close(l->fd);
        return -errno;
    }
    l->device = st.st_dev;
    l->inode = st.st_ino;
    return 0;
}

int ssd_lock_acquire(const char *dir, const void *owner, const char *name,
                     struct ssd_lock **out, int *pid)
{
    struct ssd_lock *l = calloc(1, sizeof(*l));
    fk_autofree char *path = NULL;

    *pid = 0;
    if (!l || asprintf(&path, "%s/flexkv.lock", dir) < 0) {
        free(l);
        return -ENOMEM;
    }
    l->owner = owner;
    l->pid = getpid();
    snprintf(l->name, sizeof(l->name), "%s", name);
    pthread_mutex_lock(&lock);
    int rc = acquire(path, l, pid);
    if (rc == 0) {
        l->next = held;
        held = l;
    }
    pthread_mutex_unlock(&lock);
    if (rc < 0)
        free(l);
    else
        *out = l;
    return rc;
}

void ssd_lock_release(struct ssd_lock *l)
{
    if (!l)
        return;
    pthread_mutex_lock(&lock);
    struct ssd_lock **at = &held;
    while (*at != l)
        at = &(*at)->next;
    *at = l->next;
    if (!find(l->device, l->inode, l))
        close(l->fd);
    pthread_mutex_unlock(&lock);
    free(l);
}
