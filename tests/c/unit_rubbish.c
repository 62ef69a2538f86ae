/* SPDX-License-Identifier: BSD-3-Clause */
/* Shared words that are not what they should be: told, or passed over, and never followed. */
#include "pair.h"

/* Slots that name what is none, or another ring's: given up after a while. */
static void slots_of_rubbish(void) {
    open_pair();
    for (uint64_t k = 0; k < 4; k++) OK(send_message(h, 0, 8, k, NOT_AT_ALL));
    OK(send_message(h, 1, 8, 0, NOT_AT_ALL));
    shmr_word *slot = shmr_slot_at(h, 0, 0);
    uint64_t right = shmr_load_seq_cst(slot);
    shmr_store_release(slot, shmr_slot_pack(77, 0, 0)); /* of no cycle */
    CHECK_STATUS(send_message(h, 0, 8, 9, NOT_AT_ALL), SHMR_WOULD_BLOCK);
    CHECK(!shmr_has_room(h, 0)); /* and poisons the region */
    CHECK_STATUS(send_message(h, 0, 8, 9, NOT_AT_ALL), SHMR_CORRUPT);
    shmr_store_release(&shmr_header_of(h)->poisoned, 0);
    for (uint32_t r = 0; r < h->g.config.rings; r++) shmr_store_release(&shmr_ring_at(h, r)->closed, 0);
    shmr_store_release(slot, right);
    /* Messages that are gone are passed over. */
    shmr_store_release(slot, shmr_slot_pack(1, 0, 0xfffff));
    CHECK(shmr_has_room(h, 0));
    OK(send_message(h, 0, 8, 9, NOT_AT_ALL));
    uint64_t in_other = shmr_load_seq_cst(shmr_slot_at(h, 1, 0));
    shmr_store_release(shmr_slot_at(h, 0, 1), shmr_slot_pack(1, shmr_slot_generation(in_other), shmr_slot_block(in_other)));
    CHECK(shmr_has_room(h, 0));
    /* Recovery looks into all of them. */
    shmr_block b = claim(other, 8);
    commit_without_slot(other, &b, 1);
    OK(shmr_recover(h, die(other), NULL, 0, NULL));
    other = attach_region(fd);
    drop_pair();
}

static void rubbish_in_a_shared_block(void) {
    open_pair();
    shmr_ref ref = publish(other, 1000), out;
    struct shmr_record *r = record_of(&ref);
    uint64_t offset = shmr_load_relaxed(&r->offset), room = shmr_load_relaxed(&r->room);
    const uint64_t wrong[][2] = {{offset + 1, room}, {offset, 0}, {offset, 64 * MIB}, {32 * MIB - 64, room}};
    for (int i = 0; i < 4; i++) {
        shmr_store_relaxed(&r->offset, wrong[i][0]);
        shmr_store_relaxed(&r->room, wrong[i][1]);
        CHECK_STATUS(shmr_hold(h, ref.block, ref.generation, &out), SHMR_CORRUPT);
    }
    shmr_store_relaxed(&r->offset, offset);
    shmr_store_relaxed(&r->room, room);
    shmr_store_relaxed(&r->length, 64 * MIB);
    OK(shmr_hold(h, ref.block, ref.generation, &out));
    CHECK_EQ(out.length, room);
    uint64_t state = shmr_load_seq_cst(&r->state);
    shmr_store_release(&r->state, state - SHMR_SHARED + SHMR_CLAIMED); /* not shared, of the same life */
    CHECK_STATUS(shmr_drop(h, ref.block, ref.generation), SHMR_STALE);
    CHECK_STATUS(shmr_hold(h, ref.block, ref.generation, &out), SHMR_STALE);
    shmr_store_release(&r->state, state);
    OK(shmr_drop(h, ref.block, ref.generation));
    OK(shmr_drop(other, ref.block, ref.generation));
    close_pair();
}

static void rubbish_in_a_table_of_references(void) {
    open_pair();
    shmr_ref ref = publish(other, 1000);
    struct shmr_record *r = record_of(&ref);
    uint64_t offset = shmr_load_relaxed(&r->offset), room = shmr_load_relaxed(&r->room);
    const uint64_t wrong[][3] = {{offset + 1, room, 1}, {offset, 64 * MIB, 1}, {32 * MIB - 64, room, 1},
                                 {offset, room, SHMR_MAX_REFS + 1}, {offset, room, 1000}};
    for (int i = 0; i < 5; i++) {
        void *table;
        uint32_t count;
        shmr_store_relaxed(&r->offset, wrong[i][0]);
        shmr_store_relaxed(&r->room, wrong[i][1]);
        shmr_store_relaxed(&r->references, wrong[i][2]);
        CHECK_STATUS(shmr_references_at(h, ref.block, (void *)&table, &count), SHMR_CORRUPT);
    }
    shmr_store_relaxed(&r->offset, offset);
    shmr_store_relaxed(&r->room, room);
    shmr_store_relaxed(&r->references, 0);
    OK(shmr_drop(other, ref.block, ref.generation));
    close_pair();
}

