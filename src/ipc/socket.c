/* socket.c - see socket.h. */
#include "ipc/socket.h"

#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include "base/clock.h"
#include "base/fail.h"
#include "base/util.h"

#define LISTEN_BACKLOG 64
#define SOCKET_BUFFER (4 << 20)         /* asked for; the kernel gives what it allows */
#define READ_CHUNK 65536u

/* ---- addresses ---- */

struct address {
    struct sockaddr_un un;
    socklen_t len;
    bool abstract;
};

static int parse(const char *text, struct address *a, char *error, size_t bytes)
{
    const char *name = strncmp(text, "ipc://", 6) == 0 ? text + 6 : *text == '/' ? text : NULL;

    if (!name || !*name || (name[0] == '@' && !name[1]))
        return fk_fail(error, bytes, -EINVAL, "address \"%.200s\": ipc://PATH or ipc://@NAME is expected "
                       "(server_recv_port)", text);
    memset(a, 0, sizeof(*a));
    a->un.sun_family = AF_UNIX;
    a->abstract = name[0] == '@';
    size_t n = strlen(name);
    if (n >= sizeof(a->un.sun_path))
        return fk_fail(error, bytes, -EINVAL, "address \"%.200s\": longer than the %zu bytes that a unix "
                       "socket's name may have (server_recv_port)", text, sizeof(a->un.sun_path) - 1);
    memcpy(a->un.sun_path, name, n);
    if (a->abstract)
        a->un.sun_path[0] = '\0';
    a->len = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + n + !a->abstract);
    return 0;
}

static void set_buffers(int fd)
{
    int bytes = SOCKET_BUFFER;

    setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &bytes, sizeof(bytes));
    setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &bytes, sizeof(bytes));
}

static pid_t peer(int fd, uid_t *uid)
{
    struct ucred cred = { 0 };
    socklen_t n = sizeof(cred);

    if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &cred, &n) < 0)
        return 0;
    *uid = cred.uid;
    return cred.pid;
}

static int connect_to(const struct address *a, int *fd)
{
    int s = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);

    if (s < 0)
        return -errno;
    set_buffers(s);
    if (connect(s, (const struct sockaddr *)&a->un, a->len) < 0) {
        int rc = -errno;
        close(s);
        return rc;
    }
    *fd = s;
    return 0;
}

int fk_socket_connect(const char *address, int *fd, char *error, size_t bytes)
{
    struct address a;
    int rc = parse(address, &a, error, bytes);

    if (rc)
        return rc;
    rc = connect_to(&a, fd);
    if (rc)
        return fk_fail(error, bytes, rc, "%s: %s", address,
                       rc == -ECONNREFUSED || rc == -ENOENT ? "nobody answers there" : strerror(-rc));
    uid_t uid = (uid_t)-1;
    pid_t pid = peer(*fd, &uid);
    if (uid == geteuid() || uid == 0)
        return 0;
    close(*fd);                     /* whoever took the name first: its bytes are not to be trusted */
    return fk_fail(error, bytes, -EPERM, "%s: process %d, which listens there, belongs to user %d, not to "
                   "this one", address, (int)pid, (int)uid);
}

/* ---- listening ---- */

static int in_use(const char *address, const struct address *a, char *error, size_t bytes)
{
    int fd;
    uid_t uid;
    pid_t pid = 0;

    if (connect_to(a, &fd) == 0) {
        pid = peer(fd, &uid);
        close(fd);
    }
    if (pid)
        return fk_fail(error, bytes, -EADDRINUSE, "address %s is in use by process %d; give this one "
                       "another (server_recv_port)", address, (int)pid);
    return fk_fail(error, bytes, -EADDRINUSE, "address %s is in use; give this one another "
                   "(server_recv_port)", address);
}

/* Holds an abstract name that stands for the path: of two that find a dead socket file only one may
 * replace it, and the name is free again the moment its holder dies. */
static int lock_path(const char *path, int *fd)
{
    struct address a = { .un.sun_family = AF_UNIX };
    int n = snprintf(a.un.sun_path + 1, sizeof(a.un.sun_path) - 1, "flexkv-lock-%016llx",
                     (unsigned long long)XXH3_64bits(path, strlen(path)));

    *fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (*fd < 0)
        return -errno;
    a.len = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + (size_t)n);
    if (bind(*fd, (struct sockaddr *)&a.un, a.len) == 0)
        return 0;
    int rc = -errno;
    close(*fd);
    *fd = -1;
    return rc;
}

