/*
 * zmq_api.h - the part of ZeroMQ that FlexKV uses, found at run time: libzmq is needed neither to
 * build nor to start, only where events go over the network. Names, signatures and numbers as in
 * the manual of libzmq 4.2 (zmq_socket(3), zmq_setsockopt(3)); later versions keep them.
 *
 * Once loaded it stays. A context may be used by all threads, a socket by one.
 */
#ifndef FK_EVENTS_ZMQ_API_H
#define FK_EVENTS_ZMQ_API_H

#include <stddef.h>
#include <stdint.h>

#define FK_ZMQ_LIBRARY "libzmq.so.5"

enum {
    ZMQ_PUB = 1, ZMQ_SUB = 2, ZMQ_DEALER = 5, ZMQ_ROUTER = 6, ZMQ_XPUB = 9,
    ZMQ_SUBSCRIBE = 6, ZMQ_FD = 14, ZMQ_LINGER = 17, ZMQ_RECONNECT_IVL = 18, ZMQ_RECONNECT_IVL_MAX = 21,
    ZMQ_MAXMSGSIZE = 22, ZMQ_SNDHWM = 23, ZMQ_RCVHWM = 24, ZMQ_LAST_ENDPOINT = 32,
    ZMQ_ROUTER_MANDATORY = 33, ZMQ_TCP_KEEPALIVE = 34, ZMQ_XPUB_VERBOSE = 40, ZMQ_IPV6 = 42,
    ZMQ_XPUB_NODROP = 69,
    ZMQ_DONTWAIT = 1, ZMQ_SNDMORE = 2,
    ZMQ_POLLIN = 1, ZMQ_POLLOUT = 2,
};

typedef struct zmq_msg { _Alignas(void *) unsigned char opaque[64]; } zmq_msg;
typedef struct zmq_item { void *socket; int fd; short events, revents; } zmq_item;

struct fk_zmq {
    void (*version)(int *major, int *minor, int *patch);
    int (*error)(void);
    const char *(*strerror)(int error);
    void *(*ctx_new)(void);
    int (*ctx_term)(void *ctx);
    void *(*socket)(void *ctx, int type);
    int (*close)(void *socket);
    int (*setsockopt)(void *socket, int option, const void *value, size_t bytes);
    int (*getsockopt)(void *socket, int option, void *value, size_t *bytes);
    int (*bind)(void *socket, const char *endpoint);
    int (*connect)(void *socket, const char *endpoint);
    int (*msg_init)(zmq_msg *msg);
    int (*msg_init_size)(zmq_msg *msg, size_t bytes);
    int (*msg_init_data)(zmq_msg *msg, void *data, size_t bytes, void (*unref)(void *, void *),
                         void *hint);
    void *(*msg_data)(zmq_msg *msg);
    size_t (*msg_size)(const zmq_msg *msg);
    int (*msg_more)(const zmq_msg *msg);
    int (*msg_send)(zmq_msg *msg, void *socket, int flags);
    int (*msg_recv)(zmq_msg *msg, void *socket, int flags);
    int (*msg_close)(zmq_msg *msg);
    int (*poll)(zmq_item *items, int n, long timeout_ms);
};

/* path NULL or "": libzmq.so.5, wherever the loader finds it. -ENOENT and a message that says what
 * to install or set; setting is the option that gives the path. The first library that was loaded
 * serves the whole process. */
int fk_zmq_load(const char *path, const char *setting, const struct fk_zmq **out, char *error,
                size_t error_bytes);

static inline int fk_zmq_set_int(const struct fk_zmq *zmq, void *socket, int option, int value)
{
    return zmq->setsockopt(socket, option, &value, sizeof(value));
}

#endif
