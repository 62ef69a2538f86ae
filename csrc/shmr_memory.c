/* SPDX-License-Identifier: BSD-3-Clause */
/* Bytes: CRC32C by the CPU's instruction (or a table), and a copy that can write around the cache. */
#include <string.h>

#include "shmr_internal.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_acle.h>
#endif

/* ---- CRC32C (Castagnoli), reflected, as in RFC 3720 ------------------------------------------------------------------- */

static uint32_t table[256];
static void fill_table(void) {
    for (uint32_t i = 0; i < 256; i++) {
        uint32_t c = i;
        for (int k = 0; k < 8; k++) c = c & 1 ? c >> 1 ^ 0x82f63b78u : c >> 1;
        table[i] = c;
    }
}
static pthread_once_t table_once = PTHREAD_ONCE_INIT;

static uint32_t crc_by_table(uint32_t crc, const unsigned char *p, uint64_t n) {
    pthread_once(&table_once, fill_table);
    while (n--) crc = table[(crc ^ *p++) & 0xff] ^ crc >> 8;
    return crc;
}

#if defined(__x86_64__)
__attribute__((target("sse4.2"))) static uint32_t crc_by_cpu(uint32_t crc, const unsigned char *p, uint64_t n) {
    uint64_t c = crc, word;
    for (; n >= 8; p += 8, n -= 8) {
        memcpy(&word, p, 8);
        c = _mm_crc32_u64(c, word);
    }
    while (n--) c = _mm_crc32_u8((uint32_t)c, *p++);
    return (uint32_t)c;
}
static bool cpu_has_crc(void) { return __builtin_cpu_supports("sse4.2"); }
#elif defined(__aarch64__) && defined(__ARM_FEATURE_CRC32)
static uint32_t crc_by_cpu(uint32_t crc, const unsigned char *p, uint64_t n) {
    uint64_t word;
    for (; n >= 8; p += 8, n -= 8) {
        memcpy(&word, p, 8);
        crc = __crc32cd(crc, word);
    }
    while (n--) crc = __crc32cb(crc, *p++);
    return crc;
}
static bool cpu_has_crc(void) { return true; }
#else
#define crc_by_cpu crc_by_table
static bool cpu_has_crc(void) { return false; }
#endif

uint32_t shmr_crc32c(uint32_t crc, const void *bytes, uint64_t length) {
    uint32_t start = ~crc;
    return ~(cpu_has_crc() ? crc_by_cpu(start, bytes, length) : crc_by_table(start, bytes, length));
}

/* ---- copying ---------------------------------------------------------------------------------------------------------- */

#define STREAM_FROM (256u << 10) /* below, the reader finds it in a cache */

#if defined(__x86_64__)
/* Streaming stores do not fetch the line that they overwrite: a third less traffic for memory that is cold. */
__attribute__((target("avx"))) static void stream(char *target, const char *source, uint64_t length) {
    uint64_t lead = (uint64_t)(-(intptr_t)target & 63);
    memcpy(target, source, lead);
    target += lead;
    source += lead;
    length -= lead;
    for (; length >= 128; target += 128, source += 128, length -= 128) {
        __m256i a = _mm256_loadu_si256((const __m256i *)(const void *)source);
        __m256i b = _mm256_loadu_si256((const __m256i *)(const void *)(source + 32));
        __m256i c = _mm256_loadu_si256((const __m256i *)(const void *)(source + 64));
        __m256i d = _mm256_loadu_si256((const __m256i *)(const void *)(source + 96));
        _mm256_stream_si256((__m256i *)(void *)target, a);
        _mm256_stream_si256((__m256i *)(void *)(target + 32), b);
        _mm256_stream_si256((__m256i *)(void *)(target + 64), c);
        _mm256_stream_si256((__m256i *)(void *)(target + 96), d);
    }
    _mm_sfence();
    memcpy(target, source, length);
}

/* The CPU's own string copy ("enhanced rep movsb") fetches no line that it overwrites whole, either, yet leaves them
 * in the cache. Leaf 7 of CPUID tells whether it is the fast one. */
static bool cpu_has_string_copy(void) {
    unsigned a, b = 0, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && b & 1u << 9;
}

void shmr_copy_near(void *target, const void *source, uint64_t length) {
    static _Thread_local int known; /* 1: yes, 2: no */
    if (!known) known = cpu_has_string_copy() ? 1 : 2;
    if (known == 1)
        __asm__ __volatile__("rep movsb" : "+D"(target), "+S"(source), "+c"(length) : : "memory");
    else
        memcpy(target, source, length);
}

void shmr_copy(void *target, const void *source, uint64_t length) {
    if (length >= STREAM_FROM && __builtin_cpu_supports("avx"))
        stream(target, source, length);
    else
        memcpy(target, source, length);
}
#else
void shmr_copy_near(void *target, const void *source, uint64_t length) { memcpy(target, source, length); }
void shmr_copy(void *target, const void *source, uint64_t length) { memcpy(target, source, length); }
#endif
