/*
 * scan.c - the scanner: a thread that looks what other nodes have written and removed, makes room, carries out
 * resets, removes leftovers, and looks whether a store that was out of use is back. See store_impl.h.
 */
#include "store/store_impl.h"

#include <time.h>

#include "base/clock.h"
#include "base/log.h"

#define ROOM_SHARE 20                   /* an eviction makes a 20th of the capacity free beyond need */
#define TIDY_SCANS 16                   /* every so many scans it looks for leftovers beside the parts */

struct listing { FK_VEC(struct fk_key) keys; int rc; };

static void remember(void *arg, struct fk_key key)
{
    struct listing *l = arg;

    if (fk_vec_push(&l->keys, key))
        l->rc = -ENOMEM;
}

static bool stopping(struct fk_store *s)
{
    return __atomic_load_n(&s->stop, __ATOMIC_RELAXED);
}

/* ---- listing ---- */

/* 1: listed; 0: nothing has changed. */
static int scan_part(struct fk_store *s, struct store_space *sp, uint32_t part)
{
    struct fk_store_part was = sp->part[part];
    struct fk_key none;
    struct listing l = { 0 };

    fk_prints_begin(sp->prints, part);
    int rc = s->be->list(sp->priv, part, &sp->part[part], remember, &l);
    rc = rc ? rc : l.rc;
    int kept = fk_prints_end(sp->prints, part, rc ? NULL : l.keys.data ? l.keys.data : &none, l.keys.len);
    fk_vec_free(&l.keys);
    if (rc == 0 && kept < 0)
        sp->part[part] = was;           /* once more, the next time */
    if (rc == -ENOMEM)
        memset(&sp->part[part], 0, sizeof(sp->part[part]));
    return rc == 0 ? 1 : rc == 1 || rc == -ENOMEM ? 0 : rc;
}

struct news { struct fk_store *s; struct store_space *sp; };

static void found(void *arg, struct fk_key key)
{
    const struct news *n = arg;

    if (fk_prints_add(n->sp->prints, key) < 0)
        fk_debug("store %s: no memory to note a block", n->s->path);
}

static void forget(void *arg)
{
    const struct news *n = arg;

    atomic_fetch_add(&n->sp->forgotten, 1);     /* first: who writes looks at it when he has added his block */
    fk_prints_clear(n->sp->prints);
}

static void lost(void *arg, struct fk_key key, struct fk_key parent)
{
    const struct news *n = arg;

    fk_prints_remove(n->sp->prints, key);
    store_lose(n->s, n->sp, key, parent);
}

static int follow_space(struct fk_store *s, struct store_space *sp)
{
    struct news n = { s, sp };
    struct fk_store_news news = { found, forget, lost, &n, &s->stop };
    int rc = s->be->follow(sp->priv, &news);

    pthread_mutex_lock(&s->lock);
    s->stats.listed += rc > 0 ? (uint64_t)rc : 0;
    bool tell = atomic_load(&s->any_lost) && !s->stop && s->p.wake;
    pthread_mutex_unlock(&s->lock);
    if (tell)
        s->p.wake(s->p.arg);
    return rc < 0 ? rc : 0;
}

static int scan_space(struct fk_store *s, struct store_space *sp)
{
    uint64_t listed = 0;
    int rc = 0;

    if (s->be->follow)
        return follow_space(s, sp);
    for (uint32_t i = 0; i < FK_STORE_PARTS && rc >= 0 && !stopping(s); i++) {
        rc = scan_part(s, sp, i);
        listed += rc > 0;
    }
    pthread_mutex_lock(&s->lock);
    s->stats.listed += listed;
    pthread_mutex_unlock(&s->lock);
    return rc < 0 ? rc : 0;
}

/* ---- resets ---- */

