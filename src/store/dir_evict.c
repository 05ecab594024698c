/*
 * dir_evict.c - room in a shared directory: what was used longest ago goes; what other spaces take; what died
 * writers and resets have left. Runs in the scanner.
 *
 * Keys are hashes, so a part of a space is a sample of it. An eviction looks at as many parts as MAX_LOOK files fill, of all
 * spaces, beginning where the last one ended, and removes the oldest of them: of a store with fewer files exactly the
 * oldest, of a larger one nearly. Nodes take turns by a lock on PATH/evict.lock; where the file system has no
 * locks two may be at it, and remove a little more.
 */
#include <fcntl.h>
#include <stdio.h>
#include <sys/file.h>
#include <time.h>

#include "base/log.h"
#include "store/dir_impl.h"

#define MAX_LOOK 131072u
#define FILE_MODE 0660

struct candidate {
    int64_t used_s, used_ns;
    struct fk_key key;
    uint32_t space;
};

struct shared_space {                   /* any in the directory, ours or others' */
    char path[DIR_PATH];
    uint64_t file_bytes;
    struct dir_space *ours;             /* NULL: not opened here */
};

typedef FK_VEC(struct shared_space) space_list;
typedef FK_VEC(struct candidate) candidate_list;

/* Calls each() for every space's directory with a header that can be read. */
static int each_space(struct dir_store *s, int (*each)(struct dir_store *s, const char *name, const char *path,
                                                       const struct store_header *h, void *arg), void *arg)
{
    DIR *d = opendir(s->path);
    enum store_state state;
    struct store_header h;
    struct fk_key unused;
    int rc = 0;

    if (!d)
        return -errno;
    for (struct dirent *e; !rc && (e = readdir(d)) != NULL;) {
        char path[DIR_PATH];
        if (!store_key_parse(e->d_name, &unused))
            continue;
        snprintf(path, sizeof(path), "%s/%.32s", s->path, e->d_name);
        if (dir_header_read(path, &h, &state) == 0)
            rc = each(s, e->d_name, path, &h, arg);
    }
    closedir(d);
    return rc;
}

/* ---- the bytes of spaces that are not open here ---- */

static void count_one(void *arg, struct fk_key key)
{
    ++*(uint32_t *)arg;
}

static struct dir_other *other_named(struct dir_store *s, const char *name)
{
    for (size_t i = 0; i < s->others.len; i++)
        if (strcmp(s->others.data[i]->name, name) == 0)
            return s->others.data[i];
    struct dir_other *o = calloc(1, sizeof(*o));
    if (o && fk_vec_push(&s->others, o)) {
        free(o);
        o = NULL;
    }
    if (o)
        snprintf(o->name, sizeof(o->name), "%s", name);
    return o;
}

static int add_other(struct dir_store *s, const char *name, const char *path, const struct store_header *h, void *arg)
{
    uint64_t *bytes = arg;

    if (dir_space_named(s, name))
        return 0;
    struct dir_other *o = other_named(s, name);
    if (!o)
        return -ENOMEM;
    o->file_bytes = dir_block_file_bytes(h);
    for (uint32_t i = 0; i < FK_STORE_PARTS; i++) {
        uint32_t n = 0;
        int rc = dir_list_part(s, path, i, &o->part[i], count_one, &n);
        if (rc < 0)
            return rc;
        if (rc == 0)
            o->blocks[i] = n;
        *bytes += o->blocks[i] * o->file_bytes;
    }
    return 0;
}

int dir_other_bytes(void *store, uint64_t *bytes)
{
    *bytes = 0;
    return each_space(store, add_other, bytes);
}

/* ---- leftovers ---- */

/* One level of files in directories of files: what a reset has put aside. */
static void remove_tree(const char *path, int depth)
{
    DIR *d = opendir(path);

    for (struct dirent *e; d && (e = readdir(d)) != NULL;) {
        char sub[DIR_PATH + 320];
        if (dir_is_dots(e->d_name))
            continue;
        snprintf(sub, sizeof(sub), "%.*s/%.255s", DIR_PATH + 60, path, e->d_name);
        if (unlink(sub) < 0 && (errno == EISDIR || errno == EPERM) && depth > 0)
            remove_tree(sub, depth - 1);
    }
    if (d)
        closedir(d);
    rmdir(path);
}

static bool too_old(const struct dir_store *s, const struct stat *st)
{
    struct timespec now;

    clock_gettime(CLOCK_REALTIME, &now);
    int64_t age_s = (int64_t)now.tv_sec - (int64_t)st->st_mtim.tv_sec;
    return age_s >= 0 && (uint64_t)age_s * 1000000u >= s->leftover_us;
}

static int tidy_space(struct dir_store *s, const char *name, const char *path, const struct store_header *h, void *arg)
{
    DIR *d = dir_space_named(s, name) ? opendir(path) : NULL;
    char sub[DIR_PATH + 320];
    struct stat st;

    for (struct dirent *e; d && (e = readdir(d)) != NULL;) {
        snprintf(sub, sizeof(sub), "%s/%.255s", path, e->d_name);
        if (strncmp(e->d_name, "old-", 4) == 0)
            remove_tree(sub, 1);
        else if (strncmp(e->d_name, ".tmp-", 5) == 0 && lstat(sub, &st) == 0 && too_old(s, &st) && unlink(sub) == 0)
            atomic_fetch_add(&s->leftovers, 1);
    }
    if (d)
        closedir(d);
    return 0;
}

