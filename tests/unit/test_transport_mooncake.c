/*
 * test_transport_mooncake.c - src/transport/mooncake*.c between transports of this process and of others: slots
 * and their headers, what is refused, garbage, peers that die or stand still; the descriptor; the configuration file.
 * tests/transport/test_mooncake.py does it with Mooncake's own engine. FLEXKV_TEST_MOONCAKE_LIBRARY names a libtransfer_engine.so
 * through which the readers read.
 */
#include "transport_rig.h"

#include "transport/mooncake_config.h"
#include "transport/mooncake_wire.h"
#include "transport/stream.h"

static const char *kind = "mooncake";
static const struct fk_window window = { .space = SPACE, .ns = NS, .slot_bytes = SLOT_BYTES, .slots = SLOTS };

static struct fk_transport *open_owner(struct owner *o)
{
    struct fk_transport_params p = rig_params(kind, o, "127.0.0.1:0");
    struct fk_transport *t = rig_open(&p);

    assert_int_equal(fk_transport_share(t, &window), 0);
    return t;
}

static void test_bytes(void **state)
{
    struct owner o = { 0 };
    owner_fill(&o, NULL);
    struct fk_transport_params q = rig_params(kind, NULL, NULL);
    struct fk_transport *owner = open_owner(&o), *reader = rig_open(&q);
    struct flow f = { .t = reader, .buffers = malloc((size_t)SLOTS * SLOT_BYTES) };

    for (int i = 0; i < 4; i++) {
        memset(f.buffers, 0, (size_t)SLOTS * SLOT_BYTES);
        read_all(&f, fk_transport_address(owner));
    }
    fk_transport_close(reader);
    fk_transport_close(owner);
    assert_int_equal(o.grants, 2 * 4 * SLOTS);          /* each slot, and its header */
    assert_int_equal(o.releases, o.grants);
    free(f.buffers);
    owner_free(&o);
}

/* Mooncake's engine as a library gives no reasons. */
#define REFUSED (getenv("FLEXKV_TEST_MOONCAKE_LIBRARY") ? -EIO : -ENOENT)

static void test_what_is_not_granted(void **state)
{
    struct owner o = { .change_after = 3 };
    owner_fill(&o, NULL);
    struct fk_transport_params q = rig_params(kind, NULL, NULL);
    struct fk_transport *owner = open_owner(&o), *reader = rig_open(&q);
    unsigned char *b = malloc(SLOT_BYTES);
    uint32_t peer;
    struct fk_read r = rig_read(3, SLOT_BYTES, b, 1), bad;

    assert_int_equal(fk_transport_peer(reader, fk_transport_address(owner), &peer), 0);
    assert_int_equal(read_one(reader, peer, r, NULL), 0);
    assert_int_not_equal(read_one(reader, peer, r, NULL), 0);       /* changes in the middle: the owner hangs up */
    assert_int_equal(read_one(reader, peer, r, NULL), -ENOENT);     /* has changed */
    r = rig_read(4, SLOT_BYTES, b, 1);
    bad = r, bad.block.generation += 2;
    assert_int_equal(read_one(reader, peer, bad, NULL), -ENOENT);
    bad = r, bad.block.epoch++;
    assert_int_equal(read_one(reader, peer, bad, NULL), -ENOENT);
    bad = r, bad.block.key.lo++;
    assert_int_equal(read_one(reader, peer, bad, NULL), -ENOENT);
    bad = r, bad.block.space++;
    assert_int_equal(read_one(reader, peer, bad, NULL), -ENOENT);
    bad = r, bad.block.slot = SLOTS;
    assert_int_equal(read_one(reader, peer, bad, NULL), -ENOENT);
    bad = r, bad.flags = FK_READ_RAW, bad.address = 4096;           /* no such address there */
    assert_int_equal(read_one(reader, peer, bad, NULL), REFUSED);
    bad.address = fk_moon_slot_address(0, &window, SLOTS - 1) + 1;  /* beyond the end */
    assert_int_equal(read_one(reader, peer, bad, NULL), REFUSED);
    bad.address = fk_moon_slot_address(0, &window, 5) + 100;        /* of two slots */
    assert_int_equal(read_one(reader, peer, bad, NULL), 0);
    for (uint32_t i = 0; i < SLOT_BYTES; i++)
        assert_int_equal(b[i], i < SLOT_BYTES - 100 ? owner_byte(5, i + 100) : owner_byte(6, i - (SLOT_BYTES - 100)));
    assert_int_equal(read_one(reader, peer, r, NULL), 0);
    o.wrong_checksum = true;
    assert_int_equal(read_one(reader, peer, r, NULL), -EBADMSG);
    fk_transport_close(reader);
    fk_transport_close(owner);
    assert_int_equal(o.grants, o.releases);
    free(b);
    owner_free(&o);
}

