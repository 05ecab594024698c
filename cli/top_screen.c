/* top_screen.c - see top_screen.h: head, requests, tiers, spaces, instances; a function each. */
#include "top_screen.h"

#include <inttypes.h>

#include "units.h"

#define BAR_MIN 6
#define BAR_MAX 60
#define BESIDE_BAR 62                   /* columns that a tier's line has beside its bar */
#define NAME_MIN 12
#define BESIDE_NAME 51                  /* columns that an instance's line has beside its name */

static void clock_text(time_t when, char out[16])
{
    struct tm tm;

    localtime_r(&when, &tm);
    strftime(out, 16, "%H:%M:%S", &tm);
}

static void print_silence(const struct top_view *v, FILE *out)
{
    char since[16];

    if (!v->silent_since)
        return;
    clock_text(v->silent_since, since);
    fprintf(out, "no answer since %s (%s): %s\n", since,
            unit_duration(difftime(time(NULL), v->silent_since)).text, v->silent_why);
}

/* We are one, too. */
static size_t other_clients(const struct status *s)
{
    size_t n = 0;

    for (size_t i = 0; i < s->clients.len; i++)
        n += s->clients.data[i].pid != (uint64_t)getpid();
    return n;
}

static void print_head(const struct top_view *v, FILE *out)
{
    const struct status *s = v->now;
    char now[16];

    clock_text(time(NULL), now);
    fprintf(out, "%s  flexkv %s at %s, pid %" PRIu64 ", up %s\n", now, s->version, s->address,
            s->pid, unit_duration(s->uptime_s).text);
    print_silence(v, out);
    fprintf(out, "clients %zu, instances %zu, leases %" PRIu64 ", operations %" PRIu64,
            other_clients(s), s->instances.len, s->stats.leases, s->stats.operations);
    fprintf(out, "; index: %" PRIu64 " blocks, %s\n", s->stats.blocks,
            unit_bytes((double)s->stats.index_bytes).text);
}

/* ---- requests ---- */

struct requests {
    double requests, blocks, cpu, ssd, missed, declined, failed;
};

static struct requests requests_of(const struct flexkv_stats *t)
{
    return (struct requests){
        .requests = (double)t->matches, .blocks = (double)(t->match_blocks + t->miss_blocks),
        .cpu = (double)t->cpu.hit_blocks, .ssd = (double)t->ssd.hit_blocks,
        .missed = (double)t->miss_blocks, .declined = (double)t->declined_blocks,
        .failed = (double)t->get_failed_blocks,
    };
}

/* Counters only grow; a smaller one belongs to another daemon. */
static double per_second(const struct top_view *v, double before, double now)
{
    return v->seconds > 0 && now > before ? (now - before) / v->seconds : 0;
}

static struct requests rates_of(const struct top_view *v)
{
    struct requests a = requests_of(&v->before->stats), b = requests_of(&v->now->stats);

    return (struct requests){
        .requests = per_second(v, a.requests, b.requests),
        .blocks = per_second(v, a.blocks, b.blocks), .cpu = per_second(v, a.cpu, b.cpu),
        .ssd = per_second(v, a.ssd, b.ssd), .missed = per_second(v, a.missed, b.missed),
        .declined = per_second(v, a.declined, b.declined),
        .failed = per_second(v, a.failed, b.failed),
    };
}

static void print_request_row(const char *name, const struct requests *r, int decimals, FILE *out)
{
    fprintf(out, "%-10s %9.*f %9.*f %9.*f %9.*f %9.*f %9.*f %8.*f\n", name, decimals,
            r->requests, decimals, r->blocks, decimals, r->cpu, decimals, r->ssd, decimals,
            r->missed, decimals, r->declined, decimals, r->failed);
    fprintf(out, "%30s %9s %9s %9s %9s\n", "", unit_percent(r->cpu, r->blocks).text,
            unit_percent(r->ssd, r->blocks).text, unit_percent(r->missed, r->blocks).text,
            unit_percent(r->declined, r->blocks).text);
}

static void print_requests(const struct top_view *v, FILE *out)
{
    struct requests all = requests_of(&v->now->stats);

    fprintf(out, "\n%-10s %9s %9s %9s %9s %9s %9s %8s\n", "", "requests", "blocks", "cpu hits",
            "ssd hits", "missed", "declined", "failed");
    if (v->before) {
        struct requests rates = rates_of(v);
        print_request_row("per second", &rates, 1, out);
    } else {
        fprintf(out, "%-10s %9s\n\n", "per second", "-");
    }
    print_request_row("in all", &all, 0, out);
}

/* ---- tiers ---- */

static void print_bar(double part, double whole, int cells, FILE *out)
{
    int full = whole > 0 ? (int)(fk_min(part / whole, 1.0) * cells + 0.5) : 0;

    full = fk_max(full, whole > 0 && part > 0 ? 1 : 0);
    for (int i = 0; i < cells; i++)
        fputc(i < full ? '#' : '.', out);
}

static void print_rate(const struct top_view *v, uint64_t before, uint64_t now, FILE *out)
{
    double rate = v->before ? per_second(v, (double)before, (double)now) : 0;

    fprintf(out, " %10s", v->before ? unit_rate(rate).text : "-");
}

