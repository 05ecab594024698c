/*
 * test_layers.c - layer counters (src/api/layers.c): the handshake, each eventfd told once and in order,
 * an engine that is kept from taking a failed load for a good one. Engine, agent and node in one
 * process.
 */
#include <fcntl.h>
#include <pthread.h>
#include <sys/eventfd.h>
#include <sys/select.h>
#include <unistd.h>

#include "api/layers.h"
#include "process_rig.h"

#define LAYERS 3u
#define COUNTERS 2u

/* As SGLang's connector has it: reads of semaphores that never block. */
struct engine { int fds[COUNTERS][LAYERS]; };

static void engine_open(struct engine *e)
{
    for (uint32_t c = 0; c < COUNTERS; c++)
        for (uint32_t i = 0; i < LAYERS; i++)
            assert_true((e->fds[c][i] = eventfd(0, EFD_SEMAPHORE | EFD_NONBLOCK)) >= 0);
}

static void engine_close(struct engine *e)
{
    for (uint32_t c = 0; c < COUNTERS; c++)
        for (uint32_t i = 0; i < LAYERS; i++)
            close(e->fds[c][i]);
}

static void send_with(int s, const void *data, size_t bytes, const int *fds, size_t n)
{
    union { char buf[CMSG_SPACE(sizeof(int) * 300)]; struct cmsghdr align; } control = { 0 };
    struct iovec v = { (void *)(uintptr_t)data, bytes };
    struct msghdr m = { .msg_iov = &v, .msg_iovlen = 1 };

    if (n) {
        m.msg_control = control.buf;
        m.msg_controllen = CMSG_SPACE(n * sizeof(int));
        struct cmsghdr *c = CMSG_FIRSTHDR(&m);
        c->cmsg_level = SOL_SOCKET;
        c->cmsg_type = SCM_RIGHTS;
        c->cmsg_len = CMSG_LEN(n * sizeof(int));
        memcpy(CMSG_DATA(c), fds, n * sizeof(int));
    }
    assert_int_equal(sendmsg(s, &m, MSG_NOSIGNAL), bytes);
}

/* What the agent answers; the connection is closed, as the engine does it. */
static int shake_hands(const char *path, const struct engine *e, int32_t layers, int32_t counters)
{
    struct sockaddr_un { sa_family_t family; char path[108]; } a = { AF_UNIX, "" };
    int32_t header[4] = { 0, 1, layers, counters };
    char answer = 2;
    int s = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

    snprintf(a.path, sizeof(a.path), "%s", path);
    assert_int_equal(connect(s, (struct sockaddr *)&a, sizeof(a)), 0);
    assert_int_equal(send(s, header, sizeof(header), MSG_NOSIGNAL), sizeof(header));
    for (int32_t c = 0; c < counters && layers == LAYERS && counters <= (int32_t)COUNTERS; c++)
        send_with(s, &c, sizeof(c), e->fds[c], LAYERS);
    assert_int_equal(recv(s, &answer, 1, 0), 1);
    close(s);
    return answer;
}

static uint64_t counted(int fd)
{
    uint64_t n = 0, one;

    while (read(fd, &one, sizeof(one)) == sizeof(one))
        n++;
    return n;
}

static void expect_counts(const struct engine *e, uint32_t counter, const uint64_t *want)
{
    for (uint32_t i = 0; i < LAYERS; i++)
        assert_int_equal(counted(e->fds[counter][i]), want[i]);
}

static const char *socket_path(char *path, char *address)
{
    sprintf(path, "/tmp/flexkv-layers-%d.sock", (int)getpid());
    sprintf(address, "ipc://%s", path);
    return address;
}

