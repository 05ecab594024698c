/* objects.c - see objects.h. */
#include "nixl/objects.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <time.h>

#include "base/clock.h"
#include "base/fail.h"
#include "base/log.h"
#include "base/util.h"
#include "nixl/nixl_impl.h"
#include "nixl/nixl_lib.h"

#define ALIGN 4096u
#define CLEARED 131072u                 /* of a buffer that is read into: as much of its end */
#define KEPT 64u                        /* buffers kept for later */
#define EXIT_US 1000000u
#define POLL_FIRST_US 100u              /* NIXL has nothing to wait for: it is asked, */
#define POLL_LAST_US 2000u              /* less and less often */

struct buffer {
    void *at;
    size_t bytes;
    struct buffer *next;
};

struct transfer {
    struct buffer *buf;
    void *name, *request;               /* the registered name; NIXL's request */
    struct transfer *next;
};

struct fk_nixl_objects {
    char name[64];
    uint32_t max_late;
    pthread_mutex_t lock;               /* all below, and the agent but for asking: it has a lock of its own then */
    struct fk_nixl_agent agent;
    struct buffer *free;
    uint32_t n_free;
    struct transfer *late;
    uint32_t n_late;
    uint64_t serial;                    /* a number for each name while it is registered */
    pthread_mutex_t ask_lock;           /* one asks at a time whether something is there: NIXL waits, up to half a minute */
    void *ask_options;
};

/* ---- the process ends ---- */

/*
 * A process may end while a node is open. The plugin's SDK is taken down then, and must not be in use: no call begins any more,
 * and those under way are waited for, but not long.
 */
static _Atomic bool ending;
static _Atomic uint32_t under_way;

static bool enter(void)
{
    atomic_fetch_add(&under_way, 1);
    if (!atomic_load(&ending))
        return true;
    atomic_fetch_sub(&under_way, 1);
    return false;
}

static void leave_call(void)
{
    atomic_fetch_sub(&under_way, 1);
}

static void at_exit(void)
{
    uint64_t until = fk_clock_us() + EXIT_US;

    atomic_store(&ending, true);
    while (atomic_load(&under_way) && fk_clock_us() < until)
        usleep(POLL_LAST_US);
}

/* After the SDK's own, so before it. */
static void watch_exit(void)
{
    atexit(at_exit);
}

/* ---- opening ---- */

static int ask_options(struct fk_nixl_objects *o)
{
    int rc = fk_nixl.create_opt_args(&o->ask_options);

    return rc == NIXL_OK ? fk_nixl.opt_args_add_backend(o->ask_options, o->agent.backend) : rc;
}

int fk_nixl_objects_open(const struct fk_nixl_objects_params *p, struct fk_nixl_objects **out, char *error, size_t bytes)
{
    static pthread_once_t watched = PTHREAD_ONCE_INIT;
    static _Atomic uint32_t number;
    struct fk_nixl_config c = { .n_workers = 1, .thread_sync = NIXL_SYNC_STRICT };
    int rc = fk_nixl_load(p->library, error, bytes);

    if (rc)
        return rc;
    struct fk_nixl_objects *o = calloc(1, sizeof(*o));
    if (!o)
        return fk_fail(error, bytes, -ENOMEM, "no memory");
    pthread_mutex_init(&o->lock, NULL);
    pthread_mutex_init(&o->ask_lock, NULL);
    o->max_late = p->max_late;
    snprintf(o->name, sizeof(o->name), "flexkv-objects-%u", atomic_fetch_add(&number, 1));
    rc = nixl_agent_open(&o->agent, o->name, &c, p->plugin, p->param, p->n_params);
    if (rc == NIXL_OK)
        rc = ask_options(o);
    if (rc != NIXL_OK) {
        fk_fail(error, bytes, -ENODEV, "NIXL can't use its plugin %s: status %d; NIXL's own lines on standard error say why",
                p->plugin, rc);
        fk_nixl_objects_close(o);
        return -ENODEV;
    }
    pthread_once(&watched, watch_exit);
    *out = o;
    return 0;
}

/* ---- buffers; with the lock ---- */

static void buffer_free(struct fk_nixl_objects *o, struct buffer *b)
{
    (void)nixl_memory(&o->agent, b->at, b->bytes, false);
    free(b->at);
    free(b);
}

static struct buffer *buffer_new(struct fk_nixl_objects *o, size_t bytes)
{
    struct buffer *b = calloc(1, sizeof(*b));

    if (!b)
        return NULL;
    b->bytes = fk_round_up(bytes, ALIGN);
    b->at = aligned_alloc(ALIGN, b->bytes);
    if (!b->at || nixl_memory(&o->agent, b->at, b->bytes, true) != NIXL_OK) {
        free(b->at);
        free(b);
        return NULL;
    }
    return b;
}

