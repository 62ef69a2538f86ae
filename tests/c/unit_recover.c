/* SPDX-License-Identifier: BSD-3-Clause */
/* Death: forked children join, are brought into some state, SIGKILLed there, and cleared up after. In the end
 * everything must be whole: every record FREE, no memory in use, every extent nobody's. */
#include <poll.h>

#include "harness.h"

struct report { /* what a victim tells before it dies */
    uint32_t slot;
    shmr_block block;
    shmr_ref ref;
};

static int fd;
static shmr *h;

static void open_with(uint64_t flags, uint32_t participants) {
    shmr_config config = small_config();
    config.flags = flags;
    config.participants = participants;
    h = create_region(&config, &fd);
}
static void open_region(void) { open_with(SHMR_WAIT_ALONE, 8); }

static void close_whole(void) {
    check_whole(h);
    CHECK_EQ(shmr_live_participants(h), 1);
    leave_region(h);
    close(fd);
}

/* A child that joins, runs `script`, reports and waits to be killed. */
static pid_t start_victim(void (*script)(shmr *v, struct report *r), struct report *out) {
    int ends[2];
    if (pipe(ends) != 0) exit(2);
    pid_t child = fork();
    if (child == 0) {
        alarm(WATCHDOG_SECONDS);
        shmr *v = attach_region(fd);
        struct report r = {.slot = shmr_self(v)};
        script(v, &r);
        if (write(ends[1], &r, sizeof r) != sizeof r) _exit(2);
        for (;;) pause();
    }
    close(ends[1]);
    CHECK(read(ends[0], out, sizeof *out) == sizeof *out);
    close(ends[0]);
    return child;
}

static void kill_victim(void (*script)(shmr *v, struct report *r), struct report *out) {
    kill_and_reap(start_victim(script, out));
}

/* ---- scripts ------------------------------------------------------------------------------------------------------------ */

static void script_nothing(shmr *v, struct report *r) { (void)v, (void)r; }

static void script_claim(shmr *v, struct report *r) {
    OK(shmr_claim(v, 100000, NULL, 0, -1, NOT_AT_ALL, &r->block));
    const uint64_t sizes[] = {1, 700, 20000, 32768, 40000, 300000, 3 * MIB};
    for (int i = 0; i < 7; i++) {
        shmr_block b;
        OK(shmr_claim(v, sizes[i], NULL, 0, -1, NOT_AT_ALL, &b));
    }
}

static void script_commit(shmr *v, struct report *r) {
    (void)r;
    for (uint64_t k = 0; k < 3; k++) OK(send_message(v, 0, 3000, 10 + k, NOT_AT_ALL));
}

static void script_commit_without_slot(shmr *v, struct report *r) {
    OK(send_message(v, 0, 100, 1, NOT_AT_ALL));
    OK(shmr_claim(v, 100, NULL, 0, -1, NOT_AT_ALL, &r->block));
    r->block.length = 100;
    r->block.tag = 2;
    memcpy(bytes_of(v, &r->block), &r->block.tag, 8);
    commit_without_slot(v, &r->block, 0);
}

/* The slot too, but neither the cursor nor a notification. */
static void script_commit_without_notifying(shmr *v, struct report *r) {
    script_commit_without_slot(v, r);
    OK(shmr_insert(v, 0, r->block.block, shmr_state_generation(r->block.state), 8));
    shmr_add_seq_cst(&shmr_ring_at(v, 0)->commit_cursor, UINT64_MAX);
}

static void script_lease(shmr *v, struct report *r) { OK(shmr_lease(v, 0, 1, NOT_AT_ALL, &r->block)); }

static void script_lease_without_cursor(shmr *v, struct report *r) {
    OK(shmr_lease(v, 0, 1, NOT_AT_ALL, &r->block));
    shmr_add_seq_cst(&shmr_ring_at(v, 0)->lease_cursor, UINT64_MAX);
}

static void script_release_without_hint(shmr *v, struct report *r) {
    OK(shmr_lease(v, 0, 1, NOT_AT_ALL, &r->block));
    shmr_store_release(&shmr_record_at(v, r->block.block)->state,
                       shmr_state_pack(shmr_state_generation(r->block.state), 0, 0, 0, SHMR_FREE));
}

static void script_hold(shmr *v, struct report *r) {
    shmr_ref ref, held;
    OK(shmr_lease(v, 0, 1, NOT_AT_ALL, &r->block));
    OK(shmr_references(v, &r->block, &ref, 1));
    OK(shmr_hold(v, ref.block, ref.generation, &held));
    OK(shmr_release(v, &r->block));
    r->ref = ref;
}

static void script_publish_and_send(shmr *v, struct report *r) {
    shmr_block b;
    OK(shmr_claim(v, 50000, NULL, 0, -1, NOT_AT_ALL, &b));
    b.length = 50000;
    memset(bytes_of(v, &b), 9, 50000);
    OK(shmr_publish(v, &b, &r->ref));
    OK(shmr_claim(v, 10, &r->ref, 1, -1, NOT_AT_ALL, &b));
    b.length = 10;
    OK(shmr_commit(v, 0, 1, -1, NOT_AT_ALL, &b));
}

static void script_extents_and_groups(shmr *v, struct report *r) {
    script_claim(v, r);
    /* Died while it was reserving one more of each. */
    for (uint32_t e = 0; e < v->g.extents; e++)
        if (shmr_load_relaxed(shmr_extent_at(v, e)) == 0) {
            shmr_store_release(shmr_extent_at(v, e), v->self + 1);
            break;
        }
    for (uint32_t g = 0; g < v->g.groups; g++)
        if (shmr_load_relaxed(&shmr_group_at(v, g)->owner) == 0) {
            shmr_store_release(&shmr_group_at(v, g)->owner, v->self + 1);
            break;
        }
}

static void script_joining(shmr *v, struct report *r) {
    script_claim(v, r);
    struct shmr_participant *p = shmr_participant_at(v, v->self);
    shmr_store_relaxed(&p->start_time, 12345); /* its predecessor's */
    shmr_store_release(&p->life, shmr_life_pack(v->epoch, 0, v->pid, SHMR_JOINING));
}

/* ---- one death at a time ---------------------------------------------------------------------------------------------------- */

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
    shmr_block b;
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
    CHECK_STATUS(receive_message(h, 0, &tag, NOT_AT_ALL), SHMR_WOULD_BLOCK);
    CHECK_EQ(kind_of(h, r.block.block), SHMR_COMMITTED);
    CHECK_EQ(shmr_check_deaths(h), 1);
    OK(receive_message(h, 0, &tag, NOT_AT_ALL));
    CHECK_EQ(tag, 2);
    CHECK_STATUS(receive_message(h, 0, &tag, NOT_AT_ALL), SHMR_WOULD_BLOCK); /* once */
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
    shmr_block b;
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
    shmr_block b;
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
    shmr_block b;
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
    shmr_block kept[3], b;
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
    shmr_block b, kept;
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
    shmr_block b;
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
    shmr_block leased, claimed, b;
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
    shmr_block b;
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
    RUN(nothing_in_hand);
    RUN(a_zombie_is_dead);
    RUN(a_stopped_process_is_not_dead);
    RUN(claimed_is_freed);
    RUN(half_reserved_memory_is_nobodys);
    RUN(committed_stays_a_message);
    RUN(an_insert_is_finished);
    RUN(an_insert_into_a_full_ring_is_kept);
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
    RUN(identity);
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
    return summary("unit_recover");
}
