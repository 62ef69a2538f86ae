/* SPDX-License-Identifier: BSD-3-Clause */
/* Stale calls, arguments out of range, regions that are none, damaged bytes, broken sequences. */
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

/* ---- misuse --------------------------------------------------------------------------------------------------------- */

static void stale_calls_fail_and_change_nothing(void) {
    shmr *h = open_ring(8, 0), *other = attach_region(fd);
    shmr_block b = claim(h, 100), copy = b, got;
    OK(shmr_abort(h, &b));
    CHECK_STATUS(shmr_abort(h, &b), SHMR_STALE);
    CHECK_STATUS(shmr_abort(h, &copy), SHMR_STALE);
    CHECK_STATUS(shmr_commit(h, 0, 0, -1, FOR_EVER, &copy), SHMR_STALE);
    CHECK_EQ(counters_of(h).aborted, 1);

    b = claim(h, 100);
    b.tag = 77;
    memset(bytes_of(h, &b), 1, 100);
    copy = b;
    CHECK_STATUS(shmr_release(h, &b), SHMR_STALE); /* claimed, not leased */
    CHECK_STATUS(shmr_abort(other, &copy), SHMR_STALE); /* not its own */
    CHECK_STATUS(shmr_commit(other, 0, 0, -1, FOR_EVER, &copy), SHMR_STALE);
    OK(shmr_commit(h, 0, 1, -1, NOT_AT_ALL, &b));
    CHECK_STATUS(shmr_commit(h, 0, 1, -1, FOR_EVER, &b), SHMR_STALE);
    CHECK_STATUS(shmr_abort(h, &copy), SHMR_STALE);
    copy.tag = 78; /* a doubled commit must not write into the message that is under way */
    copy.length = 50;
    CHECK_STATUS(shmr_commit(h, 1, 1, -1, FOR_EVER, &copy), SHMR_STALE);
    OK(shmr_lease(other, 0, 1, NOT_AT_ALL, &got));
    CHECK_EQ(got.tag, 77);
    CHECK_EQ(got.length, 100);

    copy = got;
    CHECK_STATUS(shmr_release(h, &copy), SHMR_STALE); /* leased by the other */
    CHECK_STATUS(shmr_abort(other, &copy), SHMR_STALE);
    OK(shmr_release(other, &got));
    CHECK_STATUS(shmr_release(other, &got), SHMR_STALE);
    CHECK_STATUS(shmr_release(other, &copy), SHMR_STALE);
    CHECK_STATUS(shmr_commit(other, 0, 0, -1, FOR_EVER, &copy), SHMR_STALE);
    CHECK_EQ(counters_of(h).released, 1);

    /* The block's next life is none of the old copy's business. */
    OK(send_message(h, 0, 100, 5, NOT_AT_ALL));
    OK(shmr_lease(other, 0, 1, NOT_AT_ALL, &got));
    CHECK_EQ(got.block, copy.block);
    CHECK_STATUS(shmr_release(other, &copy), SHMR_STALE);
    OK(shmr_release(other, &got));
    CHECK_EQ(counters_of(h).pins, 0);
    CHECK_EQ(counters_of(other).pins, 0);
    leave_region(other);
    close_whole(h);
}

static void arguments_out_of_range(void) {
    shmr *h = open_ring(8, 0);
    shmr_block b = claim(h, 100), bad;
    CHECK_STATUS(shmr_commit(h, 2, 0, -1, FOR_EVER, &b), SHMR_BAD_ARGUMENT);
    bad = b;
    bad.length = b.room + 1;
    CHECK_STATUS(shmr_commit(h, 0, 0, -1, FOR_EVER, &bad), SHMR_BAD_ARGUMENT);
    bad = b;
    bad.spec_bytes = 129;
    CHECK_STATUS(shmr_commit(h, 0, 0, -1, FOR_EVER, &bad), SHMR_BAD_ARGUMENT);
    bad = b;
    bad.block = h->g.config.blocks;
    CHECK_STATUS(shmr_commit(h, 0, 0, -1, FOR_EVER, &bad), SHMR_STALE);
    CHECK_STATUS(shmr_abort(h, &bad), SHMR_STALE);
    OK(shmr_abort(h, &b));
    CHECK_STATUS(shmr_lease(h, 2, 0, FOR_EVER, &b), SHMR_BAD_ARGUMENT);
    CHECK_STATUS(shmr_close_ring(h, 2), SHMR_BAD_ARGUMENT);
    CHECK_STATUS(shmr_wait_item(h, 2, FOR_EVER), SHMR_BAD_ARGUMENT);
    CHECK_STATUS(shmr_claim(h, 33 * MIB, NULL, 0, -1, FOR_EVER, &b), SHMR_TOO_LARGE);
    CHECK_STATUS(shmr_claim(h, UINT64_MAX, NULL, 0, -1, FOR_EVER, &b), SHMR_BAD_ARGUMENT);
    OK(shmr_claim(h, 32 * MIB, NULL, 0, -1, NOT_AT_ALL, &b)); /* all of it */
    OK(shmr_abort(h, &b));
    close_whole(h);
}

