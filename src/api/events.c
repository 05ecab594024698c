/*
 * events.c - KV events of a local node: the core's events get the names that stand at their slots and go
 * into the journal; subscriptions of this process read it. See feed.h, src/events.
 *
 * Lock: node->lock; what says so takes it itself.
 */
#include <sys/random.h>

#include "api/feed.h"
#include "api/node_impl.h"
#include "base/clock.h"
#include "events/announce.h"
#include "events/names_file.h"

#define WALK_PORTION 64u                /* entries looked at under the lock */

struct fk_node_events {
    struct fk_journal journal;
    struct fk_labels labels;
    flexkv_events *feeds;
    FK_VEC(uint32_t) slots;         /* of the put under way */
    uint64_t taken, resyncs;
    uint64_t boot;                  /* cursors of another journal are worth nothing here */
    bool remote_armed, remote_news; /* a session waits for events; there are some */
    bool warned;                    /* of too many labels */
};

int fk_node_events_create(struct fk_node *node)
{
    struct fk_node_events *e = calloc(1, sizeof(*e));

    if (!e || fk_journal_init(&e->journal, node->set->kv_events_buffer_bytes)) {
        free(e);
        return fk_api_fail(-ENOMEM, "no memory for KV events; lower kv_events_buffer_mb");
    }
    if (getrandom(&e->boot, sizeof(e->boot), 0) != sizeof(e->boot))
        e->boot = fk_clock_ns();
    node->events = e;
    return 0;
}

void fk_node_events_destroy(struct fk_node *node)
{
    struct fk_node_events *e = node->events;

    while (e->feeds) {
        flexkv_events *ev = e->feeds;
        e->feeds = ev->next;
        fk_feed_orphan(ev);
    }
    fk_journal_fini(&e->journal);
    fk_labels_fini(&e->labels);
    fk_vec_free(&e->slots);
    free(e);
    node->events = NULL;
}

void fk_node_events_stats(struct fk_node *node, flexkv_stats *out)
{
    out->events = node->events->journal.made;
    out->events_taken = node->events->taken;
    out->event_resyncs = node->events->resyncs;
}

/* ---- from the core to the journal ---- */

static void wake_feeds(struct fk_node *node)
{
    struct fk_node_events *e = node->events;

    for (flexkv_events *ev = e->feeds; ev; ev = ev->next)
        if (ev->armed)
            fk_feed_wake(ev);
    if (!e->remote_armed)
        return;
    e->remote_armed = false;
    e->remote_news = true;
    fk_server_wake(node);
}

bool fk_node_events_news(struct fk_node *node)
{
    bool news = node->events && node->events->remote_news;

    if (news)
        node->events->remote_news = false;
    return news;
}

void fk_node_events_look_anew(struct fk_node *node)
{
    fk_journal_gap(&node->events->journal);
    wake_feeds(node);
}

void fk_node_events_drain(struct fk_node *node)
{
    struct fk_node_events *e = node->events;
    struct fk_core_event ev[64];
    struct fk_space *s = NULL;
    uint64_t head = e ? e->journal.head : 0;
    uint32_t n;

    while ((n = fk_core_take_events(node->core, ev, fk_array_size(ev))) > 0) {
        if (node->sharing)
            fk_node_share_tell(node, ev, n);
        if (node->remote)
            fk_node_remote_tell(node, ev, n);
        for (uint32_t i = 0; e && i < n; i++) {
            if (!s || s->id != ev[i].space)
                s = fk_node_space(node, ev[i].space);
            if (s)                  /* else its opening failed half-way */
                fk_announce(&e->journal, s->names, &ev[i]);
        }
    }
    if (fk_core_events_lost(node->core)) {
        if (e)
            fk_journal_gap(&e->journal);
        if (node->sharing)
            fk_node_share_lost(node);
    }
    if (e && e->journal.head != head)
        wake_feeds(node);
}

/* ---- names of a put ---- */

