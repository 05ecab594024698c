/*
 * test_config.c - src/config/: every type, source, priority and error of the configuration.
 *
 * Sets and clears environment variables of its own process; files in a directory of its own
 * under TMPDIR. Run alone, no arguments.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <errno.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/util.h"
#include "config/config.h"

extern char **environ;

static char log_text[65536];
static size_t log_len;

static void take_log(enum fk_log_level level, const char *line, void *arg)
{
    int n = snprintf(log_text + log_len, sizeof(log_text) - log_len, "%s\n", line);

    log_len = fk_min(log_len + (size_t)n, sizeof(log_text) - 1);
}

/* Each test: a fresh config, an environment without our variables, an empty log. */
static int set_up(void **state)
{
    struct fk_config *cfg;

    for (char **e = environ; *e;) {
        char name[256];
        snprintf(name, sizeof(name), "%.*s", (int)strcspn(*e, "="), *e);
        if (strstr(name, "FLEXKV") || strncmp(name, "MOONCAKE", 8) == 0) {
            unsetenv(name);
            e = environ;
        } else {
            e++;
        }
    }
    log_len = 0;
    log_text[0] = '\0';
    fk_log_set_sink(take_log, NULL);
    fk_log_set_level(FK_LOG_INFO);
    assert_int_equal(fk_config_create(&cfg), 0);
    *state = cfg;
    return 0;
}

static int tear_down(void **state)
{
    fk_config_destroy(*state);
    return 0;
}

#define assert_has(text, part) \
    do { \
        if (!strstr((text), (part))) \
            fail_msg("no \"%s\" in: %s", (part), (text)); \
    } while (0)

static int load(struct fk_config *cfg, const char *text)
{
    return fk_config_load_text(cfg, text, strlen(text), "test.yaml");
}

static const char *source_of(struct fk_config *cfg, const char *key)
{
    static char text[512];
    unsigned alias;
    const struct fk_option *opt = fk_option_find(key, &alias);

    assert_non_null(opt);
    struct fk_source source = fk_config_source(cfg, opt);
    fk_source_format(&source, text, sizeof(text));
    return text;
}

/* The table itself: names are unique, defaults are valid and print as they are read. */
static void test_table(void **state)
{
    struct fk_config *cfg = *state;
    char name[FK_OPTION_NAME_MAX];
    unsigned alias;

    for (size_t i = 0; i < fk_option_count; i++) {
        const struct fk_option *opt = &fk_options[i];
        char *text = NULL;
        size_t len;
        const char *why = "";
        for (unsigned n = 0; fk_option_name(opt, n, name); n++) {
            assert_ptr_equal(fk_option_find(name, &alias), opt);
            assert_int_equal(alias, n);
        }
        assert_non_null(opt->help);
        assert_true((opt->status == FK_OPT_IGNORED) == (opt->why != NULL));
        FILE *out = open_memstream(&text, &len);
        fk_option_format(opt, &cfg->settings, out);
        fclose(out);
        if (fk_option_parse(opt, &cfg->settings, text, &why))
            fail_msg("%s: own text \"%s\" %s", opt->names, text, why);
        free(text);
    }
}

static void test_defaults(void **state)
{
    struct fk_config *cfg = *state;
    const struct fk_settings *s = &cfg->settings;

    assert_int_equal(fk_config_load_default(cfg), 0);
    assert_int_equal(s->cpu_cache_bytes, 16 * FK_GIB);
    assert_int_equal(s->ssd_cache_bytes, 0);
    assert_string_equal(s->ssd_cache_dir.item[0], "./flexkv_ssd");
    assert_int_equal(s->eviction_policy, FK_EVICT_LRU);
    assert_true(s->evict_start_threshold == 1.0 && s->evict_ratio == 0);
    assert_int_equal(s->ssd_max_file_bytes, 0);
    assert_int_equal(s->trace_max_file_bytes, 100 * FK_MIB);
    assert_int_equal(s->log_level, FK_LOG_INFO);
    assert_int_equal(s->op_timeout_ms, 20000);
    assert_int_equal(s->server_timeout_ms, 1000);
    assert_int_equal(s->worker_timeout_ms, 60000);
    assert_true(s->enable_flexkv && s->ssd_direct_io && !s->ssd_recreate);
    assert_string_equal(source_of(cfg, "cpu_cache_gb"), "default");
    assert_string_equal(log_text, "");
}

