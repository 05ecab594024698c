/* mooncake_engine.c - see mooncake_engine.h. */
#include "transport/mooncake_engine.h"

#include <dlfcn.h>
#include <poll.h>
#include <stdio.h>

#include "base/clock.h"
#include "base/log.h"
#include "transport/mooncake_impl.h"

#define REST_US 50u                     /* the engine has nothing to wait for */

enum { OPCODE_READ = 0 };
enum { STATUS_WAITING, STATUS_PENDING, STATUS_INVALID, STATUS_CANCELED, STATUS_COMPLETED, STATUS_TIMEOUT, STATUS_FAILED };

struct request { int opcode; void *here; int32_t segment; uint64_t there, bytes; };
struct status { int status; uint64_t bytes; };

static struct {                         /* as Mooncake 0.3.12 and later have it (Apache-2.0) */
    void *(*createTransferEngine)(const char *metadata, const char *name, const char *host, uint64_t port, int discover);
    void (*destroyTransferEngine)(void *engine);
    void *(*installTransport)(void *engine, const char *protocol, void **args);
    int (*registerLocalMemory)(void *engine, void *at, size_t bytes, const char *where, int remote);
    int32_t (*openSegment)(void *engine, const char *name);
    uint64_t (*allocateBatchID)(void *engine, size_t n);
    int (*submitTransfer)(void *engine, uint64_t batch, struct request *r, size_t n);
    int (*getTransferStatus)(void *engine, uint64_t batch, size_t i, struct status *s);
    int (*freeBatchID)(void *engine, uint64_t batch);
} moon;

static const struct { const char *name; void *at; } symbols[] = {
#define SYMBOL(name) { #name, &moon.name }
    SYMBOL(createTransferEngine), SYMBOL(destroyTransferEngine), SYMBOL(installTransport), SYMBOL(registerLocalMemory),
    SYMBOL(openSegment), SYMBOL(allocateBatchID), SYMBOL(submitTransfer), SYMBOL(getTransferStatus), SYMBOL(freeBatchID),
#undef SYMBOL
};

struct task {                           /* a read, on its way through a worker */
    uint64_t op;
    struct fk_read read;
    uint64_t batch, header_at, checksum;
    bool in_header;                     /* the slot is there */
    uint8_t *header;                    /* FK_MOON_HEADER bytes that the engine may write to */
    int rc;
};

struct worker {                         /* one peer's */
    struct fk_moon_engine *e;
    struct worker *next;
    struct fk_peer *peer;               /* the transport's thread only */
    char address[FK_TRANSPORT_ADDRESS_MAX];
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t something;
    FK_VEC(struct task) asked, ended;   /* under the lock */
    bool stop, abandon, gone;           /* the same; abandon: without waiting for what is under way */
    /* the worker's */
    FK_VEC(struct task) flying;
    struct fk_moon_segment segment;
    int32_t id;                         /* the engine's, of the segment */
    bool known;
    uint8_t *headers;
    FK_VEC(uint8_t *) free_headers;
};

struct fk_moon_engine {
    struct fk_mooncake *m;
    void *engine;
    bool rdma;
    struct worker *workers;
};

/* ---- opening ---- */

static int load(const char *path, char *error, size_t bytes)
{
    void *handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);         /* never unloaded */

    if (!handle)
        return fk_fail(error, bytes, -ENOSYS, "transport mooncake: %s (mooncake_library)", dlerror());
    for (size_t i = 0; i < fk_array_size(symbols); i++) {
        void *p = dlsym(handle, symbols[i].name);
        if (!p) {
            dlclose(handle);
            return fk_fail(error, bytes, -ENOSYS, "transport mooncake: %s has no %s: a libtransfer_engine.so that was "
                           "built from Mooncake's source is expected, the wheel has none (mooncake_library)", path,
                           symbols[i].name);
        }
        memcpy(symbols[i].at, &p, sizeof(p));
    }
    return 0;
}

static int load_once(const char *path, char *error, size_t bytes)
{
    static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    static bool loaded;

    pthread_mutex_lock(&lock);
    int rc = loaded ? 0 : load(path, error, bytes);
    loaded |= rc == 0;
    pthread_mutex_unlock(&lock);
    return rc;
}

static int check_metadata(const char *metadata, char *error, size_t bytes)
{
    if (strcmp(metadata, "P2PHANDSHAKE") == 0)
        return 0;
    return fk_fail(error, bytes, -ENOTSUP, "transport mooncake: metadata \"%.100s\" is not passed on to Mooncake's "
                   "library, which ends the process over a kind that it was built without: with mooncake_library "
                   "it is P2PHANDSHAKE (leave mooncake_metadata_server empty)", metadata);
}

