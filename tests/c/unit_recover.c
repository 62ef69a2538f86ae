/* SPDX-License-Identifier: BSD-3-Clause */
/* Death, one at a time: what the dead had in hand is cleared up, and in the end everything is whole: every record
 * FREE, no memory in use, every extent nobody's. */
#include <fcntl.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <sys/syscall.h>

#include "victims.h"

static void nothing_in_hand(void) {
    open_region();
    struct report r;
    CHECK_EQ(shmr_check_deaths(h), 0);
    pid_t victim = start_victim(script_nothing, &r);
    CHECK_EQ(r.slot, 1);
    CHECK_EQ(shmr_find(h, (uint32_t)victim), 1);
    CHECK_EQ(shmr_check_deaths(h), 0); /* alive */
    CHECK_EQ(shmr_live_participants(h), 2);
    kill_and_reap(victim);
    CHECK_EQ(shmr_live_participants(h), 2); /* nobody has looked */
    CHECK_EQ(shmr_check_deaths(h), 1);
    CHECK_EQ(shmr_check_deaths(h), 0);
    CHECK_EQ(life_of(h, 1), SHMR_VACANT);
    CHECK_EQ(shmr_find(h, (uint32_t)victim), (uint64_t)-1);
    CHECK_EQ(counters_of(h).deaths, 1);
    CHECK_EQ(counters_of(h).joins, 2);
    close_whole();
}

static void a_zombie_is_dead(void) {
    open_region();
    struct report r;
    pid_t victim = start_victim(script_claim, &r);
    kill(victim, SIGKILL);
    siginfo_t info;
    waitid(P_PID, (id_t)victim, &info, WEXITED | WNOWAIT); /* dead, not reaped */
    CHECK_EQ(shmr_check_deaths(h), 1);
    kill_and_reap(victim);
    close_whole();
}

static void a_stopped_process_is_not_dead(void) {
    open_region();
    struct report r;
    pid_t victim = start_victim(script_claim, &r);
    kill(victim, SIGSTOP);
    waitpid(victim, NULL, WUNTRACED);
    CHECK_EQ(shmr_check_deaths(h), 0);
    CHECK_EQ(kind_of(h, r.block.block), SHMR_CLAIMED);
    kill_and_reap(victim);
    CHECK_EQ(shmr_check_deaths(h), 1);
    close_whole();
}

static void claimed_is_freed(void) {
    open_region();
    struct report r;
    kill_victim(script_claim, &r);
    CHECK_EQ(kind_of(h, r.block.block), SHMR_CLAIMED);
    CHECK_EQ(shmr_check_deaths(h), 1);
    CHECK_EQ(kind_of(h, r.block.block), SHMR_FREE);
    close_whole();
}

static void half_reserved_memory_is_nobodys(void) {
    open_region();
    struct report r;
    kill_victim(script_extents_and_groups, &r);
    CHECK_EQ(shmr_check_deaths(h), 1);
    for (uint32_t e = 0; e < h->g.extents; e++) {
        uint64_t word = shmr_load_relaxed(shmr_extent_at(h, e));
        CHECK(word == 0 || word & SHMR_EXTENT_WARM);
    }
    shmr_block b = {0};
    OK(shmr_claim(h, 32 * MIB, NULL, 0, -1, NOT_AT_ALL, &b)); /* all of it can be had */
    memset(bytes_of(h, &b), 1, 32 * MIB);
    OK(shmr_abort(h, &b));
    close_whole();
}

static void committed_stays_a_message(void) {
    open_region();
    struct report r;
    uint64_t tag = 0;
    kill_victim(script_commit, &r);
    OK(receive_message(h, 0, &tag, NOT_AT_ALL)); /* before anybody has noticed the death */
    CHECK_EQ(tag, 10);
    CHECK_EQ(shmr_check_deaths(h), 1);
    for (uint64_t k = 11; k < 13; k++) {
        OK(receive_message(h, 0, &tag, NOT_AT_ALL));
        CHECK_EQ(tag, k);
    }
    CHECK_STATUS(receive_message(h, 0, &tag, NOT_AT_ALL), SHMR_WOULD_BLOCK);
    close_whole();
}

