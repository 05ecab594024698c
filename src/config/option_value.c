/*
 * option_value.c - what can be done with one row of the option table: find it by name,
 * read its value from text, write it as text. See option.h.
 *
 * Each type is a row of `value_types` below. Texts come from outside (environment, files,
 * callers): every byte is checked here, in fk_option_parse, for all of them. No state.
 */
#include "config/option.h"

#include <ctype.h>
#include <strings.h>

#include "base/util.h"

#define TEXT_MAX_BYTES 65536   /* of one value; NAMESPACES is the only long one */
#define NAMESPACES_MAX 4096

/* Names ----------------------------------------------------------------------------- */

const char *fk_option_name(const struct fk_option *opt, unsigned i, char buf[FK_OPTION_NAME_MAX])
{
    const char *p = opt->names;

    while (i-- > 0) {
        p = strchr(p, '|');
        if (!p)
            return NULL;
        p++;
    }
    snprintf(buf, FK_OPTION_NAME_MAX, "%.*s", (int)strcspn(p, "|"), p);
    return buf;
}

const char *fk_option_env(const struct fk_option *opt, unsigned i, char buf[FK_OPTION_NAME_MAX])
{
    char name[FK_OPTION_NAME_MAX];

    if (opt->env) {
        if (i == 0) {
            snprintf(buf, FK_OPTION_NAME_MAX, "%s", opt->env);
            return buf;
        }
        i--;
    }
    if (!fk_option_name(opt, i, name))
        return NULL;
    snprintf(buf, FK_OPTION_NAME_MAX, "FLEXKV_%.*s", FK_OPTION_NAME_MAX - 8, name);
    for (char *p = buf; *p; p++)
        *p = (char)toupper((unsigned char)*p);
    return buf;
}

const struct fk_option *fk_option_find(const char *key, unsigned *alias)
{
    size_t len = strlen(key);

    for (size_t i = 0; i < fk_option_count; i++) {
        const char *p = fk_options[i].names;
        for (*alias = 0; p; ++*alias) {
            if (strncmp(p, key, len) == 0 && (p[len] == '|' || p[len] == '\0'))
                return &fk_options[i];
            p = strchr(p, '|');
            if (p)
                p++;
        }
    }
    return NULL;
}

/* Levenshtein's distance; both at most FK_OPTION_NAME_MAX long. */
static unsigned edit_distance(const char *a, const char *b)
{
    unsigned row[FK_OPTION_NAME_MAX + 1];
    size_t len = strnlen(b, FK_OPTION_NAME_MAX);

    for (size_t j = 0; j <= len; j++)
        row[j] = (unsigned)j;
    for (size_t i = 0; i < FK_OPTION_NAME_MAX && a[i]; i++) {
        unsigned diagonal = row[0];
        row[0] = (unsigned)i + 1;
        for (size_t j = 0; j < len; j++) {
            unsigned swapped = diagonal + (a[i] != b[j]);
            unsigned added = fk_min(row[j], row[j + 1]) + 1;
            diagonal = row[j + 1];
            row[j + 1] = fk_min(swapped, added);
        }
    }
    return row[len];
}

const struct fk_option *fk_option_nearest(const char *key)
{
    const struct fk_option *best = NULL;
    char name[FK_OPTION_NAME_MAX];
    /* Further than half of its letters away, a suggestion is noise. */
    unsigned nearest = (unsigned)strnlen(key, FK_OPTION_NAME_MAX) / 2 + 1;

    for (size_t i = 0; i < fk_option_count; i++) {
        for (unsigned n = 0; fk_option_name(&fk_options[i], n, name); n++) {
            unsigned distance = edit_distance(key, name);
            if (distance < nearest) {
                nearest = distance;
                best = &fk_options[i];
            }
        }
    }
    return best;
}

/* Pieces of texts ------------------------------------------------------------------- */

