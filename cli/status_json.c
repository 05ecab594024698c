/* status_json.c - see status_json.h. Every list is read by one loop, with a reader per element. */
#include "status_json.h"

#include <ctype.h>
#include <jansson.h>

static uint64_t number(const json_t *object, const char *key)
{
    const json_t *value = json_object_get(object, key);
    double real = json_number_value(value);

    if (json_is_integer(value))
        return json_integer_value(value) > 0 ? (uint64_t)json_integer_value(value) : 0;
    return real > 0 && real < 1e18 ? (uint64_t)real : 0;
}

static double real(const json_t *object, const char *key)
{
    double value = json_number_value(json_object_get(object, key));

    return value > 0 ? value : 0;
}

/* Names may be anything; on a terminal they must be neither commands nor of another width. */
static void text(const json_t *object, const char *key, char *out, size_t bytes)
{
    const char *value = json_string_value(json_object_get(object, key));
    size_t n = 0;

    for (; value && value[n] && n + 1 < bytes; n++)
        out[n] = value[n] >= 0x20 && value[n] < 0x7f ? value[n] : '?';
    out[n] = '\0';
}
#define TEXT(object, key, field) text(object, key, field, sizeof(field))

static void read_tier(const json_t *o, struct flexkv_tier_stats *t)
{
    *t = (struct flexkv_tier_stats){
        .slots = number(o, "slots"), .free_slots = number(o, "free_slots"),
        .hit_blocks = number(o, "hit_blocks"), .stored_blocks = number(o, "stored_blocks"),
        .evicted_blocks = number(o, "evicted_blocks"), .bytes_read = number(o, "bytes_read"),
        .bytes_written = number(o, "bytes_written"), .errors = number(o, "errors"),
    };
}

static void read_stats(const json_t *o, struct flexkv_stats *s)
{
    const struct { const char *name; uint64_t *to; } fields[] = {
        { "matches", &s->matches }, { "match_blocks", &s->match_blocks },
        { "miss_blocks", &s->miss_blocks }, { "gets", &s->gets }, { "puts", &s->puts },
        { "prefetches", &s->prefetches }, { "cancelled", &s->cancelled },
        { "timeouts", &s->timeouts }, { "get_blocks", &s->get_blocks },
        { "get_failed_blocks", &s->get_failed_blocks }, { "put_blocks", &s->put_blocks },
        { "put_dropped_blocks", &s->put_dropped_blocks }, { "blocks", &s->blocks },
        { "index_bytes", &s->index_bytes }, { "leases", &s->leases },
        { "operations", &s->operations }, { "write_backlog_blocks", &s->write_backlog_blocks },
        { "declined_blocks", &s->declined_blocks }, { "events", &s->events },
        { "events_taken", &s->events_taken }, { "event_resyncs", &s->event_resyncs },
    };

    for (size_t i = 0; i < fk_array_size(fields); i++)
        *fields[i].to = number(o, fields[i].name);
    read_tier(json_object_get(o, "cpu"), &s->cpu);
    read_tier(json_object_get(o, "ssd"), &s->ssd);
    read_tier(json_object_get(o, "peer"), &s->peer);
}

/* Appends read(element) for each element of the list under key. */
#define READ_LIST(object, key, vec, read) \
    do { \
        const json_t *list_ = json_object_get(object, key), *element_; \
        size_t i_; \
        json_array_foreach (list_, i_, element_) { \
            int rc_ = fk_vec_reserve(vec, (vec)->len + 1); \
            if (rc_) \
                return rc_; \
            memset(&(vec)->data[(vec)->len], 0, sizeof(*(vec)->data)); \
            rc_ = read(element_, &(vec)->data[(vec)->len++]); \
            if (rc_) \
                return rc_; \
        } \
    } while (0)

