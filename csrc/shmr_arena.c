/* SPDX-License-Identifier: BSD-3-Clause */
/* The private allocator of one participant over the extents that it owns.
 *
 * All of its metadata is this process's own memory: nothing in the region describes free space, so no peer can
 * corrupt it, and when its owner dies it is rebuilt from the block table by whoever adopts the extents.
 *
 *   up to 32 KiB   slabs of equal blocks, four classes a doubling, the block freed last is handed out first
 *   above          runs of pages (shmr_runs.c)
 *
 * Every function is called with h->lock held.
 */
#include <errno.h>
#include <sys/mman.h>

#include "shmr_runs.h"

#define SMALL_MAX 32768u
#define LOOK_EVERY 4      /* below, and above small ones, only so often */
#define SMALL_EVERY 16    /* for small ones */
#define UNUSED UINT32_MAX /* in a slab's records */

/* Zeroed memory that costs nothing until it is touched. */
static void *sparse(size_t bytes) {
    void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return p == MAP_FAILED ? NULL : p;
}

int shmr_arena_init(shmr *h) {
    struct shmr_arena *a = &h->arena;
    size_t pages = (size_t)h->g.pages + 1;
    a->run = sparse(pages * 4);
    a->next = sparse(pages * 4);
    a->previous = sparse(pages * 4);
    a->record = sparse(pages * 4);
    a->slab_at = sparse(pages * sizeof(void *));
    a->own = sparse(h->g.extents);
    if (!a->run || !a->next || !a->previous || !a->record || !a->slab_at || !a->own)
        return shmr_fail(SHMR_SYSTEM, ENOMEM, "mmap of the allocator's tables");
    shmr_runs_init(a);
    return SHMR_OK;
}

void shmr_arena_fini(shmr *h) {
    struct shmr_arena *a = &h->arena;
    size_t pages = (size_t)h->g.pages + 1;
    while (a->slabs) {
        struct shmr_slab *s = a->slabs;
        a->slabs = s->all_next;
        free(s->records);
        free(s);
    }
    if (a->run) munmap(a->run, pages * 4);
    if (a->next) munmap(a->next, pages * 4);
    if (a->previous) munmap(a->previous, pages * 4);
    if (a->record) munmap(a->record, pages * 4);
    if (a->slab_at) munmap(a->slab_at, pages * sizeof(void *));
    if (a->own) munmap(a->own, h->g.extents);
    memset(a, 0, sizeof *a);
}

/* ---- slabs ------------------------------------------------------------------------------------------------------ */

/* Sizes 64, 128, ... 512, then four a doubling up to 32 KiB. */
static uint32_t class_of(uint64_t bytes) {
    uint32_t units = bytes ? (uint32_t)((bytes + 63) / 64) : 1;
    if (units <= 8) return units - 1;
    uint32_t log = 31u - (uint32_t)__builtin_clz(units - 1); /* 2^log < units <= 2^(log+1) */
    uint32_t step = (units - 1 - (1u << log)) >> (log - 2);
    return 8 + (log - 3) * 4 + step;
}

static uint32_t class_bytes(uint32_t class_index) {
    if (class_index < 8) return (class_index + 1) * 64;
    uint32_t log = 3 + (class_index - 8) / 4, step = (class_index - 8) % 4;
    return ((1u << log) + ((step + 1) << (log - 2))) * 64;
}

uint64_t shmr_arena_room(uint64_t bytes) {
    if (bytes <= SMALL_MAX) return class_bytes(class_of(bytes));
    return (bytes + SHMR_PAGE - 1) / SHMR_PAGE * SHMR_PAGE;
}

static void list_slab(struct shmr_arena *a, struct shmr_slab *s) {
    s->previous = NULL;
    s->next = a->partial[s->class_index];
    if (s->next) s->next->previous = s;
    a->partial[s->class_index] = s;
}

static void unlist_slab(struct shmr_arena *a, struct shmr_slab *s) {
    if (s->previous)
        s->previous->next = s->next;
    else
        a->partial[s->class_index] = s->next;
    if (s->next) s->next->previous = s->previous;
}

static void track_slab(struct shmr_arena *a, struct shmr_slab *s) {
    s->all_previous = NULL;
    s->all_next = a->slabs;
    if (s->all_next) s->all_next->all_previous = s;
    a->slabs = s;
}

static void forget_slab(struct shmr_arena *a, struct shmr_slab *s) {
    if (s->all_previous)
        s->all_previous->all_next = s->all_next;
    else
        a->slabs = s->all_next;
    if (s->all_next) s->all_next->all_previous = s->all_previous;
    free(s->records);
    free(s);
}

