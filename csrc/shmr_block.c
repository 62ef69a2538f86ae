/* SPDX-License-Identifier: BSD-3-Clause */
/* Blocks: the state word of a record is the only truth about one, and every change of it is one CAS that
 * expects the whole old word (owner and generation included).
 *
 *      FREE --claim--> CLAIMED(me) --commit--> COMMITTED(ring,me) --lease--> LEASED(me) --release--> FREE
 *        |                 '--abort--> FREE                                      '--commit--> COMMITTED (forward)
 *        '--share / publish--> SHARED, alive while any holder bit is set --drop of the last--> FREE
 *
 * I1  Only the owner of a record's group takes it out of FREE.
 * I2  The generation grows with each commit, share and publish: stale words and references never match.
 * I3  A holder bit is set only while another bit or a leased frame keeps the block alive, and the version is
 *     counted up after it and before that other right ends; so a sweep that finds no bits between two equal
 *     readings of the version has found none at one instant.
 * I4  A frame that names blocks keeps them held by its allocator until its record is reclaimed.
 */
#include <errno.h>

#include "shmr_internal.h"

#define GROUP_RESERVED (UINT64_C(1) << 32)

/* ---- records --------------------------------------------------------------------------------------------------- */

static bool push_u32(uint32_t **array, uint32_t *count, uint32_t *room, uint32_t value) {
    if (*count == *room) {
        uint32_t more = *room ? *room * 2 : 64;
        uint32_t *grown = realloc(*array, more * sizeof **array);
        if (!grown) return false;
        *array = grown;
        *room = more;
    }
    (*array)[(*count)++] = value;
    return true;
}

static void own_group(shmr *h, uint32_t group, bool own) {
    uint64_t bit = UINT64_C(1) << (group % 64);
    h->own_groups[group / 64] = own ? h->own_groups[group / 64] | bit : h->own_groups[group / 64] & ~bit;
}

bool shmr_owns_group(const shmr *h, uint32_t group) { return h->own_groups[group / 64] >> (group % 64) & 1; }

/* A group that this process now owns: its free records become ours to give. False: no memory to remember it in. */
bool shmr_add_group(shmr *h, uint32_t group) {
    if (!push_u32(&h->my_groups, &h->my_group_count, &h->my_group_room, group)) return false;
    own_group(h, group, true);
    for (uint32_t i = SHMR_GROUP; i-- > 0;) {
        uint32_t block = group * SHMR_GROUP + i;
        uint64_t s = shmr_load_acquire(&shmr_record_at(h, block)->state); /* A2 W18 */
        if (h->record_flags[block] & SHMR_MINE) continue; /* adopted alive; if it is free by now, a sweep finds it */
        if (h->holds[block]) continue;                    /* rubbish: what is held cannot be free */
        if (shmr_state_kind(s) == SHMR_FREE) /* else rubbish, without memory: out of use */
            push_u32(&h->free_records, &h->free_record_count, &h->free_record_room, block);
    }
    return true;
}

/* Whoever adopts the dead would own all groups in the end, and nobody else could allocate. */
void shmr_trim_groups(shmr *h) {
    uint32_t kept = 0;
    for (uint32_t i = 0; i < h->my_group_count; i++) {
        uint32_t group = h->my_groups[i];
        bool used = false;
        for (uint32_t k = 0; k < SHMR_GROUP && !used; k++) used = h->record_flags[group * SHMR_GROUP + k] & SHMR_MINE;
        uint64_t mine = GROUP_RESERVED | (h->self + 1);
        if (used || !shmr_cas_seq_cst(&shmr_group_at(h, group)->owner, &mine, GROUP_RESERVED)) /* S3 R7 */
            h->my_groups[kept++] = group;
        else
            own_group(h, group, false);
    }
    if (kept == h->my_group_count) return;
    h->my_group_count = kept;
    uint32_t left = 0;
    for (uint32_t i = 0; i < h->free_record_count; i++) {
        uint32_t block = h->free_records[i];
        if (shmr_owns_group(h, block / SHMR_GROUP)) h->free_records[left++] = block;
    }
    h->free_record_count = left;
    shmr_notify_all(h, shmr_header_of(h)->extent_waiters);
}

