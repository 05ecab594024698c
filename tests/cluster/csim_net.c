/* csim_net.c - see csim_net.h. */
#include "csim_net.h"

#define BASE_MS INT64_C(1700000000000)

static uint32_t roll(struct cs_net *n, uint32_t below)
{
    return fk_rng_below(n->rng, below);
}

/* ---- clocks ---- */

uint64_t cs_local(const struct cs_client *p, uint64_t us)
{
    return us + (uint64_t)((int64_t)us * p->drift_ppm / 1000000 + p->offset_us);
}

uint64_t cs_real(const struct cs_client *p, uint64_t us)
{
    int64_t x = (int64_t)us - p->offset_us;

    return us >= UINT64_MAX / 2 ? UINT64_MAX : x < 0 ? 0 : (uint64_t)(x * 1000000 / (1000000 + p->drift_ppm) + 1);
}

int64_t cs_redis_ms(const struct cs_net *n)
{
    int64_t us = (int64_t)n->now_us;

    return BASE_MS + (us + us * n->ppm / 1000000) / 1000 + n->offset_ms;
}

/* ---- messages ---- */

static void free_cmd(struct fk_command *cmd)
{
    if (cmd) {
        fk_vec_free(&cmd->bytes);
        fk_vec_free(&cmd->ends);
        free(cmd);
    }
}

static struct fk_command *copy_cmd(const struct fk_command *from)
{
    struct fk_command *c = calloc(1, sizeof(*c));

    if (!c)
        abort();
    fk_bytes_add(&c->bytes, from->bytes.data, from->bytes.len);
    for (size_t i = 0; i < from->ends.len; i++)
        (void)fk_vec_push(&c->ends, from->ends.data[i]);
    return c;
}

static uint64_t latency(struct cs_net *n)
{
    return n->quiet || roll(n, 50) ? 100 + roll(n, 2000) : 20000 + roll(n, 200000);
}

/* Later than whatever went the same way before. */
static void post(struct cs_net *n, uint32_t i, uint32_t k, struct fk_command *cmd, struct fk_reply *reply)
{
    struct cs_conn *c = &n->client[i].conn[k];
    int way = reply != NULL;
    uint64_t at = fk_max(n->now_us + latency(n), *n->client[i].cut_until_us);

    at = fk_max(at, c->last_us[way]);
    c->last_us[way] = at;
    struct cs_msg m = { .at_us = at, .seq = n->seq++, .gen = c->gen, .client = i, .conn = k, .cmd = cmd,
                        .reply = reply };
    (void)fk_vec_push(&n->msgs, m);
}

/* ---- connections ---- */

void cs_client_start(struct cs_net *n, uint32_t i)
{
    uint64_t gen = n->client[i].conn[0].gen + n->client[i].conn[1].gen + 100;

    for (uint32_t k = 0; k < FK_CONNS; k++)
        n->client[i].conn[k] = (struct cs_conn){ .gen = gen, .retry_us = n->now_us + roll(n, 20000) };
}

void cs_client_gone(struct cs_net *n, uint32_t i)
{
    for (uint32_t k = 0; k < FK_CONNS; k++)
        n->client[i].conn[k].gen++;
}

void cs_close(struct cs_net *n, uint32_t i, uint32_t k)
{
    struct cs_client *p = &n->client[i];
    struct cs_conn *c = &p->conn[k];

    for (size_t m = 0; m < n->msgs.len; m++)    /* what is under way may arrive, or not */
        if (n->msgs.data[m].client == i && n->msgs.data[m].conn == k && n->msgs.data[m].cmd && roll(n, 2))
            n->msgs.data[m].at_us = UINT64_MAX;
    c->up = false;
    c->gen++;
    c->last_us[0] = c->last_us[1] = 0;
    c->retry_us = n->now_us + 50000 + roll(n, 300000);
    fk_cluster_connected(p->c, (enum fk_conn)k, false, cs_local(p, n->now_us));
}

static void open_conn(struct cs_net *n, uint32_t i, uint32_t k)
{
    struct cs_client *p = &n->client[i];
    struct cs_conn *c = &p->conn[k];

    c->retry_us = n->now_us + 50000 + roll(n, 300000);
    if (n->down || n->frozen_until_us > n->now_us || *p->cut_until_us > n->now_us)
        return;
    c->up = true;
    c->gen++;
    fk_cluster_connected(p->c, (enum fk_conn)k, true, cs_local(p, n->now_us));
}

void cs_open(struct cs_net *n, uint32_t i)
{
    for (uint32_t k = 0; k < FK_CONNS; k++)
        if (!n->client[i].conn[k].up && n->client[i].conn[k].retry_us <= n->now_us)
            open_conn(n, i, k);
}

