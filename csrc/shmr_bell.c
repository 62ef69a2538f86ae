/* SPDX-License-Identifier: BSD-3-Clause */
/* The bell of a doorbell: a binary semaphore with one waiter, in one shared word, on the kernel's futex.
 *
 *   RUNG    a token: somebody rang since the waiter last woke
 *   SOON    that was for something which is yet to come: it is worth spinning for it
 *   ASLEEP  the waiter is in the kernel, or on its way there; it stands until the waiter takes it away itself, so
 *           that after a ringer that died before its system call the next one makes it
 *
 * glibc's sem_t would do the same, but keeps a word of its own beside the value that becomes part of the futex
 * operation: whoever can write to it makes sem_post abort, sleep for ever, or have the kernel write through what
 * happens to be in a register. Of this word only three bits are looked at, and anything in it is at worst a wake-up
 * too many, or one a slice late.
 */
#include <errno.h>
#include <linux/futex.h>
#include <limits.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "shmr_internal.h"

#define RUNG UINT64_C(1)
#define ASLEEP UINT64_C(2)
#define SOON UINT64_C(4)

/* The kernel looks at 32 bits: the low half. */
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the low half of a word is taken to come first"
#endif

static void ring(shmr_word *bell, uint64_t bits) {
    if (!(shmr_or_release(bell, bits) & ASLEEP)) return; /* R15 W8 */
    SHMR_STEP(bell);
    syscall(SYS_futex, bell, FUTEX_WAKE, INT_MAX, NULL, NULL, 0); /* all: a stranger may have queued up, too */
}

void shmr_bell_ring(shmr_word *bell) { ring(bell, RUNG); }

void shmr_bell_announce(shmr_word *bell) { ring(bell, RUNG | SOON); }

bool shmr_bell_rung(const shmr_word *bell) { return shmr_load_relaxed(bell) & RUNG; } /* a hint: who rang changed the source first, and the waiter tries again */

bool shmr_bell_asleep(const shmr_word *bell) { return shmr_load_relaxed(bell) & ASLEEP; } /* a hint for a choice among waiters */

void shmr_bell_silence(shmr_word *bell) { shmr_exchange_acquire(bell, 0); } /* A15 W8 */

/* Sleep until it rings (0, or EAGAIN if something is only announced), until `end` (ETIMEDOUT), or until a signal (EINTR).
 * May return 0 without a ring. */
int shmr_bell_wait(shmr_word *bell, int64_t end) {
    uint64_t quiet = 0;
    int error = 0;
    if (shmr_cas_acq_rel(bell, &quiet, ASLEEP)) { /* A15 R15 W8 */
        struct timespec t = {end / 1000000000, end % 1000000000};
        long result = syscall(SYS_futex, bell, FUTEX_WAIT_BITSET, (uint32_t)ASLEEP, &t, NULL, FUTEX_BITSET_MATCH_ANY);
        if (result != 0 && (errno == ETIMEDOUT || errno == EINTR)) error = errno;
    }
    uint64_t rung = shmr_exchange_acquire(bell, 0); /* A15 W8 */
    if (!(rung & RUNG)) return error;
    return rung & SOON ? EAGAIN : 0;
}
