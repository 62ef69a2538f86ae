/* SPDX-License-Identifier: BSD-3-Clause */
/* Claim, commit, lease, release, abort, forward; full, empty, closed; wrap-around; helping; memory comes back. */
#include "harness.h"

static int fd;

static shmr *open_ring(uint64_t capacity, uint64_t start) {
    shmr_config config = small_config();
    config.capacity[0] = capacity;
    config.start = start;
    return create_region(&config, &fd);
}

static void close_whole(shmr *h) {
    check_whole(h);
    leave_region(h);
    close(fd);
}

static shmr_block claim(shmr *h, uint64_t bytes) {
    shmr_block b = {0};
    OK(shmr_claim(h, bytes, NULL, 0, -1, NOT_AT_ALL, &b));
    b.length = bytes;
    return b;
}

/* ---- the usual ------------------------------------------------------------------------------------------------------ */

static void a_message_arrives_as_it_was_sent(void) {
    shmr *h = open_ring(8, 0), *other = attach_region(fd);
    shmr_block b = claim(h, 1000), got;
    CHECK(b.room >= 1000 && b.offset % 64 == 0 && b.references == 0);
    CHECK(b.offset + b.room <= shmr_mapped_bytes(h));
    CHECK_EQ(kind_of(h, b.block), SHMR_CLAIMED);
    for (int i = 0; i < 1000; i++) bytes_of(h, &b)[i] = (char)i;
    b.length = 999;
    b.kind = 0x1234;
    b.tag = UINT64_C(0xfedcba9876543210);
    b.spec_bytes = 128;
    for (int i = 0; i < 128; i++) b.spec[i] = (unsigned char)(255 - i);
    shmr_block sent = b;
    OK(shmr_commit(h, 1, 1, -1, NOT_AT_ALL, &b));
    CHECK_EQ(b.state, 0);
    CHECK_EQ(kind_of(h, sent.block), SHMR_COMMITTED);
    CHECK_EQ(shmr_approx_fill(other, 1), 1);
    CHECK_STATUS(shmr_lease(other, 0, 1, NOT_AT_ALL, &got), SHMR_WOULD_BLOCK);
    OK(shmr_lease(other, 1, 1, NOT_AT_ALL, &got));
    CHECK_EQ(kind_of(h, sent.block), SHMR_LEASED);
    CHECK_EQ(shmr_state_owner(got.state), shmr_self(other));
    CHECK_EQ(got.block, sent.block);
    CHECK_EQ(got.offset, sent.offset);
    CHECK_EQ(got.length, 999);
    CHECK_EQ(got.kind, 0x1234);
    CHECK_EQ(got.tag, sent.tag);
    CHECK_EQ(got.producer, shmr_self(h));
    CHECK_EQ(got.attempts, 0);
    CHECK_EQ(got.seq & 0xffffffffff, 1);
    CHECK_EQ(got.spec_bytes, 128);
    CHECK(memcmp(got.spec, sent.spec, 128) == 0);
    CHECK(memcmp(bytes_of(other, &got), bytes_of(h, &sent), 999) == 0);
    OK(shmr_release(other, &got));
    CHECK_EQ(kind_of(h, sent.block), SHMR_FREE);
    shmr_counters c = counters_of(h);
    CHECK_EQ(c.committed, 1);
    CHECK_EQ(c.leased, 1);
    CHECK_EQ(c.released, 1);
    CHECK_EQ(c.aborted, 0);
    CHECK_EQ(c.bytes_committed, 999);
    CHECK_EQ(c.participants, 2);
    leave_region(other);
    close_whole(h);
}

