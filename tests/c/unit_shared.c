/* SPDX-License-Identifier: BSD-3-Clause */
/* By reference: share, hold, drop, publish; frames keep alive what they name; addresses lead to blocks. */
#include "harness.h"

static int fd;
static shmr *h;

static void open_shared(void) {
    shmr_config config = small_config();
    h = create_region(&config, &fd);
}

static void close_whole(void) {
    check_whole(h);
    leave_region(h);
    close(fd);
}

static shmr_ref publish(shmr *p, uint64_t bytes, char fill) {
    shmr_block b = {0};
    shmr_ref ref = {0};
    OK(shmr_claim(p, bytes, NULL, 0, -1, NOT_AT_ALL, &b));
    b.length = bytes;
    memset(bytes_of(p, &b), fill, bytes);
    OK(shmr_publish(p, &b, &ref));
    CHECK_EQ(b.state, 0);
    CHECK_EQ(kind_of(p, ref.block), SHMR_SHARED);
    return ref;
}

/* Commit a frame that names `count` blocks. */
static uint32_t send_frame(shmr *p, uint32_t ring, const shmr_ref *refs, uint32_t count) {
    shmr_block b = {0};
    OK(shmr_claim(p, 100, refs, count, -1, NOT_AT_ALL, &b));
    b.length = 100;
    memset(bytes_of(p, &b), 1, 100);
    uint32_t block = b.block;
    OK(shmr_commit(p, ring, 1, -1, NOT_AT_ALL, &b));
    return block;
}

static bool holds_bit(const shmr *p, uint32_t block, uint32_t slot) {
    return shmr_load_seq_cst(&shmr_record_at(p, block)->holders[slot / 64]) >> (slot % 64) & 1;
}

static void publish_hold_drop(void) {
    open_shared();
    shmr *other = attach_region(fd);
    const uint64_t sizes[] = {1, 64, 700, 32768, 100000, 3 * MIB};
    for (uint32_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        shmr_ref ref = publish(h, sizes[i], (char)i), held, found;
        CHECK_EQ(ref.length, sizes[i]);
        CHECK(holds_bit(h, ref.block, 0) && !holds_bit(h, ref.block, 1));
        for (int k = 0; k < 3; k++) { /* counted by the holder, one bit to the others */
            OK(shmr_hold(other, ref.block, ref.generation, &held));
            CHECK_EQ(held.offset, ref.offset);
            CHECK_EQ(held.length, sizes[i]);
        }
        CHECK(holds_bit(h, ref.block, 1));
        CHECK_EQ(counters_of(other).held, shmr_arena_room(sizes[i]));
        OK(shmr_share(other, other->base + held.offset + sizes[i] / 2, 0, &found)); /* the holder finds it too */
        CHECK_EQ(found.block, ref.block);
        CHECK_EQ(found.offset, sizes[i] / 2);
        OK(shmr_drop(h, ref.block, ref.generation));
        CHECK_STATUS(shmr_drop(h, ref.block, ref.generation), SHMR_STALE);
        CHECK_EQ(kind_of(h, ref.block), SHMR_SHARED);
        CHECK_EQ(counters_of(h).used, shmr_arena_room(sizes[i])); /* the other still has it */
        for (int k = 0; k < 3; k++) {
            CHECK_EQ(other->base[held.offset], (char)i);
            OK(shmr_drop(other, ref.block, ref.generation));
        }
        CHECK_STATUS(shmr_drop(other, ref.block, ref.generation), SHMR_STALE);
        CHECK_EQ(kind_of(h, ref.block), SHMR_FREE);
        CHECK_STATUS(shmr_hold(other, ref.block, ref.generation, &held), SHMR_STALE);
        CHECK_STATUS(shmr_hold(h, ref.block, ref.generation, &held), SHMR_STALE);
        CHECK_STATUS(shmr_share(other, other->base + ref.offset, 0, &found), SHMR_NOT_SHARED);
        CHECK_EQ(counters_of(h).used, 0);
        CHECK_EQ(counters_of(other).held, 0);
    }
    leave_region(other);
    close_whole();
}

