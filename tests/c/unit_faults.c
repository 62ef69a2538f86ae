/* SPDX-License-Identifier: BSD-3-Clause */
/* Each call of libc fails once: for n = 1, 2, ... the n-th one, until the operation gets by without. A failure is told
 * by its status, nothing leaks (LeakSanitizer looks at the end), and the region stays whole. */

#include <sys/resource.h>

#include "faults.h"
#include "shmr_runs.h"

static const int errors[] = {ENOMEM, ENOSPC, EMFILE, EIO, EINTR};
static bool is_failure(int status) { return status == SHMR_SYSTEM || status == SHMR_NO_MEMORY; }

/* ---- creating and joining -------------------------------------------------------------------------------------------- */

#define OPENING (FAULT_MEMORY | FAULT_FSTAT | FAULT_STAT | FAULT_FCNTL | FAULT_FALLOCATE | FAULT_FOPEN)

static void creating(void) {
    shmr_config config = small_config();
    for (int e = 0; e < 5; e++) {
        for (int64_t n = 1;; n++) {
            int region = memfd_create("shmr-test", MFD_CLOEXEC), before = (int)open_descriptors();
            REQUIRE(ftruncate(region, (off_t)shmr_region_bytes(&config)) == 0);
            shmr *h = NULL;
            arm_fault(OPENING, n, errors[e]);
            int status = shmr_create(region, &config, &h);
            bool fired = disarm_faults();
            if (status == SHMR_OK) {
                check_whole(h);
                leave_region(h);
            } else {
                CHECK(fired && is_failure(status) && !h);
                CHECK(shmr_last_errno() != 0 && *shmr_last_detail());
                CHECK_EQ(open_descriptors(), before);
                CHECK_STATUS(shmr_attach(region, &h), SHMR_WOULD_BLOCK); /* no region yet */
            }
            close(region);
            if (!fired) break;
            REQUIRE(n < 1000);
        }
    }
}

static void joining(void) {
    int region;
    shmr_config config = small_config();
    config.participants = 2;
    shmr *h = create_region(&config, &region), *other = NULL;
    int before = (int)open_descriptors();
    for (int64_t n = 1;; n++) {
        arm_fault(OPENING, n, ENOMEM);
        int status = shmr_attach(region, &other);
        bool fired = disarm_faults();
        if (status == SHMR_OK)
            leave_region(other);
        else
            CHECK(fired && is_failure(status));
        CHECK_EQ(shmr_live_participants(h), 1);
        CHECK_EQ(open_descriptors(), before);
        if (!fired) break;
        REQUIRE(n < 1000);
    }
    other = attach_region(region);
    shmr *third = NULL;
    CHECK_STATUS(shmr_attach(region, &third), SHMR_CROWDED);
    CHECK_EQ(open_descriptors(), before + 1);
    leave_region(other);
    check_whole(h);
    leave_region(h);
    close(region);
}

/* ---- a message's way --------------------------------------------------------------------------------------------------- */

/* All that `p` can do with memory, up to the first failure, after which it gives back what it has. */
static int work(shmr *h, shmr *p) {
    static const uint64_t sizes[] = {60000, 700, 20, 5 * MIB};
    shmr_ref ref, held;
    for (int i = 0; i < 4; i++) {
        shmr_block b = {0}, frame = {0};
        int status = shmr_claim(p, sizes[i], NULL, 0, -1, NOT_AT_ALL, &b);
        if (status != SHMR_OK) return status;
        b.length = sizes[i];
        char *bytes = bytes_of(p, &b);
        memset(bytes, 7, b.length);
        OK(shmr_publish(p, &b, &ref));
        status = shmr_claim(p, 10, &ref, 1, -1, NOT_AT_ALL, &frame);
        if (status == SHMR_OK) {
            frame.length = 10;
            OK(shmr_commit(p, 0, 1, -1, NOT_AT_ALL, &frame));
            OK(shmr_lease(h, 0, 1, NOT_AT_ALL, &frame));
            OK(shmr_hold(h, ref.block, ref.generation, &held)); /* without memory it cannot be found by its address */
            OK(shmr_drop(h, ref.block, ref.generation));
            OK(shmr_release(h, &frame));
        }
        OK(shmr_drop(p, ref.block, ref.generation));
        if (status != SHMR_OK) return status;
    }
    return SHMR_OK;
}

