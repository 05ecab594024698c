/*
 * events_merge.c - one stream out of two: an engine's, passed on as it is, and a FlexKV node's. For a
 * router that knows one endpoint for each worker. Called by cmd_events.c.
 *
 *   engine  --batches-->  mirror of its blocks  --as they are-->  publisher --> router
 *   node    --events, or batches and a mirror of them----------->
 *
 * The engine's "all blocks are cleared" makes a router forget the node's blocks too, though they are
 * still there: they are told again behind it. The node's own "cleared" must not make it forget
 * the engine's: it becomes "removed" of each. When all is to be told again (a new subscriber), it comes
 * from the mirrors. An engine that began anew, or whose batches are lost for good, is a new beginning:
 * what the router believes of it is cleared.
 *
 * All of this runs in the publisher's thread, as its source; the main thread waits for the end.
 */
#include <inttypes.h>
#include <stdio.h>
#include <sys/epoll.h>

#include "base/clock.h"
#include "base/log.h"
#include "events/check.h"
#include "events/encode.h"
#include "events/publisher.h"
#include "events_cmd.h"

/* The blocks of a mirror, told or taken back, a portion at a time. Meanwhile no batch is read. */
struct dump {
    struct fk_mirror *mirror;       /* NULL: none under way */
    const struct fk_mirror_block *at;
    unsigned tier;
    bool remove;                    /* and the mirror is emptied at the end */
};

struct side {
    struct stream stream;
    struct stream_message message;  /* the one that was read last */
    struct fk_stream_batch decoded;
    struct fk_mirror mirror;
    struct dump dump;
    uint64_t batches, unreadable, restarts, lost;
};

struct merge {
    const struct fk_zmq *zmq;
    struct side engine, own;
    bool held;                      /* the engine's message comes after the clearing that is due */
    flexkv_node *node;              /* or its own endpoint */
    flexkv_events *events;
    int epoll;
    struct fk_batch *clear;
};

/* ---- dumps ---- */

/* To the next block that is in the tier; tier by tier, so that a chain's blocks come one behind the
 * other. */
static void dump_seek(struct dump *d)
{
    while (d->tier < FK_MIRROR_TIERS && !(d->at && d->at->tiers & 1u << d->tier)) {
        if (d->at)
            d->at = d->at->after;
        if (!d->at && ++d->tier < FK_MIRROR_TIERS)
            d->at = d->mirror->first;
    }
    if (d->tier == FK_MIRROR_TIERS)
        d->at = NULL;
}

/* After what take_dump gave has been used. */
static void end_dump(struct side *s)
{
    if (!s->dump.mirror || s->dump.at)
        return;
    if (s->dump.remove)
        fk_mirror_free(&s->mirror);
    s->dump.mirror = NULL;
}

static void begin_dump(struct side *s, bool remove)
{
    s->dump = (struct dump){ .mirror = &s->mirror, .at = s->mirror.first, .remove = remove };
    dump_seek(&s->dump);
    end_dump(s);
}

static flexkv_event event_of(const struct fk_mirror_block *b, unsigned tier, bool remove)
{
    static const uint8_t medium[FK_MIRROR_TIERS] = {
        [FK_MIRROR_DEVICE] = FK_MEDIUM_DEVICE, [FK_MIRROR_HOST] = FLEXKV_MEDIUM_CPU,
        [FK_MIRROR_DISK] = FLEXKV_MEDIUM_STORAGE, [FK_MIRROR_EXTERNAL] = FLEXKV_MEDIUM_EXTERNAL,
    };

    return (flexkv_event){
        .kind = remove ? FLEXKV_EVENT_REMOVED : FLEXKV_EVENT_STORED, .medium = medium[tier],
        .root = b->root, .n_tokens = b->n_tokens, .hash = b->hash, .parent = b->parent,
        .tokens = b->tokens, .lora_name = b->lora_name, .cache_salt = b->cache_salt,
    };
}