/* The next piece of *text up to sep, without blanks around it; NULL at the end. */
static char *next_piece(char **text, char sep)
{
    char *start = *text, *end;

    if (!start)
        return NULL;
    end = strchr(start, sep);
    *text = end ? end + 1 : NULL;
    if (!end)
        end = start + strlen(start);
    while (end > start && isblank((unsigned char)end[-1]))
        end--;
    *end = '\0';
    return start + strspn(start, " \t");
}

/*
 * "12.5" and the rest behind it. Not strtod: that also takes nan, inf, hex and exponents,
 * and its decimal point is the locale's.
 */
static int parse_decimal(const char *text, long double *value, const char **rest)
{
    size_t whole = strspn(text, "0123456789"), fraction = 0;
    long double scale = 1;

    if (text[whole] == '.')
        fraction = strspn(text + whole + 1, "0123456789");
    if (whole + fraction == 0 || whole + fraction > 40)
        return -EINVAL;
    *value = 0;
    for (size_t i = 0; i < whole; i++)
        *value = *value * 10 + (text[i] - '0');
    for (size_t i = whole + 1; i < whole + 1 + fraction; i++)
        *value += (text[i] - '0') / (scale *= 10);
    *rest = text + whole + (text[whole] == '.') + fraction;
    return 0;
}

/* At most nine decimals, a point in every locale, no needless zeros. */
static void print_number(double value, FILE *out)
{
    char text[400];
    int len = snprintf(text, sizeof(text), "%.9f", value);

    text[len - 10] = '.';
    while (text[len - 1] == '0' && text[len - 2] != '.')
        text[--len] = '\0';
    fputs(text, out);
}

/* K, KB, KiB, ... (powers of 1024 all), or B; 0 when it is none of them. */
static uint64_t unit_bytes(const char *unit)
{
    static const char letters[] = "KMGTP";
    const char *letter = *unit ? strchr(letters, toupper((unsigned char)*unit)) : NULL;

    if (strcasecmp(unit, "B") == 0 || strcasecmp(unit, "bytes") == 0)
        return 1;
    if (!letter || (unit[1] && strcasecmp(unit + 1, "B") != 0 && strcasecmp(unit + 1, "iB") != 0))
        return 0;
    return FK_KIB << (10 * (letter - letters));
}

/* bare: what a number without unit counts; 0 if it needs one. */
static int parse_size(const char *text, uint64_t bare, uint64_t *bytes, const char **why)
{
    long double number;
    const char *unit;

    if (parse_decimal(text, &number, &unit)) {
        *why = *text == '-' ? "is negative" : "is not a size";
        return -EINVAL;
    }
    unit += strspn(unit, " \t");
    uint64_t factor = *unit ? unit_bytes(unit) : number == 0 ? 1 : bare;
    if (factor == 0) {
        *why = *unit ? "has an unknown unit" : "has no unit";
        return -EINVAL;
    }
    number *= factor;
    if (number > (long double)(INT64_C(1) << 62)) {
        *why = "is out of range";
        return -EINVAL;
    }
    *bytes = (uint64_t)number;
    return 0;
}

static int in_range(const struct fk_option *opt, long double value, const char **why)
{
    if (value >= opt->min && value <= opt->max)
        return 0;
    *why = "is out of range";
    return -EINVAL;
}

void fk_size_format(uint64_t bytes, FILE *out)
{
    static const char units[] = "BKMGTPE";
    int u = 0;

    if (bytes == 0) {
        fputc('0', out);
        return;
    }
    while (bytes % 1024 == 0 && u < 6) {
        bytes /= 1024;
        u++;
    }
    fprintf(out, "%llu%c", (unsigned long long)bytes, units[u]);
}

/* The number of the choice that text names, in any case; -1: none. */
static int find_choice(const char *choices, const char *text)
{
    size_t len = strlen(text);
    int n = 0;

    for (const char *p = choices; len > 0;) {
        size_t span = strcspn(p, "|=");
        if (span == len && strncasecmp(p, text, len) == 0)
            return n;
        if (p[span] == '\0')
            break;
        n += p[span] == '|';
        p += span + 1;
    }
    return -1;
}

