/*
 * moon_peer.c - a FlexKV node on Mooncake's wire, for test_mooncake.py, which has Mooncake's own engine.
 *
 *   moon_peer owner LISTEN METADATA NAME           16 slots of 256 KiB; says where they are, serves until stdin ends
 *   moon_peer read METADATA PEER ADDRESS BYTES N   reads N pieces of BYTES from a foreign engine; writes them to stdout
 *   moon_peer blocks METADATA PEER                 reads the blocks of another moon_peer; says how many were right
 */
#include <inttypes.h>
#include <poll.h>
#include <stdio.h>

#include "base/clock.h"
#include "base/util.h"
#include "transport/mooncake_wire.h"

#define SLOTS 16u
#define SLOT_BYTES (256u << 10)

static const struct fk_window window = { .space = 1, .ns = 2, .slot_bytes = SLOT_BYTES, .slots = SLOTS };
static unsigned char pool[SLOTS][SLOT_BYTES];

static struct fk_key key_of(uint32_t slot) { return (struct fk_key){ slot + 1, 7 }; }

static int grant(void *ctx, const struct fk_block_ref *r, struct fk_grant *g)
{
    if (r->slot >= SLOTS || r->slot == 3)       /* slot 3 is not shared */
        return -ENOENT;
    *g = (struct fk_grant){ .data = pool[r->slot], .bytes = SLOT_BYTES, .key = key_of(r->slot), .generation = 2,
                            .epoch = 5 };
    return 0;
}

static int release(void *ctx, const struct fk_block_ref *r, struct fk_grant *g) { return 0; }

static unsigned char byte_at(uint32_t slot, uint32_t i) { return (unsigned char)(slot * 37 + i * 11 + (i >> 8)); }

static struct fk_transport *open_it(const char *listen, const char *metadata, const char *name)
{
    struct fk_transport_params p = { .transport = "mooncake", .listen = listen, .mooncake_metadata = metadata,
                                     .mooncake_library = getenv("FLEXKV_TEST_MOONCAKE_LIBRARY"),
                                     .mooncake_name = name, .provider = { grant, release, NULL } };
    struct fk_transport *t;
    char error[256];

    if (fk_transport_open(&p, &t, error, sizeof(error)) == 0)
        return t;
    fprintf(stderr, "moon_peer: %s\n", error);
    exit(1);
}

static int own(const char *listen, const char *metadata, const char *name)
{
    for (uint32_t s = 0; s < SLOTS; s++)
        for (uint32_t i = 0; i < SLOT_BYTES; i++)
            pool[s][i] = byte_at(s, i);
    struct fk_transport *t = open_it(listen, metadata, *name ? name : NULL);
    if (fk_transport_share(t, &window))
        return 1;
    printf("%s %" PRIu64 " %u %u\n", fk_transport_address(t), fk_moon_slot_address(0, &window, 0), SLOTS, SLOT_BYTES);
    fflush(stdout);
    while (getchar() != EOF)
        ;
    fk_transport_close(t);
    return 0;
}

static int take(struct fk_transport *t, uint32_t n, int *rcs)
{
    struct pollfd p = { .fd = fk_transport_fd(t), .events = POLLIN };
    struct fk_read_done d;

    for (uint32_t got = 0; got < n; got++) {
        while (fk_transport_take(t, &d, 1) == 0)
            if (poll(&p, 1, 20000) == 0)
                return 1;
        rcs[d.user] = d.rc;
    }
    return 0;
}

static int read_raw(const char *metadata, const char *peer_name, uint64_t address, uint32_t bytes, uint32_t n)
{
    struct fk_transport *t = open_it(NULL, metadata, NULL);
    struct fk_read *r = calloc(n, sizeof(*r));
    unsigned char *data = malloc((size_t)n * bytes);
    int *rcs = calloc(n, sizeof(*rcs));
    uint32_t peer;

    for (uint32_t i = 0; i < n; i++)
        r[i] = (struct fk_read){ .block.bytes = bytes, .buffer = data + (size_t)i * bytes, .user = i,
                                 .address = address + (uint64_t)i * bytes, .flags = FK_READ_RAW };
    if (fk_transport_peer(t, peer_name, &peer) || fk_transport_read(t, peer, r, n, fk_clock_us() + 10000000) ||
        take(t, n, rcs))
        return 1;
    for (uint32_t i = 0; i < n; i++) {
        if (rcs[i]) {
            fprintf(stderr, "moon_peer: read %u: %s\n", i, strerror(-rcs[i]));
            return 2;
        }
    }
    fk_transport_close(t);
    bool ok = fwrite(data, bytes, n, stdout) == n && fflush(stdout) == 0;
    free(r);
    free(data);
    free(rcs);
    return ok ? 0 : 1;
}

static int read_blocks(const char *metadata, const char *peer_name)
{
    struct fk_transport *t = open_it(NULL, metadata, NULL);
    struct fk_read r[SLOTS];
    int rcs[SLOTS], right = 0;
    uint32_t peer;

    for (uint32_t i = 0; i < SLOTS; i++)
        r[i] = (struct fk_read){ .block = { .key = key_of(i), .space = 1, .ns = 2, .epoch = 5, .generation = 2,
                                            .slot = i, .bytes = SLOT_BYTES }, .buffer = pool[i], .user = i };
    if (fk_transport_peer(t, peer_name, &peer) || fk_transport_read(t, peer, r, SLOTS, fk_clock_us() + 10000000) ||
        take(t, SLOTS, rcs))
        return 1;
    fk_transport_close(t);
    for (uint32_t s = 0; s < SLOTS; s++) {
        uint32_t i = 0;
        while (rcs[s] == 0 && i < SLOT_BYTES && pool[s][i] == byte_at(s, i))
            i++;
        right += i == SLOT_BYTES;
    }
    printf("%d\n", right);
    return 0;
}

int main(int argc, char **argv)
{
    if (argc == 5 && strcmp(argv[1], "owner") == 0)
        return own(argv[2], argv[3], argv[4]);
    if (argc == 7 && strcmp(argv[1], "read") == 0)
        return read_raw(argv[2], argv[3], strtoull(argv[4], NULL, 0), (uint32_t)atoi(argv[5]), (uint32_t)atoi(argv[6]));
    if (argc == 4 && strcmp(argv[1], "blocks") == 0)
        return read_blocks(argv[2], argv[3]);
    fprintf(stderr, "usage: see the head of moon_peer.c\n");
    return 2;
}
