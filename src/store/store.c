/* store.c - a store is opened, asked, and closed. See store.h, store_impl.h. */
#include <signal.h>
#include <stdio.h>
#include <time.h>

#include "base/clock.h"
#include "base/fail.h"
#include "base/log.h"
#include "base/thread.h"
#include "store/store_impl.h"

#define DEFAULT_THREADS 4u
#define MAX_THREADS 64u
#define DEFAULT_QUEUED 1024u
#define DONE_PER_REQUEST 4u             /* room in the ring: two reports each, and as many not taken yet */
#define ERROR_BYTES 1400

static struct timespec to_timespec(uint64_t us)
{
    return (struct timespec){ (time_t)(us / 1000000u), (long)(us % 1000000u * 1000) };
}

static void init_cond(pthread_cond_t *c)
{
    pthread_condattr_t a;

    pthread_condattr_init(&a);
    pthread_condattr_setclock(&a, CLOCK_MONOTONIC);
    pthread_cond_init(c, &a);
    pthread_condattr_destroy(&a);
}

/* Threads of ours take no signals, and nobody joins them: one may hang. */
static int start_thread(void *(*main)(void *), void *arg)
{
    sigset_t all, before;
    pthread_attr_t attr;
    pthread_t id;

    pthread_attr_init(&attr);
    pthread_attr_setdetachstate(&attr, PTHREAD_CREATE_DETACHED);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int rc = pthread_create(&id, &attr, main, arg);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attr);
    return -rc;
}

/* Closing waits for it, and what it uses stays till it has gone. */
static int start_one(struct fk_store *s, void *(*main)(void *), void *arg)
{
    pthread_mutex_lock(&s->lock);
    s->alive++;
    pthread_mutex_unlock(&s->lock);
    int rc = start_thread(main, arg);
    if (rc) {
        pthread_mutex_lock(&s->lock);
        s->alive--;
        pthread_mutex_unlock(&s->lock);
    }
    return rc;
}

/* ---- calls of the backend that somebody waits for, but not for ever ---- */

struct call {
    pthread_mutex_t lock;
    pthread_cond_t ended;
    bool done, left;                    /* left: nobody waits any more, the thread frees it */
    int rc;
    char error[ERROR_BYTES];
    const struct fk_store_backend *be;
    struct fk_store *owner;             /* whose space it opens; NULL: opens a store */
    void *out;
    struct fk_store_params p;
    struct fk_store_space d;
    char text[1024];                    /* path or name: the caller's may be gone by then */
};

static void call_free(struct call *c)
{
    pthread_cond_destroy(&c->ended);
    pthread_mutex_destroy(&c->lock);
    free(c);
}

static void *call_main(void *arg)
{
    struct call *c = arg;
    struct fk_store *owner = c->owner;
    int rc = owner ? c->be->space(owner->priv, &c->d, &c->out, c->error, sizeof(c->error))
                   : c->be->open(&c->p, &c->out, c->error, sizeof(c->error));

    pthread_mutex_lock(&c->lock);
    c->rc = rc;
    c->done = true;
    bool left = c->left;
    pthread_cond_signal(&c->ended);
    pthread_mutex_unlock(&c->lock);
    if (left) {                         /* too late: a store is closed, a space stays the store's */
        if (!rc && !owner)
            c->be->close(c->out);
        call_free(c);
    }
    if (owner)
        store_thread_gone(owner);
    return NULL;
}

/* -ETIMEDOUT: it hangs, and is left alone. */
static int call_wait(struct call *c, uint64_t timeout_us, void **out, char *error, size_t bytes)
{
    struct timespec ts = to_timespec(fk_clock_us() + timeout_us);
    int rc = c->owner ? start_one(c->owner, call_main, c) : start_thread(call_main, c);

    if (rc) {
        call_free(c);
        return fk_fail(error, bytes, rc, "can't start a thread: %s", strerror(-rc));
    }
    pthread_mutex_lock(&c->lock);
    while (!c->done && !pthread_cond_timedwait(&c->ended, &c->lock, &ts))
        ;
    bool done = c->done;
    c->left = !done;
    rc = done ? c->rc : -ETIMEDOUT;
    *out = c->out;
    if (rc)
        snprintf(error, bytes, "%s", done ? c->error : "");
    pthread_mutex_unlock(&c->lock);
    if (done)
        call_free(c);
    return rc;
}

static struct call *call_new(const struct fk_store_backend *be, const char *text)
{
    struct call *c = calloc(1, sizeof(*c));

    if (!c)
        return NULL;
    pthread_mutex_init(&c->lock, NULL);
    init_cond(&c->ended);
    c->be = be;
    snprintf(c->text, sizeof(c->text), "%s", text ? text : "");
    return c;
}

/* ---- opening ---- */

