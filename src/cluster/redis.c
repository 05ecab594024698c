/* redis.c - see redis.h. The thread: poll, bytes to answers, answers to the state machine, commands out. */
#include "cluster/redis.h"

#include <hiredis/hiredis.h>
#include <poll.h>
#include <stdio.h>
#include <sys/eventfd.h>

#include "base/clock.h"
#include "base/log.h"
#include "base/thread.h"
#include "cluster/redis_conn.h"

#define BACKOFF_MIN_US 50000u
#define BACKOFF_MAX_US 2000000u

struct fk_redis {
    struct fk_redis_params p;           /* strings are ours */
    pthread_t thread;
    int wake_fd;
    SSL_CTX *tls;
    struct redis_conn conn[FK_CONNS];
    uint64_t retry_us[FK_CONNS];
    uint32_t backoff_us[FK_CONNS];
    _Atomic bool ending;
    _Atomic uint64_t leave_until_us;
    pthread_mutex_t state_lock;         /* of the two below */
    char trouble[256];
    bool up;
    char said[256];                     /* in the log already */
    struct fk_change scan[1024];
};

/* ---- what is told ---- */

static void set_trouble(struct fk_redis *r, const char *text)
{
    pthread_mutex_lock(&r->state_lock);
    snprintf(r->trouble, sizeof(r->trouble), "%s", text);
    r->up = !*text;
    pthread_mutex_unlock(&r->state_lock);
    if (*text && strcmp(text, r->said) != 0)
        fk_warn("cluster: Redis at %s port %u: %s; this node goes on alone and tries again", r->p.host,
                r->p.port, text);
    else if (!*text && *r->said)
        fk_info("cluster: Redis at %s port %u: connected again", r->p.host, r->p.port);
    snprintf(r->said, sizeof(r->said), "%s", text);
}

int fk_redis_state(struct fk_redis *r, char *error, size_t size)
{
    pthread_mutex_lock(&r->state_lock);
    int rc = r->up ? 0 : -ENOTCONN;
    snprintf(error, size, "%s", r->trouble);
    pthread_mutex_unlock(&r->state_lock);
    return rc;
}

/* ---- connections ---- */

static void lost(struct fk_redis *r, enum fk_conn i, const char *why)
{
    uint64_t now = fk_clock_us();

    redis_conn_close(&r->conn[i]);
    pthread_mutex_lock(r->p.lock);
    fk_cluster_connected(r->p.cluster, i, false, now);
    pthread_mutex_unlock(r->p.lock);
    r->retry_us[i] = now + r->backoff_us[i];
    r->backoff_us[i] = fk_min(2 * r->backoff_us[i], BACKOFF_MAX_US);
    set_trouble(r, why);
}

static void try_open(struct fk_redis *r, enum fk_conn i, uint64_t now)
{
    char error[256];

    if (redis_conn_open(&r->conn[i], &r->p, r->tls, now, error, sizeof(error)))
        lost(r, i, error);
}

static void came_up(struct fk_redis *r, enum fk_conn i)
{
    r->backoff_us[i] = BACKOFF_MIN_US;
    pthread_mutex_lock(r->p.lock);
    fk_cluster_connected(r->p.cluster, i, true, fk_clock_us());
    pthread_mutex_unlock(r->p.lock);
    if (r->conn[FK_CONN_COMMAND].state == RC_UP && r->conn[FK_CONN_READER].state == RC_UP)
        set_trouble(r, "");
}

/* ---- answers ---- */

static void free_items(struct fk_reply *to)
{
    for (size_t i = 0; i < to->n; i++)
        free_items(&to->item[i]);
    free(to->item);
}

static int convert(const redisReply *from, struct fk_reply *to)
{
    *to = (struct fk_reply){ .type = FK_REPLY_NIL };
    switch (from->type) {
    case REDIS_REPLY_STRING:
    case REDIS_REPLY_STATUS:
    case REDIS_REPLY_ERROR:
        to->type = from->type == REDIS_REPLY_ERROR ? FK_REPLY_ERROR : FK_REPLY_STRING;
        to->text = from->str;
        to->bytes = (size_t)from->len;
        break;
    case REDIS_REPLY_INTEGER:
        to->type = FK_REPLY_INTEGER;
        to->integer = from->integer;
        break;
    case REDIS_REPLY_ARRAY:
        to->type = FK_REPLY_ARRAY;
        to->item = calloc(from->elements + 1, sizeof(*to->item));
        if (!to->item)
            return -ENOMEM;
        for (; to->n < from->elements; to->n++)
            if (convert(from->element[to->n], &to->item[to->n]))
                return -ENOMEM;
        break;
    default:
        break;
    }
    return 0;
}