static void test_values(void **state)
{
    static const struct { const char *text; uint64_t bytes; } sizes[] = {
        {"1", FK_GIB}, {"0.5", FK_GIB / 2}, {"512M", 512 * FK_MIB}, {"2G", 2 * FK_GIB},
        {"2 GiB", 2 * FK_GIB}, {"2gb", 2 * FK_GIB}, {"1T", 1024 * FK_GIB}, {"1.5k", 1536},
        {"4096B", 4096}, {"64KiB", 65536}, {".5", FK_GIB / 2}, {"1P", FK_GIB * FK_MIB},
    };
    struct fk_config *cfg = *state;
    const struct fk_settings *s = &cfg->settings;

    assert_int_equal(fk_config_set(cfg, "ssd_cache_gb", "0", "t"), 0);
    assert_int_equal(s->ssd_cache_bytes, 0);
    for (size_t i = 0; i < fk_array_size(sizes); i++) {
        assert_int_equal(fk_config_set(cfg, "ssd_cache_gb", sizes[i].text, "t"), 0);
        assert_int_equal(s->ssd_cache_bytes, sizes[i].bytes);
    }
    assert_int_equal(fk_config_set(cfg, "max_file_size_gb", "2", "t"), 0);
    assert_int_equal(s->ssd_max_file_bytes, 2 * FK_GIB);
    assert_int_equal(fk_config_set(cfg, "max_file_size_gb", "-1", "t"), 0);
    assert_int_equal(s->ssd_max_file_bytes, 0);
    assert_int_equal(fk_config_set(cfg, "hugepage_size_bytes", "1073741824", "t"), 0);
    assert_int_equal(s->hugepage_size_bytes, FK_GIB);
    assert_int_equal(fk_config_set(cfg, "evict_ratio", "0.05", "t"), 0);
    assert_true(s->evict_ratio == 0.05);
    assert_int_equal(fk_config_set(cfg, "eviction_policy", "S3FIFO", "t"), 0);
    assert_int_equal(s->eviction_policy, FK_EVICT_S3FIFO);
    assert_int_equal(fk_config_set(cfg, "log_level", "warn", "t"), 0);
    assert_int_equal(s->log_level, FK_LOG_WARNING);
    assert_int_equal(fk_config_set(cfg, "swa_multi_group", "true", "t"), 0);
    assert_int_equal(s->swa_multi_group, FK_SWITCH_ON);
    assert_int_equal(fk_config_set(cfg, "ssd_direct_io", "no", "t"), 0);
    assert_false(s->ssd_direct_io);
    assert_int_equal(fk_config_set(cfg, "ssd_io_depth", "0x10", "t"), 0);
    assert_int_equal(s->ssd_io_depth, 16);
    assert_int_equal(fk_config_set(cfg, "ssd_io_depth", "010", "t"), 0);
    assert_int_equal(s->ssd_io_depth, 10);
    assert_int_equal(fk_config_set(cfg, "ssd_cache_dir", " /a ;; /b;", "t"), 0);
    assert_int_equal(s->ssd_cache_dir.count, 2);
    assert_string_equal(s->ssd_cache_dir.item[1], "/b");
}

