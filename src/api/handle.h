/*
 * handle.h - private to src/api: what a public handle is, and the two kinds of node behind it.
 *
 *   flexkv_*  (api.c)  -->  vt of the node  -->  local   node.c, space.c, ops.c   this process
 *                                           -->  client  client.c                 a daemon's
 *
 * api.c checks arguments and makes keys, which needs no node. What a vt's function gets has been
 * checked as far as one can without looking into the node.
 */
#ifndef FK_API_HANDLE_H
#define FK_API_HANDLE_H

#include "base/key.h"
#include "base/util.h"
#include "flexkv/flexkv.h"

#define FK_NAME_MAX 64              /* of a space, with its 0 */
#define FK_INSTANCE_NAME_MAX 128

struct fk_node_vt {
    void (*close)(flexkv_node *node);
    int (*fd)(flexkv_node *node);
    int (*space_open)(flexkv_node *node, const flexkv_space_desc *desc, flexkv_space **out);
    int (*namespace_open)(flexkv_space *space, const char *const *parts, size_t n_parts,
                          flexkv_namespace **out);
    int (*namespace_label)(flexkv_namespace *ns, const char *lora_name, const char *cache_salt);
    int (*regions_register)(flexkv_space *space, uint32_t rank, const flexkv_region *regions,
                            size_t n);
    int (*regions_unregister)(flexkv_space *space, uint32_t rank);
    int (*set_compute_rate)(flexkv_space *space, double tokens_per_second);
    int (*match)(flexkv_namespace *ns, const struct fk_key *keys, uint32_t n,
                 flexkv_match_result *out);
    int (*release)(flexkv_node *node, uint64_t lease);
    int (*get)(flexkv_node *node, uint64_t lease, uint32_t first, uint32_t n,
               const flexkv_op_args *args, uint64_t *op);
    int (*put)(flexkv_namespace *ns, const struct fk_key *keys, uint32_t n, uint32_t first,
               const flexkv_op_args *args, uint64_t *op);
    int (*prefetch)(flexkv_namespace *ns, const struct fk_key *keys, uint32_t n,
                    const flexkv_op_args *args, uint64_t *op);
    int (*cancel)(flexkv_node *node, uint64_t op);
    int (*poll)(flexkv_node *node, flexkv_completion *out, int max, int timeout_ms);
    int (*reset)(flexkv_node *node);
    int (*stats)(flexkv_node *node, flexkv_stats *out);
    int (*status)(flexkv_node *node, char **json);
    int (*events_open)(flexkv_node *node, flexkv_space *space, flexkv_events **out);
};

struct flexkv_node {
    const struct fk_node_vt *vt;
};

struct flexkv_space {
    flexkv_node *node;
    uint32_t tokens_per_block;
    enum fk_key_scheme scheme;
    uint8_t fingerprint[16];
};

struct flexkv_namespace {
    flexkv_space *space;
    struct fk_key seed;
};

/* error.c: the calling thread's message; returns rc. */
int fk_api_fail(int rc, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

/* api.c: is all of the description as it must be? Names are not NULL. */
int fk_check_space_desc(const flexkv_space_desc *desc);
/* api.c: a namespace's parts in one string that no other list of parts gives; NULL: no memory. */
char *fk_join_parts(const char *const *parts, size_t n);

#endif
