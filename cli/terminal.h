/*
 * terminal.h - a full-screen view in a terminal: alternate screen, single keys, its size and its
 * signals. Plain ANSI sequences, no terminfo.
 *
 * Signals are blocked from terminal_prepare on, in the caller's thread and those it starts, and
 * come through only where it waits: so the screen is restored whatever ends the program. One
 * terminal per process, one thread.
 */
#ifndef FK_CLI_TERMINAL_H
#define FK_CLI_TERMINAL_H

#include <stdbool.h>

enum terminal_event { TERMINAL_TIMEOUT, TERMINAL_RESIZED, TERMINAL_QUIT };

/* Standard output is a terminal that understands us. */
bool terminal_usable(void);

/* Before the program starts threads. */
void terminal_prepare(void);

/* To the alternate screen, and back; back may be called at any time. */
void terminal_enter(void);
void terminal_leave(void);

/* Columns; 80 where the terminal does not say. */
int terminal_width(void);

/* Shows lines of text from the top, cut to the terminal's size; the first one in bold. */
void terminal_draw(const char *lines);

/* Waits for q, a signal that ends the program, another size, or the time. */
enum terminal_event terminal_wait(int timeout_ms);

#endif
