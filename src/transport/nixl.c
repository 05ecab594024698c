/*
 * nixl.c - reads over NVIDIA's NIXL between FlexKV nodes (members.h): the payload goes through NIXL, mostly its UCX
 * plugin, which the owner tells to write it into the reader's buffer.
 *
 *   channel   has a NIXL agent of its own on each side: destroying it is the only way to make sure that nothing is read
 *             or written any more. The reader's says in a frame (MEMORY) which memory may be written to: all that was
 *             registered. When more is registered, new reads take a new channel
 *   answer    follows the write: NIXL says that it is done when all bytes are in the reader's memory
 *
 * NIXL has nothing to wait for: while writes are under way the owner's thread looks every POLL_US. The reader's agent has
 * a thread of NIXL's, which sleeps until something arrives. All else in the transport's thread.
 */
#include <arpa/inet.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <stdio.h>

#include "base/log.h"
#include "transport/members.h"
#include "transport/nixl_lib.h"

#define DEFAULT_PLUGIN "UCX"
#define POLL_US 30u

struct nixl_channel {
    struct fk_channel c;
    struct fk_nixl_agent agent;
    size_t n_memory;                    /* how much of what is registered it knows */
};

struct nixl {
    struct fk_members m;
    char plugin[12], device[IF_NAMESIZE];
    uint64_t n_agents;                  /* ever */
    FK_VEC(struct fk_nixl_memory) memory, new_memory;   /* new: under the transport's lock */
};

static struct nixl_channel *its(struct fk_channel *c) { return (struct nixl_channel *)c; }
static struct nixl *nixl_of(struct fk_channel *c) { return (struct nixl *)c->m; }

static const char *text_of(int rc)
{
    return rc == -EFAULT ? "it is not in memory that was registered with this transport (fk_transport_register)"
         : rc == -EINVAL ? "NIXL does not take it: is the reader's memory registered?" : "NIXL failed";
}

/* ---- channels ---- */

static int open_agent(struct fk_channel *c)
{
    struct nixl_channel *x = its(c);
    struct nixl *n = nixl_of(c);
    char name[64];

    snprintf(name, sizeof(name), "flexkv-%s-%016llx-%016llx-%llu", c->peer ? "reader" : "owner",
             (unsigned long long)c->m->hello.node, (unsigned long long)c->m->hello.epoch, (unsigned long long)++n->n_agents);
    int rc = fk_nixl_open(&x->agent, name, n->plugin, n->device, c->peer != NULL);
    c->moving = rc == 0;
    for (; rc == 0 && x->n_memory < n->memory.len; x->n_memory++)
        rc = fk_nixl_register(&x->agent, &n->memory.data[x->n_memory]);
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
    rc = fk_nixl_metadata(&its(c)->agent, &data, &bytes);
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
    int rc = fk_nixl_peer(&its(c)->agent, payload, bytes);
    if (rc)
        fk_warn("transport nixl: what a reader says of his memory is of no use; do both have the same NIXL and plugins?");
    return rc;
}

static void channel_close(struct fk_channel *c)
{
    for (struct fk_job *j = c->jobs.first; j; j = j->next) {
        if (j->priv)
            fk_nixl_forget(&its(c)->agent, j->priv);
        j->priv = NULL;
    }
    fk_nixl_close(&its(c)->agent);
}

/* ---- memory ---- */

/* The owner's agents take it at once; a reader's has told what it has, so new reads take a new channel. */
static void tell_channel(struct fk_channel *c)
{
    struct nixl_channel *x = its(c);
    struct nixl *n = nixl_of(c);

    if (!c->moving || x->n_memory == n->memory.len)
        return;
    if (c->peer) {
        c->suspect = true;
        if (c->peer->channel == c)
            c->peer->channel = NULL;
        return;
    }
    for (; x->n_memory < n->memory.len; x->n_memory++)
        c->dead |= fk_nixl_register(&x->agent, &n->memory.data[x->n_memory]) != 0;
}

static void take_memory(struct nixl *n)
{
    struct fk_transport *t = n->m.t;

    pthread_mutex_lock(&t->lock);
    size_t had = n->memory.len;
    for (size_t i = 0; i < n->new_memory.len; i++)
        if (fk_vec_push(&n->memory, n->new_memory.data[i]))
            fk_error("transport nixl: no memory to register %zu bytes", n->new_memory.data[i].bytes);
    n->new_memory.len = 0;
    pthread_mutex_unlock(&t->lock);
    for (struct fk_channel *c = n->memory.len > had ? n->m.channels : NULL; c; c = c->next)
        tell_channel(c);
}