int fk_moon_engine_open(struct fk_mooncake *m, const struct fk_transport_params *p, char *error, size_t bytes)
{
    const char *metadata = p->mooncake_metadata ? p->mooncake_metadata : "P2PHANDSHAKE";
    const char *protocol = p->mooncake_protocol ? p->mooncake_protocol : "tcp";
    bool rdma = strcmp(protocol, "rdma") == 0;
    char name[FK_TRANSPORT_ADDRESS_MAX];

    if (!rdma && strcmp(protocol, "tcp"))
        return fk_fail(error, bytes, -EINVAL, "transport mooncake: protocol \"%.50s\": tcp or rdma (mooncake_protocol)",
                       protocol);
    int rc = check_metadata(metadata, error, bytes);
    if (!rc)
        rc = load_once(p->mooncake_library, error, bytes);
    struct fk_moon_engine *e = rc ? NULL : calloc(1, sizeof(*e));
    if (!e)
        return rc ? rc : fk_fail(error, bytes, -ENOMEM, "transport mooncake: no memory");
    e->m = m;
    e->rdma = rdma;
    /* A name of its own: the segment of this name is what the engine shares, which is nothing. */
    snprintf(name, sizeof(name), strchr(m->host, ':') ? "[%s]:0" : "%s:0", m->host);
    e->engine = moon.createTransferEngine("P2PHANDSHAKE", name, m->host, 0, rdma);
    if (!e->engine || (!rdma && !moon.installTransport(e->engine, "tcp", NULL))) {
        if (e->engine)
            moon.destroyTransferEngine(e->engine);
        free(e);
        return fk_fail(error, bytes, -EIO, "transport mooncake: the engine can't be opened with %s (mooncake_protocol); "
                       "it says why on stderr", protocol);
    }
    m->engine = e;
    return 0;
}

int fk_moon_engine_region(struct fk_mooncake *m, void *base, size_t bytes)
{
    /*
     * RDMA needs it. Over TCP the engine reads into any memory, and whatever is registered anybody may read and
     * write through its open port, "not remote" or not: nothing is.
     */
    return !bytes || !m->engine->rdma || moon.registerLocalMemory(m->engine->engine, base, bytes, "*", 0) == 0 ? 0 : -EIO;
}

/* ---- the worker: who the peer is ---- */

static int exchange(struct worker *w, struct fk_stream *s, uint64_t until_us)
{
    const char *body;
    size_t n;
    unsigned type;
    int rc = -EAGAIN;

    while (rc == -EAGAIN || rc == 0) {
        struct pollfd p = { .fd = s->fd, .events = fk_stream_unsent(s) ? POLLOUT : POLLIN };
        uint64_t now = fk_clock_us();
        if (now >= until_us || poll(&p, 1, (int)((until_us - now) / 1000) + 1) < 0)
            return -ETIMEDOUT;
        rc = fk_tcp_connected(s->fd);
        if (!rc && fk_stream_unsent(s)) {
            rc = fk_stream_flush(s);
            continue;
        }
        int got = rc ? rc : fk_stream_read(s, FK_MOON_MESSAGE_MAX + FK_MOON_MESSAGE_HEAD);
        if (!rc)
            rc = fk_moon_message(fk_stream_data(s), fk_stream_unread(s), &type, &body, &n);
        if (rc == 0 && got && got != -EAGAIN)
            rc = got;
    }
    /* A foreign engine's may be of a kind that we don't read: it has no windows of ours, then. */
    if (rc == 1 && (type != FK_MOON_METADATA || fk_moon_parse_segment(body, n, &w->segment)))
        w->segment = (struct fk_moon_segment){ 0 };
    return rc == 1 ? 0 : rc;
}

static int ask_who(struct worker *w)
{
    struct fk_mooncake *m = w->e->m;
    struct fk_stream s;
    int fd, rc = fk_tcp_connect(w->address, m->t->timeout_us, &fd);

    if (rc)
        return rc;
    fk_stream_init(&s, fd);
    rc = fk_moon_put_segment(m, &s);
    if (!rc)
        rc = exchange(w, &s, fk_clock_us() + m->t->timeout_us);
    fk_stream_close(&s);
    if (rc)
        return rc;
    w->id = moon.openSegment(w->e->engine, w->address);
    w->known = w->id >= 0;
    return w->known ? 0 : -EHOSTUNREACH;
}

/* ---- the worker: reads ---- */

static int submit(struct worker *w, struct task *k, void *here, uint64_t there, uint64_t bytes)
{
    struct request r = { OPCODE_READ, here, w->id, there, bytes };

    k->batch = moon.allocateBatchID(w->e->engine, 1);
    if (k->batch == UINT64_MAX)
        return -EIO;
    if (moon.submitTransfer(w->e->engine, k->batch, &r, 1) == 0)
        return 0;
    moon.freeBatchID(w->e->engine, k->batch);
    return -EIO;
}