/* What is named as Mooncake's library, and what is not passed on to it. */
static void test_library(void **state)
{
    struct fk_transport_params p = rig_params(kind, NULL, NULL);
    static const struct { const char *path, *metadata, *protocol, *said; int rc; } bad[] = {
        { "/no/such/libtransfer_engine.so", NULL, NULL, "mooncake_library", -ENOSYS },
        { "libm.so.6", NULL, NULL, "has no createTransferEngine", -ENOSYS },
        { "libm.so.6", NULL, "pigeons", "mooncake_protocol", -EINVAL },
        { "libm.so.6", "http://127.0.0.1:1/metadata", NULL, "mooncake_metadata_server", -ENOTSUP },
        { NULL, "redis://127.0.0.1:6379", NULL, "mooncake_metadata_server", -EINVAL },
        { "libm.so.6", "redis://127.0.0.1:6379", NULL, "mooncake_metadata_server", -EINVAL },
        { NULL, NULL, "rdma", "mooncake_library", -ENOTSUP },
    };
    struct fk_transport *t;
    char error[512];

    if (getenv("FLEXKV_TEST_MOONCAKE_LIBRARY"))         /* loaded once in a process */
        skip();
    for (size_t i = 0; i < fk_array_size(bad); i++) {
        p.mooncake_library = bad[i].path;
        p.mooncake_metadata = bad[i].metadata;
        p.mooncake_protocol = bad[i].protocol;
        assert_int_equal(fk_transport_open(&p, &t, error, sizeof(error)), bad[i].rc);
        assert_non_null(strstr(error, bad[i].said));
    }
}

static void test_garbage(void **state)
{
    struct owner o = { 0 };
    owner_fill(&o, NULL);
    struct fk_transport_params q = rig_params(kind, NULL, NULL);
    struct fk_transport *owner = open_owner(&o), *reader = rig_open(&q);
    struct flow f = { .t = reader, .buffers = malloc((size_t)SLOTS * SLOT_BYTES) };
    struct sockaddr_storage a;
    socklen_t len;
    uint64_t rng = 9;
    unsigned char junk[600];

    assert_int_equal(fk_tcp_parse(fk_transport_address(owner), &a, &len), 0);
    for (int i = 0; i < 20; i++) {
        int fd = socket(a.ss_family, SOCK_STREAM, 0);
        char end[1024];
        assert_int_equal(connect(fd, (struct sockaddr *)&a, len), 0);
        for (size_t k = 0; k < sizeof(junk); k++)
            junk[k] = (unsigned char)fk_rng_next(&rng);
        if (i % 2)
            memcpy(junk, "\x05\0\0\0\0\0\0\0\4", 9);                /* a notification */
        assert_true(send(fd, junk, sizeof(junk), MSG_NOSIGNAL) > 0);
        struct pollfd w = { .fd = fd, .events = POLLIN };
        assert_int_equal(poll(&w, 1, 5000), 1);
        assert_true(recv(fd, end, sizeof(end), 0) <= 0);
        close(fd);
    }
    read_all(&f, fk_transport_address(owner));
    fk_transport_close(reader);
    fk_transport_close(owner);
    free(f.buffers);
    owner_free(&o);
}

static void test_killed(void **state) { for (int i = 0; i < 4; i++) ill_peer(kind, SIGKILL, false); }
static void test_stopped(void **state) { for (int i = 0; i < 2; i++) ill_peer(kind, SIGSTOP, false); }
static void test_stopped_before(void **state) { ill_peer(kind, SIGSTOP, true); }
static void test_reader_gone(void **state) { reader_gone(kind); }

