/* SPDX-License-Identifier: BSD-3-Clause */
/* What lies in shared memory: words, bits, structs, offsets. No functions but the packing of words.
 *
 *   region  | header | participants | doorbells | rings | slots | extents | groups | records ...| arena |
 *           '--------------------- control, reserved at creation -----------'  by group        '2 MiB steps'
 *
 * Everything is an offset, never a pointer. Payload holds no control state.
 */
#ifndef SHMR_LAYOUT_H
#define SHMR_LAYOUT_H

#include <stddef.h>

#include "shmr_atomics.h"

#define SHMR_MAGIC UINT64_C(0x31676e69726d6873) /* "shmring1", stored last by the creator */
#define SHMR_ABI 4

#define SHMR_LINE 128             /* separation: the adjacent-line prefetcher pairs 64-byte lines */
#define SHMR_PAGE 4096u
#define SHMR_EXTENT (2u << 20)    /* arenas grow by this */
#ifndef SHMR_GROUP                /* a test build may have smaller tables */
#define SHMR_GROUP 256            /* records that change hands together */
#define SHMR_MAX_PARTICIPANTS 256
#define SHMR_MAX_DOORBELLS 512
#endif
#define SHMR_MAX_RINGS 8
#define SHMR_MAX_BLOCKS (1u << 20)
#define SHMR_MAX_REFS 65536u      /* references in one frame */
#define SHMR_SPEC_BYTES 128
#define SHMR_UNDO_WORDS (5 + SHMR_SPEC_BYTES / 8) /* what a commit writes of a descriptor */
#define SHMR_SPARE_SLOTS(capacity) ((capacity) < 64 ? (capacity) : 64) /* beyond it, for recovered messages */

#define SHMR_HOLDER_WORDS (SHMR_MAX_PARTICIPANTS / 64)
#define SHMR_WAITER_WORDS (SHMR_MAX_DOORBELLS / 64)

/* ---- the state word of a block: generation:32 | owner:12 | ring:8 | flags:8 | state:4 ------------------- */

enum shmr_state {
    SHMR_FREE = 0,      /* belongs to the allocator of its group's owner */
    SHMR_CLAIMED = 1,   /* `owner` is writing */
    SHMR_COMMITTED = 2, /* in `ring`, put there by `owner` */
    SHMR_LEASED = 3,    /* `owner` is reading */
    SHMR_SHARED = 4     /* by reference: alive while any holder bit is set */
};

#define SHMR_HAS_REFERENCES 1u /* flags: the payload begins with a table of references */

static inline uint64_t shmr_state_pack(uint32_t generation, uint32_t owner, uint32_t ring, uint32_t flags,
                                       enum shmr_state state) {
    return (uint64_t)generation << 32 | (uint64_t)(owner & 0xfffu) << 20 | (uint64_t)(ring & 0xffu) << 12 |
           (uint64_t)(flags & 0xffu) << 4 | (uint64_t)state;
}
static inline uint32_t shmr_state_generation(uint64_t s) { return (uint32_t)(s >> 32); }
static inline uint32_t shmr_state_owner(uint64_t s) { return (uint32_t)(s >> 20) & 0xfffu; }
static inline uint32_t shmr_state_ring(uint64_t s) { return (uint32_t)(s >> 12) & 0xffu; }
static inline uint32_t shmr_state_flags(uint64_t s) { return (uint32_t)(s >> 4) & 0xffu; }
static inline uint32_t shmr_state_kind(uint64_t s) { return (uint32_t)s & 0xfu; }

/* ---- a slot of a ring, one word: cycle:24 | generation:20 | block:20 ------------------------------------- */

#define SHMR_CYCLE_MASK 0xffffffu
#define SHMR_SLOT_GENERATION_MASK 0xfffffu