static int take_group(shmr *h) {
    for (uint32_t n = 0; n < 2 * h->g.groups; n++) { /* those in memory first: there may be room for no other */
        uint32_t i = (h->group_hint + n) % h->g.groups;
        shmr_word *word = &shmr_group_at(h, i)->owner;
        uint64_t seen = shmr_load_seq_cst(word); /* S3 A7: the look after registering */
        if ((uint32_t)seen || shmr_owns_group(h, i) || (n < h->g.groups && !(seen & GROUP_RESERVED))) continue;
        if (!shmr_cas_acquire(word, &seen, seen | (h->self + 1))) continue; /* A7 W1 */
        if (!(seen & GROUP_RESERVED)) {
            uint64_t bytes = SHMR_GROUP * sizeof(struct shmr_record);
            int status = shmr_reserve(h, h->g.records_at + i * bytes, bytes);
            if (status != SHMR_OK) {
                shmr_store_release(word, 0); /* R7 W17 */
                return status;
            }
            shmr_or_release(word, GROUP_RESERVED); /* R7 W17 */
        }
        h->group_hint = i + 1;
        if (shmr_add_group(h, i)) return SHMR_OK;
        shmr_store_release(word, GROUP_RESERVED); /* R7 W17 */
        return shmr_fail(SHMR_SYSTEM, ENOMEM, "list of records");
    }
    return shmr_fail(SHMR_NO_MEMORY, 0, "every block record is in use: too many live blocks");
}

int shmr_record_new(shmr *h, uint32_t *block) {
    if (!h->free_record_count) shmr_drain_freed(h);
    while (!h->free_record_count) {
        int status = take_group(h);
        if (status == SHMR_OK) continue; /* usually done, but all its records may be out of use */
        shmr_sweep(h);
        if (!h->free_record_count) return status;
    }
    *block = h->free_records[--h->free_record_count];
    return SHMR_OK;
}

/* What we drop may be reclaimed and have references in turn (rubbish only, but then any number): no recursion. */
void shmr_drop_frame_refs(shmr *h, uint32_t block) {
    struct shmr_frame_refs *refs = h->frame_refs[block], first = {0};
    if (!refs) return;
    h->frame_refs[block] = NULL;
    refs->next = h->dropping;
    h->dropping = refs;
    if (refs->next) return; /* somebody below us on the stack is at it */
    refs->next = &first;
    while ((refs = h->dropping) != &first) {
        h->dropping = refs->next;
        for (uint32_t i = 0; i < refs->count; i++) shmr_drop_locked(h, refs->blocks[i]);
        free(refs);
    }
    h->dropping = NULL;
}

static bool no_holders(const struct shmr_record *r) {
    uint64_t version = shmr_load_seq_cst(&r->version); /* S4 W12 */
    for (int w = 0; w < SHMR_HOLDER_WORDS; w++)
        if (shmr_load_seq_cst(&r->holders[w])) return false; /* S4 */
    return shmr_load_seq_cst(&r->version) == version; /* S4 W12 I3 */
}

/* SHARED with no holder -> FREE; true if this call did it. Anybody may try: the CAS chooses one. */
static bool free_if_unheld(struct shmr_record *r) {
    uint64_t s = shmr_load_acquire(&r->state); /* A1 */
    if (shmr_state_kind(s) != SHMR_SHARED || !no_holders(r)) return false;
    return shmr_cas_seq_cst(&r->state, &s, shmr_state_pack(shmr_state_generation(s), 0, 0, 0, SHMR_FREE)); /* S2 R2 W13 */
}

void shmr_reclaim(shmr *h, uint32_t block) {
    if (!(h->record_flags[block] & SHMR_MINE) || h->holds[block]) return; /* what we hold is in use, whatever they say */
    struct shmr_record *r = shmr_record_at(h, block);
    uint64_t s = shmr_load_acquire(&r->state); /* A2: the releaser is done with the bytes */
    if (shmr_state_kind(s) == SHMR_SHARED && free_if_unheld(r)) s = 0;
    if (shmr_state_kind(s) != SHMR_FREE) return;
    h->record_flags[block] = 0;
    shmr_arena_release(h, h->places[block].offset, h->places[block].room, true);
    shmr_drop_frame_refs(h, block);
    push_u32(&h->free_records, &h->free_record_count, &h->free_record_room, block);
}

