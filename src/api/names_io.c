/*
 * names_io.c - names of blocks on their way from and to the SSD: read and written beside the data, by
 * the I/O thread; and found again when a space is opened. See events/names.h, names_file.h.
 *
 * A cpu slot whose block is being read or written is held by that: its name is this thread's to fill in,
 * or to read, without the lock. Everybody else looks at names of blocks that are ready.
 */
#include "api/node_impl.h"
#include "base/log.h"
#include "events/names.h"
#include "events/names_file.h"

/* ---- with the lock ---- */

void fk_names_prepare(struct fk_node *node, const struct fk_core_ssd_req *req, uint32_t n,
                      struct fk_names_io *io)
{
    struct fk_space *s = NULL;

    for (uint32_t i = 0; i < n; i++) {
        if (!s || s->id != req[i].space)
            s = fk_node_space(node, req[i].space);
        if (!s || !s->names_file)
            continue;
        if (req[i].kind == FK_SSD_READ)
            io[i].hash = s->names->ssd_hash[req[i].ssd_slot];
        else if (req[i].kind == FK_SSD_WRITE)
            io[i].label = fk_node_label_at(node, s->names->name[req[i].cpu_slot].label);
    }
}

/* ---- the I/O thread, without the lock ---- */

static void read_name(struct fk_space *s, struct fk_names_reader *r, const struct fk_core_ssd_req *req,
                      uint64_t hash)
{
    struct fk_name *name = &s->names->name[req->cpu_slot];
    struct fk_stored_name stored;
    uint32_t label;

    *name = (struct fk_name){ 0 };
    if (!hash ||
        !fk_names_reader_get(r, req->ssd_slot, req->key, &stored,
                             fk_names_tokens(s->names, req->cpu_slot)) ||
        stored.hash != hash || (label = fk_node_events_label(s->node, stored.label)) == FK_NONE)
        return;
    *name = (struct fk_name){ .hash = hash, .parent = stored.parent, .label = label,
                              .root = stored.root };
}

static void read_names(struct fk_space *s, const struct fk_core_ssd_req *req,
                       const struct fk_names_io *io, uint32_t n)
{
    struct fk_names_reader r;

    fk_names_reader_begin(&r, s->names_file, FK_NAMES_WINDOW_SMALL, s->dirs_out);
    for (uint32_t i = 0; i < n; i++)
        if (req[i].kind == FK_SSD_READ)
            read_name(s, &r, &req[i], io[i].hash);
    fk_names_reader_end(&r);
}

static void write_names(struct fk_space *s, const struct fk_core_ssd_req *req,
                        const struct fk_names_io *io, uint32_t n)
{
    struct fk_name_out out[FK_NODE_SSD_BATCH];
    uint32_t k = 0;

    for (uint32_t i = 0; i < n; i++) {
        const struct fk_name *name = &s->names->name[req[i].cpu_slot];
        if (req[i].kind != FK_SSD_WRITE || !name->hash)
            continue;
        out[k++] = (struct fk_name_out){
            .slot = req[i].ssd_slot,
            .name = { req[i].key, name->hash, name->parent, io[i].label.id, name->root },
            .tokens = fk_names_tokens(s->names, req[i].cpu_slot),
            .lora = io[i].label.lora, .salt = io[i].label.salt,
        };
    }
    fk_names_file_write(s->names_file, out, k, s->dirs_out);
}

void fk_names_carry(struct fk_space *s, const struct fk_core_ssd_req *req,
                    const struct fk_names_io *io, uint32_t n)
{
    bool reads = false, writes = false;

    for (uint32_t i = 0; i < n; i++) {
        reads |= req[i].kind == FK_SSD_READ;
        writes |= req[i].kind == FK_SSD_WRITE;
    }
    if (writes)
        write_names(s, req, io, n);
    if (reads)
        read_names(s, req, io, n);
}

/* ---- opening a space ---- */

int fk_names_open(struct fk_space *s)
{
    const struct fk_settings *set = s->node->set;
    struct fk_names_file_params p = {
        .name = s->name, .dirs = (const char *const *)set->ssd_cache_dir.item,
        .n_dirs = (uint32_t)set->ssd_cache_dir.count, .n_slots = s->ssd_slots,
        .stripe_slots = s->ssd ? fk_ssd_stripe_slots(s->ssd) : 1,
        .tokens_per_block = s->tokens_per_block,
    };
    int rc = fk_names_create(s->tokens_per_block, s->cpu_slots, s->ssd_slots, &s->names);

    if (!rc && s->ssd) {
        memcpy(p.uuid, fk_ssd_uuid(s->ssd), sizeof(p.uuid));
        rc = fk_names_file_open(&p, &s->names_file);
    }
    return rc ? fk_api_fail(rc, "space %s: no memory for the names of %u blocks; lower cpu_cache_gb, or "
                            "set enable_kv_events to 0", s->name, s->cpu_slots) : 0;
}

void fk_names_close(struct fk_space *s)
{
    fk_names_file_close(s->names_file);
    fk_names_destroy(s->names);
    s->names_file = NULL;
    s->names = NULL;
}

/* Found on SSD: the names' hashes, and the labels that they need. In slot order. */
void fk_names_recover(struct fk_space *s, const struct fk_core_found *found, size_t n)
{
    struct fk_labels on_disk = { 0 }, needed = { 0 };
    struct fk_names_reader r;
    struct fk_stored_name name;
    size_t named = 0;

    fk_names_file_load_labels(s->names_file, &on_disk);
    fk_names_reader_begin(&r, s->names_file, FK_NAMES_WINDOW_LARGE, 0);
    for (size_t i = 0; i < n; i++) {
        if (!fk_names_reader_get(&r, found[i].slot, found[i].key, &name, NULL))
            continue;
        uint32_t number = fk_labels_find(&on_disk, name.label);
        const struct fk_label *label = number == FK_NONE ? NULL : fk_labels_at(&on_disk, number);
        if (!label || fk_node_label_get(s->node, label) == FK_NONE)
            continue;
        (void)fk_labels_get(&needed, label->lora, label->salt);
        s->names->ssd_hash[found[i].slot] = name.hash;
        named++;
    }
    fk_names_reader_end(&r);
    fk_names_file_trim_labels(s->names_file, &needed);
    fk_labels_fini(&on_disk);
    fk_labels_fini(&needed);
    if (n)
        fk_info("space %s: %zu of %zu blocks on SSD have names for KV events", s->name, named, n);
}
