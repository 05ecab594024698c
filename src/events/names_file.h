/*
 * names_file.h - the names of the blocks in an SSD store, beside its files. In each directory:
 *
 *   NAME.names    page 0: header; then one record per slot of this directory, in local order: what routers
 *                 call the block, with its tokens
 *   NAME.labels   page 0: header; then LoRA names and salts, appended when a record first needs them
 *
 * They are a help for restarts and never the truth: which block is in a slot the slot table says. A record
 * counts if its checksum (seeded with store and slot) and its key are right; else the block
 * makes no event. Written through the page cache, without fsync; errors are counted and logged once, and
 * touch no block. A file of another store, version or machine word order is made anew.
 *
 * fk_names_file_write: the I/O thread alone. fk_names_reader: any thread, one reader each; it may meet a
 * record that is being written, which then does not verify. Opened and closed like the store. Knows base
 * and labels.h; touches its files only.
 */
#ifndef FK_EVENTS_NAMES_FILE_H
#define FK_EVENTS_NAMES_FILE_H

#include "base/key.h"
#include "events/labels.h"

#define FK_NAMES_DIRS 32

struct fk_names_file_params {
    const char *name;
    const char *const *dirs;
    uint32_t n_dirs, n_slots, stripe_slots, tokens_per_block;
    uint8_t uuid[16];                   /* of the store */
};

struct fk_names_file;

/* Never fails for the files' sake: a directory whose files can't be used has no names. -ENOMEM. */
int fk_names_file_open(const struct fk_names_file_params *params, struct fk_names_file **out);
void fk_names_file_close(struct fk_names_file *nf);
uint64_t fk_names_file_errors(const struct fk_names_file *nf);

/* What a record says. */
struct fk_stored_name {
    struct fk_key key;
    uint64_t hash, parent, label;       /* label: its id */
    bool root;
};

/* One name to write; the texts of its label unless the id is 0. */
struct fk_name_out {
    uint32_t slot;
    struct fk_stored_name name;
    const uint32_t *tokens;
    const char *lora, *salt;
};
/* Neighbours in slots and in the list go in one write. dirs_out: directories that are left alone. */
void fk_names_file_write(struct fk_names_file *nf, const struct fk_name_out *list, uint32_t n,
                         uint32_t dirs_out);

/* Reads with a window for each directory: slots in rising order cost few reads. */
struct fk_names_reader {
    struct fk_names_file *nf;
    uint32_t records;                   /* in a window */
    uint32_t dirs_out;
    struct { uint8_t *data; uint32_t first, n; } window[FK_NAMES_DIRS];
};
#define FK_NAMES_WINDOW_SMALL 4096u     /* bytes: for some neighbours; and for all */
#define FK_NAMES_WINDOW_LARGE (256u * 1024)
/* dirs_out: directories that are left alone, as their device may hang. */
void fk_names_reader_begin(struct fk_names_reader *r, struct fk_names_file *nf, uint32_t window,
                           uint32_t dirs_out);
void fk_names_reader_end(struct fk_names_reader *r);
/* The name of the block with this key in this slot; false: there is none. tokens may be NULL. */
bool fk_names_reader_get(struct fk_names_reader *r, uint32_t slot, struct fk_key key,
                         struct fk_stored_name *out, uint32_t *tokens);

/* The labels on disk, of all directories, into the table. */
void fk_names_file_load_labels(struct fk_names_file *nf, struct fk_labels *labels);
/* After the start, with the labels that records still need: files that hold mostly others are made
 * anew. */
void fk_names_file_trim_labels(struct fk_names_file *nf, const struct fk_labels *needed);

/* ---- off line: flexkv fsck, and the fuzzer ---- */
struct fk_names_fsck { uint64_t records, empty, damaged, labels, bad_labels; };
/* Looks at one directory's files of the store; report() gets a line per finding. -ENOENT: none there. */
int fk_names_file_fsck(const char *dir, const char *name, struct fk_names_fsck *out,
                       void (*report)(void *arg, const char *line), void *arg);
/* The labels in the bytes after the header; returns how many bytes were sound. */
size_t fk_labels_parse(const void *data, size_t bytes, struct fk_labels *labels);

#endif
