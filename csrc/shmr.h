/* SPDX-License-Identifier: BSD-3-Clause */
/* The public interface of the core: one process's attachment to one region.
 *
 * Unless a function says otherwise: it may be called by any thread, does not wait, returns a status code of
 * shmr_status.h and changes nothing when it fails. Deadlines are CLOCK_MONOTONIC nanoseconds; -1 is for ever
 * 0 is not at all, and SHMR_BRIEFLY spins for some microseconds, if that has been gaining. Blocks are named by the caller's `shmr_block`, which carries the full state word that
 * the next transition expects: a stale or doubled call fails with STALE.
 */
#ifndef SHMR_H
#define SHMR_H

#include <stdint.h>

#include "shmr_status.h"

typedef struct shmr shmr;
typedef struct shmr_mapping shmr_mapping;

typedef struct {
    uint32_t participants; /* at most 256 */
    uint32_t doorbells;    /* at most 512: threads that can sleep at once */
    uint32_t rings;        /* at most 8 */
    uint32_t blocks;       /* live blocks; a multiple of 256, at most 2^20 */
    uint64_t arena_bytes;  /* budget; a multiple of 2 MiB */
    uint64_t start;        /* first position of the rings (tests start near the top) */
    uint64_t flags;        /* of the two below */
    uint64_t capacity[8];  /* messages committed and not yet leased, a ring */
} shmr_config;

#define SHMR_BRIEFLY (-2) /* a deadline: for those who hold something dear, like an interpreter */

#define SHMR_CREATOR_RECOVERS 1 /* only the creator clears up after the dead */
#define SHMR_WAIT_ALONE 2       /* keep waiting when the last other participant has died */

typedef struct {
    uint64_t state; /* full state word: the caller's right to the block */
    uint32_t block;
    uint32_t kind;      /* the caller's, 16 bits */
    uint64_t tag;       /* the caller's */
    uint64_t offset;    /* of the payload, from the start of the mapping */
    uint64_t room;      /* bytes there are */
    uint64_t length;    /* bytes in use */
    uint64_t seq;       /* epoch:24 | number:40 of the producer */
    uint32_t producer;
    uint32_t attempts;  /* how often it was delivered to somebody who died */
    uint32_t references;
    uint32_t spec_bytes;
    unsigned char spec[128];
} shmr_block;

typedef struct {
    uint32_t block;
    uint32_t generation;
    uint64_t offset; /* share: bytes from the block's start to the address asked for; hold: of the block */
    uint64_t length;
} shmr_ref;

typedef struct {
    uint64_t budget;    /* bytes of arena there can be */
    uint64_t reserved;  /* bytes of arena in memory */
    uint64_t owned;     /* bytes of extents that this process owns */
    uint64_t used;      /* bytes of blocks allocated in them */
    uint64_t held;      /* bytes of blocks that this process holds by reference or lease */
    uint64_t pins;      /* leases, claims, holds and allocations of this process */
    uint64_t committed, leased, aborted, released, bytes_committed; /* all participants */
    uint64_t late_releases, rescued_wakeups;
    uint64_t participants, deaths, joins;
} shmr_counters;

#define SHMR_SCATTER_SOURCES 16
#define SHMR_SCATTER_UNSENT 0 /* a block: not sent, or taken over by the caller before that */
#define SHMR_SCATTER_OUT 1    /* at the workers */
#define SHMR_SCATTER_BACK 2   /* its answer is here, or it was given up */

typedef struct {
    const char *address; /* of an array that is cut into blocks, one behind the other in memory */
    uint64_t pitch;      /* bytes of one block */
    uint64_t bytes;      /* of all */
    uint64_t before;     /* bytes of its neighbours that each block gets, too, as far as there are any */
    uint64_t after;
} shmr_scatter_source;

