/* SPDX-License-Identifier: BSD-3-Clause */
/* Runs of pages, of extents that this process owns.
 *
 * "Quick" lists of exact lengths first (warm, not coalesced; last freed, first out, but what others have read, of 128 KiB
 * to 2 MiB, takes turns), then a two-level segregated fit (four bins a doubling) with coalescing; 2 MiB alignment from
 * 2 MiB up.
 *
 * Every function is called with h->lock held.
 * Two-level segregated fit: M. Masmano et al., "TLSF: a new dynamic memory allocator for real-time systems",
 * ECRTS 2004.
 */
#include <stdio.h>

#include "shmr_runs.h"

/* What others freed last is in the cache of who has read it, and each line that is written there has to be fetched from
 * that core. So blocks of these lengths take turns: with some megabytes in between, their lines have gone to the cache
 * that all cores share, of which they are to take a small part. Of shorter ones a writer's own cache still has most; of
 * longer ones, one alone is enough. */
#define TURNING_MIN (SHMR_LARGE_MIN / SHMR_PAGE)
#define TURNING_MAX (2097152u / SHMR_PAGE)
#define TURNING_MOST (4194304u / SHMR_PAGE)
#define TURNING_PART 8       /* of the common cache: fewer free pages than these: take one that was not among them, */
#define TURNING_EVERY 3      /* but not at once again, as it may never have been touched, */
#define TURNING_REFUSED 4095 /* and much later if there was none to take; */
#define TURNING_MANY 2       /* more than so many times as many: one of them is free for anything */

/* Bytes of the cache that all cores share; 0 if the kernel does not say. (glibc asks the processor, and is told in virtual
 * machines what the real one has.) */
static uint64_t common_cache(void) {
    FILE *file = fopen("/sys/devices/system/cpu/cpu0/cache/index3/size", "re");
    unsigned kib = 0;
    if (!file) return 0;
    if (fscanf(file, "%uK", &kib) != 1) kib = 0;
    fclose(file);
    return (uint64_t)kib << 10;
}

void shmr_runs_init(struct shmr_arena *a) {
    uint64_t pages = common_cache() / TURNING_PART / SHMR_PAGE;
    a->turning = pages && pages < TURNING_MOST ? (uint32_t)pages : TURNING_MOST;
}

/* The bin of a run: exact below 8 pages, then four a doubling. */
uint32_t shmr_runs_bin(uint32_t pages) {
    if (pages < 8) return pages;
    uint32_t log = 31u - (uint32_t)__builtin_clz(pages);
    uint32_t bin = 8 + (log - 3) * 4 + ((pages >> (log - 2)) & 3u);
    return bin < SHMR_BINS ? bin : SHMR_BINS - 1;
}

void shmr_runs_list(struct shmr_arena *a, uint32_t page, uint32_t pages) {
    uint32_t bin = shmr_runs_bin(pages);
    a->run[page] = pages << 2 | RUN_FREE;
    a->run[page + pages - 1] = pages << 2 | RUN_FREE;
    a->previous[page] = 0;
    a->next[page] = a->bin[bin];
    if (a->bin[bin]) a->previous[a->bin[bin] - 1] = page + 1;
    a->bin[bin] = page + 1;
    a->bin_bits[bin / 64] |= UINT64_C(1) << (bin % 64);
}

void shmr_runs_unlist(struct shmr_arena *a, uint32_t page) {
    uint32_t pages = run_length(a->run[page]), bin = shmr_runs_bin(pages);
    if (a->previous[page])
        a->next[a->previous[page] - 1] = a->next[page];
    else
        a->bin[bin] = a->next[page];
    if (a->next[page]) a->previous[a->next[page] - 1] = a->previous[page];
    if (!a->bin[bin]) a->bin_bits[bin / 64] &= ~(UINT64_C(1) << (bin % 64));
    a->run[page] = a->run[page + pages - 1] = 0;
}

/* A run becomes free and merges with its free neighbours. Foreign pages have RUN_NONE and never match. */
void shmr_runs_free(shmr *h, uint32_t page, uint32_t pages) {
    struct shmr_arena *a = &h->arena;
    if (page > 0 && run_kind(a->run[page - 1]) == RUN_FREE) {
        uint32_t before = run_length(a->run[page - 1]);
        page -= before;
        shmr_runs_unlist(a, page);
        pages += before;
    }
    if (page + pages < h->g.pages && run_kind(a->run[page + pages]) == RUN_FREE) {
        uint32_t after = run_length(a->run[page + pages]);
        shmr_runs_unlist(a, page + pages);
        pages += after;
    }
    shmr_runs_list(a, page, pages);
}

static uint32_t run_alignment(uint32_t pages) { return pages >= PAGES_PER_EXTENT ? PAGES_PER_EXTENT : 1; }

/* Inside a long run, each 2 MiB step says how far back its first page is, so that any address finds it. */
void shmr_runs_mark_steps(struct shmr_arena *a, uint32_t page, uint32_t pages, bool set) {
    for (uint32_t p = (page / PAGES_PER_EXTENT + 1) * PAGES_PER_EXTENT; p < page + pages; p += PAGES_PER_EXTENT)
        a->run[p] = set ? (p - page) << 2 | RUN_NONE : 0;
}

static uint64_t use_run(struct shmr_arena *a, uint32_t page, uint32_t pages) {
    a->run[page] = pages << 2 | RUN_USED;
    a->record[page] = 0;
    shmr_runs_mark_steps(a, page, pages, true);
    a->used_bytes += (uint64_t)pages * SHMR_PAGE;
    return (uint64_t)page * SHMR_PAGE;
}

