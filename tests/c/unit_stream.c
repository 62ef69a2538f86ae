/* SPDX-License-Identifier: BSD-3-Clause */
/* Streams: whole messages through a pipe or a message queue, or nothing of them; what others write there. */
#include <mqueue.h>
#include <sys/resource.h>
#include <sys/time.h>

#include "faults.h"

#define MS INT64_C(1000000)
#define SMALL 4096 /* bytes of the smallest pipe */
#define STRETCH MIB
#define ROOM 64 /* bytes of a message of the queue, 16 of them for the header of a fragment */
#define LARGE (2 * MIB + 12345)

static int fd;
static shmr_stream *source, *target;
static shmr_message message;
static uint64_t taken;
static char sent[LARGE], got[LARGE];

static void fill(uint64_t seed) {
    for (size_t i = 0; i < sizeof sent / 8; i++) {
        uint64_t word = next_random(&seed) | 1;
        memcpy(sent + 8 * i, &word, 8);
    }
}

static void open_streams(int descriptor, uint32_t fragment_bytes) {
    fd = descriptor;
    source = shmr_stream_new(fd, fragment_bytes);
    target = shmr_stream_new(fd, fragment_bytes);
    CHECK(source && target);
    taken = 0;
}

/* Both ends of a pipe by one descriptor, as its users have it. */
static int new_pipe(int bytes) {
    int both[2];
    char path[64];
    if (pipe2(both, O_NONBLOCK | O_CLOEXEC) != 0 || fcntl(both[0], F_SETPIPE_SZ, bytes) < 0) abort();
    snprintf(path, sizeof path, "/proc/self/fd/%d", both[0]);
    int one = open(path, O_RDWR | O_NONBLOCK | O_CLOEXEC);
    close(both[0]);
    close(both[1]);
    return one;
}
static void open_pipe(int bytes) { open_streams(new_pipe(bytes), 0); }

static int new_queue(long bytes) {
    char name[64];
    struct mq_attr attributes = {.mq_maxmsg = 8, .mq_msgsize = bytes};
    snprintf(name, sizeof name, "/shmr-test-%d", getpid());
    int queue = mq_open(name, O_RDWR | O_CREAT | O_EXCL | O_NONBLOCK, 0600, &attributes);
    if (queue < 0) abort();
    mq_unlink(name);
    return queue;
}
static void open_queue(void) { open_streams(new_queue(ROOM), ROOM); }

static void close_streams(void) {
    shmr_stream_free(source);
    shmr_stream_free(target);
    close(fd);
}

static int send_bytes(const void *bytes, uint64_t length, uint32_t priority, int64_t deadline) {
    return shmr_stream_send(target, &(shmr_piece){bytes, length}, 1, priority, deadline);
}

/* Receive the next message, into `got` if it asks for memory. */
static int receive(int64_t deadline) {
    int status;
    while ((status = shmr_stream_receive(source, taken, deadline, &message)) == SHMR_NO_MEMORY)
        shmr_stream_give_memory(source, got);
    if (status != SHMR_OK) return status;
    if (message.bytes) memcpy(got, message.bytes, message.length);
    taken = message.number;
    return status;
}

static void expect(const void *bytes, uint64_t length) {
    OK(receive(NOT_AT_ALL));
    CHECK_EQ(message.length, length);
    CHECK(memcmp(got, bytes, length) == 0);
}
static void expect_nothing(void) { CHECK_STATUS(receive(NOT_AT_ALL), SHMR_WOULD_BLOCK); }

/* Send and receive in turn until one whole message is through. */
static void pass(const shmr_piece *pieces, uint32_t count, uint64_t length, uint32_t priority) {
    int status, arrived = SHMR_WOULD_BLOCK;
    do {
        status = shmr_stream_send(target, pieces, count, priority, NOT_AT_ALL);
        if (arrived == SHMR_WOULD_BLOCK) arrived = receive(NOT_AT_ALL);
    } while (status == SHMR_WOULD_BLOCK);
    OK(status);
    if (arrived == SHMR_WOULD_BLOCK) arrived = receive(NOT_AT_ALL);
    OK(arrived);
    CHECK_EQ(message.length, length);
    CHECK_EQ(message.priority, priority);
    CHECK(memcmp(got, sent, length) == 0);
}

/* Raw bytes of somebody else. */
static void inject(const void *bytes, size_t length) { CHECK_EQ(write(fd, bytes, length), (ssize_t)length); }
static void inject_message(const void *bytes, uint64_t length, char mark) {
    inject(&length, 8);
    inject(bytes, length);
    inject(&mark, 1);
}
static void inject_fragment(uint64_t length, uint64_t at, size_t bytes, unsigned priority) {
    char fragment[ROOM];
    memcpy(fragment, &length, 8);
    memcpy(fragment + 8, &at, 8);
    memcpy(fragment + 16, sent + (at < length ? at : 0), bytes);
    CHECK_EQ(mq_send(fd, fragment, 16 + bytes, priority), 0);
}

/* ---- a pipe ---------------------------------------------------------------------------------------------------------- */