static void set_defaults(struct fk_store_params *p)
{
    p->backend = p->backend ? p->backend : &fk_store_dir;
    p->threads = p->threads ? fk_min(p->threads, MAX_THREADS) : DEFAULT_THREADS;
    p->max_queued = p->max_queued ? p->max_queued : DEFAULT_QUEUED;
    p->timeout_us = p->timeout_us ? p->timeout_us : 10000000;
    p->scan_us = p->scan_us ? p->scan_us : 10000000;
    p->errors = p->errors ? p->errors : 4;
    p->retry_us = p->retry_us ? p->retry_us : 1000000;
    p->leftover_us = p->leftover_us ? p->leftover_us : 3600000000ull;
    p->touch_us = p->touch_us ? p->touch_us : 60000000;
}

static struct fk_store *store_new(const struct fk_store_params *p)
{
    struct fk_store *s = calloc(1, sizeof(*s));

    if (!s)
        return NULL;
    s->p = *p;
    set_defaults(&s->p);
    s->be = s->p.backend;
    s->max_writers = fk_max(s->p.threads / 2, 1u);
    s->done_cap = s->p.max_queued * DONE_PER_REQUEST;
    s->items = calloc(s->p.max_queued, sizeof(*s->items));
    s->done = calloc(s->done_cap, sizeof(*s->done));
    s->first_deadline_us = UINT64_MAX;
    for (int q = 0; q < QUEUES; q++)
        s->queue[q].tail = &s->queue[q].head;
    for (uint32_t i = s->p.max_queued; s->items && i-- > 0;) {
        s->items[i].next = s->free_items;
        s->free_items = &s->items[i];
    }
    pthread_mutex_init(&s->lock, NULL);
    init_cond(&s->work);
    init_cond(&s->scan_wake);
    init_cond(&s->changed);
    snprintf(s->path, sizeof(s->path), "%s", p->path ? p->path : "");
    s->p.path = s->path;
    return s;
}

void store_free(struct fk_store *s)
{
    for (uint32_t i = 0; i < s->n_spaces; i++) {
        fk_prints_destroy(s->spaces[i]->prints);
        free(s->spaces[i]);
    }
    if (s->priv)
        s->be->close(s->priv);
    pthread_cond_destroy(&s->work);
    pthread_cond_destroy(&s->scan_wake);
    pthread_cond_destroy(&s->changed);
    pthread_mutex_destroy(&s->lock);
    fk_vec_free(&s->lost);
    free(s->items);
    free(s->done);
    free(s);
}

static int start_threads(struct fk_store *s)
{
    int rc = start_one(s, store_scanner, s);

    for (uint32_t i = 0; !rc && i < s->p.threads; i++)
        rc = start_one(s, store_worker, s);
    return rc;
}

int fk_store_open(const struct fk_store_params *p, struct fk_store **out, char *error, size_t bytes)
{
    struct fk_store *s = store_new(p);
    struct call *c = s ? call_new(s->be, p->path) : NULL;

    if (!c || !s->items || !s->done) {
        if (c)
            call_free(c);
        if (s)
            store_free(s);
        return fk_fail(error, bytes, -ENOMEM, "no memory");
    }
    c->p = s->p;
    c->p.path = p->path && strlen(p->path) < sizeof(c->text) ? c->text : p->path;
    int rc = strlen(c->p.path ? c->p.path : "") >= sizeof(c->text) ? -ENAMETOOLONG : 0;
    if (rc) {
        call_free(c);
        fk_fail(error, bytes, rc, "%s: it is too long", s->be->setting);
    } else {
        rc = call_wait(c, fk_max(s->p.timeout_us, s->be->open_us), &s->priv, error, bytes);
        if (rc == -ETIMEDOUT && !*error)        /* nobody has said so yet */
            fk_fail(error, bytes, rc, "%s %s does not answer (remote_timeout_ms); is it there?", s->be->setting, s->path);
    }
    if (rc) {
        s->priv = NULL;
        store_free(s);
        return rc;
    }
    rc = start_threads(s);
    if (rc) {
        fk_fail(error, bytes, rc, "can't start a thread: %s", strerror(-rc));
        fk_store_close(s);
        return rc;
    }
    *out = s;
    return 0;
}

bool fk_store_close(struct fk_store *s)
{
    if (!s)
        return true;
    struct timespec ts = to_timespec(fk_clock_us() + s->p.timeout_us);
    pthread_mutex_lock(&s->lock);
    __atomic_store_n(&s->stop, true, __ATOMIC_RELEASE);
    store_drop_queued(s);
    pthread_cond_broadcast(&s->work);
    pthread_cond_broadcast(&s->scan_wake);
    while (s->alive && !pthread_cond_timedwait(&s->changed, &s->lock, &ts))
        ;
    bool busy = s->running > 0, gone = !s->alive;
    s->abandoned = !gone;               /* the last thread frees it, if it ever comes back */
    uint32_t alive = s->alive;
    pthread_mutex_unlock(&s->lock);
    if (gone)
        store_free(s);
    else
        fk_warn("store: %u threads hang in a store that does not answer; they are left alone", alive);
    return gone || !busy;
}