static void working(void) {
    shmr_config config = small_config();
    for (int e = 0; e < 4; e++) {
        for (int64_t n = 1;; n++) {
            int region;
            shmr *h = create_region(&config, &region), *p = attach_region(region);
            arm_fault(FAULT_MEMORY | FAULT_FALLOCATE | FAULT_MADVISE, n, errors[e]);
            int status = work(h, p);
            bool fired = disarm_faults();
            CHECK(status == SHMR_OK || (fired && (is_failure(status) || status == SHMR_WOULD_BLOCK)));
            OK(work(h, p));
            leave_region(p);
            check_whole(h);
            leave_region(h);
            close(region);
            if (!fired) break;
            REQUIRE(n < 1000);
        }
    }
}

/* Huge pages are refused, and signals arrive meanwhile. */
static void reserving_page_by_page(void) {
    shmr_config config = small_config();
    for (int e = 0; e < 3; e++) {
        int region;
        shmr *h = create_region(&config, &region);
        OK(send_message(h, 0, 8, 1, NOT_AT_ALL)); /* its record is in memory already */
        OK(receive_message(h, 0, NULL, NOT_AT_ALL));
        for (int64_t n = 1; n < 8; n++) {
            break_calls(FAULT_MADVISE, EAGAIN);
            shmr_trim(h);
            for (uint32_t i = 0; i < h->g.extents; i++) shmr_store_release(shmr_extent_at(h, i), 0); /* anew */
            arm_fault(FAULT_FALLOCATE, n, (int[]){EINTR, ENOSPC, EIO}[e]);
            int status = send_message(h, 0, 3 * MIB, 1, NOT_AT_ALL);
            if (e == 0) CHECK_EQ(status, SHMR_OK);
            CHECK(status == SHMR_OK || status == SHMR_WOULD_BLOCK);
            if (status == SHMR_OK) OK(receive_message(h, 0, NULL, NOT_AT_ALL));
            disarm_faults();
        }
        check_whole(h);
        leave_region(h);
        close(region);
    }
}

/* ---- NumPy's memory ------------------------------------------------------------------------------------------------------ */

/* What comes to lie where a region was is not taken for an array of its. */
static void numpy_after_the_region(void) {
    int region;
    shmr_config config = small_config();
    shmr *h = create_region(&config, &region);
    static struct shmr_numpy_handler *numpy; /* immortal */
    numpy = shmr_numpy_handler(h, 0, 8 * MIB);
    void *context = numpy->allocator.context;
    char *a = numpy->allocator.malloc(context, 100000);
    CHECK(shmr_allocated_here(h, a));
    numpy->allocator.free(context, a, 100000);
    leave_region(h);
    break_calls(FAULT_REALLOC, ENOMEM);
    CHECK(!numpy->allocator.realloc(context, a, 200000)); /* asked of the C library */
    disarm_faults();
    close(region);
}