static void sent_in_one_call(void) {
    shmr *h = open_ring(1, 0), *other = attach_region(fd);
    char bytes[3000];
    for (int i = 0; i < 3000; i++) bytes[i] = (char)(i * 7);
    shmr_block first = {.kind = 5, .length = 3000, .spec_bytes = 2, .spec = "ab"}, second = first, got;
    OK(shmr_send(h, 0, 1, NOT_AT_ALL, bytes, &first));
    CHECK_EQ(first.state, 0);
    /* The ring is full: the bytes are in place, and are not looked at again. */
    CHECK_STATUS(shmr_send(h, 0, 1, NOT_AT_ALL, bytes, &second), SHMR_WOULD_BLOCK);
    CHECK_EQ(kind_of(h, second.block), SHMR_CLAIMED);
    bytes[0] = 99;
    OK(shmr_lease(other, 0, 1, NOT_AT_ALL, &got));
    CHECK(got.kind == 5 && got.length == 3000 && got.spec_bytes == 2 && memcmp(got.spec, "ab", 2) == 0);
    CHECK(memcmp(bytes_of(other, &got) + 1, bytes + 1, 2999) == 0);
    OK(shmr_release(other, &got));
    OK(shmr_send(h, 0, 1, NOT_AT_ALL, bytes, &second));
    OK(shmr_lease(other, 0, 1, NOT_AT_ALL, &got));
    CHECK_EQ(bytes_of(other, &got)[0], 0);
    OK(shmr_release(other, &got));
    /* One that is given up is nobody's. */
    OK(shmr_send(h, 0, 0, NOT_AT_ALL, bytes, &first));
    CHECK_STATUS(shmr_send(h, 0, 0, NOT_AT_ALL, bytes, &second), SHMR_WOULD_BLOCK);
    OK(shmr_abort(h, &second));
    OK(shmr_lease(other, 0, 1, NOT_AT_ALL, &got));
    OK(shmr_release(other, &got));
    shmr_block large = {.length = UINT64_C(1) << 40};
    CHECK_STATUS(shmr_send(h, 0, 0, NOT_AT_ALL, bytes, &large), SHMR_TOO_LARGE);
    CHECK_EQ(large.state, 0);
    leave_region(other);
    close_whole(h);
}

static void empty_messages(void) {
    shmr *h = open_ring(8, 0);
    shmr_block b = claim(h, 0);
    OK(shmr_commit(h, 0, 1, -1, NOT_AT_ALL, &b));
    OK(shmr_lease(h, 0, 1, NOT_AT_ALL, &b));
    CHECK_EQ(b.length, 0);
    OK(shmr_release(h, &b));
    close_whole(h);
}

static void first_in_first_out(void) {
    shmr *h = open_ring(16, 0), *other = attach_region(fd);
    uint64_t sent = 0, received = 0, tag = 0, seed = 7;
    for (int step = 0; step < 20000; step++) {
        shmr *at = random_below(&seed, 2) ? h : other;
        if (random_below(&seed, 2)) {
            int status = send_message(at, 0, random_size(&seed, 100000), sent, NOT_AT_ALL);
            CHECK_EQ(status == SHMR_OK, sent - received < 16);
            sent += status == SHMR_OK;
        } else {
            int status = receive_message(at, 0, &tag, NOT_AT_ALL);
            CHECK_EQ(status == SHMR_OK, sent > received);
            if (status == SHMR_OK) CHECK_EQ(tag, received++);
        }
        CHECK_EQ(shmr_approx_fill(h, 0), sent - received);
    }
    while (received < sent) {
        OK(receive_message(h, 0, &tag, NOT_AT_ALL));
        CHECK_EQ(tag, received++);
    }
    leave_region(other);
    close_whole(h);
}

