/*
 * session_events.c - a client's request for KV events: what it asks the node for, as bytes. The
 * subscription itself, with its view, is the client's (feed.h): the node keeps nothing for it. See session.c,
 * wire.h.
 */
#include "api/feed.h"
#include "api/peer.h"

#define WALK_BYTES (512u * 1024)        /* of one answer, about */
#define WALK_PORTIONS 256u              /* or so many looks at the index */

static int append(struct fk_session_events *x, const void *data, size_t bytes)
{
    if (fk_vec_reserve(&x->body, x->body.len + bytes))
        return -ENOMEM;
    memcpy(x->body.data + x->body.len, data, bytes);
    x->body.len += bytes;
    return 0;
}

static int append_label(struct fk_node *node, struct fk_session_events *x, uint32_t number)
{
    static const uint8_t zero[8];
    pthread_mutex_lock(&node->lock);
    struct fk_label l = fk_node_label_at(node, number);
    pthread_mutex_unlock(&node->lock);
    struct fk_wire_event_label w = { number, (uint16_t)strlen(l.lora ? l.lora : ""),
                                     (uint16_t)strlen(l.salt ? l.salt : "") };
    int rc = append(x, &w, sizeof(w));

    if (!rc && w.lora)
        rc = append(x, l.lora, w.lora);
    if (!rc && w.salt)
        rc = append(x, l.salt, w.salt);
    x->reply.n_labels++;
    return rc ? rc : append(x, zero, -(size_t)(w.lora + w.salt) & 7);
}

/* The texts of all labels that the events name. */
static int append_labels(struct fk_node *node, struct fk_session_events *x,
                         const struct fk_event_list *list)
{
    FK_VEC(uint32_t) seen = { 0 };
    const struct fk_event *e;
    size_t at = 0;
    int rc = 0;

    while (!rc && (e = fk_event_list_next(list, &at)) != NULL) {
        size_t i = seen.len;
        while (e->label && i > 0 && seen.data[i - 1] != e->label)
            i--;
        if (!e->label || i)
            continue;
        rc = fk_vec_push(&seen, e->label);
        if (!rc)
            rc = append_label(node, x, e->label);
    }
    fk_vec_free(&seen);
    x->reply.label_bytes = (uint32_t)x->body.len;
    return rc;
}

static int collect(struct fk_node *node, struct fk_session_events *x, struct fk_event_list *list,
                   bool *armed)
{
    const struct fk_wire_events *r = &x->request;
    struct fk_event_cursor at = { r->boot, r->place };
    uint32_t walk_at = r->walk_at;
    int rc = 0;

    switch (r->what) {
    case FK_WIRE_EVENTS_START:
        fk_node_events_start(node, r->flag, &at);
        break;
    case FK_WIRE_EVENTS_FETCH:
        rc = fk_node_events_fetch(node, x->space, &at, list, FK_FEED_PORTION,
                                  r->flag ? FK_IDLE_REMOTE : FK_IDLE_NOT, NULL);
        *armed = !rc && r->flag && !list->n;
        break;
    case FK_WIRE_EVENTS_WALK:
        for (uint32_t i = 0; !rc && i < WALK_PORTIONS && walk_at != FK_NONE &&
             list->bytes.len < WALK_BYTES; i++)
            rc = fk_node_events_walk(node, x->space, NULL, &walk_at, list);
        break;
    default:
        rc = -EPROTO;
    }
    x->reply = (struct fk_wire_events_reply){ .boot = at.boot, .place = at.place,
                                              .walk_at = walk_at, .n_events = list->n };
    return rc;
}

int fk_session_events_run(struct fk_node *node, struct fk_session_events *x, bool *armed)
{
    struct fk_event_list list = { 0 };

    *armed = false;
    if (!node->events)
        return fk_api_fail(-EOPNOTSUPP, "the daemon keeps no KV events: start it with "
                           "enable_kv_events (or DYNAMO_USE_FLEXKV) set to 1");
    if (x->request.taken)
        fk_node_events_count(node, x->request.taken);
    int rc = collect(node, x, &list, armed);
    if (!rc)
        rc = append_labels(node, x, &list);
    if (!rc && list.bytes.len)
        rc = append(x, list.bytes.data, list.bytes.len);
    fk_event_list_free(&list);
    return rc ? fk_api_fail(rc, "KV events: %s", strerror(-rc)) : 0;
}
