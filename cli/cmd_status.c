/* cmd_status.c - `flexkv status`: asks a daemon how it is. Called by main.c. */
#include <getopt.h>
#include <inttypes.h>
#include <stdio.h>

#include "base/util.h"
#include "cmd.h"
#include "node_options.h"
#include "status_json.h"
#include "units.h"

static const char usage[] =
    "usage: flexkv status [ADDR] [--json]\n"
    "\n"
    "Shows what the daemon at ADDR (default: option server_recv_port) holds and whom it serves.\n"
    "\n"
    "  --json  as one JSON object\n"
    "  --help  this text\n"
    "\n"
    "Exit status: 0, 1 nobody answers, 2 bad usage.\n";

static void print_node(const struct status *s, FILE *out)
{
    const struct flexkv_stats *t = &s->stats;
    double asked = (double)(t->match_blocks + t->miss_blocks);

    fprintf(out, "flexkv %s, pid %" PRIu64 ", up %s, at %s\n", s->version, s->pid,
            unit_duration(s->uptime_s).text, s->address);
    fprintf(out, "\nrequests    %" PRIu64 " with %.0f blocks: %s hit in cpu, %s on ssd, %s elsewhere, %s missed",
            t->matches, asked, unit_percent((double)t->cpu.hit_blocks, asked).text,
            unit_percent((double)t->ssd.hit_blocks, asked).text, unit_percent((double)t->peer.hit_blocks, asked).text,
            unit_percent((double)t->miss_blocks, asked).text);
    fprintf(out, " (%" PRIu64 " blocks declined)\n", t->declined_blocks);
    fprintf(out, "operations  %" PRIu64 " gets, %" PRIu64 " puts, %" PRIu64 " prefetches; %" PRIu64
            " timeouts, %" PRIu64 " cancelled\n", t->gets, t->puts, t->prefetches, t->timeouts,
            t->cancelled);
    fprintf(out, "now         %" PRIu64 " leases, %" PRIu64 " operations, %" PRIu64
            " blocks to be written to ssd\n", t->leases, t->operations, t->write_backlog_blocks);
    fprintf(out, "index       %" PRIu64 " blocks, %s\n", t->blocks,
            unit_bytes((double)t->index_bytes).text);
    if (t->cpu.errors || t->ssd.errors || t->get_failed_blocks)
        fprintf(out, "errors      %" PRIu64 " in cpu, %" PRIu64 " on ssd, %" PRIu64
                " blocks of gets failed\n", t->cpu.errors, t->ssd.errors, t->get_failed_blocks);
}

static void print_tier(const char *name, const struct status_space *s, uint64_t used,
                       uint64_t slots, FILE *out)
{
    double block = (double)s->slot_bytes;

    if (!slots) {
        fprintf(out, "  %s  none\n", name);
        return;
    }
    fprintf(out, "  %s  %" PRIu64 " of %" PRIu64 " blocks, %s of %s (%s)\n", name, used, slots,
            unit_bytes((double)used * block).text, unit_bytes((double)slots * block).text,
            unit_percent((double)used, (double)slots).text);
}

/* What decides whether a hit is worth it; as far as it has been measured. */
static void print_speed(const struct status_space *s, FILE *out)
{
    const struct { const char *what; double us; } speeds[] = {
        { "to copy", s->copy_us }, { "to read from ssd", s->ssd_us },
        { "to fetch from elsewhere", s->peer_us }, { "to compute", s->compute_us },
    };
    const char *before = "  a block takes";

    for (size_t i = 0; i < fk_array_size(speeds); i++) {
        if (!(speeds[i].us > 0))
            continue;
        fprintf(out, "%s %.1f us %s", before, speeds[i].us, speeds[i].what);
        before = ",";
    }
    if (*before == ',')
        fputc('\n', out);
}

static void print_spaces(const struct status *s, FILE *out)
{
    for (size_t i = 0; i < s->spaces.len; i++) {
        const struct status_space *sp = &s->spaces.data[i];
        fprintf(out, "\nspace %s: %" PRIu64 " tokens a block, %" PRIu64 " ranks of %s\n", sp->name,
                sp->tokens_per_block, sp->ranks, unit_bytes((double)sp->slice_bytes).text);
        print_tier("cpu", sp, sp->cpu_used, sp->cpu_slots, out);
        print_tier("ssd", sp, sp->ssd_used, sp->ssd_slots, out);
        print_speed(sp, out);
    }
}

/* The workers that have not come, as in "; missing: 1 3". */
static void print_missing(const struct status_instance *in, FILE *out)
{
    const char *before = "; missing:";

    if (in->agents.len == 0 && in->registered > 0)
        return;                         /* the daemon does not list them */
    for (uint64_t w = 0; w < fk_min(in->workers, (uint64_t)4096); w++) {
        bool there = false;
        for (size_t a = 0; a < in->agents.len; a++)
            there |= in->agents.data[a].worker == w;
        if (!there) {
            fprintf(out, "%s %" PRIu64, before, w);
            before = "";
        }
    }
}

