/*
 * config_file.c - reads a configuration file, JSON or YAML, into a config.
 *
 * The bytes come from outside: size, UTF-8 and nesting are limited before they cost
 * anything, aliases are refused (no document of a few bytes grows into gigabytes), and
 * libfyaml is used as a stream of events, never as a tree. Fuzzed: fuzz/fuzz_config.c.
 *
 * Shape of a file:   { key: scalar | [list] | {namespaces}, cache_config: {the same} }
 * Touches the file it is given. Called by config.c's users; no state of its own.
 */
#include "config/config.h"

#include <fcntl.h>
#include <libfyaml.h>
#include <sys/stat.h>

#include "base/util.h"

#define FILE_MAX_BYTES FK_MIB
#define FILE_MAX_DEPTH 32

struct reader {
    struct fk_config *cfg;
    const char *name;          /* of the file, for messages */
    struct fy_parser *parser;
    struct fy_diag *diag;
};

/* One event, with its text when it is a scalar. */
struct item {
    enum fy_event_type type;
    char *text;
    bool is_null;              /* null, ~, or nothing */
    unsigned line;
};

static void item_clear(struct item *it)
{
    free(it->text);
    it->text = NULL;
}
#define autoitem __attribute__((cleanup(item_clear)))

static int fail_syntax(struct reader *r)
{
    void *iter = NULL;
    const struct fy_diag_error *first = fy_diag_errors_iterate(r->diag, &iter);
    char shown[80];

    if (!first)
        return fk_config_fail(r->cfg, -EINVAL, "%s: not valid JSON or YAML", r->name);
    return fk_config_fail(r->cfg, -EINVAL, "%s:%d: not valid JSON or YAML: %s", r->name,
                          first->line > 0 ? first->line : 1, fk_config_shown(first->msg, shown));
}

static int take_scalar(struct reader *r, struct fy_token *token, struct item *it)
{
    size_t len = 0;
    const char *text = fy_token_get_text(token, &len);

    if (text && memchr(text, 0, len))
        return fk_config_fail(r->cfg, -EINVAL, "%s:%u: a NUL character in a value", r->name,
                              it->line);
    it->text = strndup(text ? text : "", len);
    if (!it->text)
        return fk_config_fail(r->cfg, -ENOMEM, "out of memory");
    it->is_null = fy_token_scalar_style(token) == FYSS_PLAIN &&
                  (!*it->text || strcmp(it->text, "~") == 0 || strcasecmp(it->text, "null") == 0);
    return 0;
}

/* The next event. Aliases and errors end the reading. */
static int next(struct reader *r, struct item *it)
{
    struct fy_event *event = fy_parser_parse(r->parser);
    int rc = 0;

    item_clear(it);
    if (!event)
        return fail_syntax(r);
    struct fy_token *token = fy_event_get_token(event);
    const struct fy_mark *mark = token ? fy_token_start_mark(token) : NULL;
    it->type = event->type;
    it->line = mark ? (unsigned)mark->line + 1 : 1;
    if (it->type == FYET_SCALAR)
        rc = take_scalar(r, event->scalar.value, it);
    if (it->type == FYET_ALIAS)
        rc = fk_config_fail(r->cfg, -EINVAL, "%s:%u: YAML aliases are not supported", r->name,
                            it->line);
    fy_parser_event_free(r->parser, event);
    return rc;
}

static bool is_start(const struct item *it)
{
    return it->type == FYET_MAPPING_START || it->type == FYET_SEQUENCE_START;
}

static bool is_end(const struct item *it)
{
    return it->type == FYET_MAPPING_END || it->type == FYET_SEQUENCE_END;
}

/* The rest of a value whose first event was seen. */
static int skip_value(struct reader *r, const struct item *first)
{
    autoitem struct item it = {0};
    unsigned depth = is_start(first);
    int rc = 0;

    while (depth > 0 && (rc = next(r, &it)) == 0)
        depth += (unsigned)is_start(&it) - (unsigned)is_end(&it);
    return rc;
}

/* The scalars of a sequence, joined as the environment would have them. */
static int read_list(struct reader *r, FILE *out)
{
    autoitem struct item it = {0};
    const char *sep = "";
    int rc;

    while ((rc = next(r, &it)) == 0 && it.type != FYET_SEQUENCE_END) {
        if (it.type != FYET_SCALAR)
            return fk_config_fail(r->cfg, -EINVAL, "%s:%u: a list of texts is wanted here", r->name,
                                  it.line);
        fprintf(out, "%s%s", sep, it.text);
        sep = ";";
    }
    return rc;
}

/*
 * A mapping of scalars, or with `inner` of such mappings, in the form of the environment:
 * "a:max=50%,guaranteed=10%;b:max=2G". So there is one parser of quotas.
 */
