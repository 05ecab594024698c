/* test_events.c - src/events: labels, names, journal and lists, view, names files. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include <cmocka.h>

#include <fcntl.h>
#include <sys/stat.h>

#include "base/log.h"
#include "events/announce.h"
#include "events/names_file.h"

/* ---- labels ---- */

static void labels_are_found_by_number_and_id(void **state)
{
    struct fk_labels l = { 0 };
    char lora[32], salt[32], too_long[300];

    assert_int_equal(fk_labels_get(&l, NULL, NULL), 0);
    assert_int_equal(fk_labels_get(&l, "", NULL), 0);
    assert_null(fk_labels_at(&l, 0)->salt);
    for (uint32_t i = 1; i <= 1000; i++) {
        snprintf(lora, sizeof(lora), "%s%u", i % 2 ? "lora" : "", i);
        snprintf(salt, sizeof(salt), "salt%u", i / 2);
        assert_int_equal(fk_labels_get(&l, i % 3 ? lora : NULL, salt), i);
    }
    for (uint32_t i = 1; i <= 1000; i++) {
        const struct fk_label *at = fk_labels_at(&l, i);
        snprintf(salt, sizeof(salt), "salt%u", i / 2);
        assert_string_equal(at->salt, salt);
        assert_int_equal(at->lora != NULL, i % 3 != 0);
        assert_int_equal(fk_labels_get(&l, at->lora, at->salt), i);
        assert_int_equal(fk_labels_find(&l, at->id), i);
    }
    assert_int_equal(fk_labels_find(&l, 12345), FK_NONE);
    assert_int_not_equal(fk_label_id("a", "b"), fk_label_id("ab", ""));     /* parts do not run together */
    assert_int_not_equal(fk_label_id("a", NULL), fk_label_id(NULL, "a"));
    memset(too_long, 'x', sizeof(too_long));
    too_long[299] = 0;
    assert_int_equal(fk_labels_get(&l, too_long, NULL), FK_NONE);
    too_long[FK_LABEL_TEXT_MAX] = 0;
    assert_int_equal(fk_labels_get(&l, too_long, NULL), 1001);
    fk_labels_fini(&l);
}

/* ---- journal ---- */

static void add(struct fk_journal *j, uint64_t id, uint32_t n_tokens)
{
    struct fk_event *e = fk_journal_add(j, n_tokens);

    assert_non_null(e);
    *e = (struct fk_event){ .id = id, .hash = id * 3, .n_tokens = n_tokens, .medium = 1,
                            .kind = n_tokens ? FK_EVENT_STORED : FK_EVENT_REMOVED };
    for (uint32_t i = 0; i < n_tokens; i++)
        fk_event_tokens(e)[i] = (uint32_t)id * 100 + i;
}

static void expect(const struct fk_event *e, uint64_t id)
{
    assert_non_null(e);
    assert_int_equal(e->id, id);
    assert_int_equal(e->hash, id * 3);
    for (uint32_t i = 0; i < e->n_tokens; i++)
        assert_int_equal(fk_event_tokens(e)[i], (uint32_t)id * 100 + i);
}

/* Whoever reads in time sees every event once and whole, wherever the ring's end falls. */
static void a_journal_wraps_at_every_place(void **state)
{
    for (uint32_t tokens = 0; tokens < 40; tokens++) {
        struct fk_journal j;
        uint64_t rng = tokens + 1, cursor = 0, made = 0, seen = 0;
        assert_int_equal(fk_journal_init(&j, 4096), 0);
        for (int i = 0; i < 3000; i++) {
            uint32_t burst = 1 + fk_rng_below(&rng, 8);
            for (uint32_t k = 0; k < burst; k++)
                add(&j, ++made, fk_rng_below(&rng, 2) ? tokens : fk_rng_below(&rng, 50));
            assert_true(fk_journal_has(&j, cursor));
            for (uint32_t k = 0; k < burst; k++)
                expect(fk_journal_next(&j, &cursor), ++seen);
            assert_null(fk_journal_next(&j, &cursor));
        }
        assert_int_equal(j.made, made);
        fk_journal_fini(&j);
    }
}

