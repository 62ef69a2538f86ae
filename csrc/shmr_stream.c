/* SPDX-License-Identifier: BSD-3-Clause */
/* Whole messages through what the kernel keeps: a pipe, or a POSIX message queue.
 *
 * How far a message is lies here and not with the caller, whom a signal may interrupt at any moment: he calls again, or
 * gives the message up, and the other side never sees a part of it. The descriptor does not block; who has to wait
 * looks for some microseconds first and sleeps then. One thread sends and one receives at a time, each by a stream of
 * its own.
 *
 * In a pipe:     length, 8 bytes (0: goodbye) | stretch | 1 | stretch | 1 | ...
 *   A stretch has 1 MiB, the last one what is left. A 0 after one takes the message back: who gives it up owes the rest
 *   of the stretch as zeros, and that. Instead, LENT | length, 8 bytes | a loan | 1: the whole message lies in memory that
 *   both have (shmr_loan.c).
 * In a queue:    length, 8 bytes (0: goodbye) | where the bytes belong in the message, 8 bytes | bytes
 *   Each such fragment is a message of the queue. Those of a higher priority may come in between; a message ends where
 *   another one of its priority begins, or with a fragment that belongs to ABANDONED. One that belongs to LENT has a loan.
 *
 * What comes is not believed: nothing is written outside of the memory that was given for a length.
 */
#include <errno.h>
#include <limits.h>
#include <mqueue.h>
#include <poll.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "shmr_internal.h"

#define WORD 8
#define STRETCH (UINT64_C(1) << 20)
#define MOST_BYTES (UINT64_C(1) << 48)
#define AHEAD_BYTES (64u << 10) /* read at once, of small messages */
#define SMALL_BYTES (16u << 10) /* up to here a message is handed out where it was read */
#define LENT_BYTES (32u << 10)  /* from here on a message is lent, if there is room */
#define PARTS_MAX 64            /* of one system call */
#define FRAGMENT_HEADER 16
#define LOAN_BYTES (WORD + sizeof(shmr_loan) + 1) /* in a pipe */
#define ABANDONED UINT64_MAX
#define LENT (UINT64_C(1) << 63)

#define SPIN_NS 30000
#define PAUSE_NS 1500 /* between two looks, which cost the other side time, too */
#define MISSES_MAX 3   /* after so many spins in vain: no more spinning */
#define PROBE_EVERY 32 /* but try again now and then */
#define LOOK_NS 50000000

/* What has come of a message of one priority. */
struct incoming {
    uint64_t length;   /* 0: none has begun */
    uint64_t received; /* of them */
    uint64_t edge;     /* in a pipe: the end of the stretch */
    char *memory;      /* where they go, given by the caller; NULL: not yet */
    bool discard;      /* he has none: let them pass */
    bool lent;         /* they are not in what was read, which says where they are */
};

struct shmr_stream {
    shmr_file file;
    int64_t looked;          /* when whether it is still ours */
    shmr_count busy;         /* a call that sends is on its way, perhaps in a thread that the end of the process overtook */
    uint32_t fragment_bytes; /* of a queue: what a message of it may have; 0: a pipe */
    uint32_t turns, misses;  /* of spinning */

    uint64_t length, written;          /* the message that is being sent, 0: none; how much of what is sent for it */
    shmr_loans *loans;                 /* where large messages lie; NULL: nowhere */
    shmr_loan loan;                    /* that of the message that is being sent, if it has a length */
    uint64_t owed_to;                  /* it was given up: zeros up to here are still to be written; 0: nothing is */
    uint64_t sent[SHMR_PRIORITIES];    /* wholly */

    struct incoming incoming[SHMR_PRIORITIES];
    bool ready;                        /* a message is there, and not taken */
    uint64_t number;                   /* how many were ready so far */
    bool broken;                       /* what came makes no sense: nobody knows where a message begins */
    uint32_t priority;                 /* of the message at hand */
    uint32_t begin, end;               /* of what was read and not used */
    uint32_t room;
    char bytes[];                      /* read ahead; of a queue: the fragment that is sent, or was received */
};

