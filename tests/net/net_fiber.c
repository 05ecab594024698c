/* net_fiber.c - see net_fiber.h. */
#include "net_fiber.h"

#include <pthread.h>
#include <time.h>
#include <ucontext.h>

#if defined(__has_feature)              /* clang's way to say it */
#define FIBER_ASAN __has_feature(address_sanitizer)
#define FIBER_TSAN __has_feature(thread_sanitizer)
#else
#ifdef __SANITIZE_ADDRESS__
#define FIBER_ASAN 1
#endif
#ifdef __SANITIZE_THREAD__
#define FIBER_TSAN 1
#endif
#endif

#if FIBER_ASAN
#include <sanitizer/common_interface_defs.h>
#define STACK_BYTES (256u << 10)
#else
#define STACK_BYTES (64u << 10)
#endif
#if FIBER_TSAN
#include <sanitizer/tsan_interface.h>
#endif

enum fiber_state { FIBER_READY, FIBER_WAITS, FIBER_SLEEPS, FIBER_OVER };

struct net_fiber {
    ucontext_t context;
    struct net_node *node;
    void *(*main)(void *);
    void *arg, *stack;
    enum fiber_state state;
    pthread_cond_t *cond;               /* WAITS */
    uint64_t until_us;                  /* WAITS: its node's clock; SLEEPS: real */
    bool timed_out;
#if FIBER_TSAN
    void *tsan;
#endif
};

static struct net_fiber *current;       /* NULL: none, the simulator itself */
static ucontext_t simulator;
static struct net_node *node_now;       /* net_fibers_of */
static pthread_cond_t *node_waits;      /* what the simulator itself waits for, in its name */
static FK_VEC(void *) stacks;           /* free ones */

struct net_node *net_fiber_node(void)
{
    return current ? current->node : NULL;
}

void net_fibers_of(struct net_node *p)
{
    node_now = p;
}

/* ---- turns ---- */

#if FIBER_ASAN
static const void *simulator_stack;
static size_t simulator_bytes;
#endif
#if FIBER_TSAN
static void *simulator_tsan;
#endif

/* To the fiber, until it gives up its turn. */
static void turn(struct net_fiber *f)
{
    current = f;
#if FIBER_ASAN
    void *fake;
    __sanitizer_start_switch_fiber(&fake, f->stack, STACK_BYTES);
#endif
#if FIBER_TSAN
    simulator_tsan = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(f->tsan, 0);
#endif
    swapcontext(&simulator, &f->context);
#if FIBER_ASAN
    __sanitizer_finish_switch_fiber(fake, NULL, NULL);
#endif
    current = NULL;
}

/* Back to the simulator, until the next turn. */
static void give_up_turn(void)
{
    struct net_fiber *f = current;

#if FIBER_ASAN
    void *fake = NULL;
    __sanitizer_start_switch_fiber(f->state == FIBER_OVER ? NULL : &fake, simulator_stack, simulator_bytes);
#endif
#if FIBER_TSAN
    __tsan_switch_to_fiber(simulator_tsan, 0);
#endif
    swapcontext(&f->context, &simulator);
#if FIBER_ASAN
    __sanitizer_finish_switch_fiber(fake, &simulator_stack, &simulator_bytes);
#endif
}

static void begin(void)
{
#if FIBER_ASAN
    __sanitizer_finish_switch_fiber(NULL, &simulator_stack, &simulator_bytes);
#endif
    current->main(current->arg);
    current->state = FIBER_OVER;
    give_up_turn();
}

static int fiber_new(struct net_node *p, void *(*main)(void *), void *arg)
{
    struct net_fiber *f = calloc(1, sizeof(*f));

    if (!f)
        return EAGAIN;
    f->stack = stacks.len ? stacks.data[--stacks.len] : malloc(STACK_BYTES);
    if (!f->stack || getcontext(&f->context) || fk_vec_push(&p->fibers, f))
        abort();
    f->node = p;
    f->main = main;
    f->arg = arg;
    f->context.uc_stack.ss_sp = f->stack;
    f->context.uc_stack.ss_size = STACK_BYTES;
    makecontext(&f->context, begin, 0);
#if FIBER_TSAN
    f->tsan = __tsan_create_fiber(0);
#endif
    return 0;
}

static void fiber_free(struct net_fiber *f)
{
#if FIBER_TSAN
    __tsan_destroy_fiber(f->tsan);
#endif
    if (fk_vec_push(&stacks, f->stack))
        free(f->stack);
    free(f);
}

/* ---- who can go on ---- */

static bool is_due(struct net_world *w, const struct net_fiber *f)
{
    return f->state == FIBER_READY || (f->state == FIBER_SLEEPS && f->until_us <= w->net.now_us) ||
           (f->state == FIBER_WAITS && f->until_us <= net_now(w, f->node));
}

static void go_on(struct net_node *p, size_t at)
{
    struct net_fiber *f = p->fibers.data[at];

    f->timed_out = f->state == FIBER_WAITS;
    f->state = FIBER_READY;
    turn(f);
    if (f->state != FIBER_OVER)
        return;
    for (at = 0; p->fibers.data[at] != f; at++)         /* it may have made some */
        ;
    p->fibers.data[at] = p->fibers.data[--p->fibers.len];
    fiber_free(f);
}

static bool run_one(struct net_world *w, struct net_node *p)
{
    uint32_t n = (uint32_t)p->fibers.len, first = n > 1 ? net_below(w, n) : 0;

    for (uint32_t k = 0; k < n; k++) {
        uint32_t at = (first + k) % n;
        if (is_due(w, p->fibers.data[at])) {
            go_on(p, at);
            return true;
        }
    }
    return false;
}

