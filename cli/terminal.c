/* terminal.c - see terminal.h. */
#include "terminal.h"

#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <termios.h>

#include "base/clock.h"
#include "base/util.h"

#define ENTER "\033[?1049h\033[?25l"        /* alternate screen, no cursor */
#define LEAVE "\033[?25h\033[?1049l"

static const int ending[] = { SIGINT, SIGTERM, SIGHUP, SIGQUIT };
static volatile sig_atomic_t got_end, got_stop, got_resize;
static struct termios before;
static bool entered, keys_from_terminal;
static sigset_t waiting_mask;               /* of the time before terminal_prepare */

static void on_end(int sig) { got_end = sig; }
static void on_stop(int sig) { got_stop = sig; }
static void on_resize(int sig) { got_resize = sig; }

bool terminal_usable(void)
{
    const char *kind = getenv("TERM");

    return isatty(STDOUT_FILENO) && kind && *kind && strcmp(kind, "dumb") != 0;
}

void terminal_prepare(void)
{
    /* No SA_RESTART: a write to a terminal that is held back (Ctrl-S) must be interruptible. */
    struct sigaction end = { .sa_handler = on_end }, stop = { .sa_handler = on_stop },
                     resize = { .sa_handler = on_resize };
    sigset_t set;

    sigemptyset(&set);
    for (size_t i = 0; i < fk_array_size(ending); i++) {
        sigaddset(&set, ending[i]);
        sigaction(ending[i], &end, NULL);
    }
    sigaddset(&set, SIGTSTP);
    sigaddset(&set, SIGWINCH);
    sigaction(SIGTSTP, &stop, NULL);
    sigaction(SIGWINCH, &resize, NULL);
    signal(SIGPIPE, SIG_IGN);
    pthread_sigmask(SIG_BLOCK, &set, &waiting_mask);
}

/* All of it, unless the terminal is gone or somebody wants us to end. */
static void put(const char *text, size_t len)
{
    sigset_t blocked;

    pthread_sigmask(SIG_SETMASK, &waiting_mask, &blocked);
    while (len > 0) {
        ssize_t n = write(STDOUT_FILENO, text, len);
        if (n < 0 && errno == EINTR && !got_end)
            continue;
        if (n < 0) {
            got_end = got_end ? got_end : SIGHUP;
            break;
        }
        text += n;
        len -= (size_t)n;
    }
    pthread_sigmask(SIG_SETMASK, &blocked, NULL);
}

void terminal_enter(void)
{
    keys_from_terminal = isatty(STDIN_FILENO) && tcgetattr(STDIN_FILENO, &before) == 0;
    if (keys_from_terminal) {
        struct termios raw = before;
        raw.c_lflag &= ~(tcflag_t)(ICANON | ECHO);
        raw.c_cc[VMIN] = 0;
        raw.c_cc[VTIME] = 0;
        tcsetattr(STDIN_FILENO, TCSANOW, &raw);
    }
    entered = true;
    put(ENTER, strlen(ENTER));
}

void terminal_leave(void)
{
    if (!entered)
        return;
    entered = false;
    put(LEAVE, strlen(LEAVE));
    if (keys_from_terminal)
        tcsetattr(STDIN_FILENO, TCSANOW, &before);
}

static struct winsize size_now(void)
{
    struct winsize size;

    if (ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) || !size.ws_col || !size.ws_row)
        size = (struct winsize){ .ws_col = 80, .ws_row = 24 };
    return size;
}

int terminal_width(void)
{
    return size_now().ws_col;
}

void terminal_draw(const char *lines)
{
    struct winsize size = size_now();
    char *frame = NULL;
    size_t len = 0;
    FILE *out = open_memstream(&frame, &len);

    if (!out)
        return;
    fputs("\033[H", out);
    for (int row = 0; *lines && row < size.ws_row; row++) {
        size_t line = strcspn(lines, "\n");
        fprintf(out, "%s%s%.*s%s\033[K", row ? "\r\n" : "", row ? "" : "\033[1m",
                (int)fk_min(line, (size_t)size.ws_col), lines, row ? "" : "\033[0m");
        lines += line + (lines[line] == '\n');
    }
    fputs("\033[J", out);
    if (fclose(out) == 0)
        put(frame, len);
    free(frame);
}

/* The terminal is given back while the program is stopped. */
static void stop_here(void)
{
    got_stop = 0;
    terminal_leave();
    raise(SIGSTOP);
    terminal_enter();
}

/* q was pressed, or no key will ever come again. */
static bool wants_to_quit(void)
{
    char keys[64];
    ssize_t n = read(STDIN_FILENO, keys, sizeof(keys));

    if (n < 0)
        return errno != EINTR && errno != EAGAIN;
    return n == 0 || memchr(keys, 'q', (size_t)n) || memchr(keys, 'Q', (size_t)n);
}

enum terminal_event terminal_wait(int timeout_ms)
{
    uint64_t deadline = fk_clock_ns() + (uint64_t)timeout_ms * 1000000, now;

    while ((now = fk_clock_ns()) < deadline && !got_end) {
        struct timespec rest = { (time_t)((deadline - now) / 1000000000),
                                 (long)((deadline - now) % 1000000000) };
        struct pollfd key = { .fd = keys_from_terminal ? STDIN_FILENO : -1, .events = POLLIN };
        int n = ppoll(&key, 1, &rest, &waiting_mask);
        if (n > 0 && wants_to_quit())
            return TERMINAL_QUIT;
        if (got_stop && !got_end)
            stop_here();
        if (got_resize) {
            got_resize = 0;
            return TERMINAL_RESIZED;
        }
    }
    return got_end ? TERMINAL_QUIT : TERMINAL_TIMEOUT;
}