/* From any cursor that is still in it all events follow, up to the last. */
static void a_late_reader_falls_off_or_sees_all(void **state)
{
    struct fk_journal j;
    uint64_t rng = 5, place[2000];
    uint32_t off = 0, on = 0;

    assert_int_equal(fk_journal_init(&j, 4096), 0);
    for (uint32_t i = 0; i < 2000; i++) {
        place[i] = j.head;
        add(&j, i, fk_rng_below(&rng, 20));
    }
    for (uint32_t i = 0; i < 2000; i++) {
        uint64_t cursor = place[i];
        if (!fk_journal_has(&j, cursor)) {
            off++;
            assert_int_equal(on, 0);            /* the old ones only */
            continue;
        }
        on++;
        for (uint32_t k = i; k < 2000; k++)
            expect(fk_journal_next(&j, &cursor), k);
        assert_null(fk_journal_next(&j, &cursor));
    }
    assert_true(off > 1000 && on > 20);
    uint64_t cursor = j.head;
    assert_true(fk_journal_has(&j, cursor));
    fk_journal_gap(&j);
    assert_false(fk_journal_has(&j, cursor));
    cursor = j.head;
    add(&j, 7, 3);
    expect(fk_journal_next(&j, &cursor), 7);
    assert_null(fk_journal_add(&j, 4096));      /* larger than can be: everyone falls off */
    assert_false(fk_journal_has(&j, cursor));
    fk_journal_fini(&j);
}

static void lists_from_elsewhere_are_checked(void **state)
{
    struct fk_event_list list = { 0 }, copy = { 0 };
    struct fk_event e = { .kind = FK_EVENT_STORED, .medium = 2, .n_tokens = 3, .id = 9 };
    uint32_t tokens[3] = { 1, 2, 3 };
    size_t at = 0;

    assert_int_equal(fk_event_list_add(&list, &e, tokens), 0);
    e.kind = FK_EVENT_REMOVED;
    e.n_tokens = 0;
    assert_int_equal(fk_event_list_add(&list, &e, NULL), 0);
    assert_int_equal(fk_event_list_load(&copy, list.bytes.data, list.bytes.len, 2), 0);
    assert_int_equal(fk_event_tokens(fk_event_list_next(&copy, &at))[2], 3);
    assert_int_equal(fk_event_list_next(&copy, &at)->kind, FK_EVENT_REMOVED);
    assert_null(fk_event_list_next(&copy, &at));
    assert_int_equal(fk_event_list_load(&copy, list.bytes.data, list.bytes.len, 1), -EPROTO);
    assert_int_equal(fk_event_list_load(&copy, list.bytes.data, list.bytes.len, 3), -EPROTO);
    for (size_t n = 0; n < list.bytes.len; n++)
        assert_int_equal(fk_event_list_load(&copy, list.bytes.data, n, 2), -EPROTO);
    uint64_t rng = 3;
    for (int i = 0; i < 20000; i++) {           /* no sanitizer may find anything */
        uint8_t bytes[200];
        memcpy(bytes, list.bytes.data, list.bytes.len);
        bytes[fk_rng_below(&rng, (uint32_t)list.bytes.len)] ^= (uint8_t)(1u << fk_rng_below(&rng, 8));
        fk_event_list_clear(&copy);
        if (fk_event_list_load(&copy, bytes, list.bytes.len, 2) == 0)
            for (at = 0; fk_event_list_next(&copy, &at);)
                ;
    }
    fk_event_list_free(&list);
    fk_event_list_free(&copy);
}

/* ---- view ---- */

enum { BLOCKS = 6000 };

static struct fk_view_item item_of(uint32_t i, uint8_t medium)
{
    uint64_t rng = i / 4;                       /* clusters: neighbours share their home */

    return (struct fk_view_item){ .id = fk_rng_next(&rng) ^ (uint64_t)(i % 4) << 62, .hash = i,
                                  .medium = medium };
}

