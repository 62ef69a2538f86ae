/* SPDX-License-Identifier: BSD-3-Clause */
/* Loans: memory that is lent around and around, refused where there is none, and opened by another process. */
#include <pthread.h>
#include <sys/resource.h>

#include "faults.h"

#define PAGE UINT64_C(4096)

static shmr_loans *lender, *borrower;
static char bytes[4 * MIB], got[4 * MIB];

static void open_loans(uint64_t room) {
    lender = shmr_loans_new();
    borrower = shmr_loans_new();
    CHECK(lender && borrower && shmr_loans_make(lender, room));
    CHECK(shmr_loans_use(borrower, shmr_loans_offer(lender)->fd) && shmr_loans_map(borrower));
}
static void close_loans(void) {
    int fd = shmr_loans_offer(lender)->fd;
    shmr_loans_free(lender);
    shmr_loans_free(borrower);
    CHECK_EQ(fcntl(fd, F_GETFD), -1);
}

static int lend(uint64_t length, char content, shmr_loan *loan) {
    memset(bytes, content, length);
    return shmr_loans_lend(lender, &(shmr_piece){bytes, length}, 1, loan);
}
static void expect(const shmr_loan *loan, uint64_t length, char content) {
    CHECK_EQ(loan->length, length);
    CHECK(shmr_loans_has(borrower, loan));
    memset(got, ~content, length);
    OK(shmr_loans_copy(borrower, loan, got));
    CHECK_EQ(got[0], content);
    CHECK(memcmp(got, got + 1, length - 1) == 0); /* the sanitizers look at it once */
}

static void what_is_lent_is_what_was_there(void) {
    shmr_loan loan;
    open_loans(MIB);
    CHECK(shmr_loans_lend(lender, (shmr_piece[]){{"abc", 3}, {"", 0}, {"defg", 4}}, 3, &loan));
    CHECK_EQ(loan.length, 7);
    OK(shmr_loans_copy(borrower, &loan, got));
    CHECK(memcmp(got, "abcdefg", 7) == 0);
    close_loans();
    shmr_loans_free(NULL);
}

/* Some at a time, of all sizes, and back in any order: each has what was written to it, whatever is lent meanwhile. */
static void nothing_is_lent_twice_at_once(void) {
    enum { MOST = 12 };
    struct {
        shmr_loan loan;
        uint64_t length;
        char content;
    } out[MOST];
    uint64_t seed = 7, refused = 0, lent = 0;
    const uint64_t rooms[] = {64 * PAGE, 3 * MIB, 40 * MIB};
    for (size_t room = 0; room < 3; room++) {
        int count = 0;
        open_loans(rooms[room]);
        for (int turn = 0; turn < 3000; turn++) {
            bool lends = count < MOST && (count == 0 || next_random(&seed) % 8 < 4 + (uint64_t)turn / 100 % 2);
            if (lends) {
                uint64_t length = 1 + next_random(&seed) % (room ? MIB : 20 * PAGE);
                out[count].length = length;
                out[count].content = (char)next_random(&seed);
                if (lend(length, out[count].content, &out[count].loan))
                    count++, lent++;
                else
                    refused++;
            } else {
                int which = (int)(next_random(&seed) % (uint64_t)count);
                if (next_random(&seed) % 4) which = 0; /* mostly the oldest one */
                expect(&out[which].loan, out[which].length, out[which].content);
                shmr_loans_give_back(borrower, &out[which].loan);
                memmove(&out[which], &out[which + 1], sizeof *out * (size_t)(--count - which));
            }
        }
        close_loans();
    }
    CHECK(lent > 3000 && refused > 100);
}

static void all_can_be_lent_and_no_more(void) {
    shmr_loan all, other;
    open_loans(2 * MIB);
    for (int turn = 0; turn < 3; turn++) {
        CHECK(!lend(2 * MIB + 1, 1, &other));
        CHECK(lend(2 * MIB, 2, &all));
        CHECK(!lend(1, 3, &other));
        expect(&all, 2 * MIB, 2);
        shmr_loans_give_back(borrower, &all);
    }
    CHECK(!shmr_loans_lend(lender, &(shmr_piece){bytes, UINT64_MAX - 5}, 1, &other));
    close_loans();
}

