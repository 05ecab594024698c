/* cluster_options.h - how `flexkv cluster` finds Redis: the same options as a node, and --redis. */
#ifndef FK_CLI_CLUSTER_OPTIONS_H
#define FK_CLI_CLUSTER_OPTIONS_H

#include "cluster/redis.h"
#include "config/config.h"

struct cluster_options {
    const char *file, *redis;           /* --config, --redis */
    char *sets[64];                     /* --set KEY=VALUE */
    int n_sets;
};

/* 0, or the exit status after a message. The config must outlive the parameters. */
int cluster_options_load(const struct cluster_options *o, struct fk_config **config,
                         struct fk_redis_params *redis);

int cluster_bench(const struct fk_redis_params *redis, uint32_t nodes, uint32_t rate,
                  uint32_t seconds, bool json);

#endif
