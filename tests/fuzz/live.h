/* SPDX-License-Identifier: BSD-3-Clause */
/* Included before everything else: each access to shared memory is a moment at which somebody else may write. */
#ifndef LIVE_H
#define LIVE_H
void live_step(const void *word);
#define SHMR_STEP(word) live_step(word)
#define SHMR_STEP_LOAD(word) live_step(word)
#endif
