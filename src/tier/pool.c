/* pool.c - see pool.h. Touches memory policy and mappings of its own only. */
#include "tier/pool.h"

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/syscall.h>

#include "base/log.h"
#include "base/util.h"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif
#define POPULATE_CHUNK (64 * FK_MIB)
#define MPOL_INTERLEAVE 3
#define MPOL_F_MEMS_ALLOWED 4

struct fk_pool {
    struct fk_pool *left_before;        /* see fk_pool_leave */
    void *base;
    uint64_t bytes;
    int fd;
    const char *kind;
    struct fk_pool_params params;
    pthread_t thread;
    bool has_thread;
    _Atomic bool stop;
    _Atomic uint64_t populated;
};

/* ---- mappings ---- */

static void *map_fd(int fd, uint64_t bytes)
{
    if (ftruncate(fd, (off_t)bytes) < 0)
        return NULL;
    void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    return p == MAP_FAILED ? NULL : p;
}

static bool map_hugetlb(struct fk_pool *pool)
{
    uint64_t page = pool->params.hugepage_bytes ? pool->params.hugepage_bytes : 2 * FK_MIB;
    uint64_t bytes = fk_round_up(pool->params.bytes, page);
    unsigned shift = (unsigned)__builtin_ctzll(page);

    pool->fd = (int)syscall(SYS_memfd_create, "flexkv-pool",
                            MFD_CLOEXEC | MFD_HUGETLB | shift << MAP_HUGE_SHIFT);
    if (pool->fd < 0)
        return false;
    pool->base = map_fd(pool->fd, bytes);       /* reserves the pages, or fails */
    if (!pool->base) {
        close(pool->fd);
        pool->fd = -1;
        return false;
    }
    pool->bytes = bytes;
    pool->kind = "hugetlb";
    return true;
}

/* Does the kernel give transparent huge pages to shared memory that asks for them? */
static bool shmem_thp(void)
{
    char text[128] = "";
    FILE *f = fopen("/sys/kernel/mm/transparent_hugepage/shmem_enabled", "re");

    if (!f)
        return false;
    bool ok = fgets(text, sizeof(text), f) && !strstr(text, "[never]") && !strstr(text, "[deny]");
    fclose(f);
    return ok;
}

static bool map_memfd(struct fk_pool *pool, bool thp)
{
    pool->fd = (int)syscall(SYS_memfd_create, "flexkv-pool", MFD_CLOEXEC);
    if (pool->fd < 0)
        return false;
    pool->base = map_fd(pool->fd, pool->bytes);
    if (!pool->base) {
        close(pool->fd);
        pool->fd = -1;
        return false;
    }
    pool->kind = thp ? "thp" : "plain";
    if (thp)
        madvise(pool->base, pool->bytes, MADV_HUGEPAGE);
    return true;
}

