/*
 * cmd_events.c - `flexkv events`: looks at streams of KV events, records and plays them, and merges an
 * engine's with a node's. Options and signals are here; the work is in events_*.c. Called by main.c.
 */
#include <getopt.h>
#include <math.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <sys/signalfd.h>

#include "base/util.h"
#include "cmd.h"
#include "events_cmd.h"
#include "node_options.h"

static const char usage[] =
    "usage: flexkv events ENDPOINT [--replay ENDPOINT] [--topic T] [--json] [--quiet]\n"
    "                     [--count N] [--seconds S] [--record FILE]\n"
    "       flexkv events --play FILE [--json] [--quiet]\n"
    "       flexkv events --play FILE --publish ENDPOINT [--speed X] [--wait S]\n"
    "       flexkv events --merge ENDPOINT [--replay ENDPOINT]\n"
    "                     (--node ADDR | --own ENDPOINT [--own-replay ENDPOINT])\n"
    "                     --publish ENDPOINT [--publish-replay ENDPOINT] [--rank R]\n"
    "\n"
    "Shows a stream of KV events (ZeroMQ, as routers read it) line by line, and says which rules\n"
    "it breaks. --play takes it from a recording, or publishes the recording. --merge makes one\n"
    "stream of an engine's and of a FlexKV node's, for a router that knows one endpoint.\n"
    "An ENDPOINT is tcp://HOST:PORT or ipc://PATH.\n"
    "\n"
    "  --replay ENDPOINT          where missed batches are asked for\n"
    "  --topic T                  only batches whose topic begins so\n"
    "  --json                     one JSON object a line\n"
    "  --quiet                    only what is wrong, and the summary\n"
    "  --count N                  end after so many batches\n"
    "  --seconds S                end after so long\n"
    "  --record FILE              write the stream to FILE too\n"
    "  --publish ENDPOINT         where the recording, or the merged stream, is published\n"
    "  --publish-replay ENDPOINT  where batches of the merged stream can be asked for again\n"
    "  --speed X                  so many times as fast as recorded; 0: as fast as possible;\n"
    "                             default 1\n"
    "  --wait S                   so long for a first subscriber; default 10\n"
    "  --node ADDR                the daemon whose events are merged in (option server_recv_port)\n"
    "  --own ENDPOINT             or the node's own stream (option kv_events_endpoint)\n"
    "  --own-replay ENDPOINT      and its kv_events_replay_endpoint\n"
    "  --rank R                   data parallel rank of the node's batches; default: not stated\n"
    "  --set KEY=VALUE            any option of flexkv.conf(5), as kv_events_zmq_library\n"
    "  --help                     this text\n"
    "\n"
    "Exit status: 0, 1 failed or rules are broken, 2 bad usage.\n";

enum {
    OPT_REPLAY = 256, OPT_TOPIC, OPT_JSON, OPT_QUIET, OPT_COUNT, OPT_SECONDS, OPT_RECORD, OPT_PLAY,
    OPT_PUBLISH, OPT_PUBLISH_REPLAY, OPT_SPEED, OPT_WAIT, OPT_MERGE, OPT_NODE, OPT_OWN, OPT_OWN_REPLAY,
    OPT_RANK, OPT_SET,
};

static const struct option long_options[] = {
    { "replay", required_argument, NULL, OPT_REPLAY }, { "topic", required_argument, NULL, OPT_TOPIC },
    { "json", no_argument, NULL, OPT_JSON }, { "quiet", no_argument, NULL, OPT_QUIET },
    { "count", required_argument, NULL, OPT_COUNT },
    { "seconds", required_argument, NULL, OPT_SECONDS },
    { "record", required_argument, NULL, OPT_RECORD }, { "play", required_argument, NULL, OPT_PLAY },
    { "publish", required_argument, NULL, OPT_PUBLISH },
    { "publish-replay", required_argument, NULL, OPT_PUBLISH_REPLAY },
    { "speed", required_argument, NULL, OPT_SPEED }, { "wait", required_argument, NULL, OPT_WAIT },
    { "merge", required_argument, NULL, OPT_MERGE }, { "node", required_argument, NULL, OPT_NODE },
    { "own", required_argument, NULL, OPT_OWN }, { "own-replay", required_argument, NULL, OPT_OWN_REPLAY },
    { "rank", required_argument, NULL, OPT_RANK }, { "set", required_argument, NULL, OPT_SET },
    { "help", no_argument, NULL, 'h' }, { 0 },
};

/* ---- waiting and signals ---- */

static int open_stop_fd(void)
{
    sigset_t set;

    sigemptyset(&set);
    sigaddset(&set, SIGINT);
    sigaddset(&set, SIGTERM);
    sigaddset(&set, SIGHUP);
    signal(SIGPIPE, SIG_IGN);
    pthread_sigmask(SIG_BLOCK, &set, NULL);
    return signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
}

int events_wait(const struct events_options *o, int fd, int timeout_ms)
{
    struct pollfd fds[2] = { { .fd = o->stop_fd, .events = POLLIN }, { .fd = fd, .events = POLLIN } };
    int n = poll(fds, fd < 0 ? 1 : 2, timeout_ms);

    if (n < 0)
        return errno == EINTR ? 0 : -errno;
    return fds[0].revents ? -EINTR : n;
}

