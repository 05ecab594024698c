/* trace.c - see trace.h. Files are read with zlib, which takes plain files as they are. */
#include "trace.h"

#include <stdarg.h>
#include <stdio.h>
#include <zlib.h>

#include "trace_line.h"

#define READ_BYTES (1u << 20)
#define MAP_MIN_SLOTS 1024u

/* Loads one file: bytes are fed in pieces, whole lines are taken out of buf. */
struct loader {
    struct trace *t;
    const char *name;
    uint64_t line;
    uint64_t limit;                 /* requests of the whole trace */
    uint64_t base_us;               /* time at which this file begins */
    struct trace_line parsed;
    FK_VEC(char) buf;               /* a line that is not complete yet */
    char *error;
    size_t error_bytes;
};

static int fail_line(struct loader *l, int rc, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));

static int fail_line(struct loader *l, int rc, const char *fmt, ...)
{
    va_list ap;
    int n = snprintf(l->error, l->error_bytes, "%s:%llu: ", l->name, (unsigned long long)l->line);

    if (n < 0 || (size_t)n >= l->error_bytes)
        return rc;
    va_start(ap, fmt);
    vsnprintf(l->error + n, l->error_bytes - (size_t)n, fmt, ap);
    va_end(ap);
    return rc;
}

static int fail_file(struct loader *l, int rc, const char *why)
{
    snprintf(l->error, l->error_bytes, "%s: %s", l->name, why);
    return rc;
}

/* ---- ids -> numbers in the order of first appearance: open addressing, half full ---- */

static uint32_t map_probe(const struct trace *t, uint64_t id)
{
    uint32_t mask = t->map_slots - 1;
    uint32_t i = (uint32_t)((id * 0x9e3779b97f4a7c15ull) >> 32) & mask;

    while (t->map[i].id_plus_1 && t->map[i].id_plus_1 != id + 1)
        i = (i + 1) & mask;
    return i;
}

static int map_grow(struct trace *t)
{
    struct trace_id_slot *old = t->map;
    uint32_t old_slots = t->map_slots;

    if (old_slots > UINT32_MAX / 4)
        return -ENOMEM;
    uint32_t slots = old_slots ? old_slots * 2 : MAP_MIN_SLOTS;
    struct trace_id_slot *map = calloc(slots, sizeof(*map));
    if (!map)
        return -ENOMEM;
    t->map = map;
    t->map_slots = slots;
    for (uint32_t i = 0; i < old_slots; i++)
        if (old[i].id_plus_1)
            map[map_probe(t, old[i].id_plus_1 - 1)] = old[i];
    free(old);
    return 0;
}

static void map_clear(struct trace *t)
{
    if (t->map)
        memset(t->map, 0, t->map_slots * sizeof(*t->map));
    t->map_used = 0;
}

/* The number of the id; a new one if it was not seen before. */
static int map_id(struct trace *t, uint64_t id, uint32_t parent, uint32_t *index)
{
    if (t->map_used >= t->map_slots / 2 && map_grow(t))
        return -ENOMEM;
    struct trace_id_slot *s = &t->map[map_probe(t, id)];
    if (!s->id_plus_1) {
        if (t->unique >= FK_NONE - 1 || fk_vec_push(&t->parents, parent))
            return -ENOMEM;
        *s = (struct trace_id_slot){ id + 1, t->unique++ };
        t->map_used++;
    }
    *index = s->index;
    return 0;
}

/* ---- lines ---- */

static int add_ids(struct loader *l, struct trace_request *r)
{
    struct trace *t = l->t;
    uint32_t parent = FK_NONE, known = t->unique;

    if (l->parsed.ids.len > UINT32_MAX / 2 ||
        fk_vec_reserve(&t->ids, t->ids.len + l->parsed.ids.len + 1))
        return fail_line(l, -ENOMEM, "out of memory");
    for (size_t i = 0; i < l->parsed.ids.len; i++) {
        uint32_t index;
        if (map_id(t, l->parsed.ids.data[i], parent, &index))
            return fail_line(l, -ENOMEM, "out of memory");
        if (t->parents.data[index] != parent)
            return fail_line(l, -EINVAL, "hash_ids: id %llu at position %zu has another prefix "
                             "than where it stood before", (unsigned long long)l->parsed.ids.data[i], i);
        t->ids.data[t->ids.len++] = parent = index;
    }
    r->n_ids = (uint32_t)l->parsed.ids.len;
    r->new_ids = t->unique - known;
    t->max_ids = fk_max(t->max_ids, r->n_ids);
    return 0;
}

static bool is_blank(const char *text, size_t len)
{
    for (size_t i = 0; i < len; i++)
        if (!strchr(" \t\r\n", text[i]) || !text[i])
            return false;
    return true;
}

static int add_line(struct loader *l, const char *text, size_t len)
{
    struct trace *t = l->t;
    const char *why = "";
    size_t at = 0;

    l->line++;
    if (is_blank(text, len))
        return 0;
    int rc = trace_line_parse(text, len, &l->parsed, &why, &at);
    if (rc)
        return fail_line(l, rc, "%s (column %zu)", why, at + 1);
    struct trace_request r = {
        .time_us = l->base_us + (uint64_t)(l->parsed.timestamp_ms * 1000),
        .first_id = t->ids.len,
        .input_tokens = l->parsed.input_tokens,
        .output_tokens = l->parsed.output_tokens,
    };
    if (t->requests.len && r.time_us < t->requests.data[t->requests.len - 1].time_us)
        return fail_line(l, -EINVAL, "timestamp %.15g is before that of the request above",
                         l->parsed.timestamp_ms);
    rc = add_ids(l, &r);
    if (rc)
        return rc;
    return fk_vec_push(&t->requests, r) ? fail_line(l, -ENOMEM, "out of memory") : 0;
}

