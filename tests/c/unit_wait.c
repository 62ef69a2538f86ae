/* SPDX-License-Identifier: BSD-3-Clause */
/* Waiting: for messages, slots and space; deadlines, signals, closing, the last peer's death. A waiter that is woken
 * only by the 250 ms safety net is counted in rescued_wakeups, which check_whole() wants to be 0. */
#include "harness.h"

#define MS INT64_C(1000000)

static int fd;
static shmr *h, *other;

static void open_with(uint64_t flags, uint32_t doorbells) {
    shmr_config config = small_config();
    config.flags = flags;
    config.doorbells = doorbells;
    config.participants = 16;
    h = create_region(&config, &fd);
    other = attach_region(fd);
}
static void open_region(void) { open_with(SHMR_WAIT_ALONE, 64); }

static void close_whole(void) {
    if (other) leave_region(other);
    check_whole(h);
    for (uint32_t d = 0; d < h->g.config.doorbells; d++) {
        uint64_t owner = shmr_load_relaxed(&shmr_doorbell_at(h, d)->owner);
        CHECK(owner == 0 || owner == h->self + 1);
    }
    leave_region(h);
    close(fd);
}

/* ---- one operation in a thread of its own --------------------------------------------------------------------------------- */

enum operation { LEASE, COMMIT, CLAIM, WAIT_ITEM };

struct waiter {
    pthread_t thread;
    shmr *h;
    enum operation operation;
    uint64_t bytes;
    int items;
    int64_t deadline;
    shmr_block block;
    int status;
};

static void *operate(void *argument) {
    struct waiter *w = argument;
    switch (w->operation) {
    case LEASE: w->status = shmr_lease(w->h, 0, 1, w->deadline, &w->block); break;
    case COMMIT: w->status = shmr_commit(w->h, 0, 1, w->items, w->deadline, &w->block); break;
    case CLAIM: w->status = shmr_claim(w->h, w->bytes, NULL, 0, w->items, w->deadline, &w->block); break;
    case WAIT_ITEM: w->status = shmr_wait_item(w->h, 0, w->deadline); break;
    }
    return NULL;
}

static void start(struct waiter *w, shmr *p, enum operation operation, int64_t deadline) {
    w->h = p;
    w->operation = operation;
    w->deadline = deadline;
    if (!w->items) w->items = -1;
    if (pthread_create(&w->thread, NULL, operate, w) != 0) exit(2);
}

static int finish(struct waiter *w) {
    pthread_join(w->thread, NULL);
    return w->status;
}

static uint32_t waiting(const shmr_word *waiters) {
    uint32_t count = 0;
    for (int w = 0; w < SHMR_WAITER_WORDS; w++) count += (uint32_t)__builtin_popcountll(shmr_load_seq_cst(&waiters[w]));
    return count;
}
static void until_waiting(const shmr_word *waiters, uint32_t count) {
    while (waiting(waiters) < count) usleep(200);
}
static shmr_word *items(void) { return shmr_ring_at(h, 0)->item_waiters; }
static shmr_word *slots(void) { return shmr_ring_at(h, 0)->slot_waiters; }
static shmr_word *space(shmr *p) { return shmr_participant_at(p, p->self)->space_waiters; }

/* ---- deadlines --------------------------------------------------------------------------------------------------------------- */

