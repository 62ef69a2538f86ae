/* SPDX-License-Identifier: BSD-3-Clause */
/* Checksums and copies, also on a CPU that has none of the instructions for them: this executable has the source of
 * both in here, instead of the core's object. */
#include "harness.h"

static int cpu = 1; /* of this test: 0: an old one; -1: one that does not even say so */
#if defined(__x86_64__)
#include <cpuid.h>
#define __builtin_cpu_supports(feature) (cpu > 0)
static int cpuid(unsigned *b) {
    *b = cpu > 0 ? 1u << 9 : 0;
    return cpu >= 0;
}
#define __get_cpuid_count(leaf, part, a, b, c, d) ((void)(a), (void)(c), (void)(d), cpuid(b))
#endif
#include "shmr_memory.c"

static char bytes[600000], copy[600000];
static const uint64_t lengths[] = {0, 1, 7, 8, 63, 64, 1000, 262143, 262144, 500001};

static void fill(void) {
    uint64_t seed = 5;
    for (size_t i = 0; i < sizeof bytes; i++) bytes[i] = (char)next_random(&seed);
}

static void checksums(void) {
    uint32_t sums[2][10][3];
    for (cpu = 0; cpu < 2; cpu++) {
        CHECK_EQ(shmr_crc32c(0, "123456789", 9), 0xe3069283); /* the check value of its definition */
        for (int i = 0; i < 10; i++)
            for (uint32_t start = 0; start < 3; start++)
                sums[cpu][i][start] = shmr_crc32c(start, bytes + start, lengths[i]);
    }
    CHECK(memcmp(sums[0], sums[1], sizeof sums[0]) == 0);
}

static void *copy_near(void *unused) { /* each thread asks the CPU anew */
    for (int i = 0; i < 10; i++)
        for (int from = 0; from < 70; from += 23) {
            char *to = copy + 64 - from / 2;
            memset(copy, 1, sizeof copy);
            shmr_copy_near(to, bytes + from, lengths[i]);
            CHECK(memcmp(to, bytes + from, lengths[i]) == 0 && to[-1] == 1 && to[lengths[i]] == 1);
            memset(copy, 1, sizeof copy);
            shmr_copy(to, bytes + from, lengths[i]);
            CHECK(memcmp(to, bytes + from, lengths[i]) == 0 && to[-1] == 1 && to[lengths[i]] == 1);
        }
    return unused;
}
static void copying(void) {
    for (cpu = -1; cpu < 2; cpu++) {
        pthread_t thread;
        pthread_create(&thread, NULL, copy_near, NULL);
        pthread_join(thread, NULL);
    }
}

int main(void) {
    fill();
    RUN(checksums);
    RUN(copying);
    return summary("unit_memory");
}
