/* SPDX-License-Identifier: BSD-3-Clause */
/* Scatter and gather: what is sent, how much of it, what becomes of answers, rubbish among them; the whole exchange,
 * also by threads. Arrays end at a page that nobody may touch: sanitizers do not see into every way to copy. */
#include <sched.h>

#include "harness.h"

#define TASKS 0
#define RESULTS 1
#define TASK_KIND 21
#define RESULT_KIND 22
#define OTHER_KIND 23
#define FIRST_TAG UINT64_C(1000)
#define MANY 2000
#define UNTOUCHED ((char)0xee)

static int fd;
static shmr *h, *worker;
static shmr_scatter s;
static unsigned char states[MANY];
static uint64_t before_target; /* bytes of its first page */

/* ---- memory, sources, tasks ------------------------------------------------------------------------------------------ */

static struct {
    char *base;
    size_t bytes;
} maps[SHMR_SCATTER_SOURCES + 1];
static int map_count;

static uint64_t whole_pages(uint64_t bytes) {
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
    return (bytes + page - 1) / page * page;
}

/* So many bytes, then a page that nobody may touch; one before the first page, too. */
static char *guarded(uint64_t bytes) {
    uint64_t inner = whole_pages(bytes), guard = whole_pages(1);
    char *base = mmap(NULL, inner + 2 * guard, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED || mprotect(base + guard, inner, PROT_READ | PROT_WRITE) != 0) exit(2);
    memset(base + guard, UNTOUCHED, inner);
    maps[map_count].base = base;
    maps[map_count++].bytes = inner + 2 * guard;
    return base + guard + inner - bytes;
}

static void open_scatter(uint64_t count, uint64_t capacity) {
    shmr_config config = small_config();
    config.capacity[TASKS] = config.capacity[RESULTS] = capacity;
    h = create_region(&config, &fd);
    worker = attach_region(fd);
    memset(states, SHMR_SCATTER_UNSENT, sizeof states);
    s = (shmr_scatter){.task_ring = TASKS, .result_ring = RESULTS, .task_kind = TASK_KIND, .result_kind = RESULT_KIND,
                       .payload_check = 1, .states = states, .count = count, .first_tag = FIRST_TAG, .stop = count,
                       .limit = INT64_MAX, .spec_bytes = 20};
    for (uint32_t i = 0; i < sizeof s.spec; i++) s.spec[i] = (unsigned char)(200 - i);
}

static void close_whole(void) {
    leave_region(worker);
    check_whole(h);
    leave_region(h);
    close(fd);
    while (map_count) {
        map_count--;
        munmap(maps[map_count].base, maps[map_count].bytes);
    }
}

static char source_byte(uint32_t source, int64_t position) {
    return (char)(position * 7 + position / 251 + source * 91);
}
static char result_byte(uint64_t index, uint64_t position) {
    return (char)(index * 13 + position * 3 + position / 256);
}

static void add_source(uint64_t bytes, uint64_t pitch, uint64_t before, uint64_t after) {
    char *array = guarded(bytes);
    for (uint64_t k = 0; k < bytes; k++) array[k] = source_byte(s.sources, (int64_t)k);
    s.source[s.sources++] = (shmr_scatter_source){array, pitch, bytes, before, after};
}

static void add_target(uint64_t bytes, uint64_t pitch) {
    s.target = guarded(bytes);
    s.target_bytes = bytes;
    s.target_pitch = pitch;
    before_target = whole_pages(bytes) - bytes;
}

/* How much of the target, or of what lies before it, has been written. */
static uint64_t touched(void) {
    uint64_t count = 0;
    for (const char *at = s.target - before_target; at < s.target + s.target_bytes; at++) count += *at != UNTOUCHED;
    return count;
}

static uint64_t result_bytes(uint64_t index) {
    uint64_t left = s.target_bytes - index * s.target_pitch;
    return left < s.target_pitch ? left : s.target_pitch;
}

/* Every byte of block `index`, each by itself; returns how many there are, padding not counted. */
static uint64_t check_parts(const shmr *p, const shmr_block *b, uint64_t index) {
    uint64_t at = 0, wrong = 0, bytes = 0;
    for (uint32_t i = 0; i < s.sources; i++) {
        const shmr_scatter_source *source = &s.source[i];
        int64_t low = (int64_t)(index * source->pitch) - (int64_t)source->before;
        int64_t high = (int64_t)((index + 1) * source->pitch + source->after);
        while (at % 64) at++;
        for (int64_t k = low; k < high; k++) {
            if (k < 0 || k >= (int64_t)source->bytes) continue;
            wrong += at >= b->length || bytes_of(p, b)[at] != source_byte(i, k);
            at++;
            bytes++;
        }
    }
    CHECK_EQ(b->length, at);
    CHECK_EQ(wrong, 0);
    return bytes;
}

/* The next task is that of block `index`, and right in every respect. */
static uint64_t check_task(uint64_t index) {
    shmr_block b = {0};
    OK(shmr_lease(worker, TASKS, 1, NOT_AT_ALL, &b));
    if (!b.state) return 0;
    CHECK_EQ(b.kind, TASK_KIND);
    CHECK_EQ(b.tag, s.first_tag + index);
    CHECK_EQ(b.references, 0);
    CHECK_EQ(b.offset % 64, 0);
    CHECK_EQ(b.producer, shmr_self(h));
    CHECK_EQ(b.spec_bytes, s.spec_bytes);
    CHECK(memcmp(b.spec, s.spec, s.spec_bytes) == 0);
    uint64_t bytes = check_parts(worker, &b, index);
    OK(shmr_release(worker, &b));
    return bytes;
}

static void check_no_task(void) { CHECK_STATUS(receive_message(worker, TASKS, NULL, NOT_AT_ALL), SHMR_WOULD_BLOCK); }

/* ---- answers ---------------------------------------------------------------------------------------------------------- */