/* A reference from a block's earlier life does not match, and holding by it leaves no trace. */
static void old_references(void) {
    open_shared();
    shmr *other = attach_region(fd);
    shmr_ref old = publish(h, 100, 1), held;
    OK(shmr_drop(h, old.block, old.generation));
    shmr_ref young = publish(h, 100, 2);
    CHECK_EQ(young.block, old.block);
    CHECK(young.generation != old.generation);
    CHECK_STATUS(shmr_hold(other, old.block, old.generation, &held), SHMR_STALE);
    CHECK(!holds_bit(h, young.block, 1));
    CHECK_STATUS(shmr_drop(h, old.block, old.generation), SHMR_STALE);
    CHECK_STATUS(shmr_hold(other, h->g.config.blocks, 0, &held), SHMR_STALE);
    CHECK_STATUS(shmr_drop(other, h->g.config.blocks, 0), SHMR_STALE);
    OK(shmr_hold(other, young.block, young.generation, &held));
    OK(shmr_drop(h, young.block, young.generation));
    OK(shmr_drop(other, young.block, young.generation));
    /* A message is not a shared block, whatever its state. */
    shmr_block b = {0};
    OK(shmr_claim(h, 100, NULL, 0, -1, NOT_AT_ALL, &b));
    shmr_block copy = b;
    CHECK_STATUS(shmr_hold(other, b.block, shmr_state_generation(b.state), &held), SHMR_STALE);
    OK(shmr_abort(h, &b));
    CHECK_STATUS(shmr_publish(h, &copy, &held), SHMR_STALE);
    leave_region(other);
    close_whole();
}

/* The frame keeps them alive from the claim on until it is free itself, whoever drops them meanwhile. */
static void frames_keep_alive_what_they_name(void) {
    open_shared();
    shmr *worker = attach_region(fd);
    for (int outcome = 0; outcome < 3; outcome++) {
        shmr_ref refs[3], found[3], held;
        for (int i = 0; i < 3; i++) refs[i] = publish(h, 40000 + 1000 * (uint64_t)i, (char)(10 + i));
        uint64_t bytes = counters_of(h).used;
        if (outcome == 0) { /* aborted: never sent */
            shmr_block b = {0};
            OK(shmr_claim(h, 100, refs, 3, -1, NOT_AT_ALL, &b));
            CHECK_EQ(b.references, 3);
            for (int i = 0; i < 3; i++) OK(shmr_drop(h, refs[i].block, refs[i].generation));
            for (int i = 0; i < 3; i++) CHECK_EQ(kind_of(h, refs[i].block), SHMR_SHARED);
            OK(shmr_abort(h, &b));
            for (int i = 0; i < 3; i++) CHECK_EQ(kind_of(h, refs[i].block), SHMR_FREE);
            continue;
        }
        send_frame(h, 0, refs, 3);
        for (int i = 0; i < 3; i++) OK(shmr_drop(h, refs[i].block, refs[i].generation));
        shmr_block b = {0};
        OK(shmr_lease(worker, 0, 1, NOT_AT_ALL, &b));
        CHECK_EQ(b.references, 3);
        CHECK_EQ(b.length, 100);
        CHECK(b.offset % 64 == 0 && bytes_of(worker, &b)[99] == 1);
        OK(shmr_references(worker, &b, found, 3));
        CHECK_STATUS(shmr_references(worker, &b, found, 4), SHMR_BAD_ARGUMENT);
        for (int i = 0; i < 3; i++) {
            CHECK_EQ(found[i].block, refs[i].block);
            CHECK_EQ(found[i].generation, refs[i].generation);
        }
        CHECK(counters_of(h).used >= bytes);
        if (outcome == 1) { /* the receiver holds one on */
            OK(shmr_hold(worker, found[1].block, found[1].generation, &held));
            OK(shmr_release(worker, &b));
            shmr_trim(h); /* the frame's record is reclaimed: only now do its references go */
            CHECK_EQ(kind_of(h, refs[0].block), SHMR_FREE);
            CHECK_EQ(kind_of(h, refs[1].block), SHMR_SHARED);
            CHECK_EQ(kind_of(h, refs[2].block), SHMR_FREE);
            CHECK_EQ(worker->base[held.offset + 40999], 11);
            OK(shmr_drop(worker, found[1].block, found[1].generation));
            CHECK_EQ(kind_of(h, refs[1].block), SHMR_FREE);
        } else { /* forwarded: the table goes with it */
            OK(shmr_commit(worker, 1, 1, -1, NOT_AT_ALL, &b));
            shmr_trim(h);
            for (int i = 0; i < 3; i++) CHECK_EQ(kind_of(h, refs[i].block), SHMR_SHARED);
            OK(shmr_lease(h, 1, 1, NOT_AT_ALL, &b));
            CHECK_EQ(b.references, 3);
            OK(shmr_release(h, &b));
            for (int i = 0; i < 3; i++) CHECK_EQ(kind_of(h, refs[i].block), SHMR_FREE);
        }
        CHECK_EQ(counters_of(h).used, 0);
    }
    leave_region(worker);
    close_whole();
}