static void a_view_is_a_set_and_finds_what_is_gone(void **state)
{
    static bool model[BLOCKS][3], seen[BLOCKS][3];
    struct fk_view v = { 0 };
    uint64_t rng = 11;
    struct fk_view_item gone[64], out;

    for (int round = 0; round < 300; round++) {
        fk_view_round_begin(&v);
        memset(seen, 0, sizeof(seen));
        for (int k = 0; k < 2000; k++) {
            uint32_t i = fk_rng_below(&rng, round % 100 < 50 ? BLOCKS : 100);
            uint8_t m = (uint8_t)(1 + fk_rng_below(&rng, 2));
            struct fk_view_item item = item_of(i, m);
            switch (fk_rng_below(&rng, 3)) {
            case 0:
                assert_int_equal(fk_view_add(&v, &item), !model[i][m]);
                model[i][m] = seen[i][m] = true;
                break;
            case 1:
                assert_int_equal(fk_view_see(&v, item.id, m), model[i][m]);
                seen[i][m] = model[i][m];
                break;
            default:
                assert_int_equal(fk_view_remove(&v, item.id, m, &out), model[i][m]);
                if (model[i][m])
                    assert_int_equal(out.hash, i);
                model[i][m] = false;
            }
        }
        if (round % 3 == 0)
            continue;                           /* a round that was given up */
        for (uint32_t n = 64; n == 64;) {
            n = fk_view_round_gone(&v, gone, 64);
            for (uint32_t k = 0; k < n; k++) {
                uint32_t i = (uint32_t)gone[k].hash;
                assert_true(model[i][gone[k].medium] && !seen[i][gone[k].medium]);
                model[i][gone[k].medium] = false;
            }
            for (int k = 0; k < 20; k++) {      /* the world goes on meanwhile */
                uint32_t i = fk_rng_below(&rng, BLOCKS);
                struct fk_view_item item = item_of(i, 1);
                if (fk_rng_below(&rng, 2)) {
                    assert_int_equal(fk_view_add(&v, &item), !model[i][1]);
                    model[i][1] = seen[i][1] = true;
                } else {
                    assert_int_equal(fk_view_remove(&v, item.id, 1, &out), model[i][1]);
                    model[i][1] = false;
                }
            }
        }
        uint64_t there = 0;
        for (uint32_t i = 0; i < BLOCKS; i++)
            for (int m = 1; m <= 2; m++) {
                assert_int_equal(model[i][m], model[i][m] && seen[i][m]);   /* all others were given */
                there += model[i][m];
            }
        assert_int_equal(v.n, there);
    }
    fk_view_clear(&v);
    assert_int_equal(v.n, 0);
    assert_false(fk_view_see(&v, item_of(1, 1).id, 1));
    fk_view_fini(&v);
}

/* ---- names files ---- */

enum { SLOTS = 150, STRIPE = 8, TOKENS = 5 };
static char dir[2][64];

static struct fk_names_file *open_names(uint8_t uuid, uint32_t tokens)
{
    const char *dirs[2] = { dir[0], dir[1] };
    struct fk_names_file_params p = { .name = "s", .dirs = dirs, .n_dirs = 2, .n_slots = SLOTS,
                                      .stripe_slots = STRIPE, .tokens_per_block = tokens,
                                      .uuid = { uuid } };
    struct fk_names_file *nf;

    assert_int_equal(fk_names_file_open(&p, &nf), 0);
    return nf;
}

static struct fk_stored_name name_of(uint32_t slot)
{
    return (struct fk_stored_name){ .key = { slot + 1, 77 }, .hash = slot + 1000, .parent = slot,
                                    .root = slot % 2, .label = slot % 3 ? fk_label_id("lo", "sa") : 0 };
}

static void write_names(struct fk_names_file *nf, uint32_t first, uint32_t n, uint32_t dirs_out)
{
    static uint32_t tokens[SLOTS][TOKENS];
    struct fk_name_out out[SLOTS];

    for (uint32_t i = 0; i < n; i++) {
        for (uint32_t k = 0; k < TOKENS; k++)
            tokens[i][k] = (first + i) * 10 + k;
        out[i] = (struct fk_name_out){ .slot = first + i, .name = name_of(first + i),
                                       .tokens = tokens[i], .lora = "lo", .salt = "sa" };
    }
    fk_names_file_write(nf, out, n, dirs_out);
}

