/* SPDX-License-Identifier: BSD-3-Clause */
/* SIGKILL before every single change of shared memory, one after the other: a child runs a script and dies at its
 * n-th change, for n = 1, 2, ... until it survives. Each time the parent clears up, and everything must be whole:
 * whatever was reported as sent arrives once, nothing arrives twice, no memory is lost. */
#include "stress.h"

static int64_t steps_left; /* 0: not counting */

void test_step(void) {
    if (steps_left > 0 && --steps_left == 0) kill(getpid(), SIGKILL);
}

enum { FORWARDED, WITH_REFERENCE, RELEASED, FROM_PARENT };                       /* numbers of the parent's messages */
enum { SMALL, SHARED, LARGE, FROM_CHILD };                                       /* of the child's */
enum { PARENT, CHILD, VICTIM };                                                  /* as producers */

static int fd;
static shmr *h;
static struct {
    shmr_word committed[FROM_CHILD], released[FROM_PARENT], joined, done;
} *told; /* what the child has been told of success */

static void tell(shmr_word *word) {
    int64_t left = steps_left;
    steps_left = 0; /* not a step of the core */
    shmr_store_relaxed(word, 1);
    steps_left = left;
}

static void open_region(void) {
    shmr_config config = {.participants = 4, .doorbells = 4, .rings = 2, .blocks = 1024, .arena_bytes = 20 * MIB,
                          .start = UINT64_MAX - 2, .flags = SHMR_WAIT_ALONE, .capacity = {4, 5}};
    h = create_region(&config, &fd);
    memset(told, 0, sizeof *told);
}

static void send_from_parent(void) {
    OK(send_payload(h, 0, PARENT, FORWARDED, 5000, false, NOT_AT_ALL));
    OK(send_payload(h, 0, PARENT, WITH_REFERENCE, 70000, true, NOT_AT_ALL));
    OK(send_payload(h, 0, PARENT, RELEASED, 64, false, NOT_AT_ALL));
}

/* ---- the scripts -------------------------------------------------------------------------------------------------------- */

static void work(shmr *p) {
    shmr_block b = {0};
    OK(shmr_lease(p, 0, 1, NOT_AT_ALL, &b));
    OK(shmr_commit(p, 1, 1, -1, NOT_AT_ALL, &b));
    tell(&told->released[FORWARDED]);
    OK(shmr_lease(p, 0, 1, NOT_AT_ALL, &b));
    check_message(p, &b);
    OK(shmr_release(p, &b));
    tell(&told->released[WITH_REFERENCE]);
    OK(send_payload(p, 1, CHILD, SMALL, 100, false, NOT_AT_ALL));
    tell(&told->committed[SMALL]);
    OK(send_payload(p, 1, CHILD, SHARED, 40000, true, NOT_AT_ALL));
    tell(&told->committed[SHARED]);
    OK(shmr_claim(p, 300, NULL, 0, -1, NOT_AT_ALL, &b));
    OK(shmr_abort(p, &b));
    OK(send_payload(p, 1, CHILD, LARGE, 3 * MIB, false, NOT_AT_ALL));
    tell(&told->committed[LARGE]);
    OK(shmr_lease(p, 0, 1, NOT_AT_ALL, &b));
    OK(shmr_release(p, &b));
    tell(&told->released[RELEASED]);
    shmr_trim(p);
}

static void join_work_leave(void) {
    shmr *p = attach_region(fd);
    tell(&told->joined);
    work(p);
    OK(shmr_close(p, 0));
}

/* The death of somebody else, found and cleared up after. */
static int64_t armed;
static void clear_up(void) {
    shmr *p = attach_region(fd);
    steps_left = armed;
    shmr_check_deaths(p);
    steps_left = 0;
    OK(shmr_close(p, 0));
}

/* Waiting, with nobody to wake it: registers, and leaves again. */
static void wait_in_vain(void) {
    shmr *p = attach_region(fd);
    shmr_block b = {0};
    OK(shmr_claim(p, 18 * MIB, NULL, 0, -1, NOT_AT_ALL, &b));
    steps_left = armed;
    shmr_block none = {0};
    CHECK_STATUS(shmr_lease(p, 1, 1, shmr_now() + 100000, &none), SHMR_TIMEOUT);
    CHECK_STATUS(shmr_claim(p, 18 * MIB, NULL, 0, 1, shmr_now() + 100000, &none), SHMR_TIMEOUT);
    OK(shmr_abort(p, &b));
    steps_left = 0;
    OK(shmr_close(p, 0));
}