uint64_t dir_tidy(void *store)
{
    struct dir_store *s = store;

    (void)each_space(s, tidy_space, NULL);
    return atomic_exchange(&s->leftovers, 0);
}

/* ---- room ---- */

/* The lock falls with the descriptor, whoever dies. -EAGAIN: another node has it. */
static int take_turn(struct dir_store *s)
{
    char path[DIR_PATH + 16];

    snprintf(path, sizeof(path), "%s/evict.lock", s->path);
    int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, FILE_MODE);
    if (fd < 0)
        return -errno;
    if (flock(fd, LOCK_EX | LOCK_NB) < 0 && (errno == EWOULDBLOCK || errno == EINTR)) {
        close(fd);
        return -EAGAIN;
    }
    return fd;
}

static int remember_space(struct dir_store *s, const char *name, const char *path, const struct store_header *h,
                          void *arg)
{
    struct shared_space sp = { .file_bytes = dir_block_file_bytes(h), .ours = dir_space_named(s, name) };

    snprintf(sp.path, sizeof(sp.path), "%s", path);
    return fk_vec_push((space_list *)arg, sp);
}

struct looking { candidate_list *list; uint32_t space; int rc; };

static void look_at(void *arg, struct fk_key key)
{
    struct looking *l = arg;
    struct candidate c = { .key = key, .space = l->space };

    if (fk_vec_push(l->list, c))
        l->rc = -ENOMEM;
}

/* The part's blocks and when they were used. */
static int look_at_part(struct dir_store *s, const space_list *spaces, uint32_t space, uint32_t part,
                        candidate_list *list)
{
    struct looking l = { list, space, 0 };
    struct fk_store_part fresh = { 0 };
    char path[DIR_PATH + 64];
    size_t keep = list->len;
    int rc = dir_list_part(s, spaces->data[space].path, part, &fresh, look_at, &l);

    if (rc < 0 || l.rc)
        return rc < 0 ? rc : l.rc;
    for (size_t i = keep; i < list->len; i++) {
        struct candidate c = list->data[i];
        struct stat st;
        dir_path_block(path, sizeof(path), spaces->data[space].path, c.key);
        if (lstat(path, &st) < 0)
            continue;
        c.used_s = st.st_mtim.tv_sec;
        c.used_ns = st.st_mtim.tv_nsec;
        list->data[keep++] = c;
    }
    list->len = keep;
    return 0;
}

static int older_first(const void *a, const void *b)
{
    const struct candidate *x = a, *y = b;

    if (x->used_s != y->used_s)
        return x->used_s < y->used_s ? -1 : 1;
    return (x->used_ns > y->used_ns) - (x->used_ns < y->used_ns);
}

/* Used since it was looked at? Then it stays. */
static bool remove_block(const struct shared_space *sp, const struct candidate *c)
{
    char path[DIR_PATH + 64];
    struct stat st;

    dir_path_block(path, sizeof(path), sp->path, c->key);
    if (lstat(path, &st) < 0 || st.st_mtim.tv_sec != c->used_s || st.st_mtim.tv_nsec != c->used_ns)
        return false;
    return unlink(path) == 0;
}

struct eviction {
    struct dir_store *s;
    const bool *stop;
    space_list spaces;
    candidate_list list;
    uint32_t parts_left;
    uint64_t goal;
    void (*removed)(void *arg, void *space, struct fk_key key, uint64_t bytes);
    void *arg;
};

/* The oldest of those looked at. Of a sample only as many as leave most of it alone. */
static void remove_oldest(struct eviction *e, bool sample)
{
    size_t most = sample ? e->list.len / 4 + 1 : e->list.len;

    qsort(e->list.data, e->list.len, sizeof(*e->list.data), older_first);
    for (size_t i = 0; i < e->list.len && i < most && e->goal && !__atomic_load_n(e->stop, __ATOMIC_RELAXED); i++) {
        const struct candidate *c = &e->list.data[i];
        const struct shared_space *sp = &e->spaces.data[c->space];
        if (!remove_block(sp, c))
            continue;
        e->goal -= fk_min(e->goal, sp->file_bytes);
        e->removed(e->arg, sp->ours, c->key, sp->file_bytes);
    }
}

static int look_on(struct eviction *e)
{
    e->list.len = 0;
    while (e->parts_left && e->list.len < MAX_LOOK && !__atomic_load_n(e->stop, __ATOMIC_RELAXED)) {
        uint32_t part = e->s->evict_part++ % FK_STORE_PARTS;
        e->parts_left--;
        for (uint32_t i = 0; i < e->spaces.len; i++) {
            int rc = look_at_part(e->s, &e->spaces, i, part, &e->list);
            if (rc < 0)
                return rc;
        }
    }
    return 0;
}

int dir_evict(void *store, uint64_t bytes, const bool *stop,
              void (*removed)(void *, void *, struct fk_key, uint64_t), void *arg)
{
    struct eviction e = { .s = store, .stop = stop, .parts_left = FK_STORE_PARTS, .goal = bytes, .removed = removed,
                          .arg = arg };
    int turn = take_turn(e.s);

    if (turn < 0)
        return turn;
    int rc = each_space(e.s, remember_space, &e.spaces);
    while (!rc && e.goal && e.parts_left && !__atomic_load_n(stop, __ATOMIC_RELAXED)) {
        rc = look_on(&e);
        if (!rc)
            remove_oldest(&e, e.parts_left > 0);
    }
    close(turn);
    fk_vec_free(&e.spaces);
    fk_vec_free(&e.list);
    return rc;
}