/* The types ------------------------------------------------------------------------- */

static int parse_bool(const struct fk_option *opt, const char *text, void *field, const char **why)
{
    int n = find_choice("0=false=no=off|1=true=yes=on", text);

    if (n < 0) {
        *why = "is not a switch";
        return -EINVAL;
    }
    *(bool *)field = n;
    return 0;
}

static void format_bool(const struct fk_option *opt, const void *field, FILE *out)
{
    fputs(*(const bool *)field ? "1" : "0", out);
}

static int parse_int(const struct fk_option *opt, const char *text, void *field, const char **why)
{
    bool hex = text[0] == '0' && (text[1] == 'x' || text[1] == 'X');
    char *end;

    errno = 0;
    long long value = strtoll(text, &end, hex ? 16 : 10);   /* never octal: 010 is ten */
    if (end == text || *end) {
        *why = "is not a whole number";
        return -EINVAL;
    }
    if (errno == ERANGE || value < opt->min || value > opt->max) {
        *why = "is out of range";
        return -EINVAL;
    }
    *(int64_t *)field = value;
    return 0;
}

static void format_int(const struct fk_option *opt, const void *field, FILE *out)
{
    fprintf(out, "%lld", (long long)*(const int64_t *)field);
}

static int parse_float(const struct fk_option *opt, const char *text, void *field,
                       const char **why)
{
    bool negative = *text == '-';
    const char *rest;
    long double value;

    if (parse_decimal(text + negative, &value, &rest) || *rest) {
        *why = "is not a number";
        return -EINVAL;
    }
    if (in_range(opt, negative ? -value : value, why))
        return -EINVAL;
    *(double *)field = (double)(negative ? -value : value);
    return 0;
}

static void format_float(const struct fk_option *opt, const void *field, FILE *out)
{
    print_number(*(const double *)field, out);
}

static int parse_size_option(const struct fk_option *opt, const char *text, void *field,
                             const char **why)
{
    uint64_t bytes = 0;

    if ((opt->flags & FK_OPT_UNLIMITED) && strcmp(text, "-1") == 0) {
        *(uint64_t *)field = 0;
        return 0;
    }
    if (parse_size(text, unit_bytes(opt->unit), &bytes, why) || in_range(opt, bytes, why))
        return -EINVAL;
    if ((opt->flags & FK_OPT_POWER_OF_2) && (bytes & (bytes - 1))) {
        *why = "is not a power of two";
        return -EINVAL;
    }
    *(uint64_t *)field = bytes;
    return 0;
}

static void format_size_option(const struct fk_option *opt, const void *field, FILE *out)
{
    uint64_t bytes = *(const uint64_t *)field;

    if (bytes == 0 && (opt->flags & FK_OPT_UNLIMITED))
        fputs("-1", out);
    else
        fk_size_format(bytes, out);
}

static void release_string(void *field)
{
    free(*(char **)field);
    *(char **)field = NULL;
}

static int parse_string(const struct fk_option *opt, const char *text, void *field,
                        const char **why)
{
    char *copy = strdup(text);

    if (!copy)
        return -ENOMEM;
    release_string(field);
    *(char **)field = copy;
    return 0;
}

static void format_string(const struct fk_option *opt, const void *field, FILE *out)
{
    fputs(*(char *const *)field, out);
}

static void release_list(void *field)
{
    struct fk_string_list *list = field;

    for (size_t i = 0; i < list->count; i++)
        free(list->item[i]);
    free(list->item);
    memset(list, 0, sizeof(*list));
}

