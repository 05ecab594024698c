/*
 * labels.h - how routers know namespaces: pairs of LoRA name and cache salt, each with a small number
 * for memory and an id made of its text for disk. Grows only: numbers and texts stay valid as long as
 * the table. Number 0 is the namespace without either.
 *
 * Knows base alone. No lock: whoever owns the table has one (node->lock; a subscription's).
 */
#ifndef FK_EVENTS_LABELS_H
#define FK_EVENTS_LABELS_H

#include <stdint.h>

#include "base/util.h"

#define FK_LABEL_TEXT_MAX 255           /* bytes of either text */
#define FK_LABELS_MAX (1u << 20)        /* who makes more has a salt for each request: no events */

struct fk_label {
    uint64_t id;                        /* 0: of number 0 only */
    const char *lora, *salt;            /* NULL: none; otherwise not empty */
};

struct fk_labels {
    FK_VEC(struct fk_label) list;       /* by number; 0 is there from the first look on */
    uint32_t *table;                    /* id -> number, open addressing; 0: free */
    uint32_t mask;
};

void fk_labels_fini(struct fk_labels *labels);
/* The id of two texts ("" and NULL are alike); never 0 but for the pair of none. */
uint64_t fk_label_id(const char *lora, const char *salt);
/* The number of the pair, a new one if need be; FK_NONE: too long, too many, no memory. */
uint32_t fk_labels_get(struct fk_labels *labels, const char *lora, const char *salt);
/* The number of the id; FK_NONE: never seen. */
uint32_t fk_labels_find(const struct fk_labels *labels, uint64_t id);
const struct fk_label *fk_labels_at(const struct fk_labels *labels, uint32_t number);

#endif
