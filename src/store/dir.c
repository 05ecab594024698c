/*
 * dir.c - a store in a directory that nodes share: one file for each block, named by its key.
 *
 *   PATH/evict.lock                     who makes room
 *   PATH/FINGERPRINT/header             which geometry, version and byte order
 *   PATH/FINGERPRINT/data/ab/ab...      a page with the record, then the block
 *   PATH/FINGERPRINT/data/ab/.tmp-...   being written
 *   PATH/FINGERPRINT/old-...            what a reset has put aside; removed by and by
 *
 * A file gets its name when all of it is written, so others see whole files, unless a machine fails: there is
 * no fsync, the checksum decides. Paths are looked up anew each time: a mount that comes back is found again, and one that is
 * gone is noticed, because only the parts of a space that has its header are ever made.
 *
 * A file's modification time is the time of its last use: the server's own clock sets it. Runs in the store's threads.
 */
#include <fcntl.h>
#include <stdio.h>
#include <sys/uio.h>
#include <time.h>

#include <openssl/rand.h>

#include "base/checksum.h"
#include "base/clock.h"
#include "base/fail.h"
#include "base/log.h"
#include "store/dir_impl.h"

#define SETTLED_US 3000000u             /* a time stamp stays the same for changes that follow it so closely */
#define FILE_MODE 0660                  /* the umask decides who of them may */
#define DIR_MODE 0770

/* ---- names ---- */

void dir_path_part(char *out, size_t bytes, const char *space, uint32_t part)
{
    snprintf(out, bytes, "%s/data/%02x", space, part);
}

void dir_path_block(char *out, size_t bytes, const char *space, struct fk_key key)
{
    char name[STORE_KEY_CHARS + 1];

    store_key_text(key, name);
    snprintf(out, bytes, "%s/data/%.2s/%s", space, name, name);
}

void dir_temp_name(struct dir_store *s, char *out, size_t bytes, const char *dir)
{
    snprintf(out, bytes, "%s/.tmp-%016llx-%llx", dir, (unsigned long long)s->token,
             (unsigned long long)atomic_fetch_add(&s->serial, 1));
}

bool dir_is_dots(const char *name)
{
    return name[0] == '.' && (!name[1] || (name[1] == '.' && !name[2]));
}

/* ---- opening ---- */

static int dir_open(const struct fk_store_params *p, void **out, char *error, size_t bytes)
{
    struct stat st;

    if (!p->path || !p->path[0])
        return fk_fail(error, bytes, -EINVAL, "remote_cache_dir is not given: which directory do the nodes share?");
    struct dir_store *s = calloc(1, sizeof(*s));
    if (!s)
        return fk_fail(error, bytes, -ENOMEM, "no memory");
    pthread_mutex_init(&s->lock, NULL);
    s->leftover_us = p->leftover_us;
    s->touch_us = p->touch_us;
    int n = snprintf(s->path, sizeof(s->path), "%s", p->path), rc = 0;
    if (n >= (int)sizeof(s->path))
        rc = fk_fail(error, bytes, -ENAMETOOLONG, "remote_cache_dir: the path has more than %zu characters",
                     sizeof(s->path) - 1);
    else if (mkdir(s->path, DIR_MODE) < 0 && errno != EEXIST && (errno != EROFS || stat(s->path, &st) < 0))
        rc = fk_fail(error, bytes, -errno, "remote_cache_dir %s can't be made: %s", s->path, strerror(errno));
    else if (stat(s->path, &st) < 0)
        rc = fk_fail(error, bytes, -errno, "remote_cache_dir %s: %s", s->path, strerror(errno));
    else if (!S_ISDIR(st.st_mode))
        rc = fk_fail(error, bytes, -ENOTDIR, "remote_cache_dir %s is not a directory", s->path);
    else if (RAND_bytes((unsigned char *)&s->token, sizeof(s->token)) != 1)
        rc = fk_fail(error, bytes, -EIO, "no random numbers for the names of files");
    if (rc) {
        pthread_mutex_destroy(&s->lock);
        free(s);
        return rc;
    }
    *out = s;
    return 0;
}

static void dir_close(void *store)
{
    struct dir_store *s = store;

    for (uint32_t i = 0; i < s->n_spaces; i++)
        free(s->spaces[i]);
    for (size_t i = 0; i < s->others.len; i++)
        free(s->others.data[i]);
    fk_vec_free(&s->others);
    pthread_mutex_destroy(&s->lock);
    free(s);
}

