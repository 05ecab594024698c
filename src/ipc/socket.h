/*
 * socket.h - unix sockets between FlexKV's processes of one machine: addresses, who may listen and
 * who is at the other end, messages, and file descriptors that travel with them.
 *
 *   ipc://PATH    a socket file, mode 0600. One that a dead process left behind is replaced.
 *   ipc://@NAME   an abstract socket: gone with its process, whatever ends it
 *
 * Either way both ends must belong to the same user, or the other one to root.
 *
 * A message is a header (struct fk_msg), a payload in the machine's own byte order, and zeros up to
 * a multiple of 8, so that every payload is aligned. No locks:
 * a socket is used by one thread at a time. Callers: src/api.
 */
#ifndef FK_IPC_SOCKET_H
#define FK_IPC_SOCKET_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include <sys/uio.h>

#define FK_MSG_FDS 68               /* a welcome: 4, and two for each SSD directory */
#define FK_MSG_MAX (256u << 20)         /* nothing larger is believed */

struct fk_listener {
    int fd;
    int lock_fd;                    /* holds the abstract name that stands for the path; or -1 */
    char path[108];
};

/* -EADDRINUSE with the other's pid in the message; -EINVAL: no such kind of address, too long. */
int fk_listener_open(const char *address, struct fk_listener *out, char *error, size_t error_bytes);
void fk_listener_close(struct fk_listener *l);
/* A connection, non-blocking; -EAGAIN: none; -EPERM: turned away. */
int fk_listener_accept(const struct fk_listener *l, int *fd, pid_t *pid);

/* Connects; non-blocking from then on. -ECONNREFUSED, -ENOENT: nobody is there; -EPERM: another
 * user's process is. */
int fk_socket_connect(const char *address, int *fd, char *error, size_t error_bytes);

/* ---- messages ---- */
struct fk_msg {
    uint32_t bytes;                 /* of the payload */
    uint32_t type;
};

static inline uint32_t fk_msg_padding(uint32_t bytes) { return -bytes & 7; }

/* Sends all of it, before the deadline (monotonic; 0: as much as goes at once and no more).
 * Returns 0, -ETIMEDOUT, or -errno: part of it may be out, the connection is no good then. */
int fk_msg_send(int fd, uint32_t type, const struct iovec *iov, int n_iov, const int *fds, int n_fds,
                uint64_t deadline_us);

struct fk_msg_reader {
    uint8_t *data;
    size_t len, cap, at;            /* at: start of the next message */
    uint32_t max_bytes;             /* of a payload */
    int fds[FK_MSG_FDS];
    int n_fds;                      /* received, not taken */
};

void fk_msg_reader_init(struct fk_msg_reader *r, uint32_t max_bytes);
void fk_msg_reader_free(struct fk_msg_reader *r);
/* Reads what is there. 0, -EAGAIN: nothing; -ECONNRESET: the other end is gone; -ENOMEM. */
int fk_msg_read(int fd, struct fk_msg_reader *r);
/* The next whole message: 1, 0 (none yet), -EPROTO. Valid until the next fk_msg_read. */
int fk_msg_next(struct fk_msg_reader *r, struct fk_msg *msg, const uint8_t **payload);
/* Takes a received descriptor; -1: none. */
int fk_msg_take_fd(struct fk_msg_reader *r);

/* Waits for readable (or writable) until the deadline: 0, -ETIMEDOUT, -errno. */
int fk_fd_wait(int fd, bool writable, uint64_t deadline_us);

#endif
