/* nixl_lib.c - see nixl_lib.h. */
#include "nixl/nixl_lib.h"

#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "base/fail.h"
#include "base/log.h"
#include "base/util.h"
#include "nixl/nixl_impl.h"

#define LIBRARY "libnixl_capi.so"
#define PROGRESS_US 100000u             /* the agent's thread looks at least so often: NIXL says that a wake-up may be lost */

struct fk_nixl_api fk_nixl;

static const struct { const char *name; void *at; } symbols[] = {
#define SYMBOL(name) { "nixl_capi_" #name, &fk_nixl.name }
    SYMBOL(is_stub), SYMBOL(create_configured_agent), SYMBOL(destroy_agent), SYMBOL(get_local_md),
    SYMBOL(load_remote_md), SYMBOL(create_params), SYMBOL(params_add), SYMBOL(destroy_params), SYMBOL(create_backend),
    SYMBOL(destroy_backend), SYMBOL(create_reg_dlist), SYMBOL(reg_dlist_add_desc), SYMBOL(destroy_reg_dlist),
    SYMBOL(register_mem), SYMBOL(create_xfer_dlist), SYMBOL(xfer_dlist_add_desc), SYMBOL(destroy_xfer_dlist),
    SYMBOL(create_xfer_req), SYMBOL(post_xfer_req), SYMBOL(get_xfer_status), SYMBOL(release_xfer_req),
    SYMBOL(destroy_xfer_req), SYMBOL(deregister_mem), SYMBOL(create_opt_args), SYMBOL(opt_args_add_backend),
    SYMBOL(destroy_opt_args), SYMBOL(create_query_resp_list), SYMBOL(query_resp_list_has_value),
    SYMBOL(destroy_query_resp_list), SYMBOL(query_mem),
#undef SYMBOL
};

/* ---- loading ---- */

static bool is_folder(const char *path)
{
    struct stat st;

    return stat(path, &st) == 0 && S_ISDIR(st.st_mode);
}

/* Without RDMA devices the module for them is of no use, and with Debian's libibverbs beside the wheel's it crashes the process when
 * that ends. */
static bool has_rdma(void)
{
    DIR *d = opendir("/sys/class/infiniband");
    int n = 0;

    while (d && readdir(d) && n < 3)
        n++;
    if (d)
        closedir(d);
    return n > 2;
}

/*
 * UCX shall not take over signals and the process's memory hooks. The wheel's plugins are looked for where the wheel
 * has them. Whoever has set these knows better. (setenv beside threads that call getenv is not quite safe; this happens
 * once, while the node is opened.)
 */
static void set_environment(const char *folder)
{
    char plugins[4096];

    setenv("UCX_MEM_EVENTS", "n", 0);
    setenv("UCX_HANDLE_ERRORS", "none", 0);
    setenv("UCX_ERROR_SIGNALS", "", 0);
    if (!has_rdma())
        setenv("UCX_MODULES", "^ib", 0);
    snprintf(plugins, sizeof(plugins), "%s/plugins", folder);
    if (is_folder(plugins))
        setenv("NIXL_PLUGIN_DIR", plugins, 0);
}

static int take_symbols(void *handle, const char *file, char *error, size_t bytes)
{
    for (size_t i = 0; i < fk_array_size(symbols); i++) {
        void *p = dlsym(handle, symbols[i].name);
        if (!p)
            return fk_fail(error, bytes, -ENOSYS, "NIXL: %s has no %s: it is not NIXL's C library, or one "
                           "older than 1.4 (nixl_library)", file, symbols[i].name);
        memcpy(symbols[i].at, &p, sizeof(p));
    }
    if (fk_nixl.is_stub())
        return fk_fail(error, bytes, -ENOSYS, "NIXL: %s is the stub for building without NIXL "
                       "(nixl_library)", file);
    return 0;
}

static int load(const char *path, char *error, size_t bytes)
{
    char file[4096], folder[4096];

    snprintf(file, sizeof(file), "%s%s", path ? path : LIBRARY, path && is_folder(path) ? "/" LIBRARY : "");
    snprintf(folder, sizeof(folder), "%s", file);
    char *slash = strrchr(folder, '/');
    if (slash) {
        *slash = '\0';
        set_environment(folder);
    } else {
        set_environment("/nowhere");
    }
    void *handle = dlopen(file, RTLD_NOW | RTLD_LOCAL);         /* never unloaded */
    if (!handle)
        return fk_fail(error, bytes, -ENOSYS, "NIXL: %s; install NIXL (the wheel nixl_cu12 or nixl_cu13) "
                       "and name the folder of its " LIBRARY " (nixl_library)", dlerror());
    int rc = take_symbols(handle, file, error, bytes);
    if (rc)
        dlclose(handle);
    return rc;
}

int fk_nixl_load(const char *path, char *error, size_t bytes)
{
    static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    static bool loaded;

    pthread_mutex_lock(&lock);
    int rc = loaded ? 0 : load(path && *path ? path : NULL, error, bytes);
    loaded |= rc == 0;
    pthread_mutex_unlock(&lock);
    return rc;
}

/* ---- agents ---- */

int nixl_agent_open(struct fk_nixl_agent *a, const char *name, const struct fk_nixl_config *c, const char *plugin,
                    const struct fk_nixl_param *param, uint32_t n_params)
{
    void *params = NULL;

    *a = (struct fk_nixl_agent){ 0 };
    int rc = fk_nixl.create_configured_agent(name, c, &a->agent);
    if (rc == NIXL_OK)
        rc = fk_nixl.create_params(&params);
    for (uint32_t i = 0; rc == NIXL_OK && i < n_params; i++)
        if (param[i].value && *param[i].value)
            rc = fk_nixl.params_add(params, param[i].name, param[i].value);
    if (rc == NIXL_OK)
        rc = fk_nixl.create_backend(a->agent, plugin, params, &a->backend);
    if (params)
        fk_nixl.destroy_params(params);
    return rc;
}