/* As if it had been sent. */
static void put_out(uint64_t index) {
    shmr_mark_set(&states[index], SHMR_SCATTER_OUT);
    shmr_tally_add(&s.out, 1);
}

static void answer_as(shmr *p, uint32_t kind, uint32_t spec_bytes, uint64_t tag, uint64_t bytes, uint64_t offset,
                      uint64_t in_place, const shmr_ref *ref) {
    uint64_t words[3] = {bytes, offset, in_place}, arena = h->g.config.arena_bytes;
    if (bytes && bytes <= arena && offset >= h->g.arena_at && offset - h->g.arena_at <= arena - bytes)
        words[2] = shmr_crc32c(0, h->base + offset, bytes);
    shmr_block b = {0};
    OK(shmr_claim(p, 0, ref, ref != NULL, -1, FOR_EVER, &b));
    b.kind = kind;
    b.tag = tag;
    b.spec_bytes = spec_bytes;
    memcpy(b.spec, words, sizeof words);
    OK(shmr_commit(p, RESULTS, 1, -1, FOR_EVER, &b));
}

static void answer(uint64_t tag, uint64_t bytes, uint64_t offset, uint64_t in_place) {
    answer_as(worker, RESULT_KIND, 24, tag, bytes, offset, in_place, NULL);
}

static shmr_ref publish_result(shmr *p, uint64_t index, uint64_t bytes) {
    shmr_block b = {0};
    shmr_ref ref = {0};
    OK(shmr_claim(p, bytes, NULL, 0, -1, FOR_EVER, &b));
    b.length = bytes;
    for (uint64_t k = 0; k < bytes; k++) bytes_of(p, &b)[k] = result_byte(index, k);
    OK(shmr_publish(p, &b, &ref));
    return ref;
}

/* The result of block `index`: from now on only the answer keeps it. */
static void answer_by_reference(shmr *p, uint64_t index, int times) {
    uint64_t bytes = result_bytes(index);
    shmr_ref ref = publish_result(p, index, bytes);
    while (times--) answer_as(p, RESULT_KIND, 24, s.first_tag + index, bytes, ref.offset, 0, &ref);
    OK(shmr_drop(p, ref.block, ref.generation));
}

static uint64_t wrong_bytes(uint64_t index) {
    uint64_t wrong = 0;
    for (uint64_t k = 0; k < result_bytes(index); k++)
        wrong += s.target[index * s.target_pitch + k] != result_byte(index, k);
    return wrong;
}

static int accept_next(shmr_block *message) {
    OK(shmr_lease(h, RESULTS, 1, NOT_AT_ALL, message));
    return message->state ? shmr_scatter_accept(h, &s, message) : SHMR_STALE;
}

/* The next answer is accepted, and its message gone. */
static void check_accepted(void) {
    shmr_block m = {0};
    OK(accept_next(&m));
    CHECK_EQ(m.state, 0);
    CHECK_EQ(kind_of(h, m.block), SHMR_FREE);
}

/* ---- sending ---------------------------------------------------------------------------------------------------------- */

static void one_source(void) {
    const uint64_t sizes[] = {1000, 1200, 901, 300, 1};
    for (uint32_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        uint64_t count = (sizes[i] + 299) / 300, bytes = 0;
        open_scatter(count, 64);
        add_source(sizes[i], 300, 0, 0);
        OK(shmr_scatter_send(h, &s, NOT_AT_ALL));
        CHECK_EQ(s.next, count);
        CHECK_EQ(s.out, count);
        CHECK_EQ(s.bytes_sent, sizes[i]);
        for (uint64_t k = 0; k < count; k++) {
            CHECK_EQ(states[k], SHMR_SCATTER_OUT);
            bytes += check_task(k);
        }
        CHECK_EQ(bytes, sizes[i]);
        check_no_task();
        OK(shmr_scatter_send(h, &s, NOT_AT_ALL)); /* no more */
        check_no_task();
        close_whole();
    }
}

/* Each part begins at a multiple of 64, also behind one that is shorter in the last block. */
static void several_sources(void) {
    open_scatter(5, 64);
    add_source(64 * 5, 64, 0, 0);
    add_source(8 * 5 - 3, 8, 0, 0);
    add_source(100000 * 4 + 1, 100000, 0, 0);
    add_source(65 * 5 - 10, 65, 0, 0);
    OK(shmr_scatter_send(h, &s, NOT_AT_ALL));
    uint64_t bytes = 0;
    for (uint64_t k = 0; k < 5; k++) bytes += check_task(k);
    CHECK_EQ(bytes, s.bytes_sent);
    CHECK_EQ(bytes, 64 * 5 + 8 * 5 - 3 + 100000 * 4 + 1 + 65 * 5 - 10);
    close_whole();
}

static void as_many_sources_as_there_can_be(void) {
    open_scatter(7, 64);
    for (uint32_t i = 0; i < SHMR_SCATTER_SOURCES; i++) add_source(7 * (i + 1), i + 1, i % 3, i % 5);
    OK(shmr_scatter_send(h, &s, NOT_AT_ALL));
    for (uint64_t k = 0; k < 7; k++) check_task(k);
    close_whole();
}

/* All arrays may be in shared memory already. */
static void no_source(void) {
    open_scatter(3, 64);
    OK(shmr_scatter_send(h, &s, NOT_AT_ALL));
    for (uint64_t k = 0; k < 3; k++) CHECK_EQ(check_task(k), 0);
    CHECK_EQ(s.bytes_sent, 0);
    close_whole();
}

static void ghost_cells(void) {
    const uint64_t depths[] = {0, 1, 50, 99, 100, 101, 250, 449, 450, 451, 5000};
    const uint32_t n = sizeof depths / sizeof *depths;
    for (uint32_t b = 0; b < n; b++)
        for (uint32_t a = 0; a < n; a++) {
            open_scatter(5, 64);
            add_source(450, 100, depths[b], depths[a]);
            add_source(45, 10, depths[a], depths[b]);
            OK(shmr_scatter_send(h, &s, NOT_AT_ALL));
            uint64_t bytes = 0;
            for (uint64_t k = 0; k < 5; k++) bytes += check_task(k);
            CHECK_EQ(bytes, s.bytes_sent);
            close_whole();
        }
    open_scatter(1, 64);
    add_source(77, 100, 9, 9); /* one block: no neighbours */
    OK(shmr_scatter_send(h, &s, NOT_AT_ALL));
    CHECK_EQ(check_task(0), 77);
    close_whole();
}

