/*
 * config_print.c - the option table and the values in force, for readers: help text, man
 * page flexkv.conf(5), `flexkv config` as text and as JSON. See config.h.
 *
 * Writes to the FILE it is given. Called by cli/cmd_config.c and the build of the manual.
 */
#include "config/config.h"

#include <jansson.h>

#include "base/util.h"

/* The row's text as a malloced string; NULL without memory. */
static char *to_text(void (*print)(const void *, const void *, FILE *), const void *a,
                     const void *b)
{
    char *text = NULL;
    size_t len = 0;
    FILE *out = open_memstream(&text, &len);

    if (!out)
        return NULL;
    print(a, b, out);
    if (fclose(out) != 0) {
        free(text);
        return NULL;
    }
    return text;
}

/* The option table ------------------------------------------------------------------ */

/* Everything about a row except its names, as sentences. */
static void print_description(const void *row, const void *unused, FILE *out)
{
    const struct fk_option *opt = row;

    fprintf(out, "%s. Value: ", opt->help);
    fk_option_print_allowed(opt, out);
    fprintf(out, ". Default: %s", *opt->def ? opt->def : "empty");
    if (opt->file_def)
        fprintf(out, "; where there is a configuration file, %s", opt->file_def);
    fputc('.', out);
    if (opt->status == FK_OPT_IGNORED)
        fprintf(out, " Accepted and ignored: %s.", opt->why);
    if (opt->status == FK_OPT_PLANNED)
        fputs(" Accepted, not used by this build yet.", out);
    if (opt->flags & FK_OPT_BASIC)
        fputs(" Basic: with a configuration file, not read from the environment.", out);
}

static void print_names(const void *row, const void *in_file, FILE *out)
{
    const char *(*name_of)(const struct fk_option *, unsigned, char *) =
        in_file ? fk_option_name : fk_option_env;
    char name[FK_OPTION_NAME_MAX];

    for (unsigned i = 0; name_of(row, i, name); i++)
        fprintf(out, "%s%s", i ? ", " : "", name);
}

static void print_wrapped(const char *text, const char *indent, FILE *out)
{
    enum { WIDTH = 78 };
    size_t column = 0;

    while (*text) {
        size_t word = strcspn(text, " ");
        if (column && column + 1 + word > WIDTH) {
            fputc('\n', out);
            column = 0;
        }
        fprintf(out, "%s%.*s", column ? " " : indent, (int)word, text);
        column += word + (column ? 1 : strlen(indent));
        text += word + strspn(text + word, " ");
    }
    fputc('\n', out);
}

static void print_help_row(const struct fk_option *opt, FILE *out)
{
    static const int in_file = 1;
    fk_autofree char *keys = to_text(print_names, opt, &in_file);
    fk_autofree char *variables = to_text(print_names, opt, NULL);
    fk_autofree char *text = to_text(print_description, opt, NULL);

    if (!keys || !variables || !text)
        return;
    fprintf(out, "  %s  (%s)\n", opt->flags & FK_OPT_ENV_ONLY ? "-" : keys, variables);
    print_wrapped(text, "      ", out);
}

void fk_options_print_help(FILE *out)
{
    fputs("Options: key in a file, and the environment variable in brackets.\n", out);
    for (int category = 0; category < FK_OPT_CATEGORIES; category++) {
        fprintf(out, "\n%s\n", fk_option_category_names[category]);
        for (size_t i = 0; i < fk_option_count; i++) {
            if (fk_options[i].category == category)
                print_help_row(&fk_options[i], out);
        }
    }
}

/* Text as roff takes it: a line per sentence, no accidental requests, hyphens to copy. */
static void print_roff(const char *text, FILE *out)
{
    fputs("\\&", out);
    for (char last = 0; *text; last = *text++) {
        if (*text == '\\')
            fputs("\\e", out);
        else if (*text == '-')
            fputs("\\-", out);
        else if (*text == ' ' && last == '.')
            fputc('\n', out);
        else
            fputc(*text, out);
    }
}