static void an_insert_is_finished(void) {
    open_region();
    struct report r;
    uint64_t tag = 0;
    kill_victim(script_commit_without_slot, &r);
    OK(receive_message(h, 0, &tag, NOT_AT_ALL));
    CHECK_EQ(tag, 1);
    CHECK_EQ(shmr_approx_fill(h, 0), 0);
    CHECK_EQ(kind_of(h, r.block.block), SHMR_COMMITTED);
    CHECK_EQ(shmr_check_deaths(h), 1);
    OK(receive_message(h, 0, &tag, NOT_AT_ALL));
    CHECK_EQ(tag, 2);
    CHECK_STATUS(receive_message(h, 0, &tag, NOT_AT_ALL), SHMR_WOULD_BLOCK); /* once */
    close_whole();
}

/* Who never sleeps looks for deaths, too. */
static void polling_finds_the_dead(void) {
    open_region();
    struct report r;
    uint64_t tag = 0;
    kill_victim(script_commit_without_slot, &r);
    OK(receive_message(h, 0, &tag, NOT_AT_ALL));
    OK(receive_message(h, 0, &tag, NOT_AT_ALL));
    CHECK_EQ(tag, 2);
    CHECK_STATUS(receive_message(h, 0, &tag, NOT_AT_ALL), SHMR_WOULD_BLOCK); /* and not again at once */
    close_whole();
}

/* Recovery does not wait: the message is kept until there is room, and nothing else is upset by its coming late. */
static void an_insert_into_a_full_ring_is_kept(void) {
    open_region();
    h->g.most[0] = 8; /* as if the spare slots were full too */
    struct report r;
    uint64_t tag = 0, expected = 0;
    kill_victim(script_commit_without_slot, &r);
    for (uint64_t k = 0; k < 7; k++) OK(send_message(h, 0, 8, 100 + k, NOT_AT_ALL));
    CHECK_EQ(shmr_approx_fill(h, 0), 8);
    CHECK_EQ(shmr_check_deaths(h), 1);
    /* Its successor at the same place, with a new epoch, sends before the late message is in. */
    shmr *successor = attach_region(fd);
    CHECK_EQ(shmr_self(successor), r.slot);
    OK(receive_message(successor, 1, &tag, NOT_AT_ALL) == SHMR_WOULD_BLOCK ? SHMR_OK : SHMR_STALE);
    OK(receive_message(h, 0, &tag, NOT_AT_ALL)); /* and with this the recoverer gets its chance */
    CHECK_EQ(tag, 1);
    for (uint64_t k = 0; k < 7; k++) {
        OK(receive_message(h, 0, &tag, NOT_AT_ALL));
        CHECK_EQ(tag, 100 + k);
    }
    OK(send_message(successor, 0, 8, 200, NOT_AT_ALL));
    for (expected = 0; receive_message(h, 0, &tag, NOT_AT_ALL) == SHMR_OK; expected++) CHECK(tag == 2 || tag == 200);
    CHECK_EQ(expected, 2);
    leave_region(successor);
    close_whole();
}

/* It leaves before there was room: whoever waits for a message takes over what it left. */
static void kept_by_one_who_left(void) {
    open_region();
    struct report r;
    uint64_t tag = 0;
    kill_victim(script_commit_without_slot, &r);
    for (uint64_t k = 0; k < 7; k++) OK(send_message(h, 0, 8, 100 + k, NOT_AT_ALL));
    shmr *recoverer = attach_region(fd);
    recoverer->g.most[0] = 8; /* as if the spare slots were full too */
    CHECK_EQ(shmr_check_deaths(recoverer), 1);
    leave_region(recoverer);
    for (uint64_t k = 0; k < 8; k++) OK(receive_message(h, 0, &tag, NOT_AT_ALL));
    CHECK_EQ(tag, 106);
    OK(receive_message(h, 0, &tag, shmr_now() + 5000000000));
    CHECK_EQ(tag, 2);
    close_whole();
}