/* ---- the parent ----------------------------------------------------------------------------------------------------------- */

static pid_t start(void (*script)(void), bool from_the_start, int64_t steps) {
    pid_t child = fork();
    if (child) return child;
    alarm(WATCHDOG_SECONDS);
    armed = steps;
    steps_left = from_the_start ? steps : 0;
    script();
    steps_left = 0;
    tell(&told->done);
    _exit(shmr_count_get(&check_failures) != 0);
}

/* True if it was killed. */
static bool wait_for_end(pid_t child) {
    int status = 0;
    while (waitpid(child, &status, 0) < 0 && errno == EINTR) continue;
    CHECK(WIFSIGNALED(status) ? WTERMSIG(status) == SIGKILL : WEXITSTATUS(status) == 0);
    return WIFSIGNALED(status);
}

static void drain_and_check(bool parent_sent) {
    uint64_t from_parent[FROM_PARENT] = {0}, from_child[FROM_CHILD] = {0};
    shmr_block b = {0};
    for (uint32_t ring = 0; ring < 2; ring++)
        for (;;) {
            int status = shmr_lease(h, ring, 1, NOT_AT_ALL, &b);
            if (status == SHMR_WOULD_BLOCK) break;
            CHECK_STATUS(status, SHMR_OK);
            if (status != SHMR_OK) break;
            struct payload m = check_message(h, &b);
            if (m.producer == PARENT)
                from_parent[m.number]++;
            else
                from_child[m.number]++;
            if (ring == 1 && m.producer == PARENT) CHECK_EQ(m.number, FORWARDED);
            OK(shmr_release(h, &b));
        }
    for (int i = 0; i < FROM_CHILD; i++) {
        CHECK(from_child[i] <= 1);
        if (shmr_load_relaxed(&told->committed[i])) CHECK_EQ(from_child[i], 1);
    }
    if (!parent_sent) return;
    /* In one ring or the other. */
    CHECK_EQ(from_parent[FORWARDED], 1);
    for (int i = WITH_REFERENCE; i < FROM_PARENT; i++) {
        CHECK(from_parent[i] <= 1);
        if (shmr_load_relaxed(&told->released[i])) CHECK_EQ(from_parent[i], 0);
    }
}

static void close_whole(void) {
    check_whole(h);
    CHECK_EQ(shmr_live_participants(h), 1);
    leave_region(h);
    close(fd);
}

static bool last_point(int64_t n, bool killed, const char *what) {
    if (shmr_count_get(&check_failures)) {
        fprintf(stderr, "  at point %lld of %s\n", (long long)n, what);
        return true;
    }
    if (killed) return false;
    printf("       %lld points\n", (long long)n - 1);
    CHECK(n > 20);
    return true;
}

static void a_worker_dies(void) {
    for (int64_t n = 1;; n++) {
        open_region();
        send_from_parent();
        bool killed = wait_for_end(start(join_work_leave, true, n));
        shmr_check_deaths(h);
        shmr_adopt_orphans(h);
        drain_and_check(true);
        close_whole();
        if (last_point(n, killed, "a worker")) return;
    }
}

/* A victim with a bit of everything in hand, whose recoverer dies; the parent finishes. */
static void everything_in_hand(void) {
    shmr *p = attach_region(fd);
    shmr_store_relaxed(&p->next_look, INT64_MAX); /* it clears up after nobody */
    shmr_block b = {0};
    shmr_ref ref;
    for (int i = 0; i < 2 && shmr_lease(p, 0, 1, NOT_AT_ALL, &b) == SHMR_OK; i++) {
        if (!b.references) continue;
        OK(shmr_references(p, &b, &ref, 1));
        OK(shmr_hold(p, ref.block, ref.generation, &ref));
    }
    OK(send_payload(p, 1, VICTIM, SMALL, 100, false, NOT_AT_ALL));
    OK(send_payload(p, 1, VICTIM, SHARED, 40000, true, NOT_AT_ALL));
    OK(shmr_claim(p, 200000, NULL, 0, -1, NOT_AT_ALL, &b));
    OK(shmr_claim(p, 64, NULL, 0, -1, NOT_AT_ALL, &b));
    b.kind = 0; /* what was leased before may have been a frame */
    b.length = 64;
    fill_payload(bytes_of(p, &b), 64, VICTIM, LARGE);
    commit_without_slot(p, &b, 1);
    kill(getpid(), SIGKILL);
}