static void memory_for_numpy(void) {
    int region;
    shmr_config config = small_config();
    shmr *h = create_region(&config, &region);
    break_calls(FAULT_CALLOC, ENOMEM);
    CHECK(!shmr_numpy_handler(h, 1000, 8 * MIB));
    disarm_faults();
    static struct shmr_numpy_handler *numpy; /* immortal */
    numpy = shmr_numpy_handler(h, 0, 8 * MIB);
    void *context = numpy->allocator.context;
    char *a = numpy->allocator.realloc(context, NULL, 100000), *outside;
    CHECK(shmr_allocated_here(h, a));
    CHECK(!numpy->allocator.calloc(context, SIZE_MAX / 2, 4));
    for (uint64_t size = MIB; size <= 20 * MIB; size *= 20) { /* in the arena, and outside */
        char *zero = numpy->allocator.calloc(context, 2, size / 2);
        CHECK(zero && zero[0] == 0 && zero[size - 1] == 0);
        memset(zero, 9, size);
        numpy->allocator.free(context, zero, size);
    }
    memset(a, 5, 100000);
    CHECK(numpy->allocator.realloc(context, a, 60000) == a);
    break_calls(FAULT_MALLOC, ENOMEM);
    CHECK(!numpy->allocator.realloc(context, a, 20 * MIB)); /* the old one is as it was */
    disarm_faults();
    a = numpy->allocator.realloc(context, a, 200000);
    a = numpy->allocator.realloc(context, a, 50000); /* much smaller: moved */
    CHECK_EQ(a[49999], 5);
    outside = numpy->allocator.malloc(context, 20 * MIB);
    CHECK(outside && !shmr_allocated_here(h, outside));
    outside = numpy->allocator.realloc(context, outside, 21 * MIB);
    numpy->allocator.free(context, outside, 21 * MIB);

    fflush(stdout);
    pid_t child = fork();
    if (child == 0) { /* has it, too, but neither allocates nor frees there */
        break_calls(FAULT_TRYLOCK, 0);
        CHECK(!numpy->allocator.realloc(context, a, 100)); /* a thread that is not here has the lock */
        disarm_faults();
        char *own = numpy->allocator.realloc(context, a, 100);
        CHECK(own && own[99] == 5 && (own < h->base || own >= h->base + h->g.total));
        numpy->allocator.free(context, own, 100);
        numpy->allocator.free(context, a, 50000);
        _exit(shmr_count_get(&check_failures) != 0);
    }
    expect_success(child);
    numpy->allocator.free(context, a, 50000);
    check_whole(h);
    a = numpy->allocator.malloc(context, 50000); /* alive when we leave by force: an heir's */
    OK(shmr_close(h, 1));
    numpy->allocator.free(context, a, 50000);
    shmr_free(h);
    h = attach_region(region);
    check_whole(h);
    leave_region(h);
    close(region);
}

/* ---- clearing up after the dead -------------------------------------------------------------------------------------------- */

/* What there is to clear up: messages in each state, frames that name blocks, small and large blocks, held ones. */
static void leave_a_mess(shmr *h, shmr *v, bool in_slots) {
    shmr_block b = {0}, got = {0};
    shmr_ref ref, held, mine;
    OK(shmr_claim(h, 50000, NULL, 0, -1, NOT_AT_ALL, &b)); /* h's own, which v holds and names */
    b.length = 50000;
    OK(shmr_publish(h, &b, &mine));
    OK(shmr_hold(v, mine.block, mine.generation, &held));
    OK(shmr_claim(v, 700, NULL, 0, -1, NOT_AT_ALL, &b));
    b.length = 700;
    OK(shmr_publish(v, &b, &ref));
    OK(shmr_hold(h, ref.block, ref.generation, &held));
    shmr_ref both[] = {mine, ref};
    OK(shmr_claim(v, 10, both, 2, -1, NOT_AT_ALL, &b));
    b.length = 10;
    OK(shmr_commit(v, 0, 1, -1, NOT_AT_ALL, &b));
    for (uint64_t k = 1; k < 6; k++) OK(send_message(v, 0, 60 * k * k * k * k, k, NOT_AT_ALL));
    OK(shmr_lease(v, 0, 1, NOT_AT_ALL, &got));
    OK(shmr_claim(v, 5000, NULL, 0, -1, NOT_AT_ALL, &b)); /* dies between the state and the slot */
    b.length = 8;
    b.tag = 6;
    memcpy(bytes_of(v, &b), &b.tag, 8);
    commit_without_slot(v, &b, 0);
    if (in_slots) OK(shmr_insert(v, 0, b.block, shmr_state_generation(b.state), 8));
    OK(shmr_claim(v, 3 * MIB, NULL, 0, -1, NOT_AT_ALL, &b));
    OK(shmr_drop(h, mine.block, mine.generation));
    OK(shmr_drop(h, ref.block, ref.generation));
}

