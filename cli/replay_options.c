/*
 * replay_options.c - the command line of `flexkv replay`: one table of options, from which
 * come the parser and the help text. Touches nothing but its arguments and stderr.
 * Caller: replay.c.
 */
#include <math.h>
#include <stdarg.h>
#include <stddef.h>

#include "replay.h"
#include "tier/engine.h"

enum kind { OPT_FLAG, OPT_TEXT, OPT_COUNT, OPT_BYTES, OPT_SIZE, OPT_SPEED, OPT_SET };
enum { NODE_ONLY = 1 };             /* means nothing without bytes */

struct option {
    const char *name, *arg, *help;
    enum kind kind;
    size_t offset;
    uint64_t min, max;
    unsigned flags;
};

#define AT(field) .offset = offsetof(struct replay_options, field)

static const struct option options[] = {
    { "cpu", "SIZE", "size of the CPU tier: 512M, 4G; 5% of the trace's unique blocks; 1000blocks "
      "(with --hit-only a bare number means blocks). Default 5%", OPT_SIZE, AT(cpu) },
    { "ssd", "SIZE", "size of the SSD tier, in the same way. Default: none", OPT_SIZE, AT(ssd) },
    { "ssd-dir", "DIRS", "directories of the SSD tier, separated by ';'", OPT_TEXT, AT(ssd_dir) },
    { "policy", "NAME", "lru lfu slru fifo mru filo s3fifo arc auto; or belady, the offline bound "
      "(implies --hit-only). Default lru", OPT_TEXT, AT(policy) },
    { "write-policy", "NAME", "when a block goes to SSD: through, on_reuse, on_evict. "
      "Default through", OPT_TEXT, AT(write_policy) },
    { "block-bytes", "SIZE", "bytes of a block, a multiple of 64. Default 16K", OPT_BYTES,
      AT(block_bytes), 64, 1ull << 30 },
    { "tokens-per-block", "N", "splits each id of the trace (512 tokens) into 512/N blocks; N "
      "divides 512. Default 512", OPT_COUNT, AT(tokens_per_block), 1, TRACE_TOKENS_PER_ID },
    { "hit-only", NULL, "index and policy alone: no bytes, no threads, time from the trace",
      OPT_FLAG, AT(hit_only) },
    { "verify", NULL, "compare every byte that was got with what it must be", OPT_FLAG, AT(verify),
      .flags = NODE_ONLY },
    { "limit", "N", "only the first N requests (percentages are of their unique blocks)", OPT_COUNT,
      AT(limit), 1, UINT64_MAX },
    { "speed", "max|X", "X times as fast as the trace's clock, or as fast as it goes. Default max",
      OPT_SPEED, AT(speed), .flags = NODE_ONLY },
    { "queue", "N", "requests in flight. Default 1", OPT_COUNT, AT(queue), 1, 1024, NODE_ONLY },
    { "warm-restart-at", "N", "close the node after N requests, open it again, go on",
      OPT_COUNT, AT(warm_restart_at), 1, UINT64_MAX, NODE_ONLY },
    { "warm", NULL, "start with what an earlier replay left in --ssd-dir instead of an empty cache",
      OPT_FLAG, AT(warm), .flags = NODE_ONLY },
    { "backlog", "N", "at --speed max wait while more than N blocks are to be written to SSD, so "
      "that the disk's speed does not change what hits. Default: an eighth of the CPU tier",
      OPT_COUNT, AT(backlog), 0, FK_NONE - 1, NODE_ONLY },
    { "fault", "SPEC", "inject faults, as in read_error=0.001,read_flip=0.001,seed=7", OPT_TEXT,
      AT(fault), .flags = NODE_ONLY },
    { "set", "KEY=VALUE", "any option of flexkv.conf(5); may be given several times",
      OPT_SET, AT(sets) },
    { "join", NULL, "the files are parts of one trace: an id means the same in all of them",
      OPT_FLAG, AT(join) },
    { "report", "FILE", "write a page with charts (HTML, self-contained)", OPT_TEXT, AT(report) },
    { "json", NULL, "print JSON instead of the table", OPT_FLAG, AT(json) },
    { "quiet", NULL, "no progress", OPT_FLAG, AT(quiet) },
    { "help", NULL, "this text", OPT_FLAG, AT(help) },
};

