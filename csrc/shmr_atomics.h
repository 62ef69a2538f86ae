/* SPDX-License-Identifier: BSD-3-Clause */
/* Every access to shared memory that another process may see goes through this file.
 *
 * The order is in the name, so that a call site can be read aloud; this is the only file that includes
 * <stdatomic.h>, so that a test build can replace it by one that makes each access a scheduling point.
 * All shared words are 64 bits wide: one size, lock-free and hence address-free (C11 7.17.5).
 * There are no fences anywhere: ThreadSanitizer does not model them.
 */
#ifndef SHMR_ATOMICS_H
#define SHMR_ATOMICS_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

_Static_assert(ATOMIC_LLONG_LOCK_FREE == 2, "64-bit atomics must be lock-free to work between processes");

/* A word in shared memory. Only the functions below may touch it. */
typedef struct {
    _Atomic uint64_t value;
} shmr_word;

_Static_assert(sizeof(shmr_word) == 8, "a shared word is eight bytes");

/* The seam: a test defines these to yield, or to die, before each access. */
#ifndef SHMR_STEP /* before one that changes something; before a post, too */
#define SHMR_STEP(word) ((void)0)
#endif
#ifndef SHMR_STEP_LOAD
#define SHMR_STEP_LOAD(word) ((void)0)
#endif

#define SHMR_LOAD(suffix, order)                                                     \
    static inline uint64_t shmr_load_##suffix(const shmr_word *word) {               \
        SHMR_STEP_LOAD(word);                                                        \
        return atomic_load_explicit(&((shmr_word *)(uintptr_t)word)->value, order);  \
    }
#define SHMR_STORE(suffix, order)                                                    \
    static inline void shmr_store_##suffix(shmr_word *word, uint64_t value) {        \
        SHMR_STEP(word);                                                             \
        atomic_store_explicit(&word->value, value, order);                           \
    }
/* True on success; on failure *expected holds what was found (read with the failure order). */
#define SHMR_CAS(suffix, success, failure)                                           \
    static inline bool shmr_cas_##suffix(shmr_word *word, uint64_t *expected, uint64_t desired) { \
        SHMR_STEP(word);                                                             \
        return atomic_compare_exchange_strong_explicit(&word->value, expected, desired, success, failure); \
    }
#define SHMR_RMW(verb, call, suffix, order)                                          \
    static inline uint64_t shmr_##verb##_##suffix(shmr_word *word, uint64_t operand) { \
        SHMR_STEP(word);                                                             \
        return call(&word->value, operand, order);                                   \
    }

SHMR_LOAD(relaxed, memory_order_relaxed)
SHMR_LOAD(acquire, memory_order_acquire)
SHMR_LOAD(seq_cst, memory_order_seq_cst)
SHMR_STORE(relaxed, memory_order_relaxed)
SHMR_STORE(release, memory_order_release)
SHMR_CAS(relaxed, memory_order_relaxed, memory_order_relaxed)
SHMR_CAS(acquire, memory_order_acquire, memory_order_acquire)
SHMR_CAS(release, memory_order_release, memory_order_relaxed)
SHMR_CAS(acq_rel, memory_order_acq_rel, memory_order_acquire)
SHMR_CAS(seq_cst, memory_order_seq_cst, memory_order_seq_cst)
SHMR_RMW(add, atomic_fetch_add_explicit, relaxed, memory_order_relaxed)
SHMR_RMW(add, atomic_fetch_add_explicit, seq_cst, memory_order_seq_cst)
SHMR_RMW(or, atomic_fetch_or_explicit, release, memory_order_release)
SHMR_RMW(or, atomic_fetch_or_explicit, seq_cst, memory_order_seq_cst)
SHMR_RMW(and, atomic_fetch_and_explicit, acq_rel, memory_order_acq_rel)
SHMR_RMW(and, atomic_fetch_and_explicit, seq_cst, memory_order_seq_cst)
SHMR_RMW(exchange, atomic_exchange_explicit, acquire, memory_order_acquire)
SHMR_RMW(exchange, atomic_exchange_explicit, seq_cst, memory_order_seq_cst)

#undef SHMR_LOAD
#undef SHMR_STORE
#undef SHMR_CAS
#undef SHMR_RMW

/* Counts of private objects, shared only between threads of one process (but what is back of loans). Sequentially consistent: "pin, then look
 * whether it is closed" meets "close, then look whether it is pinned". */
typedef struct {
    _Atomic int64_t value;
} shmr_count;

static inline int64_t shmr_count_add(shmr_count *count, int64_t delta) {
    return atomic_fetch_add_explicit(&count->value, delta, memory_order_seq_cst) + delta;
}
static inline int64_t shmr_count_get(const shmr_count *count) {
    return atomic_load_explicit(&((shmr_count *)(uintptr_t)count)->value, memory_order_seq_cst);
}
static inline void shmr_count_set(shmr_count *count, int64_t value) {
    atomic_store_explicit(&count->value, value, memory_order_seq_cst);
}

/* The same for words and marks of private structs whose layout callers know, too. */
static inline int64_t shmr_tally_add(int64_t *tally, int64_t delta) {
    return __atomic_add_fetch(tally, delta, __ATOMIC_SEQ_CST);
}
static inline int64_t shmr_tally_get(const int64_t *tally) { return __atomic_load_n(tally, __ATOMIC_SEQ_CST); }
static inline void shmr_mark_set(unsigned char *mark, unsigned char value) {
    __atomic_store_n(mark, value, __ATOMIC_SEQ_CST);
}
static inline unsigned char shmr_mark_get(const unsigned char *mark) {
    return __atomic_load_n(mark, __ATOMIC_SEQ_CST);
}
static inline bool shmr_mark_move(unsigned char *mark, unsigned char from, unsigned char to) {
    return __atomic_compare_exchange_n(mark, &from, to, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
}

static inline void shmr_pointer_set(void **pointer, void *value) { __atomic_store_n(pointer, value, __ATOMIC_SEQ_CST); }
static inline void *shmr_pointer_get(void **pointer) { return __atomic_load_n(pointer, __ATOMIC_SEQ_CST); }

/* Tell the core that we are spinning. */
static inline void shmr_pause(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
}

#endif
