/*
 * fetch.c - the reader's side: a holder for each block that the core wants, the read, what comes of it. See peer.h.
 */
#include "base/log.h"
#include "base/plant.h"
#include "peer/peer_impl.h"

#define BUSY_PAUSE_US 2000u             /* the holder, or the transport, can't take it now */
#define WARN_EVERY_US 60000000u
#define WINDOW_US 20000u

static struct fetch *fetch_new(struct fk_peers *p, const struct fk_core_fetch *want, uint64_t now_us)
{
    struct fetch *f = &p->fetch[p->free_fetch];

    p->free_fetch = f->next;
    *f = (struct fetch){ .id = want->id, .key = want->key, .space = want->space, .cpu_slot = want->cpu_slot, .urgent = want->urgent,
                         .deadline_us = now_us + p->params.timeout_us, .gen = f->gen + 1, .state = FETCH_TODO };
    p->stats.in_flight++;
    if (p->params.filling)
        p->params.filling(p->params.ctx, f->space, f->cpu_slot);
    return f;
}

static void fetch_free(struct fk_peers *p, struct fetch *f)
{
    f->state = FETCH_FREE;
    f->next = p->free_fetch;
    p->free_fetch = (uint32_t)(f - p->fetch);
    p->stats.in_flight--;
}

static struct fetch *fetch_find(const struct fk_peers *p, uint64_t user)
{
    uint32_t at = (uint32_t)user;
    struct fetch *f = at < p->params.max_in_flight ? &p->fetch[at] : NULL;

    return f && f->gen == user >> 32 && (f->state == FETCH_SENT || f->state == FETCH_LATE) ? f : NULL;
}

static void tell_core(struct fk_peers *p, const struct fetch *f, int status, bool busy)
{
    p->done.data[p->done.len++] = (struct fk_core_fetch_done){ .id = f->id, .status = status, .busy = busy };
    p->stats.failed_blocks += status != 0;
}

/* ---- choosing ---- */

static bool was_tried(const struct fetch *f, uint16_t node)
{
    for (uint32_t i = 0; i < f->n_tried; i++)
        if (f->tried[i] == node)
            return true;
    return false;
}

/* Where the node is read from with our transport; false: it has none of that kind. */
static bool address_of(const struct fk_peers *p, const struct fk_node_record *r, char *out)
{
    size_t name = strlen(p->transport);

    for (uint32_t i = 0; i < r->n_addresses; i++) {
        const char *a = r->address[i];
        if (strncmp(a, p->transport, name) == 0 && a[name] == '=' &&
            strlen(a + name + 1) < FK_TRANSPORT_ADDRESS_MAX) {
            strcpy(out, a + name + 1);
            return true;
        }
    }
    return false;
}

/* With the cluster's lock: the holder to ask now, and where it is. -ENOENT: nobody (else) has it. */
static int choose(struct fk_peers *p, struct fetch *f, uint16_t prev, uint64_t now_us, char *address)
{
    struct fk_cluster_peer peer;

    if (f->n_tried >= PEERS_TRIES ||
        !fk_cluster_find(p->params.cluster, p->spaces.data[f->space]->number, f->key, prev, now_us, &f->hit) ||
        was_tried(f, f->hit.node) || !fk_cluster_peer(p->params.cluster, f->hit.node, now_us, &peer))
        return -ENOENT;
    f->epoch = FK_BUG(203) ? 0 : peer.epoch;
    if (address_of(p, peer.record, address))
        return 0;
    fk_cluster_read_done(p->params.cluster, f->hit.node, f->hit.tier, false, 0, now_us);
    if (now_us - p->warned_us > WARN_EVERY_US || !p->warned_us) {
        p->warned_us = now_us;
        fk_warn("node %s can't be read from: it has no address for the transport \"%s\"; nodes of a cluster need the "
                "same p2p_transport", peer.record->name, p->transport);
    }
    return -EHOSTUNREACH;
}

/* ---- asking ---- */

struct run {                            /* fetches that one holder is asked for together */
    struct fetch *f[PEERS_BATCH];
    struct fk_read read[PEERS_BATCH];
    char address[FK_TRANSPORT_ADDRESS_MAX];
    uint16_t node;
    uint32_t n;
};

static void back_to_todo(struct fk_peers *p, struct fetch *f, uint64_t not_before_us)
{
    f->state = FETCH_TODO;
    f->not_before_us = not_before_us;
    p->todo.data[p->todo.len++] = (uint32_t)(f - p->fetch);
    p->retry_us = fk_min(p->retry_us, not_before_us);
}

static void give_up(struct fk_peers *p, struct fetch *f, int status)
{
    struct fk_core_fetch want = { .id = f->id, .space = f->space, .cpu_slot = f->cpu_slot, .key = f->key,
                                  .urgent = f->urgent };

    if (status == -ECANCELED || !p->params.hand_on || !p->params.hand_on(p->params.ctx, &want))
        tell_core(p, f, status, false);
    fetch_free(p, f);
}

