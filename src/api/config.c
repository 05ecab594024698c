/* config.c - flexkv_config: the public face of src/config. */
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

int fk_api_config_take(flexkv_config *c)
{
    if (!c->broken && !c->finished)
        c->broken = fk_config_finish(c->config);
    if (c->broken)
        return done(c, c->broken);
    c->finished = c->frozen = true;
    atomic_fetch_add(&c->refs, 1);
    return 0;
}

static int frozen(void)
{
    return fk_api_fail(-EBUSY, "the config belongs to an open node and can't be changed");
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
