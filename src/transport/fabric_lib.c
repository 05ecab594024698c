/* fabric_lib.c - see fabric_lib.h. */
#include "transport/fabric_lib.h"

#include <dlfcn.h>
#include <netinet/in.h>
#include <openssl/rand.h>
#include <pthread.h>

#include "base/log.h"
#include "transport/endpoint.h"

#define LIBRARY "libfabric.so.1"
#define API_VERSION FI_VERSION(1, 14)
#define KEY_TRIES 8
#define WRITES_MAX 64           /* that libfabric holds at once; more wait with us */
#define MESSAGES_MAX 64

static struct fk_fabric_lib library;
static bool usable;

struct symbol { const char *name; size_t at; };
static const struct symbol symbols[] = {
    { "fi_getinfo", offsetof(struct fk_fabric_lib, getinfo) },
    { "fi_freeinfo", offsetof(struct fk_fabric_lib, freeinfo) },
    { "fi_dupinfo", offsetof(struct fk_fabric_lib, dupinfo) },
    { "fi_fabric", offsetof(struct fk_fabric_lib, fabric) },
    { "fi_strerror", offsetof(struct fk_fabric_lib, strerror) },
    { "fi_version", offsetof(struct fk_fabric_lib, version) },
};

/*
 * What we never use shall cost nothing: by default ofi_rxm touches 30 MB of buffers for messages with each endpoint and 17
 * with each connection, which takes 40 ms each, and there is no other way to tell it. Whoever has set these knows better.
 * (setenv beside threads that
 * call getenv is not quite safe; this happens once, while the node is opened.)
 */
static void be_small(void)
{
    setenv("FI_OFI_RXM_MSG_RX_SIZE", "16", 0);
    setenv("FI_OFI_RXM_BUFFER_SIZE", "1024", 0);
    /* Peers of an endpoint: by it the completion queue is sized. For libfabric's own guess, 1024, verbs would pin 10 MB, or
     * refuse (soft-RoCE has 32767 entries). Ours have one; the rest is room. */
    setenv("FI_UNIVERSE_SIZE", "4", 0);
}

static void load(void)
{
    be_small();
    /* libfabric sees to forking children and catches no signals, but some providers' own libraries look for
     * work at load time: it is loaded only when somebody opens this transport. Never unloaded. */
    void *handle = dlopen(LIBRARY, RTLD_NOW | RTLD_LOCAL);

    if (!handle) {
        fk_warn("transport fabric: %s", dlerror());
        return;
    }
    for (size_t i = 0; i < fk_array_size(symbols); i++) {
        void *p = dlsym(handle, symbols[i].name);
        if (!p) {
            fk_warn("transport fabric: %s has no %s", LIBRARY, symbols[i].name);
            return;
        }
        memcpy((char *)&library + symbols[i].at, &p, sizeof(p));
    }
    usable = FI_VERSION_GE(library.version(), API_VERSION);
    if (!usable)
        fk_warn("transport fabric: %s is version %u.%u, 1.14 or later is needed", LIBRARY,
                FI_MAJOR(library.version()), FI_MINOR(library.version()));
}

const struct fk_fabric_lib *fk_fabric_lib(void)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;

    pthread_once(&once, load);
    return usable ? &library : NULL;
}

static int set_hints(struct fi_info *h, const char *provider)
{
    h->caps = FI_RMA | FI_WRITE | FI_REMOTE_WRITE | FI_MSG | FI_SEND | FI_RECV;
    h->tx_attr->msg_order = h->rx_attr->msg_order = FI_ORDER_SAW;
    h->ep_attr->type = FI_EP_RDM;
    h->domain_attr->mr_mode = FI_MR_LOCAL | FI_MR_VIRT_ADDR | FI_MR_ALLOCATED | FI_MR_PROV_KEY;
    h->domain_attr->threading = FI_THREAD_DOMAIN;
    h->domain_attr->control_progress = h->domain_attr->data_progress = FI_PROGRESS_MANUAL;
    h->tx_attr->size = WRITES_MAX;
    h->rx_attr->size = MESSAGES_MAX;
    h->fabric_attr->prov_name = strdup(provider);       /* freed with the hints */
    return h->fabric_attr->prov_name ? 0 : -ENOMEM;
}

