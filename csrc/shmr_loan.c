/* SPDX-License-Identifier: BSD-3-Clause */
/* Memory that one end of a channel lends to the other: a large message lies there, and what travels says where.
 *
 *   page 0   what has been given back: the number of a loan, in the place that it has there by turns
 *   data     the loans, in the order in which they were made, around and around
 *
 * The file has no name, ends with the last who has it, and is sealed against getting shorter: reading never is SIGBUS.
 * Which memory is lent only the lender knows, by records of its own. It believes the borrower that it is through with a
 * loan, since that alone suffers if it is not; the borrower copies what is within bounds, and looks at the copy. One thread
 * lends at a time, and gives memory back.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "shmr_internal.h"

#define NAME "shmengine-loans"
#define FILE_NAME "/memfd:" NAME
#define TMPFS 0x01021994
#define DATA UINT64_C(4096)
#define LINE UINT64_C(64)
#define LOANS 504                 /* at once */
#define NEAR (UINT64_C(16) << 20) /* of data: used again, where that is possible, rather than more of it: in the cache */
#define PUNCH (FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE)
#define STEP (UINT64_C(1) << 20)  /* of memory that is had before it is written to */

struct loan_header {
    shmr_count returned[LOANS]; /* one more than the number, so that 0 is of none */
};
_Static_assert(sizeof(struct loan_header) <= DATA, "a page");

struct shmr_loans {
    shmr_file file; /* -1: it is mapped, and nothing is lent here */
    bool owned;     /* that is, closed with this */
    pid_t pid;      /* the process whose records are right: those of a forked child are stale; 0: nobody's */
    char *memory;   /* NULL: it was not needed so far */
    uint64_t bytes; /* of all */
    uint64_t there; /* up to here there is memory */
    uint64_t first, next; /* numbers of the oldest loan, and of the next one */
    struct {
        uint64_t begin, end;
    } at[LOANS];
};

static shmr_count *place(const shmr_loans *l, uint64_t number) {
    return &((struct loan_header *)l->memory)->returned[number % LOANS];
}

int shmr_loans_file(uint64_t bytes) {
    bytes = (bytes + DATA - 1) / DATA * DATA;
    int fd = memfd_create(NAME, MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd < 0) return -1;
    if (ftruncate(fd, (off_t)(DATA + bytes)) == 0 && fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW) == 0) return fd;
    close(fd);
    return -1;
}

shmr_loans *shmr_loans_new(void) {
    shmr_loans *l = calloc(1, sizeof *l);
    if (l) l->file.fd = -1;
    return l;
}

void shmr_loans_free(shmr_loans *l) {
    if (!l) return;
    if (l->memory) {
        shmr_loans_rest(l); /* forked children have the file, too, and the memory with it */
        munmap(l->memory, l->bytes);
    }
    if (l->owned) shmr_file_close(&l->file);
    free(l);
}

int shmr_loans_use(shmr_loans *l, int fd) {
    struct stat s;
    struct statfs on = {0};
    int seals = fcntl(fd, F_GET_SEALS);
    if (seals < 0 || !(seals & F_SEAL_SHRINK) || fstat(fd, &s) != 0 || (uint64_t)s.st_size <= DATA) return 0;
    fstatfs(fd, &on); /* in pages of another size there may be holes that nothing fills */
    if (on.f_type != TMPFS || !shmr_file_keep(&l->file, fd)) return 0;
    l->bytes = (uint64_t)s.st_size;
    return 1;
}

int shmr_loans_map(shmr_loans *l) {
    if (l->memory) return 1;
    if (!shmr_file_is_ours(&l->file, NULL) || shmr_allocate(l->file.fd, 0, DATA) != 0) return 0;
    void *memory = mmap(NULL, l->bytes, PROT_READ | PROT_WRITE, MAP_SHARED, l->file.fd, 0);
    if (memory == MAP_FAILED) return 0;
    l->memory = memory;
    l->there = DATA;
    l->pid = getpid();
    return 1;
}

int shmr_loans_make(shmr_loans *l, uint64_t bytes) {
    int fd = shmr_loans_file(bytes);
    if (fd < 0) return 0;
    l->owned = shmr_loans_use(l, fd);
    if (!l->owned) close(fd);
    return l->owned && shmr_loans_map(l);
}

const shmr_file *shmr_loans_offer(const shmr_loans *l) { return &l->file; }

