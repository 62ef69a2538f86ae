/* SPDX-License-Identifier: BSD-3-Clause */
/* A region in use, words of which are replaced; who joins it then and who is in it go on. */
#include "world.h"

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size) {
    struct input in = {bytes, size};
    uint8_t first = next_byte(&in);
    world_begin(!(first & 16));
    for (int writes = first % 16; writes > 0; writes--) hostile_write(&in, actors[0].h);
    if (shmr_attach(world_fd, &actors[2].h) != SHMR_OK) actors[2].h = NULL;
    for (int i = 0; in.left && i < INSTRUCTIONS_MAX; i++) step(&in);
    world_end();
    return 0;
}
