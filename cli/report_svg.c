/* report_svg.c - see report_svg.h. */
#include "report_svg.h"

#include <math.h>

static double step_decimal(double want)
{
    double base = pow(10, floor(log10(want)));

    for (int i = 0; i < 3; i++) {
        static const double steps[] = { 1, 2, 5 };
        if (base * steps[i] >= want * 0.999999)
            return base * steps[i];
    }
    return base * 10;
}

static double step_time(double want)
{
    static const double steps[] = { 1, 5, 15, 30, 60, 300, 600, 900, 1800, 3600, 7200, 10800, 21600,
                                    43200, 86400 };

    for (size_t i = 0; i < sizeof(steps) / sizeof(*steps); i++)
        if (steps[i] >= want)
            return steps[i];
    return ceil(want / 86400) * 86400;
}

double svg_step(double max, int ticks, enum svg_unit unit)
{
    double want = max / ticks;

    if (!(want > 0))
        return 1;
    if (unit == SVG_BYTES)
        return exp2(ceil(log2(want)));
    if (unit == SVG_TIME && want > 0.5)
        return step_time(want);
    return step_decimal(want);
}

static void format_bytes(double v, char *buf, size_t size)
{
    static const char *const units[] = { "B", "KiB", "MiB", "GiB", "TiB" };
    int u = 0;

    while (u < 4 && v >= 1024) {
        v /= 1024;
        u++;
    }
    snprintf(buf, size, v < 10 && v != floor(v) ? "%.2f %s" : v < 100 && v != floor(v) ? "%.1f %s" :
             "%.0f %s", v, units[u]);
}

static void format_us(double v, char *buf, size_t size)
{
    static const char *const units[] = { "µs", "ms", "s" };
    int u = 0;

    while (u < 2 && v >= 999.5) {
        v /= 1000;
        u++;
    }
    snprintf(buf, size, "%.3g %s", v, units[u]);
}

static void format_time(double v, char *buf, size_t size)
{
    int s = (int)lround(v);

    if (v == 0)
        snprintf(buf, size, "0");
    else if (v < 60)
        snprintf(buf, size, "%.3g s", v);
    else if (s < 3600)
        snprintf(buf, size, s % 60 ? "%d min %d s" : "%d min", s / 60, s % 60);
    else
        snprintf(buf, size, s % 3600 / 60 ? "%d h %d min" : "%d h", s / 3600, s % 3600 / 60);
}

void svg_format(double value, enum svg_unit unit, char *buf, size_t size)
{
    switch (unit) {
    case SVG_PERCENT: snprintf(buf, size, "%.3g %%", value * 100); break;
    case SVG_BYTES: format_bytes(value, buf, size); break;
    case SVG_MICROSECONDS: format_us(value, buf, size); break;
    case SVG_TIME: format_time(value, buf, size); break;
    case SVG_PLAIN: snprintf(buf, size, "%.10g", value); break;
    }
}

double svg_x(const struct svg_plot *p, double x)
{
    return p->left + x / p->x_max * (p->width - p->left - p->right);
}

double svg_y(const struct svg_plot *p, double y)
{
    return p->height - p->bottom - y / p->y_max * (p->height - p->top - p->bottom);
}

void svg_begin(const struct svg_plot *p)
{
    double right = p->width - p->right, bottom = p->height - p->bottom;
    double ys = svg_step(p->y_max, 5, p->y_unit), xs = svg_step(p->x_max, 10, p->x_unit);
    char text[32];

    fprintf(p->out, "<svg viewBox=\"0 0 %g %g\" role=\"img\" aria-label=\"", p->width, p->height);
    svg_escape(p->out, p->title);
    fputs("\">\n", p->out);
    for (double y = 0; y <= p->y_max * 1.0001; y += ys) {
        svg_format(y, p->y_unit, text, sizeof(text));
        fprintf(p->out, "<path class=\"%s\" d=\"M%g %.1fH%g\"/><text class=\"end\" x=\"%g\" y=\"%.1f\">%s</text>\n",
                y > 0 ? "grid" : "axis", p->left, svg_y(p, y), right, p->left - 8, svg_y(p, y) + 4, text);
    }
    for (double x = 0; x <= p->x_max * 1.0001; x += xs) {
        svg_format(x, p->x_unit, text, sizeof(text));
        fprintf(p->out, "<path class=\"axis\" d=\"M%.1f %gv5\"/><text class=\"mid\" x=\"%.1f\" y=\"%g\">%s</text>\n",
                svg_x(p, x), bottom, svg_x(p, x), bottom + 19, text);
    }
    fprintf(p->out, "<text class=\"mid\" x=\"%g\" y=\"%g\">", (p->left + right) / 2, bottom + 38);
    svg_escape(p->out, p->x_label);
    fputs("</text>\n", p->out);
}

void svg_end(const struct svg_plot *p)
{
    fputs("</svg>\n", p->out);
}

void svg_bar(const struct svg_plot *p, const char *css, double x0, double x1, double y0, double y1)
{
    double left = svg_x(p, x0), w = svg_x(p, x1) - left;

    if (y1 > y0)
        fprintf(p->out, "<rect class=\"%s\" x=\"%.2f\" y=\"%.2f\" width=\"%.2f\" height=\"%.2f\"/>\n", css,
                left, svg_y(p, y1), w > 3 ? w - 0.8 : w, svg_y(p, y0) - svg_y(p, y1));
}

void svg_hover(const struct svg_plot *p, double x0, double x1, const char *text)
{
    fprintf(p->out, "<rect class=\"hover\" x=\"%.2f\" y=\"%g\" width=\"%.2f\" height=\"%g\"><title>",
            svg_x(p, x0), p->top, svg_x(p, x1) - svg_x(p, x0), p->height - p->top - p->bottom);
    svg_escape(p->out, text);
    fputs("</title></rect>\n", p->out);
}

void svg_escape(FILE *out, const char *text)
{
    for (; *text; text++) {
        switch (*text) {
        case '<': fputs("&lt;", out); break;
        case '>': fputs("&gt;", out); break;
        case '&': fputs("&amp;", out); break;
        case '"': fputs("&quot;", out); break;
        default: fputc(*text, out);
        }
    }
}
