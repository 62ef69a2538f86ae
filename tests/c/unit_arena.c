/* SPDX-License-Identifier: BSD-3-Clause */
/* The allocator alone, against a shadow map of the arena in units of 64 bytes. */
#include "harness.h"

#define UNIT 64u
#define LIVE_MAX 3000

struct allocation {
    uint64_t offset, bytes, room;
    uint32_t stamp;
};

static shmr *h;
static int fd;
static uint8_t *shadow; /* a unit: in use */

static void open_arena(uint64_t arena_bytes) {
    shmr_config config = small_config();
    config.arena_bytes = arena_bytes;
    h = create_region(&config, &fd);
    h->arena.turning = 4 * MIB / SHMR_PAGE; /* as where the processor's cache is large */
    shadow = calloc(arena_bytes / UNIT, 1);
}

static void close_arena(void) {
    free(shadow);
    leave_region(h);
    close(fd);
}

static uint64_t take(uint64_t bytes) {
    pthread_mutex_lock(&h->lock);
    uint64_t offset = shmr_take_allocation(h, bytes);
    pthread_mutex_unlock(&h->lock);
    return offset;
}

static void give(uint64_t offset, uint64_t room, bool elsewhere) {
    pthread_mutex_lock(&h->lock);
    shmr_arena_release(h, offset, room, elsewhere);
    pthread_mutex_unlock(&h->lock);
}

static void mark(const struct allocation *a, uint8_t used) {
    for (uint64_t u = a->offset / UNIT; u < (a->offset + a->room) / UNIT; u++) {
        CHECK_EQ(shadow[u], !used); /* overlap, or released twice */
        shadow[u] = used;
    }
}

static void stamp(const struct allocation *a, bool check) {
    char *at = shmr_arena_base(h) + a->offset;
    uint64_t last = a->bytes > 4 ? (a->bytes - 4) & ~UINT64_C(3) : 0;
    uint32_t found;
    for (int i = 0; i < 2; i++) {
        char *word = at + (i ? last : 0);
        if (check) {
            memcpy(&found, word, 4);
            CHECK_EQ(found, a->stamp);
        } else {
            memcpy(word, &a->stamp, 4);
        }
    }
}

static bool allocate(struct allocation *a, uint64_t bytes) {
    static uint32_t serial;
    uint64_t offset = take(bytes);
    if (offset == SHMR_NOWHERE) return false;
    *a = (struct allocation){offset, bytes, shmr_arena_room(bytes), ++serial};
    CHECK(a->room >= bytes && a->room % UNIT == 0);
    CHECK(offset + a->room <= h->g.config.arena_bytes);
    CHECK_EQ(offset % UNIT, 0);
    if (bytes >= 32768) CHECK_EQ(offset % SHMR_PAGE, 0);
    if (bytes >= SHMR_EXTENT) CHECK_EQ(offset % SHMR_EXTENT, 0);
    for (uint64_t e = offset / SHMR_EXTENT; e <= (offset + a->room - 1) / SHMR_EXTENT; e++)
        CHECK_EQ(shmr_load_relaxed(shmr_extent_at(h, (uint32_t)e)), SHMR_EXTENT_WARM | (h->self + 1));
    mark(a, 1);
    stamp(a, false);
    return true;
}

static void release_read(const struct allocation *a, bool elsewhere) {
    stamp(a, true);
    mark(a, 0);
    give(a->offset, a->room, elsewhere);
}

static void release(const struct allocation *a) { release_read(a, true); }

/* Any address inside an allocation finds it. */
static void look_up(const struct allocation *a, uint64_t inside) {
    uint64_t start = 0, room = 0;
    pthread_mutex_lock(&h->lock);
    uint32_t *record = shmr_arena_record(h, a->offset + inside, &start, &room);
    pthread_mutex_unlock(&h->lock);
    CHECK(record != NULL);
    CHECK_EQ(start, a->offset);
    CHECK_EQ(room, a->room);
}

