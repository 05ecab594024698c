/*
 * redis_conn.h - one connection to Redis that never blocks: socket, TLS (OpenSSL), login, hiredis' reader for
 * the answers. hiredis' own connections are not used: they have neither TLS (in Debian's) nor deadlines
 * for everything. Touches its socket; the Redis thread (redis.c) alone calls it.
 */
#ifndef FK_CLUSTER_REDIS_CONN_H
#define FK_CLUSTER_REDIS_CONN_H

#include <openssl/ssl.h>

#include "cluster/cluster.h"
#include "cluster/redis.h"

enum redis_state { RC_DOWN, RC_CONNECTING, RC_TLS, RC_LOGIN, RC_UP };

struct redis_conn {
    enum redis_state state;
    int fd;
    SSL *ssl;
    bool tls_wants_write;
    struct redisReader *reader;
    fk_bytes out;                       /* to be written from `written` on */
    size_t written;
    unsigned login_left;                /* answers still expected to what login sent */
    unsigned login_step[4];
    uint64_t deadline_us;               /* of connecting and login */
};

/* Starts connecting. -errno and *error, a sentence for the log. */
int redis_conn_open(struct redis_conn *c, const struct fk_redis_params *p, SSL_CTX *tls,
                    uint64_t now_us, char *error, size_t size);
void redis_conn_close(struct redis_conn *c);
/* poll(2) events that it waits for. */
short redis_conn_events(const struct redis_conn *c);
/* Goes on as far as it can. 0; -errno and *error when it is over. */
int redis_conn_step(struct redis_conn *c, const struct fk_redis_params *p, short events, char *error,
                    size_t size);
/* Appends a command. 0 or -ENOMEM. */
int redis_conn_send(struct redis_conn *c, const char *words, const uint32_t *ends, uint32_t n);
/* The next answer (freeReplyObject), NULL when there is none. -EPROTO. */
int redis_conn_answer(struct redis_conn *c, void **reply);

SSL_CTX *redis_tls_context(const struct fk_redis_params *p, char *error, size_t size);

#endif
