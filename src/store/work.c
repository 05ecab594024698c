/*
 * work.c - the store's threads, what ends at its deadline, and when the store is out of use. The threads alone wait for
 * the backend. See store_impl.h.
 */
#include "store/store_impl.h"

#include "base/clock.h"
#include "base/log.h"
#include "base/plant.h"

#define MAX_BACKOFF 32u
#define LOST_MAX 65536u                 /* as many as a depot remembers */
#define WINDOW_US 20000u                /* what a block takes is measured over that, or till nothing is asked for */

/* ---- out of use ---- */

static const char *side_name(const struct fk_store *s, const struct store_side *side)
{
    return side == &s->reads ? "reading" : "writing";
}

static void side_out(struct fk_store *s, struct store_side *side, int rc, uint64_t now)
{
    bool first = !side->out;

    side->backoff_us = first ? s->p.retry_us : fk_min(side->backoff_us * 2, s->p.retry_us * MAX_BACKOFF);
    side->retry_at_us = now + side->backoff_us;
    if (!first)
        return;
    atomic_store(&side->out, true);
    s->stats.outs++;
    fk_warn("store %s: %s is out of use: %s; looked at again in %llu ms", s->path, side_name(s, side), strerror(-rc),
            (unsigned long long)(side->backoff_us / 1000));
    pthread_cond_signal(&s->scan_wake);
}

void store_side_back(struct fk_store *s, struct store_side *side, uint64_t now)
{
    if (!side->out)
        return;
    atomic_store(&side->out, false);
    side->errors = 0;
    s->stats.returns++;
    fk_info("store %s: %s is in use again", s->path, side_name(s, side));
}

/* Answers about the block, not about the store. */
static bool is_answer(int rc)
{
    return rc >= 0 || rc == -ENOENT || rc == -EBADMSG || rc == -ECANCELED || rc == -ENOMEM;
}

/* Another try in a moment would end the same way. */
static bool is_final(int rc)
{
    return rc == -ENOSPC || rc == -EDQUOT || rc == -EROFS || rc == -EACCES || rc == -EPERM || rc == -ESTALE ||
           rc == -ENOTCONN || rc == -ENODEV;
}

void store_side_note(struct fk_store *s, struct store_side *side, int rc, uint64_t now)
{
    if (is_answer(rc)) {
        if (!side->out)
            side->errors = 0;
        return;
    }
    if (side->out)
        return;                         /* one of those that were under way */
    if (++side->errors >= s->p.errors || is_final(rc))
        side_out(s, side, rc, now);
}

/* ---- queues; with the lock ---- */

static void push(struct item_queue *q, struct store_item *i)
{
    i->next = NULL;
    *q->tail = i;
    q->tail = &i->next;
    q->n++;
}

static struct store_item *pop(struct item_queue *q)
{
    struct store_item *i = q->head;

    q->head = i->next;
    if (!q->head)
        q->tail = &q->head;
    q->n--;
    return i;
}

static void report(struct fk_store *s, const struct store_item *i, int rc, uint32_t flags)
{
    s->done[(s->done_at + s->done_n++) % s->done_cap] =
        (struct fk_store_done){ .user = i->req.user, .status = rc > 0 ? 0 : rc, .flags = flags,
                                .note_bytes = rc || !store_is_read(i) ? 0 : i->req.note_bytes };
    s->reads_in -= store_is_read(i) && !(flags & FK_STORE_RELEASED);
}

static void item_free(struct fk_store *s, struct store_item *i)
{
    i->state = ITEM_FREE;
    i->next = s->free_items;
    s->free_items = i;
}

void store_enqueue(struct fk_store *s, struct store_item *i)
{
    i->queue = !store_is_read(i) ? QUEUE_WRITES : i->req.urgent ? QUEUE_URGENT : QUEUE_READS;
    i->state = ITEM_QUEUED;
    push(&s->queue[i->queue], i);
    s->queued++;
    if (store_is_read(i) && !s->reads_in++) {
        s->busy_since_us = i->started_us;
        s->busy_bytes = 0;
    }
    s->first_deadline_us = fk_min(s->first_deadline_us, i->deadline_us);
    pthread_cond_signal(&s->work);
}

void store_drop_queued(struct fk_store *s)
{
    for (int q = 0; q < QUEUES; q++)
        while (s->queue[q].n) {
            item_free(s, pop(&s->queue[q]));
            s->queued--;
        }
}

static struct store_item *next_item(struct fk_store *s)
{
    for (int q = 0; q < QUEUES; q++)
        if (s->queue[q].n && (q != QUEUE_WRITES || s->running_writes < s->max_writers)) {
            s->queued--;
            return pop(&s->queue[q]);
        }
    return NULL;
}

