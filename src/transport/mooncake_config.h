/* mooncake_config.h - the JSON file that mooncake_config_path names, as the reference's users have it. Any thread. */
#ifndef FK_TRANSPORT_MOONCAKE_CONFIG_H
#define FK_TRANSPORT_MOONCAKE_CONFIG_H

#include <stddef.h>

struct fk_mooncake_config {             /* for fk_transport_params */
    char listen[80];                    /* engine_ip:engine_port */
    char metadata[192];                 /* "P2PHANDSHAKE" or the server's URL */
};

/* 0; -EINVAL; -ENOTSUP: what FlexKV does not speak with Mooncake (rdma, redis, etcd). error: one line. */
int fk_mooncake_config_load(const char *path, struct fk_mooncake_config *out, char *error, size_t error_bytes);

#endif
