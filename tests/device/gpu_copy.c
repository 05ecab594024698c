/*
 * gpu_copy.c - the cuda copier, byte by byte: layouts, sizes and ways to copy (direct, staged, in
 * layers), random pages and slots, nothing written outside, both directions at once, stopped halfway.
 *
 *     gpu_copy [DEVICE [SMALLER]]      SMALLER: by how much to make it so
 */
#include <pthread.h>
#include <unistd.h>

#include "copy/copier.h"
#include "gpu_rig.h"

#ifdef FK_FAKE_DRIVER
#define SMALLER 32u
#define MANY 48u
#else
#define SMALLER 1u
#define MANY 512u
#endif

static uint32_t smaller = SMALLER;      /* shapes have so many times fewer pages */
static int repeats = SMALLER > 1 ? 2 : 20;

static int device;
static bool crowded;                    /* as if the engine's kernels had the device */

static struct fk_copier *open_copier(struct rig *r)
{
    struct fk_copy_pool pool = { .base = r->pool, .bytes = r->pool_bytes, .slot_bytes = r->slot,
                                 .slice_offset = r->s.before };
    struct fk_copier *c;
    char why[200] = "";

    if (fk_cuda_copier_create(cu, device, r->regions, r->s.n_regions, &c, why, sizeof(why))) {
        fprintf(stderr, "%s\n", why);
        exit(1);
    }
    MUST(strcmp(c->ops->name, "cuda") == 0);
#ifdef FK_FAKE_DRIVER                       /* its speed says nothing; small chunks, so that there are many */
    ((struct fk_cuda_copier *)c)->tuning = (struct fk_cuda_tuning){
        .direct_bytes = 65536, .chunk_bytes = 262144, .direct_ctas = 4 };
#endif
    MUST(fk_copier_attach(c, &pool) == 0);
    return c;
}

static void copy_all(struct fk_copier *c, uint32_t *slots, uint32_t *pages, uint32_t n, bool to_engine,
                     const struct fk_copy_progress *p)
{
    struct fk_copy_blocks b = { .slots = slots, .pages = pages, .n = n, .to_engine = to_engine };
    _Atomic bool never = false;
    int status;

    if (crowded)
        ((struct fk_cuda_copier *)c)->lane[to_engine].crowded_at = fk_clock_us();
    MUST(fk_copier_copy(c, &b, p, &never, &status) == n);
    MUST(status == 0);
}

/* What is told of a load in layers, and a thread that reads each layer as an engine would, as soon as
 * it is said to be in place. */
struct layers {
    struct rig *r;
    uint32_t *slots, *pages, n, seen;
    _Atomic uint32_t placed;
    _Atomic bool over;
    pthread_t reader;
};

static void note_layers(void *arg, uint32_t regions, void *event)
{
    struct layers *l = arg;

    MUST(event && regions > l->seen);
    l->seen = regions;
}

static void note_placed(void *arg, uint32_t regions)
{
    struct layers *l = arg;

    MUST(regions > atomic_load(&l->placed));
    atomic_store(&l->placed, regions);
}

static void expect_region(const struct layers *l, uint32_t region)
{
    const flexkv_region *g = &l->r->regions[region];
    uint64_t offset = l->r->s.before;
    char *page = malloc(g->page_bytes);

    for (uint32_t i = 0; i < region; i++)
        offset += l->r->regions[i].page_bytes;
    for (uint32_t b = 0; b < l->n; b++) {
        MUST(cu->MemcpyDtoH(page, (cu_ptr)(uintptr_t)g->base + l->pages[b] * g->stride, g->page_bytes) == CU_OK);
        MUST(memcmp(page, l->r->pool + l->slots[b] * l->r->slot + offset, g->page_bytes) == 0);
    }
    free(page);
}

static void *read_layers(void *arg)
{
    struct layers *l = arg;
    uint32_t at = 0;

    rig_open_device(device);
    for (bool over = false; !over;) {
        over = atomic_load(&l->over);
        for (uint32_t to = atomic_load(&l->placed); at < to; at++)
            if (at % 3 == 0 || at + 1 == to)        /* the newest: what may not be there yet */
                expect_region(l, at);
        usleep(20);
    }
    MUST(at == l->r->s.n_regions);
    return NULL;
}

/* An engine that is told early: in its stream it reads the last block when that is said to be in place. Nobody can
 * stop the copy any more. */