static void limit_and_stop(void) {
    open_scatter(20, 64);
    add_source(2000, 100, 0, 0);
    s.limit = 0;
    OK(shmr_scatter_send(h, &s, NOT_AT_ALL));
    CHECK_EQ(s.next, 0);
    s.limit = 3;
    for (int turn = 0; turn < 2; turn++) {
        OK(shmr_scatter_send(h, &s, NOT_AT_ALL));
        CHECK_EQ(s.next, 3);
        CHECK_EQ(s.out, 3);
    }
    CHECK_EQ(states[3], SHMR_SCATTER_UNSENT);
    CHECK_EQ(shmr_approx_fill(h, TASKS), 3);
    CHECK(shmr_scatter_settle(&s, FIRST_TAG + 1));
    OK(shmr_scatter_send(h, &s, NOT_AT_ALL));
    CHECK_EQ(s.next, 4);
    s.limit = 1; /* below what is out */
    OK(shmr_scatter_send(h, &s, NOT_AT_ALL));
    CHECK_EQ(s.next, 4);
    s.limit = 100;
    s.stop = 4;
    OK(shmr_scatter_send(h, &s, NOT_AT_ALL));
    CHECK_EQ(s.next, 4);
    s.stop = 2; /* behind it already */
    OK(shmr_scatter_send(h, &s, NOT_AT_ALL));
    CHECK_EQ(s.next, 4);
    s.stop = 10;
    OK(shmr_scatter_send(h, &s, NOT_AT_ALL));
    CHECK_EQ(s.next, 10);
    CHECK_EQ(s.out, 9);
    for (uint64_t k = 0; k < 10; k++) check_task(k);
    check_no_task();
    close_whole();
}

/* What the caller may change in between; tags that go around; messages without a checksum. */
static void each_message_as_it_was_ordered(void) {
    open_scatter(6, 64);
    add_source(600, 100, 0, 0);
    s.first_tag = UINT64_MAX - 2;
    const uint32_t specs[] = {0, 1, 128, 5, 64, 127};
    for (uint64_t k = 0; k < 6; k++) {
        s.stop = k + 1;
        s.spec_bytes = specs[k];
        memset(s.spec, (int)k + 1, sizeof s.spec);
        s.payload_check = k % 2;
        OK(shmr_scatter_send(h, &s, NOT_AT_ALL));
        shmr_block b = {0};
        OK(shmr_lease(worker, TASKS, 0, NOT_AT_ALL, &b));
        CHECK_EQ((uint32_t)shmr_load_relaxed(&shmr_record_at(h, b.block)->check) != 0, k % 2);
        OK(shmr_release(worker, &b));
    }
    s.next = s.stop = 0;
    memset(states, SHMR_SCATTER_UNSENT, 6);
    s.out = 0;
    for (uint64_t k = 0; k < 6; k++) {
        s.stop = k + 1;
        s.spec_bytes = specs[k];
        memset(s.spec, (int)k + 1, sizeof s.spec);
        OK(shmr_scatter_send(h, &s, NOT_AT_ALL));
        check_task(k);
        answer(s.first_tag + k, 0, 0, 0);
        check_accepted();
        CHECK_EQ(states[k], SHMR_SCATTER_BACK);
    }
    CHECK_EQ(s.arrived, 6);
    CHECK_EQ(s.out, 0);
    close_whole();
}

/* ---- not sent now, but later ------------------------------------------------------------------------------------------- */

static void check_unsent(uint64_t index, int64_t out) {
    CHECK_EQ(s.next, index);
    CHECK_EQ(states[index], SHMR_SCATTER_UNSENT);
    CHECK_EQ(s.out, out);
    CHECK_EQ(counters_of(h).pins, 0);
}

static void *deny_who_starves(void *unused) {
    while (!shmr_load_relaxed(&shmr_participant_at(h, shmr_self(h))->starving)) sched_yield();
    shmr_deny(worker, shmr_self(h));
    return unused;
}

static void without_memory(void) {
    open_scatter(3, 64);
    add_source(8 * MIB, 3 * MIB, 100, 0);
    shmr_block full = {0};
    OK(shmr_claim(worker, 30 * MIB, NULL, 0, -1, NOT_AT_ALL, &full));
    CHECK_STATUS(shmr_scatter_send(h, &s, NOT_AT_ALL), SHMR_WOULD_BLOCK);
    check_unsent(0, 0);
    CHECK_STATUS(shmr_scatter_send(h, &s, SHMR_BRIEFLY), SHMR_WOULD_BLOCK);
    CHECK_STATUS(shmr_scatter_send(h, &s, shmr_now() + 5000000), SHMR_TIMEOUT);
    check_unsent(0, 0);
    pthread_t observer;
    CHECK_EQ(pthread_create(&observer, NULL, deny_who_starves, NULL), 0);
    CHECK_STATUS(shmr_scatter_send(h, &s, FOR_EVER), SHMR_DENIED);
    pthread_join(observer, NULL);
    check_unsent(0, 0);
    OK(shmr_abort(worker, &full));
    shmr_trim(worker); /* it does not wait anywhere, to be asked */
    OK(shmr_claim(worker, 24 * MIB, NULL, 0, -1, NOT_AT_ALL, &full)); /* room for one, and a little */
    answer(FIRST_TAG, 0, 0, 0);
    CHECK_STATUS(shmr_scatter_send(h, &s, FOR_EVER), SHMR_ITEM_WAITS);
    check_unsent(1, 1);
    CHECK_EQ(states[0], SHMR_SCATTER_OUT);
    check_accepted();
    check_task(0);
    OK(shmr_abort(worker, &full));
    shmr_trim(worker);
    OK(shmr_scatter_send(h, &s, NOT_AT_ALL));
    check_task(1);
    check_task(2);
    CHECK_EQ(s.bytes_sent, 8 * MIB + 200);
    close_whole();
}

