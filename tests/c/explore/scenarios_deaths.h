/* SPDX-License-Identifier: BSD-3-Clause */
/* Deaths, and whoever takes over: recoverers, heirs, those who leave. */
#ifndef SCENARIOS_DEATHS_H
#define SCENARIOS_DEATHS_H

#include "scenarios_memory.h"

/* ---- joining, leaving ------------------------------------------------------------------------------------------------------------------- */

static void leave_with_a_message(void) {
    send(mine(), 0, 1, 64);
    OK(shmr_close(mine(), 0));
}
static void join_and_receive(void) {
    shmr *h = NULL;
    int status = shmr_attach(region_fd, &h);
    CHECK(status == SHMR_OK);
    if (status != SHMR_OK) return;
    no_spinning(h);
    receive(h, 0);
    OK(shmr_close(h, 0));
}
static void setup_heir(void) {
    make_world((shmr_config){0}, 1);
    handles[1] = handles[2] = NULL;
    warm(0);
}
static const struct ex_scenario heir = {
    "heir", "one sends and leaves while another joins", setup_heir, 2, {leave_with_a_message, join_and_receive}, check_one,
    {2, 1, 0, 0}, {3, 1, 0, 0}};

/* ---- attaching early -------------------------------------------------------------------------------------------------------------------- */

/* As if the region had not been laid out yet, but for the host's own place in the table. */
static shmr_config early_config;

static void make_anew_and_send(void) {
    shmr *h = NULL;
    OK(shmr_create(region_fd, &early_config, &h));
    if (!h) return;
    no_spinning(h);
    send(h, 0, 1, 64);
    OK(shmr_close(h, 0));
}
static void attach_early(void) {
    shmr *h = NULL;
    int status = SHMR_WOULD_BLOCK;
    for (int turn = 0; turn < 3 && (status = shmr_attach(region_fd, &h)) == SHMR_WOULD_BLOCK; turn++) {
        struct timespec a_while = {0, 300000000};
        nanosleep(&a_while, NULL);
    }
    promise(status == SHMR_OK || (status == SHMR_WOULD_BLOCK && ex_kills()), "a region was attached to before it was whole");
    if (status != SHMR_OK) return;
    no_spinning(h);
    receive(h, 0);
    OK(shmr_close(h, 0));
}
static void setup_early(void) {
    make_world((shmr_config){.start = 5}, 0);
    struct shmr_header *header = shmr_header_of(host_handle);
    struct shmr_ring *q = shmr_ring_at(host_handle, 0);
    memset(handles, 0, sizeof handles);
    early_config = host_handle->g.config;
    memset(header, 0, offsetof(struct shmr_header, pad0));
    shmr_store_relaxed(&q->commit_cursor, 0);
    shmr_store_relaxed(&q->lease_cursor, 0);
    for (uint32_t k = 0; k < host_handle->g.slots[0]; k++) shmr_store_relaxed(shmr_slot_at(host_handle, 0, k), 0);
    time_passes = true;
}
static void check_early(void) {
    if (shmr_load_relaxed(&shmr_header_of(host_handle)->magic)) check_all(1);
}
static const struct ex_scenario early = {
    "early", "one attaches while the region is still being laid out", setup_early, 2, {make_anew_and_send, attach_early},
    check_early, {1, 1, 0, 0}, {2, 1, 0, 0}};

/* ---- two who clear up ----------------------------------------------------------------------------------------------------------------- */

static void send_and_take(void) {
    send(mine(), 0, 1, 64);
    receive_if_any(mine(), 0);
}
static void recover_and_take(void) {
    recover();
    receive_if_any(mine(), 0);
}
static void setup_recoverers(void) {
    make_world((shmr_config){0}, 3);
    warm(0);
}
static const struct ex_scenario recoverers = {
    "recoverers", "two look for the dead, and one of them may be it", setup_recoverers, 3,
    {send_and_take, recover_and_take, recover_and_take}, check_one, {1, 2, 0, 0}, {2, 2, 0, 0}};

/* ---- no room for what comes back ---------------------------------------------------------------------------------------------------------- */

static shmr_block leased[2];

