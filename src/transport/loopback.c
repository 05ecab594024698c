/* loopback.c - see loopback.h. */
#include "transport/loopback.h"

#include <stdio.h>

#include "transport/endpoint.h"

struct fk_loopback_hub {
    uint64_t latency_us;
    fk_loopback_fault_fn *fault;
    void *ctx;
    FK_VEC(struct fk_transport *) members;
    uint64_t n_members;             /* ever */
};

struct loopback {
    struct fk_loopback_hub *hub;
    uint64_t number;                /* in the hub, never given out again */
    uint64_t n_sent;
    bool listens, away;
};

#define PARKED UINT64_MAX
#define AWAY_US 2000u                   /* how often a read looks whether its owner is back */

/* What a read's words hold: when it is due, PARKED: the owner grants it later; its fault and, so that ties keep their
 * order, its number. key: how long the owner takes over it; priv: meanwhile, what he holds for it. */
struct held { struct fk_grant g; uint64_t owner; };
enum { DROP = 1, CORRUPT = 2, REFUSE = 4, FLAGS = 7 };

struct fk_loopback_hub *fk_loopback_hub_create(uint64_t latency_us, fk_loopback_fault_fn *fault, void *ctx)
{
    struct fk_loopback_hub *h = calloc(1, sizeof(*h));

    if (h)
        *h = (struct fk_loopback_hub){ .latency_us = latency_us, .fault = fault, .ctx = ctx };
    return h;
}

void fk_loopback_hub_destroy(struct fk_loopback_hub *h)
{
    if (h)
        fk_vec_free(&h->members);
    free(h);
}

static struct fk_transport *find(const struct fk_loopback_hub *h, const char *address)
{
    for (size_t i = 0; i < h->members.len; i++) {
        const struct loopback *l = h->members.data[i]->priv;
        if (l->listens && strcmp(h->members.data[i]->address, address) == 0)
            return h->members.data[i];
    }
    return NULL;
}

static struct fk_transport *by_number(const struct fk_loopback_hub *h, uint64_t number)
{
    for (size_t i = 0; i < h->members.len; i++)
        if (((struct loopback *)h->members.data[i]->priv)->number == number)
            return h->members.data[i];
    return NULL;
}

void fk_loopback_away(struct fk_transport *t, bool away)
{
    ((struct loopback *)t->priv)->away = away;
}

static int loopback_open(struct fk_transport *t, const struct fk_transport_params *p, char *error, size_t bytes)
{
    if (!p->hub)
        return fk_fail(error, bytes, -EINVAL, "transport loopback: it needs a hub");
    if (p->listen && (strlen(p->listen) >= sizeof(t->address) || find(p->hub, p->listen)))
        return fk_fail(error, bytes, -EADDRINUSE, "transport loopback: \"%.100s\" is too long or taken",
                       p->listen);
    struct loopback *l = calloc(1, sizeof(*l));
    if (!l || fk_vec_push(&p->hub->members, t)) {
        free(l);
        return fk_fail(error, bytes, -ENOMEM, "transport loopback: no memory");
    }
    l->hub = p->hub;
    l->number = ++p->hub->n_members;
    l->listens = p->listen != NULL;
    snprintf(t->address, sizeof(t->address), "%s", p->listen ? p->listen : "");
    t->priv = l;
    return 0;
}

static void loopback_pump(struct fk_transport *t, struct fk_peer *p)
{
    struct loopback *l = t->priv;
    struct fk_op *op;

    while ((op = fk_op_next(t, p, NULL))) {
        struct fk_loopback_fault f = { 0 };
        if (l->hub->fault)
            l->hub->fault(l->hub->ctx, p->address, &op->r, &f);
        op->word[0] = t->now_us + l->hub->latency_us + f.delay_us;
        if (f.drop)
            op->word[0] = op->deadline_us + f.delay_us;
        op->word[1] = ++l->n_sent << 3 | (f.drop ? DROP : 0) | (f.corrupt ? CORRUPT : 0) |
                      (f.refuse ? REFUSE : 0);
        op->key = f.serve_us;
    }
}

static void deliver(struct fk_transport *t, struct fk_transport *owner, struct fk_op *op, struct fk_grant *g)
{
    fk_grant_checksum(g, op->r.block.key);
    memcpy(op->r.buffer, g->data, g->bytes);
    if (op->word[1] & CORRUPT)
        ((unsigned char *)op->r.buffer)[op->word[1] % g->bytes] ^= 0x10;
    int rc = fk_grant_release(owner, &op->r.block, g);
    if (rc)
        fk_op_end(t, op, rc);
    else
        fk_op_arrived(t, op, g->checksum);
}

/* The read that waits for this grant, if it still does. Transports and reads come and go, their numbers stay. */
static struct fk_op *waiting(struct fk_transport *owner, const struct fk_parked *k, struct fk_transport **reader)
{
    *reader = by_number(((struct loopback *)owner->priv)->hub, k->word[0]);
    return *reader ? fk_op_find(*reader, k->word[1]) : NULL;
}

static void read_resume(struct fk_transport *owner, struct fk_parked *k, int rc, const struct fk_grant *g)
{
    struct fk_transport *t;
    struct fk_op *op = waiting(owner, k, &t);
    struct fk_grant mine = rc ? (struct fk_grant){ 0 } : *g;

    if (op && rc)
        fk_op_end(t, op, rc);
    else if (op)
        deliver(t, owner, op, &mine);
    else if (!rc)
        owner->provider.release(owner->provider.ctx, &k->ref, &mine);
    if (op)
        fk_reads_hand_out(t);           /* it may not be stepped for a while */
}