static void deadlines(void) {
    open_region();
    shmr_block b = {0}, full = {0};
    OK(shmr_claim(h, 30 * MIB, NULL, 0, -1, NOT_AT_ALL, &full));
    for (int64_t wait = 0; wait <= 300; wait += 100) { /* shorter and longer than a slice */
        int64_t end = shmr_now() + wait * MS;
        CHECK_STATUS(shmr_lease(h, 0, 0, end, &b), SHMR_TIMEOUT);
        CHECK(shmr_now() >= end);
        CHECK_STATUS(shmr_wait_item(h, 0, end + 1), SHMR_TIMEOUT);
        CHECK_STATUS(shmr_claim(other, 4 * MIB, NULL, 0, -1, end + 10 * MS, &b), SHMR_TIMEOUT);
        CHECK(shmr_now() >= end + 10 * MS);
    }
    for (uint64_t k = 0; k < 8; k++) OK(send_message(other, 0, 8, k, NOT_AT_ALL));
    int64_t end = shmr_now() + 20 * MS;
    OK(shmr_claim(other, 8, NULL, 0, -1, NOT_AT_ALL, &b));
    CHECK_STATUS(shmr_commit(other, 0, 0, -1, end, &b), SHMR_TIMEOUT);
    CHECK(shmr_now() >= end);
    OK(shmr_abort(other, &b));
    CHECK_STATUS(shmr_lease(h, 1, 0, 1, &b), SHMR_TIMEOUT); /* long past */
    for (uint64_t k = 0; k < 8; k++) OK(receive_message(h, 0, NULL, 1)); /* past, but nothing to wait for */
    OK(shmr_abort(h, &full));
    CHECK_EQ(waiting(items()) + waiting(slots()) + waiting(space(other)), 0);
    close_whole();
}

/* ---- being woken --------------------------------------------------------------------------------------------------------------- */

static void by_a_commit(void) {
    open_region();
    for (uint64_t k = 0; k < 50; k++) {
        struct waiter w = {0}, watcher = {0};
        start(&w, other, LEASE, FOR_EVER);
        if (k % 2) until_waiting(items(), 1);
        OK(send_message(h, 0, 100, k, NOT_AT_ALL));
        OK(finish(&w));
        CHECK_EQ(w.block.tag, k);
        start(&watcher, h, WAIT_ITEM, FOR_EVER); /* one that only looks */
        until_waiting(items(), 1);
        OK(shmr_commit(other, 0, 1, -1, NOT_AT_ALL, &w.block));
        OK(finish(&watcher));
        OK(receive_message(h, 0, NULL, NOT_AT_ALL));
    }
    close_whole();
}

static void by_a_slot(void) {
    open_region();
    uint64_t tag = 0;
    for (int turn = 0; turn < 30; turn++) {
        for (uint64_t k = 0; k < 8; k++) OK(send_message(h, 0, 8, k, NOT_AT_ALL));
        struct waiter w = {0};
        OK(shmr_claim(h, 8, NULL, 0, -1, NOT_AT_ALL, &w.block));
        w.block.tag = 8;
        w.block.length = 8;
        memcpy(bytes_of(h, &w.block), &w.block.tag, 8);
        start(&w, h, COMMIT, FOR_EVER);
        if (turn % 2) until_waiting(slots(), 1);
        for (uint64_t k = 0; k <= 8; k++) {
            OK(receive_message(other, 0, &tag, FOR_EVER));
            CHECK_EQ(tag, k);
        }
        OK(finish(&w));
    }
    close_whole();
}

static void by_space(void) {
    open_region();
    for (int turn = 0; turn < 30; turn++) {
        shmr_block first = {0}, second = {0}, leased = {0};
        OK(shmr_claim(h, 16 * MIB, NULL, 0, -1, NOT_AT_ALL, &first));
        OK(shmr_claim(h, 16 * MIB, NULL, 0, -1, NOT_AT_ALL, &second));
        OK(shmr_commit(h, 0, 0, -1, NOT_AT_ALL, &first));
        OK(shmr_lease(other, 0, 0, NOT_AT_ALL, &leased));
        struct waiter w = {.bytes = 10 * MIB};
        start(&w, h, CLAIM, FOR_EVER);
        if (turn % 2) {
            until_waiting(space(h), 1);
            uint64_t tag, index, since, starving = 0;
            OK(shmr_progress(other, 0, &tag, &index, &since, &starving));
            CHECK_EQ(starving, 10 * MIB); /* observers see it */
        }
        if (turn % 3)
            OK(shmr_release(other, &leased)); /* by somebody else */
        else
            OK(shmr_abort(h, &second)); /* by another thread of its own */
        OK(finish(&w));
        CHECK_EQ(shmr_load_relaxed(&shmr_participant_at(h, 0)->starving), 0);
        OK(shmr_abort(h, &w.block));
        if (turn % 3)
            OK(shmr_abort(h, &second));
        else
            OK(shmr_release(other, &leased));
    }
    close_whole();
}