/* The lock is let go between portions of a large answer. */
static void hand_over(struct fk_redis *r, enum fk_conn i, const struct fk_reply *reply)
{
    bool done = false;

    while (!done) {
        pthread_mutex_lock(r->p.lock);
        done = fk_cluster_reply(r->p.cluster, i, reply, fk_clock_us());
        pthread_mutex_unlock(r->p.lock);
    }
}

static int take_answers(struct fk_redis *r, enum fk_conn i)
{
    void *raw;
    int rc;

    while ((rc = redis_conn_answer(&r->conn[i], &raw)) == 0 && raw) {
        struct fk_reply reply;
        rc = convert(raw, &reply);
        if (rc == 0)
            hand_over(r, i, &reply);
        free_items(&reply);
        freeReplyObject(raw);
        if (rc)
            return rc;
    }
    return rc;
}

/* ---- commands ---- */

static void give_scans(struct fk_redis *r)
{
    uint64_t cursor, next = 0;
    uint32_t max;
    bool end = true;

    for (;;) {
        pthread_mutex_lock(r->p.lock);
        bool wanted = fk_cluster_scan_wanted(r->p.cluster, &cursor, &max);
        pthread_mutex_unlock(r->p.lock);
        if (!wanted)
            return;
        max = fk_min(max, (uint32_t)fk_array_size(r->scan));
        uint32_t n = r->p.scan ? r->p.scan(r->p.arg, cursor, r->scan, max, &next, &end) : 0;
        pthread_mutex_lock(r->p.lock);
        fk_cluster_scan_give(r->p.cluster, r->scan, n, next, end, fk_clock_us());
        pthread_mutex_unlock(r->p.lock);
    }
}

static int send_commands(struct fk_redis *r, enum fk_conn i)
{
    struct redis_conn *c = &r->conn[i];
    const struct fk_command *cmd;
    int rc = 0;

    pthread_mutex_lock(r->p.lock);
    while (rc == 0 && c->out.len < (1u << 20) &&
           (cmd = fk_cluster_take(r->p.cluster, i, fk_clock_us())))
        rc = redis_conn_send(c, cmd->bytes.data, cmd->ends.data, (uint32_t)cmd->ends.len);
    pthread_mutex_unlock(r->p.lock);
    return rc;
}

/* One connection's turn. */
static void step(struct fk_redis *r, enum fk_conn i, short events)
{
    struct redis_conn *c = &r->conn[i];
    uint64_t now = fk_clock_us();
    char error[256] = "";

    if (c->state == RC_DOWN) {
        if (now >= r->retry_us[i] && !r->ending)
            try_open(r, i, now);
        return;
    }
    enum redis_state before = c->state;
    int rc = redis_conn_step(c, &r->p, events, error, sizeof(error));
    if (rc == 0 && before != RC_UP && c->state == RC_UP)
        came_up(r, i);
    else if (rc == 0 && c->state != RC_UP && now >= c->deadline_us) {
        rc = -ETIMEDOUT;
        snprintf(error, sizeof(error), "no answer within %llu ms (redis_timeout_ms)",
                 (unsigned long long)(r->p.timeout_us / 1000));
    }
    if (rc == 0 && c->state == RC_UP) {
        rc = take_answers(r, i);
        rc = rc ? rc : send_commands(r, i);
        if (rc == 0)
            rc = redis_conn_step(c, &r->p, 0, error, sizeof(error));
    }
    pthread_mutex_lock(r->p.lock);
    bool bad = fk_cluster_conn_bad(r->p.cluster, i);
    pthread_mutex_unlock(r->p.lock);
    if (rc || bad)
        lost(r, i, *error ? error : rc ? strerror(-rc) : "it does not answer (redis_timeout_ms)");
}

/* ---- the thread ---- */

static int wait_ms(struct fk_redis *r, uint64_t now)
{
    pthread_mutex_lock(r->p.lock);
    uint64_t at = fk_cluster_next_wakeup(r->p.cluster);
    pthread_mutex_unlock(r->p.lock);
    for (int i = 0; i < FK_CONNS; i++) {
        if (r->conn[i].state == RC_DOWN)
            at = fk_min(at, r->retry_us[i]);
        else if (r->conn[i].state != RC_UP)
            at = fk_min(at, r->conn[i].deadline_us);
    }
    if (r->ending)
        at = fk_min(at, now + 20000);
    return at <= now ? 0 : (int)fk_min((at - now + 999) / 1000, UINT64_C(60000));
}

