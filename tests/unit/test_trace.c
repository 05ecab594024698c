/* test_trace.c - cli/trace.c: what is read, what is refused and with which words. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <cmocka.h>
#include <zlib.h>

#include "trace.h"

static char error[256];

static int load(struct trace *t, const char *text, uint64_t limit)
{
    error[0] = 0;
    return trace_load_memory(t, "t", text, strlen(text), limit, error, sizeof(error));
}

#define R(ts, ids) "{\"timestamp\": " ts ", \"input_length\": 7, \"output_length\": 3, \"hash_ids\": " ids "}\n"

static void test_reads_requests(void **state)
{
    struct trace t;

    assert_int_equal(load(&t, R("0", "[5, 9, 7]") "\n  \n" R("1.5", "[5,9,8]") R("2e3", "[]"), 0), 0);
    assert_int_equal(t.requests.len, 3);
    assert_int_equal(t.unique, 4);
    assert_int_equal(t.max_ids, 3);
    assert_int_equal(t.ids.len, 6);
    const uint32_t want[] = { 0, 1, 2, 0, 1, 3 };
    assert_memory_equal(t.ids.data, want, sizeof(want));
    const struct trace_request *r = t.requests.data;
    assert_int_equal(r[0].new_ids, 3);
    assert_int_equal(r[1].new_ids, 1);
    assert_int_equal(r[2].n_ids, 0);
    assert_int_equal(r[1].time_us, 1500);
    assert_int_equal(r[2].time_us, 2000000);
    assert_int_equal(r[0].input_tokens, 7);
    assert_int_equal(r[0].output_tokens, 3);
    trace_free(&t);
}

static void test_last_line_without_newline(void **state)
{
    struct trace t;

    assert_int_equal(load(&t, "{\"hash_ids\":[1],\"input_length\":1,\"timestamp\":0}", 0), 0);
    assert_int_equal(t.requests.len, 1);
    trace_free(&t);
}

static void test_unknown_fields_are_skipped(void **state)
{
    struct trace t;

    assert_int_equal(load(&t, "{\"a\": {\"b\": [1, -2.5e-3, \"\\u00e9\\\"\", true, false, null, {}]},"
                          "\"timestamp\": 0, \"input_length\": 1, \"hash_ids\": [1]}", 0), 0);
    assert_int_equal(t.requests.len, 1);
    trace_free(&t);
}

static void test_large_ids(void **state)
{
    struct trace t;

    assert_int_equal(load(&t, R("0", "[0, 9223372036854775807, 9223372036854775808]"), 0), 0);
    assert_int_equal(t.unique, 3);
    trace_free(&t);
}

static void test_limit_stops_before_later_errors(void **state)
{
    struct trace t;

    assert_int_equal(load(&t, R("0", "[1]") R("1", "[2]") "nonsense\n", 2), 0);
    assert_int_equal(t.requests.len, 2);
    trace_free(&t);
}

static void test_refuses(void **state)
{
    static const struct { const char *text, *says; } cases[] = {
        { "[1]\n", "t:1: a line must be a JSON object" },
        { "\n\n{\"timestamp\": 0}\n", "t:3: no \"input_length\"" },
        { "{\"timestamp\": 0, \"input_length\": 1}\n", "no \"hash_ids\"" },
        { "{}\n", "no \"timestamp\"" },
        { R("-1", "[1]"), "negative timestamp" },
        { R("NaN", "[1]"), "expected a number" },
        { R("Infinity", "[1]"), "expected a number" },
        { R("1e400", "[1]"), "timestamp too large" },
        { R("\"0\"", "[1]"), "expected a number" },
        { R("01", "[1]"), "leading zero" },
        { R("0", "[-1]"), "negative number" },
        { R("0", "[1.5]"), "expected a whole number" },
        { R("0", "[9223372036854775809]"), "number too large" },
        { R("0", "[99999999999999999999999]"), "number too large" },
        { R("0", "[1,]"), "expected a whole number" },
        { R("0", "[1 2]"), "expected ',' or ']'" },
        { R("0", "7"), "hash_ids must be a list" },
        { R("0", "[true]"), "expected a whole number" },
        { R("0", "[1, 1]"), "another prefix" },
        { R("0", "[1, 2]") R("0", "[2]"), "t:2: hash_ids: id 2 at position 0 has another prefix" },
        { R("5", "[1]") R("4", "[1]"), "t:2: timestamp 4 is before" },
        { "{\"timestamp\":0,\"timestamp\":0,\"input_length\":1,\"hash_ids\":[]}", "\"timestamp\" twice" },
        { "{\"timestamp\":0,\"input_length\":-5,\"hash_ids\":[]}", "negative number" },
        { "{\"timestamp\":0,\"input_length\":1,\"hash_ids\":[]} x", "something follows" },
        { "{\"timestamp\":0,\"input_length\":1,\"hash_ids\":[", "expected a whole number" },
        { "{\"x\":\"\\q\"}", "bad escape" },
        { "{\"x\":\"abc", "string without its end" },
        { "{\"x\":nul}", "expected a JSON value" },
        { "{\"x\":1.}", "expected a digit" },
        { "{\"x\" 1}", "expected ':'" },
        { "{\"x\":[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[1", "nested too deep" },
    };
    struct trace t;

    for (size_t i = 0; i < fk_array_size(cases); i++) {
        if (load(&t, cases[i].text, 0) != -EINVAL || !strstr(error, cases[i].says))
            fail_msg("case %zu: \"%s\" instead of \"%s\"", i, error, cases[i].says);
        trace_free(&t);
    }
}

static void write_file(const char *path, const char *text, bool compressed)
{
    gzFile f = gzopen(path, compressed ? "wb" : "wbT");

    assert_non_null(f);
    assert_int_equal(gzwrite(f, text, (unsigned)strlen(text)), strlen(text));
    assert_int_equal(gzclose(f), Z_OK);
}

static void test_files(void **state)
{
    char dir[] = "/tmp/test_trace.XXXXXX", a[64], b[64];
    struct trace t;

    assert_non_null(mkdtemp(dir));
    snprintf(a, sizeof(a), "%s/a.jsonl", dir);
    snprintf(b, sizeof(b), "%s/b.jsonl.gz", dir);
    write_file(a, R("0", "[1, 2]") R("10", "[1, 3]"), false);
    write_file(b, R("0", "[1, 2]") R("5", "[1, 4]"), true);
    const char *paths[] = { a, b };

    assert_int_equal(trace_load(&t, paths, 2, 0, 0, error, sizeof(error)), 0);
    assert_int_equal(t.unique, 6);          /* ids of each file for itself */
    assert_int_equal(t.requests.data[2].time_us, 10000);
    assert_int_equal(t.requests.data[3].time_us, 15000);
    trace_free(&t);
    assert_int_equal(trace_load(&t, paths, 2, 0, TRACE_JOIN, error, sizeof(error)), 0);
    assert_int_equal(t.unique, 4);
    trace_free(&t);

    assert_int_equal(truncate(b, 40), 0);
    assert_int_equal(trace_load(&t, paths, 2, 0, 0, error, sizeof(error)), -EINVAL);
    assert_non_null(strstr(error, "b.jsonl.gz: "));
    trace_free(&t);
    const char *bad[] = { dir };
    assert_int_equal(trace_load(&t, bad, 1, 0, 0, error, sizeof(error)), -EISDIR);
    trace_free(&t);
    unlink(a);
    unlink(b);
    rmdir(dir);
    assert_int_equal(trace_load(&t, paths, 2, 0, 0, error, sizeof(error)), -ENOENT);
    assert_non_null(strstr(error, "a.jsonl: No such file"));
    trace_free(&t);
}

static void test_many_ids(void **state)
{
    struct trace t;
    size_t bytes = 0, cap = 3u << 20;
    char *text = malloc(cap);

    bytes += (size_t)sprintf(text, "{\"timestamp\":0,\"input_length\":1,\"hash_ids\":[");
    for (unsigned i = 0; i < 200000; i++)
        bytes += (size_t)sprintf(text + bytes, "%s%u", i ? "," : "", i * 7);
    bytes += (size_t)sprintf(text + bytes, "]}\n");
    assert_int_equal(trace_load_memory(&t, "t", text, bytes, 0, error, sizeof(error)), 0);
    assert_int_equal(t.unique, 200000);
    assert_int_equal(t.ids.data[199999], 199999);
    trace_free(&t);
    free(text);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_reads_requests),
        cmocka_unit_test(test_last_line_without_newline),
        cmocka_unit_test(test_unknown_fields_are_skipped),
        cmocka_unit_test(test_large_ids),
        cmocka_unit_test(test_limit_stops_before_later_errors),
        cmocka_unit_test(test_refuses),
        cmocka_unit_test(test_files),
        cmocka_unit_test(test_many_ids),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