static uint64_t owned_extents(void) {
    uint64_t owned = 0;
    for (uint32_t e = 0; e < h->g.extents; e++) owned += (uint32_t)shmr_load_relaxed(shmr_extent_at(h, e)) == h->self + 1;
    return owned;
}

static void nothing_is_left(void) {
    shmr_trim(h);
    CHECK_EQ(h->arena.used_bytes, 0);
    CHECK_EQ(h->arena.owned_bytes, 0);
    CHECK_EQ(owned_extents(), 0);
    CHECK(h->arena.bin_bits[0] == 0 && h->arena.bin_bits[1] == 0);
    CHECK(h->arena.slabs == NULL);
}

static void size_classes(void) {
    open_arena(2 * MIB);
    uint64_t before = 0;
    for (uint64_t bytes = 0; bytes <= 65536; bytes++) {
        uint64_t room = shmr_arena_room(bytes);
        CHECK(room >= bytes && room >= UNIT && room % UNIT == 0);
        CHECK(room >= before); /* monotonous */
        if (bytes > 512) CHECK(room - bytes <= bytes / 4 + UNIT); /* four classes a doubling waste a quarter at most */
        before = room;
    }
    CHECK_EQ(shmr_arena_room(1), 64);
    CHECK_EQ(shmr_arena_room(513), 640);
    CHECK_EQ(shmr_arena_room(32768), 32768);
    CHECK_EQ(shmr_arena_room(32769), 36864);
    close_arena();
}

static void random_against_shadow(uint64_t seed, uint64_t largest, uint64_t budget, uint32_t limit, int steps) {
    open_arena(budget);
    static struct allocation live[LIVE_MAX];
    uint32_t count = 0;
    uint64_t used = 0;
    int full = 0;
    for (int step = 0; step < steps; step++) {
        /* Breathe: fill up for a while, then drain for a while. */
        bool filling = step / 2000 % 2 == 0 ? random_below(&seed, 10) < 7 : random_below(&seed, 10) < 3;
        if ((filling || !count) && count < limit) {
            if (allocate(&live[count], random_size(&seed, largest)))
                used += live[count++].room;
            else
                full++;
        }
        if (!filling && count) {
            uint32_t i = (uint32_t)random_below(&seed, count);
            used -= live[i].room;
            release(&live[i]);
            live[i] = live[--count];
        }
        if (count) {
            const struct allocation *a = &live[random_below(&seed, count)];
            look_up(a, random_below(&seed, a->room));
        }
        if (step % 5000 == 4999) shmr_trim(h);
        CHECK_EQ(h->arena.used_bytes, used);
    }
    CHECK(full < steps);
    while (count) release(&live[--count]);
    nothing_is_left();
    close_arena();
}

static void random_mixed_sizes(void) { random_against_shadow(1, 6 * MIB, 64 * MIB, 600, 40000); }
static void random_small_sizes(void) { random_against_shadow(2, 40000, 32 * MIB, LIVE_MAX, 40000); }
static void random_when_nearly_full(void) { random_against_shadow(3, 3 * MIB, 8 * MIB, LIVE_MAX, 20000); }

/* A run that was freed, cached and merged again is found from its middle. */
static void look_up_after_coalescing(void) {
    open_arena(2 * MIB);
    struct allocation parts[8], whole;
    for (int order = 0; order < 2; order++) {
        for (int i = 0; i < 8; i++) REQUIRE(allocate(&parts[i], 256 * 1024));
        for (int i = 0; i < 8; i++) release(&parts[order ? 7 - i : i]);
        REQUIRE(allocate(&whole, 2 * MIB));
        for (uint64_t page = 0; page < whole.room / SHMR_PAGE; page++) look_up(&whole, page * SHMR_PAGE + 17);
        release(&whole);
    }
    /* Likewise across extents, and for a run that starts in the middle of one. */
    close_arena();
    open_arena(8 * MIB);
    struct allocation first, second;
    REQUIRE(allocate(&first, 100 * SHMR_PAGE));
    REQUIRE(allocate(&second, 7 * MIB / 2));
    for (uint64_t page = 0; page < second.room / SHMR_PAGE; page++) look_up(&second, page * SHMR_PAGE);
    look_up(&first, first.room - 1);
    release(&first);
    release(&second);
    nothing_is_left();
    close_arena();
}

