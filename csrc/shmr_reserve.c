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

enum { LIMIT, USAGE, STATISTICS, FILES };
static const char *const names[2][FILES] = {{"memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat"},
                                            {"memory.max", "memory.current", "memory.stat"}};

/* The memory cgroups above us that have a limit: found once a process, their files read at each reservation. */
static struct level {
    shmr_file files[FILES];
    int version;
    char *directory;
} levels[LEVELS];
static int level_count;
static pthread_once_t levels_once = PTHREAD_ONCE_INIT;

static int open_file(const char *directory, int version, int which) {
    char path[4352];
    snprintf(path, sizeof path, "%s/%s", directory, names[version - 1][which]);
    return open(path, O_RDONLY | O_CLOEXEC);
}

static void read_text(int fd, char *text, size_t room) {
    ssize_t n = pread(fd, text, room - 1, 0);
    text[n > 0 ? n : 0] = 0;
}

/* What a file of a group says. Where other code has closed our descriptor the file is opened for the moment. */
static void read_file(const struct level *level, int which, char *text, size_t room) {
    const shmr_file *kept = &level->files[which];
    if (shmr_file_is_ours(kept, NULL)) {
        read_text(kept->fd, text, room);
        return;
    }
    int fd = open_file(level->directory, level->version, which);
    read_text(fd, text, room);
    if (fd >= 0) close(fd);
}

static int64_t read_number(const struct level *level, int which) {
    char text[64];
    read_file(level, which, text, sizeof text);
    if (text[0] < '0' || text[0] > '9') return -1; /* "max"; nothing */
    unsigned long long value = strtoull(text, NULL, 10);
    return value > (1ull << 60) ? -1 : (int64_t)value; /* version 1 says "none" by a huge number */
}

static int64_t inactive_file(const struct level *level) {
    char text[4096];
    read_file(level, STATISTICS, text, sizeof text);
    const char *key = level->version == 1 ? "\ntotal_inactive_file " : "\ninactive_file ";
    const char *at = strstr(text, key);
    return at ? strtoll(at + strlen(key), NULL, 10) : 0;
}

static void open_level(const char *directory, int version) {
    if (level_count == LEVELS) return;
    struct level *level = &levels[level_count];
    level->version = version;
    level->directory = strdup(directory);
    if (!level->directory) return;
    for (int which = 0; which < FILES; which++) {
        int fd = open_file(directory, version, which);
        level->files[which].fd = -1;
        if (fd >= 0 && !shmr_file_keep(&level->files[which], fd)) close(fd);
    }
    if (level->files[USAGE].fd >= 0 && read_number(level, LIMIT) >= 0) {
        level_count++;
        return;
    }
    for (int which = 0; which < FILES; which++) shmr_file_close(&level->files[which]);
    free(level->directory);
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
        int64_t limit = read_number(&levels[i], LIMIT), usage = read_number(&levels[i], USAGE);
        if (limit < 0 || usage < 0) continue;
        int64_t room = limit - usage;
        /* Page tables and everybody's private memory need some too: who takes the last byte is killed for it. */
        int64_t need = (int64_t)bytes + (limit / 8 < slack_max ? limit / 8 : slack_max);
        /* What the kernel can drop by itself is no reason to refuse. */
        if (room < need) room += inactive_file(&levels[i]);
        if (room < need) return false;
    }
    return true;
}

/* posix_fallocate that gets on while signals come all the time: many kernels undo a call in which one comes, so then
 * less is asked for at once. An error number, or 0. */
int shmr_allocate(int fd, uint64_t offset, uint64_t bytes) {
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

/* Memory for part of another file, unless the file system or the cgroup is full. */
bool shmr_reserve_in(int fd, uint64_t offset, uint64_t bytes) {
    return cgroup_has_room(bytes, SLACK_MAX) && shmr_allocate(fd, offset, bytes) == 0;
}

/* Reserve part of the region. NO_MEMORY: the file system or the cgroup is full. With h->lock held. */
int shmr_reserve(shmr *h, uint64_t offset, uint64_t bytes) {
    int status = shmr_check_file(h); /* a file that was cut would be lengthened, part of the way */
    if (status != SHMR_OK) return status;
    if (!cgroup_has_room(bytes, SLACK_MIN))
        return shmr_fail(SHMR_NO_MEMORY, ENOMEM, "the memory cgroup has too little headroom");
    int error = shmr_allocate(h->file.fd, offset, bytes);
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
    int error = shmr_allocate(h->file.fd, offset, SHMR_PAGE);
    if (error == 0) {
        char *address = h->base + offset;
        *(volatile char *)address = 0; /* the page must be mapped for the collapse to find it */
        if (madvise(address, SHMR_EXTENT, MADV_COLLAPSE) == 0) return SHMR_OK;
        error = shmr_allocate(h->file.fd, offset, SHMR_EXTENT);
    }
    if (error == ENOSPC || error == ENOMEM)
        return shmr_fail(SHMR_NO_MEMORY, error, "the file system that holds the region is full");
    if (error) return shmr_fail(SHMR_SYSTEM, error, "posix_fallocate");
    return SHMR_OK;
}