void shmr_drain_freed(shmr *h) {
    struct shmr_participant *me = shmr_participant_at(h, h->self);
    if (!shmr_load_seq_cst(&me->freed_hint)) return; /* S2: the look after registering */
    uint64_t hint = shmr_exchange_seq_cst(&me->freed_hint, 0); /* S2 W14 */
    for (uint32_t i = 0; hint && i < h->my_group_count; i++) {
        uint32_t group = h->my_groups[i];
        if (!(hint >> (group % 64) & 1)) continue;
        for (uint32_t w = 0; w < SHMR_GROUP / 64; w++) {
            shmr_word *word = &shmr_group_at(h, group)->freed[w];
            if (!shmr_load_relaxed(word)) continue; /* only a hint */
            uint64_t bits = shmr_exchange_acquire(word, 0); /* A8 W9 */
            for (; bits; bits &= bits - 1)
                shmr_reclaim(h, group * SHMR_GROUP + w * 64 + (uint32_t)__builtin_ctzll(bits));
        }
    }
}

void shmr_sweep(shmr *h) {
    shmr_drain_freed(h);
    for (uint32_t i = 0; i < h->my_group_count; i++)
        for (uint32_t k = 0; k < SHMR_GROUP; k++) {
            uint32_t block = h->my_groups[i] * SHMR_GROUP + k;
            if (h->record_flags[block] & SHMR_MINE) shmr_reclaim(h, block);
        }
}

/* A block has just become FREE by our hand: tell its allocator. A death in here only delays that (sweep). */
void shmr_freed_by_me(shmr *h, uint32_t block) {
    struct shmr_group *group = shmr_group_at(h, block / SHMR_GROUP);
    uint32_t index = block % SHMR_GROUP;
    uint32_t owner = (uint32_t)shmr_load_relaxed(&group->owner); /* may be stale: then a sweep finds it */
    if (owner == 0 || owner > h->g.config.participants) return;
    shmr_or_release(&group->freed[index / 64], UINT64_C(1) << (index % 64)); /* R8 W9 */
    struct shmr_participant *p = shmr_participant_at(h, owner - 1);
    shmr_or_seq_cst(&p->freed_hint, UINT64_C(1) << (block / SHMR_GROUP % 64)); /* S2 */
    shmr_notify_all(h, p->space_waiters);
    /* If somebody is short of whole extents, the owner, asleep on something else, may now have one to give. */
    if (shmr_any_waiter(shmr_header_of(h)->extent_waiters)) shmr_ring_all(h);
}

/* ---- memory for a block ---------------------------------------------------------------------------------------------- */

uint64_t shmr_take_allocation(shmr *h, uint64_t bytes) {
    if (!shmr_arena_has_warm(h, bytes)) shmr_drain_freed(h); /* what others have released is warmer than what is new */
    uint64_t offset = shmr_arena_allocate(h, bytes);
    if (offset != SHMR_NOWHERE) return offset;
    shmr_drain_freed(h);
    offset = shmr_arena_allocate(h, bytes);
    if (offset != SHMR_NOWHERE) return offset;
    if (shmr_arena_grow(h, bytes) == SHMR_OK) return shmr_arena_allocate(h, bytes);
    shmr_sweep(h);
    offset = shmr_arena_allocate(h, bytes);
    if (offset != SHMR_NOWHERE) return offset;
    shmr_arena_trim(h); /* what is ours and free may continue what is nobody's */
    return shmr_arena_grow(h, bytes) == SHMR_OK ? shmr_arena_allocate(h, bytes) : SHMR_NOWHERE;
}

struct claim_attempt {
    uint64_t bytes;
    const shmr_ref *refs;
    uint32_t count;
    int items;
    shmr_block *out;
    bool waits; /* and may be denied */
};

/* (L) Do we hold all that a frame is to name? Looked at in each attempt: another thread may drop it meanwhile. */
static bool all_held(shmr *h, const shmr_ref *refs, uint32_t count) {
    for (uint32_t i = 0; i < count; i++) {
        if (refs[i].block >= h->g.config.blocks || !h->holds[refs[i].block]) return false;
        uint64_t s = shmr_load_acquire(&shmr_record_at(h, refs[i].block)->state); /* A1 W11 */
        if (shmr_state_generation(s) != refs[i].generation) return false;
    }
    return true;
}

