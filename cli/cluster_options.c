/* cluster_options.c - see cluster_options.h. */
#include "cluster_options.h"

#include <stdio.h>

#include "api/sharing.h"

/* "[rediss://|redis://][USER:PASSWORD@]HOST[:PORT][/DB]", or the path of a unix socket. */
static int set_redis(struct fk_config *cfg, const char *url)
{
    fk_autofree char *copy = strdup(url);
    char *at = copy, *part;
    int rc = 0;

    if (*at == '/')
        return fk_config_set(cfg, "redis_host", at, "--redis");
    if (strncmp(at, "rediss://", 9) == 0)
        rc = fk_config_set(cfg, "redis_tls", "1", "--redis");
    at += strncmp(at, "rediss://", 9) == 0 ? 9 : strncmp(at, "redis://", 8) == 0 ? 8 : 0;
    if (!rc && (part = strrchr(at, '@'))) {
        *part = '\0';
        char *password = strchr(at, ':');
        if (password)
            *password++ = '\0';
        rc = fk_config_set(cfg, "redis_user", at, "--redis");
        rc = rc ? rc : fk_config_set(cfg, "redis_password", password ? password : "", "--redis");
        at = part + 1;
    }
    if (!rc && (part = strchr(at, '/'))) {
        *part++ = '\0';
        rc = *part ? fk_config_set(cfg, "redis_db", part, "--redis") : 0;
    }
    char *close = *at == '[' ? strchr(at, ']') : NULL;      /* [::1]:6379 */
    if (!rc && (part = strrchr(close ? close : at, ':')) && (close || strchr(at, ':') == part)) {
        *part++ = '\0';
        rc = fk_config_set(cfg, "redis_port", part, "--redis");
    }
    if (close) {
        *close = '\0';
        at++;
    }
    return rc ? rc : fk_config_set(cfg, "redis_host", at, "--redis");
}

static int apply(const struct cluster_options *o, struct fk_config *cfg)
{
    int rc = o->file ? fk_config_set(cfg, "config_path", o->file, "--config") : 0;

    for (int i = 0; i < o->n_sets && !rc; i++) {
        char *value = strchr(o->sets[i], '=');
        if (!value) {
            fprintf(stderr, "flexkv cluster: --set %s: KEY=VALUE is wanted\n", o->sets[i]);
            return 2;
        }
        *value = '\0';
        rc = fk_config_set(cfg, o->sets[i], value + 1, "--set");
    }
    rc = rc || !o->redis ? rc : set_redis(cfg, o->redis);
    rc = rc ? rc : fk_config_load_default(cfg);
    if (rc)
        fprintf(stderr, "flexkv cluster: %s\n", fk_config_error(cfg));
    return rc ? 1 : 0;
}

int cluster_options_load(const struct cluster_options *o, struct fk_config **config,
                         struct fk_redis_params *redis)
{
    int rc = fk_config_create(config) ? 1 : apply(o, *config);
    if (rc)
        return rc;
    const struct fk_settings *s = &(*config)->settings;
    fk_redis_params_from(s, redis);
    return 0;
}