/* The same with the successor's message first: the sole consumer must not take the late one for a fault. */
static void a_late_message_of_an_earlier_life(void) {
    open_region();
    h->g.most[0] = 8; /* as if the spare slots were full too */
    struct report r;
    uint64_t tag = 0;
    kill_victim(script_commit_without_slot, &r);
    for (uint64_t k = 0; k < 7; k++) OK(send_message(h, 0, 8, 100 + k, NOT_AT_ALL));
    CHECK_EQ(shmr_check_deaths(h), 1);
    shmr *successor = attach_region(fd);
    shmr_count_add(&h->again_count, -1); /* keep it back */
    OK(receive_message(h, 0, &tag, NOT_AT_ALL));
    OK(send_message(successor, 0, 8, 200, NOT_AT_ALL));
    shmr_count_add(&h->again_count, 1);
    for (uint64_t k = 0; k < 7; k++) OK(receive_message(h, 0, &tag, NOT_AT_ALL));
    OK(receive_message(h, 0, &tag, NOT_AT_ALL));
    CHECK_EQ(tag, 200);
    OK(receive_message(h, 0, &tag, NOT_AT_ALL));
    CHECK_EQ(tag, 2);
    OK(send_message(successor, 0, 8, 201, NOT_AT_ALL)); /* and the count goes on */
    OK(receive_message(h, 0, &tag, NOT_AT_ALL));
    CHECK_EQ(tag, 201);
    leave_region(successor);
    close_whole();
}

static void leased_goes_back(void) {
    open_region();
    struct report r;
    shmr_block b = {0};
    OK(send_message(h, 0, 8, 1, NOT_AT_ALL));
    OK(send_message(h, 0, 8, 2, NOT_AT_ALL));
    for (uint32_t attempts = 1; attempts <= 4; attempts++) {
        kill_victim(attempts % 2 ? script_lease : script_lease_without_cursor, &r);
        CHECK_EQ(r.block.attempts, (attempts - 1) / 2); /* they take turns: 1, 2, 1, 2 */
        CHECK_EQ(kind_of(h, r.block.block), SHMR_LEASED);
        CHECK_EQ(shmr_check_deaths(h), 1);
        CHECK_EQ(kind_of(h, r.block.block), SHMR_COMMITTED);
    }
    for (uint64_t k = 1; k <= 2; k++) {
        OK(shmr_lease(h, 0, 1, NOT_AT_ALL, &b));
        CHECK_EQ(b.tag, k);
        CHECK_EQ(b.attempts, 2);
        OK(shmr_release(h, &b));
    }
    close_whole();
}

static void leased_can_be_taken_over(void) {
    open_with(SHMR_WAIT_ALONE | SHMR_CREATOR_RECOVERS, 4);
    struct report r;
    shmr_block taken[4];
    uint32_t count = 99;
    uint64_t tag = 0;
    OK(send_message(h, 0, 500, 7, NOT_AT_ALL));
    kill_victim(script_lease, &r);
    CHECK_EQ(shmr_check_deaths(h), 0); /* the creator is asked to do it by name */
    CHECK_EQ(shmr_live_participants(h), 2);
    OK(shmr_recover(h, r.slot, taken, 4, &count));
    CHECK_EQ(count, 1);
    CHECK_EQ(taken[0].block, r.block.block);
    CHECK_EQ(taken[0].tag, 7);
    CHECK_EQ(taken[0].length, 500);
    CHECK_EQ(taken[0].seq, r.block.seq);
    CHECK_EQ(shmr_state_owner(taken[0].state), 0);
    CHECK_EQ(counters_of(h).pins, 1);
    CHECK_STATUS(receive_message(h, 0, &tag, NOT_AT_ALL), SHMR_WOULD_BLOCK);
    OK(shmr_commit(h, 1, 1, -1, NOT_AT_ALL, &taken[0])); /* sent on to somebody else */
    OK(receive_message(h, 1, &tag, NOT_AT_ALL));
    CHECK_EQ(tag, 7);
    CHECK_STATUS(shmr_recover(h, r.slot, taken, 4, &count), SHMR_STALE);
    CHECK_STATUS(shmr_recover(h, 0, taken, 4, &count), SHMR_BAD_ARGUMENT);
    CHECK_STATUS(shmr_recover(h, 4, taken, 4, &count), SHMR_BAD_ARGUMENT);
    close_whole();
}

