/*
 * report_html.c - see report_html.h. One function per part of the page; the charts are drawn
 * from replay_result's intervals with report_svg. Changes nothing in the result.
 */
#include "report_html.h"

#include <math.h>
#include <stdarg.h>
#include <time.h>

#include "flexkv/flexkv.h"
#include "replay.h"
#include "report_svg.h"

typedef unsigned long long ull;

static const char style[] =
    ":root{--bg:#fbfbfa;--card:#fff;--ink:#1c2430;--soft:#5d6878;--line:#e3e6ea;--cpu:#2f6fde;--ssd:#e08a1e;"
    "--ceil:#3c4654;--c3:#2a9d74;--bad:#c62f3b}\n"
    "@media(prefers-color-scheme:dark){:root{--bg:#12161c;--card:#1a2029;--ink:#e6eaf0;--soft:#98a3b3;"
    "--line:#2c3440;--cpu:#5b93f5;--ssd:#f0a648;--ceil:#c3ccd8;--c3:#4cc49a;--bad:#ff6b74}}\n"
    "*{box-sizing:border-box}body{margin:0;background:var(--bg);color:var(--ink);"
    "font:15px/1.5 system-ui,-apple-system,Segoe UI,Roboto,sans-serif}\n"
    "main{max-width:1000px;margin:0 auto;padding:28px 20px 60px}h1{font-size:24px;margin:0 0 2px}"
    "h2{font-size:16px;margin:0 0 2px}p{margin:0 0 10px;color:var(--soft)}\n"
    ".tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin:18px 0}"
    ".tile,section{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:14px 16px}"
    ".tile b{display:block;font-size:24px;line-height:1.25;font-variant-numeric:tabular-nums}"
    ".tile span{color:var(--soft);font-size:13px}.tile.bad b{color:var(--bad)}\n"
    "section{margin:0 0 16px}svg{display:block;width:100%;height:auto}svg text{fill:var(--soft);font-size:12px}"
    "svg text.strong{fill:var(--ink)}.end{text-anchor:end}.mid{text-anchor:middle}"
    ".grid{stroke:var(--line)}.axis{stroke:var(--soft)}.hover{fill:transparent}"
    ".hover:hover{fill:var(--ink);fill-opacity:.08}\n"
    "rect.cpu{fill:var(--cpu)}rect.ssd{fill:var(--ssd)}rect.c3{fill:var(--c3)}"
    "path.line{fill:none;stroke-width:2;stroke-linejoin:round}path.cpu{stroke:var(--cpu)}"
    "path.ssd{stroke:var(--ssd)}path.ceil{stroke:var(--ceil)}\n"
    ".key{display:flex;flex-wrap:wrap;gap:4px 18px;color:var(--soft);font-size:13px;margin:6px 0 4px}"
    ".key i{display:inline-block;width:12px;height:12px;border-radius:3px;margin-right:6px;vertical-align:-1px}"
    ".key i.l{height:3px;vertical-align:3px}.k-cpu{background:var(--cpu)}.k-ssd{background:var(--ssd)}"
    ".k-c3{background:var(--c3)}.k-ceil{background:var(--ceil)}\n"
    ".two{display:grid;grid-template-columns:repeat(auto-fit,minmax(320px,1fr));gap:16px}"
    "table{border-collapse:collapse;width:100%}td{padding:4px 0;border-bottom:1px solid var(--line);"
    "vertical-align:top}tr:last-child td{border:0}td+td{text-align:right;padding-left:16px;overflow-wrap:anywhere;"
    "font-variant-numeric:tabular-nums}\n";

/* Ends of interval i on the x axis: seconds of the trace, or request numbers. */
struct axis { double per_interval, max; bool time; };

static struct axis axis_of(const struct replay_result *res)
{
    const struct trace *t = res->plan->trace;
    size_t n = t->requests.len;
    double span = (double)(t->requests.data[n - 1].time_us - t->requests.data[0].time_us) / 1e6;
    struct axis a = { .time = span > 0, .max = span > 0 ? span : (double)n };

    a.per_interval = a.max / res->intervals;
    return a;
}

static struct svg_plot plot_of(const struct replay_result *res, FILE *out, const char *title,
                               double y_max, enum svg_unit y_unit)
{
    struct axis a = axis_of(res);

    return (struct svg_plot){
        .out = out, .width = 940, .height = 280, .left = 64, .right = 22, .top = 12, .bottom = 46,
        .x_max = a.max, .y_max = y_max, .x_unit = a.time ? SVG_TIME : SVG_PLAIN, .y_unit = y_unit,
        .x_label = a.time ? "time in the trace" : "request", .title = title,
    };
}

