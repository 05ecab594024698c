/* fuzz_trace.c - libFuzzer target: any bytes as a trace. Beside the sanitizers' checks: what
 * was accepted is consistent, what was refused has a reason. Corpus: fuzz/corpus/trace. */
#include "trace.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void check(const struct trace *t)
{
    uint64_t ids = 0, new_ids = 0, time_us = 0;

    for (size_t i = 0; i < t->requests.len; i++) {
        const struct trace_request *r = &t->requests.data[i];
        if (r->first_id != ids || r->new_ids > r->n_ids || r->n_ids > t->max_ids || r->time_us < time_us)
            abort();
        for (uint32_t k = 0; k < r->n_ids; k++)
            if (trace_ids(t, r)[k] >= t->unique)
                abort();
        ids += r->n_ids;
        new_ids += r->new_ids;
        time_us = r->time_us;
    }
    if (ids != t->ids.len || new_ids != t->unique)
        abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    char error[128] = "";
    struct trace t;

    int rc = trace_load_memory(&t, "input", (const char *)data, size, 0, error, sizeof(error));
    if (rc ? !error[0] : error[0] != 0)
        abort();
    if (!rc)
        check(&t);
    trace_free(&t);
    return 0;
}
