/*
 * handle.c - the life of a node or an agent under Python's rules: any thread may close it, it may
 * be collected at any time, the process may fork, the interpreter may end. See flexkv_py.h.
 *
 * `users` is taken under the GIL, together with the look at `life`, and given back without it: at
 * the end of the interpreter a daemon thread never gets the GIL again, and close must not wait for
 * it.
 */
#include <pthread.h>
#include <time.h>
#include <unistd.h>

#include "flexkv_py.h"

static unsigned fork_count;         /* how many forks lie between the first process and this one */

static void count_fork(void)
{
    fork_count++;
}

int fkpy_handles_init(void)
{
    static bool done;

    if (done)
        return 0;
    done = true;
    return pthread_atfork(NULL, NULL, count_fork);
}

void fkpy_handle_open(struct fkpy_handle *h, void *object, struct fkpy_handle **list)
{
    h->object = object;
    h->fork_count = fork_count;
    h->next = *list;
    h->link = list;
    if (h->next)
        h->next->link = &h->next;
    *list = h;
    atomic_store(&h->life, FKPY_OPEN);
}

static void unlink_handle(struct fkpy_handle *h)
{
    *h->link = h->next;
    if (h->next)
        h->next->link = h->link;
}

static void wake_waiting_calls(const struct fkpy_handle *h)
{
    uint64_t one = 1;

    if (h->wake_fd >= 0 && write(h->wake_fd, &one, sizeof(one)) < 0)
        return;                     /* only a full counter, which is readable as well */
}

static void nap(void)
{
    nanosleep(&(struct timespec){ .tv_nsec = 200000 }, NULL);
}

/* Without the GIL. The calls end soon: those that wait watch wake_fd or have a deadline. */
static void finish_close(struct fkpy_handle *h)
{
    wake_waiting_calls(h);
    while (atomic_load(&h->users))
        nap();
    h->close(h->object);
    h->object = NULL;
    if (h->wake_fd >= 0)
        close(h->wake_fd);
    h->wake_fd = -1;
    atomic_store(&h->life, FKPY_CLOSED);
}

void fkpy_handle_close(struct fkpy_handle *h)
{
    /* In a child of fork() the library's threads and locks are gone: nothing can be closed. */
    if (h->fork_count != fork_count || atomic_load(&h->life) == FKPY_CLOSED)
        return;
    bool first = atomic_load(&h->life) == FKPY_OPEN;
    if (first) {
        unlink_handle(h);
        atomic_store(&h->life, FKPY_CLOSING);
    }
    PyThreadState *thread = PyEval_SaveThread();
    if (first)
        finish_close(h);            /* whoever waits below may free h at once */
    else
        while (atomic_load(&h->life) != FKPY_CLOSED)
            nap();
    PyEval_RestoreThread(thread);
}

void fkpy_handle_drop(struct fkpy_handle *h)
{
    fkpy_handle_close(h);
    if (atomic_load(&h->life) == FKPY_OPEN)
        unlink_handle(h);           /* the parent process's */
}

/* Agents first: they are what still writes to the engine's memory. */
void fkpy_handles_close_all(struct fkpy_state *state)
{
    while (state->agents && state->agents->fork_count == fork_count)
        fkpy_handle_close(state->agents);
    while (state->subscriptions && state->subscriptions->fork_count == fork_count)
        fkpy_handle_close(state->subscriptions);
    while (state->nodes && state->nodes->fork_count == fork_count)
        fkpy_handle_close(state->nodes);
}

bool fkpy_call_begin(struct fkpy_call *c, struct fkpy_state *state, struct fkpy_handle *h,
                     bool release_gil)
{
    if (h->fork_count != fork_count || atomic_load(&h->life) != FKPY_OPEN) {
        char text[120];
        PyOS_snprintf(text, sizeof(text), atomic_load(&h->life) == FKPY_OPEN
                      ? "the %s belongs to the parent process: it does not survive fork()"
                      : "the %s is closed", h->name);
        fkpy_raise_text(state, EBADF, text);
        return false;
    }
    atomic_fetch_add(&h->users, 1);
    c->handle = h;
    c->thread = release_gil ? PyEval_SaveThread() : NULL;
    return true;
}

void fkpy_call_end(struct fkpy_call *c)
{
    atomic_fetch_sub(&c->handle->users, 1);
    if (c->thread)
        PyEval_RestoreThread(c->thread);
}
