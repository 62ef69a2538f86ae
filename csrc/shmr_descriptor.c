/* SPDX-License-Identifier: BSD-3-Clause */
/* Descriptors: what a record says of a message. Written by commit, copied once and validated by who leases, saved and restored
 * where one is rewritten. Other processes may write anything there at any moment: nothing is used that was not validated,
 * and nothing is read twice. */
#include "shmr_internal.h"

/* CRC32C over what a reader will rely on. */
uint32_t shmr_descriptor_check(const shmr_block *b) {
    uint64_t words[8] = {b->offset, b->room, b->length, b->seq, b->tag, (uint64_t)b->kind << 32 | b->producer,
                         (uint64_t)b->references << 32 | b->spec_bytes, b->block};
    uint32_t crc = shmr_crc32c(0, words, sizeof words);
    return shmr_crc32c(crc, b->spec, b->spec_bytes);
}

/* Nothing of a descriptor that failed is left, so that nobody can use it by mistake. */
static int reject(shmr_block *out, const char *why) {
    *out = (shmr_block){.state = out->state, .block = out->block};
    return shmr_fail(SHMR_CORRUPT, 0, why);
}

/* Copy the descriptor of a block that we have just leased, then validate the copy: the only one ever used. */
int shmr_read_descriptor(shmr *h, uint32_t id, uint64_t state, shmr_block *out) {
    struct shmr_record *r = shmr_record_at(h, id);
    uint64_t offset = shmr_load_relaxed(&r->offset), room = shmr_load_relaxed(&r->room); /* after A1 */
    uint64_t references = shmr_load_relaxed(&r->references);                             /* after A1 */
    uint64_t detail = shmr_load_relaxed(&r->detail);                                     /* after A1 */
    out->state = state;
    out->block = id;
    out->length = shmr_load_relaxed(&r->length); /* after A1 */
    out->seq = shmr_load_relaxed(&r->seq);       /* after A1 */
    out->tag = shmr_load_relaxed(&r->tag);       /* after A1 */
    out->producer = (uint32_t)(detail >> 48) & 0xffff;
    out->kind = (uint32_t)(detail >> 32) & 0xffff;
    out->attempts = (uint32_t)(detail >> 16) & 0xffff;
    out->spec_bytes = (uint32_t)detail & 0xffff;
    if (offset % 64 || room > h->g.config.arena_bytes || offset > h->g.config.arena_bytes - room)
        return reject(out, "bounds of the block");
    if (references > SHMR_MAX_REFS || shmr_references_bytes(references) > room)
        return reject(out, "number of references");
    uint64_t table = shmr_references_bytes(references);
    out->references = (uint32_t)references;
    out->offset = h->g.arena_at + offset + table;
    out->room = room - table;
    if (out->length > out->room) return reject(out, "length of the message");
    if (out->spec_bytes > SHMR_SPEC_BYTES) return reject(out, "length of the spec");
    if (out->producer >= h->g.config.participants) return reject(out, "producer");
    for (uint32_t i = 0; i < (out->spec_bytes + 7) / 8; i++) {
        uint64_t word = shmr_load_relaxed(&r->spec[i]); /* after A1 */
        memcpy(out->spec + 8 * i, &word, 8);
    }
    if (shmr_descriptor_check(out) != (uint32_t)(shmr_load_relaxed(&r->check) >> 32)) /* after A1 */
        return reject(out, "checksum of the descriptor");
    return SHMR_OK;
}

static shmr_word *written_by_commit(struct shmr_record *r, uint32_t i) {
    shmr_word *const words[] = {&r->length, &r->seq, &r->tag, &r->detail, &r->check};
    return i < 5 ? words[i] : &r->spec[i - 5];
}

/* Before the descriptor of a block that we have leased is rewritten: if we die at that, the message is put back as it was.
 * Called with undo_lock held. */
void shmr_save_descriptor(shmr *h, uint32_t id, uint64_t state) {
    struct shmr_participant *me = shmr_participant_at(h, h->self);
    struct shmr_record *r = shmr_record_at(h, id);
    uint64_t none = 0;
    shmr_exchange_acquire(&me->undo_state, none); /* A16: what was saved before is void before any of it is overwritten */
    shmr_store_relaxed(&me->undo_block, id);      /* published by R16 */
    for (uint32_t i = 0; i < SHMR_UNDO_WORDS; i++)
        shmr_store_relaxed(&me->undo[i], shmr_load_relaxed(written_by_commit(r, i))); /* likewise; leased by us */
    shmr_cas_acq_rel(&me->undo_state, &none, state); /* A16 R16: nothing of it is rewritten before */
}

/* What was saved for one state of a block is now for another one, that it takes next. Called with undo_lock held. */
void shmr_rename_saved(shmr *h, uint64_t before, uint64_t state) {
    shmr_cas_acq_rel(&shmr_participant_at(h, h->self)->undo_state, &before, state); /* A16 R16 W3 */
}

/* Put back what participant `slot`, dead or ourselves, has saved of this block, if it was for this lease of it. */
void shmr_restore_descriptor(shmr *h, uint32_t slot, uint32_t id, uint32_t generation) {
    struct shmr_participant *p = shmr_participant_at(h, slot);
    uint64_t state = shmr_load_acquire(&p->undo_state); /* A16 W2 */
    if (shmr_state_kind(state) != SHMR_LEASED || shmr_state_generation(state) != generation ||
        shmr_load_relaxed(&p->undo_block) != id) /* after A16 */
        return;
    for (uint32_t i = 0; i < SHMR_UNDO_WORDS; i++) /* after A16; leased by us */
        shmr_store_relaxed(written_by_commit(shmr_record_at(h, id), i), shmr_load_relaxed(&p->undo[i]));
}

/* The table of references of any live frame, bounds checked; entries are to be validated by who uses them. */
int shmr_references_at(shmr *h, uint32_t id, shmr_word **table, uint32_t *count) {
    struct shmr_record *r = shmr_record_at(h, id);
    uint64_t offset = shmr_load_relaxed(&r->offset), room = shmr_load_relaxed(&r->room); /* after A1 */
    uint64_t references = shmr_load_relaxed(&r->references);                             /* after A1 */
    if (offset % 64 || room > h->g.config.arena_bytes || offset > h->g.config.arena_bytes - room ||
        references > SHMR_MAX_REFS || shmr_references_bytes(references) > room)
        return SHMR_CORRUPT;
    *table = (shmr_word *)(void *)(shmr_arena_base(h) + offset);
    *count = (uint32_t)references;
    return SHMR_OK;
}

int shmr_references(shmr *h, const shmr_block *block, shmr_ref *out, uint32_t count) {
    if (block->block >= h->g.config.blocks || count > block->references) return SHMR_BAD_ARGUMENT;
    const shmr_word *entries =
        (const shmr_word *)(const void *)(h->base + block->offset - shmr_references_bytes(block->references));
    for (uint32_t i = 0; i < count; i++) {
        uint64_t entry = shmr_load_relaxed(&entries[i]); /* payload, after A1; once */
        out[i] = (shmr_ref){(uint32_t)entry, (uint32_t)(entry >> 32), 0, 0};
    }
    return SHMR_OK;
}
