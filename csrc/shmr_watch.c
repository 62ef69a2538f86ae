/* SPDX-License-Identifier: BSD-3-Clause */
/* A worker must not outlive its main process, even while user code in it holds the interpreter for minutes:
 * a thread of plain C waits for the main process's pidfd and ends this one. (PR_SET_PDEATHSIG will not do: it
 * fires when the *thread* that started us ends.) Code that closes whatever it finds may close that pidfd: then a new one
 * is opened, or, if there is none to be had, we see that we have another parent. The same thread gives back free memory
 * that others wait for.
 * What C code in a worker prints is to reach main while it runs, and before its result. */
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "shmr_internal.h"

#define TICK_MS 250

static shmr *served; /* set once, by the thread that serves */

struct main_process {
    shmr_file pidfd;
    uint32_t pid;
    uint64_t start; /* 0: unknown */
    bool is_parent;
};

/* The descriptor is not ours any more: what else tells whether main has ended? Opens a new one, if there is any. */
static bool is_gone(struct main_process *process) {
    process->pidfd.fd = -1;
    if (process->is_parent && (uint32_t)getppid() != process->pid) return true;
    int fd = (int)syscall(SYS_pidfd_open, (pid_t)process->pid, 0);
    if (fd < 0) return errno == ESRCH;
    uint64_t found = shmr_start_time(process->pid);
    bool another = process->start && found && found != process->start; /* has its pid by now */
    if (another || !shmr_file_keep(&process->pidfd, fd)) close(fd);
    return another;
}

static void *watch(void *argument) {
    struct main_process *process = argument;
    for (;;) {
        bool ready = shmr_has_ended(process->pidfd.fd, TICK_MS);
        if (!shmr_file_is_ours(&process->pidfd, NULL)) ready = is_gone(process);
        if (ready) break;
        shmr *h = shmr_pointer_get((void **)&served);
        /* Somebody is short of memory: ours that is free must not wait until user code returns. */
        if (h && !shmr_count_get(&h->left) && shmr_any_waiter(shmr_header_of(h)->extent_waiters)) shmr_trim(h);
    }
    _exit(0);
}

int shmr_signal_main_thread(uint32_t pid, int number) {
    if (syscall(SYS_tgkill, (pid_t)pid, (pid_t)pid, number) == 0) return SHMR_OK;
    return shmr_fail(SHMR_SYSTEM, errno, "tgkill");
}

void shmr_print_lines(void) { setvbuf(stdout, NULL, _IOLBF, BUFSIZ); }

void shmr_flush_prints(void) { fflush(stdout); }

void shmr_watch_shortage(shmr *h) {
    shmr_count_add(&h->handle, 1); /* for good: the thread has no end of its own */
    shmr_pointer_set((void **)&served, h);
}

int shmr_watch_parent(int pidfd) {
    struct main_process *process = calloc(1, sizeof *process);
    if (!process) return shmr_fail(SHMR_SYSTEM, ENOMEM, "malloc");
    if (!shmr_file_keep(&process->pidfd, pidfd)) process->pidfd.fd = -1;
    process->pid = shmr_pidfd_pid(pidfd);
    if (!process->pid) process->pid = (uint32_t)getppid();
    process->is_parent = process->pid == (uint32_t)getppid();
    process->start = shmr_start_time(process->pid);
    pthread_t thread;
    pthread_attr_t attributes;
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* signals are the interpreter's business */
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, 256 << 10);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    int error = pthread_create(&thread, &attributes, watch, process);
    pthread_attr_destroy(&attributes);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (error) free(process);
    return error ? shmr_fail(SHMR_SYSTEM, error, "pthread_create") : SHMR_OK;
}