/* A dropped reference gives space, too. */
static void by_a_drop(void) {
    open_region();
    shmr_block b = {0};
    shmr_ref ref, held;
    OK(shmr_claim(h, 30 * MIB, NULL, 0, -1, NOT_AT_ALL, &b));
    OK(shmr_publish(h, &b, &ref));
    OK(shmr_hold(other, ref.block, ref.generation, &held));
    OK(shmr_drop(h, ref.block, ref.generation));
    struct waiter w = {.bytes = 10 * MIB};
    start(&w, h, CLAIM, FOR_EVER);
    until_waiting(space(h), 1);
    OK(shmr_drop(other, ref.block, ref.generation));
    OK(finish(&w));
    OK(shmr_abort(h, &w.block));
    close_whole();
}

/* A participant that sleeps on an empty ring, on whole free extents, gives them to the one who needs them. */
static void by_who_sleeps_on_free_memory(void) {
    open_region();
    for (int turn = 0; turn < 5; turn++) {
        shmr_block b = {0};
        OK(shmr_claim(other, 28 * MIB, NULL, 0, -1, NOT_AT_ALL, &b));
        OK(shmr_abort(other, &b));
        CHECK_EQ(counters_of(other).owned, 28 * MIB);
        struct waiter sleeper = {0}, w = {.bytes = 20 * MIB};
        start(&sleeper, other, LEASE, FOR_EVER);
        until_waiting(items(), 1);
        start(&w, h, CLAIM, FOR_EVER);
        OK(finish(&w));
        OK(shmr_abort(h, &w.block));
        shmr_trim(h);
        OK(send_message(h, 0, 8, 1, NOT_AT_ALL));
        OK(finish(&sleeper));
        OK(shmr_release(other, &sleeper.block));
    }
    close_whole();
}

/* Two who are both short hold free extents that only together are enough: neither keeps the other waiting. */
static void by_who_waits_for_memory_too(void) {
    open_region();
    shmr_block a[8] = {0}, b[8] = {0};
    for (int i = 0; i < 8; i++) { /* by turns, so that each has pieces everywhere */
        OK(shmr_claim(h, 2 * MIB, NULL, 0, -1, NOT_AT_ALL, &a[i]));
        OK(shmr_claim(other, 2 * MIB, NULL, 0, -1, NOT_AT_ALL, &b[i]));
    }
    for (int i = 0; i < 8; i++) {
        OK(shmr_abort(h, &a[i]));
        OK(shmr_abort(other, &b[i]));
    }
    struct waiter first = {.bytes = 30 * MIB}, second = {.bytes = 30 * MIB};
    start(&first, h, CLAIM, FOR_EVER);
    start(&second, other, CLAIM, FOR_EVER);
    /* Which of them gets it is open. */
    while (counters_of(h).used + counters_of(other).used == 0) usleep(200);
    struct waiter *winner = counters_of(h).used ? &first : &second, *loser = winner == &first ? &second : &first;
    OK(finish(winner));
    OK(shmr_abort(winner->h, &winner->block));
    shmr_trim(winner->h);
    OK(finish(loser));
    OK(shmr_abort(loser->h, &loser->block));
    close_whole();
}