static void messages_arrive_in_order_and_stay_until_they_are_taken(void) {
    open_pipe(SMALL);
    expect_nothing();
    for (uint64_t i = 0; i < 3; i++) OK(send_bytes(sent + i, 10 + i, 0, NOT_AT_ALL));
    CHECK_EQ(shmr_stream_sent(target, 0), 3);
    for (uint64_t i = 0; i < 3; i++) {
        for (int turn = 0; turn < 2; turn++) {
            OK(shmr_stream_receive(source, i, NOT_AT_ALL, &message));
            CHECK_EQ(message.length, 10 + i);
            CHECK_EQ(message.number, i + 1);
            CHECK(memcmp(message.bytes, sent + i, 10 + i) == 0);
        }
    }
    taken = 3;
    expect_nothing();
    close_streams();
}

static void messages_of_every_size_and_of_many_pieces(void) {
    const uint64_t lengths[] = {1, 64, 4087, 4088, 16384, 16385, 65536, STRETCH - 1, STRETCH, STRETCH + 1, 2 * STRETCH, LARGE};
    open_pipe(SMALL);
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
        memset(got, 0, sizeof got);
        pass(&(shmr_piece){sent, lengths[i]}, 1, lengths[i], 0);
    }
    shmr_piece pieces[200];
    uint64_t length = 0;
    for (uint32_t i = 0; i < 200; i++) {
        pieces[i] = (shmr_piece){sent + length, i % 7 ? 300 + i : 0};
        length += pieces[i].length;
    }
    pass(pieces, 200, length, 0);
    expect_nothing();
    close_streams();
}

/* However much of a message was written, in whatever place, when it was given up: nothing of it is seen. */
static void what_is_given_up_is_never_seen(void) {
    const uint64_t lengths[] = {5000, 8186, 20000, STRETCH, LARGE}; /* of the second 3 bytes fit, less than the word */
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++)
        for (int before = 4085; before <= 4096; before += 1) { /* so much is in the pipe: room for a part of the word */
            open_pipe(SMALL);
            inject_message(sent, (uint64_t)before - 9, 1);
            CHECK_STATUS(send_bytes(sent, lengths[i], 0, NOT_AT_ALL), SHMR_WOULD_BLOCK);
            shmr_stream_give_up(target);
            shmr_stream_give_up(target);
            CHECK_EQ(shmr_stream_sent(target, 0), 0);
            expect(sent, (uint64_t)before - 9);
            int status;
            while ((status = send_bytes(sent + 1, 100, 0, NOT_AT_ALL)) == SHMR_WOULD_BLOCK) { /* what is owed goes first */
                shmr_stream_give_up(target);
                expect_nothing();
            }
            OK(status);
            expect(sent + 1, 100);
            expect_nothing();
            close_streams();
        }
}

static void a_message_is_given_up_anywhere(void) {
    open_pipe(SMALL);
    for (int turns = 0; turns < 500; turns += 1 + turns / 7) {
        for (int k = 0; k <= turns; k++) {
            CHECK_STATUS(send_bytes(sent, LARGE, 0, NOT_AT_ALL), SHMR_WOULD_BLOCK);
            if (k < turns) expect_nothing();
        }
        shmr_stream_give_up(target);
        while (send_bytes(sent + 3, 50, 0, NOT_AT_ALL) != SHMR_OK) expect_nothing();
        expect(sent + 3, 50);
    }
    expect_nothing();
    close_streams();
}

static void goodbye_is_said_last_and_for_ever(void) {
    open_pipe(SMALL);
    OK(send_bytes(sent, 10, 0, NOT_AT_ALL));
    shmr_stream_goodbye(target);
    expect(sent, 10);
    for (int i = 0; i < 3; i++) CHECK_STATUS(receive(NOT_AT_ALL), SHMR_CLOSED);
    close_streams();

    open_pipe(SMALL); /* there is no room for what is owed: not a word */
    CHECK_STATUS(send_bytes(sent, LARGE, 0, NOT_AT_ALL), SHMR_WOULD_BLOCK);
    shmr_stream_give_up(target);
    shmr_stream_goodbye(target);
    expect_nothing();
    close_streams();

    open_pipe(SMALL); /* there is */
    CHECK_STATUS(send_bytes(sent, 5000, 0, NOT_AT_ALL), SHMR_WOULD_BLOCK);
    expect_nothing();
    shmr_stream_give_up(target);
    shmr_stream_goodbye(target);
    CHECK_STATUS(receive(NOT_AT_ALL), SHMR_CLOSED);
    close_streams();

    open_pipe(SMALL); /* in the middle of a message that nobody has given up */
    CHECK_STATUS(send_bytes(sent, LARGE, 0, NOT_AT_ALL), SHMR_WOULD_BLOCK);
    shmr_stream_goodbye(target);
    pass(&(shmr_piece){sent, LARGE}, 1, LARGE, 0);
    close_streams();
}

static void a_message_without_memory_passes(void) {
    open_pipe(SMALL);
    int status;
    while ((status = send_bytes(sent, LARGE, 0, NOT_AT_ALL)) == SHMR_WOULD_BLOCK) {
        int arrived = shmr_stream_receive(source, taken, NOT_AT_ALL, &message);
        if (arrived == SHMR_NO_MEMORY) {
            CHECK_EQ(message.length, LARGE);
            shmr_stream_give_memory(source, NULL);
        } else {
            CHECK_STATUS(arrived, SHMR_WOULD_BLOCK);
        }
    }
    OK(status);
    OK(send_bytes(sent + 1, 100, 0, NOT_AT_ALL));
    expect(sent + 1, 100);
    close_streams();
}