static int try_claim(shmr *h, void *argument) {
    struct claim_attempt *c = argument;
    int status = shmr_usable(h);
    if (status != SHMR_OK) return status;
    pthread_mutex_lock(&h->lock);
    if (!all_held(h, c->refs, c->count)) {
        pthread_mutex_unlock(&h->lock);
        return shmr_fail(SHMR_STALE, 0, "a frame may only name blocks that this process holds");
    }
    uint64_t room = shmr_arena_room(c->bytes), offset = shmr_take_allocation(h, c->bytes);
    uint32_t block;
    if (offset == SHMR_NOWHERE) {
        status = shmr_check_file(h); /* could it grow at all? */
        pthread_mutex_unlock(&h->lock);
        if (status != SHMR_OK) return status;
        struct shmr_participant *me = shmr_participant_at(h, h->self);
        if (c->waits && shmr_load_seq_cst(&me->denied)) { /* S6: a hint from an observer; nothing else depends on it */
            shmr_store_relaxed(&me->denied, 0); /* likewise */
            return SHMR_DENIED;
        }
        return c->items >= 0 && shmr_ring_has_item(h, (uint32_t)c->items) ? SHMR_ITEM_WAITS : SHMR_WOULD_BLOCK;
    }
    status = shmr_record_new(h, &block);
    if (status != SHMR_OK) {
        shmr_arena_release(h, offset, room, false);
        pthread_mutex_unlock(&h->lock);
        return status == SHMR_NO_MEMORY ? SHMR_WOULD_BLOCK : status;
    }
    struct shmr_record *r = shmr_record_at(h, block);
    uint64_t old = shmr_load_relaxed(&r->state); /* FREE and mine: I1 */
    uint32_t flags = c->count ? SHMR_HAS_REFERENCES : 0;
    uint64_t state = shmr_state_pack(shmr_state_generation(old), h->self, 0, flags, SHMR_CLAIMED);
    shmr_store_relaxed(&r->offset, offset); /* published by the store of the state */
    shmr_store_relaxed(&r->room, room);     /* likewise */
    shmr_store_relaxed(&r->references, c->count); /* likewise */
    uint64_t table = shmr_references_bytes(c->count);
    if (c->count) {
        uint64_t *entries = (uint64_t *)(void *)(shmr_arena_base(h) + offset);
        struct shmr_frame_refs *held = malloc(sizeof *held + c->count * sizeof(uint32_t));
        for (uint32_t i = 0; held && i < c->count; i++) {
            entries[i] = (uint64_t)c->refs[i].generation << 32 | c->refs[i].block;
            held->blocks[i] = c->refs[i].block;
            h->holds[c->refs[i].block]++; /* I4 */
        }
        if (!held) {
            push_u32(&h->free_records, &h->free_record_count, &h->free_record_room, block);
            shmr_arena_release(h, offset, room, false);
            pthread_mutex_unlock(&h->lock);
            return shmr_fail(SHMR_SYSTEM, ENOMEM, "table of references");
        }
        held->count = c->count;
        h->frame_refs[block] = held;
    }
    uint64_t start, whole;
    uint32_t *mark = shmr_arena_record(h, offset, &start, &whole);
    if (mark) *mark = block + 1; /* an address inside leads to this record, not to a second one */
    h->places[block] = (struct shmr_place){offset, room};
    h->record_flags[block] = SHMR_MINE;
    shmr_store_release(&r->state, state); /* R1 W3: a recoverer reads offset and room */
    pthread_mutex_unlock(&h->lock);
    c->out->attempts = 0;
    c->out->state = state;
    c->out->block = block;
    c->out->offset = h->g.arena_at + offset + table;
    c->out->room = room - table;
    c->out->references = c->count;
    return SHMR_OK;
}

static bool space_ready(const shmr *h, uint32_t unused) {
    (void)unused;
    return shmr_load_relaxed(&shmr_participant_at(h, h->self)->freed_hint) != 0; /* only a hint */
}

/* It waits for memory no more, if it did. Of threads that claim at once, as those of main may, none is observed. */
static int sated(shmr *h, int status) {
    shmr_word *starving = &shmr_participant_at(h, h->self)->starving;
    if (shmr_load_relaxed(starving)) shmr_store_relaxed(starving, 0); /* for observers; likewise */
    return status;
}

