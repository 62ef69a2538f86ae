/* SPDX-License-Identifier: BSD-3-Clause */
/* Somebody writes into the region what the protocol never would: contents and service may suffer, but the private
 * tables of the others stay whole. What the fuzz targets of tests/fuzz look for at random is set up here. */
#include <fcntl.h>
#include <sys/stat.h>

#include "harness.h"

static int fd;
static shmr *h;

static void open_region(void) {
    shmr_config config = small_config();
    config.arena_bytes = 8 * MIB;
    config.blocks = 1024;
    h = create_region(&config, &fd);
}

static void close_region(void) {
    OK(shmr_close(h, 1));
    shmr_free(h);
    close(fd);
}

static shmr_block claim(uint64_t bytes) {
    shmr_block b = {0};
    OK(shmr_claim(h, bytes, NULL, 0, -1, NOT_AT_ALL, &b));
    b.length = bytes;
    return b;
}

static bool overlap(const shmr_block *a, const shmr_block *b) {
    return a->offset < b->offset + b->room && b->offset < a->offset + a->room;
}

/* ---- who owns what --------------------------------------------------------------------------------------------------- */

/* Our extents are said to be nobody's: we must not take them a second time. */
static void extents_given_away(void) {
    open_region();
    shmr_block a = claim(MIB), b = {0};
    for (uint32_t e = 0; e < h->g.extents; e++) shmr_store_relaxed(shmr_extent_at(h, e), SHMR_EXTENT_WARM);
    OK(shmr_claim(h, 2 * MIB, NULL, 0, -1, NOT_AT_ALL, &b));
    CHECK(!overlap(&a, &b));
    OK(shmr_abort(h, &a));
    OK(shmr_abort(h, &b));
    CHECK_EQ(counters_of(h).used, 0);
    close_region();
}

/* They are said to be a dead one's: adopting that must not touch what we have. */
static void extents_said_to_be_of_the_dead(void) {
    open_region();
    shmr *dead = attach_region(fd);
    uint32_t slot = shmr_self(dead);
    shmr_block a = claim(MIB), b = claim(100), c = claim(MIB / 2);
    OK(shmr_abort(h, &c)); /* on a free list */
    for (uint32_t e = 0; e < h->g.extents; e++)
        if ((uint32_t)shmr_load_relaxed(shmr_extent_at(h, e)) == h->self + 1)
            shmr_store_relaxed(shmr_extent_at(h, e), SHMR_EXTENT_WARM | (slot + 1));
    uint64_t owned = counters_of(h).owned;
    OK(shmr_recover(h, slot, NULL, 0, NULL));
    CHECK_EQ(counters_of(h).owned, owned);
    c = claim(MIB / 2);
    CHECK(!overlap(&a, &c) && !overlap(&b, &c));
    OK(shmr_abort(h, &a));
    OK(shmr_abort(h, &b));
    OK(shmr_abort(h, &c));
    CHECK_EQ(counters_of(h).used, 0);
    OK(shmr_close(dead, 1));
    shmr_free(dead);
    close_region();
}

/* Likewise for records: nobody's, or a dead one's with places of somebody else's choice. */
static void groups_given_away(void) {
    open_region();
    shmr *dead = attach_region(fd);
    uint32_t slot = shmr_self(dead);
    shmr_block a = claim(MIB), b = claim(100), more;
    struct shmr_record *r = shmr_record_at(h, a.block);
    for (uint32_t g = 0; g < h->g.groups; g++)
        if (shmr_load_relaxed(&shmr_group_at(h, g)->owner)) shmr_store_relaxed(&shmr_group_at(h, g)->owner, UINT64_C(1) << 32 | (slot + 1));
    shmr_store_relaxed(&r->offset, 5 * MIB); /* nobody's memory */
    shmr_store_relaxed(&shmr_record_at(h, b.block)->room, MIB);
    OK(shmr_recover(h, slot, NULL, 0, NULL));
    OK(shmr_abort(h, &a)); /* frees the place that we know */
    OK(shmr_abort(h, &b));
    CHECK_EQ(counters_of(h).used, 0);
    for (uint32_t g = 0; g < h->g.groups; g++) shmr_store_relaxed(&shmr_group_at(h, g)->owner, UINT64_C(1) << 32);
    a = claim(100);
    for (uint32_t k = 0; k < 600; k++) { /* through all groups there are; no record is given twice */
        if (shmr_claim(h, 64, NULL, 0, -1, NOT_AT_ALL, &more) != SHMR_OK) break;
        CHECK(more.block != a.block);
    }
    OK(shmr_close(dead, 1));
    shmr_free(dead);
    close_region();
}

