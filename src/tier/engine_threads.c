/*
 * engine_threads.c - the engine where io_uring is refused: a few threads with pread/pwrite.
 *
 *   submit -> pending (owner's) -> flush -> todo -> threads -> done -> reap
 *
 * Called by the engine's owner; wake() by any thread. `lock` guards todo, done, woken, stop
 * and the file table; no system call but the condition waits is made under it.
 */
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <time.h>

#include "base/util.h"
#include "tier/engine.h"
#include "tier/engine_file.h"

#define DEFAULT_THREADS 8u
#define MAX_THREADS 64u

struct io_list {
    struct fk_io *head, **tail;
};

struct threads_engine {
    struct fk_engine base;
    pthread_mutex_t lock;
    pthread_cond_t work, finished;
    struct io_list todo, done;
    bool woken, stop;
    FK_VEC(int) files;                  /* -1: closed */
    /* the owner's alone */
    struct io_list pending;
    unsigned inflight;
    unsigned n_threads;
    pthread_t threads[MAX_THREADS];
};

static struct threads_engine *self(struct fk_engine *e)
{
    return (struct threads_engine *)e;
}

static void list_init(struct io_list *l)
{
    l->head = NULL;
    l->tail = &l->head;
}

static void list_push(struct io_list *l, struct fk_io *io)
{
    io->next = NULL;
    *l->tail = io;
    l->tail = &io->next;
}

static struct fk_io *list_pop(struct io_list *l)
{
    struct fk_io *io = l->head;

    if (io) {
        l->head = io->next;
        if (!l->head)
            l->tail = &l->head;
        io->next = NULL;
    }
    return io;
}

static void list_move(struct io_list *to, struct io_list *from)
{
    if (!from->head)
        return;
    *to->tail = from->head;
    to->tail = from->tail;
    list_init(from);
}

/* --- the threads --- */

static void do_io(struct fk_io *io, int fd)
{
    ssize_t n;

    do {
        n = io->op == FK_IO_READ ? pread(fd, io->buf, io->bytes, (off_t)io->offset)
                                 : pwrite(fd, io->buf, io->bytes, (off_t)io->offset);
    } while (n < 0 && errno == EINTR);
    io->result = n < 0 ? -errno : (int32_t)n;
}

static void *thread_main(void *arg)
{
    struct threads_engine *t = arg;

    pthread_mutex_lock(&t->lock);
    for (;;) {
        struct fk_io *io = list_pop(&t->todo);

        if (!io && t->stop)
            break;
        if (!io) {
            pthread_cond_wait(&t->work, &t->lock);
            continue;
        }
        int fd = t->files.data[io->file];
        pthread_mutex_unlock(&t->lock);
        do_io(io, fd);
        pthread_mutex_lock(&t->lock);
        if (!t->done.head)
            pthread_cond_signal(&t->finished);
        list_push(&t->done, io);
    }
    pthread_mutex_unlock(&t->lock);
    return NULL;
}

/* --- files --- */

static int threads_open(struct fk_engine *e, const char *path, uint64_t bytes, unsigned flags,
                        uint32_t *file, bool *created)
{
    struct threads_engine *t = self(e);
    bool direct;
    int fd, rc = fk_file_open(path, bytes, flags, &fd, created, &direct);
    uint32_t id = 0;

    if (rc < 0)
        return rc;
    pthread_mutex_lock(&t->lock);
    while (id < t->files.len && t->files.data[id] >= 0)
        id++;
    if (id < t->files.len)
        t->files.data[id] = fd;
    else
        rc = fk_vec_push(&t->files, fd);
    pthread_mutex_unlock(&t->lock);
    if (rc < 0)
        close(fd);
    *file = id;
    return rc;
}

static int file_fd(struct threads_engine *t, uint32_t file, bool take)
{
    pthread_mutex_lock(&t->lock);
    int fd = t->files.data[file];
    if (take)
        t->files.data[file] = -1;
    pthread_mutex_unlock(&t->lock);
    return fd;
}

static void threads_close(struct fk_engine *e, uint32_t file)
{
    close(file_fd(self(e), file, true));
}

static int threads_size(struct fk_engine *e, uint32_t file, uint64_t *bytes)
{
    return fk_file_size(file_fd(self(e), file, false), bytes);
}

static int threads_sync(struct fk_engine *e, uint32_t file)
{
    return fk_file_sync(file_fd(self(e), file, false));
}

static int threads_register_memory(struct fk_engine *e, void *base, uint64_t bytes)
{
    return 0;
}

/* --- I/O --- */

static void threads_submit(struct fk_engine *e, struct fk_io *io)
{
    list_push(&self(e)->pending, io);
    self(e)->inflight++;
}

