/* SPDX-License-Identifier: BSD-3-Clause */
/* A small region, three participants in this process, and an input that says what they do and what a hostile
 * process writes meanwhile. What the core hands out must lie in the arena, whatever the words say; the sanitizers,
 * and the unmapped memory on both sides of the region, see the rest.
 *
 * An input is a sequence of instructions of one byte and its operands; where it ends, operands are zero.
 */
#ifndef WORLD_H
#define WORLD_H

#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>

#include "shmr_internal.h"

#define HANDLES 3
#define KEPT 6 /* blocks, references and allocations that a participant has at once */
#define INSTRUCTIONS_MAX 96
#define DEAD_PID 0xfffffe0u /* beyond any pid_max */

struct input {
    const uint8_t *bytes;
    size_t left;
};

struct actor {
    shmr *h;
    shmr_block claimed[KEPT], leased[KEPT];
    shmr_ref held[KEPT];
    bool is_held[KEPT];
    struct shmr_numpy_handler *handler;
    void *allocated[KEPT];
};

static struct actor actors[HANDLES];
static int world_fd = -1;
static shmr_scatter exchange;
static char exchange_source[4096], exchange_target[4096];
static unsigned char exchange_states[8];

/* ---- the input ----------------------------------------------------------------------------------------------------- */

static inline uint8_t next_byte(struct input *in) {
    if (!in->left) return 0;
    in->left--;
    return *in->bytes++;
}
static inline uint64_t next_number(struct input *in, int bytes) {
    uint64_t value = 0;
    for (int i = 0; i < bytes; i++) value |= (uint64_t)next_byte(in) << (8 * i);
    return value;
}

static inline shmr_config world_config(void) {
    return (shmr_config){.participants = 4, .doorbells = 6, .rings = 2, .blocks = 512, .arena_bytes = 4 * SHMR_EXTENT,
                         .flags = SHMR_WAIT_ALONE, .capacity = {4, 2}};
}

/* ---- what the hostile process writes -------------------------------------------------------------------------------- */

/* A block that somebody has to do with, or any. */
static inline uint32_t choose_block(struct input *in, const shmr *h) {
    uint8_t choice = next_byte(in);
    if (choice < 128) return choice % 8; /* the first ones are in use */
    const struct actor *a = &actors[choice % HANDLES];
    uint32_t block = choice & 8    ? a->claimed[choice % KEPT].block
                     : choice & 16 ? a->leased[choice % KEPT].block
                                   : (uint32_t)next_number(in, 2);
    return block % h->g.config.blocks;
}

static inline shmr_word *choose_word(struct input *in, const shmr *h) {
    uint8_t choice = next_byte(in), index = next_byte(in);
    char *base = h->base;
    uint32_t block;
    switch (choice % 12) {
    case 0: return (shmr_word *)(base) + index % 80;
    case 1: return (shmr_word *)shmr_participant_at(h, index % 4) + next_byte(in) % 96;
    case 2: return (shmr_word *)shmr_doorbell_at(h, index % 6) + (index >> 7);
    case 3: return (shmr_word *)shmr_ring_at(h, index % 2) + (index >> 1 & 7) * 8 + (index >> 4) % 4;
    case 4: return shmr_slot_at(h, index & 1, index >> 1);
    case 5: return shmr_extent_at(h, index % 4);
    case 6: return (shmr_word *)shmr_group_at(h, index % 2) + (index >> 1) % 5;
    case 7: return &shmr_record_at(h, choose_block(in, h))->state;
    case 8: return &shmr_record_at(h, choose_block(in, h))->offset + index % 2;
    case 9: return (shmr_word *)shmr_record_at(h, choose_block(in, h)) + index % 32;
    case 10: /* payload: a table of references, perhaps */
        block = choose_block(in, h);
        return (shmr_word *)(void *)(base + h->g.arena_at + shmr_load_relaxed(&shmr_record_at(h, block)->offset) %
                                     (h->g.config.arena_bytes - 256) / 8 * 8) + index % 16;
    default: return (shmr_word *)(void *)base + next_number(in, 2) % (h->g.records_at / 8);
    }
}