static bool any_due(struct net_world *w, const struct net_node *p)
{
    for (size_t i = 0; i < p->fibers.len; i++)
        if (is_due(w, p->fibers.data[i]))
            return true;
    return false;
}

void net_fibers_run(struct net_world *w, struct net_node *p)
{
    uint32_t turns = 0;

    while (any_due(w, p) && run_one(w, p))
        NET_CHECK(w, ++turns < 10000, "a thread of node %u's store does not sleep", net_at(w, p));
}

uint64_t net_fibers_next(struct net_world *w, const struct net_node *p)
{
    uint64_t next = UINT64_MAX;

    for (size_t i = 0; i < p->fibers.len; i++) {
        const struct net_fiber *f = p->fibers.data[i];
        next = fk_min(next, f->state == FIBER_READY ? w->net.now_us : f->state == FIBER_SLEEPS ? f->until_us
                            : cs_real(net_client(w, p), f->until_us));
    }
    return next;
}

void net_fibers_kill(struct net_node *p)
{
    for (size_t i = 0; i < p->fibers.len; i++)
        fiber_free(p->fibers.data[i]);
    fk_vec_free(&p->fibers);
}

void net_fibers_hurry(struct net_world *w, struct net_node *p, uint64_t us)
{
    for (size_t i = 0; i < p->fibers.len; i++)
        if (p->fibers.data[i]->state == FIBER_SLEEPS)
            p->fibers.data[i]->until_us = fk_min(p->fibers.data[i]->until_us, w->net.now_us + us);
}

void net_fiber_sleep(uint64_t us)
{
    current->state = FIBER_SLEEPS;
    current->until_us = net_current->net.now_us + us;
    give_up_turn();
}

/* The simulator waits in the node's name: time goes by for its fibers alone. False: none is left that could do something. */
static bool one_goes_on(struct net_node *p)
{
    if (run_one(net_current, p))
        return true;
    for (size_t i = 0; i < p->fibers.len; i++)
        if (p->fibers.data[i]->state == FIBER_SLEEPS) {
            go_on(p, i);
            return true;
        }
    return false;
}

/* ---- what the linker puts in their places ---- */

int __real_pthread_create(pthread_t *id, const pthread_attr_t *attr, void *(*main)(void *), void *arg);
int __wrap_pthread_create(pthread_t *id, const pthread_attr_t *attr, void *(*main)(void *), void *arg);
int __wrap_pthread_create(pthread_t *id, const pthread_attr_t *attr, void *(*main)(void *), void *arg)
{
    struct net_node *p = current ? current->node : node_now;

    return p ? fiber_new(p, main, arg) : __real_pthread_create(id, attr, main, arg);
}

static int wait_for(pthread_cond_t *c, pthread_mutex_t *lock, uint64_t until_us)
{
    struct net_fiber *f = current;

    pthread_mutex_unlock(lock);
    if (f) {
        f->state = FIBER_WAITS;
        f->cond = c;
        f->until_us = until_us;
        give_up_turn();
    } else {
        node_waits = c;
        while (node_waits && one_goes_on(node_now))
            ;
    }
    pthread_mutex_lock(lock);
    return (f ? f->timed_out : node_waits != NULL) ? ETIMEDOUT : 0;
}

int __wrap_pthread_cond_wait(pthread_cond_t *c, pthread_mutex_t *lock);
int __wrap_pthread_cond_wait(pthread_cond_t *c, pthread_mutex_t *lock)
{
    return wait_for(c, lock, UINT64_MAX);
}

int __wrap_pthread_cond_timedwait(pthread_cond_t *c, pthread_mutex_t *lock, const struct timespec *until);
int __wrap_pthread_cond_timedwait(pthread_cond_t *c, pthread_mutex_t *lock, const struct timespec *until)
{
    return wait_for(c, lock, (uint64_t)until->tv_sec * 1000000u + (uint64_t)until->tv_nsec / 1000);
}

static int wake_some(pthread_cond_t *c, bool all)
{
    struct net_world *w = net_current;

    if (node_waits == c)
        node_waits = NULL;
    for (uint32_t n = 0; n < NET_NODES; n++) {
        struct net_node *p = &w->node[n];
        uint32_t k = (uint32_t)p->fibers.len, first = k > 1 && !all ? net_below(w, k) : 0;
        for (uint32_t i = 0; i < k; i++) {
            struct net_fiber *f = p->fibers.data[(first + i) % k];
            if (f->state != FIBER_WAITS || f->cond != c)
                continue;
            f->state = FIBER_READY;
            if (!all)
                return 0;
        }
    }
    return 0;
}

int __wrap_pthread_cond_signal(pthread_cond_t *c);
int __wrap_pthread_cond_signal(pthread_cond_t *c)
{
    return wake_some(c, false);
}

int __wrap_pthread_cond_broadcast(pthread_cond_t *c);
int __wrap_pthread_cond_broadcast(pthread_cond_t *c)
{
    return wake_some(c, true);
}

int __real_clock_gettime(clockid_t clock, struct timespec *out);
int __wrap_clock_gettime(clockid_t clock, struct timespec *out);
int __wrap_clock_gettime(clockid_t clock, struct timespec *out)
{
    struct net_node *p = current ? current->node : node_now;

    if (!p || clock != CLOCK_MONOTONIC)
        return __real_clock_gettime(clock, out);
    uint64_t us = net_now(net_current, p);
    *out = (struct timespec){ (time_t)(us / 1000000), (long)(us % 1000000 * 1000) };
    return 0;
}