/* Whatever the order of release, the whole budget is one run again. */
static void coalescing(void) {
    open_arena(16 * MIB);
    for (uint64_t seed = 10; seed < 20; seed++) {
        struct allocation parts[64];
        uint32_t count = 0;
        uint64_t s = seed;
        while (count < 64 && allocate(&parts[count], 256 * 1024)) count++;
        CHECK_EQ(count, 64);
        CHECK_EQ(take(64), SHMR_NOWHERE);
        while (count) {
            uint32_t i = (uint32_t)random_below(&s, count);
            release(&parts[i]);
            parts[i] = parts[--count];
        }
        struct allocation whole;
        REQUIRE(allocate(&whole, 16 * MIB));
        release(&whole);
    }
    nothing_is_left();
    close_arena();
}

/* What is owned and free joins with what is nobody's: one small allocation must not split the budget for ever. */
static void whole_budget_after_small_use(void) {
    open_arena(8 * MIB);
    struct allocation small, whole;
    REQUIRE(allocate(&small, 100000));
    release(&small);
    REQUIRE(allocate(&whole, 8 * MIB));
    release(&whole);
    for (int i = 0; i < 3; i++) {
        REQUIRE(allocate(&small, 64));
        release(&small);
    }
    REQUIRE(allocate(&whole, 8 * MIB));
    release(&whole);
    nothing_is_left();
    close_arena();
}

static void growth_to_the_budget(void) {
    open_arena(16 * MIB);
    struct allocation parts[16];
    CHECK_EQ(owned_extents(), 0);
    for (uint32_t i = 0; i < 8; i++) {
        REQUIRE(allocate(&parts[i], 2 * MIB));
        CHECK_EQ(owned_extents(), i + 1); /* as much as is needed, not more */
    }
    CHECK_EQ(take(1), SHMR_NOWHERE);
    CHECK_EQ(take(17 * MIB), SHMR_NOWHERE);
    release(&parts[3]);
    REQUIRE(allocate(&parts[3], 100)); /* a slab needs only a few pages of the hole */
    REQUIRE(allocate(&parts[8], MIB));
    for (uint32_t i = 0; i < 9; i++) release(&parts[i]);
    nothing_is_left();
    close_arena();
}

static void trim_gives_extents_back(void) {
    open_arena(16 * MIB);
    struct allocation parts[8];
    for (int i = 0; i < 8; i++) REQUIRE(allocate(&parts[i], 2 * MIB));
    for (int i = 0; i < 8; i += 2) release(&parts[i]);
    CHECK_EQ(owned_extents(), 8); /* kept, warm */
    shmr_trim(h);
    CHECK_EQ(owned_extents(), 4);
    for (int i = 1; i < 8; i += 2) look_up(&parts[i], 12345);
    shmr *other = attach_region(fd); /* and somebody else can have them */
    for (uint32_t i = 0; i < 4; i++) {
        pthread_mutex_lock(&other->lock);
        uint64_t offset = shmr_take_allocation(other, 2 * MIB);
        CHECK(offset != SHMR_NOWHERE && offset / (2 * MIB) % 2 == 0);
        pthread_mutex_unlock(&other->lock);
    }
    CHECK_EQ(take(64), SHMR_NOWHERE);
    for (uint32_t i = 0; i < 4; i++) {
        pthread_mutex_lock(&other->lock);
        shmr_arena_release(other, i * 4 * MIB, 2 * MIB, true);
        pthread_mutex_unlock(&other->lock);
    }
    leave_region(other);
    for (int i = 1; i < 8; i += 2) release(&parts[i]);
    nothing_is_left();
    CHECK_EQ(counters_of(h).reserved, 16 * MIB); /* and they stay warm */
    close_arena();
}

