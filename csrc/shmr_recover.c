/* SPDX-License-Identifier: BSD-3-Clause */
/* Death: found out from the kernel alone (pidfd), never from time; cleared up by CASes from "stamped by the dead",
 * so that everything here may run while all others go on, may be repeated, and may itself be killed.
 *
 *   residue of the dead d                    what recovery makes of it
 *   CLAIMED(d)                               FREE: never published, never seen
 *   COMMITTED(d), in its ring                nothing: it is a message like any other
 *   COMMITTED(d), not in its ring            the insert is finished (only d could do it, and d is dead)
 *   LEASED(d)                                back into its ring with one attempt more; or LEASED by the recoverer
 *   holder bits                              first ours on what d's live frames name, then d's cleared
 *   waiter bits, doorbells, swallowed wakes  cleared, given back; every doorbell rung
 *   extents, groups                          adopted: the allocator is rebuilt from the block table
 */
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "shmr_internal.h"

/* ---- who is alive? ---------------------------------------------------------------------------------------------------- */

int shmr_deaths_init(shmr *h) {
    h->pidfds = malloc(h->g.config.participants * sizeof *h->pidfds);
    h->pidfd_lives = calloc(h->g.config.participants, sizeof *h->pidfd_lives);
    for (uint32_t i = 0; h->pidfds && i < h->g.config.participants; i++) h->pidfds[i].fd = -1;
    if (!h->pidfds || !h->pidfd_lives) return shmr_fail(SHMR_SYSTEM, ENOMEM, "malloc");
    return SHMR_OK;
}

void shmr_close_pidfds(shmr *h) {
    pthread_mutex_lock(&h->death_lock);
    for (uint32_t i = 0; h->pidfds && i < h->g.config.participants; i++) shmr_file_close(&h->pidfds[i]);
    pthread_mutex_unlock(&h->death_lock);
}

void shmr_deaths_fini(shmr *h) {
    shmr_close_pidfds(h);
    free(h->pidfds);
    free(h->pidfd_lives);
    free(h->again);
}

/* When it started, in ticks: field 22 of its stat; 0 if there is no such process. */
uint64_t shmr_start_time(uint32_t pid) {
    char path[64], text[1024];
    /* Of its first thread: what the process's own file says of itself is made up by emulators of other processors. */
    snprintf(path, sizeof path, "/proc/%u/task/%u/stat", pid, pid);
    FILE *file = fopen(path, "re");
    if (!file) return 0;
    size_t n = fread(text, 1, sizeof text - 1, file);
    fclose(file);
    text[n] = 0;
    char *at = strrchr(text, ')'); /* the name may contain anything */
    for (int field = 2; at && field < 22; field++) at = strchr(at + 1, ' ');
    return at ? strtoull(at + 1, NULL, 10) : 0;
}

/* Ask the kernel, by a pidfd of our own making; *kept: that pidfd, if the participant lives and is surely this one. */
static bool is_gone(shmr *h, uint32_t slot, uint64_t life, shmr_file *kept) {
    struct shmr_participant *p = shmr_participant_at(h, slot);
    uint32_t pid = shmr_life_pid(life);
    int fd = (int)syscall(SYS_pidfd_open, (pid_t)pid, 0);
    if (fd < 0) {
        if (errno == ESRCH) return true;
        /* There is no descriptor to be had. If a child of ours with this pid has ended, whoever joined with it is dead. */
        siginfo_t ended = {0};
        return waitid(P_PID, pid, &ended, WEXITED | WNOHANG | WNOWAIT) == 0 && ended.si_pid != 0;
    }
    /* The pid may have been given to somebody else before we opened it: then the start time differs. 0 is "unknown":
     * of itself when it joined, or of it now, say for want of a file descriptor, and proves nothing. */
    uint64_t start = shmr_life_kind(life) == SHMR_JOINING ? 0 : shmr_load_relaxed(&p->start_time); /* published by R13 */
    uint64_t found = start ? shmr_start_time(pid) : 0;
    bool gone = shmr_has_ended(fd, 0) || (found && found != start);
    if (!gone && found == start && shmr_file_keep(kept, fd)) return false;
    close(fd);
    return gone && shmr_load_acquire(&p->life) == life; /* A13 W15: still the same participant */
}