static void do_reset(struct fk_store *s, struct store_space *sp)
{
    uint32_t epoch = atomic_load(&sp->epoch);
    int rc = s->be->reset(sp->priv);

    if (rc) {
        fk_error("store %s: space %s can't be reset: %s; it is not used until it can", s->path, sp->name,
                 strerror(-rc));
        return;
    }
    memset(sp->part, 0, sizeof(sp->part));
    fk_prints_clear(sp->prints);
    pthread_mutex_lock(&s->lock);
    sp->reset_done = epoch;
    atomic_store(&sp->resetting, atomic_load(&sp->epoch) != epoch);
    pthread_cond_broadcast(&s->changed);
    pthread_mutex_unlock(&s->lock);
}

/* ---- is it there ---- */

/* A place that was away may have come back empty: what is known of it is set right before anybody uses it. */
static int follow_all(struct fk_store *s)
{
    uint32_t n = s->be->follow ? atomic_load(&s->n_spaces) : 0;
    int rc = 0;

    for (uint32_t i = 0; i < n && !rc && !stopping(s); i++)
        rc = follow_space(s, s->spaces[i]);
    return rc;
}

static void probe_side(struct fk_store *s, struct store_side *side, bool write)
{
    uint32_t n = atomic_load(&s->n_spaces);

    if (!n)
        return;
    int rc = s->be->probe(s->spaces[0]->priv, write);
    if (!rc && side->out)
        rc = follow_all(s);
    uint64_t now = fk_clock_us();
    pthread_mutex_lock(&s->lock);
    if (!side->out) {
        if (rc)                         /* the place is not there any more: no need to fail several times first */
            store_side_note(s, side, rc == -ENOENT || rc == -EBADMSG ? -ESTALE : rc, now);
    } else if (rc || s->late >= s->p.threads || (write && s->late_writes >= s->max_writers)) {
        side->backoff_us = fk_min(side->backoff_us * 2, s->p.retry_us * 32);
        side->retry_at_us = now + side->backoff_us;     /* still failing, or no thread is left to use it */
    } else {
        store_side_back(s, side, now);
    }
    pthread_mutex_unlock(&s->lock);
}

/* ---- room ---- */

static void was_removed(void *arg, void *space, struct fk_key key, uint64_t bytes)
{
    struct fk_store *s = arg;
    uint32_t n = atomic_load(&s->n_spaces);

    for (uint32_t i = 0; i < n; i++)
        if (s->spaces[i]->priv == space)
            fk_prints_remove(s->spaces[i]->prints, key);
    pthread_mutex_lock(&s->lock);
    s->stats.evicted++;
    s->other_bytes -= space ? 0 : fk_min(bytes, s->other_bytes);
    pthread_mutex_unlock(&s->lock);
}

static int make_room(struct fk_store *s)
{
    uint64_t capacity = s->p.capacity_bytes, other = 0, used, free_goal = capacity / ROOM_SHARE;
    int rc = capacity ? s->be->other_bytes(s->priv, &other) : 0;

    pthread_mutex_lock(&s->lock);
    if (!rc)
        s->other_bytes = other;
    used = store_used_bytes(s);
    bool wanted = s->want_room || used > capacity;
    s->want_room = false;
    pthread_mutex_unlock(&s->lock);
    if (rc || !capacity || !wanted)
        return rc;
    uint64_t target = capacity - free_goal;
    if (used > target)
        rc = s->be->evict(s->priv, used - target, &s->stop, was_removed, s);
    return rc == -EAGAIN ? 0 : rc;      /* another node is at it: the next listing shows what it did */
}

/* ---- the loop ---- */

static void scan(struct fk_store *s, uint64_t turn)
{
    uint32_t n = atomic_load(&s->n_spaces);
    int rc = 0;

    probe_side(s, &s->reads, false);
    for (uint32_t i = 0; i < n && !rc && !s->reads.out && !stopping(s); i++)
        rc = scan_space(s, s->spaces[i]);
    if (!rc && n && !s->reads.out && !s->writes.out) {
        rc = make_room(s);
        uint64_t leftovers = s->be->tidy && turn % TIDY_SCANS == 0 ? s->be->tidy(s->priv) : 0;
        pthread_mutex_lock(&s->lock);
        s->stats.leftovers += leftovers;
        pthread_mutex_unlock(&s->lock);
    }
    pthread_mutex_lock(&s->lock);
    if (rc)
        store_side_note(s, &s->reads, rc, fk_clock_us());
    pthread_mutex_unlock(&s->lock);
}

