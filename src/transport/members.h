/*
 * members.h - what the transports between FlexKV nodes share: a TCP connection for each peer and direction that carries
 * who is who, requests and answers (wire.h), the owner's jobs and the reader's reads on it. How the payload goes from the
 * owner's memory into the reader's is the *mover's*: libfabric (fabric.c), NIXL (nixl.c).
 *
 *   channel   one connection and whatever the mover has for it on each side, for reads in one direction. The reader opens
 *             it for his first read. Nobody else shares it, so when a read is late the reader closes the channel and
 *             knows that nothing writes to his buffers any more; new reads take a new one
 *   answer    is sent when the mover is done with the owner's bytes and he has looked at the generation again
 *
 * A library's timeout is never waited for: the reads' deadlines are endpoint.c's, the owner's patience with a reader
 * is members.c's. All in the transport's thread. Included by src/transport only.
 */
#ifndef FK_TRANSPORT_MEMBERS_H
#define FK_TRANSPORT_MEMBERS_H

#include "transport/endpoint.h"
#include "transport/wire.h"

struct fk_channel;

struct fk_job {                         /* owner: a granted block on its way, or one whose grant comes later */
    struct fk_channel *channel;
    struct fk_request request;
    struct fk_grant grant;
    struct fk_parked *parked;
    uint64_t deadline_us;
    bool writing;                       /* the mover's own */
    bool told;                          /* the mover has all of it */
    bool written;                       /* and needs the owner's bytes no more */
    void *priv;                         /* the mover's */
    struct fk_job *prev, *next;
};

struct fk_job_list { struct fk_job *first, *last; };

struct fk_channel {
    struct fk_members *m;
    struct fk_channel *prev, *next;
    struct fk_watch sock;
    struct fk_stream stream;
    struct fk_session session;
    uint64_t hello_until_us;
    bool connecting, open, dead;        /* dead: of no use any more, closed in this round */
    bool mid_payload;                   /* the mover sends through the connection itself: nothing else may */
    bool moving;                        /* the mover's side of it is there: mover->poll */
    /* reader */
    struct fk_peer *peer;               /* NULL: this is the owner's side */
    bool suspect;                       /* a read was late: no new ones, closed with the last one in time */
    bool answered;
    /* owner */
    struct fk_job_list jobs, parked;    /* oldest first; without a grant yet */
    uint32_t n_jobs, n_waiting;         /* of both; granted ones that the mover has no room for */
    FK_VEC(struct fk_answer) answers;
};

struct fk_mover {
    size_t channel_bytes;               /* of a struct that begins with struct fk_channel */
    bool sums;                          /* it takes the owner's checksum itself, in write() */
    bool notices;                       /* the reader is told through the mover too that his bytes are there */
    /* Reader, connected: what there is to say in PROOF (session.endpoint). */
    int (*reader_open)(struct fk_channel *c);
    /* Both know each other. */
    int (*session_open)(struct fk_channel *c);
    /* Frees what the two have made; after this nothing reads from granted blocks or writes to buffers for its sake. */
    void (*close)(struct fk_channel *c);
    /* Reader: where the bytes may be written: r->rkey, r->raddr. */
    int (*expose)(struct fk_channel *c, struct fk_op *op, struct fk_request *r);
    void (*unexpose)(struct fk_op *op);
    /* Owner: sends the bytes off. 0; -EAGAIN: no room, again later; other: refused. c->dead instead: the channel is lost. */
    int (*write)(struct fk_channel *c, struct fk_job *j);
    /* The job ends: frees j->priv. May be NULL. */
    void (*forget)(struct fk_job *j);
    /* Makes progress: fk_job_done, fk_read_noticed. *next: when to come again. -errno: the channel is lost. */
    int (*poll)(struct fk_channel *c, uint64_t now, uint64_t *next);
    int (*frame)(struct fk_channel *c, unsigned type, const uint8_t *payload, uint32_t bytes);    /* of a kind of its own; may be NULL */
    /* Movers through the connection, else NULL. Takes bytes that follow a frame of its own. 1: there are none, or all have
     * come: frames follow; 0: more will come. */
    int (*payload)(struct fk_channel *c, uint32_t *budget);
    uint32_t heads_bytes, turn_bytes;   /* of such: to read where frames are expected; in a turn */
    const char *(*strerror)(int rc);
};

struct fk_members {                     /* t->priv begins with it */
    struct fk_transport *t;
    const struct fk_mover *mover;
    struct fk_hello_params hello;
    char *secret, *cluster, kind[17];
    struct fk_watch listener;
    struct fk_channel *channels;
    uint32_t n_channels;
    uint64_t said_us;
};

/* kind: what both sides of a channel must be, at most 16 bytes. */
int fk_members_open(struct fk_members *m, struct fk_transport *t, const struct fk_transport_params *p,
                    const struct fk_mover *mover, const char *kind, char *error, size_t bytes);
/* The interface of the mover's own sockets: as configured, or where we listen. */
int fk_members_source(const struct fk_transport_params *p, char *out, size_t out_bytes, char *error, size_t bytes);
int fk_members_listen(struct fk_members *m, const char *address, char *error, size_t bytes);
void fk_members_close(struct fk_members *m);

/* For struct fk_transport_ops. */
void fk_members_pump(struct fk_transport *t, struct fk_peer *p);
void fk_members_expire(struct fk_transport *t, struct fk_op *op);
bool fk_members_drop(struct fk_transport *t, struct fk_peer *p);
uint64_t fk_members_tick(struct fk_transport *t, uint64_t now);

/* For movers. */
void fk_job_done(struct fk_channel *c, struct fk_job *j, int rc);      /* written, or not */
void fk_read_noticed(struct fk_channel *c, uint64_t id, uint64_t key);  /* all bytes of a read are there */
int fk_channel_flush(struct fk_channel *c);
int fk_channel_put_answers(struct fk_channel *c);                      /* what is to be said goes into the stream */
struct fk_op *fk_channel_read(struct fk_channel *c, uint64_t id);      /* reader: one under way here, or NULL */
void fk_read_summed(struct fk_channel *c, struct fk_op *op, uint64_t sum);     /* all bytes are there; their checksum */

#endif