static int usage(const char *fmt, ...) __attribute__((format(printf, 1, 2)));

static int usage(const char *fmt, ...)
{
    va_list ap;

    fputs("flexkv replay: ", stderr);
    va_start(ap, fmt);
    vfprintf(stderr, fmt, ap);
    va_end(ap);
    fputs("\n(flexkv replay --help lists the options)\n", stderr);
    return 2;
}

static void print_wrapped(FILE *out, const char *text, unsigned indent, unsigned width)
{
    unsigned col = indent;

    while (*text) {
        unsigned n = (unsigned)strcspn(text, " ");
        if (col > indent && col + 1 + n > width) {
            fprintf(out, "\n%*s", indent, "");
            col = indent;
        } else if (col > indent) {
            fputc(' ', out);
            col++;
        }
        fwrite(text, 1, n, out);
        col += n;
        text += n + (text[n] == ' ');
    }
    fputc('\n', out);
}

void replay_print_help(FILE *out)
{
    fputs("Usage: flexkv replay [OPTIONS] TRACE...\n\n"
          "Drives a cache node with a request trace (.jsonl or .jsonl.gz): for each request match,\n"
          "get what hits, put what misses. Bytes are made from the keys, so that --verify can check\n"
          "every byte. Several traces are replayed one after the other.\n\n"
          "Options:\n", out);
    for (size_t i = 0; i < fk_array_size(options); i++) {
        char head[64];
        snprintf(head, sizeof(head), "  --%s%s%s", options[i].name, options[i].arg ? " " : "",
                 options[i].arg ? options[i].arg : "");
        fprintf(out, "%-25s ", head);
        print_wrapped(out, options[i].help, 26, 96);
    }
    fputs("\nA request has 512/N blocks for each of its ids, whatever its input_length.\n"
          "Exit status: 0 done; 1 wrong bytes were found, or the replay failed; 2 wrong usage.\n\n"
          "Examples:\n"
          "  flexkv replay --hit-only --policy auto --cpu 5% trace.jsonl.gz\n"
          "  flexkv replay --cpu 5% --ssd 20% --ssd-dir /mnt/nvme0;/mnt/nvme1 --verify \\\n"
          "      --report report.html trace.jsonl\n", out);
}

/* A number with an optional unit; *rest is what follows it. */
static bool parse_number(const char *text, double *value, const char **rest)
{
    char *end;

    if (!(*text >= '0' && *text <= '9') && *text != '.')
        return false;
    if (text[0] == '0' && (text[1] == 'x' || text[1] == 'X'))
        return false;
    *value = strtod(text, &end);
    *rest = end;
    return end != text && isfinite(*value);
}

/* "K", "kB", "MiB", ...: 1024 and its powers; 0: no such unit. */
static double unit_bytes(const char *unit)
{
    static const char letters[] = "KMGT";
    const char *at = *unit ? strchr(letters, *unit == 'k' ? 'K' : *unit) : NULL;

    if (!strcmp(unit, "B"))
        return 1;
    if (!at || (unit[1] && strcmp(unit + 1, "B") && strcmp(unit + 1, "iB")))
        return 0;
    return ldexp(1, 10 * (int)(at - letters + 1));
}

static int parse_size(const struct option *opt, const char *text, struct replay_size *out)
{
    const char *rest;
    double v;

    if (!parse_number(text, &v, &rest))
        return usage("--%s %s: not a size (512M, 5%% or 1000blocks)", opt->name, text);
    *out = (struct replay_size){ .value = v, .text = text };
    if (!strcmp(rest, "%"))
        out->kind = REPLAY_SIZE_PERCENT;
    else if (!*rest || !strcmp(rest, "blocks") || !strcmp(rest, "block"))
        out->kind = REPLAY_SIZE_BLOCKS;
    else if (unit_bytes(rest) > 0)
        out->kind = REPLAY_SIZE_BYTES;
    else
        return usage("--%s %s: unknown unit \"%s\" (K, M, G, T, %% or blocks)", opt->name, text, rest);
    if (out->kind == REPLAY_SIZE_BYTES)
        out->value *= unit_bytes(rest);
    if (out->kind == REPLAY_SIZE_BLOCKS && v != floor(v))
        return usage("--%s %s: not a whole number of blocks", opt->name, text);
    return 0;
}