/* ---- spaces ---- */

int dir_header_read(const char *space, struct store_header *h, enum store_state *state)
{
    char path[DIR_PATH + 16], page[sizeof(*h) + 1];

    snprintf(path, sizeof(path), "%s/header", space);
    fk_autoclose int fd = open(path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
    if (fd < 0)
        return -errno;
    ssize_t n = read(fd, page, sizeof(page));
    if (n < 0)
        return -errno;
    *state = store_header_read(page, (size_t)n, h);
    return *state == STORE_OK ? 0 : *state == STORE_BYTE_ORDER || *state == STORE_VERSION_OTHER ? -EPROTO : -EBADMSG;
}

/* Written under another name and linked: of several nodes that begin a space one wins, and the others read its header. */
static int header_write(struct dir_store *s, const char *space, const struct store_header *h)
{
    char temp[DIR_PATH + 64], path[DIR_PATH + 16];
    int rc = 0;

    dir_temp_name(s, temp, sizeof(temp), space);
    snprintf(path, sizeof(path), "%s/header", space);
    int fd = open(temp, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, FILE_MODE);
    if (fd < 0)
        return -errno;
    ssize_t n = write(fd, h, sizeof(*h));
    if (n != (ssize_t)sizeof(*h))
        rc = n < 0 ? -errno : -ENOSPC;
    if (close(fd) < 0 && !rc)
        rc = -errno;
    if (!rc && link(temp, path) < 0 && errno != EEXIST)
        /* a file system without links: the last who writes wins, and all headers say the same but their number */
        rc = errno == EPERM || errno == EOPNOTSUPP || errno == ENOSYS ? (rename(temp, path) < 0 ? -errno : 0) : -errno;
    unlink(temp);
    return rc;
}

static int header_make(struct dir_store *s, const struct fk_store_space *d, const char *space)
{
    char data[DIR_PATH + 16];
    struct store_header h;
    uint8_t uuid[16];

    if (RAND_bytes(uuid, sizeof(uuid)) != 1)
        return -EIO;
    store_header_make(&h, d->name ? d->name : "", d->fingerprint, uuid, d->block_bytes);
    snprintf(data, sizeof(data), "%s/data", space);
    if ((mkdir(space, DIR_MODE) < 0 && errno != EEXIST) || (mkdir(data, DIR_MODE) < 0 && errno != EEXIST))
        return -errno;
    return header_write(s, space, &h);
}

static int refuse(const struct dir_space *sp, const struct fk_store_space *d, int rc, enum store_state state,
                  char *error, size_t bytes)
{
    const struct store_header *h = &sp->header;

    if (rc == -EPROTO && state == STORE_VERSION_OTHER)
        return fk_fail(error, bytes, -EEXIST, "%s has blocks in version %u of the format, this program writes version %u: give "
                       "another remote_cache_dir, or remove that directory", sp->path, h->version, STORE_VERSION);
    if (rc == -EPROTO)
        return fk_fail(error, bytes, -EEXIST, "%s was written by machines of the other byte order: give another "
                       "remote_cache_dir", sp->path);
    if (rc == -EBADMSG)
        return fk_fail(error, bytes, -EEXIST, "%s/header is %s: give another remote_cache_dir, or remove that "
                       "directory", sp->path, state == STORE_FOREIGN ? "not of FlexKV" : "damaged");
    if (rc)
        return fk_fail(error, bytes, rc, "remote_cache_dir: %s: %s", sp->path, strerror(-rc));
    return fk_fail(error, bytes, -EEXIST, "%s has blocks of %llu bytes, these have %llu: the same name for another model; give "
                   "another remote_cache_dir", sp->path, (unsigned long long)h->block_bytes,
                   (unsigned long long)d->block_bytes);
}

static int dir_space(void *store, const struct fk_store_space *d, void **out, char *error, size_t bytes)
{
    struct dir_store *s = store;
    struct dir_space *sp = calloc(1, sizeof(*sp));
    enum store_state state = STORE_OK;
    char print[2 * sizeof(d->fingerprint) + 1];

    if (!sp)
        return fk_fail(error, bytes, -ENOMEM, "no memory");
    sp->store = s;
    fk_hex(print, d->fingerprint, sizeof(d->fingerprint));
    snprintf(sp->path, sizeof(sp->path), "%s/%s", s->path, print);
    int rc = dir_header_read(sp->path, &sp->header, &state);
    if (rc == -ENOENT && (rc = header_make(s, d, sp->path)) == 0)
        rc = dir_header_read(sp->path, &sp->header, &state);
    if (rc || sp->header.block_bytes != d->block_bytes || memcmp(sp->header.fingerprint, d->fingerprint, 16) != 0) {
        rc = refuse(sp, d, rc, state, error, bytes);
        free(sp);
        return rc;
    }
    pthread_mutex_lock(&s->lock);
    bool room = s->n_spaces < FK_STORE_SPACES;
    if (room)
        s->spaces[s->n_spaces++] = sp;
    pthread_mutex_unlock(&s->lock);
    if (!room) {
        free(sp);
        return fk_fail(error, bytes, -ENOSPC, "remote_cache_dir %s: too many spaces", s->path);
    }
    *out = sp;
    return 0;
}

struct dir_space *dir_space_named(struct dir_store *s, const char *name)
{
    struct dir_space *found = NULL;
    size_t n = strlen(s->path) + 1;

    pthread_mutex_lock(&s->lock);
    for (uint32_t i = 0; i < s->n_spaces && !found; i++)
        if (strcmp(s->spaces[i]->path + n, name) == 0)
            found = s->spaces[i];
    pthread_mutex_unlock(&s->lock);
    return found;
}

uint64_t dir_block_file_bytes(const struct store_header *h)
{
    return STORE_PAGE + fk_round_up(h->block_bytes, STORE_PAGE);
}

static uint64_t dir_file_bytes(void *space)
{
    return dir_block_file_bytes(&((struct dir_space *)space)->header);
}

/* ---- bytes ---- */

/* Goes on after short results. 0, or -errno; reading, -EBADMSG at the end of the file. */
static int transfer(int fd, bool writing, struct iovec *v, int n)
{
    off_t at = 0;

    while (n > 0) {
        ssize_t k = writing ? pwritev(fd, v, n, at) : preadv(fd, v, n, at);
        if (k < 0 && errno == EINTR)
            continue;
        if (k <= 0)
            return k < 0 ? -errno : writing ? -ENOSPC : -EBADMSG;
        at += k;
        for (; n > 0 && (size_t)k >= v->iov_len; v++, n--)
            k -= (ssize_t)v->iov_len;
        if (n > 0) {
            v->iov_base = (char *)v->iov_base + k;
            v->iov_len -= (size_t)k;
        }
    }
    return 0;
}

/* The file at fd, or at the path. It may be refused: a read-only mount. */
static void mark_used(const struct dir_store *s, int fd, const char *path, const struct stat *st)
{
    struct timespec now;

    clock_gettime(CLOCK_REALTIME, &now);
    int64_t age_s = (int64_t)now.tv_sec - (int64_t)st->st_mtim.tv_sec;
    if (age_s < 0 || (uint64_t)age_s * 1000000u >= s->touch_us)
        (void)!(path ? utimensat(AT_FDCWD, path, NULL, AT_SYMLINK_NOFOLLOW) : futimens(fd, NULL));
}

/* The name may have got another file meanwhile: it is taken away, looked at, and given back if it was not that one. */
void dir_remove_if_same(struct dir_store *s, const char *dir, const char *path, const struct stat *st)
{
    char aside[DIR_PATH + 64];
    struct stat now;

    dir_temp_name(s, aside, sizeof(aside), dir);
    if (stat(path, &now) < 0 || now.st_ino != st->st_ino || now.st_dev != st->st_dev || rename(path, aside) < 0)
        return;
    if (stat(aside, &now) == 0 && (now.st_ino != st->st_ino || now.st_dev != st->st_dev))
        (void)!link(aside, path);       /* refused if there is a newer one again: as good */
    unlink(aside);
}

static int read_block(const struct dir_space *sp, int fd, const struct stat *st, struct fk_key key, void *buf,
                      struct fk_store_note *note)
{
    _Alignas(8) unsigned char page[STORE_PAGE];
    struct iovec v[2] = { { page, sizeof(page) }, { buf, sp->header.block_bytes } };
    struct store_record r;

    if (!S_ISREG(st->st_mode) || (uint64_t)st->st_size != STORE_PAGE + sp->header.block_bytes)
        return -EBADMSG;
    int rc = transfer(fd, false, v, 2);
    if (!rc && (!store_page_read(page, &sp->header, key, &r) ||
                r.checksum != fk_block_checksum(key, buf, sp->header.block_bytes)))
        rc = -EBADMSG;
    note->bytes = rc || !note->data ? 0 : r.note_bytes;
    if (note->bytes)
        memcpy(note->data, page + STORE_NOTE_AT, note->bytes);
    return rc;
}

static int dir_get(void *space, struct fk_key key, void *buf, struct fk_store_note *note)
{
    struct dir_space *sp = space;
    char path[DIR_PATH + 64], part[DIR_PATH + 64];
    struct stat st;

    dir_path_block(path, sizeof(path), sp->path, key);
    fk_autoclose int fd = open(path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
    if (fd < 0)
        return errno == ELOOP ? -EBADMSG : -errno;
    if (fstat(fd, &st) < 0)
        return -errno;
    int rc = read_block(sp, fd, &st, key, buf, note);
    if (rc == 0)
        mark_used(sp->store, fd, NULL, &st);
    if (rc == -EBADMSG) {
        dir_path_part(part, sizeof(part), sp->path, store_key_part(key));
        dir_remove_if_same(sp->store, part, path, &st);
    }
    (void)posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);     /* it is in the cpu tier now */
    return rc;
}

static int write_block(const struct dir_space *sp, int fd, struct fk_key key, struct fk_key parent, const void *buf,
                       const struct fk_store_note *note)
{
    _Alignas(8) unsigned char page[STORE_PAGE];
    struct iovec v[2] = { { page, sizeof(page) }, { (void *)(uintptr_t)buf, sp->header.block_bytes } };

    store_page_make(page, &sp->header, key, parent, buf, note->data, note->bytes);
    return transfer(fd, true, v, 2);
}

/* The part's directory is made at need; that of the space never, so nothing is written below a mount that is gone. */
static int create_temp(struct dir_space *sp, uint32_t part, char *temp, size_t bytes)
{
    char dir[DIR_PATH + 64];
    int flags = O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC;

    dir_path_part(dir, sizeof(dir), sp->path, part);
    dir_temp_name(sp->store, temp, bytes, dir);
    int fd = open(temp, flags, FILE_MODE);
    if (fd < 0 && errno == ENOENT) {
        if (mkdir(dir, DIR_MODE) < 0 && errno != EEXIST)
            return errno == ENOENT ? -ESTALE : -errno;
        fd = open(temp, flags, FILE_MODE);
    }
    return fd < 0 ? -errno : fd;
}

static int dir_put(void *space, struct fk_key key, struct fk_key parent, const void *buf,
                   const struct fk_store_note *note, const struct fk_store_sure *sure)
{
    struct dir_space *sp = space;
    char path[DIR_PATH + 64], temp[DIR_PATH + 160];
    struct stat st;

    dir_path_block(path, sizeof(path), sp->path, key);
    if (lstat(path, &st) == 0) {
        if (S_ISREG(st.st_mode) && (uint64_t)st.st_size == STORE_PAGE + sp->header.block_bytes) {
            mark_used(sp->store, -1, path, &st);
            return 1;
        }
    } else if (errno != ENOENT) {
        return -errno;
    }
    int fd = create_temp(sp, store_key_part(key), temp, sizeof(temp));
    if (fd < 0)
        return fd;
    int rc = write_block(sp, fd, key, parent, buf, note);
    if (close(fd) < 0 && !rc)
        rc = -errno;                    /* where a network file system says that there is no room */
    if (!rc && sure && sure->sure && !sure->sure(sure->arg, sure->user))
        rc = -ECANCELED;
    if (!rc && rename(temp, path) < 0)
        rc = errno == ENOENT ? -ECANCELED : -errno;     /* a reset has put our directory aside */
    if (rc)
        unlink(temp);
    return rc;
}

/* ---- is it there ---- */

/* A reset that was cut off may have left the space without. Only below a header that is the space's. */
static int make_data(const char *space)
{
    char data[DIR_PATH + 16];

    snprintf(data, sizeof(data), "%s/data", space);
    return mkdir(data, DIR_MODE) < 0 && errno != EEXIST ? -errno : 0;
}

static int dir_probe(void *space, bool writing)
{
    struct dir_space *sp = space;
    struct store_header h;
    enum store_state state;
    char temp[DIR_PATH + 64];
    _Alignas(8) char page[STORE_PAGE] = { 0 };
    int rc = dir_header_read(sp->path, &h, &state);

    if (rc || memcmp(h.uuid, sp->header.uuid, sizeof(h.uuid)) != 0)
        return rc ? rc : -ESTALE;       /* another store in its place */
    if (!writing)
        return 0;
    rc = make_data(sp->path);
    if (rc)
        return rc;
    dir_temp_name(sp->store, temp, sizeof(temp), sp->path);
    int fd = open(temp, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, FILE_MODE);
    if (fd < 0)
        return -errno;
    ssize_t n = write(fd, page, sizeof(page));
    rc = n == (ssize_t)sizeof(page) ? 0 : n < 0 ? -errno : -ENOSPC;
    if (close(fd) < 0 && !rc)
        rc = -errno;
    unlink(temp);
    return rc;
}

static int dir_reset(void *space)
{
    struct dir_space *sp = space;
    char data[DIR_PATH + 16], aside[DIR_PATH + 64];

    snprintf(data, sizeof(data), "%s/data", sp->path);
    snprintf(aside, sizeof(aside), "%s/old-%016llx-%llx", sp->path, (unsigned long long)sp->store->token,
             (unsigned long long)atomic_fetch_add(&sp->store->serial, 1));
    if (rename(data, aside) < 0 && errno != ENOENT)
        return -errno;
    return make_data(sp->path);
}

/* ---- listing ---- */

static void remove_leftover(struct dir_store *s, int dir, const char *name, struct fk_store_part *state)
{
    struct timespec now;
    struct stat st;

    clock_gettime(CLOCK_REALTIME, &now);
    state->leftovers = true;
    if (fstatat(dir, name, &st, AT_SYMLINK_NOFOLLOW) < 0)
        return;
    int64_t age_s = (int64_t)now.tv_sec - (int64_t)st.st_mtim.tv_sec;
    if (age_s >= 0 && (uint64_t)age_s * 1000000u >= s->leftover_us && unlinkat(dir, name, 0) == 0)
        atomic_fetch_add(&s->leftovers, 1);
}

/*
 * Has the directory changed since it was listed? Its time stamp may stay as it is for changes close together, so it is
 * listed once more when the stamp has been the same for a while.
 */
static bool unchanged(const struct fk_store_part *p, const struct stat *st, uint64_t now)
{
    return p->there && !p->leftovers && p->changed_s == (int64_t)st->st_mtim.tv_sec &&
           p->changed_ns == (int64_t)st->st_mtim.tv_nsec &&
           (p->listed_us >= p->since_us + SETTLED_US || now < p->since_us + SETTLED_US);
}

int dir_list_part(struct dir_store *s, const char *space, uint32_t part, struct fk_store_part *state,
                  void (*found)(void *arg, struct fk_key key), void *arg)
{
    char path[DIR_PATH + 64];
    uint64_t now = fk_clock_us();
    struct fk_key key;
    struct stat st;

    dir_path_part(path, sizeof(path), space, part);
    if (stat(path, &st) < 0) {
        bool was = state->there;
        state->there = false;
        return errno != ENOENT ? -errno : was ? 0 : 1;
    }
    if (unchanged(state, &st, now))
        return 1;
    DIR *d = opendir(path);
    if (!d)
        return -errno;
    struct fk_store_part next = { st.st_mtim.tv_sec, st.st_mtim.tv_nsec, now, now, true, false };
    if (state->there && state->changed_s == next.changed_s && state->changed_ns == next.changed_ns)
        next.since_us = state->since_us;
    errno = 0;
    for (struct dirent *e; (e = readdir(d)) != NULL; errno = 0) {
        if (strncmp(e->d_name, ".tmp-", 5) == 0)
            remove_leftover(s, dirfd(d), e->d_name, &next);
        else if (store_key_parse(e->d_name, &key) && store_key_part(key) == part)
            found(arg, key);
    }
    int rc = -errno;
    closedir(d);
    if (!rc)
        *state = next;
    return rc;
}

static int dir_list(void *space, uint32_t part, struct fk_store_part *state, void (*found)(void *, struct fk_key),
                    void *arg)
{
    struct dir_space *sp = space;

    return dir_list_part(sp->store, sp->path, part, state, found, arg);
}

const struct fk_store_backend fk_store_dir = {
    .name = "dir", .setting = "remote_cache_dir", .open = dir_open, .close = dir_close, .space = dir_space,
    .get = dir_get, .put = dir_put, .probe = dir_probe, .reset = dir_reset, .list = dir_list,
    .file_bytes = dir_file_bytes, .other_bytes = dir_other_bytes, .evict = dir_evict, .tidy = dir_tidy,
};
