/*
 * cuda_copy.c - a job of the cuda copier. What a job copies is a list of parts (layers, when it goes
 * by layers; else all of a slice); a part is cut into chunks (some blocks, some tiles). Chunks are
 * given to the device a few at a time, so that a job can be stopped and nothing waits inside the
 * driver; the thread sleeps until about when the oldest of them is done. See cuda.h.
 */
#include "base/clock.h"
#include "base/log.h"
#include "base/util.h"
#include "copy/cuda/cuda.h"

#include <sys/prctl.h>
#include <time.h>

#define SPIN_US 40u                     /* look without a pause for so long around the expected end */
#define NAP_US 20u
#define WAKE_MAX_US 200u
#define FLIGHTS_STOPPABLE 16u           /* chunks under way while a job may still be stopped */
/* The end of a job that is put at once, for an engine that goes on meanwhile: it takes about so long until its kernels
 * begin, the longer the more blocks there are. */
#define END_US 2000u
#define END_SHARE 10u                   /* and a tenth of the job */
#define FIRST_CHUNK (1 * FK_MIB)
#define CROWDED_TIMES 1.6
#define CROWDED_CHUNKS 3u
#define CROWDED_FOR_US 100000u          /* then kernels are tried again */
#define LARGE_JOB (64 * FK_MIB)
#define DIRECT_THREADS 512u
#define RING_THREADS 32u                /* as in kernels.cu */
#define RING_CTAS 256u
#define PIECE_MIN (32 * FK_KIB)         /* smaller ones are far slower one by one */
#define LAYER_PIECE (512 * FK_KIB)      /* layers are taken together until their piece has so much */
#define LAST_LAYERS 4u                  /* fewer at the end cost the bus more than the engine gains; half as many
                                           more are not split off either */
#define DIRECT_PIECE (128 * FK_KIB)     /* smaller pieces are not worth descriptors of their own */

/* AHEAD: direct, in the stream of the DMA: the first chunk of what comes from the engine, while the
 * next is gathered. */
enum way { WAY_DIRECT, WAY_AHEAD, WAY_STAGED, WAY_PIECES, WAYS };

struct part { uint32_t tile, end_tile, region, end_region; uint64_t bytes; };

struct chunk {
    uint32_t block, n_blocks, tile, n_tiles, region, end_region;
    uint64_t offset, bytes;             /* of one block's part in the slice */
};

struct flight { cu_event event; uint64_t at, bytes, put_us; uint32_t blocks; bool staged; };

struct note {                           /* some layers of a job, that somebody is told of */
    const struct fk_copy_progress *progress;
    uint32_t regions, after;            /* after: so many chunks */
};

enum summing { SUM_NONE, SUM_KERNEL, SUM_CPU };

struct run {                            /* a job on its way */
    struct fk_cuda_copier *c;
    struct fk_cuda_lane *l;
    const struct fk_copy_blocks *b;
    _Atomic bool *cancelled;
    struct flight flight[FK_CUDA_FLIGHTS];
    uint32_t n_put, n_taken;            /* chunks given to the device, seen done */
    uint32_t n_left;                    /* so many will have left the ring before the DMA goes on */
    uint64_t head;                      /* of the ring, in bytes ever used */
    uint32_t done_blocks;
    enum summing sums;                  /* who takes the blocks' checksums */
    uint64_t free_at;                   /* when the device will be done with what it has, about */
    uint64_t taken_at;                  /* when the last chunk was seen done */
    uint32_t chunks[WAYS];
    bool has_lists;                     /* on the device */
    bool draining;                      /* nothing more to put: the caller waits */
    const struct fk_copy_progress *early;       /* to be told when all is on its way; NULL: nobody */
    bool sure;                          /* it was told early: the job is not stopped any more */
    uint64_t later;                     /* bytes of the parts behind this one */
    uint64_t end_bytes;                 /* of the end that is put at once; 0: not followed */
    bool by_driver;                     /* who tells of layers: the driver, else this thread */
    struct note *notes;
    uint32_t n_notes, n_told;
    int status;
};

static bool failed(struct run *r, cu_result res, const char *what)
{
    if (!fk_cuda_failed(r->c, res, what))
        return false;
    r->status = -EIO;
    return true;
}

/* ---- waiting ---- */

/* Waking up takes its time too, most of all in a virtual machine: it is learned. */
static void nap(struct fk_cuda_lane *l, uint64_t us)
{
    uint64_t start = fk_clock_us();

    nanosleep(&(struct timespec){ .tv_nsec = (long)(us * 1000) }, NULL);
    double late = (double)(fk_clock_us() - start) - (double)us;
    l->wake_us += 0.1 * (fk_min(fk_max(late, 0.0), (double)WAKE_MAX_US) - l->wake_us);
}