static void print_instances(const struct status *s, FILE *out)
{
    for (size_t i = 0; i < s->instances.len; i++) {
        const struct status_instance *in = &s->instances.data[i];
        fprintf(out, "\ninstance %s in space %s: %" PRIu64 " of %" PRIu64 " workers",
                *in->name ? in->name : "\"\"", in->space, in->registered, in->workers);
        print_missing(in, out);
        fprintf(out, "; %" PRIu64 " jobs under way; ", in->jobs_out);
        if (in->client_pid)
            fprintf(out, "client %" PRIu64, in->client_pid);
        else
            fprintf(out, "no client");
        fprintf(out, "%s\n", in->ended ? "; ended" : "");
        for (size_t a = 0; a < in->agents.len; a++) {
            const struct status_agent *ag = &in->agents.data[a];
            fprintf(out, "  worker %" PRIu64 ": slice %" PRIu64 ", replica %" PRIu64 ", pid %" PRIu64,
                    ag->worker, ag->slice, ag->replica, ag->pid);
            fprintf(out, ", %" PRIu64 " pages, %" PRIu64 " jobs under way\n", ag->pages, ag->jobs);
        }
    }
    for (size_t i = 0; i < s->waiting.len; i++)
        fprintf(out, "%sworker %" PRIu64 " of instance %s in space %s, pid %" PRIu64
                ", waits for its client\n", i ? "" : "\n", s->waiting.data[i].worker,
                *s->waiting.data[i].instance ? s->waiting.data[i].instance : "\"\"",
                s->waiting.data[i].space, s->waiting.data[i].pid);
}

/* Without the one that asks. */
static void print_clients(const struct status *s, FILE *out)
{
    const char *before = "\nclients  ";

    for (size_t i = 0; i < s->clients.len; i++) {
        const struct status_client *c = &s->clients.data[i];
        if (c->pid == (uint64_t)getpid())
            continue;
        fprintf(out, "%spid %" PRIu64 " for %s", before, c->pid, unit_duration(c->since_s).text);
        before = ", ";
    }
    fprintf(out, "%s", *before == '\n' ? "\nno clients\n" : "\n");
}

static void print_cluster(const struct status_cluster *c, FILE *out)
{
    if (!*c->name)
        return;
    fprintf(out, "\ncluster %s: this is node %s, read at %s=%s; Redis: %s\n", c->cluster, c->name, c->transport, c->address,
            c->redis);
    fprintf(out, "  knows %" PRIu64 " blocks of others (%s); fetched %" PRIu64 " (%s), %" PRIu64 " failed; lent %" PRIu64
            ", %" PRIu64 " refused\n", c->remote_blocks, unit_bytes((double)c->remote_index_bytes).text,
            c->fetched_blocks, unit_bytes((double)c->fetched_bytes).text, c->failed_blocks, c->lent_blocks, c->refused);
    for (size_t i = 0; i < c->peers.len; i++) {
        const struct status_peer *p = &c->peers.data[i];
        fprintf(out, "  node %s: %" PRIu64 " blocks in cpu, %" PRIu64 " on ssd%s\n", p->name, p->cpu_blocks, p->ssd_blocks,
                !p->alive ? "; silent" : p->synced ? "" : "; not all known yet");
    }
}

static int print_text(const char *json)
{
    struct status s;
    int rc = status_parse(json, &s);

    if (!rc) {
        print_node(&s, stdout);
        print_spaces(&s, stdout);
        print_instances(&s, stdout);
        print_cluster(&s.cluster, stdout);
        print_clients(&s, stdout);
    } else {
        fprintf(stderr, "flexkv status: cannot read the daemon's answer: %s\n", strerror(-rc));
    }
    status_free(&s);
    return rc ? 1 : 0;
}

static int ask(const flexkv_config *config, const char *address, bool json)
{
    flexkv_node *node = NULL;
    fk_autofree char *answer = NULL;
    int rc = flexkv_node_connect(config, address, &node);

    if (!rc)
        rc = flexkv_node_status(node, &answer);
    if (rc)
        fprintf(stderr, "flexkv status: %s\n", flexkv_last_error());
    else if (json)
        puts(answer);
    else
        rc = print_text(answer);
    flexkv_node_close(node);
    if (!rc && (fflush(stdout) || ferror(stdout))) {
        perror("flexkv status: stdout");
        rc = 1;
    }
    return rc ? 1 : 0;
}

int cmd_status(int argc, char **argv)
{
    static const struct option options[] = {
        { "json", no_argument, NULL, 'j' }, { "help", no_argument, NULL, 'h' }, { 0 },
    };
    /* What the configuration has to say is for the daemon's log. */
    char *quiet[] = { "log_level=ERROR" };
    struct node_options node = { .command = "flexkv status", .sets = quiet, .n_sets = 1 };
    char address[NODE_ADDRESS_BYTES];
    flexkv_config *config = NULL;
    bool json = false;
    int c;

    optind = 0;
    while ((c = getopt_long(argc, argv, "h", options, NULL)) != -1) {
        if (c == 'j') {
            json = true;
        } else {
            fputs(usage, c == 'h' ? stdout : stderr);
            return c == 'h' ? 0 : 2;
        }
    }
    if (argc - optind > 1) {
        fputs(usage, stderr);
        return 2;
    }
    node.address = argv[optind];
    int rc = node_options_load(&node, &config, address);
    if (!rc)
        rc = ask(config, address, json);
    flexkv_config_destroy(config);
    return rc;
}
