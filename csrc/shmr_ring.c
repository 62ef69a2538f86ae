/* SPDX-License-Identifier: BSD-3-Clause */
/* The stamped ring: any number of producers and consumers, each of which may die at any instruction.
 *
 *         lease_cursor                 commit_cursor
 *              v                             v
 *   ... taken  [c|g|b] [c|g|b] [c|g|b] [c|g|b] [c-1|..] ...      a slot is one word: cycle | generation | block
 *
 *   commit:  state CLAIMED(me) -> COMMITTED(ring,me,generation+1); then one CAS puts cycle|generation|block into
 *            the slot at commit_cursor: that CAS is the publication. Whoever comes next advances the cursor.
 *   lease:   one CAS on the *block's state* COMMITTED -> LEASED(me) takes the message and records its owner.
 *            Whoever comes next advances lease_cursor over slots whose block is no longer COMMITTED.
 *
 * I5  A slot is filled once a cycle, in order: position p only when every position below it is filled.
 * I6  lease_cursor passes p only after the block of p has left COMMITTED(generation): leases are strictly FIFO.
 * I7  A commit finds the ring full when `capacity` positions lie between the cursors: the committer (alone entitled to
 *     insert) then takes its block back, COMMITTED -> CLAIMED, and waits. Recovery may use the spare slots beyond.
 * I8  A message's number is given and its slot filled under one private lock: order per producer.
 *
 * Wrap-around: positions are 64 bits, cycles their upper part modulo 2^24; both are compared for equality only.
 * The ring without stamps: "naive circular queue" in R. Nikolaev, "A scalable, portable, and memory-efficient
 * lock-free FIFO queue", DISC 2019.
 */
#include <errno.h>

#include "shmr_internal.h"

/* After so many turns of a helping loop somebody must be writing rubbish: give up instead of spinning. */
#ifndef TURNS_MAX
#define TURNS_MAX (1u << 20)
#endif
#define NO_AGREEMENT "a ring's cursors and slots do not agree"

static uint32_t cycle_of(const shmr *h, uint32_t ring, uint64_t position) {
    return (uint32_t)((position >> h->g.shift[ring]) + 1) & SHMR_CYCLE_MASK;
}

/* Does the slot's block still wait to be leased, in this very cycle of its life? */
static bool is_waiting(const shmr *h, uint32_t ring, uint64_t slot, uint64_t *state) {
    uint32_t block = shmr_slot_block(slot);
    if (block >= h->g.config.blocks) return false;
    *state = shmr_load_seq_cst(&shmr_record_at(h, block)->state); /* S1 A1 W20 */
    return shmr_state_kind(*state) == SHMR_COMMITTED && shmr_state_ring(*state) == ring &&
           (shmr_state_generation(*state) & SHMR_SLOT_GENERATION_MASK) == shmr_slot_generation(slot);
}

static void advance_lease_cursor(shmr *h, uint32_t ring, uint64_t position) {
    struct shmr_ring *q = shmr_ring_at(h, ring);
    if (shmr_cas_seq_cst(&q->lease_cursor, &position, position + 1)) /* S5 R4 */
        shmr_notify_one(h, q->slot_waiters);
}

static int refusal(uint64_t closed) { return closed & SHMR_RING_POISONED ? shmr_poisoned() : SHMR_CLOSED; }

/* Put a COMMITTED block into the ring. WOULD_BLOCK: `limit` messages are in it. Only whom the state word names may
 * call this. */