/* ---- an owner who takes his time ---- */

static void hold(struct fk_transport *t, struct fk_transport *owner, struct fk_op *op, struct fk_grant *g)
{
    struct held *h = op->key ? malloc(sizeof(*h)) : NULL;

    if (!h) {
        deliver(t, owner, op, g);
        return;
    }
    *h = (struct held){ *g, ((struct loopback *)owner->priv)->number };
    op->priv = h;
    op->word[0] = t->now_us + op->key;
}

static void deliver_held(struct fk_transport *t, struct fk_op *op)
{
    struct held *h = op->priv;

    op->priv = NULL;
    deliver(t, by_number(((struct loopback *)t->priv)->hub, h->owner), op, &h->g);
    free(h);
}

/* The reader goes, or the owner (number; 0: whichever): what is held for the read is given back. */
static bool give_back(struct fk_transport *t, struct fk_op *op, uint64_t number)
{
    struct held *h = op->priv;

    if (!h || (number && h->owner != number))
        return false;
    struct fk_transport *owner = by_number(((struct loopback *)t->priv)->hub, h->owner);
    op->priv = NULL;
    owner->provider.release(owner->provider.ctx, &op->r.block, &h->g);
    free(h);
    return true;
}

static void give_back_all(struct fk_transport *t, struct fk_op_list *list, uint64_t number)
{
    for (struct fk_op *op = list->head, *next; op; op = next) {
        next = op->next;
        if (give_back(t, op, number) && number)
            fk_op_end(t, op, -ECONNRESET);
    }
}

static void serve(struct fk_transport *t, struct fk_op *op)
{
    struct loopback *l = t->priv;
    struct held *h = op->priv;
    struct fk_transport *owner = h ? by_number(l->hub, h->owner) : find(l->hub, op->peer->address);
    struct fk_parked *k;
    struct fk_grant g;

    if (op->word[1] & (DROP | REFUSE) || !owner) {
        fk_op_end(t, op, op->word[1] & DROP ? -ETIMEDOUT : owner ? -ECONNRESET : -ECONNREFUSED);
        return;
    }
    if (((struct loopback *)owner->priv)->away) {
        op->word[0] = t->now_us + AWAY_US;
        return;
    }
    if (h) {
        deliver_held(t, op);
        return;
    }
    owner->now_us = fk_max(owner->now_us, t->now_us);
    int rc = fk_grant_take(owner, &op->r.block, &g, &k);
    if (rc == -EINPROGRESS && op->state != FK_OP_LATE) {
        k->resume = read_resume;
        k->word[0] = l->number;
        k->word[1] = op->id;
        op->word[0] = PARKED;
    } else if (rc) {
        fk_op_end(t, op, rc == -EINPROGRESS ? -ETIMEDOUT : rc);
    } else {
        hold(t, owner, op, &g);
    }
}

static struct fk_op *first_of(struct fk_op_list *list, struct fk_op *best)
{
    for (struct fk_op *op = list->head; op; op = op->next)
        if (!best || op->word[0] < best->word[0] ||
            (op->word[0] == best->word[0] && op->word[1] < best->word[1]))
            best = op;
    return best;
}

static uint64_t loopback_tick(struct fk_transport *t, uint64_t now)
{
    for (;;) {
        struct fk_op *best = NULL;
        for (size_t i = 0; i < t->peers.len; i++) {
            best = first_of(&t->peers.data[i]->sent, best);
            best = first_of(&t->peers.data[i]->late, best);
        }
        if (!best || best->word[0] > now)
            return best ? best->word[0] : UINT64_MAX;
        struct fk_peer *p = best->peer;
        serve(t, best);
        if (p->queued.head)
            loopback_pump(t, p);
    }
}

static void loopback_expire(struct fk_transport *t, struct fk_op *op)
{
    if (op->word[0] == PARKED)          /* nothing is on its way */
        fk_op_end(t, op, -ETIMEDOUT);
    else
        fk_op_late(t, op);
}

static bool loopback_drop(struct fk_transport *t, struct fk_peer *p)
{
    give_back_all(t, &p->sent, 0);
    give_back_all(t, &p->late, 0);
    fk_channel_end(t, p, NULL, -ECANCELED);
    return true;
}

static void loopback_close(struct fk_transport *t)
{
    struct loopback *l = t->priv;

    for (struct fk_parked *k = t->parked; k; k = k->next) {
        if (k->resume)
            read_resume(t, k, -ECONNRESET, NULL);
        k->resume = NULL;
    }
    for (size_t i = 0; i < l->hub->members.len; i++) {
        struct fk_transport *m = l->hub->members.data[i];
        for (size_t k = 0; k < m->peers.len; k++) {
            give_back_all(m, &m->peers.data[k]->sent, m == t ? 0 : l->number);
            give_back_all(m, &m->peers.data[k]->late, m == t ? 0 : l->number);
        }
        if (m != t)
            fk_reads_hand_out(m);
    }
    for (size_t i = 0; i < l->hub->members.len; i++)
        if (l->hub->members.data[i] == t)
            l->hub->members.data[i] = l->hub->members.data[--l->hub->members.len];
    free(l);
}

const struct fk_transport_ops fk_transport_loopback = {
    .name = "loopback", .help = "in one process, simulated", .stepped = true,
    .open = loopback_open, .close = loopback_close, .pump = loopback_pump, .expire = loopback_expire,
    .drop = loopback_drop, .tick = loopback_tick,
};