static void handshakes(void **state)
{
    char path[108], address[120], error[200] = "";
    struct fk_layers *l, *other;
    struct engine e;

    engine_open(&e);
    assert_int_equal(fk_layers_open(socket_path(path, address), LAYERS, 7, &l, error, sizeof(error)), 0);
    assert_int_equal(fk_layers_open(address, LAYERS, 7, &other, error, sizeof(error)), -EADDRINUSE);
    fk_layers_signal(l, 0, 0, LAYERS);                  /* nobody listens yet */
    assert_int_equal(shake_hands(path, &e, LAYERS + 1, COUNTERS), 0);
    assert_int_equal(shake_hands(path, &e, LAYERS, 0), 0);
    assert_int_equal(shake_hands(path, &e, LAYERS, 1000), 0);
    assert_int_equal(shake_hands(path, &e, LAYERS, COUNTERS), 1);
    assert_int_equal(shake_hands(path, &e, LAYERS, COUNTERS), 1);     /* the engine tries again */
    fk_layers_signal(l, 1, 0, 2);
    fk_layers_signal(l, 1, 2, 9);
    fk_layers_signal(l, COUNTERS, 0, 1);                /* there is no such counter */
    expect_counts(&e, 0, (uint64_t[]){ 0, 0, 0 });
    expect_counts(&e, 1, (uint64_t[]){ 1, 1, 1 });
    fk_layers_close(l);
    assert_int_equal(access(path, F_OK), -1);
    engine_close(&e);
}

/* Over a pair of sockets: what is wrong with a counter's message. */
static int bad_counter(int32_t id, const int *fds, size_t n)
{
    struct fk_layers *l;
    char path[108], address[120], error[200] = "", answer = 2;
    int32_t header[4] = { 0, 1, LAYERS, COUNTERS };
    int sv[2];

    assert_int_equal(fk_layers_open(socket_path(path, address), LAYERS, 7, &l, error, sizeof(error)), 0);
    assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, sv), 0);
    send_with(sv[0], header, sizeof(header), NULL, 0);
    send_with(sv[0], &id, sizeof(id), fds, n);
    shutdown(sv[0], SHUT_WR);
    int rc = fk_layers_receive(l, sv[1]);
    assert_int_equal(recv(sv[0], &answer, 1, 0), 1);
    assert_int_equal(answer, 0);
    close(sv[0]);
    close(sv[1]);
    fk_layers_close(l);
    return rc;
}

static void bad_counters(void **state)
{
    struct engine e;
    int pipes[2], other[LAYERS];

    engine_open(&e);
    assert_int_equal(pipe(pipes), 0);
    memcpy(other, e.fds[0], sizeof(other));
    other[1] = pipes[1];
    assert_int_equal(bad_counter(-1, e.fds[0], LAYERS), -EPROTO);
    assert_int_equal(bad_counter(COUNTERS, e.fds[0], LAYERS), -EPROTO);
    assert_int_equal(bad_counter(0, e.fds[0], LAYERS - 1), -EPROTO);
    assert_int_equal(bad_counter(0, e.fds[0], 0), -EPROTO);
    assert_int_equal(bad_counter(0, other, LAYERS), -EPROTO);
    assert_int_equal(bad_counter(0, e.fds[0], LAYERS), -ECONNRESET);    /* the second one is missing */
    close(pipes[0]);
    close(pipes[1]);
    engine_close(&e);
}

/* ---- with a node ---- */

/* Agent and node of one process see the same memory at two addresses; ThreadSanitizer can't know that what
 * they say to each other there orders what they do. */
static void need_no_tsan(void)
{
#ifdef __SANITIZE_THREAD__
    skip();
#endif
}

struct rig {
    char address[108], path[108], sockets[120];
    unsigned char pages[LAYERS][PAGES][REGION_BYTES];
    flexkv_node *node;
    flexkv_space *space;
    flexkv_namespace *ns;
    flexkv_agent *agent;
    struct engine e;
};

