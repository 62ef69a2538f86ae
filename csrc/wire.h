/* SPDX-License-Identifier: BSD-3-Clause */
/* What the sources of messages over sockets share: wire.c, small.c, sending.c and borrowed.c.
 *
 * Whoever uses a socket holds its port's lock, or the GIL from a look at that lock to the end: all here keep the GIL,
 * and nothing waits. So neither another thread nor a signal's handler sees a step half done.
 *
 * New objects that the garbage collector knows are made before anything is looked at, or while it is off: it may run any
 * code then.
 */
#ifndef WIRE_H
#define WIRE_H

#include "handles.h"

#define NPY_NO_DEPRECATED_API NPY_2_0_API_VERSION
#include <numpy/ndarraytypes.h>

#define DONTWAIT 1 /* of zmq.h, which nobody needs to have installed */
#define SNDMORE 2
#define SRCFD 2
#define MOST_DIMENSIONS 4
#define AFTER_BYTES 2 /* of a pickle of bytes: what follows these */

#define PREFIX_BYTES 24 /* of a part: kind, number, how many were taken; sessions.py */
#define DATA 4
#define ACKNOWLEDGE 6
#define LOAN 9
#define HEADER_BYTES 64 /* of a frame; codec.py */
#define CHECKED_FROM 8
#define KIND_PICKLE 1
#define KIND_ARRAY 3
#define MESSAGE_COST 256
#define SMALL_PART_BYTES 66072    /* a larger one is no small message, whatever is in it */
#define MOST_LENT_BYTES (1 << 20) /* of an array that is copied with the GIL held, */
#define CHECKED_BYTES (1 << 17)   /* or of a frame that is checked */
#define MOST_BEGINNING_BYTES 1024 /* of the frame of an array, before its own */

typedef struct {
    char magic[4];
    uint32_t crc;
    uint8_t version, kind;
    uint16_t flags;
    uint32_t producer;
    uint64_t in_band, total, checked, number;
    uint32_t parts, prefix;
    char unused[8];
} frame_header;
_Static_assert(sizeof(frame_header) == HEADER_BYTES, "as codec.py packs it");

typedef union {
    unsigned char bytes[64];
    void *aligned;
} zmq_msg;

struct zmq {
    uint32_t (*crc32c)(uint32_t, const void *, uint64_t); /* the core's */
    int (*init)(zmq_msg *), (*close)(zmq_msg *), (*more)(const zmq_msg *), (*get)(const zmq_msg *, int);
    size_t (*size)(const zmq_msg *);
    void *(*data)(zmq_msg *);
    int (*recv)(zmq_msg *, void *, int), (*send_msg)(zmq_msg *, void *, int);
    int (*init_size)(zmq_msg *, size_t), (*copy)(zmq_msg *, zmq_msg *);
    int (*send)(void *, const void *, size_t, int);
};
extern struct zmq zmq;

struct loans { /* of the core; shmr.h */
    int (*lend)(shmr_loans *, const shmr_piece *, uint32_t, shmr_loan *);
    int (*has)(const shmr_loans *, const shmr_loan *);
    int (*copy)(shmr_loans *, const shmr_loan *, void *);
    void (*give_back)(shmr_loans *, const shmr_loan *);
};
extern struct loans loans;

typedef struct {
    PyObject_HEAD
    zmq_msg message;
} Part;

typedef struct {
    PyObject_HEAD
    void *socket;
    char half; /* of a message perhaps only the address was sent */
} Wire;

/* What the frame of the last object that was sent begins and ends with, before its own bytes and after: of many alike. */
typedef struct {
    PyObject *beginning; /* bytes */
    PyObject *kind; /* the dtype of an array, or `bytes` */
    Py_ssize_t nbytes;
    char after[AFTER_BYTES]; /* of `bytes` alone */
    int dimensions;
    npy_intp shape[MOST_DIMENSIONS];
} Template;

