/*
 * layers.c - see layers.h. What SGLang's FlexKV connector speaks, once, at its start:
 *
 *   engine -> agent   four ints: tensor rank and ranks on this machine, layers, counters
 *                     for each counter: one int, its number, and with it the layers' eventfds
 *   agent  -> engine  one byte: 1 taken, 0 refused
 *
 * Its forward pass then reads one eventfd before each layer. It has no way to learn that a load has
 * failed, and what it reads counts as loaded. So a failure takes the place of its descriptors: agent
 * and engine are one process, and each number there that stands for one of these eventfds is made to
 * stand for a file that can't be read (EIO). Then whoever waits is let go. All counters are, not only
 * the load's own: the engine waits for the last of several loads alone.
 *
 * One thread listens; `lock` guards the descriptors.
 */
#include "api/layers.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/log.h"
#include "base/util.h"
#include "ipc/socket.h"

#define HANDSHAKE_US 10000000u

struct header { int32_t rank, ranks, layers, counters; };

struct fk_layers {
    uint32_t n_layers, n_counters, worker;
    int *fds;                           /* [counter][layer] */
    bool failed;                        /* what the engine has of them is unreadable */
    pthread_mutex_t lock;
    struct fk_listener listener;
    pthread_t thread;
    int stop_fd;
};

static void close_all(int *fds, size_t n)
{
    for (size_t i = 0; fds && i < n; i++)
        if (fds[i] >= 0)
            close(fds[i]);
    free(fds);
}

/* ---- the handshake ---- */

/* What came with a message, at most `room`; the rest is closed. */
static size_t take_fds(struct msghdr *m, int *fds, size_t room)
{
    size_t n = 0;

    for (struct cmsghdr *c = CMSG_FIRSTHDR(m); c; c = CMSG_NXTHDR(m, c)) {
        if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS)
            continue;
        size_t got = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        for (size_t i = 0; i < got; i++) {
            int fd;
            memcpy(&fd, CMSG_DATA(c) + i * sizeof(int), sizeof(fd));
            if (n < room)
                fds[n++] = fd;
            else
                close(fd);
        }
    }
    return n;
}

/* Exactly so many bytes, which the kernel never joins with what another message's descriptors came
 * with; n: room for descriptors, then how many came. */
