/* SPDX-License-Identifier: BSD-3-Clause */
/* Small configurations, each of which has everything that can go wrong in one part of the protocol. */
#include "scenarios_deaths.h"
#include "scenarios_memory.h"
#include "scenarios_rings.h"

const struct ex_scenario *const ex_scenarios[] = {
    &one_to_one, &two_by_two,   &wrap,  &full,       &lapped,      &helped,    &forwarded, &forwarded_to_full, &put_back,
    &baton,      &wait_item,    &closing, &finish,   &idle,        &items,     &scattered, &arena_full, &growth,
    &shortage,   &few_records,  &trimmed, &huge,     &two_short,   &in_vain,   &held_full, &denied, &by_reference,
    &wide,       &stale_hold,   &born_shared, &heir, &recoverers,  &overflow,  &in_charge, &crowded, &successor,
    &in_time,    &reused,       &legacy, &forced,    &early, &newcomer, &turns, &forwarded_twice,
    &forced_idle, &told_no,     &poisoned, &poisoned_ring, &wide_full, &unfilled, &handed_over, &announced,
    NULL};