static int parse_bytes(const struct option *opt, const char *text, uint64_t *out)
{
    const char *rest;
    double v;

    if (!parse_number(text, &v, &rest) || (*rest && unit_bytes(rest) == 0))
        return usage("--%s %s: not a size in bytes (16K, 65536)", opt->name, text);
    v *= *rest ? unit_bytes(rest) : 1;
    if (v != floor(v) || v < (double)opt->min || v > (double)opt->max)
        return usage("--%s %s: must be %llu to %llu bytes", opt->name, text,
                     (unsigned long long)opt->min, (unsigned long long)opt->max);
    *out = (uint64_t)v;
    return 0;
}

static int parse_count(const struct option *opt, const char *text, uint64_t *out)
{
    char *end;

    errno = 0;
    unsigned long long v = strtoull(text, &end, 10);
    if (*text < '0' || *text > '9' || *end || errno || v < opt->min || v > opt->max) {
        if (opt->max == UINT64_MAX)
            return usage("--%s %s: must be a whole number from %llu up", opt->name, text,
                         (unsigned long long)opt->min);
        return usage("--%s %s: must be a whole number, %llu to %llu", opt->name, text,
                     (unsigned long long)opt->min, (unsigned long long)opt->max);
    }
    *out = v;
    return 0;
}

static int parse_speed(const struct option *opt, const char *text, double *out)
{
    const char *rest;

    if (!strcmp(text, "max")) {
        *out = 0;
        return 0;
    }
    if (!parse_number(text, out, &rest) || (*rest && strcmp(rest, "x")) || *out <= 0)
        return usage("--%s %s: must be \"max\" or a number above 0", opt->name, text);
    return 0;
}

static int parse_set(struct replay_options *o, const char *text)
{
    if (!strchr(text, '=') || *text == '=')
        return usage("--set %s: must be KEY=VALUE", text);
    o->sets[o->n_sets++] = text;
    return 0;
}

static int parse_value(struct replay_options *o, const struct option *opt, const char *text)
{
    void *field = (char *)o + opt->offset;

    switch (opt->kind) {
    case OPT_FLAG: *(bool *)field = true; return 0;
    case OPT_TEXT: *(const char **)field = text; return 0;
    case OPT_COUNT: return parse_count(opt, text, field);
    case OPT_BYTES: return parse_bytes(opt, text, field);
    case OPT_SIZE: return parse_size(opt, text, field);
    case OPT_SPEED: return parse_speed(opt, text, field);
    case OPT_SET: return parse_set(o, text);
    }
    return 2;
}

static const struct option *option_find(const char *name, size_t len)
{
    for (size_t i = 0; i < fk_array_size(options); i++)
        if (strlen(options[i].name) == len && !memcmp(options[i].name, name, len))
            return &options[i];
    return NULL;
}

/* One "--name", "--name=value" or "--name value" at argv[*i]. given: bit per option. */
static int parse_option(struct replay_options *o, int argc, char **argv, int *i, uint64_t *given)
{
    const char *name = argv[*i] + 2;
    const char *eq = strchr(name, '=');
    const struct option *opt = option_find(name, eq ? (size_t)(eq - name) : strlen(name));

    if (!opt)
        return usage("unknown option %s", argv[*i]);
    *given |= 1ull << (opt - options);
    if (!opt->arg)
        return eq ? usage("--%s takes no value", opt->name) : parse_value(o, opt, NULL);
    if (!eq && *i + 1 >= argc)
        return usage("--%s needs a value: %s", opt->name, opt->arg);
    return parse_value(o, opt, eq ? eq + 1 : argv[++*i]);
}

static int check_policy(struct replay_options *o)
{
    enum fk_policy_kind kind;

    o->belady = !strcmp(o->policy, "belady");
    if (o->belady)
        o->hit_only = true;
    else if (fk_policy_parse(o->policy, &kind))
        return usage("--policy %s: unknown (lru lfu slru fifo mru filo s3fifo arc auto belady)", o->policy);
    if (o->belady && o->ssd.kind)
        return usage("--policy belady is the bound for one tier: --ssd does not go with it");
    if (strcmp(o->write_policy, "through") && strcmp(o->write_policy, "on_reuse") &&
        strcmp(o->write_policy, "on_evict"))
        return usage("--write-policy %s: unknown (through, on_reuse, on_evict)", o->write_policy);
    return 0;
}

