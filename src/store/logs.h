/*
 * logs.h - what stands in the objects by which nodes tell each other what they have written to an object store, and
 * the checks before any of it is believed. Pure functions over bytes: used by objects.c and the fuzzer. Any thread.
 *
 *   nodes/N         a head: who has it, and how far the logs of each *chapter* go: its own, and those of nodes that are
 *                   no more and whose place it has taken
 *   log/UUID/I      a log: up to STORE_LOG_KEYS keys; the I-th of that chapter
 *
 * Native byte order, with a mark; what has another one, another version, or a wrong CRC is not read. docs/store.md
 */
#ifndef FK_STORE_LOGS_H
#define FK_STORE_LOGS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/key.h"

#define STORE_LOG_KEYS 4096u
#define STORE_HEAD_CHAPTERS 128u
#define STORE_CHAPTER_LOGS (1u << 20)
#define STORE_HEAD_SLOTS 65536u         /* nodes; more than can be */

struct store_chapter {
    uint8_t uuid[16];
    uint32_t first, logs;               /* logs [first, logs) are there; those before have expired */
    uint32_t keys;                      /* in the last one */
    uint32_t reserved;
};
_Static_assert(sizeof(struct store_chapter) == 32, "the chapter's layout is the format");

struct store_head {
    char magic[8];
    uint32_t byte_order, version;
    uint8_t owner[16];                  /* its chapter's uuid */
    uint64_t beat_s;                    /* when it was written, by the writer's clock */
    uint32_t slots;                     /* there are heads in nodes/0 to this one less 1, as far as the writer knows */
    uint32_t chapters;                  /* that follow */
    uint32_t closed;                    /* the owner has ended: who needs a place may take this one */
    uint32_t crc;                       /* crc32c of all, this taken for 0 */
};
_Static_assert(sizeof(struct store_head) == 56, "the head's layout is the format");

struct store_log {
    char magic[8];
    uint32_t byte_order, version;
    uint8_t uuid[16];
    uint32_t number, keys;              /* keys follow */
    uint32_t reserved, crc;             /* as in the head */
};
_Static_assert(sizeof(struct store_log) == 48, "the log's layout is the format");

struct store_head_object { struct store_head head; struct store_chapter chapter[STORE_HEAD_CHAPTERS]; };
struct store_log_object { struct store_log log; struct fk_key key[STORE_LOG_KEYS]; };

/* Fill in all but owner, beat_s, slots, chapters, closed and the chapters (uuid, number, keys and the keys). The
 * bytes to be written. */
size_t store_head_seal(struct store_head_object *h);
size_t store_log_seal(struct store_log_object *l);

/* n bytes have been read into it, or more with anything behind. False: not to be believed. */
bool store_head_sound(const struct store_head_object *h, size_t n);
bool store_log_sound(const struct store_log_object *l, size_t n, const uint8_t uuid[16], uint32_t number);

#endif
