/* SPDX-License-Identifier: BSD-3-Clause */
/* The status codes, once: name, number, text. shmengine/_native/status.py turns them into exceptions. */
#ifndef SHMR_STATUS_H
#define SHMR_STATUS_H

#define SHMR_STATUSES(X)                                                          \
    X(OK, 0, "success")                                                           \
    X(WOULD_BLOCK, 1, "nothing to do without waiting")                            \
    X(TIMEOUT, 2, "the deadline passed")                                          \
    X(INTERRUPTED, 3, "a signal arrived while waiting")                           \
    X(CLOSED, 4, "closed")                                                        \
    X(NO_MEMORY, 5, "the memory budget is used up")                               \
    X(STALE, 6, "not, or no longer, held by this process")                        \
    X(FORKED, 7, "belongs to the parent process")                                 \
    X(CORRUPT, 8, "a consistency check failed")                                   \
    X(MISMATCH, 9, "not a region of this version and geometry")                   \
    X(SYSTEM, 10, "a system call failed")                                         \
    X(CROWDED, 11, "the table of participants is full")                           \
    X(PEER_LOST, 12, "the last other participant died")                           \
    X(ITEM_WAITS, 13, "an item arrived while waiting for space")                  \
    X(NOT_SHARED, 14, "this memory cannot be sent by reference")                  \
    X(BAD_ARGUMENT, 15, "an argument is out of range")                            \
    X(DENIED, 16, "nobody can relieve the shortage of memory")                    \
    X(TOO_LARGE, 17, "larger than the whole memory budget")

enum shmr_status {
#define SHMR_ENUM(name, number, text) SHMR_##name = number,
    SHMR_STATUSES(SHMR_ENUM)
#undef SHMR_ENUM
};

#endif