/* A block that we hold is said to be free, and nobody's: it stays what it is. */
static void a_held_block_is_said_to_be_free(void) {
    open_region();
    shmr_block a = claim(MIB), b;
    shmr_ref ref;
    OK(shmr_publish(h, &a, &ref));
    struct shmr_record *r = shmr_record_at(h, ref.block);
    shmr_store_relaxed(&r->holders[0], 0);
    shmr_store_relaxed(&r->state, shmr_state_pack(ref.generation, 0, 0, 0, SHMR_FREE));
    shmr_or_seq_cst(&shmr_group_at(h, 0)->freed[0], UINT64_MAX);
    shmr_or_seq_cst(&shmr_participant_at(h, h->self)->freed_hint, UINT64_MAX);
    shmr_trim(h);
    b = claim(MIB);
    CHECK(b.offset >= ref.offset + MIB || ref.offset >= b.offset + MIB);
    CHECK_STATUS(shmr_drop(h, ref.block, ref.generation), SHMR_STALE);
    OK(shmr_abort(h, &b));
    close_region();
}

/* ---- references ------------------------------------------------------------------------------------------------------ */

#define CHAIN 900

static void *drop_chain(void *first) {
    const shmr_ref *ref = first;
    OK(shmr_drop(h, ref->block, ref->generation));
    return NULL;
}

/* Each is named by the one before: only rubbish can say so. The stack must not grow with it. */
static void a_chain_of_references(void) {
    open_region();
    static shmr_ref refs[CHAIN];
    for (uint32_t i = 0; i < CHAIN; i++) {
        shmr_block b = claim(64);
        OK(shmr_publish(h, &b, &refs[i]));
    }
    for (uint32_t i = 0; i + 1 < CHAIN; i++) { /* the hold on each goes over to the frame of the one before */
        struct shmr_frame_refs *named = malloc(sizeof *named + sizeof(uint32_t));
        REQUIRE(named);
        named->count = 1;
        named->blocks[0] = refs[i + 1].block;
        h->frame_refs[refs[i].block] = named;
    }
    pthread_t thread;
    pthread_attr_t small;
    pthread_attr_init(&small);
    pthread_attr_setstacksize(&small, 128 << 10);
    CHECK_EQ(pthread_create(&thread, &small, drop_chain, &refs[0]), 0);
    pthread_join(thread, NULL);
    pthread_attr_destroy(&small);
    CHECK_EQ(counters_of(h).used, 0);
    close_region();
}

/* ---- descriptors ------------------------------------------------------------------------------------------------------ */

/* Of one that fails a check, nothing comes out. */
static void a_damaged_descriptor_is_not_handed_on(void) {
    open_region();
    shmr *dead = attach_region(fd);
    uint32_t slot = shmr_self(dead), count = 0;
    shmr_block got, taken = {0};
    for (int way = 0; way < 2; way++) {
        shmr_block b = claim(1000);
        b.spec_bytes = 8;
        uint32_t id = b.block;
        OK(shmr_commit(h, 0, 0, -1, NOT_AT_ALL, &b));
        shmr_word *detail = &shmr_record_at(h, id)->detail;
        if (way == 0) {
            shmr_store_relaxed(detail, shmr_load_relaxed(detail) | 0xffff); /* length of the spec */
            memset(&got, 0xff, sizeof got);
            CHECK_STATUS(shmr_lease(h, 0, 0, NOT_AT_ALL, &got), SHMR_CORRUPT);
        } else {
            OK(shmr_lease(dead, 0, 0, NOT_AT_ALL, &got));
            shmr_store_relaxed(detail, shmr_load_relaxed(detail) | 0xffff);
            OK(shmr_recover(h, slot, &taken, 1, &count));
            CHECK_EQ(count, 1);
            got = taken;
            OK(shmr_release(h, &taken));
        }
        CHECK_EQ(got.spec_bytes, 0);
        CHECK_EQ(got.length, 0);
        CHECK_EQ(got.room, 0);
        CHECK_EQ(got.references, 0);
    }
    OK(shmr_close(dead, 1));
    shmr_free(dead);
    close_region();
}

