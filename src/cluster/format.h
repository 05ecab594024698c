/*
 * format.h - what nodes write into Redis for each other, byte by byte: batches of changes (an entry
 * of a node's stream, or a piece of its snapshot), the snapshot's head, the node's record. Both
 * directions. The description for other implementations: docs/cluster.md.
 *
 * Everything read here comes from outside: lengths, checksums and ranges are checked before use, and
 * a batch verifies only under the name, epoch and number that it was written for. Fuzzed
 * (fuzz/fuzz_cluster.c). Touches nothing but its arguments; any thread.
 */
#ifndef FK_CLUSTER_FORMAT_H
#define FK_CLUSTER_FORMAT_H

#include <stdbool.h>
#include <stdint.h>

#include "base/key.h"
#include "base/util.h"

#define FK_CLUSTER_NAME_MAX 64u         /* of a node or a cluster, with its 0 */
#define FK_CLUSTER_SPACES 64u           /* of one node */
#define FK_CLUSTER_ADDRESSES 8u
#define FK_CLUSTER_ADDRESS_MAX 192u
#define FK_CLUSTER_EPOCH_MAX (UINT64_C(1) << 53)    /* what a script of Redis counts exactly */
#define FK_BATCH_CHANGES 512u           /* in one batch at most */
#define FK_PIECE_CHANGES 8192u          /* in one piece of a snapshot at most */
#define FK_RECORD_BYTES 16384u          /* of a node's record at most */

typedef FK_VEC(char) fk_bytes;
int fk_bytes_add(fk_bytes *b, const void *data, size_t bytes);

/* A block has come or gone. Of one that has gone slot and generation say nothing. */
struct fk_change {
    struct fk_key key;
    uint32_t slot, generation;
    uint8_t tier;                       /* 0 cpu, 1 ssd */
    uint8_t space;                      /* the node's number for it: its record says which it is */
    bool removed;
};

/* What a batch is bound to: bytes of another node, epoch or place do not verify. */
struct fk_batch_id {
    const char *name;                   /* of the node */
    uint64_t epoch, number;             /* number: fk_batch_number, fk_piece_number */
};

static inline uint64_t fk_piece_number(uint64_t seq, uint32_t piece)
{
    return (UINT64_C(1) << 63) | seq << 20 | piece;
}

/* Appends the batch to out. 0 or -ENOMEM. */
int fk_batch_write(fk_bytes *out, const struct fk_batch_id *id, const struct fk_change *list,
                   uint32_t n);

struct fk_batch_reader {
    const uint8_t *at, *end;
    uint32_t left;                      /* changes */
    uint8_t space;
    uint32_t slot, generation;          /* of the change before */
};
/* 0, or -EBADMSG: not a batch, or not this one; -EPROTO: of a version we do not know. */
int fk_batch_open(struct fk_batch_reader *r, const struct fk_batch_id *id, const void *data,
                  size_t bytes);
/* 1 and a change, 0 at the end, -EBADMSG. */
int fk_batch_next(struct fk_batch_reader *r, struct fk_change *out);

/* The snapshot's head: all of the node's blocks as of the batch `seq` or later. */
struct fk_snapshot_head { uint64_t epoch, seq, blocks; uint32_t pieces; };
#define FK_SNAPSHOT_HEAD_BYTES 96u
int fk_snapshot_head_write(const struct fk_snapshot_head *h, char out[FK_SNAPSHOT_HEAD_BYTES]);
int fk_snapshot_head_read(struct fk_snapshot_head *h, const char *data, size_t bytes);

struct fk_node_space { uint8_t fingerprint[16]; uint64_t block_bytes; };

/* What a node says of itself; JSON, after its epoch and a newline, which scripts put there. */
struct fk_node_record {
    char name[FK_CLUSTER_NAME_MAX];
    char zone[FK_CLUSTER_NAME_MAX];     /* nodes of one zone are near each other; "": none */
    char address[FK_CLUSTER_ADDRESSES][FK_CLUSTER_ADDRESS_MAX];     /* "transport=where" */
    uint32_t n_addresses, n_spaces;
    struct fk_node_space space[FK_CLUSTER_SPACES];      /* place: the node's number for it */
    uint64_t ttl_ms;
    uint64_t blocks[2], slots[2];       /* per tier: held, and room for */
    uint32_t load;                      /* 0 idle .. 1000 busy */
    uint64_t seq;                       /* last batch */
};
/* Appends the JSON. 0, -ENOMEM, -E2BIG. */
int fk_node_record_write(fk_bytes *out, const struct fk_node_record *rec);
/* The whole value with its epoch. 0, -EBADMSG, -EPROTO: version. */
int fk_node_record_read(struct fk_node_record *rec, uint64_t *epoch, const char *data, size_t bytes);

/* Names stand in keys: letters, digits, and . _ - : only, 1 to 63 of them. */
bool fk_cluster_name_valid(const char *name);
/* "EPOCH-SEQ" as in stream entries and members. */
bool fk_id_read(const char *text, size_t bytes, uint64_t *major, uint64_t *minor);
/* A decimal number that is all of the text. */
bool fk_number_read(const char *text, size_t bytes, uint64_t *out);

#endif
