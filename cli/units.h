/* units.h - numbers as people read them: "15.6 GiB", "78.1 %", "2 h 03 min". No state. */
#ifndef FK_CLI_UNITS_H
#define FK_CLI_UNITS_H

#include <stdint.h>

struct unit_text {
    char text[32];
};

/* Binary units, three digits. */
struct unit_text unit_bytes(double bytes);
/* GB/s, MB/s, ...: decimal, as networks and disks are sold. */
struct unit_text unit_rate(double bytes_per_second);
/* part of whole; "-" where there is no whole. */
struct unit_text unit_percent(double part, double whole);
struct unit_text unit_duration(double seconds);

#endif