/* The block released last is handed out first: its pages are in the cache, and mapped. One of middling length only if
 * nobody else has read it. */
static void last_in_first_out(void) {
    open_arena(32 * MIB);
    const uint64_t sizes[] = {1, 64, 700, 5000, 32768, 32769, 100000, 5 * MIB, 131072, 200000, MIB, 2 * MIB};
    h->arena.turns_wait = 1000; /* no others */
    for (uint32_t i = 0; i < 2 * sizeof sizes / sizeof *sizes; i++) {
        bool elsewhere = i % 2, turns = elsewhere && i / 2 >= 8;
        struct allocation a[3], again[3];
        for (int k = 0; k < 3; k++) REQUIRE(allocate(&a[k], sizes[i / 2]));
        for (int k = 0; k < 3; k++) release_read(&a[(k * 2) % 3], elsewhere); /* 0, 2, 1 */
        for (int k = 0; k < 3; k++) REQUIRE(allocate(&again[k], sizes[i / 2]));
        CHECK_EQ(again[turns ? 2 : 0].offset, a[1].offset);
        CHECK_EQ(again[1].offset, a[2].offset);
        CHECK_EQ(again[turns ? 0 : 2].offset, a[0].offset);
        for (int k = 0; k < 3; k++) release_read(&again[k], elsewhere);
    }
    nothing_is_left();
    close_arena();
}

/* One block at a time, over and over: the most extents that it had meanwhile. Each `apart` of them differ from all in
 * between, when as many as ever will be take part. */
static uint64_t turn(uint64_t bytes, uint32_t apart) {
    static uint64_t offsets[1000];
    uint64_t most = 0;
    for (uint32_t i = 0; i < 1000; i++) {
        struct allocation a;
        if (!allocate(&a, bytes)) exit(2);
        offsets[i] = a.offset;
        for (uint32_t k = i > 500 ? i - apart + 1 : i; k < i; k++) CHECK(offsets[k] != a.offset);
        if (owned_extents() > most) most = owned_extents();
        release(&a);
    }
    return most;
}

static uint64_t quick_bytes(void) {
    uint64_t pages = 0;
    for (int i = 0; i < SHMR_QUICK; i++) pages += (uint64_t)h->arena.quick[i].pages * h->arena.quick[i].count;
    return pages * SHMR_PAGE;
}

/* Blocks of middling length take turns through some megabytes, and not through all that there is. */
static void middling_ones_take_turns(void) {
    const uint64_t sizes[] = {131072, 200000, MIB, 2 * MIB};
    for (uint32_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        open_arena(256 * MIB);
        uint64_t most = turn(sizes[i], (uint32_t)(4 * MIB / shmr_arena_room(sizes[i])));
        CHECK(most >= 2 && most <= 4);
        struct allocation many[64];
        for (int k = 0; k < 64; k++) REQUIRE(allocate(&many[k], sizes[i]));
        for (int k = 0; k < 64; k++) release(&many[k]);
        CHECK(quick_bytes() > 6 * MIB && quick_bytes() <= 8 * MIB); /* the others are free for anything */
        nothing_is_left();
        close_arena();
    }
}

/* Through fewer where the cache that all cores share is small. */
static void less_where_the_cache_is_small(void) {
    open_arena(256 * MIB);
    h->arena.turning = MIB / SHMR_PAGE;
    CHECK_EQ(turn(131072, 8), 1);
    CHECK_EQ(turn(MIB, 1), 1); /* one is as much as they are to be */
    struct allocation many[64];
    for (int k = 0; k < 64; k++) REQUIRE(allocate(&many[k], 131072));
    for (int k = 0; k < 64; k++) release(&many[k]);
    CHECK(quick_bytes() > MIB && quick_bytes() <= 2 * MIB + MIB); /* and the one of the other length */
    nothing_is_left();
    close_arena();
}

