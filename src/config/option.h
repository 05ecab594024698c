/*
 * option.h - what one row of the option table looks like, and what can be done with a
 * row alone: find it by name, read a text into its field, write the field as text.
 *
 * Knows settings.h, nothing of files or the environment. Used inside src/config/ and by
 * `flexkv config`. Stateless; any thread.
 */
#ifndef FK_CONFIG_OPTION_H
#define FK_CONFIG_OPTION_H

#include <stdint.h>
#include <stdio.h>

#include "config/settings.h"

enum fk_option_type {
    FK_OPT_BOOL, FK_OPT_INT, FK_OPT_FLOAT, FK_OPT_SIZE, FK_OPT_STRING, FK_OPT_LIST,
    FK_OPT_ENUM, FK_OPT_NAMESPACES
};

enum fk_option_status {
    FK_OPT_ACTIVE,    /* works now */
    FK_OPT_PLANNED,   /* understood, checked and stored; nothing uses it yet */
    FK_OPT_IGNORED,   /* no meaning here: any value is accepted, one line in the log says why */
};

enum fk_option_category {
    FK_OPT_CAPACITY, FK_OPT_MEMORY, FK_OPT_CORE, FK_OPT_EVICTION, FK_OPT_SSD, FK_OPT_LOGGING,
    FK_OPT_MODEL, FK_OPT_SERVING, FK_OPT_TRANSFER, FK_OPT_DISTRIBUTED, FK_OPT_CATEGORIES
};

enum {
    FK_OPT_BASIC = 1,     /* its environment variable is not read when a file is given */
    FK_OPT_ENV_ONLY = 2,  /* no key of this name in files */
    FK_OPT_SECRET = 4,    /* never printed */
    FK_OPT_UNLIMITED = 8, /* a size: -1 means no limit, stored as 0 */
    FK_OPT_POWER_OF_2 = 16,
};

struct fk_option {
    const char *names;    /* "key|alias|...": keys in files; FLEXKV_<NAME> in the environment */
    const char *env;      /* a variable of another form, read before those; or NULL */
    const char *def;      /* as a user would write it */
    const char *file_def; /* the default where a file was read, if that differs */
    const char *choices;  /* enum: "a|b=alias|c" */
    const char *unit;     /* "ms", "GiB", ...; for sizes it is what a bare number counts */
    const char *help;
    const char *why;      /* ignored: why it has no meaning here */
    size_t offset;        /* in fk_settings; unused when ignored */
    int64_t min, max;     /* inclusive; sizes in bytes */
    uint8_t type, status, category, flags;
};

extern const struct fk_option fk_options[];
extern const size_t fk_option_count;
extern const char *const fk_option_category_names[FK_OPT_CATEGORIES];
extern const char *const fk_option_status_names[];

#define FK_OPTION_NAME_MAX 64

/* The i-th name of a row ("key" is 0) into buf; NULL when there are no more. */
const char *fk_option_name(const struct fk_option *opt, unsigned i, char buf[FK_OPTION_NAME_MAX]);

/* The i-th environment variable of a row into buf, in the order of preference; or NULL. */
const char *fk_option_env(const struct fk_option *opt, unsigned i, char buf[FK_OPTION_NAME_MAX]);

/* The row with this key or alias and which of its names it was; or NULL. */
const struct fk_option *fk_option_find(const char *key, unsigned *alias);

/* The row whose key or alias is the fewest edits away; NULL when nothing is near. */
const struct fk_option *fk_option_nearest(const char *key);

/* Reads text into the row's field of s. 0, -ENOMEM, or -EINVAL and *why, a half sentence. */
int fk_option_parse(const struct fk_option *opt, struct fk_settings *s, const char *text,
                    const char **why);

/* The row's field as text that fk_option_parse takes back. Secrets too: see the caller. */
void fk_option_format(const struct fk_option *opt, const struct fk_settings *s, FILE *out);

/* "integer, 1 to 4096", "one of a, b", ... */
void fk_option_print_allowed(const struct fk_option *opt, FILE *out);

void fk_option_release(const struct fk_option *opt, struct fk_settings *s);

bool fk_utf8_valid(const char *text, size_t len);

/* A size with its largest exact unit, as in 16G. */
void fk_size_format(uint64_t bytes, FILE *out);

#endif