typedef struct {
    /* Set by the caller; between calls it may change `stop`, `limit`, the spec and the target. */
    uint32_t sources;
    uint32_t task_ring, result_ring;
    uint32_t task_kind, result_kind;
    int payload_check;
    shmr_scatter_source source[16];
    char *target;          /* where results go that come by reference */
    uint64_t target_pitch; /* bytes of one block's result */
    uint64_t target_bytes;
    unsigned char *states; /* SHMR_SCATTER_... of each block */
    uint64_t count;        /* of blocks: each source has so many */
    uint64_t first_tag;    /* of the message with block 0; the others follow */
    uint64_t stop;         /* do not send this block, nor those behind it */
    int64_t limit;         /* blocks out at once */
    uint32_t spec_bytes;   /* of what goes along with each block */
    unsigned char spec[128];
    /* Counted here. */
    uint64_t next; /* block to be sent */
    int64_t out;   /* sent, and neither back nor given up */
    int64_t arrived;
    uint64_t bytes_sent, bytes_copied;
} shmr_scatter;

/* ---- life ------------------------------------------------------------------------------------------------- */

/* Bytes that a region of this configuration takes (sparse); 0 if the configuration is out of range. */
uint64_t shmr_region_bytes(const shmr_config *config);
/* Lay out a fresh region in the file `fd` (already of the right size, all zero) and join it as participant 0. */
int shmr_create(int fd, const shmr_config *config, shmr **out);
/* Map, validate, join. WOULD_BLOCK: the creator is not ready yet. The descriptor is duplicated. */
int shmr_attach(int fd, shmr **out);
/* No new operations; the participant leaves as soon as nothing is pinned, at once with `force`. */
int shmr_close(shmr *h, int force);
/* Give back the handle itself; the memory goes when the last pin does. */
void shmr_free(shmr *h);
/* In a forked child, instead of shmr_free: give back what it inherited of its parent's attachment. Views that retain the
 * mapping keep it. */
void shmr_forget(shmr *h);
uint32_t shmr_self(const shmr *h);
void *shmr_base(const shmr *h);
uint64_t shmr_mapped_bytes(const shmr *h);
/* Keep the mapping beyond the handle: for views. */
shmr_mapping *shmr_mapping_retain(shmr *h);
void shmr_mapping_release(shmr_mapping *mapping);
void shmr_read_counters(shmr *h, shmr_counters *out);
void shmr_read_config(const shmr *h, shmr_config *out);
void shmr_count_late_release(shmr *h);

/* ---- blocks ----------------------------------------------------------------------------------------------- */

/* A block of `bytes`, CLAIMED by this process, which may name `count` others by reference (each must be held
 * by this process; they are held on until the frame is free again).
 * Kind, tag, length and spec of *out are left as they are: the caller's, for the commit.
 * Waits for space until the deadline; with `items` >= 0 also returns ITEM_WAITS when that ring has an item,
 * so that a process that drains results can never be stuck on its own full arena. */
int shmr_claim(shmr *h, uint64_t bytes, const shmr_ref *refs, uint32_t count, int items, int64_t deadline,
               shmr_block *out);
/* What was claimed is soon to be committed to this ring: whoever sleeps there begins to wake while it is filled. Not
 * needed, and worth nothing for a few bytes that are copied at once. */
void shmr_announce(shmr *h, uint32_t ring);
/* CLAIMED or LEASED by this process -> COMMITTED in the ring, with kind, tag, length and spec as in *block.
 * Waits while `capacity` messages are committed. `payload_check`: store a CRC32C of all bytes. */
int shmr_commit(shmr *h, uint32_t ring, int payload_check, int items, int64_t deadline, shmr_block *block);
int shmr_abort(shmr *h, shmr_block *block);
/* Claim a block of block->length bytes, copy these bytes there and commit it as shmr_commit does; waits as both of them do.
 * With block->state not 0 the bytes are there already, from a call that did not come to its end: commit only. */
int shmr_send(shmr *h, uint32_t ring, int payload_check, int64_t deadline, const void *bytes, shmr_block *block);
/* The oldest message -> LEASED by this process. CORRUPT: the message failed a check and was discarded; if it was the
 * payload's, `kind` and `tag` are its own, and else `kind` is 0.
 * CLOSED: the ring was closed and is empty. */
