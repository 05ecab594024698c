/*
 * net_watch.c - stands between the peer tier and the core and transport below it, and looks at everything that goes
 * through: fetches (the linker puts __wrap_X where the peer tier calls X), grants and releases, what goes wrong on the
 * way. Knows which slots are in use, by whom. Callers: the linker, the loopback's hub, all of tests/net.
 */
#include "net.h"
#include "net_place.h"
#include "net_store.h"
#include "transport/endpoint.h"

/* ---- slots in use ---- */

void net_use(struct net_world *w, struct net_node *p, struct net_use *u, bool write, const char *what, uint32_t slot)
{
    NET_CHECK(w, !u->writers, "slot in use: %s slot %u of node %u is being written, and now %s", what, slot,
              net_at(w, p), write ? "written again" : "read");
    NET_CHECK(w, !write || !u->readers, "slot in use: %s slot %u of node %u is being read, and now written", what,
              slot, net_at(w, p));
    if (write)
        u->writers++;
    else
        u->readers++;
}

void net_unuse(struct net_use *u, bool write)
{
    if (write)
        u->writers--;
    else
        u->readers--;
}

/* The cpu slot is about to be written: no block may still be announced as being in it. */
void net_check_unowned(struct net_world *w, struct net_node *p, uint32_t space, uint32_t slot)
{
    uint32_t family = w->type[p->space[space].type].family;

    for (size_t k = 0; k < p->have.len; k++)
        NET_CHECK(w, !p->have.data[k].there[FK_TIER_CPU] || p->have.data[k].slot[FK_TIER_CPU] != slot ||
                         w->keys.data[k].family != family,
                  "slot reuse: cpu slot %u of node %u is written while key %zu is announced there", slot, net_at(w, p),
                  k);
}

/* May the transport still write to the buffer? */
bool net_transport_holds(struct net_node *p, const void *buffer)
{
    const struct fk_transport *t = p->transport;

    for (size_t i = 0; i < t->inbox.len; i++)
        if (t->inbox.data[i].kind == FK_NOTE_READ && t->inbox.data[i].read.buffer == buffer)
            return true;
    for (size_t i = 0; i < t->peers.len; i++) {
        const struct fk_op_list *lists[] = { &t->peers.data[i]->queued, &t->peers.data[i]->sent,
                                             &t->peers.data[i]->late };
        for (size_t l = 0; l < fk_array_size(lists); l++)
            for (const struct fk_op *op = lists[l]->head; op; op = op->next)
                if (op->r.buffer == buffer)
                    return true;
    }
    return false;
}

/* ---- fetches ---- */

static struct net_node *node_of_core(const struct fk_core *core)
{
    for (uint32_t i = 0; i < NET_NODES; i++)
        if (net_alive(net_current, i) && net_current->node[i].core == core)
            return &net_current->node[i];
    return NULL;
}

struct net_fetch *net_fetch_of(struct net_node *p, uint64_t id)
{
    for (size_t i = 0; i < p->fetches.len; i++)
        if (p->fetches.data[i].id == id)
            return &p->fetches.data[i];
    return NULL;
}

static uint8_t *slot_at(struct net_node *p, const struct net_fetch *f)
{
    return p->space[f->space].pool + (size_t)f->cpu_slot * p->space[f->space].slot_bytes;
}

struct net_fetch *net_fetch_into(struct net_node *p, const void *buffer)
{
    for (size_t i = 0; i < p->fetches.len; i++)
        if (slot_at(p, &p->fetches.data[i]) == buffer)
            return &p->fetches.data[i];
    return NULL;
}

