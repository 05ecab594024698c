/*
 * sim.c - the simulator's program: the step loop and totals. See sim.h for the rooms, docs/simulator.md for use,
 * tests/simulator for options and seeds.
 */
#include "sim.h"

#include <stdarg.h>
#include <stdio.h>

#include "driver.h"

/* ---- failing ---------------------------------------------------------------------------------- */

void sim_fail(struct sim *s __attribute__((unused)), const char *fmt, ...)
{
    char text[512];
    va_list ap;

    va_start(ap, fmt);
    vsnprintf(text, sizeof(text), fmt, ap);
    va_end(ap);
    driver_fail(text);
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

static struct totals {
    uint64_t seeds, steps, got, failed, put, ops, crashes, found, busy, evictions, reads, early;
} totals;

static void world_free(struct sim *s)
{
    fk_vec_free(&s->keys);
    fk_vec_free(&s->job_uses);
    fk_vec_free(&s->reqs);
    fk_vec_free(&s->found);
    free(s->key_table);
    free(s);
}

static uint64_t play(uint64_t seed, uint64_t steps, bool verbose)
{
    struct totals *t = &totals;
    struct sim *s = calloc(1, sizeof(*s));
    uint64_t trace;

    if (!s)
        abort();
    s->seed = seed;
    s->rng = seed;
    s->rng = fk_rng_next(&s->rng);      /* neighbours must not share their streams */
    s->verbose = verbose;
    s->no_self_check = driver_no_self_check;
    s->now = 1000000;
    driver_plays(seed, &s->step, 120);
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
    t->early += s->early_ops;
    trace = s->trace;
    driver_plays(seed, NULL, 0);
    world_free(s);
    return trace;
}

/* ---- the program ------------------------------------------------------------------------------------ */

static void print_totals(double seconds)
{
    const struct totals *t = &totals;

    printf("sim: ok: %llu seeds, %llu steps in %.2f s, %.0f steps/s\n"
           "sim: %llu operations (%llu gets early), blocks: %llu put, %llu got, %llu not got, %llu read from ssd, "
           "%llu removed; %llu crashes, %llu blocks found again, %llu left pages busy\n",
           (unsigned long long)t->seeds, (unsigned long long)t->steps, seconds,
           (double)t->steps / seconds, (unsigned long long)t->ops, (unsigned long long)t->early,
           (unsigned long long)t->put, (unsigned long long)t->got, (unsigned long long)t->failed,
           (unsigned long long)t->reads, (unsigned long long)t->evictions,
           (unsigned long long)t->crashes, (unsigned long long)t->found,
           (unsigned long long)t->busy);
}

int main(int argc, char **argv)
{
    static const struct driver driver = { .name = "sim", .self_check = "fk_core_check: the model alone must find it",
                                          .last = 100, .steps = 5000, .play = play, .totals = print_totals };

    return driver_main(&driver, argc, argv);
}
