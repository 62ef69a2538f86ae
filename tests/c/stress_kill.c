/* SPDX-License-Identifier: BSD-3-Clause */
/* Producers and consumers that are SIGKILLed at random moments and replaced, while the others go on.
 *
 * Promised, and checked: whatever a commit reported as sent arrives; what was never committed does not; what arrives is
 * whole; nothing is delivered twice as if for the first time (a repetition says so by its attempts); at the end every
 * record is free and no memory is in use.
 *
 *     stress_kill [seed [seconds]]
 */
#include "stress.h"

#if defined(__SANITIZE_ADDRESS__)
#define KILLS 80
#else
#define KILLS 200
#endif
#define PRODUCERS 3
#define CONSUMERS 3
#define PEOPLE (PRODUCERS + CONSUMERS)
#define LIVES (KILLS + PEOPLE + 8) /* every process that ever was, in order of birth */
#define NUMBERS 20000              /* messages of one life */

struct life {
    shmr_word sent;             /* commits that returned */
    shmr_word arrived[NUMBERS]; /* first deliveries in the low half, repeated ones in the high */
};

static int fd;
static shmr *h;
static struct life *lives;
static struct {
    shmr_word stop_producing, stop_consuming, failures, messages;
} *shared;
static uint32_t births;
static uint64_t base_seed; /* of a run */
static struct totals all;

static void note_failures(void) {
    uint64_t failures = (uint64_t)shmr_count_get(&check_failures);
    if (failures) shmr_store_relaxed(&shared->failures, 1);
}

static void produce(shmr *p, uint64_t life) {
    uint64_t seed = base_seed * 1000003 + life * 77 + 5;
    for (uint64_t number = 0; number < NUMBERS && !shmr_load_relaxed(&shared->stop_producing);) {
        int status = send_payload(p, 0, life, number, message_size(&seed, 300000), random_below(&seed, 6) == 0,
                                  shmr_now() + 20000000);
        if (status == SHMR_OK) shmr_store_relaxed(&lives[life].sent, ++number);
        CHECK(status == SHMR_OK || status == SHMR_TIMEOUT);
        note_failures();
    }
}

static void note_arrival(const shmr_block *b, const struct payload *m) {
    if (m->producer >= births || m->number >= NUMBERS) {
        CHECK(!"a message of nobody");
        return;
    }
    shmr_add_relaxed(&lives[m->producer].arrived[m->number], b->attempts ? UINT64_C(1) << 32 : 1);
    shmr_add_relaxed(&shared->messages, 1);
}

/* One message of `ring`; some of ring 0 are sent on to ring 1 instead, in place. */
static int consume_one(shmr *p, uint32_t ring, uint64_t *seed, int64_t deadline) {
    shmr_block b = {0};
    int status = shmr_lease(p, ring, 1, deadline, &b);
    if (status != SHMR_OK) {
        CHECK(status == SHMR_TIMEOUT || status == SHMR_WOULD_BLOCK);
        if (status == SHMR_CORRUPT) fprintf(stderr, "    %s\n", shmr_last_detail());
        return status;
    }
    struct payload m = check_message(p, &b);
    if (ring == 0 && random_below(seed, 3) == 0 && shmr_commit(p, 1, 1, -1, NOT_AT_ALL, &b) == SHMR_OK) return SHMR_OK;
    note_arrival(&b, &m);
    OK(shmr_release(p, &b));
    return SHMR_OK;
}

static void consume(shmr *p, uint64_t life) {
    uint64_t seed = base_seed * 1000003 + life;
    while (!shmr_load_relaxed(&shared->stop_consuming)) {
        consume_one(p, 0, &seed, shmr_now() + 20000000);
        consume_one(p, 1, &seed, NOT_AT_ALL);
        note_failures();
    }
}

static pid_t begin(uint32_t role) {
    uint64_t life = births++;
    pid_t child = fork();
    if (child) return child;
    alarm(WATCHDOG_SECONDS);
    births = LIVES; /* a child does not hear of later ones */
    shmr *p = NULL;
    int status;
    while ((status = shmr_attach(fd, &p)) == SHMR_CROWDED) usleep(1000); /* places of the dead, being cleared */
    CHECK_STATUS(status, SHMR_OK);
    if (status != SHMR_OK) _exit(3);
    if (role < PRODUCERS)
        produce(p, life);
    else
        consume(p, life);
    OK(shmr_close(p, 0));
    note_failures();
    _exit(0);
}