static void release_both(void) {
    for (uint64_t n = 1; n <= 2; n++) ex_log[FIRST + n] = 1;
    for (uint64_t n = 1; n <= 2; n++) {
        shmr_block b = leased[n - 1];
        OK(shmr_release(mine(), &b));
        ex_log[RELEASED + n] = 1;
    }
}
static void send_fourth(void) {
    for (uint64_t n = 1; n <= 3; n++) ex_log[SENT + n] = 1;
    send(mine(), 0, 4, 64);
}
static void receive_what_comes(void) {
    shmr_check_deaths(mine());
    receive_two();
    receive_if_any(mine(), 0);
    receive_if_any(mine(), 0);
}
static void setup_overflow(void) {
    make_world((shmr_config){.capacity = {1}}, 3);
    for (uint64_t n = 1; n <= 3; n++) {
        ex_be(0);
        OK(try_send(handles[0], 0, n, 64));
        ex_be(1);
        if (n < 3) OK(shmr_lease(handles[1], 0, 0, NOT_AT_ALL, &leased[n - 1]));
    }
    ex_be(-1);
}
static void check_four(void) { check_all(4); }
static const struct ex_scenario overflow = {
    "overflow", "two messages come back to a full ring that has one slot to spare", setup_overflow, 3,
    {send_fourth, release_both, receive_what_comes}, check_four, {1, 1, 0, 0}, {1, 2, 0, 0}};

/* ---- one is in charge ------------------------------------------------------------------------------------------------------------------- */

static bool is_known_dead(int process) {
    struct pollfd pidfd = {(int)syscall(SYS_pidfd_open, (pid_t)handles[process]->pid, 0), POLLIN, 0};
    return poll(&pidfd, 1, 0) == 1;
}
static void take_over(shmr *h, int process, uint32_t room) {
    shmr_block taken[2];
    uint32_t count = 0;
    int status = shmr_recover(h, shmr_self(handles[process]), taken, room, &count);
    CHECK(status == SHMR_OK || status == SHMR_STALE || status == SHMR_WOULD_BLOCK);
    for (uint32_t i = 0; status == SHMR_OK && i < count; i++) {
        taken[i].attempts = 1; /* as it would have, had it gone back */
        uint64_t number = note_delivery(h, &taken[i]);
        OK(shmr_release(h, &taken[i]));
        ex_log[RELEASED + number] = 1;
    }
}
static void hold_two(void) {
    shmr *h = mine();
    shmr_block b[2] = {{0}, {0}};
    for (int i = 0; i < 2; i++)
        if (is_done(RETRIED(shmr_lease(h, 0, 0, soon(), &b[i])))) note_delivery(h, &b[i]);
    for (int i = 0; i < 2; i++) {
        if (!b[i].state) continue;
        uint64_t number = b[i].tag;
        OK(shmr_release(h, &b[i]));
        ex_log[RELEASED + number] = 1;
    }
}
static void supervise(void) {
    for (int turn = 0; turn < 2; turn++) {
        for (int i = 0; i < 2; i++)
            if (is_known_dead(i)) take_over(mine(), i, 1);
        struct timespec while_others_work = {0, 300000000};
        nanosleep(&while_others_work, NULL);
    }
}
static void setup_in_charge(void) {
    make_world((shmr_config){.flags = SHMR_CREATOR_RECOVERS}, 3);
    warm(0);
    time_passes = true;
}
static void check_in_charge(void) {
    for (int i = 2; i >= 0; i--)
        if (ex_was_killed(i)) take_over(host_handle, i, 2);
    check_two();
}
static const struct ex_scenario in_charge = {
    "in_charge", "only one clears up: it leases what the dead one had leased, as much as it wants", setup_in_charge, 3,
    {send_one_two, hold_two, supervise}, check_in_charge, {1, 2, 0, 0}, {2, 2, 0, 0}};

/* ---- the table is full ----------------------------------------------------------------------------------------------------------------- */

static void send_one_and_leave(void) {
    send_and_take();
    OK(shmr_close(mine(), 0));
}
static void join_if_there_is_room(void) {
    shmr *h = NULL;
    int status = SHMR_CROWDED;
    for (int turn = 0; turn < 6 && status == SHMR_CROWDED; turn++) status = shmr_attach(region_fd, &h);
    CHECK(status == SHMR_OK || status == SHMR_CROWDED);
    if (status != SHMR_OK) return;
    no_spinning(h);
    receive_if_any(h, 0);
    OK(shmr_close(h, 0));
}
static void setup_crowded(void) {
    make_world((shmr_config){.participants = 2}, 1);
    handles[1] = handles[2] = NULL;
    warm(0);
    time_passes = true;
}
static const struct ex_scenario crowded = {
    "crowded", "one place, whose owner leaves or dies, and two who want it", setup_crowded, 3,
    {send_one_and_leave, join_if_there_is_room, join_if_there_is_room}, check_one, {1, 1, 0, 0}, {1, 2, 0, 0}};