/* The default slack of 50 us would be most of a chunk. */
static void exact_timers(void)
{
    static _Thread_local bool done;

    if (!done)
        prctl(PR_SET_TIMERSLACK, 1000ul, 0, 0, 0);
    done = true;
}

/* Copies have no deadline here: a slot may be used again only when they are over. hurry: the
 * caller waits for it; else there are more under way. */
static bool wait_event(struct fk_cuda_copier *c, struct fk_cuda_lane *l, cu_event event, uint64_t due,
                       bool hurry)
{
    uint64_t spin = hurry ? SPIN_US + (uint64_t)l->wake_us : 0;
    uint64_t now = fk_clock_us();
    cu_result r;

    while ((r = c->cu->EventQuery(event)) == CU_ERROR_NOT_READY) {
        now = fk_clock_us();
        if (now + spin < due)
            nap(l, fk_min(due - spin - now, 100000ull));
        else if (now >= due + spin)
            nap(l, NAP_US);
    }
    return !fk_cuda_failed(c, r, "a copy failed");
}

static void learn_rate(struct fk_cuda_lane *l, uint64_t bytes, uint64_t us)
{
    double rate = (double)bytes / (double)fk_max(us, 1ull);

    if (us > 20)
        l->bytes_per_us += 0.2 * (rate - l->bytes_per_us);
    if (bytes >= LARGE_JOB)
        l->best_bytes_per_us = fk_max(l->best_bytes_per_us, rate);
}

/* Staged chunks that take far longer than they can, one after the other: the engine's kernels have
 * the device. (A single one may have found it asleep.) */
static void note_crowd(struct run *r, const struct flight *f, uint64_t now)
{
    double us = (double)(now - fk_max(f->put_us, r->taken_at));
    double best = fk_max(r->l->best_bytes_per_us, (double)r->c->tuning.bytes_per_us);

    if (!f->staged || f->bytes < r->c->tuning.chunk_bytes / 2)
        return;
    if (us * best <= CROWDED_TIMES * (double)f->bytes)
        r->l->slow_chunks = 0;
    else if (++r->l->slow_chunks >= CROWDED_CHUNKS)
        r->l->crowded_at = now;
}

/* What all chunks that were seen done have put in place. */
static void tell_placed(struct run *r)
{
    while (!r->by_driver && !r->status && r->n_told < r->n_notes &&
           r->notes[r->n_told].after <= r->n_taken) {
        const struct note *n = &r->notes[r->n_told++];
        n->progress->placed(n->progress->arg, n->regions);
    }
}

/* Waits for the oldest chunk that is under way. */
static void take_oldest(struct run *r)
{
    const struct flight *f = &r->flight[r->n_taken % FK_CUDA_FLIGHTS];
    uint64_t left = 0;

    for (uint32_t k = r->n_taken + 1; k < r->n_put; k++)
        left += r->flight[k % FK_CUDA_FLIGHTS].bytes;
    uint64_t after = (uint64_t)((double)left / r->l->bytes_per_us);
    if (!wait_event(r->c, r->l, f->event, r->free_at > after ? r->free_at - after : 0,
                    r->draining))
        r->status = -EIO;
    else if (!r->status)
        r->done_blocks += f->blocks;
    uint64_t now = fk_clock_us();       /* the forecast, put right by what was seen */
    note_crowd(r, f, now);
    r->n_taken++;
    r->taken_at = now;
    r->free_at = now + after;
    tell_placed(r);
}

/* Of a job whose engine hears of what is on its way, and goes on: early, or in layers. */
static uint64_t end_of(const struct run *r, uint64_t bytes)
{
    return fk_min((uint64_t)(END_US * r->l->bytes_per_us) + bytes / END_SHARE,
                  (FK_CUDA_FLIGHTS - FLIGHTS_STOPPABLE) * r->c->tuning.chunk_bytes);
}

/* With `left` bytes of its part not put yet. */
static bool is_end(const struct run *r, uint64_t left)
{
    return left + r->later <= r->end_bytes;
}

/* Is the chunk's part of the ring what one of so many bytes from `head` on would be put over? */
static bool in_the_way(const struct run *r, uint32_t chunk, uint64_t bytes)
{
    uint64_t ring = FK_CUDA_RING_CHUNKS * r->c->tuning.chunk_bytes;

    return r->head + bytes - r->flight[chunk % FK_CUDA_FLIGHTS].at > ring;
}

