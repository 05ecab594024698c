/*
 * mooncake_meta.c - what this node says at Mooncake's HTTP metadata server, and Mooncake's configuration file.
 * In the caller's thread; every wait has a deadline. See mooncake_impl.h, mooncake_config.h.
 */
#include <jansson.h>
#include <poll.h>
#include <stdio.h>

#include "base/clock.h"
#include "base/log.h"
#include "transport/mooncake_config.h"
#include "transport/mooncake_impl.h"

static int wait_for(int fd, short events, uint64_t until_us)
{
    struct pollfd p = { .fd = fd, .events = events };

    for (;;) {
        uint64_t now = fk_clock_us();
        if (now >= until_us)
            return -ETIMEDOUT;
        int rc = poll(&p, 1, (int)((until_us - now) / 1000) + 1);
        if (rc > 0)
            return 0;
        if (rc < 0 && errno != EINTR)
            return -errno;
    }
}

static int exchange(struct fk_stream *s, uint64_t until_us)
{
    const char *body;
    size_t n;
    int rc = wait_for(s->fd, POLLOUT, until_us);

    if (!rc)
        rc = fk_tcp_connected(s->fd);
    while (!rc && (rc = fk_stream_flush(s)) == -EAGAIN)
        rc = wait_for(s->fd, POLLOUT, until_us);
    while (!rc) {
        rc = wait_for(s->fd, POLLIN, until_us);
        int got = rc ? rc : fk_stream_read(s, FK_MOON_MESSAGE_MAX);
        if (rc || got == -EAGAIN)
            continue;
        rc = fk_moon_http(fk_stream_data(s), fk_stream_unread(s), got != 0, &body, &n);
        if (rc == 1)
            return 0;
    }
    return rc;
}

static int request(struct fk_mooncake *m, const char *method, const char *kind, const char *body)
{
    size_t room = 1024 + (body ? strlen(body) : 0);
    fk_autofree char *text = malloc(room);
    struct fk_stream s;
    int fd, rc = text ? fk_moon_http_request(text, room, method, m->meta_host, m->meta_path, kind, m->name, body)
                      : -ENOMEM;

    if (rc < 0)
        return rc;
    size_t n = (size_t)rc;
    rc = fk_tcp_connect(m->meta_host, m->t->timeout_us, &fd);
    if (rc)
        return rc;
    fk_stream_init(&s, fd);
    uint8_t *p = fk_stream_room(&s, n);
    if (p)
        memcpy(p, text, n);
    rc = p ? exchange(&s, fk_clock_us() + m->t->timeout_us) : -ENOMEM;
    fk_stream_close(&s);
    return rc;
}

int fk_moon_publish(struct fk_mooncake *m)
{
    struct sockaddr_storage a;
    socklen_t len;
    char rpc[256];

    if (!m->meta_host[0] || m->handshake.fd < 0)
        return 0;
    fk_autofree char *segment = fk_moon_own_segment(m);
    if (!segment)
        return -ENOMEM;
    len = sizeof(a);
    if (getsockname(m->handshake.fd, (struct sockaddr *)&a, &len) < 0)
        return -errno;
    snprintf(rpc, sizeof(rpc), "{\"ip_or_host_name\":\"%s\",\"rpc_port\":%u}", m->host,
             ntohs(a.ss_family == AF_INET6 ? ((struct sockaddr_in6 *)&a)->sin6_port
                                           : ((struct sockaddr_in *)&a)->sin_port));
    int rc = request(m, "PUT", "ram", segment);
    if (!rc && !m->published) {         /* the server takes this key only once: one that a dead node left goes first */
        (void)request(m, "DELETE", "rpc_meta", NULL);
        rc = request(m, "PUT", "rpc_meta", rpc);
    }
    m->published |= rc == 0;
    if (rc)
        fk_error("transport mooncake: the segment \"%s\" can't be published at http://%s%s: %s "
                 "(mooncake_metadata_server)", m->name, m->meta_host, m->meta_path, strerror(-rc));
    return rc;
}

