/*
 * agents.h - the mover (members.h) over libraries whose *agents* own connections and registered memory, write from one into
 * another's memory, and have nothing to wait for: NIXL (nixl.c).
 *
 *   channel   has an agent of its own on each side: destroying it is the only way to make sure that nothing is read
 *             or written any more. The reader's says in a frame (MEMORY) who it is and which memory may be written to: all
 *             that was registered. When more is registered, new reads take a new channel
 *   answer    follows the write: the library says that it is done when all bytes are in the reader's memory
 *
 * While writes are under way the owner's thread looks every POLL_US. All in the transport's thread.
 */
#ifndef FK_TRANSPORT_AGENTS_H
#define FK_TRANSPORT_AGENTS_H

#include "transport/members.h"

struct fk_memory { void *base; size_t bytes; };

struct fk_agents;

struct fk_agent_ops {
    const char *library;                /* for people */
    /* number: of no other agent of this transport. 0 or -errno (said in the log). */
    int (*open)(struct fk_agents *s, bool reader, uint64_t number, void **agent);
    void (*close)(void *agent);         /* nothing is read or written for its sake any more */
    int (*add)(void *agent, const struct fk_memory *m);
    int (*describe)(void *agent, void **data, size_t *bytes);   /* malloc'd: who it is and what it registered */
    int (*peer)(void *agent, const void *data, size_t bytes);   /* whom it writes to from now on: once */
    /* 0: *transfer is under way; -EINVAL: not taken; -EIO: the peer is lost. Both ends must lie in registered memory. */
    int (*write)(void *agent, const void *data, size_t bytes, uint64_t to, void **transfer);
    /* 0: all bytes are in the peer's memory; -EINPROGRESS; -EIO: the peer is lost. */
    int (*done)(void *agent, void *transfer);
    void (*forget)(void *agent, void *transfer);    /* ended or not: the agent is closed before its memory is used again */
};

struct fk_agents {                      /* t->priv begins with it */
    struct fk_members m;
    const struct fk_agent_ops *ops;
    uint64_t n_agents;                  /* ever */
    FK_VEC(struct fk_memory) memory, new_memory;        /* new: under the transport's lock */
};

extern const struct fk_mover fk_agents_mover;

void fk_agents_close(struct fk_agents *s);
/* For struct fk_transport_ops. */
int fk_agents_region(struct fk_transport *t, void *base, size_t bytes);
void fk_agents_pump(struct fk_transport *t, struct fk_peer *p);
uint64_t fk_agents_tick(struct fk_transport *t, uint64_t now);

#endif
