/*
 * engine_fault.c - a filter around any engine that injects faults, by kind and rate, from a
 * seed. Each I/O travels as a copy (a shadow) whose length, place or data may differ from
 * what the submitter asked for; he gets his own fk_io back untouched but for the result.
 * Called by the engine's owner, no lock; wake() by any thread.
 */
#include <stdio.h>

#include "base/clock.h"
#include "base/util.h"
#include "tier/engine.h"

#define ALIGN 4096u                     /* of direct files: contract of struct fk_io */

struct shadow {
    struct fk_io io;                    /* what the inner engine sees; first member */
    struct fk_io *orig;
    struct shadow *next;                /* free list, or held */
    uint64_t due_us;                    /* not handed over before */
    int32_t forced;                     /* result to report instead; INT32_MIN: the real one */
    bool flip;
};

struct fault_engine {
    struct fk_engine base;
    struct fk_engine *inner;
    struct fk_fault_params params;
    uint64_t rng;
    uint64_t counts[FK_FAULT_KINDS];
    FK_VEC(bool) direct;                /* by file */
    struct shadow *free, *held;         /* held: complete, waiting for due_us */
    unsigned inflight;
};

static const struct {
    const char *name;
    int op;                             /* enum fk_io_op, or -1: both */
} kinds[FK_FAULT_KINDS] = {
    [FK_FAULT_READ_ERROR] = { "read_error", FK_IO_READ },
    [FK_FAULT_WRITE_ERROR] = { "write_error", FK_IO_WRITE },
    [FK_FAULT_READ_SHORT] = { "read_short", FK_IO_READ },
    [FK_FAULT_WRITE_SHORT] = { "write_short", FK_IO_WRITE },
    [FK_FAULT_READ_FLIP] = { "read_flip", FK_IO_READ },
    [FK_FAULT_WRITE_TORN] = { "write_torn", FK_IO_WRITE },
    [FK_FAULT_WRITE_LOST] = { "write_lost", FK_IO_WRITE },
    [FK_FAULT_WRITE_MISDIRECT] = { "write_misdirect", FK_IO_WRITE },
    [FK_FAULT_READ_MISDIRECT] = { "read_misdirect", FK_IO_READ },
    [FK_FAULT_DELAY] = { "delay", -1 },
    [FK_FAULT_ENOSPC] = { "enospc", FK_IO_WRITE },
};

static struct fault_engine *self(struct fk_engine *e)
{
    return (struct fault_engine *)e;
}

/* --- what the seed says --- */

static bool drawn(struct fault_engine *f, enum fk_fault_kind kind)
{
    double rate = f->params.rate[kind];

    if (rate <= 0)
        return false;
    return (double)(fk_rng_next(&f->rng) >> 11) * 0x1p-53 < rate;
}

static int draw_kind(struct fault_engine *f, const struct fk_io *io)
{
    if (io->file >= f->direct.len || (!f->direct.data[io->file] && !f->params.tables))
        return -1;
    for (int k = 0; k < FK_FAULT_KINDS; k++) {
        if ((kinds[k].op < 0 || kinds[k].op == (int)io->op) && drawn(f, k))
            return k;
    }
    return -1;
}

/* A leading part of the I/O: less than all, aligned as the file needs it, perhaps nothing. */
static uint32_t part_of(struct fault_engine *f, const struct fk_io *io)
{
    uint32_t align = f->direct.data[io->file] ? ALIGN : 1;
    uint32_t units = io->bytes / align;

    return units > 1 ? fk_rng_below(&f->rng, units) * align : 0;
}

/* Another place in the file for the same number of bytes; false if there is none. */
static bool misdirect(struct fault_engine *f, struct fk_io *io)
{
    uint64_t size, align = f->direct.data[io->file] ? ALIGN : 64;

    if (f->inner->ops->size(f->inner, io->file, &size) < 0 || size < io->bytes + 2 * align)
        return false;
    uint64_t places = (size - io->bytes) / align;
    uint64_t at = fk_rng_next(&f->rng) % places * align;
    if (at == io->offset)
        at = at + align <= size - io->bytes ? at + align : 0;
    if (at == io->offset)
        return false;
    io->offset = at;
    return true;
}

