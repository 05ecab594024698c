/* status.c - what a node is doing, as one JSON object: for `flexkv status`, `flexkv top` and whoever
 * wants to look. Built under the node's lock from what is in memory anyway. */
#include <jansson.h>

#include "api/peer.h"
#include "base/clock.h"

static json_t *number(uint64_t n)
{
    return json_integer((json_int_t)n);
}

static json_t *tier_json(const flexkv_tier_stats *t)
{
    json_t *o = json_object();

    json_object_set_new(o, "slots", number(t->slots));
    json_object_set_new(o, "free_slots", number(t->free_slots));
    json_object_set_new(o, "hit_blocks", number(t->hit_blocks));
    json_object_set_new(o, "stored_blocks", number(t->stored_blocks));
    json_object_set_new(o, "evicted_blocks", number(t->evicted_blocks));
    json_object_set_new(o, "bytes_read", number(t->bytes_read));
    json_object_set_new(o, "bytes_written", number(t->bytes_written));
    json_object_set_new(o, "errors", number(t->errors));
    return o;
}

static json_t *stats_json(const flexkv_stats *s)
{
    const struct { const char *name; uint64_t n; } fields[] = {
        { "matches", s->matches }, { "match_blocks", s->match_blocks },
        { "miss_blocks", s->miss_blocks }, { "declined_blocks", s->declined_blocks },
        { "gets", s->gets }, { "puts", s->puts }, { "prefetches", s->prefetches },
        { "cancelled", s->cancelled }, { "timeouts", s->timeouts },
        { "get_blocks", s->get_blocks }, { "get_failed_blocks", s->get_failed_blocks },
        { "put_blocks", s->put_blocks }, { "put_dropped_blocks", s->put_dropped_blocks },
        { "blocks", s->blocks }, { "index_bytes", s->index_bytes }, { "leases", s->leases },
        { "operations", s->operations }, { "write_backlog_blocks", s->write_backlog_blocks },
        { "events", s->events }, { "events_taken", s->events_taken },
        { "event_resyncs", s->event_resyncs },
    };
    json_t *o = json_object();

    for (size_t i = 0; i < fk_array_size(fields); i++)
        json_object_set_new(o, fields[i].name, number(fields[i].n));
    json_object_set_new(o, "cpu", tier_json(&s->cpu));
    json_object_set_new(o, "ssd", tier_json(&s->ssd));
    json_object_set_new(o, "peer", tier_json(&s->peer));
    return o;
}

static json_t *spaces_json(const struct fk_node *node)
{
    json_t *list = json_array();

    for (const struct fk_space *s = node->spaces; s; s = s->next) {
        uint32_t free_slots[FK_TIERS];
        json_t *o = json_object();
        fk_core_space_free(node->core, s->id, free_slots);
        json_object_set_new(o, "name", json_string(s->name));
        json_object_set_new(o, "tokens_per_block", number(s->tokens_per_block));
        json_object_set_new(o, "ranks", number(s->ranks));
        json_object_set_new(o, "slice_bytes", number(s->slice_bytes));
        json_object_set_new(o, "slot_bytes", number(s->slot_bytes));
        json_object_set_new(o, "cpu_slots", number(s->cpu_slots));
        json_object_set_new(o, "ssd_slots", number(s->ssd_slots));
        json_object_set_new(o, "cpu_used", number(s->cpu_slots - free_slots[FK_TIER_CPU]));
        json_object_set_new(o, "ssd_used", number(s->ssd_slots - free_slots[FK_TIER_SSD]));
        json_object_set_new(o, "copy_us_per_block", json_real(s->rates.copy.us));
        json_object_set_new(o, "ssd_us_per_block", json_real(s->rates.ssd.us));
        json_object_set_new(o, "peer_us_per_block", json_real(s->rates.fetch.us));
        json_object_set_new(o, "compute_us_per_block", json_real(s->rates.compute_us));
        json_array_append_new(list, o);
    }
    return list;
}

