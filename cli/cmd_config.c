/*
 * cmd_config.c - `flexkv config`: the value in force of each option and where it came from.
 *
 * Loads the configuration exactly as a node does, and prints it. Also prints the option
 * table itself (--help) and the manual made of it (--man, used by the build).
 * Called by main.c. Exit: 0; 1 bad configuration; 2 bad usage.
 */
#include <errno.h>
#include <getopt.h>
#include <stdio.h>

#include "cmd.h"
#include "config/config.h"

static const char usage[] =
    "Usage: flexkv config [--file FILE] [--json] [KEY...]\n"
    "Prints the value in force of every option (or of each KEY) and its source.\n"
    "\n"
    "  --file FILE  read FILE, not the one that FLEXKV_CONFIG_PATH names\n"
    "  --json       {\"KEY\": {\"value\", \"source\", \"status\", \"unit\"}, ...}; sizes in bytes\n"
    "  --help       this text and all options\n"
    "  --man        the manual flexkv.conf(5), as roff\n"
    "\n";

static int print_config(const char *file, bool json, char **keys, int key_count)
{
    struct fk_config *cfg = NULL;
    int rc = fk_config_create(&cfg);

    if (rc) {
        fprintf(stderr, "flexkv config: out of memory\n");
        return 1;
    }
    if (file)
        rc = fk_config_set(cfg, "config_path", file, "--file");
    if (rc == 0)
        rc = fk_config_load_default(cfg);
    bool loaded = rc == 0;
    if (loaded)
        rc = (json ? fk_config_print_json : fk_config_print_text)(cfg, stdout, keys, key_count);
    if (rc)
        fprintf(stderr, "flexkv config: %s\n", fk_config_error(cfg));
    fk_config_destroy(cfg);
    return rc == 0 ? 0 : loaded && rc == -ENOENT ? 2 : 1;
}

/* A full disk behind the pipe or redirection is a failure too. */
static int flushed(int status)
{
    if (fflush(stdout) == 0 && !ferror(stdout))
        return status;
    perror("flexkv config: stdout");
    return 1;
}

int cmd_config(int argc, char **argv)
{
    static const struct option long_options[] = {
        {"file", required_argument, NULL, 'f'}, {"json", no_argument, NULL, 'j'},
        {"help", no_argument, NULL, 'h'},       {"man", no_argument, NULL, 'm'},
        {NULL, 0, NULL, 0},
    };
    const char *file = NULL;
    bool json = false;
    int c;

    while ((c = getopt_long(argc, argv, "f:jh", long_options, NULL)) != -1) {
        switch (c) {
        case 'f':
            file = optarg;
            break;
        case 'j':
            json = true;
            break;
        case 'h':
            fputs(usage, stdout);
            fk_options_print_help(stdout);
            return flushed(0);
        case 'm':
            fk_options_print_man(stdout);
            return flushed(0);
        default:
            fputs(usage, stderr);
            return 2;
        }
    }
    return flushed(print_config(file, json, argv + optind, argc - optind));
}
