/* report_html.h - the result of a replay as one self-contained HTML page with SVG charts.
 * No scripts, no fonts, nothing loaded from elsewhere. Caller: replay.c. */
#ifndef FK_CLI_REPORT_HTML_H
#define FK_CLI_REPORT_HTML_H

#include <stdio.h>

struct replay_result;

void report_html_write(const struct replay_result *res, FILE *out);

#endif