/* Every kind of wrong value is refused and leaves the old value alone. */
static void test_wrong_values(void **state)
{
    static const struct { const char *key, *text, *why; } wrong[] = {
        {"cpu_cache_gb", "abc", "is not a size"}, {"cpu_cache_gb", "-1", "is negative"},
        {"cpu_cache_gb", "0", "out of range"}, {"cpu_cache_gb", "nan", "is not a size"},
        {"cpu_cache_gb", "inf", "is not a size"}, {"cpu_cache_gb", "1e3", "unknown unit"},
        {"cpu_cache_gb", "0x10", "unknown unit"}, {"cpu_cache_gb", "16 Gx", "unknown unit"},
        {"cpu_cache_gb", "99999999999999999999999999999999999", "out of range"},
        {"cpu_cache_gb", "1..2", "unknown unit"}, {"cpu_cache_gb", ".", "is not a size"},
        {"cpu_cache_gb", "99999999999999999999999999999999999999999999999", "is not a size"},
        {"hugepage_size_bytes", "3M", "power of two"},
        {"copy_threads", "65", "out of range"}, {"copy_threads", "-1", "out of range"},
        {"copy_threads", "1.5", "not a whole number"}, {"copy_threads", "4x", "not a whole number"},
        {"copy_threads", "99999999999999999999", "out of range"},
        {"evict_ratio", "nan", "not a number"}, {"evict_ratio", "1.1", "out of range"},
        {"evict_ratio", "-0.1", "out of range"}, {"evict_start_threshold", "70%", "not a number"},
        {"ssd_direct_io", "maybe", "not a switch"}, {"ssd_direct_io", "2", "not a switch"},
        {"eviction_policy", "lr", "not one of"}, {"eviction_policy", "lru|lfu", "not one of"},
        {"log_level", "=", "not one of"}, {"redis_host", "a\nb", "control character"},
        {"redis_host", "\xff\xfe", "not UTF-8"}, {"redis_host", "\xc0\xaf", "not UTF-8"},
        {"redis_host", "\xed\xa0\x80", "not UTF-8"}, {"redis_host", "x\xe2\x82", "not UTF-8"},
        {"namespaces", "a", "form"}, {"namespaces", ":max=1G", "form"},
        {"namespaces", "a:max", "other than"}, {"namespaces", "a:top=1G", "other than"},
        {"namespaces", "a:max=101%", "above 100%"}, {"namespaces", "a:max=5", "no unit"},
        {"namespaces", "a:max=1G,max=2G", "quota twice"},
        {"namespaces", "a:;a:", "namespace twice"},
        {"namespaces", "a:max=1%,guaranteed=2%", "more than its maximum"},
        {"namespaces", "a:max=1G,guaranteed=2G", "more than its maximum"},
        {"namespaces", "a:guaranteed=60%;b:guaranteed=60%", "more than 100%"},
        {"namespaces", "a:max=-5%", "negative"},
    };
    struct fk_config *cfg = *state;

    for (size_t i = 0; i < fk_array_size(wrong); i++) {
        int rc = fk_config_set(cfg, wrong[i].key, wrong[i].text, "--test");
        if (rc != -EINVAL)
            fail_msg("%s=%s: %d", wrong[i].key, wrong[i].text, rc);
        assert_has(fk_config_error(cfg), wrong[i].why);
        assert_has(fk_config_error(cfg), wrong[i].key);
        assert_has(fk_config_error(cfg), "--test: ");
        assert_has(fk_config_error(cfg), "; allowed: ");
        assert_string_equal(source_of(cfg, wrong[i].key), "default");
    }
    assert_int_equal(cfg->settings.cpu_cache_bytes, 16 * FK_GIB);
    assert_int_equal(cfg->settings.namespaces.count, 0);

    size_t big = 100000;
    char *text = malloc(big + 1);
    memset(text, 'x', big);
    text[big] = '\0';
    assert_int_equal(fk_config_set(cfg, "redis_host", text, "t"), -EINVAL);
    assert_has(fk_config_error(cfg), "is too long");
    assert_true(strlen(fk_config_error(cfg)) < 300);
    free(text);
}