static void what_makes_no_sense_is_corrupt_for_ever(void) {
    const uint64_t lengths[] = {10, 20000};
    uint64_t absurd = (UINT64_C(1) << 48) + 1;
    open_pipe(65536);
    inject(&absurd, 8);
    for (int i = 0; i < 2; i++) CHECK_STATUS(receive(NOT_AT_ALL), SHMR_CORRUPT);
    close_streams();
    for (int i = 0; i < 2; i++) {
        open_pipe(65536);
        inject_message(sent, lengths[i], 0); /* taken back */
        inject_message(sent, lengths[i], 1);
        inject_message(sent, lengths[i], 2);
        expect(sent, lengths[i]);
        for (int k = 0; k < 2; k++) CHECK_STATUS(receive(NOT_AT_ALL), SHMR_CORRUPT);
        OK(send_bytes(sent, 10, 0, NOT_AT_ALL));
        CHECK_STATUS(receive(NOT_AT_ALL), SHMR_CORRUPT);
        close_streams();
    }
    open_pipe(65536); /* the mark comes later than all before it */
    inject(&lengths[1], 8);
    inject(sent, lengths[1]);
    expect_nothing();
    inject("\1", 1);
    expect(sent, lengths[1]);
    close_streams();
    int ends[2]; /* a pipe whose other end can be closed */
    CHECK_EQ(pipe2(ends, O_NONBLOCK | O_CLOEXEC), 0);
    open_streams(ends[0], 0);
    close(ends[1]);
    CHECK_STATUS(receive(NOT_AT_ALL), SHMR_SYSTEM);
    close_streams();
}

/* ---- frames ---------------------------------------------------------------------------------------------------------- */

struct frame {
    char magic[4];
    uint32_t crc;
    uint8_t version, kind;
    uint16_t flags;
    uint32_t producer;
    uint64_t in_band, total, checked, sequence;
    uint32_t parts, prefix;
    uint64_t unused;
    char bytes[40];
};

static struct frame new_frame(void) {
    struct frame f = {.magic = {'S', 'H', 'M', 'F'}, .version = 1, .kind = 3, .in_band = 4, .total = sizeof f, .checked = 20,
                      .parts = 1, .prefix = 16};
    memcpy(f.bytes, sent, sizeof f.bytes);
    return f;
}

static void the_number_and_the_checksum_of_a_small_frame_are_filled_in(void) {
    struct frame f = new_frame(), seen;
    open_pipe(SMALL);
    for (uint64_t i = 0; i < 4; i++) {
        if (i == 2) f.checked = UINT64_MAX;
        OK(shmr_stream_send_frame(target, &f, sizeof f, 0, i == 1, NOT_AT_ALL));
        OK(receive(NOT_AT_ALL));
        memcpy(&seen, got, sizeof seen);
        CHECK_EQ(seen.sequence, i);
        CHECK_EQ(seen.checked, i == 0 ? 20 : sizeof f.bytes);
        CHECK_EQ(seen.crc, shmr_crc32c(0, got + 8, 56 + seen.checked));
        CHECK_EQ(message.kind, 3);
        CHECK_EQ(message.sequence, i);
        CHECK_EQ(message.parts, 1);
        CHECK_EQ(message.prefix, 16);
        CHECK_EQ(message.in_band, 4);
        CHECK_EQ(message.producer, 0);
    }
    static char large[SHMR_SMALL_FRAME + 1];
    CHECK_STATUS(shmr_stream_send_frame(target, large, sizeof large, 0, 0, NOT_AT_ALL), SHMR_BAD_ARGUMENT);
    CHECK_STATUS(shmr_stream_send_frame(target, large, 63, 0, 0, NOT_AT_ALL), SHMR_BAD_ARGUMENT);
    CHECK_STATUS(shmr_stream_send_frame(target, large, 64, SHMR_PRIORITIES, 0, NOT_AT_ALL), SHMR_BAD_ARGUMENT);
    close_streams();
}

static void inject_frame(struct frame f) {
    f.crc = shmr_crc32c(0, (char *)&f + 8, 56 + (f.checked < sizeof f.bytes ? f.checked : sizeof f.bytes));
    inject_message(&f, sizeof f, 1);
}
static void expect_unknown(void) {
    OK(receive(NOT_AT_ALL));
    CHECK_EQ(message.kind, 0);
}

static void a_frame_that_is_none_is_left_to_the_reader(void) {
    open_pipe(SMALL);
    struct frame f = new_frame();
    inject_frame(f);
    OK(receive(NOT_AT_ALL));
    CHECK_EQ(message.kind, 3);
#define UNSOUND(field, value) \
    f = new_frame();          \
    f.field = value;          \
    inject_frame(f);          \
    expect_unknown()
    UNSOUND(magic[1], 'X');
    UNSOUND(version, 2);
    UNSOUND(flags, 1);
    UNSOUND(total, sizeof f - 1);
    UNSOUND(in_band, 41);
    UNSOUND(prefix, 37);
    UNSOUND(checked, 41);
    UNSOUND(checked, 19);
#undef UNSOUND
    f = new_frame();
    inject_message(&f, sizeof f, 1); /* the checksum is 0 */
    expect_unknown();
    inject_message(&f, 63, 1);
    expect_unknown();
    close_streams();
}

/* ---- a queue --------------------------------------------------------------------------------------------------------- */