static inline uint64_t shmr_slot_pack(uint32_t cycle, uint32_t generation, uint32_t block) {
    return (uint64_t)(cycle & SHMR_CYCLE_MASK) << 40 |
           (uint64_t)(generation & SHMR_SLOT_GENERATION_MASK) << 20 | (uint64_t)(block & 0xfffffu);
}
static inline uint32_t shmr_slot_cycle(uint64_t slot) { return (uint32_t)(slot >> 40); }
static inline uint32_t shmr_slot_generation(uint64_t slot) {
    return (uint32_t)(slot >> 20) & SHMR_SLOT_GENERATION_MASK;
}
static inline uint32_t shmr_slot_block(uint64_t slot) { return (uint32_t)slot & 0xfffffu; }

/* ---- the life of a participant: epoch:20 | by:12 | pid:28 | life:4 ---------------------------------------- */

enum shmr_life {
    SHMR_VACANT = 0,
    SHMR_JOINING = 1,    /* `by` is a tag of its pid namespace: whose pid it is */
    SHMR_LIVE = 2,
    SHMR_LEFT = 3,       /* went in good order; its arena waits for an adopter; `by`: SHMR_KEPT_MESSAGES, or 0 */
    SHMR_RECOVERING = 4  /* found dead (or left); `by` is clearing up */
};

#define SHMR_KEPT_MESSAGES 1u /* it had recovered messages for which there was no room in their ring */

static inline uint64_t shmr_life_pack(uint32_t epoch, uint32_t by, uint32_t pid, enum shmr_life life) {
    return (uint64_t)(epoch & 0xfffffu) << 44 | (uint64_t)(by & 0xfffu) << 32 |
           (uint64_t)(pid & 0xfffffffu) << 4 | (uint64_t)life;
}
static inline uint32_t shmr_life_epoch(uint64_t w) { return (uint32_t)(w >> 44); }
static inline uint32_t shmr_life_by(uint64_t w) { return (uint32_t)(w >> 32) & 0xfffu; }
static inline uint32_t shmr_life_pid(uint64_t w) { return (uint32_t)(w >> 4) & 0xfffffffu; }
static inline uint32_t shmr_life_kind(uint64_t w) { return (uint32_t)w & 0xfu; }

/* ---- structs ------------------------------------------------------------------------------------------------ */

enum {  /* words of the geometry in the header */
    SHMR_CONFIG_PARTICIPANTS,
    SHMR_CONFIG_DOORBELLS,
    SHMR_CONFIG_RINGS,
    SHMR_CONFIG_BLOCKS,
    SHMR_CONFIG_ARENA_BYTES,
    SHMR_CONFIG_START,
    SHMR_CONFIG_FLAGS,
    SHMR_CONFIG_CAPACITY,
    SHMR_CONFIG_WORDS = SHMR_CONFIG_CAPACITY + SHMR_MAX_RINGS
};

struct shmr_header {
    shmr_word magic; /* last to be stored, first to be read */
    shmr_word abi;
    shmr_word hash;
    shmr_word config[SHMR_CONFIG_WORDS];
    char pad0[256 - 8 * (3 + SHMR_CONFIG_WORDS)];
    shmr_word poisoned; /* non-zero: control words are damaged beyond repair; so say the rings */
    shmr_word deaths;   /* participants found dead, ever */
    shmr_word joins;    /* participants that joined, ever */
    char pad1[SHMR_LINE - 24];
    shmr_word extent_waiters[SHMR_WAITER_WORDS];
    char pad2[SHMR_LINE - 8 * SHMR_WAITER_WORDS];
    shmr_word idle_waiters[SHMR_WAITER_WORDS]; /* who waits until a ring's messages are all dealt with */
    char pad3[SHMR_LINE - 8 * SHMR_WAITER_WORDS];
    char pad4[SHMR_PAGE - 640];
};
_Static_assert(sizeof(struct shmr_header) == SHMR_PAGE, "the header is one page");

