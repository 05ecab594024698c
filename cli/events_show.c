/*
 * events_show.c - shows a stream, live or recorded: one line an event, what breaks a rule where it
 * happens, and a summary. Called by cmd_events.c.
 */
#include <inttypes.h>
#include <jansson.h>
#include <stdio.h>

#include "base/clock.h"
#include "events/check.h"
#include "events/record.h"
#include "events_cmd.h"

struct show {
    const struct events_options *o;
    struct fk_check check;
    struct fk_stream_batch decoded;
    struct fk_record recording;
    FILE *record;
    uint64_t seq, messages, start_us;
    bool failed;
};

static const char *const type_names[] = {
    [FK_STREAM_STORED] = "BlockStored", [FK_STREAM_REMOVED] = "BlockRemoved",
    [FK_STREAM_CLEARED] = "AllBlocksCleared",
};

/* ---- lines ---- */

/* As JSON has it, and so that no byte of the stream reaches a terminal as it is. */
static void print_text(struct fk_text t)
{
    json_t *string = t.data ? json_stringn(t.data, t.len) : NULL;
    char *quoted = string ? json_dumps(string, JSON_ENCODE_ANY | JSON_ENSURE_ASCII) : NULL;

    fputs(quoted ? quoted : "null", stdout);
    free(quoted);
    json_decref(string);
}

static void print_rank(const struct fk_stream_batch *b, const char *none)
{
    if (b->has_rank)
        printf("%" PRId64, b->rank);
    else
        fputs(none, stdout);
}

static void show_event(const struct show *s, const struct fk_stream_event *ev)
{
    const uint64_t *hash = fk_stream_hashes(&s->decoded, ev);

    printf("%" PRIu64 " rank ", s->seq);
    print_rank(&s->decoded, "-");
    printf(" %s", type_names[ev->type]);
    if (ev->type != FK_STREAM_CLEARED) {
        fputs(" medium ", stdout);
        print_text(ev->medium);
        printf(" blocks %zu", ev->n_hashes);
        if (ev->n_hashes)
            printf(" hash %016" PRIx64, hash[0]);
    }
    if (ev->type == FK_STREAM_STORED) {
        if (ev->has_parent)
            printf(" parent %016" PRIx64, ev->parent);
        printf(" tokens %zu", ev->n_tokens);
    }
    if (ev->cache_salt.data)
        fputs(" salt ", stdout), print_text(ev->cache_salt);
    if (ev->lora_name.data)
        fputs(" lora ", stdout), print_text(ev->lora_name);
    putchar('\n');
}

static void print_numbers(const char *name, const struct show *s, const struct fk_stream_event *ev)
{
    const uint64_t *hash = fk_stream_hashes(&s->decoded, ev);

    printf(", \"%s\": [", name);
    for (size_t i = 0; i < ev->n_hashes; i++)
        printf("%s%" PRIu64, i ? ", " : "", hash[i]);
    putchar(']');
}

static void show_event_json(const struct show *s, const struct fk_stream_event *ev)
{
    const uint32_t *token = fk_stream_tokens(&s->decoded, ev);

    printf("{\"seq\": %" PRIu64 ", \"ts\": %.6f, \"rank\": ", s->seq, s->decoded.ts);
    print_rank(&s->decoded, "null");
    printf(", \"type\": \"%s\"", type_names[ev->type]);
    if (ev->type != FK_STREAM_CLEARED) {
        fputs(", \"medium\": ", stdout);
        print_text(ev->medium);
        print_numbers("block_hashes", s, ev);
    }
    if (ev->type == FK_STREAM_STORED) {
        printf(ev->has_parent ? ", \"parent_block_hash\": %" PRIu64 : ", \"parent_block_hash\": null",
               ev->parent);
        printf(", \"block_size\": %u, \"token_ids\": [", ev->block_size);
        for (size_t i = 0; i < ev->n_tokens; i++)
            printf("%s%u", i ? ", " : "", token[i]);
        fputs("], \"lora_name\": ", stdout);
        print_text(ev->lora_name);
        fputs(", \"cache_salt\": ", stdout);
        print_text(ev->cache_salt);
    }
    fputs("}\n", stdout);
}