/* As many messages as waiters: each waiter gets one, none sleeps on. */
static void one_each(void) {
    open_region();
    enum { WAITERS = 6 };
    for (int turn = 0; turn < 20; turn++) {
        struct waiter w[WAITERS] = {{0}};
        for (int i = 0; i < WAITERS; i++) start(&w[i], i % 2 ? h : other, LEASE, FOR_EVER);
        if (turn % 2) until_waiting(items(), WAITERS);
        for (uint64_t k = 0; k < WAITERS; k++) OK(send_message(h, 0, 8, k, NOT_AT_ALL));
        uint64_t seen = 0;
        for (int i = 0; i < WAITERS; i++) {
            OK(finish(&w[i]));
            seen |= UINT64_C(1) << w[i].block.tag;
            OK(shmr_release(w[i].h, &w[i].block));
        }
        CHECK_EQ(seen, (1 << WAITERS) - 1);
    }
    close_whole();
}

/* Who is awake with its bit set, because it spins, is rung, and nobody who would have to be woken; of many, only some
 * are looked at. */
static void who_is_awake(void) {
    open_region();
    enum { ASLEEP = 2, RUNG = 1, WAITERS = 6 };
    const struct { uint64_t asleep, rung; } cases[] = {{0, 0}, {1, 1}, {3, 2}, {7, 3}, {15, 0}, {63, 0}};
    for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
        for (uint32_t d = 0; d < WAITERS; d++)
            shmr_store_release(&shmr_doorbell_at(h, d)->bell, cases[c].asleep >> d & 1 ? ASLEEP : 0);
        uint64_t all = (1 << WAITERS) - 1;
        shmr_or_seq_cst(items(), all);
        OK(send_message(h, 0, 8, 1, NOT_AT_ALL));
        CHECK_EQ(shmr_load_seq_cst(items()), all & ~(UINT64_C(1) << cases[c].rung));
        for (uint32_t d = 0; d < WAITERS; d++)
            CHECK_EQ(shmr_load_seq_cst(&shmr_doorbell_at(h, d)->bell) & RUNG, d == cases[c].rung);
        shmr_and_acq_rel(items(), 0);
        for (uint32_t d = 0; d < WAITERS; d++) shmr_store_release(&shmr_doorbell_at(h, d)->bell, 0);
        OK(receive_message(h, 0, NULL, NOT_AT_ALL));
    }
    close_whole();
}

/* An announcement rings one bell, of one who sleeps, and takes no bit away. */
static void who_is_told_beforehand(void) {
    open_region();
    enum { RUNG = 1, ASLEEP = 2, SOON = 4, WAITERS = 3 };
    shmr_announce(h, 0);
    shmr_announce(h, 99); /* no such ring */
    const struct { uint64_t bits, asleep, told; } cases[] = {
        {0, 0, 0}, {0, 7, 0}, {1, 1, 1}, {1, 0, 0}, {7, 7, 1}, {7, 3, 0}, {6, 6, 2}, {UINT64_C(1) << 63, 7, 0},
    };
    for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
        for (uint32_t d = 0; d < WAITERS; d++)
            shmr_store_release(&shmr_doorbell_at(h, d)->bell, cases[c].asleep >> d & 1 ? ASLEEP : 0);
        shmr_or_seq_cst(items() + (c == 7), cases[c].bits); /* the last is that of a doorbell that there is not */
        shmr_announce(h, 0);
        CHECK_EQ(shmr_load_seq_cst(items() + (c == 7)), cases[c].bits);
        for (uint32_t d = 0; d < WAITERS; d++) {
            uint64_t asleep = cases[c].asleep >> d & 1 ? ASLEEP : 0;
            CHECK_EQ(shmr_load_seq_cst(&shmr_doorbell_at(h, d)->bell), cases[c].told >> d & 1 ? asleep | RUNG | SOON : asleep);
            shmr_store_release(&shmr_doorbell_at(h, d)->bell, 0);
        }
        shmr_and_acq_rel(items() + (c == 7), 0);
    }
    close_whole();
}