static bool map_anonymous(struct fk_pool *pool)
{
    void *p = mmap(NULL, pool->bytes, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

    if (p == MAP_FAILED)
        return false;
    pool->base = p;
    pool->kind = "thp";
    madvise(p, pool->bytes, MADV_HUGEPAGE);
    return true;
}

/* What the kernel thinks it can still give without swapping; 0: it does not say. */
static uint64_t memory_available(void)
{
    char line[128];
    unsigned long long kib = 0;
    FILE *f = fopen("/proc/meminfo", "re");

    while (f && fgets(line, sizeof(line), f))
        if (sscanf(line, "MemAvailable: %llu kB", &kib) == 1)
            break;
    if (f)
        fclose(f);
    return kib * FK_KIB;
}

static bool map_pool(struct fk_pool *pool)
{
    enum fk_pool_pages pages = pool->params.pages;
    uint64_t available = memory_available();

    pool->bytes = fk_round_up(pool->params.bytes, 2 * FK_MIB);
    if ((pages == FK_POOL_AUTO || pages == FK_POOL_HUGETLB) && map_hugetlb(pool))
        return true;
    if (pages == FK_POOL_HUGETLB)
        return false;
    if (available && pool->bytes > available) {     /* better an error now than the OOM killer soon */
        errno = ENOMEM;
        return false;
    }
    if (pages == FK_POOL_PLAIN || pool->params.shared || shmem_thp())
        return map_memfd(pool, pages != FK_POOL_PLAIN && shmem_thp());
    return map_anonymous(pool);     /* nobody else maps it: huge pages are worth more */
}

#define NODE_WORDS 16
#define NODE_BITS (NODE_WORDS * 8 * sizeof(unsigned long))

/* "0,2-3" -> bits; false: not such a list, or a node beyond what we can name. */
static bool parse_nodes(const char *text, unsigned long *mask)
{
    for (;;) {
        char *end;
        unsigned long from = strtoul(text, &end, 10), to = from;
        if (end == text)
            return false;
        if (*end == '-') {
            text = end + 1;
            to = strtoul(text, &end, 10);
            if (end == text)
                return false;
        }
        if (to < from || to >= NODE_BITS)
            return false;
        for (; from <= to; from++)
            mask[from / (8 * sizeof(*mask))] |= 1ul << from % (8 * sizeof(*mask));
        if (!*end)
            return true;
        if (*end != ',')
            return false;
        text = end + 1;
    }
}

/* Pages go round the nodes; with one node there is nothing to do. -EINVAL: a list asked for by
 * name that can't be had. */
static int interleave(struct fk_pool *pool, const char *nodes, char *error, size_t error_bytes)
{
    unsigned long mask[NODE_WORDS] = { 0 };
    bool all = strcmp(nodes, "auto") == 0;
    unsigned count = 0;

    if (all && syscall(SYS_get_mempolicy, NULL, mask, NODE_BITS, NULL, MPOL_F_MEMS_ALLOWED) < 0)
        return 0;
    if (!all && !parse_nodes(nodes, mask)) {
        snprintf(error, error_bytes, "numa_nodes \"%.60s\": a list such as 0,2-3 is allowed, or auto",
                 nodes);
        return -EINVAL;
    }
    for (size_t i = 0; i < NODE_WORDS; i++)
        count += (unsigned)__builtin_popcountl(mask[i]);
    if ((all && count <= 1) ||
        syscall(SYS_mbind, pool->base, pool->bytes, MPOL_INTERLEAVE, mask, NODE_BITS, 0) == 0)
        return 0;
    if (all) {
        fk_warn("cpu pool: cannot spread over %u NUMA nodes: %s", count, strerror(errno));
        return 0;
    }
    snprintf(error, error_bytes, "numa_nodes %.60s: %s", nodes, strerror(errno));
    return -EINVAL;
}

/* ---- population ---- */

static void touch(volatile char *p, uint64_t bytes)
{
    for (uint64_t at = 0; at < bytes; at += 4096)
        __atomic_fetch_or(&p[at], 0, __ATOMIC_RELAXED);     /* others may write it meanwhile */
}

static void *populate(void *arg)
{
    struct fk_pool *pool = arg;

    for (uint64_t at = 0; at < pool->bytes && !atomic_load(&pool->stop);) {
        uint64_t n = fk_min(POPULATE_CHUNK, pool->bytes - at);
        if (madvise((char *)pool->base + at, n, MADV_POPULATE_WRITE) < 0) {
            if (errno == EINTR)
                continue;
            if (errno == ENOMEM || errno == EHWPOISON) {
                fk_warn("cpu pool: memory ended after %llu of %llu MiB; cpu_cache_gb is too large",
                        (unsigned long long)(at / FK_MIB),
                        (unsigned long long)(pool->bytes / FK_MIB));
                break;
            }
            touch((char *)pool->base + at, n);      /* kernels before 5.14 */
        }
        at += n;
        atomic_store(&pool->populated, at);
        if (pool->params.populated)
            pool->params.populated(pool->params.arg);
    }
    return NULL;
}

int fk_pool_create(const struct fk_pool_params *params, struct fk_pool **out, char *error,
                   size_t error_bytes)
{
    struct fk_pool *pool = calloc(1, sizeof(*pool));

    if (!pool)
        return -ENOMEM;
    pool->params = *params;
    pool->fd = -1;
    if (!map_pool(pool)) {
        snprintf(error, error_bytes, "no %smemory for a cpu tier of %llu MiB: %s; lower "
                 "cpu_cache_gb%s", params->pages == FK_POOL_HUGETLB ? "huge page " : "",
                 (unsigned long long)(params->bytes / FK_MIB), strerror(errno),
                 params->pages == FK_POOL_HUGETLB ?
                 ", reserve pages in /proc/sys/vm/nr_hugepages, or set cpu_memory=auto" : "");
        free(pool);
        return -ENOMEM;
    }
    int rc = params->numa_nodes ? interleave(pool, params->numa_nodes, error, error_bytes) : 0;
    if (rc) {
        fk_pool_destroy(pool);
        return rc;
    }
    pool->has_thread = pthread_create(&pool->thread, NULL, populate, pool) == 0;
    *out = pool;
    return 0;
}

static void stop_thread(struct fk_pool *pool)
{
    atomic_store(&pool->stop, true);
    if (pool->has_thread)
        pthread_join(pool->thread, NULL);
    pool->has_thread = false;
}

void fk_pool_leave(struct fk_pool *pool)
{
    static struct fk_pool *_Atomic left;        /* for whoever looks for leaks: they are meant */

    if (!pool)
        return;
    stop_thread(pool);
    pool->left_before = atomic_load(&left);
    while (!atomic_compare_exchange_weak(&left, &pool->left_before, pool))
        ;
}

void fk_pool_destroy(struct fk_pool *pool)
{
    if (!pool)
        return;
    stop_thread(pool);
    munmap(pool->base, pool->bytes);
    if (pool->fd >= 0)
        close(pool->fd);
    free(pool);
}

void *fk_pool_base(const struct fk_pool *pool) { return pool->base; }
uint64_t fk_pool_bytes(const struct fk_pool *pool)
{
    return pool->bytes;
}

int fk_pool_fd(const struct fk_pool *pool) { return pool->fd; }
const char *fk_pool_kind(const struct fk_pool *pool) { return pool->kind; }

uint64_t fk_pool_populated(const struct fk_pool *pool)
{
    return atomic_load(&((struct fk_pool *)(uintptr_t)pool)->populated);
}
