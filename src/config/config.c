/*
 * config.c - collects the values of all options from their sources. See config.h.
 *
 * One way in for every value: fk_config_assign. Files are read by config_file.c, texts by
 * option_value.c. Notes for the log are kept until fk_config_finish, because only then is
 * the log level known that decides whether they are shown.
 */
#include "config/config.h"

#include <ctype.h>
#include <stdarg.h>

#include "base/util.h"

#define UNKNOWN_MAX 50

extern char **environ;

struct fk_option_state {
    enum fk_source_kind kind;
    unsigned line;
    char *where;
    char *given;            /* ignored options: the text */
    unsigned seen_load;     /* the load that gave it last, by which name, in which line */
    unsigned seen_alias;
    unsigned seen_line;
};

struct fk_config_note {
    struct fk_config_note *next;
    enum fk_log_level level;
    char text[];
};

static struct fk_option_state *state_of(const struct fk_config *cfg, const struct fk_option *opt)
{
    return &cfg->state[opt - fk_options];
}

int fk_config_fail(struct fk_config *cfg, int rc, const char *fmt, ...)
{
    va_list ap;

    free(cfg->error);
    va_start(ap, fmt);
    if (vasprintf(&cfg->error, fmt, ap) < 0)
        cfg->error = NULL;
    va_end(ap);
    return rc;
}

const char *fk_config_error(const struct fk_config *cfg)
{
    return cfg->error ? cfg->error : "";
}

__attribute__((format(printf, 3, 4)))
static void note(struct fk_config *cfg, enum fk_log_level level, const char *fmt, ...)
{
    char text[768];
    va_list ap;

    va_start(ap, fmt);
    vsnprintf(text, sizeof(text), fmt, ap);
    va_end(ap);
    struct fk_config_note *n = malloc(sizeof(*n) + strlen(text) + 1);
    if (!n)
        return;   /* a line less in the log */
    strcpy(n->text, text);
    n->level = level;
    n->next = cfg->notes;
    cfg->notes = n;
}

const char *fk_config_shown(const char *text, char buf[80])
{
    size_t len = strnlen(text, 70);

    for (size_t i = 0; i < len; i++)
        buf[i] = (unsigned char)text[i] < 0x20 || text[i] == 0x7f ? '?' : text[i];
    /* never half a character at the cut */
    while (text[len] && len > 0 && ((unsigned char)text[len] & 0xc0) == 0x80)
        len--;
    strcpy(buf + len, text[len] ? "..." : "");
    return buf;
}

/* Life ------------------------------------------------------------------------------ */

int fk_config_create(struct fk_config **out)
{
    struct fk_config *cfg = calloc(1, sizeof(*cfg));
    const char *why;
    int rc = 0;

    if (cfg)
        cfg->state = calloc(fk_option_count, sizeof(*cfg->state));
    if (!cfg || !cfg->state)
        rc = -ENOMEM;
    for (size_t i = 0; rc == 0 && i < fk_option_count; i++)
        rc = fk_option_parse(&fk_options[i], &cfg->settings, fk_options[i].def, &why);
    if (rc) {
        fk_config_destroy(cfg);
        return rc;
    }
    *out = cfg;
    return 0;
}

static void drop_notes(struct fk_config *cfg)
{
    while (cfg->notes) {
        struct fk_config_note *n = cfg->notes;
        cfg->notes = n->next;
        free(n);
    }
}

void fk_config_destroy(struct fk_config *cfg)
{
    if (!cfg)
        return;
    for (size_t i = 0; cfg->state && i < fk_option_count; i++) {
        fk_option_release(&fk_options[i], &cfg->settings);
        free(cfg->state[i].where);
        free(cfg->state[i].given);
    }
    drop_notes(cfg);
    free(cfg->state);
    free(cfg->error);
    free(cfg);
}

/* Sources --------------------------------------------------------------------------- */

void fk_source_format(const struct fk_source *source, char *buf, size_t size)
{
    switch (source->kind) {
    case FK_SOURCE_DEFAULT:
        snprintf(buf, size, "default");
        break;
    case FK_SOURCE_ENV:
        snprintf(buf, size, "environment %s", source->where);
        break;
    case FK_SOURCE_FILE:
        snprintf(buf, size, "%s:%u", source->where, source->line);
        break;
    case FK_SOURCE_SET:
        snprintf(buf, size, "%s", source->where);
        break;
    }
}

struct fk_source fk_config_source(const struct fk_config *cfg, const struct fk_option *opt)
{
    const struct fk_option_state *st = state_of(cfg, opt);

    return (struct fk_source){.kind = st->kind, .where = st->where, .line = st->line};
}

const char *fk_config_ignored_text(const struct fk_config *cfg, const struct fk_option *opt)
{
    const char *given = state_of(cfg, opt)->given;

    return given ? given : opt->def;
}