static void a_frame_names_only_what_its_sender_holds(void) {
    open_shared();
    shmr *other = attach_region(fd);
    shmr_ref ref = publish(h, 100, 1), held;
    shmr_block b = {0};
    CHECK_STATUS(shmr_claim(other, 10, &ref, 1, -1, NOT_AT_ALL, &b), SHMR_STALE);
    OK(shmr_hold(other, ref.block, ref.generation, &held));
    send_frame(other, 0, &ref, 1); /* what it received it may send on */
    OK(shmr_drop(other, ref.block, ref.generation));
    OK(shmr_drop(h, ref.block, ref.generation));
    CHECK_EQ(kind_of(h, ref.block), SHMR_SHARED);
    OK(shmr_lease(h, 0, 1, NOT_AT_ALL, &b));
    OK(shmr_release(h, &b));
    shmr_trim(other);
    CHECK_EQ(kind_of(h, ref.block), SHMR_FREE);
    shmr_ref rubbish = {h->g.config.blocks, 0, 0, 0};
    CHECK_STATUS(shmr_claim(h, 10, &rubbish, 1, -1, NOT_AT_ALL, &b), SHMR_STALE);
    leave_region(other);
    close_whole();
}

static void many_references(void) {
    open_shared();
    static shmr_ref refs[2000], found[2000];
    shmr_ref ref = publish(h, 64, 9);
    for (int i = 0; i < 2000; i++) refs[i] = ref;
    send_frame(h, 0, refs, 2000);
    OK(shmr_drop(h, ref.block, ref.generation));
    shmr_block b = {0};
    OK(shmr_lease(h, 0, 1, NOT_AT_ALL, &b));
    OK(shmr_references(h, &b, found, 2000));
    for (int i = 0; i < 2000; i++) CHECK(found[i].block == ref.block && found[i].generation == ref.generation);
    CHECK_EQ(kind_of(h, ref.block), SHMR_SHARED);
    OK(shmr_release(h, &b));
    CHECK_EQ(kind_of(h, ref.block), SHMR_FREE);
    close_whole();
}

/* One block, one record: sharing an address inside a published block finds that block. */
static void sharing_what_was_published(void) {
    open_shared();
    const uint64_t sizes[] = {64, 5000, 100000, 5 * MIB};
    for (uint32_t i = 0; i < 4; i++) {
        shmr_ref ref = publish(h, sizes[i], 3), found;
        OK(shmr_share(h, h->base + ref.offset, sizes[i], &found));
        CHECK_EQ(found.block, ref.block);
        CHECK_EQ(found.generation, ref.generation);
        OK(shmr_share(h, h->base + ref.offset + sizes[i] - 1, 1, &found));
        CHECK_EQ(found.block, ref.block);
        CHECK_EQ(found.offset, sizes[i] - 1);
        CHECK_STATUS(shmr_share(h, h->base + ref.offset, shmr_arena_room(sizes[i]) + 1, &found), SHMR_NOT_SHARED);
        OK(shmr_drop(h, ref.block, ref.generation));
        CHECK_STATUS(shmr_share(h, h->base + ref.offset, 1, &found), SHMR_NOT_SHARED);
        CHECK_EQ(counters_of(h).used, 0);
    }
    /* What is being written, or under way, or read, is not shared; nor is memory outside. */
    shmr_block b = {0};
    shmr_ref found;
    OK(shmr_claim(h, 50000, NULL, 0, -1, NOT_AT_ALL, &b));
    b.length = 50000;
    void *inside = bytes_of(h, &b) + 100;
    CHECK_STATUS(shmr_share(h, inside, 1, &found), SHMR_NOT_SHARED);
    OK(shmr_commit(h, 0, 0, -1, NOT_AT_ALL, &b));
    CHECK_STATUS(shmr_share(h, inside, 1, &found), SHMR_NOT_SHARED);
    OK(shmr_lease(h, 0, 0, NOT_AT_ALL, &b));
    CHECK_STATUS(shmr_share(h, inside, 1, &found), SHMR_NOT_SHARED);
    OK(shmr_release(h, &b));
    CHECK_STATUS(shmr_share(h, inside, 1, &found), SHMR_NOT_SHARED);
    CHECK_STATUS(shmr_share(h, &b, 1, &found), SHMR_NOT_SHARED);
    CHECK_STATUS(shmr_share(h, h->base, 1, &found), SHMR_NOT_SHARED);
    CHECK_STATUS(shmr_share(h, h->base + shmr_mapped_bytes(h), 1, &found), SHMR_NOT_SHARED);
    close_whole();
}

