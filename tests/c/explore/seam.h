/* SPDX-License-Identifier: BSD-3-Clause */
/* Included before everything else in the explorer's build of the core: takes the place of shmr_atomics.h (by its include guard) and
 * of what the core asks the kernel. Each access to a shared word becomes a call into explore.c, where logical processes
 * are coroutines, so that any interleaving, any death and any stale reading that C11 allows can be played through.
 */
#ifndef SHMR_ATOMICS_H
#define SHMR_ATOMICS_H
#define EXPLORER 1

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <time.h>
#include <unistd.h>

/* Smaller tables: fewer words to look through. */
#define SHMR_GROUP 64
#define SHMR_MAX_PARTICIPANTS 128 /* holders in two words */
#define SHMR_MAX_DOORBELLS 64

/* ---- shared words ------------------------------------------------------------------------------------------- */

typedef struct {
    uint64_t value;
} shmr_word;

enum { EX_RELAXED, EX_ACQUIRE, EX_RELEASE, EX_ACQ_REL, EX_SEQ_CST };
enum { EX_LOAD, EX_STORE, EX_CAS, EX_ADD, EX_OR, EX_AND, EX_EXCHANGE };

/* One access in the sources; `order` is what is written there, or weaker in a mutant. */
struct ex_site {
    const char *file;
    const char *function;
    int line, verb, order, failure;
    bool met; /* by a script, not only in the set-up */
};

uint64_t ex_load(const shmr_word *word, const struct ex_site *site);
void ex_store(shmr_word *word, uint64_t value, const struct ex_site *site);
bool ex_cas(shmr_word *word, uint64_t *expected, uint64_t desired, const struct ex_site *site);
uint64_t ex_rmw(shmr_word *word, uint64_t operand, const struct ex_site *site);

#define EX_SITE(name, verb, order, failure)                                                               \
    static struct ex_site name __attribute__((section("ex_sites"), used, aligned(8))) = {                 \
        __FILE__, __func__, __LINE__, verb, order, failure, false}
#define EX_JOIN(a, b) a##b
#define EX_NAME(number) EX_JOIN(ex_site_, number)
#define EX_AT(name, verb, order, failure, call, ...) ({ EX_SITE(name, verb, order, failure); call(__VA_ARGS__, &name); })
#define EX_LOADS(word, order) EX_AT(EX_NAME(__COUNTER__), EX_LOAD, order, order, ex_load, word)
#define EX_STORES(word, value, order) EX_AT(EX_NAME(__COUNTER__), EX_STORE, order, order, ex_store, word, value)
#define EX_CASES(word, expected, desired, success, failed) \
    EX_AT(EX_NAME(__COUNTER__), EX_CAS, success, failed, ex_cas, word, expected, desired)
#define EX_RMWS(verb, word, operand, order) EX_AT(EX_NAME(__COUNTER__), verb, order, order, ex_rmw, word, operand)

#define shmr_load_relaxed(w) EX_LOADS(w, EX_RELAXED)
#define shmr_load_acquire(w) EX_LOADS(w, EX_ACQUIRE)
#define shmr_load_seq_cst(w) EX_LOADS(w, EX_SEQ_CST)
#define shmr_store_relaxed(w, v) EX_STORES(w, v, EX_RELAXED)
#define shmr_store_release(w, v) EX_STORES(w, v, EX_RELEASE)
#define shmr_cas_relaxed(w, e, d) EX_CASES(w, e, d, EX_RELAXED, EX_RELAXED)
#define shmr_cas_acquire(w, e, d) EX_CASES(w, e, d, EX_ACQUIRE, EX_ACQUIRE)
#define shmr_cas_release(w, e, d) EX_CASES(w, e, d, EX_RELEASE, EX_RELAXED)
#define shmr_cas_acq_rel(w, e, d) EX_CASES(w, e, d, EX_ACQ_REL, EX_ACQUIRE)
#define shmr_cas_seq_cst(w, e, d) EX_CASES(w, e, d, EX_SEQ_CST, EX_SEQ_CST)
#define shmr_add_relaxed(w, v) EX_RMWS(EX_ADD, w, v, EX_RELAXED)
#define shmr_add_seq_cst(w, v) EX_RMWS(EX_ADD, w, v, EX_SEQ_CST)
#define shmr_or_release(w, v) EX_RMWS(EX_OR, w, v, EX_RELEASE)
#define shmr_or_seq_cst(w, v) EX_RMWS(EX_OR, w, v, EX_SEQ_CST)
#define shmr_and_acq_rel(w, v) EX_RMWS(EX_AND, w, v, EX_ACQ_REL)
#define shmr_and_seq_cst(w, v) EX_RMWS(EX_AND, w, v, EX_SEQ_CST)
#define shmr_exchange_acquire(w, v) EX_RMWS(EX_EXCHANGE, w, v, EX_ACQUIRE)
#define shmr_exchange_seq_cst(w, v) EX_RMWS(EX_EXCHANGE, w, v, EX_SEQ_CST)

