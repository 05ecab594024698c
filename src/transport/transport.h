/*
 * transport.h - reads of blocks from other nodes, over engines that exist: one vtable, one way to ask.
 *
 *   loopback   in one process, one thread, simulated time, with faults: for the simulator (loopback.h)
 *   fabric     libfabric, loaded at run time: tcp, verbs, shm, EFA through the same code. The owner writes
 *              into the reader's buffer (fabric.c)
 *   nixl       NVIDIA's NIXL, its C library loaded at run time; its UCX plugin unless told otherwise. As fabric (nixl.c)
 *   mooncake   Mooncake's TCP wire, spoken natively with FlexKV nodes and with Mooncake's own engine
 *              (mooncake.c)
 *
 * A *transport* is both sides: the *owner*, who lets others read his blocks if he was given an address to
 * listen at, and the *reader*. It has a thread of its own that sleeps unless something happens (loopback has
 * none: who made it steps it).
 *
 *   reader                                       owner
 *   fk_transport_read --> asks ----------------> grant(): checks key, slot, generation, epoch, space,
 *                                                |        namespace; pins. Or "later": the read waits for
 *                                                |        fk_transport_granted
 *   buffer <-- payload ------------------------- '  writes
 *                                                release(): still the same generation? unpins
 *   fk_transport_take <-- checksum verified <--- status and checksum
 *
 * Every read ends exactly once, within its deadline whatever the library or the peer does. A buffer that
 * something may still write to at the deadline is reported as *quarantined* (FK_READ_QUARANTINED), and a second
 * time, as free again (FK_READ_RELEASED), when the transport has made sure: the late bytes have come, or
 * the connection is closed. Until then the buffer must be left alone.
 *
 * Threads: any thread may call; grant() and release() are called in the transport's thread (release() for what close
 * gives back: in the closing one) and must not block.
 * Errors: -errno. Knows keys and bytes, nothing of nodes, tiers or the cluster. Wire: docs/transport.md.
 */
#ifndef FK_TRANSPORT_H
#define FK_TRANSPORT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/key.h"

#define FK_TRANSPORT_ADDRESS_MAX 128    /* "10.0.0.1:7000", "[::1]:7000", a name in the loopback's hub */
#define FK_TRANSPORT_BLOCK_MAX (1u << 30)

/* Which block: what the owner announced, and gets back with the request. */
struct fk_block_ref {
    struct fk_key key;
    uint64_t space, ns;             /* as owner and reader both name them (a hash of the fingerprint, of the
                                       namespace's name): the owner compares */
    uint64_t epoch;                 /* the owner's: another start of the same node is another owner */
    uint64_t generation;            /* of the slot, when it got this block */
    uint32_t slot, tier;
    uint32_t bytes;
};

/* ---- the owner's side ---- */

struct fk_grant {
    const void *data;               /* stays as it is until release() */
    uint32_t bytes;
    bool has_checksum;              /* the owner knows it: it is not computed again */
    uint64_t checksum;              /* fk_block_checksum: what the SSD's records have */
    struct fk_key key;              /* what is in the slot. grant() fills these: they matter where the */
    uint64_t generation, epoch;     /* reader names a place, not a block (Mooncake's wire) */
    void *pin;                      /* the provider's own */
    uint64_t later;                 /* its number for a grant that comes later; no two at a time have the same */
};

/* r->key is zero where the reader names a place: whatever is in that slot and may be shared. */
struct fk_provider {
    /* 0: pinned; -ENOENT: not there (any more), another generation or epoch; -EACCES: not shared; -EAGAIN: not
     * now; -EINPROGRESS: fk_transport_granted says it later, under out->later. Another answer is taken for -EIO. */
    int (*grant)(void *ctx, const struct fk_block_ref *r, struct fk_grant *out);
    /* Once for each grant. 0: the bytes have been this block's all the time; -ENOENT: not so. */
    int (*release)(void *ctx, const struct fk_block_ref *r, struct fk_grant *g);
    void *ctx;
};

/* ---- opening ---- */

struct fk_loopback_hub;

struct fk_transport_params {
    const char *transport;          /* a name of the table in transport.c */
    const char *listen;             /* "IP:PORT", port 0: any; NULL: nobody reads from this node, nothing listens.
                                       Numeric: names are not looked up */
    const char *source;             /* "IP": of the fabric's or UCX's own sockets; NULL: listen's, else 127.0.0.1 */
    const char *secret;             /* shared by all members; not with mooncake, which knows none */
    const char *cluster;            /* its name: nodes of another one are turned away */
    uint64_t node, epoch;           /* who this is */
    struct fk_provider provider;    /* unused without listen */
    /*
     * Instead of fk_transport_fd, for who would only be woken by it: called in the transport's thread when reads have
     * ended, after fk_transport_wake, and when the time has come that it returned (UINT64_MAX: none). Takes what has
     * ended, asks for more; must not block. So no second thread has to wake up between one read and the next.
     */
    uint64_t (*turn)(void *ctx);
    void *turn_ctx;
    uint32_t max_in_flight;         /* blocks asked of one peer at a time; 0: 32 */
    uint32_t max_queued;            /* reads that have not ended, over all peers; 0: 65536 */
    uint32_t timeout_ms;            /* connecting, saying hello; the owner's patience with a reader; 0: 2000 */
    const char *fabric;             /* fabric: libfabric's provider; NULL: "tcp;ofi_rxm" */
    const char *nixl_library;       /* nixl: its libnixl_capi.so, or the folder that has it; NULL: as the system finds it */
    const char *nixl_plugin;        /* nixl: NULL: "UCX" */
    struct fk_loopback_hub *hub;    /* loopback */
    const char *mooncake_metadata;  /* "P2PHANDSHAKE" (NULL) or "http://HOST:PORT/metadata" */
    const char *mooncake_library;   /* a libtransfer_engine.so of the user's own, which reads for us; NULL: we do, over tcp */
    const char *mooncake_protocol;  /* of that library: "tcp" (NULL) or "rdma" */
    const char *mooncake_name;      /* the segment's name with http; NULL: the address */
};