static void attaching_validates(void) {
    shmr_config config = small_config();
    CHECK(shmr_region_bytes(&config) > config.arena_bytes);
    shmr_config bad[8];
    for (int i = 0; i < 8; i++) bad[i] = config;
    bad[0].participants = 257;
    bad[1].doorbells = 0;
    bad[2].rings = 9;
    bad[3].blocks = 255;
    bad[4].arena_bytes = 3 * MIB;
    bad[5].capacity[1] = 0;
    bad[6].capacity[0] = SHMR_MAX_BLOCKS + 1;
    bad[7].participants = 0;
    for (int i = 0; i < 8; i++) CHECK_EQ(shmr_region_bytes(&bad[i]), 0);

    shmr *other = NULL;
    int empty = memfd_create("shmr-empty", MFD_CLOEXEC);
    CHECK_STATUS(shmr_attach(empty, &other), SHMR_WOULD_BLOCK); /* the creator has not got that far */
    CHECK(ftruncate(empty, (off_t)shmr_region_bytes(&config)) == 0);
    CHECK_STATUS(shmr_attach(empty, &other), SHMR_WOULD_BLOCK);
    close(empty);

    shmr *h = open_ring(8, 0);
    struct shmr_header *header = shmr_header_of(h);
    shmr_word *words[] = {&header->magic, &header->abi, &header->hash, &header->config[SHMR_CONFIG_BLOCKS],
                          &header->config[SHMR_CONFIG_ARENA_BYTES], &header->config[SHMR_CONFIG_PARTICIPANTS],
                          &header->config[SHMR_CONFIG_CAPACITY]};
    for (uint32_t i = 0; i < sizeof words / sizeof *words; i++)
        for (int bit = 0; bit < 64; bit += 3) {
            uint64_t good = shmr_load_relaxed(words[i]);
            shmr_store_relaxed(words[i], good ^ UINT64_C(1) << bit);
            CHECK_STATUS(shmr_attach(fd, &other), SHMR_MISMATCH);
            shmr_store_relaxed(words[i], good);
        }
    CHECK(ftruncate(fd, (off_t)shmr_mapped_bytes(h) - 4096) == 0);
    CHECK_STATUS(shmr_attach(fd, &other), SHMR_MISMATCH);
    CHECK(ftruncate(fd, (off_t)shmr_mapped_bytes(h)) == 0);
    shmr *others[7];
    for (int i = 0; i < 7; i++) others[i] = attach_region(fd);
    CHECK_STATUS(shmr_attach(fd, &other), SHMR_CROWDED);
    for (int i = 0; i < 7; i++) leave_region(others[i]);
    other = attach_region(fd); /* and there is room again */
    leave_region(other);
    close_whole(h);
}

static void a_closed_handle(void) {
    shmr *h = open_ring(8, 0), *other = attach_region(fd);
    shmr_block b = {0};
    OK(send_message(h, 0, 8, 1, NOT_AT_ALL));
    OK(shmr_lease(other, 0, 1, NOT_AT_ALL, &b));
    uint32_t slot = shmr_self(other);
    OK(shmr_close(other, 0));
    CHECK_STATUS(send_message(other, 0, 8, 1, FOR_EVER), SHMR_CLOSED);
    CHECK_STATUS(receive_message(other, 0, NULL, FOR_EVER), SHMR_CLOSED);
    CHECK_EQ(life_of(h, slot), SHMR_LIVE); /* it has still something to give back */
    OK(shmr_release(other, &b));
    CHECK_EQ(life_of(h, slot), SHMR_VACANT);
    shmr_free(other);
    close_whole(h);
}