static int parse_list(const struct fk_option *opt, const char *text, void *field, const char **why)
{
    fk_autofree char *copy = strdup(text);
    struct fk_string_list list = {0};
    char *rest = copy, *piece;
    size_t most = 1;

    for (const char *p = text; *p; p++)
        most += *p == ';';
    list.item = calloc(most, sizeof(*list.item));
    if (!copy || !list.item)
        goto no_memory;
    while ((piece = next_piece(&rest, ';'))) {
        if (!*piece)
            continue;
        list.item[list.count] = strdup(piece);
        if (!list.item[list.count])
            goto no_memory;
        list.count++;
    }
    release_list(field);
    *(struct fk_string_list *)field = list;
    return 0;
no_memory:
    release_list(&list);
    return -ENOMEM;
}

static void format_list(const struct fk_option *opt, const void *field, FILE *out)
{
    const struct fk_string_list *list = field;

    for (size_t i = 0; i < list->count; i++)
        fprintf(out, "%s%s", i ? ";" : "", list->item[i]);
}

static int parse_enum(const struct fk_option *opt, const char *text, void *field, const char **why)
{
    int n = find_choice(opt->choices, text);

    if (n < 0) {
        *why = "is not one of the choices";
        return -EINVAL;
    }
    memcpy(field, &n, sizeof(n));
    return 0;
}

static void format_enum(const struct fk_option *opt, const void *field, FILE *out)
{
    const char *p = opt->choices;
    int n;

    memcpy(&n, field, sizeof(n));
    while (n-- > 0)
        p = strchr(p, '|') + 1;
    fprintf(out, "%.*s", (int)strcspn(p, "|="), p);
}

static void release_namespaces(void *field)
{
    struct fk_namespace_list *list = field;

    for (size_t i = 0; i < list->count; i++)
        free(list->item[i].name);
    free(list->item);
    memset(list, 0, sizeof(*list));
}

/* "50%" or "2G" */
static int parse_quota(const char *text, struct fk_quota *quota, const char **why)
{
    long double number;
    const char *rest;

    if (quota->kind != FK_QUOTA_NONE) {
        *why = "states a quota twice";
        return -EINVAL;
    }
    if (parse_decimal(text, &number, &rest) == 0 && strcmp(rest, "%") == 0) {
        if (number > 100) {
            *why = "has a share above 100%";
            return -EINVAL;
        }
        *quota = (struct fk_quota){.kind = FK_QUOTA_FRACTION, .fraction = (double)(number / 100)};
        return 0;
    }
    quota->kind = FK_QUOTA_BYTES;
    return parse_size(text, 0, &quota->bytes, why);
}

/* "max=50%,guaranteed=10%" */
static int parse_quotas(char *text, struct fk_namespace_quota *ns, const char **why)
{
    char *piece;

    while ((piece = next_piece(&text, ','))) {
        if (!*piece)
            continue;
        char *value = piece, *key = next_piece(&value, '=');
        if (strcmp(key, "shared") == 0 && value) {
            bool on;
            if (parse_bool(NULL, next_piece(&value, '='), &on, why)) {
                *why = "has a value of shared that is not yes or no";
                return -EINVAL;
            }
            ns->unshared = !on;
            continue;
        }
        struct fk_quota *quota = strcmp(key, "max") == 0          ? &ns->max
                                 : strcmp(key, "guaranteed") == 0 ? &ns->guaranteed
                                                                  : NULL;
        if (!quota || !value) {
            *why = "has something other than max=..., guaranteed=... and shared=...";
            return -EINVAL;
        }
        if (parse_quota(next_piece(&value, '='), quota, why))
            return -EINVAL;
    }
    if (ns->max.kind == ns->guaranteed.kind &&
        (ns->guaranteed.bytes > ns->max.bytes || ns->guaranteed.fraction > ns->max.fraction)) {
        *why = "guarantees a namespace more than its maximum";
        return -EINVAL;
    }
    return 0;
}

