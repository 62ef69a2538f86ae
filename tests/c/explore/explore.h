/* SPDX-License-Identifier: BSD-3-Clause */
/* The explorer: logical processes over one region, every schedule and every death of a small configuration.
 *
 * A scenario makes a region and its participants, and gives each logical process a script. The explorer runs the scripts as
 * coroutines; between two accesses to shared words it may go on with another one (at most `preemptions` times, unless the
 * running one waits or has ended) or kill the running one (at most `kills` times): it is then never resumed. When nobody is
 * left to run, the scenario's check looks whether everything is whole.
 *
 * With `stale` above zero, memory is a history of messages for each word, after C11: a load may return any message that is
 * neither older than what this process has seen of the word nor hidden by what happened before it; acquire and release
 * pass on what was seen. Sequentially consistent accesses have one order, in which the writes stand as they were made; a load has
 * any place in it after what happens before it, and sees at least the last such write of its word that precedes it there.
 * With `late` above zero, too, a store that is no acquire may take effect after what its process does next, until that releases or asks
 * the kernel; if it dies first, the store may be lost, as if the compiler had moved it.
 * Data (descriptors, payload) must not race: each write happens after every earlier access.
 * (View-based semantics: J. Kang et al., "A promising semantics for relaxed-memory concurrency", POPL 2017, without promises;
 * races by vector clocks: C. Flanagan, S. Freund, "FastTrack", PLDI 2009.)
 */
#ifndef EXPLORE_H
#define EXPLORE_H

#include "../harness.h"

#define EX_PROCESSES 6

struct ex_limits {
    int preemptions, kills, stale, interrupts, late;
};

struct ex_scenario {
    const char *name;
    const char *about;
    void (*setup)(void);         /* in the host, before anything is explored: the world that each run begins with */
    int processes;
    void (*script[EX_PROCESSES])(void);
    void (*check)(void);         /* in the host, after a run */
    struct ex_limits quick, long_; /* exhaustive */
};
extern const struct ex_scenario *const ex_scenarios[]; /* NULL at the end */

/* For scenarios. */
void ex_be(int process);                  /* setup: from now on the host acts as this process (pid); -1: as itself */
int ex_me(void);                          /* script: which process runs */
bool ex_was_killed(int process);          /* check */
int ex_kills(void);                       /* check: how many were */
void ex_fail(const char *format, ...) __attribute__((format(printf, 1, 2)));
uint64_t ex_data(const shmr_word *word);  /* payload: plain data, a word at a time */
void ex_set_data(shmr_word *word, uint64_t value);
extern uint64_t ex_log[64];               /* what scripts tell the check; set back for each run; read by scripts: not allowed */

#endif
