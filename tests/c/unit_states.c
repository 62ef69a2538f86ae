/* SPDX-License-Identifier: BSD-3-Clause */
/* What a function says when it is called at the wrong time, with the wrong argument, by the wrong process, or when a
 * shared word is not what it should be. */
#include "harness.h"

static int fd;
static shmr *h, *other;

static void open_config(const shmr_config *config) {
    h = create_region(config, &fd);
    other = attach_region(fd);
}
static void open_pair(void) {
    shmr_config config = small_config();
    config.doorbells = 4;
    config.capacity[0] = 4;
    open_config(&config);
}
static void close_pair(void) {
    leave_region(other);
    check_whole(h);
    leave_region(h);
    close(fd);
}
/* After damage that is for good. */
static void drop_pair(void) {
    OK(shmr_close(other, 1));
    shmr_free(other);
    OK(shmr_close(h, 1));
    shmr_free(h);
    close(fd);
}

/* A participant of this process that dies: its handle knows nothing any more, and the region nothing of that. */
static uint32_t die(shmr *v) {
    uint32_t slot = v->self;
    v->fork_epoch--;
    shmr_close_pidfds(v);
    shmr_free(v);
    return slot;
}

static shmr_block claim(shmr *by, uint64_t bytes) {
    shmr_block b = {0};
    OK(shmr_claim(by, bytes, NULL, 0, -1, NOT_AT_ALL, &b));
    b.length = bytes;
    return b;
}
static shmr_ref publish(shmr *by, uint64_t bytes) {
    shmr_block b = claim(by, bytes);
    shmr_ref ref;
    OK(shmr_publish(by, &b, &ref));
    return ref;
}
static struct shmr_record *record_of(const shmr_ref *ref) { return shmr_record_at(h, ref->block); }

/* ---- errors and geometry -------------------------------------------------------------------------------------------- */

static void statuses(void) {
    for (int s = 0; s <= 17; s++) CHECK(strcmp(shmr_status_text(s), shmr_status_text(99)) != 0);
    CHECK_EQ(shmr_abi(), SHMR_ABI);
}

static void geometries(void) {
    static const struct {
        size_t at, size;
        uint64_t low, high;
    } fields[] = {
#define FIELD(name, low, high) {offsetof(shmr_config, name), sizeof((shmr_config *)0)->name, low, high}
        FIELD(participants, 0, SHMR_MAX_PARTICIPANTS + 1), FIELD(doorbells, 0, SHMR_MAX_DOORBELLS + 1),
        FIELD(rings, 0, SHMR_MAX_RINGS + 1), FIELD(blocks, 0, SHMR_MAX_BLOCKS + SHMR_GROUP),
        FIELD(blocks, 300, 301), FIELD(arena_bytes, 0, (UINT64_C(1) << 41) + SHMR_EXTENT),
        FIELD(arena_bytes, SHMR_EXTENT + 1, SHMR_EXTENT * 3 / 2), FIELD(capacity[1], 0, SHMR_MAX_BLOCKS + 1),
    };
    for (size_t i = 0; i < sizeof fields / sizeof *fields; i++)
        for (int high = 0; high < 2; high++) {
            shmr_config config = small_config();
            uint64_t value = high ? fields[i].high : fields[i].low;
            memcpy((char *)&config + fields[i].at, &value, fields[i].size);
            shmr *none = NULL;
            CHECK_EQ(shmr_region_bytes(&config), 0);
            CHECK_STATUS(shmr_create(0, &config, &none), SHMR_MISMATCH);
        }
}

/* A file that is not all zero: its table of participants is full. */
static void a_used_file(void) {
    shmr_config config = small_config();
    config.participants = 1;
    int file = memfd_create("shmr-test", MFD_CLOEXEC);
    uint64_t life = shmr_life_pack(1, 0, (uint32_t)getpid(), SHMR_LIVE);
    REQUIRE(ftruncate(file, (off_t)shmr_region_bytes(&config)) == 0);
    REQUIRE(pwrite(file, &life, sizeof life, sizeof(struct shmr_header)) == sizeof life);
    shmr *none = NULL;
    CHECK_STATUS(shmr_create(file, &config, &none), SHMR_CROWDED);
    close(file);
}

