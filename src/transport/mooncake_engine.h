/*
 * mooncake_engine.h - Mooncake's transfer engine as a library of the user's own (libtransfer_engine.so, its C interface),
 * loaded at run time: the mooncake transport reads through it instead of over its own sockets, by whatever way the
 * engine knows to the segment (tcp, rdma). The owner's side stays mooncake_serve.c, which checks what it gives.
 *
 * The engine's calls may block (they connect, and ask others), so each peer has a thread that makes them. The reads'
 * deadlines are the transport's as ever: a buffer that the engine still writes to is in quarantine until it says that it
 * is done, which may take its 30 seconds.
 */
#ifndef FK_TRANSPORT_MOONCAKE_ENGINE_H
#define FK_TRANSPORT_MOONCAKE_ENGINE_H

#include "transport/endpoint.h"

struct fk_mooncake;
struct fk_moon_engine;

/* 0 or -errno with a line in error. */
int fk_moon_engine_open(struct fk_mooncake *m, const struct fk_transport_params *p, char *error, size_t bytes);
/* Nothing is written to any more after it. */
void fk_moon_engine_close(struct fk_mooncake *m);
int fk_moon_engine_region(struct fk_mooncake *m, void *base, size_t bytes);

/* As in struct fk_transport_ops. */
void fk_moon_engine_pump(struct fk_mooncake *m, struct fk_peer *p);
bool fk_moon_engine_drop(struct fk_mooncake *m, struct fk_peer *p);
void fk_moon_engine_tick(struct fk_mooncake *m);

#endif
