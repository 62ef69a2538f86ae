/* SPDX-License-Identifier: BSD-3-Clause */
/* Checksums and copies on a CPU that has none of the instructions for them: the same source once more, under other
 * names. */
#include "harness.h"

static int cpu; /* of this test */
#define shmr_crc32c plain_crc32c
#define shmr_copy plain_copy
#define shmr_copy_near plain_copy_near
uint32_t plain_crc32c(uint32_t crc, const void *bytes, uint64_t length);
void plain_copy(void *target, const void *source, uint64_t length);
void plain_copy_near(void *target, const void *source, uint64_t length);
#if defined(__x86_64__)
#include <cpuid.h>
#define __builtin_cpu_supports(feature) cpu
static int fake_cpuid(unsigned *b) {
    *b = 0;
    return cpu != 2; /* 2: not even that leaf */
}
#define __get_cpuid_count(leaf, part, a, b, c, d) ((void)(a), (void)(c), (void)(d), fake_cpuid(b))
#endif
#include "shmr_memory.c"
#undef shmr_crc32c
#undef shmr_copy
#undef shmr_copy_near

static char bytes[600000], copy[600000];
static const uint64_t lengths[] = {0, 1, 7, 8, 63, 64, 1000, 262143, 262144, 500001};

static void fill(void) {
    uint64_t seed = 5;
    for (size_t i = 0; i < sizeof bytes; i++) bytes[i] = (char)next_random(&seed);
}

static void checksums(void) {
    CHECK_EQ(shmr_crc32c(0, "123456789", 9), 0xe3069283); /* the check value of its definition */
    CHECK_EQ(plain_crc32c(0, "123456789", 9), 0xe3069283);
    for (int i = 0; i < 10; i++)
        for (uint32_t start = 0; start < 3; start++)
            CHECK_EQ(plain_crc32c(start, bytes + start, lengths[i]), shmr_crc32c(start, bytes + start, lengths[i]));
}

static void copying(void) {
    static void (*const ways[])(void *, const void *, uint64_t) = {shmr_copy, shmr_copy_near, plain_copy,
                                                                  plain_copy_near};
    for (int way = 0; way < 4; way++)
        for (int i = 0; i < 10; i++)
            for (int from = 0; from < 70; from += 23) {
                memset(copy, 1, sizeof copy);
                ways[way](copy + 64 - from / 2, bytes + from, lengths[i]);
                CHECK(memcmp(copy + 64 - from / 2, bytes + from, lengths[i]) == 0);
                CHECK_EQ(copy[63 - from / 2], 1);
                CHECK_EQ(copy[64 - (uint64_t)from / 2 + lengths[i]], 1);
            }
}

static void *copy_near_elsewhere(void *unused) { /* each thread asks the CPU anew */
    plain_copy_near(copy, bytes, 100);
    return unused;
}
static void an_older_one(void) {
    cpu = 2;
    pthread_t thread;
    pthread_create(&thread, NULL, copy_near_elsewhere, NULL);
    pthread_join(thread, NULL);
    CHECK(memcmp(copy, bytes, 100) == 0);
    cpu = 0;
}

int main(void) {
    fill();
    RUN(checksums);
    RUN(copying);
    RUN(an_older_one);
    return summary("unit_memory");
}
