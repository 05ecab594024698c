/* node_options.c - see node_options.h. */
#include "node_options.h"

#include <stdio.h>

#include "base/util.h"

static int complain(const struct node_options *o, const char *what)
{
    fprintf(stderr, "%s: %s%s\n", o->command, what, flexkv_last_error());
    return 1;
}

static int apply_set(const struct node_options *o, flexkv_config *config, const char *set)
{
    const char *value = strchr(set, '=');
    fk_autofree char *key = value ? strndup(set, (size_t)(value - set)) : NULL;

    if (!key) {
        fprintf(stderr, "%s: --set %s: KEY=VALUE is wanted\n", o->command, set);
        return 2;
    }
    return flexkv_config_set(config, key, value + 1) ? complain(o, "--set: ") : 0;
}

static int load(const struct node_options *o, flexkv_config *config)
{
    int rc = 0;

    if (o->file && flexkv_config_set(config, "config_path", o->file))
        return complain(o, "--config: ");
    for (int i = 0; i < o->n_sets && !rc; i++)
        rc = apply_set(o, config, o->sets[i]);
    if (!rc && flexkv_config_load_default(config))
        rc = complain(o, "");
    return rc;
}

static int find_address(const struct node_options *o, flexkv_config *config,
                        char address[NODE_ADDRESS_BYTES])
{
    int len = o->address ? snprintf(address, NODE_ADDRESS_BYTES, "%s", o->address)
                         : flexkv_config_get(config, "server_recv_port", address,
                                             NODE_ADDRESS_BYTES);

    if (len < 0)
        return complain(o, "");
    if (len == 0 || len >= NODE_ADDRESS_BYTES) {
        fprintf(stderr, "%s: the address is %s; ipc://PATH is wanted%s\n", o->command,
                len ? "too long" : "empty", o->address ? "" : " (option server_recv_port)");
        return o->address ? 2 : 1;
    }
    return 0;
}

int node_options_load(const struct node_options *o, flexkv_config **config,
                      char address[NODE_ADDRESS_BYTES])
{
    if (flexkv_config_create(config)) {
        *config = NULL;
        return complain(o, "");
    }
    int rc = load(o, *config);
    return rc ? rc : find_address(o, *config, address);
}