struct early {
    struct rig *r;
    uint32_t slot, page;
    _Atomic bool *cancelled;
    cu_stream stream;
    char *read;
};

static void note_early(void *arg, void *event)
{
    struct early *e = arg;
    char *to = e->read;

    MUST(!e->stream && event);
    MUST(cu->StreamCreateWithPriority(&e->stream, CU_STREAM_NON_BLOCKING_FLAG, 0) == CU_OK);
    MUST(cu->StreamWaitEvent(e->stream, event, 0) == CU_OK);
    for (uint32_t i = 0; i < e->r->s.n_regions; i++) {
        const flexkv_region *g = &e->r->regions[i];
        MUST(cu->MemcpyDtoHAsync(to, (cu_ptr)(uintptr_t)g->base + e->page * g->stride, g->page_bytes, e->stream) == CU_OK);
        to += g->page_bytes;
    }
    atomic_store(e->cancelled, true);
}

static void load_early(struct rig *r, struct fk_copier *c, uint32_t *slots, uint32_t *pages, uint32_t n)
{
    _Atomic bool cancelled = false;
    struct early e = { .r = r, .slot = slots[n - 1], .page = pages[n - 1], .cancelled = &cancelled };
    struct fk_copy_progress p = { .on_its_way = note_early, .arg = &e };
    struct fk_copy_blocks b = { .slots = slots, .pages = pages, .n = n, .to_engine = true };
    int status;

    MUST(cu->MemHostAlloc((void **)&e.read, r->slice, 0) == CU_OK);
    if (crowded)
        ((struct fk_cuda_copier *)c)->lane[1].crowded_at = fk_clock_us();
    MUST(fk_copier_copy(c, &b, &p, &cancelled, &status) == n && status == 0);
    MUST(e.stream && cu->StreamSynchronize(e.stream) == CU_OK);
    MUST(memcmp(e.read, r->pool + e.slot * r->slot + r->s.before, r->slice) == 0);
    cu->StreamDestroy(e.stream);
    cu->MemFreeHost(e.read);
}

static void expect_borders(const struct rig *r)
{
    for (uint32_t s = 0; s < r->s.slots; s++) {
        const char *slot = r->pool + s * r->slot;
        for (uint64_t i = 0; i < r->s.before; i++)
            MUST(slot[i] == 0x55);
        for (uint64_t i = 0; i < r->s.after; i++)
            MUST(slot[r->s.before + r->slice + i] == 0x55);
    }
}

/* Stores pages, checks slots; fills the device anew; loads into other pages, checks all of it. */
enum telling { TELL_NOTHING, TELL_LAYERS, TELL_EARLY };

static void round_trip(struct rig *r, struct fk_copier *c, uint64_t *seed, enum telling telling)
{
    bool layered = telling == TELL_LAYERS;
    uint32_t n = fk_min(r->s.pages, r->s.slots);
    uint32_t *slots = malloc(4ull * r->s.slots), *pages = malloc(4ull * r->s.pages);
    uint32_t ends[512], n_layers = 0;
    struct layers l = { .r = r, .slots = slots, .pages = pages, .n = n };

    for (uint32_t i = 0; layered && i < r->s.n_regions; i++)
        if (i % 2 || i + 1 == r->s.n_regions)
            for (uint32_t k = 0; k < 1 + i % 3; k++)    /* some layers have no regions of their own */
                ends[n_layers++] = i + 1;
    struct fk_copy_progress p = { .layers = note_layers, .placed = note_placed, .arg = &l,
                                  .layer_ends = ends, .n_layers = n_layers };

    fk_rng_permutation(slots, r->s.slots, seed);
    fk_rng_permutation(pages, r->s.pages, seed);
    rig_fill(r, fk_rng_next(seed));
    memset(r->pool, 0x55, r->pool_bytes);
    copy_all(c, slots, pages, n, false, NULL);
    for (uint32_t i = 0; i < n; i++)
        MUST(rig_same(r, slots[i], pages[i]));
    expect_borders(r);
    rig_expect_device(r);

    fk_rng_permutation(pages, r->s.pages, seed);
    rig_fill(r, fk_rng_next(seed));
    MUST(!layered || pthread_create(&l.reader, NULL, read_layers, &l) == 0);
    if (telling == TELL_EARLY)
        load_early(r, c, slots, pages, n);
    else
        copy_all(c, slots, pages, n, true, layered ? &p : NULL);
    atomic_store(&l.over, true);
    MUST(!layered || (pthread_join(l.reader, NULL) == 0 && l.seen == r->s.n_regions));
    for (uint32_t i = 0; i < n; i++)
        rig_to_image(r, slots[i], pages[i]);
    rig_expect_device(r);
    free(slots);
    free(pages);
}