static void so_many_at_once(void) {
    shmr_loan loans[600];
    int count = 0;
    open_loans(MIB);
    while (count < 600 && lend(64, (char)count, &loans[count])) count++;
    CHECK_EQ(count, 504);
    shmr_loans_give_back(borrower, &loans[1]); /* in whatever order: the oldest one is not back */
    CHECK(!lend(64, 0, &loans[599]));
    shmr_loans_give_back(borrower, &loans[0]);
    CHECK(lend(64, 44, &loans[504]));
    CHECK(lend(64, 45, &loans[505]));
    CHECK(!lend(64, 46, &loans[506]));
    for (int i = 2; i < 506; i++) expect(&loans[i], 64, i < 504 ? (char)i : (char)(i - 460));
    close_loans();
}

/* What comes back soon is lent again; more memory is taken if nothing does. */
static void far_from_the_beginning(void) {
    shmr_loan loans[9];
    open_loans(36 * MIB);
    for (int i = 0; i < 9; i++) CHECK(lend(4 * MIB, (char)i, &loans[i]));
    CHECK(!lend(64, 9, &loans[0]));
    for (int i = 0; i < 9; i++) expect(&loans[i], 4 * MIB, (char)i);
    close_loans();
}

/* Between the newest one, which has begun at the beginning again, and the oldest one. */
static void around_the_end(void) {
    shmr_loan a, b, c, d;
    open_loans(20 * PAGE);
    CHECK(lend(8 * PAGE, 1, &a) && lend(8 * PAGE, 2, &b));
    CHECK(!lend(5 * PAGE, 3, &c));
    shmr_loans_give_back(borrower, &a);
    CHECK(lend(5 * PAGE, 3, &c)); /* where the first one was */
    CHECK(!lend(4 * PAGE, 4, &d));
    CHECK(lend(3 * PAGE, 4, &d));
    expect(&b, 8 * PAGE, 2);
    expect(&c, 5 * PAGE, 3);
    expect(&d, 3 * PAGE, 4);
    close_loans();
}

/* Other code closes our descriptor, and has another file under its number; a copy of ours. */
static int replace(int fd) {
    int copy = dup(fd), other = memfd_create("other", MFD_CLOEXEC);
    dup2(other, fd);
    close(other);
    return copy;
}
static void put_back(int fd, int copy) {
    dup2(copy, fd);
    close(copy);
}

static uint64_t memory_of(const shmr_loans *l) {
    struct stat s;
    CHECK_EQ(fstat(shmr_loans_offer(l)->fd, &s), 0);
    return (uint64_t)s.st_blocks * 512;
}

static void memory_is_had_before_it_is_used_and_goes_at_rest(void) {
    shmr_loan loan;
    open_loans(64 * MIB);
    CHECK_EQ(memory_of(lender), PAGE);
    CHECK(lend(100, 1, &loan));
    CHECK(memory_of(lender) <= 2 * MIB);
    shmr_loans_rest(lender); /* it is lent */
    expect(&loan, 100, 1);
    shmr_loans_give_back(borrower, &loan);
    shmr_loans_rest(lender);
    CHECK_EQ(memory_of(lender), PAGE);
    shmr_loans_rest(lender);
    CHECK(lend(3 * MIB, 2, &loan));
    expect(&loan, 3 * MIB, 2);
    shmr_loans_give_back(borrower, &loan);
    pid_t child = fork(); /* whose records may be stale: it takes nothing away */
    if (!child) {
        shmr_loans_rest(lender);
        shmr_loans_free(lender);
        _exit(0);
    }
    waitpid(child, NULL, 0);
    int fd = shmr_loans_offer(lender)->fd, copy = replace(fd);
    shmr_loans_rest(lender); /* nor does who finds another file there */
    put_back(fd, copy);
    CHECK_EQ(fcntl(fd, F_ADD_SEALS, F_SEAL_FUTURE_WRITE), 0);
    shmr_loans_rest(lender); /* which the kernel refuses now */
    CHECK(memory_of(lender) >= 3 * MIB);
    CHECK(lend(3 * MIB, 3, &loan));
    expect(&loan, 3 * MIB, 3);
    close_loans();
}

static void where_there_is_no_memory_nothing_is_lent(void) {
    shmr_loan loan;
    open_loans(4 * MIB);
    break_calls(FAULT_FALLOCATE, ENOSPC);
    CHECK(!lend(100, 1, &loan));
    CHECK(disarm_faults());
    arm_fault(FAULT_FALLOCATE, 1, EINTR); /* a signal comes: it is asked again */
    CHECK(lend(100, 1, &loan));
    CHECK(disarm_faults());
    shmr_loans_give_back(borrower, &loan);
    shmr_loans_rest(lender);
    int fd = shmr_loans_offer(lender)->fd, copy = replace(fd);
    CHECK(!lend(100, 1, &loan));
    CHECK_EQ(memory_of(lender), 0);
    put_back(fd, copy);
    CHECK(lend(100, 1, &loan));
    expect(&loan, 100, 1);
    pid_t child = fork(); /* whose records are stale: it lends nothing */
    if (!child) {
        int lent = lend(100, 2, &loan);
        _exit(lent);
    }
    int status;
    waitpid(child, &status, 0);
    CHECK_EQ(status, 0);
    close_loans();
}