static void when(const struct replay_result *res, uint32_t i, char *buf, size_t size)
{
    struct axis a = axis_of(res);
    char from[32], to[32];

    svg_format(i * a.per_interval, a.time ? SVG_TIME : SVG_PLAIN, from, sizeof(from));
    svg_format((i + 1) * a.per_interval, a.time ? SVG_TIME : SVG_PLAIN, to, sizeof(to));
    snprintf(buf, size, "%s to %s", from, to);
}

static void section_begin(FILE *out, const char *title, const char *text)
{
    fprintf(out, "<section><h2>%s</h2><p>%s</p>\n", title, text);
}

static void ceiling_line(const struct replay_result *res, const struct svg_plot *p)
{
    double step = axis_of(res).per_interval;
    bool down = false;

    fputs("<path class=\"line ceil\" d=\"", p->out);
    for (uint32_t i = 0; i < res->intervals; i++) {
        const struct replay_interval *iv = &res->interval[i];
        if (iv->blocks)
            fprintf(p->out, "%s%.1f %.1fH%.1f", down ? "L" : "M", svg_x(p, i * step),
                    svg_y(p, replay_ratio(iv->ceiling, iv->blocks)), svg_x(p, (i + 1) * step));
        down = iv->blocks > 0;
    }
    fputs("\"/>\n", p->out);
}

static void chart_hits(const struct replay_result *res, FILE *out)
{
    struct svg_plot p = plot_of(res, out, "hit ratio over time", 1, SVG_PERCENT);
    double step = axis_of(res).per_interval;
    char time_text[80], text[320];

    section_begin(out, "Hit ratio", "Share of the blocks asked for that were there, by tier; "
                  "the line is what a cache without limits would have had.");
    fputs("<div class=\"key\"><span><i class=\"k-cpu\"></i>CPU</span><span><i class=\"k-ssd\"></i>SSD</span>"
          "<span><i class=\"l k-ceil\"></i>unlimited cache</span></div>", out);
    svg_begin(&p);
    for (uint32_t i = 0; i < res->intervals; i++) {
        const struct replay_interval *iv = &res->interval[i];
        double cpu = replay_ratio(iv->hit[FK_TIER_CPU], iv->blocks);
        double ssd = replay_ratio(iv->hit[FK_TIER_SSD], iv->blocks);
        svg_bar(&p, "cpu", i * step, (i + 1) * step, 0, cpu);
        svg_bar(&p, "ssd", i * step, (i + 1) * step, cpu, cpu + ssd);
    }
    ceiling_line(res, &p);
    for (uint32_t i = 0; i < res->intervals; i++) {
        const struct replay_interval *iv = &res->interval[i];
        when(res, i, time_text, sizeof(time_text));
        snprintf(text, sizeof(text), "%s\n%llu requests, %llu blocks\nCPU %.1f %%, SSD %.1f %%, unlimited %.1f %%",
                 time_text, (ull)iv->requests, (ull)iv->blocks,
                 100 * replay_ratio(iv->hit[FK_TIER_CPU], iv->blocks),
                 100 * replay_ratio(iv->hit[FK_TIER_SSD], iv->blocks), 100 * replay_ratio(iv->ceiling, iv->blocks));
        svg_hover(&p, i * step, (i + 1) * step, text);
    }
    svg_end(&p);
    fputs("</section>\n", out);
}

static void occupancy_line(const struct replay_result *res, const struct svg_plot *p, const char *css,
                           enum fk_tier tier, uint32_t slots)
{
    double step = axis_of(res).per_interval;

    fprintf(p->out, "<path class=\"line %s\" d=\"M%.1f %.1f", css, svg_x(p, 0), svg_y(p, 0));
    for (uint32_t i = 0; i < res->sampled; i++)
        fprintf(p->out, "L%.1f %.1f", svg_x(p, (i + 1) * step),
                svg_y(p, fk_min(replay_ratio(res->interval[i].end.used[tier], slots), 1.0)));
    fputs("\"/>\n", p->out);
}

