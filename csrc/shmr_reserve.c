/* SPDX-License-Identifier: BSD-3-Clause */
/* Memory is reserved before it is touched: a sparse file that cannot grow would answer a store with SIGBUS,
 * and inside a memory cgroup a too large reservation is answered by the OOM killer, so its headroom is asked
 * first. Reservation in steps of 2 MiB: one page, then MADV_COLLAPSE, which makes one huge page of it five
 * times faster than the kernel faults the small ones in; where that is refused, the rest by posix_fallocate.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>

#include "shmr_internal.h"

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif

#define LEVELS 8
/* What of a memory cgroup we leave: for arrays an eighth of it, at most so many bytes; for what little is needed
 * to say that there is no room, less. */
#define SLACK_MAX (128 << 20)
#define SLACK_MIN (1 << 20)

/* Files of the memory cgroups above us that have a limit; opened once a process, read at each reservation. */
static struct {
    int limit, usage, stat;
    int version;
} levels[LEVELS];
static int level_count;
static pthread_once_t levels_once = PTHREAD_ONCE_INIT;

static int64_t read_number(int fd) {
    char text[64];
    ssize_t n = pread(fd, text, sizeof text - 1, 0);
    if (n <= 0) return -1;
    text[n] = 0;
    if (text[0] < '0' || text[0] > '9') return -1; /* "max" */
    unsigned long long value = strtoull(text, NULL, 10);
    return value > (1ull << 60) ? -1 : (int64_t)value; /* version 1 says "none" by a huge number */
}

static int64_t inactive_file(int fd, int version) {
    char text[4096];
    ssize_t n = pread(fd, text, sizeof text - 1, 0);
    if (n <= 0) return 0;
    text[n] = 0;
    const char *key = version == 1 ? "\ntotal_inactive_file " : "\ninactive_file ";
    const char *at = strstr(text, key);
    return at ? strtoll(at + strlen(key), NULL, 10) : 0;
}

static void open_level(const char *dir, int version) {
    char path[4352];
    const char *names[2][2] = {{"memory.limit_in_bytes", "memory.usage_in_bytes"},
                               {"memory.max", "memory.current"}};
    if (level_count == LEVELS) return;
    snprintf(path, sizeof path, "%s/%s", dir, names[version - 1][0]);
    int limit = open(path, O_RDONLY | O_CLOEXEC);
    if (limit < 0) return;
    snprintf(path, sizeof path, "%s/%s", dir, names[version - 1][1]);
    int usage = read_number(limit) < 0 ? -1 : open(path, O_RDONLY | O_CLOEXEC);
    if (usage < 0) {
        close(limit);
        return;
    }
    snprintf(path, sizeof path, "%s/memory.stat", dir);
    levels[level_count].limit = limit;
    levels[level_count].usage = usage;
    levels[level_count].stat = open(path, O_RDONLY | O_CLOEXEC);
    levels[level_count].version = version;
    level_count++;
}

static void find_levels(void) {
    FILE *file = fopen("/proc/self/cgroup", "re");
    if (!file) return;
    char line[4096];
    while (fgets(line, sizeof line, file)) {
        line[strcspn(line, "\n")] = 0;
        char *controllers = strchr(line, ':');
        if (!controllers) continue;
        char *path = strchr(++controllers, ':');
        if (!path) continue;
        *path++ = 0;
        int version = *controllers == 0 ? 2 : 1;
        if (version == 1 && strcmp(controllers, "memory") != 0) continue;
        const char *root = version == 1 ? "/sys/fs/cgroup/memory" : "/sys/fs/cgroup";
        char dir[4224];
        while (path[0]) { /* the group itself and every one above it */
            snprintf(dir, sizeof dir, "%s%s", root, strcmp(path, "/") == 0 ? "" : path);
            open_level(dir, version);
            char *slash = strrchr(path, '/');
            if (!slash || path[1] == 0) break;
            slash[slash == path ? 1 : 0] = 0;
        }
    }
    fclose(file);
}

/* Would `bytes` more fit into every memory cgroup above us? */
static bool cgroup_has_room(uint64_t bytes, int64_t slack_max) {
    pthread_once(&levels_once, find_levels);
    for (int i = 0; i < level_count; i++) {
        int64_t limit = read_number(levels[i].limit), usage = read_number(levels[i].usage);
        if (limit < 0 || usage < 0) continue;
        int64_t room = limit - usage;
        /* Page tables and everybody's private memory need some too: who takes the last byte is killed for it. */
        int64_t need = (int64_t)bytes + (limit / 8 < slack_max ? limit / 8 : slack_max);
        /* What the kernel can drop by itself is no reason to refuse. */
        if (room < need) room += inactive_file(levels[i].stat, levels[i].version);
        if (room < need) return false;
    }
    return true;
}

/* posix_fallocate that gets on while signals come all the time: many kernels undo a call in which one comes, so then
 * less is asked for at once. An error number, or 0. */
static int allocate(int fd, uint64_t offset, uint64_t bytes) {
    uint64_t piece = bytes;
    while (bytes) {
        if (piece > bytes) piece = bytes;
        int error = posix_fallocate(fd, (off_t)offset, (off_t)piece);
        if (error == EINTR) {
            if (piece > SHMR_PAGE) piece = (piece / 2 + SHMR_PAGE - 1) / SHMR_PAGE * SHMR_PAGE;
        } else if (error) {
            return error;
        } else {
            offset += piece;
            bytes -= piece;
        }
    }
    return 0;
}

/* Reserve part of the region. NO_MEMORY: the file system or the cgroup is full. With h->lock held. */
int shmr_reserve(shmr *h, uint64_t offset, uint64_t bytes) {
    int status = shmr_check_file(h); /* a file that was cut would be lengthened, part of the way */
    if (status != SHMR_OK) return status;
    if (!cgroup_has_room(bytes, SLACK_MIN))
        return shmr_fail(SHMR_NO_MEMORY, ENOMEM, "the memory cgroup has too little headroom");
    int error = allocate(h->file.fd, offset, bytes);
    if (error == ENOSPC || error == ENOMEM)
        return shmr_fail(SHMR_NO_MEMORY, error, "the file system that holds the region is full");
    if (error) return shmr_fail(SHMR_SYSTEM, error, "posix_fallocate");
    return SHMR_OK;
}

int shmr_reserve_extent(shmr *h, uint32_t extent) {
    uint64_t offset = h->g.arena_at + (uint64_t)extent * SHMR_EXTENT;
    int status = shmr_check_file(h);
    if (status != SHMR_OK) return status;
    if (!cgroup_has_room(SHMR_EXTENT, SLACK_MAX))
        return shmr_fail(SHMR_NO_MEMORY, ENOMEM, "the memory cgroup has too little headroom");
    int error = allocate(h->file.fd, offset, SHMR_PAGE);
    if (error == 0) {
        char *address = h->base + offset;
        *(volatile char *)address = 0; /* the page must be mapped for the collapse to find it */
        if (madvise(address, SHMR_EXTENT, MADV_COLLAPSE) == 0) return SHMR_OK;
        error = allocate(h->file.fd, offset, SHMR_EXTENT);
    }
    if (error == ENOSPC || error == ENOMEM)
        return shmr_fail(SHMR_NO_MEMORY, error, "the file system that holds the region is full");
    if (error) return shmr_fail(SHMR_SYSTEM, error, "posix_fallocate");
    return SHMR_OK;
}