static void test_messages(void **state)
{
    struct fk_config *cfg = *state;

    setenv("FLEXKV_COPY_THREADS", "99", 1);
    assert_int_equal(fk_config_load_env(cfg), -EINVAL);
    assert_string_equal(fk_config_error(cfg),
                        "environment FLEXKV_COPY_THREADS: copy_threads \"99\" is out of range; "
                        "allowed: integer (threads), 0 to 64");
    assert_int_equal(load(cfg, "# c\n\neviction_policy: best\n"), -EINVAL);
    assert_string_equal(fk_config_error(cfg),
                        "test.yaml:3: eviction_policy \"best\" is not one of the choices; allowed: "
                        "one of lru, lfu, slru, fifo, mru, filo, s3fifo, arc, auto");
    assert_int_equal(fk_config_set(cfg, "redis_password", "geheim\n", "t"), -EINVAL);
    assert_null(strstr(fk_config_error(cfg), "geheim"));
    assert_int_equal(fk_config_set(cfg, "cpu_cache_gbs", "1", "t"), -ENOENT);
    assert_has(fk_config_error(cfg), "did you mean cpu_cache_gb?");
}

static void test_environment(void **state)
{
    struct fk_config *cfg = *state;
    const struct fk_settings *s = &cfg->settings;

    setenv("FLEXKV_CPU_CACHE_GB", "0.25", 1);
    setenv("FLEXKV_SSD_CACHE_DIR", "/a;/b", 1);
    setenv("ENABLE_FLEXKV", "0", 1);
    setenv("FLEXKV_PY_METRICS_PORT", "9000", 1);
    setenv("FLEXKV_CPP_METRICS_PORT", "9001", 1);
    setenv("FLEXKV_KV_SHARED_ACROSS_RANKS_MODE", "rank0_only", 1);
    setenv("FLEXKV_SSD_LAYOUT", "LAYERFIRST", 1);
    setenv("FLEXKV_SSD_IO_DEPTH", "", 1);
    setenv("FLEXKV_EVICTION_POLCY", "arc", 1);
    setenv("MOONCAKE_CONFIG_PATH", "/m.json", 1);
    setenv("FLEXKV_NAMESPACES", "a:max=50%,guaranteed=10%; b : max = 2G, shared = no", 1);
    assert_int_equal(fk_config_load_default(cfg), 0);
    assert_int_equal(s->cpu_cache_bytes, FK_GIB / 4);
    assert_int_equal(s->ssd_cache_dir.count, 2);
    assert_false(s->enable_flexkv);
    assert_int_equal(s->metrics_port, 9000);
    assert_int_equal(s->mla_d2h_mode, FK_SHARED_KV_RANK0_ONLY);
    assert_int_equal(s->ssd_io_depth, 64);
    assert_string_equal(s->mooncake_config_path, "/m.json");
    assert_int_equal(s->namespaces.count, 2);
    assert_string_equal(s->namespaces.item[1].name, "b");
    assert_int_equal(s->namespaces.item[0].max.kind, FK_QUOTA_FRACTION);
    assert_true(s->namespaces.item[0].guaranteed.fraction == 0.1);
    assert_int_equal(s->namespaces.item[1].max.bytes, 2 * FK_GIB);
    assert_true(s->namespaces.item[1].unshared && !s->namespaces.item[0].unshared);
    assert_string_equal(source_of(cfg, "cpu_cache_gb"), "environment FLEXKV_CPU_CACHE_GB");
    assert_string_equal(source_of(cfg, "ssd_io_depth"), "default");
    assert_has(log_text, "unknown option FLEXKV_EVICTION_POLCY; did you mean "
                         "FLEXKV_EVICTION_POLICY?");
    assert_has(log_text, "ssd_layout has no meaning here and is ignored: a block is");
    assert_has(log_text, "FLEXKV_CPP_METRICS_PORT and FLEXKV_PY_METRICS_PORT mean the same option; "
                         "FLEXKV_PY_METRICS_PORT counts");
    assert_has(log_text, "not used by this build yet: metrics_port, mla_d2h_mode");
}

static const char *write_file(const char *name, const char *text)
{
    static char path[256];
    const char *tmp = getenv("TMPDIR");

    snprintf(path, sizeof(path), "%s/fk_config_%d_%s", tmp ? tmp : "/tmp", (int)getpid(), name);
    FILE *f = fopen(path, "w");
    assert_non_null(f);
    fputs(text, f);
    fclose(f);
    return path;
}

