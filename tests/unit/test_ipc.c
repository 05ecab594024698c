/* test_ipc.c - src/ipc/: rings between two threads, full and empty and mad; messages in pieces, with
 * descriptors; deadlines; addresses. */
#include <fcntl.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/socket.h>
#include <sys/stat.h>

#include <cmocka.h>

#include "base/clock.h"
#include "base/util.h"
#include "ipc/ring.h"
#include "ipc/socket.h"

#define CAPACITY 4096u
#define RECORDS 200000u

static struct fk_ring_shared *new_shared(void)
{
    struct fk_ring_shared *s = aligned_alloc(64, fk_round_up(fk_ring_bytes(CAPACITY), 64));

    assert_non_null(s);
    memset(s, 0, fk_ring_bytes(CAPACITY));
    return s;
}

static uint32_t size_of(uint32_t i)
{
    return 4 + i * 2654435761u % 600 / 4 * 4;
}

static void *write_all(void *arg)
{
    struct fk_ring w;

    fk_ring_init(&w, arg, CAPACITY);
    for (uint32_t i = 0; i < RECORDS;) {
        uint32_t *p = fk_ring_reserve(&w, 1 + i % 7, size_of(i));
        if (!p)
            continue;
        for (uint32_t k = 0; k < size_of(i) / 4; k++)
            p[k] = i + k;
        fk_ring_commit(&w);
        i++;
    }
    return NULL;
}

static void records_come_in_order(void **state)
{
    struct fk_ring_shared *s = new_shared();
    struct fk_ring r;
    pthread_t writer;
    const void *payload;
    uint32_t type, bytes;
    bool good = true;

    fk_ring_init(&r, s, CAPACITY);
    assert_int_equal(pthread_create(&writer, NULL, write_all, s), 0);
    for (uint32_t i = 0; i < RECORDS && good;) {
        int rc = fk_ring_next(&r, &type, &payload, &bytes);
        if (rc == 0)
            continue;
        good = rc == 1 && type == 1 + i % 7 && bytes >= size_of(i) && bytes < size_of(i) + 8;
        for (uint32_t k = 0; good && k < size_of(i) / 4; k++)
            good = ((const uint32_t *)payload)[k] == i + k;
        fk_ring_pop(&r);
        i++;
    }
    assert_true(good);
    pthread_join(writer, NULL);
    assert_int_equal(fk_ring_next(&r, &type, &payload, &bytes), 0);
    free(s);
}

static void a_full_ring_takes_no_more(void **state)
{
    struct fk_ring_shared *s = new_shared();
    struct fk_ring w, r;
    const void *payload;
    uint32_t type, bytes, n = 0;

    fk_ring_init(&w, s, CAPACITY);
    fk_ring_init(&r, s, CAPACITY);
    assert_null(fk_ring_reserve(&w, 1, CAPACITY / 2));
    while (fk_ring_reserve(&w, 1, 248)) {
        fk_ring_commit(&w);
        n++;
    }
    assert_int_equal(n, CAPACITY / 256);
    assert_int_equal(fk_ring_next(&r, &type, &payload, &bytes), 1);
    assert_null(fk_ring_reserve(&w, 1, 248));       /* looked at is not gone yet */
    fk_ring_pop(&r);
    assert_non_null(fk_ring_reserve(&w, 1, 248));
    free(s);
}

static void nonsense_is_refused(void **state)
{
    struct fk_ring_shared *s = new_shared();
    struct fk_ring r;
    const void *payload;
    uint32_t type, bytes;
    const uint32_t bad[] = { 0, 4, 12, 9, CAPACITY + 8, UINT32_MAX };

    for (size_t i = 0; i < fk_array_size(bad); i++) {
        fk_ring_init(&r, s, CAPACITY);
        atomic_store(&s->head, CAPACITY);
        memcpy(s->data, &bad[i], sizeof(bad[i]));
        assert_int_equal(fk_ring_next(&r, &type, &payload, &bytes), -EPROTO);
    }
    atomic_store(&s->head, CAPACITY + 8);
    assert_int_equal(fk_ring_next(&r, &type, &payload, &bytes), -EPROTO);
    atomic_store(&s->head, (uint64_t)-8);
    assert_int_equal(fk_ring_next(&r, &type, &payload, &bytes), -EPROTO);
    free(s);
}

/* ---- messages ---- */

static int read_message(int fd, struct fk_msg_reader *in, struct fk_msg *m, const uint8_t **payload)
{
    int rc;

    while ((rc = fk_msg_next(in, m, payload)) == 0) {
        rc = fk_msg_read(fd, in);
        if (rc == -EAGAIN)
            rc = fk_fd_wait(fd, false, fk_clock_us() + 2000000);
        if (rc)
            return rc;
    }
    return rc;
}

static void *send_many(void *arg)
{
    int fd = *(int *)arg;
    uint8_t *body = malloc(1 << 20);

    for (uint32_t i = 0; i < 200; i++) {
        uint32_t n = i * 7919 % 100000;
        memset(body, (int)i, n);
        struct iovec v[2] = { { body, n / 3 }, { body + n / 3, n - n / 3 } };
        int fds[1] = { STDERR_FILENO };
        if (fk_msg_send(fd, i, v, 2, fds, i % 50 == 3, fk_clock_us() + 5000000))
            abort();
    }
    free(body);
    return NULL;
}

