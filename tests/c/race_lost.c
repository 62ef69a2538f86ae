/* SPDX-License-Identifier: BSD-3-Clause */
/* Somebody else was faster: at the very moment, between a look and the compare-and-swap that relies on it. */
#include "harness.h"

static int fd;
static shmr *h, *other;
static shmr_block held; /* what `h` has in hand when the other one comes */

static struct {
    const void *word;
    int nth, changes;
    void (*act)(void);
} plan;

void test_access(const void *word, int changes) {
    if (word != plan.word || changes != plan.changes || --plan.nth) return;
    plan.word = NULL; /* what it does itself is not counted */
    plan.act();
}
static void before_load(const void *word, int nth, void (*act)(void)) {
    plan.nth = nth;
    plan.changes = 0;
    plan.act = act;
    plan.word = word;
}
static void before_change(const void *word, int nth, void (*act)(void)) {
    before_load(word, nth, act);
    plan.changes = 1;
}
static shmr_word *word;
static uint64_t value;
static void it_changes(void) { shmr_store_release(word, value); }
static void change_before(shmr_word *which, int nth, uint64_t to) {
    word = which;
    value = to;
    before_change(which, nth, it_changes);
}
/* It came to that. */
static void check_happened(void) {
    CHECK(!plan.word);
    plan.word = NULL;
}

static void open_pair(uint64_t capacity) {
    shmr_config config = small_config();
    config.blocks = 512;
    config.participants = 3;
    config.arena_bytes = 8 * MIB;
    config.capacity[0] = config.capacity[1] = capacity;
    h = create_region(&config, &fd);
    other = attach_region(fd);
}
static void close_pair(void) {
    check_happened();
    leave_region(other);
    check_whole(h);
    leave_region(h);
    close(fd);
}

static void other_sends(void) { OK(send_message(other, 0, 8, 1, NOT_AT_ALL)); }
static void other_receives(void) { OK(receive_message(other, 0, NULL, NOT_AT_ALL)); }

/* ---- the ring -------------------------------------------------------------------------------------------------------- */

static void an_own_thread_aborts(void) {
    shmr_block copy = held;
    OK(shmr_abort(h, &copy));
}
static void a_commit(void) {
    open_pair(2);
    OK(shmr_claim(h, 100, NULL, 0, -1, NOT_AT_ALL, &held));
    held.length = 8;
    shmr_block b = held;
    before_change(&shmr_record_at(h, b.block)->state, 1, an_own_thread_aborts);
    CHECK_STATUS(shmr_commit(h, 0, 0, -1, NOT_AT_ALL, &b), SHMR_STALE);
    check_happened();
    /* The ring was full, and then it was not. */
    for (int k = 0; k < 2; k++) OK(send_message(h, 0, 8, 1, NOT_AT_ALL));
    before_load(&shmr_ring_at(h, 0)->lease_cursor, 2, other_receives);
    OK(send_message(h, 0, 8, 1, NOT_AT_ALL));
    for (int k = 0; k < 2; k++) other_receives();
    close_pair();
}

static void the_ring_turns(void) {
    for (int k = 0; k < 5; k++) {
        other_receives();
        other_sends();
    }
    other_receives();
}
static void a_look_for_room(void) {
    open_pair(2);
    for (int k = 0; k < 2; k++) other_sends();
    before_load(shmr_slot_at(h, 0, 0), 1, the_ring_turns);
    CHECK(shmr_has_room(h, 0));
    check_happened();
    other_receives();
    close_pair();
}

/* A slot, or a message, that another one has just taken: there is a next one. */
static void a_slot_and_a_message(void) {
    open_pair(2);
    before_change(shmr_slot_at(h, 0, 0), 1, other_sends);
    OK(send_message(h, 0, 8, 1, NOT_AT_ALL));
    check_happened();
    before_load(&shmr_ring_at(h, 0)->lease_cursor, 2, other_receives);
    OK(receive_message(h, 0, NULL, NOT_AT_ALL));
    check_happened();
    other_sends(); /* the third: its reader's cursor is advanced for it */
    change_before(&shmr_ring_at(h, 0)->lease_cursor, 1, 3);
    OK(receive_message(h, 0, NULL, NOT_AT_ALL));
    close_pair();
}