/* file > environment > default, and set > all; basic variables go once there is a file. */
static void test_priority(void **state)
{
    struct fk_config *cfg = *state;
    const struct fk_settings *s = &cfg->settings;
    const char *path = write_file("p.yaml", "cpu_cache_gb: 3\nssd_io_depth: 7\n");
    char expected[512];

    setenv("FLEXKV_CONFIG_PATH", path, 1);
    setenv("FLEXKV_CPU_CACHE_GB", "bad, but never read", 1);
    setenv("FLEXKV_SSD_CACHE_GB", "5", 1);
    setenv("FLEXKV_SSD_IO_DEPTH", "9", 1);
    setenv("FLEXKV_COPY_THREADS", "2", 1);
    assert_int_equal(fk_config_set(cfg, "op_timeout_ms", "5", "--op"), 0);
    assert_int_equal(fk_config_load_default(cfg), 0);
    assert_int_equal(s->cpu_cache_bytes, 3 * FK_GIB);
    assert_int_equal(s->ssd_cache_bytes, 0);
    assert_int_equal(s->ssd_io_depth, 7);
    assert_int_equal(s->copy_threads, 2);
    assert_string_equal(s->ssd_cache_dir.item[0], "./ssd_cache");
    snprintf(expected, sizeof(expected), "%s:2", path);
    assert_string_equal(source_of(cfg, "ssd_io_depth"), expected);
    assert_string_equal(source_of(cfg, "op_timeout_ms"), "--op");
    assert_has(log_text, "FLEXKV_SSD_CACHE_GB is not read: the configuration file");
    setenv("FLEXKV_OP_TIMEOUT_MS", "77", 1);
    assert_int_equal(fk_config_load_env(cfg), 0);   /* later, but of lower rank */
    assert_int_equal(s->op_timeout_ms, 5);
    assert_int_equal(s->ssd_io_depth, 7);
    unlink(path);
}

static void test_json_file(void **state)
{
    struct fk_config *cfg = *state;
    const char *path = write_file("a.json",
        "{\n\t\"cpu_cache_gb\": 20,\n\t\"enable_p2p_cpu\": true,\n \"ssd_cache_dir\": \"/x;/y\",\n"
        " \"redis_password\": \"p\\u00e4ss\", \"evict_ratio\": 0.05, \"dtype\": null,\n"
        " \"namespaces\": {\"org/a\": {\"max\": \"25%\"}, \"b\": {\"guaranteed\": \"1G\"}}}\n");

    assert_int_equal(fk_config_load_file(cfg, path), 0);
    unlink(path);
    assert_int_equal(fk_config_finish(cfg), 0);
    assert_int_equal(cfg->settings.cpu_cache_bytes, 20 * FK_GIB);
    assert_true(cfg->settings.enable_p2p_cpu);
    assert_int_equal(cfg->settings.ssd_cache_dir.count, 2);
    assert_string_equal(cfg->settings.redis_password, "p\xc3\xa4ss");
    assert_string_equal(source_of(cfg, "dtype"), "default");
    assert_int_equal(cfg->settings.namespaces.count, 2);
    assert_string_equal(cfg->settings.namespaces.item[0].name, "org/a");

    path = write_file("b.json", "{\"cpu_cache_gb\": 20,}\n");
    assert_int_equal(fk_config_load_file(cfg, path), -EINVAL);
    assert_has(fk_config_error(cfg), "b.json:1: not valid JSON or YAML: ");
    unlink(path);
}