shmr_stream *shmr_stream_new(int fd, uint32_t fragment_bytes) {
    uint32_t room = fragment_bytes ? fragment_bytes : AHEAD_BYTES;
    shmr_stream *s = calloc(1, sizeof *s + room);
    if (!s) return NULL;
    if (!shmr_file_keep(&s->file, fd)) {
        free(s);
        return NULL;
    }
    s->fragment_bytes = fragment_bytes;
    s->room = room;
    return s;
}

void shmr_stream_free(shmr_stream *s) { free(s); }
void shmr_stream_lend(shmr_stream *s, shmr_loans *loans) { s->loans = loans; }
uint64_t shmr_stream_sent(const shmr_stream *s, uint32_t priority) { return s->sent[priority]; }

/* ---- waiting -------------------------------------------------------------------------------------------------------- */

static int failed(const char *what) {
    return errno == EAGAIN ? SHMR_WOULD_BLOCK : shmr_fail(SHMR_SYSTEM, errno, what);
}

static uint64_t progress(const shmr_stream *s) { return s->written + s->incoming[s->priority].received; }

/* Call attempt() until it returns something else than WOULD_BLOCK. */
static int until(shmr_stream *s, int (*attempt)(shmr_stream *s, const void *argument), const void *argument,
                 short event, int64_t deadline) {
    int status = attempt(s, argument);
    if (status != SHMR_WOULD_BLOCK || deadline == 0) return status;
    int64_t now = shmr_now(), spin_end = now;
    /* The other side is awake and on another core, or it sleeps: what was the case tells what will be. */
    if (s->misses < MISSES_MAX || s->turns++ % PROBE_EVERY == 0) spin_end += SPIN_NS;
    bool spinning = spin_end > now;
    for (;;) {
        while (now < spin_end && (deadline < 0 || now < deadline)) {
            for (int64_t pause_end = now + PAUSE_NS; now < pause_end; now = shmr_now())
                for (int i = 0; i < 4; i++) shmr_pause();
            uint64_t before = progress(s);
            status = attempt(s, argument);
            if (status != SHMR_WOULD_BLOCK) {
                s->misses = 0;
                return status;
            }
            now = shmr_now();
            if (progress(s) != before) spin_end = now + SPIN_NS;
        }
        if (deadline >= 0 && now >= deadline) return SHMR_TIMEOUT;
        if (spinning && s->misses < MISSES_MAX) s->misses++;
        struct timespec left = {(deadline - now) / 1000000000, (deadline - now) % 1000000000};
        struct pollfd polled = {s->file.fd, event, 0};
        int count = ppoll(&polled, 1, deadline < 0 ? NULL : &left, NULL);
        if (count < 0 && errno == EINTR) return SHMR_INTERRUPTED;
        if (count < 0) return shmr_fail(SHMR_SYSTEM, errno, "ppoll of a channel");
        status = attempt(s, argument);
        if (status != SHMR_WOULD_BLOCK) return status;
        now = shmr_now();
        spinning = s->misses < MISSES_MAX;
        spin_end = spinning ? now + SPIN_NS : now;
    }
}

/* Code that closes whatever it finds closes ours, too, and the number is soon another file's. To ask each time would cost
 * as much as a small message. */
static int look(shmr_stream *s) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC_COARSE, &t);
    int64_t now = (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
    if (now - s->looked < LOOK_NS) return SHMR_OK;
    if (!shmr_file_is_ours(&s->file, NULL)) return shmr_fail(SHMR_SYSTEM, EBADF, "its descriptor was closed by other code");
    s->looked = now;
    return SHMR_OK;
}

/* ---- sending -------------------------------------------------------------------------------------------------------- */

struct outgoing {
    const shmr_piece *pieces;
    uint32_t count, priority;
    uint64_t length;
};

static uint64_t least(uint64_t a, uint64_t b) { return a < b ? a : b; }