/* ---- bells -------------------------------------------------------------------------------------------------------------- */

static void *ring_often(void *bell) {
    for (int k = 0; k < 2000; k++) shmr_bell_ring(bell);
    return NULL;
}

static void *write_rubbish(void *bell) {
    uint64_t seed = 1;
    for (int k = 0; k < 20000; k++) shmr_store_relaxed(bell, next_random(&seed) >> random_below(&seed, 64));
    return NULL;
}

/* Whatever stands in the word, ringing returns, and waiting ends at its time. */
static void rubbish_in_a_bell(void) {
    open_region();
    shmr_word *bell = &shmr_doorbell_at(h, 0)->bell;
    const uint64_t words[] = {0, 1, 2, 3, 4, 0x84, UINT64_MAX, UINT64_C(1) << 32, 0x8700000002, 0x7fffffff, 0x80000000};
    for (uint32_t i = 0; i < sizeof words / sizeof *words; i++) {
        shmr_store_relaxed(bell, words[i]);
        shmr_bell_ring(bell);
        int soon = words[i] & 4 ? EAGAIN : 0; /* something is announced */
        CHECK_EQ(shmr_bell_wait(bell, shmr_now() + 1000000), soon);
        shmr_store_relaxed(bell, words[i]);
        int error = shmr_bell_wait(bell, shmr_now() + 1000000);
        CHECK(words[i] & 1 ? error == soon : error == 0 || error == ETIMEDOUT);
        CHECK_EQ(shmr_load_relaxed(bell), 0);
    }
    CHECK_EQ(shmr_bell_wait(bell, shmr_now() + 1000000), ETIMEDOUT);
    pthread_t ringing, writing;
    pthread_create(&ringing, NULL, ring_often, bell);
    pthread_create(&writing, NULL, write_rubbish, bell);
    for (int k = 0; k < 200; k++) shmr_bell_wait(bell, shmr_now() + 100000);
    pthread_join(ringing, NULL);
    pthread_join(writing, NULL);
    close_region();
}

/* ---- poison -------------------------------------------------------------------------------------------------------------- */

static void *wait_for_an_item(void *argument) {
    uint64_t tag;
    *(int *)argument = receive_message(h, 1, &tag, FOR_EVER);
    return NULL;
}

/* One who finds rubbish tells all the others: who sleeps on another ring, who comes, who waits for memory. */
static void poison_is_for_all(void) {
    open_region();
    shmr *other = attach_region(fd), *late = NULL;
    uint64_t tag = 0;
    int slept = -1;
    pthread_t sleeper;
    pthread_create(&sleeper, NULL, wait_for_an_item, &slept);
    while (!shmr_any_waiter(shmr_ring_at(h, 1)->item_waiters)) usleep(1000);
    shmr_store_relaxed(&shmr_ring_at(h, 0)->commit_cursor, 1000);
    shmr_store_relaxed(&shmr_ring_at(h, 0)->lease_cursor, 1000);
    CHECK_EQ(shmr_has_room(other, 0), 1); /* does not look at slots */
    CHECK_STATUS(send_message(other, 0, 8, 1, NOT_AT_ALL), SHMR_CORRUPT);
    pthread_join(sleeper, NULL);
    CHECK_EQ(slept, SHMR_CORRUPT);
    CHECK_STATUS(send_message(h, 1, 8, 1, FOR_EVER), SHMR_CORRUPT);
    CHECK_STATUS(receive_message(h, 1, &tag, FOR_EVER), SHMR_CORRUPT);
    CHECK_STATUS(shmr_wait_item(h, 1, FOR_EVER), SHMR_CORRUPT);
    shmr_block all = claim(6 * MIB), more;
    CHECK_STATUS(shmr_claim(other, 4 * MIB, NULL, 0, -1, FOR_EVER, &more), SHMR_CORRUPT);
    CHECK_STATUS(shmr_attach(fd, &late), SHMR_CORRUPT);
    OK(shmr_close_ring(h, 1)); /* closing does not hide it */
    CHECK_STATUS(receive_message(h, 1, &tag, FOR_EVER), SHMR_CORRUPT);
    OK(shmr_abort(h, &all));
    OK(shmr_close(other, 0));
    shmr_free(other);
    close_region();
}

