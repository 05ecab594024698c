/*
 * note.h - a block's name for KV events as bytes that travel with the block through a store which many nodes share.
 *
 *   version u8 | root u8 | lora bytes u8 | salt bytes u8 | tokens u32 | hash u64 | parent u64 | tokens | lora | salt
 *
 * Little endian. Pure functions; any thread. Knows base, names.h and labels.h.
 */
#ifndef FK_EVENTS_NOTE_H
#define FK_EVENTS_NOTE_H

#include "events/labels.h"
#include "events/names.h"

/* How many bytes it became; 0: it has no name, or more than max. */
uint32_t fk_note_write(void *out, uint32_t max, const struct fk_name *name, const uint32_t *tokens,
                       uint32_t n_tokens, const struct fk_label *label);

struct fk_note {
    struct fk_name name;                /* its label is in lora and salt */
    const unsigned char *tokens;        /* n_tokens words, little endian */
    char lora[FK_LABEL_TEXT_MAX + 1], salt[FK_LABEL_TEXT_MAX + 1];      /* "": none */
};
/* False: it is none, or of blocks with another number of tokens. */
bool fk_note_read(const void *data, uint32_t bytes, uint32_t n_tokens, struct fk_note *out);

#endif
