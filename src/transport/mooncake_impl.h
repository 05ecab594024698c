/*
 * mooncake_impl.h - the parts of the mooncake transport: the reader's lanes (mooncake.c), the owner's connections
 * (mooncake_serve.c), the metadata server (mooncake_meta.c). The transport's thread, but for publishing.
 */
#ifndef FK_TRANSPORT_MOONCAKE_IMPL_H
#define FK_TRANSPORT_MOONCAKE_IMPL_H

#include "transport/endpoint.h"
#include "transport/mooncake_wire.h"
#include "transport/stream.h"

struct fk_moon_server;                  /* one connection of somebody else's */
struct fk_moon_lane;                    /* the connection to a peer */

struct fk_mooncake {
    struct fk_transport *t;
    char name[FK_TRANSPORT_ADDRESS_MAX];        /* of our segment */
    char host[64];                      /* of the data port */
    uint16_t data_port;
    char meta_host[FK_TRANSPORT_ADDRESS_MAX], meta_path[128];   /* http; empty: P2PHANDSHAKE */
    struct fk_watch handshake, data;    /* listening; fd -1: nobody reads from this node */
    struct fk_moon_server *servers;
    struct fk_moon_lane *lanes;
    uint32_t n_servers;
    struct fk_window windows[FK_MOON_WINDOWS];  /* under the transport's lock; grows only */
    uint32_t n_windows;
    struct fk_moon_engine *engine;      /* mooncake_engine.c reads; NULL: lanes do */
    bool published;                     /* callers' threads, one at a time: open, then share */
};

/* Our segment's descriptor; malloc'd. */
char *fk_moon_own_segment(struct fk_mooncake *m);
/* The message that carries it, which asks and which answers, goes to what the stream has to send. */
int fk_moon_put_segment(struct fk_mooncake *m, struct fk_stream *stream);

int fk_moon_listen(struct fk_mooncake *m, const char *address, char *error, size_t bytes);
void fk_moon_server_close(struct fk_mooncake *m, struct fk_moon_server *s);
uint64_t fk_moon_serve_tick(struct fk_mooncake *m, uint64_t now);

/* At the metadata server, waiting at most the transport's timeout. */
int fk_moon_publish(struct fk_mooncake *m);
void fk_moon_unpublish(struct fk_mooncake *m);

#endif
