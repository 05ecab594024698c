/* names_file.c - see names_file.h. */
#include "events/names_file.h"

#include <fcntl.h>
#include <stdio.h>
#include <sys/stat.h>

#include "base/checksum.h"
#include "base/log.h"

#define PAGE 4096u
#define VERSION 1u
#define BYTE_ORDER_MARK 0x01020304u
#define WRITE_BYTES (64u * 1024)        /* of records in one write, but one at least */
#define TOKENS_MAX (1u << 20)
#define LABELS_MAX_BYTES (256u << 20)   /* of a labels file: nothing larger is read */
#define TRIM_FROM 1024u                 /* labels that nobody needs */

static const char names_magic[8] = { 'F', 'l', 'e', 'x', 'K', 'V', 'n', 'm' };
static const char labels_magic[8] = { 'F', 'l', 'e', 'x', 'K', 'V', 'l', 'b' };

struct header {
    char magic[8];
    uint32_t byte_order, version;
    uint8_t uuid[16];
    uint32_t n_slots, stripe_slots, n_dirs, dir;
    uint32_t tokens_per_block, record_bytes;
    uint32_t reserved, crc;             /* crc32c of all before it */
};
_Static_assert(sizeof(struct header) == 64, "the header's layout is the file format");

struct record {                         /* followed by the tokens */
    struct fk_key key;
    uint64_t hash, parent, label;
    uint32_t n_tokens, root;
    uint32_t reserved, crc;             /* crc32c of all but itself, seeded with store and slot */
};
_Static_assert(sizeof(struct record) == 56, "the record's layout is the file format");

struct label_head {                     /* followed by both texts and zeros up to a multiple of 8 */
    uint64_t id;
    uint16_t lora, salt;                /* bytes */
    uint32_t crc;                       /* of all but itself */
};
_Static_assert(sizeof(struct label_head) == 16, "the label's layout is the file format");

struct dir {
    char *names_path, *labels_path;
    int names, labels;                  /* -1: not usable */
    uint64_t labels_end;
    struct id_set { uint64_t *ids; uint32_t mask, n; } written;     /* labels that are in the file */
};

struct fk_names_file {
    struct header header;               /* but for dir and crc */
    uint32_t seed;
    struct dir dirs[FK_NAMES_DIRS];
    uint8_t *buf;                       /* of write_max records */
    uint32_t write_max;
    _Atomic uint64_t errors;
    bool told;
};

static bool transfer(int fd, bool write, void *buf, size_t bytes, uint64_t offset)
{
    char *at = buf;

    while (bytes > 0) {
        ssize_t n = write ? pwrite(fd, at, bytes, (off_t)offset) : pread(fd, at, bytes, (off_t)offset);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0) {
            errno = n ? errno : ENODATA;
            return false;
        }
        at += n;
        offset += (uint64_t)n;
        bytes -= (size_t)n;
    }
    return true;
}

static void failed(struct fk_names_file *nf, const char *path)
{
    nf->errors++;
    if (!nf->told)
        fk_warn("%s: %s; blocks there may make no KV events after a restart", path, strerror(errno));
    nf->told = true;
}

/* ---- which labels are in a file: open addressing; 0 is a free place ---- */

static uint64_t *id_place(const struct id_set *set, uint64_t id)
{
    uint32_t at = (uint32_t)id & set->mask;

    while (set->ids[at] && set->ids[at] != id)
        at = (at + 1) & set->mask;
    return &set->ids[at];
}

static bool is_written(const struct dir *d, uint64_t id)
{
    return d->written.ids && *id_place(&d->written, id) == id;
}

static int id_set_grow(struct id_set *set)
{
    struct id_set old = *set;
    uint32_t size = old.ids ? (old.mask + 1) * 2 : 64;

    if (old.ids && old.n * 2 <= old.mask)
        return 0;
    set->ids = calloc(size, sizeof(*set->ids));
    if (!set->ids) {
        set->ids = old.ids;
        return -ENOMEM;
    }
    set->mask = size - 1;
    for (uint32_t i = 0; old.ids && i <= old.mask; i++)
        if (old.ids[i])
            *id_place(set, old.ids[i]) = old.ids[i];
    free(old.ids);
    return 0;
}

