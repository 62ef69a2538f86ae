/* SPDX-License-Identifier: BSD-3-Clause */
/* A worker must not outlive its main process, even while user code in it holds the interpreter for minutes:
 * a thread of plain C waits for the main process's pidfd and ends this one. (PR_SET_PDEATHSIG will not do: it
 * fires when the *thread* that started us ends.) The same thread gives back free memory that others wait for. */
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "shmr_internal.h"

#define TICK_MS 250

static shmr *served; /* set once, by the thread that serves */

static void *watch(void *argument) {
    struct pollfd parent = {(int)(intptr_t)argument, POLLIN, 0};
    while (poll(&parent, 1, TICK_MS) < 1) {
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

void shmr_watch_shortage(shmr *h) {
    shmr_count_add(&h->handle, 1); /* for good: the thread has no end of its own */
    shmr_pointer_set((void **)&served, h);
}

int shmr_watch_parent(int pidfd) {
    pthread_t thread;
    pthread_attr_t attributes;
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* signals are the interpreter's business */
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, 256 << 10);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    int error = pthread_create(&thread, &attributes, watch, (void *)(intptr_t)pidfd);
    pthread_attr_destroy(&attributes);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return error ? shmr_fail(SHMR_SYSTEM, error, "pthread_create") : SHMR_OK;
}