static struct shmr_slab *new_slab(shmr *h, uint32_t class_index) {
    struct shmr_arena *a = &h->arena;
    uint32_t bytes = class_bytes(class_index), pages = (bytes * 8 + SHMR_PAGE - 1) / SHMR_PAGE;
    if (pages < 4) pages = 4;
    uint64_t offset = shmr_runs_take(h, pages);
    if (offset == SHMR_NOWHERE) return NULL;
    uint32_t blocks = pages * SHMR_PAGE / bytes;
    struct shmr_slab *s = malloc(sizeof *s + blocks * sizeof(uint32_t));
    uint32_t *records = malloc(blocks * sizeof *records);
    if (!s || !records) {
        free(s);
        free(records);
        shmr_runs_release(h, (uint32_t)(offset / SHMR_PAGE), false);
        return NULL;
    }
    a->used_bytes -= (uint64_t)pages * SHMR_PAGE; /* its blocks count, not itself */
    *s = (struct shmr_slab){.page = (uint32_t)(offset / SHMR_PAGE), .pages = pages, .class_index = class_index,
                            .blocks = blocks, .unused = blocks, .records = records};
    for (uint32_t i = 0; i < blocks; i++) {
        s->stack[i] = blocks - 1 - i;
        records[i] = UNUSED;
    }
    for (uint32_t p = 0; p < pages; p++) a->slab_at[s->page + p] = s;
    list_slab(a, s);
    track_slab(a, s);
    return s;
}

static void delete_slab(shmr *h, struct shmr_slab *s) {
    struct shmr_arena *a = &h->arena;
    for (uint32_t p = 0; p < s->pages; p++) a->slab_at[s->page + p] = NULL;
    shmr_runs_mark_steps(a, s->page, s->pages, false);
    a->run[s->page] = 0;
    shmr_runs_free(h, s->page, s->pages);
    forget_slab(a, s);
}

static bool delete_empty_slabs(shmr *h) {
    bool any = false;
    for (uint32_t c = 0; c < SHMR_CLASSES; c++) {
        struct shmr_slab *next;
        for (struct shmr_slab *s = h->arena.partial[c]; s; s = next) {
            next = s->next;
            if (s->unused < s->blocks) continue;
            unlist_slab(&h->arena, s);
            delete_slab(h, s);
            any = true;
        }
    }
    return any;
}

/* What is kept for the next one of its size becomes pages for any. */
static bool gather_free(shmr *h) {
    bool any = shmr_runs_gather(h);
    return delete_empty_slabs(h) || any;
}

static uint64_t take_small(shmr *h, uint64_t bytes) {
    struct shmr_arena *a = &h->arena;
    uint32_t class_index = class_of(bytes);
    struct shmr_slab *s = a->partial[class_index];
    if (!s && !(s = new_slab(h, class_index))) return SHMR_NOWHERE;
    uint32_t block = s->stack[--s->unused];
    if (!s->unused) unlist_slab(a, s);
    s->records[block] = 0;
    a->used_bytes += class_bytes(class_index);
    return (uint64_t)s->page * SHMR_PAGE + (uint64_t)block * class_bytes(class_index);
}

static void release_small(shmr *h, struct shmr_slab *s, uint64_t offset, uint64_t room) {
    struct shmr_arena *a = &h->arena;
    a->used_bytes -= room;
    if (s->class_index == SHMR_CLASSES) { /* adopted: gone when its last block is */
        if (--s->blocks == 0) delete_slab(h, s);
        return;
    }
    uint32_t block = (uint32_t)((offset - (uint64_t)s->page * SHMR_PAGE) / class_bytes(s->class_index));
    s->records[block] = UNUSED;
    s->stack[s->unused++] = block;
    /* To the front: the next allocation of this class takes the block that is warmest. */
    if (s->unused > 1) {
        if (a->partial[s->class_index] == s) return;
        unlist_slab(a, s);
    }
    list_slab(a, s);
}

/* ---- the interface ----------------------------------------------------------------------------------------------- */

/* Of blocks that fit into a cache a few may go round, and what was released is looked at in one go; of a large one
 * the warmest is worth asking each time. But only a few: of a slab's hundreds each has a record, and views of it in the
 * interpreter, that would have left the cache when its turn comes. */