static json_t *agents_json(const struct fk_node *node, const struct fk_instance *in)
{
    json_t *list = json_array();

    for (const struct fk_link *l = node->links; l; l = l->next) {
        if (l->in != in)
            continue;
        json_t *o = json_object();
        json_object_set_new(o, "worker", number(l->hello.worker));
        json_object_set_new(o, "slice", number(l->hello.slice));
        json_object_set_new(o, "replica", number(l->hello.replica));
        json_object_set_new(o, "pid", json_integer(l->peer->pid));
        json_object_set_new(o, "pages", number(l->hello.pages));
        json_object_set_new(o, "jobs", number(l->n_jobs));
        json_array_append_new(list, o);
    }
    return list;
}

static json_t *instances_json(const struct fk_node *node)
{
    json_t *list = json_array();

    for (const struct fk_instance *in = node->instances; in; in = in->next) {
        json_t *o = json_object();
        json_object_set_new(o, "name", json_string(in->name));
        json_object_set_new(o, "space", json_string(in->space->name));
        json_object_set_new(o, "workers", number(in->n_workers));
        json_object_set_new(o, "registered", number(in->n_registered));
        json_object_set_new(o, "jobs_out", number(fk_core_instance_jobs(node->core, in->id)));
        json_object_set_new(o, "client_pid",
                            json_integer(in->owner ? fk_server_session_pid(node, in->owner) : 0));
        json_object_set_new(o, "ended", json_boolean(in->ended));
        json_object_set_new(o, "agents", agents_json(node, in));
        json_array_append_new(list, o);
    }
    return list;
}

static void peers_json(const struct fk_node *node, json_t *clients, json_t *waiting)
{
    uint64_t now = fk_clock_us();

    for (const struct fk_peer *p = node->server ? node->server->peers : NULL; p; p = p->next) {
        json_t *o = json_object();
        json_object_set_new(o, "pid", json_integer(p->pid));
        if (p->session) {
            json_object_set_new(o, "since_s", number((now - p->since_us) / 1000000));
            json_array_append(clients, o);
        } else if (p->link && !p->link->in) {
            json_object_set_new(o, "instance", json_string(p->link->hello.instance));
            json_object_set_new(o, "space", json_string(p->link->hello.space));
            json_object_set_new(o, "worker", number(p->link->hello.worker));
            json_array_append(waiting, o);
        }
        json_decref(o);
    }
}

int fk_node_status_json(struct fk_node *node, char **text)
{
    flexkv_stats st = { .struct_bytes = sizeof(st) };
    json_t *root = json_object(), *clients = json_array(), *waiting = json_array();

    fk_local_stats(&node->pub, &st);
    json_object_set_new(root, "version", json_string(flexkv_version()));
    json_object_set_new(root, "pid", json_integer(getpid()));
    json_object_set_new(root, "uptime_s", number((fk_clock_us() - node->started_us) / 1000000));
    json_object_set_new(root, "address", json_string(node->server ? node->server->address : ""));
    json_object_set_new(root, "stats", stats_json(&st));
    if (node->publisher)
        json_object_set_new(root, "kv_events", fk_node_publish_json(node));
    pthread_mutex_lock(&node->lock);
    json_object_set_new(root, "spaces", spaces_json(node));
    json_object_set_new(root, "instances", instances_json(node));
    peers_json(node, clients, waiting);
    if (node->sharing)
        json_object_set_new(root, "cluster", fk_node_share_json(node));
    if (node->remote)
        json_object_set_new(root, "store", fk_node_remote_json(node));
    pthread_mutex_unlock(&node->lock);
    json_object_set_new(root, "clients", clients);
    json_object_set_new(root, "waiting_agents", waiting);
    *text = json_dumps(root, JSON_INDENT(2));
    json_decref(root);
    return *text ? 0 : fk_api_fail(-ENOMEM, "out of memory");
}
