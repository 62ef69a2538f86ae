/* SPDX-License-Identifier: BSD-3-Clause */
/* Many producers and consumers, as threads and as processes: everything arrives once, whole, and in order.
 *
 *     stress_ring [seed [seconds]]
 */
#include "stress.h"

#if defined(__SANITIZE_THREAD__)
#define MESSAGES 400
#elif defined(__SANITIZE_ADDRESS__)
#define MESSAGES 800
#else
#define MESSAGES 3000
#endif
#define PEOPLE_MAX 8

enum mode { ONE_HANDLE, OWN_HANDLES, PROCESSES };

static int fd;
static shmr *h;
static enum mode mode;
static uint32_t producers, consumers;
static uint64_t size_max;
static shmr_word (*received)[MESSAGES]; /* by producer and number: how often */
static shmr_count *child_failures;
static uint64_t base_seed;
static struct totals all;

static void produce(shmr *p, uint64_t id) {
    uint64_t seed = base_seed * 1000 + id + 1;
    for (uint64_t number = 0; number < MESSAGES; number++)
        OK(send_payload(p, 0, id, number, message_size(&seed, size_max), random_below(&seed, 8) == 0, FOR_EVER));
}

/* From ring 0; every third message goes on to ring 1 in place, for the collector. */
static void consume(shmr *p, uint64_t id, uint32_t ring) {
    uint64_t next[PEOPLE_MAX] = {0};
    (void)id;
    for (;;) {
        shmr_block b = {0};
        int status = shmr_lease(p, ring, 1, FOR_EVER, &b);
        if (status == SHMR_CLOSED) return;
        CHECK_STATUS(status, SHMR_OK);
        if (status != SHMR_OK) return;
        CHECK_EQ(b.attempts, 0);
        struct payload m = check_message(p, &b);
        if (m.producer >= producers || m.number >= MESSAGES) {
            CHECK(!"a message of nobody");
            return;
        }
        if (ring == 0) { /* each consumer sees a growing part of each producer's numbers */
            CHECK(m.number >= next[m.producer]);
            next[m.producer] = m.number + 1;
            if (m.number % 3 == 0) {
                OK(shmr_commit(p, 1, 1, -1, FOR_EVER, &b));
                continue;
            }
        }
        shmr_add_relaxed(&received[m.producer][m.number], 1);
        OK(shmr_release(p, &b));
    }
}

struct person {
    bool producer;
    uint64_t id;
    shmr *handle;
    pthread_t thread;
    pid_t process;
};

static void act(struct person *who) {
    shmr *p = who->handle ? who->handle : attach_region(fd);
    if (who->producer)
        produce(p, who->id);
    else
        consume(p, who->id, 0);
    if (!who->handle) leave_region(p);
}
static void *act_as_thread(void *who) {
    act(who);
    return NULL;
}

static void begin(struct person *who) {
    who->handle = mode == ONE_HANDLE ? h : NULL;
    if (mode == PROCESSES) {
        who->process = fork();
        if (who->process) return;
        alarm(WATCHDOG_SECONDS);
        act(who);
        shmr_count_add(child_failures, shmr_count_get(&check_failures));
        _exit(shmr_count_get(&check_failures) != 0);
    }
    if (pthread_create(&who->thread, NULL, act_as_thread, who) != 0) exit(2);
}

static void end(struct person *who) {
    if (mode == PROCESSES)
        expect_success(who->process);
    else
        pthread_join(who->thread, NULL);
}

static void *collect(void *unused) {
    (void)unused;
    consume(h, 0, 1);
    return NULL;
}