bool shmr_arena_has_warm(shmr *h, uint64_t bytes) {
    if (bytes <= SMALL_MAX) return ++h->arena.turn % SMALL_EVERY && h->arena.partial[class_of(bytes)];
    if (bytes >= SHMR_LARGE_MIN) return false;
    uint32_t pages = (uint32_t)((bytes + SHMR_PAGE - 1) / SHMR_PAGE);
    return ++h->arena.turn % LOOK_EVERY && shmr_runs_have_quick(h, pages);
}

uint64_t shmr_arena_allocate(shmr *h, uint64_t bytes) {
    uint64_t offset;
    if (bytes <= SMALL_MAX) {
        offset = take_small(h, bytes);
        if (offset != SHMR_NOWHERE) return offset;
        return gather_free(h) ? take_small(h, bytes) : SHMR_NOWHERE;
    }
    uint64_t pages = (bytes + SHMR_PAGE - 1) / SHMR_PAGE;
    if (pages > h->g.pages) return SHMR_NOWHERE;
    offset = shmr_runs_take(h, (uint32_t)pages);
    if (offset == SHMR_NOWHERE && gather_free(h)) offset = shmr_runs_take(h, (uint32_t)pages);
    return offset;
}

void shmr_arena_release(shmr *h, uint64_t offset, uint64_t room, bool elsewhere) {
    uint32_t page = (uint32_t)(offset / SHMR_PAGE);
    struct shmr_slab *s = h->arena.slab_at[page];
    if (s)
        release_small(h, s, offset, room);
    else
        shmr_runs_release(h, page, elsewhere);
}

uint32_t *shmr_arena_record(shmr *h, uint64_t offset, uint64_t *start, uint64_t *room) {
    struct shmr_arena *a = &h->arena;
    uint32_t page = (uint32_t)(offset / SHMR_PAGE);
    if (!a->own[page / PAGES_PER_EXTENT]) return NULL;
    struct shmr_slab *s = a->slab_at[page];
    if (s) {
        if (s->class_index == SHMR_CLASSES) return NULL;
        uint32_t bytes = class_bytes(s->class_index);
        uint64_t base = (uint64_t)s->page * SHMR_PAGE;
        uint32_t block = (uint32_t)((offset - base) / bytes);
        *start = base + (uint64_t)block * bytes;
        *room = bytes;
        return block < s->blocks && s->records[block] != UNUSED ? &s->records[block] : NULL;
    }
    /* Back to the first page of the run: runs inside are zero. */
    while (a->run[page] == 0 && page > 0) page--;
    if (run_kind(a->run[page]) == RUN_NONE) page -= run_length(a->run[page]);
    if (run_kind(a->run[page]) != RUN_USED) return NULL;
    *start = (uint64_t)page * SHMR_PAGE;
    *room = (uint64_t)run_length(a->run[page]) * SHMR_PAGE;
    return offset < *start + *room ? &a->record[page] : NULL;
}

/* ---- extents ------------------------------------------------------------------------------------------------------ */

/* Take extent i if it is nobody's: one CAS. Its memory may have to be reserved still. */
static bool own_extent(shmr *h, uint32_t i) {
    shmr_word *word = shmr_extent_at(h, i);
    uint64_t seen = shmr_load_seq_cst(word); /* S3 W6 */
    if ((uint32_t)seen || h->arena.own[i] || !shmr_cas_acquire(word, &seen, seen | (h->self + 1))) return false; /* A6 W1 */
    h->arena.own[i] = 1;
    h->arena.owned_bytes += SHMR_EXTENT;
    return true;
}

static int warm_extent(shmr *h, uint32_t i) {
    shmr_word *word = shmr_extent_at(h, i);
    if (shmr_load_relaxed(word) & SHMR_EXTENT_WARM) return SHMR_OK; /* own word */
    int status = shmr_reserve_extent(h, i);
    if (status == SHMR_OK) shmr_or_release(word, SHMR_EXTENT_WARM); /* R6 W17 */
    return status;
}

static void give_extent(shmr *h, uint32_t i) {
    uint64_t mine = shmr_load_relaxed(shmr_extent_at(h, i)); /* own word */
    shmr_cas_seq_cst(shmr_extent_at(h, i), &mine, mine & SHMR_EXTENT_WARM); /* S3 R6 */
    h->arena.own[i] = 0;
    h->arena.owned_bytes -= SHMR_EXTENT;
}

/* Take `need` extents from `first` on, or none. WOULD_BLOCK: somebody was faster. All are owned before any is reserved:
 * what is reserved stays so, and two who meet here would else go on, side by side, through the whole region. */