/* As vLLM's own example has it. */
static void test_legacy_form(void **state)
{
    struct fk_config *cfg = *state;
    const struct fk_settings *s = &cfg->settings;

    assert_int_equal(load(cfg,
        "{\"server_recv_port\": \"ipc:///tmp/x\", \"cache_config\": {\"enable_cpu\": true,"
        " \"num_cpu_blocks\": 10240, \"enable_ssd\": true, \"num_ssd_blocks\": 20480,"
        " \"ssd_cache_dir\": [\"/a\", \"/b\"], \"evict_ratio\": 0.05},"
        " \"num_log_interval_requests\": 2000}"), 0);
    assert_int_equal(fk_config_finish(cfg), 0);
    assert_string_equal(s->server_recv_port, "ipc:///tmp/x");
    assert_int_equal(s->cpu_cache_blocks, 10240);
    assert_int_equal(s->ssd_cache_blocks, 20480);
    assert_int_equal(s->ssd_cache_dir.count, 2);
    assert_true(s->evict_ratio == 0.05);
    assert_int_equal(s->num_log_interval_requests, 2000);
    assert_has(log_text, "enable_cpu has no meaning here");
}

static void test_derived(void **state)
{
    struct fk_config *cfg = *state;

    assert_int_equal(load(cfg, "use_hugepage_cpu_buffer: 1\nssd_cache_gb: 9\nenable_ssd: off\n"),
                     0);
    assert_int_equal(fk_config_finish(cfg), 0);
    assert_int_equal(cfg->settings.cpu_memory, FK_CPU_MEMORY_HUGETLB);
    assert_string_equal(source_of(cfg, "cpu_memory"), "test.yaml:1");
    assert_int_equal(cfg->settings.ssd_cache_bytes, 0);
    assert_string_equal(source_of(cfg, "ssd_cache_gb"), "test.yaml:3");
}

static void test_checks_across(void **state)
{
    static const struct { const char *text, *why; } wrong[] = {
        {"ssd_cache_gb: 1\nssd_cache_dir: ''\n", "test.yaml:2: ssd_cache_dir is empty"},
        {"ssd_cache_dir: /a;/a\n", "names a directory twice"},
        {"ssd_io_chunk: 5000\n", "multiple of 4K"},
        {"instance_id: 3\n", "not less than instance_num"},
    };

    for (size_t i = 0; i < fk_array_size(wrong); i++) {
        struct fk_config *cfg;
        assert_int_equal(fk_config_create(&cfg), 0);
        assert_int_equal(load(cfg, wrong[i].text), 0);
        assert_int_equal(fk_config_finish(cfg), -EINVAL);
        assert_has(fk_config_error(cfg), wrong[i].why);
        fk_config_destroy(cfg);
    }
}

static void test_wrong_files(void **state)
{
    static const struct { const char *text, *why; } wrong[] = {
        {"[1, 2]", "option: value pairs are wanted, not a list"},
        {"hello", "not a single value"},
        {"cpu_cache_gb: [1]", "takes one value, not a list"},
        {"cpu_cache_gb: {a: 1}", "takes one value, not a mapping"},
        {"ssd_cache_dir: {a: 1}", "takes one value, not a mapping"},
        {"ssd_cache_dir: [[a]]", "a list of texts is wanted"},
        {"cpu_cache_gb: 1\ncpu_cache_gb: 2\n",
         "test.yaml:2: cpu_cache_gb is given twice, also in line 1"},
        {"a: &x 1\ncopy_threads: *x\n", "aliases are not supported"},
        {"copy_threads: 1\n---\ncopy_threads: 2\n", "more than one document"},
        {"copy_threads: 1\n  bad: [\n", "not valid JSON or YAML"},
        {"{\"a\": 1", "not valid JSON or YAML"},
        {"? [a]\n: 1\n", "the name of an option is wanted"},
        {"redis_host: \"a\\0b\"\n", "a NUL character"},
        {"redis_host: \"a\\x1bb\"\n", "has a control character"},
        {"redis_host: \xff\n", "not a text in UTF-8"},
        {"redis_host: \xb9\xb9\xb9\xb9\xb9\xb9\xb9\xb9\xb9\xb9\xb9\n", "not a text in UTF-8"},
        {"%YAML 1.2\n---\na: b\n", "YAML directives are not supported"},
        {"namespaces: {a: 1}", "namespaces are written as"},
        {"namespaces: {'a:b': {max: 1G}}", "namespaces are written as"},
        {"namespaces: {a: {max: [1]}}", "namespaces are written as"},
        {"namespaces: {a: {max: 7x}}", "namespaces \"a:max=7x,;\" has an unknown unit"},
        {"namespaces: [a]", "takes one value, not a list"},
        {"cpu_cache_gb: .nan", "is not a size"},
        {"evict_ratio: .inf", "is not a number"},
        {"[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[", "nested deeper than"},
    };

    for (size_t i = 0; i < fk_array_size(wrong); i++) {
        struct fk_config *cfg;
        assert_int_equal(fk_config_create(&cfg), 0);
        if (load(cfg, wrong[i].text) != -EINVAL)
            fail_msg("accepted: %s", wrong[i].text);
        assert_has(fk_config_error(cfg), wrong[i].why);
        assert_has(fk_config_error(cfg), "test.yaml");
        fk_config_destroy(cfg);
    }
}

