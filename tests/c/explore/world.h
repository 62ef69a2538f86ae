/* SPDX-License-Identifier: BSD-3-Clause */
/* What scenarios are made of: a region and its participants, scripts that send and receive, and the check of what was promised. */
#ifndef WORLD_H
#define WORLD_H

#include "machine.h"

#define SECOND INT64_C(1000000000)

static shmr *host_handle, *handles[EX_PROCESSES];
static int region_fd = -1;
static int64_t begun; /* the time at which a run begins */
/* Scripts sleep; else nobody needs the time that a slice takes to end, unless somebody died. */
static bool time_passes;

const shmr *ex_survivor(void) { return host_handle; }
int64_t ex_failed_checks(bool forget) {
    int64_t count = shmr_count_get(&check_failures);
    if (forget) check_failures.value = 0;
    return count;
}

/* ex_log: what scripts report. Messages are numbered 1 .. 15 in the whole scenario. */
enum { SENT = 0, FIRST = 16, AGAIN = 32, RELEASED = 48 };

static void no_spinning(shmr *h) {
    for (int i = 0; i < 2 * SHMR_SPIN_KINDS; i++) {
        shmr_store_relaxed(&h->spin[i].misses, 3);
        shmr_store_relaxed(&h->spin[i].turns, 1);
    }
}

/* A region that the host has created, and a participant for each of the first `count` processes. */
static void make_world(shmr_config config, int count) {
    if (!config.participants) config.participants = 8;
    if (!config.doorbells) config.doorbells = 6;
    if (!config.rings) config.rings = 1;
    if (!config.blocks) config.blocks = 4 * SHMR_GROUP;
    if (!config.arena_bytes) config.arena_bytes = 4 * SHMR_EXTENT;
    for (uint32_t i = 0; i < config.rings; i++)
        if (!config.capacity[i]) config.capacity[i] = 4;
    if (region_fd >= 0) (close)(region_fd);
    host_handle = NULL;
    ex_be(-1);
    begun = shmr_now();
    host_handle = create_region(&config, &region_fd);
    for (int i = 0; i < count; i++) {
        ex_be(i);
        handles[i] = attach_region(region_fd);
        no_spinning(handles[i]);
    }
    ex_be(-1);
}

/* Process i has an extent and a group already. */
static void warm(int i) {
    shmr_block b = {0};
    OK(shmr_claim(handles[i], 64, NULL, 0, -1, NOT_AT_ALL, &b));
    OK(shmr_abort(handles[i], &b));
}

static shmr *mine(void) { return handles[ex_me()]; }
static int64_t soon(void) { return shmr_now() + SECOND; }
static shmr_word *payload(const shmr *h, const shmr_block *b) { return (shmr_word *)(void *)(h->base + b->offset); }

/* A signal came in between: the interpreter would look after it and call again. */
#define RETRIED(call)                              \
    ({                                             \
        int retried_;                              \
        do retried_ = (call);                      \
        while (retried_ == SHMR_INTERRUPTED);      \
        retried_;                                  \
    })

static int fill_and_commit(shmr *h, uint32_t ring, uint64_t number, shmr_block *b) {
    ex_set_data(payload(h, b), number);
    ex_set_data(payload(h, b) + 1, ~number);
    b->length = 16;
    b->tag = number;
    int status = RETRIED(shmr_commit(h, ring, 0, -1, soon(), b));
    if (status == SHMR_OK)
        ex_log[SENT + number] = 1;
    else
        OK(shmr_abort(h, b));
    return status;
}

/* A check that has a name. */
static void promise(bool kept, const char *otherwise) {
    if (!kept) ex_fail("%s", otherwise);
}

/* Unless somebody died nobody waits in vain. */
static bool is_done(int status) {
    promise(status != SHMR_CORRUPT, "a message was found damaged or out of order");
    promise(status != SHMR_TIMEOUT || ex_kills(), "somebody waited in vain");
    CHECK(status == SHMR_OK || status == SHMR_TIMEOUT);
    return status == SHMR_OK;
}

static int try_send(shmr *h, uint32_t ring, uint64_t number, uint64_t bytes) {
    shmr_block b = {0};
    int status = RETRIED(shmr_claim(h, bytes, NULL, 0, -1, soon(), &b));
    return status == SHMR_OK ? fill_and_commit(h, ring, number, &b) : status;
}
static void send(shmr *h, uint32_t ring, uint64_t number, uint64_t bytes) { is_done(try_send(h, ring, number, bytes)); }

