/* SPDX-License-Identifier: BSD-3-Clause */
/* A region with two participants of this process. */
#ifndef PAIR_H
#define PAIR_H

#include "harness.h"

static int fd;
static shmr *h, *other;

static inline void open_config(const shmr_config *config) {
    h = create_region(config, &fd);
    other = attach_region(fd);
}
static inline void open_pair(void) {
    shmr_config config = small_config();
    config.doorbells = 4;
    config.capacity[0] = 4;
    open_config(&config);
}
static inline void close_pair(void) {
    leave_region(other);
    check_whole(h);
    leave_region(h);
    close(fd);
}
/* After damage that is for good. */
static inline void drop_pair(void) {
    OK(shmr_close(other, 1));
    shmr_free(other);
    OK(shmr_close(h, 1));
    shmr_free(h);
    close(fd);
}

static inline shmr_block claim(shmr *by, uint64_t bytes) {
    shmr_block b = {0};
    OK(shmr_claim(by, bytes, NULL, 0, -1, NOT_AT_ALL, &b));
    b.length = bytes;
    return b;
}
static inline shmr_ref publish(shmr *by, uint64_t bytes) {
    shmr_block b = claim(by, bytes);
    shmr_ref ref;
    OK(shmr_publish(by, &b, &ref));
    return ref;
}
static inline struct shmr_record *record_of(const shmr_ref *ref) { return shmr_record_at(h, ref->block); }

#endif
