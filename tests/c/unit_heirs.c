/* SPDX-License-Identifier: BSD-3-Clause */
/* Death among others: sleepers and their wake-ups, places in the table and who inherits them, and recoverers that die
 * at it. */
#include "victims.h"

/* ---- waiting and the dead ------------------------------------------------------------------------------------------------ */

static void wait_registered(const shmr_word *waiters) {
    while (!shmr_any_waiter(waiters)) usleep(1000);
}

/* A child that waits for one message of ring 0 and wants `tag`. */
static pid_t start_waiter(uint64_t tag) {
    pid_t child = fork();
    if (child == 0) {
        alarm(WATCHDOG_SECONDS);
        shmr *v = attach_region(fd);
        uint64_t got = 0;
        OK(receive_message(v, 0, &got, FOR_EVER));
        CHECK_EQ(got, tag);
        OK(shmr_close(v, 0));
        _exit(shmr_count_get(&check_failures) != 0);
    }
    wait_registered(shmr_ring_at(h, 0)->item_waiters);
    return child;
}

static void a_waiter_dies_asleep(void) {
    open_region();
    pid_t waiter = start_waiter(0);
    kill_and_reap(waiter);
    CHECK(shmr_any_waiter(shmr_ring_at(h, 0)->item_waiters));
    CHECK_EQ(shmr_check_deaths(h), 1);
    CHECK(!shmr_any_waiter(shmr_ring_at(h, 0)->item_waiters));
    for (uint32_t d = 0; d < h->g.config.doorbells; d++) CHECK_EQ(shmr_load_relaxed(&shmr_doorbell_at(h, d)->owner), 0);
    close_whole();
}

/* The waiter was told, and died before it could take the message: the next one gets it. */
static void a_swallowed_wake_up(void) {
    open_region();
    pid_t first = start_waiter(5);
    kill(first, SIGSTOP);
    waitpid(first, NULL, WUNTRACED);
    OK(send_message(h, 0, 8, 5, NOT_AT_ALL)); /* rings the stopped one */
    CHECK(!shmr_any_waiter(shmr_ring_at(h, 0)->item_waiters));
    kill_and_reap(first);
    CHECK_EQ(shmr_check_deaths(h), 1);
    uint64_t tag = 0;
    OK(receive_message(h, 0, &tag, NOT_AT_ALL));
    close_whole();
}

/* The notifier died after the message was in the ring: recovery rings every bell. */
static void a_lost_notification(void) {
    open_region();
    struct report r;
    pid_t waiter = start_waiter(1);
    /* The first message of the script is notified properly, and takes that waiter. */
    pid_t victim = start_victim(script_commit_without_notifying, &r);
    expect_success(waiter);
    pid_t second = fork();
    if (second == 0) {
        alarm(WATCHDOG_SECONDS);
        shmr *v = attach_region(fd);
        uint64_t got = 0;
        OK(receive_message(v, 0, &got, FOR_EVER)); /* the message is there: no waiting */
        CHECK_EQ(got, 2);
        OK(shmr_close(v, 0));
        _exit(shmr_count_get(&check_failures) != 0);
    }
    expect_success(second);
    kill_and_reap(victim);
    CHECK_EQ(shmr_check_deaths(h), 1);
    close_whole();
}

static void a_finished_insert_wakes_a_waiter(void) {
    open_region();
    struct report r;
    uint64_t tag = 0;
    pid_t victim = start_victim(script_commit_without_slot, &r);
    OK(receive_message(h, 0, &tag, NOT_AT_ALL));
    pid_t waiter = start_waiter(2);
    kill_and_reap(victim);
    CHECK(shmr_check_deaths(h) <= 1); /* unless the waiter noticed it first */
    expect_success(waiter);
    CHECK_EQ(counters_of(h).deaths, 1);
    close_whole();
}

/* A sleeping waiter finds the death by itself. */
static void a_waiter_recovers(void) {
    open_region();
    struct report r;
    OK(send_message(h, 0, 8, 3, NOT_AT_ALL));
    pid_t victim = start_victim(script_lease, &r), waiter = start_waiter(3);
    kill_and_reap(victim);
    expect_success(waiter);
    CHECK_EQ(counters_of(h).deaths, 1);
    close_whole();
}

/* ---- places in the table ----------------------------------------------------------------------------------------------------- */

static pid_t leave_with_messages(uint32_t *slot) {
    int ends[2];
    if (pipe(ends) != 0) exit(2);
    pid_t child = fork();
    if (child == 0) {
        alarm(WATCHDOG_SECONDS);
        shmr *v = attach_region(fd);
        uint32_t self = shmr_self(v);
        for (uint64_t k = 0; k < 3; k++) OK(send_message(v, 0, 100000, k, NOT_AT_ALL));
        OK(shmr_close(v, 0));
        if (write(ends[1], &self, sizeof self) != sizeof self) _exit(2);
        _exit(shmr_count_get(&check_failures) != 0);
    }
    CHECK(read(ends[0], slot, sizeof *slot) == sizeof *slot);
    close(ends[0]);
    close(ends[1]);
    expect_success(child);
    return child;
}

