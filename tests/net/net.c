/*
 * net.c - the program: options, seeds, totals, and the line that replays a failure. See net.h for the rooms,
 * docs/simulator.md for use.
 */
#include "net.h"

#include <getopt.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/random.h>

#include "base/clock.h"
#include "base/log.h"

static const char *program;
static bool no_self_check;

/* ---- failing ---- */

static void fail_line(const struct net_world *w, const char *text)
{
    fflush(stdout);
    printf("netsim: FAIL seed=%llu step=%llu invariant=\"%s\" replay: %s --seed %llu --steps %llu\n",
           (unsigned long long)w->seed, (unsigned long long)w->step, text, program, (unsigned long long)w->seed,
           (unsigned long long)w->step + 1);
    fflush(stdout);
}

void net_fail(struct net_world *w, const char *fmt, ...)
{
    char text[512];
    va_list ap;

    va_start(ap, fmt);
    vsnprintf(text, sizeof(text), fmt, ap);
    va_end(ap);
    fail_line(w, text);
    _exit(1);
}

void net_trace(struct net_world *w, const char *fmt, ...)
{
    va_list ap;

    printf("%6llu %9llu ", (unsigned long long)w->step, (unsigned long long)w->net.now_us);
    va_start(ap, fmt);
    vprintf(fmt, ap);
    va_end(ap);
    putchar('\n');
}

static void on_signal(int sig)
{
    if (net_current)
        fail_line(net_current, sig == SIGALRM ? "a step does not end" : strsignal(sig));
    _exit(1);
}

static void catch_signals(void)
{
    static const int sigs[] = { SIGSEGV, SIGBUS, SIGABRT, SIGFPE, SIGILL, SIGALRM };

    for (size_t i = 0; i < fk_array_size(sigs); i++)
        signal(sigs[i], on_signal);
}

/* ---- seeds ---- */

static uint64_t run_seed(uint64_t seed, uint64_t steps, bool verbose, struct net_counts *t)
{
    struct net_world *w = net_world_new(seed, verbose, no_self_check);

    alarm(300);
    for (w->step = 0; w->step < steps; w->step++) {
        net_world_step(w);
        if (w->step % 1000 == 999 && w->step + 1 < steps)
            net_world_quiet(w);
    }
    net_world_quiet(w);
    uint64_t trace = w->trace;
    net_world_free(w, t);
    return trace;
}

static void run_list(const char *path, uint64_t steps, struct net_counts *t)
{
    char line[256];
    FILE *f = fopen(path, "r");

    if (!f) {
        perror(path);
        exit(2);
    }
    while (fgets(line, sizeof(line), f)) {
        unsigned long long seed, n = steps;
        if (line[0] == '#' || sscanf(line, "%llu %llu", &seed, &n) < 1)
            continue;
        run_seed(seed, n, false, t);
    }
    fclose(f);
}

static void run_for(double seconds, uint64_t steps, struct net_counts *t)
{
    uint64_t seed, end = fk_clock_ns() + (uint64_t)(seconds * 1e9);

    if (getrandom(&seed, sizeof(seed), 0) != sizeof(seed))
        seed = fk_clock_ns();
    seed %= 1000000000;
    printf("netsim: fresh seeds from %llu\n", (unsigned long long)seed);
    for (; fk_clock_ns() < end; seed++)
        run_seed(seed, steps, false, t);
}

/* The same seed twice gives the same world. */
static void run_twice(uint64_t seed, uint64_t steps, struct net_counts *t)
{
    uint64_t a = run_seed(seed, steps, false, t), b = run_seed(seed, steps, false, t);

    if (a != b) {
        printf("netsim: FAIL seed=%llu invariant=\"two runs of one seed differ\" replay: %s --twice --seed %llu "
               "--steps %llu\n", (unsigned long long)seed, program, (unsigned long long)seed,
               (unsigned long long)steps);
        exit(1);
    }
}