static void chart_occupancy(const struct replay_result *res, FILE *out)
{
    const struct replay_plan *plan = res->plan;
    struct svg_plot p = plot_of(res, out, "occupancy of the tiers over time", 1, SVG_PERCENT);
    double step = axis_of(res).per_interval;
    char time_text[80], text[320];

    section_begin(out, "Occupancy", "Share of each tier's slots that hold a block.");
    fprintf(out, "<div class=\"key\"><span><i class=\"l k-cpu\"></i>CPU, %u blocks</span>", plan->cpu_slots);
    if (plan->ssd_slots)
        fprintf(out, "<span><i class=\"l k-ssd\"></i>SSD, %u blocks</span>", plan->ssd_slots);
    fputs("</div>", out);
    svg_begin(&p);
    if (plan->ssd_slots)
        occupancy_line(res, &p, "ssd", FK_TIER_SSD, plan->ssd_slots);
    occupancy_line(res, &p, "cpu", FK_TIER_CPU, plan->cpu_slots);
    for (uint32_t i = 0; i < res->sampled; i++) {
        const uint64_t *used = res->interval[i].end.used;
        when(res, i, time_text, sizeof(time_text));
        snprintf(text, sizeof(text), "%s\nCPU %llu of %u blocks\nSSD %llu of %u blocks", time_text,
                 (ull)used[FK_TIER_CPU], plan->cpu_slots, (ull)used[FK_TIER_SSD], plan->ssd_slots);
        svg_hover(&p, i * step, (i + 1) * step, text);
    }
    svg_end(&p);
    fputs("</section>\n", out);
}

static void moved_in(const struct replay_result *res, uint32_t i, double moved[3])
{
    static const struct replay_totals zero;
    const struct replay_totals *b = i ? &res->interval[i - 1].end : &zero, *e = &res->interval[i].end;

    moved[0] = (double)(e->cpu_copy_bytes - b->cpu_copy_bytes);
    moved[1] = (double)(e->ssd_read_bytes - b->ssd_read_bytes);
    moved[2] = (double)(e->ssd_write_bytes - b->ssd_write_bytes);
}

static double most_moved(const struct replay_result *res)
{
    double most = 1, m[3];

    for (uint32_t i = 0; i < res->sampled; i++) {
        moved_in(res, i, m);
        most = fk_max(most, m[0] + m[1] + m[2]);
    }
    return most;
}

static void chart_bytes(const struct replay_result *res, FILE *out)
{
    static const char *const css[] = { "cpu", "ssd", "c3" };
    double most = most_moved(res), tick = svg_step(most, 5, SVG_BYTES), step = axis_of(res).per_interval;
    struct svg_plot p = plot_of(res, out, "bytes moved over time", ceil(most / tick) * tick, SVG_BYTES);
    char time_text[80], text[320], part[3][32];
    double m[3];

    svg_format(step, p.x_unit, time_text, sizeof(time_text));
    snprintf(text, sizeof(text), "Per %s%s of the trace%s.", time_text, p.x_unit == SVG_TIME ? "" : " requests",
             res->plan->options->hit_only ? ", as they would be moved" : "");
    section_begin(out, "Bytes moved", text);
    fputs("<div class=\"key\"><span><i class=\"k-cpu\"></i>copied to and from the engine</span>"
          "<span><i class=\"k-ssd\"></i>read from SSD</span><span><i class=\"k-c3\"></i>written to SSD</span></div>", out);
    svg_begin(&p);
    for (uint32_t i = 0; i < res->sampled; i++) {
        double y = 0;
        moved_in(res, i, m);
        for (int k = 0; k < 3; y += m[k++]) {
            svg_bar(&p, css[k], i * step, (i + 1) * step, y, y + m[k]);
            svg_format(m[k], SVG_BYTES, part[k], sizeof(part[k]));
        }
        when(res, i, time_text, sizeof(time_text));
        snprintf(text, sizeof(text), "%s\ncopied %s\nSSD read %s\nSSD written %s", time_text, part[0], part[1], part[2]);
        svg_hover(&p, i * step, (i + 1) * step, text);
    }
    svg_end(&p);
    fputs("</section>\n", out);
}

/* The logarithmic axis: powers of ten of a microsecond, from `from` on. */
struct decades { double from, n; };

static struct decades latency_axis(const struct replay_result *res)
{
    double least = 1, most = 10;

    for (int i = 0; i < REPLAY_CALLS; i++) {
        if (res->latency[i].p50 > 0)
            least = fk_min(least, res->latency[i].p50);
        most = fk_max(most, res->latency[i].max);
    }
    double from = floor(log10(least));
    return (struct decades){ from, ceil(log10(most)) - from };
}