/* One that is as large, or not much larger. */
static struct buffer *buffer_take(struct fk_nixl_objects *o, size_t bytes)
{
    for (struct buffer **at = &o->free; *at; at = &(*at)->next) {
        struct buffer *b = *at;
        if (b->bytes < bytes || b->bytes > 2 * fk_round_up(bytes, ALIGN))
            continue;
        *at = b->next;
        o->n_free--;
        return b;
    }
    return buffer_new(o, bytes);
}

static void buffer_give(struct fk_nixl_objects *o, struct buffer *b)
{
    if (o->n_free == KEPT) {            /* the one that was given back longest ago goes */
        struct buffer **at = &o->free;
        while ((*at)->next)
            at = &(*at)->next;
        buffer_free(o, *at);
        *at = NULL;
        o->n_free--;
    }
    b->next = o->free;
    o->free = b;
    o->n_free++;
}

/* ---- transfers; with the lock ---- */

static int name_register(struct fk_nixl_objects *o, struct transfer *t, const char *name, size_t bytes, uint64_t id)
{
    int rc = fk_nixl.create_reg_dlist(NIXL_OBJECT, &t->name);

    if (rc == NIXL_OK)
        rc = fk_nixl.reg_dlist_add_desc(t->name, 0, bytes, id, name, strlen(name));
    if (rc == NIXL_OK)
        rc = fk_nixl.register_mem(o->agent.agent, t->name, NULL);
    if (rc != NIXL_OK && t->name) {
        fk_nixl.destroy_reg_dlist(t->name);
        t->name = NULL;
    }
    return rc;
}

/* Of one that has ended, or never began. */
static void transfer_end(struct fk_nixl_objects *o, struct transfer *t)
{
    if (t->request)
        fk_nixl_forget(&o->agent, t->request);
    if (t->name) {
        fk_nixl.deregister_mem(o->agent.agent, t->name, NULL);
        fk_nixl.destroy_reg_dlist(t->name);
    }
    if (t->buf)
        buffer_give(o, t->buf);
    *t = (struct transfer){ 0 };
}

static void look_at_late(struct fk_nixl_objects *o)
{
    for (struct transfer **at = &o->late; *at;) {
        struct transfer *t = *at;
        if (fk_nixl.get_xfer_status(o->agent.agent, t->request) == NIXL_IN_PROGRESS) {
            at = &t->next;
            continue;
        }
        *at = t->next;
        transfer_end(o, t);
        free(t);
        o->n_late--;
    }
}

/* ---- one transfer ---- */

/* 0: and then end() must follow. */
static int begin(struct fk_nixl_objects *o, struct transfer *t, size_t bytes)
{
    if (!enter())
        return -ECANCELED;
    pthread_mutex_lock(&o->lock);
    look_at_late(o);
    int rc = o->n_late >= o->max_late ? -EBUSY : 0;
    t->buf = rc ? NULL : buffer_take(o, bytes);
    pthread_mutex_unlock(&o->lock);
    if (!t->buf)
        leave_call();
    return rc ? rc : t->buf ? 0 : -ENOMEM;
}

static void end(struct fk_nixl_objects *o, struct transfer *t)
{
    pthread_mutex_lock(&o->lock);
    transfer_end(o, t);
    pthread_mutex_unlock(&o->lock);
    leave_call();
}

static int post(struct fk_nixl_objects *o, struct transfer *t, int op, const char *name, size_t bytes)
{
    pthread_mutex_lock(&o->lock);
    struct nixl_there there = { .memory = NIXL_OBJECT, .device = ++o->serial, .who = o->name };
    int rc = name_register(o, t, name, bytes, there.device);
    if (rc == NIXL_OK)
        rc = nixl_request(&o->agent, op, t->buf->at, bytes, &there, &t->request);
    if (rc == NIXL_OK)
        rc = fk_nixl.post_xfer_req(o->agent.agent, t->request, NULL);
    pthread_mutex_unlock(&o->lock);
    return rc;
}

/* Nobody waits for it any more: it keeps its buffer until it has ended. */
static int leave(struct fk_nixl_objects *o, struct transfer *t)
{
    struct transfer *copy = malloc(sizeof(*copy));

    if (!copy) {                        /* lost: the buffer is never used again */
        *t = (struct transfer){ 0 };
        return -ETIMEDOUT;
    }
    *copy = *t;
    *t = (struct transfer){ 0 };
    pthread_mutex_lock(&o->lock);
    copy->next = o->late;
    o->late = copy;
    o->n_late++;
    pthread_mutex_unlock(&o->lock);
    return -ETIMEDOUT;
}

