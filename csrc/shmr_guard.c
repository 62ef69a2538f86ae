/* SPDX-License-Identifier: BSD-3-Clause */
/* A participant may cut the region's file at any moment, and whoever then touches what lies behind its new end gets
 * SIGBUS. In a region of ours that is no reason to die: private memory, all zero, takes the place of the rest of the
 * mapping, and from then on every call of this process on the region says that it was cut. Whatever else raises SIGBUS
 * is left to the handler that was there before. */
#include "shmr_internal.h"

#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>

#define GUARDED_MAX 256 /* mappings of one process; those beyond are not guarded */

static shmr_count guarded[GUARDED_MAX]; /* shmr_mapping *: read by the handler, at any moment */
static pthread_mutex_t guarding = PTHREAD_MUTEX_INITIALIZER;
static struct sigaction before;

static bool mend(const char *at) {
    for (int i = 0; i < GUARDED_MAX; i++) {
        shmr_mapping *m = (shmr_mapping *)(uintptr_t)shmr_count_get(&guarded[i]); /* private to this process */
        if (!m || at < m->base || at >= m->base + m->bytes) continue;
        char *page = (char *)((uintptr_t)at & ~(uintptr_t)(SHMR_PAGE - 1));
        shmr_count_add(&m->cut, 1);
        return mmap(page, (size_t)(m->base + m->bytes - page), PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0) != MAP_FAILED;
    }
    return false;
}

static void on_bus_error(int number, siginfo_t *info, void *context) {
    int error = errno;
    bool mended = info->si_code > 0 && mend(info->si_addr);
    errno = error;
    if (mended) return;
    if (before.sa_flags & SA_SIGINFO) {
        before.sa_sigaction(number, info, context);
    } else if (before.sa_handler != SIG_DFL && before.sa_handler != SIG_IGN) {
        before.sa_handler(number);
    } else { /* an access is repeated when we return, and then ends the process */
        sigaction(number, &before, NULL);
        if (info->si_code <= 0) raise(number);
    }
}

/* Called with `guarding` held. Somebody may have put a handler of his own in the place of ours since. */
static void install(void) {
    struct sigaction there, ours = {.sa_sigaction = on_bus_error, .sa_flags = SA_SIGINFO | SA_ONSTACK};
    if (sigaction(SIGBUS, NULL, &there) != 0) return;
    if (there.sa_flags & SA_SIGINFO && there.sa_sigaction == on_bus_error) return;
    before = there;
    sigemptyset(&ours.sa_mask);
    sigaction(SIGBUS, &ours, NULL);
}

void shmr_guard(shmr_mapping *m) {
    pthread_mutex_lock(&guarding);
    install();
    for (int i = 0; i < GUARDED_MAX; i++)
        if (!shmr_count_get(&guarded[i])) {
            shmr_count_add(&guarded[i], (int64_t)(uintptr_t)m);
            break;
        }
    pthread_mutex_unlock(&guarding);
}

void shmr_unguard(const shmr_mapping *m) {
    pthread_mutex_lock(&guarding);
    for (int i = 0; i < GUARDED_MAX; i++)
        if (shmr_count_get(&guarded[i]) == (int64_t)(uintptr_t)m) shmr_count_add(&guarded[i], -(int64_t)(uintptr_t)m);
    pthread_mutex_unlock(&guarding);
}

/* A fork by another thread in between would leave `guarding` locked in the child for ever. */
void shmr_guard_before_fork(void) { pthread_mutex_lock(&guarding); }
void shmr_guard_after_fork(void) { pthread_mutex_unlock(&guarding); }