/* More than there is room for: nothing is lost, the rest goes back into the ring. */
static void script_lease_three(shmr *v, struct report *r) {
    for (int i = 0; i < 3; i++) OK(shmr_lease(v, 0, 1, NOT_AT_ALL, &r->block));
}
static void taken_over_in_part(void) {
    open_with(SHMR_WAIT_ALONE | SHMR_CREATOR_RECOVERS, 4);
    struct report r;
    shmr_block taken[2];
    uint32_t count = 0;
    uint64_t tag = 0, sum = 0;
    for (uint64_t k = 1; k <= 3; k++) OK(send_message(h, 0, 500, k, NOT_AT_ALL));
    kill_victim(script_lease_three, &r);
    OK(shmr_recover(h, r.slot, taken, 2, &count));
    CHECK_EQ(count, 2);
    for (uint32_t i = 0; i < count; i++) {
        sum += taken[i].tag;
        OK(shmr_release(h, &taken[i]));
    }
    OK(receive_message(h, 0, &tag, NOT_AT_ALL));
    CHECK_EQ(sum + tag, 6);
    close_whole();
}

static void leased_into_a_full_ring(void) {
    open_region();
    h->g.most[0] = 8; /* as if the spare slots were full too */
    struct report r;
    uint64_t tag = 0, seen = 0;
    for (uint64_t k = 0; k < 8; k++) OK(send_message(h, 0, 8, k, NOT_AT_ALL));
    kill_victim(script_lease_three, &r);
    for (uint64_t k = 8; k < 11; k++) OK(send_message(h, 0, 8, k, NOT_AT_ALL));
    CHECK_EQ(shmr_check_deaths(h), 1);
    CHECK_EQ(shmr_approx_fill(h, 0), 8);
    for (int k = 0; k < 11; k++) {
        OK(receive_message(h, 0, &tag, NOT_AT_ALL));
        CHECK(!(seen >> tag & 1));
        seen |= UINT64_C(1) << tag;
    }
    CHECK_EQ(seen, (1 << 11) - 1);
    close_whole();
}

static void released_without_telling(void) {
    open_region();
    struct report r;
    OK(send_message(h, 0, 100000, 1, NOT_AT_ALL));
    kill_victim(script_release_without_hint, &r);
    CHECK_EQ(shmr_check_deaths(h), 1);
    CHECK_EQ(counters_of(h).deaths, 1);
    close_whole(); /* its allocator finds it */
}

static void held_by_the_dead(void) {
    open_region();
    struct report r;
    shmr_block b = {0};
    shmr_ref ref;
    OK(shmr_claim(h, 70000, NULL, 0, -1, NOT_AT_ALL, &b));
    b.length = 70000;
    OK(shmr_publish(h, &b, &ref));
    OK(shmr_claim(h, 10, &ref, 1, -1, NOT_AT_ALL, &b));
    b.length = 10;
    OK(shmr_commit(h, 0, 1, -1, NOT_AT_ALL, &b));
    kill_victim(script_hold, &r);
    OK(shmr_drop(h, ref.block, ref.generation));
    shmr_trim(h);
    CHECK_EQ(kind_of(h, ref.block), SHMR_SHARED); /* only the dead one's bit keeps it */
    CHECK_EQ(shmr_check_deaths(h), 1);
    CHECK_EQ(kind_of(h, ref.block), SHMR_FREE);
    close_whole();
}

static void shared_by_the_dead(void) {
    open_region();
    struct report r;
    shmr_block b = {0};
    shmr_ref found, held;
    for (int when = 0; when < 3; when++) { /* the death is noticed: before the lease, before the hold, after it */
        kill_victim(script_publish_and_send, &r);
        if (when == 0) CHECK_EQ(shmr_check_deaths(h), 1);
        OK(shmr_lease(h, 0, 1, NOT_AT_ALL, &b));
        OK(shmr_references(h, &b, &found, 1));
        CHECK_EQ(found.block, r.ref.block);
        if (when == 1) CHECK_EQ(shmr_check_deaths(h), 1);
        OK(shmr_hold(h, found.block, found.generation, &held));
        if (when == 2) CHECK_EQ(shmr_check_deaths(h), 1);
        OK(shmr_release(h, &b));
        shmr_trim(h);
        CHECK_EQ(kind_of(h, found.block), SHMR_SHARED);
        CHECK_EQ(h->base[held.offset + 49999], 9);
        CHECK_EQ(counters_of(h).held, 0); /* ours now, arena and all */
        OK(shmr_drop(h, found.block, found.generation));
        CHECK_EQ(kind_of(h, found.block), SHMR_FREE);
    }
    close_whole();
}