static int open_objects(struct fk_fabric *f, const char *provider, const char *source, char *error, size_t bytes)
{
    struct fi_info *hints = f->lib->dupinfo(NULL);
    int rc = hints ? set_hints(hints, provider) : -ENOMEM;

    if (!rc)
        rc = f->lib->getinfo(API_VERSION, source, NULL, source ? FI_SOURCE : 0, hints, &f->info);
    if (hints)
        f->lib->freeinfo(hints);
    if (rc)
        return fk_fail(error, bytes, rc, "transport fabric: libfabric offers no \"%s\" at %s: %s; fi_info "
                       "lists what there is", provider, source ? source : "any address",
                       f->lib->strerror(-rc));
    rc = f->lib->fabric(f->info->fabric_attr, &f->fabric, NULL);
    if (!rc)
        rc = fi_domain(f->fabric, f->info, &f->domain, NULL);
    if (rc)
        return fk_fail(error, bytes, rc, "transport fabric: \"%s\" can't be opened: %s", provider,
                       f->lib->strerror(-rc));
    return 0;
}

int fk_fabric_open(struct fk_fabric *f, const char *provider, const char *source, char *error, size_t bytes)
{
    *f = (struct fk_fabric){ .lib = fk_fabric_lib() };
    if (!f->lib)
        return fk_fail(error, bytes, -ENOSYS, "transport fabric: " LIBRARY " can't be used here (the log "
                       "says why); install libfabric1, or choose another transport");
    struct fk_fabric_ep try;
    /* Shared receive buffers cost tcp 10 ms a connection. verbs must have them: libfabric up to 2.0 at least posts what it received
     * again to an endpoint that it has just closed, which crashes (its commit 697688386). Whoever has set this knows better. */
    setenv("FI_OFI_RXM_USE_SRX", strncmp(provider, "verbs", 5) ? "0" : "1", 0);
    int rc = open_objects(f, provider, source, error, bytes);
    if (!rc) {                          /* better known now than with the first read */
        rc = fk_fabric_ep_open(f, &try);
        fk_fabric_ep_close(&try);
        if (rc)
            fk_fail(error, bytes, rc, "transport fabric: \"%s\" gives no endpoint whose completions can be waited "
                    "for (%s); choose another provider", provider, f->lib->strerror(-rc));
    }
    if (rc)
        fk_fabric_close(f);
    return rc;
}

void fk_fabric_close(struct fk_fabric *f)
{
    for (size_t i = 0; i < f->n_regions; i++)
        fi_close(&f->regions[i].mr->fid);
    free(f->regions);
    if (f->domain)
        fi_close(&f->domain->fid);
    if (f->fabric)
        fi_close(&f->fabric->fid);
    if (f->info)
        f->lib->freeinfo(f->info);
    *f = (struct fk_fabric){ 0 };
}

int fk_fabric_region(struct fk_fabric *f, void *base, size_t bytes)
{
    struct fid_mr *mr;

    if (!(f->info->domain_attr->mr_mode & FI_MR_LOCAL))
        return 0;
    if (fk_vec_grow_bytes((void **)&f->regions, &f->cap_regions, f->n_regions + 1, sizeof(*f->regions)))
        return -ENOMEM;
    int rc = fi_mr_reg(f->domain, base, bytes, FI_WRITE, 0, 0, 0, &mr, NULL);
    if (rc)
        return rc;
    f->regions[f->n_regions++] = (struct fk_fabric_region){ base, bytes, mr };
    return 0;
}

void *fk_fabric_desc(struct fk_fabric *f, const void *data, size_t bytes)
{
    for (size_t i = 0; i < f->n_regions; i++) {
        const char *base = f->regions[i].base;
        if ((const char *)data >= base && (const char *)data + bytes <= base + f->regions[i].bytes)
            return fi_mr_desc(f->regions[i].mr);
    }
    return NULL;
}