/* Without memory the label is just appended again. */
static void note_written(struct dir *d, uint64_t id)
{
    if (id_set_grow(&d->written))
        return;
    uint64_t *at = id_place(&d->written, id);
    d->written.n += !*at;
    *at = id;
}

static void forget_written(struct dir *d)
{
    free(d->written.ids);
    d->written = (struct id_set){ 0 };
}

/* ---- geometry, as in tier/ssd_format.h ---- */

static uint32_t dir_of(const struct header *h, uint32_t slot)
{
    return slot / h->stripe_slots % h->n_dirs;
}

static uint32_t local_of(const struct header *h, uint32_t slot)
{
    return slot / h->stripe_slots / h->n_dirs * h->stripe_slots + slot % h->stripe_slots;
}

static uint32_t dir_slots(const struct header *h, uint32_t dir)
{
    uint32_t full = h->n_slots / h->stripe_slots;
    uint32_t slots = (full / h->n_dirs + (dir < full % h->n_dirs)) * h->stripe_slots;

    return dir == full % h->n_dirs ? slots + h->n_slots % h->stripe_slots : slots;
}

static uint32_t slot_of(const struct header *h, uint32_t local)
{
    return (local / h->stripe_slots * h->n_dirs + h->dir) * h->stripe_slots + local % h->stripe_slots;
}

static uint64_t offset_of(const struct header *h, uint32_t local)
{
    return PAGE + (uint64_t)local * h->record_bytes;
}

/* ---- headers ---- */

static struct header header_for(const struct fk_names_file *nf, const char magic[8], uint32_t dir)
{
    struct header h = nf->header;

    memcpy(h.magic, magic, sizeof(h.magic));
    h.dir = dir;
    h.crc = fk_crc32c(~0u, &h, offsetof(struct header, crc));
    return h;
}

static bool header_sound(const struct header *h, const char magic[8])
{
    return memcmp(h->magic, magic, sizeof(h->magic)) == 0 && h->byte_order == BYTE_ORDER_MARK &&
           h->version == VERSION && h->crc == fk_crc32c(~0u, h, offsetof(struct header, crc)) &&
           h->n_dirs && h->dir < h->n_dirs && h->stripe_slots && h->tokens_per_block <= TOKENS_MAX &&
           h->record_bytes == fk_round_up(sizeof(struct record) + 4ull * h->tokens_per_block, 8);
}

/* The file, with this header: as it is, or emptied. */
static int open_file(struct fk_names_file *nf, const char *path, const struct header *want)
{
    struct header have;
    int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);

    if (fd >= 0 && transfer(fd, false, &have, sizeof(have), 0) &&
        memcmp(&have, want, sizeof(have)) == 0)
        return fd;
    if (fd >= 0 && ftruncate(fd, 0) == 0 &&
        transfer(fd, true, (void *)(uintptr_t)want, sizeof(*want), 0) && ftruncate(fd, PAGE) == 0)
        return fd;
    failed(nf, path);
    if (fd >= 0)
        close(fd);
    return -1;
}

/* Holes are empty records. */
static void open_names(struct fk_names_file *nf, uint32_t i)
{
    struct header h = header_for(nf, names_magic, i);
    struct dir *d = &nf->dirs[i];
    uint64_t bytes = offset_of(&h, dir_slots(&h, i));
    struct stat st;

    d->names = open_file(nf, d->names_path, &h);
    if (d->names < 0 || (fstat(d->names, &st) == 0 && (uint64_t)st.st_size == bytes) ||
        ftruncate(d->names, (off_t)bytes) == 0)
        return;
    failed(nf, d->names_path);
    close(d->names);
    d->names = -1;
}