static void places_in_the_table(void) {
    open_pair();
    uint64_t word;
    CHECK_STATUS(shmr_progress(h, 8, &word, &word, &word, &word), SHMR_BAD_ARGUMENT);
    uint64_t tag, index, since, starving;
    shmr_set_progress(h, 7, 3);
    OK(shmr_progress(other, shmr_self(h), &tag, &index, &since, &starving));
    CHECK(tag == 7 && index == 3 && since != 0 && starving == 0);
    shmr_set_progress(h, 0, 0);
    OK(shmr_progress(other, shmr_self(h), &tag, &index, &since, &starving));
    CHECK(tag == 0 && since == 0);
    shmr_deny(h, 8); /* nobody */
    CHECK_STATUS(shmr_recover(h, 8, NULL, 0, NULL), SHMR_BAD_ARGUMENT);
    CHECK_STATUS(shmr_recover(h, shmr_self(h), NULL, 0, NULL), SHMR_BAD_ARGUMENT);
    CHECK_STATUS(shmr_recover(h, 5, NULL, 0, NULL), SHMR_STALE);
    CHECK_EQ(shmr_find(h, 1), (uint64_t)-1);
    shmr_word *life = &shmr_participant_at(h, other->self)->life;
    uint64_t live = shmr_load_seq_cst(life);
    shmr_store_release(&shmr_participant_at(h, 0)->life, shmr_life_pack(1, 0, 1, SHMR_LEFT));
    CHECK_EQ(shmr_find(h, 1), (uint64_t)-1);
    shmr_store_release(life, shmr_life_pack(1, shmr_namespace_tag(h), (uint32_t)getpid(), SHMR_JOINING));
    CHECK_EQ(shmr_find(h, (uint32_t)getpid()), other->self);
    CHECK(!shmr_alone(h)); /* nobody has died */
    shmr_add_relaxed(&shmr_header_of(h)->deaths, 1);
    CHECK(!shmr_alone(h)); /* one is joining */
    shmr_store_release(life, shmr_life_pack(1, 0, 1, SHMR_LEFT));
    CHECK(shmr_alone(h));
    shmr_store_release(&shmr_participant_at(h, 0)->life, shmr_life_pack(1, 0, (uint32_t)getpid(), SHMR_LIVE));
    shmr_store_release(life, live);
    /* One that died while it joined has an heir at once. */
    pid_t child = fork();
    if (child == 0) _exit(0);
    expect_success(child);
    for (uint32_t i = 2; i < 8; i++)
        shmr_store_release(&shmr_participant_at(h, i)->life,
                           shmr_life_pack(1, shmr_namespace_tag(h), (uint32_t)child, SHMR_JOINING));
    shmr *late = attach_region(fd);
    leave_region(late);
    CHECK_EQ(shmr_check_deaths(h), 5);
    close_pair();
}

/* ---- by the wrong process, or too late ------------------------------------------------------------------------------- */

static void a_forked_child(void) {
    open_pair();
    shmr_ref ref = publish(h, 1000), out;
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        shmr_counters counters;
        shmr_read_counters(h, &counters);
        CHECK_EQ(counters.owned, 0);
        CHECK_EQ(counters.participants, 2);
        CHECK_STATUS(shmr_drop(h, ref.block, ref.generation), SHMR_FORKED);
        CHECK_STATUS(shmr_hold(h, ref.block, ref.generation, &out), SHMR_FORKED);
        CHECK_STATUS(shmr_recover(h, other->self, NULL, 0, NULL), SHMR_FORKED);
        CHECK_STATUS(shmr_wait_item(h, 0, FOR_EVER), SHMR_FORKED);
        CHECK_STATUS(shmr_wait_idle(h, 0, FOR_EVER), SHMR_FORKED);
        CHECK_STATUS(shmr_close_ring(h, 0), SHMR_FORKED);
        CHECK_EQ(shmr_check_deaths(h), 0);
        CHECK(!shmr_has_room(h, 0));
        shmr_trim(h);
        _exit(shmr_count_get(&check_failures) != 0);
    }
    expect_success(child);
    OK(shmr_drop(h, ref.block, ref.generation));
    close_pair();
}