/* Memory of the dead that others still read is not handed out again until they are done. */
static void adopted_memory_is_not_reused_early(void) {
    open_region();
    struct report r;
    shmr_block kept[3] = {0}, b = {0};
    kill_victim(script_commit, &r);
    for (int k = 0; k < 3; k++) OK(shmr_lease(h, 0, 1, NOT_AT_ALL, &kept[k]));
    CHECK_EQ(shmr_check_deaths(h), 1);
    static shmr_block all[2000];
    uint32_t count = 0;
    while (count < 2000 && shmr_claim(h, count % 2 ? 3000 : 50000, NULL, 0, -1, NOT_AT_ALL, &b) == SHMR_OK) {
        memset(bytes_of(h, &b), 255, b.room);
        for (int k = 0; k < 3; k++)
            CHECK(b.offset + b.room <= kept[k].offset || kept[k].offset + kept[k].room <= b.offset);
        all[count++] = b;
    }
    for (int k = 0; k < 3; k++) {
        uint64_t inside;
        memcpy(&inside, bytes_of(h, &kept[k]), 8);
        CHECK_EQ(inside, kept[k].tag);
        OK(shmr_release(h, &kept[k]));
    }
    while (count) OK(shmr_abort(h, &all[--count]));
    close_whole();
}

static void joining(void) {
    open_region();
    struct report r;
    kill_victim(script_joining, &r);
    CHECK_EQ(shmr_live_participants(h), 2);
    CHECK_EQ(shmr_check_deaths(h), 1);
    CHECK_EQ(life_of(h, r.slot), SHMR_VACANT);
    close_whole();
}

/* A pid of another namespace says nothing, also while its owner is still joining. */
static void joining_elsewhere(void) {
    open_region();
    struct report r;
    kill_victim(script_joining, &r);
    struct shmr_participant *p = shmr_participant_at(h, r.slot);
    uint64_t life = shmr_load_relaxed(&p->life), other = UINT64_C(1) << 32; /* a bit of the tag */
    shmr_store_relaxed(&p->life, life ^ other);
    CHECK_EQ(shmr_check_deaths(h), 0);
    CHECK_EQ(life_of(h, r.slot), SHMR_JOINING);
    shmr_store_relaxed(&p->life, life);
    CHECK_EQ(shmr_check_deaths(h), 1);
    close_whole();
}

/* What cannot be looked up, for want of descriptors, is no proof of death. */
static void no_descriptors_left(void) {
    open_region();
    struct report r;
    pid_t victim = start_victim(script_nothing, &r);
    struct rlimit before, few;
    REQUIRE(getrlimit(RLIMIT_NOFILE, &before) == 0);
    int next = dup(fd);
    close(next);
    for (rlim_t more = 0; more < 3; more++) {
        few = (struct rlimit){(rlim_t)next + more, before.rlim_max};
        REQUIRE(setrlimit(RLIMIT_NOFILE, &few) == 0);
        CHECK_EQ(shmr_check_deaths(h), 0);
        CHECK_EQ(life_of(h, r.slot), SHMR_LIVE);
    }
    REQUIRE(setrlimit(RLIMIT_NOFILE, &before) == 0);
    kill_and_reap(victim);
    CHECK_EQ(shmr_check_deaths(h), 1);
    close_whole();
}