static int open_dir(struct fk_names_file *nf, const struct fk_names_file_params *p, uint32_t i)
{
    struct dir *d = &nf->dirs[i];
    struct header h = header_for(nf, labels_magic, i);

    if (asprintf(&d->names_path, "%s/%s.names", p->dirs[i], p->name) < 0) {
        d->names_path = NULL;
        return -ENOMEM;
    }
    if (asprintf(&d->labels_path, "%s/%s.labels", p->dirs[i], p->name) < 0) {
        d->labels_path = NULL;
        return -ENOMEM;
    }
    open_names(nf, i);
    d->labels = d->names < 0 ? -1 : open_file(nf, d->labels_path, &h);
    d->labels_end = PAGE;
    return 0;
}

int fk_names_file_open(const struct fk_names_file_params *p, struct fk_names_file **out)
{
    struct fk_names_file *nf = calloc(1, sizeof(*nf));
    int rc = nf ? 0 : -ENOMEM;

    if (rc)
        return rc;
    for (uint32_t i = 0; i < FK_NAMES_DIRS; i++)
        nf->dirs[i].names = nf->dirs[i].labels = -1;
    nf->header = (struct header){
        .byte_order = BYTE_ORDER_MARK, .version = VERSION, .n_slots = p->n_slots,
        .stripe_slots = p->stripe_slots, .n_dirs = p->n_dirs,
        .tokens_per_block = p->tokens_per_block,
        .record_bytes = (uint32_t)fk_round_up(sizeof(struct record) + 4ull * p->tokens_per_block, 8),
    };
    memcpy(nf->header.uuid, p->uuid, sizeof(nf->header.uuid));
    nf->seed = fk_crc32c(~0u, p->uuid, sizeof(p->uuid));
    nf->write_max = fk_max(WRITE_BYTES / nf->header.record_bytes, 1u);
    nf->buf = malloc((size_t)nf->write_max * nf->header.record_bytes);
    rc = nf->buf ? 0 : -ENOMEM;
    for (uint32_t i = 0; i < p->n_dirs && !rc; i++)
        rc = open_dir(nf, p, i);
    if (rc)
        fk_names_file_close(nf);
    else
        *out = nf;
    return rc;
}

void fk_names_file_close(struct fk_names_file *nf)
{
    if (!nf)
        return;
    for (uint32_t i = 0; i < FK_NAMES_DIRS; i++) {
        struct dir *d = &nf->dirs[i];
        if (d->names >= 0)
            close(d->names);
        if (d->labels >= 0)
            close(d->labels);
        free(d->names_path);
        free(d->labels_path);
        forget_written(d);
    }
    free(nf->buf);
    free(nf);
}

uint64_t fk_names_file_errors(const struct fk_names_file *nf)
{
    return nf->errors;
}

/* ---- labels ---- */

static uint32_t label_crc(const struct label_head *h, const void *texts)
{
    return fk_crc32c(fk_crc32c(~0u, h, offsetof(struct label_head, crc)), texts, (size_t)h->lora + h->salt);
}

static size_t label_bytes(const struct label_head *h)
{
    return fk_round_up(sizeof(*h) + (size_t)h->lora + h->salt, 8);
}

size_t fk_labels_parse(const void *data, size_t bytes, struct fk_labels *labels)
{
    const uint8_t *from = data;
    struct label_head h;
    size_t at = 0;

    while (bytes - at >= sizeof(h)) {
        char lora[FK_LABEL_TEXT_MAX + 1], salt[FK_LABEL_TEXT_MAX + 1];
        memcpy(&h, from + at, sizeof(h));
        if (h.lora > FK_LABEL_TEXT_MAX || h.salt > FK_LABEL_TEXT_MAX || bytes - at < label_bytes(&h) ||
            h.crc != label_crc(&h, from + at + sizeof(h)))
            break;
        memcpy(lora, from + at + sizeof(h), h.lora);
        memcpy(salt, from + at + sizeof(h) + h.lora, h.salt);
        lora[h.lora] = salt[h.salt] = '\0';
        if (!h.id || fk_label_id(lora, salt) != h.id)
            break;
        (void)fk_labels_get(labels, lora, salt);
        at += label_bytes(&h);
    }
    return at;
}