static int wait_for(struct fk_nixl_objects *o, struct transfer *t, int rc, uint64_t deadline_us)
{
    useconds_t us = POLL_FIRST_US;

    while (rc == NIXL_IN_PROGRESS) {
        if (fk_clock_us() >= deadline_us)
            return leave(o, t);
        usleep(us);
        us = fk_min(us * 3 / 2, POLL_LAST_US);
        pthread_mutex_lock(&o->lock);
        rc = fk_nixl.get_xfer_status(o->agent.agent, t->request);
        pthread_mutex_unlock(&o->lock);
    }
    return rc == NIXL_OK ? 0 : -EIO;
}

static size_t bytes_of(const struct iovec *v, int n)
{
    size_t bytes = 0;

    for (int i = 0; i < n; i++)
        bytes += v[i].iov_len;
    return bytes;
}

/* ---- is it there ---- */

static int query(struct fk_nixl_objects *o, void *list, void *answers, const char *name)
{
    bool has = false;
    int rc = fk_nixl.reg_dlist_add_desc(list, 0, 0, 0, name, strlen(name));

    if (rc == NIXL_OK)
        rc = fk_nixl.query_mem(o->agent.agent, list, answers, o->ask_options);
    if (rc == NIXL_OK)
        rc = fk_nixl.query_resp_list_has_value(answers, 0, &has);
    return rc != NIXL_OK ? -EIO : has;
}

int fk_nixl_object_exists(struct fk_nixl_objects *o, const char *name, uint64_t deadline_us)
{
    struct timespec until = { (time_t)(deadline_us / 1000000), (long)(deadline_us % 1000000) * 1000 };
    void *list = NULL, *answers = NULL;
    int rc = -EIO;

    if (!enter())
        return -ECANCELED;
    if (pthread_mutex_clocklock(&o->ask_lock, CLOCK_MONOTONIC, &until) != 0) {
        leave_call();
        return -ETIMEDOUT;
    }
    if (fk_nixl.create_reg_dlist(NIXL_OBJECT, &list) == NIXL_OK && fk_nixl.create_query_resp_list(&answers) == NIXL_OK)
        rc = query(o, list, answers, name);
    if (answers)
        fk_nixl.destroy_query_resp_list(answers);
    if (list)
        fk_nixl.destroy_reg_dlist(list);
    pthread_mutex_unlock(&o->ask_lock);
    leave_call();
    return rc;
}

/* ---- what others call ---- */

/* What an object that is too short leaves of the buffer must not be what an earlier one left there. */
static void clear_end(const struct buffer *b)
{
    size_t n = fk_min(b->bytes, (size_t)CLEARED);

    memset((char *)b->at + b->bytes - n, 0, n);
}

int fk_nixl_object_get(struct fk_nixl_objects *o, const char *name, const struct iovec *to, int n, uint64_t deadline_us)
{
    size_t bytes = bytes_of(to, n), at = 0;
    struct transfer t = { 0 };
    int rc = begin(o, &t, bytes);

    if (rc)
        return rc;
    clear_end(t.buf);
    rc = wait_for(o, &t, post(o, &t, NIXL_READ, name, bytes), deadline_us);
    for (int i = 0; i < n && !rc; at += to[i++].iov_len)
        memcpy(to[i].iov_base, (char *)t.buf->at + at, to[i].iov_len);
    end(o, &t);
    if (rc == -EIO && fk_nixl_object_exists(o, name, deadline_us) == 0)
        rc = -ENOENT;
    return rc;
}

int fk_nixl_object_put(struct fk_nixl_objects *o, const char *name, const struct iovec *from, int n,
                       bool (*go)(void *arg), void *arg, uint64_t deadline_us)
{
    size_t bytes = bytes_of(from, n), at = 0;
    struct transfer t = { 0 };
    int rc = begin(o, &t, bytes);

    if (rc)
        return rc;
    for (int i = 0; i < n; at += from[i++].iov_len)
        memcpy((char *)t.buf->at + at, from[i].iov_base, from[i].iov_len);
    rc = go && !go(arg) ? -ECANCELED : wait_for(o, &t, post(o, &t, NIXL_WRITE, name, bytes), deadline_us);
    end(o, &t);
    return rc;
}

uint32_t fk_nixl_objects_late(struct fk_nixl_objects *o)
{
    pthread_mutex_lock(&o->lock);
    look_at_late(o);
    uint32_t n = o->n_late;
    pthread_mutex_unlock(&o->lock);
    return n;
}

/* ---- closing ---- */

bool fk_nixl_objects_close(struct fk_nixl_objects *o)
{
    if (fk_nixl_objects_late(o) > 0)    /* destroying the agent would wait for them */
        return false;
    while (o->free) {
        struct buffer *b = o->free;
        o->free = b->next;
        buffer_free(o, b);
    }
    if (o->ask_options)
        fk_nixl.destroy_opt_args(o->ask_options);
    fk_nixl_close(&o->agent);
    pthread_mutex_destroy(&o->lock);
    pthread_mutex_destroy(&o->ask_lock);
    free(o);
    return true;
}
