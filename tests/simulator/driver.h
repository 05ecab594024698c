/*
 * driver.h - what the simulators' programs have in common (tests/sim, tests/net, tests/cluster): options, lists of seeds,
 * fresh seeds for so many seconds, each seed twice, and the line that replays a failure. A simulator gives a function that
 * plays one world, and calls driver_fail when a rule is broken. One thread.
 */
#ifndef SIMULATOR_DRIVER_H
#define SIMULATOR_DRIVER_H

#include <stdbool.h>
#include <stdint.h>

struct driver {
    const char *name;
    const char *self_check;             /* what --no-self-check leaves out; NULL: there is no such option */
    unsigned long long last, steps;     /* without options: seeds from 1 to that; steps of each */
    /* Plays a world to its end; the result says whether two were the same. */
    uint64_t (*play)(uint64_t seed, uint64_t steps, bool verbose);
    void (*totals)(double seconds);     /* prints what was played, all in all */
};

int driver_main(const struct driver *driver, int argc, char **argv);

extern bool driver_no_self_check;

/* Said by play: this world is being played, its steps are counted there, and none takes longer than so many seconds
 * (NULL: it is over). */
void driver_plays(uint64_t seed, const uint64_t *step, unsigned seconds);
void driver_fail(const char *broken) __attribute__((noreturn));

#endif
