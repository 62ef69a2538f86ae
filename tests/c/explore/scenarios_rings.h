/* SPDX-License-Identifier: BSD-3-Clause */
/* Messages through rings: order, full, wrapping, waiting, closing. */
#ifndef SCENARIOS_RINGS_H
#define SCENARIOS_RINGS_H

#include "world.h"

/* ---- one to one, and whoever clears up ------------------------------------------------------------------------------ */

static void two_in_order(void) {
    uint64_t before = 0;
    for (int i = 0; i < 2; i++) {
        uint64_t number = receive(mine(), 0);
        if (number) promise(number > before, "messages of one producer came out of order");
        if (number) before = number;
    }
}
static void send_one_two(void) {
    send(mine(), 0, 1, 64);
    send(mine(), 0, 2, 64);
}
static void recover(void) {
    shmr_check_deaths(mine());
    shmr_check_deaths(mine());
}
static void setup_one_to_one(void) {
    make_world((shmr_config){0}, 3);
    warm(0);
}
static const struct ex_scenario one_to_one = {
    "one_to_one", "one producer, one consumer, one who looks for the dead", setup_one_to_one, 3,
    {send_one_two, two_in_order, recover}, check_two, {1, 2, 0, 0}, {2, 2, 0, 0}};

/* ---- two by two --------------------------------------------------------------------------------------------------------- */

static void send_one(void) { send(mine(), 0, 1, 64); }
static void send_two(void) { send(mine(), 0, 2, 64); }
static void receive_one(void) { receive(mine(), 0); }
static void setup_two_by_two(void) {
    make_world((shmr_config){0}, 4);
    warm(0);
    warm(1);
}
static const struct ex_scenario two_by_two = {
    "two_by_two", "two producers, two consumers", setup_two_by_two, 4,
    {send_one, send_two, receive_one, receive_one}, check_two, {1, 1, 0, 0}, {2, 1, 0, 0}};

/* ---- the counters wrap ------------------------------------------------------------------------------------------------------ */

static void send_three(void) {
    for (uint64_t n = 1; n <= 3; n++) send(mine(), 0, n, 64);
}
static void receive_three(void) {
    uint64_t before = 0;
    for (int i = 0; i < 3; i++) {
        uint64_t number = receive(mine(), 0);
        if (number) promise(number > before, "messages of one producer came out of order");
        if (number) before = number;
    }
}
static void setup_wrap(void) {
    make_world((shmr_config){.start = UINT64_MAX - 1, .capacity = {2}}, 2);
    warm(0);
}
static const struct ex_scenario wrap = {
    "wrap", "the top of the counters, capacity 2", setup_wrap, 2, {send_three, receive_three}, check_three,
    {2, 1, 0, 0}, {3, 1, 0, 0}};

/* ---- the ring is full -------------------------------------------------------------------------------------------------------- */

static void setup_full(void) {
    make_world((shmr_config){.capacity = {1}}, 3);
    warm(0);
    warm(1);
}
static void receive_two(void) {
    receive(mine(), 0);
    receive(mine(), 0);
}
static const struct ex_scenario full = {
    "full", "capacity 1, two producers: one waits for the slot", setup_full, 3, {send_one, send_two, receive_two}, check_two,
    {1, 1, 0, 0}, {2, 1, 0, 0}};

/* ---- left behind ------------------------------------------------------------------------------------------------------------- */

static void send_two_to_four(void) {
    for (uint64_t n = 2; n <= 4; n++) send(mine(), 0, n, 64);
}
static void receive_four(void) {
    for (int i = 0; i < 4; i++) receive(mine(), 0);
}
static void setup_lapped(void) {
    make_world((shmr_config){.capacity = {1}}, 3);
    warm(0);
    warm(1);
}
static void check_lapped(void) { check_all(4); }
static const struct ex_scenario lapped = {
    "lapped", "a producer stands still while the ring goes round", setup_lapped, 3,
    {send_one, send_two_to_four, receive_four}, check_lapped, {1, 0, 0, 0}, {1, 1, 0, 0}};

static const struct ex_scenario helped = {
    "helped", "capacity 1, two consumers: one goes on for the other, and for the producer that waits", setup_lapped, 3,
    {send_one_two, receive_one, receive_one}, check_two, {1, 1, 0, 0}, {2, 1, 0, 1}};