static void threads_flush(struct fk_engine *e)
{
    struct threads_engine *t = self(e);

    if (!t->pending.head)
        return;
    bool one = !t->pending.head->next;
    pthread_mutex_lock(&t->lock);
    list_move(&t->todo, &t->pending);
    pthread_mutex_unlock(&t->lock);
    if (one)
        pthread_cond_signal(&t->work);
    else
        pthread_cond_broadcast(&t->work);
}

static void wait_finished(struct threads_engine *t, uint64_t timeout_us)
{
    struct timespec until;

    timeout_us = fk_min(timeout_us, (uint64_t)1000000000000ull);
    clock_gettime(CLOCK_MONOTONIC, &until);
    uint64_t ns = (uint64_t)until.tv_nsec + timeout_us % 1000000 * 1000;
    until.tv_sec += (time_t)(timeout_us / 1000000 + ns / 1000000000);
    until.tv_nsec = (long)(ns % 1000000000);
    while (!t->done.head && !t->woken) {
        if (pthread_cond_timedwait(&t->finished, &t->lock, &until) == ETIMEDOUT)
            break;
    }
}

static int threads_reap(struct fk_engine *e, struct fk_io **out, int max, uint64_t timeout_us)
{
    struct threads_engine *t = self(e);
    struct fk_io *io;
    int n = 0;

    threads_flush(e);
    pthread_mutex_lock(&t->lock);
    if (timeout_us > 0 && max > 0)
        wait_finished(t, timeout_us);
    while (n < max && (io = list_pop(&t->done)))
        out[n++] = io;
    t->woken = false;
    pthread_mutex_unlock(&t->lock);
    t->inflight -= (unsigned)n;
    return n;
}

static void threads_wake(struct fk_engine *e)
{
    struct threads_engine *t = self(e);

    pthread_mutex_lock(&t->lock);
    t->woken = true;
    pthread_cond_signal(&t->finished);
    pthread_mutex_unlock(&t->lock);
}

static unsigned threads_inflight(struct fk_engine *e)
{
    return self(e)->inflight;
}

/* --- life --- */

static void threads_destroy(struct fk_engine *e)
{
    struct threads_engine *t = self(e);

    pthread_mutex_lock(&t->lock);
    t->stop = true;
    pthread_cond_broadcast(&t->work);
    pthread_mutex_unlock(&t->lock);
    for (unsigned i = 0; i < t->n_threads; i++)
        pthread_join(t->threads[i], NULL);
    for (size_t i = 0; i < t->files.len; i++) {
        if (t->files.data[i] >= 0)
            close(t->files.data[i]);
    }
    fk_vec_free(&t->files);
    pthread_cond_destroy(&t->finished);
    pthread_cond_destroy(&t->work);
    pthread_mutex_destroy(&t->lock);
    free(t);
}

static const struct fk_engine_ops threads_ops = {
    .name = "threads", .open = threads_open, .close = threads_close, .size = threads_size,
    .sync = threads_sync, .register_memory = threads_register_memory, .submit = threads_submit,
    .flush = threads_flush, .reap = threads_reap, .wake = threads_wake,
    .inflight = threads_inflight, .destroy = threads_destroy,
};

/* The process's signals are not ours to handle. */
static int start_threads(struct threads_engine *t, unsigned n)
{
    sigset_t all, old;
    int rc = 0;

    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    while (t->n_threads < n && rc == 0) {
        rc = -pthread_create(&t->threads[t->n_threads], NULL, thread_main, t);
        if (rc == 0) {
            char name[16];

            snprintf(name, sizeof(name), "flexkv-disk%u", t->n_threads % 100);
            pthread_setname_np(t->threads[t->n_threads++], name);
        }
    }
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    return t->n_threads > 0 ? 0 : rc;   /* fewer than wished for will do */
}

int fk_engine_threads_create(const struct fk_engine_params *params, struct fk_engine **out)
{
    struct threads_engine *t = calloc(1, sizeof(*t));
    unsigned n = params->threads ? params->threads : DEFAULT_THREADS;
    pthread_condattr_t attr;

    if (!t)
        return -ENOMEM;
    if (params->depth)
        n = fk_min(n, params->depth);
    t->base.ops = &threads_ops;
    list_init(&t->todo);
    list_init(&t->done);
    list_init(&t->pending);
    pthread_mutex_init(&t->lock, NULL);
    pthread_cond_init(&t->work, NULL);
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&t->finished, &attr);
    pthread_condattr_destroy(&attr);
    int rc = start_threads(t, fk_min(n, MAX_THREADS));
    if (rc < 0) {
        threads_destroy(&t->base);
        return rc;
    }
    *out = &t->base;
    return 0;
}