static int take_extents(shmr *h, uint32_t first, uint32_t need) {
    uint32_t taken = 0;
    int status = SHMR_OK;
    while (taken < need && own_extent(h, first + taken)) taken++;
    if (taken < need) status = SHMR_WOULD_BLOCK;
    for (uint32_t k = 0; k < need && status == SHMR_OK; k++) status = warm_extent(h, first + k);
    if (status == SHMR_OK) return SHMR_OK;
    for (uint32_t k = 0; k < taken; k++) give_extent(h, first + k);
    if (taken) shmr_notify_all(h, shmr_header_of(h)->extent_waiters); /* somebody may have missed them */
    return status;
}

int shmr_arena_grow(shmr *h, uint64_t bytes) {
    uint32_t need = (uint32_t)((bytes + SHMR_EXTENT - 1) / SHMR_EXTENT);
    uint64_t owned = h->arena.owned_bytes / SHMR_EXTENT, leave = h->arena.leave;
    if (need + leave > h->g.extents) return shmr_fail(SHMR_TOO_LARGE, 0, "one block is larger than the memory budget");
    if (owned + need + leave > h->g.extents)
        return shmr_fail(SHMR_NO_MEMORY, 0, "the rest of the memory budget is for other processes");
    /* Rows from the top, warm ones first, then ones that still have to be reserved. Single ones from the bottom, and warm ones
     * only if no more can be reserved: between rows, they would leave gaps that are too short for the next row, however much
     * is free. */
    bool down = need > 1;
    for (int pass = 0; pass < 2; pass++) {
        bool warm_only = down == (pass == 0);
        uint32_t row = 0;
        for (uint32_t n = 0; n < h->g.extents; n++) {
            uint32_t i = down ? h->g.extents - 1 - n : n;
            uint64_t seen = shmr_load_seq_cst(shmr_extent_at(h, i)); /* S3: the look after registering */
            bool usable = (uint32_t)seen == 0 && !h->arena.own[i] && (!warm_only || seen & SHMR_EXTENT_WARM);
            row = usable ? row + 1 : 0;
            if (row < need) continue;
            uint32_t first = down ? i : i + 1 - need;
            int status = take_extents(h, first, need);
            if (status == SHMR_OK) {
                shmr_runs_free(h, first * PAGES_PER_EXTENT, need * PAGES_PER_EXTENT);
                return SHMR_OK;
            }
            if (status == SHMR_NO_MEMORY && !warm_only && !down) break;
            if (status != SHMR_WOULD_BLOCK) return status;
            row = 0; /* somebody was faster: look on */
        }
    }
    return shmr_fail(SHMR_NO_MEMORY, 0, "every extent of the memory budget is in use");
}

void shmr_arena_trim(shmr *h) {
    struct shmr_arena *a = &h->arena;
    shmr_runs_gather(h);
    delete_empty_slabs(h);
    bool any = false;
    for (uint32_t bin = shmr_runs_bin(PAGES_PER_EXTENT); bin < SHMR_BINS; bin++) {
        uint32_t link = a->bin[bin];
        while (link) {
            uint32_t page = link - 1, length = run_length(a->run[page]);
            link = a->next[page];
            uint32_t first = (page + PAGES_PER_EXTENT - 1) / PAGES_PER_EXTENT;
            uint32_t last = (page + length) / PAGES_PER_EXTENT;
            if (first >= last) continue;
            shmr_runs_unlist(a, page);
            uint32_t start = first * PAGES_PER_EXTENT, end = last * PAGES_PER_EXTENT;
            if (start > page) shmr_runs_list(a, page, start - page);
            if (page + length > end) shmr_runs_list(a, end, page + length - end);
            for (uint32_t e = first; e < last; e++) give_extent(h, e);
            any = true;
            link = a->bin[bin]; /* the list has changed: again from its start */
        }
    }
    if (any) shmr_notify_all(h, shmr_header_of(h)->extent_waiters);
}

#define UNSORTED (1u << 2 | RUN_QUICK) /* an adopted page, so far: matches nothing */

/* Does a block lie in pages that were adopted, and not across another one? (What the dead wrote may be rubbish.) */
static bool is_adoptable(const struct shmr_arena *a, uint32_t page, uint32_t end, uint64_t room) {
    for (uint32_t p = page; p < end; p++) {
        const struct shmr_slab *s = a->slab_at[p];
        bool shared = room <= SMALL_MAX && s && s->class_index == SHMR_CLASSES;
        if (a->run[p] != UNSORTED && !shared) return false;
    }
    return true;
}