static int begin(struct worker *w, struct task *k)
{
    const struct fk_block_ref *b = &k->read.block;

    int rc = w->known ? 0 : ask_who(w);
    if (rc || k->read.flags & FK_READ_RAW)
        return rc ? rc : submit(w, k, k->read.buffer, k->read.address, b->bytes);
    for (uint32_t i = 0; i < w->segment.n_windows; i++) {
        const struct fk_moon_window *x = &w->segment.windows[i];
        if (x->w.space != b->space || x->w.ns != b->ns || x->w.tier != b->tier || x->w.slot_bytes != b->bytes ||
            b->slot >= x->w.slots || !x->slots_at || !x->headers_at)
            continue;
        k->header_at = x->headers_at + (uint64_t)b->slot * FK_MOON_HEADER;
        k->header = w->free_headers.data[--w->free_headers.len];
        return submit(w, k, k->read.buffer, x->slots_at + (uint64_t)b->slot * b->bytes, b->bytes);
    }
    return -ENOENT;
}

/* -EAGAIN: goes on; else it has ended. */
static int look(struct worker *w, struct task *k)
{
    struct status s = { 0 };
    int rc = moon.getTransferStatus(w->e->engine, k->batch, 0, &s);

    if (!rc && (s.status == STATUS_WAITING || s.status == STATUS_PENDING))
        return -EAGAIN;
    moon.freeBatchID(w->e->engine, k->batch);
    if (rc || s.status != STATUS_COMPLETED)
        return -EIO;                    /* it gives no reasons */
    if (k->read.flags & FK_READ_RAW)
        return 0;
    if (k->in_header)
        return fk_moon_check_header(k->header, &k->read.block, &k->checksum);
    k->in_header = true;
    memset(k->header, 0, FK_MOON_HEADER);
    rc = submit(w, k, k->header, k->header_at, FK_MOON_HEADER);
    return rc ? rc : -EAGAIN;
}

static void end_task(struct worker *w, struct task *k, int rc)
{
    k->rc = rc;
    if (rc == -EIO)
        w->known = false;               /* it may have been started again */
    if (k->header)
        (void)fk_vec_push(&w->free_headers, k->header);
    pthread_mutex_lock(&w->lock);
    (void)fk_vec_push(&w->ended, *k);   /* room was made when it was asked for */
    pthread_mutex_unlock(&w->lock);
    fk_transport_wake(w->e->m->t);
}

/* Waits for work. False: there is none, and none will come. */
static bool take_tasks(struct worker *w)
{
    size_t first = w->flying.len;

    pthread_mutex_lock(&w->lock);
    while (!w->asked.len && !w->flying.len && !w->stop)
        pthread_cond_wait(&w->something, &w->lock);
    bool stop = w->stop, abandon = w->abandon;
    if (fk_vec_reserve(&w->flying, first + w->asked.len) == 0) {
        for (size_t i = 0; i < w->asked.len; i++)
            w->flying.data[w->flying.len++] = w->asked.data[i];
        w->asked.len = 0;
    }
    pthread_mutex_unlock(&w->lock);
    for (size_t i = first; i < w->flying.len;) {
        struct task *k = &w->flying.data[i];
        int rc = stop ? -ECANCELED : begin(w, k);
        if (!rc) {
            i++;
            continue;
        }
        end_task(w, k, rc);
        *k = w->flying.data[--w->flying.len];
    }
    return !abandon && (!stop || w->flying.len);
}

static void *worker_main(void *arg)
{
    struct worker *w = arg;

    while (take_tasks(w)) {
        bool some = false;
        for (size_t i = 0; i < w->flying.len;) {
            struct task *k = &w->flying.data[i];
            int rc = look(w, k);
            if (rc == -EAGAIN) {
                i++;
                continue;
            }
            some = true;
            end_task(w, k, rc);
            *k = w->flying.data[--w->flying.len];
        }
        if (w->flying.len && !some)
            usleep(REST_US);
    }
    pthread_mutex_lock(&w->lock);
    w->gone = true;
    pthread_mutex_unlock(&w->lock);
    fk_transport_wake(w->e->m->t);
    return NULL;
}

/* ---- the transport's thread ---- */

static void worker_free(struct worker *w)
{
    free(w->headers);
    fk_vec_free(&w->asked);
    fk_vec_free(&w->ended);
    fk_vec_free(&w->flying);
    fk_vec_free(&w->free_headers);
    pthread_mutex_destroy(&w->lock);
    pthread_cond_destroy(&w->something);
    free(w);
}