/* Somebody closed all descriptors, and another file has the number of our pidfd. */
static void descriptors_closed_under_us(void) {
    open_region();
    struct report r;
    pid_t victim = start_victim(script_nothing, &r);
    CHECK_EQ(shmr_check_deaths(h), 0);
    int number = h->pidfds[r.slot].fd, ends[2];
    CHECK(number >= 0);
    REQUIRE(pipe(ends) == 0 && write(ends[1], "x", 1) == 1);
    CHECK(dup2(ends[0], number) == number); /* readable, like the pidfd of a dead process */
    CHECK_EQ(shmr_check_deaths(h), 0);
    CHECK_EQ(life_of(h, r.slot), SHMR_LIVE);
    kill_and_reap(victim);
    CHECK_EQ(shmr_check_deaths(h), 1);
    CHECK(close(number) == 0);
    close(ends[0]);
    close(ends[1]);
    close_whole();
}

/* What is under that number by now is not asked, and not closed: not at a death, not when the place has another
 * participant, not when we leave. */
static void a_number_that_is_anothers(void) {
    enum { DEATH, ANOTHER, LEAVING, WAYS };
    for (int way = 0; way < WAYS; way++) {
        open_region();
        shmr *watcher = attach_region(fd);
        struct report r, later;
        pid_t victim = start_victim(script_nothing, &r), next = 0;
        CHECK_EQ(shmr_check_deaths(watcher), 0);
        int number = watcher->pidfds[r.slot].fd, never = eventfd(0, EFD_CLOEXEC); /* never readable */
        REQUIRE(number >= 0 && never >= 0 && dup2(never, number) == number);
        if (way == DEATH) {
            kill_and_reap(victim);
            CHECK_EQ(shmr_check_deaths(watcher), 1);
        } else if (way == ANOTHER) {
            kill_and_reap(victim);
            CHECK_EQ(shmr_check_deaths(h), 1);
            next = start_victim(script_nothing, &later);
            CHECK_EQ(later.slot, r.slot);
            CHECK_EQ(shmr_check_deaths(watcher), 0);
        }
        leave_region(watcher);
        CHECK(fcntl(number, F_GETFD) >= 0);
        if (way != DEATH) {
            kill_and_reap(way == ANOTHER ? next : victim);
            CHECK_EQ(shmr_check_deaths(h), 1);
        }
        close(number);
        close(never);
        close_whole();
    }
}

/* Where all pidfds have one inode, the pid tells them apart. */
static void pidfds_of_one_inode(void) {
    open_region();
    struct report r;
    pid_t victim = start_victim(script_nothing, &r);
    shmr_file kept;
    int of_victim = (int)syscall(SYS_pidfd_open, victim, 0), of_us = (int)syscall(SYS_pidfd_open, getpid(), 0);
    REQUIRE(of_victim >= 0 && of_us >= 0);
    CHECK_EQ(shmr_pidfd_pid(of_victim), victim);
    CHECK_EQ(shmr_pidfd_pid(fd), 0);
    CHECK_EQ(shmr_pidfd_pid(-1), 0);
    CHECK(shmr_file_keep(&kept, of_us));
    kept.pid = (uint32_t)victim; /* as if the inode were that of both */
    CHECK(!shmr_file_is_ours(&kept, NULL));
    CHECK(shmr_file_keep(&kept, of_victim));
    kept.pid = (uint32_t)victim;
    CHECK(shmr_file_is_ours(&kept, NULL));
    kill_and_reap(victim);
    CHECK(shmr_file_is_ours(&kept, NULL)); /* it has no pid any more */
    shmr_file_close(&kept);
    CHECK(fcntl(of_victim, F_GETFD) < 0);
    close(of_us);
    int event = eventfd(0, EFD_CLOEXEC); /* of the file system that has one inode, and of no process */
    CHECK(shmr_file_keep(&kept, event));
    CHECK(shmr_file_is_ours(&kept, NULL));
    shmr_file_close(&kept);
    CHECK(fcntl(event, F_GETFD) < 0);
    CHECK_EQ(shmr_check_deaths(h), 1);
    close_whole();
}

