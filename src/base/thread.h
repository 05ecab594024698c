/* thread.h - how threads of ours share the processor with those that they work for. */
#ifndef FK_BASE_THREAD_H
#define FK_BASE_THREAD_H

#include <sched.h>

/*
 * For a thread that others wake in passing, an engine's scheduler above all: being woken it does not
 * take the processor away from who woke it (Linux does that else, if both happen to sleep and wake on the
 * same one), but gets an idle one, or its turn. Threads that it makes inherit this.
 */
static inline void fk_thread_stand_back(void)
{
    struct sched_param p = { 0 };

    (void)sched_setscheduler(0, SCHED_BATCH, &p);
}

#endif
