/* error.c - version, and the calling thread's last error. */
#include <stdarg.h>
#include <stdio.h>

#include "api/node_impl.h"

static _Thread_local char last_error[512];

int fk_api_fail(int rc, const char *fmt, ...)
{
    va_list ap;

    va_start(ap, fmt);
    vsnprintf(last_error, sizeof(last_error), fmt, ap);
    va_end(ap);
    return rc;
}

FLEXKV_API const char *flexkv_last_error(void)
{
    return last_error;
}

FLEXKV_API const char *flexkv_version(void)
{
    return FLEXKV_VERSION;
}