static shmr_word *state;
static void a_message_comes(void) {
    other_sends();
    state = &shmr_record_at(h, shmr_slot_block(shmr_load_seq_cst(shmr_slot_at(h, 0, 0))))->state;
    before_change(state, 1, other_receives); /* and somebody else gets it */
}
static void a_message_worth_an_attempt(void) {
    open_pair(2);
    shmr_block b = {0};
    before_load(shmr_slot_at(h, 0, 0), 2, a_message_comes); /* while we spin */
    CHECK_STATUS(shmr_lease(h, 0, 1, shmr_now() + 1000000, &b), SHMR_TIMEOUT);
    close_pair();
}

/* The same with its bit set: it is rung, and not woken. */
static void a_ring_worth_an_attempt(void) {
    open_pair(2);
    shmr_block b = {0};
    before_load(&shmr_doorbell_at(h, 0)->bell, 2, a_message_comes);
    CHECK_STATUS(shmr_lease(h, 0, 1, shmr_now() + 1000000, &b), SHMR_TIMEOUT);
    check_happened();
    before_load(&shmr_doorbell_at(h, 0)->bell, 2, other_sends);
    OK(shmr_lease(h, 0, 1, shmr_now() + INT64_C(10000000000), &b));
    OK(shmr_release(h, &b));
    close_pair();
}

/* The waiter's bit that we were to clear has just been cleared: that one is awake. */
static void a_waiter(void) {
    open_pair(2);
    shmr_word *waiters = shmr_ring_at(h, 0)->item_waiters;
    shmr_or_seq_cst(waiters, 2);
    change_before(waiters, 1, 0);
    OK(send_message(h, 0, 8, 1, NOT_AT_ALL));
    OK(receive_message(h, 0, NULL, NOT_AT_ALL));
    close_pair();
}

static void an_own_thread_leases_first(void) {
    shmr_store_release(&shmr_ring_at(h, 0)->lessee, h->self + 1);
}
static void the_only_reader(void) {
    open_pair(2);
    OK(send_message(h, 0, 8, 1, NOT_AT_ALL));
    before_change(&shmr_ring_at(h, 0)->lessee, 1, an_own_thread_leases_first);
    OK(receive_message(h, 0, NULL, NOT_AT_ALL));
    CHECK_EQ(shmr_load_seq_cst(&shmr_ring_at(h, 0)->lessee), h->self + 1);
    close_pair();
}

static void the_handle_is_closed(void) { OK(shmr_close(h, 0)); }
static void a_look_whether_all_is_idle(void) {
    open_pair(2);
    before_load(shmr_slot_at(h, 0, 0), 2, other_sends); /* sent while the records are looked at */
    CHECK_STATUS(shmr_wait_idle(h, 0, NOT_AT_ALL), SHMR_WOULD_BLOCK);
    check_happened();
    other_receives();
    shmr_add_seq_cst(&shmr_ring_at(h, 0)->commit_cursor, UINT64_MAX); /* dead, or slow */
    OK(shmr_wait_idle(h, 0, NOT_AT_ALL));
    close_pair();
}

static void a_close_before_a_wait(void) {
    open_pair(2);
    before_load(shmr_slot_at(h, 0, 0), 1, the_handle_is_closed);
    CHECK_STATUS(shmr_wait_item(h, 0, FOR_EVER), SHMR_CLOSED);
    check_happened();
    shmr_free(h);
    h = attach_region(fd);
    other_sends();
    before_load(shmr_slot_at(h, 0, 0), 1, the_handle_is_closed);
    CHECK_STATUS(shmr_wait_idle(h, 0, FOR_EVER), SHMR_CLOSED);
    check_happened();
    shmr_free(h);
    h = attach_region(fd);
    other_receives();
    close_pair();
}

/* ---- memory ------------------------------------------------------------------------------------------------------------ */