static int read_quotas(struct reader *r, FILE *out, bool inner)
{
    autoitem struct item key = {0}, value = {0};
    int rc;

    while ((rc = next(r, &key)) == 0 && key.type != FYET_MAPPING_END) {
        rc = key.type == FYET_SCALAR ? next(r, &value) : 0;
        if (rc)
            return rc;
        if (key.type != FYET_SCALAR || strpbrk(key.text, ":;,=") ||
            (inner ? value.type != FYET_SCALAR || strpbrk(value.text, ":;,=")
                   : value.type != FYET_MAPPING_START))
            return fk_config_fail(r->cfg, -EINVAL,
                                  "%s:%u: namespaces are written as NAME: {max: 50%%, "
                                  "guaranteed: 10%%}; a NAME has none of : ; , =",
                                  r->name, key.line);
        fprintf(out, inner ? "%s=" : "%s:", key.text);
        if (inner)
            fprintf(out, "%s,", value.is_null ? "" : value.text);
        else
            rc = read_quotas(r, out, true);
        if (rc)
            return rc;
        fputs(inner ? "" : ";", out);
    }
    return rc;
}

/* A list or a mapping as the text that the option's parser takes. */
static int read_compound(struct reader *r, const struct fk_option *opt, const char *key,
                         const struct item *value, char **text)
{
    bool list = opt->type == FK_OPT_LIST && value->type == FYET_SEQUENCE_START;
    bool quotas = opt->type == FK_OPT_NAMESPACES && value->type == FYET_MAPPING_START;
    bool ignored = opt->status == FK_OPT_IGNORED;
    size_t len = 0;
    int rc;

    if (!list && !quotas && !ignored)
        return fk_config_fail(r->cfg, -EINVAL, "%s:%u: %s takes one value, not a %s", r->name,
                              value->line, key,
                              value->type == FYET_MAPPING_START ? "mapping" : "list");
    FILE *out = open_memstream(text, &len);
    if (!out)
        return fk_config_fail(r->cfg, -ENOMEM, "out of memory");
    rc = ignored ? skip_value(r, value) : list ? read_list(r, out) : read_quotas(r, out, false);
    if (fclose(out) != 0 && rc == 0)
        rc = fk_config_fail(r->cfg, -ENOMEM, "out of memory");
    return rc;
}

static int read_mapping(struct reader *r, bool section);

static int read_value(struct reader *r, const struct item *key, bool section)
{
    struct fk_source source = {.kind = FK_SOURCE_FILE, .where = r->name, .line = key->line};
    autoitem struct item value = {0};
    fk_autofree char *text = NULL;
    unsigned alias;
    int rc = next(r, &value);

    if (rc)
        return rc;
    /* the legacy form keeps some options in sections */
    if (!section && value.type == FYET_MAPPING_START &&
        (strcmp(key->text, "cache_config") == 0 || strcmp(key->text, "model_config") == 0))
        return read_mapping(r, true);
    const struct fk_option *opt = fk_option_find(key->text, &alias);
    if (!opt || (opt->flags & FK_OPT_ENV_ONLY)) {
        fk_config_note_unknown(r->cfg, key->text, &source);
        return skip_value(r, &value);
    }
    if (value.type == FYET_SCALAR)
        return value.is_null ? 0 : fk_config_assign(r->cfg, opt, alias, value.text, &source);
    rc = read_compound(r, opt, key->text, &value, &text);
    return rc ? rc : fk_config_assign(r->cfg, opt, alias, text, &source);
}

static int read_mapping(struct reader *r, bool section)
{
    autoitem struct item key = {0};
    int rc;

    while ((rc = next(r, &key)) == 0 && key.type != FYET_MAPPING_END) {
        if (key.type != FYET_SCALAR)
            return fk_config_fail(r->cfg, -EINVAL, "%s:%u: the name of an option is wanted here",
                                  r->name, key.line);
        rc = read_value(r, &key, section);
        if (rc)
            return rc;
    }
    return rc;
}

static int read_stream(struct reader *r)
{
    autoitem struct item it = {0};
    int rc;

    do
        rc = next(r, &it);
    while (rc == 0 && (it.type == FYET_STREAM_START || it.type == FYET_DOCUMENT_START));
    if (rc || it.type == FYET_STREAM_END || it.type == FYET_DOCUMENT_END)
        return rc;   /* an empty file is a file without options */
    if (it.type == FYET_MAPPING_START)
        rc = read_mapping(r, false);
    else if (!it.is_null)
        rc = fk_config_fail(r->cfg, -EINVAL, "%s:%u: option: value pairs are wanted, not a %s",
                            r->name, it.line, is_start(&it) ? "list" : "single value");
    while (rc == 0 && (rc = next(r, &it)) == 0 && it.type != FYET_STREAM_END) {
        if (it.type != FYET_DOCUMENT_END)
            rc = fk_config_fail(r->cfg, -EINVAL, "%s:%u: more than one document", r->name, it.line);
    }
    return rc;
}

