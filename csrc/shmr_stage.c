/* SPDX-License-Identifier: BSD-3-Clause */
/* Large pieces into a pipe without its own pages: they are copied into pages of ours, which the pipe then refers to.
 *
 * `write` to a pipe allocates each page and copies, and `read` copies and frees it, both under the pipe's lock. Here the
 * copy is outside of it, into a stage of pages that take turns, and `vmsplice` only names them; the reader, who knows
 * nothing of it, copies from there. A page of the stage may be written again when the reader is through with it. The pipe
 * has a number of places, first in, first out, each for one page or a part of one: as long as these are no more than when
 * the stage was made, only the pages that were named last can be in it. The stage has twice as many, so when that is
 * looked at, as many pages as there are places may be written before the next look, whatever becomes of the pipe meanwhile.
 *
 * Where the kernel refuses, or somebody has enlarged the pipe, the caller writes.
 */
#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#include "shmr_internal.h"

static size_t page_bytes(void) { return (size_t)sysconf(_SC_PAGESIZE); }

/* Pages of one piece: some of them, so that the reader begins while the rest is copied. */
static size_t piece_pages(const struct shmr_stage *g) { return g->places / 4 ? g->places / 4 : 1; }

/* Those that may be in the pipe, as many that may be written, and what is left over at the end before the first one's turn. */
static size_t stage_pages(const struct shmr_stage *g) { return 2 * (g->places + piece_pages(g)); }

/* How many pages a pipe takes; 0: it is none. That waits for whoever reads or writes just now. */
static size_t places_of(int fd) {
    int capacity = fcntl(fd, F_GETPIPE_SZ);
    return capacity > 0 ? (size_t)capacity / page_bytes() : 0;
}

static bool open_stage(struct shmr_stage *g, int fd) {
    g->places = places_of(fd);
    if (!g->places) return false;
    g->memory = mmap(NULL, stage_pages(g) * page_bytes(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (g->memory == MAP_FAILED) g->memory = NULL;
    return g->memory;
}

void shmr_stage_close(struct shmr_stage *g) {
    if (g->memory) munmap(g->memory, stage_pages(g) * page_bytes()); /* what is in the pipe stays there */
    g->memory = NULL;
    g->next = g->begin = g->end = 0;
}

/* What was copied and not yet named belongs to a message that nobody will send. */
void shmr_stage_forget(struct shmr_stage *g) {
    if (g->begin < g->end) g->next = (g->begin + page_bytes() - 1) / page_bytes() * page_bytes();
    g->begin = g->end = g->next;
}

/* May a piece be written? */
static bool is_free(struct shmr_stage *g, int fd) {
    if (g->free_pages < piece_pages(g)) {
        if (places_of(fd) > g->places) return false;
        g->free_pages = g->places;
    }
    g->free_pages -= piece_pages(g);
    return true;
}

static void copy_piece(struct shmr_stage *g, const struct iovec *parts, int count) {
    size_t room = piece_pages(g) * page_bytes();
    if (g->next + room > stage_pages(g) * page_bytes()) g->next = 0;
    g->begin = g->end = g->next;
    for (int i = 0; i < count && g->end < g->begin + room; i++) {
        size_t bytes = g->begin + room - g->end;
        if (bytes > parts[i].iov_len) bytes = parts[i].iov_len;
        memcpy(g->memory + g->end, parts[i].iov_base, bytes);
        g->end += bytes;
    }
}

static ssize_t refuse(struct shmr_stage *g) {
    shmr_stage_close(g);
    g->refused = true;
    return -1;
}

/* Send the first bytes of these parts; how many, or -1 and EAGAIN: the pipe is full. It has to be called with the same bytes
 * again then. Any other error: not by this way (`refused`). */
ssize_t shmr_stage_send(struct shmr_stage *g, int fd, const struct iovec *parts, int count) {
    if (!g->memory && !open_stage(g, fd)) return refuse(g);
    if (g->begin == g->end) {
        if (!is_free(g, fd)) return refuse(g);
        copy_piece(g, parts, count);
    }
    struct iovec piece = {g->memory + g->begin, g->end - g->begin};
    ssize_t sent = vmsplice(fd, &piece, 1, SPLICE_F_NONBLOCK);
    if (sent < 0) return errno == EAGAIN ? -1 : refuse(g);
    g->begin += (size_t)sent;
    if (g->begin == g->end) g->next = (g->end + page_bytes() - 1) / page_bytes() * page_bytes();
    return sent;
}
