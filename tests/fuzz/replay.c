/* SPDX-License-Identifier: BSD-3-Clause */
/* Runs a fuzz target without a fuzzer: `replay SECONDS SEED FOLDER...` takes all files, then mutations of them. */
#include <dirent.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define INPUT_MAX 1024
#define INPUTS_MAX 4096
#define HANG_SECONDS 30

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size);
const char *__asan_default_options(void);
const char *__asan_default_options(void) { return "detect_leaks=0:abort_on_error=1"; }

static struct {
    uint8_t bytes[INPUT_MAX];
    size_t size;
} inputs[INPUTS_MAX], current;
static size_t count;

static uint64_t state;
static uint64_t next_random(void) { /* SplitMix64 */
    uint64_t z = state += UINT64_C(0x9e3779b97f4a7c15);
    z = (z ^ z >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ z >> 27) * UINT64_C(0x94d049bb133111eb);
    return z ^ z >> 31;
}

static void read_folder(const char *path) {
    DIR *folder = opendir(path);
    if (!folder) return;
    for (struct dirent *entry; (entry = readdir(folder)) && count < INPUTS_MAX;) {
        char name[4096];
        if (entry->d_name[0] == '.') continue;
        snprintf(name, sizeof name, "%s/%s", path, entry->d_name);
        FILE *file = fopen(name, "rb");
        if (!file) continue;
        inputs[count].size = fread(inputs[count].bytes, 1, INPUT_MAX, file);
        count++;
        fclose(file);
    }
    closedir(folder);
}

static void run(const void *bytes, size_t size) {
    memcpy(current.bytes, bytes, size);
    current.size = size;
    alarm(HANG_SECONDS);
    LLVMFuzzerTestOneInput(current.bytes, current.size);
    alarm(0);
}

static void mutate(uint8_t *bytes, size_t *size) {
    for (uint64_t edits = 1 + next_random() % 6; edits > 0; edits--) {
        const uint64_t r = next_random(), at = *size ? r % *size : 0;
        switch (r >> 32 & 3) {
        case 0:
            if (*size) bytes[at] = (uint8_t)(r >> 40);
            break;
        case 1: { /* insert some */
            size_t more = 1 + (r >> 40 & 7);
            if (*size + more > INPUT_MAX) break;
            memmove(bytes + at + more, bytes + at, *size - at);
            for (size_t i = 0; i < more; i++) bytes[at + i] = (uint8_t)next_random();
            *size += more;
            break;
        }
        case 2: { /* the end of another input */
            size_t other = (size_t)((r >> 34) % count), from = inputs[other].size ? (size_t)(r >> 50) % inputs[other].size : 0;
            size_t bytes_of_it = inputs[other].size - from;
            if (at + bytes_of_it > INPUT_MAX) break;
            memcpy(bytes + at, inputs[other].bytes + from, bytes_of_it);
            *size = at + bytes_of_it;
            break;
        }
        default: /* without some */
            if (*size > at + 1) memmove(bytes + at, bytes + at + 1, *size - at - 1), (*size)--;
        }
    }
}

/* What led to the crash, for tests/fuzz/crashes. */
static void save_current(int signal_number) {
    char name[] = "crash-input";
    FILE *file = fopen(name, "wb");
    if (file) {
        fwrite(current.bytes, 1, current.size, file);
        fclose(file);
    }
    fprintf(stderr, "signal %d; the input is in %s\n", signal_number, name);
    _exit(1);
}

#include <signal.h>

int main(int argc, char **argv) {
    if (argc < 3) return 2;
    double seconds = strtod(argv[1], NULL);
    state = strtoull(argv[2], NULL, 0);
    signal(SIGALRM, save_current);
    signal(SIGABRT, save_current);
    for (int i = 3; i < argc; i++) read_folder(argv[i]);
    if (!count) inputs[count++].size = 0;
    for (size_t i = 0; i < count; i++) run(inputs[i].bytes, inputs[i].size);
    uint64_t mutated = 0;
    for (time_t end = time(NULL) + (time_t)seconds; time(NULL) < end; mutated++) {
        size_t from = (size_t)(next_random() % count), size = inputs[from].size;
        uint8_t bytes[INPUT_MAX];
        memcpy(bytes, inputs[from].bytes, size);
        mutate(bytes, &size);
        run(bytes, size);
    }
    printf("%s: %zu inputs, %llu mutations, seed %s\n", argv[0], count, (unsigned long long)mutated, argv[2]);
    return 0;
}