static void what_was_never_needed_is_not_mapped(void) {
    shmr_loan loan;
    int fd = shmr_loans_file(MIB);
    lender = shmr_loans_new();
    CHECK(shmr_loans_use(lender, fd));
    CHECK_EQ(memory_of(lender), 0);
    shmr_loans_rest(lender);
    arm_fault(FAULT_MMAP, 1, ENOMEM);
    CHECK(!lend(100, 1, &loan));
    disarm_faults();
    CHECK(lend(100, 1, &loan));
    shmr_loans_free(lender);
    CHECK_EQ(close(fd), 0); /* it is the caller's */
}

static void what_can_not_be_made(void) {
    const unsigned kinds[] = {FAULT_MMAP, FAULT_FALLOCATE, FAULT_FSTAT, FAULT_FCNTL};
    arm_fault(FAULT_CALLOC, 1, ENOMEM);
    CHECK(!shmr_loans_new());
    disarm_faults();
    for (int k = 0; k < 4; k++) {
        for (int nth = 1; nth < 3; nth++) {
            lender = shmr_loans_new();
            arm_fault(kinds[k], nth, ENOMEM);
            bool made = shmr_loans_make(lender, MIB);
            CHECK(made != disarm_faults());
            shmr_loans_free(lender);
        }
    }
    struct rlimit before, none = {0, 0};
    getrlimit(RLIMIT_NOFILE, &before);
    none.rlim_max = before.rlim_max;
    setrlimit(RLIMIT_NOFILE, &none);
    lender = shmr_loans_new();
    CHECK(!shmr_loans_make(lender, MIB));
    setrlimit(RLIMIT_NOFILE, &before);
    CHECK(!shmr_loans_make(lender, UINT64_C(1) << 63)); /* no file is so long */
    shmr_loans_free(lender);
}