static int receive(int fd, void *buf, size_t bytes, int *fds, size_t *n, uint64_t deadline)
{
    union { char buf[CMSG_SPACE(FK_LAYERS_MAX * sizeof(int))]; struct cmsghdr align; } control;
    size_t room = *n, at = 0;

    *n = 0;
    while (at < bytes) {
        struct iovec v = { (char *)buf + at, bytes - at };
        struct msghdr m = { .msg_iov = &v, .msg_iovlen = 1, .msg_control = control.buf,
                            .msg_controllen = sizeof(control.buf) };
        ssize_t got = recvmsg(fd, &m, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
        if (got > 0) {
            *n += take_fds(&m, fds + *n, room - *n);
            at += (size_t)got;
            continue;
        }
        if (got == 0)
            return -ECONNRESET;
        if (errno == EINTR)
            continue;
        int rc = errno == EAGAIN ? fk_fd_wait(fd, false, deadline) : -errno;
        if (rc)
            return rc;
    }
    return 0;
}

/* Of an eventfd: a number that only it has; 0: it is none, or the kernel does not say. */
static unsigned long eventfd_id(int fd)
{
    char path[64], line[128];
    unsigned long id = 0;

    snprintf(path, sizeof(path), "/proc/self/fdinfo/%d", fd);
    FILE *f = fopen(path, "re");
    while (f && fgets(line, sizeof(line), f))
        if (sscanf(line, "eventfd-id: %lu", &id) == 1) {
            id++;                       /* they begin at 0 */
            break;
        }
    if (f)
        fclose(f);
    return id;
}

static int refuse(const struct fk_layers *l, const char *why)
{
    fk_error("worker %u: an engine's layer counters are refused: %s", l->worker, why);
    return -EPROTO;
}

static int check_header(const struct fk_layers *l, const struct header *h)
{
    char why[160];

    if (h->ranks < 1 || h->rank < 0 || h->rank >= h->ranks || h->counters < 1 ||
        h->counters > (int32_t)FK_LAYER_COUNTERS)
        return refuse(l, "the header makes no sense");
    if (h->layers == (int32_t)l->n_layers)
        return 0;
    snprintf(why, sizeof(why), "it has %d layers, its registered KV cache %u (num_layers of the layout)",
             h->layers, l->n_layers);
    return refuse(l, why);
}

static int receive_counter(const struct fk_layers *l, int fd, int *fds, uint32_t counters,
                           uint64_t deadline)
{
    int got[FK_LAYERS_MAX];
    size_t n = FK_LAYERS_MAX;
    int32_t id = -1;
    int rc = receive(fd, &id, sizeof(id), got, &n, deadline);
    bool ok = !rc && id >= 0 && (uint32_t)id < counters && n == l->n_layers &&
              fds[(uint32_t)id * l->n_layers] < 0;

    for (size_t i = 0; ok && i < n; i++)
        ok = eventfd_id(got[i]) != 0;
    if (ok) {
        memcpy(fds + (uint32_t)id * l->n_layers, got, n * sizeof(int));
        return 0;
    }
    for (size_t i = 0; i < n; i++)
        close(got[i]);
    return rc ? rc : refuse(l, "a counter comes twice, or without an eventfd for each layer");
}

static int receive_all(struct fk_layers *l, int fd)
{
    uint64_t deadline = fk_clock_us() + HANDSHAKE_US;
    struct header h;
    size_t none = 0;
    int rc = receive(fd, &h, sizeof(h), NULL, &none, deadline);

    if (!rc)
        rc = check_header(l, &h);
    if (rc)
        return rc;
    size_t n = (size_t)h.counters * l->n_layers;
    int *fds = malloc(n * sizeof(*fds));
    if (!fds)
        return -ENOMEM;
    memset(fds, -1, n * sizeof(*fds));
    for (int32_t i = 0; i < h.counters && !rc; i++)
        rc = receive_counter(l, fd, fds, (uint32_t)h.counters, deadline);
    if (rc) {
        close_all(fds, n);
        return rc;
    }
    pthread_mutex_lock(&l->lock);
    int *old = l->fds;
    size_t old_n = (size_t)l->n_counters * l->n_layers;
    l->fds = fds;
    l->n_counters = (uint32_t)h.counters;
    l->failed = false;
    pthread_mutex_unlock(&l->lock);
    close_all(old, old_n);
    return 0;
}

int fk_layers_receive(struct fk_layers *l, int fd)
{
    int rc = receive_all(l, fd);
    char answer = rc == 0;

    (void)!send(fd, &answer, 1, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (!rc)
        fk_info("worker %u: layers of loads are reported on %u counters of %u eventfds", l->worker,
                l->n_counters, l->n_layers);
    return rc;
}

/* ---- the thread ---- */

static void take_connection(struct fk_layers *l)
{
    pid_t pid = 0;
    int fd, rc = fk_listener_accept(&l->listener, &fd, &pid);

    if (rc)
        return;
    if (pid == getpid()) {
        rc = fk_layers_receive(l, fd);
    } else {
        fk_error("worker %u: process %d wants to be told of its layers; only the worker's own process "
                 "(%d) can be (layerwise_eventfd_socket)", l->worker, (int)pid, (int)getpid());
        (void)!send(fd, "", 1, MSG_NOSIGNAL | MSG_DONTWAIT);
    }
    if (rc && rc != -EPROTO)
        fk_warn("worker %u: an engine's layer counters did not arrive: %s", l->worker, strerror(-rc));
    close(fd);
}

static void *listen_main(void *arg)
{
    struct fk_layers *l = arg;
    struct pollfd p[2] = { { .fd = l->listener.fd, .events = POLLIN },
                           { .fd = l->stop_fd, .events = POLLIN } };

    for (;;) {
        if (poll(p, 2, -1) < 0 && errno != EINTR)
            break;
        if (p[1].revents)
            break;
        take_connection(l);
    }
    return NULL;
}

int fk_layers_open(const char *address, uint32_t n_layers, uint32_t worker, struct fk_layers **out,
                   char *error, size_t error_bytes)
{
    struct fk_layers *l = calloc(1, sizeof(*l));

    if (!l)
        return -ENOMEM;
    *l = (struct fk_layers){ .n_layers = n_layers, .worker = worker };
    pthread_mutex_init(&l->lock, NULL);
    int rc = fk_listener_open(address, &l->listener, error, error_bytes);
    l->stop_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (!rc)
        rc = l->stop_fd < 0 ? -errno : -pthread_create(&l->thread, NULL, listen_main, l);
    if (!rc) {
        *out = l;
        return 0;
    }
    if (!error[0])
        snprintf(error, error_bytes, "%s", strerror(-rc));
    fk_listener_close(&l->listener);
    if (l->stop_fd >= 0)
        close(l->stop_fd);
    pthread_mutex_destroy(&l->lock);
    free(l);
    return rc;
}

void fk_layers_close(struct fk_layers *l)
{
    if (!l)
        return;
    (void)!write(l->stop_fd, &(uint64_t){ 1 }, sizeof(uint64_t));
    pthread_join(l->thread, NULL);
    fk_listener_close(&l->listener);
    close(l->stop_fd);
    close_all(l->fds, (size_t)l->n_counters * l->n_layers);
    pthread_mutex_destroy(&l->lock);
    free(l);
}

/* ---- telling ---- */

/* With the lock. */
static void add_one(const struct fk_layers *l, size_t i)
{
    uint64_t one = 1;

    if (write(l->fds[i], &one, sizeof(one)) != sizeof(one) && errno != EAGAIN)
        fk_error("worker %u: a layer's eventfd: %s", l->worker, strerror(errno));
}

void fk_layers_signal(struct fk_layers *l, uint32_t counter, uint32_t from, uint32_t to)
{
    pthread_mutex_lock(&l->lock);
    for (uint32_t i = from; counter < l->n_counters && i < fk_min(to, l->n_layers); i++)
        add_one(l, (size_t)counter * l->n_layers + i);
    pthread_mutex_unlock(&l->lock);
}

static bool is_ours(const struct fk_layers *l, int fd)
{
    for (size_t i = 0; i < (size_t)l->n_counters * l->n_layers; i++)
        if (l->fds[i] == fd)
            return true;
    return false;
}

static bool is_counted(const unsigned long *ids, size_t n, unsigned long id)
{
    for (size_t i = 0; id && i < n; i++)
        if (ids[i] == id)
            return true;
    return false;
}

/* With the lock: every other descriptor of this process that is one of these eventfds. Returns how
 * many. The engine may close one meanwhile; nobody opens files of these numbers in a failing load. */
static size_t make_unreadable(const struct fk_layers *l, const unsigned long *ids, size_t n)
{
    int bad = open("/proc/self/mem", O_RDONLY | O_CLOEXEC);     /* address 0 is not mapped: EIO */
    DIR *dir = opendir("/proc/self/fd");
    size_t replaced = 0;

    for (struct dirent *e; bad >= 0 && dir && (e = readdir(dir));) {
        char *end;
        int fd = (int)strtol(e->d_name, &end, 10);
        if (*end || end == e->d_name || is_ours(l, fd) || !is_counted(ids, n, eventfd_id(fd)))
            continue;
        replaced += dup3(bad, fd, O_CLOEXEC) == fd;
    }
    if (dir)
        closedir(dir);
    if (bad >= 0)
        close(bad);
    return replaced;
}

void fk_layers_fail(struct fk_layers *l)
{
    pthread_mutex_lock(&l->lock);
    size_t n = l->failed ? 0 : (size_t)l->n_counters * l->n_layers;
    unsigned long *ids = calloc(n + 1, sizeof(*ids));
    for (size_t i = 0; ids && i < n; i++)
        ids[i] = eventfd_id(l->fds[i]);
    size_t replaced = ids && n ? make_unreadable(l, ids, n) : 0;
    if (replaced >= n)
        for (size_t i = 0; i < n; i++)  /* a wait that was under way ends now, and reads */
            add_one(l, i);
    l->failed = l->failed || (n && replaced >= n);
    pthread_mutex_unlock(&l->lock);
    free(ids);
    if (n)
        fk_error("worker %u: a load in layers has failed after it began; the engine can't take that, "
                 "its waits for layers %s", l->worker,
                 replaced >= n ? "fail from now on (EIO)"
                               : "can't be ended without calling the load done, and are left waiting");
}
