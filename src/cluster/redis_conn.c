/* redis_conn.c - see redis_conn.h. */
#include "cluster/redis_conn.h"

#include <arpa/inet.h>
#include <hiredis/hiredis.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <openssl/err.h>
#include <openssl/x509v3.h>
#include <poll.h>
#include <stdio.h>
#include <sys/socket.h>
#include <sys/un.h>

#define IN_MAX (256u << 20)             /* an answer larger than this is not ours */

enum login { LOGIN_AUTH, LOGIN_SELECT, LOGIN_PING };

/* ---- TLS ---- */

static void tls_error(char *error, size_t size, const char *what, const char *file)
{
    char text[160] = "no reason given";
    unsigned long e = ERR_get_error();

    if (e)
        ERR_error_string_n(e, text, sizeof(text));
    snprintf(error, size, "%s%s%s: %s", what, *file ? " " : "", file, text);
    ERR_clear_error();
}

SSL_CTX *redis_tls_context(const struct fk_redis_params *p, char *error, size_t size)
{
    SSL_CTX *ctx = SSL_CTX_new(TLS_client_method());

    if (!ctx) {
        tls_error(error, size, "TLS", "");
        return NULL;
    }
    SSL_CTX_set_min_proto_version(ctx, TLS1_2_VERSION);
    SSL_CTX_set_verify(ctx, SSL_VERIFY_PEER, NULL);
    SSL_CTX_set_mode(ctx, SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER);
    const char *key = *p->tls_key ? p->tls_key : p->tls_cert;
    if (*p->tls_ca ? !SSL_CTX_load_verify_locations(ctx, p->tls_ca, NULL)
                   : !SSL_CTX_set_default_verify_paths(ctx))
        tls_error(error, size, "redis_tls_ca", p->tls_ca);
    else if (*p->tls_cert && SSL_CTX_use_certificate_chain_file(ctx, p->tls_cert) != 1)
        tls_error(error, size, "redis_tls_cert", p->tls_cert);
    else if (*p->tls_cert && SSL_CTX_use_PrivateKey_file(ctx, key, SSL_FILETYPE_PEM) != 1)
        tls_error(error, size, "redis_tls_key", key);
    else
        return ctx;
    SSL_CTX_free(ctx);
    return NULL;
}

static int tls_start(struct redis_conn *c, const struct fk_redis_params *p, SSL_CTX *tls)
{
    unsigned char address[sizeof(struct in6_addr)];

    c->ssl = SSL_new(tls);
    if (!c->ssl || !SSL_set_fd(c->ssl, c->fd))
        return -ENOMEM;
    SSL_set_connect_state(c->ssl);
    bool numeric = inet_pton(AF_INET, p->host, address) == 1 || inet_pton(AF_INET6, p->host, address) == 1;
    if (numeric)
        return X509_VERIFY_PARAM_set1_ip_asc(SSL_get0_param(c->ssl), p->host) ? 0 : -EINVAL;
    SSL_set_tlsext_host_name(c->ssl, p->host);
    return SSL_set1_host(c->ssl, p->host) ? 0 : -EINVAL;
}

/* ---- opening and closing ---- */

static int connect_unix(struct redis_conn *c, const char *path)
{
    struct sockaddr_un a = { .sun_family = AF_UNIX };

    if (strlen(path) >= sizeof(a.sun_path))
        return -ENAMETOOLONG;
    strcpy(a.sun_path, path);
    c->fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (c->fd < 0)
        return -errno;
    return connect(c->fd, (struct sockaddr *)&a, sizeof(a)) == 0 || errno == EINPROGRESS ? 0 : -errno;
}