/* How much a pipe carries for a message. */
static uint64_t wire_bytes(uint64_t length) { return WORD + length + (length + STRETCH - 1) / STRETCH; }

static const char zeros[64 << 10];
static const char commit = 1;

struct parts {
    struct iovec of[PARTS_MAX];
    int count;
};

static uint64_t add(struct parts *parts, const void *bytes, uint64_t length) {
    parts->of[parts->count++] = (struct iovec){(void *)(uintptr_t)bytes, length};
    return length;
}

/* Add the bytes of a message from `at` to `end`, or as many as there is room for; how many. */
static uint64_t add_bytes(struct parts *parts, const struct outgoing *m, uint64_t at, uint64_t end) {
    uint64_t start = at, first = 0;
    for (uint32_t i = 0; at < end && parts->count < PARTS_MAX; first += m->pieces[i++].length) {
        uint64_t skip = at - first;
        if (skip >= m->pieces[i].length) continue;
        at += add(parts, (const char *)m->pieces[i].bytes + skip, least(m->pieces[i].length - skip, end - at));
    }
    return at - start;
}

/* A pipe's: write on, once. */
static int write_parts(shmr_stream *s, const struct parts *parts) {
    ssize_t count = writev(s->file.fd, parts->of, parts->count);
    if (count < 0) return failed("write to a pipe");
    s->written += (uint64_t)count;
    return SHMR_OK;
}

static void begin_parts(const shmr_stream *s, struct parts *parts, const uint64_t *word) {
    parts->count = 0;
    if (s->written < WORD) add(parts, (const char *)word + s->written, WORD - s->written);
}

static int pay(shmr_stream *s) {
    while (s->owed_to) {
        struct parts parts;
        begin_parts(s, &parts, &s->length);
        uint64_t at = s->written < WORD ? WORD : s->written;
        while (at < s->owed_to) at += add(&parts, zeros, least(sizeof zeros, s->owed_to - at)); /* a stretch at most */
        int status = write_parts(s, &parts);
        if (status != SHMR_OK) return status;
        if (s->written == s->owed_to) s->length = s->written = s->owed_to = 0;
    }
    return SHMR_OK;
}

/* Lend a message that is large, and of which nothing has gone so far, if there is room; whether it is lent. */
static bool lend(shmr_stream *s, const struct outgoing *m) {
    if (s->loan.length || s->written || s->end || !s->loans || m->length < LENT_BYTES) return s->loan.length;
    return shmr_loans_lend(s->loans, m->pieces, m->count, &s->loan);
}

/* A pipe takes so few bytes at once, or none of them. */
static int write_loan(shmr_stream *s) {
    uint64_t length = LENT | s->loan.length;
    struct iovec parts[] = {{&length, WORD}, {&s->loan, sizeof s->loan}, {&(char){commit}, 1}};
    if (writev(s->file.fd, parts, 3) < 0) return failed("write to a pipe");
    s->loan.length = 0;
    return SHMR_OK;
}

static int write_message(shmr_stream *s, const struct outgoing *m) {
    int status = pay(s);
    if (status != SHMR_OK) return status;
    s->length = m->length;
    if (lend(s, m)) return write_loan(s);
    uint64_t end = wire_bytes(m->length);
    while (s->written < end) {
        struct parts parts;
        begin_parts(s, &parts, &s->length);
        uint64_t at = s->written < WORD ? WORD : s->written;
        while (at < end && parts.count < PARTS_MAX) {
            uint64_t stretch = (at - WORD) / (STRETCH + 1), offset = at - WORD - stretch;
            uint64_t edge = least((stretch + 1) * STRETCH, m->length);
            at += offset < edge ? add_bytes(&parts, m, offset, edge) : add(&parts, &commit, 1);
        }
        status = write_parts(s, &parts);
        if (status != SHMR_OK) return status;
    }
    return SHMR_OK;
}