struct fk_transport;

/* 0 or -errno with one line in error that names what to change. */
int fk_transport_open(const struct fk_transport_params *p, struct fk_transport **out, char *error,
                      size_t error_bytes);
/* Ends every read (-ECANCELED; not delivered) and gives back every grant that it was given. No buffer is written to after
 * it. */
void fk_transport_close(struct fk_transport *t);

const char *fk_transport_name(const struct fk_transport *t);
/* What others pass to fk_transport_peer; "" without listen. Valid until close. */
const char *fk_transport_address(const struct fk_transport *t);

/* Memory that grants or buffers lie in; a hint that saves registering it again and again. A must for both with nixl, for
 * grants with fabric's verbs and EFA. */
int fk_transport_register(struct fk_transport *t, void *base, size_t bytes);

/*
 * The end of a grant that answered -EINPROGRESS: once for each of them, at any time, from any thread, grant() too. rc and
 * g as grant() would have had them; release() follows, once, for each that is taken with rc 0: after the bytes have gone, or
 * at once if nobody wants them any more (the reader has gone, or has been told -EAGAIN after timeout_ms). So g must
 * stay good until then.
 * 0: taken. -ESHUTDOWN: the transport is being closed, the grant stays the provider's. -EINVAL; -ENOMEM: the same.
 * Whoever calls makes sure that fk_transport_close has not returned. Grants that were not given by then are forgotten:
 * nothing is called for them, what they hold is the provider's to clean up.
 */
int fk_transport_granted(struct fk_transport *t, uint64_t later, int rc, const struct fk_grant *g);

/* Slots of one size that readers may ask for by place (mooncake; others ignore it): one for each space and tier. */
struct fk_window {
    uint64_t space, ns;
    uint32_t tier, slot_bytes, slots;
};
int fk_transport_share(struct fk_transport *t, const struct fk_window *w);

/* ---- the reader's side ---- */

struct fk_read {
    struct fk_block_ref block;
    void *buffer;                   /* block.bytes; the transport's from read until done (or released) */
    uint64_t user;                  /* comes back */
    uint64_t address;               /* FK_READ_RAW: where it lies at a foreign Mooncake engine */
    uint32_t flags;
};
enum { FK_READ_RAW = 1 };           /* mooncake: bytes as they are. Nobody vouches for them: no checksum */

enum { FK_READ_QUARANTINED = 1, FK_READ_RELEASED = 2 };

/*
 * rc: 0; -ENOENT not there, or not any more; -ETIMEDOUT; -ECONNREFUSED, -ECONNRESET, -EHOSTUNREACH: the peer;
 * -EACCES: it or we don't belong here; -EBADMSG: bytes that are not this block's; -EPROTO: a peer that talks
 * nonsense; -ECANCELED: the peer was dropped; -EAGAIN, -EIO: the owner's.
 */
struct fk_read_done {
    uint64_t user;
    uint32_t peer;
    int32_t rc;
    uint32_t flags;
};

/* Makes a peer known, or finds it; nothing is connected before the first read. */
int fk_transport_peer(struct fk_transport *t, const char *address, uint32_t *peer);
/* Closes its connections; its reads end with -ECANCELED. The number may be given out again. */
void fk_transport_peer_drop(struct fk_transport *t, uint32_t peer);

/* All n are taken (0) or none: -EAGAIN too many have not ended, -EINVAL, -ENOMEM. deadline_us: fk_clock_us(). */
int fk_transport_read(struct fk_transport *t, uint32_t peer, const struct fk_read *r, uint32_t n,
                      uint64_t deadline_us);
/* The turn is wanted. Any thread. */
void fk_transport_wake(struct fk_transport *t);
/* Readable when there is something to take; without a turn. */
int fk_transport_fd(const struct fk_transport *t);
uint32_t fk_transport_take(struct fk_transport *t, struct fk_read_done *out, uint32_t max);

/* loopback only: does what is due at this time; returns when to come again (UINT64_MAX: when asked). */
uint64_t fk_transport_step(struct fk_transport *t, uint64_t now_us);

struct fk_transport_stats {
    uint64_t read_blocks, read_bytes;           /* arrived and verified */
    uint64_t failed, late, mismatched;          /* mismatched: checksum */
    uint64_t quarantined;                       /* buffers, now */
    uint64_t served_blocks, served_bytes, refused;
    uint64_t turned_away;                       /* connections: secret, cluster, version, garbage */
    uint64_t connections;                       /* now, both sides' */
};
void fk_transport_get_stats(struct fk_transport *t, struct fk_transport_stats *out);

#endif
