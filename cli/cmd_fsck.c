/*
 * cmd_fsck.c - `flexkv fsck DIR[;DIR...]`: checks and repairs an SSD store off line. Touches
 * the store's files, under their lock; called by main, one thread.
 */
#include <dirent.h>
#include <getopt.h>
#include <inttypes.h>
#include <stdio.h>

#include "base/util.h"
#include "cmd.h"
#include "events/names_file.h"
#include "tier/ssd.h"

enum { CLEAN = 0, FINDINGS = 1, TROUBLE = 2 };

#define MAX_LINES 1000                  /* of findings shown; all are counted */

struct printer {
    bool json;
    uint64_t lines;
};

static void usage(FILE *to)
{
    fputs("usage: flexkv fsck DIR[;DIR...] [--name NAME] [--data] [--repair] [--json]\n"
          "\n"
          "Checks an SSD store while no node uses it: headers, slot records, parents and\n"
          "duplicates, and the names that its blocks have for KV events (a damaged name costs an\n"
          "event, no block: it is counted and needs no repair). Give all directories of the store, in the order of ssd_cache_dir.\n"
          "\n"
          "  --name NAME  only this store; default: all in the first directory\n"
          "  --data       read every block too and check its checksum\n"
          "  --repair     mend headers, empty the records of what is bad\n"
          "  --json       print the counts as one JSON object\n"
          "\n"
          "Exit status: 0 clean or all repaired, 1 findings left, 2 trouble.\n", to);
}

static void print_line(void *arg, const char *line)
{
    struct printer *p = arg;

    if (p->lines++ < MAX_LINES)
        fprintf(p->json ? stderr : stdout, "%s\n", line);
    else if (p->lines == MAX_LINES + 1)
        fprintf(p->json ? stderr : stdout, "... (more findings are only counted)\n");
}

static uint64_t findings(const struct fk_ssd_fsck *r)
{
    return r->bad_header + r->bad_record + r->duplicate + r->orphan + r->bad_data;
}

static void print_counts(const struct fk_ssd_fsck *r, const struct fk_names_fsck *names, bool json)
{
    const struct { const char *name; uint64_t n; } counts[] = {
        { "slots", r->slots }, { "valid", r->valid }, { "empty", r->empty },
        { "old_epoch", r->old_epoch }, { "bad_header", r->bad_header },
        { "bad_record", r->bad_record }, { "duplicate", r->duplicate },
        { "orphan", r->orphan }, { "bad_data", r->bad_data }, { "repaired", r->repaired },
        { "names", names->records }, { "bad_names", names->damaged }, { "labels", names->labels },
        { "bad_labels", names->bad_labels },
    };

    for (size_t i = 0; i < fk_array_size(counts); i++) {
        if (json)
            printf("%s\"%s\": %" PRIu64, i ? ", " : "{", counts[i].name, counts[i].n);
        else
            printf("%-12s %" PRIu64 "\n", counts[i].name, counts[i].n);
    }
    if (json)
        printf("}\n");
}

/* Splits "a;b" in place. */
static uint32_t split_dirs(char *list, const char **dirs)
{
    uint32_t n = 0;

    for (char *d = strtok(list, ";"); d && n < FK_SSD_MAX_DIRS; d = strtok(NULL, ";"))
        dirs[n++] = d;
    return n;
}

/* All stores' names files in the directories, or one's. */
static void check_names(const char *const *dirs, uint32_t n_dirs, const char *name,
                        struct printer *p, struct fk_names_fsck *out)
{
    for (uint32_t i = 0; i < n_dirs; i++) {
        DIR *dir = opendir(dirs[i]);
        for (struct dirent *e; dir && (e = readdir(dir));) {
            size_t len = strlen(e->d_name);
            char of[256];
            if (len <= 6 || strcmp(e->d_name + len - 6, ".names") != 0)
                continue;
            snprintf(of, sizeof(of), "%.*s", (int)(len - 6), e->d_name);
            if (!name || strcmp(name, of) == 0)
                (void)fk_names_file_fsck(dirs[i], of, out, print_line, p);
        }
        if (dir)
            closedir(dir);
    }
}

int cmd_fsck(int argc, char **argv)
{
    static const struct option options[] = {
        { "name", required_argument, NULL, 'n' }, { "data", no_argument, NULL, 'd' },
        { "repair", no_argument, NULL, 'r' }, { "json", no_argument, NULL, 'j' },
        { "help", no_argument, NULL, 'h' }, { 0 },
    };
    const char *dirs[FK_SSD_MAX_DIRS], *name = NULL;
    bool data = false, repair = false;
    struct printer p = { 0 };
    struct fk_ssd_fsck result;
    struct fk_names_fsck names = { 0 };
    int c;

    optind = 0;
    while ((c = getopt_long(argc, argv, "h", options, NULL)) != -1) {
        if (c == 'n')
            name = optarg;
        else if (c == 'd')
            data = true;
        else if (c == 'r')
            repair = true;
        else if (c == 'j')
            p.json = true;
        else {
            usage(c == 'h' ? stdout : stderr);
            return c == 'h' ? CLEAN : TROUBLE;
        }
    }
    uint32_t n_dirs = optind + 1 == argc ? split_dirs(argv[optind], dirs) : 0;
    if (n_dirs == 0) {
        usage(stderr);
        return TROUBLE;
    }
    int rc = fk_ssd_fsck_run(dirs, n_dirs, name, data, repair, print_line, &p, &result);
    if (rc < 0) {
        fprintf(stderr, "flexkv fsck: %s\n", strerror(-rc));
        return TROUBLE;
    }
    check_names(dirs, n_dirs, name, &p, &names);
    print_counts(&result, &names, p.json);
    return findings(&result) > result.repaired ? FINDINGS : CLEAN;
}