/* What a forked child has of its parent's attachment it can give back; but no tables that a thread was changing. */
static void what_a_child_inherits(void) {
    open_region();
    struct report r;
    pid_t victim = start_victim(script_nothing, &r);
    CHECK_EQ(shmr_check_deaths(h), 0); /* a pidfd is inherited, too */
    shmr_forget(h);                    /* not in the parent */
    pthread_mutex_t *locks[] = {NULL, &h->death_lock, &h->lock};
    for (int i = 0; i < 3; i++) {
        if (locks[i]) pthread_mutex_lock(locks[i]);
        fflush(stdout);
        pid_t child = fork();
        if (child == 0) {
            uint32_t before = open_descriptors();
            shmr_mapping *kept = shmr_mapping_retain(h);
            char *base = shmr_base(h);
            shmr_forget(h);
            CHECK_EQ(open_descriptors(), before - (i == 1 ? 1 : 2)); /* `h` may be gone */
            CHECK(*(uint64_t *)(void *)base != 0); /* still mapped */
            shmr_mapping_release(kept);
            _exit(shmr_count_get(&check_failures) != 0);
        }
        if (locks[i]) pthread_mutex_unlock(locks[i]);
        expect_success(child);
    }
    kill_and_reap(victim);
    CHECK_EQ(shmr_check_deaths(h), 1);
    close_whole();
}

static void script_rubbish_places(shmr *v, struct report *r) {
    for (uint64_t k = 0; k < 4; k++) { /* small and large, in the arena of another, and across one of its own */
        OK(shmr_claim(v, k % 2 ? 50000 : 100, NULL, 0, -1, NOT_AT_ALL, &r->block));
        uint32_t block = r->block.block;
        OK(shmr_commit(v, 0, 0, -1, NOT_AT_ALL, &r->block));
        shmr_store_relaxed(&shmr_record_at(v, block)->offset, k < 2 ? 0 : h->g.config.arena_bytes / 2);
        shmr_store_relaxed(&shmr_record_at(v, block)->room, k < 2 ? MIB : MIB + k * 4096);
    }
}

/* Records that the dead left behind must not lead into memory that is not theirs. */
static void rubbish_places(void) {
    open_region();
    shmr_block mine = {0}, other = {0};
    OK(shmr_claim(h, MIB, NULL, 0, -1, NOT_AT_ALL, &mine));
    CHECK_EQ(mine.offset, h->g.arena_at); /* where the rubbish points to */
    memset(bytes_of(h, &mine), 7, MIB);
    struct report r;
    kill_victim(script_rubbish_places, &r);
    CHECK_EQ(shmr_check_deaths(h), 1);
    CHECK_EQ(counters_of(h).used, mine.room);
    for (int k = 0; k < 4; k++) CHECK_STATUS(shmr_lease(h, 0, 0, NOT_AT_ALL, &other), SHMR_CORRUPT);
    CHECK_EQ(counters_of(h).used, mine.room);
    OK(shmr_claim(h, 2 * MIB, NULL, 0, -1, NOT_AT_ALL, &other));
    memset(bytes_of(h, &other), 8, other.room);
    for (uint64_t k = 0; k < MIB; k += 4096) CHECK_EQ(bytes_of(h, &mine)[k], 7);
    OK(shmr_abort(h, &other));
    OK(shmr_abort(h, &mine));
    close_whole();
}

static void script_one_message(shmr *v, struct report *r) {
    (void)r;
    OK(send_message(v, 0, 100, 1, NOT_AT_ALL));
}

/* More deaths than there are groups of records, each with a message left: the recoverer must not keep the groups. */
static void records_go_round(void) {
    shmr_config config = small_config();
    config.blocks = 3 * SHMR_GROUP;
    h = create_region(&config, &fd);
    struct report r;
    for (uint64_t k = 0; k < 8; k++) {
        kill_victim(script_one_message, &r);
        CHECK_EQ(shmr_check_deaths(h), 1);
        uint64_t tag = 0;
        OK(receive_message(h, 0, &tag, NOT_AT_ALL));
        CHECK_EQ(tag, 1);
        shmr_trim(h); /* as whoever sleeps does when somebody is short of memory */
    }
    close_whole();
}

