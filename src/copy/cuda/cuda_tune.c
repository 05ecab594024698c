/*
 * cuda_tune.c - what is measured on a device before it is used: up to what size jobs go by the
 * direct kernel, with how many CTAs, how large a chunk of larger ones is, and how fast these are. Some
 * 0.1 s, on memory of its own; kept in the user's cache folder, by the device's UUID and the driver's
 * version.
 */
#include <limits.h>
#include <pthread.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include "base/clock.h"
#include "base/log.h"
#include "base/util.h"
#include "copy/cuda/cuda.h"

#define FORMAT 3
#define SCRATCH (64 * FK_MIB)
#define SLOT (1 * FK_MIB)
#define PIECES 16u
#define REPEATS 3
#define DEVICES 64

static const struct fk_cuda_tuning defaults = {
    .direct_bytes = 8 * FK_MIB, .chunk_bytes = 8 * FK_MIB, .direct_ctas = 4,
};

/* ---- what was measured before ---- */

static bool cache_path(struct fk_cuda_copier *c, char *path, size_t bytes, bool make)
{
    const char *cache = getenv("XDG_CACHE_HOME"), *home = getenv("HOME");
    unsigned char uuid[16];
    char name[33];

    if (c->cu->DeviceGetUuid(uuid, c->device) != CU_OK || ((!cache || !*cache) && (!home || !*home)))
        return false;
    fk_hex(name, uuid, sizeof(uuid));
    if (cache && *cache)
        snprintf(path, bytes, "%s/flexkv", cache);
    else
        snprintf(path, bytes, "%s/.cache/flexkv", home);
    if (make)
        (void)mkdir(path, 0700);
    size_t len = strlen(path);
    return (size_t)snprintf(path + len, bytes - len, "/gpu-%s.tune", name) < bytes - len;
}

static bool sane(const struct fk_cuda_tuning *t)
{
    return t->direct_bytes <= FK_GIB && t->chunk_bytes >= FK_MIB &&
           t->chunk_bytes <= FK_CUDA_CHUNK_MAX && t->chunk_bytes % FK_CUDA_TILE == 0 &&
           t->direct_ctas >= 1 && t->direct_ctas <= 64;
}

static bool load(struct fk_cuda_copier *c, const char *path, struct fk_cuda_tuning *t)
{
    unsigned long long direct, chunk;
    int format, driver;
    FILE *f = fopen(path, "re");

    if (!f)
        return false;
    int n = fscanf(f, "%d %d %llu %llu %u %u", &format, &driver, &direct, &chunk, &t->direct_ctas,
                   &t->bytes_per_us);
    fclose(f);
    if (n != 6 || format != FORMAT || driver != c->cu->version)
        return false;
    t->direct_bytes = direct;
    t->chunk_bytes = chunk;
    return sane(t);
}

static void save(struct fk_cuda_copier *c, const char *path, const struct fk_cuda_tuning *t)
{
    char part[PATH_MAX + 32];

    snprintf(part, sizeof(part), "%s.%d", path, (int)getpid());
    FILE *f = fopen(part, "we");
    if (!f)
        return;
    fprintf(f, "%d %d %llu %llu %u %u\n", FORMAT, c->cu->version, (unsigned long long)t->direct_bytes,
            (unsigned long long)t->chunk_bytes, t->direct_ctas, t->bytes_per_us);
    if (fclose(f) || rename(part, path) < 0)
        (void)unlink(part);
}

/* ---- the measuring ---- */

struct scratch {
    struct fk_copier *copier;
    struct fk_cuda_copier *c;
    cu_ptr pages;
    void *pool;
    flexkv_region regions[PIECES];
    uint32_t order[SCRATCH / SLOT];
};

