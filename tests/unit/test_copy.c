/*
 * test_copy.c - src/copy/: host backend and team. Regions of odd sizes and strides, byte by byte
 * and with guard bytes between pages; one to four threads; cancelled and failing work.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <unistd.h>

#include "base/util.h"
#include "copy/copy.h"
#include "copy/team.h"

enum { GUARD = 0xa5, REGIONS = 3, PAGES = 64, SLOTS = 40 };
static const uint64_t page_bytes[REGIONS] = { 1, 777, 4096 };
static const uint64_t stride[REGIONS] = { 3, 777, 5001 };
#define SLICE (1 + 777 + 4096)
#define SLOT_BYTES (3 * SLICE + 64)      /* three ranks and a rest that nobody owns */

struct rig {
    flexkv_region regions[REGIONS];
    unsigned char *memory[REGIONS];
    unsigned char *pool;
    struct fk_copy_target target;
};

static void set_up(struct rig *r, uint32_t rank)
{
    for (int i = 0; i < REGIONS; i++) {
        r->memory[i] = malloc(PAGES * stride[i]);
        memset(r->memory[i], GUARD, PAGES * stride[i]);
        r->regions[i] = (flexkv_region){ r->memory[i], stride[i], page_bytes[i], PAGES };
    }
    r->pool = malloc(SLOTS * SLOT_BYTES);
    memset(r->pool, GUARD, SLOTS * SLOT_BYTES);
    r->target = (struct fk_copy_target){ .regions = r->regions, .n_regions = REGIONS,
                                         .pool = (char *)r->pool, .slot_bytes = SLOT_BYTES,
                                         .slice_offset = rank * SLICE };
}

static void tear_down(struct rig *r)
{
    for (int i = 0; i < REGIONS; i++)
        free(r->memory[i]);
    free(r->pool);
}

/* Byte `at` of block `b`, counted over all regions. */
static unsigned char byte_of(uint32_t b, uint64_t at)
{
    return (unsigned char)((b + 1) * 131 + at * 7 + (at >> 8));
}

static void fill_page(struct rig *r, uint32_t page, uint32_t b)
{
    uint64_t at = 0;

    for (int i = 0; i < REGIONS; i++)
        for (uint64_t k = 0; k < page_bytes[i]; k++)
            r->memory[i][page * stride[i] + k] = byte_of(b, at++);
}

/* block_of[page]: whose bytes are there; FK_NONE: still guard bytes, as between the pages. */
static void expect_pages(const struct rig *r, const uint32_t *block_of)
{
    uint64_t start = 0;

    for (int i = 0; i < REGIONS; i++) {
        for (uint32_t p = 0; p < PAGES; p++) {
            for (uint64_t k = 0; k < stride[i]; k++) {
                bool ours = k < page_bytes[i] && block_of[p] != FK_NONE;
                unsigned char want = ours ? byte_of(block_of[p], start + k) : GUARD;
                if (r->memory[i][p * stride[i] + k] != want)
                    fail_msg("region %d page %u byte %zu", i, p, (size_t)k);
            }
        }
        start += page_bytes[i];
    }
}

static void expect_pool(const struct rig *r, const uint32_t *block_of, uint32_t rank)
{
    for (uint32_t s = 0; s < SLOTS; s++) {
        for (uint64_t k = 0; k < SLOT_BYTES; k++) {
            bool ours = block_of[s] != FK_NONE && k / SLICE == rank;
            unsigned char want = ours ? byte_of(block_of[s], k % SLICE) : GUARD;
            if (r->pool[s * SLOT_BYTES + k] != want)
                fail_msg("slot %u byte %zu", s, (size_t)k);
        }
    }
}

static void host_moves_these_bytes_and_no_others(void **state)
{
    const struct fk_copy_backend *host = fk_copy_backend("host");
    static const uint32_t pages[] = { 63, 0, 7 }, slots[] = { 0, 39, 17 }, to[] = { 1, 62, 30 };
    uint32_t in_slot[SLOTS], in_page[PAGES];

    assert_non_null(host);
    for (uint32_t rank = 0; rank < 3; rank++) {
        uint32_t done;
        struct rig r;
        set_up(&r, rank);
        memset(in_slot, 0xff, sizeof(in_slot));
        memset(in_page, 0xff, sizeof(in_page));
        for (uint32_t b = 0; b < 3; b++) {
            fill_page(&r, pages[b], b);
            in_page[pages[b]] = in_slot[slots[b]] = b;
        }
        struct fk_copy_blocks put = { slots, pages, 3, false };
        assert_int_equal(host->run(&r.target, &put, &done), 0);
        expect_pool(&r, in_slot, rank);
        expect_pages(&r, in_page);
        for (uint32_t b = 0; b < 3; b++)
            in_page[to[b]] = b;
        struct fk_copy_blocks get = { slots, to, 3, true };
        assert_int_equal(host->run(&r.target, &get, &done), 0);
        expect_pool(&r, in_slot, rank);
        expect_pages(&r, in_page);
        tear_down(&r);
    }
}

static void unknown_backends_are_unknown(void **state)
{
    assert_null(fk_copy_backend("vulkan"));
    assert_null(fk_copy_backend(""));
}

/* ---- team: on a backend that notes what it was given ---- */