static void show_finding(void *arg, enum fk_rule rule, const char *text)
{
    const struct show *s = arg;

    if (!s->o->json) {
        printf("%" PRIu64 " BROKEN %s: %s\n", s->seq, fk_rule_names[rule], text);
        return;
    }
    printf("{\"seq\": %" PRIu64 ", \"broken\": \"%s\", \"text\": ", s->seq, fk_rule_names[rule]);
    print_text((struct fk_text){ text, strlen(text) });
    fputs("}\n", stdout);
}

/* ---- summary ---- */

static const char *const tier_names[FK_MIRROR_TIERS] = { "device", "host", "disk", "external" };

static void summary_text(const struct show *s)
{
    const struct fk_check *c = &s->check;

    printf("%" PRIu64 " batches: %" PRIu64 " blocks stored, %" PRIu64 " removed, %" PRIu64
           " times cleared; %" PRIu64 " batches missed\n", c->batches, c->stored, c->removed,
           c->cleared, c->missed);
    for (size_t i = 0; i < c->ranks.len; i++) {
        const struct fk_check_rank *r = &c->ranks.data[i];
        if (r->has_rank)
            printf("rank %" PRId64 " has now:", r->rank);
        else
            fputs("now there are:", stdout);
        for (int t = 0; t < FK_MIRROR_TIERS; t++)
            printf(" %s %zu", tier_names[t], r->mirror.in_tier[t]);
        putchar('\n');
    }
    for (int i = 0; i < FK_RULES; i++)
        if (c->found[i])
            printf("rule %s: broken %" PRIu64 " times\n", fk_rule_names[i], c->found[i]);
    if (!fk_check_findings(c))
        puts("no rule is broken");
}

static void summary_json(const struct show *s)
{
    const struct fk_check *c = &s->check;
    json_t *root = json_object(), *broken = json_object(), *ranks = json_array();

    for (int i = 0; i < FK_RULES; i++)
        if (c->found[i])
            json_object_set_new(broken, fk_rule_names[i], json_integer((json_int_t)c->found[i]));
    for (size_t i = 0; i < c->ranks.len; i++) {
        const struct fk_check_rank *r = &c->ranks.data[i];
        json_t *o = json_object();
        json_object_set_new(o, "rank", r->has_rank ? json_integer(r->rank) : json_null());
        for (int t = 0; t < FK_MIRROR_TIERS; t++)
            json_object_set_new(o, tier_names[t], json_integer((json_int_t)r->mirror.in_tier[t]));
        json_array_append_new(ranks, o);
    }
    json_object_set_new(root, "batches", json_integer((json_int_t)c->batches));
    json_object_set_new(root, "stored", json_integer((json_int_t)c->stored));
    json_object_set_new(root, "removed", json_integer((json_int_t)c->removed));
    json_object_set_new(root, "cleared", json_integer((json_int_t)c->cleared));
    json_object_set_new(root, "missed", json_integer((json_int_t)c->missed));
    json_object_set_new(root, "blocks", ranks);
    json_object_set_new(root, "broken", broken);
    fputs("{\"summary\": ", stdout);
    json_dumpf(root, stdout, 0);
    fputs("}\n", stdout);
    json_decref(root);
}

/* ---- messages ---- */

static void show_message(struct show *s, const struct fk_frame *frames, size_t n)
{
    s->seq = n == 3 && frames[1].bytes == 8 ? fk_get_be64(frames[1].data) : 0;
    s->messages++;
    int rc = fk_check_message(&s->check, frames, n, &s->decoded);
    for (size_t i = 0; !rc && !s->o->quiet && i < s->decoded.events.len; i++) {
        if (s->o->json)
            show_event_json(s, &s->decoded.events.data[i]);
        else
            show_event(s, &s->decoded.events.data[i]);
    }
    s->failed |= rc == -ENOMEM || (fflush(stdout) && errno != EINTR);
}