static uint64_t note_delivery(shmr *h, const shmr_block *b) {
    uint64_t number = ex_data(payload(h, b));
    CHECK_EQ(number, b->tag);
    CHECK_EQ(ex_data(payload(h, b) + 1), ~number);
    if (number == 0 || number > 15) {
        ex_fail("a message that nobody sent: %llu", (unsigned long long)number);
        return 0;
    }
    ex_log[(b->attempts ? AGAIN : FIRST) + number]++;
    return number;
}

/* Who forwards a message from ring 0 changes its descriptor; if it comes back there, it comes as it was. */
#define FORWARDED 7u
static void check_unchanged(uint32_t ring, const shmr_block *b) {
    promise(ring != 0 || b->kind != FORWARDED, "a message came back as if it had been sent on");
}

/* Lease, note and release one; *number: 0 if it came again, after a death. */
static int try_receive(shmr *h, uint32_t ring, int64_t deadline, uint64_t *number) {
    shmr_block b = {0};
    *number = 0;
    int status = RETRIED(shmr_lease(h, ring, 0, deadline, &b));
    if (status != SHMR_OK) return status;
    bool again = b.attempts > 0;
    check_unchanged(ring, &b);
    uint64_t delivered = note_delivery(h, &b);
    OK(shmr_release(h, &b));
    ex_log[RELEASED + delivered] = 1;
    if (!again) *number = delivered;
    return status;
}
static uint64_t receive(shmr *h, uint32_t ring) {
    uint64_t number;
    is_done(try_receive(h, ring, soon(), &number));
    return number;
}
static void receive_if_any(shmr *h, uint32_t ring) {
    uint64_t number;
    int status = try_receive(h, ring, NOT_AT_ALL, &number);
    CHECK(status == SHMR_OK || status == SHMR_WOULD_BLOCK);
}

static void close_all(void) {
    for (int i = 0; i < EX_PROCESSES; i++) {
        if (!handles[i] || ex_was_killed(i)) continue;
        ex_be(i);
        OK(shmr_close(handles[i], 0));
    }
    ex_be(-1);
}

static void lease_what_is_left(void) {
    shmr *h = host_handle;
    shmr_check_deaths(h);
    shmr_adopt_orphans(h);
    for (uint32_t ring = 0; ring < h->g.config.rings; ring++)
        for (;;) {
            shmr_block b = {0};
            int status = shmr_lease(h, ring, 0, NOT_AT_ALL, &b);
            if (status == SHMR_WOULD_BLOCK || status == SHMR_CLOSED) break;
            promise(status != SHMR_CORRUPT, "a message was found damaged or out of order");
            CHECK_STATUS(status, SHMR_OK);
            if (status != SHMR_OK) break;
            check_unchanged(ring, &b);
            uint64_t number = note_delivery(h, &b);
            promise(!ex_log[RELEASED + number], "a message came again after it had been released");
            OK(shmr_release(h, &b));
        }
}

/* What is left is leased by the host, and all must be as promised. */
static void check_messages(uint64_t count, bool all_sent) {
    lease_what_is_left();
    if (ex_kills()) { /* for what a recoverer found no room */
        close_all();
        lease_what_is_left();
    }
    uint64_t missing = 0;
    for (uint64_t n = 1; n <= count; n++) {
        uint64_t first = ex_log[FIRST + n], again = ex_log[AGAIN + n];
        promise(first <= 1, "a message was delivered twice as if for the first time");
        promise(again == 0 || ex_kills(), "a message came again though nobody died");
        missing += ex_log[SENT + n] && first + again == 0;
        if (!ex_kills()) promise(first <= ex_log[SENT + n], "a message was delivered that had not been sent");
        if (!ex_kills() && all_sent) CHECK(ex_log[SENT + n]);
    }
    promise(!missing, "a message was lost");
}

static void check_world(void) {
    shmr *h = host_handle;
    if (!ex_kills() && !time_passes) promise(shmr_now() == begun, "somebody slept beside what it waited for");
    close_all();
    /* Where nobody but one looks for deaths, what died with a notifier is found by a slice before that. */
    rescues_allowed = h->g.config.flags & SHMR_CREATOR_RECOVERS && ex_kills();
    check_whole(h);
    for (uint32_t i = 0; i < h->g.config.participants; i++) CHECK_EQ(life_of(h, i), i == h->self ? SHMR_LIVE : SHMR_VACANT);
    for (uint32_t d = 0; d < h->g.config.doorbells; d++) CHECK_EQ(shmr_load_relaxed(&shmr_doorbell_at(h, d)->owner), 0);
}

static void check_all(uint64_t count) {
    check_messages(count, true);
    check_world();
}
static void check_one(void) { check_all(1); }
static void check_two(void) { check_all(2); }
static void check_three(void) { check_all(3); }

#endif
