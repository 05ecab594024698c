/*
 * trace.h - reads request traces (.jsonl, .jsonl.gz) into flat arrays.
 *
 * One JSON object per line: {"timestamp": ms, "input_length": tokens, "output_length":
 * tokens, "hash_ids": [id, ...]}; an id stands for 512 tokens with their whole prefix.
 * Ids are renumbered 0, 1, 2, ... in the order of their first appearance, so memory is 4
 * bytes per id of the trace plus 20 per different id (while loading), and "was it seen
 * before" is a comparison:
 *
 *     requests   r0          r1               r2
 *     first,n    |0,3|       |3,4|            |7,2|
 *     ids        0 1 2       0 1 3 4          0 5        new_ids 3, 2, 1; unique 6
 *
 * Bytes come from outside: everything is checked, errors say FILE:LINE and what is wrong.
 * Touches the files named. No locks: one thread. Callers: replay, fuzz_trace, test_trace.
 */
#ifndef FK_CLI_TRACE_H
#define FK_CLI_TRACE_H

#include "base/util.h"

#define TRACE_TOKENS_PER_ID 512u
#define TRACE_MAX_LINE_BYTES (64u << 20)

struct trace_request {
    uint64_t time_us;               /* from the start of the trace; never goes back */
    uint64_t first_id;              /* ids [first_id, first_id + n_ids) of trace.ids */
    uint32_t n_ids;
    uint32_t new_ids;               /* the last new_ids of them were not seen before */
    uint64_t input_tokens, output_tokens;
};

struct trace_id_slot { uint64_t id_plus_1; uint32_t index; };

struct trace {
    FK_VEC(struct trace_request) requests;
    FK_VEC(uint32_t) ids;
    FK_VEC(uint32_t) parents;       /* of each different id: the one before it, or FK_NONE */
    uint32_t unique;                /* different ids */
    uint32_t max_ids;               /* of one request */
    /* while loading: numbers given to the ids of the file */
    struct trace_id_slot *map;
    uint32_t map_slots, map_used;
};

/* The ids in the files mean the same in all of them: parts of one trace. Else ids of
 * different files are different blocks. */
#define TRACE_JOIN 1u

/*
 * Loads the files one after the other; time goes on from file to file. Stops after limit
 * requests (0: no limit). -EINVAL, -ENOMEM, -EIO, ...: error says why; trace_free is still
 * due.
 */
int trace_load(struct trace *t, const char *const *paths, size_t n_paths, uint64_t limit,
               unsigned flags, char *error, size_t error_bytes);
void trace_free(struct trace *t);

/* The same for bytes in memory, given as the file called name. */
int trace_load_memory(struct trace *t, const char *name, const char *data, size_t bytes,
                      uint64_t limit, char *error, size_t error_bytes);

static inline const uint32_t *trace_ids(const struct trace *t, const struct trace_request *r)
{
    return t->ids.data + r->first_id;
}

#endif