static void who_left_is_inherited(void) {
    open_region();
    uint32_t slot = 0;
    uint64_t tag = 0;
    leave_with_messages(&slot);
    CHECK_EQ(life_of(h, slot), SHMR_LEFT);
    CHECK_EQ(shmr_check_deaths(h), 0); /* that is not death */
    OK(receive_message(h, 0, &tag, NOT_AT_ALL));
    shmr *heir = attach_region(fd);
    CHECK_EQ(shmr_self(heir), slot);
    CHECK_EQ(counters_of(heir).used, 2 * shmr_arena_room(100000)); /* the unread messages are in its arena now */
    for (uint64_t k = 1; k < 3; k++) {
        OK(receive_message(h, 0, &tag, NOT_AT_ALL));
        CHECK_EQ(tag, k);
    }
    CHECK_EQ(counters_of(heir).used, 0);
    CHECK_EQ(counters_of(h).deaths, 0);
    leave_region(heir);
    CHECK_EQ(life_of(h, slot), SHMR_VACANT);
    close_whole();
}

static void who_left_is_adopted_for_space(void) {
    open_region();
    uint32_t slot = 0;
    shmr_block b = {0}, kept = {0};
    leave_with_messages(&slot);
    OK(shmr_lease(h, 0, 1, NOT_AT_ALL, &kept));
    for (int k = 0; k < 2; k++) OK(receive_message(h, 0, NULL, NOT_AT_ALL));
    CHECK_STATUS(shmr_claim(h, 32 * MIB, NULL, 0, -1, NOT_AT_ALL, &b), SHMR_WOULD_BLOCK);
    OK(shmr_release(h, &kept));
    OK(shmr_claim(h, 32 * MIB, NULL, 0, -1, FOR_EVER, &b));
    OK(shmr_abort(h, &b));
    CHECK_EQ(life_of(h, slot), SHMR_VACANT);
    close_whole();
}

static void a_full_table_gives_the_places_of_the_dead(void) {
    open_with(SHMR_WAIT_ALONE, 2);
    struct report r;
    OK(send_message(h, 0, 8, 6, NOT_AT_ALL));
    kill_victim(script_lease, &r);
    shmr *heir = attach_region(fd);
    CHECK_EQ(shmr_self(heir), 1);
    CHECK_EQ(counters_of(h).deaths, 1);
    shmr_block b = {0};
    OK(shmr_lease(heir, 0, 1, NOT_AT_ALL, &b));
    CHECK_EQ(b.tag, 6);
    CHECK_EQ(b.attempts, 1);
    OK(shmr_release(heir, &b));
    leave_region(heir);
    close_whole();
    /* Unless only the creator may. */
    open_with(SHMR_WAIT_ALONE | SHMR_CREATOR_RECOVERS, 2);
    kill_victim(script_claim, &r);
    shmr *none = NULL;
    CHECK_STATUS(shmr_attach(fd, &none), SHMR_CROWDED);
    OK(shmr_recover(h, r.slot, NULL, 0, NULL));
    close_whole();
}

/* An exit by force: what was leased is done with, what was claimed was never sent, what was held is let go. */
static void leaving_by_force(void) {
    open_region();
    shmr *other = attach_region(fd);
    shmr_block leased = {0}, claimed = {0}, b = {0};
    shmr_ref ref, held;
    OK(send_message(h, 0, 8, 1, NOT_AT_ALL));
    OK(shmr_lease(other, 0, 1, NOT_AT_ALL, &leased));
    OK(shmr_claim(other, 5000, NULL, 0, -1, NOT_AT_ALL, &claimed));
    OK(shmr_claim(h, 70000, NULL, 0, -1, NOT_AT_ALL, &b));
    OK(shmr_publish(h, &b, &ref));
    OK(shmr_hold(other, ref.block, ref.generation, &held));
    OK(shmr_close(other, 1));
    CHECK_EQ(kind_of(h, leased.block), SHMR_FREE);
    CHECK_EQ(kind_of(h, claimed.block), SHMR_FREE);
    CHECK_STATUS(shmr_release(other, &leased), SHMR_STALE);
    CHECK_STATUS(shmr_abort(other, &claimed), SHMR_STALE);
    CHECK_STATUS(shmr_drop(other, ref.block, ref.generation), SHMR_STALE);
    OK(shmr_drop(h, ref.block, ref.generation));
    shmr_free(other);
    shmr_adopt_orphans(h);
    CHECK_EQ(kind_of(h, ref.block), SHMR_FREE);
    close_whole();

    /* One that owns no memory but holds somebody's: the same. */
    open_region();
    other = attach_region(fd);
    OK(shmr_claim(h, 70000, NULL, 0, -1, NOT_AT_ALL, &b));
    OK(shmr_publish(h, &b, &ref));
    OK(shmr_hold(other, ref.block, ref.generation, &held));
    OK(shmr_close(other, 1));
    shmr_free(other);
    OK(shmr_drop(h, ref.block, ref.generation));
    close_whole();
}