void cs_send(struct cs_net *n, uint32_t i)
{
    struct cs_client *p = &n->client[i];
    const struct fk_command *cmd;

    for (uint32_t k = 0; k < FK_CONNS; k++) {
        while (p->conn[k].up && (cmd = fk_cluster_take(p->c, (enum fk_conn)k, cs_local(p, n->now_us))))
            post(n, i, k, copy_cmd(cmd), NULL);
        if (p->conn[k].up && fk_cluster_conn_bad(p->c, (enum fk_conn)k))
            cs_close(n, i, k);
    }
}

uint64_t cs_wakeup(const struct cs_net *n, uint32_t i)
{
    const struct cs_client *p = &n->client[i];
    uint64_t t = cs_real(p, fk_cluster_next_wakeup(p->c));

    for (uint32_t k = 0; k < FK_CONNS; k++)
        if (!p->conn[k].up)
            t = fk_min(t, p->conn[k].retry_us);
    return t;
}

/* ---- what arrives ---- */

static bool same_conn(const struct cs_net *n, const struct cs_msg *m)
{
    const struct cs_client *p = &n->client[m->client];

    return p->alive && p->conn[m->conn].up && p->conn[m->conn].gen == m->gen;
}

static void arrive(struct cs_net *n, struct cs_msg *m)
{
    bool last = m->blocked && n->now_us >= m->until_us;

    if (n->down) {
        free_cmd(m->cmd);
        if (same_conn(n, m))
            cs_close(n, m->client, m->conn);
        return;
    }
    struct fk_reply *reply = sr_do(n->redis, m->cmd, cs_redis_ms(n), last);
    if (!reply) {
        struct cs_msg again = *m;
        again.until_us = m->blocked ? m->until_us : n->now_us + sr_block_ms(m->cmd) * UINT64_C(1000);
        again.blocked = true;
        again.seen = sr_changes(n->redis);
        again.at_us = again.until_us;
        (void)fk_vec_push(&n->msgs, again);
        return;
    }
    free_cmd(m->cmd);
    if (same_conn(n, m))
        post(n, m->client, m->conn, NULL, reply);
    else
        sr_reply_free(reply);
}

void cs_deliver(struct cs_net *n, size_t at)
{
    struct cs_msg m = n->msgs.data[at];
    struct cs_client *p = &n->client[m.client];

    n->msgs.data[at] = n->msgs.data[--n->msgs.len];
    if (!m.cmd && p->paused && p->conn[m.conn].gen == m.gen) {
        m.at_us = n->now_us + 50000;    /* waits in its socket */
        (void)fk_vec_push(&n->msgs, m);
        return;
    }
    if (m.cmd) {
        arrive(n, &m);
        return;
    }
    if (same_conn(n, &m))
        while (!fk_cluster_reply(p->c, (enum fk_conn)m.conn, m.reply, cs_local(p, n->now_us)))
            ;
    sr_reply_free(m.reply);
    if (p->alive)
        n->serve(n->ctx, m.client);
}

static uint64_t due(struct cs_net *n, const struct cs_msg *m)
{
    if (m->cmd && n->frozen_until_us > m->at_us)
        return m->at_us == UINT64_MAX ? UINT64_MAX : n->frozen_until_us;
    return m->blocked && sr_changes(n->redis) != m->seen ? n->now_us : m->at_us;
}

static void drop_lost(struct cs_net *n)
{
    for (size_t i = 0; i < n->msgs.len; i++) {
        struct cs_msg *m = &n->msgs.data[i];
        if (m->at_us != UINT64_MAX || m->blocked)
            continue;
        free_cmd(m->cmd);
        sr_reply_free(m->reply);
        n->msgs.data[i--] = n->msgs.data[--n->msgs.len];
    }
}

size_t cs_first(struct cs_net *n, uint64_t *at_us)
{
    size_t best = SIZE_MAX;

    drop_lost(n);
    *at_us = UINT64_MAX;
    for (size_t i = 0; i < n->msgs.len; i++) {
        const struct cs_msg *m = &n->msgs.data[i];
        uint64_t when = due(n, m);
        if (best == SIZE_MAX || when < *at_us || (when == *at_us && m->seq < n->msgs.data[best].seq)) {
            best = i;
            *at_us = when;
        }
    }
    return best;
}

void cs_free(struct cs_net *n)
{
    for (size_t i = 0; i < n->msgs.len; i++) {
        free_cmd(n->msgs.data[i].cmd);
        sr_reply_free(n->msgs.data[i].reply);
    }
    fk_vec_free(&n->msgs);
    sr_free(n->redis);
}
