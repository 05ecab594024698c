/*
 * layers.h - layer counters: eventfds of an engine that are told, layer by layer, what a worker's agent
 * has put in place. See layers.c. Callers: agent.c, agent_jobs.c; any thread, also one of a device's
 * driver.
 */
#ifndef FK_API_LAYERS_H
#define FK_API_LAYERS_H

#include <stddef.h>
#include <stdint.h>

#define FK_LAYERS_MAX 253u              /* descriptors in one message of the kernel */
#define FK_LAYER_COUNTERS 16u

struct fk_layers;

/* Listens at the address, in a thread of its own. worker: for the log. */
int fk_layers_open(const char *address, uint32_t n_layers, uint32_t worker, struct fk_layers **out,
                   char *error, size_t error_bytes);
void fk_layers_close(struct fk_layers *l);
/* Layers [from, to) are in place: each eventfd of that counter gets 1. */
void fk_layers_signal(struct fk_layers *l, uint32_t counter, uint32_t from, uint32_t to);
/* What some counter promised does not come. */
void fk_layers_fail(struct fk_layers *l);
/* One engine's handshake on a connected socket: 0, or -errno; the answer is sent. */
int fk_layers_receive(struct fk_layers *l, int fd);

#endif
