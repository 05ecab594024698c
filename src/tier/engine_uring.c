/*
 * engine_uring.c - the engine over one io_uring: registered files, registered memory, wake-up
 * by an eventfd that is read in the ring. Touches the kernel and its own struct only. Called
 * by the engine's owner (one thread at a time, no lock); wake() by any thread.
 *
 * Why not SINGLE_ISSUER and DEFER_TASKRUN: they bind the ring to the thread that enabled it,
 * and a store is opened and recovered on the opener's thread, then served by the I/O thread
 * (and later spaces may be opened by yet another one). COOP_TASKRUN gives most of the gain
 * and lets the owner change hands while nothing is in flight. The one request that outlives
 * a reap, the read of the eventfd, is armed anew when another thread comes to wait.
 *
 *   submit -> lane -> (flush, at most depth of each lane) -> SQ -> kernel -> CQ -> reap
 *
 * Direct files have one lane, the others (slot tables, in the page cache) another: a burst of
 * small table writes must not take the places of I/Os that keep the device busy.
 *
 * Results are handed on as they are: a short or -EAGAIN/-EINTR result is continued by the
 * store, which knows where it stands.
 */
#include <fcntl.h>
#include <liburing.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <sys/uio.h>

#include "base/log.h"
#include "base/util.h"
#include "tier/engine.h"
#include "tier/engine_file.h"

#define MAX_FIXED_FILES 1024u
#define MAX_FIXED_CHUNKS 4096u
#define CHUNK_BYTES FK_GIB              /* the kernel refuses more in one buffer */

/* The low bits of user_data tell what completed; an fk_io is at least 8-aligned. */
enum { TAG_IO = 0, TAG_WAKE = 1, TAG_CANCEL = 2, TAG_MASK = 7 };

struct uring_file {
    int fd;                             /* -1: closed */
    bool fixed;
    bool direct;                        /* as asked for */
};

struct lane {
    struct fk_io *head, **tail;         /* queued, not yet in the SQ */
    unsigned queued, running;
};

struct chunk {
    char *base;
    uint64_t bytes;
    unsigned index;                     /* in the kernel's table */
};

struct uring_engine {
    struct fk_engine base;
    struct io_uring ring;
    unsigned depth, entries;
    struct lane lanes[2];               /* by uring_file.direct */
    FK_VEC(struct uring_file) files;
    FK_VEC(struct chunk) chunks;        /* sorted by base */
    unsigned n_fixed_chunks;
    bool fixed_files, fixed_memory;
    int wake_fd;
    uint64_t wake_value;
    uint64_t wake_round;                /* the armed read's number, 0: not armed */
    uint64_t wake_rounds;
    pid_t wake_tid;
};

static struct uring_engine *self(struct fk_engine *e)
{
    return (struct uring_engine *)e;
}

/* --- files --- */

static void file_fix(struct uring_engine *u, uint32_t id)
{
    struct uring_file *f = &u->files.data[id];

    if (!u->fixed_files || id >= MAX_FIXED_FILES)
        return;
    int rc = io_uring_register_files_update(&u->ring, id, &f->fd, 1);
    f->fixed = rc == 1;
    if (rc < 0) {
        u->fixed_files = false;
        fk_info("io_uring: file not registered (%s); going on without", strerror(-rc));
    }
}

static int uring_open(struct fk_engine *e, const char *path, uint64_t bytes, unsigned flags,
                      uint32_t *file, bool *created)
{
    struct uring_engine *u = self(e);
    struct uring_file f = { .fd = -1, .direct = (flags & FK_FILE_DIRECT) != 0 };
    bool direct;
    uint32_t id = 0;

    while (id < u->files.len && u->files.data[id].fd >= 0)
        id++;
    if (id == u->files.len && fk_vec_push(&u->files, f) < 0)
        return -ENOMEM;
    int rc = fk_file_open(path, bytes, flags, &f.fd, created, &direct);
    if (rc < 0)
        return rc;
    u->files.data[id] = f;
    file_fix(u, id);
    *file = id;
    return 0;
}