uint32_t __real_fk_core_take_fetches(struct fk_core *core, struct fk_core_fetch *out, uint32_t max);
uint32_t __wrap_fk_core_take_fetches(struct fk_core *core, struct fk_core_fetch *out, uint32_t max);
uint32_t __wrap_fk_core_take_fetches(struct fk_core *core, struct fk_core_fetch *out, uint32_t max)
{
    struct net_world *w = net_current;
    struct net_node *p = node_of_core(core);
    uint32_t n = __real_fk_core_take_fetches(core, out, max);

    net_take_events(w, p);
    for (uint32_t i = 0; i < n; i++) {
        struct net_fetch f = { .id = out[i].id, .taken = net_now(w, p), .cpu_slot = out[i].cpu_slot,
                               .key = net_key_find(w, out[i].key), .stored = !p->peers, .serial = w->place->serial };
        while (f.space < p->n_spaces && p->space[f.space].id != out[i].space)
            f.space++;
        NET_CHECK(w, f.key != FK_NONE && f.space < p->n_spaces && f.cpu_slot < p->space[f.space].cpu_slots &&
                         !net_fetch_of(p, f.id), "fetch of no key, space or slot, or taken twice");
        net_use(w, p, &p->space[f.space].cpu_use[f.cpu_slot], true, "cpu", f.cpu_slot);
        NET_CHECK(w, !net_transport_holds(p, slot_at(p, &f)), "quarantine: cpu slot %u of node %u is given to a fetch "
                  "while a read of before may still write to it", f.cpu_slot, net_at(w, p));
        net_check_unowned(w, p, f.space, f.cpu_slot);
        NET_TRACE(w, "  node %u wants key %u in cpu slot %u", net_at(w, p), f.key, f.cpu_slot);
        if (fk_vec_push(&p->fetches, f))
            abort();
    }
    return n;
}

static void let_go(struct net_world *w, struct net_node *p, struct net_fetch *f)
{
    NET_CHECK(w, !net_transport_holds(p, slot_at(p, f)), "quarantine: the fetch of key %u at node %u has let go of cpu "
              "slot %u, and a read may still write to it", f->key, net_at(w, p), f->cpu_slot);
    net_unuse(&p->space[f->space].cpu_use[f->cpu_slot], true);
    *f = p->fetches.data[--p->fetches.len];
}

static void see_done(struct net_world *w, struct net_node *p, const struct fk_core_fetch_done *d)
{
    struct net_fetch *f = net_fetch_of(p, d->id);

    NET_CHECK(w, f && !f->ended, "a fetch ended twice, or was none");
    NET_CHECK(w, d->status || !d->busy, "a fetch ended well and its slot is busy");
    NET_CHECK(w, d->status || net_bytes_ok(w, p->space[f->space].type, f->key, slot_at(p, f)),
              "wrong bytes: node %u fetched key %u and has other bytes", net_at(w, p), f->key);
    NET_CHECK(w, d->status || !f->stored || f->serial < p->reset_serial || f->born > p->reset_serial,
              "reset: node %u has key %u from the store, which was forgotten there", net_at(w, p), f->key);
    NET_TRACE(w, "  node %u fetch of key %u: %d%s", net_at(w, p), f->key, d->status, d->busy ? ", slot busy" : "");
    net_mix(w, f->key * 2 + d->busy);
    f->ended = true;
    w->n.quarantined += d->busy && !f->stored;
    w->n.store_late += d->busy && f->stored;
    if (!d->busy)
        let_go(w, p, f);
}

void __real_fk_core_fetch_done(struct fk_core *core, const struct fk_core_fetch_done *done, uint32_t n,
                               uint64_t now_us);
void __wrap_fk_core_fetch_done(struct fk_core *core, const struct fk_core_fetch_done *done, uint32_t n,
                               uint64_t now_us);
void __wrap_fk_core_fetch_done(struct fk_core *core, const struct fk_core_fetch_done *done, uint32_t n,
                               uint64_t now_us)
{
    for (uint32_t i = 0; i < n; i++)
        see_done(net_current, node_of_core(core), &done[i]);
    __real_fk_core_fetch_done(core, done, n, now_us);
}

void __real_fk_core_fetch_released(struct fk_core *core, uint64_t id, uint64_t now_us);
void __wrap_fk_core_fetch_released(struct fk_core *core, uint64_t id, uint64_t now_us);
void __wrap_fk_core_fetch_released(struct fk_core *core, uint64_t id, uint64_t now_us)
{
    struct net_world *w = net_current;
    struct net_node *p = node_of_core(core);
    struct net_fetch *f = net_fetch_of(p, id);

    NET_CHECK(w, f && f->ended, "a slot was released that is not busy");
    let_go(w, p, f);
    __real_fk_core_fetch_released(core, id, now_us);
}