/* How many of the names are there; what is there must be right. */
static uint32_t read_names_but(struct fk_names_file *nf, uint32_t window, uint32_t dirs_out)
{
    struct fk_names_reader r;
    uint32_t n = 0;

    fk_names_reader_begin(&r, nf, window, dirs_out);
    for (uint32_t slot = 0; slot < SLOTS + 2; slot++) {
        struct fk_stored_name want = name_of(slot), got;
        struct fk_key other = { slot + 2, 77 };
        uint32_t tokens[TOKENS];
        assert_false(fk_names_reader_get(&r, slot, other, &got, tokens));
        if (!fk_names_reader_get(&r, slot, want.key, &got, tokens))
            continue;
        n++;
        assert_int_equal(got.hash, want.hash);
        assert_int_equal(got.parent, want.parent);
        assert_int_equal(got.label, want.label);
        assert_int_equal(got.root, want.root);
        for (uint32_t k = 0; k < TOKENS; k++)
            assert_int_equal(tokens[k], slot * 10 + k);
    }
    fk_names_reader_end(&r);
    return n;
}

static uint32_t read_names(struct fk_names_file *nf, uint32_t window)
{
    return read_names_but(nf, window, 0);
}

static void no_lines(void *arg, const char *line)
{
    ++*(uint32_t *)arg;
}

static void names_survive_on_disk(void **state)
{
    struct fk_names_file *nf = open_names(1, TOKENS);
    struct fk_labels labels = { 0 };
    struct fk_names_fsck f = { 0 };
    uint32_t lines = 0;

    assert_int_equal(read_names(nf, 4096), 0);
    write_names(nf, 3, 100, 0);                 /* over many stripes */
    write_names(nf, 120, 20, 1);                /* one directory is out */
    assert_int_equal(read_names(nf, 1), 112);
    assert_int_equal(read_names_but(nf, 1, 1) + read_names_but(nf, 1, 2), 112);
    assert_int_equal(read_names_but(nf, 1, 3), 0);
    fk_names_file_close(nf);
    nf = open_names(1, TOKENS);
    assert_int_equal(read_names(nf, 1 << 20), 112);
    fk_names_file_load_labels(nf, &labels);
    assert_int_equal(labels.list.len, 2);
    assert_string_equal(fk_labels_at(&labels, 1)->salt, "sa");
    assert_int_equal(fk_names_file_errors(nf), 0);
    fk_names_file_close(nf);
    for (int d = 0; d < 2; d++)
        assert_int_equal(fk_names_file_fsck(dir[d], "s", &f, no_lines, &lines), 0);
    assert_int_equal(f.records, 112);
    assert_int_equal(f.empty, SLOTS - 112);
    assert_int_equal(f.labels, 2);              /* one in each */
    assert_int_equal(f.damaged + f.bad_labels + lines, 0);
    nf = open_names(1, TOKENS + 1);             /* another geometry, then another store */
    assert_int_equal(fk_names_file_fsck(dir[0], "s", &f, no_lines, &lines), 0);
    fk_names_file_close(nf);
    nf = open_names(1, TOKENS);
    assert_int_equal(read_names(nf, 4096), 0);
    write_names(nf, 0, 10, 0);
    fk_names_file_close(nf);
    nf = open_names(2, TOKENS);
    assert_int_equal(read_names(nf, 4096), 0);
    fk_names_file_close(nf);
    fk_labels_fini(&labels);
    assert_int_equal(fk_names_file_fsck(dir[0], "none", &f, no_lines, &lines), -ENOENT);
}