static int check_hit_only(const struct replay_options *o, uint64_t given)
{
    if (!o->hit_only) {
        if (o->cpu.kind == REPLAY_SIZE_BLOCKS && !strchr(o->cpu.text, 'b'))
            return usage("--cpu %s: a unit is missing (512M, 5%% or 1000blocks)", o->cpu.text);
        if (o->ssd.kind == REPLAY_SIZE_BLOCKS && !strchr(o->ssd.text, 'b'))
            return usage("--ssd %s: a unit is missing (512M, 5%% or 1000blocks)", o->ssd.text);
        return 0;
    }
    for (size_t i = 0; i < fk_array_size(options); i++)
        if ((given >> i & 1) && (options[i].flags & NODE_ONLY) &&
            !(options[i].kind == OPT_SPEED && o->speed == 0))
            return usage("--%s means nothing with --%s: there are no bytes and no waiting",
                         options[i].name, o->belady ? "policy belady" : "hit-only");
    return 0;
}

static int check_fault(const struct replay_options *o)
{
    struct fk_fault_params params;
    const char *bad = "";

    if (!o->fault || !fk_fault_parse(o->fault, &params, &bad))
        return 0;
    return usage("--fault %s: cannot understand \"%s\" (read_error=0.001,read_flip=0.001,seed=7)", o->fault, bad);
}

static int check(struct replay_options *o, uint64_t given)
{
    if (!o->n_traces)
        return usage("which trace?");
    if (o->block_bytes % 64)
        return usage("--block-bytes %llu: must be a multiple of 64", (unsigned long long)o->block_bytes);
    if (TRACE_TOKENS_PER_ID % o->tokens_per_block)
        return usage("--tokens-per-block %llu: must divide %u", (unsigned long long)o->tokens_per_block,
                     TRACE_TOKENS_PER_ID);
    if (o->ssd.kind && o->ssd.value > 0 && !o->hit_only && !o->ssd_dir && strcmp(o->policy, "belady"))
        return usage("--ssd needs --ssd-dir: where the SSD tier's files go");
    if ((o->warm_restart_at || o->warm) && !(o->ssd.kind && o->ssd.value > 0))
        return usage("--%s needs --ssd and --ssd-dir: nothing else survives a restart",
                     o->warm ? "warm" : "warm-restart-at");
    int rc = check_policy(o);
    if (!rc)
        rc = check_fault(o);
    return rc ? rc : check_hit_only(o, given);
}

int replay_options_parse(struct replay_options *o, int argc, char **argv)
{
    uint64_t given = 0;
    bool only_files = false;

    *o = (struct replay_options){
        .cpu = { REPLAY_SIZE_PERCENT, 5, "5%" }, .policy = "lru", .write_policy = "through",
        .block_bytes = 16 * FK_KIB, .tokens_per_block = TRACE_TOKENS_PER_ID, .queue = 1,
        .backlog = FK_NONE,
        .traces = calloc((size_t)argc + 1, sizeof(char *)), .sets = calloc((size_t)argc + 1, sizeof(char *)),
    };
    if (!o->traces || !o->sets)
        return usage("out of memory");
    for (int i = 1; i < argc; i++) {
        if (!only_files && !strcmp(argv[i], "--")) {
            only_files = true;
        } else if (!only_files && !strcmp(argv[i], "-h")) {
            o->help = true;
        } else if (!only_files && !strncmp(argv[i], "--", 2)) {
            int rc = parse_option(o, argc, argv, &i, &given);
            if (rc)
                return rc;
        } else if (!only_files && argv[i][0] == '-' && argv[i][1]) {
            return usage("unknown option %s", argv[i]);
        } else {
            o->traces[o->n_traces++] = argv[i];
        }
    }
    return o->help ? 0 : check(o, given);
}

void replay_options_free(struct replay_options *o)
{
    free(o->traces);
    free(o->sets);
}