static void record(struct show *s, const struct stream_message *m)
{
    if (!s->record || m->n > FK_RECORD_MAX_FRAMES)
        return;
    int rc = fk_record_write(s->record, &s->recording, fk_clock_us() - s->start_us, m->frame, m->n);
    if (!rc)
        return;
    fprintf(stderr, EVENTS_COMMAND ": %s: %s\n", s->o->record, strerror(-rc));
    fclose(s->record);
    s->record = NULL;
    s->failed = true;
}

static bool enough(const struct show *s)
{
    return s->failed || (s->o->count && s->messages >= s->o->count);
}

static int remaining_ms(const struct show *s)
{
    if (s->o->seconds <= 0)
        return -1;
    double left = s->o->seconds * 1000 - (double)(fk_clock_us() - s->start_us) / 1000;
    return left <= 0 ? 0 : (int)fk_min(left + 1, 1e9);
}

static void show_stream(struct show *s, struct stream *stream)
{
    struct stream_message m;
    int left;

    while (!enough(s) && (left = remaining_ms(s)) != 0) {
        while (!enough(s) && stream_next(stream, &m)) {
            record(s, &m);
            show_message(s, m.frame, fk_min(m.n, (size_t)STREAM_MAX_FRAMES));
            stream_done(stream, &m);
            if (events_wait(s->o, -1, 0) < 0)
                return;
        }
        if (!enough(s) && events_wait(s->o, stream_fd(stream), left) < 0)
            return;
    }
}

static int begin_recording(struct show *s)
{
    if (!s->o->record)
        return 0;
    s->record = fopen(s->o->record, "wbxe");
    if (s->record && !fk_record_begin(s->record))
        return 0;
    fprintf(stderr, EVENTS_COMMAND ": --record %s: %s\n", s->o->record, strerror(errno));
    return 1;
}

static int end_recording(struct show *s)
{
    if (!s->record || !fclose(s->record))
        return 0;
    fprintf(stderr, EVENTS_COMMAND ": --record %s: %s\n", s->o->record, strerror(errno));
    return 1;
}

static int show_live(struct show *s, const struct fk_zmq *zmq)
{
    struct stream stream;

    if (begin_recording(s))
        return 1;
    if (stream_open(&stream, zmq, EVENTS_COMMAND, s->o->endpoint, s->o->replay_endpoint, s->o->topic))
        return 1;
    show_stream(s, &stream);
    stream_close(&stream);
    return end_recording(s);
}

static int show_recording(struct show *s)
{
    FILE *in = fopen(s->o->play, "rbe");
    char why[160] = "";
    int rc = -1;

    if (in) {
        rc = fk_record_check_header(in, why, sizeof(why));
        while (!rc && !enough(s) && (rc = fk_record_read(in, &s->recording, why, sizeof(why))) == 1) {
            show_message(s, s->recording.frame, s->recording.n_frames);
            rc = 0;
        }
        fclose(in);
    }
    if (rc)
        fprintf(stderr, EVENTS_COMMAND ": %s: %s\n", s->o->play, in ? why : strerror(errno));
    return rc != 0;
}

int events_show(const struct events_options *o, const struct fk_zmq *zmq)
{
    struct show s = { .o = o, .start_us = fk_clock_us() };

    fk_check_init(&s.check, show_finding, &s);
    int rc = o->play ? show_recording(&s) : show_live(&s, zmq);
    if (o->json)
        summary_json(&s);
    else
        summary_text(&s);
    rc |= s.failed || fk_check_findings(&s.check) > 0;
    fk_check_free(&s.check);
    fk_stream_batch_free(&s.decoded);
    fk_record_free(&s.recording);
    return rc;
}
