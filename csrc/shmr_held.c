/* SPDX-License-Identifier: BSD-3-Clause */
/* Which block of another participant's arena, held by this process, an address lies in.
 *
 * Blocks above 32 KiB are page-aligned and own their pages: one entry a page, one an extent for the whole ones.
 * Smaller blocks share pages: a hash of chains by page. Private memory; every function with h->lock held.
 */
#include <errno.h>
#include <sys/mman.h>

#include "shmr_internal.h"

#define PAGES_PER_EXTENT (SHMR_EXTENT / SHMR_PAGE)
#define SMALL_MAX 32768u

struct shmr_small_block {
    struct shmr_small_block *next;
    uint32_t page, block;
    uint64_t offset, room;
};

int shmr_held_init(shmr *h) {
    size_t bytes = ((size_t)h->g.pages + 1) * 4;
    h->page_block = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (h->page_block == MAP_FAILED) h->page_block = NULL;
    h->extent_block = calloc(h->g.extents + 1, 4);
    h->small_mask = 1023;
    h->small_blocks = calloc(h->small_mask + 1, sizeof *h->small_blocks);
    if (!h->page_block || !h->extent_block || !h->small_blocks)
        return shmr_fail(SHMR_SYSTEM, ENOMEM, "tables of held blocks");
    return SHMR_OK;
}

void shmr_held_fini(shmr *h) {
    if (h->page_block) munmap(h->page_block, ((size_t)h->g.pages + 1) * 4);
    free(h->extent_block);
    for (uint32_t i = 0; h->small_blocks && i <= h->small_mask; i++) {
        struct shmr_small_block *next;
        for (struct shmr_small_block *b = h->small_blocks[i]; b; b = next) {
            next = b->next;
            free(b);
        }
    }
    free(h->small_blocks);
}

static struct shmr_small_block **chain(shmr *h, uint32_t page) {
    return &h->small_blocks[(page * 0x9e3779b1u) >> 12 & h->small_mask];
}

static void set_pages(shmr *h, uint64_t offset, uint64_t room, uint32_t value) {
    uint32_t page = (uint32_t)(offset / SHMR_PAGE), end = (uint32_t)((offset + room) / SHMR_PAGE);
    while (page < end) {
        if (page % PAGES_PER_EXTENT == 0 && end - page >= PAGES_PER_EXTENT) {
            h->extent_block[page / PAGES_PER_EXTENT] = value;
            page += PAGES_PER_EXTENT;
        } else {
            h->page_block[page++] = value;
        }
    }
}

void shmr_held_add(shmr *h, uint32_t block, uint64_t offset, uint64_t room) {
    h->held_bytes += room;
    if (room > SMALL_MAX) {
        set_pages(h, offset, room, block + 1);
        return;
    }
    uint32_t end = (uint32_t)((offset + room - 1) / SHMR_PAGE);
    for (uint32_t page = (uint32_t)(offset / SHMR_PAGE); page <= end; page++) {
        struct shmr_small_block *b = malloc(sizeof *b);
        if (!b) return; /* the block is then sent by copy: slower, not wrong */
        *b = (struct shmr_small_block){*chain(h, page), page, block, offset, room};
        *chain(h, page) = b;
    }
}

void shmr_held_remove(shmr *h, uint32_t block, uint64_t offset, uint64_t room) {
    h->held_bytes -= room;
    if (room > SMALL_MAX) {
        set_pages(h, offset, room, 0);
        return;
    }
    uint32_t end = (uint32_t)((offset + room - 1) / SHMR_PAGE);
    for (uint32_t page = (uint32_t)(offset / SHMR_PAGE); page <= end; page++) {
        for (struct shmr_small_block **at = chain(h, page); *at; at = &(*at)->next) {
            if ((*at)->block != block || (*at)->page != page) continue;
            struct shmr_small_block *gone = *at;
            *at = gone->next;
            free(gone);
            break;
        }
    }
}

uint32_t shmr_held_find(shmr *h, uint64_t offset) {
    uint32_t page = (uint32_t)(offset / SHMR_PAGE);
    if (h->extent_block[page / PAGES_PER_EXTENT]) return h->extent_block[page / PAGES_PER_EXTENT];
    if (h->page_block[page]) return h->page_block[page];
    for (struct shmr_small_block *b = *chain(h, page); b; b = b->next)
        if (b->page == page && offset - b->offset < b->room) return b->block + 1;
    return 0;
}
