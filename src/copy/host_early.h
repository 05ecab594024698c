/*
 * host_early.h - for tests alone: with FKTEST_EARLY_MS in a worker's environment the host copier says that a copy is
 * on its way, waits so many milliseconds, and only then makes it; so that what is around early loads runs, and is
 * seen to wait, where there is no GPU. Callers: copier.c; the thread that copies, and the engine's.
 */
#ifndef FK_COPY_HOST_EARLY_H
#define FK_COPY_HOST_EARLY_H

#include <pthread.h>

#include "copy/copier.h"

struct fk_host_early {
    unsigned ms;                        /* 0: not asked for */
    pthread_mutex_t lock;
    pthread_cond_t changed;
    uint64_t said, done;                /* copies; they are made in order */
};

void fk_host_early_open(struct fk_host_early *e);
void fk_host_early_close(struct fk_host_early *e);
/* Around the copy. begin: true, and it was said: it must be made now, whatever is cancelled. */
bool fk_host_early_begin(struct fk_host_early *e, const struct fk_copy_progress *progress);
void fk_host_early_end(struct fk_host_early *e);
/* fk_copier_wait_event: the caller itself waits. */
int fk_host_early_wait(struct fk_host_early *e, void *event);

#endif