static void look_whether_back(struct fk_store *s, uint64_t now)
{
    pthread_mutex_lock(&s->lock);
    bool reads = s->reads.out && now >= s->reads.retry_at_us;
    bool writes = s->writes.out && now >= s->writes.retry_at_us;
    pthread_mutex_unlock(&s->lock);
    if (reads)
        probe_side(s, &s->reads, false);
    if (writes && s->p.capacity_bytes && !s->reads.out)
        (void)make_room(s);
    if (writes)
        probe_side(s, &s->writes, true);
}

static void do_resets(struct fk_store *s)
{
    uint32_t n = atomic_load(&s->n_spaces);

    for (uint32_t i = 0; i < n; i++)
        if (atomic_load(&s->spaces[i]->resetting))
            do_reset(s, s->spaces[i]);
}

/* With the lock: sleeps until there is something to do. */
static void sleep_until(struct fk_store *s, uint64_t at_us)
{
    struct timespec ts = { (time_t)(at_us / 1000000u), (long)(at_us % 1000000u * 1000) };

    pthread_cond_timedwait(&s->scan_wake, &s->lock, &ts);
}

static uint64_t next_turn(const struct fk_store *s, uint64_t next_scan)
{
    if (s->reads.out)
        next_scan = fk_min(next_scan, s->reads.retry_at_us);
    return s->writes.out ? fk_min(next_scan, s->writes.retry_at_us) : next_scan;
}

static bool resets_wait(const struct fk_store *s)
{
    uint32_t n = atomic_load(&s->n_spaces);

    for (uint32_t i = 0; i < n; i++)
        if (atomic_load(&s->spaces[i]->resetting))
            return true;
    return false;
}

/* Closing: what they write now is to be told, too. With the lock. */
static void wait_for_workers(struct fk_store *s)
{
    uint64_t at = fk_clock_us() + s->p.timeout_us / 2;
    struct timespec ts = { (time_t)(at / 1000000u), (long)(at % 1000000u * 1000) };

    while (s->alive > 1 && !pthread_cond_timedwait(&s->changed, &s->lock, &ts))
        ;
}

void *store_scanner(void *arg)
{
    struct fk_store *s = arg;
    uint64_t next_scan = 0, next_reset = 0;

    pthread_mutex_lock(&s->lock);
    while (!s->stop) {
        uint64_t now = fk_clock_us();
        bool asked = s->scan_asked > s->scans_begun, room = s->want_room && !s->writes.out;
        bool reset = resets_wait(s) && now >= next_reset;
        if (!asked && !reset && !room && now < next_turn(s, next_scan)) {
            uint64_t at = next_turn(s, next_scan);
            sleep_until(s, resets_wait(s) ? fk_min(at, next_reset) : at);
            continue;
        }
        bool scans = asked || now >= next_scan;
        uint64_t turn = scans ? ++s->scans_begun : s->scans_begun;
        pthread_mutex_unlock(&s->lock);
        if (reset) {
            do_resets(s);
            next_reset = fk_clock_us() + s->p.retry_us;
        }
        look_whether_back(s, now);
        if (scans)
            scan(s, turn);
        else if (room)
            (void)make_room(s);
        pthread_mutex_lock(&s->lock);
        if (scans) {
            next_scan = fk_clock_us() + s->p.scan_us;
            s->stats.scans = turn;
            pthread_cond_broadcast(&s->changed);
        }
    }
    if (s->be->settle)
        wait_for_workers(s);
    pthread_mutex_unlock(&s->lock);
    uint32_t n = atomic_load(&s->n_spaces);
    for (uint32_t i = 0; i < n && s->be->settle && !s->reads.out; i++)
        s->be->settle(s->spaces[i]->priv);
    store_thread_gone(s);
    return NULL;
}