static void into_a_full_ring(void) {
    open_scatter(10, 4);
    add_source(1000, 100, 10, 10);
    CHECK_STATUS(shmr_scatter_send(h, &s, NOT_AT_ALL), SHMR_WOULD_BLOCK);
    check_unsent(4, 4);
    CHECK_STATUS(shmr_scatter_send(h, &s, shmr_now() + 5000000), SHMR_TIMEOUT);
    check_unsent(4, 4);
    uint64_t sent = s.bytes_sent;
    CHECK_EQ(sent, 110 + 3 * 120);
    answer(FIRST_TAG, 0, 0, 0);
    CHECK_STATUS(shmr_scatter_send(h, &s, FOR_EVER), SHMR_ITEM_WAITS);
    check_unsent(4, 4);
    CHECK_EQ(s.bytes_sent, sent); /* only what was */
    check_accepted();
    for (uint64_t k = 0; k < 10; k++) {
        check_task(k);
        int status = shmr_scatter_send(h, &s, NOT_AT_ALL);
        CHECK_EQ(status, k < 5 ? SHMR_WOULD_BLOCK : SHMR_OK);
    }
    check_no_task();
    CHECK_EQ(s.bytes_sent, 1000 + 18 * 10);
    close_whole();
}

static void what_can_never_be_sent(void) {
    open_scatter(2, 8);
    add_source(100, 50, 0, 0);
    shmr_scatter_source small = s.source[0];
    s.source[0].bytes = 80 * MIB; /* is refused before it is read */
    s.source[0].pitch = 40 * MIB;
    CHECK_STATUS(shmr_scatter_send(h, &s, FOR_EVER), SHMR_TOO_LARGE);
    check_unsent(0, 0);
    s.source[0] = small;
    s.spec_bytes = 129;
    CHECK_STATUS(shmr_scatter_send(h, &s, FOR_EVER), SHMR_BAD_ARGUMENT);
    check_unsent(0, 0);
    s.spec_bytes = 8;
    s.task_ring = 2;
    CHECK_STATUS(shmr_scatter_send(h, &s, FOR_EVER), SHMR_BAD_ARGUMENT);
    check_unsent(0, 0);
    s.task_ring = TASKS;
    OK(shmr_scatter_send(h, &s, NOT_AT_ALL));
    check_task(0);
    check_task(1);
    close_whole();
}

static void closed_rings(void) {
    open_scatter(4, 8);
    add_source(400, 100, 0, 0);
    s.stop = 1;
    OK(shmr_scatter_send(h, &s, NOT_AT_ALL));
    s.stop = 4;
    OK(shmr_close_ring(h, TASKS));
    CHECK_STATUS(shmr_scatter_send(h, &s, FOR_EVER), SHMR_CLOSED);
    check_unsent(1, 1);
    shmr_block m = {0};
    CHECK_STATUS(shmr_scatter_run(h, &s, 4, FOR_EVER, &m), SHMR_CLOSED);
    check_unsent(1, 1);
    check_task(0);
    close_whole();

    open_scatter(4, 8);
    add_source(400, 100, 0, 0);
    s.limit = 1;
    answer(FIRST_TAG, 0, 0, 0);
    OK(shmr_close_ring(h, RESULTS));
    CHECK_STATUS(shmr_scatter_run(h, &s, 4, FOR_EVER, &m), SHMR_CLOSED); /* not before what was in it */
    CHECK_EQ(s.arrived, 1);
    check_task(0);
    check_task(1);
    close_whole();

    open_scatter(4, 8);
    add_source(400, 100, 0, 0);
    OK(shmr_close(h, 0));
    CHECK_STATUS(shmr_scatter_send(h, &s, FOR_EVER), SHMR_CLOSED);
    CHECK_STATUS(shmr_scatter_run(h, &s, 4, FOR_EVER, &m), SHMR_CLOSED);
    CHECK_EQ(s.out, 0);
    CHECK_EQ(s.next, 0);
    shmr_free(h);
    h = attach_region(fd);
    close_whole();
}

static void *send_until_deadline(void *argument) {
    CHECK_STATUS(shmr_scatter_send(h, &s, *(int64_t *)argument), SHMR_TIMEOUT);
    return NULL;
}

/* While its sender waits for a slot, that nobody makes free. */
static void given_up_while_being_sent(void) {
    open_scatter(3, 1);
    add_source(300, 100, 0, 0);
    s.stop = 1;
    OK(shmr_scatter_send(h, &s, NOT_AT_ALL));
    s.stop = 3;
    pthread_t sender;
    int64_t deadline = shmr_now() + 100000000;
    if (pthread_create(&sender, NULL, send_until_deadline, &deadline) != 0) exit(2);
    while (!shmr_scatter_settle(&s, FIRST_TAG + 1)) usleep(100);
    pthread_join(sender, NULL);
    CHECK_EQ(s.out, 1);
    CHECK_EQ(states[1], SHMR_SCATTER_BACK);
    check_task(0);
    OK(shmr_scatter_send(h, &s, NOT_AT_ALL));
    CHECK_EQ(s.out, 2);
    check_task(2);
    check_no_task();
    close_whole();
}

/* ---- answers ---------------------------------------------------------------------------------------------------------- */

