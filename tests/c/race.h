/* SPDX-License-Identifier: BSD-3-Clause */
/* Included before everything else where a test wants to do something just before a certain access of shared memory:
 * what another process, a little faster, would have done. */
#ifndef RACE_H
#define RACE_H
void test_access(const void *word, int changes);
#define SHMR_STEP(word) test_access(word, 1)
#define SHMR_STEP_LOAD(word) test_access(word, 0)
#endif