/* Is the participant with this life word dead? Called with death_lock held; keeps one pidfd a participant. */
static bool is_dead(shmr *h, uint32_t slot, uint64_t life) {
    bool joining = shmr_life_kind(life) == SHMR_JOINING;
    if (joining ? shmr_life_by(life) != shmr_namespace_tag(h)
                : shmr_load_relaxed(&shmr_participant_at(h, slot)->pid_namespace) != h->pid_namespace)
        return false; /* cannot tell: the pid means something else here */
    uint64_t name = shmr_life_pack(shmr_life_epoch(life), 0, shmr_life_pid(life), SHMR_JOINING); /* of both states */
    shmr_file *pidfd = &h->pidfds[slot];
    if (h->pidfd_lives[slot] == name && shmr_file_is_ours(pidfd, NULL) && !shmr_has_ended(pidfd->fd, 0)) return false;
    /* Not known yet; or it ended, or other code closed the descriptor, perhaps after our look at it: ask anew. */
    shmr_file_close(pidfd);
    h->pidfd_lives[slot] = name;
    return is_gone(h, slot, life, pidfd);
}

static bool slot_is_dead(shmr *h, uint32_t slot, uint64_t life) {
    pthread_mutex_lock(&h->death_lock);
    bool dead = is_dead(h, slot, life);
    pthread_mutex_unlock(&h->death_lock);
    return dead;
}

uint32_t shmr_live_participants(shmr *h) {
    uint32_t live = 0;
    for (uint32_t i = 0; i < h->g.config.participants; i++) {
        uint32_t kind = shmr_life_kind(shmr_load_relaxed(&shmr_participant_at(h, i)->life)); /* a snapshot */
        live += kind == SHMR_LIVE || kind == SHMR_JOINING;
    }
    return live;
}

/* Nobody else is left, and at least one of them died. */
bool shmr_alone(const shmr *h) {
    if (!shmr_load_relaxed(&shmr_header_of(h)->deaths)) return false; /* a snapshot */
    for (uint32_t i = 0; i < h->g.config.participants; i++) {
        uint32_t kind = shmr_life_kind(shmr_load_acquire(&shmr_participant_at(h, i)->life)); /* A13 W15 */
        if (i != h->self && (kind == SHMR_LIVE || kind == SHMR_JOINING)) return false;
    }
    return true;
}

int shmr_find(shmr *h, uint32_t pid) {
    for (uint32_t i = 0; i < h->g.config.participants; i++) {
        uint64_t life = shmr_load_acquire(&shmr_participant_at(h, i)->life); /* A13 W15 */
        uint32_t kind = shmr_life_kind(life);
        if (shmr_life_pid(life) == pid && (kind == SHMR_LIVE || kind == SHMR_JOINING)) return (int)i;
    }
    return -1;
}

void shmr_leases(shmr *h, uint32_t *pids, uint64_t *counts) {
    for (uint32_t i = 0; i < h->g.config.participants; i++) {
        uint64_t life = shmr_load_acquire(&shmr_participant_at(h, i)->life); /* A13 W15 */
        uint32_t kind = shmr_life_kind(life);
        pids[i] = kind == SHMR_LIVE || kind == SHMR_JOINING ? shmr_life_pid(life) : 0;
        counts[i] = 0;
    }
    for (uint32_t g = 0; g < h->g.groups; g++) {
        if (!(shmr_load_acquire(&shmr_group_at(h, g)->owner) >> 32)) continue; /* A7 W17: never reserved */
        for (uint32_t i = 0; i < SHMR_GROUP; i++) {
            uint64_t s = shmr_load_relaxed(&shmr_record_at(h, g * SHMR_GROUP + i)->state); /* a snapshot */
            uint32_t owner = shmr_state_owner(s);
            if (shmr_state_kind(s) == SHMR_LEASED && owner < h->g.config.participants) counts[owner]++;
        }
    }
}