int shmr_insert(shmr *h, uint32_t ring, uint32_t block, uint32_t generation, uint64_t limit) {
    struct shmr_ring *q = shmr_ring_at(h, ring);
    for (uint32_t turn = 0; turn < TURNS_MAX; turn++) {
        uint64_t position = shmr_load_acquire(&q->commit_cursor);  /* A5 W5 */
        /* The cursor's line is the consumers': look only when our last knowledge of it says that the ring is full. */
        uint64_t first = shmr_load_relaxed(&h->first_seen[ring]); /* ours alone; may lag */
        if ((int64_t)(position - first) >= (int64_t)limit) {
            first = shmr_load_seq_cst(&q->lease_cursor); /* S5 A4 W6: what lies before it is done with */
            shmr_store_relaxed(&h->first_seen[ring], first);
        }
        if ((int64_t)(position - first) >= (int64_t)limit) {
            uint64_t state, slot = shmr_load_acquire(shmr_slot_at(h, ring, first)); /* A3 W5 */
            if (shmr_slot_cycle(slot) == cycle_of(h, ring, first) && !is_waiting(h, ring, slot, &state)) {
                advance_lease_cursor(h, ring, first); /* help a slow or dead consumer */
                continue;
            }
            if (shmr_load_seq_cst(&q->lease_cursor) != first) continue; /* S5 A4 W6: it has moved: look again */
            return SHMR_WOULD_BLOCK;
        }
        shmr_word *at = shmr_slot_at(h, ring, position);
        uint64_t seen = shmr_load_acquire(at); /* A3 W5 */
        uint32_t cycle = cycle_of(h, ring, position);
        if (shmr_slot_cycle(seen) == cycle) { /* help a slow or dead producer */
            shmr_cas_release(&q->commit_cursor, &position, position + 1); /* R5 W5 */
            continue;
        }
        if (shmr_slot_cycle(seen) != ((cycle - 1) & SHMR_CYCLE_MASK)) continue; /* the cursor was stale */
        if (shmr_cas_seq_cst(at, &seen, shmr_slot_pack(cycle, generation, block))) { /* S1 R3: published */
            shmr_cas_release(&q->commit_cursor, &position, position + 1); /* R5 */
            return SHMR_OK;
        }
    }
    return shmr_poison(h, NO_AGREEMENT);
}

/* Take the oldest message. WOULD_BLOCK: empty. */
static int take(shmr *h, uint32_t ring, uint32_t *block, uint64_t *state) {
    struct shmr_ring *q = shmr_ring_at(h, ring);
    for (uint32_t turn = 0; turn < TURNS_MAX; turn++) {
        uint64_t first = shmr_load_acquire(&q->lease_cursor);               /* A4 W5 */
        uint64_t slot = shmr_load_seq_cst(shmr_slot_at(h, ring, first));    /* S1 A3 */
        uint32_t cycle = cycle_of(h, ring, first);
        if (shmr_slot_cycle(slot) != cycle) {
            if (shmr_slot_cycle(slot) == ((cycle - 1) & SHMR_CYCLE_MASK)) return SHMR_WOULD_BLOCK;
            continue; /* the cursor was stale */
        }
        uint64_t seen;
        if (!is_waiting(h, ring, slot, &seen)) {
            advance_lease_cursor(h, ring, first); /* help: taken already */
            continue;
        }
        /* The slot has 20 bits of the generation: if we slept for a million of them, the cursor has moved. */
        if (shmr_load_acquire(&q->lease_cursor) != first) continue; /* A4 W5 */
        uint64_t mine = shmr_state_pack(shmr_state_generation(seen), h->self, ring, shmr_state_flags(seen),
                                        SHMR_LEASED);
        if (shmr_cas_seq_cst(&shmr_record_at(h, shmr_slot_block(slot))->state, &seen, mine)) { /* S1 A1 R1 W20 */
            advance_lease_cursor(h, ring, first);
            *block = shmr_slot_block(slot);
            *state = mine;
            return SHMR_OK;
        }
    }
    return shmr_poison(h, NO_AGREEMENT);
}

/* ---- readiness, as cheap as it gets: a hint only ------------------------------------------------------------------- */

static bool slot_is_filled(const shmr *h, uint32_t ring) {
    uint64_t first = shmr_load_acquire(&shmr_ring_at(h, ring)->lease_cursor);  /* A4 W5 */
    uint64_t slot = shmr_load_seq_cst(shmr_slot_at(h, ring, first));           /* S1 A3 */
    return shmr_slot_cycle(slot) != ((cycle_of(h, ring, first) - 1) & SHMR_CYCLE_MASK);
}

bool shmr_ring_has_item(const shmr *h, uint32_t ring) {
    return slot_is_filled(h, ring) ||
           shmr_load_relaxed(&shmr_ring_at(h, ring)->closed); /* only a hint: the lease decides */
}

bool shmr_ring_has_room(const shmr *h, uint32_t ring) {
    const struct shmr_ring *q = shmr_ring_at(h, ring);
    uint64_t position = shmr_load_acquire(&q->commit_cursor); /* A5 W5 */
    uint64_t first = shmr_load_seq_cst(&q->lease_cursor);     /* S5 A4 W7 */
    return (int64_t)(position - first) < (int64_t)h->g.config.capacity[ring] || shmr_load_relaxed(&q->closed); /* hint */
}