/* Where messages take long to fill nobody is told of most of them. */
static void told_too_early(void) {
    open_region();
    enum { ASLEEP = 2, SOON = 4 };
    const int64_t ago[] = {-1000 * MS, 1000 * MS}; /* that it was announced */
    for (int late = 0; late < 2; late++) {
        shmr_store_relaxed(&h->announced_at, (uint64_t)(shmr_now() - ago[late]));
        OK(send_message(h, 0, 8, 1, NOT_AT_ALL));
        OK(receive_message(h, 0, NULL, NOT_AT_ALL));
        int told = 0;
        shmr_or_seq_cst(items(), 1);
        for (int i = 0; i < 40; i++) {
            shmr_store_release(&shmr_doorbell_at(h, 0)->bell, ASLEEP);
            shmr_announce(h, 0);
            told += (shmr_load_seq_cst(&shmr_doorbell_at(h, 0)->bell) & SOON) != 0;
        }
        CHECK_EQ(told, late ? 8 : 40);
        shmr_and_acq_rel(items(), 0);
        shmr_store_release(&shmr_doorbell_at(h, 0)->bell, 0);
    }
    close_whole();
}

/* Whoever is told sleeps again when nothing comes, and is not lost to what comes then. */
static void told_in_vain(void) {
    open_region();
    for (int turn = 0; turn < 100; turn++) {
        struct waiter w[2] = {{0}};
        for (int i = 0; i < 2; i++) start(&w[i], i ? h : other, LEASE, FOR_EVER);
        if (turn % 2) until_waiting(items(), 2);
        for (uint64_t k = 0; k < 2; k++) {
            shmr_block b = {0};
            OK(shmr_claim(h, 8, NULL, 0, -1, NOT_AT_ALL, &b));
            shmr_announce(h, 0);
            usleep((useconds_t)(turn % 10 * 30)); /* what is announced is waited for less long than the longest of these */
            shmr_announce(h, 0);
            OK(shmr_abort(h, &b));
            OK(send_message(h, 0, 8, k, NOT_AT_ALL));
        }
        for (int i = 0; i < 2; i++) {
            OK(finish(&w[i]));
            OK(shmr_release(w[i].h, &w[i].block));
        }
    }
    close_whole();
}

/* Some of the waiters give up at the very moment when a message comes: the wake-up must go to another. */
static void a_baton_is_passed_on(void) {
    open_region();
    for (int turn = 0; turn < 60; turn++) {
        int64_t end = shmr_now() + 3 * MS;
        struct waiter quitter[2] = {{0}}, stayer = {0};
        for (int i = 0; i < 2; i++) start(&quitter[i], other, LEASE, end);
        start(&stayer, other, WAIT_ITEM, FOR_EVER);
        while (shmr_now() < end - 300000 + turn % 6 * 100000) continue;
        OK(send_message(h, 0, 8, 1, NOT_AT_ALL));
        int taken = 0;
        for (int i = 0; i < 2; i++) {
            int status = finish(&quitter[i]);
            CHECK(status == SHMR_OK || status == SHMR_TIMEOUT);
            if (status != SHMR_OK) continue;
            OK(shmr_release(other, &quitter[i].block));
            taken++;
        }
        if (taken) OK(send_message(h, 0, 8, 2, NOT_AT_ALL)); /* for the one who stayed */
        OK(finish(&stayer));
        while (receive_message(h, 0, NULL, NOT_AT_ALL) == SHMR_OK) continue;
    }
    close_whole();
}

/* More sleepers than doorbells: slower, not stuck. */
static void too_few_doorbells(void) {
    open_with(SHMR_WAIT_ALONE, 1);
    struct waiter w[4] = {{0}};
    for (int i = 0; i < 4; i++) start(&w[i], i % 2 ? h : other, LEASE, FOR_EVER);
    until_waiting(items(), 1);
    for (uint64_t k = 0; k < 4; k++) OK(send_message(h, 0, 8, k, NOT_AT_ALL));
    for (int i = 0; i < 4; i++) {
        OK(finish(&w[i]));
        OK(shmr_release(w[i].h, &w[i].block));
    }
    close_whole();
}

/* ---- who drains results is never stuck on its own full arena, or a full ring --------------------------------------------------- */

