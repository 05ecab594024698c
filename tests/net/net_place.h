/*
 * net_place.h - the place that the nodes of a simulated cluster share: a store's backend (src/store/backend.h) that keeps
 * its files in memory and takes simulated time. It behaves as a directory on a network file system does: a file gets its
 * name when all of it is written, who has opened it can go on reading what somebody has removed, a reset puts all names aside at
 * once, what a killed writer leaves is in the way of nobody and goes by and by.
 */
#ifndef NET_PLACE_H
#define NET_PLACE_H

#include "net.h"
#include "store/backend.h"

struct net_file {
    struct fk_key key;
    uint32_t index;                     /* of the key */
    uint32_t refs;                      /* its name, and who has it open */
    uint64_t born;                      /* the place's serial when it got its name */
    uint64_t written_us, used_us, checksum;
    uint32_t home;                      /* that wrote it */
    uint8_t bytes[NET_BYTES];
};

struct net_temp { uint64_t id, begun_us, bytes_sum; uint32_t type, generation; };

struct net_shelf {                      /* of a model */
    FK_VEC(struct net_file *) files;
    uint32_t generation;                /* of the directory: grows with each reset */
    uint64_t changed[FK_STORE_PARTS];
};

struct net_place {
    bool there;                         /* this world has one */
    uint64_t serial, temp_serial, capacity_bytes, scan_us, slow_us, timeout_us;
    uint32_t fault_ppk;
    struct net_shelf shelf[NET_TYPES];
    FK_VEC(struct net_temp) temps;
    struct net_node *evicts;            /* who holds the lock */
    uint64_t full_until_us, gone_until_us[NET_HOMES], hangs_until_us[NET_HOMES];
    /* Counts that excuse a get: what it was promised may be gone. */
    uint64_t lost;
};

extern const struct fk_store_backend net_backend;

void net_place_draw(struct net_world *w);
void net_place_free(struct net_world *w);
void net_place_fault(struct net_world *w);
void net_place_power_loss(struct net_world *w, uint32_t home);
void net_place_quiet(struct net_world *w);
bool net_place_has(const struct net_world *w, uint32_t type, struct fk_key key);
uint64_t net_place_bytes(const struct net_world *w);

#endif