static void messages_of_a_queue_are_cut_and_put_together(void) {
    const uint64_t lengths[] = {1, 48, 49, 96, 97, 5000, 100000};
    open_queue();
    expect_nothing();
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
        memset(got, 0, sizeof got);
        pass(&(shmr_piece){sent, lengths[i]}, 1, lengths[i], (uint32_t)i);
        CHECK_EQ(shmr_stream_sent(target, (uint32_t)i), 1);
    }
    pass((shmr_piece[]){{sent, 30}, {sent + 30, 0}, {sent + 30, 70}}, 3, 100, 31);
    OK(send_bytes(sent, 10, 0, NOT_AT_ALL));
    for (int i = 0; i < 2; i++) OK(shmr_stream_receive(source, taken, NOT_AT_ALL, &message)); /* the same one */
    CHECK_EQ(message.length, 10);
    expect(sent, 10);
    shmr_stream_goodbye(target);
    for (int i = 0; i < 2; i++) CHECK_STATUS(receive(NOT_AT_ALL), SHMR_CLOSED);
    close_streams();
}

static void higher_priorities_come_in_between(void) {
    open_queue();
    shmr_stream *other = shmr_stream_new(fd, ROOM);
    static char memory[500];
    CHECK_STATUS(send_bytes(sent, 500, 1, NOT_AT_ALL), SHMR_WOULD_BLOCK); /* 8 of 11 fragments */
    for (int i = 0; i < 3; i++) {
        CHECK_STATUS(shmr_stream_receive(source, 0, NOT_AT_ALL, &message), SHMR_NO_MEMORY);
        CHECK_EQ(message.priority, 1);
        CHECK_EQ(message.length, 500);
    }
    shmr_stream_give_memory(source, memory);
    CHECK_STATUS(shmr_stream_receive(source, 0, NOT_AT_ALL, &message), SHMR_WOULD_BLOCK);
    for (uint32_t priority = 0; priority < 4; priority++)
        OK(shmr_stream_send(other, &(shmr_piece){sent + priority, 20}, 1, priority, NOT_AT_ALL));
    OK(send_bytes(sent, 500, 1, NOT_AT_ALL));
    for (uint32_t priority = 3; priority >= 2; priority--) {
        expect(sent + priority, 20);
        CHECK_EQ(message.priority, priority);
    }
    expect(sent + 1, 20); /* of the same priority: the first fragment of another one, so that one ends */
    CHECK_STATUS(receive(NOT_AT_ALL), SHMR_CORRUPT);
    expect(sent, 20);
    expect_nothing();
    shmr_stream_free(other);
    close_streams();
}

static void what_is_given_up_in_a_queue_is_never_seen(void) {
    open_queue();
    for (int room = 0; room < 2; room++) { /* whether that can be said, or only shows by the next one */
        CHECK_STATUS(send_bytes(sent, 500, 1, NOT_AT_ALL), SHMR_WOULD_BLOCK);
        if (room) expect_nothing();
        shmr_stream_give_up(target);
        expect_nothing();
        OK(send_bytes(sent + 1, 60, 1, NOT_AT_ALL));
        expect(sent + 1, 60);
        expect_nothing();
        CHECK_EQ(shmr_stream_sent(target, 1), (uint64_t)room + 1);
    }
    shmr_stream_give_up(target); /* nothing */
    expect_nothing();
    close_streams();
}

static void what_nobody_has_sent_into_a_queue_is_corrupt_once(void) {
    open_queue();
    CHECK_EQ(mq_send(fd, "short", 5, 0), 0);
    CHECK_STATUS(receive(NOT_AT_ALL), SHMR_CORRUPT);
    inject_fragment(10, 0, 10, SHMR_PRIORITIES);
    CHECK_STATUS(receive(NOT_AT_ALL), SHMR_CORRUPT);
    inject_fragment(10, 0, 0, 0);
    CHECK_STATUS(receive(NOT_AT_ALL), SHMR_CORRUPT);
    inject_fragment(10, 0, 11, 0);
    CHECK_STATUS(receive(NOT_AT_ALL), SHMR_CORRUPT);
    inject_fragment(10, 11, 1, 0);
    CHECK_STATUS(receive(NOT_AT_ALL), SHMR_CORRUPT);
    inject_fragment((UINT64_C(1) << 48) + 1, 0, 1, 0);
    CHECK_STATUS(receive(NOT_AT_ALL), SHMR_CORRUPT);
    inject_fragment(100, 30, 30, 0); /* its beginning is missing: that is said once */
    inject_fragment(100, 60, 40, 0);
    inject_fragment(100, 60, 40, 0); /* and the same of a last one */
    CHECK_STATUS(receive(NOT_AT_ALL), SHMR_CORRUPT);
    CHECK_STATUS(receive(NOT_AT_ALL), SHMR_CORRUPT);
    inject_fragment(100, 0, 40, 0);
    inject_fragment(99, 40, 40, 0);
    CHECK_STATUS(receive(NOT_AT_ALL), SHMR_CORRUPT);
    inject_fragment(100, 0, 30, 0);
    inject_fragment(100, 60, 40, 0);
    CHECK_STATUS(receive(NOT_AT_ALL), SHMR_CORRUPT);
    OK(send_bytes(sent, 10, 0, NOT_AT_ALL));
    expect(sent, 10);
    expect_nothing();
    close_streams();
}

