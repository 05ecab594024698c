/* trace_line.c - see trace_line.h. A cursor over the line; each function reads one thing of
 * the JSON grammar and leaves the cursor behind it, or sets why and returns false. */
#include "trace_line.h"

#include <ctype.h>
#include <math.h>

#define MAX_DEPTH 32
#define MAX_TIMESTAMP_MS 9007199254740992.0     /* 2^53 */
#define MAX_ID (1ull << 63)
#define MAX_TOKENS (1ull << 40)

struct cursor {
    const char *start, *p, *end;
    const char *why;
    int rc;
};

static bool fail(struct cursor *c, const char *why)
{
    if (!c->why)
        c->why = why;
    c->rc = -EINVAL;
    return false;
}

static void skip_space(struct cursor *c)
{
    while (c->p < c->end && (*c->p == ' ' || *c->p == '\t' || *c->p == '\r' || *c->p == '\n'))
        c->p++;
}

static bool next_is(struct cursor *c, char ch)
{
    skip_space(c);
    return c->p < c->end && *c->p == ch;
}

static bool take(struct cursor *c, char ch)
{
    if (!next_is(c, ch))
        return false;
    c->p++;
    return true;
}

static bool at_digit(const struct cursor *c)
{
    return c->p < c->end && isdigit((unsigned char)*c->p);
}

/* A string; *text and *len are what stands between the quotes, escapes as they are. */
static bool scan_string(struct cursor *c, const char **text, size_t *len)
{
    if (!take(c, '"'))
        return fail(c, "expected a string in double quotes");
    const char *start = c->p;
    for (; c->p < c->end; c->p++) {
        unsigned char ch = (unsigned char)*c->p;
        if (ch == '"') {
            *text = start;
            *len = (size_t)(c->p++ - start);
            return true;
        }
        if (ch < 0x20)
            return fail(c, "control character in a string");
        if (ch == '\\' && ++c->p < c->end && !strchr("\"\\/bfnrtu", *c->p))
            return fail(c, "bad escape in a string");
    }
    return fail(c, "string without its end");
}

static bool scan_digits(struct cursor *c)
{
    if (!at_digit(c))
        return fail(c, "expected a digit");
    while (at_digit(c))
        c->p++;
    return true;
}

/* A number by JSON's grammar: no NaN, no Infinity, no hex, no leading zeros. */
static bool scan_number(struct cursor *c)
{
    skip_space(c);
    if (c->p < c->end && *c->p == '-')
        c->p++;
    if (c->p + 1 < c->end && c->p[0] == '0' && isdigit((unsigned char)c->p[1]))
        return fail(c, "number with a leading zero");
    if (!at_digit(c))
        return fail(c, "expected a number");
    while (at_digit(c))
        c->p++;
    if (c->p < c->end && *c->p == '.') {
        c->p++;
        if (!scan_digits(c))
            return false;
    }
    if (c->p < c->end && (*c->p == 'e' || *c->p == 'E')) {
        c->p++;
        if (c->p < c->end && (*c->p == '+' || *c->p == '-'))
            c->p++;
        return scan_digits(c);
    }
    return true;
}

static bool scan_word(struct cursor *c, const char *word)
{
    size_t n = strlen(word);

    if ((size_t)(c->end - c->p) < n || memcmp(c->p, word, n))
        return fail(c, "expected a JSON value (NaN and Infinity are none)");
    c->p += n;
    return true;
}

static bool skip_value(struct cursor *c, int depth);

static bool skip_members(struct cursor *c, char close, int depth)
{
    const char *text;
    size_t len;

    if (depth >= MAX_DEPTH)
        return fail(c, "nested too deep");
    c->p++;
    if (take(c, close))
        return true;
    do {
        if (close == '}' && (!scan_string(c, &text, &len) ||
                             (!take(c, ':') && !fail(c, "expected ':'"))))
            return false;
        if (!skip_value(c, depth + 1))
            return false;
    } while (take(c, ','));
    return take(c, close) || fail(c, "expected ',' or the end of the list");
}

static bool skip_value(struct cursor *c, int depth)
{
    const char *text;
    size_t len;

    skip_space(c);
    switch (c->p < c->end ? *c->p : 0) {
    case '{': return skip_members(c, '}', depth);
    case '[': return skip_members(c, ']', depth);
    case '"': return scan_string(c, &text, &len);
    case 't': return scan_word(c, "true");
    case 'f': return scan_word(c, "false");
    case 'n': return scan_word(c, "null");
    case '-': case '0': case '1': case '2': case '3': case '4':
    case '5': case '6': case '7': case '8': case '9':
        return scan_number(c);
    default:
        return fail(c, "expected a JSON value (NaN and Infinity are none)");
    }
}