/* Takes a copy of source; source may be the state's own. */
static int set_source(struct fk_option_state *st, const struct fk_source *source)
{
    char *where = strdup(source->where ? source->where : "");

    if (!where)
        return -ENOMEM;
    free(st->where);
    *st = (struct fk_option_state){
        .kind = source->kind, .line = source->line, .where = where, .given = st->given,
        .seen_load = st->seen_load, .seen_alias = st->seen_alias, .seen_line = st->seen_line,
    };
    return 0;
}

static int fail_value(struct fk_config *cfg, const struct fk_option *opt, const char *text,
                      const struct fk_source *source, const char *why)
{
    fk_autofree char *allowed = NULL;
    size_t allowed_len = 0;
    char where[512], key[FK_OPTION_NAME_MAX], shown[80];
    FILE *out = open_memstream(&allowed, &allowed_len);

    if (out) {
        fk_option_print_allowed(opt, out);
        fclose(out);
    }
    fk_source_format(source, where, sizeof(where));
    return fk_config_fail(cfg, -EINVAL, "%s: %s \"%s\" %s; allowed: %s", where,
                          fk_option_name(opt, 0, key),
                          opt->flags & FK_OPT_SECRET ? "***" : fk_config_shown(text, shown), why,
                          allowed ? allowed : "(out of memory)");
}

/*
 * The same option once more in one load: 1 when an earlier spelling of it counts, 0 when
 * this one does, an error when both have the same name.
 */
static int check_seen(struct fk_config *cfg, const struct fk_option *opt, unsigned alias,
                      const struct fk_source *source)
{
    struct fk_option_state *st = state_of(cfg, opt);
    char where[512], name[FK_OPTION_NAME_MAX], other[FK_OPTION_NAME_MAX];
    unsigned before = st->seen_alias;

    if (st->seen_load == cfg->load) {
        fk_source_format(source, where, sizeof(where));
        if (alias == before)
            return fk_config_fail(cfg, -EINVAL, "%s: %s is given twice, also in line %u", where,
                                  fk_option_name(opt, alias, name), st->seen_line);
        const char *(*name_of)(const struct fk_option *, unsigned, char *) =
            source->kind == FK_SOURCE_ENV ? fk_option_env : fk_option_name;
        note(cfg, FK_LOG_INFO, "%s: %s and %s mean the same option; %s counts", where,
             name_of(opt, alias, name), name_of(opt, before, other), alias < before ? name : other);
        if (alias > before)
            return 1;
    }
    st->seen_load = cfg->load;
    st->seen_alias = alias;
    st->seen_line = source->line;
    return 0;
}

/* Whether an empty text is a value, and not just "not given" as in FLEXKV_X= */
static bool empty_is_value(const struct fk_option *opt)
{
    return opt->type == FK_OPT_STRING || opt->type == FK_OPT_LIST || opt->type == FK_OPT_NAMESPACES;
}

int fk_config_assign(struct fk_config *cfg, const struct fk_option *opt, unsigned alias,
                     const char *text, const struct fk_source *source)
{
    struct fk_option_state *st = state_of(cfg, opt);
    const char *why = NULL;
    char *given = NULL;

    if (!*text && !empty_is_value(opt))
        return 0;
    int rc = check_seen(cfg, opt, alias, source);
    if (rc)
        return rc < 0 ? rc : 0;
    if (source->kind < st->kind)
        return 0;
    rc = fk_option_parse(opt, &cfg->settings, text, &why);
    if (rc == -EINVAL)
        return fail_value(cfg, opt, text, source, why);
    if (rc == 0 && opt->status == FK_OPT_IGNORED) {
        given = strdup(text);
        rc = given ? 0 : -ENOMEM;
    }
    if (rc == 0)
        rc = set_source(st, source);
    if (rc) {
        free(given);
        return fk_config_fail(cfg, rc, "out of memory");
    }
    free(st->given);
    st->given = given;
    return 0;
}

/* "name is unknown; did you mean ...", in the spelling of the source */
static void describe_unknown(const char *name, bool env, const struct fk_source *source,
                             char *buf, size_t size)
{
    char key[FK_OPTION_NAME_MAX], near[FK_OPTION_NAME_MAX], shown[80], where[512];
    const char *bare = env ? name + strlen("FLEXKV_") : name;

    snprintf(key, sizeof(key), "%s", bare);
    for (char *p = key; *p; p++)
        *p = (char)tolower((unsigned char)*p);
    const struct fk_option *opt = fk_option_nearest(key);
    const char *suggestion = !opt ? NULL
                             : env ? fk_option_env(opt, 0, near) : fk_option_name(opt, 0, near);
    fk_source_format(source, where, sizeof(where));
    snprintf(buf, size, "%s: unknown option %s%s%s%s", where, fk_config_shown(name, shown),
             suggestion ? "; did you mean " : "", suggestion ? suggestion : "",
             suggestion ? "?" : "");
}

