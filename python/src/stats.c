/* stats.c - flexkv_stats as a dict: what Node.stats returns. */
#include <stddef.h>

#include "flexkv_py.h"

struct counter {
    const char *name;
    size_t offset;
};

#define TIER(field) { #field, offsetof(flexkv_tier_stats, field) }
static const struct counter tier_counters[] = {
    TIER(slots), TIER(free_slots), TIER(hit_blocks), TIER(stored_blocks), TIER(evicted_blocks),
    TIER(bytes_read), TIER(bytes_written), TIER(errors), { 0 },
};

#define NODE(field) { #field, offsetof(flexkv_stats, field) }
static const struct counter node_counters[] = {
    NODE(matches), NODE(match_blocks), NODE(miss_blocks), NODE(gets), NODE(puts), NODE(prefetches),
    NODE(cancelled), NODE(timeouts), NODE(get_blocks), NODE(get_failed_blocks), NODE(put_blocks),
    NODE(put_dropped_blocks), NODE(blocks), NODE(index_bytes), NODE(leases), NODE(operations),
    NODE(write_backlog_blocks), NODE(declined_blocks), NODE(events), NODE(events_taken),
    NODE(event_resyncs), { 0 },
};

/* Takes the reference to value, which may be NULL. */
static bool add(PyObject *dict, const char *name, PyObject *value)
{
    bool ok = dict && value && PyDict_SetItemString(dict, name, value) == 0;

    Py_XDECREF(value);
    return ok;
}

static PyObject *counters_dict(const struct counter *list, const void *values)
{
    PyObject *dict = PyDict_New();

    for (; dict && list->name; list++) {
        uint64_t value = *(const uint64_t *)(const void *)((const char *)values + list->offset);
        if (!add(dict, list->name, PyLong_FromUnsignedLongLong(value)))
            Py_CLEAR(dict);
    }
    return dict;
}

PyObject *fkpy_stats_dict(const flexkv_stats *stats)
{
    PyObject *dict = counters_dict(node_counters, stats);

    if (!add(dict, "cpu", counters_dict(tier_counters, &stats->cpu)) ||
        !add(dict, "ssd", counters_dict(tier_counters, &stats->ssd)) ||
        !add(dict, "peer", counters_dict(tier_counters, &stats->peer)))
        Py_CLEAR(dict);
    return dict;
}
