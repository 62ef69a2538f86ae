/* SPDX-License-Identifier: BSD-3-Clause */
/* Small configurations, each of which has everything that can go wrong in one part of the protocol. */
#include "scenarios_deaths.h"
#include "scenarios_memory.h"
#include "scenarios_rings.h"

const struct ex_scenario *const ex_scenarios[] = {
    &one_to_one, &two_by_two, &wrap,       &full,      &forwarded,    &put_back,   &baton,
    &wait_item,  &closing,    &idle,       &items,     &scattered,    &arena_full, &growth,
    &shortage,   &few_records, &trimmed,   &huge,      &denied,       &by_reference, &stale_hold,
    &born_shared, &heir,      &recoverers, &overflow,  &in_charge,    &crowded,    &legacy,
    &forced,     NULL};