static void results_by_reference(void) {
    const uint64_t pitches[] = {1, 100, 4096, 262144 + 24, MIB + 8}; /* the larger ones are copied in another way */
    for (uint32_t i = 0; i < sizeof pitches / sizeof *pitches; i++) {
        const uint64_t pitch = pitches[i], order[] = {2, 0, 3, 1};
        open_scatter(4, 8);
        add_target(pitch * 3 + (pitch + 1) / 2, pitch);
        OK(shmr_scatter_send(h, &s, NOT_AT_ALL));
        uint64_t bytes = 0;
        for (uint64_t k = 0; k < 4; k++) {
            check_task(k);
            uint64_t index = order[k], before = touched();
            answer_by_reference(worker, index, 1);
            CHECK_EQ(touched(), before);
            check_accepted();
            bytes += result_bytes(index);
            CHECK_EQ(wrong_bytes(index), 0);
            CHECK(touched() <= bytes);
            CHECK_EQ(states[index], SHMR_SCATTER_BACK);
            CHECK_EQ(s.arrived, k + 1);
            CHECK_EQ(s.out, 3 - k);
            CHECK_EQ(s.bytes_copied, bytes);
            shmr_trim(worker);
            CHECK_EQ(counters_of(worker).used, 0); /* the message kept it, and nobody does any more */
        }
        CHECK_EQ(bytes, s.target_bytes);
        close_whole();
    }
}

static void results_in_their_place(void) {
    open_scatter(3, 8);
    for (uint64_t k = 0; k < 3; k++) { /* without a target, too */
        put_out(k);
        answer(FIRST_TAG + k, 0, UINT64_MAX, 1000 + k);
        check_accepted();
        CHECK_EQ(s.arrived, k + 1);
        CHECK_EQ(s.out, 0);
    }
    CHECK_EQ(s.bytes_copied, 3003);
    close_whole();
}

static void answered_twice(void) {
    open_scatter(3, 8);
    add_target(250, 100);
    OK(shmr_scatter_send(h, &s, NOT_AT_ALL));
    for (uint64_t k = 0; k < 3; k++) check_task(k);
    answer_by_reference(worker, 2, 2);
    check_accepted();
    memset(s.target, UNTOUCHED, 250);
    check_accepted();
    answer(FIRST_TAG + 2, UINT64_MAX, 0, 7); /* nobody looks any more */
    check_accepted();
    answer(FIRST_TAG + 1, 0, 0, 0);
    check_accepted();
    answer(FIRST_TAG + 1, 0, 0, 7);
    check_accepted();
    CHECK_EQ(touched(), 0);
    CHECK_EQ(s.arrived, 2);
    CHECK_EQ(s.out, 1);
    CHECK_EQ(s.bytes_copied, 50);
    CHECK_EQ(states[0], SHMR_SCATTER_OUT);
    close_whole();
}

static void answers_to_nothing_that_is_out(void) {
    open_scatter(3, 8);
    add_target(250, 100);
    put_out(0);
    states[3] = SHMR_SCATTER_OUT; /* behind the last one: not ours */
    const uint64_t tags[] = {FIRST_TAG - 1, FIRST_TAG + 3, 0, UINT64_MAX, FIRST_TAG + 1 /* not sent yet */};
    for (uint32_t i = 0; i < sizeof tags / sizeof *tags; i++) {
        shmr_ref ref = publish_result(worker, 0, 100);
        answer_as(worker, RESULT_KIND, 24, tags[i], 100, ref.offset, 7, &ref);
        OK(shmr_drop(worker, ref.block, ref.generation));
        check_accepted();
    }
    CHECK_EQ(touched(), 0);
    CHECK_EQ(s.arrived, 0);
    CHECK_EQ(s.bytes_copied, 0);
    CHECK_EQ(s.out, 1);
    CHECK_EQ(states[0], SHMR_SCATTER_OUT);
    CHECK_EQ(states[1], SHMR_SCATTER_UNSENT);
    close_whole();
}

static void messages_of_another_kind(void) {
    open_scatter(1, 8);
    add_target(100, 100);
    put_out(0);
    const uint32_t kinds[] = {OTHER_KIND, TASK_KIND, 0, RESULT_KIND, RESULT_KIND, RESULT_KIND, RESULT_KIND};
    const uint32_t lengths[] = {24, 24, 0, 0, 16, 23, 25}; /* of the spec */
    for (uint32_t i = 0; i < sizeof kinds / sizeof *kinds; i++) {
        shmr_ref ref = publish_result(worker, 0, 100);
        answer_as(worker, kinds[i], lengths[i], FIRST_TAG, 100, ref.offset, 7, &ref);
        OK(shmr_drop(worker, ref.block, ref.generation));
        shmr_block m = {0};
        CHECK_STATUS(accept_next(&m), SHMR_WOULD_BLOCK);
        CHECK_EQ(m.kind, kinds[i]);
        CHECK_EQ(state_of(h, m.block), m.state);
        CHECK_EQ(kind_of(h, m.block), SHMR_LEASED);
        OK(shmr_release(h, &m));
    }
    CHECK_EQ(touched(), 0);
    CHECK_EQ(s.arrived, 0);
    CHECK_EQ(s.out, 1);
    CHECK_EQ(states[0], SHMR_SCATTER_OUT); /* the caller's business */
    close_whole();
}

/* The answer names `bytes` at `offset`: nothing is written, nothing counted, and the block is not out any more. */
static void check_rubbish(uint64_t index, uint64_t bytes, uint64_t offset) {
    shmr_block m = {0};
    put_out(index);
    answer(FIRST_TAG + index, bytes, offset, 7);
    CHECK_STATUS(accept_next(&m), SHMR_CORRUPT);
    CHECK_EQ(m.state, 0);
    CHECK_EQ(s.out, 0);
    CHECK_EQ(s.arrived, 0);
    CHECK_EQ(s.bytes_copied, 0);
    CHECK_EQ(states[index], SHMR_SCATTER_BACK);
    CHECK_EQ(counters_of(h).pins, 0);
}