int shmr_claim(shmr *h, uint64_t bytes, const shmr_ref *refs, uint32_t count, int items, int64_t deadline,
               shmr_block *out) {
    int status = shmr_usable(h);
    if (status != SHMR_OK) return status;
    if (count > SHMR_MAX_REFS || bytes > UINT64_MAX / 2)
        return shmr_fail(SHMR_BAD_ARGUMENT, 0, "too many references, or bytes");
    uint64_t total = (bytes ? bytes : 1) + shmr_references_bytes(count);
    if (total > h->g.config.arena_bytes) return shmr_fail(SHMR_TOO_LARGE, 0, "larger than the memory budget");
    status = shmr_enter(h);
    if (status != SHMR_OK) return status;
    struct claim_attempt attempt = {total, refs, count, items, out, false};
    status = try_claim(h, &attempt);
    if (status == SHMR_WOULD_BLOCK && deadline == 0 && shmr_look(h, true)) status = try_claim(h, &attempt);
    if (status == SHMR_OK) {
        /* Of large blocks some are kept free: who never sleeps gives them back here if others are short. */
        if (total >= SHMR_LARGE_MIN) shmr_relieve(h);
        return sated(h, status); /* the pin is now that of the claim */
    }
    if (status != SHMR_WOULD_BLOCK || deadline == 0) return shmr_leave(h, sated(h, status));

    struct shmr_participant *me = shmr_participant_at(h, h->self);
    struct shmr_source sources[3] = {
        {me->space_waiters, space_ready, 0, false},
        {shmr_header_of(h)->extent_waiters, NULL, 0, false},
        {items >= 0 ? shmr_ring_at(h, (uint32_t)items)->item_waiters : NULL, shmr_ring_has_item,
         items >= 0 ? (uint32_t)items : 0, true},
    };
    shmr_and_seq_cst(&me->denied, 0);         /* S6 W14: whoever denied us before meant what we waited for then */
    attempt.waits = true;
    shmr_store_relaxed(&me->starving, total); /* for observers */
    status = shmr_wait(h, sources, items >= 0 ? 3 : 2, SHMR_SPIN_SPACE, try_claim, &attempt, deadline);
    /* Who was interrupted comes back at once. He may have been by an observer, who asks where he is. */
    if (status != SHMR_INTERRUPTED) sated(h, status);
    return status == SHMR_OK ? status : shmr_leave(h, status);
}

/* ---- ends ---------------------------------------------------------------------------------------------------------------- */

static int end_block(shmr *h, shmr_block *block, enum shmr_state from) {
    if (shmr_usable(h) == SHMR_FORKED) return SHMR_FORKED;
    if (block->block >= h->g.config.blocks || shmr_state_kind(block->state) != from ||
        shmr_state_owner(block->state) != h->self)
        return SHMR_STALE;
    struct shmr_record *r = shmr_record_at(h, block->block);
    uint64_t expected = block->state;
    if (!shmr_cas_seq_cst(&r->state, &expected,
                          shmr_state_pack(shmr_state_generation(expected), 0, 0, 0, SHMR_FREE))) /* S2 R2 */
        return SHMR_STALE;
    block->state = 0;
    if (from == SHMR_CLAIMED) shmr_announced(h);
    struct shmr_participant *me = shmr_participant_at(h, h->self);
    pthread_mutex_lock(&h->lock);
    bool mine = h->record_flags[block->block] & SHMR_MINE;
    if (mine) shmr_reclaim(h, block->block);
    shmr_tally(from == SHMR_CLAIMED ? &me->aborted : &me->released, 1);
    pthread_mutex_unlock(&h->lock);
    if (mine)
        shmr_notify_all(h, me->space_waiters);
    else
        shmr_freed_by_me(h, block->block);
    shmr_pin(h, -1);
    return SHMR_OK;
}

int shmr_abort(shmr *h, shmr_block *block) { return end_block(h, block, SHMR_CLAIMED); }
int shmr_release(shmr *h, shmr_block *block) { return end_block(h, block, SHMR_LEASED); }

/* ---- by reference -------------------------------------------------------------------------------------------------------- */

