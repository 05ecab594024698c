/* fail.h - an error's line for whoever asked, in his buffer, and its code. Any thread, no state. */
#ifndef FK_BASE_FAIL_H
#define FK_BASE_FAIL_H

#include <stddef.h>

/* Returns rc. */
int fk_fail(char *error, size_t bytes, int rc, const char *fmt, ...) __attribute__((format(printf, 4, 5)));

#endif