static void recovering(void) {
    shmr_config config = small_config();
    for (int in_slots = 0; in_slots < 2; in_slots++)
        for (int64_t n = 1;; n++) {
            int region;
            shmr *h = create_region(&config, &region), *v = attach_region(region);
            leave_a_mess(h, v, in_slots);
            uint32_t slot = die(v);
            arm_fault(FAULT_MEMORY, n, ENOMEM);
            OK(shmr_recover(h, slot, NULL, 0, NULL));
            bool fired = disarm_faults();
            /* What could not be noted stays in use until the region goes. Messages come, whatever happens. */
            shmr_block b = {0};
            int messages = 0;
            while (shmr_lease(h, 0, 1, NOT_AT_ALL, &b) == SHMR_OK) {
                messages++;
                OK(shmr_release(h, &b));
            }
            CHECK_EQ(messages, 7);
            if (!fired) check_whole(h);
            OK(shmr_close(h, 1));
            shmr_free(h);
            close(region);
            if (!fired) break;
            REQUIRE(n < 1000);
        }
}

/* Without a list of what stands in the rings: each message is looked for. */
static void recovering_without_a_list(void) {
    shmr_config config = small_config();
    int region;
    shmr *h = create_region(&config, &region), *v = attach_region(region);
    leave_a_mess(h, v, false);
    uint32_t slot = die(v);
    break_calls(FAULT_CALLOC, ENOMEM);
    OK(shmr_recover(h, slot, NULL, 0, NULL));
    disarm_faults();
    for (int k = 0; k < 7; k++) OK(receive_message(h, 0, NULL, NOT_AT_ALL));
    OK(shmr_close(h, 1));
    shmr_free(h);
    close(region);
}

/* No memory for the list of those that found their ring full: then they wait for our own recovery. */
static void recovering_into_a_full_ring(void) {
    shmr_config config = small_config();
    config.capacity[0] = 1;
    int region;
    shmr *h = create_region(&config, &region), *v = attach_region(region), *late;
    shmr_block b = {0};
    for (uint64_t k = 0; k < 4; k++) {
        OK(shmr_claim(v, 100, NULL, 0, -1, NOT_AT_ALL, &b));
        b.length = 8;
        b.tag = k;
        memcpy(bytes_of(v, &b), &k, 8);
        commit_without_slot(v, &b, 0);
    }
    uint32_t slot = die(v);
    break_calls(FAULT_REALLOC, ENOMEM);
    OK(shmr_recover(h, slot, NULL, 0, NULL));
    disarm_faults();
    CHECK_EQ(shmr_count_get(&h->again_count), 0);
    for (int k = 0; k < 2; k++) OK(receive_message(h, 0, NULL, NOT_AT_ALL));
    slot = die(h);
    late = attach_region(region);
    OK(shmr_recover(late, slot, NULL, 0, NULL));
    for (int k = 0; k < 2; k++) OK(receive_message(late, 0, NULL, NOT_AT_ALL));
    check_whole(late);
    leave_region(late);
    close(region);
}

static const char *fake_size;
static const char *fake_cache(const char *path) { return strstr(path, "/cache/index3/size") ? fake_size : NULL; }

/* Of what the kernel says about the processor's cache, too much is believed as little as nonsense. */
static void the_common_cache(void) {
    const struct { const char *text; uint64_t kib; } cases[] = {
        {"8192K\n", 1024}, {"32768K\n", 4096}, {"16384K", 2048}, {"520192K\n", 4096}, {"4294967295K", 4096}, {"31K\n", 4096},
        {"0K", 4096}, {"", 4096}, {"K", 4096}, {"-1K", 4096}, {"unknown\n", 4096}, {NULL, 4096},
    };
    struct shmr_arena a = {0};
    for (uint32_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        fake_size = cases[i].text;
        fake_file = fake_cache;
        if (!fake_size) break_calls(FAULT_FOPEN, EMFILE);
        shmr_runs_init(&a);
        disarm_faults();
        fake_file = NULL;
        CHECK_EQ((uint64_t)a.turning * SHMR_PAGE, cases[i].kib << 10);
    }
}