/* The driver that is none takes minutes under a sanitizer: two of the three each time. */
static int skipped(size_t shape, int way)
{
#ifdef FK_FAKE_DRIVER
    return (int)(shape + (size_t)way) % 3;
#else
    (void)shape;
    (void)way;
    return -1;
#endif
}

static void test_shapes(void)
{
    static const struct rig_shape shapes[] = {
        { .n_regions = 1, .pages = 1, .slots = 1, .piece = 4096, .stride = 4096 },
        { .n_regions = 32, .pages = 64, .slots = 64, .piece = 65536, .stride = 65536 },
        { .n_regions = 64, .pages = 96, .slots = 80, .piece = 4096, .stride = 4096, .before = 4096 },
        { .n_regions = 8, .pages = 50, .slots = 60, .piece = 16384, .stride = 32768, .after = 8192 },
        { .n_regions = 3, .pages = 40, .slots = 40, .piece = 1000, .stride = 1028, .uneven = true },
        { .n_regions = 5, .pages = 33, .slots = 37, .piece = 777, .stride = 1001, .before = 13, .skew = 1 },
        { .n_regions = 2, .pages = 9, .slots = 9, .piece = 5 * 1048576 + 12, .stride = 6 * 1048576 },
        { .n_regions = 61, .pages = 700, .slots = 700, .piece = 9216, .stride = 9216 },    /* MLA */
        { .n_regions = 1, .pages = 24, .slots = 20, .piece = 20 * 1048576, .stride = 20 * 1048576 },
        { .n_regions = 4, .pages = 4000, .slots = 4000, .piece = 64, .stride = 64 },
        { .n_regions = 7, .pages = 300, .slots = 300, .piece = 4100, .stride = 4104, .uneven = true },
    };
    uint64_t seed = 7;

    for (size_t i = 0; i < fk_array_size(shapes); i++) {
        struct rig_shape shape = shapes[i];
        struct rig r;
        shape.pages = (uint32_t)fk_div_up(shape.pages, smaller);
        shape.slots = (uint32_t)fk_div_up(shape.slots, smaller);
        rig_open(&r, &shape);
        struct fk_copier *c = open_copier(&r);
        struct fk_cuda_copier *cc = (struct fk_cuda_copier *)c;
        struct fk_cuda_tuning tuned = cc->tuning;
        for (int way = 0; way < 6; way++) { /* as tuned, direct, staged, in a crowd, as options may say */
            cc->tuning = tuned;
            if (way)
                cc->tuning.direct_bytes = way == 1 ? UINT64_MAX : 0;
            crowded = way == 3;
            c->pool.how = way < 4 ? (struct fk_copy_options){ 0 }
                          : (struct fk_copy_options){ .ctas = { 3, 1 }, .poll_layers = true,
                                                      .copy_engine = { way == 5, way == 5 } };
            for (int telling = TELL_NOTHING; telling <= TELL_EARLY; telling++)
                if (telling != skipped(i, way))
                    round_trip(&r, c, &seed, (enum telling)telling);
        }
        crowded = false;
        fk_copier_detach(c);
        fk_copier_destroy(c);
        rig_close(&r);
    }
    printf("shapes: ok\n");
}

/* ---- checksums ---- */

static uint32_t load(struct fk_copier *c, uint32_t *slots, uint32_t *pages, uint32_t n, int *status)
{
    struct fk_copy_blocks b = { .slots = slots, .pages = pages, .n = n, .to_engine = true };
    _Atomic bool never = false;

    return fk_copier_copy(c, &b, NULL, &never, status);
}

/* The sums of what is stored are those that a CPU takes of the slots; a byte that changes in a slot, any
 * one, keeps its block and those after it from being loaded. */
