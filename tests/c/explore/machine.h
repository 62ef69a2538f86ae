/* SPDX-License-Identifier: BSD-3-Clause */
/* Between the explorer's machine and its main program. */
#ifndef MACHINE_H
#define MACHINE_H

#include "explore.h"

struct ex_counts {
    uint64_t states, runs, killed, stale;
};
extern struct ex_counts ex_counts;

const shmr *ex_survivor(void); /* of the scenario: the participant that the host acts as */
int64_t ex_failed_checks(bool forget); /* of the scenario's */
bool ex_prepare(const struct ex_scenario *scenario);
bool ex_random(const struct ex_limits *limits, uint64_t count, uint64_t first_seed, uint64_t *failed_seed);
bool ex_everything(const struct ex_limits *limits, double seconds, bool *complete);
void ex_show(const struct ex_limits *limits);
const char *ex_failure(void);

#endif