/* Room for the chunk among those under way, in the ring too. end: the device waits for it, so that all is put at once. */
static void make_way(struct run *r, uint64_t bytes, bool end)
{
    uint64_t ring = FK_CUDA_RING_CHUNKS * r->c->tuning.chunk_bytes;
    uint32_t most = end ? FK_CUDA_FLIGHTS : FLIGHTS_STOPPABLE;

    if (r->head % ring + bytes > ring)
        r->head += ring - r->head % ring;
    while (r->n_taken < r->n_put && (r->n_put - r->n_taken >= most || (!end && in_the_way(r, r->n_taken, bytes))))
        take_oldest(r);
    r->n_left = fk_max(r->n_left, r->n_taken);
    for (; r->n_left < r->n_put && in_the_way(r, r->n_left, bytes); r->n_left++)
        failed(r, r->c->cu->StreamWaitEvent(r->l->dma, r->flight[r->n_left % FK_CUDA_FLIGHTS].event, 0), "an event");
}

static void put_chunk(struct run *r, cu_event event, const struct chunk *k, bool staged)
{
    uint64_t bytes = k->n_blocks * k->bytes, now = fk_clock_us();

    r->flight[r->n_put++ % FK_CUDA_FLIGHTS] = (struct flight){
        .event = event, .at = r->head, .bytes = bytes, .put_us = now, .staged = staged,
        .blocks = k->bytes == r->c->slice_bytes ? k->n_blocks : 0,
    };
    r->head += bytes;
    r->free_at = fk_max(r->free_at, now) + (uint64_t)((double)bytes / r->l->bytes_per_us);
}

static bool go_on(struct run *r)
{
    return !r->status && (r->sure || !atomic_load_explicit(r->cancelled, memory_order_relaxed));
}

/* ---- the device's work ---- */

static bool grow_lists(struct run *r, uint32_t n)
{
    const struct fk_cuda *cu = r->c->cu;
    struct fk_cuda_lane *l = r->l;

    if (n <= l->lists_cap)
        return true;
    if (l->lists)
        cu->MemFree(l->lists);
    if (l->host_lists)
        cu->MemFreeHost(l->host_lists);
    l->lists = 0;
    l->host_lists = NULL;
    l->lists_cap = 0;
    n = (uint32_t)fk_round_up(n, 4096);
    if (failed(r, cu->MemAlloc(&l->lists, 16ull * n), "no room for a list") ||
        failed(r, cu->MemHostAlloc((void **)&l->host_lists, 16ull * n, CU_HOST_ALLOC_PORTABLE),
               "no room for a list"))
        return false;
    l->lists_cap = n;
    return true;
}

/* For the first chunk of more than a few blocks. In the kernels' stream. */
static void upload_lists(struct run *r)
{
    struct fk_cuda_lane *l = r->l;
    uint32_t n = r->b->n;

    if (r->has_lists || !grow_lists(r, n))
        return;
    r->has_lists = true;
    memcpy(l->host_lists, r->b->pages, 4ull * n);
    memcpy(l->host_lists + n, r->b->slots, 4ull * n);
    failed(r, r->c->cu->MemcpyHtoDAsync(l->lists, l->host_lists, 8ull * n, l->kernel), "a list");
}

/* Behind the lists; lists_cap is even. */
static cu_ptr device_sums(const struct fk_cuda_lane *l)
{
    return l->lists + 8ull * l->lists_cap;
}

static uint64_t *host_sums(const struct fk_cuda_lane *l)
{
    return (uint64_t *)(void *)(l->host_lists + 2ull * l->lists_cap);
}

/* An option's CTAs are those of the direct kernel; the ring gets as many warps. */
static uint32_t ctas_of(const struct run *r, enum fk_cuda_form form)
{
    uint32_t ctas = r->c->base.pool.how.ctas[r->l->to_engine];

    if (form == FK_CUDA_DIRECT)
        return ctas ? ctas : r->c->tuning.direct_ctas;
    return ctas ? ctas * (DIRECT_THREADS / RING_THREADS) : RING_CTAS;
}

/* On the device: many small CTAs, so that it is over before the engine's next kernel begins. Over
 * the bus a few: with many, one on each multiprocessor, a matrix multiply took twice as long. */
static void launch(struct run *r, const struct chunk *k, bool list, cu_ptr linear, uint64_t stride,
                   cu_stream stream)
{
    struct fk_cuda_copier *c = r->c;
    struct fk_cuda_job job = {
        .tiles = c->device_tiles + k->tile * sizeof(struct fk_cuda_tile),
        .linear = linear, .linear_stride = stride, .offset = k->offset,
        .n_blocks = k->n_blocks, .n_tiles = k->n_tiles, .to_pages = r->l->to_engine,
    };
    uint64_t warps = (uint64_t)k->n_blocks * k->n_tiles;
    void *args[] = { &job };

    if (k->n_blocks <= FK_CUDA_FEW) {
        memcpy(job.few[0], r->b->pages + k->block, 4ull * k->n_blocks);
        memcpy(job.few[1], r->b->slots + k->block, 4ull * k->n_blocks);
    } else {
        upload_lists(r);
        if (r->status)
            return;
        job.pages = r->l->lists + 4ull * k->block;
        job.slots = r->l->lists + 4ull * (r->b->n + k->block);
    }
    if (r->sums == SUM_KERNEL)
        job.sums = device_sums(r->l) + 8ull * k->block;
    enum fk_cuda_form form = list ? FK_CUDA_DIRECT : FK_CUDA_RING;
    uint32_t threads = list ? DIRECT_THREADS : RING_THREADS;
    uint32_t ctas = (uint32_t)fk_min(ctas_of(r, form), fk_div_up(warps, threads / 32));
    failed(r, c->cu->LaunchKernel(r->sums == SUM_KERNEL ? c->sum[form] : c->copy[form], ctas, 1, 1, threads, 1, 1,
                                  0, stream, args, NULL), "the copy kernel can't be started");
}

