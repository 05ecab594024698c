/*
 * csim_redis.c - a Redis as far as the cluster uses one: strings, one kind of sorted set, streams, TTLs, and
 * the scripts by what they do (the scripts themselves run in the real Redis of tests/e2e/test_cluster.py).
 */
#include "csim.h"

#include <inttypes.h>

enum type { STRING, ZSET, STREAM };
struct member { char name[320]; double score; };
struct entry { uint64_t major, minor; char *field, *value; size_t value_bytes; };
struct key {
    char name[200];
    enum type type;
    int64_t expires_ms;                 /* 0: never */
    char *text;
    size_t bytes;
    FK_VEC(struct member) members;
    FK_VEC(struct entry) entries;
    uint64_t top_major, top_minor;
};
typedef FK_VEC(struct key) key_list;
struct sr {
    key_list keys, copy;
    bool has_copy;
    uint64_t commands, changes;
    const char *broken;
};

/* ---- memory ---- */

static char *dup_bytes(const char *from, size_t n)
{
    char *p = malloc(n + 1);

    if (!p)
        abort();
    memcpy(p, from, n);
    p[n] = '\0';
    return p;
}

static void key_clear(struct key *k)
{
    free(k->text);
    for (size_t i = 0; i < k->entries.len; i++) {
        free(k->entries.data[i].field);
        free(k->entries.data[i].value);
    }
    fk_vec_free(&k->entries);
    fk_vec_free(&k->members);
}

static void list_clear(key_list *l)
{
    for (size_t i = 0; i < l->len; i++)
        key_clear(&l->data[i]);
    fk_vec_free(l);
}

static void list_copy(key_list *to, const key_list *from)
{
    list_clear(to);
    for (size_t i = 0; i < from->len; i++) {
        struct key k = from->data[i];
        k.text = k.text ? dup_bytes(k.text, k.bytes) : NULL;
        memset(&k.members, 0, sizeof(k.members));
        memset(&k.entries, 0, sizeof(k.entries));
        for (size_t m = 0; m < from->data[i].members.len; m++)
            (void)fk_vec_push(&k.members, from->data[i].members.data[m]);
        for (size_t e = 0; e < from->data[i].entries.len; e++) {
            struct entry x = from->data[i].entries.data[e];
            x.field = dup_bytes(x.field, strlen(x.field));
            x.value = dup_bytes(x.value, x.value_bytes);
            (void)fk_vec_push(&k.entries, x);
        }
        (void)fk_vec_push(to, k);
    }
}

static struct key *add_key(struct sr *r, const char *name, enum type type)
{
    struct key k = { .type = type };

    snprintf(k.name, sizeof(k.name), "%s", name);
    (void)fk_vec_push(&r->keys, k);
    return &r->keys.data[r->keys.len - 1];
}

static void drop_key(struct sr *r, size_t i)
{
    key_clear(&r->keys.data[i]);
    r->keys.data[i] = r->keys.data[--r->keys.len];
}

static void add_foreign(struct sr *r)
{
    struct key *k = add_key(r, "somebody:else", STRING);

    k->text = dup_bytes("42", 2);
    k->bytes = 2;
}

struct sr *sr_new(void)
{
    struct sr *r = calloc(1, sizeof(*r));

    if (!r)
        abort();
    add_foreign(r);
    return r;
}

void sr_free(struct sr *r)
{
    list_clear(&r->keys);
    list_clear(&r->copy);
    free(r);
}

void sr_flush(struct sr *r)
{
    list_clear(&r->keys);
    add_foreign(r);
    r->changes++;
}

void sr_evict(struct sr *r, uint64_t random)
{
    size_t i = random % r->keys.len;

    if (strncmp(r->keys.data[i].name, "flexkv:", 7) == 0)
        drop_key(r, i);
    r->changes++;
}

void sr_lose_record(struct sr *r, const char *node)
{
    char name[256];

    snprintf(name, sizeof(name), "flexkv:{sim}:node:%s", node);
    for (size_t i = 0; i < r->keys.len; i++)
        if (strcmp(r->keys.data[i].name, name) == 0)
            drop_key(r, i--);
}