static void test_odd_files(void **state)
{
    static const char *const fine[] = {
        "", "\n", "# only this\n", "---\n", "{}", "null\n", "--- {}\n...\n",
        "cpu_cache_gb:\ncopy_threads: ~\n",
        "unknown: {deep: [1, {a: b}]}\nother: [x]\ngds_layout: [1, 2]\n",
        "namespaces:\n", "namespaces: {}\n", "cache_config: {}\n",
        "cache_config: {model_config: {}}",
        "py_metrics_port: 1\nmetrics_port: 2\n",
    };
    struct fk_config *cfg;

    for (size_t i = 0; i < fk_array_size(fine); i++) {
        assert_int_equal(fk_config_create(&cfg), 0);
        if (load(cfg, fine[i]) || fk_config_finish(cfg))
            fail_msg("refused: %s: %s", fine[i], fk_config_error(cfg));
        fk_config_destroy(cfg);
    }
    cfg = *state;
    assert_int_equal(load(cfg, "x:\ncpu_cache_mb: 1\nconfig_path: /a\n"), 0);
    assert_int_equal(fk_config_finish(cfg), 0);
    assert_has(log_text, "test.yaml:2: unknown option cpu_cache_mb; did you mean cpu_cache_gb?");
    assert_has(log_text, "unknown option config_path");
    assert_string_equal(cfg->settings.config_path, "");
}

/* A file of another program: a few lines, and no time lost. */
static void test_foreign_file(void **state)
{
    struct fk_config *cfg = *state;
    char *text = NULL;
    size_t len, lines = 0;
    FILE *out = open_memstream(&text, &len);

    for (int i = 0; i < 70000; i++)
        fprintf(out, "k%d: 1\n", i);
    fclose(out);
    assert_int_equal(load(cfg, text), 0);
    assert_int_equal(fk_config_finish(cfg), 0);
    for (const char *p = log_text; *p; p++)
        lines += *p == '\n';
    assert_int_equal(lines, 51);
    assert_has(log_text, "further unknown options are not listed");
    free(text);
}

static void test_unreadable_files(void **state)
{
    struct fk_config *cfg = *state;
    char path[256];

    setenv("FLEXKV_CONFIG_PATH", "/nonexistent/f.yaml", 1);
    assert_int_equal(fk_config_load_default(cfg), -ENOENT);
    assert_string_equal(fk_config_error(cfg), "configuration file /nonexistent/f.yaml (from "
                        "environment FLEXKV_CONFIG_PATH): No such file or directory");
    assert_int_equal(fk_config_load_file(cfg, "/"), -EINVAL);
    snprintf(path, sizeof(path), "%s", write_file("fifo", ""));
    unlink(path);
    assert_int_equal(mkfifo(path, 0600), 0);
    assert_int_equal(fk_config_load_file(cfg, path), -EINVAL);   /* and does not hang */
    assert_has(fk_config_error(cfg), "not a regular file");
    unlink(path);
    snprintf(path, sizeof(path), "%s", write_file("big.yaml", ""));
    assert_int_equal(truncate(path, (off_t)(FK_MIB + 1)), 0);
    assert_int_equal(fk_config_load_file(cfg, path), -EFBIG);
    unlink(path);
}