/* ---- spaces ---- */

/* One that is open already. */
static bool find_space(const struct fk_store *s, const struct fk_store_space *d, uint32_t *id)
{
    uint32_t n = atomic_load(&s->n_spaces);

    for (*id = 0; *id < n; ++*id)
        if (memcmp(s->spaces[*id]->fingerprint, d->fingerprint, sizeof(d->fingerprint)) == 0 &&
            s->spaces[*id]->block_bytes == d->block_bytes)
            return true;
    return false;
}

int fk_store_space(struct fk_store *s, const struct fk_store_space *d, uint32_t *id, char *error, size_t bytes)
{
    if (find_space(s, d, id))
        return 0;
    uint32_t n = atomic_load(&s->n_spaces);
    struct store_space *sp = calloc(1, sizeof(*sp));
    struct call *c = call_new(s->be, d->name);

    if (n >= FK_STORE_SPACES) {
        free(sp);
        if (c)
            call_free(c);
        return fk_fail(error, bytes, -ENOSPC, "the store has its %d spaces already", FK_STORE_SPACES);
    }
    if (!sp || !c || fk_prints_create(&sp->prints)) {
        free(sp);
        if (c)
            call_free(c);
        return fk_fail(error, bytes, -ENOMEM, "no memory");
    }
    c->d = *d;
    c->d.name = c->text;
    c->owner = s;
    int rc = call_wait(c, s->p.timeout_us, &sp->priv, error, bytes);
    if (rc == -ETIMEDOUT && !*error)
        fk_fail(error, bytes, rc, "%s %s does not answer (remote_timeout_ms)", s->be->setting, s->path);
    if (rc) {
        fk_prints_destroy(sp->prints);
        free(sp);
        return rc;
    }
    snprintf(sp->name, sizeof(sp->name), "%s", d->name ? d->name : "");
    memcpy(sp->fingerprint, d->fingerprint, sizeof(sp->fingerprint));
    sp->block_bytes = d->block_bytes;
    sp->file_bytes = s->be->file_bytes(sp->priv);
    pthread_mutex_lock(&s->lock);
    s->spaces[n] = sp;
    atomic_store(&s->n_spaces, n + 1);
    s->scan_asked = s->scans_begun + 1;
    pthread_cond_signal(&s->scan_wake);
    pthread_mutex_unlock(&s->lock);
    *id = n;
    return 0;
}

/* What is to be forgotten is not to be written again. With the lock. */
static void drop_lost(struct fk_store *s, uint32_t space)
{
    size_t kept = s->lost_at;

    for (size_t i = s->lost_at; i < s->lost.len; i++)
        if (s->lost.data[i].space != space)
            s->lost.data[kept++] = s->lost.data[i];
    s->lost.len = kept;
}

void fk_store_reset(struct fk_store *s, uint32_t space)
{
    pthread_mutex_lock(&s->lock);
    drop_lost(s, space);
    atomic_store(&s->spaces[space]->resetting, true);
    atomic_fetch_add(&s->spaces[space]->epoch, 1);
    pthread_cond_signal(&s->scan_wake);
    pthread_mutex_unlock(&s->lock);
}

static bool resets_left(const struct fk_store *s)
{
    uint32_t n = atomic_load(&s->n_spaces);

    for (uint32_t i = 0; i < n; i++)
        if (atomic_load(&s->spaces[i]->resetting))
            return true;
    return false;
}

int fk_store_reset_wait(struct fk_store *s, uint64_t timeout_us)
{
    struct timespec ts = to_timespec(fk_clock_us() + timeout_us);
    int rc = 0;

    pthread_mutex_lock(&s->lock);
    while (resets_left(s) && !rc)
        rc = pthread_cond_timedwait(&s->changed, &s->lock, &ts);
    pthread_mutex_unlock(&s->lock);
    return -rc;
}

/* ---- asking ---- */

bool fk_store_reads(const struct fk_store *s)
{
    return !atomic_load(&s->reads.out);
}

bool fk_store_writes(const struct fk_store *s)
{
    return !atomic_load(&s->writes.out) && !atomic_load(&s->reads.out);
}

uint32_t fk_store_has(const struct fk_store *s, uint32_t space, const struct fk_key *keys, uint32_t n)
{
    const struct store_space *sp = s->spaces[space];
    uint32_t i = 0;

    if (!fk_store_reads(s) || atomic_load(&sp->resetting))
        return 0;
    while (i < n && fk_prints_has(sp->prints, keys[i]))
        i++;
    return i;
}

