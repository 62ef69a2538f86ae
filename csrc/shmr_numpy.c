/* SPDX-License-Identifier: BSD-3-Clause */
/* NumPy's memory handler (NEP 49): arrays born in this process's arena.
 *
 * NumPy calls these with the GIL held, from any thread; they never call Python. Small, or when the arena is full, or in a
 * forked child: plain malloc. An allocation takes a block record only when it is first sent (shmr_share).
 */
#include "shmr_internal.h"

struct context {
    shmr *h;
    char *arena;
    uint64_t arena_bytes, threshold, limit;
    struct shmr_numpy_handler handler;
};

static bool in_arena(const struct context *c, const void *address) {
    return (const char *)address >= c->arena && (const char *)address < c->arena + c->arena_bytes &&
           !shmr_count_get(&c->h->unmapped);
}

static void *take(struct context *c, size_t size) {
    shmr *h = c->h;
    if (size < c->threshold || shmr_enter(h) != SHMR_OK) return NULL;
    uint64_t offset = SHMR_NOWHERE;
    pthread_mutex_lock(&h->lock);
    if (h->arena.used_bytes + size <= c->limit) offset = shmr_take_allocation(h, size);
    pthread_mutex_unlock(&h->lock);
    if (offset != SHMR_NOWHERE) return c->arena + offset; /* the pin is now that of the array */
    shmr_leave(h, SHMR_OK);
    return NULL;
}

static void *handler_malloc(void *context, size_t size) {
    void *address = take(context, size);
    return address ? address : malloc(size);
}

static void *handler_calloc(void *context, size_t count, size_t size) {
    size_t bytes;
    if (__builtin_mul_overflow(count, size, &bytes)) return NULL;
    void *address = take(context, bytes);
    return address ? memset(address, 0, bytes) : calloc(count, size); /* recycled memory is not zero */
}

static void handler_free(void *context, void *address, size_t size) {
    struct context *c = context;
    (void)size;
    if (!in_arena(c, address)) {
        free(address);
        return;
    }
    shmr *h = c->h;
    if (shmr_usable(h) == SHMR_FORKED) return; /* the parent's */
    if (shmr_count_get(&h->left)) return;      /* by force, at exit: an heir's by now */
    uint64_t start, room;
    pthread_mutex_lock(&h->lock);
    uint32_t *record = shmr_arena_record(h, (uint64_t)((char *)address - c->arena), &start, &room);
    if (record && *record)
        shmr_drop_locked(h, *record - 1); /* others may hold it on */
    else if (record)
        shmr_arena_release(h, start, room, false);
    pthread_mutex_unlock(&h->lock);
    shmr_notify_all(h, shmr_participant_at(h, h->self)->space_waiters);
    shmr_pin(h, -1);
}

static void *handler_realloc(void *context, void *address, size_t size) {
    struct context *c = context;
    if (!address) return handler_malloc(context, size);
    if (!in_arena(c, address)) return realloc(address, size);
    uint64_t start, room = 0;
    if (shmr_usable(c->h) != SHMR_FORKED)
        pthread_mutex_lock(&c->h->lock);
    else if (pthread_mutex_trylock(&c->h->lock) != 0)
        return NULL; /* a thread that the fork did not take along held it */
    shmr_arena_record(c->h, (uint64_t)((char *)address - c->arena), &start, &room);
    pthread_mutex_unlock(&c->h->lock);
    if (size <= room && size * 2 >= room) return address;
    void *moved = handler_malloc(context, size);
    if (!moved) return NULL;
    memcpy(moved, address, size < room ? size : room);
    handler_free(context, address, room);
    return moved;
}

void *shmr_numpy_handler(shmr *h, uint64_t threshold, uint64_t limit) {
    struct context *c = calloc(1, sizeof *c); /* immortal, like every array that it made might be */
    if (!c) return NULL;
    shmr_count_add(&h->handle, 1); /* likewise the handle; the mapping goes with the last pin */
    shmr_count_add(&h->immortal, 1);
    c->h = h;
    c->arena = shmr_arena_base(h);
    c->arena_bytes = h->g.config.arena_bytes;
    c->threshold = threshold ? threshold : 1;
    c->limit = limit;
    strcpy(c->handler.name, "shmengine");
    c->handler.version = 1;
    c->handler.allocator.context = c;
    c->handler.allocator.malloc = handler_malloc;
    c->handler.allocator.calloc = handler_calloc;
    c->handler.allocator.realloc = handler_realloc;
    c->handler.allocator.free = handler_free;
    return &c->handler;
}