/* ---- deadlines; with the lock ---- */

static void expire_queue(struct fk_store *s, struct item_queue *q, uint64_t now)
{
    struct item_queue keep = { .tail = &keep.head };

    while (q->n) {
        struct store_item *i = pop(q);
        if (i->deadline_us > now) {
            s->first_deadline_us = fk_min(s->first_deadline_us, i->deadline_us);
            push(&keep, i);
            continue;
        }
        s->queued--;
        s->stats.timeouts++;
        report(s, i, -ETIMEDOUT, 0);
        item_free(s, i);
    }
    *q = keep;
    if (!q->n)
        q->tail = &q->head;
}

/* When every thread that might do it hangs, no more errors will come. */
static void nobody_left(struct fk_store *s, uint64_t now)
{
    if (s->late >= s->p.threads && !s->reads.out)
        side_out(s, &s->reads, -ETIMEDOUT, now);
    if (s->late_writes >= s->max_writers && !s->writes.out)
        side_out(s, &s->writes, -ETIMEDOUT, now);
}

void store_expire(struct fk_store *s, uint64_t now)
{
    if (now < s->first_deadline_us)
        return;
    s->first_deadline_us = UINT64_MAX;
    for (int q = 0; q < QUEUES; q++)
        expire_queue(s, &s->queue[q], now);
    for (uint32_t k = 0; s->running && k < s->p.max_queued; k++) {
        struct store_item *i = &s->items[k];
        if (i->state != ITEM_RUNNING)
            continue;
        if (i->deadline_us > now) {
            s->first_deadline_us = fk_min(s->first_deadline_us, i->deadline_us);
            continue;
        }
        i->state = ITEM_LATE;
        s->late++;
        s->stats.timeouts++;
        report(s, i, -ETIMEDOUT, FK_BUG(307) ? 0 : FK_STORE_QUARANTINED);
        s->late_writes += !store_is_read(i);
        store_side_note(s, store_is_read(i) ? &s->reads : &s->writes, -ETIMEDOUT, now);
    }
    nobody_left(s, now);
}

/* ---- the threads ---- */

struct writing { struct fk_store *s; const struct store_item *i; const struct store_space *sp; bool refused; };

/* Right before others can see it. A thread that hung till after closing asks nobody any more. */
static bool is_sure(void *arg, uint64_t user)
{
    struct writing *w = arg;
    struct fk_store *s = w->s;

    w->refused = __atomic_load_n(&s->stop, __ATOMIC_ACQUIRE) || w->i->epoch != atomic_load(&w->sp->epoch) ||
                 (s->p.sure && !s->p.sure(s->p.arg, user));
    return !w->refused;
}

void store_lose(struct fk_store *s, struct store_space *sp, struct fk_key key, struct fk_key parent)
{
    struct fk_store_lost lost = { .key = key, .parent = parent };

    pthread_mutex_lock(&s->lock);
    while (s->spaces[lost.space] != sp)
        lost.space++;
    bool room = s->lost.len < LOST_MAX && !atomic_load(&sp->resetting) && !fk_vec_push(&s->lost, lost);
    if (room)
        atomic_store(&s->any_lost, true);
    pthread_mutex_unlock(&s->lock);
}

/* While it was written all was forgotten that there was: it may be with that, which nobody finds. */
static int write_one(struct fk_store *s, struct store_item *i, struct store_space *sp, const struct fk_store_note *note)
{
    struct writing w = { s, i, sp, false };
    struct fk_store_sure sure = { is_sure, &w, i->req.user };
    uint32_t forgotten = atomic_load(&sp->forgotten);
    int rc = s->be->put(sp->priv, i->req.key, i->req.parent, i->req.buf, note, &sure);

    if (rc >= 0 && fk_prints_add(sp->prints, i->req.key) < 0)
        fk_debug("store %s: no memory to note a block", s->path);
    if (rc >= 0 && forgotten != atomic_load(&sp->forgotten)) {
        fk_prints_remove(sp->prints, i->req.key);
        rc = -ECANCELED;
    }
    if (rc == -ECANCELED && !w.refused && i->epoch == atomic_load(&sp->epoch))
        store_lose(s, sp, i->req.key, i->req.parent);
    return rc;
}

