/*
 * log.h - the one logger. Levels and prefix as users of FLEXKV_LOGGING_PREFIX and
 * FLEXKV_LOG_LEVEL know them. One line per call, written with one write(2) to
 * stderr, so lines of several threads never mix. Any thread, no locks.
 *
 * Rule: the first function that decides that something is an error logs it, once,
 * with the values that matter; everyone above passes the code on.
 */
#ifndef FK_BASE_LOG_H
#define FK_BASE_LOG_H

enum fk_log_level {
    FK_LOG_DEBUG, FK_LOG_INFO, FK_LOG_WARNING, FK_LOG_ERROR, FK_LOG_CRITICAL, FK_LOG_OFF
};

/* A sink gets the finished line without its newline. NULL restores stderr. */
typedef void fk_log_sink_fn(enum fk_log_level level, const char *line, void *arg);

void fk_log_set_level(enum fk_log_level level);
enum fk_log_level fk_log_get_level(void);
void fk_log_set_prefix(const char *prefix);   /* copied, at most 31 bytes kept */
void fk_log_set_sink(fk_log_sink_fn *sink, void *arg);

void fk_log_write(enum fk_log_level level, const char *fmt, ...)
    __attribute__((format(printf, 2, 3)));

#define fk_log(level, ...) \
    do { if ((level) >= fk_log_get_level()) fk_log_write((level), __VA_ARGS__); } while (0)
#define fk_debug(...)    fk_log(FK_LOG_DEBUG, __VA_ARGS__)
#define fk_info(...)     fk_log(FK_LOG_INFO, __VA_ARGS__)
#define fk_warn(...)     fk_log(FK_LOG_WARNING, __VA_ARGS__)
#define fk_error(...)    fk_log(FK_LOG_ERROR, __VA_ARGS__)

#endif