/* ---- endpoints ---- */

int fk_fabric_ep_open(struct fk_fabric *f, struct fk_fabric_ep *e)
{
    struct fi_cq_attr cq = { .format = FI_CQ_FORMAT_CONTEXT, .wait_obj = FI_WAIT_FD };
    struct fi_av_attr av = { .type = FI_AV_TABLE, .count = 1 };

    *e = (struct fk_fabric_ep){ .peer = FI_ADDR_UNSPEC, .cq_fd = -1 };
    int rc = fi_cq_open(f->domain, &cq, &e->cq, NULL);
    if (!rc)
        rc = fi_av_open(f->domain, &av, &e->av, NULL);
    if (!rc)
        rc = fi_endpoint(f->domain, f->info, &e->ep, NULL);
    if (!rc)
        rc = fi_ep_bind(e->ep, &e->cq->fid, FI_TRANSMIT | FI_RECV);
    if (!rc)
        rc = fi_ep_bind(e->ep, &e->av->fid, 0);
    if (!rc)
        rc = fi_enable(e->ep);
    if (!rc)
        rc = fi_control(&e->cq->fid, FI_GETWAIT, &e->cq_fd);
    if (rc) {
        fk_warn("transport fabric: no endpoint: %s", f->lib->strerror(-rc));
        fk_fabric_ep_close(e);
    }
    return rc;
}

void fk_fabric_ep_close(struct fk_fabric_ep *e)
{
    if (e->ep)
        fi_close(&e->ep->fid);
    if (e->cq)
        fi_close(&e->cq->fid);
    if (e->av)
        fi_close(&e->av->fid);
    free(e->notices);
    *e = (struct fk_fabric_ep){ .cq_fd = -1 };
}

int fk_fabric_ep_name(struct fk_fabric_ep *e, void *name, uint32_t *bytes)
{
    size_t n = *bytes;
    int rc = fi_getname(&e->ep->fid, name, &n);

    *bytes = (uint32_t)n;
    return rc;
}

int fk_fabric_ep_peer(struct fk_fabric *f, struct fk_fabric_ep *e, const void *name, uint32_t bytes)
{
    /* The provider takes the length for granted. A socket address is checked down to its family. */
    if (bytes != f->info->src_addrlen || bytes < sizeof(struct sockaddr_in) || bytes > 128)
        return -EPROTO;
    if (f->info->addr_format == FI_SOCKADDR_IN || f->info->addr_format == FI_SOCKADDR_IN6 ||
        f->info->addr_format == FI_SOCKADDR) {
        if (((const struct sockaddr *)name)->sa_family != ((struct sockaddr *)f->info->src_addr)->sa_family)
            return -EPROTO;
    }
    return fi_av_insert(e->av, name, 1, &e->peer, 0, NULL) == 1 ? 0 : -EPROTO;
}

/* ---- moving bytes ---- */

/* Random numbers are cheaper by the dozen. */
static int next_key(struct fk_fabric *f, uint64_t *key)
{
    if (!f->n_keys) {
        if (RAND_bytes((unsigned char *)f->keys, sizeof(f->keys)) != 1)
            return -EIO;
        f->n_keys = fk_array_size(f->keys);
    }
    *key = f->keys[--f->n_keys];
    return 0;
}

int fk_fabric_expose(struct fk_fabric *f, void *buffer, size_t bytes, struct fid_mr **mr, uint64_t *key,
                     uint64_t *address)
{
    bool ours = !(f->info->domain_attr->mr_mode & FI_MR_PROV_KEY);
    size_t key_bytes = f->info->domain_attr->mr_key_size;
    int rc = -FI_ENOKEY;

    /* Where we choose the key nobody can guess it. */
    for (int i = 0; i < KEY_TRIES && rc == -FI_ENOKEY; i++) {
        uint64_t wish = 0;
        if (ours && next_key(f, &wish))
            return -EIO;
        if (key_bytes < sizeof(wish))
            wish &= (1ull << 8 * key_bytes) - 1;
        rc = fi_mr_reg(f->domain, buffer, bytes, FI_REMOTE_WRITE, 0, wish, 0, mr, NULL);
    }
    if (rc)
        return rc;
    *key = fi_mr_key(*mr);
    *address = f->info->domain_attr->mr_mode & FI_MR_VIRT_ADDR ? (uintptr_t)buffer : 0;
    return 0;
}