int shmr_lease(shmr *h, uint32_t ring, int payload_check, int64_t deadline, shmr_block *out);
/* What a lease without `payload_check` has left out, of a block that this process leases. CORRUPT: it is still leased. */
int shmr_check_payload(shmr *h, const shmr_block *block);
int shmr_release(shmr *h, shmr_block *block);
/* The references at the start of a leased block's payload. */
int shmr_references(shmr *h, const shmr_block *block, shmr_ref *out, uint32_t count);

/* ---- by reference ------------------------------------------------------------------------------------------ */

/* A reference to whatever block holds these bytes, if it is one that can be shared. */
int shmr_share(shmr *h, const void *address, uint64_t bytes, shmr_ref *out);
/* Whether these bytes belong to something that this process has allocated: 1 or 0. */
int shmr_allocated_here(shmr *h, const void *address);
/* Hold the block on (one count a call); out: its offset from the start of the mapping and its length. */
int shmr_hold(shmr *h, uint32_t block, uint32_t generation, shmr_ref *out);
int shmr_drop(shmr *h, uint32_t block, uint32_t generation);
/* A claimed block becomes SHARED, held once by this process. */
int shmr_publish(shmr *h, shmr_block *block, shmr_ref *out);

/* ---- rings -------------------------------------------------------------------------------------------------- */

/* Committed and not yet leased; may be stale by the time it returns, never above the capacity. */
uint64_t shmr_approx_fill(shmr *h, uint32_t ring);
/* Whether a commit would find a slot now. */
int shmr_has_room(shmr *h, uint32_t ring);
int shmr_close_ring(shmr *h, uint32_t ring);
/* Wait until the ring has an item (OK), or is closed and empty (CLOSED), or the deadline passes. */
int shmr_wait_item(shmr *h, uint32_t ring, int64_t deadline);
/* Wait until no message of the ring is committed or leased any more. Whoever releases one says so by
 * shmr_notify_idle: for queues whose messages stay leased until the work on them is done. */
int shmr_wait_idle(shmr *h, uint32_t ring, int64_t deadline);
void shmr_notify_idle(shmr *h);
/* Wake every waiter in the region: they look again. */
void shmr_ring_all(shmr *h);

/* ---- death --------------------------------------------------------------------------------------------------- */

/* The slot of a participant (live, or still joining) of that process id, or -1. */
int shmr_find(shmr *h, uint32_t pid);
/* Look whether any other participant has died (asks the kernel) and clear up after it; count of the dead. */
int shmr_check_deaths(shmr *h);
/* Take over what participants have left who ended in good order, as whoever waits for memory does. */
int shmr_adopt(shmr *h);
/* Clear up after participant `slot`, known to be dead. With `taken`, what it had leased is leased to this
 * process and listed there (at most `room`); without, it goes back into its ring with one attempt more. */
int shmr_recover(shmr *h, uint32_t slot, shmr_block *taken, uint32_t room, uint32_t *count);
uint32_t shmr_live_participants(shmr *h);
/* For each place in the table: the process that has it (0: none), and how many messages it has leased and not yet
 * released. A snapshot, exact for who is dead; reads all records. */
void shmr_leases(shmr *h, uint32_t *pids, uint64_t *counts);
/* What a participant says it is doing. */
void shmr_set_progress(shmr *h, uint64_t tag, uint64_t index);
int shmr_progress(shmr *h, uint32_t slot, uint64_t *tag, uint64_t *index, uint64_t *since_ns, uint64_t *starving);
/* Make `slot` stop waiting for memory: nobody can relieve it. */
void shmr_deny(shmr *h, uint32_t slot);
/* Give whole free extents back to the pool. */
void shmr_trim(shmr *h);
/* From now on this process leaves so many extents of the region to others, who need some to answer it. */
void shmr_leave_extents(shmr *h, uint32_t count);
/* End this process, at once, when the process behind `pidfd` ends: a thread that needs no interpreter. */
int shmr_watch_parent(int pidfd);
/* Send a signal to the main thread of a process: a child that nobody has waited for yet, so that it is surely this one. */
int shmr_signal_main_thread(uint32_t pid, int number);
/* From now on that thread also gives back what this process has free, when others wait for memory: four looks a second.
 * The handle must stay until the end of the process. */