static void an_item_interrupts(void) {
    open_region();
    shmr_block b = {0}, full = {0};
    OK(shmr_claim(h, 30 * MIB, NULL, 0, -1, NOT_AT_ALL, &full));
    OK(send_message(other, 1, 8, 1, NOT_AT_ALL));
    CHECK_STATUS(shmr_claim(h, 10 * MIB, NULL, 0, 1, FOR_EVER, &b), SHMR_ITEM_WAITS);
    OK(receive_message(h, 1, NULL, NOT_AT_ALL));
    struct waiter w = {.bytes = 10 * MIB, .items = 1};
    start(&w, h, CLAIM, FOR_EVER);
    until_waiting(shmr_ring_at(h, 1)->item_waiters, 1);
    OK(send_message(other, 1, 8, 2, NOT_AT_ALL));
    CHECK_STATUS(finish(&w), SHMR_ITEM_WAITS);
    OK(receive_message(h, 1, NULL, NOT_AT_ALL));
    OK(shmr_abort(h, &full));

    for (uint64_t k = 0; k < 8; k++) OK(send_message(h, 0, 8, k, NOT_AT_ALL));
    OK(shmr_claim(h, 8, NULL, 0, 1, NOT_AT_ALL, &w.block));
    start(&w, h, COMMIT, FOR_EVER);
    until_waiting(shmr_ring_at(h, 1)->item_waiters, 1);
    OK(send_message(other, 1, 8, 3, NOT_AT_ALL));
    CHECK_STATUS(finish(&w), SHMR_ITEM_WAITS);
    OK(receive_message(h, 1, NULL, NOT_AT_ALL));
    OK(shmr_abort(h, &w.block)); /* still ours */
    for (uint64_t k = 0; k < 8; k++) OK(receive_message(h, 0, NULL, NOT_AT_ALL));
    close_whole();
}

static void denied(void) {
    open_region();
    shmr_block full = {0};
    OK(shmr_claim(other, 30 * MIB, NULL, 0, -1, NOT_AT_ALL, &full));
    struct waiter w = {.bytes = 10 * MIB};
    start(&w, h, CLAIM, FOR_EVER);
    until_waiting(space(h), 1);
    shmr_deny(other, 0);
    CHECK_STATUS(finish(&w), SHMR_DENIED);
    shmr_deny(other, 0); /* too late: it waits no more */
    shmr_block none = {0};
    CHECK_STATUS(shmr_claim(h, 10 * MIB, NULL, 0, -1, shmr_now() + 1000000, &none), SHMR_TIMEOUT);
    OK(shmr_abort(other, &full));
    shmr_trim(other);
    OK(shmr_claim(h, 4 * MIB, NULL, 0, -1, FOR_EVER, &full)); /* that was once */
    OK(shmr_abort(h, &full));
    close_whole();
}

/* ---- other ends ------------------------------------------------------------------------------------------------------------------- */

static void closing_a_ring(void) {
    open_region();
    struct waiter reader = {0}, watcher = {0};
    start(&reader, other, LEASE, FOR_EVER);
    start(&watcher, h, WAIT_ITEM, FOR_EVER);
    until_waiting(items(), 2);
    OK(shmr_close_ring(h, 0));
    CHECK_STATUS(finish(&reader), SHMR_CLOSED);
    CHECK_STATUS(finish(&watcher), SHMR_CLOSED);
    close_whole();
    open_region();
    for (uint64_t k = 0; k < 8; k++) OK(send_message(h, 0, 8, k, NOT_AT_ALL));
    struct waiter writer = {0};
    OK(shmr_claim(other, 8, NULL, 0, -1, NOT_AT_ALL, &writer.block));
    start(&writer, other, COMMIT, FOR_EVER);
    until_waiting(slots(), 1);
    OK(shmr_close_ring(h, 0));
    CHECK_STATUS(finish(&writer), SHMR_CLOSED);
    OK(shmr_abort(other, &writer.block));
    for (uint64_t k = 0; k < 8; k++) OK(receive_message(h, 0, NULL, FOR_EVER));
    CHECK_STATUS(receive_message(h, 0, NULL, FOR_EVER), SHMR_CLOSED);
    close_whole();
}