/* With the lock. */
static int may_submit(const struct fk_store *s, const struct fk_store_req *req, uint32_t n)
{
    uint32_t spaces = atomic_load(&s->n_spaces);

    for (uint32_t i = 0; i < n; i++) {
        if (req[i].space >= spaces || !req[i].buf ||
            (req[i].op == FK_STORE_WRITE && req[i].note_bytes > FK_STORE_NOTE_MAX))
            return -EINVAL;
        if (req[i].op == FK_STORE_READ ? !fk_store_reads(s) : !fk_store_writes(s))
            return -ENODEV;
    }
    if (s->queued + s->running + n > s->p.max_queued || s->done_n > 2 * s->p.max_queued)
        return -EAGAIN;
    return 0;
}

int fk_store_submit(struct fk_store *s, const struct fk_store_req *req, uint32_t n, uint64_t deadline_us,
                    uint64_t now_us)
{
    pthread_mutex_lock(&s->lock);
    int rc = may_submit(s, req, n);
    for (uint32_t i = 0; !rc && i < n; i++) {
        struct store_item *it = s->free_items;
        s->free_items = it->next;
        *it = (struct store_item){ .req = req[i], .deadline_us = deadline_us, .started_us = now_us,
                                   .epoch = atomic_load(&s->spaces[req[i].space]->epoch) };
        store_enqueue(s, it);
    }
    pthread_mutex_unlock(&s->lock);
    return rc;
}

uint32_t fk_store_take(struct fk_store *s, struct fk_store_done *out, uint32_t max, uint64_t now_us)
{
    uint32_t n = 0;

    pthread_mutex_lock(&s->lock);
    store_expire(s, now_us);
    for (; n < max && s->done_n; s->done_n--) {
        out[n++] = s->done[s->done_at];
        s->done_at = (s->done_at + 1) % s->done_cap;
    }
    pthread_mutex_unlock(&s->lock);
    return n;
}

uint32_t fk_store_take_lost(struct fk_store *s, struct fk_store_lost *out, uint32_t max)
{
    uint32_t n = 0;

    if (!atomic_load(&s->any_lost))
        return 0;
    pthread_mutex_lock(&s->lock);
    while (n < max && s->lost_at < s->lost.len)
        out[n++] = s->lost.data[s->lost_at++];
    if (s->lost_at == s->lost.len) {
        s->lost_at = s->lost.len = 0;
        atomic_store(&s->any_lost, false);
    }
    pthread_mutex_unlock(&s->lock);
    return n;
}

uint64_t fk_store_next_wakeup(struct fk_store *s)
{
    pthread_mutex_lock(&s->lock);
    uint64_t at = s->done_n ? 0 : s->first_deadline_us;
    pthread_mutex_unlock(&s->lock);
    return at;
}

int fk_store_scan(struct fk_store *s, uint64_t timeout_us)
{
    struct timespec ts = to_timespec(fk_clock_us() + timeout_us);

    pthread_mutex_lock(&s->lock);
    uint64_t turn = s->scans_begun + 1;
    int rc = 0;
    s->scan_asked = fk_max(s->scan_asked, turn);
    pthread_cond_signal(&s->scan_wake);
    while (s->stats.scans < turn && !rc)
        rc = pthread_cond_timedwait(&s->changed, &s->lock, &ts);
    pthread_mutex_unlock(&s->lock);
    return -rc;
}

uint64_t store_used_bytes(const struct fk_store *s)
{
    uint64_t bytes = s->other_bytes;
    uint32_t n = atomic_load(&s->n_spaces);

    for (uint32_t i = 0; i < n; i++)
        bytes += fk_prints_count(s->spaces[i]->prints) * s->spaces[i]->file_bytes;
    return bytes;
}

void fk_store_get_stats(struct fk_store *s, struct fk_store_stats *out)
{
    uint32_t n = atomic_load(&s->n_spaces);

    pthread_mutex_lock(&s->lock);
    *out = s->stats;
    out->used_bytes = store_used_bytes(s);
    out->queued = s->queued;
    out->running = s->running;
    out->quarantined = s->late;
    pthread_mutex_unlock(&s->lock);
    for (uint32_t i = 0; i < n; i++) {
        out->blocks += fk_prints_count(s->spaces[i]->prints);
        out->set_bytes += fk_prints_bytes(s->spaces[i]->prints);
    }
}

struct fk_rate fk_store_block_rate(const struct fk_store *store, uint32_t space)
{
    struct fk_store *s = (struct fk_store *)(uintptr_t)store;

    pthread_mutex_lock(&s->lock);
    struct fk_rate r = fk_rate_of(&s->byte, (double)s->spaces[space]->block_bytes);
    pthread_mutex_unlock(&s->lock);
    return r;
}