int shmr_has_room(shmr *h, uint32_t ring) {
    if (ring >= h->g.config.rings || shmr_usable(h) != SHMR_OK) return 0;
    struct shmr_ring *q = shmr_ring_at(h, ring);
    for (uint32_t turn = 0; turn < TURNS_MAX; turn++) {
        uint64_t position = shmr_load_acquire(&q->commit_cursor); /* A5 W5 */
        uint64_t first = shmr_load_seq_cst(&q->lease_cursor);     /* S5 A4 W7 */
        if ((int64_t)(position - first) < (int64_t)h->g.config.capacity[ring]) return 1;
        uint64_t state, slot = shmr_load_acquire(shmr_slot_at(h, ring, first)); /* A3 W5 */
        if (shmr_slot_cycle(slot) != cycle_of(h, ring, first)) continue; /* the cursor was stale */
        if (is_waiting(h, ring, slot, &state)) return 0;
        advance_lease_cursor(h, ring, first); /* help a slow or dead consumer */
    }
    shmr_poison(h, NO_AGREEMENT);
    return 0;
}

uint64_t shmr_approx_fill(shmr *h, uint32_t ring) {
    if (ring >= h->g.config.rings) return 0;
    const struct shmr_ring *q = shmr_ring_at(h, ring);
    uint64_t first = shmr_load_acquire(&q->lease_cursor);     /* A4 W5 */
    uint64_t position = shmr_load_acquire(&q->commit_cursor); /* A5 W5 */
    int64_t fill = (int64_t)(position - first); /* either cursor may lag */
    if (fill < 0) return 0;
    return (uint64_t)fill > h->g.config.capacity[ring] ? h->g.config.capacity[ring] : (uint64_t)fill;
}

/* ---- commit ---------------------------------------------------------------------------------------------------------- */

struct commit_attempt {
    uint32_t ring;
    int items;
    shmr_block *block;
    uint32_t payload_crc;
};

static int try_commit(shmr *h, void *argument) {
    struct commit_attempt *c = argument;
    shmr_block *b = c->block;
    int status = shmr_usable(h);
    if (status != SHMR_OK) return status;
    struct shmr_ring *q = shmr_ring_at(h, c->ring);
    uint64_t closed = shmr_load_seq_cst(&q->closed); /* S6 A9 */
    if (closed) return refusal(closed);
    struct shmr_record *r = shmr_record_at(h, b->block);
    pthread_mutex_lock(&h->commit_lock[c->ring]);
    if (shmr_load_acquire(&r->state) != b->state) { /* A1 W11: a doubled call must not touch the descriptor */
        pthread_mutex_unlock(&h->commit_lock[c->ring]);
        return SHMR_STALE;
    }
    bool leased = shmr_state_kind(b->state) == SHMR_LEASED; /* a message of somebody's: it must survive our death here */
    if (leased) {
        pthread_mutex_lock(&h->undo_lock);
        shmr_save_descriptor(h, b->block, b->state);
    }
    b->seq = (uint64_t)h->epoch << 40 | (h->next_seq[c->ring] + 1);
    b->producer = h->self;
    uint64_t attempts = leased ? b->attempts : 0;
    shmr_store_relaxed(&r->length, b->length); /* the descriptor: published by R1 below */
    shmr_store_relaxed(&r->seq, b->seq);
    shmr_store_relaxed(&r->tag, b->tag);
    shmr_store_relaxed(&r->detail, (uint64_t)b->producer << 48 | (uint64_t)(b->kind & 0xffff) << 32 |
                                       attempts << 16 | b->spec_bytes);
    for (uint32_t i = 0; i < (b->spec_bytes + 7) / 8; i++) {
        uint64_t word;
        memcpy(&word, b->spec + 8 * i, 8);
        shmr_store_relaxed(&r->spec[i], word);
    }
    b->kind &= 0xffff;
    shmr_store_relaxed(&r->check, (uint64_t)shmr_descriptor_check(b) << 32 | c->payload_crc);

    uint32_t generation = shmr_state_generation(b->state) + 1; /* I2 */
    uint64_t expected = b->state;
    uint64_t committed = shmr_state_pack(generation, h->self, c->ring, shmr_state_flags(b->state), SHMR_COMMITTED);
    bool done = shmr_cas_release(&r->state, &expected, committed); /* R1 */
    if (!done) {
        if (leased) pthread_mutex_unlock(&h->undo_lock);
        pthread_mutex_unlock(&h->commit_lock[c->ring]);
        return SHMR_STALE;
    }
    status = shmr_insert(h, c->ring, b->block, generation, h->g.config.capacity[c->ring]);
    if (status == SHMR_OK) {
        h->next_seq[c->ring]++; /* I8 */
        struct shmr_participant *me = shmr_participant_at(h, h->self);
        shmr_tally(&me->committed[c->ring], 1);
        shmr_tally(&me->bytes_committed[c->ring], b->length);
    } else { /* I7: only we could insert it, so nobody has seen it */
        uint64_t before = b->state; /* a lease stays one, of what was leased: its message must not be lost */
        b->state = shmr_state_pack(generation, h->self, shmr_state_ring(before), shmr_state_flags(before),
                                   shmr_state_kind(before));
        if (leased) shmr_rename_saved(h, before, b->state);
        shmr_cas_acq_rel(&r->state, &committed, b->state); /* A1 R1 W3: nothing is restored before it is a lease again */
        if (leased) shmr_restore_descriptor(h, h->self, b->block, generation);
    }
    if (leased) pthread_mutex_unlock(&h->undo_lock);
    pthread_mutex_unlock(&h->commit_lock[c->ring]);
    if (status == SHMR_WOULD_BLOCK && c->items >= 0 && shmr_ring_has_item(h, (uint32_t)c->items))
        return SHMR_ITEM_WAITS;
    return status;
}