static size_t take_dump(struct side *s, flexkv_event *out, size_t max)
{
    struct dump *d = &s->dump;
    size_t n = 0;

    while (d->at && n < max) {
        out[n++] = event_of(d->at, d->tier, d->remove);
        d->at = d->at->after;
        if (!d->at && ++d->tier < FK_MIRROR_TIERS)
            d->at = d->mirror->first;
        dump_seek(d);
    }
    return n;
}

static bool dumping(const struct merge *m)
{
    return m->engine.dump.mirror || m->own.dump.mirror;
}

/* The router has forgotten the node's blocks, and the node has not. */
static void own_again(struct merge *m)
{
    if (m->own.dump.mirror && m->own.dump.remove)
        fk_mirror_free(&m->own.mirror);
    m->own.dump.mirror = NULL;
    if (m->events)
        flexkv_events_again(m->events);
    else
        begin_dump(&m->own, false);
}

/* ---- what a batch does to a mirror ---- */

static void mirror_stored(struct side *s, const struct fk_stream_event *ev, enum fk_mirror_tier tier)
{
    const uint64_t *hash = fk_stream_hashes(&s->decoded, ev);
    size_t n = fk_min(ev->n_hashes, ev->n_tokens / ev->block_size);
    struct fk_mirror_desc d = {
        .root = !ev->has_parent, .parent = ev->parent, .n_tokens = ev->block_size,
        .lora_name = ev->lora_name.data, .lora_len = ev->lora_name.len,
        .cache_salt = ev->cache_salt.data, .salt_len = ev->cache_salt.len,
    };
    const struct fk_mirror_block *parent = ev->has_parent ? fk_mirror_find(&s->mirror, ev->parent) : NULL;
    bool differs;

    if (!d.cache_salt && parent && parent->cache_salt) {    /* inherited, as a router does */
        d.cache_salt = parent->cache_salt;
        d.salt_len = strlen(parent->cache_salt);
    }
    for (size_t i = 0; i < n; i++) {
        d.hash = hash[i];
        d.tokens = fk_stream_tokens(&s->decoded, ev) + i * ev->block_size;
        if (fk_mirror_store(&s->mirror, &d, tier, &differs) < 0)
            fk_error("out of memory: a new subscriber will not learn of all blocks");
        d.parent = hash[i];
        d.root = false;
    }
}

/* Returns whether the batch clears all. */
static bool mirror_batch(struct side *s)
{
    bool clears = false;

    for (size_t i = 0; i < s->decoded.events.len; i++) {
        const struct fk_stream_event *ev = &s->decoded.events.data[i];
        int tier = fk_mirror_tier_of(ev->medium.data, ev->medium.len);
        if (ev->type == FK_STREAM_CLEARED) {
            fk_mirror_free(&s->mirror);
            clears = true;
        } else if (tier >= 0 && ev->type == FK_STREAM_STORED) {
            mirror_stored(s, ev, (enum fk_mirror_tier)tier);
        } else if (tier >= 0) {
            for (size_t k = 0; k < ev->n_hashes; k++)
                fk_mirror_remove(&s->mirror, fk_stream_hashes(&s->decoded, ev)[k], (enum fk_mirror_tier)tier);
        }
    }
    return clears;
}

static bool has_clear(const struct fk_stream_batch *b)
{
    for (size_t i = 0; i < b->events.len; i++)
        if (b->events.data[i].type == FK_STREAM_CLEARED)
            return true;
    return false;
}

/* ---- batches ---- */

/* The next message of three frames; decoded says whether its batch can be read. */
static bool read_side(struct side *s, bool *decoded)
{
    while (s->stream.sub) {
        stream_done(&s->stream, &s->message);
        if (!stream_next(&s->stream, &s->message))
            return false;
        s->batches++;
        if (s->message.n != 3) {
            s->unreadable++;
            continue;
        }
        *decoded = !fk_stream_decode(s->message.frame[2].data, s->message.frame[2].bytes, &s->decoded);
        s->unreadable += !*decoded;
        if (!*decoded)
            fk_warn("%s: a batch cannot be read: %s", s->stream.name, s->decoded.why);
        return true;
    }
    return false;
}