static void a_forked_child_has_no_handle(void) {
    shmr *h = open_ring(8, 0);
    shmr_block b = claim(h, 8);
    pid_t child = fork();
    if (child == 0) {
        shmr_block mine = b;
        CHECK_STATUS(shmr_commit(h, 0, 0, -1, FOR_EVER, &mine), SHMR_FORKED);
        CHECK_STATUS(shmr_abort(h, &mine), SHMR_FORKED);
        CHECK_STATUS(shmr_lease(h, 0, 0, FOR_EVER, &mine), SHMR_FORKED);
        CHECK_STATUS(shmr_claim(h, 8, NULL, 0, -1, FOR_EVER, &mine), SHMR_FORKED);
        CHECK_STATUS(shmr_close(h, 1), SHMR_FORKED);
        shmr *own = attach_region(fd); /* but it may join as somebody else */
        CHECK(shmr_self(own) != shmr_self(h));
        OK(send_message(own, 0, 8, 5, NOT_AT_ALL));
        OK(shmr_close(own, 0));
        _exit(shmr_count_get(&check_failures) != 0);
    }
    expect_success(child);
    uint64_t tag = 0;
    OK(shmr_abort(h, &b));
    OK(receive_message(h, 0, &tag, NOT_AT_ALL));
    CHECK_EQ(tag, 5);
    close_whole(h);
}

/* ---- damage ------------------------------------------------------------------------------------------------------------ */

static void a_damaged_payload(void) {
    shmr *h = open_ring(8, 0);
    shmr_block b = {0}, got = {0};
    uint64_t tag = 0;
    for (int checked = 0; checked < 2; checked++) {
        b = claim(h, 100000);
        memset(bytes_of(h, &b), 7, 100000);
        char *somewhere = bytes_of(h, &b) + 77777;
        OK(shmr_commit(h, 0, 1, -1, NOT_AT_ALL, &b));
        OK(send_message(h, 0, 8, 2, NOT_AT_ALL));
        *somewhere ^= 1;
        if (checked) {
            CHECK_STATUS(shmr_lease(h, 0, 1, NOT_AT_ALL, &got), SHMR_CORRUPT);
            CHECK(strstr(shmr_last_detail(), "payload") != NULL);
        } else { /* nobody asked */
            OK(shmr_lease(h, 0, 0, NOT_AT_ALL, &got));
            OK(shmr_release(h, &got));
        }
        OK(receive_message(h, 0, &tag, NOT_AT_ALL)); /* the next one is good */
        CHECK_EQ(tag, 2);
    }
    close_whole(h);
}

static void a_damaged_descriptor(void) {
    for (int field = 0; field < 9; field++)
        for (int bit = 0; bit < 64; bit += 3) {
            shmr *h = open_ring(8, 0);
            uint64_t tag = 0;
            shmr_block b = claim(h, 100), got;
            struct shmr_record *r = shmr_record_at(h, b.block);
            shmr_word *words[] = {&r->offset, &r->room,  &r->length, &r->seq,       &r->tag,
                                  &r->detail, &r->check, &r->spec[1], &r->references};
            b.spec_bytes = 16;
            OK(send_message(h, 0, 8, 1, NOT_AT_ALL));
            OK(shmr_commit(h, 0, 0, -1, NOT_AT_ALL, &b));
            OK(send_message(h, 0, 8, 2, NOT_AT_ALL));
            OK(receive_message(h, 0, &tag, NOT_AT_ALL));
            shmr_store_relaxed(words[field], shmr_load_relaxed(words[field]) ^ UINT64_C(1) << bit);
            bool attempts = field == 5 && bit >= 16 && bit < 32; /* not covered: recovery counts them */
            bool payload = field == 6 && bit < 32;               /* the payload's checksum: not asked for */
            if (attempts || payload) {
                OK(shmr_lease(h, 0, 0, NOT_AT_ALL, &got));
                OK(shmr_release(h, &got));
            } else {
                CHECK_STATUS(shmr_lease(h, 0, 0, NOT_AT_ALL, &got), SHMR_CORRUPT);
            }
            /* The good message behind it arrives, and the allocator relies on its private notes. */
            OK(receive_message(h, 0, &tag, NOT_AT_ALL));
            CHECK_EQ(tag, 2);
            CHECK_EQ(counters_of(h).pins, 0);
            close_whole(h);
        }
}