int shmr_commit(shmr *h, uint32_t ring, int payload_check, int items, int64_t deadline, shmr_block *block) {
    int status = shmr_usable(h);
    if (status != SHMR_OK) return status;
    uint32_t kind = shmr_state_kind(block->state);
    if (ring >= h->g.config.rings || block->spec_bytes > SHMR_SPEC_BYTES || block->length > block->room)
        return shmr_fail(SHMR_BAD_ARGUMENT, 0, "ring, spec or length out of range");
    if (block->block >= h->g.config.blocks || (kind != SHMR_CLAIMED && kind != SHMR_LEASED) ||
        shmr_state_owner(block->state) != h->self)
        return SHMR_STALE;
    shmr_announced(h);
    struct commit_attempt attempt = {ring, items, block, 0};
    shmr_retry_inserts(h); /* they are older */
    if (payload_check) attempt.payload_crc = shmr_crc32c(0, h->base + block->offset, block->length);
    status = try_commit(h, &attempt);
    if (status == SHMR_WOULD_BLOCK && deadline != 0) {
        struct shmr_ring *q = shmr_ring_at(h, ring);
        struct shmr_source sources[2] = {
            {q->slot_waiters, shmr_ring_has_room, ring, true},
            {items >= 0 ? shmr_ring_at(h, (uint32_t)items)->item_waiters : NULL, shmr_ring_has_item,
             items >= 0 ? (uint32_t)items : 0, true},
        };
        status = shmr_wait(h, sources, items >= 0 ? 2 : 1, SHMR_SPIN_SLOT, try_commit, &attempt, deadline);
    }
    if (status != SHMR_OK) return status;
    block->state = 0;
    shmr_notify_one(h, shmr_ring_at(h, ring)->item_waiters);
    shmr_pin(h, -1);
    return SHMR_OK;
}

/* ---- lease ------------------------------------------------------------------------------------------------------------ */

struct lease_attempt {
    uint32_t ring;
    shmr_block *out;
    bool sequence_broken;
};

/* While only one participant ever leases, a producer's numbers must come without a gap; with several, each
 * sees a growing part of them. Exempt is what comes late because of a death: delivered again, or inserted only after
 * the producer's place in the table had gone to another. */
static bool in_sequence(shmr *h, uint32_t ring, const shmr_block *b, bool sole) {
    uint64_t *last = &h->last_seq[ring][b->producer], before = *last;
    if (b->seq > before) *last = b->seq;
    if (b->attempts || before == 0 /* none of it seen yet */ || b->seq >> 40 < before >> 40) return true;
    if (before >> 40 != b->seq >> 40) /* another life of that slot of the table */
        return !sole || (b->seq & ((UINT64_C(1) << 40) - 1)) == 1;
    return sole ? b->seq == before + 1 : b->seq > before;
}