/* `start`: the first position; run the ring around several times, full and empty. */
static void run_around(uint64_t capacity, uint64_t start) {
    shmr *h = open_ring(capacity, start);
    uint64_t tag = 0, next = 0, expected = 0;
    for (int turn = 0; turn < 6; turn++) {
        for (uint64_t i = 0; i < capacity; i++) {
            CHECK_EQ(shmr_approx_fill(h, 0), i);
            OK(send_message(h, 0, 64, next++, NOT_AT_ALL));
        }
        /* Exactly the capacity, not the number of slots; and the message is still ours. */
        shmr_block b = claim(h, 8);
        memcpy(bytes_of(h, &b), &next, 8);
        b.tag = next;
        CHECK_STATUS(shmr_commit(h, 0, 0, -1, NOT_AT_ALL, &b), SHMR_WOULD_BLOCK);
        CHECK_STATUS(shmr_commit(h, 0, 0, -1, NOT_AT_ALL, &b), SHMR_WOULD_BLOCK);
        CHECK_EQ(kind_of(h, b.block), SHMR_CLAIMED);
        CHECK_EQ(shmr_approx_fill(h, 0), capacity);
        CHECK(!shmr_ring_has_room(h, 0));
        OK(receive_message(h, 0, &tag, NOT_AT_ALL));
        CHECK_EQ(tag, expected++);
        CHECK(shmr_ring_has_room(h, 0));
        OK(shmr_commit(h, 0, 0, -1, NOT_AT_ALL, &b)); /* it keeps its place: order per producer */
        next++;
        for (uint64_t i = 0; i < capacity; i++) {
            CHECK(shmr_ring_has_item(h, 0));
            OK(receive_message(h, 0, &tag, NOT_AT_ALL));
            CHECK_EQ(tag, expected++);
        }
        CHECK(!shmr_ring_has_item(h, 0));
        CHECK_STATUS(receive_message(h, 0, &tag, NOT_AT_ALL), SHMR_WOULD_BLOCK);
        /* One more, so that the next turn starts at another slot. */
        OK(send_message(h, 0, 64, next++, NOT_AT_ALL));
        OK(receive_message(h, 0, &tag, NOT_AT_ALL));
        CHECK_EQ(tag, expected++);
    }
    close_whole(h);
}

static void capacity_is_exact(void) {
    const uint64_t capacities[] = {1, 2, 3, 5, 7, 8, 9, 64, 100};
    for (uint32_t i = 0; i < sizeof capacities / sizeof *capacities; i++) run_around(capacities[i], 0);
}

static void wrap_around(void) {
    const uint64_t capacities[] = {1, 2, 3, 8, 13};
    for (uint32_t i = 0; i < sizeof capacities / sizeof *capacities; i++) {
        uint64_t slots = 1;
        while (slots < capacities[i] + SHMR_SPARE_SLOTS(capacities[i])) slots *= 2;
        uint64_t cycles = (UINT64_C(1) << 24) * slots;
        run_around(capacities[i], UINT64_MAX - 4);          /* 2^64 - 5: the position */
        run_around(capacities[i], UINT64_MAX);
        run_around(capacities[i], cycles - 5);              /* the cycle */
        run_around(capacities[i], cycles - slots);          /* cycle 0 is the first one filled */
        run_around(capacities[i], cycles - 2 * slots - 1);
        run_around(capacities[i], (UINT64_C(1) << 63) - 5); /* the sign of a difference */
    }
}

/* The generation: 32 bits in the state, 20 of them in the slot. */
static void generations_wrap(void) {
    const uint32_t generations[] = {0xffffe, 0xfffff, 0xfffffffe, 0xffffffff};
    for (uint32_t i = 0; i < 4; i++) {
        shmr *h = open_ring(4, 0);
        shmr_block b = claim(h, 8);
        uint32_t block = b.block;
        OK(shmr_abort(h, &b));
        shmr_store_release(&shmr_record_at(h, block)->state, shmr_state_pack(generations[i], 0, 0, 0, SHMR_FREE));
        for (uint64_t k = 0; k < 5; k++) {
            uint64_t tag = 99;
            OK(send_message(h, 0, 8, k, NOT_AT_ALL));
            CHECK_EQ(kind_of(h, block), SHMR_COMMITTED);
            OK(receive_message(h, 0, &tag, NOT_AT_ALL));
            CHECK_EQ(tag, k);
        }
        close_whole(h);
    }
}

