/* SPDX-License-Identifier: BSD-3-Clause */
/* Memory: arenas that grow, are full, change hands; blocks by reference. */
#ifndef SCENARIOS_MEMORY_H
#define SCENARIOS_MEMORY_H

#include "scenarios_rings.h"

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
    check_two, {1, 1, 0, 0}, {1, 2, 0, 0}};

/* ---- somebody has what another needs -------------------------------------------------------------------------------------------- */

static void setup_shortage(void) {
    make_world((shmr_config){.arena_bytes = SHMR_EXTENT}, 2);
    warm(1); /* who then sleeps, having it */
}
static const struct ex_scenario shortage = {
    "shortage", "the only extent is another's, who waits for a message and does not need it", setup_shortage, 2,
    {send_one, receive_one}, check_one, {1, 1, 0, 0}, {2, 1, 0, 0}};

/* ---- records --------------------------------------------------------------------------------------------------------------------- */

static void setup_few_records(void) {
    make_world((shmr_config){.blocks = SHMR_GROUP}, 2);
    warm(1);
}
static const struct ex_scenario few_records = {
    "few_records", "the only group of records is another's, who does not need it", setup_few_records, 2,
    {send_one, receive_one}, check_one, {1, 1, 0, 0}, {2, 1, 0, 0}};

/* ---- given back by oneself ---------------------------------------------------------------------------------------------------------- */

static void trim(void) {
    shmr_trim(mine());
    receive(mine(), 0);
}
static void setup_trim(void) {
    make_world((shmr_config){.blocks = SHMR_GROUP, .arena_bytes = SHMR_EXTENT}, 2);
    warm(1);
}
static const struct ex_scenario trimmed = {
    "trimmed", "one gives back what another is about to take", setup_trim, 2, {send_one, trim}, check_one, {1, 1, 0, 0}, {2, 1, 0, 0}};

/* ---- several extents at once ---------------------------------------------------------------------------------------------------------- */

/* Then asleep on something else, as they should be: who runs no more gives nothing back. */
static void send_huge(uint64_t number) {
    send(mine(), 0, number, 2500000);
    int status = RETRIED(shmr_wait_item(mine(), 1, soon()));
    CHECK(status == SHMR_CLOSED || ex_kills());
}
static void send_huge_one(void) { send_huge(1); }
static void send_huge_two(void) { send_huge(2); }
static void receive_huge(void) {
    receive_two();
    OK(shmr_close_ring(mine(), 1));
}
static void setup_huge(void) { make_world((shmr_config){.rings = 2, .arena_bytes = 3 * SHMR_EXTENT}, 3); }
static const struct ex_scenario huge = {
    "huge", "two need two extents each, of three", setup_huge, 3, {send_huge_one, send_huge_two, receive_huge}, check_two,
    {1, 0, 0, 0}, {1, 1, 0, 0}};

/* Two are short, and get what they need at once: from who has only whole extents to give, its records being in use. */
static shmr_block small_one;

static void abort_at_last(void) {
    shmr_block b = small_one;
    receive_two();
    OK(shmr_abort(mine(), &b));
}
static void setup_two_short(void) {
    make_world((shmr_config){.arena_bytes = 3 * SHMR_EXTENT}, 3);
    shmr_block large[3] = {{0}, {0}, {0}};
    small_one = (shmr_block){0};
    OK(shmr_claim(handles[2], 64, NULL, 0, -1, NOT_AT_ALL, &small_one));
    for (int i = 0; i < 3; i++) OK(shmr_claim(handles[2], 1500000, NULL, 0, -1, NOT_AT_ALL, &large[i]));
    for (int i = 0; i < 3; i++) OK(shmr_abort(handles[2], &large[i]));
}
static const struct ex_scenario two_short = {
    "two_short", "two need an extent, and a third has both to give, asleep", setup_two_short, 3,
    {send_one, send_two, abort_at_last}, check_two, {1, 0, 0, 0}, {1, 1, 0, 0}};