/*
 * What is refused before libfyaml sees it. Nesting is bounded by the brackets alone: ours needs
 * three levels; brackets in texts and comments count too, nobody has that many. Directives
 * (%YAML, %TAG): libfyaml 0.7 can loop for ever in them, and no configuration needs one.
 */
static int check_bytes(struct fk_config *cfg, const char *text, size_t len, const char *name)
{
    unsigned depth = 0;

    if (len > FILE_MAX_BYTES)
        return fk_config_fail(cfg, -EFBIG, "%s: larger than the %llu bytes that a configuration "
                              "may have", name, FILE_MAX_BYTES);
    if (memchr(text, 0, len) || !fk_utf8_valid(text, len))
        return fk_config_fail(cfg, -EINVAL, "%s: not a text in UTF-8", name);
    for (size_t i = 0; i < len; i++) {
        depth += text[i] == '[' || text[i] == '{';
        depth -= depth > 0 && (text[i] == ']' || text[i] == '}');
        if (depth > FILE_MAX_DEPTH)
            return fk_config_fail(cfg, -EINVAL, "%s: nested deeper than %d levels", name,
                                  FILE_MAX_DEPTH);
        if (text[i] == '%' && (i == 0 || text[i - 1] == '\n' || text[i - 1] == '\r'))
            return fk_config_fail(cfg, -EINVAL, "%s: a line begins with %%: YAML directives are "
                                  "not supported", name);
    }
    return 0;
}

/* The one default that differs where there is a file. */
static int apply_file_defaults(struct fk_config *cfg)
{
    const char *why;
    int rc = 0;

    for (size_t i = 0; rc == 0 && i < fk_option_count; i++) {
        const struct fk_option *opt = &fk_options[i];
        if (opt->file_def && fk_config_source(cfg, opt).kind == FK_SOURCE_DEFAULT)
            rc = fk_option_parse(opt, &cfg->settings, opt->file_def, &why);
    }
    return rc ? fk_config_fail(cfg, rc, "out of memory") : 0;
}

int fk_config_load_text(struct fk_config *cfg, const char *text, size_t len, const char *name)
{
    size_t name_len = strlen(name);
    bool json = name_len > 5 && strcasecmp(name + name_len - 5, ".json") == 0;
    struct fy_diag_cfg diag_cfg;
    struct fy_parse_cfg parse_cfg = {
        .flags = FYPCF_QUIET | FYPCF_COLLECT_DIAG | (json ? FYPCF_JSON_FORCE : FYPCF_JSON_NONE),
    };
    struct reader r = {.cfg = cfg, .name = name};
    int rc = check_bytes(cfg, text, len, name);

    if (rc)
        return rc;
    cfg->load++;
    fy_diag_cfg_default(&diag_cfg);
    r.diag = parse_cfg.diag = fy_diag_create(&diag_cfg);
    if (r.diag) {
        fy_diag_set_collect_errors(r.diag, true);
        r.parser = fy_parser_create(&parse_cfg);
    }
    if (r.parser && fy_parser_set_string(r.parser, text, len) == 0)
        rc = read_stream(&r);
    else
        rc = fk_config_fail(cfg, -ENOMEM, "out of memory");
    if (r.parser)
        fy_parser_destroy(r.parser);
    if (r.diag)
        fy_diag_destroy(r.diag);
    return rc ? rc : apply_file_defaults(cfg);
}

static int fail_file(struct fk_config *cfg, const char *path, int rc)
{
    char where[512];
    struct fk_source source = fk_config_source(cfg, &fk_options[0]);   /* config_path */

    fk_source_format(&source, where, sizeof(where));
    return fk_config_fail(cfg, rc, "configuration file %s (from %s): %s", path,
                          source.kind == FK_SOURCE_DEFAULT ? "the caller" : where, strerror(-rc));
}

int fk_config_load_file(struct fk_config *cfg, const char *path)
{
    /* O_NONBLOCK: a FIFO would hold up the start for ever */
    fk_autoclose int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    fk_autofree char *text = NULL;
    struct stat st;
    size_t len = 0;

    if (fd < 0 || fstat(fd, &st))
        return fail_file(cfg, path, -errno);
    if (!S_ISREG(st.st_mode))
        return fk_config_fail(cfg, -EINVAL, "configuration file %s: not a regular file", path);
    text = malloc(FILE_MAX_BYTES + 1);
    if (!text)
        return fk_config_fail(cfg, -ENOMEM, "out of memory");
    while (len <= FILE_MAX_BYTES) {
        ssize_t n = read(fd, text + len, FILE_MAX_BYTES + 1 - len);
        if (n < 0 && errno != EINTR)
            return fail_file(cfg, path, -errno);
        if (n == 0)
            break;
        len += n > 0 ? (size_t)n : 0;
    }
    return fk_config_load_text(cfg, text, len, path);
}
