/* fail.c - see fail.h. */
#include "base/fail.h"

#include <stdarg.h>
#include <stdio.h>

int fk_fail(char *error, size_t bytes, int rc, const char *fmt, ...)
{
    va_list ap;

    va_start(ap, fmt);
    vsnprintf(error, bytes, fmt, ap);
    va_end(ap);
    return rc;
}