static struct worker *worker_new(struct fk_moon_engine *e, struct fk_peer *p)
{
    struct worker *w = calloc(1, sizeof(*w));
    uint32_t n = e->m->t->max_in_flight;

    if (!w)
        return NULL;
    pthread_mutex_init(&w->lock, NULL);
    pthread_cond_init(&w->something, NULL);
    *w = (struct worker){ .e = e, .peer = p, .lock = w->lock, .something = w->something };
    snprintf(w->address, sizeof(w->address), "%s", p->address);
    w->headers = aligned_alloc(4096, fk_round_up((size_t)n * FK_MOON_HEADER, 4096));
    bool ok = w->headers && !fk_vec_reserve(&w->asked, n) && !fk_vec_reserve(&w->ended, n) &&
              !fk_vec_reserve(&w->flying, n) && !fk_vec_reserve(&w->free_headers, n) &&
              fk_moon_engine_region(e->m, w->headers, fk_round_up((size_t)n * FK_MOON_HEADER, 4096)) == 0;
    for (uint32_t i = 0; ok && i < n; i++)
        (void)fk_vec_push(&w->free_headers, w->headers + (size_t)i * FK_MOON_HEADER);
    if (!ok || pthread_create(&w->thread, NULL, worker_main, w)) {
        worker_free(w);
        return NULL;
    }
    w->next = e->workers;
    e->workers = w;
    e->m->t->delta.connections++;
    return w;
}

void fk_moon_engine_pump(struct fk_mooncake *m, struct fk_peer *p)
{
    struct worker *w = p->channel ? p->channel : worker_new(m->engine, p);
    struct fk_op *op;

    if (!w) {
        fk_peer_end_queued(m->t, p, -ENOMEM);
        return;
    }
    p->channel = w;
    pthread_mutex_lock(&w->lock);
    while (p->sent.n + p->late.n < m->t->max_in_flight && (op = fk_op_next(m->t, p, w))) {
        struct task k = { .op = op->id, .read = op->r };
        (void)fk_vec_push(&w->asked, k);
    }
    pthread_cond_signal(&w->something);
    pthread_mutex_unlock(&w->lock);
}

static void tell_to_stop(struct worker *w, bool abandon)
{
    pthread_mutex_lock(&w->lock);
    w->stop = true;
    w->abandon = abandon;
    pthread_cond_signal(&w->something);
    pthread_mutex_unlock(&w->lock);
}

bool fk_moon_engine_drop(struct fk_mooncake *m, struct fk_peer *p)
{
    struct worker *w = p->channel;

    if (!w)
        return true;
    while (p->sent.head)
        fk_op_quarantine(m->t, p->sent.head, -ECANCELED);
    tell_to_stop(w, false);
    return false;                       /* the engine may write to those buffers yet */
}

static void report(struct fk_transport *t, const struct task *k)
{
    struct fk_op *op = fk_op_find(t, k->op);

    if (!op)
        return;
    if (k->rc || k->read.flags & FK_READ_RAW)
        fk_op_end(t, op, k->rc);
    else
        fk_op_arrived(t, op, k->checksum);
}

/* True: it has ended, and been reported. */
static bool look_at(struct fk_mooncake *m, struct worker *w)
{
    struct task k;
    bool some, gone;

    do {
        pthread_mutex_lock(&w->lock);
        some = w->ended.len > 0;
        gone = w->gone;
        if (some)
            k = w->ended.data[--w->ended.len];
        pthread_mutex_unlock(&w->lock);
        if (some)
            report(m->t, &k);
    } while (some);
    return gone;
}

void fk_moon_engine_tick(struct fk_mooncake *m)
{
    for (struct worker **at = &m->engine->workers, *w; (w = *at);) {
        if (!look_at(m, w)) {
            at = &w->next;
            continue;
        }
        *at = w->next;
        pthread_join(w->thread, NULL);
        w->peer->channel = NULL;
        m->t->delta.connections--;
        fk_peer_gone(m->t, w->peer);
        worker_free(w);
    }
}

void fk_moon_engine_close(struct fk_mooncake *m)
{
    struct fk_moon_engine *e = m->engine;
    struct worker *done = NULL;

    for (struct worker *w = e->workers; w; w = w->next)
        tell_to_stop(w, true);
    while (e->workers) {
        struct worker *w = e->workers;
        e->workers = w->next;
        pthread_join(w->thread, NULL);
        w->next = done;
        done = w;
    }
    moon.destroyTransferEngine(e->engine);      /* ends what is under way; takes up to a second */
    while (done) {
        struct worker *w = done;
        done = w->next;
        worker_free(w);
    }
    free(e);
    m->engine = NULL;
}