static void flipped_bits_cost_names_only(void **state)
{
    static const char *const endings[] = { "names", "labels" };
    uint64_t rng = 21;
    uint32_t lost = 0;

    for (int round = 0; round < 300; round++) {
        struct fk_names_file *nf = open_names(3, TOKENS);
        struct fk_labels labels = { 0 };
        struct fk_names_fsck f = { 0 };
        uint32_t lines = 0;
        write_names(nf, 0, SLOTS, 0);
        fk_names_file_close(nf);
        for (uint32_t k = 0; k < 1 + fk_rng_below(&rng, 20); k++) {
            char path[200];
            struct stat st;
            uint8_t byte;
            snprintf(path, sizeof(path), "%s/s.%s", dir[fk_rng_below(&rng, 2)],
                     endings[fk_rng_below(&rng, 2)]);
            int fd = open(path, O_RDWR);
            assert_int_equal(fstat(fd, &st), 0);
            off_t at = (off_t)(fk_rng_next(&rng) % (uint64_t)st.st_size);
            assert_int_equal(pread(fd, &byte, 1, at), 1);
            byte ^= (uint8_t)(1u << fk_rng_below(&rng, 8));
            assert_int_equal(pwrite(fd, &byte, 1, at), 1);
            close(fd);
        }
        for (int d = 0; d < 2; d++)
            assert_int_equal(fk_names_file_fsck(dir[d], "s", &f, no_lines, &lines), 0);
        nf = open_names(3, TOKENS);
        uint32_t n = read_names(nf, 4096);
        lost += SLOTS - n;
        fk_names_file_load_labels(nf, &labels);
        for (uint32_t i = 1; i < labels.list.len; i++) {
            assert_string_equal(fk_labels_at(&labels, i)->salt, "sa");
            assert_string_equal(fk_labels_at(&labels, i)->lora, "lo");
        }
        fk_names_file_close(nf);
        fk_labels_fini(&labels);
    }
    assert_true(lost > 300);
}

/* Labels that nobody needs any more are dropped, when there are many. */
static void labels_are_trimmed(void **state)
{
    struct fk_names_file *nf = open_names(4, TOKENS);
    struct fk_labels labels = { 0 }, needed = { 0 };
    uint32_t tokens[TOKENS] = { 0 };
    char salt[32];

    for (uint32_t i = 0; i < 3000; i++) {
        snprintf(salt, sizeof(salt), "s%u", i);
        struct fk_name_out out = { .slot = 0, .name = name_of(0), .tokens = tokens, .salt = salt };
        out.name.label = fk_label_id(NULL, salt);
        fk_names_file_write(nf, &out, 1, 0);
    }
    fk_names_file_close(nf);
    nf = open_names(4, TOKENS);
    fk_names_file_load_labels(nf, &labels);
    assert_int_equal(labels.list.len, 3001);
    fk_labels_get(&needed, NULL, "s77");
    fk_names_file_trim_labels(nf, &needed);
    fk_names_file_close(nf);
    fk_labels_fini(&labels);
    nf = open_names(4, TOKENS);
    fk_names_file_load_labels(nf, &labels);
    assert_int_equal(labels.list.len, 2);
    assert_string_equal(fk_labels_at(&labels, 1)->salt, "s77");
    fk_names_file_close(nf);
    fk_labels_fini(&labels);
    fk_labels_fini(&needed);
}

static int make_dirs(void **state)
{
    fk_log_set_level(FK_LOG_OFF);
    for (int i = 0; i < 2; i++) {
        snprintf(dir[i], sizeof(dir[i]), "/tmp/flexkv-names-XXXXXX");
        if (!mkdtemp(dir[i]))
            return -1;
    }
    return 0;
}

static int remove_dirs(void **state)
{
    for (int i = 0; i < 2; i++) {
        char path[200];
        snprintf(path, sizeof(path), "%s/s.names", dir[i]);
        unlink(path);
        snprintf(path, sizeof(path), "%s/s.labels", dir[i]);
        unlink(path);
        rmdir(dir[i]);
    }
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(labels_are_found_by_number_and_id),
        cmocka_unit_test(a_journal_wraps_at_every_place),
        cmocka_unit_test(a_late_reader_falls_off_or_sees_all),
        cmocka_unit_test(lists_from_elsewhere_are_checked),
        cmocka_unit_test(a_view_is_a_set_and_finds_what_is_gone),
        cmocka_unit_test(names_survive_on_disk),
        cmocka_unit_test(flipped_bits_cost_names_only),
        cmocka_unit_test(labels_are_trimmed),
    };

    return cmocka_run_group_tests(tests, make_dirs, remove_dirs);
}