static struct net_node *node_of_transport(const struct fk_transport *t)
{
    for (uint32_t i = 0; i < NET_NODES; i++)
        if (net_alive(net_current, i) && net_current->node[i].transport == t)
            return &net_current->node[i];
    return NULL;
}

/* Into the slot of a fetch that is under way, of its key, with its deadline, and nothing else reads into it. */
static void see_read(struct net_world *w, struct net_node *p, const struct fk_read *r, uint64_t deadline_us)
{
    uint32_t key = net_key_find(w, r->block.key);

    for (size_t i = 0; i < p->fetches.len; i++) {
        struct net_fetch *f = &p->fetches.data[i];
        if (slot_at(p, f) != r->buffer)
            continue;
        NET_CHECK(w, !f->ended && !f->stored && f->key == key, "a read of key %u into the slot of key %u", key, f->key);
        NET_CHECK(w, deadline_us <= f->taken + w->home[p->home].fetch_us, "a read has more time than its fetch");
        NET_CHECK(w, !net_transport_holds(p, r->buffer), "quarantine: node %u reads key %u into a slot that another "
                  "read may still write to", net_at(w, p), key);
        NET_CHECK(w, r->block.bytes == p->space[f->space].slot_bytes, "a read of %u bytes", r->block.bytes);
        return;
    }
    net_fail(w, "a read into no slot of a fetch at node %u", net_at(w, p));
}

int __real_fk_transport_read(struct fk_transport *t, uint32_t peer, const struct fk_read *r, uint32_t n,
                             uint64_t deadline_us);
int __wrap_fk_transport_read(struct fk_transport *t, uint32_t peer, const struct fk_read *r, uint32_t n,
                             uint64_t deadline_us);
int __wrap_fk_transport_read(struct fk_transport *t, uint32_t peer, const struct fk_read *r, uint32_t n,
                             uint64_t deadline_us)
{
    for (uint32_t i = 0; i < n; i++)
        see_read(net_current, node_of_transport(t), &r[i], deadline_us);
    return __real_fk_transport_read(t, peer, r, n, deadline_us);
}

/* ---- grants: the owner's side ---- */

static struct net_grant *grant_of(struct net_node *p, const struct fk_block_ref *r, const struct fk_grant *g)
{
    for (size_t i = 0; i < p->grants.len; i++)
        if (p->grants.data[i].pin == g->pin && p->grants.data[i].data == g->data &&
            fk_key_equal(p->grants.data[i].ref.key, r->key))
            return &p->grants.data[i];
    return NULL;
}

/* May node p lend what is asked for? Judged when it is asked. */
static void see_asked(struct net_world *w, struct net_node *p, const struct fk_block_ref *r)
{
    uint32_t key = net_key_find(w, r->key), family = key == FK_NONE ? 0 : w->keys.data[key].family;

    NET_CHECK(w, key != FK_NONE && p->space_of[family] != FK_NONE, "a grant of no key of node %u", net_at(w, p));
    const struct net_have *h = net_have(p, key);
    NET_CHECK(w, r->tier < FK_TIERS && h->there[r->tier] && h->slot[r->tier] == r->slot,
              "node %u lends key %u from tier %u slot %u, where it is not", net_at(w, p), key, r->tier, r->slot);
    uint32_t generation = p->space[p->space_of[family]].generation[r->tier][r->slot];
    NET_CHECK(w, r->generation == generation, "node %u lends from tier %u slot %u by generation %llu, it is %u",
              net_at(w, p), r->tier, r->slot, (unsigned long long)r->generation, generation);
    NET_CHECK(w, r->epoch == p->epoch && p->epoch, "one self: node %u grants a read of epoch %llu, its own is %llu",
              net_at(w, p), (unsigned long long)r->epoch, (unsigned long long)p->epoch);
    NET_CHECK(w, !(w->home[p->home].private_ns >> w->keys.data[key].ns & 1),
              "private: node %u lends key %u of namespace %u", net_at(w, p), key, w->keys.data[key].ns);
    NET_CHECK(w, r->tier == FK_TIER_CPU ? w->home[p->home].share_cpu : w->home[p->home].share_ssd,
              "private: node %u lends from tier %u", net_at(w, p), r->tier);
}