static inline uint64_t choose_value(struct input *in, const shmr *h, uint64_t before) {
    uint8_t choice = next_byte(in), a, b;
    uint32_t block;
    switch (choice % 12) {
    case 0: return next_number(in, 8);
    case 1: return next_byte(in);
    case 2: return ~(uint64_t)next_byte(in);
    case 3: return before ^ UINT64_C(1) << next_byte(in) % 64;
    case 4: return before + (uint64_t)(int64_t)(int8_t)next_byte(in);
    case 5: /* a state */
        block = choose_block(in, h);
        a = next_byte(in);
        return shmr_state_pack(shmr_state_generation(shmr_load_relaxed(&shmr_record_at(h, block)->state)) + (a >> 7),
                               a % 5, a >> 3 & 1, a >> 4 & 1, next_byte(in) % 6);
    case 6: /* a slot: of about this cycle */
        a = next_byte(in);
        block = choose_block(in, h);
        return shmr_slot_pack(shmr_slot_cycle(before) + a % 3 - 1,
                              shmr_state_generation(shmr_load_relaxed(&shmr_record_at(h, block)->state)), block);
    case 7: /* a life */
        a = next_byte(in);
        b = next_byte(in);
        return shmr_life_pack(shmr_life_epoch(before) + a % 2, b % 5, a & 2 ? DEAD_PID : (uint32_t)getpid(), a >> 2 & 7);
    case 8: /* an owner */
        a = next_byte(in);
        return a % 6 | (a & 64 ? SHMR_EXTENT_WARM : 0);
    case 9: /* an offset, or a size: page-aligned or near the end */
        a = next_byte(in);
        return a & 1 ? next_number(in, 2) * 4096 : h->g.config.arena_bytes - 64 * next_number(in, 2);
    case 10: /* a reference */
        block = choose_block(in, h);
        return (uint64_t)shmr_state_generation(shmr_load_relaxed(&shmr_record_at(h, block)->state)) << 32 | block;
    default: return shmr_load_relaxed(choose_word(in, h)); /* what stands elsewhere */
    }
}

static inline void hostile_write(struct input *in, const shmr *h) {
    shmr_word *word = choose_word(in, h);
    shmr_store_relaxed(word, choose_value(in, h, shmr_load_relaxed(word)));
}

/* ---- what the participants do ----------------------------------------------------------------------------------------- */

static inline void world_check(bool fine, const char *what) {
    if (fine) return;
    fprintf(stderr, "the core handed out what it must not: %s\n", what);
    abort();
}

/* Whatever is handed out lies in the arena: touch its ends. */
static inline void touch(const shmr *h, uint64_t offset, uint64_t bytes, bool write) {
    world_check(offset >= h->g.arena_at && bytes <= h->g.total && offset <= h->g.total - bytes, "bounds");
    if (!bytes) return;
    volatile char *first = h->base + offset, *last = first + bytes - 1;
    if (write)
        *first = *last = 1;
    else
        (void)(*first + *last);
}

static inline void check_message(struct actor *a, const shmr_block *b) {
    shmr_ref refs[8];
    world_check(b->spec_bytes <= SHMR_SPEC_BYTES && b->length <= b->room, "descriptor");
    world_check(b->producer < a->h->g.config.participants && b->block < a->h->g.config.blocks, "descriptor");
    touch(a->h, b->offset, b->room, false);
    uint32_t count = b->references < 8 ? b->references : 8;
    if (shmr_references(a->h, b, refs, count) != SHMR_OK) return;
    for (uint32_t i = 0; i < count; i++) {
        shmr_ref place;
        if (shmr_hold(a->h, refs[i].block, refs[i].generation, &place) != SHMR_OK) continue;
        touch(a->h, place.offset, place.length, false);
        shmr_drop(a->h, refs[i].block, refs[i].generation);
    }
}