static void a_message_of_a_queue_without_memory_passes(void) {
    open_queue();
    OK(send_bytes(sent, 200, 2, NOT_AT_ALL));
    CHECK_STATUS(shmr_stream_receive(source, 0, NOT_AT_ALL, &message), SHMR_NO_MEMORY);
    shmr_stream_give_memory(source, NULL);
    expect_nothing();
    OK(send_bytes(sent + 1, 200, 2, NOT_AT_ALL));
    expect(sent + 1, 200);
    close_streams();
}

/* ---- waiting --------------------------------------------------------------------------------------------------------- */

static void *send_later(void *argument) {
    for (int i = 0; i < *(int *)argument; i++) OK(send_bytes(sent, LARGE, 0, FOR_EVER));
    return NULL;
}

static void whoever_waits_is_woken(void) {
    for (int queue = 0; queue < 2; queue++) {
        pthread_t thread;
        int count = queue ? 1 : 5;
        queue ? open_queue() : open_pipe(SMALL);
        CHECK_EQ(pthread_create(&thread, NULL, send_later, &count), 0);
        for (int i = 0; i < count; i++) {
            memset(got, 0, sizeof got);
            OK(receive(FOR_EVER));
            CHECK_EQ(message.length, LARGE);
            CHECK(memcmp(got, sent, LARGE) == 0);
        }
        pthread_join(thread, NULL);
        close_streams();
    }
}

static void *send_one_byte(void *unused) {
    (void)unused;
    usleep(20000); /* the other side sleeps by now */
    OK(send_bytes(sent, 1, 0, FOR_EVER));
    return NULL;
}

static void all_of_it_may_be_there_on_waking(void) {
    pthread_t thread;
    open_pipe(SMALL);
    CHECK_EQ(pthread_create(&thread, NULL, send_one_byte, NULL), 0);
    OK(receive(FOR_EVER));
    CHECK_EQ(message.length, 1);
    pthread_join(thread, NULL);
    close_streams();
}

static size_t coming;
static void inject_what_is_coming(int number) {
    (void)number;
    if (write(fd, sent, coming) != (ssize_t)coming) abort();
}

/* Something comes while the waiter is still awake: all of a message, or some bytes of one. */
static void what_comes_soon_is_found_by_looking(void) {
    struct sigaction action = {.sa_handler = inject_what_is_coming}, before;
    struct itimerval soon = {{0, 0}, {0, 15}};
    sigaction(SIGALRM, &action, &before);
    for (int round = 0; round < 400; round++) {
        open_pipe(65536);
        inject(&(uint64_t){round % 2 ? 20000 : 8}, 8);
        expect_nothing();
        coming = round % 2 ? 500 : 9;
        sent[8] = 1;
        setitimer(ITIMER_REAL, &soon, NULL);
        int status = receive(shmr_now() + 25000);
        CHECK(status == SHMR_TIMEOUT || (status == SHMR_INTERRUPTED) || (status == SHMR_OK && round % 2 == 0));
        setitimer(ITIMER_REAL, &(struct itimerval){{0, 0}, {0, 0}}, NULL);
        close_streams();
    }
    sigaction(SIGALRM, &before, NULL);
    alarm(WATCHDOG_SECONDS); /* setitimer has taken its place */
}

static void deadlines_are_kept(void) {
    open_pipe(SMALL);
    for (int i = 0; i < 40; i++) { /* also without spinning, and when that is tried again */
        int64_t deadline = shmr_now() + (i < 30 ? MS / 100 : MS);
        CHECK_STATUS(receive(deadline), SHMR_TIMEOUT);
        CHECK(shmr_now() >= deadline);
    }
    CHECK_STATUS(send_bytes(sent, LARGE, 0, shmr_now() + MS), SHMR_TIMEOUT);
    CHECK_STATUS(send_bytes(sent, LARGE, 0, 1), SHMR_TIMEOUT); /* it is long past */
    close_streams();
}

static void on_alarm(int number) { (void)number; }

static void a_signal_interrupts(void) {
    struct sigaction action = {.sa_handler = on_alarm}, before;
    struct itimerval often = {{0, 2000}, {0, 2000}}, never = {{0, 0}, {0, 0}};
    sigaction(SIGALRM, &action, &before);
    setitimer(ITIMER_REAL, &often, NULL);
    open_pipe(SMALL);
    CHECK_STATUS(receive(FOR_EVER), SHMR_INTERRUPTED);
    CHECK_STATUS(send_bytes(sent, LARGE, 0, FOR_EVER), SHMR_INTERRUPTED);
    setitimer(ITIMER_REAL, &never, NULL);
    sigaction(SIGALRM, &before, NULL);
    alarm(WATCHDOG_SECONDS); /* setitimer has taken its place */
    pass(&(shmr_piece){sent, LARGE}, 1, LARGE, 0);
    close_streams();
}

/* ---- what goes wrong ------------------------------------------------------------------------------------------------- */