static void forwarding(void) {
    shmr *h = open_ring(4, 0), *worker = attach_region(fd);
    shmr_block b = {0}, result = {0};
    uint64_t tag = 0;
    for (uint64_t k = 0; k < 20; k++) {
        OK(send_message(h, 0, 5000, k, NOT_AT_ALL));
        OK(shmr_lease(worker, 0, 1, NOT_AT_ALL, &b));
        uint64_t answer = k * 10;
        memcpy(bytes_of(worker, &b), &answer, 8);
        b.tag = answer;
        OK(shmr_commit(worker, 1, 1, -1, NOT_AT_ALL, &b)); /* the same block, with the answer */
        CHECK_STATUS(shmr_release(worker, &b), SHMR_STALE);
        OK(shmr_lease(h, 1, 1, NOT_AT_ALL, &result));
        CHECK_EQ(result.tag, answer);
        CHECK_EQ(result.producer, shmr_self(worker));
        OK(shmr_release(h, &result));
    }
    /* Into a full ring: it stays with the one who leased it, and can be sent later, released or aborted. */
    for (uint64_t k = 0; k < 8; k++) OK(send_message(h, 1, 8, k, NOT_AT_ALL));
    OK(send_message(h, 0, 8, 42, NOT_AT_ALL));
    OK(shmr_lease(worker, 0, 1, NOT_AT_ALL, &b));
    CHECK_STATUS(shmr_commit(worker, 1, 0, -1, NOT_AT_ALL, &b), SHMR_WOULD_BLOCK);
    CHECK_EQ(shmr_state_owner(state_of(h, b.block)), shmr_self(worker));
    OK(receive_message(h, 1, &tag, NOT_AT_ALL));
    OK(shmr_commit(worker, 1, 0, -1, NOT_AT_ALL, &b));
    for (uint64_t k = 1; k < 8; k++) {
        OK(receive_message(h, 1, &tag, NOT_AT_ALL));
        CHECK_EQ(tag, k);
    }
    OK(receive_message(h, 1, &tag, NOT_AT_ALL));
    CHECK_EQ(tag, 42);
    leave_region(worker);
    close_whole(h);
}

static void closed_rings(void) {
    shmr *h = open_ring(8, 0), *other = attach_region(fd);
    uint64_t tag = 0;
    OK(send_message(h, 0, 8, 1, NOT_AT_ALL));
    OK(send_message(h, 0, 8, 2, NOT_AT_ALL));
    shmr_block b = claim(other, 8);
    OK(shmr_close_ring(h, 0));
    CHECK_STATUS(shmr_commit(other, 0, 0, -1, FOR_EVER, &b), SHMR_CLOSED);
    OK(shmr_abort(other, &b)); /* still its own */
    OK(shmr_wait_item(other, 0, FOR_EVER));
    OK(receive_message(other, 0, &tag, FOR_EVER)); /* what was committed before arrives */
    OK(receive_message(other, 0, &tag, FOR_EVER));
    CHECK_EQ(tag, 2);
    CHECK_STATUS(receive_message(other, 0, &tag, FOR_EVER), SHMR_CLOSED);
    CHECK_STATUS(receive_message(other, 0, &tag, NOT_AT_ALL), SHMR_CLOSED);
    CHECK_STATUS(shmr_wait_item(other, 0, FOR_EVER), SHMR_CLOSED);
    OK(send_message(h, 1, 8, 3, NOT_AT_ALL)); /* the other ring is open */
    OK(receive_message(h, 1, &tag, NOT_AT_ALL));
    leave_region(other);
    close_whole(h);
}

/* ---- helping: the cursors are hints, which whoever died may have left behind ---------------------------------------------- */

static void cursors_left_behind(void) {
    shmr *h = open_ring(4, UINT64_MAX - 2);
    struct shmr_ring *q = shmr_ring_at(h, 0);
    uint64_t tag = 0, sent = 0, received = 0;
    for (int turn = 0; turn < 20; turn++) {
        OK(send_message(h, 0, 8, sent++, NOT_AT_ALL));
        shmr_add_seq_cst(&q->commit_cursor, UINT64_MAX); /* died before it moved the cursor */
        CHECK(shmr_ring_has_item(h, 0));
        OK(shmr_wait_item(h, 0, NOT_AT_ALL));
        if (turn % 2) {
            OK(receive_message(h, 0, &tag, NOT_AT_ALL)); /* taken all the same */
            CHECK_EQ(tag, received++);
        }
        OK(send_message(h, 0, 8, sent++, NOT_AT_ALL)); /* helps first */
        while (received < sent) {
            OK(receive_message(h, 0, &tag, NOT_AT_ALL));
            CHECK_EQ(tag, received++);
            shmr_add_seq_cst(&q->lease_cursor, UINT64_MAX); /* likewise for the consumer */
        }
        CHECK_STATUS(receive_message(h, 0, &tag, NOT_AT_ALL), SHMR_WOULD_BLOCK);
    }
    /* A ring that looks full only because the consumer did not get to move its cursor. */
    for (int k = 0; k < 4; k++) OK(send_message(h, 0, 8, sent++, NOT_AT_ALL));
    OK(receive_message(h, 0, &tag, NOT_AT_ALL));
    shmr_add_seq_cst(&q->lease_cursor, UINT64_MAX);
    OK(send_message(h, 0, 8, sent++, NOT_AT_ALL));
    for (int k = 0; k < 4; k++) OK(receive_message(h, 0, &tag, NOT_AT_ALL));
    close_whole(h);
}

