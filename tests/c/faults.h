/* SPDX-License-Identifier: BSD-3-Clause */
/* Calls of libc that fail on demand: the linker's --wrap brings every call of the core here (csrc/Makefile has the
 * list). The n-th call of the kinds that may fail, fails; or each of them does. */
#ifndef FAULTS_H
#define FAULTS_H

#include <fcntl.h>
#include <poll.h>
#include <stdarg.h>
#include <sys/stat.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>

#include "harness.h"

enum fault_kind {
    FAULT_MALLOC = 1 << 0,
    FAULT_CALLOC = 1 << 1,
    FAULT_REALLOC = 1 << 2,
    FAULT_MMAP = 1 << 3,
    FAULT_FSTAT = 1 << 4,
    FAULT_STAT = 1 << 5,
    FAULT_FCNTL = 1 << 6,
    FAULT_FALLOCATE = 1 << 7,
    FAULT_MADVISE = 1 << 8,
    FAULT_SYSCALL = 1 << 9, /* pidfd_open */
    FAULT_FOPEN = 1 << 10,
    FAULT_THREAD = 1 << 11,
    FAULT_TRYLOCK = 1 << 12,
    FAULT_NANOSLEEP = 1 << 13,
    FAULT_POLL = 1 << 14,

    FAULT_MEMORY = FAULT_MALLOC | FAULT_CALLOC | FAULT_REALLOC | FAULT_MMAP,
};

static struct {
    unsigned kinds;  /* of calls that are counted */
    int64_t left;    /* until one fails; 0: none does */
    unsigned always; /* kinds that fail each time */
    int error;
    bool fired;
} fault;

/* The call number `nth` of these kinds fails with `error`, once. */
static inline void arm_fault(unsigned kinds, int64_t nth, int error) {
    fault.kinds = kinds;
    fault.left = nth;
    fault.error = error;
    fault.fired = false;
}
/* From now on every call of these kinds fails with `error`. */
static inline void break_calls(unsigned kinds, int error) {
    fault.always = kinds;
    fault.error = error;
}
/* All is well again; whether anything had failed. */
static inline bool disarm_faults(void) {
    bool fired = fault.fired;
    fault.kinds = fault.always = 0;
    fault.left = 0;
    fault.fired = false;
    return fired;
}

static inline bool fault_hits(enum fault_kind kind) {
    bool hits = fault.always & (unsigned)kind;
    if (fault.kinds & (unsigned)kind && fault.left > 0) hits |= --fault.left == 0;
    if (hits) errno = fault.error;
    fault.fired |= hits;
    return hits;
}

/* What a test says instead of the file of that name; NULL: the file itself. */
static const char *(*fake_file)(const char *path);
/* What a test does instead of sleeping on a doorbell; NULL: sleep. */
static int (*fake_sleep)(void);

#define WRAPPED(type, name, parameters, ...)      \
    type __real_##name parameters;                \
    type __wrap_##name parameters;                \
    type __wrap_##name parameters { __VA_ARGS__ }

WRAPPED(void *, malloc, (size_t bytes), return fault_hits(FAULT_MALLOC) ? NULL : __real_malloc(bytes);)
WRAPPED(void *, calloc, (size_t count, size_t bytes),
        return fault_hits(FAULT_CALLOC) ? NULL : __real_calloc(count, bytes);)
WRAPPED(void *, realloc, (void *old, size_t bytes),
        return fault_hits(FAULT_REALLOC) ? NULL : __real_realloc(old, bytes);)
WRAPPED(void *, mmap, (void *at, size_t bytes, int protection, int flags, int fd, off_t offset),
        return fault_hits(FAULT_MMAP) ? MAP_FAILED : __real_mmap(at, bytes, protection, flags, fd, offset);)