static void send_run(struct fk_peers *p, struct run *run, uint64_t now_us)
{
    uint32_t peer = 0;
    int rc = run->n ? fk_transport_peer(p->params.transport, run->address, &peer) : 0;
    uint64_t deadline = UINT64_MAX;

    for (uint32_t i = 0; i < run->n; i++)
        deadline = FK_BUG(210) ? now_us + p->params.timeout_us : fk_min(deadline, run->f[i]->deadline_us);
    if (!rc && run->n)
        rc = fk_transport_read(p->params.transport, peer, run->read, run->n, deadline);
    for (uint32_t i = 0; i < run->n; i++) {
        struct fetch *f = run->f[i];
        f->share = run->n;
        f->sent_us = now_us;
        f->state = FETCH_SENT;
        if (rc == -EAGAIN)
            back_to_todo(p, f, now_us + BUSY_PAUSE_US);
        else if (rc)
            give_up(p, f, rc);
    }
    run->n = 0;
}

static void add_to_run(struct fk_peers *p, struct run *run, struct fetch *f)
{
    const struct peers_space *s = p->spaces.data[f->space];

    run->f[run->n] = f;
    run->read[run->n++] = (struct fk_read){
        .block = { .key = f->key, .space = s->hash, .epoch = f->epoch, .generation = f->hit.generation,
                   .slot = f->hit.slot, .tier = f->hit.tier, .bytes = (uint32_t)s->d.block_bytes },
        .buffer = (char *)s->d.pool + (uint64_t)f->cpu_slot * s->d.slot_bytes,
        .user = (uint64_t)f->gen << 32 | (uint32_t)(f - p->fetch),
    };
}

/* Whatever waits for a holder. Those that must wait longer stay. */
static void send_todo(struct fk_peers *p, uint64_t now_us)
{
    struct run run = { .node = FK_REMOTE_NO_NODE };
    uint32_t n = (uint32_t)p->todo.len, kept = 0;

    p->retry_us = UINT64_MAX;
    for (uint32_t i = 0; i < n; i++) {
        struct fetch *f = &p->fetch[p->todo.data[i]];
        char address[FK_TRANSPORT_ADDRESS_MAX];
        if (f->not_before_us > now_us && f->deadline_us > now_us) {
            p->retry_us = fk_min(p->retry_us, f->not_before_us);
            p->todo.data[kept++] = p->todo.data[i];
            continue;
        }
        int rc = f->deadline_us <= now_us ? -ETIMEDOUT : fk_core_fetch_wanted(p->params.core, f->id) ? 0 : -ECANCELED;
        if (!rc) {
            peers_cluster_lock(p);
            rc = choose(p, f, run.n ? run.node : FK_REMOTE_NO_NODE, now_us, address);
            peers_cluster_unlock(p);
        }
        if (rc) {
            give_up(p, f, rc);
            continue;
        }
        if (run.n == PEERS_BATCH || (run.n && f->hit.node != run.node)) {
            /* What it puts back goes behind those that are still to be looked at. */
            send_run(p, &run, now_us);
        }
        if (!run.n) {
            run.node = f->hit.node;
            memcpy(run.address, address, sizeof(address));
        }
        add_to_run(p, &run, f);
    }
    send_run(p, &run, now_us);
    memmove(p->todo.data + kept, p->todo.data + n, (p->todo.len - n) * sizeof(*p->todo.data));
    p->todo.len -= n - kept;
}

/* ---- what comes of it ---- */

static void window_start(struct fk_peers *p, uint64_t now_us)
{
    p->busy_since_us = now_us;
    p->busy_bytes = p->busy_blocks = 0;
    p->busy_connecting = false;
}

/* Whether this is the first that was heard of the node. */
static bool answers_first(struct fk_peers *p, const struct fetch *f)
{
    while (p->answered.len <= f->hit.node)
        if (fk_vec_push(&p->answered, 0))
            return false;
    bool first = p->answered.data[f->hit.node] != f->epoch;
    p->answered.data[f->hit.node] = f->epoch;
    return first;
}

/*
 * A window ends when nothing is under way any more, or as much has come as is: the time until the first of many blocks asked for
 * together is not what each of them takes. One in which a node was connected to says nothing about reading.
 */
static void count_time(struct fk_peers *p, const struct fetch *f, uint64_t bytes, uint64_t now_us)
{
    uint64_t us = now_us - p->busy_since_us;

    p->busy_connecting |= answers_first(p, f);
    p->busy_bytes += bytes;
    p->busy_blocks++;
    if (p->stats.in_flight && (us < WINDOW_US || p->busy_blocks < p->stats.in_flight))
        return;
    double seen = (double)us / (double)p->busy_bytes;
    if (!p->busy_connecting)
        fk_rate_note(&p->byte, seen, 1, now_us);
    window_start(p, now_us);
}