static bool append_label(struct fk_names_file *nf, struct dir *d, uint64_t id, const char *lora,
                         const char *salt)
{
    uint8_t buf[sizeof(struct label_head) + 2 * FK_LABEL_TEXT_MAX + 8] = { 0 };
    struct label_head h = { .id = id, .lora = (uint16_t)strlen(lora ? lora : ""),
                            .salt = (uint16_t)strlen(salt ? salt : "") };

    if (d->labels < 0)
        return false;
    memcpy(buf + sizeof(h), lora ? lora : "", h.lora);
    memcpy(buf + sizeof(h) + h.lora, salt ? salt : "", h.salt);
    h.crc = label_crc(&h, buf + sizeof(h));
    memcpy(buf, &h, sizeof(h));
    if (!transfer(d->labels, true, buf, label_bytes(&h), d->labels_end)) {
        failed(nf, d->labels_path);
        return false;
    }
    d->labels_end += label_bytes(&h);
    note_written(d, id);
    return true;
}

/* What stands behind a torn label is lost: it is written over. */
static void load_dir_labels(struct fk_names_file *nf, struct dir *d, struct fk_labels *labels)
{
    struct fk_labels own = { 0 };
    struct stat st;

    if (d->labels < 0 || fstat(d->labels, &st) < 0 || st.st_size <= PAGE)
        return;
    size_t bytes = fk_min((size_t)st.st_size - PAGE, (size_t)LABELS_MAX_BYTES);
    fk_autofree uint8_t *data = malloc(bytes);
    if (!data || !transfer(d->labels, false, data, bytes, PAGE)) {
        failed(nf, d->labels_path);
        return;
    }
    d->labels_end = PAGE + fk_labels_parse(data, bytes, &own);
    for (uint32_t i = 1; i < own.list.len; i++) {
        const struct fk_label *l = fk_labels_at(&own, i);
        note_written(d, l->id);
        (void)fk_labels_get(labels, l->lora, l->salt);
    }
    fk_labels_fini(&own);
}

void fk_names_file_load_labels(struct fk_names_file *nf, struct fk_labels *labels)
{
    for (uint32_t i = 0; i < nf->header.n_dirs; i++)
        load_dir_labels(nf, &nf->dirs[i], labels);
}

void fk_names_file_trim_labels(struct fk_names_file *nf, const struct fk_labels *needed)
{
    for (uint32_t i = 0; i < nf->header.n_dirs; i++) {
        struct dir *d = &nf->dirs[i];
        if (d->labels < 0 || d->written.n < 2 * needed->list.len + TRIM_FROM)
            continue;
        if (ftruncate(d->labels, PAGE) < 0) {
            failed(nf, d->labels_path);
            continue;
        }
        forget_written(d);
        d->labels_end = PAGE;
        for (uint32_t k = 1; k < needed->list.len; k++) {
            const struct fk_label *l = fk_labels_at(needed, k);
            (void)append_label(nf, d, l->id, l->lora, l->salt);
        }
    }
}

/* ---- records ---- */

static uint32_t record_crc(const struct fk_names_file *nf, const struct record *r,
                           const void *tokens, uint32_t slot)
{
    uint32_t crc = fk_crc32c(nf->seed ^ (slot * 0x9e3779b1u), r, offsetof(struct record, crc));

    return fk_crc32c(crc, tokens, (size_t)r->n_tokens * sizeof(uint32_t));
}

static void make_record(const struct fk_names_file *nf, const struct fk_name_out *o, uint8_t *to)
{
    struct record r = { .key = o->name.key, .hash = o->name.hash, .parent = o->name.parent,
                        .label = o->name.label, .n_tokens = nf->header.tokens_per_block,
                        .root = o->name.root };

    memset(to, 0, nf->header.record_bytes);
    memcpy(to + sizeof(r), o->tokens, r.n_tokens * sizeof(uint32_t));
    r.crc = record_crc(nf, &r, o->tokens, o->slot);
    memcpy(to, &r, sizeof(r));
}

enum record_state { RECORD_OK, RECORD_EMPTY, RECORD_BAD };

