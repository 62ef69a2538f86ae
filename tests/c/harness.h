/* SPDX-License-Identifier: BSD-3-Clause */
/* A dozen lines of test harness, and what every test of the core needs: regions, messages, "all is whole again". */
#ifndef HARNESS_H
#define HARNESS_H

#include <dirent.h>
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "shmr_internal.h"

#ifdef SHMR_COVERAGE /* what a forked child has covered counts, too */
void __gcov_dump(void);
#define _exit(status) (__gcov_dump(), _exit(status))
#endif

#define WATCHDOG_SECONDS 120

#define MIB (UINT64_C(1) << 20)
#define FOR_EVER INT64_C(-1)
#define NOT_AT_ALL INT64_C(0)

static shmr_count check_failures; /* of the running test; threads count too */
static int tests_run, tests_failed;
static bool rescues_allowed; /* with deaths, the 250 ms safety net has real work */

/* A failed check is reported and counted, and the test goes on: what breaks next is often the better hint. */
#define CHECK(condition)                                                                     \
    do {                                                                                     \
        if (!(condition)) check_failed(__FILE__, __LINE__, #condition);                      \
    } while (0)
#define CHECK_EQ(left, right)                                                                \
    do {                                                                                     \
        uint64_t left_ = (uint64_t)(left), right_ = (uint64_t)(right);                       \
        if (left_ != right_) {                                                               \
            check_failed(__FILE__, __LINE__, #left " == " #right);                           \
            if (shmr_count_get(&check_failures) <= 20)                                       \
                fprintf(stderr, "    %llu != %llu\n", (unsigned long long)left_, (unsigned long long)right_); \
        }                                                                                    \
    } while (0)
#define CHECK_STATUS(call, expected)                                                         \
    do {                                                                                     \
        int status_ = (call);                                                                \
        if (status_ != (expected)) {                                                         \
            check_failed(__FILE__, __LINE__, #call " -> " #expected);                        \
            if (shmr_count_get(&check_failures) <= 20)                                       \
                fprintf(stderr, "    %d: %s (%s)\n", status_, shmr_status_text(status_), shmr_last_detail()); \
        }                                                                                    \
    } while (0)
/* Without this the rest of the test makes no sense. */
#define REQUIRE(condition)                                                                   \
    do {                                                                                     \
        if (!(condition)) {                                                                  \
            check_failed(__FILE__, __LINE__, #condition);                                    \
            return;                                                                          \
        }                                                                                    \
    } while (0)
#define OK(call) CHECK_STATUS(call, SHMR_OK)
#define RUN(test) run_test(#test, test)

static inline void check_failed(const char *file, int line, const char *what) {
    if (shmr_count_add(&check_failures, 1) <= 20) /* the rest is noise */
        fprintf(stderr, "  %s:%d: %s\n", file, line, what);
}

static inline void run_test(const char *name, void (*test)(void)) {
    alarm(WATCHDOG_SECONDS);
    shmr_count_add(&check_failures, -shmr_count_get(&check_failures));
    int64_t start = shmr_now();
    test();
    int64_t failures = shmr_count_get(&check_failures);
    printf("%-6s %-48s %6lld ms\n", failures ? "FAILED" : "ok", name, (long long)((shmr_now() - start) / 1000000));
    fflush(stdout);
    tests_run++;
    tests_failed += failures != 0;
}

/* The value of main(). */
static inline int summary(const char *file) {
    printf("%s: %d passed, %d failed\n", file, tests_run - tests_failed, tests_failed);
    return tests_failed != 0;
}

/* ---- numbers ------------------------------------------------------------------------------------------------------- */

/* SplitMix64: small, seedable, good enough to choose with. */
static inline uint64_t next_random(uint64_t *seed) {
    uint64_t z = *seed += UINT64_C(0x9e3779b97f4a7c15);
    z = (z ^ z >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ z >> 27) * UINT64_C(0x94d049bb133111eb);
    return z ^ z >> 31;
}
static inline uint64_t random_below(uint64_t *seed, uint64_t bound) { return next_random(seed) % bound; }
/* As many small ones as large ones: 2^0 .. max. */
static inline uint64_t random_size(uint64_t *seed, uint64_t max) {
    uint64_t top = 1;
    while (top < max && random_below(seed, 24) != 0) top *= 2;
    uint64_t size = 1 + random_below(seed, top);
    return size > max ? max : size;
}

/* ---- regions --------------------------------------------------------------------------------------------------------- */

static inline shmr_config small_config(void) {
    return (shmr_config){.participants = 8, .doorbells = 64, .rings = 2, .blocks = 4096, .arena_bytes = 32 * MIB,
                         .flags = SHMR_WAIT_ALONE, .capacity = {8, 8}};
}

/* A region in a fresh memfd; its descriptor in *fd. */
static inline shmr *create_region(const shmr_config *config, int *fd) {
    shmr *h = NULL;
    *fd = memfd_create("shmr-test", MFD_CLOEXEC);
    uint64_t bytes = shmr_region_bytes(config);
    if (*fd < 0 || bytes == 0 || ftruncate(*fd, (off_t)bytes) != 0 || shmr_create(*fd, config, &h) != SHMR_OK) {
        fprintf(stderr, "cannot create a region: %s\n", shmr_last_detail());
        exit(2);
    }
    return h;
}

static inline shmr *attach_region(int fd) {
    shmr *h = NULL;
    int status = shmr_attach(fd, &h);
    if (status != SHMR_OK) {
        fprintf(stderr, "cannot attach: %s (%s)\n", shmr_status_text(status), shmr_last_detail());
        exit(2);
    }
    return h;
}

static inline void leave_region(shmr *h) {
    OK(shmr_close(h, 0));
    shmr_free(h);
}

/* A participant of this process that dies: its handle knows nothing any more, and the region nothing of that. */
static inline uint32_t die(shmr *v) {
    uint32_t slot = v->self;
    v->fork_epoch--;
    shmr_close_pidfds(v);
    shmr_free(v);
    return slot;
}

static inline uint32_t open_descriptors(void) {
    uint32_t count = 0;
    DIR *all = opendir("/proc/self/fd");
    while (readdir(all)) count++;
    closedir(all);
    return count;
}

static inline uint64_t state_of(const shmr *h, uint32_t block) {
    return shmr_load_seq_cst(&shmr_record_at(h, block)->state);
}
static inline uint32_t kind_of(const shmr *h, uint32_t block) { return shmr_state_kind(state_of(h, block)); }
static inline uint32_t life_of(const shmr *h, uint32_t slot) {
    return shmr_life_kind(shmr_load_seq_cst(&shmr_participant_at(h, slot)->life));
}
static inline char *bytes_of(const shmr *h, const shmr_block *block) { return h->base + block->offset; }

static inline shmr_counters counters_of(shmr *h) {
    shmr_counters c;
    shmr_read_counters(h, &c);
    return c;
}

/* Nothing is in use any more, by anybody: call when every message has been released and every other participant
 * has left or been recovered. Memory of others is adopted on the way. */
static inline void check_whole(shmr *h) {
    shmr_adopt_orphans(h);
    shmr_trim(h);
    for (uint32_t g = 0; g < h->g.groups; g++) {
        if (!(shmr_load_seq_cst(&shmr_group_at(h, g)->owner) >> 32)) continue; /* never in memory */
        for (uint32_t i = g * SHMR_GROUP; i < (g + 1) * SHMR_GROUP; i++) {
            CHECK_EQ(kind_of(h, i), SHMR_FREE);
            for (int w = 0; w < SHMR_HOLDER_WORDS; w++)
                CHECK_EQ(shmr_load_seq_cst(&shmr_record_at(h, i)->holders[w]), 0);
        }
    }
    shmr_counters c = counters_of(h);
    CHECK_EQ(c.used, 0);
    CHECK_EQ(c.owned, 0);
    CHECK_EQ(c.held, 0);
    CHECK_EQ(c.pins, 0);
    if (!rescues_allowed) CHECK_EQ(c.rescued_wakeups, 0);
    for (uint32_t e = 0; e < h->g.extents; e++) CHECK_EQ((uint32_t)shmr_load_seq_cst(shmr_extent_at(h, e)), 0);
    for (uint32_t r = 0; r < h->g.config.rings; r++) {
        struct shmr_ring *q = shmr_ring_at(h, r);
        shmr_block none = {0};
        int status = shmr_lease(h, r, 1, NOT_AT_ALL, &none);
        CHECK(status == SHMR_WOULD_BLOCK || status == SHMR_CLOSED);
        CHECK(!shmr_any_waiter(q->item_waiters));
        CHECK(!shmr_any_waiter(q->slot_waiters));
    }
    CHECK(!shmr_any_waiter(shmr_header_of(h)->extent_waiters));
    CHECK_EQ(shmr_load_seq_cst(&shmr_header_of(h)->poisoned), 0);
}

/* ---- messages ----------------------------------------------------------------------------------------------------------- */

/* Commit a message of `bytes` whose tag and first bytes are `tag`. */
static inline int send_message(shmr *h, uint32_t ring, uint64_t bytes, uint64_t tag, int64_t deadline) {
    shmr_block b = {0};
    int status = shmr_claim(h, bytes < 8 ? 8 : bytes, NULL, 0, -1, deadline, &b);
    if (status != SHMR_OK) return status;
    b.length = bytes < 8 ? 8 : bytes;
    b.tag = tag;
    memcpy(bytes_of(h, &b), &tag, sizeof tag);
    status = shmr_commit(h, ring, 1, -1, deadline, &b);
    if (status != SHMR_OK) shmr_abort(h, &b);
    return status;
}

/* Lease, check and release one message; its tag in *tag. */
static inline int receive_message(shmr *h, uint32_t ring, uint64_t *tag, int64_t deadline) {
    shmr_block b = {0};
    int status = shmr_lease(h, ring, 1, deadline, &b);
    if (status != SHMR_OK) return status;
    uint64_t inside;
    memcpy(&inside, bytes_of(h, &b), sizeof inside);
    CHECK_EQ(inside, b.tag);
    if (tag) *tag = b.tag;
    return shmr_release(h, &b);
}

/* All of commit but the slot: what a death between the two leaves. */
static inline void commit_without_slot(shmr *v, shmr_block *b, uint32_t ring) {
    struct shmr_record *r = shmr_record_at(v, b->block);
    b->seq = (uint64_t)v->epoch << 40 | ++v->next_seq[ring];
    b->producer = v->self;
    shmr_store_relaxed(&r->length, b->length);
    shmr_store_relaxed(&r->seq, b->seq);
    shmr_store_relaxed(&r->tag, b->tag);
    shmr_store_relaxed(&r->detail, (uint64_t)b->producer << 48 | (uint64_t)b->kind << 32 | b->spec_bytes);
    shmr_store_relaxed(&r->check, (uint64_t)shmr_descriptor_check(b) << 32);
    b->state = shmr_state_pack(shmr_state_generation(b->state) + 1, v->self, ring, shmr_state_flags(b->state),
                               SHMR_COMMITTED);
    shmr_store_release(&r->state, b->state);
}

/* ---- processes ------------------------------------------------------------------------------------------------------------- */

/* Wait for a child that must end by exit(0). */
static inline void expect_success(pid_t child) {
    int status = 0;
    while (waitpid(child, &status, 0) < 0 && errno == EINTR) continue;
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

static inline void kill_and_reap(pid_t child) {
    kill(child, SIGKILL);
    while (waitpid(child, NULL, 0) < 0 && errno == EINTR) continue;
}

#endif