/* Whoever frees a block of a group that says it is nobody's, or of somebody who is none, tells nobody. */
static void rubbish_in_a_group(void) {
    open_pair();
    OK(send_message(h, 0, 8, 1, NOT_AT_ALL));
    shmr_block b = {0};
    OK(shmr_lease(other, 0, 1, NOT_AT_ALL, &b));
    shmr_word *owner = &shmr_group_at(h, b.block / SHMR_GROUP)->owner;
    uint64_t right = shmr_load_seq_cst(owner);
    shmr_store_release(owner, UINT64_C(1) << 32 | 77);
    OK(shmr_release(other, &b));
    shmr_store_release(owner, right);
    CHECK_EQ(shmr_load_seq_cst(&shmr_participant_at(h, 0)->freed_hint), 0);
    close_pair();
}

/* Bits for doorbells that there are not: several, among which one is chosen, and at last one. */
static void rubbish_in_a_bitmap(void) {
    open_pair();
    shmr_or_seq_cst(&shmr_ring_at(h, 0)->item_waiters[0], UINT64_C(63) << 58);
    for (int i = 0; i < 6; i++) { /* each message clears one */
        OK(send_message(h, 0, 8, 1, NOT_AT_ALL));
        OK(receive_message(h, 0, NULL, NOT_AT_ALL));
    }
    close_pair();
}

/* ---- what the dead leave ------------------------------------------------------------------------------------------------------ */

/* Blocks across pages, adopted in an order in which the last one joins what was apart. */
static void slabs_are_joined(void) {
    open_pair();
    shmr_block b[6], odd;
    for (int i = 0; i < 6; i++) b[i] = claim(other, 1536); /* number 2 lies on two pages, 0 and 1 */
    OK(shmr_abort(other, &b[2]));
    odd = claim(other, 64); /* takes its record: the next one has a higher number */
    b[2] = claim(other, 1536);
    CHECK(b[2].block > b[5].block && b[2].offset < b[3].offset);
    shmr_ref refs[6], out;
    for (int i = 0; i < 6; i++) {
        OK(shmr_publish(other, &b[i], &refs[i]));
        OK(shmr_hold(h, refs[i].block, refs[i].generation, &out));
    }
    (void)odd;
    OK(shmr_recover(h, die(other), NULL, 0, NULL));
    for (int i = 0; i < 6; i++) {
        CHECK_STATUS(shmr_share(h, h->base + refs[i].offset, 10, &out), SHMR_NOT_SHARED); /* slower, not wrong */
        OK(shmr_drop(h, refs[i].block, refs[i].generation));
    }
    other = attach_region(fd);
    close_pair();
}

/* Each rubbish that the record of a dead one may have is left alone. */
static void rubbish_records(void) {
    open_pair();
    shmr_block b[12];
    for (int i = 0; i < 12; i++) b[i] = claim(other, 100);
    uint32_t dead = other->self;
    shmr_block mine = claim(h, 100), wide = claim(other, 6144);
    static const uint64_t wrong[][2] = {{1, 100}, {0, 0}, {0, 64 * MIB}, {32 * MIB, 64}};
    for (int i = 0; i < 4; i++) {
        shmr_store_relaxed(&shmr_record_at(h, b[i].block)->offset, wrong[i][0]);
        shmr_store_relaxed(&shmr_record_at(h, b[i].block)->room, wrong[i][1]);
    }
    /* One that lies in a slab of ours. */
    shmr_store_relaxed(&shmr_record_at(h, b[4].block)->offset,
                       shmr_load_relaxed(&shmr_record_at(h, mine.block)->offset));
    static const struct {
        uint32_t owner, ring, flags;
        enum shmr_state kind;
    } states[] = {{0, 0, 0, SHMR_CLAIMED}, /* of somebody else than `dead`, or it would be freed before */
                  {0, 200, 0, SHMR_LEASED},
                  {0, 200, 0, SHMR_COMMITTED},
                  {4095, 0, 0, SHMR_LEASED},
                  {3, 0, SHMR_HAS_REFERENCES, SHMR_CLAIMED}};
    for (int i = 0; i < 5; i++)
        shmr_store_release(&shmr_record_at(h, b[i].block)->state, shmr_state_pack(9, 3, 0, 0, SHMR_CLAIMED));
    for (int i = 0; i < 5; i++)
        shmr_store_release(&shmr_record_at(h, b[5 + i].block)->state,
                           shmr_state_pack(9, states[i].owner == 0 ? dead : states[i].owner, states[i].ring,
                                           states[i].flags, states[i].kind));
    /* Frames: one whose table does not fit, and one that names what is none. */
    shmr_store_relaxed(&shmr_record_at(h, b[9].block)->references, SHMR_MAX_REFS + 1);
    shmr_store_release(&shmr_record_at(h, b[10].block)->state,
                       shmr_state_pack(9, 3, 0, SHMR_HAS_REFERENCES, SHMR_CLAIMED));
    shmr_store_relaxed(&shmr_record_at(h, b[10].block)->references, 2);
    const uint64_t names[2] = {UINT64_C(1) << 32 | 0xffffffff, UINT64_C(1) << 32 | b[11].block};
    memcpy(bytes_of(h, &b[10]), names, sizeof names);
    /* Two that say that they lie at the same place, on two pages. */
    uint64_t twice = shmr_load_relaxed(&shmr_record_at(h, wide.block)->offset);
    shmr_store_release(&shmr_record_at(h, wide.block)->state, shmr_state_pack(9, 3, 0, 0, SHMR_CLAIMED));
    shmr_store_release(&shmr_record_at(h, b[11].block)->state, shmr_state_pack(9, 3, 0, 0, SHMR_CLAIMED));
    shmr_store_relaxed(&shmr_record_at(h, b[11].block)->offset, twice);
    shmr_store_relaxed(&shmr_record_at(h, b[11].block)->room, wide.room);
    OK(shmr_recover(h, die(other), NULL, 0, NULL));
    OK(send_message(h, 0, 3 * MIB, 1, NOT_AT_ALL)); /* we can go on */
    OK(receive_message(h, 0, NULL, NOT_AT_ALL));
    OK(shmr_abort(h, &mine));
    other = attach_region(fd);
    drop_pair();
}

