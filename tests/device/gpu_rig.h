/* gpu_rig.h - what the tests on a GPU share: memory with known bytes on both sides. Plain programs:
 * the machines they run on have nothing but a C library and the driver. Exit status 77: no GPU. */
#ifndef FK_TESTS_GPU_RIG_H
#define FK_TESTS_GPU_RIG_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "base/clock.h"
#include "base/util.h"
#include "copy/cuda/cuda.h"
#ifdef FK_FAKE_DRIVER
#include "fake_driver.h"
#endif

#define MUST(x) do { if (!(x)) { \
    fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, #x); exit(1); } } while (0)

static const struct fk_cuda *cu;

#ifdef FK_FAKE_DRIVER
static inline void rig_open_device(int device)
{
    cu = &fake_driver;
}
#else
static inline void rig_open_device(int device)
{
    cu_context context;
    int n = 0;

    cu = fk_cuda_driver(true);
    if (!cu || cu->DeviceGetCount(&n) != CU_OK || n <= device) {
        printf("no GPU %d here\n", device);
        exit(77);
    }
    MUST(cu->DevicePrimaryCtxRetain(&context, device) == CU_OK);
    MUST(cu->CtxSetCurrent(context) == CU_OK);
}
#endif

struct rig_shape {
    uint32_t n_regions, pages, slots;
    uint64_t piece, stride;             /* odd regions have half a piece less, if `uneven` */
    uint64_t before, after;             /* bytes of other ranks in a slot, around the slice */
    bool uneven;
    uint32_t skew;                      /* the first byte of the pages' memory */
};

struct rig {
    struct rig_shape s;
    flexkv_region *regions;
    cu_ptr device;
    uint64_t device_bytes, slice, slot;
    char *image;                        /* what the device's memory holds, and what it should */
    char *pool;
    uint64_t pool_bytes;
};

/* Eight bytes of what belongs at 8 * i. */
static inline uint64_t rig_word(uint64_t seed, uint64_t i)
{
    uint64_t z = (seed + 1) * 0x9e3779b97f4a7c15ull ^ i * 0xbf58476d1ce4e5b9ull;

    z ^= z >> 29;
    return z * 0x94d049bb133111ebull;
}

static inline void rig_bytes(uint64_t seed, char *to, uint64_t n)
{
    for (uint64_t i = 0; i < n / 8; i++) {
        uint64_t w = rig_word(seed, i);
        memcpy(to + 8 * i, &w, 8);
    }
    uint64_t last = rig_word(seed, n / 8);
    memcpy(to + n / 8 * 8, &last, n % 8);
}

static inline void rig_open(struct rig *r, const struct rig_shape *s)
{
    *r = (struct rig){ .s = *s };
    r->regions = calloc(s->n_regions, sizeof(*r->regions));
    r->device_bytes = (uint64_t)s->n_regions * s->pages * s->stride + s->skew;
    MUST(cu->MemAlloc(&r->device, r->device_bytes) == CU_OK);
    for (uint32_t i = 0; i < s->n_regions; i++) {
        uint64_t bytes = s->uneven && i % 2 ? s->piece - s->piece / 2 : s->piece;
        r->regions[i] = (flexkv_region){
            .base = (char *)(uintptr_t)r->device + s->skew + (uint64_t)i * s->pages * s->stride,
            .stride = s->stride, .page_bytes = bytes, .pages = s->pages };
        r->slice += bytes;
    }
    r->slot = s->before + r->slice + s->after;
    r->pool_bytes = fk_round_up(r->slot * s->slots, 2 * FK_MIB);
    r->pool = mmap(NULL, r->pool_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    r->image = malloc(r->device_bytes);
    MUST(r->pool != MAP_FAILED && r->image);
}

static inline void rig_close(struct rig *r)
{
    MUST(cu->MemFree(r->device) == CU_OK);
    munmap(r->pool, r->pool_bytes);
    free(r->regions);
    free(r->image);
}

static inline void rig_fill(struct rig *r, uint64_t seed)
{
    rig_bytes(seed, r->image, r->device_bytes);
    MUST(cu->MemcpyHtoD(r->device, r->image, r->device_bytes) == CU_OK);
}

/* The device's memory holds exactly what the image says. */
static inline void rig_expect_device(struct rig *r)
{
    char *now = malloc(r->device_bytes);

    MUST(now && cu->MemcpyDtoH(now, r->device, r->device_bytes) == CU_OK);
    if (memcmp(now, r->image, r->device_bytes) != 0)
        for (uint64_t i = 0; i < r->device_bytes; i++)
            if (now[i] != r->image[i]) {
                fprintf(stderr, "wrong bytes on the device, first at %llu of %llu\n",
                        (unsigned long long)i, (unsigned long long)r->device_bytes);
                exit(1);
            }
    free(now);
}

/* Slot <-> page, in the image. */
static inline bool rig_same(const struct rig *r, uint32_t slot, uint32_t page)
{
    const char *at = r->pool + slot * r->slot + r->s.before;

    for (uint32_t i = 0; i < r->s.n_regions; i++) {
        uint64_t offset = (uint64_t)((char *)r->regions[i].base - (char *)(uintptr_t)r->device);
        if (memcmp(at, r->image + offset + page * r->s.stride, r->regions[i].page_bytes) != 0)
            return false;
        at += r->regions[i].page_bytes;
    }
    return true;
}

static inline void rig_to_image(struct rig *r, uint32_t slot, uint32_t page)
{
    const char *at = r->pool + slot * r->slot + r->s.before;

    for (uint32_t i = 0; i < r->s.n_regions; i++) {
        uint64_t offset = (uint64_t)((char *)r->regions[i].base - (char *)(uintptr_t)r->device);
        memcpy(r->image + offset + page * r->s.stride, at, r->regions[i].page_bytes);
        at += r->regions[i].page_bytes;
    }
}

#endif
