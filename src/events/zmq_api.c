/* zmq_api.c - see zmq_api.h. */
#include "events/zmq_api.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>

#include "base/util.h"

#define LEAST_MAJOR 4
#define LEAST_MINOR 2

static struct fk_zmq zmq;
static bool ready;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

struct symbol { const char *name; size_t at; };
#define SYMBOL(field, name) { name, offsetof(struct fk_zmq, field) }

static const struct symbol symbols[] = {
    SYMBOL(version, "zmq_version"), SYMBOL(error, "zmq_errno"), SYMBOL(strerror, "zmq_strerror"),
    SYMBOL(ctx_new, "zmq_ctx_new"), SYMBOL(ctx_term, "zmq_ctx_term"),
    SYMBOL(socket, "zmq_socket"), SYMBOL(close, "zmq_close"),
    SYMBOL(setsockopt, "zmq_setsockopt"), SYMBOL(getsockopt, "zmq_getsockopt"),
    SYMBOL(bind, "zmq_bind"), SYMBOL(connect, "zmq_connect"), SYMBOL(msg_init, "zmq_msg_init"),
    SYMBOL(msg_init_size, "zmq_msg_init_size"), SYMBOL(msg_init_data, "zmq_msg_init_data"),
    SYMBOL(msg_data, "zmq_msg_data"), SYMBOL(msg_size, "zmq_msg_size"),
    SYMBOL(msg_more, "zmq_msg_more"), SYMBOL(msg_send, "zmq_msg_send"),
    SYMBOL(msg_recv, "zmq_msg_recv"), SYMBOL(msg_close, "zmq_msg_close"),
    SYMBOL(poll, "zmq_poll"),
};

static int find_symbols(void *library, const char *name, char *error, size_t error_bytes)
{
    int major = 0, minor = 0, patch = 0;

    for (size_t i = 0; i < fk_array_size(symbols); i++) {
        void *p = dlsym(library, symbols[i].name);
        if (!p) {
            snprintf(error, error_bytes, "%s has no %s: it is no ZeroMQ library", name,
                     symbols[i].name);
            return -ENOENT;
        }
        memcpy((char *)&zmq + symbols[i].at, &p, sizeof(p));
    }
    zmq.version(&major, &minor, &patch);
    if (major > LEAST_MAJOR || (major == LEAST_MAJOR && minor >= LEAST_MINOR))
        return 0;
    snprintf(error, error_bytes, "%s is ZeroMQ %d.%d.%d; %d.%d or later is needed", name, major,
             minor, patch, LEAST_MAJOR, LEAST_MINOR);
    return -ENOENT;
}

static int load(const char *path, const char *setting, char *error, size_t error_bytes)
{
    const char *name = path && *path ? path : FK_ZMQ_LIBRARY;
    void *library = dlopen(name, RTLD_NOW | RTLD_LOCAL);

    if (!library) {
        snprintf(error, error_bytes, "KV events need ZeroMQ, and %s cannot be loaded (%s): install "
                 "libzmq5 (zeromq), or set %s to the path of a libzmq, as the one that pyzmq "
                 "brings in pyzmq.libs", name, dlerror(), setting);
        return -ENOENT;
    }
    int rc = find_symbols(library, name, error, error_bytes);
    if (rc)
        dlclose(library);
    return rc;
}

int fk_zmq_load(const char *path, const char *setting, const struct fk_zmq **out, char *error,
                size_t error_bytes)
{
    int rc = 0;

    pthread_mutex_lock(&lock);
    if (!ready)
        rc = load(path, setting, error, error_bytes);
    ready = ready || !rc;
    pthread_mutex_unlock(&lock);
    if (!rc)
        *out = &zmq;
    return rc;
}