/* One takes an extent and does not get the next; another, who needs only that one, has just looked. */
static void want_both(void) {
    shmr_block b = {0};
    if (is_done(RETRIED(shmr_claim(mine(), 2500000, NULL, 0, -1, soon(), &b)))) OK(shmr_abort(mine(), &b));
    send_one();
    int status = RETRIED(shmr_wait_item(mine(), 1, soon()));
    CHECK(status == SHMR_CLOSED || ex_kills());
}
static void want_one(void) {
    shmr_block b = {0};
    int claimed = RETRIED(shmr_claim(mine(), 1500000, NULL, 0, 0, soon(), &b)); /* unless the others were faster */
    CHECK(claimed == SHMR_ITEM_WAITS || is_done(claimed));
    receive(mine(), 0);
    if (claimed == SHMR_OK) OK(shmr_abort(mine(), &b));
    receive(mine(), 0);
    OK(shmr_close_ring(mine(), 1));
}
static void want_another(void) {
    send(mine(), 0, 2, 1500000);
    int status = RETRIED(shmr_wait_item(mine(), 1, soon()));
    CHECK(status == SHMR_CLOSED || ex_kills());
}
static void setup_in_vain(void) { make_world((shmr_config){.rings = 2, .arena_bytes = 2 * SHMR_EXTENT}, 3); }
static const struct ex_scenario in_vain = {
    "in_vain", "of two extents one needs both, two others need one each", setup_in_vain, 3,
    {want_both, want_one, want_another}, check_two, {0, 0, 0, 0}, {1, 0, 0, 0}};

/* ---- no relief ------------------------------------------------------------------------------------------------------------------------ */

static shmr_block whole_arena;

static void claim_or_be_denied(void) {
    shmr_block b = {0};
    shmr_set_progress(mine(), 5, 6);
    int status = RETRIED(shmr_claim(mine(), 1200000, NULL, 0, -1, soon(), &b));
    CHECK(status == SHMR_OK || status == SHMR_DENIED || ex_kills());
    if (status == SHMR_OK) OK(shmr_abort(mine(), &b));
}
static void deny_and_abort(void) {
    shmr_block b = whole_arena;
    shmr_counters counters;
    uint64_t tag, index, since, starving;
    shmr_read_counters(mine(), &counters);
    CHECK_EQ(counters.pins, 1);
    CHECK(shmr_live_participants(mine()) == 3 || ex_kills());
    uint32_t other = shmr_self(handles[0]);
    CHECK(shmr_find(mine(), handles[0]->pid) == (int)other || ex_kills());
    OK(shmr_progress(mine(), other, &tag, &index, &since, &starving));
    CHECK(tag == 0 || tag == 5);
    shmr_deny(mine(), other);
    OK(shmr_abort(mine(), &b));
    CHECK_STATUS(shmr_abort(mine(), &whole_arena), SHMR_STALE); /* it is done */
    shmr_trim(mine()); /* who was denied before it waited gets this */
}
static void setup_denied(void) {
    make_world((shmr_config){.arena_bytes = SHMR_EXTENT}, 2);
    whole_arena = (shmr_block){0};
    OK(shmr_claim(handles[1], 1200000, NULL, 0, -1, NOT_AT_ALL, &whole_arena));
}
static const struct ex_scenario denied = {
    "denied", "one waits for memory, watched, until it is told not to, or gets some", setup_denied, 2,
    {claim_or_be_denied, deny_and_abort}, check_nothing_sent, {2, 1, 0, 0}, {3, 1, 0, 0}};

/* Nothing else comes: told at once, or not before the slice ends. */
enum { TOLD_AT = 62, HEARD_AT = 63 };
static void check_told(void) {
    shmr *h = host_handle;
    if (!ex_kills() && ex_log[HEARD_AT]) promise(ex_log[HEARD_AT] == ex_log[TOLD_AT], "somebody slept on after it had been told");
    shmr_store_relaxed(&shmr_header_of(h)->poisoned, 0);
    shmr_store_relaxed(&shmr_ring_at(h, 0)->closed, 0);
    if (!ex_was_killed(1)) {
        ex_be(1);
        OK(shmr_abort(handles[1], &(shmr_block){.state = whole_arena.state, .block = whole_arena.block}));
        ex_be(-1);
    }
    check_nothing_sent();
}
static void claim_until_told(void) {
    shmr_block b = {0};
    int status = shmr_claim(mine(), 1200000, NULL, 0, -1, soon(), &b);
    if (status == SHMR_INTERRUPTED) return; /* what it was told before it calls again is forgotten */
    ex_log[HEARD_AT] = (uint64_t)shmr_now();
    CHECK(status == SHMR_DENIED || status == SHMR_CORRUPT || ex_kills());
    if (status == SHMR_OK) OK(shmr_abort(mine(), &b));
}
static void lease_until_told(void) {
    shmr_block b = {0};
    int status = RETRIED(shmr_lease(mine(), 0, 0, soon(), &b));
    ex_log[HEARD_AT] = (uint64_t)shmr_now();
    CHECK(status == SHMR_CORRUPT || ex_kills());
}
static void deny_once_it_waits(void) {
    uint32_t other = shmr_self(handles[0]);
    uint64_t tag, index, since, starving = 0;
    for (int turn = 0; turn < 20 && !starving; turn++) {
        struct timespec a_while = {0, 1000000};
        if (turn > 15) nanosleep(&a_while, NULL);
        OK(shmr_progress(mine(), other, &tag, &index, &since, &starving));
    }
    shmr_deny(mine(), other);
    ex_log[TOLD_AT] = (uint64_t)shmr_now();
}
static void poison(void) {
    shmr_poison(mine(), "found by the explorer");
    ex_log[TOLD_AT] = (uint64_t)shmr_now();
}
static void setup_told(void) {
    setup_denied();
    time_passes = true;
}
static const struct ex_scenario told_no = {
    "told_no", "one waits for memory until it is told not to", setup_told, 2, {claim_until_told, deny_once_it_waits}, check_told,
    {1, 1, 0, 0}, {2, 1, 0, 0}};
