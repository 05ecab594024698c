/*
 * events_play.c - publishes a recorded stream again, with its own numbers, as fast as it was or
 * otherwise. Begins when the first subscriber has come. Called by cmd_events.c.
 */
#include <inttypes.h>
#include <stdio.h>

#include "base/clock.h"
#include "events/record.h"
#include "events_cmd.h"

#define FULL_WAIT_MS 10000          /* for a subscriber who takes nothing */
#define LINGER_MS 2000

struct player {
    const struct events_options *o;
    const struct fk_zmq *zmq;
    void *ctx, *pub;
    uint64_t messages, start_us;
};

static int fail(const char *what, const char *why)
{
    fprintf(stderr, EVENTS_COMMAND ": %s: %s\n", what, why);
    return 1;
}

static int open_socket(struct player *p)
{
    p->ctx = p->zmq->ctx_new();
    p->pub = p->ctx ? p->zmq->socket(p->ctx, ZMQ_XPUB) : NULL;
    if (!p->pub)
        return fail("--publish", "no socket");
    fk_zmq_set_int(p->zmq, p->pub, ZMQ_SNDHWM, 10000);
    fk_zmq_set_int(p->zmq, p->pub, ZMQ_XPUB_NODROP, 1);
    fk_zmq_set_int(p->zmq, p->pub, ZMQ_LINGER, LINGER_MS);
    return p->zmq->bind(p->pub, p->o->publish) ? fail(p->o->publish, p->zmq->strerror(p->zmq->error()))
                                               : 0;
}

/* 0: somebody is there. */
static int wait_for_subscriber(struct player *p)
{
    zmq_item items[2] = { { .socket = p->pub, .events = ZMQ_POLLIN },
                          { .fd = p->o->stop_fd, .events = ZMQ_POLLIN } };

    if (p->zmq->poll(items, 2, (long)(p->o->wait_seconds * 1000)) > 0 && !items[1].revents)
        return 0;
    return items[1].revents ? 1 : fail(p->o->publish, "nobody has subscribed (--wait)");
}

static int send_frame(struct player *p, const struct fk_frame *f, bool more)
{
    zmq_msg m;

    if (p->zmq->msg_init_size(&m, f->bytes))
        return -ENOMEM;
    if (f->bytes)
        memcpy(p->zmq->msg_data(&m), f->data, f->bytes);
    if (p->zmq->msg_send(&m, p->pub, ZMQ_DONTWAIT | (more ? ZMQ_SNDMORE : 0)) >= 0)
        return 0;
    int rc = -p->zmq->error();
    p->zmq->msg_close(&m);
    return rc;
}

/* A whole message; who is slow is waited for. */
static int send_message(struct player *p, const struct fk_record *r)
{
    int waited = 0, rc = 0;

    for (size_t i = 0; i < r->n_frames && !rc; i++) {
        rc = send_frame(p, &r->frame[i], i + 1 < r->n_frames);
        while (rc == -EAGAIN && i == 0 && waited++ < FULL_WAIT_MS) {
            if (events_wait(p->o, -1, 1) < 0)
                return -EINTR;
            rc = send_frame(p, &r->frame[i], i + 1 < r->n_frames);
        }
    }
    return rc;
}

/* -EINTR: a signal came before its time. */
static int wait_for_time(struct player *p, uint64_t time_us)
{
    if (p->o->speed <= 0)
        return events_wait(p->o, -1, 0) < 0 ? -EINTR : 0;
    double due = (double)time_us / p->o->speed;
    for (;;) {
        double left = due - (double)(fk_clock_us() - p->start_us);
        if (left <= 0)
            return 0;
        if (events_wait(p->o, -1, (int)fk_min(left / 1000 + 1, 1e9)) < 0)
            return -EINTR;
    }
}

static int play(struct player *p, FILE *in)
{
    struct fk_record r = { 0 };
    char why[160];
    int rc = fk_record_check_header(in, why, sizeof(why));

    p->start_us = fk_clock_us();
    while (!rc && (rc = fk_record_read(in, &r, why, sizeof(why))) == 1) {
        rc = wait_for_time(p, r.time_us);
        if (!rc)
            rc = send_message(p, &r);
        p->messages += !rc;
        snprintf(why, sizeof(why), "%s", strerror(-rc));
    }
    fk_record_free(&r);
    return rc ? fail(p->o->play, why) : 0;
}

int events_play(const struct events_options *o, const struct fk_zmq *zmq)
{
    struct player p = { .o = o, .zmq = zmq };
    FILE *in = fopen(o->play, "rbe");

    if (!in)
        return fail(o->play, strerror(errno));
    int rc = open_socket(&p);
    if (!rc)
        rc = wait_for_subscriber(&p);
    if (!rc)
        rc = play(&p, in);
    printf("%" PRIu64 " batches published\n", p.messages);
    fclose(in);
    if (p.pub)
        zmq->close(p.pub);
    if (p.ctx)
        zmq->ctx_term(p.ctx);
    return rc;
}
