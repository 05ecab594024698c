/*
 * sim.c - the simulator's program: options, seeds, the step loop, and the line that replays
 * a failure. See sim.h for the rooms, docs/simulator.md for use.
 */
#include "sim.h"

#include <getopt.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/random.h>

#include "base/clock.h"
#include "base/log.h"

static struct sim *current;             /* for the signal handler */
static const char *program;
static bool no_self_check;

/* ---- failing ---------------------------------------------------------------------------------- */

static void fail_line(const struct sim *s, const char *text)
{
    fflush(stdout);
    printf("sim: FAIL seed=%llu step=%llu invariant=\"%s\" replay: %s --seed %llu --steps %llu\n",
           (unsigned long long)s->seed, (unsigned long long)s->step, text, program,
           (unsigned long long)s->seed, (unsigned long long)s->step + 1);
    fflush(stdout);
}

void sim_fail(struct sim *s, const char *fmt, ...)
{
    char text[512];
    va_list ap;

    va_start(ap, fmt);
    vsnprintf(text, sizeof(text), fmt, ap);
    va_end(ap);
    fail_line(s, text);
    _exit(1);
}

void sim_trace(struct sim *s, const char *fmt, ...)
{
    va_list ap;

    printf("%6llu %9llu ", (unsigned long long)s->step, (unsigned long long)s->now);
    va_start(ap, fmt);
    vprintf(fmt, ap);
    va_end(ap);
    putchar('\n');
}

static void on_signal(int sig)
{
    if (current)
        fail_line(current, sig == SIGALRM ? "a step does not end" : strsignal(sig));
    _exit(1);
}

static void catch_signals(void)
{
    static const int sigs[] = { SIGSEGV, SIGBUS, SIGABRT, SIGFPE, SIGILL, SIGALRM };

    for (size_t i = 0; i < fk_array_size(sigs); i++)
        signal(sigs[i], on_signal);
}

/* ---- one step ------------------------------------------------------------------------------------ */

/* To the next thing that is due, or a little; never far past the core's wake-up time. */
static void advance(struct sim *s)
{
    uint64_t next = sim_next_time(s), by = sim_below(s, 50);
    uint64_t wake = fk_core_next_wakeup(s->core);
    struct fk_core_work work = fk_core_work(s->core);

    if (work.jobs || work.ssd || s->n_dones || sim_ssd_waiting(s))  /* somebody could act now */
        next = s->now;
    if (next != UINT64_MAX && next > s->now && !sim_chance(s, 4))
        by = next - s->now;
    else if (next == UINT64_MAX || sim_chance(s, 16))
        by = sim_below(s, 2000);
    uint64_t latest = wake == UINT64_MAX ? UINT64_MAX : fk_max(wake, s->now) + sim_slack(s) / 2;
    s->now = fk_min(s->now + by, fk_max(latest, s->now));
}

static void rare_step(struct sim *s)
{
    const struct sim_config *c = &s->config;
    uint32_t what = sim_below(s, 9);

    if (what == 0 && c->crashes && sim_chance(s, 2))
        sim_crash(s, c->power_loss && sim_chance(s, 2));
    else if (what == 1 && c->reopens && sim_chance(s, 3))
        sim_reopen(s);
    else if (what == 2 && c->resets && sim_chance(s, 3))
        sim_do_reset(s);
    else if (what == 3 && c->dirs_go)
        sim_dirs_step(s);
    else if (what == 4 && c->rot)
        s->rough_since_quiet |= sim_disk_rot(&s->disk, c->faults.tables, &s->rng);
    else if (what == 5 && !c->calm && sim_chance(s, 4))
        sim_do_fail_space(s);
    else if (what == 6 && !c->calm && sim_chance(s, 3))
        sim_do_client_dies(s);
    else if (what == 7 && !c->calm && sim_chance(s, 3))
        sim_agent_dies(s);
    else if (what == 8)
        sim_do_costs(s);
}

static void step(struct sim *s)
{
    uint32_t what = sim_below(s, 100);

    s->now += sim_below(s, 4);
    if (sim_chance(s, 40))
        rare_step(s);
    else if (what < 22)
        sim_caller_step(s);
    else if (what < 52)
        (void)sim_agent_step(s);
    else if (what < 78)
        (void)sim_pump_step(s, false);
    else
        advance(s);
    uint64_t wake = fk_core_next_wakeup(s->core);
    if (wake <= s->now && (sim_chance(s, 2) || wake + sim_slack(s) <= s->now))
        sim_tick(s);
    sim_events_step(s);
    sim_check_cheap(s);
    if (s->step % s->config.scan_every == 0)
        sim_check_full(s);
    if (s->step % s->config.quiet_every == s->config.quiet_every - 1)
        sim_quiesce(s);
    sim_mix(s, s->now);
}

/* ---- one seed ------------------------------------------------------------------------------------- */