static void other_files_are_refused(void) {
    int both[2], short_one = memfd_create("short", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    borrower = shmr_loans_new();
    CHECK_EQ(pipe(both), 0);
    CHECK(!shmr_loans_use(borrower, both[0]));
    CHECK(!shmr_loans_use(borrower, -1));
    int cut = memfd_create("cut", MFD_CLOEXEC | MFD_ALLOW_SEALING); /* that somebody could cut */
    CHECK_EQ(ftruncate(cut, 2 * (off_t)PAGE), 0);
    CHECK(!shmr_loans_use(borrower, cut));
    int huge = memfd_create("huge", MFD_CLOEXEC | MFD_ALLOW_SEALING | MFD_HUGETLB); /* where the kernel has such */
    if (huge >= 0) {
        CHECK(ftruncate(huge, 4 * (off_t)MIB) == 0 && fcntl(huge, F_ADD_SEALS, F_SEAL_SHRINK) == 0);
        CHECK(!shmr_loans_use(borrower, huge));
        close(huge);
    }
    CHECK_EQ(fcntl(short_one, F_ADD_SEALS, F_SEAL_SHRINK), 0);
    CHECK(!shmr_loans_use(borrower, short_one));
    lender = shmr_loans_new();
    CHECK(shmr_loans_make(lender, MIB));
    CHECK_EQ(ftruncate(shmr_loans_offer(lender)->fd, 0), -1);
    CHECK(!shmr_loans_has(lender, &(shmr_loan){PAGE - 1, 1, 0}));
    CHECK(!shmr_loans_has(lender, &(shmr_loan){PAGE, MIB + 1, 0}));
    CHECK(!shmr_loans_has(lender, &(shmr_loan){UINT64_MAX, 1, 0}));
    CHECK(shmr_loans_has(lender, &(shmr_loan){PAGE, MIB, 0}));
    CHECK_STATUS(shmr_loans_copy(lender, &(shmr_loan){PAGE, MIB + 1, 0}, got), SHMR_CORRUPT);
    shmr_loans_free(lender);
    shmr_loans_free(borrower);
    close(both[0]);
    close(both[1]);
    close(cut);
    close(short_one);
}

/* The child lends, and ends: what it has lent stays. */
static void another_process_opens_it(void) {
    int offers[2], stop[2];
    struct {
        shmr_file file;
        shmr_loan loan;
    } offer;
    CHECK(pipe(offers) == 0 && pipe(stop) == 0);
    pid_t child = fork();
    if (!child) {
        char byte;
        lender = shmr_loans_new();
        int done = shmr_loans_make(lender, MIB) && lend(MIB, 5, &offer.loan);
        offer.file = *shmr_loans_offer(lender);
        done = done && write(offers[1], &offer, sizeof offer) == sizeof offer && read(stop[0], &byte, 1) == 1;
        _exit(!done);
    }
    CHECK_EQ(read(offers[0], &offer, sizeof offer), sizeof offer);
    borrower = shmr_loans_new();
    shmr_file wrong = offer.file;
    wrong.inode++;
    CHECK(!shmr_loans_accept(borrower, child, &wrong));
    wrong = offer.file;
    wrong.device++;
    CHECK(!shmr_loans_accept(borrower, child, &wrong));
    wrong.fd = offers[0]; /* to open it could wait */
    CHECK(!shmr_loans_accept(borrower, child, &wrong));
    int other = open("/proc/self/exe", O_RDONLY | O_CLOEXEC);
    wrong.fd = other;
    CHECK(!shmr_loans_accept(borrower, getpid(), &wrong));
    close(other);
    wrong.fd = 1000000;
    CHECK(!shmr_loans_accept(borrower, child, &wrong));
    CHECK(!shmr_loans_accept(borrower, 0, &offer.file));
    struct rlimit before, none = {0, 0};
    getrlimit(RLIMIT_NOFILE, &before);
    none.rlim_max = before.rlim_max;
    setrlimit(RLIMIT_NOFILE, &none);
    CHECK(!shmr_loans_accept(borrower, child, &offer.file));
    setrlimit(RLIMIT_NOFILE, &before);
    for (int nth = 1; nth <= 3; nth++) {
        arm_fault(FAULT_FSTAT, nth, EIO);
        CHECK(!shmr_loans_accept(borrower, child, &offer.file));
    }
    arm_fault(FAULT_MMAP, 1, ENOMEM);
    CHECK(!shmr_loans_accept(borrower, child, &offer.file));
    disarm_faults();
    CHECK(shmr_loans_accept(borrower, child, &offer.file));
    CHECK_EQ(shmr_loans_offer(borrower)->fd, -1);
    CHECK_EQ(write(stop[1], "", 1), 1);
    int status;
    waitpid(child, &status, 0);
    CHECK_EQ(status, 0);
    expect(&offer.loan, MIB, 5);
    CHECK(!shmr_loans_accept(borrower, child, &offer.file)); /* it has ended */
    shmr_loans_free(borrower);
    for (int i = 0; i < 2; i++) close(offers[i]), close(stop[i]);
}

/* ---- two threads ------------------------------------------------------------------------------------------------------ */

#define MANY 20000

static int channel[2];

static void *borrow_many(void *unused) {
    shmr_loan loan;
    for (uint64_t k = 0; k < MANY; k++) {
        CHECK_EQ(read(channel[0], &loan, sizeof loan), sizeof loan);
        OK(shmr_loans_copy(borrower, &loan, got));
        shmr_loans_give_back(borrower, &loan);
        CHECK(got[0] == (char)k && got[loan.length - 1] == (char)k);
    }
    return unused;
}

static void while_the_other_side_copies(void) {
    pthread_t thread;
    uint64_t seed = 3;
    open_loans(40 * PAGE);
    CHECK_EQ(pipe(channel), 0);
    CHECK_EQ(pthread_create(&thread, NULL, borrow_many, NULL), 0);
    for (uint64_t k = 0; k < MANY; k++) {
        shmr_loan loan;
        uint64_t length = 1 + next_random(&seed) % (9 * PAGE);
        while (!lend(length, (char)k, &loan)) shmr_pause();
        CHECK_EQ(write(channel[1], &loan, sizeof loan), sizeof loan);
    }
    pthread_join(thread, NULL);
    close(channel[0]);
    close(channel[1]);
    close_loans();
}

int main(void) {
    RUN(what_is_lent_is_what_was_there);
    RUN(nothing_is_lent_twice_at_once);
    RUN(all_can_be_lent_and_no_more);
    RUN(so_many_at_once);
    RUN(far_from_the_beginning);
    RUN(around_the_end);
    RUN(memory_is_had_before_it_is_used_and_goes_at_rest);
    RUN(where_there_is_no_memory_nothing_is_lent);
    RUN(what_was_never_needed_is_not_mapped);
    RUN(what_can_not_be_made);
    RUN(other_files_are_refused);
    RUN(another_process_opens_it);
    RUN(while_the_other_side_copies);
    return summary(__FILE__);
}