static void print_man_row(const struct fk_option *opt, FILE *out)
{
    static const int in_file = 1;
    fk_autofree char *keys = to_text(print_names, opt, &in_file);
    fk_autofree char *variables = to_text(print_names, opt, NULL);
    fk_autofree char *text = to_text(print_description, opt, NULL);

    if (!keys || !variables || !text)
        return;
    if (opt->flags & FK_OPT_ENV_ONLY)
        fprintf(out, ".TP\n.B %s\n", variables);
    else
        fprintf(out, ".TP\n.BR \"%s\" \" (%s)\"\n", keys, variables);
    print_roff(text, out);
    fputc('\n', out);
}

static const char man_head[] =
    ".TH FLEXKV.CONF 5 \"2026-11-21\" \"flexkv " FLEXKV_VERSION "\" \"File formats\"\n"
    ".SH NAME\n"
    "flexkv.conf \\- configuration of FlexKV: file, environment, options\n"
    ".SH DESCRIPTION\n"
    "A FlexKV node takes each option from the caller of its library, else from the\n"
    "configuration file that\n"
    ".B FLEXKV_CONFIG_PATH\n"
    "names, else from the environment, else from its default.\n"
    "Once a file is named, the options marked \"basic\" below are not read from the\n"
    "environment at all.\n"
    ".PP\n"
    "A file is JSON (names ending in .json) or YAML: one mapping of keys to values, of at\n"
    "most 1 MiB, in UTF\\-8. A key is the environment variable in lower case without\n"
    ".BR FLEXKV_ .\n"
    "The keys may also stand in a section\n"
    ".B cache_config\n"
    "or\n"
    ".B model_config\n"
    "(legacy form). null means: not given.\n"
    "A wrong value is an error that names the option, its source and what is allowed;\n"
    "an unknown key is a warning with the nearest known name.\n"
    ".PP\n"
    "Sizes are fractions or integers of the unit that the option states, or have one of the\n"
    "suffixes K, M, G, T, P (also KiB, KB, ...), all powers of 1024.\n"
    ".PP\n"
    ".B flexkv config\n"
    "prints the value in force of each option and where it came from.\n"
    ".SH OPTIONS\n";

static const char man_tail[] =
    ".SH EXAMPLES\n"
    ".nf\n"
    "cpu_cache_gb: 64\n"
    "ssd_cache_gb: 1.5T\n"
    "ssd_cache_dir: [/mnt/nvme0/flexkv, /mnt/nvme1/flexkv]\n"
    "eviction_policy: s3fifo\n"
    "namespaces:\n"
    "  team-a: {max: 50%, guaranteed: 10%}\n"
    "  team-b: {max: 200G}\n"
    ".fi\n"
    ".PP\n"
    "The same quotas in the environment:\n"
    ".PP\n"
    ".nf\n"
    "FLEXKV_NAMESPACES=\"team\\-a:max=50%,guaranteed=10%;team\\-b:max=200G\"\n"
    ".fi\n"
    ".SH SEE ALSO\n"
    ".BR flexkv (1),\n"
    ".BR flexkv (3)\n";

void fk_options_print_man(FILE *out)
{
    fputs(man_head, out);
    for (int category = 0; category < FK_OPT_CATEGORIES; category++) {
        fprintf(out, ".SS %s\n", fk_option_category_names[category]);
        for (size_t i = 0; i < fk_option_count; i++) {
            if (fk_options[i].category == category)
                print_man_row(&fk_options[i], out);
        }
    }
    fputs(man_tail, out);
}

/* Values in force ------------------------------------------------------------------- */

static void print_value(const void *config, const void *row, FILE *out)
{
    const struct fk_config *cfg = config;
    const struct fk_option *opt = row;

    if (opt->flags & FK_OPT_SECRET)
        fputs(**(char *const *)((const char *)&cfg->settings + opt->offset) ? "***" : "", out);
    else if (opt->status == FK_OPT_IGNORED)
        fputs(fk_config_ignored_text(cfg, opt), out);
    else
        fk_option_format(opt, &cfg->settings, out);
}