static void rig_open(struct rig *r)
{
    flexkv_region regions[LAYERS];
    uint32_t layers[LAYERS] = { 1, 1, 1 };
    flexkv_config *config = small_config("1M", NULL);
    flexkv_space_desc d = space_desc("engine", 1, 1);

    memset(r, 0, sizeof(*r));
    assert_int_equal(flexkv_node_open(config, &r->node), 0);
    flexkv_config_destroy(config);
    assert_int_equal(flexkv_node_listen(r->node, fresh_address(r->address)), 0);
    for (uint32_t i = 0; i < LAYERS; i++)
        regions[i] = (flexkv_region){ r->pages[i], REGION_BYTES, REGION_BYTES, PAGES };
    flexkv_agent_desc a = { .struct_bytes = sizeof(a), .address = r->address, .instance = "engine",
                            .replicas = 1, .layer_regions = layers, .n_layers = LAYERS };
    assert_int_equal(flexkv_agent_create(&a, regions, LAYERS, &r->agent), 0);
    engine_open(&r->e);
    assert_int_equal(flexkv_agent_serve_layers(r->agent, socket_path(r->path, r->sockets)), 0);
    assert_int_equal(flexkv_agent_serve_layers(r->agent, r->sockets), -EBUSY);
    assert_int_equal(shake_hands(r->path, &r->e, LAYERS, COUNTERS), 1);
    d.wait_ms = 5000;
    assert_int_equal(flexkv_space_open(r->node, &d, &r->space), 0);
    assert_int_equal(flexkv_namespace_open(r->space, NULL, 0, &r->ns), 0);
}

static void rig_close(struct rig *r)
{
    flexkv_agent_close(r->agent);
    flexkv_node_close(r->node);
    engine_close(&r->e);
}

static int load(struct rig *r, uint32_t n, uint32_t first_page, uint32_t counter, uint64_t *op)
{
    uint32_t pages[CHAIN_MAX];
    uint64_t lease;
    flexkv_op_args a = { .struct_bytes = sizeof(a), .pages = pages, .flags = FLEXKV_OP_LAYERWISE,
                         .counter = counter };

    for (uint32_t i = 0; i < n; i++)
        pages[i] = first_page + i;
    assert_int_equal(match_chain(r->ns, 3, n, &lease), n);
    return flexkv_get(r->node, lease, 0, n, &a, op);
}

static void fill(struct rig *r, uint32_t n)
{
    for (uint32_t i = 0; i < LAYERS; i++)
        for (uint32_t p = 0; p < n; p++)
            memset(r->pages[i][p], byte_of(3, p, 0, i), REGION_BYTES);
    assert_int_equal(wait_op(r->node, put_chain(r->ns, 3, n, 0), 5000).status, 0);
}

static bool in_place(const struct rig *r, uint32_t layer, uint32_t n, uint32_t first_page)
{
    for (uint32_t p = 0; p < n; p++)
        for (uint32_t b = 0; b < REGION_BYTES; b++)
            if (r->pages[layer][first_page + p][b] != byte_of(3, p, 0, layer))
                return false;
    return true;
}

/* The engine's wait; 0 or errno. */
static int engine_wait(const struct engine *e, uint32_t counter, uint32_t layer)
{
    int fd = e->fds[counter][layer];
    struct timeval limit = { 10, 0 };
    uint64_t one;
    fd_set set;

    FD_ZERO(&set);
    FD_SET(fd, &set);
    assert_int_equal(select(fd + 1, &set, NULL, NULL, &limit), 1);
    return read(fd, &one, sizeof(one)) == sizeof(one) ? 0 : errno;
}

static void layers_are_counted(void **state)
{
    static struct rig r;
    uint64_t op;

    need_no_tsan();
    rig_open(&r);
    fill(&r, 20);
    for (uint32_t round = 0; round < 4; round++) {
        uint32_t counter = round % COUNTERS;
        memset(r.pages, 0xee, sizeof(r.pages));
        assert_int_equal(load(&r, 20, 30, 1 + counter, &op), 0);
        for (uint32_t layer = 0; layer < LAYERS; layer++) {
            assert_int_equal(engine_wait(&r.e, counter, layer), 0);
            assert_true(in_place(&r, layer, 20, 30));
        }
        assert_int_equal(wait_op(r.node, op, 5000).blocks_ok, 20);
        expect_counts(&r.e, 0, (uint64_t[]){ 0, 0, 0 });    /* once, and no other counter */
        expect_counts(&r.e, 1, (uint64_t[]){ 0, 0, 0 });
    }
    assert_int_equal(load(&r, 20, 30, 0, &op), 0);          /* nobody waits for this one */
    assert_int_equal(wait_op(r.node, op, 5000).status, 0);
    expect_counts(&r.e, 0, (uint64_t[]){ 0, 0, 0 });
    rig_close(&r);
}