/* A queue's: the next fragment; it stays built while the queue is full. */
static int send_fragment(shmr_stream *s, uint64_t length, uint64_t at, uint32_t bytes, uint32_t priority) {
    memcpy(s->bytes, &length, WORD);
    memcpy(s->bytes + WORD, &at, WORD);
    if (mq_send(s->file.fd, s->bytes, FRAGMENT_HEADER + bytes, priority) != 0) return failed("send to a message queue");
    return SHMR_OK;
}

static int send_loan(shmr_stream *s, uint32_t priority) {
    memcpy(s->bytes + FRAGMENT_HEADER, &s->loan, sizeof s->loan);
    int status = send_fragment(s, s->loan.length, LENT, sizeof s->loan, priority);
    if (status == SHMR_OK) s->loan.length = 0;
    return status;
}

static int send_fragments(shmr_stream *s, const struct outgoing *m) {
    s->length = m->length;
    if (s->fragment_bytes >= FRAGMENT_HEADER + sizeof s->loan && lend(s, m)) return send_loan(s, m->priority);
    while (s->written < m->length) {
        if (!s->end) {
            struct parts parts = {.count = 0};
            uint64_t wanted = least(s->fragment_bytes - FRAGMENT_HEADER, m->length - s->written);
            add_bytes(&parts, m, s->written, s->written + wanted);
            for (int i = 0; i < parts.count; s->end += (uint32_t)parts.of[i++].iov_len)
                memcpy(s->bytes + FRAGMENT_HEADER + s->end, parts.of[i].iov_base, parts.of[i].iov_len);
        }
        int status = send_fragment(s, m->length, s->written, s->end, m->priority);
        if (status != SHMR_OK) return status;
        s->written += s->end;
        s->end = 0;
    }
    return SHMR_OK;
}

static int push(shmr_stream *s, const void *argument) {
    const struct outgoing *m = argument;
    int status = look(s);
    if (status != SHMR_OK) return status;
    s->priority = m->priority;
    status = s->fragment_bytes ? send_fragments(s, m) : write_message(s, m);
    if (status != SHMR_OK) return status;
    s->length = s->written = 0;
    s->sent[m->priority]++;
    return SHMR_OK;
}

int shmr_stream_send(shmr_stream *s, const shmr_piece *pieces, uint32_t count, uint32_t priority, int64_t deadline) {
    struct outgoing m = {pieces, count, priority, 0};
    for (uint32_t i = 0; i < count; i++) m.length += pieces[i].length;
    if (!m.length || m.length > MOST_BYTES || priority >= SHMR_PRIORITIES)
        return shmr_fail(SHMR_BAD_ARGUMENT, 0, "length or priority of a message");
    shmr_count_add(&s->busy, 1);
    int status = until(s, push, &m, POLLOUT, deadline);
    shmr_count_add(&s->busy, -1);
    return status;
}

/* The header of a frame (shmengine/codec.py). */
struct frame {
    char magic[4];
    uint32_t crc; /* of what follows, as far as it is checked */
    uint8_t version, kind;
    uint16_t flags;
    uint32_t producer;
    uint64_t in_band, total, checked, sequence;
    uint32_t parts, prefix;
    uint64_t unused;
};
#define CHECKED_FROM 8 /* in the header */

int shmr_stream_send_frame(shmr_stream *s, const void *bytes, uint64_t length, uint32_t priority, int whole,
                           int64_t deadline) {
    char copy[SHMR_SMALL_FRAME];
    struct frame frame;
    if (length < sizeof frame || length > sizeof copy || priority >= SHMR_PRIORITIES)
        return shmr_fail(SHMR_BAD_ARGUMENT, 0, "length or priority of a frame");
    memcpy(copy, bytes, length);
    memcpy(&frame, bytes, sizeof frame);
    frame.producer = priority;
    frame.sequence = s->sent[priority];
    if (whole || frame.checked > length - sizeof frame) frame.checked = length - sizeof frame;
    memcpy(copy, &frame, sizeof frame);
    frame.crc = shmr_crc32c(0, copy + CHECKED_FROM, sizeof frame - CHECKED_FROM + frame.checked);
    memcpy(copy, &frame, sizeof frame);
    return shmr_stream_send(s, &(shmr_piece){copy, length}, 1, priority, deadline);
}