static const char *fake_stat;
static const char *fake_process(const char *path) { return strstr(path, "/stat") ? fake_stat : NULL; }

/* Whoever cannot ask the kernel does not know that somebody is dead. */
static void asking_the_kernel(void) {
    shmr_config config = small_config();
    int region, ends[2];
    shmr *h = create_region(&config, &region);
    REQUIRE(pipe(ends) == 0);
    pid_t child = fork();
    if (child == 0) {
        attach_region(region);
        if (write(ends[1], "", 1) != 1) _exit(2);
        for (;;) pause();
    }
    char byte;
    CHECK_EQ(read(ends[0], &byte, 1), 1);
    close(ends[0]);
    close(ends[1]);
    break_calls(FAULT_FOPEN, EMFILE); /* its start time is unknown: no proof */
    CHECK_EQ(shmr_check_deaths(h), 0);
    disarm_faults();
    fake_file = fake_process;
    static const char *const texts[] = {"1", "1 (a) b c", "1 (a"};
    for (int i = 0; i < 3; i++) {
        fake_stat = texts[i];
        CHECK_EQ(shmr_start_time((uint32_t)child), 0);
        CHECK_EQ(shmr_check_deaths(h), 0);
    }
    fake_file = NULL;
    break_calls(FAULT_POLL, 0); /* ready, but not at its end */
    CHECK_EQ(shmr_check_deaths(h), 0);
    CHECK_EQ(shmr_check_deaths(h), 0);
    break_calls(FAULT_POLL, EINVAL); /* as where no descriptors are allowed */
    CHECK_EQ(shmr_check_deaths(h), 0);
    disarm_faults();
    kill_and_reap(child);
    break_calls(FAULT_SYSCALL, EMFILE);
    shmr_close_pidfds(h);
    CHECK_EQ(shmr_check_deaths(h), 0);
    disarm_faults();
    CHECK_EQ(shmr_check_deaths(h), 1);
    check_whole(h);
    leave_region(h);
    close(region);
}

/* ---- wake-ups ------------------------------------------------------------------------------------------------------- */

static shmr *sleeper, *sender;
static int sleeps;
static int signal_and_item(void) {
    OK(send_message(sender, 0, 8, 1, NOT_AT_ALL));
    return EINTR;
}
/* A message is there at the end of the first slice. Its wake-up, in this order: */
static enum { LOST, UNDER_WAY, LATE, TAKEN } fate;
static int a_slice_ends(void) {
    shmr_word *waiters = shmr_ring_at(sleeper, 0)->item_waiters;
    if (++sleeps == 1) {
        uint64_t bits = shmr_load_seq_cst(waiters);
        if (fate != UNDER_WAY) shmr_store_release(waiters, 0);
        OK(send_message(sender, 0, 8, 1, NOT_AT_ALL));
        if (fate != UNDER_WAY) shmr_store_release(waiters, bits);
    }
    if (sleeps == 5 && fate == LATE) return 0;
    if (sleeps == 11 && fate == TAKEN) OK(receive_message(sender, 0, NULL, NOT_AT_ALL));
    return sleeps == 12 && fate == TAKEN ? signal_and_item() : ETIMEDOUT;
}

/* By force, while a thread sleeps: what it has borrowed, nobody will give back for it. */
static int the_handle_is_closed(void) {
    OK(shmr_close(sleeper, 1));
    return 0;
}