static void check_arrivals(void) {
    uint64_t lost = 0, doubled = 0, invented = 0, repeated = 0, sent_in_all = 0;
    for (uint32_t life = 0; life < births; life++) {
        uint64_t sent = shmr_load_relaxed(&lives[life].sent);
        sent_in_all += sent;
        for (uint64_t number = 0; number < NUMBERS; number++) {
            uint64_t arrived = shmr_load_relaxed(&lives[life].arrived[number]);
            lost += number < sent && arrived == 0;
            invented += number > sent && arrived != 0; /* number == sent: was under way when its sender died */
            doubled += (uint32_t)arrived > 1;
            repeated += arrived >> 32;
            if (number > sent && arrived == 0) break;
        }
    }
    CHECK_EQ(lost, 0);
    CHECK_EQ(invented, 0);
    CHECK_EQ(doubled, 0);
    all.messages += sent_in_all;
    all.redelivered += repeated;
    all.lost += lost;
    all.duplicated += doubled;
    printf("       %llu messages of %u lives, %llu delivered again\n", (unsigned long long)sent_in_all, births,
           (unsigned long long)repeated);
    CHECK(sent_in_all > KILLS);
}

static void run(uint64_t capacity, uint32_t participants, bool stops) {
    uint64_t s = base_seed;
    shmr_config config = {.participants = participants, .doorbells = 32, .rings = 2, .blocks = 8192,
                          .arena_bytes = 48 * MIB, .flags = SHMR_WAIT_ALONE, .capacity = {capacity, capacity}};
    h = create_region(&config, &fd);
    births = 0;
    lives = common_memory(LIVES * sizeof *lives);
    shared = common_memory(sizeof *shared);
    pid_t people[PEOPLE];
    for (uint32_t i = 0; i < PEOPLE; i++) people[i] = begin(i);
    for (int kills = 0; kills < KILLS; kills++) {
        usleep((useconds_t)random_below(&s, random_below(&s, 4) ? 3000 : 15000));
        uint32_t i = (uint32_t)random_below(&s, PEOPLE), k = (uint32_t)random_below(&s, PEOPLE);
        if (stops && k != i) kill(people[k], SIGSTOP); /* somebody else sleeps through it */
        kill_and_reap(people[i]);
        if (random_below(&s, 3)) shmr_check_deaths(h); /* or the others find out, or its replacement does */
        people[i] = begin(i);
        if (stops && k != i) kill(people[k], SIGCONT);
    }
    shmr_store_relaxed(&shared->stop_producing, 1);
    for (uint32_t i = 0; i < PRODUCERS; i++) expect_success(people[i]);
    shmr_check_deaths(h);
    shmr_adopt_orphans(h);
    shmr_store_relaxed(&shared->stop_consuming, 1);
    for (uint32_t i = PRODUCERS; i < PEOPLE; i++) expect_success(people[i]);
    shmr_check_deaths(h);
    for (uint32_t quiet = 0; quiet < 3; quiet++) /* what is on the retry list comes in as there is room */
        for (uint32_t ring = 0; ring < 2; ring++)
            while (consume_one(h, ring, &s, NOT_AT_ALL) == SHMR_OK) quiet = 0;
    CHECK_EQ(shmr_load_relaxed(&shared->failures), 0);
    CHECK_EQ(shmr_live_participants(h), 1);
    CHECK(counters_of(h).deaths <= KILLS);
    all.kills += KILLS;
    all.rescued_wakeups += counters_of(h).rescued_wakeups;
    check_arrivals();
    check_whole(h);
    leave_region(h);
    close(fd);
    munmap(lives, LIVES * sizeof *lives);
    munmap(shared, sizeof *shared);
}

static void killed_and_replaced(void) { run(16, 16, false); }
static void in_a_narrow_ring(void) { run(1, 16, false); }
static void in_a_crowded_table(void) { run(4, PEOPLE + 1, false); }
static void while_others_are_stopped(void) { run(8, 16, true); }

int main(int argc, char **argv) {
    base_seed = argc > 1 ? strtoull(argv[1], NULL, 0) : (uint64_t)shmr_now() % 1000000;
    int64_t end = end_of_run(argc, argv);
    printf("       seed %llu\n", (unsigned long long)base_seed);
    rescues_allowed = true;
    do {
        RUN(killed_and_replaced);
        RUN(in_a_narrow_ring);
        RUN(in_a_crowded_table);
        RUN(while_others_are_stopped);
        base_seed++;
    } while (shmr_now() < end && !tests_failed);
    print_totals(&all);
    return summary("stress_kill");
}
