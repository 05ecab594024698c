/* main.c - `flexkv`: finds the subcommand. */
#include <stdio.h>
#include <string.h>

#include "base/util.h"
#include "cmd.h"
#include "flexkv/flexkv.h"

static const struct {
    const char *name;
    int (*run)(int argc, char **argv);
    const char *help;
} commands[] = {
    { "serve", cmd_serve, "run a node that engines share: the daemon" },
    { "status", cmd_status, "show what a daemon holds and whom it serves" },
    { "top", cmd_top, "watch a daemon, live" },
    { "replay", cmd_replay, "drive a node with a request trace, check every byte" },
    { "bench", cmd_bench, "measure index, hash, copy and SSD against their limits" },
    { "events", cmd_events, "look at streams of KV events, check, record, merge them" },
    { "cluster", cmd_cluster, "show a cluster's members, measure its Redis" },
    { "config", cmd_config, "show every option's effective value and its source" },
    { "fsck", cmd_fsck, "check and repair an SSD store off line" },
};

static void usage(FILE *out)
{
    fprintf(out, "usage: flexkv COMMAND [OPTION...]\n\ncommands:\n");
    for (size_t i = 0; i < fk_array_size(commands); i++)
        fprintf(out, "  %-8s  %s\n", commands[i].name, commands[i].help);
    fprintf(out, "\n`flexkv COMMAND --help` says more; so do flexkv(1) and flexkv.conf(5).\n");
}

int main(int argc, char **argv)
{
    const char *name = argc > 1 ? argv[1] : "";

    if (!strcmp(name, "--version") || !strcmp(name, "version")) {
        printf("flexkv %s\n", flexkv_version());
        return 0;
    }
    if (!strcmp(name, "--help") || !strcmp(name, "-h") || !strcmp(name, "help")) {
        usage(stdout);
        return 0;
    }
    for (size_t i = 0; i < fk_array_size(commands); i++)
        if (!strcmp(name, commands[i].name))
            return commands[i].run(argc - 1, argv + 1);
    if (*name)
        fprintf(stderr, "flexkv: unknown command \"%s\"\n", name);
    usage(stderr);
    return 2;
}