static void wake_ups(void) {
    int region;
    shmr_config config = small_config();
    sleeper = create_region(&config, &region);
    sender = attach_region(region);
    fake_sleep = signal_and_item;
    OK(receive_message(sleeper, 0, NULL, FOR_EVER)); /* interrupted, but there it is */
    fake_sleep = a_slice_ends;
    for (fate = UNDER_WAY; fate <= TAKEN; fate++) {
        sleeps = 0;
        OK(receive_message(sleeper, 0, NULL, FOR_EVER));
    }
    CHECK_EQ(counters_of(sleeper).rescued_wakeups, 0);
    fate = LOST;
    sleeps = 0;
    OK(receive_message(sleeper, 0, NULL, FOR_EVER));
    CHECK_EQ(counters_of(sleeper).rescued_wakeups, 1);
    fake_sleep = NULL;
    leave_region(sender);
    rescues_allowed = true;
    check_whole(sleeper);
    rescues_allowed = false;
    sender = attach_region(region);
    fake_sleep = the_handle_is_closed;
    CHECK_STATUS(receive_message(sleeper, 0, NULL, FOR_EVER), SHMR_CLOSED);
    fake_sleep = NULL;
    shmr_free(sleeper);
    for (uint32_t i = 0; i < 64; i++) CHECK_EQ(shmr_load_seq_cst(&shmr_doorbell_at(sender, i)->owner), 0);
    leave_region(sender);
    close(region);
}

/* Whatever it sleeps for. */
static void closed_in_its_sleep(void) {
    for (int what = 0; what < 5; what++) {
        int region;
        shmr_config config = small_config();
        config.capacity[0] = 1;
        sleeper = create_region(&config, &region);
        shmr_block b = {0}, all = {0};
        if (what == 1) OK(shmr_claim(sleeper, 30 * MIB, NULL, 0, -1, NOT_AT_ALL, &all));
        if (what == 0 || what == 2) OK(send_message(sleeper, 0, 8, 1, NOT_AT_ALL));
        fake_sleep = the_handle_is_closed;
        int status = what == 0   ? send_message(sleeper, 0, 8, 2, FOR_EVER)
                     : what == 1 ? shmr_claim(sleeper, 4 * MIB, NULL, 0, -1, FOR_EVER, &b)
                     : what == 2 ? shmr_wait_idle(sleeper, 0, FOR_EVER)
                     : what == 3 ? shmr_wait_item(sleeper, 0, FOR_EVER)
                                 : shmr_lease(sleeper, 0, 1, FOR_EVER, &b);
        CHECK_EQ(status, SHMR_CLOSED);
        fake_sleep = NULL;
        shmr_free(sleeper);
        sleeper = attach_region(region);
        if (what == 0 || what == 2) OK(receive_message(sleeper, 0, NULL, NOT_AT_ALL));
        check_whole(sleeper);
        leave_region(sleeper);
        close(region);
    }
}

static int a_long_night(void) {
    usleep(260000); /* until it is time for another look at the dead */
    return ++sleeps == 1 ? ETIMEDOUT : EINTR;
}
static uint64_t starving(shmr *h) {
    uint64_t tag, index, since, bytes;
    OK(shmr_progress(h, shmr_self(h), &tag, &index, &since, &bytes));
    return bytes;
}
static void no_space_for_long(void) {
    int region;
    shmr_config config = small_config();
    shmr *h = create_region(&config, &region);
    shmr_block b = {0}, all = {0};
    OK(shmr_claim(h, 32 * MIB, NULL, 0, -1, NOT_AT_ALL, &all));
    fake_sleep = a_long_night;
    sleeps = 0;
    CHECK_STATUS(shmr_claim(h, 2 * MIB, NULL, 0, -1, FOR_EVER, &b), SHMR_INTERRUPTED);
    CHECK_EQ(starving(h), 2 * MIB); /* it is about to come back, and may have been asked where it is */
    CHECK_STATUS(shmr_claim(h, 2 * MIB, NULL, 0, -1, FOR_EVER, &b), SHMR_INTERRUPTED);
    CHECK_STATUS(shmr_claim(h, 2 * MIB, NULL, 0, -1, NOT_AT_ALL, &b), SHMR_WOULD_BLOCK);
    CHECK_EQ(starving(h), 0);
    CHECK_STATUS(shmr_claim(h, 2 * MIB, NULL, 0, -1, FOR_EVER, &b), SHMR_INTERRUPTED);
    fake_sleep = NULL;
    OK(shmr_abort(h, &all));
    OK(shmr_claim(h, 2 * MIB, NULL, 0, -1, NOT_AT_ALL, &b));
    CHECK_EQ(starving(h), 0);
    OK(shmr_abort(h, &b));
    check_whole(h);
    leave_region(h);
    close(region);
}