/* What the provider wants to be told of local memory; what is in no region is registered for this write. */
static int describe(struct fk_fabric *f, const void *data, size_t bytes, struct fid_mr **own, void **desc)
{
    *desc = fk_fabric_desc(f, data, bytes);
    if (*desc || !(f->info->domain_attr->mr_mode & FI_MR_LOCAL))
        return 0;
    int rc = *own ? 0 : fi_mr_reg(f->domain, data, bytes, FI_WRITE, 0, 0, 0, own, NULL);
    if (!rc)
        *desc = fi_mr_desc(*own);
    return rc;
}

int fk_fabric_write(struct fk_fabric *f, struct fk_fabric_ep *e, const void *data, size_t bytes, uint64_t key,
                    uint64_t address, struct fid_mr **own, void *context)
{
    struct iovec iov = { (void *)(uintptr_t)data, bytes };
    void *desc;
    int bad = describe(f, data, bytes, own, &desc);
    if (bad)
        return bad;
    struct fi_rma_iov to = { .addr = address, .len = bytes, .key = key };
    struct fi_msg_rma m = { .msg_iov = &iov, .desc = &desc, .iov_count = 1, .addr = e->peer, .rma_iov = &to,
                            .rma_iov_count = 1, .context = context };
    ssize_t rc = fi_writemsg(e->ep, &m, FI_TRANSMIT_COMPLETE | FI_COMPLETION);

    return rc == -FI_EAGAIN ? -EAGAIN : (int)rc;
}

static int post_notice(struct fk_fabric_ep *e, struct fk_fabric_notice *at)
{
    return (int)fi_recv(e->ep, at, sizeof(*at), NULL, FI_ADDR_UNSPEC, at);
}

int fk_fabric_ep_listen(struct fk_fabric_ep *e)
{
    int rc = 0;

    e->notices = calloc(FK_FABRIC_NOTICES, sizeof(*e->notices));
    if (!e->notices)
        return -ENOMEM;
    for (int i = 0; i < FK_FABRIC_NOTICES && !rc; i++)
        rc = post_notice(e, &e->notices[i]);
    return rc;
}

int fk_fabric_notify(struct fk_fabric_ep *e, const struct fk_fabric_notice *n)
{
    return (int)fi_inject(e->ep, n, sizeof(*n), e->peer);
}

int fk_fabric_poll(struct fk_fabric_ep *e, struct fk_fabric_event *out)
{
    struct fi_cq_entry done;
    struct fi_cq_err_entry broken = { 0 };
    ssize_t n = fi_cq_read(e->cq, &done, 1);

    *out = (struct fk_fabric_event){ 0 };
    if (n == 1) {
        struct fk_fabric_notice *at = done.op_context;
        out->context = at;
        if (at < e->notices || at >= e->notices + FK_FABRIC_NOTICES)
            return 1;
        out->arrived = true;
        out->notice = *at;
        int rc = post_notice(e, at);
        return rc ? rc : 1;
    }
    if (n == -FI_EAGAIN || n == 0)
        return 0;
    if (n != -FI_EAVAIL || fi_cq_readerr(e->cq, &broken, 0) != 1)
        return n == -FI_EAVAIL ? 0 : (int)n;
    out->context = broken.op_context;
    out->rc = broken.err ? -broken.err : -EIO;
    return 1;
}

bool fk_fabric_may_sleep(struct fk_fabric *f, struct fk_fabric_ep *e)
{
    struct fid *fid = &e->cq->fid;

    return fi_trywait(f->fabric, &fid, 1) == 0;
}