static void test_descriptor(void **state)
{
    static const char foreign[] =
        "{\"buffers\":[{\"addr\":139987686252560,\"length\":1048576,\"name\":\"127.0.0.1:15500\"}],\"name\":\"n\","
        "\"protocol\":\"tcp\",\"tcp_data_port\":15931,\"tcp_proto_version\":2,\"timestamp\":\"x\"}";
    struct fk_window w[2] = { window, window };
    struct fk_moon_segment s;
    w[1].tier = 1;
    char *text = fk_moon_describe("name", "10.0.0.1", 99, w, 2);

    assert_int_equal(fk_moon_parse_segment(text, strlen(text), &s), 0);
    assert_int_equal(s.n_windows, 2);
    assert_string_equal(s.host, "10.0.0.1");
    assert_int_equal(s.port, 99);
    assert_memory_equal(&s.windows[1].w, &w[1], sizeof(w[1]));
    assert_int_equal(s.windows[1].slots_at, fk_moon_slot_address(1, &w[1], 0));
    assert_int_equal(s.windows[1].headers_at, fk_moon_header_address(1, 0));
    free(text);
    assert_int_equal(fk_moon_parse_segment(foreign, strlen(foreign), &s), 0);
    assert_int_equal(s.n_windows, 0);
    assert_string_equal(s.host, "");
    assert_int_equal(fk_moon_parse_segment("{}", 2, &s), -EPROTO);
    assert_int_equal(fk_moon_parse_segment("[1", 2, &s), -EPROTO);
}

static void test_places(void **state)
{
    uint32_t at, slot, offset;
    bool header;
    uint64_t base = fk_moon_slot_address(0, &window, 0), size = (uint64_t)SLOTS * SLOT_BYTES;

    assert_int_equal(fk_moon_locate(&window, 1, base + SLOT_BYTES + 5, 10, &at, &slot, &offset, &header), 0);
    assert_int_equal(slot, 1);
    assert_int_equal(offset, 5);
    assert_false(header);
    assert_int_equal(fk_moon_locate(&window, 1, base, size, &at, &slot, &offset, &header), 0);
    assert_int_equal(fk_moon_locate(&window, 1, base, size + 1, &at, &slot, &offset, &header), -EACCES);
    assert_int_equal(fk_moon_locate(&window, 1, base + 1, UINT64_MAX, &at, &slot, &offset, &header), -EACCES);
    assert_int_equal(fk_moon_locate(&window, 1, base - 1, 1, &at, &slot, &offset, &header), -EACCES);
    assert_int_equal(fk_moon_locate(&window, 1, base, 0, &at, &slot, &offset, &header), -EACCES);
    assert_int_equal(fk_moon_locate(&window, 1, fk_moon_slot_address(1, &window, 0), 1, &at, &slot, &offset, &header),
                     -EACCES);
    base = fk_moon_header_address(0, 7);
    assert_int_equal(fk_moon_locate(&window, 1, base, FK_MOON_HEADER, &at, &slot, &offset, &header), 0);
    assert_true(header && slot == 7);
    assert_int_equal(fk_moon_locate(&window, 1, base + 8, FK_MOON_HEADER, &at, &slot, &offset, &header), -EACCES);
    assert_int_equal(fk_moon_locate(&window, 1, base, 2 * FK_MOON_HEADER, &at, &slot, &offset, &header), -EACCES);
    assert_int_equal(fk_moon_locate(&window, 1, fk_moon_header_address(0, SLOTS), FK_MOON_HEADER, &at, &slot, &offset,
                                    &header), -EACCES);
}

static int load(const char *text, struct fk_mooncake_config *c, char *error)
{
    char path[] = "/tmp/flexkv-mooncake-XXXXXX";
    int fd = mkstemp(path);

    assert_true(fd >= 0 && write(fd, text, strlen(text)) == (ssize_t)strlen(text));
    close(fd);
    int rc = fk_mooncake_config_load(path, c, error, 256);
    unlink(path);
    return rc;
}

static void test_config(void **state)
{
    struct fk_mooncake_config c;
    char e[256];

    assert_int_equal(load("{\"engine_ip\": \"10.0.0.1\", \"engine_port\": 5555, \"metadata_backend\": \"http\", "
                          "\"metadata_server\": \"http://10.0.0.2:8080/metadata\", \"protocol\": \"tcp\"}", &c, e), 0);
    assert_string_equal(c.listen, "10.0.0.1:5555");
    assert_string_equal(c.metadata, "http://10.0.0.2:8080/metadata");
    assert_int_equal(load("{\"engine_ip\": \"10.0.0.1\", \"engine_port\": 5555, \"metadata_server\": "
                          "\"P2PHANDSHAKE\"}", &c, e), 0);
    assert_string_equal(c.metadata, "P2PHANDSHAKE");
    assert_int_equal(load("{\"engine_ip\": \"10.0.0.1\", \"metadata_backend\": \"redis\", \"metadata_server\": "
                          "\"redis://10.0.0.2:6379\"}", &c, e), 0);
    assert_true(c.redis);
    assert_string_equal(c.metadata, "P2PHANDSHAKE");
    assert_int_equal(load("{\"engine_ip\": \"10.0.0.1\", \"metadata_backend\": \"etcd\", \"metadata_server\": "
                          "\"etcd://10.0.0.2:2379\"}", &c, e), -ENOTSUP);
    assert_non_null(strstr(e, "etcd"));
    assert_int_equal(load("{\"engine_ip\": \"10.0.0.1\", \"protocol\": \"rdma\"}", &c, e), -ENOTSUP);
    assert_int_equal(load("{\"engine_port\": 70000, \"engine_ip\": \"1.2.3.4\"}", &c, e), -EINVAL);
    assert_int_equal(load("{", &c, e), -EINVAL);
    assert_int_equal(load("{\"engine_ip\": 5}", &c, e), -EINVAL);
    assert_int_equal(fk_mooncake_config_load("/nowhere", &c, e, sizeof(e)), -EINVAL);
}