void sr_copy(struct sr *r)
{
    list_copy(&r->copy, &r->keys);
    r->has_copy = true;
}

void sr_become_copy(struct sr *r)
{
    if (r->has_copy)
        list_copy(&r->keys, &r->copy);
    r->changes++;
}

/* ---- replies ---- */

static struct fk_reply *reply_new(enum fk_reply_type type)
{
    struct fk_reply *r = calloc(1, sizeof(*r));

    if (!r)
        abort();
    r->type = type;
    return r;
}

static void set_text(struct fk_reply *r, const char *text, size_t n)
{
    r->type = FK_REPLY_STRING;
    r->text = dup_bytes(text, n);
    r->bytes = n;
}

static struct fk_reply *reply_text(enum fk_reply_type type, const char *text)
{
    struct fk_reply *r = reply_new(type);

    set_text(r, text, strlen(text));
    r->type = type;
    return r;
}

static struct fk_reply *reply_int(int64_t n)
{
    struct fk_reply *r = reply_new(FK_REPLY_INTEGER);

    r->integer = n;
    return r;
}

static void set_array(struct fk_reply *r, size_t n)
{
    r->type = FK_REPLY_ARRAY;
    r->item = calloc(n + 1, sizeof(*r->item));
    r->n = n;
    if (!r->item)
        abort();
}

static void clear_reply(struct fk_reply *r)
{
    for (size_t i = 0; i < r->n; i++)
        clear_reply(&r->item[i]);
    free(r->item);
    free((void *)r->text);
}

void sr_reply_free(struct fk_reply *r)
{
    if (r)
        clear_reply(r);
    free(r);
}

/* ---- words and keys ---- */

static const char *word(const struct fk_command *cmd, size_t i, size_t *n)
{
    size_t start = i ? cmd->ends.data[i - 1] : 0;

    *n = cmd->ends.data[i] - start;
    return cmd->bytes.data + start;
}

static char *text_of(const struct fk_command *cmd, size_t i, char buf[256])
{
    size_t n;
    const char *w = word(cmd, i, &n);

    snprintf(buf, 256, "%.*s", (int)n, w);
    return buf;
}

static int64_t number_of(const struct fk_command *cmd, size_t i)
{
    char buf[256];

    return strtoll(text_of(cmd, i, buf), NULL, 10);
}

static struct key *find_key(struct sr *r, const char *name, int64_t now_ms)
{
    if (strncmp(name, "flexkv:{sim}:", 13) != 0)
        r->broken = "a command names a key that is not ours";
    for (size_t i = 0; i < r->keys.len; i++) {
        struct key *k = &r->keys.data[i];
        if (strcmp(k->name, name) != 0)
            continue;
        if (k->expires_ms && k->expires_ms <= now_ms) {
            drop_key(r, i);
            return NULL;
        }
        return k;
    }
    return NULL;
}

static struct key *key_at(struct sr *r, const struct fk_command *cmd, size_t i, int64_t now_ms)
{
    char name[256];

    return find_key(r, text_of(cmd, i, name), now_ms);
}

static void del_at(struct sr *r, const struct fk_command *cmd, size_t i, int64_t now_ms)
{
    struct key *k = key_at(r, cmd, i, now_ms);

    if (k)
        drop_key(r, (size_t)(k - r->keys.data));
}

static void set_string(struct sr *r, const char *name, const char *text, size_t n, int64_t expires)
{
    struct key *k = find_key(r, name, 0);

    if (!k)
        k = add_key(r, name, STRING);
    free(k->text);
    k->text = dup_bytes(text, n);
    k->bytes = n;
    k->expires_ms = expires;
    r->changes++;
}

/* ---- streams ---- */

