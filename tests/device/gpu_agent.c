/*
 * gpu_agent.c - a node and the agents of one engine, whose pages are in GPU memory: bytes, layers on a
 * stream, revoking, a worker killed in the middle, how soon a large pool is used, and the time from a
 * command to its completion. One GPU for each worker, as many as there are (up to 4).
 *
 *   gpu_agent [GIB of a large pool [GPUs [SSD directory]]]
 *
 * With a directory: from an SSD tier there too, through the cpu tier and by GPU direct storage; where that is not
 * (nvidia-fs), FKTEST_GDS_THROUGH_CPU=1 has cuFile do as if.
 */
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>

#include "flexkv/flexkv.h"
#include "gpu_rig.h"

#define TPB 16u
#define REGIONS 32u
#define PIECE 65536u
#define PAGES 256u

struct gpu_node {
    char address[100];
    flexkv_node *node;
    flexkv_space *space;
    flexkv_namespace *ns;
};

static void check(int rc)
{
    if (rc >= 0)
        return;
    fprintf(stderr, "%s\n", flexkv_last_error());
    exit(1);
}

static void set(flexkv_config *c, const char *key, const char *value)
{
    check(flexkv_config_set(c, key, value));
}


static const char *more[12];            /* options: name, value */

/* Listening; its space is opened when the agents are on their way. */
static void open_node(struct gpu_node *g, const char *cpu)
{
    flexkv_config *c;

    check(flexkv_config_create(&c));
    check(flexkv_config_load_env(c));   /* options of copies, say */
    set(c, "cpu_cache_gb", cpu);
    for (int i = 0; i < 12 && more[i]; i += 2)
        set(c, more[i], more[i + 1]);
    check(flexkv_node_open(c, &g->node));
    flexkv_config_destroy(c);
    check(flexkv_node_listen(g->node, g->address));
}

static void open_space(struct gpu_node *g, uint32_t workers)
{
    flexkv_space_desc d = { .struct_bytes = sizeof(d), .name = "default", .tokens_per_block = TPB,
                            .ranks = workers, .workers = workers, .wait_ms = 60000 };

    check(flexkv_space_open(g->node, &d, &g->space));
    check(flexkv_namespace_open(g->space, NULL, 0, &g->ns));
}

static void keys_of(struct gpu_node *g, uint32_t chain, uint32_t n, flexkv_key *keys)
{
    uint32_t *tokens = malloc(4ull * n * TPB);

    for (uint32_t i = 0; i < n * TPB; i++)
        tokens[i] = chain * 1000003u + i;
    MUST(flexkv_keys_from_tokens(g->ns, NULL, tokens, n * TPB, keys) == n);
    free(tokens);
}

static flexkv_completion wait_for(struct gpu_node *g, uint64_t op)
{
    flexkv_completion c;

    while (flexkv_poll(g->node, &c, 1, 30000) == 1)
        if (c.op == op)
            return c;
    fprintf(stderr, "an operation did not end\n");
    exit(1);
}

static uint64_t put(struct gpu_node *g, uint32_t chain, uint32_t n, uint32_t *pages)
{
    flexkv_key keys[PAGES];
    flexkv_op_args a = { .struct_bytes = sizeof(a), .pages = pages };
    uint64_t op;

    keys_of(g, chain, n, keys);
    check(flexkv_put(g->ns, keys, n, 0, &a, &op));
    return op;
}

static uint64_t get(struct gpu_node *g, uint32_t chain, uint32_t n, uint32_t *pages, uint32_t flags)
{
    flexkv_key keys[PAGES];
    flexkv_op_args a = { .struct_bytes = sizeof(a), .pages = pages, .flags = flags };
    flexkv_match_result m;
    uint64_t op;

    keys_of(g, chain, n, keys);
    check(flexkv_match(g->ns, keys, n, &m));
    MUST(m.blocks == n);
    check(flexkv_get(g->node, m.lease, 0, n, &a, &op));
    return op;
}

