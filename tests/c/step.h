/* SPDX-License-Identifier: BSD-3-Clause */
/* Included before everything else where each change of shared memory is to be a possible point of death. (A death
 * between two readings is the same as one before the change that follows.) */
#ifndef STEP_H
#define STEP_H
void test_step(void);
#define SHMR_STEP(word) test_step()
#endif
