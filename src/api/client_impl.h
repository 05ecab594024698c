/*
 * client_impl.h - private to src/api: a node that a daemon serves. See client.c for the whole picture.
 *
 *   client_conn.c   the connection: requests and answers, its loss, looking for the daemon
 *   client.c        flexkv.h's calls on top of it
 *
 * All functions with the lock, unless it says otherwise; those that wait give it up meanwhile.
 */
#ifndef FK_API_CLIENT_IMPL_H
#define FK_API_CLIENT_IMPL_H

#include <pthread.h>

#include "api/node_impl.h"
#include "ipc/socket.h"
#include "ipc/wire.h"

#define FK_CLIENT_SLOW_CALL_MS 120000u  /* of calls that wait for files: reset */

struct client_op {                  /* under way at the daemon */
    uint64_t id;
    struct client_op *next;
    void *user_data;
    int8_t *results;
    uint32_t kind, n;
};

struct client_call {                /* a request whose answer somebody waits for */
    uint32_t seq;
    struct client_call *next;
    bool done;
    int rc;
    char error[FK_WIRE_TEXT];
    void *body;
    size_t bytes;
};

struct client_space {
    flexkv_space pub;
    struct client_space *next;
    uint32_t remote;                /* the daemon's number */
    double compute_rate;            /* 0: not told */
    flexkv_space_desc desc;
    char name[FK_WIRE_NAME], instance[FK_WIRE_INSTANCE];
    void *fingerprint;
    uint32_t n_workers;
    flexkv_agent **agents;          /* of workers in this process */
};

struct client_namespace {
    flexkv_namespace pub;
    struct client_namespace *next;
    uint32_t remote;
    char *name;                     /* joined parts: to find it again */
    char *parts;                    /* each with its 0 */
    size_t parts_bytes;
    uint32_t n_parts;
    bool labelled;
    char lora[FK_LABEL_TEXT_MAX + 1], salt[FK_LABEL_TEXT_MAX + 1];
};

struct client {
    flexkv_node pub;
    char *address;
    uint64_t timeout_us;
    pthread_mutex_t lock;
    pthread_t thread;
    bool has_thread, stop, up;
    bool heard;                     /* something has arrived since the thread's last look */
    uint64_t heard_us;              /* when it last did */
    bool events_on;                 /* the daemon keeps KV events */
    flexkv_events *feeds;
    bool reopening;                 /* up, but the spaces are not open again yet */
    int fd, event_fd, epoll_fd;
    int wake_fd;                    /* for the thread: stop, or the connection changed */
    struct fk_msg_reader in;
    uint32_t seq;
    uint64_t op_id;
    struct client_op *ops;
    struct client_call *calls;
    FK_VEC(flexkv_completion) completed;
    size_t taken;                   /* of completed */
    struct client_space *spaces;
    struct client_namespace *namespaces;
};

#define client_of(pub_) ((struct client *)(pub_))
#define space_of(pub_) ((struct client_space *)(pub_))
#define ns_of(pub_) ((struct client_namespace *)(pub_))

/* ---- client_conn.c ---- */
/* event_fd says that completions wait, or that somebody has read another's answer. */
void fk_client_set_event(const struct client *c);
void fk_client_clear_event(const struct client *c);
void fk_client_wake_thread(const struct client *c);
/* Reads everything that has arrived. Returns whether anything did. */
bool fk_client_drain(struct client *c);
/* -ENOTCONN, with the message. */
int fk_client_not_connected(const struct client *c);
int fk_client_send_request(struct client *c, uint32_t type, const struct iovec *iov, int n);
/* A request with an answer; seq: where in the request its number goes. *body: to be freed. */
int fk_client_call(struct client *c, uint32_t type, uint32_t *seq, const struct iovec *iov, int n,
                   uint64_t timeout_us, void **body, size_t *bytes);
/* The same, where the answer is a struct of a known size. */
int fk_client_call_for(struct client *c, uint32_t type, uint32_t *seq, const struct iovec *iov, int n,
                       uint64_t timeout_us, void *out, size_t out_bytes);
/* A connection that has been greeted; without the lock. */
struct client_greeting { int fd; struct fk_msg_reader in; bool events_on; };
int fk_client_greet(const char *address, uint64_t timeout_us, struct client_greeting *out);
int fk_client_go_up(struct client *c, const struct client_greeting *with);
int fk_client_ask_for_space(struct client *c, struct client_space *s, struct fk_wire_space_reply *r);
int fk_client_ask_for_namespace(struct client *c, const struct client_namespace *ns,
                                uint32_t *remote);
int fk_client_tell_compute_rate(struct client *c, const struct client_space *s);
void *fk_client_main(void *client);     /* the thread */

/* ---- client_events.c ---- */
int fk_client_tell_label(struct client *c, const struct client_namespace *ns);
void fk_client_events_up(struct client *c);
void fk_client_events_down(struct client *c);
void fk_client_events_note(struct client *c);   /* there may be something to take */
/* Without the lock: */
void fk_client_events_orphan(struct client *c);
int fk_client_namespace_label(flexkv_namespace *ns, const char *lora_name, const char *cache_salt);
int fk_client_events_open(flexkv_node *node, flexkv_space *space, flexkv_events **out);

#endif
