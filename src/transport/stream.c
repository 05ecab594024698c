/* stream.c - see stream.h. */
#include "transport/stream.h"

#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <stdio.h>

#include "base/util.h"
#include "transport/endpoint.h"

#define BACKLOG 64
#define READ_CHUNK 16384u
#define KEEP_IDLE_S 10                  /* an idle connection whose peer is gone is noticed within */
#define KEEP_INTERVAL_S 2               /* KEEP_IDLE_S + KEEP_PROBES * KEEP_INTERVAL_S */
#define KEEP_PROBES 3

static int parse_port(const char *text, in_port_t *port)
{
    char *end;
    unsigned long n = *text ? strtoul(text, &end, 10) : 65536;

    if (n > 65535 || *text < '0' || *text > '9' || *end)
        return -EINVAL;
    *port = htons((uint16_t)n);
    return 0;
}

int fk_tcp_parse(const char *text, struct sockaddr_storage *out, socklen_t *len)
{
    char host[64];
    const char *colon = strrchr(text, ':');
    bool six = text[0] == '[';
    size_t n = colon ? (size_t)(colon - text) : 0;

    memset(out, 0, sizeof(*out));
    if (!n || n >= sizeof(host) || (six && (n < 3 || text[n - 1] != ']')))
        return -EINVAL;
    memcpy(host, text + six, n - 2 * six);
    host[n - 2 * six] = '\0';
    if (six) {
        struct sockaddr_in6 *a = (struct sockaddr_in6 *)out;
        a->sin6_family = AF_INET6;
        *len = sizeof(*a);
        return inet_pton(AF_INET6, host, &a->sin6_addr) == 1 ? parse_port(colon + 1, &a->sin6_port) : -EINVAL;
    }
    struct sockaddr_in *a = (struct sockaddr_in *)out;
    a->sin_family = AF_INET;
    *len = sizeof(*a);
    return inet_pton(AF_INET, host, &a->sin_addr) == 1 ? parse_port(colon + 1, &a->sin_port) : -EINVAL;
}

void fk_tcp_format(const struct sockaddr_storage *a, char *out, size_t bytes)
{
    char host[INET6_ADDRSTRLEN] = "";

    if (a->ss_family == AF_INET6) {
        const struct sockaddr_in6 *six = (const struct sockaddr_in6 *)a;
        inet_ntop(AF_INET6, &six->sin6_addr, host, sizeof(host));
        snprintf(out, bytes, "[%s]:%u", host, ntohs(six->sin6_port));
    } else {
        const struct sockaddr_in *four = (const struct sockaddr_in *)a;
        inet_ntop(AF_INET, &four->sin_addr, host, sizeof(host));
        snprintf(out, bytes, "%s:%u", host, ntohs(four->sin_port));
    }
}

static void set_options(int fd, uint64_t timeout_us)
{
    int one = 1, idle = KEEP_IDLE_S, interval = KEEP_INTERVAL_S, probes = KEEP_PROBES;
    unsigned timeout_ms = (unsigned)(timeout_us / 1000);

    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
    setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &one, sizeof(one));
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &idle, sizeof(idle));
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL, &interval, sizeof(interval));
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPCNT, &probes, sizeof(probes));
    setsockopt(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, &timeout_ms, sizeof(timeout_ms));
}

int fk_tcp_listen(const char *address, int *fd, char *bound, size_t bound_bytes, char *error, size_t bytes)
{
    struct sockaddr_storage a;
    socklen_t len;
    int one = 1;

    if (fk_tcp_parse(address, &a, &len))
        return fk_fail(error, bytes, -EINVAL, "listen address \"%.100s\": IP:PORT is expected, with the "
                       "IP in numbers", address);
    int s = socket(a.ss_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (s < 0)
        return fk_fail(error, bytes, -errno, "socket: %s", strerror(errno));
    setsockopt(s, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
    if (bind(s, (struct sockaddr *)&a, len) < 0 || listen(s, BACKLOG) < 0 ||
        getsockname(s, (struct sockaddr *)&a, &len) < 0) {
        int rc = -errno;
        close(s);
        return fk_fail(error, bytes, rc, "listen address %s: %s; give this node another", address,
                       strerror(-rc));
    }
    fk_tcp_format(&a, bound, bound_bytes);
    *fd = s;
    return 0;
}

int fk_tcp_accept(int listen_fd, uint64_t timeout_us, int *fd)
{
    int s = accept4(listen_fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);

    if (s < 0)
        return -errno;
    set_options(s, timeout_us);
    *fd = s;
    return 0;
}

int fk_tcp_connect(const char *address, uint64_t timeout_us, int *fd)
{
    struct sockaddr_storage a;
    socklen_t len;

    if (fk_tcp_parse(address, &a, &len))
        return -EINVAL;
    int s = socket(a.ss_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (s < 0)
        return -errno;
    set_options(s, timeout_us);
    if (connect(s, (struct sockaddr *)&a, len) < 0 && errno != EINPROGRESS) {
        int rc = -errno;
        close(s);
        return rc;
    }
    *fd = s;
    return 0;
}

int fk_tcp_connected(int fd)
{
    int rc = 0;
    socklen_t n = sizeof(rc);

    return getsockopt(fd, SOL_SOCKET, SO_ERROR, &rc, &n) < 0 ? -errno : -rc;
}

/* ---- bytes ---- */

void fk_stream_init(struct fk_stream *s, int fd)
{
    *s = (struct fk_stream){ .fd = fd };
}

void fk_stream_close(struct fk_stream *s)
{
    if (s->fd >= 0)
        close(s->fd);
    free(s->in);
    free(s->out);
    *s = (struct fk_stream){ .fd = -1 };
}

int fk_stream_read(struct fk_stream *s, size_t max)
{
    if (s->in_at) {                 /* what has been used goes */
        memmove(s->in, s->in + s->in_at, s->in_len - s->in_at);
        s->in_len -= s->in_at;
        s->in_at = 0;
    }
    size_t room = fk_min((size_t)READ_CHUNK, max > s->in_len ? max - s->in_len : 0);
    if (!room)
        return -EAGAIN;
    if (fk_vec_grow_bytes((void **)&s->in, &s->in_cap, s->in_len + room, 1))
        return -ECONNRESET;
    ssize_t n = recv(s->fd, s->in + s->in_len, room, 0);
    if (n > 0) {
        s->in_len += (size_t)n;
        return 0;
    }
    return n < 0 && (errno == EAGAIN || errno == EINTR) ? -EAGAIN : -ECONNRESET;
}

uint8_t *fk_stream_room(struct fk_stream *s, size_t n)
{
    if (s->out_at == s->out_len)
        s->out_at = s->out_len = 0;
    if (fk_vec_grow_bytes((void **)&s->out, &s->out_cap, s->out_len + n, 1))
        return NULL;
    s->out_len += n;
    return s->out + s->out_len - n;
}

int fk_stream_flush(struct fk_stream *s)
{
    while (s->out_at < s->out_len) {
        ssize_t n = send(s->fd, s->out + s->out_at, s->out_len - s->out_at, MSG_NOSIGNAL);
        if (n >= 0)
            s->out_at += (size_t)n;
        else if (errno == EAGAIN)
            return -EAGAIN;
        else if (errno != EINTR)
            return -ECONNRESET;
    }
    return 0;
}
