/*
 * replay.c - `flexkv replay TRACE...`: drives a node, or the index alone, with a request trace
 * and says what hit, how fast, and whether every byte was right. Parts: see replay.h.
 * Exit status: 0 done, 1 wrong bytes or failure, 2 usage. Caller: main.c.
 */
#include "replay.h"

#include <math.h>
#include <signal.h>

#include "cmd.h"
#include "report_html.h"

static volatile sig_atomic_t stop_signal;

static void on_signal(int sig)
{
    stop_signal = sig;
}

bool replay_stopped(void)
{
    return stop_signal != 0;
}

/* The first signal ends the replay with what it has; the second one ends the process. */
static void catch_signals(void)
{
    struct sigaction sa = { .sa_handler = on_signal, .sa_flags = (int)SA_RESETHAND };

    sigaction(SIGINT, &sa, NULL);
    sigaction(SIGTERM, &sa, NULL);
}

static int load(const struct replay_options *o, struct trace *t)
{
    char error[512] = "";
    int rc = trace_load(t, o->traces, o->n_traces, o->limit, o->join ? TRACE_JOIN : 0, error, sizeof(error));

    if (rc)
        fprintf(stderr, "flexkv replay: %s\n", error);
    else if (!t->requests.len)
        fprintf(stderr, "flexkv replay: %s: no request in it\n", o->traces[0]);
    return rc || !t->requests.len ? 2 : 0;
}

static int write_report(const struct replay_options *o, const struct replay_result *res)
{
    FILE *out = fopen(o->report, "w");
    bool bad = !out;

    if (out) {
        report_html_write(res, out);
        bad = ferror(out);
        bad |= fclose(out) != 0;
    }
    if (bad)
        fprintf(stderr, "flexkv replay: --report %s: %s\n", o->report, strerror(errno));
    return bad;
}

static int run(const struct replay_plan *p, struct replay_result *res)
{
    if (p->options->belady)
        return replay_run_belady(p, res);
    return p->options->hit_only ? replay_run_index(p, res) : replay_run_node(p, res);
}

static int replay(const struct replay_options *o, const struct replay_plan *p)
{
    fk_autofree struct replay_result *res = malloc(sizeof(*res));

    if (!res) {
        fprintf(stderr, "flexkv replay: out of memory\n");
        return 1;
    }
    replay_result_init(res, p);
    catch_signals();
    int rc = run(p, res);
    replay_progress_clear(res);
    if (!rc) {
        res->interrupted = replay_stopped();
        if (o->json)
            replay_print_json(res, stdout);
        else
            replay_print_table(res, stdout);
        rc = (o->report ? write_report(o, res) : 0) | (res->wrong ? 1 : 0);
    }
    replay_result_free(res);
    return rc;
}

/* Found out now rather than after an hour. */
static int check_report(const struct replay_options *o)
{
    FILE *f = o->report ? fopen(o->report, "a") : NULL;

    if (f)
        fclose(f);
    else if (o->report)
        fprintf(stderr, "flexkv replay: --report %s: %s\n", o->report, strerror(errno));
    return o->report && !f ? 2 : 0;
}

int cmd_replay(int argc, char **argv)
{
    struct replay_options o;
    struct trace t = { 0 };
    struct replay_plan p;

    int rc = replay_options_parse(&o, argc, argv);
    if (!rc && o.help) {
        replay_print_help(stdout);
    } else if (!rc) {
        rc = check_report(&o);
        if (!rc)
            rc = load(&o, &t);
        if (!rc)
            rc = replay_plan_make(&p, &o, &t);
        if (!rc)
            rc = replay(&o, &p);
        trace_free(&t);
    }
    replay_options_free(&o);
    return rc;
}