static const struct ex_scenario poisoned = {
    "poisoned", "one waits for memory until the region is found damaged", setup_told, 2, {claim_until_told, poison}, check_told,
    {1, 1, 0, 0}, {2, 1, 0, 0}};
static const struct ex_scenario poisoned_ring = {
    "poisoned_ring", "one waits for a message until the region is found damaged", setup_told, 2, {lease_until_told, poison},
    check_told, {1, 1, 0, 0}, {2, 1, 0, 0}};

/* ---- by reference --------------------------------------------------------------------------------------------------------------------- */

static void name_in_messages(const shmr_ref *ref, uint64_t count) {
    shmr *h = mine();
    for (uint64_t n = 1; n <= count; n++) {
        shmr_block b = {0};
        int status = RETRIED(shmr_claim(h, 64, ref, 1, -1, soon(), &b));
        is_done(status == SHMR_OK ? fill_and_commit(h, 0, n, &b) : status);
    }
}
static void broadcast_to(uint64_t count) {
    shmr *h = mine();
    shmr_block b = {0};
    shmr_ref ref;
    if (!is_done(RETRIED(shmr_claim(h, 64, NULL, 0, -1, soon(), &b)))) return;
    ex_set_data(payload(h, &b), 7);
    b.length = 8;
    OK(shmr_publish(h, &b, &ref));
    name_in_messages(&ref, count);
    OK(shmr_drop(h, ref.block, ref.generation));
}
static void broadcast(void) { broadcast_to(2); }
static void receive_reference(void) {
    shmr *h = mine();
    shmr_block b = {0};
    shmr_ref ref, held;
    if (!is_done(RETRIED(shmr_lease(h, 0, 0, soon(), &b)))) return;
    uint64_t number = note_delivery(h, &b);
    OK(shmr_references(h, &b, &ref, 1));
    OK(shmr_hold(h, ref.block, ref.generation, &held));
    OK(shmr_release(h, &b));
    ex_log[RELEASED + number] = 1;
    CHECK_EQ(ex_data((shmr_word *)(void *)(h->base + held.offset)), 7);
    int status = shmr_share(h, h->base + held.offset, 8, &held); /* on to others; small and adopted: by copy */
    CHECK(status == SHMR_OK || (status == SHMR_NOT_SHARED && ex_kills()));
    CHECK(held.block == ref.block && held.generation == ref.generation);
    OK(shmr_drop(h, ref.block, ref.generation));
}
static void setup_broadcast(void) {
    make_world((shmr_config){0}, 3);
    warm(0);
}
static const struct ex_scenario by_reference = {
    "by_reference", "one block, named by two messages, read by two", setup_broadcast, 3,
    {broadcast, receive_reference, receive_reference}, check_two, {1, 1, 0, 0}, {2, 1, 0, 0}};

/* ---- held, and in the way --------------------------------------------------------------------------------------------------------------- */

static void broadcast_and_go_on(void) {
    shmr *h = mine();
    shmr_block b = {0};
    shmr_ref ref;
    if (!is_done(RETRIED(shmr_claim(h, 1500000, NULL, 0, -1, soon(), &b)))) return;
    ex_set_data(payload(h, &b), 7);
    b.length = 8;
    OK(shmr_publish(h, &b, &ref));
    name_in_messages(&ref, 1);
    OK(shmr_drop(h, ref.block, ref.generation));
    send(h, 0, 2, 1500000);
}
static void receive_reference_and_more(void) {
    receive_reference();
    receive(mine(), 0);
}
static void setup_held_full(void) {
    make_world((shmr_config){.arena_bytes = SHMR_EXTENT}, 2);
    warm(0);
}
static const struct ex_scenario held_full = {
    "held_full", "memory for one block, which its maker has let go and another still reads", setup_held_full, 2,
    {broadcast_and_go_on, receive_reference_and_more}, check_two, {1, 1, 0, 0}, {2, 1, 0, 0}};

