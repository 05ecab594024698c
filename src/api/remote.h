/* remote.h - private to src/api: a node's part in a store that nodes share. See remote.c. */
#ifndef FK_API_REMOTE_H
#define FK_API_REMOTE_H

#include "api/node_impl.h"
#include "depot/depot.h"

struct fk_node_store {
    struct fk_node *node;
    struct fk_store *store;
    struct fk_depot *depot;             /* under node->lock */
    uint64_t timeout_us;

    pthread_t thread;
    pthread_mutex_t wake_lock;
    pthread_cond_t wake;
    bool signalled, stop;               /* under wake_lock */
};

#endif
