/*
 * fuzz_names.c - libFuzzer target: the names of an SSD store (KV events) are opened, read, written, checked
 * and used over files whose contents are the fuzzer's; and events that come from a daemon. Nothing may
 * crash; a name that is found has the key that was asked for; labels have their ids.
 *
 * Input: byte 0: bit 0 seal the headers, bit 1 the rest is a list of events, bits 2-5 its number; byte 1:
 * how many bytes (times 8) of the rest are the labels file, the others are the names file. Both begin at
 * their header.
 */
#include <fcntl.h>
#include <stdio.h>

#include "base/log.h"
#include "events/journal.h"
#include "events/names_file.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum { SLOTS = 40, TOKENS = 3, RECORD = 72 };
static char dir[64], path[2][100];

static struct fk_names_file *open_files(void)
{
    const char *dirs[1] = { dir };
    struct fk_names_file_params p = { .name = "f", .dirs = dirs, .n_dirs = 1, .n_slots = SLOTS,
                                      .stripe_slots = SLOTS, .tokens_per_block = TOKENS };
    struct fk_names_file *nf;

    if (fk_names_file_open(&p, &nf))
        abort();
    return nf;
}

static void make_dir(void)
{
    fk_log_set_level(FK_LOG_OFF);
    snprintf(dir, sizeof(dir), "/dev/shm/flexkv-fuzz-XXXXXX");
    if (!mkdtemp(dir))
        abort();
    snprintf(path[0], sizeof(path[0]), "%s/f.names", dir);
    snprintf(path[1], sizeof(path[1]), "%s/f.labels", dir);
}

/* sealed: the header of a sound file, then what the fuzzer wants behind it. */
static void fill_file(int which, bool sealed, const uint8_t *data, size_t size)
{
    int fd = open(path[which], O_RDWR | O_CREAT, 0600);

    if (fd < 0 || (!sealed && pwrite(fd, data, size < 64 ? size : 64, 0) < 0))
        abort();
    size_t skip = sealed || size < 64 ? 0 : 64;
    if (pwrite(fd, data + skip, size - skip, 4096) < 0)
        abort();
    close(fd);
}

static void no_line(void *arg, const char *line)
{
}

static void use(struct fk_names_file *nf, const uint8_t *data, size_t size)
{
    struct fk_labels labels = { 0 };
    struct fk_names_reader r;
    struct fk_stored_name name;
    uint32_t tokens[TOKENS];

    fk_names_file_load_labels(nf, &labels);
    for (uint32_t i = 1; i < labels.list.len; i++) {
        const struct fk_label *l = fk_labels_at(&labels, i);
        if (l->id != fk_label_id(l->lora, l->salt))
            abort();
    }
    fk_names_reader_begin(&r, nf, 256, 0);
    for (uint32_t i = 0; i < SLOTS; i++) {
        struct fk_key key = { i, 1 };
        if (size >= (i + 1u) * RECORD)
            memcpy(&key, data + i * RECORD, sizeof(key));
        if (fk_names_reader_get(&r, i, key, &name, tokens) && !fk_key_equal(name.key, key))
            abort();
    }
    fk_names_reader_end(&r);
    struct fk_name_out out = { .slot = 5, .name = { .key = { 9, 9 }, .hash = 4, .label = 1 },
                               .tokens = tokens, .lora = "l" };
    memset(tokens, 7, sizeof(tokens));
    out.name.label = fk_label_id("l", NULL);
    fk_names_file_write(nf, &out, 1, 0);
    fk_names_reader_begin(&r, nf, 256, 0);
    if (!fk_names_reader_get(&r, 5, out.name.key, &name, tokens) || tokens[0] != 0x07070707)
        abort();
    fk_names_reader_end(&r);
    fk_labels_fini(&labels);
}

static void use_list(const uint8_t *data, size_t size, uint32_t n)
{
    struct fk_event_list list = { 0 };
    const struct fk_event *e;
    uint64_t sum = 0;
    size_t at = 0;

    if (fk_event_list_load(&list, data, size, n) == 0)
        while ((e = fk_event_list_next(&list, &at)) != NULL)
            for (uint32_t i = 0; i < e->n_tokens; i++)
                sum += fk_event_tokens(e)[i];
    fk_event_list_free(&list);
    if (sum == 1)
        no_line(NULL, NULL);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct fk_names_fsck f = { 0 };

    if (!dir[0])
        make_dir();
    if (size < 2)
        return 0;
    if (data[0] & 2) {
        use_list(data + 2, size - 2, data[0] >> 2 & 15);
        return 0;
    }
    bool sealed = data[0] & 1;
    size_t labels = fk_min((size_t)data[1] * 8, size - 2);
    unlink(path[0]);
    unlink(path[1]);
    if (sealed)
        fk_names_file_close(open_files());
    fill_file(1, sealed, data + 2, labels);
    fill_file(0, sealed, data + 2 + labels, size - 2 - labels);
    (void)fk_names_file_fsck(dir, "f", &f, no_line, NULL);
    struct fk_names_file *nf = open_files();
    use(nf, data + 2 + labels, size - 2 - labels);
    fk_names_file_close(nf);
    (void)fk_names_file_fsck(dir, "f", &f, no_line, NULL);
    return 0;
}
