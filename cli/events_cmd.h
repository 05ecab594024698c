/*
 * events_cmd.h - the parts of `flexkv events`: showing, playing and merging streams. cmd_events.c reads
 * the options and calls one of them; each returns the command's exit status.
 */
#ifndef FK_CLI_EVENTS_CMD_H
#define FK_CLI_EVENTS_CMD_H

#include <stdint.h>

#include "events/zmq_api.h"
#include "events_stream.h"
#include "flexkv/flexkv.h"

#define EVENTS_COMMAND "flexkv events"

struct events_options {
    const char *endpoint, *replay_endpoint, *topic, *library;
    const char *record, *play, *merge;          /* files; the engine's endpoint */
    const char *publish, *publish_replay;
    const char *node, *own_endpoint, *own_replay;
    uint64_t count;                 /* batches; 0: no limit */
    double seconds, wait_seconds;   /* 0: no limit */
    double speed;                   /* 0: as fast as possible */
    int64_t rank;                   /* -1: none */
    int json, quiet;
    flexkv_config *config;          /* for node */
    int stop_fd;                    /* readable after SIGINT, SIGTERM */
};

int events_show(const struct events_options *o, const struct fk_zmq *zmq);
int events_play(const struct events_options *o, const struct fk_zmq *zmq);
int events_merge(const struct events_options *o, const struct fk_zmq *zmq);

/* Waits until the descriptor is readable: 1; the time (-1: none) is over: 0; a signal came: -EINTR. */
int events_wait(const struct events_options *o, int fd, int timeout_ms);

#endif