static void other_takes_an_extent(void) {
    OK(shmr_claim(other, 100000, NULL, 0, -1, NOT_AT_ALL, &held));
}
static void other_takes_two(void) { OK(shmr_claim(other, 3 * MIB, NULL, 0, -1, NOT_AT_ALL, &held)); }
static void an_extent(void) {
    open_pair(2);
    shmr_block b = {0};
    before_change(shmr_extent_at(h, 2), 1, other_takes_two); /* of four: rows come from the top */
    OK(shmr_claim(h, 3 * MIB, NULL, 0, -1, NOT_AT_ALL, &b));
    check_happened();
    OK(shmr_abort(h, &b));
    shmr_trim(h);
    OK(shmr_abort(other, &held));
    shmr_trim(other);
    change_before(shmr_extent_at(h, 3), 1, SHMR_EXTENT_WARM | 77); /* the second of two that are in memory */
    OK(shmr_claim(h, 3 * MIB, NULL, 0, -1, NOT_AT_ALL, &b));
    OK(shmr_abort(h, &b));
    shmr_store_release(shmr_extent_at(h, 3), SHMR_EXTENT_WARM);
    close_pair();
}

static shmr_block leased;
static void other_releases(void) { OK(shmr_release(other, &leased)); }
/* Memory is released between two looks for it. */
static void space(void) {
    open_pair(2);
    shmr_block rest[3] = {0}, b = {0};
    OK(send_message(h, 0, 2 * MIB, 1, NOT_AT_ALL));
    OK(shmr_lease(other, 0, 0, NOT_AT_ALL, &leased));
    for (int i = 0; i < 3; i++) OK(shmr_claim(h, 2 * MIB, NULL, 0, -1, NOT_AT_ALL, &rest[i]));
    before_load(&shmr_participant_at(h, 0)->freed_hint, 2, other_releases);
    OK(shmr_claim(h, 2 * MIB, NULL, 0, -1, NOT_AT_ALL, &b));
    check_happened();
    OK(shmr_abort(h, &b));
    for (int i = 0; i < 3; i++) OK(shmr_abort(h, &rest[i]));
    /* A hint that another thread of ours has just followed. */
    shmr_or_seq_cst(&shmr_participant_at(h, 0)->freed_hint, 1);
    change_before(&shmr_participant_at(h, 0)->freed_hint, 1, 0);
    shmr_trim(h);
    check_happened();
    /* An extent that is somebody's by the time we come to take it. */
    word = shmr_extent_at(h, 0);
    value = SHMR_EXTENT_WARM | 77;
    before_load(word, 2, it_changes);
    OK(shmr_claim(h, 100000, NULL, 0, -1, NOT_AT_ALL, &b));
    OK(shmr_abort(h, &b));
    shmr_store_release(word, SHMR_EXTENT_WARM);
    close_pair();
}

static void a_group(void) {
    open_pair(2);
    shmr_block b = {0};
    before_change(&shmr_group_at(h, 0)->owner, 1, other_takes_an_extent);
    OK(shmr_claim(h, 100, NULL, 0, -1, NOT_AT_ALL, &b));
    check_happened();
    CHECK(b.block / SHMR_GROUP != held.block / SHMR_GROUP);
    OK(shmr_abort(h, &b));
    OK(shmr_abort(other, &held));
    close_pair();
}

static void the_group_is_taken_away(void) { /* rubbish: only its owner gives it back */
    shmr_store_release(&shmr_group_at(h, 0)->owner, UINT64_C(1) << 32 | 77);
}
static void a_group_given_back(void) {
    open_pair(2);
    OK(send_message(h, 0, 8, 1, NOT_AT_ALL));
    OK(receive_message(h, 0, NULL, NOT_AT_ALL));
    before_change(&shmr_group_at(h, 0)->owner, 1, the_group_is_taken_away);
    shmr_trim(h);
    check_happened();
    shmr_store_release(&shmr_group_at(h, 0)->owner, UINT64_C(1) << 32 | (h->self + 1));
    close_pair();
}

