/*
 * test_direct.c - the probe of GPU direct storage and the reading of blocks by it, with a driver that is none
 * (fake_driver.h) and a cuFile that is none (fake_cufile.c) and works, is not there, or lies in one way or another.
 */
#include <fcntl.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <unistd.h>

#include <cmocka.h>

#include "../device/fake_driver.h"
#include "base/log.h"
#include "copy/cuda/direct.h"

static const char *library;

static int probe_with(const char *how, int timeout_ms, char *why)
{
    char path[] = "flexkv-direct-XXXXXX";
    int fds[2];
    struct fk_direct_params p = { .cu = &fake_driver, .library = library, .fds = fds, .n_fds = 2,
                                  .timeout_ms = timeout_ms };

    setenv("FAKE_CUFILE", how, 1);
    for (int i = 0; i < 2; i++) {
        strcpy(path, "flexkv-direct-XXXXXX");
        int fd = mkstemp(path);
        assert_true(fd >= 0);
        close(fd);
        fds[i] = open(path, O_RDWR | O_DIRECT | O_CLOEXEC);
        if (fds[i] < 0)
            fds[i] = open(path, O_RDWR | O_CLOEXEC);
        assert_true(fds[i] >= 0);
        unlink(path);
    }
    why[0] = '\0';
    int rc = fk_direct_probe(&p, why, 300);
    for (int i = 0; i < 2; i++)
        close(fds[i]);
    return rc;
}

static void a_good_one_passes(void **state)
{
    char why[300];

    assert_int_equal(probe_with("good", 10000, why), 0);
    assert_string_equal(why, "");
}

static void others_do_not(void **state)
{
    static const struct { const char *how, *why; } cases[] = {
        { "flip", "WRONG BYTES: what cuFileRead" }, { "nothing", "WRONG BYTES: what cuFileRead" },
        { "offset", "WRONG BYTES: what cuFileRead" }, { "no-write", "WRONG BYTES: what cuFileWrite" },
        { "short", "cuFileRead gave" }, { "bounce", "compatibility mode" },
        { "forced", "force_compat_mode" }, { "no-nvfs", "nvidia-fs" },
        { "no-driver", "nvidia-fs" }, { "overlayfs", "file system" }, { "no-bar", "GPU memory" },
    };
    char why[300];

    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        assert_int_equal(probe_with(cases[i].how, 10000, why), -ENOTSUP);
        if (!strstr(why, cases[i].why))
            fail_msg("%s: \"%s\" does not say \"%s\"", cases[i].how, why, cases[i].why);
    }
}

static void one_that_hangs_is_left(void **state)
{
    char why[300];

    assert_int_equal(probe_with("hang", 50, why), -ETIMEDOUT);
    assert_non_null(strstr(why, "50 ms"));
    sleep(3);                           /* what it holds is freed when it goes on */
}

static void nothing_there(void **state)
{
    struct fk_direct_params p = { .cu = &fake_driver, .library = "libnowhere.so.9", .n_fds = 1,
                                  .fds = (int[]){ 0 }, .timeout_ms = 10000 };
    char why[300];

    assert_int_equal(fk_direct_probe(&p, why, sizeof(why)), -ENOTSUP);
    assert_non_null(strstr(why, "libnowhere.so.9"));
    p.n_fds = 0;
    assert_int_equal(fk_direct_probe(&p, why, sizeof(why)), -ENOTSUP);
    assert_non_null(strstr(why, "ssd_cache_gb"));
}

/* First: what is said to it about its mode stays. */
static void one_that_will_not_give_up_its_mode(void **state)
{
    char why[300];

    setenv("FAKE_CUFILE", "compat", 1);
    assert_int_equal(probe_with("compat", 10000, why), -ENOTSUP);
    assert_non_null(strstr(why, "allow_compat_mode"));
}

/* ---- blocks ---- */

#define BLOCKS 24u
#define PAGES 40u

struct shape { uint64_t piece[3]; uint32_t slices; };

/* A file of blocks of several slices, and a copier whose pages get one of them. */
struct reading {
    uint64_t slice, block;
    unsigned char *image, *pages;
    flexkv_region regions[3];
    struct fk_copier *copier;
    char *pool, path[40];
    int fd;
};

static void open_reading(struct reading *r, const struct shape *s)
{
    char why[300];
    uint64_t seed = s->piece[0];

    *r = (struct reading){ .path = "flexkv-direct-XXXXXX" };
    for (int i = 0; i < 3; i++)
        r->slice += s->piece[i];
    r->block = fk_round_up(r->slice * s->slices, 4096);
    r->image = aligned_alloc(4096, r->block * BLOCKS);
    r->pages = calloc(PAGES, r->slice);
    for (uint64_t i = 0; i < r->block * BLOCKS; i += 8)
        memcpy(r->image + i, &(uint64_t){ fk_rng_next(&seed) }, 8);
    int fd = mkstemp(r->path);
    assert_true(fd >= 0);
    assert_int_equal(pwrite(fd, r->image, r->block * BLOCKS, 0), r->block * BLOCKS);
    close(fd);
    r->fd = open(r->path, O_RDONLY | O_DIRECT | O_CLOEXEC);
    if (r->fd < 0)
        r->fd = open(r->path, O_RDONLY | O_CLOEXEC);
    assert_true(r->fd >= 0);
    unsigned char *at = r->pages;
    for (int i = 0; i < 3; i++, at += PAGES * s->piece[i - 1])
        r->regions[i] = (flexkv_region){ at, s->piece[i], s->piece[i], PAGES };
    r->pool = aligned_alloc(4096, fk_round_up(r->slice, 4096) * 4);
    struct fk_copy_pool pool = { .base = r->pool, .bytes = fk_round_up(r->slice, 4096) * 4,
                                 .slot_bytes = fk_round_up(r->slice, 4096) };
    if (fk_cuda_copier_create(&fake_driver, 0, r->regions, 3, &r->copier, why, sizeof(why)))
        fail_msg("%s", why);
    assert_int_equal(fk_copier_attach(r->copier, &pool), 0);
    if (fk_direct_open((struct fk_cuda_copier *)r->copier, library, &r->fd, 1, why, sizeof(why)))
        fail_msg("%s", why);
}