static void a_recoverer_dies(void) {
    for (int64_t n = 1;; n++) {
        open_region();
        send_from_parent();
        CHECK(wait_for_end(start(everything_in_hand, false, 0)));
        bool killed = wait_for_end(start(clear_up, false, n));
        shmr_check_deaths(h);
        shmr_adopt_orphans(h);
        uint64_t deaths = counters_of(h).deaths;
        CHECK(deaths >= 1 && deaths <= 3);
        for (int i = 0; i < FROM_CHILD; i++) shmr_store_relaxed(&told->committed[i], 1); /* by the victim */
        drain_and_check(true);
        close_whole();
        if (last_point(n, killed, "a recoverer")) return;
    }
}

/* And its recoverer, too, at each point for each. */
static void a_second_recoverer_dies(void) {
    int64_t points = 0;
    for (int64_t n = 1, more = 1; more; n++)
        for (int64_t m = 1;; m++, points++) {
            open_region();
            send_from_parent();
            CHECK(wait_for_end(start(everything_in_hand, false, 0)));
            more = wait_for_end(start(clear_up, false, n));
            bool killed = wait_for_end(start(clear_up, false, m));
            shmr_check_deaths(h);
            shmr_adopt_orphans(h);
            for (int i = 0; i < FROM_CHILD; i++) shmr_store_relaxed(&told->committed[i], 1); /* by the victim */
            drain_and_check(true);
            close_whole();
            if (shmr_count_get(&check_failures)) {
                fprintf(stderr, "  at points %lld and %lld\n", (long long)n, (long long)m);
                return;
            }
            if (!killed) break;
        }
    printf("       %lld pairs of points\n", (long long)points);
}

/* The same while joining at a dead one's place (the table is full), and at the place of one who left. */
static void an_heir_dies(void) {
    for (int64_t n = 1;; n++) {
        open_region();
        send_from_parent();
        for (int i = 0; i < 2; i++) wait_for_end(start(everything_in_hand, false, 0)); /* the second finds only one */
        shmr *left = attach_region(fd);
        OK(send_payload(left, 1, CHILD, LARGE, 100000, false, NOT_AT_ALL));
        leave_region(left);
        bool killed = wait_for_end(start(clear_up, true, n));
        shmr_check_deaths(h);
        shmr_adopt_orphans(h);
        uint64_t sent = 0;
        shmr_block b = {0};
        for (uint32_t ring = 0; ring < 2; ring++)
            while (shmr_lease(h, ring, 1, NOT_AT_ALL, &b) == SHMR_OK) {
                check_message(h, &b);
                sent++;
                OK(shmr_release(h, &b));
            }
        CHECK_EQ(sent, 3 + 3 + 3 + 1);
        close_whole();
        if (last_point(n, killed, "an heir")) return;
    }
}

static void a_waiter_dies(void) {
    for (int64_t n = 1;; n++) {
        open_region();
        bool killed = wait_for_end(start(wait_in_vain, false, n));
        shmr_check_deaths(h);
        shmr_adopt_orphans(h);
        for (uint32_t d = 0; d < h->g.config.doorbells; d++)
            CHECK_EQ(shmr_load_relaxed(&shmr_doorbell_at(h, d)->owner), 0);
        for (uint32_t p = 0; p < 4; p++) CHECK(!shmr_any_waiter(shmr_participant_at(h, p)->space_waiters));
        drain_and_check(false);
        close_whole();
        if (last_point(n, killed, "a waiter")) return;
    }
}

int main(void) {
    told = common_memory(sizeof *told);
    rescues_allowed = true;
    RUN(a_waiter_dies);
    RUN(a_worker_dies);
    RUN(a_recoverer_dies);
    RUN(a_second_recoverer_dies);
    RUN(an_heir_dies);
    return summary("points_kill");
}