/* The only consumer notices that a producer's message is missing. */
static void a_gap_is_reported(void) {
    shmr *h = open_ring(8, 0);
    uint64_t tag = 0;
    OK(send_message(h, 0, 8, 1, NOT_AT_ALL));
    OK(receive_message(h, 0, &tag, NOT_AT_ALL));
    h->next_seq[0]++; /* as if one had been lost */
    OK(send_message(h, 0, 8, 2, NOT_AT_ALL));
    CHECK_STATUS(receive_message(h, 0, &tag, NOT_AT_ALL), SHMR_CORRUPT);
    OK(send_message(h, 0, 8, 3, NOT_AT_ALL));
    OK(receive_message(h, 0, &tag, NOT_AT_ALL));
    h->next_seq[0]--; /* as if one came twice */
    OK(send_message(h, 0, 8, 4, NOT_AT_ALL));
    CHECK_STATUS(receive_message(h, 0, &tag, NOT_AT_ALL), SHMR_CORRUPT);
    close_whole(h);
}

/* With several consumers each sees a part: no gaps are reported, repetitions are. */
static void several_consumers_see_parts(void) {
    shmr *h = open_ring(8, 0), *a = attach_region(fd), *b = attach_region(fd);
    uint64_t tag = 0;
    for (uint64_t k = 0; k < 8; k++) OK(send_message(h, 0, 8, k, NOT_AT_ALL));
    for (uint64_t k = 0; k < 8; k++) {
        OK(receive_message(k % 3 ? a : b, 0, &tag, NOT_AT_ALL));
        CHECK_EQ(tag, k);
    }
    h->next_seq[0] -= 1;
    OK(send_message(h, 0, 8, 9, NOT_AT_ALL));
    CHECK_STATUS(receive_message(a, 0, &tag, NOT_AT_ALL), SHMR_CORRUPT);
    leave_region(a);
    leave_region(b);
    close_whole(h);
}

/* A consumer is followed by another at the same place of the table, which has seen none of the old numbers. */
static void a_consumer_is_replaced(void) {
    shmr *h = open_ring(8, 0);
    uint64_t tag = 0, sent = 0, received = 0;
    for (int life = 0; life < 4; life++) {
        shmr *consumer = attach_region(fd);
        CHECK_EQ(shmr_self(consumer), 1);
        for (int k = 0; k < 3; k++) OK(send_message(h, 0, 8, sent++, NOT_AT_ALL));
        for (int k = 0; k < 3; k++) {
            OK(receive_message(consumer, 0, &tag, NOT_AT_ALL));
            CHECK_EQ(tag, received++);
        }
        leave_region(consumer);
    }
    close_whole(h);
}

/* And a producer: the numbers begin again. */
static void a_producer_is_replaced(void) {
    shmr *h = open_ring(8, 0);
    uint64_t tag = 0, sent = 0, received = 0;
    for (int life = 0; life < 4; life++) {
        shmr *producer = attach_region(fd);
        for (int k = 0; k < 3; k++) OK(send_message(producer, 0, 8, sent++, NOT_AT_ALL));
        leave_region(producer);
        for (int k = 0; k < 3; k++) {
            OK(receive_message(h, 0, &tag, NOT_AT_ALL));
            CHECK_EQ(tag, received++);
        }
    }
    close_whole(h);
}

/* A message that was delivered again, forwarded, does not confuse the count of those after it. */
static void attempts_do_not_break_the_sequence(void) {
    shmr *h = open_ring(8, 0), *worker = attach_region(fd);
    uint64_t tag = 0;
    shmr_block b = {0};
    for (uint64_t k = 0; k < 6; k++) {
        OK(send_message(h, 0, 8, k, NOT_AT_ALL));
        OK(shmr_lease(worker, 0, 1, NOT_AT_ALL, &b));
        b.attempts = k % 2 ? 1 : 0; /* as recovery would have counted it */
        OK(shmr_commit(worker, 1, 1, -1, NOT_AT_ALL, &b));
    }
    for (uint64_t k = 0; k < 6; k++) {
        OK(receive_message(h, 1, &tag, NOT_AT_ALL));
        CHECK_EQ(tag, k);
    }
    leave_region(worker);
    close_whole(h);
}

int main(void) {
    RUN(stale_calls_fail_and_change_nothing);
    RUN(arguments_out_of_range);
    RUN(attaching_validates);
    RUN(a_closed_handle);
    RUN(a_forked_child_has_no_handle);
    RUN(a_damaged_payload);
    RUN(a_damaged_descriptor);
    RUN(a_gap_is_reported);
    RUN(several_consumers_see_parts);
    RUN(a_consumer_is_replaced);
    RUN(a_producer_is_replaced);
    RUN(attempts_do_not_break_the_sequence);
    return summary("unit_damage");
}