/* ---- clearing up --------------------------------------------------------------------------------------------------------- */

struct recovery {
    uint32_t dead;           /* the one that was found */
    struct shmr_slots slots; /* it, and whomever it was clearing up after when it died: done as one */
    uint32_t deaths;         /* of them */
    shmr_block *taken;
    uint32_t taken_room, taken_count;
    uint64_t *waiting; /* a bit a block: stood in its ring when we looked; NULL: not looked yet */
};

/* Who died while clearing up after others may have moved half of their memory under its own name: so they go
 * together. Their life words name us from now on, and if we die too, our recoverer finds all of them. */
static void gather(shmr *h, struct recovery *rec) {
    shmr_slots_add(&rec->slots, rec->dead);
    for (uint32_t i = 0; i < h->g.config.participants; i++) {
        struct shmr_participant *p = shmr_participant_at(h, i);
        uint64_t life = shmr_load_acquire(&p->life); /* A13 W1 */
        if (shmr_life_kind(life) != SHMR_RECOVERING || shmr_slots_have(&rec->slots, i) ||
            !shmr_slots_have(&rec->slots, shmr_life_by(life)))
            continue;
        uint64_t ours = shmr_life_pack(shmr_life_epoch(life), h->self, shmr_life_pid(life), SHMR_RECOVERING);
        if (!shmr_cas_acq_rel(&p->life, &life, ours)) continue; /* A13 R13 W1 W3 */
        shmr_slots_add(&rec->slots, i);
        rec->deaths++;
        i = UINT32_MAX; /* whom that one was clearing up after may stand before it: again from the start */
    }
}

static bool in_ring(const shmr *h, uint32_t ring, uint32_t block, uint32_t generation) {
    uint64_t wanted = shmr_slot_pack(0, generation, block), mask = (UINT64_C(1) << 40) - 1;
    for (uint64_t k = 0; k < h->g.slots[ring]; k++)
        if ((shmr_load_acquire(shmr_slot_at(h, ring, k)) & mask) == wanted) return true; /* A3 W2 */
    return false;
}

/* The same for all blocks at once: one look at the rings is enough, since only the dead could have inserted more. */
static bool was_in_ring(const shmr *h, struct recovery *rec, uint32_t ring, uint32_t block, uint32_t generation) {
    if (!rec->waiting && (rec->waiting = calloc(h->g.config.blocks / 64, 8)))
        for (uint32_t r = 0; r < h->g.config.rings; r++)
            for (uint64_t k = 0; k < h->g.slots[r]; k++) {
                uint64_t slot = shmr_load_acquire(shmr_slot_at(h, r, k)); /* A3 W2 */
                uint32_t id = shmr_slot_block(slot);
                if (id >= h->g.config.blocks) continue;
                uint64_t s = shmr_load_acquire(&shmr_record_at(h, id)->state); /* A1 W2 */
                if (shmr_state_kind(s) == SHMR_COMMITTED && shmr_state_ring(s) == r &&
                    (shmr_state_generation(s) & SHMR_SLOT_GENERATION_MASK) == shmr_slot_generation(slot))
                    rec->waiting[id / 64] |= UINT64_C(1) << (id % 64);
            }
    if (!rec->waiting) return in_ring(h, ring, block, generation);
    return rec->waiting[block / 64] >> (block % 64) & 1;
}

/* Recovery never waits for room in a ring: it may use the spare slots beyond the capacity, and what does not fit even
 * there stays COMMITTED by us, on a private list that is tried again at each lease and each slice of a wait. */
static void insert_or_keep(shmr *h, uint32_t ring, uint32_t block, uint32_t generation) {
    if (!shmr_load_relaxed(&shmr_header_of(h)->poisoned) && /* else in vain, and each time a million turns */
        shmr_insert(h, ring, block, generation, h->g.most[ring]) == SHMR_OK) {
        shmr_notify_one(h, shmr_ring_at(h, ring)->item_waiters);
        return;
    }
    pthread_mutex_lock(&h->death_lock);
    uint32_t count = (uint32_t)shmr_count_get(&h->again_count);
    uint32_t *grown = realloc(h->again, (count + 1) * sizeof *grown);
    if (grown) { /* else it stays COMMITTED by us; our own recovery would find it */
        h->again = grown;
        grown[count] = block;
        shmr_count_add(&h->again_count, 1);
    }
    pthread_mutex_unlock(&h->death_lock);
}