/* ---- a place in the table, anew ------------------------------------------------------------------------------------------------------------ */

static void join_and_send(void) {
    shmr *h = NULL;
    int status = shmr_attach(region_fd, &h);
    CHECK(status == SHMR_OK || status == SHMR_CROWDED);
    if (status != SHMR_OK) return;
    no_spinning(h);
    send(h, 0, 2, 64);
    OK(shmr_close(h, 0));
}
static void recover_and_receive(void) {
    recover();
    receive(mine(), 0);
}
static void setup_successor(void) {
    make_world((shmr_config){.participants = 3}, 2);
    handles[2] = NULL;
    warm(0);
}
static void check_successor(void) {
    check_messages(2, false);
    check_world();
}
static const struct ex_scenario successor = {
    "successor", "one takes the place of the dead as soon as it is free", setup_successor, 3,
    {send_one, recover_and_receive, join_and_send}, check_successor, {1, 1, 0, 0}, {2, 1, 0, 0}};

/* ---- taken for the one before ------------------------------------------------------------------------------------------------------------- */

static void leave(void) { OK(shmr_close(mine(), 0)); }
static void join_and_send_number(uint64_t number) {
    shmr *h = NULL;
    int status = SHMR_CROWDED;
    for (int turn = 0; turn < 6 && status == SHMR_CROWDED; turn++) status = shmr_attach(region_fd, &h);
    CHECK(status == SHMR_OK || status == SHMR_CROWDED);
    if (status != SHMR_OK) return;
    no_spinning(h);
    send(h, 0, number, 64);
    OK(shmr_close(h, 0));
}
static void join_and_send_one(void) { join_and_send_number(1); }
static void join_and_send_two(void) { join_and_send_number(2); }
static void look_for_deaths(void) {
    for (int turn = 0; turn < 3; turn++)
        promise(shmr_check_deaths(mine()) == 0 || ex_kills(), "one who lives was found dead");
    receive_if_any(mine(), 0);
}
static void setup_newcomer(void) {
    make_world((shmr_config){.participants = 3}, 2);
    handles[2] = NULL;
    time_passes = true;
}
static void check_turns(void) { /* either may come too late */
    check_messages(2, false);
    check_world();
}
static const struct ex_scenario newcomer = {
    "newcomer", "one takes the place of who leaves, while another looks for the dead", setup_newcomer, 3,
    {leave, look_for_deaths, join_and_send_one}, check_turns, {1, 1, 0, 0}, {2, 1, 0, 0}};

static void setup_turns(void) {
    make_world((shmr_config){.participants = 2}, 1);
    handles[1] = handles[2] = NULL;
    time_passes = true;
}
static const struct ex_scenario turns = {
    "turns", "one place, and two who take it one after the other", setup_turns, 3, {leave, join_and_send_one, join_and_send_two},
    check_turns, {1, 0, 0, 0}, {2, 1, 0, 0}};

/* ---- in time -------------------------------------------------------------------------------------------------------------------------------- */

/* What died with a notifier comes when its death is found, not when some sleeper happens to look. */
enum { FOUND_AT = 62, RECEIVED_AT = 63 };
static void receive_in_time(void) {
    uint64_t number;
    if (is_done(try_receive(mine(), 0, soon(), &number))) ex_log[RECEIVED_AT] = (uint64_t)shmr_now();
}
static void find_in_time(void) {
    if (shmr_check_deaths(mine())) ex_log[FOUND_AT] = (uint64_t)shmr_now();
}
static void check_in_time(void) {
    if (ex_log[FOUND_AT] && ex_log[RECEIVED_AT])
        promise(ex_log[RECEIVED_AT] <= ex_log[FOUND_AT], "somebody slept on after a death had been found");
    check_one();
}
static const struct ex_scenario in_time = {
    "in_time", "whose notifier died is woken when that is found", setup_recoverers, 3,
    {send_one, receive_in_time, find_in_time}, check_in_time, {2, 1, 0, 0}, {3, 1, 0, 0}};

/* ---- a block that comes back ------------------------------------------------------------------------------------------------------------------ */

static shmr_block first_message;