static int try_lease(shmr *h, void *argument) {
    struct lease_attempt *a = argument;
    int status = shmr_usable(h);
    if (status != SHMR_OK) return status;
    struct shmr_ring *q = shmr_ring_at(h, a->ring);
    uint64_t lessee = shmr_load_relaxed(&q->lessee); /* before the take: ordered by A1 of the next one */
    if (lessee != h->self + 1 && lessee != UINT64_MAX) {
        uint64_t none = 0;
        if (!shmr_cas_acq_rel(&q->lessee, &none, h->self + 1) && none != h->self + 1) /* A10 R10 W10 */
            shmr_store_release(&q->lessee, UINT64_MAX); /* R10 W10 */
    }
    uint32_t block = 0;
    uint64_t state = 0;
    uint64_t closed = shmr_load_seq_cst(&q->closed); /* S6 A9: first, so that what was committed before is found */
    if (closed & SHMR_RING_POISONED) return shmr_poisoned();
    pthread_mutex_lock(&h->lease_lock[a->ring]);
    status = take(h, a->ring, &block, &state);
    if (status == SHMR_OK) {
        shmr_tally(&shmr_participant_at(h, h->self)->leased[a->ring], 1);
        status = shmr_read_descriptor(h, block, state, a->out);
        if (status == SHMR_OK) {
            bool sole = shmr_load_acquire(&q->lessee) == h->self + 1; /* A10 W10 */
            a->sequence_broken = !in_sequence(h, a->ring, a->out, sole);
        } else {
            a->out->state = state; /* so that it can be given back */
            a->out->block = block;
            a->out->kind = 0;
            /* Whose it was cannot be told: begin to count afresh, or the next one would look like a gap. */
            memset(h->last_seq[a->ring], 0, h->g.config.participants * sizeof(uint64_t));
        }
    }
    pthread_mutex_unlock(&h->lease_lock[a->ring]);
    if (status == SHMR_WOULD_BLOCK && closed) return SHMR_CLOSED;
    return status;
}

int shmr_check_payload(shmr *h, const shmr_block *block) {
    uint32_t stored = (uint32_t)shmr_load_relaxed(&shmr_record_at(h, block->block)->check); /* leased by us */
    if (stored == 0 || stored == shmr_crc32c(0, h->base + block->offset, block->length)) return SHMR_OK;
    return shmr_fail(SHMR_CORRUPT, 0, "checksum of the payload");
}

int shmr_lease(shmr *h, uint32_t ring, int payload_check, int64_t deadline, shmr_block *out) {
    int status = shmr_usable(h);
    if (status != SHMR_OK) return status;
    if (ring >= h->g.config.rings) return shmr_fail(SHMR_BAD_ARGUMENT, 0, "no such ring");
    status = shmr_enter(h);
    if (status != SHMR_OK) return status;
    struct lease_attempt attempt = {ring, out, false};
    out->state = 0;
    out->kind = 0;
    shmr_retry_inserts(h);
    status = try_lease(h, &attempt);
    if (status == SHMR_WOULD_BLOCK && deadline == 0 && shmr_look(h, false)) status = try_lease(h, &attempt);
    if (status == SHMR_WOULD_BLOCK && deadline != 0) {
        struct shmr_source source = {shmr_ring_at(h, ring)->item_waiters, shmr_ring_has_item, ring, true};
        status = shmr_wait(h, &source, 1, SHMR_SPIN_ITEM, try_lease, &attempt, deadline);
    }
    if (status != SHMR_OK && out->state == 0) return shmr_leave(h, status);
    shmr_retry_inserts(h); /* the pin is now that of the lease */
    if (status == SHMR_OK && attempt.sequence_broken) {
        out->kind = 0;
        status = shmr_fail(SHMR_CORRUPT, 0, "sequence number: a message is missing, doubled or out of order");
    }
    if (status == SHMR_OK && payload_check) status = shmr_check_payload(h, out);
    if (status == SHMR_CORRUPT) shmr_release(h, out); /* reported, and out of everybody's way */
    return status;
}

/* ---- the rest ----------------------------------------------------------------------------------------------------------- */