/* ---- options ---- */

static int bad_number(const char *name, const char *text, const char *wanted)
{
    fprintf(stderr, EVENTS_COMMAND ": --%s %s: %s\n", name, text, wanted);
    return 2;
}

static int parse_double(const char *name, const char *text, double most, double *out)
{
    char *end;

    *out = strtod(text, &end);
    if (end == text || *end || !isfinite(*out) || *out < 0 || *out > most)
        return bad_number(name, text, "a number from 0 on is wanted");
    return 0;
}

static int parse_count(const char *name, const char *text, int64_t least, int64_t *out)
{
    char *end;

    errno = 0;
    *out = strtoll(text, &end, 10);
    if (end == text || *end || errno || *out < least)
        return bad_number(name, text, "a whole number is wanted");
    return 0;
}

static int parse_one(struct events_options *o, struct node_options *node, int c, char *arg)
{
    int64_t n = 0;
    int rc = 0;

    switch (c) {
    case OPT_REPLAY: o->replay_endpoint = arg; break;
    case OPT_TOPIC: o->topic = arg; break;
    case OPT_JSON: o->json = 1; break;
    case OPT_QUIET: o->quiet = 1; break;
    case OPT_COUNT: rc = parse_count("count", arg, 1, &n), o->count = (uint64_t)n; break;
    case OPT_SECONDS: rc = parse_double("seconds", arg, 1e6, &o->seconds); break;
    case OPT_RECORD: o->record = arg; break;
    case OPT_PLAY: o->play = arg; break;
    case OPT_PUBLISH: o->publish = arg; break;
    case OPT_PUBLISH_REPLAY: o->publish_replay = arg; break;
    case OPT_SPEED: rc = parse_double("speed", arg, 1e9, &o->speed); break;
    case OPT_WAIT: rc = parse_double("wait", arg, 1e6, &o->wait_seconds); break;
    case OPT_MERGE: o->merge = arg; break;
    case OPT_NODE: o->node = arg; break;
    case OPT_OWN: o->own_endpoint = arg; break;
    case OPT_OWN_REPLAY: o->own_replay = arg; break;
    case OPT_RANK: rc = parse_count("rank", arg, 0, &o->rank); break;
    case OPT_SET: node->sets[node->n_sets++] = arg; break;
    default: rc = 2;
    }
    return rc;
}

static int complain(const char *what)
{
    fprintf(stderr, EVENTS_COMMAND ": %s\n\n%s", what, usage);
    return 2;
}

/* What goes with what. */
static int check(const struct events_options *o)
{
    if (!!o->endpoint + !!o->play + !!o->merge != 1)
        return complain("one of ENDPOINT, --play and --merge is wanted");
    if (o->merge && (!o->publish || !o->node == !o->own_endpoint))
        return complain("--merge needs --publish, and one of --node and --own");
    if (!o->merge && (o->node || o->own_endpoint || o->own_replay || o->publish_replay))
        return complain("--node, --own, --own-replay and --publish-replay go with --merge");
    if (o->publish && o->endpoint)
        return complain("--publish goes with --play and --merge");
    if (o->record && !o->endpoint)
        return complain("--record goes with ENDPOINT");
    return 0;
}

static int parse(struct events_options *o, struct node_options *node, int argc, char **argv, bool *help)
{
    int c, rc = 0;

    optind = 0;
    while (!rc && (c = getopt_long(argc, argv, "h", long_options, NULL)) != -1) {
        *help = c == 'h';
        if (*help)
            return 0;
        rc = parse_one(o, node, c, optarg);
    }
    if (!rc && optind < argc)
        o->endpoint = argv[optind++];
    if (!rc && optind < argc)
        rc = complain("too many arguments");
    return rc ? rc : check(o);
}

static int run(struct events_options *o)
{
    const struct fk_zmq *zmq = NULL;
    char error[512], library[4096];

    if (!o->play || o->publish) {
        flexkv_config_get(o->config, "kv_events_zmq_library", library, sizeof(library));
        if (fk_zmq_load(library, "kv_events_zmq_library", &zmq, error, sizeof(error))) {
            fprintf(stderr, EVENTS_COMMAND ": %s\n", error);
            return 1;
        }
    }
    o->stop_fd = open_stop_fd();
    if (o->stop_fd < 0) {
        perror(EVENTS_COMMAND ": signalfd");
        return 1;
    }
    int rc = o->merge ? events_merge(o, zmq) : o->publish ? events_play(o, zmq) : events_show(o, zmq);
    close(o->stop_fd);
    return rc;
}

int cmd_events(int argc, char **argv)
{
    fk_autofree char **sets = calloc((size_t)argc + 1, sizeof(*sets));
    struct node_options node = { .command = EVENTS_COMMAND, .sets = sets };
    struct events_options o = { .topic = "", .rank = -1, .speed = 1, .wait_seconds = 10 };
    char address[NODE_ADDRESS_BYTES];
    bool help = false;

    if (!sets)
        return 1;
    int rc = parse(&o, &node, argc, argv, &help);
    if (help)
        fputs(usage, stdout);
    if (rc || help)
        return rc;
    node.address = o.node;
    rc = node_options_load(&node, &o.config, address);
    if (!rc)
        rc = run(&o);
    flexkv_config_destroy(o.config);
    return rc;
}