static int give(struct fk_raw_batch *out, const void *payload, size_t bytes, bool clears)
{
    *out = (struct fk_raw_batch){ .payload = payload, .bytes = bytes, .clears = clears };
    return 1;
}

/* Did the engine's stream break before this message? Then what is known of it means nothing. */
static bool broke(struct side *s)
{
    bool restarted = s->stream.restarts != s->restarts, lost = s->stream.lost != s->lost;

    s->restarts = s->stream.restarts;
    s->lost = s->stream.lost;
    if (restarted)
        fk_warn("%s: the engine's stream began anew: its blocks are cleared", s->stream.name);
    else if (lost)
        fk_warn("%s: batches of the engine are lost for good: its blocks are cleared; what it holds "
                "from before is unknown to the router from now on", s->stream.name);
    return restarted || lost;
}

/* The engine's message that was read last, as it is. */
static int pass_engine(struct merge *m, bool decoded, struct fk_raw_batch *out)
{
    struct side *s = &m->engine;
    bool clears = decoded && mirror_batch(s);

    m->held = false;
    if (clears)
        own_again(m);
    return give(out, s->message.frame[2].data, s->message.frame[2].bytes, clears);
}

static int raw_engine(struct merge *m, struct fk_raw_batch *out)
{
    bool decoded = false;

    if (m->held) {
        decoded = !fk_stream_decode(m->engine.message.frame[2].data, m->engine.message.frame[2].bytes,
                                    &m->engine.decoded);
        return pass_engine(m, decoded, out);
    }
    if (!read_side(&m->engine, &decoded))
        return 0;
    if (!broke(&m->engine))
        return pass_engine(m, decoded, out);
    m->held = true;
    fk_mirror_free(&m->engine.mirror);
    own_again(m);
    return give(out, m->clear->data, m->clear->bytes, true);
}

/* The node's batches as they are, but for those that clear: its blocks are taken back one by one. */
static int raw_own(struct merge *m, struct fk_raw_batch *out)
{
    struct side *s = &m->own;
    bool decoded = false;

    while (!s->dump.mirror && read_side(s, &decoded)) {
        if (decoded && has_clear(&s->decoded)) {
            begin_dump(s, true);
        } else if (decoded) {
            mirror_batch(s);
            return give(out, s->message.frame[2].data, s->message.frame[2].bytes, false);
        }
    }
    return 0;
}

static int raw(void *ctx, struct fk_raw_batch *out)
{
    struct merge *m = ctx;

    end_dump(&m->engine);
    end_dump(&m->own);
    if (dumping(m))
        return 0;
    int rc = raw_engine(m, out);
    return rc || dumping(m) ? rc : raw_own(m, out);
}

/* ---- the source's other functions ---- */

static int take(void *ctx, flexkv_event *out, size_t max)
{
    struct merge *m = ctx;

    if (m->engine.dump.at)
        return (int)take_dump(&m->engine, out, max);
    if (m->own.dump.at)
        return (int)take_dump(&m->own, out, max);
    return m->events ? flexkv_events_take(m->events, out, max) : 0;
}

static int again(void *ctx)
{
    struct merge *m = ctx;

    begin_dump(&m->engine, false);
    own_again(m);
    return 0;
}

static int fd_of(void *ctx)
{
    return ((struct merge *)ctx)->epoll;
}

/* ---- begin and end ---- */

static int complain(const char *what)
{
    fprintf(stderr, EVENTS_COMMAND ": %s\n", what);
    return 1;
}

static int watch(struct merge *m, int fd)
{
    struct epoll_event ev = { .events = EPOLLIN };

    return fd < 0 || epoll_ctl(m->epoll, EPOLL_CTL_ADD, fd, &ev) ? complain("epoll: no descriptor") : 0;
}