struct shmr_participant {
    shmr_word life;
    shmr_word start_time; /* field 22 of /proc/PID/stat: with the pid, who it is */
    shmr_word pid_namespace;
    char pad0[SHMR_LINE - 24];
    shmr_word freed_hint; /* bit g % 64: look at the freed bits of my group g */
    char pad1[SHMR_LINE - 8];
    shmr_word space_waiters[SHMR_WAITER_WORDS]; /* my threads that wait for space in my arena */
    char pad2[SHMR_LINE - 8 * SHMR_WAITER_WORDS];
    /* written by the participant, read by observers: relaxed */
    shmr_word task_tag, task_index, task_since_ns; /* what it runs now */
    shmr_word starving;                            /* bytes it waits for, 0: none */
    shmr_word denied;                              /* set by an observer: stop waiting for space */
    shmr_word aborted, released, late_releases, rescued_wakeups;
    char pad3[SHMR_LINE - 72];
    shmr_word committed[SHMR_MAX_RINGS], leased[SHMR_MAX_RINGS]; /* each under the private lock of its ring */
    shmr_word bytes_committed[SHMR_MAX_RINGS];                   /* likewise */
    char pad4[2 * SHMR_LINE - 24 * SHMR_MAX_RINGS];
    /* what the descriptor of a leased block said before this participant rewrote it, to send the block on */
    shmr_word undo_state; /* of the block, then */
    shmr_word undo_block;
    shmr_word undo[SHMR_UNDO_WORDS];
    char pad5[2 * SHMR_LINE - 8 * (2 + SHMR_UNDO_WORDS)];
};
_Static_assert(sizeof(struct shmr_participant) == 8 * SHMR_LINE, "eight lines a participant");

struct shmr_doorbell {
    shmr_word owner; /* participant + 1, 0: nobody's */
    shmr_word bell;  /* at most one thread waits on it (shmr_bell.c) */
    char pad[SHMR_LINE - 16];
};
_Static_assert(sizeof(struct shmr_doorbell) == SHMR_LINE, "one line a doorbell");

#define SHMR_RING_CLOSED UINT64_C(1)
#define SHMR_RING_POISONED UINT64_C(2)

struct shmr_ring {
    shmr_word commit_cursor; /* next position to be filled; only a hint, anyone advances it */
    char pad0[SHMR_LINE - 8];
    shmr_word lease_cursor; /* next position to be taken; likewise */
    char pad1[SHMR_LINE - 8];
    shmr_word item_waiters[SHMR_WAITER_WORDS];
    char pad2[SHMR_LINE - 8 * SHMR_WAITER_WORDS];
    shmr_word slot_waiters[SHMR_WAITER_WORDS];
    char pad3[SHMR_LINE - 8 * SHMR_WAITER_WORDS];
    shmr_word closed; /* bits of the two below: no more commits, leases until empty; or neither */
    shmr_word lessee; /* participant + 1 while only one ever leased; all ones after */
    char pad4[SHMR_LINE - 16];
};
_Static_assert(sizeof(struct shmr_ring) == 5 * SHMR_LINE, "five lines a ring");

/* extent: owner + 1 in the low 32 bits; bit 32: its memory is reserved (warm) */
#define SHMR_EXTENT_WARM (UINT64_C(1) << 32)

struct shmr_group {
    shmr_word owner;                    /* participant + 1; bit 32: reserved */
    shmr_word freed[SHMR_GROUP / 64];   /* hints: records released by others */
    char pad[64 - 8 * (1 + SHMR_GROUP / 64)];
};
_Static_assert(sizeof(struct shmr_group) == 64, "one cache line a group");

struct shmr_record {
    shmr_word state;   /* the only truth about the block */
    shmr_word offset;  /* bytes from the start of the arena; a multiple of 64 */
    shmr_word room;    /* bytes of the block */
    shmr_word length;  /* bytes of the message */
    shmr_word seq;     /* producer's epoch:24 | number:40 */
    shmr_word tag;     /* the caller's */
    shmr_word detail;  /* producer:16 | kind:16 | attempts:16 | spec bytes:16 */
    shmr_word check;   /* CRC32C of descriptor:32 | of payload:32 */
    shmr_word version; /* counts holder bits set, so that a sweep can tell */
    shmr_word holders[SHMR_HOLDER_WORDS];
    shmr_word references; /* entries in the table at the start of the payload */
    shmr_word spare[6 - SHMR_HOLDER_WORDS];
    shmr_word spec[SHMR_SPEC_BYTES / 8]; /* what the bytes are; opaque here */
};
_Static_assert(sizeof(struct shmr_record) == 256, "a record is two lines");

#endif