uint32_t *fk_node_events_slots(struct fk_node *node, uint32_t n)
{
    struct fk_node_events *e = node->events;

    return fk_vec_reserve(&e->slots, fk_max(n, 1u)) ? NULL : e->slots.data;
}

/* Block i of the put as routers call it; hash 0: it has no name. */
static struct fk_name name_of(const struct fk_namespace *ns, const flexkv_op_args *a, uint32_t first, uint32_t i)
{
    if (!a->event_hashes || ns->label == FK_NONE)
        return (struct fk_name){ 0 };
    return (struct fk_name){ .hash = a->event_hashes[i], .label = ns->label, .root = first + i == 0,
                             .parent = i ? a->event_hashes[i - 1] : a->event_parent };
}

void fk_node_events_name_known(struct fk_namespace *ns, const flexkv_op_args *a, const struct fk_key *keys,
                               uint32_t first, uint32_t n)
{
    struct fk_space *s = ns->instance->space;
    struct fk_node_events *e = s->node->events;
    uint64_t head = e->journal.head;

    if (!a->event_hashes || ns->label == FK_NONE || fk_vec_reserve(&e->slots, fk_max(n, 1u)))
        return;
    fk_core_cpu_slots(s->node->core, ns->instance->id, keys, n, e->slots.data);
    for (uint32_t i = 0; i < n; i++) {
        uint32_t slot = e->slots.data[i];
        if (slot == FK_NONE || s->names->name[slot].hash)
            continue;
        struct fk_name name = name_of(ns, a, first, i);
        struct fk_core_event ev = { .key = keys[i], .slot = { slot, FK_NONE }, .space = s->id,
                                    .tier = FK_TIER_CPU, .stored = true };
        if (first + i)
            ev.parent = keys[(ptrdiff_t)i - 1];
        fk_names_set(s->names, slot, &name, a->event_tokens + (size_t)i * s->tokens_per_block);
        fk_announce(&e->journal, s->names, &ev);
    }
    if (e->journal.head != head)
        wake_feeds(s->node);
}

void fk_node_events_name(struct fk_namespace *ns, const flexkv_op_args *a, uint32_t first,
                         const uint32_t *slots, uint32_t n)
{
    struct fk_space *s = ns->instance->space;

    fk_node_events_drain(s->node);  /* what has left these slots had other names */
    for (uint32_t i = 0; i < n; i++) {
        if (slots[i] == FK_NONE)
            continue;
        struct fk_name name = name_of(ns, a, first, i);
        fk_names_set(s->names, slots[i], &name,
                     a->event_tokens + (size_t)i * s->tokens_per_block);
    }
}

int fk_local_namespace_label(flexkv_namespace *pub, const char *lora_name, const char *cache_salt)
{
    struct fk_namespace *ns = fk_local_namespace(pub);
    struct fk_node *node = ns->instance->space->node;

    if (!node->events)
        return 0;
    pthread_mutex_lock(&node->lock);
    ns->label = fk_labels_get(&node->events->labels, lora_name, cache_salt);
    if (ns->label == FK_NONE && !node->events->warned) {
        node->events->warned = true;
        fk_warn("more than %u pairs of LoRA name and cache salt: blocks of further ones make no KV "
                "events", FK_LABELS_MAX);
    }
    pthread_mutex_unlock(&node->lock);
    return 0;
}

uint32_t fk_node_events_label(struct fk_node *node, uint64_t id)
{
    if (!id)
        return 0;
    pthread_mutex_lock(&node->lock);
    uint32_t number = fk_labels_find(&node->events->labels, id);
    pthread_mutex_unlock(&node->lock);
    return number;
}

struct fk_label fk_node_label_at(struct fk_node *node, uint32_t number)
{
    return *fk_labels_at(&node->events->labels, number);
}

uint32_t fk_node_label_get(struct fk_node *node, const struct fk_label *label)
{
    pthread_mutex_lock(&node->lock);
    uint32_t number = fk_labels_get(&node->events->labels, label->lora, label->salt);
    pthread_mutex_unlock(&node->lock);
    return number;
}