struct totals {
    uint64_t seeds, steps, got, failed, put, ops, crashes, found, busy, evictions, reads;
};

static void world_free(struct sim *s)
{
    fk_vec_free(&s->keys);
    fk_vec_free(&s->job_uses);
    fk_vec_free(&s->reqs);
    fk_vec_free(&s->found);
    free(s->key_table);
    free(s);
}

static uint64_t run_seed(uint64_t seed, uint64_t steps, bool verbose, struct totals *t)
{
    struct sim *s = calloc(1, sizeof(*s));
    uint64_t trace;

    if (!s)
        abort();
    s->seed = seed;
    s->rng = seed;
    s->rng = fk_rng_next(&s->rng);      /* neighbours must not share their streams */
    s->verbose = verbose;
    s->no_self_check = no_self_check;
    s->now = 1000000;
    current = s;
    alarm(120);
    sim_config_draw(s);
    if (verbose)
        sim_config_print(s);
    sim_node_create(s, "/sim");
    for (s->step = 0; s->step < steps; s->step++)
        step(s);
    sim_quiesce(s);
    sim_node_destroy(s);
    t->seeds++;
    t->steps += steps;
    t->ops += s->done_ops;
    t->got += s->got_blocks;
    t->failed += s->failed_blocks;
    t->put += s->put_blocks;
    t->crashes += s->crashes;
    t->found += s->found_blocks;
    t->busy += s->busy_pages;
    t->evictions += s->evictions;
    t->reads += s->ssd_reads;
    trace = s->trace;
    current = NULL;
    world_free(s);
    return trace;
}

/* ---- the program ------------------------------------------------------------------------------------ */

static void run_list(const char *path, uint64_t steps, struct totals *t)
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

static void run_for(double seconds, uint64_t steps, struct totals *t)
{
    uint64_t seed, end = fk_clock_ns() + (uint64_t)(seconds * 1e9);

    if (getrandom(&seed, sizeof(seed), 0) != sizeof(seed))
        seed = fk_clock_ns();
    seed %= 1000000000;
    printf("sim: fresh seeds from %llu\n", (unsigned long long)seed);
    for (; fk_clock_ns() < end; seed++)
        run_seed(seed, steps, false, t);
}

/* The same seed twice gives the same world. */
static void run_twice(uint64_t seed, uint64_t steps, struct totals *t)
{
    uint64_t a = run_seed(seed, steps, false, t), b = run_seed(seed, steps, false, t);

    if (a != b) {
        printf("sim: FAIL seed=%llu invariant=\"two runs of one seed differ\" replay: %s --twice "
               "--seed %llu --steps %llu\n", (unsigned long long)seed, program,
               (unsigned long long)seed, (unsigned long long)steps);
        exit(1);
    }
}

static void print_totals(const struct totals *t, double seconds)
{
    printf("sim: ok: %llu seeds, %llu steps in %.2f s, %.0f steps/s\n"
           "sim: %llu operations, blocks: %llu put, %llu got, %llu not got, %llu read from ssd, "
           "%llu removed; %llu crashes, %llu blocks found again, %llu left pages busy\n",
           (unsigned long long)t->seeds, (unsigned long long)t->steps, seconds,
           (double)t->steps / seconds, (unsigned long long)t->ops, (unsigned long long)t->put,
           (unsigned long long)t->got, (unsigned long long)t->failed,
           (unsigned long long)t->reads, (unsigned long long)t->evictions,
           (unsigned long long)t->crashes, (unsigned long long)t->found,
           (unsigned long long)t->busy);
}

static void usage(void)
{
    printf("usage: sim [--seed N | --seeds A..B | --seconds S | --list FILE] [--steps N] "
           "[--twice] [--verbose]\n"
           "  --seed N      one world\n  --seeds A..B  all from A to B\n"
           "  --seconds S   fresh seeds for so long\n"
           "  --list FILE   seeds (and steps) of a file, one per line, # comments\n"
           "  --steps N     steps of each world (5000)\n"
           "  --twice       run each seed twice and compare\n"
           "  --no-self-check  leave out fk_core_check: the model alone must find it\n"
           "  --verbose     print every step\n");
}

int main(int argc, char **argv)
{
    static const struct option options[] = {
        { "seed", required_argument, NULL, 's' }, { "seeds", required_argument, NULL, 'r' },
        { "seconds", required_argument, NULL, 't' }, { "steps", required_argument, NULL, 'n' },
        { "list", required_argument, NULL, 'l' }, { "twice", no_argument, NULL, '2' },
        { "no-self-check", no_argument, NULL, 'x' }, { "verbose", no_argument, NULL, 'v' }, { "help", no_argument, NULL, 'h' }, { 0 },
    };
    unsigned long long first = 1, last = 100, steps = 5000;
    double seconds = 0;
    const char *list = NULL;
    bool verbose = false, twice = false;
    struct totals t = { 0 };

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