static int stream_add(struct sr *r, struct key *k, uint64_t major, uint64_t minor, const char *field,
                      const char *value, size_t n, size_t cap)
{
    if (major < k->top_major || (major == k->top_major && minor <= k->top_minor))
        return -1;
    struct entry e = { major, minor, dup_bytes(field, strlen(field)), dup_bytes(value, n), n };
    k->top_major = major;
    k->top_minor = minor;
    (void)fk_vec_push(&k->entries, e);
    while (k->entries.len > cap) {
        free(k->entries.data[0].field);
        free(k->entries.data[0].value);
        memmove(k->entries.data, k->entries.data + 1, --k->entries.len * sizeof(e));
    }
    r->changes++;
    return 0;
}

static void control_add(struct sr *r, struct key *k, const char *field, const char *value, int64_t now_ms)
{
    uint64_t major = fk_max((uint64_t)now_ms, k->top_major);

    stream_add(r, k, major, major == k->top_major ? k->top_minor + 1 : 0, field, value, strlen(value), 256);
}

/* XADD key [NOMKSTREAM] MAXLEN ~ cap id field value */
static struct fk_reply *do_xadd(struct sr *r, const struct fk_command *cmd, int64_t now_ms)
{
    char buf[256], id[256], field[256];
    bool no_make = strcmp(text_of(cmd, 2, buf), "NOMKSTREAM") == 0;
    size_t at = no_make ? 3 : 2, n;
    struct key *k = key_at(r, cmd, 1, now_ms);

    if (!k && no_make)
        return reply_new(FK_REPLY_NIL);
    if (!k)
        k = add_key(r, text_of(cmd, 1, buf), STREAM);
    text_of(cmd, at + 3, id);
    text_of(cmd, at + 4, field);
    uint64_t major = 0, minor = 0;
    fk_id_read(id, strlen(id), &major, &minor);
    const char *data = word(cmd, at + 5, &n);
    if (stream_add(r, k, major, minor, field, data, n, (size_t)number_of(cmd, at + 2)))
        return reply_text(FK_REPLY_ERROR,
                          "ERR The ID specified in XADD is equal or smaller than the target stream top item");
    return reply_text(FK_REPLY_STRING, id);
}

static size_t entries_after(const struct key *k, uint64_t major, uint64_t minor, size_t *first)
{
    size_t i = 0;

    while (i < k->entries.len && (k->entries.data[i].major < major ||
                                  (k->entries.data[i].major == major && k->entries.data[i].minor <= minor)))
        i++;
    *first = i;
    return k->entries.len - i;
}

static void put_entries(struct fk_reply *to, const struct key *k, size_t first, size_t n)
{
    char id[64];

    set_array(to, 2);
    set_text(&to->item[0], k->name, strlen(k->name));
    set_array(&to->item[1], n);
    for (size_t i = 0; i < n; i++) {
        const struct entry *e = &k->entries.data[first + i];
        struct fk_reply *x = &to->item[1].item[i];
        set_array(x, 2);
        set_text(&x->item[0], id, (size_t)snprintf(id, sizeof(id), "%" PRIu64 "-%" PRIu64, e->major, e->minor));
        set_array(&x->item[1], 2);
        set_text(&x->item[1].item[0], e->field, strlen(e->field));
        set_text(&x->item[1].item[1], e->value, e->value_bytes);
    }
}

/* XREAD COUNT c BLOCK ms STREAMS key... id... */
static struct fk_reply *do_xread(struct sr *r, const struct fk_command *cmd, int64_t now_ms, bool last)
{
    size_t n = (cmd->ends.len - 6) / 2, streams = 0, count = (size_t)number_of(cmd, 2);
    struct fk_reply *reply = reply_new(FK_REPLY_ARRAY);
    char buf[256];

    set_array(reply, n);
    for (size_t i = 0; i < n; i++) {
        struct key *k = key_at(r, cmd, 6 + i, now_ms);
        uint64_t major = 0, minor = 0;
        size_t first, found;
        text_of(cmd, 6 + n + i, buf);
        fk_id_read(buf, strlen(buf), &major, &minor);
        if (k && (found = entries_after(k, major, minor, &first)) > 0)
            put_entries(&reply->item[streams++], k, first, fk_min(found, count));
    }
    reply->n = streams;
    if (streams)
        return reply;
    sr_reply_free(reply);
    return last ? reply_new(FK_REPLY_NIL) : NULL;
}

