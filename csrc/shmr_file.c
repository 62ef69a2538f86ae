/* SPDX-License-Identifier: BSD-3-Clause */
/* Descriptors that are kept for long. Code that closes whatever it finds (who becomes a daemon, `closefrom`) closes
 * ours too, and the number is soon another file's. So before a descriptor is believed or closed we look whether it
 * still is the file that we had. (Between that look and the use other threads of the process can still do harm.)
 */
#include <errno.h>
#include <limits.h>
#include <poll.h>
#include <stdio.h>
#include <sys/select.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "shmr_internal.h"

#define ANONYMOUS 0x09041934 /* a file system where all files have one inode: that of pidfds before Linux 6.9 */
#define WAITED_FOR UINT32_MAX

/* The process that a pidfd is of: 0 if that cannot be told, or it is no pidfd. */
uint32_t shmr_pidfd_pid(int fd) {
    char path[64], line[256];
    unsigned pid = 0;
    snprintf(path, sizeof path, "/proc/self/fdinfo/%d", fd);
    FILE *file = fopen(path, "re");
    if (!file) return 0;
    while (fgets(line, sizeof line, file))
        if (sscanf(line, "Pid: %u", &pid) == 1) break; /* -1 is WAITED_FOR */
    fclose(file);
    return pid;
}

/* select() on one descriptor, of any number; or a mere pause (-1). poll() refuses to look at more descriptors than this
 * process may have, and where RLIMIT_NOFILE is 0 that is one. */
static bool is_readable(int fd, int milliseconds) {
    struct timeval t = {milliseconds / 1000, milliseconds % 1000 * 1000};
    unsigned long *bits = fd < 0 ? NULL : calloc((size_t)fd / LONG_BIT + 1, sizeof *bits);
    if (bits) bits[fd / LONG_BIT] = 1ul << fd % LONG_BIT;
    int count = select(bits ? fd + 1 : 0, (fd_set *)bits, NULL, NULL, &t);
    free(bits);
    return count > 0;
}

bool shmr_has_ended(int pidfd, int milliseconds) {
    struct pollfd poll_fd = {pidfd, POLLIN, 0};
    int count = poll(&poll_fd, 1, milliseconds);
    if (count < 0 && errno == EINVAL) return is_readable(pidfd, milliseconds);
    return count > 0 && poll_fd.revents & POLLIN;
}

int shmr_file_keep(shmr_file *file, int fd) {
    struct stat s;
    struct statfs on;
    if (fstat(fd, &s) != 0) return 0;
    bool anonymous = fstatfs(fd, &on) == 0 && on.f_type == ANONYMOUS;
    *file = (shmr_file){fd, anonymous ? shmr_pidfd_pid(fd) : 0, s.st_dev, s.st_ino};
    return 1;
}

int shmr_file_is_ours(const shmr_file *file, uint64_t *bytes) {
    struct stat s;
    if (file->fd < 0 || fstat(file->fd, &s) != 0 || s.st_dev != file->device || s.st_ino != file->inode) return 0;
    if (bytes) *bytes = (uint64_t)s.st_size;
    if (!file->pid) return 1;
    uint32_t pid = shmr_pidfd_pid(file->fd);
    return pid == file->pid || pid == WAITED_FOR;
}

void shmr_file_close(shmr_file *file) {
    if (shmr_file_is_ours(file, NULL)) close(file->fd);
    file->fd = -1;
}