static void another_file_is_let_alone(void) {
    open_pipe(SMALL);
    OK(send_bytes(sent, 10, 0, NOT_AT_ALL));
    int kept = dup(fd), other = new_pipe(SMALL), status;
    CHECK_EQ(write(other, "mine", 4), 4);
    CHECK_EQ(dup2(other, fd), fd);
    struct timespec pause = {0, 60 * MS}; /* it is looked at no more often than this */
    __real_nanosleep(&pause, NULL);
    CHECK_STATUS(receive(NOT_AT_ALL), SHMR_SYSTEM);
    CHECK_STATUS(send_bytes(sent, 10, 0, NOT_AT_ALL), SHMR_SYSTEM);
    shmr_stream_goodbye(target);
    CHECK_EQ(read(other, got, 10), 4);
    close(other);
    close(fd); /* now there is none */
    close(kept);
    status = receive(shmr_now() + MS);
    CHECK_STATUS(status, SHMR_SYSTEM);
    close_streams();
}

static void calls_that_fail(void) {
    struct rlimit before, none;
    shmr_stream_free(NULL);
    int descriptor = new_pipe(SMALL);
    arm_fault(FAULT_CALLOC, 1, ENOMEM);
    CHECK(!shmr_stream_new(descriptor, 0));
    arm_fault(FAULT_FSTAT, 1, EBADF);
    CHECK(!shmr_stream_new(descriptor, 0));
    disarm_faults();
    open_streams(descriptor, 0);
    getrlimit(RLIMIT_NOFILE, &before);
    none = (struct rlimit){0, before.rlim_max};
    setrlimit(RLIMIT_NOFILE, &none); /* then ppoll refuses */
    CHECK_STATUS(receive(FOR_EVER), SHMR_SYSTEM);
    setrlimit(RLIMIT_NOFILE, &before);
    OK(send_bytes(sent, 10, 0, NOT_AT_ALL));
    expect(sent, 10);
    int copy = dup(fd);
    close(fd); /* just after a look: the call itself finds out */
    CHECK_STATUS(receive(shmr_now() + 1000 * MS), SHMR_SYSTEM);
    CHECK_STATUS(send_bytes(sent, 10, 0, NOT_AT_ALL), SHMR_SYSTEM);
    CHECK_EQ(dup2(copy, fd), fd);
    close(copy);
    CHECK_STATUS(send_bytes(sent, 0, 0, NOT_AT_ALL), SHMR_BAD_ARGUMENT);
    CHECK_STATUS(send_bytes(sent, (UINT64_C(1) << 48) + 1, 0, NOT_AT_ALL), SHMR_BAD_ARGUMENT);
    CHECK_STATUS(send_bytes(sent, 1, SHMR_PRIORITIES, NOT_AT_ALL), SHMR_BAD_ARGUMENT);
    close_streams();
}

/* ---- large messages, in memory that is lent -------------------------------------------------------------------------------- */

#define LOANED 50000

static shmr_loans *lender, *borrower;

static void open_loans(uint64_t bytes) {
    int file = shmr_loans_file(bytes), copy = dup(file);
    lender = shmr_loans_new();
    borrower = shmr_loans_new();
    CHECK(file >= 0 && shmr_loans_use(lender, file) && shmr_loans_use(borrower, copy));
    shmr_stream_lend(target, lender);
    shmr_stream_lend(source, borrower);
}
static void close_loans(void) {
    int files[] = {shmr_loans_offer(lender)->fd, shmr_loans_offer(borrower)->fd};
    shmr_loans_free(lender);
    shmr_loans_free(borrower);
    close(files[0]);
    close(files[1]);
    close_streams();
}

/* Over a pipe, and over a queue. */
static void open_lending(int queue, uint64_t bytes) {
    if (queue)
        open_queue();
    else
        open_pipe(SMALL);
    open_loans(bytes);
}

static char other_bytes[LARGE];

static void write_numbers(char *to, uint64_t length, uint64_t seed) {
    for (uint64_t i = 0; i < length; i += 64) to[i] = (char)(seed * 31 + i / 64);
}
static bool are_numbers(const char *bytes, uint64_t length, uint64_t seed) {
    for (uint64_t i = 0; i < length; i += 64)
        if (bytes[i] != (char)(seed * 31 + i / 64)) return false;
    return true;
}
static uint64_t length_of(uint64_t number) {
    uint64_t seed = number + 1;
    return 1 + next_random(&seed) % (number % 3 ? LARGE : 100000);
}

#define MANY 150
static void *send_many(void *unused) {
    for (uint64_t k = 0; k < MANY; k++) {
        uint64_t length = length_of(k);
        write_numbers(other_bytes, length, k); /* at once over the last one, which may still be on its way */
        OK(send_bytes(other_bytes, length, 0, FOR_EVER));
    }
    return unused;
}

static void what_was_lent_is_lent_again_when_it_is_back(void) {
    const uint64_t rooms[] = {LOANED, LARGE, 3 * LARGE + 12345, 100 * MIB}; /* in the first ones not all is lent */
    for (int queue = 0; queue < 2; queue++) {
        for (size_t room = 0; room < sizeof rooms / sizeof *rooms; room++) {
            pthread_t thread;
            open_lending(queue, rooms[room]);
            CHECK_EQ(pthread_create(&thread, NULL, send_many, NULL), 0);
            for (uint64_t k = 0; k < MANY; k++) {
                if (k % 16 == 0) usleep(2000); /* nothing comes back meanwhile */
                OK(receive(FOR_EVER));
                CHECK_EQ(message.length, length_of(k));
                CHECK(are_numbers(got, message.length, k));
            }
            pthread_join(thread, NULL);
            close_loans();
        }
    }
}