static void closed_with_blocks_in_hand(void) {
    open_pair();
    shmr_block b = claim(h, 100), theirs = claim(other, 100);
    shmr_ref mine = publish(h, 1000), foreign = publish(other, 100), out;
    OK(shmr_hold(h, foreign.block, foreign.generation, &out)); /* a small one: found by the page it lies in */
    OK(shmr_close(h, 0));
    CHECK_STATUS(shmr_publish(h, &b, &out), SHMR_CLOSED);
    CHECK_STATUS(shmr_share(h, bytes_of(h, &b), 1, &out), SHMR_CLOSED);
    CHECK_STATUS(shmr_close_ring(h, 0), SHMR_CLOSED);
    CHECK_STATUS(shmr_wait_item(h, 0, NOT_AT_ALL), SHMR_CLOSED);
    CHECK_STATUS(shmr_wait_idle(h, 0, NOT_AT_ALL), SHMR_CLOSED);
    CHECK(!shmr_has_room(h, 0));
    OK(shmr_close(h, 1));
    CHECK_STATUS(shmr_drop(h, mine.block, mine.generation), SHMR_STALE);
    CHECK_STATUS(shmr_recover(h, other->self, NULL, 0, NULL), SHMR_STALE);
    CHECK_EQ(shmr_check_deaths(h), 0);
    shmr_free(h);
    h = attach_region(fd); /* adopts what it left */
    OK(shmr_drop(other, foreign.block, foreign.generation));
    OK(shmr_abort(other, &theirs));
    close_pair();
}

/* A recovered message that found no room, and then its recoverer leaves: the next one puts it in, as soon as there is
 * room, whatever it does with the ring. */
static void closed_with_a_message_in_hand(bool by_lease) {
    shmr_config config = small_config();
    config.capacity[0] = 1;
    open_config(&config);
    for (uint64_t k = 0; k < 3; k++) {
        shmr_block b = claim(other, 8);
        b.tag = k;
        memcpy(bytes_of(other, &b), &k, 8);
        commit_without_slot(other, &b, 0);
    }
    OK(shmr_recover(h, die(other), NULL, 0, NULL));
    CHECK_EQ(shmr_count_get(&h->again_count), 1);
    leave_region(h);
    h = attach_region(fd);
    other = attach_region(fd);
    for (int k = 0; k < 2; k++) OK(receive_message(other, 0, NULL, NOT_AT_ALL));
    if (by_lease)
        OK(receive_message(h, 0, NULL, NOT_AT_ALL));
    else
        CHECK_STATUS(send_message(h, 0, 8, 3, NOT_AT_ALL), SHMR_WOULD_BLOCK); /* after the one that is older */
    CHECK_EQ(shmr_count_get(&h->again_count), 0);
    if (!by_lease) OK(receive_message(other, 0, NULL, NOT_AT_ALL));
    close_pair();
}
static void closed_with_a_message_to_lease(void) { closed_with_a_message_in_hand(true); }
static void closed_with_a_message_before_ours(void) { closed_with_a_message_in_hand(false); }

/* ---- rings --------------------------------------------------------------------------------------------------------------- */