void shmr_retry_inserts(shmr *h) {
    if (!shmr_count_get(&h->again_count) || shmr_load_relaxed(&shmr_header_of(h)->poisoned)) return;
    pthread_mutex_lock(&h->death_lock);
    uint32_t count = (uint32_t)shmr_count_get(&h->again_count), left = 0;
    for (uint32_t i = 0; i < count; i++) {
        uint32_t block = h->again[i];
        uint64_t s = shmr_load_acquire(&shmr_record_at(h, block)->state); /* A1 W11 */
        uint32_t ring = shmr_state_ring(s);
        if (shmr_state_kind(s) != SHMR_COMMITTED || shmr_state_owner(s) != h->self || ring >= h->g.config.rings)
            continue; /* somebody wrote rubbish over it */
        if (shmr_insert(h, ring, block, shmr_state_generation(s), h->g.most[ring]) == SHMR_OK)
            shmr_notify_one(h, shmr_ring_at(h, ring)->item_waiters);
        else
            h->again[left++] = block;
    }
    shmr_count_add(&h->again_count, (int64_t)left - (int64_t)count);
    pthread_mutex_unlock(&h->death_lock);
}

static void add_attempt(struct shmr_record *r) {
    uint64_t detail = shmr_load_relaxed(&r->detail); /* ours alone */
    if ((detail >> 16 & 0xffff) < 0xffff) detail += 1u << 16;
    shmr_store_relaxed(&r->detail, detail); /* published by R1 */
}

/* A block that the dead had leased, and now we: its descriptor may be half that of its next leg. */
static void restore(shmr *h, const struct recovery *rec, uint32_t block, uint32_t generation) {
    for (uint32_t i = 0; i < h->g.config.participants; i++)
        if (shmr_slots_have(&rec->slots, i)) shmr_restore_descriptor(h, i, block, generation);
}

static void recover_block(shmr *h, struct recovery *rec, uint32_t block) {
    struct shmr_record *r = shmr_record_at(h, block);
    uint64_t s = shmr_load_acquire(&r->state); /* A1 W2 */
    uint32_t generation = shmr_state_generation(s), ring = shmr_state_ring(s), flags = shmr_state_flags(s);
    if (shmr_state_kind(s) == SHMR_FREE || !shmr_slots_have(&rec->slots, shmr_state_owner(s))) return;
    switch (shmr_state_kind(s)) {
    case SHMR_CLAIMED:
        if (shmr_cas_seq_cst(&r->state, &s, shmr_state_pack(generation, 0, 0, 0, SHMR_FREE))) /* S2 R2 W13 */
            shmr_freed_by_me(h, block);
        break;
    case SHMR_LEASED:
        if (rec->taken && rec->taken_count < rec->taken_room) {
            uint64_t mine = shmr_state_pack(generation, h->self, ring, flags, SHMR_LEASED);
            if (!shmr_cas_acq_rel(&r->state, &s, mine)) break; /* A1 R1 W2 W3 */
            restore(h, rec, block, generation);
            shmr_block *out = &rec->taken[rec->taken_count];
            if (shmr_read_descriptor(h, block, mine, out) != SHMR_OK) {
                out->state = mine;
                out->block = block;
            }
            rec->taken_count++;
            shmr_pin(h, 1);
            break;
        }
        if (ring >= h->g.config.rings) break;
        {
            /* First ours, so that the attempt is counted by one alone; then a message again. */
            uint64_t mine = shmr_state_pack(generation, h->self, ring, flags, SHMR_LEASED);
            if (!shmr_cas_acq_rel(&r->state, &s, mine)) break; /* A1 R1 W2 W3 */
            restore(h, rec, block, generation);
            add_attempt(r);
            uint64_t again = shmr_state_pack(generation + 1, h->self, ring, flags, SHMR_COMMITTED);
            if (shmr_cas_release(&r->state, &mine, again)) insert_or_keep(h, ring, block, generation + 1); /* R1 */
        }
        break;
    case SHMR_COMMITTED:
        if (ring >= h->g.config.rings || was_in_ring(h, rec, ring, block, generation)) break;
        /* d died between the state and the slot. If the message was there and has been leased meanwhile, this fails. */
        if (shmr_cas_acq_rel(&r->state, &s, shmr_state_pack(generation, h->self, ring, flags, SHMR_COMMITTED))) /* A1 R1 W2 W3 */
            insert_or_keep(h, ring, block, generation);
        break;
    default: break;
    }
}

