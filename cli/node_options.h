/*
 * node_options.h - what serve, status and top have in common: the configuration (usual sources,
 * --config, --set) and the daemon's address. They complain on stderr in the command's name.
 */
#ifndef FK_CLI_NODE_OPTIONS_H
#define FK_CLI_NODE_OPTIONS_H

#include "flexkv/flexkv.h"

#define NODE_ADDRESS_BYTES 256

struct node_options {
    const char *command;          /* as in "flexkv serve" */
    const char *file;             /* --config; NULL: as FLEXKV_CONFIG_PATH says */
    char **sets;                  /* --set KEY=VALUE */
    int n_sets;
    const char *address;          /* NULL: option server_recv_port */
};

/* Exit status: 0, 1 bad configuration, 2 bad usage. The config is to be destroyed by the caller. */
int node_options_load(const struct node_options *o, flexkv_config **config,
                      char address[NODE_ADDRESS_BYTES]);

#endif