static enum record_state check_record(const struct fk_names_file *nf, const uint8_t *from,
                                      uint32_t slot, struct record *r)
{
    static const struct record empty;

    memcpy(r, from, sizeof(*r));
    if (memcmp(r, &empty, sizeof(empty)) == 0)
        return RECORD_EMPTY;
    return r->n_tokens == nf->header.tokens_per_block && r->hash && r->root <= 1 &&
                   r->crc == record_crc(nf, r, from + sizeof(*r), slot)
               ? RECORD_OK : RECORD_BAD;
}

/* A run of names on one directory. */
static void write_run(struct fk_names_file *nf, const struct fk_name_out *list, uint32_t n)
{
    struct dir *d = &nf->dirs[dir_of(&nf->header, list[0].slot)];
    uint32_t bytes = nf->header.record_bytes;

    for (uint32_t i = 0; i < n; i++) {
        const struct fk_stored_name *name = &list[i].name;
        if (name->label && !is_written(d, name->label))
            (void)append_label(nf, d, name->label, list[i].lora, list[i].salt);
        make_record(nf, &list[i], nf->buf + (size_t)i * bytes);
    }
    if (!transfer(d->names, true, nf->buf, (size_t)n * bytes,
                  offset_of(&nf->header, local_of(&nf->header, list[0].slot))))
        failed(nf, d->names_path);
}

void fk_names_file_write(struct fk_names_file *nf, const struct fk_name_out *list, uint32_t n,
                         uint32_t dirs_out)
{
    const struct header *h = &nf->header;

    for (uint32_t i = 0; i < n;) {
        uint32_t dir = dir_of(h, list[i].slot), run = 1;
        while (i + run < n && run < nf->write_max && list[i + run].slot == list[i].slot + run &&
               dir_of(h, list[i + run].slot) == dir)
            run++;
        if (list[i].slot < h->n_slots && nf->dirs[dir].names >= 0 && !(dirs_out >> dir & 1))
            write_run(nf, &list[i], run);
        i += run;
    }
}

/* ---- reading ---- */

void fk_names_reader_begin(struct fk_names_reader *r, struct fk_names_file *nf, uint32_t window,
                           uint32_t dirs_out)
{
    memset(r, 0, sizeof(*r));
    r->nf = nf;
    r->dirs_out = dirs_out;
    r->records = fk_max(window / nf->header.record_bytes, 1u);
}

void fk_names_reader_end(struct fk_names_reader *r)
{
    for (uint32_t i = 0; i < FK_NAMES_DIRS; i++)
        free(r->window[i].data);
}

/* The record's bytes; NULL: not readable. */
static const uint8_t *window_at(struct fk_names_reader *r, uint32_t dir, uint32_t local)
{
    struct fk_names_file *nf = r->nf;
    uint32_t bytes = nf->header.record_bytes, want = r->records;

    if (r->window[dir].n && local - r->window[dir].first < r->window[dir].n)
        return r->window[dir].data + (size_t)(local - r->window[dir].first) * bytes;
    if (!r->window[dir].data)
        r->window[dir].data = malloc((size_t)want * bytes);
    r->window[dir].n = 0;
    if (!r->window[dir].data)
        return NULL;
    want = fk_min(want, dir_slots(&nf->header, dir) - local);
    if (!transfer(nf->dirs[dir].names, false, r->window[dir].data, (size_t)want * bytes,
                  offset_of(&nf->header, local))) {
        failed(nf, nf->dirs[dir].names_path);
        return NULL;
    }
    r->window[dir].first = local;
    r->window[dir].n = want;
    return r->window[dir].data;
}

bool fk_names_reader_get(struct fk_names_reader *r, uint32_t slot, struct fk_key key,
                         struct fk_stored_name *out, uint32_t *tokens)
{
    const struct header *h = &r->nf->header;
    uint32_t dir = slot < h->n_slots ? dir_of(h, slot) : 0;
    struct record rec;