void fk_config_note_unknown(struct fk_config *cfg, const char *name,
                            const struct fk_source *source)
{
    char text[768];

    /* A file of another program must not flood the log, nor cost seconds of comparing. */
    if (cfg->unknown_names++ >= UNKNOWN_MAX) {
        if (cfg->unknown_names == UNKNOWN_MAX + 1)
            note(cfg, FK_LOG_WARNING, "further unknown options are not listed");
        return;
    }
    describe_unknown(name, source->kind == FK_SOURCE_ENV, source, text, sizeof(text));
    note(cfg, FK_LOG_WARNING, "%s", text);
}

int fk_config_set(struct fk_config *cfg, const char *key, const char *value, const char *source)
{
    struct fk_source src = {.kind = FK_SOURCE_SET, .where = source};
    const struct fk_option *opt;
    unsigned alias;
    char text[768];

    opt = fk_option_find(key, &alias);
    if (!opt) {
        describe_unknown(key, false, &src, text, sizeof(text));
        return fk_config_fail(cfg, -ENOENT, "%s", text);
    }
    cfg->load++;
    return fk_config_assign(cfg, opt, alias, value, &src);
}

/* Environment ----------------------------------------------------------------------- */

static int load_variables(struct fk_config *cfg, const struct fk_option *opt)
{
    char name[FK_OPTION_NAME_MAX];

    for (unsigned i = 0; fk_option_env(opt, i, name); i++) {
        const char *value = getenv(name);
        if (!value)
            continue;
        struct fk_source source = {.kind = FK_SOURCE_ENV, .where = name};
        /* config_path is the first row, so it is known by now whatever its source */
        if ((opt->flags & FK_OPT_BASIC) && *cfg->settings.config_path) {
            note(cfg, FK_LOG_INFO, "%s is not read: the configuration file %s counts", name,
                 cfg->settings.config_path);
            continue;
        }
        int rc = fk_config_assign(cfg, opt, i, value, &source);
        if (rc)
            return rc;
    }
    return 0;
}

static bool is_known_variable(const char *variable)
{
    char name[FK_OPTION_NAME_MAX];

    for (size_t i = 0; i < fk_option_count; i++) {
        for (unsigned n = 0; fk_option_env(&fk_options[i], n, name); n++) {
            if (strcmp(name, variable) == 0)
                return true;
        }
    }
    return false;
}

int fk_config_load_env(struct fk_config *cfg)
{
    static const char prefix[] = "FLEXKV_";
    int rc = 0;

    cfg->load++;
    for (size_t i = 0; rc == 0 && i < fk_option_count; i++)
        rc = load_variables(cfg, &fk_options[i]);
    for (char **e = environ; rc == 0 && *e; e++) {
        char name[FK_OPTION_NAME_MAX + 16];
        if (strncmp(*e, prefix, strlen(prefix)) != 0)
            continue;
        snprintf(name, sizeof(name), "%.*s", (int)strcspn(*e, "="), *e);
        struct fk_source source = {.kind = FK_SOURCE_ENV, .where = "variables"};
        if (!is_known_variable(name))
            fk_config_note_unknown(cfg, name, &source);
    }
    return rc;
}

int fk_config_load_usual(struct fk_config *cfg)
{
    int rc = fk_config_load_env(cfg);

    if (rc == 0 && *cfg->settings.config_path)
        rc = fk_config_load_file(cfg, cfg->settings.config_path);
    return rc;
}

int fk_config_load_default(struct fk_config *cfg)
{
    int rc = fk_config_load_usual(cfg);

    return rc ? rc : fk_config_finish(cfg);
}

/* Finish ---------------------------------------------------------------------------- */

/* The row of a field; there is one for every field that is named below. */
static const struct fk_option *option_at(size_t offset)
{
    for (size_t i = 0;; i++) {
        if (fk_options[i].offset == offset && fk_options[i].status != FK_OPT_IGNORED)
            return &fk_options[i];
    }
}
#define OPTION(field) option_at(offsetof(struct fk_settings, field))

/* Gives an option the value that follows from another one, and that one's source. */
static int derive(struct fk_config *cfg, const struct fk_option *opt, const char *text,
                  const struct fk_option *from)
{
    struct fk_source source = fk_config_source(cfg, from);
    const char *why;
    int rc = fk_option_parse(opt, &cfg->settings, text, &why);

    return rc ? rc : set_source(state_of(cfg, opt), &source);
}