void fk_moon_unpublish(struct fk_mooncake *m)
{
    if (!m->meta_host[0] || m->handshake.fd < 0)
        return;
    int rc = request(m, "DELETE", "ram", NULL);
    if (!rc || rc == -ENOENT)
        rc = request(m, "DELETE", "rpc_meta", NULL);
    if (rc && rc != -ENOENT)
        fk_warn("transport mooncake: the segment \"%s\" stays behind at http://%s%s: %s", m->name, m->meta_host,
                m->meta_path, strerror(-rc));
}

/* ---- the configuration file of the reference ---- */

static int take(json_t *o, const char *key, char *out, size_t room, const char *path, char *error, size_t bytes)
{
    json_t *v = json_object_get(o, key);

    if (!v)
        return 0;
    if (!json_is_string(v) || json_string_length(v) >= room)
        return fk_fail(error, bytes, -EINVAL, "%s: \"%s\" must be a text of less than %zu characters "
                       "(mooncake_config_path)", path, key, room);
    snprintf(out, room, "%s", json_string_value(v));
    return 0;
}

static int check(struct fk_mooncake_config *c, const char *backend, const char *server, const char *protocol,
                 const char *path, char *error, size_t bytes)
{
    char host[FK_TRANSPORT_ADDRESS_MAX], rest[128];

    if (*protocol && strcmp(protocol, "tcp"))
        return fk_fail(error, bytes, -ENOTSUP, "%s: protocol \"%s\": FlexKV speaks Mooncake's tcp only; for "
                       "RDMA use the fabric transport", path, protocol);
    if (strcmp(server, "P2PHANDSHAKE") == 0 || strcasecmp(backend, "p2p") == 0 ||
        strcmp(backend, "P2PHANDSHAKE") == 0) {
        snprintf(c->metadata, sizeof(c->metadata), "P2PHANDSHAKE");
        return 0;
    }
    if (fk_moon_url(server, host, rest) == 0) {
        snprintf(c->metadata, sizeof(c->metadata), "%s", server);
        return 0;
    }
    if (strcasecmp(backend, "redis") == 0 || strncmp(server, "redis://", 8) == 0) {
        snprintf(c->metadata, sizeof(c->metadata), "P2PHANDSHAKE");
        c->redis = true;
        return 0;
    }
    return fk_fail(error, bytes, -ENOTSUP, "%s: metadata_backend \"%s\", metadata_server \"%s\": FlexKV "
                   "speaks P2PHANDSHAKE and http://IP:PORT/metadata with Mooncake's engines", path, backend,
                   server);
}

int fk_mooncake_config_load(const char *path, struct fk_mooncake_config *c, char *error, size_t bytes)
{
    char backend[64] = "", server[192] = "", protocol[32] = "", ip[64] = "";
    json_error_t why;
    json_t *o = json_load_file(path, JSON_REJECT_DUPLICATES, &why);

    memset(c, 0, sizeof(*c));
    if (!o)
        return fk_fail(error, bytes, -EINVAL, "%s:%d: %s (mooncake_config_path)", path, why.line, why.text);
    json_int_t port = json_integer_value(json_object_get(o, "engine_port"));
    int rc = take(o, "engine_ip", ip, sizeof(ip), path, error, bytes);
    if (!rc)
        rc = take(o, "metadata_backend", backend, sizeof(backend), path, error, bytes);
    if (!rc)
        rc = take(o, "metadata_server", server, sizeof(server), path, error, bytes);
    if (!rc)
        rc = take(o, "protocol", protocol, sizeof(protocol), path, error, bytes);
    json_decref(o);
    if (!rc && (port < 0 || port > 65535 || !*ip))
        rc = fk_fail(error, bytes, -EINVAL, "%s: engine_ip and engine_port (0 to 65535) are needed "
                     "(mooncake_config_path)", path);
    if (!rc)
        rc = check(c, backend, server, protocol, path, error, bytes);
    if (!rc)
        snprintf(c->listen, sizeof(c->listen), strchr(ip, ':') ? "[%s]:%d" : "%s:%d", ip, (int)port);
    return rc;
}