/* What a small frame says that a reader need not look at again; kind 0: it is none, or unsound. */
static void look_at_frame(shmr_message *out) {
    struct frame frame;
    if (out->length < sizeof frame) return;
    memcpy(&frame, out->bytes, sizeof frame);
    uint64_t most = out->length - sizeof frame;
    if (memcmp(frame.magic, "SHMF", 4) != 0 || frame.version != 1 || frame.flags || frame.total != out->length ||
        frame.in_band > most || frame.prefix > most - frame.in_band || frame.checked > most ||
        frame.checked < frame.prefix + frame.in_band)
        return;
    if (shmr_crc32c(0, out->bytes + CHECKED_FROM, sizeof frame - CHECKED_FROM + frame.checked) != frame.crc)
        return;
    out->kind = frame.kind;
    out->parts = frame.parts;
    out->prefix = frame.prefix;
    out->in_band = (uint32_t)frame.in_band;
    out->sequence = frame.sequence;
    out->producer = frame.producer;
}

void shmr_stream_give_up(shmr_stream *s) {
    if (shmr_count_get(&s->busy) || s->owed_to) return; /* it is that of an earlier one that has been written */
    if (s->loan.length) shmr_loans_give_back(s->loans, &s->loan);
    s->loan.length = 0;
    if (s->fragment_bytes) {
        if (s->written) send_fragment(s, s->length, ABANDONED, 0, s->priority); /* if not: the next one says it, too */
        s->length = s->written = s->end = 0;
    } else if (s->written) {
        uint64_t stretch = s->written < WORD ? 0 : (s->written - WORD) / (STRETCH + 1);
        s->owed_to = least(WORD + (stretch + 1) * (STRETCH + 1), wire_bytes(s->length));
        pay(s);
    } else {
        s->length = 0;
    }
}

void shmr_stream_goodbye(shmr_stream *s) {
    struct parts parts;
    uint64_t none = 0;
    s->looked = 0;
    if (shmr_count_get(&s->busy) || look(s) != SHMR_OK) return;
    if (s->fragment_bytes) {
        send_fragment(s, 0, 0, 0, 0);
    } else if (pay(s) == SHMR_OK && !s->written) {
        begin_parts(s, &parts, &none);
        write_parts(s, &parts);
    }
}

/* ---- receiving ------------------------------------------------------------------------------------------------------ */

static int broken(shmr_stream *s, const char *why) {
    s->broken = true;
    return shmr_fail(SHMR_CORRUPT, 0, why);
}

static void begin_message(struct incoming *in, uint64_t length) {
    *in = (struct incoming){.length = length, .edge = least(length, STRETCH)};
}

/* A message is there, or would be. */
static int finish(shmr_stream *s, struct incoming *in, uint32_t priority) {
    if (in->discard) {
        in->length = 0;
        return SHMR_WOULD_BLOCK;
    }
    s->priority = priority;
    s->ready = true;
    s->number++;
    return SHMR_OK;
}

/* Copy a message from where it lies; `misplaced`: it lies nowhere, or has another length than was said. */
static int borrow(shmr_stream *s, struct incoming *in, uint64_t length, const char *bytes, bool *misplaced) {
    shmr_loan loan;
    memcpy(&loan, bytes, sizeof loan);
    *misplaced = !s->loans || !length || loan.length != length || !shmr_loans_has(s->loans, &loan);
    if (*misplaced) return SHMR_CORRUPT;
    if (!(in->lent && in->length)) begin_message(in, length);
    in->lent = true;
    if (!in->memory && !in->discard) return SHMR_NO_MEMORY;
    int status = in->memory ? shmr_loans_copy(s->loans, &loan, in->memory) : SHMR_OK;
    if (status != SHMR_OK) return status;
    shmr_loans_give_back(s->loans, &loan);
    in->received = length;
    return SHMR_OK;
}

