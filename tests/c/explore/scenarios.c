/* SPDX-License-Identifier: BSD-3-Clause */
/* Small configurations, each of which has everything that can go wrong in one part of the protocol. */
#include "machine.h"

#define SECOND INT64_C(1000000000)

static shmr *host_handle, *handles[EX_PROCESSES];
static int region_fd = -1;
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
    config.flags |= SHMR_WAIT_ALONE;
    if (region_fd >= 0) (close)(region_fd);
    host_handle = NULL;
    ex_be(-1);
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

static void send(shmr *h, uint32_t ring, uint64_t number, uint64_t bytes) {
    shmr_block b = {0};
    int status = RETRIED(shmr_claim(h, bytes, NULL, 0, -1, soon(), &b));
    if (status == SHMR_OK) status = fill_and_commit(h, ring, number, &b);
    CHECK(status == SHMR_OK || (status == SHMR_TIMEOUT && ex_kills()));
}

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

/* Receive and release one; its number, or 0. */
static uint64_t receive(shmr *h, uint32_t ring) {
    shmr_block b = {0};
    int status = RETRIED(shmr_lease(h, ring, 0, soon(), &b));
    CHECK(status == SHMR_OK || (status == SHMR_TIMEOUT && ex_kills()));
    if (status != SHMR_OK) return 0;
    bool again = b.attempts > 0;
    uint64_t number = note_delivery(h, &b);
    OK(shmr_release(h, &b));
    ex_log[RELEASED + number] = 1;
    return again ? 0 : number;
}

/* What is left is leased by the host, and all must be as promised. */
static void check_messages(uint64_t count, bool ordered_by_release) {
    shmr *h = host_handle;
    (void)ordered_by_release;
    shmr_check_deaths(h);
    shmr_adopt_orphans(h);
    for (uint32_t ring = 0; ring < h->g.config.rings; ring++)
        for (;;) {
            shmr_block b = {0};
            int status = shmr_lease(h, ring, 0, NOT_AT_ALL, &b);
            if (status == SHMR_WOULD_BLOCK || status == SHMR_CLOSED) break;
            CHECK_STATUS(status, SHMR_OK);
            if (status != SHMR_OK) break;
            uint64_t number = note_delivery(h, &b);
            CHECK(!ex_log[RELEASED + number]);
            OK(shmr_release(h, &b));
        }
    for (uint64_t n = 1; n <= count; n++) {
        uint64_t first = ex_log[FIRST + n], again = ex_log[AGAIN + n];
        CHECK(first <= 1);
        CHECK(again == 0 || ex_kills() > 0);
        if (ex_log[SENT + n]) CHECK(first + again >= 1);
        if (!ex_kills()) CHECK(ex_log[SENT + n] && first == 1);
    }
}

static void check_world(void) {
    shmr *h = host_handle;
    for (int i = 0; i < EX_PROCESSES; i++) {
        if (!handles[i] || ex_was_killed(i)) continue;
        ex_be(i);
        shmr_close(handles[i], 0);
    }
    ex_be(-1);
    rescues_allowed = false;
    check_whole(h);
    CHECK_EQ(shmr_live_participants(h), 1);
    for (uint32_t d = 0; d < h->g.config.doorbells; d++) CHECK_EQ(shmr_load_relaxed(&shmr_doorbell_at(h, d)->owner), 0);
}

static void check_all(uint64_t count) {
    check_messages(count, false);
    check_world();
}

/* ---- one to one, and whoever clears up ------------------------------------------------------------------------------ */

static void two_in_order(void) {
    uint64_t before = 0;
    for (int i = 0; i < 2; i++) {
        uint64_t number = receive(mine(), 0);
        if (number) CHECK(number > before);
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
static void check_one(void) { check_all(1); }
static void check_two(void) { check_all(2); }
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
        if (number) CHECK(number > before);
        if (number) before = number;
    }
}
static void setup_wrap(void) {
    make_world((shmr_config){.start = UINT64_MAX - 1, .capacity = {2}}, 2);
    warm(0);
}
static void check_three(void) { check_all(3); }
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

/* ---- the arena is full ---------------------------------------------------------------------------------------------------------- */

static void send_large(void) {
    send(mine(), 0, 1, 1200000);
    send(mine(), 0, 2, 1200000);
}
static void setup_arena_full(void) {
    make_world((shmr_config){.arena_bytes = SHMR_EXTENT}, 2);
    warm(0);
}
static const struct ex_scenario arena_full = {
    "arena_full", "memory for one message: the producer waits for its release", setup_arena_full, 2,
    {send_large, two_in_order}, check_two, {2, 1, 0, 0}, {3, 1, 0, 0}};

/* ---- growth --------------------------------------------------------------------------------------------------------------------------- */