static shmr_ref shared;
static void the_last_holder_drops(void) { OK(shmr_drop(other, shared.block, shared.generation)); }
static void a_hold(void) {
    open_pair(2);
    shmr_block b = {0};
    shmr_ref out;
    OK(shmr_claim(other, 100, NULL, 0, -1, NOT_AT_ALL, &b));
    OK(shmr_publish(other, &b, &shared));
    /* Our bit comes too late, and the generation goes on. */
    before_change(&shmr_record_at(h, shared.block)->holders[h->self / 64], 1, the_last_holder_drops);
    CHECK_STATUS(shmr_hold(h, shared.block, shared.generation, &out), SHMR_STALE);
    check_happened();
    /* It comes in time for the block to live on until we see that it is another one. */
    OK(shmr_claim(other, 100, NULL, 0, -1, NOT_AT_ALL, &b));
    OK(shmr_publish(other, &b, &shared));
    before_change(&shmr_record_at(h, shared.block)->version, 1, the_last_holder_drops);
    CHECK_STATUS(shmr_hold(h, shared.block, shared.generation - 1, &out), SHMR_STALE);
    close_pair();
}

static void a_bit_comes_and_goes(void) { shmr_add_seq_cst(&shmr_record_at(h, shared.block)->version, 1); }
static void a_sweep(void) {
    open_pair(2);
    shmr_block b = {0};
    OK(shmr_claim(h, 100, NULL, 0, -1, NOT_AT_ALL, &b));
    OK(shmr_publish(h, &b, &shared));
    before_load(&shmr_record_at(h, shared.block)->version, 2, a_bit_comes_and_goes);
    OK(shmr_drop(h, shared.block, shared.generation)); /* cannot tell now: a later sweep does */
    check_happened();
    CHECK_EQ(kind_of(h, shared.block), SHMR_SHARED);
    close_pair();
}

/* ---- waiting ------------------------------------------------------------------------------------------------------------ */

static void the_doorbell_is_taken(void) { shmr_store_release(&shmr_doorbell_at(h, 0)->owner, other->self + 1); }
static void a_doorbell(void) {
    open_pair(2);
    before_change(&shmr_doorbell_at(h, 0)->owner, 1, the_doorbell_is_taken);
    CHECK_STATUS(shmr_wait_item(h, 0, shmr_now() + 1000000), SHMR_TIMEOUT);
    check_happened();
    CHECK_EQ(shmr_load_seq_cst(&shmr_doorbell_at(h, 1)->owner), h->self + 1);
    shmr_store_release(&shmr_doorbell_at(h, 0)->owner, 0);
    close_pair();
}

/* ---- the dead ------------------------------------------------------------------------------------------------------------- */

static uint32_t dead;
static uint64_t recovering_by(const shmr *who) {
    return shmr_life_pack(1, who->self, who->pid, SHMR_RECOVERING);
}
static shmr_word *life_at(uint32_t slot) { return &shmr_participant_at(h, slot)->life; }

static void somebody_else_recovers(void) {
    open_pair(2);
    dead = die(attach_region(fd));
    uint64_t life = shmr_load_seq_cst(life_at(dead));
    change_before(life_at(dead), 1, recovering_by(other));
    CHECK_STATUS(shmr_recover(h, dead, NULL, 0, NULL), SHMR_WOULD_BLOCK);
    check_happened();
    CHECK_STATUS(shmr_recover(h, dead, NULL, 0, NULL), SHMR_WOULD_BLOCK);
    /* Found by a look at all: a process that is no more. */
    pid_t child = fork();
    if (child == 0) _exit(0);
    expect_success(child);
    life = shmr_life_pack(1, 0, (uint32_t)child, SHMR_LIVE);
    shmr_store_release(life_at(dead), life);
    change_before(life_at(dead), 1, recovering_by(other));
    CHECK_EQ(shmr_check_deaths(h), 0);
    check_happened();
    /* Or by one that joins, and would have had its place. */
    shmr_store_release(life_at(dead), life);
    change_before(life_at(dead), 1, recovering_by(other));
    shmr *late = NULL;
    CHECK_STATUS(shmr_attach(fd, &late), SHMR_CROWDED);
    check_happened();
    shmr_store_release(life_at(dead), life);
    CHECK_EQ(shmr_check_deaths(h), 1);
    close_pair();
}