/* Small blocks share pages: each address finds its own. */
static void small_blocks_in_shared_pages(void) {
    open_shared();
    shmr *other = attach_region(fd);
    shmr_ref refs[300], held, found;
    const uint64_t sizes[] = {64, 192, 640, 7168, 28672};
    for (uint32_t i = 0; i < 300; i++) {
        refs[i] = publish(h, sizes[i % 5], (char)i);
        OK(shmr_hold(other, refs[i].block, refs[i].generation, &held));
    }
    for (uint32_t i = 0; i < 300; i += 2) { /* every other one goes */
        OK(shmr_drop(other, refs[i].block, refs[i].generation));
        OK(shmr_drop(h, refs[i].block, refs[i].generation));
    }
    for (uint32_t i = 0; i < 300; i++)
        for (uint64_t at = 0; at < sizes[i % 5]; at += sizes[i % 5] - 1) {
            int expected = i % 2 ? SHMR_OK : SHMR_NOT_SHARED;
            CHECK_STATUS(shmr_share(h, h->base + refs[i].offset + at, 1, &found), expected);
            CHECK_STATUS(shmr_share(other, other->base + refs[i].offset + at, 1, &found), expected);
            if (i % 2) {
                CHECK_EQ(found.block, refs[i].block);
                CHECK_EQ(found.offset, at);
                CHECK_EQ(other->base[refs[i].offset + at], (char)i);
            }
        }
    for (uint32_t i = 1; i < 300; i += 2) {
        OK(shmr_drop(h, refs[i].block, refs[i].generation));
        OK(shmr_drop(other, refs[i].block, refs[i].generation));
    }
    leave_region(other);
    close_whole();
}

/* The holder's tables of pages and whole extents. */
static void large_blocks_by_address(void) {
    open_shared();
    shmr *other = attach_region(fd);
    const uint64_t sizes[] = {36864, 100 * SHMR_PAGE, 2 * MIB, 5 * MIB + 12345, 9 * MIB};
    shmr_ref refs[5], held, found;
    for (int i = 0; i < 5; i++) {
        refs[i] = publish(h, sizes[i], 1);
        OK(shmr_hold(other, refs[i].block, refs[i].generation, &held));
    }
    for (int i = 0; i < 5; i++) {
        for (uint64_t at = 0; at < sizes[i]; at += 4096 * 7 + 5) {
            OK(shmr_share(other, other->base + refs[i].offset + at, 1, &found));
            CHECK_EQ(found.block, refs[i].block);
        }
        OK(shmr_drop(other, refs[i].block, refs[i].generation));
        CHECK_STATUS(shmr_share(other, other->base + refs[i].offset, 1, &found), SHMR_NOT_SHARED);
        OK(shmr_drop(h, refs[i].block, refs[i].generation));
    }
    leave_region(other);
    close_whole();
}

