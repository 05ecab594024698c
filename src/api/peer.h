/*
 * peer.h - private to src/api: the other processes at a node's socket. Each connection is a peer; its
 * first message says whether it is an agent (a link) or a client (a session).
 *
 *   server.c   the thread: epoll over listener, peers, pids, report rings; attaches, reaps
 *   link.c     an agent's shared memory: jobs in, reports out
 *   session.c  a client's requests and completions
 *
 * Everything here belongs to the server's thread, but for what is marked as under node->lock.
 * A peer that is gone is only marked; it is freed at the end of the thread's turn.
 */
#ifndef FK_API_PEER_H
#define FK_API_PEER_H

#include "api/node_impl.h"
#include "ipc/ring.h"
#include "ipc/socket.h"
#include "ipc/wire.h"

struct fk_watch {                  /* something the thread waits for */
    void (*ready)(struct fk_watch *source);
    void *owner;
};

struct fk_peer {
    struct fk_server *server;
    struct fk_peer *next;
    int fd, pid_fd;                 /* pid_fd -1: the kernel can't tell */
    pid_t pid;
    uint64_t since_us;
    struct fk_watch socket, process;
    struct fk_msg_reader in;
    struct fk_link *link;
    struct fk_session *session;
    bool gone;                      /* the connection or the process is no more */
};

/* ---- an agent; under node->lock once it is in node->links ---- */
struct fk_link {
    struct fk_node *node;
    struct fk_peer *peer;
    struct fk_link *next;
    struct fk_wire_hello hello;
    struct fk_instance *in;         /* NULL: it waits for its instance */
    bool direct;                    /* it can read SSD slots by itself */
    uint32_t n_trials, trial_instance;      /* files that it tries that with */
    const struct fk_space *trial_space;
    uint64_t crc_after;             /* power (base/checksum.h) of the bytes behind its slice in a block */
    bool broken;                    /* it wrote nonsense: nothing more is sent or believed */
    int memory_fd, command_fd, report_fd;
    void *memory;
    size_t memory_bytes;
    _Atomic bool *cancel;           /* FK_AGENT_JOBS of them */
    struct fk_ring commands, reports;
    struct fk_watch report;
    struct fk_job *held;            /* taken, but there was no room in the ring */
    uint32_t n_jobs;
    struct fk_job *jobs[FK_AGENT_JOBS];
    bool may_say[FK_AGENT_JOBS];    /* that it is on its way: it was asked to, and has not yet */
};

struct fk_link *fk_link_waiting(const struct fk_node *node, const char *space, const char *instance,
                                uint32_t worker);
uint64_t fk_link_slice_bytes(const struct fk_link *link);
/* Gives the link to its instance: shared memory, welcome. -errno, with the message. */
int fk_link_attach(struct fk_link *link, struct fk_instance *in);
int fk_link_create(struct fk_peer *peer, const struct fk_wire_hello *hello);
/* Its process can touch nothing any more: its jobs are over. */
void fk_link_destroy(struct fk_link *link);
void fk_link_read_reports(struct fk_link *link);
/* With the lock: what agents have reported, before the server's thread is told. True if some have
 * jobs yet. */
bool fk_links_read(struct fk_node *node);

/* ---- a client ---- */
struct fk_session *fk_session_create(struct fk_peer *peer);
/* One request; -errno: the connection is no good. */
int fk_session_handle(struct fk_session *session, const struct fk_msg *msg, const uint8_t *payload);
int fk_session_flush(struct fk_session *session);
/* There are events again: to a client that waits for them. */
int fk_session_tell_of_events(struct fk_session *session);
/* Answers what threads of their own have done meanwhile. */
int fk_session_finish_slow(struct fk_session *session);
/* Returns whether it had ever asked for a space: who only looks is no user. */
bool fk_session_destroy(struct fk_session *session);
uint64_t fk_session_id(const struct fk_session *session);
/* A completion of an operation whose user_data is a session's. */
void fk_session_complete(const flexkv_completion *c);

/* ---- session_events.c ---- */
struct fk_session_events {          /* a request for events, and its answer */
    struct fk_wire_events request;
    uint32_t space;                 /* the core's; FK_NONE: all */
    struct fk_wire_events_reply reply;
    FK_VEC(uint8_t) body;           /* labels and events */
};
/* Any thread; WALK may wait for a disk. *armed: a note is wanted. -ESTALE, -ENOMEM, -EOPNOTSUPP, -EPROTO:
 * with the message. */
int fk_session_events_run(struct fk_node *node, struct fk_session_events *x, bool *armed);

/* ---- server.c ---- */
struct fk_server {
    struct fk_node *node;
    struct fk_listener listener;
    char *address;
    bool clients;                   /* serves them too */
    int epoll_fd, wake_fd;
    pthread_t thread;
    bool has_thread;
    _Atomic bool stop;
    struct fk_watch listening, woken, completed;
    struct fk_peer *peers;          /* changes under node->lock */
    uint64_t next_session;
    uint64_t idle_since_us;         /* 0: there is a user; under node->lock */
    uint32_t n_users;               /* sessions that have asked for a space; under node->lock */
    _Atomic uint32_t n_slow;        /* requests that threads of their own carry out */
};

int fk_server_watch(struct fk_server *server, int fd, struct fk_watch *source, bool writable);
void fk_server_unwatch(struct fk_server *server, int fd);
void fk_server_rewatch(struct fk_server *server, int fd, struct fk_watch *source, bool writable);
/* A session asks for its first space. */
void fk_server_note_user(struct fk_server *server);
/* With the lock. */
bool fk_server_has_session(const struct fk_node *node, uint64_t id);
int fk_server_session_pid(const struct fk_node *node, uint64_t id);
/* Has the client not closed its connection, as of now? 0: this process, which is there. */
bool fk_server_is_there(const struct fk_node *node, uint64_t id);

#endif