void shmr_watch_shortage(shmr *h);
/* From now on C's stdout is written line by line; before anything is printed. Into a pipe it would be by 4 KiB. */
void shmr_print_lines(void);
/* What has been printed to C's stdout, and is no whole line yet, is written now. */
void shmr_flush_prints(void);

/* ---- scatter and gather ---------------------------------------------------------------------------------------- */

/* One thread sends, and may run the whole exchange while it is the only one that leases from the result ring; any one thread
 * that leases from there may accept. */

/* Send blocks until `stop` or the limit; ITEM_WAITS, TIMEOUT and so on when that takes memory that is not there. */
int shmr_scatter_send(shmr *h, shmr_scatter *scatter, int64_t deadline);
/* Put the result in a leased message to its place and release it (one whose tag is not out is only released).
 * WOULD_BLOCK: its kind is another. CORRUPT: it names what is not in the region; its block is given up. */
int shmr_scatter_accept(shmr *h, shmr_scatter *scatter, shmr_block *message);
/* Mark the block of this tag as back; 0 if it was not out. */
int shmr_scatter_settle(shmr_scatter *scatter, uint64_t tag);
/* Send and accept in turn: at most so often, until the deadline, and no longer than blocks are out (but for the first).
 * OK: a message that is the caller's business; TIMEOUT: none. */
int shmr_scatter_run(shmr *h, shmr_scatter *scatter, uint32_t turns, int64_t deadline, shmr_block *message);

/* ---- memory for NumPy (NEP 49) ------------------------------------------------------------------------------- */

/* A PyDataMem_Handler whose allocations of at least `threshold` bytes land in this process's arena, while that
 * holds less than `limit` bytes.
 * It is never freed (a few hundred bytes): arrays may outlive everything else. */
void *shmr_numpy_handler(shmr *h, uint64_t threshold, uint64_t limit);

/* ---- descriptors that are kept --------------------------------------------------------------------------------- */

/* A descriptor, and what tells its file from another one that came to be under that number. */
typedef struct {
    int fd;       /* -1: none */
    uint32_t pid; /* of a pidfd whose inode tells nothing; else 0 */
    uint64_t device, inode;
} shmr_file;

int shmr_file_keep(shmr_file *file, int fd);                   /* 0: it is not open */
int shmr_file_is_ours(const shmr_file *file, uint64_t *bytes); /* *bytes (if any): its length, if it is */
void shmr_file_close(shmr_file *file);                         /* unless it is another one's by now */

/* ---- memory that one end of a channel lends to the other -------------------------------------------------------- */

typedef struct shmr_loans shmr_loans;

typedef struct {
    const void *bytes;
    uint64_t length;
} shmr_piece;

/* What was lent: where it lies, and its number. */
typedef struct {
    uint64_t begin, length, number;
} shmr_loan;

/* A new file for so many bytes of loans, in one direction. -1: errno says why. */
int shmr_loans_file(uint64_t bytes);
/* NULL: no memory. */
shmr_loans *shmr_loans_new(void);
void shmr_loans_free(shmr_loans *l);
/* Of these three one, once; each says whether it was possible. */
/* Such a file, for either side. The descriptor is the caller's, and stays open as long. It is mapped when it is needed. */
int shmr_loans_use(shmr_loans *l, int fd);
/* A new file, which is lent. */
int shmr_loans_make(shmr_loans *l, uint64_t bytes);
/* What another process needs for it, and opens as the borrower. */
const shmr_file *shmr_loans_offer(const shmr_loans *l);
int shmr_loans_accept(shmr_loans *l, int pid, const shmr_file *offer);
/* Lend a copy of the bytes of all pieces; 0: there is no room, or no memory. */
int shmr_loans_lend(shmr_loans *l, const shmr_piece *pieces, uint32_t count, shmr_loan *out);
/* Does it lie in that memory? */
int shmr_loans_has(const shmr_loans *l, const shmr_loan *loan);
/* Copy what was lent. CORRUPT: it lies nowhere; SYSTEM: it could not be read. */
int shmr_loans_copy(shmr_loans *l, const shmr_loan *loan, void *target);
/* Be through with it: its memory may be lent again. */
void shmr_loans_give_back(shmr_loans *l, const shmr_loan *loan);
/* The lender's: if nothing is lent, keep no memory. */
void shmr_loans_rest(shmr_loans *l);

