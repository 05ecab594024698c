/*
 * cmd_serve.c - `flexkv serve`: the daemon. Opens a node, serves it at an address, and waits for
 * a signal, or until nobody needs it any more.
 *
 * All threads have the stop signals blocked; the main thread takes them with sigtimedwait, so
 * that none is lost and none interrupts anything else. Called by main.c.
 */
#include <getopt.h>
#include <math.h>
#include <signal.h>
#include <stdio.h>

#include "base/clock.h"
#include "base/log.h"
#include "base/util.h"
#include "cmd.h"
#include "node_options.h"
#include "notify.h"

enum { ADDRESS_IN_USE = 3 };

#define IDLE_LOOK_MS 250
#define GLANCE_MS 1
#define IDLE_MAX_S 1e6

static const char usage[] =
    "usage: flexkv serve [--address ADDR] [--exit-when-idle SECONDS] [--config FILE]\n"
    "                    [--set KEY=VALUE]...\n"
    "\n"
    "Runs a node that engines share, in the foreground, until SIGTERM or SIGINT; the second\n"
    "signal ends it at once. Logs to standard error.\n"
    "\n"
    "  --address ADDR            ipc://PATH or ipc://@NAME; default: option server_recv_port\n"
    "  --exit-when-idle SECONDS  end when the last client has been gone for so long, or when for\n"
    "                            a minute more than that none has come\n"
    "  --config FILE             read FILE, not the one that FLEXKV_CONFIG_PATH names\n"
    "  --set KEY=VALUE           any option of flexkv.conf(5); may be given several times\n"
    "  --help                    this text\n"
    "\n"
    "Exit status: 0 ended by a signal or idle, 1 failed, 2 bad usage, 3 the address is in use.\n";

struct serve_options {
    struct node_options node;
    int idle_ms;                        /* -1: serve for ever */
    bool help;
};

static int parse_idle(const char *text, int *idle_ms)
{
    char *end;
    double seconds = strtod(text, &end);

    if (end == text || *end || !isfinite(seconds) || seconds < 0 || seconds > IDLE_MAX_S) {
        fprintf(stderr, "flexkv serve: --exit-when-idle %s: seconds are wanted, 0 to %.0f\n", text,
                IDLE_MAX_S);
        return 2;
    }
    *idle_ms = (int)(seconds * 1000);
    return 0;
}

static int parse(struct serve_options *o, int argc, char **argv)
{
    static const struct option options[] = {
        { "address", required_argument, NULL, 'a' }, { "config", required_argument, NULL, 'c' },
        { "exit-when-idle", required_argument, NULL, 'i' },
        { "set", required_argument, NULL, 's' }, { "help", no_argument, NULL, 'h' }, { 0 },
    };
    int c, rc = 0;

    optind = 0;
    while (!rc && (c = getopt_long(argc, argv, "h", options, NULL)) != -1) {
        switch (c) {
        case 'a': o->node.address = optarg; break;
        case 'c': o->node.file = optarg; break;
        case 'i': rc = parse_idle(optarg, &o->idle_ms); break;
        case 's': o->node.sets[o->node.n_sets++] = optarg; break;
        case 'h': o->help = true; return 0;
        default: rc = 2;
        }
    }
    if (!rc && optind < argc) {
        fprintf(stderr, "flexkv serve: %s: no such argument\n", argv[optind]);
        rc = 2;
    }
    if (rc)
        fputs(usage, stderr);
    return rc;
}

/* ---- signals ---- */

static sigset_t stop_signals(void)
{
    sigset_t set;

    sigemptyset(&set);
    sigaddset(&set, SIGTERM);
    sigaddset(&set, SIGINT);
    sigaddset(&set, SIGHUP);
    return set;
}

/* Before any thread starts, so that all of them inherit it. */
static void block_signals(void)
{
    sigset_t set = stop_signals();

    signal(SIGPIPE, SIG_IGN);           /* a log that nobody reads any more is no reason to end */
    pthread_sigmask(SIG_BLOCK, &set, NULL);
}

