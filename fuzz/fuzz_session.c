/*
 * fuzz_session.c - libFuzzer target: what a client of a daemon may send, and the messages' framing.
 * A real local node serves; nothing may crash, and no space or namespace that was not opened be
 * used.
 *
 * Input: messages, each [ type, 2 bytes length, payload ]; a type above 0x80 has the payload sent
 * as it is, as raw bytes of the stream.
 */
#include <stdio.h>
#include <sys/socket.h>

#include "api/peer.h"
#include "base/log.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static flexkv_node *open_node(void)
{
    flexkv_config *config;
    flexkv_node *node;
    char address[64];

    fk_log_set_level(FK_LOG_OFF);
    snprintf(address, sizeof(address), "ipc://@flexkv-fuzz-%d", (int)getpid());
    if (flexkv_config_create(&config) || flexkv_config_set(config, "cpu_cache_gb", "64K") ||
        flexkv_config_set(config, "worker_timeout_ms", "1") ||
        flexkv_config_set(config, "enable_kv_events", "1") ||
        flexkv_config_set(config, "op_timeout_ms", "1000") || flexkv_node_open(config, &node) ||
        flexkv_node_serve(node, address))
        abort();
    flexkv_config_destroy(config);
    return node;
}

/* An instance and a namespace with the number 0, so that requests get somewhere. */
static void open_space(struct fk_session *s)
{
    struct fk_wire_space w = { .seq = 1, .tokens_per_block = 4, .ranks = 1, .workers = 1,
                               .slice_bytes = 512, .name = "default", .instance = "fuzz" };
    struct fk_wire_namespace n = { .seq = 2 };
    struct fk_msg msg = { sizeof(w), FK_WIRE_SPACE };

    if (fk_session_handle(s, &msg, (const uint8_t *)&w))
        abort();
    for (int i = 0; i < 50; i++) {
        if (fk_session_finish_slow(s))
            abort();
        msg = (struct fk_msg){ sizeof(n), FK_WIRE_NAMESPACE };
        if (fk_session_handle(s, &msg, (const uint8_t *)&n))
            abort();
        usleep(20);
    }
}

static int feed(struct fk_session *s, struct fk_msg_reader *in, const uint8_t *data, size_t size)
{
    struct fk_msg msg;
    const uint8_t *payload;
    int rc = 0;

    while (size >= 3 && rc == 0) {
        size_t n = fk_min((size_t)data[1] | (size_t)data[2] << 8, size - 3);
        msg = (struct fk_msg){ (uint32_t)n, data[0] % (FK_WIRE_LAST + 1) };
        if (fk_vec_grow_bytes((void **)&in->data, &in->cap, in->len + n + 32, 1))
            return -ENOMEM;
        if (data[0] < 0x80) {
            memcpy(in->data + in->len, &msg, sizeof(msg));
            in->len += sizeof(msg);
        }
        memcpy(in->data + in->len, data + 3, n);
        memset(in->data + in->len + n, 0, 8);
        in->len += n + (data[0] < 0x80 ? fk_msg_padding((uint32_t)n) : 0);
        while (rc == 0 && (rc = fk_msg_next(in, &msg, &payload)) == 1)
            rc = in->at % 8 ? -EPROTO : fk_session_handle(s, &msg, payload);
        data += 3 + n;
        size -= 3 + n;
    }
    return rc;
}

/* A connection lives until it is found no good, as a server's do. */
struct connection {
    struct fk_peer peer;
    int other_end;
};

static int connect_client(struct connection *c, flexkv_node *node)
{
    int sv[2];

    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, sv))
        return -errno;
    *c = (struct connection){ .peer = { .pid_fd = -1, .pid = 1, .fd = sv[0],
                                        .server = fk_local_node(node)->server },
                              .other_end = sv[1] };
    fk_msg_reader_init(&c->peer.in, 1u << 20);
    c->peer.session = fk_session_create(&c->peer);
    if (!c->peer.session)
        abort();
    open_space(c->peer.session);
    return 0;
}

static void disconnect(struct connection *c, flexkv_node *node)
{
    fk_session_destroy(c->peer.session);
    fk_msg_reader_free(&c->peer.in);
    fk_server_wake(fk_local_node(node));
    close(c->peer.fd);
    close(c->other_end);
    c->peer.session = NULL;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static flexkv_node *node;
    static struct connection c;
    static unsigned uses;
    char drop[65536];

    if (!node)
        node = open_node();
    if (!c.peer.session && connect_client(&c, node))
        return 0;
    int rc = feed(c.peer.session, &c.peer.in, data, size);
    if (!rc)
        rc = fk_session_finish_slow(c.peer.session);
    while (recv(c.other_end, drop, sizeof(drop), 0) > 0)
        ;
    if (rc || ++uses % 256 == 0)
        disconnect(&c, node);
    return 0;
}
