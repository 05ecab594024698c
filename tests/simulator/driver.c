/* driver.c - see driver.h. */
#include "driver.h"

#include <getopt.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/log.h"
#include "base/util.h"

bool driver_no_self_check;

static const struct driver *driver;
static const char *program;
static uint64_t playing_seed;
static const uint64_t *playing_step;    /* NULL: none is being played */

/* ---- failing ---- */

static void fail_line(const char *text)
{
    unsigned long long step = playing_step ? *playing_step : 0;

    fflush(stdout);
    printf("%s: FAIL seed=%llu step=%llu invariant=\"%s\" replay: %s --seed %llu --steps %llu\n", driver->name,
           (unsigned long long)playing_seed, step, text, program, (unsigned long long)playing_seed, step + 1);
    fflush(stdout);
}

void driver_fail(const char *broken)
{
    fail_line(broken);
    _exit(1);
}

void driver_plays(uint64_t seed, const uint64_t *step, unsigned seconds)
{
    playing_seed = seed;
    playing_step = step;
    alarm(seconds);
}

static void on_signal(int sig)
{
    if (playing_step)
        fail_line(sig == SIGALRM ? "a step does not end" : strsignal(sig));
    _exit(1);
}

static void catch_signals(void)
{
    static const int sigs[] = { SIGSEGV, SIGBUS, SIGABRT, SIGFPE, SIGILL, SIGALRM };

    for (size_t i = 0; i < fk_array_size(sigs); i++)
        signal(sigs[i], on_signal);
}

/* ---- seeds ---- */

static void run_list(const char *path, uint64_t steps)
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
        driver->play(seed, n, false);
    }
    fclose(f);
}

static void run_for(double seconds, uint64_t steps)
{
    uint64_t seed, end = fk_clock_ns() + (uint64_t)(seconds * 1e9);

    if (getrandom(&seed, sizeof(seed), 0) != sizeof(seed))
        seed = fk_clock_ns();
    seed %= 1000000000;
    printf("%s: fresh seeds from %llu\n", driver->name, (unsigned long long)seed);
    for (; fk_clock_ns() < end; seed++)
        driver->play(seed, steps, false);
}

/* The same seed twice gives the same world. */
static void run_twice(uint64_t seed, uint64_t steps)
{
    uint64_t a = driver->play(seed, steps, false), b = driver->play(seed, steps, false);

    if (a != b) {
        printf("%s: FAIL seed=%llu invariant=\"two runs of one seed differ\" replay: %s --twice --seed %llu --steps %llu\n",
               driver->name, (unsigned long long)seed, program, (unsigned long long)seed, (unsigned long long)steps);
        exit(1);
    }
}

/* ---- the program ---- */

static int usage(int rc)
{
    printf("usage: %s [--seed N | --seeds A..B | --seconds S | --list FILE] [--steps N] [--twice] [--verbose]\n"
           "  --seed N      one world\n  --seeds A..B  all from A to B (1..%llu)\n"
           "  --seconds S   fresh seeds for so long\n"
           "  --list FILE   seeds (and steps) of a file, one per line, # comments\n"
           "  --steps N     steps of each world (%llu)\n  --twice       run each seed twice and compare\n",
           driver->name, driver->last, driver->steps);
    if (driver->self_check)
        printf("  --no-self-check  leave out %s\n", driver->self_check);
    printf("  --verbose     print what happens\n");
    return rc;
}

int driver_main(const struct driver *d, int argc, char **argv)
{
    static const struct option options[] = {
        { "seed", required_argument, NULL, 's' }, { "seeds", required_argument, NULL, 'r' },
        { "seconds", required_argument, NULL, 't' }, { "steps", required_argument, NULL, 'n' },
        { "list", required_argument, NULL, 'l' }, { "twice", no_argument, NULL, '2' },
        { "no-self-check", no_argument, NULL, 'x' }, { "verbose", no_argument, NULL, 'v' },
        { "help", no_argument, NULL, 'h' }, { 0 },
    };
    unsigned long long first = 1, last = d->last, steps = d->steps;
    const char *list = NULL;
    bool verbose = false, twice = false;
    double seconds = 0;

    driver = d;
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
        else if (o == 'x' && d->self_check)
            driver_no_self_check = true;
        else if (o == 'v')
            verbose = true;
        else
            return usage(o == 'h' ? 0 : 2);
    }
    fk_log_set_level(verbose ? FK_LOG_DEBUG : FK_LOG_OFF);
    catch_signals();
    uint64_t start = fk_clock_ns();
    if (list)
        run_list(list, steps);
    else if (seconds > 0)
        run_for(seconds, steps);
    else
        for (unsigned long long seed = first; seed <= last; seed++)
            twice ? run_twice(seed, steps) : (void)d->play(seed, steps, verbose);
    d->totals((double)(fk_clock_ns() - start) / 1e9);
    return 0;
}