    if (slot >= h->n_slots || r->nf->dirs[dir].names < 0 || (r->dirs_out >> dir & 1))
        return false;
    const uint8_t *from = window_at(r, dir, local_of(h, slot));
    if (!from || check_record(r->nf, from, slot, &rec) != RECORD_OK || !fk_key_equal(rec.key, key))
        return false;
    *out = (struct fk_stored_name){ rec.key, rec.hash, rec.parent, rec.label, rec.root };
    if (tokens)
        memcpy(tokens, from + sizeof(rec), rec.n_tokens * sizeof(*tokens));
    return true;
}

/* ---- off line ---- */

static void count_records(struct fk_names_file *nf, int fd, uint64_t file_bytes,
                          struct fk_names_fsck *out)
{
    const struct header *h = &nf->header;
    uint32_t n = dir_slots(h, h->dir);

    for (uint32_t i = 0; i < n && offset_of(h, i + 1) <= file_bytes; i++) {
        struct record r;
        if (!transfer(fd, false, nf->buf, h->record_bytes, offset_of(h, i)))
            break;
        enum record_state state = check_record(nf, nf->buf, slot_of(h, i), &r);
        out->records += state == RECORD_OK;
        out->empty += state == RECORD_EMPTY;
        out->damaged += state == RECORD_BAD;
    }
}

static int fsck_names(const char *path, struct fk_names_fsck *out, const char **what)
{
    struct fk_names_file nf = { 0 };
    fk_autoclose int fd = open(path, O_RDONLY | O_CLOEXEC);
    struct stat st;

    if (fd < 0)
        return -errno;
    if (!transfer(fd, false, &nf.header, sizeof(nf.header), 0) || fstat(fd, &st) < 0 ||
        !header_sound(&nf.header, names_magic)) {
        *what = "its header is torn or of another version; the next start makes it anew";
        return 0;
    }
    if ((uint64_t)st.st_size != offset_of(&nf.header, dir_slots(&nf.header, nf.header.dir)))
        *what = "it has not the length that its header says";
    nf.seed = fk_crc32c(~0u, nf.header.uuid, sizeof(nf.header.uuid));
    nf.buf = malloc(nf.header.record_bytes);
    if (!nf.buf)
        return -ENOMEM;
    count_records(&nf, fd, (uint64_t)st.st_size, out);
    free(nf.buf);
    return 0;
}

static int fsck_labels(const char *path, struct fk_names_fsck *out, const char **what)
{
    struct fk_labels labels = { 0 };
    fk_autoclose int fd = open(path, O_RDONLY | O_CLOEXEC);
    struct header h;
    struct stat st;

    if (fd < 0)
        return -errno;
    if (!transfer(fd, false, &h, sizeof(h), 0) || fstat(fd, &st) < 0 ||
        !header_sound(&h, labels_magic)) {
        *what = "its header is torn or of another version; the next start makes it anew";
        return 0;
    }
    size_t bytes = st.st_size > PAGE ? fk_min((size_t)st.st_size - PAGE, (size_t)LABELS_MAX_BYTES) : 0;
    fk_autofree uint8_t *data = malloc(bytes + 1);
    if (!data)
        return -ENOMEM;
    if (bytes && !transfer(fd, false, data, bytes, PAGE))
        bytes = 0;
    size_t sound = fk_labels_parse(data, bytes, &labels);
    out->labels += labels.list.len ? labels.list.len - 1 : 0;
    out->bad_labels += sound < bytes;
    if (sound < bytes)
        *what = "a label is torn; those behind it are lost";
    fk_labels_fini(&labels);
    return 0;
}

int fk_names_file_fsck(const char *dir, const char *name, struct fk_names_fsck *out,
                       void (*report)(void *arg, const char *line), void *arg)
{
    int (*const check[])(const char *, struct fk_names_fsck *, const char **) =
        { fsck_names, fsck_labels };
    static const char *const ending[] = { "names", "labels" };
    int rc = 0;

    for (int i = 0; i < 2 && !rc; i++) {
        char path[4096], line[4400];
        const char *what = NULL;
        snprintf(path, sizeof(path), "%s/%s.%s", dir, name, ending[i]);
        rc = check[i](path, out, &what);
        snprintf(line, sizeof(line), "%s: %s", path, what ? what : "");
        if (what)
            report(arg, line);
    }
    return rc;
}