int shmr_loans_accept(shmr_loans *l, int pid, const shmr_file *offer) {
    char path[64], target[64];
    snprintf(path, sizeof path, "/proc/%d/fd/%d", pid, offer->fd);
    /* Looked at first: to ask, or to open, what is no file of ours may wait, or do something. */
    ssize_t length = readlink(path, target, sizeof target);
    if (length < (ssize_t)strlen(FILE_NAME) || memcmp(target, FILE_NAME, strlen(FILE_NAME)) != 0) return 0;
    int fd = open(path, O_RDWR | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
    if (fd < 0) return 0;
    int done = shmr_loans_use(l, fd) && l->file.device == offer->device && l->file.inode == offer->inode && shmr_loans_map(l);
    l->file.fd = -1;
    l->pid = 0;
    close(fd);
    return done;
}

/* ---- the lender ----------------------------------------------------------------------------------------------------- */

static void look_what_is_back(shmr_loans *l) {
    while (l->first < l->next && (uint64_t)shmr_count_get(place(l, l->first)) == l->first + 1) l->first++;
}

/* Where the next loan may begin; 0: nowhere. */
static uint64_t begin_of_next(const shmr_loans *l, uint64_t bytes) {
    if (l->first == l->next) return bytes <= l->bytes - DATA ? DATA : 0;
    if (l->next - l->first == LOANS) return 0;
    uint64_t oldest = l->at[l->first % LOANS].begin;
    uint64_t newest = l->at[(l->next - 1) % LOANS].begin, end = l->at[(l->next - 1) % LOANS].end;
    if (newest < oldest) return bytes <= oldest - end ? end : 0;
    bool after = bytes <= l->bytes - end;
    if (after && end + bytes <= DATA + NEAR) return end;
    if (bytes <= oldest - DATA) return DATA;
    return after ? end : 0;
}

/* Who writes to memory that cannot be had dies; this asks for it. */
static bool have(shmr_loans *l, uint64_t end) {
    if (end <= l->there) return true;
    uint64_t wanted = (end + STEP - 1) / STEP * STEP;
    if (wanted > l->bytes) wanted = l->bytes;
    if (!shmr_file_is_ours(&l->file, NULL) || !shmr_reserve_in(l->file.fd, l->there, wanted - l->there)) return false;
    l->there = wanted;
    return true;
}

int shmr_loans_lend(shmr_loans *l, const shmr_piece *pieces, uint32_t count, shmr_loan *out) {
    uint64_t length = 0;
    for (uint32_t i = 0; i < count; i++) length += pieces[i].length;
    if (length > l->bytes || !shmr_loans_map(l) || l->pid != getpid()) return 0;
    uint64_t bytes = (length + LINE - 1) / LINE * LINE;
    look_what_is_back(l);
    uint64_t begin = begin_of_next(l, bytes);
    if (!begin || !have(l, begin + bytes)) return 0;
    char *target = l->memory + begin;
    for (uint32_t i = 0; i < count; target += pieces[i++].length) memcpy(target, pieces[i].bytes, pieces[i].length);
    l->at[l->next % LOANS].begin = begin;
    l->at[l->next % LOANS].end = begin + bytes;
    *out = (shmr_loan){.begin = begin, .length = length, .number = l->next++};
    return 1;
}

void shmr_loans_rest(shmr_loans *l) {
    if (!l->memory || l->pid != getpid()) return;
    look_what_is_back(l);
    if (l->first < l->next || l->there == DATA || !shmr_file_is_ours(&l->file, NULL)) return;
    if (fallocate(l->file.fd, PUNCH, (off_t)DATA, (off_t)(l->there - DATA)) == 0) l->there = DATA;
}

/* ---- the borrower --------------------------------------------------------------------------------------------------- */

int shmr_loans_has(const shmr_loans *l, const shmr_loan *loan) {
    return loan->begin >= DATA && loan->begin <= l->bytes && loan->length <= l->bytes - loan->begin;
}

int shmr_loans_copy(shmr_loans *l, const shmr_loan *loan, void *target) {
    if (!shmr_loans_has(l, loan)) return shmr_fail(SHMR_CORRUPT, 0, "bounds of memory that was lent");
    if (shmr_loans_map(l)) {
        memcpy(target, l->memory + loan->begin, loan->length);
        return SHMR_OK;
    }
    /* There is no room for it among our addresses. */
    if (!shmr_file_is_ours(&l->file, NULL)) return shmr_fail(SHMR_SYSTEM, EBADF, "its file was closed by other code");
    uint64_t got = 0;
    while (got < loan->length) {
        ssize_t more = pread(l->file.fd, (char *)target + got, loan->length - got, (off_t)(loan->begin + got));
        if (more > 0) got += (uint64_t)more;
        if (more == 0 || (more < 0 && errno != EINTR)) return shmr_fail(SHMR_SYSTEM, errno, "read of memory that was lent");
    }
    return SHMR_OK;
}

void shmr_loans_give_back(shmr_loans *l, const shmr_loan *loan) {
    int64_t back = (int64_t)(loan->number + 1);
    if (shmr_loans_map(l))
        shmr_count_set(place(l, loan->number), back); /* after the copy, before it is lent again */
    else if (shmr_file_is_ours(&l->file, NULL))
        (void)!pwrite(l->file.fd, &back, sizeof back, (off_t)(loan->number % LOANS * sizeof back));
}