static void close_reading(struct reading *r)
{
    fk_copier_detach(r->copier);
    fk_copier_destroy(r->copier);
    close(r->fd);
    unlink(r->path);
    free(r->pool);
    free(r->pages);
    free(r->image);
}

static uint32_t read_slice(struct reading *r, uint32_t slice, uint64_t *residues, bool stop, int *status)
{
    struct fk_copy_place places[BLOCKS];
    _Atomic bool cancelled = stop;

    memset(r->pages, 0x33, PAGES * r->slice);
    for (uint32_t i = 0; i < BLOCKS; i++)
        places[i] = (struct fk_copy_place){ .offset = i * r->block + slice * r->slice, .page = (i * 7 + 3) % PAGES };
    return fk_copier_read_files(r->copier, places, BLOCKS, residues, &cancelled, status);
}

static void expect_page(const struct reading *r, uint32_t block, uint32_t slice)
{
    const unsigned char *want = r->image + block * r->block + slice * r->slice;

    for (int i = 0; i < 3; i++) {
        const flexkv_region *g = &r->regions[i];
        assert_memory_equal((char *)g->base + (block * 7 + 3) % PAGES * g->stride, want, g->page_bytes);
        want += g->page_bytes;
    }
}

/* Whatever the sizes: pages get the bytes, and the slices' residues make up the block's checksum. */
static void blocks_are_read(void **state)
{
    static const struct shape shapes[] = {
        { { 4096, 4096, 8192 }, 1 }, { { 65536, 65536, 65536 }, 2 }, { { 1000, 24, 3072 }, 4 },
        { { 1000, 23, 4 }, 1 }, { { 8, 4, 1 }, 1 }, { { 300000, 4096, 5 }, 1 },
    };

    setenv("FAKE_CUFILE", "good", 1);
    for (size_t k = 0; k < fk_array_size(shapes); k++) {
        struct reading r;
        uint64_t residues[4][BLOCKS];
        int status;
        open_reading(&r, &shapes[k]);
        for (uint32_t s = 0; s < shapes[k].slices; s++) {
            assert_int_equal(read_slice(&r, s, residues[s], false, &status), BLOCKS);
            assert_int_equal(status, 0);
            for (uint32_t i = 0; i < BLOCKS; i++)
                expect_page(&r, i, s);
        }
        for (uint32_t i = 0; i < BLOCKS; i++) {
            struct fk_key key = { .lo = i * 77777777777ull, .hi = ~(uint64_t)i << 40 };
            uint64_t all = 0, bytes = r.slice * shapes[k].slices;
            for (uint32_t s = 0; s < shapes[k].slices; s++)
                all ^= fk_crc_times(residues[s][i], fk_crc_power(bytes - (s + 1) * r.slice));
            assert_int_equal(fk_block_checksum_of(key, all, fk_crc_power(bytes)),
                             fk_block_checksum(key, r.image + i * r.block, bytes));
        }
        close_reading(&r);
    }
}

/* What comes wrong has another residue; what does not come ends the job before it. */
static void what_goes_wrong_is_seen(void **state)
{
    static const struct shape shape = { { 4096, 4096, 8192 }, 1 };
    struct reading r;
    uint64_t good[BLOCKS], bad[BLOCKS];
    int status;

    setenv("FAKE_CUFILE", "good", 1);
    open_reading(&r, &shape);
    assert_int_equal(read_slice(&r, 0, good, false, &status), BLOCKS);
    setenv("FAKE_CUFILE", "flip", 1);
    assert_int_equal(read_slice(&r, 0, bad, false, &status), BLOCKS);
    for (uint32_t i = 0; i < BLOCKS; i++)
        assert_int_not_equal(good[i], bad[i]);
    setenv("FAKE_CUFILE", "short", 1);
    assert_int_equal(read_slice(&r, 0, bad, false, &status), 0);
    assert_int_equal(status, -EIO);
    setenv("FAKE_CUFILE", "good", 1);
    assert_int_equal(read_slice(&r, 0, bad, true, &status), 0);     /* stopped before it began */
    assert_int_equal(status, 0);
    assert_int_equal(read_slice(&r, 0, bad, false, &status), BLOCKS);
    assert_memory_equal(good, bad, sizeof(good));
    close_reading(&r);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(one_that_will_not_give_up_its_mode),
        cmocka_unit_test(a_good_one_passes),
        cmocka_unit_test(others_do_not),
        cmocka_unit_test(one_that_hangs_is_left),
        cmocka_unit_test(nothing_there),
        cmocka_unit_test(blocks_are_read),
        cmocka_unit_test(what_goes_wrong_is_seen),
    };

    library = argv[argc - 1];
    fk_log_set_level(FK_LOG_CRITICAL);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
