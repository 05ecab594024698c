/*
 * engine.h - the vtable through which the SSD tier touches files. Backends:
 *
 *   uring    io_uring, O_DIRECT, registered files and buffers      (engine_uring.c)
 *   threads  a few threads with pread/pwrite, where io_uring is refused (engine_threads.c)
 *   fault    a filter that wraps any of them and injects faults    (engine_fault.c)
 *   sim      memory, simulated time, adversarial faults            (tests/sim)
 *
 * One engine serves all spaces and directories of a node. It is owned by one thread (the
 * node's I/O thread); only wake() may be called from others.
 */
#ifndef FK_TIER_ENGINE_H
#define FK_TIER_ENGINE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum fk_io_op { FK_IO_READ, FK_IO_WRITE };

/* One I/O; owned by the caller, untouched by him from submit until reaped. */
struct fk_io {
    enum fk_io_op op;
    uint32_t file;          /* from open() */
    uint64_t offset;        /* bytes; direct files: multiple of 4096, so are buf and bytes */
    void *buf;
    uint32_t bytes;
    int32_t result;         /* out: bytes done or -errno; short, -EAGAIN, -EINTR: the owner
                               goes on (ssd.c does) */
    void *owner;            /* the submitter's */
    struct fk_io *next;     /* the engine's while in flight, the owner's otherwise */
};

enum {
    FK_FILE_DIRECT = 1,     /* O_DIRECT where the file system takes it, else page cache */
    FK_FILE_CREATE = 2,     /* create if missing */
    FK_FILE_PREALLOC = 4,   /* allocate `bytes` on creation (fallocate); -ENOSPC if it can't */
};

struct fk_engine;
struct fk_engine_ops {
    const char *name;
    /* Opens PATH; *created tells whether it was made now. 0 or -errno. */
    int (*open)(struct fk_engine *e, const char *path, uint64_t bytes, unsigned flags,
                uint32_t *file, bool *created);
    void (*close)(struct fk_engine *e, uint32_t file);
    /* Current size of the file. */
    int (*size)(struct fk_engine *e, uint32_t file, uint64_t *bytes);
    /*
     * Memory that I/O will use again and again; may be ignored. Any size, split inside. Pins
     * it before it returns (about 0.1 s a GiB with small pages): large pools come in pieces.
     */
    int (*register_memory)(struct fk_engine *e, void *base, uint64_t bytes);
    /*
     * Waits until what was written to the file is on the medium (power loss). Optional: may
     * be NULL. Only for the rare writes that must not come undone (reset).
     */
    int (*sync)(struct fk_engine *e, uint32_t file);
    /* Queues one I/O. Never fails: an error is its result. flush() starts what is queued. */
    void (*submit)(struct fk_engine *e, struct fk_io *io);
    void (*flush)(struct fk_engine *e);
    /*
     * Takes up to max finished I/Os; waits up to timeout_us for the first one (0: does not
     * wait) or for wake(). Returns how many; 0 may come early. Wait and in-flight I/O never
     * busy-poll.
     */
    int (*reap)(struct fk_engine *e, struct fk_io **out, int max, uint64_t timeout_us);
    void (*wake)(struct fk_engine *e);                  /* any thread */
    unsigned (*inflight)(struct fk_engine *e);
    void (*destroy)(struct fk_engine *e);               /* nothing may be in flight */
};

struct fk_engine {                  /* first member of each backend's struct */
    const struct fk_engine_ops *ops;
};

struct fk_engine_params {
    unsigned depth;                 /* I/Os in flight at most; more are queued inside, and
                                       started as soon as reap() sees others end: who keeps
                                       some queued keeps the device busy while he works on
                                       what he reaped. Direct files; the others as many again */
    unsigned threads;               /* backend threads; 0: default */
    bool no_uring;                  /* FLEXKV_IOURING_ENTRIES=0 */
};

/* uring if the kernel grants it, else threads (one log line says so and why). */
int fk_engine_create(const struct fk_engine_params *params, struct fk_engine **out);
int fk_engine_uring_create(const struct fk_engine_params *params, struct fk_engine **out);
int fk_engine_threads_create(const struct fk_engine_params *params, struct fk_engine **out);

/*
 * Fault filter. Each rate is per I/O in [0,1]; seeded, so a run can be repeated. Applies to
 * direct (data) files unless tables is set.
 */
enum fk_fault_kind {
    FK_FAULT_READ_ERROR, FK_FAULT_WRITE_ERROR, FK_FAULT_READ_SHORT, FK_FAULT_WRITE_SHORT,
    FK_FAULT_READ_FLIP,      /* one bit of what was read is flipped */
    FK_FAULT_WRITE_TORN,     /* only a leading part reaches the file, reported as whole */
    FK_FAULT_WRITE_LOST,     /* nothing reaches the file, reported as whole */
    FK_FAULT_WRITE_MISDIRECT,/* lands at another aligned place of the file */
    FK_FAULT_READ_MISDIRECT, FK_FAULT_DELAY, FK_FAULT_ENOSPC,
    FK_FAULT_KINDS
};
struct fk_fault_params {
    double rate[FK_FAULT_KINDS];
    uint64_t seed;
    uint64_t delay_us;
    bool tables;
};
/* "read_error=0.001,read_flip=0.001,seed=7" -> params; 0 or -EINVAL with the word at fault. */
int fk_fault_parse(const char *spec, struct fk_fault_params *out, const char **bad_word);
/* Owns inner from then on. */
int fk_engine_fault_create(struct fk_engine *inner, const struct fk_fault_params *params,
                           struct fk_engine **out);
uint64_t fk_engine_fault_count(struct fk_engine *e, enum fk_fault_kind kind);

#endif