/*
 * "^cma": with it a process writes into another's memory by itself, and one that stood still in the middle of it goes on when
 * we have let go of the buffer long ago. All other ways end with the agent. Whoever sets UCX_TLS or UCX_NET_DEVICES
 * overrides both.
 */
int fk_nixl_open(struct fk_nixl_agent *a, const char *name, const char *plugin, const char *device, bool progress)
{
    struct fk_nixl_config c = { .progress_thread = progress, .n_workers = 1, .progress_delay_us = PROGRESS_US,
                        .listen_delay_us = PROGRESS_US };
    char config[128];
    struct fk_nixl_param ucx[] = {
        { "ucx_error_handling_mode", "peer" }, { "ucx_ep_close_force", "true" }, { "engine_config", config },
    };

    snprintf(config, sizeof(config), "TLS=^cma,NET_DEVICES=%s", device);
    int rc = nixl_agent_open(a, name, &c, plugin, ucx, strcmp(plugin, "UCX") == 0 ? fk_array_size(ucx) : 0);
    if (rc == NIXL_OK)
        return 0;
    fk_warn("NIXL: no %s (plugin %s, device %s, status %d)", a->agent ? "backend" : "agent", plugin, device, rc);
    fk_nixl_close(a);
    return -EIO;
}

int nixl_memory(struct fk_nixl_agent *a, const void *base, size_t bytes, bool add)
{
    void *list = NULL;
    int rc = fk_nixl.create_reg_dlist(NIXL_DRAM, &list);

    if (rc == NIXL_OK)
        rc = fk_nixl.reg_dlist_add_desc(list, (uintptr_t)base, bytes, 0, NULL, 0);
    if (rc == NIXL_OK)
        rc = add ? fk_nixl.register_mem(a->agent, list, NULL) : fk_nixl.deregister_mem(a->agent, list, NULL);
    if (list)
        fk_nixl.destroy_reg_dlist(list);
    return rc;
}

int fk_nixl_register(struct fk_nixl_agent *a, void *base, size_t bytes)
{
    int rc = nixl_memory(a, base, bytes, true);

    if (rc != NIXL_OK)
        fk_warn("NIXL: %zu bytes can't be registered: status %d", bytes, rc);
    return rc == NIXL_OK ? 0 : -EIO;
}

void fk_nixl_close(struct fk_nixl_agent *a)
{
    if (a->agent)
        fk_nixl.destroy_agent(a->agent);
    if (a->backend)
        fk_nixl.destroy_backend(a->backend);           /* the handle; the backend went with its agent */
    free(a->remote);
    *a = (struct fk_nixl_agent){ 0 };
}

int fk_nixl_metadata(struct fk_nixl_agent *a, void **data, size_t *bytes)
{
    return fk_nixl.get_local_md(a->agent, data, bytes) == NIXL_OK ? 0 : -EIO;
}

int fk_nixl_peer(struct fk_nixl_agent *a, const void *data, size_t bytes)
{
    if (a->remote)                      /* once: a channel has one peer */
        return -EPROTO;
    return fk_nixl.load_remote_md(a->agent, data, bytes, &a->remote) == NIXL_OK ? 0 : -EPROTO;
}

/* ---- moving bytes ---- */

int nixl_request(struct fk_nixl_agent *a, int op, const void *here, size_t bytes, const struct nixl_there *there,
                 void **request)
{
    void *ours = NULL, *theirs = NULL;
    int rc = fk_nixl.create_xfer_dlist(NIXL_DRAM, &ours);

    if (rc == NIXL_OK)
        rc = fk_nixl.create_xfer_dlist(there->memory, &theirs);
    if (rc == NIXL_OK)
        rc = fk_nixl.xfer_dlist_add_desc(ours, (uintptr_t)here, bytes, 0);
    if (rc == NIXL_OK)
        rc = fk_nixl.xfer_dlist_add_desc(theirs, there->at, bytes, there->device);
    if (rc == NIXL_OK)
        rc = fk_nixl.create_xfer_req(a->agent, op, ours, theirs, there->who, request, NULL);
    if (ours)
        fk_nixl.destroy_xfer_dlist(ours);
    if (theirs)
        fk_nixl.destroy_xfer_dlist(theirs);
    return rc;
}

int fk_nixl_write(struct fk_nixl_agent *a, const void *data, size_t bytes, uint64_t to, void **transfer)
{
    struct nixl_there there = { .memory = NIXL_DRAM, .at = to, .who = a->remote };

    if (!a->remote || nixl_request(a, NIXL_WRITE, data, bytes, &there, transfer) != NIXL_OK)
        return -EINVAL;
    int rc = fk_nixl.post_xfer_req(a->agent, *transfer, NULL);
    if (rc == NIXL_OK || rc == NIXL_IN_PROGRESS)
        return 0;
    fk_nixl_forget(a, *transfer);
    *transfer = NULL;
    return -EIO;
}

int fk_nixl_done(struct fk_nixl_agent *a, void *transfer)
{
    int rc = fk_nixl.get_xfer_status(a->agent, transfer);

    return rc == NIXL_OK ? 0 : rc == NIXL_IN_PROGRESS ? -EINPROGRESS : -EIO;
}

void fk_nixl_forget(struct fk_nixl_agent *a, void *transfer)
{
    fk_nixl.release_xfer_req(a->agent, transfer);
    fk_nixl.destroy_xfer_req(transfer);
}