WRAPPED(int, fstat, (int fd, struct stat *s), return fault_hits(FAULT_FSTAT) ? -1 : __real_fstat(fd, s);)
WRAPPED(int, stat, (const char *path, struct stat *s),
        return fault_hits(FAULT_STAT) ? -1 : __real_stat(path, s);)
WRAPPED(int, posix_fallocate, (int fd, off_t offset, off_t bytes),
        return fault_hits(FAULT_FALLOCATE) ? fault.error : __real_posix_fallocate(fd, offset, bytes);)
WRAPPED(int, madvise, (void *at, size_t bytes, int advice),
        return fault_hits(FAULT_MADVISE) ? -1 : __real_madvise(at, bytes, advice);)
WRAPPED(int, pthread_create,
        (pthread_t *thread, const pthread_attr_t *attributes, void *(*start)(void *), void *argument),
        return fault_hits(FAULT_THREAD) ? fault.error : __real_pthread_create(thread, attributes, start, argument);)
WRAPPED(int, pthread_mutex_trylock, (pthread_mutex_t *lock),
        return fault_hits(FAULT_TRYLOCK) ? EBUSY : __real_pthread_mutex_trylock(lock);)
WRAPPED(int, nanosleep, (const struct timespec *asked, struct timespec *left),
        return fault_hits(FAULT_NANOSLEEP) ? -1 : __real_nanosleep(asked, left);)
WRAPPED(int, poll, (struct pollfd *fds, nfds_t count, int timeout), {
    if (!fault_hits(FAULT_POLL)) return __real_poll(fds, count, timeout);
    errno = fault.error;
    fds->revents = POLLNVAL;
    return fault.error ? -1 : 1;
})
/* The watcher's, at its parent's end: what it has covered counts, too. */
void __real__exit(int status);
void __wrap__exit(int status);
void __wrap__exit(int status) {
#ifdef SHMR_COVERAGE
    __gcov_dump();
#endif
    __real__exit(status);
}

WRAPPED(int, fcntl, (int fd, int command, ...), {
    va_list rest;
    va_start(rest, command);
    long argument = va_arg(rest, long);
    va_end(rest);
    return fault_hits(FAULT_FCNTL) ? -1 : __real_fcntl(fd, command, argument);
})
WRAPPED(long, syscall, (long number, ...), {
    long a[6];
    va_list rest;
    va_start(rest, number);
    for (int i = 0; i < 6; i++) a[i] = va_arg(rest, long); /* the kernel takes what it needs of them */
    va_end(rest);
    if (number == SYS_futex && (a[1] & FUTEX_CMD_MASK) == FUTEX_WAIT_BITSET && fake_sleep) {
        errno = fake_sleep();
        return errno ? -1 : 0;
    }
    return fault_hits(FAULT_SYSCALL) ? -1 : __real_syscall(number, a[0], a[1], a[2], a[3], a[4], a[5]);
})

/* Such files in the order of their opening; the test may write into them later. */
static int faked_files[64];
static int faked_count;

static inline void write_text(int file, const char *text) {
    if (ftruncate(file, 0) != 0 || pwrite(file, text, strlen(text), 0) < 0) abort();
}
static inline int open_text(const char *text) {
    int file = memfd_create("fake", MFD_CLOEXEC);
    write_text(file, text);
    if (faked_count < 64) faked_files[faked_count++] = file;
    return file;
}
WRAPPED(FILE *, fopen, (const char *path, const char *mode), {
    const char *text = fake_file ? fake_file(path) : NULL;
    if (text) return fdopen(open_text(text), "r");
    return fault_hits(FAULT_FOPEN) ? NULL : __real_fopen(path, mode);
})
WRAPPED(int, open, (const char *path, int flags, ...), {
    const char *text = fake_file ? fake_file(path) : NULL;
    va_list rest;
    va_start(rest, flags);
    unsigned mode = flags & O_CREAT ? va_arg(rest, unsigned) : 0;
    va_end(rest);
    return text ? open_text(text) : __real_open(path, flags, mode);
})

#endif
