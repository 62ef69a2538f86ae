/* SPDX-License-Identifier: BSD-3-Clause */
/* Reserving memory while signals come all the time. */
#include <fcntl.h>
#include <sys/stat.h>

#include "harness.h"

enum { UNDISTURBED = 64 << 10 }; /* bytes that can be reserved between two signals */

static int64_t interrupted;

/* Instead of libc's: as on a kernel that undoes a call when a signal comes. */
int posix_fallocate(int fd, off_t offset, off_t bytes) {
    if (bytes > UNDISTURBED) {
        interrupted++;
        return EINTR;
    }
    return fallocate(fd, 0, offset, bytes) == 0 ? 0 : errno;
}

static void signals_do_not_keep_memory_from_being_reserved(void) {
    shmr_config config = small_config();
    int fd;
    shmr *h = create_region(&config, &fd);
    CHECK_EQ(shmr_reserve(h, h->g.arena_at + 4096, 3 * MIB + 4096), SHMR_OK);
    struct stat s;
    REQUIRE(fstat(fd, &s) == 0);
    CHECK((uint64_t)s.st_blocks * 512 >= 3 * MIB + 4096);
    shmr_block b = {0};
    OK(shmr_claim(h, 5 * MIB, NULL, 0, -1, NOT_AT_ALL, &b));
    OK(shmr_abort(h, &b));
    CHECK(interrupted > 0);
    leave_region(h);
    close(fd);
}

int main(void) {
    RUN(signals_do_not_keep_memory_from_being_reserved);
    return summary("unit_reserve");
}