static void test_http(void **state)
{
    static const char *const cut[] = { "", "HTTP/1.1 200 OK\r\n", "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nabc" };
    static const char *const bad[] = { "HTTP/1.1 500 no\r\nContent-Length: 0\r\n\r\n", "nonsense, long enough\r\n\r\n",
                                       "HTTP/1.1 200 OK\r\ncontent-length: x\r\n\r\n",
                                       "HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999\r\n\r\n" };
    const char *body;
    size_t n;
    char host[FK_TRANSPORT_ADDRESS_MAX], path[128], text[512];
#define HTTP(s, ended) fk_moon_http((const uint8_t *)(s), strlen(s), ended, &body, &n)
    for (size_t i = 0; i < fk_array_size(cut); i++) {
        assert_int_equal(HTTP(cut[i], false), 0);
        assert_int_equal(HTTP(cut[i], true), -EPROTO);
    }
    for (size_t i = 0; i < fk_array_size(bad); i++)
        assert_int_equal(HTTP(bad[i], true), -EPROTO);
    assert_int_equal(HTTP("HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", false), -ENOENT);
    assert_int_equal(HTTP("HTTP/1.0 200 OK\r\n\r\nabc", true), 1);
    assert_int_equal(n, 3);
    assert_int_equal(HTTP("HTTP/1.1 200 OK\r\nX: y\r\ncontent-LENGTH:  3\r\n\r\nabcdef", false), 1);
    assert_int_equal(n, 3);
    assert_int_equal(fk_moon_url("http://1.2.3.4:80/metadata", host, path), 0);
    assert_string_equal(host, "1.2.3.4:80");
    assert_string_equal(path, "/metadata");
    assert_int_equal(fk_moon_url("http://1.2.3.4:80/a\r\nb", host, path), -EINVAL);
    assert_int_equal(fk_moon_url("redis://1.2.3.4:80/", host, path), -EINVAL);
    assert_true(fk_moon_http_request(text, sizeof(text), "GET", "h:1", "/m", "ram", "a b:1\r\n", NULL) > 0);
    assert_non_null(strstr(text, "GET /m?key=mooncake%2Fram%2Fa%20b%3A1%0D%0A HTTP/1.1\r\n"));
}

static int set_up(void **state)
{
    fk_log_set_level(FK_LOG_CRITICAL);
    return 0;
}

static void test_partition(void **state)
{
    if (getenv("FLEXKV_TEST_MOONCAKE_LIBRARY"))
        skip();                         /* its calls connect, and block for minutes: so long is the quarantine */
    partition_test();
}

int main(int argc, char **argv)
{
    if (argc == 4 && strcmp(argv[1], "--owner") == 0)
        owner_main(argv[2], atoi(argv[3]));
    if (argc == 2 && strcmp(argv[1], "--partition") == 0) {
        fk_log_set_level(FK_LOG_CRITICAL);
        return partition_scenario(kind);
    }
    if (argc == 2)
        cmocka_set_test_filter(argv[1]);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_killed),
        cmocka_unit_test(test_stopped),
        cmocka_unit_test(test_stopped_before),
        cmocka_unit_test(test_partition),
        cmocka_unit_test(test_bytes),
        cmocka_unit_test(test_what_is_not_granted),
        cmocka_unit_test(test_library),
        cmocka_unit_test(test_garbage),
        cmocka_unit_test(test_reader_gone),
        cmocka_unit_test(test_descriptor),
        cmocka_unit_test(test_places),
        cmocka_unit_test(test_config),
        cmocka_unit_test(test_http),
    };

    return cmocka_run_group_tests(tests, set_up, NULL);
}