static bool open_scratch(struct scratch *s, const struct fk_cuda_copier *of)
{
    uint64_t piece = SLOT / PIECES;
    char why[200];

    s->pool = mmap(NULL, SCRATCH, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (s->pool == MAP_FAILED || of->cu->MemAlloc(&s->pages, SCRATCH) != CU_OK)
        return false;
    for (uint32_t i = 0; i < PIECES; i++)
        s->regions[i] = (flexkv_region){ .base = (char *)(uintptr_t)s->pages + i * (SCRATCH / PIECES),
                                         .stride = piece, .page_bytes = piece, .pages = SCRATCH / SLOT };
    for (uint32_t i = 0; i < SCRATCH / SLOT; i++)
        s->order[i] = i * 37 % (SCRATCH / SLOT);
    struct fk_copy_pool pool = { .base = s->pool, .bytes = SCRATCH, .slot_bytes = SLOT };
    if (fk_cuda_copier_create(of->cu, of->device, s->regions, PIECES, &s->copier, why, sizeof(why)))
        return false;
    s->c = (struct fk_cuda_copier *)s->copier;
    s->c->tuning = defaults;
    s->c->tuning.chunk_bytes = FK_CUDA_CHUNK_MAX;   /* the rings are made once, for the largest */
    return fk_copier_attach(s->copier, &pool) == 0;
}

static void close_scratch(struct scratch *s, const struct fk_cuda_copier *of)
{
    if (s->copier) {
        fk_copier_detach(s->copier);
        fk_copier_destroy(s->copier);
    }
    if (s->pages)
        of->cu->MemFree(s->pages);
    if (s->pool && s->pool != MAP_FAILED)
        munmap(s->pool, SCRATCH);
}

/* The best of a few, in us; 0: it failed. */
static uint64_t time_of(struct scratch *s, uint64_t bytes, bool direct, bool to_engine)
{
    _Atomic bool never = false;
    struct fk_copy_blocks b = { .slots = s->order, .pages = s->order, .n = (uint32_t)(bytes / SLOT),
                                .to_engine = to_engine };
    uint64_t best = UINT64_MAX;
    int status;

    s->c->tuning.direct_bytes = direct ? UINT64_MAX : 0;
    for (int i = 0; i <= REPEATS; i++) {
        uint64_t start = fk_clock_us();
        if (fk_copier_copy(s->copier, &b, NULL, &never, &status) != b.n)
            return 0;
        if (i)
            best = fk_min(best, fk_max(fk_clock_us() - start, 1ull));
    }
    return best;
}

static uint64_t both_ways(struct scratch *s, uint64_t bytes, bool direct)
{
    uint64_t to = time_of(s, bytes, direct, true), from = time_of(s, bytes, direct, false);

    return to && from ? to + from : 0;
}

/* The first value that is within some percent of the best: fewer CTAs and smaller rings leave more
 * to the engine. */
static uint32_t thriftiest(const uint64_t *us, uint32_t n, uint64_t percent)
{
    uint64_t best = us[0];

    for (uint32_t i = 1; i < n; i++)
        best = fk_min(best, us[i]);
    for (uint32_t i = 0; i < n; i++)
        if (us[i] * 100 <= best * (100 + percent))
            return i;
    return 0;
}

static bool measure(struct scratch *s, struct fk_cuda_tuning *t)
{
    static const uint32_t ctas[] = { 4, 8 };
    static const uint64_t chunks[] = { 8 * FK_MIB, 16 * FK_MIB };   /* smaller: gaps in large jobs */
    uint64_t us[2];

    for (int i = 0; i < 2; i++) {
        s->c->tuning.direct_ctas = ctas[i];
        if (!(us[i] = both_ways(s, 32 * FK_MIB, true)))
            return false;
    }
    t->direct_ctas = s->c->tuning.direct_ctas = ctas[thriftiest(us, 2, 2)];
    for (int i = 0; i < 2; i++) {
        s->c->tuning.chunk_bytes = chunks[i];
        if (!(us[i] = both_ways(s, SCRATCH, false)))
            return false;
    }
    uint32_t best = thriftiest(us, 2, 2);
    t->chunk_bytes = s->c->tuning.chunk_bytes = chunks[best];
    t->bytes_per_us = (uint32_t)(2 * SCRATCH / us[best]);
    t->direct_bytes = 0;
    for (uint64_t bytes = 2 * FK_MIB; bytes <= SCRATCH; bytes *= 2) {
        uint64_t direct = both_ways(s, bytes, true), staged = both_ways(s, bytes, false);
        if (!direct || !staged)
            return false;
        if (direct > staged)
            break;
        t->direct_bytes = bytes;
    }
    return true;
}

void fk_cuda_tune(struct fk_cuda_copier *c)
{
    static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    static struct fk_cuda_tuning known[DEVICES];
    struct fk_cuda_tuning t = defaults;
    struct scratch s = { 0 };
    char path[PATH_MAX] = "";

    if (c->device < 0 || c->device >= DEVICES) {
        c->tuning = t;
        return;
    }
    pthread_mutex_lock(&lock);
    if (!known[c->device].chunk_bytes) {
        bool has_path = cache_path(c, path, sizeof(path), true);
        uint64_t start = fk_clock_us();
        if (!has_path || !load(c, path, &t)) {
            if (open_scratch(&s, c) && measure(&s, &t) && has_path)
                save(c, path, &t);
            close_scratch(&s, c);
        }
        fk_info("GPU %d: jobs up to %llu MiB by a kernel of %u CTAs, larger ones in chunks of %llu "
                "MiB, %.1f GB/s (%llu ms)", c->device,
                (unsigned long long)(t.direct_bytes / FK_MIB), t.direct_ctas,
                (unsigned long long)(t.chunk_bytes / FK_MIB), t.bytes_per_us / 1e3,
                (unsigned long long)((fk_clock_us() - start) / 1000));
        known[c->device] = t;
    }
    c->tuning = known[c->device];
    pthread_mutex_unlock(&lock);
}