/* Until when to wait: mostly not at all. */
static inline int64_t choose_deadline(uint8_t choice) { return choice % 8 ? 0 : shmr_now() + 20000; }

static inline void do_claim(struct input *in, struct actor *a) {
    uint8_t size = next_byte(in), k = next_byte(in);
    shmr_block *b = &a->claimed[k % KEPT];
    if (b->state) return;
    shmr_ref refs[2];
    uint32_t count = 0;
    for (int i = 0; i < KEPT && count < 2; i++)
        if (k & 64 && a->is_held[i]) refs[count++] = a->held[i];
    uint64_t bytes = size < 128 ? (uint64_t)size * 64 : (uint64_t)(size - 127) * 24576;
    if (shmr_claim(a->h, bytes, refs, count, k & 128 ? 1 : -1, choose_deadline(k >> 3), b) != SHMR_OK) {
        b->state = 0;
        return;
    }
    touch(a->h, b->offset, b->room, true);
    b->length = bytes;
    b->kind = k;
    b->spec_bytes = 24;
    uint64_t words[3] = {k & 1 ? 512 : 0, b->offset, 0}; /* as a result of the exchange */
    memcpy(b->spec, words, sizeof words);
    b->tag = 1000 + k % 8;
}

static inline void do_commit(struct input *in, struct actor *a) {
    uint8_t k = next_byte(in);
    shmr_block *b = k & 64 ? &a->leased[k % KEPT] : &a->claimed[k % KEPT];
    if (b->state) shmr_commit(a->h, k >> 3 & 1, k >> 4 & 1, -1, choose_deadline(k >> 3), b);
}

static inline void do_lease(struct input *in, struct actor *a) {
    uint8_t k = next_byte(in);
    shmr_block *b = &a->leased[k % KEPT];
    if (b->state) return;
    if (shmr_lease(a->h, k >> 3 & 1, k >> 4 & 1, choose_deadline(k >> 3), b) == SHMR_OK)
        check_message(a, b);
    else
        b->state = 0;
}

static inline void do_release(struct input *in, struct actor *a) {
    uint8_t k = next_byte(in);
    shmr_block *b = k & 64 ? &a->claimed[k % KEPT] : &a->leased[k % KEPT];
    if (!b->state) return;
    int status = k & 64 ? shmr_abort(a->h, b) : shmr_release(a->h, b);
    if (status != SHMR_OK && k & 128) b->state = 0; /* somebody has taken it away */
}

static inline void do_publish(struct input *in, struct actor *a) {
    uint8_t k = next_byte(in);
    shmr_block *b = &a->claimed[k % KEPT];
    if (!b->state || a->is_held[k % KEPT]) return;
    if (shmr_publish(a->h, b, &a->held[k % KEPT]) == SHMR_OK) a->is_held[k % KEPT] = true;
}

static inline void do_hold(struct input *in, struct actor *a) {
    uint8_t k = next_byte(in);
    if (a->is_held[k % KEPT]) return;
    uint32_t block = choose_block(in, a->h);
    uint32_t generation = shmr_state_generation(shmr_load_relaxed(&shmr_record_at(a->h, block)->state));
    shmr_ref place;
    if (shmr_hold(a->h, block, generation, &place) != SHMR_OK) return;
    touch(a->h, place.offset, place.length, k & 64);
    a->held[k % KEPT] = (shmr_ref){block, generation, 0, 0};
    a->is_held[k % KEPT] = true;
}

static inline void do_drop(struct input *in, struct actor *a) {
    uint8_t k = next_byte(in);
    if (!a->is_held[k % KEPT]) return;
    int status = shmr_drop(a->h, a->held[k % KEPT].block, a->held[k % KEPT].generation);
    if (status == SHMR_OK || k & 64) a->is_held[k % KEPT] = false;
}

