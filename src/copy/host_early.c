/* host_early.c - see host_early.h. An event is the number of the copy. */
#include "copy/host_early.h"

#include <errno.h>
#include <stdlib.h>
#include <time.h>

#include "base/util.h"

#define WAIT_S 30

void fk_host_early_open(struct fk_host_early *e)
{
    const char *ms = getenv("FKTEST_EARLY_MS");

    *e = (struct fk_host_early){ .ms = ms ? (unsigned)fk_min(strtoul(ms, NULL, 10), 1000ul) : 0 };
    pthread_mutex_init(&e->lock, NULL);
    pthread_cond_init(&e->changed, NULL);
}

void fk_host_early_close(struct fk_host_early *e)
{
    pthread_cond_destroy(&e->changed);
    pthread_mutex_destroy(&e->lock);
}

bool fk_host_early_begin(struct fk_host_early *e, const struct fk_copy_progress *progress)
{
    if (!e->ms || !progress || !progress->on_its_way)
        return false;
    pthread_mutex_lock(&e->lock);
    uint64_t number = ++e->said;
    pthread_mutex_unlock(&e->lock);
    progress->on_its_way(progress->arg, (void *)(uintptr_t)number);
    nanosleep(&(struct timespec){ .tv_sec = e->ms / 1000, .tv_nsec = e->ms % 1000 * 1000000l }, NULL);
    return true;
}

void fk_host_early_end(struct fk_host_early *e)
{
    pthread_mutex_lock(&e->lock);
    e->done = e->said;
    pthread_cond_broadcast(&e->changed);
    pthread_mutex_unlock(&e->lock);
}

int fk_host_early_wait(struct fk_host_early *e, void *event)
{
    struct timespec until;
    int rc = 0;

    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += WAIT_S;
    pthread_mutex_lock(&e->lock);
    while (e->done < (uintptr_t)event && !rc)
        rc = pthread_cond_timedwait(&e->changed, &e->lock, &until);
    pthread_mutex_unlock(&e->lock);
    return -rc;
}
