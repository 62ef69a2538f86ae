/* SPDX-License-Identifier: BSD-3-Clause */
/* Not part of the library: see fault_points.h. */
#include "fault_points.h"

#include <signal.h>
#include <unistd.h>

#include "shmr_atomics.h"

static shmr_count counted, deadly, with_loads;

static void set(shmr_count *count, int64_t value) { shmr_count_add(count, value - shmr_count_get(count)); }

void shmr_fault_arm(int64_t nth, int loads) {
    set(&deadly, 0);
    set(&with_loads, loads != 0);
    set(&counted, 0);
    set(&deadly, nth);
}

int64_t shmr_fault_count(void) { return shmr_count_get(&counted); }

void shmr_fault_point(int load) {
    if (load && !shmr_count_get(&with_loads)) return;
    if (shmr_count_add(&counted, 1) == shmr_count_get(&deadly)) kill(getpid(), SIGKILL);
}
