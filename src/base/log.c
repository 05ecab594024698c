/* log.c - see log.h. Touches stderr and its own statics only. */
#include "base/log.h"

#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static const char *const level_names[] = {
    "DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL", "OFF"
};
static _Atomic int current_level = FK_LOG_INFO;
static char current_prefix[32] = "FLEXKV";
static fk_log_sink_fn *current_sink;
static void *current_sink_arg;

void fk_log_set_level(enum fk_log_level level)
{
    atomic_store_explicit(&current_level, (int)level, memory_order_relaxed);
}

enum fk_log_level fk_log_get_level(void)
{
    return (enum fk_log_level)atomic_load_explicit(&current_level, memory_order_relaxed);
}

void fk_log_set_prefix(const char *prefix)
{
    snprintf(current_prefix, sizeof(current_prefix), "%s", prefix);
}

void fk_log_set_sink(fk_log_sink_fn *sink, void *arg)
{
    current_sink = sink;
    current_sink_arg = arg;
}

void fk_log_write(enum fk_log_level level, const char *fmt, ...)
{
    char line[1024];
    struct timespec now;
    struct tm tm;
    va_list ap;

    clock_gettime(CLOCK_REALTIME, &now);
    localtime_r(&now.tv_sec, &tm);
    int len = snprintf(line, sizeof(line), "[%s] %s %02d-%02d %02d:%02d:%02d.%03ld ",
                       current_prefix, level_names[level], tm.tm_mon + 1, tm.tm_mday,
                       tm.tm_hour, tm.tm_min, tm.tm_sec, now.tv_nsec / 1000000);
    va_start(ap, fmt);
    int more = vsnprintf(line + len, sizeof(line) - (size_t)len - 1, fmt, ap);
    va_end(ap);
    len += more < 0 ? 0 : more;
    if (len > (int)sizeof(line) - 2)
        len = (int)sizeof(line) - 2;
    if (current_sink) {
        line[len] = '\0';
        current_sink(level, line, current_sink_arg);
        return;
    }
    line[len] = '\n';
    ssize_t ignored = write(STDERR_FILENO, line, (size_t)len + 1);
    (void)ignored;
}
