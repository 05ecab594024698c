/*
 * fuzz_config.c - libFuzzer target: any bytes as a configuration file.
 *
 * Must never crash, leak or hang; what is accepted must print and read back as the same.
 * The first byte chooses JSON or YAML. Seeds: fuzz/corpus/config/.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "config/config.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void drop_log(enum fk_log_level level, const char *line, void *arg)
{
}

static char *value_text(struct fk_config *cfg, const struct fk_option *opt)
{
    char *text = NULL;
    size_t len;
    FILE *out = open_memstream(&text, &len);

    if (!out)
        abort();
    fk_option_format(opt, &cfg->settings, out);
    fclose(out);
    return text;
}

/* Every value in force, given again as text, is accepted and has that text again. */
static void check_round_trip(struct fk_config *cfg)
{
    for (size_t i = 0; i < fk_option_count; i++) {
        const struct fk_option *opt = &fk_options[i];
        const char *why = "reads as something else";
        char *first = value_text(cfg, opt);
        int rc = fk_option_parse(opt, &cfg->settings, first, &why);
        char *second = value_text(cfg, opt);
        if ((rc && *first) || strcmp(first, second) != 0) {
            fprintf(stderr, "%s: \"%s\" %s: \"%s\"\n", opt->names, first, why, second);
            abort();
        }
        free(first);
        free(second);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct fk_config *cfg;

    if (size < 1 || fk_config_create(&cfg))
        return 0;
    fk_log_set_sink(drop_log, NULL);   /* not the level: inputs set that */
    int rc = fk_config_load_text(cfg, (const char *)data + 1, size - 1,
                                 data[0] & 1 ? "fuzz.json" : "fuzz.yaml");
    if (rc == 0)
        rc = fk_config_finish(cfg);
    if (rc && !*fk_config_error(cfg))
        abort();
    if (rc == 0)
        check_round_trip(cfg);
    fk_config_destroy(cfg);
    return 0;
}