static char *slice_at(const struct run *r, uint32_t block)
{
    const struct fk_copy_pool *p = &r->c->base.pool;

    return p->base + r->b->slots[block] * p->slot_bytes + p->slice_offset;
}

static void copy_direct(struct run *r, const struct chunk *k, cu_stream stream)
{
    const struct fk_copy_pool *p = &r->c->base.pool;
    cu_event event = r->l->kernel_done[r->n_put % FK_CUDA_FLIGHTS];
    char *first = p->base + p->slice_offset + k->offset;

    launch(r, k, true, (cu_ptr)(uintptr_t)first, p->slot_bytes, stream);
    if (!r->status && !failed(r, r->c->cu->EventRecord(event, stream), "an event"))
        put_chunk(r, event, k, false);
}

static bool grow_batch(struct fk_cuda_lane *l, uint32_t n)
{
    if (n <= l->batch_cap)
        return true;
    cu_ptr *dst = realloc(l->dst, n * sizeof(*dst)), *src;
    l->dst = dst ? dst : l->dst;
    src = realloc(l->src, n * sizeof(*src));
    l->src = src ? src : l->src;
    size_t *sizes = realloc(l->sizes, n * sizeof(*sizes));
    l->sizes = sizes ? sizes : l->sizes;
    if (!dst || !src || !sizes)
        return false;
    l->batch_cap = n;
    return true;
}

/* What lies side by side in both is one copy. */
static uint32_t describe(const struct run *r, const struct chunk *k, cu_ptr to)
{
    struct fk_cuda_lane *l = r->l;
    cu_ptr *host = l->to_engine ? l->src : l->dst, *ring = l->to_engine ? l->dst : l->src;
    uint32_t n = 0;

    for (uint32_t i = 0; i < k->n_blocks; i++) {
        char *at = slice_at(r, k->block + i) + k->offset;
        if (n && host[n - 1] + l->sizes[n - 1] == (cu_ptr)(uintptr_t)at &&
            fk_pin_run(r->c->pin, at) < fk_pin_run(r->c->pin, at - 1)) {
            l->sizes[n - 1] += k->bytes;
            continue;
        }
        host[n] = (cu_ptr)(uintptr_t)at;
        ring[n] = to + i * k->bytes;
        l->sizes[n++] = k->bytes;
    }
    return n;
}

static cu_result copy_batch(const struct run *r, uint32_t n)
{
    const struct fk_cuda *cu = r->c->cu;
    struct fk_cuda_lane *l = r->l;
    struct cu_batch_attrs attrs = { .order = CU_BATCH_ORDER_STREAM, .flags = CU_BATCH_OVERLAP_COMPUTE };
    size_t which = 0, bad;
    cu_result res = CU_OK;

    if (cu->MemcpyBatch130)
        return cu->MemcpyBatch130(l->dst, l->src, l->sizes, n, &attrs, &which, 1, l->dma);
    if (cu->MemcpyBatch128)
        return cu->MemcpyBatch128(l->dst, l->src, l->sizes, n, &attrs, &which, 1, &bad, l->dma);
    for (uint32_t i = 0; i < n && !res; i++)
        res = l->to_engine ? cu->MemcpyHtoDAsync(l->dst[i], (void *)(uintptr_t)l->src[i], l->sizes[i], l->dma)
                           : cu->MemcpyDtoHAsync((void *)(uintptr_t)l->dst[i], l->src[i], l->sizes[i], l->dma);
    return res;
}