uint32_t fk_node_events_label_of(struct fk_node *node, const char *lora, const char *salt)
{
    return fk_labels_get(&node->events->labels, lora, salt);
}

/* ---- what subscriptions ask for; without the lock ---- */

void fk_node_events_start(struct fk_node *node, bool resync, struct fk_event_cursor *at)
{
    pthread_mutex_lock(&node->lock);
    fk_node_events_drain(node);
    *at = (struct fk_event_cursor){ node->events->boot, node->events->journal.head };
    node->events->resyncs += resync;
    pthread_mutex_unlock(&node->lock);
}

int fk_node_events_fetch(struct fk_node *node, uint32_t space, struct fk_event_cursor *at,
                         struct fk_event_list *list, uint32_t max, enum fk_when_idle idle,
                         flexkv_events *ev)
{
    const struct fk_event *e;
    int rc = 0;

    pthread_mutex_lock(&node->lock);
    const struct fk_journal *j = &node->events->journal;
    if (at->boot != node->events->boot || !fk_journal_has(j, at->place))
        rc = -ESTALE;
    while (!rc && list->n < max && list->bytes.len < FK_FEED_BYTES &&
           (e = fk_journal_next(j, &at->place)) != NULL)
        if (space == FK_NONE || space == e->space)
            rc = fk_event_list_add(list, e, fk_event_tokens(e));
    if (!rc && !list->n && idle == FK_IDLE_LOCAL)
        fk_feed_quiet(ev);
    if (!rc && !list->n && idle == FK_IDLE_REMOTE)
        node->events->remote_armed = true;
    pthread_mutex_unlock(&node->lock);
    return rc;
}

struct absent_reader {
    struct fk_node *node;
    struct fk_space *space;
    struct fk_names_reader names;
    uint32_t *tokens;
};

static int reader_to(struct absent_reader *r, uint32_t space)
{
    if (r->space && r->space->id == space)
        return 0;
    if (r->space)
        fk_names_reader_end(&r->names);
    free(r->tokens);
    pthread_mutex_lock(&r->node->lock);
    r->space = fk_node_space(r->node, space);
    uint32_t dirs_out = r->space->dirs_out;
    pthread_mutex_unlock(&r->node->lock);
    fk_names_reader_begin(&r->names, r->space->names_file, FK_NAMES_WINDOW_SMALL, dirs_out);
    r->tokens = malloc(r->space->tokens_per_block * sizeof(*r->tokens));
    return r->tokens ? 0 : -ENOMEM;
}

static int add_absent(struct absent_reader *r, const struct fk_absent_name *a,
                      struct fk_event_list *list)
{
    struct fk_event e = { .id = fk_event_id(a->key), .space = a->space, .hash = a->hash,
                          .kind = FK_EVENT_STORED, .medium = FK_MEDIUM_STORAGE, .nameless = 1 };
    struct fk_stored_name name;
    int rc = reader_to(r, a->space);

    if (!rc && fk_names_reader_get(&r->names, a->slot, a->key, &name, r->tokens) &&
        name.hash == a->hash && (e.label = fk_node_events_label(r->node, name.label)) != FK_NONE) {
        e.parent = name.parent;
        e.root = name.root;
        e.n_tokens = r->space->tokens_per_block;
        e.nameless = 0;
    }
    e.label = e.nameless ? 0 : e.label;
    return rc ? rc : fk_event_list_add(list, &e, r->tokens);
}

/* Names that are on disk only. Of what has gone since, the removed event is behind the cursor; what is
 * in its slot now has another key. */
static int add_all_absent(struct fk_node *node, const struct fk_absent_name *absent, uint32_t n,
                          struct fk_event_list *list)
{
    struct absent_reader r = { .node = node };
    int rc = 0;

