/* SPDX-License-Identifier: BSD-3-Clause */
/* Regions and participants: lay out, map, validate, join, leave. Geometry is copied from the header once,
 * every offset is computed from the copy, and neither is read again. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "shmr_internal.h"

/* ---- errors ------------------------------------------------------------------------------------------------------ */

static _Thread_local struct {
    int error;
    const char *detail;
} last;

int shmr_fail(int status, int error, const char *detail) {
    last.error = error;
    last.detail = detail;
    return status;
}
int shmr_last_errno(void) { return last.error; }
const char *shmr_last_detail(void) { return last.detail ? last.detail : ""; }

const char *shmr_status_text(int status) {
    switch (status) {
#define SHMR_TEXT(name, number, text) \
    case number:                      \
        return text;
        SHMR_STATUSES(SHMR_TEXT)
#undef SHMR_TEXT
    }
    return "unknown status";
}

int shmr_abi(void) { return SHMR_ABI; }

/* ---- poison ------------------------------------------------------------------------------------------------------ */

/* Control words cannot be what the protocol writes. Everybody is told, by words that a commit and a lease read in any
 * case; whoever sleeps is woken to look. */
int shmr_poison(shmr *h, const char *why) {
    shmr_or_seq_cst(&shmr_header_of(h)->poisoned, 1); /* S6 */
    for (uint32_t r = 0; r < h->g.config.rings; r++)
        shmr_or_seq_cst(&shmr_ring_at(h, r)->closed, SHMR_RING_POISONED); /* S6 R9 W6 */
    shmr_ring_all(h);
    return shmr_fail(SHMR_CORRUPT, 0, why);
}

int shmr_poisoned(void) { return shmr_fail(SHMR_CORRUPT, 0, "the region was found damaged beyond repair"); }

static bool file_is_whole(int fd, uint64_t bytes) {
    struct stat s;
    return fstat(fd, &s) != 0 || (uint64_t)s.st_size >= bytes;
}

static const char CUT[] = "the region's file was cut";

/* Has a participant cut the file? Then what lies behind its new end would be SIGBUS: give it its length again, all of
 * it zero, and let nobody take that for messages. Whoever touches it before somebody looks here is lost. */
int shmr_check_file(shmr *h) {
    uint64_t bytes;
    if (!shmr_file_is_ours(&h->file, &bytes)) {
        int status = shmr_usable(h); /* another thread may have closed the handle, since this call began */
        return status != SHMR_OK ? status
                                 : shmr_fail(SHMR_SYSTEM, EBADF, "the region's descriptor was closed by other code");
    }
    if (bytes >= h->g.total) return SHMR_OK;
    int ignored = ftruncate(h->file.fd, (off_t)h->g.total);
    (void)ignored;
    if (file_is_whole(h->file.fd, h->g.total)) shmr_poison(h, CUT);
    return shmr_poisoned();
}

/* ---- forks ------------------------------------------------------------------------------------------------------- */

/* A forked child is not the participant that its parent is: every handle made before is dead in it. */
static shmr_count fork_epoch;
static void after_fork_in_child(void) {
    shmr_guard_after_fork();
    shmr_count_add(&fork_epoch, 1);
}
static void register_fork(void) { pthread_atfork(shmr_guard_before_fork, shmr_guard_after_fork, after_fork_in_child); }
static pthread_once_t fork_once = PTHREAD_ONCE_INIT;

int shmr_enter(shmr *h) {
    int status = shmr_usable(h);
    if (status != SHMR_OK) return status;
    shmr_pin(h, 1);
    status = shmr_usable(h); /* closed meanwhile, and perhaps left already? */
    if (status != SHMR_OK) shmr_pin(h, -1);
    return status;
}

int shmr_usable(const shmr *h) {
    if ((uint32_t)shmr_count_get(&fork_epoch) != h->fork_epoch) return SHMR_FORKED;
    if (shmr_count_get(&h->closed)) return SHMR_CLOSED;
    return shmr_count_get(&h->map->cut) ? shmr_fail(SHMR_CORRUPT, 0, CUT) : SHMR_OK;
}

