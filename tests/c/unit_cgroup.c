/* SPDX-License-Identifier: BSD-3-Clause */
/* Memory cgroups above us, of both versions, as files of our own. They are looked for once a process, so each case is
 * a forked child. */
#include "faults.h"

static const struct fake {
    const char *path, *text;
} *files;

static const char *fake_cgroup(const char *path) {
    for (const struct fake *f = files; f->path; f++)
        if (strcmp(path, f->path) == 0) return f->text;
    return NULL;
}

/* Runs in the child: `files` are what it sees. */
static void in_groups(const struct fake *some, void (*script)(shmr *h)) {
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        int fd;
        files = some;
        fake_file = fake_cgroup;
        shmr_config config = small_config();
        shmr *h = create_region(&config, &fd);
        script(h);
        leave_region(h);
        _exit(shmr_count_get(&check_failures) != 0);
    }
    expect_success(child);
}

static void write_number(int file, uint64_t number) {
    char text[32];
    snprintf(text, sizeof text, "%llu\n", (unsigned long long)number);
    write_text(file, text);
}

/* May an end of a channel lend some memory? */
static bool lent(void) {
    shmr_loan loan;
    shmr_loans *loans = shmr_loans_new();
    bool done = shmr_loans_make(loans, MIB) && shmr_loans_lend(loans, &(shmr_piece){"lent", 4}, 1, &loan);
    shmr_loans_free(loans);
    return done;
}

static void there_is_room(shmr *h) {
    OK(shmr_reserve(h, 0, SHMR_PAGE));
    OK(shmr_reserve_extent(h, 0));
    CHECK(lent());
}

static void there_is_none(shmr *h) {
    CHECK_STATUS(shmr_reserve(h, 0, SHMR_PAGE), SHMR_NO_MEMORY);
    CHECK(strstr(shmr_last_detail(), "cgroup"));
    CHECK_STATUS(shmr_reserve_extent(h, 0), SHMR_NO_MEMORY);
    CHECK(!lent());
    shmr_block b = {0};
    CHECK_STATUS(shmr_claim(h, 100000, NULL, 0, -1, NOT_AT_ALL, &b), SHMR_WOULD_BLOCK);
}

/* The files of one group are opened in this order, after the list of groups. */
enum { LIST, LIMIT, USAGE, STATISTICS };

static void one_group(shmr *h) {
    there_is_room(h);
    write_number(faked_files[USAGE], 1000 * MIB); /* 24 MiB are left: enough for a page, not for an array's extent */
    OK(shmr_reserve(h, 0, SHMR_PAGE));
    CHECK_STATUS(shmr_reserve_extent(h, 0), SHMR_NO_MEMORY);
    write_number(faked_files[USAGE], 1024 * MIB);
    there_is_none(h);
    write_text(faked_files[STATISTICS], "file 7\ninactive_file 536870912\ntotal_inactive_file 536870912\n");
    there_is_room(h); /* the kernel can drop half of it */
    write_text(faked_files[STATISTICS], "file 7\nactive_file 536870912\n");
    there_is_none(h);
    write_text(faked_files[STATISTICS], "");
    there_is_none(h);
    write_text(faked_files[LIMIT], "max\n"); /* lifted meanwhile */
    there_is_room(h);
    write_text(faked_files[LIMIT], "");
    there_is_room(h);
    write_number(faked_files[LIMIT], UINT64_MAX / 2); /* how version 1 says it */
    there_is_room(h);
    write_number(faked_files[LIMIT], 2 * MIB); /* a small one: an eighth of it is left to others */
    write_number(faked_files[USAGE], 1 * MIB);
    OK(shmr_reserve(h, 0, SHMR_PAGE));
    CHECK_STATUS(shmr_reserve(h, 0, MIB), SHMR_NO_MEMORY);
    write_text(faked_files[USAGE], "-1");
    there_is_room(h);
}

static void version_2(void) {
    in_groups((const struct fake[]){{"/proc/self/cgroup", "0::/a\n"},
                                    {"/sys/fs/cgroup/a/memory.max", "1073741824\n"},
                                    {"/sys/fs/cgroup/a/memory.current", "4096\n"},
                                    {"/sys/fs/cgroup/a/memory.stat", ""},
                                    {0}},
              one_group);
}