/* It lends: what it lends stays as it is until the release. */
static void see_grant(struct net_world *w, struct net_node *p, const struct fk_block_ref *r, const struct fk_grant *g)
{
    struct net_grant x = { .ref = *r, .pin = g->pin, .data = g->data, .key = net_key_find(w, r->key),
                           .slot = FK_NONE };
    const uint8_t *data = g->data;

    x.space = p->space_of[w->keys.data[x.key].family];
    x.stay = net_have(p, x.key)->stay[r->tier];
    struct net_space *sp = &p->space[x.space];
    NET_CHECK(w, net_bytes_ok(w, sp->type, x.key, data), "node %u lends other bytes than those of key %u", net_at(w, p),
              x.key);
    if (data >= sp->pool && data < sp->pool + (size_t)sp->cpu_slots * sp->slot_bytes) {
        x.slot = (uint32_t)((size_t)(data - sp->pool) / sp->slot_bytes);
        net_use(w, p, &sp->cpu_use[x.slot], false, "cpu", x.slot);
    }
    for (size_t i = 0; i < p->grants.len && x.slot == FK_NONE; i++)
        NET_CHECK(w, p->grants.data[i].data != data, "a staging buffer of node %u is lent twice", net_at(w, p));
    if (fk_vec_push(&p->grants, x))
        abort();
}

int net_grant(void *ctx, const struct fk_block_ref *r, struct fk_grant *g)
{
    struct net_world *w = net_current;
    struct net_node *p = ctx;

    NET_CHECK(w, net_runs(w, net_at(w, p)), "sim: node %u is asked, and does not run", net_at(w, p));
    int rc = p->peers ? fk_peers_grant(p->peers, r, g) : -ENOENT;
    p->transport->now_us = net_now(w, p);       /* its own clock, not the reader's */
    NET_TRACE(w, "  node %u is asked for tier %u slot %u: %d", net_at(w, p), r->tier, r->slot, rc);
    if (rc == 0 || rc == -EINPROGRESS)
        see_asked(w, p, r);
    if (rc == 0)
        see_grant(w, p, r, g);
    struct net_later l = { g->later, *r };
    if (rc == -EINPROGRESS && fk_vec_push(&p->later, l))
        abort();
    net_after(w, p);
    net_soon(w, p);
    return rc;
}

int __real_fk_transport_granted(struct fk_transport *t, uint64_t later, int rc, const struct fk_grant *g);
int __wrap_fk_transport_granted(struct fk_transport *t, uint64_t later, int rc, const struct fk_grant *g);
int __wrap_fk_transport_granted(struct fk_transport *t, uint64_t later, int rc, const struct fk_grant *g)
{
    struct net_world *w = net_current;
    struct net_node *p = node_of_transport(t);

    for (size_t i = 0; i < p->later.len; i++) {
        struct net_later l = p->later.data[i];
        if (l.later != later)
            continue;
        p->later.data[i] = p->later.data[--p->later.len];
        int taken = __real_fk_transport_granted(t, later, rc, g);
        if (!taken && !rc)
            see_grant(w, p, &l.ref, g);
        return taken;
    }
    net_fail(w, "node %u grants what nobody has asked for, or twice", net_at(w, p));
}

int net_release(void *ctx, const struct fk_block_ref *r, struct fk_grant *g)
{
    struct net_world *w = net_current;
    struct net_node *p = ctx;
    struct net_grant *found = grant_of(p, r, g);

    NET_CHECK(w, found, "a release of no grant");
    struct net_grant x = *found;
    *found = p->grants.data[--p->grants.len];
    const struct net_have *h = net_have(p, x.key);
    bool same = x.slot == FK_NONE || (h->there[x.ref.tier] && h->stay[x.ref.tier] == x.stay);
    NET_CHECK(w, net_bytes_ok(w, p->space[x.space].type, x.key, x.data), "lent slot reused: key %u of node %u has other "
              "bytes at the end of the loan", x.key, net_at(w, p));
    if (x.slot != FK_NONE)
        net_unuse(&p->space[x.space].cpu_use[x.slot], false);
    int rc = fk_peers_release(p->peers, r, g);
    NET_CHECK(w, rc || same || p->ending, "node %u says that key %u was there all the time of a loan", net_at(w, p),
              x.key);
    if (!p->ending) {
        net_after(w, p);
        net_soon(w, p);
    }
    return rc;
}

