/* team.c - see team.h. */
#include "copy/team.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>

#include "base/util.h"

/* Small enough that a cancelled job stops soon and threads end together, large enough that
 * taking a portion costs nothing. */
#define PORTION_BYTES (1 * FK_MIB)

struct work {
    const struct fk_copy_backend *backend;
    const struct fk_copy_target *target;
    const struct fk_copy_blocks *blocks;
    _Atomic bool *cancelled;
    uint32_t portion;
    _Atomic uint32_t next;
    _Atomic uint32_t failed_at;     /* the first block that failed */
    _Atomic int status;
};

struct fk_team {
    unsigned n_helpers;
    pthread_t *helpers;
    pthread_mutex_t lock;
    pthread_cond_t start, done;
    struct work *work;              /* NULL: nothing to do */
    unsigned round, busy;           /* round: so that a helper joins each work once */
    bool stop;
};

static void portion_failed(struct work *w, uint32_t at, int status)
{
    uint32_t seen = atomic_load(&w->failed_at);

    while (at < seen)
        if (atomic_compare_exchange_weak(&w->failed_at, &seen, at)) {
            atomic_store(&w->status, status);
            return;
        }
}

static void do_work(struct work *w)
{
    const struct fk_copy_blocks *all = w->blocks;

    while (!atomic_load_explicit(w->cancelled, memory_order_relaxed) &&
           atomic_load_explicit(&w->failed_at, memory_order_relaxed) == FK_NONE) {
        uint32_t at = atomic_fetch_add(&w->next, w->portion);
        if (at >= all->n)
            return;
        struct fk_copy_blocks part = {
            .slots = all->slots + at, .pages = all->pages + at,
            .n = fk_min(w->portion, all->n - at), .to_engine = all->to_engine,
        };
        uint32_t done = 0;
        int rc = w->backend->run(w->target, &part, &done);
        if (rc)
            portion_failed(w, at + done, rc);
    }
}

static void *helper(void *arg)
{
    struct fk_team *team = arg;
    unsigned seen = 0;

    pthread_mutex_lock(&team->lock);
    for (;;) {
        while (!team->stop && (!team->work || team->round == seen))
            pthread_cond_wait(&team->start, &team->lock);
        if (team->stop)
            break;
        struct work *w = team->work;
        seen = team->round;
        team->busy++;
        pthread_mutex_unlock(&team->lock);
        do_work(w);
        pthread_mutex_lock(&team->lock);
        if (--team->busy == 0)
            pthread_cond_signal(&team->done);
    }
    pthread_mutex_unlock(&team->lock);
    return NULL;
}

int fk_team_create(unsigned threads, struct fk_team **out)
{
    struct fk_team *team = calloc(1, sizeof(*team));

    if (!team)
        return -ENOMEM;
    pthread_mutex_init(&team->lock, NULL);
    pthread_cond_init(&team->start, NULL);
    pthread_cond_init(&team->done, NULL);
    team->helpers = calloc(threads, sizeof(*team->helpers));
    while (team->helpers && team->n_helpers + 1 < threads) {
        if (pthread_create(&team->helpers[team->n_helpers], NULL, helper, team))
            break;      /* fewer hands do the same work */
        team->n_helpers++;
    }
    *out = team;
    return 0;
}

void fk_team_destroy(struct fk_team *team)
{
    if (!team)
        return;
    pthread_mutex_lock(&team->lock);
    team->stop = true;
    pthread_cond_broadcast(&team->start);
    pthread_mutex_unlock(&team->lock);
    for (unsigned i = 0; i < team->n_helpers; i++)
        pthread_join(team->helpers[i], NULL);
    pthread_mutex_destroy(&team->lock);
    pthread_cond_destroy(&team->start);
    pthread_cond_destroy(&team->done);
    free(team->helpers);
    free(team);
}

static uint32_t portion_of(const struct fk_copy_target *t)
{
    uint64_t bytes = 0;

    for (uint32_t r = 0; r < t->n_regions; r++)
        bytes += t->regions[r].page_bytes;
    return (uint32_t)fk_max(PORTION_BYTES / fk_max(bytes, (uint64_t)1), (uint64_t)1);
}

uint32_t fk_team_copy(struct fk_team *team, const struct fk_copy_backend *backend,
                      const struct fk_copy_target *target, const struct fk_copy_blocks *blocks,
                      _Atomic bool *cancelled, int *status)
{
    struct work w = { .backend = backend, .target = target, .blocks = blocks,
                      .cancelled = cancelled, .portion = portion_of(target),
                      .failed_at = FK_NONE };
    bool help = team->n_helpers && blocks->n > w.portion;

    if (help) {
        pthread_mutex_lock(&team->lock);
        team->work = &w;
        team->round++;
        pthread_cond_broadcast(&team->start);
        pthread_mutex_unlock(&team->lock);
    }
    do_work(&w);
    if (help) {
        pthread_mutex_lock(&team->lock);
        team->work = NULL;      /* helpers that have not begun need not */
        while (team->busy)
            pthread_cond_wait(&team->done, &team->lock);
        pthread_mutex_unlock(&team->lock);
    }
    *status = atomic_load(&w.status);
    return fk_min(fk_min(atomic_load(&w.next), blocks->n), atomic_load(&w.failed_at));
}