uint32_t sr_block_ms(const struct fk_command *cmd)
{
    return (uint32_t)number_of(cmd, 4);
}

/* ---- members ---- */

static struct key *members_key(struct sr *r, const char *name, int64_t now_ms)
{
    struct key *k = find_key(r, name, now_ms);

    return k ? k : add_key(r, name, ZSET);
}

static void zset(struct key *k, const char *name, double score)
{
    for (size_t i = 0; i < k->members.len; i++) {
        if (strcmp(k->members.data[i].name, name) == 0) {
            k->members.data[i].score = score;
            return;
        }
    }
    struct member m = { .score = score };
    snprintf(m.name, sizeof(m.name), "%s", name);
    (void)fk_vec_push(&k->members, m);
}

static bool zrem(struct key *k, const char *name, double below)
{
    for (size_t i = 0; k && i < k->members.len; i++) {
        if (strcmp(k->members.data[i].name, name) == 0 && k->members.data[i].score < below) {
            k->members.data[i] = k->members.data[--k->members.len];
            return true;
        }
    }
    return false;
}

static struct fk_reply *do_zrange(struct sr *r, const struct fk_command *cmd, int64_t now_ms)
{
    struct key *k = key_at(r, cmd, 1, now_ms);
    struct fk_reply *reply = reply_new(FK_REPLY_ARRAY);
    char score[32];

    set_array(reply, k ? 2 * k->members.len : 0);
    for (size_t i = 0; k && i < k->members.len; i++) {
        set_text(&reply->item[2 * i], k->members.data[i].name, strlen(k->members.data[i].name));
        set_text(&reply->item[2 * i + 1], score,
                 (size_t)snprintf(score, sizeof(score), "%.0f", k->members.data[i].score));
    }
    return reply;
}

/* ---- scripts; words: EVAL script n keys... args... ---- */

static uint64_t holder_of(const struct key *node)
{
    return node ? strtoull(node->text, NULL, 10) : 0;
}

static struct fk_reply *do_beat(struct sr *r, const struct fk_command *cmd, int64_t now_ms)
{
    enum { NODE = 3, MEMBERS, STREAM_KEY, COUNTER, CONTROL, EPOCH, FLOOR, NAME, TTL, RECORD, POLITE, LONG, LATEST };
    uint64_t e = (uint64_t)number_of(cmd, EPOCH), had = holder_of(key_at(r, cmd, NODE, now_ms));
    char name[256], buf[256], member[300], last[64] = "";
    int64_t ttl = number_of(cmd, TTL);
    struct fk_reply *reply = reply_new(FK_REPLY_ARRAY);
    size_t n;

