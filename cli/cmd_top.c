/*
 * cmd_top.c - `flexkv top`: a daemon's counters, tiers and instances, live in a terminal; or once,
 * as plain text. Called by main.c.
 *
 * The library reconnects when the daemon comes back; until then its last figures stay, below a
 * line that says since when nobody answers.
 */
#include <getopt.h>
#include <math.h>
#include <stdio.h>

#include "base/clock.h"
#include "base/log.h"
#include "cmd.h"
#include "node_options.h"
#include "terminal.h"
#include "top_screen.h"

static const char usage[] =
    "usage: flexkv top [ADDR] [--interval SECONDS] [--once]\n"
    "\n"
    "Shows what the daemon at ADDR (default: option server_recv_port) does, again and again.\n"
    "q ends it.\n"
    "\n"
    "  --interval SECONDS  between two looks; 0.1 to 3600, default 1\n"
    "  --once              look twice, print once, as where standard output is no terminal\n"
    "  --help              this text\n"
    "\n"
    "Exit status: 0, 1 nobody answers, 2 bad usage.\n";

struct sample {
    struct status status;
    uint64_t at_us;
    bool valid;
};

struct top {
    flexkv_node *node;
    const char *address;
    int interval_ms;
    bool once;
    struct sample now, before;
    time_t silent_since;
    char why[256];
};

static void note_silence(struct top *t, const char *why)
{
    if (!t->silent_since)
        t->silent_since = time(NULL);
    snprintf(t->why, sizeof(t->why), "%s", why);
}

/* The figures of another daemon than before say nothing about rates. */
static bool same_daemon(const struct status *a, const struct status *b)
{
    return a->pid == b->pid && b->uptime_s >= a->uptime_s;
}

static void forget(struct sample *s)
{
    if (s->valid)
        status_free(&s->status);
    s->valid = false;
}

/* A new sample; without an answer the old ones stay. */
static int look(struct top *t)
{
    fk_autofree char *json = NULL;
    struct status status;
    int rc = flexkv_node_status(t->node, &json);

    if (rc) {
        note_silence(t, flexkv_last_error());
        return rc;
    }
    uint64_t now_us = fk_clock_us();
    rc = status_parse(json, &status);
    if (rc) {
        status_free(&status);
        note_silence(t, "its answer cannot be read");
        return rc;
    }
    forget(&t->before);
    if (t->now.valid && same_daemon(&t->now.status, &status))
        t->before = t->now;
    else
        forget(&t->now);
    t->now = (struct sample){ .status = status, .at_us = now_us, .valid = true };
    t->silent_since = 0;
    return 0;
}

static char *render(const struct top *t, int width)
{
    struct top_view view = {
        .now = t->now.valid ? &t->now.status : NULL,
        .before = t->before.valid ? &t->before.status : NULL,
        .seconds = (double)(t->now.at_us - t->before.at_us) / 1e6,
        .silent_since = t->silent_since, .silent_why = t->why, .width = width,
    };
    char *text = NULL;
    size_t len = 0;
    FILE *out = open_memstream(&text, &len);

    if (!out)
        return NULL;
    top_screen_print(&view, out);
    fclose(out);
    return text;
}

static int print_once(struct top *t)
{
    int rc = look(t);

    if (!rc) {
        struct timespec pause = { t->interval_ms / 1000, t->interval_ms % 1000 * 1000000L };
        nanosleep(&pause, NULL);
        rc = look(t);
    }
    if (rc) {
        fprintf(stderr, "flexkv top: %s\n", t->why);
        return 1;
    }
    fk_autofree char *text = render(t, 80);
    if (!text || fputs(text, stdout) == EOF || fflush(stdout)) {
        perror("flexkv top: stdout");
        return 1;
    }
    return 0;
}

static void draw(const struct top *t)
{
    fk_autofree char *text = render(t, terminal_width());

    if (text)
        terminal_draw(text);
}

static void show_live(struct top *t)
{
    enum terminal_event event;

    terminal_enter();
    do {
        look(t);
        draw(t);
        while ((event = terminal_wait(t->interval_ms)) == TERMINAL_RESIZED)
            draw(t);
    } while (event != TERMINAL_QUIT);
    terminal_leave();
}

/* Lines of the log would run through the screen; what matters is on it. */
static void drop_line(enum fk_log_level level, const char *line, void *arg)
{
}

static int run(struct top *t, const flexkv_config *config)
{
    bool live = !t->once && terminal_usable();
    int rc = 0;

    fk_log_set_sink(drop_line, NULL);
    if (live)
        terminal_prepare();
    if (flexkv_node_connect(config, t->address, &t->node)) {
        fprintf(stderr, "flexkv top: %s\n", flexkv_last_error());
        return 1;
    }
    if (live)
        show_live(t);
    else
        rc = print_once(t);
    flexkv_node_close(t->node);
    forget(&t->now);
    forget(&t->before);
    return rc;
}

static int parse_interval(const char *text, int *ms)
{
    char *end;
    double seconds = strtod(text, &end);

    if (end == text || *end || !isfinite(seconds) || seconds < 0.1 || seconds > 3600) {
        fprintf(stderr, "flexkv top: --interval %s: seconds are wanted, 0.1 to 3600\n", text);
        return 2;
    }
    *ms = (int)(seconds * 1000);
    return 0;
}

static int parse(struct top *t, int argc, char **argv, bool *help)
{
    static const struct option options[] = {
        { "interval", required_argument, NULL, 'i' }, { "once", no_argument, NULL, 'o' },
        { "help", no_argument, NULL, 'h' }, { 0 },
    };
    int c, rc = 0;

    optind = 0;
    while (!rc && (c = getopt_long(argc, argv, "h", options, NULL)) != -1) {
        switch (c) {
        case 'i': rc = parse_interval(optarg, &t->interval_ms); break;
        case 'o': t->once = true; break;
        case 'h': *help = true; return 0;
        default: rc = 2;
        }
    }
    return rc || argc - optind > 1 ? 2 : 0;
}

int cmd_top(int argc, char **argv)
{
    char *quiet[] = { "log_level=ERROR" };
    struct node_options node = { .command = "flexkv top", .sets = quiet, .n_sets = 1 };
    struct top t = { .interval_ms = 1000 };
    char address[NODE_ADDRESS_BYTES];
    flexkv_config *config = NULL;
    bool help = false;

    int rc = parse(&t, argc, argv, &help);
    if (rc || help) {
        fputs(usage, help ? stdout : stderr);
        return rc;
    }
    node.address = argv[optind];
    t.address = address;
    rc = node_options_load(&node, &config, address);
    if (!rc)
        rc = run(&t, config);
    flexkv_config_destroy(config);
    return rc;
}