/* Blocks that the dead allocated and that live: fewer and fewer, since only they took records out of FREE. */
static uint32_t count_live(const shmr *h, const struct shmr_slots *dead) {
    uint32_t count = 0;
    for (uint32_t g = 0; g < h->g.groups; g++) {
        uint64_t owner = shmr_load_acquire(&shmr_group_at(h, g)->owner); /* A7 W2 */
        if (!(uint32_t)owner || !(owner >> 32) || !shmr_slots_have(dead, (uint32_t)owner - 1)) continue;
        for (uint32_t i = 0; i < SHMR_GROUP; i++)
            count += shmr_state_kind(shmr_load_relaxed(&shmr_record_at(h, g * SHMR_GROUP + i)->state)) != SHMR_FREE;
    }
    return count;
}

/* (L) Everything that the dead allocated and that lives goes on under our name. */
static void adopt(shmr *h, const struct shmr_slots *dead) {
    uint32_t count = 0, room = count_live(h, dead), *live = malloc((room + 1) * sizeof *live);
    if (!live) return; /* its memory is lost until the region goes; to take what may be in use would be worse */
    for (uint32_t g = 0; g < h->g.groups; g++) {
        shmr_word *word = &shmr_group_at(h, g)->owner;
        uint64_t seen = shmr_load_acquire(word); /* A7 W2 */
        if (!(uint32_t)seen || !shmr_slots_have(dead, (uint32_t)seen - 1) || shmr_owns_group(h, g)) continue;
        if (!(seen >> 32)) { /* died while reserving it */
            shmr_cas_release(word, &seen, 0); /* R7 */
            continue;
        }
        for (uint32_t i = 0; i < SHMR_GROUP; i++) {
            uint32_t block = g * SHMR_GROUP + i;
            struct shmr_record *r = shmr_record_at(h, block);
            uint64_t s = shmr_load_acquire(&r->state); /* A1 A2 W2 W18 */
            if (shmr_state_kind(s) == SHMR_FREE || h->record_flags[block] & SHMR_MINE) continue;
            uint64_t offset = shmr_load_relaxed(&r->offset), bytes = shmr_load_relaxed(&r->room); /* after A1 */
            if (offset % 64 || bytes == 0 || bytes > h->g.config.arena_bytes ||
                offset > h->g.config.arena_bytes - bytes || count == room)
                continue; /* rubbish: its memory is not trusted to be in use */
            live[count++] = block;
            if (!h->holds[block]) /* else read and validated before */
                h->places[block] = (struct shmr_place){offset, bytes}; /* the shared words are not read again */
            shmr_word *table;
            uint32_t names;
            if (shmr_state_flags(s) & SHMR_HAS_REFERENCES && !h->frame_refs[block] &&
                shmr_references_at(h, block, &table, &names) == SHMR_OK) {
                struct shmr_frame_refs *held = malloc(sizeof *held + names * sizeof(uint32_t));
                if (held) held->count = 0; /* else what it names is held for good */
                for (uint32_t k = 0; k < names; k++) { /* I4: d's bit still stands, so these are alive */
                    uint64_t entry = shmr_load_relaxed(&table[k]); /* payload, after A1; once */
                    uint32_t id = (uint32_t)entry;
                    if (id < h->g.config.blocks && shmr_hold_locked(h, id, (uint32_t)(entry >> 32)) == SHMR_OK && held)
                        held->blocks[held->count++] = id;
                }
                h->frame_refs[block] = held;
                h->record_flags[block] |= SHMR_NAMES; /* also if its memory turns out to be rubbish */
            }
        }
    }
    shmr_arena_adopt_extents(h, dead, live, count);
    for (uint32_t i = 0; i < count; i++) { /* before the groups: what is freed meanwhile is then found by a sweep */
        if (live[i] & SHMR_NOT_ADOPTED) { /* rubbish after all: its record is out of use */
            shmr_drop_frame_refs(h, live[i] & ~SHMR_NOT_ADOPTED);
            continue;
        }
        const struct shmr_place *at = &h->places[live[i]];
        if (h->holds[live[i]] && !(h->record_flags[live[i]] & SHMR_MINE))
            shmr_held_remove(h, live[i], at->offset, at->room);
        h->record_flags[live[i]] = SHMR_MINE;
    }
    for (uint32_t g = 0; g < h->g.groups; g++) {
        shmr_word *word = &shmr_group_at(h, g)->owner;
        uint64_t seen = shmr_load_acquire(word); /* A7 W1 */
        if (!(uint32_t)seen || !shmr_slots_have(dead, (uint32_t)seen - 1) || shmr_owns_group(h, g)) continue;
        if (shmr_cas_acq_rel(word, &seen, (seen & ~UINT64_C(0xffffffff)) | (h->self + 1))) /* A7 R7 W1 W3 */
            shmr_add_group(h, g);
    }
    free(live);
}

