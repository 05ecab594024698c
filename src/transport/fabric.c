/*
 * fabric.c - reads over libfabric between FlexKV nodes (members.h): the payload goes through libfabric, which the owner
 * tells to write it into the reader's buffer.
 *
 *   channel   has a libfabric endpoint of its own on each side: closing it is the only way to take a write back
 *   request   carries a key to exactly these bytes of the reader's memory, good for this read only
 *   notice    follows the write through libfabric, which keeps that order: when the reader has it, all bytes are in
 *             his memory. The read has ended when notice and answer are there: they take different ways, and come in
 *             any order
 *
 * All in the transport's thread.
 */
#include <stdio.h>

#include "base/log.h"
#include "transport/fabric_lib.h"
#include "transport/members.h"

#define DEFAULT_PROVIDER "tcp;ofi_rxm"

struct fabric_channel {
    struct fk_channel c;
    struct fk_watch cq;
    struct fk_fabric_ep ep;
};

struct fabric {
    struct fk_members m;
    struct fk_fabric lib;
    FK_VEC(struct fk_fabric_region) new_regions;        /* under the transport's lock */
};

static struct fabric_channel *its(struct fk_channel *c) { return (struct fabric_channel *)c; }
static struct fk_fabric *lib_of(struct fk_channel *c) { return &((struct fabric *)c->m)->lib; }
static const char *text_of(int rc) { return fk_fabric_lib()->strerror(-rc); }

/* ---- channels ---- */

static void cq_ready(struct fk_watch *w, uint32_t events)
{
    /* tick() looks at all completion queues: making progress on one may complete work of another. */
}

static int open_endpoint(struct fk_channel *c)
{
    struct fabric_channel *x = its(c);
    int rc = fk_fabric_ep_open(lib_of(c), &x->ep);

    if (!rc) {
        x->cq.ready = cq_ready;
        rc = fk_watch_add(c->m->t, &x->cq, x->ep.cq_fd, EPOLLIN);
        if (rc)
            x->cq.ready = NULL;
    }
    c->moving = x->ep.cq != NULL;
    return rc;
}

static int reader_open(struct fk_channel *c)
{
    struct fk_fabric_ep *ep = &its(c)->ep;
    int rc = open_endpoint(c);

    if (!rc)
        rc = fk_fabric_ep_listen(ep);
    c->session.endpoint_len = sizeof(c->session.endpoint);
    return rc ? rc : fk_fabric_ep_name(ep, c->session.endpoint, &c->session.endpoint_len);
}

static int session_open(struct fk_channel *c)
{
    int rc = c->peer ? 0 : open_endpoint(c);

    return rc || c->peer ? rc : fk_fabric_ep_peer(lib_of(c), &its(c)->ep, c->session.endpoint, c->session.endpoint_len);
}

static void channel_close(struct fk_channel *c)
{
    fk_watch_remove(c->m->t, &its(c)->cq);
    fk_fabric_ep_close(&its(c)->ep);
}

/* ---- moving ---- */

static int expose(struct fk_channel *c, struct fk_op *op, struct fk_request *r)
{
    struct fid_mr *mr = NULL;
    int rc = fk_fabric_expose(lib_of(c), op->r.buffer, op->r.block.bytes, &mr, &r->rkey, &r->raddr);

    op->priv = rc ? NULL : mr;
    return rc;
}

static void unexpose(struct fk_op *op)
{
    struct fid_mr *mr = op->priv;

    op->priv = NULL;
    if (mr)
        fi_close(&mr->fid);
}

/* The write, then the notice. */
static int write_job(struct fk_channel *c, struct fk_job *j)
{
    const struct fk_request *r = &j->request;
    struct fk_fabric_notice n = { r->id, r->rkey };
    int rc = 0;

    if (!j->writing) {
        rc = fk_fabric_write(lib_of(c), &its(c)->ep, j->grant.data, j->grant.bytes, r->rkey, r->raddr, (struct fid_mr **)&j->priv,
                             j);
        if (rc)
            return rc;
        j->writing = true;
    }
    rc = fk_fabric_notify(&its(c)->ep, &n);
    c->dead |= rc && rc != -EAGAIN;
    return rc == -EAGAIN ? rc : 0;
}