static bool knows(struct fk_channel *c, const void *data, size_t bytes)
{
    const struct nixl *n = nixl_of(c);

    for (size_t i = 0; i < its(c)->n_memory; i++) {
        const char *base = n->memory.data[i].base;
        if ((const char *)data >= base && (const char *)data + bytes <= base + n->memory.data[i].bytes)
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
        take_memory(nixl_of(c));        /* registered a moment ago? */
    if (!knows(c, j->grant.data, j->grant.bytes))
        return -EFAULT;
    return fk_nixl_write(&its(c)->agent, j->grant.data, j->grant.bytes, j->request.raddr, &j->priv);
}

static int poll_channel(struct fk_channel *c, uint64_t now, uint64_t *next)
{
    struct fk_job *after;

    for (struct fk_job *j = c->jobs.first; j; j = after) {
        after = j->next;
        int rc = j->priv ? fk_nixl_done(&its(c)->agent, j->priv) : -EINPROGRESS;
        if (rc == -EINPROGRESS) {
            *next = fk_min(*next, now + POLL_US);
            continue;
        }
        fk_nixl_forget(&its(c)->agent, j->priv);
        j->priv = NULL;
        fk_job_done(c, j, rc);
    }
    return 0;
}

static const struct fk_mover mover = {
    .channel_bytes = sizeof(struct nixl_channel), .reader_open = reader_open, .session_open = session_open,
    .close = channel_close, .expose = expose, .unexpose = unexpose, .write = write_job, .poll = poll_channel,
    .frame = frame, .strerror = text_of,
};

/* ---- the transport ---- */

static void nixl_close(struct fk_transport *t)
{
    struct nixl *n = t->priv;

    fk_members_close(&n->m);
    fk_vec_free(&n->memory);
    fk_vec_free(&n->new_memory);
    free(n);
}

static bool is_address(const struct sockaddr *a, const char *text)
{
    char own[INET6_ADDRSTRLEN] = "";

    if (a && a->sa_family == AF_INET)
        inet_ntop(AF_INET, &((const struct sockaddr_in *)a)->sin_addr, own, sizeof(own));
    else if (a && a->sa_family == AF_INET6)
        inet_ntop(AF_INET6, &((const struct sockaddr_in6 *)a)->sin6_addr, own, sizeof(own));
    return *own && strcmp(own, text) == 0;
}

/* UCX knows interfaces by name. */
static int find_device(struct nixl *n, const struct fk_transport_params *p, char *error, size_t bytes)
{
    struct ifaddrs *all = NULL;
    char source[64];
    int rc = fk_members_source(p, source, sizeof(source), error, bytes);

    if (rc)
        return rc;
    if (getifaddrs(&all) == 0)
        for (struct ifaddrs *i = all; i && !*n->device; i = i->ifa_next)
            if (is_address(i->ifa_addr, source))
                snprintf(n->device, sizeof(n->device), "%s", i->ifa_name);
    freeifaddrs(all);
    return *n->device ? 0 : fk_transport_fail(error, bytes, -EADDRNOTAVAIL, "transport nixl: no interface here has the "
                                              "address %s (listen, source)", source);
}

/* Better known now than with the first read. */
static int try_agent(struct nixl *n, char *error, size_t bytes)
{
    struct fk_nixl_agent a;
    int rc = fk_nixl_open(&a, "flexkv-try", n->plugin, n->device, false);

    fk_nixl_close(&a);
    return rc ? fk_transport_fail(error, bytes, rc, "transport nixl: the plugin %s can't be used here (the log says why); choose "
                                  "another one (nixl_transport_plugin)", n->plugin) : 0;
}

static int nixl_open(struct fk_transport *t, const struct fk_transport_params *p, char *error, size_t bytes)
{
    const char *plugin = p->nixl_plugin && *p->nixl_plugin ? p->nixl_plugin : DEFAULT_PLUGIN;
    struct nixl *n = strlen(plugin) < sizeof(n->plugin) ? calloc(1, sizeof(*n)) : NULL;
    char kind[20];

    if (!n)
        return fk_transport_fail(error, bytes, -EINVAL, "transport nixl: no plugin is called \"%.100s\" (nixl_transport_plugin), or no "
                                 "memory", plugin);
    t->priv = n;
    snprintf(n->plugin, sizeof(n->plugin), "%s", plugin);
    snprintf(kind, sizeof(kind), "nixl/%s", plugin);
    int rc = fk_members_open(&n->m, t, p, &mover, kind, error, bytes);
    if (!rc)
        rc = find_device(n, p, error, bytes);
    if (!rc)
        rc = fk_nixl_load(p->nixl_library, error, bytes);
    if (!rc)
        rc = try_agent(n, error, bytes);
    if (!rc)
        rc = fk_members_listen(&n->m, p->listen, error, bytes);
    if (rc)
        nixl_close(t);
    return rc;
}

static int nixl_region(struct fk_transport *t, void *base, size_t size)
{
    struct nixl *n = t->priv;
    struct fk_nixl_memory m = { base, size };

    return !size ? 0 : fk_vec_push(&n->new_memory, m);
}

/* Before new reads are sent. */
static void nixl_pump(struct fk_transport *t, struct fk_peer *p)
{
    take_memory(t->priv);
    fk_members_pump(t, p);
}

static uint64_t nixl_tick(struct fk_transport *t, uint64_t now)
{
    take_memory(t->priv);
    return fk_members_tick(t, now);
}

const struct fk_transport_ops fk_transport_nixl = {
    .name = "nixl", .help = "NVIDIA's NIXL: UCX",
    .open = nixl_open, .close = nixl_close, .region = nixl_region, .pump = nixl_pump,
    .expire = fk_members_expire, .drop = fk_members_drop, .tick = nixl_tick,
};
