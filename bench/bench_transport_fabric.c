/* bench_transport_fabric.c - reads with libfabric and nothing else. See bench_transport.h. */
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <sys/prctl.h>
#include <sys/socket.h>

#include "base/clock.h"
#include "bench_transport.h"
#include "transport/fabric_lib.h"

struct side {
    const struct fk_fabric_lib *lib;
    struct fi_info *info;
    struct fid_fabric *fabric;
    struct fid_domain *domain;
    struct fid_ep *ep;
    struct fid_cq *cq;
    struct fid_av *av;
    struct fid_mr *mr;
    int fd;
    char *pool;
    fi_addr_t peer;
    uint64_t rng, base, key, at;
};

struct card { char name[256]; size_t bytes; uint64_t base, key; };

static int link_to_server = -1;

static int side_open(struct side *s)
{
    struct fi_cq_attr cq = { .format = FI_CQ_FORMAT_CONTEXT, .wait_obj = FI_WAIT_FD };
    struct fi_av_attr av = { .type = FI_AV_TABLE };

    s->lib = fk_fabric_lib();
    struct fi_info *h = s->lib ? s->lib->dupinfo(NULL) : NULL;
    if (!h)
        return -ENOSYS;
    h->caps = FI_RMA | FI_READ | FI_REMOTE_READ;
    h->ep_attr->type = FI_EP_RDM;
    h->domain_attr->mr_mode = FI_MR_LOCAL | FI_MR_VIRT_ADDR | FI_MR_ALLOCATED | FI_MR_PROV_KEY;
    h->domain_attr->threading = FI_THREAD_DOMAIN;
    h->fabric_attr->prov_name = strdup("tcp;ofi_rxm");
    int rc = s->lib->getinfo(FI_VERSION(1, 14), "127.0.0.1", NULL, FI_SOURCE, h, &s->info);
    s->lib->freeinfo(h);
    s->pool = aligned_alloc(4096, BENCH_POOL_BYTES);
    if (rc || !s->pool)
        return rc ? rc : -ENOMEM;
    memset(s->pool, 1, BENCH_POOL_BYTES);
    if ((rc = s->lib->fabric(s->info->fabric_attr, &s->fabric, NULL)) ||
        (rc = fi_domain(s->fabric, s->info, &s->domain, NULL)) ||
        (rc = fi_cq_open(s->domain, &cq, &s->cq, NULL)) || (rc = fi_av_open(s->domain, &av, &s->av, NULL)) ||
        (rc = fi_endpoint(s->domain, s->info, &s->ep, NULL)) ||
        (rc = fi_ep_bind(s->ep, &s->cq->fid, FI_TRANSMIT | FI_RECV)) ||
        (rc = fi_ep_bind(s->ep, &s->av->fid, 0)) || (rc = fi_enable(s->ep)) ||
        (rc = fi_mr_reg(s->domain, s->pool, BENCH_POOL_BYTES, FI_READ | FI_REMOTE_READ, 0, 7, 0, &s->mr, NULL)) ||
        (rc = fi_control(&s->cq->fid, FI_GETWAIT, &s->fd)))
        return rc;
    return 0;
}

static void sleep_on(struct side *s, int ms)
{
    struct fid *fid = &s->cq->fid;
    struct pollfd p = { .fd = s->fd, .events = POLLIN };

    if (fi_trywait(s->fabric, &fid, 1) == 0)
        poll(&p, 1, ms);
}

static void serve(int fd)
{
    struct side s = { 0 };
    struct card c = { .bytes = sizeof(c.name) };
    struct fi_cq_entry e;
    int rc = side_open(&s);

    if (!rc)
        rc = fi_getname(&s.ep->fid, c.name, &c.bytes);
    if (rc)
        _exit(1);
    c.base = s.info->domain_attr->mr_mode & FI_MR_VIRT_ADDR ? (uintptr_t)s.pool : 0;
    c.key = fi_mr_key(s.mr);
    (void)!write(fd, &c, sizeof(c));
    for (;;)
        if (fi_cq_read(s.cq, &e, 1) == -FI_EAGAIN)
            sleep_on(&s, 100);
}

int bench_fabric_fork(void)
{
    int sv[2];

    if (socketpair(AF_UNIX, SOCK_STREAM, 0, sv))
        return -errno;
    if (fork() == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        serve(sv[1]);
    }
    close(sv[1]);
    link_to_server = sv[0];
    return 0;
}

static ssize_t post(struct side *s, uint32_t bytes)
{
    uint64_t from = (uint64_t)fk_rng_below(&s->rng, (uint32_t)(BENCH_POOL_BYTES / bytes)) * bytes;
    ssize_t rc = fi_read(s->ep, s->pool + s->at, bytes, fi_mr_desc(s->mr), s->peer, s->base + from, s->key, NULL);

    if (!rc)
        s->at = (s->at + bytes) % BENCH_POOL_BYTES;
    return rc;
}

static double broken(struct side *s, ssize_t rc)
{
    struct fi_cq_err_entry e = { 0 };

    if (rc == -FI_EAVAIL && fi_cq_readerr(s->cq, &e, 0) == 1)
        fprintf(stderr, "flexkv bench transport: libfabric's own loop: %s (%d, provider %d)\n", s->lib->strerror(e.err),
                e.err, e.prov_errno);
    return -EIO;
}

static double fabric_run(struct bench_loop *l, uint32_t bytes, uint64_t run_us)
{
    struct side *s = l->priv;
    uint64_t start = fk_clock_us(), now = start, done = 0;
    unsigned in_flight = 0;
    s->at = 0;
    struct fi_cq_entry e[BENCH_DEPTH];

    do {
        while (in_flight < BENCH_DEPTH && now - start < run_us) {
            ssize_t rc = post(s, bytes);
            if (rc && rc != -FI_EAGAIN)
                return (double)rc;
            if (rc)
                break;
            in_flight++;
        }
        ssize_t n = fi_cq_read(s->cq, e, BENCH_DEPTH);
        if (n < 0 && n != -FI_EAGAIN)
            return broken(s, n);
        if (n > 0) {
            in_flight -= (unsigned)n;
            done += (uint64_t)n * bytes;
        } else {
            sleep_on(s, done ? 1000 : 1);
        }
        now = fk_clock_us();
    } while (in_flight || now - start < run_us);
    return (double)done * 1e6 / (double)(now - start);
}

int bench_fabric_open(struct bench_loop *l)
{
    struct side *s = calloc(1, sizeof(*s));
    struct card c;
    int rc = s ? side_open(s) : -ENOMEM;

    if (rc)
        return rc;
    if (read(link_to_server, &c, sizeof(c)) != sizeof(c) || fi_av_insert(s->av, c.name, 1, &s->peer, 0, NULL) != 1)
        return -EIO;
    s->base = c.base;
    s->key = c.key;
    *l = (struct bench_loop){ fabric_run, s };
    return 0;
}
