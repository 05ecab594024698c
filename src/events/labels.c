/* labels.c - see labels.h. */
#include "events/labels.h"

#include <xxhash.h>

static const struct fk_label no_label;

void fk_labels_fini(struct fk_labels *l)
{
    for (size_t i = 0; i < l->list.len; i++) {
        free((char *)(uintptr_t)l->list.data[i].lora);
        free((char *)(uintptr_t)l->list.data[i].salt);
    }
    fk_vec_free(&l->list);
    free(l->table);
    memset(l, 0, sizeof(*l));
}

uint64_t fk_label_id(const char *lora, const char *salt)
{
    size_t n_lora = lora ? strlen(lora) : 0, n_salt = salt ? strlen(salt) : 0;

    if (!n_lora && !n_salt)
        return 0;
    uint64_t id = XXH3_64bits_withSeed(lora, n_lora, n_lora + 1);
    id = XXH3_64bits_withSeed(salt, n_salt, id);
    return id ? id : 1;
}

static uint32_t *place(const struct fk_labels *l, uint64_t id)
{
    uint32_t at = (uint32_t)id & l->mask;

    while (l->table[at] && l->list.data[l->table[at]].id != id)
        at = (at + 1) & l->mask;
    return &l->table[at];
}

static int grow(struct fk_labels *l)
{
    uint32_t size = l->table ? (l->mask + 1) * 2 : 16, *old = l->table;

    if (l->table && l->list.len * 2 <= l->mask)
        return 0;
    l->table = calloc(size, sizeof(*l->table));
    if (!l->table) {
        l->table = old;
        return -ENOMEM;
    }
    free(old);
    l->mask = size - 1;
    for (uint32_t i = 1; i < l->list.len; i++)
        *place(l, l->list.data[i].id) = i;
    return 0;
}

uint32_t fk_labels_find(const struct fk_labels *l, uint64_t id)
{
    if (!id)
        return 0;
    uint32_t number = l->table ? *place(l, id) : 0;
    return number ? number : FK_NONE;
}

static const char *text_or_null(const char *text)
{
    return text && *text ? strdup(text) : NULL;
}

uint32_t fk_labels_get(struct fk_labels *l, const char *lora, const char *salt)
{
    uint64_t id = fk_label_id(lora, salt);
    uint32_t number = fk_labels_find(l, id);

    if (number != FK_NONE)
        return number;
    if ((lora && strlen(lora) > FK_LABEL_TEXT_MAX) || (salt && strlen(salt) > FK_LABEL_TEXT_MAX) ||
        l->list.len >= FK_LABELS_MAX)
        return FK_NONE;
    if (!l->list.len && fk_vec_push(&l->list, no_label))
        return FK_NONE;
    struct fk_label label = { id, text_or_null(lora), text_or_null(salt) };
    bool whole = (label.lora || !lora || !*lora) && (label.salt || !salt || !*salt);
    if (!whole || grow(l) || fk_vec_push(&l->list, label)) {
        free((char *)(uintptr_t)label.lora);
        free((char *)(uintptr_t)label.salt);
        return FK_NONE;
    }
    number = (uint32_t)l->list.len - 1;
    *place(l, id) = number;
    return number;
}

const struct fk_label *fk_labels_at(const struct fk_labels *l, uint32_t number)
{
    return number < l->list.len ? &l->list.data[number] : &no_label;
}