static int derive_all(struct fk_config *cfg)
{
    const struct fk_settings *s = &cfg->settings;
    int rc = 0;

    if (!s->enable_ssd) {
        rc = derive(cfg, OPTION(ssd_cache_bytes), "0", OPTION(enable_ssd));
        if (rc == 0)
            rc = derive(cfg, OPTION(ssd_cache_blocks), "0", OPTION(enable_ssd));
    }
    if (rc == 0 && s->use_hugepage_cpu_buffer &&
        state_of(cfg, OPTION(cpu_memory))->kind == FK_SOURCE_DEFAULT)
        rc = derive(cfg, OPTION(cpu_memory), "hugetlb", OPTION(use_hugepage_cpu_buffer));
    if (rc == 0 && s->dynamo_use_flexkv)
        rc = derive(cfg, OPTION(enable_kv_events), "1", OPTION(dynamo_use_flexkv));
    if (rc == 0 && *s->kv_events_endpoint)
        rc = derive(cfg, OPTION(enable_kv_events), "1", OPTION(kv_events_endpoint));
    return rc ? fk_config_fail(cfg, rc, "out of memory") : 0;
}

/* An error about one option in the light of another. */
static int fail_across(struct fk_config *cfg, const struct fk_option *opt, const char *why)
{
    struct fk_source source = fk_config_source(cfg, opt);
    char where[512], key[FK_OPTION_NAME_MAX];

    fk_source_format(&source, where, sizeof(where));
    return fk_config_fail(cfg, -EINVAL, "%s: %s %s", where, fk_option_name(opt, 0, key), why);
}

static int check_all(struct fk_config *cfg)
{
    const struct fk_settings *s = &cfg->settings;
    bool ssd = s->ssd_cache_bytes > 0 || s->ssd_cache_blocks > 0;

    if (ssd && s->ssd_cache_dir.count == 0)
        return fail_across(cfg, OPTION(ssd_cache_dir),
                           "is empty, but ssd_cache_gb asks for an SSD tier: name a directory, "
                           "or set ssd_cache_gb to 0");
    if (s->ssd_io_chunk_bytes % 4096 != 0)
        return fail_across(cfg, OPTION(ssd_io_chunk_bytes), "is not a multiple of 4K");
    for (size_t i = 0; i < s->ssd_cache_dir.count; i++) {
        for (size_t j = 0; j < i; j++) {
            if (strcmp(s->ssd_cache_dir.item[i], s->ssd_cache_dir.item[j]) == 0)
                return fail_across(cfg, OPTION(ssd_cache_dir), "names a directory twice");
        }
    }
    if (s->instance_id >= s->instance_num)
        return fail_across(cfg, OPTION(instance_id), "is not less than instance_num");
    return 0;
}

static void log_notes(struct fk_config *cfg)
{
    struct fk_config_note *in_order = NULL;

    while (cfg->notes) {
        struct fk_config_note *n = cfg->notes;
        cfg->notes = n->next;
        n->next = in_order;
        in_order = n;
    }
    cfg->notes = in_order;
    for (struct fk_config_note *n = in_order; n; n = n->next)
        fk_log(n->level, "%s", n->text);
    drop_notes(cfg);
}

/* A line for each option without meaning here, and one for all that wait for a later build. */
static void log_unused(const struct fk_config *cfg)
{
    char waiting[768] = "", where[512], key[FK_OPTION_NAME_MAX];
    size_t len = 0;

    for (size_t i = 0; i < fk_option_count; i++) {
        const struct fk_option *opt = &fk_options[i];
        struct fk_source source = fk_config_source(cfg, opt);
        if (source.kind == FK_SOURCE_DEFAULT)
            continue;
        fk_option_name(opt, 0, key);
        fk_source_format(&source, where, sizeof(where));
        if (opt->status == FK_OPT_IGNORED)
            fk_info("%s: %s has no meaning here and is ignored: %s", where, key, opt->why);
        if (opt->status == FK_OPT_PLANNED && len + strlen(key) + 3 < sizeof(waiting))
            len += (size_t)sprintf(waiting + len, "%s%s", len ? ", " : "", key);
    }
    if (len)
        fk_info("accepted, but not used by this build yet: %s", waiting);
}

int fk_config_finish(struct fk_config *cfg)
{
    const struct fk_settings *s = &cfg->settings;
    int rc = derive_all(cfg);

    if (state_of(cfg, OPTION(log_level))->kind != FK_SOURCE_DEFAULT)
        fk_log_set_level(s->log_level);
    if (state_of(cfg, OPTION(logging_prefix))->kind != FK_SOURCE_DEFAULT)
        fk_log_set_prefix(s->logging_prefix);
    log_notes(cfg);
    if (rc == 0)
        rc = check_all(cfg);
    if (rc == 0)
        log_unused(cfg);
    return rc;
}
