/* SPDX-License-Identifier: BSD-3-Clause */
/* Messages that prove themselves: who sent them, which, how long, and that every byte is the one that was written. */
#ifndef STRESS_H
#define STRESS_H

#include "harness.h"

#define MAGIC UINT64_C(0x7e57ab1e7e57ab1e)
#define HEADER_BYTES sizeof(struct payload)

/* What a whole run moved, for whoever adds up several (tests/soak). */
struct totals {
    uint64_t kills, messages, redelivered, lost, duplicated, rescued_wakeups;
};

static inline void print_totals(const struct totals *all) {
    printf("report {\"kills\": %llu, \"messages\": %llu, \"redelivered\": %llu, \"lost\": %llu, "
           "\"duplicated\": %llu, \"rescued_wakeups\": %llu}\n",
           (unsigned long long)all->kills, (unsigned long long)all->messages, (unsigned long long)all->redelivered,
           (unsigned long long)all->lost, (unsigned long long)all->duplicated,
           (unsigned long long)all->rescued_wakeups);
}

/* `seconds` of the command line, as a moment; without it: once. */
static inline int64_t end_of_run(int argc, char **argv) {
    return argc > 2 ? shmr_now() + (int64_t)(strtod(argv[2], NULL) * 1e9) : 0;
}

struct payload {
    uint64_t magic, producer, number, length, seed;
    uint32_t check, unused;
};

/* Sizes of 64 B .. 2 MiB, each doubling as likely as the others. */
static inline uint64_t message_size(uint64_t *seed, uint64_t max) {
    uint64_t top = 64;
    for (uint64_t doublings = random_below(seed, 16); doublings; doublings--) top *= 2;
    uint64_t size = top + random_below(seed, top);
    return size > max ? max : size;
}

static inline void fill_payload(char *at, uint64_t length, uint64_t producer, uint64_t number) {
    struct payload p = {MAGIC, producer, number, length, producer * 1000003 + number, 0, 0};
    uint64_t rest = length - HEADER_BYTES, word = p.seed * UINT64_C(0x9e3779b97f4a7c15);
    char *body = at + HEADER_BYTES;
    for (uint64_t i = 0; i + 8 <= rest; i += 8, word += p.seed | 1) memcpy(body + i, &word, 8);
    memset(body + rest / 8 * 8, (int)(p.seed & 0xff), rest % 8);
    p.check = shmr_crc32c(0, body, rest);
    memcpy(at, &p, HEADER_BYTES);
}

static inline struct payload check_payload(const char *at, uint64_t length) {
    struct payload p;
    memcpy(&p, at, HEADER_BYTES);
    CHECK_EQ(p.magic, MAGIC);
    CHECK_EQ(p.length, length);
    if (p.magic != MAGIC || p.length != length) return p;
    uint64_t rest = length - HEADER_BYTES, word = p.seed * UINT64_C(0x9e3779b97f4a7c15), wrong = 0;
    const char *body = at + HEADER_BYTES;
    CHECK_EQ(p.check, shmr_crc32c(0, body, rest));
    for (uint64_t i = 0; i + 8 <= rest; i += 8, word += p.seed | 1) {
        uint64_t found;
        memcpy(&found, body + i, 8);
        wrong |= found ^ word;
    }
    CHECK_EQ(wrong, 0);
    return p;
}

/* Memory for results that forked children and threads write alike. */
static inline void *common_memory(size_t bytes) {
    void *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED) exit(2);
    return at;
}

/* Send number `number`: plainly, or as a frame that names a published block with the payload. */
static inline int send_payload(shmr *h, uint32_t ring, uint64_t producer, uint64_t number, uint64_t length,
                               bool by_reference, int64_t deadline) {
    shmr_block b = {0};
    shmr_ref ref;
    int status = shmr_claim(h, length, NULL, 0, -1, deadline, &b);
    if (status != SHMR_OK) return status;
    b.length = length;
    fill_payload(bytes_of(h, &b), length, producer, number);
    if (by_reference) {
        OK(shmr_publish(h, &b, &ref));
        status = shmr_claim(h, 8, &ref, 1, -1, deadline, &b);
        OK(shmr_drop(h, ref.block, ref.generation)); /* the frame keeps it */
        if (status != SHMR_OK) return status;
        b.length = 8;
    }
    b.kind = by_reference;
    b.tag = number;
    do status = shmr_commit(h, ring, 1, -1, deadline, &b);
    while (status == SHMR_TIMEOUT && deadline == FOR_EVER);
    if (status != SHMR_OK) OK(shmr_abort(h, &b));
    return status;
}

/* The payload of a leased message, checked, wherever it is. */
static inline struct payload check_message(shmr *h, const shmr_block *b) {
    if (!b->kind) return check_payload(bytes_of(h, b), b->length);
    shmr_ref ref, held;
    struct payload p = {0};
    CHECK_EQ(b->references, 1);
    OK(shmr_references(h, b, &ref, 1));
    int status = shmr_hold(h, ref.block, ref.generation, &held);
    CHECK_STATUS(status, SHMR_OK);
    if (status != SHMR_OK) return p;
    p = check_payload(h->base + held.offset, held.length);
    OK(shmr_drop(h, ref.block, ref.generation));
    return p;
}

#endif
