/* SPDX-License-Identifier: BSD-3-Clause */
/* What the core's files share with each other: the handle and the private side of the protocol. */
#ifndef SHMR_INTERNAL_H
#define SHMR_INTERNAL_H

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>

#include "shmr.h"
#include "shmr_layout.h"

#ifdef SHMR_DEBUG
#include <stdio.h>
#define SHMR_INVARIANT(number, condition)                                                            \
    do {                                                                                             \
        if (!(condition)) {                                                                          \
            fprintf(stderr, "shmr: invariant " #number " broken at %s:%d: %s\n", __FILE__, __LINE__, \
                    #condition);                                                                     \
            abort();                                                                                 \
        }                                                                                            \
    } while (0)
#else
#define SHMR_INVARIANT(number, condition) ((void)0)
#endif

/* Where everything is, computed once from a private copy of the configuration and never read again. */
struct shmr_geometry {
    shmr_config config;
    uint32_t groups, extents, pages;
    uint32_t slots[SHMR_MAX_RINGS]; /* a power of two, at least the capacity and some to spare */
    uint32_t shift[SHMR_MAX_RINGS]; /* log2 of it */
    uint32_t most[SHMR_MAX_RINGS];  /* messages at once, recovered ones included: all slots */
    uint64_t participants_at, doorbells_at, rings_at, slots_at[SHMR_MAX_RINGS], extents_at, groups_at;
    uint64_t records_at, arena_at, total;
};

struct shmr_mapping {
    shmr_count count;
    char *base;
    size_t bytes;
    char *reserved; /* the address range that was reserved to align the base */
    size_t reserved_bytes;
    shmr_count cut; /* how often the file turned out to be shorter, by SIGBUS */
};

/* ---- the private allocator (shmr_arena.c) ------------------------------------------------------------------- */

#define SHMR_BINS 96
#define SHMR_CLASSES 32
#define SHMR_QUICK 64

#define SHMR_LARGE_MIN 131072u /* from here on, look at what others have released before each allocation */

struct shmr_slab {
    uint32_t page, pages, class_index; /* class_index SHMR_CLASSES: adopted, only counted */
    uint32_t blocks, unused;
    struct shmr_slab *next, *previous; /* of the slabs of the class that have room */
    struct shmr_slab *all_next, *all_previous;
    uint32_t *records;                 /* record + 1 of each block, 0: none, all ones: not in use */
    uint32_t stack[];                  /* unused blocks, the warmest on top */
};

struct shmr_quick {
    uint32_t pages, first, last, count; /* runs of exactly this length, not coalesced: warm; page + 1 */
};

struct shmr_arena {
    uint32_t *run;              /* a page: what starts (or, of a free run, ends) here: length << 2 | kind */
    uint32_t *next, *previous;  /* links of the free lists; page + 1 */
    uint32_t *record;           /* a used run's record + 1 */
    struct shmr_slab **slab_at; /* a page: the slab that it belongs to */
    uint8_t *own;               /* an extent: ours. The shared words only claim them; here they are not believed */
    uint64_t bin_bits[2];
    uint32_t bin[SHMR_BINS];
    struct shmr_quick quick[SHMR_QUICK];
    struct shmr_slab *partial[SHMR_CLASSES], *slabs;
    uint32_t turn, turns_wait;
    uint32_t turning; /* pages of one length that take turns, at least, if others have read them */
    uint64_t used_bytes, owned_bytes;
    uint32_t leave; /* extents of the region that this process must not take */
};

#define SHMR_MINE 1u  /* record_flags: allocated by this process and not yet reclaimed */
#define SHMR_NAMES 2u /* a frame of the dead, whose references are held here */

/* A set of places in the table of participants. */
struct shmr_slots {
    uint64_t bits[SHMR_MAX_PARTICIPANTS / 64];
};
static inline void shmr_slots_add(struct shmr_slots *set, uint32_t slot) {
    set->bits[slot / 64] |= UINT64_C(1) << (slot % 64);
}
static inline bool shmr_slots_have(const struct shmr_slots *set, uint32_t slot) {
    return slot < SHMR_MAX_PARTICIPANTS && (set->bits[slot / 64] >> (slot % 64) & 1);
}

struct shmr_place {
    uint64_t offset, room;
};

struct shmr_frame_refs {
    struct shmr_frame_refs *next; /* of those about to be dropped */
    uint32_t count;
    uint32_t blocks[];
};

struct shmr_spin {
    shmr_word misses, turns;
};

enum shmr_spin_kind { SHMR_SPIN_ITEM, SHMR_SPIN_SLOT, SHMR_SPIN_SPACE, SHMR_SPIN_KINDS };

struct shmr {
    shmr_mapping *map;
    char *base;
    struct shmr_geometry g;
    shmr_file file;
    uint32_t self, epoch, pid, fork_epoch;
    uint64_t pid_namespace;
    shmr_count pins;   /* what keeps this participant in the table: claims, leases, holds, allocations */
    shmr_count handle; /* references to this struct */
    shmr_count immortal; /* those of them that nobody gives back: NumPy's handlers have them */
    shmr_count closed, left;
    shmr_count unmapped; /* for good: NumPy's handlers go on, and what lies there now is not ours */

    pthread_mutex_t lock; /* the arena, records, holds; never held across a wait */
    struct shmr_arena arena;
    uint32_t *free_records; /* a stack */
    uint32_t free_record_count, free_record_room;
    uint32_t *my_groups;
    uint32_t my_group_count, my_group_room, group_hint;
    uint64_t own_groups[SHMR_MAX_BLOCKS / SHMR_GROUP / 64]; /* the same as a set: the shared words only claim them */
    uint8_t *record_flags;
    struct shmr_place *places; /* a block of mine, or held: where it is, out of reach of the others */
    uint32_t *holds;                     /* a block: private count behind my holder bit */
    struct shmr_frame_refs **frame_refs; /* a block of mine: what its frame names */
    struct shmr_frame_refs *dropping;    /* what is to be dropped, while somebody is at it */
    uint64_t held_bytes;
    uint32_t *page_block;   /* foreign blocks that I hold, by page; block + 1 (shmr_held.c) */
    uint32_t *extent_block; /* likewise by extent */
    struct shmr_small_block **small_blocks;
    uint32_t small_mask;

    pthread_mutex_t commit_lock[SHMR_MAX_RINGS]; /* number and insert in one step: order per producer */
    pthread_mutex_t undo_lock; /* one leased block a time is rewritten; taken inside of a commit lock */
    pthread_mutex_t lease_lock[SHMR_MAX_RINGS];  /* take and check the number in one step */
    uint64_t next_seq[SHMR_MAX_RINGS];
    uint64_t *last_seq[SHMR_MAX_RINGS]; /* a producer: number of its last message seen here */

    pthread_mutex_t doorbell_lock;
    uint32_t doorbells[SHMR_MAX_DOORBELLS];
    uint32_t doorbell_count;
    struct shmr_spin spin[2 * SHMR_SPIN_KINDS]; /* before sleeping; and briefly */
    shmr_word next_look;                        /* when who only polls looks again */
    shmr_word announced_at, announce_rest;      /* when a message was, or 0; how many are not, as filling takes too long */
    shmr_word first_seen[SHMR_MAX_RINGS];       /* private copies of the lease cursors, never ahead of them */

    pthread_mutex_t death_lock;
    shmr_file *pidfds; /* a slot */
    uint64_t *pidfd_lives;
    uint32_t *again; /* recovered messages that found their ring full */
    shmr_count again_count;
};

/* ---- places -------------------------------------------------------------------------------------------------- */

static inline struct shmr_header *shmr_header_of(const shmr *h) { return (struct shmr_header *)h->base; }
static inline struct shmr_participant *shmr_participant_at(const shmr *h, uint32_t i) {
    return (struct shmr_participant *)(h->base + h->g.participants_at) + i;
}
static inline struct shmr_doorbell *shmr_doorbell_at(const shmr *h, uint32_t i) {
    return (struct shmr_doorbell *)(h->base + h->g.doorbells_at) + i;
}
static inline struct shmr_ring *shmr_ring_at(const shmr *h, uint32_t i) {
    return (struct shmr_ring *)(h->base + h->g.rings_at) + i;
}
static inline shmr_word *shmr_slot_at(const shmr *h, uint32_t ring, uint64_t position) {
    return (shmr_word *)(h->base + h->g.slots_at[ring]) + (position & (h->g.slots[ring] - 1));
}
static inline shmr_word *shmr_extent_at(const shmr *h, uint32_t i) {
    return (shmr_word *)(h->base + h->g.extents_at) + i;
}
static inline struct shmr_group *shmr_group_at(const shmr *h, uint32_t i) {
    return (struct shmr_group *)(h->base + h->g.groups_at) + i;
}
static inline struct shmr_record *shmr_record_at(const shmr *h, uint32_t i) {
    return (struct shmr_record *)(h->base + h->g.records_at) + i;
}
static inline char *shmr_arena_base(const shmr *h) { return h->base + h->g.arena_at; }
static inline uint64_t shmr_references_bytes(uint64_t count) { return (count * 8 + 63) & ~UINT64_C(63); }

/* ---- shmr_guard.c -------------------------------------------------------------------------------------------- */
void shmr_guard(shmr_mapping *m);
void shmr_unguard(const shmr_mapping *m);
void shmr_guard_before_fork(void);
void shmr_guard_after_fork(void); /* in both */

/* ---- shmr_region.c ------------------------------------------------------------------------------------------- */
int shmr_usable(const shmr *h); /* OK, CLOSED or FORKED */
int shmr_fail(int status, int error, const char *detail);
void shmr_pin(shmr *h, int64_t delta);
int shmr_poison(shmr *h, const char *why); /* CORRUPT, for everybody and for good */
int shmr_poisoned(void);                   /* CORRUPT: somebody did that */
int shmr_check_file(shmr *h);              /* with h->lock held. CORRUPT: cut, and now poisoned. SYSTEM: closed */
int shmr_enter(shmr *h); /* OK: usable, and pinned so that a close by another thread waits for us */
/* Count in a statistics word of this participant's, which is written under a private lock only: no locked instruction. */
static inline void shmr_tally(shmr_word *own, uint64_t more) {
    shmr_store_relaxed(own, shmr_load_relaxed(own) + more); /* own word */
}
static inline int shmr_leave(shmr *h, int status) {
    shmr_pin(h, -1);
    return status;
}

/* ---- shmr_file.c --------------------------------------------------------------------------------------------- */
uint32_t shmr_pidfd_pid(int fd);
bool shmr_has_ended(int pidfd, int milliseconds); /* waiting for it that long at most; -1 never has */

/* ---- shmr_reserve.c ------------------------------------------------------------------------------------------ */
int shmr_reserve(shmr *h, uint64_t offset, uint64_t bytes);
int shmr_reserve_extent(shmr *h, uint32_t extent);
bool shmr_reserve_in(int fd, uint64_t offset, uint64_t bytes);
int shmr_allocate(int fd, uint64_t offset, uint64_t bytes);

/* ---- shmr_loan.c --------------------------------------------------------------------------------------------- */
int shmr_loans_map(shmr_loans *l);

/* ---- shmr_arena.c: call with h->lock held -------------------------------------------------------------------- */
#define SHMR_NOWHERE UINT64_MAX
int shmr_arena_init(shmr *h);
void shmr_arena_fini(shmr *h);
uint64_t shmr_arena_room(uint64_t bytes);                           /* bytes that an allocation really takes */
bool shmr_arena_has_warm(shmr *h, uint64_t bytes);                  /* a block of the size that was in use before */
uint64_t shmr_arena_allocate(shmr *h, uint64_t bytes);              /* offset, or SHMR_NOWHERE */
void shmr_arena_release(shmr *h, uint64_t offset, uint64_t room, bool elsewhere); /* others may have read it */
uint32_t *shmr_arena_record(shmr *h, uint64_t offset, uint64_t *start, uint64_t *room); /* of a used allocation */
int shmr_arena_grow(shmr *h, uint64_t bytes);                       /* take more extents */
void shmr_arena_trim(shmr *h);                                      /* give whole free extents back */
#define SHMR_NOT_ADOPTED (1u << 31) /* in `live`, at the number of a record */
void shmr_arena_adopt_extents(shmr *h, const struct shmr_slots *from, uint32_t *live, uint32_t live_count);

/* ---- shmr_block.c: call with h->lock held where marked (L) --------------------------------------------------- */
int shmr_record_new(shmr *h, uint32_t *block);                      /* (L) */
void shmr_reclaim(shmr *h, uint32_t block);                         /* (L) if it is free now */
void shmr_drain_freed(shmr *h);                                     /* (L) what the hints say */
void shmr_sweep(shmr *h);                                           /* (L) all my records */
void shmr_freed_by_me(shmr *h, uint32_t block);                     /* after state -> FREE, any owner */
int shmr_hold_locked(shmr *h, uint32_t block, uint32_t generation); /* (L) */
void shmr_drop_locked(shmr *h, uint32_t block);                     /* (L) */
void shmr_drop_frame_refs(shmr *h, uint32_t block);                 /* (L) */
bool shmr_add_group(shmr *h, uint32_t group);                       /* (L) */
bool shmr_owns_group(const shmr *h, uint32_t group);                /* (L) */
void shmr_trim_groups(shmr *h);                                     /* (L) give whole free ones back */
uint64_t shmr_take_allocation(shmr *h, uint64_t bytes);             /* (L) with all the tricks short of waiting */

/* ---- shmr_descriptor.c ---------------------------------------------------------------------------------------- */
uint32_t shmr_descriptor_check(const shmr_block *block);
int shmr_read_descriptor(shmr *h, uint32_t id, uint64_t state, shmr_block *out);
void shmr_save_descriptor(shmr *h, uint32_t id, uint64_t state);
void shmr_rename_saved(shmr *h, uint64_t before, uint64_t state);
void shmr_restore_descriptor(shmr *h, uint32_t slot, uint32_t id, uint32_t generation);
int shmr_references_at(shmr *h, uint32_t id, shmr_word **table, uint32_t *count);

/* ---- shmr_held.c: call with h->lock held --------------------------------------------------------------------- */
int shmr_held_init(shmr *h);
void shmr_held_fini(shmr *h);
void shmr_held_add(shmr *h, uint32_t block, uint64_t offset, uint64_t room);
void shmr_held_remove(shmr *h, uint32_t block, uint64_t offset, uint64_t room);
uint32_t shmr_held_find(shmr *h, uint64_t offset); /* block + 1, or 0 */

/* ---- shmr_numpy.c --------------------------------------------------------------------------------------------- */
struct shmr_numpy_handler { /* the ABI of NumPy's PyDataMem_Handler, version 1 */
    char name[127];
    uint8_t version;
    struct {
        void *context;
        void *(*malloc)(void *context, size_t size);
        void *(*calloc)(void *context, size_t count, size_t size);
        void *(*realloc)(void *context, void *address, size_t size);
        void (*free)(void *context, void *address, size_t size);
    } allocator;
};

/* ---- shmr_ring.c --------------------------------------------------------------------------------------------- */
int shmr_insert(shmr *h, uint32_t ring, uint32_t block, uint32_t generation, uint64_t limit);
bool shmr_ring_has_item(const shmr *h, uint32_t ring);
bool shmr_ring_has_room(const shmr *h, uint32_t ring);

/* ---- shmr_bell.c --------------------------------------------------------------------------------------------- */
void shmr_bell_ring(shmr_word *bell);
void shmr_bell_announce(shmr_word *bell);
bool shmr_bell_rung(const shmr_word *bell);
bool shmr_bell_asleep(const shmr_word *bell);
void shmr_bell_silence(shmr_word *bell);
int shmr_bell_wait(shmr_word *bell, int64_t end);

#define SHMR_LONG 4096 /* from here on copying takes long enough for an announcement to gain something */

/* ---- shmr_wait.c --------------------------------------------------------------------------------------------- */
struct shmr_source {
    shmr_word *waiters;                         /* the bitmap to register in */
    bool (*ready)(const shmr *h, uint32_t ring); /* cheap: is it worth an attempt? */
    uint32_t ring;
    bool baton; /* one waiter is woken for one item, so a waiter that leaves must look and pass it on */
};
int64_t shmr_now(void);
void shmr_announced(shmr *h);
void shmr_relieve(shmr *h);
void shmr_notify_one(shmr *h, shmr_word *waiters);
void shmr_notify_all(shmr *h, shmr_word *waiters);
bool shmr_any_waiter(const shmr_word *waiters);
int shmr_wait(shmr *h, const struct shmr_source *sources, int count, enum shmr_spin_kind kind,
              int (*attempt)(shmr *h, void *argument), void *argument, int64_t deadline);
bool shmr_look(shmr *h, bool for_space);
void shmr_return_doorbells(shmr *h);

/* ---- shmr_recover.c ------------------------------------------------------------------------------------------ */
int shmr_deaths_init(shmr *h);
void shmr_deaths_fini(shmr *h);
void shmr_close_pidfds(shmr *h);
uint64_t shmr_start_time(uint32_t pid);
static inline uint32_t shmr_namespace_tag(const shmr *h) { return (uint32_t)(h->pid_namespace & 0xfffu); }
bool shmr_alone(const shmr *h);
bool shmr_death_since(shmr *h, uint64_t deaths);
void shmr_adopt_orphans(shmr *h);  /* what those who left had: arenas, messages */
void shmr_adopt_messages(shmr *h); /* only of those who left with messages that nobody else can insert */
void shmr_retry_inserts(shmr *h);
bool shmr_inherit(shmr *h, uint32_t slot);
void shmr_let_go(shmr *h); /* what is stamped by us, at a forced close */

#endif