static void clear_holder_bits(shmr *h, uint32_t dead) {
    uint64_t bit = UINT64_C(1) << (dead % 64);
    for (uint32_t g = 0; g < h->g.groups; g++) {
        if (!(shmr_load_acquire(&shmr_group_at(h, g)->owner) >> 32)) continue; /* A7 W2: never reserved */
        for (uint32_t i = 0; i < SHMR_GROUP; i++) {
            uint32_t block = g * SHMR_GROUP + i;
            struct shmr_record *r = shmr_record_at(h, block);
            if (!(shmr_load_relaxed(&r->holders[dead / 64]) & bit)) continue; /* d sets no more bits */
            if (dead == h->self && h->holds[block]) continue;               /* inherited, and still meant */
            shmr_and_seq_cst(&r->holders[dead / 64], ~bit); /* S4 W13 */
            if (h->record_flags[block] & SHMR_MINE)
                shmr_reclaim(h, block);
            else
                shmr_freed_by_me(h, block); /* its allocator looks whether anybody still holds it */
        }
    }
}

static void clear_waiting(shmr *h, uint32_t dead) {
    for (uint32_t d = 0; d < h->g.config.doorbells; d++) {
        struct shmr_doorbell *bell = shmr_doorbell_at(h, d);
        if (shmr_load_acquire(&bell->owner) != dead + 1) continue; /* A12 W2 */
        uint64_t mask = ~(UINT64_C(1) << (d % 64));
        for (uint32_t r = 0; r < h->g.config.rings; r++) {
            shmr_and_acq_rel(&shmr_ring_at(h, r)->item_waiters[d / 64], mask); /* A11 R11 W4 */
            shmr_and_acq_rel(&shmr_ring_at(h, r)->slot_waiters[d / 64], mask); /* A11 R11 W4 */
        }
        shmr_and_acq_rel(&shmr_header_of(h)->extent_waiters[d / 64], mask); /* A11 R11 W4 */
        shmr_and_acq_rel(&shmr_header_of(h)->idle_waiters[d / 64], mask);   /* A11 R11 W4 */
        shmr_and_acq_rel(&shmr_participant_at(h, dead)->space_waiters[d / 64], mask); /* A11 R11 W4 */
        shmr_store_release(&bell->owner, 0); /* R12 W4 */
    }
}