/* Host -> ring -> pages: the DMA first, then the kernel; from the engine the other way round. */
static void copy_staged(struct run *r, const struct chunk *k)
{
    const struct fk_cuda *cu = r->c->cu;
    struct fk_cuda_lane *l = r->l;
    uint32_t i = r->n_put % FK_CUDA_FLIGHTS;
    cu_ptr at = l->ring + r->head % (FK_CUDA_RING_CHUNKS * r->c->tuning.chunk_bytes);

    if (!grow_batch(l, k->n_blocks)) {
        r->status = -ENOMEM;
        return;
    }
    uint32_t n = describe(r, k, at);
    if (l->to_engine) {
        if (failed(r, copy_batch(r, n), "a copy can't be started") ||
            failed(r, cu->EventRecord(l->dma_done[i], l->dma), "an event") ||
            failed(r, cu->StreamWaitEvent(l->kernel, l->dma_done[i], 0), "an event"))
            return;
        launch(r, k, false, at, k->bytes, l->kernel);
        if (!r->status && !failed(r, cu->EventRecord(l->kernel_done[i], l->kernel), "an event"))
            put_chunk(r, l->kernel_done[i], k, true);
        return;
    }
    launch(r, k, false, at, k->bytes, l->kernel);
    if (r->status || failed(r, cu->EventRecord(l->kernel_done[i], l->kernel), "an event") ||
        failed(r, cu->StreamWaitEvent(l->dma, l->kernel_done[i], 0), "an event") ||
        failed(r, copy_batch(r, n), "a copy can't be started") ||
        failed(r, cu->EventRecord(l->dma_done[i], l->dma), "an event"))
        return;
    put_chunk(r, l->dma_done[i], k, true);
}

/* No kernel, no ring: every piece is a copy. */
static void copy_pieces(struct run *r, const struct chunk *k)
{
    struct fk_cuda_lane *l = r->l;
    cu_ptr *host, *page;
    cu_event event = l->dma_done[r->n_put % FK_CUDA_FLIGHTS];
    uint32_t n = 0;

    if (!grow_batch(l, k->n_blocks * (k->end_region - k->region))) {
        r->status = -ENOMEM;
        return;
    }
    host = l->to_engine ? l->src : l->dst;
    page = l->to_engine ? l->dst : l->src;
    for (uint32_t i = 0; i < k->n_blocks; i++) {
        cu_ptr at = (cu_ptr)(uintptr_t)(slice_at(r, k->block + i) + k->offset);
        for (uint32_t g = k->region; g < k->end_region; g++) {
            const flexkv_region *region = &r->c->base.regions[g];
            host[n] = at;
            page[n] = (cu_ptr)(uintptr_t)region->base + r->b->pages[k->block + i] * region->stride;
            l->sizes[n++] = region->page_bytes;
            at += region->page_bytes;
        }
    }
    if (!failed(r, copy_batch(r, n), "a copy can't be started") &&
        !failed(r, r->c->cu->EventRecord(event, l->dma), "an event"))
        put_chunk(r, event, k, false);
}

/* ---- chunks ---- */

/* Copies to the engine end with a kernel, copies from it begin with one: the chunk that nothing
 * overlaps with is small. left: of all that comes next in the same streams. */
static uint64_t chunk_limit(const struct run *r, uint64_t done, uint64_t left)
{
    uint64_t most = r->c->tuning.chunk_bytes;

    return fk_min(most, fk_max(r->l->to_engine ? left / 2 : done, FIRST_CHUNK));
}

/* Pieces cost the bus more, and nothing else: for when kernels have to wait for the engine's. */
static enum way way_of(const struct run *r, const struct part *p, bool direct, bool whole, bool first)
{
    const struct fk_cuda_lane *l = r->l;

    if (r->c->base.pool.how.copy_engine[l->to_engine])
        return WAY_PIECES;
    bool crowded = l->crowded_at && fk_clock_us() - l->crowded_at < CROWDED_FOR_US;

    if (crowded && whole && r->sums != SUM_KERNEL && p->bytes / (p->end_region - p->region) >= PIECE_MIN &&
        fk_cuda_has_batch(r->c->cu))
        return WAY_PIECES;
    if (direct || !l->ring)
        return WAY_DIRECT;
    return first && !l->to_engine && !crowded ? WAY_AHEAD : WAY_STAGED;
}

/* The next chunk of the part, at most `limit` bytes of several blocks, or of tiles of one. whole:
 * a block is not cut, however large it is. */
static struct chunk cut(const struct run *r, const struct part *p, uint32_t block, uint32_t tile,
                        uint64_t limit, bool whole)
{
    const struct fk_cuda_tile *t = r->c->tiles;
    struct chunk k = { .block = block, .n_blocks = 1, .tile = tile, .offset = t[tile].offset,
                       .region = p->region, .end_region = p->end_region };
    uint32_t end = tile;

    if (whole || p->bytes <= r->c->tuning.chunk_bytes) {
        k.n_blocks = (uint32_t)fk_min(fk_max(limit / p->bytes, 1ull), (uint64_t)(r->b->n - block));
        end = p->end_tile;
    }
    while (end < p->end_tile && t[end].offset + t[end].bytes - k.offset <= limit)
        end++;
    k.n_tiles = end - tile;
    k.bytes = t[end - 1].offset + t[end - 1].bytes - k.offset;
    return k;
}