/* Count one more reason to hold `block`; the first sets our bit. The caller knows that it is alive. */
int shmr_hold_locked(shmr *h, uint32_t block, uint32_t generation) {
    struct shmr_record *r = shmr_record_at(h, block);
    uint64_t bit = UINT64_C(1) << (h->self % 64);
    shmr_word *word = &r->holders[h->self / 64];
    if (h->holds[block]) {
        uint64_t s = shmr_load_acquire(&r->state); /* A1 W11 */
        if (shmr_state_kind(s) != SHMR_SHARED || shmr_state_generation(s) != generation) return SHMR_STALE;
        h->holds[block]++;
        return SHMR_OK;
    }
    shmr_or_seq_cst(word, bit);           /* S4 W12 */
    shmr_add_seq_cst(&r->version, 1);     /* S4 W12 I3 */
    uint64_t s = shmr_load_seq_cst(&r->state); /* S4 A1 W12 */
    if (shmr_state_kind(s) != SHMR_SHARED || shmr_state_generation(s) != generation) {
        shmr_and_seq_cst(word, ~bit); /* S4 W16 */
        if (free_if_unheld(r)) shmr_freed_by_me(h, block);
        return SHMR_STALE;
    }
    h->holds[block] = 1;
    if (!(h->record_flags[block] & SHMR_MINE)) {
        uint64_t offset = shmr_load_relaxed(&r->offset), room = shmr_load_relaxed(&r->room); /* after A1 */
        if (offset % 64 || !room || room > h->g.config.arena_bytes || offset > h->g.config.arena_bytes - room) {
            h->holds[block] = 0;
            shmr_and_seq_cst(word, ~bit); /* S4 W16 */
            return shmr_fail(SHMR_CORRUPT, 0, "bounds of a shared block");
        }
        h->places[block] = (struct shmr_place){offset, room};
        shmr_held_add(h, block, offset, room);
    }
    return SHMR_OK;
}

void shmr_drop_locked(shmr *h, uint32_t block) {
    SHMR_INVARIANT(I4, h->holds[block] > 0);
    if (!h->holds[block] || --h->holds[block]) return;
    struct shmr_record *r = shmr_record_at(h, block);
    bool mine = h->record_flags[block] & SHMR_MINE;
    if (!mine) shmr_held_remove(h, block, h->places[block].offset, h->places[block].room);
    shmr_and_seq_cst(&r->holders[h->self / 64], ~(UINT64_C(1) << (h->self % 64))); /* S4 */
    if (mine)
        shmr_reclaim(h, block);
    else if (free_if_unheld(r))
        shmr_freed_by_me(h, block);
}

static int ref_usable(shmr *h, uint32_t block) {
    if (shmr_usable(h) == SHMR_FORKED) return SHMR_FORKED;
    if (shmr_count_get(&h->left)) return SHMR_STALE; /* our holder bit may be somebody else's by now */
    return block < h->g.config.blocks ? SHMR_OK : SHMR_STALE;
}

int shmr_hold(shmr *h, uint32_t block, uint32_t generation, shmr_ref *out) {
    int status = shmr_enter(h);
    if (status != SHMR_OK) return status;
    status = ref_usable(h, block);
    if (status != SHMR_OK) return shmr_leave(h, status);
    pthread_mutex_lock(&h->lock);
    status = shmr_hold_locked(h, block, generation);
    if (status == SHMR_OK) {
        struct shmr_record *r = shmr_record_at(h, block);
        out->block = block;
        out->generation = generation;
        out->offset = h->g.arena_at + h->places[block].offset;
        out->length = shmr_load_relaxed(&r->length); /* fixed while held */
        if (out->length > h->places[block].room) out->length = h->places[block].room;
    }
    pthread_mutex_unlock(&h->lock);
    return status == SHMR_OK ? SHMR_OK : shmr_leave(h, status); /* the pin is now that of the hold */
}

int shmr_drop(shmr *h, uint32_t block, uint32_t generation) {
    int status = ref_usable(h, block);
    if (status != SHMR_OK) return status;
    pthread_mutex_lock(&h->lock);
    uint64_t s = shmr_load_acquire(&shmr_record_at(h, block)->state); /* A1 W11 */
    if (!h->holds[block] || shmr_state_generation(s) != generation || shmr_state_kind(s) != SHMR_SHARED)
        status = SHMR_STALE;
    else
        shmr_drop_locked(h, block);
    pthread_mutex_unlock(&h->lock);
    if (status == SHMR_OK) {
        shmr_notify_all(h, shmr_participant_at(h, h->self)->space_waiters);
        shmr_pin(h, -1);
    }
    return status;
}

