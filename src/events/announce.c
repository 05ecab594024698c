/* announce.c - see announce.h. */
#include "events/announce.h"

#include "base/plant.h"

static void removed(struct fk_journal *j, const struct fk_core_event *c, uint8_t medium,
                    uint64_t hash)
{
    struct fk_event *e = fk_journal_add(j, 0);

    if (e)
        *e = (struct fk_event){ .id = fk_event_id(c->key), .hash = hash, .space = c->space,
                                .kind = FK_EVENT_REMOVED, .medium = medium };
}

static struct fk_event event_of(const struct fk_names *names, uint32_t cpu_slot, struct fk_key key,
                                uint32_t space, uint8_t medium)
{
    const struct fk_name *name = &names->name[cpu_slot];

    return (struct fk_event){
        .id = fk_event_id(key), .hash = name->hash, .parent = name->parent, .space = space,
        .label = name->label, .n_tokens = names->tokens_per_block, .kind = FK_EVENT_STORED,
        .medium = medium, .root = name->root,
    };
}

static void stored(struct fk_journal *j, const struct fk_core_event *c, uint8_t medium,
                   const struct fk_names *names)
{
    uint32_t slot = c->slot[FK_TIER_CPU];
    struct fk_event *e = fk_journal_add(j, names->tokens_per_block);

    if (!e)
        return;
    *e = event_of(names, slot, c->key, c->space, medium);
    memcpy(fk_event_tokens(e), fk_names_tokens(names, slot),
           names->tokens_per_block * sizeof(uint32_t));
}

static void cpu_event(struct fk_journal *j, const struct fk_names *names,
                      const struct fk_core_event *c)
{
    uint64_t hash = names->name[c->slot[FK_TIER_CPU]].hash;

    if (!hash)
        return;
    if (c->stored)
        stored(j, c, FK_MEDIUM_CPU, names);
    else
        removed(j, c, FK_MEDIUM_CPU, hash);
}

static void ssd_event(struct fk_journal *j, struct fk_names *names, const struct fk_core_event *c)
{
    uint64_t *hash = &names->ssd_hash[c->slot[FK_TIER_SSD]];

    if (!c->stored) {
        if (*hash)
            removed(j, c, FK_MEDIUM_STORAGE, *hash);
        *hash = 0;
    } else if (c->slot[FK_TIER_CPU] != FK_NONE) {
        *hash = names->name[c->slot[FK_TIER_CPU]].hash;
        if (*hash)
            stored(j, c, FK_MEDIUM_STORAGE, names);
    } else if (*hash) {             /* found at the start: its name is not at hand, so whoever follows */
        fk_journal_gap(j);          /* already has to look */
    }
}

void fk_announce(struct fk_journal *j, struct fk_names *names, const struct fk_core_event *c)
{
    if (c->tier == FK_TIER_CPU)
        cpu_event(j, names, c);
    else
        ssd_event(j, names, c);
}

static int present_in(struct fk_event_list *list, struct fk_view *view,
                      const struct fk_names *names, const struct fk_core_present *p, uint8_t medium)
{
    struct fk_event e = event_of(names, p->slot[FK_TIER_CPU], p->key, p->space, medium);

    if (view && fk_view_see(view, e.id, medium))
        return 0;
    return fk_event_list_add(list, &e, fk_names_tokens(names, p->slot[FK_TIER_CPU]));
}

int fk_announce_present(struct fk_event_list *list, struct fk_view *view,
                        const struct fk_names *names, const struct fk_core_present *p,
                        struct fk_absent_name *absent)
{
    uint32_t cpu = p->slot[FK_TIER_CPU], ssd = p->slot[FK_TIER_SSD];
    bool named = cpu != FK_NONE && names->name[cpu].hash;
    uint64_t hash = ssd != FK_NONE ? names->ssd_hash[ssd] : 0;
    int rc = named ? present_in(list, view, names, p, FK_MEDIUM_CPU) : 0;

    absent->hash = 0;
    if (rc || !hash || (FK_BUG(15) && !named))
        return rc;
    if (named && names->name[cpu].hash == hash)
        return present_in(list, view, names, p, FK_MEDIUM_STORAGE);
    if (!view || !fk_view_see(view, fk_event_id(p->key), FK_MEDIUM_STORAGE))
        *absent = (struct fk_absent_name){ p->key, hash, p->space, ssd };
    return 0;
}
