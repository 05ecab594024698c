/* config.c - flexkv_config: the public face of src/config. */
#include <stdio.h>

#include "api/config_impl.h"
#include "api/node_impl.h"

FLEXKV_API int flexkv_config_create(flexkv_config **out)
{
    flexkv_config *c = calloc(1, sizeof(*c));

    if (!c || fk_config_create(&c->config)) {
        free(c);
        return fk_api_fail(-ENOMEM, "out of memory");
    }
    atomic_init(&c->refs, 1);
    *out = c;
    return 0;
}

FLEXKV_API void flexkv_config_destroy(flexkv_config *c)
{
    if (!c || atomic_fetch_sub(&c->refs, 1) > 1)
        return;
    fk_config_destroy(c->config);
    free(c);
}

static int done(flexkv_config *c, int rc)
{
    return rc ? fk_api_fail(rc, "%s", fk_config_error(c->config)) : 0;
}

/* A source half read is of no use. */
static int loaded(flexkv_config *c, int rc)
{
    c->broken = rc ? rc : c->broken;
    return done(c, rc);
}

/* Defaults that follow from others, and the checks across options: once, before values are used. */
static int finish(flexkv_config *c)
{
    if (!c->broken && !c->finished)
        c->broken = fk_config_finish(c->config);
    if (c->broken)
        return done(c, c->broken);
    c->finished = c->frozen = true;
    return 0;
}

int fk_api_config_take(flexkv_config *c)
{
    int rc = finish(c);

    if (!rc)
        atomic_fetch_add(&c->refs, 1);
    return rc;
}

int fk_api_config_open(const flexkv_config *given, flexkv_config **out)
{
    flexkv_config *c = (flexkv_config *)(uintptr_t)given;
    int rc = 0;

    if (!given) {
        rc = flexkv_config_create(&c);
        if (rc)
            return rc;
        rc = flexkv_config_load_default(c);
    }
    if (!rc)
        rc = fk_api_config_take(c);
    if (!rc)
        *out = c;
    if (!given)
        flexkv_config_destroy(c);
    return rc;
}

static int frozen(void)
{
    return fk_api_fail(-EBUSY, "the config has been used or read and can't be changed any more");
}

FLEXKV_API int flexkv_config_load_default(flexkv_config *c)
{
    return c->frozen ? frozen() : loaded(c, fk_config_load_usual(c->config));
}

FLEXKV_API int flexkv_config_load_file(flexkv_config *c, const char *path)
{
    return c->frozen ? frozen() : loaded(c, fk_config_load_file(c->config, path));
}

FLEXKV_API int flexkv_config_load_env(flexkv_config *c)
{
    return c->frozen ? frozen() : loaded(c, fk_config_load_env(c->config));
}

FLEXKV_API int flexkv_config_set(flexkv_config *c, const char *key, const char *value)
{
    return c->frozen ? frozen() : done(c, fk_config_set(c->config, key, value, "the caller"));
}

static int unknown_key(const char *key)
{
    const struct fk_option *near = fk_option_nearest(key);
    char name[FK_OPTION_NAME_MAX], shown[80];

    return fk_api_fail(-ENOENT, "unknown option %s%s%s%s", fk_config_shown(key, shown),
                       near ? "; did you mean " : "", near ? fk_option_name(near, 0, name) : "",
                       near ? "?" : "");
}

/* Secrets too: this is for the program that set them, not for a reader. */
static void print_value(const flexkv_config *c, const struct fk_option *opt, FILE *out)
{
    if (opt->status == FK_OPT_IGNORED)
        fputs(fk_config_ignored_text(c->config, opt), out);
    else
        fk_option_format(opt, &c->config->settings, out);
}

FLEXKV_API int flexkv_config_get(flexkv_config *c, const char *key, char *text, size_t bytes)
{
    fk_autofree char *value = NULL;
    size_t len = 0;
    unsigned alias;
    const struct fk_option *opt = fk_option_find(key, &alias);

    if (!opt)
        return unknown_key(key);
    int rc = finish(c);
    if (rc)
        return rc;
    FILE *out = open_memstream(&value, &len);
    if (out)
        print_value(c, opt, out);
    if (!out || fclose(out) != 0)
        return fk_api_fail(-ENOMEM, "out of memory");
    if (bytes)
        snprintf(text, bytes, "%s", value);
    return (int)len;
}