/* Everything that is stamped by the dead one, whose life word is ours now (RECOVERING by us, or JOINING as us). */
static void clear_up(shmr *h, struct recovery *rec) {
    gather(h, rec);
    for (uint32_t g = 0; g < h->g.groups; g++) {
        if (!(shmr_load_acquire(&shmr_group_at(h, g)->owner) >> 32)) continue; /* A7 W2: never reserved */
        for (uint32_t i = 0; i < SHMR_GROUP; i++) recover_block(h, rec, g * SHMR_GROUP + i);
    }
    free(rec->waiting);
    rec->waiting = NULL;
    pthread_mutex_lock(&h->lock);
    adopt(h, &rec->slots);
    for (uint32_t i = 0; i < h->g.config.participants; i++)
        if (shmr_slots_have(&rec->slots, i)) clear_holder_bits(h, i);
    shmr_sweep(h);
    shmr_arena_trim(h);
    shmr_trim_groups(h);
    pthread_mutex_unlock(&h->lock);
    for (uint32_t i = 0; i < h->g.config.participants; i++)
        if (shmr_slots_have(&rec->slots, i)) clear_waiting(h, i);
    shmr_add_relaxed(&shmr_header_of(h)->deaths, rec->deaths); /* statistics, and a hint to waiters */
    for (uint32_t i = 0; i < h->g.config.participants; i++) {
        if (!shmr_slots_have(&rec->slots, i) || i == h->self) continue;
        struct shmr_participant *p = shmr_participant_at(h, i);
        uint32_t epoch = shmr_life_epoch(shmr_load_relaxed(&p->life)); /* ours alone */
        shmr_store_release(&p->life, shmr_life_pack(epoch, 0, 0, SHMR_VACANT)); /* R13 */
    }
    shmr_ring_all(h); /* I10: whatever wake-ups died with them */
}

/* One at a time: whoever gets the life word. */
static int recover(shmr *h, uint64_t life, struct recovery *rec) {
    struct shmr_participant *p = shmr_participant_at(h, rec->dead);
    rec->deaths = shmr_life_kind(life) != SHMR_LEFT;
    uint64_t recovering = shmr_life_pack(shmr_life_epoch(life), h->self, shmr_life_pid(life), SHMR_RECOVERING);
    if (!shmr_cas_acq_rel(&p->life, &life, recovering)) return SHMR_WOULD_BLOCK; /* A13 R13 W1 W3 */
    clear_up(h, rec);
    return SHMR_OK;
}

/* Become the successor of one who left, or is dead, at its own place in the table; true if we did. */
bool shmr_inherit(shmr *h, uint32_t slot) {
    struct shmr_participant *p = shmr_participant_at(h, slot);
    uint64_t life = shmr_load_acquire(&p->life); /* A13 */
    uint32_t kind = shmr_life_kind(life);
    bool died = kind == SHMR_LIVE || kind == SHMR_JOINING;
    if (kind != SHMR_LEFT && !(died && slot_is_dead(h, slot, life))) return false;
    uint32_t epoch = (shmr_life_epoch(life) + 1) & 0xfffff;
    uint64_t joining = shmr_life_pack(epoch, shmr_namespace_tag(h), h->pid, SHMR_JOINING);
    if (!shmr_cas_acq_rel(&p->life, &life, joining)) return false; /* A13 R13 W1 W3 */
    h->self = slot;
    h->epoch = epoch;
    struct recovery rec = {.dead = slot, .deaths = died};
    clear_up(h, &rec);
    return true;
}

int shmr_recover(shmr *h, uint32_t slot, shmr_block *taken, uint32_t room, uint32_t *count) {
    int status = shmr_usable(h);
    if (status == SHMR_FORKED) return status;
    if (slot >= h->g.config.participants || slot == h->self) return SHMR_BAD_ARGUMENT;
    uint64_t life = shmr_load_acquire(&shmr_participant_at(h, slot)->life); /* A13 W1 */
    struct recovery rec = {.dead = slot, .taken = taken, .taken_room = room};
    if (shmr_life_kind(life) == SHMR_VACANT || shmr_count_get(&h->left)) return SHMR_STALE;
    if (shmr_life_kind(life) == SHMR_RECOVERING) return SHMR_WOULD_BLOCK; /* somebody is at it, or died at it */
    shmr_pin(h, 1);
    status = recover(h, life, &rec);
    if (count) *count = rec.taken_count;
    return shmr_leave(h, status);
}