static void numbers_of_rings(void) {
    open_pair();
    CHECK(!shmr_has_room(h, 2));
    CHECK_EQ(shmr_approx_fill(h, 2), 0);
    CHECK_STATUS(shmr_wait_item(h, 2, FOR_EVER), SHMR_BAD_ARGUMENT);
    CHECK_STATUS(shmr_wait_idle(h, 2, FOR_EVER), SHMR_BAD_ARGUMENT);
    CHECK_STATUS(shmr_close_ring(h, 2), SHMR_BAD_ARGUMENT);
    shmr_block b;
    CHECK_STATUS(shmr_claim(h, UINT64_MAX / 2 + 1, NULL, 0, -1, NOT_AT_ALL, &b), SHMR_BAD_ARGUMENT);
    CHECK_STATUS(shmr_claim(h, 1, NULL, SHMR_MAX_REFS + 1, -1, NOT_AT_ALL, &b), SHMR_BAD_ARGUMENT);
    close_pair();
}

static void idle_or_not(void) {
    open_pair();
    uint64_t tag;
    CHECK_STATUS(shmr_wait_item(h, 0, NOT_AT_ALL), SHMR_WOULD_BLOCK);
    OK(shmr_wait_idle(h, 0, FOR_EVER));
    OK(send_message(other, 0, 8, 1, NOT_AT_ALL));
    OK(send_message(other, 1, 8, 1, NOT_AT_ALL)); /* does not concern ring 0 */
    CHECK_STATUS(shmr_wait_idle(h, 0, NOT_AT_ALL), SHMR_WOULD_BLOCK);
    shmr_add_seq_cst(&shmr_ring_at(h, 0)->commit_cursor, UINT64_MAX); /* its sender is slow */
    CHECK_EQ(shmr_approx_fill(h, 0), 0);
    CHECK_STATUS(shmr_wait_idle(h, 0, NOT_AT_ALL), SHMR_WOULD_BLOCK);
    shmr_block b = {0};
    OK(shmr_lease(h, 0, 1, NOT_AT_ALL, &b));
    CHECK_EQ(shmr_approx_fill(h, 0), 0); /* fewer than none */
    CHECK_STATUS(shmr_wait_idle(h, 0, NOT_AT_ALL), SHMR_WOULD_BLOCK);
    OK(shmr_release(h, &b));
    shmr_add_seq_cst(&shmr_ring_at(h, 0)->commit_cursor, 1);
    OK(shmr_wait_idle(h, 0, NOT_AT_ALL));
    OK(receive_message(h, 1, &tag, NOT_AT_ALL));
    close_pair();
}

static void *release_later(void *block) {
    usleep(20000);
    OK(shmr_release(other, block));
    shmr_notify_idle(other);
    return NULL;
}
static void idle_at_last(void) {
    open_pair();
    shmr_block b = {0};
    pthread_t thread;
    OK(send_message(h, 0, 8, 1, NOT_AT_ALL));
    CHECK_STATUS(shmr_wait_idle(h, 0, shmr_now() + 1000000), SHMR_TIMEOUT);
    OK(shmr_lease(other, 0, 1, NOT_AT_ALL, &b));
    pthread_create(&thread, NULL, release_later, &b);
    OK(shmr_wait_idle(h, 0, FOR_EVER));
    pthread_join(thread, NULL);
    close_pair();
}

static void extents_left_to_others(void) {
    open_pair();
    shmr_block b = {0};
    shmr_leave_extents(h, 14); /* of 16 */
    CHECK_STATUS(shmr_claim(h, 5 * MIB, NULL, 0, -1, NOT_AT_ALL, &b), SHMR_WOULD_BLOCK);
    OK(shmr_claim(h, 3 * MIB, NULL, 0, -1, NOT_AT_ALL, &b));
    OK(shmr_abort(h, &b));
    close_pair();
}