static inline void do_share(struct input *in, struct actor *a) {
    uint8_t k = next_byte(in);
    shmr_ref ref, place;
    char *address = a->allocated[k % KEPT] && !(k & 64) ? a->allocated[k % KEPT]
                                                         : a->h->base + next_number(in, 4) % a->h->g.total;
    if (shmr_share(a->h, address, next_byte(in), &ref) != SHMR_OK) return;
    shmr_allocated_here(a->h, address);
    if (a->is_held[k % KEPT] || shmr_hold(a->h, ref.block, ref.generation, &place) != SHMR_OK) return;
    touch(a->h, place.offset, place.length, false);
    a->held[k % KEPT] = ref;
    a->is_held[k % KEPT] = true;
}

static inline void do_allocate(struct input *in, struct actor *a) {
    uint8_t k = next_byte(in), size = next_byte(in);
    if (!a->handler) a->handler = shmr_numpy_handler(a->h, 1024, UINT64_MAX / 2);
    struct shmr_numpy_handler *handler = a->handler;
    void **at = &a->allocated[k % KEPT];
    if (*at && k & 64) {
        *at = handler->allocator.realloc(handler->allocator.context, *at, 1024 + (size_t)size * 2048);
    } else if (*at) {
        handler->allocator.free(handler->allocator.context, *at, 0);
        *at = NULL;
    } else {
        *at = handler->allocator.malloc(handler->allocator.context, 1024 + (size_t)size * 2048);
        if (*at) memset(*at, 1, 1024);
    }
}

static inline void do_recover(struct input *in, struct actor *a) {
    uint8_t k = next_byte(in);
    shmr_block taken[2] = {0};
    uint32_t count = 0;
    if (k & 64) {
        shmr_check_deaths(a->h);
        return;
    }
    shmr_recover(a->h, k % 5, k & 8 ? taken : NULL, k & 8 ? 2 : 0, &count);
    world_check(count <= 2, "more than there was room for");
    for (uint32_t i = 0; i < count; i++) {
        if (taken[i].room) check_message(a, &taken[i]);
        world_check(taken[i].spec_bytes <= SHMR_SPEC_BYTES, "descriptor");
        shmr_release(a->h, &taken[i]);
    }
}

static inline void do_exchange(struct input *in, struct actor *a) {
    uint8_t k = next_byte(in);
    shmr_block message;
    if (a != &actors[0]) { /* the answer of a worker: in place, or elsewhere */
        if (shmr_lease(a->h, 0, 0, 0, &message) != SHMR_OK) return;
        check_message(a, &message);
        uint64_t words[3] = {k & 1 ? 512 : next_byte(in), k & 2 ? message.offset : next_number(in, 4), 8};
        message.kind = 7;
        message.spec_bytes = sizeof words;
        memcpy(message.spec, words, sizeof words);
        if (shmr_commit(a->h, 1, 0, -1, 0, &message) != SHMR_OK) shmr_release(a->h, &message);
        return;
    }
    int status = shmr_scatter_run(a->h, &exchange, 4, choose_deadline(k), &message);
    if (status != SHMR_OK) return;
    check_message(a, &message);
    shmr_release(a->h, &message);
}

static inline void do_observe(struct input *in, struct actor *a) {
    uint8_t k = next_byte(in);
    shmr_counters counters;
    uint64_t words[4];
    switch (k % 12) {
    case 0: shmr_read_counters(a->h, &counters); break;
    case 1: shmr_trim(a->h); break;
    case 2: shmr_progress(a->h, k >> 4, &words[0], &words[1], &words[2], &words[3]); break;
    case 3: shmr_has_room(a->h, k >> 7); break;
    case 4: shmr_approx_fill(a->h, k >> 7); break;
    case 5: shmr_wait_item(a->h, k >> 7, shmr_now() + 20000); break;
    case 6: shmr_wait_idle(a->h, k >> 7, shmr_now() + 20000); break;
    case 7: shmr_ring_all(a->h); break;
    case 8: shmr_find(a->h, (uint32_t)getpid()); break;
    case 9: shmr_adopt_orphans(a->h); break;
    case 10: shmr_deny(a->h, k >> 4); break;
    case 11:
        if (k >> 7) shmr_close_ring(a->h, k >> 6 & 1);
        break;
    }
}