static bool enough(const struct loader *l)
{
    return l->limit && l->t->requests.len >= l->limit;
}

static int keep_rest(struct loader *l, const char *data, size_t bytes)
{
    if (l->buf.len + bytes > TRACE_MAX_LINE_BYTES) {
        l->line++;
        return fail_line(l, -EINVAL, "line longer than %u MiB", TRACE_MAX_LINE_BYTES >> 20);
    }
    if (fk_vec_reserve(&l->buf, l->buf.len + bytes + 1))
        return fail_file(l, -ENOMEM, "out of memory");
    memcpy(l->buf.data + l->buf.len, data, bytes);
    l->buf.len += bytes;
    return 0;
}

static int take_rest(struct loader *l)
{
    size_t len = l->buf.len;

    l->buf.len = 0;
    return enough(l) ? 0 : add_line(l, l->buf.data, len);
}

static int feed(struct loader *l, const char *data, size_t bytes)
{
    while (bytes && !enough(l)) {
        const char *nl = memchr(data, '\n', bytes);
        size_t n = nl ? (size_t)(nl - data) : bytes;
        int rc = !nl || l->buf.len ? keep_rest(l, data, n) : add_line(l, data, n);
        if (!rc && nl && l->buf.len)
            rc = take_rest(l);
        if (rc)
            return rc;
        data += n + (nl != NULL);
        bytes -= n + (nl != NULL);
    }
    return 0;
}

static int finish(struct loader *l)
{
    return l->buf.len ? take_rest(l) : 0;
}

/* ---- files ---- */

static int read_failed(struct loader *l, gzFile gz)
{
    int zerr = Z_OK, err = errno;
    const char *text = gzerror(gz, &zerr);

    if (zerr == Z_ERRNO)
        return fail_file(l, -(err ? err : EIO), strerror(err ? err : EIO));
    if (zerr == Z_BUF_ERROR)
        return fail_file(l, -EINVAL, "compressed file is cut short");
    if (zerr == Z_MEM_ERROR)
        return fail_file(l, -ENOMEM, "out of memory");
    return fail_file(l, -EINVAL, *text ? text : "not readable");
}

static int read_all(struct loader *l, gzFile gz, char *buf)
{
    while (!enough(l)) {
        errno = 0;
        int got = gzread(gz, buf, READ_BYTES);
        int zerr = Z_OK;
        gzerror(gz, &zerr);
        if (got < 0 || (zerr != Z_OK && zerr != Z_STREAM_END))
            return read_failed(l, gz);
        if (!got)
            break;
        int rc = feed(l, buf, (size_t)got);
        if (rc)
            return rc;
    }
    return finish(l);
}

static int load_file(struct loader *l)
{
    fk_autofree char *buf = malloc(READ_BYTES);

    errno = 0;
    gzFile gz = gzopen(l->name, "rb");
    if (!gz)
        return fail_file(l, errno ? -errno : -ENOMEM, errno ? strerror(errno) : "out of memory");
    gzbuffer(gz, READ_BYTES / 4);
    int rc = buf ? read_all(l, gz, buf) : fail_file(l, -ENOMEM, "out of memory");
    gzclose_r(gz);
    return rc;
}

static void loader_begin(struct loader *l, const char *name)
{
    struct trace *t = l->t;

    l->name = name;
    l->line = 0;
    l->buf.len = 0;
    l->base_us = t->requests.len ? t->requests.data[t->requests.len - 1].time_us : 0;
}

static void loader_end(struct loader *l)
{
    fk_vec_free(&l->parsed.ids);
    fk_vec_free(&l->buf);
    free(l->t->map);
    l->t->map = NULL;
    l->t->map_slots = l->t->map_used = 0;
}

int trace_load(struct trace *t, const char *const *paths, size_t n_paths, uint64_t limit,
               unsigned flags, char *error, size_t error_bytes)
{
    struct loader l = { .t = t, .limit = limit, .error = error, .error_bytes = error_bytes };
    int rc = 0;

    memset(t, 0, sizeof(*t));
    for (size_t i = 0; i < n_paths && !rc && !enough(&l); i++) {
        loader_begin(&l, paths[i]);
        if (!(flags & TRACE_JOIN))
            map_clear(t);
        rc = load_file(&l);
    }
    loader_end(&l);
    return rc;
}

int trace_load_memory(struct trace *t, const char *name, const char *data, size_t bytes,
                      uint64_t limit, char *error, size_t error_bytes)
{
    struct loader l = { .t = t, .limit = limit, .error = error, .error_bytes = error_bytes };

    memset(t, 0, sizeof(*t));
    loader_begin(&l, name);
    int rc = feed(&l, data, bytes / 2);
    if (!rc)
        rc = feed(&l, data + bytes / 2, bytes - bytes / 2);
    if (!rc)
        rc = finish(&l);
    loader_end(&l);
    return rc;
}

void trace_free(struct trace *t)
{
    fk_vec_free(&t->requests);
    fk_vec_free(&t->ids);
    fk_vec_free(&t->parents);
    free(t->map);
    memset(t, 0, sizeof(*t));
}
