/*
 * ssd.c - write-back to the SSD, the requests the tier takes and the answers it gives. See core.h, core_impl.h.
 */
#include "base/plant.h"
#include "node/core_impl.h"

#define WRITE_ID (1ull << 63)

/* ---- writes ---- */

static bool wants_write(struct fk_core *core, uint32_t entry)
{
    const struct fk_entry *e = &core->ix.entries[entry];

    return fk_entry_in(e, FK_TIER_CPU) == FK_READY && fk_entry_in(e, FK_TIER_SSD) == FK_ABSENT &&
           !(e->state & FK_ENTRY_DOOMED) && e->pins < UINT16_MAX;
}

static void write_begin(struct fk_core *core, struct core_space *sp, uint32_t space,
                        uint32_t entry, uint32_t slot)
{
    struct fk_core_ssd_req req = { .kind = FK_SSD_WRITE, .space = space,
                                   .id = WRITE_ID | entry };

    fk_index_pin(&core->ix, entry);
    fk_index_fill(&core->ix, entry, FK_TIER_SSD, slot);
    if (fifo_push(&core->writes, req)) {
        fk_index_unfill(&core->ix, entry, FK_TIER_SSD);
        fk_index_unpin(&core->ix, entry);
        return;
    }
    sp->backlog++;
}

/* A run of blocks of one group, all wanted. Returns how many were taken. */
static uint32_t write_run(struct fk_core *core, uint32_t group, const uint32_t *entries, uint32_t n)
{
    struct fk_index *ix = &core->ix;
    uint32_t space = ix->groups[group].space, i = 0;
    struct core_space *sp = &core->spaces[space];
    uint32_t anchor = ix->entries[entries[0]].parent;

    n = fk_min(n, sp->backlog_max - fk_min(sp->backlog, sp->backlog_max));
    uint32_t room = fk_index_room(ix, group, FK_TIER_SSD, n, 0);
    struct fk_newcomers nc = { .n = n, .room = room };
    if (room < n)
        n = fk_index_admit(ix, group, FK_TIER_SSD, &nc, core->tick);
    if (!n)
        return 0;
    /* The run may not push its own parent, or itself, out. */
    for (uint32_t k = 0; k < n; k++)
        fk_index_pin(ix, entries[k]);
    if (anchor != FK_NONE)
        fk_index_pin(ix, anchor);
    room = core_make_room(core, group, FK_TIER_SSD, n, 0);
    while (i < room) {
        uint32_t slot, got = fk_index_take_slots(ix, group, FK_TIER_SSD, room - i, &slot);
        if (!got)
            break;
        for (; got; got--, i++)
            write_begin(core, sp, space, entries[i], slot++);
    }
    if (anchor != FK_NONE)
        fk_index_unpin(ix, anchor);
    for (uint32_t k = n; k-- > 0;)
        fk_index_unpin(ix, entries[k]);
    return i;
}

void core_write_blocks(struct fk_core *core, const uint32_t *entries, uint32_t n)
{
    uint32_t i = 0;

    while (i < n) {
        if (!wants_write(core, entries[i])) {
            i++;
            continue;
        }
        uint32_t group = core->ix.entries[entries[i]].group, run = 1;
        if (!core->spaces[core->ix.groups[group].space].ssd_slots)
            return;
        while (i + run < n && core->ix.entries[entries[i + run]].group == group &&
               wants_write(core, entries[i + run]))
            run++;
        uint32_t taken = write_run(core, group, entries + i, run);
        if (taken < run)        /* no room: children without their parents are of no use */
            return;
        i += run;
    }
}

static void write_done(struct fk_core *core, uint64_t id, int status)
{
    uint32_t entry = (uint32_t)id;
    struct fk_entry *e = &core->ix.entries[entry];
    bool stored = false;

    core->spaces[core->ix.groups[e->group].space].backlog--;
    if (fk_entry_in(e, FK_TIER_SSD) == FK_FILLING) {
        stored = status == 0;
        if (stored) {
            fk_index_ready(&core->ix, entry, FK_TIER_SSD, core->tick);
            core->stats.ssd.stored_blocks++;
        } else {
            fk_index_unfill(&core->ix, entry, FK_TIER_SSD);
            core->stats.ssd.errors++;
        }
    }
    fk_index_unpin(&core->ix, entry);
    if (stored)             /* else the entry may be gone */
        core_evict_cleaned(core, entry);
}

/* ---- the queues ---- */

static struct fk_core_ssd_req read_request(const struct fk_core *core, uint32_t at)
{
    const struct fill *f = &core->fills.data[at];
    const struct fk_entry *e = &core->ix.entries[f->entry];

    return (struct fk_core_ssd_req){
        .kind = FK_SSD_READ, .space = f->space, .ssd_slot = e->slot[FK_TIER_SSD],
        .cpu_slot = e->slot[FK_TIER_CPU], .key = e->key, .id = core_fill_id(core, at),
    };
}

static bool take_write(struct fk_core *core, struct fk_core_ssd_req *req)
{
    if (req->kind != FK_SSD_WRITE)
        return true;
    uint32_t entry = (uint32_t)req->id;
    const struct fk_entry *e = &core->ix.entries[entry];
    if (fk_entry_in(e, FK_TIER_SSD) != FK_FILLING) {
        write_done(core, req->id, -ECANCELED);
        return false;
    }
    core->spaces[req->space].n_writes++;
    req->ssd_slot = e->slot[FK_TIER_SSD];
    req->cpu_slot = e->slot[FK_TIER_CPU];
    req->key = e->key;
    req->tag = core->group_tags[e->group];
    if (e->parent != FK_NONE)
        req->parent = core->ix.entries[e->parent].key;
    return true;
}

uint32_t fk_core_take_ssd(struct fk_core *core, struct fk_core_ssd_req *out, uint32_t max)
{
    uint32_t n = 0;

    for (uint32_t at; n < max && (at = core_fill_take(core, FILL_SSD)) != FK_NONE;)
        out[n++] = read_request(core, at);
    while (n < max && !fifo_empty(&core->writes)) {
        out[n] = *fifo_front(&core->writes);
        fifo_pop(&core->writes);
        n += take_write(core, &out[n]);
    }
    core_retry_starved(core);
    return n;
}

void fk_core_ssd_done(struct fk_core *core, const struct fk_core_ssd_done *done, uint32_t n,
                      uint64_t now_us)
{
    core_tick_now(core, now_us);
    for (uint32_t i = 0; i < n; i++) {
        if (done[i].id & WRITE_ID) {
            const struct fk_entry *e = &core->ix.entries[(uint32_t)done[i].id];
            core->spaces[core->ix.groups[e->group].space].n_writes--;
            write_done(core, done[i].id, done[i].status);
        } else {
            core_fill_done(core, (uint32_t)done[i].id - 1, done[i].status, false);
        }
    }
    core_fills_settle(core);
}