static void no_doorbell_and_a_signal(void) {
    int region;
    shmr_config config = small_config();
    config.doorbells = 1;
    shmr *h = create_region(&config, &region);
    shmr_store_release(&shmr_doorbell_at(h, 0)->owner, 7); /* somebody else's */
    break_calls(FAULT_NANOSLEEP, EINTR);
    CHECK_STATUS(receive_message(h, 0, NULL, FOR_EVER), SHMR_INTERRUPTED);
    shmr_block b = {0}, all[16] = {0};
    for (int i = 0; i < 16; i++) OK(shmr_claim(h, 2 * MIB, NULL, 0, -1, NOT_AT_ALL, &all[i]));
    CHECK_STATUS(shmr_claim(h, 2 * MIB, NULL, 0, -1, FOR_EVER, &b), SHMR_INTERRUPTED);
    disarm_faults();
    for (int i = 0; i < 16; i++) OK(shmr_abort(h, &all[i]));
    shmr_store_release(&shmr_doorbell_at(h, 0)->owner, 0);
    check_whole(h);
    leave_region(h);
    close(region);
}

/* ---- the watcher ----------------------------------------------------------------------------------------------------------- */

static void printing_by_lines(void) {
    int ends[2], go[2], status;
    char got[64] = {0};
    REQUIRE(pipe(ends) == 0 && pipe(go) == 0);
    fflush(stdout);
    pid_t pid = fork();
    if (pid == 0) {
        dup2(ends[1], 1);
        shmr_print_lines();
        printf("a line\nand a ");
        if (read(go[0], got, 1) != 1) _exit(1);
        printf("half");
        shmr_flush_prints();
        pause();
    }
    CHECK_EQ(read(ends[0], got, sizeof got), 7); /* without a flush */
    CHECK(memcmp(got, "a line\n", 7) == 0);
    REQUIRE(write(go[1], "x", 1) == 1);
    CHECK_EQ(read(ends[0], got, sizeof got), 10);
    CHECK(memcmp(got, "and a half", 10) == 0);
    kill(pid, SIGKILL);
    waitpid(pid, &status, 0);
    close(ends[0]), close(ends[1]), close(go[0]), close(go[1]);
}

static void watching_a_parent(void) {
    break_calls(FAULT_THREAD, EAGAIN);
    CHECK_STATUS(shmr_watch_parent(0), SHMR_SYSTEM);
    CHECK_EQ(shmr_last_errno(), EAGAIN);
    CHECK_STATUS(shmr_watch_parent(-1), SHMR_SYSTEM);
    disarm_faults();
    break_calls(FAULT_CALLOC, ENOMEM);
    CHECK_STATUS(shmr_watch_parent(0), SHMR_SYSTEM);
    CHECK_EQ(shmr_last_errno(), ENOMEM);
    disarm_faults();
    int ends[2], told[2], region;
    shmr_config config = small_config();
    shmr *h = create_region(&config, &region);
    REQUIRE(pipe(ends) == 0 && pipe(told) == 0);
    shmr_or_seq_cst(shmr_header_of(h)->extent_waiters, 1); /* somebody is short of memory */
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) { /* a pipe with a byte in it is as readable as the pidfd of the dead */
        shmr *own = attach_region(region);
        OK(send_message(own, 0, 3 * MIB, 1, NOT_AT_ALL));
        OK(receive_message(own, 0, NULL, NOT_AT_ALL));
        CHECK_EQ(counters_of(own).owned, 4 * MIB);
        if (shmr_watch_parent(ends[0]) != SHMR_OK) _exit(3);
        usleep(300000); /* nothing to look after yet */
        shmr_watch_shortage(own);
        while (counters_of(own).owned) usleep(10000);
        OK(shmr_close(own, 1));
        usleep(300000); /* no more */
        if (shmr_count_get(&check_failures)) _exit(4);
        if (write(told[1], "", 1) != 1) _exit(5);
        for (;;) pause();
    }
    char byte;
    CHECK_EQ(read(told[0], &byte, 1), 1);
    CHECK_EQ(write(ends[1], "", 1), 1);
    expect_success(child);
    shmr_and_seq_cst(shmr_header_of(h)->extent_waiters, 0);
    for (int i = 0; i < 2; i++) close(ends[i]), close(told[i]);
    check_whole(h);
    leave_region(h);
    close(region);
}

