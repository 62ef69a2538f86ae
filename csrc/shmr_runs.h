/* SPDX-License-Identifier: BSD-3-Clause */
/* Runs of pages: what the private allocator cuts from its extents. Used by shmr_arena.c alone. */
#ifndef SHMR_RUNS_H
#define SHMR_RUNS_H

#include "shmr_internal.h"

#define PAGES_PER_EXTENT (SHMR_EXTENT / SHMR_PAGE)

enum { RUN_NONE = 0, RUN_FREE = 1, RUN_USED = 2, RUN_QUICK = 3 };

static inline uint32_t run_kind(uint32_t word) { return word & 3u; }
static inline uint32_t run_length(uint32_t word) { return word >> 2; }

void shmr_runs_init(struct shmr_arena *a);
uint32_t shmr_runs_bin(uint32_t pages);
void shmr_runs_list(struct shmr_arena *a, uint32_t page, uint32_t pages); /* as a free one */
void shmr_runs_unlist(struct shmr_arena *a, uint32_t page);
void shmr_runs_free(shmr *h, uint32_t page, uint32_t pages); /* and merge it with its free neighbours */
void shmr_runs_mark_steps(struct shmr_arena *a, uint32_t page, uint32_t pages, bool set);
uint64_t shmr_runs_take(shmr *h, uint32_t pages); /* offset, or SHMR_NOWHERE */
void shmr_runs_release(shmr *h, uint32_t page, bool elsewhere); /* others may have read it */
bool shmr_runs_have_quick(shmr *h, uint32_t pages);
bool shmr_runs_gather(shmr *h); /* the quick lists' runs are free for anything */

#endif
