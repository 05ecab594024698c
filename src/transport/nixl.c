/*
 * nixl.c - reads over NVIDIA's NIXL between FlexKV nodes: its agents move the payload (agents.h), mostly through its UCX
 * plugin. The reader's agents have a thread of NIXL's each, which sleeps until something arrives.
 */
#include <arpa/inet.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <stdio.h>

#include "base/log.h"
#include "nixl/nixl_lib.h"
#include "transport/agents.h"

#define DEFAULT_PLUGIN "UCX"

struct nixl {
    struct fk_agents a;
    char plugin[12], device[IF_NAMESIZE];
};

/* ---- agents ---- */

static int agent_open(struct fk_agents *s, bool reader, uint64_t number, void **agent)
{
    struct nixl *n = (struct nixl *)s;
    struct fk_nixl_agent *a = calloc(1, sizeof(*a));
    char name[64];

    if (!a)
        return -ENOMEM;
    snprintf(name, sizeof(name), "flexkv-%s-%016llx-%016llx-%llu", reader ? "reader" : "owner",
             (unsigned long long)s->m.hello.node, (unsigned long long)s->m.hello.epoch, (unsigned long long)number);
    int rc = fk_nixl_open(a, name, n->plugin, n->device, reader);
    if (rc)
        free(a);
    else
        *agent = a;
    return rc;
}

static void agent_close(void *agent)
{
    fk_nixl_close(agent);
    free(agent);
}

static int agent_add(void *a, const struct fk_memory *m) { return fk_nixl_register(a, m->base, m->bytes); }
static int agent_describe(void *a, void **data, size_t *bytes) { return fk_nixl_metadata(a, data, bytes); }
static int agent_peer(void *a, const void *data, size_t bytes) { return fk_nixl_peer(a, data, bytes); }
static int agent_done(void *a, void *transfer) { return fk_nixl_done(a, transfer); }
static void agent_forget(void *a, void *transfer) { fk_nixl_forget(a, transfer); }

static int agent_write(void *a, const void *data, size_t bytes, uint64_t to, void **transfer)
{
    return fk_nixl_write(a, data, bytes, to, transfer);
}

static const struct fk_agent_ops agent_ops = {
    .library = "NIXL and plugins", .open = agent_open, .close = agent_close, .add = agent_add,
    .describe = agent_describe, .peer = agent_peer, .write = agent_write, .done = agent_done, .forget = agent_forget,
};

/* ---- the transport ---- */

static void nixl_close(struct fk_transport *t)
{
    fk_agents_close(t->priv);
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
    return *n->device ? 0 : fk_fail(error, bytes, -EADDRNOTAVAIL, "transport nixl: no interface here has the "
                                    "address %s (listen, source)", source);
}

/* Better known now than with the first read. */
static int try_agent(struct nixl *n, char *error, size_t bytes)
{
    struct fk_nixl_agent a;
    int rc = fk_nixl_open(&a, "flexkv-try", n->plugin, n->device, false);

    fk_nixl_close(&a);
    return rc ? fk_fail(error, bytes, rc, "transport nixl: the plugin %s can't be used here (the log says why); choose "
                        "another one (nixl_transport_plugin)", n->plugin) : 0;
}

static int nixl_open(struct fk_transport *t, const struct fk_transport_params *p, char *error, size_t bytes)
{
    const char *plugin = p->nixl_plugin && *p->nixl_plugin ? p->nixl_plugin : DEFAULT_PLUGIN;
    struct nixl *n = strlen(plugin) < sizeof(n->plugin) ? calloc(1, sizeof(*n)) : NULL;
    char kind[20];

    if (!n)
        return fk_fail(error, bytes, -EINVAL, "transport nixl: no plugin is called \"%.100s\" (nixl_transport_plugin), or no "
                       "memory", plugin);
    t->priv = n;
    n->a.ops = &agent_ops;
    snprintf(n->plugin, sizeof(n->plugin), "%s", plugin);
    snprintf(kind, sizeof(kind), "nixl/%s", plugin);
    int rc = fk_members_open(&n->a.m, t, p, &fk_agents_mover, kind, error, bytes);
    if (!rc)
        rc = find_device(n, p, error, bytes);
    if (!rc)
        rc = fk_nixl_load(p->nixl_library, error, bytes);
    if (!rc)
        rc = try_agent(n, error, bytes);
    if (!rc)
        rc = fk_members_listen(&n->a.m, p->listen, error, bytes);
    if (rc)
        nixl_close(t);
    return rc;
}

const struct fk_transport_ops fk_transport_nixl = {
    .name = "nixl", .help = "NVIDIA's NIXL: UCX",
    .open = nixl_open, .close = nixl_close, .region = fk_agents_region, .pump = fk_agents_pump,
    .expire = fk_members_expire, .drop = fk_members_drop, .tick = fk_agents_tick,
};