/* It is still out: the caller knows from the message whose result is lost. */
static void a_result_that_was_changed(void) {
    open_scatter(4, 8);
    add_source(400, 100, 0, 0);
    add_target(400, 100);
    put_out(1);
    shmr_ref ref = publish_result(worker, 1, 100);
    answer_as(worker, RESULT_KIND, 24, FIRST_TAG + 1, 100, ref.offset, 0, &ref);
    h->base[ref.offset + 50] ^= 1;
    shmr_block m = {0};
    CHECK_STATUS(accept_next(&m), SHMR_CORRUPT);
    CHECK_EQ(m.tag, FIRST_TAG + 1);
    CHECK_EQ(m.state, 0);
    CHECK_EQ(s.out, 1);
    CHECK(shmr_scatter_settle(&s, m.tag));
    OK(shmr_drop(worker, ref.block, ref.generation));
    close_whole();
}

static void rubbish_in_an_answer(void) {
    open_scatter(3, 8);
    add_target(250, 100);
    shmr_ref ref = publish_result(worker, 0, 1000);
    uint64_t first = h->g.arena_at, arena = h->g.config.arena_bytes, end = first + arena;
    const uint64_t sizes[] = {1, 49, 99, 101, 250, 1000, arena, arena + 1, UINT64_C(1) << 63,
                              UINT64_MAX - 99, UINT64_MAX};
    for (uint32_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        for (uint64_t index = 0; index < 3; index++) check_rubbish(index, sizes[i], ref.offset);
    check_rubbish(0, 50, ref.offset);
    check_rubbish(2, 100, ref.offset); /* of a block, but not of the last one */
    const uint64_t offsets[] = {0, 1, first - 100, first - 1, end - 99, end, end + 1, h->g.total, UINT64_C(1) << 63,
                                UINT64_MAX - 100, UINT64_MAX - 99, UINT64_MAX - 1, UINT64_MAX, first - arena - 100};
    for (uint32_t i = 0; i < sizeof offsets / sizeof *offsets; i++) {
        check_rubbish(0, 100, offsets[i]);
        check_rubbish(1, 100, offsets[i]);
    }
    s.target_bytes = 200; /* the place of block 2 begins at the end, then beyond it */
    check_rubbish(2, 50, ref.offset);
    check_rubbish(2, 100, ref.offset);
    s.target_bytes = 150;
    check_rubbish(2, 100, ref.offset);
    check_rubbish(2, 50, ref.offset);
    check_rubbish(2, UINT64_MAX - 49, ref.offset);
    s.target_bytes = s.target_pitch = 2 * arena; /* more than the region could have */
    check_rubbish(0, 2 * arena, first);
    check_rubbish(0, 2 * arena, ref.offset);
    s.target_pitch = s.target_bytes = 0; /* there is no target at all */
    check_rubbish(0, 1, ref.offset);
    check_rubbish(2, 100, ref.offset);
    s.target_bytes = 250;
    s.target_pitch = 100;
    CHECK_EQ(touched(), 0);

    put_out(0); /* the last bytes of the region are still of it */
    answer(FIRST_TAG, 100, end - 100, 0);
    check_accepted();
    put_out(1);
    answer(FIRST_TAG + 1, 100, first, 0);
    check_accepted();
    CHECK_EQ(s.arrived, 2);
    OK(shmr_drop(worker, ref.block, ref.generation));
    close_whole();
}

static void settling(void) {
    open_scatter(3, 8);
    add_source(300, 100, 0, 0);
    s.stop = 2;
    OK(shmr_scatter_send(h, &s, NOT_AT_ALL));
    CHECK_EQ(shmr_scatter_settle(&s, FIRST_TAG - 1), 0);
    CHECK_EQ(shmr_scatter_settle(&s, FIRST_TAG + 2), 0); /* not sent */
    CHECK_EQ(shmr_scatter_settle(&s, FIRST_TAG + 3), 0);
    CHECK_EQ(shmr_scatter_settle(&s, 0), 0);
    CHECK_EQ(shmr_scatter_settle(&s, UINT64_MAX), 0);
    CHECK_EQ(s.out, 2);
    CHECK_EQ(shmr_scatter_settle(&s, FIRST_TAG), 1);
    CHECK_EQ(shmr_scatter_settle(&s, FIRST_TAG), 0);
    CHECK_EQ(s.out, 1);
    CHECK_EQ(states[0], SHMR_SCATTER_BACK);
    CHECK_EQ(s.arrived, 0);
    answer(FIRST_TAG, 0, 0, 5); /* too late */
    check_accepted();
    CHECK_EQ(s.arrived, 0);
    CHECK_EQ(s.bytes_copied, 0);
    CHECK_EQ(s.out, 1);
    check_task(0);
    check_task(1);
    close_whole();
}

/* ---- the whole exchange ------------------------------------------------------------------------------------------------ */

static void sending_and_accepting_in_turn(void) {
    open_scatter(6, 8);
    add_source(600, 100, 0, 0);
    add_target(300, 50);
    s.limit = 2;
    shmr_block m = {0};
    CHECK_STATUS(shmr_scatter_run(h, &s, 0, FOR_EVER, &m), SHMR_TIMEOUT);
    CHECK_EQ(s.next, 0);
    CHECK_STATUS(shmr_scatter_run(h, &s, 16, NOT_AT_ALL, &m), SHMR_TIMEOUT);
    CHECK_EQ(s.next, 2);
    CHECK_EQ(s.out, 2);
    int64_t end = shmr_now() + 10000000;
    CHECK_STATUS(shmr_scatter_run(h, &s, 16, end, &m), SHMR_TIMEOUT);
    CHECK(shmr_now() >= end);
    CHECK_STATUS(shmr_scatter_run(h, &s, 16, SHMR_BRIEFLY, &m), SHMR_TIMEOUT);
    answer_by_reference(worker, 1, 1);
    answer_by_reference(worker, 0, 1);
    CHECK_STATUS(shmr_scatter_run(h, &s, 1, FOR_EVER, &m), SHMR_TIMEOUT); /* one turn */
    CHECK_EQ(s.arrived, 1);
    CHECK_EQ(s.next, 2); /* sent before anything came back */
    CHECK_EQ(wrong_bytes(1), 0);
    end = shmr_now() + 10000000;
    CHECK_STATUS(shmr_scatter_run(h, &s, 16, end, &m), SHMR_TIMEOUT); /* waits while blocks are out */
    CHECK(shmr_now() >= end);
    CHECK_EQ(s.arrived, 2);
    CHECK_EQ(s.next, 4);
    CHECK_EQ(s.out, 2);
    for (uint64_t k = 2; k < 6; k++) answer_by_reference(worker, k, 1);
    CHECK_STATUS(shmr_scatter_run(h, &s, 3, FOR_EVER, &m), SHMR_TIMEOUT);
    CHECK_EQ(s.arrived, 5);
    CHECK_EQ(s.next, 6);
    CHECK_STATUS(shmr_scatter_run(h, &s, 3, FOR_EVER, &m), SHMR_TIMEOUT); /* but no longer */
    CHECK_EQ(s.arrived, 6);
    CHECK_EQ(s.out, 0);
    CHECK_STATUS(shmr_scatter_run(h, &s, 3, NOT_AT_ALL, &m), SHMR_TIMEOUT); /* all done */
    for (uint64_t k = 0; k < 6; k++) {
        check_task(k);
        CHECK_EQ(wrong_bytes(k), 0);
    }
    close_whole();
}

static void messages_that_are_the_callers_business(void) {
    open_scatter(4, 16);
    add_source(400, 100, 0, 0);
    s.limit = 2;
    const uint32_t kinds[] = {OTHER_KIND, OTHER_KIND, RESULT_KIND, RESULT_KIND};
    const uint64_t tags[] = {FIRST_TAG, FIRST_TAG + 4, FIRST_TAG - 1, FIRST_TAG + 4};
    shmr_block m = {0};
    for (uint32_t i = 0; i < 4; i++) {
        answer_as(worker, kinds[i], 24, tags[i], 0, 0, i, NULL);
        OK(shmr_scatter_run(h, &s, 8, FOR_EVER, &m));
        CHECK_EQ(m.kind, kinds[i]);
        CHECK_EQ(m.tag, tags[i]);
        CHECK_EQ(state_of(h, m.block), m.state);
        CHECK_EQ(kind_of(h, m.block), SHMR_LEASED);
        OK(shmr_release(h, &m));
        CHECK_EQ(s.out, 2);
    }
    /* Between others: those before it are taken in, and what comes after it stays for the next call. */
    answer(FIRST_TAG, 0, 0, 0);
    answer(FIRST_TAG, 0, 0, 0); /* twice */
    answer_as(worker, OTHER_KIND, 24, FIRST_TAG + 1, 0, 0, 0, NULL);
    answer(FIRST_TAG + 2, 0, 0, 0);
    answer(FIRST_TAG + 3, UINT64_MAX, 0, 0);
    OK(shmr_scatter_run(h, &s, 8, FOR_EVER, &m));
    CHECK_EQ(m.tag, FIRST_TAG + 1);
    CHECK_EQ(s.arrived, 1);
    CHECK_EQ(s.next, 3);
    CHECK_EQ(shmr_scatter_settle(&s, m.tag), 1);
    OK(shmr_release(h, &m));
    CHECK_STATUS(shmr_scatter_run(h, &s, 8, FOR_EVER, &m), SHMR_CORRUPT);
    CHECK_EQ(s.arrived, 2);
    CHECK_EQ(s.out, 0);
    CHECK_EQ(counters_of(h).pins, 0);
    CHECK_STATUS(shmr_scatter_run(h, &s, 8, NOT_AT_ALL, &m), SHMR_TIMEOUT);
    for (uint64_t k = 0; k < 4; k++) check_task(k);
    close_whole();
}

static void running_without_memory(void) {
    open_scatter(3, 8);
    add_source(9 * MIB, 3 * MIB, 0, 0);
    shmr_block full = {0}, m = {0};
    OK(shmr_claim(worker, 30 * MIB, NULL, 0, -1, NOT_AT_ALL, &full));
    CHECK_STATUS(shmr_scatter_run(h, &s, 8, FOR_EVER, &m), SHMR_TIMEOUT); /* nothing out: nothing to wait for */
    check_unsent(0, 0);
    OK(shmr_abort(worker, &full));
    shmr_trim(worker); /* it does not wait anywhere, to be asked */
    OK(shmr_claim(worker, 24 * MIB, NULL, 0, -1, NOT_AT_ALL, &full));
    answer_as(worker, OTHER_KIND, 24, 5, 0, 0, 0, NULL);
    OK(shmr_scatter_run(h, &s, 8, FOR_EVER, &m));
    CHECK_EQ(m.tag, 5);
    OK(shmr_release(h, &m));
    check_unsent(1, 1);
    answer(FIRST_TAG, 0, 0, 0);
    CHECK_STATUS(shmr_scatter_run(h, &s, 8, FOR_EVER, &m), SHMR_TIMEOUT);
    CHECK_EQ(s.arrived, 1);
    check_unsent(1, 0); /* the task is still there */
    answer_as(worker, OTHER_KIND, 24, 6, 0, 0, 0, NULL);
    OK(shmr_scatter_run(h, &s, 8, FOR_EVER, &m));
    CHECK_EQ(m.tag, 6);
    OK(shmr_release(h, &m));
    check_task(0);
    OK(shmr_abort(worker, &full));
    shmr_trim(worker);
    CHECK_STATUS(shmr_scatter_run(h, &s, 8, NOT_AT_ALL, &m), SHMR_TIMEOUT);
    CHECK_EQ(s.out, 2);
    check_task(1);
    check_task(2);
    close_whole();
}

/* ---- threads --------------------------------------------------------------------------------------------------------- */

/* Most results go by reference, some are in their place, some are messages of another kind, some come twice. */
static bool in_place(uint64_t index) { return index % 10 == 3; }
static bool of_another_kind(uint64_t index) { return index % 10 == 5; }
static bool comes_twice(uint64_t index) { return index % 64 == 7; }

static void *work(void *argument) {
    shmr *p = argument;
    for (;;) {
        shmr_block task = {0};
        int status = shmr_lease(p, TASKS, 1, FOR_EVER, &task);
        if (status == SHMR_CLOSED) return NULL;
        CHECK_STATUS(status, SHMR_OK);
        if (status != SHMR_OK) return NULL;
        uint64_t index = task.tag - FIRST_TAG;
        CHECK(index < MANY);
        check_parts(p, &task, index);
        if (of_another_kind(index))
            answer_as(p, OTHER_KIND, 24, task.tag, 0, 0, 0, NULL);
        else if (in_place(index))
            answer_as(p, RESULT_KIND, 24, task.tag, 0, 0, result_bytes(index), NULL);
        else
            answer_by_reference(p, index, comes_twice(index) ? 2 : 1);
        OK(shmr_release(p, &task));
    }
}

static pthread_t threads[2];
static shmr *workers[2];

static void open_exchange(int64_t limit) {
    open_scatter(MANY, 8);
    add_source(500 * MANY - 77, 500, 24, 40);
    add_source(3 * MANY, 3, 0, 3);
    add_target(300 * MANY - 123, 300);
    s.limit = limit;
    for (int i = 0; i < 2; i++) {
        workers[i] = attach_region(fd);
        if (pthread_create(&threads[i], NULL, work, workers[i]) != 0) exit(2);
    }
}

/* Every block has come back, and each result is where it belongs. */
static void close_exchange(void) {
    OK(shmr_close_ring(h, TASKS));
    for (int i = 0; i < 2; i++) pthread_join(threads[i], NULL);
    shmr_block m = {0};
    while (shmr_lease(h, RESULTS, 1, NOT_AT_ALL, &m) == SHMR_OK) OK(shmr_scatter_accept(h, &s, &m)); /* second ones */
    uint64_t bytes = 0, arrived = 0, wrong = 0;
    for (uint64_t k = 0; k < MANY; k++) {
        CHECK_EQ(states[k], SHMR_SCATTER_BACK);
        if (of_another_kind(k) || in_place(k)) {
            for (uint64_t i = 0; i < result_bytes(k); i++) wrong += s.target[300 * k + i] != UNTOUCHED;
        } else {
            wrong += wrong_bytes(k);
        }
        if (of_another_kind(k)) continue;
        arrived++;
        bytes += result_bytes(k);
    }
    CHECK_EQ(wrong, 0);
    CHECK_EQ(s.arrived, arrived);
    CHECK_EQ(s.bytes_copied, bytes);
    CHECK_EQ(s.bytes_sent, 500 * MANY - 77 + (MANY - 1) * 64 + 3 * MANY + (MANY - 1) * 3);
    CHECK_EQ(s.out, 0);
    for (int i = 0; i < 2; i++) leave_region(workers[i]);
    close_whole();
}

/* One that is not a result: 1, and it is settled and released; else 0. */
static uint64_t settle_other(shmr_block *m) {
    CHECK_EQ(m->kind, OTHER_KIND);
    CHECK_EQ(shmr_scatter_settle(&s, m->tag), 1);
    OK(shmr_release(h, m));
    return 1;
}

static void workers_and_one_thread(int64_t limit) {
    open_exchange(limit);
    uint64_t others = 0;
    while ((uint64_t)s.arrived + others < MANY) {
        shmr_block m = {0};
        int status = shmr_scatter_run(h, &s, 16, FOR_EVER, &m);
        CHECK(status == SHMR_OK || status == SHMR_TIMEOUT);
        if (status == SHMR_OK) others += settle_other(&m);
        CHECK(shmr_tally_get(&s.out) <= limit);
    }
    CHECK_EQ(others, MANY / 10);
    close_exchange();
}
static void few_out_at_once(void) { workers_and_one_thread(3); }
static void more_than_the_ring_takes(void) { workers_and_one_thread(100); }

static void *send_all(void *unused) {
    while (s.next < s.stop) {
        int status = shmr_scatter_send(h, &s, FOR_EVER);
        CHECK(status == SHMR_OK || status == SHMR_ITEM_WAITS);
        usleep(20); /* at the limit, or results wait: the other thread is at work */
    }
    return unused;
}

static void one_sends_and_another_accepts(void) {
    open_exchange(12);
    pthread_t sender;
    if (pthread_create(&sender, NULL, send_all, NULL) != 0) exit(2);
    uint64_t others = 0;
    while ((uint64_t)s.arrived + others < MANY) {
        shmr_block m = {0};
        int status = shmr_lease(h, RESULTS, 1, FOR_EVER, &m);
        CHECK_STATUS(status, SHMR_OK);
        if (status != SHMR_OK) continue;
        status = shmr_scatter_accept(h, &s, &m);
        if (status == SHMR_WOULD_BLOCK)
            others += settle_other(&m);
        else
            CHECK_STATUS(status, SHMR_OK);
    }
    pthread_join(sender, NULL);
    close_exchange();
}

int main(void) {
    RUN(one_source);
    RUN(several_sources);
    RUN(as_many_sources_as_there_can_be);
    RUN(no_source);
    RUN(ghost_cells);
    RUN(limit_and_stop);
    RUN(each_message_as_it_was_ordered);
    RUN(without_memory);
    RUN(into_a_full_ring);
    RUN(what_can_never_be_sent);
    RUN(closed_rings);
    RUN(given_up_while_being_sent);
    RUN(results_by_reference);
    RUN(results_in_their_place);
    RUN(answered_twice);
    RUN(answers_to_nothing_that_is_out);
    RUN(messages_of_another_kind);
    RUN(a_result_that_was_changed);
    RUN(rubbish_in_an_answer);
    RUN(settling);
    RUN(sending_and_accepting_in_turn);
    RUN(messages_that_are_the_callers_business);
    RUN(running_without_memory);
    RUN(few_out_at_once);
    RUN(more_than_the_ring_takes);
    RUN(one_sends_and_another_accepts);
    return summary("unit_scatter");
}