/* ---- whole messages through a pipe or a POSIX message queue ----------------------------------------------------- */

/* One thread uses a stream at a time, for one direction. Deadlines are as above; whatever a call returns, it may be
 * called again with the same message. */

#define SHMR_PRIORITIES 32 /* 0 .. 31; of a pipe only 0 */
#define SHMR_SMALL_FRAME 4000 /* with what belongs to it in a pipe, less than PIPE_BUF */

typedef struct shmr_stream shmr_stream;

typedef struct {
    const char *bytes; /* good until the next one is received; NULL: they are in the memory that was given */
    uint64_t length, number;
    uint32_t priority;
    uint32_t kind; /* of the frame that `bytes` are, if its header and checksum are sound; 0: not looked at, or not sound */
    uint32_t parts, prefix, in_band, producer; /* what the header says, within `length` */
    uint64_t sequence;
} shmr_message;

/* Over a descriptor that does not block and stays the caller's. `fragment_bytes`: of a queue, what a message of it may
 * have (mq_msgsize, at least 32); 0: a pipe. NULL: no memory. */
shmr_stream *shmr_stream_new(int fd, uint32_t fragment_bytes);
void shmr_stream_free(shmr_stream *s);
/* Send large messages, or receive them, through memory that is lent, where that has room. NULL: do so no more. */
void shmr_stream_lend(shmr_stream *s, shmr_loans *loans);
/* Send the bytes of all pieces as one message. WOULD_BLOCK, TIMEOUT, INTERRUPTED: a part of it may be on its way; go on
 * with the same one, or give it up. */
int shmr_stream_send(shmr_stream *s, const shmr_piece *pieces, uint32_t count, uint32_t priority, int64_t deadline);
/* Send a frame of at most SHMR_SMALL_FRAME bytes, in a copy where its header says the number of this message among
 * those sent, the priority as producer, and the checksum; `whole`: of all bytes. */
int shmr_stream_send_frame(shmr_stream *s, const void *bytes, uint64_t length, uint32_t priority, int whole,
                           int64_t deadline);
/* Take back a message that was sent in part, if there is one: the receiver never sees it. Does not wait. */
void shmr_stream_give_up(shmr_stream *s);
/* How many messages of this priority were wholly sent. */
uint64_t shmr_stream_sent(const shmr_stream *s, uint32_t priority);
/* Say that nothing more will come, if that is possible without waiting. */
void shmr_stream_goodbye(shmr_stream *s);
/* Receive the message after that of number `taken` (0: the first one): the same one until its number is told. NO_MEMORY: give memory for `out->length` bytes, then call again;
 * CLOSED: goodbye was said; CORRUPT: what came makes no sense, and of a pipe nothing more ever will. */
int shmr_stream_receive(shmr_stream *s, uint64_t taken, int64_t deadline, shmr_message *out);
/* Memory for the message that was last announced, good until the next one is received or another one is announced. NULL:
 * there is none, and the message is dropped as it comes. */
void shmr_stream_give_memory(shmr_stream *s, void *memory);

/* ---- bytes ---------------------------------------------------------------------------------------------------- */

uint32_t shmr_crc32c(uint32_t crc, const void *bytes, uint64_t length);
/* memcpy; large ones write around the cache, since the reader is elsewhere or late. */
void shmr_copy(void *target, const void *source, uint64_t length);
/* memcpy; the target should be in a cache, for somebody reads it at once. */
void shmr_copy_near(void *target, const void *source, uint64_t length);
int shmr_last_errno(void);
const char *shmr_last_detail(void);
const char *shmr_status_text(int status);
int shmr_abi(void);

#endif