static void version_1(void) {
    in_groups((const struct fake[]){{"/proc/self/cgroup", "rubbish\n4:cpu\n4:cpu:/b\n3:memory:/a\n"},
                                    {"/sys/fs/cgroup/memory/a/memory.limit_in_bytes", "1073741824\n"},
                                    {"/sys/fs/cgroup/memory/a/memory.usage_in_bytes", "4096\n"},
                                    {"/sys/fs/cgroup/memory/a/memory.stat", ""},
                                    {0}},
              one_group);
}

static void the_eighth_is_full(shmr *h) {
    there_is_room(h);
    CHECK_EQ(faked_count, 1 + 8 * 3);
    write_number(faked_files[USAGE + 7 * 3], 1024 * MIB);
    there_is_none(h);
}

/* The limit of one far above counts; but only the nearest eight are looked at. */
static void a_deep_one(void) {
    char paths[3][10][96];
    struct fake deep[32] = {{"/proc/self/cgroup", "0::/a/a/a/a/a/a/a/a/a\n"}};
    char path[64] = "/sys/fs/cgroup";
    int n = 1;
    for (int level = 0; level < 9; level++) {
        strcat(path, "/a");
        snprintf(paths[0][level], sizeof paths[0][level], "%s/memory.max", path);
        snprintf(paths[1][level], sizeof paths[1][level], "%s/memory.current", path);
        snprintf(paths[2][level], sizeof paths[2][level], "%s/memory.stat", path);
        deep[n++] = (struct fake){paths[0][level], "1073741824\n"};
        deep[n++] = (struct fake){paths[1][level], "4096\n"};
        deep[n++] = (struct fake){paths[2][level], ""};
    }
    in_groups(deep, the_eighth_is_full);
}

/* Other code has closed all descriptors, and has files of its own under their numbers. */
static void others_have_our_numbers(shmr *h) {
    there_is_room(h);
    for (int which = LIMIT; which <= STATISTICS; which++) {
        int other = memfd_create("other", MFD_CLOEXEC);
        write_text(other, "0\n"); /* as a limit it would leave no room */
        CHECK(dup2(other, faked_files[which]) == faked_files[which]);
        close(other);
    }
    uint32_t before = open_descriptors();
    for (int which = 0; which < 3; which++) {
        OK(shmr_reserve(h, 0, SHMR_PAGE)); /* the files are found again, */
        CHECK_EQ(open_descriptors(), before);
    }
    for (int which = LIMIT; which <= STATISTICS; which++) CHECK(fcntl(faked_files[which], F_GETFD) >= 0);
    files = (const struct fake[]){{0}};
    OK(shmr_reserve(h, 0, SHMR_PAGE)); /* or the group is gone, which limits nothing */
}

static void descriptors_closed_under_us(void) {
    in_groups((const struct fake[]){{"/proc/self/cgroup", "0::/a\n"},
                                    {"/sys/fs/cgroup/a/memory.max", "1073741824\n"},
                                    {"/sys/fs/cgroup/a/memory.current", "4096\n"},
                                    {"/sys/fs/cgroup/a/memory.stat", ""},
                                    {0}},
              others_have_our_numbers);
}

static void none_that_limits(void) {
    static const struct fake cases[][4] = {
        {{"/proc/self/cgroup", "0::/a\n"}, {"/sys/fs/cgroup/a/memory.max", "max\n"}},
        {{"/proc/self/cgroup", "0::/a\n"}, {"/sys/fs/cgroup/a/memory.max", "4096\n"}}, /* what is used, nobody says */
        {{"/proc/self/cgroup", "0::/\n"}},
        {{"/proc/self/cgroup", "0::\n"}},
        {{"/proc/self/cgroup", "0::a\n"}},
    };
    for (int i = 0; i < 5; i++) in_groups(cases[i], there_is_room);
    break_calls(FAULT_FOPEN, EMFILE);
    in_groups((const struct fake[]){{0}}, there_is_room);
    disarm_faults();
}

int main(void) {
    RUN(version_2);
    RUN(version_1);
    RUN(a_deep_one);
    RUN(descriptors_closed_under_us);
    RUN(none_that_limits);
    return summary("unit_cgroup");
}