/* Calls visit for the rows asked for, in the order asked for; all of them without keys. */
static int for_each_row(struct fk_config *cfg, char **keys, int key_count,
                        void (*visit)(const struct fk_config *, const struct fk_option *, void *),
                        void *arg)
{
    unsigned alias;

    for (size_t i = 0; key_count == 0 && i < fk_option_count; i++)
        visit(cfg, &fk_options[i], arg);
    for (int k = 0; k < key_count; k++) {
        const struct fk_option *opt = fk_option_find(keys[k], &alias);
        char near[FK_OPTION_NAME_MAX], shown[80];
        if (!opt) {
            opt = fk_option_nearest(keys[k]);
            return fk_config_fail(cfg, -ENOENT, "unknown option %s%s%s%s",
                                  fk_config_shown(keys[k], shown), opt ? "; did you mean " : "",
                                  opt ? fk_option_name(opt, 0, near) : "", opt ? "?" : "");
        }
        visit(cfg, opt, arg);
    }
    return 0;
}

static void visit_text(const struct fk_config *cfg, const struct fk_option *opt, void *arg)
{
    struct fk_source source = fk_config_source(cfg, opt);
    fk_autofree char *value = to_text(print_value, cfg, opt);
    char where[512], key[FK_OPTION_NAME_MAX];

    fk_source_format(&source, where, sizeof(where));
    fprintf(arg, "%-36s %-28s %s%s%s%s\n", fk_option_name(opt, 0, key),
            value && *value ? value : "-", where, opt->status == FK_OPT_ACTIVE ? "" : " (",
            opt->status == FK_OPT_ACTIVE ? "" : fk_option_status_names[opt->status],
            opt->status == FK_OPT_ACTIVE ? "" : ")");
}

int fk_config_print_text(struct fk_config *cfg, FILE *out, char **keys, int key_count)
{
    return for_each_row(cfg, keys, key_count, visit_text, out);
}

/* Numbers as numbers, sizes in bytes, lists as lists; all else as text. */
static json_t *json_value(const struct fk_config *cfg, const struct fk_option *opt)
{
    const void *field = (const char *)&cfg->settings + opt->offset;
    fk_autofree char *text = NULL;

    switch (opt->status == FK_OPT_IGNORED ? FK_OPT_STRING : opt->type) {
    case FK_OPT_BOOL:
        return json_boolean(*(const bool *)field);
    case FK_OPT_INT:
        return json_integer(*(const int64_t *)field);
    case FK_OPT_FLOAT:
        return json_real(*(const double *)field);
    case FK_OPT_SIZE:
        return json_integer((json_int_t)*(const uint64_t *)field);
    case FK_OPT_LIST: {
        const struct fk_string_list *list = field;
        json_t *array = json_array();
        for (size_t i = 0; i < list->count; i++)
            json_array_append_new(array, json_string(list->item[i]));
        return array;
    }
    default:
        text = to_text(print_value, cfg, opt);
        return json_string(text ? text : "");
    }
}

static void visit_json(const struct fk_config *cfg, const struct fk_option *opt, void *arg)
{
    struct fk_source source = fk_config_source(cfg, opt);
    char where[512], key[FK_OPTION_NAME_MAX];
    json_t *row = json_object();

    fk_source_format(&source, where, sizeof(where));
    json_object_set_new(row, "value", json_value(cfg, opt));
    json_object_set_new(row, "source", json_string_nocheck(where));
    json_object_set_new(row, "status", json_string(fk_option_status_names[opt->status]));
    if (opt->type == FK_OPT_SIZE && opt->status != FK_OPT_IGNORED)
        json_object_set_new(row, "unit", json_string("bytes"));
    else if (opt->unit)
        json_object_set_new(row, "unit", json_string(opt->unit));
    json_object_set_new(arg, fk_option_name(opt, 0, key), row);
}

int fk_config_print_json(struct fk_config *cfg, FILE *out, char **keys, int key_count)
{
    json_t *all = json_object();
    int rc = for_each_row(cfg, keys, key_count, visit_json, all);

    if (rc == 0 && (json_dumpf(all, out, JSON_INDENT(2)) != 0 || fputc('\n', out) == EOF))
        rc = fk_config_fail(cfg, -EIO, "cannot write the JSON");
    json_decref(all);
    return rc;
}