static void test_log_settings(void **state)
{
    struct fk_config *cfg = *state;

    setenv("FLEXKV_LOG_LEVEL", "ERROR", 1);
    setenv("FLEXKV_NONSENSE_OPTION_X", "1", 1);
    assert_int_equal(fk_config_load_default(cfg), 0);
    assert_int_equal(fk_log_get_level(), FK_LOG_ERROR);
    assert_string_equal(log_text, "");   /* the warning is below the level */
}

static void test_print(void **state)
{
    struct fk_config *cfg = *state;
    char *text = NULL, *keys[] = {"num_cpu_blocks", "ssd_cache_dir"}, *bad[] = {"cpu_cach_gb"};
    size_t len;
    FILE *out;

    setenv("FLEXKV_REDIS_PASSWORD", "geheim", 1);
    setenv("FLEXKV_CPU_LAYOUT", "LAYERFIRST", 1);
    setenv("FLEXKV_NAMESPACES", "a:max=12.5%,guaranteed=512M", 1);
    setenv("FLEXKV_CPU_CACHE_GB", "5.6", 1);   /* not a whole number of any unit */
    assert_int_equal(fk_config_load_default(cfg), 0);
    out = open_memstream(&text, &len);
    assert_int_equal(fk_config_print_text(cfg, out, NULL, 0), 0);
    fclose(out);
    assert_null(strstr(text, "geheim"));
    assert_has(text, "a:max=12.5%,guaranteed=512M");
    assert_has(text, " 6012954214B ");
    assert_has(text, "environment FLEXKV_CPU_LAYOUT (ignored)");
    free(text);

    out = open_memstream(&text, &len);
    assert_int_equal(fk_config_print_json(cfg, out, NULL, 0), 0);
    fclose(out);
    json_t *all = json_loads(text, 0, NULL);
    assert_non_null(all);
    assert_int_equal(json_object_size(all), fk_option_count);
    json_t *row = json_object_get(all, "cpu_cache_gb");
    assert_int_equal(json_integer_value(json_object_get(row, "value")), 6012954214);
    assert_string_equal(json_string_value(json_object_get(row, "source")),
                        "environment FLEXKV_CPU_CACHE_GB");
    assert_null(strstr(text, "geheim"));
    json_decref(all);
    free(text);

    out = open_memstream(&text, &len);
    assert_int_equal(fk_config_print_text(cfg, out, keys, 2), 0);
    assert_int_equal(fk_config_print_text(cfg, out, bad, 1), -ENOENT);
    fclose(out);
    assert_has(fk_config_error(cfg), "did you mean cpu_cache_gb?");
    assert_true(strncmp(text, "cpu_cache_blocks ", 17) == 0);
    free(text);
}

static void test_help_and_man(void **state)
{
    char *help = NULL, *man = NULL, name[FK_OPTION_NAME_MAX];
    size_t len;
    FILE *out = open_memstream(&help, &len);

    fk_options_print_help(out);
    fclose(out);
    out = open_memstream(&man, &len);
    fk_options_print_man(out);
    fclose(out);
    for (size_t i = 0; i < fk_option_count; i++) {
        assert_has(help, fk_option_env(&fk_options[i], 0, name));
        assert_has(man, fk_option_env(&fk_options[i], 0, name));
    }
    free(help);
    free(man);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
#define TEST(name) cmocka_unit_test_setup_teardown(name, set_up, tear_down)
        TEST(test_table), TEST(test_defaults), TEST(test_values), TEST(test_wrong_values),
        TEST(test_messages), TEST(test_environment), TEST(test_priority), TEST(test_json_file),
        TEST(test_legacy_form), TEST(test_derived), TEST(test_checks_across),
        TEST(test_wrong_files), TEST(test_odd_files), TEST(test_foreign_file),
        TEST(test_unreadable_files), TEST(test_log_settings),
        TEST(test_print), TEST(test_help_and_man),
    };

    return cmocka_run_group_tests_name("config", tests, NULL, NULL);
}