/* ---- the recoverer dies too -------------------------------------------------------------------------------------------------- */

static void script_everything(shmr *v, struct report *r) {
    script_claim(v, r);
    script_publish_and_send(v, r);
    OK(send_message(v, 0, 100000, 50, NOT_AT_ALL));
    script_lease(v, r);
}

/* `a` died while it was clearing up after `d`; how far it had got: */
static void break_off(uint32_t a, uint32_t d, int how_far) {
    struct shmr_participant *p = shmr_participant_at(h, d);
    uint64_t life = shmr_load_relaxed(&p->life);
    shmr_store_relaxed(&p->life, shmr_life_pack(shmr_life_epoch(life), a, shmr_life_pid(life), SHMR_RECOVERING));
    uint32_t moved = 0;
    for (uint32_t e = 0; e < h->g.extents; e++) {
        shmr_word *word = shmr_extent_at(h, e);
        if ((uint32_t)shmr_load_relaxed(word) != d + 1) continue;
        if (how_far == 1 && moved) break;
        if (how_far >= 1) shmr_store_relaxed(word, SHMR_EXTENT_WARM | (a + 1)), moved++;
    }
    if (how_far < 3) return;
    for (uint32_t g = 0; g < h->g.groups; g++) {
        shmr_word *word = &shmr_group_at(h, g)->owner;
        uint64_t seen = shmr_load_relaxed(word);
        if ((uint32_t)seen == d + 1) shmr_store_relaxed(word, (seen & ~UINT64_C(0xffffffff)) | (a + 1));
    }
}

static void drain(uint32_t *messages) {
    shmr_block b = {0};
    shmr_ref ref, held;
    *messages = 0;
    for (uint32_t ring = 0; ring < 2; ring++)
        while (shmr_lease(h, ring, 1, NOT_AT_ALL, &b) == SHMR_OK) {
            if (b.references) {
                OK(shmr_references(h, &b, &ref, 1));
                OK(shmr_hold(h, ref.block, ref.generation, &held));
                CHECK_EQ(h->base[held.offset + 49999], 9);
                OK(shmr_drop(h, ref.block, ref.generation));
            }
            OK(shmr_release(h, &b));
            ++*messages;
        }
}

static void the_recoverer_dies(void) {
    for (int order = 0; order < 2; order++)
        for (int how_far = 0; how_far < 4; how_far++)
            for (int heir = 0; heir < 2; heir++) {
                open_with(SHMR_WAIT_ALONE, heir ? 3 : 8);
                struct report first, second;
                pid_t one = start_victim(script_everything, &first), two = start_victim(script_everything, &second);
                kill_and_reap(one);
                kill_and_reap(two);
                uint32_t a = order ? first.slot : second.slot, d = order ? second.slot : first.slot, messages;
                break_off(a, d, how_far);
                shmr *successor = NULL;
                if (heir) { /* the table is full: it takes a place, and what comes with it */
                    successor = attach_region(fd);
                    CHECK(shmr_self(successor) == a || shmr_self(successor) == d);
                }
                shmr_check_deaths(h);
                for (uint32_t s = 1; s < 3; s++)
                    CHECK(life_of(h, s) == SHMR_VACANT || (heir && shmr_self(successor) == s));
                static shmr_block all[400];
                uint32_t count = 0;
                while (count < 400 && shmr_claim(h, 60000, NULL, 0, -1, NOT_AT_ALL, &all[count]) == SHMR_OK) {
                    memset(bytes_of(h, &all[count]), 255, all[count].room);
                    count++;
                }
                drain(&messages);
                CHECK_EQ(messages, 4);
                while (count) OK(shmr_abort(h, &all[--count]));
                if (heir) leave_region(successor);
                close_whole();
            }
}

int main(void) {
    RUN(a_waiter_dies_asleep);
    RUN(a_swallowed_wake_up);
    RUN(a_lost_notification);
    RUN(a_finished_insert_wakes_a_waiter);
    RUN(a_waiter_recovers);
    RUN(who_left_is_inherited);
    RUN(who_left_is_adopted_for_space);
    RUN(a_full_table_gives_the_places_of_the_dead);
    RUN(leaving_by_force);
    RUN(the_recoverer_dies);
    return summary("unit_heirs");
}