/* Where everything is full the message is lent, and not on its way. */
static void what_was_lent_may_be_given_up(void) {
    for (int queue = 0; queue < 2; queue++) {
        open_lending(queue, LOANED);
        uint64_t count = 0;
        while (send_bytes(sent, 30, 0, NOT_AT_ALL) == SHMR_OK) count++;
        shmr_stream_give_up(target);
        for (int turn = 0; turn < 2; turn++) { /* there is room for one of them */
            CHECK_STATUS(send_bytes(sent + turn, LOANED, 0, NOT_AT_ALL), SHMR_WOULD_BLOCK);
            CHECK_STATUS(send_bytes(sent + turn, LOANED, 0, NOT_AT_ALL), SHMR_WOULD_BLOCK);
            shmr_stream_give_up(target);
        }
        CHECK_STATUS(send_bytes(sent + 7, LOANED, 0, NOT_AT_ALL), SHMR_WOULD_BLOCK);
        while (count--) expect(sent, 30);
        expect_nothing();
        OK(send_bytes(sent + 7, LOANED, 0, NOT_AT_ALL));
        expect(sent + 7, LOANED);
        expect_nothing();
        OK(send_bytes(sent + 9, LOANED, 0, NOT_AT_ALL)); /* all of it is back */
        expect(sent + 9, LOANED);
        shmr_stream_goodbye(target);
        CHECK_STATUS(receive(NOT_AT_ALL), SHMR_CLOSED);
        close_loans();
    }
}

static void what_was_lent_passes_without_memory(void) {
    for (int queue = 0; queue < 2; queue++) {
        open_lending(queue, LOANED);
        for (int turn = 0; turn < 3; turn++) {
            OK(send_bytes(sent, LOANED, 0, NOT_AT_ALL));
            for (int i = 0; i < 2; i++)
                CHECK_STATUS(shmr_stream_receive(source, taken, NOT_AT_ALL, &message), SHMR_NO_MEMORY);
            CHECK_EQ(message.length, LOANED);
            shmr_stream_give_memory(source, NULL);
            expect_nothing();
        }
        OK(send_bytes(sent + 1, LOANED, 0, NOT_AT_ALL));
        expect(sent + 1, LOANED);
        OK(send_bytes(sent + 2, 20, 0, NOT_AT_ALL));
        expect(sent + 2, 20);
        close_loans();
    }
}

static void loans_have_priorities_and_stay_until_they_are_taken(void) {
    open_queue();
    open_loans(4 * LOANED + 256);
    for (uint32_t priority = 0; priority < 3; priority++)
        OK(send_bytes(sent + priority, LOANED, priority, NOT_AT_ALL));
    OK(send_bytes(sent + 3, 20, 1, NOT_AT_ALL));
    expect(sent + 2, LOANED);
    CHECK_STATUS(shmr_stream_receive(source, taken, NOT_AT_ALL, &message), SHMR_NO_MEMORY);
    shmr_stream_give_memory(source, got);
    for (int i = 0; i < 2; i++) OK(shmr_stream_receive(source, taken, NOT_AT_ALL, &message)); /* the same one */
    CHECK_EQ(message.priority, 1);
    taken = message.number;
    expect(sent + 3, 20);
    expect(sent, LOANED);
    expect_nothing();
    for (uint32_t priority = 0; priority < 3; priority++) /* all of it is back */
        OK(send_bytes(sent + priority, LOANED, priority, NOT_AT_ALL));
    for (uint32_t priority = 3; priority-- > 0;) expect(sent + priority, LOANED);
    close_loans();
}

/* Who has no memory to lend, or to borrow, is sent the bytes; so is who has so small a queue. */
static void without_loans_it_travels(void) {
    open_pipe(1 << 20);
    open_loans(LOANED);
    OK(send_bytes(sent, LOANED + 8192, 0, NOT_AT_ALL));
    expect(sent, LOANED + 8192);
    break_calls(FAULT_MMAP, ENOMEM); /* nothing was large so far, nor mapped */
    OK(send_bytes(sent, LOANED, 0, NOT_AT_ALL));
    CHECK(disarm_faults());
    expect(sent, LOANED);
    OK(send_bytes(sent, 20, 0, NOT_AT_ALL));
    expect(sent, 20);
    OK(send_bytes(sent + 1, LOANED, 0, NOT_AT_ALL)); /* who lends has mapped it then; who borrows reads the file */
    for (int i = 1; i < 4; i++) {
        break_calls(FAULT_MMAP, ENOMEM);
        expect(sent + i, LOANED);
        CHECK(disarm_faults());
        OK(send_bytes(sent + i + 1, LOANED, 0, NOT_AT_ALL)); /* its memory is back: there is no room for two */
    }
    int files = shmr_loans_offer(borrower)->fd, copy = dup(files);
    dup2(fd, files); /* by other code */
    for (int i = 0; i < 2; i++) CHECK_STATUS(receive(NOT_AT_ALL), SHMR_SYSTEM);
    dup2(copy, files);
    close(copy);
    expect(sent + 4, LOANED);
    close_loans();
    open_pipe(1 << 20);
    open_loans(LOANED);
    break_calls(FAULT_FALLOCATE, ENOMEM);
    OK(send_bytes(sent, LOANED - 8192, 0, NOT_AT_ALL));
    CHECK(disarm_faults());
    expect(sent, LOANED - 8192);
    close_loans();
    open_streams(new_queue(39), 39);
    open_loans(LOANED);
    pass(&(shmr_piece){sent, LOANED}, 1, LOANED, 0);
    close_loans();
}