static void uring_close(struct fk_engine *e, uint32_t file)
{
    struct uring_engine *u = self(e);
    struct uring_file *f = &u->files.data[file];
    int none = -1;

    if (f->fixed)
        io_uring_register_files_update(&u->ring, file, &none, 1);
    close(f->fd);
    *f = (struct uring_file){ .fd = -1 };
}

static int uring_size(struct fk_engine *e, uint32_t file, uint64_t *bytes)
{
    return fk_file_size(self(e)->files.data[file].fd, bytes);
}

static int uring_sync(struct fk_engine *e, uint32_t file)
{
    return fk_file_sync(self(e)->files.data[file].fd);
}

/* --- memory --- */

static int chunk_add(struct uring_engine *u, char *base, uint64_t bytes)
{
    struct iovec iov = { .iov_base = base, .iov_len = bytes };

    if (u->n_fixed_chunks == MAX_FIXED_CHUNKS)
        return -ENOSPC;
    if (fk_vec_reserve(&u->chunks, u->chunks.len + 1) < 0)
        return -ENOMEM;
    __u64 tag = 0;
    int rc = io_uring_register_buffers_update_tag(&u->ring, u->n_fixed_chunks, &iov, &tag, 1);
    if (rc < 0)
        return rc;
    size_t at = u->chunks.len++;
    for (; at > 0 && u->chunks.data[at - 1].base > base; at--)
        u->chunks.data[at] = u->chunks.data[at - 1];
    u->chunks.data[at] = (struct chunk){ base, bytes, u->n_fixed_chunks++ };
    return 0;
}

static int uring_register_memory(struct fk_engine *e, void *base, uint64_t bytes)
{
    struct uring_engine *u = self(e);
    char *at = base;

    while (bytes > 0 && u->fixed_memory) {
        uint64_t piece = fk_min(bytes, (uint64_t)CHUNK_BYTES);
        int rc = chunk_add(u, at, piece);

        if (rc < 0) {
            u->fixed_memory = false;    /* what is registered stays in use */
            fk_info("io_uring: %llu MiB of memory not registered (%s); going on without",
                    (unsigned long long)(bytes / FK_MIB), strerror(-rc));
            return rc;
        }
        at += piece;
        bytes -= piece;
    }
    return bytes == 0 ? 0 : -ENOTSUP;
}

/* The registered chunk that holds all of [buf, buf + bytes), or NULL. */
static const struct chunk *chunk_of(const struct uring_engine *u, const char *buf, uint64_t bytes)
{
    size_t lo = 0, hi = u->chunks.len;

    while (lo < hi) {
        size_t mid = (lo + hi) / 2;

        if (u->chunks.data[mid].base <= buf)
            lo = mid + 1;
        else
            hi = mid;
    }
    if (lo == 0)
        return NULL;
    const struct chunk *c = &u->chunks.data[lo - 1];
    uint64_t skip = (uint64_t)(buf - c->base);
    return skip < c->bytes && bytes <= c->bytes - skip ? c : NULL;
}

/* --- I/O --- */

static void prepare(struct uring_engine *u, struct io_uring_sqe *sqe, struct fk_io *io)
{
    const struct uring_file *f = &u->files.data[io->file];
    const struct chunk *c = chunk_of(u, io->buf, io->bytes);
    int fd = f->fixed ? (int)io->file : f->fd;

    if (io->op == FK_IO_READ && c)
        io_uring_prep_read_fixed(sqe, fd, io->buf, io->bytes, io->offset, (int)c->index);
    else if (io->op == FK_IO_READ)
        io_uring_prep_read(sqe, fd, io->buf, io->bytes, io->offset);
    else if (c)
        io_uring_prep_write_fixed(sqe, fd, io->buf, io->bytes, io->offset, (int)c->index);
    else
        io_uring_prep_write(sqe, fd, io->buf, io->bytes, io->offset);
    if (f->fixed)
        io_uring_sqe_set_flags(sqe, IOSQE_FIXED_FILE);
    io_uring_sqe_set_data64(sqe, (uint64_t)(uintptr_t)io | TAG_IO);
}