static void closing_a_handle(void) {
    open_region();
    shmr_block full = {0};
    OK(shmr_claim(h, 30 * MIB, NULL, 0, -1, NOT_AT_ALL, &full));
    struct waiter reader = {0}, claimer = {.bytes = 10 * MIB};
    start(&reader, other, LEASE, FOR_EVER);
    start(&claimer, other, CLAIM, FOR_EVER);
    until_waiting(items(), 1);
    until_waiting(space(other), 1);
    OK(shmr_close(other, 0));
    CHECK_STATUS(finish(&reader), SHMR_CLOSED);
    CHECK_STATUS(finish(&claimer), SHMR_CLOSED);
    shmr_free(other);
    other = NULL;
    CHECK_EQ(waiting(items()), 0);
    OK(shmr_abort(h, &full));
    close_whole();
}

static void on_signal(int number) { (void)number; }

static void a_signal(void) {
    open_region();
    struct sigaction action = {.sa_handler = on_signal}; /* no SA_RESTART, like CPython */
    sigaction(SIGUSR1, &action, NULL);
    struct waiter w = {0};
    start(&w, other, LEASE, FOR_EVER);
    until_waiting(items(), 1);
    /* It may still be on its way to sleep: until it answers. */
    while (pthread_tryjoin_np(w.thread, NULL) == EBUSY) {
        pthread_kill(w.thread, SIGUSR1);
        usleep(1000);
    }
    CHECK_STATUS(w.status, SHMR_INTERRUPTED);
    CHECK_EQ(waiting(items()), 0);
    close_whole();
}

/* A child that joins and waits to be killed. */
static pid_t start_peer(void) {
    uint64_t before = counters_of(h).joins;
    pid_t child = fork();
    if (child == 0) {
        alarm(WATCHDOG_SECONDS);
        attach_region(fd);
        for (;;) pause();
    }
    while (counters_of(h).joins == before) usleep(200);
    while (shmr_find(h, (uint32_t)child) < 0 || shmr_load_relaxed(&shmr_participant_at(h, 1)->start_time) == 0) usleep(200);
    return child;
}

static void the_last_peer_dies(void) {
    for (int alone = 0; alone < 2; alone++) {
        open_with(alone ? SHMR_WAIT_ALONE : 0, 64);
        leave_region(other);
        other = NULL;
        shmr_block b = {0};
        CHECK_STATUS(shmr_lease(h, 0, 0, shmr_now() + 5 * MS, &b), SHMR_TIMEOUT); /* nobody there yet: not lost */
        pid_t one = start_peer(), two = start_peer();
        struct waiter w = {0};
        kill_and_reap(one);
        start(&w, h, LEASE, alone ? shmr_now() + 600 * MS : FOR_EVER);
        until_waiting(items(), 1);
        while (counters_of(h).deaths < 1) usleep(1000); /* the waiter notices, and waits on for the other */
        kill_and_reap(two);
        CHECK_STATUS(finish(&w), alone ? SHMR_TIMEOUT : SHMR_PEER_LOST);
        while (counters_of(h).deaths < 2) shmr_check_deaths(h);
        close_whole();
    }
}

int main(void) {
    RUN(deadlines);
    RUN(by_a_commit);
    RUN(by_a_slot);
    RUN(by_space);
    RUN(by_a_drop);
    RUN(by_who_sleeps_on_free_memory);
    RUN(by_who_waits_for_memory_too);
    RUN(one_each);
    RUN(who_is_awake);
    RUN(who_is_told_beforehand);
    RUN(told_too_early);
    RUN(told_in_vain);
    RUN(a_baton_is_passed_on);
    RUN(too_few_doorbells);
    RUN(an_item_interrupts);
    RUN(denied);
    RUN(closing_a_ring);
    RUN(closing_a_handle);
    RUN(a_signal);
    RUN(the_last_peer_dies);
    return summary("unit_wait");
}