static int parse_namespace(char *piece, struct fk_namespace_list *list, const char **why)
{
    char *quotas = piece, *name = next_piece(&quotas, ':');
    struct fk_namespace_quota *ns = &list->item[list->count];

    if (!quotas || !*name) {
        *why = "is not of the form name:max=...,guaranteed=...";
        return -EINVAL;
    }
    for (size_t i = 0; i < list->count; i++) {
        if (strcmp(list->item[i].name, name) == 0) {
            *why = "names a namespace twice";
            return -EINVAL;
        }
    }
    ns->name = strdup(name);
    if (!ns->name)
        return -ENOMEM;
    list->count++;
    return parse_quotas(quotas, ns, why);
}

/* "a:max=50%,guaranteed=10%;b:max=2G" */
static int parse_namespaces(const struct fk_option *opt, const char *text, void *field,
                            const char **why)
{
    fk_autofree char *copy = strdup(text);
    struct fk_namespace_list list = {0};
    double guaranteed = 0;
    size_t most = 1;
    char *rest = copy, *piece;
    int rc = 0;

    for (const char *p = text; *p; p++)
        most += *p == ';';
    if (most > NAMESPACES_MAX) {
        *why = "has too many namespaces";
        return -EINVAL;
    }
    list.item = calloc(most, sizeof(*list.item));
    if (!copy || !list.item)
        rc = -ENOMEM;
    while (rc == 0 && (piece = next_piece(&rest, ';')))
        rc = *piece ? parse_namespace(piece, &list, why) : 0;
    for (size_t i = 0; i < list.count; i++)
        guaranteed += list.item[i].guaranteed.fraction;
    if (rc == 0 && guaranteed > 1 + 1e-9) {
        *why = "guarantees more than 100% in all";
        rc = -EINVAL;
    }
    release_namespaces(rc ? &list : field);
    if (rc == 0)
        *(struct fk_namespace_list *)field = list;
    return rc;
}

static void format_quota(const char *key, const struct fk_quota *quota, const char **sep, FILE *out)
{
    if (quota->kind == FK_QUOTA_NONE)
        return;
    fprintf(out, "%s%s=", *sep, key);
    *sep = ",";
    if (quota->kind == FK_QUOTA_BYTES) {
        fk_size_format(quota->bytes, out);
    } else {
        print_number(quota->fraction * 100, out);
        fputc('%', out);
    }
}

static void format_namespaces(const struct fk_option *opt, const void *field, FILE *out)
{
    const struct fk_namespace_list *list = field;

    for (size_t i = 0; i < list->count; i++) {
        const char *sep = "";
        fprintf(out, "%s%s:", i ? ";" : "", list->item[i].name);
        format_quota("max", &list->item[i].max, &sep, out);
        format_quota("guaranteed", &list->item[i].guaranteed, &sep, out);
        if (list->item[i].unshared)
            fprintf(out, "%sshared=no", sep);
    }
}

static const struct value_type {
    const char *name;
    int (*parse)(const struct fk_option *, const char *text, void *field, const char **why);
    void (*format)(const struct fk_option *, const void *field, FILE *out);
    void (*release)(void *field);
} value_types[] = {
    [FK_OPT_BOOL] = { "switch", parse_bool, format_bool, NULL },
    [FK_OPT_INT] = { "integer", parse_int, format_int, NULL },
    [FK_OPT_FLOAT] = { "number", parse_float, format_float, NULL },
    [FK_OPT_SIZE] = { "size", parse_size_option, format_size_option, NULL },
    [FK_OPT_STRING] = { "text", parse_string, format_string, release_string },
    [FK_OPT_LIST] = { "list", parse_list, format_list, release_list },
    [FK_OPT_ENUM] = { "choice", parse_enum, format_enum, NULL },
    [FK_OPT_NAMESPACES] = { "quotas", parse_namespaces, format_namespaces, release_namespaces },
};

/* What every text has to be, whatever its type: not too long, printable, UTF-8. */
static const char *text_fault(const char *text)
{
    if (strnlen(text, TEXT_MAX_BYTES) == TEXT_MAX_BYTES)
        return "is too long";
    for (const char *p = text; *p; p++) {
        if ((unsigned char)*p < 0x20 || *p == 0x7f)
            return "has a control character";
    }
    return fk_utf8_valid(text, strlen(text)) ? NULL : "is not UTF-8";
}