/* A file of that name: of a living process, of a dead one (removed), or something else. */
static int clear_path(const char *address, const struct address *a, char *error, size_t bytes)
{
    struct stat st;
    int fd;

    if (lstat(a->un.sun_path, &st) < 0)
        return errno == ENOENT ? 0 : fk_fail(error, bytes, -errno, "address %s: %s (server_recv_port)",
                                             address, strerror(errno));
    if (!S_ISSOCK(st.st_mode))
        return fk_fail(error, bytes, -EEXIST, "address %s: there is a file of that name that is no "
                       "socket (server_recv_port)", address);
    if (connect_to(a, &fd) == 0) {
        close(fd);
        return in_use(address, a, error, bytes);
    }
    if (unlink(a->un.sun_path) < 0 && errno != ENOENT)
        return fk_fail(error, bytes, -errno, "address %s: the socket that a dead process left can't be "
                       "removed: %s", address, strerror(errno));
    return 0;
}

static int bind_and_listen(const char *address, const struct address *a, struct fk_listener *l,
                           char *error, size_t bytes)
{
    l->fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (l->fd < 0)
        return fk_fail(error, bytes, -errno, "socket: %s", strerror(errno));
    fchmod(l->fd, 0600);            /* what bind gives the file */
    set_buffers(l->fd);
    if (bind(l->fd, (const struct sockaddr *)&a->un, a->len) < 0)
        return errno == EADDRINUSE ? in_use(address, a, error, bytes)
               : fk_fail(error, bytes, -errno, "address %s: %s (server_recv_port)", address,
                         strerror(errno));
    if (!a->abstract)
        snprintf(l->path, sizeof(l->path), "%s", a->un.sun_path);
    if (listen(l->fd, LISTEN_BACKLOG) < 0)
        return fk_fail(error, bytes, -errno, "listen at %s: %s", address, strerror(errno));
    return 0;
}

int fk_listener_open(const char *address, struct fk_listener *l, char *error, size_t bytes)
{
    struct address a;

    *l = (struct fk_listener){ .fd = -1, .lock_fd = -1 };
    int rc = parse(address, &a, error, bytes);
    if (rc)
        return rc;
    if (!a.abstract) {
        rc = lock_path(a.un.sun_path, &l->lock_fd);
        if (rc)
            return rc == -EADDRINUSE ? in_use(address, &a, error, bytes)
                   : fk_fail(error, bytes, rc, "address %s: %s", address, strerror(-rc));
        rc = clear_path(address, &a, error, bytes);
    }
    if (!rc)
        rc = bind_and_listen(address, &a, l, error, bytes);
    if (rc)
        fk_listener_close(l);
    return rc;
}

void fk_listener_close(struct fk_listener *l)
{
    if (l->fd >= 0)
        close(l->fd);
    if (l->path[0])
        unlink(l->path);
    if (l->lock_fd >= 0)
        close(l->lock_fd);
    *l = (struct fk_listener){ .fd = -1, .lock_fd = -1 };
}

int fk_listener_accept(const struct fk_listener *l, int *fd, pid_t *pid)
{
    uid_t uid = (uid_t)-1;
    int s = accept4(l->fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);

    if (s < 0)
        return -errno;
    *pid = peer(s, &uid);
    if (uid != geteuid() && uid != 0) {
        close(s);
        return -EPERM;
    }
    set_buffers(s);
    *fd = s;
    return 0;
}

/* ---- waiting, sending ---- */

int fk_fd_wait(int fd, bool writable, uint64_t deadline_us)
{
    struct pollfd p = { .fd = fd, .events = writable ? POLLOUT : POLLIN };

    for (;;) {
        uint64_t now = fk_clock_us();
        if (now >= deadline_us)
            return -ETIMEDOUT;
        int rc = poll(&p, 1, (int)fk_min((deadline_us - now + 999) / 1000, (uint64_t)60000));
        if (rc > 0)
            return 0;
        if (rc < 0 && errno != EINTR)
            return -errno;
    }
}

static void attach_fds(struct msghdr *m, void *control, size_t bytes, const int *fds, int n)
{
    m->msg_control = control;
    m->msg_controllen = bytes;
    struct cmsghdr *c = CMSG_FIRSTHDR(m);
    c->cmsg_level = SOL_SOCKET;
    c->cmsg_type = SCM_RIGHTS;
    c->cmsg_len = CMSG_LEN((size_t)n * sizeof(int));
    memcpy(CMSG_DATA(c), fds, (size_t)n * sizeof(int));
}

/* Steps over what has gone out. */
static void advance(struct iovec *v, int *at, size_t n)
{
    while (n) {
        size_t k = fk_min(n, v[*at].iov_len);
        v[*at].iov_base = (char *)v[*at].iov_base + k;
        v[*at].iov_len -= k;
        n -= k;
        *at += v[*at].iov_len == 0;
    }
}

