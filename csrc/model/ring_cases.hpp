/* SPDX-License-Identifier: BSD-3-Clause */
// What ring_model.cpp explores: configurations, and bugs to plant.
#pragma once
#include "explore.hpp"

namespace {

enum Policy { REQUEUE, TAKE };   // what recovery does with a block that the dead one leased
enum Bug {
    NO_BUG,
    SLOT_BEFORE_COMMITTED,   // the slot is written before the block's state
    CURSOR_BEFORE_LEASE,     // plain NCQ: a consumer first takes the position, then stamps the block
    ORPHANS_IGNORED,         // recovery does not look for blocks COMMITTED but not in the ring
    ORPHANS_FREED,           // recovery undoes such commits instead of finishing them
    GENERATION_IGNORED,      // a slot is believed whatever generation the block has
    ADVANCE_SILENT,          // advancing lease_cursor notifies nobody
    HELPER_SILENT,           // only the consumer that leased notifies, not one that helps
    BATON_DROPPED,           // a producer that times out does not pass its wake-up on
    NO_RING_ALL,             // recovery does not ring all doorbells
    RETRY_FORGOTTEN,         // recovery drops a block that found the ring full
    RETRY_ASLEEP,            // a recoverer with a retry list does not register as slot waiter
    STALE_SNAPSHOT,          // one snapshot of the slots serves all later recoveries
    FULL_UNCHECKED,          // insertion looks at the slot's cycle only, not at the capacity
};

struct Config {
    int producers = 1, messages = 1;   // messages of each producer
    int consumers = 1, leases = 2;     // killable consumers; each leaves after that many leases
    int recoverers = 1, kills = 0, timeouts = 0;
    int blocks = 2, slots = 2, capacity = 2;
    int prefilled = 0;   // 1: block 0 is in the ring already
    Policy policy = REQUEUE;
    Bug bug = NO_BUG;
};

std::vector<explore::Case<Config>> cases() {
    using explore::Suite;
    const Suite quick = Suite::QUICK, full = Suite::LONG;
    return {
        // the ring that can never be full
        {"2 producers x 1, no kill", quick, {.producers = 2}},
        {"1 producer x 2, 1 kill", quick, {.messages = 2, .kills = 1}},
        {"1 producer x 3, 2 slots (wraps), 1 kill", quick, {.messages = 3, .kills = 1}},
        {"1 producer x 2, 2 kills, 2 recoverers", quick, {.messages = 2, .recoverers = 2, .kills = 2}},
        {"1 producer x 2, 2 kills, 2 recoverers, policy TAKE",
         quick,
         {.messages = 2, .recoverers = 2, .kills = 2, .policy = TAKE}},
        // FULL: fewer positions than blocks
        {"1 producer x 2, capacity 1 of 2 slots, 1 kill", quick, {.messages = 2, .kills = 1, .capacity = 1}},
        {"1 producer x 3, 3 blocks in 2 slots, 1 kill", quick, {.messages = 3, .kills = 1, .blocks = 3}},
        {"2 producers x 1, capacity 1, no kill", quick, {.producers = 2, .capacity = 1}},
        {"2 producers x 1, capacity 1, ring full at first, 2 timeouts",
         quick,
         {.producers = 2, .consumers = 0, .timeouts = 2, .blocks = 3, .capacity = 1, .prefilled = 1}},
        {"1 producer x 2, 2 blocks in 1 slot, 2 kills, 2 recoverers",
         quick,
         {.messages = 2, .recoverers = 2, .kills = 2, .slots = 1, .capacity = 1}},

        {"slot written before COMMITTED", quick, {.messages = 2, .bug = SLOT_BEFORE_COMMITTED}},
        {"lease_cursor advanced before the lease", quick, {.kills = 1, .bug = CURSOR_BEFORE_LEASE}},
        {"orphans ignored", quick, {.kills = 1, .bug = ORPHANS_IGNORED}},
        {"orphans freed", quick, {.messages = 2, .recoverers = 2, .kills = 2, .bug = ORPHANS_FREED}},
        {"generation ignored", quick, {.messages = 3, .kills = 1, .bug = GENERATION_IGNORED}},
        {"capacity not checked", quick, {.messages = 2, .capacity = 1, .bug = FULL_UNCHECKED}},
        {"advance notifies nobody", quick, {.messages = 2, .capacity = 1, .bug = ADVANCE_SILENT}},
        {"helper's advance notifies nobody", quick, {.messages = 2, .capacity = 1, .bug = HELPER_SILENT}},
        {"timed-out slot waiter keeps the baton",
         quick,
         {.producers = 2,
          .consumers = 0,
          .timeouts = 1,
          .blocks = 3,
          .capacity = 1,
          .prefilled = 1,
          .bug = BATON_DROPPED}},
        {"no ring-all in recovery", quick, {.messages = 2, .kills = 1, .capacity = 1, .bug = NO_RING_ALL}},
        {"recoverer forgets what found the ring full",
         quick,
         {.messages = 2, .kills = 1, .capacity = 1, .bug = RETRY_FORGOTTEN}},
        {"recoverer with a retry list does not register",
         quick,
         {.messages = 2, .kills = 1, .capacity = 1, .bug = RETRY_ASLEEP}},
        {"one snapshot for all recoveries", quick, {.messages = 2, .kills = 2, .bug = STALE_SNAPSHOT}},

        {"2 producers x 1, 1 kill", full, {.producers = 2, .kills = 1}},
        {"2 producers x 2, no kill", full, {.producers = 2, .messages = 2}},
        {"1 producer x 2, 2 killable consumers, 1 kill", full, {.messages = 2, .consumers = 2, .kills = 1}},
        {"1 producer x 3, 2 kills, 2 recoverers", full, {.messages = 3, .recoverers = 2, .kills = 2}},
        {"2 producers x 1, capacity 1, 1 kill", full, {.producers = 2, .kills = 1, .capacity = 1}},
        {"2 producers x 1, capacity 1, 1 kill, policy TAKE",
         full,
         {.producers = 2, .kills = 1, .capacity = 1, .policy = TAKE}},
        {"2 producers x 2, 3 blocks in 2 slots, no kill",
         full,
         {.producers = 2, .messages = 2, .consumers = 0, .blocks = 3}},
        {"2 producers x 2, capacity 1, 2 timeouts",
         full,
         {.producers = 2, .messages = 2, .consumers = 0, .timeouts = 2, .blocks = 3, .capacity = 1}},
        {"1 producer x 3, 3 blocks in 2 slots, 2 kills, 2 recoverers",
         full,
         {.messages = 3, .recoverers = 2, .kills = 2, .blocks = 3}},
        {"1 producer x 4, capacity 3 of 4 slots, 4 blocks, 1 kill",
         full,
         {.messages = 4, .kills = 1, .blocks = 4, .slots = 4, .capacity = 3}},
    };
}

}   // namespace