/* Who claims and never sleeps gives back what is only kept for its next turn, too. */
static void kept_until_somebody_is_short(void) {
    open_arena(64 * MIB);
    CHECK(turn(MIB, 4) > 1);
    shmr *other = attach_region(fd);
    shmr_word *waiters = &shmr_header_of(h)->extent_waiters[other->self / 64];
    shmr_block b = {0};
    for (int waits = 0; waits < 2; waits++) {
        if (waits) shmr_or_seq_cst(waiters, UINT64_C(1) << other->self % 64);
        OK(shmr_claim(h, 100000, NULL, 0, -1, NOT_AT_ALL, &b)); /* a small one is nothing that one would look at this for */
        CHECK(owned_extents() > 1);
        OK(shmr_abort(h, &b));
        OK(shmr_claim(h, MIB, NULL, 0, -1, NOT_AT_ALL, &b));
        CHECK(waits ? owned_extents() == 1 : owned_extents() > 1);
        OK(shmr_abort(h, &b));
    }
    shmr_store_relaxed(waiters, 0);
    leave_region(other);
    nothing_is_left();
    close_arena();
}

/* Nobody goes without for their sake: not who comes later, nor who waits for memory. */
static void turns_leave_room(void) {
    const struct { uint64_t all, theirs, leave, most; } cases[] = {
        {4, 0, 0, 1}, {6, 0, 0, 2}, {8, 0, 0, 2}, {32, 0, 0, 2}, {32, 20, 0, 2}, {32, 22, 0, 1}, {32, 0, 14, 2}, {32, 0, 15, 1},
    };
    for (uint32_t i = 0; i < sizeof cases / sizeof *cases; i++) { /* a quarter is left to others */
        open_arena(cases[i].all * MIB);
        shmr *they = attach_region(fd);
        shmr_block some = {0};
        if (cases[i].theirs) OK(shmr_claim(they, cases[i].theirs * MIB, NULL, 0, -1, NOT_AT_ALL, &some));
        h->arena.leave = (uint32_t)cases[i].leave; /* extents */
        CHECK_EQ(turn(MIB, 1), cases[i].most);
        if (cases[i].theirs) OK(shmr_abort(they, &some));
        leave_region(they);
        nothing_is_left();
        close_arena();
    }
    open_arena(256 * MIB);
    shmr *other = attach_region(fd);
    shmr_word *waiters = &shmr_header_of(h)->extent_waiters[other->self / 64];
    shmr_or_seq_cst(waiters, UINT64_C(1) << other->self % 64);
    CHECK_EQ(turn(MIB, 2), 1);
    shmr_store_relaxed(waiters, 0);
    struct allocation kept[7];
    h->arena.turns_wait = 0; /* it was refused, and would not ask soon */
    for (int k = 0; k < 7; k++) REQUIRE(allocate(&kept[k], MIB));
    CHECK_EQ(turn(MIB, 1), 4); /* all that it takes for their sake, though of these only one is free */
    for (int k = 0; k < 7; k++) release(&kept[k]);
    leave_region(other);
    nothing_is_left();
    close_arena();
    open_arena(16 * MIB); /* the rest is somebody else's */
    other = attach_region(fd);
    shmr_block theirs = {0};
    OK(shmr_claim(other, 14 * MIB, NULL, 0, -1, NOT_AT_ALL, &theirs));
    CHECK_EQ(turn(MIB, 2), 1);
    OK(shmr_abort(other, &theirs));
    leave_region(other);
    nothing_is_left();
    close_arena();
}

static void slabs(void) {
    open_arena(8 * MIB);
    static struct allocation live[LIVE_MAX];
    for (uint32_t i = 0; i < LIVE_MAX; i++) REQUIRE(allocate(&live[i], 64));
    /* Small blocks lie close together: 3,000 of 64 bytes in a fifth of a megabyte. */
    CHECK_EQ(h->arena.used_bytes, LIVE_MAX * 64);
    CHECK_EQ(owned_extents(), 1);
    for (uint32_t i = 0; i < LIVE_MAX; i += 7) look_up(&live[i], 63);
    for (uint32_t i = 0; i < LIVE_MAX; i++) release(&live[i]);
    /* Empty slabs of one class are used up by another before the arena says that it is full. */
    struct allocation large[4];
    for (int i = 0; i < 4; i++) REQUIRE(allocate(&large[i], 2 * MIB));
    CHECK_EQ(take(64), SHMR_NOWHERE);
    for (int i = 0; i < 4; i++) release(&large[i]);
    nothing_is_left();
    close_arena();
}