static void setup_growth(void) { make_world((shmr_config){.arena_bytes = 2 * SHMR_EXTENT, .blocks = 2 * SHMR_GROUP}, 3); }
static const struct ex_scenario growth = {
    "growth", "two take their first extents and groups of records", setup_growth, 3, {send_one, send_two, receive_two},
    check_two, {1, 1, 0, 0}, {2, 1, 0, 0}};

/* ---- somebody has what another needs -------------------------------------------------------------------------------------------- */

static void setup_shortage(void) {
    make_world((shmr_config){.arena_bytes = SHMR_EXTENT}, 2);
    warm(1); /* who then sleeps, having it */
}
static const struct ex_scenario shortage = {
    "shortage", "the only extent is another's, who waits for a message and does not need it", setup_shortage, 2,
    {send_one, receive_one}, check_one, {2, 1, 0, 0}, {3, 1, 0, 0}};

/* ---- by reference --------------------------------------------------------------------------------------------------------------------- */

static void broadcast(void) {
    shmr *h = mine();
    shmr_block b = {0};
    shmr_ref ref;
    int status = RETRIED(shmr_claim(h, 64, NULL, 0, -1, soon(), &b));
    CHECK_STATUS(status, SHMR_OK);
    if (status != SHMR_OK) return;
    ex_set_data(payload(h, &b), 7);
    b.length = 8;
    OK(shmr_publish(h, &b, &ref));
    for (uint64_t n = 1; n <= 2; n++) {
        status = RETRIED(shmr_claim(h, 64, &ref, 1, -1, soon(), &b));
        if (status == SHMR_OK) status = fill_and_commit(h, 0, n, &b);
        CHECK(status == SHMR_OK || (status == SHMR_TIMEOUT && ex_kills()));
    }
    OK(shmr_drop(h, ref.block, ref.generation));
}
static void receive_reference(void) {
    shmr *h = mine();
    shmr_block b = {0};
    shmr_ref ref, held;
    int status = RETRIED(shmr_lease(h, 0, 0, soon(), &b));
    CHECK(status == SHMR_OK || (status == SHMR_TIMEOUT && ex_kills()));
    if (status != SHMR_OK) return;
    uint64_t number = note_delivery(h, &b);
    OK(shmr_references(h, &b, &ref, 1));
    OK(shmr_hold(h, ref.block, ref.generation, &held));
    OK(shmr_release(h, &b));
    ex_log[RELEASED + number] = 1;
    CHECK_EQ(ex_data((shmr_word *)(void *)(h->base + held.offset)), 7);
    OK(shmr_drop(h, ref.block, ref.generation));
}
static void setup_broadcast(void) {
    make_world((shmr_config){0}, 3);
    warm(0);
}
static const struct ex_scenario by_reference = {
    "by_reference", "one block, named by two messages, read by two", setup_broadcast, 3,
    {broadcast, receive_reference, receive_reference}, check_two, {1, 1, 0, 0}, {2, 1, 0, 0}};

/* ---- forwarded ------------------------------------------------------------------------------------------------------------------------- */

static void forward(void) {
    shmr *h = mine();
    shmr_block b = {0};
    int status = RETRIED(shmr_lease(h, 0, 0, soon(), &b));
    CHECK(status == SHMR_OK || (status == SHMR_TIMEOUT && ex_kills()));
    if (status != SHMR_OK) return;
    status = RETRIED(shmr_commit(h, 1, 0, -1, soon(), &b));
    CHECK(status == SHMR_OK || (status == SHMR_TIMEOUT && ex_kills()));
    if (status != SHMR_OK) OK(shmr_release(h, &b));
}
static void receive_from_second(void) { receive(mine(), 1); }
static void setup_forward(void) {
    make_world((shmr_config){.rings = 2}, 3);
    warm(0);
}
static void check_forwarded(void) {
    /* Who dies rewriting the descriptor for its next leg leaves it damaged: reported once, and gone. */
    shmr *h = host_handle;
    shmr_check_deaths(h);
    for (uint32_t ring = 0; ex_was_killed(1) && ring < 2; ring++) {
        shmr_block b = {0};
        int status = shmr_lease(h, ring, 0, NOT_AT_ALL, &b);
        if (status == SHMR_CORRUPT) ex_log[AGAIN + 1]++;
        if (status == SHMR_OK) {
            note_delivery(h, &b);
            OK(shmr_release(h, &b));
        }
    }
    check_all(1);
}
static const struct ex_scenario forwarded = {
    "forwarded", "leased from one ring, committed to another", setup_forward, 3, {send_one, forward, receive_from_second},
    check_forwarded, {2, 1, 0, 0}, {3, 1, 0, 0}};

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

const struct ex_scenario *const ex_scenarios[] = {&one_to_one, &two_by_two, &wrap, &full, &arena_full, &growth, &shortage,
                                                  &by_reference, &forwarded, &heir, NULL};
