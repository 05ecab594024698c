/* units.c - see units.h. */
#include "units.h"

#include <stdio.h>

/* 999.6 must not become "1000" of the smaller unit. */
#define NEXT_UNIT_FROM 999.5

static struct unit_text scaled(double value, double step, const char *const *units, int n_units)
{
    struct unit_text out;
    int u = 0;

    for (; value >= NEXT_UNIT_FROM && u < n_units - 1; u++)
        value /= step;
    int decimals = u == 0 || value >= 99.95 ? 0 : value >= 9.995 ? 1 : 2;
    snprintf(out.text, sizeof(out.text), "%.*f %s", decimals, value, units[u]);
    return out;
}

struct unit_text unit_bytes(double bytes)
{
    static const char *const units[] = { "B", "KiB", "MiB", "GiB", "TiB", "PiB" };

    return scaled(bytes, 1024, units, 6);
}

struct unit_text unit_rate(double bytes_per_second)
{
    static const char *const units[] = { "B/s", "kB/s", "MB/s", "GB/s", "TB/s" };

    return scaled(bytes_per_second, 1000, units, 5);
}

struct unit_text unit_percent(double part, double whole)
{
    struct unit_text out = { "-" };

    if (whole > 0)
        snprintf(out.text, sizeof(out.text), "%.1f %%", 100 * part / whole);
    return out;
}

struct unit_text unit_duration(double seconds)
{
    struct unit_text out;
    uint64_t s = seconds > 0 ? (uint64_t)seconds : 0, m = s / 60, h = m / 60, d = h / 24;

    if (m == 0)
        snprintf(out.text, sizeof(out.text), "%u s", (unsigned)s);
    else if (h == 0)
        snprintf(out.text, sizeof(out.text), "%u min %02u s", (unsigned)m, (unsigned)(s % 60));
    else if (d == 0)
        snprintf(out.text, sizeof(out.text), "%u h %02u min", (unsigned)h, (unsigned)(m % 60));
    else
        snprintf(out.text, sizeof(out.text), "%u d %02u h", (unsigned)d, (unsigned)(h % 24));
    return out;
}
