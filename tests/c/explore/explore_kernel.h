/* SPDX-License-Identifier: BSD-3-Clause */
/* Part of explore.c: what the core asks the kernel and the C library. */
#ifndef EXPLORE_KERNEL_H
#define EXPLORE_KERNEL_H

static struct ex_site futex_site = {"futex", "", 0, EX_LOAD, EX_RELAXED, EX_RELAXED, false};

/* Sleep until it is woken (on a word) or `end`. The value: as errno has it. */
static int sleep_on(shmr_word *word, int64_t end) {
    struct process *p = &processes[current];
    settle(p);
    int kill = left.kills > 0, interrupt = left.interrupts > 0;
    int taken = choose(GOING_TO_SLEEP, 1 + kill + interrupt, deadly);
    if (kill && taken == 1) perish();
    if (taken) {
        left.interrupts--;
        observe(3);
        return EINTR;
    }
    if (tracing) printf("  %d  sleeps until %lld\n", current, (long long)end);
    p->status = ASLEEP;
    p->word = word;
    p->woken = false;
    p->end = end;
    leave_to_others();
    may_die();
    observe((uint64_t)now);
    observe(p->woken);
    if (tracing) printf("  %d  %s\n", current, p->woken ? "is woken" : "its time is over");
    return p->woken ? 0 : ETIMEDOUT;
}

/* The kernel looks at the word as it is, and wakes who sleeps on it; neither orders anything. */
static long futex(shmr_word *word, int operation, uint32_t expected, const struct timespec *end) {
    step(cell_of(word), true, &futex_site);
    settle(&processes[current]);
    if (operation == FUTEX_WAKE) {
        long count = 0;
        for (int i = 0; i < process_count; i++)
            if (processes[i].status == ASLEEP && processes[i].word == word && !processes[i].woken) {
                processes[i].woken = true;
                count++;
            }
        observe((uint64_t)count);
        return count;
    }
    observe(word->value);
    errno = (uint32_t)word->value == expected ? sleep_on(word, (int64_t)end->tv_sec * 1000000000 + end->tv_nsec) : EAGAIN;
    return errno ? -1 : 0;
}

int ex_nanosleep(const struct timespec *time, struct timespec *rest) {
    (void)rest;
    errno = sleep_on(NULL, now + (int64_t)time->tv_sec * 1000000000 + time->tv_nsec);
    return errno ? -1 : 0;
}
int ex_clock_gettime(clockid_t clock, struct timespec *time) {
    (void)clock;
    time->tv_sec = now / 1000000000;
    time->tv_nsec = now % 1000000000;
    if (current >= 0) observe((uint64_t)now);
    return 0;
}

pid_t ex_getpid(void) { return FIRST_PID + (current >= 0 ? current : host_as >= 0 ? host_as : EX_PROCESSES); }

static int process_of(long pid) { return (int)(pid - FIRST_PID); }

/* pidfd_open: a descriptor that is the pid. Death is learnt from the kernel, after all that the dead one did. */
long ex_syscall(long number, ...) {
    va_list arguments;
    va_start(arguments, number);
    long result = -1;
    if (number == SYS_pidfd_open) {
        result = va_arg(arguments, pid_t);
    } else if (number == SYS_futex) {
        shmr_word *word = va_arg(arguments, shmr_word *);
        int operation = va_arg(arguments, int);
        uint32_t value = va_arg(arguments, uint32_t);
        const struct timespec *end = va_arg(arguments, const struct timespec *);
        result = current < 0 ? 0 : futex(word, operation, value, end);
    }
    va_end(arguments);
    return result;
}
/* Of a pidfd, the number alone says whose it is. */
int ex_fstat(int fd, struct stat *out) {
    return fd < FIRST_PID ? fstat(fd, out) : (memset(out, 0, sizeof *out), 0);
}
/* When a process started; of memory cgroups there are none. */
FILE *ex_fopen(const char *path) {
    static char text[128];
    unsigned pid;
    if (sscanf(path, "/proc/%u/task", &pid) != 1) return NULL;
    int length = snprintf(text, sizeof text, "%u (x) S 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 %u", pid, pid + 7000);
    return fmemopen(text, (size_t)length, "r");
}
int ex_poll(struct pollfd *fds, nfds_t count, int timeout) {
    (void)count, (void)timeout;
    int i = process_of(fds->fd);
    bool dead = i >= 0 && i < process_count && processes[i].status == KILLED;
    fds->revents = dead ? POLLIN : 0;
    if (current >= 0) {
        settle(&processes[current]);
        observe(dead);
        if (dead && weak) learn(&processes[current].known, &processes[i].known);
    }
    return dead;
}

void *ex_malloc(size_t bytes) {
    size_t room = (bytes + 15) & ~(size_t)15;
    if (heap_used + room + 16 > HEAP_BYTES) {
        fprintf(stderr, "the explorer's heap is full\n");
        exit(2);
    }
    char *at = heap + heap_used;
    *(size_t *)(void *)at = room;
    heap_used += room + 16;
    if (heap_used > heap_peak) heap_peak = heap_used;
    return at + 16;
}
void *ex_calloc(size_t count, size_t bytes) { return ex_malloc(count * bytes); } /* fresh memory is zero */
void *ex_realloc(void *old, size_t bytes) {
    size_t room = old ? *(size_t *)(void *)((char *)old - 16) : 0;
    if (bytes <= room) return old;
    void *fresh = ex_malloc(bytes);
    if (room) memcpy(fresh, old, room);
    return fresh;
}
void *ex_mmap(void *at, size_t bytes, int protection, int flags, int fd, off_t offset) {
    if (fd < 0 && protection != PROT_NONE) return ex_malloc(bytes);
    if (fd >= 0 && !(flags & MAP_FIXED)) return region; /* a look at the header */
    /* All participants are in this process: private, so that a fork has a world of its own. */
    if (fd >= 0) flags = (flags & ~MAP_SHARED) | MAP_PRIVATE;
    void *mapped = mmap(at, bytes, protection, flags, fd, offset);
    if (fd >= 0) region = mapped;
    return mapped;
}

int ex_lock(pthread_mutex_t *mutex) {
    int *word = (int *)mutex;
    if (current >= 0) settle(&processes[current]);
    while (*word && current >= 0) {
        processes[current].status = LOCKED_OUT;
        processes[current].mutex = mutex;
        leave_to_others();
    }
    *word = 1;
    return 0;
}
int ex_unlock(pthread_mutex_t *mutex) {
    if (current >= 0) settle(&processes[current]);
    *(int *)mutex = 0;
    return 0;
}

#endif