static int connect_tcp(struct redis_conn *c, const struct fk_redis_params *p, char *error, size_t size)
{
    struct addrinfo hints = { .ai_socktype = SOCK_STREAM, .ai_flags = AI_NUMERICSERV }, *list;
    char port[8];
    int rc, one = 1;

    snprintf(port, sizeof(port), "%u", p->port);
    rc = getaddrinfo(p->host, port, &hints, &list);
    if (rc) {
        snprintf(error, size, "redis_host %s: %s", p->host, gai_strerror(rc));
        return -EHOSTUNREACH;
    }
    rc = -ECONNREFUSED;
    for (struct addrinfo *a = list; a; a = a->ai_next) {
        c->fd = socket(a->ai_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
        if (c->fd >= 0 && (connect(c->fd, a->ai_addr, a->ai_addrlen) == 0 || errno == EINPROGRESS)) {
            setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
            rc = 0;
            break;
        }
        rc = -errno;
        if (c->fd >= 0)
            close(c->fd);
        c->fd = -1;
    }
    freeaddrinfo(list);
    return rc;
}

int redis_conn_open(struct redis_conn *c, const struct fk_redis_params *p, SSL_CTX *tls,
                    uint64_t now_us, char *error, size_t size)
{
    c->fd = -1;
    *error = '\0';
    int rc = *p->host == '/' ? connect_unix(c, p->host) : connect_tcp(c, p, error, size);
    if (rc == 0 && tls)
        rc = tls_start(c, p, tls);
    if (rc == 0 && !(c->reader = redisReaderCreate()))
        rc = -ENOMEM;
    c->state = RC_CONNECTING;
    c->deadline_us = now_us + p->timeout_us;
    if (rc && !*error)
        snprintf(error, size, "%s:%u: %s", p->host, p->port, strerror(-rc));
    if (rc)
        redis_conn_close(c);
    return rc;
}

void redis_conn_close(struct redis_conn *c)
{
    if (c->ssl)
        SSL_free(c->ssl);
    if (c->reader)
        redisReaderFree(c->reader);
    if (c->fd >= 0)
        close(c->fd);
    fk_vec_free(&c->out);
    *c = (struct redis_conn){ .fd = -1 };
}

short redis_conn_events(const struct redis_conn *c)
{
    bool write = c->state == RC_CONNECTING || c->written < c->out.len ||
                 (c->state == RC_TLS && c->tls_wants_write);

    return (short)(POLLIN | (write ? POLLOUT : 0));
}

/* ---- bytes ---- */

/* >0 bytes, 0 not now, -errno. */
static ssize_t tls_result(struct redis_conn *c, int rc, char *error, size_t size)
{
    if (rc > 0)
        return rc;
    int e = SSL_get_error(c->ssl, rc);
    c->tls_wants_write = e == SSL_ERROR_WANT_WRITE;
    if (e == SSL_ERROR_WANT_READ || e == SSL_ERROR_WANT_WRITE)
        return 0;
    long verify = SSL_get_verify_result(c->ssl);
    if (verify != X509_V_OK)
        snprintf(error, size, "its certificate is not accepted: %s (redis_tls_ca says whom to trust)",
                 X509_verify_cert_error_string(verify));
    else
        tls_error(error, size, "TLS", "");
    ERR_clear_error();
    return -ECONNRESET;
}

static ssize_t conn_read(struct redis_conn *c, void *buf, size_t bytes, char *error, size_t size)
{
    if (c->ssl)
        return tls_result(c, SSL_read(c->ssl, buf, (int)bytes), error, size);
    ssize_t n = recv(c->fd, buf, bytes, 0);
    if (n == 0) {
        snprintf(error, size, "it closed the connection");
        return -ECONNRESET;
    }
    return n > 0 ? n : errno == EAGAIN || errno == EINTR ? 0 : -errno;
}

static int conn_flush(struct redis_conn *c, char *error, size_t size)
{
    while (c->written < c->out.len) {
        const char *at = c->out.data + c->written;
        size_t left = fk_min(c->out.len - c->written, (size_t)1 << 20);
        ssize_t n = c->ssl ? tls_result(c, SSL_write(c->ssl, at, (int)left), error, size)
                           : send(c->fd, at, left, MSG_NOSIGNAL);
        if (!c->ssl && n < 0)
            n = errno == EAGAIN || errno == EINTR ? 0 : -errno;
        if (n <= 0)
            return (int)n;
        c->written += (size_t)n;
    }
    c->out.len = c->written = 0;
    return 0;
}

int redis_conn_send(struct redis_conn *c, const char *words, const uint32_t *ends, uint32_t n)
{
    char head[32];
    int rc = fk_bytes_add(&c->out, head, (size_t)snprintf(head, sizeof(head), "*%u\r\n", n));

    for (uint32_t i = 0, start = 0; i < n && !rc; start = ends[i++]) {
        rc = fk_bytes_add(&c->out, head, (size_t)snprintf(head, sizeof(head), "$%u\r\n", ends[i] - start));
        rc = rc ? rc : fk_bytes_add(&c->out, words + start, ends[i] - start);
        rc = rc ? rc : fk_bytes_add(&c->out, "\r\n", 2);
    }
    return rc;
}

/* ---- login ---- */

static void send_words(struct redis_conn *c, const char *const *words, uint32_t n)
{
    fk_bytes all = { 0 };
    uint32_t ends[4];

    for (uint32_t i = 0; i < n; i++) {
        fk_bytes_add(&all, words[i], strlen(words[i]));
        ends[i] = (uint32_t)all.len;
    }
    redis_conn_send(c, all.data, ends, n);
    if (all.data)
        OPENSSL_cleanse(all.data, all.len);
    fk_vec_free(&all);
}

static void send_login(struct redis_conn *c, const struct fk_redis_params *p)
{
    char db[16];

    c->login_left = 0;
    if (*p->password && *p->user)
        send_words(c, (const char *[]){ "AUTH", p->user, p->password }, 3);
    else if (*p->password)
        send_words(c, (const char *[]){ "AUTH", p->password }, 2);
    if (*p->password)
        c->login_step[c->login_left++] = LOGIN_AUTH;
    if (p->db) {
        snprintf(db, sizeof(db), "%u", p->db);
        send_words(c, (const char *[]){ "SELECT", db }, 2);
        c->login_step[c->login_left++] = LOGIN_SELECT;
    }
    send_words(c, (const char *[]){ "PING" }, 1);
    c->login_step[c->login_left++] = LOGIN_PING;
    c->state = RC_LOGIN;
}

static int login_answer(struct redis_conn *c, const redisReply *r, char *error, size_t size)
{
    static const char *const hints[] = {
        [LOGIN_AUTH] = "check redis_password and redis_user",
        [LOGIN_SELECT] = "check redis_db, and what redis_user may do",
        [LOGIN_PING] = "set redis_password (and redis_user)",
    };
    unsigned step = c->login_step[0];

    memmove(c->login_step, c->login_step + 1, sizeof(c->login_step) - sizeof(c->login_step[0]));
    c->login_left--;
    if (r->type == REDIS_REPLY_ERROR) {
        bool loading = strncmp(r->str, "LOADING", 7) == 0 || strncmp(r->str, "MASTERDOWN", 10) == 0;
        snprintf(error, size, "%s%s%s", r->str, loading ? "" : ": ", loading ? "" : hints[step]);
        return -EACCES;
    }
    if (c->login_left == 0)
        c->state = RC_UP;
    return 0;
}

/* ---- going on ---- */

static int connected(struct redis_conn *c, const struct fk_redis_params *p, char *error, size_t size)
{
    int e = 0;
    socklen_t len = sizeof(e);

    getsockopt(c->fd, SOL_SOCKET, SO_ERROR, &e, &len);
    if (e) {
        snprintf(error, size, "%s:%u: %s", p->host, p->port, strerror(e));
        return -e;
    }
    if (c->ssl)
        c->state = RC_TLS;
    else
        send_login(c, p);
    return 0;
}

static int shake_hands(struct redis_conn *c, const struct fk_redis_params *p, char *error, size_t size)
{
    ssize_t rc = tls_result(c, SSL_do_handshake(c->ssl), error, size);

    if (rc > 0)
        send_login(c, p);
    return rc < 0 ? (int)rc : 0;
}

int redis_conn_answer(struct redis_conn *c, void **reply)
{
    *reply = NULL;
    return redisReaderGetReply(c->reader, reply) == REDIS_OK ? 0 : -EPROTO;
}

static int read_some(struct redis_conn *c, char *error, size_t size)
{
    static __thread char buf[65536];
    ssize_t n;
    int rounds = 0;

    while (rounds++ < 64 && (n = conn_read(c, buf, sizeof(buf), error, size)) != 0) {
        if (n < 0)
            return (int)n;
        if (c->reader->len > IN_MAX || redisReaderFeed(c->reader, buf, (size_t)n) != REDIS_OK) {
            snprintf(error, size, "it answers more than it was asked for");
            return -EPROTO;
        }
    }
    return 0;
}

int redis_conn_step(struct redis_conn *c, const struct fk_redis_params *p, short events, char *error,
                    size_t size)
{
    int rc = 0;

    *error = '\0';
    if (c->state == RC_CONNECTING && (events & (POLLOUT | POLLERR | POLLHUP)))
        rc = connected(c, p, error, size);
    if (rc == 0 && c->state == RC_TLS)
        rc = shake_hands(c, p, error, size);
    if (rc == 0 && c->state >= RC_LOGIN)
        rc = conn_flush(c, error, size);
    if (rc == 0 && c->state >= RC_LOGIN && (events & (POLLIN | POLLERR | POLLHUP)))
        rc = read_some(c, error, size);
    while (rc == 0 && c->state == RC_LOGIN) {
        void *reply;
        rc = redis_conn_answer(c, &reply);
        if (rc || !reply)
            break;
        rc = login_answer(c, reply, error, size);
        freeReplyObject(reply);
    }
    if (rc && !*error)
        snprintf(error, size, "%s:%u: %s", p->host, p->port, strerror(-rc));
    return rc;
}