static int read_space(const json_t *o, struct status_space *s)
{
    TEXT(o, "name", s->name);
    s->tokens_per_block = number(o, "tokens_per_block");
    s->ranks = number(o, "ranks");
    s->slice_bytes = number(o, "slice_bytes");
    s->slot_bytes = number(o, "slot_bytes");
    if (!s->slot_bytes)
        s->slot_bytes = s->ranks * s->slice_bytes;
    s->cpu_slots = number(o, "cpu_slots");
    s->ssd_slots = number(o, "ssd_slots");
    s->cpu_used = number(o, "cpu_used");
    s->ssd_used = number(o, "ssd_used");
    s->copy_us = real(o, "copy_us_per_block");
    s->ssd_us = real(o, "ssd_us_per_block");
    s->peer_us = real(o, "peer_us_per_block");
    s->compute_us = real(o, "compute_us_per_block");
    return 0;
}

static int read_agent(const json_t *o, struct status_agent *a)
{
    *a = (struct status_agent){
        .worker = number(o, "worker"), .slice = number(o, "slice"),
        .replica = number(o, "replica"), .pid = number(o, "pid"), .pages = number(o, "pages"),
        .jobs = number(o, "jobs"),
    };
    return 0;
}

static int read_instance(const json_t *o, struct status_instance *in)
{
    TEXT(o, "name", in->name);
    TEXT(o, "space", in->space);
    in->workers = number(o, "workers");
    in->registered = number(o, "registered");
    in->jobs_out = number(o, "jobs_out");
    in->client_pid = number(o, "client_pid");
    in->ended = json_is_true(json_object_get(o, "ended"));
    READ_LIST(o, "agents", &in->agents, read_agent);
    return 0;
}

static int read_client(const json_t *o, struct status_client *c)
{
    c->pid = number(o, "pid");
    c->since_s = real(o, "since_s");
    return 0;
}

static int read_waiting(const json_t *o, struct status_waiting *w)
{
    TEXT(o, "instance", w->instance);
    TEXT(o, "space", w->space);
    w->worker = number(o, "worker");
    w->pid = number(o, "pid");
    return 0;
}

static int read_peer(const json_t *o, struct status_peer *p)
{
    TEXT(o, "name", p->name);
    p->cpu_blocks = number(o, "cpu_blocks");
    p->ssd_blocks = number(o, "ssd_blocks");
    p->alive = json_is_true(json_object_get(o, "alive"));
    p->synced = json_is_true(json_object_get(o, "synced"));
    return 0;
}

static int read_cluster(const json_t *o, struct status_cluster *c)
{
    TEXT(o, "name", c->name);
    TEXT(o, "cluster", c->cluster);
    TEXT(o, "redis", c->redis);
    TEXT(o, "transport", c->transport);
    TEXT(o, "address", c->address);
    c->remote_blocks = number(o, "remote_blocks");
    c->remote_index_bytes = number(o, "remote_index_bytes");
    c->fetched_bytes = number(o, "fetched_bytes");
    c->fetched_blocks = number(o, "fetched_blocks");
    c->failed_blocks = number(o, "failed_blocks");
    c->lent_blocks = number(o, "lent_blocks");
    c->refused = number(o, "refused");
    READ_LIST(o, "peers", &c->peers, read_peer);
    return 0;
}

static int read_status(const json_t *o, struct status *s)
{
    TEXT(o, "version", s->version);
    TEXT(o, "address", s->address);
    s->pid = number(o, "pid");
    s->uptime_s = real(o, "uptime_s");
    read_stats(json_object_get(o, "stats"), &s->stats);
    READ_LIST(o, "spaces", &s->spaces, read_space);
    READ_LIST(o, "instances", &s->instances, read_instance);
    READ_LIST(o, "clients", &s->clients, read_client);
    READ_LIST(o, "waiting_agents", &s->waiting, read_waiting);
    return read_cluster(json_object_get(o, "cluster"), &s->cluster);
}

int status_parse(const char *json, struct status *out)
{
    json_t *root = json_loads(json, 0, NULL);
    int rc = json_is_object(root) ? 0 : -EINVAL;

    *out = (struct status){ 0 };
    if (!rc)
        rc = read_status(root, out);
    json_decref(root);
    return rc;
}

void status_free(struct status *s)
{
    for (size_t i = 0; i < s->instances.len; i++)
        fk_vec_free(&s->instances.data[i].agents);
    fk_vec_free(&s->spaces);
    fk_vec_free(&s->instances);
    fk_vec_free(&s->clients);
    fk_vec_free(&s->waiting);
    fk_vec_free(&s->cluster.peers);
}