/* A ring that looks full for ever because its slots are rubbish. */
static void rubbish_while_looking_for_room(void) {
    open_region();
    struct shmr_ring *q = shmr_ring_at(h, 0);
    shmr_store_relaxed(&q->commit_cursor, 1008);
    shmr_store_relaxed(&q->lease_cursor, 1000);
    CHECK_EQ(shmr_has_room(h, 0), 0);
    CHECK_STATUS(send_message(h, 0, 8, 1, FOR_EVER), SHMR_CORRUPT);
    close_region();
}

/* ---- a file that is cut -------------------------------------------------------------------------------------------------- */

static void cut_arena(void) { CHECK(ftruncate(fd, (off_t)(h->g.total - SHMR_EXTENT)) == 0); }

static void *cut_soon(void *unused) {
    usleep(100000);
    cut_arena();
    return unused;
}

static void a_file_that_is_cut(void) {
    open_region();
    uint64_t tag = 0;
    pthread_t cutting;
    shmr_block more;
    OK(send_message(h, 0, 8, 1, NOT_AT_ALL));
    cut_arena();
    more = claim(6 * MIB);
    memset(bytes_of(h, &more), 1, more.room);
    CHECK_STATUS(shmr_commit(h, 0, 0, -1, FOR_EVER, &more), SHMR_CORRUPT);
    CHECK_STATUS(receive_message(h, 0, &tag, NOT_AT_ALL), SHMR_CORRUPT);
    close_region();

    open_region();
    pthread_create(&cutting, NULL, cut_soon, NULL);
    CHECK_STATUS(receive_message(h, 0, &tag, FOR_EVER), SHMR_CORRUPT);
    pthread_join(cutting, NULL);
    CHECK(strstr(shmr_last_detail(), "beyond repair") != NULL);
    close_region();
}

/* It is cut, and touched before anybody has looked: no SIGBUS. */
static void what_was_cut_is_touched(void) {
    for (int whole = 0; whole < 2; whole++) {
        open_region();
        shmr_block b = claim(MIB);
        CHECK(ftruncate(fd, whole ? 0 : (off_t)h->g.arena_at) == 0);
        memset(bytes_of(h, &b), 1, MIB);
        CHECK_STATUS(shmr_commit(h, 0, 0, -1, NOT_AT_ALL, &b), SHMR_CORRUPT);
        CHECK(strstr(shmr_last_detail(), "was cut") != NULL);
        CHECK_STATUS(receive_message(h, 0, NULL, FOR_EVER), SHMR_CORRUPT);
        close_region();
    }
}

/* Only what lies in a region is mended. */
static void other_bus_errors(void) {
    open_region();
    pid_t child = fork();
    if (child == 0) {
        int other = memfd_create("other", MFD_CLOEXEC);
        char *p = mmap(NULL, SHMR_PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, other, 0);
        p[0] = 1;
        _exit(0);
    }
    int status;
    waitpid(child, &status, 0);
    CHECK(WIFSIGNALED(status) ? WTERMSIG(status) == SIGBUS : WEXITSTATUS(status) != 0); /* a sanitizer exits */
    child = fork();
    if (child == 0) {
        raise(SIGBUS);
        _exit(0);
    }
    waitpid(child, &status, 0);
    CHECK(WIFSIGNALED(status) ? WTERMSIG(status) == SIGBUS : WEXITSTATUS(status) != 0);
    close_region();
}