#define SHMR_STEP(word) ((void)0) /* before a system call: ex_syscall is a step itself */

/* ---- private counts: one logical thread a process, so plain memory will do --------------------------------------- */

typedef struct {
    int64_t value;
} shmr_count;
static inline int64_t shmr_count_add(shmr_count *count, int64_t delta) { return count->value += delta; }
static inline int64_t shmr_count_get(const shmr_count *count) { return count->value; }
static inline int64_t shmr_tally_add(int64_t *tally, int64_t delta) { return *tally += delta; }
static inline int64_t shmr_tally_get(const int64_t *tally) { return *tally; }
static inline void shmr_mark_set(unsigned char *mark, unsigned char value) { *mark = value; }
static inline unsigned char shmr_mark_get(const unsigned char *mark) { return *mark; }
static inline bool shmr_mark_move(unsigned char *mark, unsigned char from, unsigned char to) {
    if (*mark != from) return false;
    *mark = to;
    return true;
}
static inline void shmr_pointer_set(void **pointer, void *value) { *pointer = value; }
static inline void *shmr_pointer_get(void **pointer) { return *pointer; }
static inline void shmr_pause(void) {}
#define SHMR_SOON_NS 0 /* one look, and no loop until a later time */

/* ---- what is asked of the kernel ----------------------------------------------------------------------------------- */

int ex_nanosleep(const struct timespec *time, struct timespec *rest);
int ex_clock_gettime(clockid_t clock, struct timespec *time);
pid_t ex_getpid(void);
long ex_syscall(long number, ...);
int ex_fstat(int fd, struct stat *out);
FILE *ex_fopen(const char *path);
int ex_poll(struct pollfd *fds, nfds_t count, int timeout);
void *ex_mmap(void *at, size_t bytes, int protection, int flags, int fd, off_t offset);
void *ex_malloc(size_t bytes);
void *ex_calloc(size_t count, size_t bytes);
void *ex_realloc(void *old, size_t bytes);
int ex_lock(pthread_mutex_t *mutex);
int ex_unlock(pthread_mutex_t *mutex);
static inline int ex_nothing(const void *unused) {
    (void)unused;
    return 0;
}

#ifndef EX_KERNEL /* everywhere but in explore.c itself */
#define nanosleep ex_nanosleep
#define clock_gettime ex_clock_gettime
#define getpid ex_getpid
#define syscall ex_syscall
#define poll(fds, count, timeout) ex_poll(fds, count, timeout)
#define mmap ex_mmap
#define munmap(at, bytes) ex_nothing(at)
#define madvise(at, bytes, advice) ex_nothing(at)
#define posix_fallocate(fd, offset, bytes) ex_nothing(NULL)
#define malloc ex_malloc
#define calloc ex_calloc
#define realloc ex_realloc
#define free(p) ((void)ex_nothing(p))
#define fopen(path, mode) ex_fopen(path)
#define fcntl(fd, command, lowest) (fd)
#define close(fd) ex_nothing(NULL)
#define fstat ex_fstat
#define fstatfs(fd, out) (-1)
#define stat(path, out) ex_nothing(memset(out, 0x11, sizeof *(out))) /* of a pid namespace: the same for all */
#define pthread_mutex_init(mutex, attributes) ex_nothing(memset(mutex, 0, sizeof *(mutex)))
#define pthread_mutex_destroy(mutex) ex_nothing(mutex)
#define pthread_atfork(prepare, parent, child) ex_nothing((const void *)(uintptr_t)(child))
#define pthread_mutex_lock ex_lock
#define pthread_mutex_unlock ex_unlock
#endif

#endif
