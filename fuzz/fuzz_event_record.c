/*
 * fuzz_event_record.c - libFuzzer target: any bytes as a recording of KV events. Beside the sanitizers'
 * checks: frames lie within the message, what was refused has a reason. So that more than the first
 * checksum is reached, each input is also written as messages and read back.
 */
#include "events/record.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static size_t read_all(const void *data, size_t size)
{
    FILE *in = fmemopen((void *)(uintptr_t)data, size, "r");
    struct fk_record r = { 0 };
    char why[128] = "";
    size_t messages = 0;

    if (!in)
        return 0;
    int rc = fk_record_check_header(in, why, sizeof(why));
    while (!rc && (rc = fk_record_read(in, &r, why, sizeof(why))) == 1) {
        for (size_t i = 0; i < r.n_frames; i++) {
            const unsigned char *p = r.frame[i].data;
            if (p < r.body.data || p + r.frame[i].bytes > r.body.data + r.body.len)
                __builtin_trap();
        }
        messages++;
        rc = 0;
    }
    if (rc && !why[0])
        __builtin_trap();
    fk_record_free(&r);
    fclose(in);
    return messages;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct fk_record r = { 0 };
    char *text = NULL;
    size_t bytes = 0, wrote = 0;

    if (size)
        read_all(data, size);
    FILE *out = open_memstream(&text, &bytes);
    if (!out)
        return 0;
    fk_record_begin(out);
    for (size_t at = 0; at < size && wrote < 16; wrote++) {
        size_t n = fk_min((size_t)data[at], size - at);
        struct fk_frame frames[2] = { { data + at, n }, { data, size } };
        fk_record_write(out, &r, data[at], frames, data[at] % 3);
        at += n + 1;
    }
    fclose(out);
    if (read_all(text, bytes) != wrote)
        __builtin_trap();
    fk_record_free(&r);
    free(text);
    return 0;
}