static struct shmr_quick *quick_of(struct shmr_arena *a, uint32_t pages) {
    return &a->quick[(pages * 0x9e3779b1u) >> 26];
}

static bool takes_turns(uint32_t pages) { return pages >= TURNING_MIN && pages <= TURNING_MAX; }

static uint32_t first_quick(struct shmr_arena *a, struct shmr_quick *q) {
    uint32_t page = q->first - 1;
    q->first = a->next[page];
    q->count--;
    return page;
}

static uint64_t take_quick(struct shmr_arena *a, uint32_t pages) {
    struct shmr_quick *q = quick_of(a, pages);
    if (q->pages != pages || !q->first) return SHMR_NOWHERE;
    return use_run(a, first_quick(a, q), pages);
}

bool shmr_runs_have_quick(shmr *h, uint32_t pages) {
    const struct shmr_quick *q = quick_of(&h->arena, pages);
    return q->pages == pages && q->first;
}

static void list_quick(struct shmr_arena *a, struct shmr_quick *q, uint32_t page, bool at_end) {
    at_end = at_end && q->first;
    a->run[page] = q->pages << 2 | RUN_QUICK;
    a->next[page] = at_end ? 0 : q->first;
    if (at_end) a->next[q->last - 1] = page + 1;
    if (at_end || !q->first) q->last = page + 1;
    if (!at_end) q->first = page + 1;
    q->count++;
}

static void flush_quick_one(shmr *h, struct shmr_quick *q) {
    uint32_t page = first_quick(&h->arena, q);
    h->arena.run[page] = 0; /* it may end up inside a longer run */
    shmr_runs_free(h, page, q->pages);
}

static void flush_quick_list(shmr *h, struct shmr_quick *q) {
    while (q->first) flush_quick_one(h, q);
    q->pages = 0;
}

bool shmr_runs_gather(shmr *h) {
    bool any = false;
    for (int i = 0; i < SHMR_QUICK; i++) {
        any |= h->arena.quick[i].first != 0;
        flush_quick_list(h, &h->arena.quick[i]);
    }
    return any;
}

void shmr_runs_release(shmr *h, uint32_t page, bool elsewhere) {
    struct shmr_arena *a = &h->arena;
    uint32_t pages = run_length(a->run[page]);
    a->used_bytes -= (uint64_t)pages * SHMR_PAGE;
    shmr_runs_mark_steps(a, page, pages, false);
    struct shmr_quick *q = quick_of(a, pages);
    if (q->pages != pages) {
        flush_quick_list(h, q);
        q->pages = pages;
        if (a->turns_wait < TURNING_EVERY) a->turns_wait = TURNING_EVERY; /* its first ones are enough for a while */
    }
    bool turns = elsewhere && takes_turns(pages);
    list_quick(a, q, page, turns);
    if (turns && q->count * pages > a->turning * TURNING_MANY) flush_quick_one(h, q);
}

static uint64_t take_run(shmr *h, uint32_t pages) {
    struct shmr_arena *a = &h->arena;
    uint32_t align = run_alignment(pages);
    for (uint32_t bin = shmr_runs_bin(pages); bin < SHMR_BINS; bin++) {
        uint64_t bits = a->bin_bits[bin / 64] >> (bin % 64);
        if (!bits) {
            bin |= 63; /* nothing more in this word */
            continue;
        }
        bin += (uint32_t)__builtin_ctzll(bits);
        for (uint32_t link = a->bin[bin]; link; link = a->next[link - 1]) {
            uint32_t page = link - 1, length = run_length(a->run[page]);
            uint32_t start = (page + align - 1) / align * align;
            if (start + pages > page + length) continue;
            shmr_runs_unlist(a, page);
            if (start > page) shmr_runs_list(a, page, start - page);
            if (page + length > start + pages) shmr_runs_list(a, start + pages, page + length - start - pages);
            return use_run(a, start, pages);
        }
    }
    return SHMR_NOWHERE;
}

/* A quarter of all extents would be nobody's still. */
static bool much_is_left(shmr *h) {
    uint64_t nobodys = 0;
    for (uint32_t i = 0; i < h->g.extents; i++) nobodys += !(uint32_t)shmr_load_relaxed(shmr_extent_at(h, i)); /* a hint */
    return nobodys * 4 >= h->g.extents + UINT64_C(4);
}

/* One more block of a length that takes turns, if few do and nobody is short of memory. */
static uint64_t take_another(shmr *h, uint32_t pages) {
    struct shmr_arena *a = &h->arena;
    const struct shmr_quick *q = quick_of(a, pages);
    if (!takes_turns(pages) || q->pages != pages || !q->first || q->count * pages >= a->turning) return SHMR_NOWHERE;
    if (a->turns_wait) {
        a->turns_wait--;
        return SHMR_NOWHERE;
    }
    uint64_t offset = take_run(h, pages);
    bool few = a->owned_bytes < (uint64_t)a->turning * TURNING_MANY * SHMR_PAGE;
    if (offset == SHMR_NOWHERE && few && !shmr_any_waiter(shmr_header_of(h)->extent_waiters) && much_is_left(h) &&
        shmr_arena_grow(h, SHMR_EXTENT) == SHMR_OK)
        offset = take_run(h, pages);
    a->turns_wait = offset == SHMR_NOWHERE ? TURNING_REFUSED : TURNING_EVERY;
    return offset;
}

uint64_t shmr_runs_take(shmr *h, uint32_t pages) {
    uint64_t offset = take_another(h, pages);
    if (offset == SHMR_NOWHERE) offset = take_quick(&h->arena, pages);
    return offset == SHMR_NOWHERE ? take_run(h, pages) : offset;
}