    set_array(reply, 3);
    text_of(cmd, NAME, name);
    if (now_ms > number_of(cmd, LATEST)) {
        set_text(&reply->item[0], "0", 1);
        reply->item[1] = (struct fk_reply){ .type = FK_REPLY_INTEGER, .integer = 3 };
        set_text(&reply->item[2], "", 0);
        return reply;
    }
    if ((e && had > e) || (number_of(cmd, POLITE) == 1 && had)) {
        set_text(&reply->item[0], buf, (size_t)snprintf(buf, sizeof(buf), "%" PRIu64, had));
        reply->item[1] = (struct fk_reply){ .type = FK_REPLY_INTEGER, .integer = 2 };
        set_text(&reply->item[2], "", 0);
        return reply;
    }
    if (!e) {
        struct key *counter = key_at(r, cmd, COUNTER, now_ms);
        e = fk_max(fk_max(holder_of(counter), (uint64_t)number_of(cmd, FLOOR)), fk_max((uint64_t)now_ms, had)) + 1;
        char count[32];
        int len = snprintf(count, sizeof(count), "%" PRIu64, e);
        set_string(r, text_of(cmd, COUNTER, buf), count, (size_t)len, now_ms + 86400000);
    }
    snprintf(member, sizeof(member), "%s@%" PRIu64, name, had);
    struct key *members = members_key(r, text_of(cmd, MEMBERS, buf), now_ms);
    if (had && had != e)
        zrem(members, member, 1e300);
    snprintf(member, sizeof(member), "%s@%" PRIu64, name, e);
    zset(members, member, (double)(now_ms + ttl));
    members->expires_ms = now_ms + 86400000;
    const char *json = word(cmd, RECORD, &n);
    fk_autofree char *value = malloc(n + 32);
    int len = snprintf(value, n + 32, "%" PRIu64 "\n%.*s", e, (int)n, json);
    set_string(r, text_of(cmd, NODE, buf), value, (size_t)len, now_ms + ttl);
    if (had != e) {
        struct key *control = find_key(r, text_of(cmd, CONTROL, buf), now_ms);
        control = control ? control : add_key(r, buf, STREAM);
        control->expires_ms = now_ms + 86400000;
        control_add(r, control, "j", name, now_ms);
    }
    struct key *stream = key_at(r, cmd, STREAM_KEY, now_ms);
    if (stream) {
        stream->expires_ms = now_ms + ttl;
        if (stream->entries.len)
            snprintf(last, sizeof(last), "%" PRIu64 "-%" PRIu64, stream->top_major, stream->top_minor);
    }
    set_text(&reply->item[0], buf, (size_t)snprintf(buf, sizeof(buf), "%" PRIu64, e));
    reply->item[1] = (struct fk_reply){ .type = FK_REPLY_INTEGER, .integer = had == e };
    set_text(&reply->item[2], last, strlen(last));
    return reply;
}

static struct fk_reply *do_create(struct sr *r, const struct fk_command *cmd, int64_t now_ms)
{
    char buf[256], id[256];
    uint64_t major = 0, minor = 0;
    size_t n;

    if (holder_of(key_at(r, cmd, 3, now_ms)) != (uint64_t)number_of(cmd, 5))
        return reply_int(0);
    struct key *k = key_at(r, cmd, 4, now_ms);
    k = k ? k : add_key(r, text_of(cmd, 4, buf), STREAM);
    k->expires_ms = now_ms + number_of(cmd, 9);
    text_of(cmd, 7, id);
    fk_id_read(id, strlen(id), &major, &minor);
    const char *data = word(cmd, 8, &n);
    if (stream_add(r, k, major, minor, "b", data, n, (size_t)number_of(cmd, 6)))
        return reply_text(FK_REPLY_ERROR,
                          "ERR The ID specified in XADD is equal or smaller than the target stream top item");
    return reply_int(1);
}

static struct fk_reply *do_leave(struct sr *r, const struct fk_command *cmd, int64_t now_ms)
{
    char name[256], member[300], buf[256];
    uint64_t epoch = (uint64_t)number_of(cmd, 9);

    if (holder_of(key_at(r, cmd, 3, now_ms)) != epoch)
        return reply_int(0);
    del_at(r, cmd, 3, now_ms);
    del_at(r, cmd, 5, now_ms);
    del_at(r, cmd, 6, now_ms);
    snprintf(member, sizeof(member), "%s@%" PRIu64, text_of(cmd, 10, name), epoch);
    zrem(key_at(r, cmd, 4, now_ms), member, 1e300);
    struct key *control = find_key(r, text_of(cmd, 7, buf), now_ms);
    if (control)
        control_add(r, control, "l", member, now_ms);
    return reply_int(1);
}

static struct fk_reply *do_reap(struct sr *r, const struct fk_command *cmd, int64_t now_ms)
{
    struct key *k = key_at(r, cmd, 3, now_ms);
    char buf[256];
    int n = 0;

    for (size_t i = 4; i < cmd->ends.len; i++)
        n += zrem(k, text_of(cmd, i, buf), (double)now_ms);
    return reply_int(n);
}