static int open_node(struct merge *m, const struct events_options *o)
{
    if (flexkv_node_connect(o->config, o->node, &m->node) ||
        flexkv_events_open(m->node, NULL, &m->events))
        return complain(flexkv_last_error());
    return watch(m, flexkv_events_fd(m->events));
}

static int open_side(struct merge *m, struct side *s, const char *endpoint, const char *replay,
                     const char *topic)
{
    if (stream_open(&s->stream, m->zmq, EVENTS_COMMAND, endpoint, replay, topic))
        return 1;
    return watch(m, stream_fd(&s->stream));
}

static int make_clear(struct merge *m, int64_t rank)
{
    struct fk_encoder e;

    fk_encoder_init(&e, FK_PUBLISHER_BATCH_BYTES);
    fk_encoder_clear(&e);
    int rc = fk_encoder_batch(&e, 0, rank, &m->clear);
    fk_encoder_free(&e);
    return rc ? complain("out of memory") : 0;
}

static int open_merge(struct merge *m, const struct events_options *o)
{
    m->epoll = epoll_create1(EPOLL_CLOEXEC);
    int rc = m->epoll < 0 ? complain("epoll: no descriptor") : make_clear(m, o->rank);
    if (!rc)
        rc = open_side(m, &m->engine, o->merge, o->replay_endpoint, o->topic);
    if (rc)
        return rc;
    return o->node ? open_node(m, o) : open_side(m, &m->own, o->own_endpoint, o->own_replay, "");
}

static void close_side(struct side *s)
{
    if (s->stream.sub) {
        stream_done(&s->stream, &s->message);
        stream_close(&s->stream);
    }
    fk_mirror_free(&s->mirror);
    fk_stream_batch_free(&s->decoded);
}

static void close_merge(struct merge *m)
{
    close_side(&m->engine);
    close_side(&m->own);
    flexkv_events_close(m->events);
    flexkv_node_close(m->node);
    fk_batch_unref(m->clear);
    if (m->epoll >= 0)
        close(m->epoll);
}

static int publish(struct merge *m, const struct events_options *o)
{
    const struct fk_publisher_params params = {
        .endpoint = o->publish, .replay_endpoint = o->publish_replay, .topic = "", .rank = o->rank,
        .hwm = 10000, .history_batches = 10000, .history_bytes = 64 << 20,
        .endpoint_setting = "--publish", .replay_setting = "--publish-replay",
    };
    const struct fk_event_source source = { .take = take, .again = again, .fd = fd_of, .ctx = m,
                                            .raw = raw };
    struct fk_publisher_stats st;
    struct fk_publisher *p;
    char error[512];

    if (fk_publisher_open(m->zmq, &params, &source, &p, error, sizeof(error)))
        return complain(error);
    fk_info("merging %s and %s into %s", o->merge, o->node ? o->node : o->own_endpoint, o->publish);
    events_wait(o, -1, o->seconds > 0 ? (int)fk_min(o->seconds * 1000, 2e9) : -1);
    fk_publisher_stats(p, &st);
    fk_publisher_close(p);
    printf("%" PRIu64 " batches published (%" PRIu64 " of the engine, %" PRIu64 " cannot be read), %"
           PRIu64 " dropped, all told again %" PRIu64 " times; of the engine %" PRIu64 " recovered, %"
           PRIu64 " lost, %" PRIu64 " restarts\n", st.batches, m->engine.batches, m->engine.unreadable,
           st.dropped, st.resyncs, m->engine.stream.recovered, m->engine.stream.lost,
           m->engine.stream.restarts);
    return 0;
}

int events_merge(const struct events_options *o, const struct fk_zmq *zmq)
{
    struct merge m = { .zmq = zmq, .epoll = -1 };
    int rc = open_merge(&m, o);

    if (!rc)
        rc = publish(&m, o);
    close_merge(&m);
    return rc;
}