/* (L) A record, SHARED and held once by us, for memory of our own arena. */
static void become_shared(shmr *h, uint32_t block, uint64_t length) {
    struct shmr_record *r = shmr_record_at(h, block);
    uint64_t before = shmr_load_relaxed(&r->state);             /* own record */
    SHMR_INVARIANT(I1, shmr_state_kind(before) == SHMR_FREE || shmr_state_owner(before) == h->self);
    uint32_t generation = shmr_state_generation(before) + 1; /* I2 */
    shmr_store_relaxed(&r->length, length); /* published by the store of the state */
    for (int w = 0; w < SHMR_HOLDER_WORDS; w++) shmr_store_relaxed(&r->holders[w], 0); /* likewise */
    shmr_store_relaxed(&r->holders[h->self / 64], UINT64_C(1) << (h->self % 64));      /* likewise */
    h->holds[block] = 1;
    h->record_flags[block] = SHMR_MINE;
    shmr_store_release(&r->state, shmr_state_pack(generation, h->self, 0, 0, SHMR_SHARED)); /* R1 */
}

int shmr_publish(shmr *h, shmr_block *block, shmr_ref *out) {
    int status = shmr_usable(h);
    if (status != SHMR_OK) return status;
    if (block->block >= h->g.config.blocks || shmr_state_kind(block->state) != SHMR_CLAIMED ||
        shmr_state_owner(block->state) != h->self || block->references ||
        shmr_load_relaxed(&shmr_record_at(h, block->block)->state) != block->state) /* own record */
        return SHMR_STALE;
    if (block->length > block->room) return shmr_fail(SHMR_BAD_ARGUMENT, 0, "longer than the block");
    pthread_mutex_lock(&h->lock);
    become_shared(h, block->block, block->length);
    pthread_mutex_unlock(&h->lock);
    out->block = block->block;
    out->generation = shmr_state_generation(block->state) + 1;
    out->offset = block->offset;
    out->length = block->length;
    block->state = 0; /* the pin of the claim is now that of the hold */
    return SHMR_OK;
}

int shmr_share(shmr *h, const void *address, uint64_t bytes, shmr_ref *out) {
    int status = shmr_usable(h);
    if (status != SHMR_OK) return status;
    const char *arena = shmr_arena_base(h), *at = address;
    if (at < arena || at >= arena + h->g.config.arena_bytes) return SHMR_NOT_SHARED;
    uint64_t offset = (uint64_t)(at - arena), start, room;
    uint32_t block;
    pthread_mutex_lock(&h->lock);
    uint32_t *record = shmr_arena_record(h, offset, &start, &room);
    if (record && !*record) { /* an allocation of NumPy's, sent for the first time */
        status = shmr_record_new(h, &block);
        if (status == SHMR_OK) {
            struct shmr_record *r = shmr_record_at(h, block);
            shmr_store_relaxed(&r->offset, start); /* published by the store of the state */
            shmr_store_relaxed(&r->room, room);    /* likewise */
            h->places[block] = (struct shmr_place){start, room};
            become_shared(h, block, room);
            *record = block + 1;
        }
    } else if (record) {
        block = *record - 1;
    } else {
        uint32_t found = shmr_held_find(h, offset);
        block = found - 1;
        if (!found) status = SHMR_NOT_SHARED;
    }
    if (status == SHMR_OK) {
        struct shmr_record *r = shmr_record_at(h, block);
        uint64_t s = shmr_load_acquire(&r->state); /* A1 W11 */
        start = h->places[block].offset;
        room = h->places[block].room;
        if (shmr_state_kind(s) != SHMR_SHARED || !h->holds[block] || offset < start ||
            offset - start > room || bytes > room - (offset - start)) {
            status = SHMR_NOT_SHARED;
        } else {
            out->block = block;
            out->generation = shmr_state_generation(s);
            out->offset = offset - start;
            out->length = room;
        }
    }
    pthread_mutex_unlock(&h->lock);
    return status;
}

int shmr_allocated_here(shmr *h, const void *address) {
    const char *arena = shmr_arena_base(h), *at = address;
    if (at < arena || at >= arena + h->g.config.arena_bytes) return 0;
    uint64_t start, room;
    pthread_mutex_lock(&h->lock);
    int mine = shmr_arena_record(h, (uint64_t)(at - arena), &start, &room) != NULL;
    pthread_mutex_unlock(&h->lock);
    return mine;
}