/* ---- forwarded ------------------------------------------------------------------------------------------------------------------------- */

static void forward(void) {
    shmr *h = mine();
    shmr_block b = {0};
    if (!is_done(RETRIED(shmr_lease(h, 0, 0, soon(), &b)))) return;
    b.kind = FORWARDED;
    if (is_done(RETRIED(shmr_commit(h, 1, 0, -1, soon(), &b)))) return;
    note_delivery(h, &b); /* the receiver died: it stays here */
    OK(shmr_release(h, &b));
}
static void receive_from_second(void) { receive(mine(), 1); }
static void setup_forward(void) {
    make_world((shmr_config){.rings = 2}, 3);
    warm(0);
}
static const struct ex_scenario forwarded = {
    "forwarded", "leased from one ring, committed to another", setup_forward, 3, {send_one, forward, receive_from_second},
    check_one, {1, 1, 0, 0}, {2, 1, 0, 0}};

/* Both for the first time, so that their states look alike. */
static void forward_both(void) {
    forward();
    forward();
}
static void receive_two_from_second(void) {
    receive(mine(), 1);
    receive(mine(), 1);
}
static const struct ex_scenario forwarded_twice = {
    "forwarded_twice", "two messages, leased from one ring, committed to another", setup_forward, 3,
    {send_one_two, forward_both, receive_two_from_second}, check_two, {1, 0, 0, 0}, {1, 1, 0, 0}};

static void setup_forward_to_full(void) {
    make_world((shmr_config){.rings = 2, .capacity = {4, 1}}, 3);
    warm(0);
    send(host_handle, 1, 2, 64);
}
static void check_forward_to_full(void) {
    ex_log[SENT + 2] = 1; /* by the host, before it began */
    check_two();
}
static const struct ex_scenario forwarded_to_full = {
    "forwarded_to_full", "leased from one ring, waiting for room in another", setup_forward_to_full, 3,
    {send_one, forward, receive_two_from_second}, check_forward_to_full, {1, 1, 0, 0}, {2, 1, 0, 0}};

/* ---- put back ----------------------------------------------------------------------------------------------------------- */

static void put_one_back(void) {
    shmr *h = mine();
    shmr_block b = {0};
    if (!is_done(RETRIED(shmr_lease(h, 0, 0, soon(), &b)))) return;
    CHECK(shmr_approx_fill(h, 0) <= 1);
    if (is_done(RETRIED(shmr_commit(h, 0, 0, -1, soon(), &b)))) return;
    note_delivery(h, &b);
    OK(shmr_release(h, &b));
}
static void setup_put_back(void) {
    make_world((shmr_config){.capacity = {1}}, 3);
    warm(0);
}
static const struct ex_scenario put_back = {
    "put_back", "leased, and committed to the same ring, which is full by then", setup_put_back, 3,
    {send_one_two, put_one_back, receive_one}, check_two, {1, 1, 0, 0}, {2, 1, 0, 0}};

/* ---- two items, two asleep ------------------------------------------------------------------------------------------------ */

static void setup_baton(void) {
    make_world((shmr_config){0}, 4);
    warm(0);
    warm(1);
}
static const struct ex_scenario baton = {
    "baton", "two consumers, one message each: a wake-up that reaches one who has its message goes on", setup_baton, 3,
    {send_one_two, receive_one, receive_one}, check_two, {2, 0, 0, 1}, {3, 1, 0, 1}};

/* ---- a message is announced, and comes, or does not ------------------------------------------------------------------------ */

static void announce_and_send(void) {
    shmr *h = mine();
    for (uint64_t number = 0; number <= 2; number++) {
        shmr_block b = {0};
        if (!is_done(RETRIED(shmr_claim(h, 64, NULL, 0, -1, soon(), &b)))) return;
        shmr_announce(h, 0);
        if (number)
            is_done(fill_and_commit(h, 0, number, &b));
        else
            OK(shmr_abort(h, &b));
    }
}
static const struct ex_scenario announced = {
    "announced", "who sleeps is told of messages before they are there; one never is", setup_baton, 3,
    {announce_and_send, receive_one, receive_one}, check_two, {1, 1, 0, 0}, {2, 1, 0, 0}};

/* ---- waiting without taking ------------------------------------------------------------------------------------------------ */