static flexkv_agent *agent_of(struct gpu_node *g, struct rig *r, uint32_t worker)
{
    uint32_t layers[REGIONS];
    flexkv_agent *agent;
    flexkv_agent_desc d = { .struct_bytes = sizeof(d), .address = g->address, .worker = worker,
                            .slice = worker, .replicas = 1, .layer_regions = layers,
                            .n_layers = REGIONS };

    for (uint32_t i = 0; i < REGIONS; i++)
        layers[i] = 1;
    check(flexkv_agent_create(&d, r->regions, r->s.n_regions, &agent));
    return agent;
}

static const struct rig_shape shape = { .n_regions = REGIONS, .pages = PAGES, .slots = 1,
                                        .piece = PIECE, .stride = PIECE };

/* ---- one worker, in this process ---- */

struct one { struct gpu_node g; struct rig r; flexkv_agent *agent; };

static void open_one(struct one *o, const char *cpu)
{
    static int number;

    snprintf(o->g.address, sizeof(o->g.address), "ipc://@flexkv-gpu-%d-%d", (int)getpid(), number++);
    rig_open(&o->r, &shape);
    rig_fill(&o->r, 1);
    open_node(&o->g, cpu);
    o->agent = agent_of(&o->g, &o->r, 0);
    open_space(&o->g, 1);
}

static void close_one(struct one *o)
{
    flexkv_agent_close(o->agent);
    flexkv_node_close(o->g.node);
    rig_close(&o->r);
}

/* In the image: page `to` of all regions becomes what page `from` of another image was. */
static void image_page(struct rig *r, const char *was, uint32_t from, uint32_t to)
{
    for (uint32_t i = 0; i < REGIONS; i++) {
        uint64_t at = (uint64_t)i * PAGES * PIECE;
        memcpy(r->image + at + (uint64_t)to * PIECE, was + at + (uint64_t)from * PIECE, PIECE);
    }
}

static void test_bytes(struct one *o, bool layered)
{
    uint32_t from[100], to[100];
    char *was = malloc(o->r.device_bytes);

    for (uint32_t i = 0; i < 100; i++) {
        from[i] = 2 * i;
        to[i] = 255 - 2 * i;
    }
    rig_fill(&o->r, 10 + layered);
    memcpy(was, o->r.image, o->r.device_bytes);
    MUST(wait_for(&o->g, put(&o->g, 10 + layered, 100, from)).blocks_ok == 100);
    rig_fill(&o->r, 20 + layered);
    uint64_t op = get(&o->g, 10 + layered, 100, to, layered ? FLEXKV_OP_LAYERWISE : 0);
    if (layered) {
        cu_stream stream;
        MUST(cu->StreamCreateWithPriority(&stream, CU_STREAM_NON_BLOCKING_FLAG, 0) == CU_OK);
        char *page = malloc(PIECE);
        for (uint32_t k = 0; k < REGIONS; k++) {    /* as an engine: wait for a layer, then read it */
            check(flexkv_agent_wait_layer(o->agent, &op, 1, k, stream, 10000));
            cu_ptr at = o->r.device + ((uint64_t)k * PAGES + to[99]) * PIECE;
            MUST(cu->MemcpyDtoHAsync(page, at, PIECE, stream) == CU_OK);
            MUST(cu->StreamSynchronize(stream) == CU_OK);
            MUST(memcmp(page, was + ((uint64_t)k * PAGES + from[99]) * PIECE, PIECE) == 0);
        }
        free(page);
        cu->StreamDestroy(stream);
    }
    flexkv_completion c = wait_for(&o->g, op);
    MUST(c.status == 0 && c.blocks_ok == 100);
    for (uint32_t i = 0; i < 100; i++)
        image_page(&o->r, was, from[i], to[i]);
    rig_expect_device(&o->r);
    free(was);
    printf("bytes%s: ok\n", layered ? " in layers" : "");
}