static void run(enum mode how, uint32_t producer_count, uint32_t consumer_count, uint64_t capacity, uint64_t arena,
                uint64_t size) {
    mode = how;
    producers = producer_count;
    consumers = consumer_count;
    size_max = size;
    shmr_config config = {.participants = 16, .doorbells = 64, .rings = 2, .blocks = 4096, .arena_bytes = arena,
                          .start = UINT64_MAX - 500, .flags = SHMR_WAIT_ALONE, .capacity = {capacity, 3}};
    h = create_region(&config, &fd);
    size_t bytes = sizeof(*received) * producers;
    received = common_memory(bytes);
    child_failures = common_memory(sizeof *child_failures);

    struct person people[2 * PEOPLE_MAX];
    pthread_t collector;
    for (uint32_t i = 0; i < producers; i++) people[i] = (struct person){.producer = true, .id = i};
    for (uint32_t i = 0; i < consumers; i++) people[producers + i] = (struct person){.id = i};
    for (uint32_t i = 0; i < producers + consumers; i++) begin(&people[i]);
    if (pthread_create(&collector, NULL, collect, NULL) != 0) exit(2); /* after the forks */
    for (uint32_t i = 0; i < producers; i++) end(&people[i]);
    OK(shmr_close_ring(h, 0));
    for (uint32_t i = 0; i < consumers; i++) end(&people[producers + i]);
    OK(shmr_close_ring(h, 1));
    pthread_join(collector, NULL);

    CHECK_EQ(shmr_count_get(child_failures), 0);
    uint64_t lost = 0, doubled = 0;
    for (uint32_t p = 0; p < producers; p++)
        for (uint32_t k = 0; k < MESSAGES; k++) {
            uint64_t times = shmr_load_relaxed(&received[p][k]);
            lost += times == 0;
            doubled += times > 1;
        }
    CHECK_EQ(lost, 0);
    CHECK_EQ(doubled, 0);
    all.messages += (uint64_t)producers * MESSAGES - lost;
    all.lost += lost;
    all.duplicated += doubled;
    all.rescued_wakeups += counters_of(h).rescued_wakeups;
    check_whole(h);
    leave_region(h);
    close(fd);
    munmap(received, bytes);
    munmap(child_failures, sizeof *child_failures);
}

static void threads_over_one_handle(void) { run(ONE_HANDLE, 3, 3, 8, 64 * MIB, 2 * MIB); }
static void threads_with_handles_of_their_own(void) { run(OWN_HANDLES, 3, 3, 8, 64 * MIB, 2 * MIB); }
static void threads_small_messages(void) { run(OWN_HANDLES, 4, 4, 64, 32 * MIB, 500); }
static void threads_one_slot(void) { run(OWN_HANDLES, 3, 3, 1, 32 * MIB, 5000); }
static void threads_short_of_memory(void) { run(OWN_HANDLES, 3, 2, 100, 16 * MIB, 2 * MIB); }

#if !defined(__SANITIZE_THREAD__) /* it sees one process at a time */
static void processes_one_to_one(void) { run(PROCESSES, 1, 1, 8, 64 * MIB, 2 * MIB); }
static void processes(void) { run(PROCESSES, 3, 3, 8, 64 * MIB, 2 * MIB); }
static void processes_small_messages(void) { run(PROCESSES, 4, 4, 64, 32 * MIB, 500); }
static void processes_one_slot(void) { run(PROCESSES, 3, 3, 1, 32 * MIB, 5000); }
static void processes_short_of_memory(void) { run(PROCESSES, 3, 2, 100, 16 * MIB, 2 * MIB); }
static void processes_many_to_one(void) { run(PROCESSES, 6, 1, 4, 32 * MIB, 100000); }
static void processes_one_to_many(void) { run(PROCESSES, 1, 6, 4, 32 * MIB, 100000); }
#endif

int main(int argc, char **argv) {
    base_seed = argc > 1 ? strtoull(argv[1], NULL, 0) : 0;
    int64_t end = end_of_run(argc, argv);
    do {
        RUN(threads_over_one_handle);
        RUN(threads_with_handles_of_their_own);
        RUN(threads_small_messages);
        RUN(threads_one_slot);
        RUN(threads_short_of_memory);
#if !defined(__SANITIZE_THREAD__)
        RUN(processes_one_to_one);
        RUN(processes);
        RUN(processes_small_messages);
        RUN(processes_one_slot);
        RUN(processes_short_of_memory);
        RUN(processes_many_to_one);
        RUN(processes_one_to_many);
#endif
        base_seed++;
    } while (shmr_now() < end && !tests_failed);
    print_totals(&all);
    return summary("stress_ring");
}