struct waiter { const struct engine *e; uint32_t counter; int rc; };

static void *wait_in_thread(void *arg)
{
    struct waiter *w = arg;

    w->rc = engine_wait(w->e, w->counter, 1);
    return NULL;
}

/* Makes the next loads fail: whatever number they get, it is revoked already. */
static void revoke_all(struct rig *r, uint64_t op)
{
    for (uint64_t generation = 1; generation < 16; generation++) {
        uint64_t ops[64];
        for (uint64_t i = 0; i < 64; i++)
            ops[i] = (((op >> 32) + generation) << 32) | i;
        assert_int_equal(flexkv_agent_revoke(r->agent, ops, 64, 1000), 0);
    }
}

/* The load's own counter and, as the engine may wait for another one's, all of them: who waits is let
 * go, and none of them reads a layer. */
static void a_failed_load_is_not_taken_for_done(void **state)
{
    static struct rig r;
    uint64_t op;
    pthread_t t[2];

    need_no_tsan();
    rig_open(&r);
    fill(&r, 20);
    struct waiter w[2] = { { &r.e, 0, 0 }, { &r.e, 1, 0 } };
    assert_int_equal(load(&r, 20, 30, 0, &op), 0);
    assert_int_equal(wait_op(r.node, op, 5000).status, 0);
    revoke_all(&r, op);
    for (int i = 0; i < 2; i++)
        assert_int_equal(pthread_create(&t[i], NULL, wait_in_thread, &w[i]), 0);
    usleep(20000);                      /* one may wait already, or come later */
    assert_int_equal(load(&r, 20, 40, 1, &op), 0);
    assert_int_equal(wait_op(r.node, op, 5000).status, -ECANCELED);
    for (int i = 0; i < 2; i++) {
        pthread_join(t[i], NULL);
        assert_int_equal(w[i].rc, EIO);
    }
    for (uint32_t c = 0; c < COUNTERS; c++)
        for (uint32_t layer = 0; layer < LAYERS; layer++)
            assert_int_equal(engine_wait(&r.e, c, layer), EIO);
    rig_close(&r);
}

static void bad_arguments(void **state)
{
    static struct rig r;
    uint64_t op;
    uint32_t page = 0;
    flexkv_op_args a = { .struct_bytes = sizeof(a), .pages = &page, .counter = 1 };

    rig_open(&r);
    assert_int_equal(flexkv_get(r.node, 1, 0, 1, &a, &op), -EINVAL);
    assert_non_null(strstr(flexkv_last_error(), "LAYERWISE"));
    flexkv_region region = { r.pages, REGION_BYTES, REGION_BYTES, PAGES };
    flexkv_agent_desc d = { .struct_bytes = sizeof(d), .address = r.address, .instance = "x", .replicas = 1 };
    flexkv_agent *agent;
    assert_int_equal(flexkv_agent_create(&d, &region, 1, &agent), 0);
    assert_int_equal(flexkv_agent_serve_layers(agent, "ipc://@x"), -EINVAL);
    flexkv_agent_close(agent);
    rig_close(&r);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(handshakes),
        cmocka_unit_test(bad_counters),
        cmocka_unit_test(layers_are_counted),
        cmocka_unit_test(a_failed_load_is_not_taken_for_done),
        cmocka_unit_test(bad_arguments),
    };

    fk_log_set_level(FK_LOG_CRITICAL);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