/* Rubbish in the control words is reported; nobody spins for ever. */
static void rubbish_in_a_ring(void) {
    shmr *h = open_ring(4, 0);
    uint64_t tag = 0;
    shmr_store_relaxed(&shmr_ring_at(h, 0)->commit_cursor, 1000);
    shmr_store_relaxed(&shmr_ring_at(h, 0)->lease_cursor, 1000);
    CHECK_STATUS(send_message(h, 0, 8, 1, NOT_AT_ALL), SHMR_CORRUPT);
    CHECK_STATUS(receive_message(h, 0, &tag, NOT_AT_ALL), SHMR_CORRUPT);
    CHECK_EQ(shmr_load_relaxed(&shmr_header_of(h)->poisoned), 1);
    CHECK_EQ(counters_of(h).pins, 0);
    leave_region(h);
    close(fd);
}

/* ---- records and memory ---------------------------------------------------------------------------------------------------- */

static void every_record(void) {
    shmr_config config = small_config();
    config.blocks = 512;
    shmr *h = create_region(&config, &fd);
    static shmr_block blocks[512];
    shmr_block more = {0};
    for (int turn = 0; turn < 3; turn++) {
        for (int i = 0; i < 512; i++) blocks[i] = claim(h, 64);
        CHECK_STATUS(shmr_claim(h, 64, NULL, 0, -1, NOT_AT_ALL, &more), SHMR_WOULD_BLOCK);
        CHECK_EQ(counters_of(h).used, 512 * 64);
        for (int i = 0; i < 512; i++) OK(shmr_abort(h, &blocks[i]));
        CHECK_EQ(counters_of(h).used, 0);
    }
    close_whole(h);
}

/* What others release comes back to who allocated it, by the hint alone and without it. */
static void memory_comes_back(void) {
    shmr *h = open_ring(8, 0), *other = attach_region(fd);
    shmr_block b = {0}, kept[8] = {0};
    for (int turn = 0; turn < 50; turn++) { /* 50 x 8 x 4 MiB through a budget of 32 */
        for (int i = 0; i < 8; i++) {
            b = claim(h, 4 * MIB);
            OK(shmr_commit(h, 0, 0, -1, NOT_AT_ALL, &b));
        }
        CHECK_STATUS(shmr_claim(h, 4 * MIB, NULL, 0, -1, NOT_AT_ALL, &b), SHMR_WOULD_BLOCK);
        for (int i = 0; i < 8; i++) OK(shmr_lease(other, 0, 0, NOT_AT_ALL, &kept[i]));
        for (int i = 0; i < 8; i++) {
            OK(shmr_release(other, &kept[i]));
            if (turn % 2) { /* as if the releaser had died before it could tell */
                for (int w = 0; w < SHMR_GROUP / 64; w++)
                    shmr_store_relaxed(&shmr_group_at(h, kept[i].block / SHMR_GROUP)->freed[w], 0);
                shmr_store_relaxed(&shmr_participant_at(h, 0)->freed_hint, 0);
            }
        }
    }
    leave_region(other);
    close_whole(h);
}

int main(void) {
    RUN(a_message_arrives_as_it_was_sent);
    RUN(sent_in_one_call);
    RUN(empty_messages);
    RUN(first_in_first_out);
    RUN(capacity_is_exact);
    RUN(wrap_around);
    RUN(generations_wrap);
    RUN(forwarding);
    RUN(closed_rings);
    RUN(cursors_left_behind);
    RUN(rubbish_in_a_ring);
    RUN(every_record);
    RUN(memory_comes_back);
    return summary("unit_ring");
}