static int use_loan(shmr_stream *s, struct incoming *in, uint64_t length) {
    const char *loan = s->bytes + s->begin + WORD;
    bool misplaced;
    if (loan[sizeof(shmr_loan)] != commit) return broken(s, "mark after a loan in a pipe");
    int status = borrow(s, in, length, loan, &misplaced);
    if (misplaced) return broken(s, "memory that was lent through a pipe");
    if (status != SHMR_OK) return status;
    s->begin += LOAN_BYTES;
    return finish(s, in, 0);
}

/* A pipe's: go on with what was read. OK: a message is ready; WOULD_BLOCK: there is not enough. */
static int use_read(shmr_stream *s) {
    struct incoming *in = &s->incoming[0];
    for (;;) {
        uint32_t there = s->end - s->begin;
        if (!in->length || in->lent) {
            uint64_t length;
            if (there < WORD) return SHMR_WOULD_BLOCK;
            memcpy(&length, s->bytes + s->begin, WORD);
            if (!length) return SHMR_CLOSED;
            if (length & LENT) {
                if (there < LOAN_BYTES) return SHMR_WOULD_BLOCK;
                int status = use_loan(s, in, length & ~LENT);
                if (status == SHMR_WOULD_BLOCK) continue; /* it was discarded */
                return status;
            }
            if (length > MOST_BYTES) return broken(s, "length of a message in a pipe");
            s->begin += WORD;
            begin_message(in, length);
            continue;
        }
        bool here = in->length <= SMALL_BYTES;
        if (here && there <= in->length) return SHMR_WOULD_BLOCK;
        if (!here) {
            if (!in->memory && !in->discard) return SHMR_NO_MEMORY;
            uint32_t more = (uint32_t)least(there, in->edge - in->received);
            if (more && in->memory) memcpy(in->memory + in->received, s->bytes + s->begin, more);
            in->received += more;
            s->begin += more;
            if (in->received < in->edge || there == more) return SHMR_WOULD_BLOCK;
        }
        const char *mark = s->bytes + s->begin + (here ? in->length : 0);
        if (*mark != 0 && *mark != commit) return broken(s, "mark after the bytes of a message in a pipe");
        bool whole = here || in->received == in->length;
        if (!*mark) {
            in->length = 0;
        } else if (whole && finish(s, in, 0) == SHMR_OK) {
            if (!here) s->begin++; /* the bytes of a small one stay until it is taken */
            return SHMR_OK;
        }
        s->begin += (uint32_t)(mark + 1 - (s->bytes + s->begin));
        in->edge = least(in->edge + STRETCH, in->length);
    }
}

static int read_on(shmr_stream *s) {
    struct incoming *in = &s->incoming[0];
    struct iovec parts[2];
    int count = 0;
    uint64_t direct = 0;
    memmove(s->bytes, s->bytes + s->begin, s->end - s->begin);
    s->end -= s->begin;
    s->begin = 0;
    if (in->length && in->memory) {
        direct = in->edge - in->received;
        parts[count++] = (struct iovec){in->memory + in->received, direct};
    }
    parts[count++] = (struct iovec){s->bytes + s->end, s->room - s->end};
    ssize_t got = readv(s->file.fd, parts, count);
    if (got < 0) return failed("read from a pipe");
    if (got == 0) return shmr_fail(SHMR_SYSTEM, EPIPE, "a pipe has an end that it cannot have");
    direct = least((uint64_t)got, direct);
    in->received += direct;
    s->end += (uint32_t)((uint64_t)got - direct);
    return SHMR_OK;
}

static int read_message(shmr_stream *s) {
    for (;;) {
        int status = use_read(s);
        if (status == SHMR_WOULD_BLOCK) {
            status = read_on(s);
            if (status == SHMR_OK) continue;
        }
        return status;
    }
}

