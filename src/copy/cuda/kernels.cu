/*
 * kernels.cu - the kernel of the cuda copier: blocks between an engine's paged KV tensors and a
 * linear side, which is pinned host memory (slots of the pool) or a staging ring on the device. For
 * each of the two there is a form of its own, and one that takes the blocks' checksums as it copies.
 *
 * Shipped as PTX (kernels.ptx.h, made by tools/gen-ptx), which the driver compiles for the device
 * it finds: compute capability 8.0 and later. Kept in plain C with CUDA's intrinsics.
 *
 *   tile  some bytes of one region's page, at most TILE_BYTES, by one warp
 *         | page: base + page number * stride | linear: offset in the block's slice | bytes |
 *   unit  (block, tile); warps take units in turn, neighbours neighbouring tiles
 */
#include <stdint.h>

struct tile {
    uint64_t base, stride;
    uint64_t offset;        /* in the slice */
    uint32_t bytes, align;  /* align: 16, 4 or 1: what all of its addresses and bytes are multiples of */
};

#define FEW 64

struct job {
    const struct tile *tiles;
    const uint32_t *pages, *slots;      /* of each block; NULL: of few blocks, below */
    char *linear;           /* of block 0's slice part */
    uint64_t linear_stride;
    uint64_t offset;        /* taken off the tiles' offsets: where the part begins in the slice */
    uint32_t n_blocks, n_tiles;
    uint32_t to_pages, reserved;
    uint32_t few[2][FEW];   /* pages, slots */
    unsigned long long *sums;   /* one for each block; the forms that take checksums add to it */
};

#define UNROLL 8            /* 16-byte loads under way in each lane: TILE_BYTES / 512 */
#define RING_UNROLL 4
#define RING_SUM_UNROLL 2       /* without a spill of its 32 registers */

template <typename T>
static __device__ __forceinline__ void copy(char *to, const char *from, uint32_t bytes, uint32_t lane)
{
    uint32_t n = bytes / sizeof(T);

    for (uint32_t i = lane; i < n; i += 32)
        __stcs((T *)to + i, __ldcs((const T *)from + i));
}

template <int AT_ONCE>
static __device__ __forceinline__ void copy16(char *to, const char *from, uint32_t bytes, uint32_t lane)
{
    const uint4 *src = (const uint4 *)from + lane;
    uint4 *dst = (uint4 *)to + lane;
    uint32_t n = bytes / 16;

    if (n % (AT_ONCE * 32) == 0) {
#pragma unroll 1
        for (; n; n -= AT_ONCE * 32, src += AT_ONCE * 32, dst += AT_ONCE * 32) {
            uint4 v[AT_ONCE];
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++)
                v[i] = __ldcs(src + i * 32);
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++)
                __stcs(dst + i * 32, v[i]);
        }
        return;
    }
    copy<uint4>(to, from, bytes, lane);
}

#define SUM_STEP 0x9e3779b97f4a7c15ull

/* fk_sum_unit of copy/sum.h; s: (unit + 1) * SUM_STEP. */
static __device__ __forceinline__ uint64_t sum_unit(uint64_t s, uint4 v)
{
    uint64_t a = ((uint64_t)v.y << 32 | v.x) ^ s;
    uint64_t b = ((uint64_t)v.w << 32 | v.z) ^ ((s << 32 | s >> 32) + 0xd1b54a32d192ed03ull);

    return (a * b) ^ __umul64hi(a, b);
}

/* As copy16, with the lane's part of the sum; unit: the tile's first. */
template <int AT_ONCE>
static __device__ __forceinline__ uint64_t sum16(char *to, const char *from, uint32_t bytes, uint64_t unit,
                                                 uint32_t lane)
{
    const uint4 *src = (const uint4 *)from + lane;
    uint4 *dst = (uint4 *)to + lane;
    uint32_t n = bytes / 16;
    uint64_t s = (unit + lane + 1) * SUM_STEP, sum = 0;

#pragma unroll 1
    for (; n >= AT_ONCE * 32; n -= AT_ONCE * 32, src += AT_ONCE * 32, dst += AT_ONCE * 32) {
        uint4 v[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++)
            v[i] = __ldcs(src + i * 32);
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++, s += 32 * SUM_STEP) {
            __stcs(dst + i * 32, v[i]);
            sum += sum_unit(s, v[i]);
        }
    }
#pragma unroll 1
    for (uint32_t i = lane; i < n; i += 32, src += 32, dst += 32, s += 32 * SUM_STEP) {
        uint4 v = __ldcs(src);
        __stcs(dst, v);
        sum += sum_unit(s, v);
    }
    return sum;
}