/* An engine that uses the pages in its stream as soon as the get is reported, over and over, of several sizes. */
static void test_early(struct one *o)
{
    enum { ROUNDS = 12 };
    uint32_t pages[PAGES], early = 0;
    char *page = malloc(PIECE);
    cu_stream stream;

    for (uint32_t i = 0; i < PAGES; i++)
        pages[i] = i;
    rig_fill(&o->r, 80);
    MUST(wait_for(&o->g, put(&o->g, 80, PAGES, pages)).status == 0);
    MUST(cu->StreamCreateWithPriority(&stream, CU_STREAM_NON_BLOCKING_FLAG, 0) == CU_OK);
    for (uint32_t round = 0; round < ROUNDS; round++) {
        uint32_t n = round % 4 ? PAGES : 1 + round % PAGES;
        for (uint32_t k = 0; k < REGIONS; k++)      /* what the last round has loaded goes */
            MUST(cu->MemcpyHtoD(o->r.device + ((uint64_t)k * PAGES + n - 1) * PIECE, o->r.image + 7, PIECE) == CU_OK);
        uint64_t op = get(&o->g, 80, n, pages, FLEXKV_OP_EARLY);
        flexkv_completion c = wait_for(&o->g, op);
        MUST(c.status == 0 && c.blocks_ok == n);
        early += c.flags == FLEXKV_COMPLETION_EARLY;
        check(flexkv_agent_wait_loaded(o->agent, &op, 1, stream));
        cu_ptr at = o->r.device + ((uint64_t)(REGIONS - 1) * PAGES + n - 1) * PIECE;
        MUST(cu->MemcpyDtoHAsync(page, at, PIECE, stream) == CU_OK);
        MUST(cu->StreamSynchronize(stream) == CU_OK);
        MUST(memcmp(page, o->r.image + ((uint64_t)(REGIONS - 1) * PAGES + n - 1) * PIECE, PIECE) == 0);
        rig_expect_device(&o->r);
    }
    MUST(early == ROUNDS);
    cu->StreamDestroy(stream);
    free(page);
    printf("reported early: ok\n");
}

/* ---- layers by eventfds, as SGLang waits for them ---- */

#define COUNTERS 2

static void hand_over(const char *path, int fds[COUNTERS][REGIONS])
{
    struct sockaddr_un { sa_family_t family; char path[108]; } a = { AF_UNIX, "" };
    int32_t header[4] = { 0, 1, REGIONS, COUNTERS };
    int s = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    char answer = 0;

    snprintf(a.path, sizeof(a.path), "%s", path);
    MUST(connect(s, (struct sockaddr *)&a, sizeof(a)) == 0);
    MUST(send(s, header, sizeof(header), 0) == sizeof(header));
    for (int32_t c = 0; c < COUNTERS; c++) {
        union { char buf[CMSG_SPACE(sizeof(int) * REGIONS)]; struct cmsghdr align; } control = { 0 };
        struct iovec v = { &c, sizeof(c) };
        struct msghdr m = { .msg_iov = &v, .msg_iovlen = 1, .msg_control = control.buf,
                            .msg_controllen = sizeof(control.buf) };
        struct cmsghdr *h = CMSG_FIRSTHDR(&m);
        h->cmsg_level = SOL_SOCKET;
        h->cmsg_type = SCM_RIGHTS;
        h->cmsg_len = CMSG_LEN(sizeof(int) * REGIONS);
        memcpy(CMSG_DATA(h), fds[c], sizeof(int) * REGIONS);
        MUST(sendmsg(s, &m, 0) == sizeof(c));
    }
    MUST(recv(s, &answer, 1, 0) == 1 && answer == 1);
    close(s);
}

static int wait_counted(int fd)
{
    struct pollfd p = { .fd = fd, .events = POLLIN };
    uint64_t one;

    MUST(poll(&p, 1, 20000) == 1);
    return read(fd, &one, sizeof(one)) == sizeof(one) ? 0 : errno;
}