/* Arrays of NumPy's, born in the arena, sent, kept by others beyond their own end. */
static void numpy_memory(void) {
    open_shared();
    shmr *other = attach_region(fd);
    struct shmr_numpy_handler *numpy = shmr_numpy_handler(h, 4096, UINT64_MAX / 2);
    void *context = numpy->allocator.context;
    char *small = numpy->allocator.malloc(context, 4095), *large = numpy->allocator.malloc(context, 1000000);
    CHECK(small < h->base || small >= h->base + shmr_mapped_bytes(h));
    CHECK(large > h->base && large < h->base + shmr_mapped_bytes(h));
    CHECK_EQ(counters_of(h).pins, 1);
    numpy->allocator.free(context, small, 4095);
    memset(large, 5, 1000000);
    numpy->allocator.free(context, large, 1000000);
    char *zero = numpy->allocator.calloc(context, 1000, 1000); /* the same memory, recycled */
    CHECK_EQ(zero, large);
    for (int i = 0; i < 1000000; i += 999) CHECK_EQ(zero[i], 0);
    zero[999999] = 77;
    char *longer = numpy->allocator.realloc(context, zero, 3000000);
    CHECK_EQ(longer[999999], 77);
    char *shorter = numpy->allocator.realloc(context, longer, 1000000);
    CHECK_EQ(shorter[999999], 77);

    shmr_ref ref, again, held;
    OK(shmr_share(h, shorter + 999999, 1, &ref));
    OK(shmr_share(h, shorter, 1000000, &again));
    CHECK(ref.block == again.block && ref.generation == again.generation);
    send_frame(h, 0, &ref, 1);
    shmr_block b = {0};
    OK(shmr_lease(other, 0, 1, NOT_AT_ALL, &b));
    OK(shmr_hold(other, ref.block, ref.generation, &held));
    OK(shmr_release(other, &b));
    numpy->allocator.free(context, shorter, 1000000); /* the array dies here, the other keeps its memory */
    CHECK_EQ(counters_of(h).pins, 0);
    CHECK_EQ(kind_of(h, ref.block), SHMR_SHARED);
    CHECK_EQ(other->base[held.offset + 999999], 77);
    char *elsewhere = numpy->allocator.malloc(context, 1000000);
    CHECK(elsewhere != shorter);
    numpy->allocator.free(context, elsewhere, 1000000);
    OK(shmr_drop(other, ref.block, ref.generation));
    CHECK_EQ(counters_of(h).used, 0);

    /* Full: plain malloc, no error. */
    char *all = numpy->allocator.malloc(context, 32 * MIB), *outside = numpy->allocator.malloc(context, MIB);
    CHECK(all > h->base && all < h->base + shmr_mapped_bytes(h));
    CHECK(outside < h->base || outside >= h->base + shmr_mapped_bytes(h));
    numpy->allocator.free(context, outside, MIB);
    numpy->allocator.free(context, all, 32 * MIB);
    leave_region(other);
    close_whole(); /* with the last array all goes but what a handler may look at */
    outside = numpy->allocator.malloc(context, MIB);
    numpy->allocator.free(context, outside, MIB);
    free(context); /* immortal otherwise; here they would be leaks to the sanitizer */
    free(h);
}

/* Several participants hold, drop and pass on at random; in the end nothing is left. */
static void many_holders_at_random(void) {
    open_shared();
    enum { PARTICIPANTS = 5, BLOCKS = 40 };
    shmr *all[PARTICIPANTS] = {h};
    for (int i = 1; i < PARTICIPANTS; i++) all[i] = attach_region(fd);
    shmr_ref refs[BLOCKS], held;
    uint32_t counts[BLOCKS][PARTICIPANTS] = {{0}};
    uint64_t seed = 5;
    for (int step = 0; step < 60000; step++) {
        uint32_t k = (uint32_t)random_below(&seed, BLOCKS), p = (uint32_t)random_below(&seed, PARTICIPANTS);
        uint32_t holders = 0;
        for (uint32_t i = 0; i < PARTICIPANTS; i++) holders += counts[k][i];
        if (!holders) {
            refs[k] = publish(all[p], random_size(&seed, 200000), (char)k);
            counts[k][p] = 1;
        } else if (random_below(&seed, 20) < 9) {
            OK(shmr_hold(all[p], refs[k].block, refs[k].generation, &held));
            CHECK_EQ(all[p]->base[held.offset + held.length - 1], (char)k);
            counts[k][p]++;
        } else if (counts[k][p]) {
            OK(shmr_drop(all[p], refs[k].block, refs[k].generation));
            counts[k][p]--;
            CHECK_EQ(kind_of(h, refs[k].block) == SHMR_FREE && holders == 1, holders == 1);
        } else {
            CHECK_STATUS(shmr_drop(all[p], refs[k].block, refs[k].generation), SHMR_STALE);
        }
    }
    for (uint32_t k = 0; k < BLOCKS; k++)
        for (uint32_t p = 0; p < PARTICIPANTS; p++)
            while (counts[k][p]--) OK(shmr_drop(all[p], refs[k].block, refs[k].generation));
    for (int i = 1; i < PARTICIPANTS; i++) leave_region(all[i]);
    close_whole();
}

int main(void) {
    RUN(publish_hold_drop);
    RUN(old_references);
    RUN(frames_keep_alive_what_they_name);
    RUN(a_frame_names_only_what_its_sender_holds);
    RUN(many_references);
    RUN(sharing_what_was_published);
    RUN(small_blocks_in_shared_pages);
    RUN(large_blocks_by_address);
    RUN(numpy_memory);
    RUN(many_holders_at_random);
    return summary("unit_shared");
}