static int carry_out(struct fk_store *s, struct store_item *i, struct store_space *sp)
{
    struct fk_store_note note = { i->req.note, i->req.note ? i->req.note_bytes : 0 };
    int rc;

    if (atomic_load(&sp->resetting) || i->epoch != atomic_load(&sp->epoch))
        return -ECANCELED;
    if (store_is_read(i)) {
        rc = s->be->get(sp->priv, i->req.key, i->req.buf, &note);
        i->req.note_bytes = note.bytes;
        if (rc == -ENOENT || rc == -EBADMSG)
            fk_prints_remove(sp->prints, i->req.key);
    } else {
        rc = write_one(s, i, sp, &note);
    }
    /* Reset meanwhile: what was read is from before; what was written the backend has put aside, or takes for new. */
    if (i->epoch != atomic_load(&sp->epoch))
        rc = -ECANCELED;
    return rc;
}

static void count_time(struct fk_store *s, uint64_t bytes, uint64_t now)
{
    uint64_t us = now - s->busy_since_us;

    s->busy_bytes += bytes;
    if (us < WINDOW_US && s->reads_in > 1)
        return;
    double seen = (double)us / (double)s->busy_bytes;
    fk_rate_note(&s->byte, seen, 1, now);
    s->busy_since_us = now;
    s->busy_bytes = 0;
}

static void count_read(struct fk_store *s, struct store_space *sp, int rc, uint64_t now)
{
    struct fk_store_stats *st = &s->stats;

    st->missing += rc == -ENOENT;
    st->bad += rc == -EBADMSG;
    st->read_errors += !is_answer(rc);
    if (rc)
        return;
    st->read_blocks++;
    st->read_bytes += sp->block_bytes;
    count_time(s, sp->block_bytes, now);
}

static void count_write(struct fk_store *s, struct store_space *sp, int rc)
{
    struct fk_store_stats *st = &s->stats;

    st->already += rc == 1;
    st->write_blocks += rc == 0;
    st->write_bytes += rc == 0 ? sp->block_bytes : 0;
    st->full += rc == -ENOSPC || rc == -EDQUOT;
    st->write_errors += !is_answer(rc);
    if (s->p.capacity_bytes && !s->want_room &&
        (rc == -ENOSPC || rc == -EDQUOT || store_used_bytes(s) > s->p.capacity_bytes)) {
        s->want_room = true;
        pthread_cond_signal(&s->scan_wake);
    }
}

/* With the lock. */
static void finish(struct fk_store *s, struct store_item *i, int rc)
{
    struct store_space *sp = s->spaces[i->req.space];
    uint64_t now = fk_clock_us();
    bool late = i->state == ITEM_LATE;

    if (store_is_read(i))
        count_read(s, sp, rc, now);
    else
        count_write(s, sp, rc);
    store_side_note(s, store_is_read(i) ? &s->reads : &s->writes, rc, now);
    s->running--;
    s->running_reads -= store_is_read(i);
    s->running_writes -= !store_is_read(i);
    s->late -= late;
    s->late_writes -= late && !store_is_read(i);
    if (!FK_BUG(308) || !late)
        report(s, i, late ? -ETIMEDOUT : rc, late ? FK_STORE_RELEASED : 0);
    item_free(s, i);
}

void store_thread_gone(struct fk_store *s)
{
    pthread_mutex_lock(&s->lock);
    s->alive--;
    bool last = s->abandoned && !s->alive;
    pthread_cond_broadcast(&s->changed);
    pthread_mutex_unlock(&s->lock);
    if (last)
        store_free(s);
}

void *store_worker(void *arg)
{
    struct fk_store *s = arg;

    pthread_mutex_lock(&s->lock);
    for (;;) {
        struct store_item *i = s->stop ? NULL : next_item(s);
        if (s->stop)
            break;
        if (!i) {
            pthread_cond_wait(&s->work, &s->lock);
            continue;
        }
        struct store_space *sp = s->spaces[i->req.space];
        i->state = ITEM_RUNNING;
        i->started_us = fk_clock_us();
        s->running++;
        s->running_reads += store_is_read(i);
        s->running_writes += !store_is_read(i);
        pthread_mutex_unlock(&s->lock);
        int rc = carry_out(s, i, sp);
        pthread_mutex_lock(&s->lock);
        bool write_waits = s->queue[QUEUE_WRITES].n && !store_is_read(i);
        finish(s, i, rc);
        if (write_waits)
            pthread_cond_signal(&s->work);      /* one more may write now */
        bool tell = !s->stop && s->p.wake;
        pthread_mutex_unlock(&s->lock);
        if (tell)
            s->p.wake(s->p.arg);
        pthread_mutex_lock(&s->lock);
    }
    pthread_mutex_unlock(&s->lock);
    store_thread_gone(s);
    return NULL;
}