/* A queue's fragment that nobody of us has sent. */
static int misfit(shmr_stream *s, struct incoming *in, const char *why) {
    in->length = 0;
    s->end = s->priority = 0;
    return shmr_fail(SHMR_CORRUPT, 0, why);
}

static int receive_fragments(shmr_stream *s) {
    for (;;) {
        if (!s->end) {
            ssize_t count = mq_receive(s->file.fd, s->bytes, s->room, &s->priority);
            if (count < 0) return failed("receive from a message queue");
            s->end = (uint32_t)count;
            if (count < FRAGMENT_HEADER || s->priority >= SHMR_PRIORITIES)
                return misfit(s, &s->incoming[0], "a message of the queue that is no fragment");
        }
        struct incoming *in = &s->incoming[s->priority];
        uint64_t length, at, bytes = s->end - FRAGMENT_HEADER;
        memcpy(&length, s->bytes, WORD);
        memcpy(&at, s->bytes + WORD, WORD);
        if (!length) return SHMR_CLOSED;
        if (at == ABANDONED) {
            in->length = 0;
            s->end = 0;
            continue;
        }
        if (at == LENT && bytes == sizeof(shmr_loan)) {
            bool misplaced;
            int status = borrow(s, in, length, s->bytes + FRAGMENT_HEADER, &misplaced);
            if (misplaced) return misfit(s, in, "memory that was lent through a queue");
            if (status != SHMR_OK) return status;
            s->end = 0;
            if (finish(s, in, s->priority) == SHMR_OK) return SHMR_OK;
            continue;
        }
        if (!bytes || length > MOST_BYTES || at > length || bytes > length - at)
            return misfit(s, in, "bounds of a fragment");
        if (at == 0 && !(in->length && in->received == 0 && (in->memory || in->discard))) begin_message(in, length);
        if (in->length != length || in->received != at) {
            begin_message(in, length);
            in->discard = true;
            in->received = at + bytes;
            s->end = 0;
            if (in->received == length) in->length = 0;
            return shmr_fail(SHMR_CORRUPT, 0, "a fragment whose beginning is missing");
        }
        if (bytes == length) return finish(s, in, s->priority);
        if (!in->memory && !in->discard) return SHMR_NO_MEMORY;
        if (in->memory) memcpy(in->memory + at, s->bytes + FRAGMENT_HEADER, bytes);
        in->received += bytes;
        s->end = 0;
        if (in->received == length && finish(s, in, s->priority) == SHMR_OK) return SHMR_OK;
    }
}

static int pull(shmr_stream *s, const void *unused) {
    (void)unused;
    if (s->ready) return SHMR_OK;
    if (s->broken) return shmr_fail(SHMR_CORRUPT, 0, "what came before made no sense, so nobody knows where a message begins");
    int status = look(s);
    if (status != SHMR_OK) return status;
    return s->fragment_bytes ? receive_fragments(s) : read_message(s);
}

/* The message that is ready was taken. */
static void drop(shmr_stream *s) {
    struct incoming *in = &s->incoming[s->priority];
    if (s->fragment_bytes)
        s->end = 0;
    else if (!in->memory)
        s->begin += (uint32_t)in->length + 1;
    in->length = 0;
    in->memory = NULL;
    s->ready = false;
}

int shmr_stream_receive(shmr_stream *s, uint64_t taken, int64_t deadline, shmr_message *out) {
    if (s->ready && taken == s->number) drop(s);
    int status = until(s, pull, NULL, POLLIN, deadline);
    const struct incoming *in = &s->incoming[s->priority];
    *out = (shmr_message){.length = in->length, .number = s->number, .priority = s->priority};
    if (status == SHMR_OK && !in->memory) {
        out->bytes = s->bytes + s->begin + (s->fragment_bytes ? FRAGMENT_HEADER : 0);
        look_at_frame(out);
    }
    return status;
}

void shmr_stream_give_memory(shmr_stream *s, void *memory) {
    s->incoming[s->priority].memory = memory;
    s->incoming[s->priority].discard = !memory;
}