static void a_slow_reader_is_helped(void) {
    open_pair();
    shmr_block b = {0};
    for (uint64_t k = 0; k < 4; k++) OK(send_message(h, 0, 8, k, NOT_AT_ALL));
    CHECK(!shmr_has_room(h, 0));
    OK(shmr_lease(other, 0, 1, NOT_AT_ALL, &b));
    shmr_add_seq_cst(&shmr_ring_at(h, 0)->lease_cursor, UINT64_MAX);
    CHECK(shmr_has_room(h, 0));
    OK(shmr_release(other, &b));
    for (int k = 0; k < 3; k++) OK(receive_message(other, 0, NULL, NOT_AT_ALL));
    close_pair();
}

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

/* Numbers of messages, at a place in the table that changed hands. */
static void numbers_of_another_life(void) {
    for (int sole = 0; sole < 2; sole++)
        for (int first = 0; first < 2; first++) {
            open_pair();
            if (!sole) shmr_store_release(&shmr_ring_at(h, 0)->lessee, UINT64_MAX);
            OK(send_message(other, 0, 8, 1, NOT_AT_ALL));
            OK(receive_message(h, 0, NULL, NOT_AT_ALL));
            other->epoch++;
            other->next_seq[0] = first ? 0 : 7;
            OK(send_message(other, 0, 8, 2, NOT_AT_ALL));
            CHECK_STATUS(receive_message(h, 0, NULL, NOT_AT_ALL), sole && !first ? SHMR_CORRUPT : SHMR_OK);
            other->epoch--;
            close_pair();
        }
}

/* ---- blocks ------------------------------------------------------------------------------------------------------------------ */

static void publishing(void) {
    open_pair();
    shmr_ref ref, out;
    shmr_block b = claim(h, 1000), wrong = b, frame = {0};
    wrong.block = 1 << 30;
    CHECK_STATUS(shmr_publish(h, &wrong, &ref), SHMR_STALE);
    wrong = b;
    wrong.state++;
    CHECK_STATUS(shmr_publish(h, &wrong, &ref), SHMR_STALE);
    CHECK_STATUS(shmr_publish(other, &b, &ref), SHMR_STALE);
    wrong = b;
    wrong.state += UINT64_C(1) << 32;
    CHECK_STATUS(shmr_publish(h, &wrong, &ref), SHMR_STALE);
    wrong = b;
    wrong.length = b.room + 1;
    CHECK_STATUS(shmr_publish(h, &wrong, &ref), SHMR_BAD_ARGUMENT);
    CHECK_STATUS(shmr_share(h, bytes_of(h, &b), 10, &out), SHMR_NOT_SHARED); /* not yet */
    OK(shmr_publish(h, &b, &ref));
    OK(shmr_claim(h, 10, &ref, 1, -1, NOT_AT_ALL, &frame));
    CHECK_STATUS(shmr_publish(h, &frame, &out), SHMR_STALE); /* names others */
    wrong = frame;
    wrong.block = 1 << 30;
    CHECK_STATUS(shmr_references(h, &wrong, &out, 1), SHMR_BAD_ARGUMENT);
    CHECK_STATUS(shmr_references(h, &frame, &out, 2), SHMR_BAD_ARGUMENT);
    OK(shmr_abort(h, &frame));
    shmr_ref old = ref;
    old.generation--;
    CHECK_STATUS(shmr_claim(h, 10, &old, 1, -1, NOT_AT_ALL, &frame), SHMR_STALE);
    old.block = 1 << 30;
    CHECK_STATUS(shmr_claim(h, 10, &old, 1, -1, NOT_AT_ALL, &frame), SHMR_STALE);
    CHECK_STATUS(shmr_hold(h, 1 << 30, 1, &out), SHMR_STALE);
    CHECK_STATUS(shmr_hold(h, ref.block, ref.generation - 1, &out), SHMR_STALE); /* held already, in another life */
    /* Shared by us, held by the other alone. */
    OK(shmr_hold(other, ref.block, ref.generation, &out));
    OK(shmr_drop(h, ref.block, ref.generation));
    CHECK_STATUS(shmr_share(h, h->base + ref.offset, 10, &out), SHMR_NOT_SHARED);
    OK(shmr_drop(other, ref.block, ref.generation));
    CHECK(!shmr_allocated_here(h, h->base));
    CHECK(!shmr_allocated_here(h, h->base + h->g.total));
    close_pair();
}

