/* view.c - see view.h. Open addressing; a removal moves back what stands behind it. */
#include "events/view.h"

void fk_view_fini(struct fk_view *v)
{
    free(v->items);
    memset(v, 0, sizeof(*v));
}

void fk_view_clear(struct fk_view *v)
{
    if (v->items)
        memset(v->items, 0, (v->mask + 1) * sizeof(*v->items));
    v->n = 0;
}

/* Ids are parts of keys: random already. */
static uint64_t home(const struct fk_view *v, uint64_t id, uint8_t medium)
{
    return ((id ^ medium) * 0x9e3779b97f4a7c15ull >> 20) & v->mask;
}

static struct fk_view_item *place(const struct fk_view *v, uint64_t id, uint8_t medium)
{
    uint64_t at = home(v, id, medium);

    while (v->items[at].medium && (v->items[at].id != id || v->items[at].medium != medium))
        at = (at + 1) & v->mask;
    return &v->items[at];
}

static int grow(struct fk_view *v)
{
    struct fk_view old = *v;
    uint64_t size = old.items ? (old.mask + 1) * 2 : 1024;

    if (old.items && v->n < (v->mask + 1) / 4 * 3)
        return 0;
    v->items = calloc(size, sizeof(*v->items));
    if (!v->items) {
        v->items = old.items;
        return -ENOMEM;
    }
    v->mask = size - 1;
    for (uint64_t i = 0; old.items && i <= old.mask; i++)
        if (old.items[i].medium)
            *place(v, old.items[i].id, old.items[i].medium) = old.items[i];
    free(old.items);
    v->sweep_at = 0;
    return 0;
}

int fk_view_add(struct fk_view *v, const struct fk_view_item *item)
{
    if (grow(v))
        return -ENOMEM;
    struct fk_view_item *at = place(v, item->id, item->medium);
    int fresh = !at->medium;
    if (fresh) {
        *at = *item;
        v->n++;
    }
    at->round = v->round;
    return fresh;
}

bool fk_view_see(struct fk_view *v, uint64_t id, uint8_t medium)
{
    struct fk_view_item *at = v->n ? place(v, id, medium) : NULL;

    if (!at || !at->medium)
        return false;
    at->round = v->round;
    return true;
}

static void take_out(struct fk_view *v, uint64_t hole)
{
    for (uint64_t at = (hole + 1) & v->mask; v->items[at].medium; at = (at + 1) & v->mask) {
        uint64_t from = home(v, v->items[at].id, v->items[at].medium);
        if (((at - from) & v->mask) < ((at - hole) & v->mask))
            continue;               /* it would stand before its home */
        v->items[hole] = v->items[at];
        hole = at;
    }
    v->items[hole].medium = 0;
    v->n--;
}

bool fk_view_remove(struct fk_view *v, uint64_t id, uint8_t medium, struct fk_view_item *out)
{
    struct fk_view_item *at = v->n ? place(v, id, medium) : NULL;

    if (!at || !at->medium)
        return false;
    uint64_t hole = (uint64_t)(at - v->items);
    *out = *at;
    take_out(v, hole);
    v->sweep_at = fk_min(v->sweep_at, hole);    /* what moved there may not have been looked at */
    return true;
}

/* Of the 256 numbers of rounds none may be left from 256 rounds ago. */
void fk_view_round_begin(struct fk_view *v)
{
    v->sweep_at = 0;
    if (++v->round)
        return;
    for (uint64_t i = 0; v->items && i <= v->mask; i++)
        v->items[i].round = 0;
    v->round = 1;
}

/* What a removal moves goes from behind to the front, at most to the place just looked at: nothing
 * that was not looked at yet is passed. */
uint32_t fk_view_round_gone(struct fk_view *v, struct fk_view_item *out, uint32_t max)
{
    uint32_t n = 0;

    while (v->items && v->sweep_at <= v->mask && n < max) {
        struct fk_view_item *at = &v->items[v->sweep_at];
        if (!at->medium || at->round == v->round) {
            v->sweep_at++;
            continue;
        }
        out[n++] = *at;
        take_out(v, v->sweep_at);
    }
    return n;
}
