/*
 * net.c - the program: one world from its seed, totals. See net.h for the rooms, docs/simulator.md for use,
 * tests/simulator for options and seeds.
 */
#include "net.h"

#include <stdarg.h>
#include <stdio.h>

#include "driver.h"

/* ---- failing ---- */

static struct net_counts totals;

void net_fail(struct net_world *w __attribute__((unused)), const char *fmt, ...)
{
    char text[512];
    va_list ap;

    va_start(ap, fmt);
    vsnprintf(text, sizeof(text), fmt, ap);
    va_end(ap);
    driver_fail(text);
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

/* ---- one seed ---- */

static uint64_t play(uint64_t seed, uint64_t steps, bool verbose)
{
    struct net_world *w = net_world_new(seed, verbose, driver_no_self_check);

    driver_plays(seed, &w->step, 300);
    for (w->step = 0; w->step < steps; w->step++) {
        net_world_step(w);
        if (w->step % 1000 == 999 && w->step + 1 < steps)
            net_world_quiet(w);
    }
    net_world_quiet(w);
    uint64_t trace = w->trace;
    driver_plays(seed, NULL, 0);
    net_world_free(w, &totals);
    return trace;
}

static void print_totals(double seconds)
{
    const struct net_counts *t = &totals;

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
    printf("netsim: store: %llu blocks read, %llu handed on by peers, %llu slots in quarantine; %llu written, %llu evicted, %llu "
           "resets, %llu leftovers\n", (unsigned long long)t->store_reads, (unsigned long long)t->store_handed_on,
           (unsigned long long)t->store_late, (unsigned long long)t->store_writes, (unsigned long long)t->store_evicted,
           (unsigned long long)t->store_resets, (unsigned long long)t->store_leftovers);
}

int main(int argc, char **argv)
{
    static const struct driver driver = { .name = "netsim", .self_check = "fk_core_check and fk_peers_check", .last = 20,
                                          .steps = 2000, .play = play, .totals = print_totals };

    return driver_main(&driver, argc, argv);
}
