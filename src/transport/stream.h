/*
 * stream.h - TCP connections of the transports: addresses, listening, connecting, and bytes buffered in both
 * directions. Nothing blocks, and no name is looked up. One thread at a time.
 */
#ifndef FK_TRANSPORT_STREAM_H
#define FK_TRANSPORT_STREAM_H

#include <netinet/in.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/socket.h>

/* "10.0.0.1:7000", "[::1]:7000"; 0 or -EINVAL. */
int fk_tcp_parse(const char *text, struct sockaddr_storage *out, socklen_t *len);
void fk_tcp_format(const struct sockaddr_storage *a, char *out, size_t bytes);
/* Listens; bound: the address with the port that it got. */
int fk_tcp_listen(const char *address, int *fd, char *bound, size_t bound_bytes, char *error, size_t error_bytes);
/* -EAGAIN: none. */
int fk_tcp_accept(int listen_fd, uint64_t timeout_us, int *fd);
/* Begins to connect: writable when it has, or has failed (fk_tcp_connected). */
int fk_tcp_connect(const char *address, uint64_t timeout_us, int *fd);
int fk_tcp_connected(int fd);

struct fk_stream {
    int fd;
    uint8_t *in, *out;
    size_t in_at, in_len, in_cap, out_at, out_len, out_cap;
};

void fk_stream_init(struct fk_stream *s, int fd);
void fk_stream_close(struct fk_stream *s);
/* Reads what is there, up to max bytes unread in all. 0, -EAGAIN: nothing new; -ECONNRESET: the end. */
int fk_stream_read(struct fk_stream *s, size_t max);
static inline const uint8_t *fk_stream_data(const struct fk_stream *s) { return s->in + s->in_at; }
static inline size_t fk_stream_unread(const struct fk_stream *s) { return s->in_len - s->in_at; }
static inline void fk_stream_used(struct fk_stream *s, size_t n) { s->in_at += n; }
/* Queues; room for n bytes, or NULL. */
uint8_t *fk_stream_room(struct fk_stream *s, size_t n);
static inline size_t fk_stream_unsent(const struct fk_stream *s) { return s->out_len - s->out_at; }
/* Sends what goes: 0 all of it is out, -EAGAIN, -ECONNRESET. */
int fk_stream_flush(struct fk_stream *s);

#endif