static struct fk_reply *do_want(struct sr *r, const struct fk_command *cmd, int64_t now_ms)
{
    struct key *k = key_at(r, cmd, 3, now_ms);
    char name[256], buf[256];

    k = k ? k : add_key(r, text_of(cmd, 3, buf), STREAM);
    control_add(r, k, "w", text_of(cmd, 4, name), now_ms);
    k->expires_ms = now_ms + number_of(cmd, 5);
    return reply_int(1);
}

static struct fk_reply *do_eval(struct sr *r, const struct fk_command *cmd, int64_t now_ms)
{
    size_t n;
    const char *script = word(cmd, 1, &n);

    if (memmem(script, n, "'PEXPIRE',KEYS[3]", 17))
        return do_beat(r, cmd, now_ms);
    if (memmem(script, n, "'PEXPIRE',KEYS[2],ARGV[5]", 25))
        return do_create(r, cmd, now_ms);
    if (memmem(script, n, "'w',ARGV[1]", 11))
        return do_want(r, cmd, now_ms);
    if (memmem(script, n, "'DEL',KEYS[1]", 13))
        return do_leave(r, cmd, now_ms);
    return do_reap(r, cmd, now_ms);
}

/* ---- all ---- */

static void put_value(struct fk_reply *to, const struct key *k)
{
    if (k)
        set_text(to, k->text, k->bytes);
}

struct fk_reply *sr_do(struct sr *r, const struct fk_command *cmd, int64_t now_ms, bool last)
{
    char what[256], buf[256];
    struct fk_reply *reply;
    size_t n;

    r->commands++;
    text_of(cmd, 0, what);
    if (strcmp(what, "XREAD") == 0)
        return do_xread(r, cmd, now_ms, last);
    if (strcmp(what, "XADD") == 0)
        return do_xadd(r, cmd, now_ms);
    if (strcmp(what, "EVAL") == 0)
        return do_eval(r, cmd, now_ms);
    if (strcmp(what, "ZRANGE") == 0)
        return do_zrange(r, cmd, now_ms);
    if (strcmp(what, "TIME") == 0) {
        reply = reply_new(FK_REPLY_ARRAY);
        set_array(reply, 2);
        set_text(&reply->item[0], buf, (size_t)snprintf(buf, sizeof(buf), "%" PRId64, now_ms / 1000));
        set_text(&reply->item[1], buf, (size_t)snprintf(buf, sizeof(buf), "%" PRId64, now_ms % 1000 * 1000));
        return reply;
    }
    if (strcmp(what, "SET") == 0) {     /* key value PX ms */
        const char *value = word(cmd, 2, &n);
        set_string(r, text_of(cmd, 1, buf), value, n, now_ms + number_of(cmd, 4));
        return reply_text(FK_REPLY_STRING, "OK");
    }
    if (strcmp(what, "GET") == 0) {
        reply = reply_new(FK_REPLY_NIL);
        put_value(reply, key_at(r, cmd, 1, now_ms));
        return reply;
    }
    reply = reply_new(FK_REPLY_ARRAY);  /* MGET */
    set_array(reply, cmd->ends.len - 1);
    for (size_t i = 1; i < cmd->ends.len; i++)
        put_value(&reply->item[i - 1], key_at(r, cmd, i, now_ms));
    return reply;
}

const char *sr_check(struct sr *r, int64_t now_ms)
{
    bool foreign = false;

    for (size_t i = 0; i < r->keys.len; i++) {
        const struct key *k = &r->keys.data[i];
        if (strncmp(k->name, "flexkv:{sim}:", 13) != 0)
            foreign = strcmp(k->name, "somebody:else") == 0 && k->bytes == 2 && !k->expires_ms;
        else if (!k->expires_ms)
            return "a key of ours has no TTL";
        if (k->entries.len > 256)
            return "a stream is longer than its cap";
    }
    return r->broken ? r->broken : foreign ? NULL : "a key of somebody else was touched";
}

uint64_t sr_commands(const struct sr *r)
{
    return r->commands;
}

uint64_t sr_changes(const struct sr *r)
{
    return r->changes;
}