int shmr_close_ring(shmr *h, uint32_t ring) {
    int status = shmr_usable(h);
    if (status != SHMR_OK) return status;
    if (ring >= h->g.config.rings) return shmr_fail(SHMR_BAD_ARGUMENT, 0, "no such ring");
    shmr_or_seq_cst(&shmr_ring_at(h, ring)->closed, SHMR_RING_CLOSED); /* S6 R9 */
    shmr_ring_all(h);
    return SHMR_OK;
}

static int item_waits(shmr *h, void *argument) {
    uint32_t ring = *(uint32_t *)argument;
    int status = shmr_usable(h);
    if (status != SHMR_OK) return status;
    uint64_t closed = shmr_load_seq_cst(&shmr_ring_at(h, ring)->closed); /* S6 A9: before the look */
    if (closed & SHMR_RING_POISONED) return shmr_poisoned();
    if (slot_is_filled(h, ring)) return SHMR_OK;
    return closed ? SHMR_CLOSED : SHMR_WOULD_BLOCK;
}

int shmr_wait_item(shmr *h, uint32_t ring, int64_t deadline) {
    if (ring >= h->g.config.rings) return shmr_fail(SHMR_BAD_ARGUMENT, 0, "no such ring");
    int status = item_waits(h, &ring);
    if (status != SHMR_WOULD_BLOCK || deadline == 0) return status;
    struct shmr_source source = {shmr_ring_at(h, ring)->item_waiters, shmr_ring_has_item, ring, true};
    status = shmr_enter(h);
    if (status != SHMR_OK) return status;
    return shmr_leave(h, shmr_wait(h, &source, 1, SHMR_SPIN_ITEM, item_waits, &ring, deadline));
}

static int is_idle(shmr *h, void *argument) {
    uint32_t ring = *(uint32_t *)argument;
    int status = shmr_usable(h);
    if (status != SHMR_OK) return status;
    const struct shmr_ring *q = shmr_ring_at(h, ring);
    uint64_t first = shmr_load_seq_cst(&q->lease_cursor);                        /* S2 A4 */
    uint64_t position = shmr_load_acquire(&q->commit_cursor), before;            /* A5: may lag */
    if ((int64_t)(position - first) > 0 && slot_is_filled(h, ring)) return SHMR_WOULD_BLOCK; /* spares the scan */
    for (uint32_t turn = 0;; turn++, position++) { /* the first slot that is empty */
        if (turn == TURNS_MAX) return SHMR_WOULD_BLOCK; /* rubbish */
        before = shmr_load_seq_cst(shmr_slot_at(h, ring, position)); /* S2 A3 W19 */
        if (shmr_slot_cycle(before) == ((cycle_of(h, ring, position) - 1) & SHMR_CYCLE_MASK)) break;
    }
    for (uint32_t g = 0; g < h->g.groups; g++) {
        if (!(shmr_load_acquire(&shmr_group_at(h, g)->owner) >> 32)) continue; /* A7 W19: never reserved */
        for (uint32_t i = 0; i < SHMR_GROUP; i++) {
            uint64_t s = shmr_load_seq_cst(&shmr_record_at(h, g * SHMR_GROUP + i)->state); /* S2 */
            uint32_t kind = shmr_state_kind(s);
            if ((kind == SHMR_COMMITTED || kind == SHMR_LEASED) && shmr_state_ring(s) == ring)
                return SHMR_WOULD_BLOCK;
        }
    }
    /* What was committed meanwhile may lie where we had looked, its parent be done by the time we came there. */
    return shmr_load_seq_cst(shmr_slot_at(h, ring, position)) == before ? SHMR_OK : SHMR_WOULD_BLOCK; /* S2 A3 W19 */
}

int shmr_wait_idle(shmr *h, uint32_t ring, int64_t deadline) {
    if (ring >= h->g.config.rings) return shmr_fail(SHMR_BAD_ARGUMENT, 0, "no such ring");
    int status = is_idle(h, &ring);
    if (status != SHMR_WOULD_BLOCK || deadline == 0) return status;
    struct shmr_source source = {shmr_header_of(h)->idle_waiters, NULL, ring, false};
    status = shmr_enter(h);
    if (status != SHMR_OK) return status;
    return shmr_leave(h, shmr_wait(h, &source, 1, SHMR_SPIN_SPACE, is_idle, &ring, deadline));
}

void shmr_notify_idle(shmr *h) { shmr_notify_all(h, shmr_header_of(h)->idle_waiters); }
