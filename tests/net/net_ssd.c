/*
 * net_ssd.c - a node's SSD: slots that keep bytes, read and written late and in any order. It stands for the real
 * store, whose own faults are the business of tests/sim: what is read is what was written under that key, or an
 * error. It outlives its process; writes under way at kill -9 are torn. Caller: net_node.c.
 */
#include "net.h"

#define BATCH 16

static struct net_space *space_by_id(struct net_node *p, uint32_t id, uint32_t *at)
{
    for (*at = 0; *at < p->n_spaces; (*at)++)
        if (p->space[*at].id == id)
            return &p->space[*at];
    return NULL;
}

static void add_io(struct net_world *w, struct net_node *p, struct net_io io)
{
    bool slow = !w->calm && !w->quiet && net_chance(w, 100);

    io.due_us = w->net.now_us + 10 + net_below(w, 200) + (slow ? net_below(w, 300000) : 0);
    io.resets = p->ssd_resets;
    if (fk_vec_push(&p->ios, io))
        abort();
}

static void take_one(struct net_world *w, struct net_node *p, const struct fk_core_ssd_req *r)
{
    uint32_t at;
    struct net_space *sp = space_by_id(p, r->space, &at);

    NET_CHECK(w, sp, "ssd request for no space of node %u", net_at(w, p));
    if (r->kind == FK_SSD_RESET) {
        p->ssd_resets++;
        for (uint32_t i = 0; i < sp->ssd_slots; i++)
            sp->ssd[i].used = false;
        return;
    }
    NET_CHECK(w, r->ssd_slot < sp->ssd_slots, "ssd request for slot %u of %u", r->ssd_slot, sp->ssd_slots);
    if (r->kind == FK_SSD_FORGET) {
        sp->ssd[r->ssd_slot].used = false;
        return;
    }
    bool read = r->kind == FK_SSD_READ;
    NET_TRACE(w, "  node %u ssd %s key %u: ssd slot %u, cpu slot %u", net_at(w, p), read ? "read" : "write",
              net_key_find(w, r->key), r->ssd_slot, r->cpu_slot);
    net_use(w, p, &sp->ssd_use[r->ssd_slot], !read, "ssd", r->ssd_slot);
    net_use(w, p, &sp->cpu_use[r->cpu_slot], read, "cpu", r->cpu_slot);
    if (read)
        net_check_unowned(w, p, at, r->cpu_slot);
    else
        sp->ssd[r->ssd_slot].torn = true;
    add_io(w, p, (struct net_io){ .kind = read ? NET_IO_READ : NET_IO_WRITE, .id = r->id, .space = at,
                                  .ssd_slot = r->ssd_slot, .cpu_slot = r->cpu_slot, .key = r->key,
                                  .parent = r->parent, .tag = r->tag,
                                  .buffer = sp->pool + (size_t)r->cpu_slot * sp->slot_bytes });
}

/* What others want to read from here, too. */
bool net_ssd_take(struct net_world *w, struct net_node *p)
{
    struct fk_core_ssd_req reqs[BATCH];
    struct fk_peers_stage stage[BATCH];
    uint32_t n = fk_core_take_ssd(p->core, reqs, BATCH), m, at;

    net_after(w, p);
    for (uint32_t i = 0; i < n; i++)
        take_one(w, p, &reqs[i]);
    m = p->peers ? fk_peers_take_stage(p->peers, stage, BATCH) : 0;
    for (uint32_t i = 0; i < m; i++) {
        struct net_space *sp = space_by_id(p, stage[i].space, &at);
        NET_CHECK(w, sp && stage[i].ssd_slot < sp->ssd_slots, "stage of no slot");
        net_use(w, p, &sp->ssd_use[stage[i].ssd_slot], false, "ssd", stage[i].ssd_slot);
        add_io(w, p, (struct net_io){ .kind = NET_IO_STAGE, .id = stage[i].id, .space = at, .key = stage[i].key,
                                      .ssd_slot = stage[i].ssd_slot, .buffer = stage[i].buffer });
        w->n.staged++;
    }
    return n || m;
}

static int perform(struct net_world *w, struct net_node *p, const struct net_io *io)
{
    struct net_space *sp = &p->space[io->space];
    struct net_ssd_slot *s = &sp->ssd[io->ssd_slot];

    if (!w->calm && !w->quiet && net_chance(w, 500))
        return -EIO;
    if (io->kind != NET_IO_WRITE) {
        if (!s->used || s->torn || !fk_key_equal(s->key, io->key)) {
            w->n.torn++;
            return -EBADMSG;
        }
        memcpy(io->buffer, s->bytes, sp->slot_bytes);
        return 0;
    }
    if (io->resets != p->ssd_resets)
        return -ECANCELED;
    *s = (struct net_ssd_slot){ .used = true, .key = io->key, .parent = io->parent, .tag = io->tag,
                                .seq = ++p->ssd_seq };
    memcpy(s->bytes, io->buffer, sp->slot_bytes);
    return 0;
}

static void finish(struct net_world *w, struct net_node *p, const struct net_io *io)
{
    struct net_space *sp = &p->space[io->space];
    int status = perform(w, p, io);

    net_unuse(&sp->ssd_use[io->ssd_slot], io->kind == NET_IO_WRITE);
    if (io->kind == NET_IO_STAGE) {
        fk_peers_staged(p->peers, (uint32_t)io->id, status);
    } else {
        struct fk_core_ssd_done done = { io->id, status };
        net_unuse(&sp->cpu_use[io->cpu_slot], io->kind == NET_IO_READ);
        fk_core_ssd_done(p->core, &done, 1, net_now(w, p));
    }
    net_after(w, p);
}

bool net_ssd_done(struct net_world *w, struct net_node *p)
{
    bool any = false;

    for (size_t i = 0; i < p->ios.len;) {
        struct net_io io = p->ios.data[i];
        if (io.due_us > w->net.now_us) {
            i++;
            continue;
        }
        p->ios.data[i] = p->ios.data[--p->ios.len];
        finish(w, p, &io);
        any = true;
    }
    return any;
}

uint64_t net_ssd_next(const struct net_node *p)
{
    uint64_t next = UINT64_MAX;

    for (size_t i = 0; i < p->ios.len; i++)
        next = fk_min(next, p->ios.data[i].due_us);
    return next;
}

uint32_t net_ssd_found(struct net_node *p, uint32_t space, struct fk_core_found *out)
{
    const struct net_space *sp = &p->space[space];
    uint32_t n = 0;

    for (uint32_t i = 0; i < sp->ssd_slots; i++) {
        const struct net_ssd_slot *s = &sp->ssd[i];
        if (!s->used)
            continue;
        out[n++] = (struct fk_core_found){ .key = s->key, .parent = s->parent, .seq = s->seq, .slot = i,
                                           .tag = s->tag };
        p->ssd_seq = fk_max(p->ssd_seq, s->seq);
    }
    return n;
}
