/* sharing.h - private to src/api: a node's part in a cluster. See sharing.c. */
#ifndef FK_API_SHARING_H
#define FK_API_SHARING_H

#include "api/node_impl.h"
#include "cluster/redis.h"
#include "peer/peer.h"

struct fk_sharing {
    struct fk_node *node;
    struct fk_transport *transport;
    struct fk_cluster *cluster;
    pthread_mutex_t cluster_lock;
    struct fk_redis *redis;
    struct fk_peers *peers;
    char name[FK_CLUSTER_NAME_MAX];
    pthread_t thread;                   /* the transport's, once it has had a turn; under the node's lock, as */
    bool has_thread, signalled;         /* are these */
};

/* How Redis is reached, as configured. */
void fk_redis_params_from(const struct fk_settings *set, struct fk_redis_params *out);

#endif