static void sums_round(struct rig *r, struct fk_copier *c, uint64_t *seed)
{
    uint32_t n = fk_min(r->s.pages, r->s.slots);
    uint32_t *slots = malloc(4ull * r->s.slots), *pages = malloc(4ull * r->s.pages);
    int status;

    fk_rng_permutation(slots, r->s.slots, seed);
    fk_rng_permutation(pages, r->s.pages, seed);
    rig_fill(r, fk_rng_next(seed));
    copy_all(c, slots, pages, n, false, NULL);
    for (uint32_t i = 0; i < n; i++)
        MUST(c->pool.sums.sums[2ull * slots[i]] ==
             fk_sum(r->pool + slots[i] * r->slot + r->s.before, r->slice));
    copy_all(c, slots, pages, n, true, NULL);
    for (int i = 0; i < 3; i++) {
        uint32_t bad = (uint32_t)fk_rng_below(seed, n);
        char *at = r->pool + slots[bad] * r->slot + r->s.before + fk_rng_below(seed, r->slice);
        *at ^= (char)(1 << fk_rng_below(seed, 8));
        MUST(load(c, slots, pages, n, &status) == bad && status == -EBADMSG);
        c->pool.sums.sums[2ull * slots[bad]] = 0;   /* as if it came from SSD like this */
        MUST(load(c, slots, pages, n, &status) == n && status == 0);
        MUST(c->pool.sums.sums[2ull * slots[bad]] ==
             fk_sum(r->pool + slots[bad] * r->slot + r->s.before, r->slice));
    }
    free(slots);
    free(pages);
}

static void test_sums(void)
{
    static const struct rig_shape shapes[] = {
        { .n_regions = 1, .pages = 1, .slots = 1, .piece = 4096, .stride = 4096 },
        { .n_regions = 32, .pages = 64, .slots = 64, .piece = 65536, .stride = 65536 },
        { .n_regions = 8, .pages = 50, .slots = 60, .piece = 16384, .stride = 32768, .after = 8192 },
        { .n_regions = 5, .pages = 33, .slots = 37, .piece = 777, .stride = 1001, .before = 13, .skew = 1 },
        { .n_regions = 2, .pages = 9, .slots = 9, .piece = 5 * 1048576 + 16, .stride = 6 * 1048576 },
        { .n_regions = 61, .pages = 700, .slots = 700, .piece = 9216, .stride = 9216 },
        { .n_regions = 7, .pages = 300, .slots = 300, .piece = 4112, .stride = 4112 },
    };
    uint64_t seed = 17;

    for (size_t i = 0; i < fk_array_size(shapes); i++) {
        struct rig_shape shape = shapes[i];
        struct rig r;
        shape.pages = (uint32_t)fk_div_up(shape.pages, SMALLER);
        shape.slots = (uint32_t)fk_div_up(shape.slots, SMALLER);
        rig_open(&r, &shape);
        struct fk_copier *c = open_copier(&r);
        struct fk_cuda_copier *cc = (struct fk_cuda_copier *)c;
        MUST(cc->sum_units == (shape.piece % 16 == 0));     /* else the CPU sums */
        c->pool.sums.sums = calloc(2ull * shape.slots, sizeof(uint64_t));
        c->pool.sums.stride = 2;
        struct fk_cuda_tuning tuned = cc->tuning;
        for (int way = 0; way < 5; way++) {
            cc->tuning = tuned;
            if (way)
                cc->tuning.direct_bytes = way == 1 ? UINT64_MAX : 0;
            crowded = way == 3;
            c->pool.how = (struct fk_copy_options){ .copy_engine = { way == 4, way == 4 } };
            sums_round(&r, c, &seed);
            round_trip(&r, c, &seed, TELL_LAYERS);
        }
        crowded = false;
        free((void *)c->pool.sums.sums);
        fk_copier_detach(c);
        fk_copier_destroy(c);
        rig_close(&r);
    }
    printf("checksums: ok\n");
}

/* ---- both directions at once ---- */

struct storing { struct rig *r; struct fk_copier *c; uint32_t *slots, *pages, n; };

static void *store(void *arg)
{
    struct storing *s = arg;

    for (int i = 0; i < repeats; i++)
        copy_all(s->c, s->slots, s->pages, s->n, false, NULL);
    return NULL;
}