/* Applies the fault to the shadow; true if it still goes to the inner engine. */
static bool apply(struct fault_engine *f, struct shadow *s, int kind)
{
    struct fk_io *io = &s->io;
    bool goes = true;

    switch (kind) {
    case FK_FAULT_READ_ERROR:
    case FK_FAULT_WRITE_ERROR:
        s->forced = -EIO;
        goes = false;
        break;
    case FK_FAULT_ENOSPC:
        s->forced = -ENOSPC;
        goes = false;
        break;
    case FK_FAULT_WRITE_LOST:
        s->forced = (int32_t)io->bytes;
        goes = false;
        break;
    case FK_FAULT_WRITE_TORN:
        s->forced = (int32_t)io->bytes;
        io->bytes = part_of(f, io);
        goes = io->bytes > 0;
        break;
    case FK_FAULT_READ_SHORT:
    case FK_FAULT_WRITE_SHORT:
        io->bytes = part_of(f, io);
        s->forced = io->bytes ? INT32_MIN : 0;
        goes = io->bytes > 0;
        break;
    case FK_FAULT_READ_FLIP:
        s->flip = true;
        break;
    case FK_FAULT_WRITE_MISDIRECT:
    case FK_FAULT_READ_MISDIRECT:
        if (!misdirect(f, io))
            return true;
        break;
    case FK_FAULT_DELAY:
        s->due_us = fk_clock_us() + f->params.delay_us;
        break;
    default:
        return true;
    }
    f->counts[kind]++;
    return goes;
}

/* --- the vtable --- */

static void hold(struct fault_engine *f, struct shadow *s)
{
    s->next = f->held;
    f->held = s;
}

static void fault_submit(struct fk_engine *e, struct fk_io *io)
{
    struct fault_engine *f = self(e);
    struct shadow *s = f->free;

    if (s)
        f->free = s->next;
    else
        s = malloc(sizeof(*s));
    if (!s)
        abort();                        /* a test tool: no way to report it */
    *s = (struct shadow){ .io = *io, .orig = io, .forced = INT32_MIN };
    s->io.owner = s;
    f->inflight++;
    if (apply(f, s, draw_kind(f, io)))
        f->inner->ops->submit(f->inner, &s->io);
    else
        hold(f, s);
}

static void fault_flush(struct fk_engine *e)
{
    self(e)->inner->ops->flush(self(e)->inner);
}

static struct fk_io *finish(struct fault_engine *f, struct shadow *s)
{
    struct fk_io *io = s->orig;

    io->result = s->forced != INT32_MIN && s->io.result >= 0 ? s->forced : s->io.result;
    if (s->flip && io->result > 0) {
        uint32_t bit = fk_rng_below(&f->rng, (uint32_t)io->result * 8);

        ((uint8_t *)io->buf)[bit / 8] ^= (uint8_t)(1u << (bit % 8));
    }
    io->next = NULL;
    s->next = f->free;
    f->free = s;
    f->inflight--;
    return io;
}

/* Hands over what is due; *wait_us: until the next one is. */
static int take_held(struct fault_engine *f, struct fk_io **out, int max, uint64_t *wait_us)
{
    uint64_t now = fk_clock_us();
    int n = 0;

    for (struct shadow **at = &f->held; *at;) {
        struct shadow *s = *at;

        if (s->due_us <= now && n < max) {
            *at = s->next;
            out[n++] = finish(f, s);
            continue;
        }
        *wait_us = fk_min(*wait_us, s->due_us > now ? s->due_us - now : 0);
        at = &s->next;
    }
    return n;
}

static int fault_reap(struct fk_engine *e, struct fk_io **out, int max, uint64_t timeout_us)
{
    struct fault_engine *f = self(e);
    struct fk_io *ios[64];
    uint64_t wait_us = timeout_us;
    int n = take_held(f, out, max, &wait_us);

    if (n == max)
        return n;
    int room = fk_min(max - n, (int)fk_array_size(ios));
    int got = f->inner->ops->reap(f->inner, ios, room, n > 0 ? 0 : wait_us);
    uint64_t now = got > 0 ? fk_clock_us() : 0;
    for (int i = 0; i < got; i++) {
        struct shadow *s = ios[i]->owner;

        if (s->due_us > now)
            hold(f, s);
        else
            out[n++] = finish(f, s);
    }
    return n;
}

