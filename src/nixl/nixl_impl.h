/*
 * nixl_impl.h - private to src/nixl: NIXL's C functions as loaded, and its numbers, written once, by fk_nixl_load; what
 * agents of both kinds, the transport's and those of objects, are made with. Which thread may call what is up to the
 * agents' owners.
 */
#ifndef FK_NIXL_IMPL_H
#define FK_NIXL_IMPL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "nixl/nixl_lib.h"

enum { NIXL_OK = 0, NIXL_IN_PROGRESS = 1 };      /* its statuses; below zero: errors */
enum { NIXL_DRAM = 0, NIXL_OBJECT = 3 };  /* kinds of memory */
enum { NIXL_SYNC_STRICT = 1 };          /* threads may share an agent */
enum { NIXL_READ = 0, NIXL_WRITE = 1 };

struct fk_nixl_config {                 /* of an agent */
    bool progress_thread, listen_thread;
    int listen_port;
    int thread_sync;
    unsigned n_workers;
    uint64_t progress_delay_us, listen_delay_us;
    bool telemetry;
};

struct fk_nixl_api {
    bool (*is_stub)(void);
    int (*create_configured_agent)(const char *name, const struct fk_nixl_config *c, void **agent);
    int (*destroy_agent)(void *agent);
    int (*get_local_md)(void *agent, void **data, size_t *bytes);
    int (*load_remote_md)(void *agent, const void *data, size_t bytes, char **name);
    int (*create_params)(void **params);
    int (*params_add)(void *params, const char *key, const char *value);
    int (*destroy_params)(void *params);
    int (*create_backend)(void *agent, const char *plugin, void *params, void **backend);
    int (*destroy_backend)(void *backend);
    int (*create_reg_dlist)(int memory, void **list);
    int (*reg_dlist_add_desc)(void *list, uintptr_t at, size_t bytes, uint64_t device, const void *meta, size_t meta_bytes);
    int (*destroy_reg_dlist)(void *list);
    int (*register_mem)(void *agent, void *list, void *options);
    int (*create_xfer_dlist)(int memory, void **list);
    int (*xfer_dlist_add_desc)(void *list, uintptr_t at, size_t bytes, uint64_t device);
    int (*destroy_xfer_dlist)(void *list);
    int (*create_xfer_req)(void *agent, int op, void *local, void *remote, const char *who, void **request, void *options);
    int (*post_xfer_req)(void *agent, void *request, void *options);
    int (*get_xfer_status)(void *agent, void *request);
    int (*release_xfer_req)(void *agent, void *request);
    int (*destroy_xfer_req)(void *request);
    int (*deregister_mem)(void *agent, void *list, void *options);
    int (*create_opt_args)(void **options);
    int (*opt_args_add_backend)(void *options, void *backend);
    int (*destroy_opt_args)(void *options);
    int (*create_query_resp_list)(void **list);
    int (*query_resp_list_has_value)(void *list, size_t at, bool *has);
    int (*destroy_query_resp_list)(void *list);
    int (*query_mem)(void *agent, void *list, void *answers, void *options);
};

extern struct fk_nixl_api fk_nixl;

/* ---- nixl_lib.c: with NIXL's statuses, and without a line in the log ---- */

/* Of what can't be opened fk_nixl_close takes away what there is. */
int nixl_agent_open(struct fk_nixl_agent *a, const char *name, const struct fk_nixl_config *c, const char *plugin,
                    const struct fk_nixl_param *param, uint32_t n_params);
/* Memory of ours: from now on, or no longer. */
int nixl_memory(struct fk_nixl_agent *a, const void *base, size_t bytes, bool add);

struct nixl_there {                     /* the other end of a transfer */
    int memory;
    uint64_t at, device;
    const char *who;                    /* its agent's name; of objects our own one's */
};

/* Between memory of ours and there; not begun yet. To its end: fk_nixl_forget. */
int nixl_request(struct fk_nixl_agent *a, int op, const void *here, size_t bytes, const struct nixl_there *there,
                 void **request);

#endif