/* ---- geometry ---------------------------------------------------------------------------------------------------- */

static uint64_t round_up(uint64_t value, uint64_t step) { return (value + step - 1) / step * step; }

static int compute_geometry(const shmr_config *c, struct shmr_geometry *g) {
    if (c->participants < 1 || c->participants > SHMR_MAX_PARTICIPANTS || c->doorbells < 1 ||
        c->doorbells > SHMR_MAX_DOORBELLS || c->rings < 1 || c->rings > SHMR_MAX_RINGS ||
        c->blocks < SHMR_GROUP || c->blocks > SHMR_MAX_BLOCKS || c->blocks % SHMR_GROUP ||
        c->arena_bytes < SHMR_EXTENT || c->arena_bytes % SHMR_EXTENT || c->arena_bytes > (UINT64_C(1) << 41))
        return shmr_fail(SHMR_MISMATCH, 0, "the geometry is out of range");
    memset(g, 0, sizeof *g);
    g->config = *c;
    g->groups = c->blocks / SHMR_GROUP;
    g->extents = (uint32_t)(c->arena_bytes / SHMR_EXTENT);
    g->pages = (uint32_t)(c->arena_bytes / SHMR_PAGE);
    uint64_t at = sizeof(struct shmr_header);
    g->participants_at = at;
    at += c->participants * sizeof(struct shmr_participant);
    g->doorbells_at = at;
    at += c->doorbells * sizeof(struct shmr_doorbell);
    g->rings_at = at;
    at += c->rings * sizeof(struct shmr_ring);
    for (uint32_t i = 0; i < c->rings; i++) {
        if (c->capacity[i] < 1 || c->capacity[i] > SHMR_MAX_BLOCKS)
            return shmr_fail(SHMR_MISMATCH, 0, "a ring's capacity is out of range");
        while (((uint64_t)1 << g->shift[i]) < c->capacity[i] + SHMR_SPARE_SLOTS(c->capacity[i])) g->shift[i]++;
        g->slots[i] = g->most[i] = 1u << g->shift[i];
        at = round_up(at, SHMR_LINE);
        g->slots_at[i] = at;
        at += (uint64_t)g->slots[i] * sizeof(shmr_word);
    }
    at = round_up(at, SHMR_LINE);
    g->extents_at = at;
    at = round_up(at + (uint64_t)g->extents * sizeof(shmr_word), SHMR_LINE);
    g->groups_at = at;
    at = round_up(at + (uint64_t)g->groups * sizeof(struct shmr_group), SHMR_PAGE);
    g->records_at = at;
    at += (uint64_t)c->blocks * sizeof(struct shmr_record);
    g->arena_at = round_up(at, SHMR_EXTENT);
    g->total = g->arena_at + c->arena_bytes;
    return SHMR_OK;
}

uint64_t shmr_region_bytes(const shmr_config *config) {
    struct shmr_geometry g;
    return compute_geometry(config, &g) == SHMR_OK ? g.total : 0;
}

static uint64_t geometry_hash(const struct shmr_geometry *g) {
    uint64_t words[SHMR_CONFIG_WORDS + 2] = {SHMR_ABI, g->total};
    const shmr_config *c = &g->config;
    uint64_t config[SHMR_CONFIG_WORDS] = {c->participants, c->doorbells, c->rings, c->blocks,
                                          c->arena_bytes, c->start, c->flags};
    memcpy(config + SHMR_CONFIG_CAPACITY, c->capacity, sizeof c->capacity);
    memcpy(words + 2, config, sizeof config);
    return (uint64_t)shmr_crc32c(1, words, sizeof words) << 32 | shmr_crc32c(0, words, sizeof words);
}

/* ---- mapping ------------------------------------------------------------------------------------------------------ */