static void print_totals(const struct net_counts *t, double seconds)
{
    printf("netsim: ok: %llu steps in %.1f s; %llu nodes started, %llu killed, %llu hung, %llu left, %llu twins, "
           "%llu times fenced, %llu resets\n", (unsigned long long)t->steps, seconds, (unsigned long long)t->starts,
           (unsigned long long)t->crashes, (unsigned long long)t->freezes, (unsigned long long)t->leaves,
           (unsigned long long)t->twins, (unsigned long long)t->fenced, (unsigned long long)t->resets);
    printf("netsim: %llu puts, %llu gets, blocks: %llu got, %llu not got, %llu matched at peers; %llu operations out "
           "of time\n", (unsigned long long)t->puts, (unsigned long long)t->gets, (unsigned long long)t->got,
           (unsigned long long)t->lost, (unsigned long long)t->peer_blocks, (unsigned long long)t->timeouts);
    printf("netsim: fetches: %llu blocks came, %llu did not, %llu tried again, %llu not there, %llu slots in "
           "quarantine; %llu lent, %llu refused, %llu staged\n", (unsigned long long)t->fetched,
           (unsigned long long)t->failed, (unsigned long long)t->retried, (unsigned long long)t->not_there,
           (unsigned long long)t->quarantined, (unsigned long long)t->lent, (unsigned long long)t->refused,
           (unsigned long long)t->staged);
    printf("netsim: reads lost %llu, late %llu, corrupted %llu, refused %llu, cut off %llu; %llu gaps, %llu snapshots, "
           "%llu overflows; %llu look-ups checked; at quiet points %llu entries and %llu hits compared\n",
           (unsigned long long)t->dropped, (unsigned long long)t->delayed, (unsigned long long)t->corrupted,
           (unsigned long long)t->reset_reads, (unsigned long long)t->cut_reads, (unsigned long long)t->gaps,
           (unsigned long long)t->snapshots, (unsigned long long)t->overflows, (unsigned long long)t->lookups,
           (unsigned long long)t->compared, (unsigned long long)t->hits_checked);
}

static void usage(void)
{
    printf("usage: netsim [--seed N | --seeds A..B | --seconds S | --list FILE] [--steps N] [--twice] [--verbose]\n"
           "  --seed N      one world\n  --seeds A..B  all from A to B\n  --seconds S   fresh seeds for so long\n"
           "  --list FILE   seeds (and steps) of a file, one per line, # comments\n"
           "  --steps N     steps of each world (2000)\n  --twice       run each seed twice and compare\n"
           "  --no-self-check  leave out fk_core_check and fk_peers_check\n  --verbose     print what happens\n");
}

int main(int argc, char **argv)
{
    static const struct option options[] = {
        { "seed", required_argument, NULL, 's' }, { "seeds", required_argument, NULL, 'r' },
        { "seconds", required_argument, NULL, 't' }, { "steps", required_argument, NULL, 'n' },
        { "list", required_argument, NULL, 'l' }, { "twice", no_argument, NULL, '2' },
        { "no-self-check", no_argument, NULL, 'x' }, { "verbose", no_argument, NULL, 'v' },
        { "help", no_argument, NULL, 'h' }, { 0 },
    };
    unsigned long long first = 1, last = 20, steps = 2000;
    struct net_counts t = { 0 };
    const char *list = NULL;
    bool verbose = false, twice = false;
    double seconds = 0;

    program = argv[0];
    for (int o; (o = getopt_long(argc, argv, "", options, NULL)) != -1;) {
        if (o == 's')
            first = last = strtoull(optarg, NULL, 10);
        else if (o == 'r' && sscanf(optarg, "%llu..%llu", &first, &last) == 2)
            ;
        else if (o == 't')
            seconds = strtod(optarg, NULL);
        else if (o == 'n')
            steps = strtoull(optarg, NULL, 10);
        else if (o == 'l')
            list = optarg;
        else if (o == '2')
            twice = true;
        else if (o == 'x')
            no_self_check = true;
        else if (o == 'v')
            verbose = true;
        else
            return usage(), o == 'h' ? 0 : 2;
    }
    fk_log_set_level(verbose ? FK_LOG_DEBUG : FK_LOG_OFF);
    catch_signals();
    uint64_t start = fk_clock_ns();
    if (list)
        run_list(list, steps, &t);
    else if (seconds > 0)
        run_for(seconds, steps, &t);
    else
        for (unsigned long long seed = first; seed <= last; seed++)
            twice ? run_twice(seed, steps, &t) : (void)run_seed(seed, steps, verbose, &t);
    print_totals(&t, (double)(fk_clock_ns() - start) / 1e9);
    return 0;
}