static void messages_come_whole(void **state)
{
    int sv[2], fd, n_fds = 0;
    struct fk_msg_reader in;
    struct fk_msg m;
    const uint8_t *p;
    pthread_t sender;

    assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM, 0, sv), 0);
    fk_msg_reader_init(&in, 1 << 20);
    assert_int_equal(pthread_create(&sender, NULL, send_many, &sv[0]), 0);
    for (uint32_t i = 0; i < 200; i++) {
        assert_int_equal(read_message(sv[1], &in, &m, &p), 1);
        assert_int_equal(m.type, i);
        assert_int_equal(m.bytes, i * 7919 % 100000);
        assert_int_equal((uintptr_t)p % 8, 0);
        for (uint32_t k = 0; k < m.bytes; k++)
            if (p[k] != (uint8_t)i)
                fail();
        while ((fd = fk_msg_take_fd(&in)) >= 0) {
            assert_true(fcntl(fd, F_GETFD) & FD_CLOEXEC);
            close(fd);
            n_fds++;
        }
    }
    pthread_join(sender, NULL);
    assert_int_equal(n_fds, 4);
    close(sv[0]);
    assert_int_equal(fk_msg_read(sv[1], &in), -ECONNRESET);
    close(sv[1]);
    fk_msg_reader_free(&in);
}

static void a_long_message_is_refused(void **state)
{
    int sv[2];
    struct fk_msg_reader in;
    struct fk_msg m;
    const uint8_t *p;
    uint8_t body[128] = { 0 };
    struct iovec v = { body, sizeof(body) };

    assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM, 0, sv), 0);
    fk_msg_reader_init(&in, 64);
    assert_int_equal(fk_msg_send(sv[0], 1, &v, 1, NULL, 0, fk_clock_us() + 1000000), 0);
    assert_int_equal(read_message(sv[1], &in, &m, &p), -EPROTO);
    fk_msg_reader_free(&in);
    close(sv[0]);
    close(sv[1]);
}

/* A reader that reads nothing costs the deadline, no more. */
static void sending_has_a_deadline(void **state)
{
    int sv[2];
    size_t n = 64 << 20;
    void *body = calloc(1, n);
    struct iovec v = { body, n };

    assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM, 0, sv), 0);
    uint64_t start = fk_clock_us();
    assert_int_equal(fk_msg_send(sv[0], 1, &v, 1, NULL, 0, start + 100000), -ETIMEDOUT);
    assert_in_range(fk_clock_us() - start, 100000, 3000000);
    close(sv[1]);
    assert_int_equal(fk_msg_send(sv[0], 1, &v, 1, NULL, 0, fk_clock_us() + 100000), -EPIPE);
    close(sv[0]);
    free(body);
}

/* ---- addresses ---- */

static void a_dead_process_socket_is_replaced(void **state)
{
    char path[] = "/tmp/flexkv-ipc-XXXXXX", address[80], error[300];
    struct fk_listener l;
    struct stat st;
    int fd;

    assert_non_null(mkdtemp(path));
    sprintf(address, "ipc://%s/sock", path);
    assert_int_equal(fk_listener_open(address, &l, error, sizeof(error)), 0);
    assert_int_equal(stat(address + 6, &st), 0);
    assert_int_equal(st.st_mode & 0777, 0600);
    l.path[0] = '\0';                       /* as if killed: the file stays */
    fk_listener_close(&l);
    assert_int_equal(access(address + 6, F_OK), 0);
    assert_int_equal(fk_socket_connect(address, &fd, error, sizeof(error)), -ECONNREFUSED);
    assert_int_equal(fk_listener_open(address, &l, error, sizeof(error)), 0);
    assert_int_equal(fk_socket_connect(address, &fd, error, sizeof(error)), 0);
    close(fd);
    fk_listener_close(&l);
    assert_int_equal(access(address + 6, F_OK), -1);

    fd = open(address + 6, O_CREAT | O_WRONLY, 0600);       /* somebody's file stays */
    close(fd);
    assert_int_equal(fk_listener_open(address, &l, error, sizeof(error)), -EEXIST);
    assert_non_null(strstr(error, "no socket"));
    unlink(address + 6);
    rmdir(path);
    assert_int_equal(fk_listener_open(address, &l, error, sizeof(error)), -ENOENT);
    memset(address, 'x', sizeof(address));
    char longer[300];
    snprintf(longer, sizeof(longer), "ipc:///tmp/%0150d", 1);
    assert_int_equal(fk_listener_open(longer, &l, error, sizeof(error)), -EINVAL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(records_come_in_order),
        cmocka_unit_test(a_full_ring_takes_no_more),
        cmocka_unit_test(nonsense_is_refused),
        cmocka_unit_test(messages_come_whole),
        cmocka_unit_test(a_long_message_is_refused),
        cmocka_unit_test(sending_has_a_deadline),
        cmocka_unit_test(a_dead_process_socket_is_replaced),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