/* ---- holders in two words ----------------------------------------------------------------------------------------------------------- */

/* The maker's bit is in the second word, the readers' in the first: what is read one after the other changes in between. */
static void make_wide_world(uint64_t arena_bytes) {
    make_world((shmr_config){.participants = 66, .arena_bytes = arena_bytes}, 0);
    for (int i = 2; i >= 0; i--) {
        ex_be(i);
        handles[i] = attach_region(region_fd);
        no_spinning(handles[i]);
        for (uint32_t k = 3; i == 1 && k < 64; k++) /* somebody's, of whom nothing is known */
            shmr_store_relaxed(&shmr_participant_at(host_handle, k)->life, shmr_life_pack(0, 0xfff, 1, SHMR_JOINING));
    }
    ex_be(-1);
    warm(0);
}
static void setup_wide(void) { make_wide_world(0); }
static void setup_wide_full(void) { make_wide_world(SHMR_EXTENT); }
static void broadcast_and_sweep(void) {
    broadcast();
    shmr_trim(mine());
}
static void check_wide(void) {
    shmr *h = host_handle;
    CHECK_EQ(shmr_self(handles[0]), 64);
    for (uint32_t k = 3; k < 64; k++) shmr_store_relaxed(&shmr_participant_at(h, k)->life, 0);
    check_two();
}
static const struct ex_scenario wide = {
    "wide", "one block, named by two messages, read by two, their marks in another word than the maker's", setup_wide, 3,
    {broadcast_and_sweep, receive_reference, receive_reference}, check_wide, {1, 0, 0, 0}, {1, 1, 0, 0}};

static const struct ex_scenario wide_full = {
    "wide_full", "memory for one block, let go by its maker and a reader at once, their marks in two words", setup_wide_full, 2,
    {broadcast_and_go_on, receive_reference_and_more}, check_wide, {1, 0, 0, 0}, {1, 1, 0, 0}};

/* ---- a stale reference --------------------------------------------------------------------------------------------------------------- */

static shmr_ref stale_ref;

static void hold_stale(void) {
    shmr_ref held;
    CHECK_STATUS(shmr_hold(mine(), stale_ref.block, stale_ref.generation, &held), SHMR_STALE);
}
static void setup_stale(void) {
    make_world((shmr_config){0}, 3);
    shmr_block b = {0};
    OK(shmr_claim(handles[0], 64, NULL, 0, -1, NOT_AT_ALL, &b));
    OK(shmr_publish(handles[0], &b, &stale_ref));
    OK(shmr_drop(handles[0], stale_ref.block, stale_ref.generation));
}
static void broadcast_one(void) { broadcast_to(1); }
static const struct ex_scenario stale_hold = {
    "stale_hold", "one tries to hold what is gone while its record serves again", setup_stale, 3,
    {broadcast_one, hold_stale, receive_reference}, check_one, {2, 1, 0, 0}, {3, 1, 0, 0}};

/* ---- born shared ------------------------------------------------------------------------------------------------------------------------- */

static struct shmr_numpy_handler *numpy;

static void share_an_array(void) {
    shmr *h = mine();
    void *context = numpy->allocator.context;
    char *array = numpy->allocator.malloc(context, 64);
    if (!h->base || array < shmr_arena_base(h) || array >= h->base + h->g.total) return; /* not for want of deaths */
    shmr_ref ref, part;
    ex_set_data((shmr_word *)(void *)array, 7);
    OK(shmr_share(h, array, 64, &ref));
    OK(shmr_share(h, array + 8, 8, &part));
    CHECK(part.block == ref.block && part.generation == ref.generation && part.offset == 8);
    name_in_messages(&ref, 2);
    (numpy->allocator.free)(context, array, 64);
}
static void setup_born_shared(void) {
    make_world((shmr_config){0}, 3);
    warm(0);
    numpy = shmr_numpy_handler(handles[0], 1, UINT64_MAX / 2);
}
static const struct ex_scenario born_shared = {
    "born_shared", "an array in the arena is sent by reference twice, and freed by its maker", setup_born_shared, 3,
    {share_an_array, receive_reference, receive_reference}, check_two, {1, 1, 0, 0}, {2, 1, 0, 0}};

#endif