static void run_part(struct run *r, const struct part *p, bool direct)
{
    bool whole = p->bytes <= r->c->tuning.chunk_bytes;  /* else blocks are cut in pieces of their own */
    uint64_t left = r->b->n * p->bytes, done = 0;
    uint32_t block = 0, tile = p->tile;

    while (block < r->b->n && go_on(r)) {
        enum way way = way_of(r, p, direct, whole, !done);
        /* The first layer is waited for as the last one is. */
        uint64_t limit = way == WAY_STAGED || way == WAY_AHEAD ? chunk_limit(r, done, left + (p->region ? r->later : 0))
                       : r->c->tuning.chunk_bytes;
        struct chunk k = cut(r, p, block, tile, limit, way == WAY_PIECES);
        if (way == WAY_AHEAD && k.n_blocks > FK_CUDA_FEW)
            way = WAY_STAGED;           /* lists come in the other stream */
        make_way(r, k.n_blocks * k.bytes, is_end(r, left));
        if (!go_on(r))
            return;
        if (way == WAY_DIRECT)
            copy_direct(r, &k, r->l->kernel);
        else if (way == WAY_AHEAD)
            copy_direct(r, &k, r->l->dma);
        else if (way == WAY_STAGED)
            copy_staged(r, &k);
        else
            copy_pieces(r, &k);
        r->chunks[way]++;
        done += k.n_blocks * k.bytes;
        left -= k.n_blocks * k.bytes;
        tile = k.tile + k.n_tiles;
        if (tile == p->end_tile) {
            tile = p->tile;
            block += k.n_blocks;
        }
    }
}

/* ---- layers ---- */

static cu_event layer_event(struct run *r)
{
    struct fk_cuda_lane *l = r->l;
    cu_event *e = &l->layer[l->next_layer++ % FK_CUDA_LAYER_EVENTS];

    if (failed(r, r->c->cu->EventRecord(l->order, l->dma), "an event") ||
        failed(r, r->c->cu->StreamWaitEvent(l->kernel, l->order, 0), "an event"))
        return NULL;
    if ((*e || !failed(r, r->c->cu->EventCreate(e, CU_EVENT_NO_TIMING), "an event")) &&
        !failed(r, r->c->cu->EventRecord(*e, l->kernel), "an event"))
        return *e;
    return NULL;
}

static void told_by_driver(void *arg)
{
    const struct note *n = arg;

    n->progress->placed(n->progress->arg, n->regions);
}

/* All is put. From here on only the device can fail. */
static void tell_early(struct run *r)
{
    const struct fk_copy_progress *p = r->early;
    cu_event e = go_on(r) ? layer_event(r) : NULL;

    if (!e)
        return;
    r->sure = true;
    p->on_its_way(p->arg, e);
}

/* The driver calls on a stream of its own, so that no copy waits for the call. */
static void note_layers(struct run *r, const struct fk_copy_progress *progress, uint32_t regions,
                        cu_event e)
{
    const struct fk_cuda *cu = r->c->cu;
    struct note *n = &r->notes[r->n_notes];

    *n = (struct note){ progress, regions, r->n_put };
    if (r->by_driver && (failed(r, cu->StreamWaitEvent(r->l->notify, e, 0), "an event") ||
        failed(r, cu->LaunchHostFunc(r->l->notify, told_by_driver, n), "a call of the driver's")))
        return;
    r->n_notes++;
}

/* Room for what will be told; the driver tells unless it can't, or shall not. */
static void open_notes(struct run *r, const struct fk_copy_progress *progress)
{
    const struct fk_cuda *cu = r->c->cu;
    int least = 0, greatest = 0;

    r->notes = calloc(progress->n_layers, sizeof(*r->notes));
    if (!r->notes) {
        r->status = -ENOMEM;
        return;
    }
    r->by_driver = cu->LaunchHostFunc && !r->c->base.pool.how.poll_layers;
    if (r->by_driver && !r->l->notify &&
        (cu->CtxGetStreamPriorityRange(&least, &greatest) != CU_OK ||
         cu->StreamCreateWithPriority(&r->l->notify, CU_STREAM_NON_BLOCKING_FLAG, greatest) != CU_OK))
        r->by_driver = false;
}

/* All copies are done. After this nobody tells anything of this job. */
static void close_notes(struct run *r)
{
    if (r->by_driver)
        failed(r, r->c->cu->StreamSynchronize(r->l->notify), "a copy failed");
    tell_placed(r);
    free(r->notes);
}

static struct part part_of(const struct fk_cuda_copier *c, uint32_t region, uint32_t end)
{
    struct part p = { .tile = c->region_tiles[region], .end_tile = c->region_tiles[end],
                      .region = region, .end_region = end };

