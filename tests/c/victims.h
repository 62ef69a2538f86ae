/* SPDX-License-Identifier: BSD-3-Clause */
/* Children that join a region, get into some state by a script, and are SIGKILLed there. */
#ifndef VICTIMS_H
#define VICTIMS_H

#include "harness.h"

struct report { /* what a victim tells before it dies */
    uint32_t slot;
    shmr_block block;
    shmr_ref ref;
};

static int fd;
static shmr *h;

static inline void open_with(uint64_t flags, uint32_t participants) {
    shmr_config config = small_config();
    config.flags = flags;
    config.participants = participants;
    h = create_region(&config, &fd);
}
static inline void open_region(void) { open_with(SHMR_WAIT_ALONE, 8); }

static inline void close_whole(void) {
    check_whole(h);
    CHECK_EQ(shmr_live_participants(h), 1);
    leave_region(h);
    close(fd);
}

/* A child that joins, runs `script`, reports and waits to be killed. */
static inline pid_t start_victim(void (*script)(shmr *v, struct report *r), struct report *out) {
    int ends[2];
    if (pipe(ends) != 0) exit(2);
    pid_t child = fork();
    if (child == 0) {
        alarm(WATCHDOG_SECONDS);
        shmr *v = attach_region(fd);
        struct report r = {.slot = shmr_self(v)};
        script(v, &r);
        if (write(ends[1], &r, sizeof r) != sizeof r) _exit(2);
        for (;;) pause();
    }
    close(ends[1]);
    CHECK(read(ends[0], out, sizeof *out) == sizeof *out);
    close(ends[0]);
    return child;
}

static inline void kill_victim(void (*script)(shmr *v, struct report *r), struct report *out) {
    kill_and_reap(start_victim(script, out));
}

/* ---- scripts ------------------------------------------------------------------------------------------------------------ */

static inline void script_nothing(shmr *v, struct report *r) { (void)v, (void)r; }

static inline void script_claim(shmr *v, struct report *r) {
    OK(shmr_claim(v, 100000, NULL, 0, -1, NOT_AT_ALL, &r->block));
    const uint64_t sizes[] = {1, 700, 20000, 32768, 40000, 300000, 3 * MIB};
    for (int i = 0; i < 7; i++) {
        shmr_block b = {0};
        OK(shmr_claim(v, sizes[i], NULL, 0, -1, NOT_AT_ALL, &b));
    }
}

static inline void script_commit(shmr *v, struct report *r) {
    (void)r;
    for (uint64_t k = 0; k < 3; k++) OK(send_message(v, 0, 3000, 10 + k, NOT_AT_ALL));
}

static inline void script_commit_without_slot(shmr *v, struct report *r) {
    OK(send_message(v, 0, 100, 1, NOT_AT_ALL));
    OK(shmr_claim(v, 100, NULL, 0, -1, NOT_AT_ALL, &r->block));
    r->block.length = 100;
    r->block.tag = 2;
    memcpy(bytes_of(v, &r->block), &r->block.tag, 8);
    commit_without_slot(v, &r->block, 0);
}

/* The slot too, but neither the cursor nor a notification. */
static inline void script_commit_without_notifying(shmr *v, struct report *r) {
    script_commit_without_slot(v, r);
    OK(shmr_insert(v, 0, r->block.block, shmr_state_generation(r->block.state), 8));
    shmr_add_seq_cst(&shmr_ring_at(v, 0)->commit_cursor, UINT64_MAX);
}

static inline void script_lease(shmr *v, struct report *r) { OK(shmr_lease(v, 0, 1, NOT_AT_ALL, &r->block)); }

static inline void script_lease_without_cursor(shmr *v, struct report *r) {
    OK(shmr_lease(v, 0, 1, NOT_AT_ALL, &r->block));
    shmr_add_seq_cst(&shmr_ring_at(v, 0)->lease_cursor, UINT64_MAX);
}

static inline void script_release_without_hint(shmr *v, struct report *r) {
    OK(shmr_lease(v, 0, 1, NOT_AT_ALL, &r->block));
    shmr_store_release(&shmr_record_at(v, r->block.block)->state,
                       shmr_state_pack(shmr_state_generation(r->block.state), 0, 0, 0, SHMR_FREE));
}

static inline void script_hold(shmr *v, struct report *r) {
    shmr_ref ref, held;
    OK(shmr_lease(v, 0, 1, NOT_AT_ALL, &r->block));
    OK(shmr_references(v, &r->block, &ref, 1));
    OK(shmr_hold(v, ref.block, ref.generation, &held));
    OK(shmr_release(v, &r->block));
    r->ref = ref;
}

static inline void script_publish_and_send(shmr *v, struct report *r) {
    shmr_block b = {0};
    OK(shmr_claim(v, 50000, NULL, 0, -1, NOT_AT_ALL, &b));
    b.length = 50000;
    memset(bytes_of(v, &b), 9, 50000);
    OK(shmr_publish(v, &b, &r->ref));
    OK(shmr_claim(v, 10, &r->ref, 1, -1, NOT_AT_ALL, &b));
    b.length = 10;
    OK(shmr_commit(v, 0, 1, -1, NOT_AT_ALL, &b));
}

static inline void script_extents_and_groups(shmr *v, struct report *r) {
    script_claim(v, r);
    /* Died while it was reserving one more of each. */
    for (uint32_t e = 0; e < v->g.extents; e++)
        if (shmr_load_relaxed(shmr_extent_at(v, e)) == 0) {
            shmr_store_release(shmr_extent_at(v, e), v->self + 1);
            break;
        }
    for (uint32_t g = 0; g < v->g.groups; g++)
        if (shmr_load_relaxed(&shmr_group_at(v, g)->owner) == 0) {
            shmr_store_release(&shmr_group_at(v, g)->owner, v->self + 1);
            break;
        }
}

static inline void script_joining(shmr *v, struct report *r) {
    script_claim(v, r);
    struct shmr_participant *p = shmr_participant_at(v, v->self);
    shmr_store_relaxed(&p->start_time, 12345); /* its predecessor's */
    shmr_store_release(&p->life, shmr_life_pack(v->epoch, shmr_namespace_tag(v), v->pid, SHMR_JOINING));
}

#endif