/* Bytes that follow a first byte of UTF-8; -1: it is none. */
static int utf8_more(unsigned char first)
{
    if (first < 0x80)
        return 0;
    if (first < 0xc2 || first > 0xf4)
        return -1;
    return first < 0xe0 ? 1 : first < 0xf0 ? 2 : 3;
}

bool fk_utf8_valid(const char *text, size_t len)
{
    const unsigned char *p = (const unsigned char *)text, *end = p + len;

    while (p < end) {
        int more = utf8_more(*p);
        if (more < 0 || end - p <= more)
            return false;
        /* overlong forms, surrogates, and what lies past U+10FFFF */
        if ((*p == 0xe0 && p[1] < 0xa0) || (*p == 0xed && p[1] > 0x9f) ||
            (*p == 0xf0 && p[1] < 0x90) || (*p == 0xf4 && p[1] > 0x8f))
            return false;
        for (p++; more > 0; more--, p++) {
            if ((*p & 0xc0) != 0x80)
                return false;
        }
    }
    return true;
}

int fk_option_parse(const struct fk_option *opt, struct fk_settings *s, const char *text,
                    const char **why)
{
    const struct value_type *type = &value_types[opt->type];

    *why = text_fault(text);
    if (*why)
        return -EINVAL;
    if (opt->status == FK_OPT_IGNORED)
        return 0;
    return type->parse(opt, text, (char *)s + opt->offset, why);
}

void fk_option_format(const struct fk_option *opt, const struct fk_settings *s, FILE *out)
{
    if (opt->status != FK_OPT_IGNORED)
        value_types[opt->type].format(opt, (const char *)s + opt->offset, out);
}

void fk_option_release(const struct fk_option *opt, struct fk_settings *s)
{
    if (opt->status != FK_OPT_IGNORED && value_types[opt->type].release)
        value_types[opt->type].release((char *)s + opt->offset);
}

static void print_choices(const struct fk_option *opt, FILE *out)
{
    fputs("one of ", out);
    for (const char *p = opt->choices; *p; p += *p == '|') {
        fprintf(out, "%s%.*s", p == opt->choices ? "" : ", ", (int)strcspn(p, "|="), p);
        p += strcspn(p, "|");
    }
}

static void print_size_range(const struct fk_option *opt, FILE *out)
{
    fprintf(out, "size in %s, or with a unit as in 512M, 2G; ", opt->unit);
    fk_size_format((uint64_t)opt->min, out);
    fputs(" to ", out);
    fk_size_format((uint64_t)opt->max, out);
    fputs(opt->flags & FK_OPT_UNLIMITED ? ", or -1" : "", out);
    fputs(opt->flags & FK_OPT_POWER_OF_2 ? ", a power of two" : "", out);
}

void fk_option_print_allowed(const struct fk_option *opt, FILE *out)
{
    switch (opt->status == FK_OPT_IGNORED ? FK_OPT_STRING : opt->type) {
    case FK_OPT_ENUM:
        print_choices(opt, out);
        break;
    case FK_OPT_SIZE:
        print_size_range(opt, out);
        break;
    case FK_OPT_INT:
    case FK_OPT_FLOAT:
        fprintf(out, "%s", value_types[opt->type].name);
        if (opt->unit)
            fprintf(out, " (%s)", opt->unit);
        fprintf(out, ", %lld to %lld", (long long)opt->min, (long long)opt->max);
        break;
    case FK_OPT_BOOL:
        fputs("0 or 1 (also false/true, no/yes, off/on)", out);
        break;
    case FK_OPT_LIST:
        fputs("texts, separated by ;", out);
        break;
    case FK_OPT_NAMESPACES:
        fputs("name:max=QUOTA,guaranteed=QUOTA;... where QUOTA is as 50% or 2G", out);
        break;
    default:
        fputs(value_types[opt->type].name, out);
    }
}