/* The grant lay in no registered region. */
static void forget(struct fk_job *j)
{
    struct fid_mr *mr = j->priv;

    j->priv = NULL;
    if (mr)
        fi_close(&mr->fid);
}

static int poll_channel(struct fk_channel *c, uint64_t now, uint64_t *next)
{
    struct fk_fabric_event e;
    int rc;

    while ((rc = fk_fabric_poll(&its(c)->ep, &e)) == 1) {
        if (e.arrived)
            fk_read_noticed(c, e.notice.id, e.notice.key);
        else if (e.context && !c->peer)
            fk_job_done(c, e.context, e.rc);
    }
    return rc;
}

static const struct fk_mover mover = {
    .channel_bytes = sizeof(struct fabric_channel), .notices = true, .reader_open = reader_open,
    .session_open = session_open, .close = channel_close, .expose = expose, .unexpose = unexpose,
    .write = write_job, .forget = forget, .poll = poll_channel, .strerror = text_of,
};

/* ---- the transport ---- */

static void fabric_close(struct fk_transport *t)
{
    struct fabric *f = t->priv;

    fk_members_close(&f->m);
    fk_fabric_close(&f->lib);
    fk_vec_free(&f->new_regions);
    free(f);
}

static int fabric_open(struct fk_transport *t, const struct fk_transport_params *p, char *error, size_t bytes)
{
    struct fabric *f = calloc(1, sizeof(*f));
    char source[64];

    if (!f)
        return fk_fail(error, bytes, -ENOMEM, "transport fabric: no memory");
    t->priv = f;
    int rc = fk_members_open(&f->m, t, p, &mover, "fabric", error, bytes);
    if (!rc)
        rc = fk_members_source(p, source, sizeof(source), error, bytes);
    if (!rc)
        rc = fk_fabric_open(&f->lib, p->fabric ? p->fabric : DEFAULT_PROVIDER, source, error, bytes);
    if (!rc)
        rc = fk_members_listen(&f->m, p->listen, error, bytes);
    if (rc)
        fabric_close(t);
    return rc;
}

static void take_regions(struct fk_transport *t, struct fabric *f)
{
    pthread_mutex_lock(&t->lock);
    for (size_t i = 0; i < f->new_regions.len; i++) {
        int rc = fk_fabric_region(&f->lib, f->new_regions.data[i].base, f->new_regions.data[i].bytes);
        if (rc)
            fk_warn("transport fabric: %zu bytes can't be registered: %s", f->new_regions.data[i].bytes,
                    f->lib.lib->strerror(-rc));
    }
    f->new_regions.len = 0;
    pthread_mutex_unlock(&t->lock);
}

static int fabric_region(struct fk_transport *t, void *base, size_t bytes)
{
    struct fabric *f = t->priv;
    struct fk_fabric_region r = { .base = base, .bytes = bytes };

    return fk_vec_push(&f->new_regions, r);
}

static uint64_t fabric_tick(struct fk_transport *t, uint64_t now)
{
    take_regions(t, t->priv);
    return fk_members_tick(t, now);
}

static bool fabric_may_sleep(struct fk_transport *t)
{
    struct fabric *f = t->priv;

    for (struct fk_channel *c = f->m.channels; c; c = c->next)
        if (c->moving && !fk_fabric_may_sleep(&f->lib, &its(c)->ep))
            return false;
    return true;
}

const struct fk_transport_ops fk_transport_fabric = {
    .name = "fabric", .help = "libfabric: tcp, verbs, shm, EFA",
    .open = fabric_open, .close = fabric_close, .region = fabric_region, .pump = fk_members_pump,
    .expire = fk_members_expire, .drop = fk_members_drop, .tick = fabric_tick, .may_sleep = fabric_may_sleep,
};