static void look_and_receive(void) {
    shmr *h = mine();
    for (int turn = 0; turn < 4; turn++) {
        uint64_t number;
        if (!is_done(RETRIED(shmr_wait_item(h, 0, soon())))) return;
        int status = try_receive(h, 0, NOT_AT_ALL, &number);
        if (status == SHMR_OK) return;
        CHECK_STATUS(status, SHMR_WOULD_BLOCK); /* another was faster */
    }
    ex_fail("there was an item four times, and none");
}
static const struct ex_scenario wait_item = {
    "wait_item", "two wait until there is an item, and then try to lease it", setup_baton, 3,
    {send_one_two, look_and_receive, look_and_receive}, check_two, {1, 1, 0, 0}, {2, 1, 0, 1}};

/* ---- closed ------------------------------------------------------------------------------------------------------------------ */

static void send_until_closed(void) {
    for (uint64_t n = 1; n <= 2; n++) {
        int status = try_send(mine(), 0, n, 64);
        if (status == SHMR_CLOSED) return;
        is_done(status);
    }
    CHECK(shmr_has_room(mine(), 0) <= 1);
}
static void receive_until_closed(void) {
    uint64_t number;
    int status;
    do status = try_receive(mine(), 0, soon(), &number);
    while (status == SHMR_OK);
    CHECK(status == SHMR_CLOSED || ex_kills());
}
static void close_ring(void) { OK(shmr_close_ring(mine(), 0)); }
static void setup_closing(void) {
    make_world((shmr_config){.capacity = {1}}, 3);
    warm(0);
}
static void check_closed(void) {
    check_messages(2, false);
    check_world();
}
static const struct ex_scenario closing = {
    "closing", "a ring is closed while one waits for a slot, another for an item", setup_closing, 3,
    {send_until_closed, receive_until_closed, close_ring}, check_closed, {1, 1, 0, 0}, {2, 1, 0, 0}};

static void send_and_close(void) {
    send(mine(), 0, 1, 64);
    close_ring();
}
static void check_finished(void) {
    if (!ex_kills()) promise(ex_log[RELEASED + 1], "a ring was said to be closed, and was not empty");
    check_one();
}
static const struct ex_scenario finish = {
    "finish", "what was sent before the ring was closed is received before that is noticed", setup_closing, 2,
    {send_and_close, receive_until_closed}, check_finished, {2, 1, 0, 0}, {4, 1, 0, 0}};

static void wait_until_closed(void) {
    int status = RETRIED(shmr_wait_item(mine(), 0, soon()));
    CHECK(status == SHMR_CLOSED || ex_kills());
}
static void check_nothing_sent(void) { check_all(0); }
static const struct ex_scenario unfilled = {
    "unfilled", "one waits for an item, and the ring is closed", setup_closing, 2, {close_ring, wait_until_closed},
    check_nothing_sent, {2, 0, 0, 0}, {4, 0, 0, 0}};

/* ---- all is done ---------------------------------------------------------------------------------------------------------------- */

/* A task that gives birth to another before it is done, as in a queue whose join() waits for both. */
static void work(void) {
    shmr *h = mine();
    shmr_block b = {0};
    if (!is_done(RETRIED(shmr_lease(h, 0, 0, soon(), &b)))) return;
    bool again = b.attempts > 0;
    uint64_t number = note_delivery(h, &b);
    if (number == 1 && !again) send(h, 0, 2, 64);
    OK(shmr_release(h, &b));
    ex_log[RELEASED + number] = 1;
    shmr_notify_idle(h);
}
static void send_and_join(void) {
    shmr *h = mine();
    send(h, 0, 1, 64);
    if (!is_done(RETRIED(shmr_wait_idle(h, 0, soon())))) return;
    for (uint32_t block = 0; block < 2 * SHMR_GROUP; block++) {
        uint32_t kind = kind_of(h, block);
        promise(kind != SHMR_COMMITTED && (kind != SHMR_LEASED || ex_kills()), "a ring was said to be idle, and was not");
    }
}
static void setup_idle(void) {
    make_world((shmr_config){.blocks = 2 * SHMR_GROUP}, 3);
    warm(1); /* its records come first: looked at before the parent's */
    warm(0);
}
static void check_idle(void) {
    check_messages(2, true);
    check_world();
}
static const struct ex_scenario idle = {
    "idle", "one waits until all messages are done with, a child of the first included", setup_idle, 3,
    {send_and_join, work, work}, check_idle, {1, 0, 0, 0}, {2, 1, 0, 0}};