/* Take over the extents of `from`, who are dead or left: what `live` (record numbers) covers is in use, the rest
 * is free. Blocks below a page share "adopted" slabs, which are only counted down. What cannot be taken over
 * is marked in `live`. */
void shmr_arena_adopt_extents(shmr *h, const struct shmr_slots *from, uint32_t *live, uint32_t live_count) {
    struct shmr_arena *a = &h->arena;
    for (uint32_t e = 0; e < h->g.extents; e++) {
        shmr_word *word = shmr_extent_at(h, e);
        uint64_t seen = shmr_load_acquire(word); /* A6 W1 */
        if (!(uint32_t)seen || !shmr_slots_have(from, (uint32_t)seen - 1) || a->own[e]) continue;
        if (!(seen & SHMR_EXTENT_WARM)) { /* died while reserving it: nobody has used it */
            shmr_cas_seq_cst(word, &seen, 0); /* S3 R6 W16 */
            continue;
        }
        if (!shmr_cas_acq_rel(word, &seen, SHMR_EXTENT_WARM | (h->self + 1))) continue; /* A6 R6 W1 W3 */
        a->own[e] = 1;
        a->owned_bytes += SHMR_EXTENT;
        uint32_t first = e * PAGES_PER_EXTENT;
        for (uint32_t p = 0; p < PAGES_PER_EXTENT; p++) {
            a->run[first + p] = UNSORTED;
            a->slab_at[first + p] = NULL;
        }
    }
    for (uint32_t i = 0; i < live_count; i++) {
        uint64_t offset = h->places[live[i]].offset, room = h->places[live[i]].room;
        uint32_t page = (uint32_t)(offset / SHMR_PAGE), end = (uint32_t)((offset + room + SHMR_PAGE - 1) / SHMR_PAGE);
        bool whole_pages = offset % SHMR_PAGE == 0 && room % SHMR_PAGE == 0;
        if ((room > SMALL_MAX && !whole_pages) || !is_adoptable(a, page, end, room)) {
            live[i] |= SHMR_NOT_ADOPTED;
            continue;
        }
        a->used_bytes += room;
        if (room > SMALL_MAX) {
            for (uint32_t p = page; p < end; p++) a->run[p] = 0;
            a->run[page] = (end - page) << 2 | RUN_USED;
            shmr_runs_mark_steps(a, page, end - page, true);
            a->record[page] = live[i] + 1;
            continue;
        }
        /* Join the adopted slabs that its pages already belong to, and cover the rest. */
        struct shmr_slab *s = NULL;
        for (uint32_t p = page; p < end; p++) {
            struct shmr_slab *other = a->slab_at[p];
            if (!other || other == s) continue;
            if (!s) {
                s = other;
                continue;
            }
            for (uint32_t q = other->page; q < other->page + other->pages; q++) a->slab_at[q] = s;
            s->pages = other->page + other->pages - s->page; /* it lies behind */
            s->blocks += other->blocks;
            forget_slab(a, other);
        }
        if (!s) {
            s = calloc(1, sizeof *s);
            if (!s) { /* its memory is lost until the region goes: nothing else breaks */
                a->used_bytes -= room;
                for (uint32_t p = page; p < end; p++) a->run[p] = 0;
                live[i] |= SHMR_NOT_ADOPTED;
                continue;
            }
            s->page = page;
            s->class_index = SHMR_CLASSES;
            track_slab(a, s);
        }
        uint32_t low = page < s->page ? page : s->page;
        uint32_t high = s->page + s->pages > end ? s->page + s->pages : end;
        s->page = low;
        s->pages = high - low;
        s->blocks++;
        for (uint32_t p = low; p < high; p++) {
            a->slab_at[p] = s;
            a->run[p] = 0;
        }
    }
    /* Whatever is still unsorted is free. Slab pages look like used runs to the neighbours. */
    for (uint32_t e = 0; e < h->g.extents; e++) {
        if (!a->own[e]) continue;
        uint32_t p = e * PAGES_PER_EXTENT, end = p + PAGES_PER_EXTENT;
        while (p < end) {
            struct shmr_slab *s = a->slab_at[p];
            if (s && s->page == p && s->class_index == SHMR_CLASSES) a->run[p] = s->pages << 2 | RUN_USED;
            if (a->run[p] != UNSORTED) {
                p++;
                continue;
            }
            uint32_t start = p;
            while (p < end && a->run[p] == UNSORTED) a->run[p++] = 0;
            shmr_runs_free(h, start, p - start);
        }
    }
}
