/* SPDX-License-Identifier: BSD-3-Clause */
/* Words change between any two accesses of the core: the first half of the input says what the participants do, the
 * second what is written before which access (often the very word that is accessed: the second look differs). */
#include "world.h"

static struct input traps;
static uint32_t countdown;
static bool armed;

static bool in_region(const void *word) {
    for (int i = 0; i < HANDLES; i++)
        if (actors[i].h && (const char *)word >= actors[i].h->base && (const char *)word < actors[i].h->base + actors[i].h->g.total)
            return true;
    return false;
}

void live_step(const void *word) {
    if (!armed || !in_region(word) || countdown-- > 0) return;
    armed = false; /* what the writing accesses is no occasion */
    uint8_t how = next_byte(&traps);
    shmr_word *target = how & 1 ? (shmr_word *)(uintptr_t)word : choose_word(&traps, actors[0].h);
    shmr_store_relaxed(target, choose_value(&traps, actors[0].h, shmr_load_relaxed(target)));
    countdown = how >> 1;
    armed = traps.left != 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size) {
    if (size < 4) return 0;
    struct input in = {bytes + 1, size - 1};
    size_t calls = (in.left * (bytes[0] % 8 + 1)) / 10;
    world_begin(!(bytes[0] & 16));
    if (shmr_attach(world_fd, &actors[2].h) != SHMR_OK) actors[2].h = NULL;
    traps = (struct input){in.bytes + calls, in.left - calls};
    in.left = calls;
    countdown = next_byte(&traps);
    armed = true;
    for (int i = 0; in.left && i < INSTRUCTIONS_MAX; i++) step(&in);
    armed = false;
    world_end();
    return 0;
}