int fk_msg_send(int fd, uint32_t type, const struct iovec *iov, int n_iov, const int *fds, int n_fds,
                uint64_t deadline_us)
{
    struct fk_msg head = { .type = type };
    static const uint64_t zero;
    struct iovec v[8];
    union { struct cmsghdr align; char room[CMSG_SPACE(FK_MSG_FDS * sizeof(int))]; } control;
    size_t left = sizeof(head);
    int at = 0;

    v[0] = (struct iovec){ &head, sizeof(head) };
    for (int i = 0; i < n_iov; i++) {
        v[i + 1] = iov[i];
        left += iov[i].iov_len;
    }
    head.bytes = (uint32_t)(left - sizeof(head));
    v[n_iov + 1] = (struct iovec){ (void *)(uintptr_t)&zero, fk_msg_padding(head.bytes) };
    left += v[n_iov + 1].iov_len;
    while (left) {
        struct msghdr m = { .msg_iov = v + at, .msg_iovlen = (size_t)(n_iov + 2 - at) };
        if (n_fds)
            attach_fds(&m, control.room, CMSG_SPACE((size_t)n_fds * sizeof(int)), fds, n_fds);
        ssize_t n = sendmsg(fd, &m, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (n > 0) {
            n_fds = 0;
            left -= (size_t)n;
            advance(v, &at, (size_t)n);
            continue;
        }
        if (n < 0 && errno != EAGAIN && errno != EINTR)
            return -errno;
        int rc = n < 0 && errno == EINTR ? 0 : fk_fd_wait(fd, true, deadline_us);
        if (rc)
            return rc;
    }
    return 0;
}

/* ---- receiving ---- */

void fk_msg_reader_init(struct fk_msg_reader *r, uint32_t max_bytes)
{
    *r = (struct fk_msg_reader){ .max_bytes = max_bytes };
}

void fk_msg_reader_free(struct fk_msg_reader *r)
{
    for (int i = 0; i < r->n_fds; i++)
        close(r->fds[i]);
    free(r->data);
    *r = (struct fk_msg_reader){ 0 };
}

static void keep_fds(struct fk_msg_reader *r, struct msghdr *m)
{
    for (struct cmsghdr *c = CMSG_FIRSTHDR(m); c; c = CMSG_NXTHDR(m, c)) {
        if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS)
            continue;
        size_t n = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        for (size_t i = 0; i < n; i++) {
            int fd;
            memcpy(&fd, CMSG_DATA(c) + i * sizeof(int), sizeof(fd));
            if (r->n_fds < FK_MSG_FDS)
                r->fds[r->n_fds++] = fd;
            else
                close(fd);
        }
    }
}

static int make_room(struct fk_msg_reader *r)
{
    if (r->at) {                    /* what has been used goes */
        memmove(r->data, r->data + r->at, r->len - r->at);
        r->len -= r->at;
        r->at = 0;
    }
    return fk_vec_grow_bytes((void **)&r->data, &r->cap, r->len + READ_CHUNK, 1);
}

int fk_msg_read(int fd, struct fk_msg_reader *r)
{
    union { struct cmsghdr align; char room[CMSG_SPACE(FK_MSG_FDS * sizeof(int))]; } control;

    if (make_room(r))
        return -ENOMEM;
    struct iovec v = { r->data + r->len, r->cap - r->len };
    struct msghdr m = { .msg_iov = &v, .msg_iovlen = 1, .msg_control = control.room,
                        .msg_controllen = sizeof(control.room) };
    ssize_t n = recvmsg(fd, &m, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    if (n < 0)
        return errno == EAGAIN || errno == EINTR ? -EAGAIN : -errno;
    keep_fds(r, &m);
    if (n == 0)
        return -ECONNRESET;
    r->len += (size_t)n;
    return 0;
}

int fk_msg_next(struct fk_msg_reader *r, struct fk_msg *msg, const uint8_t **payload)
{
    if (r->len - r->at < sizeof(*msg))
        return 0;
    memcpy(msg, r->data + r->at, sizeof(*msg));
    if (msg->bytes > r->max_bytes)
        return -EPROTO;
    if (r->len - r->at - sizeof(*msg) < msg->bytes + fk_msg_padding(msg->bytes))
        return 0;
    *payload = r->data + r->at + sizeof(*msg);
    r->at += sizeof(*msg) + msg->bytes + fk_msg_padding(msg->bytes);
    return 1;
}

int fk_msg_take_fd(struct fk_msg_reader *r)
{
    if (!r->n_fds)
        return -1;
    int fd = r->fds[0];
    memmove(r->fds, r->fds + 1, (size_t)--r->n_fds * sizeof(int));
    return fd;
}
