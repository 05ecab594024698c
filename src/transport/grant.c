/*
 * grant.c - the owner's side of every transport: asks the provider for blocks, now or later. See endpoint.h.
 *
 *   fk_grant_take --> grant(): 0, or why not
 *                     -EINPROGRESS: parked --- fk_transport_granted ---> granted --> resume --> release()
 *                                   | its patience ends: resume(-EAGAIN)                |
 *                                   '-> nobody waits ------------------------------------'-----> release()
 *
 * Everything in the transport's thread but fk_transport_granted, which only puts it into a box.
 */
#include "base/checksum.h"
#include "base/log.h"
#include "transport/endpoint.h"

/* ---- asking ---- */

/* What a provider says, as a reader may be told it. */
static int settle(struct fk_transport *t, const struct fk_block_ref *r, int rc, struct fk_grant *g)
{
    if (rc == 0 && g->bytes != r->bytes) {
        t->provider.release(t->provider.ctx, r, g);
        rc = -ENOENT;
    }
    if (rc == 0)
        return 0;
    t->delta.refused++;
    return rc == -ENOENT || rc == -EACCES || rc == -EAGAIN ? rc : -EIO;
}

static struct fk_parked *park(struct fk_transport *t, const struct fk_block_ref *r, uint64_t later)
{
    struct fk_parked *k = t->spare;

    t->spare = NULL;
    *k = (struct fk_parked){ .prev = t->last_parked, .ref = *r, .later = later,
                             .until_us = t->now_us + t->timeout_us };
    *(k->prev ? &k->prev->next : &t->parked) = k;
    t->last_parked = k;
    return k;
}

static void unpark(struct fk_transport *t, struct fk_parked *k)
{
    *(k->prev ? &k->prev->next : &t->parked) = k->next;
    *(k->next ? &k->next->prev : &t->last_parked) = k->prev;
    free(k);
}

int fk_grant_take(struct fk_transport *t, const struct fk_block_ref *r, struct fk_grant *g, struct fk_parked **later)
{
    *g = (struct fk_grant){ 0 };
    if (!t->spare && !(t->spare = calloc(1, sizeof(*t->spare))))
        return settle(t, r, -EAGAIN, g);
    int rc = t->provider.grant ? t->provider.grant(t->provider.ctx, r, g) : -EACCES;
    if (rc != -EINPROGRESS)
        return settle(t, r, rc, g);
    *later = park(t, r, g->later);
    return rc;
}

void fk_grant_forget(struct fk_parked *k)
{
    k->resume = NULL;
}

void fk_grant_checksum(struct fk_grant *g, struct fk_key key)
{
    if (!g->has_checksum)
        g->checksum = fk_block_checksum(key, g->data, g->bytes);
    g->has_checksum = true;
}

int fk_grant_release(struct fk_transport *t, const struct fk_block_ref *r, struct fk_grant *g)
{
    int rc = t->provider.release(t->provider.ctx, r, g);

    if (rc == 0) {
        t->delta.served_blocks++;
        t->delta.served_bytes += g->bytes;
        return 0;
    }
    t->delta.refused++;
    return rc == -ENOENT ? rc : -EIO;
}

/* ---- later ---- */

int fk_transport_granted(struct fk_transport *t, uint64_t later, int rc, const struct fk_grant *g)
{
    struct fk_granted x = { .later = later, .rc = rc };

    if (rc > 0 || (rc == 0 && !g))
        return -EINVAL;
    if (rc == 0)
        x.grant = *g;
    pthread_mutex_lock(&t->lock);
    bool first = t->granted.len == 0;
    int taken = t->stop ? -ESHUTDOWN : fk_vec_push(&t->granted, x);
    pthread_mutex_unlock(&t->lock);
    if (!taken && first)
        fk_transport_wake(t);
    return taken;
}

/* Mostly the oldest, or near it. */
static struct fk_parked *find(struct fk_transport *t, uint64_t later)
{
    struct fk_parked *k = t->parked;

    while (k && k->later != later)
        k = k->next;
    if (!k)
        fk_error("transport %s: a grant came late under the number %llu, and no read waits for that one: what it holds is "
                 "not given back", t->ops->name, (unsigned long long)later);
    return k;
}

static void resume(struct fk_transport *t, struct fk_granted *x)
{
    struct fk_parked *k = find(t, x->later);

    if (!k)
        return;
    if (k->resume) {
        int rc = settle(t, &k->ref, x->rc, &x->grant);
        k->resume(t, k, rc, &x->grant);
    } else if (x->rc == 0) {
        t->provider.release(t->provider.ctx, &k->ref, &x->grant);
    }
    unpark(t, k);
}

static void lose_patience(struct fk_transport *t)
{
    for (struct fk_parked *k = t->parked; k && k->until_us <= t->now_us; k = k->next) {
        if (!k->resume)
            continue;
        void (*f)(struct fk_transport *, struct fk_parked *, int, const struct fk_grant *) = k->resume;
        k->resume = NULL;
        t->delta.refused++;
        f(t, k, -EAGAIN, NULL);
    }
}

void fk_grants_take(struct fk_transport *t)
{
    __typeof__(t->granted) was = t->granted;

    memcpy(&t->granted, &t->resuming, sizeof(was));
    memcpy(&t->resuming, &was, sizeof(was));
    t->granted.len = 0;
}

void fk_grants_resume(struct fk_transport *t)
{
    for (size_t i = 0; i < t->resuming.len; i++)
        resume(t, &t->resuming.data[i]);
    t->resuming.len = 0;
    lose_patience(t);
}

uint64_t fk_grants_due(const struct fk_transport *t)
{
    for (const struct fk_parked *k = t->parked; k; k = k->next)
        if (k->resume)
            return k->until_us;
    return UINT64_MAX;
}

void fk_grants_close(struct fk_transport *t)
{
    fk_grants_take(t);                  /* nobody waits any more, and nobody else is here */
    fk_grants_resume(t);
    while (t->parked)
        unpark(t, t->parked);
    free(t->spare);
}