typedef struct {
    PyObject_HEAD
    PyObject *kept;  /* deque of (number, position of its end, part, messages up to it): may have to be sent again */
    PyObject *inbox; /* deque of (number, kind, part): has come, was not taken */
    PyObject *peer;
    long long acknowledged, messages, released, handed_over, handed_over_most; /* sending */
    long long received, taken, taken_bytes, told, told_bytes;                  /* receiving */
    long long waiting, look_at; /* bytes in the inbox, as sessions.py counts them; from where on it looks itself */
    /* of the two short ways */
    char sends, receives; /* may be gone: nobody is on the long one */
    char answers;
    char checks_all, allows_pickle;
    char as_is; /* arrays: not compressed, that is */
    char offered; /* there is no reason to offer memory that is lent, over this connection */
    long long pace, lent_pace; /* bytes that may be on their way; of what is lent */
    long long most_told, acknowledge_bytes; /* what is taken before that is told */
    long long small_bytes; /* of the largest array that is sent small */
    unsigned long long quick_sent, quick_sent_bytes, quick_received, quick_received_bytes;
    Wire *wire;
    PyObject *lock, *armed, *raw, *hub; /* of the port */
    Template last;
    PyObject *array_type, *begin, *encode; /* both return None for what is not small; `begin` if it may be lent, too */
    PyObject *expected, *decode, *unknown; /* of the link; `decode` returns `unknown` for what it does not know */
    PyObject *make;                        /* returns memory for a frame */
    PyObject *lender, *lenders;            /* have what follows; NULL: nothing is lent, or nobody lends */
    shmr_loans *lends, *borrows;
    shmr_loan *loan; /* the last one of the long way; length 0: it was kept */
} Stream;

extern PyTypeObject PartType, WireType, StreamType;

/* A new part of so many bytes, not written to so far; NULL: an exception. */
Part *part_new(size_t nbytes);

/* Take up to `most` parts (-1: all) out of the socket: to the stream, if they suit it, else to `raw`, a deque, and with
 * them all that follow. Returns 1: there may be more, 0: there was nothing more, -1: an exception. */
int wire_pump(Wire *self, PyObject *raw, long long most, Stream *stream);

/* Whether all that a part calls for is done: it is an acknowledgement, or the next small message, now in the inbox.
 * `entry` is a new tuple of three. -1: an exception. */
int stream_feed(Stream *self, Part *part, PyObject *entry);

int append(PyObject *deque, PyObject *entry);
int add_stream(PyObject *module);

/* small.c */
long long item(PyObject *entry, Py_ssize_t index);
PyObject *entry_of(PyObject *deque, Py_ssize_t index); /* the first or last tuple, borrowed; NULL: there is none */
long long next_number(Stream *self);
long long on_the_way(Stream *self); /* bytes of what is kept */
int is_ready(Stream *self); /* the socket is to be had for as long as the GIL is kept, with a connection; the service is awake */
int may_pump(Stream *self); /* the same, and the socket has parts for this stream alone: no peer there has a name */

/* sending.c */
PyObject *stream_send_small(Stream *self, PyObject *const *args, Py_ssize_t count);
int to_peer(Stream *self, zmq_msg *part); /* whether the connection has got a part, which shares its memory with this one */

/* A part that is a reference. */
typedef struct {
    PyObject_HEAD
    PyObject *owner; /* has the handle */
    shmr_loans *handle;
    shmr_loan loan;
    PyObject *target; /* memory for a copy; NULL: nobody has asked for one */
    void *bytes;      /* of that; NULL: they were not copied so far */
    Py_ssize_t nbytes; /* of the part it stands for */
} Borrowed;
extern PyTypeObject *BorrowedType;

/* NULL without an exception: it refers to nothing. */
Borrowed *borrowed_new(PyObject *owner, shmr_loans *handle, Py_ssize_t before, const void *reference);
/* To `target`, once; runs Python. -1: an exception. Without the GIL only if nobody else can take the part meanwhile. */
int borrowed_copy(Borrowed *self, PyObject *make, int lets_go_of_gil);
void borrowed_give_back(Borrowed *self);
int add_borrowed(PyObject *module);

#endif
