/* heap.c - see heap.h. */
#include "index/heap.h"

#include "base/util.h"
#include "index/index.h"

int fk_heap_reserve(struct fk_heap *h, uint32_t n)
{
    if (n <= h->cap)
        return 0;
    uint32_t cap = h->cap ? h->cap : 64;
    while (cap < n)
        cap += cap / 2;
    void *p = realloc(h->items, cap * sizeof(*h->items));
    if (!p)
        return -ENOMEM;
    h->items = p;
    h->cap = cap;
    return 0;
}

void fk_heap_fini(struct fk_heap *h)
{
    free(h->items);
    h->items = NULL;
    h->len = h->cap = 0;
}

static void place(struct fk_heap *h, uint32_t at, struct fk_heap_item item)
{
    h->items[at] = item;
    h->entries[item.entry].pos[h->tier] = at | h->pos_bit;
}

static uint32_t sift_up(struct fk_heap *h, uint32_t at, struct fk_heap_item item)
{
    while (at > 0) {
        uint32_t up = (at - 1) / 2;
        if (h->items[up].score <= item.score)
            break;
        place(h, at, h->items[up]);
        at = up;
    }
    return at;
}

static uint32_t sift_down(struct fk_heap *h, uint32_t at, struct fk_heap_item item)
{
    for (;;) {
        uint32_t down = 2 * at + 1;
        if (down >= h->len)
            return at;
        if (down + 1 < h->len && h->items[down + 1].score < h->items[down].score)
            down++;
        if (h->items[down].score >= item.score)
            return at;
        place(h, at, h->items[down]);
        at = down;
    }
}

static void settle(struct fk_heap *h, uint32_t at, struct fk_heap_item item)
{
    uint32_t to = sift_up(h, at, item);

    if (to == at)
        to = sift_down(h, at, item);
    place(h, to, item);
}

void fk_heap_push(struct fk_heap *h, uint32_t score, uint32_t entry)
{
    struct fk_heap_item item = { score, entry };
    uint32_t at = h->len++;

    place(h, sift_up(h, at, item), item);
}

void fk_heap_remove(struct fk_heap *h, uint32_t at)
{
    h->entries[h->items[at].entry].pos[h->tier] = FK_NONE;
    struct fk_heap_item last = h->items[--h->len];
    if (at < h->len)
        settle(h, at, last);
}

void fk_heap_update(struct fk_heap *h, uint32_t at, uint32_t score)
{
    settle(h, at, (struct fk_heap_item){ score, h->items[at].entry });
}

void fk_heap_replace(struct fk_heap *h, uint32_t at, uint32_t score, uint32_t entry)
{
    h->entries[h->items[at].entry].pos[h->tier] = FK_NONE;
    settle(h, at, (struct fk_heap_item){ score, entry });
}
