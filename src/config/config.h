/*
 * config.h - the settings of a node or a tool, and where each of them came from.
 *
 * Sources, the later ones first: a caller's fk_config_set, files, the environment, the
 * defaults of the table in options.c. The order of the calls does not matter, only the
 * kind of the source does; of two of one kind the later call counts.
 *
 * Usual way:  fk_config_create, [fk_config_set...], fk_config_load_default, read
 * ->settings, fk_config_destroy. By hand: create, load_*, set, fk_config_finish.
 *
 * Errors: 0 or -errno, mostly -EINVAL, and fk_config_error(cfg) is the whole message for
 * the user: option, source, value, what is allowed. It is not logged here: the caller
 * shows it once. After an error a config can only be asked for it and destroyed.
 *
 * Touches the file system (the file named) and the environment. No locks: one thread at a
 * time, and nobody may change the environment meanwhile. Called by api, cli and tests.
 */
#ifndef FK_CONFIG_CONFIG_H
#define FK_CONFIG_CONFIG_H

#include <stdio.h>

#include "config/option.h"
#include "config/settings.h"

enum fk_source_kind { FK_SOURCE_DEFAULT, FK_SOURCE_ENV, FK_SOURCE_FILE, FK_SOURCE_SET };

struct fk_source {
    enum fk_source_kind kind;
    const char *where;   /* variable, path, or the caller's words; NULL for a default */
    unsigned line;       /* in a file, from 1 */
};

struct fk_option_state;
struct fk_config_note;

struct fk_config {
    struct fk_settings settings;      /* what everybody is here for */
    struct fk_option_state *state;    /* one per row of fk_options */
    struct fk_config_note *notes;     /* lines for the log, newest first, until finish */
    char *error;
    unsigned unknown_names;           /* how many were met */
    unsigned load;                    /* number of the load under way: finds double keys */
};

/* All options at their defaults. */
int fk_config_create(struct fk_config **cfg);
void fk_config_destroy(struct fk_config *cfg);

/* Never NULL; "" when nothing failed. Valid until the next call or destroy. */
const char *fk_config_error(const struct fk_config *cfg);

/*
 * What a node does by itself: the environment, the file that FLEXKV_CONFIG_PATH (or an
 * earlier fk_config_set of "config_path") names, then fk_config_finish.
 */
int fk_config_load_default(struct fk_config *cfg);
/* The same without fk_config_finish, for who wants to set more before. */
int fk_config_load_usual(struct fk_config *cfg);

/* With config_path set, the basic options are not read. Unknown FLEXKV_* get a warning. */
int fk_config_load_env(struct fk_config *cfg);

/* JSON (enforced when the name ends in .json) or YAML, at most 1 MiB, a regular file. */
int fk_config_load_file(struct fk_config *cfg, const char *path);
int fk_config_load_text(struct fk_config *cfg, const char *text, size_t len, const char *name);

/* One option; source says who wants it, as in "--cpu". Unknown key: -ENOENT. */
int fk_config_set(struct fk_config *cfg, const char *key, const char *value, const char *source);

/*
 * Once, when all sources are in: settings that follow from others, checks across options,
 * log level and prefix (unless left at their defaults), and the lines for the log
 * (unknown names, options without meaning here).
 */
int fk_config_finish(struct fk_config *cfg);

/* Where a row's value came from, as "default", "environment X", "FILE:3" or the caller's words. */
struct fk_source fk_config_source(const struct fk_config *cfg, const struct fk_option *opt);
void fk_source_format(const struct fk_source *source, char *buf, size_t size);

/* The text given for an ignored option, or its default. */
const char *fk_config_ignored_text(const struct fk_config *cfg, const struct fk_option *opt);

/* config_print.c: of all options, or of those keys; -ENOENT (after a complaint) on a bad key. */
int fk_config_print_text(struct fk_config *cfg, FILE *out, char **keys, int key_count);
int fk_config_print_json(struct fk_config *cfg, FILE *out, char **keys, int key_count);
void fk_options_print_help(FILE *out);
void fk_options_print_man(FILE *out);   /* flexkv.conf(5) */

/* For config_file.c only. */
int fk_config_assign(struct fk_config *cfg, const struct fk_option *opt, unsigned alias,
                     const char *text, const struct fk_source *source);
void fk_config_note_unknown(struct fk_config *cfg, const char *name,
                            const struct fk_source *source);
int fk_config_fail(struct fk_config *cfg, int rc, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));
/* text for a message: short, without control characters */
const char *fk_config_shown(const char *text, char buf[80]);

#endif