/* What the dead one's recoverer had begun goes over to us, unless it goes to a third. */
static void a_recoverer_dies_too(void) {
    open_pair(2);
    dead = die(attach_region(fd));
    uint32_t second = die(other);
    shmr_store_release(life_at(dead), shmr_life_pack(1, second, 1, SHMR_RECOVERING));
    change_before(life_at(dead), 1, recovering_by(h));
    OK(shmr_recover(h, second, NULL, 0, NULL));
    check_happened();
    CHECK_EQ(life_of(h, dead), SHMR_RECOVERING);
    shmr_store_release(life_at(dead), shmr_life_pack(1, 0, 1, SHMR_LIVE));
    OK(shmr_recover(h, dead, NULL, 0, NULL));
    other = attach_region(fd);
    close_pair();
}

/* The heir of one that left: another one is. */
static void an_inheritance(void) {
    open_pair(2);
    shmr_store_release(life_at(2), shmr_life_pack(1, 0, 1, SHMR_LEFT));
    change_before(life_at(2), 1, shmr_life_pack(2, 0, (uint32_t)getpid(), SHMR_LIVE));
    shmr *late = NULL;
    CHECK_STATUS(shmr_attach(fd, &late), SHMR_CROWDED);
    shmr_store_release(life_at(2), 0);
    close_pair();
}

/* The death of one that we had watched: what we ask by is given back, whatever comes of it. */
static void another_clears_up(void) { OK(shmr_recover(other, dead, NULL, 0, NULL)); }
static void another_clears_up_while_we_ask(void) {
    open_pair(2);
    dead = die(attach_region(fd));
    shmr_store_release(life_at(dead), 0);
    CHECK_EQ(shmr_check_deaths(h), 0); /* from now on it watches `other` */
    uint32_t before = open_descriptors();
    for (int round = 0; round < 2; round++) {
        pid_t child = fork();
        if (child == 0) for (;;) pause();
        shmr_store_relaxed(&shmr_participant_at(h, dead)->start_time, shmr_start_time((uint32_t)child));
        shmr_store_release(life_at(dead), shmr_life_pack((uint32_t)round + 2, 0, (uint32_t)child, SHMR_LIVE));
        CHECK_EQ(shmr_check_deaths(h), 0);
        CHECK_EQ(open_descriptors(), before + 1);
        kill(child, SIGKILL);
        siginfo_t info;
        waitid(P_PID, (id_t)child, &info, WEXITED | WNOWAIT); /* a zombie still has its pid */
        before_load(life_at(dead), 2, another_clears_up);
        CHECK_EQ(shmr_check_deaths(h), 0);
        check_happened();
        CHECK_EQ(open_descriptors(), before);
        waitpid(child, NULL, 0);
    }
    close_pair();
}

static void the_place_is_vacant(void) { shmr_store_release(life_at(dead), 0); }
static void gone_while_we_ask(void) {
    open_pair(2);
    dead = die(attach_region(fd));
    pid_t child = fork();
    if (child == 0) for (;;) pause();
    uint64_t life = shmr_life_pack(1, 0, (uint32_t)child, SHMR_LIVE);
    shmr_store_release(life_at(dead), life);
    kill_and_reap(child);
    child = fork(); /* a zombie: the kernel says that it has ended */
    if (child == 0) _exit(0);
    siginfo_t info;
    waitid(P_PID, (id_t)child, &info, WEXITED | WNOWAIT);
    shmr_store_release(life_at(dead), shmr_life_pack(1, 0, (uint32_t)child, SHMR_LIVE));
    before_load(life_at(dead), 2, the_place_is_vacant);
    CHECK_EQ(shmr_check_deaths(h), 0);
    check_happened();
    /* While it still joins, its start time is its predecessor's: the kernel's word is enough. */
    shmr_store_release(life_at(dead), shmr_life_pack(2, shmr_namespace_tag(h), (uint32_t)child, SHMR_JOINING));
    CHECK_EQ(shmr_check_deaths(h), 1);
    expect_success(child);
    close_pair();
}