/* Moves queued I/Os into the SQ; no system call. */
static void fill_from(struct uring_engine *u, struct lane *l)
{
    while (l->head && l->running < u->depth) {
        struct io_uring_sqe *sqe = io_uring_get_sqe(&u->ring);

        if (!sqe)
            break;
        struct fk_io *io = l->head;
        l->head = io->next;
        if (!l->head)
            l->tail = &l->head;
        prepare(u, sqe, io);
        l->queued--;
        l->running++;
    }
}

static void fill_sq(struct uring_engine *u)
{
    fill_from(u, &u->lanes[1]);
    fill_from(u, &u->lanes[0]);
}

static struct lane *lane_of(struct uring_engine *u, const struct fk_io *io)
{
    return &u->lanes[u->files.data[io->file].direct];
}

static void uring_submit(struct fk_engine *e, struct fk_io *io)
{
    struct lane *l = lane_of(self(e), io);

    io->next = NULL;
    *l->tail = io;
    l->tail = &io->next;
    l->queued++;
}

/*
 * A failed io_uring_submit (-EAGAIN, -EBUSY, -EINTR, -ENOMEM) leaves its entries in the SQ;
 * the next flush or reap submits them again. Errors of an I/O come as its completion.
 */
static void uring_flush(struct fk_engine *e)
{
    struct uring_engine *u = self(e);

    fill_sq(u);
    if (io_uring_sq_ready(&u->ring) > 0)
        io_uring_submit(&u->ring);
}

/* --- waking --- */

static void uring_wake(struct fk_engine *e)
{
    uint64_t one = 1;
    ssize_t ignored = write(self(e)->wake_fd, &one, sizeof(one));

    (void)ignored;                      /* a full counter wakes as well */
}

/*
 * Completions are run by the thread that submitted (COOP_TASKRUN), so the read must be the
 * waiting thread's own. No SQE free: the wait goes on without it, and is armed next time.
 */
static void arm_wake(struct uring_engine *u)
{
    pid_t tid = (pid_t)syscall(SYS_gettid);
    struct io_uring_sqe *sqe;

    if (u->wake_round && u->wake_tid == tid)
        return;
    if (u->wake_round) {
        sqe = io_uring_get_sqe(&u->ring);
        if (!sqe)
            return;
        io_uring_prep_cancel64(sqe, u->wake_round << 3 | TAG_WAKE, 0);
        io_uring_sqe_set_data64(sqe, TAG_CANCEL);
        u->wake_round = 0;
    }
    sqe = io_uring_get_sqe(&u->ring);
    if (!sqe)
        return;
    u->wake_round = ++u->wake_rounds;
    u->wake_tid = tid;
    io_uring_prep_read(sqe, u->wake_fd, &u->wake_value, sizeof(u->wake_value), 0);
    io_uring_sqe_set_data64(sqe, u->wake_round << 3 | TAG_WAKE);
}

/* True if this was wake() itself, not an old round's cancellation. */
static bool wake_done(struct uring_engine *u, uint64_t data, int res)
{
    if (data >> 3 == u->wake_round)
        u->wake_round = 0;
    return res == (int)sizeof(u->wake_value);
}

/* --- completions --- */

/* Takes what lies in the CQ. *woken: wake() was called. */
static int take(struct uring_engine *u, struct fk_io **out, int max, bool *woken)
{
    struct io_uring_cqe *cqes[64];
    int n = 0;

    while (n < max) {
        unsigned want = (unsigned)fk_min(max - n, (int)fk_array_size(cqes));
        unsigned got = io_uring_peek_batch_cqe(&u->ring, cqes, want);

        for (unsigned i = 0; i < got; i++) {
            uint64_t data = cqes[i]->user_data;

            if ((data & TAG_MASK) == TAG_IO) {
                struct fk_io *io = (struct fk_io *)(uintptr_t)data;

                io->result = cqes[i]->res;
                io->next = NULL;
                lane_of(u, io)->running--;
                out[n++] = io;
            } else if ((data & TAG_MASK) == TAG_WAKE && wake_done(u, data, cqes[i]->res)) {
                *woken = true;
            }
        }
        io_uring_cq_advance(&u->ring, got);
        if (got < want)
            break;
    }
    return n;
}