static void latency_bar(FILE *out, double y, const char *name, const char *css, double us, struct decades axis)
{
    double x0 = 110, x1 = 830;
    double share = us > 0 ? (log10(us) - axis.from) / axis.n : 0;
    double w = fk_max(share, 0.002) * (x1 - x0);
    char text[32];

    svg_format(us, SVG_MICROSECONDS, text, sizeof(text));
    fprintf(out, "<rect class=\"%s\" x=\"%g\" y=\"%g\" width=\"%.1f\" height=\"15\" rx=\"2\"><title>%s: %s</title></rect>"
            "<text class=\"end\" x=\"%g\" y=\"%g\">%s</text><text class=\"strong\" x=\"%.1f\" y=\"%g\">%s</text>\n",
            css, x0, y, w, name, text, x0 - 8, y + 12, name, x0 + w + 6, y + 12, text);
}

static void latency_grid(FILE *out, struct decades axis, double height)
{
    char text[32];

    for (int d = 0; d <= (int)axis.n; d++) {
        double x = 110 + d / axis.n * 720;
        svg_format(pow(10, d + axis.from), SVG_MICROSECONDS, text, sizeof(text));
        fprintf(out, "<path class=\"grid\" d=\"M%.1f 4V%g\"/><text class=\"mid\" x=\"%.1f\" y=\"%g\">%s</text>\n",
                x, height - 22, x, height - 6, text);
    }
}

static void chart_latency(const struct replay_result *res, FILE *out)
{
    static const char *const names[REPLAY_CALLS] = { "match", "get", "put" };
    double y = 10, height = 10 + REPLAY_CALLS * 66 + 26;
    struct decades axis = latency_axis(res);

    section_begin(out, "Latency", res->plan->options->hit_only ?
                  "Time of each call in the index, logarithmic." :
                  "From the call to its completion, logarithmic; match: the call itself.");
    fputs("<div class=\"key\"><span><i class=\"k-cpu\"></i>median</span><span><i class=\"k-ssd\"></i>99th percentile</span>"
          "<span><i class=\"k-c3\"></i>longest</span></div>", out);
    fprintf(out, "<svg viewBox=\"0 0 940 %g\" role=\"img\" aria-label=\"latency percentiles\">\n", height);
    latency_grid(out, axis, height);
    for (int i = 0; i < REPLAY_CALLS; i++, y += 66) {
        char name[3][32];
        const char *q[] = { "p50", "p99", "max" };
        for (int k = 0; k < 3; k++)
            snprintf(name[k], sizeof(name[k]), "%s %s", names[i], q[k]);
        latency_bar(out, y, name[0], "cpu", res->latency[i].p50, axis);
        latency_bar(out, y + 18, name[1], "ssd", res->latency[i].p99, axis);
        latency_bar(out, y + 36, name[2], "c3", res->latency[i].max, axis);
    }
    fputs("</svg></section>\n", out);
}

static void tile(FILE *out, const char *css, const char *name, const char *fmt, ...)
    __attribute__((format(printf, 4, 5)));

static void tile(FILE *out, const char *css, const char *name, const char *fmt, ...)
{
    va_list ap;

    fprintf(out, "<div class=\"tile %s\"><b>", css);
    va_start(ap, fmt);
    vfprintf(out, fmt, ap);
    va_end(ap);
    fprintf(out, "</b><span>%s</span></div>\n", name);
}

static void tiles(const struct replay_result *res, FILE *out)
{
    const struct replay_options *o = res->plan->options;
    char text[32];

    fputs("<div class=\"tiles\">\n", out);
    tile(out, "", "of the blocks hit", "%.1f %%", 100 * replay_ratio(replay_hits(res), res->blocks));
    tile(out, "", "with an unlimited cache", "%.1f %%", 100 * replay_ratio(res->ceiling, res->blocks));
    if (o->verify)
        tile(out, res->wrong ? "bad" : "", "wrong blocks, of those verified", "%llu", (ull)res->wrong);
    if (!o->hit_only)
        tile(out, "", "failed blocks", "%llu", (ull)res->failed);
    tile(out, "", "requests", "%s", replay_grouped(res->requests, text));
    double per_second = res->cpu_seconds > 0 ? (double)res->requests / res->cpu_seconds : 0;
    tile(out, "", "requests per CPU second", "%s", replay_grouped((uint64_t)per_second, text));
    fputs("</div>\n", out);
}

static void row(FILE *out, const char *name, const char *fmt, ...) __attribute__((format(printf, 3, 4)));

static void row(FILE *out, const char *name, const char *fmt, ...)
{
    char text[512];
    va_list ap;

    va_start(ap, fmt);
    vsnprintf(text, sizeof(text), fmt, ap);
    va_end(ap);
    fprintf(out, "<tr><td>%s</td><td>", name);
    svg_escape(out, text);
    fputs("</td></tr>\n", out);
}