    p.bytes = c->tiles[p.end_tile - 1].offset + c->tiles[p.end_tile - 1].bytes - c->tiles[p.tile].offset;
    return p;
}

/* The first layer alone, so that the engine can begin; then more and more at a time, as larger
 * pieces are copied faster; fewer again at the end, when it waits for them. */
static uint32_t layers_together(uint32_t take, uint32_t left)
{
    if (left <= fk_min(take, LAST_LAYERS) * 3 / 2)
        return left;
    return fk_min(take, fk_max((left + 1) / 2, LAST_LAYERS));
}

static void run_layers(struct run *r, const struct fk_copy_progress *progress)
{
    uint32_t layer = 0, take = 1, region = 0;
    uint64_t done = 0;

    if (progress->placed)
        open_notes(r, progress);
    while (layer < progress->n_layers && go_on(r)) {
        uint32_t left = progress->n_layers - layer;
        uint32_t last = layer + (layer ? layers_together(take, left) : 1);
        if (progress->layer_ends[last - 1] == region) {     /* nothing of their own */
            layer = last;
            continue;
        }
        struct part p = part_of(r->c, region, progress->layer_ends[last - 1]);
        bool direct = !r->l->ring || p.bytes < DIRECT_PIECE;
        done += r->b->n * p.bytes;
        r->later = r->b->n * r->c->slice_bytes - done;
        run_part(r, &p, direct);
        /* The bus belongs to the layers that come first. */
        if (direct && !r->status && !failed(r, r->c->cu->EventRecord(r->l->order, r->l->kernel), "an event"))
            failed(r, r->c->cu->StreamWaitEvent(r->l->dma, r->l->order, 0), "an event");
        cu_event e = go_on(r) ? layer_event(r) : NULL;
        if (e)
            progress->layers(progress->arg, p.end_region, e);
        if (e && progress->placed)
            note_layers(r, progress, p.end_region, e);
        region = p.end_region;
        if (p.bytes < LAYER_PIECE)
            take = fk_min(take * 2, (uint32_t)(LAYER_PIECE * (last - layer) / p.bytes) + 1);
        layer = last;
    }
}

/* ---- what is not page-locked ---- */

static void copy_slowly(struct run *r, const struct fk_copy_progress *progress)
{
    const struct fk_cuda *cu = r->c->cu;

    for (uint32_t i = 0; i < r->b->n && go_on(r); i++) {
        char *at = slice_at(r, i);
        for (uint32_t g = 0; g < r->c->base.n_regions && !r->status; g++) {
            const flexkv_region *region = &r->c->base.regions[g];
            cu_ptr page = (cu_ptr)(uintptr_t)region->base + r->b->pages[i] * region->stride;
            failed(r, r->l->to_engine ? cu->MemcpyHtoD(page, at, region->page_bytes)
                                      : cu->MemcpyDtoH(at, page, region->page_bytes), "a copy failed");
            at += region->page_bytes;
        }
        r->done_blocks += !r->status;
    }
    if (fk_copy_in_layers(progress) && go_on(r)) {
        progress->layers(progress->arg, r->c->base.n_regions, NULL);
        if (progress->placed)
            progress->placed(progress->arg, r->c->base.n_regions);
    }
}

/* ---- the job ---- */

/* ---- checksums ---- */

/* Before the first kernel, in whichever stream that is. */
static void zero_sums(struct run *r)
{
    const struct fk_cuda *cu = r->c->cu;
    struct fk_cuda_lane *l = r->l;

    if (!grow_lists(r, r->b->n))
        return;
    memset(host_sums(l), 0, 8ull * r->b->n);
    if (!failed(r, cu->MemcpyHtoDAsync(device_sums(l), host_sums(l), 8ull * r->b->n, l->kernel), "checksums") &&
        !failed(r, cu->EventRecord(l->order, l->kernel), "an event"))
        failed(r, cu->StreamWaitEvent(l->dma, l->order, 0), "an event");
}

/* What the kernel took of the blocks that are done. What is not what it should be was written to pages
 * all the same: they are not reported as loaded. */
static void settle_kernel_sums(struct run *r)
{
    struct fk_cuda_lane *l = r->l;
    uint64_t *sums = host_sums(l);

    if (!r->status && !failed(r, r->c->cu->MemcpyDtoHAsync(sums, device_sums(l), 8ull * r->b->n, l->kernel),
                              "checksums"))
        failed(r, r->c->cu->StreamSynchronize(l->kernel), "checksums");
    if (r->status) {                    /* nobody knows */
        r->done_blocks = 0;
        return;
    }
    for (uint32_t i = 0; i < r->done_blocks; i++) {
        if (fk_sum_settle(&r->c->base.pool.sums, r->b->slots[i], fk_sum_finish(sums[i]), l->to_engine))
            continue;
        r->done_blocks = i;
        r->status = -EBADMSG;
    }
}