/* From now on a signal does what it does by default: who sends a second one means it. */
static void unblock_signals(void)
{
    sigset_t set = stop_signals();

    pthread_sigmask(SIG_UNBLOCK, &set, NULL);
}

/* The signal, or 0 after timeout_ms (-1: no limit). */
static int wait_signal(int timeout_ms)
{
    struct timespec timeout = { timeout_ms / 1000, timeout_ms % 1000 * 1000000L };
    sigset_t set = stop_signals();
    int sig;

    do
        sig = sigtimedwait(&set, NULL, timeout_ms < 0 ? NULL : &timeout);
    while (sig < 0 && errno == EINTR);
    return sig < 0 ? 0 : sig;
}

/* ---- serving ---- */

static const char *wait_for_end(flexkv_node *node, int idle_ms)
{
    int sig;

    while (!(sig = wait_signal(idle_ms < 0 ? -1 : IDLE_LOOK_MS)))
        if (idle_ms >= 0 && flexkv_node_wait_idle(node, idle_ms, GLANCE_MS) == 1)
            return "no client any more";
    return strsignal(sig);
}

/* "64G", "1000 blocks" or "none". */
static void describe_tier(flexkv_config *config, const char *tier, char *out, size_t bytes)
{
    char key[32], blocks[32] = "", size[32] = "";

    snprintf(key, sizeof(key), "%s_cache_blocks", tier);
    flexkv_config_get(config, key, blocks, sizeof(blocks));
    snprintf(key, sizeof(key), "%s_cache_gb", tier);
    flexkv_config_get(config, key, size, sizeof(size));
    if (*blocks && strcmp(blocks, "0"))
        snprintf(out, bytes, "%s blocks", blocks);
    else
        snprintf(out, bytes, "%s", *size && strcmp(size, "0") ? size : "none");
}

static void say_ready(flexkv_config *config, const char *address)
{
    char cpu[48], ssd[48], state[NODE_ADDRESS_BYTES + 64];

    describe_tier(config, "cpu", cpu, sizeof(cpu));
    describe_tier(config, "ssd", ssd, sizeof(ssd));
    fk_info("serving at %s, cpu tier %s, ssd tier %s", address, cpu, ssd);
    snprintf(state, sizeof(state), "READY=1\nSTATUS=Serving at %s", address);
    notify_manager(state);
}

static int fail(const struct serve_options *o, int rc)
{
    fprintf(stderr, "%s: %s\n", o->node.command, flexkv_last_error());
    return rc == -EADDRINUSE ? ADDRESS_IN_USE : 1;
}

static int serve(const struct serve_options *o, flexkv_config *config, const char *address)
{
    flexkv_node *node = NULL;

    block_signals();
    int rc = flexkv_node_open(config, &node);
    if (rc)
        return fail(o, rc);
    rc = flexkv_node_serve(node, address);
    if (rc) {
        int status = fail(o, rc);
        flexkv_node_close(node);
        return status;
    }
    say_ready(config, address);
    const char *why = wait_for_end(node, o->idle_ms);
    fk_info("ending: %s", why);
    notify_manager("STOPPING=1");
    unblock_signals();
    flexkv_node_close(node);
    return 0;
}

int cmd_serve(int argc, char **argv)
{
    fk_autofree char **sets = calloc((size_t)argc, sizeof(*sets));
    struct serve_options o = {
        .node = { .command = "flexkv serve", .sets = sets }, .idle_ms = -1,
    };
    char address[NODE_ADDRESS_BYTES];
    flexkv_config *config = NULL;

    if (!sets) {
        fprintf(stderr, "flexkv serve: out of memory\n");
        return 1;
    }
    int rc = parse(&o, argc, argv);
    if (rc || o.help) {
        if (!rc)
            fputs(usage, stdout);
        return rc;
    }
    rc = node_options_load(&o.node, &config, address);
    if (!rc)
        rc = serve(&o, config, address);
    flexkv_config_destroy(config);
    return rc;
}