/* A watcher has done its round often enough when what we had free has gone to who is short of memory, twice. */
static void until_watched(shmr *own) {
    for (int round = 0; round < 2; round++) {
        OK(send_message(own, 1, 3 * MIB, 1, NOT_AT_ALL));
        OK(receive_message(own, 1, NULL, NOT_AT_ALL));
        shmr_or_seq_cst(shmr_header_of(own)->extent_waiters, 1);
        while (counters_of(own).owned) usleep(1000);
    }
}

/* Its child ends, also when other code has closed the descriptor that it watches it by; but not before. */
static void the_parent_dies(void) {
    enum { LEFT_ALONE, CLOSED, ANOTHERS, NO_MORE_TO_BE_HAD, NONE_ALLOWED, WAYS };
    for (int way = 0; way < WAYS; way++) {
        int region, ends[2], other_file[2];
        shmr_config config = small_config();
        shmr *h = create_region(&config, &region);
        if (pipe(ends) != 0 || pipe(other_file) != 0 || write(other_file[1], "", 1) != 1) exit(2);
        fflush(stdout);
        pid_t parent = fork();
        if (parent == 0) {
            int pidfd = (int)syscall(SYS_pidfd_open, getpid(), 0);
            if (fork() == 0) {
                shmr *own = attach_region(region);
                OK(shmr_watch_parent(pidfd));
                shmr_watch_shortage(own);
                if (way == ANOTHERS) CHECK(dup2(other_file[0], pidfd) == pidfd); /* as readable as who has died */
                if (way == CLOSED || way == NO_MORE_TO_BE_HAD) close(pidfd);
                if (way == NO_MORE_TO_BE_HAD || way == NONE_ALLOWED) {
                    struct rlimit none = {0, 0};
                    CHECK(setrlimit(RLIMIT_NOFILE, &none) == 0);
                }
                until_watched(own);
                char ready = !shmr_count_get(&check_failures);
                if (write(ends[1], &ready, 1) != 1) _exit(2);
                for (;;) pause();
            }
            close(ends[1]);
            for (;;) pause();
        }
        close(ends[1]);
        char ready = 0;
        CHECK(read(ends[0], &ready, 1) == 1 && ready == 1);
        kill_and_reap(parent);
        CHECK(read(ends[0], &ready, 1) == 0); /* the grandchild is gone: its end is closed */
        close(ends[0]);
        close(other_file[0]);
        close(other_file[1]);
        shmr_and_seq_cst(shmr_header_of(h)->extent_waiters, 0);
        while (counters_of(h).deaths < 1) shmr_check_deaths(h);
        check_whole(h);
        leave_region(h);
        close(region);
    }
}

int main(void) {
    RUN(creating);
    RUN(joining);
    RUN(working);
    RUN(reserving_page_by_page);
    RUN(memory_for_numpy);
    RUN(numpy_after_the_region);
    RUN(recovering);
    RUN(recovering_without_a_list);
    RUN(recovering_into_a_full_ring);
    RUN(the_common_cache);
    RUN(asking_the_kernel);
    RUN(wake_ups);
    RUN(closed_in_its_sleep);
    RUN(no_space_for_long);
    RUN(no_doorbell_and_a_signal);
    RUN(printing_by_lines);
    RUN(watching_a_parent);
    RUN(the_parent_dies);
    return summary("unit_faults");
}