static void rubbish_in_what_was_leased(void) {
    open_pair();
    for (uint64_t k = 0; k < 2; k++) OK(send_message(h, 0, 8, k, NOT_AT_ALL));
    shmr_block b[2], taken;
    for (int k = 0; k < 2; k++) OK(shmr_lease(other, 0, 1, NOT_AT_ALL, &b[k]));
    shmr_store_relaxed(&shmr_record_at(h, b[0].block)->length, 64 * MIB);
    shmr_word *detail = &shmr_record_at(h, b[1].block)->detail;
    shmr_store_relaxed(detail, shmr_load_relaxed(detail) | 0xffffu << 16); /* delivered very often */
    uint32_t count = 0;
    OK(shmr_recover(h, die(other), &taken, 1, &count));
    CHECK_EQ(count, 1);
    CHECK_EQ(taken.block, b[0].block);
    OK(shmr_release(h, &taken));
    CHECK_EQ(shmr_load_relaxed(detail) >> 16 & 0xffff, 0xffff);
    OK(receive_message(h, 0, NULL, NOT_AT_ALL));
    other = attach_region(fd);
    close_pair();
}

/* Messages that wait on a recoverer's list, and are overwritten meanwhile. */
static void rubbish_on_the_list(void) {
    shmr_config config = small_config();
    config.capacity[0] = 1;
    open_config(&config);
    shmr_block b[5];
    for (uint64_t k = 0; k < 5; k++) {
        b[k] = claim(other, 8);
        commit_without_slot(other, &b[k], 0);
    }
    OK(shmr_recover(h, die(other), NULL, 0, NULL));
    CHECK_EQ(shmr_count_get(&h->again_count), 3);
    const uint64_t wrong[] = {shmr_state_pack(9, h->self, 0, 0, SHMR_CLAIMED),
                              shmr_state_pack(9, 7, 0, 0, SHMR_COMMITTED),
                              shmr_state_pack(9, h->self, 9, 0, SHMR_COMMITTED)};
    for (int k = 0; k < 3; k++) shmr_store_release(&shmr_record_at(h, h->again[k])->state, wrong[k]);
    shmr_retry_inserts(h);
    CHECK_EQ(shmr_count_get(&h->again_count), 0);
    other = attach_region(fd);
    drop_pair();
}

/* Clearing up after somebody who was clearing up after somebody else than the dead one. */
static void somebody_else_s_work(void) {
    open_pair();
    uint32_t dead = die(other);
    shmr *third = attach_region(fd);
    shmr_word *life = &shmr_participant_at(h, 7)->life;
    shmr_store_release(life, shmr_life_pack(1, third->self, 1, SHMR_RECOVERING));
    OK(shmr_recover(h, dead, NULL, 0, NULL));
    CHECK_EQ(life_of(h, 7), SHMR_RECOVERING);
    other = third;
    shmr_store_release(life, 0);
    close_pair();
}

int main(void) {
    RUN(slots_of_rubbish);
    RUN(rubbish_in_a_shared_block);
    RUN(rubbish_in_a_table_of_references);
    RUN(rubbish_in_a_group);
    RUN(rubbish_in_a_bitmap);
    RUN(slabs_are_joined);
    RUN(rubbish_records);
    RUN(rubbish_in_what_was_leased);
    RUN(rubbish_on_the_list);
    RUN(somebody_else_s_work);
    return summary("unit_rubbish");
}