/* SLOTS: the linear side is the pool; else the ring, where block follows block. */
template <int AT_ONCE, bool SLOTS, bool SUMS>
static __device__ __forceinline__ void copy_blocks(const struct job &j)
{
    uint32_t lane = threadIdx.x % 32;
    uint32_t warp = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    uint32_t warps = gridDim.x * (blockDim.x / 32);
    uint64_t units = (uint64_t)j.n_blocks * j.n_tiles;

    for (uint64_t u = warp; u < units; u += warps) {
        uint32_t block = (uint32_t)(u / j.n_tiles);
        const struct tile t = j.tiles[u % j.n_tiles];
        uint64_t at = !SLOTS ? block : j.slots ? j.slots[block] : j.few[1][block];
        char *page = (char *)(t.base + (j.pages ? j.pages[block] : j.few[0][block]) * t.stride);
        char *linear = j.linear + at * j.linear_stride + (t.offset - j.offset);
        char *to = j.to_pages ? page : linear;
        const char *from = j.to_pages ? linear : page;
        if (SUMS) {                         /* then every tile is whole units */
            uint64_t sum = sum16<AT_ONCE>(to, from, t.bytes, t.offset / 16, lane);
            for (int o = 16; o; o /= 2)
                sum += __shfl_xor_sync(0xffffffffu, sum, o);
            if (lane == 0)
                atomicAdd(&j.sums[block], (unsigned long long)sum);
        } else if (t.align == 16)
            copy16<AT_ONCE>(to, from, t.bytes, lane);
        else if (t.align == 4)
            copy<uint32_t>(to, from, t.bytes, lane);
        else
            copy<uint8_t>(to, from, t.bytes, lane);
    }
}

/* Pinned memory: a few CTAs fill the bus. */
extern "C" __global__ void __launch_bounds__(512) fk_copy_direct(const struct job j)
{
    copy_blocks<UNROLL, true, false>(j);
}

extern "C" __global__ void __launch_bounds__(512) fk_sum_direct(const struct job j)
{
    copy_blocks<UNROLL, true, true>(j);
}

/* The ring: many CTAs of one warp, soon over. 32 registers for each thread are what a matrix
 * multiply's CTA of 384 threads with 168 each leaves of a multiprocessor. */
extern "C" __global__ void __maxnreg__(32) fk_copy_ring(const struct job j)
{
    copy_blocks<RING_UNROLL, false, false>(j);
}

extern "C" __global__ void __maxnreg__(32) fk_sum_ring(const struct job j)
{
    copy_blocks<RING_SUM_UNROLL, false, true>(j);
}

/*
 * What a block's bytes add to its CRC-64 (base/checksum.h), of a slice that was read into a buffer on the device.
 * Each thread takes a piece, eight bytes at a time; pieces are counted from the end, so that what comes behind a
 * piece is a whole number of them.
 */
#define PIECE 1024u
#define TABLES 8

struct residue_job {
    const char *data;
    uint64_t bytes;
    const unsigned long long *tables;   /* fk_crc_tables */
    const unsigned long long *powers;   /* fk_crc_power of 0, 1, 2 .. pieces */
    unsigned long long *residue;        /* 0 before */
};

static __device__ __forceinline__ uint64_t times(uint64_t a, uint64_t b)
{
    uint64_t product = 0;

#pragma unroll 1
    for (; a; a <<= 1, b = b >> 1 ^ (b & 1 ? 0xc96c5795d7870f42ull : 0))
        product ^= a >> 63 ? b : 0;
    return product;
}

static __device__ __forceinline__ uint64_t take_word(const uint64_t *t, uint64_t r, uint64_t v)
{
    v ^= r;
    r = 0;
#pragma unroll
    for (int k = 0; k < TABLES; k++)
        r ^= t[(TABLES - 1 - k) * 256 + (v >> 8 * k & 255)];
    return r;
}

extern "C" __global__ void __launch_bounds__(128) fk_residue(const struct residue_job j)
{
    __shared__ uint64_t t[TABLES * 256];
    uint64_t piece = (uint64_t)blockIdx.x * blockDim.x + threadIdx.x;
    uint64_t pieces = (j.bytes + PIECE - 1) / PIECE, r = 0;

    for (uint32_t i = threadIdx.x; i < TABLES * 256; i += blockDim.x)
        t[i] = j.tables[i];
    __syncthreads();
    if (piece < pieces) {
        uint64_t end = j.bytes - (pieces - 1 - piece) * PIECE, at = end > PIECE ? end - PIECE : 0;
#pragma unroll 1
        for (; at < end && at % 8; at++)
            r = t[(r ^ (uint8_t)j.data[at]) & 255] ^ r >> 8;
#pragma unroll 1
        for (; at + 8 <= end; at += 8)
            r = take_word(t, r, *(const uint64_t *)(j.data + at));
#pragma unroll 1
        for (; at < end; at++)
            r = t[(r ^ (uint8_t)j.data[at]) & 255] ^ r >> 8;
        r = times(r, j.powers[pieces - 1 - piece]);
    }
    for (int o = 16; o; o /= 2)
        r ^= __shfl_xor_sync(0xffffffffu, r, o);
    if (threadIdx.x % 32 == 0)
        atomicXor(j.residue, (unsigned long long)r);
}
