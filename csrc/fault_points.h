/* SPDX-License-Identifier: BSD-3-Clause */
/* In a test build (SHMENGINE_FAULT_POINTS=1) the compiler includes this before everything else: each access of shared
 * memory by this process is then a possible point of death. All accesses of both extension modules are in the core,
 * so there is one counter. */
#ifndef FAULT_POINTS_H
#define FAULT_POINTS_H
#include <stdint.h>

/* From now on count, and die at the `nth` access (0: count only). Without `loads` only changes are accesses: who dies
 * between two loads leaves what one leaves who dies before the change that follows. */
void shmr_fault_arm(int64_t nth, int loads);
/* Accesses since then. */
int64_t shmr_fault_count(void);

void shmr_fault_point(int load);
#define SHMR_STEP(word) shmr_fault_point(0)
#define SHMR_STEP_LOAD(word) shmr_fault_point(1)
#endif