/* Each layer is read as soon as its eventfd says so; then a load fails, and no layer says anything. */
static void test_counted(const char *mode, const char *sums)
{
    struct one o;
    int fds[COUNTERS][REGIONS];
    uint32_t from[100], to[100];
    char path[100], address[120], *page = malloc(PIECE);

    more[0] = "layerwise_notify_mode"; more[1] = mode;
    more[2] = "gpu_checksums"; more[3] = sums;
    open_one(&o, "4");
    for (int c = 0; c < COUNTERS; c++)
        for (uint32_t i = 0; i < REGIONS; i++)
            MUST((fds[c][i] = eventfd(0, EFD_SEMAPHORE | EFD_NONBLOCK)) >= 0);
    snprintf(path, sizeof(path), "/tmp/flexkv-gpu-layers-%d.sock", (int)getpid());
    snprintf(address, sizeof(address), "ipc://%s", path);
    check(flexkv_agent_serve_layers(o.agent, address));
    hand_over(path, fds);
    for (uint32_t i = 0; i < 100; i++) {
        from[i] = i;
        to[i] = 255 - i;
    }
    rig_fill(&o.r, 60);
    MUST(wait_for(&o.g, put(&o.g, 60, 100, from)).blocks_ok == 100);
    uint64_t op = 0;
    for (uint32_t round = 0; round < 6; round++) {
        flexkv_key keys[PAGES];
        flexkv_op_args a = { .struct_bytes = sizeof(a), .pages = to, .flags = FLEXKV_OP_LAYERWISE,
                             .counter = 1 + round % COUNTERS };
        flexkv_match_result m;
        keys_of(&o.g, 60, 100, keys);
        for (uint32_t i = 0; i < 100; i++)          /* what was loaded before goes */
            for (uint32_t k = 0; k < REGIONS && i >= 99; k++)
                MUST(cu->MemcpyHtoD(o.r.device + ((uint64_t)k * PAGES + to[i]) * PIECE, o.r.image + 7, PIECE) == CU_OK);
        check(flexkv_match(o.g.ns, keys, 100, &m));
        check(flexkv_get(o.g.node, m.lease, 0, 100, &a, &op));
        for (uint32_t k = 0; k < REGIONS; k++) {
            MUST(wait_counted(fds[round % COUNTERS][k]) == 0);
            MUST(cu->MemcpyDtoH(page, o.r.device + ((uint64_t)k * PAGES + to[99]) * PIECE, PIECE) == CU_OK);
            MUST(memcmp(page, o.r.image + ((uint64_t)k * PAGES + from[99]) * PIECE, PIECE) == 0);
        }
        MUST(wait_for(&o.g, op).blocks_ok == 100);
    }
    for (uint64_t generation = 1; generation < 16; generation++) {
        uint64_t ops[64];
        for (uint64_t i = 0; i < 64; i++)
            ops[i] = (((op >> 32) + generation) << 32) | i;
        check(flexkv_agent_revoke(o.agent, ops, 64, 1000));
    }
    flexkv_key keys[PAGES];
    flexkv_op_args a = { .struct_bytes = sizeof(a), .pages = to, .flags = FLEXKV_OP_LAYERWISE, .counter = 1 };
    flexkv_match_result m;
    keys_of(&o.g, 60, 100, keys);
    check(flexkv_match(o.g.ns, keys, 100, &m));
    check(flexkv_get(o.g.node, m.lease, 0, 100, &a, &op));
    MUST(wait_for(&o.g, op).status == -ECANCELED);
    for (int c = 0; c < COUNTERS; c++)
        for (uint32_t k = 0; k < REGIONS; k++) {
            MUST(wait_counted(fds[c][k]) == EIO);
            close(fds[c][k]);
        }
    close_one(&o);
    memset(more, 0, sizeof(more));
    free(page);
    printf("layers by eventfds, %s, checksums %s: ok\n", mode, sums);
}