#ifdef SHMR_TEST
/* Tests with several participants in one process: they share one mapping of a file, because ThreadSanitizer takes
 * two addresses for two memories. */
static pthread_mutex_t mappings_lock = PTHREAD_MUTEX_INITIALIZER;
static struct known_mapping {
    shmr_mapping *mapping;
    ino_t inode;
} known_mappings[16];

static shmr_mapping *known_mapping(int fd) {
    struct stat s;
    shmr_mapping *found = NULL;
    fstat(fd, &s);
    pthread_mutex_lock(&mappings_lock);
    for (int i = 0; i < 16 && !found; i++)
        if (known_mappings[i].mapping && known_mappings[i].inode == s.st_ino) found = known_mappings[i].mapping;
    if (found) shmr_count_add(&found->count, 1);
    pthread_mutex_unlock(&mappings_lock);
    return found;
}
static void know_mapping(int fd, shmr_mapping *m) {
    struct stat s;
    int i = 0;
    fstat(fd, &s);
    pthread_mutex_lock(&mappings_lock);
    while (i < 15 && known_mappings[i].mapping) i++;
    known_mappings[i] = (struct known_mapping){m, s.st_ino};
    pthread_mutex_unlock(&mappings_lock);
}
static void forget_mapping(const shmr_mapping *m) {
    pthread_mutex_lock(&mappings_lock);
    for (int i = 0; i < 16; i++)
        if (known_mappings[i].mapping == m) known_mappings[i].mapping = NULL;
    pthread_mutex_unlock(&mappings_lock);
}
#endif

