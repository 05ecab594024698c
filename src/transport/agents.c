/* agents.c - see agents.h. */
#include "transport/agents.h"

#include "base/log.h"

#define POLL_US 30u

struct agent_channel {
    struct fk_channel c;
    void *agent;
    size_t n_memory;                    /* how much of what is registered it knows */
};

static struct agent_channel *its(struct fk_channel *c) { return (struct agent_channel *)c; }
static struct fk_agents *agents_of(struct fk_channel *c) { return (struct fk_agents *)c->m; }
static const struct fk_agent_ops *ops_of(struct fk_channel *c) { return agents_of(c)->ops; }

static const char *text_of(int rc)
{
    return rc == -EFAULT ? "it is not in memory that was registered with this transport (fk_transport_register)"
         : rc == -EINVAL ? "the library does not take it: is the reader's memory registered?" : "the library failed";
}

/* ---- channels ---- */

static int open_agent(struct fk_channel *c)
{
    struct agent_channel *x = its(c);
    struct fk_agents *s = agents_of(c);
    int rc = s->ops->open(s, c->peer != NULL, ++s->n_agents, &x->agent);

    c->moving = rc == 0;
    for (; rc == 0 && x->n_memory < s->memory.len; x->n_memory++)
        rc = s->ops->add(x->agent, &s->memory.data[x->n_memory]);
    return rc;
}

static int reader_open(struct fk_channel *c)
{
    c->session.endpoint_len = 0;        /* all is said later, to who has proved that he is a member */
    return 0;
}

static int session_open(struct fk_channel *c)
{
    void *data = NULL;
    size_t bytes;
    int rc = fk_channel_flush(c);       /* both take some ten milliseconds for their agents: at the same time */

    if (!rc)
        rc = open_agent(c);
    if (rc || !c->peer)
        return rc;
    rc = ops_of(c)->describe(its(c)->agent, &data, &bytes);
    if (!rc)
        rc = fk_put_memory(&c->session, &c->stream, data, bytes);
    free(data);
    return rc;
}

/* The reader's memory. */
static int frame(struct fk_channel *c, unsigned type, const uint8_t *payload, uint32_t bytes)
{
    if (c->peer || type != FK_FRAME_MEMORY || !bytes)
        return -EPROTO;
    int rc = ops_of(c)->peer(its(c)->agent, payload, bytes);
    if (rc)
        fk_warn("transport %s: what a reader says of his memory is of no use; do both have the same %s?", c->m->t->ops->name,
                ops_of(c)->library);
    return rc;
}

static void channel_close(struct fk_channel *c)
{
    for (struct fk_job *j = c->jobs.first; j; j = j->next) {
        if (j->priv)
            ops_of(c)->forget(its(c)->agent, j->priv);
        j->priv = NULL;
    }
    if (its(c)->agent)
        ops_of(c)->close(its(c)->agent);
    its(c)->agent = NULL;
}

/* ---- memory ---- */

/* The owner's agents take it at once; a reader's has told what it has, so new reads take a new channel. */
static void tell_channel(struct fk_channel *c)
{
    struct agent_channel *x = its(c);
    struct fk_agents *s = agents_of(c);

    if (!c->moving || x->n_memory == s->memory.len)
        return;
    if (c->peer) {
        c->suspect = true;
        if (c->peer->channel == c)
            c->peer->channel = NULL;
        return;
    }
    for (; x->n_memory < s->memory.len; x->n_memory++)
        c->dead |= s->ops->add(x->agent, &s->memory.data[x->n_memory]) != 0;
}

static void take_memory(struct fk_agents *s)
{
    struct fk_transport *t = s->m.t;

    pthread_mutex_lock(&t->lock);
    size_t had = s->memory.len;
    for (size_t i = 0; i < s->new_memory.len; i++)
        if (fk_vec_push(&s->memory, s->new_memory.data[i]))
            fk_error("transport %s: no memory to register %zu bytes", t->ops->name, s->new_memory.data[i].bytes);
    s->new_memory.len = 0;
    pthread_mutex_unlock(&t->lock);
    for (struct fk_channel *c = s->memory.len > had ? s->m.channels : NULL; c; c = c->next)
        tell_channel(c);
}

static bool knows(struct fk_channel *c, const void *data, size_t bytes)
{
    const struct fk_agents *s = agents_of(c);

    for (size_t i = 0; i < its(c)->n_memory; i++) {
        const char *base = s->memory.data[i].base;
        if ((const char *)data >= base && (const char *)data + bytes <= base + s->memory.data[i].bytes)
            return true;
    }
    return false;
}

/* ---- moving ---- */

static int expose(struct fk_channel *c, struct fk_op *op, struct fk_request *r)
{
    r->rkey = 0;
    r->raddr = (uintptr_t)op->r.buffer;
    return knows(c, op->r.buffer, op->r.block.bytes) ? 0 : -EFAULT;
}

static void unexpose(struct fk_op *op) { }

static int write_job(struct fk_channel *c, struct fk_job *j)
{
    if (!knows(c, j->grant.data, j->grant.bytes))
        take_memory(agents_of(c));      /* registered a moment ago? */
    if (!knows(c, j->grant.data, j->grant.bytes))
        return -EFAULT;
    int rc = ops_of(c)->write(its(c)->agent, j->grant.data, j->grant.bytes, j->request.raddr, &j->priv);
    c->dead |= rc == -EIO;
    return rc == -EIO ? 0 : rc;
}

static int poll_channel(struct fk_channel *c, uint64_t now, uint64_t *next)
{
    struct fk_job *after;

    for (struct fk_job *j = c->jobs.first; j; j = after) {
        after = j->next;
        int rc = j->priv ? ops_of(c)->done(its(c)->agent, j->priv) : -EINPROGRESS;
        if (rc == -EINPROGRESS) {
            *next = fk_min(*next, now + POLL_US);
            continue;
        }
        ops_of(c)->forget(its(c)->agent, j->priv);
        j->priv = NULL;
        fk_job_done(c, j, rc);
    }
    return 0;
}

const struct fk_mover fk_agents_mover = {
    .channel_bytes = sizeof(struct agent_channel), .reader_open = reader_open, .session_open = session_open,
    .close = channel_close, .expose = expose, .unexpose = unexpose, .write = write_job, .poll = poll_channel,
    .frame = frame, .strerror = text_of,
};

/* ---- the transport ---- */

void fk_agents_close(struct fk_agents *s)
{
    fk_members_close(&s->m);
    fk_vec_free(&s->memory);
    fk_vec_free(&s->new_memory);
    free(s);
}

int fk_agents_region(struct fk_transport *t, void *base, size_t bytes)
{
    struct fk_agents *s = t->priv;
    struct fk_memory m = { base, bytes };

    return !bytes ? 0 : fk_vec_push(&s->new_memory, m);
}

/* Before new reads are sent. */
void fk_agents_pump(struct fk_transport *t, struct fk_peer *p)
{
    take_memory(t->priv);
    fk_members_pump(t, p);
}

uint64_t fk_agents_tick(struct fk_transport *t, uint64_t now)
{
    take_memory(t->priv);
    return fk_members_tick(t, now);
}