/* All records of a group that nobody owns are rubbish: it is of no use, and of no harm. */
static void a_group_of_rubbish(void) {
    shmr_config config = small_config();
    config.blocks = 2 * SHMR_GROUP;
    h = create_region(&config, &fd);
    static shmr_block all[SHMR_GROUP + 1];
    uint64_t count = 0;
    while (count < SHMR_GROUP && shmr_claim(h, 64, NULL, 0, -1, NOT_AT_ALL, &all[count]) == SHMR_OK) count++;
    CHECK_EQ(count, SHMR_GROUP);
    OK(shmr_claim(h, 64, NULL, 0, -1, NOT_AT_ALL, &all[SHMR_GROUP]));
    uint32_t group = all[SHMR_GROUP].block / SHMR_GROUP;
    OK(shmr_abort(h, &all[SHMR_GROUP]));
    shmr_trim(h);
    CHECK_EQ((uint32_t)shmr_load_relaxed(&shmr_group_at(h, group)->owner), 0);
    for (uint32_t i = 0; i < SHMR_GROUP; i++) {
        shmr_word *state = &shmr_record_at(h, group * SHMR_GROUP + i)->state;
        shmr_store_relaxed(state, shmr_load_relaxed(state) | SHMR_LEASED);
    }
    CHECK_STATUS(shmr_claim(h, 64, NULL, 0, -1, NOT_AT_ALL, &all[SHMR_GROUP]), SHMR_WOULD_BLOCK);
    for (uint32_t i = 0; i < SHMR_GROUP; i++) {
        shmr_word *state = &shmr_record_at(h, group * SHMR_GROUP + i)->state;
        shmr_store_relaxed(state, shmr_load_relaxed(state) & ~UINT64_C(15));
    }
    while (count) OK(shmr_abort(h, &all[--count]));
    close_whole();
}

/* Who is it? Process id and start time; of another pid namespace nothing can be said. */
static void identity(void) {
    open_region();
    struct report r;
    pid_t victim = start_victim(script_claim, &r), bystander = start_victim(script_nothing, &(struct report){0});
    struct shmr_participant *p = shmr_participant_at(h, r.slot);
    uint64_t namespace = shmr_load_relaxed(&p->pid_namespace), life = shmr_load_relaxed(&p->life);
    kill_and_reap(victim);
    shmr_store_relaxed(&p->pid_namespace, namespace + 1);
    CHECK_EQ(shmr_check_deaths(h), 0);
    shmr_store_relaxed(&p->pid_namespace, namespace);
    /* As if the pid had been given to somebody else: alive, but not him. */
    shmr_store_relaxed(&p->life, shmr_life_pack(shmr_life_epoch(life), 0, (uint32_t)bystander, SHMR_LIVE));
    shmr_store_relaxed(&p->start_time, shmr_load_relaxed(&p->start_time) - 1);
    CHECK_EQ(shmr_check_deaths(h), 1);
    kill_and_reap(bystander);
    CHECK_EQ(shmr_check_deaths(h), 1);
    close_whole();
}

int main(void) {
    RUN(nothing_in_hand);
    RUN(a_zombie_is_dead);
    RUN(a_stopped_process_is_not_dead);
    RUN(claimed_is_freed);
    RUN(half_reserved_memory_is_nobodys);
    RUN(committed_stays_a_message);
    RUN(an_insert_is_finished);
    RUN(polling_finds_the_dead);
    RUN(an_insert_into_a_full_ring_is_kept);
    RUN(kept_by_one_who_left);
    RUN(a_late_message_of_an_earlier_life);
    RUN(leased_goes_back);
    RUN(leased_can_be_taken_over);
    RUN(taken_over_in_part);
    RUN(leased_into_a_full_ring);
    RUN(released_without_telling);
    RUN(held_by_the_dead);
    RUN(shared_by_the_dead);
    RUN(adopted_memory_is_not_reused_early);
    RUN(joining);
    RUN(joining_elsewhere);
    RUN(no_descriptors_left);
    RUN(descriptors_closed_under_us);
    RUN(a_number_that_is_anothers);
    RUN(pidfds_of_one_inode);
    RUN(what_a_child_inherits);
    RUN(rubbish_places);
    RUN(records_go_round);
    RUN(a_group_of_rubbish);
    RUN(identity);
    return summary("unit_recover");
}