/* After a revoke nothing is written, whatever the node goes on to say. */
static void test_revoke(struct one *o)
{
    uint32_t pages[PAGES];
    int early = 0;

    for (uint32_t i = 0; i < PAGES; i++)
        pages[i] = i;
    rig_fill(&o->r, 30);
    MUST(wait_for(&o->g, put(&o->g, 30, PAGES, pages)).status == 0);
    for (int i = 0; i < 20; i++) {
        uint64_t op = get(&o->g, 30, PAGES, pages, 0);
        uint64_t end = fk_clock_us() + (uint64_t)i * 500;
        while (fk_clock_us() < end)
            ;
        check(flexkv_agent_revoke(o->agent, &op, 1, 5000));
        rig_fill(&o->r, 40 + (uint64_t)i);
        flexkv_completion c = wait_for(&o->g, op);
        early += c.status != 0;
        rig_expect_device(&o->r);
    }
    MUST(early > 0);
    printf("revoke: ok (%d of 20 halfway)\n", early);
}

static int by_size(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* What a scheduler sees: its call, the ring, the agent, the copy, the report, the completion. */
static void show_latency(struct one *o, unsigned gap_us)
{
    double us[201];
    uint32_t page = 3;

    MUST(wait_for(&o->g, put(&o->g, 50 + gap_us, 1, &page)).status == 0);
    for (int i = 0; i < 201; i++) {
        usleep(gap_us);
        uint64_t start = fk_clock_us();
        MUST(wait_for(&o->g, get(&o->g, 50 + gap_us, 1, &page, 0)).status == 0);
        us[i] = (double)(fk_clock_us() - start);
    }
    qsort(us, 201, sizeof(*us), by_size);
    printf("get of one block (2 MiB, 32 pieces), one each %u us, call to completion: median %.0f us, 9th "
           "decile %.0f us\n", gap_us, us[100], us[180]);
}

static void show_start(const char *cpu)
{
    struct one o;
    uint32_t page = 1;
    uint64_t start = fk_clock_us();

    open_one(&o, cpu);
    MUST(wait_for(&o.g, put(&o.g, 1, 1, &page)).status == 0);
    printf("pool of %s GiB: start to first block stored %.2f s\n", cpu, (double)(fk_clock_us() - start) / 1e6);
    close_one(&o);
}

/* ---- several workers, a process and a GPU each ---- */

static void worker_process(struct gpu_node *g, uint32_t worker, int devices, int ready)
{
    struct rig r;

    prctl(PR_SET_PDEATHSIG, SIGKILL);
    rig_open_device((int)worker % devices);
    rig_open(&r, &shape);
    rig_fill(&r, 100 + worker);
    flexkv_agent *agent = agent_of(g, &r, worker);
    char *was = malloc(r.device_bytes), byte;
    memcpy(was, r.image, r.device_bytes);
    MUST(write(ready, "r", 1) == 1);
    /* The parent stores pages 0..99, asks for a wipe, loads them into 100..199, asks for a check. */
    MUST(read(ready, &byte, 1) == 1);
    rig_fill(&r, 200 + worker);
    MUST(write(ready, "w", 1) == 1);
    MUST(read(ready, &byte, 1) == 1);
    for (uint32_t i = 0; i < 100; i++)
        image_page(&r, was, i, 100 + i);
    rig_expect_device(&r);
    flexkv_agent_close(agent);
    MUST(write(ready, "k", 1) == 1);
    _exit(0);
}

static flexkv_stats stats_of(struct gpu_node *g)
{
    flexkv_stats st = { .struct_bytes = sizeof(st) };

    check(flexkv_node_stats(g->node, &st));
    return st;
}

/* The pages under other keys too, until chain 1 is on the SSD only. */
static void push_out(struct gpu_node *g, uint32_t *pages)
{
    for (uint32_t chain = 2; chain < 8; chain++) {
        for (int i = 0; i < 30000 && stats_of(g).ssd.stored_blocks < (chain - 1) * 100; i++)
            usleep(1000);
        MUST(wait_for(g, put(g, chain, 100, pages)).blocks_ok == 100);
    }
}

/* How fast the first 100 blocks are loaded, in GB/s; from_ssd: not by way of the cpu tier. */
static double load(struct gpu_node *g, uint32_t n, uint32_t *to, bool direct)
{
    uint64_t before = stats_of(g).ssd.bytes_read, start = fk_clock_us();

    MUST(wait_for(g, get(g, 1, 100, to, 0)).blocks_ok == 100);
    uint64_t us = fk_clock_us() - start;
    MUST(!direct || stats_of(g).ssd.bytes_read == before);
    return (double)n * 100 * REGIONS * PIECE / (double)us / 1e3;
}

/* For n workers: bytes. dir: from an SSD tier there, gds: by GPU direct storage, or what passes for it. */
static void test_workers(uint32_t n, int devices, const char *dir, const char *gds)
{
    struct gpu_node g;
    int fd[8][2];
    pid_t pid[8];
    uint32_t from[100], to[100];
    char byte;

    static int number;

    snprintf(g.address, sizeof(g.address), "ipc://@flexkv-gpu-%d-w%u-%d", (int)getpid(), n, number++);
    char own[200];

    memset(more, 0, sizeof(more));
    snprintf(own, sizeof(own), "%s/%d", dir ? dir : "", number);
    if (dir)
        memcpy(more, (const char *[]){ "ssd_cache_dir", own, "ssd_cache_gb", "4", "enable_gds", gds },
               6 * sizeof(*more));
    for (uint32_t i = 0; i < n; i++) {
        MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, fd[i]) == 0);
        pid[i] = fork();
        if (pid[i] == 0)
            worker_process(&g, i, devices, fd[i][1]);
    }
    open_node(&g, dir ? "1" : "4");
    open_space(&g, n);
    for (uint32_t i = 0; i < n; i++)
        MUST(read(fd[i][0], &byte, 1) == 1);
    for (uint32_t i = 0; i < 100; i++) {
        from[i] = i;
        to[i] = 100 + i;
    }
    MUST(wait_for(&g, put(&g, 1, 100, from)).blocks_ok == 100);
    if (dir)
        push_out(&g, from);
    for (uint32_t i = 0; i < n; i++)
        MUST(write(fd[i][0], "w", 1) == 1 && read(fd[i][0], &byte, 1) == 1);
    double rate = load(&g, n, to, dir && *gds == '1');
    for (uint32_t i = 0; i < n; i++) {
        MUST(write(fd[i][0], "c", 1) == 1 && read(fd[i][0], &byte, 1) == 1 && byte == 'k');
        int status;
        MUST(waitpid(pid[i], &status, 0) == pid[i] && status == 0);
        close(fd[i][0]);
        close(fd[i][1]);
    }
    flexkv_node_close(g.node);
    memset(more, 0, sizeof(more));
    printf("%u workers on %d GPUs%s: ok, %.1f GB/s together\n", n, devices,
           !dir ? "" : *gds == '1' ? ", from SSD by cuFile" : ", from SSD", rate);
}

