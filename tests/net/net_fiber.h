/*
 * net_fiber.h - threads of a simulated node: src/store has some of its own. Each is a fiber, so there is one real thread and
 * every interleaving comes from the seed. The linker puts __wrap_X where pthread_create, pthread_cond_* and clock_gettime
 * are called; mutexes are the real ones, and nobody ever waits for one: a fiber gives up its turn where it waits for a condition
 * or sleeps, and nowhere else.
 */
#ifndef NET_FIBER_H
#define NET_FIBER_H

#include "net.h"

/* From now on (NULL: no more) threads that are made are this node's, the clock is its clock, and a wait for a condition lets its
 * fibers go on, however long they sleep. */
void net_fibers_of(struct net_node *p);
/* All that can go on now, in any order, until none can. */
void net_fibers_run(struct net_world *w, struct net_node *p);
uint64_t net_fibers_next(struct net_world *w, const struct net_node *p);        /* real */
void net_fibers_kill(struct net_node *p);
/* All are quick from here: whoever sleeps wakes up within so long. */
void net_fibers_hurry(struct net_world *w, struct net_node *p, uint64_t us);

/* In a fiber: whose it is; a system call that takes so long. */
struct net_node *net_fiber_node(void);
void net_fiber_sleep(uint64_t us);

#endif
