/* top_screen.h - the screen of `flexkv top`, as lines of text. Knows no terminal and no node. */
#ifndef FK_CLI_TOP_SCREEN_H
#define FK_CLI_TOP_SCREEN_H

#include <stdio.h>
#include <time.h>

#include "status_json.h"

struct top_view {
    const struct status *now;           /* NULL: nobody has answered yet */
    const struct status *before;        /* NULL: no rates yet */
    double seconds;                     /* from before to now */
    time_t silent_since;                /* 0: the last question was answered */
    const char *silent_why;
    int width;                          /* of the bars, with what stands beside them */
};

void top_screen_print(const struct top_view *v, FILE *out);

#endif
