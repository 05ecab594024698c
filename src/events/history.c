/* history.c - see history.h. */
#include "events/history.h"

#include "base/util.h"

struct fk_batch *fk_batch_new(size_t bytes)
{
    struct fk_batch *b = malloc(sizeof(*b) + bytes);

    if (!b)
        return NULL;
    b->clears = false;
    b->blocks = 0;
    b->seq = 0;
    b->bytes = bytes;
    atomic_store_explicit(&b->refs, 1, memory_order_relaxed);
    return b;
}

struct fk_batch *fk_batch_ref(struct fk_batch *batch)
{
    /* Whoever gives it back has seen the bytes, whatever way it took to him. */
    atomic_fetch_add_explicit(&batch->refs, 1, memory_order_release);
    return batch;
}

void fk_batch_unref(struct fk_batch *batch)
{
    if (batch && atomic_fetch_sub_explicit(&batch->refs, 1, memory_order_acq_rel) == 1)
        free(batch);
}

int fk_history_init(struct fk_history *h, size_t max_batches, uint64_t max_bytes)
{
    *h = (struct fk_history){ .cap = max_batches, .max_bytes = max_bytes };
    h->slot = calloc(max_batches + 1, sizeof(*h->slot));
    return h->slot ? 0 : -ENOMEM;
}

static void forget_oldest(struct fk_history *h)
{
    struct fk_batch *b = h->slot[h->first];

    h->first = (h->first + 1) % h->cap;
    h->count--;
    h->bytes -= b->bytes;
    fk_batch_unref(b);
}

void fk_history_free(struct fk_history *h)
{
    while (h->count)
        forget_oldest(h);
    free(h->slot);
    *h = (struct fk_history){ 0 };
}

void fk_history_push(struct fk_history *h, struct fk_batch *batch)
{
    while (h->count && (batch->clears || h->count == h->cap ||
                        h->bytes + batch->bytes > h->max_bytes))
        forget_oldest(h);
    if (!h->cap || batch->bytes > h->max_bytes)
        return;
    h->slot[(h->first + h->count++) % h->cap] = fk_batch_ref(batch);
    h->bytes += batch->bytes;
}

struct fk_batch *fk_history_at(const struct fk_history *h, uint64_t seq)
{
    if (!h->count)
        return NULL;
    uint64_t first = h->slot[h->first]->seq;
    uint64_t skip = seq > first ? seq - first : 0;
    return skip < h->count ? h->slot[(h->first + skip) % h->cap] : NULL;
}

bool fk_history_covers(const struct fk_history *h, uint64_t seq)
{
    if (!h->count)
        return false;
    const struct fk_batch *first = h->slot[h->first];
    return seq >= first->seq || first->clears;
}

int fk_history_parse_request(const struct fk_frame *frames, size_t n, uint64_t *start)
{
    if (n == 2 && frames[0].bytes == 0) {
        frames++;
        n--;
    }
    if (n != 1 || frames[0].bytes != 8)
        return -EBADMSG;
    *start = fk_get_be64(frames[0].data);
    return 0;
}
