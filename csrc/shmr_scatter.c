/* SPDX-License-Identifier: BSD-3-Clause */
/* Scatter and gather: the blocks of arrays in ordinary memory out to workers, and what they make of them back to its
 * place, with no interpreter in between. Where blocks lie is known here, not what they mean. */
#include "shmr_internal.h"

/* Where the bytes of block `index` lie, with its ghost cells as far as there are any. */
static uint64_t bytes_of(const shmr_scatter_source *s, uint64_t index, uint64_t *start) {
    uint64_t low = index * s->pitch, high = low + s->pitch;
    if (high > s->bytes) high = s->bytes;
    low = low > s->before ? low - s->before : 0;
    high = s->bytes - high > s->after ? high + s->after : s->bytes;
    *start = low;
    return high - low;
}

static int send_block(shmr *h, shmr_scatter *scatter, uint64_t index, int64_t deadline) {
    uint64_t total = 0, start;
    for (uint32_t i = 0; i < scatter->sources; i++)
        total = ((total + 63) & ~UINT64_C(63)) + bytes_of(&scatter->source[i], index, &start);
    shmr_block block;
    int items = (int)scatter->result_ring;
    int status = shmr_claim(h, total, NULL, 0, items, deadline, &block);
    if (status != SHMR_OK) return status;
    if (total >= SHMR_LONG) shmr_announce(h, scatter->task_ring);
    uint64_t at = 0, copied = 0;
    for (uint32_t i = 0; i < scatter->sources; i++) {
        uint64_t bytes = bytes_of(&scatter->source[i], index, &start);
        at = (at + 63) & ~UINT64_C(63);
        shmr_copy_near(h->base + block.offset + at, scatter->source[i].address + start, bytes);
        at += bytes;
        copied += bytes;
    }
    block.kind = scatter->task_kind;
    block.tag = scatter->first_tag + index;
    block.length = total;
    block.spec_bytes = scatter->spec_bytes;
    memcpy(block.spec, scatter->spec, sizeof block.spec);
    shmr_tally_add(&scatter->out, 1); /* before its answer can be here */
    shmr_mark_set(&scatter->states[index], SHMR_SCATTER_OUT);
    status = shmr_commit(h, scatter->task_ring, scatter->payload_check, items, deadline, &block);
    if (status != SHMR_OK) {
        /* Unless it was given up meanwhile. */
        if (shmr_mark_move(&scatter->states[index], SHMR_SCATTER_OUT, SHMR_SCATTER_UNSENT))
            shmr_tally_add(&scatter->out, -1);
        shmr_abort(h, &block);
        return status;
    }
    scatter->bytes_sent += copied;
    return SHMR_OK;
}

int shmr_scatter_send(shmr *h, shmr_scatter *scatter, int64_t deadline) {
    while (scatter->next < scatter->stop && shmr_tally_get(&scatter->out) < scatter->limit) {
        if (shmr_mark_get(&scatter->states[scatter->next]) == SHMR_SCATTER_UNSENT) {
            int status = send_block(h, scatter, scatter->next, deadline);
            if (status != SHMR_OK) return status;
        }
        scatter->next++;
    }
    return SHMR_OK;
}

int shmr_scatter_settle(shmr_scatter *scatter, uint64_t tag) {
    uint64_t index = tag - scatter->first_tag;
    if (index >= scatter->count || !shmr_mark_move(&scatter->states[index], SHMR_SCATTER_OUT, SHMR_SCATTER_BACK)) return 0;
    shmr_tally_add(&scatter->out, -1);
    return 1;
}

int shmr_scatter_accept(shmr *h, shmr_scatter *scatter, shmr_block *message) {
    uint64_t words[3]; /* bytes and offset of a result that is to be copied, and its check; or 0, 0, bytes in their place */
    if (message->kind != scatter->result_kind || message->spec_bytes != sizeof words) return SHMR_WOULD_BLOCK;
    memcpy(words, message->spec, sizeof words);
    uint64_t bytes = words[0], offset = words[1], index = message->tag - scatter->first_tag;
    uint64_t arena = h->g.config.arena_bytes;
    bool wanted = index < scatter->count && shmr_mark_get(&scatter->states[index]) == SHMR_SCATTER_OUT;
    if (wanted && scatter->payload_check && bytes && bytes <= arena && offset >= h->g.arena_at &&
        offset - h->g.arena_at <= arena - bytes && shmr_crc32c(0, h->base + offset, bytes) != words[2]) {
        shmr_release(h, message); /* still out, for the caller to settle */
        return shmr_fail(SHMR_CORRUPT, 0, "checksum of a result");
    }
    if (!shmr_scatter_settle(scatter, message->tag)) {
        shmr_release(h, message); /* delivered twice, or wanted no more */
        return SHMR_OK;
    }
    if (bytes) {
        uint64_t start = index * scatter->target_pitch, room = scatter->target_bytes - start;
        if (room > scatter->target_pitch) room = scatter->target_pitch;
        if (start > scatter->target_bytes || bytes != room || bytes > arena || offset < h->g.arena_at ||
            offset - h->g.arena_at > arena - bytes) {
            shmr_release(h, message);
            return shmr_fail(SHMR_CORRUPT, 0, "bounds of a result");
        }
        shmr_copy(scatter->target + start, h->base + offset, bytes);
        scatter->bytes_copied += bytes;
    } else {
        scatter->bytes_copied += words[2];
    }
    shmr_release(h, message);
    shmr_tally_add(&scatter->arrived, 1);
    return SHMR_OK;
}

int shmr_scatter_run(shmr *h, shmr_scatter *scatter, uint32_t turns, int64_t deadline, shmr_block *message) {
    for (uint32_t turn = 0; turn < turns; turn++) {
        int status = shmr_scatter_send(h, scatter, 0);
        if (status == SHMR_ITEM_WAITS) status = SHMR_OK;
        if (status == SHMR_WOULD_BLOCK && shmr_tally_get(&scatter->out)) status = SHMR_OK; /* what comes back makes room */
        if (status != SHMR_OK) return status == SHMR_WOULD_BLOCK ? SHMR_TIMEOUT : status;
        if (turn && shmr_tally_get(&scatter->out) <= 0) return SHMR_TIMEOUT; /* all is back */
        status = shmr_lease(h, scatter->result_ring, scatter->payload_check, deadline, message);
        if (status != SHMR_OK) return status == SHMR_WOULD_BLOCK ? SHMR_TIMEOUT : status;
        if (message->tag - scatter->first_tag >= scatter->count) return SHMR_OK;
        status = shmr_scatter_accept(h, scatter, message);
        if (status == SHMR_WOULD_BLOCK) return SHMR_OK; /* in `message`, for the caller */
        if (status != SHMR_OK) return status;
    }
    return SHMR_TIMEOUT;
}
