/*
 * publish.c - a local node's KV events over ZeroMQ, where kv_events_endpoint is set: one subscription to
 * all spaces, and the publisher's thread that reads it. What the node does meanwhile does not wait for
 * it: the journal is bounded, and a subscription that falls behind looks anew.
 *
 * Called when the node is opened and closed, by its opener alone; and for the status.
 */
#include <jansson.h>

#include "api/node_impl.h"
#include "base/log.h"
#include "events/publisher.h"

static int take(void *ctx, flexkv_event *out, size_t max)
{
    return flexkv_events_take(ctx, out, max);
}

static int again(void *ctx)
{
    return flexkv_events_again(ctx);
}

static int fd_of(void *ctx)
{
    return flexkv_events_fd(ctx);
}

static int open_publisher(struct fk_node *node)
{
    const struct fk_settings *set = node->set;
    const struct fk_publisher_params params = {
        .endpoint = set->kv_events_endpoint, .replay_endpoint = set->kv_events_replay_endpoint,
        .topic = set->kv_events_topic, .rank = set->kv_events_rank,
        .n_ranks = (uint32_t)set->kv_events_ranks, .hwm = (int)set->kv_events_hwm,
        .history_batches = (size_t)set->kv_events_replay_batches,
        .history_bytes = set->kv_events_replay_bytes,
        .endpoint_setting = "kv_events_endpoint", .replay_setting = "kv_events_replay_endpoint",
    };
    const struct fk_event_source source = { .take = take, .again = again, .fd = fd_of,
                                            .ctx = node->published };
    const struct fk_zmq *zmq;
    char error[512];

    int rc = fk_zmq_load(set->kv_events_zmq_library, "kv_events_zmq_library", &zmq, error, sizeof(error));
    if (!rc)
        rc = fk_publisher_open(zmq, &params, &source, &node->publisher, error, sizeof(error));
    return rc ? fk_api_fail(rc, "%s", error) : 0;
}

int fk_node_publish_start(struct fk_node *node)
{
    if (node->set->kv_events_ranks > 1 && node->set->kv_events_rank < 0)
        return fk_api_fail(-EINVAL, "kv_events_ranks is %d: set kv_events_rank to the first of them",
                           (int)node->set->kv_events_ranks);
    if (node->set->max_spaces > 1)
        fk_warn("kv_events_endpoint: the node may hold %d models (max_spaces); a router cannot tell "
                "their blocks apart: give each model a daemon of its own, if they share a router",
                (int)node->set->max_spaces);
    int rc = flexkv_events_open(&node->pub, NULL, &node->published);
    if (!rc)
        rc = open_publisher(node);
    if (rc)
        fk_node_publish_stop(node);
    return rc;
}

void fk_node_publish_stop(struct fk_node *node)
{
    fk_publisher_close(node->publisher);
    flexkv_events_close(node->published);
    node->publisher = NULL;
    node->published = NULL;
}

json_t *fk_node_publish_json(const struct fk_node *node)
{
    struct fk_publisher_stats st;
    json_t *o = json_object();

    fk_publisher_stats(node->publisher, &st);
    const struct { const char *name; uint64_t n; } fields[] = {
        { "batches", st.batches }, { "bytes", st.bytes }, { "stored_blocks", st.stored },
        { "removed_blocks", st.removed }, { "dropped_batches", st.dropped }, { "resyncs", st.resyncs },
        { "subscriptions", st.subscriptions }, { "replay_requests", st.requests },
        { "bad_replay_requests", st.bad_requests }, { "replayed_batches", st.replayed },
        { "source_errors", st.source_errors }, { "next_seq", st.next_seq },
    };
    json_object_set_new(o, "endpoint", json_string(node->set->kv_events_endpoint));
    json_object_set_new(o, "replay_endpoint", json_string(node->set->kv_events_replay_endpoint));
    for (size_t i = 0; i < fk_array_size(fields); i++)
        json_object_set_new(o, fields[i].name, json_integer((json_int_t)fields[i].n));
    return o;
}
