/* SPDX-License-Identifier: BSD-3-Clause */
/* A message that lies elsewhere, sent in one call: from an interpreter each call costs as much as all of this.
 *
 * What was reached is in the caller's block, and nowhere else: claimed and filled, it only has to be committed. So
 * whoever is interrupted, or runs out of time, calls again and goes on, or aborts.
 */
#include "shmr_internal.h"

int shmr_send(shmr *h, uint32_t ring, int payload_check, int64_t deadline, const void *bytes, shmr_block *block) {
    if (!block->state) {
        int status = shmr_claim(h, block->length, NULL, 0, -1, deadline, block);
        if (status != SHMR_OK) return status;
        if (block->length >= SHMR_LONG) shmr_announce(h, ring);
        shmr_copy(h->base + block->offset, bytes, block->length);
    }
    return shmr_commit(h, ring, payload_check, -1, deadline, block);
}