/* By the CPU: of slots before they are loaded, or after they were stored. Returns how many are good. */
static uint32_t settle_slots(const struct run *r, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++)
        if (!fk_sum_settle(&r->c->base.pool.sums, r->b->slots[i], fk_sum(slice_at(r, i), r->c->slice_bytes),
                           r->l->to_engine))
            return i;
    return n;
}

static enum summing who_sums(const struct fk_cuda_copier *c, bool to_engine, bool layers, bool pinned)
{
    if (!c->base.pool.sums.sums)
        return SUM_NONE;
    /* What is told layer by layer must be known to be good before. */
    return c->sum_units && pinned && !layers && !c->base.pool.how.copy_engine[to_engine] ? SUM_KERNEL : SUM_CPU;
}

static bool all_pinned(const struct run *r)
{
    bool ok = true;

    for (uint32_t i = 0; i < r->b->n && ok; i++)
        ok = fk_pin_ensure(r->c->pin, slice_at(r, i), r->c->slice_bytes);
    return ok;
}

static void run_fast(struct run *r, const struct fk_copy_progress *progress)
{
    uint64_t start = fk_clock_us(), bytes = r->b->n * r->c->slice_bytes;

    if (r->sums == SUM_KERNEL)
        zero_sums(r);
    if (r->status)
        return;
    if (fk_copy_in_layers(progress) && (progress->n_layers > 1 || progress->placed)) {
        run_layers(r, progress);
    } else {
        struct part all = part_of(r->c, 0, r->c->base.n_regions);
        run_part(r, &all, !r->l->ring || bytes <= r->c->tuning.direct_bytes);
    }
    if (r->early)
        tell_early(r);
    r->draining = !r->sure;
    while (r->n_taken < r->n_put)       /* also of a job that was stopped or has failed */
        take_oldest(r);
    if (r->notes)
        close_notes(r);
    if (go_on(r)) {
        learn_rate(r->l, bytes, fk_clock_us() - start);
        r->done_blocks = r->b->n;
    }
    if (r->sums == SUM_KERNEL)
        settle_kernel_sums(r);
}

uint32_t fk_cuda_copy(struct fk_copier *base, const struct fk_copy_blocks *blocks,
                      const struct fk_copy_progress *progress, _Atomic bool *cancelled, int *status)
{
    struct fk_cuda_copier *c = (struct fk_cuda_copier *)base;
    struct run r = { .c = c, .l = &c->lane[blocks->to_engine], .b = blocks, .cancelled = cancelled };

    *status = 0;
    if (!blocks->n)
        return 0;
    if (c->dead || c->cu->CtxSetCurrent(c->context) != CU_OK) {
        *status = -EIO;
        return 0;
    }
    exact_timers();
    uint64_t start = fk_clock_us();
    bool pinned = all_pinned(&r), bad = false;
    uint64_t pinned_at = fk_clock_us();
    bool layers = fk_copy_in_layers(progress);
    r.sums = who_sums(c, blocks->to_engine, layers, pinned);
    struct fk_copy_blocks good = *blocks;
    if (r.sums == SUM_CPU && blocks->to_engine) {
        good.n = settle_slots(&r, blocks->n);
        bad = good.n < blocks->n;
        good.n = bad && layers ? 0 : good.n;
        r.b = &good;
    }
    if (progress && progress->on_its_way && !layers && !bad && r.sums != SUM_KERNEL)
        r.early = progress;
    if (r.early || layers)
        r.end_bytes = end_of(&r, blocks->n * c->slice_bytes);
    if (good.n && pinned)
        run_fast(&r, progress);
    else if (good.n)
        copy_slowly(&r, progress);
    if (r.sums == SUM_CPU && !blocks->to_engine)
        settle_slots(&r, r.done_blocks);
    fk_debug("GPU %d: %u blocks, %llu MiB %s it in %llu us%s, of which %llu to page-lock; chunks: %u "
             "direct, %u staged, %u in pieces", c->device, blocks->n,
             (unsigned long long)(blocks->n * c->slice_bytes / FK_MIB), blocks->to_engine ? "to" : "from",
             (unsigned long long)(fk_clock_us() - start), pinned ? "" : ", slowly",
             (unsigned long long)(pinned_at - start), r.chunks[WAY_DIRECT] + r.chunks[WAY_AHEAD],
             r.chunks[WAY_STAGED], r.chunks[WAY_PIECES]);
    *status = r.status || !bad ? r.status : -EBADMSG;
    return r.status && !r.done_blocks ? 0 : fk_min(r.done_blocks, good.n);
}