/* Several processes that grow by several extents at once must not chase each other through the region: what each of them
 * reserves in passing stays reserved. */
#define GROWERS 3
#define GROWTH (16 * MIB)

static pthread_barrier_t together;

static void *grow_at_once(void *of) {
    shmr *grower = of;
    pthread_barrier_wait(&together);
    pthread_mutex_lock(&grower->lock);
    CHECK(shmr_take_allocation(grower, GROWTH) != SHMR_NOWHERE);
    pthread_mutex_unlock(&grower->lock);
    return NULL;
}

static void growing_side_by_side(void) {
    for (int round = 0; round < 25; round++) {
        open_arena(512 * MIB);
        shmr *growers[GROWERS] = {h};
        for (int i = 1; i < GROWERS; i++) OK(shmr_attach(fd, &growers[i]));
        pthread_t threads[GROWERS];
        pthread_barrier_init(&together, NULL, GROWERS);
        for (int i = 0; i < GROWERS; i++)
            if (pthread_create(&threads[i], NULL, grow_at_once, growers[i]) != 0) exit(2);
        for (int i = 0; i < GROWERS; i++) pthread_join(threads[i], NULL);
        pthread_barrier_destroy(&together);
        CHECK_EQ(counters_of(h).reserved, GROWERS * GROWTH);
        for (int i = GROWERS; i-- > 1;) {
            OK(shmr_close(growers[i], 1));
            shmr_free(growers[i]);
        }
        close_arena();
    }
}

/* Extents that each participant has for small things do not lie between those where large ones could be. */
static void room_for_rows(void) {
    open_arena(64 * MIB); /* 32 extents: three rows of nine, and a few */
    shmr *other;
    OK(shmr_attach(fd, &other));
    shmr *takers[2] = {h, other};
    shmr_block small[2] = {{0}}, large = {0}, rows[3] = {{0}};
    for (int i = 0; i < 2; i++) { /* the large one goes, and the small one stays */
        OK(shmr_claim(takers[i], 17 * MIB, NULL, 0, -1, NOT_AT_ALL, &large));
        OK(shmr_claim(takers[i], 1000, NULL, 0, -1, NOT_AT_ALL, &small[i]));
        OK(shmr_abort(takers[i], &large));
        shmr_trim(takers[i]);
    }
    for (int i = 0; i < 3; i++) OK(shmr_claim(takers[i % 2], 17 * MIB, NULL, 0, -1, NOT_AT_ALL, &rows[i]));
    for (int i = 0; i < 3; i++) OK(shmr_abort(takers[i % 2], &rows[i]));
    for (int i = 0; i < 2; i++) OK(shmr_abort(takers[i], &small[i]));
    OK(shmr_close(other, 1));
    shmr_free(other);
    close_arena();
}

int main(void) {
    RUN(room_for_rows);
    RUN(growing_side_by_side);
    RUN(size_classes);
    RUN(last_in_first_out);
    RUN(middling_ones_take_turns);
    RUN(less_where_the_cache_is_small);
    RUN(turns_leave_room);
    RUN(kept_until_somebody_is_short);
    RUN(slabs);
    RUN(coalescing);
    RUN(look_up_after_coalescing);
    RUN(whole_budget_after_small_use);
    RUN(growth_to_the_budget);
    RUN(trim_gives_extents_back);
    RUN(random_mixed_sizes);
    RUN(random_small_sizes);
    RUN(random_when_nearly_full);
    return summary("unit_arena");
}