static int fault_open(struct fk_engine *e, const char *path, uint64_t bytes, unsigned flags,
                      uint32_t *file, bool *created)
{
    struct fault_engine *f = self(e);
    int rc = f->inner->ops->open(f->inner, path, bytes, flags, file, created);

    if (rc < 0)
        return rc;
    while (f->direct.len <= *file) {
        if (fk_vec_push(&f->direct, false) < 0) {
            f->inner->ops->close(f->inner, *file);
            return -ENOMEM;
        }
    }
    f->direct.data[*file] = (flags & FK_FILE_DIRECT) != 0;
    return 0;
}

static void fault_close(struct fk_engine *e, uint32_t file)
{
    self(e)->inner->ops->close(self(e)->inner, file);
}

static int fault_size(struct fk_engine *e, uint32_t file, uint64_t *bytes)
{
    return self(e)->inner->ops->size(self(e)->inner, file, bytes);
}

static int fault_sync(struct fk_engine *e, uint32_t file)
{
    struct fk_engine *inner = self(e)->inner;

    return inner->ops->sync ? inner->ops->sync(inner, file) : 0;
}

static int fault_register_memory(struct fk_engine *e, void *base, uint64_t bytes)
{
    return self(e)->inner->ops->register_memory(self(e)->inner, base, bytes);
}

static void fault_wake(struct fk_engine *e)
{
    self(e)->inner->ops->wake(self(e)->inner);
}

static unsigned fault_inflight(struct fk_engine *e)
{
    return self(e)->inflight;
}

static void fault_destroy(struct fk_engine *e)
{
    struct fault_engine *f = self(e);

    f->inner->ops->destroy(f->inner);
    for (struct shadow *s = f->free; s;) {
        struct shadow *next = s->next;

        free(s);
        s = next;
    }
    fk_vec_free(&f->direct);
    free(f);
}

static const struct fk_engine_ops fault_ops = {
    .name = "fault", .open = fault_open, .close = fault_close, .size = fault_size,
    .sync = fault_sync, .register_memory = fault_register_memory, .submit = fault_submit, .flush = fault_flush,
    .reap = fault_reap, .wake = fault_wake, .inflight = fault_inflight,
    .destroy = fault_destroy,
};

int fk_engine_fault_create(struct fk_engine *inner, const struct fk_fault_params *params,
                           struct fk_engine **out)
{
    struct fault_engine *f = calloc(1, sizeof(*f));

    if (!f)
        return -ENOMEM;
    f->base.ops = &fault_ops;
    f->inner = inner;
    f->params = *params;
    f->rng = params->seed;
    *out = &f->base;
    return 0;
}

uint64_t fk_engine_fault_count(struct fk_engine *e, enum fk_fault_kind kind)
{
    return e->ops == &fault_ops && kind < FK_FAULT_KINDS ? self(e)->counts[kind] : 0;
}

/* --- the specification --- */

static int set_word(struct fk_fault_params *p, const char *name, const char *value)
{
    char *end;

    errno = 0;
    for (int k = 0; k < FK_FAULT_KINDS; k++) {
        if (strcmp(name, kinds[k].name) != 0)
            continue;
        p->rate[k] = strtod(value, &end);
        return !*end && p->rate[k] >= 0 && p->rate[k] <= 1 ? 0 : -EINVAL;
    }
    if (strchr(value, '-'))
        return -EINVAL;
    unsigned long long n = strtoull(value, &end, 0);
    if (*end || errno)
        return -EINVAL;
    if (strcmp(name, "seed") == 0)
        p->seed = n;
    else if (strcmp(name, "delay_us") == 0)
        p->delay_us = n;
    else if (strcmp(name, "tables") == 0 && n <= 1)
        p->tables = n;
    else
        return -EINVAL;
    return 0;
}

int fk_fault_parse(const char *spec, struct fk_fault_params *out, const char **bad_word)
{
    struct fk_fault_params p = { .seed = 1, .delay_us = 10000 };
    const char *at = spec;

    while (*at) {
        size_t len = strcspn(at, ",");
        char word[64];

        if (len > 0) {
            snprintf(word, sizeof(word), "%.*s", (int)fk_min(len, sizeof(word) - 1), at);
            char *value = strchr(word, '=');

            if (value)
                *value++ = '\0';
            if (!value || !*value || len >= sizeof(word) || set_word(&p, word, value) < 0) {
                *bad_word = at;
                return -EINVAL;
            }
        }
        at += len + (at[len] == ',');
    }
    *out = p;
    return 0;
}