/* The base is placed so that the arena starts on a 2 MiB boundary: huge pages need it. On both sides nothing is mapped. */
static shmr_mapping *map_file(int fd, const struct shmr_geometry *g) {
    shmr_mapping *m;
#ifdef SHMR_TEST
    if ((m = known_mapping(fd))) return m;
#endif
    m = calloc(1, sizeof *m);
    if (!m) return NULL;
    m->bytes = g->total;
    m->reserved_bytes = g->total + 2 * SHMR_EXTENT;
    m->reserved = mmap(NULL, m->reserved_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (m->reserved == MAP_FAILED) goto failed;
    m->base = (char *)round_up((uint64_t)(uintptr_t)m->reserved + SHMR_PAGE, SHMR_EXTENT);
    if (mmap(m->base, m->bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0) == MAP_FAILED) {
        munmap(m->reserved, m->reserved_bytes);
        goto failed;
    }
    shmr_count_add(&m->count, 1);
    shmr_guard(m);
#ifdef SHMR_TEST
    know_mapping(fd, m);
#endif
    return m;
failed:
    shmr_fail(SHMR_SYSTEM, errno, "mmap of the region");
    free(m);
    return NULL;
}

shmr_mapping *shmr_mapping_retain(shmr *h) {
    shmr_count_add(&h->map->count, 1);
    return h->map;
}

void shmr_mapping_release(shmr_mapping *m) {
    if (shmr_count_add(&m->count, -1) > 0) return;
#ifdef SHMR_TEST
    forget_mapping(m);
#endif
    shmr_unguard(m);
    munmap(m->reserved, m->reserved_bytes);
    free(m);
}

/* ---- handles ------------------------------------------------------------------------------------------------------- */

/* All but the struct itself. */
static void dismantle(shmr *h) {
    shmr_count_add(&h->unmapped, 1);
    shmr_arena_fini(h);
    shmr_held_fini(h);
    shmr_deaths_fini(h);
    for (uint32_t i = 0; h->frame_refs && i < h->g.config.blocks; i++)
        if (h->record_flags && h->record_flags[i]) free(h->frame_refs[i]);
    if (h->frame_refs) munmap(h->frame_refs, (size_t)h->g.config.blocks * sizeof(void *));
    if (h->record_flags) munmap(h->record_flags, h->g.config.blocks);
    if (h->places) munmap(h->places, (size_t)h->g.config.blocks * sizeof *h->places);
    if (h->holds) munmap(h->holds, (size_t)h->g.config.blocks * 4);
    for (uint32_t i = 0; i < SHMR_MAX_RINGS; i++) {
        free(h->last_seq[i]);
        pthread_mutex_destroy(&h->commit_lock[i]);
        pthread_mutex_destroy(&h->lease_lock[i]);
    }
    free(h->free_records);
    free(h->my_groups);
    pthread_mutex_destroy(&h->lock);
    pthread_mutex_destroy(&h->doorbell_lock);
    pthread_mutex_destroy(&h->death_lock);
    pthread_mutex_destroy(&h->undo_lock);
    if (h->map) shmr_mapping_release(h->map);
    shmr_file_close(&h->file);
}

static void destroy(shmr *h) {
    dismantle(h);
    free(h);
}

static void *sparse(size_t bytes) {
    void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return p == MAP_FAILED ? NULL : p;
}

static int new_handle(int fd, const struct shmr_geometry *g, shmr **out) {
    pthread_once(&fork_once, register_fork);
    shmr *h = calloc(1, sizeof *h);
    if (!h) return shmr_fail(SHMR_SYSTEM, ENOMEM, "malloc");
    h->g = *g;
    h->pid = (uint32_t)getpid();
    h->fork_epoch = (uint32_t)shmr_count_get(&fork_epoch);
    shmr_count_add(&h->handle, 1);
    pthread_mutex_init(&h->lock, NULL);
    pthread_mutex_init(&h->doorbell_lock, NULL);
    pthread_mutex_init(&h->death_lock, NULL);
    pthread_mutex_init(&h->undo_lock, NULL);
    for (uint32_t i = 0; i < SHMR_MAX_RINGS; i++) {
        pthread_mutex_init(&h->commit_lock[i], NULL);
        pthread_mutex_init(&h->lease_lock[i], NULL);
        if (i < g->config.rings) h->last_seq[i] = calloc(g->config.participants, sizeof(uint64_t));
    }
    struct stat s = {0};
    for (uint32_t i = 0; i < g->config.rings; i++) shmr_store_relaxed(&h->first_seen[i], g->config.start); /* ours */
    if (stat("/proc/self/ns/pid", &s) == 0) h->pid_namespace = s.st_ino;
    int own = fcntl(fd, F_DUPFD_CLOEXEC, 3);
    int status = own < 0 ? shmr_fail(SHMR_SYSTEM, errno, "dup of the region's descriptor") : SHMR_OK;
    h->file.fd = -1;
    if (status == SHMR_OK && !shmr_file_keep(&h->file, own)) {
        status = shmr_fail(SHMR_SYSTEM, errno, "fstat of the region");
        close(own);
    }
    for (uint32_t i = 0; i < g->config.rings; i++)
        if (!h->last_seq[i]) status = shmr_fail(SHMR_SYSTEM, ENOMEM, "calloc");
    if (status == SHMR_OK && !(h->map = map_file(own, g))) status = SHMR_SYSTEM;
    if (status == SHMR_OK) {
        h->base = h->map->base;
        h->record_flags = sparse(g->config.blocks);
        h->places = sparse((size_t)g->config.blocks * sizeof *h->places);
        h->holds = sparse((size_t)g->config.blocks * 4);
        h->frame_refs = sparse((size_t)g->config.blocks * sizeof(void *));
        if (!h->record_flags || !h->places || !h->holds || !h->frame_refs)
            status = shmr_fail(SHMR_SYSTEM, ENOMEM, "mmap of private tables");
    }
    if (status == SHMR_OK) status = shmr_arena_init(h);
    if (status == SHMR_OK) status = shmr_held_init(h);
    if (status == SHMR_OK) status = shmr_deaths_init(h);
    if (status != SHMR_OK) {
        int error = last.error;
        const char *detail = last.detail;
        destroy(h);
        return shmr_fail(status, error, detail);
    }
    *out = h;
    return SHMR_OK;
}

/* NumPy's handlers may be called for ever, but without an array in our arena they only ask whether we have closed. */
void shmr_free(shmr *h) {
    int64_t references = shmr_count_add(&h->handle, -1);
    if (references == 0)
        destroy(h);
    else if (references == shmr_count_get(&h->immortal) && shmr_count_get(&h->pins) == 0)
        dismantle(h);
}

void shmr_forget(shmr *h) {
    if (shmr_usable(h) != SHMR_FORKED) return;
    shmr_file_close(&h->file);
    if (pthread_mutex_trylock(&h->death_lock) != 0) return; /* a thread that the fork did not take along had it */
    pthread_mutex_unlock(&h->death_lock);
    shmr_close_pidfds(h);
    if (pthread_mutex_trylock(&h->lock) != 0) return; /* likewise; the tables are as it left them */
    pthread_mutex_unlock(&h->lock);
    shmr_free(h);
}

/* ---- joining and leaving --------------------------------------------------------------------------------------------- */

static int join(shmr *h) {
    bool joined = false;
    uint32_t i = 0;
    /* First the places of those who left: their arenas then have an owner again. Then vacant ones, then the dead's. */
    bool inherit = !(h->g.config.flags & SHMR_CREATOR_RECOVERS);
    for (uint32_t k = 0; inherit && !joined && k < h->g.config.participants; k++)
        if (shmr_life_kind(shmr_load_acquire(&shmr_participant_at(h, k)->life)) == SHMR_LEFT && /* A13 W1 */
            (joined = shmr_inherit(h, k)))
            i = k;
    for (uint32_t k = 0; !joined && k < h->g.config.participants; k++) {
        struct shmr_participant *p = shmr_participant_at(h, k);
        uint64_t life = shmr_load_acquire(&p->life); /* A13 W1 */
        if (shmr_life_kind(life) != SHMR_VACANT) continue;
        uint32_t epoch = (shmr_life_epoch(life) + 1) & 0xfffff;
        uint64_t joining = shmr_life_pack(epoch, shmr_namespace_tag(h), h->pid, SHMR_JOINING);
        if (!shmr_cas_acq_rel(&p->life, &life, joining)) continue; /* A13 R13 W1 W3 */
        h->self = i = k;
        h->epoch = epoch;
        joined = true;
    }
    for (uint32_t k = 0; inherit && !joined && k < h->g.config.participants; k++)
        if ((joined = shmr_inherit(h, k))) i = k;
    if (!joined) return shmr_fail(SHMR_CROWDED, 0, "every place in the table of participants is taken");
    struct shmr_participant *me = shmr_participant_at(h, i);
    shmr_store_relaxed(&me->start_time, shmr_start_time(h->pid)); /* published by R13 */
    shmr_store_relaxed(&me->pid_namespace, h->pid_namespace);     /* likewise */
    shmr_store_relaxed(&me->starving, 0);                         /* likewise */
    shmr_store_relaxed(&me->denied, 0);                           /* likewise */
    shmr_store_relaxed(&me->task_tag, 0);                         /* likewise */
    shmr_store_relaxed(&me->task_since_ns, 0);                    /* likewise */
    shmr_store_release(&me->life, shmr_life_pack(h->epoch, 0, h->pid, SHMR_LIVE)); /* R13 */
    shmr_add_relaxed(&shmr_header_of(h)->joins, 1);                                /* statistics */
    return SHMR_OK;
}

int shmr_create(int fd, const shmr_config *config, shmr **out) {
    struct shmr_geometry g;
    int status = compute_geometry(config, &g);
    if (status != SHMR_OK) return status;
    shmr *h;
    status = new_handle(fd, &g, &h);
    if (status != SHMR_OK) return status;
    status = shmr_reserve(h, 0, g.records_at);
    if (status != SHMR_OK) {
        destroy(h);
        return status;
    }
    struct shmr_header *header = shmr_header_of(h);
    const uint64_t words[SHMR_CONFIG_CAPACITY] = {config->participants, config->doorbells, config->rings,
                                                  config->blocks, config->arena_bytes, config->start, config->flags};
    for (int i = 0; i < SHMR_CONFIG_CAPACITY; i++) shmr_store_relaxed(&header->config[i], words[i]); /* before R14 */
    for (int i = 0; i < SHMR_MAX_RINGS; i++)
        shmr_store_relaxed(&header->config[SHMR_CONFIG_CAPACITY + i], config->capacity[i]); /* before R14 */
    shmr_store_relaxed(&header->abi, SHMR_ABI);                 /* before R14 */
    shmr_store_relaxed(&header->hash, geometry_hash(&g));       /* before R14 */
    for (uint32_t r = 0; r < config->rings; r++) {
        struct shmr_ring *q = shmr_ring_at(h, r);
        shmr_store_relaxed(&q->commit_cursor, config->start); /* before R14 */
        shmr_store_relaxed(&q->lease_cursor, config->start);  /* before R14 */
        for (uint64_t k = 0; k < g.slots[r]; k++) { /* every slot: the cycle before its first one */
            uint64_t position = config->start + k;
            uint32_t cycle = (uint32_t)(position >> g.shift[r]) & SHMR_CYCLE_MASK;
            shmr_store_relaxed(shmr_slot_at(h, r, position), shmr_slot_pack(cycle, 0, 0)); /* before R14 */
        }
    }
    status = join(h);
    if (status != SHMR_OK) {
        destroy(h);
        return status;
    }
    shmr_store_release(&header->magic, SHMR_MAGIC); /* R14 */
    *out = h;
    return SHMR_OK;
}

int shmr_attach(int fd, shmr **out) {
    struct stat s;
    if (fstat(fd, &s) != 0) return shmr_fail(SHMR_SYSTEM, errno, "fstat of the region");
    if (s.st_size < (off_t)sizeof(struct shmr_header)) return SHMR_WOULD_BLOCK;
    struct shmr_header *header =
        mmap(NULL, sizeof *header, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (header == MAP_FAILED) return shmr_fail(SHMR_SYSTEM, errno, "mmap of the region's header");
    uint64_t magic = shmr_load_acquire(&header->magic), abi = shmr_load_relaxed(&header->abi); /* A14 */
    uint64_t hash = shmr_load_relaxed(&header->hash), words[SHMR_CONFIG_WORDS];                  /* after A14 */
    for (int i = 0; i < SHMR_CONFIG_WORDS; i++) words[i] = shmr_load_relaxed(&header->config[i]); /* after A14 */
    munmap(header, sizeof *header);
    if (magic == 0) return SHMR_WOULD_BLOCK;
    if (magic != SHMR_MAGIC) return shmr_fail(SHMR_MISMATCH, 0, "it does not begin like a region");
    if (abi != SHMR_ABI) return shmr_fail(SHMR_MISMATCH, (int)abi, "another version of the layout");
    shmr_config config = {.arena_bytes = words[SHMR_CONFIG_ARENA_BYTES], .start = words[SHMR_CONFIG_START],
                          .flags = words[SHMR_CONFIG_FLAGS]};
    for (int i = 0; i < SHMR_CONFIG_ARENA_BYTES; i++)
        if (words[i] > UINT32_MAX) return shmr_fail(SHMR_MISMATCH, 0, "the geometry is out of range");
    config.participants = (uint32_t)words[SHMR_CONFIG_PARTICIPANTS];
    config.doorbells = (uint32_t)words[SHMR_CONFIG_DOORBELLS];
    config.rings = (uint32_t)words[SHMR_CONFIG_RINGS];
    config.blocks = (uint32_t)words[SHMR_CONFIG_BLOCKS];
    memcpy(config.capacity, words + SHMR_CONFIG_CAPACITY, sizeof config.capacity);
    struct shmr_geometry g;
    int status = compute_geometry(&config, &g);
    if (status != SHMR_OK) return status;
    if (geometry_hash(&g) != hash) return shmr_fail(SHMR_MISMATCH, 0, "the geometry does not match its checksum");
    if ((uint64_t)s.st_size != g.total) return shmr_fail(SHMR_MISMATCH, 0, "the file has another length than its geometry");
    shmr *h;
    status = new_handle(fd, &g, &h);
    if (status != SHMR_OK) return status;
    if (!file_is_whole(fd, g.total)) /* it has been cut meanwhile */
        status = shmr_fail(SHMR_MISMATCH, 0, "the file has been cut");
    else if (shmr_load_relaxed(&shmr_header_of(h)->poisoned)) /* nothing depends on it but this refusal */
        status = shmr_poisoned();
    if (status == SHMR_OK) status = join(h);
    if (status != SHMR_OK) {
        destroy(h);
        return status;
    }
    *out = h;
    return SHMR_OK;
}

/* Nothing of our arena lives on: give the records back, so that our place can simply be vacant. */
static bool give_groups(shmr *h) {
    for (uint32_t i = 0; i < h->my_group_count; i++)
        for (uint32_t k = 0; k < SHMR_GROUP; k++)
            if (h->record_flags[h->my_groups[i] * SHMR_GROUP + k]) return false;
    if (h->arena.used_bytes || h->arena.owned_bytes || h->held_bytes) return false;
    for (uint32_t i = 0; i < h->my_group_count; i++) {
        shmr_word *word = &shmr_group_at(h, h->my_groups[i])->owner;
        uint64_t seen = shmr_load_relaxed(word); /* own word */
        shmr_cas_release(word, &seen, seen & ~UINT64_C(0xffffffff)); /* R7 */
    }
    h->my_group_count = h->free_record_count = 0;
    return true;
}

static void leave(shmr *h) {
    if (shmr_count_add(&h->left, 1) != 1) return;
    if (shmr_usable(h) != SHMR_FORKED) {
        if (shmr_count_get(&h->pins) != 0) shmr_let_go(h);
        pthread_mutex_lock(&h->lock);
        shmr_sweep(h);
        shmr_arena_trim(h);
        /* By force while others of our threads are at work: what they still take, an heir finds. */
        bool vacant = !shmr_count_get(&h->pins) && !shmr_count_get(&h->again_count) && give_groups(h);
        pthread_mutex_unlock(&h->lock);
        shmr_return_doorbells(h);
        struct shmr_participant *me = shmr_participant_at(h, h->self);
        uint32_t kept = shmr_count_get(&h->again_count) ? SHMR_KEPT_MESSAGES : 0;
        shmr_store_release(&me->life, shmr_life_pack(h->epoch, kept, vacant ? 0 : h->pid, /* R13 */
                                                     vacant ? SHMR_VACANT : SHMR_LEFT));
        shmr_ring_all(h); /* whoever waits for space may adopt the arena */
        shmr_close_pidfds(h);
    }
    shmr_free(h);
}

void shmr_pin(shmr *h, int64_t delta) {
    if (shmr_count_add(&h->pins, delta) == 0 && shmr_count_get(&h->closed)) leave(h);
}

int shmr_close(shmr *h, int force) {
    if (shmr_usable(h) == SHMR_FORKED) return SHMR_FORKED;
    if (shmr_count_add(&h->closed, 1) == 1) {
        shmr_count_add(&h->handle, 1); /* for leave() */
        shmr_ring_all(h);              /* our own waiting threads too */
        pthread_mutex_lock(&h->lock);
        shmr_file_close(&h->file); /* the arena grows no more */
        pthread_mutex_unlock(&h->lock);
    }
    if (shmr_count_get(&h->pins) == 0 || force) leave(h);
    return SHMR_OK;
}

/* ---- observing ------------------------------------------------------------------------------------------------------- */

uint32_t shmr_self(const shmr *h) { return h->self; }
void *shmr_base(const shmr *h) { return h->base; }
uint64_t shmr_mapped_bytes(const shmr *h) { return h->g.total; }
void shmr_read_config(const shmr *h, shmr_config *out) { *out = h->g.config; }

void shmr_count_late_release(shmr *h) {
    shmr_add_relaxed(&shmr_participant_at(h, h->self)->late_releases, 1); /* statistics */
}

void shmr_read_counters(shmr *h, shmr_counters *out) {
    memset(out, 0, sizeof *out);
    out->budget = h->g.config.arena_bytes;
    for (uint32_t e = 0; e < h->g.extents; e++) {
        uint64_t word = shmr_load_relaxed(shmr_extent_at(h, e)); /* statistics */
        if (word & SHMR_EXTENT_WARM) out->reserved += SHMR_EXTENT;
    }
    if (shmr_usable(h) != SHMR_FORKED) {
        pthread_mutex_lock(&h->lock);
        shmr_drain_freed(h);
        out->owned = h->arena.owned_bytes;
        out->used = h->arena.used_bytes;
        out->held = h->held_bytes;
        pthread_mutex_unlock(&h->lock);
    }
    out->pins = (uint64_t)shmr_count_get(&h->pins);
    for (uint32_t i = 0; i < h->g.config.participants; i++) {
        struct shmr_participant *p = shmr_participant_at(h, i);
        for (uint32_t r = 0; r < h->g.config.rings; r++) { /* statistics, all of these */
            out->committed += shmr_load_relaxed(&p->committed[r]);
            out->leased += shmr_load_relaxed(&p->leased[r]);
            out->bytes_committed += shmr_load_relaxed(&p->bytes_committed[r]);
        }
        out->aborted += shmr_load_relaxed(&p->aborted);
        out->released += shmr_load_relaxed(&p->released);
        out->late_releases += shmr_load_relaxed(&p->late_releases);
        out->rescued_wakeups += shmr_load_relaxed(&p->rescued_wakeups);
    }
    out->participants = shmr_live_participants(h);
    out->deaths = shmr_load_relaxed(&shmr_header_of(h)->deaths);
    out->joins = shmr_load_relaxed(&shmr_header_of(h)->joins);
}

/* ---- progress ---------------------------------------------------------------------------------------------------------- */

void shmr_set_progress(shmr *h, uint64_t tag, uint64_t index) {
    struct shmr_participant *me = shmr_participant_at(h, h->self);
    /* In this order, so that who dies in between is not blamed for a task that it has not begun. */
    shmr_store_relaxed(&me->task_since_ns, tag ? (uint64_t)shmr_now() : 0); /* for observers; exact after our death */
    shmr_store_relaxed(&me->task_index, index);                            /* likewise */
    shmr_store_relaxed(&me->task_tag, tag);                                /* likewise */
}

int shmr_progress(shmr *h, uint32_t slot, uint64_t *tag, uint64_t *index, uint64_t *since_ns, uint64_t *starving) {
    if (slot >= h->g.config.participants) return SHMR_BAD_ARGUMENT;
    struct shmr_participant *p = shmr_participant_at(h, slot);
    *tag = shmr_load_relaxed(&p->task_tag);          /* an observation */
    *index = shmr_load_relaxed(&p->task_index);      /* likewise */
    *since_ns = shmr_load_relaxed(&p->task_since_ns); /* likewise */
    *starving = shmr_load_relaxed(&p->starving);     /* likewise */
    return SHMR_OK;
}

void shmr_deny(shmr *h, uint32_t slot) {
    if (slot >= h->g.config.participants) return;
    shmr_or_seq_cst(&shmr_participant_at(h, slot)->denied, 1); /* S6: read at the next attempt */
    shmr_ring_all(h);
}
