/* SPDX-License-Identifier: BSD-3-Clause */
/* Included before everything else where each access to shared memory is to be a possible point of death. */
#ifndef STEP_H
#define STEP_H
void test_step(void);
#define SHMR_STEP(word) test_step()
#endif