/* ---- tasks and results --------------------------------------------------------------------------------------------------------------- */

/* Whoever drains the results must not be stuck on its own full arena, or on a full ring of tasks. */
static void submit_and_drain(void) {
    shmr *h = mine();
    uint64_t sent = 0;
    for (int back = 0; back < 2;) {
        int status = SHMR_ITEM_WAITS;
        if (sent < 2) {
            shmr_block b = {0};
            status = RETRIED(shmr_claim(h, 1200000, NULL, 0, 1, soon(), &b));
            if (status == SHMR_OK) {
                ex_set_data(payload(h, &b), sent + 1);
                ex_set_data(payload(h, &b) + 1, ~(sent + 1));
                b.length = 16;
                b.tag = sent + 1;
                status = RETRIED(shmr_commit(h, 0, 0, 1, soon(), &b));
                if (status == SHMR_OK)
                    ex_log[SENT + ++sent] = 1;
                else
                    OK(shmr_abort(h, &b));
            }
        }
        if (status == SHMR_OK && sent < 2) continue;
        if (status != SHMR_OK && status != SHMR_ITEM_WAITS && !is_done(status)) return;
        uint64_t number;
        if (!is_done(try_receive(h, 1, soon(), &number))) return;
        back++;
    }
}
static void setup_items(void) {
    make_world((shmr_config){.rings = 2, .capacity = {1, 1}, .arena_bytes = SHMR_EXTENT}, 2);
    warm(0);
}
static const struct ex_scenario items = {
    "items", "memory for one task: its result, which is the same block, has to be taken for the next one", setup_items, 2,
    {submit_and_drain, forward_both}, check_two, {1, 1, 0, 0}, {2, 1, 0, 0}};

/* ---- scattered ---------------------------------------------------------------------------------------------------------------------- */

static void scatter_and_gather(void) {
    uint64_t in[2] = {11, 12}, out[2] = {0};
    unsigned char states[2] = {0};
    shmr_scatter s = {.sources = 1, .task_ring = 0, .result_ring = 1, .task_kind = 1, .result_kind = 2, .count = 2,
                      .source = {{(const char *)in, 8, sizeof in, 0, 0}}, .target = (char *)out, .target_pitch = 8,
                      .target_bytes = sizeof out, .states = states, .first_tag = 1, .stop = 2, .limit = 2, .payload_check = 1};
    shmr_block message;
    int status = RETRIED(shmr_scatter_run(mine(), &s, 8, soon(), &message));
    CHECK_STATUS(status, SHMR_TIMEOUT); /* all is back, or nothing came */
    if (ex_kills()) return;
    CHECK_EQ(s.out, 0);
    CHECK(out[0] == 11 && out[1] == 12);
}
static void answer_two(void) {
    shmr *h = mine();
    for (int i = 0; i < 2; i++) {
        shmr_block b = {0};
        if (!is_done(RETRIED(shmr_lease(h, 0, 0, soon(), &b)))) return;
        uint64_t words[3] = {b.length, b.offset, shmr_crc32c(0, h->base + b.offset, b.length)};
        b.kind = 2;
        b.spec_bytes = sizeof words;
        memcpy(b.spec, words, sizeof words);
        if (!is_done(RETRIED(shmr_commit(h, 1, 1, -1, soon(), &b)))) OK(shmr_release(h, &b));
    }
}
static void setup_scattered(void) {
    make_world((shmr_config){.rings = 2}, 2);
    warm(0);
}
static void check_scattered(void) {
    shmr *h = host_handle;
    shmr_check_deaths(h);
    shmr_adopt_orphans(h);
    for (uint32_t ring = 0; ring < 2; ring++) {
        shmr_block b = {0};
        int status;
        while ((status = shmr_lease(h, ring, 0, NOT_AT_ALL, &b)) != SHMR_WOULD_BLOCK) {
            CHECK(ex_kills());
            if (status == SHMR_OK) OK(shmr_release(h, &b));
        }
    }
    check_world();
}
static const struct ex_scenario scattered = {
    "scattered", "two blocks of an array go out, and their results come back to their place", setup_scattered, 2,
    {scatter_and_gather, answer_two}, check_scattered, {2, 1, 0, 0}, {3, 1, 0, 0}};

#endif