/* The holder learns, and so does the choice of holders. Bytes spoilt on the way are no news of the block. */
static void tell_cluster(struct fk_peers *p, const struct fetch *f, int rc, uint64_t now_us)
{
    peers_cluster_lock(p);
    if (rc == 0)
        fk_cluster_read_done(p->params.cluster, f->hit.node, f->hit.tier, true,
                             (uint32_t)fk_min((now_us - f->sent_us) / fk_max(f->share, 1u), (uint64_t)UINT32_MAX / 16),
                             now_us);
    else if (rc == -ENOENT || rc == -EACCES || (FK_BUG(220) && rc == -EBADMSG))
        fk_cluster_not_there(p->params.cluster, f->hit.node, f->epoch, f->key, &f->hit);
    else if (rc != -ECANCELED && rc != -EAGAIN)
        fk_cluster_read_done(p->params.cluster, f->hit.node, f->hit.tier, false, 0, now_us);
    peers_cluster_unlock(p);
}

static void read_ended(struct fk_peers *p, struct fetch *f, const struct fk_read_done *d, uint64_t now_us)
{
    uint64_t bytes = p->spaces.data[f->space]->d.block_bytes;

    tell_cluster(p, f, d->rc, now_us);
    if (d->rc == 0 || (FK_BUG(215) && d->rc == -EBADMSG)) {
        p->stats.fetched_blocks++;
        p->stats.fetched_bytes += bytes;
        tell_core(p, f, 0, false);
        fetch_free(p, f);
        count_time(p, f, bytes, now_us);
        return;
    }
    p->stats.not_there += d->rc == -ENOENT;
    if ((d->flags & FK_READ_QUARANTINED) && !FK_BUG(204)) {
        p->stats.quarantined++;
        tell_core(p, f, d->rc, true);
        f->state = FETCH_LATE;
    } else if (d->rc == -EAGAIN) {
        p->stats.retried++;
        back_to_todo(p, f, now_us + BUSY_PAUSE_US);
    } else {
        f->tried[f->n_tried++] = f->hit.node;
        p->stats.retried++;
        back_to_todo(p, f, now_us);
    }
}

static bool settle(struct fk_peers *p, uint64_t now_us)
{
    bool any = p->done.len != 0;

    if (any)
        fk_core_fetch_done(p->params.core, p->done.data, (uint32_t)p->done.len, now_us);
    p->done.len = 0;
    return any;
}

static bool take_completions(struct fk_peers *p, uint64_t now_us)
{
    struct fk_read_done done[PEERS_BATCH];
    uint32_t n = fk_transport_take(p->params.transport, done, PEERS_BATCH);

    for (uint32_t i = 0; i < n; i++) {
        struct fetch *f = fetch_find(p, done[i].user);
        if (!f)
            continue;
        if (!(done[i].flags & FK_READ_RELEASED)) {
            read_ended(p, f, &done[i], now_us);
            continue;
        }
        p->stats.quarantined--;
        if (!FK_BUG(217))
            settle(p, now_us);          /* the core may not know yet that it was late */
        fk_core_fetch_released(p->params.core, f->id, now_us);
        fetch_free(p, f);
    }
    return n == PEERS_BATCH;
}

static void take_fetches(struct fk_peers *p, uint64_t now_us)
{
    struct fk_core_fetch want[PEERS_BATCH];
    bool idle = !p->stats.in_flight;

    while (p->stats.in_flight < p->params.max_in_flight) {
        uint32_t room = fk_min(p->params.max_in_flight - (uint32_t)p->stats.in_flight, PEERS_BATCH);
        uint32_t n = fk_core_take_fetches(p->params.core, want, room);
        for (uint32_t i = 0; i < n; i++)
            p->todo.data[p->todo.len++] = (uint32_t)(fetch_new(p, &want[i], now_us) - p->fetch);
        if (n < room)
            break;
    }
    if (idle && p->stats.in_flight)
        window_start(p, now_us);
}

void fk_peers_pump(struct fk_peers *p, uint64_t now_us)
{
    bool more;

    peers_report(p, now_us);
    do {        /* what has ended lets operations go on, which want more */
        more = take_completions(p, now_us);
        more = settle(p, now_us) || more;
        take_fetches(p, now_us);
        send_todo(p, now_us);
        more = settle(p, now_us) || more;
    } while (more);
}

uint64_t fk_peers_next_wakeup(const struct fk_peers *p)
{
    return fk_min(p->retry_us, p->told_us + 1000000u);
}

const char *fk_peers_check(const struct fk_peers *p)
{
    uint64_t in_flight = 0, late = 0, todo = 0, lent = 0;

    for (uint32_t i = 0; i < p->params.max_in_flight; i++) {
        in_flight += p->fetch[i].state != FETCH_FREE;
        late += p->fetch[i].state == FETCH_LATE;
        todo += p->fetch[i].state == FETCH_TODO;
    }
    for (uint32_t i = 0; i < PEERS_STAGES; i++)
        lent += p->stage[i].state != STAGE_FREE;
    if (in_flight != p->stats.in_flight || late != p->stats.quarantined)
        return "fetches in flight or quarantined do not add up";
    if (todo != p->todo.len)
        return "fetches without a holder do not add up";
    return lent <= p->stats.lent_now ? NULL : "staged blocks are not counted as lent";
}