/* A block of p as it is announced, or would be; false: it has none of that key. */
static bool true_ref(struct net_world *w, struct net_node *p, uint32_t key, uint32_t tier, struct fk_block_ref *r)
{
    uint32_t space = p->space_of[w->keys.data[key].family];
    const struct net_have *h = net_have(p, key);

    if (space == FK_NONE || !h->there[tier])
        return false;
    const struct net_space *sp = &p->space[space];
    *r = (struct fk_block_ref){ .key = w->keys.data[key].key, .epoch = p->epoch, .slot = h->slot[tier], .tier = tier,
                                .generation = sp->generation[tier][h->slot[tier]], .bytes = sp->slot_bytes };
    memcpy(&r->space, w->type[sp->type].fingerprint, sizeof(r->space));
    return true;
}

void net_spy(struct net_world *w, struct net_node *p)
{
    uint32_t key = w->keys.len ? net_below(w, (uint32_t)w->keys.len) : 0, tier = net_below(w, FK_TIERS);
    const struct net_home *h = &w->home[p->home];
    struct fk_grant g = { 0 };
    struct fk_block_ref r;

    if (!w->keys.len || !p->peers || !true_ref(w, p, key, tier, &r))
        return;
    if ((tier ? h->share_ssd : h->share_cpu) && !(h->private_ns >> w->keys.data[key].ns & 1)) {
        switch (net_below(w, 4)) {      /* it is shared: something else has to be wrong */
        case 0: r.epoch--; break;
        case 1: r.generation--; break;
        case 2: r.space ^= (uint64_t)1 << net_below(w, 64); break;
        default: r.key = w->keys.data[(key + 1) % w->keys.len].key; break;
        }
        if (fk_key_equal(r.key, w->keys.data[key].key) && w->keys.len == 1)
            r.epoch--;
    }
    int rc = fk_peers_grant(p->peers, &r, &g);
    NET_CHECK(w, rc == -ENOENT || rc == -EACCES, "private: node %u is asked for key %u (namespace %u) in tier %u by who "
              "may not have it so, and says %d", net_at(w, p), key, w->keys.data[key].ns, tier, rc);
    net_after(w, p);
}

/* ---- the network ---- */

static struct net_node *node_at(struct net_world *w, const char *address)
{
    for (uint32_t i = 0; i < NET_NODES; i++)
        if (net_alive(w, i) && strcmp(w->node[i].address, address) == 0)
            return &w->node[i];
    return NULL;
}

/* Nobody is there: the host says so, or there is none any more. */
static bool host_silent(const struct net_world *w, const char *address)
{
    for (uint32_t h = 0; h < w->n_homes; h++) {
        size_t n = strlen(net_name(h));
        if (strncmp(address, net_name(h), n) == 0 && address[n] == '/')
            return w->host_lost[h];
    }
    return false;
}

void net_read_fault(void *ctx, const char *to, const struct fk_read *r, struct fk_loopback_fault *out)
{
    struct net_world *w = ctx;
    struct net_node *from = w->stepping, *owner = node_at(w, to);
    uint32_t what = net_below(w, 1024);

    out->delay_us = net_below(w, w->quiet ? 400 : w->slow_us);
    out->serve_us = net_chance(w, 3) ? net_below(w, w->quiet ? 200 : w->calm ? 1000 : 20000) : 0;
    if (owner ? w->cut_us[net_at(w, from)][net_at(w, owner)] > w->net.now_us : host_silent(w, to)) {
        out->drop = true;
        w->n.cut_reads++;
    } else if (what >= w->fault_ppk || w->quiet) {
        return;
    } else if (what % 4 == 0) {
        out->drop = true;
        out->delay_us = net_chance(w, 2) ? net_below(w, 300000) : 0;
        w->n.dropped++;
    } else if (what % 4 == 1) {
        out->delay_us += net_below(w, (uint32_t)w->home[from->home].fetch_us * 3);
        w->n.delayed++;
    } else if (what % 4 == 2) {
        out->corrupt = true;
        w->n.corrupted++;
    } else {
        out->refuse = true;
        w->n.reset_reads++;
    }
}