/* Bytes behind the last block of a slab are nobody's. */
static void the_end_of_a_slab(void) {
    open_pair();
    shmr_block b = claim(h, 448);
    uint64_t page = b.offset / SHMR_PAGE * SHMR_PAGE;
    CHECK(shmr_allocated_here(h, h->base + b.offset));
    CHECK(!shmr_allocated_here(h, h->base + page + 4 * SHMR_PAGE - 1));
    OK(shmr_abort(h, &b));
    close_pair();
}

/* Each record is in use, and one of those freed nobody has told us of. */
static void no_more_records(void) {
    shmr_config config = small_config();
    config.blocks = SHMR_GROUP;
    open_config(&config);
    static shmr_block all[SHMR_GROUP];
    for (int i = 0; i < SHMR_GROUP; i++) all[i] = claim(h, 8);
    shmr_block b = {0};
    CHECK_STATUS(shmr_claim(h, 8, NULL, 0, -1, NOT_AT_ALL, &b), SHMR_WOULD_BLOCK);
    pthread_mutex_lock(&h->lock);
    uint64_t offset = shmr_take_allocation(h, 100000); /* as NumPy does */
    pthread_mutex_unlock(&h->lock);
    shmr_ref ref;
    CHECK_STATUS(shmr_share(h, shmr_arena_base(h) + offset, 10, &ref), SHMR_NO_MEMORY);
    pthread_mutex_lock(&h->lock);
    shmr_arena_release(h, offset, shmr_arena_room(100000));
    pthread_mutex_unlock(&h->lock);
    shmr_store_release(&shmr_record_at(h, all[7].block)->state, 0);
    OK(shmr_claim(h, 8, NULL, 0, -1, NOT_AT_ALL, &b));
    CHECK_EQ(b.block, all[7].block);
    OK(shmr_abort(h, &b));
    shmr_pin(h, -1);
    for (int i = 0; i < SHMR_GROUP; i++)
        if (i != 7) OK(shmr_abort(h, &all[i]));
    close_pair();
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

/* A bit for a doorbell that there is not. */
static void rubbish_in_a_bitmap(void) {
    open_pair();
    shmr_or_seq_cst(&shmr_ring_at(h, 0)->item_waiters[0], UINT64_C(1) << 63);
    OK(send_message(h, 0, 8, 1, NOT_AT_ALL));
    OK(receive_message(h, 0, NULL, NOT_AT_ALL));
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
    CHECK_EQ(strlen(shmr_last_detail()), 0);
    RUN(statuses);
    RUN(geometries);
    RUN(a_used_file);
    RUN(places_in_the_table);
    RUN(a_forked_child);
    RUN(closed_with_blocks_in_hand);
    RUN(closed_with_a_message_to_lease);
    RUN(closed_with_a_message_before_ours);
    RUN(numbers_of_rings);
    RUN(idle_or_not);
    RUN(idle_at_last);
    RUN(extents_left_to_others);
    RUN(a_slow_reader_is_helped);
    RUN(slots_of_rubbish);
    RUN(numbers_of_another_life);
    RUN(publishing);
    RUN(the_end_of_a_slab);
    RUN(no_more_records);
    RUN(rubbish_in_a_shared_block);
    RUN(rubbish_in_a_table_of_references);
    RUN(rubbish_in_a_group);
    RUN(rubbish_in_a_bitmap);
    RUN(slabs_are_joined);
    RUN(rubbish_records);
    RUN(rubbish_in_what_was_leased);
    RUN(rubbish_on_the_list);
    RUN(somebody_else_s_work);
    return summary("unit_states");
}