static int seen_plain, seen_with_info;
static void plain_handler(int number) { seen_plain += number == SIGBUS; }
static void handler_with_info(int number, siginfo_t *info, void *context) {
    seen_with_info += number == SIGBUS && info->si_pid == getpid() && context;
}

/* A handler that was there before gets what is not ours, one that came later gives way to ours again. */
static void other_handlers_go_on(void) {
    struct sigaction kept, plain = {.sa_handler = plain_handler},
                           with_info = {.sa_sigaction = handler_with_info, .sa_flags = SA_SIGINFO};
    sigaction(SIGBUS, NULL, &kept);
    sigaction(SIGBUS, &plain, NULL);
    open_region();
    raise(SIGBUS);
    CHECK_EQ(seen_plain, 1);
    close_region();
    sigaction(SIGBUS, &with_info, NULL);
    int another;
    shmr_config config = small_config();
    shmr *other = create_region(&config, &another); /* the one in front in the list */
    open_region();
    raise(SIGBUS);
    CHECK_EQ(seen_with_info, 1);
    CHECK_EQ(seen_plain, 1);
    shmr_block b = claim(8);
    CHECK(ftruncate(fd, 0) == 0);
    memset(bytes_of(h, &b), 1, 8);
    CHECK_STATUS(shmr_commit(h, 0, 0, -1, NOT_AT_ALL, &b), SHMR_CORRUPT);
    OK(send_message(other, 0, 8, 1, NOT_AT_ALL));
    close_region();
    leave_region(other);
    close(another);
    sigaction(SIGBUS, &kept, NULL);
}

/* Code that closes every descriptor it does not know: what comes under our number is left as it is. */
static void a_descriptor_that_is_anothers(void) {
    uint64_t tag = 0;
    for (int waits = 0; waits < 2; waits++) {
        open_region();
        OK(send_message(h, 0, 8, 1, NOT_AT_ALL));
        OK(receive_message(h, 0, &tag, NOT_AT_ALL));
        int other = memfd_create("other", MFD_CLOEXEC), number = h->file.fd;
        CHECK(dup2(other, number) == number);
        if (waits) {
            CHECK_STATUS(receive_message(h, 0, &tag, shmr_now() + 500000000), SHMR_TIMEOUT);
        } else {
            shmr_block more;
            CHECK_STATUS(shmr_claim(h, 6 * MIB, NULL, 0, -1, NOT_AT_ALL, &more), SHMR_SYSTEM);
            CHECK(strstr(shmr_last_detail(), "descriptor was closed") != NULL);
            OK(send_message(h, 0, 8, 2, NOT_AT_ALL)); /* what is there already does without it */
            OK(receive_message(h, 0, &tag, NOT_AT_ALL));
        }
        struct stat s;
        CHECK(fstat(other, &s) == 0 && s.st_size == 0 && s.st_blocks == 0);
        close_region();
        CHECK(fcntl(number, F_GETFD) >= 0);
        close(number);
        close(other);
    }
}

int main(void) {
    RUN(extents_given_away);
    RUN(extents_said_to_be_of_the_dead);
    RUN(groups_given_away);
    RUN(a_held_block_is_said_to_be_free);
    RUN(a_chain_of_references);
    RUN(a_damaged_descriptor_is_not_handed_on);
    RUN(rubbish_in_a_bell);
    RUN(poison_is_for_all);
    RUN(rubbish_while_looking_for_room);
    RUN(a_file_that_is_cut);
    RUN(what_was_cut_is_touched);
    RUN(other_bus_errors);
    RUN(other_handlers_go_on);
    RUN(a_descriptor_that_is_anothers);
    return summary("unit_hostile");
}
