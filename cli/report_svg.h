/*
 * report_svg.h - the little that charts need: a plot area with axes, ticks at round numbers,
 * text escaped for HTML. Writes SVG to a FILE; colours are classes that the page's style
 * defines. No state but the struct. Caller: report_html.c.
 */
#ifndef FK_CLI_REPORT_SVG_H
#define FK_CLI_REPORT_SVG_H

#include <stdbool.h>
#include <stdio.h>

enum svg_unit { SVG_PLAIN, SVG_PERCENT, SVG_BYTES, SVG_MICROSECONDS, SVG_TIME };

struct svg_plot {
    FILE *out;
    double width, height;           /* of the whole picture */
    double left, right, top, bottom;    /* margins around the plot area */
    double x_max, y_max;            /* values at the ends; both axes begin at 0 */
    enum svg_unit x_unit, y_unit;
    const char *x_label, *title;    /* title: for those who can't see it */
};

void svg_begin(const struct svg_plot *p);       /* <svg>, grid, ticks and their labels */
void svg_end(const struct svg_plot *p);
double svg_x(const struct svg_plot *p, double x);
double svg_y(const struct svg_plot *p, double y);

/* A bar from y0 to y1 over [x0, x1), with a hair of room beside it. */
void svg_bar(const struct svg_plot *p, const char *css, double x0, double x1, double y0, double y1);
/* An invisible column over [x0, x1) that shows the text when pointed at. */
void svg_hover(const struct svg_plot *p, double x0, double x1, const char *text);
void svg_escape(FILE *out, const char *text);

/* The smallest of 1, 2, 5 x 10^k (bytes: 2^k; time: 1, 5, 15, 30 s/min, h) that gives at most
 * `ticks` steps up to max. */
double svg_step(double max, int ticks, enum svg_unit unit);
void svg_format(double value, enum svg_unit unit, char *buf, size_t size);

#endif
