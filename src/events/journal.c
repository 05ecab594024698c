/* journal.c - see journal.h. */
#include "events/journal.h"

int fk_journal_init(struct fk_journal *j, uint64_t bytes)
{
    *j = (struct fk_journal){ .bytes = 4096 };
    while (j->bytes < bytes)
        j->bytes *= 2;
    j->ring = malloc(j->bytes);
    return j->ring ? 0 : -ENOMEM;
}

void fk_journal_fini(struct fk_journal *j)
{
    free(j->ring);
    memset(j, 0, sizeof(*j));
}

static struct fk_event *event_at(const struct fk_journal *j, uint64_t place)
{
    return (struct fk_event *)(void *)(j->ring + (place & (j->bytes - 1)));
}

/* Places are multiples of 8 and an event's header is 40 bytes: where the ring's rest is too short for
 * one, it is skipped without a mark. */
static uint64_t rest_of_ring(const struct fk_journal *j, uint64_t place)
{
    return j->bytes - (place & (j->bytes - 1));
}

static uint64_t next_place(const struct fk_journal *j, uint64_t place)
{
    uint64_t rest = rest_of_ring(j, place);

    return place + (rest < sizeof(struct fk_event) ? rest : fk_event_bytes(event_at(j, place)));
}

static void make_room(struct fk_journal *j, uint64_t bytes)
{
    while (j->head + bytes - j->tail > j->bytes)
        j->tail = next_place(j, j->tail);
}

void fk_journal_gap(struct fk_journal *j)
{
    j->head += 8;
    j->tail = j->head;
}

struct fk_event *fk_journal_add(struct fk_journal *j, uint32_t n_tokens)
{
    struct fk_event shape = { .kind = FK_EVENT_STORED, .n_tokens = n_tokens };
    uint64_t bytes = fk_event_bytes(&shape), rest = rest_of_ring(j, j->head);

    j->made++;
    if (bytes > j->bytes / 2) {
        fk_journal_gap(j);
        return NULL;
    }
    if (rest < bytes) {
        make_room(j, rest);
        if (rest >= sizeof(struct fk_event))
            *event_at(j, j->head) = (struct fk_event){ .n_tokens = (uint32_t)rest };
        j->head += rest;
    }
    make_room(j, bytes);
    struct fk_event *e = event_at(j, j->head);
    e->n_tokens = n_tokens;
    j->head += bytes;
    return e;
}

const struct fk_event *fk_journal_next(const struct fk_journal *j, uint64_t *cursor)
{
    while (*cursor < j->head) {
        const struct fk_event *e = event_at(j, *cursor);
        bool whole = rest_of_ring(j, *cursor) >= sizeof(*e);
        *cursor = next_place(j, *cursor);
        if (whole && e->kind != FK_EVENT_SKIP)
            return e;
    }
    return NULL;
}

void fk_event_list_clear(struct fk_event_list *list)
{
    list->bytes.len = 0;
    list->n = 0;
}

void fk_event_list_free(struct fk_event_list *list)
{
    fk_vec_free(&list->bytes);
    list->n = 0;
}

int fk_event_list_add(struct fk_event_list *list, const struct fk_event *e, const uint32_t *tokens)
{
    size_t bytes = fk_event_bytes(e);

    if (fk_vec_reserve(&list->bytes, list->bytes.len + bytes))
        return -ENOMEM;
    struct fk_event *copy = (struct fk_event *)(void *)(list->bytes.data + list->bytes.len);
    *copy = *e;
    if (e->n_tokens)
        memcpy(fk_event_tokens(copy), tokens, e->n_tokens * sizeof(*tokens));
    list->bytes.len += bytes;
    list->n++;
    return 0;
}

static bool sound(const struct fk_event *e, size_t left)
{
    return (e->kind == FK_EVENT_STORED || e->kind == FK_EVENT_REMOVED) && e->medium >= 1 &&
           e->medium <= 3 && e->root <= 1 && e->nameless <= 1 && fk_event_bytes(e) <= left;
}

int fk_event_list_load(struct fk_event_list *list, const void *data, size_t bytes, uint32_t n)
{
    size_t at = 0, first = list->bytes.len;

    if (fk_vec_reserve(&list->bytes, first + bytes))
        return -ENOMEM;
    if (bytes)
        memcpy(list->bytes.data + first, data, bytes);
    for (uint32_t i = 0; i < n; i++) {
        const struct fk_event *e = (const void *)(list->bytes.data + first + at);
        if (bytes - at < sizeof(*e) || !sound(e, bytes - at))
            return -EPROTO;
        at += fk_event_bytes(e);
    }
    if (at != bytes)
        return -EPROTO;
    list->bytes.len += bytes;
    list->n += n;
    return 0;
}