/* A place is vacant, and then another has it. */
static void a_place(void) {
    open_pair(2);
    change_before(life_at(2), 1, shmr_life_pack(5, 0, (uint32_t)getpid(), SHMR_LIVE));
    shmr *late = NULL;
    CHECK_STATUS(shmr_attach(fd, &late), SHMR_CROWDED);
    shmr_store_release(life_at(2), 0);
    close_pair();
}

/* Each state of a block: it changes before recovery's compare-and-swap, which then keeps its hands off. */
static void blocks_of_the_dead(void) {
    static const enum shmr_state states[] = {SHMR_CLAIMED, SHMR_LEASED, SHMR_LEASED, SHMR_LEASED, SHMR_COMMITTED};
    for (int i = 0; i < 5; i++) {
        open_pair(2);
        shmr *v = attach_region(fd);
        shmr_block b = {0}, taken = {0};
        uint32_t count = 0;
        OK(shmr_claim(v, 100, NULL, 0, -1, NOT_AT_ALL, &b));
        b.length = 8;
        if (states[i] == SHMR_COMMITTED) commit_without_slot(v, &b, 0);
        if (states[i] == SHMR_LEASED) {
            OK(shmr_commit(v, 0, 0, -1, NOT_AT_ALL, &b));
            OK(shmr_lease(v, 0, 0, NOT_AT_ALL, &b));
        }
        dead = die(v);
        state = &shmr_record_at(h, b.block)->state;
        uint64_t others = shmr_state_pack(9, other->self, 0, 0, SHMR_LEASED);
        change_before(state, i == 2 ? 2 : 1, others);
        OK(shmr_recover(h, dead, i == 3 ? &taken : NULL, i == 3, &count));
        check_happened();
        CHECK_EQ(count, 0);
        CHECK_EQ(shmr_load_seq_cst(state), others);
        b.state = others;
        shmr_pin(other, 1);
        OK(shmr_release(other, &b));
        close_pair();
    }
}

/* The memory of the dead: a word that somebody overwrites just now is not adopted. */
static void memory_of_the_dead(void) {
    for (int group = 0; group < 2; group++) {
        open_pair(2);
        shmr *v = attach_region(fd);
        shmr_block b = {0};
        OK(shmr_claim(v, 100000, NULL, 0, -1, NOT_AT_ALL, &b));
        uint32_t extent = (uint32_t)((b.offset - h->g.arena_at) / SHMR_EXTENT);
        dead = die(v);
        shmr_word *owner = group ? &shmr_group_at(h, b.block / SHMR_GROUP)->owner : shmr_extent_at(h, extent);
        change_before(owner, 1, UINT64_C(1) << 32 | 77);
        OK(shmr_recover(h, dead, NULL, 0, NULL));
        check_happened();
        shmr_store_release(owner, UINT64_C(1) << 32);
        close_pair();
    }
}

static void leaving_by_force(void) {
    open_pair(2);
    shmr *v = attach_region(fd);
    OK(shmr_claim(v, 100, NULL, 0, -1, NOT_AT_ALL, &held));
    change_before(&shmr_record_at(h, held.block)->state, 1, shmr_state_pack(9, 0, 0, 0, SHMR_FREE));
    OK(shmr_close(v, 1));
    check_happened();
    shmr_free(v);
    close_pair();
}

int main(void) {
    RUN(a_commit);
    RUN(a_look_for_room);
    RUN(a_slot_and_a_message);
    RUN(a_message_worth_an_attempt);
    RUN(a_ring_worth_an_attempt);
    RUN(a_waiter);
    RUN(the_only_reader);
    RUN(a_look_whether_all_is_idle);
    RUN(a_close_before_a_wait);
    RUN(an_extent);
    RUN(space);
    RUN(a_group);
    RUN(a_group_given_back);
    RUN(a_hold);
    RUN(a_sweep);
    RUN(a_doorbell);
    RUN(somebody_else_recovers);
    RUN(a_recoverer_dies_too);
    RUN(an_inheritance);
    RUN(gone_while_we_ask);
    RUN(another_clears_up_while_we_ask);
    RUN(a_place);
    RUN(blocks_of_the_dead);
    RUN(memory_of_the_dead);
    RUN(leaving_by_force);
    return summary("race_lost");
}