static void release_first(void) {
    shmr_block b = first_message;
    ex_log[FIRST + 1] = 1;
    OK(shmr_release(mine(), &b));
    ex_log[RELEASED + 1] = 1;
}
static void recover_and_go_on(void) {
    shmr *h = mine();
    ex_log[SENT + 1] = ex_log[SENT + 2] = 1;
    shmr_check_deaths(h);
    send(h, 0, 3, 64);
    receive_if_any(h, 0);
    send(h, 0, 4, 64);
}
static void setup_reused(void) {
    make_world((shmr_config){0}, 3);
    ex_be(0);
    OK(try_send(handles[0], 0, 1, 64));
    OK(try_send(handles[0], 0, 2, 64));
    ex_be(1);
    OK(shmr_lease(handles[1], 0, 0, NOT_AT_ALL, &first_message));
    shmr_add_seq_cst(&shmr_ring_at(handles[1], 0)->lease_cursor, UINT64_MAX); /* it gets no further */
    ex_be(-1);
}
static const struct ex_scenario reused = {
    "reused", "a block is recovered and used again while old slots still name it", setup_reused, 3,
    {recover_and_go_on, release_first, two_in_order}, check_four, {1, 1, 0, 0}, {2, 1, 0, 0}};

/* ---- who leaves has blocks that others need ----------------------------------------------------------------------------------------------- */

static void broadcast_and_leave(void) {
    broadcast_to(1);
    OK(shmr_close(mine(), 0));
}
static void join_and_work(void) {
    shmr *h = NULL;
    shmr_block b = {0};
    OK(shmr_attach(region_fd, &h));
    if (!h) return;
    no_spinning(h);
    if (is_done(RETRIED(shmr_claim(h, 64, NULL, 0, -1, soon(), &b)))) {
        ex_set_data(payload(h, &b), 8); /* not where the others still read */
        OK(shmr_abort(h, &b));
    }
    OK(shmr_close(h, 0));
}
static void setup_legacy(void) {
    make_world((shmr_config){.arena_bytes = SHMR_EXTENT, .blocks = SHMR_GROUP}, 2);
    handles[2] = NULL;
    warm(0);
    time_passes = true; /* who waits for space looks for the arenas of those who left once a slice */
}
static const struct ex_scenario legacy = {
    "legacy", "one leaves blocks that another reads to an heir, who allocates among them", setup_legacy, 3,
    {broadcast_and_leave, receive_reference, join_and_work}, check_one, {1, 1, 0, 0}, {2, 1, 0, 0}};

/* ---- leaving by force ------------------------------------------------------------------------------------------------------------------------ */

static void lease_and_leave(void) {
    shmr *h = mine();
    shmr_block b = {0};
    if (!is_done(RETRIED(shmr_lease(h, 0, 0, soon(), &b)))) return;
    note_delivery(h, &b);
    OK(shmr_close(h, 1));
    CHECK_STATUS(shmr_release(h, &b), SHMR_STALE);
}
static void setup_forced(void) {
    make_world((shmr_config){.capacity = {1}}, 3);
    warm(0);
}
static const struct ex_scenario forced = {
    "forced", "one leaves with a message leased: that is done with", setup_forced, 3,
    {send_one_two, lease_and_leave, receive_one}, check_two, {1, 1, 0, 0}, {2, 1, 0, 0}};

static void wait_until_idle(void) { is_done(RETRIED(shmr_wait_idle(mine(), 0, soon()))); }
static void leave_with_leased(void) {
    ex_log[SENT + 1] = ex_log[FIRST + 1] = 1;
    OK(shmr_close(mine(), 1));
    ex_log[RELEASED + 1] = 1;
}
static void setup_forced_idle(void) {
    make_world((shmr_config){0}, 2);
    shmr_block b = {0};
    ex_be(0);
    OK(try_send(handles[0], 0, 1, 64));
    OK(shmr_lease(handles[0], 0, 0, NOT_AT_ALL, &b));
    ex_be(-1);
}
static const struct ex_scenario forced_idle = {
    "forced_idle", "one leaves with the last message leased, and another waits for that", setup_forced_idle, 2,
    {leave_with_leased, wait_until_idle}, check_one, {2, 1, 0, 0}, {3, 1, 0, 0}};

/* ---- records of one who left ------------------------------------------------------------------------------------------------------------------ */

static void use_and_leave(void) {
    send(mine(), 0, 1, 64);
    receive(mine(), 0);
    OK(shmr_close(mine(), 0));
}
static void setup_handed_over(void) {
    make_world((shmr_config){.blocks = SHMR_GROUP}, 2);
    warm(0);
    time_passes = true;
}
static const struct ex_scenario handed_over = {
    "handed_over", "one leaves, and another needs its records", setup_handed_over, 2, {use_and_leave, send_two}, check_turns,
    {1, 1, 0, 0}, {2, 1, 0, 0}};

#endif
