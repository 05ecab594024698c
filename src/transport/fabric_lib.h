/*
 * fabric_lib.h - libfabric, loaded at run time: neither the library nor the wheel needs it to be installed. Its
 * fi_* calls are inline functions over tables in the objects; only these few are symbols.
 */
#ifndef FK_TRANSPORT_FABRIC_LIB_H
#define FK_TRANSPORT_FABRIC_LIB_H

#include <rdma/fabric.h>
#include <rdma/fi_cm.h>
#include <rdma/fi_domain.h>
#include <rdma/fi_endpoint.h>
#include <rdma/fi_errno.h>
#include <rdma/fi_rma.h>

#include "base/util.h"

struct fk_fabric_lib {
    int (*getinfo)(uint32_t version, const char *node, const char *service, uint64_t flags,
                   const struct fi_info *hints, struct fi_info **info);
    void (*freeinfo)(struct fi_info *info);
    struct fi_info *(*dupinfo)(const struct fi_info *info);
    int (*fabric)(struct fi_fabric_attr *attr, struct fid_fabric **fabric, void *context);
    const char *(*strerror)(int errnum);
    uint32_t (*version)(void);
};

/* The library, or NULL: it is not installed (said once in the log). Any thread. */
const struct fk_fabric_lib *fk_fabric_lib(void);

/* One side of a channel: an endpoint that talks to one other, so that closing it makes sure that nothing writes
 * to our memory any more for this peer. The thread of its transport. */
struct fk_fabric {                  /* what all channels of a transport share */
    const struct fk_fabric_lib *lib;
    struct fi_info *info;
    struct fid_fabric *fabric;
    struct fid_domain *domain;
    struct fk_fabric_region { void *base; size_t bytes; struct fid_mr *mr; } *regions;
    size_t n_regions, cap_regions;
    uint64_t keys[64];                  /* random, not yet used */
    uint32_t n_keys;
};

#define FK_FABRIC_NOTICES 48

struct fk_fabric_notice { uint64_t id, key; };  /* this read's bytes are there; its key proves that the owner says it */

struct fk_fabric_ep {
    struct fid_ep *ep;
    struct fid_cq *cq;
    struct fid_av *av;
    fi_addr_t peer;
    int cq_fd;
    struct fk_fabric_notice *notices;   /* reader: where they are received */
};

/* "IP" whose interface is used, NULL: the provider's choice. */
int fk_fabric_open(struct fk_fabric *f, const char *provider, const char *source, char *error, size_t bytes);
void fk_fabric_close(struct fk_fabric *f);
/* Local memory that is written from, where the provider wants it registered. */
int fk_fabric_region(struct fk_fabric *f, void *base, size_t bytes);
void *fk_fabric_desc(struct fk_fabric *f, const void *data, size_t bytes);

int fk_fabric_ep_open(struct fk_fabric *f, struct fk_fabric_ep *e);
void fk_fabric_ep_close(struct fk_fabric_ep *e);
int fk_fabric_ep_name(struct fk_fabric_ep *e, void *name, uint32_t *bytes);
int fk_fabric_ep_peer(struct fk_fabric *f, struct fk_fabric_ep *e, const void *name, uint32_t bytes);

/* A key for one read: the peer may write these bytes until the key is closed. */
int fk_fabric_expose(struct fk_fabric *f, void *buffer, size_t bytes, struct fid_mr **mr, uint64_t *key,
                     uint64_t *address);

/* Reader: ready for notices. */
int fk_fabric_ep_listen(struct fk_fabric_ep *e);

/* Writes to the peer's memory. A completion with this context says that the data may change again. -EAGAIN: try again.
 * own: NULL at first; what it is after the write has ended is to be closed. */
int fk_fabric_write(struct fk_fabric *f, struct fk_fabric_ep *e, const void *data, size_t bytes, uint64_t key,
                    uint64_t address, struct fid_mr **own, void *context);
/* The peer gets it when all that was written before is in his memory (send after write). -EAGAIN: try again. */
int fk_fabric_notify(struct fk_fabric_ep *e, const struct fk_fabric_notice *n);

struct fk_fabric_event {
    bool arrived;                       /* a notice came */
    struct fk_fabric_notice notice;
    void *context;                      /* else: this write of ours has ended */
    int rc;
};
/* Makes progress. 1: an event; 0: nothing; -errno: the queue is broken. */
int fk_fabric_poll(struct fk_fabric_ep *e, struct fk_fabric_event *out);
bool fk_fabric_may_sleep(struct fk_fabric *f, struct fk_fabric_ep *e);

#endif