static void row_bytes(FILE *out, const char *name, uint64_t bytes)
{
    char text[32];

    svg_format((double)bytes, SVG_BYTES, text, sizeof(text));
    row(out, name, "%s", text);
}

static void row_count(FILE *out, const char *name, uint64_t v, uint64_t of)
{
    char text[32];

    replay_grouped(v, text);
    if (of)
        row(out, name, "%s (%.4f)", text, replay_ratio(v, of));
    else
        row(out, name, "%s", text);
}

static void summary(const struct replay_result *res, FILE *out)
{
    const struct replay_totals *t = &res->totals;

    fputs("<section><h2>Summary</h2><table>\n", out);
    row_count(out, res->interrupted ? "requests (interrupted)" : "requests", res->requests, 0);
    row_count(out, "blocks asked for", res->blocks, 0);
    row_count(out, "hit in CPU", res->hit[FK_TIER_CPU], res->blocks);
    row_count(out, "hit on SSD", res->hit[FK_TIER_SSD], res->blocks);
    row_count(out, "verified", res->verified, 0);
    row_count(out, "wrong", res->wrong, 0);
    row_count(out, "failed", res->failed, 0);
    row_count(out, "evicted", t->evicted_blocks, 0);
    row_bytes(out, "copied", t->cpu_copy_bytes);
    row_bytes(out, "read from SSD", t->ssd_read_bytes);
    row_bytes(out, "written to SSD", t->ssd_write_bytes);
    row(out, "time / CPU time", "%.3f s / %.3f s", res->seconds, res->cpu_seconds);
    if (res->restart_request)
        row(out, "restart", "after request %llu, %.3f s, %llu blocks found", (ull)res->restart_request,
            res->restart_seconds, (ull)res->restart_found_blocks);
    fputs("</table></section>\n", out);
}

static void parameters(const struct replay_result *res, FILE *out)
{
    const struct replay_plan *p = res->plan;
    const struct replay_options *o = p->options;

    fputs("<section><h2>Parameters</h2><table>\n", out);
    for (size_t i = 0; i < o->n_traces; i++)
        row(out, i ? "" : "trace", "%s", o->traces[i]);
    row_count(out, "unique blocks", p->unique_blocks, 0);
    row(out, "CPU tier", "%s = %u blocks", o->cpu.text, p->cpu_slots);
    row(out, "SSD tier", p->ssd_slots ? "%s = %u blocks" : "none", o->ssd.text, p->ssd_slots);
    row(out, "block", "%llu bytes, %llu tokens", (ull)o->block_bytes, (ull)o->tokens_per_block);
    row(out, "policy", "%s", o->policy);
    if (p->ssd_slots)
        row(out, "written to SSD", "%s", o->write_policy);
    row(out, "mode", o->hit_only ? "index only" : o->verify ? "bytes, verified" : "bytes");
    if (o->fault)
        row(out, "faults", "%s", o->fault);
    if (o->speed > 0)
        row(out, "speed", "%g times real time", o->speed);
    for (size_t i = 0; i < o->n_sets; i++)
        row(out, "set", "%s", o->sets[i]);
    fputs("</table></section>\n", out);
}

void report_html_write(const struct replay_result *res, FILE *out)
{
    const struct replay_options *o = res->plan->options;
    time_t now = time(NULL);
    struct tm tm;
    char date[32];

    strftime(date, sizeof(date), "%Y-%m-%d %H:%M UTC", gmtime_r(&now, &tm));
    fprintf(out, "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">"
            "<meta name=\"viewport\" content=\"width=device-width,initial-scale=1\">"
            "<meta name=\"color-scheme\" content=\"light dark\"><title>FlexKV replay</title>"
            "<style>%s</style></head><body><main>\n<h1>FlexKV replay</h1><p>", style);
    for (size_t i = 0; i < o->n_traces; i++) {
        const char *slash = strrchr(o->traces[i], '/');
        svg_escape(out, slash ? slash + 1 : o->traces[i]);
        fputs(", ", out);
    }
    fprintf(out, "policy %s, %s, flexkv %s</p>\n", o->policy, date, FLEXKV_VERSION);
    tiles(res, out);
    chart_hits(res, out);
    chart_occupancy(res, out);
    chart_bytes(res, out);
    chart_latency(res, out);
    fputs("<div class=\"two\">\n", out);
    summary(res, out);
    parameters(res, out);
    fputs("</div></main></body></html>\n", out);
}