static inline void forget(struct actor *a) {
    struct shmr_numpy_handler *handler = a->handler;
    for (int i = 0; handler && i < KEPT; i++)
        if (a->allocated[i]) handler->allocator.free(handler->allocator.context, a->allocated[i], 0);
    shmr_close(a->h, 1);
    if (handler) { /* immortal, but for us */
        shmr_count_add(&a->h->immortal, -1);
        free(handler->allocator.context);
        shmr_free(a->h);
    }
    shmr_free(a->h);
    memset(a, 0, sizeof *a);
}

static inline void do_come_or_go(struct input *in, uint32_t number) {
    struct actor *a = &actors[number];
    if (next_byte(in) % 4 || number == 0) return;
    if (a->h)
        forget(a);
    else if (shmr_attach(world_fd, &a->h) != SHMR_OK)
        a->h = NULL;
}

static inline void step(struct input *in) {
    uint8_t code = next_byte(in);
    struct actor *a = &actors[(code >> 4) % HANDLES];
    const shmr *h = actors[0].h;
    if (code % 16 == 15) {
        do_come_or_go(in, (code >> 4) % HANDLES);
        return;
    }
    if (!a->h) a = &actors[0];
    switch (code % 16) {
    case 0: do_claim(in, a); break;
    case 1: do_commit(in, a); break;
    case 2: do_lease(in, a); break;
    case 3: do_release(in, a); break;
    case 4: do_publish(in, a); break;
    case 5: do_hold(in, a); break;
    case 6: do_drop(in, a); break;
    case 7: do_share(in, a); break;
    case 8: do_allocate(in, a); break;
    case 9: do_recover(in, a); break;
    case 10: do_exchange(in, a); break;
    case 11: do_observe(in, a); break;
    default: hostile_write(in, h); break;
    }
}

/* ---- one run ------------------------------------------------------------------------------------------------------------ */

/* Messages in both rings, one claimed, one leased, something shared and named by a frame, memory of NumPy's. */
static inline void populate(struct actor *a) {
    static const uint8_t script[] = {0, 40, 0, 4, 0, 0, 200, 1 | 64, 1, 1, 0, 3, 2, 1, 2, 0, 2, 3, 1, 3 | 8, 2, 2, 0, 9, 4, 8, 0, 40};
    struct input in = {script, sizeof script};
    while (in.left) {
        uint8_t code = next_byte(&in);
        switch (code) {
        case 0: do_claim(&in, a); break;
        case 1: do_commit(&in, a); break;
        case 2: do_lease(&in, a); break;
        case 4: do_publish(&in, a); break;
        case 8: do_allocate(&in, a); break;
        }
    }
}

static inline void world_begin(bool patient) {
    shmr_config config = world_config();
    if (!patient) config.flags = 0; /* a wait ends when nobody else is left */
    world_fd = memfd_create("shmr-fuzz", MFD_CLOEXEC);
    if (world_fd < 0 || ftruncate(world_fd, (off_t)shmr_region_bytes(&config)) != 0 ||
        shmr_create(world_fd, &config, &actors[0].h) != SHMR_OK || shmr_attach(world_fd, &actors[1].h) != SHMR_OK) {
        fprintf(stderr, "cannot create a region: %s\n", shmr_last_detail());
        exit(2);
    }
    populate(&actors[0]);
    populate(&actors[1]);
    memset(exchange_states, 0, sizeof exchange_states);
    exchange = (shmr_scatter){.sources = 1, .task_ring = 0, .result_ring = 1, .task_kind = 6, .result_kind = 7,
                              .source = {{exchange_source, 512, sizeof exchange_source, 16, 16}},
                              .target = exchange_target, .target_pitch = 512, .target_bytes = sizeof exchange_target,
                              .states = exchange_states, .count = 8, .first_tag = 1000, .stop = 8, .limit = 3};
}

static inline void world_end(void) {
    for (int i = 0; i < HANDLES; i++)
        if (actors[i].h) forget(&actors[i]);
    close(world_fd);
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size);

#endif