static void print_tier(const struct top_view *v, const char *name, double used, double size,
                       const struct flexkv_tier_stats *before,
                       const struct flexkv_tier_stats *now, FILE *out)
{
    int cells = fk_min(fk_max(v->width - BESIDE_BAR, BAR_MIN), BAR_MAX);
    double evicted = v->before ? per_second(v, (double)before->evicted_blocks,
                                            (double)now->evicted_blocks) : 0;

    fprintf(out, "%-4s", name);
    print_bar(used, size, cells, out);
    fprintf(out, " %7s %9s", unit_percent(used, size).text, unit_bytes(size).text);
    print_rate(v, before->bytes_written, now->bytes_written, out);
    print_rate(v, before->bytes_read, now->bytes_read, out);
    if (v->before)
        fprintf(out, " %9.1f", evicted);
    else
        fprintf(out, " %9s", "-");
    fprintf(out, " %6" PRIu64 "\n", now->errors);
}

static void print_tiers(const struct top_view *v, FILE *out)
{
    static const struct flexkv_stats none;
    const struct flexkv_stats *a = v->before ? &v->before->stats : &none, *b = &v->now->stats;
    double cpu_used = 0, cpu_size = 0, ssd_used = 0, ssd_size = 0;
    int cells = fk_min(fk_max(v->width - BESIDE_BAR, BAR_MIN), BAR_MAX);

    for (size_t i = 0; i < v->now->spaces.len; i++) {
        const struct status_space *s = &v->now->spaces.data[i];
        double block = (double)s->slot_bytes;
        cpu_used += block * (double)s->cpu_used;
        cpu_size += block * (double)s->cpu_slots;
        ssd_used += block * (double)s->ssd_used;
        ssd_size += block * (double)s->ssd_slots;
    }
    fprintf(out, "\n%-*s %7s %9s %10s %10s %9s %6s\n", cells + 4, "tier", "used", "of", "in", "out",
            "evicted/s", "errors");
    print_tier(v, "cpu", cpu_used, cpu_size, &a->cpu, &b->cpu, out);
    if (ssd_size > 0) {
        print_tier(v, "ssd", ssd_used, ssd_size, &a->ssd, &b->ssd, out);
        fprintf(out, "%" PRIu64 " blocks are to be written to ssd\n", b->write_backlog_blocks);
    }
}

/* ---- spaces and instances ---- */

/* Of a name that is too long, both ends: replicas differ in the last letters. */
static const char *fit(const char *name, int width, char out[STATUS_NAME_BYTES])
{
    int len = (int)strlen(name), head = (width - 2) / 2, tail = width - 2 - head;

    if (!len)
        return "-";
    if (len <= width)
        return name;
    snprintf(out, STATUS_NAME_BYTES, "%.*s..%s", head, name, name + len - tail);
    return out;
}

static void print_spaces(const struct status *s, FILE *out)
{
    if (!s->spaces.len)
        return;
    fprintf(out, "\n%-18s %6s %5s %9s %10s %7s %10s %7s\n", "space", "tokens", "ranks", "block",
            "cpu blocks", "used", "ssd blocks", "used");
    for (size_t i = 0; i < s->spaces.len; i++) {
        const struct status_space *sp = &s->spaces.data[i];
        char name[STATUS_NAME_BYTES];
        fprintf(out, "%-18s %6" PRIu64 " %5" PRIu64 " %9s %10" PRIu64 " %7s %10" PRIu64 " %7s\n",
                fit(sp->name, 18, name), sp->tokens_per_block, sp->ranks,
                unit_bytes((double)sp->slot_bytes).text, sp->cpu_slots,
                unit_percent((double)sp->cpu_used, (double)sp->cpu_slots).text, sp->ssd_slots,
                unit_percent((double)sp->ssd_used, (double)sp->ssd_slots).text);
    }
}

static void print_instance(const struct status_instance *in, int width, FILE *out)
{
    char workers[48], client[24] = "none", name[STATUS_NAME_BYTES], space[STATUS_NAME_BYTES];

    snprintf(workers, sizeof(workers), "%" PRIu64 "/%" PRIu64, in->registered, in->workers);
    if (in->client_pid)
        snprintf(client, sizeof(client), "%" PRIu64, in->client_pid);
    fprintf(out, "%-*s %-16s %7s %6" PRIu64 " %8s%s\n", width, fit(in->name, width, name),
            fit(in->space, 16, space), workers, in->jobs_out, client,
            in->ended ? "  ended" : in->registered < in->workers ? "  missing" : "");
}

static void print_instances(const struct top_view *v, FILE *out)
{
    const struct status *s = v->now;
    int width = fk_min(fk_max(v->width - BESIDE_NAME, NAME_MIN), STATUS_NAME_BYTES - 1);

    if (s->instances.len)
        fprintf(out, "\n%-*s %-16s %7s %6s %8s\n", width, "instance", "space", "workers", "jobs",
                "client");
    for (size_t i = 0; i < s->instances.len; i++)
        print_instance(&s->instances.data[i], width, out);
    for (size_t i = 0; i < s->waiting.len; i++)
        fprintf(out, "%sworker %" PRIu64 " of instance %s, pid %" PRIu64 ", waits for its client\n",
                i ? "" : "\n", s->waiting.data[i].worker,
                *s->waiting.data[i].instance ? s->waiting.data[i].instance : "-",
                s->waiting.data[i].pid);
}

void top_screen_print(const struct top_view *v, FILE *out)
{
    if (!v->now) {
        print_silence(v, out);
        return;
    }
    print_head(v, out);
    print_requests(v, out);
    print_tiers(v, out);
    print_spaces(v->now, out);
    print_instances(v, out);
}
