/* clock.h - monotonic time for the shells. The core never calls this: it is told the time. */
#ifndef FK_BASE_CLOCK_H
#define FK_BASE_CLOCK_H

#include <stdint.h>
#include <time.h>

static inline uint64_t fk_clock_ns(void)
{
    struct timespec ts;

    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

static inline uint64_t fk_clock_us(void)
{
    return fk_clock_ns() / 1000;
}

/* CPU time used by the whole process. */
static inline uint64_t fk_clock_process_cpu_ns(void)
{
    struct timespec ts;

    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &ts);
    return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

/* An answer that takes less time than falling asleep and waking up is waited for awake: for so long, looking
 * every so often. */
#define FK_SPIN_US 150u
#define FK_SPIN_PAUSE_US 2u

static inline void fk_pause_us(unsigned us)
{
    uint64_t end = fk_clock_us() + us;

    while (fk_clock_us() < end)
        ;
}

#endif