static bool over(struct fk_redis *r)
{
    if (!r->ending)
        return false;
    pthread_mutex_lock(r->p.lock);
    bool left = fk_cluster_left(r->p.cluster);
    pthread_mutex_unlock(r->p.lock);
    return left || fk_clock_us() >= r->leave_until_us;
}

static void *run(void *arg)
{
    struct fk_redis *r = arg;

    fk_thread_stand_back();
    while (!over(r)) {
        struct pollfd fds[FK_CONNS + 1] = { [FK_CONNS] = { .fd = r->wake_fd, .events = POLLIN } };
        for (int i = 0; i < FK_CONNS; i++)
            fds[i] = (struct pollfd){ .fd = r->conn[i].state == RC_DOWN ? -1 : r->conn[i].fd,
                                      .events = redis_conn_events(&r->conn[i]) };
        poll(fds, FK_CONNS + 1, wait_ms(r, fk_clock_us()));
        if (fds[FK_CONNS].revents) {
            uint64_t n;
            ssize_t ignored = read(r->wake_fd, &n, sizeof(n));
            (void)ignored;
        }
        pthread_mutex_lock(r->p.lock);
        fk_cluster_tick(r->p.cluster, fk_clock_us());
        pthread_mutex_unlock(r->p.lock);
        give_scans(r);
        for (int i = 0; i < FK_CONNS; i++)
            step(r, (enum fk_conn)i, fds[i].revents);
        give_scans(r);
    }
    for (int i = 0; i < FK_CONNS; i++)
        redis_conn_close(&r->conn[i]);
    return NULL;
}

void fk_redis_wake(struct fk_redis *r)
{
    uint64_t one = 1;
    ssize_t ignored = write(r->wake_fd, &one, sizeof(one));

    (void)ignored;
}

static void destroy(struct fk_redis *r)
{
    const char *const texts[] = { r->p.host, r->p.user, r->p.password, r->p.tls_ca, r->p.tls_cert,
                                  r->p.tls_key };

    for (size_t i = 0; i < fk_array_size(texts); i++)
        free((void *)texts[i]);
    if (r->tls)
        SSL_CTX_free(r->tls);
    if (r->wake_fd >= 0)
        close(r->wake_fd);
    pthread_mutex_destroy(&r->state_lock);
    free(r);
}

static int copy_texts(struct fk_redis_params *p)
{
    const char **const texts[] = { &p->host, &p->user, &p->password, &p->tls_ca, &p->tls_cert,
                                   &p->tls_key };
    int rc = 0;

    for (size_t i = 0; i < fk_array_size(texts); i++) {
        *texts[i] = strdup(*texts[i] ? *texts[i] : "");
        rc = *texts[i] ? rc : -ENOMEM;
    }
    return rc;
}

int fk_redis_start(const struct fk_redis_params *params, struct fk_redis **out, char *error, size_t size)
{
    struct fk_redis *r = calloc(1, sizeof(*r));

    *error = '\0';
    if (!r)
        return -ENOMEM;
    r->p = *params;
    r->wake_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    pthread_mutex_init(&r->state_lock, NULL);
    snprintf(r->trouble, sizeof(r->trouble), "not connected yet");
    int rc = copy_texts(&r->p);
    r->p.timeout_us = r->p.timeout_us ? r->p.timeout_us : 2000000;
    for (int i = 0; i < FK_CONNS; i++) {
        r->conn[i].fd = -1;
        r->backoff_us[i] = BACKOFF_MIN_US;
    }
    if (rc == 0 && r->wake_fd < 0)
        rc = -errno;
    if (rc == 0 && r->p.tls && !(r->tls = redis_tls_context(&r->p, error, size)))
        rc = -EINVAL;
    if (rc == 0)
        rc = -pthread_create(&r->thread, NULL, run, r);
    if (rc) {
        destroy(r);
        return rc;
    }
    *out = r;
    return 0;
}

void fk_redis_stop(struct fk_redis *r, uint64_t leave_us)
{
    if (!r)
        return;
    pthread_mutex_lock(r->p.lock);
    fk_cluster_leave(r->p.cluster, fk_clock_us());
    pthread_mutex_unlock(r->p.lock);
    r->leave_until_us = fk_clock_us() + leave_us;
    r->ending = true;
    fk_redis_wake(r);
    pthread_join(r->thread, NULL);
    destroy(r);
}