static void inject_loan(int queue, uint64_t length, shmr_loan loan, char mark) {
    char bytes[16 + sizeof loan + 1];
    uint64_t lent = UINT64_C(1) << 63, word = queue ? length : length | lent;
    size_t at = queue ? 16 : 8;
    memcpy(bytes, &word, 8);
    if (queue) memcpy(bytes + 8, &lent, 8);
    memcpy(bytes + at, &loan, sizeof loan);
    bytes[at + sizeof loan] = mark;
    if (queue)
        CHECK_EQ(mq_send(fd, bytes, at + sizeof loan, 0), 0);
    else
        inject(bytes, at + sizeof loan + 1);
}

static void loans_that_make_no_sense_are_corrupt(void) {
    const struct {
        uint64_t length;
        shmr_loan loan;
        bool odd_mark, no_loans;
    } bad[] = {
        {0, {4096, 0, 0}, false, false},
        {8, {4096, 9, 0}, false, false},
        {8, {4095, 8, 0}, false, false},
        {8, {UINT64_MAX, 8, 0}, false, false},
        {LARGE, {4096, LARGE, 0}, false, false},
        {8, {4096, 8, 0}, true, false},
        {8, {4096, 8, 0}, false, true},
    };
    for (size_t i = 0; i < 2 * sizeof bad / sizeof *bad; i++) {
        int queue = i % 2;
        if (queue && (!bad[i / 2].length || bad[i / 2].odd_mark)) continue; /* of length 0: goodbye */
        open_lending(queue, LOANED);
        if (bad[i / 2].no_loans) shmr_stream_lend(source, NULL);
        inject_loan(queue, bad[i / 2].length, bad[i / 2].loan, bad[i / 2].odd_mark ? 2 : 1);
        CHECK_STATUS(receive(NOT_AT_ALL), SHMR_CORRUPT);
        if (queue) {
            inject_fragment(8, UINT64_C(1) << 63, 3, 0); /* of another length */
            CHECK_STATUS(receive(NOT_AT_ALL), SHMR_CORRUPT);
            OK(send_bytes(sent, 10, 0, NOT_AT_ALL));
            expect(sent, 10);
        } else {
            CHECK_STATUS(receive(NOT_AT_ALL), SHMR_CORRUPT);
        }
        close_loans();
    }
}

/* A loan whose bytes come one after the other is waited for. */
static void a_loan_comes_in_parts(void) {
    open_lending(0, LOANED);
    shmr_loan loan;
    uint64_t word = UINT64_C(1) << 63 | LOANED;
    CHECK(shmr_loans_lend(lender, &(shmr_piece){sent, LOANED}, 1, &loan));
    inject(&word, 8);
    expect_nothing();
    inject(&loan, sizeof loan);
    expect_nothing();
    inject("\1", 1);
    expect(sent, LOANED);
    close_loans();
}

/* The end of a process may find a thread inside of a call: nothing is put into the middle of its message. */
static void whoever_is_sending_is_let_alone(void) {
    pthread_t thread;
    int count = 1;
    open_pipe(SMALL);
    CHECK_EQ(pthread_create(&thread, NULL, send_later, &count), 0);
    while (shmr_stream_receive(source, taken, NOT_AT_ALL, &message) != SHMR_NO_MEMORY) shmr_pause();
    shmr_stream_give_up(target);
    shmr_stream_goodbye(target);
    OK(receive(FOR_EVER));
    CHECK(memcmp(got, sent, LARGE) == 0);
    pthread_join(thread, NULL);
    expect_nothing();
    close_streams();
}

int main(void) {
    fill(1);
    RUN(messages_arrive_in_order_and_stay_until_they_are_taken);
    RUN(messages_of_every_size_and_of_many_pieces);
    RUN(what_is_given_up_is_never_seen);
    RUN(a_message_is_given_up_anywhere);
    RUN(goodbye_is_said_last_and_for_ever);
    RUN(a_message_without_memory_passes);
    RUN(what_makes_no_sense_is_corrupt_for_ever);
    RUN(the_number_and_the_checksum_of_a_small_frame_are_filled_in);
    RUN(a_frame_that_is_none_is_left_to_the_reader);
    RUN(messages_of_a_queue_are_cut_and_put_together);
    RUN(higher_priorities_come_in_between);
    RUN(what_is_given_up_in_a_queue_is_never_seen);
    RUN(what_nobody_has_sent_into_a_queue_is_corrupt_once);
    RUN(a_message_of_a_queue_without_memory_passes);
    RUN(whoever_waits_is_woken);
    RUN(all_of_it_may_be_there_on_waking);
    RUN(what_comes_soon_is_found_by_looking);
    RUN(deadlines_are_kept);
    RUN(a_signal_interrupts);
    RUN(another_file_is_let_alone);
    RUN(calls_that_fail);
    RUN(what_was_lent_is_lent_again_when_it_is_back);
    RUN(what_was_lent_may_be_given_up);
    RUN(what_was_lent_passes_without_memory);
    RUN(loans_have_priorities_and_stay_until_they_are_taken);
    RUN(without_loans_it_travels);
    RUN(loans_that_make_no_sense_are_corrupt);
    RUN(a_loan_comes_in_parts);
    RUN(whoever_is_sending_is_let_alone);
    return summary(__FILE__);
}
