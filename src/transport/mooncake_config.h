/* mooncake_config.h - the JSON file that mooncake_config_path names, as the reference's users have it. Any thread. */
#ifndef FK_TRANSPORT_MOONCAKE_CONFIG_H
#define FK_TRANSPORT_MOONCAKE_CONFIG_H

#include <stdbool.h>
#include <stddef.h>

struct fk_mooncake_config {             /* for fk_transport_params */
    char listen[80];                    /* engine_ip:engine_port */
    char metadata[192];                 /* "P2PHANDSHAKE" or the server's URL */
    bool redis;                         /* the file names a Redis for metadata: FlexKV's nodes need none, as they tell each
                                           other where they are; Mooncake's engines reach them by P2PHANDSHAKE */
};

/* 0; -EINVAL; -ENOTSUP: what FlexKV does not speak with Mooncake (rdma, redis, etcd). error: one line. */
int fk_mooncake_config_load(const char *path, struct fk_mooncake_config *out, char *error, size_t error_bytes);

#endif