int shmr_check_deaths(shmr *h) {
    if (h->g.config.flags & SHMR_CREATOR_RECOVERS || shmr_usable(h) == SHMR_FORKED) return 0;
    shmr_pin(h, 1); /* what we take over is ours until we are done */
    bool left = shmr_count_get(&h->left);
    int found = 0;
    for (uint32_t i = 0; i < h->g.config.participants && !left; i++) {
        if (i == h->self) continue;
        uint64_t life = shmr_load_acquire(&shmr_participant_at(h, i)->life); /* A13 */
        uint32_t kind = shmr_life_kind(life);
        /* One that is RECOVERING by somebody dead is found through that one. */
        if ((kind != SHMR_LIVE && kind != SHMR_JOINING) || !slot_is_dead(h, i, life)) continue;
        struct recovery rec = {.dead = i};
        if (recover(h, life, &rec) == SHMR_OK) found += (int)rec.deaths;
    }
    return shmr_leave(h, found);
}

/* Has anybody died since that many had? Looks for itself; one whom another is clearing up after counts. */
bool shmr_death_since(shmr *h, uint64_t deaths) {
    if (shmr_check_deaths(h) > 0) return true;
    for (uint32_t i = 0; i < h->g.config.participants; i++) {
        uint64_t life = shmr_load_acquire(&shmr_participant_at(h, i)->life); /* A13 */
        if (shmr_life_kind(life) == SHMR_RECOVERING) return true;
    }
    return shmr_load_relaxed(&shmr_header_of(h)->deaths) != deaths; /* after A13 */
}

/* Who waits for messages takes over no more than it must: memory that it does not need would stay with it while it does
 * something else. */
static void adopt_from(shmr *h, bool all) {
    for (uint32_t i = 0; i < h->g.config.participants; i++) {
        if (i == h->self) continue;
        uint64_t life = shmr_load_acquire(&shmr_participant_at(h, i)->life); /* A13 W1 */
        if (shmr_life_kind(life) != SHMR_LEFT || !(all || shmr_life_by(life) == SHMR_KEPT_MESSAGES)) continue;
        struct recovery rec = {.dead = i};
        recover(h, life, &rec);
    }
}
void shmr_adopt_orphans(shmr *h) { adopt_from(h, true); }
void shmr_adopt_messages(shmr *h) { adopt_from(h, false); }

int shmr_adopt(shmr *h) {
    int status = shmr_enter(h);
    if (status != SHMR_OK) return status;
    shmr_adopt_orphans(h);
    pthread_mutex_lock(&h->lock);
    shmr_sweep(h);
    pthread_mutex_unlock(&h->lock);
    return shmr_leave(h, SHMR_OK);
}

/* An orderly exit with views alive: what we lease is done with, what we claim was never sent. */
void shmr_let_go(shmr *h) {
    for (uint32_t g = 0; g < h->g.groups; g++) {
        if (!(shmr_load_acquire(&shmr_group_at(h, g)->owner) >> 32)) continue; /* A7 W11: never reserved */
        for (uint32_t i = 0; i < SHMR_GROUP; i++) {
            uint32_t block = g * SHMR_GROUP + i, kind;
            struct shmr_record *r = shmr_record_at(h, block);
            uint64_t s = shmr_load_acquire(&r->state); /* A1 W1 */
            kind = shmr_state_kind(s);
            if ((kind != SHMR_LEASED && kind != SHMR_CLAIMED) || shmr_state_owner(s) != h->self) continue;
            uint64_t freed = shmr_state_pack(shmr_state_generation(s), 0, 0, 0, SHMR_FREE);
            if (shmr_cas_seq_cst(&r->state, &s, freed)) shmr_freed_by_me(h, block); /* S2 R2 */
        }
    }
}