/* Asked in another process: one that has used the driver can't fork workers that do. */
static void need_device(void)
{
    int status = 0;
    pid_t pid = fork();

    if (pid == 0) {
        rig_open_device(0);
        _exit(0);
    }
    MUST(waitpid(pid, &status, 0) == pid);
    if (status)
        exit(77);
}

int main(int argc, char **argv)
{
    const char *large = argc > 1 ? argv[1] : NULL;
    int devices = argc > 2 ? atoi(argv[2]) : 1;
    const char *ssd = argc > 3 ? argv[3] : NULL;
    struct one o;

    need_device();
    for (uint32_t n = 1; n <= 4; n *= 2)        /* they start before this process has a context */
        if (n == 1 || devices >= (int)n || n == 2)
            test_workers(n, devices, NULL, NULL);
    for (uint32_t n = 1; ssd && n <= 2; n *= 2) {
        test_workers(n, devices, ssd, "0");
        test_workers(n, devices, ssd, "1");
    }
    rig_open_device(0);
    open_one(&o, "4");
    test_bytes(&o, false);
    test_bytes(&o, true);
    test_early(&o);
    test_revoke(&o);
    show_latency(&o, 10);
    show_latency(&o, 500);
    show_latency(&o, 5000);
    close_one(&o);
    test_counted("hostfunc", "0");
    test_counted("polling", "0");
    test_counted("hostfunc", "1");
    if (large)
        show_start(large);
    printf("gpu_agent: passed\n");
    return 0;
}