    for (uint32_t i = 0; i < n && !rc; i++)
        rc = add_absent(&r, &absent[i], list);
    if (r.space)
        fk_names_reader_end(&r.names);
    free(r.tokens);
    return rc;
}

int fk_node_events_walk(struct fk_node *node, uint32_t space, struct fk_view *view, uint32_t *at,
                        struct fk_event_list *list)
{
    struct fk_core_present there[WALK_PORTION];
    struct fk_absent_name absent[WALK_PORTION];
    struct fk_space *s = NULL;
    uint32_t n_absent = 0;
    int rc = 0;

    pthread_mutex_lock(&node->lock);
    uint32_t n = fk_core_present(node->core, at, there, WALK_PORTION);
    for (uint32_t i = 0; i < n && !rc; i++) {
        if (!s || s->id != there[i].space)
            s = fk_node_space(node, there[i].space);
        if (!s || (space != FK_NONE && space != s->id))
            continue;
        rc = fk_announce_present(list, view, s->names, &there[i], &absent[n_absent]);
        n_absent += !rc && absent[n_absent].hash;
    }
    pthread_mutex_unlock(&node->lock);
    return rc ? rc : add_all_absent(node, absent, n_absent, list);
}

void fk_node_events_count(struct fk_node *node, uint64_t taken)
{
    pthread_mutex_lock(&node->lock);
    node->events->taken += taken;
    pthread_mutex_unlock(&node->lock);
}

/* ---- a subscription of this process ---- */

#define node_of(ev) fk_local_node((ev)->node)

static int local_start(flexkv_events *ev, bool resync)
{
    fk_node_events_start(node_of(ev), resync, &ev->cursor);
    return 0;
}

static int local_fetch(flexkv_events *ev, uint32_t max, bool idle)
{
    return fk_node_events_fetch(node_of(ev), ev->space, &ev->cursor, &ev->list, max,
                                idle ? FK_IDLE_LOCAL : FK_IDLE_NOT, ev);
}

static int local_walk(flexkv_events *ev)
{
    return fk_node_events_walk(node_of(ev), ev->space, &ev->view, &ev->walk_at, &ev->list);
}

static void local_count(flexkv_events *ev, uint32_t n)
{
    fk_node_events_count(node_of(ev), n);
}

static void local_leave(flexkv_events *ev)
{
    struct fk_node *node = node_of(ev);
    flexkv_events **at;

    pthread_mutex_lock(&node->lock);
    for (at = &node->events->feeds; *at != ev; at = &(*at)->next)
        ;
    *at = ev->next;
    pthread_mutex_unlock(&node->lock);
}

static struct fk_label local_label(flexkv_events *ev, uint32_t number)
{
    struct fk_node *node = node_of(ev);

    if (!number)
        return (struct fk_label){ 0 };
    pthread_mutex_lock(&node->lock);
    struct fk_label l = *fk_labels_at(&node->events->labels, number);
    pthread_mutex_unlock(&node->lock);
    return l;
}

static const struct fk_feed_ops local_ops = {
    .start = local_start, .fetch = local_fetch, .walk = local_walk, .count = local_count,
    .leave = local_leave, .label = local_label,
};

int fk_local_events_open(flexkv_node *pub, flexkv_space *space, flexkv_events **out)
{
    struct fk_node *node = fk_local_node(pub);

    if (!node->events)
        return fk_api_fail(-EOPNOTSUPP, "the node keeps no KV events: set enable_kv_events "
                           "(or DYNAMO_USE_FLEXKV) to 1");
    flexkv_events *ev = fk_feed_create(pub, &local_ops,
                                       space ? fk_local_instance(space)->space->id : FK_NONE);
    if (!ev)
        return fk_api_fail(-ENOMEM, "no memory or file descriptor for a subscription");
    pthread_mutex_lock(&node->lock);
    ev->next = node->events->feeds;
    node->events->feeds = ev;
    pthread_mutex_unlock(&node->lock);
    *out = ev;
    return 0;
}