/* A whole number from 0 to max. */
static bool scan_whole(struct cursor *c, uint64_t max, uint64_t *out)
{
    uint64_t v = 0;

    skip_space(c);
    if (c->p < c->end && *c->p == '-')
        return fail(c, "negative number");
    if (!at_digit(c))
        return fail(c, "expected a whole number");
    const char *start = c->p;
    for (; at_digit(c); c->p++) {
        unsigned d = (unsigned)(*c->p - '0');
        if (v > (UINT64_MAX - d) / 10)
            return fail(c, "number too large");
        v = v * 10 + d;
    }
    if (c->p - start > 1 && *start == '0')
        return fail(c, "number with a leading zero");
    if (c->p < c->end && (*c->p == '.' || *c->p == 'e' || *c->p == 'E'))
        return fail(c, "expected a whole number");
    if (v > max)
        return fail(c, "number too large");
    *out = v;
    return true;
}

static bool scan_timestamp(struct cursor *c, double *out)
{
    char copy[64];

    skip_space(c);
    const char *start = c->p;
    if (!scan_number(c))
        return false;
    size_t len = (size_t)(c->p - start);
    if (len >= sizeof(copy))
        return fail(c, "timestamp with too many digits");
    memcpy(copy, start, len);
    copy[len] = 0;
    *out = strtod(copy, NULL);
    if (!isfinite(*out) || *out > MAX_TIMESTAMP_MS)
        return fail(c, "timestamp too large");
    if (*out < 0)
        return fail(c, "negative timestamp");
    return true;
}

static bool scan_ids(struct cursor *c, struct trace_line *line)
{
    if (!take(c, '['))
        return fail(c, "hash_ids must be a list");
    if (take(c, ']'))
        return true;
    do {
        uint64_t id;
        if (!scan_whole(c, MAX_ID, &id))
            return false;
        if (fk_vec_push(&line->ids, id)) {
            c->why = "out of memory";
            c->rc = -ENOMEM;
            return false;
        }
    } while (take(c, ','));
    return take(c, ']') || fail(c, "expected ',' or ']' in hash_ids");
}

enum { FIELD_TIMESTAMP, FIELD_INPUT, FIELD_OUTPUT, FIELD_IDS, FIELDS };

static const struct { const char *name, *missing, *twice; } fields[FIELDS] = {
    [FIELD_TIMESTAMP] = { "timestamp", "no \"timestamp\"", "\"timestamp\" twice" },
    [FIELD_INPUT] = { "input_length", "no \"input_length\"", "\"input_length\" twice" },
    [FIELD_OUTPUT] = { "output_length", NULL, "\"output_length\" twice" },
    [FIELD_IDS] = { "hash_ids", "no \"hash_ids\"", "\"hash_ids\" twice" },
};

static int field_find(const char *name, size_t len)
{
    for (int i = 0; i < FIELDS; i++)
        if (strlen(fields[i].name) == len && !memcmp(fields[i].name, name, len))
            return i;
    return FIELDS;
}

static bool scan_field(struct cursor *c, struct trace_line *line, bool *seen)
{
    const char *name;
    size_t len;

    if (!scan_string(c, &name, &len))
        return false;
    if (!take(c, ':'))
        return fail(c, "expected ':'");
    int field = field_find(name, len);
    if (field == FIELDS)
        return skip_value(c, 1);
    if (seen[field])
        return fail(c, fields[field].twice);
    seen[field] = true;
    switch (field) {
    case FIELD_TIMESTAMP: return scan_timestamp(c, &line->timestamp_ms);
    case FIELD_INPUT: return scan_whole(c, MAX_TOKENS, &line->input_tokens);
    case FIELD_OUTPUT: return scan_whole(c, MAX_TOKENS, &line->output_tokens);
    default: return scan_ids(c, line);
    }
}

static bool scan_object(struct cursor *c, struct trace_line *line)
{
    bool seen[FIELDS] = { false };

    if (!take(c, '{'))
        return fail(c, "a line must be a JSON object");
    if (!take(c, '}')) {
        do {
            if (!scan_field(c, line, seen))
                return false;
        } while (take(c, ','));
        if (!take(c, '}'))
            return fail(c, "expected ',' or '}'");
    }
    skip_space(c);
    if (c->p != c->end)
        return fail(c, "something follows the object");
    for (int i = 0; i < FIELDS; i++)
        if (!seen[i] && fields[i].missing)
            return fail(c, fields[i].missing);
    return true;
}

int trace_line_parse(const char *text, size_t len, struct trace_line *out, const char **why,
                     size_t *at)
{
    struct cursor c = { .start = text, .p = text, .end = text + len };

    out->timestamp_ms = 0;
    out->input_tokens = out->output_tokens = 0;
    out->ids.len = 0;
    if (scan_object(&c, out))
        return 0;
    *why = c.why;
    *at = (size_t)(c.p - c.start);
    return c.rc;
}