static int uring_reap(struct fk_engine *e, struct fk_io **out, int max, uint64_t timeout_us)
{
    struct uring_engine *u = self(e);
    bool woken = false;
    int n = take(u, out, max, &woken);

    if (n > 0 || woken || timeout_us == 0) {
        uring_flush(e);                 /* room for the queued ones */
        return n;
    }
    fill_sq(u);
    arm_wake(u);
    if (timeout_us > 1000000000000ull)
        timeout_us = 1000000000000ull;
    struct __kernel_timespec ts = {
        .tv_sec = (long long)(timeout_us / 1000000),
        .tv_nsec = (long long)(timeout_us % 1000000) * 1000,
    };
    struct io_uring_cqe *cqe;
    io_uring_submit_and_wait_timeout(&u->ring, &cqe, 1, &ts, NULL);
    n = take(u, out, max, &woken);      /* -ETIME, -EINTR: what there is, perhaps nothing */
    uring_flush(e);
    return n;
}

static unsigned uring_inflight(struct fk_engine *e)
{
    const struct uring_engine *u = self(e);

    return u->lanes[0].queued + u->lanes[0].running + u->lanes[1].queued + u->lanes[1].running;
}

/* --- life --- */

static void uring_destroy(struct fk_engine *e)
{
    struct uring_engine *u = self(e);

    io_uring_queue_exit(&u->ring);
    for (size_t i = 0; i < u->files.len; i++) {
        if (u->files.data[i].fd >= 0)
            close(u->files.data[i].fd);
    }
    if (u->wake_fd >= 0)
        close(u->wake_fd);
    fk_vec_free(&u->files);
    fk_vec_free(&u->chunks);
    free(u);
}

static const struct fk_engine_ops uring_ops = {
    .name = "uring", .open = uring_open, .close = uring_close, .size = uring_size,
    .sync = uring_sync, .register_memory = uring_register_memory, .submit = uring_submit,
    .flush = uring_flush, .reap = uring_reap, .wake = uring_wake, .inflight = uring_inflight,
    .destroy = uring_destroy,
};

/* The kernel's best first; what it refuses with -EINVAL is left out. */
static int ring_init(struct uring_engine *u)
{
    static const unsigned tries[] = {
        IORING_SETUP_SUBMIT_ALL | IORING_SETUP_COOP_TASKRUN | IORING_SETUP_TASKRUN_FLAG,
        IORING_SETUP_SUBMIT_ALL,
        0,
    };
    int rc = -EINVAL;

    for (size_t i = 0; i < fk_array_size(tries) && rc == -EINVAL; i++) {
        struct io_uring_params p = { .flags = tries[i] | IORING_SETUP_CLAMP };

        rc = io_uring_queue_init_params(u->entries, &u->ring, &p);
    }
    if (rc < 0)
        return rc;
    if (!(u->ring.features & IORING_FEAT_EXT_ARG) || !(u->ring.features & IORING_FEAT_NODROP)) {
        io_uring_queue_exit(&u->ring);
        return -ENOSYS;                 /* before 5.11: no wait with a timeout */
    }
    return 0;
}

int fk_engine_uring_create(const struct fk_engine_params *params, struct fk_engine **out)
{
    struct uring_engine *u = calloc(1, sizeof(*u));

    if (!u)
        return -ENOMEM;
    u->base.ops = &uring_ops;
    u->depth = fk_min(params->depth ? params->depth : 128u, 4096u);
    u->entries = 2 * u->depth + 4;      /* room for the wake-up and its cancellation */
    u->lanes[0].tail = &u->lanes[0].head;
    u->lanes[1].tail = &u->lanes[1].head;
    u->wake_fd = eventfd(0, EFD_CLOEXEC);
    int rc = u->wake_fd < 0 ? -errno : ring_init(u);
    if (rc < 0) {
        if (u->wake_fd >= 0)
            close(u->wake_fd);
        free(u);
        return rc;
    }
    u->fixed_files = io_uring_register_files_sparse(&u->ring, MAX_FIXED_FILES) == 0;
    u->fixed_memory = io_uring_register_buffers_sparse(&u->ring, MAX_FIXED_CHUNKS) == 0;
    if (!u->fixed_files || !u->fixed_memory)
        fk_info("io_uring: no tables for registered files or memory; going on without");
    *out = &u->base;
    return 0;
}
