/*
 * fuzz_peer.c - libFuzzer target: what comes out of the control connection of a peer: frames, the hello from either side,
 * requests and answers. Nothing but the checks may keep nonsense out.
 *
 * Input: byte 0: 0 bytes for an owner who waits for a hello, 1 for a reader in the middle of one, 2 a session that is open
 * (its MACs are put right, else nothing would get through), 3 payloads of requests and answers.
 */
#define OPENSSL_SUPPRESS_DEPRECATED
#include "base/util.h"
#include "transport/wire_impl.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static const struct fk_hello_params params = { "a secret", "cluster", "fabric", 1, 2, 32 };

static void use(const void *p, size_t n)
{
    uint8_t sum = 0;

    for (size_t i = 0; i < n; i++)
        sum += ((const uint8_t *)p)[i];
    volatile uint8_t used = sum;
    (void)used;
}

static void payloads(const uint8_t *p, uint32_t bytes)
{
    struct fk_request r;
    struct fk_answer a;
    int n = fk_request_count(bytes);

    for (int i = 0; i < n; i++)
        if (fk_request_get(p, (uint32_t)i, &r) == 0 &&
            (fk_key_is_zero(r.block.key) || !r.block.bytes || r.block.bytes > FK_TRANSPORT_BLOCK_MAX))
            __builtin_trap();
    uint64_t id;
    if (fk_data_get(p, bytes, &id, &(uint32_t){ 0 }) == 0 && bytes != FK_DATA_BYTES)
        __builtin_trap();
    n = fk_answer_count(bytes);
    for (int i = 0; i < n; i++)
        if (fk_answer_get(p, (uint32_t)i, &a) == 0 && a.rc > 0)
            __builtin_trap();
}

static void mend_mac(struct fk_session *s, uint8_t *p, size_t n)
{
    uint32_t bytes = n >= FK_FRAME_HEAD ? fk_get32(p) : UINT32_MAX;
    uint64_t number = htole64(s->received);
    uint8_t mac[32];

    if (bytes > FK_FRAME_MAX || n < FK_FRAME_HEAD + (size_t)bytes + FK_FRAME_MAC)
        return;
    struct iovec parts[] = { { &number, 8 }, { p, FK_FRAME_HEAD + bytes } };
    fk_mac_of(&s->receive, parts, 2, mac);
    memcpy(p + FK_FRAME_HEAD + bytes, mac, FK_FRAME_MAC);
}

static void session(struct fk_stream *in, bool reader, bool open)
{
    struct fk_session s = { .endpoint = "here", .endpoint_len = 4 };
    struct fk_stream out;
    const uint8_t *payload;
    uint32_t bytes;
    unsigned type;

    fk_stream_init(&out, -1);
    if (fk_session_start(&s, &params, reader, &out) == 0) {
        if (open) {
            s.done = true;
            fk_mac_init(&s.receive, "k", 1);
            mend_mac(&s, in->in + in->in_at, fk_stream_unread(in));
        }
        while (fk_frame_next(&s, in, &type, &payload, &bytes) == 1) {
            use(payload, bytes);
            if (!open && fk_session_hello(&s, type, payload, bytes, &out))
                break;
            if (!open && s.done)
                __builtin_trap();       /* without the secret */
            if (open) {
                payloads(payload, bytes);
                mend_mac(&s, in->in + in->in_at, fk_stream_unread(in));
            }
        }
    }
    fk_stream_close(&out);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size < 2)
        return 0;
    struct fk_stream in = { .fd = -1, .in = malloc(size - 1), .in_len = size - 1 };
    if (!in.in)
        return 0;
    memcpy(in.in, data + 1, size - 1);
    if (data[0] % 4 == 3)
        payloads(in.in, (uint32_t)(size - 1));
    else
        session(&in, data[0] % 4 == 1, data[0] % 4 == 2);
    fk_stream_close(&in);
    return 0;
}
