/* SPDX-License-Identifier: BSD-3-Clause */
/* What a function says when it is called at the wrong time, with the wrong argument, by the wrong process. */
#include "pair.h"

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

static void a_signal_to_a_process(void) {
    OK(shmr_signal_main_thread((uint32_t)getpid(), 0));
    CHECK_STATUS(shmr_signal_main_thread(INT32_MAX, 0), SHMR_SYSTEM);
    CHECK_EQ(shmr_last_errno(), ESRCH);
}

/* ---- by the wrong process, or too late ------------------------------------------------------------------------------- */

static shmr_count guarding_goes_on;
static void *guard_and_unguard(void *unused) {
    static char page[SHMR_PAGE];
    shmr_mapping mapping = {.base = page, .bytes = sizeof page};
    (void)unused;
    while (shmr_count_get(&guarding_goes_on)) {
        shmr_guard(&mapping);
        shmr_unguard(&mapping);
    }
    return NULL;
}

/* What another thread had in hand at the fork is nobody's in the child. */
static void a_fork_while_another_thread_guards(void) {
    pthread_t thread;
    open_pair(); /* whoever has no region has no handlers of forks */
    shmr_count_add(&guarding_goes_on, 1);
    CHECK_EQ(pthread_create(&thread, NULL, guard_and_unguard, NULL), 0);
    fflush(stdout);
    for (int i = 0; i < 300; i++) {
        pid_t child = fork();
        if (child == 0) {
            alarm(10); /* it takes no time, or for ever */
            shmr_guard(h->map);
            shmr_unguard(h->map);
            _exit(0);
        }
        expect_success(child);
    }
    shmr_count_add(&guarding_goes_on, -1);
    pthread_join(thread, NULL);
    close_pair();
}

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
    shmr_arena_release(h, offset, shmr_arena_room(100000), true);
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

int main(void) {
    CHECK_EQ(strlen(shmr_last_detail()), 0);
    RUN(statuses);
    RUN(geometries);
    RUN(a_used_file);
    RUN(places_in_the_table);
    RUN(a_signal_to_a_process);
    RUN(a_forked_child);
    RUN(a_fork_while_another_thread_guards);
    RUN(closed_with_blocks_in_hand);
    RUN(closed_with_a_message_to_lease);
    RUN(closed_with_a_message_before_ours);
    RUN(numbers_of_rings);
    RUN(idle_or_not);
    RUN(idle_at_last);
    RUN(extents_left_to_others);
    RUN(a_slow_reader_is_helped);
    RUN(numbers_of_another_life);
    RUN(publishing);
    RUN(the_end_of_a_slab);
    RUN(no_more_records);
    return summary("unit_states");
}