enum { MANY = 3000 };
static _Atomic uint32_t times[MANY];
static _Atomic uint32_t calls, done_blocks;
static uint32_t fail_from, cancel_after;
static _Atomic bool cancelled;

static int noting_run(const struct fk_copy_target *t, const struct fk_copy_blocks *b, uint32_t *done)
{
    atomic_fetch_add(&calls, 1);
    for (uint32_t i = 0; i < b->n; i++) {
        *done = i;
        if (b->slots[i] >= fail_from)
            return -EIO;
        assert_int_equal(b->pages[i], b->slots[i] + 5);
        atomic_fetch_add(&times[b->slots[i]], 1);
        if (atomic_fetch_add(&done_blocks, 1) + 1 >= cancel_after)
            atomic_store(&cancelled, true);
    }
    if (calls % 7 == 0)
        usleep(100);
    return 0;
}

static const struct fk_copy_backend noting = { "noting", noting_run };

/* The leading ok blocks were done once each. */
static uint32_t run_team(unsigned threads, uint32_t n, uint32_t fails, uint32_t cancels, int *status)
{
    static uint32_t slots[MANY], pages[MANY];
    flexkv_region region = { .base = slots, .stride = 200000, .page_bytes = 200000, .pages = 1 };
    struct fk_copy_target target = { .regions = &region, .n_regions = 1 };
    struct fk_copy_blocks blocks = { slots, pages, n, false };
    struct fk_team *team;

    for (uint32_t i = 0; i < MANY; i++) {
        slots[i] = i;
        pages[i] = i + 5;
        atomic_store(&times[i], 0);
    }
    fail_from = fails;
    cancel_after = cancels;
    atomic_store(&cancelled, cancels == 0);
    atomic_store(&calls, 0);
    atomic_store(&done_blocks, 0);
    assert_int_equal(fk_team_create(threads, &team), 0);
    *status = 0;
    uint32_t ok = fk_team_copy(team, &noting, &target, &blocks, &cancelled, status);
    fk_team_destroy(team);
    for (uint32_t i = 0; i < MANY; i++) {
        if (i < ok)
            assert_int_equal(times[i], 1);
        else
            assert_true(times[i] <= 1);
    }
    return ok;
}

static void team_does_each_block_once(void **state)
{
    static const uint32_t sizes[] = { 0, 1, 4, 5, 6, 10, 11, 500, MANY };
    int status;

    for (unsigned threads = 1; threads <= 4; threads++) {
        for (size_t i = 0; i < fk_array_size(sizes); i++) {
            assert_int_equal(run_team(threads, sizes[i], FK_NONE, FK_NONE, &status), sizes[i]);
            assert_int_equal(status, 0);
            assert_int_equal(done_blocks, sizes[i]);
        }
    }
}

static void cancel_stops_at_a_leading_part(void **state)
{
    int status;

    for (unsigned threads = 1; threads <= 4; threads++) {
        assert_int_equal(run_team(threads, MANY, FK_NONE, 0, &status), 0);  /* before it began */
        assert_int_equal(done_blocks, 0);
        for (uint32_t after = 1; after < 2000; after += 333) {
            uint32_t ok = run_team(threads, MANY, FK_NONE, after, &status);
            assert_in_range(ok, after, after + 4 * 5);      /* a portion more for each thread */
            assert_int_equal(ok, done_blocks);
        }
    }
}

static void failure_ends_before_the_block_that_failed(void **state)
{
    int status;

    for (unsigned threads = 1; threads <= 4; threads++) {
        for (uint32_t at = 0; at < 2000; at += 401) {
            uint32_t ok = run_team(threads, MANY, at, FK_NONE, &status);
            assert_true(ok <= at && at - ok < 5);           /* its portion counts as failed */
            assert_int_equal(status, -EIO);
        }
    }
}

static void one_team_works_many_times(void **state)
{
    struct rig r;
    struct fk_team *team;
    uint32_t pages[PAGES], slots[PAGES], in_page[PAGES];
    const struct fk_copy_backend *host = fk_copy_backend("host");
    _Atomic bool never = false;
    int status = 0;

    set_up(&r, 1);
    assert_int_equal(fk_team_create(3, &team), 0);
    memset(in_page, 0xff, sizeof(in_page));
    for (uint32_t i = 0; i < SLOTS; i++) {
        pages[i] = i;
        slots[i] = SLOTS - 1 - i;
        fill_page(&r, i, i);
        in_page[i] = i;
    }
    struct fk_copy_blocks put = { slots, pages, SLOTS, false }, get = { slots, pages, SLOTS, true };
    for (int round = 0; round < 200; round++) {
        assert_int_equal(fk_team_copy(team, host, &r.target, &put, &never, &status), SLOTS);
        for (uint32_t i = 0; i < SLOTS; i++)
            fill_page(&r, i, 99);
        assert_int_equal(fk_team_copy(team, host, &r.target, &get, &never, &status), SLOTS);
        expect_pages(&r, in_page);
    }
    fk_team_destroy(team);
    fk_team_destroy(NULL);
    tear_down(&r);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(host_moves_these_bytes_and_no_others),
        cmocka_unit_test(unknown_backends_are_unknown),
        cmocka_unit_test(team_does_each_block_once),
        cmocka_unit_test(cancel_stops_at_a_leading_part),
        cmocka_unit_test(failure_ends_before_the_block_that_failed),
        cmocka_unit_test(one_team_works_many_times),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