static void test_both_ways(void)
{
    static const struct rig_shape shape = { .n_regions = 16, .pages = 128, .slots = 128,
                                            .piece = 65536, .stride = 65536 };
    uint32_t slots[128], pages[128];
    uint64_t seed = 11;
    pthread_t t;
    struct rig r;

    rig_open(&r, &shape);
    struct fk_copier *c = open_copier(&r);
    fk_rng_permutation(slots, 128, &seed);
    fk_rng_permutation(pages, 128, &seed);
    rig_fill(&r, 1);
    rig_bytes(2, r.pool, r.pool_bytes);
    struct storing s = { &r, c, slots, pages, 64 };
    MUST(pthread_create(&t, NULL, store, &s) == 0);
    for (int i = 0; i < repeats; i++)
        copy_all(c, slots + 64, pages + 64, 64, true, NULL);
    pthread_join(t, NULL);
    for (int i = 0; i < 64; i++)
        MUST(rig_same(&r, slots[i], pages[i]));
    for (int i = 64; i < 128; i++)
        rig_to_image(&r, slots[i], pages[i]);
    rig_expect_device(&r);
    fk_copier_detach(c);
    fk_copier_destroy(c);
    rig_close(&r);
    printf("both ways: ok\n");
}

/* ---- stopped ---- */

struct stopping { _Atomic bool flag; uint64_t after_us; };

static void *stop(void *arg)
{
    struct stopping *s = arg;
    uint64_t end = fk_clock_us() + s->after_us;

    while (fk_clock_us() < end)
        ;
    atomic_store(&s->flag, true);
    return NULL;
}

/* What is said to be there is; and when the call is over nothing is written any more. */
static void test_stopped(void)
{
    static const struct rig_shape shape = { .n_regions = 16, .pages = MANY, .slots = MANY,
                                            .piece = 65536, .stride = 65536 };
    uint32_t slots[MANY], pages[MANY], some = 0;
    uint64_t seed = 13;
    struct rig r;

    rig_open(&r, &shape);
    struct fk_copier *c = open_copier(&r);
    rig_fill(&r, 5);
    for (uint64_t i = 0; i < r.pool_bytes; i += 4096)      /* all of it pinned before it is timed */
        MUST(fk_pin_ensure(((struct fk_cuda_copier *)c)->pin, r.pool + i, 1));
    for (int i = 0; i < 2 * repeats || (!some && i < 300); i++) {   /* it is a matter of time */
        struct stopping s = { false, (uint64_t)(i % 40) * 300 };
        struct fk_copy_blocks b = { .slots = slots, .pages = pages, .n = MANY };
        pthread_t t;
        int status;
        fk_rng_permutation(slots, MANY, &seed);
        fk_rng_permutation(pages, MANY, &seed);
        memset(r.pool, 0, r.pool_bytes);
        MUST(pthread_create(&t, NULL, stop, &s) == 0);
        uint32_t ok = fk_copier_copy(c, &b, NULL, &s.flag, &status);
        pthread_join(t, NULL);
        MUST(status == 0 && ok <= MANY);
        some += ok > 0 && ok < MANY;
        for (uint32_t k = 0; k < ok; k++)
            MUST(rig_same(&r, slots[k], pages[k]));
        memset(r.pool, 0x77, r.pool_bytes);
        cu->CtxSynchronize();
        for (uint64_t k = 0; k < r.pool_bytes; k += 512)
            MUST(r.pool[k] == 0x77);
    }
    fk_copier_detach(c);
    fk_copier_destroy(c);
    rig_close(&r);
    printf("stopped: ok (%u halfway)\n", some);
}

/* ---- memory of different places ---- */

#ifndef FK_FAKE_DRIVER
static void test_mixed_memory(void)
{
    static char host[4096];
    cu_ptr p;
    struct fk_copier *c;
    char why[300];

    MUST(cu->MemAlloc(&p, 4096) == CU_OK);
    flexkv_region regions[2] = { { (void *)(uintptr_t)p, 4096, 4096, 1 }, { host, 4096, 4096, 1 } };
    MUST(fk_copier_create(regions, 2, 1, &c, why, sizeof(why)) == -EINVAL);
    MUST(strstr(why, "region 1"));
    cu->MemFree(p);
    printf("mixed memory: ok\n");
}
#endif

int main(int argc, char **argv)
{
    device = argc > 1 ? atoi(argv[1]) : 0;
    if (argc > 2) {                     /* for a checker that makes all slower */
        smaller = (uint32_t)fk_max(atoi(argv[2]), 1);
        repeats = 2;
    }
    rig_open_device(device);
#ifndef FK_FAKE_DRIVER
    test_mixed_memory();
#endif
    test_shapes();
    test_sums();
    test_both_ways();
    test_stopped();
    printf("gpu_copy: passed\n");
    return 0;
}
