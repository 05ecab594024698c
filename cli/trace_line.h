/*
 * trace_line.h - one line of a trace: a strict JSON scanner for the one object a line holds.
 *
 * Why not jansson: it builds a tree with an allocation per number. Measured on the agentic
 * trace (2.8 million ids in 17 MB): 6 times slower than all of trace.c, and it dominated a
 * whole --hit-only run. Here numbers go straight into the caller's array.
 * No I/O, no state. Caller: trace.c.
 */
#ifndef FK_CLI_TRACE_LINE_H
#define FK_CLI_TRACE_LINE_H

#include "base/util.h"

struct trace_line {
    double timestamp_ms;
    uint64_t input_tokens, output_tokens;
    FK_VEC(uint64_t) ids;           /* as in the file; reused from line to line */
};

/*
 * Parses text[0, len). Unknown fields are skipped (their values must be JSON all the same).
 * -EINVAL or -ENOMEM: *why is what is wrong, *at the offset of it.
 */
int trace_line_parse(const char *text, size_t len, struct trace_line *out, const char **why,
                     size_t *at);

#endif
